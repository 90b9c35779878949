"""4-bit forms of a checkpoint: the one that vLLM reads, and the same weights in float32 for the reference."""

import json
import shutil
from pathlib import Path
from typing import Any

from qlora_infer.demo import _pack
from qlora_infer.demo._build import _AWQ_CONFIG, _GPTQ_CONFIG

NOT_QUANTIZED = ("embed", "lm_head", "norm")


def is_quantized(name: str, tensor: Any) -> bool:
    """Return whether a weight is that of a linear layer within the model."""
    return tensor.ndim == 2 and name.endswith(".weight") and not any(part in name for part in NOT_QUANTIZED)


def quantize(source: Path, served: Path, reference: Path, quantization: str) -> None:
    """Write both forms of the checkpoint in ``source``."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, reference)
    shutil.copytree(source, served)
    packed: dict[str, Any] = {}
    rounded: dict[str, Any] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if not is_quantized(name, weight):
            packed[name] = rounded[name] = weight
        elif quantization == "bitsandbytes":
            packed[name] = weight  # vLLM quantizes it as it loads it
            rounded[name] = nf4_round_trip(weight)
        else:
            matrix = _pack.quantize(weight.T, symmetric=quantization == "gptq")
            tensors = (_pack.pack_awq if quantization == "awq" else _pack.pack_gptq)(matrix)
            packed.update({f"{name.removesuffix('weight')}{part}": tensor for part, tensor in tensors.items()})
            rounded[name] = matrix.dequantized().T.contiguous()
    for folder, tensors in ((served, packed), (reference, rounded)):
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if quantization != "bitsandbytes":
        config = json.loads((served / "config.json").read_text())
        config["quantization_config"] = _AWQ_CONFIG if quantization == "awq" else _GPTQ_CONFIG
        (served / "config.json").write_text(json.dumps(config, indent=2))


def nf4_round_trip(weight: Any) -> Any:
    """Return what bitsandbytes makes of a weight: nf4 and back."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    quantized, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return dequantize_4bit(quantized, state).to(weight.dtype).contiguous()
