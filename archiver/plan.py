"""Which codec for which plane: a pure function of the bytes and the level, in integers, so that archives are
reproducible on every machine and with any number of threads.

Sizes are estimated from exact counts; samples (at a fixed stride) only decide whether a plane is worth counting.
"""

from dataclasses import dataclass

import numpy as np

from tzip.coders import huffman, rans, rows
from tzip.coders.arrays import I64, Words
from tzip.coders.counting import Survey, byte_counts, rest_counts, same_keys, survey
from tzip.coders.errors import UsageError
from tzip.coders.fitting import cost, quantize
from tzip.coders.huffman import HuffmanTable
from tzip.coders.keys import Mapping, map_again, map_keys
from tzip.coders.planes import Head, Window
from tzip.coders.rans import RansTable
from tzip.coders.record_planner import Rules
from tzip.coders.registry import CONSTANT, HUFFMAN, RANS, RAW
from tzip.coders.tables import ESCAPE_BITS

Table = HuffmanTable | RansTable


@dataclass(frozen=True, slots=True)
class Level:
    """What an encoder tries: joined mantissa bits (at most two at a time), codecs, zstandard levels, symbols of a segment."""

    name: str
    joined: tuple[int, ...]
    codecs: tuple[int, ...]
    zstd: int
    zstd_short: int  # for elements that a transform made shorter: there is less of them
    segment: int
    exhaustive: bool = False  # count everything, sort rows by scale
    patient: bool = False  # fit factors of low rank to whatever moved


# Measured on MiniLM bf16 (docs/BENCHMARKS.md): joining two mantissa bits and rANS give the default its 65.9 %;
# Huffman on the exponent alone needs no rANS and decodes fastest on any CPU. Segments of 2^16: at 2^14 lane states
# cost 0.3 points, at 2^17 they save 0.05 but leave a GPU half the warps, and a vector unit two segments at a time.
LEVELS = {
    level.name: level
    for level in (
        Level("fast", (0,), (HUFFMAN,), 1, 3, 1 << 16),
        Level("default", (2, 0), (RANS,), 3, 9, 1 << 16),
        Level("best", (2, 1, 0), (RANS, HUFFMAN), 19, 19, 1 << 17, exhaustive=True),
        Level("max", (2, 1, 0), (RANS, HUFFMAN), 19, 19, 1 << 17, exhaustive=True, patient=True),
    )
}
LONG_SEGMENT = 1 << 17
SAMPLE = 1 << 16  # keys of a chunk that are counted at least: their tables are 0.007 points from the best
_EVERY = 16
_DENSE_EVERY = 64  # 4,096 samples of a full group say whether its bytes are even
_MANY = 32768  # keys from which the widest, and a level's first codec, win unless nothing pays
DENSE = 8192  # symbols below which everything is counted
_WORTH = 128  # a raw plane is coded when that saves more than 1/128 of it: less is not worth the decoder's time


@dataclass(frozen=True, slots=True)
class Choice:
    """A codec for a plane, its table (None for raw and constant) and the estimated payload in bytes. `escapes`: symbols
    that the table lacks.
    """

    codec: int
    table: Table | None
    size: int
    value: int = 0
    escapes: int = 0


def level_named(name: str) -> Level:
    """Return the level of that name; raises UsageError when there is none."""
    if name not in LEVELS:
        raise UsageError(f"there is no level {name!r}; there are {', '.join(LEVELS)}")
    return LEVELS[name]


def segments_of(n: int, level: Level) -> int:
    """Return the number of segments of a block of n symbols: from four a vector unit decodes four at a time, which levels and
    differences with longer segments do without (of bfloat16 weights a step apart states were half a percent).
    """
    most = -(-n // level.segment)
    return max(most, 4) if n >= level.segment and level.segment < LONG_SEGMENT else most


def coded_size(codec: int, table: Table, shared: bool, counts: I64, n: int, escapes: int, level: Level) -> int:
    """Estimate the payload of n bytes with these counts."""
    segments = segments_of(n, level)
    head = 0 if shared else table.size
    if isinstance(table, RansTable):
        return cost(counts, table.freq) // 8 + 132 * segments + head + escapes * ESCAPE_BITS // 8
    bits = int((counts * table.lengths).sum())
    # A stream ends on half a byte on average, and the last segment is padded.
    return bits // 8 + 80 * segments + head + escapes * ESCAPE_BITS // 8


def make_table(codec: int, counts: I64) -> Table:
    """Return the best table of that codec for byte counts of which two or more are not 0."""
    return quantize(counts) if codec == RANS else HuffmanTable(huffman.code_lengths(counts))


def choose(counts: I64, n: int, bits: int, level: Level) -> Choice:
    """Choose among raw, constant and the level's codecs for n symbols of `bits` <= 8 bits with these counts, shape (256,)."""
    used = np.flatnonzero(counts)
    if used.size == 1:
        return Choice(CONSTANT, None, 0, int(used[0]))
    best = Choice(RAW, None, rows.packed_size(n, bits))
    limit = best.size - best.size // (128 if level.exhaustive else _WORTH)
    for codec in level.codecs:
        table = make_table(codec, _frequent(counts, n) if codec == RANS else counts)
        size, escapes = _plane_size(codec, table, False, counts, n, level)
        if size < min(limit, best.size):
            best = Choice(codec, table, size, escapes=escapes)
    return best


def _frequent(counts: I64, n: int) -> I64:
    """Return counts without those of bytes that are cheaper as escapes.

    A byte in the table takes a slot of 4096 of the others, n log2(e) / 4096 bits, and some bits of the table; an escape about
    25 bits more than a byte of one slot (fp8 weights, 150,000 to 200,000 in a group: 0.04 points).
    """
    kept = np.where(counts * 102_400_000 > n * 1443 + 32_768_000, counts, 0)
    return kept if np.count_nonzero(kept) > 1 else counts


def _plane_size(codec: int, table: Table, shared: bool, counts: I64, n: int, level: Level) -> tuple[int, int]:
    """Return what n bytes with these counts take with that table, and how many of them escape."""
    lacking = counts[table.freq == 0].sum() if isinstance(table, RansTable) else 0
    return coded_size(codec, table, shared, counts, n, int(lacking), level), int(lacking)


def choose_together(counts: list[I64], sizes: list[int], level: Level) -> list[tuple[Choice, bool]]:
    """Choose for the groups of a plane of bytes, `sizes` symbols with these counts (none: raw), and say which of them code with
    the table of the nearest group before that has one.
    """
    alone = [choose(row, n, 8, level) if row.any() else Choice(RAW, None, n) for row, n in zip(counts, sizes, strict=True)]
    codec = next((choice.codec for choice in alone if choice.table is not None), RAW)
    like = [choice.table is not None and choice.codec == codec for choice in alone]
    if sum(like) < 2:
        return [(choice, False) for choice in alone]
    pooled = np.sum([row for row, one in zip(counts, like, strict=True) if one], axis=0)
    common = make_table(codec, _frequent(pooled, int(pooled.sum())) if codec == RANS else pooled)
    found: list[tuple[Choice, bool]] = []
    current: Table | None = None
    for choice, row, n, one in zip(alone, counts, sizes, like, strict=True):
        if one:
            size, escapes = _plane_size(codec, common, current is common, row, n, level)
            # The next group will want the common table again.
            if choice.size + common.size // 2 >= size:
                found.append((Choice(codec, common, size, escapes=escapes), current is common))
                current = common
                continue
        found.append((choice, False))
        current = choice.table if choice.table is not None else current
    return found


def looks_dense(counts: I64, bits: int, level: Level) -> bool:
    """Say whether symbols of `bits` bits with these counts are too even for an entropy coder to gain 3 % (best: 1/2 %)."""
    if np.count_nonzero(counts) < 2:
        return False
    return cost(counts, quantize(counts).freq) * 1000 > _dense_part(level) * bits * int(counts.sum())


def _dense_part(level: Level) -> int:
    """Of a thousand bits, what dense symbols of a sample take at least."""
    # 4,096 samples of 256 equal symbols seem to have 0.045 bits less than 8 each, eight times as many 0.006.
    return 995 if level.exhaustive else 970


def dense_byte(words: Words, shift: int, level: Level) -> bool:
    """Say whether a byte plane of a group is not worth counting, by a sample."""
    every = _DENSE_EVERY // 8 if level.exhaustive else _DENSE_EVERY
    return words.size >= DENSE and looks_dense(byte_counts(words, shift, every), 8, level)


def dense_rests(groups: list[Words], found: Survey, head: Head, joined: int, signless: bool, level: Level) -> bool:
    """Say whether the rests of all groups are not worth counting, by a sample."""
    if groups[0].size < DENSE:
        return False
    low = head.mantissa - joined
    if joined == max(joined_candidates(head, level)):
        counts = found.rests
        if signless:
            folded = np.zeros(256, np.int64)  # kernels that look at it need all 256
            folded[: 1 << low] = counts[: 1 << low] + counts[1 << low : 2 << low]
            counts = folded
    else:
        every = _DENSE_EVERY // 8 if level.exhaustive else _DENSE_EVERY
        counts = np.sum([rest_counts(g, head, joined, signless, every) for g in groups], axis=0)
    return looks_dense(counts, low + (not signless), level)


def dense_tail(words: Words, counts: I64, level: Level) -> bool:
    """Say whether a byte plane of a group, of which a sample was counted, is not worth counting."""
    return words.size >= DENSE and looks_dense(counts, 8, level)


@dataclass(frozen=True, slots=True)
class KeyPlan:
    """How the keys of a group are coded. `shared`: with the table of the nearest earlier group that has one."""

    joined: int
    codec: int
    window: Window
    table: Table | None
    shared: bool


def rules_of(n: int, size: int, head: Head, level: Level) -> Rules | None:
    """Return what `record_planner` plans a chunk of n elements in groups of `size` by, None when that is not for it: it does
    what follows here, and in encoding, but for small chunks, levels that try everything and cases that are not usual.
    """
    if level.exhaustive or n < _MANY or min(size, n - (n - 1) // size * size) < DENSE:
        return None
    candidates = joined_candidates(head, level)
    ranges = level.codecs[0] == RANS
    part = _dense_part(level)
    return Rules(candidates[0], len(candidates) == 1, ranges, _every(n, level), _DENSE_EVERY, level.segment, part)


def take_survey(words: Words, size: int, head: Head, level: Level) -> Survey:
    """Count what `plan_keys`, `dense_rests` and `dense_tail` need to know of elements in groups of `size`."""
    sample = _DENSE_EVERY // 8 if level.exhaustive else _DENSE_EVERY
    return survey(words, size, head, max(joined_candidates(head, level)), _every(words.size, level), sample)


def _every(n: int, level: Level) -> int:
    return min(_EVERY // 4 if level.exhaustive else _EVERY, max(1, n // SAMPLE))


def plan_keys(groups: list[Words], found: Survey, head: Head, level: Level) -> list[KeyPlan]:
    """Choose joined bits, codec and tables for the keys of a chunk's groups.

    The groups share a table unless one of its own saves a group more than it costs.
    """
    candidates = joined_candidates(head, level)
    widest = max(candidates)
    n = sum(g.size for g in groups)
    every = _every(n, level)
    best: tuple[int, list[KeyPlan]] | None = None
    for joined in candidates:
        counts = found.keys.reshape(len(groups), -1, 1 << (widest - joined)).sum(axis=2)
        rest = (head.mantissa - joined + 1) * n // 8
        pooled = counts.sum(axis=0)
        bits = head.exponent + joined
        everything = Window(0, 1, pooled.size - 1, True, 0)
        options: list[tuple[int, list[KeyPlan]]] = []
        if bits <= 8:
            options.append((rows.packed_size(n, bits), [KeyPlan(joined, RAW, everything, None, False)] * len(groups)))
        if np.count_nonzero(pooled) == 1 and all(same_keys(g, head, joined) for g in groups):
            key = Window(int(pooled.argmax()), 1, pooled.size - 1, True, 0)
            options.append((0, [KeyPlan(joined, CONSTANT, key, None, False)] * len(groups)))
        else:
            codecs = level.codecs if n < _MANY else level.codecs[:1]
            options += [_with_tables(counts, pooled, every, joined, codec, level) for codec in codecs]
        for size, plans in options:
            if best is None or size + rest < best[0]:
                best = size + rest, plans
        # Narrower keys win in small groups, by their smaller tables, or where nothing pays: else don't ask.
        if n >= _MANY and best is not None and best[0] < n * 2 * 9 // 10:
            break
    assert best is not None
    return best[1]


def _with_tables(
    counts: I64, pooled: I64, every: int, joined: int, codec: int, level: Level
) -> tuple[int, list[KeyPlan]]:
    """Return the estimated size of all groups' keys, and how to code them, with tables of that codec."""
    mapping = _narrowest(pooled, every)
    common = make_table(codec, mapping.counts)
    size, plans = 0, []
    current: Table | None = None
    for row in counts:
        n = int(row.sum())
        here = map_again(mapping.window, row)
        shared = coded_size(codec, common, current is common, here.counts, n, here.escapes, level)
        table, cost, window = common, shared, mapping.window
        if len(counts) > 1:
            own_mapping = map_keys(row, holes=every > 1) if level.exhaustive else _filled(here, every)
            own = make_table(codec, own_mapping.counts)
            own_size = coded_size(
                codec, own, False, own_mapping.counts, n, own_mapping.escapes, level
            )
            # The next group will want the common table again.
            if own_size + own_mapping.counts.size // 2 < shared:
                table, cost, window = own, own_size, own_mapping.window
        plans.append(KeyPlan(joined, codec, window, table, table is current))
        current = table
        size += cost
    return size, plans


def _narrowest(pooled: I64, every: int) -> Mapping:
    """Map keys into 128 bytes, which decode fastest, unless that costs a thousandth of a bit a key."""
    mapping = map_keys(pooled, holes=every > 1)
    if pooled.size > 256 and mapping.window.high - mapping.window.low >= rans.NARROW - 1:
        narrow = map_keys(pooled, limit=rans.NARROW - 1, holes=every > 1)
        if (narrow.escapes - mapping.escapes) * 32 * 1024 < int(pooled.sum()):
            return narrow
    return mapping


def _filled(mapping: Mapping, every: int) -> Mapping:
    """Give every byte that the window may give a count, where the counts are of a sample."""
    counts = mapping.counts
    w = mapping.window
    if every > 1:
        inside = counts[w.low - w.base : w.high - w.base + 1]
        inside[inside == 0] = 1
        if w.zero and counts[0] == 0:
            counts[0] = 1
    if np.count_nonzero(counts) < 2:
        counts[0 if counts[0] == 0 else 1] = 1
    return Mapping(w, counts, mapping.escapes)


def joined_candidates(head: Head, level: Level) -> tuple[int, ...]:
    """Return the numbers of joined mantissa bits that the level tries for a head, the widest first."""
    return tuple(t for t in level.joined if t in head.joined) or head.joined
