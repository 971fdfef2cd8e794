"""Where a store keeps its files: the few operations that it needs, and a local folder that has them (cloud.py: a URL).

An object is written under a name of its own and appears whole; the head is replaced in one step, and only by who has
read the one that stands there. A name, once given to an object or page, never means other bytes.
"""

import contextlib
import errno
import os
import re
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Self

from tzip.bases import Library
from tzip.coders.errors import CorruptError, UsageError
from tzip.formats.atomic import PartialFile, hold, sync_folder
from tzip.formats.layout import is_url
from tzip.formats.names import PARTIAL
from tzip.formats.reader import ArchiveReader

HEAD = "head.json"
OBJECTS = "objects"
PAGES = "pages"
_COMMIT_LOCK = "commit.lock"  # held for as long as it takes to replace the head, or to sweep
_WRITER_LOCK = "writers.lock"  # shared by who writes objects that no head names yet
_PATIENCE = 60.0  # seconds for which another process may hold the commit lock
_SWEEP = 600.0  # and for which one may sweep
OBJECT = re.compile(r"[0-9a-f]{64}\.tzip\Z")
PAGE = re.compile(r"[0-9a-f]{64}\.json\Z")
MAX_SMALL = 1 << 28  # bytes of a head or page that are read


class StaleHeadError(Exception):
    """The head is not the one that was read: another process has replaced it."""


class NewFile(Protocol):
    """An object on its way: `file` is what it is written to. Leaving the `with` statement gives up what is not published."""

    @property
    def file(self) -> BinaryIO:
        """A binary file that can be written at any place and read."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: Any, error: Any, trace: Any, /) -> None: ...


class Backend(ABC):
    """What a store needs of the place where its files are. `name`: that place, for messages.

    `library`: finds objects by their ids when they lie in no folder where those that lean on others find them. `locks`: whether
    `committing`, `writing` and `alone` keep others out; where they cannot, heads say what is about to be removed.
    """

    name: str
    library: Library | None = None
    locks = True
    storage_options: Mapping[str, Any] | None = None  # those that it was opened with

    @abstractmethod
    def exists(self) -> bool:
        """Say whether there is a store: a head, or what a lost one has named. One that is only half made counts as none."""

    @abstractmethod
    def make(self, head: bytes) -> None:
        """Make the first head, and what it needs, or leave those that another process makes meanwhile.

        Raises UsageError when the folder holds anything else.
        """

    # ---- the head

    @abstractmethod
    def read_head(self) -> bytes | None:
        """Return the head, None when there is none."""

    def swap_head(self, new: bytes, expected: bytes | None) -> None:
        """Replace the head that was read as `expected`, durably. Raises StaleHeadError when it is another one by now."""
        with self.committing():
            self.put_head(new, expected)

    @abstractmethod
    def put_head(self, new: bytes, expected: bytes | None) -> None:
        """Do as `swap_head` does, within `committing`."""

    @abstractmethod
    def committing(self) -> AbstractContextManager[None]:
        """Hold the lock without which no head is replaced and nothing swept. Raises UsageError after a minute's wait."""

    @abstractmethod
    def writing(self) -> AbstractContextManager[None]:
        """Hold, with others, the lock that tells `gc` of objects and pages which no head names yet. Waits for a sweep's end."""

    @abstractmethod
    def alone(self) -> AbstractContextManager[bool]:
        """Try to be alone: the value is False while anybody writes, or may."""

    # ---- pages

    @abstractmethod
    def read_page(self, name: str) -> bytes:
        """Return a page. Raises FileNotFoundError."""

    @abstractmethod
    def has_page(self, name: str) -> bool:
        """Say whether a page is there."""

    @abstractmethod
    def put_page(self, name: str, data: bytes) -> None:
        """Write a page under the name that its bytes give it; the same one may be there already."""

    @abstractmethod
    def page_names(self) -> list[str]:
        """List the pages that are there."""

    @abstractmethod
    def delete_page(self, name: str) -> None:
        """Remove a page; it may be gone already."""

    # ---- objects

    @abstractmethod
    def new_object(self) -> NewFile:
        """Return a file to write an archive to; `publish_object` gives it its name."""

    @abstractmethod
    def publish_object(self, file: Any, archive_id: str) -> None:
        """Make an archive durable under its id. Two archives of one id are the same."""

    @abstractmethod
    def archive(self, archive_id: str) -> Path | ArchiveReader:
        """Return what opens an object. That, or opening it, raises FileNotFoundError when it is not there."""

    @abstractmethod
    def whole(self, archive_id: str) -> AbstractContextManager[Path]:
        """Return a file that holds an object, to read all of it; far ones are copied."""

    @abstractmethod
    def object_size(self, archive_id: str) -> int | None:
        """Return the bytes of an object, None when it is not there."""

    def missing(self, archive_ids: Iterable[str]) -> list[str]:
        """Return those of these objects that are not there."""
        return [i for i in archive_ids if self.object_size(i) is None]

    @abstractmethod
    def object_ids(self) -> list[str]:
        """List the objects that are there."""

    @abstractmethod
    def delete_object(self, archive_id: str) -> None:
        """Remove an object; it may be gone already."""

    @abstractmethod
    def sweep_partials(self, grace: float = 0.0) -> int:
        """Remove what killed writers left half written; return how many. Only for who is `alone` and `committing`; where there
        are no locks, what is older than `grace` seconds.
        """

    @abstractmethod
    def sync(self) -> None:
        """Make the head that stands there, and removals, durable."""

    # ---- names, for messages

    @property
    def head_name(self) -> str:
        """The head."""
        return self.where(HEAD)

    def page_name(self, name: str) -> str:
        """A page."""
        return self.where(PAGES, f"{name}.json")

    def object_name(self, archive_id: str) -> str:
        """An object."""
        return self.where(OBJECTS, f"{archive_id}.tzip")

    @abstractmethod
    def where(self, *parts: str) -> str:
        """Return the path or URL of a file of the store."""


class LocalFolder(Backend):
    """A folder of this machine, or of a file system that many mount; locks are the system's and end with the process."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.name = str(root)
        self.objects = root / OBJECTS
        self.pages = root / PAGES

    def where(self, *parts: str) -> str:
        return str(self.root.joinpath(*parts))

    def exists(self) -> bool:
        if (self.root / HEAD).exists():
            return True
        return (self.objects.is_dir() and bool(self.object_ids())) or (self.pages.is_dir() and bool(self.page_names()))

    def make(self, head: bytes) -> None:
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
        try:
            return self._small(self.root / HEAD)
        except FileNotFoundError:
            return None

    def put_head(self, new: bytes, expected: bytes | None) -> None:
        if self.read_head() != expected:
            raise StaleHeadError
        with PartialFile(self.root / HEAD, force=True) as file:
            file.write(new)
            file.publish()

    @contextlib.contextmanager
    def committing(self) -> Iterator[None]:
        with self._waited(_COMMIT_LOCK, shared=False, patience=_PATIENCE):
            yield

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        with self._waited(_WRITER_LOCK, shared=True, patience=_SWEEP):
            yield

    def alone(self) -> AbstractContextManager[bool]:
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
        return self._small(self.pages / f"{name}.json")

    def has_page(self, name: str) -> bool:
        return (self.pages / f"{name}.json").exists()

    def put_page(self, name: str, data: bytes) -> None:
        target = self.pages / f"{name}.json"
        if target.exists() and self._small(target) == data:
            return
        # A name of its own until it is whole: two writers may put the same page at once.
        with PartialFile(self.pages / f"new-{uuid.uuid4().hex}", force=True) as file:
            file.write(data)
            file.target = target
            file.publish()

    def new_object(self) -> PartialFile:
        return PartialFile(self.objects / f"new-{uuid.uuid4().hex}")

    def publish_object(self, file: PartialFile, archive_id: str) -> None:
        file.target = self.object_path(archive_id)
        file.force = True
        file.publish()

    def object_path(self, archive_id: str) -> Path:
        """Return the path of an object."""
        return self.objects / f"{archive_id}.tzip"

    def archive(self, archive_id: str) -> Path:
        return self.object_path(archive_id)

    def whole(self, archive_id: str) -> AbstractContextManager[Path]:
        return contextlib.nullcontext(self.object_path(archive_id))

    def object_size(self, archive_id: str) -> int | None:
        try:
            return self.object_path(archive_id).stat().st_size
        except FileNotFoundError:
            return None

    def object_ids(self) -> list[str]:
        return sorted(p.name[:64] for p in self.objects.iterdir() if OBJECT.match(p.name))

    def page_names(self) -> list[str]:
        return sorted(p.name[:64] for p in self.pages.iterdir() if PAGE.match(p.name))

    def delete_object(self, archive_id: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.object_path(archive_id))

    def delete_page(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.pages / f"{name}.json")

    def sweep_partials(self, grace: float = 0.0) -> int:
        # What a living writer writes is locked, but one that has just made its file has not locked it yet.
        swept = 0
        for folder in (self.objects, self.pages, self.root):
            for path in folder.glob(f"*{PARTIAL}"):
                with contextlib.suppress(FileNotFoundError), open(path, "r+b", buffering=0) as file:
                    if hold(file, shared=False):
                        os.unlink(path)
                        swept += 1
        return swept

    def sync(self) -> None:
        sync_folder(self.root)
        sync_folder(self.objects)
        sync_folder(self.pages)

    def _small(self, path: Path) -> bytes:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_SMALL:
                raise CorruptError(f"{size} bytes are too many").at(path=str(path))
            parts = []
            while part := file.read(1 << 20):
                parts.append(part)
        return b"".join(parts)


def located(path: str | os.PathLike[str]) -> str:
    """Return a URL as it is, of a path (or a URL that begins with file://) the absolute one."""
    if isinstance(path, str) and is_url(path) and not path.startswith("file://"):
        return path.rstrip("/")
    return os.path.abspath(path.removeprefix("file://") if isinstance(path, str) else path)


def open_backend(path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> Backend:
    """Return the backend of a path or a URL. Raises OSError when the path is something else than a folder."""
    if is_url(place := located(path)):
        from tzip.store.cloud import CloudFolder

        return CloudFolder(place, storage_options)
    if storage_options:
        raise UsageError("storage_options are for URLs").at(path=os.fspath(path))
    root = Path(place)
    if root.exists() and not root.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(root))
    return LocalFolder(root)
