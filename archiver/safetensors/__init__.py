"""The safetensors library's own interface, for packed files and plain ones alike.

    from tzip.safetensors import safe_open, load_file, save_file
    from tzip.safetensors.torch import load_file, save_file

Names, signatures, results and errors are those of the safetensors library that is installed (0.8.0 was compared call
by call); the modules `torch`, `numpy`, `flax`, `tensorflow`, `mlx` and `paddle` stand for its modules of these names.
Plain files are handed to it. What saves takes two more arguments, `level=` and `threads=`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safetensors import SafetensorError as SafetensorError
    from safetensors import TensorSpec as TensorSpec

    from tzip.safetensors.generic import load_file, save_file
    from tzip.safetensors.opening import _safe_open_handle as _safe_open_handle
    from tzip.safetensors.opening import deserialize, safe_open
    from tzip.safetensors.saving import serialize, serialize_file

# On first use: the hook imports this package in processes that may never open a packed file.
_HOMES = {
    "load_file": "generic",
    "save_file": "generic",
    "_safe_open_handle": "opening",
    "deserialize": "opening",
    "safe_open": "opening",
    "serialize": "saving",
    "serialize_file": "saving",
}
_THEIRS = ("SafetensorError", "TensorSpec", "__version__")

__all__ = ["SafetensorError", "TensorSpec", "deserialize", "load_file", "safe_open", "save_file", "serialize", "serialize_file"]


def __getattr__(name: str) -> Any:
    import importlib

    if name in _HOMES:
        value = getattr(importlib.import_module(f"tzip.safetensors.{_HOMES[name]}"), name)
    elif name in _THEIRS:
        value = getattr(importlib.import_module("safetensors"), name)
    else:
        raise AttributeError(f"module 'tzip.safetensors' has no attribute {name!r}")
    globals()[name] = value
    return value
