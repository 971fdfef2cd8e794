"""Proving an archive: every structure, every stored byte, and what it decodes to."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tzip.archive import Archive
from tzip.coders.errors import CorruptError
from tzip.formats.catalogue import CLOSED, FILE, FOLDER, SHA_KNOWN
from tzip.formats.envelope import prefix
from tzip.formats.layout import CHUNK, DONE, MEMBER
from tzip.workers import Workers, thread_count


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify` proved: records, chunks, and members whose SHA-256 was computed (deep only)."""

    members: int
    chunks: int
    bytes: int
    deep: bool
    without_sha256: list[str]


def verify(
    source: Any,
    *,
    deep: bool = False,
    threads: int | None = None,
    base: Any = None,
    progress: Callable[[int], None] | None = None,
) -> VerifyReport:
    """Prove an archive: every structure and every stored byte; with `deep` also decode it and compare all sums and SHA-256.

    `base`: where bases are, see `tzip.open`; only `deep` needs them. Raises the error of the first damage, with its place.
    `progress` is called with numbers of stored (deep: decoded) bytes.
    """
    from tzip.coders.sums import sum64

    told = progress or (lambda n: None)
    with Archive(source, base=base) as archive, Workers(thread_count(threads)) as workers:
        reader = archive.reader
        index = reader.index
        _verify_structure(archive)
        if deep:
            archive.find_bases()
        pairs = [(r, c) for r, n in enumerate(index.run_chunks.tolist()) for c in range(n)]

        def one(pair: tuple[int, int]) -> int:
            buffer, length, check = reader.read_chunk(*pair, 0)
            if sum64(buffer[16:length]) != check:
                raise CorruptError("a chunk record does not match its check").at(
                    path=reader.source.name, offset=reader.chunk_at(*pair)[0]
                )
            return length

        if not deep:
            reader.source.expect(sorted(reader.chunk_at(*pair) for pair in pairs))
            for n in workers.map(one, pairs):
                told(n)
        missing = []
        for i, name in enumerate(index.member_names):
            if deep:
                for part in archive.checked_stream(i, workers):
                    told(part.size)
            if not int(index["m_flags"][i]) & SHA_KNOWN and int(index["m_kind"][i]) != FOLDER:
                missing.append(name)
        return VerifyReport(len(index.member_names), len(pairs), reader.footer.archive_length, deep, missing)


def _verify_structure(archive: Archive) -> None:
    """Walk all records: what stands between them is zero, and they are those that the index names, in its order."""
    reader = archive.reader
    index = reader.index
    chunks = iter(zip(index["c_offset"].tolist(), index["c_length"].tolist(), strict=True))
    members = iter(enumerate(index["m_record"].tolist()))
    current = -1
    open_done = False
    for record in reader.records():
        at = record.offset - reader.origin
        try:
            if record.kind == CHUNK:
                if next(chunks, None) != (at, record.length):
                    raise CorruptError("a chunk record that the index does not have")
            elif record.kind == MEMBER:
                if next(members, None) != (current + 1, at) or open_done:
                    raise CorruptError("a member record that the index does not have")
                current += 1
                reader.inline_bytes(current)
                open_done = not int(index["m_flags"][current]) & CLOSED
            elif record.kind == DONE:
                done = reader.done_record(record.offset)
                known = bool(int(index["m_flags"][current]) & SHA_KNOWN) if current >= 0 else False
                sha = index["m_sha"][current].tobytes() if known else None
                if not open_done or (done.member, done.size, done.sha256) != (current, int(index["m_size"][current]), sha):
                    raise CorruptError("a done record contradicts the index")
                open_done = False
            elif at != reader.footer.index_offset:
                raise CorruptError("a second index")
        except CorruptError as e:
            raise e.at(path=reader.source.name, offset=record.offset) from None
    if next(chunks, None) is not None or next(members, None) is not None or open_done:
        raise CorruptError("records that the index has are missing").at(path=reader.source.name)
    _verify_prefix(archive)


def _verify_prefix(archive: Archive) -> None:
    """Prove the header before an archive in the in-place form: it is that of the file which the archive holds."""
    reader = archive.reader
    index = reader.index
    if not reader.origin or index["m_kind"].tolist() != [FILE] or not int(index["m_tensors"][0]):
        return
    inline = reader.inline_bytes(0)
    expected = prefix(inline[: 8 + int.from_bytes(inline[:8], "little")])
    if len(expected) == reader.origin and reader.source.read_at(0, reader.origin) != expected:
        raise CorruptError("the header before the archive is not that of the file which it holds").at(
            path=reader.source.name, offset=0
        )
