"""Making every safetensors reader of a process open packed files, whoever imported what before or after.

The library's functions that open files are replaced wherever modules refer to them. Plain files still go to the originals.
This module runs at the start of interpreters: it imports next to nothing.
"""

import os
import sys
import threading
from typing import Any

BOOTSTRAP = os.path.join(os.path.dirname(os.path.abspath(__file__)), "bootstrap")
_lock = threading.RLock()
_replaced: list[tuple[Any, Any]] = []  # (theirs, ours) while installed
_finder: "_Finder | None" = None
_path_before: list[str | None] = []


class Installed:
    """What `install` returns; as a context manager it uninstalls in the end what this call has installed."""

    def __init__(self, new: bool) -> None:
        self._new = new

    def __enter__(self) -> "Installed":
        return self

    def __exit__(self, *_: object) -> None:
        if self._new:
            uninstall()


def install(*, children: bool = True) -> Installed:
    """Make every safetensors reader of this process open packed files, imported already or later.

    With `children`, so do Python processes started from now on (forked ones do in any case): PYTHONPATH gets a folder
    whose `sitecustomize` installs the hook. Installing twice is once. As a context manager: `with tzip.install(): ...`.

    Raises UsageError when the installed safetensors library has no function that this tzip knows how to stand for.
    """
    with _lock:
        new = _finder is None
        watch()
        if children and new and BOOTSTRAP not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
            before = os.environ.get("PYTHONPATH")
            _path_before.append(before)
            os.environ["PYTHONPATH"] = BOOTSTRAP if not before else BOOTSTRAP + os.pathsep + before
        return Installed(new)


def uninstall() -> None:
    """Undo `install`: every module has the library's own functions again. Files that are open stay open."""
    global _finder
    with _lock:
        if _finder is not None:
            if _finder in sys.meta_path:
                sys.meta_path.remove(_finder)
            _finder = None
        if _replaced:
            _rebind([(ours, theirs) for theirs, ours in _replaced])
            _replaced.clear()
        while _path_before:
            before = _path_before.pop()
            if before is None:
                os.environ.pop("PYTHONPATH", None)
            else:
                os.environ["PYTHONPATH"] = before


def installed() -> bool:
    """Say whether the hook is installed in this process."""
    return _finder is not None


def watch() -> None:
    """Install the hook now when safetensors is imported, else as soon as it is."""
    global _finder
    with _lock:
        if _finder is not None:
            return
        _finder = _Finder()
        if "safetensors" in sys.modules:
            _replace()
        sys.meta_path.insert(0, _finder)


class _Finder:
    """Sees the import of safetensors, and replaces its functions when its module has run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "safetensors":
            return None
        for finder in list(sys.meta_path):
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                break
        else:
            return None
        if spec.loader is not None and hasattr(spec.loader, "exec_module"):
            run = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                with _lock:
                    if _finder is self:
                        _replace()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _replace() -> None:
    """Replace the library's functions in all modules."""
    import safetensors

    from tzip.coders.errors import UsageError

    missing = [name for name in ("safe_open", "deserialize", "SafetensorError") if not hasattr(safetensors, name)]
    if missing:
        version = getattr(safetensors, "__version__", "?")
        raise UsageError(
            f"safetensors {version} has no {', '.join(missing)}; this tzip knows versions 0.4 to 0.9. Upgrade tzip"
        )
    from tzip.safetensors import opening

    # Classes and functions of their own, so that uninstalling spares what was imported from tzip.safetensors. Whatever
    # stands there now, perhaps another package's hook, goes on opening plain files.
    theirs_open: Any = safetensors.safe_open
    theirs_bytes: Any = safetensors.deserialize

    class safe_open(opening.safe_open):  # noqa: N801 (their name)
        plain = theirs_open

    pairs: list[tuple[Any, Any]] = [(theirs_open, safe_open)]

    def deserialize(bytes: Any) -> Any:
        return opening.deserialize(bytes) if opening.packed_bytes(bytes) else theirs_bytes(bytes)

    pairs.append((theirs_bytes, deserialize))
    theirs_handle: Any = getattr(safetensors, "_safe_open_handle", None)
    if theirs_handle is not None:

        def _safe_open_handle(f: Any, *args: Any, **kwargs: Any) -> Any:
            if opening.packed_path(getattr(f, "name", None)):
                return opening._safe_open_handle(f, *args, **kwargs)
            return theirs_handle(f, *args, **kwargs)

        pairs.append((theirs_handle, _safe_open_handle))
    _rebind(pairs)
    _replaced.extend(pairs)


def _rebind(pairs: list[tuple[Any, Any]]) -> None:
    """Let every module attribute that is the first of a pair be the second."""
    new = {id(old): (old, new) for old, new in pairs}
    for name, module in list(sys.modules.items()):
        names = getattr(module, "__dict__", None)
        if not isinstance(names, dict) or name == "tzip" or name.startswith("tzip."):
            continue
        for key, value in list(names.items()):
            if id(value) in new and value is new[id(value)][0]:
                names[key] = new[id(value)][1]
