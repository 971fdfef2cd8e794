"""A GPU by way of CuPy: memory from its pool, kernels compiled by NVRTC on first use and cached by CuPy.

Not one line of this has run on a GPU yet (docs/GPU.md): what it hands to the kernels has, in emulation.
"""

from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np

from tzip.coders.arrays import U8
from tzip.coders.errors import UsageError
from tzip.gpu.devices import THREADS, source_text

_UPLOAD = cupy.cuda.runtime.memcpyHostToDevice
_DOWNLOAD = cupy.cuda.runtime.memcpyDeviceToHost
_modules: dict[int, Any] = {}  # by device: a module belongs to a context


class _Memory:
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.pointer = cupy.cuda.alloc(max(nbytes, 1))  # of the pool: aligned to 512 bytes

    @property
    def address(self) -> int:
        return int(self.pointer.ptr)


class CupyDevice:
    """`devices.Device` for GPU number `ordinal`. Results are ready in `stream`, a stream of CuPy (its current one by default),
    or what has the handle of one: an integer.
    """

    def __init__(self, ordinal: int = 0, stream: Any = None) -> None:
        self.ordinal = ordinal
        self._device = cupy.cuda.Device(ordinal)
        with self._device:
            if isinstance(stream, int):
                stream = cupy.cuda.ExternalStream(stream)
            self._caller = cupy.cuda.get_current_stream() if stream is None else stream
            self._queues = {q: cupy.cuda.Stream(non_blocking=True) for q in ("copy", "work")}
            # Memory comes from the caller's pool, whose pieces may be in use by what the caller has already queued.
            for queue in self._queues.values():
                queue.wait_event(self._caller.record())
            if ordinal not in _modules:
                _modules[ordinal] = cupy.RawModule(code=source_text(), options=("-std=c++17",))
            self._kernels = {name: _modules[ordinal].get_function(name) for name in THREADS}

    @property
    def name(self) -> str:
        return f"cuda:{self.ordinal}"

    def take(self, nbytes: int) -> _Memory:
        try:
            with self._device, self._caller:
                return _Memory(nbytes)
        except cupy.cuda.memory.OutOfMemoryError as e:
            raise MemoryError(str(e)) from None

    def pinned(self, nbytes: int) -> U8:
        with self._device:
            memory = cupy.cuda.alloc_pinned_memory(nbytes)
        return np.frombuffer(memory, np.uint8, nbytes)

    def upload(self, host: U8, address: int, queue: str = "copy") -> None:
        with self._device:
            cupy.cuda.runtime.memcpyAsync(address, host.ctypes.data, host.nbytes, _UPLOAD, self._queues[queue].ptr)

    def download(self, address: int, host: U8) -> None:
        with self._device:
            cupy.cuda.runtime.memcpyAsync(host.ctypes.data, address, host.nbytes, _DOWNLOAD, self._queues["work"].ptr)

    def launch(self, kernel: str, blocks: int, arguments: Sequence[int]) -> None:
        with self._device, self._queues["work"]:
            given = tuple(np.uint64(a) for a in arguments)
            self._kernels[kernel]((blocks,), (THREADS[kernel],), given)

    def mark(self, queue: str) -> Any:
        with self._device:
            return self._queues[queue].record()

    def elapsed(self, first: Any, last: Any) -> float:
        return float(cupy.cuda.get_elapsed_time(first, last)) / 1000

    def wait(self, mark: Any) -> None:
        mark.synchronize()

    def after(self, queue: str, mark: Any) -> None:
        with self._device:
            self._queues[queue].wait_event(mark)

    def join(self) -> None:
        with self._device:
            self._caller.wait_event(self._queues["work"].record())

    def place_of(self, array: Any) -> tuple[int, int]:
        if hasattr(array, "data_ptr"):  # torch's, whose bfloat16 has no other interface
            here = array.device.type == "cuda" and array.device.index == self.ordinal and array.is_contiguous()
            place = int(array.data_ptr()), int(array.nbytes)
        else:
            here = isinstance(array, cupy.ndarray) and array.device.id == self.ordinal and array.flags.c_contiguous
            place = (int(array.data.ptr), int(array.nbytes)) if here else (0, 0)
        if not here:
            raise UsageError(f"a base is no contiguous array on {self.name}")
        return place

    def tensor(self, memory: Any, offset: int, nbytes: int, dtype: "np.dtype[Any]", shape: tuple[int, ...]) -> Any:
        with self._device:
            return cupy.ndarray((nbytes,), cupy.uint8, memory.pointer + offset).view(dtype).reshape(shape)
