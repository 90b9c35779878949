"""AWQ: 4-bit weights quantized by their activations (Lin et al., 2023, arXiv:2306.00978)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_infer.config import EngineConfig
from qlora_infer.quantization.checkpoint import quant_method, quantization_config
from qlora_infer.quantization.strategy import Platform, register, unserved


@register
class AWQ:
    """AWQ checkpoints as AutoAWQ writes them; vLLM picks the device's fastest kernel (Marlin on recent GPUs)."""

    name = "awq"

    def matches(self, model_config: Mapping[str, Any]) -> bool:
        """Return whether the checkpoint names AWQ."""
        return quant_method(model_config) == "awq"

    def check(self, config: EngineConfig, model_config: Mapping[str, Any], platform: Platform) -> None:
        """Refuse GPUs before 7.5, and other weights than those of 4 bits in the layout "gemm" (``auto_awq.py``)."""
        platform.require_capability(75, "AWQ")
        quantization = quantization_config(model_config)
        for field in ("w_bit", "bits"):
            if (bits := quantization.get(field, 4)) != 4:
                raise unserved(config.model, f"{field}={bits}", "vLLM runs AWQ with 4 bits")
        if (version := str(quantization.get("version", "gemm")).lower()) != "gemm":
            raise unserved(config.model, f"version={version!r}", "vLLM reads AWQ's layout 'gemm' only")

    def engine_args(self, config: EngineConfig, model_config: Mapping[str, Any]) -> dict[str, Any]:
        """Name the method; vLLM reads everything else from the checkpoint."""
        return {"quantization": "awq"}
