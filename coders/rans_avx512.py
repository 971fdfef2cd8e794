"""The rANS kernels for AVX-512 (F, BW, VBMI, VBMI2); see rans.py.

A vector unit looks the byte of a slot up by its bucket, in tables of a few hundred bytes that stay in registers or the
first-level cache: 5 thousand million symbols a second on one Zen 4 core, against 2.4 by gathering from a table of 4096
slots. One step decodes a row of 32 symbols of four segments at once: the chain of look-ups of one hides behind the
others (two segments: 3). Emitting these operations for a CPU without them ends the process, so `tier` looks at the features
that numba compiles for before any of this is compiled.
"""

from collections.abc import Callable
from typing import Any, no_type_check

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tzip.coders.arrays import I64, U8, U16, U32, Words
from tzip.coders.jit import kernel

_I8, _I16, _I32, _I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
_BYTES_32, _BYTES_64 = ir.VectorType(_I8, 32), ir.VectorType(_I8, 64)
_WORDS_32, _LANES_16, _EIGHTS = ir.VectorType(_I16, 32), ir.VectorType(_I32, 16), ir.VectorType(_I8, 16)
_MASK_16 = ir.VectorType(ir.IntType(1), 16)


def _splat(kind: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def _word(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


@no_type_check
def _fill(builder, value, kind):
    """Every element of a vector of `kind` is the low part of the 64-bit `value`."""
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), builder.trunc(value, kind.element), ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), _splat(ir.VectorType(_I32, kind.count), 0))


@no_type_check
def _pick(builder, x, y, lanes):
    """The elements `lanes` of x followed by y."""
    return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(_I32, len(lanes)), list(lanes)))


@no_type_check
def _half(builder, vector, high):
    return _pick(builder, vector, vector, range(16 * high, 16 * high + 16))


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
def _gather(builder, base, index):
    """Sixteen 32-bit words base[index]."""
    none, every = ir.Constant(_LANES_16, ir.Undefined), _splat(_MASK_16, 1)
    name = "llvm.x86.avx512.mask.gather.dpi.512"
    return _call(builder, name, _LANES_16, none, base, index, every, ir.Constant(_I32, 4))


@no_type_check
def _popcount(builder, mask):
    return builder.zext(_call(builder, "llvm.ctpop.i32", _I32, builder.bitcast(mask, _I32)), _I64)


@no_type_check
def _look_up(builder, table, index):
    """table[index] for 64 bytes; the table has two or four registers."""
    name = "llvm.x86.avx512.vpermi2var.qi.512"
    low = _call(builder, name, _BYTES_64, table[0], index, table[1])
    if len(table) == 2:
        return low
    high = _call(builder, name, _BYTES_64, table[2], index, table[3])
    return builder.select(builder.icmp_signed("<", index, _splat(_BYTES_64, 0)), high, low)


@no_type_check
def _find(builder, tables, states):
    """Return the 64 symbols of the slots that four registers of states point to, and their frequencies and ranks.

    tables: those of `_fill_vectors` in rans.py, or the address of RansTable.slots.
    """
    if not isinstance(tables, list):
        entries = [_gather(builder, tables, builder.and_(v, _splat(_LANES_16, 4095))) for v in states]
        low = [_pick(builder, builder.trunc(e, _EIGHTS), builder.trunc(f, _EIGHTS), range(32))
               for e, f in (entries[:2], entries[2:])]  # fmt: skip
        freq = [builder.lshr(e, _splat(_LANES_16, 20)) for e in entries]
        rank = [builder.and_(builder.lshr(e, _splat(_LANES_16, 8)), _splat(_LANES_16, 4095)) for e in entries]
        return _pick(builder, *low, range(64)), freq, rank
    first, bound, last, *by_place = tables
    narrow = [_pick(builder, builder.bitcast(states[2 * s], _WORDS_32), builder.bitcast(states[2 * s + 1], _WORDS_32),
                    range(0, 64, 2)) for s in (0, 1)]  # fmt: skip

    def low_bytes(x, y):
        return _pick(builder, builder.bitcast(x, _BYTES_64), builder.bitcast(y, _BYTES_64), range(0, 128, 2))

    low = low_bytes(*narrow)
    bucket = low_bytes(*(builder.lshr(w, _splat(_WORDS_32, 4)) for w in narrow))
    within = builder.and_(low, _splat(_BYTES_64, 15))
    place = _look_up(builder, first, bucket)
    next_one = builder.icmp_unsigned(">=", within, _look_up(builder, bound, bucket))
    place = builder.select(next_one, builder.add(place, _splat(_BYTES_64, 1)), place)
    rare = builder.icmp_unsigned(">=", bucket, _splat(_BYTES_64, 240))
    place = builder.select(rare, _look_up(builder, last, low), place)
    *fields, symbol = (_look_up(builder, table, place) for table in by_place)
    freq, rank = [], []
    for s in (0, 1):
        pairs = [64 * part + 32 * s + i for i in range(32) for part in (0, 1)]
        f, start = (builder.bitcast(_pick(builder, x, y, pairs), _WORDS_32) for x, y in (fields[:2], fields[2:]))
        r = builder.sub(builder.and_(narrow[s], _splat(_WORDS_32, 4095)), start)
        for h in (0, 1):
            freq.append(builder.zext(_half(builder, f, h), _LANES_16))
            rank.append(builder.zext(_half(builder, r, h), _LANES_16))
    return symbol, freq, rank


@no_type_check
def _step(builder, tables, states, words, buffer):
    """Decode a row of two segments: states are four registers, words the two byte offsets of their next words.

    Returns the 64 symbols, the new states and the new offsets.
    """
    symbol, freq, rank = _find(builder, tables, states)
    new_states, new_words = [], []
    for s in (0, 1):
        new, less = [], []
        for k in (2 * s, 2 * s + 1):
            top = builder.lshr(states[k], _splat(_LANES_16, 12))
            new.append(builder.add(builder.mul(freq[k], top), rank[k]))
            less.append(builder.icmp_unsigned("<", new[-1], _splat(_LANES_16, 32768)))
        mask = _pick(builder, *less, range(32))
        more = _load(builder, buffer, words[s], _WORDS_32)
        name = "llvm.x86.avx512.mask.expand.v32i16"
        spread = _call(builder, name, _WORDS_32, more, _splat(_WORDS_32, 0), mask)
        new_words.append(builder.add(words[s], builder.shl(_popcount(builder, mask), _word(1))))
        for h in (0, 1):
            word = builder.zext(_half(builder, spread, h), _LANES_16)
            wide = builder.or_(builder.shl(new[h], _splat(_LANES_16, 16)), word)
            new_states.append(builder.select(less[h], wide, new[h]))
    return symbol, new_states, new_words


@no_type_check
def _merge(builder, symbols, rest, fields):
    """Sixteen-bit heads of 32 bytes `symbols` and their rests; as `_join` of planes.py."""
    base, low, up, bit, mask, constant = fields
    code = builder.zext(symbols, _WORDS_32)
    null = _splat(_WORDS_32, 0)
    key = builder.select(builder.icmp_unsigned("==", code, null), null, builder.add(code, base))
    r = builder.zext(rest, _WORDS_32)
    signs = builder.shl(builder.and_(r, bit), up)
    return builder.or_(builder.or_(builder.shl(key, low), signs), builder.or_(builder.and_(r, mask), constant))


def _rows(narrow: bool) -> Callable[..., Any]:
    """Make the intrinsic that decodes rows of four segments: by the tables of the narrow form, or any table's slots."""

    @intrinsic
    @no_type_check
    def rows(typingctx, buffer, x, lane, tables, rest, out, fields, limit, most):
        """Decode rows while fewer than `most` are done and every word offset is at most `limit`; return their number.

        Outputs of 8 bits get symbols, those of 16 bits heads. x: 128 states. lane: the offsets of the four segments'
        words in `buffer`, then those of their next symbols. fields: base, low, sign. Updates x and the word offsets.
        Needs: 64 bytes in `buffer` behind `limit`; 32 * most symbols, and as many rests for heads, behind the offsets.
        """

        def codegen(context, builder, signature, args):
            merged = signature.args[5].dtype.bitwidth == 16
            buffer, x, lane, tables, rest, out, fields = (_data(context, builder, signature, args, i) for i in range(7))
            limit, most = args[7:]
            table = tables
            if narrow:
                sizes = [256, 256, 256, *[128] * 5]
                starts = [sum(sizes[:i]) for i in range(8)]
                table = [[_load(builder, tables, _word(start + 64 * k), _BYTES_64) for k in range(n // 64)]
                         for start, n in zip(starts, sizes, strict=True)]  # fmt: skip
            states = [_load(builder, x, _word(64 * k), _LANES_16) for k in range(8)]
            words = [_load(builder, lane, _word(8 * k), _I64) for k in range(4)]
            symbols_at = [_load(builder, lane, _word(32 + 8 * k), _I64) for k in range(4)]
            value = (_load(builder, fields, _word(8 * k), _I64) for k in range(3))
            base, low, constant = (_fill(builder, v, _WORDS_32) for v in value)
            bit = builder.shl(_splat(_WORDS_32, 1), low)
            up = builder.sub(_splat(_WORDS_32, 15), low)
            merge = (base, low, up, bit, builder.sub(bit, _splat(_WORDS_32, 1)), constant)
            entry = builder.block
            head, body, done = (builder.append_basic_block(name) for name in ("row", "body", "done"))
            builder.branch(head)
            builder.position_at_end(head)
            row = builder.phi(_I64)
            now = [builder.phi(v.type) for v in words + states]
            for phi, value in zip([row, *now], [_word(0), *words, *states], strict=True):
                phi.add_incoming(value, entry)
            going = builder.icmp_signed("<", row, most)
            for offset in now[:4]:
                going = builder.and_(going, builder.icmp_signed("<=", offset, limit))
            builder.cbranch(going, body, done)
            builder.position_at_end(body)
            first = builder.shl(row, _word(5))
            new_words, new_states = [], []
            for p in (0, 1):
                symbol, s, w = _step(builder, table, now[4 + 4 * p : 8 + 4 * p], now[2 * p : 2 * p + 2], buffer)
                new_states += s
                new_words += w
                for k in (0, 1):
                    at = builder.add(symbols_at[2 * p + k], first)
                    part = _pick(builder, symbol, symbol, range(32 * k, 32 * k + 32))
                    if merged:
                        heads = _merge(builder, part, _load(builder, rest, at, _BYTES_32), merge)
                        builder.store(heads, _at(builder, out, builder.shl(at, _word(1)), _WORDS_32), align=1)
                    else:
                        builder.store(part, _at(builder, out, at, _BYTES_32), align=1)
            for phi, value in zip([row, *now], [builder.add(row, _word(1)), *new_words, *new_states], strict=True):
                phi.add_incoming(value, builder.block)
            builder.branch(head)
            builder.position_at_end(done)
            for k in range(4):
                builder.store(now[k], _at(builder, lane, _word(8 * k), _I64), align=1)
            for k in range(8):
                builder.store(now[4 + k], _at(builder, x, _word(64 * k), _LANES_16), align=1)
            return row

        return types.int64(buffer, x, lane, tables, rest, out, fields, types.int64, types.int64), codegen

    return rows  # type: ignore[no-any-return]


_rows_narrow, _rows_any = _rows(True), _rows(False)


@kernel
@no_type_check
def _take(k: int, left: I64, at: I64, symbol: I64, states: U32, x: U32, lane: I64) -> int:
    """Put segments k … k + 3 into the lanes; return the rows that all of them can go on, 0 when none is left.

    Lanes of segments that have no rows left do what another one does, and write the same.
    Needs: left, at and symbol (segments,), states (32 segments,): rows left, word offset, next symbol and states of each;
    x (128,); lane (12,): word offsets, symbols, segments or -1.
    """
    most = 0
    other = -1
    for i in range(4):
        g = k + i
        lane[8 + i] = -1
        if g < left.size and left[g] > 0:
            lane[8 + i] = g
            other = g
            if most == 0 or left[g] < most:
                most = left[g]
    if most == 0:
        return 0
    for i in range(4):
        g = lane[8 + i] if lane[8 + i] >= 0 else other
        lane[i] = at[g]
        lane[4 + i] = symbol[g]
        for j in range(32):
            x[32 * i + j] = states[32 * g + j]
    return most


@kernel
@no_type_check
def _put(left: I64, at: I64, symbol: I64, states: U32, x: U32, lane: I64, done: int, step: int) -> None:
    """Take the lanes back after `done` rows of `step` symbols. Needs: as `_take` left them."""
    for i in range(4):
        g = lane[8 + i]
        if g >= 0:
            at[g] = lane[i]
            left[g] -= done
            symbol[g] += step * done
            for j in range(32):
                states[32 * g + j] = x[32 * i + j]


@kernel
@no_type_check
def decode_narrow(
    buffer: U8, tables: U8, left: I64, at: I64, symbol: I64, states: U32, rest: U8, fields: I64, out: Words, x: U32, lane: I64
) -> None:
    """Decode `left` whole rows of every segment, with tables of the narrow form.

    Stops early where words would lie past the buffer: left, at, symbol and states say how far it came.
    Needs: at >= 0; 32 left[g] symbols in out, and rests for heads, behind symbol[g]; what `_take` needs.
    """
    limit = buffer.size - 64
    for k in range(0, left.size, 4):
        most = _take(k, left, at, symbol, states, x, lane)
        while most > 0:
            done = _rows_narrow(buffer, x, lane, tables, rest, out, fields, limit, most)
            _put(left, at, symbol, states, x, lane, done, 32)
            if done < most:
                return
            most = _take(k, left, at, symbol, states, x, lane)


@kernel
@no_type_check
def decode_any(
    buffer: U8, slots: U32, left: I64, at: I64, symbol: I64, states: U32, rest: U8, fields: I64, out: Words, x: U32, lane: I64
) -> None:
    """Decode `left` whole rows of every segment, with any table (gathering: 3.3 thousand million symbols a second).

    Stops early where words would lie past the buffer: left, at, symbol and states say how far it came.
    Needs: at >= 0; 32 left[g] symbols in out, and rests for heads, behind symbol[g]; what `_take` needs.
    """
    limit = buffer.size - 64
    for k in range(0, left.size, 4):
        most = _take(k, left, at, symbol, states, x, lane)
        while most > 0:
            done = _rows_any(buffer, x, lane, slots, rest, out, fields, limit, most)
            _put(left, at, symbol, states, x, lane, done, 32)
            if done < most:
                return
            most = _take(k, left, at, symbol, states, x, lane)


def _rows_back(count: int) -> Callable[..., Any]:
    """Make the intrinsic that encodes rows of four segments, last row first, for tables of at most `count` bytes."""

    @intrinsic
    @no_type_check
    def rows(typingctx, x, lane, symbols, tables, words, most):
        """Encode `most` rows of four segments, downwards, into the states x and the words below four ends.

        lane: the bytes in `words` below which the segments' next words go, then behind their last symbols. tables:
        frequency (low, high) and start (low, high) of each byte, K bytes each, then the lowest byte. Updates x and lane.
        Needs: frequencies > 0 of all symbols; 64 bytes a row, and 64 more, before lane[:4]; 32 * most symbols before
        lane[4:8].
        """

        def codegen(context, builder, signature, args):
            x, lane, symbols, tables, words = (_data(context, builder, signature, args, i) for i in range(5))
            most = args[5]
            table = [[_load(builder, tables, _word(count * i + 64 * k), _BYTES_64) for k in range(count // 64)]
                     for i in range(4)]  # fmt: skip
            lowest = _fill(builder, _load(builder, tables, _word(4 * count), _I8), _BYTES_64)
            entry = builder.block
            start = [_load(builder, lane, _word(8 * k), _I64) for k in range(8)]
            start += [_load(builder, x, _word(64 * k), _LANES_16) for k in range(8)]
            head, body, done = (builder.append_basic_block(name) for name in ("row", "body", "done"))
            builder.branch(head)
            builder.position_at_end(head)
            row = builder.phi(_I64)
            now = [builder.phi(v.type) for v in start]
            for phi, value in zip([row, *now], [_word(0), *start], strict=True):
                phi.add_incoming(value, entry)
            builder.cbranch(builder.icmp_signed("<", row, most), body, done)
            builder.position_at_end(body)
            at = [builder.sub(now[4 + s], _word(32)) for s in range(4)]
            ends, states = [], []
            for p in (0, 1):
                symbol = _pick(builder, *(_load(builder, symbols, a, _BYTES_32) for a in at[2 * p : 2 * p + 2]), range(64))
                symbol = builder.sub(symbol, lowest)
                found = [_look_up(builder, t, symbol) for t in table]
                for s in (0, 1):
                    k = 2 * p + s
                    state, end = _encode_row(builder, found, s, now[8 + 2 * k : 10 + 2 * k], words, now[k])
                    states += state
                    ends.append(end)
            for phi, value in zip([row, *now], [builder.add(row, _word(1)), *ends, *at, *states], strict=True):
                phi.add_incoming(value, builder.block)
            builder.branch(head)
            builder.position_at_end(done)
            for k in range(8):
                builder.store(now[k], _at(builder, lane, _word(8 * k), _I64), align=1)
            for k in range(8):
                builder.store(now[8 + k], _at(builder, x, _word(64 * k), _LANES_16), align=1)
            return context.get_dummy_value()

        return types.void(x, lane, symbols, tables, words, types.int64), codegen

    return rows  # type: ignore[no-any-return]


@no_type_check
def _encode_row(builder, found, s, states, out, end):
    """Encode row `s` of the two whose frequencies and starts were found; return its two registers of states and the new end."""
    floats = ir.VectorType(ir.FloatType(), 16)
    pairs = [64 * part + 32 * s + i for i in range(32) for part in (0, 1)]
    freq16, start16 = (
        builder.bitcast(_pick(builder, found[i], found[i + 1], pairs), _WORDS_32) for i in (0, 2)
    )
    freq = [builder.zext(_half(builder, freq16, h), _LANES_16) for h in (0, 1)]
    start = [builder.zext(_half(builder, start16, h), _LANES_16) for h in (0, 1)]
    full = [builder.icmp_unsigned(">=", states[h], builder.shl(freq[h], _splat(_LANES_16, 19))) for h in (0, 1)]
    mask = _pick(builder, *full, range(32))
    count = _popcount(builder, mask)
    low = _pick(builder, *(builder.bitcast(v, _WORDS_32) for v in states), range(0, 64, 2))
    packed = _call(builder, "llvm.x86.avx512.mask.compress.v32i16", _WORDS_32, low, _splat(_WORDS_32, 0), mask)
    # The words come first; turn them to the end of the register, which is stored just below the end.
    turn = builder.add(_fill(builder, count, _WORDS_32), ir.Constant(_WORDS_32, list(range(32))))
    packed = _call(builder, "llvm.x86.avx512.permvar.hi.512", _WORDS_32, packed, turn)
    builder.store(packed, _at(builder, out, builder.sub(end, _word(64)), _WORDS_32), align=1)
    new = []
    for h in (0, 1):
        f = freq[h]
        v = builder.select(full[h], builder.lshr(states[h], _splat(_LANES_16, 16)), states[h])
        # An approximate reciprocal and one Newton step are good to 2**-21, whatever the CPU's approximation is; less
        # 2**-20 they are too small. v / f < 2**19, so the quotient is right or one too small. (A division: 20 cycles more.)
        real = builder.sitofp(f, floats)
        guess = _call(builder, "llvm.x86.avx512.rcp14.ps.512", floats, real, _splat_float(0.0), ir.Constant(_I16, -1))
        guess = builder.fmul(guess, builder.fsub(_splat_float(2.0), builder.fmul(real, guess)))
        guess = builder.fmul(guess, _splat_float(1 - 2.0**-20))
        q = builder.fptosi(builder.fmul(builder.sitofp(v, floats), guess), _LANES_16)
        r = builder.sub(v, builder.mul(q, f))
        over = builder.icmp_unsigned(">=", r, f)
        q = builder.select(over, builder.add(q, _splat(_LANES_16, 1)), q)
        r = builder.select(over, builder.sub(r, f), r)
        new.append(builder.add(builder.shl(q, _splat(_LANES_16, 12)), builder.add(start[h], r)))
    return new, builder.sub(end, builder.shl(count, _word(1)))


@no_type_check
def _splat_float(value):
    return ir.Constant(ir.VectorType(ir.FloatType(), 16), [value] * 16)


_rows_back_narrow, _rows_back_wide = _rows_back(128), _rows_back(256)


@kernel
@no_type_check
def encode_narrow(
    symbols: U8, tables: U8, words: U16, left: I64, end: I64, symbol: I64, states: U32, x: U32, lane: I64
) -> None:
    """Encode all segments, `left` rows each, from behind their last symbols; the words of each go downwards from byte
    end[g] of `words`, and end[g] becomes the byte of the first.

    Needs: 32 left[g] symbols before symbol[g]; 64 bytes of words a row, and 64 more, before end[g]; what `_take` and
    `_rows_back` need.
    """
    for k in range(0, left.size, 4):
        most = _take(k, left, end, symbol, states, x, lane)
        while most > 0:
            _rows_back_narrow(x, lane, symbols, tables, words, most)
            _put(left, end, symbol, states, x, lane, most, -32)
            most = _take(k, left, end, symbol, states, x, lane)


@kernel
@no_type_check
def encode_wide(
    symbols: U8, tables: U8, words: U16, left: I64, end: I64, symbol: I64, states: U32, x: U32, lane: I64
) -> None:
    """Encode all segments, `left` rows each, from behind their last symbols; the words of each go downwards from byte
    end[g] of `words`, and end[g] becomes the byte of the first.

    Needs: 32 left[g] symbols before symbol[g]; 64 bytes of words a row, and 64 more, before end[g]; what `_take` and
    `_rows_back` need.
    """
    for k in range(0, left.size, 4):
        most = _take(k, left, end, symbol, states, x, lane)
        while most > 0:
            _rows_back_wide(x, lane, symbols, tables, words, most)
            _put(left, end, symbol, states, x, lane, most, -32)
            most = _take(k, left, end, symbol, states, x, lane)
