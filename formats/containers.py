"""Files that hold tensors: which of their bytes are elements, and of which type.

One module a container, each with a NAME and a function `find(read, size)`: it recognises the container by its content,
never by a file's name, and says where the tensors are. Everything else in the file is kept as it is, byte for byte, so a
module never has to write one. What it says is proven by `check` before anyone relies on it.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from tzip.coders.arrays import U8
from tzip.formats.dtypes import Dtype

Read = Callable[[int, int], bytes]
"""Returns the n bytes at an offset, fewer at the end of the file."""


class ContainerError(Exception):
    """Why bytes that begin like a container are none that can be read; `container` is its name."""

    container = ""


class Region(NamedTuple):  # made in a quarter of the time that a frozen dataclass takes, and a file has thousands
    """Bytes begin … end - 1 of a file are whole elements of one type, `row` of them in a row (0: not known)."""

    begin: int
    end: int
    dtype: Dtype
    row: int = 0


class View(NamedTuple):
    """A tensor: its first element begins at byte `begin`, in a region of its type. Strides count elements and are not
    negative; None: row-major without gaps. Views may overlap.
    """

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    begin: int
    strides: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Inner:
    """A file that lies uncompressed within the file, at bytes begin … end - 1; containers are looked for in it in turn."""

    name: str
    begin: int
    end: int


@dataclass(slots=True)
class Contents:
    """What a file holds. Regions ascend and do not overlap, nor do the files inside; tensors are in the container's order.

    The first `header` bytes say what the tensors are: an archive keeps them where they are read without a chunk.
    """

    container: str
    regions: list[Region] = field(default_factory=list)
    tensors: list[View] = field(default_factory=list)
    files: list[Inner] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    header: int = 0


class Unique:
    """Gives each name once: a later one of the same text gets "#2", "#3" …"""

    def __init__(self) -> None:
        self._next: dict[str, int] = {}

    def name(self, name: str) -> str:
        """Return the name, or what it is called since others have it."""
        found = name
        while found in self._next:
            self._next[name] += 1
            found = f"{name}#{self._next[name]}"
        self._next[found] = 1
        return found


def span_bytes(dtype: Dtype, shape: Sequence[int], strides: Sequence[int] | None) -> int:
    """Return the bytes from a tensor's first element to its last."""
    elements = 1
    for n in shape:
        elements *= n
    if strides is not None and elements:
        elements = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    return dtype.nbytes(elements)


def gather(span: U8, dtype: Dtype, shape: Sequence[int], strides: Sequence[int]) -> U8:
    """Return the bytes of a tensor in row-major order from those from its first element to its last, shape (span_bytes,).

    Needs: elements of whole bytes, not more than the span has.
    """
    width = dtype.bits // 8
    steps = tuple(s * width for s in strides)
    elements = np.lib.stride_tricks.as_strided(span.view(f"V{width}"), shape, steps)
    return np.ascontiguousarray(elements).reshape(-1).view(np.uint8)


def whole_tensors(regions: Sequence[Region], tensors: Sequence[View]) -> dict[int, View]:
    """Return, by its place, for each region the first tensor that it is, whole and row-major."""
    places = {region.begin: i for i, region in enumerate(regions)}
    found: dict[int, View] = {}
    for view in tensors:
        i = places.get(view.begin)
        if i is None or view.strides is not None or i in found:
            continue
        if span_bytes(view.dtype, view.shape, None) == regions[i].end - regions[i].begin:
            found[i] = view
    return dict(sorted(found.items()))


def check(contents: Contents, size: int) -> None:
    """Raise ContainerError unless what was found in a file of `size` bytes is as the classes above say.

    Names are left to `recognise`, which makes them unique. An empty tensor needs no region.
    """
    at = 0
    for begin, end, dtype, row in contents.regions:
        if not at <= begin < end <= size or (end - begin) % dtype.width or row < 0:
            raise ContainerError(f"bytes {begin} … {end} are no elements of {dtype.name} of their own")
        at = end
    files = sorted(contents.files, key=lambda f: (f.begin, f.end))
    for inner in files:
        if not 0 <= inner.begin <= inner.end <= size:
            raise ContainerError(f"the file {inner.name!r} leaves it")
    for before, after in pairwise(files):
        if after.begin < before.end:
            raise ContainerError(f"the files {before.name!r} and {after.name!r} overlap")
    begins = [region.begin for region in contents.regions]
    for name, dtype, shape, begin, strides in contents.tensors:
        span = span_bytes(dtype, shape, strides)
        i = bisect_right(begins, begin) - 1
        if span and not (i >= 0 and _lies(begin, span, dtype, contents.regions[i])):
            raise ContainerError(f"tensor {name!r} is not in a region of {dtype.name}")


def _lies(at: int, span: int, kind: Dtype, region: Region) -> bool:
    """Say whether `span` bytes of elements lie in the region and begin at an element of it."""
    begin, end, dtype, _ = region
    return at + span <= end and kind is dtype and (at - begin) % kind.width == 0
