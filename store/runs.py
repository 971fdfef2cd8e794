"""The store of a training run: saving, loading, and the list of what there is.

Order of a save: tensors and manifest in one object, made durable; then the head that names it, in one step. A process that
dies leaves at most an object that nothing names, which `gc` removes.
"""

import os
import platform
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from tzip.coders.arrays import U8
from tzip.coders.errors import ConflictError, TzipError, UsageError
from tzip.coders.sums import same_bytes
from tzip.plan import level_named
from tzip.store import publishing, upkeep
from tzip.store.backends import Backend, StaleHeadError, open_backend
from tzip.store.checkpoints import Checkpoint
from tzip.store.journal import MAX_STEP, Entry, Head, Journal
from tzip.store.manifest import THIS, Manifest, ObjectInfo, Record, depths, named, needed
from tzip.store.objects import Held, content_ids, in_memory, write_object
from tzip.store.states import Leaf, flatten
from tzip.workers import Workers, thread_count

_TRIES = 50  # heads that others may have replaced while this one tried: tags and sweeps, never another writer's checkpoint

_SWEEP_AFTER = 16  # published checkpoints that were forgotten: a sweep reads the manifests of all others
_PUBLISHED_GRACE = 600.0  # seconds for which a reader may be reading what was just forgotten

if TYPE_CHECKING:
    from tzip.store.serving import ServedFolder
    from tzip.store.subscribing import Subscription


@dataclass(frozen=True, slots=True)
class SaveReport:
    """What a save did: bytes of the state, bytes written, tensors in all, as differences, and referred to; seconds."""

    step: int
    raw: int
    stored: int
    tensors: int
    deltas: int
    unchanged: int
    seconds: float


@dataclass(slots=True)
class Stats:
    """What a store object has done since it was opened; `stalled` counts the seconds that callers of `save` waited."""

    saves: int = 0
    raw: int = 0
    stored: int = 0
    seconds: float = 0.0
    stalled: float = 0.0
    queued: int = 0

    @property
    def ratio(self) -> float:
        """Bytes written for each byte of state."""
        return self.stored / self.raw if self.raw else 0.0


@dataclass(slots=True)
class _Base:
    """The state that was saved last: where its tensors are, and their bytes."""

    entry: Entry
    records: Mapping[str, Record]
    objects: Mapping[str, ObjectInfo]
    raw: dict[str, U8]


class Store:
    """The checkpoints of one training run in the folder or at the URL `path` (s3://, gs://, memory://), which is made when it
    is not there.

    `level`: as for `tzip.pack`. `max_chain`: how many archives, at most, a tensor is read through; more save space, fewer save
    time when restoring. Both are kept in the store when it is made; later they may be overridden. `threads`: those that
    compress; None: one for each CPU. `storage_options`: what fsspec's file system of the URL takes; credentials and the address
    of the service come from the environment otherwise.

    Thread-safe. Any number of readers, in any process, may read beside one writer. A second writer of the same run gets a
    ConflictError. Close it, or use it in a `with` statement: that waits for a save in the background.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        level: str | None = None,
        max_chain: int | None = None,
        threads: int | None = None,
        create: bool = True,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.backend: Backend = open_backend(path, storage_options)
        self.threads = thread_count(threads)
        if level is not None:
            level_named(level)
        if max_chain is not None and not 1 <= max_chain <= upkeep.LONGEST_CHAIN:
            raise UsageError(f"max_chain must be from 1 to {upkeep.LONGEST_CHAIN}, not {max_chain}")
        if not self.backend.exists():
            if not create:
                raise UsageError("there is no store here").at(path=self.backend.name)
            made = {"level": level or "default", "max_chain": max_chain or upkeep.MAX_CHAIN}
            self.backend.make(Head(config=made).write())
        config = self.journal().head.config
        self.level = level or level_named(config["level"]).name
        self.max_chain = max_chain or min(config["max_chain"], upkeep.LONGEST_CHAIN)
        self._writer = f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._bases: dict[str, _Base] = {}  # by the kind of the checkpoint
        self._spare: dict[str, dict[str, U8]] = {}
        self._dropped = 0  # published checkpoints, since the last sweep
        self._known: int | None = None  # `seq` of the checkpoint that our next one follows
        self._pool: ThreadPoolExecutor | None = None
        self._running: Future[SaveReport] | None = None
        self._lock = threading.RLock()
        self._stats = Stats()

    # ---- what there is

    def journal(self) -> Journal:
        """Read the list of checkpoints as it is now."""
        return Journal(self.backend)

    def log(self) -> Iterator[Entry]:
        """Yield the checkpoints, the newest first."""
        return self.journal().entries()

    def tags(self) -> dict[str, int]:
        """Return the tags and the steps that they name."""
        return dict(self.journal().head.tags)

    def find(self, step: int | str = "latest", *, metric: str | None = None, mode: str = "min") -> Entry:
        """Return the entry of a step, of "latest" (saved last), of "best" (by `metric`) or of a tag. Raises UsageError."""
        if isinstance(step, bool) or not isinstance(step, int | np.integer | str):
            raise UsageError(f'a checkpoint is named by its step, a tag, "latest" or "best", not by {step!r}')
        journal = self.journal()
        found: Entry | None
        if step == "latest":
            found = journal.latest()
        elif step == "best":
            found = upkeep.best(journal.entries(), metric, mode)
        elif isinstance(step, str) and step in journal.head.tags:
            found = journal.find(journal.head.tags[step])
        elif isinstance(step, str) and not step.isdecimal():
            raise UsageError(f"there is no tag {step!r}").at(path=self.backend.name)
        else:
            found = journal.find(int(step))
        if found is None:
            raise UsageError(f"there is no checkpoint {step!r}").at(path=self.backend.name)
        return found

    def open(self, step: int | str = "latest", *, metric: str | None = None, mode: str = "min") -> Checkpoint:
        """Return a checkpoint to read from lazily: tensors, and rows of tensors."""
        return Checkpoint(self.backend, self.find(step, metric=metric, mode=mode))

    def load(
        self,
        step: int | str = "latest",
        keys: Iterable[str] | str | None = None,
        *,
        framework: str | None = None,
        device: Any = None,
        allow_pickle: bool = False,
        metric: str | None = None,
        mode: str = "min",
    ) -> Any:
        """Return a state as it was saved.

        `step`: as for `find`. `keys`: patterns of tensor names (`model.*`); only those tensors are read, numbers and strings
        are all there. `framework`: "np" or "pt" for all tensors, None as each was saved. `device`: torch's, for its tensors.
        Values that only pickle could hold come back as `Pickled`, unless `allow_pickle`. Raises UsageError,
        TensorNotFoundError or CorruptError.
        """
        with self.open(step, metric=metric, mode=mode) as checkpoint:
            return checkpoint.load(
                keys, framework=framework, device=device, allow_pickle=allow_pickle, threads=self.threads
            )

    # ---- saving

    def save(
        self,
        step: int,
        state: Any,
        *,
        note: str = "",
        metrics: Mapping[str, float] | None = None,
        tags: Iterable[str] = (),
        block: bool = True,
        replace_step: bool = False,
    ) -> SaveReport | None:
        """Save a state: nested dicts, lists and tuples of tensors (torch, numpy, jax, cupy), numbers, strings and bytes.

        With `block=False` it returns, with None, once the state is copied; a thread compresses and writes it. One save
        at a time: the next one waits for it, and raises what it raised. Tensors that have not changed are referred to, changed
        ones are differences from the last checkpoint where that is smaller.

        Raises UsageError (a step that is there already, unless `replace_step`; what cannot be saved), ConflictError
        (another writer has saved to this run), OSError; then the store is as it was.
        """
        checked = _checked(step, note, metrics, tags)
        return self._save(lambda: flatten(state), _Asked("state", *checked, replace_step=replace_step), block)

    def publish(
        self,
        step: int,
        weights: Any,
        *,
        keep: int | None = publishing.KEPT,
        note: str = "",
        metrics: Mapping[str, float] | None = None,
        tags: Iterable[str] = (),
        block: bool = True,
        replace_step: bool = False,
    ) -> SaveReport | None:
        """Save weights for those who follow them (`subscribe`): a mapping of names to tensors, or a module.

        A checkpoint of a kind of its own, which is listed, verified and loaded as others are; its differences are always from
        the one that was published before. Of published checkpoints the last `keep` stay (None: all), and tagged ones;
        the space of others is freed ten minutes later. Publish to a store of its own when steps that are saved are published,
        too: a step is there once. `block` and what is raised are as in `save`.
        """
        if keep is not None and keep < 1:
            raise UsageError(f"keep must be 1 or more, or None, not {keep!r}")
        checked = _checked(step, note, metrics, tags)
        asked = _Asked(publishing.KIND, *checked, replace_step=replace_step, keep=keep)
        return self._save(lambda: publishing.flatten_weights(weights), asked, block)

    def subscribe(
        self,
        weights: Any = None,
        *,
        step: int | None = None,
        reset: bool = False,
        poll: float = 1.0,
    ) -> "Subscription":
        """Follow what is published here with tensors of one's own, which `Subscription.update` patches where they are.

        `weights`: names and tensors (numpy or torch, contiguous), or a module; they must be those of a published checkpoint, as
        their content ids tell: of `step`, or of any. With `reset` they may be anything of those types and shapes, what a
        process that died within an update has left, say: the first update reads what is not known. Without `weights` those
        of `step`, or the newest, are loaded as numpy arrays. `poll`: seconds between two looks while an update waits.

        Raises UsageError (no such tensors or step), ConflictError (weights that are none of the published ones).
        """
        from tzip.store.subscribing import Subscription

        return Subscription(self.backend, weights, step=step, reset=reset, poll=poll, threads=self.threads)

    def serve(
        self, folder: str | os.PathLike[str], *, shard: int = 5 * 10**9, poll: float = 1.0
    ) -> "ServedFolder":
        """Keep a folder of safetensors files, of `shard` bytes at most each, at what is published here: `ServedFolder.update`.

        The folder is begun, or gone on with: its files may be of any step, or of none. Servers load it through its index,
        which is replaced in one step. Raises UsageError, CorruptError (files in the folder that are none), OSError.
        """
        from tzip.store.serving import ServedFolder

        return ServedFolder.open(
            lambda weights: self.subscribe(weights, reset=weights is not None, poll=poll), Path(folder), shard
        )

    def _save(self, flat: Callable[[], tuple[Any, dict[str, Leaf]]], asked: "_Asked", block: bool) -> SaveReport | None:
        start = time.perf_counter()
        with self._lock:
            self.wait()
            tree, leaves = flat()
            save = _Save(asked, tree, leaves, self._copy(asked.kind, leaves))
            if block:
                try:
                    return self._write(save)
                finally:
                    self._stats.stalled += time.perf_counter() - start
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, "tzip-store")
            self._running = self._pool.submit(self._write, save)
            self._stats.stalled += time.perf_counter() - start
            return None

    def wait(self) -> SaveReport | None:
        """Wait for the save in the background, when there is one; return its report, or raise what it raised."""
        with self._lock:
            running, self._running = self._running, None
        return running.result() if running is not None else None

    def stats(self) -> Stats:
        """Return what was done since the store was opened."""
        running = self._running
        return replace(self._stats, queued=int(running is not None and not running.done()))

    def _copy(self, kind: str, leaves: Mapping[str, Leaf]) -> dict[str, U8]:
        """Copy a state, into memory of the one before the last where it fits: fresh pages cost twice the copy."""
        spare = self._spare.pop(kind, {})
        copied = {}
        for key, leaf in leaves.items():
            room = spare.pop(key, None)
            if room is None or room.size != leaf.raw.size:
                room = np.empty(leaf.raw.size, np.uint8)
            np.copyto(room, leaf.raw)
            copied[key] = room
        return copied

    def _write(self, save: "_Save") -> SaveReport:
        start = time.perf_counter()
        asked = save.asked
        with self.backend.writing():
            journal = self.journal()
            base = self._find_base(journal, asked.kind)
            self._check_free(journal, asked.step, asked.replace_step)
            entry, records, objects, report = self._write_object(save, base, journal.head.generation + 1)
            entry = self._commit(journal, entry, objects, asked)
        if base is not None:
            self._spare[asked.kind] = base.raw
        self._bases[asked.kind] = _Base(entry, records, objects, save.raw)
        if self._dropped >= _SWEEP_AFTER:
            self._dropped = 0
            self._sweep()
        report = replace(report, seconds=time.perf_counter() - start)
        self._count(report)
        return report

    def _sweep(self) -> None:
        """Free what forgotten checkpoints took. The one that was just written stands, whatever comes of it."""
        try:
            self.gc(grace=_PUBLISHED_GRACE)
        except (TzipError, OSError) as e:
            warnings.warn(f"the space of published checkpoints that are gone is not freed: {e}", stacklevel=2)

    def _count(self, report: SaveReport) -> None:
        self._stats.saves += 1
        self._stats.raw += report.raw
        self._stats.stored += report.stored
        self._stats.seconds += report.seconds

    def _find_base(self, journal: Journal, kind: str) -> _Base | None:
        """Return the state that was saved last, from memory when it is ours."""
        self._check_alone(journal.latest())
        latest = next((e for e in journal.entries() if e.kind == kind), None)
        if latest is None:
            return None
        held = self._bases.get(kind)
        if held is not None and held.entry.object == latest.object:
            return held
        with Checkpoint(self.backend, latest) as checkpoint:
            manifest = checkpoint.manifest
            return _Base(latest, manifest.records, manifest.objects, checkpoint.raw(manifest.records, self.threads))

    def _check_alone(self, latest: Entry | None) -> None:
        """Raise ConflictError when another writer has saved since we did, or since we began to."""
        if latest is None:
            return
        if self._known is None:
            self._known = latest.seq
        if latest.seq > self._known and latest.writer != self._writer:
            raise ConflictError(
                f"another writer has saved step {latest.step} to this run meanwhile; open the store again to go on from there"
            ).at(path=self.backend.name)

    def _write_object(
        self, save: "_Save", base: _Base | None, seq: int
    ) -> tuple[Entry, dict[str, Record], dict[str, ObjectInfo], SaveReport]:
        kept: dict[str, Record] = {}
        changed: list[Held] = []
        for key, leaf in save.leaves.items():
            earlier = base.records.get(key) if base is not None else None
            like = earlier is not None and (earlier.dtype, earlier.shape) == (leaf.dtype, leaf.shape)
            if like and earlier is not None and base is not None and same_bytes(base.raw[key], save.raw[key]):
                kept[key] = earlier
                continue
            changed.append(in_memory(key, leaf.dtype, leaf.shape, save.raw[key]))
        with Workers(self.threads) as workers:
            contents = content_ids(changed, workers)
        near: list[tuple[Record, Held]] = []
        far: list[tuple[Record, Held]] = []  # at the end of a chain
        if base is not None:
            below = depths(base.objects)
            for k, r in base.records.items():
                if k not in kept:
                    (near if below[r.object] + 2 <= self.max_chain else far).append(
                        (r, in_memory(k, r.dtype, r.shape, base.raw[k]))
                    )
        asked = save.asked
        time_ns = max(0, time.time_ns())  # a clock may say what it likes, but a negative time has no form
        made: dict[str, Any] = {}
        # Who follows published weights wants differences also where the checkpoint itself begins a new chain. Few tensors,
        # which did not change for long, do not end it: they are stored in full among the differences.
        aside = None
        if asked.kind == publishing.KIND and sum(h.nbytes for _, h in far) > sum(h.nbytes for _, h in near):
            aside = write_object(
                self.backend, changed, contents, [*near, *far], None, level=self.level, threads=self.threads
            )
            near = []

        def describe(own: Mapping[str, Record], info: ObjectInfo) -> bytes:
            records = {key: kept[key] if key in kept else own[key] for key in save.leaves}
            objects = needed(records.values(), {**(base.objects if base is not None else {}), THIS: info}, THIS)
            extra = {}
            if asked.kind == publishing.KIND:
                delta = aside.archive_id if aside is not None else ""
                extra = publishing.extra_of(base.entry if base else None, base.records if base else {}, delta)
                if aside is not None:
                    objects = publishing.beside(objects, delta, aside.info)
            made["records"], made["objects"] = records, objects
            return Manifest(
                asked.step, asked.kind, time_ns, self._writer, asked.note, asked.metrics, records, objects, save.tree, extra,
                seq,
            ).write()  # fmt: skip

        written = write_object(
            self.backend, changed, contents, near, describe, level=self.level, threads=self.threads
        )
        records, objects = named(written.archive_id, written.info, made["records"], made["objects"])
        raw = sum(r.nbytes for r in records.values())
        stored = written.info.size + (aside.info.size if aside is not None else 0)
        entry = Entry(
            asked.step, written.archive_id, time_ns, asked.kind, self._writer, asked.note, asked.metrics, raw, stored
        )
        deltas = sum(1 for t in changed if records[t.key].depth)
        return entry, records, objects, SaveReport(asked.step, raw, stored, len(records), deltas, len(kept), 0.0)

    def _commit(self, journal: Journal, entry: Entry, objects: Mapping[str, ObjectInfo], asked: "_Asked") -> Entry:
        """Name a checkpoint in the head and return its entry. What others changed meanwhile, tags say, is kept; another
        writer's checkpoint is a conflict.
        """
        if self._known is None:
            self._known = journal.head.generation
        for _ in range(_TRIES):
            gone = publishing.superseded(journal, asked.keep, entry.step, asked.tags)
            head, done = journal.with_entry(entry, asked.tags, gone), None
            try:
                journal.commit(head, objects)
            except StaleHeadError:
                journal = self.journal()
                done = journal.find(entry.step)
                if done is None or done.object != entry.object:  # else it was ours, and only the answer was lost
                    self._check_alone(journal.latest())
                    continue
            self._known = head.generation if done is None else done.seq
            self._dropped += len(gone)
            return head.recent[-1] if done is None else done
        raise ConflictError(f"the head of the store changed {_TRIES} times meanwhile").at(path=self.backend.name)

    # ---- files as they are

    def save_files(
        self,
        step: int,
        paths: Iterable[str | os.PathLike[str]],
        *,
        note: str = "",
        metrics: Mapping[str, float] | None = None,
        tags: Iterable[str] = (),
        replace_step: bool = False,
    ) -> SaveReport:
        """Save files and folders (a trainer's checkpoint as it lies there), which `restore` gives back byte for byte.

        Tensors in them, of whatever format tzip knows, are differences from the last checkpoint that was saved so.
        Raises as `save` does.
        """
        from tzip.store.foldered import items_of, new_entry, write_files

        start = time.perf_counter()
        step, note, measured, names = _checked(step, note, metrics, tags)
        items = items_of(list(paths))
        with self._lock:
            self.wait()
            with self.backend.writing():
                journal = self.journal()
                self._check_alone(journal.latest())
                self._check_free(journal, step, replace_step)
                entry, objects = write_files(
                    self.backend, journal, new_entry(step, self._writer, note, measured), items,
                    level=self.level, max_chain=self.max_chain, threads=self.threads,
                )  # fmt: skip
                self._commit(journal, entry, objects, _Asked("files", step, note, measured, names))
            report = SaveReport(step, entry.raw, entry.stored, 0, 0, 0, time.perf_counter() - start)
            self._count(report)
            self._stats.stalled += report.seconds
        return report

    def _check_free(self, journal: Journal, step: int, replace_step: bool) -> None:
        if journal.find(step) is not None and not replace_step:
            raise UsageError(f"step {step} is there already; replace_step=True replaces it").at(
                path=self.backend.name
            )

    # ---- upkeep

    def tag(self, name: str, step: int | None) -> None:
        """Give a tag to a step, or take it away (None). Raises UsageError."""
        _check_tags([name])

        def change(journal: Journal) -> Head:
            tags = dict(journal.head.tags)
            if step is None:
                if name not in tags:
                    raise UsageError(f"there is no tag {name!r}").at(path=self.backend.name)
                del tags[name]
            else:
                if journal.find(step) is None:
                    raise UsageError(f"there is no checkpoint {step!r}").at(path=self.backend.name)
                tags[name] = step
            return replace(journal.head, generation=journal.head.generation + 1, tags=tags)

        upkeep.update(self.backend, change)

    def diff(self, a: int | str, b: int | str) -> list[upkeep.Difference]:
        """Compare two checkpoints tensor by tensor, by their content ids: nothing is decoded."""
        return upkeep.compare(self.backend, self.find(a), self.find(b))

    def verify(self, *, deep: bool = False, progress: Callable[[int], None] | None = None) -> upkeep.VerifyReport:
        """Prove the store: every checkpoint's manifest, every object and stored byte; with `deep` also every content id.

        Damage is told in the report, by object and checkpoint; nothing is raised for it.
        """
        return upkeep.verify(self.backend, deep=deep, threads=self.threads, progress=progress)

    def prune(
        self,
        *,
        keep_last: int | None = None,
        keep_every: int | None = None,
        keep_best: int | None = None,
        metric: str | None = None,
        mode: str = "min",
        keep_tagged: bool = True,
        dry_run: bool = False,
    ) -> upkeep.PruneReport:
        """Remove checkpoints but the last `keep_last`, those whose step is a multiple of `keep_every`, the `keep_best` by
        `metric`, and tagged ones. What those that stay lean on stays too: differences from one that goes are made anew.
        `gc` then frees the space. Raises UsageError when nothing would be kept.
        """
        with self._lock:
            self.wait()
            report = upkeep.prune(
                self.backend,
                upkeep.Policy(keep_last, keep_every, keep_best, metric, mode, keep_tagged),
                level=self.level,
                max_chain=self.max_chain,
                threads=self.threads,
                writer=self._writer,
                dry_run=dry_run,
            )
            if not dry_run:
                self._bases.clear()
            return report

    def gc(self, *, grace: float = 86400.0) -> upkeep.GcReport:
        """Remove objects that no checkpoint has needed for `grace` seconds, and what killed writers left."""
        return upkeep.gc(self.backend, grace=grace)

    def repair(self, *, deep: bool = False) -> upkeep.RepairReport:
        """Keep every checkpoint whose objects are whole, forget the others and name them; a lost head is made anew."""
        with self._lock:
            self.wait()
            self._bases.clear()
            self._known = None
            return upkeep.repair(self.backend, deep=deep, threads=self.threads)

    def restore(self, step: int | str, dst: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write a checkpoint as files: those that were saved, byte for byte, into the folder `dst`; or a state as
        `dst.safetensors` (its tensors) or `dst.pt` (all of it, with torch).
        """
        from tzip.store.foldered import restore

        restore(self.backend, self.find(step), os.fspath(dst), force=force, threads=self.threads)

    def close(self) -> None:
        """Wait for the save in the background and raise what it raised."""
        try:
            self.wait()
        finally:
            if self._pool is not None:
                self._pool.shutdown(wait=True)
                self._pool = None
            self._bases.clear()
            self._spare.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<tzip store {self.backend.name!r}>"


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a caller said of a checkpoint. `keep`: how many of the published ones stay; None: all."""

    kind: str
    step: int
    note: str
    metrics: dict[str, float]
    tags: list[str]
    replace_step: bool = False
    keep: int | None = None


@dataclass(frozen=True, slots=True)
class _Save:
    asked: _Asked
    tree: Any
    leaves: Mapping[str, Leaf]
    raw: dict[str, U8]


def _checked(
    step: Any, note: Any, metrics: Mapping[str, float] | None, tags: Iterable[str]
) -> tuple[int, str, dict[str, float], list[str]]:
    if isinstance(step, bool) or not isinstance(step, int | np.integer) or not 0 <= int(step) <= MAX_STEP:
        raise UsageError(f"a step is a number from 0 on, not {step!r}")
    measured = {}
    for name, value in (metrics or {}).items():
        try:
            measured[str(name)] = float(value)
        except (TypeError, ValueError):
            raise UsageError(f"the metric {name!r} is no number: {value!r}") from None
    names = [tags] if isinstance(tags, str) else list(tags)
    _check_tags(names)
    try:
        "".join((str(note), *measured)).encode()
    except UnicodeEncodeError:
        raise UsageError("a note and the names of metrics must have a UTF-8 form") from None
    return int(step), str(note), measured, names


def _check_tags(names: Iterable[Any]) -> None:
    for name in names:
        usable = isinstance(name, str) and name and name not in ("latest", "best") and not name.isdecimal()
        if not usable or any("\ud800" <= c <= "\udfff" for c in name):
            raise UsageError(f"{name!r} is no name for a tag")
