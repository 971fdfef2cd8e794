"""Keeping a store: proving it, forgetting checkpoints, freeing space, saving what can be saved.

What a kept checkpoint needs is never removed: new objects are durable before the head names them, the head changes in one
step, and only what no head has named for a while is deleted, while nobody can commit.
"""

import contextlib
import errno
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from tzip.coders.errors import BaseNotFoundError, ConflictError, CorruptError, TzipError, UnsupportedError, UsageError
from tzip.plan import LEVELS
from tzip.repacking import member_items
from tzip.store.backends import Backend, StaleHeadError
from tzip.store.checkpoints import Objects
from tzip.store.foldered import write_files
from tzip.store.journal import Entry, Head, Journal
from tzip.store.manifest import MANIFEST, THIS, Manifest, ObjectInfo, Record, depths, named, needed
from tzip.store.objects import content_ids, in_object, write_object
from tzip.verifying import verify as verify_archive
from tzip.workers import Workers

LONGEST_CHAIN = 60  # an archive leans on at most 63 others (FORMAT.md, section 2.8)
MAX_CHAIN = 16  # the default: docs/BENCHMARKS.md, "The store", shows sizes and times of others
_TRIES = 50
_IN_FLIGHT = 86400.0  # seconds that no save takes
_CONDEMNED = 3600.0  # seconds for which the head says what was removed
_REMOVING = 600.0  # and those for which removing may take: who slept longer does not go on
_MOSTLY_DEAD = 2  # an object is packed anew when less than 1 / 2 of it is needed


@dataclass(frozen=True, slots=True)
class Fault:
    """Damage: where, what, and the steps of the checkpoints that it takes."""

    path: str
    message: str
    steps: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was proven, and what was found damaged."""

    checkpoints: int
    objects: int
    bytes: int
    deep: bool
    faults: list[Fault] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Policy:
    """Which checkpoints are kept; see `Store.prune`."""

    last: int | None = None
    every: int | None = None
    best: int | None = None
    metric: str | None = None
    mode: str = "min"
    tagged: bool = True


@dataclass(frozen=True, slots=True)
class PruneReport:
    """Steps that were kept and removed, and those of the kept ones whose objects were packed anew; bytes written for that."""

    kept: list[int]
    removed: list[int]
    rewritten: list[int] = field(default_factory=list)
    stored: int = 0


@dataclass(frozen=True, slots=True)
class GcReport:
    """Objects removed and their bytes; those that wait for their grace period or a writer's end; partial files removed."""

    removed: int
    freed: int
    waiting: int
    partials: int


@dataclass(frozen=True, slots=True)
class RepairReport:
    """Steps that are whole, steps that are lost and why, and whether the head was made anew. When it was, `unreadable` has
    the objects that may have been checkpoints, and why they cannot be read.
    """

    kept: list[int]
    lost: dict[int, str]
    rebuilt: bool
    unreadable: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Difference:
    """What became of a tensor between two checkpoints: "same", "changed", "added" or "removed"; bytes of the tensor."""

    key: str
    what: str
    nbytes: int


def best(entries: Iterable[Entry], metric: str | None, mode: str) -> Entry | None:
    """Return the checkpoint with the smallest ("min") or largest value of a metric; with one metric only it needs no name."""
    ranked = _ranked(entries, metric, mode)
    if not ranked:
        raise UsageError(f"no checkpoint has the metric {metric!r}" if metric else "no checkpoint has a metric")
    return ranked[0]


def _ranked(entries: Iterable[Entry], metric: str | None, mode: str) -> list[Entry]:
    if mode not in ("min", "max"):
        raise UsageError(f'mode is "min" or "max", not {mode!r}')
    found = [e for e in entries if e.metrics]
    if metric is None:
        names = {name for e in found for name in e.metrics}
        if len(names) > 1:
            raise UsageError(f"say which metric: {', '.join(sorted(names))}")
        metric = next(iter(names), "")
    sign = 1 if mode == "min" else -1
    usable = [e for e in found if metric in e.metrics and not math.isnan(e.metrics[metric])]
    return sorted(usable, key=lambda e: (sign * e.metrics[metric], -e.seq))


def update(backend: Backend, change: Callable[[Journal], Head]) -> None:
    """Replace the head by what `change` makes of it, again when another process was faster."""
    for _ in range(_TRIES):
        journal = Journal(backend)
        try:
            journal.commit(change(journal))
        except StaleHeadError:
            continue
        return
    raise ConflictError(f"the head of the store changed {_TRIES} times meanwhile").at(path=backend.name)


def compare(backend: Backend, a: Entry, b: Entry) -> list[Difference]:
    """Compare two checkpoints by the content ids of their tensors. Raises UsageError for files, which have none."""
    held = Objects(backend)
    try:
        before, after = held.manifest(a), held.manifest(b)
    finally:
        held.close()
    if "files" in (before.kind, after.kind):
        raise UsageError("checkpoints of files are compared with tzip diff")
    out = []
    for key in dict.fromkeys((*before.records, *after.records)):
        old, new = before.records.get(key), after.records.get(key)
        if old is None or new is None:
            found = new or old
            assert found is not None
            out.append(Difference(key, "added" if old is None else "removed", found.nbytes))
        else:
            out.append(Difference(key, "same" if old.content == new.content else "changed", new.nbytes))
    return out


# ---------------------------------------------------------------- verify


_DISK = (errno.EIO, errno.EISDIR, errno.ELOOP, errno.ENOTDIR)  # errors of the system that are damage, when they come again


class _Checker:
    """Proves objects once each, whatever number of checkpoints needs them.

    What the system refuses (too many open files, no permission) is raised: it is no damage, and `repair` must not forget
    a checkpoint for it.
    """

    def __init__(self, backend: Backend, deep: bool, threads: int, progress: Callable[[int], None] | None) -> None:
        self.backend = backend
        self.objects = Objects(backend)
        self.deep = deep
        self.threads = threads
        self.progress = progress
        self.bad: dict[str, str] = {}
        self.newer: set[str] = set()  # of the bad ones those that a newer tzip has made
        self.good: set[str] = set()
        self.bytes = 0
        self._contents: set[tuple[str, str, str]] = set()
        self._decoded: set[str] = set()

    def object(self, archive_id: str) -> None:
        """Prove the stored bytes of an object."""
        if archive_id not in self.good and archive_id not in self.bad:

            def work() -> None:
                self.objects(archive_id)
                with self.backend.whole(archive_id) as path:
                    report = verify_archive(path, threads=self.threads, progress=self.progress)
                self.bytes += report.bytes
                self.good.add(archive_id)

            self.attempt(archive_id, work)

    def attempt(self, archive_id: str, work: Callable[[], None]) -> None:
        """Do what proves an object, which is bad when that fails; once more after an error that may pass."""
        for again in (False, True):
            try:
                work()
            except (TzipError, OSError) as e:
                if isinstance(e, OSError) and e.errno not in _DISK:
                    raise
                if not again and isinstance(e, OSError | BaseNotFoundError):
                    self.objects.close()  # an archive that could not open its base does not try again
                    continue
                self.bad.setdefault(archive_id, str(e))
                if isinstance(e, UnsupportedError):
                    self.newer.add(archive_id)
            return

    def manifest(self, entry: Entry) -> Manifest | None:
        """Return the manifest of a checkpoint; None, and the object bad, when it cannot be read."""
        found: list[Manifest] = []
        self.attempt(entry.object, lambda: found.append(self.objects.manifest(entry)))
        return found[0] if found else None

    def contents(self, manifest: Manifest) -> None:
        """Decode tensors and compare them with their content ids; objects that give others are bad.

        What leans on a bad object is left out: it is lost with that one, and may be sound itself.
        """
        sound: dict[str, bool] = {}

        def stands(archive_id: str) -> bool:
            if archive_id not in sound:
                sound[archive_id] = not any(i in self.bad for i in needed([], manifest.objects, archive_id))
            return sound[archive_id]

        with Workers(self.threads) as workers:
            for record in manifest.records.values():
                place = (record.object, record.name, record.content)
                if place in self._contents or record.object in self.bad or not stands(record.object):
                    continue
                self._contents.add(place)
                self.attempt(record.object, partial(self._decode, record, workers))
        if manifest.kind == "files":
            for archive_id in manifest.objects:
                if archive_id not in self.bad and archive_id not in self._decoded and stands(archive_id):
                    self._decoded.add(archive_id)
                    self.attempt(archive_id, partial(self._decode_all, archive_id))

    def _decode_all(self, archive_id: str) -> None:
        verify_archive(self.backend.archive(archive_id), deep=True, threads=self.threads, base=self.backend.library)

    def _decode(self, record: Record, workers: Workers) -> None:
        if content_ids([in_object(record, self.objects)], workers)[record.key] != record.content:
            raise CorruptError(f"tensor {record.name!r} is not the one of its content id")

    def close(self) -> None:
        self.objects.close()


def verify(
    backend: Backend, *, deep: bool, threads: int, progress: Callable[[int], None] | None = None
) -> VerifyReport:
    """Prove a store; see `Store.verify`."""
    checker = _Checker(backend, deep, threads, progress)
    steps: dict[str, list[int]] = {}
    count = 0
    faults: list[Fault] = []
    try:
        try:
            for entry in Journal(backend).entries():
                count += 1
                for archive_id in _check(checker, entry):
                    steps.setdefault(archive_id, []).append(entry.step)
        except TzipError as e:  # the head or a page: what it named is not known any more
            faults.append(Fault(e.path or backend.name, e.message, ()))
        faults += [
            Fault(backend.object_name(i), message, tuple(sorted(steps.get(i, ())))) for i, message in checker.bad.items()
        ]
        return VerifyReport(count, len(checker.good | set(checker.bad)), checker.bytes, deep, faults)
    finally:
        checker.close()


def _check(checker: _Checker, entry: Entry) -> list[str]:
    """Return the damaged objects among those that a checkpoint needs."""
    manifest = checker.manifest(entry)
    if manifest is None:
        return [entry.object]
    for archive_id in manifest.objects:
        checker.object(archive_id)
    if checker.deep:
        checker.contents(manifest)
    return [archive_id for archive_id in manifest.objects if archive_id in checker.bad]


# ---------------------------------------------------------------- prune


def prune(
    backend: Backend,
    policy: Policy,
    *,
    level: str,
    max_chain: int,
    threads: int,
    writer: str,
    dry_run: bool,
) -> PruneReport:
    """Forget checkpoints; see `Store.prune`."""
    with backend.writing():
        for _ in range(_TRIES):
            journal = Journal(backend)
            entries = sorted(journal.entries(), key=lambda e: e.seq)
            kept = _kept(entries, journal.head.tags, policy)
            removed = [e.step for e in entries if e.step not in kept]
            staying = [e for e in entries if e.step in kept]
            if dry_run or not removed:
                return PruneReport([e.step for e in staying], removed)
            rebased = _Rebase(backend, journal, staying, level, max_chain, threads)
            try:
                new, needs = rebased.run()
            finally:
                rebased.close()
            report = PruneReport([e.step for e in staying], removed, rebased.rewritten, rebased.stored)
            if _forget(journal, entries, staying, new, needs, policy):
                return report
    raise ConflictError(f"the head of the store changed {_TRIES} times meanwhile").at(path=backend.name)


def _forget(
    journal: Journal, entries: list[Entry], staying: list[Entry], new: list[Entry], needs: set[str], policy: Policy
) -> bool:
    """Make `new` the entries of the store, and those that were added meanwhile: packing anew may take longer than a trainer
    takes between two saves. False when any of the old ones was changed, or a tag holds one that was to go: begin again.
    """
    seen = {e.object for e in entries}
    steps = {e.step for e in staying}
    for _ in range(_TRIES):
        now = sorted(journal.entries(), key=lambda e: e.seq)
        added = [e for e in now if e.object not in seen]
        wanted = _kept(now, journal.head.tags, policy) - {e.step for e in added}
        if len(now) != len(entries) + len(added) or not wanted <= steps or steps & {e.step for e in added}:
            return False
        try:
            journal.commit(journal.with_entries([*new, *added]), needs)
        except StaleHeadError:
            journal = Journal(journal.backend)
            continue
        return True
    return False


def _kept(entries: list[Entry], tags: Mapping[str, int], policy: Policy) -> set[int]:
    """Return the steps that stay: of published checkpoints all, for those who publish say how many are kept."""
    published = {e.step for e in entries if e.kind == "published"}
    return published | _chosen([e for e in entries if e.kind != "published"], tags, policy)


def _chosen(entries: list[Entry], tags: Mapping[str, int], policy: Policy) -> set[int]:
    for name, value in (("keep_last", policy.last), ("keep_every", policy.every), ("keep_best", policy.best)):
        if value is not None and value < 1:
            raise UsageError(f"{name} must be 1 or more, not {value}")
    kept: set[int] = set()
    if policy.last is not None:
        kept |= {e.step for e in entries[-policy.last :]}
    if policy.every is not None:
        kept |= {e.step for e in entries if e.step % policy.every == 0}
    if policy.best is not None:
        kept |= {e.step for e in _ranked(entries, policy.metric, policy.mode)[: policy.best]}
    if policy.tagged:
        kept |= set(tags.values())
    if policy.last is None and policy.every is None and policy.best is None:
        raise UsageError("say what to keep: keep_last, keep_every or keep_best")
    if entries and not kept & {e.step for e in entries}:
        raise UsageError("nothing would be kept")
    return kept


class _Rebase:
    """Packs anew what leans on objects that only forgotten checkpoints need, or that are mostly dead."""

    def __init__(
        self, backend: Backend, journal: Journal, staying: list[Entry], level: str, max_chain: int, threads: int
    ) -> None:
        self.backend = backend
        self.journal = journal
        self.staying = staying
        self.level = level
        self.max_chain = max_chain
        self.threads = threads
        self.objects = Objects(backend)
        self.rewritten: list[int] = []
        self.stored = 0

    def run(self) -> tuple[list[Entry], set[str]]:
        """Return the entries to be, and the objects that they need."""
        manifests = [self.objects.manifest(entry) for entry in self.staying]
        # Published ones stay as they are: who follows them reads each difference from the one before.
        plain = [(e, m) for e, m in zip(self.staying, manifests, strict=True) if m.kind != "published"]
        bad = _unwanted([e for e, _ in plain], [m for _, m in plain])
        new: list[Entry] = []
        needs: set[str] = set()
        earlier: tuple[dict[str, Record], dict[str, ObjectInfo]] = ({}, {})
        files: Entry | None = None
        for entry, manifest in zip(self.staying, manifests, strict=True):
            if manifest.kind == "published":
                new.append(entry)
                needs |= set(manifest.objects)
                continue
            if not bad & set(manifest.objects):
                new.append(entry)
                records, objects = dict(manifest.records), dict(manifest.objects)
            elif manifest.kind == "files":
                entry, objects = self._files(entry, files)
                new.append(entry)
                records = {}
            else:
                entry, records, objects = self._state(entry, manifest, bad, earlier)
                new.append(entry)
            if manifest.kind == "files":
                files = entry
            else:
                earlier = records, objects
            needs |= set(objects)
        return new, needs

    def _files(self, entry: Entry, base: Entry | None) -> tuple[Entry, dict[str, ObjectInfo]]:
        archive = self.objects(entry.object)
        items = [item for item in member_items(archive) if item.name != MANIFEST]
        # Without one that stays it stands by itself: a chain of no length is always too long for a base.
        longest = self.max_chain if base is not None else 0
        made, objects = write_files(
            self.backend, self.journal, entry, items, level=self.level, max_chain=longest, threads=self.threads, base=base
        )
        self.rewritten.append(entry.step)
        self.stored += made.stored
        return made, objects

    def _state(
        self, entry: Entry, manifest: Manifest, bad: set[str], earlier: tuple[dict[str, Record], dict[str, ObjectInfo]]
    ) -> tuple[Entry, dict[str, Record], dict[str, ObjectInfo]]:
        before, below = earlier
        kept: dict[str, Record] = {}
        moved: list[Record] = []
        for key, record in manifest.records.items():
            same = before.get(key)
            if same is not None and (same.content, same.dtype, same.shape) == (record.content, record.dtype, record.shape):
                kept[key] = same
            elif bad & set(needed([record], manifest.objects, record.object)):
                moved.append(record)
            else:
                kept[key] = record
        tensors = [in_object(record, self.objects) for record in moved]
        with Workers(self.threads) as workers:
            contents = content_ids(tensors, workers)
        for record in moved:
            if contents[record.key] != record.content:
                raise CorruptError("a tensor is not the one of its content id; repair the store first").at(
                    path=self.backend.object_name(record.object), tensor=record.name
                )
        known = {**manifest.objects, **below}
        deep = depths(below)
        bases = [
            (r, in_object(r, self.objects))
            for k, r in before.items()
            if k not in kept and deep[r.object] + 2 <= self.max_chain
        ]
        made: dict[str, Any] = {}

        def describe(own: Mapping[str, Record], info: ObjectInfo) -> bytes:
            made["records"] = {key: kept[key] if key in kept else own[key] for key in manifest.records}
            made["objects"] = needed(made["records"].values(), {**known, THIS: info}, THIS)
            return replace(manifest, records=made["records"], objects=made["objects"]).write()

        written = write_object(
            self.backend, tensors, contents, bases, describe, level=self.level, threads=self.threads
        )
        records, objects = named(written.archive_id, written.info, made["records"], made["objects"])
        self.rewritten.append(entry.step)
        self.stored += written.info.size
        return replace(entry, object=written.archive_id, stored=written.info.size), records, objects

    def close(self) -> None:
        self.objects.close()


def _unwanted(staying: Iterable[Entry], manifests: Iterable[Manifest]) -> set[str]:
    """Return the objects that are needed only because others lean on them, or of which most is dead."""
    infos: dict[str, ObjectInfo] = {}
    live: dict[str, dict[str, int]] = {}
    own: set[str] = set()
    for entry, manifest in zip(staying, manifests, strict=True):
        infos.update(manifest.objects)
        own.add(entry.object)
        if manifest.kind == "files":
            live.setdefault(entry.object, {})[""] = infos[entry.object].raw
        for record in manifest.records.values():
            live.setdefault(record.object, {})[record.name] = record.nbytes
    return {
        archive_id
        for archive_id, info in infos.items()
        if (archive_id not in own and archive_id not in live)
        or sum(live.get(archive_id, {}).values()) * _MOSTLY_DEAD < info.raw
    }


# ---------------------------------------------------------------- gc


def gc(backend: Backend, *, grace: float) -> GcReport:
    """Remove what no checkpoint needs; see `Store.gc`."""
    if not grace >= 0:
        raise UsageError(f"grace is a number of seconds, not {grace}")
    for _ in range(_TRIES):
        with contextlib.suppress(StaleHeadError):
            return _gc(backend, grace) if backend.locks else _gc_without_locks(backend, grace)
    raise ConflictError(f"the head of the store changed {_TRIES} times meanwhile").at(path=backend.name)


def _gc(backend: Backend, grace: float) -> GcReport:
    journal = Journal(backend)
    wanted = reachable(backend, journal.entries())  # takes long: writers do not wait for it
    with backend.alone() as alone, backend.committing():
        # The list is older than this look at the head: what is in it and not wanted was not committed in between.
        present = backend.object_ids()
        if backend.read_head() != journal.raw:
            raise StaleHeadError
        now = max(0, time.time_ns())  # a negative time has no form in the head
        known = journal.head.retired
        # A time to come is a clock that was set back: it starts to count now.
        retired = {i: min(known.get(i, now), now) for i in present if i not in wanted}
        # While anybody writes, what is not needed may be what is being written.
        wait = grace if alone else max(grace, _IN_FLIGHT)
        due = {i for i, since in retired.items() if now - since >= wait * 1e9}
        partials = backend.sweep_partials() if alone else 0
        backend.sync()  # the head first: were it lost with the power, the one before it would need what goes now
        freed = 0
        for archive_id in due:
            freed += backend.object_size(archive_id) or 0
            backend.delete_object(archive_id)
        pages = journal.page_names() if alone else set()
        for name in backend.page_names() if alone else ():
            if name not in pages:
                backend.delete_page(name)
        backend.sync()
        left = {i: since for i, since in retired.items() if i not in due}
        if left != dict(known):
            head = replace(journal.head, generation=journal.head.generation + 1, retired=left)
            backend.put_head(head.write(), journal.raw)
    return GcReport(len(due), freed, len(left), partials)


def _gc_without_locks(backend: Backend, grace: float) -> GcReport:
    """Remove what the head has said will go. A writer who does not know yet has read an older head, which it cannot replace."""
    journal = Journal(backend)
    named = reachable(backend, journal.entries()) | journal.page_names()
    objects = set(backend.object_ids()) - named
    present = objects | (set(backend.page_names()) - named)
    now, start = max(0, time.time_ns()), time.monotonic()
    known, condemned = journal.head.retired, journal.head.condemned
    retired = {i: min(known.get(i, now), now) for i in present - condemned.keys()}
    due = {i for i, since in retired.items() if now - since >= grace * 1e9} | (present & condemned.keys())
    left = {i: since for i, since in retired.items() if i not in due}
    gone = {i: since for i, since in condemned.items() if abs(now - since) < _CONDEMNED * 1e9} | dict.fromkeys(due, now)
    if (left, gone) != (dict(known), dict(condemned)):
        head = replace(journal.head, generation=journal.head.generation + 1, retired=left, condemned=gone)
        backend.swap_head(head.write(), journal.raw)
    partials = backend.sweep_partials(grace)
    freed = removed = 0
    for i in sorted(due):
        if time.monotonic() - start > _REMOVING:
            break
        if i in objects:
            freed += backend.object_size(i) or 0
            backend.delete_object(i)
            removed += 1
        else:
            backend.delete_page(i)
    return GcReport(removed, freed, len(objects & (left.keys() | due)) - removed, partials)


def reachable(backend: Backend, entries: Iterable[Entry]) -> set[str]:
    """Return every object that these checkpoints need. Raises CorruptError when a manifest cannot be read: nothing may be
    swept then.
    """
    found: set[str] = set()
    for entry in entries:
        held = Objects(backend)
        try:
            found |= set(held.manifest(entry).objects)
        finally:
            held.close()
    return found


# ---------------------------------------------------------------- repair


def repair(backend: Backend, *, deep: bool, threads: int) -> RepairReport:
    """Keep the checkpoints that are whole; see `Store.repair`."""
    checker = _Checker(backend, deep, threads, None)
    with backend.writing(), contextlib.closing(checker):
        rebuilt = False
        known: list[Entry] = []
        head = Head(config=_config(backend.read_head()))
        try:
            journal = Journal(backend)
            head, known = journal.head, journal.readable()
            entries = sorted(journal.entries(), key=lambda e: e.seq)
        except CorruptError:
            rebuilt = True
            entries = _found(backend, checker, known)
            generation = max([head.generation, *(e.seq for e in entries)])
            journal = Journal(backend, instead=replace(head, generation=generation, pages=(), recent=()))
        unreadable = dict(checker.bad)
        whole: list[Entry] = []
        lost: dict[int, str] = {}
        for entry in entries:
            bad = _check(checker, entry)
            if set(bad) <= checker.newer:  # what a newer tzip has made is not damaged
                whole.append(entry)
            else:
                lost[entry.step] = next(checker.bad[i] for i in bad if i not in checker.newer)
        if rebuilt:  # of several of a step, forgotten ones among them, the newest counts
            newest = {e.step: e for e in whole}
            whole = [e for e in whole if newest[e.step] is e]
            lost = {step: why for step, why in lost.items() if step not in newest}
        if rebuilt or lost:
            journal.commit(journal.with_entries(whole))
    return RepairReport([e.step for e in whole], lost, rebuilt, unreadable)


def _found(backend: Backend, checker: _Checker, known: list[Entry]) -> list[Entry]:
    """Return the entries that are known, and one for each object that holds a manifest of another step, in the order in which
    they were written. Objects that cannot be read are bad.
    """
    found: list[Entry] = []
    steps = {e.step for e in known}

    def look(archive_id: str) -> None:
        archive = checker.objects(archive_id)
        if MANIFEST not in archive.reader.index.member_names:
            return
        m = Manifest.read(archive.member_bytes(MANIFEST), archive.reader.source.name, archive_id)
        if m.step in steps:
            return
        size = archive.reader.footer.archive_length
        raw = m.raw if m.kind != "files" else m.objects[archive_id].raw
        found.append(Entry(m.step, archive_id, m.time_ns, m.kind, m.writer, m.note, m.metrics, raw, size, m.seq))

    for archive_id in backend.object_ids():
        checker.attempt(archive_id, partial(look, archive_id))
    found = sorted([*known, *found], key=lambda e: (e.seq, e.time_ns, e.step, e.object))
    seq = 0
    for i, entry in enumerate(found):
        seq = max(seq + 1, entry.seq)
        found[i] = replace(entry, seq=seq)
    return found


def _config(raw: bytes | None) -> dict[str, Any]:
    """Return the configuration of a head whose sum is wrong, as far as it can be read; else the defaults."""
    import json

    found: dict[str, Any] = {}
    with contextlib.suppress(ValueError, KeyError, TypeError):
        found = dict(json.loads(raw or b"")["config"])
    level, longest = found.get("level"), found.get("max_chain")
    return {
        "level": level if level in LEVELS else "default",
        "max_chain": longest if type(longest) is int and 1 <= longest <= LONGEST_CHAIN else MAX_CHAIN,
    }
