"""Masks, a bit an element: where few elements are not what they were (FORMAT.md, section 6.4)."""

from typing import no_type_check

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tzip.coders.arrays import I64, U8, U64, Words
from tzip.coders.jit import kernel


def changes(words: Words, before: Words) -> tuple[U8, I64]:
    """Return the mask of the elements that differ, bytes with the lowest bit first, and their places, ascending."""
    differ = words != before
    mask = np.packbits(differ, bitorder="little")
    return mask, places(mask, int(np.count_nonzero(differ)))


def places(mask: U8, count: int) -> I64:
    """Return the places of the `count` bits of a mask that are set, ascending.

    numpy's nonzero looks at each element: 60 times as long for a chunk of which one in a hundred is set.
    """
    whole = mask.size // 8 * 8
    words = mask[:whole] if mask.ctypes.data % 8 == 0 else mask[:whole].copy()
    out = np.empty(count, np.int64)
    found = _places(words.view(np.uint64), mask[whole:], out)
    if found != count:
        raise ValueError(f"the mask has {found} bits set, not {count}")
    return out


@intrinsic
@no_type_check
def _lowest(typingctx, word):
    """The place of the lowest bit of a word that is set. Needs: one is."""

    def codegen(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), codegen


@kernel
@no_type_check
def _places(words: U64, rest: U8, out: I64) -> int:
    """Return how many bits are set; the places of those that there is room for are written."""
    at = 0
    one = np.uint64(1)
    for i in range(words.size):
        word = words[i]
        while word != np.uint64(0):
            if at < out.size:
                out[at] = i * 64 + np.int64(_lowest(word))
            at += 1
            word &= word - one
    for i in range(rest.size):
        for bit in range(8):
            if (rest[i] >> bit) & 1:
                if at < out.size:
                    out[at] = words.size * 64 + i * 8 + bit
                at += 1
    return at
