"""The decisions on memory: slots, places in host memory, CUDA graphs, and the KV cache of a CPU."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from qlora_infer.config import EngineConfig
from qlora_infer.plan.decision import Decision, given
from qlora_infer.quantization import Platform

#: The share of the device's memory that slots get, and of the free host memory that adapters get.
SLOT_SHARE = 1 / 20
HOST_SHARE = 1 / 4

#: vLLM's kernels have been seen to slow down with the slots; host memory has no such limit but a sensible one.
MAX_SLOTS = 16
MAX_PLACES = 1024

#: Where nothing is known of the memory, or of the model.
DEFAULT_SLOTS = 8
PLACES_PER_SLOT = 4

#: The rank that room is made for while ``max_lora_rank`` is "auto", and the engine's if it starts without adapters.
DEFAULT_RANK = 64

#: The share of a GPU that vLLM takes by default (``gpu_memory_utilization``), and the least that must be left of it
#: beside weights and slots: CUDA graphs, activations and a small KV cache take about so much together.
GPU_SHARE = 0.92
GRAPH_ROOM = 3 << 30

#: If you give one of these, you have set how much memory the KV cache takes on a CPU.
CPU_MEMORY_ARGS = frozenset({"gpu_memory_utilization", "kv_cache_memory_bytes"})
CPU_MEMORY_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"


def rank(config: EngineConfig) -> Decision[int]:
    """Decide on the rank that slots are made for, as long as no adapter is known."""
    if config.max_lora_rank == "auto":
        return Decision("max_lora_rank", DEFAULT_RANK, "no adapters load at the start")
    return given(config, "max_lora_rank")


def slots(config: EngineConfig, platform: Platform, size: int | None) -> Decision[int]:
    """Decide on the number of slots on the device, each of ``size`` bytes."""
    if config.max_loras != "auto":
        return given(config, "max_loras")
    most = MAX_SLOTS if config.max_cpu_loras == "auto" else min(MAX_SLOTS, config.max_cpu_loras)
    budget = config.max_slot_bytes or (platform.device_memory and int(platform.device_memory * SLOT_SHARE))
    if not budget or not size:
        reason = "the memory or the model's size is not known"
        return Decision("max_loras", min(DEFAULT_SLOTS, most), reason, logging.INFO)
    reason = f"slots of {format_bytes(size)}, for which there are {format_bytes(budget)}"
    return Decision("max_loras", max(1, min(most, budget // size)), reason, logging.INFO)


def places(config: EngineConfig, platform: Platform, size: int | None, slots: int) -> Decision[int]:
    """Decide on the number of adapters in host memory, each of ``size`` bytes at most."""
    if config.max_cpu_loras != "auto":
        return given(config, "max_cpu_loras")
    least = PLACES_PER_SLOT * slots
    budget = config.max_cpu_bytes or (platform.host_memory and int(platform.host_memory * HOST_SHARE))
    if not budget or not size:
        return Decision("max_cpu_loras", least, "the memory or the model's size is not known")
    # Of adapters smaller than the largest, more would fit; max_cpu_bytes counts them as they are.
    places = MAX_PLACES if config.max_cpu_bytes else max(least, min(MAX_PLACES, budget // size))
    reason = f"adapters of up to {format_bytes(size)}, for which there are {format_bytes(budget)}"
    return Decision("max_cpu_loras", places, reason, logging.INFO)


def eager(config: EngineConfig, platform: Platform, weights: int | None, slot_bytes: int) -> Decision[bool]:
    """Decide whether to do without CUDA graphs, because weights and slots leave no memory for them."""
    if config.enforce_eager != "auto":
        return given(config, "enforce_eager")
    if platform.device != "cuda":
        return Decision("enforce_eager", False, "the device has no CUDA graphs")
    if not platform.device_memory or not weights or not slot_bytes:
        return Decision("enforce_eager", False, "the memory or the model's size is not known")
    share = config.engine_args.get("gpu_memory_utilization", GPU_SHARE)
    taken = (weights + slot_bytes) // config.tensor_parallel_size
    left = int(platform.device_memory * share) - taken
    if left >= GRAPH_ROOM:
        return Decision("enforce_eager", False, f"beside weights and slots, {format_bytes(left)} are left for graphs")
    reason = (
        f"beside weights and slots ({format_bytes(taken)}) too little of the GPU is left for CUDA graphs, without "
        "which decoding is several times slower; fewer max_loras or a lower max_lora_rank leave more, and "
        "enforce_eager=False tries it"
    )
    return Decision("enforce_eager", True, reason, logging.WARNING)


def cpu_memory(engine_args: Mapping[str, Any], platform: Platform) -> Decision[int] | None:
    """Decide on the memory of the KV cache on a CPU; ``None`` elsewhere, or if you have set it.

    vLLM 0.32 wants 0.92 of all memory (``vllm/v1/worker/cpu_worker.py``) and does not start where that is not free.
    """
    is_given = CPU_MEMORY_ARGS & engine_args.keys() or platform.environment.get(CPU_MEMORY_VARIABLE)
    if platform.device != "cpu" or platform.host_memory is None or is_given:
        return None
    num_bytes = platform.host_memory // 4
    return Decision("kv_cache_memory_bytes", num_bytes, f"a quarter of the free memory, {format_bytes(num_bytes)}")


def format_bytes(num_bytes: int) -> str:
    """Return a number of bytes in GiB or MiB."""
    return f"{num_bytes / (1 << 30):.1f} GiB" if num_bytes >= 1 << 30 else f"{num_bytes / (1 << 20):.0f} MiB"
