"""Compare two ways to serve a 16-bit checkpoint on a GPU: as it is, or quantized as it loads.

    python benchmarks/sixteen_bits.py --json runs.jsonl

One model of random weights, for each of bitsandbytes, fp8 and none: seconds to start, memory, tokens per second with
and without adapters. All engines run side by side, and are measured in turn. What each does to the answers is
quality.py's, with the demo model.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import common
import runs
from gpu import prompts
from llama_shapes import SHAPES, model_and_adapters
from runs import Cell, Timed

WAYS = ("none", "fp8", "bitsandbytes")
CELLS = (Cell(0, 1), Cell(0, 64), Cell(8, 1), Cell(8, 64))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8B", choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=64, help="of a prompt, and of an answer")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="a file that every run is appended to")
    arguments = parser.parse_args()
    tokenizer = common.model_for("none")
    with model_and_adapters(arguments.shape, "none", tokenizer, 8, arguments.rank) as made:
        measure(*made, arguments)


def measure(model: Path, adapters: dict[str, Path], arguments: argparse.Namespace) -> None:
    """Start all ways, and run each cell in all of them, in turn."""
    settings = {"machine": common.machine(), "shape": arguments.shape, "tokens": arguments.tokens}
    rows: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        sides = {}
        for way in WAYS:
            before, began = used_gib(), time.monotonic()
            engine = common.Ours(
                model,
                way,
                adapters,
                max_loras=8,
                max_lora_rank=arguments.rank,
                max_cpu_loras=16,
                max_model_len=4 * arguments.tokens,
                max_num_seqs=64,
                enable_prefix_caching=False,
                kv_cache_memory_bytes=4 << 30,
                gpu_memory_utilization=0.25,  # asked of the whole GPU before the first engine starts
            )
            stack.callback(engine.close)
            rows[way] = {"start_s": time.monotonic() - began, "memory_gib": used_gib() - before - 4.0}
            print(f"{way}: {rows[way]}", flush=True)
            sides[way] = Timed(engine, arguments.tokens, prompts)
        speeds: dict[tuple[str, Cell], list[float]] = {(way, cell): [] for cell in CELLS for way in WAYS}
        for side in sides.values():
            for cell in CELLS:
                side.run(cell)  # warms up
        for repeat in range(arguments.repeats):
            for cell in CELLS:
                for way in WAYS if repeat % 2 else reversed(WAYS):
                    run = sides[way].run(cell)
                    speeds[way, cell].append(run.tokens_per_second)
                    kept = {"way": way, "adapters": cell.num_adapters, "requests": cell.num_requests}
                    runs.keep(
                        arguments.json, {**settings, **kept, **rows[way], "tokens_per_second": run.tokens_per_second}
                    )
    medians = {key: statistics.median(values) for key, values in speeds.items()}
    print(f"\n{settings['machine']}; {arguments.shape}, rank {arguments.rank}, {arguments.repeats} rounds\n")
    header = ["16 bits, served as", "start, s", "memory beside the KV cache, GiB"]
    header += [f"tokens/s, {cell.num_adapters} adapters, {cell.num_requests} requests" for cell in CELLS]
    table = [
        (way, f"{row['start_s']:.0f}", f"{row['memory_gib']:.1f}", *(f"{medians[way, cell]:.0f}" for cell in CELLS))
        for way, row in rows.items()
    ]
    print(common.table(header, table))


def used_gib() -> float:
    """Return the memory of the first GPU that is in use, whoever uses it."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id", _gpu()]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1024


def _gpu() -> str:
    import os

    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]


if __name__ == "__main__":
    main()
