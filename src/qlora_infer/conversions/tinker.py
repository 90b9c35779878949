"""Tinker's adapters of mixtures of experts: PEFT's LoRA but for the factors of experts, which are stacked.

Read in tinker-cookbook of 2026 (``weights/_adapter.py``, ``weights/_merge.py``): ``experts.w1.lora_A.weight`` is
``[experts, rank, inputs]`` and ``lora_B`` ``[experts, outputs, rank]``. One that all experts share is ``[1, …]``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import frozen

from qlora_infer.errors import CorruptAdapterError
from qlora_infer.files.safetensors import MAX_TENSORS, Computed, TensorEntry

if TYPE_CHECKING:
    import numpy as np

_TENSOR = re.compile(r"(?P<layer>.+\.experts)\.(?P<projection>w[123])\.lora_(?P<factor>[AB])\.weight")
_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@frozen
class Tinker:
    """Tinker's form of experts."""

    name: str = "Tinker"

    def matches(self, config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> bool:
        """Return whether there are stacked factors of experts among the tensors."""
        return any(len(entry.shape) == 3 and _TENSOR.fullmatch(name) for name, entry in tensors.items())

    def convert(
        self, adapter: str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
    ) -> tuple[Mapping[str, Any], Sequence[tuple[str, np.ndarray | Computed]]]:
        """Give each expert factors of its own; ``Format`` has the arguments and errors."""
        converted: list[tuple[str, np.ndarray | Computed]] = []
        stacked: dict[tuple[str, str], dict[str, np.ndarray]] = {}
        for name, tensor in tensors.items():
            match = _TENSOR.fullmatch(name)
            if match is None:
                converted.append((name, tensor))
            else:
                stacked.setdefault((match["layer"], match["projection"]), {})[match["factor"]] = tensor
        for (layer, projection), pair in stacked.items():
            num_experts = _num_experts(adapter, f"{layer}.{projection}", pair)
            if len(converted) + 2 * num_experts > MAX_TENSORS:
                raise CorruptAdapterError(
                    adapter, f"its experts' factors are more than {MAX_TENSORS} tensors one by one"
                )
            module = _projection(layer, projection, stacked)
            for expert in range(num_experts):
                for factor, tensor in pair.items():
                    one = tensor[0 if len(tensor) == 1 else expert]
                    converted.append((f"{layer}.{expert}.{module}.lora_{factor}.weight", one))
        names = {name.partition(".lora_")[0].rpartition(".")[2] for name, _ in converted}
        return {**config, "target_modules": config.get("target_modules") or sorted(names)}, converted


def _num_experts(adapter: str, module: str, pair: Mapping[str, np.ndarray]) -> int:
    if missing := {"A", "B"} - pair.keys():
        raise CorruptAdapterError(adapter, f"{module} has no lora_{min(missing)}: an adapter has both factors")
    a, b = pair["A"].shape, pair["B"].shape
    counts = {a[0], b[0]} - {1} if a and b else {0}
    if len(a) != 3 or len(b) != 3 or a[1] != b[2] or 0 in (*a, *b) or len(counts) > 1:
        raise CorruptAdapterError(
            adapter,
            f"{module} has the shapes {list(a)} and {list(b)}; those of experts are [experts, rank, inputs] and "
            "[experts, outputs, rank]",
        )
    return max(1, *counts)


def _projection(layer: str, projection: str, stacked: Collection[tuple[str, str]]) -> str:
    """Return the checkpoint's name of a projection; experts without a gate, as Nemotron's, have no w3."""
    return _PROJECTIONS["w3" if projection == "w1" and (layer, "w3") not in stacked else projection]
