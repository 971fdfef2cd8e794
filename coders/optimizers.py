"""What an optimizer would make of its state: predictors 1, 2, 5 and 6 (FORMAT.md, section 6.6).

Consecutive checkpoints of AdamW hold all that a step needs but the gradients, and the first moment tells these. In the exact
order of operations of the optimizer 99.9 % of float32 weights are predicted to the bit; in binary64 they cost fifty times as
much. Nothing here may be fused or reordered: kernels are compiled without fast math, and tests hold all targets against numpy.
"""

from typing import no_type_check

import numpy as np

from tzip.coders.arrays import U32, Words
from tzip.coders.jit import kernel

FORMS = 4  # orders of operations of the weights' update
_EXPONENT = 0x7F800000


def keeps_subnormals() -> bool:
    """Say whether this thread computes with subnormal numbers: some libraries tell the CPU to take them as zero."""
    tiny = np.array([1 << 22, 1 << 23], np.uint32).view(np.float32)
    out = np.zeros(2, np.uint32)
    _probe(tiny, out.view(np.float32))
    return bool(out[0] == 1 << 21 and out[1] == 1 << 22)


def adam_weights(old: U32, first: U32, second: U32, form: int, numbers: tuple[np.float32, ...], out: U32) -> None:
    """Fill `out` with weights after a step, from those before it and the moments after it, all of shape (n,), as bits.

    `numbers`: c, s, r, e of the format. Needs: a form below FORMS.
    """
    f = np.float32
    c, s, r, e = numbers
    with np.errstate(all="ignore"):
        _adam_weights(old.view(f), first.view(f), second.view(f), form, c, s, r, e, out.view(f))
    _keep_finite(old, out)


def second_moment(old: U32, before: U32, after: U32, w: float, b: np.float32, c: np.float32, out: U32) -> None:
    """Fill `out` with second moments after a step, from those before it and the first moments around it, as bits."""
    f = np.float32
    _second_moment(old.view(f), before.view(f), after.view(f), np.float64(w), b, c, out.view(f))
    _keep_finite(old, out)


def first_moment(old: U32, second: U32, b: np.float32, out: U32, context: U32) -> None:
    """Fill `out` with what is left of first moments after a step, and `context` with how far the step may take them."""
    _first_moment(old.view(np.float32), b, out.view(np.float32))
    _keep_finite(old, out)
    _contexts(old, second, context)


def root(second: U32, k: int, out: U32) -> None:
    """Fill `out` with about the scale of first moments, from the second ones."""
    _root(second, k, out)


@kernel
@no_type_check
def _probe(tiny: Words, out: Words) -> None:
    """Needs: two arrays of two float32."""
    out[0] = tiny[0] * np.float32(0.5)
    out[1] = tiny[1] * np.float32(0.5)


@kernel
@no_type_check
def _adam_weights(w: Words, m: Words, v: Words, form: int, c: float, s: float, r: float, e: float, out: Words) -> None:
    """Needs: four arrays of one size; c, s, r, e of float32."""
    if form == 0:
        for i in range(out.size):
            d = np.sqrt(v[i]) / r + e
            out[i] = w[i] * c + (s * m[i]) / d
    elif form == 1:
        for i in range(out.size):
            d = np.sqrt(v[i]) / r + e
            out[i] = w[i] * c + s * (m[i] / d)
    elif form == 2:
        for i in range(out.size):
            d = np.sqrt(v[i]) * r + e
            out[i] = w[i] * c + (s * m[i]) / d
    else:
        for i in range(out.size):
            d = np.sqrt(v[i]) * r + e
            out[i] = w[i] * c + s * (m[i] / d)


@kernel
@no_type_check
def _second_moment(v: Words, m0: Words, m1: Words, w: float, b: float, c: float, out: Words) -> None:
    """Needs: four arrays of one size; w of float64, b and c of float32."""
    for i in range(out.size):
        before = np.float64(m0[i])
        g = np.float32(before + (np.float64(m1[i]) - before) / w)
        out[i] = (c * g) * g + v[i] * b


@kernel
@no_type_check
def _first_moment(m: Words, b: float, out: Words) -> None:
    """Needs: two arrays of one size; b of float32."""
    for i in range(out.size):
        out[i] = m[i] * b


@kernel
@no_type_check
def _keep_finite(old: U32, out: U32) -> None:
    """Needs: two arrays of one size."""
    for i in range(out.size):
        infinite = (out[i] & np.uint32(_EXPONENT)) == np.uint32(_EXPONENT)
        out[i] = old[i] if infinite else out[i]


@kernel
@no_type_check
def _contexts(old: U32, second: U32, context: U32) -> None:
    """Needs: three arrays of one size."""
    for i in range(context.size):
        scale = np.int32((second[i] >> np.uint32(24)) & np.uint32(127))
        here = np.int32((old[i] >> np.uint32(23)) & np.uint32(255))
        context[i] = np.uint32(max(np.int32(128) + scale - here, np.int32(0)))


@kernel
@no_type_check
def _root(second: U32, k: int, out: U32) -> None:
    """Needs: two arrays of one size; 0 <= k < 2^31."""
    add = np.uint32(k)
    for i in range(out.size):
        out[i] = (((second[i] & np.uint32(0x7FFFFFFF)) >> np.uint32(1)) + add) & np.uint32(0x7FFFFFFF)
