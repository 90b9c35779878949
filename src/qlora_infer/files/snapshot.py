"""The snapshot of an adapter, one immutable content, and the names of its files."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from attrs import frozen

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
#: Weights as old versions of PEFT wrote them, by the order in which they are looked for.
PICKLE_NAMES = ("adapter_model.bin", "adapter_model.pt")
#: Weights as mlx-lm and mlx-vlm write them; those with a number before the name are of earlier steps, and never read.
MLX_NAME = "adapters.safetensors"
#: Weights in several files, and the two names of an index to them: transformers 5.19 writes the second
#: (``PreTrainedModel.save_pretrained``), other tools the first.
SHARD = re.compile(r"adapter_model-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors", re.ASCII)
INDEX_NAMES = (f"{WEIGHTS_NAME}.index.json", "model.safetensors.index.json")

# How transformers' Trainer calls the folder of each saving.
_CHECKPOINT = re.compile(r"(?:^|[/:])checkpoint-([0-9]{1,12})$")

#: The folder in a private copy that has the adapter in the running model's names (``served.py``).
SERVED_NAME = "served"
#: The file in that folder with DoRA's magnitudes, by module.
MAGNITUDES_NAME = "magnitudes.safetensors"
#: The file in that folder with what the adapter adds to outputs, by module.
BIASES_NAME = "biases.safetensors"


@frozen
class Snapshot:
    """One immutable content of an adapter.

    Attributes:
        folder: The copy: ``adapter_config.json``, ``adapter_model.safetensors``, and what else the adapter carries.
        digest: SHA-256 over these files, in hexadecimal digits.
        format: The format that its source has it in, such as ``"MLX"``; the copy has PEFT's.
    """

    folder: Path
    digest: str
    format: str = "PEFT"


def weights_names(names: Collection[str], *, allow_pickle: bool = False) -> tuple[str, ...]:
    """Return those of a folder's files that hold an adapter's weights, the last of them last; empty if none does.

    Args:
        names: The names of the folder's files.
        allow_pickle: Whether they may be a pickle, where they are nothing else.
    """
    if WEIGHTS_NAME in names:
        return (WEIGHTS_NAME,)
    if shards := sorted(filter(SHARD.fullmatch, names)):
        return (*(index for index in INDEX_NAMES if index in names), *shards)
    for name in (MLX_NAME, *(PICKLE_NAMES if allow_pickle else ())):
        if name in names:
            return (name,)
    return ()


def has_all_shards(names: Collection[str]) -> bool:
    """Return whether the files that weights are split over are all there, as their own names number them."""
    shards = list(filter(None, map(SHARD.fullmatch, names)))
    return all(int(shard["total"]) == len(shards) for shard in shards)


def where_else(adapters: list[str]) -> str:
    """Return the next step for somebody who named the folder above these adapters."""
    if not adapters:
        return "is it an adapter?"
    if newest := newest_checkpoint(adapters):
        return f"of the {len(adapters)} adapters inside it the newest is {newest}: name that, or another"
    more = f" and {len(adapters) - 5} more" if len(adapters) > 5 else ""
    return f"there are adapters inside it: name {', '.join(adapters[:5])}{more}"


def newest_checkpoint(adapters: Collection[str]) -> str | None:
    """Return the last of a trainer's folders ``checkpoint-500``; ``None`` where they are not all such folders."""
    steps = {adapter: _CHECKPOINT.search(adapter) for adapter in adapters}
    found = {adapter: int(match[1]) for adapter, match in steps.items() if match}
    return max(found, key=lambda adapter: found[adapter]) if found and len(found) == len(steps) else None
