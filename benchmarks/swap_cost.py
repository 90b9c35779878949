"""Measure the move of an adapter from host memory into a slot: vLLM's way, and in a few calls of torch.

    python benchmarks/swap_cost.py                          # on a GPU, models of 1.1 and 8 billion parameters
    python benchmarks/swap_cost.py --device cpu --shape tiny

Alone, and beside a thread that wants Python's lock, as one does that reads another adapter. "returns" is what the
thread that makes the steps waits, "done" is when the device has everything. The methods of vLLM's own layers do it, on
weights of their own, of the slots' dtype; "cast" is ours with an adapter that is in bfloat16 and slots in float16.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import common
import torch
from llama_shapes import SHAPES
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.layers.column_parallel_linear import MergedColumnParallelLinearWithLoRA

from qlora_infer._vllm.kernels.loading.pinned import PIECE
from qlora_infer._vllm.kernels.loading.slots import move_at_once

NUM_SLOTS = 8
#: What slots are made of.
SLOTS = torch.float16
#: vLLM's linear layers of a Llama, and the modules that each has in one.
PARTS = {
    "qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o_proj": ("self_attn.o_proj",),
    "gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "down_proj": ("mlp.down_proj",),
}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", nargs="+", default=["1.1B", "8B"], choices=SHAPES)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=40)
    arguments = parser.parse_args()
    print(f"{common.machine()}; rank {arguments.rank}, {arguments.repeats} moves each", flush=True)
    rows = []
    for shape in arguments.shape:
        dtypes = {"vLLM": SLOTS, "ours": SLOTS, "ours, cast": torch.bfloat16}
        managers = {name: manager(shape, arguments.rank, arguments.device, dtype) for name, dtype in dtypes.items()}
        for name in ("ours", "ours, cast"):
            move_at_once(managers[name])
        rows.append((shape, "alone", *in_turn(managers, arguments.repeats)))
        with a_thread():
            rows.append((shape, "beside a thread", *in_turn(managers, arguments.repeats)))
    header = ("model", "", "returns, ms: vLLM", "done", "returns, ms: ours", "done", "returns, ms: ours, cast", "done")
    print(common.table(header, rows))


def in_turn(managers: Mapping[str, Any], repeats: int) -> list[float]:
    """For each manager the milliseconds until a move returns, and until it is done; medians."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in managers}
    for number in range(NUM_SLOTS + repeats):
        for name, one in managers.items():
            began = time.perf_counter()
            one.activate_adapter(number)
            returned = time.perf_counter()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            found[name].append((1e3 * (returned - began), 1e3 * (time.perf_counter() - began)))
    return [statistics.median(column) for times in found.values() for column in zip(*times[NUM_SLOTS:], strict=True)]


@contextlib.contextmanager
def a_thread() -> Iterator[None]:
    """Something that computes in Python and in small tensors."""
    ends = threading.Event()

    def compute() -> None:
        numbers = torch.zeros(8)
        while not ends.is_set():
            numbers.add_(sum(range(200)))

    # As the worker sets it where it reads adapters.
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    thread = threading.Thread(target=compute)
    thread.start()
    try:
        yield
    finally:
        ends.set()
        thread.join()
        sys.setswitchinterval(before)


def manager(shape: str, rank: int, device: str, dtype: torch.dtype) -> Any:
    """Build the parts of vLLM's ``LoRAModelManager`` that ``move_at_once`` uses, with a Llama's linear layers."""
    layers = {f"layers.{number}.{name}": a_layer(sizes, rank, device) for number, name, sizes in sizes_of(shape)}
    weights = dict(zip(layers, weights_for(list(layers.values()), dtype), strict=True))

    def activate_adapter(lora_id: int) -> bool:
        for name, layer in layers.items():
            layer.set_lora(lora_id % NUM_SLOTS, *weights[name])
        return True

    parts = {name: ["part"] * layer.n_slices for name, layer in layers.items()}
    return SimpleNamespace(modules=layers, packed_modules=parts, activate_adapter=activate_adapter)


def sizes_of(shape: str) -> Iterator[tuple[int, str, tuple[int, ...]]]:
    """Each linear layer: the number of its inputs, and of the outputs of its slices."""
    modules = common.modules_of(SHAPES[shape])
    for number in range(SHAPES[shape]["num_hidden_layers"]):
        for name, parts in PARTS.items():
            sizes = [modules[f"model.layers.{number}.{part}"] for part in parts]
            yield number, name, (sizes[0][0], *(outputs for _, outputs in sizes))


def a_layer(sizes: tuple[int, ...], rank: int, device: str) -> Any:
    """Build a layer's slots, with the methods of vLLM's that write them."""
    num_inputs, *outputs = sizes
    theirs = MergedColumnParallelLinearWithLoRA if len(outputs) > 1 else BaseLinearLayerWithLoRA
    layer = type("Layer", (), {"set_lora": theirs.set_lora, "reset_lora": theirs.reset_lora})()
    layer.tp_size, layer.n_slices = 1, len(outputs)
    new = {"dtype": SLOTS, "device": device}
    layer.lora_a_stacked = tuple(torch.zeros(NUM_SLOTS, 1, rank, num_inputs, **new) for _ in outputs)
    layer.lora_b_stacked = tuple(torch.zeros(NUM_SLOTS, 1, size, rank, **new) for size in outputs)
    return layer


def weights_for(layers: Sequence[Any], dtype: torch.dtype) -> Iterator[tuple[Any, Any]]:
    """Yield an adapter's weights for each layer, in host memory.

    They lie in pieces as ``pinned.py`` reads them; slices come in lists.
    """
    shapes = [stacked.shape[2:] for layer in layers for stacked in (*layer.lora_a_stacked, *layer.lora_b_stacked)]
    tensors: list[torch.Tensor] = []
    while len(tensors) < len(shapes):
        sizes = itertools.accumulate(shape.numel() for shape in shapes[len(tensors) :])
        number = max(1, sum(size * dtype.itemsize <= PIECE for size in sizes))
        empty = [torch.empty(()).expand(shape) for shape in shapes[len(tensors) : len(tensors) + number]]
        piece = torch.ones(sum(map(torch.Tensor.numel, empty)), dtype=dtype, pin_memory=torch.cuda.is_available())
        tensors += torch._C._nn.unflatten_dense_tensors(piece, empty)
    left = iter(tensors)
    for layer in layers:
        a, b = (list(itertools.islice(left, layer.n_slices)) for _ in range(2))
        yield (a, b) if layer.n_slices > 1 else (a[0], b[0])


if __name__ == "__main__":
    main()
