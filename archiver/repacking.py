"""Repacking: the members of an archive into a new one, at another level, with the same SHA-256."""

import hashlib
import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

from tzip.archive import Archive
from tzip.coders.arrays import U8
from tzip.coders.errors import CorruptError, UsageError
from tzip.duplicates import ArchivedSource
from tzip.formats.catalogue import FOLDER, LINK, SHA_KNOWN, TENSOR
from tzip.formats.layout import CHUNK_ELEMENTS, ChunkHead
from tzip.formats.source import Source
from tzip.packing import Options, PackReport, pack_items
from tzip.tree import Item

_PARTS = 6  # decoded chunks kept: a bundle is read by many small tensors, far apart


class _MemberSource(ArchivedSource):
    """A member of an archive, read at any offset; chunks are decoded where they are asked for, by one thread at a time."""

    def __init__(self, archive: Archive, member: int) -> None:
        index = archive.reader.index
        super().__init__(index.member_names[member], int(index["m_size"][member]))
        self.archive = archive
        self.extents = archive.member_extents(member)
        self.begins = [begin for begin, *_ in self.extents]
        inline = any(run < 0 for _, _, run, _ in self.extents)
        self.inline = archive.reader.inline_bytes(member) if inline else b""
        self.cache: OrderedDict[tuple[int, int], U8] = OrderedDict()
        self.lock = threading.Lock()

    def read_at(self, offset: int, n: int) -> bytes:
        buffer = bytearray(max(0, min(n, self.size - offset)))
        self.readinto_at(offset, memoryview(buffer))
        return bytes(buffer)

    def readinto_at(self, offset: int, buffer: memoryview) -> int:
        done = 0
        while done < len(buffer) and offset + done < self.size:
            begin, length, run, at = self.extents[bisect_right(self.begins, offset + done) - 1]
            skip = offset + done - begin
            n = min(len(buffer) - done, length - skip)
            if run < 0:
                buffer[done : done + n] = self.inline[at + skip : at + skip + n]
            else:
                step = CHUNK_ELEMENTS * int(self.archive.reader.index["r_width"][run])
                chunk, start = divmod(at + skip, step)
                n = min(n, step - start)
                buffer[done : done + n] = memoryview(self._chunk(run, chunk))[start : start + n]
            done += n
        return done

    def place(self, pieces: Sequence[tuple[int, int]]) -> Hashable:
        index = self.archive.reader.index
        at, found = 0, -1
        for begin, n in pieces:
            i = bisect_right(self.begins, begin) - 1
            start, length, run, offset = self.extents[i]
            if run < 0 or found not in (-1, run) or (start, length, offset) != (begin, n, at):
                return None
            found = run
            at += n
        whole = found >= 0 and at == int(index["r_elements"][found]) * int(index["r_width"][found])
        return found if whole else None

    def fingerprint(self, pieces: Sequence[tuple[int, int]]) -> bytes | None:
        run = self.place(pieces)
        if not isinstance(run, int):
            return None
        reader = self.archive.reader
        heads = (
            ChunkHead.read(reader.source.read_at(reader.chunk_at(run, chunk)[0], ChunkHead.SIZE))
            for chunk in range(int(reader.index.run_chunks[run]))
        )
        return hashlib.sha256(b"".join(head.decoded_sum.to_bytes(8, "little") for head in heads)).digest()

    def _chunk(self, run: int, chunk: int) -> U8:
        key = (run, chunk)
        with self.lock:
            if key not in self.cache:
                self.cache[key] = self.archive.decode_chunk(run, chunk)
                if len(self.cache) > _PARTS:
                    self.cache.popitem(last=False)
            self.cache.move_to_end(key)
            return self.cache[key]


def repack(
    source: Any,
    dst: str | os.PathLike[str],
    *,
    level: str = "default",
    threads: int | None = None,
    force: bool = False,
    base: Any = None,
    keep_base: bool = True,
    progress: Callable[[int], None] | None = None,
) -> PackReport:
    """Write the archive `source` anew at another level to `dst`: the same members, the same SHA-256.

    `base`: where the bases of differences are, see `tzip.open`. An archive that leans on others leans on them again, or,
    with `keep_base=False`, stands by itself.

    Memory stays bounded. Raises what `open` and `pack` raise, and CorruptError when a member does not match the SHA-256
    that it had; nothing is left under the name of `dst` then.
    """
    with Archive(source, base=base) as archive:
        index = archive.reader.index
        paths = archive.find_bases()
        if (index["m_kind"] == TENSOR).any():
            raise UsageError("an archive of a bare tensor is made anew with tzip.encode")
        items = member_items(archive)
        known = [bool(f & SHA_KNOWN) for f in index["m_flags"].tolist()]
        sums = {m.name: m.sha256 for m, k in zip(archive.members(), known, strict=True) if k}

        def check(report: PackReport) -> None:
            for member in report.members:
                if member.sha256 and sums.get(member.name, member.sha256) != member.sha256:
                    raise CorruptError("a repacked member does not match its SHA-256").at(member=member.name)

        any_sums = any(known) or not known
        options = Options(level, threads, any_sums, progress=progress, base=paths if paths and keep_base else None)
        return pack_items(items, Path(dst), options, force=force, check=check)


def member_items(archive: Archive) -> list[Item]:
    """Return the members of an archive as items to pack, decoded where they are read; the archive stays open as long."""
    items = []
    for i, info in enumerate(archive.members()):
        kind = int(archive.reader.index["m_kind"][i])
        link = archive.reader.inline_bytes(i).decode() if kind == LINK else ""
        open_member = None if kind in (FOLDER, LINK) else _opener(archive, i)
        items.append(Item(info.name, kind, info.mode, info.mtime_ns, info.size, open_member, link))
    return items


def _opener(archive: Archive, member: int) -> Callable[[], Source]:
    return lambda: _MemberSource(archive, member)
