"""What Huffman and rANS share: byte ranges of tables, escapes, the window of wide symbols (FORMAT.md, 7.3, 7.4)."""

from dataclasses import dataclass
from typing import no_type_check

import numpy as np

from tzip.coders.arrays import U8, U16, U32
from tzip.coders.errors import CorruptError
from tzip.coders.jit import quick_kernel

MAX_SEGMENT = 1 << 17
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


def read_escapes(payload: U8, n: int, width: int) -> tuple[U32, U16]:
    """Return positions and symbols of the escapes in `payload`, whose whole it is.

    Raises CorruptError unless positions ascend strictly below n and symbols are below 2**width.
    """
    count = payload.size // 4
    positions, symbols = np.empty(count, np.uint32), np.empty(count, np.uint16)
    if count and not parse_escapes(payload, n, width, positions, symbols):
        raise CorruptError("escapes: positions not ascending within the block, or a symbol too wide")
    return positions, symbols


@quick_kernel
@no_type_check
def parse_escapes(payload: U8, n: int, width: int, positions: U32, symbols: U16) -> int:
    """Return 1 when all are fine. Needs: payload.size == 4 positions.size == 4 symbols.size."""
    last = np.int64(-1)
    for i in range(positions.size):
        k = 4 * i
        low = np.int64(payload[k]) | (np.int64(payload[k + 1]) << 8)
        e = low | (np.int64(payload[k + 2]) << 16) | (np.int64(payload[k + 3]) << 24)
        at = e & 0x3FFFF
        symbol = e >> 18
        if at <= last or at >= n or symbol >> width:
            return 0
        last = at
        positions[i] = at
        symbols[i] = symbol
    return 1


def segment_size(n: int, segments: int) -> int:
    """Return the symbols of each segment but the last when n symbols are cut into `segments` (FORMAT.md, section 7.5).

    Raises CorruptError when the number is not one that a block of n symbols can have.
    """
    size = -(-n // (128 * segments)) * 128 if segments > 0 else 0
    if not 0 < size <= MAX_SEGMENT or (segments - 1) * size >= n:
        raise CorruptError(f"{segments} segments in a block of {n} symbols")
    return size
