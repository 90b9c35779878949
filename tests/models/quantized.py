"""The forms of a checkpoint: what vLLM reads, and the same weights in float32 for the reference.

Each is packed by rounding to the nearest step. A tool looks at activations, too; here only the layout matters.
"""

import functools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from qlora_infer.demo import _pack
from qlora_infer.demo._build import _AWQ_CONFIG, _GPTQ_CONFIG

NOT_QUANTIZED = ("embed", "lm_head", "norm", "router", "mlp.gate.")
#: The sides of a block of DeepSeek's FP8 checkpoints.
BLOCK = 128

Packed = tuple[dict[str, Any], Any]


@frozen
class Form:
    """A form that the linear layers of a checkpoint come in.

    Attributes:
        quantization: The strategy that serves it.
        pack: Returns a weight's tensors by the last part of their names, and the weight that they stand for.
        config: ``quantization_config`` in ``config.json``; empty where vLLM quantizes as it loads.
        pack_experts: Does what ``pack`` does, for tensors of three dimensions.
        rounds_activations: Whether kernels round the inputs of its layers to 8 bits.
    """

    quantization: str
    pack: Callable[[Any], Packed] | None = None
    config: Mapping[str, Any] = {}
    pack_experts: Callable[[Any], Packed] | None = None
    rounds_activations: bool = False


def strategy(form: str) -> str:
    """Return the strategy that serves a form; ``"none"`` is that of the checkpoint as it is."""
    return FORMS[form].quantization if form in FORMS else form


def rounds_activations(form: str) -> bool:
    """Return whether kernels round the inputs of a form's layers to 8 bits, which the reference does not."""
    return form in FORMS and FORMS[form].rounds_activations


def is_quantized(name: str, tensor: Any) -> bool:
    """Return whether a weight is that of a linear layer within the model."""
    return tensor.ndim == 2 and name.endswith(".weight") and not any(part in name for part in NOT_QUANTIZED)


def quantize(source: Path, served: Path, reference: Path, form: str) -> None:
    """Write both forms of the checkpoint in ``source``."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, reference)
    shutil.copytree(source, served)
    packed: dict[str, Any] = {}
    rounded: dict[str, Any] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        tensors, rounded[name] = _packed(FORMS[form], name, weight)
        packed |= tensors
    for folder, tensors in ((served, packed), (reference, rounded)):
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    if FORMS[form].config:
        config = json.loads((served / "config.json").read_text())
        config["quantization_config"] = dict(FORMS[form].config)
        (served / "config.json").write_text(json.dumps(config, indent=2))


def _packed(form: Form, name: str, weight: Any) -> Packed:
    """Return the tensors that stand for a weight in the checkpoint, by name, and the weight as they have it."""
    if form.pack is not None and is_quantized(name, weight):
        prefix, (tensors, rounded) = name.removesuffix("weight"), form.pack(weight)
    elif form.pack_experts is not None and weight.ndim == 3:
        prefix, (tensors, rounded) = f"{name}_", form.pack_experts(weight)
    else:
        return {name: weight}, weight
    return {f"{prefix}{part}": tensor for part, tensor in tensors.items()}, rounded


def pack_awq(weight: Any) -> Packed:
    """Pack 4 bits with zero points into AWQ's layout."""
    matrix = _pack.quantize(weight.T, symmetric=False)
    return _pack.pack_awq(matrix), matrix.dequantized().T


def pack_gptq(weight: Any) -> Packed:
    """Pack symmetric 4 bits into GPTQ's layout."""
    matrix = _pack.quantize(weight.T, symmetric=True)
    return _pack.pack_gptq(matrix), matrix.dequantized().T


def pack_nf4(weight: Any) -> Packed:
    """Leave a weight for vLLM to quantize, and return what bitsandbytes makes of it: nf4 and back."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    quantized, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return {"weight": weight}, dequantize_4bit(quantized, state).to(weight.dtype)


def compressed(weights: Mapping[str, Any], input_activations: Mapping[str, Any] | None = None) -> Form:
    """Return the form that the package compressed-tensors packs for these ``QuantizationArgs``."""
    layout = _layout(weights, input_activations)
    group = {"targets": ["Linear"], "weights": dict(weights), "input_activations": input_activations, "format": layout}
    config = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*router.*", "re:.*mlp.gate$"],
    }
    pack = functools.partial(pack_compressed, weights=weights, input_activations=input_activations)
    return Form("compressed-tensors", pack, config, rounds_activations=input_activations is not None)


def _layout(weights: Mapping[str, Any], input_activations: Mapping[str, Any] | None) -> str:
    if weights["type"] == "int":
        return "int-quantized" if input_activations else "pack-quantized"
    return "float-quantized" if weights["num_bits"] == 8 else "nvfp4-pack-quantized"


def pack_compressed(
    weight: Any, weights: Mapping[str, Any], input_activations: Mapping[str, Any] | None = None
) -> Packed:
    """Pack a weight with the compressor of the package compressed-tensors that made such checkpoints."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from compressed_tensors.quantization.utils.helpers import calculate_qparams

    args = QuantizationArgs(**weights)
    inputs = QuantizationArgs(**input_activations) if input_activations else None
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=inputs)
    parts = _parts(weight.float(), args)
    parameters = {"weight": weight.float()}
    if args.strategy == "tensor_group":
        parameters["weight_global_scale"] = _global_scale(weight)
    global_scale = parameters.get("weight_global_scale")
    scale, zero_point = calculate_qparams(parts.amin((1, 3)), parts.amax((1, 3)), args, global_scale)
    parameters |= {"weight_scale": _rounded_scale(scale, args), "weight_zero_point": zero_point}
    compressor = BaseCompressor.get_value_from_registry(_layout(weights, input_activations))
    tensors = compressor.compress(parameters, scheme)
    if args.strategy == "block":  # which the compressor packs, and does not unpack
        rounded = dequantize(tensors["weight"], scale=tensors["weight_scale"], args=args)
    else:
        rounded = compressor.decompress(tensors, scheme)["weight"]
    if args.strategy == "tensor_group" and inputs is not None:
        tensors["input_global_scale"] = parameters["weight_global_scale"].clone()
    return tensors, rounded.float()


def _parts(weight: Any, args: Any) -> Any:
    """Return a view with one scale for each of its first and third dimensions."""
    rows, columns = weight.shape
    height, width = {
        "tensor": (rows, columns),
        "channel": (1, columns),
        "block": (BLOCK, BLOCK),
    }.get(args.strategy, (1, args.group_size))
    return weight.reshape(rows // height, height, columns // width, width)


def _rounded_scale(scale: Any, args: Any) -> Any:
    """Round a scale so that both sides read the same number.

    One scale for a tensor is a power of two: vLLM gives q, k and v the largest of theirs, and rounds the weights anew,
    which then changes no value (``requantize_with_max_scale``, vLLM 0.32).
    """
    import torch

    if args.strategy == "tensor":
        return torch.exp2(scale.log2().ceil()).reshape(1)
    return scale if args.strategy == "tensor_group" else scale.bfloat16().float()


def _global_scale(weight: Any) -> Any:
    """Return the scale of NVFP4's scales: one for all tensors, because vLLM has one for q, k and v."""
    import torch

    scale = torch.tensor([2.0**12])
    assert float(weight.abs().max()) * scale < 6 * 448
    return scale


def pack_fp8(weight: Any, *, input_scale: float | None = None) -> Packed:
    """Pack FP8 with one scale for a tensor, as vLLM's ``Fp8LinearMethod`` reads it."""
    tensors, rounded = pack_compressed(weight, _fp8("tensor"))
    return tensors | _static(input_scale), rounded


def pack_fp8_blocks(weight: Any) -> Packed:
    """Pack FP8 with a scale for each block of 128 by 128, in the layout of DeepSeek-V3's checkpoints."""
    tensors, rounded = pack_compressed(weight, _fp8("block"))
    return {"weight": tensors["weight"], "weight_scale_inv": tensors["weight_scale"]}, rounded


def pack_modelopt_fp4(weight: Any) -> Packed:
    """Pack NVFP4 under the names that NVIDIA's ModelOpt gives: the same numbers as compressed-tensors'.

    GPUs before Blackwell have no use for the scale of inputs, which stay in 16 bits there.
    """
    tensors, rounded = pack_compressed(weight, NVFP4)
    names = {"weight": tensors["weight_packed"], "weight_scale": tensors["weight_scale"]}
    return names | {"weight_scale_2": 1 / tensors["weight_global_scale"]} | _static(2.0**-7), rounded


def pack_fp8_in_flight(weight: Any) -> Packed:
    """Leave a weight for vLLM to cast, of values that FP8 has.

    vLLM takes one scale for q, k and v: that of the largest, which is the same for all weights here, for they are
    clipped (``Fp8PerTensorOnlineLinearMethod``, vLLM 0.32).
    """
    import torch

    scale = 2.0**-11
    rounded = (weight.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    return {"weight": rounded}, rounded


def _static(input_scale: float | None) -> dict[str, Any]:
    import torch

    return {} if input_scale is None else {"input_scale": torch.tensor([input_scale])}


def pack_mxfp4(weight: Any) -> Packed:
    """Pack experts, ``[experts, inputs, outputs]``, into the blocks and scales of gpt-oss's checkpoints.

    transformers reads them (``convert_moe_packed_tensors`` in ``integrations/mxfp4.py``): rows of outputs, 32 inputs a
    block, two to a byte, the exponents of the scales beside them.
    """
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils.helpers import calculate_qparams
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    args = QuantizationArgs(**MXFP4)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized")
    experts, inputs, outputs = weight.shape
    rows = weight.float().transpose(1, 2).reshape(experts * outputs, inputs)
    groups = rows.reshape(len(rows), -1, 32)
    scale, _ = calculate_qparams(groups.amin(2), groups.amax(2), args)
    tensors = compressor.compress({"weight": rows, "weight_scale": scale}, scheme)
    blocks = tensors["weight_packed"].reshape(experts, outputs, inputs // 32, 16)
    scales = tensors["weight_scale"].reshape(experts, outputs, inputs // 32)
    rounded = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return {"blocks": blocks, "scales": scales}, rounded


def _int(num_bits: int, **changes: Any) -> dict[str, Any]:
    group = {"strategy": "group", "group_size": _pack.GROUP_SIZE, "symmetric": True}
    return {"num_bits": num_bits, "type": "int", **group, **changes}


def _fp8(strategy: str) -> dict[str, Any]:
    block = {"block_structure": [BLOCK, BLOCK]} if strategy == "block" else {}
    return {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, **block}


def _auto_round(packing: str, *, sym: bool) -> dict[str, Any]:
    config = {"quant_method": "auto-round", "bits": 4, "group_size": _pack.GROUP_SIZE, "sym": sym, "data_type": "int"}
    return {**config, "packing_format": f"auto_round:{packing}", "autoround_version": "0.9.0"}


CHANNEL = {"strategy": "channel", "group_size": None}
#: How inputs are rounded: a scale for each token, found as it runs.
PER_TOKEN = {"strategy": "token", "symmetric": True, "dynamic": True}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True} | {
    "scale_dtype": "torch.float8_e4m3fn"
}
MXFP4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True} | {
    "scale_dtype": "torch.uint8"
}
FP8_CONFIG = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "modules_to_not_convert": ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in range(2))],
}

FORMS = {
    "awq": Form("awq", pack_awq, _AWQ_CONFIG),
    "gptq": Form("gptq", pack_gptq, _GPTQ_CONFIG),
    "bitsandbytes": Form("bitsandbytes", pack_nf4),
    "w4a16": compressed(_int(4)),
    "w4a16-asymmetric": compressed(_int(4, symmetric=False)),
    "w4a16-channel": compressed(_int(4, **CHANNEL)),
    "w8a16": compressed(_int(8)),
    "w8a8-int8": compressed(_int(8, **CHANNEL), {"num_bits": 8, "type": "int", **PER_TOKEN}),
    "w8a8-fp8": compressed(_fp8("channel"), {"num_bits": 8, "type": "float", **PER_TOKEN}),
    "nvfp4a16": compressed(NVFP4),
    "fp8": Form("fp8", pack_fp8, FP8_CONFIG, rounds_activations=True),
    "fp8-in-flight": Form("fp8", pack_fp8_in_flight, rounds_activations=True),
    "fp8-static": Form(
        "fp8",
        functools.partial(pack_fp8, input_scale=2.0**-4),
        {**FP8_CONFIG, "activation_scheme": "static"},
        rounds_activations=True,
    ),
    "fp8-block": Form(
        "fp8", pack_fp8_blocks, {**FP8_CONFIG, "weight_block_size": [BLOCK, BLOCK]}, rounds_activations=True
    ),
    "modelopt-fp8": Form(
        "modelopt",
        functools.partial(pack_fp8, input_scale=2.0**-4),
        {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]},
        rounds_activations=True,
    ),
    "modelopt-nvfp4": Form(
        "modelopt",
        pack_modelopt_fp4,
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head"]},
    ),
    "mxfp4": Form(
        "mxfp4",
        config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
        pack_experts=pack_mxfp4,
    ),
    "auto-round-gptq": Form("auto-round", pack_gptq, _auto_round("auto_gptq", sym=True)),
    "auto-round-awq": Form("auto-round", pack_awq, _auto_round("auto_awq", sym=False)),
}
