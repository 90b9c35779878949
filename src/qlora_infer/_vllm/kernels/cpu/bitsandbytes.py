"""The layout of bitsandbytes weights that its AVX512-BF16 kernel on the CPU needs.

vllm-bnb-plugin 0.0.3 calls ``bitsandbytes.matmul_4bit``, which on the CPU writes the whole weight out in bf16 in each
call, unless it is packed. ``bitsandbytes.nn.Linear4bit`` packs its own weights before its first answer, the plugin
does not. The kernel reads the four bits where they are: 4 times as fast for small layers, up to 50 times for large
ones at one request (``docs/internals/cpu.md``). The scales are rounded to bf16, as ``Linear4bit`` has them.
"""

from __future__ import annotations

from typing import Any

import torch

#: The kernel works on so many outputs at a time.
BLOCK_ROWS = 32


def pack_weights(model: torch.nn.Module) -> int:
    """Pack every 4-bit weight of a model that can be packed, in place.

    Returns:
        How many slices of layers were packed; 0 on a CPU without AVX512-BF16, or where bitsandbytes does not know
        how.
    """
    weights = [weight for weight in model.parameters() if hasattr(weight, "bnb_shard_offsets")]
    if not weights:
        return 0
    from bitsandbytes import functional

    # Read in bitsandbytes 0.50.
    if not (hasattr(functional, "_convert_weight_packed_for_cpu") and functional.has_avx512bf16()):
        return 0
    return sum(_pack_slices(weight, functional._convert_weight_packed_for_cpu) for weight in weights)


def _pack_slices(weight: Any, pack: Any) -> int:
    """Pack the slices of a layer (q, k and v, say), which lie one after another in its weight."""
    offsets = weight.bnb_shard_offsets.tolist()
    states = [weight.bnb_quant_state[index] for index in range(len(offsets) - 1)]
    if len(set(map(id, states))) < len(states):
        return 0  # two slices with one state: it could not say which of them is packed
    num_packed = 0
    for begin, end, state in zip(offsets, offsets[1:], states, strict=False):
        if _can_be_packed(state):
            part = weight.data[begin:end]
            packed, _ = pack(part, state)
            part.copy_(packed.reshape(part.shape))
            num_packed += 1
    return num_packed


def _can_be_packed(state: Any) -> bool:
    """Return whether a slice is 4-bit, of sizes that the kernel supports, and not packed yet."""
    if getattr(state, "quant_type", None) not in ("nf4", "fp4") or len(state.shape) != 2:
        return False
    rows, columns = state.shape
    is_packed = getattr(state, "packing_format_for_cpu", False)
    return not is_packed and rows % BLOCK_ROWS == 0 and columns % state.blocksize == 0
