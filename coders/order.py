"""Rows of similar scale put together (FORMAT.md, section 6.3, transform 6).

The scale of a row says a twentieth of a bit about each exponent in it. Sorted by scale, the rows of a chunk give groups
whose tables say the same: MiniLM in bfloat16 65.81 -> 65.71 %, and contexts of row and column together no more than 65.69.
"""

from typing import no_type_check

import numpy as np

from tzip.coders.arrays import I64, U8, Words
from tzip.coders.jit import kernel


def row_count(n: int, first: int, row: int) -> int:
    """Return the number of rows of n elements of which the first has min(first, n) and all others but the last `row`."""
    return 1 + -(-max(n - first, 0) // row)


def classify(words: Words, first: int, row: int, shift: int, mask: int, classes: int) -> U8:
    """Return the class of each row by the mean of its fields (element >> shift) & mask: as many rows in each class."""
    means = np.empty(row_count(words.size, first, row), np.int64)
    _means(words, first, row, shift, mask, means)
    ranks = np.empty(means.size, np.int64)
    ranks[np.argsort(means, kind="stable")] = np.arange(means.size)
    return (ranks * classes // means.size).astype(np.uint8)


def gather(words: Words, first: int, row: int, classes: U8, out: Words) -> None:
    """Fill `out` with the rows of class 0, then those of class 1, and so on, each class in order."""
    _move(words, first, row, _starts(words.size, first, row, classes), True, out)


def scatter(words: Words, first: int, row: int, classes: U8, out: Words) -> None:
    """Do the inverse of `gather`. Needs: a class for each row."""
    _move(words, first, row, _starts(words.size, first, row, classes), False, out)


def _starts(n: int, first: int, row: int, classes: U8) -> I64:
    """Return where each row lies when they are gathered."""
    sizes = np.full(classes.size, row, np.int64)
    sizes[0] = min(first, n)
    if classes.size > 1:
        sizes[-1] = n - first - (classes.size - 2) * row
    order = np.argsort(classes, kind="stable")
    starts = np.empty(classes.size, np.int64)
    starts[order] = np.cumsum(sizes[order]) - sizes[order]
    return starts


@kernel
@no_type_check
def _means(words: Words, first: int, row: int, shift: int, mask: int, means: I64) -> None:
    """Means in 1/256. Needs: means.size rows as row_count says."""
    s = np.uint64(shift)
    m = np.uint64(mask)
    begin = 0
    for r in range(means.size):
        end = min(words.size, first + r * row)
        total = np.uint64(0)
        for i in range(end - begin):
            total += (np.uint64(words[np.uint64(begin) + np.uint64(i)]) >> s) & m
        means[r] = np.int64(total) * 256 // max(1, end - begin)
        begin = end


@kernel
@no_type_check
def _move(words: Words, first: int, row: int, starts: I64, gathering: bool, out: Words) -> None:
    """Needs: out.size == words.size; starts a partition of them into the rows' places."""
    begin = 0
    for r in range(starts.size):
        end = min(words.size, first + r * row)
        at = np.uint64(starts[r])
        b = np.uint64(begin)
        if gathering:
            for i in range(end - begin):
                out[at + np.uint64(i)] = words[b + np.uint64(i)]
        else:
            for i in range(end - begin):
                out[b + np.uint64(i)] = words[at + np.uint64(i)]
        begin = end
