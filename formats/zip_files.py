"""zip files, numpy's .npz among them: the entries that are stored as they are, with no compression.

Follows APPNOTE 6.3 with zip64, and the zipfile module where that leaves a choice. Nothing is ever inflated.
"""

import re
import struct
from typing import NamedTuple

from tzip.formats.containers import ContainerError, Contents, Inner, Read

NAME = "zip"
STORED = 0
ENCRYPTED = -1
MAX_DIRECTORY = 100_000_000

_LOCAL, _CENTRAL, _END, _LOCATOR, _END64 = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x07", b"PK\x06\x06"
_LOCAL_FIELDS = struct.Struct("<4s22x2H")  # lengths of the name and of the extra fields
_CENTRAL_FIELDS = struct.Struct("<4s4x2H8x2L3H8xL")
_END_FIELDS = struct.Struct("<4s4H2LH")
_LOCATOR_FIELDS = struct.Struct("<4sLQL")
_END64_FIELDS = struct.Struct("<4s12x2L4Q")
_IN_ZIP64 = 0xFFFFFFFF
_UTF_8 = 0x800
_UNREADABLE = 0x1 | 0x20 | 0x40 | 0x2000  # encrypted, a patch, strongly encrypted, masked


class Entry(NamedTuple):
    """A file in the archive: bytes begin … end - 1, as `method` (a method of zip's, or ENCRYPTED) has left them."""

    name: str
    begin: int
    end: int
    method: int


class _Listed(NamedTuple):
    """What the directory says of an entry: where its local header begins, and how many bytes of data follow that."""

    offset: int
    raw_name: bytes
    name: str
    nbytes: int
    method: int


def find(read: Read, size: int) -> Contents | None:
    """Say where the stored entries are, or None when the file does not begin like a zip file."""
    if read(0, 4) not in (_LOCAL, _END):
        return None
    return Contents(NAME, files=[Inner(e.name, e.begin, e.end) for e in entries(read, size) if e.method == STORED])


def entries(read: Read, size: int) -> list[Entry]:
    """Return all entries but folders, in the order of their bytes, which are proven to lie in the file and not to overlap.

    Raises ContainerError when the directory is missing or lies.
    """
    found = []
    listed, limit = _directory(read, size)
    listed.sort(key=lambda entry: entry.offset)  # only neighbours can overlap then, and the file is read in one direction
    free, fixed = 0, _LOCAL_FIELDS.size
    for offset, raw_name, name, nbytes, method in listed:
        head = read(offset, fixed + len(raw_name)) if offset < limit else b""
        if len(head) < fixed or not head.startswith(_LOCAL):
            raise ContainerError(f"entry {name!r} is not at byte {offset}, where the directory has it")
        _, name_size, extra_size = _LOCAL_FIELDS.unpack_from(head)
        if name_size != len(raw_name) or not head.endswith(raw_name, fixed) or len(head) != fixed + name_size:
            raise ContainerError(f"entry {name!r} has another name than in the directory")
        begin = offset + len(head) + extra_size
        if offset < free:
            raise ContainerError(f"entry {name!r} overlaps the one before it")
        free = begin + nbytes
        if free > limit:
            raise ContainerError(f"entry {name!r} ends at byte {free}, the entries at {limit}")
        if not name.endswith("/"):
            found.append(Entry(name, begin, free, method))
    return found


def _directory(read: Read, size: int) -> tuple[list[_Listed], int]:
    """Return (what the directory lists, byte at which the directory begins)."""
    at, total, nbytes, offset = _end(read, size)
    begin = at - nbytes
    shift = begin - offset  # something stands before the first entry, which the offsets do not count
    if shift < 0:
        raise ContainerError(f"its directory of {nbytes} bytes at {offset} does not lie before byte {at}")
    if nbytes > MAX_DIRECTORY:
        raise ContainerError(f"its directory has {nbytes} bytes, more than {MAX_DIRECTORY}")
    raw = read(begin, nbytes)
    listed, i = [], 0
    while i < len(raw):
        if len(raw) - i < _CENTRAL_FIELDS.size or not raw.startswith(_CENTRAL, i):
            raise ContainerError(f"its directory breaks off at byte {begin + i}")
        _, flags, method, packed, plain, name_size, extra_size, note_size, header = _CENTRAL_FIELDS.unpack_from(raw, i)
        i += _CENTRAL_FIELDS.size
        raw_name, extra = raw[i : i + name_size], raw[i + name_size : i + name_size + extra_size]
        i += name_size + extra_size + note_size
        if _IN_ZIP64 in (packed, plain, header):
            plain, packed, header = _widened([plain, packed, header], extra)
        name = raw_name.decode("utf-8" if flags & _UTF_8 else "cp437", "replace").partition("\0")[0]
        if flags & _UNREADABLE:
            method = ENCRYPTED
        elif method == STORED and packed != plain:
            raise ContainerError(f"entry {name!r} is stored, yet {plain} bytes have become {packed}")
        listed.append(_Listed(header + shift, raw_name, name, packed, method))
    if i != nbytes or (len(listed) - total) & 0xFFFF:  # writers without zip64 count modulo 65536
        raise ContainerError(f"its directory lists {len(listed)} entries in {i} bytes, not {total} in {nbytes}")
    return listed, begin


def _end(read: Read, size: int) -> tuple[int, int, int, int]:
    """Return (byte at which the directory ends, entries, bytes of the directory, offset of the directory)."""
    tail = read(max(size - _END_FIELDS.size - 0xFFFF, 0), _END_FIELDS.size + 0xFFFF)
    marks = [m.start() for m in re.finditer(re.escape(_END), tail) if m.start() + _END_FIELDS.size <= len(tail)]
    if not marks:
        raise ContainerError("its directory is missing at the end: it may be truncated")
    ends = [_END_FIELDS.unpack_from(tail, i) for i in marks]
    # The comment may hold the mark as well: believe the record whose comment ends the file, if there is one.
    whole = [i for i, end in enumerate(ends) if marks[i] + _END_FIELDS.size + end[7] == len(tail)]
    chosen = whole[-1] if whole else -1
    at = size - len(tail) + marks[chosen]
    _, disk, first_disk, _, total, nbytes, offset, _ = ends[chosen]
    locator = read(at - _LOCATOR_FIELDS.size, _LOCATOR_FIELDS.size) if at >= _LOCATOR_FIELDS.size else b""
    if locator.startswith(_LOCATOR):
        stated = _LOCATOR_FIELDS.unpack(locator)[2]
        usual = at - _LOCATOR_FIELDS.size - _END64_FIELDS.size  # it is there although something stands before the first entry
        at = next((i for i in (stated, usual) if 0 <= i <= usual and read(i, 4) == _END64), -1)
        if at < 0:
            raise ContainerError("its zip64 directory record is missing")
        _, disk, first_disk, _, total, nbytes, offset = _END64_FIELDS.unpack(read(at, _END64_FIELDS.size))
    if disk or first_disk:
        raise ContainerError("it is one of several parts")
    return at, total, nbytes, offset


def _widened(values: list[int], extra: bytes) -> list[int]:
    """Replace the values that are all ones by those of the zip64 extra field, which holds just these, in this order."""
    at = 0
    while at + 4 <= len(extra):
        kind, nbytes = struct.unpack_from("<2H", extra, at)
        at += 4
        if kind == 1:
            wide = struct.unpack_from(f"<{min(nbytes, len(extra) - at) // 8}Q", extra, at)
            if len(wide) < values.count(_IN_ZIP64):
                raise ContainerError("its directory has a zip64 field that is too short")
            left = iter(wide)
            return [next(left) if v == _IN_ZIP64 else v for v in values]
        at += nbytes
    return values
