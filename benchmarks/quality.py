"""Measure the effect of quantization on the demo model's predictions, and on those of an adapter on it.

    python benchmarks/quality.py

The unquantized model, in transformers and PEFT, and each quantization read the same English prose, which Python
brings along (``pydoc_data.topics``). The demo's AWQ and GPTQ checkpoints are rounded to the nearest step and not
calibrated on texts, as real ones are: they show the formats, not the methods.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Iterator, Sequence
from pydoc_data import topics

import common

from qlora_infer import QuantizedLoRAEngine
from qlora_infer.adapters.effect import Scores, effect, reference_scores
from qlora_infer.demo import demo_adapters, demo_model

#: What can be measured, and the form of the demo model that it is made of.
QUANTIZATIONS = {"awq": "awq", "gptq": "gptq", "bitsandbytes": "none", "fp8": "none", "none": "none"}
#: What "fp8" does to linear layers, in transformers: for machines without a GPU.
EMULATED = "fp8, emulated"
LARGEST_RANK, SMALLEST_VOCABULARY = 64, 10_000
READ = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 1}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default="pirate", choices=sorted(demo_adapters()))
    parser.add_argument("--texts", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=256, help="of a text")
    parser.add_argument(
        "--quantizations", nargs="+", default=["awq", "gptq", "bitsandbytes"], choices=[*QUANTIZATIONS, EMULATED]
    )
    arguments = parser.parse_args()
    adapter = demo_adapters()[arguments.adapter]
    token_ids = read_texts(arguments.texts, arguments.tokens)
    reference = reference_scores(str(demo_model("none")), adapter, token_ids, token=None)
    rows: list[tuple[object, ...]] = [
        ("none, in transformers and PEFT", name, f"{perplexity(read):.1f}", "-", "-")
        for name, read in zip(("-", arguments.adapter), reference, strict=True)
    ]
    if EMULATED in arguments.quantizations:
        arguments.quantizations.remove(EMULATED)
        with fp8_layers():
            emulated = reference_scores(str(demo_model("none")), adapter, token_ids, token=None)
        for name, other, read in zip(("-", arguments.adapter), reference, emulated, strict=True):
            rows.append((EMULATED, name, f"{perplexity(read):.1f}", *moved(other, read)))
    for quantization in arguments.quantizations:
        model = common.model_for(QUANTIZATIONS[quantization])
        adapters = {arguments.adapter: adapter}
        with QuantizedLoRAEngine(model, quantization=quantization, adapters=adapters, max_model_len=512) as engine:
            for name, other in zip((None, arguments.adapter), reference, strict=True):
                read = scores(engine, token_ids, name)
                rows.append((quantization, name or "-", f"{perplexity(read):.1f}", *moved(other, read)))
    print(f"{arguments.texts} texts of {arguments.tokens} tokens; {common.machine()}\n")
    header = ["quantization", "adapter", "perplexity", "mean shift of a log-probability", "other most likely tokens"]
    print(common.table(header, rows))


def moved(reference: Sequence[Scores], read: Sequence[Scores]) -> tuple[object, str]:
    """Return how far a quantization moved the log-probabilities, and how often the most likely token."""
    distance = effect("", reference, read, None)
    return distance.mean_shift, f"{distance.share_changed:.0%}"


@contextlib.contextmanager
def fp8_layers() -> Iterator[None]:
    """Round what goes into linear layers to FP8 (e4m3), with a scale for each token, and weights, with one each."""
    import torch

    exact = torch.nn.Linear.forward

    def rounded(numbers: torch.Tensor, dim: tuple[int, ...]) -> torch.Tensor:
        scale = numbers.abs().amax(dim=dim, keepdim=True).clamp(min=1e-12) / 448
        return (numbers / scale).to(torch.float8_e4m3fn).to(numbers.dtype) * scale

    def forward(self: torch.nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
        if min(self.weight.shape) <= LARGEST_RANK or max(self.weight.shape) >= SMALLEST_VOCABULARY:
            return exact(self, inputs)  # LoRA's factors, and the output layer
        weight = rounded(self.weight.data, dim=(0, 1))
        return torch.nn.functional.linear(rounded(inputs, dim=(-1,)), weight, self.bias)

    torch.nn.Linear.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Linear.forward = exact  # type: ignore[method-assign]


def read_texts(number: int, num_tokens: int) -> list[list[int]]:
    """Return the beginnings of so many of the longer texts, as token ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model("none"))
    longest = sorted(topics.topics.values(), key=len, reverse=True)[:number]
    return [tokenizer(text)["input_ids"][:num_tokens] for text in longest]


def scores(engine: QuantizedLoRAEngine, token_ids: list[list[int]], adapter: str | None) -> list[Scores]:
    """Score the texts with the model, with or without an adapter."""
    outputs = engine.generate(token_ids, READ, adapter=adapter, use_tqdm=False)
    return [Scores.read(output.prompt_token_ids, output.prompt_logprobs or ()) for output in outputs]


def perplexity(scores: Sequence[Scores]) -> float:
    """Over all tokens of all texts but each text's first."""
    logprobs = [logprob for text in scores for logprob in text.logprobs]
    return math.exp(-math.fsum(logprobs) / len(logprobs))


if __name__ == "__main__":
    main()
