"""The second LoRA product on the CPU, and the gains of the rows that have them, compiled with ``rows.py``."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from qlora_infer._vllm.kernels.cpu import call as at
from qlora_infer._vllm.kernels.cpu.call import int64s, tile_at
from qlora_infer._vllm.kernels.cpu.vectors import ROWS, WIDTH, Numbers, outers


def expansion(numbers: Numbers, *, has_gains: bool) -> Any:
    """Return a function for compiled code: the second product of a tile and a block of columns.

    It is called with a call and the number of its piece. ``y += s B`` for rows without gains, where s are the sums of
    the first product; ``y = g (y + s B) + c`` for rows whose slot has gains g and shifts c.
    """
    add = _addition(numbers, is_scaled=False)

    @njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
    def expand(call: npt.NDArray[np.int64], number: int) -> None:
        """Add the product to the rows."""
        add(call, number, 0)

    if not has_gains:
        return expand
    scale = _addition(numbers, is_scaled=True)

    @njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
    def expand_with_gains(call: npt.NDArray[np.int64], number: int) -> None:
        """Add the product to the rows, and multiply those that have gains."""
        slot, _, _, _, _, _ = tile_at(call, number // call[at.NUM_BLOCKS], 0, 0)
        gains = int64s(call[at.GAINS], slot + 1)[slot]
        if gains == 0:
            add(call, number, 0)
        else:
            scale(call, number, gains)

    return expand_with_gains


def _addition(numbers: Numbers, *, is_scaled: bool) -> Any:
    size = numbers.size
    four_vectors = outers(numbers, 4, is_scaled=is_scaled)
    one_vector = outers(numbers, 1, is_scaled=is_scaled)
    less = outers(numbers, 1, is_masked=True, is_scaled=is_scaled)

    @njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
    def add(call: npt.NDArray[np.int64], number: int, gains: int) -> None:
        """Compute a piece; ``gains`` is the address of the slot's, for all columns of y."""
        tile_number, block_number = divmod(number, call[at.NUM_BLOCKS])
        block = int64s(call[at.BLOCKS] + block_number * 24, 3)
        part = int64s(call[at.SLICES] + block[0] * 8 * at.SLICE, at.SLICE)
        column = part[at.OFFSET] + block[1]
        slot, count, y0, y1, y2, y3 = tile_at(call, tile_number, call[at.Y] + column * size, call[at.Y_STRIDE])
        rank, stride = int64s(part[at.RANKS], slot + 1)[slot], part[at.B_RANK]
        if rank == 0 and not is_scaled:
            return
        b, sums_stride = part[at.B] + slot * part[at.B_SLOT] + block[1] * size, 4 * call[at.MAX_RANK]
        sums = call[at.SUMS] + (tile_number * call[at.NUM_SLICES] + block[0]) * ROWS * sums_stride
        gains, shifts = gains + 4 * column, call[at.SHIFTS]
        left = block[2]
        while left > 0:
            if left >= 4 * WIDTH:
                four_vectors(count, b, stride, y0, y1, y2, y3, rank, sums, sums_stride, left, gains, shifts)
                step = 4 * WIDTH
            elif left >= WIDTH:
                one_vector(count, b, stride, y0, y1, y2, y3, rank, sums, sums_stride, left, gains, shifts)
                step = WIDTH
            else:
                less(count, b, stride, y0, y1, y2, y3, rank, sums, sums_stride, left, gains, shifts)
                step = left
            left, b, gains = left - step, b + step * size, gains + 4 * step
            y0, y1, y2, y3 = y0 + step * size, y1 + step * size, y2 + step * size, y3 + step * size

    return add
