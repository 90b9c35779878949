"""The copy of an adapter under the running model's module names, for adapters that vLLM would place wrongly."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_infer.adapters.placement import Piece, Placement
from qlora_infer.basewise.conversion import Conversion
from qlora_infer.files.manifest import factor_of, magnitude_of
from qlora_infer.files.peft_config import module_alpha, plain_patterns, read_config
from qlora_infer.files.safetensors import Computed, map_tensors, write_tensors
from qlora_infer.files.snapshot import BIASES_NAME, CONFIG_NAME, MAGNITUDES_NAME, SERVED_NAME, WEIGHTS_NAME

if TYPE_CHECKING:
    import numpy as np

    Factor = np.ndarray | Computed

_PREFIX = "base_model.model."
#: What stands behind a module's name.
_LINEAR, _EMBEDDING = ".lora_{}.weight", ".lora_embedding_{}"


def write_served(
    adapter: str,
    folder: Path,
    placement: Placement,
    conversion: Conversion | None = None,
    *,
    target: Path | None = None,
) -> Path:
    """Write the copy for vLLM, by default into a folder beside an adapter's own files.

    The factors are the adapter's, bit for bit, or made by a conversion. Those of experts that it holds in one tensor
    become one pair for each expert where the model has them one by one, and what it leaves of a layer's experts becomes
    zeros. ``rank_pattern`` and ``alpha_pattern``, which are about PEFT's names, become plain names of the running
    model. DoRA's magnitudes and biases, which vLLM refuses, are in files of their own.

    Args:
        adapter: The adapter's name, for messages.
        folder: The adapter's private copy.
        placement: Where its modules go.
        conversion: The factors that the rest of it becomes.
        target: The folder for the copy.

    Returns:
        The folder for vLLM.

    Raises:
        OSError: The disk is full.
    """
    target = target or folder / SERVED_NAME
    target.mkdir(exist_ok=True)
    conversion = conversion or Conversion()
    config = conversion.config(read_config(adapter, folder / CONFIG_NAME))
    (target / CONFIG_NAME).write_text(json.dumps(_config(config, placement, conversion)))
    factors: dict[str, dict[str, tuple[str, Factor]]] = {}
    turned: dict[str, dict[str, tuple[str, Factor]]] = {}
    magnitudes: dict[str, np.ndarray] = {}
    for name, tensor in map_tensors(adapter, folder / WEIGHTS_NAME).items():
        found, module = factor_of(name), magnitude_of(name)
        if found is not None:
            factors.setdefault(found.module, {})[found.factor] = name, tensor
        elif module is not None:
            magnitudes[module] = tensor
    for module, (a, b) in conversion.factors(folder):
        is_embedding = module in conversion.rows and not conversion.rows[module].is_output
        names = map((_EMBEDDING if is_embedding else _LINEAR).format, "AB")
        factors[module] = dict(zip("AB", zip(names, (a, b), strict=True), strict=True))
    for piece in placement.pieces.values():
        if piece.is_transposed and piece.source in factors:
            turned[piece.source] = _turned(factors.pop(piece.source), piece.module.rank)
    write_tensors(target / WEIGHTS_NAME, dict(_tensors(placement, {**factors, **turned})))
    vectors = {MAGNITUDES_NAME: magnitudes if config.get("use_dora") else {}, BIASES_NAME: conversion.shifts(folder)}
    for file, of_modules in vectors.items():
        own = {name: piece for name, piece in placement.pieces.items() if piece.source in of_modules}
        if own:
            write_tensors(
                target / file, {name: _outputs(of_modules[str(piece.source)], piece) for name, piece in own.items()}
            )
    return target


def _turned(pair: Mapping[str, tuple[str, Factor]], rank: int) -> dict[str, tuple[str, Factor]]:
    """Return the factors of the transposed weights of all experts, in PEFT's layout: B's are A's."""
    (name, a), (_, b) = pair["A"], pair["B"]
    assert not isinstance(a, Computed)
    assert not isinstance(b, Computed)
    of_b = b.reshape(len(b), rank, -1).transpose(2, 1, 0).reshape(-1, len(b))
    of_a = a.reshape(-1, rank, a.shape[1]).transpose(2, 1, 0).reshape(a.shape[1], -1)
    return {"A": (name, of_b), "B": (name, of_a)}


def _tensors(
    placement: Placement, factors: Mapping[str, Mapping[str, tuple[str, Factor]]]
) -> Iterator[tuple[str, Computed]]:
    """Yield each tensor of the copy with its name."""
    import numpy as np

    any_dtype = _dtype_of(next(iter(factors.values()))["A"][1])
    for name, piece in placement.pieces.items():
        shape = piece.module
        rank = shape.rank * max(1, shape.num_experts)
        shapes = {"A": (rank, shape.in_features), "B": (shape.out_features, rank)}
        for factor, cut in (("A", _cut_a), ("B", _cut_b)):
            spelling, dtype, compute = _LINEAR, any_dtype, partial(np.zeros, shapes[factor], any_dtype)
            if piece.source is not None:
                tensor_name, tensor = factors[piece.source][factor]
                spelling = _EMBEDDING if ".lora_embedding_" in tensor_name else _LINEAR
                dtype, compute = _dtype_of(tensor), partial(_computed, cut, tensor, piece)
            yield _PREFIX + name + spelling.format(factor), Computed(shapes[factor], compute, dtype)


def _dtype_of(tensor: Factor) -> str:
    return tensor.dtype if isinstance(tensor, Computed) else tensor.dtype.str


def _computed(cut: Callable[[np.ndarray, Piece], np.ndarray], tensor: Factor, piece: Piece) -> np.ndarray:
    return cut(tensor.compute() if isinstance(tensor, Computed) else tensor, piece)


def _cut_a(a: np.ndarray, piece: Piece) -> np.ndarray:
    """Take a piece's factor A out of a module's: that of one expert."""
    if piece.expert is None:
        return a
    rank = piece.module.rank
    return a[piece.expert * rank : (piece.expert + 1) * rank]


def _cut_b(b: np.ndarray, piece: Piece) -> np.ndarray:
    """Take a piece's factor B out of a module's: of one expert, and of some of its outputs.

    PEFT lays the factors of experts out as ``[experts * rank, inputs]`` and ``[outputs, rank * experts]``
    (``ParamWrapper.get_delta_weight`` in PEFT 0.21).
    """
    if piece.expert is not None:
        b = b.reshape(len(b), piece.module.rank, -1)[:, :, piece.expert]
    return _outputs(b, piece)


def _outputs(of_module: np.ndarray, piece: Piece) -> np.ndarray:
    """Take a piece's outputs out of a module's, in the model's order."""
    ordered = of_module if piece.expert is not None or piece.order is None else of_module[piece.order]
    return ordered[piece.first_output : piece.first_output + piece.module.out_features]


def _config(config: Mapping[str, Any], placement: Placement, conversion: Conversion) -> dict[str, Any]:
    """Rewrite the adapter's config for the running model's names."""
    named = {_pattern_name(name, piece): piece for name, piece in placement.pieces.items()}
    ranks = {name: piece.module.rank for name, piece in named.items()}
    alphas = {name: _alpha(config, piece, conversion) for name, piece in named.items() if piece.source is not None}
    return {
        **config,
        "rank_pattern": plain_patterns(ranks, config["r"]),
        "alpha_pattern": plain_patterns(alphas, config["lora_alpha"]),
        "target_modules": sorted({name.rpartition(".")[2] for name in placement.pieces}),
        "target_parameters": None,
        "use_dora": False,
    }


def _alpha(config: Mapping[str, Any], piece: Piece, conversion: Conversion) -> float:
    """Return a module's alpha; rows of the base model's are scaled by 1."""
    assert piece.source is not None
    if piece.source not in conversion.rows:
        return module_alpha(config, piece.source)
    return math.sqrt(piece.module.rank) if config.get("use_rslora") else piece.module.rank


def _pattern_name(name: str, piece: Piece) -> str:
    """Return the name that vLLM matches patterns with (``PEFTHelper.get_rank_and_scaling`` in 0.32.0)."""
    if not piece.module.num_experts:
        return name
    layer = name.removesuffix(".base_layer")
    return f"{layer}.down_proj" if name == layer else f"{layer}.gate_up_proj"
