"""Palettes: elements of few values as indices of 1, 2, 4 or 8 bits (FORMAT.md, section 6.3)."""

from typing import no_type_check

import numpy as np

from tzip.coders.arrays import U8, Words
from tzip.coders.errors import CorruptError
from tzip.coders.jit import kernel
from tzip.coders.planes import WORD

_SLOTS = 1024  # of the hash table for at most 256 values


def invert(inner: U8, values: U8, bits: int, width: int, out: U8) -> None:
    """Fill `out`, shape (n * width,), from packed indices and values as the format has them.

    A row of elements is copied for each inner byte: those of the 8 / bits indices that it holds. Raises CorruptError for an
    index that is too large, and for unused bits that are not zero.
    """
    k = values.size // width
    each = 8 // bits
    n = out.size // width
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    indices = np.arange(256, dtype=np.uint8)[:, None] >> shifts & np.uint8((1 << bits) - 1)
    whole = n // each
    if k < 1 << bits and inner.size:
        if bits == 8:
            good = int(inner.max()) < k
        else:
            seen = np.zeros(256, np.uint8)
            _see(inner[:whole], seen)
            good = not (seen.astype(bool) & (indices >= k).any(axis=1)).any()
        if not good:
            raise CorruptError(f"palette: an index is not below {k}")
    table = np.zeros((1 << bits, width), np.uint8)
    table[:k] = values.reshape(width, k)[::-1].T
    rows = np.ascontiguousarray(table[indices]).reshape(-1)  # 256 rows of each * width bytes
    step = min(each * width, 8)
    _rows(inner[:whole], rows.view(WORD[step]), out[: whole * each * width].view(WORD[step]))
    rest = n - whole * each
    if rest:
        last = int(inner[-1])
        if last >> rest * bits or any(int(i) >= k for i in indices[last, :rest]):
            raise CorruptError("palette: in the last byte, unused bits are not zero or an index is too large")
        out[whole * each * width :] = table[indices[last, :rest]].reshape(-1)


def indexed(words: Words, most: int = 256) -> tuple[U8, Words] | None:
    """Return indices, shape (n,), of elements, and their values in order of appearance; None with more than `most` <= 256."""
    width = words.itemsize
    values = np.empty(257, words.dtype)
    indices = np.empty(words.size, np.uint8)
    if width <= 2:
        k = _index_small(words, np.zeros(1 << 8 * width, np.uint16), most, values, indices)
    else:
        k = _index(words, np.empty(_SLOTS, words.dtype), np.zeros(_SLOTS, np.uint16), most, values, indices)
    return (indices, values[:k].copy()) if k <= most else None


def packed(indices: U8, values: Words) -> tuple[int, U8, U8]:
    """Return the bits of an index, the packed indices and the values as the format has them.

    indices: shape (n,), below the number of values, 1 to 256, which differ.

    The values ascend, byte by byte: then those of fp8 times a scale take 100 bytes, as they came 350.
    """
    bits = index_bits(values.size)
    order_ = np.argsort(values)
    places = np.empty(256, np.uint8)
    places[order_] = np.arange(values.size)
    side = np.ascontiguousarray(values[order_].view(np.uint8).reshape(-1, values.itemsize)[:, ::-1].T).reshape(-1)
    return bits, pack(places[indices], bits), side


def index_bits(values: int) -> int:
    """Return the bits of an index of that many values."""
    return 1 if values <= 2 else 2 if values <= 4 else 4 if values <= 16 else 8


def pack(indices: U8, bits: int) -> U8:
    """Return indices, shape (n,), of 1, 2, 4 or 8 bits, the first in the lowest bits of a byte."""
    if bits == 8:
        return indices
    if bits == 1:
        return np.packbits(indices, bitorder="little")
    each = 8 // bits
    padded = indices
    if indices.size % each:
        padded = np.zeros(-(-indices.size // each) * each, np.uint8)
        padded[: indices.size] = indices
    out = np.empty(padded.size // each, np.uint8)
    if bits == 2:
        _pack4(padded.view(np.uint32), out)
    else:
        _pack2(padded.view(np.uint16), out)
    return out


@kernel
@no_type_check
def _see(inner: U8, seen: U8) -> int:
    """Needs: seen.size == 256."""
    for i in range(inner.size):
        seen[inner[i]] = 1
    return 0


@kernel
@no_type_check
def _rows(inner: U8, rows: Words, out: Words) -> int:
    """Write row inner[i] of a table of 256 rows. Needs: out.size == inner.size * rows.size / 256."""
    each = rows.size // 256
    if each == 1:
        for i in range(inner.size):
            out[i] = rows[inner[i]]
    else:
        e = np.uint64(each)
        for i in range(inner.size):
            source = np.uint64(inner[i]) * e
            target = np.uint64(i) * e
            for k in range(each):
                out[target + np.uint64(k)] = rows[source + np.uint64(k)]
    return 0


@kernel
@no_type_check
def _index_small(words: Words, table: Words, most: int, values: Words, indices: U8) -> int:
    """Return the number of values, at most `most` + 1. Needs: table zero, one entry a word; values.size > most."""
    k = np.uint16(0)
    for i in range(words.size):
        w = words[i]
        t = table[w]
        if t == np.uint16(0):
            values[k] = w
            k += np.uint16(1)
            if k > most:
                break
            table[w] = k
            t = k
        indices[i] = np.uint8(t - np.uint16(1))
    return np.int64(k)


@kernel
@no_type_check
def _index(words: Words, keys: Words, table: Words, most: int, values: Words, indices: U8) -> int:
    """Return the number of values, at most `most` + 1 <= 257.

    Needs: table zero; keys and table of 1024; values.size > most.
    """
    k = np.uint16(0)
    for i in range(words.size):
        w = words[i]
        slot = (np.uint64(w) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(54)
        while table[slot] != np.uint16(0) and keys[slot] != w:
            slot = (slot + np.uint64(1)) & np.uint64(1023)
        t = table[slot]
        if t == np.uint16(0):
            values[k] = w
            k += np.uint16(1)
            if k > most:
                break
            keys[slot] = w
            table[slot] = k
            t = k
        indices[i] = np.uint8(t - np.uint16(1))
    return np.int64(k)


@kernel
@no_type_check
def _pack4(groups: Words, out: U8) -> int:
    """Four indices of 2 bits in a byte. Needs: groups.size == out.size, indices below 4."""
    for i in range(out.size):
        g = np.uint32(groups[i])
        g = (g | (g >> np.uint32(6))) & np.uint32(0x000F000F)
        out[i] = np.uint8((g | (g >> np.uint32(12))) & np.uint32(0xFF))
    return 0


@kernel
@no_type_check
def _pack2(groups: Words, out: U8) -> int:
    """Two indices of 4 bits in a byte. Needs: groups.size == out.size, indices below 16."""
    for i in range(out.size):
        g = np.uint32(groups[i])
        out[i] = np.uint8((g | (g >> np.uint32(4))) & np.uint32(0xFF))
    return 0
