"""The conversion of adapters that are LoRA only together with the base model, when they are held against it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import evolve, field, frozen

from qlora_infer.basewise import vera
from qlora_infer.basewise.rows import ChangedRows, differing_rows, read_tokens
from qlora_infer.basewise.vera import Vera
from qlora_infer.config import ALLOWED_RANKS
from qlora_infer.display import format_names
from qlora_infer.errors import ModelNotFoundError
from qlora_infer.files.manifest import AdapterManifest, LoRAModule, SavedTensor
from qlora_infer.files.peft_config import WRAPPERS, pattern_name, vllms_pattern_name
from qlora_infer.files.safetensors import Computed, map_tensors
from qlora_infer.files.snapshot import WEIGHTS_NAME
from qlora_infer.model.modules import ModelModules
from qlora_infer.model.weights import BaseWeights, is_embedding, is_head

if TYPE_CHECKING:
    import numpy as np

#: The way out for everything that no factors can hold.
_MERGE = "merge it into the base model with PEFT's merge_and_unload, and serve that"
#: The name of an output layer that follows the embeddings, which is in no adapter's file.
_HEAD = "lm_head"
#: Fields of a config that vLLM refuses, and that nothing is left of when an adapter is converted.
_CONVERTED = {"bias": "none", "lora_bias": False, "modules_to_save": None, "trainable_token_indices": None}


@frozen
class Conversion:
    """The parts of an adapter that become LoRA factors together with the base model.

    Attributes:
        modules: All modules of the adapter, those of the conversion with them.
        rows: The modules whose rows the adapter replaces, and which of them differ from the base model's.
        vera: The projections of a VeRA adapter.
        equal: Tensors that are the base model's, and are left out.
        is_needed: Whether vLLM cannot read the adapter as it is.
        base: The base model's tensors.
    """

    modules: Mapping[str, LoRAModule] = field(factory=dict)
    rows: Mapping[str, ChangedRows] = field(factory=dict)
    vera: Vera | None = None
    equal: Sequence[str] = ()
    is_needed: bool = False
    base: BaseWeights | None = None

    def __str__(self) -> str:
        parts = [f"{len(changed.rows)} rows of {name}" for name, changed in self.rows.items()]
        if self.equal:
            parts.append(f"without {format_names(self.equal)}, which the base model has")
        return ", ".join(parts)

    def factors(self, folder: Path) -> Iterator[tuple[str, tuple[Computed, Computed]]]:
        """Yield A and B of each module that the adapter's file has none of.

        Args:
            folder: The adapter's private copy.

        Raises:
            ModelNotFoundError: The base model's files are gone.
        """
        if not self.rows and self.vera is None:
            return
        tensors = map_tensors("", folder / WEIGHTS_NAME)
        for name, changed in self.rows.items():
            assert self.base is not None
            yield name, changed.factors(tensors[changed.tensor], self.base.tensor(changed.module, "weight"))
        if self.vera is not None:
            yield from self.vera.factors(tensors, self.modules)

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config of the adapter that it becomes; of another type than LoRA nothing of the config is left."""
        rank = None if str(config.get("peft_type", "LORA")).upper() == "LORA" else self.vera.rank if self.vera else 1
        if rank is not None:
            config = {"r": rank, "lora_alpha": rank}
        return {**config, **_CONVERTED, "peft_type": "LORA"}


def read_saved(adapter: str, manifest: AdapterManifest) -> AdapterManifest:
    """Read what an adapter holds beside LoRA factors, as far as that needs no model.

    Raises:
        CorruptAdapterError: Its tensors contradict its config.
    """
    if manifest.peft_type == "VERA":
        return vera.read_vera(adapter, manifest)
    return read_tokens(adapter, manifest)


def convert(
    manifest: AdapterManifest, model: ModelModules, base: BaseWeights | None, *, max_lora_rank: int
) -> tuple[Conversion, list[str]]:
    """Hold the tensors that are no LoRA factors against the base model's.

    Args:
        manifest: The content of the adapter's files.
        model: The modules of the model.
        base: The base model's tensors; ``None`` where there are none.
        max_lora_rank: The largest rank that the engine has room for.

    Returns:
        How they are served, and why they cannot be, each reason a sentence.
    """
    modules, projections, reasons = manifest.modules, None, list[str]()
    if manifest.peft_type == "VERA":
        projections, modules, reasons = vera.with_inputs(manifest, model)
    comparison = _Comparison(manifest, base)
    comparison.compare()
    rows = comparison.rows
    reasons += [*comparison.reasons, *_rank_reasons(rows, max_lora_rank)]
    both = sorted(set(rows) & set(modules))
    if both:
        reasons.append(
            f"It has both factors and rows of {format_names(both)}, which add up in no LoRA layer: {_MERGE}."
        )
    for name, changed in rows.items():
        sizes = (changed.size, changed.num_rows) if changed.is_output else (changed.num_rows, changed.size)
        modules = {**modules, name: LoRAModule(len(changed.rows), *sizes)}
    is_needed = bool(manifest.saved) or not _is_read_by_vllm(manifest.config, manifest.modules)
    return Conversion(modules, rows, projections, comparison.equal, is_needed, base), reasons


def _is_read_by_vllm(config: Mapping[str, Any], modules: Iterable[str]) -> bool:
    """Return whether vLLM reads a config as PEFT does; it names bare parameters otherwise in patterns."""
    if config.get("bias", "none") != "none" or config.get("lora_bias") or config.get("modules_to_save"):
        return False
    if not config.get("target_parameters"):
        return True
    has_patterns = config.get("rank_pattern") or config.get("alpha_pattern")
    is_named_alike = all(pattern_name(config, module) == vllms_pattern_name(module) for module in modules)
    return config.get("target_modules") is not None and (is_named_alike or not has_patterns)


def _rank_reasons(rows: Mapping[str, ChangedRows], max_lora_rank: int) -> Iterator[str]:
    for name, changed in rows.items():
        needed = len(changed.rows)
        if needed > ALLOWED_RANKS[-1]:
            yield (
                f"{name} differs from the base model's in {needed} of {changed.num_rows} rows, each of which takes a "
                f"rank, and vLLM serves ranks up to {ALLOWED_RANKS[-1]}: {_MERGE}."
            )
        elif needed > max_lora_rank:
            least = next(rank for rank in ALLOWED_RANKS if rank >= needed)
            yield (
                f"{name} differs from the base model's in {needed} rows, each of which takes a rank, and this engine "
                f"has room for {max_lora_rank}: start it with QuantizedLoRAEngine(max_lora_rank={least})."
            )


class _Comparison:
    """Tensors of an adapter beside those of the base model."""

    def __init__(self, manifest: AdapterManifest, base: BaseWeights | None) -> None:
        self._manifest = manifest
        self._base = base
        self.rows: dict[str, ChangedRows] = {}
        self.equal: list[str] = []
        self.reasons: list[str] = []
        self._others: list[str] = []
        self._unread: dict[str, list[str]] = {}

    def compare(self) -> None:
        """Compare all of them, and note what is equal, what differs, and what cannot be served."""
        biases: list[str] = []
        for name, tensor in self._manifest.saved.items():
            if tensor.kind.startswith("vera_"):
                continue
            if tensor.module.endswith(".lora_B"):
                (self.equal if name in self._manifest.zeros else biases).append(f"{tensor.module}.{tensor.kind}")
                continue
            try:
                self._compare(name, tensor)
            except ModelNotFoundError as error:
                self._unread.setdefault(str(error), []).append(f"{tensor.module}.{tensor.kind}")
        self._explain(biases)

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
                f"token embeddings ({_MERGE})."
            )
            return
        if has_rows and tokens is None and tensor.shape[0] < len(theirs) and tensor.shape[1:] == theirs.shape[1:]:
            self.reasons.append(
                f"It has {tensor.shape[0]} rows of {module}, and the model has {len(theirs)}: it was trained on one "
                f"that was made smaller ({_MERGE})."
            )
            return
        if tensor.shape != ((len(tokens), *theirs.shape[1:]) if tokens is not None else theirs.shape):
            self._others.append(f"{module}.{parameter}")
            return
        places = self._differing(name, tensor, theirs)
        if not places:
            self.equal.append(f"{module}.{parameter}" if tokens is None else f"{len(tokens)} rows of {module}")
        elif not has_rows:
            self._others.append(f"{module}.{parameter}")
        else:
            rows = tuple(places if tokens is None else (tokens[place] for place in places))
            changed = ChangedRows(name, module, tuple(places), rows, theirs.shape[0], theirs.shape[1], is_head(module))
            self.rows[tensor.module] = changed
            if not changed.is_output and self._is_tied(tensor):
                self.rows[_HEAD] = evolve(changed, is_output=True)

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

    def _explain(self, biases: Sequence[str]) -> None:
        copied = _copied_modules(self._manifest)
        if copied and not any(tensor.kind in ("weight", "bias") for tensor in self._manifest.saved.values()):
            self.reasons.append(
                f"It replaces whole modules (modules_to_save={format_names(copied)}), and its file has none of their "
                "weights: save it again with PEFT."
            )
        if biases:
            self.reasons.append(
                f"It has LoRA biases (lora_bias) that are not zero ({format_names(biases)}), which vLLM does not "
                "apply: train with lora_bias=False."
            )
        if self._others:
            self.reasons.append(
                f"It replaces {format_names(self._others)}, which differ from the base model's, and vLLM serves LoRA "
                f"factors only: {_MERGE}, or train without modules_to_save and bias."
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
