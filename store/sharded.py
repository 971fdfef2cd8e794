"""Storage for torch's distributed checkpoints: torch shards, plans and resharding, the store keeps the bytes.

Every rank writes an object of its own; the coordinator writes the manifest and names it in the head, so that a rank which
dies leaves the run as it was. Differences are keyed by (name, offset): which rank owns a shard may change from save to save.
"""

import contextlib
import io
import math
import os
import platform
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader as TorchReader
from torch.distributed.checkpoint.storage import StorageWriter as TorchWriter
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from tzip.coders.arrays import U8
from tzip.coders.errors import ConflictError, CorruptError, UsageError
from tzip.formats.atomic import PartialFile
from tzip.formats.dtypes import BY_NAME
from tzip.store.backends import Backend, StaleHeadError, located, open_backend
from tzip.store.checkpoints import Checkpoint, Objects
from tzip.store.journal import Entry, Journal
from tzip.store.manifest import THIS, Manifest, ObjectInfo, Record, depths, named, needed
from tzip.store.objects import Held, content_ids, in_memory, in_object, safetensors_header, write_object
from tzip.store.runs import Store
from tzip.store.states import Target, flatten, rebuild, torch_form, torch_leaf, torch_tensor
from tzip.workers import Workers, thread_count

_TRIES = 50


# What this process saved last, by the store's folder: records of its shards, and their bytes. A process that saves
# asynchronously is made once and keeps its memory; another one reads the bases from the store.
_last: dict[str, dict[str, tuple[Record, U8]]] = {}


def key_of(fqn: str, offset: Sequence[int], whole: bool) -> str:
    """Return the key of a shard: its tensor's name, and where it begins when it is not all of it."""
    return fqn if whole else f"{fqn}@{','.join(map(str, offset))}"


class StorageWriter(TorchWriter):
    """Saves a distributed checkpoint as one step of the store in the folder or at the URL `path`.

    `dcp.save(state, storage_writer=StorageWriter("runs/42", step=100))`; instead of `step`, the `checkpoint_id` of the call
    may be the number. `tile`: the most rows and columns of a tensor that are stored as one piece, for loads that need some of
    the columns only; None keeps shards whole. The rest is as for `Store` and `Store.save`. Other ranks must see the folder.

    Raises UsageError, ConflictError or OSError on the rank where it happens; torch raises a CheckpointException on all.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        step: int | None = None,
        *,
        note: str = "",
        metrics: Mapping[str, float] | None = None,
        tags: Iterable[str] = (),
        replace_step: bool = False,
        tile: tuple[int, int] | None = None,
        level: str | None = None,
        max_chain: int | None = None,
        threads: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if tile is not None and min(tile) < 1:
            raise UsageError(f"a tile is (rows, columns), not {tile!r}")
        self.path = located(path)
        self.step = step
        self.note = note
        self.metrics = dict(metrics or {})
        self.tags = [tags] if isinstance(tags, str) else list(tags)
        self.replace_step = replace_step
        self.tile = tile
        self.level = level
        self.max_chain = max_chain
        self.threads = threads
        self.storage_options = storage_options
        self._writer = f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._held = contextlib.ExitStack()
        self._seen = -1
        self.rank = 0

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_held"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._held = contextlib.ExitStack()

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a save; a `checkpoint_id` is the step."""
        self._held.close()
        if checkpoint_id is not None:
            text = str(checkpoint_id)
            if not text.isdecimal():
                raise UsageError(f"checkpoint_id is the step, a number, not {text!r}")
            self.step = int(text)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Make the store when it is not there, and see that the step is free. Torch gives the rank by keyword."""
        self.rank = int(kwargs.get("rank") or 0)
        if kwargs.get("use_collectives") is False:
            raise UsageError("use_collectives=False has no coordinator, and so nobody to commit the checkpoint")
        if self.step is None:
            raise UsageError("say the step: StorageWriter(path, step=…), or checkpoint_id=…")
        if not is_coordinator:
            return
        store = self._store()
        self._held.enter_context(store.backend.writing())
        journal = store.journal()
        if journal.find(self.step) is not None and not self.replace_step:
            raise UsageError(f"step {self.step} is there already; replace_step=True replaces it").at(path=self.path)
        self._seen = journal.head.generation

    def _store(self, create: bool = True) -> Store:
        return Store(
            self.path, level=self.level, max_chain=self.max_chain, threads=self.threads, create=create,
            storage_options=self.storage_options,
        )  # fmt: skip

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> "Future[list[WriteResult]]":
        """Pack this rank's items into an object, as differences from the last checkpoint where that pays."""
        store = self._store(create=False)
        with store.backend.writing():
            pieces: list[tuple[Any, list[tuple[list[int], Held]]]] = []
            for item in plan.items:
                data = planner.resolve_data(item)
                if item.type == WriteItemType.BYTE_IO:
                    raw = np.frombuffer(data.getvalue(), np.uint8)
                    pieces.append((item, [([0], in_memory(item.index.fqn, BY_NAME["U8"], (raw.size,), raw))]))
                else:
                    pieces.append((item, self._tiles(item, data)))
            records, info, own = self._pack(store, [held for _, tiles in pieces for _, held in tiles])
            # A copy: the trainer goes on with the tensors, and a base must be what the records say.
            _last[self.path] = {h.key: (records[h.key], h.read()) for _, tiles in pieces for _, h in tiles}
        results = []
        for item, tiles in pieces:
            rows = [[place, _row(records[held.key])] for place, held in tiles]
            size = sum(held.nbytes for _, held in tiles)
            results.append(WriteResult(item.index, size, {"tiles": rows, "objects": info, "own": own}))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _tiles(self, item: Any, tensor: torch.Tensor) -> list[tuple[list[int], Held]]:
        """Cut a shard into tiles: where each begins in the tensor, and its bytes."""
        chunk = item.tensor_data.chunk
        offset, shape = tuple(chunk.offsets), tuple(chunk.sizes)
        steps = [max(1, n) for n in shape]
        if self.tile is not None and len(shape) >= 2:
            steps[:2] = self.tile
        out = []
        for at in product(*(range(0, max(1, n), step) for n, step in zip(shape, steps, strict=True))):
            part = tensor
            for dim, (begin, step) in enumerate(zip(at, steps, strict=True)):
                if step < shape[dim]:
                    part = part.narrow(dim, begin, min(step, shape[dim] - begin))
            leaf, _ = torch_leaf(part)
            place = [o + a for o, a in zip(offset, at, strict=True)]
            whole = tuple(part.shape) == tuple(item.tensor_data.size)
            key = key_of(item.index.fqn, place, whole)
            out.append((place, in_memory(key, leaf.dtype, leaf.shape, leaf.raw)))
        return out

    def _pack(self, store: Store, tensors: list[Held]) -> tuple[dict[str, Record], dict[str, list[Any]], str | None]:
        """Write what has changed; return the records of all, what the objects are that they need, and the id of ours."""
        backend = store.backend
        latest = store.journal().latest()
        objects = Objects(backend)
        try:
            base = objects.manifest(latest) if latest is not None and latest.kind == "sharded" else None
            with Workers(store.threads) as workers:
                contents = content_ids(tensors, workers)
            records: dict[str, Record] = {}
            changed = []
            for held in tensors:
                earlier = base.records.get(held.key) if base is not None else None
                if earlier is not None and (earlier.content, earlier.shape) == (contents[held.key], held.shape):
                    records[held.key] = earlier
                else:
                    changed.append(held)
            known: dict[str, ObjectInfo] = dict(base.objects) if base is not None else {}
            archive_id = None
            if changed:
                earlier_ones = self._bases(base, {h.key for h in changed}, store.max_chain, objects)
                written = write_object(
                    backend, changed, contents, earlier_ones, None, level=store.level, threads=store.threads
                )
                archive_id = written.archive_id
                own, _ = named(archive_id, written.info, written.records, {})
                records.update(own)
                known[archive_id] = written.info
            info = needed(records.values(), known)
        finally:
            objects.close()
        return records, {i: [list(o.leans), o.size, o.raw] for i, o in info.items()}, archive_id

    def _bases(
        self, base: Manifest | None, keys: set[str], max_chain: int, objects: Objects
    ) -> Iterator[tuple[Record, Held]]:
        mine = _last.get(self.path, {})
        if base is None:
            return
        below = depths(base.objects)
        for key, record in base.records.items():
            if key not in keys or below[record.object] + 2 > max_chain:
                continue
            held = mine.get(key)
            if held is not None and held[0].content == record.content:
                yield record, in_memory(key, record.dtype, record.shape, held[1])
            else:
                yield record, in_object(record, objects)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the manifest and name it in the head: the moment from which the checkpoint is there."""
        try:
            self._finish(metadata, results)
        finally:
            self._held.close()

    def _finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        assert self.step is not None
        step, seq = self.step, self._seen + 1
        backend = open_backend(self.path, self.storage_options)
        records: dict[str, Record] = {}
        known: dict[str, ObjectInfo] = {}
        items = []  # [name, offset or None, [[key, offset of the tile] …]] each
        for result in (r for rank in results for r in rank):
            for archive_id, (leans, size, raw) in result.storage_data["objects"].items():
                known[archive_id] = ObjectInfo(tuple(leans), size, raw)
            keys = []
            for place, row in result.storage_data["tiles"]:
                record = _record(row)
                records[record.key] = record
                keys.append([record.key, place])
            offset = None if result.index.offset is None else list(result.index.offset)
            items.append([result.index.fqn, offset, keys])
        extra = {"torch": _metadata_json(metadata), "items": items}
        time_ns = time.time_ns()
        made: dict[str, Any] = {}

        def describe(own: Mapping[str, Record], info: ObjectInfo) -> bytes:
            made["objects"] = needed(records.values(), {**known, THIS: info}, THIS)
            return Manifest(
                step, "sharded", time_ns, self._writer, self.note, self.metrics, records, made["objects"], None, extra, seq
            ).write()

        written = write_object(backend, [], {}, [], describe, level="default", threads=thread_count(self.threads))
        _, objects = named(written.archive_id, written.info, {}, made["objects"])
        fresh = {r.storage_data["own"] for rank in results for r in rank} - {None}
        stored = written.info.size + sum(objects[i].size for i in fresh)
        raw = sum(r.nbytes for r in records.values())
        entry = Entry(
            step, written.archive_id, time_ns, "sharded", self._writer, self.note, self.metrics, raw, stored
        )
        self._commit(backend, entry, objects)

    def _commit(self, backend: Backend, entry: Entry, objects: Mapping[str, ObjectInfo]) -> None:
        for _ in range(_TRIES):
            journal = Journal(backend)
            latest = journal.latest()
            if latest is not None and latest.object == entry.object:
                return  # it was ours, and only the answer was lost
            if latest is not None and latest.seq > self._seen:
                raise ConflictError(f"another writer has saved step {latest.step} to this run meanwhile").at(path=self.path)
            try:
                journal.commit(journal.with_entry(entry, self.tags), objects)
            except StaleHeadError:
                continue
            return
        raise ConflictError(f"the head of the store changed {_TRIES} times meanwhile").at(path=self.path)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Say whether it could be a step."""
        return str(checkpoint_id).isdecimal()

    def storage_meta(self) -> StorageMeta | None:
        """Return what torch notes of a save."""
        return StorageMeta(checkpoint_id=str(self.step), save_id=self._writer)


class StorageReader(TorchReader):
    """Reads a distributed checkpoint of a store: `dcp.load(state, storage_reader=StorageReader("runs/42", step=100))`.

    `step`: as for `Store.find`; instead of it the `checkpoint_id` of the call may be the number. Only the rows and tiles that
    a rank needs are read and decoded. Ranks that find different checkpoints ("latest", while one is saved) raise CorruptError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        step: int | str = "latest",
        *,
        threads: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._checkpoint: Checkpoint | None = None
        super().__init__()
        self.path = located(path)
        self.step = step
        self.threads = threads
        self.storage_options = storage_options
        self._places: Mapping[MetadataIndex, list[tuple[str, tuple[int, ...]]]] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a load; a `checkpoint_id` is the step."""
        self._close()
        if checkpoint_id is not None:
            text = str(checkpoint_id)
            self.step = int(text) if text.isdecimal() else text

    def _open(self) -> Checkpoint:
        if self._checkpoint is None:
            checkpoint = Store(self.path, create=False, storage_options=self.storage_options).open(self.step)
            if checkpoint.manifest.kind != "sharded":
                checkpoint.close()
                raise UsageError(f"step {checkpoint.step} is no distributed checkpoint: tzip.Store loads it").at(
                    path=self.path
                )
            self._checkpoint = checkpoint
        return self._checkpoint

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return torch's description of the checkpoint, made from the manifest: nothing is unpickled."""
        return metadata_of(self._open().manifest)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Note where things are."""
        self._places = metadata.storage_data or {}

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Note, for the coordinator, which checkpoint this rank has found."""
        plan.storage_data = self._open().entry.object
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """See that all ranks read the same checkpoint."""
        if len({plan.storage_data for plan in plans}) > 1:
            raise CorruptError("ranks have found different checkpoints; say the step").at(path=self.path)
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> "Future[None]":
        """Fill the tensors of this rank."""
        checkpoint = self._open()
        try:
            for item in plan.items:
                tiles = self._places.get(item.storage_index)
                if not tiles:
                    raise CorruptError(f"no place is known of {item.storage_index.fqn!r}").at(path=self.path)
                if item.type == LoadItemType.BYTE_IO:
                    planner.load_bytes(item, io.BytesIO(checkpoint.raw([tiles[0][0]], self.threads)[tiles[0][0]].tobytes()))
                    continue
                target = planner.resolve_tensor(item).detach()
                self._fill(checkpoint, tiles, item, target)
                planner.commit_tensor(item, target)
        finally:
            self._close()
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _fill(
        self, checkpoint: Checkpoint, tiles: Sequence[tuple[str, tuple[int, ...]]], item: ReadItem, target: torch.Tensor
    ) -> None:
        """Copy what an item asks of a stored shard from the tiles that hold it."""
        begin = item.storage_index.offset or [0] * len(item.lengths)
        low = [b + o for b, o in zip(begin, item.storage_offsets, strict=True)]
        high = [a + n for a, n in zip(low, item.lengths, strict=True)]
        form = _form(checkpoint.manifest, item.storage_index.fqn)
        filled = 0
        for key, at in tiles:
            shape = checkpoint.tensor(key).shape
            shape = shape[:-1] if form else shape
            first = [max(a, b) for a, b in zip(low, at, strict=True)]
            last = [min(a, b + n) for a, b, n in zip(high, at, shape, strict=True)]
            if any(a >= b for a, b in zip(first, last, strict=True)):
                continue
            rows = (first[0] - at[0], last[0] - at[0]) if at else (0, 1)
            part = self._rows(checkpoint, key, rows, form)
            inside = tuple(slice(a - b, c - b) for a, b, c in zip(first[1:], at[1:], last[1:], strict=True))
            place = tuple(slice(a - b, c - b) for a, b, c in zip(first, low, last, strict=True))
            target[place].copy_(part[(slice(None), *inside)] if at else part)
            filled += math.prod(b - a for a, b in zip(first, last, strict=True))
        if filled != math.prod(item.lengths):
            raise CorruptError(f"the tiles of {item.storage_index.fqn!r} do not cover what is asked for").at(path=self.path)

    def _rows(self, checkpoint: Checkpoint, key: str, rows: tuple[int, int], form: str) -> torch.Tensor:
        low, high = rows
        archive, row = checkpoint.place(key)
        view = archive.view(row)
        shape = view.shape
        if len(shape) > bool(form):  # not of no dimension
            each = view.element_type.nbytes(math.prod(shape[1:]))
            raw = archive.tensor_bytes(row, low * each, high * each, thread_count(self.threads))
            shape = (high - low, *shape[1:])
        else:
            raw = view.raw(1)
        return torch_tensor(view.element_type, shape, raw, form, None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Say whether it could name a checkpoint of a store."""
        return bool(str(checkpoint_id))

    def __del__(self) -> None:
        self._close()  # torch says nothing to a reader whose load has failed elsewhere

    def _close(self) -> None:
        if self._checkpoint is not None:
            self._checkpoint.close()
            self._checkpoint = None


# ---------------------------------------------------------------- what torch knows, as JSON


def _row(record: Record) -> list[Any]:
    return [
        record.key, record.object, record.name, record.dtype.name, list(record.shape), record.content, record.depth
    ]  # fmt: skip


def _record(row: list[Any]) -> Record:
    key, archive_id, name, dtype, shape, content, depth = row
    return Record(key, archive_id, name, BY_NAME[dtype], tuple(shape), content, depth)


def _form(manifest: Manifest, fqn: str) -> str:
    described = manifest.extra["torch"]["state"].get(fqn)
    return torch_form(described["dtype"]) if described else ""


def _metadata_json(metadata: Metadata) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for fqn, described in metadata.state_dict_metadata.items():
        if isinstance(described, BytesStorageMetadata):
            state[fqn] = None
            continue
        state[fqn] = {
            "dtype": str(described.properties.dtype).partition(".")[2],
            "requires_grad": bool(described.properties.requires_grad),
            "size": list(described.size),
            "chunks": [[list(c.offsets), list(c.sizes)] for c in described.chunks],
        }
    tree, leaves = flatten(metadata.planner_data)
    if leaves:
        raise UsageError("the planner's data holds tensors; tzip keeps plain planners' data only")
    return {"state": state, "planner": tree, "version": metadata.version}


def metadata_of(manifest: Manifest) -> Metadata:
    """Return torch's description of a checkpoint. Raises CorruptError for a manifest that breaks a rule."""
    path = manifest.extra
    try:
        described: dict[str, Any] = {}
        for fqn, entry in path["torch"]["state"].items():
            if entry is None:
                described[fqn] = BytesStorageMetadata()
                continue
            dtype = getattr(torch, entry["dtype"])
            if not isinstance(dtype, torch.dtype):
                raise TypeError(f"no type {entry['dtype']!r}")
            chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size(n)) for o, n in entry["chunks"]]
            properties = TensorProperties(dtype=dtype, requires_grad=entry["requires_grad"])
            described[fqn] = TensorStorageMetadata(properties, torch.Size(entry["size"]), chunks)
        places = {}
        for fqn, offset, tiles in path["items"]:
            named_tiles = [(str(key), tuple(int(n) for n in at)) for key, at in tiles]
            places[MetadataIndex(fqn, offset)] = named_tiles
        planner = rebuild(path["torch"]["planner"], lambda key: None, Target())
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise CorruptError(f"the manifest breaks a rule: {type(e).__name__}: {e}") from None
    return Metadata(described, planner, places, StorageMeta(), path["torch"].get("version"))


def load_whole(backend: Backend, step: int) -> dict[str, Any]:
    """Return the state of a sharded checkpoint, every tensor whole, on the CPU."""
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, Any] = {}
    reader = StorageReader(backend.name, step, storage_options=backend.storage_options)
    _load_state_dict(state, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return state


def restore(backend: Backend, entry: Entry, target: Path, *, force: bool) -> None:
    """Write a sharded checkpoint as a folder of torch's own, or as `target.pt` or `target.safetensors`; one state in memory."""
    state = load_whole(backend, entry.step)
    if target.suffix == ".safetensors":
        tree, leaves = flatten(state)
        del tree
        held = [in_memory(key, leaf.dtype, leaf.shape, leaf.raw) for key, leaf in leaves.items()]
        with PartialFile(target, force=force) as partial:
            partial.write(safetensors_header(held))
            for tensor in held:
                partial.write(tensor.read())
            partial.publish()
    elif target.suffix in (".pt", ".pth", ".ckpt", ".bin"):
        with PartialFile(target, force=force) as partial, os.fdopen(os.dup(partial.file.fileno()), "wb") as file:
            torch.save(state, file)
            file.flush()
            partial.publish()
    else:
        from torch.distributed.checkpoint import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import _save_state_dict

        if target.exists() and (not target.is_dir() or any(target.iterdir())) and not force:
            raise UsageError("the output exists; --force replaces it").at(path=str(target))
        _save_state_dict(state, storage_writer=FileSystemWriter(target), process_group=None, coordinator_rank=0, no_dist=True)
