"""Predictors: what a delta's elements are differences from, when it is not the base alone (FORMAT.md, section 6.6)."""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tzip.coders import factors, optimizers
from tzip.coders.arrays import I64, U8, U16, Words
from tzip.coders.errors import CorruptError, UnsupportedError
from tzip.coders.planes import WORD

ADAM_WEIGHTS, SECOND_MOMENT, LOW_RANK, LEVELS, ROOT, FIRST_MOMENT = range(1, 7)
NAMES = {
    ADAM_WEIGHTS: "AdamW weights",
    SECOND_MOMENT: "second moment",
    LOW_RANK: "low rank",
    LEVELS: "rows and columns",
    ROOT: "root",
    FIRST_MOMENT: "first moment",
}
ROLES: dict[int, tuple[int, ...]] = {
    0: (0,),
    ADAM_WEIGHTS: (0, 1, 2),
    SECOND_MOMENT: (0, 1, 2),
    LOW_RANK: (0,),
    LEVELS: (),
    ROOT: (1,),
    FIRST_MOMENT: (0, 1),
}
SPREAD = (LOW_RANK, LEVELS)  # the string of chunk 0 is that of all chunks
MAX_STRING = 1 << 22
_WIDTHS = {LOW_RANK: (2, 4), LEVELS: (2, 4)}
_FORMS = {
    ADAM_WEIGHTS: struct.Struct("<Iffff"),
    SECOND_MOMENT: struct.Struct("<dff"),
    ROOT: struct.Struct("<I"),
    FIRST_MOMENT: struct.Struct("<f"),
}


@dataclass(frozen=True, slots=True)
class Beside:
    """What a prediction reads: the bytes of each role for the chunk, and the string of chunk 0 where the chunk is another."""

    roles: Mapping[int, U8] = field(default_factory=dict)
    first: U8 | None = None


ALONE = Beside()


class Predicted(NamedTuple):
    """What elements are differences from, and what their classes are taken from; both shape (n,)."""

    words: Words
    context: Words


@dataclass(frozen=True, slots=True)
class Predictor:
    """A predictor for a run: `common` is the string of every chunk or, when it is spread, how that of chunk 0 begins; `rows`
    are then the factors, shape (R, rows), or levels, shape (1, rows), of all rows of q elements, of `bits` each.
    """

    kind: int
    common: bytes
    q: int = 0
    rows: I64 | None = None
    bits: tuple[int, ...] = ()

    def string(self, at: int, n: int) -> U8:
        """Return the string of the chunk with elements at … at + n - 1 of the run."""
        if self.rows is None:
            return np.frombuffer(self.common, np.uint8)
        first, count = factors.rows_of(self.q, at, n)
        part = self.rows[:, first : first + count]
        packed = factors.pack(part, list(self.bits)) if self.kind == LOW_RANK else part.astype("<u2").tobytes()
        return np.frombuffer((b"" if at else self.common) + packed, np.uint8)


def check(kind: int, width: int, size: int) -> None:
    """Prove what the head of a chunk says of its predictor; raises UnsupportedError or CorruptError."""
    if kind not in ROLES:
        raise UnsupportedError(f"predictor {kind} is not known to this tzip; upgrade it")
    form = _FORMS.get(kind)
    if kind and (width not in _WIDTHS.get(kind, (4,)) or (form is not None and size != form.size)):
        raise CorruptError(f"{NAMES[kind]}: elements of {width} bytes, {size} bytes of parameters")
    if not kind and size:
        raise CorruptError("parameters without a predictor")


def parameters(kind: int, string: U8) -> tuple[float, ...]:
    """Return the numbers of a predictor that is not spread; raises CorruptError. Needs: the size that `check` proves."""
    numbers: tuple[float, ...] = _FORMS[kind].unpack(string.tobytes())
    if not all(math.isfinite(x) for x in numbers):
        raise CorruptError(f"{NAMES[kind]}: a parameter is not finite")
    if kind == ADAM_WEIGHTS and numbers[0] >= optimizers.FORMS:
        raise CorruptError("AdamW weights: another form")
    if kind == ROOT and int(numbers[0]) >> 31:
        raise CorruptError("root: a number that is out of range")
    return numbers


def pack_parameters(kind: int, *numbers: float) -> bytes:
    """Return the string of a predictor that is not spread."""
    return _FORMS[kind].pack(*numbers)


def predict(kind: int, string: U8, width: int, at: int, n: int, beside: Beside) -> Predicted:
    """Return what n elements from element `at` of the run on are predicted to be, in new memory.

    `at` is not 0 in the chunks after the first. Raises CorruptError for parameters that are none, and for roles that are
    missing; UnsupportedError where this thread does not compute as IEEE 754 says.
    """
    if not optimizers.keeps_subnormals():
        raise UnsupportedError("some library told this CPU to take subnormal numbers as zero, and predictions need them")
    roles = [_role(beside, role, width, n) for role in ROLES[kind]]
    out = np.empty(n, WORD[width])
    if kind in SPREAD:
        whole = beside.first if at else string
        if whole is None:
            raise CorruptError(f"{NAMES[kind]}: the run's first chunk has other parameters")
        (_low_rank if kind == LOW_RANK else _levels)(whole, string, at, roles, out)
        return Predicted(out, out)
    numbers = parameters(kind, string)
    f = np.float32
    if kind == ADAM_WEIGHTS:
        form, c, s, r, e = numbers
        optimizers.adam_weights(roles[0], roles[1], roles[2], int(form), (f(c), f(s), f(r), f(e)), out)
    elif kind == SECOND_MOMENT:
        optimizers.second_moment(roles[0], roles[1], roles[2], numbers[0], f(numbers[1]), f(numbers[2]), out)
    elif kind == FIRST_MOMENT:
        context = np.empty(n, np.uint32)
        optimizers.first_moment(roles[0], roles[1], f(numbers[0]), out, context)
        return Predicted(out, context)
    else:
        optimizers.root(roles[0], int(numbers[0]), out)
    return Predicted(out, out)


def _role(beside: Beside, role: int, width: int, n: int) -> Words:
    raw = beside.roles.get(role)
    if raw is None:
        raise CorruptError(f"a chunk is predicted from input {role}, and its run has none")
    if raw.size != n * width:
        raise CorruptError(f"an input of {raw.size} bytes for a chunk of {n * width}")
    aligned = raw if raw.flags.c_contiguous and raw.ctypes.data % width == 0 else raw.copy()
    return aligned.view(WORD[width])


def _low_rank(whole: U8, string: U8, at: int, roles: list[Words], out: Words) -> None:
    head = factors.read_factors(whole)
    _, count = factors.rows_of(head.q, at, out.size)
    packed = string[0 if at else head.end :]
    if packed.size != factors.packed_size(count, head.row_bits):
        raise CorruptError("low rank: factors of another number of rows")
    factors.low_rank(head, factors.unpack(packed, count, head.row_bits), at, roles[0], out)


def _levels(whole: U8, string: U8, at: int, roles: list[Words], out: Words) -> None:
    q = int.from_bytes(whole[:4].tobytes(), "little")
    end = 4 + 2 * q
    if whole.size < end or not 1 <= q <= factors.MAX_COLUMNS:
        raise CorruptError("rows and columns: another number of columns")
    columns = np.frombuffer(whole[4:end].tobytes(), "<u2")
    rows: U16 = np.frombuffer(string[0 if at else end :].tobytes(), np.uint8)
    if rows.size != 2 * factors.rows_of(q, at, out.size)[1]:
        raise CorruptError("rows and columns: another number of rows")
    factors.levels(columns.copy(), rows.view("<u2").copy(), at, out)
