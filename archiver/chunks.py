"""Decoding one chunk: a chunk record to elements (FORMAT.md, sections 5 to 8)."""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import TypeVar

import numpy as np

from tzip.coders import adaptive, huffman, planes, predictors, rans, records, rows, transforms, zstd
from tzip.coders.arrays import I64, U8, U16, Words
from tzip.coders.errors import CorruptError, TruncatedError, UnsupportedError
from tzip.coders.huffman import SLACK, HuffmanTable
from tzip.coders.plane_decoder import decode_planes
from tzip.coders.planes import BYTES, PLANES, SPLITS, WORD, Split
from tzip.coders.predictors import ALONE, Beside, Predicted
from tzip.coders.rans import RansTable
from tzip.coders.record_decoder import decode_record
from tzip.coders.registry import ADAPTIVE, CODECS, CONSTANT, HUFFMAN, RANS, RAW, ZSTD
from tzip.coders.scratch import borrow
from tzip.coders.sums import Sum, sum64
from tzip.coders.tables import Alphabet, read_escapes, segment_size
from tzip.formats.layout import (
    ALIGN,
    CHUNK_ELEMENTS,
    CLASSES,
    MAX_RECORD,
    Block,
    ChunkHead,
    TransformHead,
    align,
    group_cuts,
    group_size,
    payload_start,
)

__all__ = ["SLACK", "Layout", "decode_chunk", "needs", "payload_starts", "read_blocks", "read_parameters"]

HEAD_BYTES = ChunkHead.SIZE + TransformHead.SIZE  # of a record, which say what it is made from
MAX_ROLES = 4
_NO_CLASSES: I64 = np.empty(0, np.int64)
Table = HuffmanTable | RansTable
T = TypeVar("T", RansTable, HuffmanTable)


@dataclass(frozen=True, slots=True)
class Layout:
    """What a chunk record says of itself: its head, what the blocks code (`elements` of `width` bytes: inner ones when
    there is a transform) in groups that begin at `cuts`, whose last entry is where they end, the entries of all blocks, those
    of A and B first, the widths of the others' symbols in bits, where the entries end, and the sizes of the classes.
    """

    head: ChunkHead
    transform: TransformHead | None
    elements: int
    width: int
    cuts: list[int]
    strings: list[Block]
    blocks: list[Block]
    widths: list[int]
    end: int
    classes: I64

    @property
    def groups(self) -> int:
        """The number of groups."""
        return len(self.cuts) - 1


def read_blocks(record: memoryview, run: int, chunk: int, elements: int, width: int) -> Layout:
    """Return the heads and entries of a chunk record after proving what section 8 asks for in steps 1 and 2.

    The check over the record is not computed here. Raises CorruptError, TruncatedError or UnsupportedError.
    """
    head = ChunkHead.read(record)
    if head.length != len(record) or not ChunkHead.SIZE <= head.length <= MAX_RECORD or head.length % ALIGN:
        raise CorruptError(f"a chunk record of {len(record)} bytes says that it has {head.length}")
    if (head.run, head.chunk, head.elements, head.width) != (run, chunk, elements, width):
        raise CorruptError(
            f"the record holds chunk {head.chunk} of run {head.run} ({head.elements} elements of {head.width} bytes), "
            f"not chunk {chunk} of run {run} ({elements} of {width})"
        )
    if head.inputs > MAX_ROLES:
        raise UnsupportedError(f"the chunk is made from {head.inputs} tensors, which this tzip cannot read; upgrade it")
    if head.transform and head.transform not in transforms.TRANSFORMS:
        raise UnsupportedError(f"transform {head.transform} is not known to this tzip; upgrade it")
    leans = head.transform in (transforms.DELTA, transforms.UNCHANGED)
    if head.inputs and not leans:
        raise CorruptError("a chunk has inputs and is no difference")
    if head.transform == transforms.UNCHANGED:
        if head.inputs != 1 or head.split or head.length != ChunkHead.SIZE:
            raise CorruptError("an unchanged chunk with more than its head, or without a base")
        return Layout(head, None, 0, width, [0], [], [], [], head.length, _NO_CLASSES)
    split = SPLITS.get(head.split)
    if split is None:
        raise UnsupportedError(f"split {head.split} is not known to this tzip; upgrade it")
    at = ChunkHead.SIZE
    transform: TransformHead | None = None
    strings: list[Block] = []
    if head.transform:
        first = at + TransformHead.SIZE
        at = first + 2 * Block.SIZE
        if head.length < at:
            raise TruncatedError("a chunk record ends within the header of its transform")
        transform = TransformHead.read(record[ChunkHead.SIZE : first])
        transforms.check(head.transform, elements, width, transform)
        if leans and head.inputs != len(predictors.ROLES[transform.v]):
            raise CorruptError(f"a chunk with {head.inputs} inputs, which its predictor does not have")
        strings = [Block.read(record[i : i + Block.SIZE]) for i in range(first, at, Block.SIZE)]
        for block, size in zip(strings, (transform.size_a, transform.size_b), strict=True):
            _check_string(block, size)
        elements, width = transform.inner, transform.inner_width
    classes = _NO_CLASSES
    classed = head.transform in transforms.CLASSED
    if classed:
        classes = np.frombuffer(record[at : at + 4 * CLASSES], "<u4").astype(np.int64)
        at += 4 * CLASSES
        if head.length < at:
            raise TruncatedError("a chunk record ends within the sizes of its classes")
        if int(classes.sum()) != elements or split is not PLANES:
            raise CorruptError("the sizes of the classes do not add up, or the split is not planes")
    if split.width not in (0, width):
        raise CorruptError(f"split {split.name} for elements of {width} bytes")
    if classed:
        cuts = group_cuts(classes.tolist())
    else:
        size = group_size(elements, transform.a if transform is not None and head.transform == transforms.ROWS else 0)
        cuts = [*range(0, elements, max(size, 1)), elements]
    groups = len(cuts) - 1
    end = at + Block.SIZE * groups * split.planes(width)
    if end > head.length:
        raise TruncatedError("a chunk record ends within its block entries")
    blocks = [Block.read(record[i : i + Block.SIZE]) for i in range(at, end, Block.SIZE)]
    widths = [
        _check_block(block, split, i // groups, cuts[i % groups + 1] - cuts[i % groups], width)
        for i, block in enumerate(blocks)
    ]
    if split.head is not None:
        for key, rest in zip(blocks[:groups], blocks[groups : 2 * groups], strict=True):
            if key.joined != rest.joined:
                raise CorruptError("key and rest of a group disagree about the joined bits")
    return Layout(head, transform, elements, width, cuts, strings, blocks, widths, end, classes)


def payload_starts(record: U8, layout: Layout) -> list[int]:
    """Return where the payloads of all blocks begin, those of A and B first, after proving that nothing else is between them.

    Raises CorruptError or TruncatedError.
    """
    starts = []
    at, length = layout.end, record.size
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
    return starts
def needs(record: memoryview) -> tuple[tuple[int, ...], bool]:
    """Return the roles that a chunk reads and whether it reads the parameters of its run's first chunk.

    `record`: its first HEAD_BYTES bytes, or all there are, of which nothing is proven: what `decode_chunk` then lacks it says.
    """
    head = ChunkHead.read(record)
    if head.transform == transforms.UNCHANGED:
        return (0,), False
    if head.transform != transforms.DELTA or len(record) < HEAD_BYTES:
        return (), False
    kind = int.from_bytes(record[HEAD_BYTES - 8 : HEAD_BYTES], "little")
    return predictors.ROLES.get(kind, ()), kind in predictors.SPREAD and head.chunk > 0


def read_parameters(buffer: U8, length: int, run: int, elements: int, width: int, check: int | None = None) -> tuple[int, U8]:
    """Return the predictor of the first chunk of a run and its string B (0 and nothing where there is none).

    The record buffer[:length] is proven by its check; SLACK more bytes follow it. Raises as `decode_chunk` does.
    """
    if length < ChunkHead.SIZE:
        raise CorruptError(f"a chunk of {elements} elements in {length} bytes")
    buffer = buffer.view()
    buffer.flags.writeable = False
    record = buffer[:length]
    _prove(record, check)
    layout = read_blocks(memoryview(record), run, 0, elements, width)
    head = layout.transform
    if head is None or layout.head.transform != transforms.DELTA:
        return 0, np.empty(0, np.uint8)
    a, b = layout.strings
    start = payload_start(payload_start(layout.end, a.stored) + a.stored, b.stored)
    if start + b.stored > length:
        raise TruncatedError("a chunk record ends within a payload")
    return head.v, _decode_string(buffer, layout, b, head.size_b, start)


def _prove(record: U8, check: int | None) -> None:
    """Compare a record with its check, or with the bare one that is given."""
    if sum64(record[16:]) != (int.from_bytes(record[8:16].tobytes(), "little") if check is None else check):
        raise CorruptError("a chunk record does not match its check")


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
    if split is BYTES and width > 1 and (entropy or codec in (CONSTANT, ADAPTIVE)):
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
    if codec in (ZSTD, ADAPTIVE) and bits > 8:
        raise CorruptError(f"{name}: in a plane of symbols wider than 8 bits")
    if codec == RAW and bits > 8 and split is not BYTES:
        raise CorruptError("raw: in a plane of symbols wider than 8 bits")
    return bits, n * width if split is BYTES else rows.packed_size(n, bits) if bits <= 8 else -1


def decode_chunk(
    buffer: U8,
    length: int,
    run: int,
    chunk: int,
    elements: int,
    width: int,
    out: U8,
    check: int | None = None,
    base: U8 | None = None,
    beside: Beside = ALONE,
) -> None:
    """Decode the chunk record buffer[:length] into `out`, shape (elements * width,), and prove both its sums.

    `buffer` has SLACK more bytes than the record. `check`: the bare one, when the record does not hold it. `base`: the
    bytes of the elements that a delta is a difference from, shape of `out`; `beside`: what a predictor reads besides, see
    `needs`. Raises CorruptError, TruncatedError or
    UnsupportedError; `out` is then unspecified and must not be used.
    """
    if not 1 <= elements <= CHUNK_ELEMENTS or length < ChunkHead.SIZE:
        raise CorruptError(f"a chunk of {elements} elements in {length} bytes")
    if buffer.size < length + SLACK:
        raise ValueError("decode_chunk needs SLACK bytes behind the record")
    buffer = buffer.view()
    buffer.flags.writeable = False  # kernels are compiled for the one or the other
    record = buffer[:length]
    if base is None and beside is ALONE and _at_once(buffer, length, run, chunk, elements, width, out, check):
        return
    _prove(record, check)
    layout = read_blocks(memoryview(record), run, chunk, elements, width)
    starts = payload_starts(record, layout)
    total = Sum()
    if layout.head.transform == transforms.UNCHANGED:
        out[:] = _base(base, out)
        total.add(out)
    elif layout.transform is None:
        _Decoder(buffer, layout, starts).decode_into(out, total)
    else:
        _decode_transformed(buffer, layout, layout.transform, starts, out, base, beside)
        total.add(out)
    if total.value() != layout.head.decoded_sum:
        raise CorruptError("decoded bytes do not match their sum")


def _at_once(
    buffer: U8, length: int, run: int, chunk: int, elements: int, width: int, out: U8, check: int | None
) -> bool:
    """Decode a record of the usual form with one call; return False, with `out` unspecified, when it is none or is wrong."""
    seen = memoryview(buffer)
    head = ChunkHead.read(seen)
    fits = head.length == length and length % ALIGN == 0 and 64 <= length <= MAX_RECORD
    same = (head.run, head.chunk, head.elements, head.width) == (run, chunk, elements, width)
    split = SPLITS.get(head.split)
    if not fits or not same or head.transform or head.inputs or split is None or split.head is None or split.width != width:
        return False
    size = group_size(elements)
    groups = -(-elements // size)
    rest = ChunkHead.SIZE + Block.SIZE * groups
    if rest + Block.SIZE > length:
        return False
    codec, joined, signs = seen[ChunkHead.SIZE], seen[rest + 1], seen[rest + 3] >> 1
    if check is None:
        check = int.from_bytes(seen[8:16], "little")
    sum_ = head.decoded_sum
    return decode_record(buffer, length, check, ChunkHead.SIZE, split, elements, size, joined, signs, codec, sum_, out)


def _decode_transformed(
    buffer: U8, layout: Layout, head: TransformHead, starts: list[int], out: U8, base: U8 | None, beside: Beside
) -> None:
    a, b = (
        _decode_string(buffer, layout, block, size, start)
        for block, size, start in zip(layout.strings, (head.size_a, head.size_b), starts[:2], strict=True)
    )
    kind, width = layout.head.transform, layout.head.width
    transforms.check_strings(kind, layout.head.elements, width, head, a, b)
    predicted: Predicted | None = None
    if kind == transforms.DELTA and head.v:
        roles = dict(beside.roles) if base is None else {0: base, **beside.roles}
        first = layout.head.chunk * CHUNK_ELEMENTS
        predicted = predictors.predict(head.v, b, width, first, layout.head.elements, Beside(roles, beside.first))
        base = predicted.words.view(np.uint8)
    room = borrow("inner", head.inner * head.inner_width + 64)
    inner = room[: head.inner * head.inner_width]
    if inner.size:
        _Decoder(buffer, layout, starts[2:]).decode_into(inner)
    if kind == transforms.RECORDS and not np.array_equal(records.sizes(a, head.inner // head.b), layout.classes):
        raise CorruptError("records: fields of other sizes than the record says")
    if kind != transforms.DELTA:
        transforms.invert(kind, inner, a, b, head, width, out)
        return
    transforms.to_base(room, a, head, layout.classes, width, _base(base, out), out, predicted and predicted.context)


def _base(base: U8 | None, out: U8) -> U8:
    if base is None:
        raise CorruptError("a chunk is a difference from another tensor, and its run names none")
    if base.size != out.size:
        raise CorruptError(f"a base of {base.size} bytes for a chunk of {out.size}")
    return base


def _decode_string(buffer: U8, layout: Layout, block: Block, size: int, start: int) -> U8:
    string = np.empty(size, np.uint8)
    if size:
        head = replace(layout.head, split=BYTES.wire_id)
        _Decoder(buffer, Layout(head, None, size, 1, [0, size], [], [block], [8], 0, _NO_CLASSES), [start]).decode_into(string)
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
        most = max((b - a for a, b in pairwise(layout.cuts)), default=0)
        self.heads = borrow("heads", most if self.split.width > 2 else 0, np.uint16)

    def decode_into(self, out: U8, total: Sum | None = None) -> None:
        """Fill `out`; add it to `total`."""
        words = out.view(WORD[self.width])
        if self.split is PLANES and self._at_once(words):
            if total is not None:
                total.add(out)
            return
        for group, (begin, end) in enumerate(pairwise(self.layout.cuts)):
            part = words[begin:end]
            if self.split is BYTES:
                self._bytes(group, part.view(np.uint8))
            elif self.split is PLANES:
                self._whole(group, part)
            else:
                self._floats(group, part)
            if total is not None:
                total.add(part.view(np.uint8))

    def _at_once(self, out: Words) -> bool:
        """Fill `out` with elements from planes of bytes by one call of a kernel; return False when that cannot be done."""
        rows = [
            (b.codec, b.segments, b.flags, b.stored, b.escapes, b.value, at)
            for b, at in zip(self.blocks, self.starts, strict=True)
        ]
        return decode_planes(self.buffer, np.array(rows, np.int64), np.array(self.layout.cuts, np.int64), out)

    def _whole(self, group: int, out: Words) -> None:
        """Fill `out` with elements from planes of bytes, the lowest first: above it there are often constants."""
        out[:] = self._plane(self.width - 1, group, out.size)
        for plane in range(self.width - 1):
            block, shift = self._entry(plane, group)[0], 8 * (self.width - 1 - plane)
            if block.codec != CONSTANT:
                planes.put_byte(self._plane(plane, group, out.size), shift, out)
            elif block.value:
                out |= out.dtype.type(block.value << shift)

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
        elif block.codec == ADAPTIVE:
            adaptive.decode_into(self.buffer[start:stop], bits, out)
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
