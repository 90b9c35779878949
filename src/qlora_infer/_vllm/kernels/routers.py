"""LoRA on the routers of experts, where vLLM's experts would run the router without it.

vLLM 0.32.0 wraps a router, which stands in a layer and in its experts too, in one LoRA layer, and puts it into both
places (``LoRAModelManager._create_lora_modules``). Where the experts have LoRA themselves, the second place is the LoRA
layer around them, and ``MoERunner``, inside, goes on with the router that it has.
"""

from __future__ import annotations

from typing import Any


def hand_on_routers() -> None:
    """Make experts run the router that vLLM's LoRA layer around them was given."""
    from vllm.lora.layers import FusedMoEWithLoRA
    from vllm.lora.model_manager import LoRAModelManager

    wrap = LoRAModelManager._create_lora_modules

    def wrap_and_hand_on(self: Any) -> None:
        wrap(self)
        for layer in self.model.modules():
            if isinstance(layer, FusedMoEWithLoRA) and "gate" in layer._modules:
                layer.base_layer.gate = layer._modules["gate"]

    LoRAModelManager._create_lora_modules = wrap_and_hand_on
