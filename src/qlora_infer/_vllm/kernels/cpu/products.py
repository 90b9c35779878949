"""The float32 product ``x @ weight.T`` on the CPU, whose rows do not depend on the other rows of a batch.

torch's own product chooses its code, and with it the order of every sum, by the number of rows.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import cfunc, types

from qlora_infer._vllm.kernels.cpu.call import count_up, int64s
from qlora_infer._vllm.kernels.cpu.rows import openmp
from qlora_infer._vllm.kernels.cpu.vectors import ROWS, Numbers, dots

#: What a call is told. The counter of pieces, which all threads write, has a cache line of its own.
X, X_STRIDE, NUM_ROWS, WEIGHT, NUM_OUTPUTS, NUM_INPUTS, Y, PIECES, CALL = *range(7), 16, 24
#: Outputs that a thread takes at a time.
OUTPUTS = 64


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute the product, ``[rows, outputs]``, on the threads that torch computes with.

    Args:
        x: ``[rows, inputs]``, float32.
        weight: ``[outputs, inputs]``, float32 and contiguous; a multiple of 4 outputs.
    """
    x = x.contiguous()
    num_rows, num_inputs = x.shape
    # Rows are computed by fours, the last of which may not be there.
    y = torch.empty(-(-num_rows // ROWS) * ROWS, len(weight))
    call = np.zeros(CALL, np.int64)
    call[: Y + 1] = x.data_ptr(), num_inputs * 4, num_rows, weight.data_ptr(), len(weight), num_inputs, y.data_ptr()
    code, threads = _compiled(), openmp()
    if threads is None:
        code.ctypes(call.ctypes.data)
    else:
        threads(code.address, call.ctypes.data, 0, 0)
    return y[:num_rows]


@cache
def _compiled() -> Any:
    numbers = Numbers("float32")
    four_outputs, one_output = dots(numbers, 4), dots(numbers, 1)

    @cfunc(types.void(types.int64), nopython=True, error_model="numpy")  # type: ignore[untyped-decorator]
    def run(address: int) -> None:
        """Run one thread's share of the call."""
        call: npt.NDArray[np.int64] = int64s(address, CALL)
        num_blocks = (call[NUM_OUTPUTS] + OUTPUTS - 1) // OUTPUTS
        total = num_blocks * ((call[NUM_ROWS] + ROWS - 1) // ROWS)
        num_inputs, scale = call[NUM_INPUTS], np.float32(1)
        stride, y_stride = 4 * num_inputs, 4 * call[NUM_OUTPUTS]
        number = count_up(address + 8 * PIECES, 1)
        while number < total:
            block, tile = divmod(number, total // num_blocks)
            row, output = tile * ROWS, block * OUTPUTS
            count = min(ROWS, call[NUM_ROWS] - row)
            x0 = call[X] + row * call[X_STRIDE]
            x1 = x0 + min(1, count - 1) * call[X_STRIDE]
            x2 = x0 + min(2, count - 1) * call[X_STRIDE]
            x3 = x0 + min(3, count - 1) * call[X_STRIDE]
            at, y = call[WEIGHT] + output * stride, call[Y] + row * y_stride + 4 * output
            end = at + min(OUTPUTS, call[NUM_OUTPUTS] - output) * stride
            while at < end:
                if count == 1:
                    four_outputs(count, at, stride, x0, x1, x2, x3, num_inputs, scale, y, y_stride)
                    at, y = at + 4 * stride, y + 16
                else:
                    one_output(count, at, stride, x0, x1, x2, x3, num_inputs, scale, y, y_stride)
                    at, y = at + stride, y + 4
            number = count_up(address + 8 * PIECES, 1)

    return run
