"""Earlier tensors that others are stored as differences from: what there is, which one fits, and finding it again.

A base is named by what holds it: the SHA-256 of its file (whatever packs it), and the archive id of the archive that it was
read from. Names of files are hints for the search and for messages; a file is a base only when its bytes are.
"""

import errno
import hashlib
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tzip.coders.arrays import U8
from tzip.coders.errors import BaseNotFoundError, ChangedError, CorruptError, TzipError, UsageError
from tzip.coders.scratch import recycle
from tzip.formats.catalogue import FILE, FLAT, NOT_KNOWN, SHA_KNOWN
from tzip.formats.containers import ContainerError, View, gather, span_bytes
from tzip.formats.dtypes import OPAQUE, Dtype
from tzip.formats.envelope import is_packed
from tzip.formats.layout import CHUNK_ELEMENTS
from tzip.formats.neighbours import Neighbours
from tzip.formats.reader import ArchiveReader
from tzip.formats.recognising import Found
from tzip.formats.source import Source, open_source

MAX_DEPTH = 64  # archives that lean on each other in a row
SEARCH = "TZIP_BASE_PATH"  # folders and files to look for bases in, as PATH has them
_SAMPLE = 2048  # elements, at three places, that tell whether a difference is worth it
_MOST = 16  # bases that are compared with a tensor
_NONE = bytes(32)
ALONE_BITS = {"bf16": 10.5, "f16": 13.5, "f32": 26.5, "f64": 53.0}  # what an element costs without a base, about, by its coding
TENSOR_SUFFIXES = (
    ".safetensors", ".tzip", ".pt", ".pth", ".bin", ".ckpt", ".distcp", ".npy", ".npz", ".gguf", ".onnx", ".h5", ".hdf5",
    ".zip", ".tar", ".data", ".onnx_data",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a base comes from: the name of its file, that file's SHA-256 and the archive's id, zero where not known."""

    file: str
    sha256: bytes
    archive: bytes

    def fits(self, other: "Origin") -> bool:
        """Whether both are the same file."""
        if self.sha256 != _NONE and other.sha256 != _NONE:
            return self.sha256 == other.sha256
        return self.archive != _NONE and self.archive == other.archive


class Base:
    """A tensor of an earlier file, or a byte range of one. `begin`: where it begins there, NOT_KNOWN when it is strided."""

    def __init__(
        self, file: "BaseFile", name: str, dtype: Dtype, shape: tuple[int, ...], nbytes: int, begin: int = NOT_KNOWN
    ) -> None:
        self.file = file
        self.name = name
        self.dtype = dtype
        self.shape = shape
        self.nbytes = nbytes
        self.begin = begin

    def read_into(self, begin: int, out: U8) -> None:
        """Fill `out` with the tensor's bytes from `begin` on; what lies behind its end is zero."""
        n = max(0, min(out.size, self.nbytes - begin))
        if n:
            self.file.read_into(self, begin, out[:n])
        out[n:] = 0


class BaseFile:
    """A file of tensors that bases are read from; `path` is that of the file or of the archive which holds it."""

    inner = False  # whether it is the member itself that leans on its tensors

    def __init__(self, name: str, path: str, size: int = 0) -> None:
        self.name = name
        self.path = path
        self.size = size
        self.tensors: dict[str, Base] = {}
        self.called: dict[str, str] = {}  # names that files beside it give tensors, by those that it has for them
        self.fault: ContainerError | None = None  # why no tensors are known

    def origin(self) -> Origin:
        """Return where its tensors come from; this may read the whole file."""
        raise AssertionError

    def at(self, name: str, begin: int, length: int) -> Base:
        """Return the bytes of the file that a tensor of that name had; fewer where the file ends before them."""
        return Base(self, name, OPAQUE, (length,), max(0, min(length, self.size - begin)), begin)

    def prepare(self, base: Base) -> None:
        """Find what the tensor itself leans on; raises BaseNotFoundError."""

    def expect(self, pieces: Sequence[tuple[Base, int, int]]) -> None:
        """Be told which (tensor, first byte, bytes) will be read next; see `Source.expect`."""

    def read_into(self, base: Base, begin: int, out: U8) -> None:
        """Fill `out` with bytes of a tensor, all of which it has."""
        raise AssertionError


class OwnFile(BaseFile):
    """The member that is packed or read itself, which has tensors that others of it are predicted from."""

    inner = True

    def __init__(self, read: Callable[[Base, int, U8], None], prepare: Callable[[Base], None] = lambda base: None) -> None:
        super().__init__("", "")
        self._read = read
        self._prepare = prepare

    def origin(self) -> Origin:
        return Origin("", _NONE, _NONE)

    def prepare(self, base: Base) -> None:
        self._prepare(base)

    def read_into(self, base: Base, begin: int, out: U8) -> None:
        self._read(base, begin, out)


@dataclass(frozen=True, slots=True)
class Input:
    """A tensor that bytes offset … offset + length - 1 of a run are made from, in its role (FORMAT.md, section 2.8)."""

    role: int
    offset: int
    length: int
    base: Base


class _PlainFile(BaseFile):
    def __init__(self, source: Source, neighbours: Neighbours) -> None:
        super().__init__(os.path.basename(source.name), source.name, source.size)
        self.source = source
        try:
            found = neighbours.find(source, source.name)
            if not found.container:
                raise ContainerError("it is no file of tensors that tzip knows")
        except ContainerError as e:  # byte ranges of it can still be read
            self.fault = e
            found = Found()
        self.views = {view.name: view for view in found.tensors}
        for view in found.tensors:
            nbytes = view.dtype.nbytes(math.prod(view.shape))
            begin = view.begin if view.strides is None else NOT_KNOWN
            self.tensors[view.name] = Base(self, view.name, view.dtype, view.shape, nbytes, begin)
        theirs = zip(found.tensors, neighbours.named(found, source.name), strict=True)
        self.called = {view.name: told.name for view, told in theirs}
        self._gathered: tuple[str, U8] | None = None
        self._origin: Origin | None = None
        self._lock = threading.Lock()

    def origin(self) -> Origin:
        with self._lock:
            if self._origin is None:
                self._origin = Origin(self.name, _sha256(self.source), _NONE)
            return self._origin

    def read_into(self, base: Base, begin: int, out: U8) -> None:
        if base.begin != NOT_KNOWN:
            self._read(base.name, base.begin + begin, out)
            return
        view = self.views[base.name]
        assert view.strides is not None
        out[:] = self._gather(view, view.strides)[begin : begin + out.size]

    def _read(self, name: str, at: int, out: U8) -> None:
        if self.source.readinto_at(at, memoryview(out)) != out.size:
            raise BaseNotFoundError("the base became shorter while it was read").at(path=self.source.name, tensor=name)

    def _gather(self, view: View, strides: tuple[int, ...]) -> U8:
        """Return a strided tensor; the last one is kept, for it is asked for chunk by chunk."""
        with self._lock:
            if self._gathered is None or self._gathered[0] != view.name:
                span = np.empty(span_bytes(view.dtype, view.shape, strides), np.uint8)
                self._read(view.name, view.begin, span)
                self._gathered = view.name, gather(span, view.dtype, view.shape, strides)
            return self._gathered[1]


_hashed: dict[object, bytes] = {}  # by what tells a file from what it was: chains ask for the same files again and again


def _sha256(source: Source) -> bytes:
    status = os.stat(source.name)
    key = (os.path.realpath(source.name), *_stamp(status))
    if key not in _hashed:
        sha = hashlib.sha256()
        for at in range(0, source.size, 1 << 22):
            sha.update(source.read_at(at, min(1 << 22, source.size - at)))
        _hashed[key] = sha.digest()
    return _hashed[key]


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class _PackedFile(BaseFile):
    def __init__(self, archive: Any, member: int) -> None:
        index = archive.reader.index
        super().__init__(index.member_names[member], archive.reader.source.name, int(index["m_size"][member]))
        self.archive = archive
        self.member = member
        self._predicts = bool(index.inner_inputs.any())
        known = bool(int(index["m_flags"][member]) & SHA_KNOWN)
        sha = index["m_sha"][member].tobytes() if known else _NONE
        self._origin = Origin(self.name, sha, archive.reader.footer.archive_id)
        first = int(index["m_tensors"][:member].sum())
        self.rows = {}
        begins = [begin for begin, *_ in archive.member_extents(member)]
        for row in range(first, first + int(index["m_tensors"][member])):
            dtype, name = index.dtype_of(row), index.tensor_names[row]
            if dtype is not None:
                nbytes, begin = int(index.tensor_nbytes[row]), NOT_KNOWN
                if nbytes and int(index["t_layout"][row]) == FLAT:
                    begin = begins[int(index["t_extent"][row])] + int(index["t_offset"][row])
                self.rows[name] = row
                self.tensors[name] = Base(self, name, dtype, archive.shapes[row], nbytes, begin)

    def origin(self) -> Origin:
        return self._origin

    def at(self, name: str, begin: int, length: int) -> Base:
        told = self.tensors.get(name)
        return told if told is not None and told.begin == begin else super().at(name, begin, length)

    def prepare(self, base: Base) -> None:
        named = base is self.tensors.get(base.name)
        runs = self.archive.tensor_runs(self.rows[base.name]) if named else self.archive.member_runs(self.member)
        self.archive.find_bases(runs)

    def expect(self, pieces: Sequence[tuple[Base, int, int]]) -> None:
        # The others are byte ranges of files, of which each chunk is a request.
        known = [(self.rows[b.name], begin, n) for b, begin, n in pieces if b is self.tensors.get(b.name)]
        self.archive.expect(known)

    def read_into(self, base: Base, begin: int, out: U8) -> None:
        if base is self.tensors.get(base.name):
            # What its tensors are predicted from is asked for again by the next of them: without a cache in every archive
            # of a chain of n a chunk of weights takes n^3 / 6 decodings, with it 3 n.
            far = self.archive.reader.source.far
            self.archive.read_into([(self.rows[base.name], begin, out)], 1, keep=self._predicts, expected=far)
        else:
            self._read_range(base.begin + begin, out)

    def _read_range(self, begin: int, out: U8) -> None:
        """Fill `out` with the bytes of the member from `begin` on, all of which it has."""
        reader, end = self.archive.reader, begin + out.size
        for at, n, run, offset in self.archive.member_extents(self.member):
            low, high = max(begin, at), min(end, at + n)
            if low >= high:
                continue
            part, where = out[low - begin : high - begin], offset + low - at
            if run < 0:
                part[:] = np.frombuffer(reader.inline_bytes(self.member), np.uint8)[where : where + part.size]
                continue
            step = CHUNK_ELEMENTS * int(reader.index["r_width"][run])
            for chunk in range(where // step, -(-(where + part.size) // step)):
                first, last = max(where, chunk * step), min(where + part.size, (chunk + 1) * step)
                decoded = self.archive.decode_chunk(run, chunk)
                part[first - where : last - where] = decoded[first - chunk * step : last - chunk * step]


class Library:
    """Archives that are found by their ids, because they lie in no folder."""

    def archive(self, archive_id: str) -> ArchiveReader:
        """Return an archive's structures, proven to be of that id. Raises FileNotFoundError."""
        raise AssertionError


OpenArchive = Callable[[Any, tuple[bytes, ...]], Any]  # an Archive, which this module is below of
Tensors = Sequence[tuple[str, Dtype, tuple[int, ...]]]
ReadTensor = Callable[[int, int, int], U8]  # n bytes from a byte on of a tensor, by its place in a list


@dataclass(slots=True)
class _Opened:
    """A file that was opened: what it holds, and what it was then."""

    files: list[BaseFile]
    close: Callable[[], None]
    path: Path
    stamp: tuple[int, ...]


def paths_of(given: Any) -> list[Path]:
    """Return the paths that a caller gave for bases; raises UsageError when there is nothing."""
    paths = [Path(p) for p in ([given] if isinstance(given, str | os.PathLike) else given or ())]
    for path in paths:
        if not path.exists():
            raise UsageError("there is no such base").at(path=str(path))
    return paths


class Bases:
    """The files that may hold bases: those of `given` paths (files, folders, archives) or, to read, in a library or by search.

    `open_archive(path, chain)` opens an archive that may lean on others; `chain` are the ids of those that lead to it.
    """

    def __init__(
        self, given: Any, open_archive: OpenArchive, beside: Path | None = None, chain: tuple[bytes, ...] = ()
    ) -> None:
        if len(chain) >= MAX_DEPTH:
            raise CorruptError(f"a chain of more than {MAX_DEPTH} archives that lean on each other")
        self._open_archive = open_archive
        self._chain = chain
        self._opened: dict[str, _Opened] = {}
        self._lock = threading.RLock()
        self._found: dict[tuple[bytes, bytes, str, int, int], Base] = {}
        self._by_origin: dict[tuple[bytes, bytes], BaseFile] = {}
        self._beside = beside
        self._neighbours = Neighbours()
        self._library = given if isinstance(given, Library) else None
        self.given = paths_of(None if self._library else given)

    # ---- packing

    def files(self) -> list[BaseFile]:
        """Return all files of the given paths."""
        found = [file for path in _expand(self.given) for file in self._files_of(path, strict=path in self.given)]
        if self.given and not any(file.tensors for file in found):
            raise UsageError("the base holds no tensors").at(path=str(self.given[0]))
        return found

    def match(self, tensors: Tensors, read: ReadTensor, own: str = "") -> dict[int, Base]:
        """Return the base of each tensor (by its place in the list) that has one which makes it smaller.

        Bases have a tensor's name; or else its shape, and names that no tensor here has. Of several the one counts that is most
        like it. Element types are the same; the first dimension may differ. `read(i, at, n)` returns bytes of tensor i. Nothing
        of the file `own`, which the tensors are in, is a base.
        """
        here = os.path.realpath(own) if own else ""
        by_name: dict[str, list[Base]] = {}
        for file in self.files():
            if os.path.realpath(file.path) != here:
                for base in file.tensors.values():
                    by_name.setdefault(file.called.get(base.name, base.name), []).append(base)
        names = {name for name, _, _ in tensors}
        spare: dict[tuple[object, ...], list[Base]] = {}
        for name, bases in by_name.items():
            if name not in names:
                for base in bases:
                    spare.setdefault((base.dtype.name, base.shape), []).append(base)
        asked: dict[tuple[object, ...], int] = {}
        found: dict[int, Base] = {}
        for i, (name, dtype, shape) in enumerate(tensors):
            candidates = by_name.get(name, [])[-_MOST:]
            if not candidates:  # renamed ones mostly keep their order
                others = spare.get((dtype.name, shape), [])
                place = asked.get((dtype.name, shape), 0)
                asked[dtype.name, shape] = place + 1
                candidates = others[max(0, place - _MOST // 2) : place + _MOST // 2]
            gains = [(self._gain(dtype, shape, base, i, read), -k, base) for k, base in enumerate(candidates)]
            if gains:
                gain, _, best = max(gains, key=lambda g: g[:2])
                if gain > 0:
                    found[i] = best
        return found

    def named(self, tensors: Tensors, own: str = "") -> dict[int, Base]:
        """Return, by its place in the list, the earlier tensor of the same name, type and shape, alike or not."""
        here = os.path.realpath(own) if own else ""
        by_name = {name: base for f in self.files() if os.path.realpath(f.path) != here for name, base in f.tensors.items()}
        found = {i: by_name[name] for i, (name, _, _) in enumerate(tensors) if name in by_name}
        return {i: b for i, b in found.items() if (b.dtype, b.shape) == tensors[i][1:]}

    @staticmethod
    def _gain(dtype: Dtype, shape: tuple[int, ...], base: Base, i: int, read: ReadTensor) -> int:
        if base.dtype is not dtype or dtype is OPAQUE or not base.nbytes or not _fits_shape(base.shape, shape):
            return 0
        return _gain(dtype, base, lambda at, n: read(i, at, n))

    def check_unchanged(self) -> None:
        """Raise ChangedError when a file is not what it was when it was opened."""
        for opened in self._opened.values():
            if opened.stamp and (not opened.path.exists() or _stamp(opened.path.stat()) != opened.stamp):
                raise ChangedError("the base changed while it was read").at(path=str(opened.path))

    # ---- reading

    def find(self, wanted: Origin, tensor: str, begin: int = NOT_KNOWN, length: int = 0) -> Base:
        """Return the tensor of the file that `wanted` says; raises BaseNotFoundError.

        Where `begin` is known it is the `length` bytes from there on, whatever the file's format and the tensor's name are.
        """
        key = (wanted.sha256, wanted.archive, tensor, begin, length)
        with self._lock:
            if key not in self._found:
                file = self._by_origin.get(key[:2])
                base = None if file is None else _tensor_of(file, tensor, begin, length)
                self._found[key] = self._search(wanted, tensor, begin, length) if base is None else base
                self._by_origin[key[:2]] = self._found[key].file
            return self._found[key]

    def _search(self, wanted: Origin, tensor: str, begin: int, length: int) -> Base:
        found = self._in_library(wanted, tensor, begin, length)
        if found is not None:
            return found
        looked: list[str] = []
        hole: BaseNotFoundError | None = None
        # Those with a tensor of that name first: to know whether a file is the one it may have to be read whole.
        for named in (True, False) if begin != NOT_KNOWN else (True,):
            for path in self._candidates(wanted):
                fits = False
                for file in self._files_of(path, strict=False):
                    if (tensor in file.tensors) != named or (not named and file.size < begin + length):
                        continue
                    if not file.origin().fits(wanted):
                        looked.append(str(path))
                        continue
                    fits = True
                    base = _tensor_of(file, tensor, begin, length)
                    assert base is not None
                    try:
                        file.prepare(base)
                    except BaseNotFoundError as e:  # there may be a copy that stands by itself
                        hole = hole or e
                    else:
                        return base
                if not fits:
                    self._let_go(path)
        if hole is not None:
            raise hole
        names = [f"SHA-256 {wanted.sha256.hex()}"] if wanted.sha256 != _NONE else []
        names += [f"archive id {wanted.archive.hex()}"] if wanted.archive != _NONE else []
        seen = f"; looked at, and another one: {', '.join(sorted(set(looked)))}" if looked else ""
        raise BaseNotFoundError(
            f"the base {wanted.file!r} ({', '.join(names)}) is not here; say where it is with --base (base=) or {SEARCH}{seen}"
        ).at(tensor=tensor)

    def _in_library(self, wanted: Origin, tensor: str, begin: int, length: int) -> Base | None:
        if self._library is None or wanted.archive == _NONE:
            return None
        files = [file for file in self.held(wanted.archive.hex()) if file.origin().fits(wanted)]
        files.sort(key=lambda file: tensor not in file.tensors)
        for file in files:
            base = _tensor_of(file, tensor, begin, length)
            if base is not None and (tensor in file.tensors or file.size >= begin + length):
                file.prepare(base)
                return base
        return None

    def held(self, archive_id: str) -> list[BaseFile]:
        """Return the files in an archive of the library, none when it is not there."""
        assert self._library is not None
        with self._lock:
            if archive_id not in self._opened:
                try:
                    archive = self._open_archive(self._library.archive(archive_id), self._chain)
                except FileNotFoundError:
                    return []
                self._opened[archive_id] = self._opened_archive(archive, Path(archive_id), ())
            return self._opened[archive_id].files

    def _candidates(self, wanted: Origin) -> Iterator[Path]:
        yield from _expand(self.given)
        folders = [] if self._beside is None else [self._beside]
        folders += [Path(p) for p in os.environ.get(SEARCH, "").split(os.pathsep) if p]
        hint = os.path.basename(wanted.file)
        for folder in folders:  # a store's objects are called by their ids
            if wanted.archive != _NONE and (folder / f"{wanted.archive.hex()}.tzip").is_file():
                yield folder / f"{wanted.archive.hex()}.tzip"
        for folder in folders:  # the likely names first: others may have to be read whole
            if folder.is_dir() and hint:
                yield from (p for p in (folder / hint, folder / (hint + ".tzip")) if p.is_file())
        for folder in folders:  # not what lies below: that may be everything there is
            yield from _tensor_files(folder.iterdir()) if folder.is_dir() else _expand([folder])

    def _files_of(self, path: Path, *, strict: bool) -> list[BaseFile]:
        with self._lock:
            key = os.path.realpath(path)
            if key not in self._opened:
                try:
                    self._opened[key] = self._open(path)
                except (TzipError, OSError) as e:
                    # Too many open files is no reason to say that there is no such file.
                    if strict or (isinstance(e, OSError) and e.errno in (errno.EMFILE, errno.ENFILE)):
                        raise
                    self._opened[key] = _Opened([], lambda: None, path, ())
            files = self._opened[key].files
            faults = [file.fault for file in files if file.fault is not None]
            if strict and faults:
                raise UsageError(f"the base is no file of tensors, no archive: {faults[0]}").at(path=str(path))
            return files

    def _let_go(self, path: Path) -> None:
        """Close a file that was opened to see whether it is the one."""
        with self._lock:
            opened = self._opened.pop(os.path.realpath(path), None)
            if opened is not None and any(file in opened.files for file in self._by_origin.values()):
                self._opened[os.path.realpath(path)] = opened
            elif opened is not None:
                opened.close()

    def _open(self, path: Path) -> _Opened:
        stamp = _stamp(path.stat())
        source = open_source(path)
        try:
            if not is_packed(source.read_at, source.size):
                return _Opened([_PlainFile(source, self._neighbours)], source.close, path, stamp)
        except BaseException:
            source.close()
            raise
        source.close()
        return self._opened_archive(self._open_archive(path, self._chain), path, stamp)

    def _opened_archive(self, archive: Any, path: Path, stamp: tuple[int, ...]) -> _Opened:
        if archive.reader.footer.archive_id in self._chain:  # itself, or one that leans on this one
            archive.close()
            return _Opened([], lambda: None, path, ())
        index = archive.reader.index
        members = [i for i, kind in enumerate(index["m_kind"].tolist()) if kind == FILE and int(index["m_tensors"][i])]
        return _Opened([_PackedFile(archive, member) for member in members], archive.close, path, stamp)

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            for opened in self._opened.values():
                opened.close()
            self._opened.clear()
            self._found.clear()
            self._by_origin.clear()


def _expand(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from _tensor_files(path.rglob("*"))
        elif path.exists():
            yield path


def _tensor_files(paths: Iterable[Path]) -> list[Path]:
    return sorted(p for p in paths if p.name.endswith(TENSOR_SUFFIXES) and p.is_file())


def _fits_shape(base: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Say whether rows can be matched one by one: all dimensions but the first are the same."""
    return base == shape or (len(base) == len(shape) > 0 and base[1:] == shape[1:])


def _gain(dtype: Dtype, base: Base, read: Callable[[int, int], U8]) -> int:
    """Return how many bits a sample of the tensor gains by the difference, about, against the tensor alone."""
    width = dtype.width
    each = _SAMPLE * width
    gain = 0.0
    for third in range(3):  # not the first rows alone: they may be padding
        at = max(0, base.nbytes - each) * third // 2 // width * width
        if third and at < third * each:
            break
        raw = read(at, min(each, base.nbytes - at))
        n = raw.size // width * width
        earlier = np.empty(n, np.uint8)
        base.read_into(at, earlier)
        a, b = (x[:n].view(f"<u{width}") for x in (raw, earlier))
        apart = np.minimum(a - b, b - a)
        moved = float(np.log2(apart.astype(np.float64) + 1).sum()) + a.size
        alone = ALONE_BITS.get(dtype.coding, 7.0 * width)
        gain += min(alone, 8 * width) * a.size - moved
    return int(gain)


def _tensor_of(file: BaseFile, name: str, begin: int, length: int) -> Base | None:
    return file.tensors.get(name) if begin == NOT_KNOWN else file.at(name, begin, length)


def expect_inputs(parts: Iterable[tuple[Iterable[Input], int, int]]) -> None:
    """Tell files what of them will be read for parts of runs: (inputs of the run, first byte, bytes) each."""
    below: dict[BaseFile, list[tuple[Base, int, int]]] = {}
    for inputs, begin, n in parts:
        for one in inputs:
            low, high = max(begin, one.offset), min(begin + n, one.offset + one.length)
            if low < high and not one.base.file.inner:
                below.setdefault(one.base.file, []).append((one.base, low - one.offset, high - low))
    for file, pieces in below.items():
        file.expect(pieces)


def role_bytes(inputs: Iterable[Input], role: int, begin: int, n: int) -> U8 | None:
    """Return n bytes from `begin` on of what inputs of a role are for a run, zeros where there is none; None without any.

    The inputs of a role ascend.
    """
    out: U8 | None = None
    at = begin
    for one in inputs:
        if one.role != role:
            continue
        if out is None:
            out = recycle(n)
        low, high = max(begin, one.offset), min(begin + n, one.offset + one.length)
        if low < high:
            out[at - begin : low - begin] = 0
            one.base.read_into(low - one.offset, out[low - begin : high - begin])
            at = high
    if out is not None:
        out[at - begin :] = 0
    return out
