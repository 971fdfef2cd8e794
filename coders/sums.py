"""sum64: the position-keyed sum over stored and decoded bytes (FORMAT.md, section 4).

A multiply-add hash in the manner of NH (Black et al., UMAC, CRYPTO 1999): 32 x 32 -> 64 bit products of keyed
halves, plus the word itself so that no value of one half can hide changes in the other. Stripes are keyed by their
position and added, so a GPU may sum them in any order.
"""

from typing import no_type_check

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tzip.coders.arrays import U8, U64
from tzip.coders.jit import kernel
from tzip.coders.mixing import mix

STRIPE = 4096
_GOLDEN = 0x9E3779B97F4A7C15
_LENGTH = 0xC2B2AE3D27D4EB4F
_SEED = 0x747A69702073756D
_M = (1 << 64) - 1
KEYS: U64 = np.array([mix((_SEED + (j + 1) * _GOLDEN) & _M) for j in range(STRIPE // 8)], np.uint64)


@intrinsic
@no_type_check
def _load64(typingctx, array, offset):
    """Eight bytes of a uint8 array at any byte offset, as uint64; no bounds check."""

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        word = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(64).as_pointer())
        return builder.load(word, align=1)

    return types.uint64(array, types.int64), codegen


@kernel
@no_type_check
def _mix(x: np.uint64) -> np.uint64:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@kernel
@no_type_check
def stripes(data: U8, first: int, count: int, keys: U64) -> np.uint64:
    """Sum of the keyed stripes first … first + count - 1. Needs: they lie inside data; keys.size == 512."""
    total = np.uint64(0)
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    for s in range(first, first + count):
        a = np.uint64(0)
        base = (s - first) * 4096
        for j in range(512):
            x = _load64(data, base + 8 * j)
            y = x ^ keys[j]
            a += (y & low) * (y >> half) + ((x >> half) | (x << half))
        total += _mix(a + np.uint64(s + 1) * np.uint64(0x9E3779B97F4A7C15))
    return total


@kernel
@no_type_check
def sum_of(data: U8, keys: U64, last: U8) -> np.uint64:
    """Return the sum of data. Needs: keys.size == 512; last: room for a stripe."""
    whole = data.size // 4096
    return closed(stripes(data, 0, whole, keys), whole, data, keys, last)


@kernel
@no_type_check
def closed(total: np.uint64, whole: int, data: U8, keys: U64, last: U8) -> np.uint64:
    """Return the sum of data, whose first `whole` stripes, all that it has, add up to `total`. Needs: as `sum_of`."""
    rest = data.size - whole * 4096
    if rest > 0:
        for i in range(rest):
            last[i] = data[whole * 4096 + i]
        for i in range(rest, 4096):
            last[i] = np.uint8(0)
        total += stripes(last, whole, 1, keys)
    return _mix(total + np.uint64(data.size) * np.uint64(0xC2B2AE3D27D4EB4F))


class Sum:
    """sum64 of a string that comes in parts, of which all but the last are whole stripes.

    So a part is summed while it is in the cache.
    """

    def __init__(self) -> None:
        self._total = 0
        self._size = 0

    def add(self, part: U8) -> None:
        """Add the next bytes, a C-contiguous uint8 array; raises ValueError behind a part that was no whole stripes."""
        if self._size % STRIPE:
            raise ValueError("only the last part may end within a stripe")
        first, whole = self._size // STRIPE, part.size // STRIPE
        if whole:
            self._total += int(stripes(part, first, whole, KEYS))
        if part.size % STRIPE:
            last = np.zeros(STRIPE, np.uint8)
            last[: part.size % STRIPE] = part[whole * STRIPE :]
            self._total += int(stripes(last, first + whole, 1, KEYS))
        self._size += part.size

    def value(self) -> int:
        """Return the sum of all parts."""
        return mix((self._total + self._size * _LENGTH) & _M)


def sum64(data: U8) -> int:
    """Return the sum of `data`, a C-contiguous uint8 array of shape (n,)."""
    whole = Sum()
    whole.add(data)
    return whole.value()


def same_bytes(a: U8, b: U8) -> bool:
    """Say whether two C-contiguous uint8 arrays are equal; by words of eight bytes, for numpy makes an array of answers, and
    part by part: where one element of a hundred differs the first part tells.
    """
    if a.size != b.size:
        return False
    at, step = 0, 4096
    while at < a.size:
        end = min(at + step, a.size)
        whole = at + (end - at) // 8 * 8
        if not np.array_equal(a[at:whole].view(np.uint64), b[at:whole].view(np.uint64)):
            return False
        if not (a[whole:end] == b[whole:end]).all():
            return False
        at, step = end, 1 << 20
    return True
