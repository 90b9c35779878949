"""The sources from which an operator lets adapters come."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

from attrs import frozen

from qlora_infer.files.snapshot import CONFIG_NAME
from qlora_infer.sources.folder import FolderSource
from qlora_infer.sources.source import Source, parse_source


class SourceNotAllowedError(PermissionError):
    """The operator does not let adapters come from there."""


@frozen
class AllowedSources:
    """A folder of adapters, and prefixes of Hub ids and URLs; by default nothing.

    Attributes:
        folder: Local adapters come from here, and from nowhere else.
        prefixes: ``"me/"`` or ``"s3://bucket/adapters/"`` for all below it, ``"me/pirate"`` for itself.
    """

    folder: Path | None = None
    prefixes: Sequence[str] = ()

    def parse(self, text: str) -> Source:
        """Return the source that a text names; the place that it leads to decides, not its spelling.

        A name without a slash is a folder in ``folder``.

        Raises:
            SourceNotAllowedError: It is not allowed.
            ValueError: The text is not written as a source is.
        """
        source = FolderSource(text) if _is_name(text) else parse_source(text)
        if isinstance(source, FolderSource):
            path = self._inside(str(source.path))
            if path is not None:
                return FolderSource(path)
        elif self._is_allowed(str(source)):
            return source
        raise SourceNotAllowedError(f"adapters may not come from {source}: ask the operator to allow it")

    def find(self, name: str) -> Source | None:
        """Return the source of an adapter that a request names and that is not loaded; ``None`` where there is none.

        It is a folder in ``folder`` with this name, or a source that one of ``prefixes`` allows.
        """
        path = self._inside(name) if _is_name(name) else None
        if path is not None and (path / CONFIG_NAME).is_file():
            return FolderSource(path)
        if not self._is_allowed(name):
            return None
        try:
            source = parse_source(name)
        except ValueError:
            return None
        return source if not isinstance(source, FolderSource) and self._is_allowed(str(source)) else None

    def _inside(self, path: str) -> Path | None:
        """Return a path below the folder, symbolic links followed; ``None`` for one that leads elsewhere."""
        if self.folder is None or "\0" in path:
            return None
        folder = self.folder.resolve()
        found = (folder / path).resolve()
        return found if found.is_relative_to(folder) and found != folder else None

    def _is_allowed(self, text: str) -> bool:
        if ".." in re.split(r"[/\\:@]", unquote(text)):
            return False
        return any(text == prefix or (prefix.endswith("/") and text.startswith(prefix)) for prefix in self.prefixes)


def _is_name(text: str) -> bool:
    return Path(text).name == text
