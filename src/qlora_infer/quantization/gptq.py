"""GPTQ: 4- and 8-bit weights quantized by second-order information (Frantar et al., 2022, arXiv:2210.17323)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_infer.config import EngineConfig
from qlora_infer.quantization._base import Platform, quant_method, register


@register
class GPTQ:
    """GPTQ checkpoints; vLLM picks the fastest kernel that the device has (Marlin on recent GPUs)."""

    name = "gptq"

    def matches(self, model_config: Mapping[str, Any]) -> bool:
        """Whether ``config.json`` names GPTQ."""
        return quant_method(model_config) == "gptq"

    def check(self, config: EngineConfig, model_config: Mapping[str, Any], platform: Platform) -> None:
        """A GPU must be of compute capability 6.0 (vLLM 0.32, ``auto_gptq.py``)."""
        platform.require_capability(60, "GPTQ")

    def engine_args(self, config: EngineConfig, model_config: Mapping[str, Any]) -> dict[str, Any]:
        """GPTQ is read from the checkpoint itself."""
        return {"quantization": "gptq"}
