"""The in-place form: the true header of a safetensors file, then an archive that holds the file (FORMAT.md, section 2.7).

A tool that reads headers alone sees the true names, dtypes and shapes; a reader that knows nothing of archives refuses the
file, for its tensors do not end where the file does.
"""

from collections.abc import Callable

from tzip.formats.layout import ArchiveHeader, Footer

BLOCK = 4096  # the archive starts at a multiple of this


def prefix(header: bytes) -> bytes:
    """Return what stands before the archive: the first bytes of a safetensors file, up to its data, and zeros."""
    return header + bytes(-len(header) % BLOCK)


def is_packed(read: Callable[[int, int], bytes], size: int) -> bool:
    """Say whether a file that `read(offset, n)` reads is an archive or has one behind a header.

    A plain safetensors file whose last tensor happens to end like an archive is neither.
    """
    if size < 8:
        return False
    if read(0, 8) == ArchiveHeader.MAGIC:
        return True
    if size < Footer.SIZE or read(size - 8, 8) != Footer.MAGIC:
        return False
    from tzip.formats.safetensors_header import HeaderError, parse  # numpy with it, which most processes that ask do not need

    try:
        parse(read, size)
    except HeaderError:
        return True
    return False
