"""What the tests are made of: hard arrays, an encoder written from FORMAT.md alone, and archives taken apart and rebuilt.

Nothing here calls an encoder of tzip: `random_chunk` makes chunk records that are valid by the text, also those that no
encoder of ours makes, and knows what they decode to without any decoder. All of it is driven by a numpy generator.
"""

from __future__ import annotations

import copy
import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from math import gcd
from typing import Any

import numpy as np
import reference
import zstandard

RAW, CONSTANT, ZSTANDARD, HUFFMAN, RANS = range(5)
PALETTE, GRID, SPARSE, DIFFERENCE, OFFSET, ROWS, DELTA, RECORDS = range(1, 9)
VOCABULARY = 12
GROUP = 1 << 18
SEGMENT = 1 << 17

# ---------------------------------------------------------------------------------------------------------------------
# Arrays

FLOAT = {"bf16": (8, 7), "f16": (5, 10), "f32": (8, 23), "f64": (11, 52)}


def _heads(width: int, coding: str, sign: Any, exponent: Any, mantissa: Any) -> np.ndarray:
    e, m = FLOAT[coding]
    word = np.dtype(f"<u{width}").type
    parts = [np.asarray(p).astype(word) for p in (sign, exponent, mantissa)]
    return parts[0] << word(e + m) | parts[1] << word(m) | parts[2] & word((1 << m) - 1)


def _as_float(values: np.ndarray, width: int, coding: str) -> np.ndarray:
    """The bits of float64 values as elements of the coding (bfloat16 by cutting off)."""
    if coding == "bf16":
        return (values.astype("<f4").view("<u4") >> np.uint32(16)).astype("<u2")
    kind = {"f16": "<f2", "f32": "<f4", "f64": "<f8"}.get(coding)
    if kind is None:
        return (values * 1000).astype(np.int64).astype(np.uint64).astype(f"<u{width}")
    return values.astype(kind).view(f"<u{width}")


def _special(rng: np.random.Generator, n: int, width: int, coding: str, kind: str) -> np.ndarray:
    e, m = FLOAT.get(coding, (max(1, width * 8 // 2 - 1), width * 4))
    coding = coding if coding in FLOAT else {2: "f16", 4: "f32", 8: "f64"}.get(width, "f16")
    if width == 1:
        return rng.integers(0, 256, n, np.uint8) & np.uint8({"nan": 0x7F, "subnormal": 0x83}.get(kind, 0xF0))
    e, m = FLOAT[coding]
    sign = rng.integers(0, 2, n)
    payload = rng.integers(0, 1 << min(m, 62), n)
    if kind == "nan":
        return _heads(width, coding, sign, np.full(n, (1 << e) - 1), payload | 1)
    if kind == "subnormal":
        return _heads(width, coding, sign, np.zeros(n, np.int64), payload)
    if kind == "infinity":
        return _heads(width, coding, sign, np.full(n, (1 << e) - 1), np.zeros(n, np.int64))
    return _heads(width, coding, sign, np.zeros(n, np.int64), np.zeros(n, np.int64))  # +0.0 and -0.0


DATA = (
    "normal", "nan", "signed_zero", "subnormal", "infinity", "equal", "positive", "negative", "zero", "random",
    "sparse", "ints", "ramp", "outliers",
)  # fmt: skip


def array(kind: str, n: int, width: int, coding: str, seed: int = 1) -> np.ndarray:
    """`n` elements of `width` bytes as uint8, of a kind named in DATA."""
    rng = np.random.default_rng([seed, n, width, DATA.index(kind)])
    word = np.dtype(f"<u{width}")
    normal = rng.normal(0, 0.02, n)
    if kind in ("normal", "positive", "negative"):
        sign = {"normal": 1, "positive": np.sign(normal), "negative": -np.sign(normal)}[kind]
        words = _as_float(normal * sign, width, coding)
    elif kind in ("nan", "subnormal", "infinity", "signed_zero"):
        words = _special(rng, n, width, coding, kind)
    elif kind == "equal":
        words = np.full(n, 0xC2B3A4958677685A & ((1 << 8 * width) - 1), word)
    elif kind == "zero":
        words = np.zeros(n, word)
    elif kind == "random":
        words = rng.integers(0, 256, n * width, np.uint8).view(word)
    elif kind == "sparse":
        words = _as_float(np.where(rng.random(n) < 0.03, normal, 0), width, coding).astype(word)
    elif kind == "ints":
        words = rng.integers(0, 100, n).astype(word)
    elif kind == "ramp":
        words = np.arange(n).astype(word)
    else:  # outliers: weights of which a few are anything at all
        words = _as_float(normal, width, coding).astype(word)
        at = rng.random(n) < 0.002
        words[at] = rng.integers(0, 256, int(at.sum()) * width, np.uint8).view(word)
    return np.ascontiguousarray(words.astype(word)).view(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Codecs, written from FORMAT.md


def pack_rows(symbols: np.ndarray, width: int) -> bytes:
    """Section 7.1, cell by cell."""
    if width == 8:
        return symbols.astype(np.uint8).tobytes()
    g = 8 // gcd(width, 8)
    b = g * width // 8
    cells = -(-symbols.size // (32 * g))
    s = np.zeros(cells * 32 * g, np.int64)
    s[: symbols.size] = symbols
    s = s.reshape(cells, g, 32)
    high = sum((s[:, j] << width * (j - b) for j in range(b, g)), np.zeros((cells, 32), np.int64))
    rows = [s[:, j] | ((high >> (8 - width) * j) & ((1 << (8 - width)) - 1)) << width for j in range(b)]
    return np.stack(rows, axis=1).astype(np.uint8).tobytes()


def group_sizes(elements: int, groups: int = 0) -> list[int]:
    """Section 5: the elements of each group; another number of groups is that of section 6.3, transform 6."""
    groups = groups or -(-elements // GROUP) or 1
    size = -(-elements // (4096 * groups)) * 4096 or 1
    return [min(size, elements - at) for at in range(0, elements, size)]


def segment_size(n: int, segments: int) -> int:
    """Section 7.5: K, or 0 when a block of n symbols cannot have that many segments."""
    size = -(-n // (128 * segments)) * 128
    return size if size <= SEGMENT and (segments - 1) * size < n else 0


def segment_counts(n: int) -> list[int]:
    """All numbers of segments that a block of n symbols can have."""
    return [s for s in range(1, 256) if segment_size(n, s)]


def _segments(n: int, segments: int) -> list[tuple[int, int]]:
    size = segment_size(n, segments)
    assert size, (n, segments)
    return [(start, min(n, start + size)) for start in range(0, n, size)]


def huffman_table(lengths: dict[int, int]) -> bytes:
    """Section 7.5: the stored table of a code given by the code length of each byte."""
    lo, hi = min(lengths), max(lengths)
    nibbles = [lengths.get(c, 0) for c in range(lo, hi + 1)] + [0] * ((hi - lo + 1) % 2)
    table = bytes([lo, hi]) + bytes(a | b << 4 for a, b in zip(nibbles[::2], nibbles[1::2], strict=True))
    return table + bytes(len(table) % 2)


RANS_FORMS = ("dense", "sparse", "short")


def rans_table(frequencies: dict[int, int], form: str | None = None) -> bytes:
    """Section 7.6: the stored table of the frequency of each byte, in one of its forms; None: in the shortest."""
    if form is None:
        return min((rans_table(frequencies, form) for form in RANS_FORMS), key=len)
    lo, hi = min(frequencies), max(frequencies)
    head, listed = bytes([lo, hi]), [frequencies.get(c, 0) for c in range(lo, hi + 1)]
    if form == "sparse":
        head = bytes([hi, lo]) + sum(1 << c - lo for c in frequencies).to_bytes((hi - lo + 8) // 8, "little")
        listed = [frequencies[c] for c in sorted(frequencies)]
    if form == "short":
        table = gamma_table(hi, [frequencies.get(c, 0) for c in range(hi + 1)])
    else:
        packed = sum(f << 12 * i for i, f in enumerate(listed))
        table = head + packed.to_bytes((12 * len(listed) + 7) // 8, "little")
    return table + bytes(len(table) % 2)


def gamma_table(hi: int, frequencies: list[int], rubbish: int = 0) -> bytes:
    """Section 7.6: a short table of these frequencies, without the byte that makes it even; `rubbish`: bits behind the last."""
    codes = [f"{f + 1:b}" for f in frequencies]
    bits = "".join("0" * (len(code) - 1) + code for code in codes)
    size = (len(bits) + 7) // 8
    return bytes([hi, hi]) + (int(bits[::-1], 2) | rubbish << len(bits)).to_bytes(size, "little")


def huffman_payload(
    coded: np.ndarray, lengths: dict[int, int], segments: int, padding: Callable[[int], np.ndarray]
) -> tuple[bytes, bytes]:
    """The stream lengths and the streams of section 7.5."""
    codes = {c: f"{code:0{length}b}" for c, (length, code) in reference.huffman_codes(lengths).items()}
    sizes, streams = [], []
    for start, stop in _segments(coded.size, segments):
        r = 4 * -(-(stop - start) // 128)
        whole = np.concatenate((coded[start:stop], padding(32 * r - (stop - start)))).tolist()
        for lane in range(32):
            bits = "".join([codes[c] for c in whole[lane * r : (lane + 1) * r]])
            stream = int(bits[::-1], 2).to_bytes(-(-len(bits) // 8), "little")
            sizes.append(len(stream))
            streams.append(stream)
    return struct.pack(f"<{len(sizes)}H", *sizes), b"".join(streams)


def rans_payload(
    coded: np.ndarray, frequencies: dict[int, int], segments: int, padding: Callable[[int], np.ndarray]
) -> tuple[bytes, bytes]:
    """The counts and states, and the words, of section 7.6."""
    freq = np.zeros(256, np.int64)
    for c, f in frequencies.items():
        freq[c] = f
    order = np.array(sorted(frequencies, key=lambda c: (-frequencies[c], c)))
    start_of = np.zeros(256, np.int64)
    start_of[order] = np.cumsum(freq[order]) - freq[order]
    counts, states, words = [], [], []
    for start, stop in _segments(coded.size, segments):
        steps = -(-(stop - start) // 32)
        whole = np.concatenate((coded[start:stop], padding(32 * steps - (stop - start)))).reshape(steps, 32)
        x = np.full(32, 1 << 15, np.int64)
        emitted = []
        for j in range(steps - 1, -1, -1):
            f, s = freq[whole[j]], start_of[whole[j]]
            full = x >= f << 19
            emitted.append((x[full] & 0xFFFF).astype("<u2"))
            x = np.where(full, x >> 16, x)
            x = (x // f << 12) + x % f + s
        own = b"".join(part.tobytes() for part in reversed(emitted))
        counts.append(len(own) // 2)
        states.append(x.astype("<u4").tobytes())
        words.append(own)
    return struct.pack(f"<{len(counts)}I", *counts) + b"".join(states), b"".join(words)


def random_lengths(rng: np.random.Generator, symbols: list[int]) -> dict[int, int]:
    """A complete code of at most 11 bits, by splitting random leaves: rarely an optimal one."""
    depths = [1, 1]
    deep = rng.random() < 0.3
    while len(depths) < len(symbols):
        open_leaves = [i for i, d in enumerate(depths) if d < 11]
        i = max(open_leaves, key=lambda i: depths[i]) if deep and rng.random() < 0.9 else int(rng.choice(open_leaves))
        depths[i] += 1
        depths.append(depths[i])
    return dict(zip(symbols, rng.permutation(depths).tolist(), strict=True))


def random_frequencies(rng: np.random.Generator, symbols: list[int]) -> dict[int, int]:
    """Frequencies that add up to 4096: even, skewed, or all but one of them 1."""
    k = len(symbols)
    style = rng.integers(3)
    if style == 0:
        parts = np.full(k, 1)
    else:
        weights = rng.random(k) ** (1 if style == 1 else 12) + 1e-9
        parts = 1 + np.floor(weights / weights.sum() * (4096 - k)).astype(int)
    parts[rng.integers(k)] += 4096 - parts.sum()
    return dict(zip(symbols, parts.tolist(), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Chunk records


@dataclass
class Entry:
    """A block: its entry as FORMAT.md section 5 has it, and its payload."""

    codec: int
    joined: int = 0
    segments: int = 0
    flags: int = 0
    escapes: int = 0
    value: int = 0
    payload: bytes = b""

    def bytes(self) -> bytes:
        """The 16 bytes of the entry."""
        fields = (self.codec, self.joined, self.segments, self.flags, len(self.payload), self.escapes, self.value, 0)
        return struct.pack("<BBBBIIHH", *fields)


@dataclass
class Transform:
    """A transform header as FORMAT.md section 6.3 has it; the strings stand in `a_block` and `b_block`."""

    kind: int
    m: int
    inner_width: int
    a: int = 0
    b: int = 0
    c: int = 0
    v: int = 0
    size_a: int = 0
    size_b: int = 0
    a_block: Entry | None = None
    b_block: Entry | None = None
    reserved: int = 0
    classes: list[int] = field(default_factory=list)  # the class sizes of section 6.4

    def bytes(self) -> bytes:
        """The 64 bytes of the header, and the class sizes of a delta."""
        fields = (self.m, self.inner_width, self.a, self.reserved, self.size_a, self.size_b, self.b, self.c, self.v)
        entries = (s.bytes() if s is not None else bytes(16) for s in (self.a_block, self.b_block))
        return struct.pack("<IBBHIIIIQ", *fields) + b"".join(entries) + struct.pack(f"<{len(self.classes)}I", *self.classes)


def blocks_of(record: bytes | bytearray) -> tuple[int, int]:
    """Where the block entries of the planes of a record start, and how many they are (section 5)."""
    elements, split, width, transform = struct.unpack_from("<IBBB", record, 32)
    at, groups = 48, 0
    if transform:
        elements, width, at = *struct.unpack_from("<IB", record, 48), 112
        groups = record[53] if transform == ROWS else 0
    if transform in (DELTA, RECORDS):
        at, groups = 144, sum(len(group_sizes(size)) for size in struct.unpack_from("<8I", record, 112))
    return at, (groups or -(-elements // GROUP)) * (width if split else 1)


def codecs_of(record: bytes | bytearray) -> int:
    """What the index says of a record in c_codecs (section 2.3)."""
    if record[38] == 9:  # unchanged: there is none
        return 0
    at, count = blocks_of(record)
    places = [at + 16 * i for i in range(count)]
    if record[38]:
        places += [e for e, s in ((80, 56), (96, 60)) if any(record[s : s + 4])]
    return sum(1 << codec for codec in {min(record[i], 31) for i in places})


def checked(body: bytes) -> bytes:
    """A chunk record from its bytes 16 … length - 1."""
    return b"\xf5TZchnk\n" + sum64(body).to_bytes(8, "little") + body


def sum64(data: bytes) -> int:
    """Section 4 with whole stripes at once; test_coders.py compares it with the reference."""
    if not data:
        return 0
    keys = np.array(reference._KEYS, np.uint64)
    x = np.frombuffer(data + bytes(-len(data) % 4096), "<u8").reshape(-1, 512)
    y = x ^ keys
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    with np.errstate(over="ignore"):
        a = ((y & low) * (y >> half) + (x << half | x >> half)).sum(axis=1, dtype=np.uint64)
        t = a + np.arange(1, a.size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        t = (t ^ t >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        t = (t ^ t >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        t ^= t >> np.uint64(31)
        total = int(t.sum(dtype=np.uint64))
    return reference._mix((total + len(data) * 0xC2B2AE3D27D4EB4F) & reference.MASK64)


def chunk_record(
    entries: list[Entry],
    split: int,
    width: int,
    data: bytes,
    run: int = 0,
    chunk: int = 0,
    transform: Transform | None = None,
    inputs: int | None = None,
) -> bytes:
    """A chunk record (section 5) of blocks in the order of their entries; `data` is what it decodes to."""
    body = b"" if transform is None else transform.bytes()
    strings = [] if transform is None else [s for s in (transform.a_block, transform.b_block) if s is not None]
    body += b"".join(entry.bytes() for entry in entries)
    for entry in strings + entries:
        at = 48 + len(body)
        body += bytes(-at % (128 if len(entry.payload) >= 16384 else 16)) + entry.payload
    body += bytes(-len(body) % 16)
    kind = 0 if transform is None else transform.kind
    inputs = int(kind == DELTA) if inputs is None else inputs
    head = struct.pack(
        "<QIIIBBBBQ", 48 + len(body), run, chunk, len(data) // width, split, width, kind, inputs, sum64(data)
    )
    return checked(head + body)


def rechecked(record: bytes | bytearray) -> bytes:
    """The record with the check that its bytes demand."""
    return checked(bytes(record[16:]))


@dataclass
class Chunk:
    """A valid chunk record and what it decodes to."""

    record: bytes
    data: bytes
    split: int
    width: int
    base: bytes = b""  # its base bytes, when it is a delta

    @property
    def elements(self) -> int:
        """The number of its elements."""
        return len(self.data) // self.width


@dataclass
class _Shared:
    codec: int
    table: dict[int, int]


@dataclass
class Taste:
    """What a random chunk prefers: its codecs, and how often blocks share tables and have escapes."""

    codecs: tuple[int, ...] = (RAW, CONSTANT, ZSTANDARD, HUFFMAN, RANS)
    share: float = 0.5
    escape: float = 0.5
    most_segments: int = 12  # of a block, or the fewest that it can have
    most_symbols: int = 256


def _entropy_block(
    rng: np.random.Generator, codec: int, n: int, w: int, taste: Taste, shared: _Shared | None
) -> tuple[Entry, np.ndarray, _Shared]:
    limit = min(1 << w, 256 if w <= 8 else 255)
    flags = 0
    if (
        shared is not None
        and shared.codec == codec
        and max(shared.table) < limit
        and (w <= 8 or max(shared.table) < 255)
        and rng.random() < taste.share
    ):
        table, flags = shared.table, 1
    else:
        k = int(rng.integers(2, min(limit, taste.most_symbols) + 1)) if rng.random() < 0.7 else 2
        symbols = sorted(rng.choice(limit, k, replace=False).tolist())
        table = random_lengths(rng, symbols) if codec == HUFFMAN else random_frequencies(rng, symbols)
    base = int(rng.integers(0, (1 << w) - max(table))) if w > 8 else 0
    used = np.array(sorted(table))
    weights = rng.random(used.size) ** 8 + 1e-6
    coded = rng.choice(used, n, p=weights / weights.sum())
    symbols_of = np.where(coded == 0, 0, base + coded) if w > 8 else coded.copy()
    escapes = 0
    if rng.random() < taste.escape:
        escapes = int(rng.integers(1, max(2, min(n, 40)))) if n > 1 else 1
        at = np.sort(rng.choice(n, escapes, replace=False))
        values = rng.integers(0, 1 << w, escapes)
        symbols_of[at] = values
        listed = (values.astype(np.uint32) << np.uint32(18) | at.astype(np.uint32)).astype("<u4").tobytes()
    else:
        listed = b""
    possible = segment_counts(n)
    segments = int(rng.choice([s for s in possible if s <= taste.most_segments] or possible[:1]))
    payload_of = huffman_payload if codec == HUFFMAN else rans_payload
    before, after = payload_of(coded, table, segments, lambda count: rng.choice(used, count))
    form = str(rng.choice(RANS_FORMS))
    stored = b"" if flags else (huffman_table(table) if codec == HUFFMAN else rans_table(table, form))
    entry = Entry(codec, 0, segments, flags, escapes, base, listed + before + stored + after)
    return entry, symbols_of, _Shared(codec, table)


def _random_block(
    rng: np.random.Generator, n: int, w: int, taste: Taste, shared: _Shared | None
) -> tuple[Entry, np.ndarray, _Shared | None]:
    codec = int(rng.choice([c for c in taste.codecs if w <= 8 or c not in (RAW, ZSTANDARD)]))
    if codec == CONSTANT:
        value = int(rng.integers(0, 1 << w))
        return Entry(CONSTANT, value=value), np.full(n, value), shared
    if codec in (HUFFMAN, RANS):
        return _entropy_block(rng, codec, n, w, taste, shared)
    symbols = rng.integers(0, 1 << w, n) if rng.random() < 0.5 else rng.integers(0, 2, n)
    if codec == RAW:
        return Entry(RAW, payload=pack_rows(symbols, w)), symbols, shared
    frame = _frame(rng, symbols.astype(np.uint8).tobytes())
    return Entry(ZSTANDARD, payload=frame), symbols, shared


def _frame(rng: np.random.Generator, data: bytes) -> bytes:
    checksum = bool(rng.integers(2))
    return zstandard.ZstdCompressor(level=int(rng.integers(1, 5)), write_checksum=checksum).compress(data)


HEADS = {2: (8, 7, (0, 1, 2)), 3: (5, 10, (3,)), 4: (8, 7, (0, 1, 2)), 5: (11, 4, (0, 1, 2))}
WIDTHS = {0: (1, 2, 4, 8), 1: (1, 2, 4, 8), 2: (2,), 3: (2,), 4: (4,), 5: (8,)}


def random_chunk(
    rng: np.random.Generator, split: int, width: int, elements: int, taste: Taste | None = None, run: int = 0, chunk: int = 0
) -> Chunk:
    """A chunk record that sections 5 to 7 allow, of random symbols coded at random."""
    entries, data = _random_elements(rng, split, width, group_sizes(elements), taste or Taste())
    return Chunk(chunk_record(entries, split, width, data, run, chunk), data, split, width)


def _random_elements(
    rng: np.random.Generator, split: int, width: int, sizes: list[int], taste: Taste
) -> tuple[list[Entry], bytes]:
    """Blocks of random symbols in groups of these sizes, and the elements that they stand for."""
    if split == 0 and width > 1:
        entries, data = [], b""
        for n in sizes:
            part = rng.integers(0, int(rng.choice([2, 256])), n * width).astype(np.uint8).tobytes()
            entries.append(_loose_block(rng, part))
            data += part
        return entries, data
    planes = 1 if split == 0 else width
    joined = [int(rng.choice(HEADS[split][2])) if split in HEADS else 0 for _ in sizes]
    modes = [int(rng.integers(3)) if split in HEADS else 0 for _ in sizes]
    entries, symbols = [], []
    for plane in range(planes):
        shared: _Shared | None = None
        for n, t, mode in zip(sizes, joined, modes, strict=True):
            w, flags = 8, 0
            if split in HEADS and plane < 2:
                e, m, _ = HEADS[split]
                w = e + t if plane == 0 else m - t + (mode == 0)
                flags = mode << 1 if plane == 1 else 0
            entry, values, shared = _random_block(rng, n, w, taste, shared)
            entry.joined = t if plane < 2 else 0
            entry.flags |= flags
            entries.append(entry)
            symbols.append(values)
    groups = len(sizes)
    data = b"".join(
        _merge([symbols[p * groups + g] for p in range(planes)], split, joined[g], modes[g]) for g in range(groups)
    )
    return entries, data


def _loose_block(rng: np.random.Generator, data: bytes) -> Entry:
    """Bytes as they are, or as a frame."""
    return Entry(ZSTANDARD, payload=_frame(rng, data)) if rng.random() < 0.5 else Entry(RAW, payload=data)


# ---------------------------------------------------------------------------------------------------------------------
# Transforms, written from FORMAT.md section 6.3


def string_block(rng: np.random.Generator, data: bytes, codec: int | None = None) -> Entry | None:
    """The block of a given byte string, coded at random (or by `codec`); None when it is empty."""
    if not data:
        return None
    symbols = np.frombuffer(data, np.uint8).astype(np.int64)
    used = np.unique(symbols).tolist()
    codec = int(rng.integers(5)) if codec is None else codec
    if codec == CONSTANT and len(used) == 1:
        return Entry(CONSTANT, value=used[0])
    if codec in (RAW, CONSTANT, ZSTANDARD):
        return _loose_block(rng, data)
    lost = used[:: int(rng.integers(2, 9))] if rng.random() < 0.5 and len(data) < 5000 else []
    table_of = sorted({*used} - {*lost} | {0, 255})
    table = random_lengths(rng, table_of) if codec == HUFFMAN else random_frequencies(rng, table_of)
    places = np.flatnonzero(~np.isin(symbols, table_of))
    listed = (symbols[places] << 18 | places).astype("<u4").tobytes()
    coded = np.where(np.isin(symbols, table_of), symbols, 0)
    segments = int(rng.choice([c for c in segment_counts(symbols.size) if c < 12]))
    payload_of, stored = (huffman_payload, huffman_table) if codec == HUFFMAN else (rans_payload, rans_table)
    before, after = payload_of(coded, table, segments, lambda count: rng.choice(table_of, count))
    return Entry(codec, 0, segments, 0, places.size, 0, listed + before + stored(table) + after)


def grid_elements(codes: np.ndarray, scales: np.ndarray, first: int, size: int, kind: int) -> np.ndarray:
    """The rule of a grid, in numpy: elements as unsigned integers; kind 0 bfloat16, 1 float16, 2 float32."""
    n = codes.size
    block = np.where(np.arange(n) < first, 0, 1 + (np.arange(n) - first) // size)
    with np.errstate(over="ignore", under="ignore"):
        product = (codes.astype(np.int64) - 128).astype("<f4") * scales[block].astype("<f4")
        if kind == 1:
            elements = product.astype("<f2").view("<u2")
        else:
            elements = product.view("<u4")
    if kind == 0:
        wide = elements.astype(np.int64)
        elements = (wide + 0x7FFF + (wide >> 16 & 1) >> 16).astype("<u2")
    elements = elements.copy()
    elements[codes == 0] = 1 << 8 * elements.itemsize - 1
    return elements


def blocks_of_quantised_weights(n: int, seed: int = 3) -> np.ndarray:
    """n blocks of a float16 scale and 32 small integers, shape (n, 34): GGUF's Q8_0."""
    rng = np.random.default_rng(seed)
    blocks = np.empty((n, 34), np.uint8)
    blocks[:, :2] = rng.normal(0.01, 0.001, n).astype("<f2").view(np.uint8).reshape(-1, 2)
    blocks[:, 2:] = np.clip(rng.normal(0, 40, (n, 32)), -127, 127).astype(np.int8).view(np.uint8)
    return blocks


_ELEMENTS = {GRID: [2, 4], OFFSET: [2, 4, 8], RECORDS: [1]}


def random_transform(
    rng: np.random.Generator, kind: int, n: int, taste: Taste | None = None, run: int = 0, chunk: int = 0, **choice: Any
) -> tuple[Chunk, Transform]:
    """A chunk of n elements with a transform, of random inner elements and strings coded at random."""
    taste = taste or Taste()
    width = choice.get("width") or int(rng.choice(_ELEMENTS.get(kind, [1, 2, 4, 8])))
    word = np.dtype(f"<u{width}")
    v = int.from_bytes(rng.bytes(width), "little") if kind in (SPARSE, DIFFERENCE, OFFSET, VOCABULARY) else 0
    t = Transform(kind, n, width, v=v)
    side_a = side_b = b""
    if kind == PALETTE:
        t.a = choice.get("a") or int(rng.choice([1, 2, 4, 8]))
        t.m, t.inner_width = -(-n * t.a // 8), 1
        side_a = rng.bytes(width << t.a)
    elif kind == GRID:
        t.inner_width = 1
        element = 2 if width == 4 else int(rng.integers(2))
        t.b = int(rng.choice([1, 7, 128, n, 1 << 20]))
        t.c = int(rng.integers(1, min(t.b, 2 * n) + 1))
        kind_of_scale = int(rng.integers(3))
        t.a = element | kind_of_scale << 4
        count = 1 + len(range(t.c, n, t.b))
        scales = rng.normal(0, 1, count) * 2.0 ** rng.integers(-20, 12, count)
        if kind_of_scale == 2:
            side_a = (scales.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
            scales = (np.frombuffer(side_a, "<u2").astype("<u4") << 16).view("<f4")
        else:
            scales = scales.astype("<f2" if kind_of_scale else "<f4")
            side_a = scales.tobytes()
        places = np.flatnonzero(rng.random(n) < rng.choice([0, 0.01, 1]))[: (1 << 18) // (4 + width)]
        exceptions = np.frombuffer(rng.bytes(places.size * width), word)
        side_b = b"".join(
            int(i).to_bytes(4, "little") + e.tobytes() for i, e in zip(places, exceptions, strict=True)
        )
    elif kind == SPARSE:
        mask = rng.random(n) < rng.choice([0, 0.02, 0.5, 1])
        side_a = np.packbits(mask, bitorder="little").tobytes()
        t.m = int(mask.sum())
    elif kind == ROWS:
        t.a = int(rng.choice([a for a in range(1, 33) if (a - 1) * -(-n // (4096 * a)) * 4096 < n and n <= GROUP * a]))
        t.b = int(rng.choice([1, 7, 128, n, 1 << 20])) if n < 100_000 else 777
        t.c = int(rng.integers(1, min(t.b, 2 * n) + 1))
        side_a = rng.integers(0, int(rng.choice([1, 3, 256])), 1 + len(range(t.c, n, t.b)), np.uint8).tobytes()
    elif kind == DIFFERENCE:
        t.b = int(rng.choice([1, 2, 3, 8, 100, n, 1 << 20]))
        t.c = int(rng.choice([0, 1, 300, 2**32 - 1]))
    elif kind == DELTA:
        return _random_delta(rng, t, n, taste, run, chunk, choice.get("base"))
    elif kind == RECORDS:
        return _random_records(rng, t, n, taste, run, chunk)
    elif kind == VOCABULARY:
        side_a, side_b, codes, offsets = _random_codes(rng, t, n)
    elif kind == OFFSET:
        t.inner_width = int(rng.choice([w for w in (1, 2, 4) if w < width]))
    t.size_a, t.size_b = len(side_a), len(side_b)
    t.a_block, t.b_block = string_block(rng, side_a), string_block(rng, side_b)

    split = int(rng.choice([s for s, widths in WIDTHS.items() if t.inner_width in widths]))
    if kind == PALETTE and n * t.a % 8:
        inner = rng.bytes(t.m - 1) + bytes([int(rng.integers(256)) & (1 << n * t.a % 8) - 1])
        entries, at = [], 0
        for size in group_sizes(t.m):
            entries.append(_loose_block(rng, inner[at : at + size]))
            at += size
        split = 0
    elif kind == VOCABULARY:
        inner, split = codes, int(rng.integers(2))
        starts = range(0, t.m, group_sizes(t.m)[0])
        entries = [_loose_block(rng, inner[i : i + starts.step]) for i in starts]
    elif t.m:
        sizes = group_sizes(t.m, t.a if kind == ROWS else 0)
        entries, inner = _random_elements(rng, split, t.inner_width, sizes, taste)
    else:
        entries, inner = [], b""
    symbols = np.frombuffer(inner, f"<u{t.inner_width}")
    if kind == PALETTE:
        bits = np.unpackbits(symbols, bitorder="little")[: n * t.a].reshape(n, t.a).astype(np.int64)
        values = np.frombuffer(side_a, np.uint8).reshape(width, -1)[::-1].T.copy().view(word).reshape(-1)
        elements = values[(bits << np.arange(t.a)).sum(axis=1)]
    elif kind == GRID:
        elements = grid_elements(symbols, scales, t.c, t.b, element)
        elements[places] = exceptions
    elif kind == SPARSE:
        elements = np.full(n, v, word)
        elements[mask] = symbols
    elif kind == ROWS:
        row = np.where(np.arange(n) < t.c, 0, 1 + (np.arange(n) - t.c) // t.b)
        elements = np.empty(n, word)
        elements[np.argsort(np.frombuffer(side_a, np.uint8)[row].astype(np.int64) << 32 | np.arange(n))] = symbols
    elif kind == DIFFERENCE:
        elements = np.concatenate((symbols, np.zeros(-n % t.b, word))).reshape(-1, t.b)
        ramp = (np.arange(-t.b, 0) * t.c).astype(word)  # before the first element
        elements = (np.cumsum(elements, axis=0, dtype=word) + word.type(v) + ramp).reshape(-1)[:n]
    elif kind == VOCABULARY:
        elements = offsets.astype(word) + word.type(v)
    else:
        elements = symbols.astype(word) + word.type(v)
    data = elements.astype(word).tobytes()
    return Chunk(chunk_record(entries, split, width, data, run, chunk, t), data, split, width), t


def _random_codes(rng: np.random.Generator, t: Transform, n: int) -> tuple[bytes, bytes, bytes, np.ndarray]:
    """A and B of a vocabulary, codes of n elements, and the values above v that these stand for; `t` gets the rest."""
    longest, t.inner_width = min(3, t.inner_width), 1
    k = int(rng.choice([1, 5, 200, 256]))
    t.b = int(rng.choice([0, 1, (256 - k) // 2, 256 - k]))
    t.b = min(t.b, 256 - k)
    frequent = rng.integers(0, 2**32, k, np.uint64)
    mask = rng.random(8 * int(rng.choice([1, 40, 120]))) < rng.choice([0.1, 1])
    others = np.flatnonzero(mask)
    twos = min(others.size, 256 * t.b)
    threes = min(others.size - twos, 65536 * (256 - k - t.b))
    lengths = [1, *[2] * (longest > 1 and twos > 0), *[3] * (longest > 2 and threes > 0)]
    codes, values = bytearray(), []
    for length in rng.choice(lengths, n).tolist():
        if length == 1:
            codes.append(int(rng.integers(k)))
            values.append(frequent[codes[-1]])
        elif length == 2:
            r = int(rng.integers(twos))
            codes += bytes([k + (r >> 8), r & 255])
            values.append(others[r])
        else:
            r = int(rng.integers(threes))
            codes += bytes([k + t.b + (r >> 16), r >> 8 & 255, r & 255])
            values.append(others[twos + r])
    t.m = len(codes)
    side_b = np.packbits(mask, bitorder="little").tobytes()
    return frequent.astype("<u4").tobytes(), side_b, bytes(codes), np.array(values, np.uint64)


def ordered(words: np.ndarray) -> np.ndarray:
    """Section 6.4: `ord` for a = 0, elements as unsigned integers."""
    top, every = words.dtype.type(1 << 8 * words.itemsize - 1), words.dtype.type((1 << 8 * words.itemsize) - 1)
    return np.where(words & top != 0, words ^ every, words ^ top)


def unordered(integers: np.ndarray) -> np.ndarray:
    """The elements that `ordered` makes these integers of."""
    top, every = integers.dtype.type(1 << 8 * integers.itemsize - 1), integers.dtype.type((1 << 8 * integers.itemsize) - 1)
    return np.where(integers & top != 0, integers ^ top, integers ^ every)


def delta_classes(base: np.ndarray, b: int, c: int) -> np.ndarray:
    """Section 6.4: the class of each element, given those of the base."""
    shift, bits = base.dtype.type(c % 256), base.dtype.type((1 << c // 256) - 1)
    return np.clip((base >> shift & bits).astype(np.int64) - b, 0, 7)


def delta_elements(t: Transform, base: np.ndarray, changed: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """Section 6.4: the elements, given those of the base, which of them are changed, and the inner elements."""
    places = np.flatnonzero(changed)
    places = places[np.argsort(delta_classes(base[places], t.b, t.c), kind="stable")]
    apart = np.where(inner & inner.dtype.type(1) != 0, ~(inner >> inner.dtype.type(1)), inner >> inner.dtype.type(1))
    elements = base.copy()
    if t.a:
        elements[places] = base[places] + apart
    else:
        elements[places] = unordered(ordered(base[places]) + apart)
    return elements


def _random_delta(
    rng: np.random.Generator, t: Transform, n: int, taste: Taste, run: int, chunk: int, base: bytes | None
) -> tuple[Chunk, Transform]:
    """A chunk of n elements that are differences from a base, or a random one (section 6.4)."""
    word = np.dtype(f"<u{t.inner_width}")
    base = np.frombuffer(rng.bytes(n * word.itemsize) if base is None else base, word)
    bits = int(rng.integers(1, min(11, 8 * word.itemsize) + 1))
    t.a = int(rng.integers(2))
    t.c = int(rng.integers(0, 8 * word.itemsize - bits + 1)) | bits << 8
    t.b = int(rng.integers(0, 1 << bits)) if rng.random() < 0.5 else 0
    changed = rng.random(n) < rng.choice([0, 0.05, 0.6, 1])
    if 0 < changed.sum() < n:
        side_a = np.packbits(changed, bitorder="little").tobytes()
        t.size_a, t.a_block = len(side_a), string_block(rng, side_a)
    t.m = int(changed.sum())
    t.classes = np.bincount(delta_classes(base[changed], t.b, t.c), minlength=8).tolist()
    sizes = [size for own in t.classes for size in group_sizes(own)]
    entries, inner = _random_elements(rng, 1, word.itemsize, sizes, taste) if t.m else ([], b"")
    data = delta_elements(t, base, changed, np.frombuffer(inner, word)).tobytes()
    record = chunk_record(entries, 1, word.itemsize, data, run, chunk, t)
    return Chunk(record, data, 1, word.itemsize, base.tobytes()), t


def _random_records(
    rng: np.random.Generator, t: Transform, n: int, taste: Taste, run: int, chunk: int
) -> tuple[Chunk, Transform]:
    """A chunk of n bytes that are records of fields (section 6.5)."""
    n = max(n, 2)
    t.b = int(rng.integers(2, min(n, int(rng.choice([3, 40, 4096]))) + 1))
    t.c = int(rng.integers(0, min(t.b - 1, n - t.b) + 1))
    records = (n - t.c) // t.b
    fields = rng.integers(0, int(rng.integers(1, 9)), t.b).astype(np.uint8)
    t.m, t.inner_width = records * t.b, 1
    side_a, side_b = fields.tobytes(), rng.bytes(n - t.m)
    t.size_a, t.size_b = len(side_a), len(side_b)
    t.a_block, t.b_block = string_block(rng, side_a), string_block(rng, side_b)
    t.classes = [records * int((fields == f).sum()) for f in range(8)]
    sizes = [size for own in t.classes for size in group_sizes(own)]
    entries, inner = _random_elements(rng, 1, 1, sizes, taste)
    table, at = np.empty((records, t.b), np.uint8), 0
    for f, size in enumerate(t.classes):
        table[:, fields == f] = np.frombuffer(inner[at : at + size], np.uint8).reshape(records, -1)
        at += size
    data = side_b[: t.c] + table.tobytes() + side_b[t.c :]
    return Chunk(chunk_record(entries, 1, 1, data, run, chunk, t), data, 1, 1), t


def _merge(planes: list[np.ndarray], split: int, joined: int, mode: int) -> bytes:
    """Elements from the symbols of their planes (section 6), as bytes."""
    if split in HEADS:
        _, m, _ = HEADS[split]
        low = m - joined
        key, rest = (p.astype(np.int64) for p in planes[:2])
        sign = {0: rest >> low, 1: np.zeros_like(rest), 2: np.ones_like(rest)}[mode]
        head = sign << 15 | key << low | rest & ((1 << low) - 1)
        planes = [head >> 8, head & 255, *planes[2:]]
    return np.stack([p.astype(np.uint8) for p in reversed(planes)], axis=1).tobytes()


# ---------------------------------------------------------------------------------------------------------------------
# Archives


def check8(data: bytes) -> bytes:
    """Section 1."""
    return hashlib.sha256(data).digest()[:8]


COLUMNS = (
    ("m_name", "I"), ("m_kind", "B"), ("m_flags", "B"), ("m_mode", "H"), ("m_mtime", "q"), ("m_size", "Q"),
    ("m_sha", "32s"), ("m_record", "Q"), ("m_check", "Q"), ("m_extents", "I"), ("m_tensors", "I"), ("m_runs", "I"),
    ("x_kind", "B"), ("x_run", "I"), ("x_offset", "Q"), ("x_length", "Q"),
    ("t_name", "I"), ("t_dtype", "B"), ("t_layout", "B"), ("t_ndim", "B"), ("t_extent", "I"), ("t_offset", "Q"),
    ("r_width", "B"), ("r_inputs", "I"), ("r_elements", "Q"),
    ("i_kind", "B"), ("i_offset", "Q"), ("i_length", "Q"), ("i_begin", "Q"), ("i_archive", "32s"), ("i_file", "32s"),
    ("i_member", "I"), ("i_name", "I"),
    ("c_offset", "Q"), ("c_length", "I"), ("c_check", "Q"), ("c_codecs", "I"),
    ("dims", "Q"),
)  # fmt: skip


@dataclass
class Table:
    """A catalogue before it is bytes: columns as lists, names, the two first ordinals, and room for faults."""

    columns: dict[str, list[Any]]
    heap: bytes
    inline: bytes = b""
    first_member: int = 0
    first_run: int = 0
    counts: dict[int, int] = field(default_factory=dict)  # counts of the body to lie about
    padding: bytes = b"\0"
    tail: bytes = b""
    compress: bool = False
    raw_length: int | None = None
    frame_size: bool = True
    behind: bytes = b""

    def body(self) -> bytes:
        """Section 2.3."""
        c = self.columns
        tables = ("m_kind", "x_kind", "t_dtype", "r_width", "i_kind", "c_offset", "dims")
        counts = [len(c[t]) for t in tables]
        counts += [len(self.heap), len(self.inline), self.first_member, self.first_run, 0]
        for i, value in self.counts.items():
            counts[i] = value
        out = struct.pack("<12I", *counts)
        parts = [b"".join(struct.pack("<" + code, v) for v in c[name]) for name, code in COLUMNS]
        for part in (*parts, self.heap, self.inline):
            out += part
            out += self.padding * (-len(out) % 8)
        return out + self.tail

    def record(self, kind: bytes) -> bytes:
        """The member or index record."""
        body = self.body()
        compressor = zstandard.ZstdCompressor(level=9, write_content_size=self.frame_size)
        stored = compressor.compress(body) + self.behind if self.compress else body
        length = 32 + len(stored) + -len(stored) % 16
        raw_length = len(body) if self.raw_length is None else self.raw_length
        rest = struct.pack("<QII", length, raw_length, len(stored)) + stored
        rest += bytes(length - 16 - len(rest))
        return b"\xf5TZ" + kind + b"\n" + check8(rest) + rest


@dataclass
class Member:
    """A member as the builder wants it; extents, tensors and runs as rows of their tables."""

    name: str
    kind: int = 0
    flags: int = 1
    mode: int = 0o644
    mtime: int = 1_700_000_000_000_000_000
    content: bytes = b""
    extents: list[list[int]] = field(default_factory=list)  # kind, run, offset, length
    tensors: list[list[Any]] = field(default_factory=list)  # name, dtype, layout, shape, extent, offset
    runs: list[list[int]] = field(default_factory=list)  # width, inputs, elements
    inputs: list[list[Any]] = field(default_factory=list)  # kind, offset, length, archive, file, member, tensor, place
    run_bytes: list[bytes] = field(default_factory=list)
    inline: bytes = b""
    size: int | None = None
    sha: bytes | None = None
    done: dict[str, Any] = field(default_factory=dict)  # fields of the done record to lie about


Encode = Callable[[bytes, int, int, int], bytes]


def raw_chunk(data: bytes, width: int, run: int, chunk: int) -> bytes:
    """A chunk record whose blocks are all raw (split 0)."""
    entries, at = [], 0
    for n in group_sizes(len(data) // width):
        entries.append(Entry(RAW, payload=data[at : at + n * width]))
        at += n * width
    return chunk_record(entries, 0, width, data, run, chunk)


def table_of(members: list[Member], first_run: int, first_member: int, is_index: bool) -> Table:
    """The columns of members, as their record or the index has them."""
    columns: dict[str, list[Any]] = {name: [] for name, _ in COLUMNS}
    names, tensor_names, input_files, input_names = b"", b"", b"", b""
    for m in members:
        closed = bool(m.flags & 2)
        sha = m.sha if m.sha is not None else (hashlib.sha256(m.content).digest() if m.flags & 1 else bytes(32))
        row = {
            "m_name": len(m.name.encode("utf-8", "surrogateescape")), "m_kind": m.kind, "m_flags": m.flags,
            "m_mode": m.mode, "m_mtime": m.mtime, "m_size": len(m.content) if m.size is None else m.size,
            "m_sha": sha if is_index or closed else bytes(32), "m_record": 0, "m_check": 0, "m_extents": len(m.extents),
            "m_tensors": len(m.tensors), "m_runs": len(m.runs),
        }  # fmt: skip
        names += m.name.encode("utf-8", "surrogateescape")
        for kind, run, offset, length in m.extents:
            row_x = {"x_kind": kind, "x_run": run, "x_offset": offset, "x_length": length}
            for key, value in row_x.items():
                columns[key].append(value)
        for name, dtype, layout, shape, extent, offset in m.tensors:
            raw = name.encode("utf-8", "surrogateescape")
            tensor_names += raw
            row_t = {"t_name": len(raw), "t_dtype": dtype, "t_layout": layout, "t_ndim": len(shape), "t_extent": extent}
            for key, value in (row_t | {"t_offset": offset}).items():
                columns[key].append(value)
            columns["dims"] += shape
        for values in m.runs:
            for key, value in zip(("r_width", "r_inputs", "r_elements"), values, strict=True):
                columns[key].append(value)
        for kind, offset, length, archive, file, member, name, *begin in m.inputs:
            raw_file, raw_name = member.encode("utf-8", "surrogateescape"), name.encode("utf-8", "surrogateescape")
            input_files += raw_file
            input_names += raw_name
            row_i = {"i_kind": kind, "i_offset": offset, "i_length": length, "i_archive": archive, "i_file": file}
            row_i["i_begin"] = begin[0] if begin else (1 << 64) - 1
            for key, value in (row_i | {"i_member": len(raw_file), "i_name": len(raw_name)}).items():
                columns[key].append(value)
        for key, value in row.items():
            columns[key].append(value)
    inline = b"" if is_index else members[0].inline
    heap = names + tensor_names + input_files + input_names
    return Table(columns, heap, inline, 0 if is_index else first_member, 0 if is_index else first_run)


def header_bytes(
    version: int = 1, grid: tuple[int, int] = (20, 18), must: int = 0, may: int = 0, reserved: bytes = bytes(8)
) -> bytes:
    """Section 2.1."""
    head = struct.pack("<8sHBBIII24s8s", bytes.fromhex("89545A49500D0A1A"), version, *grid, must, may, 10506, b"test", reserved)
    return head + check8(head)


def done_bytes(member: Member, ordinal: int) -> bytes:
    """Section 2.5."""
    fields: dict[str, Any] = {
        "length": 80,
        "size": len(member.content),
        "sha": hashlib.sha256(member.content).digest() if member.flags & 1 else bytes(32),
        "member": ordinal,
        "flags": member.flags & 1,
        "zero": bytes(8),
    } | member.done
    rest = struct.pack("<QQ32sII8s", *fields.values())
    return b"\xf5TZdone\n" + check8(rest) + rest


def footer_bytes(index_offset: int, index: bytes, lie: dict[str, Any] | None = None) -> bytes:
    """Section 2.6."""
    fields: dict[str, Any] = {
        "offset": index_offset,
        "length": len(index),
        "total": index_offset + len(index) + 80,
        "id": hashlib.sha256(index[16:]).digest(),
        "reserved": bytes(8),
    } | (lie or {})
    body = struct.pack("<QQQ32s8s", *fields.values())
    return body + check8(body) + bytes.fromhex("89545A49500D0A1A")[::-1]


def placed(record: bytes, at: int) -> bytes:
    """The record as it stands at that offset of the archive (section 2.2)."""
    check = int.from_bytes(record[8:16], "little") ^ reference._mix(at)
    return record[:8] + check.to_bytes(8, "little") + record[16:]


Edit = Callable[[Table], None]


def archive_bytes(
    members: list[Member],
    *,
    encode: Encode = raw_chunk,
    edit_index: Edit | None = None,
    edit_member: Callable[[Table, int], None] | None = None,
    header: bytes | None = None,
    footer: dict[str, Any] | None = None,
    gap: bytes = b"\0",
    wide: int = 128,
    places: dict[bytes, int] | None = None,  # how many bytes too far on records of a kind stand
) -> bytes:
    """An archive of these members with all checks right; the arguments are places to break single rules."""
    out = header or header_bytes()
    index = table_of(members, 0, 0, is_index=True)
    columns = index.columns
    place = places or {}
    first_run = 0

    def append(record: bytes, alignment: int = 16) -> int:
        nonlocal out
        at = len(out) + -len(out) % alignment + place.get(record[3:7], 0)
        out += gap * (at - len(out)) + placed(record, at)
        return at

    for ordinal, member in enumerate(members):
        own = table_of([member], first_run, ordinal, is_index=False)
        if edit_member is not None:
            edit_member(own, ordinal)
        record = own.record(b"memb")
        columns["m_record"][ordinal] = append(record)
        columns["m_check"][ordinal] = int.from_bytes(record[8:16], "little")
        for i, ((width, _, elements), data) in enumerate(zip(member.runs, member.run_bytes, strict=True)):
            width = max(1, width)  # 0 is one of the faults
            step = (1 << 20) * width
            for c in range(-(-len(data) // step) if elements else 0):
                record = encode(data[c * step : (c + 1) * step], width, first_run + i, c)
                columns["c_offset"].append(append(record, wide if len(record) >= 65536 else 16))
                columns["c_length"].append(len(record))
                columns["c_check"].append(int.from_bytes(record[8:16], "little"))
                columns["c_codecs"].append(codecs_of(record))
        first_run += len(member.runs)
        if not member.flags & 2:
            append(done_bytes(member, ordinal))
    if edit_index is not None:
        edit_index(index)
    record = index.record(b"indx")
    at = append(record)
    return out + footer_bytes(at, record, footer)


def edited(members: list[Member], change: Callable[[list[Member]], None]) -> list[Member]:
    """A deep copy of the members with one change."""
    members = copy.deepcopy(members)
    change(members)
    return members
