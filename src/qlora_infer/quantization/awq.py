"""AWQ: 4-bit weights quantized by their activations (Lin et al., 2023, arXiv:2306.00978)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_infer.config import EngineConfig
from qlora_infer.quantization._base import Platform, quant_method, register


@register
class AWQ:
    """AWQ checkpoints; vLLM picks the fastest kernel that the device has (Marlin on recent GPUs)."""

    name = "awq"

    def matches(self, model_config: Mapping[str, Any]) -> bool:
        """Whether ``config.json`` names AWQ."""
        return quant_method(model_config) == "awq"

    def check(self, config: EngineConfig, model_config: Mapping[str, Any], platform: Platform) -> None:
        """A GPU must be of compute capability 7.5 (vLLM 0.32, ``auto_awq.py``)."""
        platform.require_capability(75, "AWQ")

    def engine_args(self, config: EngineConfig, model_config: Mapping[str, Any]) -> dict[str, Any]:
        """AWQ is read from the checkpoint itself."""
        return {"quantization": "awq"}
