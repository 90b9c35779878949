"""Adapters for tests: small, sound, and written without torch or PEFT."""

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


def write_adapter(
    folder: Path,
    *,
    rank: int = 8,
    alpha: float = 16,
    modules: Mapping[str, tuple[int, int]] = TINY_MODEL,
    base_model: str = "fake/model",
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write a sound LoRA adapter, as PEFT writes one, with random weights.

    Args:
        folder: Where to write; made if it is not there, and written over if it is.
        rank: The rank of every module.
        alpha: ``lora_alpha``.
        modules: The modules it changes, name to (in_features, out_features).
        base_model: The model it says it was trained on.
        seed: Another seed gives other weights.
        **config: Further fields of ``adapter_config.json``, which also replace these.

    Returns:
        The folder.
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    tensors: dict[str, Any] = {}
    for name, (in_features, out_features) in modules.items():
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = generator.normal(0, 0.02, (rank, in_features)).astype("<f4")
        tensors[f"{prefix}.lora_B.weight"] = generator.normal(0, 0.02, (out_features, rank)).astype("<f4")
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
        "bias": "none",
        **config,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(fields, indent=2))
    (folder / "adapter_model.safetensors").write_bytes(_safetensors(tensors))
    return folder


def _safetensors(tensors: Mapping[str, Any]) -> bytes:
    header: dict[str, Any] = {}
    end = 0
    for name, array in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + b"".join(array.tobytes() for array in tensors.values())
