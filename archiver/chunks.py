"""One chunk: elements to a chunk record and back (FORMAT.md, sections 5 to 8)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

import numpy as np

from tzip import structure
from tzip.coders import huffman, order, planes, rans, rows, transforms, zstd
from tzip.coders.arrays import U8, U16, U32, Words
from tzip.coders.errors import CorruptError, TruncatedError, UnsupportedError
from tzip.coders.huffman import SLACK, HuffmanTable
from tzip.coders.planes import BYTES, PLANES, SPLITS, WORD, Head, Split
from tzip.coders.rans import RansTable
from tzip.coders.registry import CODECS, CONSTANT, HUFFMAN, RANS, RAW, ZSTD
from tzip.coders.scratch import borrow, recycle
from tzip.coders.sums import Sum, sum64
from tzip.coders.tables import Alphabet, read_escapes, segment_size
from tzip.coders.transforms import Transformed
from tzip.formats.layout import (
    ALIGN,
    CHUNK,
    CHUNK_ELEMENTS,
    MAX_RECORD,
    Block,
    ChunkHead,
    TransformHead,
    align,
    group_size,
    payload_start,
)
from tzip.plan import KeyPlan, Level, Table, choose, dense_byte, dense_rests, plan_keys, segments_of

__all__ = ["SLACK", "EncodedChunk", "decode_chunk", "encode_chunk", "read_blocks"]

_SPLIT_OF = {"bf16": planes.BF16, "f16": planes.F16, "f32": planes.F32, "f64": planes.F64}
_NO_ESCAPES: U32 = np.empty(0, np.uint32)
_SORTED_GROUP = 1 << 18  # elements of a group of sorted rows, about: smaller ones spend on tables what they gain
Buffer = bytes | memoryview | U8
T = TypeVar("T", RansTable, HuffmanTable)


@dataclass(slots=True)
class Coded:
    """A block: its entry, and its payload in pieces."""

    block: Block
    payload: Sequence[Buffer] = ()


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """A chunk record, and what the index says of it."""

    record: bytes | memoryview
    codecs: int

    @property
    def check(self) -> int:
        """The record's check."""
        return int.from_bytes(self.record[8:16], "little")


# ---------------------------------------------------------------- encoding


def encode_chunk(
    raw: U8, width: int, coding: str, level: Level, run: int, chunk: int, row: int = 0, first: int = 0
) -> EncodedChunk:
    """Encode the elements `raw`, shape (elements * width,), as a chunk record.

    `coding` names what suits them: bf16, f16, f32, f64, planes or opaque. `row` is the length of the tensor's last
    dimension, 0 when not known, and `first` the number of its elements before these. The result is never larger than
    the elements stored raw: when the codecs gain nothing, it is them.
    """
    found = None if coding == "opaque" else structure.find(raw, width, coding, row, first)
    if found is not None:
        inner_coding = coding if found.kind == transforms.SPARSE else "planes"
        shorter = replace(level, zstd=level.zstd_short) if found.inner.size * 2 <= raw.size else level
        split, coded = _encode_elements(found.inner, found.inner_width, inner_coding, shorter)
        strings = [_string_block(s, level) for s in (found.side_a, found.side_b)]
        if _stored(coded) + _stored(strings) + 112 + Block.SIZE * len(coded) < raw.size:
            return _record(split, coded, raw, width, run, chunk, sum64(raw), (found, strings))
    # The sum brings the chunk into the cache; a sample counted before it waits for memory at every step (both over 45 MB
    # of bfloat16: 9.6 milliseconds in that order, 3.7 in this).
    total = sum64(raw)
    split, coded = _encode_elements(raw, width, coding, level)
    if level.exhaustive and found is None and coding in _SPLIT_OF and row > 1:
        sorted_rows = _by_rows(raw, width, coding, level, row, first, split, coded)
        if sorted_rows is not None:
            return _record(split, sorted_rows[1], raw, width, run, chunk, total, sorted_rows[0])
    return _record(split, coded, raw, width, run, chunk, total)


def _by_rows(
    raw: U8, width: int, coding: str, level: Level, row: int, before: int, split: Split, coded: list[Coded]
) -> tuple[tuple[Transformed, list[Coded]], list[Coded]] | None:
    """Return a chunk with its rows sorted by scale, when its keys are smaller so than they are in `coded`."""
    head = split.head
    words = raw.view(WORD[width])
    first = row - before % row
    if head is None or not 16 <= order.row_count(words.size, first, row) <= transforms.MAX_STRING:
        return None
    key = coded[0].block
    groups = min(transforms.MAX_GROUPS, max(2, -(-words.size // _SORTED_GROUP)))
    if key.codec not in (HUFFMAN, RANS) or words.size < 1 << 17:
        return None
    same = replace(level, joined=(key.joined,), codecs=(key.codec,))
    shift = 8 * width - 16 + head.mantissa - 2
    classes = order.classify(words, first, row, shift, (4 << head.exponent) - 1, groups)
    found = transforms.rows(raw, width, row, first, classes, groups)
    inner = found.inner.view(WORD[width])
    size = group_size(inner.size, groups)
    blocks = _float_blocks([inner[i : i + size] for i in range(0, inner.size, size)], split, same)
    strings = [_string_block(classes, level), Coded(Block(0))]
    stored = _stored(blocks) + _stored(strings) + Block.SIZE * (len(blocks) + 4)
    return ((found, strings), blocks) if stored < _stored(coded) + Block.SIZE * len(coded) else None


def _encode_elements(raw: U8, width: int, coding: str, level: Level) -> tuple[Split, list[Coded]]:
    """Choose a split and encode its planes."""
    if not raw.size:
        return BYTES, []
    words = raw.view(WORD[width])
    size = group_size(words.size)
    groups = [words[i : i + size] for i in range(0, words.size, size)]
    candidates: list[tuple[Split, list[Coded]]] = []
    if coding == "opaque":
        candidates.append((BYTES, _bytes_blocks(groups, level)))
    elif coding == "planes":
        candidates.append((PLANES, _plane_blocks(groups, level)))
        if _zstd_pays(raw, candidates[0][1], level):
            candidates.append((BYTES, _bytes_blocks(groups, level)))
    else:
        split = _SPLIT_OF[coding]
        blocks = _float_blocks(groups, split, level)
        candidates.append((split, blocks))
        if _stored(blocks) * 100 > raw.size * 95:  # no weights: integers, noise or text behind a float dtype
            candidates.append((PLANES, _plane_blocks(groups, level)))
    split, coded = min(candidates, key=lambda c: _stored(c[1]))
    if _stored(coded) + (len(coded) - len(groups)) * Block.SIZE >= raw.size:
        split, coded = BYTES, [_raw_block(g) for g in groups]
    return split, coded


def _string_block(string: U8, level: Level) -> Coded:
    """Code a byte string of a transform by whatever makes it smallest."""
    if not string.size:
        return Coded(Block(0))
    quick = replace(level, zstd=min(level.zstd, 9))
    options = [_raw_block(string), *_bytes_blocks([string], quick), _symbol_block(string, 8, level)]
    return min(options, key=lambda c: c.block.stored)


def _stored(coded: list[Coded]) -> int:
    return sum(c.block.stored for c in coded)


def _record(
    split: Split,
    coded: list[Coded],
    raw: U8,
    width: int,
    run: int,
    chunk: int,
    decoded_sum: int,
    transform: tuple[Transformed, list[Coded]] | None = None,
) -> EncodedChunk:
    parts: list[Buffer] = []
    at = ChunkHead.SIZE
    kind = 0
    blocks = coded
    if transform is not None:
        t, strings = transform
        kind = t.kind
        head = TransformHead(
            t.inner.size // t.inner_width, t.inner_width, t.a, t.side_a.size, t.side_b.size, t.b, t.c, t.v
        )
        parts.append(head.write())
        at += TransformHead.SIZE
        blocks = strings + coded
    at += Block.SIZE * len(blocks)
    parts += [c.block.write() for c in blocks]
    mask = 0
    for c in blocks:
        if c.block.stored or c.block.codec:
            mask |= 1 << c.block.codec
        start = payload_start(at, c.block.stored)
        parts.append(bytes(start - at))
        parts += c.payload
        at = start + c.block.stored
    end = at
    length = align(at, ALIGN)
    fixed = ChunkHead(length, run, chunk, raw.size // width, split.wire_id, width, kind, 0, decoded_sum)
    record = recycle(length)
    at = 0
    for part in (CHUNK, bytes(8), fixed.write(), *parts, bytes(length - end)):
        to = at + len(part)
        record[at:to] = np.frombuffer(part, np.uint8)
        at = to
    record[8:16] = np.frombuffer(sum64(record[16:]).to_bytes(8, "little"), np.uint8)
    return EncodedChunk(record.data, mask)


def _raw_block(words: Words) -> Coded:
    payload = words.view(np.uint8)
    return Coded(Block(RAW, stored=payload.size), (payload,))


def _bytes_blocks(groups: list[Words], level: Level) -> list[Coded]:
    coded = []
    for words in groups:
        raw = words.view(np.uint8)
        frame = zstd.encode(memoryview(raw), level.zstd)
        coded.append(Coded(Block(ZSTD, stored=len(frame)), (frame,)) if len(frame) < raw.size else _raw_block(words))
    return coded


def _zstd_pays(raw: U8, blocks: list[Coded], level: Level) -> bool:
    """Say whether whole elements are worth trying zstandard: integers with repeats; judged by the first 64 KiB."""
    sample = memoryview(raw[:65536])
    packed = len(zstd.encode(sample, min(level.zstd, 3)))
    # What begins with the first row of many that are alike says too little of the rest, and is quick to try.
    return packed * 16 < len(sample) or packed * raw.size < _stored(blocks) * len(sample)


def _plane_blocks(groups: list[Words], level: Level) -> list[Coded]:
    width = groups[0].itemsize
    coded = []
    for shift in range(8 * width - 8, -1, -8):
        coded += [_byte_block(words, shift, level) for words in groups]
    return coded


def _byte_block(words: Words, shift: int, level: Level) -> Coded:
    """Code one byte plane of one group."""
    if dense_byte(words, shift, level):
        payload = planes.byte_plane(words, shift)
        return Coded(Block(RAW, stored=payload.size), (payload,))
    return _symbol_block(planes.byte_plane(words, shift), 8, level)


def _symbol_block(symbols: U8, bits: int, level: Level) -> Coded:
    """Code symbols of `bits` <= 8 bits by exact counts."""
    choice = choose(planes.byte_counts(symbols, 0), symbols.size, bits, level)
    if choice.codec == CONSTANT:
        return Coded(Block(CONSTANT, value=choice.value))
    if choice.table is None:
        packed = rows.pack(symbols, bits)
        return Coded(Block(RAW, stored=packed.size), (packed,))
    return _entropy_block(symbols, choice.table, False, level, _NO_ESCAPES)


def _entropy_block(symbols: U8, table: Table, shared: bool, level: Level, escapes: U32) -> Coded:
    segments = segments_of(symbols.size, level)
    payload: Sequence[Buffer]
    if isinstance(table, RansTable):
        codec, payload = RANS, rans.encode(symbols, table, shared, segments, escapes)
    else:
        codec, payload = HUFFMAN, huffman.encode(symbols, table, shared, segments, escapes)
    stored = sum(len(part) for part in payload)
    return Coded(Block(codec, 0, segments, int(shared), stored, escapes.size), payload)


def _float_blocks(groups: list[Words], split: Split, level: Level) -> list[Coded]:
    head = split.head
    assert head is not None
    modes = [planes.sign_mode(words) for words in groups]
    plans = plan_keys(groups, head, level)
    dense = dense_rests(groups, head, plans[0].joined, bool(modes[0]), level)
    keys: list[Coded] = []
    rests: list[Coded] = []
    for words, plan, mode in zip(groups, plans, modes, strict=True):
        key, rest = _head_blocks(words, plan, mode, dense, split, level)
        keys.append(key)
        rests.append(rest)
    tails = []
    for shift in range(8 * split.width - 24, -1, -8):
        tails += [_byte_block(words, shift, level) for words in groups]
    return keys + rests + tails


def _head_blocks(
    words: Words, plan: KeyPlan, mode: int, dense: bool, split: Split, level: Level
) -> tuple[Coded, Coded]:
    """Code the keys and the rests of a group; `dense`: rests are stored raw."""
    head = split.head
    assert head is not None
    bits = split.bits(1, plan.joined, mode != 0)
    if dense:
        coded, packed, escapes = planes.split_head(words, head, plan.joined, mode != 0, plan.window)
        rest = Coded(Block(RAW, stored=packed.size), (packed,))
    else:
        coded, symbols, escapes = planes.split_head_loose(words, head, plan.joined, mode != 0, plan.window)
        rest = _symbol_block(symbols, bits, level)
    rest.block = rest.block._replace(joined=plan.joined, flags=rest.block.flags | mode << 1)
    return _key_block(coded, escapes, plan, head, level), rest


def _key_block(coded: U8, escapes: U32, plan: KeyPlan, head: Head, level: Level) -> Coded:
    if plan.codec == CONSTANT:
        return Coded(Block(CONSTANT, plan.joined, value=plan.window.base))
    if plan.table is None:
        packed = rows.pack(coded, head.exponent + plan.joined)
        return Coded(Block(RAW, plan.joined, stored=packed.size), (packed,))
    key = _entropy_block(coded, plan.table, plan.shared, level, escapes)
    key.block = key.block._replace(joined=plan.joined, value=plan.window.base)
    return key


# ---------------------------------------------------------------- decoding


@dataclass(frozen=True, slots=True)
class Layout:
    """What a chunk record says of itself: its head, what the blocks code (`elements` of `width` bytes: inner ones when
    there is a transform) in `groups` of `size`, the entries of all blocks, those of A and B first, the widths of the others'
    symbols in bits, and where the entries end.
    """

    head: ChunkHead
    transform: TransformHead | None
    elements: int
    width: int
    size: int
    groups: int
    strings: list[Block]
    blocks: list[Block]
    widths: list[int]
    end: int


def read_blocks(record: memoryview, run: int, chunk: int, elements: int, width: int) -> Layout:
    """Return the heads and entries of a chunk record after proving what section 8 asks for in steps 1 and 2.

    The check over the record is not computed here. Raises CorruptError, TruncatedError or UnsupportedError.
    """
    head = ChunkHead.read(record)
    if head.length != len(record) or not 64 <= head.length <= MAX_RECORD or head.length % ALIGN:
        raise CorruptError(f"a chunk record of {len(record)} bytes says that it has {head.length}")
    if (head.run, head.chunk, head.elements, head.width) != (run, chunk, elements, width):
        raise CorruptError(
            f"the record holds chunk {head.chunk} of run {head.run} ({head.elements} elements of {head.width} bytes), "
            f"not chunk {chunk} of run {run} ({elements} of {width})"
        )
    if head.inputs:
        raise UnsupportedError("the chunk is a difference from another tensor, which this tzip cannot read; upgrade it")
    split = SPLITS.get(head.split)
    if split is None:
        raise UnsupportedError(f"split {head.split} is not known to this tzip; upgrade it")
    at = ChunkHead.SIZE
    transform: TransformHead | None = None
    strings: list[Block] = []
    if head.transform:
        if head.transform not in transforms.TRANSFORMS:
            raise UnsupportedError(f"transform {head.transform} is not known to this tzip; upgrade it")
        first = at + TransformHead.SIZE
        at = first + 2 * Block.SIZE
        if head.length < at:
            raise TruncatedError("a chunk record ends within the header of its transform")
        transform = TransformHead.read(record[ChunkHead.SIZE : first])
        transforms.check(head.transform, elements, width, transform)
        strings = [Block.read(record[i : i + Block.SIZE]) for i in range(first, at, Block.SIZE)]
        for block, size in zip(strings, (transform.size_a, transform.size_b), strict=True):
            _check_string(block, size)
        elements, width = transform.inner, transform.inner_width
    if split.width not in (0, width):
        raise CorruptError(f"split {split.name} for elements of {width} bytes")
    size = group_size(elements, transform.a if transform is not None and head.transform == transforms.ROWS else 0)
    groups = -(-elements // size) if elements else 0
    end = at + Block.SIZE * groups * split.planes(width)
    if end > head.length:
        raise TruncatedError("a chunk record ends within its block entries")
    blocks = [Block.read(record[i : i + Block.SIZE]) for i in range(at, end, Block.SIZE)]
    widths = [
        _check_block(block, split, i // groups, min(size, elements - i % groups * size), width)
        for i, block in enumerate(blocks)
    ]
    if split.head is not None:
        for key, rest in zip(blocks[:groups], blocks[groups : 2 * groups], strict=True):
            if key.joined != rest.joined:
                raise CorruptError("key and rest of a group disagree about the joined bits")
    return Layout(head, transform, elements, width, size, groups, strings, blocks, widths, end)


def _check_string(block: Block, size: int) -> None:
    if not size:
        if block != Block(0):
            raise CorruptError("an empty string of a transform has an entry")
        return
    if block.flags:
        raise CorruptError("a string of a transform with flags")
    _check_block(block, BYTES, 0, size, 1)


def _check_block(block: Block, split: Split, plane: int, n: int, width: int) -> int:
    """Prove the entry of a block of n symbols; return their width in bits."""
    codec, joined, segments, flags, stored, escapes, value = block
    bits, raw = _rules(codec, joined, segments, flags, value, split.wire_id, plane, n, width)
    if escapes > (n if codec in (HUFFMAN, RANS) else 0):
        raise CorruptError(f"{escapes} escapes in a block of {n} symbols in codec {CODECS[codec].name}")
    if codec == CONSTANT and stored:
        raise CorruptError(f"a constant with {stored} bytes")
    if codec == RAW and stored != raw:
        raise CorruptError(f"raw: {stored} bytes for {n} symbols of {bits} bits")
    return bits


@lru_cache(4096)  # chunks of a tensor say the same: 25 microseconds of 400
def _rules(
    codec: int, joined: int, segments: int, flags: int, value: int, split_id: int, plane: int, n: int, width: int
) -> tuple[int, int]:
    """Prove what an entry says but for its sizes; return the width of its symbols in bits, and the bytes of raw ones."""
    if codec not in CODECS:
        raise UnsupportedError(f"codec {codec} is not known to this tzip; upgrade it")
    split, sign_mode, name = SPLITS[split_id], flags >> 1, CODECS[codec].name
    in_head = split.head is not None and plane < 2
    if in_head and split.head is not None and joined not in split.head.joined:
        raise CorruptError(f"{joined} joined bits in split {split.name}")
    if (joined and not in_head) or (sign_mode and not (in_head and plane == 1)) or sign_mode == 3:
        raise CorruptError("joined bits or a sign mode where the plane has none")
    entropy = codec in (HUFFMAN, RANS)
    if split is BYTES and width > 1 and (entropy or codec == CONSTANT):
        raise CorruptError(f"codec {name} on whole elements of {width} bytes")
    if not entropy and (segments or flags & 1):
        raise CorruptError(f"codec {name} with segments or a table")
    if entropy:
        segment_size(n, segments)
    if value and not (entropy or codec == CONSTANT):
        raise CorruptError(f"codec {name} with a value")
    bits = split.bits(plane, joined, sign_mode != 0)
    if codec == CONSTANT and value >> bits:
        raise CorruptError(f"a constant of {value} in a plane of {bits} bits")
    if codec == ZSTD and bits > 8:
        raise CorruptError("zstd: in a plane of symbols wider than 8 bits")
    if codec == RAW and bits > 8 and split is not BYTES:
        raise CorruptError("raw: in a plane of symbols wider than 8 bits")
    return bits, n * width if split is BYTES else rows.packed_size(n, bits) if bits <= 8 else -1


def decode_chunk(
    buffer: U8, length: int, run: int, chunk: int, elements: int, width: int, out: U8, check: int | None = None
) -> None:
    """Decode the chunk record buffer[:length] into `out`, shape (elements * width,), and prove both its sums.

    `buffer` has SLACK more bytes than the record. `check`: the bare one, when the record does not hold
    it. Raises CorruptError, TruncatedError or UnsupportedError; `out` is then unspecified and must not be used.
    """
    if not 1 <= elements <= CHUNK_ELEMENTS or length < ChunkHead.SIZE:
        raise CorruptError(f"a chunk of {elements} elements in {length} bytes")
    if buffer.size < length + SLACK:
        raise ValueError("decode_chunk needs SLACK bytes behind the record")
    buffer = buffer.view()
    buffer.flags.writeable = False  # kernels are compiled for the one or the other
    record = buffer[:length]
    if sum64(record[16:]) != (int.from_bytes(record[8:16].tobytes(), "little") if check is None else check):
        raise CorruptError("a chunk record does not match its check")
    layout = read_blocks(memoryview(record), run, chunk, elements, width)
    starts = []
    at = layout.end
    for block in layout.strings + layout.blocks:
        start = payload_start(at, block.stored)
        if start + block.stored > length:
            raise TruncatedError("a chunk record ends within a payload")
        if start > at and record[at:start].tobytes().strip(b"\0"):
            raise CorruptError("bytes between payloads are not zero")
        starts.append(start)
        at = start + block.stored
    if align(at, ALIGN) != length or record[at:].any():
        raise CorruptError("a chunk record does not end with its last payload")
    total = Sum()
    if layout.transform is None:
        _Decoder(buffer, layout, starts).decode_into(out, total)
    else:
        _decode_transformed(buffer, layout, layout.transform, starts, out)
        total.add(out)
    if total.value() != layout.head.decoded_sum:
        raise CorruptError("decoded bytes do not match their sum")


def _decode_transformed(buffer: U8, layout: Layout, head: TransformHead, starts: list[int], out: U8) -> None:
    a, b = (
        _decode_string(buffer, layout, block, size, start)
        for block, size, start in zip(layout.strings, (head.size_a, head.size_b), starts[:2], strict=True)
    )
    kind, width = layout.head.transform, layout.head.width
    transforms.check_strings(kind, layout.head.elements, width, head, a, b)
    inner = borrow("inner", head.inner * head.inner_width)
    if inner.size:
        _Decoder(buffer, layout, starts[2:]).decode_into(inner)
    transforms.invert(kind, inner, a, b, head, width, out)


def _decode_string(buffer: U8, layout: Layout, block: Block, size: int, start: int) -> U8:
    string = np.empty(size, np.uint8)
    if size:
        head = replace(layout.head, split=BYTES.wire_id)
        _Decoder(buffer, Layout(head, None, size, 1, size, 1, [], [block], [8], 0), [start]).decode_into(string)
    return string


class _Decoder:
    """Decodes the blocks of one chunk, group by group."""

    def __init__(self, buffer: U8, layout: Layout, starts: list[int]) -> None:
        self.buffer = buffer
        self.split = SPLITS[layout.head.split]
        self.layout = layout
        self.width = layout.width
        self.groups = layout.groups
        self.blocks = layout.blocks
        self.starts = starts
        self.tables: dict[int, Table] = {}
        self.heads = borrow("heads", layout.size if self.split.width > 2 else 0, np.uint16)

    def decode_into(self, out: U8, total: Sum | None = None) -> None:
        """Fill `out`; add it to `total`."""
        words = out.view(WORD[self.width])
        size = self.layout.size
        for group in range(self.groups):
            part = words[group * size : (group + 1) * size]
            if self.split is BYTES:
                self._bytes(group, part.view(np.uint8))
            elif self.split is PLANES:
                view = part.view(np.uint8).reshape(-1, self.width)
                for plane in range(self.width):
                    view[:, self.width - 1 - plane] = self._plane(plane, group, part.size)
            else:
                self._floats(group, part)
            if total is not None:
                total.add(part.view(np.uint8))

    def _entry(self, plane: int, group: int) -> tuple[Block, int, int]:
        """Return the entry of a block, and its width in bits and start."""
        index = plane * self.groups + group
        return self.blocks[index], self.layout.widths[index], self.starts[index]

    def _bytes(self, group: int, out: U8) -> None:
        block, _, start = self._entry(0, group)
        if block.codec == RAW:
            out[:] = self.buffer[start : start + block.stored]
        elif block.codec == ZSTD:
            frame = memoryview(self.buffer[start : start + block.stored])
            out[:] = np.frombuffer(zstd.decode(frame, out.size), np.uint8)
        else:  # elements of one byte
            self._symbols(0, group, out)

    def _plane(self, plane: int, group: int, n: int) -> U8:
        """Return the symbols of a block of at most 8 bits: as they lie in the record, or in scratch memory."""
        block, bits, start = self._entry(plane, group)
        if block.codec == RAW and bits == 8:
            return self.buffer[start : start + block.stored]
        out = borrow(f"plane {plane}", n)
        self._symbols(plane, group, out)
        out.flags.writeable = False
        return out

    def _symbols(self, plane: int, group: int, out: U8) -> None:
        """Fill `out` with the symbols of a block of at most 8 bits."""
        block, bits, start = self._entry(plane, group)
        if block.codec == RANS:
            rans.decode_bytes(self.buffer, self._stream(plane, group, out.size), out)
        else:
            self._coded(plane, group, out)
        if block.escapes:
            positions, values = read_escapes(self.buffer[start : start + 4 * block.escapes], out.size, bits)
            out[positions] = values.astype(np.uint8)

    def _coded(self, plane: int, group: int, out: U8) -> None:
        """Fill `out` with the coded bytes of a block whose codec is not rANS."""
        block, bits, start = self._entry(plane, group)
        stop = start + block.stored
        if block.codec == CONSTANT:
            out[:] = block.value & 255
        elif block.codec == RAW:
            rows.unpack_into(self.buffer[start:stop], bits, out)
        elif block.codec == ZSTD:
            out[:] = np.frombuffer(zstd.decode(memoryview(self.buffer[start:stop]), out.size), np.uint8)
            if bits < 8 and out.size and int(out.max()) >> bits:
                raise CorruptError(f"zstd: a symbol wider than {bits} bits")
        else:
            old = self._shared(plane, block, HuffmanTable)
            table = huffman.decode_into(self.buffer, start, stop, block.escapes, block.segments, old, out)
            Alphabet(bits, block.value).check(table.highest)
            self.tables[plane] = table

    def _shared(self, plane: int, block: Block, kind: type[T]) -> T | None:
        """Return the earlier table that a block uses, None when it has its own."""
        if 4 * block.escapes > block.stored:
            raise TruncatedError("a block ends within its escapes")
        if not block.shared:
            return None
        table = self.tables.get(plane)
        if not isinstance(table, kind):
            raise CorruptError("a block shares a table that does not exist")
        return table

    def _stream(self, plane: int, group: int, n: int) -> rans.Stream:
        block, bits, start = self._entry(plane, group)
        shared = self._shared(plane, block, RansTable)
        stream = rans.open_stream(self.buffer, start, start + block.stored, block.escapes, block.segments, shared, n)
        Alphabet(bits, block.value).check(stream.table.highest)
        self.tables[plane] = stream.table
        return stream

    def _floats(self, group: int, out: Words) -> None:
        head = self.split.head
        assert head is not None
        n = out.size
        rest = self._plane(1, group, n)
        wide = self.split.width > 2
        heads: U16 = self.heads[:n] if wide else out
        key, bits, start = self._entry(0, group)
        low = head.mantissa - key.joined
        sign = 0x8000 if self.blocks[self.groups + group].sign_mode == 2 else 0
        coded = borrow("plane 0", n)
        base = key.value
        if key.codec == RANS:
            rans.decode_heads(self.buffer, self._stream(0, group, n), rest, low, base, sign, coded, heads)
        else:
            if key.codec == CONSTANT:
                coded[:] = key.value > 0
                base = max(0, key.value - 1)
            else:
                self._coded(0, group, coded)
            planes.join(coded, rest, low, base, sign, heads)
        if key.escapes:
            positions, keys = read_escapes(self.buffer[start : start + 4 * key.escapes], n, bits)
            planes.put_keys(heads, low, positions, keys)
        if wide:
            tails = [self._plane(p, group, n) for p in range(2, self.split.width)]
            planes.join_words(heads, tails, out)
