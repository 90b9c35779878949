"""The modules of a model that adapters may change, and the search for an adapter's module among them.

An adapter names modules as the class does that it was trained on, the running model as vLLM's class does. For a
multimodal base there are three forms: ``model.language_model.layers…`` (transformers since 4.52),
``language_model.model.layers…`` (before), and ``model.layers…`` (trained on the text-only class).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from attrs import define, field, frozen

_EXPERT = re.compile(r"(?P<layer>.+\.experts)\.(?P<expert>\d+)\.[^.]+")

#: Where a module stands that leads to a language model's layers, in the names of all classes.
_WRAPPERS = frozenset({"model", "language_model", "text_model", "thinker", "llm"})

#: Parts of multimodal models that text alone does not pass, by the name that comes first after the wrappers.
_TOWERS = frozenset(
    {
        *("visual", "vision_tower", "vision_model", "vision_encoder", "vision_embed_tokens", "vision"),
        *("audio_tower", "audio_model", "audio", "sound_encoder"),
        *("multi_modal_projector", "mm_projector", "connector", "embed_vision", "embed_audio", "patch_merger"),
    }
)

#: What stands behind a module's name in an adapter's file.
_FACTOR = ".lora_A.weight"

#: How checkpoints call the projection that leads out of an expert.
DOWN = frozenset({"down_proj", "w2", "w2_weight", "fc2", "output_linear"})

#: Other names for a language model's output layer; the first is Tinker's, the second GPT-NeoX's.
_ALIASES = {"unembed_tokens": "lm_head", "embed_out": "lm_head"}


@frozen
class ModuleShape:
    """A module of the running model that an adapter may change.

    Attributes:
        in_features: Its input size; of an embedding, its vocabulary.
        out_features: Its output size.
        num_experts: The experts whose factors it holds one behind the other; 0 for a module of one pair of factors.
    """

    in_features: int
    out_features: int
    num_experts: int = 0


@frozen
class Renames:
    """The rules by which vLLM renames a checkpoint's modules when it loads an adapter.

    The rules are those of ``WeightsMapper.map_name`` in vLLM 0.32.0, ``vllm/model_executor/models/utils.py``: each
    pair replaces the first match, in this order. ``tests/engine/test_vllm_internals.py`` compares the two.

    Attributes:
        regex: Patterns and what replaces them.
        substr: Parts of names.
        prefix: Beginnings of names.
        suffix: Ends of names.
        is_complete: vLLM has no other rules for this model.
    """

    regex: Sequence[Sequence[str]] = ()
    substr: Sequence[Sequence[str]] = ()
    prefix: Sequence[Sequence[str]] = ()
    suffix: Sequence[Sequence[str]] = ()
    is_complete: bool = True

    def __call__(self, module: str) -> str:
        """Return the running model's name for a checkpoint's module."""
        # The rules are for names of tensors: "lm_head." leads to "language_model.lm_head.".
        return self.of_tensor(module + _FACTOR).removesuffix(_FACTOR)

    def of_tensor(self, name: str) -> str:
        """Return the running model's name for a checkpoint's tensor."""
        for pattern, new in self.regex:
            name = re.sub(pattern, new, name)
        for old, new in self.substr:
            name = name.replace(old, new, 1)
        for old, new in self.prefix:
            name = new + name.removeprefix(old) if name.startswith(old) else name
        for old, new in self.suffix:
            name = name.removesuffix(old) + new if name.endswith(old) else name
        return name


@define(slots=False, eq=False)
class ModelModules:
    """The modules of a model, as a running engine or a checkpoint's files tell.

    Attributes:
        shapes: Those that an adapter may change, by the running model's names.
        renames: From a checkpoint's names to the running model's.
        unadapted: Layers that the model has and vLLM does not adapt: their names, and their kinds.
        row_orders: The order in which vLLM puts the outputs of modules when it loads them, by the last part of their
            names; for those that it puts in another order than the checkpoint.
        fused: Modules that vLLM holds in one, by the one's name: an adapter may have either.
        left_out: Beginnings of names, in the running model, of parts whose factors are not applied.
        model: The name of the model's class; empty where it is not known.
        device: vLLM's device type; empty where it is not known.
        no_dora: Why the running engine applies no DoRA and no biases; empty where it does, or where only the device
            tells.
    """

    shapes: Mapping[str, ModuleShape]
    renames: Renames = field(factory=Renames)
    unadapted: Mapping[str, str] = field(factory=dict)
    fused: Mapping[str, Sequence[str]] = field(factory=dict)
    left_out: Sequence[str] = ()
    row_orders: Mapping[str, Sequence[int]] = field(factory=dict)
    model: str = ""
    device: str = ""
    no_dora: str = ""

    @classmethod
    def of(cls, descriptions: Sequence[Mapping[str, Any]]) -> ModelModules:
        """Read what the workers describe, each its own layers (``_lora_layers.describe``)."""
        first = descriptions[0]
        shapes = {name: ModuleShape(*sizes) for described in descriptions for name, sizes in described["sizes"].items()}
        return cls(
            shapes=shapes,
            renames=Renames(**first["renames"]),
            unadapted={
                name: kind
                for described in descriptions
                for name, kind in described["unadapted"].items()
                if name not in shapes
            },
            fused={name: parts for described in descriptions for name, parts in described["fused"].items()},
            left_out=tuple(first["left_out"]),
            row_orders=first["row_orders"],
            model=first["model"],
            device=first["device"],
            no_dora=first["no_dora"],
        )

    def locate(self, name: str) -> str | None:
        """Return the running model's name for an adapter's module, or ``None`` where the model has none.

        Example:
            >>> modules = ModelModules({"language_model.model.layers.0.mlp.up_proj": ModuleShape(8, 16)})
            >>> modules.locate("model.layers.0.mlp.up_proj")
            'language_model.model.layers.0.mlp.up_proj'
        """
        renamed = self.renames(name)
        for candidate in (renamed, name):
            if candidate in self.shapes:
                return candidate
        return self._by_tail.get(tail_of(renamed)) or self._by_tail.get(tail_of(name))

    def num_inputs(self, name: str) -> int | None:
        """Return the inputs of the running model's module for an adapter's; ``None`` where the model has none."""
        found = self.locate(name) or next(iter(self.locate_parts(name)), None)
        return None if found is None else self.shapes[found].in_features

    def row_order(self, name: str) -> Sequence[int] | None:
        """Return the order of a module's outputs in the running model, or ``None`` for that of the checkpoint."""
        order = self.row_orders.get(name.rpartition(".")[2])
        return order if order is not None and len(order) == self.shapes[name].out_features else None

    def locate_parts(self, name: str) -> Sequence[str]:
        """Return the modules that the running model has for one of an adapter's, in order; empty where it has none.

        GLM-4's checkpoints have ``gate_up_proj``, and vLLM takes adapters of ``gate_proj`` and ``up_proj``.
        """
        for candidate in (self.renames(name), name):
            fused = candidate if candidate in self.fused else self._fused_by_tail.get(tail_of(candidate))
            if fused is not None:
                return self.fused[fused]
        return ()

    @cached_property
    def _fused_by_tail(self) -> Mapping[str, str]:
        return {tail_of(name): name for name in self.fused}

    def is_left_out(self, name: str) -> bool:
        """Return whether a module that the model does not list belongs to a part that text alone does not pass."""
        candidates = f"{name}.", f"{self.renames(name)}."
        is_named = any(candidate.startswith(tuple(self.left_out)) for candidate in candidates)
        return is_named or tail_of(name).partition(".")[0] in _TOWERS

    def why_unadapted(self, name: str) -> str | None:
        """Return the kind of the layer behind an adapter's module that vLLM does not adapt, or ``None``."""
        for candidate in (self.renames(name), name):
            for layer, kind in self.unadapted.items():
                if candidate == layer or candidate.startswith(f"{layer}.") or tail_of(candidate) == tail_of(layer):
                    return kind
        return None

    def locate_experts(self, layer: str) -> Mapping[int, Sequence[str]]:
        """Return the modules of each expert of a layer, in vLLM's order (gate, down, up); empty where there are none.

        Args:
            layer: The adapter's name of the layer, such as ``"model.layers.0.mlp.experts"``.
        """
        for candidate in (self.renames(layer), layer):
            if tail_of(candidate) in self._experts:
                return self._experts[tail_of(candidate)]
        return {}

    @cached_property
    def _experts(self) -> Mapping[str, Mapping[int, Sequence[str]]]:
        """The modules of experts that the model has one by one, by the tail of their layer's name."""
        layers: dict[str, dict[int, list[str]]] = {}
        for name in sorted(self.shapes):
            match = _EXPERT.fullmatch(name)
            if match:
                names = layers.setdefault(tail_of(match["layer"]), {}).setdefault(int(match["expert"]), [])
                names.insert(1 if name.rpartition(".")[2] in DOWN else len(names), name)
                if len(names) == 2 and names[0].rpartition(".")[2] in DOWN:
                    names.reverse()
        return layers

    @cached_property
    def expert_layers(self) -> Sequence[Sequence[Sequence[str]]]:
        """Layers of experts, of each its projections, and of each the modules of all experts."""
        one_by_one = [list(zip(*experts.values(), strict=True)) for experts in self._experts.values()]
        stacked = {name.removesuffix(".base_layer") for name, shape in self.shapes.items() if shape.num_experts}
        return [*one_by_one, *([[f"{name}.base_layer"], [name]] for name in stacked)]

    @cached_property
    def _by_tail(self) -> Mapping[str, str]:
        """The modules by their names behind the wrappers, where those are unique."""
        found: dict[str, str | None] = {}
        for name in self.shapes:
            tail = tail_of(name)
            found[tail] = None if tail in found else name
        return {tail: name for tail, name in found.items() if name}


def tail_of(name: str) -> str:
    """Return a name without the wrappers around a language model, and without what a layer calls the home of experts.

    transformers 5 calls Mixtral's ``mlp.experts``, vLLM ``block_sparse_moe.experts``.
    """
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in _WRAPPERS:
        parts.pop(0)
    if "experts" in parts[1:]:
        parts[parts.index("experts") - 1] = "*"
    return _ALIASES.get(parts[0], ".".join(parts)) if len(parts) == 1 else ".".join(parts)
