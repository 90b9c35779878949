"""MLX's LoRA: ``adapters.safetensors`` and the ``adapter_config.json`` of mlx-lm and mlx-vlm.

Read in mlx-lm of August 2026 (``tuner/lora.py``, ``tuner/utils.py``: ``LoRALinear``, ``LoRASwitchLinear``) and mlx-vlm
(``trainer/utils.py``, ``trainer/lora.py``). MLX computes ``y + scale * ((x @ lora_a) @ lora_b)``, so that A is the
transpose of ``lora_a``, B that of ``lora_b``, and alpha is scale times rank. The factors of experts are stacked:
``lora_a`` is ``[experts, rank, inputs]`` (``[experts * rank, inputs]`` before October 2025) and ``lora_b``
``[experts, outputs, rank]``; each expert gets a pair, which is not transposed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import frozen

from qlora_infer.errors import CorruptAdapterError, IncompatibleAdapterError
from qlora_infer.files.peft_config import MAX_RANK
from qlora_infer.files.safetensors import MAX_TENSORS, Computed, TensorEntry
from qlora_infer.files.snapshot import CONFIG_NAME

if TYPE_CHECKING:
    import numpy as np

# mlx-vlm's layers were of their own before 2026, and called the factors A and B.
_FACTOR = re.compile(r"(?P<module>.+)\.(?P<factor>lora_a|lora_b|m|A|B)")
_FACTORS = {"lora_a": "A", "lora_b": "B", "A": "A", "B": "B", "m": "m"}
_EMBEDDINGS = frozenset({"embed_tokens", "wte"})

#: Where mlx-lm keeps all experts of a layer in one module, and what checkpoints call the projections of Mixtral's.
_STACKED = "switch_mlp"
_OF_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}

_PREFIX = "base_model.model."


@frozen
class MLX:
    """The format of mlx-lm and mlx-vlm."""

    name: str = "MLX"

    def matches(self, config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> bool:
        """Return whether it is a config of theirs; one with ``peft_type`` is, if another program wrote it for both."""
        is_old_vlm = {"rank", "alpha"} <= config.keys() and any(name.endswith(".A") for name in tensors)
        is_new = not config.keys().isdisjoint(("fine_tune_type", "lora_parameters", "lora_layers"))
        is_pefts = "peft_type" in config and not any(name.endswith(".lora_a") for name in tensors)
        return (is_new or is_old_vlm) and not is_pefts

    def convert(
        self, adapter: str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
    ) -> tuple[Mapping[str, Any], Sequence[tuple[str, np.ndarray | Computed]]]:
        """Transpose the factors, and write each expert's by itself; ``Format`` has the arguments and errors."""
        if config.get("fine_tune_type") == "full":
            way_out = "fuse it with 'mlx_lm fuse', and serve the model as the base"
            raise IncompatibleAdapterError(adapter, [f"It is a full fine-tune of MLX's, and no adapter: {way_out}."])
        rank, scale = _parameters(adapter, config)
        factors, others = _factors(tensors)
        converted: list[tuple[str, np.ndarray | Computed]] = [(_PREFIX + name, tensors[name]) for name in others]
        has_magnitudes = False
        for module, pair in factors.items():
            converted += [(_PREFIX + name, tensor) for name, tensor in _module_tensors(adapter, module, pair, rank)]
            has_magnitudes |= "m" in pair
            if len(converted) > MAX_TENSORS:
                raise CorruptAdapterError(
                    adapter, f"its experts' factors are more than {MAX_TENSORS} tensors one by one"
                )
        model = config.get("model")
        return {
            "peft_type": "LORA",
            "base_model_name_or_path": model if isinstance(model, str) else None,
            "r": rank,
            "lora_alpha": scale * rank,
            "target_modules": sorted({name.split(".lora_")[0].rpartition(".")[2] for name, _ in converted}),
            "use_dora": has_magnitudes,
            "bias": "none",
            "task_type": "CAUSAL_LM",
        }, converted


def _parameters(adapter: str, config: Mapping[str, Any]) -> tuple[int, float]:
    """Return the rank, and the factor of the product."""
    parameters = config.get("lora_parameters")
    if parameters is None and {"rank", "alpha"} <= config.keys():
        if config["rank"] != 1:
            raise IncompatibleAdapterError(
                adapter,
                [
                    "It was trained with an old mlx-vlm. Before April 2026 it multiplied with alpha, later with alpha "
                    f"/ rank, and {CONFIG_NAME} does not say which: write the number that is right into it, as in "
                    '"lora_parameters": {"rank": 8, "scale": 2.0}.'
                ],
            )
        parameters = {"rank": config["rank"], "scale": config["alpha"]}
    if not isinstance(parameters, dict):
        raise CorruptAdapterError(adapter, f"{CONFIG_NAME} has no 'lora_parameters' with MLX's rank and scale")
    rank, scale, alpha = (parameters.get(name) for name in ("rank", "scale", "alpha"))
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise CorruptAdapterError(adapter, f"'rank' in lora_parameters must be a whole number, got {str(rank)[:40]!r}")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not abs(scale * rank) <= 1e9:
        raise CorruptAdapterError(adapter, f"'scale' in lora_parameters must be a number, got {str(scale)[:40]!r}")
    if "lora_layers" in config and alpha is not None and alpha != rank:
        raise IncompatibleAdapterError(
            adapter,
            [
                "It was trained with an old mlx-lm. Before 0.14.2 it multiplied with scale * alpha / rank, later with "
                f"scale, and {CONFIG_NAME} does not say which: remove 'alpha' from its lora_parameters, and write the "
                "number that is right as 'scale'."
            ],
        )
    return rank, float(scale)


def _factors(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, dict[str, np.ndarray]], list[str]]:
    """Put the factors of each module together; the names that are no factors' come second."""
    factors: dict[str, dict[str, np.ndarray]] = {}
    others = []
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is None or _FACTORS[match["factor"]] in factors.get(match["module"], {}):
            others.append(name)
        else:
            factors.setdefault(match["module"], {})[_FACTORS[match["factor"]]] = tensor
    return factors, others


def _module_tensors(
    adapter: str, module: str, pair: Mapping[str, np.ndarray], rank: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield a module's tensors in PEFT's form, with their names."""
    if missing := {"A", "B"} - pair.keys():
        raise CorruptAdapterError(
            adapter, f"{module} has no lora_{min(missing).lower()}: an adapter has both factors of a module"
        )
    if module.rpartition(".")[2] in _EMBEDDINGS:
        raise IncompatibleAdapterError(
            adapter,
            [
                f"It adapts {module}, which MLX also applies to the output of a model with tied embeddings, and PEFT "
                "does not: fuse it with 'mlx_lm fuse', or train it without."
            ],
        )
    a, b = pair["A"], pair["B"]
    if 0 in a.shape or 0 in b.shape:
        raise CorruptAdapterError(adapter, f"{module} has the shapes {list(a.shape)} and {list(b.shape)}")
    if b.ndim == 3:
        yield from _expert_tensors(adapter, module, a, b, rank)
        return
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != rank or b.shape[0] != rank:
        raise CorruptAdapterError(
            adapter,
            f"{module} has the shapes {list(a.shape)} and {list(b.shape)}; with rank {rank}, as in {CONFIG_NAME}, they "
            f"are [inputs, {rank}] and [{rank}, outputs]",
        )
    yield f"{module}.lora_A.weight", a.T
    yield f"{module}.lora_B.weight", b.T
    if "m" in pair:
        yield f"{module}.lora_magnitude_vector", pair["m"]


def _expert_tensors(
    adapter: str, module: str, a: np.ndarray, b: np.ndarray, rank: int
) -> Iterator[tuple[str, np.ndarray]]:
    num_experts = len(b)
    is_stacked = a.shape[:-1] in ((num_experts, rank), (num_experts * rank,))
    if not is_stacked or b.shape[2] != rank or 2 * num_experts > MAX_TENSORS:
        raise CorruptAdapterError(
            adapter,
            f"{module} has the shapes {list(a.shape)} and {list(b.shape)}; with rank {rank}, as in {CONFIG_NAME}, "
            f"those of experts are [experts, {rank}, inputs] and [experts, outputs, {rank}]",
        )
    a = a.reshape(num_experts, rank, -1)
    layer, _, projection = module.rpartition(".")
    if layer.endswith(f"block_sparse_moe.{_STACKED}"):
        projection = _OF_MIXTRAL.get(projection, projection)
    if layer.endswith(f".{_STACKED}"):
        layer = f"{layer.removesuffix(_STACKED)}experts"
    for expert in range(num_experts):
        yield f"{layer}.{expert}.{projection}.lora_A.weight", a[expert]
        yield f"{layer}.{expert}.{projection}.lora_B.weight", b[expert]
