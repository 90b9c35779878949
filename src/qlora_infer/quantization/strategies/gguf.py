"""GGUF: llama.cpp's files, of one quantization a file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_infer.config import EngineConfig
from qlora_infer.quantization.checkpoint import quant_method
from qlora_infer.quantization.strategy import Platform, register

#: Linear layers of the decoders that GGUF files are made of.
_LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@register
class GGUF:
    """GGUF files: ``"model.gguf"``, ``"org/model-GGUF:Q4_K_M"`` or ``"org/model-GGUF/file.gguf"``.

    vLLM gave GGUF to the package ``vllm-gguf-plugin`` in its version 0.24. The plugin reads the model's
    ``config.json`` and tokenizer from the file's folder or repository, or from those of ``tokenizer`` in
    ``engine_args``.
    """

    name = "gguf"

    def matches(self, model_config: Mapping[str, Any]) -> bool:
        """Return whether the model was named by a GGUF file."""
        return quant_method(model_config) == self.name

    def check(self, config: EngineConfig, model_config: Mapping[str, Any], platform: Platform) -> None:
        """Refuse CPUs, for which the plugin has no kernels, and GPUs before 6.0; ask for the plugin."""
        platform.require_gpu("GGUF")
        platform.require_package("vllm-gguf-plugin", "pip install vllm-gguf-plugin")
        platform.require_capability(60, "GGUF")

    def engine_args(self, config: EngineConfig, model_config: Mapping[str, Any]) -> dict[str, Any]:
        """Name the method, the loader, and the layers for adapters: vLLM cannot wrap embeddings that are packed."""
        return {"quantization": self.name, "load_format": "gguf", "lora_target_modules": [*_LINEAR_LAYERS]}
