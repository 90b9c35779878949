"""Adapters from URLs: fsspec's memory filesystem, local files, and real HTTP servers on loopback."""

import logging
import subprocess
import sys

import fsspec
import pytest
from file_server import FileServer
from hypothesis import given
from hypothesis import strategies as st
from test_hub import everything_told

from qlora_infer import URLSource, parse_source
from qlora_infer.errors import (
    AdapterAccessError,
    AdapterDownloadError,
    AdapterNotFoundError,
    AdapterSourceError,
    CorruptAdapterError,
    UnsafeAdapterError,
)
from qlora_infer.files.extras import MAX_BYTES
from qlora_infer.sources import filesystem as _fsspec
from qlora_infer.sources import hub
from qlora_infer.testing import fake_engine, write_adapter

SECRET = "s3cr3t/with+signs="
TOKEN = "tok_this_is_a_secret"
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
NAMES = {CONFIG, WEIGHTS}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return write_adapter(tmp_path_factory.mktemp("adapters") / "pirate")


@pytest.fixture
def files(adapter):
    return {f"sub/pirate/{path.name}": path.read_bytes() for path in adapter.iterdir()}


@pytest.fixture
def server(files):
    with FileServer({**files, "sub/pirate/README.md": b"hello"}) as server:
        yield server


@pytest.fixture
def memory(files):
    filesystem = fsspec.filesystem("memory")
    for path, content in files.items():
        filesystem.pipe(f"/bucket/{path}", content)
    yield filesystem
    filesystem.rm("/bucket", recursive=True)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "downloaded"


def resolve(source, folder, *, allow_pickle=False, **arguments):
    source = URLSource(source, **arguments) if arguments else parse_source(source)
    source.fetch("x", folder, token=None, allow_pickle=allow_pickle)
    return folder


def fails(error, source, folder, match=None, **arguments):
    """The error that resolving ends in, of exactly this class; nothing is left of the download."""
    with pytest.raises(error, match=match) as caught:
        resolve(source, folder, **arguments)
    assert type(caught.value) is error
    assert not folder.exists()
    return caught.value


# What is downloaded -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "http", "file"])
def test_an_engine_serves_an_adapter_from_a_url(kind, server, memory, adapter):
    """load_adapter takes a URL, serves what is there, and leaves nothing of the download behind."""
    urls = {"memory": "memory://bucket/sub/pirate", "http": f"{server.url}/sub/pirate", "file": f"file://{adapter}"}
    with fake_engine() as engine:
        loaded = engine.load_adapter("pirate", urls[kind])
        assert loaded.source == urls[kind].removeprefix("file://")
        assert engine.generate("ahoy", adapter="pirate")[0].text == "pirate says: ahoy"
        same = engine.load_adapter("again", adapter)
        assert same.digest == loaded.digest
        assert {path.name for path in engine._registry._store._folder.iterdir()} == {
            str(loaded.int_id),
            str(same.int_id),
        }


def test_an_adapter_s_files_are_fetched_and_no_others(server, folder):
    """The config, what an adapter may carry, and the weights are asked for once each, without a listing."""
    assert {path.name for path in resolve(f"{server.url}/sub/pirate/", folder).iterdir()} == NAMES
    assert server.requests == [f"/sub/pirate/{name}" for name in (CONFIG, *MAX_BYTES, WEIGHTS)]


def test_a_folder_that_was_written_again_is_a_new_version(memory, tmp_path):
    """Nothing of an earlier download is kept: what is loaded is what is there now."""
    with fake_engine() as engine:
        before = engine.load_adapter("pirate", "memory://bucket/sub/pirate")
        for path in write_adapter(tmp_path / "v2", seed=2).iterdir():
            memory.pipe(f"/bucket/sub/pirate/{path.name}", path.read_bytes())
        after = engine.load_adapter("pirate", "memory://bucket/sub/pirate")
        assert after.digest != before.digest
        assert after.version == before.version + 1


def test_storage_options_reach_the_filesystem(server, folder):
    """URLSource(storage_options=) is what the filesystem is made with: here, a header of its own."""
    server.authorization = "Custom key"
    options = {"headers": {"Authorization": "Custom key"}}
    source = URLSource(f"{server.url}/sub/pirate", storage_options=options)
    assert {path.name for path in resolve(source, folder).iterdir()} == NAMES
    with fake_engine() as engine:
        assert engine.load_adapter("pirate", source).source == f"{server.url}/sub/pirate"


def test_options_that_fsspec_cannot_take_are_a_typed_error(server, folder):
    """A wrong option ends as a download that failed, and says to check the options."""
    source = URLSource(f"{server.url}/sub/pirate", storage_options={"headers": 5})
    with pytest.raises(AdapterDownloadError, match="check the URL and its options"):
        resolve(source, folder)


def test_a_pickled_adapter_is_fetched_only_where_the_user_allows_it(server, folder):
    """Pickled weights are refused unread, or fetched with allow_pickle=True."""
    server.files[f"/sub/pirate/{PICKLE}"] = server.files.pop(f"/sub/pirate/{WEIGHTS}")
    fails(UnsafeAdapterError, f"{server.url}/sub/pirate", folder, match="allow_pickle=True")
    found = resolve(f"{server.url}/sub/pirate", folder, allow_pickle=True)
    assert {path.name for path in found.iterdir()} == {CONFIG, PICKLE}


# What is not there --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", ["memory", "http"])
def test_a_missing_file_is_named(kind, missing, server, memory, folder):
    """The error says which of the two files the folder does not have."""
    del server.files[f"/sub/pirate/{missing}"]
    memory.rm(f"/bucket/sub/pirate/{missing}")
    root = {"memory": "memory://bucket", "http": server.url}[kind]
    fails(AdapterNotFoundError, f"{root}/sub/pirate", folder, match=f"{root}/sub/pirate has no {missing}")


@pytest.mark.parametrize("text", ["memory://no/such", "file:///no/such", "/no/such", "./no", "no/such/folder"])
def test_what_does_not_exist_is_never_taken_for_a_hub_id(text, folder, monkeypatch):
    """A path or URL that is not there is an error, and the Hub is not asked."""
    monkeypatch.setattr(hub.HubSource, "download", lambda *_, **__: pytest.fail("the Hub was asked"))
    fails(AdapterNotFoundError, text, folder)


def test_an_unknown_scheme_is_refused_at_once():
    """A scheme that fsspec does not know is a ValueError that shows what can be written."""
    with pytest.raises(ValueError, match=r"no filesystem nosuch://.*'s3://bucket/folder'"):
        parse_source("nosuch://a/b")


def test_without_fsspec_the_extra_is_named():
    """Where fsspec is missing, a URL is an error that names the extra, and other sources work."""
    program = (
        "import sys; sys.modules['fsspec'] = None\n"
        "from qlora_infer import parse_source\n"
        "parse_source('org/repo'), parse_source('./a'), parse_source('file:///a')\n"
        "parse_source('https://host/a')"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "MissingDependencyError" in ended.stderr
    assert ended.stderr.strip().endswith("pip install 'qlora-infer[remote]'")


@pytest.mark.parametrize(
    ("scheme", "module", "command"),
    [("http", "aiohttp", "'qlora-infer[remote]'"), ("s3", "s3fs", "s3fs"), ("gs", "gcsfs", "gcsfs")],
)
def test_without_a_filesystems_package_its_install_is_named(scheme, module, command):
    """Where fsspec is there and the package for a scheme is not, the error ends with what to install."""
    program = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from pathlib import Path; from qlora_infer import parse_source\n"
        f"parse_source('{scheme}://host/a').fetch('x', Path('nowhere'), token=None, allow_pickle=False)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "MissingDependencyError" in ended.stderr
    assert ended.stderr.strip().endswith(f"pip install {command}")


# Access -------------------------------------------------------------------------------------------------------------


def test_a_token_opens_what_is_private(server, folder):
    """401 without a token and 403 with a wrong one say what to do; the right one opens, with a newline at its end."""
    server.authorization = f"Bearer {TOKEN}"
    url = f"{server.url}/sub/pirate"
    fails(AdapterAccessError, url, folder, match=r"it is private: pass URLSource\(url, token=")
    fails(AdapterAccessError, url, folder, match="does not open it: pass .* with another", token="tok_wrong")
    assert {path.name for path in resolve(url, folder, token=f"{TOKEN}\n").iterdir()} == NAMES


def test_a_user_in_the_url_is_sent_as_basic_authorization(server, folder):
    """user:password@ opens a server that asks for them, percent signs decoded, and is not shown."""
    server.authorization = "Basic YW5uOnAvdw=="  # ann:p/w
    source = parse_source(f"http://ann:p%2Fw@{server.host}/sub/pirate")
    assert {path.name for path in resolve(source, folder).iterdir()} == NAMES
    assert str(source) == f"{server.url}/sub/pirate"


def test_the_engines_token_is_for_the_hub_only(server):
    """A URL gets its own token, and never the engine's."""
    with fake_engine(token=TOKEN) as engine:
        engine.load_adapter("pirate", f"{server.url}/sub/pirate")
    assert set(server.authorizations) == {""}


def test_a_token_is_sent_to_its_server_only(server, files, folder):
    """A redirect to another server is followed without the token."""
    with FileServer(files) as other:
        server.redirect_to = other.url
        resolve(f"{server.url}/sub/pirate", folder, token=TOKEN)
    assert set(server.authorizations) == {f"Bearer {TOKEN}"}
    assert set(other.authorizations) == {""}
    assert len(server.authorizations) == len(other.authorizations) == 2 + len(MAX_BYTES)


def test_a_token_that_no_header_can_hold_is_refused_unsent(server, folder):
    """A token with a character that no token has is told as that, and never shown."""
    error = fails(AdapterAccessError, f"{server.url}/sub/pirate", folder, match="copy it again", token="tok_\u00e9x\n1")
    assert "tok_" not in everything_told(error)
    assert server.requests == []


# Secrets ------------------------------------------------------------------------------------------------------------


def break_with(server, failure):
    server.afterwards = "end"
    server.stop_at = 10 if failure == "truncated" else None
    server.status = failure if isinstance(failure, int) else None
    server.redirect_to = "http://127.0.0.1:9" if failure == "unreachable" else None
    if failure == "pickled":
        server.files[f"/sub/pirate/{PICKLE}"] = server.files.pop(f"/sub/pirate/{WEIGHTS}")


@pytest.mark.parametrize("failure", [None, "pickled", 401, 403, 404, 500, "truncated", "unreachable"])
@pytest.mark.parametrize("kind", ["token", "query", "user", "option"])
def test_a_secret_is_never_told(kind, failure, server, folder, caplog):
    """No error, cause, repr or log at DEBUG has a token, a signature, a password or an option, whatever happens."""
    caplog.set_level(logging.DEBUG)
    break_with(server, failure)
    path = f"{server.host}/sub/pirate"
    source = {
        "token": lambda: URLSource(f"http://{path}", token=SECRET),
        "query": lambda: URLSource(f"http://{path}?sig={SECRET}"),
        "user": lambda: URLSource(f"http://ann:{SECRET.replace('/', '%2F')}@{path}"),
        "option": lambda: URLSource(f"http://{path}", storage_options={"headers": {"X-Key": SECRET}}),
    }[kind]()
    told = str(source) + repr(source)
    if failure is None:
        resolve(source, folder)
    else:
        with pytest.raises((AdapterSourceError, UnsafeAdapterError)) as caught:
            resolve(source, folder)
        told += everything_told(caught.value)
    told += caplog.text
    assert not any(secret in told for secret in ("s3cr3t", "with+signs", "ann:"))


def test_a_signed_query_is_sent_with_each_file_and_shown_nowhere(server):
    """A signed URL of a folder opens its files, as it is written, and the adapter's record does not have it."""
    server.query = "sig=a%2Bb/c%3D&expires=1"
    with fake_engine() as engine:
        loaded = engine.load_adapter("pirate", f"{server.url}/sub/pirate?{server.query}")
    assert loaded.source == f"{server.url}/sub/pirate"
    assert server.requests == [f"/sub/pirate/{name}?{server.query}" for name in (CONFIG, *MAX_BYTES, WEIGHTS)]


def test_a_signature_that_has_expired_says_so(server, folder):
    """403 for a signed URL says to sign it again, not to pass a token."""
    server.query = "sig=new"
    fails(AdapterAccessError, f"{server.url}/sub/pirate?sig=old", folder, match="sign it again")


def test_an_option_that_the_failure_shows_is_left_out(memory, folder, monkeypatch):
    """Elsewhere the failure is the cause, unless it tells a secret of the options, also one deep inside."""
    for shown, is_kept in (("no such key", True), (f"key {SECRET} is wrong", False)):

        def fail(*_, shown=shown, **__):
            raise OSError(shown)

        monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "_open", fail)
        source = URLSource("memory://bucket/sub/pirate", storage_options={"client": {"keys": [SECRET]}})
        with pytest.raises(AdapterDownloadError) as caught:
            resolve(source, folder)
        assert (caught.value.__cause__ is not None) is is_kept
        assert "s3cr3t" not in everything_told(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        *("https://ann:s3cr3t/x@host/a", "https:/ann:s3cr3t@host/a", "ht tps://ann:s3cr3t@host/a"),
        *("https://?sig=s3cr3t", "https://host/a?sig=s3cr3t#x", "s3://bucket/a?sig=s3cr3t", "https://host/a\n?s3cr3t"),
        *("memory://a::https://ann:s3cr3t@host", "nosuch://ann:s3cr3t@host/a"),
    ],
)
def test_a_url_that_is_refused_is_not_shown_with_its_secrets(text):
    """A URL that was mistyped is a ValueError without its password and query."""
    with pytest.raises(ValueError) as caught:
        parse_source(text)
    assert "s3cr3t" not in everything_told(caught.value)


# Connections that fail ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [0, 100])
def test_a_server_that_falls_silent_is_given_up(stop_at, server, folder, monkeypatch):
    """Silence ends in an error after TIMEOUT, before the first byte and after it."""
    monkeypatch.setattr(_fsspec, "TIMEOUT", 0.2)
    server.stop_at, server.afterwards = stop_at, "silent"
    fails(AdapterDownloadError, f"{server.url}/sub/pirate", folder, match="fell silent")


def test_a_server_that_drips_is_given_up(server, folder, monkeypatch):
    """A byte now and then keeps no download alive: a mebibyte has to come within STEP_TIMEOUT."""
    monkeypatch.setattr(_fsspec, "STEP_TIMEOUT", 0.5)
    server.stop_at, server.afterwards = 1, "drip"
    fails(AdapterDownloadError, f"{server.url}/sub/pirate", folder, match=r"took more than 0\.5 s")


def test_a_body_that_is_cut_off_is_an_error_and_a_retry_succeeds(server, folder):
    """Fewer bytes than were announced are no file."""
    server.stop_at = 100
    fails(AdapterDownloadError, f"{server.url}/sub/pirate", folder, match="failed .*try again")
    server.stop_at = None
    assert {path.name for path in resolve(f"{server.url}/sub/pirate", folder).iterdir()} == NAMES


@pytest.mark.parametrize("status", [400, 429, 500, 503])
def test_a_server_that_refuses_is_a_download_error(status, server, folder):
    """Other answers are told by their status."""
    server.status = status
    fails(AdapterDownloadError, f"{server.url}/sub/pirate", folder, match=f"answered {status}")


def test_a_server_that_is_not_there_is_a_download_error(folder):
    """A connection that is refused is told, and by its address."""
    fails(AdapterDownloadError, "http://127.0.0.1:9/a", folder, match="http://127.0.0.1:9/a failed")


def test_a_failed_replacement_leaves_the_old_version_serving(server):
    """An adapter whose new version cannot be downloaded serves as before."""
    with fake_engine() as engine:
        before = engine.load_adapter("pirate", f"{server.url}/sub/pirate")
        server.stop_at = 100
        with pytest.raises(AdapterDownloadError):
            engine.load_adapter("pirate", f"{server.url}/sub/pirate")
        assert engine.adapters == {"pirate": before}
        assert [path.name for path in engine._registry._store._folder.iterdir()] == [str(before.int_id)]


# Files that are too large -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "http"])
def test_a_config_that_is_too_large_is_not_read_to_its_end(kind, server, memory, folder):
    """A config of more than a mebibyte is refused while it is downloaded."""
    server.num_bytes = 3 << 20
    memory.pipe(f"/bucket/sub/pirate/{CONFIG}", bytes(3 << 20))
    root = {"memory": "memory://bucket", "http": server.url}[kind]
    fails(CorruptAdapterError, f"{root}/sub/pirate", folder, match=f"{CONFIG} is too large")


def test_weights_that_are_too_large_are_refused(server, folder, monkeypatch):
    """What no adapter needs does not fill the disk."""
    monkeypatch.setattr(_fsspec, "MAX_WEIGHTS_BYTES", 1000)
    fails(CorruptAdapterError, f"{server.url}/sub/pirate", folder, match="has at most 1000 bytes")


# What is written ----------------------------------------------------------------------------------------------------

NAME = st.text("abcXYZ019-_.~ é%@+", min_size=1, max_size=12).filter(lambda name: name.isprintable())


@given(
    scheme=st.sampled_from(["s3", "gs", "memory", "abfs", "http", "https", "file"]),
    host=st.from_regex(r"[a-z][a-z0-9.-]{0,20}", fullmatch=True),
    path=st.lists(NAME, max_size=3).map("/".join),
)
def test_a_url_is_read_as_it_is_written(scheme, host, path):
    """parse_source(str(source)) is the same source again; a file's URL is its path."""
    text = f"file:///{host}/{path}" if scheme == "file" else f"{scheme}://{host}/{path}"
    source = parse_source(text)
    assert str(source) == text.removeprefix("file://")
    assert parse_source(str(source)) == parse_source(source) == source


def test_secrets_are_all_that_a_url_loses_as_text():
    """What is parsed from the text of a source names the same place, without the password and the query."""
    source = parse_source("https://ann:pw@host:8080/a/b%20c?sig=1")
    assert str(source) == "https://host:8080/a/b%20c"
    assert repr(source) == "URLSource(url='https://host:8080/a/b%20c')"
    assert parse_source(str(source)) == URLSource("https://host:8080/a/b%20c")
    assert source == URLSource("https://ann:pw@host:8080/a/b%20c?sig=1")
    assert str(URLSource("abfs://container@account.dfs.core.windows.net/a")).startswith("abfs://container@account")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"url": "s3://b/a", "token": "tok"}, "storage_options="),
        ({"url": "https://ann@host/a", "token": "tok"}, "leave one of them out"),
        ({"url": "org/repo", "storage_options": {"key": "k"}}, "a URL is written"),
        ({"url": "./a", "storage_options": {"key": "k"}}, "a URL is written"),
        ({"url": "file:///a"}, "is a local folder"),
        ({"url": "https://"}, "names no place"),
        ({"url": "file://a/b"}, "not absolute"),
        ({"url": "s3://a?versionId=1"}, "only http"),
        ({"url": "zip://a.zip::s3://b/c"}, "chains URLs"),
        ({"url": "https://host/a#b"}, "%23"),
    ],
)
def test_contradictions_of_a_url_are_refused(arguments, match):
    """What a URL cannot have is a ValueError, before anything is asked for."""
    with pytest.raises(ValueError, match=match):
        URLSource(**arguments)


def test_a_token_of_a_wrong_type_is_not_shown():
    """The TypeError names the type, and nothing of the value."""
    with pytest.raises(TypeError, match="token must be text, got bytes") as caught:
        URLSource("https://host/a", token=SECRET.encode())
    assert "s3cr3t" not in everything_told(caught.value)
