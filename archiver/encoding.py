"""Encoding one chunk: elements to a chunk record (FORMAT.md, sections 5 to 7)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from tzip import structure
from tzip.coders import adaptive, delta, huffman, order, planes, predictors, rans, records, rows, transforms, zstd
from tzip.coders.arrays import I64, U8, U32, Words
from tzip.coders.counting import Survey, byte_counts
from tzip.coders.errors import UnsupportedError
from tzip.coders.plane_encoder import encode_planes
from tzip.coders.planes import BYTES, PLANES, WORD, Head, Split
from tzip.coders.predictors import ALONE, Beside, Predicted, Predictor
from tzip.coders.rans import RansTable
from tzip.coders.record_encoder import KeyCoding, encode_planned, encode_record
from tzip.coders.record_planner import plan_record
from tzip.coders.registry import ADAPTIVE, CONSTANT, HUFFMAN, RANS, RAW, ZSTD
from tzip.coders.sampling import runs
from tzip.coders.scratch import recycle
from tzip.coders.sums import same_bytes, sum64
from tzip.coders.transforms import Transformed
from tzip.formats.layout import (
    ALIGN,
    CHUNK,
    CHUNK_ELEMENTS,
    Block,
    ChunkHead,
    TransformHead,
    align,
    group_cuts,
    group_size,
    payload_start,
)
from tzip.plan import (
    DENSE,
    LONG_SEGMENT,
    KeyPlan,
    Level,
    Table,
    choose,
    choose_together,
    dense_byte,
    dense_rests,
    dense_tail,
    plan_keys,
    rules_of,
    segments_of,
    take_survey,
)

_SPLIT_OF = {"bf16": planes.BF16, "f16": planes.F16, "f32": planes.F32, "f64": planes.F64}
_NO_ESCAPES: U32 = np.empty(0, np.uint32)
_SORTED_GROUP = 1 << 18  # elements of a group of sorted rows, about: smaller ones spend on tables what they gain
_SHORT = 4096  # bytes of a string that zstandard's slow levels take no time for
Buffer = bytes | memoryview | U8


@dataclass(slots=True)
class Coded:
    """A block: its entry, and its payload in pieces."""

    block: Block
    payload: Sequence[Buffer] = ()


Moved = tuple[tuple[Transformed, list[Coded]], list[Coded]]
_CLASS_SEGMENT = LONG_SEGMENT  # symbols: what a segment costs is much of what little a class takes
_MASK_SEGMENT = 1 << 18  # bytes of a mask: one segment, for the states of four are a twentieth of it
_LITTLE = 32  # a difference of less than 1 / 32 of the elements is taken unseen
_BETTER = (predictors.ADAM_WEIGHTS, predictors.SECOND_MOMENT, predictors.LOW_RANK)  # or the base itself is


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """A chunk record, and what the index says of it."""

    record: bytes | memoryview
    codecs: int

    @property
    def check(self) -> int:
        """The record's check."""
        return int.from_bytes(self.record[8:16], "little")


def encode_chunk(
    raw: U8,
    width: int,
    coding: str,
    level: Level,
    run: int,
    chunk: int,
    row: int = 0,
    first: int = 0,
    base: U8 | None = None,
    predictor: Predictor | None = None,
    beside: Beside = ALONE,
) -> EncodedChunk:
    """Encode the elements `raw`, shape (elements * width,), as a chunk record.

    `coding` names what suits them: bf16, f16, f32, f64, planes or opaque. `row` is the length of the tensor's last
    dimension, 0 when not known, and `first` the number of its elements before these. With `base`, earlier values of these
    elements, they are stored as differences from them when that is smaller, or from what `predictor` makes of them and of
    `beside`. The result is never larger than
    the elements stored raw: when the codecs gain nothing, it is them.
    """
    # Of elements of 8 bytes a record so short would be more than an archive of its size may hold (FORMAT.md, section 2.3).
    if base is not None and width < 8 and same_bytes(raw, base):
        return _unchanged(raw, width, run, chunk)
    if base is not None or predictor is not None:
        made = _differences(raw, width, coding, level, run, chunk, base, predictor, beside)
        best = min(made, key=lambda r: len(r.record), default=None)
        # Of what is so little there is little to gain: an estimate would take as long as all the rest.
        if best is not None and len(best.record) * _LITTLE < raw.size:
            return best
        if best is not None and len(best.record) * 10 < _alone(raw, width, coding, level) * 9:
            return best
        alone = encode_chunk(raw, width, coding, level, run, chunk, row, first)
        return best if best is not None and len(best.record) < len(alone.record) else alone
    # The sum brings the chunk into the cache; a sample looked at before it waits for memory at every step, with the GIL held.
    total = sum64(raw)
    found = None if coding == "opaque" else structure.find(raw, width, coding, row, first)
    if found is not None and found.kind == transforms.RECORDS:
        blocks = _field_blocks(found, level)
        strings = [_string_block(s, level) for s in (found.side_a, found.side_b)]
        if _stored(blocks) + _stored(strings) + 144 + Block.SIZE * len(blocks) < raw.size:
            return _record(PLANES, blocks, raw, width, run, chunk, total, (found, strings))
    elif found is not None:
        inner_coding = coding if found.kind == transforms.SPARSE else "planes"
        # In codes of a vocabulary level 3 finds what 7 does in elements of two bytes, and 5 to 7 less than it.
        less = found.inner.size * 2 <= raw.size and found.kind != transforms.VOCABULARY
        shorter = replace(level, zstd=level.zstd_short) if less else level
        split, coded = _encode_elements(found.inner, found.inner_width, inner_coding, shorter)
        strings = [_string_block(s, level) for s in (found.side_a, found.side_b)]
        if _stored(coded) + _stored(strings) + 112 + Block.SIZE * len(coded) < raw.size:
            return _record(split, coded, raw, width, run, chunk, total, (found, strings))
    plan = None
    if coding in _SPLIT_OF and not level.exhaustive and raw.size:
        split = _SPLIT_OF[coding]
        usual, counted = _planned(raw, split, level, run, chunk, total)
        if usual is None:
            plan = _plan(raw.view(WORD[width]), group_size(raw.size // width), split, level, counted)
            usual = _at_once(raw, plan, split, level, run, chunk, total)
        if usual is not None:
            return usual
    split, coded = _encode_elements(raw, width, coding, level, plan)
    if level.exhaustive and found is None and coding in _SPLIT_OF and row > 1:
        sorted_rows = _by_rows(raw, width, coding, level, row, first, split, coded)
        if sorted_rows is not None:
            return _record(split, sorted_rows[1], raw, width, run, chunk, total, sorted_rows[0])
    return _record(split, coded, raw, width, run, chunk, total)


def _planned(
    raw: U8, split: Split, level: Level, run: int, chunk: int, total: int
) -> tuple[EncodedChunk | None, Survey | None]:
    """Return the record of floats when all of them is as usual, else None, and what was counted of them if anything was."""
    n = raw.size // split.width
    size = group_size(n)
    rules = rules_of(n, size, split.head, level) if split.head is not None else None
    if rules is None or raw.ctypes.data % split.width:
        return None, None
    words = raw.view(WORD[split.width])
    planned = plan_record(words, split, size, rules)
    if planned is None:
        return None, None
    head = CHUNK + bytes(8) + ChunkHead(0, run, chunk, n, split.wire_id, split.width, 0, 0, total).write()
    found = encode_planned(head, words, split, size, rules.joined, planned)
    if found is None or found[1] * 100 > raw.size * 95:
        return None, planned.survey
    return EncodedChunk(found[0].data, 1 << (RANS if rules.rans else HUFFMAN) | 1 << RAW), planned.survey


def _at_once(
    raw: U8, plan: "_Plan", split: Split, level: Level, run: int, chunk: int, total: int
) -> EncodedChunk | None:
    """Return the record of floats whose keys have tables and whose other planes are dense, None of others."""
    groups = _groups(raw, split.width)
    joined = {key.joined for key in plan.keys}
    small = groups[0].size < DENSE or groups[-1].size < DENSE
    if small or len(joined) > 1 or len(set(plan.modes)) > 1 or not plan.dense or not all(key.table for key in plan.keys):
        return None
    words = raw.view(WORD[split.width])
    if not all(dense_tail(g, counts, level) for plane in plan.tails for g, counts in zip(groups, plane, strict=True)):
        return None
    keys = [
        KeyCoding(key.window, key.table, key.shared, segments_of(g.size, level))
        for key, g in zip(plan.keys, groups, strict=True)
        if key.table is not None
    ]
    fixed = ChunkHead(0, run, chunk, raw.size // split.width, split.wire_id, split.width, 0, 0, total)
    head = CHUNK + bytes(8) + fixed.write()
    found = encode_record(head, words, split, groups[0].size, joined.pop(), plan.modes[0], keys)
    if found is None or found[1] * 100 > raw.size * 95:
        return None
    codec = RANS if isinstance(keys[0].table, RansTable) else HUFFMAN
    return EncodedChunk(found[0].data, 1 << codec | 1 << RAW)


def _alone(raw: U8, width: int, coding: str, level: Level) -> int:
    """Estimate the bytes of a chunk without a base by a part of it."""
    each = 4096 * width
    if raw.size <= 8 * each:
        return 0
    step = raw.size // 4 // width * width
    sample = np.concatenate([raw[i * step : i * step + each] for i in range(4)])
    return (len(encode_chunk(sample, width, coding, level, 0, 0).record) - 112) * raw.size // sample.size


def _unchanged(raw: U8, width: int, run: int, chunk: int) -> EncodedChunk:
    head = ChunkHead(ChunkHead.SIZE, run, chunk, raw.size // width, 0, width, transforms.UNCHANGED, 1, sum64(raw))
    rest = head.write()
    check = sum64(np.frombuffer(bytearray(rest), np.uint8))
    return EncodedChunk(CHUNK + check.to_bytes(8, "little") + rest, 0)


def _differences(
    raw: U8,
    width: int,
    coding: str,
    level: Level,
    run: int,
    chunk: int,
    base: U8 | None,
    predictor: Predictor | None,
    beside: Beside,
) -> list[EncodedChunk]:
    """Return the chunk as differences from the base, from what is predicted, or both, as they promise something."""
    predicted: Predicted | None = None
    if predictor is not None:
        at, n = chunk * CHUNK_ELEMENTS, raw.size // width
        string = predictor.string(at, n)
        roles = beside.roles if base is None else {0: base, **beside.roles}
        try:
            predicted = predictors.predict(predictor.kind, string, width, at, n, Beside(roles, beside.first))
        except UnsupportedError:  # of this thread's arithmetic
            predicted = None
    moved = []
    total = sum64(raw)
    if predicted is not None and predictor is not None:
        words = predicted.words.view(np.uint8)
        far = _distance(raw, words, width, coding) + 8 * string.size
        promising = base is None or predictor.kind not in _BETTER or far < _distance(raw, base, width, coding)
        if promising or level.exhaustive:
            context = None if predicted.context is predicted.words else predicted.context
            made = transforms.from_base(raw, width, coding, words, predictor.kind, string, context)
            moved.append(_difference(raw, width, level, run, chunk, total, *made))
        if promising and not level.exhaustive:
            return moved
    if base is not None:
        made = transforms.from_base(raw, width, coding, base)
        moved.append(_difference(raw, width, level, run, chunk, total, *made))
    return moved


def _distance(raw: U8, base: U8, width: int, coding: str) -> int:
    """Return about how many bits the differences from a base have together."""
    n = raw.size // width
    a, b = (runs(words.view(WORD[width]), 64, 256).reshape(-1).copy() for words in (raw, base))
    apart = delta.subtract(a, b, transforms.delta_mode(coding)).astype(np.float64)
    return int(np.log2(apart + 1).sum() * n / a.size)


def _from_base(
    raw: U8,
    width: int,
    coding: str,
    level: Level,
    base: U8,
    predictor: int = 0,
    string: U8 | None = None,
    context: Words | None = None,
) -> Moved:
    """Return a chunk as differences from a base, or from what a predictor made: what `_record` needs."""
    return _class_blocks(*transforms.from_base(raw, width, coding, base, predictor, string, context), width, level)


def _difference(
    raw: U8, width: int, level: Level, run: int, chunk: int, total: int, found: Transformed, classes: list[Words]
) -> EncodedChunk:
    """Return the record of a chunk that `transforms.from_base` has taken apart: by one kernel, where that knows the level."""
    strings = [_mask_block(found.side_a, level), _string_block(found.side_b, level)]
    if level.codecs == (RANS,) and not level.exhaustive and classes:
        made = _classes_at_once(raw, width, run, chunk, total, found, strings, [c.size for c in classes])
        if made is not None:
            return made
    moved, blocks = _class_blocks(found, classes, width, level)
    return _record(PLANES, blocks, raw, width, run, chunk, total, moved)


def _classes_at_once(
    raw: U8, width: int, run: int, chunk: int, total: int, found: Transformed, strings: list[Coded], sizes: list[int]
) -> EncodedChunk | None:
    """Return the record that `_record` makes of the classes' blocks; None while the kernel is not worth compiling."""
    room, each = delta.classed(sum(sizes), WORD[width])
    cuts = [(k * each + a, b - a) for k, size in enumerate(sizes) for a, b in pairwise(group_cuts([size]))]
    begins, counts = np.array(cuts, np.int64).reshape(-1, 2).T.copy()
    head = TransformHead(
        found.inner.size // width, width, found.a, found.side_a.size, found.side_b.size, found.b, found.c, found.v
    )
    front = head.write() + b"".join(c.block.write() for c in strings) + found.sizes
    entries = ChunkHead.SIZE + len(front)
    at = entries + Block.SIZE * width * len(cuts)
    record = recycle(align(at, ALIGN) + _stored(strings) + sum(sizes) * width * 9 // 8 + 65536)
    record[ChunkHead.SIZE : entries] = np.frombuffer(front, np.uint8)
    mask = 0
    for c in strings:
        if c.block.stored or c.block.codec:
            mask |= 1 << c.block.codec
        start = payload_start(at, c.block.stored)
        record[at:start] = 0
        at = start
        for piece in c.payload:
            record[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
            at += len(piece)
    done = encode_planes(room, begins, counts, _CLASS_SEGMENT, record, entries, at)
    if done is None:
        return None
    end, _, codecs = done
    length = align(end, ALIGN)
    record[end:length] = 0
    inputs = len(predictors.ROLES[found.v])
    fixed = ChunkHead(length, run, chunk, raw.size // width, PLANES.wire_id, width, transforms.DELTA, inputs, total)
    record[: ChunkHead.SIZE] = np.frombuffer(CHUNK + bytes(8) + fixed.write(), np.uint8)
    record = record[:length]
    record[8:16] = np.frombuffer(sum64(record[16:]).to_bytes(8, "little"), np.uint8)
    return EncodedChunk(record.data, mask | codecs)


def _class_blocks(found: Transformed, classes: list[Words], width: int, level: Level) -> Moved:
    strings = [_mask_block(found.side_a, level), _string_block(found.side_b, level)]
    level = replace(level, segment=_CLASS_SEGMENT)
    groups = [words[a:b] for words in classes for a, b in pairwise(group_cuts([words.size]))]
    blocks: list[Coded] = []
    most = [int(words.max()) for words in groups]
    for shift in range(8 * width - 8, -1, -8):
        blocks += [
            Coded(Block(CONSTANT)) if top >> shift == 0 else _class_block(words, shift, level)
            for words, top in zip(groups, most, strict=True)
        ]
    return (found, strings), blocks


def _field_blocks(found: Transformed, level: Level) -> list[Coded]:
    """Return the blocks of records, whose fields are cut into groups by themselves."""
    parts = records.take_apart(found.inner, found.side_a)
    return [_byte_block(part[a:b], 0, level) for part in parts for a, b in pairwise(group_cuts([part.size]))]


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
    blocks = _float_blocks(inner, size, split, same)
    strings = [_string_block(classes, level), Coded(Block(0))]
    stored = _stored(blocks) + _stored(strings) + Block.SIZE * (len(blocks) + 4)
    return ((found, strings), blocks) if stored < _stored(coded) + Block.SIZE * len(coded) else None


def _encode_elements(
    raw: U8, width: int, coding: str, level: Level, plan: "_Plan | None" = None
) -> tuple[Split, list[Coded]]:
    """Choose a split and encode its planes; `plan`: that of floats, when it is made already."""
    if not raw.size:
        return BYTES, []
    groups = _groups(raw, width)
    candidates: list[tuple[Split, list[Coded]]] = []
    if coding == "opaque":
        candidates.append((BYTES, _bytes_blocks(groups, level)))
    elif coding == "planes":
        candidates.append((PLANES, _plane_blocks(groups, level)))
        if _zstd_pays(raw, candidates[0][1], level):
            candidates.append((BYTES, _bytes_blocks(groups, level)))
    else:
        split = _SPLIT_OF[coding]
        blocks = _float_blocks(raw.view(WORD[width]), groups[0].size, split, level, plan)
        candidates.append((split, blocks))
        if _stored(blocks) * 100 > raw.size * 95:  # no weights: integers, noise or text behind a float dtype
            candidates.append((PLANES, _plane_blocks(groups, level)))
    split, coded = min(candidates, key=lambda c: _stored(c[1]))
    if _stored(coded) + (len(coded) - len(groups)) * Block.SIZE >= raw.size:
        split, coded = BYTES, [_raw_block(g) for g in groups]
    return split, coded


def _groups(raw: U8, width: int) -> list[Words]:
    words = raw.view(WORD[width])
    size = group_size(words.size)
    return [words[i : i + size] for i in range(0, words.size, size)]


def _string_block(string: U8, level: Level) -> Coded:
    """Code a byte string of a transform by whatever makes it smallest."""
    if not string.size:
        return Coded(Block(0))
    quick = replace(level, zstd=19 if string.size <= _SHORT else min(level.zstd, 9))
    options = [_raw_block(string), *_bytes_blocks([string], quick), _symbol_block(string, 8, level)]
    if level.patient:
        options.append(_adaptive_block(string, 8))
    return min(options, key=lambda c: c.block.stored)


def _mask_block(mask: U8, level: Level) -> Coded:
    """Code a mask: as any string, but the slow search for repeats is made only where there are some (rows nobody touched)."""
    if not mask.size or level.exhaustive or mask.size <= _SHORT:
        return _string_block(mask, level)
    usual = _symbol_block(mask, 8, replace(level, segment=_MASK_SEGMENT))
    sample = memoryview(mask[mask.size // 2 :][:_SHORT])
    if len(zstd.encode(sample, 1)) * mask.size > usual.block.stored * len(sample):
        return usual
    return min(usual, _string_block(mask, level), key=lambda c: c.block.stored)


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
        parts += [head.write(), *(c.block.write() for c in strings), t.sizes]
        at += TransformHead.SIZE + Block.SIZE * len(strings) + len(t.sizes)
        blocks = strings + coded
    at += Block.SIZE * len(coded)
    parts += [c.block.write() for c in coded]
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
    inputs = len(predictors.ROLES[transform[0].v]) if transform is not None and kind == transforms.DELTA else 0
    fixed = ChunkHead(length, run, chunk, raw.size // width, split.wire_id, width, kind, inputs, decoded_sum)
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
    coded = []
    for shift in range(8 * groups[0].itemsize - 8, -1, -8):
        coded += _one_plane(groups, shift, level) if len(groups) > 1 else [_byte_block(groups[0], shift, level)]
    return coded


def _one_plane(groups: list[Words], shift: int, level: Level) -> list[Coded]:
    """Code one byte plane of all groups, which share a table unless one of its own saves a group more than it costs."""
    symbols = [planes.byte_plane(words, shift) for words in groups]
    dense = [dense_byte(words, shift, level) for words in groups]
    counts = [np.zeros(256, np.int64) if raw else byte_counts(part, 0) for part, raw in zip(symbols, dense, strict=True)]
    coded = []
    choices = choose_together(counts, [part.size for part in symbols], level)
    for part, raw, (choice, shared) in zip(symbols, dense, choices, strict=True):
        if raw or choice.codec == RAW:
            coded.append(Coded(Block(RAW, stored=part.size), (part,)))
        elif choice.table is None:
            coded.append(Coded(Block(CONSTANT, value=choice.value)))
        else:
            coded.append(_table_block(part, choice.table, choice.escapes, shared, level))
    return coded


def _byte_block(words: Words, shift: int, level: Level) -> Coded:
    """Code one byte plane of one group."""
    if dense_byte(words, shift, level):
        payload = planes.byte_plane(words, shift)
        return Coded(Block(RAW, stored=payload.size), (payload,))
    return _symbol_block(planes.byte_plane(words, shift), 8, level)


def _class_block(words: Words, shift: int, level: Level) -> Coded:
    """Code one byte plane of a group of a class: small ones spend a tenth on tables and states, which patience saves."""
    usual = _byte_block(words, shift, level)
    if not level.patient or usual.block.codec == CONSTANT or usual.block.stored * 100 > 98 * words.size:
        return usual
    learned = _adaptive_block(planes.byte_plane(words, shift), 8)
    return learned if learned.block.stored < usual.block.stored else usual


def _adaptive_block(symbols: U8, bits: int) -> Coded:
    payload = adaptive.encode(symbols, bits)
    return Coded(Block(ADAPTIVE, stored=payload.size), (payload,))


def _symbol_block(symbols: U8, bits: int, level: Level) -> Coded:
    """Code symbols of `bits` <= 8 bits by exact counts."""
    choice = choose(byte_counts(symbols, 0), symbols.size, bits, level)
    if choice.codec == CONSTANT:
        return Coded(Block(CONSTANT, value=choice.value))
    if choice.table is None:
        packed = rows.pack(symbols, bits)
        return Coded(Block(RAW, stored=packed.size), (packed,))
    return _table_block(symbols, choice.table, choice.escapes, False, level)


def _table_block(symbols: U8, table: Table, escapes: int, shared: bool, level: Level) -> Coded:
    """Code bytes, of which `escapes` are not in the table."""
    if not escapes or not isinstance(table, RansTable):
        return _entropy_block(symbols, table, shared, level, _NO_ESCAPES)
    places = np.flatnonzero((table.freq == 0)[symbols])
    listed = symbols[places].astype(np.uint32) << np.uint32(18) | places.astype(np.uint32)
    symbols = symbols.copy()
    symbols[places] = table.freq.argmax()
    return _entropy_block(symbols, table, shared, level, listed)


def _entropy_block(symbols: U8, table: Table, shared: bool, level: Level, escapes: U32) -> Coded:
    segments = segments_of(symbols.size, level)
    payload: Sequence[Buffer]
    if isinstance(table, RansTable):
        codec, payload = RANS, rans.encode(symbols, table, shared, segments, escapes)
    else:
        codec, payload = HUFFMAN, huffman.encode(symbols, table, shared, segments, escapes)
    stored = sum(len(part) for part in payload)
    return Coded(Block(codec, 0, segments, int(shared), stored, escapes.size), payload)


def _float_blocks(words: Words, size: int, split: Split, level: Level, made: "_Plan | None" = None) -> list[Coded]:
    groups = [words[i : i + size] for i in range(0, words.size, size)]
    plan = _plan(words, size, split, level) if made is None else made
    keys: list[Coded] = []
    rests: list[Coded] = []
    for group, key_plan, mode in zip(groups, plan.keys, plan.modes, strict=True):
        key, rest = _head_blocks(group, key_plan, mode, plan.dense, split, level)
        keys.append(key)
        rests.append(rest)
    tails = []
    for shift in range(8 * split.width - 24, -1, -8):
        tails += [_byte_block(group, shift, level) for group in groups]
    return keys + rests + tails


@dataclass(frozen=True, slots=True)
class _Plan:
    """How floats are coded: a key plan and a mode of signs for each group, whether rests are dense, and the counts of a
    sample of the bytes below, shape (planes, groups, 256).
    """

    keys: list[KeyPlan]
    modes: list[int]
    dense: bool
    tails: I64


def _plan(words: Words, size: int, split: Split, level: Level, found: Survey | None = None) -> _Plan:
    head = split.head
    assert head is not None
    groups = [words[i : i + size] for i in range(0, words.size, size)]
    found = take_survey(words, size, head, level) if found is None else found
    keys = plan_keys(groups, found, head, level)
    dense = dense_rests(groups, found, head, keys[0].joined, bool(found.signs[0]), level)
    return _Plan(keys, found.signs, dense, found.tails)


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
