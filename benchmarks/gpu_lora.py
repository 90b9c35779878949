"""LoRA's own work on a GPU: the modules of one step of a model with Llama's shape, in one CUDA graph.

    python benchmarks/gpu_lora.py            # ours beside vLLM's kernels, and the floor: the adapters' bytes
    python benchmarks/gpu_lora.py --tune     # ours with other settings, without vLLM

Weights are random and distinct in each of 32 layers, so that they come from memory as they do in a model.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from qlora_infer._vllm.kernels.cuda import fused
from qlora_infer._vllm.kernels.cuda.fused import Batch, Module, Scratch, Settings

#: The linear modules of a layer of Llama-3 8B: inputs, and the outputs of each slice.
MODULES = {
    "qkv_proj": (4096, (4096, 1024, 1024)),
    "o_proj": (4096, (4096,)),
    "gate_up_proj": (4096, (14336, 14336)),
    "down_proj": (14336, (4096,)),
}
SLOTS = 8
#: Processes that compile for each rank.
NUM_JOBS = 7
#: What a large copy reaches, bytes a second, by the GPU's name.
BANDWIDTH = {"H100": 3.0e12, "H200": 4.3e12}


class Step:
    """The LoRA work of one step."""

    def __init__(self, rank: int, *, layers: int, dtype: torch.dtype = torch.float16) -> None:
        """Draw the weights."""
        self.rank = rank
        self.weights = []
        for _ in range(layers):
            for num_inputs, sizes in MODULES.values():
                a = tuple(_random(SLOTS, 1, rank, num_inputs, dtype=dtype) for _ in sizes)
                b = tuple(_random(SLOTS, 1, size, rank, dtype=dtype) for size in sizes)
                self.weights.append((Module.of(a, b), a, b))
        self.dtype = dtype

    def rows(self, num_rows: int, num_adapters: int) -> None:
        """Make a batch of so many rows, whose adapters take turns."""
        self.slots = (np.arange(num_rows) % num_adapters).astype(np.int32)
        self.batch = Batch(num_rows, SLOTS, "cuda")
        self.batch.update(self.slots)
        self.scratch = Scratch(num_rows, SLOTS, self.rank, max(len(sizes) for _, sizes in MODULES.values()), "cuda")
        self.inputs = {k: torch.randn(num_rows, k, device="cuda", dtype=self.dtype) for k, _ in MODULES.values()}
        self.outputs = {
            sizes: torch.randn(num_rows, sum(sizes), device="cuda", dtype=self.dtype) for _, sizes in MODULES.values()
        }

    def ours(self, settings: Settings | None = None) -> None:
        """Run every module with our kernels."""
        for module, _, _ in self.weights:
            x, y = self.inputs[module.num_inputs], self.outputs[module.sizes]
            fused.add_lora(y, x, module, self.batch, self.scratch, pdl=True, settings=settings)

    def vllms(self, meta: Any) -> None:
        """Run every module with vLLM's kernels."""
        from vllm.lora.ops.triton_ops import lora_expand, lora_shrink

        for module, a, b in self.weights:
            x, y = self.inputs[module.num_inputs], self.outputs[module.sizes]
            buffer = torch.empty((len(a), len(x), self.rank), dtype=torch.float32, device="cuda")
            lora_shrink(x, a, buffer, *meta.meta_args(len(x), False), 1.0)
            lora_expand(buffer, b, y, *meta.meta_args(len(x), False), offset_start=0, add_inputs=True)

    def error(self, settings: Settings | None = None) -> float:
        """Return the largest relative error of a layer's four modules against float64."""
        worst = 0.0
        for module, a, b in self.weights[:4]:
            x = self.inputs[module.num_inputs]
            y = torch.randn_like(self.outputs[module.sizes])
            expected = y.double()
            pieces = list(expected.split(module.sizes, dim=1))
            for slot in range(SLOTS):
                rows = torch.from_numpy(np.flatnonzero(self.slots == slot)).cuda()
                for piece, a_piece, b_piece in zip(pieces, a, b, strict=True):
                    piece[rows] += x[rows].double() @ a_piece[slot, 0].double().T @ b_piece[slot, 0].double().T
            base = y.double()
            fused.add_lora(y, x, module, self.batch, self.scratch, pdl=True, settings=settings)
            delta = expected - base
            worst = max(worst, float((y.double() - expected).norm() / delta.norm()))
        return worst

    def tried(self, settings: Settings) -> str:
        """Cells of a table: the time, and the error; or what does not fit."""
        try:
            error = self.error(settings)
            ms = graph_ms(partial(self.ours, settings))
        except Exception as fault:  # a setting that does not fit is a result
            return f"{str(fault)[:80]!r} | "
        return f"{ms:.3f} | {error:.1e}"

    def free(self) -> None:
        """Give the weights' memory back."""
        self.weights.clear()
        torch.cuda.empty_cache()

    def floor(self, num_adapters: int) -> float:
        """Milliseconds to read the adapters' weights once."""
        name = torch.cuda.get_device_name()
        bandwidth = next((value for key, value in BANDWIDTH.items() if key in name), 3e12)
        numbers = sum(t.numel() for _, a, b in self.weights for t in (*a, *b)) * num_adapters / SLOTS
        return numbers * 2 / bandwidth * 1e3


def _random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype) * 0.02


def graph_ms(work: Callable[[], None], repeats: int = 20) -> float:
    """Milliseconds of a replay of what ``work`` launches, the median."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def host_us(work: Callable[[], None]) -> float:
    """Microseconds that the host takes to launch ``work``, the median."""
    times = []
    for _ in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e6


def candidates(num_rows: int, rank: int) -> list[Settings]:
    """Return settings to try for steps of so many rows."""
    if num_rows > 512:
        large = partial(Settings, block_m=64, inputs=1 << 20, block_k=64)
        return [large(block_n=n, warps=warps, stages=4) for n, warps in ((128, 4), (256, 4), (256, 8))]
    if num_rows > 64:
        few = partial(Settings, words=8, stages=4)
        return [
            few(block_m=block_m, block_n=n, warps=warps, inputs=inputs)
            for block_m, n, warps in ((16, 512, 4), (32, 256, 4), (32, 256, 8), (32, 512, 8))
            for inputs in (512, 1024)
        ]
    return [
        Settings(block_n=n, warps=warps, inputs=inputs, stages=4, words=8 if rank > 16 else 16)
        for n, warps in ((128, 4), (256, 4), (512, 4), (512, 8), (1024, 8))
        for inputs in ((512, 1024) if rank <= 16 else (1024, 2048))
    ]


def tune(arguments: argparse.Namespace) -> None:
    """Print every candidate's time. Modules follow each other as in a model: alone they favour other settings."""
    print("| rank | rows x adapters | ms | error | settings |\n| --- | --- | --- | --- | --- |")
    for rank in arguments.rank:
        step = Step(rank, layers=arguments.layers)
        for num_rows, num_adapters in arguments.cases:
            step.rows(num_rows, num_adapters)
            for settings in candidates(num_rows, rank):
                print(f"| {rank} | {num_rows} x {num_adapters} | {step.tried(settings)} | {settings} |", flush=True)
        step.free()


def compile_all(arguments: argparse.Namespace) -> None:
    """Compile what ``tune`` needs in many processes, which share a cache on disk."""
    begin = time.perf_counter()
    # Of steps that are cut up alike, one.
    cases = {min(size for size in (64, 512, 1 << 20) if rows <= size): f"{rows}x{n}" for rows, n in arguments.cases}
    some = [sys.executable, __file__, "--compile", "--layers", "1", "--cases", *cases.values()]
    jobs = [
        subprocess.Popen([*some, "--rank", str(rank), "--nth", str(nth)])
        for rank in arguments.rank
        for nth in range(NUM_JOBS)
    ]
    for job in jobs:
        job.wait()
    print(f"compiled in {time.perf_counter() - begin:.0f} s", flush=True)


def compile_some(arguments: argparse.Namespace) -> None:
    """Compile every so manyth candidate."""
    (rank,) = arguments.rank
    step = Step(rank, layers=1)
    for num_rows, num_adapters in arguments.cases:
        step.rows(num_rows, num_adapters)
        for settings in candidates(num_rows, rank)[arguments.nth :: NUM_JOBS]:
            step.tried(settings)


def compare(arguments: argparse.Namespace) -> None:
    """Print a table of ours beside vLLM's."""
    from vllm.lora.ops.triton_ops import LoRAKernelMeta

    print("| rank | rows x adapters | vLLM, ms | ours, ms | vLLM / ours | floor, ms | host, us a module | error |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for rank in arguments.rank:
        step = Step(rank, layers=arguments.layers)
        for num_rows, num_adapters in arguments.cases:
            step.rows(num_rows, num_adapters)
            meta = LoRAKernelMeta.make(SLOTS, num_rows, "cuda")
            meta.prepare_tensors(torch.from_numpy(step.slots).cuda())
            error = step.error()
            theirs = graph_ms(partial(step.vllms, meta))
            ours = graph_ms(step.ours)
            host = host_us(step.ours) / len(step.weights)
            print(
                f"| {rank} | {num_rows} x {num_adapters} | {theirs:.2f} | {ours:.2f} | {theirs / ours:.2f} | "
                f"{step.floor(num_adapters):.2f} | {host:.0f} | {error:.1e} |",
                flush=True,
            )
        step.free()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--nth", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument(
        "--cases",
        nargs="+",
        type=lambda text: tuple(map(int, text.split("x"))),
        default=[(1, 1), (8, 1), (8, 8), (64, 1), (64, 8), (256, 1), (256, 8), (4096, 1), (4096, 8)],
        help="rows x adapters",
    )
    arguments = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    if arguments.compile:
        compile_some(arguments)
    elif arguments.tune:
        compile_all(arguments)
        tune(arguments)
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
