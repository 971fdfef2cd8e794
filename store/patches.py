"""Tensors that are patched where they are: what becomes of them as indices and values, written over what stands there.

A patch says what elements are, not by how much they move: to write it twice, or again after half of it, does no harm.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tzip.coders import masks
from tzip.coders.arrays import I64, U8
from tzip.coders.errors import UsageError
from tzip.coders.planes import WORD
from tzip.formats.dtypes import Dtype
from tzip.store.states import numpy_leaf, torch_leaf

_MOST = 8  # of so many elements one may change before all of them are written


@dataclass(frozen=True, slots=True)
class Patch:
    """New elements of a tensor. `indices`: where they are in it, row-major, ascending, shape (n,), int64; None: everywhere.

    `values`: the elements as unsigned integers of their bits, shape (n,), n the elements of the tensor without `indices`.
    Elements are those of FORMAT.md, section 3: the parts of complex numbers, the bytes of types below 8 bits.
    """

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    indices: I64 | None
    values: NDArray[Any]

    @property
    def elements(self) -> int:
        """How many elements it writes."""
        return int(self.values.size)


def between(name: str, dtype: Dtype, shape: tuple[int, ...], old: U8, new: U8) -> Patch:
    """Return what turns the bytes of a tensor, `old`, into `new`; both of shape (nbytes,)."""
    a, b = (_words(raw, dtype) for raw in (old, new))
    _, indices = masks.changes(b, a)
    if indices.size * _MOST > a.size:
        return Patch(name, dtype, shape, None, b)
    return Patch(name, dtype, shape, indices, b[indices])


def everywhere(target: "Target", patch: Patch | None) -> Patch:
    """Return a patch of all elements of a tensor, as they are once `patch` is written."""
    words = _words(target.raw, target.dtype).copy()
    if patch is not None and patch.indices is None:
        words = patch.values
    elif patch is not None:
        words[patch.indices] = patch.values
    return Patch(target.name, target.dtype, target.shape, None, words)


def _words(raw: U8, dtype: Dtype) -> NDArray[Any]:
    whole = WORD[dtype.width] if raw.ctypes.data % dtype.width == 0 else f"<u{dtype.width}"
    return raw.view(whole)


class Target:
    """A tensor of a subscriber: what it is, its bytes in this machine's memory, and how a patch gets to it.

    `raw`, shape (nbytes,), is the tensor's own memory, or a copy of what a device holds.
    """

    def __init__(self, name: str, dtype: Dtype, shape: tuple[int, ...], raw: U8) -> None:
        self.name = name
        self.dtype = dtype
        self.shape = shape
        self.raw = raw

    def write(self, patch: Patch) -> None:
        """Write a patch over what is there."""
        words = self.raw.view(f"<u{self.dtype.width}")
        if patch.indices is None:
            words[:] = patch.values
        else:
            words[patch.indices] = patch.values

    def read(self) -> U8:
        """Return the bytes that the tensor really has, shape (nbytes,)."""
        return self.raw


class DeviceTarget(Target):
    """A torch tensor on a device. Patches go there as indices and values; differences are decoded here, beside a copy."""

    def __init__(self, name: str, dtype: Dtype, shape: tuple[int, ...], tensor: Any) -> None:
        self.tensor = tensor
        super().__init__(name, dtype, shape, torch_leaf(tensor)[0].raw.copy())

    def write(self, patch: Patch) -> None:
        import torch

        flat = _flat(self.tensor, _torch_words(patch.values))
        values = torch.from_numpy(_signed(patch.values)).to(flat.device)
        if patch.indices is None:
            flat.copy_(values)
        elif patch.elements:
            flat.index_copy_(0, torch.from_numpy(patch.indices).to(flat.device), values)
        super().write(patch)  # last: should the device fail, the copy is what it was, and the patch is written again

    def read(self) -> U8:
        return torch_leaf(self.tensor)[0].raw


def _signed(values: NDArray[Any]) -> NDArray[Any]:
    """Return integers of a type that torch can index with on every device."""
    return values if values.itemsize == 1 else values.view(f"<i{values.itemsize}")


def _torch_words(values: NDArray[Any]) -> Any:
    import torch

    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize]


def targets(weights: Any) -> dict[str, Target]:
    """Return the targets of weights: names and tensors of numpy or torch, or a module. Raises UsageError."""
    named = weights.state_dict() if hasattr(weights, "state_dict") else weights
    if not isinstance(named, Mapping):
        raise UsageError(f"weights are a mapping of names to tensors, not a {type(weights).__name__}")
    found = {}
    for name, value in named.items():
        if not isinstance(name, str):
            raise UsageError(f"weights are tensors by their names, not by {name!r}")
        home = type(value).__module__.partition(".")[0]
        if isinstance(value, np.ndarray):
            found[name] = _of_numpy(name, value)
        elif home == "torch" or hasattr(value, "data_ptr"):
            found[name] = _of_torch(name, value)
        else:
            raise UsageError(f"tensors of numpy and torch are patched, not a {type(value).__name__}").at(tensor=name)
    return found


def _of_numpy(name: str, array: np.ndarray[Any, Any]) -> Target:
    leaf, form = numpy_leaf(array)
    plain = array.flags.c_contiguous and array.flags.writeable and not form
    if not plain:
        raise UsageError("an array that is patched is contiguous, writable and of a type of safetensors files").at(tensor=name)
    raw = array.reshape(-1).view(np.uint8) if array.size else np.empty(0, np.uint8)
    return Target(name, leaf.dtype, leaf.shape, raw)


def _of_torch(name: str, tensor: Any) -> Target:
    if hasattr(tensor, "full_tensor") or hasattr(tensor, "local_shards"):
        raise UsageError("a sharded tensor cannot be patched: pass the whole one").at(tensor=name)
    plain = tensor.detach()
    if not plain.is_contiguous() or plain.is_conj() or plain.is_neg():
        raise UsageError("a tensor that is patched is contiguous").at(tensor=name)
    leaf, form = torch_leaf(plain)
    if form:
        raise UsageError(f"a tensor of type {tensor.dtype} is of none that safetensors files have").at(tensor=name)
    if plain.device.type != "cpu":
        return DeviceTarget(name, leaf.dtype, leaf.shape, plain)
    import torch

    raw = _flat(plain, torch.uint8).numpy() if plain.numel() else np.empty(0, np.uint8)
    return Target(name, leaf.dtype, leaf.shape, raw)


def _flat(tensor: Any, kind: Any) -> Any:
    """Return the memory of a contiguous tensor as a flat one of another type."""
    import torch

    parts = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    flat = parts.reshape(-1)
    # Contiguous for torch, whatever the stride of a single element is; a view of its bytes wants a plain one.
    return (flat.as_strided((1,), (1,)) if flat.numel() == 1 else flat).view(kind)
