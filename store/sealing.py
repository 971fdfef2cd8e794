"""JSON that proves itself, and the types of its values: heads, pages and manifests are read with these."""

import hashlib
import json
import re
from typing import Any

from tzip.coders.errors import CorruptError, UnsupportedError

VERSION = 1
_ID = re.compile(r"[0-9a-f]{64}\Z")


def canonical(body: Any) -> bytes:
    """Return the one JSON form of a value: keys sorted, no spaces, UTF-8."""
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sealed(body: dict[str, Any]) -> bytes:
    """Return the JSON of `body` with the SHA-256 of its canonical form."""
    return canonical({**body, "sha256": hashlib.sha256(canonical(body)).hexdigest()})


def unsealed(data: bytes, kind: str, path: str) -> dict[str, Any]:
    """Return what was sealed, without its sum. Raises CorruptError, or UnsupportedError for a newer version of `kind`."""
    try:
        body = json.loads(data)
        sha = body.pop("sha256")
        version = body[kind]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CorruptError(f"no {kind} in JSON").at(path=path) from None
    try:
        same = hashlib.sha256(canonical(body)).hexdigest() == sha
    except (ValueError, UnicodeEncodeError, RecursionError):
        same = False
    if not same:
        raise CorruptError("it does not match its SHA-256").at(path=path)
    if type(version) is not int or version > VERSION:  # after the sum, lest a flipped digit passes for a newer version
        raise UnsupportedError(f"{kind} version {version!r}; this tzip knows {VERSION}").at(path=path)
    return dict(body)


def as_id(value: Any) -> str:
    """Return an id of 64 hexadecimal digits; raises ValueError."""
    if not isinstance(value, str) or not _ID.match(value):
        raise ValueError(f"{value!r} is no id")
    return value


def as_count(value: Any) -> int:
    """Return an integer from 0 to 2^63 - 1; raises ValueError."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r} is no count")
    return value


def as_text(value: Any) -> str:
    """Return a string; raises TypeError."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def as_object(value: Any) -> dict[str, Any]:
    """Return a JSON object; raises TypeError."""
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is no object")
    return value
