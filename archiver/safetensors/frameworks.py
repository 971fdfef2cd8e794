"""From bytes to the tensors of a framework, whole or indexed.

numpy's and torch's tensors are made here. For all other frameworks, and for the indexing that the library does itself,
the bytes go into a file in memory that holds one tensor, and the library reads that: its results and errors are the right ones.
"""

import contextlib
import functools
import json
import mmap
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors import SafetensorError

from tzip.coders.arrays import U8
from tzip.formats.dtypes import BY_NAME, Dtype
from tzip.safetensors.opening import GENUINE_OPEN

_NAMES = {"torch": "pt", "pytorch": "pt", "numpy": "np"}
Read = Callable[[int, int], U8]  # bytes begin … end - 1 of a tensor, in fresh memory
Load = Callable[[int, int, tuple[int, ...]], Any]  # the same, as a torch tensor of that shape on a GPU


def named(framework: str) -> str:
    """Return the one name of a framework that is known by several."""
    return _NAMES.get(framework, framework)


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as its file has it."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        elements = 1
        for n in self.shape:
            elements *= n
        return self.dtype.nbytes(elements)


@dataclass(frozen=True, slots=True)
class Target:
    """What tensors are wanted: framework, device and backend as `safe_open` takes them."""

    framework: str
    device: Any = "cpu"
    backend: str = "mmap"


def gpu(target: Target, stored: Stored) -> Any:
    """Return the GPU that can decode a tensor for this target, or None: then it is decoded on the CPU and copied.

    Where the target is a GPU that cannot decode, a warning says why: loading is slower so.
    """
    name = f"cuda:{target.device}" if isinstance(target.device, int) else str(target.device)
    kind, _, ordinal = name.partition(":")
    if target.framework != "pt" or kind != "cuda" or stored.dtype.bits % 8:
        return None
    _torch_form(stored)  # raises what the library does for a type that torch lacks
    import torch

    from tzip.gpu import available

    number = int(ordinal) if ordinal else torch.cuda.current_device()
    found = available(number)
    if not found:
        warnings.warn(f"tensors for cuda:{number} are decoded on the CPU: {found}", stacklevel=3)
        return None
    return f"cuda:{number}"


def tensor(target: Target, stored: Stored, raw: U8) -> Any:
    """Return the tensor whose bytes are `raw`, shape (nbytes,), which becomes its memory where that is possible."""
    if target.framework == "pt":
        dtype, shape = _torch_form(stored)
        return _to_device(_torch_tensor(raw, dtype, shape), target.device)
    if target.framework == "np":
        return _numpy_tensor(stored, raw)
    return _by_the_library(target, stored, lambda begin, end: raw[begin:end], None)


def part(target: Target, stored: Stored, index: Any, read: Read, load: Load | None = None) -> Any:
    """Return tensor[index], reading little more than the rows that the index touches, or loading them to where they belong.

    torch's tensors are indexed by torch, as those that the library maps into memory are; all others by the library, which
    has rules of its own.
    """
    # The library of 0.8.0 cannot index elements of half a byte.
    by_torch = target.framework == "pt" and (target.backend == "mmap" or stored.dtype.bits % 8)
    if not by_torch:
        if target.framework == "np" and (stored.dtype.bits % 8 or not hasattr(os, "memfd_create")):
            return _numpy_tensor(stored, read(0, stored.nbytes))[index]
        if target.framework == "np" and stored.dtype.name.startswith("F8_"):  # which the library of 0.8.0 does not find
            plain = Stored(stored.name, BY_NAME["U8"], stored.shape)
            return _by_the_library(target, plain, read, index, indexed=True).view(stored.dtype.numpy())
        return _by_the_library(target, stored, read, index, indexed=True)
    import torch

    dtype, shape = _torch_form(stored)
    if _is_simple(index):  # raise what the index deserves before anything is decoded
        torch.empty(shape, dtype=dtype, device="meta")[index]
    span = _span(index, shape, 8 * dtype.itemsize)
    if load is not None:
        return load(0, stored.nbytes, shape)[index] if span is None else load(span.begin, span.end, span.shape)[span.index]
    if span is None:
        return _to_device(_torch_tensor(read(0, stored.nbytes), dtype, shape)[index], target.device)
    block = _torch_tensor(read(span.begin, span.end), dtype, span.shape)
    return _to_device(block[span.index], target.device)


# ---------------------------------------------------------------- numpy and torch


def _numpy_tensor(stored: Stored, raw: U8) -> Any:
    dtype = stored.dtype.numpy()
    if dtype is None:
        raise SafetensorError(f"Dtype not understood: {stored.dtype.name}")
    if stored.dtype.bits == 4:  # numpy holds one element a byte
        raw = np.stack((raw & 15, raw >> 4), axis=-1).reshape(-1)
    return raw.view(dtype).reshape(stored.shape)


@functools.cache
def torch_dtypes() -> dict[str, Any]:
    """Return torch's types by their names in files."""
    import torch
    from safetensors import torch as theirs

    known = dict(getattr(theirs, "_TYPES", {}))
    for name, attribute in (("F8_E8M0", "float8_e8m0fnu"), ("F4", "float4_e2m1fn_x2")):  # which the table of 0.8.0 lacks
        if hasattr(torch, attribute):
            known.setdefault(name, getattr(torch, attribute))
    return known


def _torch_form(stored: Stored) -> tuple[Any, tuple[int, ...]]:
    """Return torch's dtype and shape; those of float4 count pairs of elements."""
    dtype = torch_dtypes().get(stored.dtype.name)
    if dtype is None:
        raise SafetensorError(f"Dtype not understood: {stored.dtype.name}")
    if stored.dtype.bits != 4:
        return dtype, stored.shape
    if not stored.shape or stored.shape[-1] % 2:
        shown = list(stored.shape)
        raise SafetensorError(f"f4_x2 dtype requires that the last dim be divisible by 2 in torch: got {shown}")
    return dtype, (*stored.shape[:-1], stored.shape[-1] // 2)


def _torch_tensor(raw: U8, dtype: Any, shape: tuple[int, ...]) -> Any:
    import torch

    if not raw.size:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(raw).view(dtype).reshape(shape)


def _to_device(made: Any, device: Any) -> Any:
    return made if device == "cpu" else made.to(device=device)


# ---------------------------------------------------------------- what an index touches


@dataclass(frozen=True, slots=True)
class _Span:
    """Bytes begin … end - 1 of a tensor hold all that an index touches; as a tensor of `shape` they are indexed by `index`."""

    begin: int
    end: int
    shape: tuple[int, ...]
    index: tuple[Any, ...]


def _span(index: Any, shape: tuple[int, ...], bits: int) -> _Span | None:
    """Return what an index of integers, slices, None and ... touches; None for any other, and for an invalid one.

    Integers narrow one dimension after the other; the first slice ends it.
    """
    items = index if isinstance(index, tuple) else (index,)
    if not _is_simple(index):
        return None
    fixed: list[int] = []
    for item in items:
        if len(fixed) == len(shape) or not _is_integer(item):
            break
        n = shape[len(fixed)]
        if not -n <= item < n:
            return None
        fixed.append(int(item) % n)
    depth = len(fixed)
    low, high = 0, shape[depth] if depth < len(shape) else 1
    first: tuple[slice, ...] = ()
    if depth < min(len(items), len(shape)) and isinstance(items[depth], slice):
        wanted = items[depth]
        if not all(limit is None or _is_integer(limit) for limit in (wanted.start, wanted.stop, wanted.step)):
            return None
        if wanted.step is not None and wanted.step <= 0:
            return None
        rows = range(*wanted.indices(shape[depth]))
        low, high = (rows[0], rows[-1] + 1) if rows else (0, 0)
        first = (slice(0, high - low, rows.step),)
    inner = bits
    for n in shape[depth + 1 :]:
        inner *= n
    before = 0
    for n, i in zip(shape, fixed, strict=False):
        before = before * n + i
    if depth < len(shape):
        before *= shape[depth]
    else:
        inner = bits
    if (before + low) * inner % 8 or (before + high) * inner % 8:
        return None
    block = (1,) * depth + ((high - low, *shape[depth + 1 :]) if depth < len(shape) else ())
    rest = (*(0,) * depth, *first, *items[depth + len(first) :])
    return _Span((before + low) * inner // 8, (before + high) * inner // 8, block, rest)


def _is_simple(index: Any) -> bool:
    items = index if isinstance(index, tuple) else (index,)
    return all(item is None or item is Ellipsis or isinstance(item, slice) or _is_integer(item) for item in items)


def _is_integer(item: Any) -> bool:
    return isinstance(item, int | np.integer) and not isinstance(item, bool)


# ---------------------------------------------------------------- the library, on a file in memory


def _by_the_library(target: Target, stored: Stored, read: Read, index: Any, *, indexed: bool = False) -> Any:
    """Have the library read a file that holds this tensor alone; of an indexed one only the part that the index touches."""
    import ml_dtypes  # noqa: F401 (so that numpy knows bfloat16, and the library finds it)

    span = _span(index, stored.shape, stored.dtype.bits) if indexed else None
    begin, end = (0, stored.nbytes) if span is None else (span.begin, span.end)
    entry = {"dtype": stored.dtype.name, "shape": list(stored.shape), "data_offsets": [0, stored.nbytes]}
    text = json.dumps({stored.name: entry}).encode()
    header = (len(text) + -len(text) % 8).to_bytes(8, "little") + text + b" " * (-len(text) % 8)
    with memory_file(len(header) + stored.nbytes) as (path, write):
        write(0, np.frombuffer(header, np.uint8))
        if end > begin:
            write(len(header) + begin, read(begin, end))
        # Versions before 0.8 know no backends; with 0.8.0 and paddle only the default one works.
        backend = {"backend": target.backend} if target.framework == "pt" and target.backend != "mmap" else {}
        with GENUINE_OPEN(path, target.framework, target.device, **backend) as opened:
            return opened.get_slice(stored.name)[index] if indexed else opened.get_tensor(stored.name)


@contextlib.contextmanager
def memory_file(size: int) -> "Iterator[tuple[str, Callable[[int, U8], None]]]":
    """Make a file of `size` zeros that has a path; yield that and write(offset, bytes). What maps it keeps it alive.

    It lies in memory on Linux, in the folder for temporary files elsewhere; there it is for odd frameworks alone.
    """
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("tzip", os.MFD_CLOEXEC)
        try:
            os.truncate(fd, size)
            with mmap.mmap(fd, size) as room:

                def write(offset: int, data: U8) -> None:
                    room[offset : offset + data.size] = memoryview(data)

                yield f"/proc/self/fd/{fd}", write
        finally:
            os.close(fd)
        return
    with tempfile.TemporaryDirectory(prefix="tzip-") as folder:
        path = os.path.join(folder, "tensor.safetensors")
        with open(path, "w+b") as file:
            file.truncate(size)

            def write(offset: int, data: U8) -> None:
                file.seek(offset)
                file.write(memoryview(data))
                file.flush()

            yield path, write
