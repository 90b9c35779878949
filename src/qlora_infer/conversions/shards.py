"""Adapters whose weights are in several files, ``adapter_model-00001-of-00002.safetensors`` and so on, as one.

transformers 5.19 writes them so (``PreTrainedModel.save_pretrained`` of a model with an adapter, ``max_shard_size``).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from qlora_infer.display import format_names
from qlora_infer.errors import CorruptAdapterError
from qlora_infer.files.manifest import check_file
from qlora_infer.files.peft_config import parse_json
from qlora_infer.files.safetensors import MAX_HEADER_BYTES, MAX_TENSORS, TensorEntry, read_header, write_header
from qlora_infer.files.snapshot import INDEX_NAMES, SHARD, WEIGHTS_NAME

#: The largest adapters have 26 GB, and transformers writes files of 50 GB, or of 5 GB before version 5.
MAX_SHARDS = 256
MAX_INDEX_BYTES = MAX_HEADER_BYTES


def shard_names(adapter: str, index: Path) -> list[str]:
    """Return the names of the files that an index names, all of them plain names; none for the index of a model.

    Raises:
        CorruptAdapterError: It is no such index.
    """
    return sorted(set(_read_index(adapter, index).values()))


def merge_shards(adapter: str, folder: Path) -> int:
    """Write the shards in a private folder as one file, in their place.

    Returns:
        How many there were; 0 where the weights are not in shards.

    Raises:
        CorruptAdapterError: One is missing or malformed, or they contradict each other or their index.
    """
    names = sorted(filter(SHARD.fullmatch, (path.name for path in folder.iterdir())))
    indices = [name for name in INDEX_NAMES if (folder / name).exists()]
    if not names or (folder / WEIGHTS_NAME).exists():
        return 0
    _check_complete(adapter, folder, names)
    headers = {name: read_header(adapter, check_file(adapter, folder, name)) for name in names}
    places = _places(adapter, headers)
    for index in indices:
        _check_index(adapter, folder / index, places)
    _write(folder, headers)
    for name in (*names, *indices):
        (folder / name).unlink(missing_ok=True)
    return len(names)


def _check_complete(adapter: str, folder: Path, names: Sequence[str]) -> None:
    numbers: dict[int, set[int]] = {}
    for match in map(SHARD.fullmatch, names):
        assert match is not None
        numbers.setdefault(int(match["total"]), set()).add(int(match["number"]))
    if len(numbers) > 1:
        raise CorruptAdapterError(
            adapter,
            f"{folder} has weights that are split in two ways ({format_names(names)}): keep one of them",
        )
    ((total, present),) = numbers.items()
    if total > MAX_SHARDS:
        raise CorruptAdapterError(
            adapter, f"{folder} has its weights in {total} files, {MAX_SHARDS} are allowed: save them as one"
        )
    missing = [f"{number:05}" for number in range(1, total + 1) if number not in present]
    if missing or present != set(range(1, total + 1)):
        raise CorruptAdapterError(
            adapter,
            f"{folder} has {len(present)} of the {total} files that its weights are in (without "
            f"{format_names(missing) or 'a number 0'}): copy all of them there",
        )


def _places(adapter: str, headers: Mapping[str, Mapping[str, TensorEntry]]) -> Mapping[str, str]:
    """Return the file that each tensor is in."""
    places: dict[str, str] = {}
    for name, entries in headers.items():
        if repeated := places.keys() & entries.keys():
            raise CorruptAdapterError(adapter, f"{name} has {format_names(sorted(repeated))}, as another file has")
        places.update(dict.fromkeys(entries, name))
    if len(places) > MAX_TENSORS:
        raise CorruptAdapterError(adapter, f"its files hold {len(places)} tensors, {MAX_TENSORS} are allowed")
    return places


def _check_index(adapter: str, index: Path, places: Mapping[str, str]) -> None:
    named = _read_index(adapter, index)
    differing = {tensor for tensor, _ in named.items() ^ places.items()}
    if named and differing:
        raise CorruptAdapterError(
            adapter,
            f"{index} and the files beside it differ in {len(differing)} tensors ({format_names(sorted(differing))}): "
            "copy all of them from one place",
        )


def _read_index(adapter: str, index: Path) -> Mapping[str, str]:
    with index.open("rb") as file:
        content = file.read(MAX_INDEX_BYTES + 1)
    if len(content) > MAX_INDEX_BYTES:
        raise CorruptAdapterError(adapter, f"{index} is too large: an index has at most {MAX_INDEX_BYTES} bytes")
    parsed = parse_json(adapter, index, content)
    places = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(places, dict) or not places:
        raise CorruptAdapterError(adapter, f"{index} has no 'weight_map' with the file of each tensor")
    is_of_adapter = [isinstance(name, str) and bool(SHARD.fullmatch(name)) for name in places.values()]
    if not any(is_of_adapter) and index.name != INDEX_NAMES[0]:
        return {}  # of the model that is in the folder, too
    for name, is_shard in zip(places.values(), is_of_adapter, strict=True):
        if not is_shard:
            raise CorruptAdapterError(
                adapter,
                f"{index} names {ascii(name)[:80]}; an adapter's files are adapter_model-00001-of-00002.safetensors",
            )
    return places


def _write(folder: Path, headers: Mapping[str, Mapping[str, TensorEntry]]) -> None:
    """Copy the shards' bytes one behind the other, and delete each shard when that is done."""
    header = {
        tensor: (entry.dtype, entry.shape, entry.num_bytes)
        for entries in headers.values()
        for tensor, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop))
    }
    written = folder / f"{WEIGHTS_NAME}.part"
    with written.open("xb") as target:
        write_header(target, header)
        for name, entries in headers.items():
            with (folder / name).open("rb") as shard:
                shard.seek((folder / name).stat().st_size - max(entry.stop for entry in entries.values()))
                shutil.copyfileobj(shard, target, 1 << 22)
            (folder / name).unlink()
    written.rename(folder / WEIGHTS_NAME)
