"""The catalogue: the body of member records and of the index (FORMAT.md, section 2.3).

Columns of fixed width and a string heap, read with `np.frombuffer`: no object per tensor, so that an archive of
10,000 tensors opens in milliseconds.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tzip.coders import zstd
from tzip.coders.errors import CorruptError, TruncatedError, UnsupportedError
from tzip.formats.dtypes import DTYPES, OPAQUE, Dtype
from tzip.formats.layout import (
    ALIGN,
    CHUNK_ELEMENTS,
    INDEX,
    MAX_BODY,
    MIN_RECORD,
    RECORD_HEAD,
    align,
    check8,
)
from tzip.formats.names import check_names

FILE, FOLDER, LINK, TENSOR = range(4)
SHA_KNOWN, CLOSED = 1, 2
NO_MTIME = -(1 << 63)
INLINE, IN_RUN = 0, 1
FLAT, STRIDED = 0, 1  # layouts of tensors
ROLES = 4  # kinds of inputs: 0 at the same place, others as predictors name them
NOT_KNOWN = (1 << 64) - 1  # where a tensor begins in its file
MAX_DEPENDENCE = 4  # runs of a member that follow from one in a row
_TABLES = ("members", "extents", "tensors", "runs", "inputs", "chunks", "dims", "heap", "inline")
_COUNTS = struct.Struct("<12I")
_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("members", "m_name", "<u4"),
    ("members", "m_kind", "u1"),
    ("members", "m_flags", "u1"),
    ("members", "m_mode", "<u2"),
    ("members", "m_mtime", "<i8"),
    ("members", "m_size", "<u8"),
    ("members", "m_sha", "(32,)u1"),
    ("members", "m_record", "<u8"),
    ("members", "m_check", "<u8"),
    ("members", "m_extents", "<u4"),
    ("members", "m_tensors", "<u4"),
    ("members", "m_runs", "<u4"),
    ("extents", "x_kind", "u1"),
    ("extents", "x_run", "<u4"),
    ("extents", "x_offset", "<u8"),
    ("extents", "x_length", "<u8"),
    ("tensors", "t_name", "<u4"),
    ("tensors", "t_dtype", "u1"),
    ("tensors", "t_layout", "u1"),
    ("tensors", "t_ndim", "u1"),
    ("tensors", "t_extent", "<u4"),
    ("tensors", "t_offset", "<u8"),
    ("runs", "r_width", "u1"),
    ("runs", "r_inputs", "<u4"),
    ("runs", "r_elements", "<u8"),
    ("inputs", "i_kind", "u1"),
    ("inputs", "i_offset", "<u8"),
    ("inputs", "i_length", "<u8"),
    ("inputs", "i_begin", "<u8"),
    ("inputs", "i_archive", "(32,)u1"),
    ("inputs", "i_file", "(32,)u1"),
    ("inputs", "i_member", "<u4"),
    ("inputs", "i_name", "<u4"),
    ("chunks", "c_offset", "<u8"),
    ("chunks", "c_length", "<u4"),
    ("chunks", "c_check", "<u8"),
    ("chunks", "c_codecs", "<u4"),
    ("dims", "dims", "<u8"),
)
MAX_LIVE = 16  # runs that several extents of a member share at one time
_BIG = 1 << 62  # sums of two numbers below it do not overflow int64


def check_chunk_table(offsets: NDArray[Any], lengths: NDArray[Any], end: int) -> None:
    """Raise CorruptError unless the chunk records ascend, do not overlap, are aligned and end by `end`."""
    if not offsets.size:
        return
    if int(offsets.max()) >= _BIG or int(lengths.min()) < MIN_RECORD or int(lengths.max()) > 1 << 25:
        raise CorruptError("the chunk table has impossible offsets or lengths")
    starts = offsets.astype(np.int64)
    stops = starts + lengths
    if (starts[1:] < stops[:-1]).any() or starts[0] < 64 or stops[-1] > end or (starts % ALIGN).any():
        raise CorruptError("chunk records overlap, are out of order or leave the archive")


@dataclass
class Catalogue:
    """The columns by name, the two heaps, and the ordinals that the first member and run have in the archive."""

    columns: dict[str, NDArray[Any]]
    heap: bytes
    inline: bytes = b""
    first_member: int = 0
    first_run: int = 0
    _names: list[str] = field(default_factory=list, repr=False)

    def __getitem__(self, column: str) -> NDArray[Any]:
        return self.columns[column]

    @classmethod
    def of(
        cls, columns: dict[str, list[Any]], names: list[str], inline: bytes = b"", first_member: int = 0, first_run: int = 0
    ) -> "Catalogue":
        """Build one from lists; `names` holds the names of members, of tensors, and of the inputs' files and tensors."""
        arrays = {}
        for _, name, form in _COLUMNS:
            values = columns.get(name, [])
            if form.startswith("("):
                arrays[name] = np.frombuffer(b"".join(values), np.uint8).reshape(-1, 32)
            else:
                arrays[name] = np.array(values, np.dtype(form))
        return cls(arrays, "".join(names).encode(), inline, first_member, first_run, list(names))

    def write(self, kind: bytes) -> bytes:
        """Return the record of that kind: the columns, compressed when that is smaller."""
        sizes = {
            "members": self["m_kind"].shape[0],
            "extents": self["x_kind"].size,
            "tensors": self["t_dtype"].size,
            "runs": self["r_width"].size,
            "inputs": self["i_kind"].size,
            "chunks": self["c_offset"].size,
            "dims": self["dims"].size,
            "heap": len(self.heap),
            "inline": len(self.inline),
        }
        parts = [_COUNTS.pack(*(sizes[t] for t in _TABLES), self.first_member, self.first_run, 0)]
        for raw in (*(self[name].tobytes() for _, name, _ in _COLUMNS), self.heap, self.inline):
            parts += [raw, bytes(-len(raw) % 8)]
        body = b"".join(parts)
        if len(body) > MAX_BODY:
            raise CorruptError(f"a catalogue of {len(body)} bytes is larger than the format allows")
        packed = zstd.encode(body, 9)
        stored = packed if len(packed) < len(body) and len(body) <= 1024 * len(packed) + 65536 else body
        length = align(RECORD_HEAD + len(stored), ALIGN)
        rest = struct.pack("<QII", length, len(body), len(stored)) + stored
        rest += bytes(length - 16 - len(rest))
        return kind + check8(rest) + rest

    @classmethod
    def read(cls, record: bytes | memoryview, kind: bytes) -> "Catalogue":
        """Parse and check a whole record of that kind; chunk positions are checked by the caller, who knows the end."""
        record = memoryview(record)
        if len(record) < RECORD_HEAD or bytes(record[:8]) != kind:
            raise CorruptError(f"no {kind[3:7].decode()} record here")
        length, raw_length, stored_length = struct.unpack("<QII", record[16:32])
        if length != len(record) or length != align(RECORD_HEAD + stored_length, ALIGN):
            raise CorruptError("a catalogue record contradicts its length")
        if check8(record[16:]) != bytes(record[8:16]):
            raise CorruptError(f"the {kind[3:7].decode()} record does not match its check")
        if any(record[RECORD_HEAD + stored_length :]):
            raise CorruptError("a catalogue record is not padded with zeros")
        stored = record[RECORD_HEAD : RECORD_HEAD + stored_length]
        if not stored_length <= raw_length <= min(MAX_BODY, 1024 * stored_length + 65536):
            raise CorruptError(f"a catalogue of {raw_length} bytes in {stored_length}")
        body = bytes(stored) if stored_length == raw_length else zstd.decode(stored, raw_length)
        catalogue = cls._parse(body)
        if kind != INDEX and (catalogue["m_kind"].size != 1 or catalogue["c_offset"].size):
            raise CorruptError("a member record must hold one member and no chunk table")
        if kind == INDEX and (catalogue.first_member or catalogue.first_run or catalogue.inline):
            raise CorruptError("the index must start at 0 and hold no inline bytes")
        catalogue._check()
        return catalogue

    @classmethod
    def _parse(cls, body: bytes) -> "Catalogue":
        if len(body) < _COUNTS.size:
            raise TruncatedError("a catalogue ends within its counts")
        *counts, first_member, first_run, reserved = _COUNTS.unpack_from(body)
        if reserved:
            raise CorruptError("a catalogue's reserved count is not zero")
        sizes = dict(zip(_TABLES, counts, strict=True))
        at = align(_COUNTS.size, 8)
        columns: dict[str, NDArray[Any]] = {}
        heaps: list[bytes] = []
        plan = [(name, sizes[table], np.dtype(form)) for table, name, form in _COLUMNS]
        plan += [("heap", sizes["heap"], np.dtype("u1")), ("inline", sizes["inline"], np.dtype("u1"))]
        for name, count, dtype in plan:
            end = at + count * dtype.itemsize
            padded = align(end, 8)
            if padded > len(body):
                raise TruncatedError(f"a catalogue ends within column {name}")
            if any(body[end:padded]):
                raise CorruptError(f"column {name} is not padded with zeros")
            if name in ("heap", "inline"):
                heaps.append(body[at:end])
            else:
                columns[name] = np.frombuffer(body, dtype.base, count * (dtype.itemsize // dtype.base.itemsize), at)
            at = padded
        if at != len(body):
            raise CorruptError("a catalogue is longer than its columns")
        for name in ("m_sha", "i_archive", "i_file"):
            columns[name] = columns[name].reshape(-1, 32)
        return cls(columns, heaps[0], heaps[1], first_member, first_run)

    # ---- checks

    def _check(self) -> None:
        """Raise unless every rule of section 2.3 that concerns this record alone holds."""
        m_kind, m_flags = self["m_kind"], self["m_flags"]
        if (m_kind > TENSOR).any() or (m_flags > 3).any() or (self["x_kind"] > IN_RUN).any():
            raise UnsupportedError("a member or extent kind, or a member flag, is not known to this tzip; upgrade it")
        if (self["m_mode"] > 0o7777).any() or (self["m_size"] >= _BIG).any():
            raise CorruptError("a member has an impossible mode or size")
        for column, total in (("m_extents", "x_kind"), ("m_tensors", "t_dtype"), ("m_runs", "r_width")):
            if int(self[column].sum(dtype=np.uint64)) != self[total].size:
                raise CorruptError(f"{column} does not add up to {self[total].size}")
        if ((m_flags & CLOSED != 0) != (self["m_runs"] == 0)).any():
            raise CorruptError("a member is closed and has runs, or has none and is not")
        unknown = m_flags & SHA_KNOWN == 0
        if self["m_sha"][unknown].any():
            raise CorruptError("a member without a SHA-256 has one")
        if int(self["t_ndim"].sum(dtype=np.uint64)) != self["dims"].size:
            raise CorruptError("the dimensions of the tensors do not add up")
        kinds = m_kind.tolist()
        check_names(zip(self.member_names, (k == FOLDER for k in kinds), strict=True))
        for i in np.flatnonzero((m_kind == FOLDER) & (self["m_size"] > 0)).tolist():
            raise CorruptError("a folder has bytes").at(member=self.member_names[i])
        self._check_runs()
        self._check_extents()
        self._check_tensors()
        self._check_dependence()

    def _check_runs(self) -> None:
        width, elements = self["r_width"], self["r_elements"]
        if not ((width == 1) | (width == 2) | (width == 4) | (width == 8)).all():
            raise CorruptError("a run has an impossible width")
        if elements.size and not (int(elements.min()) >= 1 and int(elements.max()) < _BIG >> 3):
            raise CorruptError("a run has an impossible number of elements")
        if self["c_offset"].size and self["c_offset"].size != int(self.run_chunks.sum()):
            raise CorruptError(f"{self['c_offset'].size} chunks for runs that need {int(self.run_chunks.sum())}")
        self._check_inputs()

    def _check_inputs(self) -> None:
        """The inputs of each run lie within it, those of each kind in ascending order and apart."""
        counts, offset, length = self["r_inputs"], self["i_offset"], self["i_length"]
        if int(counts.sum(dtype=np.uint64)) != self["i_kind"].size:
            raise CorruptError(f"r_inputs does not add up to {self['i_kind'].size}")
        if not counts.any():
            return
        if int(offset.max()) >= _BIG or not 1 <= int(length.min()) <= int(length.max()) < _BIG:
            raise CorruptError("an input has an impossible offset or length")
        run = np.repeat(np.arange(counts.size), counts)
        start = offset.astype(np.int64)
        end = start + length.astype(np.int64)
        size = self["r_elements"].astype(np.int64) * self["r_width"]
        same_run = run[1:] == run[:-1]
        kind = self["i_kind"]
        follows = same_run & (kind[1:] == kind[:-1])
        if (end > size[run]).any() or (start[1:] < end[:-1])[follows].any() or (kind[1:] < kind[:-1])[same_run].any():
            raise CorruptError("inputs overlap, leave their run or are out of order")

    @cached_property
    def inner_inputs(self) -> NDArray[np.bool_]:
        """Which inputs are tensors of the same member."""
        return np.asarray(~(self["i_archive"].any(axis=1) | self["i_file"].any(axis=1)))

    @cached_property
    def inner_tensors(self) -> dict[int, int]:
        """The row of the tensor that each inner input is, by the input's row."""
        inner = np.flatnonzero(self.inner_inputs)
        if not inner.size:
            return {}
        run = np.repeat(np.arange(self["r_inputs"].size), self["r_inputs"])
        run_ends = np.cumsum(self["m_runs"], dtype=np.int64)
        tensor_ends = np.cumsum(self["m_tensors"], dtype=np.int64)
        names: dict[int, dict[str, int]] = {}
        found = {}
        for i in inner.tolist():
            member = int(np.searchsorted(run_ends, run[i], side="right"))
            if member not in names:
                first = int(tensor_ends[member]) - int(self["m_tensors"][member])
                names[member] = {name: first + k for k, name in enumerate(self.tensor_names[first : int(tensor_ends[member])])}
            row = names[member].get(self.input_names[i][1], -1)
            length = int(self["i_length"][i])
            if row < 0 or int(self["t_layout"][row]) != FLAT or not length <= int(self.tensor_nbytes[row]):
                raise CorruptError("an inner input is no tensor of its member, or is longer than it")
            if int(self["i_begin"][i]) != NOT_KNOWN or int(self["i_member"][i]):
                raise CorruptError("an inner input with a place in another file")
            found[i] = row
        return found

    def _check_dependence(self) -> None:
        """No run follows from itself, and only few follow from one another in a row."""
        if not self.inner_tensors:
            return
        run = np.repeat(np.arange(self["r_inputs"].size), self["r_inputs"])
        member_of = np.repeat(np.arange(self["m_kind"].size), self["m_tensors"])
        first = np.cumsum(self["m_extents"], dtype=np.int64) - self["m_extents"]
        rows = np.array(list(self.inner_tensors.values()))
        x = first[member_of[rows]] + self["t_extent"][rows]
        needs = run[list(self.inner_tensors)]
        needed = self["x_run"][x].astype(np.int64) - self.first_run  # below 0: runs of earlier members, which the index tells
        here = (self["x_kind"][x] == IN_RUN) & (needed >= 0)
        needs, needed = needs[here], needed[here]
        depth = np.zeros(self["r_width"].size, np.int64)
        for _ in range(MAX_DEPENDENCE + 1):
            deeper = np.zeros_like(depth)
            np.maximum.at(deeper, needs, depth[needed] + 1)
            depth = deeper
        if int(depth.max(initial=0)) > MAX_DEPENDENCE:
            raise CorruptError(f"runs follow from one another in a circle, or more than {MAX_DEPENDENCE} in a row")

    def _check_extents(self) -> None:
        """Lengths cover the members, inline offsets follow each other, runs are used in order and stay within bounds."""
        kind, run = self["x_kind"], self["x_run"].astype(np.int64) - self.first_run
        offset, length = self["x_offset"], self["x_length"]
        if not kind.size:
            if self["m_size"].any() or self["r_width"].size:
                raise CorruptError("members have bytes, or runs, but no extents")
            return
        if int(length.min()) < 1 or int(length.max()) >= _BIG or int(offset.max()) >= _BIG:
            raise CorruptError("an extent has an impossible offset or length")
        inline = kind == INLINE
        if (self["x_run"][inline] != 0).any():
            raise CorruptError("an inline extent names a run")
        ends = offset.astype(np.int64) + length.astype(np.int64)
        used = run[~inline]
        # Extents of a member record may point into runs of earlier members, which only the index can judge.
        here = used >= 0
        if (self.first_run == 0 and not here.all()) or (used >= self["r_width"].size).any():
            raise CorruptError("an extent names a run that does not exist")
        size = self["r_elements"].astype(np.int64) * self["r_width"]
        if (ends[~inline][here] > size[used[here]]).any():
            raise CorruptError("an extent leaves its run")
        long = self.run_chunks[used[here]] > 1
        if (ends[~inline][here] - offset[~inline][here].astype(np.int64) != size[used[here]])[long].any():
            raise CorruptError("an extent is a part of a run of several chunks")
        sizes = self["m_size"].tolist()
        lengths, inlines, run_list = length.tolist(), inline.tolist(), run.tolist()
        offsets = offset.tolist()
        x = seen = 0
        for member, (count, runs) in enumerate(zip(self["m_extents"].tolist(), self["m_runs"].tolist(), strict=True)):
            if sum(lengths[x : x + count]) != sizes[member]:
                raise CorruptError("extents do not cover their member").at(member=self.member_names[member])
            inline_at = 0
            limit = seen + runs
            for i in range(x, x + count):
                if inlines[i]:
                    if offsets[i] != inline_at:
                        raise CorruptError("inline extents do not follow each other")
                    inline_at += lengths[i]
                elif run_list[i] == seen:
                    seen += 1
                elif run_list[i] > seen:
                    raise CorruptError("runs are not numbered in the order of their first use")
            if seen != limit:
                raise CorruptError("a member's runs are not those that its extents use first")
            if self.inline and inline_at != len(self.inline):
                raise CorruptError("the inline heap does not fit the inline extents")
            # Runs of several chunks are decoded again at each use: nothing of them is held. A member record does not say
            # how long runs of earlier members are, but an extent longer than any chunk tells.
            held = ~inline[x : x + count] & (length[x : x + count] <= CHUNK_ELEMENTS * 8)
            here = run[x : x + count]
            if self.run_chunks.size:
                own = here >= 0
                held[own] &= (self.run_chunks[np.where(own, here, 0)] == 1)[own]
            self._check_live(here[held])
            x += count

    @staticmethod
    def _check_live(uses: NDArray[np.int64]) -> None:
        """Raise CorruptError when a reader that goes through a member once would have to hold more than 16 runs."""
        if len(set(uses.tolist())) == uses.size:
            return
        first = np.unique(uses, return_index=True)[1]
        last = uses.size - 1 - np.unique(uses[::-1], return_index=True)[1]
        again = last > first
        change = np.zeros(uses.size + 1, np.int64)
        np.add.at(change, first[again], 1)
        np.add.at(change, last[again], -1)
        if int(np.cumsum(change).max()) > MAX_LIVE:
            raise CorruptError(f"a member shares more than {MAX_LIVE} runs at once")

    def _check_tensors(self) -> None:
        if not self["t_dtype"].size:
            return
        t = 0
        for count in self["m_tensors"].tolist():
            if len(set(self.tensor_names[t : t + count])) != count:
                raise CorruptError("a member has two tensors of one name")
            t += count
        if (self["t_ndim"][self["t_dtype"] == OPAQUE.wire_id] != 1).any():
            raise CorruptError("an opaque tensor has one dimension")
        if (self["t_ndim"][self["t_layout"] == STRIDED] % 2).any():
            raise CorruptError("a strided tensor has as many strides as dimensions")
        member_of = np.repeat(np.arange(self["m_kind"].size), self["m_tensors"])
        first = np.cumsum(self["m_extents"], dtype=np.int64) - self["m_extents"]
        nbytes = self.tensor_nbytes
        known = nbytes >= 0
        extent = self["t_extent"].astype(np.int64)
        empty = nbytes == 0
        inside = extent < self["m_extents"][member_of]
        if not (inside | empty).all() or (extent[empty] != 0).any() or self["t_offset"][empty].any():
            raise CorruptError("a tensor names an extent that does not exist")
        if not self["x_length"].size:
            return
        length = self["x_length"].astype(np.int64)[np.where(inside, first[member_of] + extent, 0)]
        offset = self["t_offset"]
        if int(offset.max()) >= _BIG:
            raise CorruptError("a tensor has an impossible offset")
        over = offset.astype(np.int64) + np.where(known, self._spans(), 0) > length
        if (over & ~empty).any():
            i = int(np.flatnonzero(over & ~empty)[0])
            raise CorruptError("a tensor leaves its extent").at(tensor=self.tensor_names[i])

    # ---- derived columns

    @cached_property
    def member_names(self) -> list[str]:
        """The names of the members."""
        return self._all_names()[: self["m_kind"].size]

    @cached_property
    def tensor_names(self) -> list[str]:
        """The names of the tensors."""
        first = self["m_kind"].size
        return self._all_names()[first : first + self["t_dtype"].size]

    @cached_property
    def input_names(self) -> list[tuple[str, str]]:
        """The names of the file and of the tensor in it for each input."""
        first, n = self["m_kind"].size + self["t_dtype"].size, self["i_kind"].size
        names = self._all_names()
        return list(zip(names[first : first + n], names[first + n :], strict=True))

    def _all_names(self) -> list[str]:
        if not self._names:
            sizes = np.concatenate([self[c] for c in ("m_name", "t_name", "i_member", "i_name")]).astype(np.int64)
            ends = np.cumsum(sizes)
            if int(ends[-1] if ends.size else 0) != len(self.heap):
                raise CorruptError("names do not fill the name heap")
            heap = self.heap
            try:
                self._names = [heap[e - s : e].decode() for s, e in zip(sizes.tolist(), ends.tolist(), strict=True)]
            except UnicodeDecodeError:
                raise CorruptError("a name is not valid UTF-8") from None
        return self._names

    @cached_property
    def run_chunks(self) -> NDArray[np.int64]:
        """The number of chunks of each run."""
        elements = self["r_elements"].astype(np.int64)
        return (elements + (CHUNK_ELEMENTS - 1)) // CHUNK_ELEMENTS

    @cached_property
    def tensor_nbytes(self) -> NDArray[np.int64]:
        """The bytes of each tensor; -1 where the dtype is not known to this tzip."""
        stored = self["t_ndim"].astype(np.int64)
        start = np.cumsum(stored) - stored
        ndim = np.where(self["t_layout"] == STRIDED, stored // 2, np.where(self["t_layout"] == FLAT, stored, 0))
        elements = np.ones(ndim.size, np.int64)
        for n in sorted(set(ndim.tolist())):  # np.unique would import numpy.ma: 27 ms of a listing
            if n == 0:
                continue
            at = np.flatnonzero(ndim == n)
            dims = self["dims"][start[at][:, None] + np.arange(n)]
            with np.errstate(over="ignore", invalid="ignore"):
                size = np.where((dims == 0).any(axis=1), 0.0, dims.astype(np.float64).prod(axis=1))
            if (size >= 2.0**54).any():  # times 128 bits it is still below 2**63
                raise CorruptError("a tensor has an impossible shape")
            elements[at] = np.where(size > 0, dims.astype(np.int64).prod(axis=1), 0)
        bits = np.full(256, -1, np.int64)
        for wire_id, dtype in DTYPES.items():
            bits[wire_id] = dtype.bits
        per = bits[self["t_dtype"]]
        if ((elements * per) % 8 != 0)[per > 0].any():
            raise CorruptError("a tensor of a sub-byte dtype does not fill its last byte")
        return np.where((per < 0) | (self["t_layout"] > STRIDED), -1, elements * per // 8)

    def _spans(self) -> NDArray[np.int64]:
        """The bytes of each tensor from its first element to its last, which are not fewer than those of its elements."""
        spans = self.tensor_nbytes.copy()
        for i in np.flatnonzero(self["t_layout"] == STRIDED).tolist():
            shape, strides = self.shape_of(i)
            dtype = self.dtype_of(i)
            if spans[i] <= 0 or strides is None or dtype is None:
                continue
            span = (1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))) * dtype.bits // 8
            if dtype.bits % 8 or not spans[i] <= span < _BIG:
                raise CorruptError("a strided tensor is longer than its span").at(tensor=self.tensor_names[i])
            spans[i] = span
        return spans

    @cached_property
    def _first_dim(self) -> NDArray[np.int64]:
        ndim = self["t_ndim"].astype(np.int64)
        return np.cumsum(ndim) - ndim

    def shape_of(self, tensor: int) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        """Return the shape of a tensor, and its strides in elements when it is strided."""
        first, n = int(self._first_dim[tensor]), int(self["t_ndim"][tensor])
        dims = tuple(self["dims"][first : first + n].tolist())
        return (dims[: n // 2], dims[n // 2 :]) if int(self["t_layout"][tensor]) == STRIDED else (dims, None)

    def shapes(self) -> Iterator[tuple[int, ...]]:
        """Yield the shape of each tensor."""
        dims = self["dims"].tolist()
        at = 0
        for n, layout in zip(self["t_ndim"].tolist(), self["t_layout"].tolist(), strict=True):
            yield tuple(dims[at : at + (n // 2 if layout == STRIDED else n)])
            at += n

    def dtype_of(self, tensor: int) -> Dtype | None:
        """Return the element type of a tensor; None when it is not known to this tzip."""
        return DTYPES.get(int(self["t_dtype"][tensor]))
