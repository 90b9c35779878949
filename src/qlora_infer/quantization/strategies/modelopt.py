"""ModelOpt: NVIDIA's FP8 and NVFP4 checkpoints (https://github.com/NVIDIA/Model-Optimizer)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_infer.config import EngineConfig
from qlora_infer.quantization.checkpoint import quant_method, quantization_config
from qlora_infer.quantization.strategy import Platform, register, unserved

#: ModelOpt's names for what vLLM 0.32 runs, and vLLM's method for each (``LINEAR_ALGOS`` in ``modelopt.py``).
_METHODS = {
    "FP8": "modelopt",
    "FP8_PER_CHANNEL_PER_TOKEN": "modelopt",
    "FP8_PB_WO": "modelopt",
    "NVFP4": "modelopt_fp4",
    "W4A16_NVFP4": "modelopt_fp4",
    "MXFP8": "modelopt_mxfp8",
    "MIXED_PRECISION": "modelopt_mixed",
}


@register
class ModelOpt:
    """ModelOpt checkpoints in FP8, NVFP4 and MXFP8; NVFP4 computes with 4 bits from compute capability 10.0 on."""

    name = "modelopt"

    def matches(self, model_config: Mapping[str, Any]) -> bool:
        """Return whether the checkpoint names ModelOpt, which wrote ``hf_quant_config.json`` before it wrote there."""
        return (quant_method(model_config) or "").startswith(self.name)

    def check(self, config: EngineConfig, model_config: Mapping[str, Any], platform: Platform) -> None:
        """Refuse CPUs, GPUs before 8.0, and algorithms that vLLM 0.32 does not run."""
        platform.require_gpu("ModelOpt")
        platform.require_capability(80, "ModelOpt")
        algorithm = _algorithm(quantization_config(model_config))
        if algorithm and algorithm not in _METHODS:
            raise unserved(config.model, f"quant_algo={algorithm!r}", f"vLLM runs {', '.join(_METHODS)}")

    def engine_args(self, config: EngineConfig, model_config: Mapping[str, Any]) -> dict[str, Any]:
        """Name vLLM's method for the algorithm."""
        return {"quantization": _METHODS.get(_algorithm(quantization_config(model_config)), self.name)}


def _algorithm(quantization: Mapping[str, Any]) -> str:
    """Return the algorithm, which has a section of its own in ``hf_quant_config.json``."""
    section = quantization.get("quantization")
    fields = section if isinstance(section, Mapping) else quantization
    return str(fields.get("quant_algo") or "").upper()
