"""No quantization: the checkpoint's own 16 or 32 bits, for an exact answer or a GPU with memory to spare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_infer.config import EngineConfig
from qlora_infer.quantization.checkpoint import quant_method
from qlora_infer.quantization.strategy import Platform, register


@register
class Unquantized:
    """Unquantized checkpoints, served as they are; choose it by name, because ``"auto"`` takes bitsandbytes."""

    name = "none"

    def matches(self, model_config: Mapping[str, Any]) -> bool:
        """Return whether the checkpoint names no quantization."""
        return quant_method(model_config) is None

    def check(self, config: EngineConfig, model_config: Mapping[str, Any], platform: Platform) -> None:
        """Need nothing beyond vLLM."""

    def engine_args(self, config: EngineConfig, model_config: Mapping[str, Any]) -> dict[str, Any]:
        """Return no arguments: vLLM reads the dtype from the checkpoint."""
        return {}
