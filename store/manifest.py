"""The manifest of a checkpoint: which tensor is where, under which content id, and how the state is put together
(STORE.md, section 3). It is a member of the checkpoint's own archive.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tzip.coders.errors import CorruptError
from tzip.formats.dtypes import BY_NAME, Dtype
from tzip.store.journal import KINDS
from tzip.store.sealing import VERSION, as_count, as_id, as_object, as_text, sealed, unsealed

MANIFEST = "tzip-checkpoint.json"  # the member
THIS = ""  # stands for the archive that holds the manifest, whose id it cannot know
MAX_OBJECTS = 1 << 20


@dataclass(frozen=True, slots=True)
class Record:
    """Where a tensor is: the object, its name there, and what it is. `depth` counts the archives below that it leans on."""

    key: str
    object: str
    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    content: str
    depth: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.dtype.nbytes(math.prod(self.shape))


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An archive that the checkpoint needs: what it leans on itself, its bytes, and those of its tensors when decoded."""

    leans: tuple[str, ...] = ()
    size: int = 0
    raw: int = 0


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that a checkpoint is. `objects` names every archive that reading it needs, those too that others lean on."""

    step: int
    kind: str
    time_ns: int
    writer: str
    note: str
    metrics: Mapping[str, float]
    records: Mapping[str, Record]
    objects: Mapping[str, ObjectInfo]
    tree: Any = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    seq: int = 0  # that of the next head, as its writer saw it: it orders manifests when the head is lost

    @property
    def raw(self) -> int:
        """Bytes of all tensors."""
        return sum(r.nbytes for r in self.records.values())

    def write(self) -> bytes:
        """Return the manifest's bytes."""
        ids = list(self.objects)
        at = {archive_id: i for i, archive_id in enumerate(ids)}
        tensors = [
            [r.key, at[r.object], r.name, r.dtype.name, list(r.shape), r.content, r.depth] for r in self.records.values()
        ]
        body = {
            "tzip_checkpoint": VERSION,
            "step": self.step,
            "kind": self.kind,
            "time_ns": self.time_ns,
            "writer": self.writer,
            "note": self.note,
            "metrics": {k: v if math.isfinite(v) else repr(v) for k, v in self.metrics.items()},
            "objects": [[i, [at[lean] for lean in o.leans], o.size, o.raw] for i, o in self.objects.items()],
            "tensors": tensors,
            "seq": self.seq,
            "tree": self.tree,
            "extra": dict(self.extra),
        }
        return sealed(body)

    @staticmethod
    def read(data: bytes, path: str, archive_id: str) -> "Manifest":
        """Prove and return the manifest of the archive of that id, whose name then stands for "this"."""
        body = unsealed(data, "tzip_checkpoint", path)
        try:
            rows = body["objects"]
            if len(rows) > MAX_OBJECTS:
                raise ValueError(f"{len(rows)} objects")
            ids = [archive_id if row[0] == THIS else as_id(row[0]) for row in rows]
            if len(set(ids)) != len(ids) or archive_id not in ids:
                raise ValueError("an object is named twice, or its own is not")
            objects = {
                i: ObjectInfo(tuple(_at(ids, lean) for lean in leans), as_count(size), as_count(raw))
                for i, (_, leans, size, raw) in zip(ids, rows, strict=True)
            }
            records = {}
            for key, at, name, dtype, shape, content, depth in body["tensors"]:
                if key in records:
                    raise ValueError(f"tensor {key!r} is there twice")
                dims = tuple(as_count(n) for n in shape)
                if len(dims) > 255 or math.prod(dims) >= 1 << 54:
                    raise ValueError(f"tensor {key!r} has a shape that no tensor has")
                records[as_text(key)] = Record(
                    key, _at(ids, at), as_text(name), BY_NAME[dtype], dims, as_id(content), as_count(depth)
                )
            if body["kind"] not in KINDS:
                raise ValueError(f"kind {body['kind']!r}")
            return Manifest(
                as_count(body["step"]),
                body["kind"],
                as_count(body["time_ns"]),
                as_text(body["writer"]),
                as_text(body["note"]),
                {as_text(k): float(v) for k, v in body["metrics"].items()},
                records,
                objects,
                body["tree"],
                as_object(body["extra"]),
                as_count(body["seq"]),
            )
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as e:
            raise CorruptError(f"the manifest breaks a rule: {e}").at(path=path) from None


def needed(records: Iterable[Record], objects: Mapping[str, ObjectInfo], *own: str) -> dict[str, ObjectInfo]:
    """Return what reading these tensors, and archives of `own`, needs: their objects and all that those lean on."""
    found: dict[str, ObjectInfo] = {}
    waiting = [*own, *dict.fromkeys(r.object for r in records)]
    while waiting:
        archive_id = waiting.pop()
        if archive_id not in found:
            found[archive_id] = objects[archive_id]
            waiting += found[archive_id].leans
    return found


def depths(objects: Mapping[str, ObjectInfo]) -> dict[str, int]:
    """Return how many archives lie below each of these objects, in the longest chain. Raises CorruptError for a cycle.

    This, not the depth of a tensor, says what may be a base: an object is needed with all that it leans on. Were tensors
    judged alone, two that change in turns would tie every object to the one before it, without end.
    """
    found: dict[str, int] = {}
    entered: set[str] = set()
    for start in objects:
        waiting = [start]
        while waiting:
            at = waiting[-1]
            below = [i for i in objects[at].leans if i not in found]
            if at in found or not below:
                found[waiting.pop()] = max((found[i] + 1 for i in objects[at].leans), default=0)
            elif at in entered:
                raise CorruptError("objects lean on each other in a circle")
            else:
                entered.add(at)
                waiting += below
    return found


def named(
    archive_id: str, info: ObjectInfo, records: Mapping[str, Record], objects: Mapping[str, ObjectInfo]
) -> tuple[dict[str, Record], dict[str, ObjectInfo]]:
    """Return records and objects with "this" called by its id, once that is known."""
    return (
        {k: replace(r, object=archive_id) if r.object == THIS else r for k, r in records.items()},
        {archive_id if i == THIS else i: info if i == THIS else o for i, o in objects.items()},
    )


def _at(ids: list[str], place: Any) -> str:
    if type(place) is not int or not 0 <= place < len(ids):
        raise ValueError(f"object {place!r} of {len(ids)}")
    return ids[place]
