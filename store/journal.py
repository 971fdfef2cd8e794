"""Which checkpoints a store has: the head, one small file that is replaced in one step, and pages of older entries that never
change (STORE.md, section 2).

Everything read here is proven: types, ranges, sums. A damaged head is an error, never fewer checkpoints.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tzip.coders.errors import ConflictError, CorruptError
from tzip.store.backends import HEAD, LocalFolder
from tzip.store.sealing import VERSION, as_count, as_id, as_object, as_text, canonical, sealed, unsealed

PAGE = 128  # entries of a page
_MAX_RECENT = 2 * PAGE
MAX_STEP = (1 << 63) - 1
KINDS = ("state", "files", "sharded", "published")


@dataclass(frozen=True, slots=True)
class Entry:
    """One checkpoint: the archive that holds its manifest, and what `log` shows of it.

    `seq` is the generation of the head that first named it: it orders checkpoints whatever clocks say. `time_ns` is nanoseconds
    since 1970; `raw` the bytes of its tensors or files, `stored` those that saving it added.
    """

    step: int
    object: str
    time_ns: int
    kind: str = "state"
    writer: str = ""
    note: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    raw: int = 0
    stored: int = 0
    seq: int = 0


@dataclass(frozen=True, slots=True)
class Page:
    """Entries that stand in a file of their own; `low` and `high` are the smallest and largest step among them."""

    name: str
    low: int
    high: int
    count: int


@dataclass(frozen=True, slots=True)
class Head:
    """What a store is at one moment. Entries stand in the order in which they were saved, pages first."""

    generation: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    pages: tuple[Page, ...] = ()
    recent: tuple[Entry, ...] = ()
    tags: Mapping[str, int] = field(default_factory=dict)
    retired: Mapping[str, int] = field(default_factory=dict)  # objects that no checkpoint needs, and since when (ns)

    def write(self) -> bytes:
        """Return the bytes of the head."""
        body = {
            "tzip_store": VERSION,
            "generation": self.generation,
            "config": dict(self.config),
            "pages": [[p.name, p.low, p.high, p.count] for p in self.pages],
            "recent": [_entry_json(e) for e in self.recent],
            "tags": dict(self.tags),
            "retired": dict(self.retired),
        }
        return sealed(body)

    @staticmethod
    def read(data: bytes, path: str) -> "Head":
        """Prove and return a head."""
        body = unsealed(data, "tzip_store", path)
        try:
            pages = tuple(Page(as_id(n), as_count(low), as_count(high), as_count(c)) for n, low, high, c in body["pages"])
            return Head(
                as_count(body["generation"]),
                _config(body["config"]),
                pages,
                tuple(_entry(e) for e in body["recent"]),
                {as_text(k): as_count(v) for k, v in body["tags"].items()},
                {as_id(k): as_count(v) for k, v in body["retired"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
            raise CorruptError(f"the head of the store breaks a rule: {e}").at(path=path) from None


class Journal:
    """A head with its pages, read when they are asked for. `instead` stands in for one that cannot be read."""

    def __init__(self, backend: LocalFolder, instead: Head | None = None) -> None:
        self.backend = backend
        self.raw = backend.read_head()
        self.path = str(backend.root / HEAD)
        if instead is not None:
            self.head = instead
            return
        if self.raw is None:
            raise CorruptError("the store has no head; repair makes one from its objects").at(path=self.path)
        self.head = Head.read(self.raw, self.path)

    def entries(self) -> Iterator[Entry]:
        """Yield all checkpoints, the newest first."""
        yield from reversed(self.head.recent)
        for page in reversed(self.head.pages):
            yield from reversed(self._page(page))

    def readable(self) -> list[Entry]:
        """Return what the pages that are whole, and the head, have, the oldest first."""
        found: list[Entry] = []
        for page in self.head.pages:
            with contextlib.suppress(CorruptError):
                found += self._page(page)
        return [*found, *self.head.recent]

    def _page(self, page: Page) -> tuple[Entry, ...]:
        path = str(self.backend.pages / f"{page.name}.json")
        try:
            data = self.backend.read_page(page.name)
        except FileNotFoundError:
            raise CorruptError("a page of the store is missing").at(path=path) from None
        if hashlib.sha256(data).hexdigest() != page.name:
            raise CorruptError("a page is not the one that the head names").at(path=path)
        try:
            entries = tuple(_entry(e) for e in json.loads(data)["entries"])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as e:
            raise CorruptError(f"a page breaks a rule: {e}").at(path=path) from None
        if len(entries) != page.count or not all(page.low <= e.step <= page.high for e in entries):
            raise CorruptError("a page is not what the head says").at(path=path)
        return entries

    def find(self, step: int) -> Entry | None:
        """Return the checkpoint of a step, None when there is none; reads only pages that may hold it."""
        for entry in reversed(self.head.recent):
            if entry.step == step:
                return entry
        for page in reversed(self.head.pages):
            if page.low <= step <= page.high:
                for entry in self._page(page):
                    if entry.step == step:
                        return entry
        return None

    def latest(self) -> Entry | None:
        """Return the checkpoint that was saved last."""
        return next(self.entries(), None)

    def commit(self, head: Head, objects: Iterable[str] = ()) -> None:
        """Make `head` the store's, in one step, when these objects are all there.

        Raises StaleHeadError when another process has replaced the head that this journal read, ConflictError when an object
        or a page has been swept.
        """
        with self.backend.committing():
            there = set(self.head.pages)
            for page in head.pages:
                if page not in there and not self.backend.has_page(page.name):
                    raise ConflictError(f"page {page.name} was removed before the head named it").at(path=self.path)
            for archive_id in objects:
                if self.backend.object_size(archive_id) is None:
                    raise ConflictError(f"object {archive_id} was removed while the checkpoint was written").at(
                        path=self.path
                    )
            self.backend.put_head(head.write(), self.raw)

    # ---- heads to be

    def with_entry(self, entry: Entry, tags: Iterable[str] = (), without: Collection[int] = ()) -> Head:
        """Return the next head, with one more checkpoint; one of the same step gives way to it, and those of the steps
        `without` go.
        """
        base = self.head
        if without or self.find(entry.step) is not None:
            gone = {entry.step, *without}
            base = self.with_entries([e for e in reversed(list(self.entries())) if e.step not in gone])
        recent = (*base.recent, replace(entry, seq=self.head.generation + 1))
        pages = base.pages
        if len(recent) > _MAX_RECENT:
            pages = (*pages, self._put(recent[:PAGE]))
            recent = recent[PAGE:]
        return replace(
            base,
            generation=self.head.generation + 1,
            pages=pages,
            recent=recent,
            # Those of a step that is replaced, too.
            tags={**{k: v for k, v in self.head.tags.items() if v not in without}, **dict.fromkeys(tags, entry.step)},
        )

    def with_entries(self, entries: Sequence[Entry]) -> Head:
        """Return the next head, with these checkpoints, the oldest first; tags of others go."""
        pages = []
        at = 0
        while len(entries) - at > _MAX_RECENT:
            pages.append(self._put(entries[at : at + PAGE]))
            at += PAGE
        steps = {e.step for e in entries}
        tags = {k: v for k, v in self.head.tags.items() if v in steps}
        return replace(
            self.head, generation=self.head.generation + 1, pages=tuple(pages), recent=tuple(entries[at:]), tags=tags
        )

    def _put(self, entries: Sequence[Entry]) -> Page:
        data = canonical({"tzip_page": VERSION, "entries": [_entry_json(e) for e in entries]})
        name = hashlib.sha256(data).hexdigest()
        self.backend.put_page(name, data)
        steps = [e.step for e in entries]
        return Page(name, min(steps), max(steps), len(entries))


def _config(value: Any) -> dict[str, Any]:
    config = as_object(value)
    return {**config, "level": as_text(config["level"]), "max_chain": as_count(config["max_chain"])}


def _entry_json(e: Entry) -> list[Any]:
    metrics = {k: v if math.isfinite(v) else repr(v) for k, v in e.metrics.items()}
    return [e.step, e.object, e.time_ns, e.kind, e.writer, e.note, metrics, e.raw, e.stored, e.seq]


def _entry(row: Any) -> Entry:
    step, archive_id, time_ns, kind, writer, note, metrics, raw, stored, seq = row
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}")
    read = {as_text(k): float(v) for k, v in metrics.items()}
    sizes = as_count(raw), as_count(stored), as_count(seq)
    return Entry(as_count(step), as_id(archive_id), as_count(time_ns), kind, as_text(writer), as_text(note), read, *sizes)
