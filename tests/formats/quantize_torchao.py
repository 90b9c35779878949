"""Checkpoints of torchao, quantized and saved by transformers: 8 bits and 4 bits, weights only."""

from pathlib import Path
from typing import Any

from tool import make


def write(quant_type: Any, source: Path, target: Path) -> None:
    """Quantize and save by transformers' guide."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

    config = TorchAoConfig(quant_type)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, quantization_config=config)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


def int8(source: Path, target: Path) -> None:
    """Eight-bit weights, a scale a row."""
    from torchao.quantization import Int8WeightOnlyConfig

    write(Int8WeightOnlyConfig(), source, target)


def int8_activations(source: Path, target: Path) -> None:
    """Eight-bit weights and activations."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    write(Int8DynamicActivationInt8WeightConfig(), source, target)


def int4(source: Path, target: Path) -> None:
    """Four-bit weights as GPUs compute with, in groups of 64: 128 does not divide the model's 576."""
    import torch
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    config = Int4WeightOnlyConfig(group_size=64)
    # Transformers does not pass on why a device cannot do it.
    quantize_(torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False)).bfloat16(), config)
    write(config, source, target)


def intx4(source: Path, target: Path) -> None:
    """Four-bit weights in integers of eight bits, for other devices."""
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    write(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(64)), source, target)


def load(folder: Path) -> Any:
    """Load the checkpoint, whose linear layers compute with torchao."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


if __name__ == "__main__":
    writers = {"int8": int8, "int8_activations": int8_activations, "int4": int4, "intx4": intx4}
    make("torchao", {name: (write_format, load) for name, write_format in writers.items()})
