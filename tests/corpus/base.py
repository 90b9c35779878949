"""The tiny model that the corpus is held against: a Llama of two layers, and its files without weights that count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from models.tiny import HEADS_OF_64, SIZES, SPECIAL_TOKENS, VOCABULARY

from qlora_infer.files.safetensors import write_tensors

_LAYER = {
    "self_attn.q_proj": (128, 256),
    "self_attn.k_proj": (128, 128),
    "self_attn.v_proj": (128, 128),
    "self_attn.o_proj": (256, 128),
    "mlp.gate_proj": (128, 192),
    "mlp.up_proj": (128, 192),
    "mlp.down_proj": (192, 128),
}

#: Its linear layers, name to (in_features, out_features).
LINEAR = {f"model.layers.{layer}.{name}": shape for layer in range(2) for name, shape in _LAYER.items()}
ATTENTION = {name: shape for name, shape in LINEAR.items() if name.endswith(("q_proj", "v_proj"))}
HEAD = {"lm_head": (128, VOCABULARY)}
EMBEDDING = {"model.embed_tokens": (VOCABULARY, 128)}
#: Every module that an adapter may change.
MODULES = {**LINEAR, **HEAD, **EMBEDDING}

TOKENS = {
    name: index
    for index, name in enumerate([*SPECIAL_TOKENS, *(f"w{i}" for i in range(len(SPECIAL_TOKENS), VOCABULARY))])
}

CONFIG: dict[str, Any] = {**SIZES, **HEADS_OF_64, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def write_base(folder: Path) -> Path:
    """Write what ``inspect-adapter --base`` reads: config, headers of the weights, and vocabulary."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shapes = {name: (out, inside) for name, (inside, out) in {**LINEAR, **HEAD}.items()} | EMBEDDING
    write_tensors(
        folder / "model.safetensors", {f"{name}.weight": np.zeros(shape, "<f2") for name, shape in shapes.items()}
    )
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordLevel", "vocab": TOKENS}}))
    return folder
