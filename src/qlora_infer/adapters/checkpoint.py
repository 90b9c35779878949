"""The modules that adapters of a base model may change, read from its checkpoint without loading it.

What a running engine asks vLLM's workers, this computes from the safetensors headers, or from ``config.json`` where
there are none to be read. What is adapted was read in vLLM 0.32.0: every linear layer, and the embeddings of the models
that have ``embedding_modules``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from qlora_infer import _hub
from qlora_infer.adapters.model_modules import ModelModules, ModuleShape
from qlora_infer.adapters.tensors import read_header
from qlora_infer.errors import CorruptAdapterError, ModelNotFoundError
from qlora_infer.quantization._base import quant_method

#: Architectures whose modules vLLM names as the checkpoint does, and whether adapters may change their embeddings.
LLAMA_LIKE: Mapping[str, bool] = {
    "LlamaForCausalLM": True,
    "Qwen3ForCausalLM": True,
    "MistralForCausalLM": False,
    "Qwen2ForCausalLM": False,
}
EMBEDDINGS = ("model.embed_tokens", "lm_head")

Shape = tuple[int, ...]


@frozen
class Checkpoint:
    """A base model as its files tell of it.

    Attributes:
        modules: The modules that an adapter may change, by name.
        checked: What they were read from, and what that leaves open; for people.
    """

    modules: ModelModules
    checked: str


def read_checkpoint(model: str, *, revision: str | None = None, token: str | None = None) -> Checkpoint:
    """Find out which modules a base model has, and their shapes; of a Hub's model only headers are fetched.

    Args:
        model: A Hub id or a folder.
        revision: A branch, tag or commit on the Hub.
        token: The Hub's access token; ``None`` for the one that ``HF_TOKEN`` or ``hf auth login`` left.

    Raises:
        ModelNotFoundError: There is no such model, or its files do not tell.
    """
    config = _hub.read_model_config(model, revision=revision, token=token)
    folder = Path(model).expanduser()
    shapes = _shapes_in(folder) if folder.is_dir() else _hub.read_tensor_shapes(model, revision=revision, token=token)
    modules = modules_of_tensors(shapes, config) if shapes else {}
    origin = "the headers of its safetensors files"
    if not modules:
        modules, origin = modules_of_config(config), "its config.json alone"
    if not modules:
        raise ModelNotFoundError(
            f"{model} cannot be checked without loading it: no safetensors headers tell of its modules, and "
            f"its architecture ({_architecture(config) or 'not named'}) is none of {', '.join(LLAMA_LIKE)}"
        )
    return Checkpoint(
        ModelModules(modules), f"names and shapes of {len(modules)} modules, from {origin}{_left_open(config)}"
    )


def modules_of_tensors(shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> dict[str, ModuleShape]:
    """The modules behind a checkpoint's tensors: unquantized, AWQ or GPTQ; empty where the shapes do not tell."""
    if any(".quant_state." in name for name in shapes):
        return {}  # bitsandbytes packs 4-bit weights into one column, and keeps their shape among the numbers
    modules = {}
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and len(shape) == 2:
            modules[module] = ModuleShape(shape[1], shape[0])
        elif kind == "qweight" and len(shape) == 2:
            modules[module] = _packed(shape, shapes.get(f"{module}.scales", shape), config)
    architecture = _architecture(config)
    return _with_embeddings(modules, config) if architecture in LLAMA_LIKE else _as_vllm_sees(modules)


def modules_of_config(config: Mapping[str, Any]) -> dict[str, ModuleShape]:
    """The modules that a Llama-like model has by its ``config.json``; empty for other models."""
    if _architecture(config) not in LLAMA_LIKE:
        return {}
    try:
        hidden, inner, heads = (config[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads"))
        head = config.get("head_dim") or hidden // heads
        kv, vocabulary = (config.get("num_key_value_heads") or heads) * head, config["vocab_size"]
        layers = range(config["num_hidden_layers"])
    except (KeyError, TypeError, ZeroDivisionError):
        return {}
    shapes = {
        "self_attn.q_proj": ModuleShape(hidden, heads * head),
        "self_attn.k_proj": ModuleShape(hidden, kv),
        "self_attn.v_proj": ModuleShape(hidden, kv),
        "self_attn.o_proj": ModuleShape(heads * head, hidden),
        "mlp.gate_proj": ModuleShape(hidden, inner),
        "mlp.up_proj": ModuleShape(hidden, inner),
        "mlp.down_proj": ModuleShape(inner, hidden),
    }
    modules = {f"model.layers.{layer}.{name}": shape for layer in layers for name, shape in shapes.items()}
    modules["model.embed_tokens"] = ModuleShape(hidden, vocabulary)
    return _with_embeddings(modules, config)


def _packed(qweight: Shape, scales: Shape, config: Mapping[str, Any]) -> ModuleShape:
    """A 4- or 8-bit matrix in 32-bit numbers: AWQ packs its outputs, GPTQ its inputs; scales are per output."""
    bits = (config.get("quantization_config") or {}).get("bits")
    if quant_method(config) == "awq":
        return ModuleShape(qweight[0], scales[-1])
    return ModuleShape(qweight[0] * 32 // bits if isinstance(bits, int) and bits > 0 else 0, qweight[1])


def _with_embeddings(modules: dict[str, ModuleShape], config: Mapping[str, Any]) -> dict[str, ModuleShape]:
    """What vLLM adapts of the embeddings: both or none; a tied output layer has no tensor of its own."""
    embeddings = modules.pop(EMBEDDINGS[0], None)
    head = modules.pop(EMBEDDINGS[1], embeddings)
    if not LLAMA_LIKE[_architecture(config)] or embeddings is None or head is None:
        return modules
    # A Linear's weight is [out, in]; an embedding's is [vocabulary, size], and the vocabulary goes in.
    return modules | {EMBEDDINGS[0]: ModuleShape(embeddings.out_features, embeddings.in_features), EMBEDDINGS[1]: head}


def _as_vllm_sees(modules: dict[str, ModuleShape]) -> dict[str, ModuleShape]:
    return {
        name: ModuleShape(shape.out_features, shape.in_features) if name.endswith("embed_tokens") else shape
        for name, shape in modules.items()
    }


def _shapes_in(folder: Path) -> dict[str, Shape]:
    """The shapes of a folder's tensors; none where a file is missing or broken."""
    shapes: dict[str, Shape] = {}
    try:
        for name in _file_names(folder):
            entries = read_header(str(folder), folder / name)
            shapes.update((tensor, entry.shape) for tensor, entry in entries.items())
    except (CorruptAdapterError, OSError, ValueError):
        return {}
    return shapes


def _file_names(folder: Path) -> Iterable[str]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return sorted(path.name for path in folder.glob("*.safetensors"))


def _architecture(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    return str(named[0])[:80] if isinstance(named, list) and named else ""


def _left_open(config: Mapping[str, Any]) -> str:
    architecture = _architecture(config)
    added = "; its tokenizer was not looked at"
    if architecture in LLAMA_LIKE:
        return added
    return f"{added}, and vLLM may serve fewer modules of {architecture or 'this architecture'}, or name them otherwise"
