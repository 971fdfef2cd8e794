"""Raw planes of 1 to 8 bits a symbol, packed in rows of 32 bytes (FORMAT.md, section 7.1).

The packing is vertical: symbol 32 j + i of a cell lies in byte i of row j, so a vector unit or a warp handles 32 symbols
with the same shifts, and the symbols that do not fit a row's own bits sit in the spare high bits of all rows.
"""

from functools import cache
from math import gcd
from typing import no_type_check

import numpy as np

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
    _pack(padded.view(np.uint64), b, g, _moves(width), out.view(np.uint64))
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
    words = payload.view(np.uint64)
    _unpack(words[: whole * 4 * b], width, b, g, _moves(width), out[: whole * 32 * g].view(np.uint64))
    if n > whole * 32 * g:
        last = np.empty(32 * g, np.uint8)
        _unpack(words[whole * 4 * b :], width, b, g, _moves(width), last.view(np.uint64))
        out[whole * 32 * g :] = last[: n - whole * 32 * g]


@cache
def _moves(width: int) -> I64:
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


@kernel
@no_type_check
def _unpack(payload: U64, width: int, b: int, g: int, moves: I64, out: U64) -> None:
    """Needs: payload.size == cells * 4 b and out.size == cells * 4 g, as words of eight bytes."""
    ones = np.uint64(0x0101010101010101)
    low = ones * np.uint64((1 << width) - 1)
    for c in range(out.size // (4 * g)):
        s = c * 4 * g
        p = c * 4 * b
        for i in range(4 * b):
            out[s + i] = payload[p + i] & low
        for i in range(4 * b, 4 * g):
            out[s + i] = np.uint64(0)
        for m in range(moves.shape[0]):
            target = s + 4 * (b + moves[m, 0])
            source = p + 4 * moves[m, 1]
            up = np.uint64(moves[m, 2])
            down = np.uint64(moves[m, 3])
            mask = ones * np.uint64((1 << moves[m, 4]) - 1)
            for i in range(4):
                out[target + i] |= ((payload[source + i] >> down) & mask) << up
