"""What was packed from what: one receipt for each model, written once, and the folder that archives and receipts lie in.

    OUT/archives/<archive id>.tzip     ordinary archives, by what they hold
    OUT/receipts/<key>.json            by what went in (`models.key_of`)
    OUT/work/                          what is being written; anybody may remove what is old

Both are made under other names and get theirs in one step, if it is free. So whoever dies leaves nothing that is half
there, and of two that do the same work the second finds that it is done.
"""

import contextlib
import json
import os
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tzip.coders.errors import CorruptError, UsageError
from tzip.formats.atomic import PartialFile

_VERSION = 1
_MAX_BYTES = 256 << 20  # of a receipt: one of a million files
_OLD = 7 * 86400.0  # seconds after which what lies in work/ is a dead writer's


@dataclass(frozen=True, slots=True)
class Input:
    """A file, folder or link that was packed: its name in the archive, bytes, time and, of files, SHA-256."""

    path: str
    size: int
    mtime_ns: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of a model. `base`: the archive that it leans on, "" for none; `depth`: archives that it is read through."""

    model: str
    key: str
    inputs: list[Input]
    level: str
    writer: str
    archive: str
    bytes_in: int
    bytes_out: int
    seconds: float
    base: str = ""
    base_model: str = ""
    depth: int = 0
    warnings: list[str] = field(default_factory=list)

    def write(self) -> bytes:
        """Return the file's bytes."""
        return (json.dumps({"tzip_receipt": _VERSION} | asdict(self), indent=1) + "\n").encode()

    @classmethod
    def read(cls, data: bytes, path: str) -> "Receipt":
        """Return what a file says. Raises CorruptError."""
        try:
            told = json.loads(data)
            if told.pop("tzip_receipt") != _VERSION:
                raise CorruptError("a receipt of another version of tzip").at(path=path)
            inputs = [Input(**one) for one in told.pop("inputs")]
            receipt = cls(inputs=inputs, **told)
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            raise CorruptError(f"no receipt: {e}").at(path=path) from None
        kinds: dict[str, type] = {"model": str, "key": str, "level": str, "writer": str, "base_model": str}
        kinds |= {"bytes_in": int, "bytes_out": int, "depth": int, "warnings": list}
        ids = [receipt.archive, *([receipt.base] if receipt.base != "" else [])]
        if any(type(getattr(receipt, name)) is not kind for name, kind in kinds.items()) or not all(map(_is_id, ids)):
            raise CorruptError("no receipt: a value is of another kind").at(path=path)
        return receipt


def _is_id(text: Any) -> bool:
    return isinstance(text, str) and len(text) == 64 and set(text) <= set("0123456789abcdef")


class Shelf:
    """The folder OUT."""

    def __init__(self, root: Any) -> None:
        self.root = Path(root)
        self.archives = self.root / "archives"
        self.receipts = self.root / "receipts"
        self.work = self.root / "work"

    def make(self) -> None:
        """Make the folders that are missing, and remove what writers left that died long ago."""
        for folder in (self.archives, self.receipts, self.work):
            folder.mkdir(parents=True, exist_ok=True)
        for path in self.work.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _OLD:
                    path.unlink()

    def archive_path(self, archive_id: str) -> Path:
        """Return the path of an archive."""
        return self.archives / f"{archive_id}.tzip"

    def find(self, key: str) -> Receipt | None:
        """Return the receipt of a key if it can be read, and its archive is there with its size, and what that leans on."""
        try:
            receipt = self._read(self.receipts / f"{key}.json")
        except CorruptError:
            return None
        if receipt is None or receipt.key != key or self._size(receipt.archive) != receipt.bytes_out:
            return None
        return receipt if not receipt.base or self._size(receipt.base) is not None else None

    def all(self, *, strict: bool) -> list[Receipt]:
        """Return all receipts, in the order of their names; one that cannot be read is left out, or raises CorruptError."""
        found = []
        for path in sorted(self.receipts.glob("*.json")):
            try:
                receipt = self._read(path)
            except CorruptError:
                if strict:
                    raise
                continue
            if receipt is not None and path.name == f"{receipt.key}.json":
                found.append(receipt)
        return found

    def standing(self, receipts: Iterable[Receipt]) -> dict[str, Receipt]:
        """Return, by their keys, those whose archives are there with their sizes, and whose bases are others of them.

        A base without a receipt of its own does not count: it may be damaged, and its model, when it is packed anew, must
        not come to lean on what leans on it.
        """
        whole = {r.archive: r for r in receipts if self._size(r.archive) == r.bytes_out}
        good = {"": True}
        for start in whole:
            chain, at = [], start
            while at in whole and at not in good:
                good[at] = False  # until the end is seen; for ever in a ring
                chain.append(at)
                at = whole[at].base
            for one in chain:
                good[one] = good.get(at, False)
        # Copies of a model may share an archive.
        return {r.key: r for r in receipts if good.get(r.archive, False) and whole[r.archive].bytes_out == r.bytes_out}

    def _read(self, path: Path) -> Receipt | None:
        try:
            with open(path, "rb") as file:
                data = file.read(_MAX_BYTES + 1)
        except FileNotFoundError:
            return None
        if len(data) > _MAX_BYTES:
            raise CorruptError("too large for a receipt").at(path=str(path))
        return Receipt.read(data, str(path))

    def _size(self, archive_id: str) -> int | None:
        try:
            return self.archive_path(archive_id).stat().st_size
        except FileNotFoundError:
            return None

    # ---- writing

    def new_file(self, key: str) -> PartialFile:
        """Return a file to write an archive to, of this attempt alone."""
        return PartialFile(self.work / f"{key}-{uuid.uuid4().hex}")

    def publish_archive(self, file: PartialFile, archive_id: str, size: int) -> None:
        """Give an archive its name, unless it is there already: two of one id are the same."""
        file.target = self.archive_path(archive_id)
        there = self._size(archive_id)
        if there == size:
            return
        file.force = there is not None  # it is damaged, then
        try:
            file.publish()
        except UsageError:
            if self._size(archive_id) != size:
                raise

    def publish_receipt(self, receipt: Receipt) -> Receipt:
        """Write a receipt, unless there is one that holds good; return the one that does."""
        target = self.receipts / f"{receipt.key}.json"
        stale = target.exists()  # asked first: if it is none that holds good, it speaks of an archive that is gone
        there = self.find(receipt.key)
        if there is not None:
            return there
        with PartialFile(self.work / f"{receipt.key}-{uuid.uuid4().hex}", force=stale) as file:
            file.write(receipt.write())
            file.target = target
            try:
                file.publish()
            except (UsageError, FileNotFoundError):  # a duplicate of this task was faster, and may have swept this file
                there = self.find(receipt.key)
                if there is None:
                    raise
                return there
        self._sweep(receipt.key)
        return receipt

    def _sweep(self, key: str) -> None:
        """Remove what killed attempts at a task left that is done by now. One that lives on finds that it was late."""
        for path in self.work.glob(f"{key}-*"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
