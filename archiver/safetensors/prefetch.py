"""Tensors decoded in the background: what `safe_open.prefetch` of safetensors 0.9 returns."""

import queue
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, Self

from safetensors import SafetensorError


class PrefetchLoader:
    """Hands out each planned tensor once, by `take(name)` or by iterating in the order in which they are ready.

    `parts` maps names, in file order, to (what is indexed, a slice of rows with step 1 or None for all).
    """

    def __init__(self, parts: Mapping[str, tuple[Any, slice | None]], threads: int) -> None:
        for name, (part, rows) in parts.items():
            if rows is not None and rows.step not in (None, 1):
                raise SafetensorError(f"prefetch takes slices of step 1, not {rows!r}, of tensor {name}")
            if rows is not None and not part.get_shape():
                raise SafetensorError(f"tensor {name} has no dimension to slice")
        self._pool = ThreadPoolExecutor(max(1, threads), "tzip-prefetch")
        self._lock = threading.Lock()
        self._ready: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._names = list(parts)
        self._waiting: dict[str, Future[Any]] = {}
        for name, (part, rows) in parts.items():
            future = self._pool.submit(part.__getitem__, ... if rows is None else rows)
            self._waiting[name] = future
            future.add_done_callback(lambda _, name=name: self._ready.put(name))  # type: ignore[misc]

    def names(self) -> list[str]:
        """Return the names that this loader hands out, in file order."""
        return list(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def take(self, name: str) -> Any:
        """Return a tensor when it is ready; a second time it is an error."""
        with self._lock:
            future = self._waiting.pop(name, None)
        if future is None:
            why = "was handed out already, or the loader is closed" if name in self._names else "is not planned"
            raise SafetensorError(f"tensor {name} {why}")
        try:
            return future.result()
        except CancelledError:
            raise SafetensorError("the loader is closed") from None

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        while True:
            with self._lock:
                if not self._waiting:
                    return
            name = self._ready.get()
            with self._lock:
                future = self._waiting.pop(name, None)
            if future is not None:
                yield name, future.result()

    def close(self) -> None:
        """Stop, and let go of what was not handed out."""
        with self._lock:
            self._waiting.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
