"""The private copy of an adapter's files, and its digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from qlora_infer.errors import CorruptAdapterError
from qlora_infer.files.extras import MAX_BYTES, extra_file
from qlora_infer.files.manifest import check_file, weights_files
from qlora_infer.files.peft_config import MAX_CONFIG_BYTES
from qlora_infer.files.snapshot import CONFIG_NAME, WEIGHTS_NAME

#: The weights of the largest adapters, rank 512 on every module of a 70B model, have 26 GB in float32.
MAX_WEIGHTS_BYTES = 32 << 30

_CHUNK = 1 << 22


def copy_adapter(adapter: str, source: Path, into: Path, *, allow_pickle: bool) -> None:
    """Copy an adapter's files, and no others, into the new folder ``into``; nothing in them is read.

    Args:
        adapter: The adapter's name, for messages.
        source: The folder with the files.
        into: The new folder.
        allow_pickle: Whether to take pickled weights where there is no safetensors file.

    Raises:
        AdapterNotFoundError: A file is missing.
        AdapterSourceError: A file may not be read by this user.
        UnsafeAdapterError: A file is a link that leaves the folder, or no regular file; or the weights are a pickle
            only, and ``allow_pickle`` is false.
        CorruptAdapterError: A file is too large for an adapter's, or changed while it was copied.
        OSError: A file is gone, or cannot be copied.
    """
    limits = {check_file(adapter, source, CONFIG_NAME): MAX_CONFIG_BYTES}
    for name, max_bytes in MAX_BYTES.items():
        if path := extra_file(adapter, source, name):
            limits[path] = max_bytes
    weights = weights_files(adapter, source, allow_pickle=allow_pickle)
    before = _stamps([*limits, *weights])
    into.mkdir(parents=True)
    for path, max_bytes in limits.items():
        _copy(adapter, path, into / path.name, max_bytes)
    left = MAX_WEIGHTS_BYTES
    for path in weights:
        _copy(adapter, path, into / path.name, left)
        left -= (into / path.name).stat().st_size
    if _stamps([*limits, *weights]) != before:
        raise CorruptAdapterError(adapter, f"{source} changed while it was read: write to a new folder, then load that")


def digest_of(folder: Path, *, extras: Sequence[str] = ()) -> str:
    """Return the SHA-256 of an adapter's files, in hexadecimal digits.

    Args:
        folder: The folder with the files.
        extras: The names of the files beside its config and weights.
    """
    digest = hashlib.sha256()
    for name in (CONFIG_NAME, WEIGHTS_NAME, *extras):
        if name in extras:
            digest.update(name.encode())
        with (folder / name).open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
            digest.update(file.tell().to_bytes(8, "little"))
    return digest.hexdigest()


def _copy(adapter: str, source: Path, target: Path, max_bytes: int) -> None:
    num_bytes = 0
    with source.open("rb") as reader, target.open("xb") as writer:
        while chunk := reader.read(_CHUNK):
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise CorruptAdapterError(
                    adapter, f"{source} is too large: it has at most {max_bytes} bytes in an adapter"
                )
            writer.write(chunk)


def _stamps(paths: Iterable[Path]) -> list[tuple[int, int, int]]:
    stats = [path.stat() for path in paths]
    return [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats]
