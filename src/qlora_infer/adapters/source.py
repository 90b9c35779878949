"""What a user names, and the local folder that it stands for."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from attrs import evolve, field, frozen
from attrs.validators import optional

from qlora_infer.adapters.snapshot import CONFIG_NAME, where_else
from qlora_infer.errors import AdapterNotFoundError

_REPOSITORY = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)
_HUB = re.compile(rf"(?P<repo>{_REPOSITORY.pattern})(?:@(?P<revision>[^:]+))?(?::(?P<subfolder>[^:]+))?", re.ASCII)

# Git allows none of these in a branch's or tag's name, and ".." would leave the Hub cache's folder of branches.
_NOT_IN_REVISIONS = re.compile(r"[\s\x00-\x1f\x7f:\\~^?*\[]|\.\.|//|^/|/$")
_NOT_IN_SUBFOLDERS = re.compile(r"[\x00-\x1f\x7f:\\]")


def _check_text(source: AdapterSource, attribute: Any, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{attribute.name} must be text, got {type(value).__name__}")


def _check_location(source: AdapterSource, attribute: Any, location: Any) -> None:
    _check_text(source, attribute, location)
    if not _REPOSITORY.fullmatch(location) and not _is_written_as_path(location):
        raise ValueError(f"location must be 'org/repo' or a path that begins with './' or '/', got {location!r}")


def _check_revision(source: AdapterSource, attribute: Any, revision: Any) -> None:
    _check_text(source, attribute, revision)
    if source.is_local:
        raise ValueError(f"{source.location} is a folder, and folders have no revisions: leave revision out")
    if not revision or _NOT_IN_REVISIONS.search(revision):
        raise ValueError(f"a revision is the name of a branch or tag, or a commit, got {revision!r}")


def _check_subfolder(source: AdapterSource, attribute: Any, subfolder: Any) -> None:
    _check_text(source, attribute, subfolder)
    if _NOT_IN_SUBFOLDERS.search(subfolder) or any(part in ("", ".", "..") for part in subfolder.split("/")):
        raise ValueError(f"a subfolder is a relative path of plain names, got {subfolder!r}")


@frozen
class AdapterSource:
    """Where an adapter comes from: a repository on the Hub, or a local folder.

    Make one with ``parse``, which takes what a user writes. Made directly, ``AdapterSource("org/repo")`` is always the
    repository, also where there is a folder of that name.

    Attributes:
        location: ``"org/repo"``, or a path that begins with ``/``, ``./``, ``../`` or ``~``.
        revision: A branch, tag or commit on the Hub; ``None`` for the default branch.
        subfolder: Where in the repository or folder the adapter is.
        token: The Hub's access token for this source; ``None`` takes the engine's. Never printed.

    Raises:
        ValueError: An attribute is none of these, or a path has a revision.
        TypeError: An attribute is no text.
    """

    location: str = field(validator=_check_location)
    revision: str | None = field(default=None, validator=optional(_check_revision))
    subfolder: str | None = field(default=None, validator=optional(_check_subfolder))
    token: str | None = field(default=None, repr=False, validator=optional(_check_text))

    @property
    def is_local(self) -> bool:
        """Whether ``location`` is a path."""
        return _is_written_as_path(self.location)

    @classmethod
    def parse(
        cls,
        source: str | os.PathLike[str] | AdapterSource,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | None = None,
    ) -> AdapterSource:
        r"""Read what a user wrote.

        Text is a path when it looks like one (``/``, ``./``, ``../`` or ``~`` at its start, a backslash, more than one
        slash before any ``@`` or ``:``) or when there is such a file or folder; else it must be ``org/repo``,
        ``org/repo@revision``, ``org/repo:sub/folder`` or ``org/repo@revision:sub/folder``. A path is never looked up
        on the Hub. ``parse(str(source))`` is the same source again, but for its token.

        Args:
            source: The text, a path, or an ``AdapterSource``.
            revision: A branch, tag or commit, where the source names none.
            subfolder: A subfolder, where the source names none; of a path it becomes the path's end.
            token: The Hub's access token for this source.

        Raises:
            ValueError: The text is neither, a keyword contradicts it, or a subfolder leaves its repository.
            TypeError: It is no text and no path.

        Example:
            >>> AdapterSource.parse("org/repo@v1:adapters/pirate").subfolder
            'adapters/pirate'
        """
        if not isinstance(source, (str, os.PathLike, AdapterSource)):
            raise TypeError(f"a source must be text or a path, got {type(source).__name__}")
        read = source if isinstance(source, AdapterSource) else cls._read(os.fspath(source), isinstance(source, str))
        read = evolve(
            read,
            revision=_agreed("revision", read.revision, revision),
            subfolder=_agreed("subfolder", read.subfolder, subfolder),
            token=read.token if token is None else token,
        )
        return evolve(read, location=str(read), subfolder=None) if read.is_local else read

    @classmethod
    def _read(cls, text: str, may_be_hub: bool) -> AdapterSource:
        if not isinstance(text, str):
            raise TypeError(f"a source must be text or a path, got a path of {type(text).__name__}")
        match = _HUB.fullmatch(text) if may_be_hub else None
        if match and _exists(match["repo"]) and not _exists(text):
            return cls(f"./{match['repo']}", match["revision"], match["subfolder"])
        if text and (not may_be_hub or _is_path(text)):
            return cls(text if _is_written_as_path(text) else f"./{text}")
        if match:
            return cls(match["repo"], match["revision"], match["subfolder"])
        raise ValueError(
            f"{text!r} is neither a folder nor a Hub id: write 'org/repo', 'org/repo@revision:sub/folder', or a path "
            "that begins with './' or '/'"
        )

    def resolve(self, adapter: str, *, default_token: str | None = None, allow_pickle: bool = False) -> Path:
        """Find the folder with the adapter's files; downloads them when they are on the Hub.

        It does not read the files: a folder that is found may still hold a broken adapter.

        Args:
            adapter: The adapter's name, for messages.
            default_token: The Hub's access token for a source that has none of its own.
            allow_pickle: Whether to fetch ``adapter_model.bin`` where there is no safetensors file.

        Raises:
            AdapterNotFoundError: There is no such folder, repository, revision, subfolder or file.
            AdapterAccessError: The Hub asks for a token, or for another one.
            AdapterDownloadError: The connection failed or broke, or there is none and no copy.
            UnsafeAdapterError: The Hub has the weights as a pickle only, and ``allow_pickle`` is false.
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
        try:
            return _checked_folder(adapter, Path(str(self)).expanduser())
        except AdapterNotFoundError:
            raise
        except (OSError, ValueError, RuntimeError) as error:  # no permission, a name too long, a NUL, no such user
            reason = getattr(error, "strerror", None) or error
            raise AdapterNotFoundError(adapter, f"{str(self)!r} cannot be opened as a folder: {reason}") from error

    def __str__(self) -> str:
        if self.is_local:
            return f"{self.location.rstrip('/')}/{self.subfolder}" if self.subfolder else self.location
        revision = f"@{self.revision}" if self.revision else ""
        subfolder = f":{self.subfolder}" if self.subfolder else ""
        return f"{self.location}{revision}{subfolder}"


def _is_written_as_path(text: str) -> bool:
    return text.startswith(("/", "./", "../", "~")) or text in (".", "..")


def _is_path(text: str) -> bool:
    before_suffixes = re.split("[@:]", text, maxsplit=1)[0]
    return _is_written_as_path(text) or "\\" in text or before_suffixes.count("/") > 1 or _exists(text)


def _exists(text: str) -> bool:
    try:
        return bool(text) and Path(text).exists()
    except (OSError, ValueError):
        return False


def _agreed(name: str, written: str | None, keyword: str | None) -> str | None:
    if written is not None and keyword is not None and written != keyword:
        raise ValueError(f"{name}={keyword!r} contradicts the source, which says {written!r}")
    return written if keyword is None else keyword


def _checked_folder(adapter: str, folder: Path) -> Path:
    if not folder.exists():
        raise AdapterNotFoundError(adapter, f"there is no folder {folder} (a path is never looked up on the Hub)")
    if not folder.is_dir():
        raise AdapterNotFoundError(adapter, f"{folder} is a file: name the folder that holds {CONFIG_NAME}")
    # A link that leads nowhere is named where links are checked.
    if not (folder / CONFIG_NAME).exists() and not (folder / CONFIG_NAME).is_symlink():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
        raise AdapterNotFoundError(adapter, f"{folder} has no {CONFIG_NAME}; {where_else(inside)}")
    return folder
