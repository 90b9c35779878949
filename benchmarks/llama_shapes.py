"""Models with the shape of a Llama or a Phi-3, with random weights, and adapters for them."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common

from qlora_infer.testing import write_adapter

SHAPES: dict[str, dict[str, Any]] = {
    # The same sizes with Phi-3's modules: q, k and v are one in the checkpoint, and so are gate and up.
    "8B-phi3": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "original_max_position_embeddings": 8192,
        "pad_token_id": 0,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "3B": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
    },
    "1.1B": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    # For trying a benchmark out.
    "tiny-phi3": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "original_max_position_embeddings": 8192,
        "pad_token_id": 0,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
QUANTIZATIONS: dict[str, dict[str, Any] | None] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True},
            }
        },
    },
    # What llm-compressor calls FP8_DYNAMIC.
    "compressed-tensors-fp8": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
                "input_activations": {
                    "num_bits": 8,
                    "type": "float",
                    "strategy": "token",
                    "symmetric": True,
                    "dynamic": True,
                },
            }
        },
    },
    # Quantized as they load, or not at all.
    "bitsandbytes": None,
    "fp8": None,
    "none": None,
}
VOCABULARY = 49152

#: Contents of adapters that are written; others are copies with another last number, so that no two are the same.
NUM_CONTENTS = 4


@contextmanager
def model_and_adapters(
    shape: str, quantization: str, tokenizer: Path, num_adapters: int, rank: int
) -> Iterator[tuple[Path, dict[str, Path]]]:
    """Yield a model's folder and adapters that fit it.

    The folder has weights only if they are quantized as they load.
    """
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary) / "model"
        _write_config(model, shape, quantization, tokenizer)
        if QUANTIZATIONS[quantization] is None:
            _write_weights(model)
        yield model, _write_adapters(Path(temporary), model, num_adapters, rank)


def _write_config(model: Path, shape: str, quantization: str, tokenizer: Path) -> None:
    model.mkdir()
    for path in tokenizer.glob("tokenizer*"):
        shutil.copy(path, model)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float16",
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        **SHAPES[shape],
    }
    if QUANTIZATIONS[quantization]:
        config["quantization_config"] = QUANTIZATIONS[quantization]
    (model / "config.json").write_text(json.dumps(config))


def _write_weights(model: Path) -> None:
    """One layer's random weights, in every layer."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    hidden = config["hidden_size"]
    random = torch.Generator().manual_seed(0)
    drawn: dict[str, torch.Tensor] = {}
    tensors = {}
    for name, (inputs, outputs) in common.llama_modules(model).items():
        kind = name.partition(".layers.")[2].partition(".")[2]
        if kind not in drawn:
            drawn[kind] = (torch.randn(outputs, inputs, generator=random) * 0.02).half()
        tensors[f"{name}.weight"] = drawn[kind].clone()
    for layer in range(config["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(hidden).half()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = (torch.randn(VOCABULARY, hidden, generator=random) * 0.02).half()
    tensors["model.norm.weight"] = torch.ones(hidden).half()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def _write_adapters(folder: Path, model: Path, num_adapters: int, rank: int) -> dict[str, Path]:
    modules = common.llama_modules(model)
    adapters = {f"a{number}": folder / f"a{number}" for number in range(num_adapters)}
    for number, path in enumerate(adapters.values()):
        if number < NUM_CONTENTS:
            write_adapter(path, rank=rank, modules=modules, dtype="BF16", seed=number)
            continue
        shutil.copytree(folder / f"a{number % NUM_CONTENTS}", path)
        with (path / "adapter_model.safetensors").open("r+b") as file:
            file.seek(-2, 2)
            file.write(struct.pack("<H", 0x3C00 + number))  # in bfloat16 between 0.008 and 0.03
    return adapters
