"""The source of an adapter on the Hub, and the choice of the files that are fetched.

The weights are fetched last, so that a copy with weights is a whole copy; unless another program has made it, which
the list of files shows.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from attrs import field, frozen
from attrs.validators import instance_of, optional

from qlora_infer.errors import AdapterNotFoundError, UnsafeAdapterError
from qlora_infer.files.content import copy_adapter
from qlora_infer.files.kinds.folder import next_step
from qlora_infer.files.snapshot import CONFIG_NAME, PICKLE_NAMES, WEIGHTS_NAME, has_all_shards, weights_names
from qlora_infer.sources.repository import Repository

PICKLE_NAME = PICKLE_NAMES[0]

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
    """A repository on the Hub, also if a local folder has its name.

    Attributes:
        repo_id: ``"org/repo"``.
        revision: A branch, tag or commit; ``None`` for the default branch.
        subfolder: The adapter's folder in the repository; ``None`` for its top.
        token: The access token; ``None`` for the engine's. It is never printed.

    Raises:
        ValueError: An attribute is malformed, or the subfolder leaves the repository.
        TypeError: An attribute is not a text.

    Example:
        >>> HubSource("org/repo", revision="v1", token="hf_secret")
        HubSource(repo_id='org/repo', revision='v1', subfolder=None)
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
        """Download missing files into the Hub's cache, and copy the adapter's files into a new folder.

        ``Source`` describes the arguments, ``download`` and ``copy_adapter`` the errors.
        """
        folder = self.download(adapter, token=token, allow_pickle=allow_pickle)
        copy_adapter(adapter, folder, into, allow_pickle=allow_pickle)

    def download(self, adapter: str, *, token: str | None, allow_pickle: bool) -> Path:
        """Fetch an adapter's files, and no others, into the Hub's cache; files in the cache are not fetched again.

        One request to the Hub resolves the branch and lists the files, also for a commit in the cache, because another
        program may have fetched only some of them. If the Hub cannot be reached, or with ``HF_HUB_OFFLINE=1``, the copy
        in the cache is used, and the log contains a line about it. Every wait for the Hub has a limit, but the whole
        download has none.

        Args:
            adapter: The adapter's name, for messages.
            token: The access token for a source without its own; ``None`` for that of ``HF_TOKEN`` or ``hf auth
                login``.
            allow_pickle: Fetch ``adapter_model.bin`` if there is no safetensors file.

        Returns:
            The folder with the adapter's files: a snapshot in the Hub's cache, or a folder inside it.

        Raises:
            AdapterNotFoundError: There is no such repository, revision, subfolder or file.
            AdapterAccessError: The repository needs a token, or another one.
            AdapterDownloadError: The connection failed or broke, or there is none and no copy.
            UnsafeAdapterError: The weights are only a pickle, and ``allow_pickle`` is false.
        """
        repository = Repository(self.repo_id, self.revision, self.token or token)
        prefix = f"{self.subfolder}/" if self.subfolder else ""
        weights = repository.fetch(
            cached=partial(_cached_weights, repository, prefix, allow_pickle),
            choose=partial(_adapter_files, adapter, repository, prefix, allow_pickle),
            fail=lambda error_class, message: error_class(adapter, message),
        )
        return weights.parent

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        subfolder = f":{self.subfolder}" if self.subfolder else ""
        return f"{self.repo_id}{revision}{subfolder}"


def _cached_weights(repository: Repository, prefix: str, allow_pickle: bool) -> Path | None:
    """Return the last file of the weights, where the cache has all of them."""
    config = repository.cached(prefix + CONFIG_NAME)
    if config is None:
        return None
    names = weights_names([path.name for path in config.parent.iterdir()], allow_pickle=allow_pickle)
    is_whole = names and has_all_shards(names)
    return repository.cached(prefix + names[-1]) if is_whole else None


def _adapter_files(
    adapter: str, repository: Repository, prefix: str, allow_pickle: bool, paths: list[str]
) -> list[str]:
    """Return the paths of an adapter's files in the repository: the config first, the weights last."""
    names = [path.removeprefix(prefix) for path in paths if path.startswith(prefix)]
    in_folder = {name.partition("/")[0] for name in names}
    place = f"the subfolder {prefix[:-1]!r}" if prefix else "its root"
    if CONFIG_NAME not in names:
        inside = sorted(path.removesuffix(f"/{CONFIG_NAME}") for path in paths if path.endswith(f"/{CONFIG_NAME}"))
        inside = [f"{repository}:{subfolder}" for subfolder in inside]
        raise AdapterNotFoundError(
            adapter, f"{repository} has no {CONFIG_NAME} in {place}; {next_step(inside, in_folder)}"
        )
    weights = weights_names(names, allow_pickle=allow_pickle)
    if not weights and PICKLE_NAME not in names:
        raise AdapterNotFoundError(
            adapter, f"{repository} has no {WEIGHTS_NAME} in {place}; {next_step([], in_folder)}"
        )
    if not weights:
        raise UnsafeAdapterError(
            adapter,
            f"{repository} has only pickled weights ({PICKLE_NAME}) in {place}, which can run code when they are read: "
            "take a revision with safetensors, or pass allow_pickle=True to have them converted",
        )
    extras = [name for name in names if "/" not in name and any(fnmatchcase(name, extra) for extra in EXTRA_NAMES)]
    return [prefix + name for name in (CONFIG_NAME, *extras, *weights)]
