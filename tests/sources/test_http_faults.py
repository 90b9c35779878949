"""Adapters from HTTP servers that redirect, reset, cut off, stall and lie: a typed error or the right bytes."""

import gzip
import resource
import time

import pytest
from file_server import FileServer

from qlora_infer import URLSource
from qlora_infer.errors import AdapterDownloadError, CorruptAdapterError
from qlora_infer.files.extras import MAX_BYTES
from qlora_infer.sources import filesystem
from qlora_infer.testing import fake_engine, write_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return write_adapter(tmp_path_factory.mktemp("adapters") / "pirate")


@pytest.fixture
def server(adapter):
    with FileServer({f"pirate/{path.name}": path.read_bytes() for path in adapter.iterdir()}) as server:
        yield server


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "downloaded"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def download(server, folder, **arguments):
    URLSource(f"{server.url}/pirate", **arguments).fetch("x", folder, token=None, allow_pickle=False)
    return contents(folder)


def redirect(location, status=302):
    return f"HTTP/1.1 {status} Found\r\nLocation: {location}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".encode()


def answer(body, *headers, status="200 OK"):
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode() + body


# Redirects ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_of_any_kind_is_followed_to_the_right_bytes(status, server, adapter, folder):
    """A file that moved is read where it is now, over a chain of redirects, absolute and relative ones."""
    server.files["/moved/weights"] = server.files.pop(f"/pirate/{WEIGHTS}")
    server.raw[f"/pirate/{WEIGHTS}"] = redirect("/second", status)
    server.raw["/second"] = redirect(f"{server.url}/moved/weights", status)
    assert download(server, folder) == contents(adapter)


def test_redirects_that_never_end_are_given_up(server, folder):
    """A server that sends a request round and round is left after a few requests."""
    server.redirect_to = server.url
    with pytest.raises(AdapterDownloadError, match="TooManyRedirects"):
        download(server, folder)
    assert len(server.requests) <= 20


@pytest.mark.parametrize("location", ["file:///etc/hostname", "ftp://127.0.0.1/a", "gopher:x", "//", "http://["])
def test_a_redirect_out_of_http_is_not_followed(location, server, folder):
    """A server cannot make the library read a local file or speak another protocol."""
    server.raw[f"/pirate/{CONFIG}"] = redirect(location)
    with pytest.raises(AdapterDownloadError):
        download(server, folder)
    assert not folder.exists()


# Bodies that are not whole ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("afterwards", ["reset", "end"])
@pytest.mark.parametrize("stop_at", [0, 1, 300])
def test_a_connection_that_breaks_is_an_error_and_the_old_version_serves(stop_at, afterwards, server):
    """A reset or an end, before a body and in it, is a download that failed; the version that was loaded serves on."""
    with fake_engine() as engine:
        before = engine.load_adapter("pirate", f"{server.url}/pirate")
        server.stop_at, server.afterwards = stop_at, afterwards
        with pytest.raises(AdapterDownloadError):
            engine.load_adapter("pirate", f"{server.url}/pirate")
        assert engine.adapters == {"pirate": before}
        assert engine.generate("ahoy", adapter="pirate")[0].text == "pirate says: ahoy"
        server.stop_at = None
        assert engine.load_adapter("pirate", f"{server.url}/pirate").digest == before.digest


def length(body):
    return f"Content-Length: {len(body)}"


def chunk(body):
    return f"{len(body):x}\r\n".encode() + body + b"\r\n"


CHUNKED = "Transfer-Encoding: chunked"

#: Answers to a request for weights of so many bytes; each of them looks well-formed at its beginning.
LIES = {
    "half of it, as all of it": lambda all: answer(all[:900], "Content-Length: 900"),
    "half of it, without a length": lambda all: answer(all[:900], "Connection: close"),
    "a part that was not asked for": lambda all: answer(
        all[:900], "Content-Length: 900", f"Content-Range: bytes 0-899/{len(all)}", status="206 Partial Content"
    ),
    "chunks without the last": lambda all: answer(chunk(all), CHUNKED),
    "a chunk without a size": lambda all: answer(chunk(all) + b"what\r\n", CHUNKED),
    "a chunk of a size beyond all": lambda all: answer(b"f" * 40 + b"\r\n" + all, CHUNKED),
    "two lengths": lambda all: answer(all, length(all), "Content-Length: 900"),
    "a length below nothing": lambda all: answer(all, "Content-Length: -1"),
    "a length beyond all": lambda all: answer(all, f"Content-Length: {2**63}"),
    "what is no gzip": lambda all: answer(all, length(all), "Content-Encoding: gzip"),
    "half of a gzip": lambda all: answer(gzip.compress(all)[:500], "Content-Length: 500", "Content-Encoding: gzip"),
    "more than it": lambda all: answer(all + all[:900], f"Content-Length: {len(all) + 900}"),
    "a page to sign in": lambda all: answer(b"<html>Sign in</html>", "Content-Length: 20", "Content-Type: text/html"),
    "nothing": lambda all: answer(b"", "Content-Length: 0"),
    "no content": lambda all: answer(b"", status="204 No Content"),
    "a redirect to nowhere": lambda all: answer(all[:900], "Content-Length: 900", status="302 Found"),
    "headers without an end": lambda all: answer(b"", *(f"X-{n}: {'y' * 1000}" for n in range(2000))),
    "a header of megabytes": lambda all: answer(all, f"X: {'y' * (4 << 20)}", length(all)),
    "another protocol": lambda all: b"SSH-2.0-OpenSSH_9.6\r\n",
    "no answer": lambda all: b"",
}


@pytest.mark.parametrize("lie", LIES)
def test_an_answer_that_is_not_the_file_changes_nothing(lie, server, adapter):
    """Whatever a server sends in place of the weights is a typed error; the version that was loaded serves on."""
    with fake_engine() as engine:
        before = engine.load_adapter("pirate", f"{server.url}/pirate")
        server.raw[f"/pirate/{WEIGHTS}"] = LIES[lie]((adapter / WEIGHTS).read_bytes())
        with pytest.raises((AdapterDownloadError, CorruptAdapterError)):
            engine.load_adapter("pirate", f"{server.url}/pirate")
        assert engine.adapters == {"pirate": before}
        assert engine.generate("ahoy", adapter="pirate")[0].text == "pirate says: ahoy"
        assert not list(engine._registry._store._folder.glob("*-scratch"))


def test_a_compressed_answer_is_the_file(server, adapter, folder):
    """Content-Encoding is undone: the bytes on disk are those of the file."""
    body = gzip.compress((adapter / WEIGHTS).read_bytes())
    server.raw[f"/pirate/{WEIGHTS}"] = answer(body, length(body), "Content-Encoding: gzip")
    assert download(server, folder) == contents(adapter)


def test_a_compressed_answer_is_not_unpacked_beyond_its_limit(server, folder):
    """A mebibyte that unpacks to a gibibyte is left at the limit of its file, and does not fill the memory."""
    body = gzip.compress(bytes(1 << 30), compresslevel=1)
    server.raw[f"/pirate/{CONFIG}"] = answer(body, length(body), "Content-Encoding: gzip")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CorruptAdapterError, match=f"{CONFIG} is too large"):
        download(server, folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_an_answer_without_an_end_is_left_at_the_limit_of_its_file(server, caplog):
    """Files beside the weights have limits of their own, and a server that says no length is held to them.

    The adapter is loaded without such a file; strict refuses it.
    """
    name, max_bytes = min(MAX_BYTES.items(), key=lambda item: item[1])
    server.raw[f"/pirate/{name}"] = answer(bytes(max_bytes + 1), "Connection: close")
    with fake_engine() as engine:
        with pytest.raises(CorruptAdapterError, match=f"{name} is too large"):
            engine.load_adapter("strict", f"{server.url}/pirate", strict=True)
        assert engine.load_adapter("pirate", f"{server.url}/pirate").carries == ()
        copy = engine._registry.current("pirate").path
        assert sorted(path.name for path in copy.iterdir()) == sorted([CONFIG, WEIGHTS, name])
        assert (copy / name).stat().st_blocks == 0
    assert f"without {name}: {name} is too large" in caplog.text


# Other bytes --------------------------------------------------------------------------------------------------------


def test_other_bytes_on_the_second_try_are_what_is_loaded(server, tmp_path):
    """After a download that broke, a retry takes the whole files that are there now: nothing of the first is left."""
    with fake_engine() as engine:
        server.stop_at = 300
        with pytest.raises(AdapterDownloadError):
            engine.load_adapter("pirate", f"{server.url}/pirate")
        second = write_adapter(tmp_path / "second", rank=4, seed=2)
        server.files = {f"/pirate/{name}": content for name, content in contents(second).items()}
        server.stop_at = None
        loaded = engine.load_adapter("pirate", f"{server.url}/pirate")
        assert loaded.rank == 4
        assert loaded.digest == engine.load_adapter("same", second).digest


def test_a_config_and_weights_of_two_versions_are_refused(server, tmp_path):
    """A folder that is rewritten between its two files gives an error, and never half of each."""
    with fake_engine() as engine:
        before = engine.load_adapter("pirate", f"{server.url}/pirate")
        second = write_adapter(tmp_path / "second", rank=4, seed=2)
        server.files[f"/pirate/{WEIGHTS}"] = (second / WEIGHTS).read_bytes()
        with pytest.raises(CorruptAdapterError):
            engine.load_adapter("pirate", f"{server.url}/pirate")
        assert engine.adapters == {"pirate": before}


def test_a_server_is_asked_for_whole_files(server, adapter, folder):
    """Each file is one stream, so that no file is put together from ranges of two versions."""
    assert download(server, folder) == contents(adapter)
    assert set(server.ranges) == {""}


# Stalls -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("afterwards", ["silent", "drip"])
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_server_that_stalls_is_left_in_time_and_changes_nothing(name, afterwards, server, monkeypatch):
    """Silence, and a byte now and then, end in an error in bounded time, whichever file they are in."""
    with fake_engine() as engine:
        before = engine.load_adapter("pirate", f"{server.url}/pirate")
        monkeypatch.setattr(filesystem, "TIMEOUT", 0.3)
        monkeypatch.setattr(filesystem, "STEP_TIMEOUT", 0.6)
        server.afterwards = afterwards
        server.stop_at = 1 if name == CONFIG else len(server.files[f"/pirate/{CONFIG}"])
        started = time.monotonic()
        with pytest.raises(AdapterDownloadError, match="given up"):
            engine.load_adapter("pirate", f"{server.url}/pirate")
        assert time.monotonic() - started < 10
        assert engine.adapters == {"pirate": before}
        assert engine.generate("ahoy", adapter="pirate")[0].text == "pirate says: ahoy"
