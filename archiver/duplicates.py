"""Finding runs whose bytes the archive holds already, so that they are stored once (FORMAT.md, section 2.3).

Runs of one size, width and coding are told apart by a few samples of their bytes, taken only when there is another one;
those that agree are compared byte by byte. What a run of an earlier member held when it was packed is proven by the sums
of its chunks, too: its file may have changed since. So a model without repeats costs one read of 64 bytes for each run.
"""

import hashlib
import io
from array import array
from bisect import bisect_right
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from tzip.bases import Base, Input, role_bytes
from tzip.coders.arrays import U8
from tzip.coders.planes import WORD
from tzip.coders.predictors import ROLES, SPREAD, Beside, Predictor
from tzip.coders.sums import sum64
from tzip.formats.catalogue import MAX_LIVE
from tzip.formats.layout import CHUNK_ELEMENTS, GROUP_ELEMENTS, Block, ChunkHead
from tzip.formats.reader import MAX_EXPANSION
from tzip.formats.source import FileSource, Source

SAMPLE = 64  # bytes
SAMPLES = 32


@dataclass(slots=True, eq=False)
class Run:
    """A run to be: element width, what coding suits it, and the byte ranges of the member that it consists of.

    `row` is the number of elements in a row of the tensor, 0 where there are no rows; `inputs` are the tensors that parts of it
    are to be differences from, or predicted from by `predictor`. `same` is the run of this archive that holds these bytes
    already, `depth` how many runs it follows from in a row. `ordinal` and `sums`, the sum64 of each chunk, are known once the
    run is written.
    """

    width: int
    coding: str
    row: int = 0
    pieces: list[tuple[int, int]] = field(default_factory=list)
    size: int = 0
    inputs: list[Input] = field(default_factory=list)
    predictor: Predictor | None = None
    same: "Run | None" = None
    depth: int = 0
    ordinal: int = -1
    sums: "array[int]" = field(default_factory=lambda: array("Q"))

    def add(self, begin: int, n: int, base: Base | None = None) -> None:
        """Add the n bytes of the member from `begin` on, a tensor's, with its base."""
        if base is not None:
            self.inputs.append(Input(0, self.size, min(n, base.nbytes), base))
        self.pieces.append((begin, n))
        self.size += n

    def base_bytes(self, begin: int, n: int) -> U8 | None:
        """Return the n bytes from `begin` on of what the run is a difference from, zero where it is from nothing."""
        return role_bytes(self.inputs, 0, begin, n)

    def beside(self, begin: int, n: int) -> Beside:
        """Return what predicting the n bytes from `begin` on reads besides the base."""
        if self.predictor is None:
            return Beside()
        kind = self.predictor.kind
        found = {role: role_bytes(self.inputs, role, begin, n) for role in ROLES[kind] if role}
        roles = {role: raw for role, raw in found.items() if raw is not None}
        first = None
        if kind in SPREAD and begin:
            first = self.predictor.string(0, min(self.size // self.width, CHUNK_ELEMENTS))
        return Beside(roles, first)

    @property
    def stored(self) -> "Run":
        """The run that is written: this one, or the one that is the same."""
        return self if self.same is None else self.same

    @property
    def short(self) -> bool:
        """Whether it is one chunk, which a reader holds from its first use in a member to its last."""
        return self.size <= CHUNK_ELEMENTS * self.width

    @property
    def least(self) -> int:
        """Bytes that its chunk records have at least, however well it is coded."""
        whole, rest = divmod(self.size // self.width, CHUNK_ELEMENTS)
        if self.inputs:
            return (whole + (rest > 0)) * ChunkHead.SIZE
        return whole * _least(CHUNK_ELEMENTS) + (_least(rest) if rest else 0)

    def read(self, source: Source, at: int, out: U8) -> bool:
        """Fill `out` with the run's bytes from `at` on; return whether the source had them all."""
        ends = list(accumulate(n for _, n in self.pieces))
        i = bisect_right(ends, at)
        done = 0
        while done < out.size:
            begin, n = self.pieces[i]
            skip = at + done - (ends[i] - n)
            part = out[done : done + n - skip]
            if source.readinto_at(begin + skip, memoryview(part)) != part.size:
                return False
            done += part.size
            i += 1
        return True


def _least(elements: int) -> int:
    # One plane's entries and no payload; a transform that leaves no inner elements has four entries.
    return ChunkHead.SIZE + Block.SIZE * min(4, -(-elements // GROUP_ELEMENTS))


class ArchivedSource(Source):
    """A source whose bytes come out of an archive: reading samples is dear there, but sums of its chunks are known."""

    def place(self, pieces: Sequence[tuple[int, int]]) -> Hashable:
        """Return where in the archive these byte ranges are, when they are a whole run: equal places hold equal bytes."""
        raise AssertionError

    def fingerprint(self, pieces: Sequence[tuple[int, int]]) -> bytes | None:
        """Return something that is equal for equal bytes; None when it would be dear."""
        raise AssertionError


@dataclass(frozen=True, slots=True)
class Origin:
    """Where runs come from: how to open it again, and what tells whether it changed (the function, and what it said)."""

    open: Callable[[], Source]
    stamp: Callable[[], object] | None
    seen: object


@dataclass(frozen=True, slots=True)
class _Known:
    run: Run
    origin: Origin


_Stage = Callable[[Run, Source], bytes | None]


def _one_sample(run: Run, source: Source) -> bytes | None:
    if isinstance(source, ArchivedSource):
        return source.fingerprint(run.pieces)
    return _samples(run, source, [max(0, run.size - SAMPLE) // 2])


def _more_samples(run: Run, source: Source) -> bytes | None:
    if isinstance(source, ArchivedSource):
        return b""  # the first stage said it all
    return _samples(run, source, [i * max(0, run.size - SAMPLE) // (SAMPLES - 1) for i in range(SAMPLES)])


def _samples(run: Run, source: Source, places: Sequence[int]) -> bytes | None:
    found = hashlib.blake2b(digest_size=16)
    sample = np.empty(min(SAMPLE, run.size), np.uint8)
    for at in places:
        if not run.read(source, at, sample):
            return None
        found.update(sample)
    return found.digest()


def _all_sums(run: Run, source: Source) -> bytes | None:
    if isinstance(source, ArchivedSource):
        return b""
    sums = run.sums
    if not sums:  # else the run is written already
        sums = array("Q")
        step = CHUNK_ELEMENTS * run.width
        for at in range(0, run.size, step):
            raw = np.empty(min(step, run.size - at), np.uint8)
            if not run.read(source, at, raw):
                return None
            sums.append(sum64(raw))
    return hashlib.blake2b(sums.tobytes(), digest_size=16).digest()


_STAGES: tuple[_Stage, ...] = (_one_sample, _more_samples, _all_sums)


class Duplicates:
    """The runs of an archive in the making, by their bytes.

    A run is kept under its size, width and coding alone; when a second one comes, both move on to a place that one sample
    names, and from there, if need be, to those that more samples and the sums of all chunks name. Only those in one such
    place are compared: tensors that are zero but for a few elements do not cost a comparison of each with each.
    """

    def __init__(self) -> None:
        self._places: dict[tuple[Hashable, ...], _Known | None] = {}
        self._alike: dict[tuple[Hashable, ...], list[_Known]] = {}
        self._here: tuple[Origin, Source] | None = None
        self._other: tuple[Origin, Source] | None = None

    def find(self, runs: Sequence[Run], origin: Origin, source: Source) -> dict[Run, Run]:
        """Return those of a member's runs whose bytes an earlier run has, with that run; remember the others."""
        if not _seeks_well(source):
            return {}
        found = {}
        self._here = origin, source
        try:
            for run in runs:
                same = self._find(_Known(run, origin))
                if same is not None:
                    found[run] = same
        finally:
            self._here = None
            self._forget_other()
        return found

    def _find(self, known: _Known) -> Run | None:
        run = known.run
        lengths = tuple(n for _, n in run.pieces) if len(run.pieces) > 1 else ()
        place: tuple[Hashable, ...] = (run.size, run.width, run.coding, lengths)
        for stage in _STAGES:
            if place not in self._places:
                self._places[place] = known
                return None
            first = self._places[place]
            if first is not None:
                self._places[place] = None
                self._move(first, place, stage)
            digest = self._digest(known, stage)
            if digest is None:
                return None
            place = (*place, digest)
        alike = self._alike.setdefault(place, [])
        for other in alike:
            if self._equal(other, known):
                return other.run
        alike.append(known)
        return None

    def _move(self, known: _Known, place: tuple[Hashable, ...], stage: _Stage) -> None:
        digest = self._digest(known, stage)
        if digest is None:  # its file has gone
            return
        if stage is _STAGES[-1]:
            self._alike[*place, digest] = [known]
        else:
            self._places[*place, digest] = known

    def _digest(self, known: _Known, stage: _Stage) -> bytes | None:
        source = self._source(known.origin)
        try:
            return None if source is None else stage(known.run, source)
        except OSError:  # if it is the member's own, packing will say so
            return None

    def _source(self, origin: Origin) -> Source | None:
        """Return the source, open; None when it has gone or changed."""
        for held in (self._here, self._other):
            if held is not None and held[0] is origin:
                return held[1]
        self._forget_other()
        try:
            if origin.stamp is not None and origin.stamp() != origin.seen:
                return None
            source = origin.open()
        except OSError:
            return None
        self._other = origin, source
        return source

    def _forget_other(self) -> None:
        if self._other is not None:
            self._other[1].close()
            self._other = None

    def _equal(self, other: _Known, known: _Known) -> bool:
        """Say whether all bytes are equal now, and those of an earlier member equal to what was archived."""
        theirs, ours = self._source(other.origin), self._source(known.origin)
        if theirs is None or ours is None:
            return False
        try:
            return self._compare(other, theirs, known, ours)
        except OSError:
            return False

    @staticmethod
    def _compare(other: _Known, theirs: Source, known: _Known, ours: Source) -> bool:
        if isinstance(theirs, ArchivedSource) and isinstance(ours, ArchivedSource):
            place = ours.place(known.run.pieces)
            if place is not None and place == theirs.place(other.run.pieces):
                return True
        step = CHUNK_ELEMENTS * known.run.width
        word = WORD[known.run.width]
        for chunk, at in enumerate(range(0, known.run.size, step)):
            a, b = (np.empty(min(step, known.run.size - at), np.uint8) for _ in range(2))
            if not (known.run.read(ours, at, a) and other.run.read(theirs, at, b)):
                return False
            if not np.array_equal(a.view(word), b.view(word)):
                return False
            if other.origin is not known.origin and other.run.sums[chunk] != sum64(a):
                return False
        return True


def _seeks_well(source: Source) -> bool:
    """Say whether samples are cheap: a gzip file, say, is read from its start again for each step back."""
    if not isinstance(source, FileSource):
        return True
    file = getattr(source.file, "file", source.file)  # what Windows' TemporaryFile wraps
    return type(getattr(file, "raw", file)) in (io.FileIO, io.BytesIO)


def share(runs: Sequence[Run], uses: Sequence[Run], found: dict[Run, Run], position: int, total: int) -> None:
    """Set `same` of the runs in `found`, the largest first, as far as the limits of the format allow.

    `runs` are the member's, `uses` the run of each extent that has one, in order; `position` is the length of the archive so
    far, `total` the bytes of all members with this one.
    """
    # What reading holds: at each extent the runs that were used and will be again.
    span: dict[Run, tuple[int, int]] = {}
    for i, run in enumerate(uses):
        span[run] = (span.get(run, (i, i))[0], i)
    live = np.zeros(len(uses) + 1, np.int64)
    for held, (low, high) in span.items():
        live[low:high] += held.short
    # What an archive can hold at its length, for which the runs that are stored vouch.
    least = position + sum(run.least for run in runs)
    for run, same in sorted(found.items(), key=lambda pair: -pair[0].size):
        if total > MAX_EXPANSION * (least - run.least):
            continue
        low, high = span[run]
        if same in span:
            a, b = span[same]
            live[low:high] -= run.short
            live[a:b] -= run.short
            first, last = min(low, a), max(high, b)
            live[first:last] += run.short
            if int(live[first:last].max(initial=0)) > MAX_LIVE:
                live[first:last] -= run.short
                live[low:high] += run.short
                live[a:b] += run.short
                continue
            low, high = first, last
        span[same] = low, high
        run.same = same
        least -= run.least
