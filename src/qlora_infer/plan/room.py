"""How many adapters there is room for, in slots on the device and in host memory; and whether for CUDA graphs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from attrs import evolve

from qlora_infer.config import EngineConfig
from qlora_infer.quantization import Platform
from qlora_infer.quantization.checkpoint import size_of, weight_bits

logger = logging.getLogger("qlora_infer")

#: The share of the device's memory that slots get, and of the free host memory that adapters get.
SLOT_SHARE = 1 / 20
HOST_SHARE = 1 / 4

#: vLLM's kernels have been seen to slow down with the slots; host memory has no such limit but a sensible one.
MAX_SLOTS = 16
MAX_PLACES = 1024

#: Where nothing is known of the memory, or of the model.
DEFAULT_SLOTS = 8
PLACES_PER_SLOT = 4

#: The share of a GPU that vLLM takes by default (``gpu_memory_utilization``), and the least that must be left of it
#: beside weights and slots: CUDA graphs, activations and a small KV cache take about so much together.
GPU_SHARE = 0.92
GRAPH_ROOM = 3 << 30

#: The rank that room is made for while ``max_lora_rank`` is "auto".
ASSUMED_RANK = 64


def choose_room(
    config: EngineConfig, platform: Platform, model_config: Mapping[str, Any], quantization: str
) -> EngineConfig:
    """Choose where the user said ``"auto"``: ``max_loras``, ``max_cpu_loras`` and ``enforce_eager``; and log it.

    Args:
        config: What the user asked for.
        platform: The machine.
        model_config: The model's ``config.json``.
        quantization: The strategy's name.
    """
    rank = config.max_lora_rank if isinstance(config.max_lora_rank, int) else ASSUMED_RANK
    size = adapter_bytes(model_config, rank)
    if config.max_loras == "auto":
        config = evolve(config, max_loras=_choose_slots(config, platform, size), max_slot_bytes=None)
    if config.max_cpu_loras == "auto":
        config = evolve(config, max_cpu_loras=_choose_places(config, platform, size))
    if config.enforce_eager == "auto":
        weights = weight_bytes(model_config, quantization)
        config = evolve(config, enforce_eager=_is_short_of_memory(config, platform, weights, size))
    return config


def adapter_bytes(model_config: Mapping[str, Any], rank: int) -> int | None:
    """What an adapter of a rank takes that changes every linear layer of a model, in 16 bits; a slot's size, too.

    ``None`` where the ``config.json`` does not tell, as that of no usual decoder.
    """
    shapes = _linear_shapes(model_config)
    return 2 * rank * sum(inputs + outputs for inputs, outputs in shapes) if shapes else None


def weight_bytes(model_config: Mapping[str, Any], quantization: str) -> int | None:
    """Estimate the bytes of a model's weights: linear layers in its bits, embeddings in 16.

    Args:
        model_config: The model's ``config.json``.
        quantization: The strategy's name, which decides what becomes of an unquantized checkpoint.

    Returns:
        Bytes, or ``None`` where the ``config.json`` does not tell.
    """
    text = _text(model_config)
    parameters, words, hidden = (
        linear_parameters(model_config),
        size_of(text, "vocab_size"),
        size_of(text, "hidden_size"),
    )
    if not parameters or not words or not hidden:
        return None
    embeddings = words * hidden * (1 if text.get("tie_word_embeddings") else 2)
    return int(weight_bits(model_config, quantization) * parameters // 8 + 2 * embeddings)


def linear_parameters(model_config: Mapping[str, Any]) -> int | None:
    """How many numbers a model's linear layers have, without the embeddings. ``None`` where it is not told."""
    return sum(inputs * outputs for inputs, outputs in _linear_shapes(model_config)) or None


def _linear_shapes(model_config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Inputs and outputs of every linear layer of a usual decoder; none where the ``config.json`` does not tell."""
    text = _text(model_config)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    hidden, inner, layers, heads = (size_of(text, name) for name in names)
    if not hidden or not inner or not layers or not heads:
        return []
    head_size = size_of(text, "head_dim") or hidden // heads
    queries, keys = heads * head_size, (size_of(text, "num_key_value_heads") or heads) * head_size
    attention = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    return [*attention, (hidden, inner), (hidden, inner), (inner, hidden)] * layers


def _text(model_config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = model_config.get("text_config")
    return text if isinstance(text, Mapping) else model_config


def _is_short_of_memory(config: EngineConfig, platform: Platform, weights: int | None, size: int | None) -> bool:
    if platform.device != "cuda" or not platform.device_memory or not weights or not size:
        return False
    share = config.engine_args.get("gpu_memory_utilization", GPU_SHARE)
    taken = (weights + config.num_slots * size) // config.tensor_parallel_size
    left = int(platform.device_memory * share) - taken
    if left < GRAPH_ROOM:
        logger.warning(
            "enforce_eager=True: beside weights and slots (%s) too little of the GPU is left for CUDA graphs, without "
            "which decoding is several times slower; fewer max_loras or a lower max_lora_rank leave more, and "
            "enforce_eager=False tries it",
            _say(taken),
        )
    return left < GRAPH_ROOM


def _choose_slots(config: EngineConfig, platform: Platform, size: int | None) -> int:
    most = MAX_SLOTS if config.max_cpu_loras == "auto" else min(MAX_SLOTS, config.max_cpu_loras)
    budget = config.max_slot_bytes or (platform.device_memory and int(platform.device_memory * SLOT_SHARE))
    if not budget or not size:
        slots = min(DEFAULT_SLOTS, most)
        logger.info("max_loras=%d: the memory or the model's size is not known", slots)
        return slots
    slots = max(1, min(most, budget // size))
    logger.info("max_loras=%d: slots of %s, for which there are %s", slots, _say(size), _say(budget))
    return slots


def _choose_places(config: EngineConfig, platform: Platform, size: int | None) -> int:
    least = PLACES_PER_SLOT * config.num_slots
    budget = config.max_cpu_bytes or (platform.host_memory and int(platform.host_memory * HOST_SHARE))
    if not budget or not size:
        return least
    # Of adapters smaller than the largest, more would fit; max_cpu_bytes counts them as they are.
    places = MAX_PLACES if config.max_cpu_bytes else max(least, min(MAX_PLACES, budget // size))
    logger.info("max_cpu_loras=%d: adapters of up to %s, for which there are %s", places, _say(size), _say(budget))
    return places


def _say(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.1f} GiB" if num_bytes >= 1 << 30 else f"{num_bytes / (1 << 20):.0f} MiB"
