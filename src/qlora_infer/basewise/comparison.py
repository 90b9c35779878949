"""An adapter's tensors that are no LoRA factors beside those of the base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from attrs import evolve

from qlora_infer.basewise.biases import AddedBias
from qlora_infer.basewise.rows import ChangedRows, differing_rows
from qlora_infer.display import format_names
from qlora_infer.errors import ModelNotFoundError
from qlora_infer.files.manifest import AdapterManifest, LoRAModule, SavedTensor
from qlora_infer.files.peft_config import WRAPPERS, scaling
from qlora_infer.files.safetensors import map_tensors
from qlora_infer.files.snapshot import WEIGHTS_NAME
from qlora_infer.model.modules import ModelModules
from qlora_infer.model.weights import BaseWeights, is_embedding, is_head

if TYPE_CHECKING:
    import numpy as np

#: The way out for everything that no factors can hold.
MERGE = "merge it into the base model with PEFT's merge_and_unload, and serve that"
#: The name of an output layer that follows the embeddings, which is in no adapter's file.
_HEAD = "lm_head"


class Comparison:
    """Tensors of an adapter beside those of the base model."""

    def __init__(self, manifest: AdapterManifest, base: BaseWeights | None, model: ModelModules) -> None:
        self._manifest = manifest
        self._base = base
        self._model = model
        self.rows: dict[str, ChangedRows] = {}
        self.biases: dict[str, list[AddedBias]] = {}
        self.equal: list[str] = []
        self.reasons: list[str] = []
        self._others: list[str] = []
        self._unread: dict[str, list[str]] = {}

    def compare(self) -> None:
        """Compare all of them, and note what is equal, what differs, and what cannot be served."""
        for name, tensor in self._manifest.saved.items():
            if tensor.kind.startswith("vera_"):
                continue
            if tensor.module.endswith(".lora_B"):
                self._add_lora_bias(name, tensor)
                continue
            try:
                self._compare(name, tensor)
            except ModelNotFoundError as error:
                self._unread.setdefault(str(error), []).append(f"{tensor.module}.{tensor.kind}")
        self._explain()

    def size(self, module: str) -> LoRAModule | None:
        """Return the sizes of a linear layer of the model, with the rank of factors of zeros; ``None`` for no such."""
        shape = self._model.shapes.get(self._model.locate(module) or "")
        return None if shape is None or shape.num_experts else LoRAModule(1, shape.in_features, shape.out_features)

    def _add_lora_bias(self, name: str, tensor: SavedTensor) -> None:
        module = tensor.module.removesuffix(".lora_B")
        own = self._manifest.modules.get(module)
        if name in self._manifest.zeros:
            self.equal.append(f"{tensor.module}.{tensor.kind}")
        elif own is None or own.num_experts or tensor.shape != (own.out_features,) or tensor.kind != "bias":
            self._others.append(f"{tensor.module}.{tensor.kind}")
        else:
            scale = scaling(self._manifest.config, module, own.rank)
            self.biases.setdefault(module, []).append(AddedBias(name, scale))

    def _compare(self, name: str, tensor: SavedTensor) -> None:
        if self._base is None:
            raise ModelNotFoundError("there is no base model to compare with")
        tokens = tensor.tokens
        module = ".".join(part for part in tensor.module.split(".") if part not in WRAPPERS)
        parameter = "weight" if tokens is not None else tensor.kind
        theirs = self._base.tensor(module, parameter)
        has_rows = parameter == "weight" and theirs.ndim == 2 and (is_embedding(module) or is_head(module))
        if tokens is not None and not has_rows:
            self._others.append(f"{module}.{parameter}")
            return
        if has_rows and _is_resized(tensor, theirs):
            self.reasons.append(
                f"It has rows of {module} for tokens that the model lacks, which has {len(theirs)}: vLLM serves no new "
                f"token embeddings ({MERGE})."
            )
            return
        if has_rows and tokens is None and tensor.shape[0] < len(theirs) and tensor.shape[1:] == theirs.shape[1:]:
            self.reasons.append(
                f"It has {tensor.shape[0]} rows of {module}, and the model has {len(theirs)}: it was trained on one "
                f"that was made smaller ({MERGE})."
            )
            return
        if tensor.shape != ((len(tokens), *theirs.shape[1:]) if tokens is not None else theirs.shape):
            self._others.append(f"{module}.{parameter}")
            return
        places = self._differing(name, tensor, theirs)
        if not places:
            self.equal.append(f"{module}.{parameter}" if tokens is None else f"{len(tokens)} rows of {module}")
        elif parameter == "bias" and theirs.ndim == 1 and self._is_linear(tensor.module):
            self.biases.setdefault(tensor.module, []).append(AddedBias(name, base=theirs))
        elif not has_rows:
            self._others.append(f"{module}.{parameter}")
        else:
            rows = tuple(places if tokens is None else (tokens[place] for place in places))
            changed = ChangedRows(name, module, tuple(places), rows, theirs.shape[0], theirs.shape[1], is_head(module))
            self.rows[tensor.module] = changed
            if not changed.is_output and self._is_tied(tensor):
                self.rows[_HEAD] = evolve(changed, is_output=True)

    def _is_linear(self, module: str) -> bool:
        own = self._manifest.modules.get(module) or self.size(module)
        return own is not None and not own.num_experts

    def _differing(self, name: str, tensor: SavedTensor, theirs: np.ndarray) -> Sequence[int]:
        """Return the rows of an adapter's tensor that differ from the base model's; a vector has one."""
        ours = self._tensors[name]
        if tensor.tokens is not None:
            return differing_rows(ours, theirs[list(tensor.tokens)])
        if ours.ndim == 2:
            return differing_rows(ours, theirs)
        return differing_rows(ours.reshape(1, -1), theirs.reshape(1, -1))

    @cached_property
    def _tensors(self) -> Mapping[str, np.ndarray]:
        """The adapter's tensors."""
        return map_tensors("", self._manifest.folder / WEIGHTS_NAME)

    def _is_tied(self, tensor: SavedTensor) -> bool:
        """Return whether PEFT makes the output layer follow an embedding.

        Tokens do where the base model ties the two; a whole module is a copy of its own, unless it is to be tied
        (``set_additional_trainable_modules`` in ``utils/other.py``, PEFT 0.21.2). What PEFT saved of a resized
        embedding is loaded into the base model, whose output layer it then is, too.
        """
        assert self._base is not None
        if any(is_head(other.module) for other in self._manifest.saved.values()) or not self._base.ties_embeddings:
            return False
        is_copy = tensor.tokens is None and any(map(tensor.module.endswith, _copied_modules(self._manifest)))
        return not is_copy or bool(self._manifest.config.get("ensure_weight_tying"))

    def _explain(self) -> None:
        copied = _copied_modules(self._manifest)
        if copied and not any(tensor.kind in ("weight", "bias") for tensor in self._manifest.saved.values()):
            self.reasons.append(
                f"It replaces whole modules (modules_to_save={format_names(copied)}), and its file has none of their "
                "weights: save it again with PEFT."
            )
        if self._others:
            self.reasons.append(
                f"It replaces {format_names(self._others)}, which differ from the base model's, and vLLM serves LoRA "
                f"factors only: {MERGE}, or train without modules_to_save and bias."
            )
        for why, names in self._unread.items():
            self.reasons.append(
                f"It replaces {format_names(names)}, which must be compared with the base model's own, and these "
                f"cannot be had: {why}."
            )


def _copied_modules(manifest: AdapterManifest) -> list[str]:
    """Return the names in ``modules_to_save``, which may be anything in a file that PEFT has not written."""
    said = manifest.config.get("modules_to_save")
    return [str(name) for name in said] if isinstance(said, list) else []


def _is_resized(tensor: SavedTensor, theirs: np.ndarray) -> bool:
    if tensor.tokens is not None:
        return max(tensor.tokens, default=0) >= len(theirs)
    return len(tensor.shape) == 2 and tensor.shape[0] > len(theirs) and tensor.shape[1:] == theirs.shape[1:]
