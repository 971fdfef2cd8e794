"""Which codec for which plane: a pure function of the bytes and the level, in integers, so that archives are
reproducible on every machine and with any number of threads.

Sizes are estimated from exact counts; samples (at a fixed stride) only decide whether a plane is worth counting.
"""

from dataclasses import dataclass, replace

import numpy as np

from tzip.coders import huffman, planes, rans, rows
from tzip.coders.arrays import I64, U8
from tzip.coders.huffman import HuffmanTable
from tzip.coders.planes import Head
from tzip.coders.rans import RansTable
from tzip.coders.registry import CONSTANT, HUFFMAN, RANS, RAW
from tzip.coders.tables import ESCAPE_BITS, WINDOW

Table = HuffmanTable | RansTable


@dataclass(frozen=True, slots=True)
class Level:
    """What an encoder tries: joined mantissa bits (at most two at a time), codecs, zstandard level, segments."""

    name: str
    joined: tuple[int, ...]
    codecs: tuple[int, ...]
    zstd: int
    log_segment: int
    exhaustive: bool = False  # try narrower keys where the widest already pays


# Measured on MiniLM bf16 (docs/BENCHMARKS.md): joining two mantissa bits and rANS give the default its 65.9 %;
# Huffman on the exponent alone needs no rANS and decodes fastest on any CPU. Segments of 2^16: at 2^14 lane states
# cost 0.3 points, at 2^17 they save 0.05 but leave a GPU half the warps.
LEVELS = {
    level.name: level
    for level in (
        Level("fast", (0,), (HUFFMAN,), 1, 16),
        Level("default", (2, 0), (RANS,), 3, 16),
        Level("best", (2, 1, 0), (RANS, HUFFMAN), 19, 17, exhaustive=True),
    )
}
SAMPLE_STRIDE = 32  # 4,096 samples of a full group
_SMALL = 8192  # symbols below which everything is counted
_WORTH = 128  # a raw plane is coded when that saves more than 1/128 of it: less is not worth the decoder's time


@dataclass(frozen=True, slots=True)
class Mapping:
    """How the keys of a group become bytes, counts of these bytes, shape (256,), and the number of escapes."""

    window: planes.Window
    counts: I64
    escapes: int


@dataclass(frozen=True, slots=True)
class Choice:
    """A codec for a plane, its table (None for raw and constant) and the estimated payload in bytes."""

    codec: int
    table: Table | None
    size: int
    value: int = 0


def map_keys(counts: I64, n: int) -> Mapping:
    """Choose the bytes for keys with these counts, shape (2**w,), of n elements: a window of them, all others escape.

    A symbol in a table costs about 24 bits of table and 1/4096 of the probability, an escape 32 bits each time; so
    rare keys at the ends of the range escape. Those between frequent ones stay: leaving them out, too, was measured
    to gain nothing, and a window without holes needs no table to look bytes up in.
    """
    # counts * (32 - 12) > n * log2(e) / 4096 + 24, in integers
    kept = np.flatnonzero(counts * 81_920_000 > n * 1443 + 98_304_000)
    zero = bool(kept.size) and int(kept[0]) == 0
    kept = kept[1:] if zero else kept
    if not kept.size:
        kept = np.array([1 + int(counts[1:].argmax())])
    low, high = int(kept[0]), int(kept[-1])
    wide = counts.size > 256
    if wide and high - low >= WINDOW:
        below = np.concatenate(([0], np.cumsum(counts[1:])))
        starts = np.arange(1, counts.size - WINDOW + 1)
        low = int(starts[np.argmax(below[starts + WINDOW - 1] - below[starts - 1])])
        high = low + WINDOW - 1
    window = planes.Window(low - 1 if wide else 0, low, high, zero, 0)
    byte_counts, escapes = _count_bytes(window, counts)
    frequent = int(byte_counts.argmax())
    byte_counts[frequent] += escapes
    if np.count_nonzero(byte_counts) < 2:
        byte_counts[0 if frequent else 1] = 1  # a table has two bytes or more; this one never occurs
    return Mapping(replace(window, instead=frequent), byte_counts, escapes)


def _count_bytes(window: planes.Window, counts: I64) -> tuple[I64, int]:
    byte_counts = np.zeros(256, np.int64)
    byte_counts[window.low - window.base : window.high - window.base + 1] = counts[window.low : window.high + 1]
    if window.zero:
        byte_counts[0] += counts[0]
    return byte_counts, int(counts.sum() - byte_counts.sum())


def remap(mapping: Mapping, counts: I64, table: Table) -> Mapping | None:
    """Return how keys with these counts fare under an earlier group's mapping and table; None when they do not fit."""
    byte_counts, escapes = _count_bytes(mapping.window, counts)
    if escapes * 64 > int(counts.sum()):
        return None
    byte_counts[mapping.window.instead] += escapes
    frequency = table.freq if isinstance(table, RansTable) else table.lengths
    if byte_counts[frequency == 0].any():
        return None
    return Mapping(mapping.window, byte_counts, escapes)


def coded_size(codec: int, table: Table, shared: bool, counts: I64, n: int, escapes: int, log_segment: int) -> int:
    """Estimate the payload of n bytes with these counts."""
    segments = -(-n >> log_segment)
    head = 0 if shared else table.size
    if isinstance(table, RansTable):
        return rans.cost(counts, table.freq) // 8 + 132 * segments + head + escapes * ESCAPE_BITS // 8
    bits = int((counts * table.lengths).sum())
    # A stream ends on half a byte on average, and the last segment is padded.
    return bits // 8 + 80 * segments + head + escapes * ESCAPE_BITS // 8


def make_table(codec: int, counts: I64) -> Table:
    """Return the best table of that codec for byte counts of which two or more are not 0."""
    return rans.quantize(counts) if codec == RANS else HuffmanTable(huffman.code_lengths(counts))


def choose(counts: I64, n: int, bits: int, level: Level) -> Choice:
    """Choose among raw, constant and the level's codecs for n symbols of `bits` <= 8 bits with these counts, shape (256,)."""
    used = np.flatnonzero(counts)
    if used.size == 1:
        return Choice(CONSTANT, None, 0, int(used[0]))
    best = Choice(RAW, None, rows.packed_size(n, bits))
    limit = best.size - best.size // _WORTH
    for codec in level.codecs:
        table = make_table(codec, counts)
        size = coded_size(codec, table, False, counts, n, 0, level.log_segment)
        if size < min(limit, best.size):
            best = Choice(codec, table, size)
    return best


def looks_dense(sample: U8, bits: int) -> bool:
    """Say whether a sample of symbols of `bits` bits is too even for an entropy coder to gain 2 % or so."""
    counts = np.bincount(sample, minlength=256).astype(np.int64)
    if np.count_nonzero(counts) < 2:
        return False
    # 4,096 samples of 256 equal symbols seem to have 0.045 bits less than 8 each.
    return rans.cost(counts, rans.quantize(counts).freq) * 100 > 97 * bits * sample.size


def is_small(n: int) -> bool:
    """Say whether a plane is so small that it is counted without asking a sample."""
    return n < _SMALL


def joined_candidates(head: Head, level: Level) -> tuple[int, ...]:
    """Return the numbers of joined mantissa bits that the level tries for a head, the widest first."""
    return tuple(t for t in level.joined if t in head.joined) or head.joined
