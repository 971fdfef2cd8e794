"""Following published weights: what is new is read as differences from what the reader has, proven, and written over it.

An update has two parts. First all new tensors are decoded beside the old ones and proven by their content ids; of what they
change, patches are kept. Then the patches are written: positions and new values, which may be written twice. So what fails
before leaves the weights as they were, and what fails while they are written is made good by writing them again.
"""

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from tzip.archive import Archive, opener
from tzip.bases import Base, BaseFile, Bases, Origin
from tzip.coders.arrays import U8
from tzip.coders.errors import BaseNotFoundError, ConflictError, CorruptError, TzipError, UsageError
from tzip.extents import OWN_RUN
from tzip.formats.catalogue import NOT_KNOWN
from tzip.formats.dtypes import Dtype
from tzip.store.backends import Backend
from tzip.store.checkpoints import Checkpoint, Objects
from tzip.store.journal import Entry, Journal
from tzip.store.manifest import Manifest, Record, needed
from tzip.store.objects import content_ids, in_memory
from tzip.store.patches import Patch, Target, between, everywhere, targets
from tzip.store.publishing import KIND, Delta, contents_of, delta_of, state_id
from tzip.store.states import numpy_array
from tzip.workers import Workers

_AGAIN = 3  # times that an update begins anew when what it reads is swept meanwhile
Deliver = Callable[[Sequence[Patch]], None]


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """What an update did: the step that the weights are of now, and the one before (None: not known); checkpoints that were
    gone through, bytes of the objects that were read, tensors and elements that were written, tensors that were read in full.
    """

    step: int
    before: int | None
    steps: int
    bytes_read: int
    tensors: int
    elements: int
    full: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Link:
    """A published checkpoint on the way from the reader's to the newest one."""

    entry: Entry
    manifest: Manifest
    delta: Delta | None


class Subscription:
    """Weights that follow what is published in a store; see `Store.subscribe`. For one thread, but for `close`."""

    def __init__(
        self,
        backend: Backend,
        weights: Any,
        *,
        step: int | None,
        reset: bool,
        poll: float,
        threads: int,
    ) -> None:
        if not poll > 0:
            raise UsageError(f"poll is a number of seconds above 0, not {poll!r}")
        self.backend = backend
        self.threads = threads
        self.poll = poll
        self.step: int | None = None
        self._seq = 0
        self._state = ""  # the id of the state that the weights are of, "" when they are of none
        self._contents: dict[str, str] = {}  # of each tensor as it is; what is not known is not there
        self._waiting: list[Patch] = []  # patches that are being written, and what the weights are when they are
        self._then: tuple[Entry, Manifest] | None = None
        self._uncertain: set[str] = set()  # tensors of which a delivery that failed may have written some
        self._closed = threading.Event()
        if weights is None:
            self.weights: Any = self._load(step)
            return
        self.weights = weights
        self._targets = targets(weights)
        self._contents = self._hash(self._targets)
        found = self._recognise(step)
        if found is not None:
            self._are(*found)
        elif not reset:
            raise ConflictError(
                "these weights are not those of "
                + ("any published checkpoint" if step is None else f"step {step}")
                + "; reset=True reads whatever differs"
            ).at(path=backend.name)

    # ---- what there is

    def latest(self) -> Entry | None:
        """Return the newest published checkpoint, None when there is none."""
        return next((e for e in Journal(self.backend).entries() if e.kind == KIND), None)

    def tensors(self) -> dict[str, tuple[Dtype, tuple[int, ...], U8]]:
        """Return the type, shape and bytes of each tensor as they are; the bytes are the weights' own memory, or a copy of what
        a device has.
        """
        return {name: (t.dtype, t.shape, t.raw) for name, t in self._targets.items()}

    def update(
        self, *, step: int | None = None, timeout: float | None = 0.0, deliver: Deliver | None = None
    ) -> UpdateReport | None:
        """Bring the weights to what was published last, or to `step`; return None when nothing new comes within `timeout`
        seconds (None: wait until something does, or until `close`).

        Read are the differences of the steps between, or the tensors in full where that is less. `deliver` gets the proven
        patches before they are written to the weights: for tensors elsewhere. When it raises, the weights stay as they are, and
        the next update delivers all elements of the tensors that it may have written to.

        Raises ConflictError (`step` was published before what the weights are of; somebody has changed them), UsageError (a
        published checkpoint with other tensors), CorruptError. Then the weights are what they were, unless writing them was
        interrupted: the next update first completes that.
        """
        start = time.perf_counter()
        self._complete()
        entry = self._await(step, timeout)
        if entry is None:
            return None
        for left in reversed(range(_AGAIN)):
            try:
                return self._follow(entry, deliver, start)
            except (CorruptError, BaseNotFoundError):
                # Swept while it was read: then there is something newer.
                newest = self.latest()
                if not left or step is not None or newest is None or newest.object == entry.object:
                    raise
                entry = newest
        raise AssertionError

    def verify(self) -> None:
        """Hash the weights where they are, on their device, and compare them with the content ids of their step.

        Raises ConflictError when somebody else has written to them.
        """
        self._complete()
        there = {name: Target(name, t.dtype, t.shape, t.read()) for name, t in self._targets.items()}
        found = self._hash(there)
        wrong = [name for name, content in self._contents.items() if found[name] != content]
        if wrong:
            raise self._changed(wrong)

    def close(self) -> None:
        """End an update that waits. The weights stay as they are."""
        self._closed.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- the beginning

    def _load(self, step: int | None) -> dict[str, Any]:
        entry = self.latest() if step is None else self._entry(step)
        if entry is None:
            raise UsageError("nothing is published here").at(path=self.backend.name)
        with Checkpoint(self.backend, entry) as checkpoint:
            raw = checkpoint.raw(checkpoint, self.threads)
            records = checkpoint.manifest.records
            self._targets = {k: Target(k, r.dtype, r.shape, raw[k]) for k, r in records.items()}
            self._contents = self._hash(self._targets)
            self._prove(records, self._contents)
            self._are(entry, checkpoint.manifest)
        return {k: numpy_array(r.dtype, r.shape, raw[k], "") for k, r in records.items()}

    def _entry(self, step: int) -> Entry:
        entry = Journal(self.backend).find(step)
        if entry is None or entry.kind != KIND:
            raise UsageError(f"there is no published checkpoint {step!r}").at(path=self.backend.name)
        return entry

    def _recognise(self, step: int | None) -> tuple[Entry, Manifest] | None:
        """Return the published checkpoint whose tensors the weights are, the newest of several."""
        entries = [self._entry(step)] if step is not None else (e for e in Journal(self.backend).entries() if e.kind == KIND)
        for entry in entries:
            held = Objects(self.backend)
            try:
                manifest = held.manifest(entry)
            finally:
                held.close()
            there = contents_of(manifest.records)
            if self._targets and all(there.get(name) == content for name, content in self._contents.items()):
                return entry, manifest
        return None

    def _are(self, entry: Entry, manifest: Manifest) -> None:
        """Note that the weights are those of a checkpoint."""
        self._seq = entry.seq
        self.step = entry.step
        self._state = state_id(contents_of(manifest.records))
        self._contents = {name: manifest.records[name].content for name in self._targets}

    def _hash(self, tensors: Mapping[str, Target]) -> dict[str, str]:
        held = [in_memory(t.name, t.dtype, t.shape, t.raw) for t in tensors.values()]
        with Workers(self.threads) as workers:
            return content_ids(held, workers)

    # ---- an update

    def _await(self, step: int | None, timeout: float | None) -> Entry | None:
        """Return the checkpoint to go to, None when there is nothing to do."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            journal = Journal(self.backend)
            entry = next((e for e in journal.entries() if e.kind == KIND), None)
            if step is not None:
                found = journal.find(step)
                entry = found if found is not None and found.kind == KIND else None
            if entry is not None and entry.seq < self._seq:
                raise ConflictError(
                    f"step {entry.step} was published before step {self.step}, which the weights are of"
                ).at(path=self.backend.name)
            if entry is not None and (entry.seq > self._seq or not self._state):
                return entry
            if entry is not None and step is not None:
                return None  # it is the one
            left = self.poll if end is None else min(self.poll, end - time.monotonic())
            if left <= 0 or self._closed.wait(left):
                return None

    def _follow(self, entry: Entry, deliver: Deliver | None, start: float) -> UpdateReport:
        objects = Objects(self.backend)
        try:
            manifest = objects.manifest(entry)
            self._check_tensors(entry, manifest)
            differ = [name for name in self._targets if self._contents.get(name) != manifest.records[name].content]
            links = self._links(objects, entry, manifest) if differ else []
        finally:
            objects.close()
        chained, read = self._chained(links, differ, manifest, entry)
        patches: list[Patch] = []
        full = [name for name in differ if name not in set(chained)]
        with _Archives(self.backend) as archives:
            for group in self._groups(chained):
                new = self._through(links, archives, group)
                if new is None:
                    full += group
                else:
                    patches += self._between(new)
        if full:
            read += _full_bytes(entry, manifest, full)
            with Checkpoint(self.backend, entry) as checkpoint:
                for group in self._groups(full):
                    raw = checkpoint.raw(group, self.threads)
                    self._prove(manifest.records, self._hash(self._as(raw)))
                    patches += self._between(raw)
        if deliver is not None:
            patches = self._delivered(patches, deliver)
        before = self.step if self._state else None
        self._waiting, self._then = patches, (entry, manifest)
        self._complete()
        return UpdateReport(
            entry.step, before, max(1, len(links)), read, len(patches), sum(p.elements for p in patches), len(full),
            time.perf_counter() - start,
        )  # fmt: skip

    def _delivered(self, patches: list[Patch], deliver: Deliver) -> list[Patch]:
        """Deliver patches. What a failed delivery had of a tensor is not known: the next one has all elements of it, for some
        may be by then what they are here.
        """
        new = {patch.name: patch for patch in patches}
        for name in self._uncertain:
            new[name] = everywhere(self._targets[name], new.get(name))
        self._uncertain |= {name for name, patch in new.items() if patch.elements}
        deliver(list(new.values()))
        self._uncertain = set()
        return list(new.values())

    def _complete(self) -> None:
        """Write the patches that wait: once more all of them, when this was interrupted."""
        if self._then is None:
            return
        self._state = ""
        for patch in self._waiting:
            self._contents.pop(patch.name, None)
            self._targets[patch.name].write(patch)
        self._are(*self._then)
        self._waiting, self._then = [], None

    def _check_tensors(self, entry: Entry, manifest: Manifest) -> None:
        for name, target in self._targets.items():
            record = manifest.records.get(name)
            if record is None or (record.dtype, record.shape) != (target.dtype, target.shape):
                told = "is not there" if record is None else f"is {record.dtype.name} {list(record.shape)}"
                raise UsageError(
                    f"in step {entry.step} the tensor {told}; the weights have {target.dtype.name} {list(target.shape)}"
                ).at(path=self.backend.name, tensor=name)

    def _links(self, objects: Objects, entry: Entry, manifest: Manifest) -> list[_Link]:
        """Return the checkpoints from the one behind the reader's to the newest, none when there is no unbroken way."""
        if not self._state:
            return []
        links: list[_Link] = []
        older = (e for e in Journal(self.backend).entries() if e.kind == KIND and e.seq < entry.seq)
        while True:
            delta = delta_of(manifest, entry, self.backend.object_name(entry.object))
            links.append(_Link(entry, manifest, delta))
            if delta is None:
                return []
            if delta.state == self._state:
                return links[::-1]
            before = next(older, None)
            if before is None or before.seq <= self._seq:
                return []
            entry, manifest = before, objects.manifest(before)
            if state_id(contents_of(manifest.records)) != delta.state:
                return []

    def _chained(
        self, links: Sequence[_Link], differ: Sequence[str], manifest: Manifest, entry: Entry
    ) -> tuple[list[str], int]:
        """Return which tensors to read as differences, and the bytes of these: all or none, whichever is less to read."""
        deltas = [link.delta for link in links if link.delta is not None]
        size = sum(delta.bytes for delta in deltas)
        if not deltas or size >= _full_bytes(entry, manifest, differ):
            return [], 0
        if len(self._targets) == len(manifest.records):
            return list(differ), size
        # Small tensors share chunks with others, which the reader may not have.
        return [name for name in differ if _large(manifest.records[name])], size

    def _groups(self, names: Iterable[str]) -> list[list[str]]:
        """Return names in groups that are decoded at once: large tensors one by one, small ones together."""
        small: list[str] = []
        groups: list[list[str]] = []
        for name in names:
            target = self._targets[name]
            if target.raw.size >= OWN_RUN * target.dtype.width:
                groups.append([name])
            else:
                small.append(name)
        return [*groups, small] if small else groups

    def _through(self, links: Sequence[_Link], archives: "_Archives", group: Sequence[str]) -> dict[str, U8] | None:
        """Return the bytes of tensors after all these steps; None when a difference cannot be read, and they are to be read in
        full. Raises ConflictError when the weights are not what they were.
        """
        try:
            # Chunks of small tensors may hold more of them than these.
            now = {name: target.raw for name, target in self._targets.items()}
            contents = dict(self._contents)
            for link in links:
                records = {name: link.manifest.records[name] for name in now if name in link.manifest.records}
                moved = [n for n in self._with(group) if n in records and records[n].content != contents.get(n)]
                now.update(self._step(link, archives, moved, now))
                contents.update({n: records[n].content for n in moved})
            new = {name: now[name] for name in group}
            self._prove(links[-1].manifest.records, self._hash(self._as(new)))
        except TzipError:
            found = self._hash({name: self._targets[name] for name in self._with(group)})
            wrong = [name for name, content in found.items() if content != self._contents[name]]
            if wrong:
                raise self._changed(wrong) from None
            return None
        return new

    def _with(self, group: Sequence[str]) -> Sequence[str]:
        """Return a group with what shares its chunks: with small tensors all of them go through all steps."""
        if len(group) == 1 and _is_large(self._targets[group[0]]):
            return group
        return [name for name, target in self._targets.items() if not _is_large(target)]

    def _step(self, link: _Link, archives: "_Archives", names: Sequence[str], now: dict[str, U8]) -> dict[str, U8]:
        """Decode the tensors of one step from those of the step before."""
        if not names:
            return {}
        assert link.delta is not None
        archive = archives.leaning(link.delta.object, now, self._targets)
        out: dict[str, U8] = {}
        reads = []
        for name in names:
            view = archive.tensor(name)
            target = self._targets[name]
            if (view.element_type, view.shape) != (target.dtype, target.shape):
                raise CorruptError("the object holds another tensor than the manifest says").at(
                    path=archive.reader.source.name, tensor=name
                )
            out[name] = np.empty(target.raw.size, np.uint8)
            if out[name].size:
                reads.append((view.row, 0, out[name]))
        if reads:
            archive.read_into(reads, self.threads)
        return out

    def _between(self, new: Mapping[str, U8]) -> list[Patch]:
        return [
            between(name, self._targets[name].dtype, self._targets[name].shape, self._targets[name].raw, raw)
            for name, raw in new.items()
        ]

    def _as(self, raw: Mapping[str, U8]) -> dict[str, Target]:
        """Return bytes as tensors like those of the weights."""
        return {n: Target(n, self._targets[n].dtype, self._targets[n].shape, b) for n, b in raw.items()}

    @staticmethod
    def _prove(records: Mapping[str, Record], found: Mapping[str, str]) -> None:
        for name, content in found.items():
            if records[name].content != content:
                raise CorruptError("the tensor is not the one of its content id").at(tensor=name)

    def _changed(self, names: Sequence[str]) -> ConflictError:
        more = f" and {len(names) - 1} others" if len(names) > 1 else ""
        return ConflictError(
            f"the weights are not those of step {self.step} any more: somebody has changed {names[0]!r}{more}"
        ).at(path=self.backend.name, tensor=names[0])


class _Archives:
    """The objects with the differences, opened once each, which lean on tensors in memory."""

    def __init__(self, backend: Backend) -> None:
        self._objects = Objects(backend)
        self._leaning: dict[str, _Before] = {}

    def leaning(self, archive_id: str, now: dict[str, U8], like: Mapping[str, Target]) -> Archive:
        """Return an object whose differences are from the tensors `now`; they are of the types that `like` has."""
        archive = self._objects(archive_id)
        before = self._leaning.get(archive_id)
        if before is None or not before.of(archive):
            before = self._leaning[archive_id] = _Before(archive, like)
        before.file.now = now
        return archive

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._objects.close()


class _Before(Bases):
    """The tensors that the differences of an archive are from, whatever archive they were in: in memory."""

    def __init__(self, archive: Archive, like: Mapping[str, Target]) -> None:
        super().__init__(None, opener(None))
        self._archive = archive
        self.file = _BeforeFile()
        self._bases = {n: Base(self.file, n, t.dtype, t.shape, t.raw.size) for n, t in like.items()}
        archive.lean_on(self)

    def of(self, archive: Archive) -> bool:
        """Say whether it is that archive that leans on these."""
        return self._archive is archive

    def find(self, wanted: Origin, tensor: str, begin: int = NOT_KNOWN, length: int = 0) -> Base:
        if tensor not in self._bases:
            raise BaseNotFoundError("a difference from a tensor that the weights do not have").at(tensor=tensor)
        return self._bases[tensor]


class _BeforeFile(BaseFile):
    def __init__(self) -> None:
        super().__init__("", "")
        self.now: Mapping[str, U8] = {}

    def read_into(self, base: Base, begin: int, out: U8) -> None:
        out[:] = self.now[base.name][begin : begin + out.size]


def _large(record: Record) -> bool:
    return record.nbytes >= OWN_RUN * record.dtype.width


def _is_large(target: Target) -> bool:
    return target.raw.size >= OWN_RUN * target.dtype.width


def _full_bytes(entry: Entry, manifest: Manifest, names: Iterable[str]) -> int:
    """Return about the bytes that are read for tensors in full: the objects that they are in, and all that these lean on."""
    wanted = needed([manifest.records[name] for name in names], manifest.objects, entry.object)
    return sum(info.size or entry.stored for info in wanted.values())
