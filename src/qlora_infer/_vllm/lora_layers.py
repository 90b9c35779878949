"""The modules of a running model that adapters may change, as vLLM's LoRA layers describe them.

Runs in vLLM's workers and touches vLLM's internals, read in vLLM 0.32.0: ``vllm/lora/layers``,
``vllm/lora/model_manager.py`` and ``WeightsMapper`` in ``vllm/model_executor/models/utils.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qlora_infer.model.modules import DOWN

#: A module's input and output sizes, and how many experts its factors hold one behind the other (0 for none).
Sizes = tuple[int, int, int]


def describe(manager: Any) -> dict[str, Any]:
    """Describe a model for adapters in plain data, which crosses processes (``ModelModules.of``).

    Args:
        manager: vLLM's ``LoRAModelManager``, which has wrapped the model's layers.
    """
    sizes: dict[str, Sizes] = {}
    unlisted: dict[str, str] = {}
    bypassed = {id(layer) for layer in (*_absorbed_layers(manager.model), *_inner_routers(manager.model))}
    layers = {
        name: layer
        for name, layer in manager.modules.items()
        if not (_is_convolution(name, layer) or id(layer) in bypassed or id(layer.base_layer) in bypassed)
    }
    for name, layer in layers.items():
        parts = manager.packed_modules.get(name, [name])
        try:
            sizes.update(sizes_of(name, parts, layer))
        except (AttributeError, ValueError) as error:
            unlisted[name] = f"{type(layer).__name__}: {error}"
    reordered = [name for name in sizes if is_reordered(type(manager.model).__name__, name)]
    for name in reordered:
        del sizes[name]
    return {
        "sizes": sizes,
        "unlisted": unlisted,
        "unadapted": {
            **dict(_unadapted(manager.model, layers)),
            **{name: type(layers[name]).__name__ for name in unlisted},
            **dict.fromkeys(reordered, "reordered"),
        },
        "fused": {name: manager.packed_modules[name] for name in layers if _is_fused(manager.packed_modules.get(name))},
        "left_out": left_out_prefixes(manager),
        "row_orders": row_orders(manager.model, sizes),
        "renames": rename_rules(getattr(manager.model, "hf_to_vllm_mapper", None)),
        "model": type(manager.model).__name__,
        "device": str(getattr(manager.device, "type", manager.device)),
    }


def sizes_of(name: str, parts: Sequence[str], layer: Any) -> dict[str, Sizes]:
    """Return the sizes of a LoRA layer's parts by their names, before tensor parallelism.

    Args:
        name: The layer's name in the model.
        parts: The names that a checkpoint has for it; more than one where vLLM packs modules into one.
        layer: The LoRA layer.

    Raises:
        AttributeError, ValueError: The layer does not tell its sizes.
    """
    if hasattr(layer, "w13_lora_a_stacked"):
        return _sizes_of_experts(name, parts, layer)
    in_features, slices = _sizes_of_slices(layer)
    return {part: (in_features, out, 0) for part, out in zip(parts, join_slices(slices, len(parts)), strict=True)}


def join_slices(slices: Sequence[int], num_parts: int) -> list[int]:
    """Add up the slices of a layer that one part of a checkpoint covers.

    A module that is fused in the checkpoint itself is one part of several slices. Where parts are fewer than slices,
    the first covers what the others leave: Qwen3.5's ``in_proj_qkvz`` has the parts ``in_proj_qkv`` and ``in_proj_z``
    and four slices (``MergedColumnParallelLinearWithLoRA.expand_packed_lora``).

    Raises:
        ValueError: There are more parts than slices.

    Example:
        >>> join_slices([4, 4, 8, 8], 2)
        [16, 8]
    """
    num_joined = len(slices) - num_parts + 1
    if num_joined < 1:
        raise ValueError(f"{num_parts} parts in {len(slices)} slices")
    return [sum(slices[:num_joined]), *slices[num_joined:]]


def _sizes_of_slices(layer: Any) -> tuple[int, list[int]]:
    base = layer.base_layer
    if hasattr(base, "total_num_kv_heads"):
        # output_size counts the heads of keys that tensor parallelism repeats.
        head, num_kv = base.head_size, base.total_num_kv_heads
        return base.input_size, [base.total_num_heads * head, num_kv * head, num_kv * base.v_head_size]
    if hasattr(base, "output_sizes"):
        return base.input_size, list(base.output_sizes)
    if hasattr(base, "embedding_dim"):
        return base.org_vocab_size, [base.embedding_dim]
    if hasattr(base, "input_size") and hasattr(base, "output_size"):
        return base.input_size, [base.output_size]
    if hasattr(layer, "hidden_size") and hasattr(base, "org_vocab_size"):
        return layer.hidden_size, [base.org_vocab_size]  # the logits processor, which stands for lm_head
    if getattr(layer, "tp_size", 1) == 1:
        # An unknown layer: its slots tell, where no other worker holds a part of it.
        a, b = layer.lora_a_stacked, layer.lora_b_stacked
        b = b if isinstance(b, tuple) else (b,)
        return (a[0] if isinstance(a, tuple) else a).shape[-1], [slot.shape[-2] for slot in b]
    raise ValueError("an unknown layer that is split over GPUs")


def _sizes_of_experts(name: str, parts: Sequence[str], layer: Any) -> dict[str, Sizes]:
    """Return the sizes of experts: one by one as ``experts.3.up_proj``, or all of a layer as PEFT names 3D parameters.

    For ``target_parameters`` PEFT writes ``experts.base_layer`` (gate and up) and ``experts`` (down), with the factors
    of all experts one behind the other (``ParamWrapper`` in PEFT 0.21, ``tuners/lora/layer.py``).
    """
    from vllm.lora.layers import FusedMoE3DWithLoRA

    moe = layer.moe_config
    # Some kernels pad these; an adapter has the sizes of the checkpoint.
    hidden = getattr(moe, "hidden_dim_unpadded", None) or moe.hidden_dim
    unpadded = getattr(moe, "intermediate_size_per_partition_unpadded", None)
    inner = (unpadded or moe.intermediate_size_per_partition) * layer.tp_size
    if isinstance(layer, FusedMoE3DWithLoRA):
        num_experts = layer.global_num_experts
        return {f"{name}.base_layer": (hidden, 2 * inner, num_experts), name: (inner, hidden, num_experts)}
    if len(parts) > 3 * layer.global_num_experts:
        # vLLM's "transformers" backend lists two names for each projection, and pack_moe then takes them for experts.
        raise ValueError("vLLM has more than one name for each projection of an expert")
    return {part: (inner, hidden, 0) if part.rpartition(".")[2] in DOWN else (hidden, inner, 0) for part in parts}


def _unadapted(model: Any, layers: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name the layers with weights that the model has and vLLM does not adapt, and their classes.

    A linear layer that stands in two places has the name of the first; an output layer may be the embeddings.
    """
    from vllm.model_executor.layers.fused_moe import MoERunner
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    named = {id(layer) for layer in layers.values()}
    named |= {id(layer.base_layer) for layer in layers.values()}
    for name, module in model.named_modules(remove_duplicate=False):
        is_layer = isinstance(module, LinearBase | VocabParallelEmbedding | MoERunner)
        if (is_layer or _has_matrix(module)) and id(module) not in named and name not in layers:
            if isinstance(module, LinearBase):
                named.add(id(module))
            yield name.removesuffix(".base_layer"), type(module).__name__


def _is_fused(parts: Sequence[str] | None) -> bool:
    """Return whether vLLM holds modules of a checkpoint in one, beside one another; experts are another matter."""
    return parts is not None and not any(".experts." in part for part in parts)


def _is_convolution(name: str, layer: Any) -> bool:
    """Return whether a linear layer stands for a convolution: models read its weight, and no LoRA is applied to it.

    ``conv1d`` of Mamba's mixers and of linear attention, whose weight has a third dimension until a CPU packs it.
    """
    weight = getattr(layer.base_layer, "weight", None)
    return name.endswith(".conv1d") or (weight is not None and weight.dim() > 2)


def _inner_routers(model: Any) -> list[Any]:
    """Return the routers that experts run themselves, without the LoRA beside them.

    ``MoERunner`` multiplies the weights of a router and of a shared expert's gate in one, if it has both. What else it
    has is the LoRA layer around its router (``kernels/routers.py``).
    """
    from vllm.lora.layers import BaseLayerWithLoRA
    from vllm.model_executor.layers.fused_moe import MoERunner

    runners = [module for module in model.modules() if isinstance(module, MoERunner) and module.gate is not None]
    bare = [runner.gate for runner in runners if not isinstance(runner.gate, BaseLayerWithLoRA)]
    multiplied_in_one = [getattr(runner.gate, "base_layer", runner.gate) for runner in runners if runner._fse_fuse_gate]
    return bare + multiplied_in_one


def _absorbed_layers(model: Any) -> list[Any]:
    """Return the layers whose weights attention multiplies itself, without the LoRA beside them.

    Multi-head latent attention takes ``kv_b_proj`` apart when the model is loaded, and decodes with the two halves
    (``MLAAttention.process_weights_after_loading`` in ``vllm/model_executor/layers/attention/mla_attention.py``).
    """
    from vllm.model_executor.layers.attention.mla_attention import MLAAttention

    return [module.kv_b_proj for module in model.modules() if isinstance(module, MLAAttention)]


def row_orders(model: Any, sizes: Mapping[str, Sizes]) -> dict[str, list[int]]:
    """Return the order in which vLLM puts the outputs of modules, by the last part of their names.

    Llama 4's queries and keys are put in another order when they are loaded, for vLLM's rotary embedding; an adapter's
    factors are not (``permute_qk_weight_for_rotary`` in ``vllm/model_executor/models/llama4.py``, which is asked here).
    """
    import torch

    orders: dict[str, list[int]] = {}
    for module in model.modules():
        if not hasattr(module, "permute_qk_weight_for_rotary"):
            continue
        for name in ("q_proj", "k_proj"):
            outputs = next((out for layer, (_, out, _) in sizes.items() if layer.endswith(f".{name}")), 0)
            if outputs:
                _, permuted = module.permute_qk_weight_for_rotary(f"{name}.weight", torch.arange(outputs)[:, None])
                orders[name] = permuted.flatten().tolist()
    return orders


def is_reordered(model: str, module: str) -> bool:
    """Return whether vLLM reorders a module's rows when it loads them, in an order that it has no function for.

    K2-Horizon's loader does so with queries and keys (``rope_perm_idx`` in ``k2_horizon.py``).
    """
    return model == "K2HorizonForCausalLM" and module.rpartition(".")[2] in ("q_proj", "k_proj")


def _has_matrix(module: Any) -> bool:
    """Return whether a module, such as torch's own linear layer, has a weight that PEFT may train factors for."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() > 1


def left_out_prefixes(manager: Any) -> list[str]:
    """Return the beginnings of names whose factors vLLM does not apply: towers, connectors, layers for training.

    Leaving out those of a tower is exact for prompts of text alone.
    """
    prefixes = list(getattr(manager.model, "lora_skip_prefixes", None) or ())
    if manager.supports_mm and not manager.supports_tower_connector_lora:
        mapping = manager.mm_mapping
        prefixes += [*mapping.tower_model, *mapping.connector]
    return [prefix.rstrip(".") + "." for prefix in prefixes]


def rename_rules(mapper: Any) -> dict[str, Any]:
    """Return how vLLM renames a checkpoint's modules, as ``Renames`` takes it."""
    if mapper is None:
        return {"regex": [], "substr": [], "prefix": [], "suffix": [], "is_complete": True}
    mapper = mapper.get_rename_mapper()
    return {
        "regex": [[pattern.pattern, new] for pattern, new in mapper.orig_to_new_regex.items()],
        "substr": [list(pair) for pair in mapper.orig_to_new_substr.items()],
        "prefix": [list(pair) for pair in mapper.orig_to_new_prefix.items()],
        "suffix": [list(pair) for pair in mapper.orig_to_new_suffix.items()],
        # Renamings of transformers' are objects of its own; only vLLM's "transformers" backend has them.
        "is_complete": not mapper.orig_to_new_renaming,
    }
