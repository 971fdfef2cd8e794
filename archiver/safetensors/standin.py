"""The safetensors library's modules for frameworks, with our reading and writing under them."""

import functools
import importlib.util
import inspect
import sys
from typing import Any

import numpy as np

from tzip.safetensors.frameworks import torch_dtypes
from tzip.safetensors.opening import _safe_open_handle, deserialize, safe_open
from tzip.safetensors.saving import UNSAID, saving, serialize, serialize_file

_OURS = {
    "safe_open": safe_open,
    "_safe_open_handle": _safe_open_handle,
    "deserialize": deserialize,
    "serialize": serialize,
    "serialize_file": serialize_file,
}


@functools.cache
def stand_in(name: str) -> dict[str, Any]:
    """Return the names of a second copy of `safetensors.<name>` whose functions read and write packed files.

    The copy is made of the installed library, so names, signatures and refusals are those of its version. `save` and
    `save_file` take `level=` and `threads=` too. Raises ImportError when the framework is not installed.
    """
    spec = importlib.util.find_spec(f"safetensors.{name}")
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"the installed safetensors has no module {name!r}", name=f"safetensors.{name}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[f"{__name__}.{name}"] = module  # under a name of its own: the library's stays as it is
    spec.loader.exec_module(module)
    names = vars(module)
    names |= {key: ours for key, ours in _OURS.items() if key in names}
    if name != "numpy" and getattr(names.get("numpy"), "__name__", "") == "safetensors.numpy":
        arrays = stand_in("numpy")
        names["numpy"] = _Names(arrays | {key: _with_scalars(arrays[key]) for key in ("save", "save_file")})
    if name == "torch" and "_view2torch" in names:
        _with_all_types(names)
    for key in ("save", "save_file"):
        names[key] = _with_level(names[key], contiguous=name == "numpy")
    if "save_model" in names:
        names["save_model"] = _with_level(names["save_model"], contiguous=False)
    return names


class _Names:
    """Names as attributes: a module that is not one."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.__dict__ = names


def _with_level(function: Any, *, contiguous: bool) -> Any:
    """Return a function that saves, with `level` and `threads`.

    The library takes the bytes of a numpy array as if they lay in C order (0.8.0: a transposed one is saved
    silently wrong): here they do.
    """

    @functools.wraps(function)
    def save(*args: Any, level: Any = UNSAID, threads: int | None = None, **kwargs: Any) -> Any:
        if contiguous and args and isinstance(args[0], dict):
            args = ({key: _in_order(value) for key, value in args[0].items()}, *args[1:])
        elif contiguous and isinstance(kwargs.get("tensor_dict"), dict):
            kwargs["tensor_dict"] = {key: _in_order(value) for key, value in kwargs["tensor_dict"].items()}
        with saving(level, threads):
            return function(*args, **kwargs)

    theirs = inspect.signature(function)
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in (("level", "default"), ("threads", None))
    ]
    save.__signature__ = theirs.replace(parameters=[*theirs.parameters.values(), *more])  # type: ignore[attr-defined]
    return save


def _with_all_types(names: dict[str, Any]) -> None:
    """Let `load` know the types that the table of 0.8.0 lacks."""
    names["_TYPES"] = dict(torch_dtypes())
    theirs = names["_view2torch"]

    @functools.wraps(theirs)
    def _view2torch(safeview: Any) -> Any:
        def entry(v: dict[str, Any]) -> dict[str, Any]:
            # torch counts pairs of float4.
            halved = v["dtype"] == "F4" and v["shape"]
            return v | {"shape": [*v["shape"][:-1], v["shape"][-1] // 2]} if halved else v

        return theirs([(name, entry(v)) for name, v in safeview])

    names["_view2torch"] = _view2torch


def _with_scalars(function: Any) -> Any:
    """Return a function that saves numpy's scalars, too, which tensorflow makes of tensors without dimensions."""

    def save(tensor_dict: Any, *args: Any, **kwargs: Any) -> Any:
        return function({key: np.asarray(value) for key, value in tensor_dict.items()}, *args, **kwargs)

    return save


def _in_order(value: Any) -> Any:
    if not isinstance(value, np.ndarray) or value.flags.c_contiguous:
        return value
    return value.copy(order="C")
