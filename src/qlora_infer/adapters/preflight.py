"""The check that an adapter fits the running model, with every reason why it does not."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from attrs import field, frozen

from qlora_infer.adapters.placement import Placement, place
from qlora_infer.basewise.conversion import Conversion, convert
from qlora_infer.config import ALLOWED_RANKS
from qlora_infer.display import format_names
from qlora_infer.errors import IncompatibleAdapterError
from qlora_infer.files.extras import Extras, check_tokens, with_model_tokens
from qlora_infer.files.manifest import AdapterManifest, LoRAModule
from qlora_infer.model.modules import ModelModules, ModuleShape
from qlora_infer.model.weights import BaseWeights

#: As many kinds of modules with another shape are told one by one; a model has seven or so.
MAX_KINDS = 8

#: As many of the model's names are compared with one that it does not have.
MAX_COMPARED = 2000

#: Embeddings and output layers, as vLLM's classes name them.
_NO_LINEAR_LAYERS = frozenset({"embed_tokens", "wte", "lm_head"})

_LAYER = re.compile(r"\.(\d+)\.")
_EXPERTS = re.compile(r"\.experts(\.|$)")

#: Modules one side of which is the vocabulary.
_EMBEDDINGS = frozenset({"embed_tokens", "wte"})
_HEADS = frozenset({"lm_head", "embed_out"})


@frozen
class Fit:
    """The fit of an adapter: each of its modules is a module of the model, or of a part that text does not pass.

    Attributes:
        num_modules: The modules that the adapter changes.
        num_model_modules: The modules that an adapter may change.
        placement: Where each of its modules goes; those of vision and audio towers are left out, which is exact for
            prompts of text alone.
        stripped: What was left out of the names of its tensors: those of wrappers, and the adapter's own.
        conversion: The part of it that becomes factors together with the base model.
        has_magnitudes: It is DoRA.
    """

    num_modules: int
    num_model_modules: int
    placement: Placement = field(factory=lambda: Placement({}), repr=False, eq=False)
    stripped: Sequence[str] = ()
    conversion: Conversion = field(factory=Conversion, repr=False, eq=False)
    has_magnitudes: bool = False

    def is_vllms_own(self, model: ModelModules) -> bool:
        """Return whether vLLM would read all of it so by itself, from the adapter's own files."""
        is_plain = not (self.stripped or self.conversion.is_needed or self.has_magnitudes)
        return is_plain and self.placement.is_vllms_own(model)

    def changes_nothing(self, manifest: AdapterManifest) -> bool:
        """Return whether A or B is all zeros in each module that is applied, and no bias is changed."""
        return self.placement.sources <= manifest.zero_modules - set(self.conversion.biases)

    def __str__(self) -> str:
        applied = f"applied to {self.num_modules} of {self.num_model_modules} modules"
        if self.stripped:
            applied += f", whose names were read without {' and '.join(map(repr, self.stripped))}"
        if converted := str(self.conversion):
            applied += f", {converted}"
        left_out, names = self.placement.left_out, format_names(self.placement.left_out)
        if not left_out:
            return applied
        return f"{applied}; {len(left_out)} of vision or audio ({names}) are left out, which is exact for text"


def lora_rank_for(ranks: Iterable[int]) -> int:
    """Return the smallest ``max_lora_rank`` that vLLM takes and that is enough for all of ``ranks``.

    Above the largest that vLLM takes, 512, it is that one: preflight then refuses what is over it.
    """
    needed = max(ranks)
    return next((rank for rank in ALLOWED_RANKS if rank >= needed), ALLOWED_RANKS[-1])


def reasons_on_any_model(manifest: AdapterManifest) -> tuple[str, ...]:
    """Return why no engine can serve an adapter, whatever its model; empty where one may."""
    foreign = [manifest.foreign] if manifest.foreign else []
    return *manifest.unsupported, *foreign, *_rank_reasons(manifest, ALLOWED_RANKS[-1])


def check(
    adapter: str,
    manifest: AdapterManifest,
    model: ModelModules,
    *,
    max_lora_rank: int,
    base: BaseWeights | None = None,
) -> Fit:
    """Hold an adapter against a model.

    Args:
        adapter: The adapter's name, for the message.
        manifest: The content of the adapter's files.
        model: The modules of the running model, or of a checkpoint.
        max_lora_rank: The largest rank that the engine has room for.
        base: The base model's tensors, for an adapter that is LoRA only together with them.

    Returns:
        How it fits.

    Raises:
        IncompatibleAdapterError: It does not; ``reasons`` holds every reason.
    """
    conversion, faults = convert(manifest, model, base, max_lora_rank=max_lora_rank)
    modules = conversion.modules
    reasons = [*manifest.unsupported, *_rank_reasons(manifest, max_lora_rank), *faults]
    placement = place(modules, model)
    if manifest.foreign and not placement.pieces:
        reasons.append(manifest.foreign)
    elif modules or not reasons:
        reasons += _absence_reasons(placement, modules, model)
        reasons += _repetition_reasons(placement)
        reasons += _shape_reasons(placement, model)
        reasons += _vector_reasons("uses DoRA", manifest.magnitudes, "use_dora=False", placement, model)
        reasons += _vector_reasons(
            "adds biases of its own", conversion.biases, "lora_bias=False and bias='none'", placement, model
        )
    if reasons:
        raise IncompatibleAdapterError(adapter, reasons)
    stripped = *placement.wrappers, *filter(None, [manifest.name_in_tensors[:80]])
    return Fit(len(placement.sources), len(model.shapes), placement, stripped, conversion, bool(manifest.magnitudes))


def check_with_extras(
    adapter: str,
    manifest: AdapterManifest,
    extras: Extras,
    model: ModelModules,
    *,
    vocabulary: Callable[[], Mapping[str, int] | None],
    max_lora_rank: int,
    base: BaseWeights | None = None,
    strict: bool = False,
) -> tuple[Fit, Extras]:
    """Hold an adapter and what it carries against a model: the whole verdict, of an engine and of ``inspect-adapter``.

    Args:
        adapter: The adapter's name, for the message.
        manifest: The content of the adapter's files.
        extras: What it carries.
        model: The modules of the running model, or of a checkpoint.
        vocabulary: Returns the tokens of the model's tokenizer; ``None`` where any token is known.
        max_lora_rank: The largest rank that the engine has room for.
        base: The base model's tensors, for an adapter that is LoRA only together with them.
        strict: Refuse stop tokens that the model does not have.

    Returns:
        How it fits, and what it carries, fitted to the model's tokens.

    Raises:
        IncompatibleAdapterError: It does not fit; ``reasons`` holds every reason.
    """
    fit = check(adapter, manifest, model, max_lora_rank=max_lora_rank, base=base)
    if extras.file_names:
        tokens = vocabulary()
        check_tokens(adapter, extras, tokens, strict=strict)
        extras = with_model_tokens(extras, tokens)
    return fit, extras


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


def _absence_reasons(placement: Placement, modules: Mapping[str, LoRAModule], model: ModelModules) -> Iterator[str]:
    """Say which modules are not there, or are there and not adapted by vLLM."""
    if not modules:
        yield "It has no modules."
        return
    unadapted = [name for name in placement.absent if model.why_unadapted(name)]
    experts = [name for name in unadapted if _EXPERTS.search(name) and model.device in ("", "cpu")]
    others = [name for name in unadapted if name not in experts]
    unknown = [name for name in placement.absent if name not in unadapted]
    if experts:
        device = f" ({model.device})" if model.device else ""
        yield (
            f"It changes experts ({format_names(experts)}), for which vLLM has no LoRA on this device{device}: "
            "serve it on a GPU, or train attention only."
        )
    if others:
        yield (
            f"It changes {format_names(others)}, which vLLM does not adapt in {model.model or 'this model'}: "
            "train it without them."
        )
    if unknown and len(unknown) == len(modules):
        yield f"None of its {len(modules)} modules is in this model: {_names_beside(unknown, modules, model)}."
    elif unknown:
        names = format_names(unknown)
        yield f"It has {len(unknown)} modules that this model does not have: {names}{_format_layers(model)}."
    elif not placement.pieces and not unadapted:
        names = format_names(placement.left_out)
        yield f"All of its modules ({names}) are of vision or audio, which text does not pass."


def _names_beside(unknown: Sequence[str], modules: Mapping[str, LoRAModule], model: ModelModules) -> str:
    """Name a module of the adapter and the model's nearest, and say so where names and sizes are another model's."""
    beside = f"it has {format_names(unknown)}; the model has {_nearest(unknown[0], list(model.shapes))}"
    sizes = {(shape.in_features, shape.out_features) for shape in model.shapes.values()}
    if any((modules[name].in_features, modules[name].out_features) in sizes for name in unknown):
        return beside
    kinds = {name.rpartition(".")[2] for name in model.shapes}
    if any(name.rpartition(".")[2] in kinds for name in unknown):
        return f"{beside}. Their sizes differ, too: it was trained on another model"
    return f"{beside}. Their sizes differ, too: it was trained on another architecture"


def _nearest(name: str, names: Sequence[str]) -> str:
    same_kind = [other for other in names if other.rpartition(".")[2] == name.rpartition(".")[2]]
    nearest = difflib.get_close_matches(name, (same_kind or names)[:MAX_COMPARED], n=1, cutoff=0)
    return format_names([*nearest, *(other for other in names if other not in nearest)])


def _repetition_reasons(placement: Placement) -> Iterator[str]:
    """Refuse two modules of an adapter that are one in the model; one of them would be lost."""
    for one, other in placement.repeated[:1]:
        yield f"Its modules {one[:120]} and {other[:120]} are one in this model: keep one of them."


def _shape_reasons(placement: Placement, model: ModelModules) -> Iterator[str]:
    """One sentence for each kind of module whose shape differs, however many layers it is in."""
    differing: dict[tuple[str, LoRAModule, ModuleShape], int] = {}
    for name, piece in placement.pieces.items():
        module, shape = piece.module, model.shapes[name]
        if shape != ModuleShape(module.in_features, module.out_features, module.num_experts):
            kind = (name.rpartition(".")[2], module, shape)
            differing[kind] = differing.get(kind, 0) + 1
    for (name, module, shape), count in list(differing.items())[:MAX_KINDS]:
        yield _shape_reason(name, module, shape, count)
    if len(differing) > MAX_KINDS:
        yield f"{len(differing) - MAX_KINDS} other kinds of modules have other shapes than the model's, too."


def _shape_reason(name: str, module: LoRAModule, shape: ModuleShape, count: int) -> str:
    if module.num_experts != shape.num_experts:
        return (
            f"{name} has factors of {module.num_experts or 'no'} experts in it, of {shape.num_experts or 'no'} in the "
            f"model ({count} modules): it was trained on a model of another size."
        )
    is_vocabulary = (name in _EMBEDDINGS and module.out_features == shape.out_features) or (
        name in _HEADS and module.in_features == shape.in_features
    )
    why = (
        "its vocabulary was resized, or is another model's: train it without new tokens"
        if is_vocabulary
        else "it was trained on a model of another size"
    )
    return (
        f"{name} has {module.in_features} inputs and {module.out_features} outputs in it, "
        f"{shape.in_features} and {shape.out_features} in the model ({count} modules): {why}."
    )


def _vector_reasons(
    what: str, modules: Collection[str], way_out: str, placement: Placement, model: ModelModules
) -> Iterator[str]:
    """Say why magnitudes or biases cannot be applied: kernels of one kind do it, in linear layers."""
    if not modules:
        return
    if model.device not in ("", "cpu"):
        yield f"It {what}, which is served on CPUs so far: serve it on a CPU, or train with {way_out}."
    elif model.no_dora:
        yield f"It {what}, and {model.no_dora}: train with {way_out}."
    others = [
        name
        for name, piece in placement.pieces.items()
        if piece.source in modules and name.rpartition(".")[2] in _NO_LINEAR_LAYERS
    ]
    if others:
        yield (
            f"It {what} on {format_names(others)}, which is served in linear layers inside the model only: train it "
            "without them."
        )


def _format_layers(model: ModelModules) -> str:
    layers = [int(match[1]) for name in model.shapes if (match := _LAYER.search(name))]
    return f" (its layers are 0 to {max(layers)})" if layers else ""
