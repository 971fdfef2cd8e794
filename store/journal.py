"""Which checkpoints a store has: the head, one small file that is replaced in one step, and pages of older entries that never
change (STORE.md, section 2).

Everything read here is proven: types, ranges, sums. A damaged head is an error, never fewer checkpoints.
"""

import contextlib
import hashlib
import json
import math
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from tzip.coders.errors import ConflictError, CorruptError
from tzip.store.backends import Backend
from tzip.store.sealing import VERSION, as_count, as_id, as_object, as_text, canonical, sealed, unsealed

PAGE = 32  # entries of a page, and pages of a page of pages
_MAX_RECENT = 2 * PAGE
_MAX_HEIGHT = 8
MAX_STEP = (1 << 63) - 1
KINDS = ("state", "files", "sharded", "published")
T = TypeVar("T")


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
    """Entries that stand in a file of their own, `count` of them; `low` and `high` are their smallest and largest step.

    With a `height` it names pages, of lower heights, and the entries are theirs: a head with every page in it would grow with
    the run, and is written at each save (10,000 checkpoints: 33 kB, 6 of 17 milliseconds).
    """

    name: str
    low: int
    high: int
    count: int
    height: int = 0

    @staticmethod
    def read(row: Any, below: int = _MAX_HEIGHT + 1) -> "Page":
        """Prove a row of the head, or of a page of that height."""
        name, *numbers = row
        low, high, count, height = (as_count(n) for n in numbers)
        if height >= below:
            raise ValueError(f"a page of height {height}")
        return Page(as_id(name), low, high, count, height)

    def row(self) -> list[Any]:
        """Return what stands for it."""
        return [self.name, self.low, self.high, self.count, self.height]


@dataclass(frozen=True, slots=True)
class Head:
    """What a store is at one moment. Entries stand in the order in which they were saved, pages first."""

    generation: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    pages: tuple[Page, ...] = ()
    recent: tuple[Entry, ...] = ()
    tags: Mapping[str, int] = field(default_factory=dict)
    retired: Mapping[str, int] = field(default_factory=dict)  # what no checkpoint needs, and since when (ns)
    condemned: Mapping[str, int] = field(default_factory=dict)  # what is being removed: no later head may name it (ns)

    def write(self) -> bytes:
        """Return the bytes of the head."""
        body = {
            "tzip_store": VERSION,
            "generation": self.generation,
            "config": dict(self.config),
            "pages": [p.row() for p in self.pages],
            "recent": [_entry_json(e) for e in self.recent],
            "tags": dict(self.tags),
            "retired": dict(self.retired),
        }
        return sealed({**body, "condemned": dict(self.condemned)} if self.condemned else body)

    @staticmethod
    def read(data: bytes, path: str) -> "Head":
        """Prove and return a head."""
        body = unsealed(data, "tzip_store", path)
        try:
            pages = tuple(Page.read(row) for row in body["pages"])
            return Head(
                as_count(body["generation"]),
                _config(body["config"]),
                pages,
                tuple(_entry(e) for e in body["recent"]),
                {as_text(k): as_count(v) for k, v in body["tags"].items()},
                {as_id(k): as_count(v) for k, v in body["retired"].items()},
                {as_id(k): as_count(v) for k, v in body.get("condemned", {}).items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
            raise CorruptError(f"the head of the store breaks a rule: {e}").at(path=path) from None


class Journal:
    """A head with its pages, read when they are asked for. `instead` stands in for one that cannot be read."""

    def __init__(self, backend: Backend, instead: Head | None = None) -> None:
        self.backend = backend
        self.raw = backend.read_head()
        self.path = backend.head_name
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
            yield from self._below(page)

    def _below(self, page: Page) -> Iterator[Entry]:
        """Yield the entries of a page and of those that it names, the newest first."""
        if not page.height:
            yield from reversed(self._entries(page))
            return
        for lower in reversed(self._pages(page)):
            yield from self._below(lower)

    def page_names(self) -> set[str]:
        """Return the names of all pages."""
        return {page.name for page in self._with_lower(self.head.pages)}

    def _with_lower(self, pages: Iterable[Page]) -> Iterator[Page]:
        for page in pages:
            yield page
            if page.height:
                yield from self._with_lower(self._pages(page))

    def readable(self) -> list[Entry]:
        """Return what the pages that are whole, and the head, have, the oldest first."""
        found: list[Entry] = []
        waiting = [*reversed(self.head.pages)]
        while waiting:
            page = waiting.pop()
            with contextlib.suppress(CorruptError):
                if page.height:
                    waiting += reversed(self._pages(page))
                else:
                    found += self._entries(page)
        return [*found, *self.head.recent]

    def _entries(self, page: Page) -> tuple[Entry, ...]:
        entries = self._read(page, "entries", _entry)
        self._check(page, [e.step for e in entries], [e.step for e in entries], len(entries))
        return entries

    def _pages(self, page: Page) -> tuple[Page, ...]:
        pages = self._read(page, "pages", lambda row: Page.read(row, page.height))
        self._check(page, [p.low for p in pages], [p.high for p in pages], sum(p.count for p in pages))
        return pages

    def _check(self, page: Page, lows: list[int], highs: list[int], count: int) -> None:
        if count != page.count or not lows or page.low > min(lows) or page.high < max(highs):
            raise CorruptError("a page is not what the head says").at(path=self._path(page))

    def _path(self, page: Page) -> str:
        return self.backend.page_name(page.name)

    def _read(self, page: Page, key: str, parse: Callable[[Any], T]) -> tuple[T, ...]:
        path = self._path(page)
        try:
            data = self.backend.read_page(page.name)
        except FileNotFoundError:
            raise CorruptError("a page of the store is missing").at(path=path) from None
        if hashlib.sha256(data).hexdigest() != page.name:
            raise CorruptError("a page is not the one that the head names").at(path=path)
        try:
            return tuple(parse(row) for row in json.loads(data)[key])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as e:
            raise CorruptError(f"a page breaks a rule: {e}").at(path=path) from None

    def find(self, step: int) -> Entry | None:
        """Return the checkpoint of a step, None when there is none; reads only pages that may hold it."""
        for entry in reversed(self.head.recent):
            if entry.step == step:
                return entry
        waiting = [*self.head.pages]
        while waiting:
            page = waiting.pop()
            if page.low <= step <= page.high:
                if page.height:
                    waiting += self._pages(page)
                    continue
                for entry in self._entries(page):
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
            condemned = self.head.condemned
            waiting = [page for page in head.pages if page not in there]
            while waiting:
                page = waiting.pop()
                if page.name in condemned or not self.backend.has_page(page.name):
                    raise ConflictError(f"page {page.name} was removed before the head named it").at(path=self.path)
                if page.height:
                    waiting += [lower for lower in self._pages(page) if lower not in there]
            wanted = set(objects)
            for archive_id in (*(wanted & condemned.keys()), *self.backend.missing(wanted)):
                raise ConflictError(f"object {archive_id} was removed while the checkpoint was written").at(path=self.path)
            self.backend.put_head(head.write(), self.raw)

    # ---- heads to be

    def with_entry(self, entry: Entry, tags: Iterable[str] = (), without: Collection[int] = ()) -> Head:
        """Return the next head, with one more checkpoint; one of the same step gives way to it, and those of the steps
        `without` go.
        """
        base, gone = self.head, {entry.step, *without}
        recent_ones = {e.step for e in base.recent}
        if any(self.find(step) is not None for step in gone - recent_ones):  # pages are written anew only where they must be
            base = self.with_entries([e for e in reversed(list(self.entries())) if e.step not in gone])
        elif gone & recent_ones:
            base = replace(base, recent=tuple(e for e in base.recent if e.step not in gone))
        recent = (*base.recent, replace(entry, seq=self.head.generation + 1))
        pages = base.pages
        if len(recent) > _MAX_RECENT:
            pages = self._folded([*pages, self._put(recent[:PAGE])])
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
        pages: tuple[Page, ...] = ()
        at = 0
        while len(entries) - at > _MAX_RECENT:
            pages = self._folded([*pages, self._put(entries[at : at + PAGE])])
            at += PAGE
        steps = {e.step for e in entries}
        tags = {k: v for k, v in self.head.tags.items() if v in steps}
        return replace(
            self.head, generation=self.head.generation + 1, pages=pages, recent=tuple(entries[at:]), tags=tags
        )

    def _put(self, entries: Sequence[Entry]) -> Page:
        steps = [e.step for e in entries]
        return self._put_page("entries", [_entry_json(e) for e in entries], min(steps), max(steps), len(entries), 0)

    def _folded(self, pages: list[Page]) -> tuple[Page, ...]:
        """Return pages, put the oldest of a height into one of the next as soon as there are twice as many as it takes."""
        for height in range(_MAX_HEIGHT):
            level = [p for p in pages if p.height == height]
            if len(level) < 2 * PAGE:
                break
            first, some = pages.index(level[0]), level[:PAGE]
            pages[first : first + PAGE] = [
                self._put_page(
                    "pages", [p.row() for p in some], min(p.low for p in some), max(p.high for p in some),
                    sum(p.count for p in some), height + 1,
                )
            ]  # fmt: skip
        return tuple(pages)

    def _put_page(self, key: str, rows: list[Any], low: int, high: int, count: int, height: int) -> Page:
        body: dict[str, Any] = {"tzip_page": VERSION, key: rows}
        if not self.backend.locks:  # a page that is being removed must not be made again
            body["nonce"] = uuid.uuid4().hex
        data = canonical(body)
        name = hashlib.sha256(data).hexdigest()
        self.backend.put_page(name, data)
        return Page(name, low, high, count, height)


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
