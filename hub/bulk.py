"""Packing a hub: one task for each model, bases before those that lean on them, and the report that receipts add up to."""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tzip.coders.errors import ChangedError, TzipError, UsageError
from tzip.formats.atomic import PartialFile
from tzip.formats.catalogue import FOLDER
from tzip.hub.engines import Engine, Failure, engine_named
from tzip.hub.families import Sketch, distances, forest, sketch
from tzip.hub.models import Model, find_models, key_of
from tzip.hub.receipts import Input, Receipt, Shelf
from tzip.packing import Options, Packer, PackReport
from tzip.plan import level_named
from tzip.tree import collect
from tzip.unpacking import UnpackReport, unpack
from tzip.version import __version__
from tzip.workers import Workers, thread_count

MAX_CHAIN = 4  # archives that a model is read through at most, beside its own

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class HubReport:
    """What a hub came to. `receipts`: of all its models that are packed, by name, `packed` of them now; `failures`: why
    others are not.

    `left`: paths that are no models, and why. Bytes in and out are those of the receipts, an archive that two share counted
    once.
    """

    receipts: list[Receipt]
    packed: int
    failures: dict[str, Failure] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    @property
    def bytes_in(self) -> int:
        """Return the bytes of all files."""
        return sum(r.bytes_in for r in self.receipts)

    @property
    def bytes_out(self) -> int:
        """Return the bytes of all archives."""
        return sum({r.archive: r.bytes_out for r in self.receipts}.values())


@dataclass(frozen=True, slots=True)
class Job:
    """A model to pack, as a task gets it. `base`: the receipt of the one whose archive it is to lean on."""

    model: Model
    out: str
    level: str
    threads: int
    dereference: bool | None
    base: Receipt | None = None


def pack_hub(
    root: Any,
    out: Any,
    *,
    engine: str = "local",
    level: str = "default",
    threads: int = 1,
    max_chain: int = MAX_CHAIN,
    dereference: bool | None = None,
    progress: Progress | None = None,
) -> HubReport:
    """Pack every model below the folder `root` into an archive in the folder `out`; fine-tunes become differences from
    their base.

    `engine`: `local`, `ray` or `dask`, or one of these with "=" and a number of processes or a cluster's address; the
    folders must have the same paths on its machines. `threads`: of each task. `max_chain`: archives, beside its own, that a
    model may be read through; 0 packs each by itself. `dereference` follows links, as in `pack`. `progress` is called with
    the bytes of models done and those of all.

    What is packed already, by names, sizes and times of its files, is left as it is; so a call that was stopped is
    repeated. Errors of one model are reported and stop no other. Programs need the usual `if __name__ == "__main__"`, for
    processes are started.

    Raises UsageError and OSError.
    """
    level_named(level)
    thread_count(threads)
    if max_chain < 0:
        raise UsageError(f"a chain of {max_chain} archives")
    root, out = os.path.abspath(root), os.path.abspath(out)  # a cluster's processes have other working directories
    if os.path.realpath(root) == os.path.realpath(out):
        raise UsageError("a hub is not packed into itself").at(path=root)
    shelf = Shelf(out)
    if os.path.isdir(root):
        shelf.make()
    models, left = find_models(Path(root), level, dereference, shelf.root)
    standing = shelf.standing(shelf.all(strict=False))
    receipts = {model.name: standing[model.key] for model in models if model.key in standing}
    failures: dict[str, Failure] = {}
    total = sum(model.size for model in models)
    tell = progress or (lambda done, of: None)
    done = sum(model.size for model in models if model.name in receipts)
    kept = len(receipts)
    tell(done, total)
    if kept < len(models):
        with engine_named(engine, threads) as started:
            parents = _plan(models, receipts, started, max_chain, dereference)
            for model, result in _pack_all(models, receipts, parents, started, _Terms(out, level, threads, dereference)):
                if isinstance(result, Failure):
                    failures[model.name] = result
                done += model.size
                tell(done, total)
    ordered = [receipts[model.name] for model in models if model.name in receipts]
    return HubReport(ordered, len(receipts) - kept, failures, left)


@dataclass(frozen=True, slots=True)
class _Terms:
    out: str
    level: str
    threads: int
    dereference: bool | None


def _plan(
    models: list[Model], receipts: dict[str, Receipt], engine: Engine, max_chain: int, dereference: bool | None
) -> list[int | None]:
    """Return the place of each model's base. A model that cannot be sampled is packed by itself, which says what is wrong."""
    if not max_chain:
        return [None] * len(models)
    empty = Sketch((), (), 0.0)
    sketches = [empty] * len(models)
    jobs = [(i, model.path, dereference) for i, model in enumerate(models)]
    for (i, _, _), result in engine.map(_sketch_one, jobs):
        if not isinstance(result, Failure):
            sketches[i] = result
    fixed = {i: receipts[model.name].depth for i, model in enumerate(models) if model.name in receipts}
    return forest([s.alone for s in sketches], distances(sketches), max_chain, fixed)


def _sketch_one(job: tuple[int, str, bool | None]) -> Sketch:
    _, path, dereference = job
    return sketch(path, dereference)


def _pack_all(
    models: list[Model], receipts: dict[str, Receipt], parents: list[int | None], engine: Engine, terms: _Terms
) -> Iterator[tuple[Model, Any]]:
    """Pack what has no receipt, each after its base, the largest first; add the receipts; yield (model, receipt or Failure).

    Where the base fails, what was to lean on it is packed by itself.
    """
    children: dict[str, list[Model]] = defaultdict(list)
    ready: list[Job] = []
    for model, parent in zip(models, parents, strict=True):
        if model.name in receipts:
            continue
        base = None if parent is None else models[parent].name
        if base is None or base in receipts:
            ready.append(Job(model, terms.out, terms.level, terms.threads, terms.dereference, receipts.get(base or "")))
        else:
            children[base].append(model)

    def then(job: Job, result: Any) -> list[Job]:
        if isinstance(result, Receipt):
            receipts[job.model.name] = result
        freed = sorted(children.pop(job.model.name, ()), key=lambda m: -m.size)
        base = receipts.get(job.model.name)
        return [Job(m, terms.out, terms.level, terms.threads, terms.dereference, base) for m in freed]

    # A base that is large, and that many wait for, is what takes the longest.
    weight = {job.model.name: job.model.size + _waiting(job.model.name, children) for job in ready}
    ready.sort(key=lambda job: -weight[job.model.name])
    for job, result in engine.map(pack_model, ready, then):
        yield job.model, result


def _waiting(name: str, children: dict[str, list[Model]]) -> int:
    """Return the bytes of the models that wait for one, and for these."""
    total, below = 0, [name]
    while below:
        for child in children.get(below.pop(), ()):
            total += child.size
            below.append(child.name)
    return total


def pack_model(job: Job) -> Receipt:
    """Pack one model; the task that engines run. Run again, or twice at once, it changes nothing.

    Raises TzipError (ChangedError when the model is not what it was when the work was planned) and OSError.
    """
    shelf = Shelf(job.out)
    there = shelf.find(job.model.key)
    if there is not None:
        return there
    start = time.perf_counter()
    items = collect([job.model.path], job.dereference)
    if key_of(job.model.name, job.level, items) != job.model.key:
        raise ChangedError("the model changed after the work was planned").at(path=job.model.path)
    base = None if job.base is None else [shelf.archive_path(job.base.archive)]
    try:
        with shelf.new_file(job.model.key) as file:
            report = _write(items, file, Options(job.level, job.threads, base=base))
            shelf.publish_archive(file, report.archive_id, report.bytes_out)
    except FileNotFoundError:
        there = shelf.find(job.model.key)  # the same task elsewhere was faster, and has swept what this one wrote
        if there is None:
            raise
        return there
    leans = job.base if job.base is not None and report.bases else None
    return shelf.publish_receipt(
        Receipt(
            job.model.name,
            job.model.key,
            [
                Input(m.name, m.size, item.mtime_ns, m.sha256 if item.kind != FOLDER else None)
                for m, item in zip(report.members, items, strict=True)
            ],
            job.level,
            f"tzip {__version__}",
            report.archive_id,
            report.bytes_in,
            report.bytes_out,
            round(time.perf_counter() - start, 3),
            leans.archive if leans else "",
            leans.model if leans else "",
            leans.depth + 1 if leans else 0,
            report.warnings,
        )
    )


def _write(items: list[Any], file: PartialFile, options: Options) -> PackReport:
    """Pack as `pack` does, leaving warnings to the receipt: tasks of one process may run on threads."""
    with Workers(thread_count(options.threads)) as workers:
        packer = Packer(file.file, workers, options)
        try:
            for item in items:
                try:
                    packer.add(item)
                except TzipError as e:
                    raise e.at(member=item.name) from None
            archive_id = packer.finish().hex()
        finally:
            packer.close()
    leans_on = sorted(packer.leans_on)
    return PackReport(
        None, archive_id, packer.bytes_in, packer.writer.position, 0.0, packer.members, packer.warnings, leans_on
    )


def hub_report(out: Any) -> HubReport:
    """Merge the receipts in the folder `out`, whatever runs they are from: of each model the one with the newest files.

    Those whose archive is gone become failures. Raises CorruptError, and UsageError when there are none.
    """
    shelf = Shelf(out)
    if not shelf.receipts.is_dir():
        raise UsageError("no hub was packed into this folder").at(path=str(out))
    newest: dict[str, Receipt] = {}
    failures = {}
    every = shelf.all(strict=True)
    standing = shelf.standing(every)
    for receipt in every:
        if receipt.key not in standing:
            failures[receipt.model] = Failure("BaseNotFoundError", "its archive, or the one that it leans on, is gone", 10)
        elif receipt.model not in newest or _age(newest[receipt.model]) < _age(receipt):
            newest[receipt.model] = receipt
    failures = {name: failure for name, failure in failures.items() if name not in newest}
    return HubReport([newest[name] for name in sorted(newest)], 0, failures)


def _age(receipt: Receipt) -> tuple[int, str]:
    return max((i.mtime_ns for i in receipt.inputs), default=0), receipt.key


def unpack_model(out: Any, name: str, target: Any = None, **options: Any) -> UnpackReport:
    """Restore a model of a hub that was packed into the folder `out`; options as of `unpack`. Raises what that raises."""
    for receipt in hub_report(out).receipts:
        if receipt.model == name:
            return unpack(Shelf(out).archive_path(receipt.archive), target, **options)
    raise UsageError("no such model was packed").at(path=name)
