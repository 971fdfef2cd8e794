"""Chunk records of floats, decoded by one call of a kernel.

Between two kernels of some microseconds each, Python takes as long as they do, and handing the GIL from thread to thread
takes longer: with a call for every step, two threads decoded 1.3 times as much as one (docs/BENCHMARKS.md). So a record of
the usual form (no transform, keys in one codec, all else raw) is proven and decoded here from its first byte to its last.
Whatever is unusual or wrong is left to `chunks`, which knows all forms and says what is wrong: the two must accept the
same records and give the same bytes, and tests hold them to it.
"""

import threading
from collections.abc import Callable
from functools import cache
from typing import no_type_check

import numpy as np

from tzip.coders import huffman, planes, rans, rans_avx2, rans_avx512, rans_portable, rows, sums, tables
from tzip.coders.arrays import I64, U8, U16, U32, U64, Words
from tzip.coders.huffman import SLOTS, decode_streams, fill_codes, fill_decoders, read_lengths
from tzip.coders.jit import AVX2, AVX512, kernel, ready, stamp, tier
from tzip.coders.planes import WORD, Split, join32, join_heads, put_keys
from tzip.coders.rans import LANES, TOTAL, VECTORS, fill_slots, fill_vectors, open_segments, read_table, sort_bytes
from tzip.coders.rans_avx2 import decode as decode_ymm
from tzip.coders.rans_avx512 import decode_any, decode_narrow
from tzip.coders.rans_portable import decode as decode_scalar
from tzip.coders.registry import HUFFMAN, RANS
from tzip.coders.rows import unpack_1, unpack_2, unpack_3, unpack_4, unpack_5, unpack_6, unpack_7
from tzip.coders.sums import KEYS, STRIPE, closed, stripes, sum_of
from tzip.coders.tables import MAX_SEGMENT, parse_escapes

_NARROW, _ANY, _YMM, _SCALAR, _CODES = range(5)  # what decodes the keys: four kernels of rANS, and Huffman's
_DONE, _LEFT, _WIDE = range(3)  # what a kernel returns: the last is _NARROW's, of a table that only _ANY can use
_GROUP = 1 << 18
_SEGMENTS = 255
_ESCAPES = 8192


class _Room(threading.local):
    """Scratch memory of a thread."""

    def __init__(self) -> None:
        self.rest = np.empty(_GROUP + 256, np.uint8)
        self.seen = self.rest.view()
        self.seen.flags.writeable = False  # as the record is: kernels are compiled for the one or the other
        self.heads = np.empty(_GROUP, np.uint16)
        self.coded = np.empty(_GROUP, np.uint8)
        self.segment = np.empty(MAX_SEGMENT + 128, np.uint8)
        self.states = np.empty(_SEGMENTS * LANES, np.uint32)
        self.places = np.empty((4, _SEGMENTS), np.int64)
        self.lanes = np.empty(4 * LANES, np.uint32)
        self.integers = np.empty(1024 + _SEGMENTS * LANES, np.int64)
        self.fields = np.empty(3, np.uint16)
        self.positions = np.empty(_ESCAPES, np.uint32)
        self.keys = np.empty(_ESCAPES, np.uint16)
        self.stripe = np.empty(STRIPE, np.uint8)
        self.vectors = np.empty(VECTORS, np.uint8)
        self.slots = np.empty(TOTAL, np.uint32)
        self.single = np.empty(SLOTS, np.uint16)
        self.multi = np.empty(SLOTS, np.uint64)
        self.codes = np.empty(256, np.uint32)
        self.wide: set[tuple[int, int]] = set()  # widths of elements and rests that had a table which only _ANY can use


_room = _Room()
_NOTHING: U8 = np.zeros(0, np.uint8)


def decode_record(
    buffer: U8, length: int, check: int, entries: int, split: Split, elements: int, size: int, joined: int, signs: int,
    codec: int, decoded_sum: int, out: U8,
) -> bool:  # fmt: skip
    """Decode the chunk record buffer[:length] into `out` when it has the usual form and all is right; else return False.

    `check`: the bare one. Block entries begin at byte `entries`; groups have `size` elements but the last. `joined`, `signs`
    and `codec`: those of the entries, which must all have them. When this returns False `out` is unspecified.
    Needs: a length of 48 or more, SLACK bytes behind it; `elements` of the split's width in `out`, group_size(elements).
    """
    head = split.head
    bits = head.mantissa - joined + (signs == 0) if head is not None else 0
    if head is None or split.width not in (2, 4) or joined not in head.joined or not 1 <= bits <= 8 or signs > 2:
        return False
    if codec == HUFFMAN:
        kind = _CODES
    elif codec == RANS:
        kind = {AVX512: _NARROW, AVX2: _YMM}.get(tier(), _SCALAR)
    else:
        return False
    # Of more elements than that, odd ones have a group for themselves that is decoded step by step.
    if out.ctypes.data % split.width or (kind != _CODES and elements % LANES):
        return False
    words = out.view(WORD[split.width])
    r = _room
    spread = rans_avx2.spreads() if kind == _YMM else _NOTHING
    if kind == _NARROW and (split.width, bits) in r.wide:
        kind = _ANY
    while True:
        function = _kernel(kind, split.width, bits)
        arguments = (
            buffer, length, np.uint64(check), entries, size, joined, head.mantissa - joined, signs,
            head.exponent + joined, np.uint64(decoded_sum), spread, r.rest, r.seen, r.heads, r.coded, r.segment, r.states,
            r.places, r.lanes, r.integers, r.fields, r.positions, r.keys, r.stripe, r.vectors, r.slots, r.single, r.multi,
            r.codes, KEYS, words, out,
        )  # fmt: skip
        if not ready(function, arguments, out.nbytes):
            return False
        status = function(*arguments)
        if status != _WIDE:
            return bool(status == _DONE)
        r.wide.add((split.width, bits))
        kind = _ANY


@kernel
@no_type_check
def _read32(buffer: U8, at: int) -> int:
    """Needs: at + 4 <= buffer.size."""
    low = np.int64(buffer[at]) | np.int64(buffer[at + 1]) << 8
    return low | np.int64(buffer[at + 2]) << 16 | np.int64(buffer[at + 3]) << 24


@cache
def _stamp() -> int:
    return stamp(huffman, planes, rans, rans_avx2, rans_avx512, rans_portable, rows, sums, tables)


@cache
def _kernel(kind: int, width: int, bits: int) -> Callable[..., int]:
    return _make(_stamp(), kind, width, bits)


def _make(stamp: int, kind: int, width: int, bits: int) -> Callable[..., int]:
    """Make the kernel for one kind of keys, elements of `width` bytes and rests of `bits` bits."""

    @kernel
    @no_type_check
    def decode(
        buffer: U8, length: int, check: np.uint64, entries: int, group: int, joined: int, low: int, signs: int,
        key_bits: int, decoded: np.uint64, spread: U8, rest_room: U8, rest_seen: U8, head_room: U16, coded: U8, part: U8,
        states: U32, places: I64, lanes: U32, integers: I64, fields: U16, positions: U32, keys: U16, stripe: U8,
        vectors: U8, slots: U32, single: U16, multi: U64, codes: U32, sum_keys: U64, out: Words, raw: U8,
    ) -> int:
        """Return _DONE, _LEFT or _WIDE.

        Needs: what `decode_record` proves; a `_Room`; raw is out, rest_seen is rest_room.
        """  # fmt: skip
        if stamp < 0:
            return 1
        if sum_of(buffer[16:length], sum_keys, stripe) != check:
            return 1
        n = out.size
        groups = (n + group - 1) // group
        blocks = groups * width  # of keys, of rests, and of each byte below them: group by group, plane after plane
        values = integers[:3]
        lane = integers[16:28]
        starts = integers[32:64]
        stops = integers[64:96]
        freq = integers[256:512]
        order = integers[512:768]
        lengths = integers[1024:]
        at = entries + 16 * blocks
        if at > length or blocks > 32:
            return 1
        for i in range(blocks):
            e = entries + 16 * i
            m = min(group, n - i % groups * group)
            stored = _read32(buffer, e + 4)
            escapes = _read32(buffer, e + 8)
            if i < groups:
                segments = np.int64(buffer[e + 2])
                if buffer[e] != (3 if kind == 4 else 4) or buffer[e + 1] != joined or buffer[e + 3] > 1 or segments == 0:
                    return 1
                segment = (m + 128 * segments - 1) // (128 * segments) * 128
                if segment > 131072 or (segments - 1) * segment >= m or escapes > min(m, 8192) or 4 * escapes > stored:
                    return 1
                if buffer[e + 14] | buffer[e + 15]:
                    return 1
            else:
                wanted = m  # raw bytes, or whole cells of narrower rests
                if i < 2 * groups and bits < 8:
                    cell = 256 if bits & 1 else 64 if bits == 4 else 128
                    wanted = (m + cell - 1) // cell * cell * bits // 8
                in_head = i < 2 * groups
                if buffer[e + 1] != (joined if in_head else 0) or buffer[e + 3] != (2 * signs if in_head else 0):
                    return 1
                if buffer[e] | buffer[e + 2] or escapes or _read32(buffer, e + 12) or stored != wanted:
                    return 1
            starts[i] = (at + 127) // 128 * 128 if stored >= 16384 else (at + 15) // 16 * 16
            stops[i] = starts[i] + stored
            if stops[i] > length:
                return 1
            for k in range(at, starts[i]):
                if buffer[k]:
                    return 1
            at = stops[i]
        if (at + 15) // 16 * 16 != length:
            return 1
        for k in range(at, length):
            if buffer[k]:
                return 1
        total = np.uint64(0)
        have = False
        highest = 0
        narrow = 0
        for i in range(groups):
            begin = i * group
            m = min(group, n - begin)
            e = entries + 16 * i
            segments = np.int64(buffer[e + 2])
            escapes = _read32(buffer, e + 8)
            value = _read32(buffer, e + 12)
            counts = starts[i] + 4 * escapes
            words = counts + (64 if kind == 4 else 132) * segments
            stop = stops[i]
            if words > stop:
                return 1
            if buffer[e + 3] == 0:
                freq[:] = 0
                if kind == 4:
                    size = read_lengths(buffer[words:stop], freq)
                else:
                    size = read_table(buffer[words:stop], freq)
                if size <= 0:
                    return 1
                words += size
                for byte in range(256):
                    if freq[byte] > 0:
                        highest = byte
                if kind == 4:
                    codes[:] = 0
                    fill_codes(freq, codes)
                    fill_decoders(codes, freq, single, multi)
                else:
                    used = sort_bytes(freq, order)
                    if kind <= 1:
                        narrow = fill_vectors(freq, order[:used], vectors)
                        if kind == 0 and narrow == 0:
                            return 2
                    if kind > 1 or (kind == 1 and narrow == 0):
                        fill_slots(freq, order[:used], slots)
                have = True
            elif not have:
                return 1
            if key_bits <= 8:
                if value != 0 or highest >> key_bits:
                    return 1
            elif highest > 254 or (value + highest) >> key_bits:
                return 1
            if width == 2:
                heads = out[begin : begin + m]
            else:
                heads = head_room[:m]
            packed = buffer[starts[groups + i] : stops[groups + i]]
            if bits == 8:
                rest = packed
            else:
                rest = rest_seen[:m]
            if bits == 1:
                unpack_1(packed, (m + 255) // 256, rest_room)
            if bits == 2:
                unpack_2(packed, (m + 127) // 128, rest_room)
            if bits == 3:
                unpack_3(packed, (m + 255) // 256, rest_room)
            if bits == 4:
                unpack_4(packed, (m + 63) // 64, rest_room)
            if bits == 5:
                unpack_5(packed, (m + 255) // 256, rest_room)
            if bits == 6:
                unpack_6(packed, (m + 127) // 128, rest_room)
            if bits == 7:
                unpack_7(packed, (m + 255) // 256, rest_room)
            fields[0] = value
            fields[1] = low
            fields[2] = 0x8000 if signs == 2 else 0
            if kind == 4:
                used = words
                for k in range(32 * segments):
                    lengths[k] = np.int64(buffer[counts + 2 * k]) | np.int64(buffer[counts + 2 * k + 1]) << 8
                    used += lengths[k]
                segment = (m + 128 * segments - 1) // (128 * segments) * 128
                if used != stop:
                    return 1
                if decode_streams(buffer, words, lengths, single, multi, segment, coded[:m], part) != 0:
                    return 1
                join_heads(coded[:m], rest, fields, heads)
            else:
                if open_segments(buffer, counts, words, stop, m, segments, states, places) != 0:
                    return 1
                left = places[0, :segments]
                place = places[1, :segments]
                symbol = places[3, :segments]
                for k in range(3):
                    values[k] = np.int64(fields[k])
                if kind == 0 or (kind == 1 and narrow != 0):
                    decode_narrow(buffer, vectors, left, place, symbol, states, rest, values, heads, lanes, lane)
                if kind == 1 and narrow == 0:
                    decode_any(buffer, slots, left, place, symbol, states, rest, values, heads, lanes, lane)
                if kind == 2:
                    decode_ymm(buffer, slots, spread, left, place, symbol, states, rest, values, heads, lanes, lane)
                if kind == 3:
                    decode_scalar(buffer, slots, left, place, symbol, states, coded[:m])
                    join_heads(coded[:m], rest, fields, heads)
                for k in range(segments):
                    if left[k] != 0 or place[k] != places[2, k]:
                        return 1
                for k in range(32 * segments):
                    if states[k] != np.uint32(32768):
                        return 1
            if escapes > 0:
                listed = buffer[starts[i] : counts]
                if parse_escapes(listed, m, key_bits, positions[:escapes], keys[:escapes]) == 0:
                    return 1
                put_keys(heads, low, positions[:escapes], keys[:escapes])
            if width == 4:
                high = starts[2 * groups + i]
                last = starts[3 * groups + i]
                join32(heads, buffer[high : high + m], buffer[last : last + m], out[begin : begin + m])
            whole = raw[begin * width : (begin + m) * width]
            total += stripes(whole, begin * width // 4096, m * width // 4096, sum_keys)
        return 0 if closed(total, n * width // 4096, raw, sum_keys, stripe) == decoded else 1

    return decode  # type: ignore[no-any-return]
