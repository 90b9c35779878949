"""The only file that imports huggingface_hub: it downloads adapters, reads models' configs, and translates errors.

The environment (``HF_ENDPOINT``, ``HF_HUB_CACHE``, ``HF_HUB_OFFLINE``) is read at each call, so that it may be set
after this library is imported. Read in huggingface_hub 2.4.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_infer.adapters.snapshot import CONFIG_NAME, WEIGHTS_NAME
from qlora_infer.errors import (
    AdapterAccessError,
    AdapterDownloadError,
    AdapterNotFoundError,
    AdapterSourceError,
    ModelNotFoundError,
)

logger = logging.getLogger("qlora_infer")

#: Seconds in which the Hub must answer with something, again and again while a file comes in.
TIMEOUT = 10.0


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

    Without a connection, or with ``HF_HUB_OFFLINE=1``, the copy in the cache is used.

    Args:
        adapter: The adapter's name, for messages.
        repo_id: The repository, ``"org/repo"``.
        revision: A branch, tag or commit; ``None`` for the default branch.
        subfolder: Where in the repository the adapter is.
        token: The access token; ``None`` for the one that ``hf auth login`` left.
        allow_pickle: Whether to fetch ``adapter_model.bin`` too.

    Returns:
        The folder with the adapter's files.

    Raises:
        AdapterNotFoundError: There is no such repository, revision, subfolder or file.
        AdapterAccessError: The repository asks for a token, or for another one.
        AdapterDownloadError: The connection failed or broke, or there is none and no copy.
    """
    from huggingface_hub import snapshot_download

    prefix = f"{subfolder}/" if subfolder else ""
    wanted = [CONFIG_NAME, WEIGHTS_NAME, *(["adapter_model.bin"] if allow_pickle else [])]
    with _translated(adapter, repo_id, revision, token):
        snapshot = snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            allow_patterns=[prefix + name for name in wanted],
            etag_timeout=TIMEOUT,
            **_environment(),
        )
    folder = Path(snapshot) / prefix
    where = f"{repo_id}{f'@{revision}' if revision else ''}"
    if not (folder / CONFIG_NAME).exists():
        place = f"the subfolder {subfolder!r}" if subfolder else "its root (is the adapter in a subfolder?)"
        raise AdapterNotFoundError(adapter, f"{where} has no {CONFIG_NAME} in {place}")
    if not any((folder / name).exists() for name in wanted[1:]):
        hint = (
            "" if allow_pickle else "; if its weights are pickled (adapter_model.bin), allow_pickle=True converts them"
        )
        raise AdapterNotFoundError(adapter, f"{where} has no {WEIGHTS_NAME}{hint}")
    return folder


def read_model_config(model: str, *, revision: str | None, token: str | None) -> dict[str, Any]:
    """Read a model's ``config.json``, from its folder or the Hub.

    Raises:
        ModelNotFoundError: There is no such model, it has no readable ``config.json``, or the token does not open it.
    """
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        raise ModelNotFoundError(f"{model} is a GGUF file: take the checkpoint that it was made from")
    if not path.is_dir() and (path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1):
        raise ModelNotFoundError(f"there is no folder {model}, and a Hub id is written 'org/model'")
    config_path = path / "config.json" if path.is_dir() else _download_config(model, revision, token)
    try:
        config = json.loads(config_path.read_text())
    except FileNotFoundError as error:
        raise ModelNotFoundError(f"{model} has no config.json: is it a model's folder?") from error
    except (ValueError, OSError) as error:
        raise ModelNotFoundError(f"{config_path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelNotFoundError(f"{config_path} holds no JSON object")
    return config


def _download_config(model: str, revision: str | None, token: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        with _translated(model, model, revision, token):
            return Path(
                hf_hub_download(
                    model,
                    "config.json",
                    revision=revision,
                    token=token,
                    etag_timeout=TIMEOUT,
                    **_environment(),
                )
            )
    except AdapterSourceError as error:
        raise ModelNotFoundError(f"model {model}: {error}") from error.__cause__


def _environment() -> dict[str, Any]:
    offline = any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )
    return {
        "endpoint": os.environ.get("HF_ENDPOINT") or None,
        "cache_dir": os.environ.get("HF_HUB_CACHE") or None,
        "local_files_only": offline,
    }


@contextmanager
def _translated(adapter: str, repo_id: str, revision: str | None, token: str | None) -> Iterator[None]:
    """Raise the Hub's errors as ours."""
    try:
        yield
    except Exception as error:  # connections fail in the words of several libraries
        error_class, message = _explain(_told_by_the_hub(error), repo_id, revision, token)
        raise error_class(adapter, message) from _without_secrets(error, token)


def _explain(
    error: BaseException, repo_id: str, revision: str | None, token: str | None
) -> tuple[type[AdapterSourceError], str]:
    """Which of our errors it is, and what to say."""
    from huggingface_hub import errors

    where = f"{repo_id}{f'@{revision}' if revision else ''}"
    with_token = "the token does not open it" if token else "it is private: pass a token with token="
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.HFValidationError):
        return AdapterNotFoundError, f"{repo_id!r} is no repository's name: {error}"
    if isinstance(error, errors.GatedRepoError):
        return (
            AdapterAccessError,
            f"{where} is gated: ask for access on the Hub, then pass the token of that account as token=",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return AdapterNotFoundError, f"{repo_id} has no revision {revision!r}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return AdapterNotFoundError, f"there is no repository {repo_id} on the Hub, or {with_token}"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return AdapterNotFoundError, f"{where} lacks a file that was asked for"
    if status in (401, 403):
        return AdapterAccessError, f"{where} cannot be read: {with_token}"
    if status is not None:
        return AdapterDownloadError, f"the Hub answered {status} for {where}: try again"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            AdapterDownloadError,
            f"{where} is not in the Hub's cache, and the Hub cannot be reached (offline?)",
        )
    return AdapterDownloadError, f"the download of {where} failed ({type(error).__name__}): try again"


def _told_by_the_hub(error: BaseException) -> BaseException:
    """The Hub's own answer, where huggingface_hub has put "and there is no cached copy" around it."""
    from huggingface_hub import errors

    told: BaseException | None = error
    while told is not None and not isinstance(told, errors.HfHubHTTPError):
        told = told.__cause__
    return told or error


def _without_secrets(error: BaseException, token: str | None) -> BaseException | None:
    """The error as a cause, unless it or what caused it spells the token out."""
    cause: BaseException | None = error
    while token and cause is not None:
        if token in f"{cause!s} {cause!r}":
            return None
        cause = cause.__cause__ or cause.__context__
    return error
