"""What Huffman and rANS share: byte ranges of tables, escapes, the window of wide symbols (FORMAT.md, 7.3, 7.4)."""

from dataclasses import dataclass

import numpy as np

from tzip.coders.arrays import I64, U8, U16, U32
from tzip.coders.errors import CorruptError, TruncatedError

POSITION_BITS = 17
ESCAPE_BITS = 32  # what one escape costs
WINDOW = 254  # bytes 1 … 254 stand for base + 1 … base + 254 when symbols are wider than 8 bits


@dataclass(frozen=True, slots=True)
class Alphabet:
    """How the symbols of a block, `width` bits each, are coded as bytes: identity, or a window above `base`."""

    width: int
    base: int

    def check(self, highest: int) -> None:
        """Raise CorruptError when a table whose largest byte is `highest` leaves the symbols' range."""
        if self.width <= 8:
            if self.base != 0 or highest >= 1 << self.width:
                raise CorruptError(f"table: byte {highest} or base {self.base} in a plane of {self.width} bits")
        elif highest > WINDOW or self.base + highest >= 1 << self.width:
            raise CorruptError(f"table: byte {highest} over base {self.base} in a plane of {self.width} bits")


def write_range(entries: I64) -> tuple[int, int, I64]:
    """Return lo, hi and the entries lo … hi of a table over 256 bytes."""
    used = np.flatnonzero(entries)
    lo, hi = int(used[0]), int(used[-1])
    return lo, hi, entries[lo : hi + 1]


def read_range(payload: U8) -> tuple[int, int]:
    """Return lo and hi of the table that `payload` starts with."""
    if payload.size < 2:
        raise TruncatedError("table: payload ends before it")
    lo, hi = int(payload[0]), int(payload[1])
    if lo >= hi:
        raise CorruptError(f"table: range {lo} … {hi} has fewer than two bytes")
    return lo, hi


def read_escapes(payload: U8, n: int, width: int) -> tuple[U32, U16]:
    """Return positions and symbols of the escapes in `payload`, whose whole it is.

    Raises CorruptError unless positions ascend strictly below n and symbols are below 2**width.
    """
    raw = payload.view("<u4") if payload.size else np.empty(0, np.uint32)
    positions = raw & np.uint32((1 << POSITION_BITS) - 1)
    symbols = (raw >> np.uint32(POSITION_BITS)).astype(np.uint16)
    if raw.size and (
        int(positions[-1]) >= n or not bool((positions[1:] > positions[:-1]).all()) or int(symbols.max()) >> width
    ):
        raise CorruptError("escapes: positions not ascending within the block, or a symbol too wide")
    return positions, symbols
