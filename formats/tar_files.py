"""tar files without compression (ustar, GNU, pax and the old form before them): the regular files in them.

Follows POSIX pax, the GNU tar manual, and the tarfile module where these leave a choice. Sparse files stay bytes.
"""

from tzip.formats.containers import ContainerError, Contents, Inner, Read

NAME = "tar"
BLOCK = 512
MAX_FILES = 1_000_000
MAX_EXTENSION = 1_000_000  # bytes of a long name or of a pax header
MAX_NAMES = 100_000_000  # bytes of the names of all files

_FILES = b"\0" b"07"
_WITHOUT_DATA = b"123456"  # links, devices, folders, pipes
_LONG_NAME, _LONG_LINK, _SPARSE, _PAX, _PAX_GLOBAL = b"L", b"K", b"S", b"xX", b"g"


def find(read: Read, size: int) -> Contents | None:
    """Say where the files are, or None when the first block is no header."""
    block = read(0, BLOCK)
    old = not any(block[257:329]) and _sum_is_right(block)  # the form that has neither magic nor names of owners
    if len(block) < BLOCK or not (old or block[257:262] == b"ustar"):
        return None
    contents = Contents(NAME)
    lasting: dict[bytes, bytes] = {}  # pax records for all files that follow
    records: dict[bytes, bytes] = {}  # those for the next one
    long_name: bytes | None = None
    at = names = 0
    while at < size:
        block = read(at, BLOCK)
        if not any(block):
            break
        if len(block) < BLOCK or not _sum_is_right(block):
            raise ContainerError(f"there is no valid header at byte {at}")
        kind, nbytes = block[156:157], _number(block[124:136])
        begin = at + BLOCK
        if kind in _LONG_NAME + _LONG_LINK + _PAX + _PAX_GLOBAL:
            at = _after(begin, nbytes, size)
            payload = _extension(read, begin, nbytes)
            if kind == _LONG_NAME:
                long_name = payload.partition(b"\0")[0]
            elif kind == _PAX_GLOBAL:
                lasting |= _records(payload)
            elif kind in _PAX:
                records = _records(payload)
            continue
        records = lasting | records
        raw_name = records.get(b"path") or long_name or _name(block)
        if b"size" in records:
            nbytes = _decimal(records[b"size"])
        if kind == _SPARSE:
            begin = _after_sparse_map(read, block, begin)
        if kind in _WITHOUT_DATA:
            nbytes = 0
        at = _after(begin, nbytes, size)
        if kind in _FILES and b"GNU.sparse" not in records and not raw_name.endswith(b"/"):  # so ends a folder of the old form
            name = raw_name.decode("utf-8", "replace")
            names += len(raw_name)
            if len(contents.files) == MAX_FILES or names > MAX_NAMES:
                contents.warnings.append(f"only the first {len(contents.files)} files are looked into: there are too many")
                break
            contents.files.append(Inner(name, begin, begin + nbytes))
        records, long_name = {}, None
    return contents


def _sum_is_right(block: bytes) -> bool:
    """Return whether the header's own sum is that of its bytes, which old writers took to be signed."""
    field = block[148:156].partition(b"\0")[0].strip(b" ")
    if not field or field.strip(b"01234567"):
        return False
    counted = block[:148] + b" " * 8 + block[156:]
    excess = sum(counted) - int(field, 8)
    return excess == 0 or excess == 256 * sum(b > 127 for b in counted)


def _number(field: bytes) -> int:
    """Return a size: in octal, or as binary after a byte 0x80."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip(b" ")
    if digits.strip(b"01234567"):
        raise ContainerError(f"a header has the size {field!r}")
    return int(digits or b"0", 8)


def _decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > 20:
        raise ContainerError(f"a pax header has the number {text[:40]!r}")
    return int(text)


def _after(begin: int, nbytes: int, size: int) -> int:
    """Return where the block after the data begins."""
    end = begin - -nbytes // BLOCK * BLOCK
    if end > size:
        raise ContainerError(f"it is truncated: {nbytes} bytes should follow at byte {begin}, the file ends at {size}")
    return end


def _after_sparse_map(read: Read, block: bytes, at: int) -> int:
    """Return where the data begins: maps that do not fit into the header continue in blocks of their own."""
    more = block[482]
    while more:
        block = read(at, BLOCK)
        if len(block) < BLOCK:
            raise ContainerError("it is truncated in the map of a sparse file")
        more = block[504]
        at += BLOCK
    return at


def _extension(read: Read, begin: int, nbytes: int) -> bytes:
    if nbytes > MAX_EXTENSION:
        raise ContainerError(f"the header at byte {begin - BLOCK} has {nbytes} bytes of names, more than {MAX_EXTENSION}")
    return read(begin, nbytes)


def _records(payload: bytes) -> dict[bytes, bytes]:
    """Return those pax records that say where data is and how it is called. A record is `length key=value`, newline."""
    records = {}
    at = 0
    while at < len(payload) and payload[at]:
        head = payload[at : at + 20].partition(b" ")[0]
        end = at + _decimal(head)
        key, equals, value = payload[at + len(head) + 1 : end - 1].partition(b"=")
        if not equals or payload[end - 1 : end] != b"\n":
            raise ContainerError("a pax header has a record that is none")
        key = b"GNU.sparse" if key.startswith(b"GNU.sparse.") else key
        if value and key in (b"path", b"size", b"GNU.sparse"):
            records[key] = value
        at = end
    return records


def _name(block: bytes) -> bytes:
    name, prefix = block[:100].partition(b"\0")[0], block[345:500].partition(b"\0")[0]
    return prefix + b"/" + name if prefix and block[257:263] == b"ustar\0" else name
