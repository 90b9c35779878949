"""vLLM's object for an adapter in host memory, whose memory is pinned where there is a GPU.

vLLM reads, casts, pins and scales tensor by tensor; here that is a few calls for all of them (``pinned.py``). Read in
vLLM 0.32.0, ``vllm/lora/lora_model.py`` and ``vllm/lora/model_manager.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from attrs import frozen
from vllm.lora.lora_model import LoRAModel

from qlora_infer._vllm.kernels.loading.pinned import read_weights
from qlora_infer.files.snapshot import BIASES_NAME, MAGNITUDES_NAME, SERVED_NAME, WEIGHTS_NAME

#: What is cast when an adapter is moved into a slot, by the device, which is faster at it.
CAST_LATER = (torch.float16, torch.bfloat16)


class PinnedLoRAModel(LoRAModel):  # type: ignore[misc]
    """An adapter in host memory, brought there in a few calls of torch instead of thousands (``pinned.py``).

    vLLM reads with ``safe_open``, which loses memory at each reading (seen with safetensors 0.8.0).

    Attributes:
        moved: The kinds of modules that ``slots.py`` moves into slots, and casts on the GPU. vLLM casts what it
            moves on the CPU, in the middle of a step; so an adapter of others is cast when it is read.
        magnitudes: DoRA's, in float32, by module.
        biases: What it adds to outputs, in float32, by module.
        gains: Those that ``kernels/dora.py`` makes of them, by the model's layers.
    """

    moved: ClassVar[frozenset[str]] = frozenset()
    magnitudes: Mapping[str, torch.Tensor] = MappingProxyType({})
    biases: Mapping[str, torch.Tensor] = MappingProxyType({})
    gains: Mapping[str, Any] = MappingProxyType({})

    @classmethod
    def moved_at_once(cls, kinds: frozenset[str]) -> type[PinnedLoRAModel]:
        """Return this class for a model whose modules of these kinds are moved at once."""
        return type(cls.__name__, (cls,), {"moved": kinds})

    @classmethod
    def from_local_checkpoint(
        cls,
        lora_dir: str,
        expected_lora_modules: set[str],
        peft_helper: Any,
        *,
        moe_ep_spec: Any = None,
        **options: Any,
    ) -> Any:
        """Read an adapter for vLLM.

        Its modules are known to be expected ones: ``load_adapter`` has checked them.
        """
        options["weights_mapper"] = _mapper_for(lora_dir, options.get("weights_mapper"))
        if moe_ep_spec is not None:  # some of its experts belong to other workers: vLLM knows which
            return super().from_local_checkpoint(
                lora_dir, expected_lora_modules, peft_helper, moe_ep_spec=moe_ep_spec, **options
            )
        kept = CAST_LATER if _kinds(peft_helper) <= cls.moved and _scales_exactly(peft_helper) else ()
        path = Path(lora_dir) / WEIGHTS_NAME
        weights = read_weights(path, options["dtype"], pin=torch.cuda.is_available(), kept=kept)
        placed = {name: _Placed(tensor) for name, tensor in weights.items()}
        model = cls.from_lora_tensors(tensors=placed, peft_helper=peft_helper, **options)
        loras = list(model.loras.values())
        for lora in loras:
            lora.lora_a, lora.lora_b = lora.lora_a.tensor, lora.lora_b.tensor
        # Into B, after which there is nothing left to scale on the thread that makes the steps.
        if any(lora.scaling != 1 for lora in loras):
            torch._foreach_mul_([lora.lora_b for lora in loras], [lora.scaling for lora in loras])
        for lora in loras:
            lora.scaling = 1
        for attribute, name in (("magnitudes", MAGNITUDES_NAME), ("biases", BIASES_NAME)):
            if (vectors := path.with_name(name)).exists():
                setattr(model, attribute, read_weights(vectors, torch.float32, pin=False))
        return model


def _mapper_for(lora_dir: str, weights_mapper: Any) -> Any:
    return None if Path(lora_dir).name == SERVED_NAME else weights_mapper


@frozen(repr=False)  # vLLM asks some for their text, which for a tensor is its numbers
class _Placed:
    """A tensor that is as it should be and where it should be: vLLM asks for both, tensor by tensor."""

    tensor: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def to(self, *, device: Any = None, dtype: Any = None) -> _Placed:
        return self

    def pin_memory(self) -> _Placed:
        return self


def merge(manager: Any, adapter: Any) -> None:
    """Make a manager merge the modules that the model has in one, and ask none of them whether it is pinned.

    The weights of experts it joins, for which it needs tensors.
    """
    is_placed = isinstance(adapter, PinnedLoRAModel) and not any(".experts" in name for name in adapter.loras)
    if is_placed:
        _replace_weights(adapter, _Placed)
    manager._add_adapter(adapter)
    if is_placed:
        _replace_weights(adapter, lambda placed: placed.tensor)


def _replace_weights(adapter: Any, change: Callable[[Any], Any]) -> None:
    def changed(weights: Any) -> Any:
        if isinstance(weights, list):
            return [None if piece is None else change(piece) for piece in weights]
        return change(weights)

    for lora in adapter.loras.values():
        lora.lora_a, lora.lora_b = changed(lora.lora_a), changed(lora.lora_b)


def _kinds(peft_helper: Any) -> set[str]:
    """Return the last parts of the names in ``target_modules``, or the pattern that it holds, which is none of them."""
    targets = peft_helper.target_modules
    return {targets} if isinstance(targets, str) else {target.rpartition(".")[2] for target in targets}


def _scales_exactly(peft_helper: Any) -> bool:
    """Return whether the factor of B is a power of two, which numbers of any dtype take without rounding."""
    patterns = (getattr(peft_helper, name, None) for name in ("rank_pattern", "alpha_pattern"))  # vLLM 0.31 has none
    return not any(patterns) and math.frexp(peft_helper.vllm_lora_scaling_factor)[0] == 0.5
