"""One checkpoint, read lazily: its manifest at once, its tensors when they are asked for."""

import contextlib
import fnmatch
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tzip.archive import Archive
from tzip.coders.arrays import U8
from tzip.coders.errors import CorruptError, TensorNotFoundError, TzipError
from tzip.formats.dtypes import Dtype
from tzip.store.backends import Backend
from tzip.store.journal import Entry
from tzip.store.manifest import MANIFEST, Manifest
from tzip.store.objects import row_of
from tzip.store.states import Target, rebuild
from tzip.views import TensorView

_OPEN = 32  # archives that are kept open, each with up to a chain of others: a process may have 1024 files


class _Object(Archive):
    """An archive that closes itself when nobody holds it any more."""

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # it was never opened
            self.close()


class Objects:
    """The archives of a store, opened on use and proven to be the ones that their names say.

    Those used least recently are let go: a state whose tensors changed at different times is in thousands of them.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._open: OrderedDict[str, Archive] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, archive_id: str) -> Archive:
        """Return an object. Raises CorruptError when it is missing or another archive."""
        with self._lock:
            if archive_id not in self._open:
                path = self.backend.object_name(archive_id)
                try:
                    archive = _Object(self.backend.archive(archive_id), base=self.backend.library)
                except FileNotFoundError:
                    raise CorruptError("an object of the store is missing").at(path=path) from None
                if archive.reader.footer.archive_id.hex() != archive_id:
                    archive.close()
                    raise CorruptError("an object is another archive than its name says").at(path=path)
                self._open[archive_id] = archive
                if len(self._open) > _OPEN:
                    self._open.popitem(last=False)
            self._open.move_to_end(archive_id)
            return self._open[archive_id]

    def manifest(self, entry: Entry) -> Manifest:
        """Read and prove the manifest of a checkpoint."""
        archive = self(entry.object)
        path = archive.reader.source.name
        names = archive.reader.index.member_names
        if MANIFEST not in names:
            raise CorruptError("the object holds no manifest").at(path=path)
        manifest = Manifest.read(archive.member_bytes(MANIFEST), path, entry.object)
        if (manifest.step, manifest.kind) != (entry.step, entry.kind):
            raise CorruptError(f"the manifest is of step {manifest.step}, not {entry.step}").at(path=path)
        return manifest

    def close(self) -> None:
        """Close what is open."""
        with self._lock:
            for archive in self._open.values():
                archive.close()
            self._open.clear()


class Checkpoint(Mapping[str, NDArray[Any]]):
    """A checkpoint of a store: a lazy mapping of tensor names to arrays, and the state as it was saved.

    Every byte that it returns is proven by the sums of its chunk. Close it, or use it in a `with` statement.
    """

    def __init__(self, backend: Backend, entry: Entry) -> None:
        self.entry = entry
        self._objects = Objects(backend)
        try:
            self.manifest = self._objects.manifest(entry)
        except BaseException:
            self._objects.close()
            raise

    @property
    def step(self) -> int:
        """The step."""
        return self.entry.step

    def _keys(self) -> Collection[str]:
        """Return the names: those of the manifest, or of the tensors in files."""
        return self.archive(self.entry.object) if self.manifest.kind == "files" else self.manifest.records

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys())

    def __len__(self) -> int:
        return len(self._keys())

    def __contains__(self, key: object) -> bool:
        return key in self._keys()

    def __getitem__(self, key: str) -> NDArray[Any]:
        """Return a tensor as a numpy array."""
        return self.tensor(key).read()

    def tensor(self, key: str) -> TensorView:
        """Return a tensor without decoding it: index it for rows. Raises TensorNotFoundError."""
        archive, row = self.place(key)
        return archive.view(row)

    def place(self, key: str) -> tuple[Archive, int]:
        """Return the archive that holds a tensor, and its row there. Raises TensorNotFoundError."""
        if self.manifest.kind == "files":
            archive = self.archive(self.entry.object)
            return archive, archive.tensor(key).row
        record = self.manifest.records.get(key)
        if record is None:
            raise TensorNotFoundError(f"step {self.step} has no tensor {key!r}")
        archive = self.archive(record.object)
        return archive, row_of(archive, record)

    def archive(self, archive_id: str) -> Archive:
        """Return one of the checkpoint's objects."""
        return self._objects(archive_id)

    def select(self, keys: Iterable[str] | str | None) -> list[str]:
        """Return the keys that one of the patterns matches (as in file names: `model.*`), all without patterns.

        Raises TensorNotFoundError for a pattern that matches none.
        """
        names = list(self)
        if keys is None:
            return names
        chosen: set[str] = set()
        for pattern in [keys] if isinstance(keys, str) else keys:
            found = [pattern] if pattern in names else fnmatch.filter(names, pattern)
            if not found:
                raise TensorNotFoundError(f"step {self.step} has no tensor {pattern!r}")
            chosen.update(found)
        return [key for key in names if key in chosen]

    def raw(self, keys: Iterable[str], threads: int | None = None) -> dict[str, U8]:
        """Return the bytes of tensors, shape (nbytes,) each, decoded on all threads."""
        out: dict[str, U8] = {}
        for held in self._by_object(keys):
            reads: list[tuple[int, int, U8]] = []
            for key in held:
                archive, row = self.place(key)
                out[key] = np.empty(archive.view(row).nbytes, np.uint8)
                if out[key].size:
                    reads.append((row, 0, out[key]))
            if not reads:
                continue
            try:
                archive.read_into(reads, threads)
            except TzipError as e:
                e.add_note(f"while reading step {self.step} of the store")
                raise
        return out

    def _by_object(self, keys: Iterable[str]) -> Iterable[list[str]]:
        """Return the keys, those of one object together: each is opened once."""
        groups: dict[str, list[str]] = {}
        for key in keys:
            record = self.manifest.records.get(key)
            groups.setdefault(record.object if record else "", []).append(key)
        return groups.values()

    def load(
        self,
        keys: Iterable[str] | str | None = None,
        *,
        framework: str | None = None,
        device: Any = None,
        allow_pickle: bool = False,
        threads: int | None = None,
    ) -> Any:
        """Return the state as it was saved, or the part of it that `keys` select; see `Store.load`."""
        chosen = self.select(keys)
        raw = self.raw(chosen, threads)

        def get(key: str) -> tuple[Dtype, tuple[int, ...], U8] | None:
            if key not in raw:
                if key not in self:
                    raise KeyError(key)
                return None
            view = self.tensor(key)
            return view.element_type, view.shape, raw[key]

        tree = self.manifest.tree
        if self.manifest.kind not in ("state", "published"):  # files and shards have no tree: a dict of tensors
            tree = ["d", *([key, ["t", key, "np", ""]] for key in chosen)]
        return rebuild(tree, get, Target(framework, device, allow_pickle))

    def close(self) -> None:
        """Close the files."""
        self._objects.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<tzip checkpoint {self.step}: {len(self)} tensors>"
