"""Checkpoints of bitsandbytes, quantized and saved by transformers: nf4, the nf4 of QLoRA, and int8."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tool import make


def quantize(**fields: Any) -> Callable[[Path, Path], None]:
    """Return a function that writes a checkpoint by transformers' guide."""

    def write(source: Path, target: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

        dtypes = {"bnb_4bit_compute_dtype": torch.bfloat16} if "load_in_4bit" in fields else {}
        config = BitsAndBytesConfig(**fields, **dtypes)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, quantization_config=config)
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(source).save_pretrained(target)

    return write


def load(folder: Path) -> Any:
    """Load the checkpoint, whose linear layers compute with bitsandbytes."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


if __name__ == "__main__":
    make(
        "bitsandbytes",
        {
            "nf4": (quantize(load_in_4bit=True, bnb_4bit_quant_type="nf4"), load),
            "nf4_double": (
                quantize(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
                load,
            ),
            "int8": (quantize(load_in_8bit=True), load),
        },
    )
