"""The conversion of adapters that are LoRA only together with the base model, when they are held against it."""

from __future__ import annotations

import functools
import operator
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from qlora_infer.basewise import vera
from qlora_infer.basewise.biases import AddedBias, no_factors
from qlora_infer.basewise.comparison import MERGE, Comparison
from qlora_infer.basewise.rows import ChangedRows, read_tokens
from qlora_infer.basewise.vera import Vera
from qlora_infer.config import ALLOWED_RANKS
from qlora_infer.display import format_names
from qlora_infer.files.manifest import AdapterManifest, LoRAModule
from qlora_infer.files.peft_config import pattern_name, vllms_pattern_name
from qlora_infer.files.safetensors import Computed, map_tensors
from qlora_infer.files.snapshot import WEIGHTS_NAME
from qlora_infer.model.modules import ModelModules
from qlora_infer.model.weights import BaseWeights

if TYPE_CHECKING:
    import numpy as np

#: Fields of a config that vLLM refuses, and that nothing is left of when an adapter is converted.
_CONVERTED = {"bias": "none", "lora_bias": False, "modules_to_save": None, "trainable_token_indices": None}


@frozen
class Conversion:
    """The parts of an adapter that become LoRA factors together with the base model.

    Attributes:
        modules: All modules of the adapter, those of the conversion with them.
        rows: The modules whose rows the adapter replaces, and which of them differ from the base model's.
        vera: The projections of a VeRA adapter.
        biases: The modules to whose outputs the adapter adds biases.
        bare: Those of them that it has no factors for.
        equal: Tensors that are the base model's, and are left out.
        is_needed: Whether vLLM cannot read the adapter as it is.
        base: The base model's tensors.
    """

    modules: Mapping[str, LoRAModule] = field(factory=dict)
    rows: Mapping[str, ChangedRows] = field(factory=dict)
    vera: Vera | None = None
    biases: Mapping[str, Sequence[AddedBias]] = field(factory=dict)
    bare: Collection[str] = ()
    equal: Sequence[str] = ()
    is_needed: bool = False
    base: BaseWeights | None = None

    def __str__(self) -> str:
        parts = [f"{len(changed.rows)} rows of {name}" for name, changed in self.rows.items()]
        if self.biases:
            parts.append(f"with biases of {format_names(self.biases)}")
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
        for name in self.bare:
            yield name, no_factors(self.modules[name])
        if not self.rows and self.vera is None:
            return
        tensors = map_tensors("", folder / WEIGHTS_NAME)
        for name, changed in self.rows.items():
            assert self.base is not None
            yield name, changed.factors(tensors[changed.tensor], self.base.tensor(changed.module, "weight"))
        if self.vera is not None:
            yield from self.vera.factors(tensors, self.modules)

    def shifts(self, folder: Path) -> dict[str, np.ndarray]:
        """Return what the adapter adds to the outputs of modules, by their names.

        Args:
            folder: The adapter's private copy.
        """
        tensors = map_tensors("", folder / WEIGHTS_NAME) if self.biases else {}
        shifts = {name: [bias.shift(tensors) for bias in biases] for name, biases in self.biases.items()}
        return {name: functools.reduce(operator.add, of_module) for name, of_module in shifts.items()}

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
    comparison = Comparison(manifest, base, model)
    comparison.compare()
    rows = comparison.rows
    reasons += [*comparison.reasons, *_rank_reasons(rows, max_lora_rank)]
    both = sorted(set(rows) & set(modules))
    if both:
        reasons.append(f"It has both factors and rows of {format_names(both)}, which add up in no LoRA layer: {MERGE}.")
    for name, changed in rows.items():
        sizes = (changed.size, changed.num_rows) if changed.is_output else (changed.num_rows, changed.size)
        modules = {**modules, name: LoRAModule(len(changed.rows), *sizes)}
    sizes_of_bare = {name: comparison.size(name) for name in comparison.biases if name not in modules}
    bare = {name: size for name, size in sizes_of_bare.items() if size is not None}
    is_needed = bool(manifest.saved) or not _is_read_by_vllm(manifest.config, manifest.modules)
    conversion = Conversion(
        {**modules, **bare}, rows, projections, comparison.biases, bare.keys(), comparison.equal, is_needed, base
    )
    return conversion, reasons


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
                f"rank, and vLLM serves ranks up to {ALLOWED_RANKS[-1]}: {MERGE}."
            )
        elif needed > max_lora_rank:
            least = next(rank for rank in ALLOWED_RANKS if rank >= needed)
            yield (
                f"{name} differs from the base model's in {needed} rows, each of which takes a rank, and this engine "
                f"has room for {max_lora_rank}: start it with QuantizedLoRAEngine(max_lora_rank={least})."
            )
