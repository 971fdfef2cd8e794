"""Splitting elements into planes of symbols, and joining them again (FORMAT.md, section 6).

A float's *head* is its top 16 bits: sign, e exponent bits, m mantissa bits. t mantissa bits join the exponent in the *key*;
sign and the other mantissa bits are the *rest*. Lower bytes are planes of their own. Joining two mantissa bits to the
exponent gains 0.4 points on bfloat16 weights, for their distribution within a binade depends on the exponent
(measured: MiniLM 66.3 -> 65.9 %).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, no_type_check

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tzip.coders import rows
from tzip.coders.arrays import U8, U16, U32, Words
from tzip.coders.jit import kernel
from tzip.coders.scratch import borrow, recycle


@dataclass(frozen=True, slots=True)
class Head:
    """The fields of a 16-bit head: e exponent bits, m mantissa bits; `joined` lists the t that the format allows."""

    exponent: int
    mantissa: int
    joined: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Split:
    """A way to cut elements of `width` bytes (0: any) into planes."""

    wire_id: int
    name: str
    width: int
    head: Head | None

    def planes(self, width: int) -> int:
        """Return the number of planes of elements of `width` bytes."""
        if self.wire_id == BYTES.wire_id:
            return 1
        return width if self.head is None else 2 + (width - 2)

    def bits(self, plane: int, joined: int, signless: bool) -> int:
        """Return the width in bits of the symbols of a plane."""
        if self.head is None or plane >= 2:
            return 8
        if plane == 0:
            return self.head.exponent + joined
        return self.head.mantissa - joined + (not signless)


@dataclass(frozen=True, slots=True)
class Window:
    """Which keys have bytes: low … high (low >= 1) as key - base, and key 0 as byte 0 when `zero`. All others escape,
    and `instead` is the byte that is coded in their place.
    """

    base: int
    low: int
    high: int
    zero: bool
    instead: int


# Of so few elements numpy does simple things: a file of float weights often has a short tensor of integers, for whose
# width the kernels would be compiled, half a second each.
SMALL = 4096
BYTES = Split(0, "bytes", 0, None)
PLANES = Split(1, "planes", 0, None)
BF16 = Split(2, "bf16", 2, Head(8, 7, (0, 1, 2)))
F16 = Split(3, "f16", 2, Head(5, 10, (3,)))
F32 = Split(4, "f32", 4, Head(8, 7, (0, 1, 2)))
F64 = Split(5, "f64", 8, Head(11, 4, (0, 1, 2)))
SPLITS = {s.wire_id: s for s in (BYTES, PLANES, BF16, F16, F32, F64)}
WORD: dict[int, "np.dtype[np.unsignedinteger[Any]]"] = {1: np.dtype("<u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8:
np.dtype("<u8")}


def byte_plane(words: Words, shift: int) -> U8:
    """Return the byte that starts at bit `shift` of each element."""
    if words.size <= SMALL:
        small: U8 = (words >> words.dtype.type(shift)).astype(np.uint8)
        return small
    out = np.empty(words.size, np.uint8)
    byte_of(words, shift, out)
    return out


def put_byte(plane: U8, shift: int, out: Words) -> None:
    """Put a byte of each element at bit `shift`, where it has zeros; arrays of shape (n,)."""
    _put_byte(plane, shift, out)


def split_head(words: Words, head: Head, joined: int, signless: bool, window: Window) -> tuple[U8, U8, U32]:
    """Cut the heads of elements, shape (n,), n <= 2**18, into coded bytes, shape (n,), the packed rests, and escapes.

    Rests are packed as raw planes (rows.pack); escapes come as the format lists them: key << 18 | position. Coded bytes
    are in scratch memory.
    """
    low = head.mantissa - joined
    width = low + (not signless)
    g, _ = rows.cell(width)
    n = words.size
    whole = n // (32 * g) * 32 * g
    if width not in _SPLIT or not whole:
        coded, rest, escapes = split_head_loose(words, head, joined, signless, window)
        return coded, rows.pack(rest, width), escapes
    coded, escapes = borrow("coded", n), borrow("escapes", n, np.uint32)
    packed = recycle(rows.packed_size(n, width))
    w = window
    keys = (1 << (head.exponent + joined)) - 1
    null = 0 if w.zero else w.instead
    add = (w.low - w.base) & 0xFFFF  # below 0 for keys that are all the same, whose bytes nobody reads
    fields = np.array((low, keys, w.low, w.high - w.low, add, w.instead, null, int(w.zero)), np.uint16)
    found = _SPLIT[width](words, whole, fields, coded, packed, escapes)
    if whole < n:
        rest, more = _split_loose(words[whole:], head, joined, signless, window, coded[whole:], escapes[found:])
        tail = rows.pack(rest, width)
        packed[packed.size - tail.size :] = tail
        escapes[found : found + more] += np.uint32(whole)
        found += more
    return coded, packed, escapes[:found].copy()


def split_head_loose(words: Words, head: Head, joined: int, signless: bool, window: Window) -> tuple[U8, U8, U32]:
    """Do what `split_head` does, but return the rests one a byte, shape (n,)."""
    coded, escapes = borrow("coded", words.size), borrow("escapes", words.size, np.uint32)
    rest, found = _split_loose(words, head, joined, signless, window, coded, escapes)
    return coded, rest, escapes[:found].copy()


def _split_loose(
    words: Words, head: Head, joined: int, signless: bool, window: Window, coded: U8, escapes: U32
) -> tuple[U8, int]:
    """Fill coded and escapes; return the rests and the number of escapes."""
    rest = np.empty(words.size, np.uint8)
    low = head.mantissa - joined
    shift = 8 * words.itemsize - 16
    _rest(words, shift, low, not signless, rest)
    mask = (1 << (head.exponent + joined)) - 1
    w = window
    return rest, int(_code(words, shift + low, mask, w.base, w.low, w.high, w.zero, w.instead, coded, escapes))


def join_words(heads: U16, tails: list[U8], out: Words) -> None:
    """Fill `out` with words of 32 or 64 bits from their heads and the byte planes below, high to low."""
    if len(tails) == 2:
        join32(heads, tails[0], tails[1], out)
    else:
        _join64(heads, *tails, out)


@kernel
@no_type_check
def byte_of(words: Words, shift: int, out: U8) -> None:
    """Needs: out.size == words.size."""
    s = np.uint64(shift)
    for i in range(words.size):
        out[i] = np.uint8((np.uint64(words[i]) >> s) & np.uint64(255))


@kernel
@no_type_check
def _put_byte(plane: U8, shift: int, out: Words) -> None:
    """Needs: plane.size == out.size."""
    s = np.uint64(shift)
    for i in range(out.size):
        out[i] = np.uint64(out[i]) | (np.uint64(plane[i]) << s)


# Unsigned words throughout: a signed index costs numba a test for negative ones, and the loop its vectors
# (measured: 329 -> 43 microseconds for 2^17 elements in two loops).


@kernel
@no_type_check
def _code(
    words: Words,
    shift: int,
    key_mask: int,
    base: int,
    low: int,
    high: int,
    zero: bool,
    instead: int,
    coded: U8,
    escapes: U32,
) -> int:
    """Return the number of escapes. Needs: coded.size == escapes.size == words.size <= 2**18.

    Blocks without an escape, nearly all, are done by vectors alone.
    """
    s = np.uint64(shift)
    m = np.uint32(key_mask)
    first = np.uint32(low)
    span = np.uint32(high - low)
    add = np.uint32(low - base)
    other = np.uint32(instead)
    null = np.uint32(0) if zero else other
    escaped_null = np.uint32(0) if zero else np.uint32(1)
    found = 0
    for begin in range(0, words.size, 512):
        escaped = np.uint32(0)
        at = np.uint64(begin)
        for k in range(min(512, words.size - begin)):
            i = at + np.uint64(k)
            key = np.uint32(np.uint64(words[i]) >> s) & m
            d = np.uint32(key - first)
            c = null if key == np.uint32(0) else other
            coded[i] = np.uint8(np.uint32(d + add) if d <= span else c)
            e = np.uint32(0) if d <= span else np.uint32(1)
            escaped |= escaped_null if key == np.uint32(0) else e
        if escaped:
            for k in range(min(512, words.size - begin)):
                i = at + np.uint64(k)
                key = np.uint32(np.uint64(words[i]) >> s) & m
                if np.uint32(key - first) > span and (not zero or key > np.uint32(0)):
                    escapes[found] = np.uint32((np.uint64(key) << np.uint64(18)) | i)
                    found += 1
    return found


@kernel
@no_type_check
def _rest(words: Words, shift: int, low: int, signed: bool, rest: U8) -> None:
    """Needs: rest.size == words.size; `shift` is the head's lowest bit."""
    s = np.uint64(shift)
    up = np.uint64(shift + 15 - low)
    sign = np.uint64(1 << low) if signed else np.uint64(0)
    mask = np.uint64((1 << low) - 1)
    for i in range(words.size):
        x = np.uint64(words[i])
        rest[i] = np.uint8(((x >> up) & sign) | ((x >> s) & mask))


def join(coded: U8, rest: U8, low: int, base: int, sign: int, out: U16) -> None:
    """Fill `out` with heads, the inverse of `split_head`: byte 0 is key 0, byte c > 0 is key base + c.

    All of shape (n,). `low`: mantissa bits in the rest. `sign`: 0x8000 when it is constant and set, else 0.
    """
    join_heads(coded, rest, np.array((base, low, sign), np.uint16), out)


@kernel
@no_type_check
def put_keys(heads: U16, low: int, positions: U32, keys: U16) -> None:
    """Give the heads at `positions` other keys; `low`: the mantissa bits below. Needs: positions below heads.size."""
    keep = np.uint16(0x8000 | ((1 << low) - 1))
    for i in range(positions.size):
        at = np.uint64(positions[i])
        heads[at] = np.uint16((heads[at] & keep) | np.uint16(keys[i] << np.uint16(low)))


@kernel
@no_type_check
def join32(heads: U16, b1: U8, b0: U8, out: U32) -> None:
    """Needs: all of one size."""
    for i in range(out.size):
        out[i] = np.uint32(np.uint64(heads[i]) << np.uint64(16) | np.uint64(b1[i]) << np.uint64(8) | np.uint64(b0[i]))


@kernel
@no_type_check
def _join64(heads: U16, b5: U8, b4: U8, b3: U8, b2: U8, b1: U8, b0: U8, out: Words) -> None:
    """Needs: all of one size."""
    for i in range(out.size):
        high = np.uint64(heads[i]) << np.uint64(48) | np.uint64(b5[i]) << np.uint64(40)
        middle = np.uint64(b4[i]) << np.uint64(32) | np.uint64(b3[i]) << np.uint64(24)
        low = np.uint64(b2[i]) << np.uint64(16) | np.uint64(b1[i]) << np.uint64(8) | np.uint64(b0[i])
        out[i] = high | middle | low


# ---- Vectors that LLVM lowers for any CPU: numba's own loops over bytes and words of 16 bits come out scalar or with
# half of the lanes (2^17 heads split and packed: 70 microseconds, so 13).

_I8, _I16, _I64 = (ir.IntType(n) for n in (8, 16, 64))
_BYTES, _HEADS = ir.VectorType(_I8, 32), ir.VectorType(_I16, 32)


def _splat(kind: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


@no_type_check
def _fill(builder, value, kind):
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    none = ir.Constant(ir.VectorType(ir.IntType(32), kind.count), [0] * kind.count)
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), none)


def pack_rows(builder: Any, symbols: list[Any], width: int) -> list[Any]:
    """Emit the rows of a cell from its symbols, a vector of bytes each (FORMAT.md, section 7.1)."""
    _, b = rows.cell(width)
    packed = list(symbols[:b])
    for symbol, row, down, up, bits in rows.moves(width).tolist():
        part = builder.lshr(symbols[b + symbol], _splat(_BYTES, down)) if down else symbols[b + symbol]
        if up + bits < 8:
            part = builder.and_(part, _splat(_BYTES, (1 << bits) - 1))
        packed[row] = builder.or_(packed[row], builder.shl(part, _splat(_BYTES, up)))
    return packed


def _cell_split(width: int) -> Callable[..., Any]:
    """Make the intrinsic that splits the elements of a cell whose rests have `width` bits."""

    @intrinsic
    @no_type_check
    def cell(typingctx, words, at, fields, coded, packed, to):
        """Split elements at … into coded[at …] and packed[to …]; return whether any escapes.

        fields: low, key mask, first, span, add, instead, byte of key 0, whether key 0 has one. Needs: a cell of
        elements and coded bytes, b rows of packed ones.
        """

        def codegen(context, builder, signature, args):
            def data(i):
                return context.make_array(signature.args[i])(context, builder, args[i]).data

            words, fields, coded, packed = (data(i) for i in (0, 2, 3, 4))
            at, to = args[1], args[5]
            scalar = [builder.load(builder.gep(fields, [ir.Constant(_I64, k)])) for k in range(8)]
            low, keys, first, span, add, instead, null, has_null = (_fill(builder, v, _HEADS) for v in scalar)
            one, zero = _splat(_HEADS, 1), _splat(_HEADS, 0)
            bit = builder.shl(one, low)
            mask = builder.sub(bit, one)
            up = builder.sub(_splat(_HEADS, 15), low)
            signed = _splat(_HEADS, 1 << (width - 1))
            symbols, escaped = [], zero
            g, _ = rows.cell(width)
            element = ir.VectorType(words.type.pointee, 32)
            for j in range(g):
                here = builder.add(at, ir.Constant(_I64, 32 * j))
                x = builder.load(builder.bitcast(builder.gep(words, [here]), element.as_pointer()), align=1)
                if element.element.width > 16:
                    x = builder.trunc(builder.lshr(x, _splat(element, element.element.width - 16)), _HEADS)
                key = builder.and_(builder.lshr(x, low), keys)
                d = builder.sub(key, first)
                inside = builder.icmp_unsigned("<=", d, span)
                is_null = builder.icmp_unsigned("==", key, zero)
                code = builder.select(inside, builder.add(d, add), builder.select(is_null, null, instead))
                out = builder.bitcast(builder.gep(coded, [here]), _BYTES.as_pointer())
                builder.store(builder.trunc(code, _BYTES), out, align=1)
                fine = builder.select(inside, one, builder.select(is_null, has_null, zero))
                escaped = builder.or_(escaped, builder.xor(fine, one))
                # A signless rest has no bit above the mantissa's: width == low, and the mask takes the sign away.
                rest = builder.or_(builder.and_(builder.lshr(x, up), bit), builder.and_(x, mask))
                symbols.append(builder.trunc(builder.and_(rest, builder.or_(signed, mask)), _BYTES))
            for k, row in enumerate(pack_rows(builder, symbols, width)):
                here = builder.gep(packed, [builder.add(to, ir.Constant(_I64, 32 * k))])
                builder.store(row, builder.bitcast(here, _BYTES.as_pointer()), align=1)
            folded = builder.bitcast(escaped, ir.IntType(512))
            return builder.zext(builder.icmp_unsigned("!=", folded, ir.Constant(ir.IntType(512), 0)), _I64)

        return types.int64(words, types.int64, fields, coded, packed, types.int64), codegen

    return cell  # type: ignore[no-any-return]


_cell_split_4 = _cell_split(4)
_cell_split_5 = _cell_split(5)
_cell_split_6 = _cell_split(6)
_cell_split_7 = _cell_split(7)
_cell_split_8 = _cell_split(8)


@intrinsic
@no_type_check
def _row_join(typingctx, coded, rest, at, fields, out):
    """Join 32 heads from coded[at …] and rest[at …] into out[at …]; fields: base, low, sign. Needs: 32 of each there."""

    def codegen(context, builder, signature, args):
        def data(i):
            return context.make_array(signature.args[i])(context, builder, args[i]).data

        coded, rest, fields, out = (data(i) for i in (0, 1, 3, 4))
        at = args[2]
        base, low, sign = (
            _fill(builder, builder.load(builder.gep(fields, [ir.Constant(_I64, k)])), _HEADS) for k in range(3)
        )
        bit = builder.shl(_splat(_HEADS, 1), low)
        mask = builder.sub(bit, _splat(_HEADS, 1))
        up = builder.sub(_splat(_HEADS, 15), low)

        def wide(array):
            part = builder.load(builder.bitcast(builder.gep(array, [at]), _BYTES.as_pointer()), align=1)
            return builder.zext(part, _HEADS)

        c, r, null = wide(coded), wide(rest), _splat(_HEADS, 0)
        key = builder.select(builder.icmp_unsigned("==", c, null), null, builder.add(c, base))
        head = builder.or_(builder.shl(key, low), builder.shl(builder.and_(r, bit), up))
        head = builder.or_(head, builder.or_(builder.and_(r, mask), sign))
        builder.store(head, builder.bitcast(builder.gep(out, [at]), _HEADS.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(coded, rest, types.int64, fields, out), codegen


@kernel
@no_type_check
def join_heads(coded: U8, rest: U8, fields: U16, out: U16) -> None:
    """Needs: coded.size and rest.size >= out.size; fields: base, low, sign."""
    whole = out.size // 32 * 32
    for i in range(0, whole, 32):
        _row_join(coded, rest, i, fields, out)
    low = fields[1]
    bit = np.uint16(1) << low
    for i in range(whole, out.size):
        c = np.uint16(coded[i])
        r = np.uint16(rest[i])
        key = np.uint16(c + fields[0]) if c else np.uint16(0)
        top = np.uint16((r & bit) << np.uint16(15 - low))
        out[i] = np.uint16((key << low) | top | (r & np.uint16(bit - np.uint16(1))) | fields[2])


@kernel
@no_type_check
def _collect(words: Words, begin: int, end: int, fields: U16, escapes: U32, found: int) -> int:
    """Append the escapes of elements begin … end - 1; return the new number. Needs: room for them."""
    s = np.uint64(8 * words.itemsize - 16 + np.int64(fields[0]))
    for i in range(begin, end):
        key = np.uint16(np.uint64(words[i]) >> s) & fields[1]
        if np.uint16(key - fields[2]) > fields[3] and (key > 0 or fields[7] == 0):
            escapes[found] = np.uint32((np.uint32(key) << np.uint32(18)) | np.uint32(i))
            found += 1
    return found


@kernel
@no_type_check
def split_4(words: Words, whole: int, fields: U16, coded: U8, packed: U8, escapes: U32) -> int:
    """Split elements 0 … whole - 1; return the number of escapes. Needs: whole cells of 64; room for all outputs."""
    found = 0
    for c in range(whole // 64):
        if _cell_split_4(words, c * 64, fields, coded, packed, c * 32):
            found = _collect(words, c * 64, c * 64 + 64, fields, escapes, found)
    return found


@kernel
@no_type_check
def split_5(words: Words, whole: int, fields: U16, coded: U8, packed: U8, escapes: U32) -> int:
    """Split elements 0 … whole - 1; return the number of escapes. Needs: whole cells of 256; room for all outputs."""
    found = 0
    for c in range(whole // 256):
        if _cell_split_5(words, c * 256, fields, coded, packed, c * 160):
            found = _collect(words, c * 256, c * 256 + 256, fields, escapes, found)
    return found


@kernel
@no_type_check
def split_6(words: Words, whole: int, fields: U16, coded: U8, packed: U8, escapes: U32) -> int:
    """Split elements 0 … whole - 1; return the number of escapes. Needs: whole cells of 128; room for all outputs."""
    found = 0
    for c in range(whole // 128):
        if _cell_split_6(words, c * 128, fields, coded, packed, c * 96):
            found = _collect(words, c * 128, c * 128 + 128, fields, escapes, found)
    return found


@kernel
@no_type_check
def split_7(words: Words, whole: int, fields: U16, coded: U8, packed: U8, escapes: U32) -> int:
    """Split elements 0 … whole - 1; return the number of escapes. Needs: whole cells of 256; room for all outputs."""
    found = 0
    for c in range(whole // 256):
        if _cell_split_7(words, c * 256, fields, coded, packed, c * 224):
            found = _collect(words, c * 256, c * 256 + 256, fields, escapes, found)
    return found


@kernel
@no_type_check
def split_8(words: Words, whole: int, fields: U16, coded: U8, packed: U8, escapes: U32) -> int:
    """Split elements 0 … whole - 1; return the number of escapes. Needs: whole cells of 32; room for all outputs."""
    found = 0
    for c in range(whole // 32):
        if _cell_split_8(words, c * 32, fields, coded, packed, c * 32):
            found = _collect(words, c * 32, c * 32 + 32, fields, escapes, found)
    return found


_SPLIT = {4: split_4, 5: split_5, 6: split_6, 7: split_7, 8: split_8}
