"""The protocol of a source, and the parser that makes one of a string."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

from qlora_infer.sources.folder import FolderSource, is_written_as_path
from qlora_infer.sources.hub import REPOSITORY, HubSource
from qlora_infer.sources.tensors import PeftModel, TensorSource
from qlora_infer.sources.url import URL, URLSource

_HUB = re.compile(rf"(?P<repo>{REPOSITORY.pattern})(?:@(?P<revision>[^:]+))?(?::(?P<subfolder>[^:]+))?", re.ASCII)


@runtime_checkable
class Source(Protocol):
    """A place from which adapters are loaded; ``str()`` names it without secrets.

    A source that can be fetched again is hashable, and equal to another source of the same place.
    """

    @property
    def refetch_cost(self) -> float | None:
        """The cost of fetching it again, in copies of a local folder; ``None`` if that is impossible."""
        ...

    def fetch(self, adapter: str, into: Path, *, token: str | None, allow_pickle: bool) -> None:
        """Write the adapter's files, and no others, into a new folder.

        The files need no check: the engine reads them as untrusted. After an error it deletes the folder.

        Args:
            adapter: The adapter's name, for messages.
            into: The folder, which does not exist yet.
            token: The engine's access token for the Hub; a source with its own token ignores it.
            allow_pickle: Use ``adapter_model.bin`` if there is no ``adapter_model.safetensors``.

        Raises:
            AdapterError: The source cannot be read.
        """
        ...


#: Whatever ``load_adapter`` takes as a source.
SourceLike: TypeAlias = str | os.PathLike[str] | Source | PeftModel


def parse_source(source: SourceLike) -> Source:
    """Return the source for a text, a path or a PEFT model; a source is returned as it is.

    Text that begins with ``scheme://`` is a URL. Text is a path if it begins with ``/``, ``./``, ``../`` or ``~``, if
    it contains a backslash, or more than one slash before any ``@`` or ``:``, or if such a file or folder exists. Other
    text must be ``org/repo``, ``org/repo@revision``, ``org/repo:sub/folder`` or ``org/repo@revision:sub/folder``. Paths
    and URLs are never looked up on the Hub. ``parse_source(str(source))`` is the same place without its secrets.

    Args:
        source: A text, a path, a PEFT model, whose active adapter is used, or a source.

    Raises:
        ValueError: The text is none of these, fsspec does not know the scheme, or a subfolder leaves its repository.
        TypeError: The argument has another type.
        MissingDependencyError: fsspec is not installed for a URL, or peft for a PEFT model.

    Example:
        >>> parse_source("org/repo@v1:adapters/pirate")
        HubSource(repo_id='org/repo', revision='v1', subfolder='adapters/pirate')
    """
    if isinstance(source, str):
        return _parse_text(source)
    if isinstance(source, os.PathLike):
        return FolderSource(source)
    if isinstance(source, Source):
        return source
    if isinstance(source, PeftModel):
        return TensorSource.from_peft(source)
    if isinstance(source, Mapping):
        raise TypeError("tensors are no adapter without their config: pass TensorSource(tensors, config)")
    raise TypeError(
        f"a source must be text, a path, a PEFT model, or a source such as HubSource, got {type(source).__name__}"
    )


def parse_sources(adapters: Mapping[str, SourceLike]) -> dict[str, Source]:
    """Return the sources of several adapters by name; raises the errors of ``parse_source``."""
    if not isinstance(adapters, Mapping):
        raise TypeError(
            f'adapters must map names to sources, such as {{"pirate": "./pirate"}}, got {type(adapters).__name__}'
        )
    return {name: parse_source(source) for name, source in adapters.items()}


def _parse_text(text: str) -> Source:
    if url := URL.read(text):
        if not url.is_file:
            return URLSource(text)
        url.check()
        return FolderSource(url.place)
    match = _HUB.fullmatch(text)
    if match and _exists(match["repo"]) and not _exists(text):
        return _existing_folder(**match.groupdict())
    if text and _is_path(text):
        return FolderSource(text)
    if match:
        return HubSource(match["repo"], revision=match["revision"], subfolder=match["subfolder"])
    raise ValueError(
        f"{_beginning(text)} is neither a folder nor a Hub id nor a URL: write 'org/repo', "
        "'org/repo@revision:sub/folder', 's3://bucket/folder', or a path that begins with './' or '/'"
    )


def _existing_folder(repo: str, revision: str | None, subfolder: str | None) -> FolderSource:
    if revision is not None:
        raise ValueError(f"./{repo} is a folder, and folders have no revisions: leave @{revision} out")
    if subfolder is None:
        return FolderSource(repo)
    return FolderSource(f"{repo}/{HubSource(repo, subfolder=subfolder).subfolder}")


def _beginning(text: str) -> str:
    """Return text for a message, up to where a URL that was mistyped could have its secrets."""
    shown = re.split(r":/|//|\?", text, maxsplit=1)[0]
    return repr(shown if shown == text else f"{shown}…")


def _is_path(text: str) -> bool:
    before_suffixes = re.split("[@:]", text, maxsplit=1)[0]
    return is_written_as_path(text) or "\\" in text or before_suffixes.count("/") > 1 or _exists(text)


def _exists(text: str) -> bool:
    try:
        return bool(text) and Path(text).exists()
    except (OSError, ValueError):
        return False
