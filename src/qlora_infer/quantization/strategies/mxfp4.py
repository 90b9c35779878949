"""MXFP4: gpt-oss' experts, 4 bits in floating point with a scale for each 32 (OCP Microscaling Formats, 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_infer.config import EngineConfig
from qlora_infer.quantization.checkpoint import quant_method
from qlora_infer.quantization.strategy import Platform, register


@register
class MXFP4:
    """MXFP4 checkpoints: experts have 4 bits, all other layers 16."""

    name = "mxfp4"

    def matches(self, model_config: Mapping[str, Any]) -> bool:
        """Return whether the checkpoint names MXFP4."""
        return quant_method(model_config) == self.name

    def check(self, config: EngineConfig, model_config: Mapping[str, Any], platform: Platform) -> None:
        """Refuse CPUs, and GPUs before 8.0 (vLLM 0.32, ``mxfp4.py``)."""
        platform.require_gpu("MXFP4")
        platform.require_capability(80, "MXFP4")

    def engine_args(self, config: EngineConfig, model_config: Mapping[str, Any]) -> dict[str, Any]:
        """Name the method; vLLM has one of its own for gpt-oss, which it finds itself."""
        return {"quantization": self.name}
