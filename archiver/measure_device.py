"""How fast tensors come to a GPU: decoding alone, loading a packed file, and loading the plain one.

Decoding is timed by the device's clock, from the jobs' copy to the last kernel, sums, tables and escapes included; loading by
the wall, with the file in the page cache, and again after the system was asked to drop it.
"""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tzip.archive import Archive
from tzip.archive import open as open_archive
from tzip.chunks import SLACK
from tzip.coders.arrays import U8
from tzip.coders.errors import CorruptError, UsageError
from tzip.gpu import Device, available
from tzip.gpu.decoder import MOST_JOBS, ROOM, Batch, Item, LeftToCpuError, failure, most_scratch
from tzip.gpu.jobs import Blob
from tzip.packing import pack
from tzip.plan import LEVELS


@dataclass(frozen=True, slots=True)
class DeviceFigures:
    """Of a level: bytes of tensors and of the archive; bytes of tensors a second of decoding alone and of loading, with the
    file in the page cache and read from storage (0: it cannot be dropped from the cache here); of loading the plain file.
    """

    level: str
    bytes_in: int
    bytes_out: int
    decode: float
    load: float
    load_cold: float
    plain: float
    plain_cold: float


def measure_device(
    path: Any, device: Any = "cuda:0", *, levels: tuple[str, ...] = tuple(LEVELS), sample: int = 1 << 30, repeat: int = 3
) -> list[DeviceFigures]:
    """Pack a safetensors file at every level and load it to a device, best of `repeat` runs.

    `device`: a GPU's name, or a `tzip.gpu.Device`. Chunks of `sample` bytes at most are decoded alone. Every tensor is compared
    with its source. Raises UsageError where there is no such device.
    """
    target = device
    if isinstance(device, str):
        kind, _, ordinal = device.partition(":")
        if kind != "cuda" or (ordinal and not ordinal.isdecimal()):
            raise UsageError(f"device {device!r}: cuda and cuda:0, cuda:1 … are known")
        found = available(int(ordinal or 0))
        if not found:
            raise UsageError(f"cannot measure on {device}: {found}")
        from tzip.gpu.cupy_device import CupyDevice

        target = CupyDevice(int(ordinal or 0))
    plain, plain_cold = _both(Path(path), lambda: _load_plain(Path(path), target), repeat)
    figures = []
    with tempfile.TemporaryDirectory(prefix="tzip-bench-") as folder:
        for level in levels:
            packed = Path(folder) / f"{level}.tzip"
            pack(path, packed, level=level)
            with open_archive(packed) as archive:
                _compare(archive, target)
                size = sum(archive.view(row).nbytes for row in range(len(archive.shapes)))
                decode = _decode_alone(archive, target, sample, repeat)
                warm, cold = _both(packed, lambda archive=archive: _load_packed(archive, target), repeat)  # type: ignore[misc]
            speeds = [size / s if s else 0.0 for s in (warm, cold, plain, plain_cold)]
            figures.append(DeviceFigures(level, size, packed.stat().st_size, decode, *speeds))
    return figures


def _both(path: Path, work: Callable[[], object], repeat: int) -> tuple[float, float]:
    """Return the best times with the file in the page cache, and without (0: the system does not drop it)."""
    work()
    warm = min(_timed(work) for _ in range(repeat))
    if not hasattr(os, "posix_fadvise"):
        return warm, 0.0
    cold = []
    for _ in range(repeat):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        cold.append(_timed(work))
    return warm, min(cold)


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return max(time.perf_counter() - start, 1e-9)


def _load_packed(archive: Archive, device: Device) -> None:
    kept = archive.load(device)
    device.wait(device.mark("work"))
    del kept


def _load_plain(path: Path, device: Any) -> None:
    """Load with the safetensors library where torch has the GPU; else read into pinned memory and copy."""
    if device.name.startswith("cuda"):
        try:
            import torch
            from safetensors.torch import load_file
        except ImportError:
            pass
        else:
            if torch.cuda.is_available():
                kept = load_file(path, device=device.name)
                torch.cuda.synchronize(device.name)
                del kept
                return
    size = path.stat().st_size
    memory, host = device.take(size), device.pinned(size)
    with open(path, "rb", buffering=0) as file:
        at = 0
        while at < size:
            at += file.readinto(memoryview(host)[at : at + (8 << 20)]) or 0
    device.upload(host, memory.address, "work")
    device.wait(device.mark("work"))


def _compare(archive: Archive, device: Any) -> None:
    for name, loaded in archive.load(device).items():
        raw = loaded.get() if hasattr(loaded, "get") else loaded
        if not np.array_equal(np.ascontiguousarray(raw).reshape(-1).view(np.uint8), archive.tensor(name).raw()):
            raise CorruptError("tzip is at fault: the device gives other bytes than the CPU").at(tensor=name)


def _decode_alone(archive: Archive, device: Any, sample: int, repeat: int) -> float:
    """Return the bytes of elements a second of decoding records that are on the device; 0 when none can be decoded there."""
    reader = archive.reader
    index = reader.index
    chosen: list[tuple[int, int, U8, int, int, int, int]] = []
    staged = output = 0
    for run in range(len(index["r_width"])):
        for chunk in range(int(index.run_chunks[run])):
            elements, width = reader.chunk_elements(run, chunk), int(index["r_width"][run])
            if output + elements * width > sample or int(index["r_inputs"][run]):
                continue
            buffer, length, check = reader.read_chunk(run, chunk, SLACK)
            chosen.append((run, chunk, buffer[: length + SLACK].copy(), length, elements, width, check))
            staged += -(-length // 128) * 128
            output += -(-elements * width // 256) * 256
    scratch = device.take(sum(most_scratch(e * w) for *_, e, w, _ in chosen))
    jobs = 4 * MOST_JOBS + 8192 * len(chosen)
    memory, out, room = device.take(staged + ROOM), device.take(output), device.take(jobs)
    batch = Batch((scratch.address, scratch.nbytes), Blob(device.pinned(jobs), room.address), memory.address + memory.nbytes)
    at = to = decoded = 0
    for run, chunk, buffer, length, elements, width, check in chosen:
        device.upload(buffer[:length], memory.address + at, "work")
        try:
            batch.add(Item(buffer, length, memory.address + at, run, chunk, elements, width, check, out.address + to))
        except LeftToCpuError:
            continue
        at += -(-length // 128) * 128
        to += -(-elements * width // 256) * 256
        decoded += elements * width
    if not decoded:
        return 0.0
    batch.plan()
    seconds: list[float] = []
    for _ in range(repeat + 1):  # the first run loads the kernels
        first = device.mark("work")
        batch.launch(device)
        last = device.mark("work")
        device.wait(last)
        seconds.append(device.elapsed(first, last))
    codes = batch.codes(device)
    device.wait(device.mark("work"))
    for item, code in zip(batch.items, codes.tolist(), strict=True):
        if code:
            raise failure(item, code)
    return float(decoded / max(min(seconds), 1e-9))
