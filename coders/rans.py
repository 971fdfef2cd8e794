"""Codec 4: static rANS with 32 interleaved states (FORMAT.md, section 7.6).

Source: J. Duda, "Asymmetric numeral systems", arXiv:1311.2540; interleaving and 16-bit renormalisation after F. Giesen,
"Interleaved entropy coders", arXiv:1402.3392. Position p belongs to state p mod 32, so a warp, or a vector unit, decodes
32 symbols a step, and the renormalisation words of a step lie in lane order. Here: tables, and the proof that a stream
ends as it should; whole rows are coded by rans_avx512.py, rans_avx2.py or rans_portable.py.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import no_type_check

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tzip.coders import rans_avx2, rans_avx512, rans_portable
from tzip.coders.arrays import I64, U8, U16, U32, U64, Words
from tzip.coders.errors import CorruptError, TruncatedError
from tzip.coders.jit import AVX2, AVX512, kernel, quick_kernel, tier
from tzip.coders.planes import join
from tzip.coders.scratch import borrow, recycle
from tzip.coders.tables import segment_size

LANES = 32
PROB_BITS = 12
TOTAL = 1 << PROB_BITS
_NO_REST: U8 = np.empty(0, np.uint8)
_NO_SLOTS: U32 = np.zeros(0, np.uint32)
NARROW = 128  # tables over at most so many bytes decode fastest
VECTORS = 3 * 256 + 5 * NARROW  # bytes of what they are looked up in
MANY = 64  # rows; fewer are not worth loading one more kernel


@dataclass(frozen=True, eq=False)
class RansTable:
    """Frequencies, shape (256,), that add up to 4096; 0 where a byte does not occur."""

    freq: I64

    @cached_property
    def stored(self) -> bytes:
        """The table as the format stores it, of even length, in the shortest of its three forms."""
        table = np.zeros(self.size, np.uint8)
        write_table(self.freq, np.array(self._facts), table)
        return table.tobytes()

    @cached_property
    def _facts(self) -> list[int]:
        """The smallest and the largest byte with a frequency, and the bytes of the three forms: dense, sparse, short."""
        facts = np.empty(5, np.int64)
        measure_table(self.freq, facts)
        found: list[int] = facts.tolist()
        return found

    @property
    def lowest(self) -> int:
        """The smallest byte with a frequency."""
        return self._facts[0]

    @property
    def highest(self) -> int:
        """The largest byte with a frequency."""
        return self._facts[1]

    @property
    def size(self) -> int:
        """Bytes of the stored table."""
        return min(self._facts[2:])

    @classmethod
    def read(cls, payload: U8) -> "tuple[RansTable, int]":
        """Return the table that `payload` starts with and its size in bytes; raises Corrupt- or TruncatedError."""
        freq = np.zeros(256, np.int64)
        size = int(read_table(payload, freq))
        if size < 0:
            raise TruncatedError("rans: payload ends within the table")
        if not size:
            begin = payload[:2].tolist()
            raise CorruptError(f"rans: bytes {begin} begin no table of two or more bytes, or rubbish follows")
        return cls(freq), size

    @cached_property
    def order(self) -> I64:
        """The bytes with a frequency, by descending frequency, then ascending."""
        order = np.empty(256, np.int64)
        return order[: int(sort_bytes(self.freq, order))]

    @cached_property
    def slots(self) -> U32:
        """Frequency << 20 | rank << 8 | byte for each of the 4096 slots."""
        slots = np.empty(TOTAL, np.uint32)
        fill_slots(self.freq, self.order, slots)
        return slots

    @cached_property
    def vectors(self) -> U8:
        """What the AVX-512 decoder looks up, see rans_avx512.py; of size 0 when the table does not suit it.

        They serve at most 128 bytes of which those rarer than 16 have at most 256 slots.
        """
        vectors = np.empty(VECTORS, np.uint8)
        return vectors if fill_vectors(self.freq, self.order, vectors) else np.empty(0, np.uint8)

    @cached_property
    def encoders(self) -> U8:
        """What the AVX-512 encoder looks up, K bytes each: frequency (low, high), start (low, high); the lowest byte."""
        return self._encoders(NARROW) if self.highest - self.lowest < NARROW else self.wide_encoders

    @cached_property
    def wide_encoders(self) -> U8:
        """`encoders` with K = 256."""
        return self._encoders(256)

    def _encoders(self, count: int) -> U8:
        encoders = np.zeros(4 * count + 1, np.uint8)
        fill_encoders(self.freq, self.order, self.lowest, encoders)
        return encoders

    @property
    def filler(self) -> int:
        """The byte that rows are filled up with."""
        return int(self.order[0])

    @cached_property
    def divisors(self) -> U64:
        """What the AVX2 encoder looks up by byte, see rans_avx2.py."""
        divisors = np.zeros(256, np.uint64)
        rans_avx2.fill_divisors(self.freq, self.order, divisors)
        return divisors

    @cached_property
    def wide_divisors(self) -> U64:
        """What the portable encoder looks up by byte, see rans_portable.py."""
        divisors = np.zeros(512, np.uint64)
        rans_portable.fill_divisors(self.freq, self.order, divisors)
        return divisors


def encode(symbols: U8, table: RansTable, shared: bool, segments: int, escapes: U32) -> list[bytes | U8]:
    """Return the payload of `symbols`, shape (n,), n >= 1, all of which have a frequency in `table`, in pieces."""
    n, segment = symbols.size, segment_size(symbols.size, segments)
    padded = symbols
    if n % LANES:
        padded = borrow("padded", -(-n // LANES) * LANES)
        padded[:n] = symbols
        padded[n:] = table.filler
    # Words go downwards from the end of each segment's own room: a row may write 32 in vain below its own, and 32 more.
    room = 2 * (segment + 64)
    stored = recycle(segments * room)
    words = stored.view(np.uint16)
    places = np.empty((3, segments), np.int64)
    states = np.empty(segments * LANES, np.uint32)
    _begin(padded.size, segment, places, states)
    left, first, top = places
    if tier() == AVX512:
        work = rans_avx512.encode_narrow if table.encoders.size == 4 * NARROW + 1 else rans_avx512.encode_wide
        lanes, lane = np.empty(4 * LANES, np.uint32), np.empty(12, np.int64)
        work(padded, table.encoders, words, left, first, top, states, lanes, lane)
    elif tier() == AVX2:
        gathering, lanes, lane = rans_avx2.gatherings(), np.empty(2 * LANES, np.uint32), np.empty(6, np.int64)
        rans_avx2.encode(padded, table.divisors, gathering, words, left, first, top, states, lanes, lane)
    else:
        rans_portable.encode(padded, table.wide_divisors, words, left, first, top, states)
    ends = range(room, room * segments + 1, room)
    streams = [stored[a:b] for a, b in zip(first.tolist(), ends, strict=True)]
    counts = np.array([s.size // 2 for s in streams], np.uint32)
    head = escapes.tobytes() + counts.tobytes() + states.tobytes()
    return [head if shared else head + table.stored, *streams]


@dataclass(eq=False, slots=True)
class Stream:
    """A block of n symbols that is being decoded, segment by segment.

    Shape (segments,): the whole rows of 32 `left`, the byte `at` which the next word stands and `end` where the words end,
    the next `symbol`. Shape (32 segments,): states.
    """

    table: RansTable
    n: int
    segment: int
    states: U32
    left: I64
    at: I64
    end: I64
    symbol: I64


def open_stream(
    buffer: U8, start: int, stop: int, escapes: int, segments: int, shared: RansTable | None, n: int
) -> Stream:
    """Open the block of n symbols whose payload is buffer[start:stop] and begins with `escapes` escapes.

    Raises CorruptError or TruncatedError. Needs: segments as tables.segment_size proves them.
    """
    segment = segment_size(n, segments)
    counts = start + 4 * escapes
    words = counts + 4 * segments * (1 + LANES)
    if words > stop:
        raise TruncatedError("rans: payload ends within the states")
    table = shared
    if table is None:
        table, size = RansTable.read(buffer[words:stop])
        words += size
    states = np.empty(segments * LANES, np.uint32)
    fields = np.empty((4, segments), np.int64)
    status = open_segments(buffer, counts, words, stop, n, segments, states, fields)
    if status == 1:
        raise CorruptError(f"rans: the counts of words do not fit the {stop - words} bytes")
    if status == 2:
        raise CorruptError("rans: a first state is out of range")
    return Stream(table, n, segment, states, *fields)


def decode_bytes(buffer: U8, stream: Stream, out: U8) -> None:
    """Fill `out`, shape (n,), with the symbols of a stream, which is used up.

    Raises CorruptError; `out` is then unspecified.
    """
    _vectors(buffer, stream, _NO_REST, (0, 0, 0), out)
    _finish(buffer, stream, out)


def decode_heads(
    buffer: U8, stream: Stream, rest: U8, low: int, base: int, sign: int, coded: U8, out: U16
) -> None:
    """Decode keys and merge them with their rests, shape (n,), to heads; see planes.join. `coded` is scratch memory.

    Escapes are left to the caller. Raises CorruptError; `out` is then unspecified.
    """
    _vectors(buffer, stream, rest, (base, low, sign), out)
    begins = stream.symbol.tolist()
    _finish(buffer, stream, coded)
    for g, begin in enumerate(begins):
        end = min(stream.n, (g + 1) * stream.segment)
        if begin < end:
            join(coded[begin:end], rest[begin:end], low, base, sign, out[begin:end])


def _vectors(buffer: U8, stream: Stream, rest: U8, fields: tuple[int, int, int], out: U8 | U16) -> None:
    """Decode whole rows by vectors, where the CPU has them."""
    s, values = stream, np.array(fields)
    if tier() == AVX512:
        suits = s.table.vectors.size > 0
        rows = rans_avx512.decode_narrow if suits else rans_avx512.decode_any
        tables: Words = s.table.vectors if suits else s.table.slots
        lanes, lane = np.empty(4 * LANES, np.uint32), np.empty(12, np.int64)
        rows(buffer, tables, s.left, s.at, s.symbol, s.states, rest, values, out, lanes, lane)
    elif tier() == AVX2:
        spread, lanes, lane = rans_avx2.spreads(), np.empty(2 * LANES, np.uint32), np.empty(6, np.int64)
        slots = s.table.slots
        rans_avx2.decode(buffer, slots, spread, s.left, s.at, s.symbol, s.states, rest, values, out, lanes, lane)


def _finish(buffer: U8, stream: Stream, out: U8) -> None:
    """Decode what is left, and prove that every segment ends as it should."""
    s = stream
    left = int(s.left.sum())
    if left >= MANY:  # no vectors; or a segment near the end of the buffer has stopped its neighbours
        rans_portable.decode(buffer, s.table.slots, s.left, s.at, s.symbol, s.states, out)
    slots = s.table.slots if left or s.symbol[-1] < s.n else _NO_SLOTS
    bad = decode_rest(buffer, s.at, s.end, s.symbol, s.states, slots, s.segment, s.n, out)
    if bad:
        raise CorruptError(f"rans: segment {bad - 1} does not end where its words do")


@intrinsic
@no_type_check
def _load16(typingctx, array, offset):
    """Two bytes of a uint8 array at any byte offset, as uint16; no bounds check."""

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        word = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(16).as_pointer())
        return builder.load(word, align=1)

    return types.uint16(array, types.int64), codegen


@intrinsic
@no_type_check
def _load32(typingctx, array, offset):
    """Four bytes of a uint8 array at any byte offset, as uint32; no bounds check."""

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        word = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(32).as_pointer())
        return builder.load(word, align=1)

    return types.uint32(array, types.int64), codegen


@quick_kernel
@no_type_check
def read_table(payload: U8, freq: I64) -> int:
    """Return the bytes of the table that `payload` starts with, -1 when it ends within the table, 0 when it has none.

    Needs: freq (256,), zero. It is unspecified when there is no table.
    """
    if payload.size < 2:
        return -1
    first = np.int64(payload[0])
    second = np.int64(payload[1])
    if first == second:
        size = _read_short(payload, first, freq)
    elif first < second:
        size = _read_entries(payload, 2, first, second, False, freq)
        if size > 0 and freq[first] == 0:
            size = 0
    else:
        size = _read_entries(payload, 2 + (first - second + 8) // 8, second, first, True, freq)
    used = 0
    total = 0
    for byte in range(256):
        used += 1 if freq[byte] > 0 else 0
        total += freq[byte]
    hi = max(first, second)
    if size > 0 and (total != 4096 or used < 2 or freq[hi] == 0):
        size = 0
    return size


@quick_kernel
@no_type_check
def _read_entries(payload: U8, start: int, lo: int, hi: int, listed: bool, freq: I64) -> int:
    """Read 12 bits for each byte lo … hi from byte `start` on; with `listed` only for those whose bits are set from byte 2 on.

    Returns the bytes of the table, -1 when the payload ends within it, 0 when it is none.
    """
    if start > payload.size:
        return -1
    count = hi - lo + 1
    if listed:
        count = 0
        for i in range(8 * (start - 2)):
            if (payload[2 + (i >> 3)] >> (i & 7)) & 1:
                count += 1
                if i > hi - lo:
                    return 0
    size = start + (12 * count + 7 >> 3)
    size += size & 1
    if size > payload.size:
        return -1
    at = 0
    for i in range(hi - lo + 1):
        if listed and (payload[2 + (i >> 3)] >> (i & 7)) & 1 == 0:
            if i == 0 or i == hi - lo:
                return 0
            continue
        k = start + (at >> 3)
        f = ((np.int64(payload[k]) | (np.int64(payload[k + 1]) << 8)) >> (at & 7)) & 4095
        if listed and f == 0:
            return 0
        freq[lo + i] = f
        at += 12
    for bit in range(at, 8 * (size - start)):
        if (payload[start + (bit >> 3)] >> (bit & 7)) & 1:
            return 0
    return size


@quick_kernel
@no_type_check
def measure_table(freq: I64, facts: I64) -> None:
    """Needs: freq (256,) with one or more not 0, up to 4096; facts (5,)."""
    lo = 256
    hi = 0
    used = 0
    bits = 0
    for byte in range(256):
        f = freq[byte]
        if f > 0:
            lo = min(lo, byte)
            for gap in range(hi, byte):
                bits += 1 if freq[gap] == 0 else 0
            more = 0
            while (f + 1) >> (more + 1) > 0:
                more += 1
            bits += 2 * more + 1
            hi = byte
            used += 1
    dense = 2 + (12 * (hi - lo + 1) + 7) // 8
    sparse = 2 + (hi - lo + 8) // 8 + (12 * used + 7) // 8
    facts[0] = lo
    facts[1] = hi
    facts[2] = dense + dense % 2
    facts[3] = sparse + sparse % 2
    facts[4] = 2 + (bits + 15) // 16 * 2


@quick_kernel
@no_type_check
def sort_bytes(freq: I64, order: I64) -> int:
    """Fill `order` with the bytes that have a frequency, by descending frequency, then ascending; return their number.

    Needs: freq and order (256,).
    """
    count = 0
    for byte in range(256):
        f = freq[byte]
        if f > 0:
            i = count
            while i > 0 and freq[order[i - 1]] < f:
                order[i] = order[i - 1]
                i -= 1
            order[i] = byte
            count += 1
    return count


@quick_kernel
@no_type_check
def write_table(freq: I64, facts: I64, table: U8) -> int:
    """Write a table in the shortest of its three forms; return its bytes. Needs: facts of `measure_table`; room, zero."""
    lo = facts[0]
    hi = facts[1]
    if facts[4] < min(facts[2], facts[3]):
        _write_short(freq, hi, table)
        table[0] = np.uint8(hi)
        table[1] = np.uint8(hi)
        return facts[4]
    sparse = facts[3] < facts[2]
    at = 16
    if sparse:
        for byte in range(lo, hi + 1):
            if freq[byte] > 0:
                table[2 + ((byte - lo) >> 3)] |= np.uint8(1 << ((byte - lo) & 7))
        at = 16 + (hi - lo + 8) // 8 * 8
    table[0] = np.uint8(hi if sparse else lo)
    table[1] = np.uint8(lo if sparse else hi)
    for byte in range(lo, hi + 1):
        if freq[byte] > 0 or not sparse:
            v = freq[byte] << (at & 7)
            table[at >> 3] |= np.uint8(v & 255)
            table[(at >> 3) + 1] |= np.uint8(v >> 8)
            at += 12
    return facts[3] if sparse else facts[2]


@quick_kernel
@no_type_check
def _write_short(freq: I64, hi: int, out: U8) -> None:
    """Write the gamma codes of frequency + 1 from byte 2 on: as many zeros as bits follow the top one, then all bits, the
    top one first. Bits go from the lowest of a byte up. Needs: out zero and large enough.
    """
    at = 16
    for byte in range(hi + 1):
        v = freq[byte] + 1
        more = 0
        while v >> (more + 1) > 0:
            more += 1
        at += more
        for bit in range(more, -1, -1):
            out[at >> 3] |= np.uint8(((v >> bit) & 1) << (at & 7))
            at += 1


@quick_kernel
@no_type_check
def _read_short(payload: U8, hi: int, freq: I64) -> int:
    """Return the bytes of the table, -1 when the payload ends within it, 0 when it is none.

    Needs: freq (256,), zero; hi < 256.
    """
    end = 8 * payload.size
    at = 16
    for byte in range(hi + 1):
        more = 0
        while at < end and (payload[at >> 3] >> (at & 7)) & 1 == 0:
            more += 1
            at += 1
            if more > 12:
                return 0
        if at + more + 1 > end:
            return -1
        v = 0
        for _ in range(more + 1):
            v = (v << 1) | ((np.int64(payload[at >> 3]) >> (at & 7)) & 1)
            at += 1
        freq[byte] = v - 1
    size = (at + 15) // 16 * 2
    if 8 * size > end:
        return -1
    for i in range(at, 8 * size):
        if (payload[i >> 3] >> (i & 7)) & 1:
            return 0
    return size


@quick_kernel
@no_type_check
def fill_slots(freq: I64, order: I64, slots: U32) -> None:
    """Needs: slots (4096,); the frequencies of the bytes in `order` add up to 4096."""
    at = 0
    for i in range(order.size):
        byte = order[i]
        for rank in range(freq[byte]):
            slots[at] = np.uint32((freq[byte] << 20) | (rank << 8) | byte)
            at += 1


@quick_kernel
@no_type_check
def fill_vectors(freq: I64, order: I64, vectors: U8) -> int:
    """Fill the tables of the AVX-512 decoder; return 0 when they cannot hold these frequencies: they serve at most 128 bytes
    of which those rarer than 16 have at most 256 slots.

    By bucket of 16 slots, 256 bytes each: the place in `order` of the byte of its first slot, and how many of its slots
    come before the next byte. By each of the last 256 slots: the place of its byte. By place, 128 bytes each: frequency
    (low, high), start (low, high), the byte.
    Needs: frequencies of the bytes in `order`, descending, that add up to 4096; vectors (1408,).
    """
    rare = 0
    for i in range(order.size):
        if freq[order[i]] < 16:
            rare += freq[order[i]]
    if order.size > 128 or rare > 256:
        return 0
    vectors[:] = 0
    at = 0
    for i in range(order.size):
        f = freq[order[i]]
        # Slots of this byte: at … at + f - 1.
        for k in range((at + 15) // 16, (at + f + 15) // 16):
            vectors[k] = np.uint8(i)
            vectors[256 + k] = np.uint8(min(16, at + f - 16 * k))
        for slot in range(max(at, 3840), at + f):
            vectors[512 + slot - 3840] = np.uint8(i)
        base = 768 + i
        vectors[base] = np.uint8(f & 255)
        vectors[base + 128] = np.uint8(f >> 8)
        vectors[base + 256] = np.uint8(at & 255)
        vectors[base + 384] = np.uint8(at >> 8)
        vectors[base + 512] = np.uint8(order[i])
        at += f
    return 1


@quick_kernel
@no_type_check
def fill_encoders(freq: I64, order: I64, lo: int, encoders: U8) -> None:
    """Needs: encoders (4 K + 1,), zero; K > byte - lo for all bytes in `order`."""
    count = encoders.size // 4
    start = 0
    for i in range(order.size):
        f = freq[order[i]]
        j = order[i] - lo
        encoders[j] = np.uint8(f & 255)
        encoders[count + j] = np.uint8(f >> 8)
        encoders[2 * count + j] = np.uint8(start & 255)
        encoders[3 * count + j] = np.uint8(start >> 8)
        start += f
    encoders[4 * count] = np.uint8(lo)


@quick_kernel
@no_type_check
def _begin(n: int, segment: int, places: I64, states: U32) -> None:
    """Set the rows left of every segment, the byte where the room for its words ends, and the symbol where it ends.

    Needs: places (3, segments), states (32 segments,).
    """
    for g in range(places.shape[1]):
        places[2, g] = min(n, (g + 1) * segment)
        places[0, g] = (places[2, g] - g * segment) // 32
        places[1, g] = (g + 1) * 2 * (segment + 64)
    for i in range(states.size):
        states[i] = np.uint32(32768)


@quick_kernel
@no_type_check
def open_segments(
    buffer: U8, counts: int, words: int, stop: int, n: int, segments: int, states: U32, fields: I64
) -> int:
    """Read counts and states from byte `counts` on; return 0, 1 (counts do not fit words … stop) or 2 (a bad state).

    Needs: 132 bytes a segment behind `counts`; at least (32 segments,) states and fields (4, segments): left, at, end, symbol.
    """
    segment = (n + 128 * segments - 1) // (128 * segments) * 128
    free = (stop - words) // 2
    for g in range(segments):
        count = np.int64(_load32(buffer, counts + 4 * g))
        fields[0, g] = min(n - g * segment, segment) // 32
        fields[1, g] = words
        words += 2 * count
        fields[2, g] = words
        fields[3, g] = g * segment
        free -= count
        if free < 0:
            return 1
    if words != stop:
        return 1
    first = counts + 4 * segments
    bad = np.uint32(0)
    for i in range(32 * segments):
        x = np.uint32(_load32(buffer, first + 4 * i))
        states[i] = x
        bad |= np.uint32(np.uint32(x - np.uint32(32768)) >= np.uint32(0x7FFF8000))
    return 2 if bad else 0


@kernel
@no_type_check
def _decode_rows(buffer: U8, at: int, stop: int, x: U32, first: int, slots: U32, begin: int, end: int, out: U8) -> int:
    """Decode symbols begin … end - 1 with the states x[first …] and words from byte `at`; return the new `at`, or -1.

    Needs: stop <= buffer.size; slots.size == 4096; end <= out.size.
    """
    low = np.uint32(4095)
    for i in range(begin, end, 32):
        for lane in range(32):
            v = x[first + lane]
            e = slots[np.uint64(v & low)]
            if i + lane < end:
                out[i + lane] = np.uint8(e)
            scaled = np.uint32(np.uint32(e >> np.uint32(20)) * np.uint32(v >> np.uint32(12)))
            v = np.uint32(scaled + np.uint32((e >> np.uint32(8)) & low))
            if v < np.uint32(32768):
                if at + 2 > stop:
                    return -1
                v = np.uint32(np.uint32(v << np.uint32(16)) | np.uint32(_load16(buffer, at)))
                at += 2
            x[first + lane] = v
    return at


@quick_kernel
@no_type_check
def decode_rest(buffer: U8, at: I64, end: I64, symbol: I64, x: U32, slots: U32, segment: int, n: int, out: U8) -> int:
    """Decode what is left of all segments; return 0, or 1 + the number of the first that does not end as it should.

    Needs: at >= 0, end <= buffer.size; x (32 at.size,); segment a multiple of 32; n <= out.size; what `_decode_rows` needs.
    """
    for g in range(at.size):
        stop = min(n, (g + 1) * segment)
        if symbol[g] < stop:
            at[g] = _decode_rows(buffer, at[g], end[g], x, 32 * g, slots, symbol[g], stop, out)
        if at[g] != end[g]:
            return g + 1
        for lane in range(32 * g, 32 * g + 32):
            if x[lane] != np.uint32(32768):
                return g + 1
    return 0
