"""What an archive shows: of its members and tensors what the index says; tensors that are decoded when they are indexed,
read or loaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tzip.coders.arrays import U8
from tzip.coders.errors import UnsupportedError, UsageError
from tzip.formats.dtypes import Dtype
from tzip.formats.reader import ArchiveReader
from tzip.loading import Part


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the index says of a tensor. `dtype` is the safetensors name; `stored` counts the bytes of the chunks
    that hold it, shared ones in proportion.
    """

    name: str
    member: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    stored: int
    codecs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MemberInfo:
    """What the index says of a member. `kind` is file, folder, link or tensor."""

    name: str
    kind: str
    size: int
    mode: int
    mtime_ns: int
    sha256: str | None
    tensors: int
    stored: int


class Archive(Protocol):
    """What a view needs of its archive."""

    reader: ArchiveReader

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of every tensor, in the order of the index."""
        ...

    def tensor_bytes(self, row: int, begin: int, end: int, threads: int | None) -> U8:
        """Return bytes begin … end - 1 of the tensor in that row of the index."""
        ...

    def load_parts(
        self, parts: Sequence[Part], device: Any, framework: str | None, stream: Any, threads: int | None
    ) -> list[Any]:
        """Return parts of tensors on a device."""
        ...


class TensorView:
    """One tensor of an archive, decoded when it is indexed or read."""

    def __init__(self, archive: Archive, row: int) -> None:
        self._archive = archive
        self._row = row

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self._archive.reader.index.tensor_names[self._row]

    @property
    def row(self) -> int:
        """The tensor's row in the index, as `Archive.read_into` takes it."""
        return self._row

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        return self._archive.shapes[self._row]

    @property
    def element_type(self) -> Dtype:
        """The element type; raises UnsupportedError when this tzip does not know it."""
        found = self._archive.reader.index.dtype_of(self._row)
        if found is None:
            raise UnsupportedError(
                f"dtype {int(self._archive.reader.index['t_dtype'][self._row])} is not known to this tzip; upgrade it"
            ).at(tensor=self.name)
        return found

    @property
    def dtype(self) -> "np.dtype[Any]":
        """The numpy (or ml_dtypes) dtype; raises UnsupportedError for F6 and opaque tensors, which have none: see `raw`."""
        dtype = self.element_type.numpy()
        if dtype is None:
            raise UnsupportedError(f"numpy has no dtype for {self.element_type.name}; read its bytes with raw()").at(
                tensor=self.name
            )
        return dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor as its file holds it (two F4 elements a byte)."""
        elements = 1
        for n in self.shape:
            elements *= n
        return self.element_type.nbytes(elements)

    def raw(self, threads: int | None = 1) -> NDArray[np.uint8]:
        """Return the tensor's bytes, shape (nbytes,)."""
        return self._archive.tensor_bytes(self._row, 0, self.nbytes, threads)

    def read(self, threads: int | None = 1) -> NDArray[Any]:
        """Return the whole tensor."""
        dtype = self.dtype
        return _as_array(self.raw(threads), self.element_type, dtype, self.shape)

    def load(
        self,
        device: Any = "cpu",
        framework: str | None = None,
        rows: slice | None = None,
        *,
        stream: Any = None,
        threads: int | None = None,
    ) -> Any:
        """Return the tensor, or a slice of its rows (of step 1), on a device; see `Archive.load`."""
        return self._archive.load_parts([self.part(rows)], device, framework, stream, threads)[0]

    def part(self, rows: slice | None) -> Part:
        """Return where the bytes of rows are; None: of all. Raises UsageError for rows that do not begin and end with bytes."""
        if rows is None:
            return Part(self._row, self.name, self.element_type, self.shape, 0, self.nbytes)
        if not self.shape:
            raise UsageError("a tensor of no dimension has no rows").at(tensor=self.name)
        low, high, step = rows.indices(self.shape[0])
        high = max(low, high)
        bits = self.element_type.bits
        for n in self.shape[1:]:
            bits *= n
        if step != 1 or low * bits % 8 or high * bits % 8:
            raise UsageError(f"rows {rows}: only whole bytes in a row can be loaded").at(tensor=self.name)
        shape = (high - low, *self.shape[1:])
        return Part(self._row, self.name, self.element_type, shape, low * bits // 8, high * bits // 8)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("a tensor of no dimension has no length")
        return self.shape[0]

    def __getitem__(self, index: Any) -> NDArray[Any]:
        """Return a part of the tensor; an integer or slice of rows decodes only the chunks that it touches.

        Indexing is numpy's: what follows the first index is applied to the rows read.
        """
        dtype = self.dtype
        first, rest = (index[0], index[1:]) if isinstance(index, tuple) and index else (index, ())
        if not self.shape or not isinstance(first, slice | int | np.integer) or isinstance(first, bool):
            result: NDArray[Any] = self.read()[index]
            return result
        rows = self.shape[0]
        if isinstance(first, slice):
            wanted = range(*first.indices(rows))
            low, high = (min(wanted), max(wanted) + 1) if wanted else (0, 0)
        else:
            if not -rows <= first < rows:
                raise IndexError(f"row {first} of {rows}")
            low = int(first) % rows
            high, wanted = low + 1, range(low, low + 1)
        row_bits = self.element_type.bits
        for n in self.shape[1:]:
            row_bits *= n
        if row_bits % 8:
            result = self.read()[index]
            return result
        raw = self._archive.tensor_bytes(self._row, low * row_bits // 8, high * row_bits // 8, 1)
        block = _as_array(raw, self.element_type, dtype, (high - low, *self.shape[1:]))
        if not isinstance(first, slice):
            result = block[(0, *rest)]
            return result
        step = wanted.step
        picked = block[::step] if step > 0 else block[::-1][::-step]
        result = picked[(slice(None), *rest)]
        return result

    def __repr__(self) -> str:
        return f"<tzip tensor {self.name!r} {self.element_type.name} {list(self.shape)}>"


def _as_array(raw: U8, element: Dtype, dtype: "np.dtype[Any]", shape: tuple[int, ...]) -> NDArray[Any]:
    if element.bits == 4:  # ml_dtypes holds one element a byte; files hold two, the first in the low half
        raw = np.stack((raw & 15, raw >> 4), axis=-1).reshape(-1)
    try:
        return raw.view(dtype).reshape(shape)
    except ValueError:  # numpy has a limit of its own, 32 or 64 by version
        raise UnsupportedError(f"numpy cannot hold {len(shape)} dimensions; read the bytes with raw()") from None
