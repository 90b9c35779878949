"""One request of a rare adapter behind 200 of a busy one, with one slot: when does it start, and what does it cost?

    python benchmarks/starvation.py --json runs.jsonl

The place is the request's among all 201 by the time of its first token.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import common
from runs import keep


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantization", default="awq", choices=["awq", "gptq", "bitsandbytes", "none"])
    parser.add_argument("--busy", type=int, default=200)
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--seqs", type=int, default=16, help="max_num_seqs")
    parser.add_argument("--tokens", type=int, default=24, help="mean tokens of an answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="a file that every run is appended to")
    arguments = parser.parse_args()
    settings = {name: getattr(arguments, name) for name in ("quantization", "busy", "slots", "seqs", "tokens")}
    settings["machine"] = common.machine()
    model = common.model_for(arguments.quantization)
    limits = {
        "max_loras": arguments.slots,
        "max_lora_rank": 8,
        "max_cpu_loras": 4,
        "max_model_len": 512,
        "max_num_seqs": arguments.seqs,
        "enable_prefix_caching": False,
    }
    number = arguments.busy + 1
    texts, params = common.prompts(number), common.lengths(number, arguments.tokens)
    names = ["a0"] * arguments.busy + ["a1"]
    rows = []
    with common.adapters_for(model, 2) as adapters:
        engines: dict[str, common.Plain | common.Ours] = {
            "plain vLLM, our kernels": common.Plain(
                model, arguments.quantization, adapters, our_kernels=True, disable_log_stats=False, **limits
            ),
            "ours": common.Ours(model, arguments.quantization, adapters, **limits),
        }
        measured: dict[str, list[tuple[int, float, float]]] = {name: [] for name in engines}
        for repeat in range(arguments.repeats):
            for name, engine in list(engines.items())[:: 1 if repeat % 2 == 0 else -1]:
                measured[name].append(run := _measure(engine, texts, params, names))
                found = dict(zip(("place", "first_token_s", "seconds"), run, strict=True))
                keep(arguments.json, {**settings, "side": name, "pair": repeat, **found})
        for engine in engines.values():
            engine.close()
    for name, runs in measured.items():
        places, first_tokens, totals = zip(*runs, strict=True)
        rows.append((name, statistics.median(places), statistics.median(first_tokens), statistics.median(totals)))
    print(common.machine())
    print(
        f"{arguments.busy} + 1 requests, {arguments.slots} slots, max_num_seqs {arguments.seqs}, "
        f"{arguments.tokens} tokens in the mean, {arguments.quantization}, {arguments.repeats} pairs"
    )
    print(common.table(("", f"place among {number}", "its time to first token, s", "all of them, s"), rows))


def _measure(engine: Any, texts: list[str], params: list[dict], names: list[str]) -> tuple[int, float, float]:
    began = time.monotonic()
    outputs = engine.run(texts, params, names)
    seconds = time.monotonic() - began
    first_tokens = [_first_token(output) for output in outputs]
    return sorted(first_tokens).index(first_tokens[-1]) + 1, first_tokens[-1] - began, seconds


def _first_token(output: Any) -> float:
    """Return when the first token came, on the monotonic clock, which is the same in every process."""
    return output.times.first_token if hasattr(output, "times") else output.metrics.first_token_ts


if __name__ == "__main__":
    main()
