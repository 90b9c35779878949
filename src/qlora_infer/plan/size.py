"""The size of a model, and of an adapter for it, estimated from its ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_infer.quantization.checkpoint import size_of, weight_bits


def adapter_bytes(model_config: Mapping[str, Any], rank: int) -> int | None:
    """Return the bytes of an adapter that changes every linear layer of a model, in 16 bits; a slot has this size.

    ``None`` if the ``config.json`` is not that of a usual decoder.
    """
    shapes = _linear_shapes(model_config)
    return 2 * rank * sum(inputs + outputs for inputs, outputs in shapes) if shapes else None


def weight_bytes(model_config: Mapping[str, Any], quantization: str) -> int | None:
    """Estimate the bytes of a model's weights: linear layers in its bits, embeddings in 16.

    Args:
        model_config: The model's ``config.json``.
        quantization: The strategy's name, which determines the weights of an unquantized checkpoint.

    Returns:
        Bytes, or ``None`` if the ``config.json`` is not that of a usual decoder.
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
    """Count the numbers in a model's linear layers, without the embeddings; ``None`` if they are not known."""
    return sum(inputs * outputs for inputs, outputs in _linear_shapes(model_config)) or None


def _linear_shapes(model_config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return inputs and outputs of every linear layer of a usual decoder; none if the ``config.json`` is another's."""
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
