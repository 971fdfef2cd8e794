"""Reading archives: a lazy mapping of tensors, members as streams of bytes."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from tzip.bases import Base, Bases, Input, Library, Origin, OwnFile, expect_inputs, paths_of, role_bytes
from tzip.coders.errors import CorruptError, TensorNotFoundError, TzipError, UnsupportedError
from tzip.coders.registry import names_of
from tzip.formats.catalogue import IN_RUN, LINK, ROLES, SHA_KNOWN, STRIDED
from tzip.formats.containers import gather, span_bytes
from tzip.formats.layout import CHUNK_ELEMENTS
from tzip.formats.names import check_links
from tzip.formats.reader import ArchiveReader
from tzip.formats.source import open_source
from tzip.pipeline import in_order
from tzip.views import MemberInfo, TensorInfo, TensorView
from tzip.workers import Workers, thread_count

if TYPE_CHECKING:
    from tzip.coders.arrays import U8
    from tzip.loading import Part

# The coders (and numba with them, 0.2 s) are imported where a chunk is decoded, so that listing stays quick.

_CACHED_CHUNKS = 4  # decoded bundles kept for the next small tensor
_CACHED_INPUTS = 6  # decoded chunks that others are predicted from: moments are asked for by each other and by weights
_CACHED_STRINGS = 4  # parameters of first chunks


class Archive(Mapping[str, NDArray[Any]]):
    """A lazy, read-only mapping of tensor names to arrays, and a view of the members.

    When two members have a tensor of one name, that name is not a key: use `member(...)`. Thread-safe; each access decodes
    what it needs. Close it, or use it in a `with` statement.
    """

    def __init__(
        self, source: Any, reader: ArchiveReader | None = None, *, base: Any = None, chain: tuple[bytes, ...] = ()
    ) -> None:
        self._base = base if isinstance(base, Library) else paths_of(base)
        reader = source if isinstance(source, ArchiveReader) else reader
        self._source = open_source(source) if reader is None else reader.source
        try:
            self.reader = ArchiveReader(self._source) if reader is None else reader
            index = self.reader.index
            check_links(self._links())
        except BaseException:
            if reader is None:
                self._source.close()
            raise
        self._shapes: list[tuple[int, ...]] | None = None
        self._rows: dict[str, int] | None = None
        self._ambiguous: set[str] = set()
        self._cache: OrderedDict[tuple[int, int], U8] = OrderedDict()
        self._prepared: set[int] = set()
        self._lock = threading.Lock()
        self._folder = Path(os.path.abspath(self._source.name)).parent if os.path.isfile(self._source.name) else None
        self._chain = chain
        self._bases: Bases | None = None
        self._inputs: dict[int, list[Input]] = {}
        self._strings: OrderedDict[int, tuple[int, U8]] = OrderedDict()
        self._own_rows: dict[Base, int] = {}
        self._first_input = np.cumsum(index["r_inputs"], dtype=np.int64) - index["r_inputs"]
        self._first_extent = np.cumsum(index["m_extents"], dtype=np.int64) - index["m_extents"]
        self._first_tensor = np.cumsum(index["m_tensors"], dtype=np.int64) - index["m_tensors"]

    def _links(self) -> dict[str, str]:
        links = {}
        for i in np.flatnonzero(self.reader.index["m_kind"] == LINK).tolist():
            name = self.reader.index.member_names[i]
            try:
                links[name] = self.reader.inline_bytes(i).decode()
            except UnicodeDecodeError:
                raise CorruptError("a link target is not valid UTF-8").at(path=self._source.name, member=name) from None
        return links

    # ---- the mapping

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of every tensor, in the order of the index."""
        if self._shapes is None:
            self._shapes = list(self.reader.index.shapes())
        return self._shapes

    def _names(self) -> dict[str, int]:
        if self._rows is None:
            rows: dict[str, int] = {}
            for row, name in enumerate(self.reader.index.tensor_names):
                if name in rows or name in self._ambiguous:
                    self._ambiguous.add(name)
                    rows.pop(name, None)
                else:
                    rows[name] = row
            self._rows = rows
        return self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())

    def __contains__(self, name: object) -> bool:
        return name in self._names()

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Return a tensor as a new numpy array."""
        return self.tensor(name).read()

    def tensor(self, name: str, member: str | None = None) -> TensorView:
        """Return a tensor without decoding it; `member` says whose it is when several have that name."""
        if member is not None:
            i = self.member_row(member)
            begin = int(self._first_tensor[i])
            names = self.reader.index.tensor_names[begin : begin + int(self.reader.index["m_tensors"][i])]
            if name in names:
                return TensorView(self, begin + names.index(name))
        elif name in self._names():
            return TensorView(self, self._names()[name])
        elif name in self._ambiguous:
            raise TensorNotFoundError(f"several members have a tensor {name!r}; name the member").at(
                path=self._source.name
            )
        raise TensorNotFoundError(f"there is no tensor {name!r}").at(path=self._source.name, member=member)

    def view(self, row: int) -> TensorView:
        """Return the tensor in that row of the index."""
        return TensorView(self, row)

    def load(
        self,
        device: Any = "cpu",
        framework: str | None = None,
        names: "Iterable[str] | None" = None,
        *,
        stream: Any = None,
        threads: int | None = None,
        bases: "Mapping[str, Any] | None" = None,
    ) -> dict[str, Any]:
        """Return tensors (all of them, or those named) on a device, by name.

        `device`: cpu, cuda or cuda:N, or a `tzip.gpu.Device`. On a GPU chunks are decoded there, through CuPy: what is stored
        is what is copied to it. `framework`: np (on the CPU, the default there), cupy (the default on a GPU) or pt; torch's
        tensors are CuPy's memory, handed over without a copy. Types that CuPy lacks (bfloat16, float8) come as unsigned
        integers of their bits. `stream`: the CUDA stream, CuPy's or as an integer, in which the results are used; by default
        the framework's current one. `threads` read and, on the CPU, decode. `bases`: tensors on the same GPU, CuPy's or
        torch's, that differences are from, by the names that they have in the base's file; what is not among them is found as
        `open` says, and copied. A wrong one is seen by the sums, and raises CorruptError.

        Where there is no CuPy or no GPU that it can use, torch's tensors are decoded on the CPU and copied, with a warning;
        when torch has no GPU either, and for CuPy, that is a UsageError which says what is missing (`tzip.gpu.available()`).
        Chunks that kernels do not decode are decoded on the CPU, with a warning. Raises TensorNotFoundError, and what reading
        on the CPU raises: CorruptError, TruncatedError, UnsupportedError, BaseNotFoundError.
        """
        views = [self.tensor(name) for name in (self if names is None else names)]
        loaded = self.load_parts([view.part(None) for view in views], device, framework, stream, threads, bases)
        return {view.name: tensor for view, tensor in zip(views, loaded, strict=True)}

    def load_parts(
        self,
        parts: "Sequence[Part]",
        device: Any,
        framework: str | None,
        stream: Any,
        threads: int | None,
        bases: "Mapping[str, Any] | None" = None,
    ) -> list[Any]:
        """Return parts of tensors (`TensorView.part`) on a device; see `load`."""
        from tzip.loading import load

        return load(self, parts, device, framework, stream, threads, bases)

    # ---- listings

    def members(self) -> list[MemberInfo]:
        """Return what the index says of the members."""
        index = self.reader.index
        stored = self._member_stored()
        return [
            MemberInfo(
                name,
                ("file", "folder", "link", "tensor")[int(index["m_kind"][i])],
                int(index["m_size"][i]),
                int(index["m_mode"][i]),
                int(index["m_mtime"][i]),
                index["m_sha"][i].tobytes().hex() if int(index["m_flags"][i]) & SHA_KNOWN else None,
                int(index["m_tensors"][i]),
                stored[i],
            )
            for i, name in enumerate(index.member_names)
        ]

    def _member_stored(self) -> list[int]:
        """Bytes from each member record to the next, or to the index: all that the member costs but its index rows."""
        records = self.reader.index["m_record"].astype(np.int64)
        ends = np.append(records[1:], self.reader.footer.index_offset)
        return (ends - records).tolist() if records.size else []

    def tensors(self) -> list[TensorInfo]:
        """Return what the index says of every tensor."""
        index = self.reader.index
        lengths = index["c_length"].astype(np.int64)
        total = np.concatenate(([0], np.cumsum(lengths)))
        masks = index["c_codecs"]
        infos = []
        nbytes = index.tensor_nbytes.tolist()
        run_size = (index["r_elements"].astype(np.int64) * index["r_width"]).tolist()
        t = 0
        for i, member in enumerate(index.member_names):
            first = int(self._first_extent[i])
            for _ in range(int(index["m_tensors"][i])):
                x = first + int(index["t_extent"][t])
                stored, codecs = nbytes[t], 0
                if nbytes[t] and int(index["x_kind"][x]) == IN_RUN:
                    run = int(index["x_run"][x])
                    c = int(self.reader.first_chunk[run])
                    end = c + int(index.run_chunks[run])
                    codecs = int(np.bitwise_or.reduce(masks[c:end]))
                    stored = int(total[end] - total[c]) * nbytes[t] // run_size[run]
                dtype = index.dtype_of(t)
                infos.append(
                    TensorInfo(
                        index.tensor_names[t],
                        member,
                        dtype.name if dtype else f"dtype {int(index['t_dtype'][t])}",
                        self.shapes[t],
                        nbytes[t],
                        stored,
                        tuple(names_of(codecs)),
                    )
                )
                t += 1
        return infos

    def member_row(self, name: str) -> int:
        """Return the ordinal of a member; raises TensorNotFoundError."""
        try:
            return self.reader.index.member_names.index(name)
        except ValueError:
            raise TensorNotFoundError(f"there is no member {name!r}").at(path=self._source.name) from None

    # ---- decoding

    def decode_chunk(self, run: int, chunk: int, out: "U8 | None" = None) -> "U8":
        """Return the decoded bytes of a chunk, proven by both its sums."""
        from tzip.chunks import HEAD_BYTES, SLACK, decode_chunk, needs
        from tzip.coders.predictors import ALONE, Beside
        from tzip.coders.scratch import recycle

        index = self.reader.index
        elements, width = self.reader.chunk_elements(run, chunk), int(index["r_width"][run])
        self._check_roles(run)
        buffer, length, check = self.reader.read_chunk(run, chunk, SLACK)
        base, beside = None, ALONE
        try:
            roles, spread = needs(memoryview(buffer)[: min(HEAD_BYTES, length)])
            if roles or spread:
                buffer = buffer.copy()  # the inputs may be decoded in the scratch memory that it is in
                here, begin, size = self.inputs(run) if roles else [], chunk * CHUNK_ELEMENTS * width, elements * width
                found = {role: role_bytes(here, role, begin, size) for role in roles}
                base = found.pop(0, None)
                kind = int.from_bytes(buffer[HEAD_BYTES - 8 : HEAD_BYTES].tobytes(), "little")
                string = self._first_string(run, kind) if spread else None
                beside = Beside({role: raw for role, raw in found.items() if raw is not None}, string)
            if out is None:
                out = recycle(elements * width)
            decode_chunk(buffer, length, self.reader.run_ordinal(run), chunk, elements, width, out, check, base, beside)
        except TzipError as e:
            raise e.at(path=self._source.name, offset=self.reader.chunk_at(run, chunk)[0]) from None
        return out

    def _check_roles(self, run: int) -> None:
        first, inputs = int(self._first_input[run]), int(self.reader.index["r_inputs"][run])
        if inputs and (highest := int(self.reader.index["i_kind"][first : first + inputs].max())) >= ROLES:
            raise UnsupportedError(f"input {highest} is not known to this tzip; upgrade it")

    def _first_string(self, run: int, kind: int) -> "U8 | None":
        """Return the parameters in the first chunk of a run, None when they are of another predictor."""
        from tzip.chunks import SLACK, read_parameters

        with self._lock:
            told = self._strings.get(run)
        if told is None:
            buffer, length, check = self.reader.read_chunk(run, 0, SLACK)
            elements, width = self.reader.chunk_elements(run, 0), int(self.reader.index["r_width"][run])
            told = read_parameters(buffer, length, self.reader.run_ordinal(run), elements, width, check)
            with self._lock:
                self._strings[run] = told
                while len(self._strings) > _CACHED_STRINGS:
                    self._strings.popitem(last=False)
        return told[1] if told[0] == kind else None

    @cached_property
    def _own(self) -> OwnFile:  # a circle of references, which few archives need
        return OwnFile(self._read_own, self._prepare_own)

    def _read_own(self, base: Base, begin: int, out: "U8") -> None:
        self.read_into([(self._own_rows[base], begin, out)], 1, keep=True)

    def _prepare_own(self, base: Base) -> None:
        self.find_bases(self.tensor_runs(self._own_rows[base]))

    def inputs(self, run: int) -> list[Input]:
        """Return what a run is made from, as in `bases.role_bytes`.

        Raises BaseNotFoundError, or UnsupportedError for a kind of input that this tzip does not know.
        """
        self._check_roles(run)
        with self._lock:
            if run in self._inputs:
                return self._inputs[run]
            if self._bases is None:
                chain = (*self._chain, self.reader.footer.archive_id)
                self._bases = Bases(self._base, opener(self._base), self._folder, chain)
            bases = self._bases
        index = self.reader.index
        first = int(self._first_input[run])
        found = []
        for i in range(first, first + int(index["r_inputs"][run])):
            role, length, (file, tensor) = int(index["i_kind"][i]), int(index["i_length"][i]), index.input_names[i]
            if i in index.inner_tensors:
                base = self._own_tensor(index.inner_tensors[i])
            else:
                origin = Origin(file, index["i_file"][i].tobytes(), index["i_archive"][i].tobytes())
                base = bases.find(origin, tensor, int(index["i_begin"][i]), length)
            if length > base.nbytes:
                raise CorruptError(f"an input of {length} bytes from tensor {tensor!r}, which has {base.nbytes}")
            found.append(Input(role, int(index["i_offset"][i]), length, base))
        with self._lock:
            return self._inputs.setdefault(run, found)

    def lean_on(self, bases: Bases) -> None:
        """Take bases from there and nowhere else: what `bases.find` returns is believed, and only the sums show a wrong one.

        Before anything is read that leans on others.
        """
        self._bases = bases

    def _own_tensor(self, row: int) -> Base:
        index = self.reader.index
        dtype = index.dtype_of(row)
        assert dtype is not None  # the catalogue has proven it
        base = Base(self._own, index.tensor_names[row], dtype, self.shapes[row], int(index.tensor_nbytes[row]))
        self._own_rows[base] = row
        return base
    def input_spans(self, run: int) -> list[tuple[int, int, str]]:
        """Return what the bases of a run are for: (first byte of the run, bytes, name of the tensor in the base's file).

        Raises UnsupportedError for a kind of input that this tzip does not know.
        """
        index = self.reader.index
        first = int(self._first_input[run])
        self._check_roles(run)
        rows = [i for i in range(first, first + int(index["r_inputs"][run])) if int(index["i_kind"][i]) == 0]
        return [(int(index["i_offset"][i]), int(index["i_length"][i]), index.input_names[i][1]) for i in rows]

    def find_bases(self, runs: "Iterable[int] | None" = None) -> list[str]:
        """Find all bases (of these runs), and theirs, so that a missing one is known before anything is written.

        Returns the paths of the direct ones. Raises BaseNotFoundError.
        """
        counts = self.reader.index["r_inputs"]
        wanted = np.flatnonzero(counts).tolist() if runs is None else [run for run in runs if int(counts[run])]
        bases = [one.base for run in wanted for one in self.inputs(run)]
        # Runs of which all is found are not looked at again: moments and weights lean on each other at every link of a chain,
        # and there are 3^n ways down one of n.
        for run in wanted:
            if run not in self._prepared:
                for one in self.inputs(run):
                    one.base.file.prepare(one.base)
                self._prepared.add(run)
        return sorted({base.file.path for base in bases if not base.file.inner})

    def tensor_runs(self, row: int) -> list[int]:
        """Return the runs that the tensor in that row of the index is in."""
        index = self.reader.index
        x = int(self._first_extent[self._member_of(row)]) + int(index["t_extent"][row])
        empty = not int(index.tensor_nbytes[row])
        return [] if empty or int(index["x_kind"][x]) != IN_RUN else [int(index["x_run"][x])]

    def member_runs(self, member: int) -> list[int]:
        """Return the runs that a member's extents use."""
        index = self.reader.index
        first = int(self._first_extent[member])
        rows = range(first, first + int(index["m_extents"][member]))
        return sorted({int(index["x_run"][x]) for x in rows if int(index["x_kind"][x]) == IN_RUN})

    def _cached_chunk(self, run: int, chunk: int) -> "U8":
        """Return a chunk that will be asked for again, from the cache when it is there."""
        with self._lock:
            if (run, chunk) in self._cache:
                self._cache.move_to_end((run, chunk))
                return self._cache[run, chunk]
        decoded = self.decode_chunk(run, chunk)
        with self._lock:
            self._cache[run, chunk] = decoded
            while len(self._cache) > (_CACHED_INPUTS if self.reader.index.inner_tensors else _CACHED_CHUNKS):
                self._cache.popitem(last=False)
        return decoded

    def tensor_bytes(self, row: int, begin: int, end: int, threads: int | None) -> "U8":
        """Return bytes begin … end - 1 of the tensor in that row of the index."""
        out = np.empty(end - begin, np.uint8)
        self.tensor_bytes_into(row, out, threads, begin)
        return out

    def _gather(self, row: int, begin: int, out: "U8", threads: int | None) -> None:
        """Fill `out` with bytes of a strided tensor, in row-major order from its byte `begin` on."""
        index = self.reader.index
        shape, strides = index.shape_of(row)
        dtype = index.dtype_of(row)
        if dtype is None or strides is None:
            raise UnsupportedError("its element type is not known to this tzip; upgrade it").at(tensor=index.tensor_names[row])
        span = np.empty(span_bytes(dtype, shape, strides), np.uint8)
        self.read_into([(row, 0, span)], threads, gathered=False)
        out[:] = gather(span, dtype, shape, strides)[begin : begin + out.size]

    def tensor_bytes_into(self, row: int, out: "U8", threads: int | None, begin: int = 0) -> None:
        """Fill `out`, shape (n,), with the bytes of the tensor in that row of the index, from byte `begin` on."""
        self.read_into([(row, begin, out)], threads)

    def read_into(
        self, wanted: "Sequence[tuple[int, int, U8]]", threads: int | None, *,
        gathered: bool = True, keep: bool = False, expected: bool = False,
    ) -> None:  # fmt: skip
        """Fill byte arrays with parts of tensors: (row of the index, first byte, array of shape (n,)) each.

        A chunk that several of them need is decoded once. Bytes are those of the elements in row-major order; without
        `gathered` those of strided tensors are as they lie, from the first element on. `keep`: the chunks will be
        asked for again; `expected`: the source was told of them. Raises CorruptError or UnsupportedError; the arrays are
        then unspecified and must not be used.
        """
        if gathered:
            layouts = self.reader.index["t_layout"]
            for row, begin, out in wanted:
                if int(layouts[row]) == STRIDED and out.size:
                    self._gather(row, begin, out, threads)
            wanted = [w for w in wanted if int(layouts[w[0]]) != STRIDED]
        parts: dict[tuple[int, int], list[tuple[int, int, int, U8]]] = {}
        inline: dict[int, bytes] = {}
        for row, begin, out in wanted:
            member = self._member_of(row)
            try:
                self._locate(row, member, begin, out, parts, inline)
            except TzipError as e:
                raise self._placed(e, row, member) from None
        index = self.reader.index
        if not expected:
            self._expect(parts)

        def one(item: "tuple[tuple[int, int], list[tuple[int, int, int, U8]]]") -> None:
            (run, chunk), uses = item
            size = self.reader.chunk_elements(run, chunk) * int(index["r_width"][run])
            row, low, high, out = uses[0]
            try:
                if len(uses) == 1 and high - low == size and not keep:
                    self.decode_chunk(run, chunk, out)
                    return
                # The only chunk of a run is often a bundle of small tensors, and the next one will be asked for.
                alone = int(index.run_chunks[run]) == 1
                decoded = self._cached_chunk(run, chunk) if alone or keep else self.decode_chunk(run, chunk)
            except TzipError as e:
                raise self._placed(e, row, self._member_of(row)) from None
            for _, low, high, out in uses:
                out[:] = decoded[low:high]

        with Workers(min(thread_count(threads), max(1, len(parts)))) as workers:
            for _ in workers.map(one, parts.items()):
                pass

    def expect(self, pieces: "Sequence[tuple[int, int, int]]") -> None:
        """Be told which (row, first byte, bytes) others will read, whose own reading goes on; see `Source.expect`."""
        self._expect({s[:2] for row, at, n in pieces if n and self.in_chunks(row) for s in self.spans(row, at, n)}, more=True)

    def _expect(self, places: "Iterable[tuple[int, int]]", more: bool = False) -> None:
        """Tell the source of chunks that will be read, and what is far away also of those that they are made from."""
        places = list(places)
        self._source.expect(sorted(self.reader.chunk_at(*place) for place in places), more)
        if self._source.far:
            width, size = self.reader.index["r_width"], self.reader.chunk_elements
            runs = ((r, c * CHUNK_ELEMENTS * int(width[r]), size(r, c) * int(width[r])) for r, c in places)
            expect_inputs((self.inputs(run), begin, n) for run, begin, n in runs)

    def _member_of(self, row: int) -> int:
        member = int(np.searchsorted(self._first_tensor, row, side="right")) - 1
        while int(self.reader.index["m_tensors"][member]) == 0:
            member -= 1
        return member

    def _placed(self, error: TzipError, row: int, member: int) -> TzipError:
        index = self.reader.index
        return error.at(path=self._source.name, member=index.member_names[member], tensor=index.tensor_names[row])

    def _locate(
        self,
        row: int,
        member: int,
        begin: int,
        out: "U8",
        parts: "dict[tuple[int, int], list[tuple[int, int, int, U8]]]",
        inline: dict[int, bytes],
    ) -> None:
        """Add to `parts` what the array needs: (run, chunk) -> (row, first and last byte in it, where they go)."""
        index = self.reader.index
        if int(index["t_layout"][row]) > STRIDED:
            raise UnsupportedError(f"tensor layout {int(index['t_layout'][row])} is not known to this tzip")
        if not out.size:
            return
        if not self._in_run(row):
            if member not in inline:
                inline[member] = self.reader.inline_bytes(member)
            x = int(self._first_extent[member]) + int(index["t_extent"][row])
            at = int(index["t_offset"][row]) + begin + int(index["x_offset"][x])
            out[:] = np.frombuffer(inline[member], np.uint8)[at : at + out.size]
            return
        for run, chunk, low, high, at in self.spans(row, begin, out.size):
            parts.setdefault((run, chunk), []).append((row, low, high, out[at : at + high - low]))

    def _in_run(self, row: int) -> bool:
        index = self.reader.index
        x = int(self._first_extent[self._member_of(row)]) + int(index["t_extent"][row])
        return int(index["x_kind"][x]) == IN_RUN

    def in_chunks(self, row: int) -> bool:
        """Whether the bytes of the tensor in that row of the index lie in chunks as they are: not inline, and not strided.

        Raises UnsupportedError for a layout that this tzip does not know.
        """
        layout = int(self.reader.index["t_layout"][row])
        if layout > STRIDED:
            raise self.placed(UnsupportedError(f"tensor layout {layout} is not known to this tzip"), row)
        return layout != STRIDED and self._in_run(row)

    def spans(self, row: int, begin: int, size: int) -> Iterator[tuple[int, int, int, int, int]]:
        """Yield where bytes begin … begin + size - 1 of a tensor in a run are: (run, chunk, first byte in it, the one behind
        the last, how many of these bytes come before).
        """
        index = self.reader.index
        x = int(self._first_extent[self._member_of(row)]) + int(index["t_extent"][row])
        at = int(index["t_offset"][row]) + begin + int(index["x_offset"][x])
        run = int(index["x_run"][x])
        step = CHUNK_ELEMENTS * int(index["r_width"][run])
        end = at + size
        for chunk in range(at // step, -(-end // step)):
            low, high = max(at, chunk * step), min(end, (chunk + 1) * step)
            yield run, chunk, low - chunk * step, high - chunk * step, low - at

    def base_bytes(self, run: int, chunk: int) -> "U8":
        """Return the base bytes of a chunk of a run with inputs (FORMAT.md, section 2.8); in scratch memory.

        Raises as `inputs` does.
        """
        width = int(self.reader.index["r_width"][run])
        size = self.reader.chunk_elements(run, chunk) * width
        found = role_bytes(self.inputs(run), 0, chunk * CHUNK_ELEMENTS * width, size)
        if found is None:
            raise CorruptError("a chunk is a difference from another tensor, and its run names none")
        return found

    def placed(self, error: TzipError, row: int) -> TzipError:
        """Return the error with what it is about: file, member and tensor."""
        return self._placed(error, row, self._member_of(row))

    def member_stream(
        self, member: int, workers: Workers, write: "Callable[[int, U8], None] | None" = None
    ) -> "Iterator[U8]":
        """Yield the bytes of a member, front to back, with bounded memory. Every chunk is proven before it is yielded.

        `write(offset, part)` is called for each part before it is yielded, by the threads that decode and in no order.
        """
        index = self.reader.index
        first = int(self._first_extent[member])
        rows = range(first, first + int(index["m_extents"][member]))
        runs = [int(index["x_run"][x]) if int(index["x_kind"][x]) == IN_RUN else -1 for x in rows]
        inline = (
            np.frombuffer(self.reader.inline_bytes(member), np.uint8) if -1 in runs else np.empty(0, np.uint8)
        )
        uses = dict.fromkeys(runs, 0)
        for run in runs:
            uses[run] += 1
        pieces: list[tuple[int, int, int, int]] = []
        for x, run in zip(rows, runs, strict=True):
            begin, n = int(index["x_offset"][x]), int(index["x_length"][x])
            if run < 0:
                pieces.append((-1, 0, begin, begin + n))
                continue
            step = CHUNK_ELEMENTS * int(index["r_width"][run])
            pieces += [
                (run, c, max(begin - c * step, 0), min(begin + n - c * step, step))
                for c in range(begin // step, -(-(begin + n) // step))
            ]
        self._expect({(run, chunk) for run, chunk, _, _ in pieces if run >= 0})
        yield from in_order(pieces, uses, inline, index.run_chunks, self.decode_chunk, workers, write)

    def member_extents(self, member: int) -> list[tuple[int, int, int, int]]:
        """Return (first byte in the member, length, run or -1, offset in the run or the inline bytes) of each extent."""
        index = self.reader.index
        rows, at = [], 0
        first = int(self._first_extent[member])
        for x in range(first, first + int(index["m_extents"][member])):
            n = int(index["x_length"][x])
            run = int(index["x_run"][x]) if int(index["x_kind"][x]) == IN_RUN else -1
            rows.append((at, n, run, int(index["x_offset"][x])))
            at += n
        return rows

    def member_bytes(self, member: str, threads: int | None = 1) -> bytes:
        """Return all bytes of a member, its SHA-256 checked; for small members."""
        i = self.member_row(member)
        with Workers(thread_count(threads)) as workers:
            return b"".join(part.tobytes() for part in self.checked_stream(i, workers))

    def checked_stream(
        self, member: int, workers: Workers, write: "Callable[[int, U8], None] | None" = None
    ) -> "Iterator[U8]":
        """Yield a member's bytes as `member_stream` does; raises CorruptError in the end when its SHA-256 differs."""
        from tzip.workers import Hasher

        index = self.reader.index
        name = index.member_names[member]
        known = bool(int(index["m_flags"][member]) & SHA_KNOWN)
        try:
            small = int(index["m_size"][member]) < 1 << 20  # a thread costs more than the hash
            with Hasher(known, 1 if small else workers.threads) as hasher:
                for part in self.member_stream(member, workers, write):
                    hasher.update(part)
                    yield part
                if known and hasher.digest() != index["m_sha"][member].tobytes():
                    raise CorruptError("the member does not match its SHA-256")
        except TzipError as e:
            raise e.at(path=self._source.name, member=name) from None

    def close(self) -> None:
        """Close the file, and bases."""
        if self._bases is not None:
            self._bases.close()
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<tzip archive {self._source.name!r}: {len(self.reader.index.member_names)} members, {len(self)} tensors>"


def opener(base: Any) -> Callable[[Any, tuple[bytes, ...]], Archive]:
    """Return what opens archives that others lean on, whose own bases are looked for in the same places."""
    return lambda place, chain: Archive(place, base=base, chain=chain)


def open(source: Any, *, base: Any = None) -> Archive:  # tzip.open, as gzip.open
    """Open an archive: a path, a URL, `os.PathLike`, bytes-like object or binary file.

    URLs are those that fsspec knows (https://, s3://, hf:// …); only what is asked for is fetched. Only the index is
    read; nothing is decoded.

    `base`: paths (files, folders, archives) to look for bases in, for tensors that are stored as differences from others;
    next come the archive's own folder and those in $TZIP_BASE_PATH. What a base is, its SHA-256 decides, not its name: a
    plain file is hashed on first use. A base that is not found is a BaseNotFoundError when such a tensor is read.

    Raises NotAnArchiveError, UnsupportedError, CorruptError or TruncatedError, with file and offset.
    """
    return Archive(source, base=base)
