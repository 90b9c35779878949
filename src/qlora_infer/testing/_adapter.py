"""Small valid adapters for tests, written without torch or PEFT."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_LAYER = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (64, 32),
    "self_attn.v_proj": (64, 32),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (64, 128),
    "mlp.up_proj": (64, 128),
    "mlp.down_proj": (128, 64),
}

#: The modules of the fake engine's model, a Llama of two layers: name to (in_features, out_features).
TINY_MODEL: Mapping[str, tuple[int, int]] = {
    f"model.layers.{layer}.{name}": shape for layer in range(2) for name, shape in _LAYER.items()
}

#: Every other field that PEFT 0.21 writes into the adapter_config.json of a plain LoRA adapter.
_PEFT_DEFAULTS: Mapping[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "rank_pattern": {},
    "revision": None,
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}


def write_adapter(
    folder: str | Path,
    *,
    rank: int = 8,
    alpha: float = 16,
    modules: Mapping[str, tuple[int, int]] = TINY_MODEL,
    base_model: str = "fake/model",
    dtype: str = "F32",
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write a valid LoRA adapter with random weights, as PEFT writes one.

    Args:
        folder: The folder to write; it is made if necessary, and its files are replaced.
        rank: The rank of every module.
        alpha: ``lora_alpha``.
        modules: The modules to change, name to (in_features, out_features).
        base_model: The base model in the config.
        dtype: The tensors' data type in safetensors' words: "F64", "F32", "F16" or "BF16".
        seed: The seed of the weights.
        **config: Further fields of ``adapter_config.json``, which also replace these.

    Returns:
        The folder.

    Example:
        >>> from qlora_infer.testing import write_adapter
        >>> sorted(path.name for path in write_adapter("pirate", rank=4).iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    tensors: dict[str, Any] = {}
    for name, (in_features, out_features) in modules.items():
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = generator.normal(0, 0.02, (rank, in_features))
        tensors[f"{prefix}.lora_B.weight"] = generator.normal(0, 0.02, (out_features, rank))
    fields = {
        **_PEFT_DEFAULTS,
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
        **config,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(fields, indent=2, sort_keys=True))
    (folder / "adapter_model.safetensors").write_bytes(_safetensors(tensors, dtype))
    return folder


def _safetensors(tensors: Mapping[str, Any], dtype: str) -> bytes:
    header: dict[str, Any] = {}
    parts: list[bytes] = []
    end = 0
    for name, array in tensors.items():
        parts.append(_encode(array, dtype))
        start, end = end, end + len(parts[-1])
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + b"".join(parts)


def _encode(array: Any, dtype: str) -> bytes:
    if dtype == "BF16":
        # The upper half of a float32, which numpy has no type for.
        halves: bytes = (array.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
        return halves
    content: bytes = array.astype({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]).tobytes()
    return content
