"""LoRA's two products in one launch on a GPU, in Triton.

Punica (Chen et al., 2023, https://arxiv.org/abs/2310.18547) calls the products shrink (``x @ A.T``, to the rank) and
expand (``@ B.T``, to the output). vLLM launches one kernel for each, after a third that fills their buffer with
zeros, into which the first adds with atomics. Here some programs of one launch shrink, each a part of the input's
columns, and leave their partial sums; the others wait for the sums of their own rows, add them up in a fixed order
and expand. Programs start in the order of their numbers, and those that shrink come first and wait for nobody: so
waiting always has an end. A row's sums do not depend on the rows beside it.

A partial sum is one 64-bit word: the float, and above it the number of the round that wrote it. So who waits reads
the sums themselves until they are this round's, and needs no flag, fence or second reading (as the LL protocol of
NCCL does, https://github.com/NVIDIA/nccl).

Adapters' rows come as *tiles*, found on the host: up to ``BLOCK_M`` rows of one adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from attrs import define, field, frozen

#: The sizes of tiles that a batch is cut into, and the most rows of a step that is cut so (``settings_for``).
MOST_ROWS = {16: 512, 32: 1024, 64: 1 << 20}
#: Numbers that a tile begins with: slot (-1: none), number of rows, rank, bits of the slices that its adapter changes.
TILE_HEAD = 4
#: The most partial sums of a tile and slice, for each rank.
SUMS_OF_TILE = 256


@frozen
class Settings:
    """How a module's work is cut up.

    Attributes:
        block_m: Rows of one adapter that a program takes.
        splits: Programs that share the first product of a tile and a slice; a power of two.
        block_k: Inputs that such a program multiplies at a time.
        block_n: Outputs that a program of the second product takes.
        warps: Warps of a program.
        stages: How many loads of the first product are under way.
        words: Partial sums that a thread reads at once.
    """

    block_m: int = 16
    splits: int = 8
    block_k: int = 128
    block_n: int = 256
    warps: int = 4
    stages: int = 3
    words: int = 16


@triton.jit(do_not_specialize=["num_tiles", "num_blocks", "chunk_k", "first_bit"])
def lora_kernel(
    x, y, a_pointers, b_pointers, sums, rounds, tiles, blocks, num_tiles, num_blocks, K, chunk_k, x_stride, y_stride,
    a_slot_stride, first_bit,
    SLICES: tl.constexpr, SPLITS: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SUMS: tl.constexpr, AT_ONCE: tl.constexpr, EVEN_K: tl.constexpr,
    ALIGNED: tl.constexpr, SHRUNK: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr, launch_pdl: tl.constexpr,
):  # fmt: skip
    """``y[rows] += x[rows] @ A.T @ B.T`` for the adapter of each tile and each slice of a module.

    Args:
        x: Inputs ``[M, K]``; with ``SHRUNK`` the finished first products ``[M, RANK]``, as an embedding has them.
        y: Outputs ``[M, sum of the slices' sizes]``.
        a_pointers: For each slice the address of its A matrices ``[slots, RANK, K]``.
        b_pointers: For each slice the address of its B matrices ``[slots, size, RANK]``.
        sums: Scratch ``[num_tiles, SLICES, SUMS]`` that only this kernel writes.
        rounds: ``[num_tiles, SLICES, 2]``: how many rounds there were, and how many programs read this round's sums.
        tiles: ``[num_tiles, 4 + BLOCK_M]``: ``TILE_HEAD`` and the rows.
        blocks: ``[num_blocks, 4]``: slice, first output in the slice, first output in y, the slice's size.
        first_bit: The bit of the first slice in what a tile says of its adapter.
    """
    program = tl.program_id(0)
    num_shrink = 0 if SHRUNK else num_tiles * SLICES * SPLITS
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if program < num_shrink:
        _shrink(
            program, x, a_pointers, sums, rounds, tiles, K, chunk_k, x_stride, a_slot_stride, first_bit,
            SLICES, SPLITS, RANK, BLOCK_R, BLOCK_M, BLOCK_K, SUMS, EVEN_K, ALIGNED, PDL,
        )  # fmt: skip
    else:
        _expand(
            program - num_shrink, x, y, b_pointers, sums, rounds, tiles, blocks, num_blocks, x_stride, y_stride, first_bit,
            SLICES, SPLITS, RANK, BLOCK_R, BLOCK_M, BLOCK_N, SUMS, AT_ONCE, ALIGNED, SHRUNK, ADD, PDL,
        )  # fmt: skip


@triton.jit
def _shrink(
    program, x, a_pointers, sums, rounds, tiles, K, chunk_k, x_stride, a_slot_stride, first_bit,
    SLICES: tl.constexpr, SPLITS: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, SUMS: tl.constexpr, EVEN_K: tl.constexpr, ALIGNED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    split = program % SPLITS
    tile_slice = program // SPLITS
    piece = tile_slice % SLICES
    tile = tiles + (tile_slice // SLICES) * (4 + BLOCK_M)
    row = tl.arange(0, BLOCK_M)
    at_row = tl.load(tile + 4 + row).to(tl.int64)
    slot = tl.load(tile)
    is_row = row < tl.load(tile + 1)
    rank = tl.minimum(tl.load(tile + 2), RANK)
    changes = (tl.load(tile + 3) >> (first_bit + piece)) & 1
    a = tl.load(a_pointers + piece).to(tl.pointer_type(x.dtype.element_ty))
    if (slot >= 0) & (changes != 0):
        r = tl.arange(0, BLOCK_R)
        is_rank = r < rank
        a = tl.multiple_of(a, 16) + slot.to(tl.int64) * a_slot_stride
        product = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        if PDL:
            tl.extra.cuda.gdc_wait()
        now = tl.load(rounds + tile_slice * 2) + 1
        chunk = tl.multiple_of(split * chunk_k, 16)  # lets the compiler load 16 bytes at a time
        for start in range(0, chunk_k, BLOCK_K):
            k = chunk + start + tl.arange(0, BLOCK_K)
            x_at = x + at_row[:, None] * x_stride + k[None, :]
            a_at = a + r[None, :] * K + k[:, None]
            if EVEN_K:
                x_part = tl.load(x_at, mask=is_row[:, None], other=0.0)
                a_part = tl.load(a_at, mask=is_rank[None, :], other=0.0)
            else:
                x_part = tl.load(x_at, mask=is_row[:, None] & (k < K)[None, :], other=0.0)
                a_part = tl.load(a_at, mask=is_rank[None, :] & (k < K)[:, None], other=0.0)
            product = tl.dot(x_part, a_part, product)
        words = (now.to(tl.int64) << 32) | (product.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF)
        at = sums + tile_slice.to(tl.int64) * SUMS + (split * BLOCK_M + row[:, None]) * BLOCK_R + r[None, :]
        if ALIGNED:
            rank = tl.multiple_of(rank, 8)
        tl.store(at, words, mask=is_row[:, None] & (r < rank)[None, :])
    elif PDL:
        tl.extra.cuda.gdc_wait()  # so that a launch is over only after the one before it


@triton.jit
def _expand(
    program, x, y, b_pointers, sums, rounds, tiles, blocks, num_blocks, x_stride, y_stride, first_bit,
    SLICES: tl.constexpr, SPLITS: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SUMS: tl.constexpr, AT_ONCE: tl.constexpr, ALIGNED: tl.constexpr, SHRUNK: tl.constexpr,
    ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tile_number = program // num_blocks
    block = blocks + (program % num_blocks) * 4
    tile = tiles + tile_number * (4 + BLOCK_M)
    row = tl.arange(0, BLOCK_M)
    at_row = tl.load(tile + 4 + row).to(tl.int64)
    slot = tl.load(tile)
    is_row = row < tl.load(tile + 1)
    rank = tl.minimum(tl.load(tile + 2), RANK)
    bits = tl.load(tile + 3)
    piece = tl.load(block)
    first = tl.load(block + 1)
    first_y = tl.load(block + 2)
    size = tl.load(block + 3)
    if (slot >= 0) & (((bits >> (first_bit + piece)) & 1) != 0):
        if ALIGNED:  # lets the compiler load 16 bytes at a time
            rank = tl.multiple_of(rank, 8)
            first = tl.multiple_of(first, 16)
            first_y = tl.multiple_of(first_y, 16)
            size = tl.multiple_of(size, 16)
        r = tl.arange(0, BLOCK_R)
        is_rank = r < rank
        n = first + tl.arange(0, BLOCK_N)
        is_output = n < size
        b = tl.load(b_pointers + piece).to(tl.pointer_type(y.dtype.element_ty))
        b = tl.multiple_of(b, 16) + slot.to(tl.int64) * size * RANK
        b_part = tl.load(b + n[None, :] * RANK + r[:, None], mask=is_output[None, :] & is_rank[:, None], other=0.0)
        y_at = y + at_row[:, None] * y_stride + first_y + tl.arange(0, BLOCK_N)[None, :]
        is_y = is_row[:, None] & is_output[None, :]
        if PDL:
            tl.extra.cuda.gdc_wait()
        if ADD:
            base = tl.load(y_at, mask=is_y, other=0.0)
        if SHRUNK:
            is_sum = is_row[:, None] & is_rank[None, :]
            product = tl.load(x + at_row[:, None] * x_stride + r[None, :], mask=is_sum, other=0.0)
        else:
            tile_slice = tile_number * SLICES + piece
            round_at = rounds + tile_slice * 2
            now = tl.load(round_at) + 1
            product = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            split = tl.arange(0, AT_ONCE)
            at = sums + tile_slice.to(tl.int64) * SUMS
            at += (split[:, None, None] * BLOCK_M + row[None, :, None]) * BLOCK_R + r[None, None, :]
            is_sum = (split >= 0)[:, None, None] & is_row[None, :, None] & is_rank[None, None, :]
            nothing = now.to(tl.int64) << 32
            for begin in tl.static_range(0, SPLITS, AT_ONCE):
                words = tl.load(at + begin * BLOCK_M * BLOCK_R, mask=is_sum, other=nothing, volatile=True)
                while tl.max(((words >> 32) != now).to(tl.int32)) != 0:
                    words = tl.load(at + begin * BLOCK_M * BLOCK_R, mask=is_sum, other=nothing, volatile=True)
                product += tl.sum((words & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True), axis=0)
            # Whoever reads last ends the round; nobody needs the sums or the round's number any more.
            num_read = tl.atomic_add(round_at + 1, 1, sem="relaxed", scope="gpu")
            if num_read == tl.cdiv(size, BLOCK_N) - 1:
                tl.store(round_at, now)
                tl.store(round_at + 1, 0)
        delta = tl.dot(product.to(b_part.dtype), b_part)
        if ADD:
            delta += base.to(tl.float32)
        tl.store(y_at, delta.to(y.dtype.element_ty), mask=is_y)
    elif PDL:
        tl.extra.cuda.gdc_wait()


def most_tiles(num_rows: int, block_m: int, num_slots: int) -> int:
    """The most tiles that so many rows can make, however they are spread over the slots."""
    return min(num_rows, num_rows // block_m + num_slots)


def tiles_of(slots: npt.NDArray[np.int32], block_m: int) -> npt.NDArray[np.int32]:
    """Cut a step's rows into tiles.

    Args:
        slots: The slot of each row, ``[num_rows]``; -1 for rows without an adapter.
        block_m: The most rows of a tile.

    Returns:
        ``[number of tiles, 4 + block_m]``: slot, number of rows, 0, 0, and the rows, in their order.
    """
    order = np.argsort(slots, kind="stable").astype(np.int32)
    order = order[int(np.count_nonzero(slots < 0)) :]
    values, starts, counts = np.unique(slots[order], return_index=True, return_counts=True)
    per_slot = -(-counts // block_m)
    slot_of = np.repeat(np.arange(len(values)), per_slot)
    nth = np.arange(len(slot_of)) - np.repeat(np.cumsum(per_slot) - per_slot, per_slot)
    tiles = np.zeros((len(slot_of), TILE_HEAD + block_m), np.int32)
    tiles[:, 0] = values[slot_of]
    tiles[:, 1] = np.minimum(counts[slot_of] - nth * block_m, block_m)
    at = (starts[slot_of] + nth * block_m)[:, None] + np.arange(block_m)
    is_row = np.arange(block_m) < tiles[:, 1, None]
    tiles[:, TILE_HEAD:] = np.where(is_row, order[np.minimum(at, max(len(order) - 1, 0))], 0) if len(order) else 0
    return tiles


class Batch:
    """Which adapter each row of a step uses, where CUDA graphs find it: always in the same device memory.

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

    @classmethod
    def of(cls, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], *, first_bit: int = 0) -> Module:
        """Describe a module by its stacked weights: A ``[slots, 1, rank, K]`` and B ``[slots, 1, size, rank]`` a slice."""
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
        """Whether rows of B, and slices of y, begin at multiples of 16 bytes."""
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


class Scratch:
    """What launches leave for each other on a device; launches that share it must run one after the other."""

    def __init__(self, max_rows: int, num_slots: int, rank: int, num_slices: int, device: torch.device | str) -> None:
        """Reserve memory for modules of up to ``num_slices`` slices and steps of up to ``max_rows`` rows."""
        num_tiles = max(
            most_tiles(min(max_rows, most_rows), block_m, num_slots) for block_m, most_rows in MOST_ROWS.items()
        )
        self.num_sums = SUMS_OF_TILE * max(16, triton.next_power_of_2(rank))
        self.sums = torch.zeros(num_tiles * num_slices * self.num_sums, dtype=torch.int64, device=device)
        self.rounds = torch.zeros(num_tiles * num_slices * 2, dtype=torch.int32, device=device)


#: How a module's work is cut up, by the most rows for which it is so (``benchmarks/gpu_lora.py --tune``, on an H100).
SETTINGS = {
    64: Settings(block_n=512, words=8),
    512: Settings(block_m=32, words=8),
    1 << 20: Settings(block_m=64, splits=1, block_k=64, block_n=128),
}


def settings_for(num_rows: int, module: Module) -> Settings:
    """How to cut up a module's work for so many rows."""
    return next(settings for most_rows, settings in SETTINGS.items() if num_rows <= most_rows)


def warm_up(
    y: torch.Tensor, x: torch.Tensor, module: Module, scratch: Scratch, num_slots: int, *, is_shrunk: bool, pdl: bool
) -> None:
    """Compile the kernel for a module and for steps of every size up to y's, which stays as it is."""
    nobody = Batch(len(x), num_slots, y.device)
    for num_rows in (1, *(most_rows + 1 for most_rows in SETTINGS)):
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
    """Add to each row of y what its adapter adds to a module's output; rows without one stay as they are.

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
    chosen = settings or settings_for(len(x), module)
    if len(x) > MOST_ROWS[chosen.block_m]:
        raise ValueError(f"{len(x)} rows are not cut into tiles of {chosen.block_m}")
    blocks = module.blocks(chosen.block_n)
    num_tiles = most_tiles(len(x), chosen.block_m, batch.num_slots)
    num_slices = len(module.sizes)
    chunk_k = triton.cdiv(triton.cdiv(module.num_inputs, chosen.splits), chosen.block_k) * chosen.block_k
    block_r = max(16, triton.next_power_of_2(module.rank))
    num_shrink = 0 if is_shrunk else num_tiles * num_slices * chosen.splits
    options: dict[str, Any] = {"num_warps": chosen.warps, "num_stages": chosen.stages}
    lora_kernel[(num_shrink + num_tiles * len(blocks),)](
        x,
        y,
        module.a_pointers,
        module.b_pointers,
        scratch.sums,
        scratch.rounds,
        batch.tiles[chosen.block_m],
        blocks,
        num_tiles,
        len(blocks),
        module.num_inputs,
        chunk_k,
        x.stride(0),
        y.stride(0),
        module.a_slot_stride,
        module.first_bit,
        SLICES=num_slices,
        SPLITS=chosen.splits,
        RANK=module.rank,
        BLOCK_R=block_r,
        BLOCK_M=chosen.block_m,
        BLOCK_N=chosen.block_n,
        BLOCK_K=chosen.block_k,
        SUMS=scratch.num_sums,
        AT_ONCE=max(1, min(chosen.splits, chosen.words * 32 * chosen.warps // (chosen.block_m * block_r))),
        EVEN_K=module.num_inputs == chunk_k * chosen.splits,
        ALIGNED=module.is_aligned,
        SHRUNK=is_shrunk,
        ADD=add,
        PDL=pdl,
        launch_pdl=pdl,
        **options,
    )
