"""Recovery: what is whole in a damaged archive, with or without its index."""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tzip.archive import Archive
from tzip.bases import paths_of
from tzip.coders.arrays import U8
from tzip.coders.errors import BaseNotFoundError, CorruptError, NotAnArchiveError, TzipError, UnsupportedError, UsageError
from tzip.coders.mixing import unmix
from tzip.coders.sums import sum64
from tzip.formats.atomic import PartialFile, refuse_links
from tzip.formats.catalogue import FILE, FOLDER, IN_RUN, LINK, NO_MTIME, SHA_KNOWN, Catalogue
from tzip.formats.dtypes import OPAQUE
from tzip.formats.layout import (
    ALIGN,
    CHUNK,
    CHUNK_ELEMENTS,
    DONE,
    MAX_BODY,
    MAX_RECORD,
    MEMBER,
    MIN_RECORD,
    ArchiveHeader,
    ChunkHead,
    DoneRecord,
    Footer,
    check8,
    check_at,
)
from tzip.formats.reader import KINDS, ArchiveReader
from tzip.formats.source import Source, open_source
from tzip.workers import Workers, thread_count

_WINDOW = 1 << 20
_PREFIX = CHUNK[:3]
_UNKNOWN = (1 << 59) - 1  # elements of a run whose member record is lost: more than an archive has


@dataclass(slots=True)
class RecoverReport:
    """What recovery wrote and what it could not: members whole, tensors of other members, and what is lost, with reasons."""

    index_found: bool
    whole: list[str] = field(default_factory=list)
    tensors: dict[str, list[str]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    unproven: list[str] = field(default_factory=list)


def recover(
    source: Any,
    dst: Any,
    *,
    threads: int | None = None,
    force: bool = False,
    base: Any = None,
    progress: Callable[[int], None] | None = None,
) -> RecoverReport:
    """Write every whole member of a damaged archive below the folder `dst`, and every whole tensor of the others.

    Tensors of a damaged member go to `<member>.recovered.safetensors`. Without an index the records themselves are
    searched for; what they hold is proven by their sums, and a member without a readable done record is whole by those
    alone (listed as `unproven`). `base`: where bases are, see `tzip.open`; what needs one that is not found is lost.
    Raises NotAnArchiveError when nothing of an archive is found.
    """
    told = progress or (lambda n: None)
    root = Path(dst)
    paths_of(base)
    opened = open_source(source)
    with opened, Workers(thread_count(threads)) as workers, contextlib.ExitStack() as stack:
        try:
            archives = [Archive(None, ArchiveReader(opened), base=base)]
            report = RecoverReport(True)
        except TzipError as e:
            if isinstance(e, UnsupportedError) and _header_is_sound(opened):
                raise
            archives = [Archive(None, reader, base=base) for reader in _salvage(opened, told)]
            report = RecoverReport(False)
            if not archives:
                raise NotAnArchiveError("nothing of a tzip archive is found here").at(path=opened.name) from None
        root.mkdir(parents=True, exist_ok=True)
        for archive in archives:
            stack.callback(archive.close)
            for i, name in enumerate(archive.reader.index.member_names):
                try:
                    refuse_links(root, root / name)
                    _member(archive, i, name, root, workers, force, report)
                except (UsageError, CorruptError, FileExistsError, NotADirectoryError, IsADirectoryError) as e:
                    report.lost.append(f"{name}: {e}")
    return report


def _header_is_sound(source: Source) -> bool:
    """Say whether the header's own check holds, so that a version that is too new is to be believed."""
    header = source.read_at(0, ArchiveHeader.SIZE)
    return check8(header[:56]) == header[56:]


def _member(
    archive: Archive, i: int, name: str, root: Path, workers: Workers, force: bool, report: RecoverReport
) -> None:
    index = archive.reader.index
    kind = int(index["m_kind"][i])
    mtime = int(index["m_mtime"][i])
    target = root / name
    if kind == FOLDER:
        target.mkdir(parents=True, exist_ok=True)
        report.whole.append(name)
        return
    if kind == LINK:
        text = archive.reader.inline_bytes(i).decode()
        if report.index_found:  # only then all links are known, and none leads out of the folder through another
            target.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(text, target)
            report.whole.append(name)
        else:
            report.lost.append(f"{name}: a link to {text!r}")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    reason = "a bare tensor"
    if kind == FILE:
        try:
            with PartialFile(target, force=force) as partial:
                for part in archive.checked_stream(i, workers):
                    partial.write(part)
                partial.publish(int(index["m_mode"][i]) & 0o777, None if mtime == NO_MTIME else mtime)
        except (CorruptError, UnsupportedError, BaseNotFoundError) as e:
            reason = e.message
        else:
            report.whole.append(name)
            if not int(index["m_flags"][i]) & SHA_KNOWN:
                report.unproven.append(name)
            return
    _tensors(archive, i, name, root, force, report, reason)


def _tensors(archive: Archive, i: int, name: str, root: Path, force: bool, report: RecoverReport, reason: str) -> None:
    """Write the whole tensors of a member as a safetensors file; each is decoded twice, so that memory stays bounded."""
    first = int(np.cumsum(archive.reader.index["m_tensors"])[i]) - int(archive.reader.index["m_tensors"][i])
    count = int(archive.reader.index["m_tensors"][i])
    header: dict[str, Any] = {}
    good: list[int] = []
    at = 0
    for row in range(first, first + count):
        tensor = archive.reader.index.tensor_names[row]
        try:
            for _ in _parts(archive, row):
                pass
        except (CorruptError, UnsupportedError, BaseNotFoundError) as e:
            report.lost.append(f"{name}: tensor {tensor!r}: {e.message}")
            continue
        element = archive.reader.index.dtype_of(row)
        nbytes = int(archive.reader.index.tensor_nbytes[row])
        shape = list(archive.shapes[row])
        plain = element is None or element is OPAQUE or element.name == "C128"
        header[tensor or "tensor"] = {
            "dtype": "U8" if plain or element is None else element.name,
            "shape": [nbytes] if plain else shape,
            "data_offsets": [at, at + nbytes],
        }
        at += nbytes
        good.append(row)
    if not good:
        report.lost.append(f"{name}: {reason}")
        return
    report.lost.append(f"{name}: not whole ({reason}); {len(good)} of {count} tensors recovered")
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    target = root / f"{name}.recovered.safetensors"
    with PartialFile(target, force=force) as partial:
        partial.write(len(text).to_bytes(8, "little") + text)
        for row in good:
            for part in _parts(archive, row):
                partial.write(part)
        partial.publish()
    report.tensors[name] = [archive.reader.index.tensor_names[row] for row in good]


def _parts(archive: Archive, row: int) -> Iterator[U8]:
    nbytes = int(archive.reader.index.tensor_nbytes[row])
    if nbytes < 0:
        raise UnsupportedError("its dtype is not known to this tzip")
    step = CHUNK_ELEMENTS * 8
    for begin in range(0, nbytes, step):
        yield archive.tensor_bytes(row, begin, min(nbytes, begin + step), 1)


# ---------------------------------------------------------------- without an index


class _SalvagedReader(ArchiveReader):
    """One member record and the chunk records that were found for its runs, and for those that it shares with others."""

    def __init__(
        self,
        source: Source,
        origin: int,
        local: Catalogue,
        runs: dict[int, tuple[int, int]],
        found: dict[tuple[int, int], tuple[int, int]],
    ) -> None:
        self.source = source
        self.origin = origin
        self.header = ArchiveHeader("", 0)
        self.footer = Footer(0, 0, source.size, b"")
        self.index = local
        self.found = found
        self.base = local.first_run
        # Runs of this member count from 0 here; those of earlier members follow. What nobody says anything of gets a shape
        # that no chunk has.
        in_run = (local["x_kind"] == IN_RUN).tolist()
        used: list[int] = local["x_run"].tolist()
        ends: dict[int, int] = {}
        for x, i, end in zip(used, in_run, (local["x_offset"] + local["x_length"]).tolist(), strict=True):
            if i and x < self.base:
                ends[x] = max(end, ends.get(x, 0))
        self.ordinals: list[int] = [*range(self.base, self.base + local["r_width"].size), *ends]
        rows = {ordinal: row for row, ordinal in enumerate(self.ordinals)}
        shifted = [rows[x] if i else 0 for x, i in zip(used, in_run, strict=True)]
        shapes = []
        for ordinal, end in ends.items():
            width, elements = runs.get(ordinal, (8, _UNKNOWN))
            shapes.append((width, elements) if end <= width * elements else (8, _UNKNOWN))
        local.columns["x_run"] = np.array(shifted, np.uint32)
        local.columns["r_width"] = np.append(local["r_width"], np.array([w for w, _ in shapes], np.uint8))
        local.columns["r_elements"] = np.append(local["r_elements"], np.array([n for _, n in shapes], np.uint64))
        local.columns["r_inputs"] = np.append(local["r_inputs"], np.zeros(len(shapes), np.uint32))
        local.__dict__.pop("run_chunks", None)  # derived from the columns
        self.first_chunk = np.cumsum(local.run_chunks) - local.run_chunks

    def run_ordinal(self, run: int) -> int:
        return self.ordinals[run]

    def chunk_at(self, run: int, chunk: int) -> tuple[int, int]:
        if int(self.index["r_elements"][run]) == _UNKNOWN:
            raise CorruptError("the bytes are those of another member, whose record is lost")
        place = self.found.get((self.ordinals[run], chunk))
        if place is None:
            raise CorruptError(f"chunk {chunk} of run {self.ordinals[run]} is missing or damaged")
        return place

    def read_chunk(self, run: int, chunk: int, slack: int) -> tuple[U8, int, int]:
        offset, length = self.chunk_at(run, chunk)
        buffer = np.zeros(length + slack, np.uint8)
        self.source.readinto_at(offset, memoryview(buffer)[:length])
        return buffer, length, int.from_bytes(check_at(memoryview(buffer), offset - self.origin), "little")

    def inline_bytes(self, member: int) -> bytes:
        return self.index.inline


def _salvage(source: Source, told: Callable[[int], None]) -> list[_SalvagedReader]:
    """Find member, chunk and done records by their magic and their checks."""
    members: list[Catalogue] = []
    done: dict[int, DoneRecord] = {}
    chunks: dict[tuple[int, int], tuple[int, int]] = {}
    origin = _find_origin(source)
    for kind, offset, record in _sound_records(source, origin, told):
        with contextlib.suppress(TzipError):
            if kind == MEMBER:
                bare = record[:8] + check8(memoryview(record)[16:]) + record[16:]
                members.append(Catalogue.read(bare, MEMBER))
            elif kind == DONE:
                found = DoneRecord.read(record)
                done.setdefault(found.member, found)
            elif kind == CHUNK:
                head = ChunkHead.read(record)
                chunks.setdefault((head.run, head.chunk), (offset, len(record)))
    runs: dict[int, tuple[int, int]] = {}
    for local in members:
        for i, (width, elements) in enumerate(zip(local["r_width"].tolist(), local["r_elements"].tolist(), strict=True)):
            runs.setdefault(local.first_run + i, (width, elements))
    readers = []
    seen: set[int] = set()
    for local in members:
        if local.first_member in seen:
            continue
        seen.add(local.first_member)
        end = done.get(local.first_member)
        if local["r_width"].size:
            known = end is not None and end.size == int(local["m_size"][0]) and end.sha256 is not None
            flags = int(local["m_flags"][0]) & ~SHA_KNOWN | (SHA_KNOWN if known else 0)
            local.columns["m_flags"] = np.array([flags], np.uint8)
            if known and end is not None and end.sha256 is not None:
                local.columns["m_sha"] = np.frombuffer(end.sha256, np.uint8).reshape(1, 32)
        readers.append(_SalvagedReader(source, origin, local, runs, chunks))
    return readers


def _sound_records(source: Source, origin: int, told: Callable[[int], None]) -> Iterator[tuple[bytes, int, bytes]]:
    """Yield (kind, offset, bytes) of every record that was written where it stands, front to back."""
    for at, record in _candidates(source, told):
        if _offset_of(record) == at - origin:
            yield record[:8], at, record


def _candidates(source: Source, told: Callable[[int], None]) -> Iterator[tuple[int, bytes]]:
    """Yield what has the head of a record, wherever it stands."""
    at = 0
    while at < source.size:
        window = source.read_at(at, _WINDOW + len(_PREFIX))
        hit = window.find(_PREFIX)
        if hit < 0:
            told(min(_WINDOW, source.size - at))
            at += _WINDOW
            continue
        record = _record_at(source, at + hit)
        if record is not None:
            yield at + hit, record
        told(hit + 1)
        at += hit + 1


def _offset_of(record: bytes) -> int:
    """Return the offset in its archive for which the record's check holds; rubbish when it holds nowhere."""
    if record[:8] == CHUNK:
        bare = sum64(np.frombuffer(record, np.uint8)[16:])
    else:
        bare = int.from_bytes(check8(memoryview(record)[16:]), "little")
    return unmix(bare ^ int.from_bytes(record[8:16], "little"))


def _find_origin(source: Source) -> int:
    """Return where in the file the archive starts: by its header, its footer, or what most records agree on.

    Records of an archive within a payload agree on a later start than those around them.
    """
    if source.read_at(0, 8) == ArchiveHeader.MAGIC:
        return 0
    with contextlib.suppress(TzipError):
        tail = source.read_at(max(0, source.size - Footer.SIZE), Footer.SIZE)
        return source.size - Footer.read(tail, source.size).archive_length
    origins = Counter(at - _offset_of(record) for at, record in _candidates(source, lambda n: None))
    agreed = [origin for origin, n in origins.items() if n > 1]
    return min(agreed, default=0)


def _record_at(source: Source, at: int) -> bytes | None:
    head = source.read_at(at, 32)
    if head[:8] not in KINDS:
        return None
    length = int.from_bytes(head[16:24], "little")
    if not MIN_RECORD <= length <= (MAX_RECORD if head[:8] == CHUNK else MAX_BODY + 64) or length % ALIGN:
        return None
    record = source.read_at(at, length)
    return record if len(record) == length else None
