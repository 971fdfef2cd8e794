"""Raw planes of 1 to 8 bits a symbol, packed in rows of 32 bytes (FORMAT.md, section 7.1).

The packing is vertical: symbol 32 j + i of a cell lies in byte i of row j, so a vector unit or a warp handles 32 symbols
with the same shifts, and the symbols that do not fit a row's own bits sit in the spare high bits of all rows.
"""

from collections.abc import Callable
from functools import cache
from math import gcd
from typing import Any, no_type_check

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tzip.coders.arrays import I64, U8, U64
from tzip.coders.errors import CorruptError
from tzip.coders.jit import kernel


def cell(width: int) -> tuple[int, int]:
    """Return (g, b): a cell of 32 g symbols of `width` bits takes b rows of 32 bytes."""
    g = 8 // gcd(width, 8)
    return g, g * width // 8


def packed_size(n: int, width: int) -> int:
    """Return the stored bytes of n symbols of `width` bits."""
    if width == 8:
        return n
    g, b = cell(width)
    return -(-n // (32 * g)) * 32 * b


def pack(symbols: U8, width: int) -> U8:
    """Return the packed form of `symbols`, shape (n,), each below 2**width."""
    if width == 8:
        return symbols
    g, b = cell(width)
    padded = symbols
    if symbols.size % (32 * g):
        padded = np.zeros(-(-symbols.size // (32 * g)) * 32 * g, np.uint8)
        padded[: symbols.size] = symbols
    out = np.empty(padded.size // g * b, np.uint8)
    _pack(padded.view(np.uint64), b, g, moves(width), out.view(np.uint64))
    return out


def unpack_into(payload: U8, width: int, out: U8) -> None:
    """Fill `out`, shape (n,), with the symbols of `payload`; raises CorruptError when its size is not theirs."""
    n = out.size
    if payload.size != packed_size(n, width):
        raise CorruptError(f"raw: {payload.size} bytes for {n} symbols of {width} bits, not {packed_size(n, width)}")
    if width == 8:
        out[:] = payload
        return
    g, b = cell(width)
    whole = n // (32 * g)
    unpack = _UNPACK[width]
    unpack(payload, whole, out)
    if n > whole * 32 * g:
        last = np.empty(32 * g, np.uint8)
        unpack(payload[whole * 32 * b :], 1, last)
        out[whole * 32 * g :] = last[: n - whole * 32 * g]


@cache
def moves(width: int) -> I64:
    """Return how the symbols past a cell's rows lie in the rows' spare bits: rows of (symbol - b, row, shift in the
    symbol, shift in the row, bits). A symbol of 3 or 5 bits may lie in two rows.
    """
    g, b = cell(width)
    spare = 8 - width
    moves = []
    for k in range(g - b):
        at, end = k * width, (k + 1) * width
        while at < end:
            row = at // spare
            bits = min(end, (row + 1) * spare) - at
            moves.append((k, row, at - k * width, width + at - row * spare, bits))
            at += bits
    return np.array(moves, np.int64)


# Eight symbols at a time: shifts of whole words, and masks that cut off what crosses from one byte into the next.


@kernel
@no_type_check
def _pack(symbols: U64, b: int, g: int, moves: I64, out: U64) -> None:
    """Needs: symbols.size == cells * 4 g and out.size == cells * 4 b, as words of eight bytes."""
    ones = np.uint64(0x0101010101010101)
    for c in range(symbols.size // (4 * g)):
        s = c * 4 * g
        p = c * 4 * b
        for i in range(4 * b):
            out[p + i] = symbols[s + i]
        for m in range(moves.shape[0]):
            source = s + 4 * (b + moves[m, 0])
            target = p + 4 * moves[m, 1]
            down = np.uint64(moves[m, 2])
            up = np.uint64(moves[m, 3])
            mask = ones * np.uint64((1 << moves[m, 4]) - 1)
            for i in range(4):
                out[target + i] |= ((symbols[source + i] >> down) & mask) << up


# Vectors of 32 bytes, which LLVM lowers for any CPU. Words of eight bytes in a loop of numba's: 20 microseconds for 2^17
# symbols instead of 3.

_BYTES = ir.VectorType(ir.IntType(8), 32)


def _splat(value: int) -> ir.Constant:
    return ir.Constant(_BYTES, [value] * 32)


def _cell_unpack(width: int) -> Callable[..., Any]:
    """Make the intrinsic that unpacks one cell of symbols of `width` bits."""

    @intrinsic
    @no_type_check
    def unpack(typingctx, payload, at, out, to):
        """Unpack the cell at payload[at …] into out[to …]. Needs: b rows there, room for g here."""

        def codegen(context, builder, signature, args):
            payload, out = (context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 2))
            g, b = cell(width)

            def row(data, first, k):
                here = builder.add(first, ir.Constant(ir.IntType(64), 32 * k))
                return builder.bitcast(builder.gep(data, [here]), _BYTES.as_pointer())

            packed = [builder.load(row(payload, args[1], k), align=1) for k in range(b)]
            symbols = [builder.and_(p, _splat((1 << width) - 1)) for p in packed] + [_splat(0)] * (g - b)
            for symbol, source, down, up, bits in moves(width).tolist():
                part = builder.lshr(packed[source], _splat(up))
                if up + bits < 8:
                    part = builder.and_(part, _splat((1 << bits) - 1))
                if down:
                    part = builder.shl(part, _splat(down))
                symbols[b + symbol] = builder.or_(symbols[b + symbol], part)
            for k, symbol in enumerate(symbols):
                builder.store(symbol, row(out, args[3], k), align=1)
            return context.get_dummy_value()

        return types.void(payload, types.int64, out, types.int64), codegen

    return unpack  # type: ignore[no-any-return]


_cell_1 = _cell_unpack(1)
_cell_2 = _cell_unpack(2)
_cell_3 = _cell_unpack(3)
_cell_4 = _cell_unpack(4)
_cell_5 = _cell_unpack(5)
_cell_6 = _cell_unpack(6)
_cell_7 = _cell_unpack(7)


@kernel
@no_type_check
def unpack_1(payload: U8, cells: int, out: U8) -> None:
    """Needs: payload.size >= 32 cells; out.size >= 256 cells."""
    for c in range(cells):
        _cell_1(payload, 32 * c, out, 256 * c)


@kernel
@no_type_check
def unpack_2(payload: U8, cells: int, out: U8) -> None:
    """Needs: payload.size >= 32 cells; out.size >= 128 cells."""
    for c in range(cells):
        _cell_2(payload, 32 * c, out, 128 * c)


@kernel
@no_type_check
def unpack_3(payload: U8, cells: int, out: U8) -> None:
    """Needs: payload.size >= 96 cells; out.size >= 256 cells."""
    for c in range(cells):
        _cell_3(payload, 96 * c, out, 256 * c)


@kernel
@no_type_check
def unpack_4(payload: U8, cells: int, out: U8) -> None:
    """Needs: payload.size >= 32 cells; out.size >= 64 cells."""
    for c in range(cells):
        _cell_4(payload, 32 * c, out, 64 * c)


@kernel
@no_type_check
def unpack_5(payload: U8, cells: int, out: U8) -> None:
    """Needs: payload.size >= 160 cells; out.size >= 256 cells."""
    for c in range(cells):
        _cell_5(payload, 160 * c, out, 256 * c)


@kernel
@no_type_check
def unpack_6(payload: U8, cells: int, out: U8) -> None:
    """Needs: payload.size >= 96 cells; out.size >= 128 cells."""
    for c in range(cells):
        _cell_6(payload, 96 * c, out, 128 * c)


@kernel
@no_type_check
def unpack_7(payload: U8, cells: int, out: U8) -> None:
    """Needs: payload.size >= 224 cells; out.size >= 256 cells."""
    for c in range(cells):
        _cell_7(payload, 224 * c, out, 256 * c)


_UNPACK = {1: unpack_1, 2: unpack_2, 3: unpack_3, 4: unpack_4, 5: unpack_5, 6: unpack_6, 7: unpack_7}
