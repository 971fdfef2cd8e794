"""How often keys, rests and bytes of floats occur: exactly, or by a sample at a fixed stride.

A sample is one run of 64 elements in `every`, so that every machine counts the same ones.
"""

from dataclasses import dataclass
from typing import Any, no_type_check

import numpy as np

from tzip.coders.arrays import I64, U32, Words
from tzip.coders.jit import kernel, quick_kernel, ready
from tzip.coders.planes import SMALL, Head
from tzip.coders.scratch import borrow


@dataclass(frozen=True, slots=True)
class Survey:
    """What a plan needs to know of the groups of a chunk of floats.

    `signs` of each group: 1 when all are 0, 2 when all are 1, else 0. `keys`, shape (groups, 2**(e + t)), with the most joined
    bits t; `rests` that they leave, shape (256,), signs included, of all groups, and `tails`, shape (planes, groups, 256), of
    the bytes below the head, the highest first, by samples (empty when none were asked for).
    """

    signs: list[int]
    keys: I64
    rests: I64
    tails: I64


def survey(words: Words, size: int, head: Head, joined: int, every: int, sample: int) -> Survey:
    """Count the elements of a chunk, shape (n,), in groups of `size`: keys at `every`, the others at `sample` (0: don't)."""
    groups = -(-words.size // size)
    planes = words.itemsize - 2
    signs = np.zeros(groups, np.int64)
    keys = np.empty((groups, 1 << (head.exponent + joined)), np.int64)
    rests = np.zeros(256, np.int64)
    tails = np.empty((planes, groups, 256), np.int64)
    counts = borrow("counts", 4 * max(256, keys.shape[1]), np.uint32)
    arguments = (words, size, head.mantissa - joined, every, sample, counts, signs, keys, rests, tails)
    survey_function: Any = survey_groups
    if not ready(survey_groups, arguments, words.nbytes):
        survey_function = survey_in_numpy
    survey_function(*arguments)
    return Survey(signs.tolist(), keys, rests, tails if sample else tails[:0])


def survey_in_numpy(
    words: Words, size: int, low: int, every: int, sample: int, _: U32, signs: I64, keys: I64, rests: I64, tails: I64
) -> None:
    """Do as `survey_groups` does, three times as slow, with nothing to compile but what else is needed as well."""
    shift = 8 * words.itemsize - 16
    for g in range(signs.size):
        part = words[g * size : min(words.size, (g + 1) * size)]
        signs[g] = sign_mode(part)
        keys[g] = _field_counts(_sampled(part, every), shift + low, keys.shape[1].bit_length() - 1) * every
        if sample > 0:
            some = _sampled(part, sample)
            kept = (some >> (shift + 15 - low)) & (1 << low) | (some >> shift) & ((1 << low) - 1)
            rests += np.bincount(kept.astype(np.int64), minlength=256) * sample
            for p in range(tails.shape[0]):
                tails[p, g] = _field_counts(some, shift - 8 - 8 * p, 8) * sample


def _sampled(words: Words, every: int) -> Words:
    """Return the elements that a sample at that stride counts."""
    if every == 1:
        return words
    runs = np.arange(-(-words.size // (64 * every)))
    begins = np.minimum(64 * (every * runs + ((runs * 2654435761) >> 13) % every), max(0, words.size - 64))
    at: I64 = (begins[:, None] + np.arange(min(64, words.size))).reshape(-1)
    return words[at]


def _field_counts(words: Words, shift: int, bits: int) -> I64:
    return np.bincount(((words >> shift) & ((1 << bits) - 1)).astype(np.int64), minlength=1 << bits)


def key_counts(words: Words, head: Head, joined: int, every: int = 1) -> I64:
    """Count the keys of elements, shape (n,): returns counts of shape (2**(e + t),).

    `every` > 1 counts a sample, one run of 64 elements in that many, and scales the result.
    """
    return _counts(words, 8 * words.itemsize - 16 + head.mantissa - joined, head.exponent + joined, every)


def byte_counts(words: Words, shift: int, every: int = 1) -> I64:
    """Count the values of the byte that starts at bit `shift` of elements, shape (n,); `every` as for `key_counts`."""
    return _counts(words, shift, 8, every)


def rest_counts(words: Words, head: Head, joined: int, signless: bool, every: int) -> I64:
    """Count the rests of a sample of elements, shape (n,), and scale the result; `every` as for `key_counts`."""
    counts = np.zeros(256, np.int64)
    _count_rests(words, 8 * words.itemsize - 16, head.mantissa - joined, not signless, every, counts)
    return counts


def _counts(words: Words, shift: int, bits: int, every: int) -> I64:
    if every == 1 and words.size <= SMALL:
        values = (words >> words.dtype.type(shift)) & words.dtype.type((1 << bits) - 1)
        return np.bincount(values.astype(np.int64), minlength=1 << bits)
    counts = borrow("counts", 4 << bits, np.uint32).reshape(4, -1)
    total = np.empty(1 << bits, np.int64)
    arguments = (words, shift, (1 << bits) - 1, every, counts, total)
    if not ready(count_fields, arguments, words.nbytes):
        return _field_counts(_sampled(words, every), shift, bits) * every
    counts[:] = 0
    count_fields(*arguments)
    return total


def sign_mode(words: Words) -> int:
    """Return 1 when every element's sign is 0, 2 when every one is 1, else 0."""
    return int(_signs(words, 8 * words.itemsize - 1))


def same_keys(words: Words, head: Head, joined: int) -> bool:
    """Say whether all elements have the same key."""
    return bool(_same(words, 8 * words.itemsize - 16 + head.mantissa - joined, (1 << (head.exponent + joined)) - 1))


@kernel
@no_type_check
def _start(run: int, every: int) -> int:
    """Where in the `every` runs of 64 from element 64 * every * run on the sample lies: anywhere, for rows repeat."""
    return 64 * (every * run + ((run * 2654435761) >> 13) % every)


@kernel
@no_type_check
def count_fields(words: Words, shift: int, mask: int, every: int, counts: U32, total: I64) -> None:
    """Four tables, so that runs of equal values do not wait for the same counter.

    Needs: counts (4, mask + 1), zero; total (mask + 1,).
    """
    s = np.uint64(shift)
    m = np.uint64(mask)
    n = words.size
    taken = np.int64(0)
    for run in range((n + 64 * every - 1) // (64 * every)):
        begin = min(_start(run, every), max(0, n - 64)) if every > 1 else 64 * run
        end = min(n, begin + 64)
        taken += end - begin
        whole = begin + (end - begin) // 4 * 4
        for i in range(begin, whole, 4):
            counts[0, (np.uint64(words[i]) >> s) & m] += np.uint32(1)
            counts[1, (np.uint64(words[i + 1]) >> s) & m] += np.uint32(1)
            counts[2, (np.uint64(words[i + 2]) >> s) & m] += np.uint32(1)
            counts[3, (np.uint64(words[i + 3]) >> s) & m] += np.uint32(1)
        for i in range(whole, end):
            counts[0, (np.uint64(words[i]) >> s) & m] += np.uint32(1)
    for k in range(mask + 1):
        c = np.int64(counts[0, k]) + np.int64(counts[1, k]) + np.int64(counts[2, k]) + np.int64(counts[3, k])
        total[k] = c * every


@kernel
@no_type_check
def _count_rests(words: Words, shift: int, low: int, signed: bool, every: int, counts: I64) -> None:
    """Needs: counts (256,), zero; low < 8."""
    s = np.uint64(shift)
    up = np.uint64(shift + 15 - low)
    sign = np.uint64(1 << low) if signed else np.uint64(0)
    mask = np.uint64((1 << low) - 1)
    n = words.size
    for run in range((n + 64 * every - 1) // (64 * every)):
        begin = min(_start(run, every), max(0, n - 64)) if every > 1 else 64 * run
        for i in range(begin, min(n, begin + 64)):
            x = np.uint64(words[i])
            counts[((x >> up) & sign) | ((x >> s) & mask)] += every


@quick_kernel
@no_type_check
def _signs(words: Words, shift: int) -> int:
    """Stops as soon as both signs were seen."""
    s = np.uint64(shift)
    some = np.uint64(0)
    every = np.uint64(1)
    for begin in range(0, words.size, 1024):
        at = np.uint64(begin)
        for k in range(min(1024, words.size - begin)):
            x = np.uint64(words[at + np.uint64(k)])
            some |= x >> s
            every &= x >> s
        if some and not every:
            return 0
    return 2 if every else 1


@kernel
@no_type_check
def _same(words: Words, shift: int, mask: int) -> int:
    """Return 1 when all keys are the first one. Needs: words.size > 0."""
    s = np.uint64(shift)
    m = np.uint64(mask)
    first = np.uint64(words[0])
    for begin in range(0, words.size, 1024):
        at = np.uint64(begin)
        differ = np.uint64(0)
        for k in range(min(1024, words.size - begin)):
            differ |= np.uint64(words[at + np.uint64(k)]) ^ first
        if (differ >> s) & m:
            return 0
    return 1


@kernel
@no_type_check
def survey_groups(
    words: Words, size: int, low: int, every: int, sample: int, counts: U32, signs: I64, keys: I64, rests: I64, tails: I64
) -> None:
    """Needs: signs, keys and tails for all groups; rests (256,), zero; counts for four tables of keys, and of bytes."""
    width = 8 * words.itemsize
    shift = width - 16
    total = np.int64(keys.shape[1])
    for g in range(signs.size):
        part = words[g * size : min(words.size, (g + 1) * size)]
        signs[g] = _signs(part, width - 1)
        table = counts[: 4 * total].reshape(4, total)
        table[:] = 0
        count_fields(part, shift + low, total - 1, every, table, keys[g])
        if sample > 0:
            _count_rests(part, shift, low, True, sample, rests)
            for p in range(tails.shape[0]):
                bytes_ = counts[:1024].reshape(4, 256)
                bytes_[:] = 0
                count_fields(part, shift - 8 - 8 * p, 255, sample, bytes_, tails[p, g])
