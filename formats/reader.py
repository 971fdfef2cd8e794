"""Reading an archive's structures: header, footer, index, records. Proves positions and sizes; decodes no chunk."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tzip.coders.arrays import U8
from tzip.coders.errors import CorruptError, TruncatedError, TzipError
from tzip.coders.scratch import borrow
from tzip.formats.catalogue import CLOSED, Catalogue, check_chunk_table
from tzip.formats.envelope import origin_of
from tzip.formats.layout import (
    ALIGN,
    CHUNK,
    CHUNK_ELEMENTS,
    DONE,
    INDEX,
    MAX_BODY,
    MAX_RECORD,
    MEMBER,
    MIN_RECORD,
    RECORD_HEAD,
    WIDE_ALIGN,
    ArchiveHeader,
    DoneRecord,
    Footer,
    check8,
    check_at,
    record_start,
)
from tzip.formats.source import Source

TAIL = 65536  # the last bytes of a file, read at once: they often hold the whole index
SMALL = 8192  # bytes of a record that are read with its head: mostly all of it
MAX_EXPANSION = 1 << 17  # bytes of all members for each byte of the archive
KINDS = (MEMBER, CHUNK, DONE, INDEX)


@dataclass(frozen=True, slots=True)
class RawRecord:
    """A record found in a file: its magic, its offset in the file, its length."""

    kind: bytes
    offset: int
    length: int


class ArchiveReader:
    """The structures of an archive in `source`. `origin` is the offset of its first byte in the file.

    Raises the errors of FORMAT.md with file and offset.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        try:
            self._open()
        except TzipError as e:
            raise e.at(path=source.name) from None

    def _open(self) -> None:
        size = self.source.size
        tail = self.source.read_at(max(0, size - TAIL), TAIL)
        try:
            self.footer = Footer.read(tail, size)
        except TruncatedError:
            # Not an archive at all, or one that is cut off, which may stand behind a header.
            begin = self.source.read_at(origin_of(self.source.read_at(0, 8)), ArchiveHeader.SIZE)
            ArchiveHeader.read(begin if begin[:8] == ArchiveHeader.MAGIC else self.source.read_at(0, ArchiveHeader.SIZE))
            raise
        self.origin = size - self.footer.archive_length
        at = self.origin - (size - len(tail))
        found = tail[at : at + ArchiveHeader.SIZE] if at >= 0 else self.source.read_at(self.origin, ArchiveHeader.SIZE)
        self.header = ArchiveHeader.read(found)
        if self.footer.index_length > MAX_BODY + 64:
            raise CorruptError("the index is larger than the format allows").at(offset=size - Footer.SIZE)
        start = self.origin + self.footer.index_offset
        in_tail = start - (size - len(tail))
        if in_tail >= 0:
            raw = tail[in_tail : in_tail + self.footer.index_length]
        else:
            raw = self.source.read_at(start, self.footer.index_length)
        if len(raw) != self.footer.index_length:
            raise TruncatedError("the index is cut off").at(offset=start)
        if hashlib.sha256(memoryview(raw)[16:]).digest() != self.footer.archive_id:
            raise CorruptError("the index does not match the archive id of the footer").at(offset=start)
        raw = raw[:8] + check_at(raw, self.footer.index_offset) + raw[16:]
        try:
            self.index = Catalogue.read(raw, INDEX)
            check_chunk_table(self.index["c_offset"], self.index["c_length"], self.footer.index_offset)
            if int(self.index.run_chunks.sum()) != self.index["c_offset"].size:
                raise CorruptError("the chunk table does not fit the runs")
            if int(self.index["m_size"].sum(dtype=np.float64)) > MAX_EXPANSION * self.footer.archive_length:
                raise CorruptError("the members are larger than an archive of this size can hold")
            records = self.index["m_record"]
            if records.size and (int(records.max()) >= self.footer.index_offset or (records % ALIGN).any()):
                raise CorruptError("a member record lies outside the archive")
        except CorruptError as e:
            raise e.at(offset=start) from None
        self.first_chunk = np.cumsum(self.index.run_chunks) - self.index.run_chunks
        self._before = {
            c: np.concatenate(([0], np.cumsum(self.index[c], dtype=np.int64)))
            for c in ("m_extents", "m_tensors", "m_runs", "t_ndim", "r_inputs")
        }

    def chunk_elements(self, run: int, chunk: int) -> int:
        """Return the elements of a chunk of a run."""
        return min(CHUNK_ELEMENTS, int(self.index["r_elements"][run]) - chunk * CHUNK_ELEMENTS)

    def chunk_at(self, run: int, chunk: int) -> tuple[int, int]:
        """Return the offset in the file and the length of a chunk record."""
        i = int(self.first_chunk[run]) + chunk
        return self.origin + int(self.index["c_offset"][i]), int(self.index["c_length"][i])

    def run_ordinal(self, run: int) -> int:
        """Return the ordinal that chunk records give to a run of the index."""
        return run

    def read_chunk(self, run: int, chunk: int, slack: int) -> tuple[U8, int, int]:
        """Return the chunk record in a read-only buffer with `slack` more bytes behind it, and its length.

        The buffer is scratch memory, or the source's own: then what follows the record there follows it here. The
        record's bare check is proven to be the one that the index has; it is not compared with the record.
        Raises CorruptError or TruncatedError.
        """
        offset, length = self.chunk_at(run, chunk)
        buffer = self.source.view_at(offset, length + slack)
        if buffer is None:
            buffer = borrow("record", length + slack)
            buffer[length:] = 0
            if self.source.readinto_at(offset, memoryview(buffer)[:length]) != length:
                raise TruncatedError("a chunk record is cut off").at(path=self.source.name, offset=offset)
            buffer.flags.writeable = False
        check = self.chunk_check(run, chunk, memoryview(buffer))
        return buffer, length, check

    def chunk_check(self, run: int, chunk: int, record: memoryview) -> int:
        """Return the bare check of a chunk record after proving that it is the one of the index; its bytes are not summed up.

        Raises CorruptError.
        """
        offset, _ = self.chunk_at(run, chunk)
        check = int.from_bytes(check_at(record, offset - self.origin), "little")
        if check != int(self.index["c_check"][int(self.first_chunk[run]) + chunk]):
            raise CorruptError("a chunk record is not the one that the index has").at(
                path=self.source.name, offset=offset
            )
        return check

    def read_record(self, offset: int) -> bytes:
        """Return the member or done record at `offset` of the file, its check proven and bare."""
        first = self.source.read_at(offset, SMALL)
        head = first[:RECORD_HEAD]
        length = int.from_bytes(head[16:24], "little")
        if len(head) < RECORD_HEAD or head[:8] not in (MEMBER, DONE) or not MIN_RECORD <= length <= MAX_BODY + 64:
            raise CorruptError("no member or done record here").at(path=self.source.name, offset=offset)
        record = first[:length] if length <= len(first) else self.source.read_at(offset, length)
        if len(record) != length:
            raise TruncatedError("a record is cut off").at(path=self.source.name, offset=offset)
        check = check8(record[16:])
        if check != check_at(record, offset - self.origin):
            raise CorruptError("a record does not match its check").at(path=self.source.name, offset=offset)
        return record[:8] + check + record[16:]

    def inline_bytes(self, member: int) -> bytes:
        """Return the inline bytes of a member, from its member record, which must repeat what the index says."""
        offset = self.origin + int(self.index["m_record"][member])
        try:
            record = self.read_record(offset)
            if int.from_bytes(record[8:16], "little") != int(self.index["m_check"][member]):
                raise CorruptError("a member record is not the one that the index has")
            local = Catalogue.read(record, MEMBER)
            self._compare(local, member)
        except CorruptError as e:
            raise e.at(path=self.source.name, offset=offset, member=self.index.member_names[member]) from None
        return local.inline

    def _compare(self, local: Catalogue, member: int) -> None:
        """Raise CorruptError unless the member record says what the index says of that member."""
        index = self.index
        before = {c: int(self._before[c][member]) for c in ("m_extents", "m_tensors", "m_runs")}
        tables = {"x": "m_extents", "t": "m_tensors", "r": "m_runs"}
        same = local.first_member == member and local.first_run == before["m_runs"]
        for column in index.columns:
            if column in ("m_record", "m_check", "m_sha", "dims") or column[0] == "c":
                continue
            if column[0] == "m":
                theirs = index[column][member : member + 1]
            elif column[0] == "i":
                runs = before["m_runs"], before["m_runs"] + int(index["m_runs"][member])
                inputs = slice(*(int(self._before["r_inputs"][run]) for run in runs))
                theirs = index[column][inputs]
            else:
                count = tables[column[0]]
                theirs = index[column][before[count] : before[count] + int(index[count][member])]
            same = same and np.array_equal(local[column], theirs)
        closed = bool(int(index["m_flags"][member]) & CLOSED)
        sha = index["m_sha"][member] if closed else 0
        same = same and bool((local["m_sha"][0] == sha).all()) and int(local["m_record"][0]) == int(local["m_check"][0]) == 0
        dims = int(self._before["t_ndim"][before["m_tensors"]])
        same = same and np.array_equal(local["dims"], index["dims"][dims : dims + local["dims"].size])
        tensors = index.tensor_names[before["m_tensors"] : before["m_tensors"] + int(index["m_tensors"][member])]
        first = int(self._before["r_inputs"][before["m_runs"]])
        same = same and local.input_names == index.input_names[first : first + local["i_kind"].size]
        if not same or local.member_names != [index.member_names[member]] or local.tensor_names != tensors:
            raise CorruptError("a member record contradicts the index")

    def records(self) -> Iterator[RawRecord]:
        """Yield where the records of the archive stand, in order, by the lengths that they state; the index is the last.

        Raises CorruptError at bytes that are no record, or do not stand where the format puts them.
        """
        at = ArchiveHeader.SIZE
        end = self.footer.index_offset + self.footer.index_length
        while at < end:
            window = self.source.read_at(self.origin + at, min(WIDE_ALIGN + RECORD_HEAD, end - at))
            skip = next((i for i in range(len(window)) if window[i]), len(window))
            head = window[skip : skip + RECORD_HEAD]
            length = int.from_bytes(head[16:24], "little")
            limit = MAX_RECORD if head[:8] == CHUNK else MAX_BODY + 64
            start = at + skip
            sound = len(head) == RECORD_HEAD and head[:8] in KINDS and MIN_RECORD <= length <= limit
            if not sound or start + length > end or start != record_start(at, head[:8], length):
                raise CorruptError("bytes that are no record").at(path=self.source.name, offset=self.origin + start)
            yield RawRecord(head[:8], self.origin + start, length)
            at = start + length

    def done_record(self, offset: int) -> DoneRecord:
        """Return the done record at `offset` of the file."""
        return DoneRecord.read(self.read_record(offset))
