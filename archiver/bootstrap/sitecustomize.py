"""Found first on PYTHONPATH by the children of `tzip run` and of a process that called `tzip.install()`."""

import contextlib
import importlib.machinery
import importlib.util
import os
import sys

with contextlib.suppress(Exception):  # whatever is wrong with tzip, the interpreter must start
    import tzip.hook

    tzip.hook.watch()

# The sitecustomize that this one hides. A folder is ours when its file is: both may be known by several names.
_here = os.path.realpath(__file__)
_spec = importlib.machinery.PathFinder.find_spec(
    "sitecustomize", [p for p in sys.path if os.path.realpath(os.path.join(p, "sitecustomize.py")) != _here]
)
if _spec is not None and _spec.loader is not None:
    _module = importlib.util.module_from_spec(_spec)
    sys.modules["sitecustomize"] = _module
    _spec.loader.exec_module(_module)
