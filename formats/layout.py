"""The fixed structures of FORMAT.md, each with its size, its writer and its reader. Nothing else."""

import hashlib
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

from tzip.coders.errors import CorruptError, NotAnArchiveError, TruncatedError, UnsupportedError
from tzip.coders.mixing import mix

VERSION = 1  # 0 was the draft
CHUNK_LOG, GROUP_LOG = 20, 18
CHUNK_ELEMENTS, GROUP_ELEMENTS = 1 << CHUNK_LOG, 1 << GROUP_LOG
MAX_RECORD = 1 << 25
MAX_BODY = 1 << 28
MAX_STRING = 1 << 22  # of the parameters of a predictor; other strings have GROUP_ELEMENTS at most
ALIGN, WIDE_ALIGN = 16, 128
WIDE_RECORD, WIDE_PAYLOAD = 65536, 16384  # from these sizes on: WIDE_ALIGN

MEMBER, CHUNK, DONE, INDEX = (b"\xf5TZ" + kind + b"\n" for kind in (b"memb", b"chnk", b"done", b"indx"))
RECORD_HEAD = 32
MIN_RECORD = 48


def is_url(name: str) -> bool:
    """Say whether `name` is a URL; a drive of Windows has one letter and no slashes."""
    return re.match(r"[a-z][a-z0-9+.-]+://", name) is not None


def align(x: int, a: int) -> int:
    """Return the smallest multiple of `a` that is at least `x`."""
    return -(-x // a) * a


def group_size(elements: int, groups: int = 0) -> int:
    """Return the elements of each group but the last of a chunk (section 5); `groups` 0: as few as there can be.

    Raises CorruptError for a number of groups that so many elements cannot have.
    """
    fewest = max(1, -(-elements // GROUP_ELEMENTS))
    size = align(-(-elements // (groups or fewest)), 4096)
    if groups and (groups < fewest or (groups - 1) * size >= elements):
        raise CorruptError(f"{elements} elements in {groups} groups")
    return size


def check8(data: bytes | memoryview) -> bytes:
    """Return the first 8 bytes of the SHA-256 of `data`."""
    return hashlib.sha256(data).digest()[:8]


def check_at(record: bytes | memoryview, offset: int) -> bytes:
    """Return the check of a record as it stands at `offset` of the archive, or the bare check of one read there.

    The two differ by the position, so a record counts only where it was written: not in an archive within a payload,
    not after a misdirected write.
    """
    return (int.from_bytes(record[8:16], "little") ^ mix(offset)).to_bytes(8, "little")


def record_start(position: int, kind: bytes, length: int) -> int:
    """Return where a record of that kind and length starts when the structure before it ends at `position`."""
    return align(position, WIDE_ALIGN if kind == CHUNK and length >= WIDE_RECORD else ALIGN)


def payload_start(position: int, stored: int) -> int:
    """Return where a block's payload starts within its record."""
    return align(position, WIDE_ALIGN if stored >= WIDE_PAYLOAD else ALIGN)


CLASSES = 8  # of the elements of a delta


def group_cuts(classes: Sequence[int]) -> list[int]:
    """Return where the groups of a delta begin among its elements, which lie class by class, and where the last ends."""
    cuts: list[int] = []
    start = 0
    for elements in classes:
        if elements:
            cuts += range(start, start + elements, group_size(elements))
        start += elements
    return [*cuts, start]


@dataclass(frozen=True, slots=True)
class ArchiveHeader:
    """Section 2.1."""

    writer: str
    zstd_version: int
    version: int = VERSION
    must_understand: int = 0
    may_ignore: int = 0

    SIZE: ClassVar[int] = 64
    MAGIC: ClassVar[bytes] = b"\x89TZIP\r\n\x1a"
    FORM: ClassVar[struct.Struct] = struct.Struct("<8sHBBIII24s8s")

    def write(self) -> bytes:
        """Return the 64 bytes."""
        head = self.FORM.pack(
            self.MAGIC,
            self.version,
            CHUNK_LOG,
            GROUP_LOG,
            self.must_understand,
            self.may_ignore,
            self.zstd_version,
            self.writer.encode("ascii")[:24],
            bytes(8),
        )
        return head + check8(head)

    @classmethod
    def read(cls, data: bytes) -> Self:
        """Parse 64 bytes; raises the errors of section 2.1."""
        if data[:8] != cls.MAGIC[: len(data[:8])] or not data:
            raise NotAnArchiveError("not a tzip archive: the magic bytes are missing").at(offset=0)
        if len(data) < cls.SIZE:
            raise TruncatedError(f"the archive header has {len(data)} of {cls.SIZE} bytes").at(offset=0)
        _, version, chunk_log, group_log, must, may, zstd, writer, reserved = cls.FORM.unpack(data[:56])
        if version == 0:
            raise UnsupportedError("format version 0, a draft: the tzip that made it reads it").at(offset=8)
        if version > VERSION:
            raise UnsupportedError(f"format version {version}: this tzip reads up to {VERSION}; upgrade it").at(offset=8)
        if check8(data[:56]) != data[56:64]:
            raise CorruptError("the archive header does not match its check").at(offset=56)
        if must:
            raise UnsupportedError(f"must-understand flags {must:#x} are not known to this tzip; upgrade it").at(offset=12)
        if (chunk_log, group_log) != (CHUNK_LOG, GROUP_LOG):
            raise UnsupportedError(f"chunk grid 2^{chunk_log} / 2^{group_log} is not known to this tzip").at(offset=10)
        if reserved != bytes(8):
            raise CorruptError("reserved bytes of the archive header are not zero").at(offset=48)
        text = writer.rstrip(b"\0")
        return cls(text.decode("ascii", "replace"), zstd, version, must, may)


@dataclass(frozen=True, slots=True)
class Footer:
    """Section 2.6."""

    index_offset: int
    index_length: int
    archive_length: int
    archive_id: bytes

    SIZE: ClassVar[int] = 80
    MAGIC: ClassVar[bytes] = b"\x1a\n\rPIZT\x89"
    FORM: ClassVar[struct.Struct] = struct.Struct("<QQQ32s8s")

    def write(self) -> bytes:
        """Return the 80 bytes."""
        body = self.FORM.pack(self.index_offset, self.index_length, self.archive_length, self.archive_id, bytes(8))
        return body + check8(body) + self.MAGIC

    @classmethod
    def read(cls, data: bytes, file_size: int) -> Self:
        """Parse the last 80 bytes of a file of `file_size` bytes."""
        if len(data) < cls.SIZE or data[-8:] != cls.MAGIC:
            raise TruncatedError("the archive has no footer: its end is missing").at(offset=file_size)
        offset, length, total, archive_id, reserved = cls.FORM.unpack(data[-80:-16])
        if check8(data[-80:-16]) != data[-16:-8]:
            raise CorruptError("the footer does not match its check").at(offset=file_size - cls.SIZE)
        if total > file_size:
            raise TruncatedError(f"the archive has {total} bytes, the file {file_size}").at(offset=file_size)
        if offset < ArchiveHeader.SIZE or offset % ALIGN or offset + length + cls.SIZE != total or reserved != bytes(8):
            raise CorruptError("the footer contradicts itself").at(offset=file_size - cls.SIZE)
        return cls(offset, length, total, archive_id)


@dataclass(frozen=True, slots=True)
class DoneRecord:
    """Section 2.5."""

    member: int
    size: int
    sha256: bytes | None

    SIZE: ClassVar[int] = 80
    FORM: ClassVar[struct.Struct] = struct.Struct("<QQ32sIIQ")

    def write(self) -> bytes:
        """Return the 80 bytes of the record."""
        known = self.sha256 is not None
        body = self.FORM.pack(self.SIZE, self.size, self.sha256 or bytes(32), self.member, int(known), 0)
        return DONE + check8(body) + body

    @classmethod
    def read(cls, data: bytes) -> Self:
        """Parse a record whose check holds."""
        length, size, sha, member, flags, zero = cls.FORM.unpack(data[16 : cls.SIZE])
        if length != cls.SIZE or flags > 1 or zero or (not flags and sha != bytes(32)):
            raise CorruptError("a done record contradicts itself")
        return cls(member, size, sha if flags else None)


@dataclass(frozen=True, slots=True)
class ChunkHead:
    """The fixed part of a chunk record, section 5."""

    length: int
    run: int
    chunk: int
    elements: int
    split: int
    width: int
    transform: int
    inputs: int
    decoded_sum: int

    SIZE: ClassVar[int] = 48
    FORM: ClassVar[struct.Struct] = struct.Struct("<QIIIBBBBQ")

    def write(self) -> bytes:
        """Return bytes 16 … 47 of the record (magic and check come before)."""
        return self.FORM.pack(
            self.length,
            self.run,
            self.chunk,
            self.elements,
            self.split,
            self.width,
            self.transform,
            self.inputs,
            self.decoded_sum,
        )

    @classmethod
    def read(cls, data: bytes | memoryview) -> Self:
        """Parse the first 48 bytes of a record; checks nothing but their number and the magic."""
        if len(data) < cls.SIZE:
            raise TruncatedError(f"a chunk record has {len(data)} bytes")
        if data[:8] != CHUNK:
            raise CorruptError("a chunk record does not start with its magic")
        return cls(*cls.FORM.unpack(data[16 : cls.SIZE]))


@dataclass(frozen=True, slots=True)
class TransformHead:
    """The parameters of a transform, section 6.3; the entries of its blocks A and B follow."""

    inner: int
    inner_width: int
    a: int = 0
    size_a: int = 0
    size_b: int = 0
    b: int = 0
    c: int = 0
    v: int = 0

    SIZE: ClassVar[int] = 32
    FORM: ClassVar[struct.Struct] = struct.Struct("<IBBHIIIIQ")

    def write(self) -> bytes:
        """Return the 32 bytes."""
        return self.FORM.pack(
            self.inner, self.inner_width, self.a, 0, self.size_a, self.size_b, self.b, self.c, self.v
        )

    @classmethod
    def read(cls, data: bytes | memoryview) -> Self:
        """Parse 32 bytes; raises CorruptError for what no transform has."""
        inner, width, a, reserved, size_a, size_b, b, c, v = cls.FORM.unpack(data)
        too_long = inner > 4 * CHUNK_ELEMENTS or size_a > GROUP_ELEMENTS or size_b > MAX_STRING
        if reserved or width not in (1, 2, 4, 8) or too_long:
            raise CorruptError("the header of a transform is out of range")
        return cls(inner, width, a, size_a, size_b, b, c, v)


class _BlockFields(NamedTuple):
    codec: int
    joined: int = 0
    segments: int = 0
    flags: int = 0
    stored: int = 0
    escapes: int = 0
    value: int = 0


class Block(_BlockFields):
    """The entry of one plane of one group, section 5. A tuple: chunks have dozens, and dataclasses take six times as long."""

    __slots__ = ()
    SIZE: ClassVar[int] = 16
    FORM: ClassVar[struct.Struct] = struct.Struct("<BBBBIIHH")

    @property
    def shared(self) -> bool:
        """Whether the block uses an earlier block's table."""
        return bool(self.flags & 1)

    @property
    def sign_mode(self) -> int:
        """0: signs are in the rest; 1: all are 0; 2: all are 1."""
        return self.flags >> 1 & 3

    def write(self) -> bytes:
        """Return the 16 bytes."""
        return self.FORM.pack(*self, 0)

    @classmethod
    def read(cls, data: bytes | memoryview) -> Self:
        """Parse 16 bytes; the rules of the codec are for its decoder."""
        *fields, reserved = cls.FORM.unpack(data)
        if reserved or fields[3] > 7:
            raise CorruptError("a block entry has unknown flags or a reserved field that is not zero")
        return cls(*fields)
