"""The GPU's part of the fused kernel, in Triton.

Punica (Chen et al., 2023, https://arxiv.org/abs/2310.18547) calls the products shrink (``x @ A.T``, to the rank) and
expand (``@ B.T``, to the output). vLLM launches one kernel for each, after a third that fills their buffer with
zeros, into which the first adds with atomics. Here some programs of one launch shrink, each a part of the input's
columns, and leave their partial sums; the others wait for the sums of their own rows, add them up in a fixed order
and expand. Programs start in the order of their numbers, and those that shrink come first and wait for nobody: so
waiting always has an end. A row's sums do not depend on the rows beside it.

A partial sum is one 64-bit word: the float, and above it the number of the round that wrote it. So who waits reads
the sums themselves until they are this round's, and needs no flag, fence or second reading (as the LL protocol of
NCCL does, https://github.com/NVIDIA/nccl). The round is counted by those who have read: each adds its share of one
whole round, and goes on without waiting. Until the last has read, the count's whole part is that of the round before.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_tiles", "num_blocks", "chunk_k", "first_bit"])
def lora_kernel(
    x, y, a_pointers, b_pointers, sums, rounds, tiles, blocks, num_tiles, num_blocks, K, chunk_k, x_stride, y_stride,
    a_slot_stride, first_bit,
    SLICES: tl.constexpr, SPLITS: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SUMS: tl.constexpr, AT_ONCE: tl.constexpr, EVEN_K: tl.constexpr,
    ALIGNED: tl.constexpr, SHRUNK: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr, launch_pdl: tl.constexpr,
) -> None:  # fmt: skip
    """``y[rows] += x[rows] @ A.T @ B.T`` for the adapter of each tile and each slice of a module.

    Args:
        x: Inputs ``[M, K]``; with ``SHRUNK`` the finished first products ``[M, RANK]``, as an embedding has them.
        y: Outputs ``[M, sum of the slices' sizes]``.
        a_pointers: For each slice the address of its A matrices ``[slots, RANK, K]``.
        b_pointers: For each slice the address of its B matrices ``[slots, size, RANK]``.
        sums: Scratch ``[num_tiles, SLICES, SUMS]`` that only this kernel writes.
        rounds: ``[num_tiles, SLICES]``: how many rounds there were, with 20 bits behind the point.
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
            program - num_shrink,
            x, y, b_pointers, sums, rounds, tiles, blocks, num_blocks, x_stride, y_stride, first_bit,
            SLICES, SPLITS, RANK, BLOCK_R, BLOCK_M, BLOCK_N, SUMS, AT_ONCE, ALIGNED, SHRUNK, ADD, PDL,
        )  # fmt: skip


@triton.jit
def _this_round(count) -> tl.tensor:
    return ((tl.load(count) >> 20) + 1) & 0x7FFFFFFF


@triton.jit
def _shrink(
    program, x, a_pointers, sums, rounds, tiles, K, chunk_k, x_stride, a_slot_stride, first_bit,
    SLICES: tl.constexpr, SPLITS: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, SUMS: tl.constexpr, EVEN_K: tl.constexpr, ALIGNED: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
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
        now = _this_round(rounds + tile_slice)
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
        words = (now << 32) | (product.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF)
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
) -> None:  # fmt: skip
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
            round_at = rounds + tile_slice
            now = _this_round(round_at)
            product = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            split = tl.arange(0, AT_ONCE)
            at = sums + tile_slice.to(tl.int64) * SUMS
            at += (split[:, None, None] * BLOCK_M + row[None, :, None]) * BLOCK_R + r[None, None, :]
            is_sum = (split >= 0)[:, None, None] & is_row[None, :, None] & is_rank[None, None, :]
            nothing = now << 32
            for begin in tl.static_range(0, SPLITS, AT_ONCE):
                words = tl.load(at + begin * BLOCK_M * BLOCK_R, mask=is_sum, other=nothing, volatile=True)
                while tl.max(((words >> 32) != now).to(tl.int32)) != 0:
                    words = tl.load(at + begin * BLOCK_M * BLOCK_R, mask=is_sum, other=nothing, volatile=True)
                product += tl.sum((words & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True), axis=0)
        delta = tl.dot(product.to(b_part.dtype), b_part)
        if ADD:
            delta += base.to(tl.float32)
        tl.store(y_at, delta.to(y.dtype.element_ty), mask=is_y)
        if not SHRUNK:
            # A 2**20th is the smallest share; nobody waits for what the counter was.
            num_readers = tl.cdiv(size, BLOCK_N)
            share = (1 << 20) // num_readers
            rest = (1 << 20) - share * num_readers
            tl.atomic_add(round_at, (share + tl.where(first == 0, rest, 0)).to(tl.int64), sem="relaxed", scope="gpu")
    elif PDL:
        tl.extra.cuda.gdc_wait()
