"""The host's part of the fused GPU kernel: shapes, plans and launches.

A step's rows are cut into tiles (``tiles.py``), which lie in device memory that CUDA graphs refer to. The two numbers
of a tile that are the kernel's own are its adapter's rank, and bits of the slices that the adapter changes. How a
module's work is cut up beyond that is in ``SETTINGS``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
from attrs import define, field, frozen

from qlora_infer._vllm.kernels.cpu.tiles import TILE_HEAD, tiles_of
from qlora_infer._vllm.kernels.cuda.fused_triton import lora_kernel

#: The sizes of tiles that a batch is cut into, and the most rows of a step that is cut so (``settings_for``).
MOST_ROWS = {16: 512, 32: 1024, 64: 1 << 20}
#: The most programs that share a first product: all who wait read the sums of each.
MOST_SPLITS = 8
#: The most partial sums of a tile and slice, for each rank.
SUMS_OF_TILE = 256


@frozen(cache_hash=True)
class Settings:
    """The sizes by which a module's work is cut up.

    Attributes:
        block_m: Rows of one adapter that a program takes.
        inputs: What a program of the first product takes of them, unless more than ``MOST_SPLITS`` would share it.
        block_k: Inputs that such a program multiplies at a time.
        block_n: Outputs that a program of the second product takes.
        warps: Warps of a program.
        stages: How many loads of the first product are under way.
        words: Partial sums that a thread reads at once.
    """

    block_m: int = 16
    inputs: int = 512
    block_k: int = 128
    block_n: int = 256
    warps: int = 4
    stages: int = 3
    words: int = 16

    def splits(self, num_inputs: int) -> int:
        """Programs that share the first product of a tile and a slice; a power of two."""
        wanted: int = triton.next_power_of_2(-(-num_inputs // self.inputs))
        return min(wanted, MOST_SPLITS, SUMS_OF_TILE // self.block_m)


def most_tiles(num_rows: int, block_m: int, num_slots: int) -> int:
    """Return the largest number of tiles that the rows can make, for any spread over the slots."""
    return min(num_rows, num_rows // block_m + num_slots)


class Batch:
    """The adapter of each row of a step, where CUDA graphs find it: always in the same device memory.

    Attributes:
        num_rows: How many rows have an adapter.
        tiles: On the device: the tiles of each size.
    """

    def __init__(self, max_rows: int, num_slots: int, device: torch.device | str) -> None:
        """Reserve memory for steps of up to ``max_rows`` rows."""
        self.num_rows = 0
        self.num_slots = num_slots
        self.tiles: dict[int, torch.Tensor] = {}
        self._num_tiles: dict[int, int] = {}
        for block_m, most_rows in MOST_ROWS.items():
            num_tiles = most_tiles(min(max_rows, most_rows), block_m, num_slots)
            self.tiles[block_m] = torch.full((num_tiles, TILE_HEAD + block_m), -1, dtype=torch.int32, device=device)
            self._num_tiles[block_m] = 0

    def update(self, slots: npt.NDArray[np.int32], heads: Mapping[int, tuple[int, int]] | None = None) -> None:
        """Take over a step's adapters.

        Args:
            slots: The slot of each row, ``[num_rows]``; -1 for rows without an adapter.
            heads: For a slot the rank of its adapter and the bits of what it changes; others may be anything.
        """
        self.num_rows = int(np.count_nonzero(slots >= 0))
        for block_m, on_device in self.tiles.items():
            if len(slots) > MOST_ROWS[block_m]:
                continue  # no step of so many rows, and none that is padded to more, is cut so
            tiles = tiles_of(slots, block_m)
            for tile in tiles:
                tile[2:TILE_HEAD] = (heads or {}).get(int(tile[0]), (1 << 30, -1))
            count = max(len(tiles), self._num_tiles[block_m])  # what the last step had and this one has not, ends
            self._num_tiles[block_m] = len(tiles)
            on_host = torch.empty((count, TILE_HEAD + block_m), dtype=torch.int32, pin_memory=on_device.is_cuda)
            on_host[: len(tiles)] = torch.from_numpy(tiles)
            on_host[len(tiles) :] = -1
            on_device[:count].copy_(on_host, non_blocking=True)


@define
class Module:
    """A module's stacked weights, as the kernel finds them.

    Attributes:
        sizes: The outputs of each slice.
        rank: The highest rank that an adapter may have.
        num_inputs: K.
        first_bit: Which bit of a tile's head stands for the first slice.
    """

    sizes: tuple[int, ...]
    rank: int
    num_inputs: int
    a_pointers: torch.Tensor
    b_pointers: torch.Tensor
    a_slot_stride: int
    first_bit: int = 0
    _blocks: dict[int, torch.Tensor] = field(factory=dict)
    _plans: dict[tuple[Settings, int, bool], Plan] = field(factory=dict)

    @classmethod
    def of(cls, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], *, first_bit: int = 0) -> Module:
        """Describe a module by its slices' weights: A ``[slots, 1, rank, K]``, B ``[slots, 1, size, rank]``."""
        return cls(
            sizes=tuple(tensor.shape[-2] for tensor in b),
            rank=b[0].shape[-1],
            num_inputs=a[0].shape[-1],
            a_pointers=torch.tensor([tensor.data_ptr() for tensor in a], dtype=torch.int64, device=a[0].device),
            b_pointers=torch.tensor([tensor.data_ptr() for tensor in b], dtype=torch.int64, device=a[0].device),
            a_slot_stride=a[0].stride(0),
            first_bit=first_bit,
        )

    @property
    def is_aligned(self) -> bool:
        """True if rows of B, and slices of y, begin at multiples of 16 bytes."""
        return self.rank % 8 == 0 and all(size % 16 == 0 for size in self.sizes)

    def blocks(self, block_n: int) -> torch.Tensor:
        """On the device, ``[number of blocks, 4]``: the outputs in blocks, none of which has two slices."""
        if block_n not in self._blocks:
            starts = np.cumsum([0, *self.sizes])
            rows = [
                (piece, first, int(starts[piece]) + first, size)
                for piece, size in enumerate(self.sizes)
                for first in range(0, size, block_n)
            ]
            self._blocks[block_n] = torch.tensor(rows, dtype=torch.int32, device=self.a_pointers.device)
        return self._blocks[block_n]

    def plan(self, settings: Settings, num_sums: int, *, is_shrunk: bool) -> Plan:
        """Return the plan that all launches with these settings share."""
        key = settings, num_sums, is_shrunk
        if key not in self._plans:
            self._plans[key] = Plan.of(self, settings, num_sums, is_shrunk=is_shrunk)
        return self._plans[key]


@define
class Plan:
    """The sizes by which a module's work is cut up, and the kernels that were compiled for it.

    Triton finds a compiled kernel by all that a call is given, which takes the host longer than the GPU takes for the
    kernel. In steps without a CUDA graph, as those with prompts are, that is what everybody waits for. So the kernel is
    kept here, by what Triton would compile another one for.

    Attributes:
        blocks: ``Module.blocks``.
        chunk_k: Inputs that a program of the first product multiplies.
        shrinks: Programs of the first product for a tile.
        constants: The kernel's constants but the last three.
        kernels: Compiled for the rows' strides and alignment, ``ADD`` and ``PDL``.
    """

    blocks: torch.Tensor
    chunk_k: int
    shrinks: int
    constants: tuple[int | bool, ...]
    kernels: dict[tuple[int, int, bool, bool, bool], Any] = field(factory=dict)

    @classmethod
    def of(cls, module: Module, settings: Settings, num_sums: int, *, is_shrunk: bool) -> Plan:
        """Cut up a module's work."""
        num_slices = len(module.sizes)
        splits = settings.splits(module.num_inputs)
        chunk_k = triton.cdiv(triton.cdiv(module.num_inputs, splits), settings.block_k) * settings.block_k
        block_r = max(16, triton.next_power_of_2(module.rank))
        at_once = settings.words * 32 * settings.warps // (settings.block_m * block_r)
        return cls(
            blocks=module.blocks(settings.block_n),
            chunk_k=chunk_k,
            shrinks=0 if is_shrunk else num_slices * splits,
            constants=(
                *(num_slices, splits, module.rank, block_r, settings.block_m, settings.block_n),
                *(settings.block_k, num_sums, max(1, min(splits, at_once))),
                *(module.num_inputs == chunk_k * splits, module.is_aligned, is_shrunk),
            ),
        )


class Scratch:
    """The memory that launches share on a device; launches that share it must run one after the other."""

    def __init__(self, max_rows: int, num_slots: int, rank: int, num_slices: int, device: torch.device | str) -> None:
        """Reserve memory for modules of up to ``num_slices`` slices and steps of up to ``max_rows`` rows."""
        num_tiles = max(
            most_tiles(min(max_rows, most_rows), block_m, num_slots) for block_m, most_rows in MOST_ROWS.items()
        )
        self.num_slices = num_slices
        self.num_sums = SUMS_OF_TILE * max(16, triton.next_power_of_2(rank))
        self.sums = torch.zeros(num_tiles * num_slices * self.num_sums, dtype=torch.int64, device=device)
        self.rounds = torch.zeros(num_tiles * num_slices, dtype=torch.int64, device=device)


#: How a module's work is cut up: by the highest rank and the most rows for which it is so. What
#: ``benchmarks/gpu_lora.py --tune`` found best on an H100 for ranks 16 and 64.
SETTINGS: dict[int, dict[int, Settings]] = {
    16: {
        64: Settings(stages=4),
        256: Settings(block_n=512, stages=4, words=8),
        512: Settings(block_m=32, words=8),
        1 << 20: Settings(block_m=64, inputs=1 << 20, block_k=64, block_n=128, stages=4),
    },
    1 << 20: {
        4: Settings(inputs=1024, stages=4, words=8),
        64: Settings(inputs=1024, block_n=1024, warps=8, stages=4, words=8),
        256: Settings(inputs=1024, block_n=512, stages=4, words=8),
        512: Settings(block_m=32, inputs=1024, block_n=512, warps=8, stages=4, words=8),
        1 << 20: Settings(block_m=64, inputs=1 << 20, block_k=64),
    },
}


@functools.lru_cache(maxsize=1 << 16)
def settings_for(num_rows: int, rank: int) -> Settings:
    """Choose the division of a module's work, for a number of rows and adapters up to a rank."""
    by_rows = next(by_rows for highest, by_rows in SETTINGS.items() if rank <= highest)
    return next(settings for most_rows, settings in by_rows.items() if num_rows <= most_rows)


def warm_up(
    y: torch.Tensor, x: torch.Tensor, module: Module, scratch: Scratch, num_slots: int, *, is_shrunk: bool, pdl: bool
) -> None:
    """Compile the kernel for a module and for steps of every size up to y's, which stays as it is."""
    nobody = Batch(len(x), num_slots, y.device)
    by_rows = next(by_rows for highest, by_rows in SETTINGS.items() if module.rank <= highest)
    for num_rows in (1, *(most_rows + 1 for most_rows in by_rows)):
        if num_rows <= len(x):
            add_lora(y[:num_rows], x[:num_rows], module, nobody, scratch, is_shrunk=is_shrunk, pdl=pdl)


def add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    module: Module,
    batch: Batch,
    scratch: Scratch,
    *,
    add: bool = True,
    is_shrunk: bool = False,
    pdl: bool = False,
    settings: Settings | None = None,
) -> None:
    """Add the adapters' contributions to the rows of y; rows without an adapter do not change.

    Args:
        y: ``[M, sum of the slices' sizes]``, changed in place.
        x: ``[M, K]``, of the weights' dtype.
        module: The weights.
        batch: The rows' adapters.
        scratch: For launches that run one after the other.
        add: ``False`` to write instead of adding.
        is_shrunk: x is already the first product, ``[M, rank]``.
        pdl: Whether to chain launches (programmatic dependent launch, from Hopper on).
        settings: How to cut up the work; ``None`` to choose by size.
    """
    chosen = settings or settings_for(len(x), module.rank)
    if len(x) > MOST_ROWS[chosen.block_m]:
        raise ValueError(f"{len(x)} rows are not cut into tiles of {chosen.block_m}")
    plan = module.plan(chosen, scratch.num_sums, is_shrunk=is_shrunk)
    num_tiles = most_tiles(len(x), chosen.block_m, batch.num_slots)
    num_blocks = len(plan.blocks)
    num_programs = num_tiles * (plan.shrinks + num_blocks)
    tensors = (
        *(x, y, module.a_pointers, module.b_pointers, scratch.sums, scratch.rounds),
        *(batch.tiles[chosen.block_m], plan.blocks),
    )
    numbers = (
        *(num_tiles, num_blocks, module.num_inputs, plan.chunk_k, x.stride(0), y.stride(0), module.a_slot_stride),
        module.first_bit,
    )
    key = x.stride(0), y.stride(0), (x.data_ptr() | y.data_ptr()) % 16 == 0, add, pdl
    kernel = plan.kernels.get(key)
    if kernel is not None:
        addresses = [tensor.data_ptr() for tensor in tensors]
        kernel[num_programs, 1, 1](*addresses, *numbers, *plan.constants, add, pdl, pdl)
    else:  # Triton's interpreter gives no kernel
        plan.kernels[key] = lora_kernel[(num_programs,)](
            *(*tensors, *numbers, *plan.constants),
            *(add, pdl),
            launch_pdl=pdl,
            num_warps=chosen.warps,
            num_stages=chosen.stages,
        )
