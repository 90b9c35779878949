"""AdaLoRA (``tuners/adalora`` in PEFT 0.21): a LoRA with singular values E for the rows of A, and ranks of its own.

``SVDLinear`` adds ``B (A * E) * alpha / (init_r + 1e-5)``. Only the rows that ``rank_pattern`` keeps are saved.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from attrs import frozen

from qlora_infer.conversions.parts import parts_of_modules
from qlora_infer.errors import CorruptAdapterError
from qlora_infer.files.peft_config import MAX_RANK, pattern_name, plain_patterns
from qlora_infer.files.safetensors import Computed, TensorEntry, as_floats
from qlora_infer.files.snapshot import CONFIG_NAME

if TYPE_CHECKING:
    import numpy as np

_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<part>[ABE])")

#: The fields of AdaLoraConfig that LoraConfig does not have.
_FIELDS = ("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")

# PEFT's defaults.
_INIT_R = 12
_ALPHA = 8


@frozen
class AdaLoRA:
    """PEFT's AdaLoRA."""

    name: str = "AdaLoRA"

    def matches(self, config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> bool:
        """Return whether PEFT would read it as AdaLoRA."""
        return str(config.get("peft_type", "")).upper() == "ADALORA"

    def convert(
        self, adapter: str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
    ) -> tuple[Mapping[str, Any], Sequence[tuple[str, np.ndarray | Computed]]]:
        """Multiply the rows of A with the singular values; ``Format`` has the arguments and errors."""
        init_r = config.get("init_r", _INIT_R)
        alpha = config.get("lora_alpha", _ALPHA)
        if isinstance(init_r, bool) or not isinstance(init_r, int) or not 0 <= init_r <= MAX_RANK:
            raise CorruptAdapterError(adapter, f"'init_r' must be a whole number, got {str(init_r)[:40]!r}")
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) <= 1e9:
            raise CorruptAdapterError(adapter, f"'lora_alpha' must be a finite number, got {str(alpha)[:40]!r}")
        modules, others = parts_of_modules(_TENSOR, tensors)
        converted: list[tuple[str, np.ndarray | Computed]] = list(others)
        kept = _ranks(adapter, config)
        ranks = {}
        for module, parts in modules.items():
            rank = kept.get(module, init_r)
            _check(adapter, module, parts, rank)
            if rank == 0:  # nothing is left of it
                continue
            ranks[pattern_name({}, module)] = rank
            # LoRA's scale is alpha / rank. Where alpha is not above 0, PEFT has the module's rank in its place.
            factor = rank / (init_r + 1e-5) * (1 if alpha > 0 else rank)
            a, e = parts["A"], parts["E"]
            scaled = Computed(a.shape, partial(_scaled, a, e, factor))
            prefix = f"base_model.model.{module}.lora_"
            converted += [(f"{prefix}A.weight", scaled), (f"{prefix}B.weight", parts["B"])]
        default = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
        return {
            **{name: value for name, value in config.items() if name not in _FIELDS},
            "peft_type": "LORA",
            "r": default,
            "lora_alpha": alpha if alpha > 0 else 1,
            "rank_pattern": plain_patterns(ranks, default),
            "alpha_pattern": {},
            "use_rslora": False,  # PEFT looks at neither here
        }, converted


def _ranks(adapter: str, config: Mapping[str, Any]) -> Mapping[str, int]:
    """Return how many rows are kept of the modules that ``rank_pattern`` names, with a list of booleans for each."""
    patterns = config.get("rank_pattern") or {}
    ranks = {}
    for name, kept in patterns.items() if isinstance(patterns, dict) else [(patterns, None)]:
        if not isinstance(kept, list) or not all(isinstance(row, (bool, int)) and row in (0, 1) for row in kept):
            raise CorruptAdapterError(
                adapter, f"'rank_pattern' of AdaLoRA maps modules to lists of true and false, got {str(name)[:80]!r}"
            )
        ranks[name.partition(".lora_E")[0]] = sum(kept)
    return ranks


def _check(adapter: str, module: str, parts: Mapping[str, np.ndarray], rank: int) -> None:
    if missing := {"A", "B", "E"} - parts.keys():
        raise CorruptAdapterError(adapter, f"{module} has no lora_{min(missing)}: AdaLoRA has lora_A, _B and _E")
    a, b, e = (parts[part].shape for part in "ABE")
    if len(a) != 2 or len(b) != 2 or (a[0], b[1], e) != (rank, rank, (rank, 1)) or (rank and 0 in (*a, *b)):
        raise CorruptAdapterError(
            adapter,
            f"{module} has the shapes {list(a)}, {list(b)} and {list(e)}; with rank {rank}, as in {CONFIG_NAME}, they "
            f"are [{rank}, inputs], [outputs, {rank}] and [{rank}, 1]",
        )


def _scaled(a: np.ndarray, e: np.ndarray, factor: float) -> np.ndarray:
    scaled: np.ndarray = as_floats(a) * as_floats(e) * factor
    return scaled
