"""A store behind a URL: what fsspec reads and writes, where writes can depend on what stands there (services.py).

There are no locks. The head is replaced by a conditional write; objects and pages never change, and are removed only once a
head has said so (`Head.condemned`), which no other head may name then. An archive is packed into a temporary file of this
machine, since its name is known when it is whole, and then uploaded. Nothing but `gc` and `repair` lists.
"""

import contextlib
import errno
import hashlib
import os
import random
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar

from tzip.bases import Library
from tzip.coders.errors import CorruptError, TzipError, UsageError
from tzip.formats.names import PARTIAL
from tzip.formats.reader import ArchiveReader
from tzip.formats.remote import SPAN, SpanSource, file_system
from tzip.store.backends import HEAD, MAX_SMALL, OBJECT, OBJECTS, PAGE, PAGES, Backend, StaleHeadError
from tzip.store.sealing import unsealed
from tzip.store.services import service_of

TRIES = 6  # of a request, the libraries' own not counted
FIRST = 0.2  # seconds waited before the second try, at most; each time twice that
LONGEST = 20.0
_READERS = 64  # indices of archives that are kept, proven: opening one again costs no request
_ASKING = 16  # requests at once where many small ones are needed
_PROBE = "conditions.probe"
_LASTING = frozenset(
    (errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.ENOSPC, errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG)
)
_LASTING_KINDS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_DAMAGED = {"BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "RequestTimeout"}
# By name, for which of these libraries are there depends on the URL.
_PASSING = {"HTTPClientError", "ClientError", "ResponseParserError", "IncompleteReadError", "FlexibleChecksumError"}

T = TypeVar("T")


def again(name: str, work: Callable[[], T]) -> T:
    """Return what `work` does, tried again, later and later, after errors that may pass. Raises OSError.

    What it does must come to the same when it is done twice: an answer may be lost after all was carried out.
    """
    for n in range(1, TRIES + 1):
        try:
            return work()
        except TzipError:
            raise
        except Exception as e:
            if n == TRIES or not _passes(e):
                if isinstance(e, OSError | MemoryError):
                    raise
                raise OSError(f"{name}: {type(e).__name__}: {e}") from e
        time.sleep(random.uniform(0, min(LONGEST, FIRST * 2 ** (n - 1))))
    raise AssertionError


def _passes(e: Exception) -> bool:
    """Say whether an error is one of the network or of a server that is busy or broken, which may be over when asked again."""
    if isinstance(e, _LASTING_KINDS):
        return False
    if isinstance(e, OSError):
        answer = getattr(e.__cause__, "response", None) or {}
        code = answer.get("Error", {}).get("Code") if isinstance(answer, dict) else None
        return code in _DAMAGED or e.errno not in _LASTING
    busy = type(e).__name__ == "HttpError" and str(getattr(e, "code", "")) in ("408", "429", "500", "502", "503", "504")
    return busy or any(kind.__name__ in _PASSING for kind in type(e).__mro__)


class _Spool:
    """An archive on its way: a temporary file."""

    def __init__(self) -> None:
        fd, path = tempfile.mkstemp(prefix="tzip-", suffix=PARTIAL)
        self.path = Path(path)
        self.file: BinaryIO = os.fdopen(fd, "r+b", buffering=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.path.unlink(missing_ok=True)


class CloudFolder(Backend, Library):
    """A folder of an object store. Several processes, on any machines, may have it."""

    locks = False

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        self.name = url.rstrip("/")
        self.storage_options = storage_options
        # A cached listing says that what was written since then is not there.
        self._fs, path = file_system(self.name, **{"use_listings_cache": False, **(storage_options or {})})
        self._root = path.rstrip("/")
        self._service = service_of(self._fs, self.name)
        self._readers: OrderedDict[str, ArchiveReader] = OrderedDict()
        self._lock = threading.Lock()
        self._proven = False

    @property
    def library(self) -> Library:  # type: ignore[override]
        """Itself."""
        return self

    def where(self, *parts: str) -> str:
        return "/".join((self.name, *parts))

    def _at(self, *parts: str) -> str:
        return "/".join((self._root, *parts))

    def exists(self) -> bool:
        return self.read_head() is not None or bool(self.object_ids()) or bool(self.page_names())

    def make(self, head: bytes) -> None:
        ours = {HEAD, OBJECTS, PAGES, _PROBE}
        if not {name for name, _ in self._list()} <= ours:
            raise UsageError("the folder is not empty").at(path=self.name)
        with contextlib.suppress(StaleHeadError):
            self.put_head(head, None)

    # ---- the head

    def read_head(self) -> bytes | None:
        found = self._read_sound(HEAD, lambda data: unsealed(data, "tzip_store", self.head_name) is not None)
        return found[0] if found else None

    def put_head(self, new: bytes, expected: bytes | None) -> None:
        self._prove_conditions()
        path = self._at(HEAD)
        found = again(self.head_name, lambda: self._service.read(path))
        if (found[0] if found else None) != expected:
            raise StaleHeadError
        try:
            written = again(self.head_name, lambda: self._service.write(path, new, found[1] if found else None))
        except OSError as e:
            if self._stands(path, new):
                return
            e.add_note("whether the head of the store was replaced is not known; what it names is whole")
            raise
        # Refused: by another's head, or by our own, when the answer to an earlier try was lost.
        if not written and not self._stands(path, new):
            raise StaleHeadError

    def _stands(self, path: str, data: bytes) -> bool:
        found = again(self.name, lambda: self._service.read(path))
        return found is not None and found[0] == data

    def _prove_conditions(self) -> None:
        """Raise UsageError when the service ignores conditions, as older ones do: once, before anything hangs on it."""
        if self._proven:
            return
        path, name = self._at(_PROBE), self.where(_PROBE)
        again(name, lambda: self._service.write(path, b"tzip"))
        for seen in (None, self._service.wrong()):
            try:
                ignored = again(name, lambda seen=seen: self._service.write(path, b"tzip", seen))  # type: ignore[misc]
            except OSError as e:
                if e.errno != errno.ENOSYS:
                    raise
                ignored = True
            if ignored:
                raise UsageError(
                    "the service ignores conditions of writes (If-None-Match, If-Match), so that two writers would overwrite "
                    "each other's checkpoints"
                ).at(path=self.name)
        self._proven = True

    def committing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def writing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def alone(self) -> AbstractContextManager[bool]:
        return nullcontext(False)

    # ---- small files

    def _read_sound(self, name: str, sound: Callable[[bytes], bool]) -> tuple[bytes, Any] | None:
        """Return a small file, read once more when it is damaged: it may have been so on its way."""
        path, shown = self._at(name), self.where(name)
        found = None
        for _ in range(2):
            found = again(shown, lambda: self._service.read(path))
            if found is not None and len(found[0]) > MAX_SMALL:
                raise CorruptError(f"{len(found[0])} bytes are too many").at(path=shown)
            with contextlib.suppress(TzipError):
                if found is None or sound(found[0]):
                    break
        return found

    def read_page(self, name: str) -> bytes:
        found = self._read_sound(f"{PAGES}/{name}.json", lambda data: hashlib.sha256(data).hexdigest() == name)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.page_name(name))
        return found[0]

    def has_page(self, name: str) -> bool:
        return self._size(PAGES, f"{name}.json") is not None

    def put_page(self, name: str, data: bytes) -> None:
        path, shown = self._at(PAGES, f"{name}.json"), self.page_name(name)
        if not again(shown, lambda: self._service.write(path, data)) and not self._stands(path, data):
            again(shown, lambda: self._fs.pipe_file(path, data))

    def page_names(self) -> list[str]:
        return sorted(name[:64] for name, _ in self._list(PAGES) if PAGE.match(name))

    def delete_page(self, name: str) -> None:
        self._delete(PAGES, f"{name}.json")

    # ---- objects

    def new_object(self) -> _Spool:
        return _Spool()

    def publish_object(self, file: _Spool, archive_id: str) -> None:
        path, shown = self._at(OBJECTS, f"{archive_id}.tzip"), self.object_name(archive_id)
        size = file.file.seek(0, os.SEEK_END)
        options = self._service.upload_options(size)
        try:
            again(shown, lambda: self._fs.put_file(str(file.path), path, mode="create", **options))
        except FileExistsError:
            if self.object_size(archive_id) != size:
                again(shown, lambda: self._fs.put_file(str(file.path), path, **options))

    def archive(self, archive_id: str) -> ArchiveReader:
        with self._lock:
            if archive_id in self._readers:
                self._readers.move_to_end(archive_id)
                return self._readers[archive_id]
        size = self.object_size(archive_id)
        if size is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.object_name(archive_id))
        source = SpanSource(self.object_name(archive_id), size, self._fetcher(archive_id))
        try:
            reader = ArchiveReader(source)
        except TzipError:  # its bytes may have been wrong on their way
            reader = ArchiveReader(source)
        if reader.footer.archive_id.hex() != archive_id:
            raise CorruptError("an object is another archive than its name says").at(path=source.name)
        with self._lock:
            self._readers[archive_id] = reader
            if len(self._readers) > _READERS:
                self._readers.popitem(last=False)
        return reader

    def _fetcher(self, archive_id: str) -> Callable[[int, int], bytes]:
        path, shown = self._at(OBJECTS, f"{archive_id}.tzip"), self.object_name(archive_id)

        def ask(begin: int, end: int) -> bytes:
            data: bytes = self._fs.cat_file(path, start=begin, end=end)
            if len(data) != end - begin:
                raise OSError(f"{shown}: asked for bytes {begin} to {end}, got {len(data)}")
            return data

        def fetch(begin: int, end: int) -> bytes:
            try:
                return again(shown, lambda: ask(begin, end))
            except FileNotFoundError:
                with self._lock:
                    self._readers.pop(archive_id, None)
                raise CorruptError("an object of the store is missing").at(path=shown) from None

        return fetch

    @contextlib.contextmanager
    def whole(self, archive_id: str) -> Iterator[Path]:
        size = self.object_size(archive_id)
        if size is None:
            raise CorruptError("an object of the store is missing").at(path=self.object_name(archive_id))
        fetch = self._fetcher(archive_id)
        with _Spool() as spool:
            for begin in range(0, size, SPAN):
                spool.file.write(fetch(begin, min(size, begin + SPAN)))
            yield spool.path

    def object_size(self, archive_id: str) -> int | None:
        return self._size(OBJECTS, f"{archive_id}.tzip")

    def missing(self, archive_ids: Iterable[str]) -> list[str]:
        wanted = sorted(archive_ids)
        with ThreadPoolExecutor(_ASKING, "tzip-store") as pool:
            return [i for i, size in zip(wanted, pool.map(self.object_size, wanted), strict=True) if size is None]

    def object_ids(self) -> list[str]:
        return sorted(name[:64] for name, _ in self._list(OBJECTS) if OBJECT.match(name))

    def delete_object(self, archive_id: str) -> None:
        with self._lock:
            self._readers.pop(archive_id, None)
        self._delete(OBJECTS, f"{archive_id}.tzip")

    def sweep_partials(self, grace: float = 0.0) -> int:
        return again(self.name, lambda: self._service.abort_uploads(self._at(OBJECTS, ""), grace))

    def sync(self) -> None:
        pass

    def _size(self, *parts: str) -> int | None:
        path = self._at(*parts)
        try:
            found = again(self.where(*parts), lambda: self._fs.info(path))
        except FileNotFoundError:
            return None
        return int(found["size"]) if found["type"] == "file" else None

    def _list(self, *parts: str) -> list[tuple[str, int]]:
        path = self._at(*parts)
        try:
            found = again(self.where(*parts), lambda: self._fs.ls(path, detail=True))
        except FileNotFoundError:
            return []
        return [(entry["name"].rstrip("/").rpartition("/")[2], int(entry["size"] or 0)) for entry in found]

    def _delete(self, *parts: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            again(self.where(*parts), lambda: self._fs.rm_file(self._at(*parts)))
