"""Chunk records: whatever is encoded comes back bit for bit, and whatever is wrong is refused, in both decoders."""

import os
import struct
import subprocess
import sys
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import reference
import strategies
from hypothesis import given
from hypothesis import strategies as st
from strategies import CONSTANT, HUFFMAN, RANS, RAW, ZSTANDARD, Entry, Taste

from tzip import chunks
from tzip.blocks import codecs_of
from tzip.chunks import SLACK, decode_chunk, read_blocks
from tzip.coders import counting, planes
from tzip.coders.errors import CorruptError, TruncatedError, UnsupportedError
from tzip.coders.jit import kernel
from tzip.encoding import encode_chunk
from tzip.plan import LEVELS

CODINGS = [
    ("opaque", 1), ("opaque", 2), ("opaque", 4), ("opaque", 8), ("planes", 1), ("planes", 2), ("planes", 4), ("planes", 8),
    ("bf16", 2), ("f16", 2), ("f32", 4), ("f64", 8),
]  # fmt: skip
SMALL = [1, 2, 3, 31, 32, 127, 128, 129, 1023, 5000]
SPLITS = [(split, width) for split in strategies.WIDTHS for width in strategies.WIDTHS[split]]


def decode(record, elements, width, run=0, chunk=0, base=None):
    """Decode with rubbish behind the record and in the output, at once where that is possible, and step by step."""
    arguments = record, elements, width, run, chunk, base
    at_once = fate(_decode, *arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "decode_record", lambda *_: False)
        assert at_once == fate(_decode, *arguments)
        return _decode(*arguments)


def _decode(record, elements, width, run, chunk, base):
    buffer = np.full(len(record) + SLACK, 0xA5, np.uint8)
    buffer[: len(record)] = np.frombuffer(bytes(record), np.uint8)
    out = np.full(elements * width, 0x5A, np.uint8)
    base = None if base is None else np.frombuffer(base, np.uint8)
    decode_chunk(buffer, len(record), run, chunk, elements, width, out, base=base)
    return out.tobytes()


def decode_slowly(record, elements, width, run=0, chunk=0, base=b""):
    """Decode with the reference, steps 1 to 4 of section 8."""
    head = reference.read_chunk_head(bytes(record))
    demanded = reference.Run(width, (), chunk * reference.CHUNK + elements)
    reference.check_chunk_head(head, demanded, run, chunk)
    return reference.decode_chunk(bytes(record), lambda role: base)


def fate(decoder, *args):
    """What becomes of a record: its bytes, or which kind of error. Any other exception passes."""
    try:
        return decoder(*args)
    except (UnsupportedError, reference.Unsupported):
        return "unsupported"
    except (CorruptError, reference.Corrupt):
        return "corrupt"


def no_sums(monkeypatch):
    """Let every sum be 0 in both decoders."""
    monkeypatch.setattr("tzip.chunks.sum64", lambda data: 0)
    monkeypatch.setattr("tzip.chunks.Sum.value", lambda self: 0)
    monkeypatch.setattr(reference, "sum64", lambda data: 0)


def without_sums(decoder, record, elements, width, base=b""):
    """What becomes of a record when neither of its sums is looked at: the inner rules alone must refuse it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        no_sums(monkeypatch)
        record = record[:8] + bytes(8) + record[16:40] + bytes(8) + record[48:]
        return fate(decoder, record, elements, width, 0, 0, base)


def refused(record, elements, width, kind="corrupt", base=b""):
    """Whether both decoders refuse a record, and not only because its sums are wrong."""
    fates = {fate(d, record, elements, width, 0, 0, base) for d in (decode, decode_slowly)}
    fates |= {without_sums(d, record, elements, width, base) for d in (decode, decode_slowly)}
    return fates == {kind}


def check_encoded(raw, width, coding, level, slowly):
    elements = raw.size // width
    encoded = encode_chunk(raw, width, coding, LEVELS[level], 3, 2)
    record = bytes(encoded.record)
    assert decode(record, elements, width, 3, 2) == raw.tobytes()
    if slowly:
        assert decode_slowly(record, elements, width, 3, 2) == raw.tobytes()
    groups = -(-elements // strategies.GROUP)
    assert len(record) <= raw.size + 64 + 16 * groups + 127 + 15
    assert encoded.check == int.from_bytes(record[8:16], "little")
    assert encoded.codecs == strategies.codecs_of(record)
    assert codecs_of(record) == encoded.codecs
    return record


# ---- what our encoder makes


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("coding", "width"), CODINGS)
def test_small_chunks_round_trip(coding, width, level):
    for kind, n in product(strategies.DATA, SMALL):
        if n == 5000 and level != "default":
            continue
        check_encoded(strategies.array(kind, n, width, coding), width, coding, level, slowly=n <= 1023 or width < 4)


@pytest.mark.parametrize("n", [2**18 - 1, 2**18, 2**18 + 1])
@pytest.mark.parametrize(("coding", "width"), CODINGS)
def test_chunks_round_trip_around_a_group(coding, width, n):
    for kind in strategies.DATA:
        raw = strategies.array(kind, n, width, coding)
        check_encoded(raw, width, coding, "default" if n % 2 else "fast", slowly=False)


@pytest.mark.parametrize("kind", ["normal", "outliers", "sparse", "random"])
@pytest.mark.parametrize(("coding", "width"), CODINGS)
def test_the_best_level_round_trips_around_a_group(coding, width, kind):
    # zstandard at level 19 takes its time
    check_encoded(strategies.array(kind, 2**18 + 1, width, coding), width, coding, "best", slowly=False)


@pytest.mark.parametrize(
    ("coding", "width", "kind", "level"),
    [
        ("bf16", 2, "normal", "default"),
        ("bf16", 2, "outliers", "fast"),
        ("f16", 2, "normal", "best"),
        ("f32", 4, "outliers", "default"),
        ("f64", 8, "outliers", "default"),
        ("planes", 2, "ramp", "default"),
        ("planes", 1, "sparse", "fast"),
        ("opaque", 8, "sparse", "default"),
    ],
)
def test_the_reference_decodes_chunks_of_two_groups(coding, width, kind, level):
    n = 2**18 + (1 if width == 8 else 4097)
    record = check_encoded(strategies.array(kind, n, width, coding), width, coding, level, slowly=True)
    assert int.from_bytes(record[32:36], "little") == n


@pytest.mark.parametrize(("coding", "width"), [("bf16", 2), ("f32", 4), ("f64", 8), ("planes", 4), ("opaque", 8)])
def test_whole_chunks_round_trip(coding, width):
    raw = strategies.array("normal", 2**20, width, coding)
    record = check_encoded(raw, width, coding, "default", slowly=False)
    at, blocks = strategies.blocks_of(record)
    inner = record[52] if record[38] else width
    assert blocks == 4 * (1 if record[36] == 0 else inner)
    assert (record[36] == 0) == (coding == "opaque")
    assert at + 16 * blocks < len(record) <= raw.size + 400


def test_the_reference_decodes_a_whole_chunk():
    check_encoded(strategies.array("outliers", 2**20, 2, "bf16"), 2, "bf16", "default", slowly=True)


def test_weights_become_smaller():
    """Shares of the raw size as measured when this was written, rounded up: the plan must not get worse unseen."""
    sizes = {}
    for coding, width in (("bf16", 2), ("f16", 2), ("f32", 4), ("f64", 8)):
        raw = strategies.array("normal", 2**17, width, coding)
        sizes[coding] = len(check_encoded(raw, width, coding, "default", slowly=False)) / raw.size
    limits = {"bf16": 0.66, "f16": 0.85, "f32": 0.835, "f64": 0.875}
    assert all(sizes[c] < limits[c] for c in limits), sizes


@pytest.mark.parametrize(("coding", "width"), CODINGS)
def test_special_floats_keep_their_bits(coding, width):
    """Every 16-bit head once, NaN payloads and negative zeros among them, in random order."""
    heads = np.random.default_rng(0).permutation(65536).astype("<u2")
    low = np.random.default_rng(1).integers(0, 256, (65536, width), np.uint8)
    if width == 1:
        low[:, 0] = heads >> 8
    else:
        low[:, width - 1], low[:, width - 2] = heads >> 8, heads & 255
    for level in LEVELS:
        check_encoded(np.ascontiguousarray(low).reshape(-1), width, coding, level, slowly=level == "fast" and width < 4)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("coding", "width"), [("bf16", 2), ("f16", 2), ("f32", 4), ("f64", 8)])
def test_chunks_of_one_key_round_trip(coding, width, level):
    """Keys that need no table beside rests that are not worth one."""
    for kind, n in product(("nan", "infinity", "subnormal"), (200, 8192, 20000)):
        check_encoded(strategies.array(kind, n, width, coding), width, coding, level, slowly=n == 200)


def test_the_same_bytes_give_the_same_record():
    raw = strategies.array("outliers", 2**18 + 500, 4, "f32")
    first = encode_chunk(raw, 4, "f32", LEVELS["default"], 0, 0)
    before = bytes(first.record)
    other = encode_chunk(raw[::-1].copy(), 4, "f32", LEVELS["default"], 0, 0)
    assert encode_chunk(raw.copy(), 4, "f32", LEVELS["default"], 0, 0).record == before
    # Records that are held do not change when others are made.
    assert first.record == before
    assert other.record != before


@given(st.data())
def test_arbitrary_elements_round_trip(data):
    coding, width = data.draw(st.sampled_from(CODINGS))
    level = data.draw(st.sampled_from(sorted(LEVELS)))
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    parts = [
        strategies.array(kind, n, width, coding, seed % 1000)
        for kind, n in data.draw(
            st.lists(st.tuples(st.sampled_from(strategies.DATA), st.integers(1, 4000)), min_size=1, max_size=4)
        )
    ]
    raw = np.concatenate(parts)
    at = rng.integers(0, raw.size, data.draw(st.integers(0, 20)))
    raw[at] = rng.integers(0, 256, at.size)
    check_encoded(raw, width, coding, level, slowly=raw.size <= 20000)


# ---- what the text allows


TASTES = [
    Taste(),
    Taste(codecs=(HUFFMAN,), escape=0.9),
    Taste(codecs=(RANS,), escape=0.9),
    Taste(codecs=(HUFFMAN, RANS), most_segments=255),
    Taste(codecs=(RAW, ZSTANDARD, CONSTANT)),
]


@given(st.sampled_from(SPLITS), st.integers(1, 9000), st.sampled_from(range(len(TASTES))), st.integers(0, 2**32 - 1))
def test_all_that_the_format_allows_is_decoded(kind, elements, taste, seed):
    split, width = kind
    if split in strategies.HEADS and taste == 4:
        taste = 0  # keys wider than 8 bits have no other codec than constant there: too dull
    chunk = strategies.random_chunk(np.random.default_rng(seed), split, width, elements, TASTES[taste], 5, 0)
    assert decode_slowly(chunk.record, elements, width, 5) == chunk.data
    assert decode(chunk.record, elements, width, 5) == chunk.data


@pytest.mark.parametrize(("split", "width"), SPLITS)
def test_random_chunks_of_several_groups_are_decoded(split, width):
    # Shared tables need a second group; the third one makes a table of one kind follow one of the other.
    rng = np.random.default_rng([split, width])
    for taste in (Taste(share=0.9), Taste(codecs=(HUFFMAN, RANS), share=0.7, most_symbols=20)):
        elements = 2 * 2**18 + int(rng.integers(1, 3000))
        chunk = strategies.random_chunk(rng, split, width, elements, taste)
        assert decode(chunk.record, elements, width) == chunk.data
    if split in (0, 2, 3):
        assert decode_slowly(chunk.record, elements, width) == chunk.data


def _entropy(symbols, codec, table, *, w=8, base=0, escapes=(), flags=0, segments=1, joined=0):
    """A block of symbols given one by one, coded with that table; what it lacks must be in `escapes`."""
    used = sorted(table)
    byte_of = {(base + c if w > 8 and c else c): c for c in used}
    coded = np.array([byte_of.get(int(s), used[0]) for s in symbols])
    payload_of, stored = (
        (strategies.huffman_payload, strategies.huffman_table)
        if codec == HUFFMAN
        else (strategies.rans_payload, strategies.rans_table)
    )
    before, after = payload_of(coded, table, segments, lambda n: np.full(n, used[-1]))
    listed = b"".join((symbol << 18 | at).to_bytes(4, "little") for at, symbol in escapes)
    parts = listed + before + (b"" if flags & 1 else stored(table)) + after
    return Entry(codec, joined, segments, flags, len(escapes), base, parts)


def _both(record, elements, width, right, base=None):
    assert decode_slowly(record, elements, width, 0, 0, base) == right
    assert decode(record, elements, width, 0, 0, base) == right


@pytest.mark.parametrize("codec", [HUFFMAN, RANS])
def test_windows_of_f64_keys_with_escapes_outside(codec):
    keys = [0, 1023, 1024, 1270, 1276, 2047, 5, 0, 1023, 1022]
    table = {0: 1, 1: 2, 254: 3, 248: 3} if codec == HUFFMAN else {0: 1, 1: 4000, 248: 90, 254: 5}
    escapes = [(at, k) for at, k in enumerate(keys) if k not in (0, 1023, 1270, 1276)]
    key = _entropy(keys, codec, table, w=11, base=1022, escapes=escapes)
    rest = strategies.pack_rows(np.array([i * 3 % 32 for i in range(10)]), 5)
    entries = [key, Entry(RAW, payload=rest)] + [Entry(CONSTANT, value=16 * i) for i in range(6)]
    elements = [
        (r >> 4) << 63 | k << 52 | (r & 15) << 48 | 0x0010_2030_4050
        for k, r in zip(keys, [i * 3 % 32 for i in range(10)], strict=True)
    ]
    data = struct.pack("<10Q", *elements)
    _both(strategies.chunk_record(entries, 5, 8, data), 10, 8, data)


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("joined", [0, 1, 2])
def test_sign_modes_and_joined_bits_of_bf16(joined, mode):
    n = 300
    rng = np.random.default_rng([joined, mode])
    heads = rng.integers(0, 65536, n)
    heads = heads if mode == 0 else heads & 0x7FFF | (0x8000 if mode == 2 else 0)
    low = 7 - joined
    keys = heads >> low & ((1 << (8 + joined)) - 1)
    kept = sorted({k for k in keys.tolist() if 0 < k - 100 <= 254 or joined == 0})[:40]
    base = 100 if joined else 0
    table = strategies.random_lengths(rng, [k - base for k in kept])
    escapes = [(i, k) for i, k in enumerate(keys.tolist()) if k - base not in table]
    key = _entropy(keys.tolist(), HUFFMAN, table, w=8 + joined, base=base, escapes=escapes, joined=joined)
    rests = heads & ((1 << low) - 1) | (heads >> 15 << low if mode == 0 else 0)
    rest = Entry(RAW, joined, flags=mode << 1, payload=strategies.pack_rows(rests, low + (mode == 0)))
    data = heads.astype("<u2").tobytes()
    _both(strategies.chunk_record([key, rest], 2, 2, data), n, 2, data)


def test_a_constant_key_wider_than_a_byte():
    entries = [Entry(CONSTANT, 2, value=8000), Entry(CONSTANT, 2, value=5)] + [Entry(CONSTANT, value=i) for i in range(6)]
    element = (5 >> 2) << 63 | 8000 << 50 | (5 & 3) << 48 | 0x0001_0203_0405
    data = struct.pack("<Q", element) * 7
    _both(strategies.chunk_record(entries, 5, 8, data), 7, 8, data)


@pytest.mark.parametrize("codec", [HUFFMAN, RANS])
def test_a_block_of_escapes_alone(codec):
    n = 200
    table = {7: 1, 9: 1} if codec == HUFFMAN else {7: 4095, 9: 1}
    symbols = [i * 7 % 256 for i in range(n)]
    entry = _entropy(symbols, codec, table, escapes=list(enumerate(symbols)))
    _both(strategies.chunk_record([entry], 1, 1, bytes(symbols)), n, 1, bytes(symbols))


@pytest.mark.parametrize("level", ["default", "best"])
def test_groups_of_a_plane_share_a_table_where_that_is_smaller(level):
    rng = np.random.default_rng(8)
    n = 2**18
    alike = np.clip(rng.normal(128, 20, 3 * n), 0, 255).astype(np.uint8)
    other = np.concatenate((alike[:n], rng.choice([3, 9], n, p=[0.9, 0.1]).astype(np.uint8), alike[n : 2 * n]))
    for raw, own, width in ((alike, [0], 1), (other, [0, 1, 2], 1), (np.repeat(alike[:n], 2) // 2, [0], 2)):
        record = check_encoded(raw, width, "planes", level, slowly=True)
        at, count = strategies.blocks_of(record)
        coded = [b for b in reference.read_blocks(record, at, count) if b.codec in (HUFFMAN, RANS)]
        assert [i for i, b in enumerate(coded[: raw.size // width // n]) if not b.flags & 1] == own[: raw.size // width // n]


def test_rare_bytes_of_a_plane_are_escapes():
    raw = np.clip(np.random.default_rng(9).normal(128, 9, 2**18), 100, 150).astype(np.uint8)
    raw[[5, 70_000, 2**18 - 1]] = [0, 255, 7]
    record = check_encoded(raw, 1, "planes", "default", slowly=True)
    (block,) = reference.read_blocks(record, 48, 1)
    assert block.escapes >= 3
    # As often as this they are worth a place in the table.
    raw[::1000] = 255
    record = check_encoded(raw, 1, "planes", "default", slowly=True)
    assert reference.read_blocks(record, 48, 1)[0].escapes < 100


# ---- transforms


KINDS = {
    "palette": 1, "grid": 2, "sparse": 3, "difference": 4, "offset": 5, "rows": 6, "delta": 7, "records": 8, "vocabulary": 12,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(1, 6000), st.integers(0, 2**32 - 1))
def test_all_transforms_that_the_format_allows_are_decoded(kind, n, seed):
    chunk, t = strategies.random_transform(np.random.default_rng(seed), KINDS[kind], n)
    n = len(chunk.data) // chunk.width  # records have two bytes or more
    assert decode_slowly(chunk.record, n, chunk.width, 0, 0, chunk.base) == chunk.data
    assert decode(chunk.record, n, chunk.width, 0, 0, chunk.base) == chunk.data
    layout = read_blocks(memoryview(chunk.record), 0, 0, n, chunk.width)
    assert (layout.elements, layout.width, len(layout.strings)) == (t.m, t.inner_width, 2)
    assert codecs_of(chunk.record) == strategies.codecs_of(chunk.record)


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_of_several_groups_are_decoded(kind):
    rng = np.random.default_rng(KINDS[kind])
    n = 2**18 + 12345
    chunk, _ = strategies.random_transform(rng, KINDS[kind], n, a=8)
    assert decode(chunk.record, n, chunk.width, 0, 0, chunk.base) == chunk.data
    assert decode_slowly(chunk.record, n, chunk.width, 0, 0, chunk.base) == chunk.data


def test_a_whole_chunk_is_one_transform():
    n = 2**20
    for data in (np.full(n, 0xBF80, "<u2"), np.arange(n, dtype="<i4"), np.arange(n, dtype="<i8") * 5 - 3):
        raw = np.ascontiguousarray(data).view(np.uint8)
        record = check_encoded(raw, data.itemsize, "planes", "default", slowly=data.itemsize == 2)
        assert len(record) < 1000


def _transformed(kind, n=40, seed=3, **changes):
    """A record of one byte strings all raw, with fields of its header, or of its entries, changed; sums are right."""
    rng = np.random.default_rng(seed)
    width = {"grid": 4, "offset": 4, "vocabulary": 4, "records": 1}.get(kind, 2)
    word = f"<u{width}"
    side_a = side_b = b""
    split, inputs, entries = 0, None, None
    t = strategies.Transform(KINDS[kind], n, width)
    inner = rng.integers(0, 256, n * width, np.uint8)
    if kind == "palette":
        t.m, t.inner_width, t.a = n // 2, 1, 4
        side_a = bytes(16) + bytes(range(16))
        inner = rng.integers(0, 256, n // 2, np.uint8)
        data = np.stack((inner & 15, inner >> 4), axis=1).reshape(-1).astype(word).tobytes()
    elif kind == "grid":
        t.inner_width, t.a, t.b, t.c = 1, 2, 16, 7
        scales = np.array([1, 0.5, 2, 4], "<f4")
        side_a, side_b = scales.tobytes(), struct.pack("<IIII", 3, 7, 9, 5)
        inner = rng.integers(0, 256, n, np.uint8)
        elements = strategies.grid_elements(inner, scales, 7, 16, 2)
        elements[[3, 9]] = [7, 5]
        data = elements.tobytes()
    elif kind == "sparse":
        mask = np.arange(n) % 4 == 1
        side_a, t.m, t.v = np.packbits(mask, bitorder="little").tobytes(), int(mask.sum()), 77
        inner = inner[: 2 * t.m]
        elements = np.full(n, 77, word)
        elements[mask] = inner.view(word)
        data = elements.tobytes()
    elif kind == "rows":
        t.a, t.b, t.c = 1, 16, 7
        side_a = bytes([2, 0, 2, 1])
        places = [*range(7, 23), *range(39, 40), *range(7), *range(23, 39)]
        elements = np.empty(n, word)
        elements[places] = inner.view(word)
        data = elements.tobytes()
    elif kind == "delta":
        mask = np.arange(n) % 4 == 1
        side_a, t.m, split = np.packbits(mask, bitorder="little").tobytes(), int(mask.sum()), 1
        t.b, t.c = 2, 13 | 3 << 8
        inner = inner[: 2 * t.m]
        base = np.frombuffer(_base(n), word)
        t.classes = np.bincount(strategies.delta_classes(base[mask], t.b, t.c), minlength=8).tolist()
        data = strategies.delta_elements(t, base, mask, inner.view(word)).tobytes()
        cuts = np.cumsum([0, *(size for size in t.classes if size)])
        groups = [inner[2 * a : 2 * b] for a, b in pairwise(cuts)]
        entries = [Entry(RAW, payload=g[plane::2].tobytes()) for plane in (1, 0) for g in groups]
    elif kind == "records":  # 2 loose bytes, 5 records of 7, 3 loose ones
        t.b, t.c, t.m, split = 7, 2, 35, 1
        fields = np.array([3, 0, 0, 7, 0, 3, 3], np.uint8)
        t.classes = [15, 0, 0, 15, 0, 0, 0, 5]
        side_a, side_b = fields.tobytes(), rng.bytes(5)
        groups = [inner[:15], inner[15:30], inner[30:35]]
        table = np.empty((5, 7), np.uint8)
        for f, group in zip((0, 3, 7), groups, strict=True):
            table[:, fields == f] = group.reshape(5, -1)
        data = side_b[:2] + table.tobytes() + side_b[2:]
        entries = [Entry(RAW, payload=g.tobytes()) for g in groups]
    elif kind == "difference":
        t.v, t.b, t.c = 500, 1, 70_000
        data = (np.cumsum(inner.view(word), dtype=word) + np.uint16((500 - 70_000) % 65536)).astype(word).tobytes()
    elif kind == "vocabulary":  # 15 codes of one byte, 20 of two, 5 of three: 250 frequent values, 4 first bytes of two
        t.b, t.v, t.inner_width, t.m = 4, 7, 1, 70
        side_a, side_b = np.arange(0, 25_000, 100, "<u4").tobytes(), b"\xff" * 200
        codes = [bytes([i]) for i in range(235, 250)] + [bytes([250 + i // 5, 50 * (i % 5)]) for i in range(20)]
        codes += [bytes([254, i, 100]) for i in range(2)] + [bytes([254, 2, i]) for i in (0, 62, 63)]
        values = [100 * i for i in range(235, 250)] + [256 * (i // 5) + 50 * (i % 5) for i in range(20)]
        values += [1024 + 100, 1024 + 356, 1536, 1598, 1599]
        inner = np.frombuffer(b"".join(codes), np.uint8)
        data = (np.array(values, word) + np.uint32(7)).tobytes()
    else:
        t.inner_width, t.v = 2, 3_000_000_000
        inner = inner[: 2 * n]
        data = (inner.view("<u2").astype(word) + np.uint32(t.v)).tobytes()
    t.size_a, t.size_b = len(side_a), len(side_b)
    t.a_block, t.b_block = (Entry(RAW, payload=p) if p else None for p in (side_a, side_b))
    entries = entries or [Entry(RAW, payload=inner.tobytes())]
    for name, value in changes.items():
        if name == "inner":
            entries = [Entry(RAW, payload=value)]
        elif name == "split":
            split = value
        elif name == "inputs":
            inputs = value
        elif name[:2] in ("A_", "B_"):
            holder = f"{name[0].lower()}_block"
            block = getattr(t, holder) or Entry(RAW)
            setattr(block, name[2:], value)
            setattr(t, holder, block)
        else:
            setattr(t, name, value)
    return strategies.chunk_record(entries, split, width, data, transform=t, inputs=inputs), width, data


def _base(n=40):
    """What the deltas of `_transformed` are differences from."""
    return np.random.default_rng(n).bytes(2 * n)


HEADER_FLAWS = {
    "palette": [
        {"m": 19}, {"m": 21}, {"m": 0}, {"m": 2**20 + 1}, {"m": 2**32 - 1}, {"inner_width": 0}, {"inner_width": 2},
        {"inner_width": 3}, {"inner_width": 255}, {"a": 0}, {"a": 3}, {"a": 8}, {"a": 255}, {"reserved": 1}, {"size_a": 31},
        {"size_a": 33}, {"size_a": 34}, {"size_a": 0}, {"size_a": 2**18 + 2}, {"size_a": 2**32 - 2}, {"size_b": 1},
        {"b": 1}, {"c": 1}, {"v": 1}, {"A_codec": CONSTANT}, {"A_payload": bytes(31)}, {"A_payload": bytes(33)},
        # The sixteenth value is not there, but used.
        {"size_a": 30, "A_payload": bytes(30), "inner": b"\xff" * 20}, {"size_a": 32, "A_payload": b"", "A_codec": ZSTANDARD},
    ],
    "grid": [
        {"m": 39}, {"m": 41}, {"inner_width": 4}, {"a": 0}, {"a": 1}, {"a": 3}, {"a": 15}, {"a": 0x32}, {"a": 0xF2},
        {"a": 0x12}, {"b": 0}, {"b": 6}, {"b": 2**20 + 1}, {"b": 5}, {"c": 0}, {"c": 17}, {"c": 2**32 - 1}, {"v": 1},
        {"size_a": 12, "A_payload": bytes(12)}, {"size_a": 20, "A_payload": bytes(20)}, {"size_b": 8}, {"size_b": 17},
        {"A_payload": struct.pack("<4f", 1, 2, float("inf"), 3)}, {"A_payload": struct.pack("<4f", 1, 2, 3, float("-inf"))},
        {"A_payload": struct.pack("<4f", float("nan"), 2, 3, 4)}, {"B_payload": struct.pack("<IIII", 9, 5, 3, 7)},
        {"B_payload": struct.pack("<IIII", 3, 7, 3, 7)}, {"B_payload": struct.pack("<IIII", 3, 7, 40, 5)},
        {"B_payload": struct.pack("<IIII", 3, 7, 2**32 - 1, 5)},
    ],
    "sparse": [
        {"m": 9}, {"m": 11}, {"m": 41}, {"inner_width": 1}, {"inner_width": 4}, {"a": 1}, {"b": 1}, {"c": 1}, {"v": 2**16},
        {"v": 2**63}, {"size_a": 4, "A_payload": bytes(4)}, {"size_a": 6, "A_payload": bytes(6)}, {"size_b": 1},
        {"A_payload": b"\x22\x22\x22\x22\x26"}, {"A_payload": b"\x22\x22\x22\x22\x02"}, {"size_a": 0},
    ],
    "difference": [
        {"m": 39}, {"m": 41}, {"inner_width": 1}, {"inner_width": 4}, {"a": 1}, {"b": 0}, {"b": 2**20 + 1}, {"b": 2**32 - 1},
        {"v": 2**16 + 500}, {"v": 2**64 - 1}, {"size_a": 1}, {"size_b": 1}, {"reserved": 0x8000},
    ],
    "rows": [
        {"m": 39}, {"m": 41}, {"m": 0}, {"inner_width": 1}, {"inner_width": 4}, {"a": 0}, {"a": 2}, {"a": 33}, {"a": 255},
        {"b": 0}, {"b": 6}, {"b": 5}, {"b": 2**20 + 1}, {"c": 0}, {"c": 17}, {"c": 2**32 - 1}, {"v": 1}, {"size_b": 1},
        {"size_a": 3, "A_payload": bytes(3)}, {"size_a": 5, "A_payload": bytes(5)}, {"size_a": 0}, {"reserved": 1},
    ],
    "delta": [
        {"m": 9}, {"m": 11}, {"m": 0}, {"m": 40}, {"m": 41}, {"m": 2**32 - 1}, {"inner_width": 0}, {"inner_width": 1},
        {"inner_width": 4}, {"a": 3}, {"a": 16}, {"a": 255}, {"b": 8}, {"b": 2**32 - 1}, {"c": 0}, {"c": 13},
        {"c": 13 | 12 << 8}, {"c": 4 | 12 << 8}, {"c": 14 | 3 << 8}, {"c": 255 | 3 << 8}, {"c": 16 | 1 << 8},
        {"c": 13 | 3 << 8 | 1 << 16}, {"c": 2**32 - 1}, {"v": 1}, {"v": 2**16}, {"v": 2**63}, {"reserved": 1},
        {"size_a": 4, "A_payload": b"\x22" * 4}, {"size_a": 6, "A_payload": b"\x22" * 5 + b"\0"}, {"size_a": 0},
        {"size_a": 0, "a_block": None}, {"size_a": 2**18 + 1}, {"size_b": 1}, {"A_payload": b"\x22\x22\x22\x22\x26"},
        {"A_payload": b"\x22\x22\x22\x22\x02"}, {"A_payload": bytes(5)}, {"A_payload": b"\xff" * 5}, {"A_codec": ZSTANDARD},
        # Sizes that do not add up, or would in 32 bits.
        *({"classes": classes} for classes in (
            [0] * 8, [11] + [0] * 7, [9] + [0] * 7, [2**32 - 1, 11] + [0] * 6, [2**31, 2**31, 10] + [0] * 5, [2**32 - 1] * 8,
            [0] * 7 + [2**20 + 1],
        )),
        # Ten elements, but not those classes.
        {"classes": [10] + [0] * 7}, {"classes": [0] * 7 + [10]},
        # No class sizes, or half of them.
        {"classes": []}, {"classes": [10, 0, 0, 0]},
        {"split": 0}, {"split": 2}, {"split": 3}, {"split": 4}, {"inputs": 0},
    ],
    "records": [
        {"m": 34}, {"m": 28}, {"m": 36}, {"m": 0}, {"m": 40}, {"m": 2**32 - 1}, {"inner_width": 2}, {"inner_width": 0},
        {"a": 1}, {"b": 0}, {"b": 1}, {"b": 6}, {"b": 8}, {"b": 4097}, {"b": 2**32 - 1}, {"c": 7}, {"c": 9}, {"c": 2**32 - 1},
        {"v": 1}, {"reserved": 1}, {"size_a": 6, "A_payload": bytes(6)}, {"size_a": 8, "A_payload": bytes(8)}, {"size_a": 0},
        {"size_b": 4, "B_payload": bytes(4)}, {"size_b": 6, "B_payload": bytes(6)}, {"size_b": 0, "b_block": None},
        {"A_payload": bytes([3, 0, 0, 8, 0, 3, 3])}, {"A_payload": bytes([3, 0, 0, 255, 0, 3, 3])},
        # The sizes of other fields, or none.
        {"A_payload": bytes([3, 0, 0, 7, 7, 3, 3])}, {"A_payload": bytes(7)}, {"classes": [15, 15, 0, 0, 0, 0, 0, 5]},
        *({"classes": classes} for classes in (
            [0] * 8, [35] + [0] * 7, [15, 0, 0, 15, 0, 0, 0, 4], [15, 0, 0, 15, 0, 0, 1, 4], [2**32 - 15, 0, 0, 45, 0, 0, 0, 5],
            [], [15, 0, 0, 20],
        )),
        {"split": 0}, {"split": 2}, {"inputs": 1},
    ],
    "vocabulary": [
        {"m": 39}, {"m": 69}, {"m": 71}, {"m": 121}, {"m": 2**32 - 1}, {"inner_width": 2}, {"inner_width": 0}, {"a": 1},
        {"c": 1}, {"b": 7}, {"b": 2**32 - 1}, {"b": 3}, {"v": 2**32}, {"v": 2**63}, {"reserved": 1},
        {"size_a": 999, "A_payload": bytes(999)}, {"size_a": 1028, "A_payload": bytes(1028)}, {"size_a": 0, "a_block": None},
        {"size_b": 0, "b_block": None},
        # One frequent value less, so that other codes are longer; the last of the others is not there.
        {"size_a": 996, "A_payload": bytes(996)}, {"size_b": 199, "B_payload": b"\xff" * 199},
        {"B_payload": b"\xff" * 199 + b"\x7f"}, {"B_payload": bytes(200)},
        # Codes for one element less and one more, and one that is cut off.
        {"m": 67, "inner": b"\xfe\0\0" * 22 + b"\0"}, {"m": 42, "inner": b"\0" * 42},
        {"m": 41, "inner": b"\0" * 39 + b"\xfe\0"}, {"m": 40, "inner": b"\0" * 39 + b"\xfa"},
        {"m": 40, "inner": b"\0" * 39 + b"\xfe"},
        {"m": 42, "inner": b"\0" * 39 + b"\xfe\2\x40"}, {"m": 42, "inner": b"\0" * 39 + b"\xff\0\0"},
    ],
    "offset": [
        {"m": 39}, {"m": 41}, {"inner_width": 4}, {"inner_width": 8}, {"inner_width": 1}, {"a": 1}, {"b": 1}, {"c": 1},
        {"v": 2**32}, {"size_a": 1}, {"size_b": 1},
    ],
}  # fmt: skip
# Of all strings, those that are empty and those that are not.
FULL_FLAWS = [{"joined": 1}, *({"flags": f} for f in (1, 2, 4, 6, 8, 128)), {"segments": 1}, {"escapes": 1}, {"value": 1}]
EMPTY_FLAWS = [*FULL_FLAWS, {"codec": CONSTANT}, {"codec": ZSTANDARD}, {"codec": HUFFMAN}, {"codec": RANS}, {"payload": b"x"},
               {"payload": bytes(16)}]  # fmt: skip


def _header_flaws():
    for kind, flaws in HEADER_FLAWS.items():
        yield from ((kind, flaw) for flaw in flaws)
        for name, full in (("A", kind not in ("difference", "offset")), ("B", kind in ("grid", "records", "vocabulary"))):
            yield from ((kind, {f"{name}_{k}": v for k, v in flaw.items()}) for flaw in (FULL_FLAWS if full else EMPTY_FLAWS))


@pytest.mark.parametrize(("kind", "flaw"), list(_header_flaws()), ids=lambda v: v if isinstance(v, str) else repr(v)[:40])
def test_flawed_transform_headers_are_refused(kind, flaw):
    record, width, _ = _transformed(kind, **flaw)
    assert refused(record, 40, width, base=_base())


@pytest.mark.parametrize("kind", KINDS)
def test_transform_headers_without_flaw_are_accepted(kind):
    record, width, data = _transformed(kind)
    _both(record, 40, width, data, _base())


@pytest.mark.parametrize("codec", [5, 8, 127, 255])
@pytest.mark.parametrize(("kind", "string"), [
    ("palette", "A"), ("grid", "A"), ("grid", "B"), ("sparse", "A"), ("delta", "A"), ("records", "A"), ("records", "B"),
    ("vocabulary", "A"), ("vocabulary", "B"),
])  # fmt: skip
def test_unknown_codecs_of_strings_are_unsupported(kind, string, codec):
    record, width, _ = _transformed(kind, **{f"{string}_codec": codec})
    assert refused(record, 40, width, "unsupported", _base())


@pytest.mark.parametrize("kind", KINDS)
def test_records_that_end_within_a_transform_header(kind):
    record, width, _ = _transformed(kind)
    for length in (64, 80, 96):
        part = record[:16] + struct.pack("<Q", length) + record[24:length]
        part = part[:8] + strategies.rechecked(part)[8:]
        assert refused(part, 40, width)
        with pytest.raises(TruncatedError):
            read_blocks(memoryview(part), 0, 0, 40, width)
        assert codecs_of(part) == 0
    if kind == "delta":  # whose header is longer
        for length in (112, 128):
            part = record[:16] + struct.pack("<Q", length) + record[24:length]
            part = part[:8] + strategies.rechecked(part)[8:]
            assert refused(part, 40, width, base=_base())
            with pytest.raises(TruncatedError):
                read_blocks(memoryview(part), 0, 0, 40, width)
            assert codecs_of(part) == 1 << RAW
    # The header alone, and none of the entries and payloads that it speaks of.
    part = record[:16] + struct.pack("<Q", 112) + record[24:112]
    assert refused(part[:8] + strategies.rechecked(part)[8:], 40, width)


@pytest.mark.parametrize("kind", ["palette", "grid", "delta"])
def test_inner_elements_are_not_needed_to_refuse_strings_and_headers(kind):
    """Section 6.3: what the header shows is proven from it alone."""
    for flaw in HEADER_FLAWS[kind]:
        # Classes that add up are proven by the base.
        named = {"A_payload", "B_payload", "inner", "A_codec"} | ({"classes"} if sum(flaw.get("classes", [])) == 10 else set())
        if not named & set(flaw):
            record, width, _ = _transformed(kind, **flaw)
            with pytest.raises(CorruptError):
                read_blocks(memoryview(record), 0, 0, 40, width)


@pytest.mark.parametrize("codec", [HUFFMAN, RANS])
def test_strings_with_flags_are_refused_before_anything_is_decoded(codec):
    """A string has no earlier block whose table it could share; nor has it a sign."""
    string = strategies.string_block(np.random.default_rng(0), bytes(range(32)), codec)
    changes = {f"A_{name}": value for name, value in string.__dict__.items()}
    record, width, _ = _transformed("palette", **changes)
    read_blocks(memoryview(record), 0, 0, 40, width)
    for flags in (1, 2, 4):
        record, width, _ = _transformed("palette", **changes | {"A_flags": flags})
        assert refused(record, 40, width)
        with pytest.raises(CorruptError):
            read_blocks(memoryview(record), 0, 0, 40, width)


@pytest.mark.parametrize("inputs", [5, 6, 255])
@pytest.mark.parametrize("kind", KINDS)
def test_more_inputs_than_there_are_yet_are_unsupported(kind, inputs):
    record, width, _ = _transformed(kind, inputs=inputs)
    assert refused(record, 40, width, "unsupported", _base())


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "delta"])
def test_other_transforms_have_no_input(kind):
    record, width, _ = _transformed(kind, inputs=1)
    assert refused(record, 40, width, base=_base())


@pytest.mark.parametrize("predictor", [7, 8, 255, 2**16 - 1])
def test_unknown_predictors_are_unsupported(predictor):
    record, width, _ = _transformed("delta", v=predictor)
    assert refused(record, 40, width, "unsupported", _base())


def test_an_input_and_class_sizes_make_no_delta():
    """A record that is sound but for its transform, or for the class sizes and the input that it should not have."""
    inner = np.arange(40, dtype=np.uint8)
    data = np.cumsum(inner, dtype=np.uint8).tobytes()
    for classes, inputs in (([40] + [0] * 7, 1), ([], 1), ([], 0)):
        t = strategies.Transform(4, 40, 1, b=1, classes=classes)
        record = strategies.chunk_record([Entry(RAW, payload=inner.tobytes())], 1, 1, data, transform=t, inputs=inputs)
        if inputs:
            assert refused(record, 40, 1, base=bytes(40))
        else:
            _both(record, 40, 1, data)


def test_class_sizes_are_proven_before_anything_is_decoded():
    """Constants have no size that would show it."""
    for classes, good in (([10], True), ([9], False), ([11], False), ([4, 6], True), ([4, 7], False), ([2**32 - 6, 16], False)):
        t = strategies.Transform(7, 10, 2, c=1 << 8, size_a=5, a_block=Entry(CONSTANT, value=0x22))
        t.classes = classes + [0] * (8 - len(classes))
        record = strategies.chunk_record([Entry(CONSTANT)] * 2 * len(classes), 1, 2, bytes(80), transform=t)
        if good:
            assert read_blocks(memoryview(record), 0, 0, 40, 2).classes.tolist() == t.classes
        else:
            with pytest.raises(CorruptError):
                read_blocks(memoryview(record), 0, 0, 40, 2)
            assert refused(record, 40, 2, base=bytes(80))


@pytest.mark.parametrize("n", [33, 37, 39])
def test_unused_bits_of_the_mask_of_a_delta(n):
    record, width, data = _transformed("delta", n)
    _both(record, n, width, data, _base(n))
    mask = np.packbits(np.arange(n) % 4 == 1, bitorder="little")
    for bit in range(n, -(-n // 8) * 8):
        for first in (True, False):
            bad = mask.copy()
            bad[bit // 8] |= 1 << bit % 8
            bad[0] ^= 2 if first else 0  # the number of set bits is right
            record, _, _ = _transformed("delta", n, A_payload=bad.tobytes())
            assert refused(record, n, width, base=_base(n))


def test_another_base_is_seen_before_the_sums_by_its_classes():
    record, width, data = _transformed("delta")
    base = bytearray(_base())
    _both(record, 40, width, data, bytes(base))
    base[3] ^= 0xC0  # element 1, which is changed: another class
    assert refused(record, 40, width, base=bytes(base))
    base[3] ^= 0xC0
    base[1] ^= 0xC0  # element 0, which is not
    assert fate(decode, record, 40, width, 0, 0, bytes(base)) == "corrupt"
    assert fate(decode_slowly, record, 40, width, 0, 0, bytes(base)) == "corrupt"
    assert without_sums(decode, record, 40, width, bytes(base)) == bytes(base[:2]) + data[2:]


@pytest.mark.parametrize("base", [None, b"", bytes(78), bytes(81), bytes(160)])
def test_a_base_of_another_size_is_refused(base):
    record, width, _ = _transformed("delta")
    assert fate(decode, record, 40, width, 0, 0, base) == "corrupt"


def test_deltas_by_hand():
    """Section 6.4: elements of a byte, all orders, classes and ends of the range."""
    base = bytes([0x00, 0x7F, 0x80, 0xFF, 0x10, 0x90, 0x3C, 0x3D])
    z = [1, 2, 0, 3, 255, 254, 5, 6]
    d = [-1, 1, 0, -2, -128, 127, -3, 3]

    def moved(x, by, a):
        if a:
            return (x + by) % 256
        y = ((x ^ 0xFF if x & 0x80 else x ^ 0x80) + by) % 256
        return y ^ 0x80 if y & 0x80 else y ^ 0xFF

    for a in (0, 1):
        data = bytes(moved(x, by, a) for x, by in zip(base, d, strict=True))
        # The class is that of the highest bit, from 1 on: all of class 0.
        t = strategies.Transform(7, 8, 1, a=a, b=1, c=7 | 1 << 8, classes=[8] + [0] * 7)
        record = strategies.chunk_record([Entry(RAW, payload=bytes(z))], 1, 1, data, transform=t)
        _both(record, 8, 1, data, base)
        # Of the low two bits: 0, 3, 0, 3, 0, 0, 0, 1.
        t = strategies.Transform(7, 8, 1, a=a, b=0, c=0 | 2 << 8, classes=[5, 1, 0, 2, 0, 0, 0, 0])
        entries = [Entry(RAW, payload=bytes(z[i] for i in own)) for own in ((0, 2, 4, 5, 6), (7,), (1, 3))]
        record = strategies.chunk_record(entries, 1, 1, data, transform=t)
        _both(record, 8, 1, data, base)
    assert moved(0x00, -1, 0) == 0x80  # below zero comes negative zero: steps of a float
    assert moved(0x80, 1, 0) == 0x00


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_deltas_without_a_change_have_no_blocks(width):
    base = np.random.default_rng(width).bytes(40 * width)
    t = strategies.Transform(7, 0, width, c=1 << 8, classes=[0] * 8)
    record = strategies.chunk_record([], 1, width, base, transform=t)
    assert len(record) == 144
    _both(record, 40, width, base, base)
    t.classes = []  # nor may it be without class sizes and input
    assert refused(strategies.chunk_record([], 1, width, base, transform=t, inputs=0), 40, width, base=base)
    t.classes = [0] * 8
    for split in (0, 2, 3, 4, 5):
        assert refused(strategies.chunk_record([], split, width, base, transform=t), 40, width, base=base)


def test_groups_of_a_delta_are_those_of_its_classes():
    """Two classes of more elements than a group has, the first of them by a single one."""
    n, many = 2 * 2**18 + 100, 2**18 + 1
    base = np.where(np.arange(n) < many, 0x00, 0xF0).astype(np.uint8)
    z = np.random.default_rng(0).integers(0, 256, n).astype(np.uint8)
    t = strategies.Transform(7, n, 1, a=1, c=4 | 4 << 8, classes=[many] + [0] * 6 + [n - many])
    data = strategies.delta_elements(t, base, np.ones(n, bool), z).tobytes()
    cuts = np.cumsum([0, 135168, 126977, 135168, 127075])
    blocks = [Entry(RAW, payload=z[a:b].tobytes()) for a, b in pairwise(cuts)]
    record = strategies.chunk_record(blocks, 1, 1, data, transform=t)
    _both(record, n, 1, data, base.tobytes())


def test_the_split_must_have_the_inner_width_even_of_no_elements():
    for split, good in ((0, True), (1, True), (2, True), (3, True), (4, False), (5, False)):
        t = strategies.Transform(3, 0, 2, v=0x1234, size_a=5, a_block=Entry(CONSTANT))
        record = strategies.chunk_record([], split, 2, b"\x34\x12" * 40, transform=t)
        if good:
            _both(record, 40, 2, b"\x34\x12" * 40)
        else:
            assert refused(record, 40, 2)


# ---- one broken rule at a time


def _codec3(n=40, **kwargs):
    symbols = [i % 3 for i in range(n)]
    return _entropy(symbols, HUFFMAN, {0: 1, 1: 2, 2: 2}, **kwargs), bytes(symbols)


def _codec4(n=40, **kwargs):
    symbols = [i % 3 for i in range(n)]
    return _entropy(symbols, RANS, {0: 2000, 1: 2000, 2: 96}, **kwargs), bytes(symbols)


FORTY = bytes(range(40))


def _byte_record(entry, data=FORTY, split=1):
    return strategies.chunk_record([entry], split, 1, data)


def _flawed_blocks():
    """Names, records of 40 elements of one byte, and the kind of refusal; sums are right in all of them."""
    raw = bytes(range(40))
    h, r = _codec3()[0], _codec4()[0]
    three = _codec3()[1]
    w_h, w_r = 64, 4 + 128  # where the tables start
    frame = strategies.zstandard.ZstdCompressor().compress
    sizeless = strategies.zstandard.ZstdCompressor(write_content_size=False).compress(raw)
    edit = lambda e, **k: Entry(**(e.__dict__ | k))  # noqa: E731

    def patched(e, at, new):
        return edit(e, payload=e.payload[:at] + new + e.payload[at + len(new) :])

    yield "raw too short", _byte_record(Entry(RAW, payload=raw[:-1]), raw), "corrupt"
    yield "raw too long", _byte_record(Entry(RAW, payload=raw + b"\0"), raw), "corrupt"
    yield "raw with a value", _byte_record(Entry(RAW, value=1, payload=raw), raw), "corrupt"
    yield "raw with segments", _byte_record(Entry(RAW, segments=1, payload=raw), raw), "corrupt"
    yield "raw with escapes", _byte_record(Entry(RAW, escapes=1, payload=raw), raw), "corrupt"
    yield "raw with a shared table", _byte_record(Entry(RAW, flags=1, payload=raw), raw), "corrupt"
    yield "joined in a byte plane", _byte_record(Entry(RAW, joined=1, payload=raw), raw), "corrupt"
    yield "sign mode in a byte plane", _byte_record(Entry(RAW, flags=2, payload=raw), raw), "corrupt"
    yield "unknown flag", _byte_record(Entry(RAW, flags=8, payload=raw), raw), "corrupt"
    yield "constant too wide", _byte_record(Entry(CONSTANT, value=256), bytes(40)), "corrupt"
    yield "constant with a payload", _byte_record(Entry(CONSTANT, value=1, payload=b"\1"), b"\1" * 40), "corrupt"
    yield "zstandard of another size", _byte_record(Entry(ZSTANDARD, payload=frame(raw + b"1")), raw), "corrupt"
    yield "zstandard without a size", _byte_record(Entry(ZSTANDARD, payload=sizeless), raw), "corrupt"
    yield "two frames", _byte_record(Entry(ZSTANDARD, payload=frame(raw) + frame(b"")), raw), "corrupt"
    yield "no frame", _byte_record(Entry(ZSTANDARD, payload=b""), raw), "corrupt"
    yield "zstandard with a value", _byte_record(Entry(ZSTANDARD, value=7, payload=frame(raw)), raw), "corrupt"
    for codec in (5, 6, 8, 15, 16, 127, 128, 255):
        yield f"codec {codec}", _byte_record(Entry(codec, payload=raw), raw), "unsupported"
    for e, name in ((h, "huffman"), (r, "rans")):
        yield f"{name}: no table to share", _byte_record(edit(e, flags=1), three), "corrupt"
        yield f"{name}: base in a narrow plane", _byte_record(edit(e, value=1), three), "corrupt"
        for segments in (0, 2, 17, 255):
            yield f"{name}: {segments} segments", _byte_record(edit(e, segments=segments), three), "corrupt"
        yield f"{name}: payload too long", _byte_record(edit(e, payload=e.payload + b"\0"), three), "corrupt"
        yield f"{name}: two bytes too long", _byte_record(edit(e, payload=e.payload + b"\0\0"), three), "corrupt"
        yield f"{name}: payload too short", _byte_record(edit(e, payload=e.payload[:-1]), three), "corrupt"
        yield f"{name}: empty payload", _byte_record(edit(e, payload=b""), three), "corrupt"
        yield f"{name}: escapes past the end", _byte_record(edit(e, escapes=10**6), three), "corrupt"
        yield f"{name}: 2^30 escapes", _byte_record(edit(e, escapes=1 << 30), three), "corrupt"
        yield f"{name}: 2^32 - 1 escapes", _byte_record(edit(e, escapes=(1 << 32) - 1), three), "corrupt"
    yield "huffman: incomplete", _byte_record(patched(h, w_h, b"\0\2\x21\3"), three), "corrupt"
    yield "huffman: table padding", _byte_record(patched(h, w_h, b"\0\2\x21\x12"), three), "corrupt"
    yield "rans: sum 4097", _byte_record(patched(r, w_r + 2, b"\xd1"), three), "corrupt"
    for at in (0, 62):
        bigger = struct.pack("<H", struct.unpack_from("<H", h.payload, at)[0] + 1)
        yield f"huffman: stream {at // 2} longer than it is", _byte_record(patched(h, at, bigger), three), "corrupt"
    longer = struct.pack("<H", h.payload[0] + 1) + h.payload[2:68] + h.payload[68 : 68 + h.payload[0]] + b"\0"
    padded = edit(h, payload=longer + h.payload[68 + h.payload[0] :])
    yield "huffman: a byte too many in a stream", _byte_record(padded, three), "corrupt"
    swap = struct.pack("<2H", h.payload[0] + 1, h.payload[2] - 1)
    yield "huffman: a byte moved to the next stream", _byte_record(patched(h, 0, swap), three), "corrupt"
    for bit in (6, 7):  # 0, 1, 2, 0 take six bits of the first stream's byte
        loose = patched(h, 68, bytes([h.payload[68] | 1 << bit]))
        yield f"huffman: unused bit {bit}", _byte_record(loose, three), "corrupt"
    for value in (0, 2**15 - 1, 2**31, 2**32 - 1):
        yield f"rans: state {value}", _byte_record(patched(r, 4, struct.pack("<I", value)), three), "corrupt"
    yield "rans: another state", _byte_record(patched(r, 4, struct.pack("<I", 2**15 + 1)), three), "corrupt"
    count = struct.unpack_from("<I", r.payload)[0]
    yield "rans: 2^32 - 1 words", _byte_record(patched(r, 0, struct.pack("<I", 2**32 - 1)), three), "corrupt"
    more = struct.pack("<I", count + 1) + r.payload[4:] + b"\0\0"
    yield "rans: a word left", _byte_record(edit(r, payload=more), three), "corrupt"
    if count:
        fewer = struct.pack("<I", count - 1) + r.payload[4:-2]
        yield "rans: a word missing", _byte_record(edit(r, payload=fewer), three), "corrupt"
    for make in (_codec3, _codec4):
        name = make.__name__
        for flaw, escapes in (
            ("escape past the end", [(40, 1)]),
            ("escape twice", [(5, 2), (5, 2)]),
            ("escapes descending", [(6, 0), (5, 2)]),
            ("escape too wide", [(0, 256)]),
        ):
            entry, data = make(escapes=escapes)
            yield f"{name}: {flaw}", _byte_record(entry, data), "corrupt"


@pytest.mark.parametrize(("record", "kind"), [pytest.param(r, k, id=n) for n, r, k in _flawed_blocks()])
def test_flawed_blocks_are_refused(record, kind):
    assert refused(record, 40, 1, kind)


def test_the_blocks_without_flaw_are_accepted():
    for make in (_codec3, _codec4):
        entry, data = make(escapes=[(0, 0), (39, 0)])
        _both(_byte_record(entry, data), 40, 1, data)


def test_first_states_of_rans_are_in_range():
    """States below and above the range that end, as they must, in 2^15 after the words are used up."""
    table = {0: 2048, 1: 1, 2: 2047}  # symbol 0 has the slots from 0 on, symbol 1 the last one

    def record(first, others, words, symbols):
        payload = struct.pack("<33I", len(words) // 2, first, *[others] * 31) + strategies.rans_table(table) + words
        return strategies.chunk_record([Entry(RANS, 0, 1, payload=payload)], 1, 1, bytes(symbols))

    # One step back from 2^15 with symbol 0 is 2^16, five are 2^20; one step back from 2^19 with symbol 1 is 2^31 + 4095.
    _both(record(2**16, 2**16, b"", [0] * 32), 32, 1, bytes(32))
    _both(record(2**20, 2**20, b"", [0] * 160), 160, 1, bytes(160))
    assert refused(record(0, 2**16, b"\0\x80", [0] * 32), 32, 1)
    assert refused(record(2**31 + 4095, 2**20, b"", [1] + [0] * 159), 160, 1)


def _float_record(**change):
    """A bf16 record of 64 elements whose entries can be changed; keys of 8 bits, raw."""
    heads = np.random.default_rng(4).integers(0, 65536, 64)
    key = Entry(RAW, payload=strategies.pack_rows(heads >> 7 & 255, 8))
    rest = Entry(RAW, payload=strategies.pack_rows(heads >> 15 << 7 | heads & 127, 8))
    for name, value in change.items():
        plane, field = name.split("_", 1)
        setattr(key if plane == "key" else rest, field, value)
    return strategies.chunk_record([key, rest], 2, 2, heads.astype("<u2").tobytes()), heads.astype("<u2").tobytes()


FLOAT_FLAWS = {
    "joined differ": {"rest_joined": 1},
    "joined 3": {"key_joined": 3, "rest_joined": 3},
    "joined 255": {"key_joined": 255, "rest_joined": 255},
    "sign mode 3": {"rest_flags": 6},
    "sign mode of the key": {"key_flags": 2},
    "payload of another mode": {"rest_flags": 2},
    "shared raw": {"rest_flags": 1},
}


@pytest.mark.parametrize("flaw", FLOAT_FLAWS)
def test_flawed_heads_are_refused(flaw):
    record, data = _float_record()
    _both(record, 64, 2, data)
    record, _ = _float_record(**FLOAT_FLAWS[flaw])
    assert refused(record, 64, 2)
    if "shared" not in flaw:
        # Constants have no payload that could be of a wrong length.
        changes = {name: value for name, value in FLOAT_FLAWS[flaw].items() if "flags" in name or "joined" in name}
        constants = {"key": Entry(CONSTANT), "rest": Entry(CONSTANT)}
        for name, value in changes.items():
            setattr(constants[name.split("_")[0]], name.split("_")[1], value)
        record = strategies.chunk_record(list(constants.values()), 2, 2, bytes(128))
        assert refused(record, 64, 2) or flaw == "payload of another mode"


@pytest.mark.parametrize("codec", [RAW, ZSTANDARD])
def test_wide_keys_have_no_narrow_codec(codec):
    payload = bytes(64) if codec == RAW else strategies.zstandard.ZstdCompressor().compress(bytes(64))
    entries = [Entry(codec, 1, payload=payload), Entry(CONSTANT, 1)]
    record = strategies.chunk_record(entries, 2, 2, bytes(128))
    assert fate(decode_slowly, record, 64, 2) == "corrupt"
    assert fate(decode, record, 64, 2) == "corrupt"


def test_zstandard_symbols_must_fit_their_plane():
    compress = strategies.zstandard.ZstdCompressor().compress
    for wide, bits, plane in ((128, 7, 1), (127, 7, 1), (255, 8, 0)):
        symbols = bytes(63) + bytes([wide])
        data = np.zeros(64, "<u2")
        data[63] = wide & 127 if plane else wide << 7
        narrow = Entry(ZSTANDARD, payload=compress(symbols))
        entries = [Entry(CONSTANT), narrow] if plane else [narrow, Entry(CONSTANT)]
        entries[1].flags = 2
        record = strategies.chunk_record(entries, 2, 2, data.tobytes())
        if wide >> bits:
            assert refused(record, 64, 2)
        else:
            _both(record, 64, 2, data.tobytes())


@pytest.mark.parametrize("codec", [HUFFMAN, RANS])
def test_tables_of_a_narrow_plane_must_fit_it(codec):
    table = {0: 1, 128: 1} if codec == HUFFMAN else {0: 4095, 128: 1}
    for top, expected in ((128, "corrupt"), (127, bytes(128))):
        fitting = {0: table[0], top: table[128]}
        rest = _entropy([0] * 64, codec, fitting, flags=2)
        record = strategies.chunk_record([Entry(CONSTANT), rest], 2, 2, bytes(128))
        assert fate(decode_slowly, record, 64, 2) == expected
        assert fate(decode, record, 64, 2) == expected


@pytest.mark.parametrize("codec", [HUFFMAN, RANS])
def test_windows_must_fit_their_plane(codec):
    for base, top, good in ((1793, 254, True), (1794, 254, False), (0, 255, False), (2046, 1, True), (2047, 1, False)):
        table = {0: 1, top: 1} if codec == HUFFMAN else {0: 1, top: 4095}
        key = _entropy([0] * 64, codec, table, w=11, base=base)
        record = strategies.chunk_record([key] + [Entry(CONSTANT)] * 7, 5, 8, bytes(512))
        expected = bytes(512) if good else "corrupt"
        assert fate(decode_slowly, record, 64, 8) == expected
        assert fate(decode, record, 64, 8) == expected


@pytest.mark.parametrize("first", [HUFFMAN, RANS])
@pytest.mark.parametrize("between", [None, RAW, CONSTANT, HUFFMAN, RANS])
@pytest.mark.parametrize("last", [HUFFMAN, RANS])
def test_a_shared_table_is_the_nearest_earlier_one(first, between, last):
    sizes = strategies.group_sizes((1 if between is None else 2) * strategies.GROUP + 1)
    tables = {HUFFMAN: {0: 1, 200: 1}, RANS: {0: 4090, 200: 6}}
    blocks, data = [], b""
    for codec, n in zip((first, between), sizes[:-1], strict=False):
        symbols = np.zeros(n, np.int64)
        if codec == RAW:
            blocks.append(Entry(RAW, payload=bytes(n)))
        elif codec == CONSTANT:
            blocks.append(Entry(CONSTANT))
        else:
            blocks.append(_entropy(symbols, codec, tables[codec], segments=2))
        data += bytes(n)
    tail = [0, 200, 0, 0, 200] + [0] * (sizes[-1] - 5)
    blocks.append(_entropy(tail, last, tables[last], flags=1, segments=2))
    data += bytes(tail)
    record = strategies.chunk_record(blocks, 1, 1, data)
    nearest = between if between in (HUFFMAN, RANS) else first
    expected = data if nearest == last else "corrupt"
    assert fate(decode, record, len(data), 1) == expected
    assert fate(decode_slowly, record, len(data), 1) == expected


def test_tables_are_not_shared_across_planes():
    symbols = [0, 200, 0, 0]
    blocks = [_entropy(symbols, HUFFMAN, {0: 1, 200: 1}), _entropy(symbols, HUFFMAN, {0: 1, 200: 1}, flags=1)]
    record = strategies.chunk_record(blocks, 1, 2, np.repeat(np.array(symbols, np.uint8), 2).tobytes())
    assert fate(decode, record, 4, 2) == "corrupt"
    assert fate(decode_slowly, record, 4, 2) == "corrupt"


@pytest.mark.parametrize("codec", [CONSTANT, HUFFMAN, RANS])
def test_whole_elements_have_no_symbols(codec):
    entry = Entry(CONSTANT) if codec == CONSTANT else _entropy([0] * 80, codec, {0: 1, 1: 1} if codec == 3 else {0: 1, 1: 4095})
    record = strategies.chunk_record([entry], 0, 2, bytes(80))
    assert fate(decode, record, 40, 2) == "corrupt"
    assert fate(decode_slowly, record, 40, 2) == "corrupt"


def test_a_chunk_is_only_what_was_asked_for():
    chunk = strategies.random_chunk(np.random.default_rng(0), 1, 2, 100, Taste(codecs=(RAW,)), run=3, chunk=2)
    assert decode(chunk.record, 100, 2, 3, 2) == chunk.data
    for elements, width, run, index in ((100, 2, 4, 2), (100, 2, 3, 1), (99, 2, 3, 2), (101, 2, 3, 2), (200, 1, 3, 2)):
        assert fate(decode, chunk.record, elements, width, run, index) == "corrupt"


def _head_flaws(record):
    def put(at, value, form="<B"):
        changed = bytearray(record)
        struct.pack_into(form, changed, at, value)
        return bytes(changed)

    yield "magic", put(3, ord("m")), "corrupt"
    for delta in (-16, 16, -1, 8, 1 << 40):
        yield f"length {delta:+}", put(16, len(record) + delta, "<Q"), "corrupt"
    yield "length 2^64 - 1", put(16, 2**64 - 1, "<Q"), "corrupt"
    for name, at in (("run", 24), ("chunk", 28), ("elements", 32)):
        yield name, put(at, record[at] ^ 1, "<I"), "corrupt"
    for split, kind in ((0, "corrupt"), (2, "corrupt"), (4, "corrupt"), (6, "unsupported"), (255, "unsupported")):
        yield f"split {split}", put(36, split), kind
    for width in (0, 1, 3, 4, 16):
        yield f"width {width}", put(37, width), "corrupt"
    for transform in reference._NAMED:  # there is no header of one
        yield f"transform {transform}", put(38, transform), "corrupt"
    for transform in (reference.UNCHANGED + 1, 127, 255):
        yield f"transform {transform}", put(38, transform), "unsupported"
    for inputs in (1, 2, 4):
        yield f"{inputs} inputs and no delta", put(39, inputs), "corrupt"
    yield "unchanged", put(38, reference.UNCHANGED), "corrupt"
    for inputs in (5, 128, 255):
        yield f"inputs {inputs}", put(39, inputs), "unsupported"
    yield "decoded sum", put(40, record[40] ^ 1), "corrupt"
    yield "reserved field of an entry", put(48 + 14, 1), "corrupt"
    yield "sixteen bytes more", put(16, len(record) + 16, "<Q") + bytes(16), "corrupt"
    yield "padding", record[:-1] + b"\1", "corrupt"


def _padded_record():
    chunk = strategies.random_chunk(np.random.default_rng(1), 1, 2, 100, Taste(codecs=(RAW,)))
    return chunk


@pytest.mark.parametrize("flaw", [n for n, *_ in _head_flaws(_padded_record().record)])
def test_flawed_heads_of_records_are_refused(flaw):
    chunk = _padded_record()
    assert chunk.record[-1] == 0
    record, kind = next((r, k) for n, r, k in _head_flaws(chunk.record) if n == flaw)
    record = record[:8] + strategies.rechecked(record)[8:]
    assert fate(decode_slowly, record, 100, 2) == kind
    assert fate(decode, record, 100, 2) == kind


def test_padding_before_wide_payloads_is_needed_and_zero():
    data = np.random.default_rng(2).integers(0, 256, 16384, np.uint8).tobytes()
    record = strategies.chunk_record([Entry(RAW, payload=data)], 1, 1, data)
    _both(record, 16384, 1, data)
    assert record[128 : 128 + 16] == data[:16]
    bad = bytearray(record)
    bad[100] = 1
    near = strategies.checked(record[16:64] + data + bytes(-len(data) % 16))
    near = strategies.rechecked(near[:16] + struct.pack("<Q", len(near)) + near[24:])
    for flawed in (strategies.rechecked(bad), near):
        assert fate(decode, flawed, 16384, 1) == "corrupt"
        assert fate(decode_slowly, flawed, 16384, 1) == "corrupt"


# ---- damage


def _small_records():
    """Small records of all codecs and splits: name, chunk."""
    rng = np.random.default_rng(7)
    yield "bf16", strategies.random_chunk(rng, 2, 2, 45, Taste(codecs=(HUFFMAN,), escape=1, most_symbols=6))
    yield "f64", strategies.random_chunk(rng, 5, 8, 40, Taste(codecs=(RANS, CONSTANT, ZSTANDARD), escape=1, most_symbols=4))
    yield "planes", strategies.random_chunk(rng, 1, 2, 33, Taste(codecs=(RANS, HUFFMAN), escape=1, most_symbols=9))
    yield "f16", strategies.random_chunk(rng, 3, 2, 200, Taste(codecs=(RAW, ZSTANDARD)))
    yield "bytes", strategies.random_chunk(rng, 0, 4, 20, Taste())
    for kind, number in KINDS.items():
        taste = Taste(codecs=(RAW, CONSTANT))
        drawn = (strategies.random_transform(np.random.default_rng(seed), number, 60, taste)[0] for seed in range(1, 40))
        # Of a vocabulary the smallest: one of 256 values, most of which none of 60 codes names, would hide what flips do.
        yield kind, min(drawn, key=lambda c: len(c.record)) if kind == "vocabulary" else next(drawn)


RECORDS = dict(_small_records())


@pytest.mark.parametrize("name", RECORDS)
def test_truncation_at_every_byte_is_an_error(name):
    chunk = RECORDS[name]
    for n in range(len(chunk.record)):
        part = chunk.record[:n]
        if n >= 16:
            part = part[:8] + strategies.rechecked(part)[8:]
            part = part[:16] + (struct.pack("<Q", n) + part[24:] if n >= 24 else part[16:])
            part = part[:8] + strategies.rechecked(part)[8:]
        with pytest.raises(CorruptError):
            decode(part, chunk.elements, chunk.width, 0, 0, chunk.base)
        with pytest.raises(CorruptError):
            decode(chunk.record[:n], chunk.elements, chunk.width, 0, 0, chunk.base)


def _flips(record, first):
    for bit in range(8 * first, 8 * len(record)):
        flipped = bytearray(record)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bit, flipped


@pytest.mark.parametrize("name", RECORDS)
def test_every_flipped_bit_is_seen(name):
    chunk = RECORDS[name]
    for bit, flipped in _flips(chunk.record, 0):
        with pytest.raises(CorruptError):
            decode(flipped, chunk.elements, chunk.width, 0, 0, chunk.base)
        if bit % 16 == 0:
            assert fate(decode_slowly, flipped, chunk.elements, chunk.width, 0, 0, chunk.base) == "corrupt"


def alike(ours, theirs, at, chunk):
    """Whether two fates are the same. With another split, transform or number of elements entries stand elsewhere, and
    break several rules, of which either may be met first."""
    classed = chunk.record[38] in (KINDS["delta"], KINDS["records"])
    elsewhere = at in (36, 38) or (chunk.record[38] and 48 <= at < (144 if classed else 112))
    return ours == theirs or (elsewhere and {ours, theirs} == {"corrupt", "unsupported"})


@pytest.mark.parametrize("name", RECORDS)
def test_every_flipped_bit_behind_a_right_check_is_judged_alike(name):
    """The record's check is made right, so that the inner rules decide, and `decoded_sum` in the end."""
    chunk = RECORDS[name]
    unseen = 0
    for bit, flipped in _flips(chunk.record, 16):
        record = strategies.rechecked(flipped)
        ours = fate(decode, record, chunk.elements, chunk.width, 0, 0, chunk.base)
        assert ours in ("corrupt", "unsupported", chunk.data), bit
        theirs = fate(decode_slowly, record, chunk.elements, chunk.width, 0, 0, chunk.base)
        assert alike(ours, theirs, bit // 8, chunk), bit
        unseen += ours == chunk.data
    assert unseen < 8 * len(chunk.record) // 2  # padding symbols only


@pytest.mark.parametrize("name", RECORDS)
def test_without_sums_both_decoders_decide_and_decode_alike(name, monkeypatch):
    """With both sums switched off nothing hides what the inner rules let pass."""
    chunk = RECORDS[name]
    no_sums(monkeypatch)
    record = chunk.record[:8] + bytes(8) + chunk.record[16:40] + bytes(8) + chunk.record[48:]
    assert decode(record, chunk.elements, chunk.width, 0, 0, chunk.base) == chunk.data
    passed = 0
    for bit, flipped in _flips(record, 48):
        ours = fate(decode, flipped, chunk.elements, chunk.width, 0, 0, chunk.base)
        theirs = fate(decode_slowly, flipped, chunk.elements, chunk.width, 0, 0, chunk.base)
        assert alike(ours, theirs, bit // 8, chunk), bit
        passed += isinstance(ours, bytes)
    assert passed


@given(st.sampled_from(SPLITS), st.integers(1, 3000), st.integers(0, 2**32 - 1))
def test_without_sums_random_damage_is_judged_alike(kind, elements, seed):
    split, width = kind
    rng = np.random.default_rng(seed)
    _damage(rng, strategies.random_chunk(rng, split, width, elements))


@given(st.integers(1, 3000), st.integers(0, 2**32 - 1))
def test_without_sums_random_damage_of_deltas_is_judged_alike(elements, seed):
    rng = np.random.default_rng(seed)
    _damage(rng, strategies.random_transform(rng, KINDS["delta"], elements)[0])


def _damage(rng, chunk):
    elements, width = chunk.elements, chunk.width
    with pytest.MonkeyPatch.context() as monkeypatch:
        no_sums(monkeypatch)
        for _ in range(12):
            record = bytearray(chunk.record)
            record[8:16] = record[40:48] = bytes(8)
            first, blocks = strategies.blocks_of(record)
            entries = first + 16 * blocks
            low, high = [(48, entries), (entries, len(record)), (entries, min(len(record), entries + 200))][rng.integers(3)]
            for _ in range(int(rng.integers(1, 4))):
                at = int(rng.integers(low, high)) if low < high else 48
                record[at] = int(rng.choice([0, 1, 255, record[at] ^ 1 << int(rng.integers(8)), int(rng.integers(256))]))
            ours, theirs = (fate(d, record, elements, width, 0, 0, chunk.base) for d in (decode, decode_slowly))
            # Of several broken rules either may be met first.
            assert ours == theirs or {ours, theirs} == {"corrupt", "unsupported"}


# ---- bounds


SELECTED = (
    "test_all_that_the_format_allows_is_decoded or test_flawed or test_windows or test_without_sums or test_truncation or "
    "test_all_transforms_that_the_format_allows or test_deltas or test_unused_bits_of_the_mask or test_another_base or "
    "test_the_blocks_without_flaw_are_accepted or (test_small_chunks_round_trip and 16-2-default)"
)


def prove_that_numba_checks_bounds():
    """Raise unless an index past the end raises in a kernel of tzip's own make."""

    def beyond(values, at):
        return values[at]

    with pytest.raises(IndexError):
        kernel(beyond)(np.zeros(4, np.uint8), 4)


def test_kernels_stay_within_bounds(tmp_path):
    """A part of this file again, with numba's bounds checks; kernels compiled without them must not come from a cache.

    For a CPU without extensions, so that the loops for every machine are seen, whatever this one has.
    """
    cache = tmp_path / "cache"
    plain = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    # Little optimised: what is compiled here runs once, and compiling is most of the time (164 -> 146 s).
    environment = os.environ | plain | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(cache), "NUMBA_OPT": "1"}
    for command in (
        ["-c", "import test_chunks; test_chunks.prove_that_numba_checks_bounds()"],
        ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", SELECTED],
    ):
        result = subprocess.run(
            [sys.executable, *command],
            env=environment, capture_output=True, text=True, timeout=500, check=False, cwd=Path(__file__).parent,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    compiled = {p.name.split(".")[0] for p in cache.rglob("*.nbi")}
    assert {"huffman", "rans", "rows", "planes", "delta"} <= compiled


@pytest.mark.parametrize("row", [2, 3, 4])
def test_rows_too_many_for_a_string_are_not_sorted(row):
    """Rows of very different scale are worth sorting even when they are short; more than 2^18 have no place."""
    rng = np.random.default_rng(row)
    scale = np.exp2(rng.integers(-60, 60, ((1 << 20) // row, 1)))
    raw = (scale * rng.uniform(1, 1.0001, (scale.size, row))).astype(np.float32).reshape(-1).view(np.uint8).copy()
    encoded = encode_chunk(raw, 4, "f32", LEVELS["best"], 0, 0, row, 0)
    buffer = np.concatenate((np.frombuffer(encoded.record, np.uint8), np.zeros(SLACK, np.uint8)))
    out = np.empty(raw.size, np.uint8)
    decode_chunk(buffer, len(encoded.record), 0, 0, raw.size // 4, 4, out)
    assert np.array_equal(out, raw)
    assert (reference.read_chunk_head(bytes(encoded.record)).transform == 6) == (row == 4)


@pytest.mark.parametrize("level", ["fast", "default"])
def test_a_group_with_a_table_of_its_own_keeps_zeros_that_its_sample_lacks(level):
    """Key 0 has a byte for its share of the chunk; a group whose sample has no zero may still hold some."""
    rng = np.random.default_rng(4)
    values = rng.standard_normal(1 << 20).astype(np.float32)
    values[: 3 << 18][rng.random(3 << 18) < 0.01] = 0  # too few for a mask
    values[3 << 18 :] *= np.float32(2.0**-8)
    words = (values.view(np.uint32) >> 16).astype(np.uint16)
    words[(3 << 18) + 1000 * np.arange(1, 40)] = 0
    last = words[3 << 18 :]
    for at in np.flatnonzero(last == 0):  # those that the sample would see
        before = counting.key_counts(last, planes.BF16.head, 0, 16)[0]
        last[at] = 0x3C00
        if counting.key_counts(last, planes.BF16.head, 0, 16)[0] == before:
            last[at] = 0
    assert counting.key_counts(last, planes.BF16.head, 0, 16)[0] == 0
    assert np.count_nonzero(last == 0) > 9
    raw = words.view(np.uint8)
    encoded = encode_chunk(raw, 2, "bf16", LEVELS[level], 0, 0)
    buffer = np.concatenate((np.frombuffer(encoded.record, np.uint8), np.zeros(SLACK, np.uint8)))
    out = np.empty(raw.size, np.uint8)
    decode_chunk(buffer, len(encoded.record), 0, 0, raw.size // 2, 2, out)
    assert np.array_equal(out, raw)


@pytest.mark.parametrize("level", ["fast", "default"])
@pytest.mark.parametrize(("coding", "width"), [("bf16", 2), ("f16", 2), ("f32", 4)])
def test_usual_records_with_a_wrong_sum_are_refused(coding, width, level):
    """Those that are decoded at once: nothing but a sum is wrong."""
    values = strategies.array("normal", 1 << 14, width, coding)
    raw = np.ascontiguousarray(values).view(np.uint8)
    record = bytes(encode_chunk(raw, width, coding, LEVELS[level], 0, 0).record)
    assert decode(record, 1 << 14, width) == raw.tobytes()
    for at in (40, 47):
        wrong = record[:at] + bytes([record[at] ^ 1]) + record[at + 1 :]
        with pytest.raises(CorruptError):
            decode(strategies.rechecked(wrong), 1 << 14, width)
    wrong = record[:8] + bytes([record[8] ^ 1]) + record[9:]
    with pytest.raises(CorruptError):
        decode(wrong, 1 << 14, width)
