"""Measure this library's overhead where it has nothing to gain: many requests on the base model, and on one adapter.

    python benchmarks/overhead.py

Against ``LLM.generate`` of plain vLLM with the same arguments, in pairs. On the CPU, plain vLLM's LoRA kernels are far
slower than ours; so the adapter is also compared with a plain vLLM that was given our kernels.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import common


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantization", default="awq", choices=["awq", "gptq", "bitsandbytes", "none"])
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=16, help="mean tokens of an answer")
    parser.add_argument("--repeats", type=int, default=3, help="pairs for each order of starting")
    arguments = parser.parse_args()
    model = common.model_for(arguments.quantization)
    limits: dict[str, Any] = {"max_loras": 4, "max_lora_rank": 8, "max_cpu_loras": 8, "max_model_len": 512}
    limits["enable_prefix_caching"] = False
    texts, params = common.prompts(arguments.requests), common.lengths(arguments.requests, arguments.tokens)
    measured: dict[str, dict[str, list[float]]] = {}
    with common.adapters_for(model, 1) as adapters:
        start: dict[str, Callable[[], common.Plain | common.Ours]] = {
            "ours": partial(common.Ours, model, arguments.quantization, adapters, **limits),
            "plain": partial(common.Plain, model, arguments.quantization, adapters, our_kernels=True, **limits),
        }
        # Of two engines on one CPU, the first to start has been seen 1 to 2 % slower; so each is the first once.
        for names in (["ours", "plain"], ["plain", "ours"]):
            engines = {name: start[name]() for name in names}
            for title, adapter in (("base model", None), ("one adapter", "a0")):
                runs = {
                    name: partial(_speed, engine, texts, params, [adapter] * len(texts))
                    for name, engine in engines.items()
                }
                for run in runs.values():
                    run()
                for name, values in common.in_turn(arguments.repeats, runs).items():
                    measured.setdefault(title, {}).setdefault(name, []).extend(values)
            for engine in engines.values():
                engine.close()
    rows = [
        (
            title,
            *(statistics.median(speed[name]) for name in ("plain", "ours")),
            common.ratio(speed, "ours", "plain"),
            ", ".join(f"{ours / plain:.3f}" for ours, plain in zip(speed["ours"], speed["plain"], strict=True)),
        )
        for title, speed in measured.items()
    ]
    print(common.machine())
    print(
        f"{arguments.requests} requests, {arguments.tokens} tokens in the mean, {arguments.quantization}, "
        f"{2 * arguments.repeats} pairs"
    )
    print(common.table(("", "plain vLLM, tokens/s", "ours, tokens/s", "ours / plain", "pairs"), rows))


def _speed(engine: common.Plain | common.Ours, texts: list[str], params: list[dict], names: list[str | None]) -> float:
    return common.tokens_per_second(partial(engine.run, texts, params, names))


if __name__ == "__main__":
    main()
