"""Random access to the bytes of a path, a buffer or a binary file, with pread where the system has it."""

import io
import os
import shutil
import tempfile
import threading
from collections.abc import Sequence
from typing import Any, BinaryIO, Self

import numpy as np

from tzip.coders.arrays import U8
from tzip.coders.errors import UsageError
from tzip.formats.layout import is_url

_SMALL = 1 << 16


class Source:
    """Bytes that can be read at any offset, by several threads at once. `name` is for messages."""

    far = False  # whether each reading is a request over a network

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size

    def read_at(self, offset: int, n: int) -> bytes:
        """Return the n bytes at `offset`, fewer at the end."""
        raise AssertionError

    def readinto_at(self, offset: int, buffer: memoryview) -> int:
        """Fill `buffer` from `offset` on; return how many bytes there were."""
        data = self.read_at(offset, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def view_at(self, offset: int, n: int) -> U8 | None:
        """Return n bytes as they lie in memory, read-only, or None when the source has them elsewhere or has fewer."""
        return None

    def expect(self, ranges: Sequence[tuple[int, int]], more: bool = False) -> None:
        """Be told which (offset, length), in ascending order, will be read next, each once: what is far away is worth fetching
        in larger pieces. `more`: besides what was expected before.
        """

    def close(self) -> None:
        """Release what is held."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class BufferSource(Source):
    """A bytes-like object."""

    def __init__(self, data: Any) -> None:
        view = memoryview(data)
        if not view.c_contiguous:
            raise UsageError("the buffer is not contiguous")
        self.view = view.cast("B") if view.nbytes else memoryview(b"")
        super().__init__("<buffer>", self.view.nbytes)

    def read_at(self, offset: int, n: int) -> bytes:
        return bytes(self.view[offset : offset + n])

    def readinto_at(self, offset: int, buffer: memoryview) -> int:
        part = self.view[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        return len(part)

    def view_at(self, offset: int, n: int) -> U8 | None:
        if offset + n > self.size:
            return None
        return np.frombuffer(self.view[offset : offset + n].toreadonly(), np.uint8)


class FileSource(Source):
    """An open binary file that can seek; with `owned`, closing this closes it."""

    def __init__(self, file: BinaryIO, name: str, owned: bool) -> None:
        self.file = file
        self.owned = owned
        self._lock = threading.Lock()
        # Only a plain file: the descriptor of a GzipFile is that of the compressed file.
        raw: Any = getattr(file, "raw", None) if type(file) in (io.BufferedReader, io.BufferedRandom) else file
        self._fd = raw.fileno() if type(raw) is io.FileIO and hasattr(os, "preadv") else None
        super().__init__(name, file.seek(0, os.SEEK_END))

    def read_at(self, offset: int, n: int) -> bytes:
        n = max(0, min(n, self.size - offset))
        if self._fd is not None and 0 < n <= _SMALL:  # a third of the time that they take by way of a buffer
            data = os.pread(self._fd, n, offset)
            if len(data) == n:
                return data
        buffer = bytearray(n)
        return bytes(memoryview(buffer)[: self.readinto_at(offset, memoryview(buffer))])

    def readinto_at(self, offset: int, buffer: memoryview) -> int:
        done = 0
        while done < len(buffer):
            if self._fd is not None:
                got = os.preadv(self._fd, [buffer[done:]], offset + done)
            else:
                with self._lock:
                    self.file.seek(offset + done)
                    part = self.file.read(len(buffer) - done)
                    got = len(part)
                    buffer[done : done + got] = part
            if not got:
                break
            done += got
        return done

    def close(self) -> None:
        if self.owned:
            self.file.close()


def open_source(source: Any) -> Source:
    """Open a path, a URL that fsspec knows, `os.PathLike`, bytes-like object, binary file or source for reading.

    A file that cannot seek, such as a pipe, is first copied to an unnamed temporary file, so that memory stays
    bounded and a pipe is packed exactly like a file.
    """
    if isinstance(source, Source):
        return source
    if isinstance(source, str) and is_url(source):
        from tzip.formats.remote import RemoteSource

        return RemoteSource(source)
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        return FileSource(open(path, "rb", buffering=0), os.fsdecode(path), owned=True)
    if isinstance(source, bytes | bytearray | memoryview):
        return BufferSource(source)
    if hasattr(source, "readinto") or hasattr(source, "read"):
        name = str(getattr(source, "name", "<stream>"))
        if isinstance(source, io.TextIOBase):
            raise UsageError("the file is open in text mode")
        if getattr(source, "seekable", lambda: False)():
            return FileSource(source, name, owned=False)
        spool = tempfile.TemporaryFile(buffering=0)
        shutil.copyfileobj(source, spool, 1 << 20)
        return FileSource(spool, name, owned=True)
    try:
        return BufferSource(source)
    except TypeError:
        raise UsageError(f"cannot read from a {type(source).__name__}") from None
