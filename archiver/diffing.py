"""What changed between two files, tensor by tensor."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tzip.archive import opener
from tzip.bases import Base, Bases
from tzip.coders import delta, transforms
from tzip.coders.arrays import U8, Words
from tzip.coders.errors import UsageError
from tzip.coders.planes import WORD
from tzip.coders.sampling import counts_of, entropy
from tzip.formats.layout import CHUNK_ELEMENTS


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """How a tensor differs: `state` is equal, changed, added, removed or other (another dtype or shape).

    Of a changed one: the share of elements whose bits are equal, the order-0 entropy of the differences in bits an element,
    byte by byte, and, for floats, the norm of the difference and of the old tensor (NaN when either holds one).
    """

    name: str
    state: str
    dtype: str
    shape: tuple[int, ...]
    equal: float = 0.0
    bits: float = 0.0
    norm: float | None = None
    old_norm: float | None = None


def diff(old: Any, new: Any) -> list[TensorDiff]:
    """Compare the tensors of two files, folders or archives (paths) by name; memory stays bounded.

    Raises UsageError when one of them holds no tensors, and what `tzip.open` raises.
    """
    before, after = (Bases(_path(given), opener(None)) for given in (old, new))
    try:
        a, b = _by_name(before), _by_name(after)
        names = [*b, *(name for name in a if name not in b)]
        return [_compare(name, a.get(name), b.get(name)) for name in names]
    finally:
        before.close()
        after.close()


def _path(given: Any) -> Path:
    if not isinstance(given, str | os.PathLike):
        raise UsageError("diff compares paths: files, folders or archives")
    return Path(given)


def _by_name(bases: Bases) -> dict[str, Base]:
    found: dict[str, Base] = {}
    for file in bases.files():
        for tensor in file.tensors.values():
            found.setdefault(tensor.name, tensor)
    return found


def _compare(name: str, old: Base | None, new: Base | None) -> TensorDiff:
    if old is None or new is None:
        one = new or old
        assert one is not None
        return TensorDiff(name, "added" if old is None else "removed", one.dtype.name, one.shape)
    if old.dtype is not new.dtype or old.shape != new.shape:
        return TensorDiff(name, "other", new.dtype.name, new.shape)
    width, coding = new.dtype.width, new.dtype.coding
    mode = transforms.delta_mode(coding)
    is_float = mode == delta.ORDERED
    counts = np.zeros((width, 256), np.int64)
    same = squares = old_squares = 0.0
    step = CHUNK_ELEMENTS * width
    for begin in range(0, new.nbytes, step):
        x, y = (_part(t, begin, min(step, new.nbytes - begin)) for t in (old, new))
        apart: Words = delta.subtract(y.view(WORD[width]), x.view(WORD[width]), mode)
        same += float(np.count_nonzero(apart == 0))
        for k in range(width):
            counts[k] += counts_of(apart, 8 * k, 8)
        if is_float:
            dtype = new.dtype.numpy()
            assert dtype is not None  # all floats have one
            wide = np.complex128 if new.dtype.name.startswith("C") else np.float64
            with np.errstate(all="ignore"):
                u, v = (t.view(dtype).astype(wide) for t in (x, y))
                squares += float((np.abs(v - u) ** 2).sum())
                old_squares += float((np.abs(u) ** 2).sum())
    elements = new.nbytes // width
    if same == elements:
        return TensorDiff(name, "equal", new.dtype.name, new.shape, 1.0)
    bits = sum(entropy(c) for c in counts) / elements
    norms = (math.sqrt(squares), math.sqrt(old_squares)) if is_float else (None, None)
    return TensorDiff(name, "changed", new.dtype.name, new.shape, same / elements, bits, *norms)


def _part(tensor: Base, begin: int, n: int) -> U8:
    out = np.empty(n, np.uint8)
    tensor.read_into(begin, out)
    return out
