"""The transfer of an adapter from host memory into a slot, in a few calls of torch.

vLLM moves it tensor by tensor, in some thirty calls for each layer of a Llama, each of which gives Python's lock away
and waits for it again: on an H100 a request waited 11 ms for 25 MB. Read in vLLM 0.32.0,
``vllm/lora/model_manager.py`` (``activate_adapter``) and ``vllm/lora/layers``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeAlias, TypeVar

import torch

Weights: TypeAlias = torch.Tensor | Sequence[torch.Tensor | None]
T = TypeVar("T")


def move_at_once(manager: Any) -> frozenset[str]:
    """From now on have vLLM's ``LoRAModelManager`` collect what an adapter's move takes, and then do all of it.

    Layers whose weights are not simply copied (mixtures of experts, embeddings, heads, those that are split over GPUs)
    go on as vLLM has them.

    Returns:
        The last parts of modules' names, such as ``"q_proj"``, that only stand for modules that are moved so. Their
        weights may be of other dtypes than the slots.
    """
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.lora.layers.column_parallel_linear import (
        MergedColumnParallelLinearVariableSliceWithLoRA,
        MergedColumnParallelLinearWithLoRA,
    )

    known = {
        BaseLinearLayerWithLoRA.set_lora,
        MergedColumnParallelLinearWithLoRA.set_lora,
        MergedColumnParallelLinearVariableSliceWithLoRA.set_lora,
    }
    move = Move()
    moved: set[str] = set()
    others: set[str] = set()
    for name, module in manager.modules.items():
        parts = manager.packed_modules.get(name, [name])
        kinds = {part.rpartition(".")[2] for part in parts}
        if getattr(type(module), "set_lora", None) in known and module.tp_size == 1 and len(parts) <= module.n_slices:
            slots = Slots((*module.lora_a_stacked, *module.lora_b_stacked))
            module.set_lora = partial(move.fill, slots)
            module.reset_lora = partial(move.empty, slots)
            moved |= kinds
        else:
            others |= kinds
    activate = manager.activate_adapter

    def activate_adapter(lora_id: int) -> bool:
        move.clear()
        is_new = bool(activate(lora_id))
        move.make()
        return is_new

    manager.activate_adapter = activate_adapter
    return frozenset(moved - others)


def spread(parts: Sequence[T], num_slices: int) -> list[T]:
    """Repeat what belongs to the parts of a module for each of its slices; the first part has what others leave.

    So it is for modules that are fused in the checkpoint, and for Qwen3.5's ``in_proj_qkvz`` of two parts and four
    slices (``MergedColumnParallelLinearWithLoRA.expand_packed_lora`` in vLLM 0.32.0, ``column_parallel_linear.py``).
    """
    return [*[parts[0]] * (num_slices - len(parts) + 1), *parts[1:]]


def cut_into_slices(
    lora_a: Sequence[torch.Tensor | None], lora_b: Sequence[torch.Tensor | None], sizes: Sequence[int]
) -> list[torch.Tensor | None]:
    """Return A and then B of each slice of a module: a part's A for all of its slices, and its B cut into them."""
    num_joined = len(sizes) - len(lora_b) + 1
    if num_joined == 1:
        return [*lora_a, *lora_b]
    first = lora_b[0]
    cut = [None] * num_joined if first is None else first.split(list(sizes[:num_joined]))
    return [*spread(lora_a, len(sizes)), *cut, *lora_b[1:]]


class Slots:
    """Each slot's part of a module's stacked weights.

    Args:
        stacked: A and B of each slice, ``[slots, 1, rows, columns]``.
    """

    def __init__(self, stacked: Sequence[torch.Tensor]) -> None:
        self._stacked = stacked
        self._known: dict[int, tuple[list[int], list[torch.Tensor]]] = {}

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        # The kernels for CPUs lay the weights out anew.
        addresses = [tensor.data_ptr() for tensor in self._stacked]
        known = self._known.get(index)
        if known is None or known[0] != addresses:
            known = self._known[index] = addresses, [tensor[index, 0] for tensor in self._stacked]
        return known[1]


class Move:
    """The writes into a slot, made all at once."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Discard the collected moves."""
        self._emptied: list[torch.Tensor] = []
        self._copies: dict[tuple[torch.dtype, int], tuple[list[torch.Tensor], list[torch.Tensor]]] = {}

    def fill(self, slots: Slots, index: int, lora_a: Weights, lora_b: Weights) -> None:
        """Collect a module's weights, as its ``set_lora`` takes them; the rest of the slot becomes 0."""
        of_slot = slots[index]
        sizes = [slot.shape[0] for slot in of_slot[len(of_slot) // 2 :]]
        for slot, weights in zip(of_slot, cut_into_slices(_each(lora_a), _each(lora_b), sizes), strict=True):
            if weights is None:
                self._emptied.append(slot)
                continue
            target = slot
            if weights.shape != slot.shape:
                self._emptied.append(slot)
                target = slot[: weights.shape[0], : weights.shape[1]]
            # What is of another dtype goes by the memory that it lies in, so that not all of it is on the device twice.
            memory = 0 if weights.dtype == slot.dtype else weights.untyped_storage().data_ptr()
            targets, sources = self._copies.setdefault((weights.dtype, memory), ([], []))
            targets.append(target)
            sources.append(weights)

    def empty(self, slots: Slots, index: int) -> None:
        """Collect that an adapter does not change a module, as its ``reset_lora`` does."""
        self._emptied += slots[index]

    def make(self) -> None:
        """Write it."""
        if self._emptied:
            torch._foreach_zero_(self._emptied)
        for (dtype, _), (targets, sources) in self._copies.items():
            if dtype != targets[0].dtype:
                sources = _on_device(sources, targets[0].device)
            torch._foreach_copy_(targets, sources, non_blocking=True)
        self.clear()


def _on_device(weights: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Copy the weights to the device, which casts faster; one call casts only data that is there already."""
    flat = torch.empty(sum(tensor.numel() for tensor in weights), dtype=weights[0].dtype, device=device)
    copies: list[torch.Tensor] = list(torch._C._nn.unflatten_dense_tensors(flat, weights))
    torch._foreach_copy_(copies, weights, non_blocking=True)
    return copies


def _each(weights: Weights) -> Sequence[torch.Tensor | None]:
    return [weights] if isinstance(weights, torch.Tensor) else weights
