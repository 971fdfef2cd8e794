"""What would tzip gain here, and how fast: every level on a sample of the user's own file."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tzip.chunks import SLACK, decode_chunk
from tzip.coders.arrays import U8
from tzip.coders.errors import CorruptError, UsageError
from tzip.duplicates import Run
from tzip.encoding import encode_chunk
from tzip.extents import lay_out
from tzip.formats.catalogue import FILE
from tzip.formats.containers import ContainerError
from tzip.formats.layout import CHUNK_ELEMENTS
from tzip.formats.neighbours import Neighbours
from tzip.formats.recognising import Found
from tzip.formats.source import Source
from tzip.plan import LEVELS
from tzip.tree import collect
from tzip.workers import Workers, thread_count


@dataclass(frozen=True, slots=True)
class LevelFigures:
    """Sizes in bytes and speeds in bytes of input a second, of the chunks that were measured."""

    level: str
    bytes_in: int
    bytes_out: int
    encode: float
    decode: float
    copy: float


def measure(
    path: Any,
    *,
    levels: tuple[str, ...] = tuple(LEVELS),
    threads: int | None = 1,
    sample: int = 256 << 20,
    repeat: int = 3,
    progress: Callable[[int], None] | None = None,
) -> list[LevelFigures]:
    """Encode and decode chunks of `path` (a file or folder) in memory at every level, best of `repeat` runs.

    Of larger inputs chunks at even distances are taken, up to `sample` bytes. Every chunk is compared with its source.
    `copy` is the speed of copying the same bytes, the limit on this machine.
    """
    told = progress or (lambda n: None)
    chunks = _sample(path, sample)
    total = sum(raw.size for raw, *_ in chunks)
    if not total:
        raise UsageError("there is nothing to measure").at(path=str(path))
    copy = min(_timed(lambda: [raw.copy() for raw, *_ in chunks]) for _ in range(repeat))
    with Workers(thread_count(threads)) as workers:
        figures = []
        for level in levels:
            figures.append(_one(level, chunks, workers, repeat, copy, str(path)))
            told(total)
        return figures


def _one(
    level: str, chunks: list[tuple[U8, int, str, int, int]], workers: Workers, repeat: int, copy: float, path: str
) -> LevelFigures:
    records: list[bytes | memoryview] = []
    outs = [np.empty(raw.size, np.uint8) for raw, *_ in chunks]

    def encode_one(chunk: tuple[U8, int, str, int, int]) -> bytes | memoryview:
        raw, width, coding, row, first = chunk
        return encode_chunk(raw, width, coding, LEVELS[level], 0, 0, row, first).record

    def decode_one(job: tuple[bytes | memoryview, tuple[U8, int, str, int, int], U8]) -> None:
        record, (raw, width, *_), out = job
        buffer = np.empty(len(record) + SLACK, np.uint8)
        buffer[: len(record)] = np.frombuffer(record, np.uint8)
        buffer[len(record) :] = 0
        decode_chunk(buffer, len(record), 0, 0, raw.size // width, width, out)

    def encode_all() -> None:
        records[:] = workers.map(encode_one, chunks)

    def decode_all() -> None:
        for _ in workers.map(decode_one, zip(records, chunks, outs, strict=True)):
            pass

    encode = min(_timed(encode_all) for _ in range(repeat + 1))  # the first run may compile
    decode = min(_timed(decode_all) for _ in range(repeat + 1))
    for out, (raw, *_) in zip(outs, chunks, strict=True):
        if not np.array_equal(out, raw):
            raise CorruptError("tzip is at fault: a chunk does not decode to its source").at(path=path)
    total = sum(out.size for out in outs)
    return LevelFigures(level, total, sum(map(len, records)), total / encode, total / decode, total / copy)


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return max(time.perf_counter() - start, 1e-9)


def _sample(path: Any, limit: int) -> list[tuple[U8, int, str, int, int]]:
    """Return (bytes, width, coding, row, first) of chunks at even distances; see encode_chunk."""
    neighbours = Neighbours()
    items = [item for item in collect([path], None) if item.kind == FILE]
    places = [place for item in items if item.open for place in _places(item.open, item.original, neighbours)]
    total = sum(n for *_, n in places)
    step = max(1, -(-total // limit))
    chunks = []
    for opener, run, first, begin, n in places[::step]:
        raw = np.empty(n, np.uint8)
        with opener() as source:
            got = source.readinto_at(begin, memoryview(raw))
        chunks.append((raw[:got], run.width, run.coding, run.row, first))
    return chunks


def _places(
    opener: Callable[[], Source], path: str, neighbours: Neighbours
) -> Iterator[tuple[Callable[[], Source], Run, int, int, int]]:
    with opener() as source:
        try:
            found = neighbours.look(source, path)
        except ContainerError:
            found = Found()
        layout = lay_out(source.size, found.regions, found.tensors, header=found.header)
    for run in layout.runs:
        step = CHUNK_ELEMENTS * run.width
        for begin, n in run.pieces:
            for at in range(begin, begin + n, step):
                yield opener, run, (at - begin) // run.width, at, min(step, begin + n - at)
