"""A device that runs the kernels of gpu/ on the host: compiled by a C++ compiler, every thread a fiber (emulation/shim.h).

It stands where CuPy does, so the binding is tested as it is. Memory that it hands out is counted.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
import weakref
from functools import cache
from pathlib import Path

import numpy as np

from tzip.chunks import SLACK
from tzip.coders.errors import UsageError
from tzip.gpu.decoder import MOST_JOBS, ROOM, Batch, Item, most_scratch
from tzip.gpu.devices import THREADS
from tzip.gpu.jobs import Blob

HERE = Path(__file__).resolve().parent / "emulation"
KERNELS = HERE.parent.parent / "gpu"
SANITIZED = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")


@cache
def build(flags: tuple[str, ...] = ("-O2",)) -> Path:
    """The compiled kernels; a test that needs them fails when there is no compiler."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    assert compiler, "the kernels are emulated with a C++ compiler, and there is no g++ (Debian: apt-get install g++)"
    sources = sorted(HERE.glob("*.*")) + sorted(KERNELS.glob("*.cuh"))
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    key = hashlib.sha256(b"".join([version, repr(flags).encode(), *(p.read_bytes() for p in sources)])).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"tzip-emulation-{os.getuid() if hasattr(os, 'getuid') else 0}"
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"{key}.so"
    if not target.exists():
        partial = folder / f"{key}-{os.getpid()}.so"
        command = [compiler, "-std=c++17", "-g", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-ffp-contract=off"]
        command += [*flags, f"-I{KERNELS}", "-o", str(partial), str(HERE / "emulate.cpp")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        os.replace(partial, target)
    return target


class Piece:
    """Memory of the emulated device."""

    def __init__(self, device: "EmulatedDevice", nbytes: int) -> None:
        self.nbytes = nbytes
        self.address = device.library.take(max(nbytes, 1))
        assert self.address
        device.count(nbytes)
        weakref.finalize(self, _give, device, self.address, nbytes)


def _give(device: "EmulatedDevice", address: int, nbytes: int) -> None:
    device.library.give(address)
    device.count(-nbytes)


class EmulatedDevice:
    """`tzip.gpu.devices.Device` on the host. `held` and `most`: bytes of its memory; `launches` by kernel."""

    name = "emulation"

    def __init__(self, flags: tuple[str, ...] = ("-O2",), *, backwards: bool = False) -> None:
        self.library = ctypes.CDLL(str(build(flags)))
        self.library.take.restype = ctypes.c_void_p
        self.library.take.argtypes = [ctypes.c_size_t]
        self.library.give.argtypes = [ctypes.c_void_p]
        self.library.refuse.argtypes = self.library.allow.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.skipped: set[str] = set()  # kernels that are not run
        self.backwards = backwards
        self.held = self.most = self.pinned_bytes = 0
        self.launches: dict[str, int] = {}
        self.uploaded = 0

    def count(self, nbytes: int) -> None:
        self.held += nbytes
        self.most = max(self.most, self.held)

    def take(self, nbytes: int) -> Piece:
        return Piece(self, nbytes)

    def pinned(self, nbytes: int) -> np.ndarray:
        self.pinned_bytes += nbytes
        return np.empty(nbytes, np.uint8)

    def upload(self, host: np.ndarray, address: int, queue: str = "copy") -> None:
        assert queue in ("copy", "work")
        assert host.flags.c_contiguous
        self.uploaded += host.nbytes
        ctypes.memmove(address, host.ctypes.data, host.nbytes)

    def download(self, address: int, host: np.ndarray) -> None:
        ctypes.memmove(host.ctypes.data, address, host.nbytes)

    def launch(self, kernel: str, blocks: int, arguments: tuple[int, ...]) -> None:
        assert blocks > 0
        assert len(arguments) == 4
        self.launches[kernel] = self.launches.get(kernel, 0) + 1
        if kernel in self.skipped:
            return
        given = (ctypes.c_ulonglong * 4)(*arguments)
        assert not self.library.emulate(kernel.encode(), blocks, THREADS[kernel], given, int(self.backwards)), kernel

    def mark(self, queue: str) -> float:
        return time.perf_counter()

    def elapsed(self, first: float, last: float) -> float:
        return last - first

    def wait(self, mark: object) -> None:
        pass

    def after(self, queue: str, mark: object) -> None:
        pass

    def join(self) -> None:
        pass

    def place_of(self, array: np.ndarray) -> tuple[int, int]:
        if not (isinstance(array, np.ndarray) and array.flags.c_contiguous):
            raise UsageError("a base is no contiguous array on emulation")
        return array.ctypes.data, array.nbytes

    def tensor(self, memory: Piece, offset: int, nbytes: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        assert offset + nbytes <= memory.nbytes
        raw = (ctypes.c_uint8 * nbytes).from_address(memory.address + offset)
        raw.memory = memory  # which lives as long as the array does
        return np.frombuffer(raw, np.uint8).view(dtype).reshape(shape)


class GuardedBatch(Batch):
    """A batch of which a sanitizer knows the pieces of scratch memory: between them nothing may be read or written."""

    library = None

    def scratch(self, nbytes: int) -> int:
        address = super().scratch(nbytes)
        if self.library is not None:
            self.library.allow(address, nbytes + 16)
        return address


def decode_on(device, record, elements, width, run=0, chunk=0, base=None, check=None):
    """Decode one chunk record on the device; returns the code that the kernels gave it and its bytes.

    Raises what the host's proofs find, and LeftToCpuError.
    """
    n = len(record)
    host = np.full(n + SLACK, 0xA5, np.uint8)
    host[:n] = np.frombuffer(bytes(record), np.uint8)
    memory, scratch = device.take(n + ROOM), device.take(most_scratch(elements * width))
    jobs, out = device.take(MOST_JOBS), device.take(elements * width)
    for piece in (memory, out):
        device.upload(np.full(piece.nbytes, 0x5A, np.uint8), piece.address, "work")
    device.upload(host[:n], memory.address, "work")
    at, given = 0, None
    if base is not None:
        given = np.frombuffer(base, np.uint8)
        earlier = device.take(max(1, given.size))
        device.upload(given, earlier.address, "work")
        at = earlier.address
    blob = Blob(np.zeros(MOST_JOBS, np.uint8), jobs.address)
    batch = GuardedBatch((scratch.address, scratch.nbytes), blob, memory.address + memory.nbytes)
    batch.library = getattr(device, "library", None)
    if batch.library is not None:
        batch.library.refuse(scratch.address, scratch.nbytes)
    try:
        check = int.from_bytes(bytes(record[8:16]), "little") if check is None else check
        batch.add(Item(host, n, memory.address, run, chunk, elements, width, check, out.address, at, given))
        batch.plan()
        batch.launch(device)
        codes = batch.codes(device)
        device.wait(device.mark("work"))
    finally:
        if batch.library is not None:
            batch.library.allow(scratch.address, scratch.nbytes)
    return int(codes[0]), on_host(device.tensor(out, 0, out.nbytes, np.dtype(np.uint8), (out.nbytes,))).tobytes()


def on_host(array):
    """An array of a device's kind as numpy's."""
    return array.get() if hasattr(array, "get") else np.asarray(array)


def make_device(skipped: tuple[str, ...] = ()):
    """The emulation, or with TZIP_TEST_DEVICE=cuda a real GPU: the same tests run there."""
    if os.environ.get("TZIP_TEST_DEVICE") != "cuda":
        device = EmulatedDevice()
        device.skipped = set(skipped)
        return device
    from tzip.gpu.cupy_device import CupyDevice

    class Lenient(CupyDevice):
        def launch(self, kernel, blocks, arguments):
            if kernel not in skipped:
                super().launch(kernel, blocks, arguments)

    return Lenient()
