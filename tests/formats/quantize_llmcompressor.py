"""Checkpoints of llm-compressor, by its README: compressed-tensors with 4-bit weights, int8 and FP8."""

from pathlib import Path
from typing import Any

from tool import calibration_texts, make


def one_shot(recipe: Any, source: Path, target: Path, *, calibrated: bool = True) -> None:
    """Quantize as llm-compressor's examples do, with texts of ours in place of a dataset of the Hub."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = [tokenizer(text, truncation=True, max_length=256) for text in calibration_texts(16)]
    data = {"dataset": Dataset.from_list([dict(row) for row in texts]), "num_calibration_samples": 16}
    oneshot(model=model, recipe=recipe, **({"max_seq_length": 256, **data} if calibrated else {}))
    model.save_pretrained(target, save_compressed=True)
    tokenizer.save_pretrained(target)


def w4a16(source: Path, target: Path) -> None:
    """Four-bit weights by GPTQ: the scheme W4A16 with groups of 64, since its 128 do not divide the model's 576."""
    from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
    from llmcompressor.modifiers.quantization import GPTQModifier

    scheme: QuantizationScheme = preset_name_to_scheme("W4A16", ["Linear"])
    scheme.weights.group_size = 64
    one_shot(GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]), source, target)


def w8a8(source: Path, target: Path) -> None:
    """Eight-bit integers, weights and activations."""
    from llmcompressor.modifiers.quantization import GPTQModifier

    one_shot(GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"]), source, target)


def fp8(source: Path, target: Path) -> None:
    """FP8 weights by channel, FP8 activations by token."""
    from llmcompressor.modifiers.quantization import QuantizationModifier

    recipe = QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"])
    one_shot(recipe, source, target, calibrated=False)


def load(folder: Path) -> Any:
    """Load the weights dequantized, activations rounded as the checkpoint says."""
    import torch
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=CompressedTensorsConfig(run_compressed=False)
    )


if __name__ == "__main__":
    make("llmcompressor", {"w4a16": (w4a16, load), "w8a8": (w8a8, load), "fp8_dynamic": (fp8, load)})
