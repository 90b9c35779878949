"""FP8: weights of 8 bits in floating point (Micikevicius et al., 2022, arXiv:2209.05433)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_infer.config import EngineConfig
from qlora_infer.quantization.checkpoint import quant_method, quantization_config
from qlora_infer.quantization.strategy import Platform, register, unserved


@register
class FP8:
    """FP8 checkpoints, and by name unquantized ones, whose weights are cast as they load.

    From compute capability 8.9 on a GPU computes in FP8, too; older ones keep activations in 16 bits.
    """

    name = "fp8"

    def matches(self, model_config: Mapping[str, Any]) -> bool:
        """Return whether the checkpoint names FP8, or no quantization at all."""
        return quant_method(model_config) in (None, self.name)

    def check(self, config: EngineConfig, model_config: Mapping[str, Any], platform: Platform) -> None:
        """Refuse CPUs, GPUs before 7.5, and blocks of weights without scales found as it runs (``fp8.py``)."""
        platform.require_gpu("FP8")
        platform.require_capability(75, "FP8")
        quantization = quantization_config(model_config)
        if quantization.get("weight_block_size") and quantization.get("activation_scheme") != "dynamic":
            says = f"weight_block_size with activation_scheme={quantization.get('activation_scheme')!r}"
            raise unserved(config.model, says, "vLLM runs blocks with the scheme 'dynamic' only")

    def engine_args(self, config: EngineConfig, model_config: Mapping[str, Any]) -> dict[str, Any]:
        """Name vLLM's method: that of checkpoints, or the one that casts weights."""
        return {"quantization": self.name if quant_method(model_config) else "fp8_per_tensor"}
