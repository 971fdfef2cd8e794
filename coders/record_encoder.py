"""Chunk records of floats, encoded by one call of a kernel; why, is said in `record_decoder`.

The plan (joined bits, windows, tables) is made before, by `plan`. Records are those that `encoding` makes block by block,
byte for byte: that is tested.
"""

import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple, no_type_check

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tzip.coders import huffman, planes, rans_avx2, rans_avx512, rans_portable, rows, sums
from tzip.coders.arrays import I64, U8, U16, U32, U64, Words
from tzip.coders.huffman import HuffmanTable, encode_codes, encode_pairs
from tzip.coders.jit import AVX2, AVX512, kernel, ready, stamp, tier
from tzip.coders.planes import Split, Window, byte_of, split_4, split_5, split_6, split_7, split_8
from tzip.coders.rans import LANES, NARROW, RansTable
from tzip.coders.rans_avx2 import encode as encode_ymm
from tzip.coders.rans_avx512 import encode_narrow, encode_wide
from tzip.coders.rans_portable import encode as encode_scalar
from tzip.coders.record_planner import CODES, NARROW_KEYS, PAIRS, SCALAR, WIDE_KEYS, YMM, Planned
from tzip.coders.scratch import recycle
from tzip.coders.sums import KEYS, STRIPE, sum_of

_GROUP = 1 << 18
_SEGMENTS = 16
_CELL = 256  # elements, the most that a cell of rests has
_ESCAPES = 8192


class KeyCoding(NamedTuple):
    """How the keys of a group are coded; `shared`: by the table of the group before."""

    window: Window
    table: RansTable | HuffmanTable
    shared: bool
    segments: int


class _Room(threading.local):
    """Scratch memory of a thread."""

    def __init__(self) -> None:
        self.coded = np.empty(_GROUP + _CELL, np.uint8)
        self.packed = np.empty(4 * (_GROUP + _CELL), np.uint8)
        self.stream = np.empty(max(2 * (_GROUP + 64 * _SEGMENTS + 128 * _SEGMENTS), 11 * _GROUP // 8 + 1024), np.uint8)
        self.words = self.stream[: self.stream.size // 2 * 2].view(np.uint16)
        self.states = np.empty(_SEGMENTS * LANES, np.uint32)
        self.lanes = np.empty(4 * LANES, np.uint32)
        self.integers = np.empty(256, np.int64)
        self.places = np.empty((3, _SEGMENTS), np.int64)
        self.escapes = np.empty(_GROUP + _CELL, np.uint32)
        self.lengths = np.empty(_SEGMENTS * LANES, np.uint16)
        self.stripe = np.empty(STRIPE, np.uint8)


_room = _Room()
_NOTHING: U8 = np.zeros(0, np.uint8)
_NO_LENGTHS: I64 = np.zeros((1, 1), np.int64)


def encode_record(
    head: bytes, words: Words, split: Split, size: int, joined: int, signs: int, keys: Sequence[KeyCoding]
) -> tuple[U8, int] | None:
    """Return the chunk record of elements and the bytes of its payloads, rests and lower bytes stored raw.

    `head`: its first 48 bytes, without check and length. Groups have `size` elements but the last; `keys` of each.
    `signs`: 0, or 1 or 2 when all signs are 0 or 1, and not stored. None when the tables of the groups do not suit one kernel.
    """
    fields = split.head
    if fields is None or split.width not in (2, 4):
        return None
    bits = fields.mantissa - joined + (signs == 0)
    tables = [key.table for key in keys]
    kind = _kind(tables)
    most = max(key.segments for key in keys)
    if kind is None or not 4 <= bits <= 8 or len(keys) > 4 or most > _SEGMENTS:
        return None
    numbered: list[RansTable | HuffmanTable] = []
    plan = np.zeros((len(keys), 8), np.int64)
    windows = np.empty((len(keys), 8), np.uint16)
    stored = b""
    mask = (1 << (fields.exponent + joined)) - 1
    for i, (window, table, shared, segments) in enumerate(keys):
        if not numbered or numbered[-1] is not table:
            numbered.append(table)
        own = b"" if shared else table.stored
        plan[i] = segments, len(numbered) - 1, shared, len(stored), len(own), window.base, table.filler, table.lowest
        stored += own
        null = 0 if window.zero else window.instead
        add = (window.low - window.base) & 0xFFFF
        span = window.high - window.low
        windows[i] = fields.mantissa - joined, mask, window.low, span, add, window.instead, null, window.zero
    look_up, lengths = _look_up(kind, numbered), _lengths(kind, numbered)
    tables_ = np.frombuffer(bytearray(stored), np.uint8) if stored else _NOTHING
    return _encode(head, words, bits, size, joined, signs, kind, plan, windows, look_up, lengths, tables_)


def encode_planned(
    head: bytes, words: Words, split: Split, size: int, joined: int, planned: Planned
) -> tuple[U8, int] | None:
    """Do what `encode_record` does, as it was planned; None also for what one kernel cannot code."""
    fields, signs = split.head, planned.survey.signs[0]
    bits = fields.mantissa - joined + (signs == 0) if fields is not None else 0
    if planned.kind is None or not 4 <= bits <= 8:
        return None
    kind, lengths = planned.kind, planned.lengths if planned.kind == CODES else _NO_LENGTHS
    rows = (planned.plan, planned.windows, planned.look_up, lengths, planned.stored)
    return _encode(head, words, bits, size, joined, signs, kind, *rows)


def _encode(
    head: bytes, words: Words, bits: int, size: int, joined: int, signs: int, kind: int, plan: I64, windows: U16,
    look_up: Words, lengths: I64, stored: U8,
) -> tuple[U8, int] | None:  # fmt: skip
    words = words.view()
    words.flags.writeable = False  # kernels are compiled for the one or the other
    room = len(head) + 16 * len(plan) * words.itemsize + words.nbytes * 9 // 8 + 65536
    record = recycle(room)
    record[: len(head)] = np.frombuffer(head, np.uint8)
    r = _room
    function = _kernel(kind, words.itemsize, bits)
    arguments = (
        words, np.zeros(_CELL, words.dtype), size, joined, signs, plan, windows, look_up, lengths,
        rans_avx2.gatherings() if kind == YMM else _NOTHING, stored, len(head), r.coded, r.packed, r.stream, r.words,
        r.states, r.lanes, r.integers, r.places, r.escapes, r.lengths, r.stripe, KEYS, record,
    )  # fmt: skip
    if not ready(function, arguments, words.nbytes):
        return None
    length = function(*arguments)
    return (record[:length], int(r.integers[32])) if length else None


def _kind(tables: Sequence[RansTable | HuffmanTable]) -> int | None:
    if all(isinstance(table, HuffmanTable) for table in tables):
        return PAIRS if all(table.pairs.size for table in tables if isinstance(table, HuffmanTable)) else CODES
    if not all(isinstance(table, RansTable) for table in tables):
        return None
    level = tier()
    if level != AVX512:
        return YMM if level == AVX2 else SCALAR
    return NARROW_KEYS if all(table.highest - table.lowest < NARROW for table in tables) else WIDE_KEYS


def _look_up(kind: int, tables: Sequence[Any]) -> Any:
    """Return what the kernel of that kind looks the bytes up in, one row a table."""
    names = {NARROW_KEYS: "encoders", WIDE_KEYS: "wide_encoders", YMM: "divisors", SCALAR: "wide_divisors", PAIRS: "pairs"}
    return np.stack([getattr(table, names.get(kind, "codes")) for table in tables])


def _lengths(kind: int, tables: Sequence[Any]) -> I64:
    return np.stack([table.lengths for table in tables]) if kind == CODES else _NO_LENGTHS


@intrinsic
@no_type_check
def copy_bytes(typingctx, source, at, n, target, to):
    """Copy n bytes from source[at …] to target[to …]. numba's own copy of a slice goes byte by byte (45 MB: 5 milliseconds)."""

    def codegen(context, builder, signature, args):
        source, target = (context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 3))
        cgutils.raw_memcpy(builder, builder.gep(target, [args[4]]), builder.gep(source, [args[1]]), args[2], 1)
        return context.get_dummy_value()

    return types.void(source, types.int64, types.int64, target, types.int64), codegen


@kernel
@no_type_check
def write32(record: U8, at: int, value: int) -> None:
    """Needs: at + 4 <= record.size."""
    for k in range(4):
        record[at + k] = np.uint8((value >> (8 * k)) & 255)


@kernel
@no_type_check
def place_payload(record: U8, at: int, stored: int) -> int:
    """Fill up to where a payload of `stored` bytes starts behind byte `at`, and return that; 0 when there is no room."""
    start = (at + 127) // 128 * 128 if stored >= 16384 else (at + 15) // 16 * 16
    if start + stored + 16 > record.size:
        return 0
    for k in range(at, start):
        record[k] = np.uint8(0)
    return start


@cache
def _stamp() -> int:
    return stamp(huffman, planes, rans_avx2, rans_avx512, rans_portable, rows, sums)


@cache
def _kernel(kind: int, width: int, bits: int) -> Callable[..., int]:
    return _make(_stamp(), kind, width, bits)


def _make(stamp: int, kind: int, width: int, bits: int) -> Callable[..., int]:
    """Make the kernel for one kind of keys, elements of `width` bytes and rests of `bits` bits."""

    @kernel
    @no_type_check
    def encode(
        words: Words, last: Words, group: int, joined: int, signs: int, plan: I64, windows: U16, look_up: Words,
        bit_lengths: I64, gathering: U8, stored_tables: U8, entries: int, coded: U8, packed: U8, stream: U8, stream_words: U16,
        states: U32, lanes: U32, integers: I64, places: I64, escapes: U32, lengths: U16, stripe: U8, sum_keys: U64, record: U8,
    ) -> int:
        """Fill `record`; return its length, or 0 when there is no room, and leave the bytes of all payloads in integers[32].

        Needs: entries.size bytes of the head in `record`; plan and windows as `encode_record` makes them, all symbols in the
        tables; last (256,), zero; a `_Room`.
        """  # fmt: skip
        if stamp < 0:
            return 0
        n = words.size
        groups = plan.shape[0]
        lane = integers[:12]
        sizes = integers[16:24]
        cell = 256 if bits & 1 else 32 if bits == 8 else 64 if bits == 4 else 128
        at = entries + 16 * groups * width
        for k in range(entries, at):
            record[k] = np.uint8(0)
        payloads = 0
        packed_at = 0
        for i in range(groups):
            begin = i * group
            m = min(group, n - begin)
            part = words[begin : begin + m]
            segments = plan[i, 0]
            table = look_up[plan[i, 1]]
            fields = windows[i]
            whole = m // cell * cell
            sizes[i] = m if bits == 8 else (m + cell - 1) // cell * cell * bits // 8
            found = 0
            for turn in range(2):
                # Behind the whole cells one that is filled up with zeros, whose escapes do not count.
                if turn == 0:
                    source = part
                    count = whole
                    to = 0
                else:
                    source = last
                    count = cell
                    to = whole
                    if whole == m:
                        break
                    for k in range(m - whole):
                        last[k] = part[whole + k]
                    for k in range(m - whole, cell):
                        last[k] = 0
                symbols = coded[to:]
                rests = packed[packed_at + to * bits // 8 :]
                listed = escapes[found:]
                more = 0
                if bits == 4:
                    more = split_4(source, count, fields, symbols, rests, listed)
                if bits == 5:
                    more = split_5(source, count, fields, symbols, rests, listed)
                if bits == 6:
                    more = split_6(source, count, fields, symbols, rests, listed)
                if bits == 7:
                    more = split_7(source, count, fields, symbols, rests, listed)
                if bits == 8:
                    more = split_8(source, count, fields, symbols, rests, listed)
                for k in range(found, found + more):
                    if turn == 0 or np.int64(escapes[k] & np.uint32(0x3FFFF)) < m - whole:
                        escapes[found] = escapes[k] + np.uint32(to)
                        found += 1
            packed_at += sizes[i]
            segment = (m + 128 * segments - 1) // (128 * segments) * 128
            first = (segments - 1) * segment
            if kind >= 4:
                padded = first + (m - first + 127) // 128 * 128
            else:
                padded = (m + 31) // 32 * 32
            for k in range(m, padded):
                coded[k] = np.uint8(plan[i, 6])
            own = plan[i, 4]
            if kind >= 4:
                if kind == 4:
                    used = encode_pairs(coded[:padded], segment, table, plan[i, 7], stream, lengths)
                else:
                    used = encode_codes(coded[:padded], segment, table, bit_lengths[plan[i, 1]], stream, lengths)
                stored = 4 * found + 64 * segments + own + used
            else:
                room = 2 * (segment + 64)
                left = places[0, :segments]
                ends = places[1, :segments]
                top = places[2, :segments]
                used = 0
                for g in range(segments):
                    top[g] = min(padded, (g + 1) * segment)
                    left[g] = (top[g] - g * segment) // 32
                    ends[g] = (g + 1) * room
                for k in range(32 * segments):
                    states[k] = np.uint32(32768)
                if kind == 0:
                    encode_narrow(coded[:padded], table, stream_words, left, ends, top, states, lanes, lane)
                if kind == 1:
                    encode_wide(coded[:padded], table, stream_words, left, ends, top, states, lanes, lane)
                if kind == 2:
                    encode_ymm(coded[:padded], table, gathering, stream_words, left, ends, top, states, lanes, lane)
                if kind == 3:
                    encode_scalar(coded[:padded], table, stream_words, left, ends, top, states)
                for g in range(segments):
                    used += (g + 1) * room - ends[g]
                stored = 4 * found + 132 * segments + own + used
            start = place_payload(record, at, stored)
            if start == 0:
                return 0
            at = start
            for k in range(found):
                write32(record, at, np.int64(escapes[k]))
                at += 4
            if kind >= 4:
                for k in range(32 * segments):
                    record[at] = np.uint8(lengths[k] & 255)
                    record[at + 1] = np.uint8(lengths[k] >> 8)
                    at += 2
            else:
                for g in range(segments):
                    write32(record, at, ((g + 1) * room - ends[g]) // 2)
                    at += 4
                for k in range(32 * segments):
                    write32(record, at, np.int64(states[k]))
                    at += 4
            copy_bytes(stored_tables, plan[i, 3], own, record, at)
            at += own
            if kind >= 4:
                copy_bytes(stream, 0, used, record, at)
                at += used
            else:
                for g in range(segments):
                    used = (g + 1) * room - ends[g]
                    copy_bytes(stream, ends[g], used, record, at)
                    at += used
            e = entries + 16 * i
            record[e] = np.uint8(3 if kind >= 4 else 4)
            record[e + 1] = np.uint8(joined)
            record[e + 2] = np.uint8(segments)
            record[e + 3] = np.uint8(plan[i, 2])
            write32(record, e + 4, stored)
            write32(record, e + 8, found)
            write32(record, e + 12, plan[i, 5])
            payloads += stored
        packed_at = 0
        for i in range(groups):
            start = place_payload(record, at, sizes[i])
            if start == 0:
                return 0
            at = start + sizes[i]
            copy_bytes(packed, packed_at, sizes[i], record, start)
            packed_at += sizes[i]
            e = entries + 16 * (groups + i)
            record[e + 1] = np.uint8(joined)
            record[e + 3] = np.uint8(2 * signs)
            write32(record, e + 4, sizes[i])
            payloads += sizes[i]
        for p in range(width - 2):
            for i in range(groups):
                part = words[i * group : min(n, (i + 1) * group)]
                start = place_payload(record, at, part.size)
                if start == 0:
                    return 0
                at = start + part.size
                byte_of(part, 8 * (width - 3 - p), record[start:at])
                write32(record, entries + 16 * (groups * (2 + p) + i) + 4, part.size)
                payloads += part.size
        length = (at + 15) // 16 * 16
        for k in range(at, length):
            record[k] = np.uint8(0)
        write32(record, 16, length)
        write32(record, 20, 0)
        check = sum_of(record[16:length], sum_keys, stripe)
        for k in range(8):
            record[8 + k] = np.uint8((check >> np.uint64(8 * k)) & np.uint64(255))
        integers[32] = payloads
        return length

    return encode  # type: ignore[no-any-return]
