"""The pieces of a member in their order, decoded ahead of it by several threads, with bounded memory."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from tzip.coders.arrays import U8
from tzip.workers import Workers


def in_order(
    pieces: list[tuple[int, int, int, int]],
    uses: dict[int, int],
    inline: U8,
    run_chunks: NDArray[np.int64],
    decode: Callable[[int, int], U8],
    workers: Workers,
    write: Callable[[int, U8], None] | None,
) -> Iterator[U8]:
    """Yield the pieces (run or -1, chunk, begin, end) in order, decoding ahead; shared runs are held until their last use."""

    def alone(run: int, chunk: int, begin: int, end: int, at: int) -> U8:
        part = decode(run, chunk)[begin:end]
        if write is not None:
            write(at, part)
        return part

    at = 0
    held: dict[int, Future[U8]] = {}
    ahead: deque[tuple[Future[U8] | None, int, int, int, int]] = deque()
    started: set[int] = set()
    pending = 0
    try:
        for run, chunk, begin, end in pieces:
            if run < 0:
                ahead.append((None, run, begin, end, at))
                at += end - begin
                continue
            if uses[run] > 1 and int(run_chunks[run]) == 1:
                if run not in started:
                    started.add(run)
                    held[run] = workers.submit(decode, run, 0)
                    pending += 1
                ahead.append((held[run], run, begin, end, at))
            else:
                ahead.append((workers.submit(alone, run, chunk, begin, end, at), -2, begin, end, at))
                pending += 1
            at += end - begin
            while ahead and (pending > workers.threads or ahead[0][0] is None):
                part, done = _next(ahead, uses, held, inline, write)
                pending -= done
                yield part
        while ahead:
            part, _ = _next(ahead, uses, held, inline, write)
            yield part
    finally:
        for future, *_ in ahead:
            if future is not None and not future.cancel():
                future.exception()  # what is writing must end before the file is closed


def _next(
    ahead: deque[tuple[Future[U8] | None, int, int, int, int]],
    uses: dict[int, int],
    held: dict[int, Future[U8]],
    inline: U8,
    write: Callable[[int, U8], None] | None,
) -> tuple[U8, int]:
    """Return the next piece and whether it frees a place in the pipeline."""
    future, run, begin, end, at = ahead.popleft()
    if run == -2 and future is not None:
        return future.result(), 1
    part = inline[begin:end] if future is None else future.result()[begin:end]
    if write is not None:
        write(at, part)
    if future is None:
        return part, 0
    uses[run] -= 1
    if uses[run] == 0:
        del held[run]
        return part, 1
    return part, 0
