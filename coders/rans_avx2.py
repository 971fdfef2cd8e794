"""The rANS kernels for AVX2; see rans.py.

A step codes a row of 32 symbols of each of two segments, eight lanes a register (four segments are no faster: the
states of two fill half of the registers). Entries of tables are loaded one by one, words spread and closed up by byte
shuffles that the mask of the lanes in want of a word picks. On one Zen 5 core 2.5 thousand million heads a second come
out, and 2.9 symbols go in. Emitting these operations for a CPU without them ends the process, so `tier` asks what numba
compiles for before any of this is compiled.
"""

from functools import cache
from typing import no_type_check

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tzip.coders.arrays import I64, U8, U16, U32, U64, Words
from tzip.coders.jit import kernel

WAYS = 2  # segments at once

_I8, _I16, _I32, _I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
_BYTES_16, _BYTES_32 = ir.VectorType(_I8, 16), ir.VectorType(_I8, 32)
_WORDS_8, _WORDS_16 = ir.VectorType(_I16, 8), ir.VectorType(_I16, 16)
_LANES, _PAIRS = ir.VectorType(_I32, 8), ir.VectorType(_I64, 4)


@cache
def spreads() -> U8:
    """Return 32 bytes for each mask of eight lanes: where the four of each come from in eight words; 128 is zero."""
    lane = np.arange(256)[:, None] >> np.arange(8) & 1
    rank = np.cumsum(lane, axis=1) - lane
    places = np.full((256, 8, 4), 128, np.uint8)
    for k in (0, 1):
        places[:, :, k] = np.where(lane, 2 * rank + k, 128)
    return places.ravel()


@cache
def gatherings() -> U8:
    """Return 16 bytes for each mask of eight lanes: the bytes of its lanes' words, at the end; 128 is zero."""
    places = np.full((256, 8, 2), 128, np.uint8)
    for mask in range(256):
        lanes = [i for i in range(8) if mask >> i & 1]
        for k in (0, 1):
            places[mask, 8 - len(lanes) :, k] = [2 * i + k for i in lanes]
    return places.ravel()


def _splat(kind: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def _word(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


@no_type_check
def _fill(builder, value, kind):
    """Every element of a vector of `kind` is the low part of the 64-bit `value`."""
    none = ir.Constant(kind, ir.Undefined)
    one = builder.insert_element(none, builder.trunc(value, kind.element), ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, none, _splat(ir.VectorType(_I32, kind.count), 0))


@no_type_check
def _pick(builder, x, y, lanes):
    """The elements `lanes` of x followed by y."""
    return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(_I32, len(lanes)), list(lanes)))


@no_type_check
def _call(builder, name, result, *args):
    function_type = ir.FunctionType(result, [a.type for a in args])
    function = cgutils.get_or_insert_function(builder.module, function_type, name)
    return builder.call(function, args)


@no_type_check
def _data(context, builder, signature, args, i):
    """Address of the first byte of argument i, an array."""
    data = context.make_array(signature.args[i])(context, builder, args[i]).data
    return builder.bitcast(data, _I8.as_pointer())


@no_type_check
def _at(builder, data, offset, kind):
    """Address `offset` bytes behind `data`, as a pointer to `kind`."""
    return builder.bitcast(builder.gep(data, [offset]), kind.as_pointer())


@no_type_check
def _load(builder, data, offset, kind):
    return builder.load(_at(builder, data, offset, kind), align=1)


@no_type_check
def _store(builder, value, data, offset):
    builder.store(value, _at(builder, data, offset, value.type), align=1)


@no_type_check
def _mask(builder, lanes):
    """The mask of eight lanes as a 64-bit integer."""
    return builder.zext(builder.bitcast(lanes, _I8), _I64)


@no_type_check
def _popcount(builder, mask):
    return _call(builder, "llvm.ctpop.i64", _I64, mask)


@no_type_check
def _look_up(builder, slots, index):
    """slots[index] for eight lanes, loaded one by one.

    A gather is slower (2.5 against 2.8 thousand million symbols a second), and much slower yet on CPUs whose microcode
    keeps it from leaking data. So is taking the indices out of the vector one by one, not in pairs: 2.6.
    """
    table, wide = builder.bitcast(slots, _I32.as_pointer()), builder.bitcast(index, _PAIRS)
    found = ir.Constant(_LANES, ir.Undefined)
    for i in range(4):
        two = builder.extract_element(wide, ir.Constant(_I32, i))
        for j, one in enumerate((builder.and_(two, _word(0xFFFFFFFF)), builder.lshr(two, _word(32)))):
            found = builder.insert_element(found, builder.load(builder.gep(table, [one])), ir.Constant(_I32, 2 * i + j))
    return found


@no_type_check
def _step(builder, slots, spread, state, at, buffer):
    """Decode eight symbols of one row; return their entries, the new states and the offset behind their words."""
    entry = _look_up(builder, slots, builder.and_(state, _splat(_LANES, 4095)))
    scaled = builder.mul(builder.lshr(entry, _splat(_LANES, 20)), builder.lshr(state, _splat(_LANES, 12)))
    rank = builder.and_(builder.lshr(entry, _splat(_LANES, 8)), _splat(_LANES, 4095))
    new = builder.add(scaled, rank)
    less = builder.icmp_signed("<", new, _splat(_LANES, 32768))
    mask = _mask(builder, less)
    more = _load(builder, buffer, at, _BYTES_16)
    more = _pick(builder, more, more, [*range(16), *range(16)])
    places = _load(builder, spread, builder.shl(mask, _word(5)), _BYTES_32)
    words = builder.bitcast(_call(builder, "llvm.x86.avx2.pshuf.b", _BYTES_32, more, places), _LANES)
    kept = builder.select(less, builder.shl(new, _splat(_LANES, 16)), new)
    return entry, builder.or_(kept, words), builder.add(at, builder.shl(_popcount(builder, mask), _word(1)))


@no_type_check
def _symbols(builder, entries):
    """The bytes of 32 entries as two registers of words."""
    low = [builder.and_(e, _splat(_LANES, 255)) for e in entries]
    halves = []
    for k in (0, 2):
        both = _call(builder, "llvm.x86.avx2.packusdw", _WORDS_16, low[k], low[k + 1])
        wide = builder.bitcast(both, _PAIRS)
        halves.append(builder.bitcast(_pick(builder, wide, wide, (0, 2, 1, 3)), _WORDS_16))
    return halves


@no_type_check
def _merge(builder, code, rest, fields):
    """Sixteen-bit heads of 16 bytes, as words, and their rests; as `_join` of planes.py, shifts as products."""
    scale, above, bit, up, mask, constant = fields
    null = builder.icmp_unsigned("==", code, _splat(_WORDS_16, 0))
    key = builder.add(builder.mul(code, scale), builder.select(null, _splat(_WORDS_16, 0), above))
    r = builder.zext(rest, _WORDS_16)
    sign = builder.mul(builder.and_(r, bit), up)
    return builder.or_(builder.or_(key, sign), builder.or_(builder.and_(r, mask), constant))


@intrinsic
@no_type_check
def _rows(typingctx, buffer, x, lane, slots, spread, rest, out, fields, limit, most):
    """Decode rows while fewer than `most` are done and every word offset is at most `limit`; return their number.

    Outputs of 8 bits get symbols, those of 16 bits heads. x: 64 states. lane: the offsets of the two segments' words in
    `buffer`, then those of their next symbols. slots: those of `_fill_slots` in rans.py. fields: base, low, sign.
    Updates x and the word offsets.
    Needs: 64 bytes in `buffer` behind `limit`; 32 * most symbols, and as many rests for heads, behind the offsets.
    """

    def codegen(context, builder, signature, args):
        merged = signature.args[6].dtype.bitwidth == 16
        arrays = (_data(context, builder, signature, args, i) for i in range(8))
        buffer, x, lane, slots, spread, rest, out, fields = arrays
        limit, most = args[8:]
        words = [_load(builder, lane, _word(8 * k), _I64) for k in range(WAYS)]
        symbols_at = [_load(builder, lane, _word(8 * (WAYS + k)), _I64) for k in range(WAYS)]
        states = [_load(builder, x, _word(32 * k), _LANES) for k in range(4 * WAYS)]
        base, low, constant = (_load(builder, fields, _word(8 * k), _I64) for k in range(3))
        bit = builder.shl(_word(1), low)
        numbers = (bit, builder.shl(base, low), bit, builder.shl(_word(1), builder.sub(_word(15), low)),
                   builder.sub(bit, _word(1)), constant)  # fmt: skip
        numbers = [_fill(builder, v, _WORDS_16) for v in numbers]
        entry = builder.block
        head, body, done = (builder.append_basic_block(name) for name in ("row", "body", "done"))
        builder.branch(head)
        builder.position_at_end(head)
        row = builder.phi(_I64)
        now = [builder.phi(v.type) for v in words + states]
        for phi, value in zip([row, *now], [_word(0), *words, *states], strict=True):
            phi.add_incoming(value, entry)
        going = builder.icmp_signed("<", row, most)
        for offset in now[:WAYS]:
            going = builder.and_(going, builder.icmp_signed("<=", offset, limit))
        builder.cbranch(going, body, done)
        builder.position_at_end(body)
        first = builder.shl(row, _word(5))
        new_words, new_states = list(now[:WAYS]), list(now[WAYS:])
        entries = [[None] * 4 for _ in range(WAYS)]
        for q in range(4):
            for s in range(WAYS):
                entries[s][q], new_states[4 * s + q], new_words[s] = _step(
                    builder, slots, spread, new_states[4 * s + q], new_words[s], buffer
                )
        for s in range(WAYS):
            at = builder.add(symbols_at[s], first)
            halves = _symbols(builder, entries[s])
            if merged:
                for h in (0, 1):
                    here = builder.add(at, _word(16 * h))
                    heads = _merge(builder, halves[h], _load(builder, rest, here, _BYTES_16), numbers)
                    _store(builder, heads, out, builder.shl(here, _word(1)))
            else:
                _store(builder, builder.trunc(_pick(builder, *halves, range(32)), _BYTES_32), out, at)
        for phi, value in zip([row, *now], [builder.add(row, _word(1)), *new_words, *new_states], strict=True):
            phi.add_incoming(value, builder.block)
        builder.branch(head)
        builder.position_at_end(done)
        for k in range(WAYS):
            _store(builder, now[k], lane, _word(8 * k))
        for k in range(4 * WAYS):
            _store(builder, now[WAYS + k], x, _word(32 * k))
        return row

    return types.int64(buffer, x, lane, slots, spread, rest, out, fields, types.int64, types.int64), codegen


@kernel
@no_type_check
def _take(k: int, left: I64, at: I64, symbol: I64, states: U32, x: U32, lane: I64) -> int:
    """Put segments k and k + 1 into the lanes; return the rows that both of them can go on, 0 when none is left.

    Lanes of segments that have no rows left do what another one does, and write the same.
    Needs: left, at and symbol (segments,), states (32 segments,): rows left, word offset, next symbol and states of
    each; x (64,); lane (6,): word offsets, symbols, segments or -1.
    """
    most = 0
    other = -1
    for i in range(WAYS):
        g = k + i
        lane[2 * WAYS + i] = -1
        if g < left.size and left[g] > 0:
            lane[2 * WAYS + i] = g
            other = g
            if most == 0 or left[g] < most:
                most = left[g]
    if most == 0:
        return 0
    for i in range(WAYS):
        g = lane[2 * WAYS + i] if lane[2 * WAYS + i] >= 0 else other
        lane[i] = at[g]
        lane[WAYS + i] = symbol[g]
        for j in range(32):
            x[32 * i + j] = states[32 * g + j]
    return most


@kernel
@no_type_check
def _put(left: I64, at: I64, symbol: I64, states: U32, x: U32, lane: I64, done: int, step: int) -> None:
    """Take the lanes back after `done` rows of `step` symbols. Needs: as `_take` left them."""
    for i in range(WAYS):
        g = lane[2 * WAYS + i]
        if g >= 0:
            at[g] = lane[i]
            left[g] -= done
            symbol[g] += step * done
            for j in range(32):
                states[32 * g + j] = x[32 * i + j]


@kernel
@no_type_check
def decode(
    buffer: U8,
    slots: U32,
    spread: U8,
    left: I64,
    at: I64,
    symbol: I64,
    states: U32,
    rest: U8,
    fields: I64,
    out: Words,
    x: U32,
    lane: I64,
) -> None:
    """Decode `left` whole rows of every segment.

    Stops early where words would lie past the buffer: left, at, symbol and states say how far it came.
    Needs: slots (4096,); spread as `spreads` makes it; at >= 0; 32 left[g] symbols in out, and rests for heads, behind
    symbol[g]; what `_take` needs.
    """
    limit = buffer.size - 64
    for k in range(0, left.size, WAYS):
        most = _take(k, left, at, symbol, states, x, lane)
        while most > 0:
            done = _rows(buffer, x, lane, slots, spread, rest, out, fields, limit, most)
            _put(left, at, symbol, states, x, lane, done, 32)
            if done < most:
                return
            most = _take(k, left, at, symbol, states, x, lane)


@no_type_check
def _divisors(builder, divisors, symbols, at):
    """What symbols[at : at + 8] multiply and add with: two registers, low and high halves of their 64 bits."""
    found = []
    for four in ((0, 1, 4, 5), (2, 3, 6, 7)):  # so that a shuffle within the halves of a register ends in order
        pairs = ir.Constant(_PAIRS, ir.Undefined)
        for i, k in enumerate(four):
            symbol = builder.zext(_load(builder, symbols, builder.add(at, _word(k)), _I8), _I64)
            pairs = builder.insert_element(
                pairs, _load(builder, divisors, builder.shl(symbol, _word(3)), _I64), ir.Constant(_I32, i)
            )
        found.append(pairs)
    return found


@no_type_check
def _step_back(builder, divisors, gathering, symbols, at, state, words, end):
    """Encode symbols[at : at + 8], words downwards from byte `end`; return the new states and the new end."""
    found = _divisors(builder, divisors, symbols, at)
    odd = (1, 3, 9, 11, 5, 7, 13, 15)
    entry = _pick(builder, *(builder.bitcast(p, _LANES) for p in found), odd)
    # Bits 19 … 30 of an entry are the frequency: the state is full when its own are not less.
    full = builder.icmp_signed(">", builder.or_(state, _splat(_LANES, (1 << 19) - 1)), entry)
    mask = _mask(builder, full)
    low = builder.bitcast(builder.trunc(state, _WORDS_8), _BYTES_16)
    places = _load(builder, gathering, builder.shl(mask, _word(4)), _BYTES_16)
    packed = _call(builder, "llvm.x86.ssse3.pshuf.b.128", _BYTES_16, low, places)
    _store(builder, packed, words, builder.sub(end, _word(16)))
    v = builder.select(full, builder.lshr(state, _splat(_LANES, 16)), state)
    products = []
    for pairs, lanes in zip(found, ((0, 0, 1, 1, 4, 4, 5, 5), (2, 2, 3, 3, 6, 6, 7, 7)), strict=True):
        twice = builder.bitcast(_pick(builder, v, v, lanes), _PAIRS)
        wide = [builder.and_(p, _splat(_PAIRS, 0xFFFFFFFF)) for p in (twice, pairs)]
        products.append(builder.bitcast(builder.mul(*wide), _LANES))
    shift = builder.and_(builder.lshr(entry, _splat(_LANES, 13)), _splat(_LANES, 31))
    q = builder.lshr(_pick(builder, *products, odd), shift)
    rest = builder.sub(_splat(_LANES, 4096), builder.lshr(entry, _splat(_LANES, 19)))
    new = builder.add(builder.mul(q, rest), builder.add(v, builder.and_(entry, _splat(_LANES, 8191))))
    return new, builder.sub(end, builder.shl(_popcount(builder, mask), _word(1)))


@intrinsic
@no_type_check
def _rows_back(typingctx, x, lane, symbols, divisors, gathering, words, most):
    """Encode `most` rows of two segments, downwards, into the states x and the words below two ends.

    lane: the bytes in `words` below which the segments' next words go, then behind their last symbols. Updates x and
    lane.
    Needs: divisors as `fill_divisors` makes them, of all symbols; 64 bytes a row, and 16 more, before the
    ends; 32 * most symbols before theirs.
    """

    def codegen(context, builder, signature, args):
        x, lane, symbols, divisors, gathering, words = (_data(context, builder, signature, args, i) for i in range(6))
        most = args[6]
        start = [_load(builder, lane, _word(8 * k), _I64) for k in range(2 * WAYS)]
        start += [_load(builder, x, _word(32 * k), _LANES) for k in range(4 * WAYS)]
        entry = builder.block
        head, body, done = (builder.append_basic_block(name) for name in ("row", "body", "done"))
        builder.branch(head)
        builder.position_at_end(head)
        row = builder.phi(_I64)
        now = [builder.phi(v.type) for v in start]
        for phi, value in zip([row, *now], [_word(0), *start], strict=True):
            phi.add_incoming(value, entry)
        builder.cbranch(builder.icmp_signed("<", row, most), body, done)
        builder.position_at_end(body)
        ends, states = list(now[:WAYS]), list(now[2 * WAYS :])
        at = [builder.sub(symbol, _word(32)) for symbol in now[WAYS : 2 * WAYS]]
        for q in (3, 2, 1, 0):
            for s in range(WAYS):
                k, here = 4 * s + q, builder.add(at[s], _word(8 * q))
                states[k], ends[s] = _step_back(builder, divisors, gathering, symbols, here, states[k], words, ends[s])
        for phi, value in zip([row, *now], [builder.add(row, _word(1)), *ends, *at, *states], strict=True):
            phi.add_incoming(value, builder.block)
        builder.branch(head)
        builder.position_at_end(done)
        for k in range(2 * WAYS):
            _store(builder, now[k], lane, _word(8 * k))
        for k in range(4 * WAYS):
            _store(builder, now[2 * WAYS + k], x, _word(32 * k))
        return context.get_dummy_value()

    return types.void(x, lane, symbols, divisors, gathering, words, types.int64), codegen


@kernel
@no_type_check
def fill_divisors(freq: I64, order: I64, divisors: U64) -> None:
    """By byte: reciprocal | (frequency << 19 | shift << 13 | bias) << 32, for states below 2**31.

    After F. Giesen's ryg_rans: x // frequency is x * reciprocal >> 32 + shift, and bias the start. The reciprocal of 1
    would need 33 bits; with 2**32 - 1 the quotient is one too small, which 4095 more in bias make up for.
    Needs: divisors (256,); the frequencies of the bytes in `order` add up to 4096.
    """
    start = 0
    for i in range(order.size):
        f = freq[order[i]]
        shift = 0
        while 2 << shift < f:
            shift += 1
        reciprocal = ((1 << (shift + 32)) + f - 1) // f
        bias = start
        if f == 1:
            reciprocal = (1 << 32) - 1
            bias = start + 4095
        divisors[order[i]] = np.uint64(reciprocal) | np.uint64((f << 19) | (shift << 13) | bias) << np.uint64(32)
        start += f


@kernel
@no_type_check
def encode(
    symbols: U8,
    divisors: U64,
    gathering: U8,
    words: U16,
    left: I64,
    end: I64,
    symbol: I64,
    states: U32,
    x: U32,
    lane: I64,
) -> None:
    """Encode all segments, `left` rows each, from behind their last symbols.

    The words of each go downwards from byte end[g] of `words`, and end[g] becomes the byte of the first.

    Needs: 32 left[g] symbols before symbol[g]; 64 bytes of words a row, and 16 more, before end[g]; gathering as
    `gatherings` makes it; what `_take` and `_rows_back` need.
    """
    for k in range(0, left.size, WAYS):
        most = _take(k, left, end, symbol, states, x, lane)
        while most > 0:
            _rows_back(x, lane, symbols, divisors, gathering, words, most)
            _put(left, end, symbol, states, x, lane, most, -32)
            most = _take(k, left, end, symbol, states, x, lane)
