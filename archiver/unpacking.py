"""Unpacking: members appear one by one, whole, with their names, permissions and times."""

import contextlib
import hashlib
import os
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from tzip.archive import Archive
from tzip.coders.arrays import U8
from tzip.coders.errors import CorruptError, UsageError
from tzip.formats.atomic import PartialFile, refuse_links, write_all
from tzip.formats.catalogue import FILE, FOLDER, LINK, NO_MTIME, SHA_KNOWN, TENSOR
from tzip.workers import Workers, thread_count


@dataclass(frozen=True, slots=True)
class UnpackReport:
    """What unpacking wrote: names of members, those that were already there (resume), bytes, seconds."""

    target: str
    members: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    bytes_out: int = 0
    seconds: float = 0.0


def unpack(
    source: Any,
    dst: Any = None,
    *,
    members: Sequence[str] | None = None,
    threads: int | None = None,
    force: bool = False,
    resume: bool = False,
    base: Any = None,
    progress: Callable[[int], None] | None = None,
) -> UnpackReport:
    """Restore the members of an archive, byte for byte.

    `source`: as for `tzip.open`. `dst`: a folder (default: the current one), which is created, or a binary file, which
    then gets the one member that there is or that `members` names. Each file appears whole, after its chunk sums and
    SHA-256 were proven, or not at all; existing files are refused before anything is written, unless `force` replaces them or
    `resume` finds that they are already right. Nothing is ever written through a link or outside `dst`.
    `base`: where the bases of differences are, see `tzip.open`; a missing one is an error before anything is written.

    Raises UsageError, CorruptError, UnsupportedError or OSError. When a binary file gets damaged data the error comes
    after good chunks were written: no wrong byte is, but the output is incomplete.
    """
    start = time.perf_counter()
    told = progress or (lambda n: None)
    with Archive(source, base=base) as archive, Workers(thread_count(threads)) as workers:
        rows = _select(archive, members)
        archive.find_bases({run for row in rows for run in archive.member_runs(row)})
        if hasattr(dst, "write"):
            report = _to_stream(archive, rows, dst, workers, told)
        else:
            root = Path(dst if dst is not None else ".")
            report = _Unpacker(archive, root, workers, force, resume, told).run(rows)
    return UnpackReport(report.target, report.members, report.kept, report.bytes_out, time.perf_counter() - start)


def _select(archive: Archive, members: Sequence[str] | None) -> list[int]:
    names = archive.reader.index.member_names
    if not members:
        return list(range(len(names)))
    rows: set[int] = set()
    for wanted in members:
        name = wanted.rstrip("/")
        found = {i for i, n in enumerate(names) if n == name or n.startswith(name + "/")}
        if not found:
            archive.member_row(name)
        rows |= found
    return sorted(rows)


def _to_stream(
    archive: Archive, rows: list[int], out: BinaryIO, workers: Workers, told: Callable[[int], None]
) -> UnpackReport:
    index = archive.reader.index
    files = [i for i in rows if int(index["m_kind"][i]) in (FILE, TENSOR)]
    if len(files) != 1:
        raise UsageError(f"one member can be written to a stream, not {len(files)}; name it")
    written = 0
    for part in archive.checked_stream(files[0], workers):
        write_all(out, part)
        written += part.size
        told(part.size)
    return UnpackReport("<stream>", [index.member_names[files[0]]], [], written)


class _Unpacker:
    """Writes members below `root`."""

    def __init__(
        self, archive: Archive, root: Path, workers: Workers, force: bool, resume: bool, told: Callable[[int], None]
    ) -> None:
        self.archive = archive
        self.index = archive.reader.index
        self.root = root
        self.workers = workers
        self.force = force
        self.resume = resume
        self.told = told

    def run(self, rows: list[int]) -> UnpackReport:
        report = UnpackReport(str(self.root))
        kinds = self.index["m_kind"].tolist()
        kept = self._check_targets(rows, kinds)
        self.root.mkdir(parents=True, exist_ok=True)
        folders, links = [], []
        written = 0
        for i in rows:
            name, kind = self.index.member_names[i], kinds[i]
            target = self.root / name
            if kind == FOLDER:
                self._folder(target)
                folders.append(i)
            elif i in kept:
                report.kept.append(name)
                self.told(int(self.index["m_size"][i]))
                continue
            elif kind == LINK:
                links.append(i)
            else:
                self._folder(target.parent)
                written += self._file(i, target)
            report.members.append(name)
        for i in links:
            self._link(i)
        # Times of folders come last: writing into a folder changes its time. Deepest first.
        for i in sorted(folders, key=lambda i: -self.index.member_names[i].count("/")):
            target = self.root / self.index.member_names[i]
            os.chmod(target, int(self.index["m_mode"][i]) & 0o777)
            mtime = self._mtime(i)
            if mtime is not None:
                os.utime(target, ns=(mtime, mtime))
        return UnpackReport(report.target, report.members, report.kept, written)

    def _check_targets(self, rows: list[int], kinds: list[int]) -> set[int]:
        """Refuse what stands in the way before anything is written; return the members that are already there."""
        kept = set()
        if os.path.lexists(self.root) and not self.root.is_dir():
            raise UsageError("the target is no folder").at(path=str(self.root))
        for i in rows:
            target = self.root / self.index.member_names[i]
            if kinds[i] == TENSOR:
                raise UsageError("a bare tensor is no file; read it with tzip.open or tzip.decode").at(
                    member=self.index.member_names[i]
                )
            refuse_links(self.root, target)
            try:
                status = target.lstat()
            except FileNotFoundError:
                continue
            if kinds[i] == FOLDER:
                if not stat.S_ISDIR(status.st_mode):
                    raise UsageError("something that is no folder stands in the way").at(path=str(target))
            elif stat.S_ISDIR(status.st_mode):
                raise UsageError("a folder stands in the way").at(path=str(target))
            elif self.resume and self._is_right(i, target, status):
                kept.add(i)
            elif not self.force:
                raise UsageError("the output exists; --force replaces it").at(path=str(target))
        return kept

    def _is_right(self, i: int, target: Path, status: os.stat_result) -> bool:
        if int(self.index["m_kind"][i]) == LINK:
            return stat.S_ISLNK(status.st_mode) and os.fsencode(os.readlink(target)) == self.archive.reader.inline_bytes(i)
        if not stat.S_ISREG(status.st_mode) or status.st_size != int(self.index["m_size"][i]):
            return False
        if not int(self.index["m_flags"][i]) & SHA_KNOWN:
            return False
        with target.open("rb") as f:
            digest: bytes = hashlib.file_digest(f, "sha256").digest()
        return digest == bytes(self.index["m_sha"][i])

    def _mtime(self, i: int) -> int | None:
        mtime = int(self.index["m_mtime"][i])
        return None if mtime == NO_MTIME else mtime

    def _folder(self, target: Path) -> None:
        refuse_links(self.root, target / "x")
        target.mkdir(parents=True, exist_ok=True)
        # A folder without write permission must wait until its files are there.
        mode = stat.S_IMODE(target.stat().st_mode)
        if mode & 0o700 != 0o700:
            os.chmod(target, mode | 0o700)

    def _file(self, i: int, target: Path) -> int:
        size = int(self.index["m_size"][i])
        refuse_links(self.root, target)
        with PartialFile(target, force=self.force or self.resume) as partial:

            def write(at: int, part: U8) -> None:
                # Long runs of zeros stay holes, as in a sparse source.
                if part.size < 65536 or bool(part.any()):
                    partial.write_at(at, part)

            at = 0
            for part in self.archive.checked_stream(i, self.workers, write):
                at += part.size
                self.told(part.size)
            if at != size:
                raise CorruptError(f"the member has {at} bytes, not {size}").at(member=self.index.member_names[i])
            partial.file.truncate(size)
            partial.publish(int(self.index["m_mode"][i]) & 0o777, self._mtime(i))
        return size

    def _link(self, i: int) -> None:
        target = self.root / self.index.member_names[i]
        self._folder(target.parent)
        with contextlib.suppress(FileNotFoundError):
            if self.force:
                os.unlink(target)
        try:
            os.symlink(self.archive.reader.inline_bytes(i).decode(), target)
        except FileExistsError:
            raise UsageError("the output exists; --force replaces it").at(path=str(target)) from None
        mtime = self._mtime(i)
        if mtime is not None and os.utime in os.supports_follow_symlinks:
            os.utime(target, ns=(mtime, mtime), follow_symlinks=False)
