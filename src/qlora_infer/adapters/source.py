"""What a user names, and the local folder that it stands for."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from attrs import field, frozen

from qlora_infer.adapters.snapshot import CONFIG_NAME
from qlora_infer.errors import AdapterNotFoundError

# owner/name[@revision][:sub/folder]; what the Hub allows in a repository's name.
_HUB = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@(?P<revision>[^:@\s]+))?(?::(?P<subfolder>[^:\s]+))?"
)


@frozen
class AdapterSource:
    """Where an adapter comes from: a repository on the Hub, or a local folder.

    Make one with ``parse``, which also takes what a user writes.

    Attributes:
        location: ``"org/repo"``, or a path.
        is_local: Whether ``location`` is a path.
        revision: A branch, tag or commit on the Hub; ``None`` for the default branch.
        subfolder: Where in the repository or folder the adapter is.
        token: The Hub's access token for this source; ``None`` takes the engine's. Never printed.
    """

    location: str
    is_local: bool
    revision: str | None = None
    subfolder: str | None = None
    token: str | None = field(default=None, repr=False)

    @classmethod
    def parse(
        cls,
        source: str | os.PathLike[str] | AdapterSource,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | None = None,
    ) -> AdapterSource:
        """Read what a user wrote.

        Text is a path when it looks like one (``/``, ``./``, ``../`` or ``~`` at its start, or more than one slash) or
        when there is such a folder; else it must be ``org/repo``, ``org/repo@revision``, ``org/repo:sub/folder`` or
        ``org/repo@revision:sub/folder``. A path is never looked up on the Hub.

        Args:
            source: The text, a path, or an ``AdapterSource``, which stays as it is.
            revision: A branch, tag or commit, where the text names none.
            subfolder: A subfolder, where the text names none.
            token: The Hub's access token for this source.

        Raises:
            ValueError: The text is neither, or a keyword contradicts it.
            TypeError: It is no text and no path.

        Example:
            >>> AdapterSource.parse("org/repo@v1:adapters/pirate").subfolder
            'adapters/pirate'
        """
        if isinstance(source, AdapterSource):
            return source._with(revision=revision, subfolder=subfolder, token=token)
        if isinstance(source, os.PathLike):
            return cls(os.fspath(source), is_local=True)._with(revision=revision, subfolder=subfolder, token=token)
        if not isinstance(source, str):
            raise TypeError(f"a source must be text or a path, got {type(source).__name__}")
        return cls._read(source)._with(revision=revision, subfolder=subfolder, token=token)

    @classmethod
    def _read(cls, text: str) -> AdapterSource:
        if text.startswith(("/", "./", "../", "~")) or text in (".", "..") or _is_folder(text):
            return cls(text, is_local=True)
        if match := _HUB.fullmatch(text):
            return cls(match["repo"], False, match["revision"], _checked_subfolder(match["subfolder"]))
        if text.split(":")[0].split("@")[0].count("/") > 1 or "\\" in text:
            return cls(text, is_local=True)
        raise ValueError(
            f"{text!r} is neither a folder nor a Hub id: write 'org/repo', 'org/repo@revision:sub/folder', or a path "
            "that begins with './' or '/'"
        )

    def _with(self, *, revision: str | None, subfolder: str | None, token: str | None) -> AdapterSource:
        if self.is_local and (revision or self.revision):
            raise ValueError(f"{self.location} is a folder, and folders have no revisions: leave revision out")
        return AdapterSource(
            self.location,
            self.is_local,
            _agreed("revision", self.revision, revision),
            _agreed("subfolder", self.subfolder, _checked_subfolder(subfolder)),
            token or self.token,
        )

    def resolve(self, adapter: str, *, default_token: str | None, allow_pickle: bool) -> Path:
        """Find the folder with the adapter's files; downloads them when they are on the Hub.

        Args:
            adapter: The adapter's name, for messages.
            default_token: The Hub's access token for a source that has none of its own.
            allow_pickle: Whether to fetch ``adapter_model.bin`` where there is no safetensors file.

        Raises:
            AdapterSourceError: It does not exist, or could not be fetched.
        """
        if not self.is_local:
            from qlora_infer import _hub

            return _hub.download_adapter(
                adapter,
                self.location,
                revision=self.revision,
                subfolder=self.subfolder,
                token=self.token or default_token,
                allow_pickle=allow_pickle,
            )
        folder = Path(self.location).expanduser() / (self.subfolder or "")
        _check_is_adapter(adapter, folder)
        return folder

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        subfolder = f":{self.subfolder}" if self.subfolder else ""
        return f"{self.location}{revision}{subfolder}"


def _is_folder(text: str) -> bool:
    try:
        return bool(text) and Path(text).is_dir()
    except (OSError, ValueError):
        return False


def _agreed(name: str, written: str | None, keyword: str | None) -> str | None:
    if written and keyword and written != keyword:
        raise ValueError(f"{name}={keyword!r} contradicts the source, which says {written!r}")
    return written or keyword


def _checked_subfolder(subfolder: Any) -> str | None:
    if subfolder is None:
        return None
    parts = subfolder.split("/")
    if PurePosixPath(subfolder).is_absolute() or any(part in ("", ".", "..") for part in parts) or "\\" in subfolder:
        raise ValueError(f"a subfolder is a relative path of plain names, got {subfolder!r}")
    return str(subfolder)


def _check_is_adapter(adapter: str, folder: Path) -> None:
    if not folder.exists():
        raise AdapterNotFoundError(adapter, f"there is no folder {folder} (a path is never looked up on the Hub)")
    if not folder.is_dir():
        raise AdapterNotFoundError(adapter, f"{folder} is a file: name the folder that holds {CONFIG_NAME}")
    if not (folder / CONFIG_NAME).exists() and not (folder / CONFIG_NAME).is_symlink():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))[:5]
        hint = (
            f"there are adapters in its subfolders {', '.join(inside)}: pass subfolder="
            if inside
            else "is it an adapter?"
        )
        raise AdapterNotFoundError(adapter, f"{folder} has no {CONFIG_NAME}; {hint}")
