"""The files of `torch.save` and `torch.jit.save`: where their storages lie and which tensors use them.

They are a zip archive of a pickle and a record a storage or, before PyTorch 1.6 and still on request, pickles in a row that
the storages follow. (Those from before 2017 are tar archives, which this module does not know.) A pickle is read here,
never executed. Every storage of a known type is a region. Tensors are named by the way to them from the pickle's root:
keys, indices and attributes joined by dots, those of a module as in its state_dict. What is rebuilt in another way than
from a storage alone has no name: quantised and sparse tensors, those of subclasses, complex ones that are kept conjugated.
"""

from dataclasses import dataclass, field
from typing import cast

from tzip.formats.containers import ContainerError, Contents, Read, Region, Unique, View
from tzip.formats.dtypes import BY_NAME, Dtype
from tzip.formats.opcodes import MAX_BYTES, Stream
from tzip.formats.pickles import Global, Map, load, reached
from tzip.formats.zip_files import STORED, entries

NAME = "torch"

_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of the older form
_PROTOCOL = 1001  # the second
_TAIL = 1 << 16  # bytes at the end of an archive that show whose it is
_NAMES = 100_000_000  # characters of all names
_DIMENSIONS = 64
_NO_ROWS = (0, 0)

_STORAGES = {  # whether the name says what the bytes are used as
    name: (BY_NAME[dtype], name != "Untyped")
    for name, dtype in {
        "Float": "F32", "Double": "F64", "Half": "F16", "BFloat16": "BF16", "ComplexFloat": "C64", "ComplexDouble": "C128",
        "Byte": "U8", "Char": "I8", "Short": "I16", "Int": "I32", "Long": "I64", "Bool": "BOOL",
        "QInt8": "I8", "QUInt8": "U8", "QInt32": "I32", "QUInt4x2": "U8", "QUInt2x4": "U8", "Untyped": "U8",
    }.items()
}  # fmt: skip
_USUAL = {f"torch.{name}Storage": found for name, found in _STORAGES.items()}
_DTYPES = {
    "torch.float32": "F32", "torch.float64": "F64", "torch.float16": "F16", "torch.bfloat16": "BF16",
    "torch.complex64": "C64", "torch.complex128": "C128", "torch.bool": "BOOL",
    "torch.uint8": "U8", "torch.uint16": "U16", "torch.uint32": "U32", "torch.uint64": "U64",
    "torch.int8": "I8", "torch.int16": "I16", "torch.int32": "I32", "torch.int64": "I64",
    "torch.float8_e4m3fn": "F8_E4M3", "torch.float8_e4m3fnuz": "F8_E4M3FNUZ", "torch.float8_e5m2": "F8_E5M2",
    "torch.float8_e5m2fnuz": "F8_E5M2FNUZ", "torch.float8_e8m0fnu": "F8_E8M0", "torch.float4_e2m1fn_x2": "F4",
}  # fmt: skip
_Tuple = tuple[object, ...]
_TENSORS = {f"torch._utils._rebuild_tensor{v}" for v in ("", "_v2", "_v3")}
_FIRST = {  # functions whose result is their first argument, as far as its bytes go
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch.jit._pickle.build_tensorlist",
    "torch.jit._pickle.restore_type_tag",
}
_BASES = {"torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}
_TRANSPARENT = {"_parameters", "_buffers", "_modules"}  # attributes of a module that its state_dict's names leave out


@dataclass(slots=True, eq=False, repr=False)
class _Tensor:
    """Elements of a storage; the offset and the strides count them."""

    storage: "_Storage"
    dtype: Dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    span: int  # bytes from the first element to the last


@dataclass(slots=True, eq=False, repr=False)
class _Storage:
    """`size` bytes, somewhere in the file. The dtype is what the pickle says, U8 when it says nothing.

    `used` has, by the names of types, the bytes that tensors use as them; `rows` the span of the largest row-major table and
    the length of its rows. (The tensors themselves would make cycles, which the garbage collector had to find.)
    """

    dtype: Dtype
    size: int
    used: dict[str, int]
    rows: dict[str, tuple[int, int]] = field(default_factory=dict)
    begin: int | None = None


@dataclass(slots=True, eq=False, repr=False)
class _Slice:
    """A storage from its element `first` on: what a persistent id stands for."""

    storage: _Storage
    first: int


def find(read: Read, size: int) -> Contents | None:
    """Return what a file of PyTorch holds, None when it is none."""
    head = read(0, 512)
    if head[:4] == b"PK\3\4":
        return _find_zip(read, size, head)
    if _MAGIC.to_bytes(10, "little") in head[:32] or str(_MAGIC).encode() in head[:32]:
        return _find_pickles(read, size)
    return None


def _find_pickles(read: Read, size: int) -> Contents:
    stream, reader = Stream(read, 0, size), _Reader()
    magic, protocol, _, root, keys = (load(stream, reader.call, reader.persistent) for _ in range(5))
    if not isinstance(magic, int) or magic != _MAGIC or not isinstance(protocol, int) or protocol != _PROTOCOL:
        raise ContainerError("its first pickles are not those of torch.save")
    if not isinstance(keys, list):
        raise ContainerError("its storages are not listed")
    at = stream.at  # whatever machine wrote what follows, torch writes and reads it little-endian
    for key in keys:
        storage = reader.storages.get(key) if isinstance(key, str) else None
        if storage is None or storage.begin is not None:
            raise ContainerError("it lists a storage that its pickle does not have, or lists it twice")
        count = int.from_bytes(read(at, 8), "little")
        if count * _width(storage.dtype) != storage.size or storage.size > size - at - 8:
            raise ContainerError(f"the storage at {at} has {count} elements: not those of its pickle, or not all are there")
        storage.begin = at + 8
        at += 8 + storage.size
    return _contents([(reader, None, root)], [])


def _find_zip(read: Read, size: int, head: bytes) -> Contents | None:
    first = head[30 : 30 + int.from_bytes(head[26:28], "little")]
    begins = first.endswith(b"/data.pkl")
    tail = b"" if begins else read(max(0, size - _TAIL), _TAIL)
    if not begins and b"/data.pkl" not in tail and b"/constants.pkl" not in tail:
        return None  # torch.save writes the pickle first, torch.jit.save the constants near the end
    try:
        listed = entries(read, size)
    except ContainerError:
        if begins:
            raise
        return None
    records = {entry.name: entry for entry in listed}
    folder = listed[0].name.partition("/")[0] if listed else ""  # all records of torch lie in one
    pickles = [name for name in ("data", "constants") if f"{folder}/{name}.pkl" in records]
    if not pickles or not {f"{folder}/version", f"{folder}/.data/version"} & records.keys():
        return None
    if len(records) < len(listed):
        raise ContainerError("two of its records have the same name")
    order = records.get(f"{folder}/byteorder")
    if order and read(order.begin, min(order.end - order.begin, 16)) != b"little":
        return Contents(NAME, warnings=["its numbers are big-endian: they are kept as bytes"])
    parts: list[tuple[_Reader, str | None, object]] = []
    warnings: list[str] = []
    for name in pickles:
        reader, record = _Reader(), records[f"{folder}/{name}.pkl"]
        if record.method != STORED or record.end - record.begin > MAX_BYTES:
            raise ContainerError(f"its {name}.pkl is compressed or larger than {MAX_BYTES} bytes")
        root = load(Stream(read, record.begin, record.end), reader.call, reader.persistent)
        parts.append((reader, None if name == "data" else name, root))
        for key, storage in reader.storages.items():
            place = records.get(f"{folder}/{name}/{key}")
            if place is None or (place.method == STORED and place.end - place.begin != storage.size):
                raise ContainerError(f"its record {name}/{key[:100]!r} is not there, or has not {storage.size} bytes")
            if place.method == STORED:
                storage.begin = place.begin
            elif not warnings:
                warnings.append("it has compressed records: their tensors are kept as bytes")
    return _contents(parts, warnings)


class _Reader:
    """Makes storages and tensors of what a pickle says."""

    def __init__(self) -> None:
        self.storages: dict[str, _Storage] = {}

    def persistent(self, pid: object) -> object:
        """Return the storage that a persistent id names; torch has no others, but old files name the source of a class."""
        # Plain tests: matching patterns took twice the time, here and in `call`, which was a seventh of that for a whole file.
        if not isinstance(pid, tuple) or len(pid) < 2 or not isinstance(pid[1], Global):
            raise ContainerError("it has a persistent id that names no storage")
        if pid[0] == "module":
            return pid[1]
        tag, _, key, _, count = pid[:5] if len(pid) >= 5 else (None,) * 5
        if tag != "storage" or not isinstance(key, str) or not isinstance(count, int) or not 0 <= count < 1 << 63:
            raise ContainerError("it has a persistent id that names no storage")
        kind = pid[1].name
        found = _USUAL.get(kind) or _STORAGES.get(kind.rpartition(".")[2].lstrip("_").removesuffix("Storage"))
        if found is None:
            raise ContainerError(f"it has a storage of the unknown type {kind[:100]!r}")
        dtype, typed = found
        size = count * _width(dtype)
        storage = self.storages.get(key)
        if storage is None:
            storage = self.storages[key] = _Storage(dtype, size, {dtype.name: 0} if typed else {})
        elif storage.size != size:
            raise ContainerError(f"its storage {key[:100]!r} has two sizes")
        match pid[5:]:
            case () | (None,):
                return _Slice(storage, 0)
            case ((_, int(first), int(part)),) if 0 <= first <= first + part <= count:
                return _Slice(storage, first)  # a part of a storage, as the older form has them
        raise ContainerError(f"its storage {key[:100]!r} has an unknown part")

    def call(self, name: str, arguments: _Tuple) -> object:
        """Return the tensor, or what is around it, that a function rebuilds; None when the function is not known."""
        if name not in _TENSORS:
            if name in ("torch._tensor._rebuild_from_type_v2", "torch._tensor._rebuild_from_type"):
                match arguments:
                    case (Global(name=inner), Global(name=kind), tuple() as theirs, *_) if kind in _BASES:
                        name, arguments = inner, theirs
            if name in _FIRST and arguments:
                return arguments[0]
            if name not in _TENSORS:
                return None
        # … whether it requires a gradient, hooks, its type in v3, whether it is to be conjugated or negated
        if len(arguments) < 4:
            return None
        dtype: Dtype | None
        part, offset, shape, strides = arguments[:4]
        rest = arguments[6:]
        if not isinstance(part, _Slice) or not isinstance(offset, int):
            return None
        if rest and isinstance(rest[0], Global):
            dtype = BY_NAME.get(_DTYPES.get(rest[0].name, ""))
        else:
            dtype = part.storage.dtype
        for mark in rest:
            if isinstance(mark, Map) and mark.pairs:
                return None
        sizes, steps = _sizes(shape), _sizes(strides)
        if dtype is None or sizes is None or steps is None or len(sizes) != len(steps) or not 0 <= offset < 1 << 63:
            return None
        return self._tensor(part, dtype, offset, sizes, steps)

    def _tensor(self, part: _Slice, dtype: Dtype, offset: int, sizes: tuple[int, ...], steps: tuple[int, ...]) -> _Tensor:
        plain, elements, last = True, 1, 0  # … row-major without gaps; the last element counts from the first
        for n, step in zip(reversed(sizes), reversed(steps), strict=True):
            if step != elements and n != 1:
                plain = False
            elements *= n
            last += (n - 1) * step
        storage, name, width = part.storage, dtype.name, _width(dtype)
        span = (last + 1) * width if elements else 0
        plain = plain or not elements
        tensor = _Tensor(storage, dtype, part.first + offset, sizes, None if plain else steps, span)
        if span and tensor.offset * width + span > storage.size:
            raise ContainerError("it has a tensor that reaches beyond its storage")
        used, rows = storage.used, storage.rows
        used[name] = used.get(name, 0) + span
        if plain and len(sizes) > 1 and (name not in rows or span > rows[name][0]):
            rows[name] = (span, _elements(tensor)[-1])
        return tensor


def _width(dtype: Dtype) -> int:
    """Return the bytes of what torch counts as an element; two of 4 bits are one."""
    return max(1, dtype.bits // 8)


def _sizes(values: object) -> tuple[int, ...] | None:
    if not isinstance(values, tuple) or len(values) > _DIMENSIONS:
        return None
    for v in values:
        if not isinstance(v, int) or not 0 <= v < 1 << 63:
            return None
    return cast("tuple[int, ...]", values)


def _contents(parts: list[tuple[_Reader, str | None, object]], warnings: list[str]) -> Contents:
    regions = [r for reader, _, _ in parts for s in reader.storages.values() if (r := _region(s)) is not None]
    regions.sort(key=lambda region: region.begin)  # they are disjoint: each storage has a record or a place of its own
    tensors: list[View] = []
    names, total = Unique(), 0
    for _, top, root in parts:
        for path, tensor in reached(root, _Tensor, top, _TRANSPARENT):
            name = "tensor" if path is None else path
            begin = tensor.storage.begin
            if begin is None or not _is_seen(tensor):
                continue
            if not name.isascii() and name.encode(errors="ignore").decode() != name:
                continue  # a lone surrogate has no UTF-8 form
            total += len(name)
            if total > _NAMES:
                raise ContainerError(f"the names of its tensors have more than {_NAMES} characters")
            tensors.append(_view(names.name(name), tensor, begin))
    return Contents(NAME, regions, tensors, warnings=warnings)


def _region(storage: _Storage) -> Region | None:
    """Return the region of a storage, of the type that most of its bytes are used as; that type is then the storage's."""
    if storage.begin is None or not storage.used:
        return None
    name = max(storage.used, key=storage.used.__getitem__) if len(storage.used) > 1 else next(iter(storage.used))
    storage.dtype = dtype = BY_NAME[name]
    size = storage.size - storage.size % _width(dtype)
    _, row = storage.rows.get(name, _NO_ROWS)
    return Region(storage.begin, storage.begin + size, dtype, row) if size else None


def _elements(tensor: _Tensor) -> tuple[int, ...]:
    """Return the shape; torch counts two numbers of 4 bits as one element."""
    return (*tensor.shape[:-1], 2 * tensor.shape[-1]) if tensor.dtype.bits == 4 else tensor.shape


def _is_seen(tensor: _Tensor) -> bool:
    """Whether it can be read as a view of the region of its storage."""
    if tensor.dtype is not tensor.storage.dtype:
        return False
    return tensor.dtype.bits != 4 or (tensor.strides is None and tensor.shape != ())  # halves of bytes have no strides


def _view(name: str, tensor: _Tensor, begin: int) -> View:
    """Return a tensor of a storage that begins there, under a name."""
    at = begin + min(tensor.offset * _width(tensor.dtype), tensor.storage.size)  # only an empty tensor may lie beyond
    return View(name, tensor.dtype, _elements(tensor), at, tensor.strides)
