"""LoRA for a few rows on the CPU: one row after another, each with its own slot, in one compiled loop.

A product of torch costs some 20 microseconds in bf16 before it multiplies anything, and decoding makes hundreds of
small ones in a step, several times as many when the rows of a batch have several adapters. These loops cost 3, need
no grouping, and give a row the same bits whatever else is in its batch. They are compiled by numba, which vLLM
requires anyway, when an engine starts. Large products are torch's: its libraries use all cores and blocks of rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

_HALF, _WORD = ir.IntType(16), ir.IntType(32)

#: Sums may be reordered and fused, as every matrix library does; infinities and NaN are kept.
_SUMS = {"reassoc", "contract", "nsz"}


def as_bits(tensor: torch.Tensor) -> npt.NDArray[Any] | None:
    """The tensor's memory as numpy knows it: uint16 for bfloat16, int16 for float16; ``None`` for other types."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()  # type: ignore[no-any-return]
    if tensor.dtype == torch.float16:
        return tensor.view(torch.int16).numpy()  # type: ignore[no-any-return]
    if tensor.dtype == torch.float32:
        return tensor.numpy()  # type: ignore[no-any-return]
    return None


@intrinsic  # type: ignore[untyped-decorator]
def _read(context: Any, value: Any) -> Any:
    """A number of any of the three types, as float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if value == types.uint16:
            word = builder.shl(builder.zext(args[0], _WORD), ir.Constant(_WORD, 16))
            return builder.bitcast(word, ir.FloatType())
        if value == types.int16:
            return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())
        return args[0]

    return types.float32(value), generate


@intrinsic  # type: ignore[untyped-decorator]
def _write(context: Any, value: Any, like: Any) -> Any:
    """A float32 as a number of another's type, rounded to the nearest, ties to even."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if like == types.uint16:
            word = builder.bitcast(args[0], _WORD)
            odd = builder.and_(builder.lshr(word, ir.Constant(_WORD, 16)), ir.Constant(_WORD, 1))
            rounded = builder.add(builder.add(word, ir.Constant(_WORD, 0x7FFF)), odd)
            is_nan = builder.fcmp_unordered("uno", args[0], args[0])
            word = builder.select(is_nan, ir.Constant(_WORD, 0x7FC00000), rounded)
            return builder.trunc(builder.lshr(word, ir.Constant(_WORD, 16)), _HALF)
        if like == types.int16:
            return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), _HALF)
        return args[0]

    return like(types.float32, like), generate


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(context: Any, address: Any, array: Any) -> Any:
    """An address as a pointer to numbers of an array's type."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(array.dtype)(types.int64, array), generate


@njit(fastmath=_SUMS, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def add_rows(
    y_address: int,
    y_width: int,
    x_address: int,
    a: npt.NDArray[Any],
    b: npt.NDArray[Any],
    slots: npt.NDArray[np.int64],
    ranks: npt.NDArray[np.int64],
    offset: int,
    size: int,
    scale: float,
) -> None:
    """``y[i, offset:offset + size] += x[i] @ a[slots[i]].T @ b[slots[i]] * scale`` for each row, in place.

    All sums are made in float32 and rounded once, when they are written. Nothing is checked: y and x must be
    contiguous, of the weights' type, and have at least as many rows as ``slots``. They come as addresses, because
    numpy takes longer to look at two tensors than this takes for one row.

    Args:
        y_address: Where the outputs are, ``[num_rows, y_width]``.
        y_width: How wide they are, all slices together.
        x_address: Where the inputs are, ``[num_rows, in_features]``.
        a: All slots' A, ``[max_loras, max_rank, in_features]``.
        b: All slots' B, transposed, ``[max_loras, max_rank, at least size]``.
        slots: Each row's slot, ``[num_rows or fewer]``; rows with -1, and rows beyond, are not touched.
        ranks: How many ranks each slot uses, ``[max_loras]``.
        offset: Where in y the slice begins.
        size: How wide the slice is.
        scale: A factor.
    """
    y = carray(_pointer(y_address, a), (len(slots), y_width))
    x = carray(_pointer(x_address, a), (len(slots), a.shape[2]))
    inputs = np.empty(a.shape[2], np.float32)
    outputs = np.empty(size, np.float32)
    for i in range(len(slots)):
        slot = slots[i]
        if slot < 0 or ranks[slot] == 0:
            continue
        source, target = x[i], y[i, offset : offset + size]
        for k in range(len(inputs)):
            inputs[k] = _read(source[k])
        for k in range(size):
            outputs[k] = _read(target[k])
        _add_row(outputs, inputs, a[slot], b[slot], ranks[slot], np.float32(scale))
        for k in range(size):
            target[k] = _write(outputs[k], target[k])


@njit(fastmath=_SUMS, nogil=True, error_model="numpy", inline="always")  # type: ignore[untyped-decorator]
def _add_row(
    outputs: npt.NDArray[np.float32],
    inputs: npt.NDArray[np.float32],
    a: npt.NDArray[Any],
    b: npt.NDArray[Any],
    rank: int,
    scale: np.float32,
) -> None:
    """Four ranks at a time, so that each input is read, and each output written, once for four."""
    whole = rank - rank % 4
    for j in range(0, whole, 4):
        a0, a1, a2, a3 = a[j], a[j + 1], a[j + 2], a[j + 3]
        t0 = t1 = t2 = t3 = np.float32(0)
        for k in range(len(inputs)):
            t0 += inputs[k] * _read(a0[k])
            t1 += inputs[k] * _read(a1[k])
            t2 += inputs[k] * _read(a2[k])
            t3 += inputs[k] * _read(a3[k])
        t0, t1, t2, t3 = t0 * scale, t1 * scale, t2 * scale, t3 * scale
        b0, b1, b2, b3 = b[j], b[j + 1], b[j + 2], b[j + 3]
        for k in range(len(outputs)):
            outputs[k] += t0 * _read(b0[k]) + t1 * _read(b1[k]) + t2 * _read(b2[k]) + t3 * _read(b3[k])
    for j in range(whole, rank):
        row, t = a[j], np.float32(0)
        for k in range(len(inputs)):
            t += inputs[k] * _read(row[k])
        t *= scale
        row = b[j]
        for k in range(len(outputs)):
            outputs[k] += t * _read(row[k])


def compile_for(dtype: torch.dtype) -> None:
    """Compile the loops for a type of weights now, rather than in somebody's first request."""
    one = torch.zeros(1, 1, 1, dtype=dtype)
    weights, slot = as_bits(one), np.zeros(1, np.int64)
    if weights is not None:
        add_rows(one.data_ptr(), 1, one.data_ptr(), weights, weights, slot, slot, 0, 1, 1.0)
