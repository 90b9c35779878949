"""Measure DoRA on a CPU: what it costs its own requests, those beside it, and an engine that has none.

    python benchmarks/cpu_dora.py            # the demo model: tokens/s, loads, and the longest gap that a load makes
    python benchmarks/cpu_dora.py --layer    # one module's arithmetic, microseconds

An adapter of random factors on all linear modules, with and without magnitudes. All magnitudes are 1, because how long
a step takes does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import common
import cpu_lora


def main() -> None:
    """Print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantization", nargs="+", default=["awq"], choices=["awq", "gptq", "bitsandbytes", "none"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--requests", nargs="+", type=int, default=[1, 8, 16])
    parser.add_argument("--tokens", type=int, default=24, help="tokens of an answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layer", action="store_true")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 512], help="of --layer")
    parser.add_argument(
        "--alone", action="store_true", help="one thread in --layer, which a busy machine disturbs less"
    )
    arguments = parser.parse_args()
    print(common.machine(), flush=True)
    if arguments.layer:
        if arguments.alone:
            from qlora_infer._vllm.kernels.cpu import rows

            rows.ALONE_UP_TO = 2**62
        print(layers(arguments.rank, arguments.rows, arguments.repeats))
        return
    for quantization in arguments.quantization:
        print(f"\n{quantization}, rank {arguments.rank}\n", flush=True)
        print(engines(quantization, arguments), flush=True)


def with_magnitudes(folder: Path, into: Path) -> Path:
    """Copy an adapter and give each of its modules magnitudes of 1."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, into)
    tensors = load_file(into / "adapter_model.safetensors")
    for name in [name for name in tensors if name.endswith(".lora_B.weight")]:
        module = name.removesuffix(".lora_B.weight")
        tensors[f"{module}.lora_magnitude_vector"] = torch.ones(len(tensors[name]))
    save_file(tensors, into / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((into / "adapter_config.json").read_text())
    (into / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    return into


def engines(quantization: str, arguments: argparse.Namespace) -> str:
    """Return tables of one quantization: loads, and tokens per second before a DoRA adapter has come and beside one."""
    model = common.model_for(quantization)
    with common.adapters_for(model, 2, rank=arguments.rank) as adapters:
        ours = common.Ours(
            model,
            quantization,
            {"lora": adapters["a0"]},
            max_loras=4,
            max_lora_rank=max(8, arguments.rank),
            max_cpu_loras=8,
            max_model_len=512,
            max_num_seqs=max(arguments.requests),
            enable_prefix_caching=False,
        )
        engine = ours.engine
        speed = {number: partial(_speed, ours, number, arguments.tokens) for number in arguments.requests}
        for number in arguments.requests:
            speed[number]("lora")
        before = {number: [speed[number]("lora") for _ in range(arguments.repeats)] for number in arguments.requests}
        first, second = (with_magnitudes(adapters[name], adapters[name].with_name(f"dora-{name}")) for name in adapters)
        loads = [
            ("a plain adapter", *_load(ours, "plain", adapters["a1"])),
            ("the first DoRA adapter", *_load(ours, "dora", first)),
            ("the second DoRA adapter", *_load(ours, "dora-2", second)),
        ]
        for name in ("dora-2", "plain"):
            engine.unload_adapter(name)
        alone = _seconds(partial(engine.load_adapter, "dora-2", second))
        loads.append(("a DoRA adapter beside no requests", alone, 0, 0))
        rows = []
        for number in arguments.requests:
            speed[number]("dora")
            runs = {name: partial(speed[number], name) for name in ("lora", "dora")}
            measured = common.in_turn(arguments.repeats, runs)
            medians = (statistics.median(values) for values in (before[number], *measured.values()))
            rows.append((number, *medians, common.ratio(measured, "dora", "lora")))
        ours.close()
    header = ("requests", "LoRA, none with DoRA loaded", "LoRA, one loaded", "DoRA", "DoRA / LoRA")
    loading = common.table(("load of", "seconds", "longest gap, ms", "median gap, ms"), loads)
    return f"{loading}\n\n{common.table(header, rows)}"


def _speed(ours: common.Ours, num_requests: int, num_tokens: int, adapter: str) -> float:
    params = {"temperature": 0.0, "ignore_eos": True, "max_tokens": num_tokens}
    texts = common.prompts(num_requests)
    return common.tokens_per_second(partial(ours.run, texts, [params] * num_requests, [adapter] * num_requests))


def _load(ours: common.Ours, name: str, folder: Path) -> tuple[float, float, float]:
    """Load an adapter while a request streams; return the seconds, and the longest and the median gap in the stream."""
    params = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 480}
    handle = ours.engine.add_request("sea", params, adapter="lora")
    times, stream = [], iter(handle)
    for _ in range(10):
        next(stream)
    from threading import Thread

    taken: list[float] = []
    loading = Thread(target=lambda: taken.append(_seconds(partial(ours.engine.load_adapter, name, folder))))
    loading.start()
    for _ in stream:
        times.append(time.perf_counter())
        if not loading.is_alive():
            break
    loading.join()
    handle.cancel()
    gaps = [1000 * (after - before) for before, after in pairwise(times)]
    return taken[0], max(gaps), statistics.median(gaps)


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def layers(rank: int, numbers_of_rows: Sequence[int], repeats: int) -> str:
    """Return a table of a layer's LoRA, beside a slot with gains that no row uses, with gains, and of half the rows."""
    rows = [
        (model, module, num_rows, *_layer(in_size, out_sizes, rank, num_rows, repeats))
        for model, modules in cpu_lora.MODULES.items()
        for module, (in_size, out_sizes) in modules.items()
        for num_rows in numbers_of_rows
    ]
    header = ("model", "module", "rows", "LoRA", "beside a slot with gains", "with gains", "half with gains")
    return common.table(header, rows)


def _layer(in_size: int, out_sizes: Sequence[int], rank: int, num_rows: int, repeats: int) -> list[float]:
    import numpy as np
    import torch
    from vllm.lora.layers import LoRAMapping

    from qlora_infer._vllm.kernels.cpu.lora import GroupedPunicaWrapper

    x, y = torch.randn(num_rows, in_size).bfloat16(), torch.zeros(num_rows, sum(out_sizes)).bfloat16()
    a = tuple(torch.randn(4, 1, rank, in_size).bfloat16() for _ in out_sizes)
    gains = np.ones((2, sum(out_sizes)), np.float32)
    gains[1] = 0

    def adding(slots: Sequence[int], with_gains: Sequence[int]) -> Callable[[], object]:
        wrapper = GroupedPunicaWrapper(max_num_batched_tokens=512, max_batches=512, device="cpu")
        ids = tuple(slots[row % len(slots)] for row in range(num_rows))
        wrapper.update_metadata(LoRAMapping(ids, ids, is_prefill=num_rows > 32), [1, 2, 3, 4], 5, 512)
        b = tuple(torch.randn(4, 1, size, rank).bfloat16() for size in out_sizes)
        for slot in with_gains:
            wrapper.use_gains(slot - 1, {id(a[0]): gains})
        return lambda: wrapper.add_lora_linear(y, x, a, b, 1.0, tuple(out_sizes))

    ways = [adding([1], []), adding([1], [2]), adding([1], [1]), adding([1, 2], [2])]
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(repeats):
        for own, way in zip(times, ways, strict=True):
            own.append(_fastest(way))
    return [min(own) for own in times]


def _fastest(run: Callable[[], object]) -> float:
    """Return the microseconds of the fastest of many calls, which other work on the machine does not lengthen."""
    run()
    end = time.perf_counter() + 0.3
    times = []
    while len(times) < 20 or time.perf_counter() < end:
        times.append(_seconds(run))
    return min(times) * 1e6


if __name__ == "__main__":
    main()
