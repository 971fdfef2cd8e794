"""`tzip store`: checkpoints of training runs, from the shell."""

import dataclasses
import datetime
import itertools
import json
import math
from typing import Any

import click

from tzip.coders.errors import CorruptError, UsageError

_run = click.argument("run")
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_threads = click.option("--threads", "-t", type=click.IntRange(min=1), help="Threads; default: one for each CPU.")


@click.group()
def store() -> None:
    """Keep the checkpoints of a training run in a folder, in little space."""


def _open(run: str, threads: int | None = None, **options: Any) -> Any:
    from tzip.store.runs import Store

    return Store(run, threads=threads, **{"create": False, **options})


def _step(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _say(data: Any) -> None:
    click.echo(json.dumps(data, indent=1, ensure_ascii=False))


def _size(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} B" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1000
    return f"{n:.2f} TB"


@store.command()
@_run
@click.option("--level", "-l", type=click.Choice(["fast", "default", "best"]), default="default", show_default=True)
@click.option("--max-chain", type=int, help="Archives that a tensor is read through at most (16): more save space.")
def init(run: str, level: str, max_chain: int | None) -> None:
    """Make a store in the folder RUN, which is empty or not there."""
    from tzip.store.backends import open_backend

    if open_backend(run).exists():
        raise UsageError("there is a store already").at(path=run)
    _open(run, create=True, level=level, max_chain=max_chain).close()


@store.command()
@_run
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True))
@click.option("--step", type=click.IntRange(min=0), required=True, help="The step that they are of.")
@click.option("--note", default="", help="A text for the log.")
@click.option("--metric", "-m", multiple=True, help="NAME=VALUE, as loss=2.5 (again for more).")
@click.option("--tag", multiple=True, help="A name for this checkpoint: tagged ones are not pruned.")
@click.option("--replace", is_flag=True, help="Replace the checkpoint of that step.")
@_threads
@_as_json
def save(
    run: str, paths: tuple[str, ...], step: int, note: str, metric: tuple[str, ...], tag: tuple[str, ...], replace: bool,
    threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Save files, or what is in a folder, as the checkpoint of a step; RUN is made when it is not there.

    \b
    tzip store save runs/42 checkpoint-500/ --step 500 --metric loss=2.31
    """
    metrics = {}
    for text in metric:
        name, equals, value = text.partition("=")
        try:
            metrics[name] = float(value)
        except ValueError:
            equals = ""
        if not equals or not name:
            raise UsageError(f"a metric is NAME=NUMBER, not {text!r}")
    with _open(run, threads, create=True) as opened:
        report = opened.save_files(step, paths, note=note, metrics=metrics, tags=tag, replace_step=replace)
    if as_json:
        _say(dataclasses.asdict(report))
    else:
        share = 100 * report.stored / report.raw if report.raw else 100.0
        click.echo(f"step {step}: {_size(report.raw)} as {_size(report.stored)} ({share:.2f} %)", err=True)


@store.command()
@_run
@_as_json
@click.option("--limit", "-n", type=click.IntRange(min=1), help="Only the newest.")
def log(run: str, as_json: bool, limit: int | None) -> None:
    """List the checkpoints, the newest first."""
    opened = _open(run)
    tags: dict[int, list[str]] = {}
    for name, step in sorted(opened.tags().items()):
        tags.setdefault(step, []).append(name)
    entries = itertools.islice(opened.log(), limit)
    rows = [dataclasses.asdict(e) | {"tags": tags.get(e.step, [])} for e in entries]
    if as_json:
        for row in rows:  # JSON has no form for these, either
            row["metrics"] = {k: v if math.isfinite(v) else repr(v) for k, v in row["metrics"].items()}
        _say(rows)
        return
    for row in rows:
        when = datetime.datetime.fromtimestamp(row["time_ns"] / 1e9).strftime("%Y-%m-%d %H:%M")
        words = [f"{k}={v:g}" for k, v in row["metrics"].items()] + [f"[{t}]" for t in row["tags"]]
        words += [row["note"]] if row["note"] else []
        columns = [f"{row['step']:>10}", when, f"{_size(row['raw']):>10}", f"{_size(row['stored']):>10}", *words]
        click.echo("  ".join(columns))


@store.command()
@_run
@click.argument("step", default="latest")
@click.option("--output", "-o", required=True, help="A folder for files; NAME.safetensors or NAME.pt for a state.")
@click.option("--force", "-f", is_flag=True, help="Replace output that exists.")
@_threads
def restore(run: str, step: str, output: str, force: bool, threads: int | None) -> None:
    """Write a checkpoint as files again; STEP is a number, a tag, "latest" or "best"."""
    _open(run, threads).restore(_step(step), output, force=force)


@store.command("ls")
@_run
@click.argument("step", default="latest")
@_as_json
def list_tensors(run: str, step: str, as_json: bool) -> None:
    """List the tensors of a checkpoint."""
    with _open(run).open(_step(step)) as checkpoint:
        rows = []
        for key in checkpoint:
            view = checkpoint.tensor(key)
            record = checkpoint.manifest.records.get(key)
            depth = record.depth if record else None
            content = record.content if record else None
            rows.append(
                {"name": key, "dtype": view.element_type.name, "shape": list(view.shape), "depth": depth, "content": content}
            )
    if as_json:
        _say(rows)
        return
    for row in rows:
        click.echo(f"{row['name']}  {row['dtype']}  {row['shape']}")


@store.command()
@_run
@click.argument("a")
@click.argument("b")
@_as_json
def diff(run: str, a: str, b: str, as_json: bool) -> None:
    """Say which tensors differ between two checkpoints; nothing is decoded."""
    rows = [dataclasses.asdict(d) for d in _open(run).diff(_step(a), _step(b))]
    if as_json:
        _say(rows)
        return
    for row in rows:
        if row["what"] != "same":
            click.echo(f"{row['what']:>8}  {_size(row['nbytes']):>10}  {row['key']}")
    click.echo(f"{sum(r['what'] == 'same' for r in rows)} of {len(rows)} tensors are the same", err=True)


@store.command()
@_run
@click.option("--deep", is_flag=True, help="Decode everything and compare content ids, not only stored bytes.")
@_threads
@_as_json
def verify(run: str, deep: bool, threads: int | None, as_json: bool) -> None:
    """Prove all that the checkpoints need."""
    report = _open(run, threads).verify(deep=deep)
    if as_json:
        _say(dataclasses.asdict(report))
    for fault in report.faults:
        steps = ", ".join(map(str, fault.steps))
        click.echo(f"{fault.message} (steps {steps})", err=True)
    if report.faults:
        raise CorruptError(f"{len(report.faults)} of {report.objects} objects are damaged").at(path=run)
    if not as_json:
        click.echo(f"{report.checkpoints} checkpoints in {report.objects} objects are sound, {_size(report.bytes)}", err=True)


@store.command()
@_run
@click.option("--keep-last", type=int, help="The newest so many.")
@click.option("--keep-every", type=int, help="Those whose step is a multiple of this.")
@click.option("--keep-best", type=int, help="The best so many by --metric.")
@click.option("--metric", help="A name, when there are several.")
@click.option("--mode", type=click.Choice(["min", "max"]), default="min", show_default=True)
@click.option("--drop-tagged", is_flag=True, help="Tags do not protect.")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@_threads
@_as_json
def prune(
    run: str, keep_last: int | None, keep_every: int | None, keep_best: int | None, metric: str | None, mode: str,
    drop_tagged: bool, dry_run: bool, threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Forget checkpoints; `gc` then frees the space."""
    report = _open(run, threads).prune(
        keep_last=keep_last, keep_every=keep_every, keep_best=keep_best, metric=metric, mode=mode,
        keep_tagged=not drop_tagged, dry_run=dry_run,
    )  # fmt: skip
    if as_json:
        _say(dataclasses.asdict(report))
    else:
        word = "would remove" if dry_run else "removed"
        click.echo(f"{word} {len(report.removed)}, kept {len(report.kept)}, packed {len(report.rewritten)} anew", err=True)


@store.command()
@_run
@click.option("--grace", type=float, default=86400.0, show_default=True, help="Seconds that objects wait, unneeded.")
@_as_json
def gc(run: str, grace: float, as_json: bool) -> None:
    """Remove objects that no checkpoint needs, and what killed writers left."""
    report = _open(run).gc(grace=grace)
    if as_json:
        _say(dataclasses.asdict(report))
    else:
        click.echo(f"removed {report.removed} objects, {_size(report.freed)}; {report.waiting} wait", err=True)


@store.command()
@_run
@click.option("--deep", is_flag=True, help="Decode everything, too.")
@_threads
@_as_json
def repair(run: str, deep: bool, threads: int | None, as_json: bool) -> None:
    """Keep every checkpoint that is whole, forget the others and name them."""
    from tzip.store import upkeep
    from tzip.store.backends import open_backend
    from tzip.workers import thread_count

    backend = open_backend(run)
    if not backend.exists():
        raise UsageError("there is no store here").at(path=run)
    report = upkeep.repair(backend, deep=deep, threads=thread_count(threads))
    if as_json:
        _say(dataclasses.asdict(report))
    else:
        for archive_id, why in report.unreadable.items():
            click.echo(f"object {archive_id} cannot be read: {why}", err=True)
        for step, why in report.lost.items():
            click.echo(f"step {step} is lost: {why}", err=True)
        rebuilt = "the head was made anew; " if report.rebuilt else ""
        click.echo(f"{rebuilt}{len(report.kept)} checkpoints are whole, {len(report.lost)} lost", err=True)


@store.command()
@_run
@_as_json
def stats(run: str, as_json: bool) -> None:
    """Say how much the checkpoints hold and how much space they take."""
    opened = _open(run)
    entries = list(opened.log())
    backend = opened.backend
    disk = sum(backend.object_size(i) or 0 for i in backend.object_ids())
    raw = sum(e.raw for e in entries)
    data = {"checkpoints": len(entries), "raw": raw, "disk": disk, "ratio": disk / raw if raw else None}
    if as_json:
        _say(data)
    else:
        share = f" ({100 * disk / raw:.2f} %)" if raw else ""
        click.echo(f"{len(entries)} checkpoints of {_size(raw)} in {_size(disk)}{share}")


@store.command()
@_run
@click.argument("name")
@click.argument("step", required=False, type=int)
@click.option("--delete", "-d", is_flag=True, help="Take the tag away.")
def tag(run: str, name: str, step: int | None, delete: bool) -> None:
    """Give a checkpoint a name that protects it from pruning."""
    if delete == (step is not None):
        raise UsageError("say the step, or --delete")
    _open(run).tag(name, step)
