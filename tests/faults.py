"""Failures on demand: the Nth call into the file system raises."""

import builtins
import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

posix = pytest.mark.skipif(os.name == "nt", reason="signals and locks are those of POSIX")
CALLS = (
    "open",
    "fstat",
    "link",
    "replace",
    "unlink",
    "fsync",
    "chmod",
    "utime",
    "mkdir",
    "symlink",
    "preadv",
    "scandir",
    "readlink",
    "stat",
    "lstat",
)


class Fault:
    """Counts calls into the file system and lets call number `at` fail, once or for good."""

    def __init__(self, at: int, code: int, only: tuple[str, ...] | None = None, keep: bool = False) -> None:
        self.at, self.code, self.only, self.keep = at, code, only, keep
        self.calls: list[str] = []
        self.fired = False

    def check(self, name: str) -> None:
        if self.only is not None and name not in self.only:
            return
        self.calls.append(name)
        if len(self.calls) == self.at or (self.keep and len(self.calls) > self.at):
            self.fired = True
            raise OSError(self.code, os.strerror(self.code))


class File:
    """A file whose methods may fail."""

    def __init__(self, file: Any, fault: Fault) -> None:
        self._file, self._fault = file, fault

    def __enter__(self) -> "File":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._file, name)
        if name not in ("write", "truncate", "seek", "read", "flush"):
            return value

        def method(*args: Any) -> Any:
            self._fault.check(name)
            return value(*args)

        return method


def _counted(state: Fault, name: str, original: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        state.check(name)
        return original(*args, **kwargs)

    return call


@contextlib.contextmanager
def fault(
    at: int, code: int = errno.EIO, only: tuple[str, ...] | None = None, keep: bool = False, more: bool = False
) -> Iterator[Fault]:
    """`more`: calls that Python's own `open`, listings and locks make may fail, too."""
    state = Fault(at, code, only, keep)
    with pytest.MonkeyPatch.context() as patch:
        if more:
            import fcntl

            for module, name in ((builtins, "open"), (os, "listdir"), (fcntl, "flock")):
                patch.setattr(module, name, _counted(state, name, getattr(module, name)))
        for name in CALLS:
            original = getattr(os, name, None)
            if original is None:
                continue
            patch.setattr(os, name, _counted(state, name, original))
        original_fdopen = os.fdopen
        patch.setattr(os, "fdopen", lambda *a, **k: File(original_fdopen(*a, **k), state))
        yield state


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): os.readlink(p).encode() if p.is_symlink() else p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_symlink() or p.is_file()
    }


def partials(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.name.endswith(".tzip-partial")]
