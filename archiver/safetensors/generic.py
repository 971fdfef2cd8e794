"""`load_file` and `save_file` for any framework, by the name of it or the kind of tensors."""

import os
from collections.abc import Mapping
from typing import Any

from tzip.coders.errors import UsageError
from tzip.safetensors.opening import safe_open

_MODULES = {"pt": "torch", "torch": "torch", "pytorch": "torch", "np": "numpy", "numpy": "numpy", "jax": "flax", "flax": "flax",
            "tf": "tensorflow", "tensorflow": "tensorflow", "mlx": "mlx", "paddle": "paddle"}  # fmt: skip
_OWNERS = {"torch": "torch", "numpy": "numpy", "jax": "flax", "jaxlib": "flax", "tensorflow": "tensorflow", "mlx": "mlx",
           "paddle": "paddle"}  # fmt: skip


def load_file(filename: Any, framework: str = "np", device: Any = "cpu", *, backend: str = "mmap") -> dict[str, Any]:
    """Return all tensors of a packed or plain file, in the order of the file, for `framework` (numpy's by default)."""
    options = {} if backend == "mmap" else {"backend": backend}
    with safe_open(filename, framework, device, **options) as opened:
        if hasattr(opened, "get_tensors"):
            found: dict[str, Any] = opened.get_tensors()
            return found
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)


def save_file(
    tensors: Mapping[str, Any],
    filename: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    *,
    level: str | None = "default",
    threads: int | None = None,
) -> None:
    """Save tensors of one framework as a packed file; see `serialize_file`. `level=None` writes a plain file.

    Raises what the library's module for the framework raises, and UsageError when the tensors are of several frameworks.
    """
    import importlib

    owners = {_OWNERS.get(type(tensor).__module__.partition(".")[0], "numpy") for tensor in tensors.values()}
    if len(owners) > 1:
        raise UsageError(f"the tensors are of several frameworks: {', '.join(sorted(owners))}")
    module = importlib.import_module(f"tzip.safetensors.{owners.pop() if owners else 'numpy'}")
    module.save_file(tensors, filename, metadata, level=level, threads=threads)
