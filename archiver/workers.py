"""Ordered work on several threads with bounded memory: the kernels release the GIL."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self, TypeVar

from tzip.coders.errors import UsageError

T = TypeVar("T")
R = TypeVar("R")


def thread_count(threads: int | None) -> int:
    """Return the number of threads to use: as asked, or one for each CPU that this process may use."""
    if threads is None:
        if hasattr(os, "sched_getaffinity"):
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1
    if threads < 1:
        raise UsageError(f"{threads} threads")
    return threads


class Workers:
    """A pool of threads; with one thread the work is done where it is asked for."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads, "tzip") if threads > 1 else None

    def submit(self, work: Callable[..., R], *args: Any) -> "Future[R]":
        """Start `work(*args)`."""
        if self._pool is not None:
            return self._pool.submit(work, *args)
        future: Future[R] = Future()
        try:
            future.set_result(work(*args))
        except BaseException as e:  # a future carries whatever was raised, as the pool's do
            future.set_exception(e)
        return future

    def map(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Yield the results in order, at most `threads` + 1 of them unfinished or waiting at a time."""
        if self._pool is None:
            yield from map(work, items)
            return
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(self._pool.submit(work, item))
                if len(waiting) > self.threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def close(self) -> None:
        """Wait for what runs and drop what does not yet."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Hasher:
    """SHA-256 of a stream, computed beside the coders on a thread of its own (in place with one thread)."""

    def __init__(self, enabled: bool, threads: int) -> None:
        import hashlib

        self._sha = hashlib.sha256() if enabled else None
        self._pool = ThreadPoolExecutor(1, "tzip-sha") if enabled and threads > 1 else None
        self._waiting: deque[Future[None]] = deque()

    def update(self, data: Any) -> None:
        """Add bytes; at most four pieces wait, so memory stays bounded. The caller must not change them any more."""
        if self._sha is None:
            return
        if self._pool is None:
            self._sha.update(data)
            return
        self._waiting.append(self._pool.submit(self._sha.update, data))
        if len(self._waiting) > 4:
            self._waiting.popleft().result()

    def digest(self) -> bytes | None:
        """Return the digest, or None when not enabled."""
        while self._waiting:
            self._waiting.popleft().result()
        return self._sha.digest() if self._sha is not None else None

    def close(self) -> None:
        """End the thread."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
