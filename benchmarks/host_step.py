"""Measure the host's cost of a step, in ours and in plain vLLM: an executor that computes nothing replaces the model.

    python benchmarks/host_step.py

A small model on a GPU waits for its host, whose moments hide differences of some percent. Here a step is 1 ms of the
host and 2 of a device (``emulated_executor.py``), so that a CPU will do, and what is left is vLLM's scheduler, its
processes and their messages, and what this library adds. Two cores that nobody else wants.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import common
import runs
from gpu import prompts
from runs import Comparison, Timed

from qlora_infer.demo import demo_adapters


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, nargs="+", default=[0, 1], choices=[0, 1], help="0 is the base model")
    parser.add_argument("--requests", type=int, nargs="+", default=[512, 64])
    parser.add_argument("--seqs", type=int, default=64, help="max_num_seqs")
    parser.add_argument("--tokens", type=int, default=64, help="of a prompt, and of an answer")
    parser.add_argument("--repeats", type=int, default=8, help="pairs of runs")
    parser.add_argument("--json", type=Path, help="a file that every run is appended to")
    arguments = parser.parse_args()
    common.set_environment("cpu")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # nothing is computed, and threads of torch would be in the way
    model, adapters = common.model_for("awq"), {"a0": next(iter(demo_adapters().values()))}
    given = {
        "max_loras": 8,
        "max_lora_rank": 16,
        "max_cpu_loras": 16,
        "max_model_len": 4 * arguments.tokens,
        "max_num_seqs": arguments.seqs,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 2 << 30,
        "distributed_executor_backend": "emulated_executor.EmulatedExecutor",
    }
    ours = common.Ours(model, "awq", adapters, **given)
    plain = common.Plain(model, "awq", adapters, disable_log_stats=False, **given)
    sides = {name: Timed(side, arguments.tokens, prompts) for name, side in (("plain", plain), ("ours", ours))}
    cells = list(runs.plan(arguments.adapters, arguments.requests, slots=8))
    for side in sides.values():
        for cell in cells:
            side.run(cell)
    print(f"{common.machine()}; max_num_seqs {arguments.seqs}, prompts and answers of {arguments.tokens} tokens")
    left, right = sides.items()
    Comparison(left, right, arguments.repeats, time.monotonic() + 3600, {}, arguments.json).measure(cells)
    for engine in (plain, ours):
        engine.close()


if __name__ == "__main__":
    main()
