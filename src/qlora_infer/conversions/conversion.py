"""The conversion of an adapter's private copy to PEFT's LoRA form, where its source has another."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qlora_infer.conversions.adalora import AdaLoRA
from qlora_infer.conversions.loha import LoHa
from qlora_infer.conversions.mlx import MLX
from qlora_infer.conversions.shards import merge_shards
from qlora_infer.conversions.tinker import Tinker
from qlora_infer.errors import CorruptAdapterError
from qlora_infer.files.manifest import check_file
from qlora_infer.files.peft_config import read_config
from qlora_infer.files.safetensors import Computed, TensorEntry, map_tensors, read_header, write_tensors
from qlora_infer.files.snapshot import CONFIG_NAME, MLX_NAME, WEIGHTS_NAME

if TYPE_CHECKING:
    import numpy as np


class Format(Protocol):
    """A format of adapters that are LoRA, and are not written as PEFT writes LoRA."""

    @property
    def name(self) -> str:
        """Its name, for messages."""
        ...

    def matches(self, config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> bool:
        """Return whether an ``adapter_config.json`` and a header of weights are of this format."""
        ...

    def convert(
        self, adapter: str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
    ) -> tuple[Mapping[str, Any], Sequence[tuple[str, np.ndarray | Computed]]]:
        """Return the config and the named tensors of the same adapter in PEFT's form.

        Args:
            adapter: The adapter's name, for messages.
            config: Its config; only ``read_config`` has checked it.
            tensors: Its tensors as ``map_tensors`` gives them.

        Raises:
            CorruptAdapterError: Config and tensors are no adapter of this format.
            IncompatibleAdapterError: They are, and no LoRA is the same.
        """
        ...


FORMATS: tuple[Format, ...] = (MLX(), AdaLoRA(), LoHa(), Tinker())

#: A converted adapter may have so many times the bytes of its file. A LoHa of rank 22 in 16 bits has 22 times, experts
#: that share a factor some 5 times.
MAX_GROWTH = 24


def convert(adapter: str, folder: Path) -> str:
    """Write the adapter in a private folder as PEFT writes LoRA, in its own place.

    Weights in several files become one. Of the formats, the first that matches is converted. An adapter that PEFT
    would read as it is stays as it is, byte for byte.

    Returns:
        The name of the format that it had; ``"PEFT"`` where that is PEFT's own.

    Raises:
        CorruptAdapterError: Its files are no adapter of their format.
        IncompatibleAdapterError: It is an adapter, and no LoRA is the same.
    """
    num_shards = merge_shards(adapter, folder)
    if not (folder / WEIGHTS_NAME).exists() and (folder / MLX_NAME).exists():
        (folder / MLX_NAME).rename(folder / WEIGHTS_NAME)
    config = read_config(adapter, check_file(adapter, folder, CONFIG_NAME))
    weights = check_file(adapter, folder, WEIGHTS_NAME)
    entries = read_header(adapter, weights)
    found = next((form for form in FORMATS if form.matches(config, entries)), None)
    if found is not None:
        _write(adapter, folder, *found.convert(adapter, config, _tensors(adapter, weights, entries)))
    name = found.name if found is not None else "PEFT"
    return f"{name}, in {num_shards} files" if num_shards else name


def _tensors(adapter: str, path: Path, entries: Mapping[str, TensorEntry]) -> Mapping[str, np.ndarray]:
    """Map the tensors of weights that hold nothing but numbers of a factor's kind."""
    for name, entry in entries.items():
        if not entry.is_floating:
            raise CorruptAdapterError(
                adapter, f"{name} holds {entry.dtype}; an adapter's tensors hold floating-point numbers"
            )
    return map_tensors(adapter, path)


def _write(
    adapter: str, folder: Path, config: Mapping[str, Any], named: Sequence[tuple[str, np.ndarray | Computed]]
) -> None:
    tensors = dict(named)
    if len(tensors) < len(named):
        raise CorruptAdapterError(adapter, f"{folder / WEIGHTS_NAME} has two tensors for one factor of a module")
    if not tensors:
        raise CorruptAdapterError(adapter, f"{folder / WEIGHTS_NAME} holds no factors of rank 1 or more")
    num_bytes = (folder / WEIGHTS_NAME).stat().st_size
    if (converted := sum(tensor.nbytes for tensor in tensors.values())) > MAX_GROWTH * num_bytes:
        raise CorruptAdapterError(
            adapter, f"{folder / WEIGHTS_NAME} has {num_bytes} bytes, and {converted} as PEFT writes LoRA: too many"
        )
    written = folder / f"{WEIGHTS_NAME}.part"
    write_tensors(written, tensors)
    written.rename(folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps(config))
