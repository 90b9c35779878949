"""compressed-tensors: llm-compressor's format, for weights of 4 and 8 bits, with activations of 16 bits or of 8.

Repositories that are called "-AWQ-4bit" or "-W4A16" hold it today, and FP8 models of several makers. The format is
documented with its package, https://github.com/vllm-project/compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qlora_infer.config import EngineConfig
from qlora_infer.quantization.checkpoint import quant_method, quantization_config
from qlora_infer.quantization.strategy import Platform, register, unserved


@register
class CompressedTensors:
    """compressed-tensors checkpoints: integer weights (W4A16, W8A16), int8 (W8A8), FP8 and NVFP4."""

    name = "compressed-tensors"

    def matches(self, model_config: Mapping[str, Any]) -> bool:
        """Return whether the checkpoint names compressed-tensors."""
        return quant_method(model_config) == self.name

    def check(self, config: EngineConfig, model_config: Mapping[str, Any], platform: Platform) -> None:
        """Refuse forms that vLLM 0.32 dropped (``compressed_tensors.py``), and on a CPU all but W4A16."""
        platform.require_capability(75, self.name)
        quantization = quantization_config(model_config)
        if (quantization.get("sparsity_config") or {}).get("targets"):
            raise unserved(config.model, "sparsity_config", "vLLM runs sparse weights no more")
        for weights, activations in _groups(quantization):
            if weights.get("actorder") in ("group", "dynamic"):
                says = f"actorder={weights['actorder']!r}"
                raise unserved(config.model, says, "vLLM runs activation orders in groups no more")
            if (scheme := scheme_of(weights, activations)) != "W4A16":
                platform.require_gpu(f"compressed-tensors {scheme}")

    def engine_args(self, config: EngineConfig, model_config: Mapping[str, Any]) -> dict[str, Any]:
        """Name the method; vLLM reads everything else from the checkpoint."""
        return {"quantization": self.name}


def scheme_of(weights: Mapping[str, Any], activations: Mapping[str, Any]) -> str:
    """Return the name that a scheme has on the Hub.

    Args:
        weights: How the weights are quantized (``QuantizationArgs`` of compressed-tensors).
        activations: The same of a layer's inputs; empty for those of 16 bits.

    Example:
        >>> scheme_of({"type": "int", "num_bits": 4}, {})
        'W4A16'
    """
    bits = weights.get("num_bits", 8)
    if weights.get("type") == "float":
        return "FP8" if bits == 8 else "NVFP4" if weights.get("group_size") == 16 else "MXFP4"
    return f"W{bits}A{activations.get('num_bits', 8) if activations else 16}"


def _groups(quantization: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Yield how the weights and the inputs of each group of layers are quantized."""
    for group in (quantization.get("config_groups") or {}).values():
        if group.get("weights"):
            yield group["weights"], group.get("input_activations") or {}
