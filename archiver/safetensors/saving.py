"""Writing packed files through the safetensors library's own interface."""

import ctypes
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from tzip.coders.arrays import U8
from tzip.coders.errors import UsageError
from tzip.formats.catalogue import FILE, NO_MTIME
from tzip.formats.dtypes import DTYPES
from tzip.formats.source import Source
from tzip.in_place import pack_in_envelope
from tzip.packing import SUFFIX, Options, pack_items, pack_to_bytes
from tzip.safetensors.packed import as_safetensor_errors, check_str
from tzip.tree import Item

_GENUINE_SERIALIZE: Any = safetensors.serialize
_GENUINE_SERIALIZE_FILE: Any = safetensors.serialize_file

# The order of the library: by element type, the last of this list first, then by name.
_ORDER = (
    "BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ",
    "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64",
)  # fmt: skip
_BY_FRAMEWORK_NAME = {d.numpy_name: d.name for d in DTYPES.values()} | {"float4_e2m1fn_x2": "F4"}


@dataclass(frozen=True, slots=True)
class _How:
    level: str | None
    threads: int | None


_how: ContextVar[_How | None] = ContextVar("how to save", default=None)


UNSAID: Any = object()


@contextmanager
def saving(level: Any, threads: int | None) -> Iterator[None]:
    """Have `serialize` and `serialize_file` below this use that level (None: write plain files) and number of threads.

    UNSAID: those of the function that calls this one, or the default.
    """
    outer = _how.get()
    if level is UNSAID:
        how = outer or _How("default", threads)
    else:
        how = _How(level, threads)
    token = _how.set(how)
    try:
        yield
    finally:
        _how.reset(token)


class _FileInMemory(Source):
    """A safetensors file made of a header and of tensors where they lie."""

    def __init__(self, name: str, parts: list[U8]) -> None:
        self.parts = parts
        self.ends = np.cumsum([p.size for p in parts], dtype=np.int64)
        super().__init__(name, int(self.ends[-1]))

    def read_at(self, offset: int, n: int) -> bytes:
        out = bytearray(max(0, min(n, self.size - offset)))
        self.readinto_at(offset, memoryview(out))
        return bytes(out)

    def readinto_at(self, offset: int, buffer: memoryview) -> int:
        room = np.frombuffer(buffer, np.uint8)
        done = 0
        i = int(np.searchsorted(self.ends, offset, side="right"))
        while done < room.size and i < len(self.parts):
            begin = offset + done - (int(self.ends[i]) - self.parts[i].size)
            piece = self.parts[i][begin : begin + room.size - done]
            room[done : done + piece.size] = piece
            done += piece.size
            i += 1
        return done


def _form(name: str, spec: Any) -> tuple[str, list[int], U8]:
    """Return element type, shape and bytes of what the library's modules hand over: a TensorSpec, or a dict before 0.8."""
    if isinstance(spec, Mapping):
        code, shape, content = spec["dtype"], list(spec["shape"]), np.frombuffer(spec["data"], np.uint8)
        if code == "float4_e2m1fn_x2":
            shape[-1] *= 2
    else:
        code, shape = spec.dtype, list(spec.shape)
        n = int(spec.data_len)
        content = np.frombuffer((ctypes.c_uint8 * n).from_address(spec.data_ptr), np.uint8) if n else np.empty(0, np.uint8)
    code = _BY_FRAMEWORK_NAME.get(code, code)
    if code not in _ORDER:
        raise safetensors.SafetensorError(f"tensor {name!r} has the element type {code}, for which the format has no name")
    return code, shape, content


def _file(tensors: Mapping[str, Any], metadata: Mapping[str, str] | None, name: str) -> tuple[bytes, _FileInMemory]:
    """Return the header (with its length) and the file that the library would write."""
    _GENUINE_SERIALIZE({}, metadata=metadata)  # it judges the metadata
    for key in tensors:
        check_str("tensor_dict", key)
    forms = {key: _form(key, spec) for key, spec in tensors.items()}
    order = sorted(forms, key=lambda key: (-_ORDER.index(forms[key][0]), key.encode()))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    at = 0
    for key in order:
        code, shape, content = forms[key]
        header[key] = {"dtype": code, "shape": shape, "data_offsets": [at, at + content.size]}
        at += content.size
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, _FileInMemory(name, [np.frombuffer(head, np.uint8), *(forms[key][2] for key in order)])


def _item(name: str, source: Source) -> Item:
    return Item(name, FILE, 0o644, NO_MTIME, source.size, lambda: source)


def _write(item: Item, head: bytes, target: Path, options: Options) -> bool:
    """Write the file; False when it should be written plain."""
    if target.is_dir():
        raise UsageError("the output is a folder").at(path=str(target))
    if not target.name.endswith(SUFFIX):
        return pack_in_envelope(item, head, target, options)
    pack_items([item], target, options, force=True)
    return True


def serialize(tensor_dict: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the bytes of an archive that holds the file `safetensors.serialize` would return."""
    how = _how.get() or _How("default", None)
    if how.level is None:
        return bytes(_GENUINE_SERIALIZE(tensor_dict, metadata=metadata))
    with as_safetensor_errors():
        _, source = _file(tensor_dict, metadata, "model.safetensors")
        return pack_to_bytes([_item(source.name, source)], Options(how.level, how.threads))


def serialize_file(tensor_dict: Mapping[str, Any], filename: Any, metadata: Mapping[str, str] | None = None) -> None:
    """Write a packed file, which appears whole or not at all; one that is there is replaced.

    A name that ends in ".tzip" gets an archive. Any other gets the file packed in place (its true header comes first), or the
    plain file when packing would not make it smaller.
    """
    how = _how.get() or _How("default", None)
    if how.level is None:
        _GENUINE_SERIALIZE_FILE(tensor_dict, filename, metadata=metadata)
        return
    with as_safetensor_errors():
        target = Path(os.fsdecode(os.fspath(filename)))
        name = target.name.removesuffix(SUFFIX) or target.name
        head, source = _file(tensor_dict, metadata, name)
        try:
            smaller = _write(_item(name, source), head, target, Options(how.level, how.threads))
        except (OSError, ValueError) as e:  # as the library does
            raise safetensors.SafetensorError(f"Error while serializing: {e}") from e
    if not smaller:
        _GENUINE_SERIALIZE_FILE(tensor_dict, filename, metadata=metadata)
