"""From keys to bytes: which keys a table covers, and what they cost (FORMAT.md, section 7.3).

Integers only, so that every machine finds the same.
"""

from dataclasses import dataclass, replace
from typing import no_type_check

import numpy as np

from tzip.coders.arrays import I64
from tzip.coders.jit import quick_kernel
from tzip.coders.planes import Window
from tzip.coders.tables import WINDOW


@dataclass(frozen=True, slots=True)
class Mapping:
    """How keys become bytes, counts of these bytes, shape (256,), and the number of keys that escape."""

    window: Window
    counts: I64
    escapes: int


def map_keys(counts: I64, *, limit: int = WINDOW, holes: bool = False) -> Mapping:
    """Choose the bytes for keys with these counts, shape (2**w,): a window of them, and key 0; all others escape.

    A symbol in a table costs about 24 bits of table and 1/4096 of the probability, an escape 32 bits each time; so
    rare keys at the ends of the range escape. Those between frequent ones stay: leaving them out, too, was measured
    to gain nothing, and a window without holes needs no table to look bytes up in. At most `limit` keys above 0 are in
    the window when w > 8. `holes`: the counts are of a sample, and keys of the window that it lacks are counted as 1.
    """
    wide = counts.size > 256
    found = np.empty(3, np.int64)
    byte_counts = np.zeros(256, np.int64)
    escapes = choose_window(counts, limit if wide else counts.size, wide, holes, found, byte_counts)
    low, high, zero = found.tolist()
    window = Window(low - 1 if wide else 0, low, high, bool(zero), 0)
    return _settle(window, byte_counts, int(escapes))


def map_again(window: Window, counts: I64) -> Mapping:
    """Return how keys with these counts fare under a window that was chosen for others."""
    byte_counts = np.zeros(256, np.int64)
    escapes = count_in_window(counts, window.low, window.high, window.base, window.zero, byte_counts)
    byte_counts[window.instead] += escapes
    return Mapping(window, byte_counts, int(escapes))


def _settle(window: Window, byte_counts: I64, escapes: int) -> Mapping:
    frequent = int(byte_counts.argmax())
    byte_counts[frequent] += escapes
    if np.count_nonzero(byte_counts) < 2:
        byte_counts[0 if frequent else 1] = 1  # a table has two bytes or more; this one never occurs
    return Mapping(replace(window, instead=frequent), byte_counts, escapes)


@quick_kernel
@no_type_check
def choose_window(counts: I64, limit: int, wide: bool, holes: bool, found: I64, byte_counts: I64) -> int:
    """Put low, high and whether key 0 has a byte into `found`; return the number of escapes.

    Needs: limit < 256; byte_counts (256,), zero; 256 counts or fewer unless `wide`.
    """
    total = np.int64(0)
    for k in range(counts.size):
        total += counts[k]
    low = 0
    high = 0
    most = 1
    for k in range(1, counts.size):
        # counts * (32 - 12) > total * log2(e) / 4096 + 24, in integers
        if counts[k] * 81_920_000 > total * 1443 + 98_304_000:
            if low == 0:
                low = k
            high = k
        if counts[k] > counts[most]:
            most = k
    if low == 0:
        low = most
        high = most
    if high - low >= limit:
        inside = np.int64(0)
        for k in range(low, low + limit):
            inside += counts[k]
        best = inside
        at = low
        for k in range(low + 1, high - limit + 2):
            inside += counts[k + limit - 1] - counts[k - 1]
            if inside > best:
                best = inside
                at = k
        low = at
        high = at + limit - 1
    zero = counts[0] * 81_920_000 > total * 1443 + 98_304_000
    base = low - 1 if wide else 0
    escapes = total
    for k in range(low, high + 1):
        n = counts[k]
        escapes -= n
        byte_counts[k - base] = 1 if holes and n == 0 else n
    if zero:
        escapes -= counts[0]
        byte_counts[0] = counts[0]
    found[0] = low
    found[1] = high
    found[2] = 1 if zero else 0
    return escapes


@quick_kernel
@no_type_check
def count_in_window(counts: I64, low: int, high: int, base: int, zero: bool, byte_counts: I64) -> int:
    """Return the number of escapes. Needs: high < counts.size; high - base < 256; byte_counts (256,), zero."""
    escapes = np.int64(0)
    for k in range(counts.size):
        escapes += counts[k]
    for k in range(low, high + 1):
        byte_counts[k - base] = counts[k]
        escapes -= counts[k]
    if zero:
        byte_counts[0] = counts[0]
        escapes -= counts[0]
    return escapes
