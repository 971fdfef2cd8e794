"""Packing safetensors files where they are: under the same name, in the in-place form (FORMAT.md, section 2.7)."""

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tzip.archive import Archive
from tzip.coders.errors import ChangedError, CorruptError, UsageError
from tzip.formats import safetensors_header
from tzip.formats.atomic import PartialFile
from tzip.formats.catalogue import FILE, NO_MTIME
from tzip.formats.envelope import is_packed, prefix
from tzip.formats.source import open_source
from tzip.packing import Options, Progress, pack_to_file
from tzip.tree import Item, collect
from tzip.verifying import verify
from tzip.workers import Workers, thread_count


@dataclass(frozen=True, slots=True)
class InPlaceReport:
    """What became of the files: `changed` ones with sizes before and after, and why others were left as they were."""

    changed: dict[str, tuple[int, int]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def pack_in_envelope(
    item: Item, header: bytes, target: Path, options: Options, *, check: Callable[[Path], None] | None = None
) -> bool:
    """Write an item, whose file begins with `header`, to `target` in the in-place form when that is smaller; say whether.

    `target` is replaced whole or not at all. `check` is called with the packed file before that, and may raise.
    """
    with PartialFile(target, force=True) as partial:
        start = prefix(header)
        partial.write(start)
        report = pack_to_file([item], partial.file, str(target), options)
        # As long as the plain file it would pass for that file, with packed bytes for weights.
        if len(start) + report.bytes_out >= item.size:
            return False
        if check is not None:
            partial.file.flush()
            check(partial.path)
        partial.publish(item.mode)
    return True


def pack_in_place(
    paths: Iterable[Any],
    *,
    level: str = "default",
    threads: int | None = None,
    progress: Progress | None = None,
    told: Callable[[str], None] | None = None,
) -> InPlaceReport:
    """Replace every safetensors file among `paths`, and in folders below them, by its packed form under the same name.

    Each file is packed beside the original, read back and compared by SHA-256, and then takes its place in one step: whatever
    happens, the original or the packed file is there, whole. Called again it goes on with the files that are not packed
    yet. Files that are packed, that are links, that are no valid safetensors files, or that would not become smaller stay as
    they are. `told` is called with each path that is done.

    Raises ChangedError when a file changes meanwhile (it stays as it is), UsageError or OSError.
    """
    report = InPlaceReport()
    for path in _files(paths, report):
        size = path.stat().st_size
        (item,) = collect([path], dereference=True)
        check = _unchanged(item, threads)
        with open_source(path) as source:
            if is_packed(source.read_at, source.size):
                report.left[str(path)] = "packed already"
                continue
            try:
                data_start, _ = safetensors_header.parse(source.read_at, source.size)
            except safetensors_header.HeaderError as e:
                report.left[str(path)] = f"no valid safetensors file: {e}"
                continue
            header = source.read_at(0, data_start)
        if pack_in_envelope(item, header, path, Options(level, threads, progress=progress), check=check):
            report.changed[str(path)] = (size, path.stat().st_size)
        else:
            report.left[str(path)] = "would not become smaller"
        if told is not None:
            told(str(path))
    return report


def _unchanged(item: Item, threads: int | None) -> Callable[[Path], None]:
    """Return a check that the packed file is sound, and that the original is still what was packed."""
    before = item.stamp() if item.stamp is not None else None

    def check(packed: Path) -> None:
        if item.stamp is not None and item.stamp() != before:
            raise ChangedError("the file changed while it was packed; it stays as it is").at(path=item.original)
        verify(packed, deep=True, threads=threads)
        if item.stamp is not None and item.stamp() != before:
            raise ChangedError("the file changed while it was packed; it stays as it is").at(path=item.original)

    return check


def unpack_in_place(
    paths: Iterable[Any],
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    told: Callable[[str], None] | None = None,
) -> InPlaceReport:
    """Replace every packed safetensors file among `paths`, and in folders below them, by the file that it holds.

    Each file is proven by its sums and its SHA-256 before it takes its place, in one step, with the permissions and the
    time that it had. Called again it goes on with the files that are packed still.

    Raises CorruptError, or ChangedError when a file changes meanwhile (the packed file stays), UsageError or OSError.
    """
    report = InPlaceReport()
    for path in _files(paths, report):
        with open_source(path) as source:
            if not is_packed(source.read_at, source.size):
                report.left[str(path)] = "not packed"
                continue
        size = path.stat().st_size
        _restore(path, threads, progress)
        report.changed[str(path)] = (size, path.stat().st_size)
        if told is not None:
            told(str(path))
    return report


def _restore(path: Path, threads: int | None, progress: Progress | None) -> None:
    (item,) = collect([path], dereference=True)
    before = item.stamp() if item.stamp is not None else None
    with Archive(path) as archive, Workers(thread_count(threads)) as workers:
        index = archive.reader.index
        if index["m_kind"].tolist() != [FILE]:
            raise UsageError("the archive does not hold one file; unpack it with tzip unpack").at(path=str(path))
        with PartialFile(path, force=True) as partial:
            for part in archive.checked_stream(0, workers):
                partial.write(part)
                if progress is not None:
                    progress(part.size)
            if partial.file.tell() != int(index["m_size"][0]):
                raise CorruptError("the member has another size than the index says").at(path=str(path))
            if item.stamp is not None and item.stamp() != before:
                raise ChangedError("the packed file changed while it was unpacked; it stays as it is").at(path=str(path))
            mtime = int(index["m_mtime"][0])
            partial.publish(int(index["m_mode"][0]) & 0o777, None if mtime == NO_MTIME else mtime)


def _files(paths: Iterable[Any], report: InPlaceReport) -> Iterator[Path]:
    """Yield the safetensors files, those of folders in sorted order; links are noted as left."""
    for given in map(Path, paths):
        if given.is_dir():
            found = [Path(folder, name) for folder, _, names in os.walk(given) for name in names]
            candidates = sorted(p for p in found if p.name.endswith(".safetensors"))
        else:
            candidates = [given]
        for path in candidates:
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode):
                report.left[str(path)] = "a link; name the file that it points to"
            elif not stat.S_ISREG(status.st_mode):
                report.left[str(path)] = "no file"
            else:
                yield path
