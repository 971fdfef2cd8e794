"""Which member names and link targets an archive may hold (FORMAT.md, section 2.4).

The rules are the same for writing and reading, and for every system: an archive that one system can restore, all can.
"""

import posixpath
import re
import unicodedata
from collections.abc import Iterable

from tzip.coders.errors import CorruptError

MAX_NAME = 4096
MAX_DEPTH = 64
PARTIAL = ".tzip-partial"  # how files on their way are called, see atomic.py
_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"|?*\\]')
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE | re.DOTALL)


def check_name(name: str) -> None:
    """Raise CorruptError, saying why, unless `name` is a safe relative path on every system."""
    reason = _fault(name)
    if reason:
        raise CorruptError(f"unsafe member name: {reason}").at(member=name)


def _fault(name: str) -> str | None:
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "it is not valid Unicode"
    if not 1 <= size <= MAX_NAME:
        return f"it has {size} bytes, not 1 … {MAX_NAME}"
    if _FORBIDDEN.search(name):
        return "it holds a control character, a backslash or one of < > : \" | ? *"
    parts = name.split("/")
    if len(parts) > MAX_DEPTH:
        return f"it has {len(parts)} components, more than {MAX_DEPTH}"
    for part in parts:
        if part.casefold().endswith(PARTIAL):
            return f"a component ends with {PARTIAL}, the name of what an interrupted tzip leaves"
        if part in ("", ".", ".."):
            return "it is absolute or has an empty, '.' or '..' component"
        if part[-1] in ". ":
            return "a component ends with a dot or a space"
        if _DEVICE.fullmatch(part):
            return "a component is a device name on Windows"
    return None


def fold(name: str) -> str:
    """Return what two names must not share: the form that case-insensitive systems compare."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def check_names(names: Iterable[tuple[str, bool]]) -> None:
    """Check all names of an archive, each with whether it is a folder: safe, distinct, nothing below a file."""
    seen: dict[str, tuple[str, bool]] = {}
    for name, is_folder in names:
        check_name(name)
        key = fold(name)
        if key in seen:
            raise CorruptError(f"two members have the names {seen[key][0]!r} and {name!r}").at(member=name)
        seen[key] = (name, is_folder)
    for key, (name, _) in seen.items():
        parent = posixpath.dirname(key)
        while parent:
            if parent in seen and not seen[parent][1]:
                raise CorruptError(f"member {seen[parent][0]!r} is no folder, yet another lies below it").at(member=name)
            parent = posixpath.dirname(parent)


def check_links(links: dict[str, str]) -> None:
    """Raise CorruptError unless every link (name to target) stays below the root, whatever the others are.

    A target climbs first ("..", from the link's own folder, which is never below a link) and then only descends, through
    names that are no links themselves; so it ends where its text says.
    """
    folded = {fold(name) for name in links}
    for name, target in links.items():
        reason = _link_fault(name, target, folded)
        if reason:
            raise CorruptError(f"unsafe link target {target!r}: {reason}").at(member=name)


def _link_fault(name: str, target: str, links: set[str]) -> str | None:
    try:
        target.encode()
    except UnicodeEncodeError:
        return "it is not valid Unicode"
    if not target or len(target) > MAX_NAME or target.startswith("/") or _FORBIDDEN.search(target):
        return "it is empty, too long, absolute or holds a forbidden character"
    parts = [p for p in target.split("/") if p not in ("", ".")]
    climb = next((i for i, p in enumerate(parts) if p != ".."), len(parts))
    if ".." in parts[climb:]:
        return "it climbs after it has descended"
    folder = name.split("/")[:-1]
    if climb > len(folder):
        return "it leaves the archive"
    path = folder[: len(folder) - climb] + parts[climb:]
    if not path:
        return "it is the root itself"
    for i in range(1, len(path)):
        if fold("/".join(path[:i])) in links:
            return f"it goes through the link {'/'.join(path[:i])!r}"
    return None
