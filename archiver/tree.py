"""What there is to pack: files, folders and links become items with portable names (FORMAT.md, section 2.4)."""

import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tzip.coders.errors import CorruptError, UsageError
from tzip.formats.catalogue import FILE, FOLDER, LINK
from tzip.formats.names import check_links, check_names
from tzip.formats.source import Source, open_source


@dataclass(frozen=True, slots=True)
class Item:
    """A member to be: where it comes from and what it is called."""

    name: str
    kind: int
    mode: int
    mtime_ns: int
    size: int
    open: Callable[[], Source] | None = None
    link: str = ""
    stamp: Callable[[], object] | None = None  # equal before and after reading, or the input changed
    original: str = ""  # the path, for messages


def collect(paths: Iterable[str | os.PathLike[str]], dereference: bool | None) -> list[Item]:
    """Return the items for files and folders, a folder's members below the folder's own name, in sorted order.

    `dereference` follows links; None does so only in a hub cache's snapshot folder, where every file is a link to
    a blob. Raises UsageError for links that lead out of their folder, for what is no file, folder or link, and for
    names that an archive cannot hold.
    """
    items: list[Item] = []
    for path in map(Path, paths):
        follow = _is_snapshot(path) if dereference is None else dereference
        name = path.name if path.name not in ("", "..") else path.resolve().name
        if not name:
            raise UsageError("the root of a file system has no name to pack it under").at(path=str(path))
        if path.is_dir():
            _walk(path, name, path.resolve(), follow, items, ())
        else:
            # The user named this path: a link given as an argument means its file.
            items.append(_file(path, name, path.stat()))
    try:
        check_names((item.name, item.kind == FOLDER) for item in items)
    except CorruptError as e:
        raise UsageError(f"{e.message}; rename it to pack it").at(member=e.member) from None
    try:
        check_links({item.name: item.link for item in items if item.kind == LINK})
    except CorruptError as e:
        raise UsageError(f"{e.message}; -L / --dereference packs what links point to").at(member=e.member) from None
    return items


def _is_snapshot(path: Path) -> bool:
    parent = Path(os.path.abspath(path)).parent
    return parent.name == "snapshots" and (parent.parent / "blobs").is_dir()


def _walk(
    path: Path, name: str, root: Path, follow: bool, items: list[Item], above: tuple[tuple[int, int], ...]
) -> None:
    status = path.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        raise UsageError("a link leads to a folder above itself").at(path=str(path))
    items.append(Item(name, FOLDER, stat.S_IMODE(status.st_mode), status.st_mtime_ns, 0, original=str(path)))
    with os.scandir(path) as scan:
        entries = sorted(scan, key=lambda e: e.name)
    for entry in entries:
        at, below = Path(entry.path), f"{name}/{entry.name}"
        if entry.is_symlink() and not follow:
            items.append(_link(at, below, root))
        elif entry.is_dir():
            _walk(at, below, root, follow, items, (*above, identity))
        else:
            items.append(_file(at, below, entry.stat()))


def _file(path: Path, name: str, status: os.stat_result) -> Item:
    if not stat.S_ISREG(status.st_mode):
        raise UsageError("neither a file, a folder nor a link; it cannot be packed").at(path=str(path))

    def stamp() -> object:
        now = path.stat()
        return now.st_size, now.st_mtime_ns, now.st_ino

    return Item(
        name,
        FILE,
        stat.S_IMODE(status.st_mode),
        status.st_mtime_ns,
        status.st_size,
        lambda: open_source(path),
        stamp=stamp,
        original=str(path),
    )


def _link(path: Path, name: str, root: Path) -> Item:
    target = os.readlink(path)
    if os.path.isabs(target) or not Path(os.path.realpath(path)).is_relative_to(root):
        raise UsageError(
            f"the link leads out of the folder (to {target!r}); -L / --dereference packs what it points to"
        ).at(path=str(path))
    status = path.lstat()
    return Item(
        name,
        LINK,
        stat.S_IMODE(status.st_mode),
        status.st_mtime_ns,
        len(os.fsencode(target)),
        link=target,
        original=str(path),
    )
