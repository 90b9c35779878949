"""AutoRound: integer weights whose rounding was learned (Cheng et al., 2023, arXiv:2309.05516)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_infer.config import EngineConfig
from qlora_infer.quantization.checkpoint import quant_method, quantization_config
from qlora_infer.quantization.strategy import Platform, register, unserved


@register
class AutoRound:
    """Checkpoints in AutoRound's own format; those that it exports for GPTQ or AWQ name these."""

    name = "auto-round"

    def matches(self, model_config: Mapping[str, Any]) -> bool:
        """Return whether the checkpoint names AutoRound."""
        return quant_method(model_config) == self.name

    def check(self, config: EngineConfig, model_config: Mapping[str, Any], platform: Platform) -> None:
        """Refuse forms that vLLM 0.32 cannot run (``inc/schemes/inc_wna16_scheme.py``); a CPU has one, for 4 bits."""
        platform.require_capability(75, "AutoRound")
        quantization = quantization_config(model_config)
        bits, packing = quantization.get("bits", 4), quantization.get("packing_format", "auto_round:auto_gptq")
        is_integer = quantization.get("data_type", "int") == "int"
        if is_integer and "gptq" in packing and quantization.get("sym") is False:
            raise unserved(config.model, "sym=False", "vLLM runs symmetric weights only in the packing 'auto_gptq'")
        if is_integer and "awq" in packing and bits != 4:
            raise unserved(config.model, f"bits={bits}", "vLLM runs the packing 'auto_awq' with 4 bits")
        if not is_integer or bits != 4:
            platform.require_gpu(f"AutoRound with {bits} bits ({quantization.get('data_type', 'int')})")

    def engine_args(self, config: EngineConfig, model_config: Mapping[str, Any]) -> dict[str, Any]:
        """Name vLLM's method, which is called after Intel's Neural Compressor."""
        return {"quantization": "inc"}
