"""Chunks from a file to a device: read by several threads into a ring of pinned buffers, copied and decoded behind each other.

Memory, beside what the tensors take: for each of SLOTS buffers BUFFER bytes and JOBS for jobs, on the host and again on the
device, and SCRATCH bytes there; less of each for what is small; on the host a chunk, and what it is made from, for each
thread when the CPU has to decode some. A buffer is used again when all that was in it is decoded, and found right.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from tzip.chunks import HEAD_BYTES, SLACK, decode_chunk, needs
from tzip.coders.arrays import U8, U32
from tzip.coders.errors import CorruptError, TruncatedError, TzipError
from tzip.coders.transforms import DELTA
from tzip.formats.layout import WIDE_ALIGN, align
from tzip.formats.reader import ArchiveReader
from tzip.gpu.decoder import MOST_JOBS, ROOM, Batch, Item, LeftToCpuError, failure, most_scratch
from tzip.gpu.devices import Device, Memory
from tzip.gpu.jobs import BAD_STORED_SUM, Blob

SLOTS = 3
BUFFER = 32 << 20  # or one record, where that is larger: bfloat16 decodes to 48 MiB, and a copy takes half a millisecond
JOBS = 4 * MOST_JOBS
SCRATCH = 80 << 20  # at most, and never less than one chunk of any kind needs
GAP = 512  # bytes between records that are read in vain rather than skipped; what skipping costs in the buffer is less
_DOUBTFUL = "a chunk is damaged, or no difference from the base that was given"  # which of them only the true base can tell
READ = 4 << 20  # bytes that a thread reads at a time: enough to hide the call, few enough to share


@dataclass(frozen=True, slots=True)
class Use:
    """Bytes low … high - 1 of a chunk, and where on the device they go."""

    low: int
    high: int
    address: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """A chunk of a run, and all its uses; `place` adds to an error whose tensor it is."""

    run: int
    chunk: int
    uses: list[Use]
    place: Callable[[TzipError], TzipError]


@dataclass
class Counts:
    """What became of the chunks: decoded on the device, or, in forms that it does not decode, on the CPU."""

    device: int = 0
    cpu: int = 0
    reasons: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Share:
    """Chunks that are in a buffer together: the place of each record in it, and what is read: (offset in the file, place,
    bytes).
    """

    wanted: list[Wanted]
    places: list[int]
    spans: list[tuple[int, int, int]]
    end: int

    def pieces(self) -> Iterator[tuple[int, int, int]]:
        """Yield the spans in pieces for threads."""
        for offset, place, size in self.spans:
            for at in range(0, size, READ):
                yield offset + at, place + at, min(READ, size - at)

    def place(self, offset: int, origin: int) -> int:
        """Return where the record at `offset` of the file would lie."""
        if self.spans:
            first, place, size = self.spans[-1]
            if offset - first - size < GAP:
                return place + offset - first
        # As far above a multiple of 128 as in the archive: what is aligned there is aligned here.
        return align(self.end, WIDE_ALIGN) + (offset - origin) % WIDE_ALIGN

    def add(self, wanted: Wanted, offset: int, place: int, length: int) -> None:
        """Add the next record, at the place that `place` said."""
        first, begin, _ = self.spans[-1] if self.spans else (-1, 0, 0)
        if first >= 0 and place - begin == offset - first:
            self.spans[-1] = first, begin, offset + length - first
        else:
            self.spans.append((offset, place, length))
        self.wanted.append(wanted)
        self.places.append(place)
        self.end = place + length


@dataclass
class _Slot:
    host: U8
    memory: Memory
    share: _Share
    reads: list["Future[None]"] = field(default_factory=list)
    batches: list[tuple[Batch, U32, list[Wanted]]] = field(default_factory=list)
    done: Any = None


class Ring:
    """Loads chunks of one archive to a device. `decode` fills an array with a chunk on the CPU, whatever it is made from.
    `base_at` returns where on the device the base bytes of a chunk of a run with inputs are, 0 when they are not there; then
    `base_of` returns them.

    Use it in a `with` statement.
    """

    def __init__(
        self,
        device: Device,
        reader: ArchiveReader,
        decode: Callable[[int, int, U8], U8],
        base_of: Callable[[int, int], U8],
        base_at: Callable[[int, int], int],
        threads: int,
    ) -> None:
        self._device = device
        self._reader = reader
        self._decode = decode
        self._base_of = base_of
        self._base_at = base_at
        self._size = BUFFER
        self._scratch = device.take(0)
        self._slots = 0
        self._threads = max(1, threads)
        self._pool = ThreadPoolExecutor(self._threads, "tzip-read")
        self._left: deque[tuple[_Chunk, int, Future[U8]]] = deque()  # chunks that the CPU decodes, and where they go
        self.counts = Counts()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        for queue in ("copy", "work"):  # nothing reads the buffers any more
            self._device.wait(self._device.mark(queue))

    def load(self, wanted: Sequence[Wanted]) -> None:
        """Decode chunks, given in the order of the file, to where they are used; all of it is done when this returns.

        Raises CorruptError, TruncatedError or UnsupportedError as decoding on the CPU does; what was written then is of no use.
        """
        shares = list(self._shares(wanted))
        self._size = align(max(share.end for share in shares), 256)
        room = [_needed(w, self._nbytes(w), bool(self._reader.index["r_inputs"][w.run])) for w in wanted]
        self._scratch = self._device.take(max(*room, min(SCRATCH, sum(room))))
        self._reader.source.expect([(offset, size) for s in shares for offset, _, size in s.pieces()])
        free: list[_Slot] = []
        reading: deque[_Slot] = deque()
        working: deque[_Slot] = deque()
        for share in shares:
            if not free and self._slots == SLOTS:
                free.append(self._finish(working.popleft()))
            if free:
                slot = free.pop()
            else:
                self._slots += 1
                size = self._size + ROOM + JOBS
                slot = _Slot(self._device.pinned(size), self._device.take(size), share)
            self._read(slot, share)
            reading.append(slot)
            if len(reading) > 1:
                working.append(self._start(reading.popleft()))
        while reading:
            working.append(self._start(reading.popleft()))
        while working:
            self._finish(working.popleft())

    def _shares(self, wanted: Sequence[Wanted]) -> Iterator[_Share]:
        """Yield what fits a buffer. Records that lie together in the file are read together and lie so in the buffer."""
        share = _Share([], [], [], 0)
        for w in wanted:
            offset, length = self._reader.chunk_at(w.run, w.chunk)
            place = share.place(offset, self._reader.origin)
            if share.wanted and place + length > BUFFER:
                yield share
                share = _Share([], [], [], 0)
                place = share.place(offset, self._reader.origin)
            share.add(w, offset, place, length)
        if share.wanted:
            yield share

    def _read(self, slot: _Slot, share: _Share) -> None:
        slot.share, slot.batches = share, []
        slot.reads = [self._pool.submit(self._fill, slot.host, *piece) for piece in share.pieces()]

    def _fill(self, host: U8, offset: int, place: int, size: int) -> None:
        source = self._reader.source
        if source.readinto_at(offset, memoryview(host)[place : place + size]) != size:
            raise TruncatedError("a chunk record is cut off").at(path=source.name, offset=offset)

    def _start(self, slot: _Slot) -> _Slot:
        """Copy what has been read to the device and decode it."""
        device, share = self._device, slot.share
        try:
            for read in slot.reads:
                read.result()
        except TzipError as e:
            raise share.wanted[0].place(e) from None
        device.upload(slot.host[: share.end], slot.memory.address, "copy")
        device.after("work", device.mark("copy"))
        batch, members = self._batch(slot, None), list[Wanted]()
        for w, place in zip(share.wanted, share.places, strict=True):
            chunk = self._chunk(slot, w, place)
            if not batch.room or batch.left < _needed(w, chunk.size, chunk.base is not None):
                self._launch(slot, batch, members)
                batch, members = self._batch(slot, batch), []
            try:
                self._add(batch, chunk, members)
            except TzipError as e:
                raise self._worded(chunk, e) from None
        self._launch(slot, batch, members)
        slot.done = device.mark("work")
        return slot

    def _batch(self, slot: _Slot, before: Batch | None) -> Batch:
        """Return an empty batch whose jobs go behind those of the one before it."""
        jobs = self._size + ROOM
        limit = slot.memory.address + slot.memory.nbytes
        scratch = self._scratch.address, self._scratch.nbytes
        blob = Blob(slot.host[jobs:], slot.memory.address + jobs) if before is None else before.blob
        batch = Batch(scratch, blob, limit)
        if not batch.room:  # the host waits until the jobs are done; rare
            self._device.wait(self._device.mark("work"))
            slot.batches = [(b, codes.copy(), members) for b, codes, members in slot.batches]
            batch = Batch(scratch, Blob(slot.host[jobs:], slot.memory.address + jobs), limit)
        return batch

    def _chunk(self, slot: _Slot, w: Wanted, place: int) -> "_Chunk":
        """Return a chunk that has been read, its base with it; raises what is wrong with either, placed."""
        reader = self._reader
        length = reader.chunk_at(w.run, w.chunk)[1]
        record = slot.host[place : place + length + SLACK]
        inputs = bool(int(reader.index["r_inputs"][w.run]))
        try:
            check = reader.chunk_check(w.run, w.chunk, memoryview(record))
            base_at = self._base_at(w.run, w.chunk) if inputs else 0  # which proves the roles, needed or not
        except TzipError as e:
            raise w.place(e) from None
        try:
            based, predicted = _leans(memoryview(record)[:length])
            based = based and inputs
            # A copy: what is given is scratch memory, and the chunk may be decoded once more to say what is wrong.
            base = self._base_of(w.run, w.chunk).copy() if based and not base_at else None
        except TzipError as e:
            raise self._placed_error(w, e) from None
        elements, width = reader.chunk_elements(w.run, w.chunk), int(reader.index["r_width"][w.run])
        address, base_at = slot.memory.address + place, base_at if based else 0
        return _Chunk(w, record, length, address, elements, width, check, base, base_at, predicted)

    def _nbytes(self, w: Wanted) -> int:
        return self._reader.chunk_elements(w.run, w.chunk) * int(self._reader.index["r_width"][w.run])

    def _add(self, batch: Batch, chunk: "_Chunk", members: list[Wanted]) -> None:
        """Add a chunk to the batch, or let the CPU decode it when kernels do not know its form."""
        w, size = chunk.wanted, chunk.size
        run = self._reader.run_ordinal(w.run)
        out = w.uses[0].address if _whole(w, size) else batch.scratch(size)
        base = chunk.base_at if chunk.base is None else batch.scratch(size)
        try:
            batch.add(
                Item(
                    chunk.record, chunk.length, chunk.address, run, w.chunk, chunk.elements, chunk.width, chunk.check,
                    out, base, chunk.base,
                )
            )  # fmt: skip
        except LeftToCpuError as e:
            self.counts.cpu += 1
            self.counts.reasons.add(str(e))
            self._settle(self._threads - 1)
            if chunk.base_at:
                chunk = replace(chunk, base=self._given(chunk))
            self._left.append((chunk, out, self._pool.submit(self._decoded, chunk)))
        else:
            self.counts.device += 1
            members.append(w)
            if chunk.base is not None:
                self._device.upload(chunk.base, base, "work")
        if not _whole(w, size):
            for use in w.uses:
                batch.copy(out + use.low, use.address, use.high - use.low)

    def _settle(self, most: int) -> None:
        """Copy what the CPU has decoded to the device until at most so many chunks are left; raises what is wrong with one."""
        while len(self._left) > most:
            chunk, out, made = self._left.popleft()
            try:
                raw = made.result()
            except TzipError as e:
                raise self._placed_error(chunk.wanted, self._blamed(chunk, e)) from None
            self._device.upload(raw, out, "work")
            self._device.wait(self._device.mark("work"))  # the memory goes now

    def _decoded(self, chunk: "_Chunk") -> U8:
        """Return the bytes of a chunk, decoded on the CPU."""
        w = chunk.wanted
        if chunk.predicted:
            return self._decode(w.run, w.chunk, np.empty(chunk.size, np.uint8))
        return self._with_base(chunk).decode(self._reader.run_ordinal(w.run))

    def _given(self, chunk: "_Chunk") -> U8:
        """Return the base bytes of a chunk that are on the device."""
        base = np.empty(chunk.size, np.uint8)
        self._device.download(chunk.base_at, base)
        self._device.wait(self._device.mark("work"))
        return base

    def _blamed(self, chunk: "_Chunk", error: TzipError) -> TzipError:
        """Return what is wrong with a chunk that the CPU has refused; where its base was given it may be that."""
        if not chunk.base_at:
            return error
        try:
            self._decoded(replace(chunk, base=None))
        except CorruptError as e:
            return e
        except TzipError:
            return CorruptError(_DOUBTFUL)
        return CorruptError(f"{error.message}; or the base that was given is another one")

    def _with_base(self, chunk: "_Chunk") -> "_Chunk":
        """Return a chunk with its base on the host."""
        if chunk.base is not None or not chunk.base_at:
            return chunk
        return replace(chunk, base=self._base_of(chunk.wanted.run, chunk.wanted.chunk).copy())

    def _launch(self, slot: _Slot, batch: Batch, members: list[Wanted]) -> None:
        self._settle(0)  # the batch may copy from these
        if not batch.empty:
            batch.plan()
            batch.launch(self._device)
            slot.batches.append((batch, batch.codes(self._device), members))

    def _finish(self, slot: _Slot) -> _Slot:
        """Wait until a buffer's chunks are decoded; raises what is wrong with the first that is."""
        self._device.wait(slot.done)
        for batch, codes, members in slot.batches:
            for item, code, w in zip(batch.items, codes.tolist(), members, strict=True):
                if code:
                    raise self._placed_error(w, self._failure(item, code, w))
        return slot

    def _failure(self, item: Item, code: int, w: Wanted) -> TzipError:
        """Return what is wrong with a chunk; where its base was given and is not found otherwise, it may be that."""
        if item.base and item.base_bytes is None:
            try:
                item = replace(item, base_bytes=self._base_of(w.run, w.chunk))
            except TzipError:
                return CorruptError(_DOUBTFUL)
            error = failure(item, code)
            if code == BAD_STORED_SUM:
                return error
            return CorruptError(f"{error.message}; or the base that was given is another one")
        return failure(item, code)

    def _worded(self, chunk: "_Chunk", error: TzipError) -> TzipError:
        """Return what the CPU says of a chunk whose record is wrong: the first thing may be that its check is."""
        try:
            self._decoded(chunk)
        except TzipError as e:
            error = e
        return self._placed_error(chunk.wanted, error)

    def _placed_error(self, w: Wanted, error: TzipError) -> TzipError:
        return w.place(error.at(path=self._reader.source.name, offset=self._reader.chunk_at(w.run, w.chunk)[0]))


def _leans(record: memoryview) -> tuple[bool, bool]:
    """Return whether a chunk is a difference from its base bytes, or these; and whether it is one from a prediction. Nothing of
    the record is proven.
    """
    roles, _ = needs(record[:HEAD_BYTES])
    predicted = len(record) >= HEAD_BYTES and record[38] == DELTA and any(record[HEAD_BYTES - 8 : HEAD_BYTES])
    return bool(roles) and not predicted, predicted


def _whole(w: Wanted, size: int) -> bool:
    """Whether a chunk of so many bytes is decoded to where it is used."""
    return len(w.uses) == 1 and w.uses[0].high - w.uses[0].low == size and w.uses[0].address % 16 == 0


def _needed(w: Wanted, size: int, based: bool) -> int:
    """Return the scratch memory that such a chunk needs at most, its base and what it is copied from included."""
    return most_scratch(size) + (int(not _whole(w, size)) + int(based)) * (size + 512)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A chunk in a buffer."""

    wanted: Wanted
    record: U8
    length: int
    address: int
    elements: int
    width: int
    check: int
    base: U8 | None
    base_at: int
    predicted: bool

    @property
    def size(self) -> int:
        """Bytes of its elements."""
        return self.elements * self.width

    def decode(self, run: int) -> U8:
        """Return its elements' bytes, decoded on the CPU."""
        out = np.empty(self.size, np.uint8)
        decode_chunk(self.record, self.length, run, self.wanted.chunk, self.elements, self.width, out, self.check, self.base)
        return out
