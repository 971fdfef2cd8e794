"""One chunk: elements to a chunk record and back (FORMAT.md, sections 5 to 8)."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tzip.coders import huffman, planes, rans, rows, zstd
from tzip.coders.arrays import U8, U16, U32, Words
from tzip.coders.errors import CorruptError, TruncatedError, UnsupportedError
from tzip.coders.huffman import SLACK, HuffmanTable
from tzip.coders.planes import BYTES, PLANES, SPLITS, WORD, Head, Split
from tzip.coders.rans import RansTable
from tzip.coders.registry import CODECS, CONSTANT, HUFFMAN, RANS, RAW, ZSTD
from tzip.coders.sums import sum64
from tzip.coders.tables import Alphabet, read_escapes
from tzip.formats.layout import (
    ALIGN,
    CHUNK,
    CHUNK_ELEMENTS,
    GROUP_ELEMENTS,
    MAX_RECORD,
    Block,
    ChunkHead,
    align,
    payload_start,
)
from tzip.plan import (
    SAMPLE_STRIDE,
    Level,
    Mapping,
    Table,
    choose,
    coded_size,
    is_small,
    joined_candidates,
    looks_dense,
    make_table,
    map_keys,
    remap,
)

__all__ = ["SLACK", "EncodedChunk", "decode_chunk", "encode_chunk", "read_blocks"]

_SPLIT_OF = {"bf16": planes.BF16, "f16": planes.F16, "f32": planes.F32, "f64": planes.F64}
_NO_ESCAPES: U32 = np.empty(0, np.uint32)
Coded = tuple[Block, bytes | U8]


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """A chunk record, and what the index says of it."""

    record: bytes
    codecs: int

    @property
    def check(self) -> int:
        """The record's check."""
        return int.from_bytes(self.record[8:16], "little")


# ---------------------------------------------------------------- encoding


def encode_chunk(raw: U8, width: int, coding: str, level: Level, run: int, chunk: int) -> EncodedChunk:
    """Encode the elements `raw`, shape (elements * width,), as a chunk record.

    `coding` names what suits them: bf16, f16, f32, f64, planes or opaque. The result is never larger than the elements
    stored raw: when the codecs gain nothing, it is them.
    """
    words = raw.view(WORD[width])
    groups = [words[i : i + GROUP_ELEMENTS] for i in range(0, words.size, GROUP_ELEMENTS)]
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
    return _record(split, coded, raw, width, run, chunk)


def _stored(coded: list[Coded]) -> int:
    return sum(block.stored for block, _ in coded)


def _record(split: Split, coded: list[Coded], raw: U8, width: int, run: int, chunk: int) -> EncodedChunk:
    at = ChunkHead.SIZE + Block.SIZE * len(coded)
    parts: list[bytes | U8] = [block.write() for block, _ in coded]
    mask = 0
    for block, payload in coded:
        mask |= 1 << block.codec
        start = payload_start(at, block.stored)
        parts += (bytes(start - at), payload)
        at = start + block.stored
    length = align(at, ALIGN)
    head = ChunkHead(
        length, run, chunk, raw.size // width, split.wire_id, width, split.planes(width), 0, sum64(raw)
    )
    body = b"".join((head.write(), *(memoryview(p) for p in parts), bytes(length - at)))
    check = sum64(np.frombuffer(body, np.uint8))
    return EncodedChunk(b"".join((CHUNK, check.to_bytes(8, "little"), body)), mask)


def _raw_block(words: Words) -> Coded:
    payload = words.view(np.uint8)
    return Block(RAW, stored=payload.size), payload


def _bytes_blocks(groups: list[Words], level: Level) -> list[Coded]:
    coded = []
    for words in groups:
        raw = words.view(np.uint8)
        frame = zstd.encode(memoryview(raw), level.zstd)
        coded.append((Block(ZSTD, stored=len(frame)), frame) if len(frame) < raw.size else _raw_block(words))
    return coded


def _zstd_pays(raw: U8, blocks: list[Coded], level: Level) -> bool:
    """Say whether whole elements are worth zstandard: integers with repeats; judged by the first 64 KiB."""
    sample = memoryview(raw[:65536])
    return len(zstd.encode(sample, min(level.zstd, 3))) * raw.size < _stored(blocks) * len(sample)


def _plane_blocks(groups: list[Words], level: Level) -> list[Coded]:
    width = groups[0].itemsize
    coded = []
    for shift in range(8 * width - 8, -1, -8):
        coded += [_byte_block(words, shift, level) for words in groups]
    return coded


def _byte_block(words: Words, shift: int, level: Level) -> Coded:
    """Code one byte plane of one group."""
    if not is_small(words.size):
        sample = (words[::SAMPLE_STRIDE] >> words.dtype.type(shift)).astype(np.uint8)
        if looks_dense(sample, 8):
            payload = planes.byte_plane(words, shift)
            return Block(RAW, stored=payload.size), payload
    return _symbol_block(planes.byte_plane(words, shift), 8, level)


def _symbol_block(symbols: U8, bits: int, level: Level) -> Coded:
    """Code symbols of `bits` <= 8 bits by exact counts."""
    choice = choose(planes.byte_counts(symbols, 0), symbols.size, bits, level)
    if choice.codec == CONSTANT:
        return Block(CONSTANT, value=choice.value), b""
    if choice.table is None:
        packed = rows.pack(symbols, bits)
        return Block(RAW, stored=packed.size), packed
    return _entropy_block(symbols, choice.table, False, level, _NO_ESCAPES)


def _entropy_block(symbols: U8, table: Table, shared: bool, level: Level, escapes: U32) -> Coded:
    if isinstance(table, RansTable):
        codec, payload = RANS, rans.encode(symbols, table, shared, level.log_segment, escapes)
    else:
        codec, payload = HUFFMAN, huffman.encode(symbols, table, shared, level.log_segment, escapes)
    block = Block(codec, 0, level.log_segment, int(shared), len(payload), escapes.size)
    return block, payload


@dataclass(frozen=True, slots=True)
class _KeyPlan:
    """How the keys of a group are coded; `size` estimates keys and raw rest together."""

    joined: int
    codec: int
    mapping: Mapping
    table: Table | None
    shared: bool
    size: int


def _float_blocks(groups: list[Words], split: Split, level: Level) -> list[Coded]:
    head = split.head
    assert head is not None
    keys: list[Coded] = []
    rests: list[Coded] = []
    earlier: _KeyPlan | None = None
    for words in groups:
        plan, sign_mode = _plan_keys(words, head, level, earlier)
        if plan.table is not None and not plan.shared:
            earlier = plan
        coded, rest, escapes = planes.split_head(words, head, plan.joined, sign_mode != 0, plan.mapping.window)
        keys.append(_key_block(coded, escapes, plan, head, level))
        bits = split.bits(1, plan.joined, sign_mode != 0)
        block, payload = _rest_block(rest, bits, level)
        rests.append((replace(block, joined=plan.joined, flags=block.flags | sign_mode << 1), payload))
    tails = []
    for shift in range(8 * split.width - 24, -1, -8):
        tails += [_byte_block(words, shift, level) for words in groups]
    return keys + rests + tails


def _plan_keys(words: Words, head: Head, level: Level, earlier: _KeyPlan | None) -> tuple[_KeyPlan, int]:
    """Choose joined bits, codec and table for the keys of a group; also return the sign mode."""
    n = words.size
    candidates = joined_candidates(head, level)
    widest = max(candidates)
    all_counts, negative = planes.key_counts(words, head, widest)
    sign_mode = {0: 1, n: 2}.get(negative, 0)
    best: _KeyPlan | None = None
    for joined in candidates:
        counts = all_counts.reshape(-1, 1 << (widest - joined)).sum(axis=1)
        rest = rows.packed_size(n, head.mantissa - joined + (sign_mode == 0))
        bits = head.exponent + joined
        used = np.flatnonzero(counts)
        if used.size == 1:
            window = planes.Window(int(used[0]), 1, counts.size - 1, True, 0)
            plans = [_KeyPlan(joined, CONSTANT, Mapping(window, np.zeros(256, np.int64), 0), None, False, rest)]
        else:
            plans = _table_plans(counts, n, joined, rest, level, earlier)
            if bits <= 8:
                raw = Mapping(planes.Window(0, 1, counts.size - 1, True, 0), np.zeros(256, np.int64), 0)
                plans.append(_KeyPlan(joined, RAW, raw, None, False, rows.packed_size(n, bits) + rest))
        for plan in plans:
            if best is None or plan.size < best.size:
                best = plan
        # Narrower keys win in small groups, by their smaller tables, or where nothing pays: else don't ask.
        if not level.exhaustive and n >= 32768 and best is not None and best.size < words.size * 2 * 9 // 10:
            break
    assert best is not None
    return best, sign_mode


def _table_plans(
    counts: Any, n: int, joined: int, rest: int, level: Level, earlier: _KeyPlan | None
) -> list[_KeyPlan]:
    plans = []
    if earlier is not None and earlier.joined == joined and earlier.table is not None:
        again = remap(earlier.mapping, counts, earlier.table)
        if again is not None:
            size = coded_size(earlier.codec, earlier.table, True, again.counts, n, again.escapes, level.log_segment)
            plans.append(_KeyPlan(joined, earlier.codec, again, earlier.table, True, size + rest))
    mapping = map_keys(counts, n)
    for codec in level.codecs:
        table = make_table(codec, mapping.counts)
        size = coded_size(codec, table, False, mapping.counts, n, mapping.escapes, level.log_segment)
        plans.append(_KeyPlan(joined, codec, mapping, table, False, size + rest))
    return plans


def _key_block(coded: U8, escapes: U32, plan: _KeyPlan, head: Head, level: Level) -> Coded:
    if plan.codec == CONSTANT:
        return Block(CONSTANT, plan.joined, value=plan.mapping.window.base), b""
    if plan.table is None:
        packed = rows.pack(coded, head.exponent + plan.joined)
        return Block(RAW, plan.joined, stored=packed.size), packed
    block, payload = _entropy_block(coded, plan.table, plan.shared, level, escapes)
    return replace(block, joined=plan.joined, value=plan.mapping.window.base), payload


def _rest_block(rest: U8, bits: int, level: Level) -> Coded:
    if not is_small(rest.size) and looks_dense(rest[::SAMPLE_STRIDE], bits):
        packed = rows.pack(rest, bits)
        return Block(RAW, stored=packed.size), packed
    return _symbol_block(rest, bits, level)


# ---------------------------------------------------------------- decoding


def read_blocks(record: memoryview, run: int, chunk: int, elements: int, width: int) -> tuple[ChunkHead, list[Block]]:
    """Return the head and the block entries of a chunk record after proving what section 8 asks for in steps 1 and 2.

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
    if split.width not in (0, head.width) or head.planes != split.planes(head.width):
        raise CorruptError(f"split {split.name} with {head.planes} planes for elements of {head.width} bytes")
    groups = -(-elements // GROUP_ELEMENTS)
    entries = ChunkHead.SIZE + Block.SIZE * groups * head.planes
    if entries > head.length:
        raise TruncatedError("a chunk record ends within its block entries")
    blocks = [Block.read(record[i : i + Block.SIZE]) for i in range(ChunkHead.SIZE, entries, Block.SIZE)]
    for i, block in enumerate(blocks):
        n = min(GROUP_ELEMENTS, elements - i % groups * GROUP_ELEMENTS)
        _check_block(block, split, i // groups, n, head.width)
    if split.head is not None:
        for key, rest in zip(blocks[:groups], blocks[groups : 2 * groups], strict=True):
            if key.joined != rest.joined:
                raise CorruptError("key and rest of a group disagree about the joined bits")
    return head, blocks


def _check_block(block: Block, split: Split, plane: int, n: int, width: int) -> None:
    if block.codec not in CODECS:
        raise UnsupportedError(f"codec {block.codec} is not known to this tzip; upgrade it")
    in_head = split.head is not None and plane < 2
    if in_head and split.head is not None and block.joined not in split.head.joined:
        raise CorruptError(f"{block.joined} joined bits in split {split.name}")
    if (block.joined and not in_head) or (block.sign_mode and not (in_head and plane == 1)) or block.sign_mode == 3:
        raise CorruptError("joined bits or a sign mode where the plane has none")
    entropy = block.codec in (HUFFMAN, RANS)
    if split is BYTES and width > 1 and (entropy or block.codec == CONSTANT):
        raise CorruptError(f"codec {CODECS[block.codec].name} on whole elements of {width} bytes")
    if not entropy and (block.log_segment or block.escapes or block.shared):
        raise CorruptError(f"codec {CODECS[block.codec].name} with segments, escapes or a table")
    if entropy and (not 12 <= block.log_segment <= 17 or block.escapes > n):
        raise CorruptError(f"segments of 2^{block.log_segment} or {block.escapes} escapes in a block of {n}")
    if block.value and not (entropy or block.codec == CONSTANT):
        raise CorruptError(f"codec {CODECS[block.codec].name} with a value")
    bits = split.bits(plane, block.joined, block.sign_mode != 0)
    if block.codec == CONSTANT and (block.stored or block.value >> bits):
        raise CorruptError(f"a constant of {block.value} with {block.stored} bytes in a plane of {bits} bits")
    if block.codec == RAW:
        size = n * width if split is BYTES else rows.packed_size(n, bits) if bits <= 8 else -1
        if block.stored != size:
            raise CorruptError(f"raw: {block.stored} bytes for {n} symbols of {bits} bits")
    if block.codec == ZSTD and bits > 8:
        raise CorruptError("zstd: in a plane of symbols wider than 8 bits")


def decode_chunk(buffer: U8, length: int, run: int, chunk: int, elements: int, width: int, out: U8) -> None:
    """Decode the chunk record buffer[:length] into `out`, shape (elements * width,), and prove both its sums.

    `buffer` has SLACK more bytes than the record. Raises CorruptError, TruncatedError or UnsupportedError; `out` is then
    unspecified and must not be used.
    """
    if not 1 <= elements <= CHUNK_ELEMENTS or length < ChunkHead.SIZE:
        raise CorruptError(f"a chunk of {elements} elements in {length} bytes")
    record = buffer[:length]
    if sum64(record[16:]) != int.from_bytes(record[8:16].tobytes(), "little"):
        raise CorruptError("a chunk record does not match its check")
    head, blocks = read_blocks(memoryview(record), run, chunk, elements, width)
    starts = []
    at = ChunkHead.SIZE + Block.SIZE * len(blocks)
    for block in blocks:
        start = payload_start(at, block.stored)
        if start + block.stored > length:
            raise TruncatedError("a chunk record ends within a payload")
        if record[at:start].any():
            raise CorruptError("bytes between payloads are not zero")
        starts.append(start)
        at = start + block.stored
    if align(at, ALIGN) != length or record[at:].any():
        raise CorruptError("a chunk record does not end with its last payload")
    _Decoder(buffer, SPLITS[head.split], width, elements, blocks, starts).decode_into(out)
    if sum64(out) != head.decoded_sum:
        raise CorruptError("decoded bytes do not match their sum")


class _Decoder:
    """Decodes the blocks of one chunk, group by group."""

    def __init__(
        self, buffer: U8, split: Split, width: int, elements: int, blocks: list[Block], starts: list[int]
    ) -> None:
        self.buffer = buffer
        self.split = split
        self.width = width
        self.elements = elements
        self.groups = -(-elements // GROUP_ELEMENTS)
        self.blocks = blocks
        self.starts = starts
        self.tables: dict[int, Table] = {}
        size = min(elements, GROUP_ELEMENTS)
        self.scratch = [np.empty(size, np.uint8) for _ in range(split.planes(width))]
        self.heads = np.empty(size, np.uint16)

    def decode_into(self, out: U8) -> None:
        words = out.view(WORD[self.width])
        for group in range(self.groups):
            part = words[group * GROUP_ELEMENTS : (group + 1) * GROUP_ELEMENTS]
            if self.split is BYTES:
                self._bytes(group, part.view(np.uint8))
            elif self.split is PLANES:
                view = part.view(np.uint8).reshape(-1, self.width)
                for plane in range(self.width):
                    view[:, self.width - 1 - plane] = self._plane(plane, group, part.size)
            else:
                self._floats(group, part)

    def _bytes(self, group: int, out: U8) -> None:
        block, start = self.blocks[group], self.starts[group]
        if block.codec == RAW:
            out[:] = self.buffer[start : start + block.stored]
        elif block.codec == ZSTD:
            frame = memoryview(self.buffer[start : start + block.stored])
            out[:] = np.frombuffer(zstd.decode(frame, out.size), np.uint8)
        else:
            out[:] = self._plane(0, group, out.size)

    def _plane(self, plane: int, group: int, n: int) -> U8:
        """Return the symbols of a plane of at most 8 bits, in scratch memory."""
        symbols, positions, values, block = self._symbols(plane, group, n)
        if positions.size:
            symbols[positions] = values.astype(np.uint8)
        bits = self.split.bits(plane, block.joined, block.sign_mode != 0)
        if block.codec == ZSTD and bits < 8 and symbols.size and int(symbols.max()) >> bits:
            raise CorruptError(f"zstd: a symbol wider than {bits} bits")
        return symbols

    def _symbols(self, plane: int, group: int, n: int) -> tuple[U8, U32, U16, Block]:
        """Return the coded bytes of a block (scratch memory), positions and symbols of its escapes, and its entry."""
        index = plane * self.groups + group
        block, start = self.blocks[index], self.starts[index]
        stop = start + block.stored
        out = self.scratch[plane][:n]
        bits = self.split.bits(plane, block.joined, block.sign_mode != 0)
        if block.codec == CONSTANT:
            out[:] = block.value & 255
        elif block.codec == RAW:
            rows.unpack_into(self.buffer[start:stop], bits, out)
        elif block.codec == ZSTD:
            out[:] = np.frombuffer(zstd.decode(memoryview(self.buffer[start:stop]), n), np.uint8)
        else:
            if 4 * block.escapes > block.stored:
                raise TruncatedError("a block ends within its escapes")
            positions, values = read_escapes(self.buffer[start : start + 4 * block.escapes], n, bits)
            self._entropy(block, plane, start, stop, bits, out)
            return out, positions, values, block
        return out, _NO_ESCAPES, np.empty(0, np.uint16), block

    def _entropy(self, block: Block, plane: int, start: int, stop: int, bits: int, out: U8) -> None:
        shared = self.tables.get(plane) if block.shared else None
        if block.shared and not isinstance(shared, RansTable if block.codec == RANS else HuffmanTable):
            raise CorruptError("a block shares a table that does not exist")
        table: Table
        if block.codec == RANS:
            old = shared if isinstance(shared, RansTable) else None
            table = rans.decode_into(self.buffer, start, stop, block.escapes, block.log_segment, old, out)
            highest = int(np.flatnonzero(table.freq)[-1])
        else:
            code = shared if isinstance(shared, HuffmanTable) else None
            table = huffman.decode_into(self.buffer, start, stop, block.escapes, block.log_segment, code, out)
            highest = int(np.flatnonzero(table.lengths)[-1])
        Alphabet(bits, block.value).check(highest)
        self.tables[plane] = table

    def _floats(self, group: int, out: Words) -> None:
        head = self.split.head
        assert head is not None
        n = out.size
        coded, positions, values, key = self._symbols(0, group, n)
        rest = self._plane(1, group, n)
        sign_mode = self.blocks[self.groups + group].sign_mode
        bits = head.exponent + key.joined
        base = key.value
        if key.codec == CONSTANT:
            coded[:] = key.value > 0
            base = max(0, key.value - 1)
        elif key.codec == ZSTD and int(coded.max()) >> bits:
            raise CorruptError(f"zstd: a symbol wider than {bits} bits")
        heads = out if self.split.width == 2 else self.heads[:n]
        planes.join_heads(coded, rest, head, key.joined, sign_mode, base, positions, values, heads)
        if self.split.width > 2:
            tails = [self._plane(p, group, n) for p in range(2, self.split.width)]
            planes.join_words(heads, tails, out)
