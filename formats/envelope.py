"""The in-place form: the true header of a safetensors file, then an archive that holds the file (FORMAT.md, section 2.7).

A tool that reads headers alone sees the true names, dtypes and shapes; a reader that knows nothing of archives refuses the
file, for its tensors do not end where the file does.
"""

from collections.abc import Callable

from tzip.formats.layout import ArchiveHeader, Footer, align

BLOCK = 4096  # the archive starts at a multiple of this


def prefix(header: bytes) -> bytes:
    """Return what stands before the archive: the first bytes of a safetensors file, up to its data, and zeros."""
    return header + bytes(-len(header) % BLOCK)


def origin_of(head: bytes) -> int:
    """Return where an archive begins, if there is one, behind the header whose first eight bytes these are."""
    return align(min(8 + int.from_bytes(head, "little"), 1 << 40), BLOCK)


def is_packed(read: Callable[[int, int], bytes], size: int) -> bool:
    """Say whether a file that `read(offset, n)` reads is an archive or has one behind a header.

    A plain safetensors file whose last tensor happens to end like an archive is neither.
    """
    if size < 8:
        return False
    head = read(0, 8)
    if head == ArchiveHeader.MAGIC:
        return True
    # An archive that is cut off, or has a wrong last byte, is a damaged one, not a plain file.
    if size < Footer.SIZE or (read(size - 8, 8) != Footer.MAGIC and read(origin_of(head), 8) != ArchiveHeader.MAGIC):
        return False
    from tzip.formats.safetensors_header import HeaderError, parse  # numpy with it, which most processes that ask do not need

    try:
        parse(read, size)
    except HeaderError:
        return True
    return False
