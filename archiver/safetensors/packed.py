"""A packed file behind the face of `safetensors.safe_open`."""

import contextlib
import dataclasses
import functools
import json
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError

from tzip.archive import Archive
from tzip.coders.arrays import U8
from tzip.coders.errors import TzipError, UsageError
from tzip.formats import safetensors_header
from tzip.formats.catalogue import FILE
from tzip.formats.dtypes import Dtype
from tzip.safetensors import frameworks
from tzip.safetensors.opening import GENUINE_OPEN
from tzip.safetensors.prefetch import PrefetchLoader

_SMALL = 1 << 20  # bytes of a header without tensors
_NONE: Mapping[str, Any] = {}
_KNOWN = "0.4 … 0.9"  # versions of the safetensors library whose safe_open this one stands for


_error_classes: dict[type[TzipError], type[TzipError]] = {}


def _error_class(kind: type[TzipError]) -> type[TzipError]:
    """Return the class that is both `kind` and a SafetensorError."""
    if kind not in _error_classes:
        names = {"__module__": __name__, "__doc__": kind.__doc__}
        _error_classes.setdefault(kind, type(kind.__name__, (kind, SafetensorError), names))
    return _error_classes[kind]


@contextlib.contextmanager
def as_safetensor_errors() -> Iterator[None]:
    """Raise what tzip raises as an error that is a SafetensorError too."""
    try:
        yield
    except TzipError as e:
        if isinstance(e, SafetensorError):
            raise
        error = _error_class(type(e))(e.message).at(path=e.path, offset=e.offset, member=e.member, tensor=e.tensor)
        raise error from e


def check_str(argument: str, value: Any) -> None:
    """Raise what the library raises for an argument that is no string, or none that has a UTF-8 form."""
    if value is None:
        raise TypeError(f"argument '{argument}': 'None' is not an instance of 'str'")
    if not isinstance(value, str):
        raise TypeError(f"argument '{argument}': '{type(value).__name__}' object is not an instance of 'str'")
    value.encode()


class Contents:
    """The one safetensors file in an archive: its tensors by name, in file order. Closed when nobody refers to it any more."""

    def __init__(self, source: Any) -> None:
        self.archive = Archive(source)
        weakref.finalize(self, self.archive.close)
        index = self.archive.reader.index
        files = [i for i in np.flatnonzero(index["m_kind"] == FILE).tolist() if self._is_safetensors(i)]
        if len(files) != 1:
            raise UsageError(
                f"the archive holds {len(files)} safetensors files, not one; tzip.open reads it, tzip unpack restores them"
            ).at(path=self.archive.reader.source.name)
        self.member = files[0]
        first = int(index["m_tensors"][: self.member].sum())
        self.rows = range(first, first + int(index["m_tensors"][self.member]))
        self.names = {index.tensor_names[row]: row for row in self.rows}

    def _is_safetensors(self, member: int) -> bool:
        """A file with tensors; or one without any, which is a header and nothing else."""
        index = self.archive.reader.index
        size = int(index["m_size"][member])
        if int(index["m_tensors"][member]) or not 8 < size <= _SMALL:
            return bool(int(index["m_tensors"][member]))
        content = self.archive.member_bytes(index.member_names[member])
        try:
            _, spans = safetensors_header.parse(lambda offset, n: content[offset : offset + n], size)
        except safetensors_header.HeaderError:
            return False
        return not spans

    def header(self, member: int) -> "dict[str, Any] | None":
        """Return the JSON object that the file starts with, None when it starts with none."""
        inline = self.archive.reader.inline_bytes(member)
        n = int.from_bytes(inline[:8], "little")
        try:
            header = json.loads(inline[8 : 8 + n])
        except ValueError:
            return None
        return header if isinstance(header, dict) else None

    def element_type(self, row: int) -> Dtype:
        """Return the element type of the tensor in that row."""
        return self.archive.view(row).element_type

    def shape(self, row: int) -> tuple[int, ...]:
        """Return the shape of the tensor in that row."""
        return self.archive.shapes[row]

    def read(self, row: int, begin: int = 0, end: int | None = None) -> U8:
        """Return bytes begin … end - 1 of the tensor in that row, in fresh memory."""
        stop = self.archive.view(row).nbytes if end is None else end
        return self.archive.tensor_bytes(row, begin, stop, None)


    def load(self, gpu: Any, rows: Sequence[int]) -> list[Any]:
        """Return whole tensors as torch's, decoded on a GPU."""
        return self.archive.load_parts([self.archive.view(row).part(None) for row in rows], gpu, "pt", None, None)

    def load_part(self, gpu: Any, row: int, begin: int, end: int, shape: tuple[int, ...]) -> Any:
        """Return bytes begin … end - 1 of the tensor in that row as a torch tensor of that shape, decoded on a GPU."""
        part = dataclasses.replace(self.archive.view(row).part(None), begin=begin, end=end, shape=shape)
        return self.archive.load_parts([part], gpu, "pt", None, None)[0]


class PackedFile:
    """`safetensors.safe_open` of a packed file."""

    def __init__(
        self, filename: Any, framework: Any, device: Any = "cpu", backend: Any = "mmap", unknown: Mapping[str, Any] = _NONE
    ) -> None:
        _check_arguments(framework, device, backend, unknown)
        if unknown:
            raise SafetensorError(f"this tzip stands for safetensors {_KNOWN}, without {', '.join(unknown)}; upgrade tzip")
        device = "cpu" if device is None else device
        self._filename = os.fspath(filename)
        self._target = frameworks.Target(frameworks.named(framework), device, backend)
        with as_safetensor_errors():
            self._contents: Contents | None = Contents(self._filename)

    @property
    def _open(self) -> Contents:
        if self._contents is None:
            raise SafetensorError("File is closed")
        return self._contents

    def _row(self, name: Any) -> int:
        check_str("name", name)
        contents = self._open
        if name not in contents.names:
            raise SafetensorError(f"File does not contain tensor {name}")
        return contents.names[name]

    def keys(self) -> list[str]:
        """Return the names of the tensors, sorted."""
        return sorted(self._open.names)

    def offset_keys(self) -> list[str]:
        """Return the names of the tensors in the order of the file."""
        return list(self._open.names)

    def metadata(self) -> dict[str, str] | None:
        """Return the file's `__metadata__`."""
        contents = self._open
        with as_safetensor_errors():
            header = contents.header(contents.member)
        return None if header is None else header.get("__metadata__")

    def get_tensor(self, name: str) -> Any:
        """Return a tensor."""
        row = self._row(name)
        contents = self._open
        with as_safetensor_errors():
            stored = self._stored(contents, row)
            gpu = frameworks.gpu(self._target, stored)
            return contents.load(gpu, [row])[0] if gpu else frameworks.tensor(self._target, stored, contents.read(row))

    def get_tensors(self) -> dict[str, Any]:
        """Return all tensors, in the order of the file."""
        contents = self._open
        with as_safetensor_errors():
            stored = {name: self._stored(contents, row) for name, row in contents.names.items()}
            gpus = {name: frameworks.gpu(self._target, s) for name, s in stored.items()}
            there = [name for name, gpu in gpus.items() if gpu]
            loaded = contents.load(gpus[there[0]], [contents.names[name] for name in there]) if there else []
            done = dict(zip(there, loaded, strict=True))
            room = {name: np.empty(s.nbytes, np.uint8) for name, s in stored.items() if name not in done}
            contents.archive.read_into([(contents.names[name], 0, out) for name, out in room.items()], None)
            # Each is given up as soon as it was handed on: what makes copies of its own needs one tensor more, not all.
            return {
                name: done[name] if name in done else frameworks.tensor(self._target, stored[name], room.pop(name))
                for name in contents.names
            }

    if hasattr(GENUINE_OPEN, "get_tensor_meta"):

        def get_tensor_meta(self, name: str) -> Any:
            """Return the tensor's entry in the header, as the library's own type."""
            self._row(name)
            contents = self._open
            with as_safetensor_errors():
                inline = contents.archive.reader.inline_bytes(contents.member)
                size = int(contents.archive.reader.index["m_size"][contents.member])
            head = 8 + int.from_bytes(inline[:8], "little")
            with frameworks.memory_file(size) as (path, write):  # of which only the header is ever touched
                write(0, np.frombuffer(inline[:head], np.uint8))
                with GENUINE_OPEN(path, "np") as opened:
                    return opened.get_tensor_meta(name)

    if hasattr(GENUINE_OPEN, "prefetch"):

        def prefetch(
            self, plan: dict[str, slice | None] | None = None, *, device: Any = None, threads: int = 8
        ) -> PrefetchLoader:
            """Start decoding the planned tensors (None: all), whole or by rows, and moving them to `device`."""
            contents = self._open
            if self._target.framework != "pt":
                raise SafetensorError('prefetch is only compatible with framework="pt"')
            wanted = dict.fromkeys(contents.names) if plan is None else plan
            target = self._target if device is None else dataclasses.replace(self._target, device=device)
            slices = {
                name: PackedSlice(target, self._stored(contents, self._row(name)), contents, self._row(name))
                for name in sorted(wanted, key=lambda name: self._row(name))
            }
            return PrefetchLoader({name: (part, wanted[name]) for name, part in slices.items()}, threads)

    def get_slice(self, name: str) -> "PackedSlice":
        """Return a tensor that is read when it is indexed; it outlives the file's being closed."""
        row, contents = self._row(name), self._open
        return PackedSlice(self._target, self._stored(contents, row), contents, row)

    @staticmethod
    def _stored(contents: Contents, row: int) -> frameworks.Stored:
        name = contents.archive.reader.index.tensor_names[row]
        with as_safetensor_errors():
            return frameworks.Stored(name, contents.element_type(row), contents.shape(row))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _exc_type: object, _exc_value: object, _traceback: object) -> None:
        self._contents = None

    def __repr__(self) -> str:
        return f"<tzip packed file {self._filename!r}>"


class PackedSlice:
    """`PySafeSlice` of a tensor in a packed file."""

    def __init__(self, target: frameworks.Target, stored: frameworks.Stored, contents: Contents, row: int) -> None:
        self._target = target
        self._stored = stored
        self._contents = contents
        self._row = row

    def get_shape(self) -> list[int]:
        """Return the shape that the header says."""
        return list(self._stored.shape)

    def get_dtype(self) -> str:
        """Return the name of the element type."""
        return self._stored.dtype.name

    def __getitem__(self, index: Any) -> Any:
        with as_safetensor_errors():
            gpu = frameworks.gpu(self._target, self._stored)
            load = functools.partial(self._contents.load_part, gpu, self._row) if gpu else None
            return frameworks.part(self._target, self._stored, index, self._read, load)

    def _read(self, begin: int, end: int) -> U8:
        return self._contents.read(self._row, begin, end)


def unpacked_entries(data: Any) -> list[tuple[str, dict[str, Any]]]:
    """Return what `safetensors.deserialize` returns for the file that the archive `data` holds."""
    with as_safetensor_errors():
        contents = Contents(data)
        entries = []
        for name, row in contents.names.items():
            dtype, shape = contents.element_type(row), list(contents.shape(row))
            content = bytearray(contents.archive.view(row).nbytes)
            contents.archive.read_into([(row, 0, np.frombuffer(content, np.uint8))], None)
            entries.append((name, {"shape": shape, "dtype": dtype.name, "data": content}))
        return entries


def _check_arguments(framework: Any, device: Any, backend: Any, unknown: Mapping[str, Any]) -> None:
    """Let the library judge the arguments, on an empty file: its errors are the right ones."""
    if not unknown and isinstance(framework, str) and isinstance(device, str | int) and isinstance(backend, str):
        _accepted(framework, device, backend)
    else:
        _judge(framework, device, backend, unknown)


@functools.lru_cache(64)
def _accepted(framework: str, device: str | int, backend: str) -> None:
    _judge(framework, device, backend, _NONE)


def _judge(framework: Any, device: Any, backend: Any, unknown: Mapping[str, Any]) -> None:
    options = {} if backend == "mmap" else {"backend": backend}  # which versions before 0.8 do not have
    empty = np.frombuffer((8).to_bytes(8, "little") + b"{}      ", np.uint8)
    with frameworks.memory_file(empty.size) as (path, write):
        write(0, empty)
        with GENUINE_OPEN(path, framework, device, **options, **unknown):
            pass
