"""The array types that kernels and structures speak; apart from jit.py, so that a listing does not import numba."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
U16 = NDArray[np.uint16]
U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
Words = NDArray[Any]  # uint16, uint32 or uint64: one entry an element


class _Alias:
    def __init__(self, array: U8) -> None:
        self.array = array  # whose memory it is
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def for_kernels(raw: U8) -> U8:
    """Return bytes that nobody may write as an array that says otherwise: kernels are compiled for writable arrays alone.

    Nothing is copied (45 MB: 2.8 of 21 milliseconds of encoding them). For kernels and views that only read.
    """
    return raw if raw.flags.writeable or not raw.size else np.asarray(_Alias(raw))
