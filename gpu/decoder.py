"""From chunk records on the device to elements there: one batch of chunks, a handful of launches.

The host proves what can be proven without decoding, with the very code that decodes on the CPU, and describes the batch by
flat tables of jobs. Kernels prove the rest and write a code for each chunk. A chunk that one of the two finds wrong is decoded
once more on the CPU, which says what is wrong in the words that it always has.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from tzip.chunks import Layout, decode_chunk, payload_starts, read_blocks
from tzip.coders import describing
from tzip.coders.arrays import U8, U32
from tzip.coders.errors import CorruptError, TruncatedError, TzipError
from tzip.coders.planes import BYTES, SPLITS, Split
from tzip.coders.predictors import NAMES
from tzip.coders.registry import ADAPTIVE, CONSTANT, HUFFMAN, RANS, RAW, ZSTD
from tzip.coders.tables import segment_size
from tzip.coders.transforms import (
    CLASSED,
    DELTA,
    DIFFERENCE,
    GRID,
    OFFSET,
    PALETTE,
    RECORDS,
    ROWS,
    SPARSE,
    TRANSFORMS,
    UNCHANGED,
)
from tzip.formats.layout import Block, TransformHead, group_size
from tzip.gpu import jobs
from tzip.gpu.devices import Device

ROOM = (1 << 18) + 8192  # bytes behind payloads that may be read: a segment of 2^17 symbols reads two for each at most
MOST_JOBS = 1 << 20  # bytes of the jobs of one chunk, which has 304 blocks or fewer
_SHORT_CHAINS = 64  # a difference over fewer elements is a few long chains, which the CPU adds faster
_SELDOM = {ZSTD: "zstandard", ADAPTIVE: "the adaptive range coder"}  # blocks that kernels do not decode
_TURNED = 2  # the parameter a of a delta (FORMAT.md, 6.4)
_TABLES = {HUFFMAN: 64, RANS: 132}  # bytes of a segment before its table


def most_scratch(nbytes: int) -> int:
    """Return the bytes that the planes, inner elements, tables and strings of a chunk of so many bytes can need."""
    return 2 * nbytes + (3 << 20)


@dataclass(frozen=True, slots=True)
class Item:
    """A chunk to decode: its record as it lies in host memory, with SLACK bytes behind it, and its address on the device; what
    it must be; where its elements go; where those of its base are (0: it has none), and these on the host.

    The record and the elements lie at multiples of 16, those of the base at one of their width.
    """

    buffer: U8
    length: int
    address: int
    run: int
    chunk: int
    elements: int
    width: int
    check: int
    out: int
    base: int = 0
    base_bytes: U8 | None = None


class NoSpaceError(Exception):
    """The batch is full; launch it and begin another."""


class LeftToCpuError(Exception):
    """The chunk has a form that kernels do not decode: a frame of zstandard or bits of the adaptive range coder, a prediction,
    a vocabulary, or a difference of few long chains.
    """


class Batch:
    """Chunks that are decoded together. `scratch`: address and bytes of device memory; `blob`: for the jobs."""

    def __init__(self, scratch: tuple[int, int], blob: jobs.Blob, limit: int) -> None:
        self._scratch, self._scratch_end = scratch[0], scratch[0] + scratch[1]
        self.blob = blob
        self._begin = blob.used
        self._limit = limit
        self.items: list[Item] = []
        self._cost = 0
        self._tables: list[tuple[Any, ...]] = []
        self._groups: list[tuple[Any, ...]] = []
        self._merged: list[int] = []  # of the groups, those that a kernel of their own merges
        self._coded: dict[str, list[tuple[Any, ...]]] = {}
        self._usual: list[tuple[Any, ...]] = []
        self._escapes: list[tuple[Any, ...]] = []
        self._keys: list[tuple[Any, ...]] = []
        self._sums: tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]] = ([], [])
        self._transforms: list[tuple[Any, ...]] = []
        self._copies: list[tuple[int, int, int, int]] = []
        self._unchanged: list[tuple[int, int, int, int]] = []
        self._status = self._end = 0
        self._launches: list[tuple[str, int, int, int]] = []
        self._base = -(-(blob.address + blob.used) // 16) * 16  # where the groups will be

    @property
    def left(self) -> int:
        """Bytes of scratch memory that are left."""
        return self._scratch_end - self._scratch

    @property
    def room(self) -> bool:
        """Whether the jobs of another chunk, whatever it needs, fit."""
        return self._begin + self._cost + 2 * MOST_JOBS <= self.blob.host.size

    @property
    def empty(self) -> bool:
        """Whether there is nothing to launch."""
        return not self.items and not self._copies

    def scratch(self, nbytes: int) -> int:
        """Return the address of device memory that is the batch's until its last launch."""
        address = -(-self._scratch // 256) * 256
        if address + nbytes > self._scratch_end:
            raise NoSpaceError
        self._scratch = address + nbytes + 16  # words of four symbols are read at ends
        return address

    def add(self, item: Item) -> None:
        """Add a chunk after proving its record, but for its check.

        Raises LeftToCpuError, or NoSpaceError when there is no `room`; CorruptError, TruncatedError or UnsupportedError as
        `read_blocks`.
        """
        record = item.buffer[: item.length]
        if self._add_usual(item, record):
            return
        layout = read_blocks(memoryview(record), item.run, item.chunk, item.elements, item.width)
        starts = payload_starts(record, layout)
        _check_buildable(layout)
        for block in layout.strings + layout.blocks:
            if block.codec in _TABLES and 4 * block.escapes + _TABLES[block.codec] * block.segments > block.stored:
                raise TruncatedError("a block ends within its escapes or states")
        if layout.head.transform in (DELTA, UNCHANGED) and not item.base:
            raise CorruptError("a chunk is a difference from another tensor, and its run names none")
        ordinal = len(self.items)
        self.items.append(item)
        # Bytes of jobs and units, rather too many: each segment and each part of 16,384 elements is 8 at most, five times.
        self._cost += 2048 + 2 * sum(256 + 2 * b.segments + b.escapes // 2048 for b in layout.strings + layout.blocks)
        self._cost += (40 * item.width + 8 * 5) * _parts(item.elements) * (2 if layout.transform else 1)
        count = len(layout.strings)
        if layout.head.transform == UNCHANGED:
            self._unchanged.append((item.base, item.out, item.elements * item.width, 0))
        elif layout.transform is None:
            self._elements(ordinal, item, layout, starts, item.out, None)
        else:
            self._transformed(ordinal, item, layout, layout.transform, starts[:count], starts[count:])
        self._check(ordinal, item, layout.head.decoded_sum)

    def _check(self, ordinal: int, item: Item, decoded_sum: int) -> None:
        """Add the sums of a chunk."""
        self._sums[0].append((item.address + 16, item.check, 0, item.length - 16, ordinal, jobs.BAD_STORED_SUM, 0))
        size = item.elements * item.width
        self._sums[1].append((item.out, decoded_sum, 0, size, ordinal, jobs.BAD_DECODED_SUM, 0))

    def _add_usual(self, item: Item, record: U8) -> bool:
        """Add a chunk of the usual form by one call of a kernel; return False, having done nothing, for any other."""
        split = SPLITS.get(int(record[36])) if record.size > 36 else None
        if split is None or split.width != item.width:
            return False
        size = group_size(item.elements)
        rows = describing.describe(record, item.run, item.chunk, item.elements, split, size)
        if rows is None:
            return False
        ordinal, count = len(self.items), len(rows)
        tables = self.scratch(jobs.TABLE_SIZE * count)
        self.items.append(item)
        self._usual.append((rows, split, ordinal, item.address, item.out, size, tables))
        self._cost += 2048 + int((2 * rows[:, describing.SEGMENTS] + (rows[:, describing.ESCAPES] >> 11)).sum()) + 512 * count
        self._check(ordinal, item, int.from_bytes(record[40:48].tobytes(), "little"))
        return True

    def copy(self, source: int, target: int, nbytes: int) -> None:
        """Copy bytes on the device when all chunks are decoded."""
        self._cost += 48 + 8 * _parts(nbytes)
        self._copies.append((source, target, nbytes, 0))

    # ---- a chunk's jobs

    def _elements(
        self, ordinal: int, item: Item, layout: Layout, starts: list[int], out: int, places: list[int] | None
    ) -> None:
        """Add the blocks of elements that lie from `out` on, or each group at its place."""
        split, width, groups = SPLITS[layout.head.split], layout.width, layout.groups
        tables: dict[int, tuple[int, int]] = {}
        for g, (begin, end) in enumerate(pairwise(layout.cuts)):
            planes = [
                (layout.blocks[i], layout.widths[i], item.address + starts[i])
                for i in range(g, groups * split.planes(width), groups)
            ]
            target = out + begin * width if places is None else places[g]
            self._group(ordinal, split, width, end - begin, planes, tables, target)

    def _group(
        self,
        ordinal: int,
        split: Split,
        width: int,
        n: int,
        planes: list[tuple[Block, int, int]],
        tables: dict[int, tuple[int, int]],
        out: int,
    ) -> None:
        if split is BYTES or width == 1:
            block, bits, payload = planes[0]
            if block.codec in _TABLES:
                self._coded_plane(ordinal, block, bits, payload, n, 0, tables, out)
                return
            size = n * width if split is BYTES else n
            self._merge((out, size, ordinal, 1, 1, 0, 0, 0, 0, _sources([_source(block, bits, payload)])))
            return
        head = split.head
        fused = head is not None and width <= 4 and planes[0][0].codec in _TABLES
        fused = fused and all(block.codec not in _TABLES for block, _, _ in planes[1:])
        found: list[tuple[int, int, int, int]] = []
        for p, (block, bits, payload) in enumerate(planes):
            if block.codec in _TABLES and not (fused and p == 0):
                room = self.scratch(n)
                self._coded_plane(ordinal, block, bits, payload, n, p, tables, room, escaped=head is None or p > 0)
                found.append((room, jobs.FROM_BYTES, 8, 0))
            else:
                found.append(_source(block, bits, payload, key=head is not None and p == 0))
        if head is None:
            self._merge((out, n, ordinal, width, width, 0, 0, 0, 0, _sources(found)))
            return
        key, bits, payload = planes[0]
        low = head.mantissa - key.joined
        base = max(0, key.value - 1) if key.codec == CONSTANT else key.value
        sign = 0x8000 if planes[1][0].sign_mode == 2 else 0
        made = (out, n, ordinal, width, width, 1, low, base, sign, _sources(found))
        if fused:
            self._groups.append(made)
            group = self._base + jobs.GROUP.itemsize * (len(self._groups) - 1)
            self._coded_plane(ordinal, key, bits, payload, n, 0, tables, 0, width=width, group=group, escaped=False)
        else:
            self._merge(made)
        if key.escapes:
            self._keys.append((payload, out, key.escapes, n, ordinal, bits, width, 1, low))

    def _merge(self, group: tuple[Any, ...]) -> None:
        self._merged.append(len(self._groups))
        self._groups.append(group)

    def _coded_plane(
        self,
        ordinal: int,
        block: Block,
        bits: int,
        payload: int,
        n: int,
        plane: int,
        tables: dict[int, tuple[int, int]],
        out: int,
        *,
        width: int = 1,
        group: int = 0,
        escaped: bool = True,
    ) -> None:
        if block.shared:
            codec, table = tables.get(plane, (-1, 0))
            if codec != block.codec:
                raise CorruptError("a block shares a table that does not exist")
        else:
            table = self.scratch(jobs.TABLE_SIZE)
            tables[plane] = block.codec, table
            before = 4 * block.escapes + _TABLES[block.codec] * block.segments
            self._tables.append((payload + before, table, block.stored - before, block.codec, ordinal, 0))
        name = f"{'huffman' if block.codec == HUFFMAN else 'rans'}_{width}"
        self._coded.setdefault(name, []).append(
            (
                payload, out, table, group, block.stored, n, block.escapes, ordinal, segment_size(n, block.segments),
                block.segments, block.value, bits, not block.shared, b"",
            )
        )  # fmt: skip
        if escaped and block.escapes:
            self._escapes.append((payload, out, block.escapes, n, ordinal, bits, 1, 0, 0))

    def _string(self, ordinal: int, item: Item, block: Block, size: int, start: int) -> int:
        """Return where a string of a transform will be."""
        if not size:
            return 0
        if block.codec == RAW:
            return item.address + start
        room = self.scratch(size)
        self._group(ordinal, BYTES, 1, size, [(block, 8, item.address + start)], {}, room)
        return room

    def _transformed(
        self, ordinal: int, item: Item, layout: Layout, head: TransformHead, sides: list[int], starts: list[int]
    ) -> None:
        a, b = (
            self._string(ordinal, item, block, size, start)
            for block, size, start in zip(layout.strings, (head.size_a, head.size_b), sides, strict=True)
        )
        kind, n, width = layout.head.transform, item.elements, item.width
        sizes, begins = [head.inner] + [0] * 7, [0] * 8
        if kind in CLASSED:  # the elements of each class begin at a multiple of 16 bytes
            sizes = layout.classes.tolist()
            begins = [0, *np.cumsum([-(-size // 16) * 16 for size in sizes]).tolist()[:-1]]
        inner = self.scratch((begins[-1] + sizes[-1]) * head.inner_width if kind in CLASSED else head.inner * head.inner_width)
        places = None
        if kind in CLASSED:
            ends = np.cumsum(sizes)
            classes = np.searchsorted(ends, layout.cuts[:-1], side="right").tolist()
            places = [
                inner + (begins[k] + cut - int(ends[k]) + sizes[k]) * head.inner_width
                for k, cut in zip(classes, layout.cuts[:-1], strict=True)
            ]
        if head.inner:
            self._elements(ordinal, item, layout, starts, inner, places)
        tiles = -(-n // jobs.TILE)
        work = {ROWS: 4 * head.size_a, RECORDS: 8 * head.b, DIFFERENCE: 8 * tiles}.get(kind, 32 * tiles)
        self._transforms.append(
            (
                inner, a, b, item.base, item.out, self.scratch(work), head.v, n, head.inner, head.size_a, head.size_b, head.b,
                head.c, ordinal, kind, width, head.inner_width, head.a, sizes, begins,
            )
        )  # fmt: skip

    # ---- launching

    def plan(self) -> None:
        """Write the jobs; nothing can be added any more."""
        blob, chunks = self.blob, len(self.items)
        usual = jobs.Usual(self._usual, self._base + jobs.GROUP.itemsize * len(self._groups))
        groups = blob.add(np.concatenate([np.array(self._groups, jobs.GROUP), usual.groups]))
        assert groups == self._base
        self._status = blob.add(np.zeros(chunks, np.uint32))
        launches: list[tuple[str, int, Any]] = []

        def plan(kernel: str, address: int, parts: Any) -> None:
            made = parts if isinstance(parts, np.ndarray) else jobs.units(parts)
            if made.size:
                launches.append((kernel, address, made))

        def of(form: "np.dtype[Any]", rows: list[tuple[Any, ...]], more: Any = ()) -> int:
            made = np.array(rows, form)
            return blob.add(np.concatenate([made, more]) if len(more) else made) if rows or len(more) else 0

        sums = of(jobs.SUM_JOB, self._sums[0] + self._sums[1])
        stripes = [[-(-row[3] // (4096 * jobs.STRIPES)) for row in rows] for rows in self._sums]
        plan("sum_stripes", sums, stripes[0])
        plan("read_tables", of(jobs.TABLE_JOB, self._tables, usual.tables), [1] * (len(self._tables) + len(usual.tables)))
        for kernel in sorted({*self._coded, *usual.coded}):
            rows, more = self._coded.get(kernel, []), usual.coded.get(kernel, usual.none)
            parts = [-(-row[9] // jobs.WARPS) for row in rows] + (-(-more["segments"].astype(np.int64) // jobs.WARPS)).tolist()
            plan(kernel, of(jobs.CODED_JOB, rows, more), parts)
        escapes = of(jobs.ESCAPE_JOB, self._escapes)
        plan("put_escapes", escapes, [_parts(row[2]) for row in self._escapes])
        merged = jobs.units([_parts(self._groups[i][1]) for i in self._merged])
        merged["job"] = np.array(self._merged, np.uint32)[merged["job"]]
        plan("merge_groups", groups, merged)
        keys = [_parts(row[2]) for row in self._keys] + [_parts(n) for n in usual.keys["count"].tolist()]
        plan("put_escapes", of(jobs.ESCAPE_JOB, self._keys, usual.keys), keys)
        self._plan_transforms(plan, of(jobs.TRANSFORM_JOB, self._transforms))
        plan("copy_parts", of(jobs.COPY_JOB, self._unchanged), [_parts(row[2]) for row in self._unchanged])
        plan("sum_stripes", sums, jobs.units(stripes[1], chunks))
        plan("sum_compare", sums, np.array([(i, min(1024, 2 * chunks - i)) for i in range(0, 2 * chunks, 1024)], jobs.UNIT))
        plan("copy_parts", of(jobs.COPY_JOB, self._copies), [_parts(row[2]) for row in self._copies])
        self._launches = [(kernel, made.size, address, blob.add(made)) for kernel, address, made in launches]
        self._end = blob.used

    def launch(self, device: Device) -> None:
        """Copy the jobs to the device and start the kernels; then `codes` has what became of each chunk. Can be done again."""
        begin = -(-self._begin // 16) * 16
        device.upload(self.blob.host[begin : self._end], self.blob.address + begin, "work")
        for kernel, count, address, units in self._launches:
            device.launch(kernel, count, (address, units, self._status, self._limit))

    def _plan_transforms(self, plan: Any, address: int) -> None:
        rows = self._transforms

        def some(kernel: str, size: Any, *kinds: int) -> None:
            plan(kernel, address, [size(row) if row[14] in kinds else 0 for row in rows])

        def tiles(row: tuple[Any, ...]) -> int:
            return 0 if row[14] == DIFFERENCE and row[11] > 1 else -(-row[7] // jobs.TILE)

        some("prepare_transforms", lambda row: 1, GRID, SPARSE, DELTA, RECORDS, ROWS)
        some("expand", lambda row: _parts(row[7]), PALETTE, GRID, OFFSET, ROWS, RECORDS)
        some("put_exceptions", lambda row: _parts(row[10] // (4 + row[15])), GRID)
        some("count_tiles", tiles, SPARSE, DELTA, DIFFERENCE)
        some("add_tiles", lambda row: min(1, tiles(row)), SPARSE, DELTA, DIFFERENCE)
        some("place_tiles", tiles, SPARSE, DELTA, DIFFERENCE)
        some("add_chains", lambda row: -(-row[11] // 256) if row[11] > 1 else 0, DIFFERENCE)

    def codes(self, device: Device) -> U32:
        """Return where the chunks' codes will be, shape (chunks,), when "work" has come so far: 0 where all is right."""
        at = self._status - self.blob.address
        host = self.blob.host[at : at + 4 * len(self.items)]
        if host.size:
            device.download(self._status, host)
        return host.view(np.uint32)


def failure(item: Item, code: int) -> TzipError:
    """Return the error of a chunk that the device refused, as the CPU words it."""
    out = np.empty(item.elements * item.width, np.uint8)
    try:
        decode_chunk(
            item.buffer, item.length, item.run, item.chunk, item.elements, item.width, out, item.check, item.base_bytes
        )
    except TzipError as e:
        return e
    return CorruptError(f"the device refuses a chunk that the CPU decodes (code {code}): its copy there was damaged")


def _parts(size: int) -> int:
    return -(-size // jobs.PART)


def _check_buildable(layout: Layout) -> None:
    for block in layout.strings + layout.blocks:
        if block.codec in _SELDOM:
            raise LeftToCpuError(_SELDOM[block.codec])
    kind, head = layout.head.transform, layout.transform
    if kind not in (0, PALETTE, GRID, SPARSE, DIFFERENCE, OFFSET, ROWS, DELTA, RECORDS, UNCHANGED):
        raise LeftToCpuError(TRANSFORMS[kind])
    if head is None:
        return
    if kind == DELTA and head.v:
        raise LeftToCpuError(f"prediction ({NAMES[head.v]})")
    if kind == DELTA and head.a == _TURNED:
        raise LeftToCpuError("a turned difference")
    if kind == DIFFERENCE and 1 < head.b < _SHORT_CHAINS:
        raise LeftToCpuError("a difference over few elements")


def _source(block: Block, bits: int, payload: int, *, key: bool = False) -> tuple[int, int, int, int]:
    """Return where the symbols of a block that is not coded are; a constant key as a byte above its base."""
    if block.codec == CONSTANT:
        return 0, jobs.FROM_VALUE, bits, int(block.value > 0) if key else block.value & 255
    if block.codec == RAW:
        return payload, jobs.FROM_BYTES if bits == 8 else jobs.FROM_ROWS, bits, 0
    return 0, jobs.FROM_VALUE, bits, 0  # decoded where it is merged


def _sources(found: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    return found + [(0, jobs.FROM_VALUE, 8, 0)] * (8 - len(found))
