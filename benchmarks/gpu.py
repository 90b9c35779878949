"""On a GPU: many adapters on few slots, against plain vLLM on the same settings, and against the original example's.

    python benchmarks/gpu.py

Models have the shape of a Llama and random weights, for speed does not depend on them. The same requests run in plain
vLLM and in ours, in turn. Rows are printed as they come, and runs kept as lines of JSON (--json), so that what is
cut off gives what it has. benchmarks/gpu_session.sh runs the parts one after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import common
import load_pause
import runs
from llama_shapes import QUANTIZATIONS, SHAPES, model_and_adapters
from runs import Cell, Comparison, Timed

#: What is asked of the original example's settings, which are slow.
EXAMPLE_CELLS = [Cell(1, 1), Cell(1, 64), Cell(4, 64), Cell(32, 128)]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="a model's folder, to read it from; the demo model's by default")
    parser.add_argument("--shape", default="8B", choices=SHAPES)
    parser.add_argument("--quantization", default="gptq", choices=QUANTIZATIONS)
    parser.add_argument("--adapters", type=int, nargs="+", default=[0, 1, 8, 32], help="how many; 0 is the base model")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 64, 512])
    parser.add_argument(
        "--orders", nargs="+", metavar="ORDER", help="only rows of these orders, as the table names them"
    )
    parser.add_argument("--against", nargs="+", default=["plain"], choices=["plain", "example", "ours"])
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--seqs", type=int, default=64, help="max_num_seqs")
    parser.add_argument("--tokens", type=int, default=64, help="of a prompt, and of an answer")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2, help="pairs of runs")
    parser.add_argument("--minutes", type=float, default=8, help="after which no row is begun")
    parser.add_argument("--json", type=Path, help="a file that every run is appended to")
    parser.add_argument("--startup", default="fast", choices=["fast", "compiled"], help="of ours")
    parser.add_argument(
        "--kernels", default="auto", choices=["auto", "vllm"], help="of ours, also where it is compared"
    )
    parser.add_argument(
        "--ours-args", type=json.loads, default={}, metavar="JSON", help="vLLM's arguments, of ours only"
    )
    parser.add_argument("--ours-env", nargs="*", default=[], metavar="NAME=VALUE", help="of ours only")
    parser.add_argument("--memory", type=float, default=0.35, help="gpu_memory_utilization of each side")
    parser.add_argument(
        "--device", default="cuda", choices=["cuda", "cpu"], help="cpu to try it out, and to count steps"
    )
    parser.add_argument("--pause", action="store_true", help="instead: what others feel while adapters are loaded")
    parsed = parser.parse_args(arguments)
    parsed.num_adapters = max(parsed.adapters)
    if "example" in parsed.against:
        parsed.num_adapters = max(parsed.num_adapters, *(cell.num_adapters for cell in EXAMPLE_CELLS))
    return parsed


def main() -> None:
    """Print the tables."""
    arguments = parse()
    deadline = time.monotonic() + 60 * arguments.minutes
    common.set_environment(arguments.device)
    tokenizer = arguments.tokenizer or common.model_for("none")
    print(f"{common.machine()}; {title(arguments)}", flush=True)
    sizes = arguments.num_adapters, arguments.rank
    with model_and_adapters(arguments.shape, arguments.quantization, tokenizer, *sizes) as made:
        if arguments.pause:
            measure_pause(*made, arguments)
        else:
            measure(*made, arguments, deadline)


def title(arguments: argparse.Namespace) -> str:
    """Describe the measurement in a title."""
    changed = {**arguments.ours_args, **dict(pair.split("=", 1) for pair in arguments.ours_env)}
    return (
        f"{arguments.shape} {arguments.quantization}, rank {arguments.rank}, {arguments.slots} slots, max_num_seqs "
        f"{arguments.seqs}, prompts and answers of {arguments.tokens} tokens, startup={arguments.startup}, "
        f"lora_kernels={arguments.kernels}, {arguments.repeats} pairs" + (f", ours with {changed}" if changed else "")
    )


def limits(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the engine arguments of both sides."""
    given = {
        "max_loras": arguments.slots,
        "max_lora_rank": arguments.rank,
        "max_cpu_loras": arguments.num_adapters + arguments.slots,
        "max_model_len": 4 * arguments.tokens,
        "max_num_seqs": arguments.seqs,
        "enable_prefix_caching": False,
    }
    if arguments.device == "cuda":
        given["gpu_memory_utilization"] = arguments.memory
    return given if QUANTIZATIONS[arguments.quantization] is None else {**given, "load_format": "dummy"}


def start(
    side: str, model: Path, adapters: Mapping[str, Path], arguments: argparse.Namespace
) -> common.Plain | common.Ours:
    """Start one side: "plain", "example", "ours", or "changed", which is ours with what only it is given."""
    given, quantization = limits(arguments), arguments.quantization
    if side == "plain":
        # As ours starts, so that only this library differs.
        given = common.compiled_as_ours(given, arguments.device, arguments.startup, common.num_parameters(model))
        return common.Plain(model, quantization, adapters, disable_log_stats=False, **given)
    if side == "example":
        del given["max_cpu_loras"]
        given |= {"max_loras": 4, "enforce_eager": True}
        return common.Plain(model, quantization, adapters, disable_log_stats=False, **given)
    if side == "changed":
        given |= arguments.ours_args
    asked = "auto" if QUANTIZATIONS[quantization] else quantization
    return common.Ours(model, asked, {}, startup=arguments.startup, lora_kernels=arguments.kernels, **given)


def measure(model: Path, adapters: Mapping[str, Path], arguments: argparse.Namespace, deadline: float) -> None:
    """Ours is started once; each that it is compared with is started, compared and closed."""
    settings = {name: getattr(arguments, name) for name in ("shape", "quantization", "rank", "slots", "seqs", "tokens")}
    settings |= {name: getattr(arguments, name) for name in ("startup", "kernels", "ours_args", "ours_env")}
    settings["machine"] = common.machine()
    is_changed = bool(arguments.ours_args or arguments.ours_env)
    right = "ours, changed" if "ours" in arguments.against else "ours"
    with contextlib.ExitStack() as stack:
        with environment(arguments.ours_env):
            ours = started("changed" if is_changed else "ours", model, adapters, arguments)
        stack.callback(ours.close)
        load_all(ours, adapters, arguments.json, settings)
        timed = Timed(ours, arguments.tokens, prompts)
        for against in arguments.against:
            if time.monotonic() > deadline:
                print(f"left out for lack of time: {against}", flush=True)
                break
            with contextlib.ExitStack() as turn:
                other = started(against, model, adapters, arguments)
                turn.callback(other.close)
                if against == "ours":
                    load_all(other, adapters, None, settings)
                left = against, Timed(other, arguments.tokens, prompts)
                kept = settings | {"against": against}
                compare(Comparison(left, (right, timed), arguments.repeats, deadline, kept, arguments.json), arguments)


def compare(comparison: Comparison, arguments: argparse.Namespace) -> None:
    """Warm both sides up, and print the tables."""
    is_example = comparison.left[0] == "example"
    cells = EXAMPLE_CELLS if is_example else planned(arguments)
    most = max(cell.num_adapters for cell in cells)
    for _, side in (comparison.left, comparison.right):
        # Kernels are compiled when they are met; and every adapter comes into host memory.
        for cell in (Cell(0, 1), Cell(0, 2 * arguments.seqs), Cell(1, 1), Cell(1, 2 * arguments.seqs)):
            side.run(cell, num_tokens=16)
        side.run(Cell(most, max(most, 2 * arguments.seqs)), num_tokens=16)
    comparison.measure(cells)
    if most >= 2 * arguments.slots and not is_example and time.monotonic() < comparison.deadline:
        print_swaps(comparison, [f"a{number}" for number in range(most)][: 4 * arguments.slots])


def planned(arguments: argparse.Namespace) -> list[Cell]:
    """Return the requested rows."""
    cells = list(runs.plan(arguments.adapters, arguments.requests, arguments.slots))
    if not arguments.orders:
        return cells
    chosen = [cell for cell in cells if cell.title in arguments.orders]
    if not chosen:
        raise SystemExit(f"--orders: none of {arguments.orders} is among {sorted({cell.title for cell in cells})}")
    return chosen


def print_swaps(comparison: Comparison, names: list[str]) -> None:
    """Print how long an adapter takes to reach a slot."""
    sides = dict((comparison.left, comparison.right))
    found = {name: side.swaps(names) for name, side in sides.items()}
    for name, times in found.items():
        runs.keep(comparison.path, {**comparison.settings, "side": name, "swap_ms": times})
    rows = [(f"adapter {where}", *(times[where] for times in found.values())) for where in next(iter(found.values()))]
    print("\n" + common.table(("a request of one token, ms", *found), rows), flush=True)


def load_all(ours: Any, adapters: Mapping[str, Path], path: Path | None, settings: Mapping[str, Any]) -> None:
    """``load_adapter`` for each: copied, digested, checked, read, and moved into a slot once."""
    times = []
    for name, folder in adapters.items():
        began = time.monotonic()
        ours.engine.load_adapter(name, folder)
        times.append(1e3 * (time.monotonic() - began))
    if times:
        print(f"load_adapter: {statistics.median(times):.0f} ms in the median of {len(times)}", flush=True)
        runs.keep(path, {**settings, "side": "ours", "load_adapter_ms": statistics.median(times)})


def started(side: str, *arguments: Any) -> Any:
    """Start a side, and say how long it took."""
    began = time.monotonic()
    engine = start(side, *arguments)
    print(f"started {side} in {time.monotonic() - began:.0f} s", flush=True)
    return engine


@contextlib.contextmanager
def environment(pairs: Sequence[str]) -> Iterator[None]:
    """Set environment variables, which the processes of an engine take over when they start."""
    before = dict(os.environ)
    os.environ.update(pair.split("=", 1) for pair in pairs)
    try:
        yield
    finally:
        for name in {pair.split("=", 1)[0] for pair in pairs}:
            os.environ.pop(name)
            os.environ.update({name: before[name]} if name in before else {})


def prompts(number: int, num_tokens: int) -> list[list[int]]:
    """Random token ids."""
    generator = random.Random(0)
    return [[generator.randrange(1000, 20_000) for _ in range(num_tokens)] for _ in range(number)]


def measure_pause(model: Path, adapters: Mapping[str, Path], arguments: argparse.Namespace) -> None:
    """Print the table of load_pause.py."""
    arguments.slots = 1
    given = {**limits(arguments), "max_model_len": 8192}
    given_plain = common.compiled_as_ours(given, arguments.device, num_parameters=common.num_parameters(model))
    plain = common.Plain(model, arguments.quantization, adapters, **given_plain)
    ours = common.Ours(model, arguments.quantization, {}, **given)
    sides: dict[str, load_pause.Side] = {
        "plain vLLM": load_pause.PlainSide(plain),
        "ours": load_pause.OurSide(ours, dict(adapters)),
    }
    settings = {name: getattr(arguments, name) for name in ("shape", "quantization", "rank")}
    settings |= {"streams": arguments.seqs // 2, "machine": common.machine()}
    table = load_pause.measure(sides, list(adapters), arguments.seqs // 2, arguments.repeats, settings, arguments.json)
    for side in sides.values():
        side.close()
    print(f"{arguments.seqs // 2} streams\n{table}")


if __name__ == "__main__":
    main()
