"""A private copy of an adapter's files, so that nothing that happens to the source can change what is served."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from attrs import frozen

from qlora_infer.errors import CorruptAdapterError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

#: The folder in a private copy that has the adapter in the running model's names (``served.py``).
SERVED_NAME = "served"

_CHUNK = 1 << 22


@frozen
class Snapshot:
    """One immutable content of an adapter.

    Attributes:
        folder: The copy: ``adapter_config.json``, ``adapter_model.safetensors``, and what else the adapter carries.
        digest: SHA-256 over these files, in hexadecimal digits.
    """

    folder: Path
    digest: str


def take_snapshot(adapter: str, source: Path, folder: Path, *, carried: Sequence[str] = ()) -> Snapshot:
    """Copy an adapter's files from ``source`` into the new folder ``folder`` and digest what was copied.

    Args:
        adapter: The adapter's name, for messages.
        source: Where the files are.
        folder: Where to put them.
        carried: The names of those that it has beside its config and weights.

    Raises:
        CorruptAdapterError: A file changed while it was copied.
        OSError: A file is gone, or cannot be copied.
    """
    names = (CONFIG_NAME, WEIGHTS_NAME, *carried)
    before = _stamps(source, names)
    folder.mkdir(parents=True)
    digest = hashlib.sha256()
    for name in names:
        if name in carried:
            digest.update(name.encode())
        size = _copy(source / name, folder / name, digest)
        digest.update(size.to_bytes(8, "little"))
    if _stamps(source, names) != before:
        raise CorruptAdapterError(adapter, f"{source} changed while it was read: write to a new folder, then load that")
    return Snapshot(folder, digest.hexdigest())


def _copy(source: Path, target: Path, digest: hashlib._Hash) -> int:
    size = 0
    with source.open("rb") as reader, target.open("xb") as writer:
        while chunk := reader.read(_CHUNK):
            digest.update(chunk)
            size += writer.write(chunk)
    return size


def _stamps(source: Path, names: Sequence[str]) -> list[tuple[int, int, int]]:
    stats = [(source / name).stat() for name in names]
    return [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats]


def where_else(subfolders: list[str]) -> str:
    """The next step for somebody who named the folder above these adapters."""
    if not subfolders:
        return "is it an adapter?"
    more = f" and {len(subfolders) - 5} more" if len(subfolders) > 5 else ""
    return f"there are adapters in its subfolders {', '.join(subfolders[:5])}{more}: pass subfolder="
