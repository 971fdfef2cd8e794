"""Fitting factors of low rank to what a matrix moved by (FORMAT.md, section 6.6, predictor 3).

Merged adapters move weights by a product of two thin matrices, and a training run moves them mostly along few directions. What
counts is how far the prediction is off in units in the last place of each element: alternating least squares weighted by these
beats a singular value decomposition, which spends its factors on large weights (bfloat16 MiniLM with a merged adapter of rank
16, 384 x 384: 11 % and 6.5 %).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tzip.coders import delta, factors
from tzip.coders.arrays import I64, Words
from tzip.coders.predictors import LOW_RANK, Predictor

F64 = NDArray[np.float64]
LARGEST = 1 << 26  # elements: the fit holds some matrices of the tensor's size
_LEAST = 64  # rows and columns
_SHARP = 32  # directions that an adapter may have to be found out
_EXTRA = 8  # directions that are looked at beyond those that are kept
_SAMPLE = 1 << 16  # elements that say what a prediction leaves
_WORTH = 0.95  # of the bits without factors
_MANTISSA = {2: 7, 4: 23}


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix and its earlier self, shape (rows, columns), as words of bfloat16 or float32."""

    now: Words
    before: Words

    @property
    def width(self) -> int:
        """Bytes of an element."""
        return int(self.now.itemsize)


def suits(shape: tuple[int, int]) -> bool:
    """Say whether a matrix of that shape may be fitted."""
    return min(shape) >= _LEAST and math.prod(shape) <= LARGEST and shape[1] <= factors.MAX_COLUMNS


def is_sharp(now: Words, before: Words) -> bool:
    """Say whether the moves of a part of a matrix are of low rank but for what rounding leaves, as a merged adapter's are."""
    values = _values(now)
    moved = values - _values(before)
    if not np.isfinite(moved).all() or not moved.any():
        return False
    rank = min(_SHARP, min(moved.shape) // 4)
    found = _directions(moved, rank)[1][:rank]
    noise = float((_units(values, now.itemsize) ** 2).sum()) / 12
    energy, kept = float((moved**2).sum()), float((found**2).sum())
    # Measured: a merged adapter keeps 60 % or more and leaves 0.1 to 0.8 of the noise; bfloat16 weights one step of training
    # apart keep 30 %, and twenty steps apart leave 4 to 10 times the noise.
    return energy - kept < 2 * noise and kept * 2 > energy


def fit(matrix: Matrix, ranks: Sequence[int], *, sharp: bool, least: float = math.inf) -> Predictor | None:
    """Return the predictor of one of these ranks that makes the differences smallest, or None when none is worth it.

    With `sharp` the rank is where the singular values fall most steeply. `least`: bits of an element that another predictor
    takes.
    """
    now, before = (_values(words) for words in (matrix.now, matrix.before))
    moved = now - before
    if not np.isfinite(moved).all() or not moved.any():
        return None
    most = min(max(ranks), min(moved.shape) // 4, factors.MAX_RANK)
    left, values, right = _directions(moved, most)
    unit = _units(now, matrix.width)
    sweeps = 3 if not sharp else 2 if matrix.width == 2 else 0  # adapters move float32 far beyond what rounding hides
    sample = _picked(matrix, _SAMPLE)
    theirs, earlier = (np.ascontiguousarray(words[sample]) for words in (matrix.now, matrix.before))
    best = min(least, _cost(theirs, earlier)) * now.size * _WORTH
    found: Predictor | None = None
    for rank in [_gap(values, most)] if sharp else sorted({min(r, most) for r in ranks}):
        columns, rows, error = _alternate(moved, unit, left[:, :rank], values[:rank], right[:rank], sweeps, matrix.width == 2)
        for finer in _grids(rows, columns, error):
            made = _quantised(rows, columns, finer)
            if made is None:
                continue
            predictor, bits = made
            whole = factors.read_factors(np.frombuffer(predictor.common, np.uint8))
            out = np.empty_like(theirs)
            assert predictor.rows is not None
            of_rows = predictor.rows[:, sample].astype(np.float64)
            factors.low_rank(whole, of_rows, 0, earlier.reshape(-1), out.reshape(-1))
            cost = bits + _cost(theirs, out) * now.size
            if cost < best:
                best, found = cost, predictor
    return found


def _values(words: Words) -> F64:
    wide = words.astype(np.uint32) << np.uint32(16) if words.itemsize == 2 else words
    with np.errstate(invalid="ignore"):
        return np.ascontiguousarray(wide).view(np.float32).astype(np.float64)


def _units(values: F64, width: int) -> F64:
    """Return the unit in the last place of each element; of zero that of a small number."""
    size = np.maximum(np.abs(values), 2.0**-30)
    return np.asarray(np.ldexp(1.0, np.frexp(size)[1] - 1 - _MANTISSA[width]))


def _directions(moved: F64, rank: int) -> tuple[F64, F64, F64]:
    """Return the first singular vectors and values, by a random sketch (Halko, Martinsson and Tropp, arXiv:0909.4061)."""
    sketch = np.random.default_rng(1).standard_normal((moved.shape[1], rank + _EXTRA))
    basis = np.linalg.qr(moved @ sketch)[0]
    for _ in range(2):
        basis = np.linalg.qr(moved.T @ basis)[0]
        basis = np.linalg.qr(moved @ basis)[0]
    left, values, right = np.linalg.svd(basis.T @ moved, full_matrices=False)
    return basis @ left, values, right


def _gap(values: F64, most: int) -> int:
    """Return the rank after which singular values fall most steeply."""
    ratios = values[:most] / np.maximum(values[1 : most + 1], values[0] * 1e-12)
    return int(ratios.argmax()) + 1


def _alternate(moved: F64, unit: F64, left: F64, values: F64, right: F64, sweeps: int, narrow: bool) -> tuple[F64, F64, F64]:
    """Return factors of the columns and of the rows, shapes (columns, R) and (rows, R), weighted by the elements' units, and
    how wrong they are about, of the shape of the matrix.
    """
    root = np.sqrt(values)
    rows, columns = left * root, right.T * root
    for i in range(sweeps + 1):
        rest = moved - rows @ columns.T
        # Nothing is fitted closer than the fit is wrong: else tiny elements with tiny units would count alone.
        wrong = float(np.mean(np.maximum(rest**2 - unit**2 / 12, 0))) * (0.3 if i else 1.0)
        error = np.sqrt(unit**2 / 12 + wrong)
        if i == sweeps:
            break
        weights = error**-2
        rows = _solve(columns, moved, weights, narrow)
        columns = _solve(rows, moved.T, weights.T, narrow)
    # Both of one size, and orthogonal: then weak directions need few bits.
    q_rows, r_rows = np.linalg.qr(rows)
    q_columns, r_columns = np.linalg.qr(columns)
    u, s, v = np.linalg.svd(r_rows @ r_columns.T)
    return q_columns @ v.T * np.sqrt(s), q_rows @ u * np.sqrt(s), error


def _solve(known: F64, target: F64, weights: F64, narrow: bool) -> F64:
    """Return the factors, shape (rows of the target, R), that with `known` (columns, R) come nearest in weighted squares.

    The normal matrices are nine tenths of a fit. In single precision they take half the time, and what that leaves out is far
    below what bfloat16's factors of 4 to 12 bits keep; float32's have 25 (a merged adapter, change 1e-2: 3.5 %, 3.9 so).
    """
    rank = known.shape[1]
    scale = float(np.abs(known).max()) or 1.0
    kind, ridge = (np.float32, 1e-6) if narrow else (np.float64, 1e-9)
    thin: NDArray[Any] = (known / scale).astype(kind)
    products = (thin[:, :, None] * thin[:, None, :]).reshape(len(known), -1)
    out = np.empty((len(target), rank))
    step = max(1, (1 << 22) // max(rank * rank, target.shape[1]))
    for i in range(0, len(target), step):
        part = weights[i : i + step]
        part = part / part.max()
        normal = (part.astype(kind) @ products).reshape(-1, rank, rank).astype(np.float64)
        trace = np.trace(normal, axis1=1, axis2=2)[:, None, None]
        normal += (ridge * trace + 1e-300) * np.eye(rank) / rank
        right = (part * target[i : i + step]) @ (known / scale)
        out[i : i + step] = np.linalg.solve(normal, right[:, :, None])[:, :, 0] / scale
    return out


def _grids(rows: F64, columns: F64, error: F64) -> list[int]:
    """Return exponents of grids for the factors, about as wrong as the fit is itself or finer."""
    size = float(np.sqrt((rows**2).sum() / len(rows) + (columns**2).sum() / len(columns)))
    typical = float(np.exp(np.mean(np.log(error)))) * math.sqrt(12)
    first = math.floor(math.log2(typical / max(size, 1e-300)))
    return [first + d for d in (1, 0, -1, -2, -3)]


def _quantised(rows: F64, columns: F64, exponent: int) -> tuple[Predictor, int] | None:
    """Return the predictor with factors in multiples of a power of two, and the bits that it stores."""
    scale = 2.0**-exponent
    if max(np.abs(rows).max(), np.abs(columns).max()) * scale >= 1 << factors.MAX_BITS - 1:
        return None
    whole = [np.rint(part.T * scale).astype(np.int64) for part in (rows, columns)]
    used = np.abs(whole[0]).any(axis=1) & np.abs(whole[1]).any(axis=1)
    if not used.any():
        return None
    r, c = (np.ascontiguousarray(part[used]) for part in whole)
    row_bits, column_bits = factors.bits_of(r), factors.bits_of(c)
    total = sum(1 << a + b - 2 for a, b in zip(row_bits, column_bits, strict=True))
    if total > factors.MAX_SUM or not -1000 <= 2 * exponent <= 100:
        return None
    common = factors.write_factors(c, row_bits, 2 * exponent)
    bits = 8 * len(common) + 8 * factors.packed_size(r.shape[1], row_bits)
    return Predictor(LOW_RANK, common, c.shape[1], r, tuple(row_bits)), bits


def _picked(matrix: Matrix, elements: int) -> I64:
    """Return rows at even distances that have about so many elements."""
    rows, columns = matrix.now.shape
    count = min(rows, max(4, elements // columns))
    return np.asarray(np.arange(count) * rows // count)


def _cost(now: Words, made: Words) -> float:
    """Return the bits of an element, about: the entropy of the length of its difference by the exponent, and lower bits."""
    flat, base = now.reshape(-1), made.reshape(-1)
    lengths = np.frexp(delta.subtract(flat, base, delta.ORDERED).astype(np.float64))[1].astype(np.int64)
    exponents = (base >> base.dtype.type(_MANTISSA[now.itemsize])).astype(np.int64) & 255
    classes = np.clip(exponents - int(np.median(exponents)) + 5, 0, delta.CLASSES - 1)
    counts = np.bincount(classes << 6 | lengths, minlength=64 * delta.CLASSES).reshape(delta.CLASSES, 64).astype(np.float64)
    sizes = counts.sum(axis=1, keepdims=True)
    with np.errstate(all="ignore"):
        entropy = np.where(counts > 0, counts * np.log2(sizes / counts), 0).sum()
    return float(entropy + np.maximum(lengths - 1, 0).sum()) / flat.size
