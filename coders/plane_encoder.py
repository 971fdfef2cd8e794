"""Blocks of byte planes, encoded into a record by one call of a kernel: differences have up to a hundred of them a chunk.

Step by step each block costs 0.1 milliseconds in Python, more than coding it. The kernel decides as `plan.choose` does, for
the level that codes with rANS alone, and writes what `encoding` writes: the records are the same byte for byte, which is
tested.
"""

import threading
from collections.abc import Callable
from functools import cache
from typing import no_type_check

import numpy as np

from tzip.coders import counting, fitting, planes, rans, rans_avx2, rans_avx512, rans_portable, record_encoder
from tzip.coders.arrays import I64, U8, U16, U32, U64, Words
from tzip.coders.counting import count_fields
from tzip.coders.fitting import cost_of, fit, log2_table
from tzip.coders.jit import AVX2, AVX512, kernel, ready, stamp, tier
from tzip.coders.planes import byte_of
from tzip.coders.rans import LANES, NARROW, fill_encoders, measure_table, sort_bytes, write_table
from tzip.coders.rans_avx2 import encode as encode_ymm
from tzip.coders.rans_avx2 import fill_divisors as fill_divisors_ymm
from tzip.coders.rans_avx512 import encode_narrow, encode_wide
from tzip.coders.rans_portable import encode as encode_scalar
from tzip.coders.rans_portable import fill_divisors
from tzip.coders.record_encoder import copy_bytes, place_payload, write32

_GROUP = 1 << 18
_SEGMENTS = 4
_SLACK = 256
_STORED = 1024  # bytes that hold a stored table
ENTRY = 16


class _Room(threading.local):
    """Scratch memory of a thread."""

    def __init__(self) -> None:
        self.coded = np.empty(_GROUP + _SLACK, np.uint8)
        self.words = np.empty(_GROUP + 64 * _SEGMENTS + 128 * _SEGMENTS, np.uint16)
        self.stream = self.words.view(np.uint8)
        self.states = np.empty(_SEGMENTS * LANES, np.uint32)
        self.lanes = np.empty(4 * LANES, np.uint32)
        self.places = np.empty((3, _SEGMENTS), np.int64)
        self.integers = np.empty(64, np.int64)
        self.counts = np.empty((4, 256), np.uint32)
        self.rows = np.empty((6, 256), np.int64)
        self.stored = np.empty(_STORED, np.uint8)
        self.escapes = np.empty(_GROUP + _SLACK, np.uint32)
        self.narrow = np.empty(4 * NARROW + 1, np.uint8)
        self.wide = np.empty(1025, np.uint8)
        self.divisors = np.empty(256, np.uint64)
        self.wide_divisors = np.empty(512, np.uint64)


_room = _Room()
_NOTHING: U8 = np.zeros(0, np.uint8)


def encode_planes(
    words: Words, begins: I64, sizes: I64, segment: int, record: U8, entries: int, at: int
) -> tuple[int, int, int] | None:
    """Put the blocks of all byte planes of groups, from the highest byte down, into `record`, whose payloads end at byte `at`.

    Group i is words[begins[i] : begins[i] + sizes[i]], of 1 … 2^18 elements; block entries go to byte `entries` and on.
    `segment`: symbols of a segment. Returns the end of the last payload, the bytes of all payloads and a mask of the codecs
    used; None when the record has no room, or while the kernel is not worth compiling.
    Needs: groups within `words`; entries + 16 * blocks <= at <= record.size.
    """
    r = _room
    level = {AVX512: 2, AVX2: 1}.get(tier(), 0)
    function = _kernel(level)
    arguments = (
        words, begins, sizes, segment, log2_table(), rans_avx2.gatherings() if level == 1 else _NOTHING, r.coded,
        r.stream, r.words, r.states, r.lanes, r.places, r.integers, r.counts, r.rows, r.stored, r.escapes, r.narrow, r.wide,
        r.divisors, r.wide_divisors, entries, at, record,
    )  # fmt: skip
    if not ready(function, arguments, words.nbytes):
        return None
    end = function(*arguments)
    return (end, int(r.integers[32]), int(r.integers[33])) if end else None


@cache
def _kernel(level: int) -> Callable[..., int]:
    return _make(stamp(counting, fitting, planes, rans, rans_avx2, rans_avx512, rans_portable, record_encoder), level)


def _make(stamp: int, level: int) -> Callable[..., int]:
    """Make the kernel for vectors of 512 bits (2), of 256 (1), or none (0)."""

    @kernel
    @no_type_check
    def encode(
        words: Words, begins: I64, sizes: I64, most: int, log2: I64, gathering: U8, coded: U8, stream: U8,
        stream_words: U16, states: U32, lanes: U32, places: I64, integers: I64, counts: U32, rows: I64, stored_table: U8,
        escapes: U32, narrow: U8, wide: U8, divisors: U64, wide_divisors: U64, entries: int, at: int, record: U8,
    ) -> int:
        """Return the end of the last payload, 0 when there is no room; integers[32] and [33] are what `encode_planes` says.

        Needs: what `encode_planes` needs; a `_Room`.
        """  # fmt: skip
        if stamp < 0:
            return 0
        groups = sizes.size
        width = words.itemsize
        here = rows[0]
        kept = rows[1]
        freq = rows[2]
        order = rows[3]
        facts = rows[4]
        lane = integers[:12]
        payloads = 0
        codecs = 0
        e = entries
        for p in range(width):
            shift = 8 * (width - 1 - p)
            for g in range(groups):
                n = sizes[g]
                part = words[begins[g] : begins[g] + n]
                for k in range(16):
                    record[e + k] = np.uint8(0)
                codec = 0
                dense = False
                if n >= 8192:
                    counts[:] = 0
                    count_fields(part, shift, 255, 64, counts, here)
                    some = 0
                    total = 0
                    for k in range(256):
                        some += 1 if here[k] > 0 else 0
                        total += here[k]
                    if some > 1:
                        freq[:] = 0
                        fit(here, log2, freq)
                        dense = ((cost_of(here, freq, log2) + 65535) >> 16) * 1000 > 970 * 8 * total
                if not dense:
                    symbols = coded[:n]
                    byte_of(part, shift, symbols)
                    counts[:] = 0
                    count_fields(symbols, 0, 255, 1, counts, here)
                    used = 0
                    value = 0
                    for k in range(256):
                        if here[k] > 0:
                            used += 1
                            value = k
                    if used == 1:
                        record[e] = np.uint8(1)
                        record[e + 12] = np.uint8(value)
                        codecs |= 2
                        e += 16
                        continue
                    # Bytes that are cheaper as escapes: `plan._frequent`.
                    used = 0
                    for k in range(256):
                        kept[k] = here[k] if here[k] * 102400000 > n * 1443 + 32768000 else 0
                        used += 1 if kept[k] > 0 else 0
                    if used < 2:
                        kept[:] = here
                    freq[:] = 0
                    fit(kept, log2, freq)
                    lacking = 0
                    for k in range(256):
                        lacking += here[k] if freq[k] == 0 else 0
                    measure_table(freq, facts)
                    head = min(facts[2], min(facts[3], facts[4]))
                    segments = (n + most - 1) // most
                    size = ((cost_of(here, freq, log2) + 65535) >> 16) // 8 + 132 * segments + head + lacking * 4
                    if size < n - n // 128:
                        codec = 4
                if codec == 0:
                    start = place_payload(record, at, n)
                    if start == 0:
                        return 0
                    at = start + n
                    if dense:
                        byte_of(part, shift, record[start:at])
                    else:
                        copy_bytes(coded, 0, n, record, start)
                    write32(record, e + 4, n)
                    payloads += n
                    codecs |= 1
                    e += 16
                    continue
                filler = 0
                for k in range(256):
                    if freq[k] > freq[filler]:
                        filler = k
                found = 0
                if lacking > 0:
                    for k in range(n):
                        if freq[coded[k]] == 0:
                            escapes[found] = np.uint32(coded[k]) << np.uint32(18) | np.uint32(k)
                            coded[k] = np.uint8(filler)
                            found += 1
                padded = (n + 31) // 32 * 32
                for k in range(n, padded):
                    coded[k] = np.uint8(filler)
                ordered = order[: sort_bytes(freq, order)]
                segment = (n + 128 * segments - 1) // (128 * segments) * 128
                room = 2 * (segment + 64)
                left = places[0, :segments]
                ends = places[1, :segments]
                top = places[2, :segments]
                for s in range(segments):
                    top[s] = min(padded, (s + 1) * segment)
                    left[s] = (top[s] - s * segment) // 32
                    ends[s] = (s + 1) * room
                for k in range(32 * segments):
                    states[k] = np.uint32(32768)
                if level == 2:
                    if facts[1] - facts[0] < 128:
                        narrow[:] = 0
                        fill_encoders(freq, ordered, facts[0], narrow)
                        encode_narrow(coded[:padded], narrow, stream_words, left, ends, top, states, lanes, lane)
                    else:
                        wide[:] = 0
                        fill_encoders(freq, ordered, facts[0], wide)
                        encode_wide(coded[:padded], wide, stream_words, left, ends, top, states, lanes, lane)
                if level == 1:
                    fill_divisors_ymm(freq, ordered, divisors)
                    encode_ymm(coded[:padded], divisors, gathering, stream_words, left, ends, top, states, lanes, lane)
                if level == 0:
                    fill_divisors(freq, ordered, wide_divisors)
                    encode_scalar(coded[:padded], wide_divisors, stream_words, left, ends, top, states)
                used = 0
                for s in range(segments):
                    used += (s + 1) * room - ends[s]
                stored = 4 * found + 132 * segments + head + used
                start = place_payload(record, at, stored)
                if start == 0:
                    return 0
                at = start
                for k in range(found):
                    write32(record, at, np.int64(escapes[k]))
                    at += 4
                for s in range(segments):
                    write32(record, at, ((s + 1) * room - ends[s]) // 2)
                    at += 4
                for k in range(32 * segments):
                    write32(record, at, np.int64(states[k]))
                    at += 4
                stored_table[:head] = 0
                write_table(freq, facts, stored_table)
                copy_bytes(stored_table, 0, head, record, at)
                at += head
                for s in range(segments):
                    used = (s + 1) * room - ends[s]
                    copy_bytes(stream, ends[s], used, record, at)
                    at += used
                record[e] = np.uint8(4)
                record[e + 2] = np.uint8(segments)
                write32(record, e + 4, stored)
                write32(record, e + 8, found)
                payloads += stored
                codecs |= 16
                e += 16
        integers[32] = payloads
        integers[33] = codecs
        return at

    return encode  # type: ignore[no-any-return]
