"""Mixtures of experts on the CPU, where only the attention layers have LoRA.

With LoRA, vLLM 0.32.0 chooses kernels for experts that can apply it (``is_lora_enabled`` in
``vllm/model_executor/layers/fused_moe/config.py``). There are none for CPUs, so that a model does not start, or its
first request ends the engine. Without LoRA for experts vLLM has kernels, and ``LoRAConfig.target_modules`` leaves
modules out.
"""

from __future__ import annotations

from typing import Any


def leave_out_experts() -> None:
    """Start mixtures of experts on the CPU without LoRA for their experts, and change no other model."""
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    finish, load = FusedMoEConfig.__post_init__, LoRAModelRunnerMixin.load_lora_model

    def finish_without_lora(self: Any) -> None:
        self.is_lora_enabled = False
        finish(self)

    def load_without_experts(self: Any, model: Any, vllm_config: Any, device: Any) -> Any:
        vllm_config.lora_config.target_modules = targets_without_experts(model, vllm_config.lora_config)
        return load(self, model, vllm_config, device)

    FusedMoEConfig.__post_init__ = finish_without_lora
    LoRAModelRunnerMixin.load_lora_model = load_without_experts


def targets_without_experts(model: Any, lora_config: Any) -> list[str] | None:
    """Return the names of the layers that vLLM can adapt and that are no experts; for a dense model, what was there.

    Args:
        model: The model, before its layers are wrapped.
        lora_config: vLLM's ``LoRAConfig``.
    """
    from vllm.lora.utils import (
        get_supported_lora_modules,
        is_in_target_modules,
        is_moe_model,
        is_supported_lora_module,
        process_packed_modules_mapping,
    )
    from vllm.model_executor.layers.fused_moe import MoERunner

    wanted: list[str] | None = lora_config.target_modules
    if not is_moe_model(model):
        return wanted
    supported, packed = get_supported_lora_modules(model), process_packed_modules_mapping(model)
    return [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if not isinstance(module, MoERunner)
        and is_supported_lora_module(name, module, supported)
        and is_in_target_modules(name, wanted, packed)
        and _can_be_wrapped(name, module, packed, lora_config, model.config)
    ]


def _can_be_wrapped(name: str, module: Any, packed: Any, lora_config: Any, config: Any) -> bool:
    """Return whether vLLM has a LoRA layer for a module: with a list of targets, one without ends the start."""
    from vllm.lora.utils import _all_lora_classes

    if "lm_head" in name:
        return True  # vLLM wraps the logits processor beside it
    parts = packed.get(name.rpartition(".")[2], [])
    return any(
        layer.can_replace_layer(
            source_layer=module, lora_config=lora_config, packed_modules_list=parts, model_config=config
        )
        for layer in _all_lora_classes
    )
