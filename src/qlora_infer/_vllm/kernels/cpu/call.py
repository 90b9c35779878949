"""The arguments of a compiled LoRA call on the CPU, as they lie in memory, and the functions that read them there."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import carray, njit, types
from numba.extending import intrinsic

from qlora_infer._vllm.kernels.cpu.tiles import TILE_HEAD
from qlora_infer._vllm.kernels.cpu.vectors import ROWS

#: A call's arguments: 64-bit numbers, addresses among them, and one float. The three counters are written by all
#: threads, and each has a cache line of its own.
X, Y, X_STRIDE, Y_STRIDE, SLICES, NUM_SLICES, NUM_INPUTS, BLOCKS, NUM_BLOCKS = range(9)
TILES, NUM_TILES, SUMS, MAX_RANK, SCALE, GAINS, SHIFTS = range(9, 16)
SHRUNK, DONE, EXPANDED = 16, 24, 32
CALL_LAYOUT = struct.Struct("13qd16x" + 3 * "q56x")
#: Of a call whose rows have gains: where the addresses of each slot's are, and how far the shifts are behind them.
GAINS_LAYOUT = struct.Struct("2q")
CALL = CALL_LAYOUT.size // 8
#: What it is told of a slice.
A, B, A_SLOT, B_SLOT, A_RANK, B_RANK, RANKS, OFFSET, SLICE = range(9)


@intrinsic  # type: ignore[untyped-decorator]
def count_up(context: Any, address: Any, step: Any) -> Any:
    """Add to a counter that all threads share, and return its previous value."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], args[1].type.as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "acq_rel")

    return types.int64(types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def read_counter(context: Any, address: Any) -> Any:
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


int32s, int64s, float64s = _view(types.int32), _view(types.int64), _view(types.float64)


@njit(inline="always")  # type: ignore[untyped-decorator]
def tile_at(call: npt.NDArray[np.int64], number: int, at: int, stride: int) -> Any:
    """Return a tile's slot, the number of its rows, and the addresses of its four rows in x or y."""
    tile = int32s(call[TILES] + number * 4 * (TILE_HEAD + ROWS), TILE_HEAD + ROWS)
    rows = tile[TILE_HEAD:]
    return (
        *(np.int64(tile[0]), np.int64(tile[1])),
        *(at + rows[0] * stride, at + rows[1] * stride, at + rows[2] * stride, at + rows[3] * stride),
    )
