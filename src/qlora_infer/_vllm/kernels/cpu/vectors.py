"""The innermost loops of LoRA's two products on the CPU, on sixteen numbers at a time, in LLVM IR.

A loop that LLVM turns into vectors by itself sums in an order of LLVM's choice, another one for four rows than for
one. These have the order written out, so that a row gets the same bits whatever is computed beside it. numba builds
them into its compiled functions (``rows.py``); addresses are plain integers, strides are in bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding
from attrs import frozen
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

#: Numbers of a vector: those of AVX-512 and float32. Where vectors are shorter, LLVM takes several.
WIDTH = 16
#: Rows that are computed together, so that a weight is read and converted once for all of them.
ROWS = 4

_I32, _I64, _FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
_FLOATS = ir.VectorType(_FLOAT, WIDTH)
_NOTHING = ir.Constant(_FLOATS, None)


class _BFloat(ir.types.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"


_PAIRS = ir.VectorType(_BFloat(), 2 * WIDTH)


def _words(number: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(_I32, WIDTH), [number] * WIDTH)


@frozen
class Numbers:
    """A type of numbers as LLVM finds it in memory.

    Attributes:
        name: ``"bfloat16"``, ``"float16"`` or ``"float32"``.
    """

    name: str

    @property
    def size(self) -> int:
        """Bytes of a number."""
        return 4 if self.name == "float32" else 2

    @property
    def has_dot(self) -> bool:
        """True if this CPU multiplies pairs of them and sums in float32 (``vdpbf16ps``)."""
        is_host = not (config.CPU_NAME or config.CPU_FEATURES)  # numba may be told to compile for another CPU
        return self.name == "bfloat16" and is_host and llvmlite.binding.get_host_cpu_features().get("avx512bf16", False)

    def memory(self, width: int) -> ir.VectorType:
        """Return the type of a vector of them in memory."""
        element = {"bfloat16": ir.IntType(16), "float16": ir.HalfType(), "float32": _FLOAT}[self.name]
        return ir.VectorType(element, width)

    def load(self, builder: Any, address: Any, mask: Any = None, width: int = WIDTH) -> Any:
        """Neighbours in memory; 0 where the mask is false."""
        kind = self.memory(width)
        pointer = builder.inttoptr(address, kind.as_pointer())
        if mask is None:
            return builder.load(pointer, align=self.size, typ=kind)
        function = _masked(builder, "load", kind, [pointer.type, _I32, mask.type, kind], kind)
        return builder.call(function, [pointer, _I32(self.size), mask, ir.Constant(kind, None)])

    def store(self, builder: Any, address: Any, floats: Any, mask: Any = None) -> None:
        """Write float32s, rounded to the nearest, ties to even, where the mask is true."""
        kind = self.memory(WIDTH)
        pointer, numbers = builder.inttoptr(address, kind.as_pointer()), self._rounded(builder, floats)
        if mask is None:
            builder.store(numbers, pointer, align=self.size)
        else:
            function = _masked(builder, "store", kind, [kind, pointer.type, _I32, mask.type], ir.VoidType())
            builder.call(function, [numbers, pointer, _I32(self.size), mask])

    def read(self, builder: Any, address: Any, mask: Any = None) -> Any:
        """``load``, as float32."""
        numbers = self.load(builder, address, mask)
        if self.name == "float16":
            return builder.fpext(numbers, _FLOATS)
        if self.name == "bfloat16":
            words = builder.zext(numbers, ir.VectorType(_I32, WIDTH))
            return builder.bitcast(builder.shl(words, _words(16)), _FLOATS)
        return numbers

    def _rounded(self, builder: Any, floats: Any) -> Any:
        if self.name == "float16":
            return builder.fptrunc(floats, self.memory(WIDTH))
        if self.name == "bfloat16":
            words = builder.bitcast(floats, ir.VectorType(_I32, WIDTH))
            odd = builder.and_(builder.lshr(words, _words(16)), _words(1))
            rounded = builder.add(builder.add(words, _words(0x7FFF)), odd)
            is_nan = builder.fcmp_unordered("uno", floats, floats)
            words = builder.select(is_nan, _words(0x7FC00000), rounded)
            return builder.trunc(builder.lshr(words, _words(16)), self.memory(WIDTH))
        return floats


_FLOAT32S = Numbers("float32")


def dots(numbers: Numbers, num_ranks: int) -> Any:
    """Return a function for compiled code that computes the dot products of one or four rows of x with some rows of A.

    It is called with ``count, a, a_stride, x0, x1, x2, x3, num_inputs, scale, sums, sums_stride``: the number of rows,
    the addresses of A's first row and of the rows of x (of which one is read where ``count`` is 1, else all), and that
    of the float32 results, ``[rows, num_ranks]``.
    """
    width = 2 * WIDTH if numbers.has_dot else WIDTH

    def for_rows(builder: Any, num_rows: int, args: Sequence[Any]) -> None:
        a, a_stride, *x_at, num_inputs, scale, sums, sums_stride = args
        x_at = x_at[:num_rows]
        a_at = [builder.add(a, builder.mul(a_stride, _I64(rank))) for rank in range(num_ranks)]

        def add(index: Any, totals: Sequence[Any], mask: Any = None) -> list[Any]:
            offset = builder.mul(index, _I64(width * numbers.size))
            addresses = [builder.add(at, offset) for at in (*x_at, *a_at)]
            if numbers.has_dot:
                pairs = [_as_pairs(builder, numbers.load(builder, at, mask, width)) for at in addresses]
                return _each(builder, _dot_pairs, pairs[:num_rows], pairs[num_rows:], totals)
            floats = [numbers.read(builder, at, mask) for at in addresses]
            return _each(builder, _fma, floats[:num_rows], floats[num_rows:], totals)

        whole = builder.sdiv(num_inputs, _I64(width))
        rest = builder.sub(num_inputs, builder.mul(whole, _I64(width)))
        totals = _fold(builder, whole, [_NOTHING] * (num_rows * num_ranks), add)
        is_more = builder.zext(builder.icmp_signed(">", rest, _I64(0)), _I64)
        mask = _first(builder, rest, width)
        totals = _fold(builder, is_more, totals, lambda _, totals: add(whole, totals, mask))
        for number, total in enumerate(totals):
            row, rank = divmod(number, num_ranks)
            at = builder.add(sums, builder.add(builder.mul(sums_stride, _I64(row)), _I64(4 * rank)))
            builder.store(builder.fmul(_sum(builder, total), scale), builder.inttoptr(at, _FLOAT.as_pointer()))

    @intrinsic  # type: ignore[untyped-decorator]
    def dot_block(
        context: Any, count: Any, a: Any, a_stride: Any, x0: Any, x1: Any, x2: Any, x3: Any, num_inputs: Any,
        scale: Any, sums: Any, sums_stride: Any,
    ) -> Any:  # fmt: skip
        """Give numba the type and the code of the function."""
        return types.void(*[types.int64] * 8, types.float32, *[types.int64] * 2), _for_one_or_four(for_rows)

    return dot_block


def outers(numbers: Numbers, num_vectors: int, *, is_masked: bool = False, is_scaled: bool = False) -> Any:
    """Return a function for compiled code that adds the sums times B to some columns of one to four rows of y.

    It is called with ``count, b, b_stride, y0, y1, y2, y3, rank, sums, sums_stride, columns, gains, shifts``: the
    number of rows that are written, the addresses of the columns in B's first row and in the rows of y (all four of
    which may be read where ``count`` is not 1), and that of the float32 sums, ``[rows, rank]``. It takes
    ``num_vectors`` times 16 columns; with ``is_masked`` as many as ``columns`` says, fewer than 16. With ``is_scaled``
    what it writes is multiplied by the float32 gains at an address, and the shifts, so many bytes behind, are added.
    """

    def for_rows(builder: Any, num_rows: int, args: Sequence[Any], count: Any) -> None:
        b, b_stride, *y_at, rank, sums, sums_stride, columns, gains, shifts = args
        mask = _first(builder, columns, WIDTH) if is_masked else None
        steps = [_I64(vector * WIDTH * numbers.size) for vector in range(num_vectors)]
        sums_at = [builder.add(sums, builder.mul(sums_stride, _I64(row))) for row in range(num_rows)]

        def add(index: Any, totals: Sequence[Any]) -> list[Any]:
            b_at = builder.add(b, builder.mul(index, b_stride))
            weights = [numbers.read(builder, builder.add(b_at, step), mask) for step in steps]
            pointers = [
                builder.inttoptr(builder.add(at, builder.mul(index, _I64(4))), _FLOAT.as_pointer()) for at in sums_at
            ]
            factors = [_splat(builder, builder.load(pointer, typ=_FLOAT)) for pointer in pointers]
            return _each(builder, _fma, factors, weights, totals)

        totals = _fold(builder, rank, [_NOTHING] * (num_rows * num_vectors), add)
        gains_at = [builder.add(gains, _I64(vector * WIDTH * 4)) for vector in range(num_vectors if is_scaled else 0)]
        scales = [[_FLOAT32S.load(builder, builder.add(at, to), mask) for to in (_I64(0), shifts)] for at in gains_at]
        for row in range(num_rows):
            with builder.if_then(builder.icmp_signed(">", count, _I64(row))):
                for vector, step in enumerate(steps):
                    at = builder.add(y_at[row], step)
                    total = builder.fadd(numbers.read(builder, at, mask), totals[row * num_vectors + vector])
                    if is_scaled:
                        total = _fma(builder, total, *scales[vector])
                    numbers.store(builder, at, total, mask)

    @intrinsic  # type: ignore[untyped-decorator]
    def outer_block(
        context: Any, count: Any, b: Any, b_stride: Any, y0: Any, y1: Any, y2: Any, y3: Any, rank: Any,
        sums: Any, sums_stride: Any, columns: Any, gains: Any, shifts: Any,
    ) -> Any:  # fmt: skip
        """Give numba the type and the code of the function."""
        return types.void(*[types.int64] * 13), _for_one_or_four(for_rows, with_count=True)

    return outer_block


def _for_one_or_four(for_rows: Callable[..., None], *, with_count: bool = False) -> Callable[..., Any]:
    """Code that is there twice: for one row, and for ``ROWS``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        count, *others = args
        extra = [count] if with_count else []
        with builder.if_else(builder.icmp_signed("==", count, _I64(1))) as (one, four):
            with one:
                for_rows(builder, 1, others, *extra)
            with four:
                for_rows(builder, ROWS, others, *extra)
        return context.get_dummy_value()

    return generate


def _each(
    builder: Any, multiply: Callable[..., Any], lefts: Sequence[Any], rights: Sequence[Any], totals: Sequence[Any]
) -> list[Any]:
    """Each of some vectors by each of others, added to a total of their own."""
    pairs = [(left, right) for left in lefts for right in rights]
    return [multiply(builder, *pair, total) for pair, total in zip(pairs, totals, strict=True)]


def _fold(
    builder: Any, count: Any, initial: Sequence[Any], body: Callable[[Any, Sequence[Any]], Sequence[Any]]
) -> list[Any]:
    """Build a loop: ``for index in range(count): values = body(index, values)``."""
    before, loop, after = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("after")
    builder.cbranch(builder.icmp_signed(">", count, _I64(0)), loop, after)
    builder.position_at_end(loop)
    index, values = builder.phi(_I64), [builder.phi(value.type) for value in initial]
    results, following = body(index, values), builder.add(index, _I64(1))
    end = builder.block
    builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
    for phi, first, again in ((index, _I64(0), following), *zip(values, initial, results, strict=True)):
        phi.add_incoming(first, before)
        phi.add_incoming(again, end)
    builder.position_at_end(after)
    outcomes = [builder.phi(value.type) for value in initial]
    for phi, first, again in zip(outcomes, initial, results, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(again, end)
    return outcomes


def _as_pairs(builder: Any, vector: Any) -> Any:
    return builder.bitcast(vector, _PAIRS)


def _dot_pairs(builder: Any, left: Any, right: Any, total: Any) -> Any:
    """``total`` and, for each of its numbers, two products."""
    kind = ir.FunctionType(_FLOATS, [_FLOATS, _PAIRS, _PAIRS])
    dot = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
    return builder.call(dot, [total, left, right])


def _fma(builder: Any, left: Any, right: Any, total: Any) -> Any:
    """``left * right + total``, rounded once where the CPU can."""
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    return builder.call(
        cgutils.get_or_insert_function(builder.module, kind, "llvm.fmuladd.v16f32"), [left, right, total]
    )


def _sum(builder: Any, vector: Any) -> Any:
    """Sum a vector in halves, always in the same order."""
    width = vector.type.count
    while width > 1:
        width //= 2
        halves = [ir.Constant(ir.VectorType(_I32, width), list(range(at, at + width))) for at in (0, width)]
        low, high = (builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), half) for half in halves)
        vector = builder.fadd(low, high)
    return builder.extract_element(vector, _I32(0))


def _first(builder: Any, count: Any, width: int) -> Any:
    """Return a mask that is true for the first ``count`` numbers."""
    numbers = ir.Constant(ir.VectorType(_I64, width), list(range(width)))
    return builder.icmp_signed("<", numbers, _splat(builder, count, width))


def _splat(builder: Any, value: Any, width: int = WIDTH) -> Any:
    """Return a vector that repeats one number."""
    nothing = ir.Constant(ir.VectorType(value.type, width), ir.Undefined)
    one = builder.insert_element(nothing, value, _I32(0))
    return builder.shuffle_vector(one, nothing, ir.Constant(ir.VectorType(_I32, width), None))


def _masked(builder: Any, what: str, kind: Any, arguments: Sequence[Any], result: Any) -> Any:
    """LLVM's load or store of only some of a vector's numbers."""
    letters = {"i16": "i16", "half": "f16", "float": "f32"}[str(kind.element)]
    name = f"llvm.masked.{what}.v{kind.count}{letters}.p0"
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)
