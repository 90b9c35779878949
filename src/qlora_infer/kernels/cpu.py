"""LoRA on the CPU: what vLLM's LoRA layers call there.

vLLM 0.32's own kernels (``vllm/lora/punica_wrapper/punica_cpu.py``) index the stacked weights with each token's slot.
A token without an adapter has slot -1, which indexes the last slot: base requests get somebody else's adapter. They
also copy a whole weight matrix for each token, and multiply at the highest rank that an adapter may have.

Here small products go row by row (``rows.py``) and large ones group by group, each group with its slot's weights
where they are and at its adapter's own rank. Layers that no adapter of the batch changes cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from attrs import define, field
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from qlora_infer.kernels.rows import add_rows, as_bits, compile_for

#: A slot and the rows of the batch that use it.
Group = tuple[int, slice | torch.Tensor]

#: Up to this many multiplications for each group and slice, rows are faster than torch's products, which cost some 20
#: microseconds each before they multiply anything (``benchmarks/cpu_lora.py`` measures both).
ROWS_UP_TO = 2**21


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


@define(slots=False)
class Batch:
    """Which slot each row of a step uses.

    Attributes:
        slots: Of shape ``[num_rows]``; -1 for rows without an adapter.
        groups: The rows of each slot.
        num_rows: How many rows have an adapter.
    """

    slots: npt.NDArray[np.int64] = field(factory=lambda: np.zeros(0, np.int64))
    groups: list[Group] = field(factory=list)
    num_rows: int = 0

    @classmethod
    def of(cls, slots: torch.Tensor) -> Batch:
        """The batch that vLLM describes with each row's slot; a copy, for vLLM uses the tensor again."""
        own = slots.numpy().copy()
        return cls(own, group_rows(slots), int((own >= 0).sum()))

    @cached_property
    def order(self) -> torch.Tensor | None:
        """The rows in the order of their groups, for ``index_select``; ``None`` if every group stands together."""
        if all(isinstance(rows, slice) for _, rows in self.groups):
            return None
        every = torch.arange(len(self.slots))
        return torch.cat([every[rows] for _, rows in self.groups])

    @cached_property
    def ordered_groups(self) -> list[Group]:
        """The groups in that order, where each stands together."""
        ends = np.cumsum([len(self.slots[rows]) for _, rows in self.groups]).tolist()
        return [(slot, slice(begin, end)) for (slot, _), begin, end in zip(self.groups, [0, *ends], ends, strict=False)]


@define(slots=False)
class StackedWeights:
    """The stacked weights of one slice of a layer, with what is known about them.

    Attributes:
        a: ``[max_loras, 1, max_rank, in_features]``.
        b: ``[max_loras, 1, out_features, max_rank]``; its memory is laid out anew, transposed.
        version: Changes with each change of the weights, which vLLM makes in place.
    """

    a: torch.Tensor
    b: torch.Tensor
    version: tuple[int, int] = field(init=False)

    def __attrs_post_init__(self) -> None:
        # The same tensor object, so that vLLM goes on writing to it: neighbours in memory are now the outputs of a
        # rank, which one row's loop runs along. A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self.b.data = self.b.transpose(-1, -2).contiguous().transpose(-1, -2)
        self.version = self._version()

    def is_current(self) -> bool:
        """Whether the weights are still those that ``ranks`` was counted in."""
        return self.version == self._version()

    def _version(self) -> tuple[int, int]:
        return self.a._version, self.b._version

    @cached_property
    def ranks(self) -> list[int]:
        """How many ranks each slot uses: what comes after the last row of A that is not zero adds nothing."""
        is_used = self.a.squeeze(1).ne(0).any(dim=-1).numpy()
        counts = is_used.shape[1] - is_used[:, ::-1].argmax(axis=1)
        return [int(count) if any_used else 0 for count, any_used in zip(counts, is_used.any(axis=1), strict=True)]

    @cached_property
    def rank_array(self) -> npt.NDArray[np.int64]:
        """``ranks`` for compiled code."""
        return np.array(self.ranks, np.int64)

    @cached_property
    def a_bits(self) -> npt.NDArray[Any] | None:
        """A for compiled code; ``None`` if it cannot be used there."""
        return as_bits(self.a.squeeze(1)) if self.a.is_contiguous() and self.a.dtype == self.b.dtype else None

    @cached_property
    def b_bits(self) -> npt.NDArray[Any] | None:
        """B for compiled code, ``[max_loras, max_rank, out_features]``."""
        return as_bits(self.b.squeeze(1).transpose(-1, -2))


class Slice(NamedTuple):
    """The part of a layer's outputs that has weights of its own: q, k or v of a merged projection, say."""

    weights: StackedWeights
    offset: int
    size: int


@define
class Plan:
    """What a layer does for a batch, while neither the batch nor the weights change.

    Attributes:
        batch: The batch.
        tensors: The weights of all slices.
        versions: Theirs, when the plan was made.
        slices: The slices that an adapter of the batch changes.
        rows: For each of these, what ``add_rows`` is told besides y, x and the scale; empty to go by group.
    """

    batch: Batch
    tensors: list[torch.Tensor]
    versions: list[int]
    slices: list[Slice]
    rows: list[tuple[Any, ...]]

    def holds_for(self, batch: Batch) -> bool:
        """Whether it is still right."""
        return self.batch is batch and [tensor._version for tensor in self.tensors] == self.versions


class GroupedPunicaWrapper(PunicaWrapperCPU):  # type: ignore[misc]
    """vLLM's interface for LoRA layers.

    Shapes: ``x`` is ``[num_rows, in_features]`` and ``y`` ``[num_rows, out_features]``; the stacked weights of a slice
    are ``[max_loras, 1, rank, in_features]`` for A and ``[max_loras, 1, out_features, rank]`` for B.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tokens = Batch()
        self._sampled = Batch()
        self._weights: dict[int, StackedWeights] = {}
        self._plans: dict[int, Plan] = {}
        self._used_embeddings: tuple[tuple[int, int], list[bool]] = ((0, 0), [])
        if "lora_config" in kwargs:
            compile_for(kwargs["lora_config"].lora_dtype)

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Learn which slot each row of the coming step uses."""
        super().update_metadata(*args, **kwargs)
        self._tokens = Batch.of(self.token_lora_indices)
        self._sampled = Batch.of(self.sampler_indices)

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
            _add_product(target.view(-1, target.shape[-1]), x, a, self._tokens.groups, scale)

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
                _zero(target, self._tokens.groups)
            _add_product(target, source, b[..., :size, :], self._tokens.groups)
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
        **kwargs: Any,
    ) -> None:
        """``y[:, slice_i] += x @ A[i].T @ B[i].T * scale`` for each slice, in place; ``buffer`` is not needed."""
        self._add_lora(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, self._tokens)

    def add_lora_embedding(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """``y += x @ B.T``, in place; ``x`` has been looked up in A already."""
        version, is_used = self._used_embeddings
        if version != (id(lora_b_stacked), lora_b_stacked._version):
            is_used = lora_b_stacked.flatten(1).ne(0).any(dim=1).tolist()
            self._used_embeddings = (id(lora_b_stacked), lora_b_stacked._version), is_used
        if not add_inputs or any(is_used[slot] for slot, _ in self._tokens.groups):
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
        """``y += x @ A.T @ B.T * scale``, in place, on one row for each sampled token; ``buffer`` is not needed."""
        size = min(y.size(-1), lora_b_stacked.size(-2))  # the model and the adapter pad the vocabulary differently
        self._add_lora(y, x, (lora_a_stacked,), (lora_b_stacked,), scale, (size,), self._sampled)

    def _add_lora(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        sizes: tuple[int, ...],
        batch: Batch,
    ) -> None:
        if not batch.groups:
            return
        plan = self._plans.get(id(lora_a_stacked[0]))
        if plan is None or not plan.holds_for(batch):
            plan = self._plans[id(lora_a_stacked[0])] = self._plan(lora_a_stacked, lora_b_stacked, sizes, batch)
        if not plan.slices:
            return
        if x.dim() > 2 or y.dim() > 2:
            x, y = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        if plan.rows and y.dtype == x.dtype == lora_a_stacked[0].dtype and y.is_contiguous():
            _add_by_row(y, x.contiguous(), plan.rows, scale, len(batch.slots))
        else:
            _add_by_group(y, x, plan.slices, scale, batch)

    def _plan(
        self,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        sizes: tuple[int, ...],
        batch: Batch,
    ) -> Plan:
        slices, offset, work = [], 0, 0
        for a, b, size in zip(lora_a_stacked, lora_b_stacked, sizes, strict=True):
            weights = self._weights_of(a, b)
            rank = max(weights.ranks[slot] for slot, _ in batch.groups)
            if rank:
                slices.append(Slice(weights, offset, size))
                work += batch.num_rows * rank * (a.shape[-1] + size)
            offset += size
        rows = [(w.a_bits, w.b_bits, batch.slots, w.rank_array, offset, size) for w, offset, size in slices]
        if work > ROWS_UP_TO * len(slices) * len(batch.groups) or any(row[0] is None for row in rows):
            rows = []
        tensors = [*lora_a_stacked, *lora_b_stacked]
        return Plan(batch, tensors, [tensor._version for tensor in tensors], slices, rows)

    def _weights_of(self, a: torch.Tensor, b: torch.Tensor) -> StackedWeights:
        weights = self._weights.get(id(a))
        if weights is None or not weights.is_current():
            weights = self._weights[id(a)] = StackedWeights(a, b)
        return weights


def _add_by_row(y: torch.Tensor, x: torch.Tensor, rows: Iterable[Any], scale: float, num_rows: int) -> None:
    """Add a layer's LoRA row by row."""
    width = y.shape[1]
    if num_rows > min(y.shape[0], x.shape[0]):
        raise ValueError(f"{num_rows} rows have a slot, but there are {len(x)} inputs and {len(y)} outputs")
    y_address, x_address = y.data_ptr(), x.data_ptr()
    for row in rows:
        add_rows(y_address, width, x_address, *row, scale)


def _add_by_group(y: torch.Tensor, x: torch.Tensor, slices: Iterable[Slice], scale: float, batch: Batch) -> None:
    """Add a layer's LoRA group by group, each at its own rank; where groups are scattered, sort the rows first."""
    if batch.order is None:
        _add_in_place(y, x, slices, scale, batch.groups)
        return
    added = x.new_zeros(len(batch.order), y.shape[-1])
    _add_in_place(added, x.index_select(0, batch.order), slices, scale, batch.ordered_groups)
    y.index_add_(0, batch.order, added.to(y.dtype))


def _add_in_place(
    y: torch.Tensor, x: torch.Tensor, slices: Iterable[Slice], scale: float, groups: Iterable[Group]
) -> None:
    for slot, rows in groups:
        inputs, outputs = x[rows], y[rows]
        for weights, offset, size in slices:
            rank = weights.ranks[slot]
            if rank:
                shrunk = inputs.to(weights.a.dtype) @ weights.a[slot, 0, :rank].T
                target = outputs[:, offset : offset + size]
                weight = weights.b[slot, 0, :size, :rank].T
                if target.dtype == weight.dtype:
                    target.addmm_(shrunk, weight, alpha=scale)
                else:
                    target += (shrunk @ weight * scale).to(target.dtype)


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
