"""The hook for a whole virtual environment, and for one command."""

import os
import sys
import sysconfig
from pathlib import Path

from tzip.coders.errors import UsageError
from tzip.hook import BOOTSTRAP

_NAME = "tzip-hook.pth"
# One line that starts with "import" is run by every start of the interpreter. It must not fail, with or without tzip. Where
# the environment sees the system's packages, and tzip is one of these, its folder is not yet on the path at that time.
LINE = (
    "import sys; _tzip = sys.path[:]; sys.path.append({folder!r}); "
    'exec("try:\\n import tzip.hook\\n tzip.hook.watch()\\nexcept Exception:\\n pass"); sys.path[:] = _tzip; del _tzip\n'
)


def hook_file() -> Path:
    """Return where this environment's hook stands, or would."""
    return Path(sysconfig.get_paths()["purelib"], _NAME)


def line() -> str:
    """Return what the hook's file says."""
    return LINE.format(folder=os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def enable() -> Path:
    """Make every interpreter of this virtual environment open packed files; return the file that does it.

    Raises UsageError outside a virtual environment: a system's Python is not ours to change.
    """
    if sys.prefix == sys.base_prefix:
        raise UsageError("this Python is no virtual environment; use tzip.install() or tzip run instead")
    file = hook_file()
    file.write_text(line(), encoding="utf-8")
    return file


def disable() -> bool:
    """Take the hook out of this environment; return whether it was there."""
    file = hook_file()
    there = file.exists()
    file.unlink(missing_ok=True)
    return there


def enabled() -> bool:
    """Say whether this environment has the hook."""
    return hook_file().exists()


def run(command: list[str]) -> int:
    """Run a command with the hook in it and in its children; return its exit code (where the system can, take its place)."""
    environment = dict(os.environ)
    before = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = BOOTSTRAP if not before else BOOTSTRAP + os.pathsep + before
    try:
        if os.name == "posix":
            sys.stdout.flush()
            sys.stderr.flush()
            os.execvpe(command[0], command, environment)
        import subprocess

        return subprocess.call(command, env=environment)
    except FileNotFoundError:
        raise UsageError(f"there is no command {command[0]!r}") from None
