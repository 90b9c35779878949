"""What a user names, and the local folder that it stands for."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from attrs import evolve, field, frozen
from attrs.validators import optional

from qlora_infer.errors import AdapterNotFoundError
from qlora_infer.files.snapshot import CONFIG_NAME, where_else
from qlora_infer.sources.url import SourceURL

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
    if url := SourceURL.read(location):
        url.check()
        if not url.is_file:
            from qlora_infer.sources import filesystem

            filesystem.check_scheme(url.scheme)
    elif not _REPOSITORY.fullmatch(location) and not _is_written_as_path(location):
        raise ValueError(
            f"location must be 'org/repo', a URL, or a path that begins with './' or '/', got {_beginning(location)}"
        )


def _check_revision(source: AdapterSource, attribute: Any, revision: Any) -> None:
    _check_text(source, attribute, revision)
    if source.is_local:
        raise ValueError(f"{source.location} is a folder, and folders have no revisions: leave revision out")
    if url := SourceURL.read(source.location):
        raise ValueError(f"{url} is a URL, and URLs have no revisions: leave revision out, or write it into the path")
    if not revision or _NOT_IN_REVISIONS.search(revision):
        raise ValueError(f"a revision is the name of a branch or tag, or a commit, got {revision!r}")


def _check_subfolder(source: AdapterSource, attribute: Any, subfolder: Any) -> None:
    _check_text(source, attribute, subfolder)
    if _NOT_IN_SUBFOLDERS.search(subfolder) or any(part in ("", ".", "..") for part in subfolder.split("/")):
        raise ValueError(f"a subfolder is a relative path of plain names, got {subfolder!r}")


def _check_token(source: AdapterSource, attribute: Any, token: Any) -> None:
    _check_text(source, attribute, token)
    url = SourceURL.read(source.location)
    if url and not url.is_http:
        raise ValueError(f"{url} takes no token, which is for the Hub and http(s): pass storage_options=")
    if url and url.user is not None:
        raise ValueError(f"{url} has a user in its URL and a token: leave one of them out")


def _check_options(source: AdapterSource, attribute: Any, options: Mapping[str, Any]) -> None:
    if options and not SourceURL.read(source.location):
        raise ValueError(f"{source.location} is no URL, and only URLs have storage options: leave storage_options out")


def _copied(options: Mapping[str, Any]) -> dict[str, Any]:
    """``dict``, in a form whose types type checkers understand."""
    return dict(options)


@frozen
class AdapterSource:
    """Where an adapter comes from: a repository on the Hub, a local folder, or a folder on any fsspec filesystem.

    Make one with ``parse``, which takes what a user writes. Made directly, ``AdapterSource("org/repo")`` is always the
    repository, also where there is a folder of that name. Neither ``str()`` nor ``repr()`` shows a secret: no token,
    no storage option, and of a URL neither the password nor the query, where signed URLs have their signature.

    Attributes:
        location: ``"org/repo"``, a path that begins with ``/``, ``./``, ``../`` or ``~``, or a URL such as
            ``"s3://bucket/pirate"`` or ``"https://host/pirate"``, secrets and all.
        revision: A branch, tag or commit on the Hub; ``None`` for the default branch.
        subfolder: Where in the repository or folder the adapter is.
        token: The access token for this source: the Hub's, where ``None`` takes the engine's, or the one to send to
            an http(s) URL as ``Authorization: Bearer``.
        storage_options: What fsspec's filesystem of a URL is made with, such as a key or an endpoint.

    Raises:
        ValueError: An attribute is none of these, or contradicts the location: a revision of a path, say.
        TypeError: An attribute is no text.
        MissingDependencyError: It is a URL, and fsspec is not installed.
    """

    location: str = field(validator=_check_location, repr=lambda location: repr(_without_secrets(location)))
    revision: str | None = field(default=None, validator=optional(_check_revision))
    subfolder: str | None = field(default=None, validator=optional(_check_subfolder))
    token: str | None = field(default=None, repr=False, validator=optional(_check_token))
    storage_options: Mapping[str, Any] = field(
        factory=dict, converter=_copied, repr=False, hash=False, validator=_check_options
    )

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

        Text is a URL when it begins with ``scheme://``. It is a path when it looks like one (``/``, ``./``, ``../`` or
        ``~`` at its start, a backslash, more than one slash before any ``@`` or ``:``) or when there is such a file or
        folder; else it must be ``org/repo``, ``org/repo@revision``, ``org/repo:sub/folder`` or
        ``org/repo@revision:sub/folder``. Neither a path nor a URL is ever looked up on the Hub.
        ``parse(str(source))`` is the same source again, but for its secrets.

        Args:
            source: The text, a path, or an ``AdapterSource``.
            revision: A branch, tag or commit, where the source names none.
            subfolder: A subfolder, where the source names none; of a path or URL it becomes the path's end.
            token: The Hub's access token for this source, or the bearer token of an http(s) URL.

        Raises:
            ValueError: The text is none of these, fsspec does not know the scheme, a keyword contradicts the text, or
                a subfolder leaves its repository.
            TypeError: It is no text and no path.
            MissingDependencyError: It is a URL, and fsspec is not installed.

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
        if url := read._url():
            return evolve(read, location=url.text, subfolder=None)
        return evolve(read, location=str(read), subfolder=None) if read.is_local else read

    @classmethod
    def _read(cls, text: str, may_be_hub: bool) -> AdapterSource:
        if not isinstance(text, str):
            raise TypeError(f"a source must be text or a path, got a path of {type(text).__name__}")
        if may_be_hub and SourceURL.read(text):
            return cls(text)
        match = _HUB.fullmatch(text) if may_be_hub else None
        if match and _exists(match["repo"]) and not _exists(text):
            return cls(f"./{match['repo']}", match["revision"], match["subfolder"])
        if text and (not may_be_hub or _is_path(text)):
            return cls(text if _is_written_as_path(text) else f"./{text}")
        if match:
            return cls(match["repo"], match["revision"], match["subfolder"])
        raise ValueError(
            f"{_beginning(text)} is neither a folder nor a Hub id nor a URL: write 'org/repo', "
            "'org/repo@revision:sub/folder', 's3://bucket/folder', or a path that begins with './' or '/'"
        )

    def resolve(
        self,
        adapter: str,
        *,
        default_token: str | None = None,
        allow_pickle: bool = False,
        download_to: Path | None = None,
    ) -> Path:
        """Find the folder with the adapter's files; downloads them when they are on the Hub or behind a URL.

        It does not read the files: a folder that is found may still hold a broken adapter. What a URL names has no
        cache: its files are the caller's, who deletes them.

        Args:
            adapter: The adapter's name, for messages.
            default_token: The Hub's access token for a source that has none of its own; it is sent to the Hub only.
            allow_pickle: Whether to fetch ``adapter_model.bin`` where there is no safetensors file.
            download_to: The new folder for what a URL names; ``None`` makes a temporary one.

        Raises:
            AdapterNotFoundError: There is no such folder, repository, revision, subfolder or file.
            AdapterAccessError: The Hub or the filesystem asks for a token, or for another one.
            AdapterDownloadError: The connection failed or broke, or there is none and no copy.
            UnsafeAdapterError: The weights are there as a pickle only, and ``allow_pickle`` is false.
            CorruptAdapterError: What a URL names is larger than an adapter may be.
            MissingDependencyError: The package for this kind of URL is not installed.
        """
        url = self._url()
        if url and not url.is_file:
            from qlora_infer.sources import filesystem

            return filesystem.download_adapter(
                adapter,
                url,
                download_to or Path(tempfile.mkdtemp(prefix="qlora-infer-")),
                token=self.token,
                storage_options=self.storage_options,
                allow_pickle=allow_pickle,
            )
        if not url and not self.is_local:
            from qlora_infer.sources import hub

            return hub.download_adapter(
                adapter,
                self.location,
                revision=self.revision,
                subfolder=self.subfolder,
                token=self.token or default_token,
                allow_pickle=allow_pickle,
            )
        try:
            # A local path is read as one, also when it is written as a URL: its links are checked.
            return _checked_folder(adapter, Path(url.place if url else str(self)).expanduser())
        except AdapterNotFoundError:
            raise
        except (OSError, ValueError, RuntimeError) as error:  # no permission, a name too long, a NUL, no such user
            reason = getattr(error, "strerror", None) or error
            raise AdapterNotFoundError(adapter, f"{str(self)!r} cannot be opened as a folder: {reason}") from error

    def _url(self) -> SourceURL | None:
        """The URL of the adapter's folder, with its secrets."""
        url = SourceURL.read(self.location)
        return url.below(self.subfolder) if url and self.subfolder else url

    def __str__(self) -> str:
        if url := self._url():
            return str(url)
        if self.is_local:
            return f"{self.location.rstrip('/')}/{self.subfolder}" if self.subfolder else self.location
        revision = f"@{self.revision}" if self.revision else ""
        subfolder = f":{self.subfolder}" if self.subfolder else ""
        return f"{self.location}{revision}{subfolder}"


class Writable(Protocol):
    """An adapter that is in no place, and is written into one."""

    def write(self, adapter: str, folder: Path) -> Path:
        """Write the two files that PEFT would write, into a new folder; returns it."""
        ...


def _without_secrets(location: str) -> str:
    return str(SourceURL.read(location) or location)


def _beginning(text: str) -> str:
    """Text for a message, up to where a URL that was mistyped could have its secrets."""
    shown = re.split(r":/|//|\?", text, maxsplit=1)[0]
    return repr(shown if shown == text else f"{shown}…")


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
