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
_path: list[tuple[str | None, str]] = []  # PYTHONPATH before and after, when it was changed
_finder: "_Finder | None" = None


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
    _import_first()
    with _lock:
        new = _finder is None
        watch()
        before = os.environ.get("PYTHONPATH")
        if children and BOOTSTRAP not in (before or "").split(os.pathsep):
            after = os.environ["PYTHONPATH"] = BOOTSTRAP if not before else BOOTSTRAP + os.pathsep + before
            _path[:] = [(before, after)]
        return Installed(new)


def uninstall() -> None:
    """Undo `install`: every module has the library's own functions again. Files that are open stay open."""
    global _finder
    with _lock:
        if _finder is not None:
            if _finder in sys.meta_path:
                sys.meta_path.remove(_finder)
            _finder = None
        for theirs, ours in reversed(_replaced):  # the latest first: it may stand for an earlier one
            _rebind([(ours, theirs)])
        _replaced.clear()
        for before, after in _path:
            now = os.environ.get("PYTHONPATH")
            if now != after:  # somebody has changed it meanwhile
                before = None if now is None else os.pathsep.join(p for p in now.split(os.pathsep) if p != BOOTSTRAP)
            if before is None:
                os.environ.pop("PYTHONPATH", None)
            else:
                os.environ["PYTHONPATH"] = before
        _path.clear()


def installed() -> bool:
    """Say whether the hook is installed in this process."""
    return _finder is not None


def watch() -> None:
    """Install the hook now when safetensors is imported, else as soon as it is."""
    global _finder
    with _lock:
        if _finder is not None:
            return
        if "safetensors" in sys.modules:
            _replace()
        _finder = _Finder()
        sys.meta_path.insert(0, _finder)


def _import_first() -> None:
    """Import what replacing needs before the lock is taken: a thread that is importing safetensors wants the lock, too."""
    if "safetensors" in sys.modules:
        import safetensors

        if hasattr(safetensors, "safe_open"):
            import tzip.safetensors.opening  # noqa: F401


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
                from tzip.coders.errors import UsageError

                try:
                    with _lock:
                        if _finder is self:
                            _replace()
                except UsageError as e:  # the program may never open a packed file: its import must not fail
                    import warnings

                    warnings.warn(f"packed files will not open: {e}", RuntimeWarning, stacklevel=2)

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
        __doc__ = theirs_open.__doc__
        plain = theirs_open

    safe_open.__module__, safe_open.__qualname__ = "safetensors", "safe_open"
    pairs: list[tuple[Any, Any]] = [(theirs_open, safe_open)]

    def deserialize(bytes: Any) -> Any:
        return opening.deserialize(bytes) if opening.packed_bytes(bytes) else theirs_bytes(bytes)

    pairs.append((theirs_bytes, _named(deserialize, theirs_bytes)))
    theirs_handle: Any = getattr(safetensors, "_safe_open_handle", None)
    if theirs_handle is not None:

        def _safe_open_handle(f: Any, *args: Any, **kwargs: Any) -> Any:
            if opening.packed_path(getattr(f, "name", None)):
                return opening._safe_open_handle(f, *args, **kwargs)
            return theirs_handle(f, *args, **kwargs)

        pairs.append((theirs_handle, _named(_safe_open_handle, theirs_handle)))
    _rebind(pairs)
    _replaced.extend(pairs)


def _named(ours: Any, theirs: Any) -> Any:
    """Give a function the name, text and signature of the one that it replaces; it pickles as that."""
    import functools

    functools.update_wrapper(ours, theirs)
    ours.__module__, ours.__qualname__ = "safetensors", ours.__name__
    return ours


def _rebind(pairs: list[tuple[Any, Any]]) -> None:
    """Let every module attribute that is the first of a pair be the second."""
    new = {id(old): (old, new) for old, new in pairs}
    for name, module in list(sys.modules.items()):
        names = getattr(module, "__dict__", None)
        # The library's own binary module keeps its functions: it is what is left when the library is imported again.
        if not isinstance(names, dict) or name == "tzip" or name.startswith(("tzip.", "safetensors._")):
            continue
        for key, value in list(names.items()):
            if id(value) in new and value is new[id(value)][0]:
                names[key] = new[id(value)][1]
