"""Codec 4: static rANS with 32 interleaved states (FORMAT.md, section 7.6).

Source: J. Duda, "Asymmetric numeral systems", arXiv:1311.2540; interleaving and 16-bit renormalisation after F. Giesen,
"Interleaved entropy coders", arXiv:1402.3392. Position p belongs to state p mod 32, so a warp, or a vector unit,
decodes 32 symbols a step, and the renormalisation words of a step lie in lane order.
"""

from dataclasses import dataclass
from functools import cache
from typing import no_type_check

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tzip.coders.arrays import I64, U8, U16, U32, U64
from tzip.coders.errors import CorruptError, TruncatedError
from tzip.coders.jit import AVX512, kernel, tier
from tzip.coders.tables import read_range, write_range

LANES = 32
PROB_BITS = 12
TOTAL = 1 << PROB_BITS
LOW = 1 << 15  # states rest in [LOW, LOW << 16)
OK, OUT_OF_WORDS, LEFTOVER = 0, 1, 2


@dataclass(frozen=True, slots=True)
class RansTable:
    """Frequencies, shape (256,), that add up to 4096; 0 where a byte does not occur."""

    freq: I64

    def write(self) -> bytes:
        """Return the table as the format stores it, of even length."""
        lo, hi, entries = write_range(self.freq)
        pairs = np.append(entries, 0) if entries.size % 2 else entries
        three = pairs[::2] | (pairs[1::2] << PROB_BITS)
        packed = np.stack((three & 255, (three >> 8) & 255, three >> 16), axis=1).astype(np.uint8).tobytes()
        body = bytes((lo, hi)) + packed[: (12 * entries.size + 7) // 8]
        return body + bytes(len(body) % 2)

    @property
    def size(self) -> int:
        """Bytes of the stored table."""
        used = np.flatnonzero(self.freq)
        return _stored_size(int(used[0]), int(used[-1]))

    @classmethod
    def read(cls, payload: U8) -> "tuple[RansTable, int]":
        """Return the table that `payload` starts with and its size in bytes; raises Corrupt- or TruncatedError."""
        lo, hi = read_range(payload)
        size = _stored_size(lo, hi)
        if payload.size < size:
            raise TruncatedError("rans: payload ends within the table")
        count = hi - lo + 1
        exact = (12 * count + 7) // 8
        packed = np.zeros(-(-exact // 3) * 3, np.int64)
        packed[:exact] = payload[2 : 2 + exact]
        three = packed[::3] | (packed[1::3] << 8) | (packed[2::3] << 16)
        entries = np.stack((three & (TOTAL - 1), three >> PROB_BITS), axis=1).ravel()
        freq = np.zeros(256, np.int64)
        freq[lo : hi + 1] = entries[:count]
        padding = entries[count:].any() or payload[2 + exact : size].any()
        if int(freq.sum()) != TOTAL or not (freq[lo] and freq[hi]) or padding:
            raise CorruptError(f"rans: frequencies of bytes {lo} … {hi} add up to {int(freq.sum())}, or rubbish follows")
        return cls(freq), size

    def slots(self) -> U32:
        """Return frequency << 20 | (slot - start) << 8 | byte for each of the 4096 slots."""
        slots = np.empty(TOTAL, np.uint32)
        _fill_slots(self.freq, slots)
        return slots


def _stored_size(lo: int, hi: int) -> int:
    size = 2 + (12 * (hi - lo + 1) + 7) // 8
    return size + size % 2


@cache
def log2_table() -> I64:
    """Return log2(i) in 1/65536 bits for i = 0 … 4096 (entry 0 is 0), by integers alone."""
    table = np.zeros(TOTAL + 1, np.int64)
    _fill_log2(table)
    return table


def quantize(counts: I64) -> RansTable:
    """Scale byte counts, shape (256,), of which two or more are not 0, to frequencies that add up to 4096.

    A byte that occurs keeps a frequency of at least 1. What rounding leaves goes where it saves, or comes from where
    it costs, the fewest bits; integers only, so that every machine finds the same table.
    """
    freq = np.zeros(256, np.int64)
    _quantize(counts, log2_table(), freq)
    return RansTable(freq)


def cost(counts: I64, freq: I64) -> int:
    """Return the bits (rounded up) that bytes with these counts take under `freq`; absent bytes cost nothing here."""
    return int(_cost(counts, freq, log2_table())) + 65535 >> 16


def encode(symbols: U8, table: RansTable, shared: bool, log_segment: int, escapes: U32) -> bytes:
    """Return the payload of `symbols`, shape (n,), n >= 1, all of which have a frequency in `table`."""
    n, segment = symbols.size, 1 << log_segment
    segments = -(-n // segment)
    padded = symbols
    if n % LANES:
        padded = np.full(-(-n // LANES) * LANES, int(table.freq.argmax()), np.uint8)
        padded[:n] = symbols
    counts = np.zeros(segments, np.uint32)
    states = np.full(segments * LANES, LOW, np.uint32)
    words = np.empty(padded.size + LANES, np.uint16)
    freq = table.freq.astype(np.uint64)
    start = np.cumsum(freq, dtype=np.uint64) - freq
    if tier() == AVX512:
        entries = (freq | start << np.uint64(PROB_BITS)).astype(np.uint32)
        spare = np.empty(min(segment, padded.size) + LANES, np.uint16)
        total = _encode_avx512(padded, segment, entries, words, spare, counts, states)
    else:
        reciprocal = np.uint64(1 << 43) // np.maximum(freq, np.uint64(1)) + np.uint64(1)
        lanes = np.empty((2, LANES), np.uint64)
        total = _encode(padded, segment, freq, start, reciprocal, words, counts, states, lanes[0], lanes[1])
    return b"".join(
        (
            escapes.tobytes(),
            counts.tobytes(),
            states.tobytes(),
            b"" if shared else table.write(),
            memoryview(words[words.size - total :]).cast("B"),
        )
    )


def decode_into(
    buffer: U8, start: int, stop: int, escapes: int, log_segment: int, shared: RansTable | None, out: U8
) -> RansTable:
    """Fill `out`, shape (n,), from the payload buffer[start:stop]; return the table used.

    `escapes` is the number of escapes at the start of the payload, which this skips. Raises CorruptError or
    TruncatedError; `out` is then unspecified.
    """
    n, segment = out.size, 1 << log_segment
    segments = -(-n // segment)
    at = start + 4 * escapes
    head = at + 4 * segments * (1 + LANES)
    if head > stop:
        raise TruncatedError("rans: payload ends within the states")
    heads = np.frombuffer(buffer[at:head].tobytes(), "<u4")
    counts, states = heads[:segments].astype(np.int64), heads[segments:].copy()
    table = shared
    if table is None:
        table, size = RansTable.read(buffer[head:stop])
        head += size
    if head + 2 * int(counts.sum()) != stop:
        raise CorruptError(f"rans: {int(counts.sum())} words in {stop - head} bytes")
    if int(states.min()) < LOW or int(states.max()) >= LOW << 16:
        raise CorruptError("rans: a first state is out of range")
    words = np.frombuffer(buffer[head:stop].tobytes(), "<u2")
    decode = _decode_avx512 if tier() == AVX512 else _decode
    status = decode(words, counts, states, table.slots(), segment, out, np.empty(LANES, np.uint8))
    if status == OUT_OF_WORDS:
        raise CorruptError("rans: words end before the last symbol")
    if status == LEFTOVER:
        raise CorruptError("rans: words or states left over after the last symbol")
    return table


@kernel
@no_type_check
def _fill_log2(table: I64) -> None:
    """Needs: table of shape (4097,), zero. Squares a mantissa of 32 bits once for each bit of the logarithm."""
    for i in range(1, 4097):
        whole = 0
        while i >> (whole + 1):
            whole += 1
        y = np.uint64(i) << np.uint64(31 - whole)
        result = whole
        for _ in range(16):
            y = (y * y) >> np.uint64(31)
            bit = np.int64(y >> np.uint64(32))
            y >>= np.uint64(bit)
            result = result * 2 + bit
        table[i] = result


@kernel
@no_type_check
def _fill_slots(freq: I64, slots: U32) -> None:
    """Needs: the sum of freq is slots.size, 4096."""
    at = 0
    for byte in range(256):
        for bias in range(freq[byte]):
            slots[at] = np.uint32((freq[byte] << 20) | (bias << 8) | byte)
            at += 1


@kernel
@no_type_check
def _quantize(counts: I64, log2: I64, freq: I64) -> None:
    """Needs: counts >= 0 with two or more not 0, their sum below 2**50; freq zero."""
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


@kernel
@no_type_check
def _cost(counts: I64, freq: I64, log2: I64) -> int:
    """Return the cost in 1/65536 bits. Needs: freq <= 4096."""
    total = 0
    for s in range(256):
        if freq[s] > 0:
            total += counts[s] * ((12 << 16) - log2[freq[s]])
    return total


@kernel
@no_type_check
def _encode_rows(
    symbols: U8, begin: int, end: int, freq: U64, start: U64, reciprocal: U64, words: U16, at: int, x: U64, f: U64
) -> int:
    """Encode symbols begin … end - 1, last row first, downwards from words[at - 1]; return the new `at`.

    Needs: begin and end multiples of 32; at > end - begin (a symbol emits at most one word, and one more is written in
    vain); x.size == f.size == 32; reciprocal[c] = 2**43 // freq[c] + 1, which gives the exact quotient for x < 2**31 (the
    excess x / 2**43 is below 1 / freq). Three loops over the lanes, so that those without the word pointer can use
    vectors: 209 -> 540 million symbols a second.
    """
    at = np.uint64(at)
    for i in range(end - 32, begin - 1, -32):
        for lane in range(32):
            f[lane] = freq[np.uint64(symbols[i + lane])]
        for lane in range(31, -1, -1):
            v = x[lane]
            more = v >= f[lane] << np.uint64(19)
            words[at - np.uint64(1)] = np.uint16(v)
            at -= np.uint64(more)
            x[lane] = v >> np.uint64(16) if more else v
        for lane in range(32):
            s = np.uint64(symbols[i + lane])
            v = x[lane]
            q = (v * reciprocal[s]) >> np.uint64(43)
            x[lane] = (q << np.uint64(12)) + v - q * f[lane] + start[s]
    return np.int64(at)


@kernel
@no_type_check
def _encode(
    symbols: U8,
    segment: int,
    freq: U64,
    start: U64,
    reciprocal: U64,
    words: U16,
    counts: U32,
    states: U32,
    x: U64,
    f: U64,
) -> int:
    """Encode last segment first; return the number of words, which end at the end of `words`.

    Needs: symbols.size and segment multiples of 32; words.size > symbols.size; what `_encode_rows` needs of the rest.
    """
    at = words.size
    for g in range(counts.size - 1, -1, -1):
        for lane in range(32):
            x[lane] = np.uint64(32768)
        end = at
        last = min(symbols.size, (g + 1) * segment)
        at = _encode_rows(symbols, g * segment, last, freq, start, reciprocal, words, at, x, f)
        counts[g] = np.uint32(end - at)
        for lane in range(32):
            states[g * 32 + lane] = np.uint32(x[lane])
    return words.size - at


@kernel
@no_type_check
def _decode_rows(
    words: U16, at: int, x: U32, first: int, slots: U32, begin: int, end: int, out: U8, last: U8
) -> int:
    """Decode symbols begin … end - 1 with the states x[first …], reading from words[at]; return the new `at`, or -1.

    Needs: slots.size == 4096; last.size == 32; end <= out.size. The first loop over the lanes has no order and can use
    vectors; the second hands out the words, without a branch while a whole row is left.
    """
    at = np.uint64(at)
    size = np.uint64(words.size)
    low = np.uint32(4095)
    whole = begin + (end - begin) // 32 * 32
    for i in range(begin, end, 32):
        if i < whole:
            for lane in range(32):
                v = x[first + lane]
                e = slots[np.uint64(v & low)]
                out[i + lane] = np.uint8(e)
                x[first + lane] = np.uint32(np.uint32(e >> np.uint32(20)) * np.uint32(v >> np.uint32(12))) + np.uint32(
                    (e >> np.uint32(8)) & low
                )
        else:
            for lane in range(32):
                v = x[first + lane]
                e = slots[np.uint64(v & low)]
                last[lane] = np.uint8(e)
                x[first + lane] = np.uint32(np.uint32(e >> np.uint32(20)) * np.uint32(v >> np.uint32(12))) + np.uint32(
                    (e >> np.uint32(8)) & low
                )
            for lane in range(end - i):
                out[i + lane] = last[lane]
        if at + np.uint64(32) <= size:
            for lane in range(first, first + 32):
                v = x[lane]
                more = v < np.uint32(32768)
                wide = np.uint32(np.uint32(v << np.uint32(16)) | np.uint32(words[at]))
                x[lane] = wide if more else v
                at += np.uint64(more)
        else:
            for lane in range(first, first + 32):
                if x[lane] < np.uint32(32768):
                    if at >= size:
                        return -1
                    x[lane] = np.uint32(np.uint32(x[lane] << np.uint32(16)) | np.uint32(words[at]))
                    at += np.uint64(1)
    return np.int64(at)


@kernel
@no_type_check
def _decode(words: U16, counts: I64, x: U32, slots: U32, segment: int, out: U8, last: U8) -> int:
    """Return OK, OUT_OF_WORDS or LEFTOVER; `x` holds the states of all segments and is used up.

    Needs: x.size == 32 * counts.size; segment a multiple of 32; what `_decode_rows` needs of the rest.
    """
    at = np.int64(0)
    for g in range(counts.size):
        stop = at + counts[g]
        at = _decode_rows(words, at, x, 32 * g, slots, g * segment, min(out.size, (g + 1) * segment), out, last)
        if at < 0:
            return 1
        if at != stop:
            return 2
    for i in range(x.size):
        if x[i] != np.uint32(32768):
            return 2
    return 0


# ---- AVX-512 (F, BW, VBMI2): a row of 32 lanes is two registers. Emitting these operations for a CPU without them ends
# the process, so `TIER` is decided by the features that numba compiles for before any of this is compiled.

_I16, _I32 = ir.IntType(16), ir.IntType(32)
_LANES_1, _LANES_8, _LANES_16 = (ir.VectorType(ir.IntType(n), 32) for n in (1, 8, 16))
_HALF_1, _HALF_32 = ir.VectorType(ir.IntType(1), 16), ir.VectorType(_I32, 16)


def _splat(kind: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


@no_type_check
def _pointer(context, builder, signature, args, array, index, kind):
    """Address of element `index` of argument `array`, as a pointer to `kind`."""
    data = context.make_array(signature.args[array])(context, builder, args[array]).data
    return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())


@no_type_check
def _call(builder, name, result, *args):
    function_type = ir.FunctionType(result, [a.type for a in args])
    function = cgutils.get_or_insert_function(builder.module, function_type, name)
    return builder.call(function, args)


@no_type_check
def _gather(builder, base, index):
    """Sixteen 32-bit words base[index]."""
    base = builder.bitcast(base, ir.IntType(8).as_pointer())
    none = ir.Constant(_HALF_32, ir.Undefined)
    every, four = _splat(_HALF_1, 1), ir.Constant(_I32, 4)
    return _call(builder, "llvm.x86.avx512.mask.gather.dpi.512", _HALF_32, none, base, index, every, four)


@no_type_check
def _half(builder, vector, high):
    lanes = ir.Constant(ir.VectorType(_I32, 16), list(range(16 * high, 16 * high + 16)))
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), lanes)


@no_type_check
def _both(builder, low, high):
    return builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(_I32, 32), list(range(32))))


@no_type_check
def _popcount(builder, mask):
    count = _call(builder, "llvm.ctpop.i32", _I32, builder.bitcast(mask, _I32))
    return builder.zext(count, ir.IntType(64))


@intrinsic
@no_type_check
def _row_decode(typingctx, words, at, x, first, slots, out, i):
    """Decode one row with the states x[first …], reading from words[at], into out[i …]; return the words read.

    Needs: 32 words behind words[at]; 32 states, 4096 slots, 32 bytes behind out[i].
    """

    def codegen(context, builder, signature, args):
        _, at, _, first, _, _, i = args
        states = _pointer(context, builder, signature, args, 2, first, _HALF_32)
        slots = _pointer(context, builder, signature, args, 4, ir.Constant(ir.IntType(64), 0), _I32)
        entries, values, low = [], [], []
        for half in (0, 1):
            v = builder.load(builder.gep(states, [ir.Constant(_I32, half)]), align=4)
            e = _gather(builder, slots, builder.and_(v, _splat(_HALF_32, 4095)))
            bias = builder.and_(builder.lshr(e, _splat(_HALF_32, 8)), _splat(_HALF_32, 4095))
            scaled = builder.mul(builder.lshr(e, _splat(_HALF_32, 20)), builder.lshr(v, _splat(_HALF_32, 12)))
            y = builder.add(scaled, bias)
            entries.append(e)
            values.append(y)
            low.append(builder.icmp_unsigned("<", y, _splat(_HALF_32, 32768)))
        mask = _both(builder, *low)
        more = builder.load(_pointer(context, builder, signature, args, 0, at, _LANES_16), align=2)
        spread = _call(builder, "llvm.x86.avx512.mask.expand.v32i16", _LANES_16, more, _splat(_LANES_16, 0), mask)
        for half in (0, 1):
            word = builder.zext(_half(builder, spread, half), _HALF_32)
            wide = builder.or_(builder.shl(values[half], _splat(_HALF_32, 16)), word)
            new = builder.select(low[half], wide, values[half])
            builder.store(new, builder.gep(states, [ir.Constant(_I32, half)]), align=4)
        symbols = builder.trunc(_both(builder, *entries), _LANES_8)
        builder.store(symbols, _pointer(context, builder, signature, args, 5, i, _LANES_8), align=1)
        return _popcount(builder, mask)

    return types.int64(words, types.int64, x, types.int64, slots, out, types.int64), codegen


@intrinsic
@no_type_check
def _row_encode(typingctx, symbols, i, x, first, entries, words, at):
    """Encode the row symbols[i …] into the states x[first …], words downwards from words[at - 1]; return their number.

    Needs: entries[c] = freq | start << 12 with freq > 0 for each symbol; at >= 32 (32 words below `at` are written).
    """

    def codegen(context, builder, signature, args):
        _, i, _, first, _, _, at = args
        states = _pointer(context, builder, signature, args, 2, first, _HALF_32)
        table = _pointer(context, builder, signature, args, 4, ir.Constant(ir.IntType(64), 0), _I32)
        row = builder.load(_pointer(context, builder, signature, args, 0, i, _LANES_8), align=1)
        floats = ir.VectorType(ir.FloatType(), 16)
        old, entry, freq, full = [], [], [], []
        for half in (0, 1):
            v = builder.load(builder.gep(states, [ir.Constant(_I32, half)]), align=4)
            e = _gather(builder, table, builder.zext(_half(builder, row, half), _HALF_32))
            f = builder.and_(e, _splat(_HALF_32, 4095))
            old.append(v)
            entry.append(e)
            freq.append(f)
            full.append(builder.icmp_unsigned(">=", v, builder.shl(f, _splat(_HALF_32, 19))))
        mask = _both(builder, *full)
        count = _popcount(builder, mask)
        words16 = builder.trunc(_both(builder, *old), _LANES_16)
        packed = _call(builder, "llvm.x86.avx512.mask.compress.v32i16", _LANES_16, words16, _splat(_LANES_16, 0), mask)
        # The words come first; turn them to the end of the register, which is stored just below `at`.
        turn = builder.insert_element(
            ir.Constant(_LANES_16, ir.Undefined), builder.trunc(count, _I16), ir.Constant(_I32, 0)
        )
        turn = builder.shuffle_vector(turn, ir.Constant(_LANES_16, ir.Undefined), _splat(ir.VectorType(_I32, 32), 0))
        turn = builder.add(turn, ir.Constant(_LANES_16, list(range(32))))
        packed = _call(builder, "llvm.x86.avx512.permvar.hi.512", _LANES_16, packed, turn)
        below = builder.sub(at, ir.Constant(ir.IntType(64), 32))
        builder.store(packed, _pointer(context, builder, signature, args, 5, below, _LANES_16), align=2)
        for half in (0, 1):
            f = freq[half]
            v = builder.select(full[half], builder.lshr(old[half], _splat(_HALF_32, 16)), old[half])
            # v < 2**31 and v / f < 2**19, so the rounded float quotient is off by one at most.
            quotient = builder.fdiv(builder.sitofp(v, floats), builder.sitofp(f, floats))
            q = builder.fptosi(quotient, _HALF_32)
            r = builder.sub(v, builder.mul(q, f))
            negative = builder.icmp_signed("<", r, _splat(_HALF_32, 0))
            q = builder.select(negative, builder.sub(q, _splat(_HALF_32, 1)), q)
            r = builder.select(negative, builder.add(r, f), r)
            over = builder.icmp_signed(">=", r, f)
            q = builder.select(over, builder.add(q, _splat(_HALF_32, 1)), q)
            r = builder.select(over, builder.sub(r, f), r)
            new = builder.add(builder.shl(q, _splat(_HALF_32, 12)), r)
            new = builder.add(new, builder.lshr(entry[half], _splat(_HALF_32, 12)))
            builder.store(new, builder.gep(states, [ir.Constant(_I32, half)]), align=4)
        return count

    return types.int64(symbols, types.int64, x, types.int64, entries, words, types.int64), codegen


@kernel
@no_type_check
def _decode_avx512(words: U16, counts: I64, x: U32, slots: U32, segment: int, out: U8, last: U8) -> int:
    """Do what `_decode` does, two segments at a time: one waits for its words while the other looks up its symbols."""
    n = out.size
    a = np.int64(0)
    for g in range(0, counts.size, 2):
        both = g + 1 < counts.size
        b = a + counts[g]
        a_stop = b
        b_stop = b + counts[g + 1] if both else b
        i = np.int64(g * segment)
        j = i + segment if both else i
        a_end = min(n, i + segment)
        b_end = min(n, j + segment)
        if both:
            while j + 32 <= b_end and a + 32 <= words.size and b + 32 <= words.size:
                a += _row_decode(words, a, x, 32 * g, slots, out, i)
                b += _row_decode(words, b, x, 32 * g + 32, slots, out, j)
                i += 32
                j += 32
        while i + 32 <= a_end and a + 32 <= words.size:
            a += _row_decode(words, a, x, 32 * g, slots, out, i)
            i += 32
        a = _decode_rows(words, a, x, 32 * g, slots, i, a_end, out, last)
        if a < 0:
            return 1
        if a != a_stop:
            return 2
        if both:
            b = _decode_rows(words, b, x, 32 * g + 32, slots, j, b_end, out, last)
            if b < 0:
                return 1
            if b != b_stop:
                return 2
        a = b_stop
    for k in range(x.size):
        if x[k] != np.uint32(32768):
            return 2
    return 0


@kernel
@no_type_check
def _encode_avx512(
    symbols: U8, segment: int, entries: U32, words: U16, spare: U16, counts: U32, states: U32
) -> int:
    """Do what `_encode` does, two segments at a time; return the number of words, which end at the end of `words`.

    Needs: symbols.size and segment multiples of 32; words.size >= symbols.size + 32; spare.size >= segment + 32;
    states all 2**15.
    """
    n = symbols.size
    at = np.int64(words.size)
    g = counts.size - 1
    while g >= 0:
        i = np.int64(g * segment)
        end = min(n, i + segment)
        a = at
        if g % 2:
            # Words of the lower segment come before those of the upper one, whose number is not known yet.
            j = i - segment
            b = np.int64(spare.size)
            k = end
            low = j + segment
            while k > i:
                k -= 32
                a -= _row_encode(symbols, k, states, 32 * g, entries, words, a)
                low -= 32
                b -= _row_encode(symbols, low, states, 32 * g - 32, entries, spare, b)
            while low > j:
                low -= 32
                b -= _row_encode(symbols, low, states, 32 * g - 32, entries, spare, b)
            counts[g] = np.uint32(at - a)
            held = spare.size - b
            counts[g - 1] = np.uint32(held)
            at = a - held
            for k in range(held):
                words[at + k] = spare[b + k]
            g -= 2
        else:
            k = end
            while k > i:
                k -= 32
                a -= _row_encode(symbols, k, states, 32 * g, entries, words, a)
            counts[g] = np.uint32(at - a)
            at = a
            g -= 1
    return words.size - at
