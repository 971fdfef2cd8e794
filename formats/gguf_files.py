"""GGUF files: the header names every tensor, its data lie in the file, aligned and without overlap.

Rules as in the GGUF specification and its readers: little-endian, versions 2 and 3 (1 had narrower counts), at most 4
dimensions, the fastest one first. A tensor of a quantised type consists of blocks of a fixed number of bytes: it is listed
as rows of bytes, one a block, for an element alone has no bytes of its own there.
"""

import math
import struct

from tzip.formats.containers import ContainerError, Contents, Read, Region, Unique, View
from tzip.formats.dtypes import BY_NAME

NAME = "gguf"
MAGIC = b"GGUF"
MAX_HEADER = 100_000_000
MAX_COUNT = 1 << 18  # of tensors, of metadata, of arrays in them: the largest models have a few thousand
MAX_DIMS = 4
MAX_DEPTH = 64  # of arrays in arrays
DEFAULT_ALIGNMENT = 32

PLAIN = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
BLOCKS = {  # per type its name, the elements and the bytes of a block
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}

_UINT32, _STRING, _ARRAY = 4, 8, 9
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of the metadata's scalar types
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


def find(read: Read, size: int) -> Contents | None:
    """Return the tensors of a GGUF file, None for any other file."""
    head = read(0, 8)
    if len(head) < 8 or head[:4] != MAGIC:
        return None
    version = _U32.unpack_from(head, 4)[0]
    if version in (2, 3):
        return _contents(_Header(read, size), size)
    if 1 <= int.from_bytes(head[4:], "big") < 256:
        return Contents(NAME, warnings=["it is big-endian: kept as bytes"])
    if 1 <= version < 256:
        return Contents(NAME, warnings=[f"it is of GGUF version {version}, not 2 or 3: kept as bytes"])
    return None  # four letters do not make a text a model


class _Header:
    """Reads the header from front to back; only as much of the file is read as it turns out to be long."""

    def __init__(self, read: Read, size: int) -> None:
        self.read, self.size = read, size
        self.data = bytearray()
        self.at = 8
        self.arrays = 0

    def skip(self, n: int) -> int:
        """Pass n bytes, which are read then, and return where they began."""
        begin, self.at = self.at, self.at + n
        if self.at > len(self.data):
            self._grow()
        return begin

    def u32(self) -> int:
        """Pass a number of 4 bytes."""
        return int(_U32.unpack_from(self.data, self.skip(4))[0])

    def u64(self) -> int:
        """Pass a number of 8 bytes."""
        return int(_U64.unpack_from(self.data, self.skip(8))[0])

    def text(self) -> bytes:
        """Pass a string."""
        begin = self.skip(self.u64())
        return bytes(self.data[begin : self.at])

    def skip_value(self, kind: int) -> None:
        """Pass a value of the metadata. Every element of an array has bytes, so that counts cannot outgrow the file."""
        todo = [(kind, 1)]
        while todo:
            kind, count = todo.pop()
            if kind in _WIDTHS:
                self.skip(_WIDTHS[kind] * count)
            elif kind == _STRING:
                self._skip_strings(count)
            elif kind != _ARRAY:
                raise ContainerError(f"its metadata hold a value of unknown type {kind}")
            elif count:
                todo += [(_ARRAY, count - 1), (self.u32(), self.u64())]
                self.arrays += 1
                if len(todo) > MAX_DEPTH or self.arrays > MAX_COUNT:
                    raise ContainerError(f"its metadata hold arrays deeper than {MAX_DEPTH}, or more than {MAX_COUNT}")

    def _skip_strings(self, count: int) -> None:
        if count * 8 > self.size:
            raise ContainerError("it ends within its header")
        for _ in range(count):  # vocabularies have a million: no call a string
            at = self.at
            if at + 8 > len(self.data):
                self._grow(8)
            self.at = at + 8 + _U64.unpack_from(self.data, at)[0]
        self.skip(0)

    def _grow(self, ahead: int = 0) -> None:
        need = self.at + ahead
        if need > self.size:
            raise ContainerError("it ends within its header")
        if need > MAX_HEADER:
            raise ContainerError(f"its header has more than {MAX_HEADER} bytes")
        have = len(self.data)
        self.data += self.read(have, min(max(need, 2 * have, 1 << 16), self.size, MAX_HEADER) - have)
        if need > len(self.data):
            raise ContainerError("it ends within its header")


def _contents(header: _Header, size: int) -> Contents:
    tensors, values = header.u64(), header.u64()
    if max(tensors, values) > MAX_COUNT:
        raise ContainerError(f"it has {tensors} tensors and {values} metadata, more than {MAX_COUNT}")
    if tensors * 24 + values * 13 > size:
        raise ContainerError("its header does not fit")
    alignment = _alignment(header, values)
    infos = [_info(header) for _ in range(tensors)]
    start = -(-header.at // alignment) * alignment
    contents, names, unknown = Contents(NAME), Unique(), dict[int, int]()
    for name, shape, kind, offset in infos:
        if offset % alignment or start + offset > size:
            raise ContainerError(f"tensor {name!r} has the offset {offset}, which is not aligned or not inside")
        region, view = _place(name, shape, kind, start + offset)
        if view is None:
            unknown[kind] = unknown.get(kind, 0) + 1
            continue
        if region.end > region.begin:
            contents.regions.append(region)
        contents.tensors.append(View(names.name(name), view.dtype, view.shape, view.begin))
    contents.warnings = [f"{n} tensors of unknown type {kind}: kept as bytes" for kind, n in unknown.items()]
    contents.regions.sort(key=lambda r: r.begin)
    at = start
    for region in contents.regions:
        if region.begin < at or region.end > size:
            raise ContainerError(f"a tensor lies at {region.begin} … {region.end}, where another is or the file has ended")
        at = region.end
    return contents


def _alignment(header: _Header, values: int) -> int:
    """Pass the metadata; what they say matters here in one place only."""
    alignment = 0
    for _ in range(values):
        key, kind = header.text(), header.u32()
        if key != b"general.alignment":
            header.skip_value(kind)
            continue
        if kind != _UINT32 or alignment:
            raise ContainerError("its general.alignment is no uint32 or stands there twice")
        alignment = header.u32()
        if alignment.bit_count() != 1:
            raise ContainerError(f"its alignment of {alignment} is no power of two")
    return alignment or DEFAULT_ALIGNMENT


def _info(header: _Header) -> tuple[str, tuple[int, ...], int, int]:
    """Pass what the header says of a tensor: name, shape with the fastest dimension last, type, offset."""
    name = header.text().decode("utf-8", "replace")
    dims = header.u32()
    if dims > MAX_DIMS:
        raise ContainerError(f"tensor {name!r} has {dims} dimensions, more than {MAX_DIMS}")
    shape = [header.u64() for _ in range(dims)]
    return name, tuple(reversed(shape)), header.u32(), header.u64()


def _place(name: str, shape: tuple[int, ...], kind: int, begin: int) -> tuple[Region, View | None]:
    elements = math.prod(shape)
    if math.prod(n or 1 for n in shape) >= 1 << 63:  # also those that numpy could not name although they are empty
        raise ContainerError(f"tensor {name!r} has too many elements")
    if kind in PLAIN:
        dtype = BY_NAME[PLAIN[kind]]
        row = shape[-1] if len(shape) > 1 else 0
        return Region(begin, begin + dtype.nbytes(elements), dtype, row), View(name, dtype, shape, begin)
    dtype = BY_NAME["U8"]
    if kind not in BLOCKS:
        return Region(begin, begin, dtype), None
    kind_name, per_block, block = BLOCKS[kind]
    if not shape or shape[-1] % per_block:
        raise ContainerError(f"tensor {name!r} has the shape {shape}, whose rows are no whole blocks of {kind_name}")
    blocks = elements // per_block
    return Region(begin, begin + blocks * block, dtype, block), View(name, dtype, (blocks, block), begin)
