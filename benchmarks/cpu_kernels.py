"""Compare ways to compute a layer's LoRA on a CPU: ours in LLVM's language, plain numba, and torch's products.

    python benchmarks/cpu_kernels.py --layers --json results.jsonl    # shapes of a 1B model, one slice each
    python benchmarks/cpu_kernels.py --steps --json results.jsonl     # the LoRA of a whole decoding step
    python benchmarks/cpu_kernels.py --rows                           # which ways give a row the same bits in any batch
    python benchmarks/cpu_kernels.py --table results.jsonl

It computes on one thread, and counts that thread's CPU time: it can run on a machine that does other things. The ways
take turns.

"ours" is what an engine does, "by group" what it does with large products. "bmm" pads the groups to one size and
multiplies them all in one call of torch. "numba" is the loops that one would write down, row by row; "numba by fours"
reads each weight for four rows, of which those that are missing are computed too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import frozen
from cpu_lora import MODULES
from numba import njit

from qlora_infer._vllm.kernels.cpu import lora

Run = Callable[[torch.Tensor, torch.Tensor], None]

SHAPES = ((2048, 2048), (2048, 5632), (5632, 2048))
NUM_LAYERS = {"135M": 30, "1.1B": 22}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COLUMNS = 512
#: LLVM may sum in the order that its vectors want, the same for every call of one function.
FAST = {"reassoc", "contract", "nsz"}


@frozen
class Layer:
    """A layer's stacked weights, as vLLM has them, and which slot each row of the batch uses."""

    a: tuple[torch.Tensor, ...]
    b: tuple[torch.Tensor, ...]
    slots: np.ndarray


def layer_of(
    in_size: int, out_sizes: Sequence[int], rank: int, num_adapters: int, slots: np.ndarray, dtype: torch.dtype
) -> Layer:
    """Return a layer with random weights."""
    a = tuple((torch.randn(num_adapters, 1, rank, in_size) * 0.05).to(dtype) for _ in out_sizes)
    b = tuple((torch.randn(num_adapters, 1, size, rank) * 0.05).to(dtype) for size in out_sizes)
    return Layer(a, b, slots)


def ours(layer: Layer, *, by_group: bool = False) -> Run:
    """Return what an engine calls: compiled code for small products, torch's by group for large ones."""
    wrapper = lora.GroupedPunicaWrapper(max_num_batched_tokens=512, max_batches=512, device="cpu")
    wrapper._tokens = lora.Batch.of(torch.from_numpy(layer.slots))
    a, b = layer.a, tuple(tensor.clone() for tensor in layer.b)
    sizes = tuple(tensor.shape[2] for tensor in b)
    compiled_up_to = -1 if by_group else 2**24

    def run(y: torch.Tensor, x: torch.Tensor) -> None:
        lora.ROWS_UP_TO = compiled_up_to
        wrapper.add_lora_linear(y, x, a, b, 1.0, sizes)

    return run


def by_bmm(layer: Layer) -> Run:
    """Return torch's batched product over the adapters, each with as many rows as the one that has most."""
    used, where = np.unique(layer.slots, return_inverse=True)
    most = int(np.bincount(where).max())
    table = np.zeros((len(used), most), np.int64)
    is_row = np.zeros((len(used), most), bool)
    for group in range(len(used)):
        rows = np.flatnonzero(where == group)
        table[group, : len(rows)], is_row[group, : len(rows)] = rows, True
    rows, kept, flat = torch.from_numpy(table), torch.from_numpy(is_row).flatten(), torch.from_numpy(table[is_row])
    a = [tensor[torch.from_numpy(used), 0].transpose(1, 2) for tensor in layer.a]
    b = [tensor[torch.from_numpy(used), 0].transpose(1, 2) for tensor in layer.b]

    def run(y: torch.Tensor, x: torch.Tensor) -> None:
        inputs, offset = x[rows], 0
        for left, right in zip(a, b, strict=True):
            added = torch.bmm(torch.bmm(inputs, left), right).flatten(0, 1)
            size = right.shape[-1]
            y[:, offset : offset + size].index_add_(0, flat, added if kept.all() else added[kept])
            offset += size

    return run


@cache
def numbers_of(dtype: torch.dtype) -> tuple[Any, Any]:
    """Return two functions for compiled code: from a number in memory to float32, and back."""
    if dtype == torch.float32:
        return njit(inline="always")(lambda number: number), njit(inline="always")(lambda number: number)

    @njit(inline="always")
    def read(number: Any) -> Any:
        return np.uint32(np.uint32(number) << np.uint32(16)).view(np.float32)

    @njit(inline="always")
    def rounded(number: Any) -> Any:
        word = np.float32(number).view(np.uint32)
        odd = np.uint32(word >> np.uint32(16)) & np.uint32(1)
        return np.uint16(np.uint32(word + np.uint32(0x7FFF) + odd) >> np.uint32(16))

    return read, rounded


@cache
def row_by_row(dtype: torch.dtype) -> Any:
    """Return the plain loops: a row at a time, all in float32."""
    read, rounded = numbers_of(dtype)

    @njit(fastmath=FAST, error_model="numpy")
    def dot(x: Any, a: Any) -> Any:
        total = np.float32(0)
        for i in range(len(x)):
            total += x[i] * read(a[i])
        return total

    @njit(fastmath={"contract"}, error_model="numpy")
    def add_outer(y: Any, sums: Any, b: Any, totals: Any) -> None:
        for first in range(0, len(y), COLUMNS):
            size = min(COLUMNS, len(y) - first)
            totals[:] = 0
            for r in range(len(sums)):
                for j in range(size):
                    totals[j] += sums[r] * read(b[r, first + j])
            for j in range(size):
                y[first + j] = rounded(read(y[first + j]) + totals[j])

    @njit(error_model="numpy")
    def add(y: Any, x: Any, slots: Any, a: Any, b: Any, offset: int) -> None:
        rank, out_size = b.shape[1:]
        row, sums, totals = np.empty(x.shape[1], np.float32), np.empty(rank, np.float32), np.empty(COLUMNS, np.float32)
        for i in range(len(slots)):
            slot = slots[i]
            if slot >= 0:
                for k in range(len(row)):
                    row[k] = read(x[i, k])
                for r in range(rank):
                    sums[r] = dot(row, a[slot, r])
                add_outer(y[i, offset : offset + out_size], sums, b[slot], totals)

    return add


@cache
def by_fours(dtype: torch.dtype) -> Any:
    """Return the loops over tiles of four rows of one adapter, which read each weight once for the four."""
    read, rounded = numbers_of(dtype)

    @njit(fastmath=FAST, error_model="numpy")
    def dots(x: Any, a: Any, sums: Any) -> None:
        t0, t1, t2, t3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for i in range(len(a)):
            weight = read(a[i])
            t0 += x[0, i] * weight
            t1 += x[1, i] * weight
            t2 += x[2, i] * weight
            t3 += x[3, i] * weight
        sums[0], sums[1], sums[2], sums[3] = t0, t1, t2, t3

    @njit(fastmath={"contract"}, error_model="numpy")
    def outers(sums: Any, b: Any, totals: Any, first: int, size: int) -> None:
        totals[:] = 0
        for r in range(len(sums)):
            for j in range(size):
                weight = read(b[r, first + j])
                totals[0, j] += sums[r, 0] * weight
                totals[1, j] += sums[r, 1] * weight
                totals[2, j] += sums[r, 2] * weight
                totals[3, j] += sums[r, 3] * weight

    @njit(error_model="numpy")
    def add(y: Any, x: Any, tiles: Any, a: Any, b: Any, offset: int) -> None:
        rank, out_size = b.shape[1:]
        rows, sums = np.empty((4, x.shape[1]), np.float32), np.empty((rank, 4), np.float32)
        totals = np.empty((4, COLUMNS), np.float32)
        for t in range(len(tiles)):
            slot, count = tiles[t, 0], tiles[t, 1]
            for i in range(4):
                for k in range(x.shape[1]):
                    rows[i, k] = read(x[tiles[t, 4 + i], k])
            for r in range(rank):
                dots(rows, a[slot, r], sums[r])
            for first in range(0, out_size, COLUMNS):
                size = min(COLUMNS, out_size - first)
                outers(sums, b[slot], totals, first, size)
                for i in range(count):
                    row = tiles[t, 4 + i]
                    for j in range(size):
                        at = offset + first + j
                        y[row, at] = rounded(read(y[row, at]) + totals[i, j])

    return add


def array_of(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor's memory as numba reads it: bf16 as 16 bits."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def by_numba(layer: Layer, *, fours: bool) -> Run:
    """Return the loops for a layer; the weights' second factor is laid out as ours has it."""
    dtype = layer.a[0].dtype
    add = by_fours(dtype) if fours else row_by_row(dtype)
    rows = lora.Batch.of(torch.from_numpy(layer.slots)).tiles._tiles if fours else layer.slots
    a = [array_of(tensor[:, 0].contiguous()) for tensor in layer.a]
    b = [array_of(tensor[:, 0].transpose(1, 2).contiguous()) for tensor in layer.b]
    offsets = [0, *itertools.accumulate(tensor.shape[2] for tensor in layer.b)]

    def run(y: torch.Tensor, x: torch.Tensor) -> None:
        target, source = array_of(y), array_of(x)
        for left, right, offset in zip(a, b, offsets, strict=False):
            add(target, source, rows, left, right, offset)

    return run


WAYS: dict[str, Callable[[Layer], Run]] = {
    "ours": ours,
    "by group": partial(ours, by_group=True),
    "bmm": by_bmm,
    "numba": partial(by_numba, fours=False),
    "numba by fours": partial(by_numba, fours=True),
}


def cpu_microseconds(run: Callable[[], object], number: int = 1) -> float:
    """Return the CPU time of one of some calls, which run as an engine's steps do; its weights are made outside."""
    with torch.inference_mode():
        began = time.thread_time_ns()
        for _ in range(number):
            run()
        return (time.thread_time_ns() - began) / number / 1e3


def in_turn(turn: int, names: Sequence[str]) -> list[str]:
    """Return the names from another one on in each turn: whoever is first finds the others' memory in the cache."""
    first = turn % len(names)
    return [*names[first:], *names[:first]]


def slots_of(num_rows: int, num_adapters: int) -> np.ndarray:
    """Return the slots of rows whose adapters take turns, as they do in a batch that nobody sorted."""
    return np.arange(num_rows, dtype=np.int64) % num_adapters


def cells(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the parameters of each measurement of ``--layers``."""
    batches = [(1, 1), *((rows, adapters) for rows in (16, 64) for adapters in (1, 4, 16))]
    for dtype, (in_size, out_size), rank, (num_rows, num_adapters) in itertools.product(
        arguments.dtypes, SHAPES, (8, 16, 64), batches
    ):
        yield {"dtype": dtype, "in": in_size, "out": out_size, "rank": rank, "rows": num_rows, "adapters": num_adapters}


def measure_layers(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the CPU time of a layer in each way, in each turn."""
    for cell in cells(arguments):
        dtype, slots = DTYPES[cell["dtype"]], slots_of(cell["rows"], cell["adapters"])
        layer = layer_of(cell["in"], (cell["out"],), cell["rank"], cell["adapters"], slots, dtype)
        x = torch.randn(cell["rows"], cell["in"]).to(dtype)
        y = torch.zeros(cell["rows"], cell["out"]).to(dtype)
        runs = {name: partial(make(layer), y, x) for name, make in WAYS.items()}
        number = {}
        for name, run in runs.items():
            run()
            number[name] = max(3, int(500 / cpu_microseconds(run)))  # half a millisecond a sample, or more
        for turn in range(arguments.repeats):
            for name in in_turn(turn, list(runs)):
                cpu_microseconds(runs[name])  # brings its own memory into the cache
                yield {**cell, "way": name, "turn": turn, "us": cpu_microseconds(runs[name], number[name])}


def measure_steps(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the CPU time of the LoRA of all layers of a model, in each way, in each turn.

    Every layer has weights of its own, so that few of them are in the cache when they are read.
    """
    for model, dtype, (num_rows, num_adapters), rank in itertools.product(  # bf16 is what a CPU serves
        arguments.models, ["bf16"], ((16, 1), (16, 4), (1, 1), (16, 16)), (16,)
    ):
        cell = {"model": model, "dtype": dtype, "rank": rank, "rows": num_rows, "adapters": num_adapters}
        slots, kind = slots_of(num_rows, num_adapters), DTYPES[dtype]
        runs: dict[str, list[Callable[[], None]]] = {name: [] for name in WAYS}
        for (in_size, out_sizes), _ in itertools.product(MODULES[model].values(), range(NUM_LAYERS[model])):
            layer = layer_of(in_size, out_sizes, rank, num_adapters, slots, kind)
            x, y = torch.randn(num_rows, in_size).to(kind), torch.zeros(num_rows, sum(out_sizes)).to(kind)
            for name, make in WAYS.items():
                runs[name].append(partial(make(layer), y, x))

        def step(calls: Sequence[Callable[[], None]]) -> None:
            for call in calls:
                call()

        for turn in range(arguments.repeats + 1):
            for name in in_turn(turn, list(runs)):
                spent = cpu_microseconds(partial(step, runs[name]))
                if turn:  # the first warms up
                    yield {**cell, "way": name, "turn": turn, "us": spent}


def check_rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield, for each way, how many rows got other bits in a batch than alone, and the largest error of any."""
    shapes, ranks, batches = ((2048, 2048), (5632, 2048)), (16, 64), ((3, 16, 17, 64), (1, 4, 16))
    for dtype, (in_size, out_size), rank in itertools.product(arguments.dtypes, shapes, ranks):
        kind, found = DTYPES[dtype], {name: [0, 0, 0.0] for name in WAYS}
        for num_rows, num_adapters in itertools.product(*batches):
            torch.manual_seed(0)
            slots = slots_of(num_rows, num_adapters)
            layer = layer_of(in_size, (out_size,), rank, num_adapters, slots, kind)
            x, y = torch.randn(num_rows, in_size).to(kind), torch.randn(num_rows, out_size).to(kind)
            for name, make in WAYS.items():
                together, alone = y.clone(), y.clone()
                make(layer)(together, x)
                for row in sorted({0, 1, num_rows // 2, num_rows - 1}):
                    own = slice(slots[row], slots[row] + 1)
                    a, b = layer.a[0][own], layer.b[0][own]
                    make(Layer((a,), (b,), np.zeros(1, np.int64)))(alone[row : row + 1], x[row : row + 1])
                    exact = y[row].double() + b[0, 0].double() @ (a[0, 0].double() @ x[row].double())
                    found[name][0] += not torch.equal(alone[row], together[row])
                    found[name][1] += 1
                    found[name][2] = max(found[name][2], float((together[row].double() - exact).abs().max()))
        for name, (different, total, error) in found.items():
            cell = {"dtype": dtype, "in": in_size, "out": out_size, "rank": rank, "way": name}
            yield {"check": "rows", **cell, "different": different, "rows": total, "error": error}


def print_table(path: Path) -> None:
    """Print medians and quartiles of what a run has written, and how many times ours each way takes."""
    found: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        if "us" in entry:
            key = tuple((name, value) for name, value in entry.items() if name not in ("way", "turn", "us"))
            found.setdefault(key, {}).setdefault(entry["way"], []).append(entry["us"])
    for key, ways in found.items():
        base = statistics.median(ways["ours"])
        columns = []
        for name, times in ways.items():
            low, middle, high = statistics.quantiles(times, n=4)
            columns.append(f"{name} {middle:.0f} ({low:.0f} to {high:.0f}), {middle / base:.2f}")
        print(" ".join(f"{name}={value}" for name, value in key), " | ".join(columns), sep=" | ")


def main() -> None:
    """Measure, check, or print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--rows", action="store_true")
    parser.add_argument("--layers", action="store_true")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--json", type=Path, help="append each number to this file")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--models", nargs="+", default=list(MODULES), choices=list(MODULES), help="of --steps")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    if arguments.table:
        print_table(arguments.table)
        return
    torch.set_num_threads(1)
    kinds = {measure_steps: arguments.steps, check_rows: arguments.rows, measure_layers: arguments.layers}
    chosen = [measure(arguments) for measure, is_chosen in kinds.items() if is_chosen]
    for entry in itertools.chain.from_iterable(chosen):
        line = json.dumps(entry)
        if arguments.json is None:
            print(line, flush=True)
        else:
            with arguments.json.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
