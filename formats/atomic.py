"""Files that appear whole or not at all.

A file is written under `<name>.tzip-partial` beside its target, under a lock, then synchronised and moved to its name
in one step. A killed process leaves at most the partial file, which the next one takes over.
"""

import contextlib
import errno
import io
import os
import stat
import threading
from pathlib import Path
from typing import Any, BinaryIO

from tzip.coders.errors import UsageError
from tzip.formats.names import PARTIAL

_NO_LINK = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EACCES, errno.EINVAL}


def hold(file: BinaryIO, *, shared: bool = False) -> bool:
    """Take a lock that ends with the process, exclusive or shared; False when others have one that forbids it."""
    try:
        import fcntl
    except ImportError:
        import msvcrt

        try:
            if not shared:  # there is no shared one
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        except OSError:
            return False
        return True
    try:
        fcntl.flock(file.fileno(), (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if e.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    return True


def write_all(file: Any, data: Any) -> None:
    """Write all of a bytes-like object to a binary file, which may take a part at a time.

    A raw file that answers None is in non-blocking mode (BlockingIOError); any other object that does has taken all.
    """
    view = memoryview(data).cast("B")
    while view:
        taken = file.write(view)
        if taken is None and isinstance(file, io.RawIOBase):
            raise BlockingIOError(errno.EAGAIN, "the output is in non-blocking mode and full")
        view = view[len(view) if taken is None else taken :]


def sync_folder(folder: Path) -> None:
    """Make names in `folder` durable, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(fd)


def refuse_links(root: Path, target: Path) -> None:
    """Raise UsageError when a folder between `root` and `target` is a link or no folder: nothing is written through it."""
    for parent in target.relative_to(root).parents:
        at = root / parent
        if parent == Path() or not os.path.lexists(at):
            continue
        if at.is_symlink() or not at.is_dir():
            raise UsageError("a link or a file stands where a folder must be; nothing is written through it").at(
                path=str(at)
            )


class PartialFile:
    """A file on its way to `target`. Without `publish`, closing it removes it (or keeps it, with `keep`).

    `resume` leaves what an earlier process wrote. Raises UsageError when another process writes to the same target,
    or when a link or something else that is no file stands in the partial file's place.
    """

    def __init__(self, target: Path, *, force: bool = False, resume: bool = False, keep: bool = False) -> None:
        self._open = False
        self.target = target
        self.path = target.with_name(target.name + PARTIAL)
        self.force = force
        self.keep = keep
        self._lock = threading.Lock()
        try:
            while True:
                self.file = self._open_file()
                try:
                    if self._hold():
                        self._open = True
                        if not resume:
                            self.file.truncate(0)
                        return
                except BaseException:
                    self.file.close()
                    raise
                self.file.close()
        except KeyboardInterrupt:
            self._sweep()
            raise

    def _sweep(self) -> None:
        """Remove a file that was made, and not yet held, when the user interrupted."""
        if self.keep:
            return
        with contextlib.suppress(OSError, UsageError):
            self.file = self._open_file()
            with self.file:
                if hold(self.file) and os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path)):
                    os.unlink(self.path)
        self._open = False

    def _open_file(self) -> BinaryIO:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        flags |= getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
        try:
            fd = os.open(self.path, flags, 0o666)
        except OSError as e:
            if e.errno == errno.ELOOP or os.path.islink(self.path):
                raise UsageError(f"{self.path} is a link; remove it").at(path=str(self.path)) from None
            raise
        return os.fdopen(fd, "r+b", buffering=0)

    def _hold(self) -> bool:
        """Lock the file; False when it is no longer, or must not be, the one under its name: open it again."""
        held = os.fstat(self.file.fileno())
        if not stat.S_ISREG(held.st_mode):
            raise UsageError(f"{self.path} is no regular file; remove it").at(path=str(self.path))
        if not hold(self.file):
            raise UsageError("another process is writing this file").at(path=str(self.target))
        # The holder before us may have moved or removed the file between our open and our lock.
        held = os.fstat(self.file.fileno())
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(held, os.stat(self.path)):
                if held.st_nlink == 1:
                    return True
                # Killed between link and unlink of `_claim`: this is the published file's second name.
                os.unlink(self.path)
        return False

    def write(self, data: Any) -> None:
        """Write all of a bytes-like object."""
        write_all(self.file, data)

    def write_at(self, offset: int, data: Any) -> None:
        """Write all of a bytes-like object at an offset; threads may do so at once."""
        view = memoryview(data).cast("B")
        if not hasattr(os, "pwrite"):
            with self._lock:
                self.file.seek(offset)
                write_all(self.file, view)
            return
        while view:
            taken = os.pwrite(self.file.fileno(), view, offset)
            view, offset = view[taken:], offset + taken

    def publish(self, mode: int | None = None, mtime_ns: int | None = None) -> None:
        """Synchronise the file and give it its name; without `force` never over a file that stands there.

        When it raises the name is as it was, but for one case: the file has its name, whole, and the system fails to
        make the name durable.
        """
        if mode is not None:
            os.chmod(self.path, mode)
        self.file.flush()
        if mtime_ns is not None:
            os.utime(self.path, ns=(mtime_ns, mtime_ns))
        os.fsync(self.file.fileno())
        if os.name == "nt":
            self.file.close()
        if self.force:
            os.replace(self.path, self.target)
        else:
            self._claim()
        self._open = False
        self.file.close()
        sync_folder(self.target.parent)

    def _claim(self) -> None:
        """Move without replacing: a hard link fails when the name is taken."""
        try:
            os.link(self.path, self.target, follow_symlinks=False)
        except FileExistsError:
            raise UsageError("the output exists; --force replaces it").at(path=str(self.target)) from None
        except (OSError, NotImplementedError) as e:
            if isinstance(e, OSError) and e.errno not in _NO_LINK:
                raise
            if os.path.lexists(self.target):
                raise UsageError("the output exists; --force replaces it").at(path=str(self.target)) from None
            os.replace(self.path, self.target)
        else:
            os.unlink(self.path)

    def close(self) -> None:
        """Give up what is not published."""
        if not self._open:
            return
        try:
            if not self.keep:
                with contextlib.suppress(FileNotFoundError):
                    if self._is_ours():
                        os.unlink(self.path)
        finally:
            self.file.close()
        # Last: an interrupt within this method leaves the rest to `__del__`.
        self._open = False

    def _is_ours(self) -> bool:
        """After an interrupt within `publish` the partial file's name may be free already, or another process's."""
        if os.name == "nt":
            return True
        return not self.file.closed and os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path))

    def __del__(self) -> None:
        # An interrupt between the constructor and `with`, or within `__exit__`, passes both by.
        self.close()

    def __enter__(self) -> "PartialFile":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and self._open and self.keep:
            error.add_note(f"{self.path} is kept; --resume goes on from it")
        self.close()
