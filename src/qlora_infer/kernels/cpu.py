"""LoRA on the CPU: one pair of matrix products for each adapter in the batch.

vLLM 0.32's own kernels (``vllm/lora/punica_wrapper/punica_cpu.py``) index the stacked weights with each token's slot.
A token without an adapter has slot -1, which indexes the last slot: base requests get somebody else's adapter. They
also copy a whole weight matrix for each token. Here the tokens are grouped by slot once a step, tokens without one
are in no group, and each group is multiplied with its slot's weights where they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

#: A slot and the rows of the batch that use it.
Group = tuple[int, slice | torch.Tensor]


def group_rows(slots: torch.Tensor) -> list[Group]:
    """Group the rows of a batch by slot.

    Args:
        slots: Each row's slot, of shape ``[num_rows]``; -1 for rows without an adapter, which are in no group.

    Returns:
        One pair for each slot: the slot, and its rows as a slice where they stand together, else as their indices.
    """
    groups: list[Group] = []
    for slot in slots.unique().tolist():
        if slot < 0:
            continue
        rows = (slots == slot).nonzero().flatten()
        first, last = int(rows[0]), int(rows[-1])
        contiguous = last - first + 1 == rows.numel()
        groups.append((slot, slice(first, last + 1) if contiguous else rows))
    return groups


class GroupedPunicaWrapper(PunicaWrapperCPU):  # type: ignore[misc]
    """vLLM's interface for LoRA layers, by grouped products.

    Shapes: ``x`` is ``[num_rows, in_features]`` and ``y`` ``[num_rows, out_features]``; the stacked weights of a slice
    are ``[max_loras, 1, rank, in_features]`` for A and ``[max_loras, 1, out_features, rank]`` for B.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._token_groups: list[Group] = []
        self._sampler_groups: list[Group] = []

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Group the rows of the coming step."""
        super().update_metadata(*args, **kwargs)
        self._token_groups = group_rows(self.token_lora_indices)
        self._sampler_groups = group_rows(self.sampler_indices)

    def add_shrink(
        self,
        y: tuple[torch.Tensor, ...] | torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        """``y[i] += x @ A[i].T * scale`` for each slice, in place."""
        x = x.view(-1, x.shape[-1])
        for target, a in zip(y, lora_a_stacked, strict=True):
            _add_product(target.view(-1, target.shape[-1]), x, a, self._token_groups, scale)

    def add_expand(
        self,
        y: torch.Tensor,
        x: tuple[torch.Tensor, ...] | torch.Tensor,
        lora_b_stacked: tuple[torch.Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """``y[:, slice_i] += x[i] @ B[i].T`` for each slice, in place; without ``add_inputs``, ``=``."""
        y = y.view(-1, y.shape[-1])
        offset = offset_start
        for source, b, size in zip(x, lora_b_stacked, output_slices, strict=True):
            target = y[:, offset : offset + size]
            if not add_inputs:
                _zero(target, self._token_groups)
            _add_product(target, source, b[..., :size, :], self._token_groups)
            offset += size

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """``y[:, slice_i] += x @ A[i].T @ B[i].T * scale`` for each slice, in place."""
        if not self._token_groups:
            return
        x = x.view(-1, x.shape[-1])
        if buffer is None:
            buffer = tuple(x.new_zeros(x.size(0), a.size(-2)) for a in lora_a_stacked)
        self.add_shrink(buffer, x, lora_a_stacked, scale)
        self.add_expand(y, buffer, lora_b_stacked, output_slices, add_inputs=add_inputs)

    def add_lora_embedding(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """``y += x @ B.T``, in place; ``x`` has been looked up in A already."""
        self.add_expand(y, (x,), (lora_b_stacked,), (y.shape[-1],), add_inputs=add_inputs)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """``y += x @ A.T @ B.T * scale``, in place, on one row for each sampled token."""
        if not self._sampler_groups:
            return
        x = x.view(-1, x.shape[-1])
        y = y.view(-1, y.shape[-1])
        if buffer is None:
            buffer = x.new_zeros(x.size(0), lora_a_stacked.size(-2))
        _add_product(buffer, x, lora_a_stacked, self._sampler_groups, scale)
        size = min(y.size(-1), lora_b_stacked.size(-2))  # the model and the adapter pad the vocabulary differently
        _add_product(y[:, :size], buffer, lora_b_stacked[..., :size, :], self._sampler_groups)


def _add_product(
    target: torch.Tensor,
    source: torch.Tensor,
    stacked: torch.Tensor,
    groups: Iterable[Group],
    scale: float = 1.0,
) -> None:
    """``target[rows] += source[rows] @ stacked[slot].T * scale`` for each group, in place."""
    for slot, rows in groups:
        weight = stacked[slot].squeeze(0).T
        inputs = source[rows].to(weight.dtype)
        if isinstance(rows, slice) and target.dtype == weight.dtype:
            target[rows].addmm_(inputs, weight, alpha=scale)
        else:
            target[rows] += (inputs @ weight * scale).to(target.dtype)


def _zero(target: torch.Tensor, groups: Iterable[Group]) -> None:
    for _, rows in groups:
        target[rows] = 0
