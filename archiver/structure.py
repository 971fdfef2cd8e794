"""Which transform suits a chunk (FORMAT.md, section 6.3): decided from samples, in integers, the same on every machine.

Sizes are order-0 entropies: what the coders of the planes reach, with and without the transform.
"""

from typing import Any

import numpy as np

from tzip.coders import grid, records, transforms, vocabulary
from tzip.coders.arrays import U8, Words
from tzip.coders.fitting import cost, quantize
from tzip.coders.planes import SPLITS, WORD
from tzip.coders.sampling import Look, counts_of, entropy, look, runs
from tzip.coders.transforms import Transformed
from tzip.formats.layout import GROUP_ELEMENTS

_LEAST = 256  # elements; below, the 64 bytes of a transform header are a tenth of the chunk
_HEADER, _ENTRY, _TABLE = 64 * 8, 16 * 8, 132 * 8  # bits: transform header, block entry, states of a coded block
_SAMPLE_RECORDS = 4096
_SAMPLE_RUNS, _SAMPLE_RUN = 64, 256
_CONTAINERS = {"bf16": grid.BF16, "f16": grid.F16, "f32": grid.F32_ELEMENTS}
_FLOATS = {s.name: s for s in SPLITS.values() if s.head is not None}
_FREQUENT = 128  # values; a vocabulary has codes of one byte for these or more
_GROUP_SIZES = (128, 64, 32)  # blocks that quantisers use along flattened elements

Candidate = tuple[int, Transformed]


def find(raw: U8, width: int, coding: str, row: int, first: int) -> Transformed | None:
    """Return the transform that makes a chunk of elements `raw`, shape (n * width,), at least 2 % smaller, or None.

    `coding` is bf16, f16, f32, f64 or planes; rows of the tensor have `row` elements (0: unknown), and `first` elements
    of it precede the chunk. Integers in a short range are made shorter also when their planes gain nothing, for
    zstandard gains by it (token ids, measured: 8.6 -> 7.7 %).
    """
    n = raw.size // width
    if n < _LEAST or coding == "opaque":
        return None
    if raw.ctypes.data % width:
        raw = raw.copy()
    words: Words = raw.view(WORD[width])
    seen = look(words)
    if seen.steady:
        sequence = transforms.difference(raw, width)
        inner = sequence.inner.view(WORD[width])
        if (inner == inner[0]).all():
            if inner[0]:
                return sequence
            return transforms.sparse(raw, width, int(words[0])) if width > 1 else None
    if coding == "planes":
        return _integers(raw, words, width, seen, row, first)
    container = _CONTAINERS.get(coding)
    candidates = _few(raw, width, seen)
    often = seen.share * 32 >= seen.size
    if not candidates and container is not None:
        informative, consistent = grid.probe(words, container, row, first)
        if consistent or (often and not informative):
            candidates += _grid(raw, width, container, row, first)
    if not candidates and not often:
        return None
    sample = runs(words, _SAMPLE_RUNS, _SAMPLE_RUN).reshape(-1)
    plain = _plain(sample, coding, n)
    if often and seen.share < seen.size:
        most = min([plain * 98 // 100, *(size for size, _ in candidates)])
        candidates += _sparse(raw, sample, width, coding, seen.common, most)
    return _best(candidates, plain)


def _integers(raw: U8, words: Words, width: int, seen: Look, row: int, first: int) -> Transformed | None:
    if _rows_repeat(words, row):
        return transforms.difference(raw, width, row)
    candidates = _few(raw, width, seen)
    if width == 1:
        candidates += _records(raw, row, first)
    shorter: Candidate | None = None
    plain = 0
    if width > 1:
        small = runs(words, 32, 32).astype(WORD[width])
        if seen.share * 16 >= seen.size and seen.share < seen.size:
            sample = runs(words, _SAMPLE_RUNS, _SAMPLE_RUN).reshape(-1)
            plain = _plain(sample, "planes", words.size)
            candidates += _sparse(raw, sample, width, "planes", seen.common, plain * 98 // 100)
        signed = small.view(f"<i{width}")
        if _smooth(signed):
            steps = np.diff(runs(words, _SAMPLE_RUNS, _SAMPLE_RUN), axis=1).reshape(-1)
            size = _plain(steps, "planes", words.size)
            candidates.append((size + _HEADER, transforms.difference(raw, width)))
        if _short(signed, width) or _short(small, width):
            shorter = _shorter(raw, width)
        candidates += _vocabulary(raw, words, width, small, signed)
    if not candidates and shorter is None:
        return None
    plain = plain or _plain(runs(words, _SAMPLE_RUNS, _SAMPLE_RUN).reshape(-1), "planes", words.size)
    best = _best(candidates, plain)
    if shorter is None:
        return best
    if best is None or min(c[0] for c in candidates) * 10 > shorter[0] * 9:
        return shorter[1]
    return best


def _best(candidates: list[Candidate], plain: int) -> Transformed | None:
    if not candidates:
        return None
    size, found = min(candidates, key=lambda c: c[0])
    least = 5 if found.kind == transforms.RECORDS else 20  # of a thousand: to take records apart is but copying
    return found if size * 1000 <= plain * (1000 - least) else None


# ---------------------------------------------------------------- candidates, with their sizes in bits


def _few(raw: U8, width: int, seen: Look) -> list[Candidate]:
    """A palette, when the chunk has few values."""
    most = 16 if width == 1 else 256
    made = transforms.palette(raw, width, most) if seen.values <= most else None
    if made is None:
        return []
    return [(_symbols(counts_of(made.inner, 0, 8), made.inner.size) + made.side_a.size * 8 + _HEADER, made)]


def _grid(raw: U8, width: int, container: int, row: int, first: int) -> list[Candidate]:
    n = raw.size // width
    layouts = [(row, row - first % row)] if 32 <= row <= n else []
    fitting = [size for size in _GROUP_SIZES if size < n and size != row and (row == 0 or row % size == 0)]
    layouts += [(size, size - first % size) for size in fitting]
    made = transforms.grid(raw, width, container, layouts)
    if made is None:
        return []
    side = (made.side_a.size + made.side_b.size) * 8
    return [(_symbols(counts_of(made.inner, 0, 8), n) + side + _HEADER, made)]


def _plan(size: int, *fields: range) -> U8:
    """Return the field of each byte of a record: that of the range it is in, the last one where it is in none."""
    plan = np.full(size, len(fields), np.uint8)
    for number, places in enumerate(fields):
        plan[list(places)] = number
    return plan


def _halves(at: int) -> tuple[range, range]:
    """The high byte and the low byte of a float16."""
    return range(at + 1, at + 2), range(at, at + 1)


# The records of quantised weights, by their bytes: GGUF's blocks (facts of its public specification).
_PLANS = {
    34: _plan(34, *_halves(0)),  # Q8_0
    18: _plan(18, *_halves(0)),  # Q4_0, IQ4_NL
    20: _plan(20, *_halves(0), *_halves(2)),  # Q4_1
    17: _plan(17, range(1)),  # MXFP4
    22: _plan(22, *_halves(0), range(2, 6)),  # Q5_0
    24: _plan(24, *_halves(0), *_halves(2), range(4, 8)),  # Q5_1
    84: _plan(84, *_halves(80), *_halves(82), range(16)),  # Q2_K
    110: _plan(110, *_halves(108), range(32), range(96, 108)),  # Q3_K
    144: _plan(144, *_halves(0), *_halves(2), range(4, 16)),  # Q4_K
    176: _plan(176, *_halves(0), *_halves(2), range(4, 16), range(16, 48)),  # Q5_K
    210: _plan(210, *_halves(208), range(192, 208), range(128, 192)),  # Q6_K
    136: _plan(136, *_halves(0), range(2, 8)),  # IQ4_XS
}


def _records(raw: U8, row: int, first: int) -> list[Candidate]:
    """Fields of records, when rows have the size of such as are known."""
    plan = _PLANS.get(row)
    if plan is None or raw.size < 4 * row:
        return []
    made = transforms.fields(raw, plan, -first % row)
    table = made.inner.reshape(-1, row)
    sample = np.ascontiguousarray(table[:: -(-len(table) // _SAMPLE_RECORDS)])
    parts = records.take_apart(sample.reshape(-1), plan)
    size = sum(_symbols(counts_of(part, 0, 8), part.size // len(sample) * len(table)) for part in parts)
    return [(size + (made.side_a.size + made.side_b.size) * 8 + _HEADER, made)]


def _sparse(raw: U8, sample: Words, width: int, coding: str, fill: int, most: int) -> list[Candidate]:
    """A mask, when that makes `most` bits or fewer."""
    n = raw.size // width
    others = sample[sample != sample.dtype.type(fill)]
    counts = np.array([others.size, sample.size - others.size])
    mask = entropy(counts) * n // sample.size
    size = mask + _plain(others, coding, n * others.size // sample.size) + _HEADER
    return [(size, transforms.sparse(raw, width, fill))] if size <= most else []


def _shorter(raw: U8, width: int) -> Candidate | None:
    made = transforms.offset(raw, width, signed=True) or transforms.offset(raw, width, signed=False)
    if made is None:
        return None
    sample = runs(made.inner.view(WORD[made.inner_width]), _SAMPLE_RUNS, _SAMPLE_RUN).reshape(-1)
    return _plain(sample, "planes", raw.size // width) + _HEADER, made


def _vocabulary(raw: U8, words: Words, width: int, small: Any, signed: Any) -> list[Candidate]:
    """Codes of one to three bytes, when half of the elements or more could have one of one byte."""
    span = min(int(s.max()) - int(s.min()) for s in (small, signed))
    if not 256 <= span < vocabulary.MOST_RANGE:
        return []
    sample = runs(words, _SAMPLE_RUNS, _SAMPLE_RUN).reshape(-1)
    _, counts = np.unique(sample, return_counts=True)
    if 2 * int(np.sort(counts)[-_FREQUENT:].sum()) < sample.size:
        return []
    made = transforms.codes(raw, width)
    if made is None:
        return []
    others = int(np.unpackbits(made.side_b).sum())
    side = made.side_a.size * 4 + entropy(np.array([others, 8 * made.side_b.size - others]))
    return [(_symbols(counts_of(made.inner, 0, 8), made.inner.size) + side + _HEADER, made)]


def _smooth(sample: Any) -> bool:
    """Say whether neighbours differ by far less than the whole sample, shape (runs, length), of signed integers."""
    if sample.shape[1] < 2 or sample.min() == sample.max():
        return False
    span = int(sample.max()) - int(sample.min())
    steps = np.diff(sample, axis=1)
    return max(int(steps.max()), -int(steps.min())) * 8 <= span


def _rows_repeat(words: Words, row: int) -> bool:
    """Say whether nearly all elements are those of the row before: causal masks, position ids."""
    if not 2 <= row <= words.size // 8:
        return False
    at = np.arange(row, words.size, max(1, (words.size - row) // 4096 | 1))
    return int(np.count_nonzero(words[at] != words[at - row])) * 128 < at.size


def _short(sample: Any, width: int) -> bool:
    return int(sample.max()) - int(sample.min()) < 1 << 4 * width


# ---------------------------------------------------------------- sizes


def _symbols(counts: Any, n: int) -> int:
    """Return the bits of n bytes whose sample has these counts of values: coded, or raw where coding does not pay."""
    total = int(counts.sum())
    distinct = int(np.count_nonzero(counts))
    entries = -(-n // GROUP_ELEMENTS) * _ENTRY
    if distinct <= 1:
        return entries
    # A byte that occurs takes a slot of 4096 at least: rare ones are dearer than their entropy.
    coded = cost(counts, quantize(counts).freq) if counts.size == 256 else entropy(counts)
    return min(coded * n // total + 12 * distinct + _TABLE, 8 * n) + entries


def _plain(sample: Words, coding: str, n: int) -> int:
    """Return the bits of n elements of which `sample`, shape (k,), is some, coded without a transform."""
    if not sample.size or not n:
        return 0
    sample = np.ascontiguousarray(sample)
    width = sample.itemsize
    if coding == "planes":
        return sum(_symbols(counts_of(sample, 8 * k, 8), n) for k in range(width))
    head = _FLOATS[coding].head
    if head is None:
        return 0
    joined = head.joined[-1]
    low = head.mantissa - joined
    top = sample >> sample.dtype.type(8 * width - 16)
    keys = counts_of(top, low, head.exponent + joined)
    rest = top & sample.dtype.type((1 << low) - 1) | (top >> sample.dtype.type(15)) << sample.dtype.type(low)
    rests = counts_of(rest, 0, low + 1)
    negative = int(rests[1 << low :].sum())
    bits = low + (0 < negative < sample.size)
    size = _symbols(keys, n) + min(_symbols(rests, n), bits * n)
    return size + sum(_symbols(counts_of(sample, 8 * k, 8), n) for k in range(width - 2))
