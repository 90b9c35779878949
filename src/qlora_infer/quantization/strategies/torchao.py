"""torchao: PyTorch's own quantizations (https://github.com/pytorch/ao)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_infer.config import EngineConfig
from qlora_infer.quantization.checkpoint import quant_method
from qlora_infer.quantization.strategy import Platform, register


@register
class TorchAO:
    """torchao checkpoints, as transformers' ``TorchAoConfig`` saves them."""

    name = "torchao"

    def matches(self, model_config: Mapping[str, Any]) -> bool:
        """Return whether the checkpoint names torchao."""
        return quant_method(model_config) == self.name

    def check(self, config: EngineConfig, model_config: Mapping[str, Any], platform: Platform) -> None:
        """Ask for the package, and refuse GPUs before 7.5 (vLLM 0.32, ``torchao.py``)."""
        platform.require_package("torchao", "pip install torchao")
        platform.require_capability(75, "torchao")

    def engine_args(self, config: EngineConfig, model_config: Mapping[str, Any]) -> dict[str, Any]:
        """Name the method; vLLM reads everything else from the checkpoint."""
        return {"quantization": self.name}
