"""Downloads from fsspec's filesystems, whose errors are translated; only this file imports fsspec.

A filesystem has neither commits nor, often, listings: the files are asked for by their names, one after the other.
A folder that is written to meanwhile may give an old one and a new one: write a new version to a new folder.

Messages never quote another library's words, which may have a secret in them. The error itself is the cause of ours
where it tells none; over HTTP it never is, because it may show a signed URL that a server redirected to.
"""

from __future__ import annotations

import base64
import errno
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from attrs import evolve, frozen

from qlora_infer.conversions.shards import MAX_INDEX_BYTES, MAX_SHARDS, shard_names
from qlora_infer.errors import (
    AdapterAccessError,
    AdapterDownloadError,
    AdapterNotFoundError,
    AdapterSourceError,
    CorruptAdapterError,
    MissingDependencyError,
    QLoRAInferError,
    UnsafeAdapterError,
)
from qlora_infer.files.content import MAX_WEIGHTS_BYTES
from qlora_infer.files.extras import MAX_BYTES, mark_too_large
from qlora_infer.files.peft_config import MAX_CONFIG_BYTES
from qlora_infer.files.snapshot import CONFIG_NAME, INDEX_NAMES, MLX_NAME, PICKLE_NAMES, WEIGHTS_NAME, where_else
from qlora_infer.sources.secrets import without_secrets
from qlora_infer.sources.url import URL

T = TypeVar("T")

#: Seconds that an HTTP server may be silent.
TIMEOUT = 10.0
#: Seconds that one step may take, on any filesystem: to connect, to open a file, or to bring the next mebibyte. What
#: is slower than that, 17 kB/s, is taken for dead; apart from this a slow connection may take its time.
STEP_TIMEOUT = 60.0

PICKLE_NAME = PICKLE_NAMES[0]

_CHUNK = 1 << 20

_NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def check_scheme(scheme: str) -> None:
    """Check that fsspec lists a scheme, whether or not the package for it is installed.

    Raises:
        ValueError: It does not.
        MissingDependencyError: There is no fsspec.
    """
    try:
        import fsspec
    except ImportError as error:
        raise MissingDependencyError(
            f"{scheme}:// is read with fsspec, which is not installed: pip install 'qlora-infer[remote]'"
        ) from error
    if scheme not in fsspec.available_protocols() and scheme not in fsspec.registry:
        raise ValueError(
            f"fsspec knows no filesystem {scheme}:// (s3:// is read with pip install s3fs, gs:// with gcsfs, abfs:// "
            "with adlfs; another package may have to be installed): a URL is written 's3://bucket/folder', a Hub id "
            "'org/repo', and a path begins with './' or '/'"
        )


def download_adapter(
    adapter: str,
    url: URL,
    folder: Path,
    *,
    token: str | None,
    storage_options: Mapping[str, Any],
    allow_pickle: bool,
) -> None:
    """Fetch an adapter's config and weights, and nothing else, into a folder of the caller's.

    Args:
        adapter: The adapter's name, for messages.
        url: The folder that the adapter is in.
        folder: Where to put the files; it is made, and removed again when the download fails.
        token: The token for an HTTP server, as ``Authorization: Bearer``; it does not follow a redirect to another.
        storage_options: The arguments of fsspec's filesystem.
        allow_pickle: Whether to fetch ``adapter_model.bin`` where there is no safetensors file.

    Raises:
        AdapterNotFoundError: There is no such folder or file.
        AdapterAccessError: The filesystem needs credentials, or others.
        AdapterDownloadError: The connection failed, broke, hung, or was too slow.
        UnsafeAdapterError: The weights are a pickle only, and ``allow_pickle`` is false.
        CorruptAdapterError: Config or weights are larger than an adapter's may be.
        MissingDependencyError: fsspec needs another package for this kind of URL.
    """
    token = token and token.strip()
    if not re.fullmatch("[!-~]*", token or ""):
        raise AdapterAccessError(adapter, "the token holds a character that no token has: copy it again")
    _require_package(url.scheme)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _download(adapter, url, folder, _options(url, token, storage_options), allow_pickle)
    except Exception as error:  # filesystems fail in the words of many libraries
        failure = error
    missing = WEIGHTS_NAME if (folder / CONFIG_NAME).exists() else CONFIG_NAME
    shutil.rmtree(folder, ignore_errors=True)
    # Outside of the except block, where Python would keep the failure, and a secret in it, as the context.
    if isinstance(failure, QLoRAInferError):
        raise failure
    error_class, message = _explain(failure, url, missing, has_token=bool(token))
    secrets = [(url.user or "").partition(":")[2], *_texts(storage_options)]
    raise error_class(adapter, message) from None if url.is_http else without_secrets(failure, secrets)


def _require_package(scheme: str) -> None:
    import fsspec

    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        package = getattr(error.__cause__, "name", None)
        if scheme in ("http", "https"):
            package = "'qlora-infer[remote]'"
        command = f"pip install {package}" if package else "install its package again"
        raise MissingDependencyError(f"a package that fsspec reads {scheme}:// with is missing: {command}") from error


def _options(url: URL, token: str | None, storage_options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the storage options, with those that the URL and the token add to them over HTTP."""
    # fsspec would keep the filesystem, and the secrets in it, for the next one who names the same place.
    options = {**storage_options, "skip_instance_cache": True}
    if not url.is_http:
        return options
    from aiohttp import ClientTimeout

    headers = {}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    elif url.user is not None:
        name, _, password = url.user.partition(":")
        credentials = f"{unquote(name)}:{unquote(password)}".encode()
        headers["Authorization"] = f"Basic {base64.b64encode(credentials).decode()}"
    timeout = ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
    return {"timeout": timeout, **options, "headers": {**headers, **storage_options.get("headers", {})}}


@frozen
class _Folder:
    """The adapter's folder on its filesystem."""

    adapter: str
    url: URL
    filesystem: Any
    path: str

    def has(self, name: str) -> bool:
        # Not with exists(), which fsspec writes into its log: over HTTP the path has the query.
        with suppress(*_NOT_THERE):
            _start(self._open(name).close)
            return True
        return False

    def fetch(self, name: str, folder: Path, max_bytes: int) -> None:
        """Copy a file, which gets its name when it is whole."""
        file = self._open(name)
        part, num_bytes = folder / f"{name}.part", 0
        try:
            with part.open("wb") as writer:
                while chunk := _in_time(lambda: _read(file)):
                    num_bytes += len(chunk)
                    if num_bytes > max_bytes:
                        what = f"{self.url.below(name)} is too large: it has at most {max_bytes} bytes in an adapter"
                        raise CorruptAdapterError(self.adapter, what)
                    writer.write(chunk)
        finally:
            _start(file.close)  # not waited for: where reading hangs, this may hang, too
        part.rename(folder / name)

    def fetch_if_there(self, name: str, folder: Path, max_bytes: int) -> None:
        """Copy a file that can be missing; a store refuses a missing file, too, if listing is forbidden."""
        try:
            self.fetch(name, folder, max_bytes)
        except CorruptAdapterError:
            (folder / f"{name}.part").unlink()
            mark_too_large(folder / name, max_bytes)
        except Exception as error:
            if not isinstance(error, (*_NOT_THERE, PermissionError)) and _status(error) not in (403, 410):
                raise

    def _open(self, name: str) -> Any:
        if not self.url.is_http:
            return _in_time(lambda: self.filesystem.open(f"{self.path.rstrip('/')}/{name}", "rb"))
        url = evolve(self.url.below(name), user=None).text
        # One stream, which block_size=0 means; a size, which it then ignores, keeps fsspec from asking for one first,
        # in a way that takes every refusal for a missing file, and writes the query into its log.
        return _in_time(lambda: self.filesystem.open(url, "rb", block_size=0, size=1))


def _download(adapter: str, url: URL, folder: Path, options: Mapping[str, Any], allow_pickle: bool) -> None:
    from fsspec.core import url_to_fs

    remote = _Folder(adapter, url, *_in_time(lambda: url_to_fs(str(url) if url.is_http else url.text, **options)))
    remote.fetch(CONFIG_NAME, folder, MAX_CONFIG_BYTES)
    for name, max_bytes in MAX_BYTES.items():
        remote.fetch_if_there(name, folder, max_bytes)
    for name in (WEIGHTS_NAME, MLX_NAME):
        with suppress(*_NOT_THERE):
            remote.fetch(name, folder, MAX_WEIGHTS_BYTES)
            return
    for name in INDEX_NAMES:
        with suppress(*_NOT_THERE):
            remote.fetch(name, folder, MAX_INDEX_BYTES)
            if shards := shard_names(adapter, folder / name):
                _fetch_shards(remote, folder, shards)
                return
            (folder / name).unlink()
    if not remote.has(PICKLE_NAME):
        raise FileNotFoundError(WEIGHTS_NAME)
    if not allow_pickle:
        raise UnsafeAdapterError(
            adapter,
            f"{url} has only pickled weights ({PICKLE_NAME}), which can run code when they are read: save the adapter "
            "again with PEFT, which writes safetensors, or pass allow_pickle=True to have them converted",
        )
    remote.fetch(PICKLE_NAME, folder, MAX_WEIGHTS_BYTES)


def _fetch_shards(remote: _Folder, folder: Path, names: Sequence[str]) -> None:
    left = MAX_WEIGHTS_BYTES
    for name in names[:MAX_SHARDS]:
        try:
            remote.fetch(name, folder, left)
        except _NOT_THERE as error:
            raise AdapterNotFoundError(
                remote.adapter, f"{remote.url} has no {name}, which its index names: copy it there"
            ) from error
        left -= (folder / name).stat().st_size


def _in_time(work: Callable[[], T]) -> T:
    return _start(work).result(timeout=STEP_TIMEOUT)


def _start(work: Callable[[], T]) -> Future[T]:
    """Run a function on its own thread, so that a hanging one delays neither the caller nor the exit."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # whatever it is, the caller gets it
            outcome.set_exception(error)

    threading.Thread(target=run, name="qlora-infer-download", daemon=True).start()
    return outcome


def _read(file: Any) -> bytes:
    """Read the next mebibyte, or the rest."""
    parts, num_left = [], _CHUNK
    while num_left and (part := file.read(num_left)):
        parts.append(part)
        num_left -= len(part)
    return b"".join(parts)


def _explain(error: BaseException, url: URL, missing: str, *, has_token: bool) -> tuple[type[AdapterSourceError], str]:
    """Return our error's class and the message for it."""
    status, kind = _status(error), type(error).__name__
    if isinstance(error, _NOT_THERE) or status in (404, 410):
        advice = f"; {where_else([])}" if missing == CONFIG_NAME else ""
        return AdapterNotFoundError, f"{url} has no {missing}{advice}"
    if isinstance(error, PermissionError) or status in (401, 403):
        return AdapterAccessError, f"{url} cannot be read: {_access_advice(url, has_token=has_token)}"
    if isinstance(error, OSError) and error.errno == errno.EINVAL and not url.is_http:
        # S3 answers 400, without a reason, to a HEAD request with a session token that it does not take.
        refused = "the store refused the request, which is what it does when a session token is wrong or has expired"
        return (
            AdapterAccessError,
            f"{url} cannot be read: {refused}: pass URLSource(url, storage_options=...) with others",
        )
    if isinstance(error, TimeoutError):
        slow = f"the server fell silent, or took more than {STEP_TIMEOUT:g} s for a mebibyte"
        return AdapterDownloadError, f"the download of {url} was given up: {slow}; try again"
    if status is not None:
        return AdapterDownloadError, f"the download of {url} failed: the server answered {status}; try again later"
    if isinstance(error, OSError) and error.errno in _DISK_IS_FULL:
        return AdapterDownloadError, f"the download of {url} cannot be stored: {error.strerror}"
    return AdapterDownloadError, f"the download of {url} failed ({kind}): check the URL and its options, or try again"


def _access_advice(url: URL, *, has_token: bool) -> str:
    if not url.is_http:
        return "there is no such file, or other credentials are needed: pass URLSource(url, storage_options=...)"
    if has_token:
        return "the token does not open it: pass URLSource(url, token=...) with another"
    if url.query or url.user is not None:
        return "what the URL is signed with does not open it, or has expired: sign it again"
    return "it is private: pass URLSource(url, token=...)"


def _status(error: BaseException) -> int | None:
    """Return the HTTP status that an error holds, in the forms of aiohttp, requests, and the clouds' libraries."""
    for holder in (error, getattr(error, "response", None)):
        for name in ("status", "status_code", "code"):
            status = getattr(holder, name, None)
            if isinstance(status, int) and 300 <= status < 600:
                return status
            if status is not None:
                break  # aiohttp's ``code`` is its ``status``, and warns
    return None


def _texts(value: Any) -> Iterator[str]:
    """Every text in some options, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)
