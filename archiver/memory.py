"""One tensor in memory: an archive with a single bare tensor (FORMAT.md, section 9)."""

import ctypes
import io
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from tzip.archive import Archive
from tzip.coders.errors import CorruptError, UsageError
from tzip.formats.dtypes import BY_NAME, OPAQUE, Dtype, from_numpy
from tzip.packing import Options, Packer
from tzip.workers import Workers, thread_count


def encode(
    array: Any,
    *,
    level: str = "default",
    dtype: str | None = None,
    threads: int | None = 1,
    prove: bool = True,
    out: Any = None,
) -> bytes | memoryview:
    """Return a tensor as an archive in memory.

    `array`: anything that `numpy.asarray` takes, any memory order; dtypes are numpy's and ml_dtypes' (a float4 array
    is stored two elements a byte). `dtype`: the safetensors name of the elements of a uint8 array that holds the bytes
    of a type which numpy cannot name (F6_E2M3, F6_E3M2) or that should come back as another type.
    `out`: a writable bytes-like object to put it into; the part of it that the archive takes is returned as a memoryview.
    It needs the tensor's bytes, a thousandth of them and 8 KiB. (Memory that the process has already is worth it: for
    fresh bytes of 30 MB the system takes longer than the coder.)
    `prove=False` leaves out decoding each chunk and comparing it with its source; its sums are there all the same.
    Raises UsageError for dtypes without a place in the format (object, structured, strings, big-endian), or when
    `out` is too small.
    """
    values = np.asarray(array)
    if dtype is not None:
        element, shape, raw = _named(values, dtype)
    else:
        found = from_numpy(values.dtype)
        if found is None:
            hint = "; convert it with .astype(a.dtype.newbyteorder('='))" if not values.dtype.isnative else ""
            raise UsageError(f"arrays of {values.dtype!r} have no element type in the format{hint}")
        element, shape = found, values.shape
        flat = np.ascontiguousarray(values).reshape(-1)
        raw = flat.view(np.uint8) if flat.size else np.empty(0, np.uint8)
        if element.bits == 4:
            raw = _pack_nibbles(raw)
    sink = _Pieces() if out is None else _Into(out)
    with Workers(thread_count(threads)) as workers:
        packer = Packer(cast(BinaryIO, sink), workers, Options(level, sha256=False, prove=prove))
        packer.add_tensor("tensor", raw, element, shape)
        packer.finish()
    return sink.result()


class _Pieces(io.RawIOBase):
    """Keeps what is written, unchanged from then on, piece by piece: a buffer that grows is copied by the system.

    (30 MB: 13 milliseconds, against 5 for joining the pieces.)
    """

    def __init__(self) -> None:
        self.pieces: list[Any] = []

    def write(self, data: Any) -> int:
        self.pieces.append(data)
        return len(data)

    def result(self) -> bytes:
        return _join(self.pieces)


_HUGE = 1 << 22  # bytes from which pages of 2 MB are asked for, as numpy does
_MADV_HUGEPAGE = 14  # Linux


def _join(pieces: Sequence[Any]) -> bytes:
    """Return the pieces as one bytes object, in huge pages where the system has them.

    The system clears a page of 4 KB when it is first touched, 2 to 4 GB/s; huge ones are three times as fast to get
    (encoding 45 MB of float16: 39 -> 28 milliseconds). The C API allows to fill a bytes object that is new.
    """
    size = sum(len(p) for p in pieces)
    advise = _advise()
    if size < _HUGE or advise is None:
        return b"".join(pieces)
    new, address = ctypes.pythonapi.PyBytes_FromStringAndSize, ctypes.pythonapi.PyBytes_AsString
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_ssize_t)
    address.restype, address.argtypes = ctypes.c_void_p, (ctypes.py_object,)
    joined: bytes = new(None, size)
    start = address(joined)
    first = -(-start // 4096) * 4096
    advise(first, (start + size - first) // 4096 * 4096, _MADV_HUGEPAGE)  # advice: it does not matter if it is refused
    room = np.frombuffer((ctypes.c_uint8 * size).from_address(start), np.uint8)
    at = 0
    for piece in pieces:
        room[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
        at += len(piece)
    return joined


@cache
def _advise() -> Any:
    """Return madvise(2), None where there is none."""
    if sys.platform != "linux" or sys.implementation.name != "cpython":
        return None
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    if advise is not None:
        advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return advise


class _Into(io.RawIOBase):
    """Writes into a buffer of the caller's."""

    def __init__(self, out: Any) -> None:
        try:
            self.view = memoryview(out).cast("B")
        except TypeError:
            raise UsageError("out must be a contiguous bytes-like object") from None
        if self.view.readonly:
            raise UsageError("out must be writable")
        self.at = 0

    def write(self, data: Any) -> int:
        end = self.at + len(data)
        if end > len(self.view):
            raise UsageError(f"out has {len(self.view)} bytes, which the archive does not fit")
        # numpy lets other threads run while it copies, a memoryview does not.
        np.frombuffer(self.view, np.uint8)[self.at : end] = np.frombuffer(data, np.uint8)
        self.at = end
        return len(data)

    def result(self) -> memoryview:
        return self.view[: self.at]


def _named(values: NDArray[Any], dtype: str) -> tuple[Dtype, tuple[int, ...], NDArray[np.uint8]]:
    element = BY_NAME.get(dtype)
    if element is None or element is OPAQUE:
        raise UsageError(f"there is no element type {dtype!r}; there are {', '.join(sorted(BY_NAME))}")
    if values.dtype != np.uint8:
        raise UsageError(f"dtype={dtype!r} takes the elements' bytes as uint8, not {values.dtype}")
    raw = np.ascontiguousarray(values).reshape(-1)
    if raw.size * 8 % element.bits:
        raise UsageError(f"{raw.size} bytes are no whole number of {dtype} elements")
    last = raw.size * 8 // element.bits
    if values.ndim > 1 and values.shape[-1] * 8 % element.bits == 0:
        return element, (*values.shape[:-1], values.shape[-1] * 8 // element.bits), raw
    return element, (last,), raw


def _pack_nibbles(raw: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if raw.size % 2:
        raise UsageError("a float4 array needs an even number of elements: files hold two a byte")
    if (raw > 15).any():
        raise UsageError("a float4 array has bits outside its four; they would be lost")
    return (raw[::2] | (raw[1::2] << 4)).astype(np.uint8)


def decode(buffer: Any, out: NDArray[Any] | None = None, *, threads: int | None = 1) -> NDArray[Any]:
    """Return the tensor that `encode` made, proven by its sums.

    `buffer`: a bytes-like object (or path, or binary file). `out`: a C-contiguous array of the same dtype and shape to
    fill and return; it is unspecified after an error. F6 tensors, which numpy cannot name, come back as their bytes.
    Raises CorruptError and its kin, UnsupportedError, or UsageError when `out` does not fit.
    """
    with Archive(buffer) as archive:
        if len(archive.reader.index.tensor_names) != 1:
            raise CorruptError(f"the archive holds {len(archive.reader.index.tensor_names)} tensors, not one")
        view = archive.tensor("")
        nameless = view.element_type.numpy() is None
        if out is None:
            return view.raw(threads) if nameless else view.read(threads)
        shape, dtype = ((view.nbytes,), np.dtype(np.uint8)) if nameless else (view.shape, view.dtype)
        if out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous or not out.flags.writeable:
            raise UsageError(f"out must be a writable C-contiguous array of {dtype} and shape {shape}")
        if view.element_type.bits == 4:
            out[...] = view.read(threads)
        else:
            archive.tensor_bytes_into(0, out.reshape(-1).view(np.uint8), threads)
        return out
