"""What decoding needs of a device, and nothing more: memory, copies, kernels, an order of things.

`cupy_device.CupyDevice` is the real one; tests have another, which runs the kernels on the host.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tzip.coders.arrays import U8

SOURCES = ("common", "sums", "tables", "planes", "huffman", "rans", "transforms")
THREADS = {
    "sum_stripes": 256,
    "sum_compare": 256,
    "read_tables": 256,
    "huffman_1": 128,
    "huffman_2": 128,
    "huffman_4": 128,
    "rans_1": 128,
    "rans_2": 128,
    "rans_4": 128,
    "merge_groups": 256,
    "put_escapes": 256,
    "prepare_transforms": 256,
    "expand": 256,
    "put_exceptions": 256,
    "count_tiles": 256,
    "add_tiles": 32,
    "place_tiles": 256,
    "add_chains": 256,
    "copy_parts": 256,
}  # of a block of each kernel, as the sources have them


@cache
def source_text() -> str:
    """Return the kernels as one CUDA C++ source."""
    folder = Path(__file__).parent
    return "\n".join((folder / f"{name}.cuh").read_text(encoding="utf-8") for name in SOURCES)


class Memory(Protocol):
    """A piece of device memory, aligned to 256 bytes; it is freed when nobody refers to it."""

    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


class Device(Protocol):
    """A device with two queues, one for copies to it ("copy") and one for kernels and copies from it ("work"). What is put in
    a queue is done in order; `after` makes what comes next in one queue wait for what the other has been given.
    """

    @property
    def name(self) -> str:
        """As it is shown to people."""
        ...

    def take(self, nbytes: int) -> Memory:
        """Return fresh memory with unspecified content; raises MemoryError."""
        ...

    def pinned(self, nbytes: int) -> U8:
        """Return host memory that copies read while the host goes on."""
        ...

    def upload(self, host: U8, address: int, queue: str = "copy") -> None:
        """Copy bytes to the device; `host`, pinned, must not change until that is done."""
        ...

    def download(self, address: int, host: U8) -> None:
        """Copy bytes from the device, in the queue "work"."""
        ...

    def launch(self, kernel: str, blocks: int, arguments: Sequence[int]) -> None:
        """Run a kernel, in the queue "work", with four integers."""
        ...

    def mark(self, queue: str) -> Any:
        """Return a mark behind all that the queue has been given."""
        ...

    def elapsed(self, first: Any, last: Any) -> float:
        """Return the seconds between two marks that are reached, by the device's clock."""
        ...

    def wait(self, mark: Any) -> None:
        """Let the host wait until the mark is reached."""
        ...

    def after(self, queue: str, mark: Any) -> None:
        """Let what the queue is given from now on wait for a mark of another."""
        ...

    def join(self) -> None:
        """Let the caller's own queue, in which it uses the results, wait for "work" as it is now."""
        ...

    def place_of(self, array: Any) -> tuple[int, int]:
        """Return address and bytes of an array that is on the device, whole and in order; raises UsageError for any other."""
        ...

    def tensor(self, memory: Memory, offset: int, nbytes: int, dtype: "np.dtype[Any]", shape: tuple[int, ...]) -> Any:
        """Return bytes of the memory as an array of the device's own kind, which keeps the memory."""
        ...
