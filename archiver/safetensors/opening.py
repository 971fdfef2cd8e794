"""Which of two readers a file gets: the safetensors library's for plain ones, ours for packed ones.

This module imports nothing heavy: with the hook it serves every safetensors file of a process.
"""

import contextlib
import inspect
import io
import os
from typing import Any

import safetensors

from tzip.formats.envelope import is_packed
from tzip.formats.layout import is_url

# The library's own, whatever hook, ours or another's, stands before them.
_binary = getattr(safetensors, "_safetensors_rust", safetensors)
GENUINE_OPEN: Any = getattr(_binary, "safe_open", safetensors.safe_open)
GENUINE_HANDLE: Any = getattr(_binary, "_safe_open_handle", None)
GENUINE_DESERIALIZE: Any = getattr(_binary, "deserialize", safetensors.deserialize)


def packed_path(path: Any) -> bool:
    """Say whether there is a packed file under this path; False when it cannot be read, or is no path: the library says why.

    A URL, which the library does not read, is taken for one.
    """
    try:
        name = os.fspath(path)
        if isinstance(name, bytes):
            return False
        if is_url(name):
            return True
        with open(name, "rb", buffering=0) as file:
            return is_packed(lambda offset, n: _read(file, offset, n), os.fstat(file.fileno()).st_size)
    except (OSError, TypeError, ValueError):
        return False


def _read(file: io.FileIO, offset: int, n: int) -> bytes:
    file.seek(offset)
    return file.read(n)


def packed_bytes(data: Any) -> bool:
    """Say whether this is the content of a packed file; no other bytes-like objects, which the library does not take."""
    return isinstance(data, bytes) and is_packed(lambda offset, n: data[offset : offset + n], len(data))


def _arguments(
    filename: Any, framework: Any, device: Any = "cpu", *, backend: Any = "mmap", **unknown: Any
) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
    return filename, framework, device, backend, unknown


class _Either(type):
    def __instancecheck__(cls, instance: object) -> bool:
        from tzip.safetensors.packed import PackedFile

        return isinstance(instance, GENUINE_OPEN | PackedFile)


class safe_open(metaclass=_Either):  # noqa: N801 (their name)
    """Open a packed or plain file and return its tensors as asked: `safetensors.safe_open`, whose arguments it takes.

    A packed file is an archive (`.tzip`) that holds one safetensors file, or such a file packed in place. Each tensor
    is decoded, and proven by its sums, when it is asked for; slices decode the chunks that they touch. All methods may be
    called by several threads at once.

    Raises SafetensorError, for damage a subclass that is a CorruptError too, with file, offset and tensor.
    """

    plain: Any = GENUINE_OPEN  # who opens plain files

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        path = args[0] if args else kwargs.get("filename")
        if path is not None and packed_path(path):
            from tzip.safetensors.packed import PackedFile

            try:
                arguments = _arguments(*args, **kwargs)
            except TypeError:
                return cls.plain(*args, **kwargs)  # which says what is wrong with them
            return PackedFile(*arguments)
        return cls.plain(*args, **kwargs)


def _safe_open_handle(f: Any, *args: Any, **kwargs: Any) -> Any:
    """Open what the file object `f` reads, by its name."""
    if packed_path(getattr(f, "name", None)):
        from tzip.safetensors.packed import PackedFile

        try:
            arguments = _arguments(f.name, *args, **kwargs)
            if arguments[-1]:
                raise TypeError
        except TypeError:
            return GENUINE_HANDLE(f, *args, **kwargs)  # which says what is wrong with them
        return PackedFile(*arguments)
    return GENUINE_HANDLE(f, *args, **kwargs)


def deserialize(data: Any) -> Any:
    """Return what `safetensors.deserialize` returns for the file whose bytes, packed or not, `data` are."""
    if packed_bytes(data):
        from tzip.safetensors.packed import unpacked_entries

        return unpacked_entries(data)
    return GENUINE_DESERIALIZE(data)


_pairs: list[tuple[Any, Any]] = [(safe_open, GENUINE_OPEN), (_safe_open_handle, GENUINE_HANDLE)]
_pairs.append((deserialize, GENUINE_DESERIALIZE))
for _ours, _theirs in _pairs:
    with contextlib.suppress(TypeError, ValueError):  # this version says nothing of it
        _ours.__signature__ = inspect.signature(_theirs)
