"""Tensors for the device and framework that the caller names: numpy's and torch's on the CPU, CuPy's and torch's on a GPU."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tzip.coders.arrays import U8
from tzip.coders.errors import TzipError, UnsupportedError, UsageError
from tzip.formats.catalogue import STRIDED
from tzip.formats.dtypes import Dtype
from tzip.formats.layout import CHUNK_ELEMENTS
from tzip.formats.reader import ArchiveReader
from tzip.workers import thread_count

# torch's names of types; those that numpy knows, too, have the same ones.
_TORCH = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F4": "float4_e2m1fn_x2",
    "I16": "int16", "U16": "uint16", "F16": "float16", "BF16": "bfloat16", "I32": "int32", "U32": "uint32", "F32": "float32",
    "C64": "complex64", "F64": "float64", "I64": "int64", "U64": "uint64", "C128": "complex128",
}  # fmt: skip
FRAMEWORKS = ("np", "pt", "cupy")


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a tensor: which one, what it is, and bytes begin … end - 1 of it, which have that shape."""

    row: int
    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of these rows."""
        return self.end - self.begin


class Tensors(Protocol):
    """What loading needs of an archive."""

    reader: ArchiveReader

    def read_into(self, wanted: "Sequence[tuple[int, int, U8]]", threads: int | None) -> None:
        """Fill byte arrays with parts of tensors: (row, first byte, array) each."""
        ...

    def spans(self, row: int, begin: int, size: int) -> Iterator[tuple[int, int, int, int, int]]:
        """Yield (run, chunk, first and last byte in it, which byte of the part that is)."""
        ...

    def in_chunks(self, row: int) -> bool:
        """Whether the bytes of a tensor lie in chunks as they are: not inline, and not strided."""
        ...

    def decode_chunk(self, run: int, chunk: int, out: U8 | None = None) -> U8:
        """Return the bytes of a chunk, decoded on the CPU into `out`."""
        ...

    def base_bytes(self, run: int, chunk: int) -> U8:
        """Return the base bytes of a chunk."""
        ...

    def input_spans(self, run: int) -> list[tuple[int, int, str]]:
        """Return what the inputs of a run are for: (first byte of the run, bytes, name of the tensor)."""
        ...

    def placed(self, error: TzipError, row: int) -> TzipError:
        """Return the error with the tensor's name and place added."""
        ...


def load(
    archive: Tensors,
    parts: Sequence[Part],
    device: Any,
    framework: str | None,
    stream: Any,
    threads: int | None,
    bases: Mapping[str, Any] | None = None,
) -> list[Any]:
    """Return the parts as arrays or tensors on a device; see `Archive.load`."""
    if not isinstance(device, str) and hasattr(device, "launch"):
        return _on_device(archive, parts, device, framework or "cupy", threads, bases)
    kind, ordinal = _parse(device)
    if framework is None:
        framework = "np" if kind == "cpu" else "cupy"
    if framework not in FRAMEWORKS:
        raise UsageError(f"framework {framework!r}: {', '.join(FRAMEWORKS)} are known")
    if kind == "cpu":
        if framework == "cupy":
            raise UsageError("CuPy's arrays are on a GPU: name one, as device='cuda:0'")
        return _on_cpu(archive, parts, framework, threads)
    if framework == "np":
        raise UsageError("numpy's arrays are in main memory: device='cpu'")
    from tzip.gpu import available

    found = available(ordinal)
    if not found:
        return _around(archive, parts, f"cuda:{ordinal}", framework, str(found), threads)
    from tzip.gpu.cupy_device import CupyDevice

    if stream is None and framework == "pt":
        import torch

        stream = torch.cuda.current_stream(ordinal).cuda_stream
    return _on_device(archive, parts, CupyDevice(ordinal, stream), framework, threads, bases)


def _parse(device: Any) -> tuple[str, int]:
    """Return cpu or cuda, and the number of the GPU; `device` is a name or what has one, as torch's devices do."""
    kind, _, ordinal = str(device).partition(":")
    if kind not in ("cpu", "cuda") or (ordinal and not ordinal.isdecimal()) or (kind == "cpu" and ordinal not in ("", "0")):
        raise UsageError(f"device {device!r}: cpu, cuda and cuda:0, cuda:1 … are known")
    return kind, int(ordinal or 0)


def _on_cpu(archive: Tensors, parts: Sequence[Part], framework: str, threads: int | None) -> list[Any]:
    finish = _torch_tensor if framework == "pt" else _numpy_array
    for part in parts:
        _check_form(part, framework)
    raw = [np.empty(part.nbytes, np.uint8) for part in parts]
    archive.read_into([(part.row, part.begin, out) for part, out in zip(parts, raw, strict=True)], threads)
    return [finish(part, out) for part, out in zip(parts, raw, strict=True)]


def _around(
    archive: Tensors, parts: Sequence[Part], device: str, framework: str, reason: str, threads: int | None
) -> list[Any]:
    """Decode on the CPU for a GPU that cannot decode: torch can still copy there. Raises UsageError when it cannot."""
    if framework == "pt":
        import torch

        if torch.cuda.is_available():
            warnings.warn(f"tensors for {device} are decoded on the CPU: {reason}", stacklevel=4)
            return [tensor.to(device) for tensor in _on_cpu(archive, parts, "pt", threads)]
    raise UsageError(f"cannot load to {device}: {reason}")


def _base_finder(archive: Tensors, device: Any, bases: Mapping[str, Any] | None) -> Callable[[int, int], int]:
    """Return what says where on the device the base bytes of a chunk are: 0 unless all are in one tensor that was given."""
    index = archive.reader.index
    starts = np.concatenate([[0], np.cumsum(index["r_inputs"])])
    places: dict[str, tuple[int, int]] = {name: device.place_of(array) for name, array in (bases or {}).items()}

    def find(run: int, chunk: int) -> int:
        width = int(index["r_width"][run])
        begin = chunk * CHUNK_ELEMENTS * width
        end = begin + archive.reader.chunk_elements(run, chunk) * width
        # Raises where a role is not known. Bases come before the inputs of other roles.
        for i, (first, length, name) in enumerate(archive.input_spans(run), int(starts[run])):
            address, size = (0, 0) if i in index.inner_tensors else places.get(name, (0, 0))
            if first <= begin and end <= first + length <= first + size and (address + begin - first) % width == 0:
                return address + begin - first
        return 0

    return find


def _on_device(
    archive: Tensors, parts: Sequence[Part], device: Any, framework: str, threads: int | None, bases: Mapping[str, Any] | None
) -> list[Any]:
    from tzip.gpu.ring import Ring, Use, Wanted

    for part in parts:
        _check_form(part, framework)
    memories = [device.take(part.nbytes) for part in parts]
    uses: dict[tuple[int, int], list[Use]] = {}
    rows: dict[tuple[int, int], int] = {}
    whole: list[tuple[Part, Any]] = []
    strided = 0
    for part, memory in zip(parts, memories, strict=True):
        if not part.nbytes:
            continue
        if not archive.in_chunks(part.row):
            whole.append((part, memory))
            strided += int(archive.reader.index["t_layout"][part.row]) == STRIDED
            continue
        for run, chunk, low, high, at in archive.spans(part.row, part.begin, part.nbytes):
            uses.setdefault((run, chunk), []).append(Use(low, high, memory.address + at))
            rows.setdefault((run, chunk), part.row)

    def placer(row: int) -> Callable[[TzipError], TzipError]:
        return lambda error: archive.placed(error, row)

    in_file = sorted(uses, key=lambda place: archive.reader.chunk_at(*place))
    wanted = [Wanted(*place, uses[place], placer(rows[place])) for place in in_file]
    for part, memory in whole:  # a few bytes in a member record, or elements to be put in order
        raw = np.empty(part.nbytes, np.uint8)
        archive.read_into([(part.row, part.begin, raw)], threads)
        device.upload(raw, memory.address, "work")
        device.wait(device.mark("work"))
    told = [f"{strided} of {len(parts)} tensors (strided)"] if strided else []
    if wanted:
        finder = _base_finder(archive, device, bases)
        count = min(thread_count(threads), 8)
        with Ring(device, archive.reader, archive.decode_chunk, archive.base_bytes, finder, count) as ring:
            ring.load(wanted)
        if ring.counts.cpu:
            total = ring.counts.cpu + ring.counts.device
            told.append(f"{ring.counts.cpu} of {total} chunks ({', '.join(sorted(ring.counts.reasons))})")
    if told:
        warnings.warn(f"decoded on the CPU, not on {device.name}: {'; '.join(told)}", stacklevel=4)
    device.join()
    return [_device_tensor(part, memory, device, framework) for part, memory in zip(parts, memories, strict=True)]


# ---- from bytes to arrays


def _check_form(part: Part, framework: str) -> None:
    """Raise UnsupportedError when the framework has no such type or shape."""
    what = {"np": "numpy", "pt": "torch", "cupy": "CuPy"}[framework]
    missing = part.dtype.numpy() is None
    if framework == "pt":
        import torch

        missing = not hasattr(torch, _TORCH.get(part.dtype.name, ""))
    if missing:
        raise UnsupportedError(f"{what} has no dtype for {part.dtype.name}; read its bytes with raw()").at(tensor=part.name)
    if part.dtype.bits == 4 and framework != "np" and (not part.shape or part.shape[-1] % 2):
        raise UnsupportedError(f"{what} holds pairs of 4-bit elements, and the last dimension is odd").at(tensor=part.name)


def _paired(part: Part) -> tuple[int, ...]:
    """Return the shape as frameworks have it that hold two elements of 4 bits in one."""
    return (*part.shape[:-1], part.shape[-1] // 2) if part.dtype.bits == 4 else part.shape


def _numpy_array(part: Part, raw: U8) -> Any:
    if part.dtype.bits == 4:  # ml_dtypes holds one element a byte; files hold two, the first in the low half
        raw = np.stack((raw & 15, raw >> 4), axis=-1).reshape(-1)
    dtype = part.dtype.numpy()
    assert dtype is not None
    try:
        return raw.view(dtype).reshape(part.shape)
    except ValueError:  # numpy has a limit of its own, 32 or 64 by version
        raise UnsupportedError(f"numpy cannot hold {len(part.shape)} dimensions; read the bytes with raw()") from None


def _torch_tensor(part: Part, raw: Any) -> Any:
    """Return a torch tensor of bytes, numpy's or what DLPack takes, without a copy."""
    import torch

    dtype = getattr(torch, _TORCH[part.dtype.name])
    if not part.nbytes:
        return torch.empty(_paired(part), dtype=dtype)
    whole = torch.from_numpy(raw) if isinstance(raw, np.ndarray) else torch.from_dlpack(raw)
    return whole.view(dtype).reshape(_paired(part))


def _device_tensor(part: Part, memory: Any, device: Any, framework: str) -> Any:
    if framework == "pt":
        made = _torch_tensor(part, device.tensor(memory, 0, part.nbytes, np.dtype(np.uint8), (part.nbytes,)))
        return made.to(device.name) if not part.nbytes and device.name.startswith("cuda") else made
    dtype = part.dtype.numpy()
    assert dtype is not None
    if dtype.kind == "V":  # of ml_dtypes, which CuPy does not know: the bits, as integers
        dtype = np.dtype(f"<u{dtype.itemsize}")
    return device.tensor(memory, 0, part.nbytes, dtype, _paired(part))
