"""Adapters and models' configs from the Hub; the only file that imports huggingface_hub.

``snapshot_download`` is not used: it asks for the list of files without a timeout, and returns what a broken download
left behind as if it were whole. Files are fetched one by one at one commit instead, the weights last, so that a copy
with weights is a whole copy; unless another program has made it, which the list of files tells.

The environment (``HF_ENDPOINT``, ``HF_HUB_CACHE``, ``HF_HOME``, ``HF_HUB_OFFLINE``) is read at each call, so that it
may be set after huggingface_hub is imported.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from attrs import evolve, field, frozen
from attrs.validators import instance_of, optional

from qlora_infer.errors import (
    AdapterAccessError,
    AdapterDownloadError,
    AdapterNotFoundError,
    AdapterSourceError,
    CorruptAdapterError,
    ModelNotFoundError,
    QLoRAInferError,
    UnsafeAdapterError,
)
from qlora_infer.files.content import copy_adapter
from qlora_infer.files.safetensors import MAX_DIMENSION, read_header
from qlora_infer.files.scratch import scratch_folder
from qlora_infer.files.snapshot import CONFIG_NAME, PICKLE_NAMES, WEIGHTS_NAME, where_else
from qlora_infer.quantization.checkpoint import QUANTIZATION_FILES, complete, quantization_config
from qlora_infer.sources.secrets import without_secrets

logger = logging.getLogger("qlora_infer")

Shape = tuple[int, ...]

#: A ``config.json`` has some kilobytes, or a few megabytes where it lists every expert; the largest index, 10 MB.
MAX_JSON_BYTES, MAX_INDEX_BYTES = 16 << 20, 64 << 20
MAX_JSON_DEPTH = 100

#: Which file holds which tensor, of a checkpoint of several files.
INDEX_NAME = "model.safetensors.index.json"

#: Seconds that the Hub may be silent. Within a file huggingface_hub waits ``HF_HUB_DOWNLOAD_TIMEOUT`` (10 s), and
#: tries again five times when nothing more comes.
TIMEOUT = 10.0

#: Faults of a cache that others filled and this process may only read.
_CANNOT_WRITE = (errno.EROFS, errno.EACCES, errno.EPERM)

PICKLE_NAME = PICKLE_NAMES[0]

#: Where an access token can be passed, for messages.
_TOKEN = "token= (of the engine, or of HubSource)"

# What an adapter may bring beside its weights; small, and fetched before them.
EXTRA_NAMES = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "generation_config.json"),
)

#: A repository's id.
REPOSITORY = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)

# Git allows none of these in a branch's or tag's name, and ".." would leave the Hub cache's folder of branches.
_NOT_IN_REVISIONS = re.compile(r"[\s\x00-\x1f\x7f:\\~^?*\[]|\.\.|//|^/|/$")
_NOT_IN_SUBFOLDERS = re.compile(r"[\x00-\x1f\x7f:\\]")


def _check_repo_id(source: HubSource, attribute: Any, repo_id: str) -> None:
    if not REPOSITORY.fullmatch(repo_id):
        raise ValueError(f"a repository's id is written 'org/repo', got {repo_id[:80]!r}")


def _check_revision(source: HubSource, attribute: Any, revision: str | None) -> None:
    if revision is not None and (not revision or _NOT_IN_REVISIONS.search(revision)):
        raise ValueError(f"a revision is the name of a branch or tag, or a commit, got {revision!r}")


def _check_subfolder(source: HubSource, attribute: Any, subfolder: str | None) -> None:
    if subfolder is None:
        return
    if _NOT_IN_SUBFOLDERS.search(subfolder) or any(part in ("", ".", "..") for part in subfolder.split("/")):
        raise ValueError(f"a subfolder is a relative path of plain names, got {subfolder!r}")


def _check_token(source: HubSource, attribute: Any, token: Any) -> None:
    if token is not None and not isinstance(token, str):
        raise TypeError(f"token must be text, got {type(token).__name__}")  # attrs' own message would show it


@frozen
class HubSource:
    """A repository on the Hub with an adapter, also where there is a local folder of that name.

    Attributes:
        repo_id: ``"org/repo"``.
        revision: A branch, tag or commit; ``None`` for the default branch.
        subfolder: The adapter's folder in the repository.
        token: The access token; ``None`` for the engine's. Never printed.

    Raises:
        ValueError: An attribute is not written in this way, or a subfolder leaves the repository.
        TypeError: An attribute is no text.
    """

    repo_id: str = field(validator=(instance_of(str), _check_repo_id))
    revision: str | None = field(default=None, kw_only=True, validator=(optional(instance_of(str)), _check_revision))
    subfolder: str | None = field(default=None, kw_only=True, validator=(optional(instance_of(str)), _check_subfolder))
    token: str | None = field(default=None, kw_only=True, repr=False, validator=_check_token)

    @property
    def refetch_cost(self) -> float:
        """The cost of fetching it again, in copies of a local folder."""
        return 8.0

    def fetch(self, adapter: str, into: Path, *, token: str | None, allow_pickle: bool) -> None:
        """Download what is not in the Hub's cache, and copy the adapter's files into a new folder.

        ``Source`` has the arguments, ``download_adapter`` and ``copy_adapter`` the errors.
        """
        folder = download_adapter(
            adapter,
            self.repo_id,
            revision=self.revision,
            subfolder=self.subfolder,
            token=self.token or token,
            allow_pickle=allow_pickle,
        )
        copy_adapter(adapter, folder, into, allow_pickle=allow_pickle)

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        subfolder = f":{self.subfolder}" if self.subfolder else ""
        return f"{self.repo_id}{revision}{subfolder}"


def download_adapter(
    adapter: str,
    repo_id: str,
    *,
    revision: str | None,
    subfolder: str | None,
    token: str | None,
    allow_pickle: bool,
) -> Path:
    """Fetch an adapter's files, and no others, into the Hub's cache; what is there already is not fetched again.

    The Hub is asked once where a branch points and which files there are, also of a commit that is in the cache:
    another program may have fetched only some of them. When the Hub cannot be reached, or with ``HF_HUB_OFFLINE=1``,
    the copy in the cache is used and the log says so. Every wait for the Hub has a bound, but the whole download has
    none: a slow connection may take its time.

    Args:
        adapter: The adapter's name, for messages.
        repo_id: The repository, ``"org/repo"``.
        revision: A branch, tag or commit; ``None`` for the default branch.
        subfolder: Where in the repository the adapter is.
        token: The access token; ``None`` for the one that ``HF_TOKEN`` or ``hf auth login`` left.
        allow_pickle: Whether to fetch ``adapter_model.bin`` where there is no safetensors file.

    Returns:
        The folder with the adapter's files: a snapshot in the Hub's cache, or a folder inside it.

    Raises:
        AdapterNotFoundError: There is no such repository, revision, subfolder or file.
        AdapterAccessError: The repository asks for a token, or for another one.
        AdapterDownloadError: The connection failed or broke, or there is none and no copy.
        UnsafeAdapterError: The weights are a pickle only, and ``allow_pickle`` is false.
    """
    repository = _Repository(repo_id, revision, token and token.strip())
    prefix = f"{subfolder}/" if subfolder else ""
    weights = _fetch(
        repository,
        cached=partial(_cached_weights, repository, prefix, allow_pickle),
        choose=partial(_adapter_files, adapter, repository, prefix, allow_pickle),
        fail=lambda error_class, message: error_class(adapter, message),
    )
    return weights.parent


def read_model_config(
    model: str, *, revision: str | None, token: str | None, config_source: str | None = None
) -> dict[str, Any]:
    """Read a model's ``config.json``, from its folder or the Hub, with what files beside it say of its quantization.

    Args:
        model: A folder, ``"org/model"``, or a GGUF file (``"org/model-GGUF:Q4_K_M"``).
        revision: A branch, tag or commit on the Hub; a folder has none, and it is not looked at.
        token: The Hub's access token; ``None`` for the one that ``HF_TOKEN`` or ``hf auth login`` left.
        config_source: The model whose ``config.json`` a GGUF file is read with; by default that beside the file.

    Raises:
        ModelNotFoundError: There is no such model, it has no readable ``config.json``, or the token does not open it.
        QuantizationError: The weights are packed, and no file says how, or a field is not what its tool writes.
    """
    _check_name(model)
    if home := _home_of_gguf(model):
        config = read_model_config(config_source or home, revision=None if config_source else revision, token=token)
        return {**config, "quantization_config": {"quant_method": "gguf", "file": model}}
    folder = Path(os.path.expanduser(model))  # noqa: PTH111  # Path's own raises where there is no such user
    if not folder.is_dir() and (model.startswith(("/", ".", "~")) or model.count("/") != 1):
        raise ModelNotFoundError(f"there is no folder {model}, and a Hub id is written 'org/model'")
    path = folder / "config.json" if folder.is_dir() else _download_config(model, revision, token)
    found = _read_json(path)
    if found is None:
        raise ModelNotFoundError(f"{model} has no config.json: is it a model's folder?")
    if not folder.is_dir() and not quantization_config(found):
        path = _download_quantization(model, revision, token)
    names = partial(_tensor_names, model, path.parent, revision, token)
    return complete(model, found, lambda name: _read_json(path.parent / name), names)


def _check_name(model: str) -> None:
    """Raise ``ModelNotFoundError`` for text that the file system cannot look up: too long, or with a NUL in it."""
    try:
        Path(os.path.expanduser(model)).stat()  # noqa: PTH111
    except (FileNotFoundError, NotADirectoryError):
        pass  # it may be on the Hub
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelNotFoundError(f"{model[:80]!a} cannot be the name of a model: {reason}") from error


def _home_of_gguf(model: str) -> str | None:
    """Return the folder or the repository of a GGUF file, named as ``vllm-gguf-plugin`` does; else ``None``."""
    if model.endswith(".gguf"):
        path = Path(os.path.expanduser(model))  # noqa: PTH111
        if not path.is_file() and (model.startswith(("/", ".", "~")) or model.count("/") != 2):
            raise ModelNotFoundError(f"there is no file {model}; one on the Hub is written 'org/model/file.gguf'")
        return str(path.parent) if path.is_file() else model.rpartition("/")[0]
    home, _, kind = model.rpartition(":")
    is_home = home.count("/") == 1 or Path(home).is_dir()
    return home if re.fullmatch(r"[\w+-]+", kind) and is_home and not Path(model).is_dir() else None


def _read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any] | None:
    """Read a JSON file of a model, whose author may be a stranger; ``None`` where there is none."""
    try:
        fault = _fault_of_file(path, max_bytes)
        content = None if fault else json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError, RecursionError) as error:
        raise ModelNotFoundError(f"{path} cannot be read: {error}") from error
    if fault:
        raise ModelNotFoundError(f"{path} {fault}")
    if not isinstance(content, dict):
        raise ModelNotFoundError(f"{path} holds no JSON object")
    if not _is_shallow(content):
        raise ModelNotFoundError(f"{path} has more than {MAX_JSON_DEPTH} objects and lists inside each other")
    return content


def _fault_of_file(path: Path, max_bytes: int) -> str:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opened, a pipe would wait for a writer
        return "is not a regular file"
    return f"is too large: it has at most {max_bytes} bytes in a model" if status.st_size > max_bytes else ""


def _is_shallow(content: object) -> bool:
    level = [content]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            inner
            for value in level
            if isinstance(value, (dict, list))
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return True
    return False


def _weight_map(folder: Path) -> Mapping[str, Any] | None:
    """Return which file holds which tensor; ``None`` where there is no index."""
    index = _read_json(folder / INDEX_NAME, MAX_INDEX_BYTES)
    if index is None:
        return None
    found = index.get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise ModelNotFoundError(f"{folder / INDEX_NAME} has no weight_map of names")
    return found


def _tensor_names(model: str, folder: Path, revision: str | None, token: str | None) -> Iterable[str]:
    """Name a checkpoint's tensors; those of several files stand in an index."""
    return _weight_map(folder) or read_tensor_shapes(model, revision=revision, token=token)


def read_tensor_shapes(model: str, *, revision: str | None, token: str | None) -> dict[str, Shape]:
    """Return the shapes of a model's tensors, from the headers of its safetensors files; nothing else is fetched.

    Empty where they cannot be had: the model has no such files, one is broken, or the Hub is out of reach.

    Args:
        model: A folder, or ``"org/model"``, whose config could be read.
        revision: A branch, tag or commit; ``None`` for the default branch.
        token: The Hub's access token; ``None`` for the one that ``HF_TOKEN`` or ``hf auth login`` left.
    """
    from huggingface_hub import HfApi

    folder = Path(os.path.expanduser(model))  # noqa: PTH111
    if folder.is_dir():
        return _shapes_in(folder)
    if _is_offline():
        return {}
    try:
        found = HfApi(endpoint=_endpoint(), token=token and token.strip()).get_safetensors_metadata(
            model, revision=revision
        )
    except Exception as error:  # connections fail in the words of several libraries, which may show a token
        logger.info("the safetensors headers of %s cannot be read (%s)", model, type(error).__name__)
        return {}
    files = found.files_metadata.values()
    shapes = {name: tuple(tensor.shape) for file in files for name, tensor in file.tensors.items()}
    return shapes if all(_is_shape(shape) for shape in shapes.values()) else {}


def _is_shape(shape: Shape) -> bool:
    return all(type(size) is int and 0 <= size <= MAX_DIMENSION for size in shape)


def _shapes_in(folder: Path) -> dict[str, Shape]:
    """Return the shapes of a folder's tensors; none where a file is missing or broken."""
    shapes: dict[str, Shape] = {}
    try:
        for name in _file_names(folder):
            entries = read_header(str(folder), folder / name)
            shapes.update((tensor, entry.shape) for tensor, entry in entries.items())
    except (CorruptAdapterError, ModelNotFoundError, OSError, ValueError):
        return {}
    return shapes


def _file_names(folder: Path) -> Iterable[str]:
    index = _weight_map(folder)
    if index is None:
        return sorted(path.name for path in folder.glob("*.safetensors"))
    names = sorted(set(index.values()))
    if outside := next((name for name in names if Path(name).name != name), None):
        raise ModelNotFoundError(f"{folder / INDEX_NAME} names a file outside of its folder: {outside[:80]!r}")
    return names


def _download_config(model: str, revision: str | None, token: str | None) -> Path:
    repository = _Repository(model, revision, token and token.strip())

    def choose(paths: list[str]) -> list[str]:
        if "config.json" not in paths:
            raise ModelNotFoundError(f"{repository} has no config.json: is it an adapter, or GGUF files, and no model?")
        return ["config.json"]

    return _fetch(
        repository,
        cached=partial(repository.cached, "config.json"),
        choose=choose,
        is_one_file=True,
        fail=lambda _, message: ModelNotFoundError(f"model {model}: {message}"),
    )


def _download_quantization(model: str, revision: str | None, token: str | None) -> Path:
    """Fetch the files beside a ``config.json`` that may speak of a quantization, where there are any."""
    repository = _Repository(model, revision, token and token.strip())

    def choose(paths: list[str]) -> list[str]:
        return [*(name for name in (*QUANTIZATION_FILES, INDEX_NAME) if name in paths), "config.json"]

    return _fetch(
        repository,
        cached=partial(repository.cached, "config.json"),
        choose=choose,
        fail=lambda _, message: ModelNotFoundError(f"model {model}: {message}"),
    )


@frozen
class _Repository:
    """One repository at one revision, asked with one token."""

    repo_id: str
    revision: str | None
    token: str | None = field(repr=False)
    cache_dir: str | None = field(factory=lambda: _cache_dir())

    def __str__(self) -> str:
        return self.repo_id + (f"@{self.revision}" if self.revision else "")

    def has_sendable_token(self) -> bool:
        """Return whether a header can hold the token; the HTTP library would show any other in its error and log."""
        from huggingface_hub import get_token

        return bool(re.fullmatch("[!-~]*", self.token or get_token() or ""))

    def is_pinned(self) -> bool:
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


def _fetch(
    repository: _Repository,
    *,
    cached: Callable[[], Path | None],
    choose: Callable[[list[str]], list[str]],
    fail: Callable[[type[AdapterSourceError], str], Exception],
    is_one_file: bool = False,
) -> Path:
    """Fetch the files that ``choose`` picks from the repository's list, and return the last of them."""
    if not repository.has_sendable_token():
        raise fail(AdapterAccessError, "the token holds a character that no token has: copy it again")
    try:
        copy = cached()
        if copy and is_one_file and repository.is_pinned():  # nothing can be missing beside it
            return copy
        return _cached_or_downloaded(repository, copy, choose)
    except QLoRAInferError:
        raise
    except Exception as error:  # connections fail in the words of several libraries
        failure = error
    # Outside of the except block, where Python would keep the failure, and a token in it, as the context.
    raise fail(*_explain(failure, repository)) from _without_secrets(failure, repository.token)


def _cached_or_downloaded(
    repository: _Repository, cached: Path | None, choose: Callable[[list[str]], list[str]]
) -> Path:
    try:
        return _newest(repository, cached, choose)
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
    # Such a cache is shared by many, or part of a container's image, and behind the branch. Half of the files may be
    # in it, and all of them are wanted in one folder.
    logger.warning("%s is downloaded again for this process: the Hub's cache cannot be written", repository)
    return _newest(evolve(repository, cache_dir=str(scratch_folder() / "hub")), cached, choose)


def _newest(repository: _Repository, cached: Path | None, choose: Callable[[list[str]], list[str]]) -> Path:
    try:
        commit, paths = repository.list_files()
    except Exception as error:
        if cached is None or not _is_unreachable(error):
            raise
        level = logging.INFO if _is_offline() else logging.WARNING
        logger.log(level, "%s is taken from the Hub's cache: %s", repository, _why_unreachable(error))
        return cached
    chosen = choose(paths)
    first = repository.cached(chosen[0])
    if not repository.is_pinned() and (first is None or commit not in first.parts):
        # By its own name, so that the cache knows where the branch points when the Hub is out of reach.
        repository.download(chosen[0], repository.revision)
    return [repository.download(path, commit) for path in chosen][-1]


def _cached_weights(repository: _Repository, prefix: str, allow_pickle: bool) -> Path | None:
    names = (WEIGHTS_NAME, PICKLE_NAME) if allow_pickle else (WEIGHTS_NAME,)
    found = [repository.cached(prefix + name) for name in names] if repository.cached(prefix + CONFIG_NAME) else []
    return next((path for path in found if path), None)


def _adapter_files(
    adapter: str, repository: _Repository, prefix: str, allow_pickle: bool, paths: list[str]
) -> list[str]:
    """Return the paths of an adapter's files in the repository: the config first, the weights last."""
    names = [path.removeprefix(prefix) for path in paths if path.startswith(prefix)]
    place = f"the subfolder {prefix[:-1]!r}" if prefix else "its root"
    if CONFIG_NAME not in names:
        inside = sorted(path.removesuffix(f"/{CONFIG_NAME}") for path in paths if path.endswith(f"/{CONFIG_NAME}"))
        inside = [f"{repository}:{subfolder}" for subfolder in inside]
        raise AdapterNotFoundError(adapter, f"{repository} has no {CONFIG_NAME} in {place}; {where_else(inside)}")
    weights = WEIGHTS_NAME if WEIGHTS_NAME in names else PICKLE_NAME
    if weights not in names:
        raise AdapterNotFoundError(adapter, f"{repository} has no {WEIGHTS_NAME} in {place}")
    if weights == PICKLE_NAME and not allow_pickle:
        raise UnsafeAdapterError(
            adapter,
            f"{repository} has only pickled weights ({PICKLE_NAME}) in {place}, which can run code when they are read: "
            "take a revision with safetensors, or pass allow_pickle=True to have them converted",
        )
    extras = [name for name in names if "/" not in name and any(fnmatchcase(name, extra) for extra in EXTRA_NAMES)]
    return [prefix + name for name in (CONFIG_NAME, *extras, weights)]


def _explain(error: BaseException, repository: _Repository) -> tuple[type[AdapterSourceError], str]:
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
    setting = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return setting.upper() in ("1", "ON", "YES", "TRUE")


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def _cache_dir() -> str | None:
    """Return the Hub's cache as the environment names it; ``None`` leaves the choice to huggingface_hub."""
    home = os.environ.get("HF_HOME")
    folders = (os.environ.get("HF_HUB_CACHE"), os.environ.get("HUGGINGFACE_HUB_CACHE"), home and f"{home}/hub")
    folder = next(filter(None, folders), None)
    return os.path.expandvars(Path(folder).expanduser()) if folder else None
