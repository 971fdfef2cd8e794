"""Splitting elements into planes of symbols, and joining them again (FORMAT.md, section 6).

A float's *head* is its top 16 bits: sign, e exponent bits, m mantissa bits. t mantissa bits join the exponent in the *key*;
sign and the other mantissa bits are the *rest*. Lower bytes are planes of their own. Joining two mantissa bits to the
exponent gains 0.4 points on bfloat16 weights, for their distribution within a binade depends on the exponent
(measured: MiniLM 66.3 -> 65.9 %).
"""

from dataclasses import dataclass
from typing import Any, no_type_check

import numpy as np

from tzip.coders.arrays import I64, U8, U16, U32, Words
from tzip.coders.jit import kernel


@dataclass(frozen=True, slots=True)
class Head:
    """The fields of a 16-bit head: e exponent bits, m mantissa bits; `joined` lists the t that the format allows."""

    exponent: int
    mantissa: int
    joined: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Split:
    """A way to cut elements of `width` bytes (0: any) into planes."""

    wire_id: int
    name: str
    width: int
    head: Head | None

    def planes(self, width: int) -> int:
        """Return the number of planes of elements of `width` bytes."""
        if self.wire_id == BYTES.wire_id:
            return 1
        return width if self.head is None else 2 + (width - 2)

    def bits(self, plane: int, joined: int, signless: bool) -> int:
        """Return the width in bits of the symbols of a plane."""
        if self.head is None or plane >= 2:
            return 8
        if plane == 0:
            return self.head.exponent + joined
        return self.head.mantissa - joined + (not signless)


@dataclass(frozen=True, slots=True)
class Window:
    """Which keys have bytes: low … high (low >= 1) as key - base, and key 0 as byte 0 when `zero`. All others escape,
    and `instead` is the byte that is coded in their place.
    """

    base: int
    low: int
    high: int
    zero: bool
    instead: int


BYTES = Split(0, "bytes", 0, None)
PLANES = Split(1, "planes", 0, None)
BF16 = Split(2, "bf16", 2, Head(8, 7, (0, 1, 2)))
F16 = Split(3, "f16", 2, Head(5, 10, (3,)))
F32 = Split(4, "f32", 4, Head(8, 7, (0, 1, 2)))
F64 = Split(5, "f64", 8, Head(11, 4, (0, 1, 2)))
SPLITS = {s.wire_id: s for s in (BYTES, PLANES, BF16, F16, F32, F64)}
WORD: dict[int, "np.dtype[np.unsignedinteger[Any]]"] = {1: np.dtype("<u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8:
np.dtype("<u8")}


def key_counts(words: Words, head: Head, joined: int) -> tuple[I64, int]:
    """Count the keys of elements, shape (n,): returns counts of shape (2**(e + t),) and the number of set signs."""
    shift = 8 * words.itemsize - 16 + head.mantissa - joined
    bits = head.exponent + joined
    counts = np.zeros((4, 2 << bits), np.uint32)
    _count(words, shift, (2 << bits) - 1, counts)
    total = counts.sum(axis=0, dtype=np.int64)
    return total[: 1 << bits] + total[1 << bits :], int(total[1 << bits :].sum())


def byte_counts(words: Words, shift: int) -> I64:
    """Count the values of the byte that starts at bit `shift` of elements, shape (n,)."""
    counts = np.zeros((4, 256), np.uint32)
    _count(words, shift, 255, counts)
    total: I64 = counts.sum(axis=0, dtype=np.int64)
    return total


def byte_plane(words: Words, shift: int) -> U8:
    """Return the byte that starts at bit `shift` of each element."""
    out = np.empty(words.size, np.uint8)
    _byte(words, shift, out)
    return out


def split_head(words: Words, head: Head, joined: int, signless: bool, window: Window) -> tuple[U8, U8, U32]:
    """Cut the heads of elements, shape (n,), n <= 2**17, into coded bytes and rests, shape (n,) each, and escapes.

    Escapes come as the format lists them: key << 17 | position.
    """
    n = words.size
    coded, rest, escapes = np.empty(n, np.uint8), np.empty(n, np.uint8), np.empty(n, np.uint32)
    low = head.mantissa - joined
    shift = 8 * words.itemsize - 16
    _rest(words, shift, low, not signless, rest)
    mask = (1 << (head.exponent + joined)) - 1
    w = window
    found = _code(words, shift + low, mask, w.base, w.low, w.high, w.zero, w.instead, coded, escapes)
    return coded, rest, escapes[:found].copy()


def join_heads(
    coded: U8, rest: U8, head: Head, joined: int, sign_mode: int, base: int, positions: U32, keys: U16, out: U16
) -> None:
    """Fill `out`, shape (n,), with heads: the inverse of `split_head`; byte 0 is key 0, byte c > 0 is key base + c.

    Needs: rests below their width; positions below n.
    """
    low = head.mantissa - joined
    _join(coded, rest, low, base, 0x8000 if sign_mode == 2 else 0, out)
    if positions.size:
        keep = np.uint16(0x8000 | ((1 << low) - 1))
        out[positions] = out[positions] & keep | keys << np.uint16(low)


def join_words(heads: U16, tails: list[U8], out: Words) -> None:
    """Fill `out` with words of 32 or 64 bits from their heads and the byte planes below, high to low."""
    if len(tails) == 2:
        _join32(heads, tails[0], tails[1], out)
    else:
        _join64(heads, *tails, out)


@kernel
@no_type_check
def _count(words: Words, shift: int, mask: int, counts: U32) -> None:
    """Four tables, so that runs of equal values do not wait for the same counter. Needs: counts (4, mask + 1)."""
    s = np.uint64(shift)
    m = np.uint64(mask)
    n = words.size
    whole = n // 4 * 4
    for i in range(0, whole, 4):
        counts[0, (np.uint64(words[i]) >> s) & m] += np.uint32(1)
        counts[1, (np.uint64(words[i + 1]) >> s) & m] += np.uint32(1)
        counts[2, (np.uint64(words[i + 2]) >> s) & m] += np.uint32(1)
        counts[3, (np.uint64(words[i + 3]) >> s) & m] += np.uint32(1)
    for i in range(whole, n):
        counts[0, (np.uint64(words[i]) >> s) & m] += np.uint32(1)


@kernel
@no_type_check
def _byte(words: Words, shift: int, out: U8) -> None:
    """Needs: out.size == words.size."""
    s = np.uint64(shift)
    for i in range(words.size):
        out[i] = np.uint8((np.uint64(words[i]) >> s) & np.uint64(255))


# Unsigned words throughout: a signed index costs numba a test for negative ones, and the loop its vectors
# (measured: 329 -> 43 microseconds for 2^17 elements in two loops).


@kernel
@no_type_check
def _code(
    words: Words,
    shift: int,
    key_mask: int,
    base: int,
    low: int,
    high: int,
    zero: bool,
    instead: int,
    coded: U8,
    escapes: U32,
) -> int:
    """Return the number of escapes. Needs: coded.size == escapes.size == words.size <= 2**17.

    Blocks without an escape, nearly all, are done by vectors alone.
    """
    s = np.uint64(shift)
    m = np.uint32(key_mask)
    first = np.uint32(low)
    span = np.uint32(high - low)
    add = np.uint32(low - base)
    other = np.uint32(instead)
    null = np.uint32(0) if zero else other
    escaped_null = np.uint32(0) if zero else np.uint32(1)
    found = 0
    for begin in range(0, words.size, 512):
        escaped = np.uint32(0)
        at = np.uint64(begin)
        for k in range(min(512, words.size - begin)):
            i = at + np.uint64(k)
            key = np.uint32(np.uint64(words[i]) >> s) & m
            d = np.uint32(key - first)
            c = null if key == np.uint32(0) else other
            coded[i] = np.uint8(np.uint32(d + add) if d <= span else c)
            e = np.uint32(0) if d <= span else np.uint32(1)
            escaped |= escaped_null if key == np.uint32(0) else e
        if escaped:
            for k in range(min(512, words.size - begin)):
                i = at + np.uint64(k)
                key = np.uint32(np.uint64(words[i]) >> s) & m
                if np.uint32(key - first) > span and (not zero or key > np.uint32(0)):
                    escapes[found] = np.uint32((np.uint64(key) << np.uint64(17)) | i)
                    found += 1
    return found


@kernel
@no_type_check
def _rest(words: Words, shift: int, low: int, signed: bool, rest: U8) -> None:
    """Needs: rest.size == words.size; `shift` is the head's lowest bit."""
    s = np.uint64(shift)
    up = np.uint64(shift + 15 - low)
    sign = np.uint64(1 << low) if signed else np.uint64(0)
    mask = np.uint64((1 << low) - 1)
    for i in range(words.size):
        x = np.uint64(words[i])
        rest[i] = np.uint8(((x >> up) & sign) | ((x >> s) & mask))


@kernel
@no_type_check
def _join(coded: U8, rest: U8, low: int, base: int, sign: int, out: U16) -> None:
    """Needs: rest.size and coded.size == out.size. (Sum and mask instead of a table of keys: 53 -> 15 microseconds.)"""
    up = np.uint16(15 - low)
    shift = np.uint16(low)
    bit = np.uint16(1 << low)
    mask = np.uint16((1 << low) - 1)
    add = np.uint16(base)
    constant = np.uint16(sign)
    for i in range(out.size):
        r = np.uint16(rest[i])
        c = np.uint16(coded[i])
        key = np.uint16(c + add) if c else np.uint16(0)
        out[i] = np.uint16((key << shift) | ((r & bit) << up) | (r & mask) | constant)


@kernel
@no_type_check
def _join32(heads: U16, b1: U8, b0: U8, out: U32) -> None:
    """Needs: all of one size."""
    for i in range(out.size):
        out[i] = np.uint32(np.uint64(heads[i]) << np.uint64(16) | np.uint64(b1[i]) << np.uint64(8) | np.uint64(b0[i]))


@kernel
@no_type_check
def _join64(heads: U16, b5: U8, b4: U8, b3: U8, b2: U8, b1: U8, b0: U8, out: Words) -> None:
    """Needs: all of one size."""
    for i in range(out.size):
        high = np.uint64(heads[i]) << np.uint64(48) | np.uint64(b5[i]) << np.uint64(40)
        middle = np.uint64(b4[i]) << np.uint64(32) | np.uint64(b3[i]) << np.uint64(24)
        low = np.uint64(b2[i]) << np.uint64(16) | np.uint64(b1[i]) << np.uint64(8) | np.uint64(b0[i])
        out[i] = high | middle | low
