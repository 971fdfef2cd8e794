"""Transforms: structure that is taken off a chunk before the split (FORMAT.md, section 6.3).

Each forward function is exact for every bit pattern, or returns None. `check` proves what the header alone can show,
`invert` the rest, before a kernel uses a number from the file as an index.
"""

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Protocol, no_type_check

import numpy as np
from numpy.typing import NDArray

from tzip.coders import delta, masks, order, predictors, records, sampling, vocabulary
from tzip.coders import grid as grids
from tzip.coders import palette as palettes
from tzip.coders.arrays import I64, U8, U64, Words
from tzip.coders.errors import CorruptError, UnsupportedError
from tzip.coders.jit import kernel
from tzip.coders.planes import SMALL, WORD

PALETTE, GRID, SPARSE, DIFFERENCE, OFFSET, ROWS, DELTA, RECORDS, UNCHANGED = range(1, 10)
VOCABULARY = 12
TRANSFORMS: dict[int, str] = {
    PALETTE: "palette",
    GRID: "grid",
    SPARSE: "sparse",
    DIFFERENCE: "difference",
    OFFSET: "offset",
    ROWS: "rows",
    DELTA: "delta",
    RECORDS: "records",
    UNCHANGED: "unchanged",
    VOCABULARY: "vocabulary",
}
CLASSED = (DELTA, RECORDS)  # inner elements lie class by class, and the sizes of these follow the header
MAX_ELEMENTS = 1 << 20
MAX_INNER = 1 << 22  # of a vocabulary; others have as many as there are elements
MAX_GROUPS = 32
MAX_STRING = grids.MAX_STRING


class TransformHeader(Protocol):
    """The fields of a transform header."""

    @property
    def inner(self) -> int: ...
    @property
    def inner_width(self) -> int: ...
    @property
    def a(self) -> int: ...
    @property
    def size_a(self) -> int: ...
    @property
    def size_b(self) -> int: ...
    @property
    def b(self) -> int: ...
    @property
    def c(self) -> int: ...
    @property
    def v(self) -> int: ...


def _none() -> U8:
    return np.empty(0, np.uint8)


@dataclass(frozen=True, slots=True)
class Transformed:
    """A chunk after a transform: raw inner elements, shape (m * inner_width,), parameters, and the strings A and B."""

    kind: int
    inner: U8
    inner_width: int
    a: int = 0
    b: int = 0
    c: int = 0
    v: int = 0
    side_a: U8 = field(default_factory=_none)
    side_b: U8 = field(default_factory=_none)
    sizes: bytes = b""  # of the classes, for a delta


# ---------------------------------------------------------------- reading


def check(kind: int, n: int, width: int, head: TransformHeader) -> None:
    """Prove what the header of a transform shows alone, for n elements of `width` bytes.

    Raises UnsupportedError for an unknown kind, CorruptError for what no transform of that kind has.
    """
    if kind not in TRANSFORMS:
        raise UnsupportedError(f"transform {kind} is not known to this tzip; upgrade it")
    if not 1 <= n <= MAX_ELEMENTS or width not in WORD or not 0 <= head.inner <= MAX_INNER:
        raise CorruptError(f"{TRANSFORMS[kind]}: {n} elements of {width} bytes, {head.inner} inner ones")
    if not (0 <= head.size_a <= MAX_STRING and 0 <= head.size_b <= (predictors.MAX_STRING if kind == DELTA else MAX_STRING)):
        raise CorruptError(f"{TRANSFORMS[kind]}: strings of {head.size_a} and {head.size_b} bytes")
    if not _HOLDS[kind](n, width, head):
        raise CorruptError(f"{TRANSFORMS[kind]}: the header contradicts itself for {n} elements of {width} bytes")
    if kind == DELTA:
        predictors.check(head.v, width, head.size_b)


def _unnamed(head: TransformHeader, *named: str) -> bool:
    """Say whether the parameters and strings that a transform does not name are zero."""
    return not any(getattr(head, f) for f in ("a", "size_a", "size_b", "b", "c", "v") if f not in named)


def _palette_holds(n: int, width: int, head: TransformHeader) -> bool:
    if head.a not in (1, 2, 4, 8) or head.inner_width != 1 or head.inner != -(-n * head.a // 8):
        return False
    k, odd = divmod(head.size_a, width)
    return not odd and 1 <= k <= 1 << head.a and _unnamed(head, "a", "size_a")


def _grid_holds(n: int, width: int, head: TransformHeader) -> bool:
    container, storage = head.a & 15, head.a >> 4
    if grids.ELEMENT_WIDTH.get(container) != width or storage not in grids.SCALE_WIDTH:
        return False
    if not 1 <= head.c <= head.b <= MAX_ELEMENTS or head.inner_width != 1 or head.inner != n:
        return False
    if head.size_b % (4 + width) or head.size_b // (4 + width) > n:
        return False
    blocks = grids.blocks_of(n, head.c, head.b)
    return head.size_a == blocks * grids.SCALE_WIDTH[storage] and _unnamed(head, "a", "size_a", "size_b", "b", "c")


def _sparse_holds(n: int, width: int, head: TransformHeader) -> bool:
    if head.inner_width != width or head.inner > n or head.size_a != -(-n // 8):
        return False
    return head.v >> 8 * width == 0 and _unnamed(head, "size_a", "v")


def _difference_holds(n: int, width: int, head: TransformHeader) -> bool:
    if head.inner_width != width or head.inner != n or not 1 <= head.b <= MAX_ELEMENTS:
        return False
    return head.v >> 8 * width == 0 and _unnamed(head, "b", "c", "v")


def _rows_hold(n: int, width: int, head: TransformHeader) -> bool:
    if head.inner_width != width or head.inner != n or not 1 <= head.c <= head.b <= MAX_ELEMENTS:
        return False
    if not 1 <= head.a <= MAX_GROUPS or head.size_a != order.row_count(n, head.c, head.b):
        return False
    return _unnamed(head, "a", "size_a", "b", "c")


def _offset_holds(n: int, width: int, head: TransformHeader) -> bool:
    if head.inner_width not in WORD or head.inner_width >= width or head.inner != n:
        return False
    return head.v >> 8 * width == 0 and _unnamed(head, "v")


def _delta_holds(n: int, width: int, head: TransformHeader) -> bool:
    shift, bits = head.c & 255, head.c >> 8
    if head.inner_width != width or head.a > delta.TURNED or not 1 <= bits <= 11 or shift + bits > 8 * width:
        return False
    if head.b >> bits or head.size_a not in (0, -(-n // 8)) or head.v >> 8 * width:
        return False
    return head.inner in (0, n) if not head.size_a else 1 <= head.inner < n


def _records_hold(n: int, width: int, head: TransformHeader) -> bool:
    if width != 1 or head.inner_width != 1 or not 2 <= head.b <= records.MAX_BYTES or head.c >= head.b:
        return False
    count = (n - head.c) // head.b
    if count < 1 or head.inner != count * head.b or head.size_a != head.b or head.size_b != n - head.inner:
        return False
    return _unnamed(head, "size_a", "size_b", "b", "c")


def _vocabulary_holds(n: int, width: int, head: TransformHeader) -> bool:
    if head.inner_width != 1 or not n <= head.inner <= min(3, width) * n:
        return False
    if head.size_a % 4 or head.size_a // 4 + head.b > 256:
        return False
    return head.v >> 8 * width == 0 and _unnamed(head, "size_a", "size_b", "b", "v")


def _has_no_header(n: int, width: int, head: TransformHeader) -> bool:
    return False


_HOLDS = {
    PALETTE: _palette_holds,
    GRID: _grid_holds,
    SPARSE: _sparse_holds,
    DIFFERENCE: _difference_holds,
    OFFSET: _offset_holds,
    ROWS: _rows_hold,
    DELTA: _delta_holds,
    RECORDS: _records_hold,
    VOCABULARY: _vocabulary_holds,
    UNCHANGED: _has_no_header,
}


def invert(kind: int, inner: U8, side_a: U8, side_b: U8, head: TransformHeader, width: int, out: U8) -> None:
    """Fill `out`, shape (n * width,), with the elements that the inner ones, shape (m * inner_width,), stand for.

    Raises CorruptError, or UnsupportedError, for all that section 6.3 rules out.
    """
    n, odd = divmod(out.size, width)
    check(kind, n, width, head)
    check_strings(kind, n, width, head, side_a, side_b)
    if odd or inner.size != head.inner * head.inner_width:
        raise CorruptError(f"{TRANSFORMS[kind]}: {inner.size} bytes of inner elements for {out.size} of elements")
    target = out if _fits(out, 8) else np.empty(out.size, np.uint8)  # 8: a palette writes words of up to 8 bytes
    words = target.view(WORD[width])
    symbols = _words(inner, head.inner_width)
    if kind == PALETTE:
        palettes.invert(inner, side_a, head.a, width, target)
    elif kind == GRID:
        scales = grids.read_scales(side_a, head.a >> 4)
        grids.multiply(symbols, scales, head.c, head.b, head.a & 15, words)
        at, elements = grids.read_exceptions(side_b, n, width)
        words[at] = elements
    elif kind == SPARSE:
        _invert_sparse(symbols, side_a, head.v, words)
    elif kind == DIFFERENCE:
        end = 1 << 8 * width
        start = words.dtype.type((head.v - head.b * head.c) % end)  # of the ramp before the first element
        if head.b == 1 and words.size <= SMALL:
            words[:] = np.cumsum(symbols, dtype=words.dtype) + start
        elif head.b == 1:
            _sum(symbols, start, words)
        else:
            _sum_far(symbols, start, words.dtype.type(head.c % end), head.b, words)
    elif kind == DELTA:
        raise CorruptError("delta: a difference from nothing")
    elif kind == RECORDS:
        end = head.c + head.inner
        target[: head.c], target[end:] = side_b[: head.c], side_b[head.c :]
        records.put_together(inner, side_a, target[head.c : end])
    elif kind == ROWS:
        order.scatter(symbols, head.c, head.b, side_a, words)
    elif kind == VOCABULARY:
        if not vocabulary.decode(inner, side_a.view("<u4"), side_b, head.b, head.v, words):
            raise CorruptError("vocabulary: the inner elements are not the codes of so many elements")
    else:
        np.add(symbols, words.dtype.type(head.v), out=words, dtype=words.dtype, casting="unsafe")
    if target is not out:
        out[:] = target


def check_strings(kind: int, n: int, width: int, head: TransformHeader, side_a: U8, side_b: U8) -> None:
    """Prove the strings of a transform whose header `check` has proven; `invert` does so, too.

    Raises CorruptError for all that section 6.3 rules out without a look at the inner elements.
    """
    if (side_a.size, side_b.size) != (head.size_a, head.size_b):
        raise CorruptError(f"{TRANSFORMS[kind]}: strings of another size than the header says")
    if kind == GRID:
        grids.read_scales(side_a, head.a >> 4)
        grids.read_exceptions(side_b, n, width)
    elif kind == RECORDS:
        if int(side_a.max()) >= records.FIELDS:
            raise CorruptError("records: a byte of a field past the last one")
    elif kind == SPARSE or (kind == DELTA and side_a.size):
        if n % 8 and int(side_a[-1]) >> n % 8:
            raise CorruptError(f"{TRANSFORMS[kind]}: unused bits of the mask are not zero")
        ones = int(_count_ones(_words(side_a[: side_a.size // 8 * 8], 8)))
        ones += sum(int(b).bit_count() for b in side_a[side_a.size // 8 * 8 :])
        if ones != head.inner:
            raise CorruptError(f"{TRANSFORMS[kind]}: {head.inner} inner elements, but the mask has {ones}")


_FEW = 1 << 16  # changed elements
# Where the exponent of an element is, (shift, bits): how far it moves depends on it. Others have classes by their top bits.
_FIELDS = {"bf16": (7, 8), "f16": (10, 5), "f32": (23, 8), "f64": (52, 11)}
_FAR = (predictors.LEVELS, predictors.ROOT)  # what these say is a scale
_CLASS_BITS = 8 * 2 * 400  # what a class costs: two tables and the states of their streams


def _lower_pays(edges: I64) -> bool:
    """Say whether a class of its own serves the elements of the lowest field better than those of the field 6 above it.

    The most elements lie in the fields that are chosen first, but where most are unchanged the others move more: bfloat16
    weights a step apart take 0.017 points less so.
    """
    below, low, high, above = edges
    lost = sampling.entropy(below + low) - sampling.entropy(below) - sampling.entropy(low)
    return lost > sampling.entropy(high + above) - sampling.entropy(high) - sampling.entropy(above)


def _classes_pay(apart: Words, classes: U8) -> bool:
    """Say whether tables of their own gain classes what they cost, by the highest byte of each element."""
    counts = np.zeros((delta.CLASSES, 256))
    top = (apart >> apart.dtype.type(8 * apart.itemsize - 8)).astype(np.int64)
    counts += np.bincount(classes.astype(np.int64) << 8 | top, minlength=counts.size).reshape(counts.shape)
    used = int(np.count_nonzero(counts.sum(axis=1)))
    return _entropy(counts.sum(axis=0)) - sum(map(_entropy, counts)) > used * _CLASS_BITS


def _entropy(counts: NDArray[np.float64]) -> float:
    used = counts[counts > 0]
    return float((used * np.log2(used.sum() / used)).sum())


def delta_mode(coding: str) -> int:
    """Return how elements of that coding become integers whose differences are small."""
    return delta.ORDERED if coding in _FIELDS else delta.PLAIN


def from_base(
    raw: U8, width: int, coding: str, base: U8, predictor: int = 0, string: U8 | None = None, context: Words | None = None
) -> tuple[Transformed, list[Words]]:
    """Return elements, shape (n * width,) as bytes, as differences from as many of a base, and these class by class.

    `base` is what `predictor` made, with the parameters `string`; `context` what it says of the classes, where that is not the
    base. The classes' elements are in scratch memory. Where seven of eight elements or more are those of the base, a mask says
    which are not.
    """
    words, earlier = _words(raw, width), _words(base, width)
    scale = earlier if context is None else context
    shift, bits = _FIELDS.get(coding, (8 * width - 5, 4)) if context is None else (0, 8)
    mode = delta.TURNED if predictor in _FAR else delta_mode(coding)
    n = words.size
    side_b = _none() if string is None else string
    differ = words != earlier
    changed = int(np.count_nonzero(differ))
    if not changed:
        made = Transformed(DELTA, _none(), width, mode, 0, shift | bits << 8, predictor, side_b=side_b)
        return replace(made, sizes=bytes(4 * delta.CLASSES)), []
    last = (1 << bits) - 1  # as the lowest class: all elements are of it
    mask = _none()
    if changed * 8 <= n and changed < _FEW:
        # One class: what eight tables and their streams cost is more than they gain. Nothing else is done for the elements that
        # stay: at 1 % of them changed that took ten times as long.
        mask = np.packbits(differ, bitorder="little")
        lowest, where = last, masks.places(mask, changed)
        apart, classes = delta.subtract(words[where], earlier[where], mode), np.zeros(changed, np.uint8)
    else:
        sums = np.concatenate(([0], np.cumsum(delta.field_counts(scale, shift, bits)), np.zeros(delta.CLASSES)))
        sums[-delta.CLASSES :] = sums[1 << bits]
        lowest = int((sums[delta.CLASSES :] - sums[: -delta.CLASSES])[: 1 << bits].argmax())
        apart = delta.subtract(words, earlier, mode)
        if lowest and changed * 2 < n and _lower_pays(delta.edge_counts(apart, scale, lowest, shift, bits)):
            lowest -= 1
        classes = delta.classes_of(scale, lowest, shift, bits)
        if mode == delta.TURNED and not _classes_pay(apart, classes):
            lowest, classes = last, np.zeros(n, np.uint8)
        # A mask and what is changed apart, when that is little, or is changed so much that a table over both holds neither well
        # (20 % of bfloat16 weights at random: 4.7 -> 4.0 bits a weight).
        far = width > 1 and changed * 2 <= n and int(np.count_nonzero(apart >> apart.dtype.type(8))) * 4 > changed
        if changed * 8 <= n or far:
            if changed < _FEW:
                lowest, classes = last, np.zeros(n, np.uint8)
            mask, apart, classes = np.packbits(differ, bitorder="little"), apart[differ], classes[differ]
    groups = delta.by_class(apart, classes)
    sizes = np.array([g.size for g in groups], np.uint32).tobytes()
    inner = np.empty(changed if mask.size else n, words.dtype).view(np.uint8)  # its size counts; the groups have the elements
    made = Transformed(DELTA, inner, width, mode, lowest, shift | bits << 8, predictor, mask, side_b, sizes)
    return made, groups


def to_base(
    inner: U8, mask: U8, head: TransformHeader, counts: I64, width: int, base: U8, out: U8, context: Words | None = None
) -> None:
    """Fill `out`, shape (n * width,), with elements from their differences from `base`, of the same shape.

    `inner` has 64 bytes more than its elements, which lie class by class; `context`, shape (n,): what the classes are of, when
    it is not the base. Raises CorruptError when the base is not the one
    that they were made from, as far as the classes show it. Needs: header and mask as `check` and `check_strings` prove them.
    """
    earlier = _words(base, width)
    if not head.inner:
        out[:] = base
        return
    scale = earlier if context is None else context
    target = out if _fits(out, width) else np.empty(out.size, np.uint8)
    where = masks.places(mask, head.inner) if mask.size else None
    if where is not None:
        scale = scale[where]
    classes = delta.classes_of(scale, head.b, head.c & 255, head.c >> 8)
    if not np.array_equal(delta.class_counts(classes), counts):
        raise CorruptError("the base is not the one that this was packed against")
    apart = delta.in_order(inner.view(WORD[width]), classes, counts)
    words = target.view(WORD[width])
    if where is not None:
        np.copyto(words, earlier)
        changed = np.empty(where.size, words.dtype)
        delta.add(apart, earlier[where], head.a, changed)
        words[where] = changed
    else:
        delta.add(apart, earlier, head.a, words)
    if target is not out:
        out[:] = target


def _fits(raw: U8, width: int) -> bool:
    return raw.flags.c_contiguous and raw.ctypes.data % width == 0


def _words(raw: U8, width: int) -> Words:
    """Return the elements of raw bytes; a copy when they are not aligned."""
    return (raw if _fits(raw, width) else raw.copy()).view(WORD[width])


def _invert_sparse(inner: Words, mask: U8, fill: int, out: Words) -> None:
    if not inner.size:
        out[:] = fill
        return
    values = np.empty(inner.size + 1, inner.dtype)
    values[0] = fill
    values[1:] = inner
    _expand(values, mask, _ranks(), out)  # `check_strings` has proven the mask


@cache
def _ranks() -> U8:
    """Return, for each byte and bit, the number of bits set below that one."""
    ones = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return (np.cumsum(ones, axis=1) - ones).astype(np.uint8).reshape(-1)


# ---------------------------------------------------------------- applying


def palette(raw: U8, width: int, most: int = 256) -> Transformed | None:
    """Return elements, shape (n * width,) as bytes, as indices of 1, 2, 4 or 8 bits; None with more than `most` values."""
    found = palettes.indexed(_words(raw, width), most)
    if found is None:
        return None
    bits, indices, side = palettes.packed(*found)
    return Transformed(PALETTE, indices, 1, a=bits, side_a=side)


def grid(raw: U8, width: int, container: int, layouts: list[tuple[int, int]]) -> Transformed | None:
    """Return floats as integers times a scale, with the best of `layouts`: (elements of a block, of the first one).

    `container` is grid.BF16, F16 or F32_ELEMENTS. None when no layout suits or the exceptions are too many to list.
    """
    found = grids.recover(_words(raw, width), container, layouts)
    if found is None:
        return None
    codes, size, first = found
    a = container | codes.storage << 4
    return Transformed(GRID, codes.codes, 1, a=a, b=size, c=first, side_a=codes.scales, side_b=codes.exceptions)


def sparse(raw: U8, width: int, fill: int) -> Transformed:
    """Return the elements that are not `fill`, and a mask of where they are."""
    words = _words(raw, width)
    value = words.dtype.type(fill)
    mask = np.packbits(words != value, bitorder="little")
    inner = np.empty(words.size + 1, words.dtype)
    count = _compress(words, value, inner)
    return Transformed(SPARSE, inner[:count].view(np.uint8), width, v=fill, side_a=mask)


def difference(raw: U8, width: int, distance: int = 1) -> Transformed:
    """Return each element as the difference from the one `distance` before.

    At distance 1 the first one has the second's; else the first ones, when they are a ramp, that of the one behind them.
    """
    words = _words(raw, width)
    inner = np.empty_like(words)
    np.subtract(words[distance:], words[:-distance], out=inner[distance:])
    start = step = 0
    if distance == 1:
        inner[0] = inner[1] if words.size > 1 else 0
        start = int(words[0]) - int(inner[0])
    else:
        inner[:distance] = words[:distance]
        slope = np.diff(words[:distance])
        if words.size > distance and int(slope[0]) < 1 << 32 and (slope == slope[0]).all():
            step = int(slope[0])
            inner[:distance] = inner[distance]
            start = int(words[0]) + distance * step - int(inner[distance])
    return Transformed(DIFFERENCE, inner.view(np.uint8), width, b=distance, c=step, v=start & (1 << 8 * width) - 1)


def rows(raw: U8, width: int, row: int, first: int, classes: U8, groups: int) -> Transformed:
    """Return the rows sorted by class, see order.gather, to be coded in `groups` groups."""
    inner = np.empty_like(_words(raw, width))
    order.gather(_words(raw, width), first, row, classes, inner)
    return Transformed(ROWS, inner.view(np.uint8), width, a=groups, b=row, c=first, side_a=classes)


def fields(raw: U8, plan: U8, first: int) -> Transformed:
    """Return records of plan.size bytes, of which the first whole one begins at byte `first`, not yet taken apart.

    `plan`: the field of each byte of a record, below 8.
    """
    count = (raw.size - first) // plan.size
    end = first + count * plan.size
    inner = raw[first:end]
    sizes_ = records.sizes(plan, count).astype(np.uint32).tobytes()
    loose = np.concatenate((raw[:first], raw[end:]))
    return Transformed(RECORDS, inner, 1, b=plan.size, c=first, side_a=plan, side_b=loose, sizes=sizes_)


def codes(raw: U8, width: int) -> Transformed | None:
    """Return integers of a vocabulary as codes; None when they are too far apart, or when that is not shorter."""
    words = _words(raw, width)
    signed = words.view(f"<i{width}")
    least, greatest = int(signed.min()), int(signed.max())
    if least < 0 and int(words.max()) - int(words.min()) < greatest - least:
        least, greatest = int(words.min()), int(words.max())
    if greatest - least >= vocabulary.MOST_RANGE:
        return None
    start = least & (1 << 8 * width) - 1
    made = vocabulary.encode(words, start, greatest - least + 1)
    if made.inner.size > raw.size:
        return None
    side = made.frequent.view(np.uint8)
    return Transformed(VOCABULARY, made.inner, 1, b=made.pairs, v=start, side_a=side, side_b=made.others)


def offset(raw: U8, width: int, signed: bool) -> Transformed | None:
    """Return integers as shorter ones above the least of them, or above zero when that is as short; None when none is.

    `signed` says how they are compared. The result is exact either way.
    """
    words = _words(raw, width)
    integers = words.view(f"<i{width}") if signed else words
    least, greatest = int(integers.min()), int(integers.max())
    for inner_width in (1, 2, 4):
        if inner_width < width and greatest - least < 1 << 8 * inner_width:
            base = 0 if least >= 0 and greatest < 1 << 8 * inner_width else least
            start = base & (1 << 8 * width) - 1
            inner = (words - words.dtype.type(start)).astype(WORD[inner_width])
            return Transformed(OFFSET, inner.view(np.uint8), inner_width, v=start)
    return None


# ---------------------------------------------------------------- kernels


@kernel
@no_type_check
def _count_ones(words: U64) -> int:
    total = np.uint64(0)
    for i in range(words.size):
        x = words[i]
        x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
        x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
        x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
        total += (x * np.uint64(0x0101010101010101)) >> np.uint64(56)
    return np.int64(total)


@kernel
@no_type_check
def _expand(values: Words, mask: U8, ranks: U8, out: Words) -> int:
    """Write values[1 + rank] where bits are set, values[0] elsewhere.

    No branches: where half of the elements are set they cost nine times as much.
    Needs: values.size - 1 bits of `mask` set, none past out.size; mask.size == ceil(out.size / 8); ranks: `_ranks`.
    """
    n = out.size
    at = np.uint64(1)
    for b in range(n // 8):
        bits = np.uint64(mask[b])
        i = np.uint64(b) * np.uint64(8)
        row = bits * np.uint64(8)
        for k in range(8):
            bit = (bits >> np.uint64(k)) & np.uint64(1)
            out[i + np.uint64(k)] = values[(at + np.uint64(ranks[row + np.uint64(k)])) * bit]
        at += np.uint64(ranks[row + np.uint64(7)]) + (bits >> np.uint64(7))
    for j in range(n // 8 * 8, n):
        bit = (np.uint64(mask[j >> 3]) >> np.uint64(j & 7)) & np.uint64(1)
        out[j] = values[at * bit]
        at += bit
    return 0


@kernel
@no_type_check
def _compress(words: Words, fill: Any, inner: Words) -> int:
    """Return the number of elements that are not `fill`. Needs: inner.size == words.size + 1."""
    at = np.uint64(0)
    for i in range(words.size):
        x = words[i]
        inner[at] = x
        at += np.uint64(x != fill)
    return np.int64(at)


@kernel
@no_type_check
def _sum_far(inner: Words, first: Any, step: Any, distance: int, out: Words) -> int:
    """Needs: out.size == inner.size; distance >= 1."""
    before = first
    for i in range(min(distance, out.size)):
        out[i] = inner[i] + before
        before += step
    for i in range(distance, out.size):
        out[i] = inner[i] + out[i - distance]
    return 0


@kernel
@no_type_check
def _sum(inner: Words, first: Any, out: Words) -> int:
    """Needs: inner.size == out.size."""
    x = np.uint64(first)
    for i in range(out.size):
        x += np.uint64(inner[i])
        out[i] = x
    return 0
