"""The places of an adapter's modules in the running model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from attrs import evolve, frozen

from qlora_infer.files.manifest import LoRAModule
from qlora_infer.files.peft_config import WRAPPERS
from qlora_infer.model.modules import ModelModules, ModuleShape

#: Parts of names that may be left out; the last is of ``DataParallel`` and DeepSpeed.
_WRAPPERS = (*WRAPPERS, "module")

#: What PEFT puts before a module's name.
_PREFIX = "base_model.model."


@frozen
class Piece:
    """The part of an adapter's factors that a module of the running model gets.

    Attributes:
        source: The adapter's module; ``None`` for factors of zeros, which vLLM needs beside those of other experts.
        module: The shape of its part.
        expert: Which expert's factors it gets, of a module that holds those of all experts.
        first_output: Where its outputs begin among those of B.
        order: The order of its outputs in the running model, where that is not the checkpoint's.
        is_transposed: Whether the factors are those of the transposed weight, so that B's transpose is A.
    """

    source: str | None
    module: LoRAModule
    expert: int | None = None
    first_output: int = 0
    order: Sequence[int] | None = None
    is_transposed: bool = False


@frozen
class Placement:
    """An adapter's modules in a model.

    Attributes:
        pieces: The parts for each module of the model, by the running model's names.
        absent: Modules of the adapter that the model does not list.
        left_out: Those that belong to a tower, which text alone does not pass.
        repeated: Pairs of modules that are one in the model.
        wrappers: The prefixes removed from the adapter's names to find its modules, such as ``_orig_mod``.
    """

    pieces: Mapping[str, Piece]
    absent: Sequence[str] = ()
    left_out: Sequence[str] = ()
    repeated: Sequence[tuple[str, str]] = ()
    wrappers: Sequence[str] = ()

    @property
    def sources(self) -> set[str]:
        """The adapter's modules that are applied."""
        return {piece.source for piece in self.pieces.values() if piece.source is not None}

    def is_vllms_own(self, model: ModelModules) -> bool:
        """Return whether vLLM would place all of it so by itself, from the adapter's own names."""
        return (
            not self.left_out
            and not self.wrappers
            and model.renames.is_complete
            and all(
                piece.source is not None
                and piece.expert is None
                and piece.order is None
                and not piece.is_transposed
                and model.renames(piece.source) == name
                for name, piece in self.pieces.items()
            )
        )


def place(modules: Mapping[str, LoRAModule], model: ModelModules) -> Placement:
    """Find each module of an adapter in a model.

    Where some are absent, the names of wrappers are left out of the adapter's, if then all modules are found.

    Args:
        modules: The adapter's modules by the names that it has for them.
        model: The modules of the model.
    """
    placement = _place(modules, model)
    if not placement.absent:
        return placement
    names = {_unwrapped(name): name for name in modules}
    without = _place({plain: modules[name] for plain, name in names.items()}, model)
    if len(names) < len(modules) or without.absent or without.repeated:
        return placement
    return evolve(
        without,
        pieces={
            target: piece if piece.source is None else evolve(piece, source=names[piece.source])
            for target, piece in without.pieces.items()
        },
        left_out=[names[plain] for plain in without.left_out],
        wrappers=_wrappers_in(modules),
    )


def _unwrapped(name: str) -> str:
    """Return a module's name without those of wrappers, and without PEFT's prefix, which may stand behind them."""
    plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    while plain.startswith(_PREFIX):
        plain = plain.removeprefix(_PREFIX)
    return plain


def _wrappers_in(names: Iterable[str]) -> list[str]:
    parts = {part for name in names for part in name.split(".")}
    prefix = [_PREFIX.rstrip(".")] if any(_PREFIX in name for name in names) else []
    return [wrapper for wrapper in _WRAPPERS if wrapper in parts] + prefix


def _place(modules: Mapping[str, LoRAModule], model: ModelModules) -> Placement:
    pieces: dict[str, Piece] = {}
    absent: list[str] = []
    left_out: list[str] = []
    repeated: list[tuple[str, str]] = []
    for name, module in modules.items():
        is_transposed = _is_transposed(name, modules, model)
        found = dict(_pieces(name, module, model, is_transposed=is_transposed))
        if not found:
            (left_out if model.is_left_out(name) else absent).append(name)
        for target, piece in found.items():
            other = pieces.setdefault(target, piece)
            if other is not piece:
                repeated.append((str(other.source), name))
    return Placement(_with_all_experts(pieces, model), absent, left_out, repeated)


def _pieces(name: str, module: LoRAModule, model: ModelModules, *, is_transposed: bool) -> Iterator[tuple[str, Piece]]:
    if module.num_experts:
        turned = _turned(module) if is_transposed else module
        for part, piece in _expert_pieces(name, turned, model):
            yield part, evolve(piece, is_transposed=is_transposed)
        return
    target = model.locate(name)
    if target is not None:
        yield target, Piece(name, module, order=model.row_order(target))
        return
    yield from _parts(name, module, model)


def _parts(name: str, module: LoRAModule, model: ModelModules) -> Iterator[tuple[str, Piece]]:
    """Cut a module's outputs into the parts that the model takes one by one; each gets the whole factor A."""
    first = 0
    parts = model.locate_parts(name)
    for part in parts:
        is_last = part == parts[-1]
        # Where the sizes do not add up, the last part has another shape than the model's, and is refused for it.
        outputs = module.out_features - first if is_last else model.shapes[part].out_features
        yield part, Piece(name, evolve(module, out_features=outputs), first_output=first)
        first += outputs


def _expert_pieces(name: str, module: LoRAModule, model: ModelModules) -> Iterator[tuple[str, Piece]]:
    """Place a module that holds the factors of all experts of a layer.

    PEFT calls the outermost parameter ``experts`` and the next ``experts.base_layer``, in the order in which they were
    named; only the sizes tell which of the two is the projection out of an expert.
    """
    layer = name.removesuffix(".base_layer")
    target = model.locate(layer)
    if target is not None:  # the model holds them so, too
        wide = f"{target}.base_layer"
        is_wide = wide in model.shapes and _fits(module, model.shapes[wide])
        yield (wide if is_wide else target), Piece(name, module)
        return
    one = evolve(module, num_experts=0)
    for expert, (first, down, *last) in model.locate_experts(layer).items():
        if model.shapes[down] == ModuleShape(module.in_features, module.out_features):
            yield down, Piece(name, one, expert)
            continue
        half = module.out_features // 2 if last else module.out_features
        yield first, Piece(name, evolve(one, out_features=half), expert)
        for up in last:
            yield up, Piece(name, evolve(one, out_features=module.out_features - half), expert, half)


def _is_transposed(name: str, modules: Mapping[str, LoRAModule], model: ModelModules) -> bool:
    """Return whether the factors of a layer's experts are those of the transposed weights.

    Some of transformers' classes keep experts as ``[inputs, outputs]``. PEFT 0.21 takes a weight so where its class has
    ``is_transposed``, and before it took all so. The sizes tell, where one of a layer's two projections is not as wide
    as it is long.
    """
    if not modules[name].num_experts:
        return False
    layer = name.removesuffix(".base_layer")
    given = [modules[part] for part in (layer, f"{layer}.base_layer") if part in modules]
    target = model.locate(layer)
    if target is not None:
        shapes = [model.shapes[part] for part in (target, f"{target}.base_layer") if part in model.shapes]
    else:
        first, down, *last = next(iter(model.locate_experts(layer).values()), ("", ""))
        if not first:
            return False
        gate, width = model.shapes[first], 2 if last else 1
        shapes = [model.shapes[down], ModuleShape(gate.in_features, width * gate.out_features)]
    return not _all_fit(given, shapes) and _all_fit(map(_turned, given), shapes)


def _all_fit(modules: Iterable[LoRAModule], shapes: Sequence[ModuleShape]) -> bool:
    return all(any(_fits(module, shape) for shape in shapes) for module in modules)


def _fits(module: LoRAModule, shape: ModuleShape) -> bool:
    return (module.in_features, module.out_features) == (shape.in_features, shape.out_features)


def _turned(module: LoRAModule) -> LoRAModule:
    return evolve(module, in_features=module.out_features, out_features=module.in_features)


def _with_all_experts(pieces: Mapping[str, Piece], model: ModelModules) -> Mapping[str, Piece]:
    """Add factors of zeros for what an adapter leaves of a layer's experts: vLLM takes all of them or none.

    It also wants one rank for each of their projections (``pack_moe`` and ``_stack_moe_lora_weights`` in vLLM 0.32.0).
    """
    added: dict[str, Piece] = {}
    for layer in model.expert_layers:
        of_layer = [pieces[name] for projection in layer for name in projection if name in pieces]
        for projection in layer if of_layer else ():
            like = next((pieces[name] for name in projection if name in pieces), of_layer[0])
            for name in projection:
                shape = model.shapes[name]
                zeros = LoRAModule(like.module.rank, shape.in_features, shape.out_features, shape.num_experts)
                added.setdefault(name, Piece(None, zeros))
    return {**added, **pieces}
