"""Frequencies for rANS that fit counts, and what symbols cost under them: in integers, the same on every machine."""

from functools import cache
from typing import no_type_check

import numpy as np

from tzip.coders.arrays import I64
from tzip.coders.jit import quick_kernel
from tzip.coders.rans import TOTAL, RansTable


@cache
def log2_table() -> I64:
    """Return log2(i) in 1/65536 bits for i = 0 … 4096 (entry 0 is 0), by integers alone.

    A mantissa of 32 bits is squared once for each bit of the logarithm.
    """
    i = np.arange(1, TOTAL + 1, dtype=np.uint64)
    whole = np.array([int(k).bit_length() - 1 for k in i], np.uint64)
    y = i << (np.uint64(31) - whole)
    result = whole
    for _ in range(16):
        y = (y * y) >> np.uint64(31)
        bit = y >> np.uint64(32)
        y >>= bit
        result = result * np.uint64(2) + bit
    return np.concatenate(([0], result.astype(np.int64)))


def quantize(counts: I64) -> RansTable:
    """Scale byte counts, shape (256,), of which two or more are not 0, to frequencies that add up to 4096.

    A byte that occurs keeps a frequency of at least 1. What rounding leaves goes where it saves, or comes from where
    it costs, the fewest bits; integers only, so that every machine finds the same table.
    """
    if counts.size != 256:
        raise ValueError(f"{counts.size} counts of bytes")
    freq = np.zeros(256, np.int64)
    fit(counts, log2_table(), freq)
    return RansTable(freq)


def cost(counts: I64, freq: I64) -> int:
    """Return the bits (rounded up) that bytes with these counts take under `freq`; absent bytes cost nothing here."""
    if counts.size != 256 or freq.size != 256:
        raise ValueError(f"{counts.size} counts of bytes")
    return int(cost_of(counts, freq, log2_table())) + 65535 >> 16


@quick_kernel
@no_type_check
def fit(counts: I64, log2: I64, freq: I64) -> None:
    """Needs: counts (256,), >= 0 with two or more not 0, their sum below 2**50; freq zero."""
    total = 0
    for s in range(256):
        total += counts[s]
    left = 4096
    for s in range(256):
        if counts[s] > 0:
            freq[s] = max(1, min(4095, (counts[s] * 4096 + total // 2) // total))
            left -= freq[s]
    while left != 0:
        best = -1
        best_gain = 0
        for s in range(256):
            f = freq[s]
            if f == 0 or (left > 0 and f == 4095) or (left < 0 and f == 1):
                continue
            if left > 0:
                gain = counts[s] * (log2[f + 1] - log2[f])
            else:
                gain = -counts[s] * (log2[f] - log2[f - 1])
            if best < 0 or gain > best_gain:
                best = s
                best_gain = gain
        step = 1 if left > 0 else -1
        freq[best] += step
        left -= step


@quick_kernel
@no_type_check
def cost_of(counts: I64, freq: I64, log2: I64) -> int:
    """Return the cost in 1/65536 bits. Needs: counts and freq (256,), freq <= 4096."""
    total = 0
    for s in range(256):
        if freq[s] > 0:
            total += counts[s] * ((12 << 16) - log2[freq[s]])
    return total
