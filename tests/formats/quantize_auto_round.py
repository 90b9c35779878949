"""Checkpoints of AutoRound in the three formats that it exports 4-bit weights to."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tool import calibration_texts, make


def quantize(export: str, *, iterations: int = 0) -> Callable[[Path, Path], None]:
    """Return a function that writes a checkpoint by AutoRound's README, in groups of 64: 128 does not divide 576.

    AutoRound's default, 200 iterations with 128 texts of 2048 tokens, takes hours on two cores. Without iterations it
    rounds to nearest, which changes values, not the format.
    """

    def write(source: Path, target: Path) -> None:
        from auto_round import AutoRound
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(source)
        tuned = AutoRound(
            AutoModelForCausalLM.from_pretrained(source, dtype="auto"),
            tokenizer,
            scheme="W4A16",
            group_size=64,
            dataset=[tokenizer(text, return_tensors="pt").input_ids[:, :256] for text in calibration_texts(16)],
            nsamples=16,
            seqlen=256,
            iters=iterations,
            disable_opt_rtn=True,
            enable_torch_compile=False,
        )
        tuned.quantize_and_save(output_dir=str(target), format=export)
        (written,) = target.iterdir()  # it is named after the model and the scheme
        for path in written.iterdir():
            path.rename(target / path.name)
        written.rmdir()

    return write


def load(folder: Path) -> Any:
    """Load the checkpoint with AutoRound's or GPTQModel's layers, and put the matrix that each computes in its place.

    PEFT does not know AutoRound's layers. What one makes of the unit matrix is its dequantized weight.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    for name, layer in list(model.named_modules()):
        if name.endswith("_proj"):
            columns = getattr(layer, "infeatures", None) or layer.in_features  # AutoRound's and GPTQModel's name
            dtype = next(tensor.dtype for tensor in layer.state_dict().values() if tensor.is_floating_point())
            with torch.no_grad():
                weight = layer(torch.eye(columns, dtype=dtype)).T.float().contiguous()
            linear = torch.nn.Linear(*reversed(weight.shape), bias=False)
            linear.weight = torch.nn.Parameter(weight, requires_grad=False)
            model.set_submodule(name, linear)
    return torch.nn.Module.float(model)  # transformers' own refuses, because the model was quantized


if __name__ == "__main__":
    make(
        "auto-round",
        {
            "auto_round": (quantize("auto_round", iterations=5), load),
            "auto_gptq": (quantize("auto_gptq"), load),
            "auto_awq": (quantize("auto_awq"), load),
        },
    )
