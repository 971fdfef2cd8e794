"""Memory that a thread uses again and again.

Fresh arrays of some hundred kilobytes come from the system, page by page, and go back to it: for one chunk that takes
longer than coding it (measured: encoding bfloat16 1.2 -> 1.9 GB/s).
"""

import sys
import threading
from typing import Any

import numpy as np

from tzip.coders.arrays import U8, Words

_held = threading.local()
_used: dict[int, list[U8]] = {}
_lock = threading.Lock()
_MOST = 24  # buffers of a size that are kept


def borrow(name: str, n: int, dtype: Any = np.uint8) -> Words:
    """Return an array of shape (n,) with unspecified content, valid until this thread borrows `name` again."""
    size = n * np.dtype(dtype).itemsize
    held = _held.__dict__.get(name)
    if held is None or held.size < size:
        held = np.empty(max(size, 1 << 16), np.uint8)
        setattr(_held, name, held)
    return held[:size].view(dtype)


def recycle(n: int) -> U8:
    """Return bytes, shape (n,), with unspecified content: those of an earlier call that nobody refers to any more, or fresh.

    Views count: memory is taken again only when the last of them is gone.
    """
    log = max(16, (n - 1).bit_length())
    with _lock:
        buffers = _used.setdefault(log, [])
        for buffer in buffers:
            if sys.getrefcount(buffer) <= _UNUSED:
                return buffer[:n]
        buffer = np.empty(1 << log, np.uint8)
        if len(buffers) < _MOST:
            buffers.append(buffer)
        return buffer[:n]


def _count_unused() -> int:
    """How many references the loop of `recycle` itself holds: this interpreter's number, not a constant of the language."""
    for buffer in [np.empty(1, np.uint8)]:
        return sys.getrefcount(buffer)
    return 0


_UNUSED = _count_unused()
