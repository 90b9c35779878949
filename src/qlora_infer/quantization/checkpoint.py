"""The quantization of a checkpoint, read in the places where vLLM 0.32 reads it.

These are ``config.json`` (``model_arch_config_convertor.py`` in ``vllm/transformers_utils``), and files beside it
(``get_config_filenames`` of each method in ``vllm/model_executor/layers/quantization``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from qlora_infer.errors import QuantizationError

#: Files beside ``config.json`` that speak of a quantization, and of which one where they name none.
QUANTIZATION_FILES = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "quantization_config.json": "auto-round",
}

#: Strategies that quantize an unquantized checkpoint as it loads, and the bits that they leave of a weight.
_BITS_IN_FLIGHT = {"bitsandbytes": 4, "fp8": 8}

#: Ends of names that only tensors of quantized layers have.
_PACKED = (
    *("._weight_qdata", ".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".SCB"),
    *("_blocks", ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4"),
)


#: The largest bits of a number, sizes of a dimension, and layers that a ``config.json`` is believed.
MAX_BITS, MAX_SIZE, MAX_LAYERS = 32, 1 << 31, 10_000


def size_of(config: Mapping[str, Any], name: str) -> int | None:
    """Return a size from a ``config.json``; ``None`` for other values, such as a list of one per layer."""
    size = config.get(name)
    limit = MAX_LAYERS if name == "num_hidden_layers" else MAX_SIZE
    return size if isinstance(size, int) and not isinstance(size, bool) and 0 < size <= limit else None


def quantization_config(model_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the quantization fields of a ``config.json``, also of a multimodal model's text; empty if none."""
    for config in (model_config, model_config.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            if isinstance(config, Mapping) and isinstance(found := config.get(key), Mapping):
                return found
    return {}


def quant_method(model_config: Mapping[str, Any]) -> str | None:
    """Return the ``quant_method`` that a checkpoint names, as vLLM writes it; ``None`` for an unquantized one."""
    fields = quantization_config(model_config)
    producer = fields.get("producer")
    if isinstance(producer, Mapping) and producer.get("name") == "modelopt":
        return "modelopt"
    method = str(fields.get("quant_method", "")).lower().replace("compressed_tensors", "compressed-tensors")
    return method or None


def weight_bits(model_config: Mapping[str, Any], quantization: str) -> int:
    """Return the bits that a linear layer's weight has in memory, scales and zeros not counted.

    Args:
        model_config: The model's ``config.json``.
        quantization: The strategy's name, which determines the weights of an unquantized checkpoint.
    """
    fields = quantization_config(model_config)
    if not fields:
        return _BITS_IN_FLIGHT.get(quantization, 16)
    groups = (fields.get("config_groups") or {}).values()
    weights = ((group or {}).get("weights") or {} for group in groups)
    counted = [fields.get("bits"), fields.get("w_bit"), *(group.get("num_bits") for group in weights)]
    number = re.search(r"(?:int|fp|float|q)(\d)", f"{fields}".lower())
    default = 8 if fields.get("load_in_8bit") else int(number[1]) if number else 4
    return next((bits for bits in counted if isinstance(bits, int) and 0 < bits <= MAX_BITS), default)


def complete(
    model: str,
    model_config: Mapping[str, Any],
    read: Callable[[str], Mapping[str, Any] | None],
    tensor_names: Callable[[], Iterable[str]],
) -> dict[str, Any]:
    """Return a ``config.json`` with the quantization fields of the files beside it.

    Args:
        model: The checkpoint's name, for messages.
        model_config: The content of its ``config.json``.
        read: Reads a JSON file of the checkpoint; ``None`` where there is none.
        tensor_names: Names its tensors; asked where no file tells of a quantization.

    Raises:
        QuantizationError: The weights are packed, and no file says how; or it is said without a method, or with a
            field that is not of the kind that its tool writes.
    """
    fields = quantization_config(model_config)
    _check_fields(model, fields)
    if fields and quant_method(model_config) is None:
        raise QuantizationError(
            f"quantization_config in config.json of {model} names no quant_method, without which vLLM reads packed "
            'weights as if they were none: add "quant_method" to it, such as "gptq"'
        )
    if fields:
        return dict(model_config)
    for name, method in QUANTIZATION_FILES.items():
        if found := read(name):
            _check_fields(model, found)
            return {**model_config, "quantization_config": {"quant_method": method, **found}}
    packed = next((name for name in tensor_names() if name.endswith(_PACKED)), None)
    if packed:
        raise QuantizationError(
            f"{model} is quantized ({packed}), and neither config.json nor {', '.join(QUANTIZATION_FILES)} says how: "
            'add the "quantization_config" of the model that it is a copy of to config.json'
        )
    return dict(model_config)


def _check_fields(model: str, fields: Mapping[str, Any]) -> None:
    """Raise ``QuantizationError`` for a field that strategies read and that is not of its kind; null is no field."""
    for field, (is_kind, kind) in _KINDS.items():
        value = fields.get(field)
        if value is not None and not is_kind(value):
            raise QuantizationError(
                f"{field} in the quantization of {model} must be {kind}, got {repr(value)[:80]}: take the file as its "
                "quantization tool wrote it"
            )
    for field in ("packing_format", "data_type"):
        if field in fields and fields[field] is None:
            raise QuantizationError(f"{field} in the quantization of {model} is null: leave it out, or name it")


def _is_groups(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(group, Mapping)
        and all(isinstance(group.get(part) or {}, Mapping) for part in ("weights", "input_activations"))
        for group in value.values()
    )


#: The fields in which strategies look for others, and what they must be.
_KINDS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "config_groups": (_is_groups, "an object of objects, each with objects for weights and input_activations"),
    "sparsity_config": (lambda value: isinstance(value, Mapping), "an object"),
    "dynamic": (lambda value: isinstance(value, Mapping), "an object"),
    "packing_format": (lambda value: isinstance(value, str), "text"),
    "data_type": (lambda value: isinstance(value, str), "text"),
    "llm_int8_skip_modules": (
        lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
        "a list of names",
    ),
}
