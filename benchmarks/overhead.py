"""What this library costs where it has nothing to win: many requests on the base model, and on one adapter.

    python benchmarks/overhead.py

Against ``LLM.generate`` of plain vLLM with the same arguments, in pairs. On the CPU, plain vLLM's LoRA kernels are far
slower than ours; so the adapter is also compared with a plain vLLM that was given our kernels.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import common


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantization", default="awq", choices=["awq", "gptq", "bitsandbytes", "none"])
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=24, help="mean tokens of an answer")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    model = common.model_for(arguments.quantization)
    limits = {"max_loras": 4, "max_lora_rank": 8, "max_cpu_loras": 8, "max_model_len": 512}
    texts, params = common.prompts(arguments.requests), common.lengths(arguments.requests, arguments.tokens)
    with common.adapters_for(model, 1) as adapters:
        ours = common.Ours(model, arguments.quantization, adapters, enable_prefix_caching=False, **limits)
        engines = {
            "ours": ours,
            "plain": common.Plain(
                model, arguments.quantization, adapters, our_kernels=True, enable_prefix_caching=False, **limits
            ),
        }
        rows = []
        for title, name in (("base model", None), ("one adapter", "a0")):
            names = [name] * len(texts)
            runs = {key: partial(_speed, engine, texts, params, names) for key, engine in engines.items()}
            for run in runs.values():
                run()
            speed = common.in_turn(arguments.repeats, runs)
            ratio = common.ratio(speed, "ours", "plain")
            rows.append((title, *(statistics.median(speed[key]) for key in ("plain", "ours")), ratio))
        for engine in engines.values():
            engine.close()
    print(common.machine())
    print(
        f"{arguments.requests} requests, {arguments.tokens} tokens in the mean, {arguments.quantization}, "
        f"{arguments.repeats} pairs"
    )
    print(common.table(("", "plain vLLM, tokens/s", "ours, tokens/s", "ours / plain"), rows))


def _speed(engine: common.Plain | common.Ours, texts: list[str], params: list[dict], names: list[str | None]) -> float:
    return common.tokens_per_second(partial(engine.run, texts, params, names))


if __name__ == "__main__":
    main()
