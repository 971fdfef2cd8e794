"""Vocabularies: integers of which few are frequent, as codes of one to three bytes (FORMAT.md, section 6.3).

Token ids repeat in runs of any length, which zstandard finds in bytes; in elements of two bytes, most of them for values that
one byte could name, it sees half as far and less of what is alike (1.3 million ids of sources, level 3, groups of
2^18: 9.66 % of int64 as elements of two bytes, 8.28 % as codes, in two thirds of the time). Source: N. Brisaboa, A. Farina,
G. Navarro and J. Parama, "Lightweight natural language text compression", Information Retrieval 10 (2007).
"""

from dataclasses import dataclass
from typing import Any, no_type_check

import numpy as np

from tzip.coders.arrays import I64, U8, U32, Words
from tzip.coders.jit import kernel

MOST_RANGE = 1 << 18  # places that an encoder looks at: the counts of a million of them do not fit the cache


@dataclass(frozen=True, slots=True)
class Codes:
    """Bytes of all codes, shape (m,); the frequent values above the least one, and a mask of the others; first bytes of two."""

    inner: U8
    frequent: U32
    others: U8
    pairs: int


def split_firsts(distinct: int) -> tuple[int, int]:
    """Return how many values have a code of one byte, and how many first bytes have codes of two, of `distinct` values."""
    if distinct <= 256:
        return distinct, 0
    pairs = -(-(distinct - 256) // 255)
    if pairs <= 128:
        return 256 - pairs, pairs
    threes = 1
    while (128 - threes) * 256 + threes * 65536 < distinct - 128:
        threes += 1
    return 128, 128 - threes


def encode(words: Words, least: int, places: int) -> Codes:
    """Return the codes of integers, shape (n,), n >= 1, that are `least` … `least + places - 1` modulo their size.

    `places` is MOST_RANGE at most. The frequent values are those that occur most, the lower ones of equals.
    """
    base = words.dtype.type(least)
    counts = np.zeros(places, np.int64)
    top = (1 << 8 * words.itemsize) - 1
    _count(words, base, top, counts)
    used = np.flatnonzero(counts)
    singles, pairs = split_firsts(used.size)
    rank = counts[used] * places + (places - 1 - used)  # no two are equal
    frequent = used[np.argpartition(-rank, singles - 1)[:singles]]
    frequent.sort()
    codes = np.zeros(places, np.uint32)
    mask = np.zeros(-(-places // 8) * 8, bool)
    mask[used] = True
    mask[frequent] = False
    codes[frequent] = np.arange(singles) | 1 << 24
    others = np.flatnonzero(mask)
    r = np.arange(others.size)
    two = r < 256 * pairs
    codes[others[two]] = singles + (r[two] >> 8) | (r[two] & 255) << 8 | 2 << 24
    r = r[~two] - 256 * pairs
    codes[others[~two]] = singles + pairs + (r >> 16) | (r >> 8 & 255) << 8 | (r & 255) << 16 | 3 << 24
    inner = np.empty(3 * words.size + 4, np.uint8)
    m = _encode(words, base, top, codes, inner)
    return Codes(inner[:m], frequent.astype(np.uint32), np.packbits(mask, bitorder="little"), pairs)


def decode(inner: U8, frequent: U32, others: U8, pairs: int, least: int, out: Words) -> bool:
    """Fill `out`, shape (n,), from codes; return False, with `out` unspecified, when they are none of n elements.

    Needs frequent.size + pairs <= 256.
    """
    places = np.flatnonzero(np.unpackbits(others, bitorder="little"))
    values = np.concatenate((frequent.astype(np.uint64), places.astype(np.uint64)))
    if not values.size:
        return False
    table = (values + np.uint64(least)).astype(out.dtype)
    first = np.arange(256, dtype=np.int64)
    k, j = frequent.size, frequent.size + pairs
    starts = np.where(first < k, first, np.where(first < j, k + 256 * (first - k), k + 256 * pairs + 65536 * (first - j)))
    lengths = np.where(first < k, 1, np.where(first < j, 2, 3)).astype(np.int64)
    return bool(_decode(inner, table, starts, lengths, out))


@kernel
@no_type_check
def _count(words: Words, least: Any, top: int, counts: I64) -> int:
    """Needs: all words - least below counts.size, modulo their size, whose greatest value is `top`."""
    low = np.uint64(least)
    mask = np.uint64(top)
    for i in range(words.size):
        counts[(np.uint64(words[i]) - low) & mask] += 1
    return 0


@kernel
@no_type_check
def _encode(words: Words, least: Any, top: int, codes: U32, inner: U8) -> int:
    """Return the bytes written.

    Needs: codes, bytes | length << 24, of all words - least modulo their size; inner.size >= 3 * words.size + 3.
    """
    low = np.uint64(least)
    mask = np.uint64(top)
    p = np.uint64(0)
    for i in range(words.size):
        code = codes[(np.uint64(words[i]) - low) & mask]
        inner[p] = np.uint8(code & np.uint32(255))
        inner[p + np.uint64(1)] = np.uint8((code >> np.uint32(8)) & np.uint32(255))
        inner[p + np.uint64(2)] = np.uint8((code >> np.uint32(16)) & np.uint32(255))
        p += np.uint64(code >> np.uint32(24))
    return np.int64(p)


@kernel
@no_type_check
def _decode(inner: U8, table: Words, starts: I64, lengths: I64, out: Words) -> int:
    """Return 1 when the codes are those of out.size elements. Needs: table.size >= 1; starts and lengths (256,), 1 … 3."""
    p = np.int64(0)
    m = np.int64(inner.size)
    most = np.int64(table.size)
    bad = np.int64(0)
    for i in range(out.size):
        if p >= m:
            return 0
        s = inner[p]
        length = lengths[s]
        at = starts[s]
        # Codes of one byte, which most are, need no more loads to be known: the next one is looked up meanwhile.
        if length > 1:
            if p + length > m:
                return 0
            at += np.int64(inner[p + 1]) if length == 2 else (np.int64(inner[p + 1]) << 8) | np.int64(inner[p + 2])
        bad |= np.int64(at >= most)
        out[i] = table[min(at, most - 1)]
        p += length
    return 1 if p == m and bad == 0 else 0
