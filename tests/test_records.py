"""Records coded by one call: what it decodes is what the blocks say, what it encodes is what they would have been."""

import ctypes
import mmap
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import strategies
from strategies import GROUP, HUFFMAN, RANS, RAW, Entry, Taste
from test_chunks import decode_slowly, fate

from tzip import chunks, encoding, plan
from tzip.chunks import SLACK, decode_chunk
from tzip.coders import planes, record_planner, transforms
from tzip.coders.huffman import HuffmanTable
from tzip.coders.planes import PLANES, Window
from tzip.coders.predictors import LOW_RANK
from tzip.coders.rans import RansTable
from tzip.coders.record_encoder import encode_record
from tzip.coders.sums import sum64
from tzip.plan import LEVELS, KeyPlan

# Split, joined bits, sign mode: rests of 8, 5, 7 and 6 bits, elements of both widths. Each is a kernel to compile.
SHAPES = [(2, 0, 0), (2, 2, 1), (3, 3, 2), (4, 2, 0)]
SPECIAL = {
    1: [0, 1, 2, 3, 4, 127, 128, 254, 255],
    2: [0, 1, 255, 65535],
    4: [0, 1, 32, 8192, 8193, 16384, 2**17, 2**18, 2**31 - 1, 2**31, 2**32 - 4, 2**32 - 1],
}


def guarded(size, held):
    """Bytes that end where no one may read or write (on Linux; elsewhere just bytes)."""
    if sys.platform != "linux":
        return np.empty(size, np.uint8)
    page = mmap.PAGESIZE
    room = mmap.mmap(-1, (-(-size // page) + 1) * page)
    whole = np.frombuffer(room, np.uint8)
    end = whole.size - page
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(whole.ctypes.data + end), page, 0) == 0
    held.append(room)
    return whole[end - size : end]


class Both:
    """Decodes records at once and block by block, rubbish behind them and in the output, at the end of what may be read."""

    def __init__(self, most_stored, most_decoded):
        self.held = []
        self.stored = guarded(most_stored + SLACK, self.held)
        self.decoded = guarded(most_decoded, self.held)

    def arguments(self, record, elements, width, rubbish):
        buffer = self.stored[self.stored.size - len(record) - SLACK :]
        buffer[: len(record)] = np.frombuffer(record, np.uint8)
        buffer[len(record) :] = 0xA5
        out = self.decoded[self.decoded.size - elements * width :]
        out[:] = rubbish
        return buffer, len(record), 0, 0, elements, width, out

    def at_once(self, record, elements, width):
        """Whether the output counts, and the output."""
        buffer, *rest, out = self.arguments(record, elements, width, 0x5A)
        buffer = buffer.view()
        buffer.flags.writeable = False
        return chunks._at_once(buffer, *rest, out, None), out

    def by_blocks(self, record, elements, width):
        arguments = self.arguments(record, elements, width, 0x3C)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chunks, "decode_record", lambda *_: False)
            decode_chunk(*arguments)
        return arguments[-1].tobytes()


def usual(rng, split, joined, mode, elements, codec):
    """A record whose keys are all in that codec, tables and segments as the text allows them, and all else raw."""
    e, m, _ = strategies.HEADS[split]
    width = strategies.WIDTHS[split][0]
    sizes = strategies.group_sizes(elements)
    taste = Taste(most_segments=int(rng.choice([1, 2, 4, 5, 255])), most_symbols=int(rng.choice([2, 40, 128, 130, 256])))
    keys, planes_, shared = [], [[] for _ in range(width)], None
    for n in sizes:
        entry, symbols, shared = strategies._entropy_block(rng, codec, n, e + joined, taste, shared)
        keys.append(replace(entry, joined=joined))
        planes_[0].append(symbols)
    w = m - joined + (mode == 0)
    for n in sizes:
        planes_[1].append(rng.integers(0, 1 << w, n))
        keys.append(Entry(RAW, joined, flags=mode << 1, payload=strategies.pack_rows(planes_[1][-1], w)))
    for plane in planes_[2:]:
        plane += [rng.integers(0, 256, n) for n in sizes]
        keys += [Entry(RAW, payload=part.astype(np.uint8).tobytes()) for part in plane]
    data = b"".join(strategies._merge([p[g] for p in planes_], split, joined, mode) for g in range(len(sizes)))
    return strategies.Chunk(strategies.chunk_record(keys, split, width, data), data, split, width)


def fields_of(record, chunk, codec):
    """Where the fields of a record are: (byte, size), by what they are."""
    groups = -(-chunk.elements // GROUP)
    at = 48 + 16 * groups * chunk.width
    found = {kind: [] for kind in ("entry", "escape", "count", "state", "table", "stream", "pad", "rest")}
    for i in range(groups * chunk.width):
        e = 48 + 16 * i
        stored, escapes = struct.unpack_from("<II", record, e + 4)
        start = at + -at % (128 if stored >= 16384 else 16)
        found["entry"] += [(e + k, 1) for k in (0, 1, 2, 3, 12, 14, 15)] + [(e + k, 4) for k in (4, 8, 12)]
        found["pad"] += [(k, 1) for k in range(at, start)]
        at = start + stored
        if i >= groups:
            found["rest"].append((start + stored // 2, 1))
            continue
        found["escape"] += [(start + 4 * k, 4) for k in range(escapes)]
        start += 4 * escapes
        segments, size, many = record[e + 2], *((4, 1) if codec == RANS else (2, 32))
        found["count"] += [(start + size * k, size) for k in range(many * segments)]
        start += size * many * segments
        if codec == RANS:
            found["state"] += [(start + 4 * k, 4) for k in range(32 * segments)]
            start += 128 * segments
        found["table"] += [(k, 1) for k in range(start, min(at, start + 30))]
        found["stream"] += [(k, 1) for k in range(min(at, start + 30), at, 5)]
    found["pad"] += [(k, 1) for k in range(at, len(record))]
    return {kind: places for kind, places in found.items() if places}


def mutant(rng, chunk, codec, fields):
    """The record with a field or two changed, two of a kind in balance, all heads alike, or another length or size."""
    record, elements = bytearray(chunk.record), chunk.elements
    for _ in range(int(rng.choice([1, 1, 2]))):
        kind = str(rng.choice([*fields, "balance", "balance", "head", "length", "elements"]))
        if kind == "balance":
            places = fields[str(rng.choice([k for k in ("count", "table") if k in fields]))]
            for step in int(rng.choice([1, 2, 16])) * np.array([1, -1]):
                at, size = places[int(rng.integers(len(places)))]
                old = int.from_bytes(record[at : at + size], "little")
                record[at : at + size] = ((old + int(step)) % (1 << 8 * size)).to_bytes(size, "little")
        elif kind == "head":
            end = 48 + 32 * -(-elements // GROUP)
            field = 48 + int(rng.integers(4))
            record[field:end:16] = bytes([int(rng.integers(9))]) * len(record[field:end:16])
        elif kind == "length":
            record = record[:-16] if rng.random() < 0.5 else record + bytes(16)
            record[16:20] = struct.pack("<I", len(record))
        elif kind == "elements":
            elements = max(1, chunk.elements + int(rng.choice([-32, -1, 1, 32])))
            record[32:36] = struct.pack("<I", elements)
        else:
            at, size = fields[kind][int(rng.integers(len(fields[kind])))]
            neighbour = int.from_bytes(record[at : at + size], "little") + int(rng.choice([-32, -16, -2, -1, 1, 2, 4, 128]))
            value = int(rng.choice([int(rng.choice(SPECIAL[size])), neighbour, int(rng.integers(1 << 8 * size))]))
            record[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(record[: len(chunk.record) + 32]), elements


def right(both, record, elements, width, slowly):
    """Whether one call decodes the record, its sums repaired; then it must have the bytes that the blocks have."""
    _, out = both.at_once(strategies.rechecked(record), elements, width)
    # The sum of whatever came out: now only the rules can refuse it.
    record = strategies.rechecked(record[:40] + sum64(out).to_bytes(8, "little") + record[48:])
    accepted, out = both.at_once(record, elements, width)
    if accepted:
        decoded = out.tobytes()
        assert both.by_blocks(record, elements, width) == decoded
        assert not slowly or fate(decode_slowly, record, elements, width) == decoded
    return accepted


@pytest.mark.parametrize("codec", [HUFFMAN, RANS])
@pytest.mark.parametrize(("split", "joined", "mode"), SHAPES)
def test_one_call_accepts_only_what_is_right(split, joined, mode, codec):
    rng = np.random.default_rng([split, joined, mode, codec])
    both = Both(1 << 21, 1 << 21)
    taken = 0
    for turn in range(10):
        most = [4, 20, 100, 300, 20, 4][turn % 6]
        elements = int(rng.integers(1, most)) * 32 - (codec == HUFFMAN) * int(rng.integers(32)) + (turn == 9) * GROUP
        chunk = usual(rng, split, joined, mode, elements, codec)
        assert right(both, chunk.record, elements, chunk.width, slowly=turn < 9)
        assert both.at_once(chunk.record, elements, chunk.width)[1].tobytes() == chunk.data
        fields = fields_of(chunk.record, chunk, codec)
        for _ in range(150 if turn < 9 else 30):
            record, n = mutant(rng, chunk, codec, fields)
            taken += right(both, record, n, chunk.width, slowly=n < 200)
    assert 50 < taken < 1000  # such as lower mantissa bits


# ---- encoding


def same_as_by_blocks(raw, width, coding, level):
    """Whether the record was made by one call; it must be that of the blocks."""
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "plan_record", lambda *_: None)
        at_once = encoding._at_once
        patch.setattr(encoding, "_at_once", lambda *a: made.append(at_once(*a)) or made[-1])
        first = encoding.encode_chunk(raw, width, coding, level, 3, 2)
        patch.setattr(encoding, "_at_once", lambda *_: None)
        second = encoding.encode_chunk(raw, width, coding, level, 3, 2)
    assert bytes(first.record) == bytes(second.record)
    assert first.codecs == second.codecs
    return bool(made and made[0])


@pytest.mark.parametrize("level", ["fast", "default"])
@pytest.mark.parametrize(("coding", "width"), [("bf16", 2), ("f16", 2), ("f32", 4)])
def test_one_call_encodes_what_the_blocks_are(coding, width, level):
    taken = 0
    for i, n in enumerate((8192, 12289, 65535, 65536 + 33, GROUP - 1, GROUP + 4097, 2 * GROUP)):
        for kind in ("normal", "outliers", "positive", ("negative", "nan", "sparse")[i % 3]):
            raw = strategies.array(kind, n, width, coding, i)
            taken += same_as_by_blocks(raw, width, coding, LEVELS[level])
    assert taken >= 7


def of_several_scales(coding, width, n, seed):
    """Elements whose groups are so different that some of them want tables of their own."""
    scales = 2.0 ** np.random.default_rng(seed).integers(-4, 5, len(strategies.group_sizes(n)))
    values = strategies.array("normal", n, width, coding, seed).view(f"<u{width}")
    shift = {"bf16": 7, "f16": 10, "f32": 23}[coding]
    for i, (begin, size) in enumerate(zip(range(0, n, strategies.group_sizes(n)[0]), strategies.group_sizes(n), strict=True)):
        part = values[begin : begin + size]
        exponent = part >> shift & (31 if coding == "f16" else 255)
        fits = (exponent > 6) & (exponent < (24 if coding == "f16" else 240))
        part[fits] += part.dtype.type(int(np.log2(scales[i])) % (1 << 8 * width - shift) << shift & (1 << 8 * width) - 1)
    return values.view(np.uint8)


@pytest.mark.parametrize("level", ["fast", "default"])
@pytest.mark.parametrize(("coding", "width"), [("bf16", 2), ("f16", 2), ("f32", 4)])
def test_plans_of_one_kernel_are_those_of_every_step(coding, width, level, monkeypatch):
    planned, whole = [], encoding.plan_record
    monkeypatch.setattr(encoding, "plan_record", lambda *a: planned.append(whole(*a)) or planned[-1])
    tables = set()
    for i, n in enumerate((32768, 40_000, 65536, GROUP + 20_000, 2 * GROUP, 3 * GROUP + 30_000)):
        for kind in ("normal", "outliers", "positive", ("negative", "nan", "sparse")[i % 3], "scales", "random"):
            if kind == "scales":
                raw = of_several_scales(coding, width, n, i)
            else:
                raw = strategies.array(kind, n, width, coding, i)
            first = encoding.encode_chunk(raw, width, coding, LEVELS[level], 3, 2)
            made = planned[-1] if planned else None
            if made is not None and made.kind is not None:
                tables.add((len(made.plan), *made.plan[:, 1].tolist()))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(encoding, "plan_record", lambda *_: None)
                second = encoding.encode_chunk(raw, width, coding, LEVELS[level], 3, 2)
            assert bytes(first.record) == bytes(second.record), (kind, n)
    usual = [p for p in planned if p.kind is not None]
    assert len(usual) > 10
    assert len(usual) < len(planned)
    # One table for all groups, and more than one.
    assert {len(set(used)) for _, *used in tables} >= {1, 2}


@pytest.mark.parametrize(("coding", "level", "tier", "kind", "name"), [
    ("bf16", "default", "avx512", record_planner.NARROW_KEYS, "encoders"),
    ("f16", "default", "avx512", record_planner.WIDE_KEYS, "wide_encoders"),
    ("bf16", "default", "avx2", record_planner.YMM, "divisors"),
    ("bf16", "default", "portable", record_planner.SCALAR, "wide_divisors"),
    ("bf16", "fast", "portable", record_planner.PAIRS, "pairs"),
    ("f16", "fast", "portable", record_planner.CODES, "codes"),
])  # fmt: skip
def test_plans_hold_the_tables_that_encoders_look_up(coding, level, tier, kind, name, monkeypatch):
    """Those of vector units, too, that this machine does not have."""
    monkeypatch.setattr(record_planner, "tier", lambda: tier)
    split, n = {"bf16": planes.BF16, "f16": planes.F16}[coding], 2 * GROUP + 20_000
    words = of_several_scales(coding, 2, n, 5).view("<u2")
    if kind == record_planner.WIDE_KEYS:
        rng = np.random.default_rng(0)
        words = (rng.standard_normal(n) * 2.0 ** (rng.integers(-13, 13, n) * (rng.random(n) < 0.1))).astype("<f2").view("<u2")
    size = strategies.group_sizes(n)[0]
    made = record_planner.plan_record(words, split, size, plan.rules_of(n, size, split.head, LEVELS[level]))
    assert made.kind == kind
    tables = RansTable if level == "default" else HuffmanTable
    numbered = made.plan[:, 1].tolist()
    for i, (_, number, shared, at, length, _, filler, lowest) in enumerate(made.plan.tolist()):
        table = tables(made.lengths[number].copy())
        assert np.array_equal(made.look_up[number], getattr(table, name))
        assert (filler, lowest) == (table.filler, table.lowest)
        assert shared == (i > 0 and numbered[i - 1] == number)
        assert made.stored[at : at + length].tobytes() == (b"" if shared else table.stored)


def test_plans_do_not_depend_on_what_lies_behind_their_counts(monkeypatch):
    """Rests without signs have fewer than 256 counts: a kernel read on, and the same bytes gave one archive or another."""
    rng = np.random.default_rng(0)
    raw = (rng.integers(118, 123, 1 << 15) << 7 | np.minimum(*rng.integers(0, 128, (2, 1 << 15)))).astype("<u2").view(np.uint8)
    monkeypatch.setattr(encoding, "plan_record", lambda *_: None)
    looks, records = plan.looks_dense, set()
    for rubbish in (0, 1 << 20):
        behind = np.full(256, rubbish)
        monkeypatch.setattr(plan, "looks_dense", lambda c, *a, b=behind: looks(np.append(c, b)[: c.size], *a))
        records.add(bytes(encoding.encode_chunk(raw, 2, "bf16", LEVELS["fast"], 0, 0).record))
    assert len(records) == 1


def random_plans(rng, groups, head, joined, codec):
    """Keys in windows and tables that no plan of ours would choose, some tables shared."""
    bits, plans = head.exponent + joined, []
    for _ in range(groups):
        if plans and rng.random() < 0.4:
            plans.append(replace(plans[-1], shared=bool(rng.integers(2))))
            continue
        span = min(int(rng.choice([1, 2, 33, 64, 65, 128, 129, 254])), (1 << bits) - 1)
        low = int(rng.integers(1, (1 << bits) - span + 1))
        base, zero = low - 1 if bits > 8 else 0, bool(rng.integers(2))
        used = [*([0] if zero or span == 1 else []), *range(low - base, low - base + span)]
        make, kind = (strategies.random_frequencies, RansTable) if codec == RANS else (strategies.random_lengths, HuffmanTable)
        entries, table = np.zeros(256, np.int64), make(rng, used)
        entries[list(table)] = list(table.values())
        window = Window(base, low, low + span - 1, zero, int(rng.choice(used)))
        plans.append(KeyPlan(joined, codec, window, kind(entries), False))
    return plans


@pytest.mark.parametrize("codec", [HUFFMAN, RANS])
@pytest.mark.parametrize(("split", "joined", "mode"), SHAPES)
def test_one_call_encodes_by_any_plan(split, joined, mode, codec, monkeypatch):
    rng = np.random.default_rng([split, joined, mode, codec])
    kind = planes.SPLITS[split]
    monkeypatch.setattr(encoding, "DENSE", 1)
    for name in ("dense_tail", "dense_byte"):
        monkeypatch.setattr(encoding, name, lambda *_: True)
    monkeypatch.setattr(encoding, "encode_record", lambda *a: (found := encode_record(*a)) and (found[0], 0))  # pays or not
    taken = 0
    for n in (1, 31, 129, 5000, 8191, 12000, 65537, GROUP + 4096, 3 * GROUP - 1):
        sizes = strategies.group_sizes(n)
        plans = random_plans(rng, len(sizes), kind.head, joined, codec)
        keys = [rng.integers(p.window.low, p.window.high + 1, size) for p, size in zip(plans, sizes, strict=True)]
        heads = np.concatenate(keys) << (kind.head.mantissa - joined)
        heads[::30] = rng.integers(0, 65536, heads[::30].size)  # escapes, in a full group more than are decoded at once
        heads = heads & 0x7FFF | {0: rng.integers(0, 2, n), 1: 0, 2: 1}[mode] << 15
        raw = np.zeros((n, kind.width), np.uint8)
        raw[:, -1], raw[:, -2] = heads >> 8, heads & 255
        raw = raw.reshape(-1)
        whole = encoding._Plan(plans, [mode] * len(sizes), True, np.zeros((kind.width - 2, len(sizes), 256), np.int64))
        level = replace(LEVELS["default"], segment=int(rng.choice([1 << 14, 1 << 16, 1 << 17])))
        made = encoding._at_once(raw, whole, kind, level, 0, 0, sum64(raw))
        if made is None:
            continue  # far larger than the elements
        taken, record = taken + 1, bytes(made.record)
        blocks = encoding._float_blocks(raw.view(planes.WORD[kind.width]), sizes[0], kind, level, whole)
        assert record == bytes(encoding._record(kind, blocks, raw, kind.width, 0, 0, sum64(raw)).record)
        out = np.empty_like(raw)
        decode_chunk(np.frombuffer(record + bytes(SLACK), np.uint8), len(record), 0, 0, n, kind.width, out)
        assert np.array_equal(out, raw)
    assert taken > 5


def test_threads_do_not_disturb_each_other():
    kinds = [("bf16", 2, "default"), ("f32", 4, "default"), ("bf16", 2, "fast"), ("f16", 2, "default")]
    raws = [strategies.array("outliers", 100_000 + 4096 * i, kinds[i % 4][1], kinds[i % 4][0], i) for i in range(8)]

    def coded(i):
        coding, width, level = kinds[i % 4]
        record = bytes(encoding.encode_chunk(raws[i], width, coding, LEVELS[level], 0, 0).record)
        buffer = np.frombuffer(record + bytes(SLACK), np.uint8)
        out = np.empty_like(raws[i])
        decode_chunk(buffer, len(record), 0, 0, out.size // width, width, out)
        assert np.array_equal(out, raws[i])
        return record

    alone = [coded(i) for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(coded, [*range(8)] * 10)) == alone * 10


def test_long_parameters_of_a_predictor_are_coded_alike_by_both_ways() -> None:
    """Factors of low rank fill several segments of the level, and one of those that classes have."""
    rng = np.random.default_rng(6)
    old = rng.integers(0x3C00, 0x3D00, 9000, np.uint16)
    base, raw = old.view(np.uint8), (old + rng.integers(0, 9, old.size, np.uint16)).view(np.uint8)
    string = np.clip(rng.normal(128, 6, 150_000), 0, 255).astype(np.uint8)
    found, classes = transforms.from_base(raw, 2, "bf16", base, LOW_RANK, string)
    level = LEVELS["default"]
    strings = [encoding._mask_block(found.side_a, level), encoding._string_block(found.side_b, level)]
    made = encoding._classes_at_once(raw, 2, 5, 0, sum64(raw), found, strings, [c.size for c in classes])
    moved, blocks = encoding._class_blocks(found, classes, 2, level)
    assert made is not None
    assert bytes(made.record) == bytes(encoding._record(PLANES, blocks, raw, 2, 5, 0, sum64(raw), moved).record)


@pytest.mark.parametrize("coding", ["bf16", "f16", "f32", "f64", "planes"])
@pytest.mark.parametrize("n", [1, 33, 9000, 300_000])
def test_differences_coded_at_once_are_those_coded_block_by_block(coding: str, n: int) -> None:
    """Classes of every size, masks, constants, dense bytes, escapes: the same record, byte for byte, and it decodes."""
    width = {"bf16": 2, "f16": 2, "f32": 4, "f64": 8, "planes": 4}[coding]
    rng = np.random.default_rng(n + width)
    kind = {"f16": np.float16, "f64": np.float64}.get(coding, np.float32)
    checked = 0
    for step, share in ((1e-6, 1.0), (1e-3, 1.0), (1e-3, 0.02), (0.1, 0.3), (30.0, 1.0)):
        old = (rng.standard_normal(n) * 0.02).astype(kind)
        new = old + (rng.standard_normal(n) * step * (rng.random(n) < share)).astype(kind)
        a, b = (x.astype(kind) for x in (old, new))
        if coding == "bf16":
            a, b = ((x.view(np.uint32) >> 16).astype(np.uint16) for x in (a, b))
        base, raw = a.view(np.uint8), b.view(np.uint8)
        if np.array_equal(base, raw):
            continue
        found, classes = transforms.from_base(raw, width, coding, base)
        level = LEVELS["default"]
        strings = [encoding._mask_block(found.side_a, level), encoding._string_block(found.side_b, level)]
        sizes = [c.size for c in classes]
        made = encoding._classes_at_once(raw, width, 5, 0, sum64(raw), found, strings, sizes)
        moved, blocks = encoding._class_blocks(found, classes, width, level)
        wanted = encoding._record(PLANES, blocks, raw, width, 5, 0, sum64(raw), moved)
        assert made is not None
        assert bytes(made.record) == bytes(wanted.record)
        assert made.codecs == wanted.codecs
        buffer = np.zeros(len(made.record) + SLACK, np.uint8)
        buffer[: len(made.record)] = np.frombuffer(made.record, np.uint8)
        out = np.empty(raw.size, np.uint8)
        decode_chunk(buffer, len(made.record), 5, 0, n, width, out, base=base)
        assert np.array_equal(out, raw)
        checked += 1
    assert checked


@pytest.mark.parametrize("width", [1, 2, 4])
def test_planes_decoded_at_once_are_those_decoded_block_by_block(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of one's own and shared ones, constants, raw planes; and a damaged one is refused by both."""
    rng = np.random.default_rng(width)
    words = np.abs(rng.standard_normal(700_001) * 40).astype(f"<u{width}")
    words[5::40_000] = 111  # rare: escapes
    raw = words.view(np.uint8)
    encoded = encoding.encode_chunk(raw, width, "planes", LEVELS["default"], 0, 0)
    buffer = np.zeros(len(encoded.record) + SLACK, np.uint8)
    buffer[: len(encoded.record)] = np.frombuffer(encoded.record, np.uint8)
    asked = []
    real = chunks.decode_planes

    def told(*args):
        asked.append(real(*args))
        return asked[-1]

    def decoded() -> bytes:
        out = np.empty(raw.size, np.uint8)
        decode_chunk(buffer, len(encoded.record), 0, 0, words.size, width, out)
        return out.tobytes()

    with monkeypatch.context() as patch:
        patch.setattr(chunks, "decode_planes", told)
        assert decoded() == raw.tobytes()
    with monkeypatch.context() as patch:
        patch.setattr(chunks, "decode_planes", lambda *args: False)
        assert decoded() == raw.tobytes()
    assert asked == [True]
