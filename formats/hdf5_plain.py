"""The HDF5 files that h5py writes unless told otherwise, Keras's weights among them: where their datasets lie.

Those are superblock 0, object headers 1, groups of symbol tables, datasets in one piece or in chunks under a tree (HDF5 File
Format Specification 3.0, sections II.A, III.A, III.B, III.D, IV.A). They take 4 ms for a hundred datasets: a process with
the HDF5 library, which `hdf5_files` needs for all others, takes 180, a third of packing 91 MB. Whatever is of another kind,
or looks wrong, is left to that library: here is no second opinion on faults, only `_Other`.
"""

import math
import struct
from collections.abc import Iterator

from tzip.formats.containers import ContainerError, Contents, Read, Region, View, check
from tzip.formats.dtypes import BY_NAME, Dtype

NAME = "hdf5"
MAX_METADATA = 1 << 25  # some 3 s, when all of it are the smallest structures
MAX_OBJECTS = 100_000
MAX_DEPTH = 64
MAX_CHUNKS = 1 << 18
_PIECE = 2048  # bytes read at a time; h5py gives structures places in blocks of as many
_LEAST = 64  # what reading a structure costs, if it has fewer bytes
_NAME = 1 << 16  # bytes of a name
_NOWHERE = (1 << 64) - 1
_MAX_RANK, _MAX_HEIGHT = 32, 16

_SUPERBLOCK = struct.Struct("<8s8B2HL6Q4x4x16x")
_HEADER = struct.Struct("<BxHLL4x")  # version, messages, references, bytes
_MESSAGE = struct.Struct("<HHB3x")  # kind, bytes, flags
_NODE = struct.Struct("<4sBBH16x")  # signature, kind, level, entries
_HEAP = struct.Struct("<4sB3xQ8xQ")  # signature, version, bytes of names, their address
_TABLE = struct.Struct("<4sBxH")  # signature, version, entries
_SYMBOL = struct.Struct("<QQL20x")  # name, object, what is cached
_PAIR = struct.Struct("<QQ")

_SPACE, _TYPE, _EXTERNAL, _LAYOUT, _FILTERS, _CONTINUED, _SYMBOLS = 0x01, 0x03, 0x07, 0x08, 0x0B, 0x10, 0x11
_OTHERS = {0x00, 0x04, 0x05, 0x0C, 0x0D, 0x0E, 0x12}  # gaps, values that fill, attributes, comments, times
_SHARED = 0x02
_GROUP_TREE, _CHUNK_TREE = 0, 1
_SOFT = 2
_COMPACT, _CONTIGUOUS, _CHUNKED = 0, 1, 2
_NUMBERS = {0, 1, 6, 8}  # integers, floats, records (complex numbers), enumerations (booleans)


def _integer(nbytes: int, signed: bool) -> bytes:
    return struct.pack("<BBHLHH", 0x10, 8 * signed, 0, nbytes, 0, 8 * nbytes)


def _float(nbytes: int, exponent: int) -> bytes:
    bits, fraction = 8 * nbytes, 8 * nbytes - exponent - 1
    fields = (fraction, exponent, 0, fraction, (1 << (exponent - 1)) - 1)
    return struct.pack("<BBBxLHH4BL", 0x11, 0x20, bits - 1, nbytes, 0, bits, *fields)


def _complex(part: bytes, nbytes: int) -> bytes:
    members = [struct.pack("<8sL28x", name, at) + part for name, at in ((b"r", 0), (b"i", nbytes))]
    return struct.pack("<BHxL", 0x16, 2, 2 * nbytes) + b"".join(members)


_TYPES = {
    **{_integer(n, signed): BY_NAME[f"{'UI'[signed]}{8 * n}"] for n in (1, 2, 4, 8) for signed in (False, True)},
    _float(2, 5): BY_NAME["F16"],
    _float(4, 8): BY_NAME["F32"],
    _float(8, 11): BY_NAME["F64"],
    _complex(_float(4, 8), 4): BY_NAME["C64"],
    _complex(_float(8, 11), 8): BY_NAME["C128"],
    struct.pack("<BHxL", 0x18, 2, 1) + _integer(1, True) + b"FALSE\0\0\0TRUE\0\0\0\0\0\1": BY_NAME["BOOL"],
}


class _Other(Exception):  # noqa: N818 # no error
    """The file is not plain, or not whole."""


class Datasets:
    """What is found in a file that begins at `base`; offsets count from there."""

    def __init__(self, base: int, max_chunks: int) -> None:
        self.base = base
        self.found = Contents(NAME)
        self.chunks_left = max_chunks

    def empty(self, name: str, dtype: Dtype, shape: tuple[int, ...]) -> None:
        """Add a dataset without elements."""
        self.found.tensors.append(View(name, dtype, shape, self.base))

    def contiguous(self, name: str, dtype: Dtype, shape: tuple[int, ...], offset: int, nbytes: int) -> None:
        """Add a dataset in one piece. Raises ContainerError when its bytes are more or fewer than its elements."""
        if nbytes != dtype.nbytes(math.prod(shape)):
            raise ContainerError(f"dataset {name!r} has {nbytes} bytes, not {dtype.nbytes(math.prod(shape))}")
        self._add(offset, nbytes, dtype, shape)
        self.found.tensors.append(View(name, dtype, shape, self.base + offset))

    def chunked(
        self,
        name: str,
        dtype: Dtype,
        shape: tuple[int, ...],
        chunk: tuple[int, ...],
        stored: list[tuple[tuple[int, ...], int, int]],
    ) -> None:
        """Add the chunks, (first element, offset, bytes) each, as regions, and the dataset as a tensor when they lie one after
        the other like its rows. Raises ContainerError when one has another size, or there are too many.
        """
        self.chunks_left -= len(stored)
        if self.chunks_left < 0:
            raise ContainerError("it has more chunks than are looked at")
        nbytes = dtype.nbytes(math.prod(chunk))
        runs: list[list[int]] = []  # chunks that touch are one region: a dataset of small ones is not a thousand
        for _, offset, n in sorted(stored, key=lambda one: one[1]):
            if n != nbytes:
                raise ContainerError(f"dataset {name!r} has a chunk of {n} bytes, not {nbytes}")
            if runs and runs[-1][1] == offset:
                runs[-1][1] += nbytes
            else:
                runs.append([offset, offset + nbytes])
        for begin, end in runs:
            self._add(begin, end - begin, dtype, chunk)
        starts = [(first[0], offset) for first, offset, _ in sorted(stored)]
        like_rows = len(runs) == 1 and starts == [(i * chunk[0], runs[0][0] + i * nbytes) for i in range(len(stored))]
        if like_rows and len(stored) * chunk[0] >= shape[0] and all(c >= n for c, n in zip(chunk[1:], shape[1:], strict=True)):
            strides = None
            if chunk[1:] != shape[1:]:  # chunks may be wider than the data
                strides = tuple(math.prod(chunk[i + 1 :]) for i in range(len(chunk)))
            self.found.tensors.append(View(name, dtype, shape, self.base + runs[0][0], strides))

    def _add(self, offset: int, nbytes: int, dtype: Dtype, shape: tuple[int, ...]) -> None:
        begin = self.base + offset
        self.found.regions.append(Region(begin, begin + nbytes, dtype, shape[-1] if len(shape) > 1 else 0))


def plain(read: Read, base: int, size: int) -> Contents | None:
    """Return the datasets of an HDF5 file whose signature is at byte `base`, None when the library has to look at it."""
    walk = _Walk(read, base, size)
    try:
        walk.object(walk.root(), b"", 0)
        found = walk.datasets.found
        found.regions.sort(key=lambda r: r.begin)
        check(found, size)
    except (_Other, ContainerError):
        return None
    return found


class _Walk:
    """One walk through the groups of a file. Addresses count from the superblock."""

    def __init__(self, read: Read, base: int, size: int) -> None:
        self._read, self._base, self._end = read, base, size - base
        self._piece_at, self._piece = 0, b""
        self._left = MAX_METADATA
        self._seen: set[int] = set()
        self.datasets = Datasets(base, MAX_CHUNKS)

    def _take(self, at: int, n: int) -> bytes:
        self._left -= max(n, _LEAST)
        if self._left < 0 or at > self._end - n:
            raise _Other
        i = at - self._piece_at
        if not 0 <= i <= len(self._piece) - n:
            self._piece_at, self._piece, i = at, self._read(self._base + at, min(max(n, _PIECE), self._end - at)), 0
            if len(self._piece) < n:
                raise _Other
        return self._piece[i : i + n]

    def root(self) -> int:
        """Return the address of the root's header."""
        raw = self._take(0, _SUPERBLOCK.size)
        _, *versions, offsets, lengths, _, _, _, _, base, _, end, driver, _, root = _SUPERBLOCK.unpack(raw)
        if any(versions) or (offsets, lengths, base, driver) != (8, 8, self._base, _NOWHERE) or end > self._base + self._end:
            raise _Other
        return int(root)

    def object(self, address: int, path: bytes, depth: int) -> None:
        """Go through a group, or note a dataset."""
        messages = self._messages(address)
        if _SYMBOLS in messages and _LAYOUT not in messages:
            self._group(messages[_SYMBOLS], path + b"/" if path else b"", depth)
        elif _LAYOUT in messages and _SYMBOLS not in messages:
            self._dataset(messages, path.decode("utf-8", "replace"))
        elif _TYPE not in messages:  # a type that has a name, for datasets to share
            raise _Other

    def _messages(self, address: int) -> dict[int, bytes]:
        """Return the messages of an object that matter, by their kinds."""
        version, count, _, nbytes = _HEADER.unpack(self._take(address, _HEADER.size))
        if version != 1:
            raise _Other
        found: dict[int, bytes] = {}
        blocks = [(address + _HEADER.size, nbytes)]
        for at, n in blocks:
            raw = self._take(at, n)
            i = 0
            while i < n and count:
                if i + _MESSAGE.size > n:
                    raise _Other
                kind, length, flags = _MESSAGE.unpack_from(raw, i)
                i += _MESSAGE.size
                body = raw[i : i + length]
                i += length
                count -= 1
                if i > n or flags & _SHARED or kind in found:
                    raise _Other
                if kind == _CONTINUED and length >= _PAIR.size:
                    blocks.append(_PAIR.unpack_from(body))
                elif kind in (_SPACE, _TYPE, _EXTERNAL, _LAYOUT, _FILTERS, _SYMBOLS):
                    found[kind] = body
                elif kind not in _OTHERS:
                    raise _Other
        if count:
            raise _Other
        return found

    def _group(self, message: bytes, path: bytes, depth: int) -> None:
        if depth > MAX_DEPTH or len(message) < _PAIR.size:
            raise _Other
        tree, heap = _PAIR.unpack_from(message)
        signature, version, nbytes, address = _HEAP.unpack(self._take(heap, _HEAP.size))
        if signature != b"HEAP" or version:
            raise _Other
        names, last = self._take(address, nbytes), b""
        for _, table in self._leaves(tree, _GROUP_TREE, 8):
            signature, version, count = _TABLE.unpack(self._take(table, _TABLE.size))
            if signature != b"SNOD" or version != 1:
                raise _Other
            for at, item, cached in _SYMBOL.iter_unpack(self._take(table + _TABLE.size, count * _SYMBOL.size)):
                end = names.find(b"\0", at, at + _NAME)
                name = names[at:end] if 0 <= at < end else b""
                if name <= last or b"/" in name or name == b"." or cached > _SOFT:
                    raise _Other  # they ascend, so that the library finds by its name what is listed
                last = name
                if cached == _SOFT or item in self._seen:
                    continue
                self._seen.add(item)
                if len(self._seen) > MAX_OBJECTS:
                    raise _Other
                self._left -= len(path) + len(name)
                self.object(item, path + name, depth + 1)

    def _leaves(self, address: int, kind: int, key: int, level: int | None = None) -> Iterator[tuple[bytes, int]]:
        """Yield (key, child) of the lowest nodes of a tree whose keys have `key` bytes."""
        signature, found, height, count = _NODE.unpack(self._take(address, _NODE.size))
        if signature != b"TREE" or found != kind or height > _MAX_HEIGHT or (level is not None and height != level):
            raise _Other
        raw = self._take(address + _NODE.size, count * (key + 8))
        for i in range(0, len(raw), key + 8):
            child = int.from_bytes(raw[i + key : i + key + 8], "little")
            if height:
                yield from self._leaves(child, kind, key, height - 1)
            else:
                yield raw[i : i + key], child

    def _dataset(self, messages: dict[int, bytes], name: str) -> None:
        space, kind, layout = (messages.get(m, b"").ljust(64, b"\0") for m in (_SPACE, _TYPE, _LAYOUT))
        if layout[0] != 3 or layout[1] > _CHUNKED:
            raise _Other
        if layout[1] == _COMPACT or _FILTERS in messages or _EXTERNAL in messages:
            return
        dtype = next((dtype for start, dtype in _TYPES.items() if kind.startswith(start)), None)
        if dtype is None:
            if kind[0] & 15 in _NUMBERS:
                raise _Other
            return
        version, rank, flags = space[:3]
        if version != 1 or flags > 1 or rank > _MAX_RANK or len(space) < 8 + 8 * rank:
            raise _Other
        shape = struct.unpack_from(f"<{rank}Q", space, 8)
        if math.prod(n or 1 for n in shape) >= 1 << 63:
            raise _Other
        if 0 in shape:
            self.datasets.empty(name, dtype, shape)
        elif layout[1] == _CONTIGUOUS:
            offset, nbytes = _PAIR.unpack_from(layout, 2)
            if offset != _NOWHERE:  # never written: its elements have no bytes
                self.datasets.contiguous(name, dtype, shape, offset, nbytes)
        else:
            self._chunks(layout, name, dtype, shape)

    def _chunks(self, layout: bytes, name: str, dtype: Dtype, shape: tuple[int, ...]) -> None:
        rank = len(shape)
        if layout[2] != rank + 1 or not rank or len(layout) < 11 + 4 * (rank + 1):
            raise _Other
        tree, *chunk, width = struct.unpack_from(f"<Q{rank + 1}L", layout, 3)
        if width != dtype.bits // 8 or 0 in chunk:
            raise _Other
        key = struct.Struct(f"<LL{rank + 1}Q")  # bytes, filters left out, first element
        stored: list[tuple[tuple[int, ...], int, int]] = []
        for raw, offset in self._leaves(tree, _CHUNK_TREE, key.size) if tree != _NOWHERE else ():
            nbytes, _, *first, last = key.unpack(raw)
            if last or len(stored) == MAX_CHUNKS:
                raise _Other
            stored.append((tuple(first), offset, nbytes))
        self.datasets.chunked(name, dtype, shape, tuple(chunk), stored)
