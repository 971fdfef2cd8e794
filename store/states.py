"""State dicts taken apart into tensors and a tree in JSON, and put together again (STORE.md, section 4).

Nothing is pickled unless no other form has the value, and nothing is unpickled unless the caller asks: such values come
back as `Pickled`.
"""

import base64
import binascii
import math
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np

from tzip.coders.arrays import U8
from tzip.coders.errors import CorruptError, UsageError
from tzip.formats.dtypes import BY_NAME, Dtype, from_numpy

SMALL = 1024  # bytes and pickles up to here stand in the tree itself
MAX_DEPTH = 200
_TORCH_NAMES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "uint16": "U16", "uint32": "U32", "uint64": "U64", "float16": "F16", "bfloat16": "BF16", "float32": "F32",
    "float64": "F64", "complex64": "C64", "float8_e5m2": "F8_E5M2", "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
_DTYPES = {name: BY_NAME[wire] for name, wire in _TORCH_NAMES.items()}
_U8 = BY_NAME["U8"]
RESERVED = "__metadata__"  # what the header of a safetensors file calls something else


@dataclass(frozen=True, slots=True)
class Pickled:
    """A value that only Python's pickle could hold. `load` runs what the pickle says: only for checkpoints you trust."""

    data: bytes

    def load(self) -> Any:
        """Unpickle the value."""
        import pickle

        return pickle.loads(self.data)


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor of a state: its bytes (shape (nbytes,), row-major) where they lie, or a copy when they lay otherwise."""

    dtype: Dtype
    shape: tuple[int, ...]
    raw: U8


class _Flattener:
    def __init__(self) -> None:
        self.leaves: dict[str, Leaf] = {}

    def key(self, path: tuple[str, ...]) -> str:
        name = ".".join(path) or "value"
        key, n = name, 2
        while key in self.leaves or key == RESERVED:
            key, n = f"{name}#{n}", n + 1
        return key

    def leaf(self, path: tuple[str, ...], leaf: Leaf, framework: str, form: str = "") -> list[Any]:
        key = self.key(path)
        try:
            key.encode()
        except UnicodeEncodeError:
            raise UsageError(f"the name {key!r} has no UTF-8 form") from None
        self.leaves[key] = leaf
        return ["t", key, framework, form]

    def tree(self, value: Any, path: tuple[str, ...]) -> Any:
        if len(path) > MAX_DEPTH:
            raise UsageError(f"the state nests deeper than {MAX_DEPTH}, or contains itself").at(tensor=".".join(path[:8]))
        kind = type(value)
        if value is None or kind is bool:
            return value
        if kind is str:
            return self._string(value, path)
        if kind is int:
            return value if abs(value) < 1 << 63 else ["i", hex(value)]
        if kind is float:
            return value if math.isfinite(value) else ["f", struct.pack("<d", value).hex()]
        if kind is complex:
            return ["c", struct.pack("<dd", value.real, value.imag).hex()]
        if kind in (list, tuple, set, frozenset):
            return [_SEQUENCES[kind.__name__], *(self.tree(v, (*path, str(i))) for i, v in enumerate(value))]
        if isinstance(value, Mapping) and kind.__module__ in ("builtins", "collections"):
            tag = "o" if kind is OrderedDict else "C" if kind is Counter else "d"
            return [tag, *([self.tree(k, path), self.tree(v, (*path, _step(k)))] for k, v in value.items())]
        if kind in (bytes, bytearray):
            tag = "b" if kind is bytes else "y"
            return self._bytes(value, tag, path)
        return self._foreign(value, path)

    def _string(self, value: str, path: tuple[str, ...]) -> Any:
        try:
            value.encode()
        except UnicodeEncodeError:
            return self._pickle(value, path)
        return value

    def _bytes(self, value: bytes | bytearray, tag: str, path: tuple[str, ...]) -> list[Any]:
        if len(value) <= SMALL:
            return [tag, base64.b64encode(value).decode()]
        raw = np.frombuffer(bytes(value), np.uint8)
        return self.leaf(path, Leaf(_U8, (raw.size,), raw), tag)

    def _foreign(self, value: Any, path: tuple[str, ...]) -> list[Any]:
        home = type(value).__module__.partition(".")[0]
        if type(value) in (np.ndarray, np.memmap) and _described(value.dtype) and value.dtype.itemsize:
            leaf, form = numpy_leaf(value)
            return self.leaf(path, leaf, "np", form)
        if isinstance(value, np.generic) and _described(value.dtype):
            return ["n", _described(value.dtype), value.tobytes()[: value.dtype.itemsize].hex()]
        if home == "torch":
            found = self._torch(value, path)
            if found is not None:
                return found
        elif home in ("jax", "jaxlib") and hasattr(value, "__array__"):
            try:
                array = np.asarray(value)
            except TypeError as e:  # keys of jax.random, which are no plain data
                raise UsageError(f"a {type(value).__name__} cannot be saved: {e}").at(tensor=".".join(path)) from None
            leaf, form = numpy_leaf(array)
            return self.leaf(path, leaf, "jax", form)
        elif home == "cupy" and hasattr(value, "get"):
            leaf, form = numpy_leaf(np.asarray(value.get()))
            return self.leaf(path, leaf, "cupy", form)
        return self._pickle(value, path)

    def _torch(self, value: Any, path: tuple[str, ...]) -> list[Any] | None:
        import torch

        if isinstance(value, torch.Size):
            return ["z", *(int(n) for n in value)]
        if isinstance(value, torch.dtype):
            return ["T", str(value).partition(".")[2]]
        if isinstance(value, torch.device):
            return ["D", str(value)]
        if isinstance(value, torch.Tensor):
            place = ".".join(path)
            if hasattr(value, "full_tensor") or hasattr(value, "local_shards"):
                raise UsageError("a sharded tensor: save it with tzip.torch_dcp").at(tensor=place)
            if value.layout != torch.strided or value.is_quantized or value.is_nested or value.device.type == "meta":
                kind = "nested" if value.is_nested else value.dtype
                raise UsageError(
                    f"a tensor of layout {value.layout} ({kind}) on {value.device} has no plain bytes"
                ).at(tensor=place)
            leaf, form = torch_leaf(value)
            return self.leaf(path, leaf, "pt", form)
        return None

    def _pickle(self, value: Any, path: tuple[str, ...]) -> list[Any]:
        import pickle

        try:
            data = value.data if type(value) is Pickled else pickle.dumps(value, protocol=5)
        except Exception as e:  # whatever the value's own code raises
            raise UsageError(f"a {type(value).__name__} cannot be saved: {e}").at(tensor=".".join(path)) from None
        return self._bytes(data, "p", path)


_SEQUENCES = {"list": "l", "tuple": "u", "set": "s", "frozenset": "S"}


def _step(key: Any) -> str:
    if isinstance(key, str):
        return key
    return repr(key) if isinstance(key, int | float | tuple | None) else type(key).__name__


def flatten(state: Any) -> tuple[Any, dict[str, Leaf]]:
    """Return the tree of a state, which JSON can hold, and its tensors by their keys (the path, joined by dots).

    Tensors of torch, numpy, jax and cupy lie where they lay, when they are contiguous and in memory. Raises UsageError,
    with the place, for what cannot be saved.
    """
    flattener = _Flattener()
    try:
        tree = flattener.tree(state, ())
    except RecursionError:
        raise UsageError("the state nests too deep, or contains itself") from None
    return tree, flattener.leaves


def numpy_leaf(array: np.ndarray[Any, Any]) -> tuple[Leaf, str]:
    """Return the leaf of an array without objects, and how numpy describes its type where the format has no such type."""
    flat = np.ascontiguousarray(array)
    if flat.size == 1:  # contiguous for numpy, whatever its strides are; a view of its bytes wants them plain
        flat = flat.copy()
    dtype = from_numpy(array.dtype)
    raw = flat.reshape(-1).view(np.uint8) if flat.size else np.empty(0, np.uint8)
    if dtype is not None and dtype.bits >= 8 and dtype.name != "C128":
        return Leaf(dtype, array.shape, raw), ""
    if array.dtype == np.complex128:
        return Leaf(BY_NAME["F64"], (*array.shape, 2), raw), "c16"
    form = _described(array.dtype)
    if not form:
        raise UsageError(f"an array of type {array.dtype} is no plain data")
    return Leaf(_U8, (*array.shape, array.dtype.itemsize), raw), form


def torch_leaf(value: Any) -> tuple[Leaf, str]:
    """Return the leaf of a torch tensor, and the name of its type where the format has none."""
    import torch

    name = str(value.dtype).partition(".")[2]
    plain = value.detach()
    if plain.is_conj() or plain.is_neg():
        plain = plain.resolve_conj().resolve_neg()
    plain = plain.cpu().contiguous().reshape(-1)
    if plain.numel() == 1:  # contiguous for torch, whatever its stride is; a view of its bytes wants a plain one
        plain = plain.clone(memory_format=torch.contiguous_format).as_strided((1,), (1,))
    raw = plain.view(torch.uint8).numpy() if plain.numel() else np.empty(0, np.uint8)
    if name in _DTYPES:
        return Leaf(_DTYPES[name], tuple(value.shape), raw), ""
    if name == "complex128":
        return Leaf(BY_NAME["F64"], (*value.shape, 2), raw), name
    return Leaf(_U8, (*value.shape, value.element_size()), raw), name


def torch_form(name: str) -> str:
    """Return what the form of a torch tensor of that type is: nothing when the format has the type, else its name."""
    return "" if name in _DTYPES else name


@cache
def _described(dtype: "np.dtype[Any]") -> str:
    """Return the description that gives exactly this type again; "" when it has none, as one of objects."""
    from json import dumps

    if dtype.hasobject:
        return ""
    try:
        if dtype.names is not None:
            text = dumps(np.lib.format.dtype_to_descr(dtype))
        else:
            text = dtype.name if dtype.type.__module__.startswith("ml_dtypes") else dtype.str
        return text if _numpy_dtype(text) == dtype else ""
    except (ValueError, CorruptError):  # fields that overlap; types of ml_dtypes as fields, which numpy calls void
        return ""


def _numpy_dtype(text: str) -> "np.dtype[Any]":
    """Return the numpy type of a description; raises CorruptError for anything but plain data."""
    try:
        if text.startswith("["):
            from json import loads

            dtype = np.lib.format.descr_to_dtype(_fields(loads(text)))
        elif text[:1] in "<>|=":
            dtype = np.dtype(text)
        else:
            import ml_dtypes

            dtype = np.dtype(getattr(ml_dtypes, text)) if hasattr(ml_dtypes, text) else np.dtype(text)
    except (TypeError, ValueError, KeyError, SyntaxError, RecursionError) as e:
        raise CorruptError(f"{text!r} describes no numpy type: {e}") from None
    if dtype.hasobject:
        raise CorruptError(f"{text!r} describes no plain data")
    return dtype


def _fields(value: Any) -> Any:
    """Return the description of a structured type with the tuples that JSON has made lists of."""
    if not isinstance(value, list):
        return value
    return [(name if isinstance(name, str) else tuple(name), _fields(kind), *map(tuple, shape)) for name, kind, *shape in value]


# ---------------------------------------------------------------- and back

Get = Callable[[str], tuple[Dtype, tuple[int, ...], U8] | None]  # a tensor's bytes in memory of its own; None: not asked for


class _Left:
    """Stands for what was not asked for."""


_LEFT = _Left()


@dataclass(frozen=True, slots=True)
class Target:
    """What tensors become: the framework ("np", "pt", or None: as they were saved) and torch's device."""

    framework: str | None = None
    device: Any = None
    allow_pickle: bool = False


def rebuild(tree: Any, get: Get, target: Target) -> Any:
    """Return the state of a tree. What `get` leaves out is not in it. Raises CorruptError for a tree that breaks a rule."""
    try:
        value = _build(tree, get, target)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, struct.error, binascii.Error) as e:
        raise CorruptError(f"the tree of the state breaks a rule: {type(e).__name__}: {e}") from None
    except RecursionError:
        raise CorruptError("the tree of the state nests too deep") from None
    return None if value is _LEFT else value


def _build(node: Any, get: Get, target: Target) -> Any:
    if node is None or isinstance(node, bool | int | float | str):
        return node
    tag, *rest = node
    if tag in "lusS" and len(tag) == 1:
        values = [v for v in (_build(n, get, target) for n in rest) if v is not _LEFT]
        if rest and not values:
            return _LEFT
        return {"l": list, "u": tuple, "s": set, "S": frozenset}[tag](values)
    if tag in ("d", "o", "C"):
        pairs = [(_build(k, get, target), _build(v, get, target)) for k, v in rest]
        kept = [(k, v) for k, v in pairs if v is not _LEFT and k is not _LEFT]
        if pairs and not kept:
            return _LEFT
        return OrderedDict(kept) if tag == "o" else Counter(dict(kept)) if tag == "C" else dict(kept)
    if tag == "t":
        return _tensor(rest, get, target)
    if tag == "p":
        return _unpickled(base64.b64decode(rest[0], validate=True), target)
    return _scalar(tag, rest)


def _scalar(tag: str, rest: list[Any]) -> Any:
    if tag == "i":
        return int(rest[0], 16)
    if tag == "f":
        return struct.unpack("<d", bytes.fromhex(rest[0]))[0]
    if tag == "c":
        return complex(*struct.unpack("<dd", bytes.fromhex(rest[0])))
    if tag in ("b", "y"):
        data = base64.b64decode(rest[0], validate=True)
        return data if tag == "b" else bytearray(data)
    if tag == "n":
        dtype, data = _numpy_dtype(rest[0]), bytes.fromhex(rest[1])
        if len(data) != dtype.itemsize:
            raise ValueError("a scalar of another size than its type's")
        return np.frombuffer(data, dtype)[0] if data else np.zeros((), dtype)[()]  # an empty string
    if tag in ("z", "T", "D"):
        import torch

        if tag == "z":
            return torch.Size(rest)
        if tag == "D":
            try:
                return torch.device(rest[0])
            except RuntimeError as e:
                raise ValueError(str(e)) from None
        dtype = getattr(torch, rest[0])
        if isinstance(dtype, torch.dtype):
            return dtype
    raise ValueError(f"unknown tag {tag!r}")


def _unpickled(data: bytes, target: Target) -> Any:
    found = Pickled(data)
    return found.load() if target.allow_pickle else found


def _tensor(rest: list[Any], get: Get, target: Target) -> Any:
    key, framework, form = rest
    found = get(key)
    if found is None:
        return _LEFT
    dtype, shape, raw = found
    if framework in ("b", "y", "p"):
        data = raw.tobytes()
        return _unpickled(data, target) if framework == "p" else data if framework == "b" else bytearray(data)
    wanted = target.framework or (framework if framework != "pt" or find_spec("torch") else "np")
    if wanted == "pt" and (framework == "pt" or form in ("", "c16")):
        return torch_tensor(dtype, shape, raw, "complex128" if form == "c16" else form, target.device)
    array = numpy_array(dtype, shape, raw, form, torch_form=framework == "pt")
    if wanted == "np" or (form and framework != "jax"):
        return array
    if wanted == "jax":
        import jax.numpy as jnp

        made = jnp.asarray(array)
        if made.dtype != array.dtype:  # it rounds to 32 bits without a word
            raise UsageError(
                f'jax makes {made.dtype} of {array.dtype}: set jax_enable_x64, or load with framework="np"'
            ).at(tensor=key)
        return made
    if wanted == "cupy":
        import cupy

        return cupy.asarray(array)
    raise ValueError(f"unknown framework {wanted!r}")


def numpy_array(dtype: Dtype, shape: tuple[int, ...], raw: U8, form: str, *, torch_form: bool = False) -> Any:
    """Return an array over a tensor's bytes; `form` as the tree has it."""
    if form and not torch_form:
        found = _numpy_dtype("complex128" if form == "c16" else form)
        return raw.view(found).reshape(shape[:-1])
    if form == "complex128":
        return raw.view(np.complex128).reshape(shape[:-1])
    plain = dtype.numpy()
    if plain is None:  # numpy has no elements of 6 bits: the bytes
        return raw.reshape(shape) if dtype.bits == 8 else raw
    if dtype.bits == 4:  # ml_dtypes holds one element a byte; files hold two, the first in the low half
        raw = np.stack((raw & 15, raw >> 4), axis=-1).reshape(-1)
    return raw.view(plain).reshape(shape)


def torch_tensor(dtype: Dtype, shape: tuple[int, ...], raw: U8, form: str, device: Any) -> Any:
    """Return a torch tensor over a tensor's bytes, on a device when one is given."""
    import torch

    name = form or next((n for n, d in _DTYPES.items() if d is dtype), "")
    kind = getattr(torch, name, None)
    if not isinstance(kind, torch.dtype):
        raise UsageError(f"this torch has no type for {form or dtype.name}")
    real = shape[:-1] if form else shape
    made = torch.from_numpy(raw).view(kind).reshape(real) if raw.size else torch.empty(real, dtype=kind)
    return made if device is None else made.to(device)
