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
