"""The rANS kernels for any CPU; see rans.py.

A row of 32 symbols is one piece of code without a branch or a loop: what a lane does depends on no other one, but for
the place of its word, and that is known one addition after the place of the word before. Two at once are no faster.
In numba's own loops, which go through one step of a row for all lanes before the next one, and through memory between,
decoding was half as fast: 0.48 instead of 0.95 thousand million symbols a second; so was encoding.
"""

from typing import no_type_check

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tzip.coders.arrays import I64, U8, U16, U32, U64
from tzip.coders.jit import kernel

_I8, _I16, _I32, _I64 = (ir.IntType(n) for n in (8, 16, 32, 64))


def _word(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def _number(value: int) -> ir.Constant:
    return ir.Constant(_I32, value)


@no_type_check
def _data(context, builder, signature, args, i):
    """Address of the first byte of argument i, an array."""
    data = context.make_array(signature.args[i])(context, builder, args[i]).data
    return builder.bitcast(data, _I8.as_pointer())


@no_type_check
def _load(builder, data, offset, kind):
    return builder.load(builder.bitcast(builder.gep(data, [offset]), kind.as_pointer()), align=1)


@no_type_check
def _store(builder, value, data, offset):
    builder.store(value, builder.bitcast(builder.gep(data, [offset]), value.type.as_pointer()), align=1)


@no_type_check
def _selects(builder):
    """Whether a select stays one: LLVM branches instead on most AArch64 CPUs, and every fourth guess would be wrong."""
    return builder.module.triple.startswith(("x86_64", "i386", "i686"))


@no_type_check
def _renew(builder, new, word):
    """Take the word in where the state is below 2**15; return the state and how many bytes that took."""
    wide = builder.or_(builder.shl(new, _number(16)), word)
    if _selects(builder):
        less = builder.icmp_unsigned("<", new, _number(32768))
        return builder.select(less, wide, new), builder.shl(builder.zext(less, _I64), _word(1))
    less = builder.ashr(builder.sub(new, _number(32768)), _number(31))  # all ones, for states are below 2**31
    state = builder.xor(new, builder.and_(builder.xor(new, wide), less))
    return state, builder.zext(builder.and_(less, _number(2)), _I64)


@no_type_check
def _loop(builder, most, at, may, work):
    """Emit `while row < most and may(at): at = work(row, at)`, row from 0 on; return the rows done and `at`."""
    entry = builder.block
    head, body, done = (builder.append_basic_block(name) for name in ("row", "body", "done"))
    builder.branch(head)
    builder.position_at_end(head)
    row, now = builder.phi(_I64), builder.phi(_I64)
    row.add_incoming(_word(0), entry)
    now.add_incoming(at, entry)
    builder.cbranch(builder.and_(builder.icmp_signed("<", row, most), may(now)), body, done)
    builder.position_at_end(body)
    after = work(row, now)
    row.add_incoming(builder.add(row, _word(1)), builder.block)
    now.add_incoming(after, builder.block)
    builder.branch(head)
    builder.position_at_end(done)
    return row, now


@intrinsic
@no_type_check
def _rows(typingctx, buffer, x, first, slots, out, symbol, at, limit, most):
    """Decode rows to out[symbol …] with the states x[first …] and words from byte `at` on.

    Goes on while fewer than `most` are done and `at` is at most `limit`; returns `at` then, and the rows done. slots:
    those of `_fill_slots` in rans.py.
    Needs: 64 bytes in `buffer` behind `limit`; 32 * most symbols behind out[symbol].
    """

    def codegen(context, builder, signature, args):
        buffer, x, slots, out = (_data(context, builder, signature, args, i) for i in (0, 1, 3, 4))
        first, symbol, at, limit, most = args[2], *args[5:]
        x, out = builder.gep(x, [builder.shl(first, _word(2))]), builder.gep(out, [symbol])

        def work(row, at):
            here = builder.gep(out, [builder.shl(row, _word(5))])
            for lane in range(32):
                state = _load(builder, x, _word(4 * lane), _I32)
                slot = builder.zext(builder.and_(state, _number(4095)), _I64)
                entry = _load(builder, slots, builder.shl(slot, _word(2)), _I32)
                rank = builder.and_(builder.lshr(entry, _number(8)), _number(4095))
                scaled = builder.mul(builder.lshr(entry, _number(20)), builder.lshr(state, _number(12)))
                new = builder.add(scaled, rank)
                word = builder.zext(_load(builder, buffer, at, _I16), _I32)
                state, size = _renew(builder, new, word)
                at = builder.add(at, size)
                _store(builder, builder.trunc(entry, _I8), here, _word(lane))
                _store(builder, state, x, _word(4 * lane))
            return at

        done, at = _loop(builder, most, at, lambda now: builder.icmp_signed("<=", now, limit), work)
        return context.make_tuple(builder, signature.return_type, (at, done))

    numbers = [types.int64] * 4
    return types.UniTuple(types.int64, 2)(buffer, x, types.int64, slots, out, *numbers), codegen


@intrinsic
@no_type_check
def _rows_back(typingctx, symbols, top, divisors, words, end, x, first, most):
    """Encode `most` rows, last one first, from below symbols[top] with the states x[first …].

    Words go downwards from byte `end`; returns the byte of the last one. divisors: those of `fill_divisors`, of all
    symbols.
    Needs: 32 * most symbols before `top`; as many words, and one more, before `end`.
    """

    def codegen(context, builder, signature, args):
        symbols, divisors, words, x = (_data(context, builder, signature, args, i) for i in (0, 2, 3, 5))
        top, end, first, most = args[1], args[4], *args[6:]
        x = builder.gep(x, [builder.shl(first, _word(2))])

        def work(row, end):
            here = builder.gep(symbols, [builder.sub(top, builder.shl(row, _word(5)))])
            for lane in range(31, -1, -1):
                byte = builder.zext(_load(builder, here, _word(lane - 32), _I8), _I64)
                entry = builder.gep(divisors, [builder.shl(byte, _word(4))])
                state = _load(builder, x, _word(4 * lane), _I32)
                full = builder.icmp_unsigned(">=", state, _load(builder, entry, _word(8), _I32))
                _store(builder, builder.trunc(state, _I16), words, builder.sub(end, _word(2)))
                end = builder.sub(end, builder.shl(builder.zext(full, _I64), _word(1)))
                v = builder.select(full, builder.lshr(state, _number(16)), state)
                product = builder.mul(builder.zext(v, _I64), _load(builder, entry, _word(0), _I64))
                q = builder.trunc(builder.lshr(product, _word(43)), _I32)
                start, rest = (builder.zext(_load(builder, entry, _word(k), _I16), _I32) for k in (12, 14))
                _store(builder, builder.add(builder.add(v, start), builder.mul(q, rest)), x, _word(4 * lane))
            return end

        _, end = _loop(builder, most, end, lambda _: ir.Constant(ir.IntType(1), 1), work)
        return end

    i = types.int64
    return i(symbols, i, divisors, words, i, x, i, i), codegen


@kernel
@no_type_check
def decode(buffer: U8, slots: U32, left: I64, at: I64, symbol: I64, states: U32, out: U8) -> None:
    """Decode `left` whole rows of every segment.

    Stops early where words would lie past the buffer: left, at, symbol and states say how far it came.
    Needs: left, at and symbol (segments,), states (32 segments,): rows left, word offset, next symbol and states of
    each; slots (4096,); at >= 0; 32 left[g] symbols in out behind symbol[g].
    """
    limit = buffer.size - 64
    for g in range(left.size):
        at[g], done = _rows(buffer, states, 32 * g, slots, out, symbol[g], at[g], limit, left[g])
        left[g] -= done
        symbol[g] += 32 * done


@kernel
@no_type_check
def fill_divisors(freq: I64, order: I64, divisors: U64) -> None:
    """By byte, two words: 2**43 // frequency + 1, and frequency << 19 | start << 32 | (4096 - frequency) << 48.

    x * reciprocal >> 43 is the exact quotient for x < 2**31: the excess x / 2**43 is below 1 / frequency.
    Needs: divisors (512,); the frequencies of the bytes in `order` add up to 4096.
    """
    start = 0
    for i in range(order.size):
        f = freq[order[i]]
        divisors[2 * order[i]] = np.uint64((1 << 43) // f + 1)
        divisors[2 * order[i] + 1] = np.uint64((f << 19) | (start << 32)) | np.uint64(4096 - f) << np.uint64(48)
        start += f


@kernel
@no_type_check
def encode(symbols: U8, divisors: U64, words: U16, left: I64, end: I64, symbol: I64, states: U32) -> None:
    """Encode all segments, `left` rows each, from behind their last symbols.

    The words of each go downwards from byte end[g] of `words`, and end[g] becomes the byte of the first.
    Needs: left, end and symbol (segments,), states (32 segments,); divisors (512,); 32 left[g] symbols before
    symbol[g]; words for them and one more before end[g].
    """
    for g in range(left.size):
        end[g] = _rows_back(symbols, symbol[g], divisors, words, end[g], states, 32 * g, left[g])
