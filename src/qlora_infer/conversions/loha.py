"""LoHa, of PEFT 0.21's ``tuners/loha``: the product, number by number, of two products of rank r.

``(W1a W1b) * (W2a W2b)`` is a product of rank r * r: of the products of each column of W1a with each of W2a, and of
each row of W1b with each of W2b (the Khatri-Rao product).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from attrs import frozen

from qlora_infer.config import ALLOWED_RANKS
from qlora_infer.conversions.parts import parts_of_modules
from qlora_infer.errors import CorruptAdapterError, IncompatibleAdapterError
from qlora_infer.files.peft_config import (
    largest_rank,
    module_alpha,
    module_rank,
    pattern_name,
    plain_patterns,
    with_plain_names,
)
from qlora_infer.files.safetensors import Computed, TensorEntry, as_floats
from qlora_infer.files.snapshot import CONFIG_NAME

if TYPE_CHECKING:
    import numpy as np

_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.hada_(?P<part>w[12]_[ab])")
_PARTS = frozenset({"w1_a", "w1_b", "w2_a", "w2_b"})

#: The fields of LoHaConfig that LoraConfig does not have.
_FIELDS = ("alpha", "init_weights", "module_dropout", "rank_dropout", "use_effective_conv2d")


@frozen
class LoHa:
    """PEFT's LoHa."""

    name: str = "LoHa"

    def matches(self, config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> bool:
        """Return whether PEFT would read it as LoHa."""
        return str(config.get("peft_type", "")).upper() == "LOHA"

    def convert(
        self, adapter: str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
    ) -> tuple[Mapping[str, Any], Sequence[tuple[str, np.ndarray | Computed]]]:
        """Multiply columns with columns, and rows with rows; ``Format`` has the arguments and errors."""
        plain = {name: value for name, value in config.items() if name not in _FIELDS}
        plain = {**plain, "peft_type": "LORA", "lora_alpha": config.get("alpha"), "use_rslora": False}
        largest_rank(adapter, plain)
        modules, others = parts_of_modules(_TENSOR, tensors)
        converted: list[tuple[str, np.ndarray | Computed]] = list(others)
        resolved = with_plain_names(adapter, plain, modules)
        ranks, alphas = {}, {}
        for module, parts in modules.items():
            rank = module_rank(resolved, module)
            _check(adapter, module, parts, rank)
            name = pattern_name({}, module)
            ranks[name], alphas[name] = rank**2, module_alpha(resolved, module) * rank
            down = Computed((rank**2, parts["w1_b"].shape[1]), partial(_rows, parts["w1_b"], parts["w2_b"]))
            up = Computed((len(parts["w1_a"]), rank**2), partial(_columns, parts["w1_a"], parts["w2_a"]))
            prefix = f"base_model.model.{module}.lora_"
            converted += [(f"{prefix}A.weight", down), (f"{prefix}B.weight", up)]
        rank, alpha = plain["r"] ** 2, plain["lora_alpha"] * plain["r"]
        return {
            **plain,
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": plain_patterns(ranks, rank),
            "alpha_pattern": plain_patterns(alphas, alpha),
        }, converted


def _check(adapter: str, module: str, parts: Mapping[str, np.ndarray], rank: int) -> None:
    if missing := _PARTS - parts.keys():
        raise CorruptAdapterError(adapter, f"{module} has no hada_{min(missing)}: LoHa has four factors of a module")
    (one, two, three, four) = (parts[part].shape for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
    is_whole = len(one) == len(two) == 2 and one == three and two == four and 0 not in (*one, *two)
    if not is_whole or one[1] != rank or two[0] != rank:
        raise CorruptAdapterError(
            adapter,
            f"{module} has the shapes {list(one)}, {list(two)}, {list(three)} and {list(four)}; with rank {rank}, as "
            f"in {CONFIG_NAME}, they are [outputs, {rank}] and [{rank}, inputs], twice",
        )
    if rank**2 > ALLOWED_RANKS[-1]:
        raise IncompatibleAdapterError(
            adapter,
            [
                f"It is a LoHa adapter of rank {rank}, which as a LoRA has rank {rank**2}, and vLLM serves ranks up to "
                f"{ALLOWED_RANKS[-1]}: PEFT's peft.save_as_lora(folder, model, rank=...) makes a LoRA that is near."
            ],
        )


def _rows(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    product: np.ndarray = as_floats(one)[:, None] * as_floats(two)[None]
    return product.reshape(-1, one.shape[1])


def _columns(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    product: np.ndarray = as_floats(one)[:, :, None] * as_floats(two)[:, None]
    return product.reshape(len(one), -1)
