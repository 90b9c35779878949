"""Speculative decoding with n-grams: tokens per second with drafts and without, for answers that repeat, and others.

    python benchmarks/drafts.py --json benchmarks/results/drafts.jsonl

Two engines answer the same requests in turn. A prompt that is repeated holds a paragraph twice and begins it anew.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import common
from runs import keep

from qlora_infer.demo import demo_adapters

DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantization", default="awq", choices=["awq", "gptq", "bitsandbytes", "none"])
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--json", type=Path, help="a file that every run is appended to")
    arguments = parser.parse_args()
    model, machine = common.model_for(arguments.quantization), common.machine()
    limits = {"max_loras": 4, "max_lora_rank": 16, "max_cpu_loras": 4, "max_model_len": 1024}
    engines = {
        name: common.Ours(model, arguments.quantization, demo_adapters(), **limits, **options)
        for name, options in {"without": {}, "with drafts": {"speculative_config": DRAFTS}}.items()
    }
    params = [{"max_tokens": arguments.tokens, "temperature": 0.0, "ignore_eos": True}] * arguments.requests
    rows = []
    for kind, texts in _prompts(arguments.requests).items():
        for adapter in (None, "pirate"):
            runs = {
                name: partial(engine.run, texts, params, [adapter] * arguments.requests)
                for name, engine in engines.items()
            }
            measured = common.in_turn(
                arguments.repeats, {name: partial(common.tokens_per_second, run) for name, run in runs.items()}
            )
            for name, speeds in measured.items():
                for pair, speed in enumerate(speeds):
                    settings = {"machine": machine, "requests": arguments.requests, "tokens": arguments.tokens}
                    run = {"prompts": kind, "adapter": adapter, "side": name, "pair": pair, "tokens_per_s": speed}
                    keep(arguments.json, {**settings, **run})
            rows.append((kind, adapter or "base", common.ratio(measured, "with drafts", "without")))
    for engine in engines.values():
        engine.close()
    print(machine)
    print(f"{arguments.requests} requests of {arguments.tokens} tokens, {arguments.repeats} pairs")
    print(common.table(("prompts", "model", "with drafts / without"), rows))


def _prompts(number: int) -> dict[str, list[str]]:
    paragraphs = [
        f"Town {index} has {100 + index} houses at the river. Its market opens at {7 + index % 4} in the morning, "
        f"and sells bread, fish and cloth. The mayor of town {index} lives beside the bridge.\n"
        for index in range(1, number + 1)
    ]
    return {"repeated": [paragraph * 3 + paragraph[:20] for paragraph in paragraphs], "free": common.prompts(number)}


if __name__ == "__main__":
    main()
