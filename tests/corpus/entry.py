"""An entry of the corpus: a kind of adapter, the function that makes one, and the verdict on it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from attrs import evolve, field, frozen

from corpus.base import ATTENTION
from qlora_infer.errors import AdapterError, IncompatibleAdapterError

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

#: The changes of weights that an adapter stands for, by the model's names.
Deltas = Mapping[str, np.ndarray]
Tensors = dict[str, np.ndarray]

#: What PEFT 0.21 writes of an adapter for a task.
_FIELDS: dict[str, Any] = {
    "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": "org/base", "bias": "none", "exclude_modules": None,
    "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "layer_replication": None,
    "layers_pattern": None, "layers_to_transform": None, "lora_bias": False, "lora_dropout": 0.0, "modules_to_save": None,
    "peft_type": "LORA", "peft_version": "0.21.2", "rank_pattern": {}, "revision": None, "target_parameters": None,
    "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_dora": False, "use_rslora": False,
}  # fmt: skip


@frozen
class Files:
    """The content of an adapter's folder.

    Attributes:
        config: The content of ``adapter_config.json``; ``None`` for none.
        tensors: Those of ``adapter_model.safetensors``; ``None`` for none.
        deltas: The changes of weights that they stand for, where they are known.
        others: Other files by name, or instead of those two: bytes, text, or what JSON has.
        dtype: The type that the tensors are saved in.
    """

    config: Mapping[str, Any] | None
    tensors: Tensors | None
    deltas: Deltas = field(factory=dict)
    others: Mapping[str, Any] = field(factory=dict)
    dtype: str = "F32"

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if self.config is not None:
            (folder / CONFIG_NAME).write_text(json.dumps(self.config, indent=2))
        if self.tensors is not None:
            (folder / WEIGHTS_NAME).write_bytes(safetensors(self.tensors, self.dtype))
        for name, content in self.others.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                path.write_text(content if isinstance(content, str) else json.dumps(content))

    def with_config(self, **fields: Any) -> Files:
        return evolve(self, config={**(self.config or {}), **fields})

    def without_fields(self, *names: str) -> Files:
        return evolve(self, config={name: value for name, value in (self.config or {}).items() if name not in names})

    def renamed(self, rename: Callable[[str], str]) -> Files:
        return evolve(self, tensors={rename(name): tensor for name, tensor in (self.tensors or {}).items()})

    def with_tensors(self, **tensors: np.ndarray) -> Files:
        return evolve(self, tensors={**(self.tensors or {}), **tensors})

    def beside(self, **others: Any) -> Files:
        """Add files by their names, with ``__`` for a dot."""
        return evolve(self, others={**self.others, **{n.replace("__", "."): content for n, content in others.items()}})


@frozen
class Entry:
    """A kind of adapter.

    Attributes:
        name: The name of the function that makes one.
        kind: What it is, in a phrase.
        origin: The trainer or tool that it comes from.
        make: Writes one into a folder, and returns the changes of weights that it stands for, where they are known.
        error: The type of the error that refuses it; ``None`` where it is served.
        says: The reasons of an ``IncompatibleAdapterError``, each a sentence; of other errors the message. The
            adapter's folder is FOLDER in it, the base model's BASE.
        way_out: The next step for somebody who has one, for the errors page.
        warnings: Parts of the log's warnings, one for each.
        is_read_by_peft: Whether PEFT reads such a folder as it is, so that its changes can be compared.
        needs: Packages that make one.
        is_refused_alone: Whether ``inspect-adapter`` without a base refuses it.
        is_about_zeros: Whether its verdict needs the weights of ``write_base``, which are zeros.
    """

    name: str
    kind: str
    origin: str
    make: Callable[[Path], Deltas]
    error: type[AdapterError] | None = None
    says: tuple[str, ...] = ()
    way_out: str = ""
    warnings: tuple[str, ...] = ()
    is_read_by_peft: bool = True
    needs: tuple[str, ...] = ()
    is_refused_alone: bool = True
    is_about_zeros: bool = False

    def __str__(self) -> str:
        return self.name


Maker = Callable[[], Files]


def served(kind: str, origin: str, **fields: Any) -> Callable[[Maker], Entry]:
    """Make an entry of a function that returns the files of an adapter that is served."""
    return lambda make: Entry(make.__name__, kind, origin, _writer(make), **fields)


def refused(
    kind: str,
    origin: str,
    *says: str,
    way_out: str,
    error: type[AdapterError] = IncompatibleAdapterError,
    **fields: Any,
) -> Callable[[Maker], Entry]:
    """Make an entry of a function that returns the files of an adapter that is refused."""
    return lambda make: Entry(
        make.__name__, kind, origin, _writer(make), error=error, says=says, way_out=way_out, **fields
    )


def _writer(make: Maker) -> Callable[[Path], Deltas]:
    def write(folder: Path) -> Deltas:
        files = make()
        files.write(folder)
        return files.deltas

    return write


def lora(
    modules: Mapping[str, tuple[int, int]] = ATTENTION,
    *,
    rank: int = 8,
    alpha: float = 16,
    ranks: Mapping[str, int] = {},
    scales: Mapping[str, float] = {},
    dtype: str = "F32",
    **config: Any,
) -> Files:
    """Return a LoRA adapter with random factors, and the changes that they stand for by PEFT's rule: s B A.

    Args:
        modules: Its modules, name to (in_features, out_features).
        rank: The rank of every module that ``ranks`` does not name by the end of its name.
        alpha: ``lora_alpha``.
        ranks: Other modules' ranks.
        scales: The scales of modules that differ from alpha / rank.
        dtype: The type that the tensors are saved in.
        **config: Further fields of its config.
    """
    tensors: Tensors = {}
    deltas: dict[str, np.ndarray] = {}
    for name, (inputs, outputs) in modules.items():
        generator = np.random.default_rng(zlib.crc32(name.encode()))
        own_rank = _by_ending(ranks, name, rank)
        a, b = (_rounded(generator.normal(0, 0.08, shape)) for shape in ((own_rank, inputs), (outputs, own_rank)))
        is_embedding = name.endswith("embed_tokens")
        spelling = "lora_embedding_{}" if is_embedding else "lora_{}.weight"
        tensors[f"{PREFIX}{name}.{spelling.format('A')}"] = a
        tensors[f"{PREFIX}{name}.{spelling.format('B')}"] = b
        delta = _by_ending(scales, name, alpha / own_rank) * (b @ a)
        deltas[name] = delta.T if is_embedding else delta
    targets = sorted({name.rpartition(".")[2] for name in modules})
    fields = {**_FIELDS, "r": rank, "lora_alpha": alpha, "target_modules": targets, **config}
    return Files(fields, tensors, deltas, dtype=dtype)


def _by_ending(values: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((value for ending, value in values.items() if name.endswith(ending)), default)


def _rounded(array: np.ndarray) -> np.ndarray:
    """Return the numbers that bfloat16 can represent, so that every dtype has the same ones."""
    bits = array.astype("<f4").view("<u4") & 0xFFFF0000
    return bits.view("<f4").astype(np.float64)


def safetensors(tensors: Tensors, dtype: str = "F32", metadata: Mapping[str, str] | None = None) -> bytes:
    """Return a safetensors file; tensors of integers are saved as such."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    parts: list[bytes] = []
    for name, array in tensors.items():
        own = "I8" if array.dtype == np.int8 else dtype
        parts.append(_bytes(array, own))
        end = sum(map(len, parts))
        header[name] = {"dtype": own, "shape": list(array.shape), "data_offsets": [end - len(parts[-1]), end]}
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + b"".join(parts)


def _bytes(array: np.ndarray, dtype: str) -> bytes:
    if dtype == "BF16":
        return (array.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return array.astype({"F64": "<f8", "F32": "<f4", "F16": "<f2", "I8": "i1"}[dtype]).tobytes()
