"""Codec 2: zstandard frames with their content size and no dictionary (FORMAT.md, section 7.7; RFC 8878)."""

import zstandard

from tzip.coders.errors import CorruptError

VERSION = ".".join(str(v) for v in zstandard.ZSTD_VERSION)
VERSION_NUMBER = zstandard.ZSTD_VERSION[0] * 10000 + zstandard.ZSTD_VERSION[1] * 100 + zstandard.ZSTD_VERSION[2]


def encode(raw: bytes | memoryview, level: int) -> bytes:
    """Return one frame of `raw`."""
    return zstandard.ZstdCompressor(level=level, write_content_size=True, write_checksum=False).compress(raw)


def decode(frame: bytes | memoryview, size: int) -> bytes:
    """Return the `size` bytes of the frame; raises CorruptError before it allocates when the frame says otherwise."""
    try:
        if zstandard.frame_content_size(frame) != size:
            raise CorruptError(f"zstd: the frame does not hold {size} bytes")
        raw = zstandard.ZstdDecompressor().decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as e:
        raise CorruptError(f"zstd: {e}") from None
    if len(raw) != size:
        raise CorruptError(f"zstd: {len(raw)} bytes, not {size}")
    return raw
