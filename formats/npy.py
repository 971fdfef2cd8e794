"""numpy's own files (.npy, versions 1.0 to 3.0): one array, or several written into one file after another.

Rules as numpy's reader enforces them (2.4). Elements that have no place in the table of types stay bytes: strings, records,
long doubles, pickled objects (which are never unpickled). Of the types of ml_dtypes, which numpy writes as plain bytes, only
bfloat16 can be told: '<V2', for numpy's own bytes have no order ('|V2'). Dates and time spans are 64-bit integers.
"""

import ast
import math
import re
from dataclasses import dataclass

from tzip.formats.containers import ContainerError, Contents, Read, Region, View
from tzip.formats.dtypes import BY_NAME, Dtype

NAME = "npy"
MAGIC = b"\x93NUMPY"
MAX_HEADER = 10_000  # numpy's limit too: what its authors trust literal_eval with
MAX_HEADERS = 10_000_000  # of all arrays of a file: some seconds of parsing
MAX_DIMENSIONS = 64

_ELEMENTS = {
    "b1": "BOOL", "i1": "I8", "i2": "I16", "i4": "I32", "i8": "I64", "u1": "U8", "u2": "U16", "u4": "U32", "u8": "U64",
    "f2": "F16", "f4": "F32", "f8": "F64", "c8": "C64", "c16": "C128", "M8": "I64", "m8": "I64",
}  # fmt: skip
_DESCR = re.compile(r"([<>|=]?)(([A-Za-z])([0-9]{1,9}))(\[[^\]]*\])?")
_SIZE = "(?:0|[1-9][0-9]{0,18})"
_SHAPE = rf"\(((?:{_SIZE},|{_SIZE}(?:, {_SIZE})+)?)\)"
_USUAL = re.compile(  # as numpy writes it
    rf"\{{'descr': '([A-Za-z0-9<>|=\[\]]*)', 'fortran_order': (True|False), 'shape': {_SHAPE}, \}} *\n?"
)
_PYTHON_2_LONG = re.compile(r"(?<=[0-9])L\b")


@dataclass(frozen=True, slots=True)
class _Array:
    """An array's header: its elements lie at begin … end - 1; end is None where only numpy knows how long they are."""

    dtype: Dtype | None
    shape: tuple[int, ...]
    column_major: bool
    begin: int
    end: int | None
    warning: str | None


def find(read: Read, size: int) -> Contents | None:
    """Say where the elements are, or None when the file is none of numpy's. A single array has the name "", of several the
    first is "0".
    """
    if read(0, len(MAGIC)) != MAGIC:
        return None
    array = _parse(read, 0, size)
    arrays, warnings, headers = [array], [], array.begin
    while array.end is not None and headers <= MAX_HEADERS and read(array.end, len(MAGIC)) == MAGIC:
        try:
            following = _parse(read, array.end, size)
        except ContainerError as e:  # numpy reads the arrays before it all the same
            warnings.append(f"what follows the first {len(arrays)} arrays begins like another, but {e}: it is kept as bytes")
            break
        headers += following.begin - array.end
        array = following
        arrays.append(array)
    contents = Contents(NAME, warnings=list(dict.fromkeys([*(a.warning for a in arrays if a.warning), *warnings])))
    for i, a in enumerate(arrays):
        if a.dtype is None or a.end is None:
            continue
        if a.begin < a.end:
            contents.regions.append(Region(a.begin, a.end, a.dtype, _row(a)))
        contents.tensors.append(View("" if len(arrays) == 1 else str(i), a.dtype, a.shape, a.begin, _strides(a)))
    return contents


def _row(array: _Array) -> int:
    if len(array.shape) < 2:
        return 0
    return array.shape[0 if array.column_major else -1]


def _strides(array: _Array) -> tuple[int, ...] | None:
    if not array.column_major or sum(n > 1 for n in array.shape) < 2 or 0 in array.shape:
        return None
    return tuple(math.prod(array.shape[:i]) for i in range(len(array.shape)))


def _parse(read: Read, at: int, size: int) -> _Array:
    """Return the array whose header begins at byte `at`, which has its magic."""
    start = read(at, 12)
    version = tuple(start[6:8])
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ContainerError(f"its version {'.'.join(map(str, version))} is none of 1.0, 2.0 and 3.0")
    width = 2 if version == (1, 0) else 4
    n = int.from_bytes(start[8 : 8 + width], "little")
    begin = at + 8 + width + n
    if begin > size:
        raise ContainerError(f"its header of {n} bytes does not fit")
    if n > MAX_HEADER:
        raise ContainerError(f"its header has {n} bytes, more than {MAX_HEADER}")
    descr, column_major, shape = _header(read(at + 8 + width, n))
    if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < 1 << 63 for n in shape):
        raise ContainerError("its shape has too many dimensions, or one that is no size")
    found = _DESCR.fullmatch(descr) if isinstance(descr, str) else None
    if found is None or found[3] == "O":  # records, whose size only numpy computes, or a pickle, which has any
        return _Array(None, shape, column_major, begin, None, None)
    order, key, kind, item = found.group(1, 2, 3, 4)
    end = begin + math.prod(shape) * int(item) * (4 if kind == "U" else 1)
    if end > size:
        raise ContainerError(f"its elements end at byte {end}, the file at {size}")
    dtype = BY_NAME["BF16"] if (order, key) == ("<", "V2") else BY_NAME[_ELEMENTS[key]] if key in _ELEMENTS else None
    if dtype is None or order != ">" or dtype.bits == 8:
        return _Array(dtype, shape, column_major, begin, end, None)
    return _Array(None, shape, column_major, begin, end, f"elements of type {descr!r} are big-endian: they are kept as bytes")


def _header(raw: bytes) -> tuple[object, bool, tuple[int, ...]]:
    """Return (descr, fortran_order, shape)."""
    try:
        text = raw.decode("latin-1")  # UTF-8 in version 3.0: only names of fields differ, which nobody needs
        if usual := _USUAL.fullmatch(text):  # 3 us; for the others, Python's compiler takes 60
            return usual[1], usual[2] == "True", tuple(int(n) for n in usual[3].split(",") if n)
        try:
            header = ast.literal_eval(text)
        except SyntaxError:
            header = ast.literal_eval(_PYTHON_2_LONG.sub("", text))
        if not isinstance(header, dict) or set(header) != {"descr", "fortran_order", "shape"}:
            raise ContainerError("its header is no dictionary of descr, fortran_order and shape")
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as e:
        raise ContainerError(f"its header is invalid: {type(e).__name__}") from None
    descr, column_major, shape = header["descr"], header["fortran_order"], header["shape"]
    if not isinstance(column_major, bool) or not isinstance(shape, tuple):
        raise ContainerError("its header has fields of wrong types")
    return descr, column_major, shape
