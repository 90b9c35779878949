"""MLX adapters as mlx-lm and mlx-vlm write them; MLX itself runs on Apple's machines only.

``mx.save_safetensors`` writes ``{"__metadata__": {"format": "mlx"}}`` first, no spaces, and does not align the tensors;
``save_config`` sorts the fields. Fields are those of mlx-lm's ``CONFIG_DEFAULTS``.
"""

import json

import numpy as np

from qlora_infer.testing import TINY_MODEL

DTYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}

CONFIG = {
    "adapter_path": "adapters",
    "batch_size": 4,
    "config": None,
    "data": "mlx-community/WikiSQL",
    "fine_tune_type": "lora",
    "grad_checkpoint": False,
    "iters": 1000,
    "learning_rate": 1e-05,
    "lr_schedule": None,
    "mask_prompt": False,
    "model": "mlx-community/fake-model-4bit",
    "num_layers": 16,
    "optimizer": "adam",
    "optimizer_config": {"adam": {}, "adamw": {}},
    "resume_adapter_file": None,
    "save_every": 100,
    "seed": 0,
    "train": True,
}


def factors(modules=TINY_MODEL, *, rank=8, seed=0):
    """Random ``lora_a`` ``[inputs, rank]`` and ``lora_b`` ``[rank, outputs]`` for each module."""
    generator = np.random.default_rng(seed)
    found = {}
    for name, (in_features, out_features) in modules.items():
        found[f"{name}.lora_a"] = generator.normal(0, 0.02, (in_features, rank)).astype("f4")
        found[f"{name}.lora_b"] = generator.normal(0, 0.02, (rank, out_features)).astype("f4")
    return found


def save_safetensors(path, tensors, dtype="F32"):
    """Write a file as ``mx.save_safetensors`` does."""
    header, parts, end = {"__metadata__": {"format": "mlx"}}, [], 0
    for name, tensor in tensors.items():
        if dtype == "BF16":
            content = (tensor.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
        else:
            content = tensor.astype(DTYPES[dtype]).tobytes()
        header[name] = {"data_offsets": [end, end + len(content)], "dtype": dtype, "shape": list(tensor.shape)}
        parts.append(content)
        end += len(content)
    encoded = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + b"".join(parts))


def write_mlx(folder, tensors=None, *, rank=8, scale=20.0, dtype="F32", parameters=None, without=(), **fields):
    """Write an adapter's folder as ``mlx_lm lora --train`` leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = factors(rank=rank) if tensors is None else tensors
    parameters = {"rank": rank, "dropout": 0.0, "scale": scale} if parameters is None else parameters
    config = {**CONFIG, "lora_parameters": parameters, **fields}
    config = {name: value for name, value in config.items() if name not in without}
    (folder / "adapter_config.json").write_text(json.dumps(dict(sorted(config.items())), indent=4))
    save_safetensors(folder / "adapters.safetensors", tensors, dtype)
    return folder


def rounded(tensors, dtype):
    """The tensors as a file of this dtype has them."""
    if dtype == "BF16":
        return {name: (tensor.view("<u4") & 0xFFFF0000).view("<f4") for name, tensor in tensors.items()}
    return {name: tensor.astype(DTYPES[dtype]).astype("f4") for name, tensor in tensors.items()}


def effects(tensors, scale):
    """``scale * (lora_a @ lora_b)`` transposed, as ``LoRALinear.fuse`` adds it to the weight, in float64."""
    names = [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]
    return {
        name: scale * tensors[f"{name}.lora_b"].astype("f8").T @ tensors[f"{name}.lora_a"].astype("f8").T
        for name in names
    }
