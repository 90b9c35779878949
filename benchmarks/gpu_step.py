"""Measure the parts of a decode step on a GPU, and the share of the base model's speed that adapters leave.

    python benchmarks/gpu_step.py                 # our kernels
    python benchmarks/gpu_step.py --kernels vllm
    python benchmarks/gpu_step.py --engine-args '{"specialize_active_lora": true}'
    python benchmarks/gpu_step.py --shape 1.1B --quantization awq

A model of Llama's shape with random weights, by default 8 billion parameters in GPTQ; adapters of rank 16 on all its
linear modules. Speeds are of whole answers, from the first request to the last token; profiles are of steady decoding.
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
from llama_shapes import QUANTIZATIONS, SHAPES, model_and_adapters

from qlora_infer import QuantizedLoRAEngine

#: What a kernel belongs to, by a part of its name; the first that fits.
GROUPS = {
    "LoRA": ("lora",),
    "quantized products": ("marlin", "gptq", "awq", "machete", "4bit", "dequantize"),
    "attention": ("flash", "attention", "reshape_and_cache"),
    "norms, activations, rotation": ("norm", "act_and_mul", "rotary", "silu"),
    "other products (lm_head)": ("gemm", "nvjet", "cublas", "splitk", "gemv"),
    "copies": ("memcpy", "memset"),
}
#: What each layer does once in a step.
ONCE_A_LAYER = "reshape_and_cache"


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8B", choices=SHAPES)
    parser.add_argument("--quantization", default="gptq", choices=QUANTIZATIONS)
    parser.add_argument("--kernels", default="auto", choices=["auto", "vllm"])
    parser.add_argument("--engine-args", type=json.loads, default={}, metavar="JSON", help="vLLM's arguments")
    parser.add_argument("--tokenizer", type=Path, help="a model's folder, to read it from; the demo model's by default")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", type=int, nargs="+", default=[0, 1, 8])
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    given = ", ".join(f"{name}={value!r}" for name, value in arguments.engine_args.items())
    print(
        f"{common.machine()}; {arguments.shape} {arguments.quantization}, lora_kernels={arguments.kernels!r}, "
        f"rank {arguments.rank}, {given}",
        flush=True,
    )
    tokenizer = arguments.tokenizer or common.model_for("none")
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as traces,
        model_and_adapters(
            arguments.shape, arguments.quantization, tokenizer, max(arguments.adapters), arguments.rank
        ) as (model, adapters),
        QuantizedLoRAEngine(
            model,
            quantization=arguments.quantization,
            adapters=adapters,
            max_loras=8,
            max_lora_rank=arguments.rank,  # type: ignore[arg-type]
            max_model_len=4 * arguments.tokens,
            lora_kernels=arguments.kernels,
            engine_args={
                "max_num_seqs": max(arguments.requests),
                **({} if arguments.quantization == "bitsandbytes" else {"load_format": "dummy"}),
                "enable_prefix_caching": False,
                "gpu_memory_utilization": 0.5,
                "profiler_config": {
                    "profiler": "torch",
                    "torch_profiler_dir": traces,
                    "torch_profiler_with_stack": False,
                    "torch_profiler_use_gzip": False,
                    "torch_profiler_dump_cuda_time_total": False,
                },
                **arguments.engine_args,
            },
        ) as engine,
    ):
        print(f"started in {time.monotonic() - began:.0f} s", flush=True)
        measure_speed(engine, arguments)
        measure_step(engine, arguments, Path(traces))


def run(engine: QuantizedLoRAEngine, num_requests: int, num_adapters: int, num_tokens: int) -> float:
    """Tokens a second."""
    names: list[str | None] = [f"a{number % num_adapters}" if num_adapters else None for number in range(num_requests)]
    prompts: Sequence[Any] = [[1000 + number + place for place in range(16)] for number in range(num_requests)]
    params = {"temperature": 0.0, "max_tokens": num_tokens, "ignore_eos": True}
    began = time.perf_counter()
    outputs = engine.generate(prompts, params, adapter=names, use_tqdm=False)
    return sum(len(output.token_ids) for output in outputs) / (time.perf_counter() - began)


def measure_speed(engine: QuantizedLoRAEngine, arguments: argparse.Namespace) -> None:
    """Print tokens a second, in turn, so that a machine that changes changes all."""
    found: dict[tuple[int, int], list[float]] = collections.defaultdict(list)
    cells = [(requests, adapters) for requests in arguments.requests for adapters in arguments.adapters]
    for requests, adapters in cells:
        run(engine, requests, adapters, 16)
    for _ in range(arguments.repeats):
        for requests, adapters in cells:
            found[requests, adapters].append(run(engine, requests, adapters, arguments.tokens))
    medians = {cell: statistics.median(values) for cell, values in found.items()}
    rows = [
        (requests, adapters, medians[requests, adapters], medians[requests, adapters] / medians[requests, 0])
        for requests, adapters in cells
    ]
    print(common.table(("requests", "adapters", "tokens/s", "of the base model's"), rows), flush=True)


def measure_step(engine: QuantizedLoRAEngine, arguments: argparse.Namespace, traces: Path) -> None:
    """Print what the GPU does in a decode step, milliseconds."""
    rows = []
    for requests in arguments.requests:
        for adapters in arguments.adapters:
            name = f"r{requests}a{adapters}"
            core = engine._backend._engine  # type: ignore[attr-defined]
            engine._driver.call(lambda core=core, name=name: core.start_profile(name))  # type: ignore[misc]
            run(engine, requests, adapters, 32)
            engine._driver.call(lambda core=core: core.stop_profile())  # type: ignore[misc]
            rows.append((requests, adapters, *step_of(traces, name, SHAPES[arguments.shape]["num_hidden_layers"])))
    print(common.table(("requests", "adapters", "step", *GROUPS, "other", "nothing"), rows), flush=True)


def step_of(traces: Path, name: str, num_layers: int) -> list[float]:
    """Return the milliseconds of a step and of each group of kernels in it, from the second half of a trace."""
    (path,) = traces.glob(f"{name}_*.json")
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("cat", "") in KERNELS]
    events.sort(key=lambda event: event["ts"])
    events = events[len(events) // 2 :]
    groups: dict[str, float] = collections.defaultdict(float)
    layers, busy, until = 0, 0.0, 0.0
    for event in events:
        group = next((key for key, parts in GROUPS.items() if any(p in event["name"].lower() for p in parts)), "other")
        groups[group] += event["dur"]
        layers += ONCE_A_LAYER in event["name"]
        begin, end = event["ts"], event["ts"] + event["dur"]
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    steps = layers / num_layers
    total = until - events[0]["ts"]
    parts = [groups[key] for key in (*GROUPS, "other")]
    return [value / steps / 1e3 for value in (total, *parts, total - busy)]


KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")

if __name__ == "__main__":
    main()
