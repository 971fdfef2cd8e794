"""ONNX models: where in the protobuf message the bytes of the tensors lie, which no protobuf library tells.

A model is a message of nested messages; only the few fields that lead to tensors are walked, all others are stepped over by
their length. Elements lie plain in `raw_data` and in packed lists of floats and doubles; lists of integers are varints, of no
fixed size, and stay bytes. protobuf has no magic: a file is a model when its outermost message reads as one to its last byte.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from tzip.formats.containers import ContainerError, Contents, Read, Region, Unique, View
from tzip.formats.dtypes import BY_NAME, Dtype

NAME = "onnx"
MAX_METADATA = 100_000_000  # bytes read beside the tensors' own, and bytes of names
MAX_FIELDS = 4_000_000  # of models; a forest of decision trees, which may have more, has no tensors
MAX_TENSORS = 1 << 18
MAX_MESSAGES = 100  # within each other: protobuf's own limit
MAX_DIMS = 64
_JUMP, _STEP = 256, 1 << 16  # bytes read after a jump, and at most when reading on

DTYPES = {
    1: "F32", 2: "U8", 3: "I8", 4: "U16", 5: "I16", 6: "I32", 7: "I64", 9: "BOOL", 10: "F16", 11: "F64", 12: "U32", 13: "U64",
    14: "C64", 15: "C128", 16: "BF16", 17: "F8_E4M3", 18: "F8_E4M3FNUZ", 19: "F8_E5M2", 20: "F8_E5M2FNUZ", 23: "F4",
    24: "F8_E8M0", 27: "F6_E2M3", 28: "F6_E3M2",
}  # fmt: skip
PACKED = {21: 4, 22: 4, 25: 2, 26: 2}  # integer types without a name of ours: their bits

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types
_MODEL = {1: VARINT, 5: VARINT} | dict.fromkeys((2, 3, 4, 6, 7, 8, 14, 20, 25, 26), BYTES)  # what fields of a model look like
_IR_VERSION, _GRAPH, _REPEATED = 1, 7, {8, 14, 20, 25, 26}
_INTO = {  # the fields of a message that lead to tensors
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
}
_DIMS, _DATA_TYPE, _SEGMENT, _FLOATS, _NAME, _RAW, _DOUBLES, _EXTERNAL, _LOCATION = 1, 2, 3, 4, 8, 9, 10, 13, 14
_ELEMENTS = {_RAW: (), _FLOATS: (1, 14), _DOUBLES: (11, 15)}  # fields of plain elements, and the types they are for


class External(NamedTuple):
    """A tensor in another file. The location is what the model says: it may be absolute, climb or not exist."""

    location: str
    offset: int
    length: int
    name: str
    dtype: Dtype
    shape: tuple[int, ...]


class _Field(NamedTuple):
    number: int
    wire: int
    begin: int  # of its bytes
    end: int
    value: int  # of a varint


class _Tensor(NamedTuple):
    name: str
    kind: int
    dims: tuple[int, ...]
    data: _Field | None
    begin: int  # of the message
    outside: dict[str, str]


def find(read: Read, size: int) -> Contents | None:
    """Return the tensors that an ONNX model itself holds, None for any other file."""
    message = _model(read, size)
    if message is None:
        return None
    contents, names = Contents(NAME), Unique()
    for tensor in message.tensors("Model", 0, size, "", 0):
        placed = None if tensor.outside else _placed(tensor)
        if placed is None:
            continue
        region, view = placed
        if region.end > region.begin:
            contents.regions.append(region)
        contents.tensors.append(View(names.name(view.name), view.dtype, view.shape, view.begin))
    return contents


def external(read: Read, size: int) -> list[External]:
    """Return the tensors of an ONNX model that lie in other files; those of unknown types or wrong lengths are left out."""
    message = _model(read, size)
    found = []
    for tensor in message.tensors("Model", 0, size, "", 0) if message else ():
        typed = _typed(tensor.kind, tensor.dims)
        location, offset, length = (tensor.outside.get(key, "") for key in ("location", "offset", "length"))
        if not location or typed is None:
            continue
        dtype, shape, nbytes = typed
        if re.fullmatch(r"[0-9]{0,18} [0-9]{0,18}", f"{offset} {length}") and int(length or nbytes) == nbytes:
            found.append(External(location, int(offset or 0), nbytes, tensor.name, dtype, shape))
    return found


def _model(read: Read, size: int) -> "_Message | None":
    """Return the file as a message when its outermost fields are those of a model, to the end and in sensible numbers."""
    if len(head := read(0, 2)) < 2 or head[0] != _IR_VERSION << 3 | VARINT or not 1 <= head[1] < 128:
        return None  # fields are written in the order of their numbers, by all that write them
    seen = set[int]()
    try:
        for field in _Message(read, size, MAX_TENSORS).fields(0, size):
            if _MODEL.get(field.number) != field.wire or (field.number in seen and field.number not in _REPEATED):
                return None
            seen.add(field.number)
    except ContainerError:
        return None
    return _Message(read, size, MAX_FIELDS) if _GRAPH in seen else None


class _Message:
    """Reads fields, by position; what is stepped over is not read."""

    def __init__(self, read: Read, size: int, max_fields: int) -> None:
        self.read, self.size = read, size
        self.window, self.start = b"", 0
        self.left, self.fields_left, self.tensors_left = MAX_METADATA, max_fields, MAX_TENSORS

    def fields(self, begin: int, end: int) -> Iterator[_Field]:
        """Walk the fields of the message in bytes begin … end - 1."""
        at = begin
        while at < end:
            self.fields_left -= 1
            if self.fields_left < 0:
                raise ContainerError("it has too many fields")
            key, at = self._varint(at, end)
            number, wire, value = key >> 3, key & 7, 0
            begin = at
            if wire == VARINT:
                value, at = self._varint(at, end)
            elif wire == BYTES:
                length, begin = self._varint(at, end)
                at = begin + length
            elif wire in (FIXED64, FIXED32):
                at += 8 if wire == FIXED64 else 4
            else:
                raise ContainerError(f"it has a field of wire type {wire} at {begin}")
            if at > end or not number:
                raise ContainerError(f"the field at {begin} does not fit")
            yield _Field(number, wire, begin, at, value)

    def tensors(self, kind: str, begin: int, end: int, label: str, depth: int) -> Iterator[_Tensor]:
        """Walk the tensors in a message, in the file's order. `label` names those without a name: node and attribute."""
        if depth > MAX_MESSAGES:
            raise ContainerError(f"it has more than {MAX_MESSAGES} messages within each other")
        into, outer, node = _INTO[kind], label, ""
        for field in self.fields(begin, end):
            if field.wire != BYTES:
                continue
            inner = into.get(field.number)
            if inner == "Tensor":
                yield self._tensor(field, label)
            elif inner:
                yield from self.tensors(inner, field.begin, field.end, label, depth + 1)
            elif kind == "Node" and (field.number == 3 or (field.number == 2 and not node)):  # its name, or its first result
                label = node = self._text(field) or node
            elif kind == "Attribute" and field.number == 1:
                self._spend(len(outer))
                label = f"{outer}.{self._text(field)}" if outer else self._text(field)

    def _tensor(self, message: _Field, label: str) -> _Tensor:
        self.tensors_left -= 1
        if self.tensors_left < 0:
            raise ContainerError(f"it has more than {MAX_TENSORS} tensors")
        name, kind, away = "", 0, False
        dims, outside = list[int](), dict[str, str]()
        data = list[_Field]()
        for field in self.fields(message.begin, message.end):
            if field.number == _DIMS and len(dims) <= MAX_DIMS:
                dims += [field.value] if field.wire == VARINT else self._varints(field)
            elif field.number == _DATA_TYPE:
                kind = field.value
            elif field.number == _NAME:
                name = self._text(field)
            elif field.number in _ELEMENTS and field.wire == BYTES:
                data.append(field)
            elif field.number == _EXTERNAL and field.wire == BYTES and len(outside) < 16:
                pair = {f.number: self._text(f) for f in self.fields(field.begin, field.end) if f.wire == BYTES}
                outside[pair.get(1, "")] = pair.get(2, "")
            elif field.number == _LOCATION:
                away = field.value == 1
            elif field.number == _SEGMENT:
                kind = -1  # it is a part of a tensor
        if len(dims) > MAX_DIMS:
            raise ContainerError(f"tensor {name!r} has more than {MAX_DIMS} dimensions")
        self._spend(len(name or label))
        if len(data) > 1:
            kind = -1  # which of them count, and whether together, is not worth knowing
        return _Tensor(name or label, kind, tuple(dims), data[0] if data else None, message.begin, outside if away else {})

    def _varints(self, field: _Field) -> Iterator[int]:
        at = field.begin
        for _ in range(MAX_DIMS + 1):
            if at == field.end:
                return
            value, at = self._varint(at, field.end)
            yield value

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        """Return the number at a position, and the position after it."""
        value = shift = 0
        while True:
            if at >= end:
                raise ContainerError(f"a number at {at} does not fit")
            i = at - self.start
            if not 0 <= i < len(self.window):
                self._load(at)
                i = 0
            byte = self.window[i]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value & 0xFFFF_FFFF_FFFF_FFFF, at
            if shift > 63:
                raise ContainerError(f"a number at {at} has more than 10 bytes")

    def _text(self, field: _Field) -> str:
        n = field.end - field.begin
        self._spend(n)
        i = field.begin - self.start
        raw = self.window[i : i + n] if 0 <= i <= len(self.window) - n else self.read(field.begin, n)
        if len(raw) < n:
            raise ContainerError(f"it ends before {field.end}")
        return raw.decode("utf-8", "replace")

    def _load(self, at: int) -> None:
        """Read the window anew: little after a jump, ever more when reading on."""
        n = min(2 * len(self.window), _STEP) if at == self.start + len(self.window) else _JUMP
        self.window, self.start = self.read(at, min(max(n, _JUMP), self.size - at)), at
        self._spend(len(self.window))
        if not self.window:
            raise ContainerError(f"it ends before {at}")

    def _spend(self, n: int) -> None:
        self.left -= n
        if self.left < 0:
            raise ContainerError(f"it holds more than {MAX_METADATA} bytes beside its tensors")


def _typed(kind: int, dims: tuple[int, ...]) -> tuple[Dtype, tuple[int, ...], int] | None:
    """Return type, shape and bytes of a tensor. Without a type of ours, or in a broken byte, it is a row of bytes."""
    elements = math.prod(dims)
    if math.prod(n or 1 for n in dims) >= 1 << 63 or (kind not in DTYPES and kind not in PACKED):
        return None
    bits = PACKED[kind] if kind in PACKED else BY_NAME[DTYPES[kind]].bits
    nbytes = -(-elements * bits // 8)
    if kind in PACKED or elements * bits % 8:
        return BY_NAME["U8"], (nbytes,), nbytes
    return BY_NAME[DTYPES[kind]], dims, nbytes


def _placed(tensor: _Tensor) -> tuple[Region, View] | None:
    """Return where a tensor lies, None when its elements are not plain or not there."""
    typed, data = _typed(tensor.kind, tensor.dims), tensor.data
    if typed is None:
        return None
    dtype, shape, nbytes = typed
    if data is None:
        data = _Field(_RAW, BYTES, tensor.begin, tensor.begin, 0)
        if nbytes:
            return None
    types = _ELEMENTS[data.number]
    if data.end - data.begin != nbytes or (types and tensor.kind not in types):
        raise ContainerError(f"tensor {tensor.name!r} has {data.end - data.begin} bytes, not {nbytes}, or is of another type")
    row = shape[-1] if len(shape) > 1 else 0
    return Region(data.begin, data.end, dtype, row), View(tensor.name, dtype, shape, data.begin)
