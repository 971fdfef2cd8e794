"""What a published checkpoint says beside its tensors (STORE.md, section 7): which state its differences are from, so that who
holds that state needs nothing else, and where they are.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tzip.coders.errors import CorruptError, UsageError
from tzip.store.journal import Entry, Journal
from tzip.store.manifest import Manifest, ObjectInfo, Record
from tzip.store.sealing import as_count, as_id, canonical
from tzip.store.states import Leaf, flatten

KIND = "published"
KEPT = 64  # published checkpoints that a store keeps, unless it is told otherwise
_DOMAIN = b"tzip state 1\0"
_FRAMEWORKS = ("np", "pt", "jax", "cupy")


@dataclass(frozen=True, slots=True)
class Delta:
    """Where the differences of a published checkpoint are, and from which one: its step, and the id of its state.

    `object` is the archive; `bytes` are those of it.
    """

    object: str
    bytes: int
    step: int
    state: str


def state_id(contents: Mapping[str, str]) -> str:
    """Return what names a whole state: the SHA-256 of the names of its tensors and their content ids."""
    return hashlib.sha256(_DOMAIN + canonical(sorted(contents.items()))).hexdigest()


def contents_of(records: Mapping[str, Record]) -> dict[str, str]:
    """Return the content ids of tensors."""
    return {key: record.content for key, record in records.items()}


def extra_of(base: Entry | None, records: Mapping[str, Record], delta: str) -> dict[str, Any]:
    """Return what the manifest says: `base` and `records` are what was published before, `delta` the object that has the
    differences from it when it is not the manifest's own.
    """
    if base is None:
        return {KIND: {"from": None, "delta": ""}}
    return {KIND: {"from": [base.step, state_id(contents_of(records))], "delta": delta}}


def delta_of(manifest: Manifest, entry: Entry, path: str) -> Delta | None:
    """Return where the differences of a published checkpoint are, None when it stands by itself. Raises CorruptError."""
    try:
        told = manifest.extra[KIND]
        if told["from"] is None:
            return None
        step, state = told["from"]
        own = told["delta"] == ""
        archive_id = entry.object if own else as_id(told["delta"])
        size = entry.stored if own else manifest.objects[archive_id].size
        return Delta(archive_id, size, as_count(step), as_id(state))
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        raise CorruptError(f"the manifest of a published checkpoint breaks a rule: {e}").at(path=path) from None


def flatten_weights(weights: Any) -> tuple[Any, dict[str, Leaf]]:
    """Return the tree and the tensors of weights: a mapping of names to tensors, or a module that has one as its state_dict.

    Raises UsageError for anything else: who follows them patches tensors by their names.
    """
    named = weights.state_dict() if hasattr(weights, "state_dict") else weights
    if not isinstance(named, Mapping):
        raise UsageError(f"weights are a mapping of names to tensors, not a {type(weights).__name__}")
    tree, leaves = flatten(named)
    for key, node in tree[1:]:
        plain = isinstance(key, str) and isinstance(node, list) and node[:2] == ["t", key]
        if not plain or node[2] not in _FRAMEWORKS or node[3]:
            raise UsageError("weights are tensors by their names, of types that safetensors files have").at(tensor=str(key))
    return tree, leaves


def superseded(journal: Journal, keep: int | None, step: int, tags: Iterable[str]) -> list[int]:
    """Return the steps of published checkpoints that are one too many once `step` is there; tagged ones stay."""
    if keep is None:
        return []
    held = {s for name, s in journal.head.tags.items() if name not in set(tags)}
    steps: Sequence[int] = [e.step for e in journal.entries() if e.kind == KIND and e.step != step]
    return [s for s in steps[keep - 1 :] if s not in held]


def beside(objects: Mapping[str, ObjectInfo], delta: str, info: ObjectInfo) -> dict[str, ObjectInfo]:
    """Return the objects of a checkpoint with that of the differences, which it does not need itself: that leans on nothing
    here, or every checkpoint would need all before it.
    """
    return {**objects, delta: ObjectInfo((), info.size, info.raw)}
