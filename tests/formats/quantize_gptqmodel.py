"""Checkpoints of GPTQModel: GPTQ and AWQ."""

from pathlib import Path
from typing import Any

from tool import calibration_texts, make


def write(config: Any, source: Path, target: Path, **options: Any) -> None:
    """Quantize and save by GPTQModel's README."""
    from gptqmodel import GPTQModel

    model = GPTQModel.load(str(source), config)
    model.quantize(calibration_texts(16, characters=1000), batch_size=1, **options)
    model.save(str(target))


def gptq(source: Path, target: Path) -> None:
    """GPTQ in groups of 64: the README's 128 do not divide the model's 576."""
    from gptqmodel import GPTQConfig

    write(GPTQConfig(bits=4, group_size=64), source, target)


def awq(source: Path, target: Path) -> None:
    """AWQ in groups of 64, packed by the kernel that needs no GPU."""
    from gptqmodel import BACKEND, AWQConfig

    write(AWQConfig(bits=4, group_size=64), source, target, backend=BACKEND.AWQ_TORCH)


def load(folder: Path) -> Any:
    """Load the checkpoint as transformers does, with a kernel of GPTQModel for the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")


if __name__ == "__main__":
    make("gptqmodel", {"gptq": (gptq, load), "awq": (awq, load)})
