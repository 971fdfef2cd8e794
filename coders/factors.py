"""Predictions that belong to a whole tensor, by its rows and columns: predictors 3 and 4 (FORMAT.md, section 6.6).

Factors of low rank are integers on one power-of-two grid, so that products and sums stay below 2^53 and are exact in
binary64 in any order: the prediction is the same on every machine.
"""

import struct
from dataclasses import dataclass
from typing import no_type_check

import numpy as np
from numpy.typing import NDArray

from tzip.coders.arrays import I64, U8, U16, U32, Words
from tzip.coders.errors import CorruptError
from tzip.coders.jit import kernel
from tzip.coders.scratch import borrow

MAX_RANK = 64
MAX_COLUMNS = 1 << 20
MAX_BITS = 30
MAX_SUM = 1 << 52
_HEAD = struct.Struct("<IIiI")
F64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Factors:
    """What the string of chunk 0 says of all chunks: q columns, the exponent of the grid, the bits of both kinds of factors,
    those of the columns, shape (R, q), and where in the string they end.
    """

    q: int
    exponent: int
    column_bits: list[int]
    row_bits: list[int]
    columns: F64
    end: int


def rows_of(q: int, at: int, n: int) -> tuple[int, int]:
    """Return the first row of elements at … at + n - 1 of a tensor with q columns, and how many rows they touch."""
    first = at // q
    return first, (at + n - 1) // q - first + 1


def read_factors(string: U8) -> Factors:
    """Parse the beginning of the string of chunk 0; raises CorruptError."""
    raw = string.tobytes()
    if len(raw) < _HEAD.size:
        raise CorruptError("low rank: no head")
    q, rank, exponent, zero = _HEAD.unpack_from(raw)
    at = _HEAD.size + 2 * rank
    if not 1 <= q <= MAX_COLUMNS or not 1 <= rank <= MAX_RANK or not -1000 <= exponent <= 100 or zero or len(raw) < at:
        raise CorruptError("low rank: a head that is out of range")
    column_bits, row_bits = list(raw[_HEAD.size : _HEAD.size + rank]), list(raw[_HEAD.size + rank : at])
    if min(column_bits + row_bits) < 1 or max(column_bits + row_bits) > MAX_BITS:
        raise CorruptError("low rank: factors of impossible sizes")
    if sum(1 << a + b - 2 for a, b in zip(column_bits, row_bits, strict=True)) > MAX_SUM:
        raise CorruptError("low rank: factors whose products may overflow")
    end = at + packed_size(q, column_bits)
    if len(raw) < end:
        raise CorruptError("low rank: the columns are cut off")
    return Factors(q, exponent, column_bits, row_bits, unpack(string[at:end], q, column_bits), end)


def write_factors(columns: I64, rows_bits: list[int], exponent: int) -> bytes:
    """Return the beginning of the string of chunk 0, for factors of columns of shape (R, q)."""
    rank, q = columns.shape
    bits = bits_of(columns)
    return _HEAD.pack(q, rank, exponent, 0) + bytes(bits) + bytes(rows_bits) + pack(columns, bits)


def bits_of(factors: I64) -> list[int]:
    """Return how many bits the integers of each row of an array have in two's complement."""
    most = np.maximum(factors.max(axis=1), -1 - factors.min(axis=1))
    return [int(m).bit_length() + 1 for m in most]


def packed_size(n: int, bits: list[int]) -> int:
    """Return the bytes of n factors a component."""
    return sum(-(-n * b // 8) for b in bits)


def pack(factors: I64, bits: list[int]) -> bytes:
    """Return integers, shape (R, n), packed to as many bits as each row has."""
    parts = []
    for values, b in zip(factors, bits, strict=True):
        ones = (values[:, None] >> np.arange(b)) & 1
        parts.append(np.packbits(ones.astype(np.uint8).reshape(-1), bitorder="little").tobytes())
    return b"".join(parts)


def unpack(packed: U8, n: int, bits: list[int]) -> F64:
    """Return the integers of `pack`, shape (R, n); raises CorruptError where unused bits are set. Needs: packed_size bytes."""
    out = np.empty((len(bits), n))
    at = 0
    for k, b in enumerate(bits):
        size = -(-n * b // 8)
        part = packed[at : at + size]
        at += size
        if n * b % 8 and int(part[-1]) >> n * b % 8:
            raise CorruptError("low rank: unused bits of factors are set")
        padded = np.zeros(size + 8, np.uint8)
        padded[:size] = part
        _unpack(padded, b, out[k])
    return out


def low_rank(factors: Factors, rows: F64, at: int, old: Words, out: Words) -> None:
    """Fill `out` with elements from earlier ones of the same places, shape (n,): float32 or bfloat16 as bits.

    `rows`: factors of the rows that elements at … at + n - 1 touch, shape (R, rows).
    """
    n = old.size
    narrow = old.itemsize == 2
    wide: U32 = old
    made: U32 = out
    if narrow:
        wide = borrow("low rank old", n, np.uint32)
        np.left_shift(old, np.uint32(16), out=wide, dtype=np.uint32)
        made = borrow("low rank new", n, np.uint32)
    sums = borrow("low rank sums", 128, np.float64)
    f = np.float32
    # Some that are zero make the rank a multiple of four.
    rank = -(-len(rows) // 4) * 4
    columns = np.zeros((rank, factors.q))
    columns[: len(rows)] = factors.columns
    by_row = np.zeros((rows.shape[1], rank))
    by_row[:, : len(rows)] = rows.T
    scale = 2.0**factors.exponent
    with np.errstate(all="ignore"):
        _low_rank(
            columns.reshape(-1), by_row.reshape(-1), factors.q, at % factors.q, scale, wide.view(f), sums, made.view(f)
        )
    if narrow:
        _round(made, old, out)
    else:
        _keep_finite(old, made)


def levels(columns: U16, rows: U16, at: int, out: Words) -> None:
    """Fill `out`, shape (n,), words of 16 or 32 bits, with the sums of the levels of their rows and columns."""
    _levels(columns, rows, at % columns.size, 8 * out.itemsize - 16, out)


@kernel
@no_type_check
def _unpack(packed: U8, bits: int, out: F64) -> None:
    """Needs: 8 bytes more in `packed` than the integers of `bits` <= 30 bits fill."""
    b = np.uint64(bits)
    mask = (np.uint64(1) << b) - np.uint64(1)
    top = np.uint64(1) << (b - np.uint64(1))
    for i in range(out.size):
        place = np.uint64(i) * b
        byte = place >> np.uint64(3)
        x = np.uint64(0)
        for k in range(5):
            x |= np.uint64(packed[byte + np.uint64(k)]) << np.uint64(8 * k)
        x = (x >> (place & np.uint64(7))) & mask
        out[i] = np.float64(np.int64(x ^ top) - np.int64(top))


@kernel
@no_type_check
def _low_rank(columns: F64, rows: F64, q: int, first: int, scale: float, old: Words, sums: F64, out: Words) -> None:
    """Sum the products for some columns at a time, whose factors stay in the first cache, and four of them at once.

    Needs: `columns` of R * q and `rows` of rows * R numbers, R a multiple of four; rows for all elements, of which the first is
    in column `first`; sums (128,).
    """
    width = np.uint64(q)
    rank = np.uint64(columns.size) // width
    skip = np.uint64(first)
    end = np.uint64(first) + np.uint64(out.size)
    count = (end + width - np.uint64(1)) // width
    for low in range(np.uint64(0), width, np.uint64(128)):
        high = min(low + np.uint64(128), width)
        for row in range(count):
            start = max(row * width + low, skip)
            stop = min(row * width + high, end)
            if start >= stop:
                continue
            j = start - row * width
            n = stop - start
            at = start - skip
            for x in range(n):
                sums[x] = 0.0
            for k in range(np.uint64(0), rank, np.uint64(4)):
                r = row * rank + k
                a0, a1, a2, a3 = rows[r], rows[r + np.uint64(1)], rows[r + np.uint64(2)], rows[r + np.uint64(3)]
                c0 = k * width + j
                c1 = c0 + width
                c2 = c1 + width
                c3 = c2 + width
                for x in range(n):
                    sums[x] += (a0 * columns[c0 + x] + a1 * columns[c1 + x]) + (a2 * columns[c2 + x] + a3 * columns[c3 + x])
            for x in range(n):
                out[at + x] = np.float32(np.float64(old[at + x]) + sums[x] * scale)


@kernel
@no_type_check
def _keep_finite(old: U32, out: U32) -> None:
    """Needs: two arrays of one size."""
    for i in range(out.size):
        infinite = (out[i] & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
        out[i] = old[i] if infinite else out[i]


@kernel
@no_type_check
def _round(made: U32, old: U16, out: U16) -> None:
    """Round float32 to bfloat16; where it is not finite then, take the old one. Needs: three arrays of one size."""
    for i in range(out.size):
        x = made[i]
        near = (x + np.uint32(0x7FFF) + ((x >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        whole = np.uint32(0x7F800000)
        infinite = ((x & whole) == whole) | ((near & np.uint32(0x7F80)) == np.uint32(0x7F80))
        out[i] = old[i] if infinite else np.uint16(near)


@kernel
@no_type_check
def _levels(columns: U16, rows: U16, first: int, shift: int, out: Words) -> None:
    """Needs: as many rows as elements first … first + n - 1 of the first row on touch."""
    q = columns.size
    s = np.uint32(shift)
    i = 0
    row = 0
    j = first
    while i < out.size:
        n = min(q - j, out.size - i)
        level = np.uint32(rows[row])
        for x in range(n):
            out[i + x] = min(level + np.uint32(columns[j + x]), np.uint32(0xFFFF)) << s
        i += n
        j = 0
        row += 1
