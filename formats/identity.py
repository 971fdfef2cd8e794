"""Content ids: what a tensor is, whatever container or archive holds it (STORE.md, section 3)."""

import hashlib
from collections.abc import Sequence

from tzip.coders.arrays import U8
from tzip.formats.dtypes import Dtype
from tzip.formats.layout import CHUNK_ELEMENTS

DOMAIN = b"tzip content 1\0"


def block_bytes(dtype: Dtype) -> int:
    """Return the bytes of a block that is hashed by itself: 2^20 elements, counted as the format codes them."""
    return CHUNK_ELEMENTS * dtype.width


def block_digest(block: U8) -> bytes:
    """Return the SHA-256 of a block's bytes."""
    return hashlib.sha256(memoryview(block)).digest()


def content_id(dtype: Dtype, shape: Sequence[int], digests: Sequence[bytes]) -> bytes:
    """Return the 32 bytes that name a tensor, from the digests of its blocks in order."""
    head = DOMAIN + dtype.name.encode() + b"\0" + b"".join(n.to_bytes(8, "little") for n in (len(shape), *shape))
    return hashlib.sha256(head + b"".join(digests)).digest()
