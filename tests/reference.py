"""The decoder of FORMAT.md in plain Python: slow, obvious, and strict about every rule of the text."""

from __future__ import annotations

import hashlib
import struct
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import copysign, gcd, inf, isfinite, isnan, nan, prod, sqrt
from pathlib import Path
from typing import Any

import zstandard

MASK64 = 2**64 - 1
CHUNK = 2**20
GROUP = 2**18
SEGMENT = 2**17
MAX_CHUNK_RECORD = 2**25
MAX_BODY = 2**28
HEADER_LENGTH = 64
FOOTER_LENGTH = 80
HEADER_MAGIC = bytes.fromhex("89545A49500D0A1A")
FOOTER_MAGIC = HEADER_MAGIC[::-1]
RAW, CONSTANT, ZSTANDARD, HUFFMAN, RANS = range(5)
ADAPTIVE = 7
PALETTE, GRID, SPARSE, DIFFERENCE, OFFSET, ROWS, DELTA, RECORDS, UNCHANGED = range(1, 10)
VOCABULARY = 12
FILE, FOLDER, LINK, BARE = range(4)
INLINE, FROM_RUN = range(2)
MAX_ROLE = 3
NOT_KNOWN = 2**64 - 1
FLAG_SHA, FLAG_CLOSED = 1, 2
DTYPE_BITS = {
    **dict.fromkeys((0, 1, 2, 3, 7, 8, 9, 10, 12), 8),
    **dict.fromkeys((13, 14, 15, 16), 16),
    **dict.fromkeys((17, 18, 19), 32),
    **dict.fromkeys((20, 21, 22, 23), 64),
    4: 4, 5: 6, 6: 6, 24: 128,
}


class FormatError(Exception):
    """The bytes break a rule of FORMAT.md (section 1)."""


class NotAnArchive(FormatError):
    """The magic is missing (section 1)."""


class Unsupported(FormatError):
    """Made by a newer writer: a version, flag, codec or id that the text does not define (section 1)."""


class Truncated(FormatError):
    """Bytes are missing at the end (section 1)."""


class Corrupt(FormatError):
    """Any other broken rule (section 1)."""


class NoBase(FormatError):
    """The archive is sound, but a base that it leans on is not at hand (section 2.8)."""


# The bases at hand: (SHA-256 of a file or id of an archive, name of a tensor) to the tensor's bytes, or (such a sum, None) to
# those of the file or member itself (section 2.8).
Bases = Mapping[tuple[bytes, str | None], bytes]


def require(holds: bool, rule: str) -> None:
    """Refuse as corrupt unless the rule holds (section 1)."""
    if not holds:
        raise Corrupt(rule)


def ceil_div(a: int, b: int) -> int:
    """`ceil(a / b)` of section 1."""
    return -(-a // b)


def align(x: int, a: int) -> int:
    """The smallest multiple of `a` that is >= `x` (section 1)."""
    return ceil_div(x, a) * a


def check8(data: bytes) -> bytes:
    """The first 8 bytes of the SHA-256 (section 1)."""
    return hashlib.sha256(data).digest()[:8]


def require_zero(data: bytes, what: str) -> None:
    """Zero padding is a requirement (section 1)."""
    require(not any(data), f"{what} is not zero")


# ---------------------------------------------------------------------------------------------------------------------
# Section 4


def _mix(x: int) -> int:
    x ^= x >> 30
    x = x * 0xBF58476D1CE4E5B9 & MASK64
    x ^= x >> 27
    x = x * 0x94D049BB133111EB & MASK64
    return x ^ x >> 31


def bare(record: bytes, at: int) -> bytes:
    """The record with its bare check, given the offset where it stands (section 2.2)."""
    check = int.from_bytes(record[8:16], "little") ^ _mix(at)
    return record[:8] + check.to_bytes(8, "little") + record[16:]


_GOLDEN = 0x9E3779B97F4A7C15
_KEYS = [_mix((0x747A69702073756D + (j + 1) * _GOLDEN) & MASK64) for j in range(512)]


def sum64(data: bytes) -> int:
    """The 64-bit sum of section 4."""
    total = 0
    for s, start in enumerate(range(0, len(data), 4096)):
        stripe = data[start : start + 4096].ljust(4096, b"\0")
        a = 0
        for x, key in zip(struct.unpack("<512Q", stripe), _KEYS, strict=True):
            y = x ^ key
            a += (y & 0xFFFFFFFF) * (y >> 32) + ((x << 32 & MASK64) | x >> 32)
        total += _mix((a + (s + 1) * _GOLDEN) & MASK64)
    return _mix((total + len(data) * 0xC2B2AE3D27D4EB4F) & MASK64)


# ---------------------------------------------------------------------------------------------------------------------
# Section 7: codecs


def packed_length(n: int, width: int) -> int:
    """Stored bytes of `n` raw symbols of `width` bits (section 7.1)."""
    if width == 8:
        return n
    g = 8 // gcd(width, 8)
    return ceil_div(n, 32 * g) * 32 * (g * width // 8)


def unpack_rows(payload: bytes, n: int, width: int) -> list[int]:
    """The raw symbols of a block (section 7.1)."""
    require(1 <= width <= 8, "raw symbols have at most 8 bits")
    require(len(payload) == packed_length(n, width), "stored length of a raw block")
    if width == 8:
        return list(payload)
    g = 8 // gcd(width, 8)
    b = g * width // 8
    low = 2**width - 1
    symbols: list[int] = []
    for cell in range(0, len(payload), 32 * b):
        rows = [payload[cell + 32 * j : cell + 32 * j + 32] for j in range(b)]
        for j in range(b):
            symbols += [byte & low for byte in rows[j]]
        high = [sum((rows[j][i] >> width) << (8 - width) * j for j in range(b)) for i in range(32)]
        for j in range(b, g):
            symbols += [high[i] >> width * (j - b) & low for i in range(32)]
    return symbols[:n]


def zstd_frame(frame: bytes, length: int) -> bytes:
    """Decode exactly one zstandard frame that gives `length` bytes (sections 2.3 and 7.7)."""
    try:
        parameters = zstandard.get_frame_parameters(frame)
        require(parameters.dict_id == 0, "a zstandard frame with a dictionary")
        require(parameters.content_size == length, "content size of a zstandard frame")
        data = zstandard.ZstdDecompressor().decompress(frame, max_output_size=length, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Corrupt(f"zstandard: {error}") from error
    require(len(data) == length, "length of a zstandard frame's content")
    return data


@dataclass(frozen=True)
class Table:
    """A table of code lengths (codec 3) or frequencies (codec 4) by byte (section 7.4)."""

    codec: int
    entries: dict[int, int]


class _Cursor:
    """Takes the parts of a payload in order and refuses to run past its end."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def take(self, count: int) -> bytes:
        part = self.data[self.position : self.position + count]
        require(len(part) == count, "a payload is shorter than its parts")
        self.position += count
        return part

    def integers(self, count: int, size: int) -> list[int]:
        part = self.take(count * size)
        return [int.from_bytes(part[i : i + size], "little") for i in range(0, len(part), size)]


def _read_entries(cursor: _Cursor, before: int, count: int, bits: int, limit: int) -> list[int]:
    """`count` entries of a table and the zero byte that makes its length, `before` bytes more, even (section 7.4)."""
    size = ceil_div(count * bits, 8)
    packed = int.from_bytes(cursor.take(size), "little")
    require_zero(cursor.take((before + size) % 2), "padding of a table")
    values = [packed >> bits * i & 2**bits - 1 for i in range(count)]
    require(packed >> bits * count == 0, "the unused bits of a table's last entry are not zero")
    require(max(values) <= limit, "an entry of a table is too large")
    return values


def _read_table(cursor: _Cursor, codec: int) -> Table:
    lo, hi = cursor.take(2)
    if codec == RANS and lo > hi:
        return _read_sparse_table(cursor, hi, lo)
    if codec == RANS and lo == hi and hi >= 1:
        return _read_short_table(cursor, hi)
    require(lo < hi, "a table has lo < hi")
    bits, limit = (4, 11) if codec == HUFFMAN else (12, 4095)
    values = _read_entries(cursor, 2, hi - lo + 1, bits, limit)
    require(values[0] != 0 and values[-1] != 0, "the first and last entry of a table are not 0")
    entries = {lo + i: value for i, value in enumerate(values) if value}
    if codec == HUFFMAN:
        require(sum(2 ** (11 - length) for length in entries.values()) == 2**11, "the Huffman code is not complete")
    else:
        require(sum(entries.values()) == 4096, "the frequencies do not add up to 4096")
    return Table(codec, entries)


def _read_sparse_table(cursor: _Cursor, lo: int, hi: int) -> Table:
    """A rANS table with a map of the bytes that have entries (section 7.6)."""
    size = ceil_div(hi - lo + 1, 8)
    bits = int.from_bytes(cursor.take(size), "little")
    require(bits >> hi - lo == 1, "the last byte of a sparse table has no entry, or one behind it has")
    require(bits & 1 == 1, "the first byte of a sparse table has no entry")
    places = [c for c in range(lo, hi + 1) if bits >> c - lo & 1]
    values = _read_entries(cursor, 2 + size, len(places), 12, 4095)
    require(0 not in values, "an entry of a sparse table is 0")
    require(sum(values) == 4096, "the frequencies do not add up to 4096")
    return Table(RANS, dict(zip(places, values, strict=True)))


class _Bits:
    """The bits of whole bytes of a payload, the lowest of each first (section 7.6)."""

    def __init__(self, cursor: _Cursor) -> None:
        self._cursor, self._byte, self._left, self.bytes = cursor, 0, 0, 0

    def next(self) -> int:
        if self._left == 0:
            self._byte, self._left = self._cursor.take(1)[0], 8
            self.bytes += 1
        bit = self._byte & 1
        self._byte >>= 1
        self._left -= 1
        return bit

    def end(self) -> None:
        require(self._byte == 0, "the unused bits of a short table are not zero")


def _read_short_table(cursor: _Cursor, hi: int) -> Table:
    """A rANS table of Elias gamma codes (section 7.6)."""
    bits = _Bits(cursor)
    frequencies: list[int] = []
    while len(frequencies) <= hi:
        g = 0
        while bits.next() == 0:
            g += 1
            require(g <= 12, "a code of a short table is too long")
        v = 1
        for _ in range(g):
            v = v << 1 | bits.next()
        require(v - 1 <= 4095, "an entry of a table is too large")
        frequencies.append(v - 1)
    bits.end()
    require_zero(cursor.take((2 + bits.bytes) % 2), "padding of a table")
    entries = {c: frequency for c, frequency in enumerate(frequencies) if frequency}
    require(hi in entries, "the last byte of a short table has no entry")
    require(len(entries) >= 2, "a short table has one entry")
    require(sum(entries.values()) == 4096, "the frequencies do not add up to 4096")
    return Table(RANS, entries)


def _segments(n: int, segments: int) -> list[int]:
    """The symbols of each of the segments of a block (section 7.5)."""
    require(segments >= 1, "a block has a segment or more")
    size = align(ceil_div(n, segments), 128)
    require(size <= SEGMENT and (segments - 1) * size < n, "number of segments")
    return [min(size, n - start) for start in range(0, n, size)]


def huffman_codes(lengths: dict[int, int]) -> dict[int, tuple[int, int]]:
    """The canonical code of each byte as (length, code) (section 7.5)."""
    codes: dict[int, tuple[int, int]] = {}
    code, previous = -1, 0
    for byte, length in sorted(lengths.items(), key=lambda item: (item[1], item[0])):
        code = 0 if code < 0 else (code + 1) << (length - previous)
        previous = length
        codes[byte] = (length, code)
    return codes


def _huffman_stream(stream: bytes, count: int, lookup: list[tuple[int, int]]) -> list[int]:
    padded = stream + b"\0\0"
    position, end = 0, 8 * len(stream)
    out = []
    for _ in range(count):
        at = position >> 3
        if at >= len(stream):
            raise Corrupt("a Huffman stream ends early")
        window = (padded[at] | padded[at + 1] << 8 | padded[at + 2] << 16) >> (position & 7) & 2047
        byte, length = lookup[window]
        position += length
        out.append(byte)
    require(position <= end, "a Huffman stream ends early")
    require(len(stream) == ceil_div(position, 8), "a Huffman stream is longer than its codes")
    require(position == end or stream[-1] >> (position & 7) == 0, "the unused bits of a Huffman stream are not zero")
    return out


def huffman_decode(
    payload: bytes, n: int, count: int, escapes: int, shared: Table | None
) -> tuple[list[int], list[int], Table]:
    """The bytes of a Huffman block of `count` segments, its escapes as stored, and its table (section 7.5)."""
    cursor = _Cursor(payload)
    segments = _segments(n, count)
    escape_words = cursor.integers(escapes, 4)
    stream_lengths = cursor.integers(32 * len(segments), 2)
    table = shared or _read_table(cursor, HUFFMAN)
    require(cursor.position + sum(stream_lengths) == len(payload), "stored length of a Huffman block")

    lookup = [(0, 0)] * 2048
    for byte, (length, code) in huffman_codes(table.entries).items():
        # The stream's next bit is the window's lowest and the code's highest.
        reversed_code = int(f"{code:0{length}b}"[::-1], 2)
        for rest in range(2 ** (11 - length)):
            lookup[rest << length | reversed_code] = (byte, length)

    out: list[int] = []
    for s, k in enumerate(segments):
        symbols: list[int] = []
        for stream in range(32):
            data = cursor.take(stream_lengths[32 * s + stream])
            symbols += _huffman_stream(data, 4 * ceil_div(k, 128), lookup)
        out += symbols[:k]
    return out, escape_words, table


def rans_slots(frequencies: dict[int, int]) -> list[tuple[int, int, int]]:
    """The byte of each of the 4096 slots, the byte's frequency and the slot's rank in it (section 7.6)."""
    order = sorted(frequencies, key=lambda byte: (-frequencies[byte], byte))
    return [(byte, frequencies[byte], rank) for byte in order for rank in range(frequencies[byte])]


def rans_decode(
    payload: bytes, n: int, count: int, escapes: int, shared: Table | None
) -> tuple[list[int], list[int], Table]:
    """The bytes of a rANS block of `count` segments, its escapes as stored, and its table (section 7.6)."""
    cursor = _Cursor(payload)
    segments = _segments(n, count)
    escape_words = cursor.integers(escapes, 4)
    counts = cursor.integers(len(segments), 4)
    states = cursor.integers(32 * len(segments), 4)
    table = shared or _read_table(cursor, RANS)
    for k, words_of in zip(segments, counts, strict=True):
        require(words_of <= 32 * ceil_div(k, 32), "a rANS segment has more words than symbols")
    require(all(2**15 <= x < 2**31 for x in states), "a rANS state is out of range")
    require(cursor.position + 2 * sum(counts) == len(payload), "stored length of a rANS block")

    slots = rans_slots(table.entries)
    out: list[int] = []
    for s, k in enumerate(segments):
        words = cursor.integers(counts[s], 2)
        x = states[32 * s : 32 * s + 32]
        used = 0
        symbols: list[int] = []
        for _ in range(ceil_div(k, 32)):
            for lane in range(32):
                state = x[lane]
                byte, frequency, rank = slots[state & 4095]
                symbols.append(byte)
                state = frequency * (state >> 12) + rank
                if state < 2**15:
                    if used == len(words):
                        raise Corrupt("a rANS segment has too few words")
                    state = state << 16 | words[used]
                    used += 1
                x[lane] = state
        require(used == len(words), "a rANS segment has words left")
        require(all(state == 2**15 for state in x), "a rANS lane does not end in its first state")
        out += symbols[:k]
    return out, escape_words, table


# ---------------------------------------------------------------------------------------------------------------------
# Sections 5, 6 and 8: chunk records


@dataclass(frozen=True)
class Split:
    """A way to cut elements into planes (section 6); `exponent` is 0 when the split has no head."""

    widths: tuple[int, ...]
    exponent: int = 0
    mantissa: int = 0
    joined: tuple[int, ...] = (0,)


SPLITS = {
    0: Split((1, 2, 4, 8)),
    1: Split((1, 2, 4, 8)),
    2: Split((2,), 8, 7, (0, 1, 2)),
    3: Split((2,), 5, 10, (3,)),
    4: Split((4,), 8, 7, (0, 1, 2)),
    5: Split((8,), 11, 4, (0, 1, 2)),
}


@dataclass(frozen=True)
class ChunkHead:
    """The first 48 bytes of a chunk record (section 5)."""

    check: int
    length: int
    run: int
    chunk: int
    elements: int
    split: int
    width: int
    transform: int
    inputs: int
    decoded_sum: int


@dataclass(frozen=True)
class Block:
    """A block entry of a chunk record (section 5)."""

    codec: int
    joined: int
    segments: int
    flags: int
    stored: int
    escapes: int
    value: int
    reserved: int

    @property
    def shares_table(self) -> bool:
        """Whether the block uses an earlier block's table (sections 5 and 7.4)."""
        return bool(self.flags & 1)

    @property
    def sign_mode(self) -> int:
        """The sign mode of section 6.2."""
        return self.flags >> 1 & 3


def read_chunk_head(record: bytes) -> ChunkHead:
    """The head of a chunk record, proven as far as the record alone allows (sections 5 and 8, step 1)."""
    require(48 <= len(record) <= MAX_CHUNK_RECORD and len(record) % 16 == 0, "length of a chunk record")
    magic, *values = struct.unpack("<8sQQIIIBBBBQ", record[:48])
    require(magic == record_magic(b"chnk"), "magic of a chunk record")
    head = ChunkHead(*values)
    require(head.length == len(record), "length of a chunk record")
    require(head.check == sum64(record[16:]), "check of a chunk record")
    require(1 <= head.elements <= CHUNK, "elements of a chunk")
    require(head.width in (1, 2, 4, 8), "width of an element")
    return head


def group_sizes(elements: int, groups: int | None = None) -> list[int]:
    """The elements of each group of a chunk (section 5), whose number a transform may give (section 6.3)."""
    groups = ceil_div(elements, GROUP) if groups is None else groups
    if groups == 0:
        return []
    size = align(ceil_div(elements, groups), 4096)
    return [min(size, elements - start) for start in range(0, elements, size)]


def read_blocks(record: bytes, at: int, count: int) -> list[Block]:
    """The `count` block entries at `at` (section 5)."""
    require(at + 16 * count <= len(record), "the block entries exceed the record")
    blocks = [Block(*struct.unpack_from("<BBBBIIHH", record, at + 16 * i)) for i in range(count)]
    for block in blocks:
        if block.codec not in (RAW, CONSTANT, ZSTANDARD, HUFFMAN, RANS, ADAPTIVE):
            raise Unsupported(f"codec {block.codec}")
    return blocks


def symbol_width(split: Split, plane: int, block: Block) -> int:
    """The bits of a symbol of a block (section 6)."""
    if not split.exponent or plane > 1:
        return 8
    if plane == 0:
        return split.exponent + block.joined
    return split.mantissa - block.joined + (1 if block.sign_mode == 0 else 0)


def _check_block(block: Block, split: Split, plane: int, width: int, opaque: bool) -> None:
    in_head = bool(split.exponent) and plane < 2
    coded = block.codec in (HUFFMAN, RANS)
    require(block.joined in (split.joined if in_head else (0,)), "joined bits")
    require(coded or block.segments == 0, "segments where the codec has none")
    require(block.flags < 8, "flags of a block entry")
    require(coded or not block.shares_table, "a shared table where the codec has none")
    require(block.sign_mode != 3, "sign mode 3")
    require(block.sign_mode == 0 or (in_head and plane == 1), "a sign mode where the plane has none")
    require(coded or block.escapes == 0, "escapes where the codec has none")
    require(block.reserved == 0, "reserved field of a block entry")
    if opaque:
        require(block.codec in (RAW, ZSTANDARD), "codec in the split of bytes")
    if block.codec in (RAW, ZSTANDARD, ADAPTIVE):
        require(width <= 8, "codec of a plane of more than 8 bits")
    if block.codec == CONSTANT:
        require(block.value < 2**width, "the constant exceeds the plane's width")
        require(block.stored == 0, "a constant block with a payload")
    elif not (coded and width > 8):
        require(block.value == 0, "value where there is none")


def _decode_block(block: Block, payload: bytes, n: int, width: int, shared: Table | None) -> tuple[list[int], Table]:
    """Symbols and table of a block of codec 3 or 4 (sections 7.3 to 7.6)."""
    decode = huffman_decode if block.codec == HUFFMAN else rans_decode
    require(block.escapes <= n, "more escapes than symbols")
    coded, escapes, table = decode(payload, n, block.segments, block.escapes, shared)
    largest = max(table.entries)
    if width <= 8:
        require(largest < 2**width, "a byte of the table exceeds the plane's width")
        symbols = coded
    else:
        require(largest < 255, "the byte 255 occurs in the table of a wide plane")
        require(block.value + largest < 2**width, "the base and the largest byte exceed the plane's width")
        symbols = [block.value + c if c else 0 for c in coded]
    last = -1
    for word in escapes:
        symbol, position = word >> 18, word & 2**18 - 1
        require(last < position < n, "positions of the escapes")
        require(symbol < 2**width, "an escape exceeds the plane's width")
        symbols[position] = symbol
        last = position
    return symbols, table


def adaptive_decode(payload: bytes, n: int, width: int) -> list[int]:
    """The symbols of a block of codec 7 (section 7.8)."""
    cursor = _Cursor(payload)
    r, v = 2**32 - 1, int.from_bytes(cursor.take(4), "big")
    require(v < r, "the first bytes of an adaptive block")
    nodes = dict.fromkeys(range(1, 2 ** width), (2**25, 0))
    symbols = []
    for _ in range(n):
        k = 1
        for _ in range(width):
            p, c = nodes[k]
            b, s = r * p >> 26, 131072 // (2 * c + 3)
            if v < b:
                bit, r, p = 1, b, p + ((2**26 - 2048 - p) * s >> 16)
            else:
                bit, r, v, p = 0, r - b, v - b, p - ((p - 2048) * s >> 16)
            nodes[k] = p, min(c + 1, 510)
            k = 2 * k + bit
            while r < 2**24:
                r, v = r << 8, v << 8 | cursor.take(1)[0]
        symbols.append(k - 2**width)
    require(cursor.position == len(payload), "bytes behind an adaptive block")
    return symbols


def _decode_symbols(
    block: Block, payload: bytes, n: int, width: int, previous: Table | None
) -> tuple[list[int], Table | None]:
    """The symbols of a block and the table that a later block of the plane may share (section 7)."""
    if block.codec == RAW:
        return unpack_rows(payload, n, width), previous
    if block.codec == CONSTANT:
        return [block.value] * n, previous
    if block.codec == ZSTANDARD:
        symbols = list(zstd_frame(payload, n))
        require(max(symbols) < 2**width, "a zstandard symbol exceeds the plane's width")
        return symbols, previous
    if block.codec == ADAPTIVE:
        return adaptive_decode(payload, n, width), previous
    shared = None
    if block.shares_table:
        require(previous is not None and previous.codec == block.codec, "no table of this codec to share")
        shared = previous
    return _decode_block(block, payload, n, width, shared)


def _merge_head(key: list[int], rest: list[int], split: Split, joined: int, mode: int) -> list[int]:
    low = split.mantissa - joined
    heads = []
    for k, r in zip(key, rest, strict=True):
        sign = (r >> low, 0, 1)[mode]
        heads.append(sign << 15 | k << low | r & 2**low - 1)
    return heads


@dataclass(frozen=True)
class Transform:
    """The transform header of a chunk record but its block entries (section 6.3)."""

    m: int
    inner_width: int
    a: int
    reserved: int
    size_a: int
    size_b: int
    b: int
    c: int
    v: int
    classes: tuple[int, ...] = ()  # the class sizes of section 6.4


# The parameters and strings that each transform names (section 6.3).
_NAMED = {
    PALETTE: ("a", "size_a"),
    GRID: ("a", "b", "c", "size_a", "size_b"),
    SPARSE: ("v", "size_a"),
    DIFFERENCE: ("b", "c", "v"),
    OFFSET: ("v",),
    ROWS: ("a", "b", "c", "size_a"),
    DELTA: ("a", "b", "c", "v", "size_a", "size_b"),
    RECORDS: ("b", "c", "size_a", "size_b"),
    VOCABULARY: ("b", "v", "size_a", "size_b"),
}
CLASSES = 8
_INTEGERS = {1: "B", 2: "H", 4: "I", 8: "Q"}
# Bytes of a value by the low four bits of a grid's `a`, and by the high four bits.
_GRID_WIDTHS = {0: 2, 1: 2, 2: 4}
_SCALE_WIDTHS = {0: 4, 1: 2, 2: 2}


def blocks_start(transform: int) -> int:
    """Where the block entries of the planes start (section 5)."""
    return 48 + (64 if transform not in (0, UNCHANGED) else 0) + (4 * CLASSES if transform in (DELTA, RECORDS) else 0)


def read_transform(record: bytes, head: ChunkHead) -> tuple[Transform, list[Block]]:
    """The transform header and the block entries of A and B, proven as far as they alone allow (section 6.3)."""
    require(len(record) >= blocks_start(head.transform), "the transform header exceeds the record")
    classes = struct.unpack_from(f"<{CLASSES}I", record, 112) if head.transform in (DELTA, RECORDS) else ()
    header = Transform(*struct.unpack_from("<IBBHIIIIQ", record, 48), classes)
    _check_transform(head, header)
    blocks: list[Block] = []
    for at, size in ((80, header.size_a), (96, header.size_b)):
        if size == 0:
            require_zero(record[at : at + 16], "the entry of an empty block")
        blocks += read_blocks(record, at, 1)
        require(blocks[-1].flags == 0, "flags of a transform's block")
        _check_block(blocks[-1], SPLITS[1], 0, 8, opaque=False)
    return header, blocks


def _check_transform(head: ChunkHead, header: Transform) -> None:
    kind, n, width = head.transform, head.elements, head.width
    require(header.m <= (4 * CHUNK if kind == VOCABULARY else CHUNK), "number of inner elements")
    require(header.inner_width in (1, 2, 4, 8), "width of an inner element")
    require(header.reserved == 0, "reserved field of a transform header")
    require(header.size_a <= GROUP and header.size_b <= (2**22 if kind == DELTA else GROUP), "bytes of a transform's block")
    for name in ("a", "b", "c", "v", "size_a", "size_b"):
        require(name in _NAMED[kind] or getattr(header, name) == 0, f"{name} where the transform has none")
    require(header.v < 2 ** (8 * width), "the transform's value exceeds an element")
    require(header.m <= n or kind == VOCABULARY, "more inner elements than elements")
    require(header.m * header.inner_width <= n * width, "the inner elements exceed the chunk")

    if kind == PALETTE:
        require(header.a in (1, 2, 4, 8), "bits of a palette's index")
        require(header.size_a % width == 0 and 1 <= header.size_a // width <= 2**header.a, "bytes of a palette")
        require((header.m, header.inner_width) == (ceil_div(n * header.a, 8), 1), "inner elements of a palette")
    elif kind == GRID:
        require(_GRID_WIDTHS.get(header.a & 15) == width, "elements of a grid")
        require(header.a >> 4 in _SCALE_WIDTHS, "scales of a grid")
        require(1 <= header.b <= CHUNK and 1 <= header.c <= header.b, "blocks of a grid")
        blocks = 1 + len(range(header.c, n, header.b))
        require(header.size_a == blocks * _SCALE_WIDTHS[header.a >> 4], "number of a grid's scales")
        require(header.size_b % (4 + width) == 0, "bytes of a grid's exceptions")
        require((header.m, header.inner_width) == (n, 1), "inner elements of a grid")
    elif kind == SPARSE:
        require(header.size_a == ceil_div(n, 8), "bytes of a mask")
        require(header.m <= n and header.inner_width == width, "inner elements of a mask")
    elif kind == DIFFERENCE:
        require((header.m, header.inner_width) == (n, width), "inner elements of a difference")
        require(1 <= header.b <= CHUNK, "distance of a difference")
    elif kind == OFFSET:
        require(header.m == n and header.inner_width < width, "inner elements of an offset")
    elif kind == DELTA:
        _check_delta(head, header)
    elif kind == RECORDS:
        require(width == header.inner_width == 1 and head.split == 1, "elements of records")
        require(2 <= header.b <= 4096 and header.c < header.b, "bytes of a record")
        count = (n - header.c) // header.b
        require(count >= 1 and header.m == count * header.b, "number of records")
        require(header.size_a == header.b and header.size_b == n - header.m, "bytes of records that are in no field")
        require(sum(header.classes) == header.m, "the class sizes do not add up")
    elif kind == VOCABULARY:
        require(header.inner_width == 1 and n <= header.m <= 3 * n, "inner elements of a vocabulary")
        require(header.size_a % 4 == 0 and header.size_a // 4 + header.b <= 256, "first bytes of a vocabulary")
    else:
        require((header.m, header.inner_width) == (n, width), "inner elements of rows")
        require(1 <= header.b <= CHUNK and 1 <= header.c <= header.b, "lengths of rows")
        require(header.size_a == 1 + len(range(header.c, n, header.b)), "number of rows")
        require(1 <= header.a <= 32, "number of groups")
        size = align(ceil_div(n, header.a), 4096)
        require(size <= GROUP and (header.a - 1) * size < n, "number of groups")


def _check_delta(head: ChunkHead, header: Transform) -> None:
    """Section 6.4, as far as the header alone allows."""
    n = head.elements
    require(header.inner_width == head.width, "inner elements of a delta")
    require(head.split == 1, "split of a delta")
    require(header.a <= 2, "how the elements of a delta become integers")
    if header.v not in ROLES:
        raise Unsupported(f"predictor {header.v}")
    require(head.inputs == len(ROLES[header.v]), "inputs of a chunk that is predicted")
    require(header.v == 0 or head.width == 4 or (head.width == 2 and header.v in (LOW_RANK, LEVELS)), "width of a prediction")
    require(header.v in (LOW_RANK, LEVELS) or header.size_b == PARAMETERS[header.v], "bytes of a predictor's parameters")
    shift, bits = header.c % 256, header.c // 256
    require(1 <= bits <= 11 and shift + bits <= 8 * head.width, "bits that the class of an element depends on")
    require(header.b < 2**bits, "the first class of a delta")
    require(sum(header.classes) == header.m, "the class sizes do not add up")
    if header.size_a:
        require(header.size_a == ceil_div(n, 8), "bytes of a mask")
        require(1 <= header.m < n, "inner elements of a delta with a mask")
    else:
        require(header.m in (0, n), "inner elements of a delta without a mask")


# The roles that each predictor reads, and the bytes of its parameters (section 6.6).
ADAM, SECOND_MOMENT, LOW_RANK, LEVELS, ROOT, FIRST_MOMENT = range(1, 7)
ROLES = {0: (0,), ADAM: (0, 1, 2), SECOND_MOMENT: (0, 1, 2), LOW_RANK: (0,), LEVELS: (), ROOT: (1,), FIRST_MOMENT: (0, 1)}
PARAMETERS = {0: 0, ADAM: 20, SECOND_MOMENT: 16, ROOT: 4, FIRST_MOMENT: 4}


def _f32(x: float) -> float:
    """Round to binary32 (section 6.6). What two binary32 numbers give in binary64 rounds to what they give in binary32."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", x))[0])
    except OverflowError:
        return copysign(inf, x)


def _divide(x: float, y: float) -> float:
    if y == 0:
        return nan if x == 0 or isnan(x) else copysign(inf, x) * copysign(1, y)
    return x / y


def _root(x: float) -> float:
    return nan if x < 0 or isnan(x) else sqrt(x)


def _bits_of(x: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", x))[0])


def _float_of(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


class Prediction:
    """What a chunk's elements are differences from, and the contexts of their classes (sections 6.4 and 6.6)."""

    def __init__(
        self, kind: int, head: ChunkHead, b: bytes, first: Callable[[], tuple[int, bytes]], roles: list[list[int]]
    ) -> None:
        self.at, self.n, self.width = head.chunk * CHUNK, head.elements, head.width
        self.context: list[int] | None = None
        if kind in (LOW_RANK, LEVELS):
            other, whole = (kind, b) if self.at == 0 else first()
            require(other == kind, "the first chunk has another predictor")
            self.elements = self._low_rank(whole, b, roles[0]) if kind == LOW_RANK else self._levels(whole, b)
        elif kind == ADAM:
            form, c, s, r, e = self._parameters("<Iffff", b)
            require(form in range(4), "form of the weights' update")
            self.elements = [self._weights(form, c, s, r, e, *bits) for bits in zip(*roles, strict=True)]
        elif kind == SECOND_MOMENT:
            w, decay, c = self._parameters("<dff", b)
            self.elements = [self._second_moment(w, decay, c, *bits) for bits in zip(*roles, strict=True)]
        elif kind == ROOT:
            (k,) = self._parameters("<I", b)
            require(k < 2**31, "number of the root")
            self.elements = [((x & 2**31 - 1) // 2 + k) % 2**31 for x in roles[0]]
        else:
            (decay,) = self._parameters("<f", b)
            self.elements = [self._finite(_float_of(w) * decay, w) for w in roles[0]]
            pairs = zip(*roles, strict=True)
            self.context = [max(128 + (x >> 24 & 127) - (w >> 23 & 255), 0) for w, x in pairs]

    @staticmethod
    def _parameters(form: str, b: bytes) -> tuple[Any, ...]:
        numbers = struct.unpack(form, b)
        require(all(isfinite(x) for x in numbers), "a predictor's parameter is not finite")
        return numbers

    @staticmethod
    def _finite(x: float, otherwise: int) -> int:
        rounded = _f32(x)
        return _bits_of(rounded) if isfinite(rounded) else otherwise

    def _weights(self, form: int, c: float, s: float, r: float, e: float, w: int, m: int, v: int) -> int:
        w0, x1, x2 = _float_of(w), _float_of(m), _float_of(v)
        root = _f32(_root(x2))
        d = _f32(_f32(_divide(root, r) if form < 2 else root * r) + e)
        step = _divide(_f32(s * x1), d) if form % 2 == 0 else s * _f32(_divide(x1, d))
        return self._finite(_f32(w0 * c) + _f32(step), w)

    def _second_moment(self, w: float, decay: float, c: float, v: int, before: int, after: int) -> int:
        m0, m1 = _float_of(before), _float_of(after)
        g = _f32(m0 + _divide(m1 - m0, w))
        return self._finite(_f32(_f32(c * g) * g) + _f32(_float_of(v) * decay), v)

    def _rows(self, q: int) -> int:
        return (self.at + self.n - 1) // q - self.at // q + 1

    def _low_rank(self, whole: bytes, b: bytes, old: list[int]) -> list[int]:
        require(len(whole) >= 16, "head of the factors")
        q, rank, t, zero = struct.unpack_from("<IIiI", whole)
        require(1 <= q <= 2**20 and 1 <= rank <= 64 and -1000 <= t <= 100 and zero == 0, "head of the factors")
        cursor = _Cursor(whole)
        cursor.take(16)
        column_bits, row_bits = list(cursor.take(rank)), list(cursor.take(rank))
        require(all(1 <= bits <= 30 for bits in column_bits + row_bits), "bits of factors")
        require(sum(2 ** (x + y - 2) for x, y in zip(column_bits, row_bits, strict=True)) <= 2**52, "factors may overflow")
        columns = self._factors(cursor, q, column_bits)
        if self.at:
            cursor = _Cursor(b)
        rows = self._factors(cursor, self._rows(q), row_bits)
        require(cursor.position == len(cursor.data), "bytes behind the factors")
        out = []
        for i, word in enumerate(old):
            row, column = (self.at + i) // q - self.at // q, (self.at + i) % q
            total = sum(x[row] * y[column] for x, y in zip(rows, columns, strict=True))
            w0 = _float_of(word if self.width == 4 else word << 16)
            bits = _bits_of(_f32(w0 + total * 2.0**t))
            if self.width == 2:
                # To bfloat16, ties to even; NaN and what is infinite already are not finite either way.
                bits = bits if bits >> 23 & 255 == 255 else bits + 0x7FFF + (bits >> 16 & 1)
            infinite = bits >> 23 & 255 == 255
            out.append(word if infinite else bits >> 16 if self.width == 2 else bits)
        return out

    @staticmethod
    def _factors(cursor: _Cursor, n: int, sizes: list[int]) -> list[list[int]]:
        found = []
        for bits in sizes:
            packed = int.from_bytes(cursor.take(ceil_div(n * bits, 8)), "little")
            require(packed >> n * bits == 0, "the unused bits of factors are not zero")
            raw = [packed >> i * bits & 2**bits - 1 for i in range(n)]
            found.append([x - 2**bits if x >> bits - 1 else x for x in raw])
        return found

    def _levels(self, whole: bytes, b: bytes) -> list[int]:
        require(len(whole) >= 4, "number of columns")
        q = int.from_bytes(whole[:4], "little")
        require(1 <= q <= 2**20, "number of columns")
        cursor = _Cursor(whole)
        cursor.take(4)
        columns = cursor.integers(q, 2)
        if self.at:
            cursor = _Cursor(b)
        rows = cursor.integers(self._rows(q), 2)
        require(cursor.position == len(cursor.data), "bytes behind the levels")
        shift = 8 * self.width - 16
        places = (divmod(self.at + i, q) for i in range(self.n))
        return [min(rows[row - self.at // q] + columns[column], 2**16 - 1) << shift for row, column in places]


def class_of(b: int, header: Transform) -> int:
    """The class of an element, given that of the base (section 6.4)."""
    shift, bits = header.c % 256, header.c // 256
    return min(max((b >> shift & 2**bits - 1) - header.b, 0), CLASSES - 1)


def _delta_order(header: Transform, a: bytes, base: Sequence[int]) -> list[int]:
    """The places of the changed elements in the order of the inner ones, given the contexts (section 6.4)."""
    changed = range(len(base)) if header.m else range(0)
    if header.size_a:
        changed = [i for i in changed if a[i // 8] >> i % 8 & 1]
    places: list[list[int]] = [[] for _ in range(CLASSES)]
    for i in changed:
        places[class_of(base[i], header)].append(i)
    require(tuple(len(own) for own in places) == header.classes, "class sizes: another base, or a corrupt chunk")
    return [i for own in places for i in own]


def _ordered(x: int, word: int) -> int:
    """`ord` of section 6.4 for a = 0, `word` bits."""
    return x ^ (2**word - 1 if x >> word - 1 else 2 ** (word - 1))


def _unordered(y: int, word: int) -> int:
    """The x that `_ordered` takes to y."""
    return y ^ (2 ** (word - 1) if y >> word - 1 else 2**word - 1)


def _turned(x: int, word: int) -> int:
    """`ord` of section 6.4 for a = 2."""
    return (x << 3 | x >> word - 3) % 2**word


def _restore_delta(
    header: Transform, width: int, a: bytes, inner: Sequence[int], old: Sequence[int], context: Sequence[int]
) -> list[int]:
    """The elements of a delta (section 6.4)."""
    word = 8 * width
    elements = list(old)
    for i, z in zip(_delta_order(header, a, context), inner, strict=True):
        d = z // 2 if z % 2 == 0 else -(z + 1) // 2
        if header.a == 2:
            elements[i] = _turned_back((_turned(old[i], word) + z - 2 ** (word - 1)) % 2**word, word)
        elif header.a == 1:
            elements[i] = (old[i] + d) % 2**word
        else:
            elements[i] = _unordered((_ordered(old[i], word) + d) % 2**word, word)
    return elements


def _check_strings(head: ChunkHead, header: Transform, a: bytes, b: bytes) -> None:
    """Prove what the decoded A and B of a transform say (section 6.3)."""
    n = head.elements
    if head.transform == GRID:
        require(all(isfinite(scale) for scale in _grid_scales(header, a)), "a scale is not finite")
        last = -1
        for i, _ in _grid_exceptions(b, head.width):
            require(last < i < n, "positions of a grid's exceptions")
            last = i
    elif head.transform == SPARSE or (head.transform == DELTA and header.size_a):
        mask = int.from_bytes(a, "little")
        require(mask >> n == 0, "the unused bits of a mask are not zero")
        require(mask.bit_count() == header.m, "number of a mask's set bits")
    elif head.transform == RECORDS:
        require(max(a) < CLASSES, "field of a record's byte")
        records = header.m // header.b
        require(tuple(records * a.count(f) for f in range(CLASSES)) == header.classes, "class sizes of records")


def _turned_back(x: int, word: int) -> int:
    return (x >> 3 | x << word - 3) % 2**word


def _restore(
    head: ChunkHead, header: Transform, a: bytes, b: bytes, inner: bytes, base: Sequence[int], context: Sequence[int]
) -> bytes:
    """The chunk's elements from its inner elements and the proven strings A and B (section 6.3)."""
    n, width = head.elements, head.width
    if head.transform == PALETTE:
        return _restore_palette(header, n, width, a, inner)
    if head.transform == GRID:
        return _restore_grid(header, n, width, a, b, inner)
    integers = struct.unpack(f"<{header.m}{_INTEGERS[header.inner_width]}", inner)
    end = 2 ** (8 * width)
    if head.transform == SPARSE:
        in_order = iter(integers)
        elements = [next(in_order) if a[i // 8] >> i % 8 & 1 else header.v for i in range(n)]
    elif head.transform == ROWS:
        starts = _grid_blocks(header, n)
        elements = [0] * n
        at = 0
        for i in sorted(range(len(starts)), key=lambda i: a[i]):
            start, end = starts[i]
            elements[start:end] = integers[at : at + end - start]
            at += end - start
    elif head.transform == DIFFERENCE:
        elements = []
        for i, difference in enumerate(integers):
            before = elements[i - header.b] if i >= header.b else header.v + (i - header.b) * header.c
            elements.append((before + difference) % end)
    elif head.transform == DELTA:
        elements = _restore_delta(header, width, a, integers, base, context)
    elif head.transform == RECORDS:
        in_order, records = iter(integers), header.m // header.b
        table = [[0] * header.b for _ in range(records)]
        for f in range(CLASSES):
            for record in table:
                for k in range(header.b):
                    if a[k] == f:
                        record[k] = next(in_order)
        elements = [*b[: header.c], *(byte for record in table for byte in record), *b[header.c :]]
    elif head.transform == VOCABULARY:
        elements = [(header.v + value) % end for value in _vocabulary_values(header, n, a, b, inner)]
    else:
        elements = [(header.v + integer) % end for integer in integers]
    return struct.pack(f"<{n}{_INTEGERS[width]}", *elements)


def _vocabulary_values(header: Transform, n: int, a: bytes, b: bytes, inner: bytes) -> list[int]:
    """The values above v that the codes of a vocabulary stand for (section 6.3, transform 12)."""
    frequent = struct.unpack(f"<{len(a) // 4}I", a)
    others = [i for i in range(8 * len(b)) if b[i // 8] >> i % 8 & 1]
    k, values, at = len(frequent), [], 0
    while len(values) < n:
        require(at < len(inner), "the codes of a vocabulary are too few")
        s = inner[at]
        length = 1 if s < k else 2 if s < k + header.b else 3
        require(at + length <= len(inner), "a code of a vocabulary ends past the inner elements")
        if length == 1:
            values.append(frequent[s])
        else:
            base = 256 * (s - k) if length == 2 else 256 * header.b + 65536 * (s - k - header.b)
            place = base + int.from_bytes(inner[at + 1 : at + length], "big")
            require(place < len(others), "a value that a vocabulary does not have")
            values.append(others[place])
        at += length
    require(at == len(inner), "bytes behind the codes of a vocabulary")
    return values


def _restore_palette(header: Transform, n: int, width: int, a: bytes, inner: bytes) -> bytes:
    count = len(a) // width
    values = [bytes(a[plane * count + i] for plane in reversed(range(width))) for i in range(count)]
    indices = [byte >> bit & 2**header.a - 1 for byte in inner for bit in range(0, 8, header.a)]
    require(not any(indices[n:]), "the unused bits of a palette's last inner element are not zero")
    require(max(indices[:n]) < len(values), "an index exceeds its palette")
    return b"".join([values[index] for index in indices[:n]])


def _grid_blocks(header: Transform, n: int) -> list[tuple[int, int]]:
    """First element and end of each block of a grid, or row; the first one may be the last one, too."""
    starts = [0, *range(header.c, n, header.b)]
    return list(zip(starts, [*starts[1:], n], strict=True))


def _grid_scales(header: Transform, a: bytes) -> list[float]:
    kind = header.a >> 4
    if kind == 2:
        # A bfloat16 is the high half of a float32.
        a = b"".join(b"\0\0" + a[i : i + 2] for i in range(0, len(a), 2))
    code, size = ("e", 2) if kind == 1 else ("f", 4)
    return list(struct.unpack(f"<{len(a) // size}{code}", a))


def _grid_exceptions(b: bytes, width: int) -> list[tuple[int, bytes]]:
    size = 4 + width
    return [(int.from_bytes(b[at : at + 4], "little"), b[at + 4 : at + size]) for at in range(0, len(b), size)]


def _round_float(code: str, x: float) -> bytes:
    """The nearest value, ties to even, of a float type of `struct`; overflow gives infinity."""
    try:
        return struct.pack(code, x)
    except OverflowError:
        return struct.pack(code, copysign(inf, x))


def _grid_element(kind: int, s: int, scale: float) -> bytes:
    """What the rule of a grid gives for the inner element `s`."""
    if s == 0:
        return bytes((4 if kind == 2 else 2) - 1) + b"\x80"
    # Python multiplies in binary64, where the product of two binary32 numbers is exact.
    product = _round_float("<f", (s - 128) * scale)
    if kind == 2:
        return product
    if kind == 1:
        return _round_float("<e", struct.unpack("<f", product)[0])
    bits = int.from_bytes(product, "little")
    # A carry goes into the exponent, and from the largest one to infinity, which itself stays as it is.
    return (bits + 0x7FFF + (bits >> 16 & 1) >> 16).to_bytes(2, "little")


def _restore_grid(header: Transform, n: int, width: int, a: bytes, b: bytes, inner: bytes) -> bytes:
    elements: list[bytes] = []
    for (start, end), scale in zip(_grid_blocks(header, n), _grid_scales(header, a), strict=True):
        part = inner[start:end]
        element = {s: _grid_element(header.a & 15, s, scale) for s in set(part)}
        elements += [element[s] for s in part]
    for i, exception in _grid_exceptions(b, width):
        elements[i] = exception
    return b"".join(elements)


def _payloads(record: bytes, end: int, blocks: Sequence[Block]) -> list[bytes]:
    """The blocks' payloads, which start at `end` and fill the record (section 5)."""
    payloads: list[bytes] = []
    for block in blocks:
        start = align(end, 128 if block.stored >= 16384 else 16)
        require(start + block.stored <= len(record), "a payload exceeds the record")
        require_zero(record[end:start], "padding between payloads")
        payloads.append(record[start : start + block.stored])
        end = start + block.stored
    require(len(record) == align(end, 16), "length of a chunk record")
    require_zero(record[end:], "padding of a chunk record")
    return payloads


def parameters_of(record: bytes) -> tuple[int, bytes]:
    """The predictor of a chunk and its string B; 0 and nothing for a chunk that has none (section 6.6)."""
    head = read_chunk_head(record)
    if head.transform != DELTA:
        return 0, b""
    header, strings = read_transform(record, head)
    elements, width = header.m, header.inner_width
    groups = sum(len(group_sizes(n)) for n in header.classes)
    blocks = read_blocks(record, blocks_start(DELTA), width * groups if elements else 0)
    payloads = _payloads(record, blocks_start(DELTA) + 16 * len(blocks), [*strings, *blocks])
    return header.v, _decode_string(strings[1], payloads[1], header.size_b)


def _no_first() -> bytes:
    raise Corrupt("there is no first chunk")


def decode_chunk(
    record: bytes, role: Callable[[int], bytes] = lambda role: b"", first: Callable[[], bytes] = _no_first
) -> bytes:
    """The decoded element bytes of a chunk record, every rule of sections 5 to 8 enforced.

    `role` is asked for the bytes of a role for the chunk (section 2.8) when the chunk reads it, and only then; `first` for the
    record of the run's first chunk.
    """
    head = read_chunk_head(record)
    if head.inputs > 4:
        raise Unsupported(f"inputs {head.inputs}")
    if head.transform not in (0, UNCHANGED, *_NAMED):
        raise Unsupported(f"transform {head.transform}")
    require(head.inputs == 0 or head.transform in (DELTA, UNCHANGED), "inputs of a chunk")
    if head.transform == UNCHANGED:
        require(head.inputs == 1 and head.split == 0 and len(record) == 48, "an unchanged chunk")
        decoded = role(0)
        require(len(decoded) == head.elements * head.width, "length of the base bytes")
        require(sum64(decoded) == head.decoded_sum, "sum of the decoded bytes")
        return decoded
    if head.split not in SPLITS:
        raise Unsupported(f"split {head.split}")
    header: Transform | None = None
    strings: list[Block] = []
    elements, width, at = head.elements, head.width, 48
    if head.transform:
        header, strings = read_transform(record, head)
        elements, width, at = header.m, header.inner_width, blocks_start(head.transform)
    split = SPLITS[head.split]
    require(width in split.widths, "the split does not have this width")
    planes = 1 if head.split == 0 else width
    if header and head.transform in (DELTA, RECORDS):
        sizes = [n for size in header.classes for n in group_sizes(size)]
    else:
        sizes = group_sizes(elements, header.a if header and head.transform == ROWS else None)
    groups = len(sizes)
    opaque = head.split == 0 and width > 1

    blocks = read_blocks(record, at, planes * groups)
    for i, block in enumerate(blocks):
        _check_block(block, split, i // groups, symbol_width(split, i // groups, block), opaque)
    if split.exponent:
        for group in range(groups):
            require(blocks[group].joined == blocks[groups + group].joined, "joined bits of the planes differ")
    payloads = _payloads(record, at + 16 * len(blocks), [*strings, *blocks])

    a = b = b""
    if header:
        a = _decode_string(strings[0], payloads[0], header.size_a)
        b = _decode_string(strings[1], payloads[1], header.size_b)
        _check_strings(head, header, a, b)
    base: Sequence[int] = ()
    context: Sequence[int] = ()
    if header and head.transform == DELTA:
        roles = []
        for k in ROLES[header.v]:
            raw = role(k)
            require(len(raw) == head.elements * head.width, "length of the bytes of a role")
            roles.append(list(struct.unpack(f"<{head.elements}{_INTEGERS[head.width]}", raw)))
        if header.v:
            made = Prediction(header.v, head, b, lambda: parameters_of(first()), roles)
            base, context = made.elements, made.elements if made.context is None else made.context
        else:
            base = context = roles[0]
    payloads = payloads[len(strings) :]
    if opaque:
        decoded = _decode_opaque(blocks, payloads, [n * width for n in sizes])
    else:
        decoded = _decode_planes(blocks, payloads, sizes, split, planes)
    if header:
        decoded = _restore(head, header, a, b, decoded, base, context)
    require(sum64(decoded) == head.decoded_sum, "sum of the decoded bytes")
    return decoded


def _decode_string(block: Block, payload: bytes, size: int) -> bytes:
    """A or B of a transform (section 6.3)."""
    return bytes(_decode_symbols(block, payload, size, 8, None)[0]) if size else b""


def _decode_opaque(blocks: list[Block], payloads: list[bytes], lengths: list[int]) -> bytes:
    parts = []
    for block, payload, length in zip(blocks, payloads, lengths, strict=True):
        if block.codec == ZSTANDARD:
            payload = zstd_frame(payload, length)
        require(len(payload) == length, "stored length of a raw block")
        parts.append(payload)
    return b"".join(parts)


def _decode_planes(blocks: list[Block], payloads: list[bytes], sizes: list[int], split: Split, count: int) -> bytes:
    groups = len(sizes)
    planes: list[list[list[int]]] = []
    for plane in range(count):
        table: Table | None = None
        planes.append([])
        for group, n in enumerate(sizes):
            i = plane * groups + group
            width = symbol_width(split, plane, blocks[i])
            symbols, table = _decode_symbols(blocks[i], payloads[i], n, width, table)
            planes[plane].append(symbols)
    return b"".join(
        _merge_group([planes[p][group] for p in range(count)], split, blocks[groups + group])
        if split.exponent
        else _merge_bytes([planes[p][group] for p in range(count)])
        for group in range(groups)
    )


def _merge_bytes(planes: list[list[int]]) -> bytes:
    out = bytearray(len(planes) * len(planes[0]))
    for k, symbols in enumerate(planes):
        out[len(planes) - 1 - k :: len(planes)] = bytes(symbols)
    return bytes(out)


def _merge_group(planes: list[list[int]], split: Split, rest_block: Block) -> bytes:
    heads = _merge_head(planes[0], planes[1], split, rest_block.joined, rest_block.sign_mode)
    return _merge_bytes([[h >> 8 for h in heads], [h & 255 for h in heads], *planes[2:]])


# ---------------------------------------------------------------------------------------------------------------------
# Section 2: structures


def record_magic(kind: bytes) -> bytes:
    """The magic of a record (section 2.2)."""
    return b"\xf5TZ" + kind + b"\n"


def read_header(header: bytes) -> None:
    """Prove the archive header: magic and version, then the check, then the rest (section 2.1)."""
    if header[:8] != HEADER_MAGIC:
        raise NotAnArchive("the archive's magic is missing")
    if len(header) < HEADER_LENGTH:
        raise Truncated("the header is not whole")
    fields = struct.unpack("<8sHBBIII24s8s8s", header)
    _, version, chunk_log, group_log, must_understand, _, _, writer, reserved, check = fields
    if version != 1:
        raise Unsupported(f"version {version}")
    require(check == check8(header[:56]), "check of the header")
    if (chunk_log, group_log) != (20, 18):
        raise Unsupported("chunks or groups of another size")
    if must_understand:
        raise Unsupported("a flag that must be understood")
    require(writer.isascii() and b"\0" not in writer.rstrip(b"\0"), "name of the writer")
    require_zero(reserved, "reserved field of the header")


@dataclass(frozen=True)
class Extent:
    """A part of a member's bytes (sections 2 and 2.3)."""

    kind: int
    run: int
    offset: int
    length: int


@dataclass(frozen=True)
class Tensor:
    """A view of an extent's bytes (sections 2 and 2.3); `unsupported` says why it cannot be read."""

    name: str
    dtype: int
    layout: int
    dims: tuple[int, ...]
    extent: int
    offset: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The dimensions (section 2.3)."""
        return self.dims[: len(self.dims) // 2] if self.layout == 1 else self.dims

    @property
    def strides(self) -> tuple[int, ...]:
        """The strides of a strided tensor (section 2.3)."""
        return self.dims[len(self.dims) // 2 :]

    @property
    def span(self) -> int:
        """The bytes from the first element to the last (section 2.3)."""
        if self.layout == 0 or self.size == 0:
            return self.size
        elements = 1 + sum((d - 1) * s for d, s in zip(self.shape, self.strides, strict=True))
        return elements * DTYPE_BITS[self.dtype] // 8

    @property
    def unsupported(self) -> str | None:
        """Why this text cannot read it, or None (sections 2.3 and 3)."""
        if self.layout > 1:
            return f"layout {self.layout}"
        if self.dtype not in DTYPE_BITS:
            return f"dtype {self.dtype}"
        return None

    @property
    def size(self) -> int:
        """The tensor's bytes (section 3)."""
        return ceil_div(prod(self.shape) * DTYPE_BITS[self.dtype], 8)


@dataclass(frozen=True)
class Input:
    """What a part of a run is a difference from (sections 2.3 and 2.8)."""

    kind: int
    offset: int
    length: int
    begin: int
    archive: bytes
    file: bytes
    member: str
    name: str

    @property
    def inner(self) -> bool:
        """Whether it is a tensor of the same member (section 2.8)."""
        return not any(self.archive) and not any(self.file)


@dataclass(frozen=True)
class Run:
    """A sequence of elements (sections 2 and 2.3)."""

    width: int
    inputs: tuple[Input, ...]
    elements: int

    @property
    def unsupported(self) -> str | None:
        """Why this text cannot read its tensors, or None (section 2.3)."""
        kinds = [own.kind for own in self.inputs if own.kind > MAX_ROLE]
        return f"input of kind {kinds[0]}" if kinds else None

    def role_bytes(self, chunk: int, bases: Bases, tensor: Callable[[str], bytes], role: int) -> bytes:
        """The bytes of a role for one of the run's chunks; `tensor` gives those of the member (section 2.8)."""
        start = chunk * CHUNK * self.width
        out = bytearray(self.elements_of(chunk) * self.width)
        theirs = [own for own in self.inputs if own.kind == role]
        require(len(theirs) > 0, "a chunk reads a role that its run has not")
        for own in theirs:
            first, end = max(start, own.offset), min(start + len(out), own.offset + own.length)
            if first < end:
                base = tensor(own.name) if own.inner else _base(own, bases)
                out[first - start : end - start] = base[first - own.offset : end - own.offset]
        return bytes(out)

    @property
    def chunks(self) -> int:
        """The number of the run's chunks (section 2.3)."""
        return ceil_div(self.elements, CHUNK)

    def elements_of(self, chunk: int) -> int:
        """The elements of one of the run's chunks (section 2)."""
        return min(CHUNK, self.elements - chunk * CHUNK)


def _base(own: Input, bases: Bases) -> bytes:
    """The bytes of the base of an input (section 2.8)."""
    for identity in (own.file, own.archive):
        if any(identity) and (identity, own.name) in bases:
            base = bases[identity, own.name]
            require(len(base) >= own.length, "a base is shorter than its input")
            return base
        if any(identity) and (identity, None) in bases and own.begin != NOT_KNOWN:
            base = bases[identity, None][own.begin : own.begin + own.length]
            require(len(base) == own.length, "a base is shorter than its input")
            return base
    raise NoBase(f"the tensor {own.name!r} of {own.member!r}")


@dataclass(frozen=True)
class Chunk:
    """A row of the chunk table (section 2.3)."""

    offset: int
    length: int
    check: int
    codecs: int


@dataclass(frozen=True)
class Member:
    """A member as the index or its member record describes it (section 2.3)."""

    name: str
    kind: int
    flags: int
    mode: int
    mtime: int
    size: int
    sha: bytes
    record: int
    check: int
    first_run: int
    extents: list[Extent] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)

    @property
    def sha256(self) -> bytes | None:
        """The SHA-256 when it is known (section 2.3)."""
        return self.sha if self.flags & FLAG_SHA else None

    @property
    def closed(self) -> bool:
        """Whether no done record follows (section 2.3)."""
        return bool(self.flags & FLAG_CLOSED)

    @property
    def unsupported(self) -> str | None:
        """Why this text cannot read it, or None (sections 2.3 and 3)."""
        if self.kind > BARE:
            return f"kind {self.kind}"
        if self.flags > (FLAG_SHA | FLAG_CLOSED):
            return f"flags {self.flags}"
        if any(extent.kind > FROM_RUN for extent in self.extents):
            return "kind of an extent"
        return None


@dataclass(frozen=True)
class Catalogue:
    """The body of a member or index record (section 2.3)."""

    first_member: int
    first_run: int
    members: list[Member]
    chunks: list[Chunk]
    inline: bytes


_COLUMNS = (
    ("members", ("I", "B", "B", "H", "q", "Q", "32s", "Q", "Q", "I", "I", "I")),
    ("extents", ("B", "I", "Q", "Q")),
    ("tensors", ("I", "B", "B", "B", "I", "Q")),
    ("runs", ("B", "I", "Q")),
    ("inputs", ("B", "Q", "Q", "Q", "32s", "32s", "I", "I")),
    ("chunks", ("Q", "I", "Q", "I")),
    ("dims", ("Q",)),
)


_COUNTS = (
    "members", "extents", "tensors", "runs", "inputs", "chunks", "dims", "heap", "inline", "first_member", "first_run",
    "reserved",
)  # fmt: skip


def read_body(record: bytes) -> bytes:
    """The body of a member or index record whose magic, length and check are proven (section 2.3)."""
    raw_length, stored_length = struct.unpack_from("<II", record, 24)
    require(raw_length <= MAX_BODY and raw_length <= 1024 * stored_length + 2**16, "raw length of a catalogue")
    require(stored_length <= raw_length, "stored length of a catalogue")
    require(len(record) == align(32 + stored_length, 16), "length of a catalogue record")
    require_zero(record[32 + stored_length :], "padding of a catalogue record")
    stored = record[32 : 32 + stored_length]
    return stored if stored_length == raw_length else zstd_frame(stored, raw_length)


def _text(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Corrupt(f"{what} is not UTF-8") from error


def read_catalogue(body: bytes, is_index: bool) -> Catalogue:
    """Take a catalogue body apart and prove each table by itself (section 2.3)."""
    require(len(body) >= 48, "a catalogue body has twelve counts")
    counts = dict(zip(_COUNTS, struct.unpack_from("<12I", body), strict=True))
    require(counts["reserved"] == 0, "reserved count of a catalogue body")
    if is_index:
        require(counts["inline"] == counts["first_member"] == counts["first_run"] == 0, "counts of the index")
    else:
        require(counts["members"] == 1 and counts["chunks"] == 0, "counts of a member record")

    position = 48
    tables: dict[str, list[tuple[int, ...]]] = {}
    shas: dict[str, list[bytes]] = {"members": [], "inputs": []}

    def region(length: int) -> bytes:
        nonlocal position
        start = align(position, 8)
        require(start + length <= len(body), "a column exceeds the catalogue body")
        require_zero(body[position:start], "padding of a catalogue body")
        position = start + length
        return body[start:position]

    for table, types in _COLUMNS:
        columns = []
        for code in types:
            data = region(counts[table] * struct.calcsize("<" + code))
            if code == "32s":
                shas[table] += [data[i : i + 32] for i in range(0, len(data), 32)]
            else:
                columns.append(struct.unpack(f"<{counts[table]}{code}", data))
        tables[table] = list(zip(*columns, strict=True))
    heap = region(counts["heap"])
    inline = region(counts["inline"])
    region(0)
    require(position == len(body), "length of a catalogue body")

    totals = [sum(row[i] for row in tables["members"]) for i in (8, 9, 10)]
    require(totals == [counts["extents"], counts["tensors"], counts["runs"]], "the members' counts do not add up")
    require(sum(row[3] for row in tables["tensors"]) == counts["dims"], "the dimensions do not add up")
    require(sum(row[1] for row in tables["runs"]) == counts["inputs"], "the runs' inputs do not add up")
    lengths = [row[i] for table, i in (("members", 0), ("tensors", 0), ("inputs", 4), ("inputs", 5)) for row in tables[table]]
    require(sum(lengths) == counts["heap"], "the names do not add up to the heap")
    texts, at = [], 0
    for length in lengths:
        texts.append(_text(heap[at : at + length], "a name"))
        at += length
    in_order = iter(texts)
    member_names = [next(in_order) for _ in tables["members"]]
    tensor_names = [next(in_order) for _ in tables["tensors"]]
    input_files = [next(in_order) for _ in tables["inputs"]]
    input_names = [next(in_order) for _ in tables["inputs"]]

    inputs = []
    for i, ((kind, offset, length, begin, _, _), file, name) in enumerate(
        zip(tables["inputs"], input_files, input_names, strict=True)
    ):
        archive, sha = shas["inputs"][i], shas["inputs"][len(input_files) + i]
        inputs.append(Input(kind, offset, length, begin, archive, sha, file, name))

    extents = [Extent(*row) for row in tables["extents"]]
    chunks = [Chunk(*row) for row in tables["chunks"]]
    dims = [row[0] for row in tables["dims"]]
    tensors, at = [], 0
    for name, (_, dtype, layout, ndim, extent, offset) in zip(tensor_names, tables["tensors"], strict=True):
        tensors.append(Tensor(name, dtype, layout, tuple(dims[at : at + ndim]), extent, offset))
        at += ndim
    runs, at = [], 0
    for width, n_inputs, elements in tables["runs"]:
        run = Run(width, tuple(inputs[at : at + n_inputs]), elements)
        at += n_inputs
        require(run.width in (1, 2, 4, 8), "width of a run")
        require(1 <= run.elements < 2**63, "elements of a run")
        kind, end = 0, 0
        for own in run.inputs:
            require(own.length >= 1, "length of an input")
            require(own.kind >= kind, "the kinds of a run's inputs do not ascend")
            require(own.kind > kind or own.offset >= end, "the inputs of a run do not ascend, or overlap")
            kind, end = own.kind, own.offset + own.length
            require(end <= run.elements * run.width, "an input exceeds its run")
        runs.append(run)
    if is_index:
        require(sum(run.chunks for run in runs) == len(chunks), "number of chunks")

    members = []
    x = t = r = 0
    for row, sha, name in zip(tables["members"], shas["members"], member_names, strict=True):
        name_length, kind, flags, mode, mtime, size, record, check, n_extents, n_tensors, n_runs = row
        require(1 <= name_length <= 4096, "length of a member's name")
        member = Member(
            name, kind, flags, mode, mtime, size, sha, record, check, counts["first_run"] + r,
            extents[x : x + n_extents], tensors[t : t + n_tensors], runs[r : r + n_runs],
        )  # fmt: skip
        members.append(member)
        x, t, r = x + n_extents, t + n_tensors, r + n_runs
    return Catalogue(counts["first_member"], counts["first_run"], members, chunks, inline)


def check_member(member: Member, runs: Sequence[Run]) -> None:
    """Prove a member against its own tables; `runs` are the archive's runs from the first one on (section 2.3)."""
    require(member.mode <= 0o7777, "mode of a member")
    require(member.size < 2**63, "size of a member")
    require(member.size == sum(extent.length for extent in member.extents), "size of a member")
    require(member.kind != FOLDER or member.size == 0, "size of a folder")
    require(member.sha256 is not None or not any(member.sha), "a SHA-256 that is not known is zero")
    require(member.closed == (not member.runs), "a member is closed exactly when it has no runs")

    tensors = {tensor.name: tensor for tensor in member.tensors}
    for own in (own for run in member.runs for own in run.inputs if own.inner):
        require(own.name in tensors, "an inner input is no tensor of its member")
        told = tensors[own.name]
        require(told.layout == 0 and told.dtype in DTYPE_BITS, "an inner input that is not flat, or of an unknown type")
        require(own.length <= told.size, "an inner input is longer than its tensor")
        require(own.begin == NOT_KNOWN and own.member == "", "an inner input with a place in another file")
    inline_end = 0
    next_run, end_run = member.first_run, member.first_run + len(member.runs)
    uses: dict[int, list[int]] = {}
    for place, extent in enumerate(member.extents):
        require(extent.length >= 1, "length of an extent")
        if extent.kind == INLINE:
            require(extent.run == 0, "run of an inline extent")
            require(extent.offset == inline_end, "offset of an inline extent")
            inline_end += extent.length
        elif extent.kind == FROM_RUN:
            require(extent.run < end_run, "an extent of a later member's run")
            require(extent.run <= next_run, "the runs are not in the order of their first use")
            next_run = max(next_run, extent.run + 1)
            run = runs[extent.run]
            require(extent.offset + extent.length <= run.elements * run.width, "an extent exceeds its run")
            if run.chunks > 1:
                whole = (0, run.elements * run.width)
                require((extent.offset, extent.length) == whole, "an extent is a part of a long run")
            else:
                uses.setdefault(extent.run, []).append(place)
    if member.unsupported is None:
        require(next_run == end_run, "a run that no extent uses")
    for place in range(len(member.extents)):
        live = sum(1 for places in uses.values() if places[0] <= place < places[-1])
        require(live <= 16, "more than 16 live runs")

    seen: set[str] = set()
    for tensor in member.tensors:
        require(tensor.name not in seen, "two tensors of one name")
        seen.add(tensor.name)
        if tensor.unsupported is None:
            _check_tensor(tensor, member)


def _check_tensor(tensor: Tensor, member: Member) -> None:
    require(tensor.layout == 0 or len(tensor.dims) % 2 == 0, "strides of a tensor")
    require(tensor.dtype != 0 or len(tensor.shape) == 1, "shape of an opaque tensor")
    require(prod(tensor.shape) * DTYPE_BITS[tensor.dtype] % 8 == 0, "a sub-byte tensor does not fill its last byte")
    if tensor.size == 0:
        require(tensor.extent == 0 and tensor.offset == 0, "extent of an empty tensor")
    else:
        require(tensor.extent < len(member.extents), "extent of a tensor")
        require(tensor.offset + tensor.span <= member.extents[tensor.extent].length, "a tensor exceeds its extent")
        if tensor.layout == 1:
            require(DTYPE_BITS[tensor.dtype] % 8 == 0 and tensor.size <= tensor.span, "a strided tensor exceeds its span")


_DEVICES = {"CON", "PRN", "AUX", "NUL"} | {f"{port}{digit}" for port in ("COM", "LPT") for digit in range(10)}


def fold(name: str) -> str:
    """What two names must not share (section 2.4)."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


class Names:
    """The names of an archive's members, proven one by one in archive order (section 2.4)."""

    def __init__(self) -> None:
        self._kinds: dict[str, int] = {}
        self._parents: set[str] = set()

    def add(self, name: str, kind: int) -> None:
        """Prove a name by itself and against all before it (section 2.4)."""
        require(not any(ord(c) < 32 or ord(c) == 127 or c in '\\<>:"|?*' for c in name), f"name {name!r}")
        components = name.split("/")
        require(len(components) <= 64, f"name {name!r} has too many components")
        for component in components:
            require(component not in ("", ".", "..") and component[-1] not in ". ", f"name {name!r}")
            require(not component.casefold().endswith(".tzip-partial"), f"name {name!r}")
            require(component.split(".")[0].upper() not in _DEVICES, f"name {name!r}")
        folded = fold(name)
        require(folded not in self._kinds, f"two members are called {name!r}")
        parts = folded.split("/")
        parents = {"/".join(parts[:i]) for i in range(1, len(parts))}
        for parent in parents:
            # A kind that this text does not define may be a folder; judging it would make a new kind corrupt.
            require(self._kinds.get(parent, FOLDER) not in (FILE, LINK, BARE), f"{name!r} lies in no folder")
        require(kind not in (FILE, LINK, BARE) or folded not in self._parents, f"{name!r} is no folder")
        self._kinds[folded] = kind
        self._parents |= parents


def check_target(name: str, target: bytes) -> list[str]:
    """Prove the target of the symbolic link `name` by itself and return the path that it names (section 2.4)."""
    text = _text(target, "the target of a link")
    require(1 <= len(text) <= 4096 and not text.startswith("/"), "the target of a link is not relative")
    require(not any(ord(c) < 32 or ord(c) == 127 or c in '\\<>:"|?*' for c in text), "characters of a link's target")
    path = name.split("/")[:-1]
    descended = False
    for component in text.split("/"):
        if component == "..":
            require(not descended and bool(path), "a link's target leaves the root, or climbs after it has descended")
            path.pop()
        elif component not in ("", "."):
            descended = True
            path.append(component)
    require(bool(path), "the target of a link is the root")
    return path


def check_targets(paths: dict[str, list[str]]) -> None:
    """Prove that no link's path goes through another link (section 2.4)."""
    links = {fold(name) for name in paths}
    for path in paths.values():
        for i in range(1, len(path)):
            require(fold("/".join(path[:i])) not in links, "the target of a link goes through a link")


def read_record(data: bytes, at: int, end: int) -> tuple[bytes, bytes]:
    """Kind and bytes, the check bare, of the record at `at` (section 2.2); a chunk's check is left to section 8."""
    require(at % 16 == 0 and at + 48 <= end, "place of a record")
    kind = data[at + 3 : at + 7]
    require(kind in (b"memb", b"chnk", b"done", b"indx"), "kind of a record")
    require(data[at : at + 8] == record_magic(kind), "magic of a record")
    length = int.from_bytes(data[at + 16 : at + 24], "little")
    require(length % 16 == 0 and 48 <= length <= end - at, "length of a record")
    record = bare(data[at : at + length], at)
    if kind != b"chnk":
        require(record[8:16] == check8(record[16:]), "check of a record")
    return kind, record


def check_done(record: bytes, ordinal: int, member: Member) -> bytes:
    """Prove a done record against its member and return the SHA-256 (section 2.5)."""
    require(len(record) == 80, "length of a done record")
    size, sha, done_ordinal, flags, reserved = struct.unpack_from("<Q32sII8s", record, 24)
    require((size, done_ordinal) == (member.size, ordinal), "a done record of another member")
    require(flags == member.flags & FLAG_SHA, "flags of a done record")
    require(bool(flags) or not any(sha), "a SHA-256 that is not known is zero")
    require_zero(reserved, "reserved field of a done record")
    return bytes(sha)


def check_chunk_head(head: ChunkHead, run: Run, ordinal: int, chunk: int) -> None:
    """Prove that a chunk record is the one that the run demands (section 8, step 1)."""
    require((head.run, head.chunk) == (ordinal, chunk), "a chunk record of another chunk")
    require((head.elements, head.width) == (run.elements_of(chunk), run.width), "elements or width of a chunk")


def needed_runs(member: Member, run: Run) -> list[int]:
    """The runs that a run of a member depends on (section 2.8)."""
    tensors = {tensor.name: tensor for tensor in member.tensors}
    extents = [member.extents[tensors[own.name].extent] for own in run.inputs if own.inner]
    return [extent.run for extent in extents if extent.kind == FROM_RUN]


def check_dependence(members: Sequence[Member]) -> None:
    """No run depends on itself, and no more than 4 follow from one in a row (section 2.8)."""
    needs = {m.first_run + i: needed_runs(m, run) for m in members for i, run in enumerate(m.runs)}
    reached = {ordinal: set(runs) for ordinal, runs in needs.items()}
    for _ in range(4):
        reached = {ordinal: {x for run in runs for x in needs.get(run, ())} for ordinal, runs in reached.items()}
    require(not any(reached.values()), "runs depend on each other in a circle, or too many in a row")


class Archive:
    """An archive read through its footer and index, every rule of section 2 proven; chunks are proven when read."""

    def __init__(self, data: bytes, bases: Bases | None = None) -> None:
        self._bases = bases or {}
        if data[-8:] != FOOTER_MAGIC:
            read_header(data[:HEADER_LENGTH])
            raise Truncated("the footer is missing")
        if len(data) < HEADER_LENGTH + FOOTER_LENGTH:
            raise Corrupt("shorter than a header and a footer")
        footer = data[-FOOTER_LENGTH:]
        index_offset, index_length, length, self.archive_id, reserved, check, _ = struct.unpack("<QQQ32s8s8s8s", footer)
        require(check == check8(footer[:64]), "check of the footer")
        require_zero(reserved, "reserved field of the footer")
        require(HEADER_LENGTH + FOOTER_LENGTH <= length <= len(data), "length of the archive")
        require(index_offset + index_length + FOOTER_LENGTH == length, "the index does not end at the footer")
        self._data = data = data[len(data) - length :]
        read_header(data[:HEADER_LENGTH])

        kind, index = read_record(data, index_offset, length - FOOTER_LENGTH)
        require(kind == b"indx" and len(index) == index_length, "kind or length of the index record")
        require(hashlib.sha256(index[16:]).digest() == self.archive_id, "SHA-256 of the index record")
        catalogue = read_catalogue(read_body(index), is_index=True)
        self.members = catalogue.members
        self.runs = [run for member in self.members for run in member.runs]
        self.chunks = catalogue.chunks
        self._first_chunk = [0]
        for run in self.runs:
            self._first_chunk.append(self._first_chunk[-1] + run.chunks)
        names = Names()
        for member in self.members:
            names.add(member.name, member.kind)
            check_member(member, self.runs)
        check_dependence(self.members)
        self._inline: list[bytes] = []
        self._check_layout(index_offset)
        links = {m.name: self.member_bytes(i) for i, m in enumerate(self.members) if m.kind == LINK}
        check_targets({name: check_target(name, target) for name, target in links.items()})
        require(sum(m.size for m in self.members) <= length << 17, "the members are larger than the archive can hold")

    def _next(self, end: int, start: int, alignment: int) -> None:
        require(start == align(end, alignment), "a record is not where the one before it ends")
        require_zero(self._data[end:start], "padding between records")

    def _check_layout(self, index_offset: int) -> None:
        """Walk over all structures in archive order (section 2) and compare them with the index (section 2.3)."""
        end = HEADER_LENGTH
        for ordinal, member in enumerate(self.members):
            self._next(end, member.record, 16)
            kind, record = read_record(self._data, member.record, index_offset)
            require(kind == b"memb", "kind of a member record")
            end = member.record + len(record)
            require(record[8:16] == member.check.to_bytes(8, "little"), "the check of a member record in the index")
            own = read_catalogue(read_body(record), is_index=False)
            self._compare(own, member, ordinal)
            self._inline.append(own.inline)

            last_run = member.first_run + len(member.runs)
            for chunk in self.chunks[self._first_chunk[member.first_run] : self._first_chunk[last_run]]:
                require(48 <= chunk.length <= MAX_CHUNK_RECORD and chunk.length % 16 == 0, "length of a chunk record")
                self._next(end, chunk.offset, 128 if chunk.length >= 65536 else 16)
                end = chunk.offset + chunk.length
                require(end <= index_offset, "a chunk record lies past the index")

            if not member.closed:
                at = align(end, 16)
                kind, record = read_record(self._data, at, index_offset)
                require(kind == b"done", "the done record is missing")
                require(check_done(record, ordinal, member) == member.sha, "the done record contradicts the index")
                end = at + len(record)
        self._next(end, index_offset, 16)

    def _compare(self, own: Catalogue, member: Member, ordinal: int) -> None:
        said = own.members[0]
        require((own.first_member, own.first_run) == (ordinal, member.first_run), "ordinals of a member record")
        require(said.record == said.check == 0, "offset or check in a member record")
        require(said.sha == (member.sha if member.closed else bytes(32)), "SHA-256 in a member record")
        for name in ("name", "kind", "flags", "mode", "mtime", "size", "extents", "tensors", "runs"):
            require(getattr(said, name) == getattr(member, name), f"a member record contradicts the index: {name}")
        inline = sum(extent.length for extent in member.extents if extent.kind == INLINE)
        require(len(own.inline) == inline or member.unsupported is not None, "length of the inline heap")

    def chunk_bytes(self, run: int, chunk: int) -> bytes:
        """The decoded bytes of a chunk (section 8)."""
        if self.runs[run].unsupported:
            raise Unsupported(self.runs[run].unsupported)
        row = self.chunks[self._first_chunk[run] + chunk]
        record = bare(self._data[row.offset : row.offset + row.length], row.offset)
        head = read_chunk_head(record)
        require(head.check == row.check, "the chunk's check in the index")
        check_chunk_head(head, self.runs[run], run, chunk)
        owner = next(i for i, m in enumerate(self.members) if m.first_run <= run < m.first_run + len(m.runs))
        return decode_chunk(
            record,
            partial(self.runs[run].role_bytes, chunk, self._bases, partial(self.tensor_bytes, owner)),
            partial(self._first_record, run),
        )

    def _first_record(self, run: int) -> bytes:
        row = self.chunks[self._first_chunk[run]]
        record = bare(self._data[row.offset : row.offset + row.length], row.offset)
        head = read_chunk_head(record)
        require(head.check == row.check, "the chunk's check in the index")
        check_chunk_head(head, self.runs[run], run, 0)
        return record

    def _extent_bytes(self, i: int, extent: Extent, start: int, length: int) -> bytes:
        start += extent.offset
        if extent.kind == INLINE:
            return self._inline[i][start : start + length]
        size = CHUNK * self.runs[extent.run].width
        first = start // size
        chunks = range(first, ceil_div(start + length, size))
        data = b"".join(self.chunk_bytes(extent.run, chunk) for chunk in chunks)
        return data[start - first * size : start - first * size + length]

    def member_bytes(self, i: int) -> bytes:
        """The bytes of a member, proven by its SHA-256 when that is known (sections 2 and 2.3)."""
        member = self.members[i]
        if member.unsupported:
            raise Unsupported(member.unsupported)
        data = b"".join(self._extent_bytes(i, extent, 0, extent.length) for extent in member.extents)
        check_bytes(member, member.sha256, data)
        return data

    def tensor_bytes(self, i: int, name: str) -> bytes:
        """The bytes of a tensor of a member (sections 2.3 and 3)."""
        member = self.members[i]
        tensor = next(tensor for tensor in member.tensors if tensor.name == name)
        reason = member.unsupported or tensor.unsupported
        if reason:
            raise Unsupported(reason)
        if tensor.size == 0:
            return b""
        span = self._extent_bytes(i, member.extents[tensor.extent], tensor.offset, tensor.span)
        if tensor.layout == 0:
            return span
        width = DTYPE_BITS[tensor.dtype] // 8
        places = [0]
        for d, s in zip(tensor.shape, tensor.strides, strict=True):
            places = [at + k * s for at in places for k in range(d)]
        return b"".join(span[at * width : (at + 1) * width] for at in places)


def check_bytes(member: Member, sha: bytes | None, data: bytes) -> None:
    """Prove a member's decoded bytes (sections 2.3 and 2.4)."""
    require(sha is None or hashlib.sha256(data).digest() == sha, "SHA-256 of a member")
    if member.kind == LINK:
        check_target(member.name, data)


class _Pipe:
    """Takes records front to back."""

    def __init__(self, data: bytes) -> None:
        self.data, self.end = data, HEADER_LENGTH

    def next(self) -> tuple[bytes, bytes]:
        data, end = self.data, self.end
        at = align(end, 16)
        if data[at : at + 1] == b"\0":
            # Only a large chunk record is further away than the next multiple of 16.
            at = align(end, 128)
        length = int.from_bytes(data[at + 16 : at + 24], "little")
        if at + 48 > len(data):
            raise Truncated("a record is missing")
        require(data[at : at + 3] == b"\xf5TZ", "magic of a record")
        if length > len(data) - at:
            raise Truncated("a record is not whole")
        kind, record = read_record(data, at, len(data))
        large = kind == b"chnk" and len(record) >= 65536
        require(at == align(end, 128 if large else 16), "a record is not where the one before it ends")
        require_zero(data[end:at], "padding between records")
        self.end = at + len(record)
        return kind, record


def sequential(data: bytes, bases: Bases | None = None) -> list[tuple[str, bytes]]:
    """All members front to back as a pipe reader meets them, without index and footer (sections 2 and 2.3)."""
    read_header(data[:HEADER_LENGTH])
    pipe = _Pipe(data)
    names = Names()
    runs: list[Run] = []
    members: list[Member] = []
    records: dict[int, list[bytes]] = {}
    run_bytes: dict[int, bytes] = {}
    out: list[tuple[str, bytes]] = []

    def decoded(run: int, member: Member, inline: bytes) -> bytes:
        """The bytes of a run, when those that it depends on are there, too."""
        if run not in run_bytes:
            tensors = {tensor.name: tensor for tensor in member.tensors}

            def tensor_bytes(name: str) -> bytes:
                told = tensors[name]
                extent = member.extents[told.extent]
                source = inline if extent.kind == INLINE else decoded(extent.run, member, inline)
                return source[extent.offset + told.offset :][: told.size]

            parts = [
                decode_chunk(
                    record,
                    partial(runs[run].role_bytes, chunk, bases or {}, tensor_bytes),
                    lambda: records[run][0],
                )
                for chunk, record in enumerate(records[run])
            ]
            run_bytes[run] = b"".join(parts)
        return run_bytes[run]

    while True:
        kind, record = pipe.next()
        if kind == b"indx":
            return out
        require(kind == b"memb", "a member record is missing")
        ordinal = len(out)
        catalogue = read_catalogue(read_body(record), is_index=False)
        member = catalogue.members[0]
        require((catalogue.first_member, catalogue.first_run) == (ordinal, len(runs)), "ordinals of a member record")
        require(member.record == member.check == 0, "offset or check in a member record")
        require(member.closed or not any(member.sha), "SHA-256 in the record of a member that is not closed")
        names.add(member.name, member.kind)
        runs += member.runs
        # An open member's SHA-256 stands in its done record, so a zero one with the flag set is as it should be here.
        check_member(member, runs)
        members.append(member)
        check_dependence(members)
        if member.unsupported:
            raise Unsupported(member.unsupported)
        inline = sum(extent.length for extent in member.extents if extent.kind == INLINE)
        require(len(catalogue.inline) == inline, "length of the inline heap")

        for i, run in enumerate(member.runs, member.first_run):
            if run.unsupported:
                raise Unsupported(run.unsupported)
            records[i] = []
            for chunk in range(run.chunks):
                kind, record = pipe.next()
                require(kind == b"chnk", "a chunk record is missing")
                check_chunk_head(read_chunk_head(record), run, i, chunk)
                records[i].append(record)
        for i in range(member.first_run, member.first_run + len(member.runs)):
            decoded(i, member, catalogue.inline)

        sha = member.sha256
        if not member.closed:
            kind, record = pipe.next()
            require(kind == b"done", "the done record is missing")
            done_sha = check_done(record, ordinal, member)
            sha = done_sha if member.flags & FLAG_SHA else None
        sources = [catalogue.inline if extent.kind == INLINE else run_bytes[extent.run] for extent in member.extents]
        content = b"".join(
            source[extent.offset : extent.offset + extent.length]
            for source, extent in zip(sources, member.extents, strict=True)
        )
        check_bytes(member, sha, content)
        out.append((member.name, content))


def main(arguments: Sequence[str]) -> int:
    """Write all file members of an archive into a folder."""
    if len(arguments) != 2:
        print("usage: reference.py ARCHIVE OUTDIR", file=sys.stderr)
        return 2
    archive = Archive(Path(arguments[0]).read_bytes())
    for i, member in enumerate(archive.members):
        path = Path(arguments[1]) / member.name
        if member.kind == FILE:
            content = archive.member_bytes(i)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        elif member.kind == FOLDER:
            path.mkdir(parents=True, exist_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
