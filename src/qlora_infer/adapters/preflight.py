"""Whether an adapter fits the running model: every reason why not, in words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from attrs import frozen

from qlora_infer.adapters.manifest import AdapterManifest, LoRAModule
from qlora_infer.config import ALLOWED_RANKS
from qlora_infer.errors import IncompatibleAdapterError

#: As many kinds of modules with another shape are told one by one; a model has seven or so.
MAX_KINDS = 8

_LAYER = re.compile(r"\.(\d+)\.")


@frozen
class ModuleShape:
    """A module of the running model that an adapter may change.

    Attributes:
        in_features: Its input size; of an embedding, its vocabulary.
        out_features: Its output size.
    """

    in_features: int
    out_features: int


@frozen
class Fit:
    """How an adapter fits: all of its modules are modules of the model.

    Attributes:
        num_modules: The modules that the adapter changes.
        num_model_modules: The modules that an adapter may change.
    """

    num_modules: int
    num_model_modules: int

    def __str__(self) -> str:
        return f"applied to {self.num_modules} of {self.num_model_modules} modules"


def lora_rank_for(ranks: Iterable[int]) -> int:
    """The smallest ``max_lora_rank`` that vLLM takes and that is enough for all of ``ranks``.

    Above the largest that vLLM takes, 512, it is that one: preflight then refuses what is over it.
    """
    needed = max(ranks)
    return next((rank for rank in ALLOWED_RANKS if rank >= needed), ALLOWED_RANKS[-1])


def check(
    adapter: str, manifest: AdapterManifest, model_modules: Mapping[str, ModuleShape], *, max_lora_rank: int
) -> Fit:
    """Hold an adapter against the running model.

    Args:
        adapter: The adapter's name, for the message.
        manifest: What the adapter says of itself.
        model_modules: The model's modules that adapters may change, by name.
        max_lora_rank: The largest rank that the engine has room for.

    Returns:
        How it fits.

    Raises:
        IncompatibleAdapterError: It does not; ``reasons`` holds every reason.
    """
    reasons = [*manifest.unsupported, *_rank_reasons(manifest, max_lora_rank)]
    if manifest.modules or not reasons:
        reasons += _module_reasons(manifest.modules, model_modules)
    if reasons:
        raise IncompatibleAdapterError(adapter, reasons)
    return Fit(len(manifest.modules), len(model_modules))


def _rank_reasons(manifest: AdapterManifest, max_lora_rank: int) -> Iterator[str]:
    if manifest.rank <= max_lora_rank:
        return
    if manifest.rank > ALLOWED_RANKS[-1]:
        yield f"It has rank {manifest.rank}, and vLLM serves ranks up to {ALLOWED_RANKS[-1]}."
    else:
        yield (
            f"It has rank {manifest.rank}, and this engine has room for {max_lora_rank}: start it with "
            f"QuantizedLoRAEngine(max_lora_rank={lora_rank_for([manifest.rank])})."
        )


def _module_reasons(modules: Mapping[str, LoRAModule], model_modules: Mapping[str, ModuleShape]) -> Iterator[str]:
    unknown = [name for name in modules if name not in model_modules]
    if len(unknown) == len(modules):
        yield (
            f"None of its {len(modules)} modules is in this model ({_listed(unknown)}; the model has "
            f"{_listed(list(model_modules))}): it was trained on another architecture."
        )
        return
    if unknown:
        yield (
            f"It has {len(unknown)} modules that this model does not have: "
            f"{_listed(unknown)}{_say_layers(model_modules)}."
        )
    yield from _shape_reasons(modules, model_modules)


def _shape_reasons(modules: Mapping[str, LoRAModule], model_modules: Mapping[str, ModuleShape]) -> Iterator[str]:
    """One sentence for each kind of module whose shape differs, however many layers it is in."""
    differing: dict[tuple[str, LoRAModule, ModuleShape], int] = {}
    for name, module in modules.items():
        shape = model_modules.get(name)
        if shape is not None and shape != ModuleShape(module.in_features, module.out_features):
            kind = (name.rpartition(".")[2], module, shape)
            differing[kind] = differing.get(kind, 0) + 1
    for (name, module, shape), count in list(differing.items())[:MAX_KINDS]:
        yield (
            f"{name} has {module.in_features} inputs and {module.out_features} outputs in it, "
            f"{shape.in_features} and {shape.out_features} in the model ({count} modules): "
            "it was trained on a model of another size."
        )
    if len(differing) > MAX_KINDS:
        yield f"{len(differing) - MAX_KINDS} other kinds of modules have other shapes than the model's, too."


def _say_layers(model_modules: Mapping[str, ModuleShape]) -> str:
    layers = [int(match[1]) for name in model_modules if (match := _LAYER.search(name))]
    return f" (its layers are 0 to {max(layers)})" if layers else ""


def _listed(names: Sequence[str]) -> str:
    return ", ".join(name[:120] for name in names[:3]) + (", …" if len(names) > 3 else "")
