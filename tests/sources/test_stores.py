"""Adapters from object stores: real servers of S3 and of Google Cloud Storage on loopback, through s3fs and gcsfs."""

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from attrs import frozen
from test_hub import everything_told

from qlora_infer import URLSource
from qlora_infer.errors import AdapterAccessError, AdapterDownloadError, AdapterNotFoundError, CorruptAdapterError
from qlora_infer.sources import filesystem
from qlora_infer.testing import fake_engine, write_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SECRET = "s3cr3t/with+signs="


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return write_adapter(tmp_path_factory.mktemp("adapters") / "pirate")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "downloaded"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fetch(source, folder):
    source.fetch("x", folder, token=None, allow_pickle=False)
    return folder


# S3 -----------------------------------------------------------------------------------------------------------------


@frozen
class S3:
    """A running server of S3 that asks for the keys of its one user.

    Attributes:
        process: The server's own process.
        options: The storage options with which s3fs reads it.
        client: boto3's client of the user.
    """

    process: subprocess.Popen[str]
    options: dict[str, str]
    client: object

    def put(self, key, content):
        self.client.put_object(Bucket="adapters", Key=key, Body=content)

    def source(self, place, **options):
        return URLSource(f"s3://{place}", storage_options={**self.options, **options})


def start_s3(buckets):
    """Start moto's server on a port that is free, with one user, whose keys it asks for from then on."""
    boto3 = pytest.importorskip("boto3")
    command = [sys.executable, "-m", "moto.server", "-p", "0"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    url = next(found[0] for line in process.stderr if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
    threading.Thread(target=process.stderr.read, daemon=True).start()  # a pipe that is full would stop it

    def client(service, key, secret):
        keys = {"aws_access_key_id": key, "aws_secret_access_key": secret}
        return boto3.client(service, endpoint_url=url, region_name="us-east-1", **keys)

    iam = client("iam", "root", "root")
    iam.create_user(UserName="ann")
    policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
    iam.put_user_policy(UserName="ann", PolicyName="all", PolicyDocument=json.dumps(policy))
    made = iam.create_access_key(UserName="ann")["AccessKey"]
    keys = made["AccessKeyId"], made["SecretAccessKey"]
    reset = urllib.request.Request(f"{url}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"}, method="POST")
    urllib.request.urlopen(reset).close()
    s3 = S3(process, {"endpoint_url": url, "key": keys[0], "secret": keys[1]}, client("s3", *keys))
    for bucket in buckets:
        s3.client.create_bucket(Bucket=bucket)
    return s3


@contextlib.contextmanager
def running_s3(*buckets):
    s3 = start_s3(buckets)
    try:
        yield s3
    finally:
        s3.process.send_signal(signal.SIGCONT)
        s3.process.kill()
        s3.process.wait()


@pytest.fixture(scope="session")
def s3_server():
    pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    with running_s3("adapters") as s3:
        yield s3


@pytest.fixture
def s3(s3_server, adapter):
    for name, content in contents(adapter).items():
        s3_server.put(f"sub/pirate/{name}", content)
    return s3_server


def test_an_engine_serves_an_adapter_from_s3(s3, adapter):
    """With keys and endpoint in storage_options, what is served is what the bucket holds, byte for byte."""
    with fake_engine() as engine:
        loaded = engine.load_adapter("pirate", s3.source("adapters/sub/pirate"))
        assert loaded.source == "s3://adapters/sub/pirate"
        assert loaded.digest == engine.load_adapter("same", adapter).digest
        assert engine.generate("ahoy", adapter="pirate")[0].text == "pirate says: ahoy"


def test_what_s3_holds_is_what_is_downloaded(s3, adapter, folder):
    """The files come whole, and only an adapter's own; a later write is what comes next."""
    s3.put("sub/pirate/README.md", b"hello")
    assert contents(fetch(s3.source("adapters/sub/pirate"), folder)) == contents(adapter)
    s3.put(f"sub/pirate/{WEIGHTS}", b"other")
    later = fetch(s3.source("adapters/sub/pirate"), folder.with_name("later"))
    assert (later / WEIGHTS).read_bytes() == b"other"


@pytest.mark.parametrize(
    "wrong",
    [{"secret": SECRET}, {"key": "AKIASECRET7EXAMPLE"}, {"key": None, "secret": None, "anon": True}],
    ids=["secret", "key", "nothing"],
)
def test_wrong_keys_are_an_access_error_that_tells_none(wrong, s3, folder, caplog):
    """The error says which option to pass; no message, cause, repr or log at DEBUG has a secret key."""
    caplog.set_level(logging.DEBUG)
    source = s3.source("adapters/sub/pirate", **wrong)
    with pytest.raises(
        AdapterAccessError, match=r"credentials are needed: pass URLSource\(url, storage_options="
    ) as caught:
        fetch(source, folder)
    assert not folder.exists()
    told = everything_told(caught.value) + caplog.text + repr(source) + str(source)
    assert SECRET not in told
    assert s3.options["secret"] not in told


def test_a_session_token_that_is_not_taken_is_an_access_error_that_does_not_tell_it(s3, folder, caplog):
    """S3 refuses a wrong or expired token without a reason; the error names that one, and not the token."""
    caplog.set_level(logging.DEBUG)
    for logger in ("botocore", "aiobotocore"):  # at DEBUG, botocore's own log has the headers that it signs
        caplog.set_level(logging.INFO, logger)
    source = s3.source("adapters/sub/pirate", token=SECRET)
    with pytest.raises(AdapterAccessError, match="a session token is wrong or has expired") as caught:
        fetch(source, folder)
    assert SECRET not in everything_told(caught.value) + caplog.text + repr(source) + str(source)


@pytest.mark.parametrize(
    ("place", "missing"), [("nosuch/pirate", CONFIG), ("adapters/other", CONFIG), ("adapters/half", WEIGHTS)]
)
def test_a_bucket_or_key_that_is_not_there_is_named(place, missing, s3, adapter, folder):
    """A bucket, a folder and a file that do not exist are told by the URL and the file's name."""
    s3.put(f"half/{CONFIG}", (adapter / CONFIG).read_bytes())
    with pytest.raises(AdapterNotFoundError, match=f"s3://{place} has no {missing}"):
        fetch(s3.source(place), folder)
    assert not folder.exists()


def test_an_object_that_changes_while_it_is_read_is_never_put_together(s3, folder, monkeypatch):
    """An object that is written between two blocks is an error: no file has the beginning of one and the end of another."""
    s3.put(f"large/{CONFIG}", b"{}")
    s3.put(f"large/{WEIGHTS}", b"a" * (3 << 20))
    read = filesystem._read

    def read_and_replace(file):
        chunk = read(file)
        if chunk.startswith(b"a"):
            s3.put(f"large/{WEIGHTS}", b"b" * (3 << 20))
        return chunk

    monkeypatch.setattr(filesystem, "_read", read_and_replace)
    options = {"default_block_size": 1 << 20, "default_fill_cache": False}
    with pytest.raises(AdapterDownloadError):
        fetch(s3.source("adapters/large", **options), folder)
    assert not folder.exists()


def test_damaged_weights_on_s3_change_nothing(s3):
    """Half of a file, as it was uploaded, is a corrupt adapter; what was loaded serves on."""
    with fake_engine() as engine:
        before = engine.load_adapter("pirate", s3.source("adapters/sub/pirate"))
        s3.put(f"sub/pirate/{WEIGHTS}", b"x" * 100)
        with pytest.raises(CorruptAdapterError):
            engine.load_adapter("pirate", s3.source("adapters/sub/pirate"))
        assert engine.adapters == {"pirate": before}
        assert engine.generate("ahoy", adapter="pirate")[0].text == "pirate says: ahoy"


def test_an_s3_server_that_hangs_or_is_gone_is_given_up(adapter, monkeypatch):
    """A server that accepts and never answers, and one that has ended, are download errors in bounded time."""
    pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    monkeypatch.setattr(filesystem, "STEP_TIMEOUT", 5.0)
    with running_s3("adapters") as s3, fake_engine() as engine:
        for name, content in contents(adapter).items():
            s3.put(f"pirate/{name}", content)
        before = engine.load_adapter("pirate", s3.source("adapters/pirate"))
        for fault in (signal.SIGSTOP, signal.SIGKILL):
            s3.process.send_signal(fault)
            started = time.monotonic()
            with pytest.raises(AdapterDownloadError):
                engine.load_adapter("pirate", s3.source("adapters/pirate"))
            assert time.monotonic() - started < 20
            assert engine.adapters == {"pirate": before}
            assert engine.generate("ahoy", adapter="pirate")[0].text == "pirate says: ahoy"


# Google Cloud Storage -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def gcs_server():
    """gcp-storage-emulator on a free port; it asks for no credentials."""
    # gcsfs, as it is imported: it would ask for a bucket's kind over gRPC, which the emulator does not speak.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    gcsfs = pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="adapters")
    server.start()
    url = f"http://127.0.0.1:{server._api._httpd.server_address[1]}"
    yield gcsfs.GCSFileSystem(endpoint_url=url, token="anon", skip_instance_cache=True)
    server.stop()


@pytest.fixture
def gcs(gcs_server, adapter):
    for name, content in contents(adapter).items():
        gcs_server.pipe(f"adapters/sub/pirate/{name}", content)
    return gcs_server


def gcs_source(gcs, place, **options):
    return URLSource(f"gs://{place}", storage_options={"endpoint_url": gcs._endpoint, "token": "anon", **options})


def test_an_engine_serves_an_adapter_from_google_cloud_storage(gcs, adapter):
    """What is served is what the bucket holds, byte for byte; a folder that is not there leaves it serving."""
    with fake_engine() as engine:
        loaded = engine.load_adapter("pirate", gcs_source(gcs, "adapters/sub/pirate"))
        assert loaded.digest == engine.load_adapter("same", adapter).digest
        with pytest.raises(AdapterNotFoundError):
            engine.load_adapter("pirate", gcs_source(gcs, "adapters/other"))
        assert engine.adapters["pirate"] == loaded
        assert engine.generate("ahoy", adapter="pirate")[0].text == "pirate says: ahoy"


@pytest.mark.parametrize(
    ("place", "missing"), [("nosuch/pirate", CONFIG), ("adapters/other", CONFIG), ("adapters/half", WEIGHTS)]
)
def test_what_google_cloud_storage_does_not_have_is_named(place, missing, gcs, folder):
    """A bucket, a folder and a file that do not exist are told by the URL and the file's name."""
    gcs.pipe(f"adapters/half/{CONFIG}", b"{}")
    with pytest.raises(AdapterNotFoundError, match=f"gs://{place} has no {missing}"):
        fetch(gcs_source(gcs, place), folder)
    assert not folder.exists()


def test_credentials_that_google_cannot_read_are_told_without_them(gcs, folder, caplog):
    """Credentials of a wrong form are a download error that says to check the options, and shows none of them."""
    caplog.set_level(logging.DEBUG)
    source = gcs_source(gcs, "adapters/sub/pirate", token={"type": "authorized_user", "private_key": SECRET})
    with pytest.raises(AdapterDownloadError, match="check the URL and its options") as caught:
        fetch(source, folder)
    assert SECRET not in everything_told(caught.value) + caplog.text + repr(source)
