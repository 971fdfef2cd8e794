"""Objects: archives whose tensors stand in a safetensors file that nobody wrote, so that every tool can unpack them."""

import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from tzip.archive import Archive, opener
from tzip.bases import Base, BaseFile, Bases, Origin, ReadTensor, Tensors
from tzip.coders.arrays import U8
from tzip.coders.errors import CorruptError, UsageError
from tzip.extents import OWN_RUN
from tzip.formats.catalogue import FILE, NO_MTIME
from tzip.formats.dtypes import Dtype
from tzip.formats.identity import block_bytes, block_digest, content_id
from tzip.formats.source import BufferSource, Source
from tzip.packing import TO_BE, Options, Packer
from tzip.store.backends import Backend
from tzip.store.manifest import MANIFEST, THIS, ObjectInfo, Record
from tzip.store.states import RESERVED
from tzip.tree import Item
from tzip.workers import Workers

STATE = "state.safetensors"  # the member that holds an object's tensors
_NONE = bytes(32)

ReadInto = Callable[[int, U8], None]  # fill an array with a tensor's bytes from that byte on


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor that can be read at any byte: from memory, or out of an object."""

    key: str
    dtype: Dtype
    shape: tuple[int, ...]
    nbytes: int
    read_into: ReadInto
    raw: U8 | None = None  # all bytes, where they lie in memory

    def read(self) -> U8:
        """Return all bytes."""
        out = np.empty(self.nbytes, np.uint8)
        self.read_into(0, out)
        return out


def in_memory(key: str, dtype: Dtype, shape: tuple[int, ...], raw: U8) -> Held:
    """Return a tensor whose bytes lie in memory."""

    def read_into(begin: int, out: U8) -> None:
        out[:] = raw[begin : begin + out.size]

    return Held(key, dtype, shape, raw.size, read_into, raw)


def in_object(record: Record, archive: Callable[[str], Archive]) -> Held:
    """Return a tensor of an object, which `archive` opens when it is read."""

    def read_into(begin: int, out: U8) -> None:
        found = archive(record.object)
        found.read_into([(row_of(found, record), begin, out)], 1)

    return Held(record.key, record.dtype, record.shape, record.nbytes, read_into)


def row_of(archive: Archive, record: Record) -> int:
    """Return the row of a tensor in its object's index. Raises CorruptError when it is not what the manifest says."""
    view = archive.tensor(record.name)
    if view.element_type is not record.dtype or view.shape != record.shape:
        raise CorruptError(
            f"the object holds {view.element_type.name} {list(view.shape)}, the manifest says {record.dtype.name} "
            f"{list(record.shape)}"
        ).at(path=archive.reader.source.name, tensor=record.name)
    return view.row


# ---------------------------------------------------------------- packing


def safetensors_header(tensors: Sequence[Held], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the header of a safetensors file of these tensors, its length before it, padded to a multiple of 8."""
    header: dict[str, object] = {RESERVED: dict(metadata)} if metadata else {}
    at = 0
    for held in tensors:
        if held.key == RESERVED:
            raise UsageError(f"no tensor can be called {RESERVED}")
        end = at + held.nbytes
        header[held.key] = {"dtype": held.dtype.name, "shape": list(held.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class _Tensors(Source):
    """A safetensors file of tensors that lie elsewhere."""

    def __init__(self, tensors: Sequence[Held]) -> None:
        self.header = safetensors_header(tensors)
        self.tensors = tensors
        self.ends = list(accumulate((t.nbytes for t in tensors), initial=len(self.header)))
        super().__init__(STATE, self.ends[-1])

    def read_at(self, offset: int, n: int) -> bytes:
        out = np.empty(max(0, min(n, self.size - offset)), np.uint8)
        self.readinto_at(offset, memoryview(out))
        return out.tobytes()

    def readinto_at(self, offset: int, buffer: memoryview) -> int:
        out = np.frombuffer(buffer, np.uint8)
        n = max(0, min(out.size, self.size - offset))
        done = 0
        while done < n:
            at = offset + done
            if at < len(self.header):
                part = np.frombuffer(self.header, np.uint8, min(n - done, len(self.header) - at), at)
                out[done : done + part.size] = part
                done += part.size
                continue
            i = bisect_right(self.ends, at) - 1
            low = at - self.ends[i]
            size = min(n - done, self.tensors[i].nbytes - low)
            self.tensors[i].read_into(low, out[done : done + size])
            done += size
        return n


class _HeldFile(BaseFile):
    """The tensors of one object, read from wherever they are held."""

    def __init__(self, archive_id: str, held: Mapping[str, Held]) -> None:
        super().__init__(archive_id, archive_id)
        self._origin = Origin(f"{archive_id}.tzip", _NONE, bytes.fromhex(archive_id))
        self.held = held
        for name, tensor in held.items():
            self.tensors[name] = Base(self, name, tensor.dtype, tensor.shape, tensor.nbytes)

    def origin(self) -> Origin:
        return self._origin

    def read_into(self, base: Base, begin: int, out: U8) -> None:
        self.held[base.name].read_into(begin, out)


class HeldBases(Bases):
    """Bases that the store has at hand. `chosen` says, after packing, which tensor leans on which."""

    def __init__(self, earlier: Iterable[tuple[Record, Held]]) -> None:
        super().__init__(None, opener(None))
        by_object: dict[str, dict[str, Held]] = {}
        self._records: dict[tuple[str, str], Record] = {}
        for record, held in earlier:
            by_object.setdefault(record.object, {})[record.name] = held
            self._records[record.object, record.name] = record
        self._held = [_HeldFile(archive_id, tensors) for archive_id, tensors in by_object.items()]
        self.chosen: dict[str, Record] = {}

    def files(self) -> list[BaseFile]:
        """Return what is held, by objects."""
        return list(self._held)

    def match(self, tensors: Tensors, read: ReadTensor, own: str = "") -> dict[int, Base]:
        """Return the bases of tensors, as `Bases.match` does, and remember them."""
        found = super().match(tensors, read, own)
        for i, base in found.items():
            self.chosen[tensors[i][0]] = self._records[base.file.path, base.name]
        return found


class ObjectBases(Bases):
    """The files in objects of a store, to pack differences from them."""

    def __init__(self, backend: Backend, archive_ids: Sequence[str]) -> None:
        far = backend.library
        paths = [] if far else [path for i in archive_ids if isinstance(path := backend.archive(i), Path)]
        super().__init__(far or paths, opener(far or paths), chain=TO_BE)
        self._ids = archive_ids if far else []

    def files(self) -> list[BaseFile]:
        """Return the files, with tensors, in the objects."""
        return [file for i in self._ids for file in self.held(i)] if self._ids else super().files()


@dataclass(frozen=True, slots=True)
class Written:
    """An object that is durable: its id, its bytes, and the records of its tensors."""

    archive_id: str
    info: ObjectInfo
    records: Mapping[str, Record]


Describe = Callable[[Mapping[str, Record], ObjectInfo], bytes]  # the manifest, from the records of "this" object


def write_object(
    backend: Backend,
    tensors: Sequence[Held],
    contents: Mapping[str, str],
    earlier: Iterable[tuple[Record, Held]],
    describe: Describe | None,
    *,
    level: str,
    threads: int,
    files: Sequence[Item] = (),
    bases: Sequence[str] = (),
) -> Written:
    """Pack tensors, as differences from earlier ones where that pays, into a new object, with the manifest when there is one.

    `contents`: the content ids, in hexadecimal. `earlier`: records of what differences may be from, and the tensors.
    `files`: members to pack instead, as they are, with `bases`, the ids of objects that they may be differences from.
    """
    held = HeldBases(earlier)
    of_objects = ObjectBases(backend, bases) if bases else None
    # Strict: tensors that nobody could find again, for the header breaks a rule, must not be saved.
    options = Options(level, threads, sha256=bool(files), strict=not files)
    with backend.new_object() as file, Workers(threads) as workers:
        packer = Packer(file.file, workers, options, of_objects or held)
        try:
            if tensors:
                source = _Tensors(tensors)
                packer.add(Item(STATE, FILE, 0o644, NO_MTIME, source.size, lambda: source))
            for item in files:
                packer.add(item)
            depth = _depths(tensors, held.chosen)
            records = {
                t.key: Record(t.key, THIS, t.key, t.dtype, t.shape, contents[t.key], depth[t.key]) for t in tensors
            }
            raw = sum(t.nbytes for t in tensors) if tensors else packer.bytes_in
            info = ObjectInfo(tuple(sorted(packer.archives())), 0, raw)
            if describe is not None:
                data = describe(records, info)
                packer.sha256 = True  # all else hangs on it: it is proven by more than a sum of 64 bits
                packer.add(Item(MANIFEST, FILE, 0o644, NO_MTIME, len(data), lambda: BufferSource(data)))
            archive_id = packer.finish().hex()
        finally:
            packer.close()
        size = packer.writer.position
        backend.publish_object(file, archive_id)
    return Written(archive_id, ObjectInfo(info.leans, size, raw), records)


def _depths(tensors: Sequence[Held], bases: Mapping[str, Record]) -> dict[str, int]:
    """Return how many archives lie below each tensor. Small ones share chunks, whose bases are all read for any of them."""
    found = {t.key: bases[t.key].depth + 1 if t.key in bases else 0 for t in tensors}
    shared: dict[tuple[int, str], list[str]] = {}
    for t in tensors:
        if found[t.key] and t.nbytes < OWN_RUN * t.dtype.width:
            shared.setdefault((t.dtype.width, t.dtype.coding), []).append(t.key)
    for keys in shared.values():
        found.update(dict.fromkeys(keys, max(found[key] for key in keys)))
    return found


def content_ids(tensors: Sequence[Held], workers: Workers) -> dict[str, str]:
    """Return the content id of each tensor, in hexadecimal, hashing blocks of 2^20 elements on all threads."""
    jobs = [(t, at) for t in tensors for at in range(0, t.nbytes, block_bytes(t.dtype))]

    def digest(job: tuple[Held, int]) -> bytes:
        tensor, at = job
        size = min(block_bytes(tensor.dtype), tensor.nbytes - at)
        if tensor.raw is not None:
            return block_digest(tensor.raw[at : at + size])
        block = np.empty(size, np.uint8)
        tensor.read_into(at, block)
        return block_digest(block)

    digests: dict[str, list[bytes]] = {t.key: [] for t in tensors}
    for (tensor, _), found in zip(jobs, workers.map(digest, jobs), strict=True):
        digests[tensor.key].append(found)
    return {t.key: content_id(t.dtype, t.shape, digests[t.key]).hex() for t in tensors}
