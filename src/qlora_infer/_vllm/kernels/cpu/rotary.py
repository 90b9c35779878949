"""The rotary embedding on the CPU for queries and keys that have a dimension of their own for heads.

vLLM 0.32.0's C++ operator takes the second dimension for all heads together, and turns the first head only of
``[tokens, heads, head_size]``, which LFM2 gives it (``RotaryEmbedding.forward_cpu`` in
``vllm/model_executor/layers/rotary_embedding/base.py``, ``csrc/cpu/pos_encoding.cpp``): the model answers wrongly.
"""

from __future__ import annotations

from typing import Any


def flatten_heads() -> None:
    """From now on give vLLM's operator queries and keys of two dimensions, which are the same memory."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    turn = RotaryEmbedding.forward_cpu

    def forward_cpu(self: Any, positions: Any, query: Any, key: Any = None) -> tuple[Any, Any]:
        if query.dim() != positions.dim() + 2:
            turned: tuple[Any, Any] = turn(self, positions, query, key)
            return turned
        flat_key = None if key is None else key.flatten(-2)
        flat_query, flat_key = turn(self, positions, query.flatten(-2), flat_key)
        return flat_query.view(query.shape), None if key is None else flat_key.view(key.shape)

    RotaryEmbedding.forward_cpu = forward_cpu
