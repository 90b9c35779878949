"""The wrapper through which vLLM's LoRA layers call our kernels on the CPU.

vLLM 0.32's own kernels (``vllm/lora/punica_wrapper/punica_cpu.py``) index the stacked weights with each token's slot.
A token without an adapter has slot -1, which indexes the last slot: base requests get another request's adapter. They
also copy a whole weight matrix for each token, and multiply at the highest rank that an adapter may have.

Here small products are one compiled call for a layer (``rows.py``), and large ones are torch's, adapter by adapter.
Both use the weights where they are, each adapter's at its own rank. Layers that no adapter of the batch changes cost
nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from attrs import define, field
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from qlora_infer._vllm.kernels.cpu.rows import Gains, Layer, Rows, Tiles

#: A slot and the rows of the batch that use it.
Group = tuple[int, slice | torch.Tensor]

#: The gains of a slot for a layer's outputs, and their shifts, ``[2, out_features]``: DoRA's (``kernels/dora.py``).
SlotGains = npt.NDArray[np.float32]

#: Up to this many multiplications for each adapter and slice, compiled code is faster than torch's products, which cost
#: some 20 microseconds each before they multiply anything (``benchmarks/cpu_lora.py --layer`` measures both).
ROWS_UP_TO = 2**24


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
    """The slot that each row of a step uses.

    Attributes:
        slots: Of shape ``[num_rows]``; -1 for rows without an adapter.
        num_rows: How many rows have an adapter.
        used: A bit for each slot that a row uses.
    """

    slots: npt.NDArray[np.int64] = field(factory=lambda: np.zeros(0, np.int64))
    num_rows: int = 0
    used: int = 0

    @cached_property
    def num_slots(self) -> int:
        """The number of used slots."""
        return self.used.bit_count()

    @classmethod
    def of(cls, slots: torch.Tensor) -> Batch:
        """Create the batch from the slot of each row; it copies ``slots``, because vLLM uses the tensor again."""
        own = slots.numpy().copy()
        used = sum(1 << slot for slot in np.unique(own).tolist() if slot >= 0)
        return cls(own, int((own >= 0).sum()), used)

    @cached_property
    def tiles(self) -> Tiles:
        """The rows as compiled code takes them."""
        return Tiles(self.slots)

    @cached_property
    def groups(self) -> list[Group]:
        """The rows of each slot."""
        return group_rows(torch.from_numpy(self.slots))

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
    """The stacked weights of a layer, a tensor for each slice of its outputs, with what is known about them.

    Attributes:
        a: ``[max_loras, 1, max_rank, in_features]``.
        b: ``[max_loras, 1, out_features, max_rank]``; their memory is laid out anew, transposed.
        sizes: How wide each slice is in y.
        gains: Those of the slots that have any, by slot.
        versions: Change with each change of the weights, which vLLM makes in place.
    """

    a: Sequence[torch.Tensor]
    b: Sequence[torch.Tensor]
    sizes: Sequence[int]
    gains: Mapping[int, SlotGains] = field(factory=dict)
    versions: list[int] = field(init=False)

    def __attrs_post_init__(self) -> None:
        # The same tensor objects, so that vLLM goes on writing to them: neighbours in memory are now the outputs of a
        # rank, which compiled code runs along. A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            for b in self.b:
                b.data = b.transpose(-1, -2).contiguous().transpose(-1, -2)
        self._tensors = (*self.a, *self.b)
        self.versions = [tensor._version for tensor in self._tensors]

    def is_current(self) -> bool:
        """Return whether the weights are still those that ``ranks`` was counted in."""
        return [tensor._version for tensor in self._tensors] == self.versions

    @cached_property
    def ranks(self) -> npt.NDArray[np.int64]:
        """The ranks that each slot uses, ``[slices, max_loras]``: after A's last row that is not 0 nothing is added."""
        used = np.stack([a.squeeze(1).ne(0).any(dim=-1).numpy() for a in self.a])
        last = used.shape[-1] - used[..., ::-1].argmax(axis=-1)
        return np.where(used.any(axis=-1), last, 0).astype(np.int64)

    @cached_property
    def used(self) -> int:
        """A bit for each slot whose adapter changes this layer."""
        slots = {*np.flatnonzero(self.ranks.any(axis=0)).tolist(), *self.gains}
        return sum(1 << slot for slot in slots)

    @cached_property
    def with_gains(self) -> int:
        """A bit for each slot that has gains."""
        return sum(1 << slot for slot in self.gains)

    @cached_property
    def compiled_gains(self) -> Gains:
        """The gains as compiled code takes them, where there are any."""
        return Gains(self.gains, len(self.a[0]))

    @cached_property
    def work(self) -> int:
        """Multiplications for a row, at most."""
        widths = [a.shape[-1] + size for a, size in zip(self.a, self.sizes, strict=True)]
        return int((self.ranks.max(axis=1) * widths).sum())

    @cached_property
    def layer(self) -> Layer | None:
        """The weights as compiled code takes them; ``None`` if it cannot."""
        if any(a.stride(-1) != 1 or a.dtype != b.dtype for a, b in zip(self.a, self.b, strict=True)):
            return None
        return Layer(self.a, self.b, list(self.ranks), self.sizes)


class GroupedPunicaWrapper(PunicaWrapperCPU):  # type: ignore[misc]
    """vLLM's interface for LoRA layers.

    Shapes: ``x`` is ``[num_rows, in_features]`` and ``y`` ``[num_rows, out_features]``; the stacked weights of a slice
    are ``[max_loras, 1, rank, in_features]`` for A and ``[max_loras, 1, out_features, rank]`` for B.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tokens = Batch()
        self._sampled = Batch()
        self._logits = self._sampled
        self._weights: dict[int, StackedWeights] = {}
        self._gains: dict[int, dict[int, SlotGains]] = {}
        self._rows: Rows | None = None
        self._used_embeddings: tuple[tuple[int, int], list[bool]] = ((0, 0), [])
        if "lora_config" in kwargs:
            self._rows = Rows(kwargs["lora_config"].lora_dtype)  # compiled now rather than in somebody's first request

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Learn which slot each row of the coming step uses."""
        super().update_metadata(*args, **kwargs)
        self._tokens = Batch.of(self.token_lora_indices)
        self._sampled = self._logits = Batch.of(self.sampler_indices)

    def use_logits_rows(self, slots: npt.NDArray[np.int32] | None) -> None:
        """Use one slot for each row of the next logits, -1 for none; ``None`` brings the step's own rows back."""
        self._logits = self._sampled if slots is None else Batch.of(torch.from_numpy(slots).long())

    def use_gains(self, slot: int, gains: Mapping[int, SlotGains]) -> None:
        """Multiply the outputs of a slot's rows by the gains of its adapter from now on, or no more.

        Args:
            slot: The slot, which has just got another adapter.
            gains: The adapter's by layer, which is the ``id`` of its first stacked A; empty where it has none.
        """
        for layer in [*gains, *(layer for layer, of_slots in self._gains.items() if slot in of_slots)]:
            of_slots = {other: own for other, own in self._gains.get(layer, {}).items() if other != slot}
            self._gains[layer] = of_slots | ({slot: gains[layer]} if layer in gains else {})
            self._weights.pop(layer, None)

    def compile_gains(self, dtype: torch.dtype) -> None:
        """Compile the code for gains before a step has any; on any thread."""
        self._rows_for(dtype).compile_gains()

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
        """``y += x @ A.T @ B.T * scale``, in place; ``buffer`` is not needed.

        Raises:
            ValueError: The numbers of rows and slots differ, so the rows cannot be assigned.
        """
        if self._logits.num_rows and len(self._logits.slots) != len(x):
            raise ValueError(f"{len(self._logits.slots)} rows of logits have a slot, but there are {len(x)}")
        size = min(y.size(-1), lora_b_stacked.size(-2))  # the model and the adapter pad the vocabulary differently
        self._add_lora(y, x, (lora_a_stacked,), (lora_b_stacked,), scale, (size,), self._logits)

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
        if not batch.num_rows:
            return
        weights = self._weights.get(id(lora_a_stacked[0]))
        if weights is None or not weights.is_current():
            gains = self._gains.get(id(lora_a_stacked[0]), {})
            weights = StackedWeights(lora_a_stacked, lora_b_stacked, sizes, gains)
            self._weights[id(lora_a_stacked[0])] = weights
        if not weights.used & batch.used:
            return
        if x.dim() > 2 or y.dim() > 2:
            x, y = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        num_rows = len(batch.slots)
        if num_rows > y.shape[0] or num_rows > x.shape[0]:
            raise ValueError(f"{num_rows} rows have a slot, but there are {len(x)} inputs and {len(y)} outputs")
        work, layer = weights.work * batch.num_rows, weights.layer
        has_gains = weights.with_gains & batch.used
        if layer is not None and work <= ROWS_UP_TO * len(weights.sizes) * batch.num_slots:
            rows = self._rows_for(weights.a[0].dtype)
            if rows.can_add(y, x):
                rows.add(y, x, layer, batch.tiles, scale, work, weights.compiled_gains if has_gains else None)
                return
        _add_by_group(y, x, weights, scale, batch)
        if has_gains:
            _multiply_by_group(y, weights.gains, batch.groups)

    def _rows_for(self, dtype: torch.dtype) -> Rows:
        if self._rows is None or self._rows.dtype != dtype:
            self._rows = Rows(dtype)
        return self._rows


def _add_by_group(y: torch.Tensor, x: torch.Tensor, weights: StackedWeights, scale: float, batch: Batch) -> None:
    """Add a layer's LoRA group by group, each at its own rank; where groups are scattered, sort the rows first."""
    if batch.order is None:
        _add_in_place(y, x, weights, scale, batch.groups)
        return
    added = x.new_zeros(len(batch.order), y.shape[-1])
    _add_in_place(added, x.index_select(0, batch.order), weights, scale, batch.ordered_groups)
    y.index_add_(0, batch.order, added.to(y.dtype))


def _add_in_place(
    y: torch.Tensor, x: torch.Tensor, weights: StackedWeights, scale: float, groups: Iterable[Group]
) -> None:
    for slot, rows in groups:  # each stands together, so that this is y's own memory
        inputs, outputs, offset = x[rows].to(weights.a[0].dtype), y[rows], 0
        for a, b, rank, size in zip(weights.a, weights.b, weights.ranks[:, slot].tolist(), weights.sizes, strict=True):
            if rank:
                target, weight = outputs[:, offset : offset + size], b[slot, 0, :size, :rank].T
                shrunk = inputs @ a[slot, 0, :rank].T
                if target.dtype == weight.dtype:
                    target.addmm_(shrunk, weight, alpha=scale)
                else:
                    target += (shrunk @ weight * scale).to(target.dtype)
            offset += size


def _multiply_by_group(y: torch.Tensor, gains: Mapping[int, SlotGains], groups: Iterable[Group]) -> None:
    for slot, rows in groups:
        if slot in gains:
            gain, shift = torch.from_numpy(gains[slot])
            outputs = y[rows, : len(gain)]
            y[rows, : len(gain)] = (outputs.float() * gain + shift).to(y.dtype)


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
