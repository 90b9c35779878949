"""What vLLM computes from the copy of an adapter that it gets, read with this file's own few lines of numpy."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_FACTOR = re.compile(r"(?:base_model\.model\.)?(.+?)\.lora_(embedding_)?([AB])(?:\.weight)?")


def deltas(folder: Path) -> dict[str, np.ndarray]:
    """Return the change of each module's weight, s B A, by the names in the copy."""
    config = json.loads((folder / "adapter_config.json").read_text())
    factors: dict[str, dict[str, np.ndarray]] = {}
    embeddings = set()
    for name, tensor in _tensors(folder / "adapter_model.safetensors").items():
        if match := _FACTOR.fullmatch(name):
            factors.setdefault(match[1], {})[match[3]] = tensor
            embeddings |= {match[1]} if match[2] else set()
    found = {name: _scale(config, name) * (pair["B"] @ pair["A"]) for name, pair in factors.items()}
    return {name: delta.T if name in embeddings else delta for name, delta in found.items()}


def _scale(config: Mapping[str, Any], module: str) -> float:
    """Return the scale by the rule of ``PEFTHelper.get_rank_and_scaling`` in vLLM 0.32.0, which is PEFT's."""
    rank, alpha = (
        next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)
        for patterns, default in (
            (config.get("rank_pattern") or {}, config["r"]),
            (config.get("alpha_pattern") or {}, config["lora_alpha"]),
        )
    )
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _tensors(path: Path) -> dict[str, np.ndarray]:
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        numbers = np.frombuffer(content[begin + start : begin + stop], _TYPES[entry["dtype"]]).reshape(entry["shape"])
        found[name] = (numbers.astype("<u4") << 16).view("<f4") if entry["dtype"] == "BF16" else numbers
    return {name: tensor.astype(np.float64) for name, tensor in found.items()}
