"""The compiled call that computes both LoRA products of a layer for a step's rows on the CPU.

A product of torch costs some 20 microseconds in bf16 before it multiplies anything, and decoding makes hundreds of
small ones in a step, several times as many when its rows have several adapters. Here the threads that torch computes
with share a layer's work: each takes the next piece of the first product until none is left, waits until all of them
are done, and goes on with the second. So a call costs some microseconds, and a row gets the same bits whatever else
is in its batch. It is compiled by numba, which vLLM requires anyway, when an engine starts.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

from qlora_infer._vllm.kernels.cpu.tiles import TILE_HEAD, tiles_of
from qlora_infer._vllm.kernels.cpu.vectors import ROWS, WIDTH, Numbers, dots, outers

#: What a call is arguments: 64-bit numbers, addresses among them, and one float. The three counters are written by all
#: threads, and each has a cache line of its own.
X, Y, X_STRIDE, Y_STRIDE, SLICES, NUM_SLICES, NUM_INPUTS, BLOCKS, NUM_BLOCKS = range(9)
TILES, NUM_TILES, SUMS, MAX_RANK, SCALE = range(9, 14)
SHRUNK, DONE, EXPANDED = 16, 24, 32
CALL_LAYOUT = struct.Struct("13qd16x" + 3 * "q56x")
CALL = CALL_LAYOUT.size // 8
#: What it is told of a slice.
A, B, A_SLOT, B_SLOT, A_RANK, B_RANK, RANKS, OFFSET, SLICE = range(9)
#: Columns of the second product that a thread takes at a time.
COLUMNS = 512
#: Multiplications that one thread makes while others would only wake up.
ALONE_UP_TO = 2**17


class Layer:
    """A layer's weights as compiled code finds them; it keeps their memory alive, not what is in it.

    Attributes:
        arguments: A call's numbers of it, from ``SLICES`` to ``NUM_BLOCKS``.
        max_rank: The most ranks that a slot may have.
    """

    def __init__(
        self,
        a: Sequence[torch.Tensor],
        b: Sequence[torch.Tensor],
        ranks: Sequence[npt.NDArray[np.int64]],
        sizes: Sequence[int],
    ) -> None:
        """Describe a layer.

        Args:
            a: Each slice's A, ``[max_loras, 1, max_rank, in_features]``; neighbours in memory are inputs.
            b: Each slice's B, ``[max_loras, 1, out_features, max_rank]``; neighbours in memory are outputs.
            ranks: For each slice, how many ranks each slot uses.
            sizes: How wide each slice is in y.
        """
        offsets = np.cumsum([0, *sizes])[:-1].tolist()
        slices = [
            (
                *(left.data_ptr(), right.data_ptr()),
                *(tensor.stride(0) * tensor.element_size() for tensor in (left, right)),
                *(left.stride(2) * left.element_size(), right.stride(3) * right.element_size()),
                *(of_slots.ctypes.data, offset),
            )
            for left, right, of_slots, offset in zip(a, b, ranks, offsets, strict=True)
        ]
        blocks = [
            (piece, first, min(COLUMNS, size - first))
            for piece, size in enumerate(sizes)
            for first in range(0, size, COLUMNS)
        ]
        tables = np.array(slices, np.int64), np.array(blocks, np.int64)
        self.max_rank = a[0].shape[-2]
        self.num_slices = len(slices)
        self.arguments = (tables[0].ctypes.data, len(slices), a[0].shape[-1], tables[1].ctypes.data, len(blocks))
        self._kept = (tables, a, b, ranks)


class Tiles:
    """A batch's rows as compiled code finds them.

    Attributes:
        arguments: A call's numbers of them, ``TILES`` and ``NUM_TILES``.
    """

    def __init__(self, slots: npt.NDArray[np.integer]) -> None:
        """Cut rows into tiles by the slot of each; -1 for rows without an adapter."""
        self._tiles = tiles_of(slots, ROWS)
        self.arguments = (self._tiles.ctypes.data, len(self._tiles))


class Rows:
    """The compiled code for one type of numbers, with the memory that its calls use one after another."""

    def __init__(self, dtype: torch.dtype) -> None:
        """Compile it, which takes some seconds."""
        self.dtype = dtype
        code = _compiled(dtype)
        self._run, self._address = code.ctypes, code.address
        self._call = ctypes.create_string_buffer(CALL_LAYOUT.size)
        self._call_at = ctypes.addressof(self._call)
        self._sums = np.zeros(0, np.float32)
        self._sums_at = 0
        self._threads = openmp()

    def can_add(self, y: torch.Tensor, x: torch.Tensor) -> bool:
        """Return whether the compiled code can read these tensors."""
        return y.dtype is x.dtype is self.dtype and y.stride(-1) == x.stride(-1) == 1

    def add(self, y: torch.Tensor, x: torch.Tensor, layer: Layer, tiles: Tiles, scale: float, work: int) -> None:
        """``y[i, slice] += x[i] @ A[slot of i].T @ B[slot of i].T * scale`` for each row of the tiles, in place.

        Sums are made in float32 and rounded once, when they are written. Nothing is checked: the tiles' rows must be
        rows of y and x, for which ``can_add`` holds.

        Args:
            y: ``[at least as many rows as the tiles name, out_features of all slices]``.
            x: ``[as many, in_features]``.
            layer: The weights.
            tiles: The rows.
            scale: A factor.
            work: How many multiplications there are, about: few are left to this thread alone.
        """
        size = 4 if self.dtype is torch.float32 else 2
        num_sums = tiles.arguments[1] * layer.num_slices * ROWS * layer.max_rank
        if num_sums > len(self._sums):
            self._sums = np.empty(num_sums, np.float32)
            self._sums_at = self._sums.ctypes.data
        strides = x.stride(0) * size, y.stride(0) * size
        arguments = (
            x.data_ptr(),
            y.data_ptr(),
            *strides,
            *layer.arguments,
            *tiles.arguments,
            self._sums_at,
            layer.max_rank,
        )
        CALL_LAYOUT.pack_into(self._call, 0, *arguments, scale, 0, 0, 0)
        if self._threads is None or work <= ALONE_UP_TO:
            self._run(self._call_at)
        else:
            self._threads(self._address, self._call_at, 0, 0)


@cache
def openmp() -> Callable[[int, int, int, int], None] | None:
    """OpenMP's "run this on all threads", of the OpenMP that torch computes with; ``None`` if it cannot be had.

    ``GOMP_parallel(function, argument, number of threads or 0, flags)`` is what compilers call for a parallel region,
    in GNU's OpenMP as in Intel's and LLVM's, which have it for programs that GNU's compiler made. One that is preloaded
    takes the place of the one that came with torch, and is found first.
    """
    for library in (None, str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")):
        try:
            run = ctypes.CDLL(library).GOMP_parallel
        except (OSError, AttributeError):
            continue
        run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        run.restype = None
        return run
    return None


@intrinsic  # type: ignore[untyped-decorator]
def count_up(context: Any, address: Any, step: Any) -> Any:
    """Add to a counter that all threads share; what it was before."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], args[1].type.as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "acq_rel")

    return types.int64(types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _read(context: Any, address: Any) -> Any:
    """Return the current value of a counter."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(args[0], args[0].type.as_pointer()), "acquire", 8)

    return types.int64(types.int64), generate


def _view(numbers: Any) -> Any:
    """Return a function for compiled code: an array of such numbers at an address."""

    @intrinsic  # type: ignore[untyped-decorator]
    def pointer(context: Any, address: Any) -> Any:
        """Give numba the type and the code of the pointer."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(numbers)(types.int64), generate

    @njit(inline="always")  # type: ignore[untyped-decorator]
    def view(address: int, length: int) -> Any:
        return carray(pointer(address), (length,))

    return view


_int32s, int64s, _float64s = _view(types.int32), _view(types.int64), _view(types.float64)


@njit(inline="always")  # type: ignore[untyped-decorator]
def _tile(call: npt.NDArray[np.int64], number: int, at: int, stride: int) -> Any:
    """Return a tile's slot, the number of its rows, and the addresses of its four rows in x or y."""
    tile = _int32s(call[TILES] + number * 4 * (TILE_HEAD + ROWS), TILE_HEAD + ROWS)
    rows = tile[TILE_HEAD:]
    return (
        *(np.int64(tile[0]), np.int64(tile[1])),
        *(at + rows[0] * stride, at + rows[1] * stride, at + rows[2] * stride, at + rows[3] * stride),
    )


@cache
def _compiled(dtype: torch.dtype) -> Any:
    """Compile a function that takes the address of a call, for a type of numbers."""
    numbers = Numbers(str(dtype).removeprefix("torch."))
    size = numbers.size
    four_dots, one_dot = dots(numbers, 4), dots(numbers, 1)
    four_vectors, one_vector, less = outers(numbers, 4), outers(numbers, 1), outers(numbers, 1, is_masked=True)

    @njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
    def shrink(call: npt.NDArray[np.int64], scale: np.float32, number: int) -> None:
        """Compute the first product of a tile and a slice."""
        tile_number, piece = divmod(number, call[NUM_SLICES])
        slot, count, x0, x1, x2, x3 = _tile(call, tile_number, call[X], call[X_STRIDE])
        part = int64s(call[SLICES] + piece * 8 * SLICE, SLICE)
        rank, stride = int64s(part[RANKS], slot + 1)[slot], part[A_RANK]
        a, sums_stride = part[A] + slot * part[A_SLOT], 4 * call[MAX_RANK]
        sums = call[SUMS] + number * ROWS * sums_stride
        done = 0
        while done < rank - 3:
            four_dots(count, a, stride, x0, x1, x2, x3, call[NUM_INPUTS], scale, sums, sums_stride)
            done, a, sums = done + 4, a + 4 * stride, sums + 16
        while done < rank:
            one_dot(count, a, stride, x0, x1, x2, x3, call[NUM_INPUTS], scale, sums, sums_stride)
            done, a, sums = done + 1, a + stride, sums + 4

    @njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
    def expand(call: npt.NDArray[np.int64], number: int) -> None:
        """Compute the second product of a tile and a block of columns."""
        tile_number, block_number = divmod(number, call[NUM_BLOCKS])
        block = int64s(call[BLOCKS] + block_number * 24, 3)
        part = int64s(call[SLICES] + block[0] * 8 * SLICE, SLICE)
        y = call[Y] + (part[OFFSET] + block[1]) * size
        slot, count, y0, y1, y2, y3 = _tile(call, tile_number, y, call[Y_STRIDE])
        rank, stride = int64s(part[RANKS], slot + 1)[slot], part[B_RANK]
        if rank == 0:
            return
        b, sums_stride = part[B] + slot * part[B_SLOT] + block[1] * size, 4 * call[MAX_RANK]
        sums = call[SUMS] + (tile_number * call[NUM_SLICES] + block[0]) * ROWS * sums_stride
        left = block[2]
        while left > 0:
            if left >= 4 * WIDTH:
                four_vectors(count, b, stride, y0, y1, y2, y3, rank, sums, sums_stride, left)
                step = 4 * WIDTH
            elif left >= WIDTH:
                one_vector(count, b, stride, y0, y1, y2, y3, rank, sums, sums_stride, left)
                step = WIDTH
            else:
                less(count, b, stride, y0, y1, y2, y3, rank, sums, sums_stride, left)
                step = left
            left, b = left - step, b + step * size
            y0, y1, y2, y3 = y0 + step * size, y1 + step * size, y2 + step * size, y3 + step * size

    @cfunc(types.void(types.int64), nopython=True, error_model="numpy")  # type: ignore[untyped-decorator]
    def run(address: int) -> None:
        """Run one thread's share of the call."""
        call = int64s(address, CALL)
        scale = np.float32(_float64s(address, CALL)[SCALE])
        total = call[NUM_TILES] * call[NUM_SLICES]
        number = count_up(address + 8 * SHRUNK, 1)
        while number < total:
            shrink(call, scale, number)
            count_up(address + 8 * DONE, 1)
            number = count_up(address + 8 * SHRUNK, 1)
        while _read(address + 8 * DONE) < total:
            pass  # others are at the last pieces of the first product
        total = call[NUM_TILES] * call[NUM_BLOCKS]
        number = count_up(address + 8 * EXPANDED, 1)
        while number < total:
            expand(call, number)
            number = count_up(address + 8 * EXPANDED, 1)

    return run
