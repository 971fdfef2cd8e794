"""The structures by which kernels are told what to do: those of common.cuh, and their making."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from tzip.coders.arrays import U8

PART, TILE, STRIPES, WARPS = 16384, 4096, 64, 4
FROM_BYTES, FROM_ROWS, FROM_VALUE = range(3)

UNIT = np.dtype([("job", "<u4"), ("part", "<u4")])
TABLE_JOB = np.dtype([("stored", "<u8"), ("table", "<u8"), ("room", "<u4"), ("codec", "<u4"), ("chunk", "<u4"), ("", "<u4")])
TABLE_SIZE = 1040
SOURCE = np.dtype([("address", "<u8"), ("kind", "<u4"), ("bits", "<u2"), ("value", "<u2")])
GROUP = np.dtype(
    [
        ("out", "<u8"), ("n", "<u4"), ("chunk", "<u4"), ("width", "u1"), ("planes", "u1"), ("head", "u1"), ("low", "u1"),
        ("base", "<u2"), ("sign", "<u2"), ("plane", SOURCE, (8,)),
    ]
)  # fmt: skip
CODED_JOB = np.dtype(
    [
        ("payload", "<u8"), ("out", "<u8"), ("table", "<u8"), ("group", "<u8"), ("stored", "<u4"), ("n", "<u4"),
        ("escapes", "<u4"), ("chunk", "<u4"), ("segment", "<u4"), ("segments", "<u2"), ("base", "<u2"), ("bits", "u1"),
        ("own", "u1"), ("", "V6"),
    ]
)  # fmt: skip
ESCAPE_JOB = np.dtype(
    [
        ("listed", "<u8"), ("out", "<u8"), ("count", "<u4"), ("n", "<u4"), ("chunk", "<u4"), ("bits", "u1"), ("width", "u1"),
        ("keys", "u1"), ("low", "u1"),
    ]
)  # fmt: skip
SUM_JOB = np.dtype(
    [
        ("bytes", "<u8"), ("expected", "<u8"), ("total", "<u8"), ("length", "<u4"), ("chunk", "<u4"), ("code", "<u4"),
        ("", "<u4"),
    ]
)  # fmt: skip
TRANSFORM_JOB = np.dtype(
    [
        ("inner", "<u8"), ("a", "<u8"), ("b", "<u8"), ("base", "<u8"), ("out", "<u8"), ("work", "<u8"), ("v", "<u8"),
        ("n", "<u4"), ("m", "<u4"), ("size_a", "<u4"), ("size_b", "<u4"), ("step", "<u4"), ("first", "<u4"), ("chunk", "<u4"),
        ("kind", "u1"), ("width", "u1"), ("inner_width", "u1"), ("parameter", "u1"), ("sizes", "<u4", (8,)),
        ("starts", "<u4", (8,)),
    ]
)  # fmt: skip
COPY_JOB = np.dtype([("from", "<u8"), ("to", "<u8"), ("bytes", "<u4"), ("", "<u4")])

BAD_STORED_SUM, BAD_DECODED_SUM = 1, 14


def units(parts: Iterable[int], first: int = 0) -> "np.ndarray[Any, Any]":
    """Return the units of jobs `first`, `first` + 1 … that have so many parts each."""
    counts = np.fromiter(parts, np.int64)
    made = np.empty(int(counts.sum()), UNIT)
    made["job"] = np.repeat(np.arange(first, first + counts.size), counts)
    made["part"] = np.arange(made.size) - np.repeat(np.cumsum(counts) - counts, counts)
    return made


class Blob:
    """Arrays laid one after the other in a piece of host memory that is copied to the device whole."""

    def __init__(self, host: U8, address: int) -> None:
        self.host = host
        self.address = address
        self.used = 0

    def add(self, array: "np.ndarray[Any, Any]") -> int:
        """Put an array behind the others; return its address on the device."""
        at = -(-self.used // 16) * 16
        raw = array.view(np.uint8).reshape(-1) if array.size else np.empty(0, np.uint8)
        self.host[at : at + raw.size] = raw
        self.used = at + raw.size
        return self.address + at
