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
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from qlora_infer.kernels import fused
from qlora_infer.kernels.fused import Batch, Module, Scratch, Settings

#: The linear modules of a layer of Llama-3 8B: inputs, and the outputs of each slice.
MODULES = {
    "qkv_proj": (4096, (4096, 1024, 1024)),
    "o_proj": (4096, (4096,)),
    "gate_up_proj": (4096, (14336, 14336)),
    "down_proj": (14336, (4096,)),
}
SLOTS = 8
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
        """Have a batch of so many rows, whose adapters take turns."""
        self.slots = (np.arange(num_rows) % num_adapters).astype(np.int32)
        self.batch = Batch(num_rows, SLOTS, "cuda")
        self.batch.update(self.slots)
        self.scratch = Scratch(num_rows, SLOTS, self.rank, max(len(sizes) for _, sizes in MODULES.values()), "cuda")
        self.inputs = {k: torch.randn(num_rows, k, device="cuda", dtype=self.dtype) for k, _ in MODULES.values()}
        self.outputs = {
            sizes: torch.randn(num_rows, sum(sizes), device="cuda", dtype=self.dtype) for _, sizes in MODULES.values()
        }

    def ours(self, settings: Callable[[int, Module], Settings] | None = None, only: int | None = None) -> None:
        """Run every module with our kernels."""
        for module, _, _ in self.weights[:only]:
            x, y = self.inputs[module.num_inputs], self.outputs[module.sizes]
            chosen = None if settings is None else settings(len(x), module)
            fused.add_lora(y, x, module, self.batch, self.scratch, pdl=True, settings=chosen)

    def vllms(self, meta: Any) -> None:
        """Run every module with vLLM's kernels."""
        from vllm.lora.ops.triton_ops import lora_expand, lora_shrink

        for module, a, b in self.weights:
            x, y = self.inputs[module.num_inputs], self.outputs[module.sizes]
            buffer = torch.empty((len(a), len(x), self.rank), dtype=torch.float32, device="cuda")
            lora_shrink(x, a, buffer, *meta.meta_args(len(x), False), 1.0)
            lora_expand(buffer, b, y, *meta.meta_args(len(x), False), offset_start=0, add_inputs=True)

    def error(self, settings: Callable[[int, Module], Settings] | None = None) -> float:
        """The largest relative error of a layer's four modules against float64."""
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
            chosen = None if settings is None else settings(len(x), module)
            fused.add_lora(y, x, module, self.batch, self.scratch, pdl=True, settings=chosen)
            delta = expected - base
            worst = max(worst, float((y.double() - expected).norm() / delta.norm()))
        return worst

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


def candidates(num_rows: int, rank: int) -> Iterator[tuple[str, Callable[[int, Module], Settings]]]:
    """Settings to try: a base, and what differs from it in one or two things."""

    def always(**settings: Any) -> Callable[[int, Module], Settings]:
        return lambda *_: Settings(**settings)

    if num_rows <= 64 and rank <= 16:
        yield "base", always()
        yield "splits 16", always(splits=16, block_n=512)
        yield "bn512", always(block_n=512)
        yield "bn512 words 8", always(block_n=512, words=8)
        yield "bn512 s4", always(block_n=512, stages=4)
        yield "bn512 s2", always(block_n=512, stages=2)
        yield "bn1024 w8", always(block_n=1024, warps=8, words=8)
    if num_rows <= 64 and rank > 16:
        yield "bn128", always(block_n=128, words=8)
        yield "bn128 w8", always(block_n=128, words=8, warps=8)
        yield "bn256", always(words=8)
        yield "bn256 w8", always(words=8, warps=8)
        yield "bn512 w8", always(block_n=512, words=8, warps=8)
        yield "bn256 w8 splits 16", always(words=8, warps=8, splits=16)
        yield "bn256 w8 splits 4 bk256", always(words=8, warps=8, splits=4, block_k=256)
        yield "bn256 w8 words 16", always(words=16, warps=8)
    if 64 < num_rows <= 512:
        yield "bm32", always(block_m=32, words=8)
        yield "bm32 w8", always(block_m=32, warps=8, words=8)
        yield "bm32 bn512 w8", always(block_m=32, block_n=512, warps=8, words=8)
        yield "bm32 bn128", always(block_m=32, block_n=128, words=8)
        yield "bm16 bn512", always(block_n=512, words=8)
        yield "bm16 w8", always(block_n=512, words=8, warps=8)
        yield "bm64 splits 4 w8", always(block_m=64, splits=4, block_k=64, warps=8, words=8)
    if num_rows > 512:
        yield "splits 1", always(block_m=64, splits=1, block_k=64, block_n=128)
        yield "splits 1 w8 bn256", always(block_m=64, splits=1, block_k=64, block_n=256, warps=8)
        yield "splits 1 bk128", always(block_m=64, splits=1, block_k=128, block_n=128)
        yield "splits 1 s4", always(block_m=64, splits=1, block_k=64, block_n=128, stages=4)
        yield "splits 2", always(block_m=64, splits=2, block_k=64, block_n=128)
        yield "splits 1 bn256", always(block_m=64, splits=1, block_k=64, block_n=256)


def tune(arguments: argparse.Namespace) -> None:
    """Print every candidate's time."""
    for rank in arguments.rank:
        step = Step(rank, layers=arguments.layers)
        for num_rows, num_adapters in arguments.cases:
            step.rows(num_rows, num_adapters)
            for name, settings in candidates(num_rows, rank):
                try:
                    error = step.error(settings)
                    ms = graph_ms(lambda settings=settings: step.ours(settings))  # type: ignore[misc]
                    host = host_us(lambda settings=settings: step.ours(settings)) / len(step.weights)  # type: ignore[misc]
                except Exception as fault:  # a setting that does not fit is a result
                    print(f"| {rank} | {num_rows} x {num_adapters} | {name} | {str(fault)[:80]!r} |", flush=True)
                    continue
                wrong = "" if error < 2e-2 else " WRONG"
                print(
                    f"| {rank} | {num_rows} x {num_adapters} | {name} | {ms:.3f} | {host:.0f} us | {error:.1e}{wrong} |",
                    flush=True,
                )
        del step
        torch.cuda.empty_cache()


def compile_all(arguments: argparse.Namespace) -> None:
    """Compile what ``tune`` needs in many processes: they share a cache on disk."""
    begin = time.perf_counter()
    jobs = [
        subprocess.Popen(
            [sys.executable, __file__, "--compile", "--layers", "1", "--rank", str(rank)]
            + ["--cases", f"{rows}x{adapters}", "--every", str(every), "--nth", str(nth)]
        )
        for rank in arguments.rank
        for rows, adapters, every in ((64, 8, 4), (256, 8, 3), (4096, 8, 3))
        if (rows, adapters) in arguments.cases
        for nth in range(every)
    ]
    for job in jobs:
        job.wait()
    print(f"compiled in {time.perf_counter() - begin:.0f} s", flush=True)


def compile_some(arguments: argparse.Namespace) -> None:
    """Compile every so manyth candidate."""
    step = Step(arguments.rank[0], layers=1)
    for num_rows, num_adapters in arguments.cases:
        step.rows(num_rows, num_adapters)
        for nth, (_, settings) in enumerate(candidates(num_rows, arguments.rank[0])):
            if nth % arguments.every == arguments.nth:
                try:
                    step.ours(settings)
                except Exception as fault:
                    print(fault)


def compare(arguments: argparse.Namespace) -> None:
    """Print a table of ours beside vLLM's."""
    from vllm.lora.ops.triton_ops import LoRAKernelMeta

    print("| rank | rows x adapters | vLLM, ms | ours, ms | vLLM / ours | floor, ms | error |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for rank in arguments.rank:
        step = Step(rank, layers=arguments.layers)
        for num_rows, num_adapters in arguments.cases:
            step.rows(num_rows, num_adapters)
            meta = LoRAKernelMeta.make(SLOTS, num_rows, "cuda")
            meta.prepare_tensors(torch.from_numpy(step.slots).cuda())
            error = step.error()
            theirs = graph_ms(lambda: step.vllms(meta))
            ours = graph_ms(step.ours)
            print(
                f"| {rank} | {num_rows} x {num_adapters} | {theirs:.2f} | {ours:.2f} | {theirs / ours:.2f} | "
                f"{step.floor(num_adapters):.2f} | {error:.1e} |",
                flush=True,
            )
        del step
        torch.cuda.empty_cache()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--every", type=int, default=1, help=argparse.SUPPRESS)
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
