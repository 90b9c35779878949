"""A repository on the Hub: its list of files, its cached copy, its downloads and their errors.

Only this file imports huggingface_hub. ``snapshot_download`` is not used: it fetches the list of files without a
timeout, and returns the remains of a broken download as if they were whole. Files are fetched one by one at one commit
instead.

The environment (``HF_ENDPOINT``, ``HF_HUB_CACHE``, ``HF_HOME``, ``HF_HUB_OFFLINE``) is read at each call, so that you
may set it after huggingface_hub is imported. Who imported it offline stays offline: it reads that variable once.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

from attrs import evolve, field, frozen

from qlora_infer.errors import (
    AdapterAccessError,
    AdapterDownloadError,
    AdapterNotFoundError,
    AdapterSourceError,
    QLoRAInferError,
)
from qlora_infer.files.scratch import scratch_folder
from qlora_infer.sources.secrets import without_secrets

logger = logging.getLogger("qlora_infer")

#: Seconds that the Hub may be silent. Within a file huggingface_hub waits ``HF_HUB_DOWNLOAD_TIMEOUT`` (10 s), and
#: tries again five times when nothing more comes.
TIMEOUT = 10.0

#: Faults of a cache that others filled and this process may only read.
_CANNOT_WRITE = (errno.EROFS, errno.EACCES, errno.EPERM)

#: Where an access token can be passed, for messages.
_TOKEN = "token= (of the engine, or of HubSource)"


def _strip(token: str | None) -> str | None:
    return token and token.strip()


@frozen
class Repository:
    """One repository at one revision, read with one token.

    Attributes:
        repo_id: ``"org/repo"``.
        revision: A branch, tag or commit; ``None`` for the default branch.
        token: The access token; ``None`` for the one that ``HF_TOKEN`` or ``hf auth login`` left.
        cache_dir: The Hub's cache; ``None`` leaves the choice to huggingface_hub.
    """

    repo_id: str
    revision: str | None
    token: str | None = field(repr=False, converter=_strip)
    cache_dir: str | None = field(factory=lambda: _cache_dir())

    def __str__(self) -> str:
        return self.repo_id + (f"@{self.revision}" if self.revision else "")

    def has_sendable_token(self) -> bool:
        """Return whether a header can hold the token; the HTTP library would show any other in its error and log."""
        from huggingface_hub import get_token

        return bool(re.fullmatch("[!-~]*", self.token or get_token() or ""))

    def is_pinned(self) -> bool:
        """Return whether the revision is a commit, whose files never change."""
        return bool(re.fullmatch("[0-9a-f]{40}", self.revision or ""))

    def cached(self, path: str) -> Path | None:
        """Return the cached copy of a file, for the revision as it was last resolved."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repo_id, path, cache_dir=self.cache_dir, revision=self.revision)
        return Path(found) if isinstance(found, str) else None

    def list_files(self) -> tuple[str | None, list[str]]:
        """Return the commit that the revision stands for now, and the paths of its files: one request."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import OfflineModeIsEnabled

        if _is_offline():
            raise OfflineModeIsEnabled("HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set")
        found = HfApi(endpoint=_endpoint(), token=self.token).model_info(
            self.repo_id, revision=self.revision, timeout=TIMEOUT
        )
        return found.sha or self.revision, [sibling.rfilename for sibling in found.siblings or []]

    def read_tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of its tensors, from the headers of its safetensors files; empty where they fail."""
        from huggingface_hub import HfApi

        if _is_offline():
            return {}
        try:
            found = HfApi(endpoint=_endpoint(), token=self.token).get_safetensors_metadata(
                self.repo_id, revision=self.revision
            )
        except Exception as error:  # connections fail in the words of several libraries, which may show a token
            logger.info("the safetensors headers of %s cannot be read (%s)", self, type(error).__name__)
            return {}
        files = found.files_metadata.values()
        return {name: tuple(tensor.shape) for file in files for name, tensor in file.tensors.items()}

    def download(self, path: str, revision: str | None) -> Path:
        """Fetch one file; of a commit nothing is asked when the file is in the cache."""
        from huggingface_hub import hf_hub_download

        return Path(
            hf_hub_download(
                self.repo_id,
                path,
                revision=revision,
                token=self.token,
                endpoint=_endpoint(),
                cache_dir=self.cache_dir,
                etag_timeout=TIMEOUT,
            )
        )

    def fetch(
        self,
        *,
        cached: Callable[[], Path | None],
        choose: Callable[[list[str]], list[str]],
        fail: Callable[[type[AdapterSourceError], str], Exception],
        is_one_file: bool = False,
    ) -> Path:
        """Fetch the files that ``choose`` picks from the list of files, and return the last of them.

        Args:
            cached: Returns the last of the files where the cache has them.
            choose: Picks paths from those of the repository.
            fail: Makes the error to raise, of one of our classes and a message.
            is_one_file: Whether ``choose`` picks one file, so that nothing can be missing beside it.
        """
        if not self.has_sendable_token():
            raise fail(AdapterAccessError, "the token holds a character that no token has: copy it again")
        try:
            copy = cached()
            if copy and is_one_file and self.is_pinned():
                return copy
            return self._cached_or_downloaded(copy, choose)
        except QLoRAInferError:
            raise
        except Exception as error:  # connections fail in the words of several libraries
            failure = error
        # Outside of the except block, where Python would keep the failure, and a token in it, as the context.
        raise fail(*_explain(failure, self)) from _without_secrets(failure, self.token)

    def _cached_or_downloaded(self, cached: Path | None, choose: Callable[[list[str]], list[str]]) -> Path:
        try:
            return self._newest(cached, choose)
        except OSError as error:
            if error.errno not in _CANNOT_WRITE:
                raise
        # Such a cache is shared by many, or part of a container's image, and behind the branch. Half of the files may
        # be in it, and all of them are wanted in one folder.
        logger.warning("%s is downloaded again for this process: the Hub's cache cannot be written", self)
        return evolve(self, cache_dir=str(scratch_folder() / "hub"))._newest(cached, choose)

    def _newest(self, cached: Path | None, choose: Callable[[list[str]], list[str]]) -> Path:
        try:
            commit, paths = self.list_files()
        except Exception as error:
            if cached is None or not _is_unreachable(error):
                raise
            level = logging.INFO if _is_offline() else logging.WARNING
            logger.log(level, "%s is taken from the Hub's cache: %s", self, _why_unreachable(error))
            return cached
        chosen = choose(paths)
        first = self.cached(chosen[0])
        if not self.is_pinned() and (first is None or commit not in first.parts):
            # By its own name, so that the cache knows where the branch points when the Hub is out of reach.
            self.download(chosen[0], self.revision)
        return [self.download(path, commit) for path in chosen][-1]


def _explain(error: BaseException, repository: Repository) -> tuple[type[AdapterSourceError], str]:
    """Return our error's class and the message for it."""
    from huggingface_hub import errors, get_token

    error = _unwrap(error)
    status, repo_id = _status(error), repository.repo_id
    has_token = repository.token or get_token()
    no_access = (
        f"the token does not open it: pass another as {_TOKEN}" if has_token else f"it is private: pass {_TOKEN}"
    )
    if isinstance(error, errors.HFValidationError):
        return AdapterNotFoundError, f"{repo_id!r} cannot be a repository's name: {error}"
    if isinstance(error, errors.GatedRepoError):
        return AdapterAccessError, f"{repository} is gated: ask for access on the Hub, then pass your {_TOKEN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return AdapterNotFoundError, f"{repo_id} has no revision {repository.revision!r}"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return AdapterNotFoundError, f"{repository} lists a file that it does not have"
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        folder = f"(a folder is written './{repo_id}')"
        return AdapterNotFoundError, f"there is no repository {repo_id} on the Hub {folder}, or {no_access}"
    if status in (401, 403):
        return AdapterAccessError, f"{repository} cannot be read: {no_access}"
    if _is_unreachable(error):
        return AdapterDownloadError, f"{repository} is not whole in the Hub's cache, and {_why_unreachable(error)}"
    if isinstance(error, OSError) and error.errno:
        return AdapterDownloadError, f"{repository} cannot be stored in the Hub's cache: {error.strerror}"
    return AdapterDownloadError, f"the download of {repository} failed ({type(error).__name__}): try again"


def _is_unreachable(error: BaseException) -> bool:
    """Return whether the cached copy may stand in: the Hub did not answer, or could not. A refusal is an answer."""
    from huggingface_hub import errors

    if (status := _status(error)) is not None:
        return status >= 500 or status in (408, 429)
    # The HTTP library's own base class, whichever library this huggingface_hub uses.
    return isinstance(error, (errors.HTTPError, ConnectionError, TimeoutError))


def _why_unreachable(error: BaseException) -> str:
    if _is_offline():
        return "this process is offline (HF_HUB_OFFLINE is set)"
    if (status := _status(error)) is not None:
        return f"the Hub answered {status}: try again later"
    return f"the connection to the Hub failed ({type(error).__name__}): try again"


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _unwrap(error: BaseException) -> BaseException:
    """Return the cause of an error that huggingface_hub has wrapped in "and there is no cached copy"."""
    from huggingface_hub import errors

    while isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _without_secrets(error: BaseException, token: str | None) -> BaseException | None:
    """Return the error as a cause, or ``None`` if it or an error that led to it contains a token.

    An HTTP library may show a header.
    """
    from huggingface_hub import get_token

    return without_secrets(error, [token or "", get_token() or ""])


def _is_offline() -> bool:
    from huggingface_hub.constants import is_offline_mode

    setting = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return setting.upper() in ("1", "ON", "YES", "TRUE") or is_offline_mode()


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def _cache_dir() -> str | None:
    """Return the Hub's cache as the environment names it; ``None`` leaves the choice to huggingface_hub."""
    home = os.environ.get("HF_HOME")
    folders = (os.environ.get("HF_HUB_CACHE"), os.environ.get("HUGGINGFACE_HUB_CACHE"), home and f"{home}/hub")
    folder = next(filter(None, folders), None)
    return os.path.expandvars(Path(folder).expanduser()) if folder else None
