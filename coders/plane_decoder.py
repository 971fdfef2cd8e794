"""Blocks of byte planes, decoded by one call of a kernel; why, is said in `plane_encoder`.

It knows raw, constant and rANS blocks. Whatever else there is, or is wrong, it leaves to `chunks`, which says what is wrong.
"""

import threading
from collections.abc import Callable
from functools import cache
from typing import no_type_check

import numpy as np

from tzip.coders import rans, rans_avx2, rans_avx512, rans_portable, tables
from tzip.coders.arrays import I64, U8, U16, U32, Words
from tzip.coders.jit import AVX2, AVX512, kernel, ready, stamp, tier
from tzip.coders.rans import LANES, TOTAL, VECTORS, decode_rest, fill_slots, fill_vectors, open_segments, read_table, sort_bytes
from tzip.coders.rans_avx2 import decode as decode_ymm
from tzip.coders.rans_avx512 import decode_any, decode_narrow
from tzip.coders.rans_portable import decode as decode_scalar
from tzip.coders.tables import parse_escapes

_GROUP = 1 << 18
_SEGMENTS = 255
_ESCAPES = 8192
_WIDTHS = (1, 2, 4)


class _Room(threading.local):
    """Scratch memory of a thread."""

    def __init__(self) -> None:
        self.planes = np.empty((4, _GROUP + 64), np.uint8)
        self.seen = self.planes.view()
        self.seen.flags.writeable = False  # as the record is: kernels are compiled for the one or the other
        self.states = np.empty(_SEGMENTS * LANES, np.uint32)
        self.places = np.empty((4, _SEGMENTS), np.int64)
        self.lanes = np.empty(4 * LANES, np.uint32)
        self.integers = np.empty((8, 256), np.int64)
        self.positions = np.empty(_ESCAPES, np.uint32)
        self.symbols = np.empty(_ESCAPES, np.uint16)
        self.vectors = np.empty((4, VECTORS), np.uint8)
        self.slots = np.empty((4, TOTAL), np.uint32)


_room = _Room()
_NOTHING: U8 = np.zeros(0, np.uint8)
_NO_REST: U8 = np.zeros(0, np.uint8)
_NO_REST.flags.writeable = False


def decode_planes(buffer: U8, blocks: I64, cuts: I64, out: Words) -> bool:
    """Fill `out`, shape (n,), with elements from blocks of their byte planes, the highest first, each plane's groups in order.

    `blocks`: codec, segments, flags, stored, escapes, value and start of each, shape (planes * groups, 7). `cuts`: where the
    groups begin, and n. Returns False when there is something that it does not know or that is wrong, or while the kernel is
    not worth compiling; `out` is then unspecified.
    Needs: payloads within `buffer`, SLACK bytes behind them; entries as `chunks.read_blocks` proves them; groups of 1 … 2^18.
    """
    if out.itemsize not in _WIDTHS:
        return False
    r = _room
    level = {AVX512: 2, AVX2: 1}.get(tier(), 0)
    function = _kernel(level, out.itemsize)
    arguments = (
        buffer, blocks, cuts, rans_avx2.spreads() if level == 1 else _NOTHING, _NO_REST, r.planes, r.seen, r.states, r.places,
        r.lanes, r.integers, r.positions, r.symbols, r.vectors, r.slots, out,
    )  # fmt: skip
    return ready(function, arguments, out.nbytes) and function(*arguments) == 0


@cache
def _kernel(level: int, width: int) -> Callable[..., int]:
    return _make(stamp(rans, rans_avx2, rans_avx512, rans_portable, tables), level, width)


def _make(stamp: int, level: int, width: int) -> Callable[..., int]:
    """Make the kernel for vectors of 512 bits (2), of 256 (1), or none (0), and elements of `width` bytes."""

    @kernel
    @no_type_check
    def decode(
        buffer: U8, blocks: I64, cuts: I64, spread: U8, rest: U8, planes: U8, seen: U8, states: U32, places: I64, lanes: U32,
        integers: I64, positions: U32, escaped: U16, vectors: U8, slots: U32, out: Words,
    ) -> int:
        """Return 0 when all is decoded. Needs: what `decode_planes` needs; a `_Room`; seen is planes."""  # fmt: skip
        if stamp < 0:
            return 1
        groups = cuts.size - 1
        freq = integers[0]
        order = integers[1]
        values = integers[2, :3]
        lane = integers[3, :12]
        have = integers[4, :4]
        narrow = integers[5, :4]
        values[:] = 0
        have[:] = 0
        for g in range(groups):
            begin = cuts[g]
            n = cuts[g + 1] - begin
            for p in range(width):
                block = blocks[p * groups + g]
                codec = block[0]
                segments = block[1]
                escapes = block[4]
                start = block[6]
                stop = start + block[3]
                plane = planes[p, :n]
                if codec == 0:
                    continue
                if codec == 1:
                    plane[:] = np.uint8(block[5])
                    continue
                if codec != 4 or block[5] != 0 or segments < 1 or segments > 255 or escapes > min(n, 8192):
                    return 1
                counts = start + 4 * escapes
                words = counts + 132 * segments
                if words > stop:
                    return 1
                if block[2] & 1 == 0:
                    freq[:] = 0
                    size = read_table(buffer[words:stop], freq)
                    if size <= 0:
                        return 1
                    words += size
                    used = sort_bytes(freq, order)
                    narrow[p] = 0
                    if level == 2:
                        narrow[p] = fill_vectors(freq, order[:used], vectors[p])
                    fill_slots(freq, order[:used], slots[p])
                    have[p] = 1
                elif have[p] == 0:
                    return 1
                if open_segments(buffer, counts, words, stop, n, segments, states, places) != 0:
                    return 1
                left = places[0, :segments]
                at = places[1, :segments]
                ends = places[2, :segments]
                symbol = places[3, :segments]
                if level == 2:
                    if narrow[p] != 0:
                        decode_narrow(buffer, vectors[p], left, at, symbol, states, rest, values, plane, lanes, lane)
                    else:
                        decode_any(buffer, slots[p], left, at, symbol, states, rest, values, plane, lanes, lane)
                if level == 1:
                    decode_ymm(buffer, slots[p], spread, left, at, symbol, states, rest, values, plane, lanes, lane)
                more = 0
                for s in range(segments):
                    more += left[s]
                if more >= 8:
                    decode_scalar(buffer, slots[p], left, at, symbol, states, plane)
                segment = (n + 128 * segments - 1) // (128 * segments) * 128
                if decode_rest(buffer, at, ends, symbol, states, slots[p], segment, n, plane) != 0:
                    return 1
                if escapes > 0:
                    if parse_escapes(buffer[start:counts], n, 8, positions[:escapes], escaped[:escapes]) == 0:
                        return 1
                    for k in range(escapes):
                        plane[positions[k]] = np.uint8(escaped[k])
            a = seen[0, :n]
            if blocks[g, 0] == 0:
                a = buffer[blocks[g, 6] : blocks[g, 6] + n]
            if width == 1:
                for i in range(n):
                    out[begin + i] = a[i]
            if width >= 2:
                b = seen[1, :n]
                if blocks[groups + g, 0] == 0:
                    b = buffer[blocks[groups + g, 6] : blocks[groups + g, 6] + n]
            if width == 2:
                whole = out[begin : begin + n]
                for i in range(n):
                    whole[i] = np.uint16(a[i]) << np.uint16(8) | np.uint16(b[i])
            if width == 4:
                c = seen[2, :n]
                if blocks[2 * groups + g, 0] == 0:
                    c = buffer[blocks[2 * groups + g, 6] : blocks[2 * groups + g, 6] + n]
                d = seen[3, :n]
                if blocks[3 * groups + g, 0] == 0:
                    d = buffer[blocks[3 * groups + g, 6] : blocks[3 * groups + g, 6] + n]
                whole = out[begin : begin + n]
                for i in range(n):
                    high = np.uint32(a[i]) << np.uint32(24) | np.uint32(b[i]) << np.uint32(16)
                    whole[i] = high | np.uint32(c[i]) << np.uint32(8) | np.uint32(d[i])
        return 0

    return decode  # type: ignore[no-any-return]
