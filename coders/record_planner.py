"""How a chunk of floats is coded, decided by one kernel: what `plan` of the archiver decides step by step.

It knows the usual case alone: the widest candidate of joined bits wins, every group's keys have a table, and all else is
dense. Whatever is unusual it leaves to `plan`, and what it decides is what that would: the two make the same records, byte
for byte, which is tested. In Python the same takes 250 microseconds a chunk, a fifth of encoding it, under the GIL.
"""

import threading
from collections.abc import Callable
from functools import cache
from typing import NamedTuple, no_type_check

import numpy as np

from tzip.coders import counting, fitting, huffman, keys, rans, rans_avx2, rans_portable
from tzip.coders.arrays import I64, U8, U16, U32, U64, Words
from tzip.coders.counting import Survey, survey_groups
from tzip.coders.fitting import cost_of, fit, log2_table
from tzip.coders.huffman import FITTING, fill_codes, fill_pairs, fit_lengths, measure_lengths, write_lengths
from tzip.coders.jit import AVX2, AVX512, kernel, ready, stamp, tier
from tzip.coders.keys import choose_window, count_in_window
from tzip.coders.planes import Split
from tzip.coders.rans import NARROW, fill_encoders, measure_table, sort_bytes, write_table
from tzip.coders.rans_avx2 import fill_divisors as fill_divisors_ymm
from tzip.coders.rans_portable import fill_divisors

NARROW_KEYS, WIDE_KEYS, YMM, SCALAR, PAIRS, CODES = range(6)  # what encodes the keys: four kernels of rANS, two of Huffman
_GROUPS = 4
_KEYS = 1 << 10  # as many as there can be: eight bits of exponent and two joined ones
_STORED = 512  # bytes that hold a stored table
# What each kind looks up: type and entries.
_LOOK_UPS = (
    (np.uint8, 4 * NARROW + 1), (np.uint8, 1025), (np.uint64, 256), (np.uint64, 512), (np.uint32, 4096), (np.uint32, 256),
)  # fmt: skip


class Rules(NamedTuple):
    """What a plan depends on beside the elements: joined bits, whether these are the only candidate, whether keys are coded by
    rANS, which keys are counted (one in `every`), which of all else (one in `sample`), the symbols of a segment, and what of a
    thousand dense bytes take at least.
    """

    joined: int
    only: bool
    rans: bool
    every: int
    sample: int
    segment: int
    dense: int


class Planned(NamedTuple):
    """What was counted of the elements; `kind`: what encodes the keys, None when the case is unusual. Then
    the arrays that `record_encoder` needs, valid until this thread plans again: a row a group in `plan` and `windows`, a row
    a table in the others, the stored tables.
    """

    survey: Survey
    kind: int | None
    plan: I64
    windows: U16
    look_up: Words
    lengths: I64
    stored: U8


class _Room(threading.local):
    """Scratch memory of a thread."""

    def __init__(self) -> None:
        self.counts = np.empty(4 * _KEYS, np.uint32)
        self.pooled = np.empty(_KEYS, np.int64)
        self.used = np.empty((_GROUPS + 2, 256), np.int64)
        self.rows = np.empty((3, 256), np.int64)
        self.work = np.empty(FITTING, np.int64)
        self.leaf = np.empty(22 * 256, np.uint8)
        self.plan = np.empty((_GROUPS, 8), np.int64)
        self.windows = np.empty((_GROUPS, 8), np.uint16)
        self.stored = np.empty(_GROUPS * _STORED, np.uint8)
        self.codes = np.empty(256, np.uint32)
        self.look_ups: list[Words] = [np.empty((_GROUPS, size), dtype) for dtype, size in _LOOK_UPS]


_room = _Room()


def plan_record(words: Words, split: Split, group: int, rules: Rules) -> Planned | None:
    """Plan the record of elements, shape (n,), in groups of `group` elements, the last of what is left.

    None when elements have more than four bytes, when there are more than four groups, or while the kernel is not worth
    compiling.
    """
    groups = -(-words.size // group)
    head = split.head
    if head is None or groups > _GROUPS or words.itemsize > 4:
        return None
    r = _room
    words = words.view()
    words.flags.writeable = False  # kernels are compiled for the one or the other
    signs = np.empty(groups, np.int64)
    seen = np.empty((groups, 1 << (head.exponent + rules.joined)), np.int64)
    rests = np.zeros(256, np.int64)
    tails = np.empty((words.itemsize - 2, groups, 256), np.int64)
    level = {AVX512: 2, AVX2: 1}.get(tier(), 0)
    function = planner()
    arguments = (
        words, group, head.mantissa, rules.joined, head.exponent, rules.rans, rules.only, rules.every, rules.sample,
        rules.segment, rules.dense, level, log2_table(), r.counts, signs, seen, rests, tails, r.pooled, r.used, r.rows,
        r.work, r.leaf, r.plan, r.windows, r.stored, r.codes, *r.look_ups,
    )  # fmt: skip
    if not ready(function, arguments, words.nbytes):
        return None
    kind = function(*arguments)
    survey = Survey(signs.tolist(), seen, rests, tails)
    look_up = r.look_ups[max(kind, 0)]
    return Planned(survey, kind if kind >= 0 else None, r.plan[:groups], r.windows[:groups], look_up, r.used, r.stored)


@cache
def planner() -> Callable[..., int]:
    """Return the kernel."""
    return _make(stamp(counting, fitting, huffman, keys, rans, rans_avx2, rans_portable))


@kernel
@no_type_check
def _settle(counts: I64, escapes: int) -> int:
    """Count escapes as the most frequent byte, which is returned, and give a table two bytes. Needs: counts (256,)."""
    frequent = 0
    for byte in range(256):
        if counts[byte] > counts[frequent]:
            frequent = byte
    counts[frequent] += escapes
    _second(counts, 0 if frequent else 1)
    return frequent


@kernel
@no_type_check
def _second(counts: I64, byte: int) -> int:
    """Count that byte once when fewer than two are counted. Needs: counts (256,)."""
    used = 0
    for k in range(256):
        used += 1 if counts[k] > 0 else 0
    if used < 2:
        counts[byte] = 1
    return used


@kernel
@no_type_check
def _bits(counts: I64, lengths: I64) -> int:
    """Needs: both (256,)."""
    bits = 0
    for byte in range(256):
        bits += counts[byte] * lengths[byte]
    return bits


@kernel
@no_type_check
def _segments(n: int, most: int) -> int:
    """The segments of n symbols: `plan.segments_of`, when not everything is tried."""
    segments = (n + most - 1) // most
    return max(segments, 4) if n >= most else segments


@kernel
@no_type_check
def _packed(n: int, bits: int) -> int:
    """The bytes of n symbols of 1 … 8 bits, stored raw: `rows.packed_size`."""
    if bits == 8:
        return n
    cell = 256 if bits & 1 else 64 if bits == 4 else 128
    return (n + cell - 1) // cell * cell * bits // 8


def _make(stamp: int) -> Callable[..., int]:
    @kernel
    @no_type_check
    def plan_groups(
        words: Words, group: int, mantissa: int, joined: int, exponent: int, freqs: bool, only: bool, every: int,
        sample: int, most: int, dense: int, level: int, log2: I64, counts: U32, signs: I64, seen: I64,
        rests: I64, tails: I64, pooled: I64, used: I64, rows: I64, work: I64, leaf: U8, plan: I64, windows: U16, stored: U8,
        codes: U32, narrow_look_up: U8, wide_look_up: U8, divisors: U64, wide_divisors: U64, pairs: U32,
        code_look_up: U32,
    ) -> int:
        """Return the kind that encodes the keys, -1 when the case is not the usual one; fill `plan` and `windows` as
        `record_encoder` needs them, used[i] with frequencies or code lengths, `stored`, and the look-ups of the kind.

        signs, seen, rests and tails are those of a Survey in any case.
        Needs: what `survey_groups` does; a group for each row of seen, at most four; rests zero; a `_Room`.
        """  # fmt: skip
        if stamp < 0:
            return -1
        survey_groups(words, group, mantissa - joined, every, sample, counts, signs, seen, rests, tails)
        groups = seen.shape[0]
        places = seen.shape[1]
        key_counts = pooled[:places]
        n = words.size
        here = rows[0]
        facts = rows[1]
        found = rows[2]
        for i in range(1, groups):
            if signs[i] != signs[0]:
                return -1
        # Dense rests and bytes below them.
        low = mantissa - joined
        bits = low + (1 if signs[0] == 0 else 0)
        here[:] = rests
        if signs[0] != 0:
            for k in range(256):
                here[k] = rests[k] + rests[k + (1 << low)] if k < 1 << low else 0
        for p in range(-1, tails.shape[0] * groups):
            if p >= 0:
                here[:] = tails[p // groups, p % groups]
                bits = 8
            some = 0
            total = 0
            for k in range(256):
                some += 1 if here[k] > 0 else 0
                total += here[k]
            if some < 2:
                return -1
            used[0, :] = 0
            fit(here, log2, used[0])
            if ((cost_of(here, used[0], log2) + 65535) >> 16) * 1000 <= dense * bits * total:
                return -1
        # The window of the keys, and the table that groups share unless one of its own saves a group more than it costs.
        total = 0
        some = 0
        for k in range(places):
            key_counts[k] = 0
            for i in range(groups):
                key_counts[k] += seen[i, k]
            total += key_counts[k]
            some += 1 if key_counts[k] > 0 else 0
        if some < 2:
            return -1
        wide = places > 256
        holes = every > 1
        here[:] = 0
        escapes = choose_window(key_counts, 254 if wide else places, wide, holes, found, here)
        if wide and found[1] - found[0] >= 127:
            facts[:] = 0
            narrow = choose_window(key_counts, 127, True, holes, found[8:], facts)
            if (narrow - escapes) * 32 * 1024 < total:
                here[:] = facts
                found[:3] = found[8:11]
                escapes = narrow
        first = found[0]
        last = found[1]
        zero = found[2] != 0
        base = first - 1 if wide else 0
        instead = _settle(here, escapes)
        if freqs:
            used[4, :] = 0
            fit(here, log2, used[4])
            measure_table(used[4], facts)
            common_head = min(facts[2], min(facts[3], facts[4]))
        else:
            fit_lengths(here, work, leaf, used[4])
            common_head = measure_lengths(used[4], facts)
        size = 0
        numbered = 0
        shares = False
        span = 0
        at = 0
        for i in range(groups):
            row = seen[i]
            m = 0
            for k in range(places):
                m += row[k]
            here[:] = 0
            escapes = count_in_window(row, first, last, base, zero, here)
            here[instead] += escapes
            estimate = (132 if freqs else 80) * _segments(m, most) + escapes * 4
            best = estimate + (0 if shares else common_head)
            if freqs:
                best += ((cost_of(here, used[4], log2) + 65535) >> 16) // 8
            else:
                best += _bits(here, used[4]) // 8
            own = False
            if groups > 1:
                if holes:
                    for k in range(first - base, last - base + 1):
                        if here[k] == 0:
                            here[k] = 1
                    if zero and here[0] == 0:
                        here[0] = 1
                _second(here, 0 if here[0] == 0 else 1)
                if freqs:
                    used[5, :] = 0
                    fit(here, log2, used[5])
                    measure_table(used[5], facts)
                    other = estimate + min(facts[2], min(facts[3], facts[4]))
                    other += ((cost_of(here, used[5], log2) + 65535) >> 16) // 8
                else:
                    fit_lengths(here, work, leaf, used[5])
                    other = estimate + measure_lengths(used[5], facts) + _bits(here, used[5]) // 8
                if other + 128 < best:
                    own = True
                    best = other
            size += best
            share = shares and not own
            if not share:
                used[numbered, :] = used[5] if own else used[4]
                numbered += 1
            shares = not own
            table = used[numbered - 1]
            if freqs:
                measure_table(table, facts)
                head = min(facts[2], min(facts[3], facts[4]))
            else:
                head = measure_lengths(table, facts)
            span = max(span, facts[1] - facts[0])
            plan[i, 0] = _segments(min(group, n - i * group), most)
            plan[i, 1] = numbered - 1
            plan[i, 2] = 1 if share else 0
            plan[i, 3] = at
            plan[i, 4] = 0 if share else head
            plan[i, 5] = base
            plan[i, 7] = facts[0]
            if not share:
                for k in range(at, at + head):
                    stored[k] = 0
                if freqs:
                    write_table(table, facts, stored[at : at + head])
                else:
                    write_lengths(table, facts[0], facts[1], stored[at : at + head])
                at += head
            # The byte that padding is: the most frequent one, or one of the shortest codes.
            filler = facts[0]
            for byte in range(256):
                if table[byte] > table[filler] if freqs else 0 < table[byte] < table[filler]:
                    filler = byte
            plan[i, 6] = filler
            windows[i, 0] = low
            windows[i, 1] = places - 1
            windows[i, 2] = first
            windows[i, 3] = last - first
            windows[i, 4] = (first - base) & 0xFFFF
            windows[i, 5] = instead
            windows[i, 6] = 0 if zero else instead
            windows[i, 7] = 1 if zero else 0
        key_bits = exponent + joined
        if key_bits <= 8 and size >= _packed(n, key_bits):
            return -1
        if not only and size + (low + 1) * n // 8 >= n * 2 * 9 // 10:
            return -1
        # What the encoder looks up.
        kind = PAIRS if span < 64 else CODES
        if freqs:
            kind = SCALAR if level == 0 else YMM if level == 1 else NARROW_KEYS if span < 128 else WIDE_KEYS
        order = work[:256]
        for i in range(numbered):
            table = used[i]
            if freqs:
                ordered = order[: sort_bytes(table, order)]
                lo = 256
                for k in range(ordered.size):
                    lo = min(lo, ordered[k])
                if kind == NARROW_KEYS:
                    narrow_look_up[i, :] = 0
                    fill_encoders(table, ordered, lo, narrow_look_up[i])
                if kind == WIDE_KEYS:
                    wide_look_up[i, :] = 0
                    fill_encoders(table, ordered, lo, wide_look_up[i])
                if kind == YMM:
                    divisors[i, :] = 0
                    fill_divisors_ymm(table, ordered, divisors[i])
                if kind == SCALAR:
                    wide_divisors[i, :] = 0
                    fill_divisors(table, ordered, wide_divisors[i])
            else:
                codes[:] = 0
                fill_codes(table, codes)
                code_look_up[i, :] = codes
                if kind == PAIRS:
                    measure_lengths(table, facts)
                    pairs[i, :] = 0
                    fill_pairs(codes, table, facts[0], facts[1], pairs[i])
        return kind

    return plan_groups  # type: ignore[no-any-return]
