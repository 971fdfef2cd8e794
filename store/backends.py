"""Where a store keeps its files: the few operations that it needs, and a local folder that has them.

An object is written under a name of its own and appears whole; the head is replaced in one step, and only by who has
read the one that stands there. A name, once given to an object or page, never means other bytes.
"""

import contextlib
import errno
import os
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from tzip.coders.errors import CorruptError, UsageError
from tzip.formats.atomic import PartialFile, hold, sync_folder
from tzip.formats.names import PARTIAL

HEAD = "head.json"
OBJECTS = "objects"
PAGES = "pages"
_COMMIT_LOCK = "commit.lock"  # held for as long as it takes to replace the head, or to sweep
_WRITER_LOCK = "writers.lock"  # shared by who writes objects that no head names yet
_PATIENCE = 60.0  # seconds for which another process may hold the commit lock
_SWEEP = 600.0  # and for which one may sweep
_OBJECT = re.compile(r"[0-9a-f]{64}\.tzip\Z")
_PAGE = re.compile(r"[0-9a-f]{64}\.json\Z")
_MAX_SMALL = 1 << 28  # bytes of a head or page that are read


class StaleHeadError(Exception):
    """The head is not the one that was read: another process has replaced it."""


class LocalFolder:
    """A folder of this machine, or of a file system that many mount; locks are the system's and end with the process."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.objects = root / OBJECTS
        self.pages = root / PAGES

    def exists(self) -> bool:
        """Say whether there is a store: a head, or what a lost one has named. One that is only half made counts as none."""
        if (self.root / HEAD).exists():
            return True
        return (self.objects.is_dir() and bool(self.object_ids())) or (self.pages.is_dir() and bool(self.page_names()))

    def make(self, head: bytes) -> None:
        """Make the folders and the first head, or leave those that another process makes meanwhile.

        Raises UsageError when the folder holds anything else.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        ours = {HEAD, HEAD + PARTIAL, OBJECTS, PAGES, _COMMIT_LOCK, _WRITER_LOCK}
        if any(at.name not in ours for at in self.root.iterdir()):
            raise UsageError("the folder is not empty").at(path=str(self.root))
        self.objects.mkdir(exist_ok=True)
        self.pages.mkdir(exist_ok=True)
        with contextlib.suppress(StaleHeadError):
            self.swap_head(head, None)
        sync_folder(self.root.parent)

    # ---- the head

    def read_head(self) -> bytes | None:
        """Return the head, None when there is none."""
        try:
            return self._small(self.root / HEAD)
        except FileNotFoundError:
            return None

    def swap_head(self, new: bytes, expected: bytes | None) -> None:
        """Replace the head that was read as `expected`, durably. Raises StaleHeadError when it is another one by now."""
        with self.committing():
            self.put_head(new, expected)

    def put_head(self, new: bytes, expected: bytes | None) -> None:
        """Do as `swap_head` does, within `committing`."""
        if self.read_head() != expected:
            raise StaleHeadError
        with PartialFile(self.root / HEAD, force=True) as file:
            file.write(new)
            file.publish()

    @contextlib.contextmanager
    def committing(self) -> Iterator[None]:
        """Hold the lock without which no head is replaced and nothing swept. Raises UsageError after a minute's wait."""
        with self._waited(_COMMIT_LOCK, shared=False, patience=_PATIENCE):
            yield

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold, with others, the lock that tells `gc` of objects and pages which no head names yet. Waits for a sweep's end."""
        with self._waited(_WRITER_LOCK, shared=True, patience=_SWEEP):
            yield

    def alone(self) -> contextlib.AbstractContextManager[bool]:
        """Try to be alone: the value is False while anybody writes."""
        return self._locked(_WRITER_LOCK, shared=False)

    @contextlib.contextmanager
    def _waited(self, name: str, *, shared: bool, patience: float) -> Iterator[None]:
        end = time.monotonic() + patience
        while True:
            with self._locked(name, shared=shared) as held:
                if held:
                    yield
                    return
            if time.monotonic() > end:
                raise UsageError("another process holds a lock of the store").at(path=str(self.root / name))
            time.sleep(0.01)

    @contextlib.contextmanager
    def _locked(self, name: str, *, shared: bool) -> Iterator[bool]:
        fd = os.open(self.root / name, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        with os.fdopen(fd, "r+b", buffering=0) as file:
            yield hold(file, shared=shared)

    # ---- pages and objects

    def read_page(self, name: str) -> bytes:
        """Return a page."""
        return self._small(self.pages / f"{name}.json")

    def has_page(self, name: str) -> bool:
        """Say whether a page is there."""
        return (self.pages / f"{name}.json").exists()

    def put_page(self, name: str, data: bytes) -> None:
        """Write a page under the name that its bytes give it; the same one may be there already."""
        target = self.pages / f"{name}.json"
        if target.exists() and self._small(target) == data:
            return
        # A name of its own until it is whole: two writers may put the same page at once.
        with PartialFile(self.pages / f"new-{uuid.uuid4().hex}", force=True) as file:
            file.write(data)
            file.target = target
            file.publish()

    def new_object(self) -> PartialFile:
        """Return a file to write an archive to; `publish_object` gives it its name."""
        return PartialFile(self.objects / f"new-{uuid.uuid4().hex}")

    def publish_object(self, file: PartialFile, archive_id: str) -> None:
        """Make an archive durable under its id. Two archives of one id are the same."""
        file.target = self.object_path(archive_id)
        file.force = True
        file.publish()

    def object_path(self, archive_id: str) -> Path:
        """Return the path of an object."""
        return self.objects / f"{archive_id}.tzip"

    def object_size(self, archive_id: str) -> int | None:
        """Return the bytes of an object, None when it is not there."""
        try:
            return self.object_path(archive_id).stat().st_size
        except FileNotFoundError:
            return None

    def object_ids(self) -> list[str]:
        """List the objects that are there."""
        return sorted(p.name[:64] for p in self.objects.iterdir() if _OBJECT.match(p.name))

    def page_names(self) -> list[str]:
        """List the pages that are there."""
        return sorted(p.name[:64] for p in self.pages.iterdir() if _PAGE.match(p.name))

    def delete_object(self, archive_id: str) -> None:
        """Remove an object; it may be gone already."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.object_path(archive_id))

    def delete_page(self, name: str) -> None:
        """Remove a page; it may be gone already."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.pages / f"{name}.json")

    def sweep_partials(self) -> int:
        """Remove what killed writers left half written; return how many files. What a living one writes is locked.

        Only for who is `alone` and `committing`: a living writer that has just made its file has not locked it yet.
        """
        swept = 0
        for folder in (self.objects, self.pages, self.root):
            for path in folder.glob(f"*{PARTIAL}"):
                with contextlib.suppress(FileNotFoundError), open(path, "r+b", buffering=0) as file:
                    if hold(file, shared=False):
                        os.unlink(path)
                        swept += 1
        return swept

    def sync(self) -> None:
        """Make the head that stands there, and removals, durable."""
        sync_folder(self.root)
        sync_folder(self.objects)
        sync_folder(self.pages)

    def _small(self, path: Path) -> bytes:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size > _MAX_SMALL:
                raise CorruptError(f"{size} bytes are too many").at(path=str(path))
            parts = []
            while part := file.read(1 << 20):
                parts.append(part)
        return b"".join(parts)


def open_backend(path: str | os.PathLike[str]) -> LocalFolder:
    """Return the backend of a path. Raises OSError when the path is something else than a folder."""
    root = Path(os.path.abspath(path))
    if root.exists() and not root.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(root))
    return LocalFolder(root)
