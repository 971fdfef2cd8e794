"""Checkpoints as files: a trainer's folder saved as it lies there, and checkpoints written as files again."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tzip.coders.arrays import U8
from tzip.coders.errors import CorruptError, UsageError
from tzip.formats.atomic import PartialFile
from tzip.formats.catalogue import LINK
from tzip.formats.names import check_links, fold
from tzip.store.backends import Backend
from tzip.store.checkpoints import Checkpoint, Objects
from tzip.store.journal import Entry, Journal
from tzip.store.manifest import MANIFEST, THIS, Manifest, ObjectInfo, Record, depths, named, needed
from tzip.store.objects import Held, safetensors_header, write_object
from tzip.tree import Item, collect
from tzip.unpacking import unpack

_PART = 1 << 24  # bytes of a tensor that are in memory at once


def write_files(
    backend: Backend,
    journal: Journal,
    entry: Entry,
    items: Sequence[Item],
    *,
    level: str,
    max_chain: int,
    threads: int,
    base: Entry | None = None,
) -> tuple[Entry, dict[str, ObjectInfo]]:
    """Pack files into an object; return the entry, completed, and what it needs.

    They are differences from those of `base`, or else from the last checkpoint of files, when its chain is short enough.
    """
    if any(fold(item.name) == fold(MANIFEST) for item in items):
        raise UsageError(f"no file can be called {MANIFEST}")
    earlier = base if base is not None else next((e for e in journal.entries() if e.kind == "files"), None)
    objects: dict[str, ObjectInfo] = {}
    bases: list[str] = []
    if earlier is not None:
        held = Objects(backend)
        try:
            manifest = held.manifest(earlier)
            tensors = bool(held(earlier.object).shapes)
        finally:
            held.close()
        below = depths(manifest.objects)[earlier.object]
        if tensors and below + 2 <= max_chain:
            objects, bases = dict(manifest.objects), [earlier.object]
    made: dict[str, Any] = {}

    def describe(own: Mapping[str, Record], info: ObjectInfo) -> bytes:
        made["objects"] = needed([], {**objects, THIS: info}, THIS)
        return Manifest(
            entry.step, "files", entry.time_ns, entry.writer, entry.note, entry.metrics, {}, made["objects"],
            seq=journal.head.generation + 1,
        ).write()

    written = write_object(backend, [], {}, [], describe, level=level, threads=threads, files=items, bases=bases)
    _, needs = named(written.archive_id, written.info, {}, made["objects"])
    done = Entry(
        entry.step, written.archive_id, entry.time_ns, "files", entry.writer, entry.note, entry.metrics, written.info.raw,
        written.info.size, entry.seq,
    )  # fmt: skip
    return done, needs


def items_of(paths: Sequence[str | os.PathLike[str]]) -> list[Item]:
    """Return the members for files, and for folders: of a single folder what is in it, without its name, which has the step."""
    if len(paths) == 1 and Path(paths[0]).is_dir():
        root = Path(os.path.abspath(paths[0]))
        prefix = f"{root.name}/"
        items = [_renamed(item, item.name[len(prefix) :]) for item in collect([root], None) if item.name != root.name]
        try:  # which may have gone through the folder's own name
            check_links({item.name: item.link for item in items if item.kind == LINK})
        except CorruptError as e:
            raise UsageError(e.message).at(member=e.member) from None
        return items
    return collect(paths, None)


def _renamed(item: Item, name: str) -> Item:
    return Item(name, item.kind, item.mode, item.mtime_ns, item.size, item.open, item.link, item.stamp, item.original)


def restore(backend: Backend, entry: Entry, dst: str, *, force: bool, threads: int) -> None:
    """Write a checkpoint as files; see `Store.restore`."""
    if entry.kind == "files":
        with Checkpoint(backend, entry) as checkpoint:
            names = [n for n in checkpoint.archive(entry.object).reader.index.member_names if n != MANIFEST]
        if names:
            source = backend.archive(entry.object)
            unpack(source, dst, members=names, threads=threads, force=force, base=backend.library)
        else:
            os.makedirs(dst, exist_ok=True)
        return
    target = Path(dst)
    if os.path.lexists(target) and not force and not target.is_dir():
        raise UsageError("the output exists; --force replaces it").at(path=str(target))
    if entry.kind == "sharded":
        from tzip.store.sharded import restore as restore_sharded

        restore_sharded(backend, entry, target, force=force)
        return
    if target.suffix == ".safetensors":
        with Checkpoint(backend, entry) as checkpoint, PartialFile(target, force=force) as partial:
            for part in _safetensors(checkpoint, threads):
                partial.write(part)
            partial.publish()
    elif target.suffix in (".pt", ".pth", ".ckpt", ".bin"):
        import torch

        with Checkpoint(backend, entry) as checkpoint:
            state = checkpoint.load(framework=None, threads=threads)
        with PartialFile(target, force=force) as partial, os.fdopen(os.dup(partial.file.fileno()), "wb") as file:
            torch.save(state, file)
            file.flush()
            partial.publish()
    else:
        raise UsageError("say a name that ends with .safetensors or .pt: the checkpoint is a state, not files").at(
            path=str(target)
        )


def _safetensors(checkpoint: Checkpoint, threads: int) -> Iterator[bytes | U8]:
    """Yield a safetensors file of a checkpoint's tensors, in parts that take little memory."""
    records = list(checkpoint.manifest.records.values())
    nothing = lambda begin, out: None  # noqa: E731
    yield safetensors_header([Held(r.key, r.dtype, r.shape, r.nbytes, nothing) for r in records])
    for record in records:
        archive, row = checkpoint.place(record.key)
        for at in range(0, record.nbytes, _PART):
            part = np.empty(min(_PART, record.nbytes - at), np.uint8)
            archive.read_into([(row, at, part)], threads)
            yield part


def new_entry(step: int, writer: str, note: str, metrics: Mapping[str, float]) -> Entry:
    """Return the entry of a checkpoint of files that is about to be written."""
    return Entry(step, "", max(0, time.time_ns()), "files", writer, note, metrics)
