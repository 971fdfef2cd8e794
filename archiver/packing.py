"""Packing: items to an archive. Reads the input once; proves every chunk by decoding it before it is written."""

import io
import os
import time
import warnings
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tzip.archive import opener
from tzip.bases import Base, Bases, OwnFile
from tzip.blocks import codecs_of
from tzip.chunks import SLACK, decode_chunk
from tzip.coders import zstd
from tzip.coders.arrays import U8, for_kernels
from tzip.coders.errors import ChangedError, CorruptError, TzipError, UsageError
from tzip.coders.predictors import Beside
from tzip.coders.scratch import borrow, recycle
from tzip.coders.sums import same_bytes, sum64
from tzip.duplicates import Duplicates, Origin, Run, share
from tzip.encoding import EncodedChunk, encode_chunk
from tzip.extents import NO_BASES, Extent, MemberLayout, Predictions, lay_out, untangle
from tzip.formats import safetensors_header
from tzip.formats.atomic import PartialFile
from tzip.formats.catalogue import (
    CLOSED,
    FILE,
    FLAT,
    FOLDER,
    IN_RUN,
    INLINE,
    LINK,
    NO_MTIME,
    SHA_KNOWN,
    STRIDED,
    TENSOR,
    Catalogue,
)
from tzip.formats.containers import ContainerError, Region, View, span_bytes, whole_tensors
from tzip.formats.dtypes import Dtype
from tzip.formats.layout import CHUNK_ELEMENTS, DONE, MEMBER, ArchiveHeader, ChunkHead, DoneRecord
from tzip.formats.names import check_name
from tzip.formats.neighbours import Neighbours
from tzip.formats.recognising import Found
from tzip.formats.source import Source, open_source
from tzip.formats.writer import ArchiveWriter
from tzip.plan import level_named
from tzip.prediction import Finder
from tzip.tree import Item, collect
from tzip.verifying import verify
from tzip.version import __version__
from tzip.workers import Hasher, Workers, thread_count

SUFFIX = ".tzip"

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class MemberReport:
    """What became of one member."""

    name: str
    size: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class PackReport:
    """What packing did: sizes in bytes, time in seconds, warnings as printed, files that the archive leans on."""

    archive: str | None
    archive_id: str
    bytes_in: int
    bytes_out: int
    seconds: float
    members: list[MemberReport] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    bases: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Options:
    """What `pack` was asked for; see there."""

    level: str = "default"
    threads: int | None = None
    sha256: bool = True
    strict: bool = False
    resume: bool = False
    progress: Progress | None = None
    prove: bool = True
    base: Any = None


TO_BE = (b"the archive to be",)  # in a chain: what leans on too many is not made
Job = tuple[U8, Run, int]  # the bytes of a chunk, its run, its ordinal in the run


class InputFormatError(UsageError):
    """A file breaks the rules of the format that its name promises, and `strict` was asked for."""


class Packer:
    """Writes items into one archive, as differences from `bases`, or from those that the options name."""

    def __init__(self, out: BinaryIO, workers: Workers, options: Options, bases: Bases | None = None) -> None:
        self.writer = ArchiveWriter(out, resume=options.resume)
        self.level = level_named(options.level)
        self.workers = workers
        self.prove = options.prove
        self.sha256 = options.sha256
        self.strict = options.strict
        self.progress = options.progress or (lambda n: None)
        self.members: list[MemberReport] = []
        self.warnings: list[str] = []
        self.duplicates = Duplicates()
        self.bases = bases
        if bases is None and options.base is not None:
            self.bases = Bases(options.base, opener(options.base), chain=TO_BE)
        self.leans_on: set[str] = set()
        self.neighbours = Neighbours()
        self.runs = 0
        self.total = 0
        self.bytes_in = 0
        self.writer.header(ArchiveHeader(f"tzip {__version__} {self.level.name}", zstd.VERSION_NUMBER))

    def add(self, item: Item) -> None:
        """Add one member. Raises ChangedError when it changes meanwhile."""
        if item.kind == FOLDER:
            self._member(item, MemberLayout([], [], []), b"", b"")
        elif item.kind == LINK:
            target = item.link.encode()
            self._member(item, MemberLayout([Extent(0, len(target))], [], []), target, self._sha(target))
        else:
            assert item.open is not None
            stamp = item.stamp() if item.stamp else None
            with item.open() as source:
                layout = self._lay_out(item, source)
                self._share(layout, Origin(item.open, item.stamp, stamp), source)
                self._stream(item, layout, source)
            if item.stamp and item.stamp() != stamp:
                raise ChangedError("the input changed while it was packed").at(path=item.original)

    def add_tensor(self, name: str, raw: U8, dtype: Dtype, shape: tuple[int, ...]) -> None:
        """Add a bare tensor (FORMAT.md, section 9)."""
        row = shape[-1] if len(shape) > 1 else 0
        layout = lay_out(raw.size, [Region(0, raw.size, dtype, row)] if raw.size else [], [View("", dtype, shape, 0)])
        item = Item(name, TENSOR, 0, 0, raw.size)
        self._stream(item, layout, _ArraySource(raw))

    def finish(self) -> bytes:
        """Write the index; return the archive id. Raises ChangedError when a base changed meanwhile."""
        if self.bases is not None:
            self.bases.check_unchanged()
        return self.writer.finish()

    def archives(self) -> set[str]:
        """Return the ids of the archives that this one leans on so far."""
        return {bytes(a).hex() for a in self.writer.columns["i_archive"] if any(a)}

    def close(self) -> None:
        """Close the bases."""
        if self.bases:
            self.bases.close()

    def _sha(self, data: bytes) -> bytes:
        with Hasher(self.sha256, 1) as hasher:
            hasher.update(data)
            return hasher.digest() or b""

    def _lay_out(self, item: Item, source: Source) -> MemberLayout:
        where = item.original or item.name
        named = item.name.lower().endswith(".safetensors")
        try:
            found = self.neighbours.look(source, item.original)
            if named and not found.container:
                safetensors_header.parse(source.read_at, source.size)  # which says why it is none
        except ContainerError as e:
            fault = str(e) if e.container else f"no valid safetensors file: {e}"
            # Only its name tells whether a file without magic bytes was to be one.
            silent = e.container == safetensors_header.NAME and not named
            if self.strict and not silent:
                raise InputFormatError(fault).at(path=where) from None
            found = Found(warnings=[] if silent else [f"{fault}; packed as plain bytes"])
        self.warnings += [f"{where}: {warning}" for warning in found.warnings]
        bases = self._bases_of(item, source, found) if self.bases is not None else NO_BASES
        predictions = self._predictions(item, source, found, bases)
        return lay_out(source.size, found.regions, found.tensors, bases, found.header, predictions)

    def _bases_of(self, item: Item, source: Source, found: Found) -> Mapping[int, Base]:
        """Return the bases of those regions that are one tensor each, by their places."""
        assert self.bases is not None
        whole = whole_tensors(found.regions, found.tensors)
        places = list(whole)

        def read(i: int, at: int, n: int) -> U8:
            region = found.regions[places[i]]
            return np.frombuffer(source.read_at(region.begin + at, max(0, min(n, region.end - region.begin - at))), np.uint8)

        tensors = [(view.name, view.dtype, view.shape) for view in whole.values()]
        return {places[i]: base for i, base in self.bases.match(tensors, read, item.original).items()}

    def _predictions(self, item: Item, source: Source, found: Found, bases: Mapping[int, Base]) -> Predictions:
        """Return how the elements of regions are predicted from those of others, and from earlier ones."""
        whole = whole_tensors(found.regions, found.tensors)
        begins = {view.name: view.begin for view in whole.values()}

        def read_own(base: Base, at: int, out: U8) -> None:
            if source.readinto_at(begins[base.name] + at, memoryview(out)) != out.size:
                raise ChangedError("the input became shorter while it was packed").at(path=source.name)

        def read(place: int, at: int, n: int) -> U8:
            out = np.empty(n, np.uint8)
            read_own(tensors[place], at, out)
            return out

        own = OwnFile(read_own)
        tensors = {
            place: Base(own, view.name, view.dtype, view.shape, span_bytes(view.dtype, view.shape, None))
            for place, view in whole.items()
        }
        earlier: Mapping[int, Base] = bases
        if self.bases is not None:
            named = self.bases.named([(view.name, view.dtype, view.shape) for view in whole.values()], item.original)
            earlier = {list(whole)[i]: base for i, base in named.items()} | dict(bases)
        predictions = Finder(whole, earlier, bases, read, self.level).find()
        return {
            place: (p.predictor, {role: tensors[one] if isinstance(one, int) else one for role, one in p.roles.items()})
            for place, p in predictions.items()
        }

    def _share(self, layout: MemberLayout, origin: Origin, source: Source) -> None:
        """Leave out the runs whose bytes the archive has, or will have, already."""
        found = self.duplicates.find(layout.runs, origin, source.inner if isinstance(source, _Borrowed) else source)
        if found:
            uses = [e.run for e in layout.extents if e.run is not None]
            share(layout.runs, uses, found, self.writer.position, self.total + source.size)
            layout.runs = [run for run in layout.runs if run.same is None]
        untangle(layout)

    def _stream(self, item: Item, layout: MemberLayout, source: Source) -> None:
        inline = b"".join(_read(source, e.begin, e.length, item) for e in layout.extents if e.run is None)
        again: list[tuple[Run, int, int]] = []
        hashed = self.sha256 and item.kind != TENSOR
        if layout.runs:
            self._member(item, layout, inline, None)
        with Hasher(hashed, self.workers.threads if len(inline) < source.size else 1) as hasher:
            for run, encoded, size in self._encode(self._jobs(layout, inline, source, item, hasher, again)):
                run.sums.append(ChunkHead.read(memoryview(encoded.record)).decoded_sum)
                self.writer.chunk(encoded.record, encoded.codecs)
                self.progress(size)
            digest = hasher.digest()
        # Runs were found to be the same before this member was read: what was read now is what the archive has.
        if any(run.stored.sums[chunk] != found for run, chunk, found in again):
            raise ChangedError("the input changed while it was packed").at(path=item.original or source.name)
        self.progress(len(inline))
        self.bytes_in += source.size
        if layout.runs:
            self._done(item, source.size, digest)
        else:
            self._member(item, layout, inline, digest or b"")

    def _jobs(
        self,
        layout: MemberLayout,
        inline: bytes,
        source: Source,
        item: Item,
        hasher: Hasher,
        again: list[tuple[Run, int, int]],
    ) -> Iterator[Job]:
        """Yield the chunks in the order of the archive, feeding the hash in the order of the file.

        Bytes that a bundle reads ahead are kept until the hash has passed them: the input is read once. Of runs that the
        archive has already, `again` gets the sums of the chunks as they are now.
        """
        ahead: dict[int, U8] = {}
        started: set[int] = set()
        at = 0

        def job(raw: U8, run: Run, chunk: int) -> Iterator[Job]:
            if run.same is None:
                yield raw, run, chunk
            else:
                again.append((run, chunk, sum64(raw)))
                self.progress(raw.size)

        for extent in layout.extents:
            run = extent.run
            if run is None:
                hasher.update(inline[at : at + extent.length])
                at += extent.length
            elif len(run.pieces) > 1:
                if id(run) not in started:
                    started.add(id(run))
                    raw = np.empty(run.size, np.uint8)
                    to = 0
                    for begin, n in run.pieces:
                        _read_into(source, begin, raw[to : to + n], item)
                        ahead[begin] = raw[to : to + n]
                        to += n
                    yield from job(raw, run, 0)
                hasher.update(ahead.pop(extent.begin))
            else:
                step = CHUNK_ELEMENTS * run.width
                for chunk, begin in enumerate(range(extent.begin, extent.begin + extent.length, step)):
                    raw = _part(source, begin, min(step, extent.begin + extent.length - begin), item)
                    hasher.update(raw)
                    yield from job(raw, run, chunk)

    def _encode(self, jobs: Iterator[Job]) -> Iterator[tuple[Run, EncodedChunk, int]]:
        waiting: deque[tuple[Run, Future[EncodedChunk], int]] = deque()
        for raw, run, chunk in jobs:
            if self.writer.resuming:
                earlier = self._earlier(raw, run, chunk)
                if earlier is not None:
                    yield run, earlier, raw.size
                    continue
            waiting.append((run, self.workers.submit(self._encode_one, raw, run, chunk), raw.size))
            # While resuming, a chunk must be written before the next one can be compared with what stands there.
            while waiting and (len(waiting) > self.workers.threads or self.writer.resuming):
                run, future, size = waiting.popleft()
                yield run, future.result(), size
        while waiting:
            run, future, size = waiting.popleft()
            yield run, future.result(), size

    def _encode_one(self, raw: U8, run: Run, chunk: int) -> EncodedChunk:
        first = chunk * CHUNK_ELEMENTS
        base = run.base_bytes(first * run.width, raw.size)  # before scratch memory is used: an archive may have to be decoded
        beside = run.beside(first * run.width, raw.size)
        encoded = encode_chunk(
            raw, run.width, run.coding, self.level, run.ordinal, chunk, run.row, first, base, run.predictor, beside
        )
        if self.prove:
            prove(encoded, raw, run, chunk, base, beside)
        return encoded

    def _earlier(self, raw: U8, run: Run, chunk: int) -> EncodedChunk | None:
        """Return the chunk that an interrupted run has written here, when it is sound and holds these bytes."""
        record = self.writer.earlier_chunk()
        if record is None or len(record) < ChunkHead.SIZE:
            return None
        length = len(record)
        buffer = np.zeros(length + SLACK, np.uint8)
        buffer[:length] = np.frombuffer(record, np.uint8)
        head = ChunkHead.read(record)
        elements = raw.size // run.width
        if (head.run, head.chunk, head.elements, head.width) != (run.ordinal, chunk, elements, run.width):
            return None
        if head.decoded_sum != sum64(raw):
            return None
        begin = chunk * CHUNK_ELEMENTS * run.width
        base, beside = run.base_bytes(begin, raw.size), run.beside(begin, raw.size)
        decoded = borrow("proof", raw.size)
        try:
            decode_chunk(buffer, length, run.ordinal, chunk, elements, run.width, decoded, base=base, beside=beside)
        except TzipError:
            return None
        if not np.array_equal(decoded, raw):
            return None
        return EncodedChunk(record, codecs_of(record))

    def _member(self, item: Item, layout: MemberLayout, inline: bytes, sha: bytes | None) -> None:
        """Write the member record and number the runs; with `sha` not None the member is closed."""
        first_run = self.runs
        for i, run in enumerate(layout.runs):
            run.ordinal = first_run + i
        size = sum(e.length for e in layout.extents)
        known = SHA_KNOWN if sha or (sha is None and self.sha256 and item.kind != TENSOR) else 0
        flags = known | (CLOSED if sha is not None else 0)
        columns: dict[str, list[Any]] = {
            "m_name": [len(item.name.encode())],
            "m_kind": [item.kind],
            "m_flags": [flags],
            "m_mode": [item.mode],
            "m_mtime": [item.mtime_ns],
            "m_size": [size],
            "m_sha": [sha or bytes(32)],
            "m_record": [0],
            "m_check": [0],
            "m_extents": [len(layout.extents)],
            "m_tensors": [len(layout.tensors)],
            "m_runs": [len(layout.runs)],
            "r_width": [run.width for run in layout.runs],
            "r_inputs": [len(run.inputs) for run in layout.runs],
            "r_elements": [run.size // run.width for run in layout.runs],
        }
        self._extent_columns(columns, layout.extents)
        self._tensor_columns(columns, layout)
        names = [t.name for t in layout.tensors]
        files, tensors = self._input_columns(columns, layout.runs)
        catalogue = Catalogue.of(columns, [item.name, *names, *files, *tensors], inline, len(self.members), first_run)
        record = catalogue.write(MEMBER)
        columns["m_record"] = [self.writer.record(MEMBER, record)]
        columns["m_check"] = [int.from_bytes(record[8:16], "little")]
        for column, values in columns.items():
            self.writer.columns[column] += values
        self.writer.member_names.append(item.name)
        self.writer.tensor_names += names
        self.writer.input_files += files
        self.writer.input_tensors += tensors
        self.runs += len(layout.runs)
        self.total += size
        self.members.append(MemberReport(item.name, size, sha.hex() if sha else None))

    @staticmethod
    def _extent_columns(columns: dict[str, list[Any]], extents: Iterable[Extent]) -> None:
        names = ("x_kind", "x_run", "x_offset", "x_length")
        for name in names:
            columns[name] = []
        inline_at = 0
        for extent in extents:
            if extent.run is None:
                row = (INLINE, 0, inline_at, extent.length)
                inline_at += extent.length
            else:
                row = (IN_RUN, extent.run.stored.ordinal, extent.offset, extent.length)
            for name, value in zip(names, row, strict=True):
                columns[name].append(value)

    def _input_columns(self, columns: dict[str, list[Any]], runs: Iterable[Run]) -> tuple[list[str], list[str]]:
        """Add the columns of the runs' bases; return the names of their files and tensors."""
        inputs = [one for run in runs for one in run.inputs]
        self.leans_on |= {one.base.file.path for one in inputs if not one.base.file.inner}
        origins = [one.base.file.origin() for one in inputs]
        rows = [
            (i.role, i.offset, i.length, i.base.begin, o.archive, o.sha256, len(o.file.encode()), len(i.base.name.encode()))
            for i, o in zip(inputs, origins, strict=True)
        ]
        names = ("i_kind", "i_offset", "i_length", "i_begin", "i_archive", "i_file", "i_member", "i_name")
        for i, name in enumerate(names):
            columns[name] = [row[i] for row in rows]
        return [origin.file for origin in origins], [one.base.name for one in inputs]

    @staticmethod
    def _tensor_columns(columns: dict[str, list[Any]], layout: MemberLayout) -> None:
        names = ("t_name", "t_dtype", "t_layout", "t_ndim", "t_extent", "t_offset")
        for name in (*names, "dims"):
            columns[name] = []
        begins = [e.begin for e in layout.extents]
        for tensor in layout.tensors:
            extent = offset = 0
            if span_bytes(tensor.dtype, tensor.shape, tensor.strides):
                extent = bisect_right(begins, tensor.begin) - 1
                offset = tensor.begin - begins[extent]
            strided = tensor.strides is not None
            dims = (*tensor.shape, *(tensor.strides or ()))
            row = (len(tensor.name.encode()), tensor.dtype.wire_id, STRIDED if strided else FLAT, len(dims), extent, offset)
            for name, value in zip(names, row, strict=True):
                columns[name].append(value)
            columns["dims"] += dims

    def _done(self, item: Item, size: int, digest: bytes | None) -> None:
        self.writer.record(DONE, DoneRecord(len(self.members) - 1, size, digest).write())
        if digest is not None:
            self.writer.columns["m_sha"][-1] = digest
        self.members[-1] = MemberReport(item.name, size, digest.hex() if digest else None)


def prove(encoded: EncodedChunk, raw: U8, run: Run, chunk: int, base: U8 | None, beside: Beside) -> None:
    """Decode a chunk again and compare it with its source, byte by byte."""
    length = len(encoded.record)
    buffer = borrow("proof record", length + SLACK)
    buffer[:length] = np.frombuffer(encoded.record, np.uint8)
    buffer[length:] = 0
    decoded = borrow("proof", raw.size)
    decode_chunk(buffer, length, run.ordinal, chunk, raw.size // run.width, run.width, decoded, base=base, beside=beside)
    if not same_bytes(decoded, raw):
        raise CorruptError("tzip is at fault: a chunk does not decode to its source; nothing was written")


class _ArraySource(Source):
    """A tensor in memory."""

    def __init__(self, raw: U8) -> None:
        super().__init__("<array>", raw.size)
        self.raw = raw

    def read_at(self, offset: int, n: int) -> bytes:
        return self.raw[offset : offset + n].tobytes()

    def readinto_at(self, offset: int, buffer: memoryview) -> int:
        part = self.raw[offset : offset + len(buffer)]
        np.frombuffer(buffer, np.uint8)[: part.size] = part
        return part.size


def _read(source: Source, begin: int, n: int, item: Item) -> bytes:
    data = source.read_at(begin, n)
    if len(data) != n:
        raise ChangedError("the input became shorter while it was packed").at(path=item.original or source.name)
    return data


def _part(source: Source, begin: int, n: int, item: Item) -> U8:
    """Return n bytes of a source, those of an array as they lie there."""
    if isinstance(source, _ArraySource):
        return for_kernels(source.raw[begin : begin + n])
    raw = recycle(n)
    _read_into(source, begin, raw, item)
    return raw


def _read_into(source: Source, begin: int, raw: U8, item: Item) -> None:
    if source.readinto_at(begin, memoryview(raw)) != raw.size:
        raise ChangedError("the input became shorter while it was packed").at(path=item.original or source.name)


def items_of(src: Any, name: str | None, dereference: bool | None) -> tuple[list[Item], list[Source]]:
    """Return the items of what the caller gave to `pack`, and the sources that it must close."""
    if isinstance(src, str | os.PathLike):
        return collect([Path(src)], dereference), []
    if isinstance(src, list | tuple):
        return collect([Path(p) for p in src], dereference), []
    source = open_source(src)
    default = os.path.basename(source.name) if not source.name.startswith("<") else "data"
    try:
        check_name(name or default)
    except CorruptError as e:
        source.close()
        raise UsageError(e.message).at(member=e.member) from None
    item = Item(name or default, FILE, 0o644, NO_MTIME, source.size, lambda: _Borrowed(source))
    return [item], [source]


class _Borrowed(Source):
    """A source that somebody else closes."""

    def __init__(self, source: Source) -> None:
        super().__init__(source.name, source.size)
        self.inner = source
        self.read_at = source.read_at  # type: ignore[method-assign]
        self.readinto_at = source.readinto_at  # type: ignore[method-assign]


def pack(
    src: Any,
    dst: Any = None,
    *,
    level: str = "default",
    threads: int | None = None,
    force: bool = False,
    sha256: bool = True,
    dereference: bool | None = None,
    strict: bool = False,
    resume: bool = False,
    verify_file: bool = False,
    name: str | None = None,
    base: Any = None,
    progress: Progress | None = None,
) -> PackReport:
    """Pack `src` into the archive `dst`.

    `src`: a path to a file or folder, a list of paths, a bytes-like object, or a binary file (a pipe too). `dst`: a path
    (None: that of `src` with ".tzip" added) or a binary file. The file appears under its name whole or not at all; a path that
    exists is replaced only with `force`. `sha256=False` leaves the SHA-256 of the members out, `dereference` follows
    links, `strict` refuses `.safetensors` files that break the rules of their format (they are packed as plain bytes
    otherwise), `resume` goes on where a killed call stopped, `verify_file` reads the finished file back, `name` is the
    member's name when `src` has none. `progress` is called with numbers of bytes done.

    `base`: paths of earlier files, folders or archives. Tensors that are like theirs are stored as differences from them, and
    are read only where the bases are; see `tzip.open`. Bases that are archives may lean on others themselves.

    Raises UsageError, ChangedError (the input changed meanwhile) or OSError; nothing is left under the name of `dst` then.
    """
    options = Options(level, threads, sha256, strict, resume, progress, base=base)
    items, sources = items_of(src, name, dereference)
    try:
        if dst is None:
            if not isinstance(src, str | os.PathLike):
                raise UsageError("say where the archive goes: only a single path has a default")
            base = Path(os.path.abspath(src))
            dst = base.with_name(base.name + SUFFIX)
        if isinstance(dst, str | os.PathLike):
            return _pack_to_path(items, Path(dst), options, force, verify_file)
        return pack_to_file(items, dst, None, replace(options, resume=False))
    finally:
        for source in sources:
            source.close()


def pack_items(
    items: Sequence[Item],
    dst: Path,
    options: Options,
    *,
    force: bool = False,
    check: Callable[[PackReport], None] | None = None,
) -> PackReport:
    """Pack items into a file that appears whole; `check` may refuse the report by raising before it does."""
    return _pack_to_path(items, dst, options, force, False, check)


def _pack_to_path(
    items: Sequence[Item],
    target: Path,
    options: Options,
    force: bool,
    verify_file: bool,
    check: Callable[[PackReport], None] | None = None,
) -> PackReport:
    if os.path.lexists(target):
        if not force:
            raise UsageError("the output exists; --force replaces it").at(path=str(target))
        if target.is_dir():
            raise UsageError("the output is a folder").at(path=str(target))
        if target.exists() and any(i.original and i.kind == FILE and os.path.samefile(i.original, target) for i in items):
            raise UsageError("input and output are the same file").at(path=str(target))
    with PartialFile(target, force=force, resume=options.resume, keep=options.resume) as partial:
        report = pack_to_file(items, partial.file, str(target), options)
        if any(target.exists() and os.path.samefile(base, target) for base in report.bases):
            raise UsageError("the output is a base of what is packed").at(path=str(target))
        if verify_file:
            verify(partial.path, deep=True, threads=options.threads, base=options.base)
        if check is not None:
            check(report)
        partial.publish()
    return report


def pack_to_bytes(items: Sequence[Item], options: Options) -> bytes:
    """Pack items into memory."""
    out = io.BytesIO()
    pack_to_file(items, out, None, options)
    return out.getvalue()


def pack_to_file(items: Sequence[Item], out: BinaryIO, target: str | None, options: Options) -> PackReport:
    """Pack items into a binary file, from where it stands on; `target` is its name in the report."""
    start = time.perf_counter()
    with Workers(thread_count(options.threads)) as workers:
        packer = Packer(out, workers, options)
        try:
            for item in items:
                try:
                    packer.add(item)
                except TzipError as e:
                    raise e.at(member=item.name) from None
            archive_id = packer.finish()
        finally:
            packer.close()
    for message in packer.warnings:
        warnings.warn(message, UserWarning, stacklevel=4)
    return PackReport(
        target,
        archive_id.hex(),
        packer.bytes_in,
        packer.writer.position,
        time.perf_counter() - start,
        packer.members,
        packer.warnings,
        sorted(packer.leans_on),
    )
