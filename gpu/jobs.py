"""The structures by which kernels are told what to do: those of common.cuh, and their making."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tzip.coders.arrays import U8
from tzip.coders.describing import (
    CODEC,
    COLUMNS,
    ESCAPES,
    JOINED,
    OTHERS,
    PAYLOAD,
    SEGMENT,
    SEGMENTS,
    SHARED,
    SIGN,
    SIZE,
    STORED,
    VALUE,
)
from tzip.coders.registry import HUFFMAN, RANS

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


class Usual:
    """The jobs of chunks that `coders.describing` has described, made all at once; their groups will lie from `base` on.

    `described`: (rows, split, ordinal, address of the record, of the elements, elements of a group, tables) for each.
    """

    def __init__(self, described: Sequence[tuple[Any, ...]], base: int) -> None:
        self.none = np.empty(0, CODED_JOB)
        counts = [len(rows) for rows, *_ in described]
        rows = np.concatenate([rows for rows, *_ in described]) if described else np.empty((0, COLUMNS), np.int64)

        def spread(values: Iterable[int]) -> "np.ndarray[Any, Any]":
            return np.repeat(np.fromiter(values, np.int64, len(counts)), counts)

        exponent = spread(split.head.exponent for _, split, *_ in described)
        mantissa = spread(split.head.mantissa for _, split, *_ in described)
        width = spread(split.width for _, split, *_ in described)
        chunk, record, out, size, tables = (spread(d[i] for d in described) for i in range(2, 7))
        place = np.arange(len(rows)) - spread(np.cumsum(counts) - counts if counts else [])
        self.groups = groups = np.zeros(len(rows), GROUP)
        groups["out"] = out + place * size * width
        groups["n"], groups["chunk"], groups["head"] = rows[:, SIZE], chunk, 1
        groups["width"] = groups["planes"] = width
        groups["low"] = mantissa - rows[:, JOINED]
        groups["base"], groups["sign"] = rows[:, VALUE], rows[:, SIGN]
        groups["plane"]["kind"] = FROM_VALUE
        for p in range(1, 4):
            at, bits, value = (rows[:, OTHERS + 3 * (p - 1) + i] for i in range(3))
            here = p < width
            source = groups["plane"][:, p]
            source["address"] = np.where(here & (at >= 0), record + at, 0)
            source["kind"] = np.where(~here | (at < 0), FROM_VALUE, np.where(bits == 8, FROM_BYTES, FROM_ROWS))
            source["bits"], source["value"] = bits, value
        # A table belongs to the group that carries it and to those behind it that share it.
        owner = np.maximum.accumulate(np.where(rows[:, SHARED] == 0, np.arange(len(rows)), 0)) if len(rows) else place
        table = tables + (owner - np.arange(len(rows)) + place) * TABLE_SIZE
        coded = np.zeros(len(rows), CODED_JOB)
        coded["payload"], coded["table"] = record + rows[:, PAYLOAD], table
        coded["group"] = base + GROUP.itemsize * np.arange(len(rows))
        coded["stored"], coded["n"], coded["escapes"], coded["chunk"] = rows[:, STORED], rows[:, SIZE], rows[:, ESCAPES], chunk
        coded["segment"], coded["segments"], coded["base"] = rows[:, SEGMENT], rows[:, SEGMENTS], rows[:, VALUE]
        coded["bits"], coded["own"] = exponent + rows[:, JOINED], rows[:, SHARED] == 0
        names = {(HUFFMAN, 2): "huffman_2", (HUFFMAN, 4): "huffman_4", (RANS, 2): "rans_2", (RANS, 4): "rans_4"}
        picked = {name: (rows[:, CODEC] == codec) & (width == w) for (codec, w), name in names.items()}
        self.coded = {name: coded[which] for name, which in picked.items() if which.any()}
        own = rows[:, SHARED] == 0
        before = 4 * rows[:, ESCAPES] + np.where(rows[:, CODEC] == HUFFMAN, 64, 132) * rows[:, SEGMENTS]
        self.tables = np.zeros(int(own.sum()), TABLE_JOB)
        self.tables["stored"], self.tables["table"] = (record + rows[:, PAYLOAD] + before)[own], table[own]
        self.tables["room"], self.tables["codec"] = (rows[:, STORED] - before)[own], rows[own, CODEC]
        self.tables["chunk"] = chunk[own]
        some = rows[:, ESCAPES] > 0
        self.keys = keys = np.zeros(int(some.sum()), ESCAPE_JOB)
        keys["listed"], keys["out"], keys["count"] = coded["payload"][some], groups["out"][some], rows[some, ESCAPES]
        keys["n"], keys["chunk"], keys["bits"] = rows[some, SIZE], chunk[some], coded["bits"][some]
        keys["width"], keys["keys"], keys["low"] = width[some], 1, groups["low"][some]


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
