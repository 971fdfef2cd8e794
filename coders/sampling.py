"""A quick look at a chunk: are there few values, is one frequent, is it a sequence? And entropies, in integers.

Ordinary weights must cost next to nothing (measured: 4 microseconds), so one kernel answers all from 1024 elements.
"""

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import no_type_check

import numpy as np

from tzip.coders.arrays import I64, U32, U64, Words
from tzip.coders.jit import kernel, quick_kernel

RUNS, RUN = 32, 32
_SLOTS = 1024


@dataclass(frozen=True, slots=True)
class Look:
    """What a sample of `size` elements shows: `values` different ones (257: or more), the most `common` one, how many
    are it (`share`), and whether all neighbours differ by the same.
    """

    size: int
    values: int
    common: int
    share: int
    steady: bool


def look(words: Words) -> Look:
    """Look at 32 runs of 32 elements of `words`, shape (n,), or at all when n <= 1024."""
    sample = words.reshape(1, -1) if words.size <= RUNS * RUN else words[_places(words.size)]
    info = np.empty(4, np.int64)
    keys = np.empty(_SLOTS, np.uint64)
    # Of one type, so that the kernel is compiled once, not for each width: it takes the compiler a second.
    value = _look(sample.astype(np.uint64), 8 * words.itemsize, keys, np.empty(_SLOTS, np.uint32), info)
    size, values, share, steady = info.tolist()
    return Look(size, values, value, share, steady != 0)


@lru_cache(64)
def _places(n: int) -> I64:
    """Return where the runs of a look at n elements lie, shape (RUNS, RUN)."""
    step = n // RUNS
    starts = [r * step + ((r * 40503 & 65535) * (step - RUN) >> 16) for r in range(RUNS)]
    return np.array(starts, np.int64)[:, None] + np.arange(RUN)


def runs(words: Words, count: int, length: int) -> Words:
    """Return `count` runs of `length` neighbours, shape (runs, length); all elements as one run when there are no more.

    There is one run in each part of the chunk, not at the same place in each: a mask repeats with the rows.
    """
    if words.size <= count * length:
        return words.reshape(1, -1)
    step = words.size // count
    starts = [r * step + ((r * 40503 & 65535) * (step - length) >> 16) for r in range(count)]
    return np.stack([words[i : i + length] for i in starts])


def counts_of(words: Words, shift: int, bits: int) -> I64:
    """Count the values of the `bits` bits that start at bit `shift` of elements, shape (n,): shape (2**bits,)."""
    counts = np.zeros((4, 1 << bits), np.int64)
    _count(words, shift, counts)
    total: I64 = counts.sum(axis=0)
    return total


@cache
def log_table() -> I64:
    """Return log2(1 + i / 256) for i = 0 … 256 in units of 2^-16, rounded down, by integer squaring alone."""
    table = []
    for i in range(257):
        x, bits = (256 + i) << 52, 0  # in units of 2^-60
        if i == 256:
            table.append(65536)
            continue
        for _ in range(16):
            x = x * x >> 60
            bits <<= 1
            if x >> 61:
                x >>= 1
                bits |= 1
        table.append(bits)
    return np.array(table, np.int64)


def entropy(counts: Words) -> int:
    """Return the order-0 entropy of symbols with these counts, in bits, in integers: the same on every machine."""
    counts = counts[counts > 0].astype(np.int64)
    return int(_entropy(counts, int(counts.sum()), log_table())) >> 16 if counts.size else 0


@quick_kernel
@no_type_check
def _look(sample: U64, bits: int, keys: U64, counts: U32, info: I64) -> int:
    """Return the most frequent value. info: elements seen, values, elements equal to it, whether all steps are equal.

    Values are no longer collected when there are 257; weights come to that within 300 elements.
    Needs: sample (runs, length), not empty, of words of `bits`; keys.size == counts.size == 1024; info.size >= 4.
    """
    runs, length = sample.shape
    for i in range(counts.size):
        counts[i] = 0
    values = 0
    best = np.uint32(0)
    common = sample[0, 0]
    steady = runs * length > 1
    mask = np.uint64(0xFFFFFFFFFFFFFFFF) >> np.uint64(64 - bits)
    delta = (sample[0, 1] - sample[0, 0]) & mask if length > 1 else np.uint64(0)
    for r in range(runs):
        if steady:
            for i in range(1, length):
                if ((sample[r, i] - sample[r, i - 1]) & mask) != delta:
                    steady = False
                    break
        if values < 257:
            for i in range(length):
                w = sample[r, i]
                slot = (w * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(54)
                while counts[slot] != np.uint32(0) and keys[slot] != w:
                    slot = (slot + np.uint64(1)) & np.uint64(1023)
                if counts[slot] == np.uint32(0):
                    values += 1
                    if values == 257:
                        break
                    keys[slot] = w
                counts[slot] += np.uint32(1)
                if counts[slot] > best:
                    best = counts[slot]
                    common = w
    share = 0
    for r in range(runs):
        for i in range(length):
            share += sample[r, i] == common
    info[0] = runs * length
    info[1] = values
    info[2] = share
    info[3] = steady
    return common


@kernel
@no_type_check
def _count(words: Words, shift: int, counts: I64) -> int:
    """Four tables, so that runs of equal values do not wait for the same counter. Needs: counts (4, 2**bits), zero."""
    s = np.uint64(shift)
    m = np.uint64(counts.shape[1] - 1)
    whole = words.size // 4 * 4
    for i in range(0, whole, 4):
        counts[0, (np.uint64(words[i]) >> s) & m] += 1
        counts[1, (np.uint64(words[i + 1]) >> s) & m] += 1
        counts[2, (np.uint64(words[i + 2]) >> s) & m] += 1
        counts[3, (np.uint64(words[i + 3]) >> s) & m] += 1
    for i in range(whole, words.size):
        counts[0, (np.uint64(words[i]) >> s) & m] += 1
    return 0


@kernel
@no_type_check
def _log2(x: int, table: I64) -> int:
    """Return log2(x), x >= 1, in units of 2^-16. Needs: table.size == 257."""
    y = x
    e = 0
    while y >= 2:
        y >>= 1
        e += 1
    scaled = (x << 16) >> e if e <= 40 else (x >> (e - 40)) >> 24  # in units of 2^-16, 65536 … 131071
    at = (scaled - 65536) >> 8
    part = (scaled - 65536) & 255
    return (e << 16) + table[at] + (((table[at + 1] - table[at]) * part) >> 8)


@kernel
@no_type_check
def _entropy(counts: I64, total: int, table: I64) -> int:
    """Needs: counts >= 1, total their sum, below 2^40; table.size == 257."""
    bits = 0
    whole = _log2(total, table)
    for i in range(counts.size):
        bits += counts[i] * (whole - _log2(counts[i], table))
    return bits
