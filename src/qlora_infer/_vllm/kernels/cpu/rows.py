"""The compiled call that computes both LoRA products of a layer for a step's rows on the CPU.

A product of torch costs some 20 microseconds in bf16 before it multiplies anything, and decoding makes hundreds of
small ones in a step, several times as many when its rows have several adapters. Here the threads that torch computes
with share a layer's work: each takes the next piece of the first product until none is left, waits until all of them
are done, and goes on with the second. So a call costs some microseconds, and a row gets the same bits whatever else
is in its batch. It is compiled by numba, which vLLM requires anyway, when an engine starts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import cfunc, njit, types

from qlora_infer._vllm.kernels.cpu import call as at
from qlora_infer._vllm.kernels.cpu.call import count_up, float64s, int64s, read_counter, tile_at
from qlora_infer._vllm.kernels.cpu.expansion import expansion
from qlora_infer._vllm.kernels.cpu.tiles import tiles_of
from qlora_infer._vllm.kernels.cpu.vectors import ROWS, Numbers, dots

#: Columns of the second product that a thread takes at a time.
COLUMNS = 512
#: Multiplications that one thread makes while others would only wake up.
ALONE_UP_TO = 2**17


class Layer:
    """A layer's weights as compiled code finds them; it keeps their memory alive, not their content.

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


class Gains:
    """The gains and shifts of a layer's slots as compiled code finds them; it keeps their memory alive.

    Attributes:
        arguments: A call's numbers of them, ``GAINS`` and ``SHIFTS``.
    """

    def __init__(self, of_slots: Mapping[int, npt.NDArray[np.float32]], num_slots: int) -> None:
        """Describe them: for each slot that has any, the gains of all outputs and then their shifts."""
        addresses = np.zeros(num_slots, np.int64)
        for slot, gains in of_slots.items():
            addresses[slot] = gains.ctypes.data
        num_outputs = next(iter(of_slots.values())).shape[1]
        self.arguments = (addresses.ctypes.data, 4 * num_outputs)
        self._kept = (addresses, of_slots)


class Rows:
    """The compiled code for one type of numbers, with the memory that its calls use one after another."""

    def __init__(self, dtype: torch.dtype) -> None:
        """Compile it, which takes some seconds."""
        self.dtype = dtype
        self._code = _compiled(dtype)
        self._call = ctypes.create_string_buffer(at.CALL_LAYOUT.size)
        self._call_at = ctypes.addressof(self._call)
        self._sums = np.zeros(0, np.float32)
        self._sums_at = 0
        self._threads = openmp()

    @cached_property
    def _code_with_gains(self) -> Any:
        """Compiled when the first adapter with gains comes (``compile_gains``)."""
        return _compiled(self.dtype, has_gains=True)

    def compile_gains(self) -> None:
        """Compile the code for rows with gains, unless that is done; it takes some seconds."""
        _ = self._code_with_gains

    def can_add(self, y: torch.Tensor, x: torch.Tensor) -> bool:
        """Return whether the compiled code can read these tensors."""
        return y.dtype is x.dtype is self.dtype and y.stride(-1) == x.stride(-1) == 1

    def add(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        layer: Layer,
        tiles: Tiles,
        scale: float,
        work: int,
        gains: Gains | None = None,
    ) -> None:
        """``y[i, slice] += x[i] @ A[slot of i].T @ B[slot of i].T * scale`` for each row of the tiles, in place.

        Rows whose slot has gains are multiplied by them afterwards, and the slot's shifts are added.

        Sums are made in float32 and rounded once, when they are written. Nothing is checked: the tiles' rows must be
        rows of y and x, for which ``can_add`` holds.

        Args:
            y: ``[at least as many rows as the tiles name, out_features of all slices]``.
            x: ``[as many, in_features]``.
            layer: The weights.
            tiles: The rows.
            scale: A factor.
            work: How many multiplications there are, about: few are left to this thread alone.
            gains: Those of the layer's slots; ``None`` where no row has any.
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
        at.CALL_LAYOUT.pack_into(self._call, 0, *arguments, scale, 0, 0, 0)
        code = self._code
        if gains is not None:
            code = self._code_with_gains
            at.GAINS_LAYOUT.pack_into(self._call, 8 * at.GAINS, *gains.arguments)
        if self._threads is None or work <= ALONE_UP_TO:
            code.ctypes(self._call_at)
        else:
            self._threads(code.address, self._call_at, 0, 0)


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


@cache
def _compiled(dtype: torch.dtype, *, has_gains: bool = False) -> Any:
    """Compile a function that takes the address of a call, for a type of numbers.

    With gains it is another function: what rows without them go through stays as it is, also beside rows that have.
    """
    numbers = Numbers(str(dtype).removeprefix("torch."))
    four_dots, one_dot = dots(numbers, 4), dots(numbers, 1)

    @njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
    def shrink(call: npt.NDArray[np.int64], scale: np.float32, number: int) -> None:
        """Compute the first product of a tile and a slice."""
        tile_number, piece = divmod(number, call[at.NUM_SLICES])
        slot, count, x0, x1, x2, x3 = tile_at(call, tile_number, call[at.X], call[at.X_STRIDE])
        part = int64s(call[at.SLICES] + piece * 8 * at.SLICE, at.SLICE)
        rank, stride = int64s(part[at.RANKS], slot + 1)[slot], part[at.A_RANK]
        a, sums_stride = part[at.A] + slot * part[at.A_SLOT], 4 * call[at.MAX_RANK]
        sums = call[at.SUMS] + number * ROWS * sums_stride
        done = 0
        while done < rank - 3:
            four_dots(count, a, stride, x0, x1, x2, x3, call[at.NUM_INPUTS], scale, sums, sums_stride)
            done, a, sums = done + 4, a + 4 * stride, sums + 16
        while done < rank:
            one_dot(count, a, stride, x0, x1, x2, x3, call[at.NUM_INPUTS], scale, sums, sums_stride)
            done, a, sums = done + 1, a + stride, sums + 4

    expand = expansion(numbers, has_gains=has_gains)

    @cfunc(types.void(types.int64), nopython=True, error_model="numpy")  # type: ignore[untyped-decorator]
    def run(address: int) -> None:
        """Run one thread's share of the call."""
        call = int64s(address, at.CALL)
        scale = np.float32(float64s(address, at.CALL)[at.SCALE])
        total = call[at.NUM_TILES] * call[at.NUM_SLICES]
        number = count_up(address + 8 * at.SHRUNK, 1)
        while number < total:
            shrink(call, scale, number)
            count_up(address + 8 * at.DONE, 1)
            number = count_up(address + 8 * at.SHRUNK, 1)
        while read_counter(address + 8 * at.DONE) < total:
            pass  # others are at the last pieces of the first product
        total = call[at.NUM_TILES] * call[at.NUM_BLOCKS]
        number = count_up(address + 8 * at.EXPANDED, 1)
        while number < total:
            expand(call, number)
            number = count_up(address + 8 * at.EXPANDED, 1)

    return run
