"""Differences from an earlier tensor, sorted by the scale of its elements (FORMAT.md, section 6.4).

A weight moves by so many units in the last place as its exponent is small: the exponent of the *earlier* value, which the
decoder has, says how the difference is distributed. Elements are put together by classes of it, so that each class gets
tables of its own from the codecs that there are. Measured on a training run: one step apart bfloat16 weights cost 6.8 % so,
8.8 % in one class; eight classes are as good as twelve or sixteen.
"""

from collections.abc import Callable
from typing import Any, no_type_check

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tzip.coders.arrays import I64, U8, Words
from tzip.coders.jit import AVX512, kernel, tier
from tzip.coders.scratch import borrow

CLASSES = 8
# How elements become integers: floats by sign and magnitude, integers as they are, floats whose magnitudes are far apart:
# turned so that the highest byte of a difference counts quarters of an octave, both ways.
ORDERED, PLAIN, TURNED = range(3)


def classes_of(base: Words, lowest: int, shift: int, bits: int) -> U8:
    """Return the class, 0 … 7, of each element of the base, shape (n,): its field of `bits` bits at `shift`, less `lowest`."""
    classes = borrow("classes", base.size)
    _classify(base, lowest, shift, (1 << bits) - 1, classes)
    return classes


def field_counts(base: Words, shift: int, bits: int) -> I64:
    """Count the values of the field, shape (2**bits,), in every sixteenth run of 64 elements."""
    counts = np.zeros(1 << bits, np.int64)
    _count_field(base, shift, (1 << bits) - 1, counts)
    return counts


def edge_counts(apart: Words, base: Words, lowest: int, shift: int, bits: int) -> I64:
    """Count how long differences are, in bits, shape (4, 65), in every 65th run of 64 elements: of those whose field is below
    `lowest`, is `lowest`, is 6 more, is more than that.
    """
    counts = np.zeros((4, 65), np.int64)
    _count_edges(apart, base, lowest, shift, (1 << bits) - 1, counts)
    return counts


def class_counts(classes: U8) -> I64:
    """Count the classes, shape (8,)."""
    counts = np.zeros(CLASSES, np.int64)
    _count_classes(classes, counts)
    return counts


def subtract(words: Words, base: Words, mode: int) -> Words:
    """Return the differences of elements from those of the base, shape (n,), zigzag; in scratch memory."""
    apart = borrow("differences", words.size, words.dtype)
    _subtract(words, base, mode, apart)
    return apart


def add(apart: Words, base: Words, mode: int, out: Words) -> None:
    """Fill `out` with the elements that differ from those of the base so; all of shape (n,)."""
    _add(apart, base, mode, out)


def by_class(apart: Words, classes: U8) -> list[Words]:
    """Return the elements of each class in order, eight arrays; in scratch memory."""
    room, each = classed(apart.size, apart.dtype)
    ends = np.arange(CLASSES) * each
    first = 0
    if tier() == AVX512 and apart.itemsize in (2, 4):
        first = _partition_vectors(apart, classes, ends, room)
    _partition(apart, classes, first, ends, room)
    return [room[k * each : end] for k, end in enumerate(ends.tolist())]


def classed(n: int, dtype: Any) -> tuple[Words, int]:
    """Return the scratch memory in which `by_class` puts n elements, and how far apart the classes begin there."""
    each = n + 64  # a vector is stored whole behind the elements of its class
    return borrow("classed", CLASSES * each, dtype), each


def in_order(inner: Words, classes: U8, counts: I64) -> Words:
    """Return elements that lie class by class in the order of `classes`, shape (n,); in scratch memory.

    Needs: counts, shape (8,), those of `class_counts`; 64 bytes behind the n elements of `inner`, which is longer by them.
    """
    apart = borrow("differences", classes.size, inner.dtype)
    places = np.cumsum(counts) - counts
    first = 0
    if tier() == AVX512 and inner.itemsize in (2, 4):
        first = _collect_vectors(inner, classes, places, apart)
    _collect(inner, classes, first, places, apart)
    return apart


@kernel
@no_type_check
def _classify(base: Words, lowest: int, shift: int, mask: int, classes: U8) -> None:
    """Needs: classes.size == base.size."""
    s = np.uint64(shift)
    m = np.uint64(mask)
    low = np.int64(lowest)
    for i in range(base.size):
        e = np.int64((np.uint64(base[i]) >> s) & m) - low
        classes[i] = np.uint8(min(max(e, 0), 7))


@kernel
@no_type_check
def _count_field(base: Words, shift: int, mask: int, counts: I64) -> None:
    """Needs: counts (mask + 1,), zero."""
    s = np.uint64(shift)
    m = np.uint64(mask)
    for begin in range(0, base.size, 1024):
        for i in range(begin, min(base.size, begin + 64)):
            counts[(np.uint64(base[i]) >> s) & m] += 1


@kernel
@no_type_check
def _count_edges(apart: Words, base: Words, lowest: int, shift: int, mask: int, counts: I64) -> None:
    """Needs: apart.size == base.size; counts (4, 65), zero."""
    s = np.uint64(shift)
    m = np.uint64(mask)
    low = np.int64(lowest)
    for begin in range(0, base.size, 64 * 65):  # a distance that few rows' lengths divide
        for i in range(begin, min(base.size, begin + 64)):
            e = np.int64((np.uint64(base[i]) >> s) & m) - low
            if 0 < e < 6:
                continue
            length = 0
            d = np.uint64(apart[i])
            while d:
                d >>= np.uint64(1)
                length += 1
            counts[0 if e < 0 else 1 if e == 0 else 2 if e == 6 else 3, length] += 1


@kernel
@no_type_check
def _subtract(words: Words, base: Words, mode: int, apart: Words) -> None:
    """Needs: three arrays of one shape and type."""
    bits = np.uint64(8 * words.itemsize)
    top = np.uint64(1) << (bits - np.uint64(1))
    every = top | (top - np.uint64(1))
    last = bits - np.uint64(1)
    one = np.uint64(1)
    three = np.uint64(3)
    zero = np.uint64(0)
    plain = mode == 1
    turned = mode == 2
    for i in range(words.size):
        a = np.uint64(words[i])
        b = np.uint64(base[i])
        if turned:
            a = (a << three) | (a >> (bits - three))
            b = (b << three) | (b >> (bits - three))
            apart[i] = (a - b + top) & every
            continue
        if not plain:
            a = a ^ (every if a & top else top)
            b = b ^ (every if b & top else top)
        d = (a - b) & every
        apart[i] = ((d << one) ^ (zero - (d >> last))) & every


@kernel
@no_type_check
def _add(apart: Words, base: Words, mode: int, out: Words) -> None:
    """Needs: three arrays of one shape and type."""
    bits = np.uint64(8 * out.itemsize)
    top = np.uint64(1) << (bits - np.uint64(1))
    every = top | (top - np.uint64(1))
    one = np.uint64(1)
    three = np.uint64(3)
    zero = np.uint64(0)
    plain = mode == 1
    turned = mode == 2
    for i in range(out.size):
        z = np.uint64(apart[i])
        b = np.uint64(base[i])
        if turned:
            a = (((b << three) | (b >> (bits - three))) + z + top) & every
            out[i] = (a >> three) | (a << (bits - three))
            continue
        if not plain:
            b = b ^ (every if b & top else top)
        a = (b + ((z >> one) ^ (zero - (z & one)))) & every
        if not plain:
            a = a ^ (top if a & top else every)
        out[i] = a


@kernel
@no_type_check
def _partition(apart: Words, classes: U8, first: int, ends: I64, room: Words) -> None:
    """Put elements first … behind those that their classes have, and move the ends.

    Needs: classes.size == apart.size; classes below 8; room for all.
    """
    for i in range(first, apart.size):
        k = classes[i]
        room[ends[k]] = apart[i]
        ends[k] += 1


@kernel
@no_type_check
def _collect(inner: Words, classes: U8, first: int, at: I64, apart: Words) -> None:
    """Take elements first … from the places of their classes. Needs: what `_partition` needs."""
    for i in range(first, apart.size):
        k = classes[i]
        apart[i] = inner[at[k]]
        at[k] += 1


# Vectors of 64 bytes take the elements of each class out of a register at once.

_I8, _I16, _I32, _I64 = (ir.IntType(n) for n in (8, 16, 32, 64))


def _word(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


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
def _call(builder, name, result, *args):
    function_type = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), args)


@no_type_check
def _masks(builder, classes, offset, lanes):
    """For each class, which of the `lanes` elements whose classes stand at `offset` are of it: (mask, their number)."""
    kind = ir.VectorType(_I8, lanes)
    here = builder.load(_at(builder, classes, offset, kind), align=1)
    found = []
    for k in range(CLASSES):
        mask = builder.icmp_unsigned("==", here, ir.Constant(kind, [k] * lanes))
        number = builder.bitcast(mask, ir.IntType(lanes))
        count = _call(builder, f"llvm.ctpop.i{lanes}", ir.IntType(lanes), number)
        found.append((mask, count if lanes == 64 else builder.zext(count, _I64)))
    return found


def _step(back: bool) -> Callable[..., Any]:
    """Make the intrinsic that moves one vector of elements to the places of their classes, or back."""

    @intrinsic
    @no_type_check
    def step(typingctx, apart, classes, i, places, sorted_):
        """Move a vector of elements, from i on, and the places of the classes. Needs: a vector's room behind each place."""

        def codegen(context, builder, signature, args):
            bits = signature.args[0].dtype.bitwidth
            lanes = 512 // bits
            vector = ir.VectorType(ir.IntType(bits), lanes)
            name = f"llvm.x86.avx512.mask.{'expand' if back else 'compress'}.v{lanes}i{bits}"
            apart, classes, places, room = (_data(context, builder, signature, args, k) for k in (0, 1, 3, 4))
            here = _at(builder, apart, builder.mul(args[2], _word(bits // 8)), vector)
            value = ir.Constant(vector, None) if back else builder.load(here, align=1)
            for k, (mask, count) in enumerate(_masks(builder, classes, args[2], lanes)):
                place = _at(builder, places, _word(8 * k), _I64)
                now = builder.load(place)
                there = _at(builder, room, builder.mul(now, _word(bits // 8)), vector)
                if back:
                    value = _call(builder, name, vector, builder.load(there, align=1), value, mask)
                else:
                    builder.store(_call(builder, name, vector, value, ir.Constant(vector, None), mask), there, align=1)
                builder.store(builder.add(now, count), place)
            if back:
                builder.store(value, here, align=1)
            return context.get_dummy_value()

        return types.void(apart, classes, types.int64, places, sorted_), codegen

    return step  # type: ignore[no-any-return]


_split, _join = _step(False), _step(True)


@kernel
@no_type_check
def _partition_vectors(apart: Words, classes: U8, ends: I64, room: Words) -> int:
    """Do what `_partition` does with whole vectors; return how many elements that were.

    Needs: elements of 16 or 32 bits; 64 bytes behind all ends; AVX-512.
    """
    lanes = 64 // apart.itemsize
    whole = apart.size // lanes * lanes
    for i in range(0, whole, lanes):
        _split(apart, classes, i, ends, room)
    return whole


@kernel
@no_type_check
def _collect_vectors(inner: Words, classes: U8, places: I64, apart: Words) -> int:
    """Do what `_collect` does with whole vectors; return how many elements that were.

    Needs: elements of 16 or 32 bits; 64 bytes behind all places; AVX-512.
    """
    lanes = 64 // apart.itemsize
    whole = apart.size // lanes * lanes
    for i in range(0, whole, lanes):
        _join(apart, classes, i, places, inner)
    return whole


@intrinsic
@no_type_check
def _tally(typingctx, classes, i, counts):
    """Add the numbers of each class among elements i … i + 63 to `counts`. Needs: 64 classes there; counts (8,)."""

    def codegen(context, builder, signature, args):
        classes, counts = (_data(context, builder, signature, args, k) for k in (0, 2))
        for k, (_, count) in enumerate(_masks(builder, classes, args[1], 64)):
            place = _at(builder, counts, _word(8 * k), _I64)
            builder.store(builder.add(builder.load(place), count), place)
        return context.get_dummy_value()

    return types.void(classes, types.int64, counts), codegen


@kernel
@no_type_check
def _count_classes(classes: U8, counts: I64) -> None:
    """Needs: counts (8,), zero; classes below 8."""
    whole = classes.size // 64 * 64
    for i in range(0, whole, 64):
        _tally(classes, i, counts)
    for i in range(whole, classes.size):
        counts[classes[i]] += 1
