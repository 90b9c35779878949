"""A local folder with an adapter."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from attrs import field, frozen

from qlora_infer.errors import AdapterNotFoundError, CorruptAdapterError
from qlora_infer.files.content import copy_adapter
from qlora_infer.files.kinds.folder import MAX_NAMES, next_step
from qlora_infer.files.safetensors import read_header
from qlora_infer.files.snapshot import CONFIG_NAME


def is_written_as_path(text: str) -> bool:
    """Return whether text can be nothing but a path."""
    return text.startswith(("/", "./", "../", "~")) or text in (".", "..")


def _as_path(path: str | os.PathLike[str]) -> str:
    text = os.fspath(path)
    if not isinstance(text, str):
        raise TypeError(f"a folder's path must be text, got {type(text).__name__}")
    if not text:
        raise ValueError("a folder's path must not be empty: write '.' for the current folder")
    return text if is_written_as_path(text) else f"./{text}"


@frozen
class FolderSource:
    """A local folder with an adapter.

    Attributes:
        path: The path; ``~`` is expanded when it is read.

    Raises:
        ValueError: The path is empty.
        TypeError: The path is neither text nor a path.

    Example:
        >>> print(FolderSource("./lora/pirate"))
        ./lora/pirate
    """

    path: str = field(converter=_as_path)

    @property
    def refetch_cost(self) -> float:
        """The cost of fetching it again, in copies of a local folder."""
        return 1.0

    def fetch(self, adapter: str, into: Path, *, token: str | None, allow_pickle: bool) -> None:
        """Copy the adapter's files into a new folder; ``Source`` describes the arguments.

        Raises:
            AdapterNotFoundError: There is no such folder, or it has no adapter.
            UnsafeAdapterError: A file is a link that leaves the folder, or not a regular file; or the weights are a
                pickle, and ``allow_pickle`` is false.
            CorruptAdapterError: Config or weights are too large, or a file changed during the copy.
            AdapterSourceError: The permissions of a file forbid reading it.
        """
        copy_adapter(adapter, self._folder(adapter), into, allow_pickle=allow_pickle)

    def _folder(self, adapter: str) -> Path:
        try:
            folder = Path(self.path).expanduser()
            self._check(adapter, folder)
        except AdapterNotFoundError:
            raise
        except (OSError, ValueError, RuntimeError) as error:  # no permission, a name too long, a NUL, no such user
            reason = getattr(error, "strerror", None) or error
            raise AdapterNotFoundError(adapter, f"{self.path!r} cannot be opened as a folder: {reason}") from error
        return folder

    def _check(self, adapter: str, folder: Path) -> None:
        if not folder.exists():
            raise AdapterNotFoundError(adapter, f"there is no folder {folder} (a path is never looked up on the Hub)")
        if not folder.is_dir():
            raise AdapterNotFoundError(adapter, f"{folder} is a file: name the folder that holds {CONFIG_NAME}")
        # A link that leads nowhere is named where links are checked.
        if not os.path.lexists(folder / CONFIG_NAME):
            inside = sorted(str(path.parent) for path in folder.glob(f"*/{CONFIG_NAME}"))
            names = [path.name for path in islice(folder.iterdir(), MAX_NAMES)]
            step = next_step(inside, names, _tensors_in(adapter, folder, names))
            raise AdapterNotFoundError(adapter, f"{folder} has no {CONFIG_NAME}; {step}")

    def __str__(self) -> str:
        return self.path


def _tensors_in(adapter: str, folder: Path, names: Sequence[str]) -> Sequence[str]:
    """Return the names of the tensors in a folder's only safetensors file; none where that is broken, or a link."""
    found = [name for name in names if name.endswith(".safetensors") and not (folder / name).is_symlink()]
    try:
        return list(read_header(adapter, folder / found[0])) if len(found) == 1 else []
    except (OSError, CorruptAdapterError):
        return []
