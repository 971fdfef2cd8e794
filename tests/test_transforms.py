"""Transforms: exact for every bit pattern, found where they pay, and every forged header or string refused."""

import struct
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tzip.coders import grid as grids
from tzip.coders import order, palette, records, sampling, transforms, vocabulary
from tzip.coders.errors import CorruptError, UnsupportedError
from tzip.coders.transforms import (
    DELTA,
    DIFFERENCE,
    GRID,
    OFFSET,
    PALETTE,
    RECORDS,
    ROWS,
    SPARSE,
    VOCABULARY,
    Transformed,
)
from tzip.structure import find

BF = ml_dtypes.bfloat16
SIZES = [1, 2, 31, 33, 127, 128, 129, 4095, (1 << 17) + 1]
WIDTHS = [1, 2, 4, 8]
CODING = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float64": "f64"}
CONTAINER = {"bf16": grids.BF16, "f16": grids.F16, "f32": grids.F32_ELEMENTS}


@dataclass(frozen=True)
class Header:
    """What formats.layout.TransformHead is for the archive."""

    inner: int
    inner_width: int
    a: int = 0
    size_a: int = 0
    size_b: int = 0
    b: int = 0
    c: int = 0
    v: int = 0


def header(t: Transformed) -> Header:
    return Header(t.inner.size // t.inner_width, t.inner_width, t.a, t.side_a.size, t.side_b.size, t.b, t.c, t.v)


def raw(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def refuse_strings(t: Transformed, size: int, width: int) -> None:
    """Both proofs find it: the one before the inner elements are decoded, and the one of the inverse."""
    with pytest.raises(CorruptError):
        transforms.check_strings(t.kind, size // width, width, header(t), t.side_a, t.side_b)
    with pytest.raises(CorruptError):
        inverted(t, size, width)


def inverted(t: Transformed, size: int, width: int, head: Header | None = None) -> np.ndarray:
    out = np.full(size, 0xA5, np.uint8)
    transforms.invert(t.kind, t.inner, t.side_a, t.side_b, head or header(t), width, out)
    return out


def assert_exact(t: Transformed, data: np.ndarray, width: int) -> None:
    assert np.array_equal(inverted(t, data.size, width), data)
    buffer = np.empty(data.size + 1, np.uint8)
    transforms.invert(t.kind, t.inner, t.side_a, t.side_b, header(t), width, buffer[1:])  # not aligned
    assert np.array_equal(buffer[1:], data)


def product(codes, scales, first, size, container):
    """The rule of section 6.3 in numpy alone."""
    at = np.zeros(codes.size, np.int64)
    at[first:] = 1 + np.arange(max(0, codes.size - first)) // size
    with np.errstate(over="ignore"):
        p = (codes.astype(np.float32) - np.float32(128)) * scales[at]
        e = p.astype({grids.BF16: BF, grids.F16: np.float16, grids.F32_ELEMENTS: np.float32}[container])
    bits = e.view(f"<u{e.itemsize}").copy()
    bits[codes == 0] = 1 << 8 * e.itemsize - 1
    return bits


def specials(n, coding, rng):
    """Floats of every kind: NaN payloads, infinities, subnormal numbers, negative zeros, ordinary ones."""
    kind = {"bf16": BF, "f16": np.float16, "f32": np.float32, "f64": np.float64}[coding]
    width = np.dtype(kind).itemsize
    words = rng.standard_normal(n).astype(kind).view(f"<u{width}")
    mantissa = {"bf16": 7, "f16": 10, "f32": 23, "f64": 52}[coding]
    any_mantissa = rng.integers(0, 1 << mantissa, n, np.uint64).astype(words.dtype)
    sign = rng.integers(0, 2, n, np.uint64).astype(words.dtype) << words.dtype.type(8 * width - 1)
    inf = words.dtype.type(((1 << 8 * width - 1 - mantissa) - 1) << mantissa)
    choice = rng.integers(0, 6, n)
    for k, value in enumerate((inf | any_mantissa | sign, inf | sign, any_mantissa | sign, sign)):
        words = np.where(choice == k, value, words)
    return words


# ---- exact


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("n", SIZES)
def test_every_transform_is_exact_at_every_size(n, width):
    rng = np.random.default_rng(n * 8 + width)
    word = f"<u{width}"
    noise = raw(rng.integers(0, 256, n * width, np.uint8))
    for values in (1, 2, 3, 4, 5, 16, 17, 256):
        choices = rng.choice(1 << min(8 * width, 60), values, replace=False) if width == 1 else rng.integers(
            0, 1 << 8 * width - 1, values
        )
        data = raw(choices[rng.integers(0, values, n)].astype(word))
        t = transforms.palette(data, width)
        assert t is not None
        assert_exact(t, data, width)
    for share in (0.0, 0.01, 0.5, 0.99, 1.0):
        data = raw(np.where(rng.random(n) < share, noise.view(word), np.array(3, word)))
        assert_exact(transforms.sparse(data, width, 3), data, width)
    for data in (noise, raw((np.arange(n) * 7 + 250).astype(word)), raw(np.full(n, 9, word))):
        assert_exact(transforms.difference(data, width), data, width)
    for inner in (1, 2, 4):
        if inner < width:
            for base in (0, 5, -100):
                data = raw((rng.integers(0, 1 << 8 * inner, n) + base).astype(f"<i{width}"))
                t = transforms.offset(data, width, signed=True)
                assert t is not None
                assert t.inner_width <= inner
                assert_exact(t, data, width)


def test_more_values_than_a_palette_has():
    assert transforms.palette(raw(np.arange(257, dtype=np.uint16)), 2) is None
    assert transforms.palette(raw(np.arange(257, dtype=np.uint32)), 4) is None
    assert transforms.palette(raw(np.arange(256, dtype=np.uint64)), 8) is not None
    assert palette.indexed(np.arange(17, dtype=np.uint8), 16) is None


def test_offset_that_does_not_shrink():
    assert transforms.offset(raw(np.array([0, 1 << 32], np.int64)), 8, signed=True) is None
    assert transforms.offset(raw(np.array([-(1 << 63), (1 << 63) - 1], np.int64)), 8, signed=True) is None
    high = raw(np.array([(1 << 63) - 1, 1 << 63], np.uint64))
    assert transforms.offset(high, 8, signed=True) is None
    t = transforms.offset(high, 8, signed=False)
    assert t is not None
    assert_exact(t, high, 8)


@pytest.mark.parametrize("coding", ["bf16", "f16", "f32", "f64"])
def test_special_floats_are_exact(coding):
    rng = np.random.default_rng(3)
    for n in (1, 129, 5000):
        words = specials(n, coding, rng)
        data, width = raw(words), words.itemsize
        assert_exact(transforms.sparse(data, width, int(words[0])), data, width)
        assert_exact(transforms.difference(data, width), data, width)
        few = raw(words[:200][rng.integers(0, min(n, 200), n)])
        t = transforms.palette(few, width)
        assert t is not None
        assert_exact(t, few, width)
        found = find(data, width, coding, 0, 0)
        if found is not None:
            assert_exact(found, data, width)


@pytest.mark.parametrize("coding", ["bf16", "f16", "f32"])
def test_a_grid_is_exact_with_special_floats_in_it(coding):
    rng = np.random.default_rng(4)
    kind = {"bf16": BF, "f16": np.float16, "f32": np.float32}[coding]
    scales = np.repeat((rng.random(40) / 100 + 0.001).astype(np.float32), 512)
    words = (np.rint(rng.standard_normal(40 * 512) * 20).clip(-127, 127).astype(np.float32) * scales).astype(kind)
    words = words.view(f"<u{np.dtype(kind).itemsize}")
    at = rng.choice(4 * 512, 150, replace=False)  # a stranger spoils its block: all of it is listed
    words[at] = specials(150, coding, rng)
    data = raw(words)
    t = transforms.grid(data, words.itemsize, CONTAINER[coding], [(512, 512)])
    assert t is not None
    assert 0 < t.side_b.size <= 4 * 512 * (4 + words.itemsize)
    assert_exact(t, data, words.itemsize)


@given(st.data())
def test_random_elements_survive_whatever_is_found(data):
    codings = [("bf16", 2), ("f16", 2), ("f32", 4), ("f64", 8), *(("planes", w) for w in WIDTHS)]
    coding, width = data.draw(st.sampled_from(codings))
    n = data.draw(st.integers(1, 3000))
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 32)))
    values = data.draw(st.sampled_from([1, 2, 3, 16, 200, 5000]))
    pool = rng.integers(0, 256, values * width, np.uint8).view(f"<u{width}")
    if coding != "planes" and data.draw(st.booleans()):
        pool = specials(values, coding, rng)
    words = pool[rng.integers(0, values, n)]
    if data.draw(st.booleans()):
        words = np.where(rng.random(n) < data.draw(st.sampled_from([0.1, 0.5, 0.95])), pool[0], words)
    elements = raw(words)
    row = data.draw(st.sampled_from([0, 1, 32, 100, 384]))
    t = find(elements, width, coding, row, data.draw(st.integers(0, 1 << 22)))
    if t is not None:
        assert_exact(t, elements, width)


# ---- the product


@pytest.mark.parametrize("container", [grids.BF16, grids.F16, grids.F32_ELEMENTS])
def test_products_are_those_of_numpy(container):
    """Every code with scales of every size: subnormal results, ties, overflow to infinity, negative and zero scales."""
    rng = np.random.default_rng(5)
    exponents = rng.integers(0, 255, 3000).astype(np.uint32) << np.uint32(23)
    signs = rng.integers(0, 2, 3000).astype(np.uint32) << 31
    random = exponents | rng.integers(0, 1 << 23, 3000).astype(np.uint32) | signs
    edges = np.float32([0, -0.0, 1, 2**-24, 2**-25, 3 * 2**-26, 65504, 520, 3e38])
    scales = np.concatenate((random.astype("<u4").view("<f4"), edges))
    scales = np.concatenate((scales, np.arange(1, 4096, dtype=np.float32) * np.float32(2.0**-27)))
    codes = np.tile(np.arange(256, dtype=np.uint8), scales.size)
    out = np.empty(codes.size, f"<u{grids.ELEMENT_WIDTH[container]}")
    grids.multiply(codes, scales, 256, 256, container, out)
    expected = product(codes, scales, 256, 256, container)
    assert np.array_equal(out, expected)


def test_rounding_to_binary16_is_that_of_numpy():
    """Codes of 1 and -1 make the scale itself: all that lie at or next to a half step between two float16 numbers."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = (halves[:-1] + halves[1:]) / np.float32(2)
    up, down = np.float32(9e9), np.float32(-1)
    near = [m for x in (halves, middles) for m in (x, np.nextafter(x, up), np.nextafter(x, down))]
    near = np.concatenate((*near, np.float32([65519.996, 65520, 65535, 65536, 1e30]))).astype(np.float32)
    for code in (129, 127):
        codes = np.full(near.size, code, np.uint8)
        out = np.empty(near.size, np.uint16)
        grids.multiply(codes, near, 1, 1, grids.F16, out)
        with np.errstate(over="ignore"):
            expected = (np.float32(code - 128) * near).astype(np.float16).view(np.uint16)
        assert np.array_equal(out, expected)


@pytest.mark.parametrize(
    ("n", "first", "size"), [(1, 1, 1), (1, 5, 9), (100, 7, 32), (100, 32, 32), (96, 32, 32), (97, 32, 32)]
)
def test_blocks_of_a_grid(n, first, size):
    rng = np.random.default_rng(n)
    blocks = grids.blocks_of(n, first, size)
    codes, scales = rng.integers(0, 256, n, np.uint8), rng.random(blocks).astype(np.float32)
    out = np.empty(n, np.uint32)
    grids.multiply(codes, scales, first, size, grids.F32_ELEMENTS, out)
    assert np.array_equal(out, product(codes, scales, first, size, grids.F32_ELEMENTS))
    with pytest.raises(CorruptError):
        grids.multiply(codes, np.append(scales, np.float32(1)), first, size, grids.F32_ELEMENTS, out)


def test_scale_storage_round_trips_and_refuses_what_is_not_finite():
    exact = np.float32([0, 1, 0.5, 0.125, 1.5])
    for storage in (grids.AS_F32, grids.AS_F16, grids.AS_BF16):
        assert np.array_equal(grids.read_scales(grids.store_scales(exact, storage), storage), exact)
    not_finite = {
        grids.AS_F32: (0x7F800000, 0xFFC00001),
        grids.AS_F16: (0x7C00, 0xFE01),
        grids.AS_BF16: (0x7F80, 0xFFC1),
    }
    for storage, bits in ((s, b) for s, forms in not_finite.items() for b in forms):
        stored = np.frombuffer(bits.to_bytes(grids.SCALE_WIDTH[storage], "little"), np.uint8)
        with pytest.raises(CorruptError):
            grids.read_scales(stored, storage)


# ---- forged


def samples() -> dict[int, tuple[Transformed, int, int]]:
    """One of each kind: transformed, bytes of the elements, width."""
    rng = np.random.default_rng(6)
    n = 1001
    floats = (np.rint(rng.standard_normal(n) * 30).clip(-127, 127) * 0.25).astype(np.float32)
    floats[5] = np.float32(0.1)
    grid = transforms.grid(raw(floats), 4, grids.F32_ELEMENTS, [(100, 61)])
    few = transforms.palette(raw(rng.integers(0, 11, n).astype(np.uint16)), 2)
    offset = transforms.offset(raw(rng.integers(100, 60000, n).astype(np.int64)), 8, signed=True)
    assert grid is not None
    assert few is not None
    assert offset is not None
    return {
        PALETTE: (few, 2 * n, 2),
        GRID: (grid, 4 * n, 4),
        SPARSE: (transforms.sparse(raw(rng.integers(0, 3, n).astype(np.uint32)), 4, 0), 4 * n, 4),
        DIFFERENCE: (transforms.difference(raw(rng.integers(0, 99, n).astype(np.uint32)), 4), 4 * n, 4),
        OFFSET: (offset, 8 * n, 8),
        ROWS: (transforms.rows(raw(floats), 4, 100, 61, np.arange(11, dtype=np.uint8)[::-1].copy(), 1), 4 * n, 4),
        RECORDS: (_records(rng.integers(0, 256, n, np.uint8)), n, 1),
        VOCABULARY: (_codes(raw(rng.integers(0, 3000, n).astype(np.int32)), 4), 4 * n, 4),
    }


def _codes(data: np.ndarray, width: int) -> Transformed:
    made = transforms.codes(data, width)
    assert made is not None
    return made


def _records(data: np.ndarray, size: int = 34, first: int = 5) -> Transformed:
    made = transforms.fields(data, np.arange(size, dtype=np.uint8) % 7, first)
    return replace(made, inner=np.concatenate(records.take_apart(made.inner, made.side_a)))


@pytest.mark.parametrize("field", [8, 9, 255])
def test_fields_past_the_last_are_refused(field):
    t = _records(np.arange(200, dtype=np.uint8))
    plan = t.side_a.copy()
    plan[3] = field
    with pytest.raises(CorruptError, match="field"):
        inverted(replace(t, side_a=plan), 200, 1)


@given(st.integers(2, 300), st.integers(2, 40), st.integers(0, 39), st.integers(0, 2**32 - 1))
def test_records_of_any_fields(n, size, first, seed):
    rng = np.random.default_rng(seed)
    size, first = min(size, n), min(first, size - 1, n - min(size, n))
    data, plan = rng.integers(0, 256, n, np.uint8), rng.integers(0, 8, size, np.uint8)
    made = transforms.fields(data, plan, first)
    parts = records.take_apart(made.inner, plan)
    whole = replace(made, inner=np.concatenate(parts))
    assert inverted(whole, n, 1).tobytes() == data.tobytes()
    sizes = np.frombuffer(made.sizes, "<u4")
    assert [p.size for p in parts] == sizes[sizes > 0].tolist()
    for field, part in zip(np.flatnonzero(sizes), parts, strict=True):
        table = data[first : first + made.inner.size].reshape(-1, size)
        assert part.tobytes() == table[:, plan == field].tobytes()


FORGED = {
    PALETTE: {
        "a": (0, 2, 3, 8, 16), "inner_width": (2,), "inner": (500, 502), "size_a": (0, 21, 34), "size_b": (1,),
        "b": (1,), "c": (1,), "v": (1,),
    },
    GRID: {
        "a": (0, 0x01, 0x02, 3, 15, 0x32), "b": (0, 60, 90, (1 << 20) + 1), "c": (0, 101), "inner_width": (4,),
        "inner": (1000,), "size_a": (40, 42), "size_b": (9, 8 * 1002), "v": (1,),
    },
    SPARSE: {
        "inner_width": (2,), "inner": (1002,), "size_a": (125, 127), "v": (1 << 32,), "a": (1,), "b": (1,), "c": (1,),
        "size_b": (1,),
    },
    DIFFERENCE: {
        "inner_width": (2,), "inner": (1000,), "v": (1 << 32,), "a": (1,), "size_a": (1,), "size_b": (1,),
        "b": (0, (1 << 20) + 1),
    },
    ROWS: {
        "inner_width": (2,), "inner": (1000,), "a": (0, 33), "size_a": (10, 12), "size_b": (1,),
        "b": (0, 50, 90, (1 << 20) + 1), "c": (0, 101), "v": (1,),
    },
    RECORDS: {
        "a": (1,), "inner_width": (2, 0), "inner": (984, 987, 1001, 0), "size_a": (33, 35, 0), "size_b": (14, 16, 0), "v": (1,),
        "b": (0, 1, 33, 35, 1001, 4097), "c": (34, 500),
    },
    VOCABULARY: {
        "inner_width": (2, 0), "inner": (1000, 3004, 0), "a": (1,), "c": (1,), "v": (1 << 32,), "b": (257, 1 << 31),
        "size_a": (1, 1003, 1028),
    },
    OFFSET: {
        "inner_width": (3, 8), "inner": (1002,), "a": (1,), "size_a": (1,), "size_b": (1,), "b": (1,), "c": (1,),
        "v": (1 << 64,),
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", FORGED)
def test_forged_headers_are_refused(kind):
    t, size, width = samples()[kind]
    head = header(t)
    transforms.check(kind, size // width, width, head)
    for name, value in ((name, value) for name, values in FORGED[kind].items() for value in values):
        forged = replace(head, **{name: value})
        with pytest.raises(CorruptError):
            transforms.check(kind, size // width, width, forged)
        with pytest.raises(CorruptError):
            inverted(t, size, width, forged)
    for n in (0, (1 << 20) + 1):
        with pytest.raises(CorruptError):
            transforms.check(kind, n, width, head)
    for change in ({"inner": (1 << 22) + 1}, {"inner": (1 << 20) + 1}, {"size_a": (1 << 18) + 1}, {"size_b": (1 << 18) + 1}):
        with pytest.raises(CorruptError):
            transforms.check(kind, size // width, width, replace(head, **change))
    with pytest.raises(CorruptError):
        transforms.check(kind, size // width, 3, head)


def _delta(n=1001, width=2, share=0.5, mode=0):
    """A delta of random elements, of which a share is changed: the classes' sizes, the elements, those of the base."""
    rng = np.random.default_rng([n, width, int(8 * share), mode])
    base = rng.integers(0, 256, n * width, np.uint8)
    words = base.view(f"<u{width}").copy()
    places = np.flatnonzero(rng.random(n) < share)
    words[places] ^= rng.integers(1, 256, places.size).astype(words.dtype)
    coding = {0: {2: "bf16", 4: "f32", 8: "f64"}.get(width, "planes"), 1: "planes"}[mode]
    t, groups = transforms.from_base(raw(words), width, coding, base)
    inner = np.concatenate([g.view(np.uint8) for g in groups] or [np.zeros(0, np.uint8)])
    room = np.concatenate((inner, np.zeros(64, np.uint8)))
    return t, room, np.frombuffer(t.sizes, "<u4").astype(np.int64), raw(words), base


@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize("share", [0, 0.05, 0.5, 1])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("n", [1, 8, 9, 1001, 70001])
def test_deltas_are_exact(n, width, share, mode):
    t, room, counts, data, base = _delta(n, width, share, mode)
    head = header(t)
    transforms.check(DELTA, n, width, head)
    transforms.check_strings(DELTA, n, width, head, t.side_a, t.side_b)
    assert counts.sum() == head.inner == (room.size - 64) // width
    for at in (0, 1):  # not aligned
        out = np.full(data.size + 1, 0xA5, np.uint8)
        transforms.to_base(room, t.side_a, head, counts, width, base, out[at : at + data.size])
        assert np.array_equal(out[at : at + data.size], data)
    if 0 < head.inner < n:
        where = np.unpackbits(t.side_a, count=n, bitorder="little").view(bool)
        assert np.array_equal(where, (raw(data) != base).reshape(n, width).any(axis=1))


@pytest.mark.parametrize("masked", [False, True])
def test_forged_headers_of_deltas_are_refused(masked):
    n, width = 1001, 2
    head = header(_delta(n, width, 0.05 if masked else 1)[0])
    assert (head.size_a == 126) == masked
    transforms.check(DELTA, n, width, head)
    transforms.check(DELTA, n, width, replace(head, a=1 - head.a, b=0, c=5 | 11 << 8))
    transforms.check(DELTA, n, width, replace(head, b=1, c=15 | 1 << 8))
    transforms.check(DELTA, n, width, Header(0, width, 0, 0, 0, 0, 1 << 8))
    inner = {0, 1001, 1002} if masked else {1, 500, 1000, 1002}
    flaws = {
        "a": (3, 4, 16, 255), "inner_width": (1, 4, 8), "inner": (*inner, (1 << 20) + 1), "size_a": (1, 125, 127, 1001),
        "size_b": (1, 126), "b": (1 << 8, 1 << 11, (1 << 32) - 1), "v": (1, 1 << 16, 1 << 63),
        "c": (0, 7, 9 | 8 << 8, 4 | 12 << 8, 16 | 1 << 8, 255 | 1 << 8, 7 | 8 << 8 | 1 << 16, (1 << 32) - 1),
    }  # fmt: skip
    for name, value in ((name, value) for name, values in flaws.items() for value in values):
        with pytest.raises(CorruptError):
            transforms.check(DELTA, n, width, replace(head, **{name: value}))
    for change in ({"b": 0, "c": 0}, {"b": 0, "c": 7}, {"b": 2, "c": 15 | 1 << 8}, {"b": 0, "c": 12 << 8}):
        with pytest.raises(CorruptError):
            transforms.check(DELTA, n, width, replace(head, **change))
    if not masked:
        with pytest.raises(CorruptError):
            transforms.check(DELTA, n, width, replace(head, size_a=126))


def test_a_delta_is_not_inverted_without_its_base():
    t, room, _, data, _ = _delta()
    with pytest.raises(CorruptError):
        transforms.invert(DELTA, room[:-64], t.side_a, t.side_b, header(t), 2, np.empty(data.size, np.uint8))


@pytest.mark.parametrize("kind", FORGED)
def test_strings_of_another_size_than_the_header_says(kind):
    t, size, width = samples()[kind]
    longer = {name: np.append(getattr(t, name), np.uint8(0)) for name in ("inner", "side_a", "side_b")}
    for change in ({"inner": t.inner[:-1]}, *({name: string} for name, string in longer.items())):
        with pytest.raises(CorruptError):
            inverted(replace(t, **change), size, width, header(t))
    for other in (size + 1, size + 8 * width, size - 8 * width, 0):
        with pytest.raises(CorruptError):
            inverted(t, other, width)


def test_unknown_transforms_are_unsupported():
    for kind in (0, 10, 255):
        with pytest.raises(UnsupportedError):
            transforms.check(kind, 1, 1, Header(1, 1))
        with pytest.raises(UnsupportedError):
            transforms.invert(kind, *(np.zeros(0, np.uint8),) * 3, Header(1, 1), 1, np.zeros(1, np.uint8))


@pytest.mark.parametrize(("bits", "k"), [(1, 1), (2, 3), (4, 11), (8, 200)])
@pytest.mark.parametrize("width", WIDTHS)
def test_palette_indices_that_are_too_large(bits, k, width):
    n = 8003
    indices = np.zeros(n, np.uint8)
    side = raw(np.arange(k * width, dtype=np.uint8))
    for at in (0, 4000, n - 4, n - 1):
        for bad in (k, (1 << bits) - 1):
            forged = indices.copy()
            forged[at] = bad
            t = Transformed(PALETTE, palette.pack(forged, bits), 1, a=bits, side_a=side)
            with pytest.raises(CorruptError):
                inverted(t, n * width, width)
    t = Transformed(PALETTE, palette.pack(indices, bits), 1, a=bits, side_a=side)
    assert inverted(t, n * width, width).size == n * width


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_unused_bits_of_a_palette(bits):
    for n in range(1, 8 // bits):
        for bit in range(n * bits, 8):
            side = np.arange(1 << bits, dtype=np.uint8)
            t = Transformed(PALETTE, np.array([1 << bit], np.uint8), 1, a=bits, side_a=side)
            with pytest.raises(CorruptError):
                inverted(t, n, 1)


def test_a_sparse_mask_that_contradicts_the_inner_elements():
    t, size, width = samples()[SPARSE]
    for bit in (0, 500, 1000):
        mask = t.side_a.copy()
        mask[bit >> 3] ^= 1 << (bit & 7)
        refuse_strings(replace(t, side_a=mask), size, width)
    for bit in range(1001, 1008):  # unused; the number of set bits is right
        mask = t.side_a.copy()
        first = int(np.flatnonzero(np.unpackbits(mask, bitorder="little"))[0])
        mask[first >> 3] ^= 1 << (first & 7)
        mask[bit >> 3] ^= 1 << (bit & 7)
        refuse_strings(replace(t, side_a=mask), size, width)


def test_exceptions_of_a_grid_that_are_not_ascending_or_lie_outside():
    t, size, width = samples()[GRID]

    def listed(*at):
        return np.frombuffer(b"".join(struct.pack("<If", i, 0.5) for i in at), np.uint8)

    good = inverted(replace(t, side_b=listed(0, 5, 1000)), size, width).view("<f4")
    assert good[0] == good[5] == good[1000] == 0.5
    for at in ((5, 5), (6, 5), (1001,), (0, 0xFFFFFFFF), (0xFFFFFFFF, 0)):
        refuse_strings(replace(t, side_b=listed(*at)), size, width)


@pytest.mark.parametrize(("storage", "bad"), [(0, "<f4"), (1, "<f2")])
def test_scales_of_a_grid_that_are_not_finite(storage, bad):
    n = 64
    for value in (np.nan, np.inf, -np.inf):
        side = raw(np.array([1, value], bad))
        t = Transformed(GRID, np.full(n, 129, np.uint8), 1, a=2 | storage << 4, b=32, c=32, side_a=side)
        refuse_strings(t, n * 4, 4)


@given(st.sampled_from(sorted(FORGED)), st.data())
def test_random_changes_are_refused_or_decoded_within_bounds(kind, data):
    t, size, width = samples()[kind]
    field = data.draw(st.sampled_from(["inner", "side_a", "side_b"]))
    string = getattr(t, field).copy()
    if string.size:
        string[data.draw(st.integers(0, string.size - 1))] ^= data.draw(st.integers(1, 255))
    try:
        inverted(replace(t, **{field: string}), size, width)
    except CorruptError:
        return


# ---- found


def weights(shape=(320, 384), seed=0):
    return (np.random.default_rng(seed).standard_normal(shape) * 0.05).astype(np.float32)


def look_for(array, row=None, first=0):
    array = np.ascontiguousarray(array)
    coding = CODING.get(array.dtype.name, "planes")
    elements = raw(array)
    t = find(elements, array.itemsize, coding, array.shape[-1] if row is None else row, first)
    if t is not None:
        assert_exact(t, elements, array.itemsize)
    return t


def quantised(w, group, most, least, scale_kind):
    x = w.reshape(-1, group) if group else w
    scale = (np.abs(x).max(1, keepdims=True) / np.float32(most)).astype(scale_kind).astype(np.float32)
    return ((np.clip(np.rint(x / scale), least, most) + np.float32(0)) * scale).astype(np.float32).reshape(w.shape)


def asymmetric(w, group):
    x = w.reshape(-1, group)
    low, high = np.minimum(x.min(1, keepdims=True), 0), np.maximum(x.max(1, keepdims=True), 0)
    scale = ((high - low) / 15).astype(np.float16).astype(np.float32)
    zero = np.clip(np.rint(-low / scale), 0, 15)
    return ((np.clip(np.rint(x / scale) + zero, 0, 15) - zero) * scale).reshape(w.shape)


@pytest.mark.parametrize("kind", [BF, np.float16, np.float32, np.float64])
def test_nothing_is_found_in_weights(kind):
    for seed in range(5):
        assert look_for(weights(seed=seed).astype(kind)) is None
        assert look_for(weights((30, 384), seed).astype(kind)) is None
    assert look_for(weights().astype(BF).astype(np.float32)) is None
    assert look_for(np.random.default_rng(0).integers(0, 256, 1 << 17, np.uint8)) is None
    assert look_for(np.random.default_rng(0).integers(0, 1 << 32, 1 << 17, np.uint32)) is None
    assert look_for(np.random.default_rng(0).random(1 << 17) < 0.5) is None


def test_nothing_is_found_in_few_elements_or_opaque_bytes():
    assert find(np.zeros(0, np.uint8), 4, "f32", 0, 0) is None
    assert look_for(np.zeros(63, np.float32)) is None
    assert find(np.zeros(1 << 12, np.uint8), 1, "opaque", 0, 0) is None


@pytest.mark.parametrize("kind", [BF, np.float16, np.float32])
def test_few_values_are_a_palette(kind):
    w = weights()
    scale = np.float32(np.abs(w).max() / 127)
    t = look_for((np.rint(w / scale) * scale).astype(kind))
    assert (t.kind, t.a) == (PALETTE, 8)
    scale = np.float32(np.abs(w).max() / 448)
    t = look_for(((w / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale).astype(kind))
    assert (t.kind, t.a) == (PALETTE, 8)


@pytest.mark.parametrize("kind", [BF, np.float16, np.float32])
@pytest.mark.parametrize("scale_kind", [BF, np.float16, np.float32])
def test_int8_rows_are_a_grid(kind, scale_kind):
    t = look_for(quantised(weights(), 0, 127, -127, scale_kind).astype(kind))
    assert (t.kind, t.b, t.c) == (GRID, 384, 384)
    assert t.inner.min() >= 1
    assert t.side_b.size <= 600
    assert t.side_a.size == 320 * grids.SCALE_WIDTH[t.a >> 4]


@pytest.mark.parametrize("kind", [BF, np.float16, np.float32])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_groups_are_a_grid(kind, group):
    symmetric = [quantised(weights(), group, 7, -8, scale) for scale in (np.float16, BF)]
    for made in (*symmetric, asymmetric(weights(), group)):
        t = look_for(made.astype(kind))
        assert (t.kind, t.b, t.c) == (GRID, group, group)
        assert t.a >> 4 in (grids.AS_F16, grids.AS_BF16)
        assert t.side_b.size * 100 <= t.inner.size
        assert np.unique(t.inner).size <= 40


def test_rows_are_found_from_the_middle_of_a_tensor():
    w = quantised(weights((400, 500)), 0, 127, -127, np.float32).astype(BF).reshape(-1)
    first = 500 * 3 + 123
    t = look_for(w[first:], row=500, first=first)
    assert (t.kind, t.b, t.c) == (GRID, 500, 377)


def test_a_grid_with_negative_zeros_zero_rows_and_strange_rows():
    w = quantised(weights((640, 384)), 0, 127, -127, np.float32)
    w[w == 0] = -0.0
    w[7] = 0
    w[100] = weights((1, 384), 9)
    t = look_for(w.astype(np.float32))
    assert t.kind == GRID
    assert (t.inner == 0).any()
    assert 8 <= t.side_b.size <= 400 * 8


@pytest.mark.parametrize("kind", [BF, np.float16, np.float32, np.float64])
def test_pruned_weights_are_sparse(kind):
    rng = np.random.default_rng(1)
    for share in (0.3, 0.5, 0.9, 0.98):
        w = np.where(rng.random((320, 384)) < share, np.float32(0), weights())
        t = look_for(w.astype(kind))
        assert t.kind == SPARSE or (share == 0.98 and t.kind == PALETTE)
    four = weights().reshape(-1, 4)
    four[np.argsort(np.argsort(np.abs(four), 1), 1) < 2] = 0
    assert look_for(four.reshape(320, 384).astype(kind)).kind == SPARSE


def test_masks_are_packed():
    length = np.random.default_rng(2).integers(16, 513, 512)
    for mask in (np.arange(512)[None] < length[:, None], np.tril(np.ones((512, 512), bool))):
        for kind in (bool, np.float32, np.int64):
            t = look_for(mask.astype(kind))
            if mask[0, 1] or kind is np.float32:
                assert (t.kind, t.a, t.inner.size) == (PALETTE, 1, 1 << 15)
            else:  # each row is the one above but for an element
                assert (t.kind, t.b) == (DIFFERENCE, 512)
                assert np.count_nonzero(t.inner) < 1024


@given(st.data())
def test_differences_at_a_distance_and_sorted_rows_round_trip(data):
    width = data.draw(st.sampled_from(WIDTHS))
    n = data.draw(st.integers(2, 3000))
    elements = np.random.default_rng(n).integers(0, 256, n * width).astype(np.uint8)
    t = transforms.difference(elements, width, data.draw(st.integers(1, n - 1)))
    assert np.array_equal(inverted(t, n * width, width), elements)
    row = data.draw(st.integers(1, n + 5))
    first = data.draw(st.integers(1, row))
    count = order.row_count(n, first, row)
    classes = np.array(data.draw(st.lists(st.integers(0, 255), min_size=count, max_size=count)), np.uint8)
    t = transforms.rows(elements, width, row, first, classes, 1)
    assert np.array_equal(inverted(t, n * width, width), elements)
    rows = [elements.reshape(n, width)[: min(first, n)]]
    rows += [elements.reshape(n, width)[i : i + row] for i in range(first, n, row)]
    expected = [r for _, r in sorted(zip(classes.tolist(), rows, strict=True), key=lambda pair: pair[0])]
    assert np.array_equal(t.inner, np.concatenate(expected).reshape(-1))


def test_classes_hold_as_many_rows_each():
    scales = np.repeat(np.float32([4, 1, 2, 8]), 5)[:, None]
    words = raw(np.random.default_rng(3).standard_normal((20, 64)).astype(np.float32) * scales).view(np.uint32)
    classes = order.classify(words, 64, 64, 21, 1023, 4)
    assert np.array_equal(classes, np.repeat([2, 0, 1, 3], 5))


def test_constants_and_sequences():
    for constant in (np.full(5000, 1.5, np.float32), np.full(5000, -100, np.int64), np.zeros(5000, BF)):
        t = look_for(constant)
        assert t.kind == SPARSE
        assert t.inner.size == 0
    short = np.arange(5000) % 256
    for sequence in (np.arange(1 << 17), np.arange(5, 300_000, 7, dtype=np.int32), np.arange(9000, 0, -1), short):
        t = look_for(sequence.astype(np.uint8) if sequence.max() == 255 else sequence)
        assert t.kind == DIFFERENCE
        assert np.unique(t.inner.view(f"<u{t.inner_width}")).size == 1
    steps = np.cumsum(np.random.default_rng(0).integers(0, 20, 1 << 17))
    assert look_for(steps).kind == DIFFERENCE


def zipf(n, values, seed=0):
    """Numbers below `values` as frequent as words are: the lower, the more."""
    return (np.random.default_rng(seed).zipf(1.3, n) - 1) % values


@given(st.data())
def test_vocabularies_are_exact(data):
    width = data.draw(st.sampled_from([2, 4, 8]))
    n = data.draw(st.integers(1, 3000))
    values = data.draw(st.sampled_from([2, 300, 9000, 60_000, vocabulary.MOST_RANGE]))
    start = data.draw(st.sampled_from([0, 5, -7, 1 << 8 * width - 1]))
    ids = zipf(n, values, n) if data.draw(st.booleans()) else np.random.default_rng(n).integers(0, values, n)
    words = (ids + start % (1 << 63)).astype(f"<u{width}")
    t = transforms.codes(raw(words), width)
    if t is not None:
        assert_exact(t, raw(words), width)
        assert n <= t.inner.size <= min(3, width) * n


def test_a_vocabulary_has_codes_for_all_values():
    for distinct in (*range(1, 1000), 32_895, 32_896, 32_897, 98_176, 98_177, *range(1 << 15, 1 << 18, 4999), 1 << 18):
        k, pairs = vocabulary.split_firsts(distinct)
        assert 128 <= k + pairs <= 256 or k == distinct
        assert distinct <= k + 256 * pairs + 65536 * (256 - k - pairs)
    # With all of them in use, the last value of each length among them.
    for values in (256, 257, 32_896, 32_897, 140_000):
        words = np.random.default_rng(values).permutation(np.concatenate((np.arange(values), np.arange(values // 2))))
        words = words.astype("<i4")
        assert_exact(_codes(raw(words), 4), raw(words), 4)


def test_equal_counts_leave_one_vocabulary():
    words = np.repeat(np.arange(5000), 2)
    t = _codes(raw(words), 8)
    k = vocabulary.split_firsts(5000)[0]
    assert np.array_equal(t.side_a.view("<u4"), np.arange(k))


def test_token_ids_are_a_vocabulary():
    names = np.random.default_rng(1).permutation(40_000)  # whose order says nothing of how frequent they are
    ids = names[zipf(1 << 16, 40_000)]
    for kind in (np.int64, np.int32, np.uint16):
        t = look_for(ids.astype(kind))
        assert (t.kind, t.v) == (VOCABULARY, ids.min())
        assert t.inner.size < 1.5 * (1 << 16)


def test_ramps_that_repeat_are_constants():
    positions = np.tile(np.arange(512), (64, 1))
    for ids in (positions, positions + 2, positions.astype(np.uint16), np.tile(np.arange(0, 5120, 10), (64, 1)) - 7):
        t = look_for(ids)
        assert (t.kind, t.b) == (DIFFERENCE, 512)
        assert not t.inner.any()
    rising = raw(positions + 3 * np.arange(64)[:, None])
    t = transforms.difference(rising, 8, 512)
    assert_exact(t, rising, 8)
    assert np.unique(t.inner.view("<u8")).tolist() == [3]
    # A ramp that goes down does not fit c; nor is one that is broken any.
    for ids in (positions[:, ::-1], np.where(positions == 9, 0, positions)):
        assert np.count_nonzero(look_for(ids).inner.view("<u8")) > 500


def test_token_ids_become_short():
    rng = np.random.default_rng(3)
    ids = rng.integers(0, 30522, 1 << 16)
    t = look_for(ids)
    assert (t.kind, t.inner_width, t.v) == (OFFSET, 2, 0)
    ids[rng.random(1 << 16) < 0.02] = -100
    t = look_for(ids)
    assert (t.kind, t.inner_width, t.v) == (OFFSET, 2, (1 << 64) - 100)
    t = look_for((ids + 1_000_000).astype(np.int32))
    assert (t.kind, t.inner_width) == (OFFSET, 2)


def test_the_result_does_not_depend_on_how_the_bytes_lie():
    rng = np.random.default_rng(4)
    arrays = (
        quantised(weights(), 64, 7, -8, np.float16).astype(BF),
        np.where(rng.random((320, 384)) < 0.5, np.float32(0), weights()),
        rng.integers(0, 30522, 1 << 14),
        rng.integers(0, 9, 1 << 14).astype(np.float32),
    )
    for array in arrays:
        coding = CODING.get(array.dtype.name, "planes")
        elements = raw(array)
        shifted = np.empty(elements.size + 1, np.uint8)
        shifted[1:] = elements
        read_only = np.frombuffer(elements.tobytes(), np.uint8)
        forms = (elements, elements, shifted[1:], read_only)
        made = [find(e, array.itemsize, coding, array.shape[-1], 0) for e in forms]
        for other in made[1:]:
            assert (other is None) == (made[0] is None)
            if other is not None:
                for name in ("kind", "inner_width", "a", "b", "c", "v"):
                    assert getattr(other, name) == getattr(made[0], name)
                for name in ("inner", "side_a", "side_b"):
                    assert np.array_equal(getattr(other, name), getattr(made[0], name))


# ---- entropies


def test_entropy_is_that_of_floating_point():
    rng = np.random.default_rng(5)
    for counts in ([1], [5, 5], [1, 1 << 20], rng.integers(0, 5000, 256), rng.integers(1, 9, 1024), [0, 0, 7]):
        counts = np.asarray(counts)
        used = counts[counts > 0].astype(float)
        exact = float((used * np.log2(used.sum() / used)).sum())
        assert abs(sampling.entropy(counts) - exact) <= 1 + used.sum() * 1e-4
    assert sampling.entropy(np.zeros(4, np.int64)) == 0
    table = sampling.log_table()
    assert np.array_equal(table, np.floor(np.log2(1 + np.arange(257) / 256) * 65536 + 1e-9))
