"""Writing an archive front to back: records at their alignment, then index and footer (FORMAT.md, section 2)."""

import hashlib
from collections import defaultdict
from typing import Any, BinaryIO

from tzip.formats.atomic import write_all
from tzip.formats.catalogue import Catalogue
from tzip.formats.layout import (
    CHUNK,
    INDEX,
    MAX_RECORD,
    ArchiveHeader,
    ChunkHead,
    Footer,
    check_at,
    record_start,
)


class ArchiveWriter:
    """Appends structures to `out`, a binary file whose position is the archive's origin.

    With `resume` the file already holds what an earlier writer left: as long as the same bytes would be written,
    they are kept; at the first difference the file is cut off there.
    """

    def __init__(self, out: BinaryIO, *, resume: bool = False) -> None:
        self.out = out
        self.position = 0
        self.resuming = resume
        self.columns: dict[str, list[Any]] = defaultdict(list)
        self.member_names: list[str] = []
        self.tensor_names: list[str] = []
        self.input_files: list[str] = []
        self.input_tensors: list[str] = []

    def header(self, header: ArchiveHeader) -> None:
        """Write the archive header."""
        self._append(0, header.write())

    def record(self, kind: bytes, data: bytes | memoryview) -> int:
        """Write a record with its bare check; return its offset."""
        start = record_start(self.position, kind, len(data))
        self._append(start, bytes(data[:8]) + check_at(data, start), memoryview(data)[16:])
        return start

    def chunk(self, data: bytes | memoryview, codecs: int) -> None:
        """Write a chunk record and note it for the index."""
        offset = self.record(CHUNK, data)
        self.columns["c_offset"].append(offset)
        self.columns["c_length"].append(len(data))
        self.columns["c_check"].append(int.from_bytes(data[8:16], "little"))
        self.columns["c_codecs"].append(codecs)

    def earlier_chunk(self) -> bytes | None:
        """Return the chunk record, its check bare, that an earlier writer left at the current position, or None."""
        if not self.resuming:
            return None
        for start in sorted({record_start(self.position, CHUNK, n) for n in (0, MAX_RECORD)}):
            self.out.seek(start)
            head = self.out.read(ChunkHead.SIZE)
            if len(head) == ChunkHead.SIZE and head[:8] == CHUNK:
                length = ChunkHead.read(head).length
                if ChunkHead.SIZE <= length <= MAX_RECORD and record_start(self.position, CHUNK, length) == start:
                    rest = self._read(length - len(head))
                    whole = head[:8] + check_at(head, start) + head[16:] + rest
                    return whole if len(whole) == length else None
        return None

    def _read(self, n: int) -> bytes:
        parts = []
        while n and (part := self.out.read(n)):
            parts.append(part)
            n -= len(part)
        return b"".join(parts)

    def _append(self, start: int, data: bytes, more: bytes | memoryview = b"") -> None:
        first = bytes(start - self.position) + data
        if self.resuming:
            self.out.seek(self.position)
            if self._read(len(first)) == first and self._read(len(more)) == more:
                self.position += len(first) + len(more)
                return
            self.resuming = False
            self.out.seek(self.position)
            self.out.truncate()
        write_all(self.out, first)
        write_all(self.out, more)
        self.position += len(first) + len(more)

    def finish(self) -> bytes:
        """Write index and footer; return the archive id."""
        names = self.member_names + self.tensor_names + self.input_files + self.input_tensors
        index = Catalogue.of(self.columns, names).write(INDEX)
        Catalogue.read(index, INDEX)  # an archive that its own reader refuses must not appear
        offset = self.record(INDEX, index)
        archive_id = hashlib.sha256(memoryview(index)[16:]).digest()
        self._append(self.position, Footer(offset, len(index), self.position + Footer.SIZE, archive_id).write())
        if self.resuming:
            self.out.seek(self.position)
            self.out.truncate()
        return archive_id
