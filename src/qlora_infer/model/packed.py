"""The shapes of a checkpoint's weights behind the packed tensors of each quantization."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qlora_infer.quantization.checkpoint import quant_method, quantization_config

Shape = tuple[int, ...]

#: How checkpoints call the projection that leads out of an expert.
_DOWN = ("down_proj", "w2", "fc2", "output_linear")


def leads_out(projection: str) -> bool:
    """Return whether a projection of experts, such as ``"0.down_proj"`` or ``"w2_weight"``, leads out of them."""
    return projection.rpartition(".")[2].startswith(_DOWN)


def unpack(tensors: Mapping[str, Shape], config: Mapping[str, Any]) -> Iterator[tuple[str, Shape | None]]:
    """Yield each weight with the shape that it has unpacked; ``None`` where the headers do not tell.

    A linear layer's weight is called ``….weight``, whatever its packed tensor is called, and has ``[outputs, inputs]``.

    Args:
        tensors: The shapes of the checkpoint's tensors.
        config: The content of its ``config.json``.
    """
    for name, shape in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight":
            yield name, _plain(module, shape, tensors)
        elif kind == "qweight" and len(shape) == 2:
            yield f"{module}.weight", _packed_in_int32(shape, tensors.get(f"{module}.scales", shape), config)
        elif kind == "weight_packed" and len(shape) == 2:
            yield f"{module}.weight", _of_compressed_tensors(shape, tensors.get(f"{module}.weight_scale"), config)
        elif kind == "_weight_qdata":  # torchao's, one number a byte
            yield f"{module}.weight", shape
        elif kind.endswith("_blocks") and len(shape) == 4:  # MXFP4: [experts, outputs, groups, bytes of two numbers]
            yield name.removesuffix("_blocks"), (shape[0], shape[1], shape[2] * shape[3] * 2)
        elif len(shape) == 3 and module.endswith("experts"):
            yield name, shape


def _plain(module: str, shape: Shape, tensors: Mapping[str, Shape]) -> Shape | None:
    if any(f"{module}.weight.quant_state.bitsandbytes__{kind}" in tensors for kind in ("nf4", "fp4")):
        return None  # one column, whose shape stands among the numbers
    scale = tensors.get(f"{module}.weight_scale", ())
    if f"{module}.weight_scale_2" in tensors and len(shape) == len(scale) == 2:
        return shape[0], shape[1] * 2  # modelopt's NVFP4, two numbers a byte
    return shape


def _packed_in_int32(qweight: Shape, scales: Shape, config: Mapping[str, Any]) -> Shape:
    """Return the shape behind AWQ's packed outputs or GPTQ's packed inputs; scales are one per output."""
    quantization = quantization_config(config)
    bits = quantization.get("bits")
    is_awq = "awq" in (quant_method(config) or "") or "awq" in str(quantization.get("packing_format", ""))
    if is_awq and scales:
        return scales[-1], qweight[0]
    return qweight[1], qweight[0] * 32 // bits if isinstance(bits, int) and bits > 0 else 0


def _of_compressed_tensors(packed: Shape, scale: Shape | None, config: Mapping[str, Any]) -> Shape:
    """Return the shape behind ``weight_packed``: the inputs are packed, and scales are one per group of them."""
    groups = quantization_config(config).get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
    weights = first.get("weights") if isinstance(first, Mapping) else None
    weights = weights if isinstance(weights, Mapping) else {}
    size, bits = weights.get("group_size"), weights.get("num_bits")
    if isinstance(size, int) and size > 0 and scale is not None and len(scale) == 2:
        return packed[0], scale[1] * size
    return packed[0], packed[1] * 32 // bits if isinstance(bits, int) and bits > 0 else 0
