"""The copy of an adapter under the running model's module names, for adapters that vLLM would place wrongly."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_infer.adapters.placement import Piece, Placement
from qlora_infer.files.manifest import factor_of
from qlora_infer.files.peft_config import module_alpha, plain_patterns, read_config
from qlora_infer.files.safetensors import map_tensors, write_tensors
from qlora_infer.files.snapshot import CONFIG_NAME, SERVED_NAME, WEIGHTS_NAME

if TYPE_CHECKING:
    import numpy as np


def write_served(adapter: str, folder: Path, placement: Placement) -> Path:
    """Write the copy for vLLM into a folder beside an adapter's own files.

    The factors are the adapter's, bit for bit. Those of experts that it holds in one tensor become one pair for each
    expert where the model has them one by one, and what it leaves of a layer's experts becomes zeros. ``rank_pattern``
    and ``alpha_pattern``, which are about PEFT's names, become plain names of the running model.

    Args:
        adapter: The adapter's name, for messages.
        folder: The adapter's private copy.
        placement: Where its modules go.

    Returns:
        The folder for vLLM.

    Raises:
        OSError: The disk is full.
    """
    target = folder / SERVED_NAME
    target.mkdir(exist_ok=True)
    config = read_config(adapter, folder / CONFIG_NAME)
    (target / CONFIG_NAME).write_text(json.dumps(_config(config, placement)))
    factors: dict[str, dict[str, tuple[str, np.ndarray]]] = {}
    for name, tensor in map_tensors(adapter, folder / WEIGHTS_NAME).items():
        found = factor_of(name)
        if found is not None:
            factors.setdefault(found.module, {})[found.factor] = name, tensor
    write_tensors(target / WEIGHTS_NAME, dict(_tensors(placement, factors)))
    return target


def _tensors(
    placement: Placement, factors: Mapping[str, Mapping[str, tuple[str, np.ndarray]]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each tensor of the copy with its name."""
    import numpy as np

    any_dtype = next(iter(factors.values()))["A"][1].dtype
    for name, piece in placement.pieces.items():
        rank, shape = piece.module.rank * max(1, piece.module.num_experts), piece.module
        if piece.source is None:
            a, b = np.zeros((rank, shape.in_features), any_dtype), np.zeros((shape.out_features, rank), any_dtype)
            spelling = "lora_{}.weight"
        else:
            (tensor_name, a), (_, b) = factors[piece.source]["A"], factors[piece.source]["B"]
            a, b = _cut(a, b, piece)
            spelling = "lora_embedding_{}" if ".lora_embedding_A" in tensor_name else "lora_{}.weight"
        for factor, tensor in (("A", a), ("B", b)):
            yield f"base_model.model.{name}.{spelling.format(factor)}", tensor


def _cut(a: np.ndarray, b: np.ndarray, piece: Piece) -> tuple[np.ndarray, np.ndarray]:
    """Take a piece's factors out of a module's: of one expert, and of some of its outputs.

    PEFT lays the factors of experts out as ``[experts * rank, inputs]`` and ``[outputs, rank * experts]``
    (``ParamWrapper.get_delta_weight`` in PEFT 0.21).
    """
    if piece.expert is None:
        b = b if piece.order is None else b[piece.order]
        return a, b[piece.first_output : piece.first_output + piece.module.out_features]
    rank = piece.module.rank
    of_expert = b.reshape(len(b), rank, -1)[:, :, piece.expert]
    outputs = of_expert[piece.first_output : piece.first_output + piece.module.out_features]
    return a[piece.expert * rank : (piece.expert + 1) * rank], outputs


def _config(config: Mapping[str, Any], placement: Placement) -> dict[str, Any]:
    """Rewrite the adapter's config for the running model's names."""
    named = {_pattern_name(name, piece): piece for name, piece in placement.pieces.items()}
    ranks = {name: piece.module.rank for name, piece in named.items()}
    alphas = {name: module_alpha(config, piece.source) for name, piece in named.items() if piece.source is not None}
    return {
        **config,
        "rank_pattern": plain_patterns(ranks, config["r"]),
        "alpha_pattern": plain_patterns(alphas, config["lora_alpha"]),
        "target_modules": sorted({name.rpartition(".")[2] for name in placement.pieces}),
        "target_parameters": None,
    }


def _pattern_name(name: str, piece: Piece) -> str:
    """Return the name that vLLM matches patterns with (``PEFTHelper.get_rank_and_scaling`` in 0.32.0)."""
    if not piece.module.num_experts:
        return name
    layer = name.removesuffix(".base_layer")
    return f"{layer}.down_proj" if name == layer else f"{layer}.gate_up_proj"
