"""A page about one file or archive: where its bytes are, what they are like, what tzip gains or gained.

Of an archive all sizes are those of its index and chunk heads, exact. Of any other file, sizes, names and shapes are exact;
what tzip would make of it is estimated by encoding samples, of bounded size however large the file is.
"""

import os
from bisect import bisect_right
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tzip.archive import Archive, opener
from tzip.bases import Base, Bases
from tzip.blocks import Entries, read_entries
from tzip.coders.arrays import I64, U8
from tzip.coders.errors import UsageError
from tzip.coders.planes import SPLITS, WORD
from tzip.coders.predictors import NAMES
from tzip.coders.registry import CODECS, names_of
from tzip.coders.sampling import entropy
from tzip.coders.transforms import DELTA, ROWS, TRANSFORMS
from tzip.duplicates import SAMPLE, SAMPLES, Run
from tzip.encoding import encode_chunk
from tzip.extents import NO_BASES, MemberLayout, lay_out
from tzip.formats.catalogue import FILE, IN_RUN, STRIDED
from tzip.formats.containers import ContainerError, View, span_bytes, whole_tensors
from tzip.formats.dtypes import Dtype
from tzip.formats.envelope import is_packed
from tzip.formats.layout import CHUNK_ELEMENTS, ChunkHead
from tzip.formats.neighbours import Neighbours
from tzip.formats.recognising import Found
from tzip.formats.source import Source, open_source
from tzip.plan import LEVELS
from tzip.report_charts import require
from tzip.report_figures import PARTS, Exponents, Figures, Structure, Tensor, clean
from tzip.report_page import page
from tzip.workers import Workers, thread_count

# Measured: estimates are 0.01 % (MiniLM in bf16), 1 % (in fp32, where a few rows of the embedding are unlike the others) and
# 0.2 % (a checkpoint, with an earlier one as its base) off what packing makes. 5.3 GB take 2 s, a third of them imports.
_BUDGET = 48 << 20  # bytes of samples that are encoded: a third of a second
_RUN_LEAST = 1 << 13  # elements
_PIECES = 4
_RUNS = 256  # that are sampled; others are taken to be like those
_LOOKS = 400  # tensors whose exponents are counted
_LOOK = 1 << 14  # elements of each
_INDEX_FIXED, _INDEX_EACH = 512, 52  # bytes that header, index and footer take: of a file, of a tensor in it

# Bits of the exponent and of the mantissa, and the bias.
_FLOATS = {
    "BF16": (8, 7, 127),
    "F16": (5, 10, 15),
    "F32": (8, 23, 127),
    "C64": (8, 23, 127),
    "F64": (11, 52, 1023),
    "C128": (11, 52, 1023),
    "F8_E5M2": (5, 2, 15),
    "F8_E4M3": (4, 3, 7),
    "F8_E5M2FNUZ": (5, 2, 16),
    "F8_E4M3FNUZ": (4, 3, 8),
}


def report(path: Any, *, base: Any = None, threads: int | None = 1) -> str:
    """Return a page in HTML, complete in itself, about a file of any container that tzip knows, or an archive.

    `base`: paths of earlier files, folders or archives. For a file the page says what packing it as differences from them
    would save; for an archive they are where its own bases are looked for.

    Raises UsageError when matplotlib is missing or `path` is a folder, OSError, and what `tzip.open` raises.
    """
    require()
    if isinstance(path, str | os.PathLike) and os.path.isdir(path):
        raise UsageError("a report is about one file; of a folder pack it and look at the archive").at(path=os.fspath(path))
    with open_source(path) as source:
        if not is_packed(source.read_at, source.size):
            return page(_plain(source, base, thread_count(threads)))
    with Archive(path, base=base) as archive:
        return page(_packed(archive, base is not None))


# ---- files


@dataclass(frozen=True, slots=True)
class _Estimate:
    """What a run would become: bytes with and without its base, of `sampled` bytes that were looked at."""

    after: float
    alone: float
    sampled: int
    entries: tuple[Entries, ...] = ()
    scale: float = 1.0


def _plain(source: Source, base: Any, threads: int) -> Figures:
    try:
        found = Neighbours().look(source, source.name if os.path.exists(source.name) else "")
    except ContainerError as e:
        found = Found(warnings=[f"{e}; all of it is taken as plain bytes"])
    figures = Figures(os.path.basename(source.name) or source.name, found.container, source.size, warnings=found.warnings)
    bases = Bases(base, opener(base)) if base is not None else None
    try:
        matched = _match(bases, source, found) if bases is not None else NO_BASES
        layout = lay_out(source.size, found.regions, found.tensors, matched, found.header)
        repeats = _repeats(layout.runs, source)
        with Workers(threads) as workers:
            estimates = _estimates(layout.runs, repeats, source, workers)
    finally:
        if bases is not None:
            bases.close()
    _fill_sizes(figures, layout, estimates, repeats)
    _fill_tensors(figures, found.tensors, layout, estimates, repeats)
    picked = _spread([t.own if t.dtype in _FLOATS else 0 for t in figures.tensors], _LOOKS)
    for i in picked:
        view = found.tensors[i]
        figures.tensors[i].exponents = _exponents(_look(source, view), view.dtype)
    figures.looked = len(picked)
    if base is not None:
        files = {b.file.path for b in matched.values()}
        figures.bases = sorted(os.path.basename(p) for p in files)
        figures.based = len(matched)
    return figures


def _match(bases: Bases, source: Source, found: Found) -> Mapping[int, Base]:
    """Return the bases that packing would take, by the places of the regions that have one."""
    whole = whole_tensors(found.regions, found.tensors)
    places = list(whole)

    def read(i: int, at: int, n: int) -> U8:
        region = found.regions[places[i]]
        return np.frombuffer(source.read_at(region.begin + at, max(0, min(n, region.end - region.begin - at))), np.uint8)

    tensors = [(view.name, view.dtype, view.shape) for view in whole.values()]
    own = source.name if os.path.exists(source.name) else ""
    return {places[i]: base for i, base in bases.match(tensors, read, own).items()}


def _repeats(runs: Sequence[Run], source: Source) -> dict[Run, Run]:
    """Return the runs that seem to hold an earlier run's bytes: by one sample, and by many of those that agree."""
    alike: dict[Hashable, list[Run]] = {}
    for run in runs:
        lengths = tuple(n for _, n in run.pieces) if len(run.pieces) > 1 else ()
        alike.setdefault((run.size, run.width, run.coding, lengths), []).append(run)
    for count in (1, SAMPLES):
        again: dict[Hashable, list[Run]] = {}
        for key, group in alike.items():
            if len(group) > 1:
                for run in group:
                    again.setdefault((key, _samples(run, source, count)), []).append(run)
        alike = again
    return {run: group[0] for group in alike.values() for run in group[1:]}


def _samples(run: Run, source: Source, count: int) -> bytes:
    sample = np.empty(min(SAMPLE, run.size), np.uint8)
    seen = []
    for i in range(count):
        at = (run.size - sample.size) * (2 * i + 1) // (2 * count)
        seen.append(sample.tobytes() if run.read(source, at, sample) else b"")
    return b"".join(seen)


def _estimates(runs: Sequence[Run], repeats: Mapping[Run, Run], source: Source, workers: Workers) -> dict[Run, _Estimate]:
    """Return what each run would become; of those that are not sampled by those that are, of the same kind."""
    stored = [run for run in runs if run not in repeats]
    picked = [stored[i] for i in _spread([run.size for run in stored], _RUNS)]
    budget, shares = _BUDGET, {}
    for k, run in enumerate(sorted(picked, key=lambda run: run.size)):  # what small ones leave is for large ones
        shares[run] = max(budget // (len(picked) - k) // run.width, _RUN_LEAST)
        budget -= min(run.size, shares[run] * run.width)

    def one(run: Run) -> _Estimate:
        return _estimate(run, source, shares[run])

    found = dict(zip(picked, workers.map(one, picked), strict=True))
    totals: dict[Hashable, list[float]] = {}
    for run, estimate in found.items():
        total = totals.setdefault((run.width, run.coding, bool(run.inputs)), [0.0, 0.0, 0.0])
        total[:] = total[0] + run.size, total[1] + estimate.after, total[2] + estimate.alone
    for run in stored:
        if run not in found:
            size, after, alone = totals.get((run.width, run.coding, bool(run.inputs)), (1.0, 1.0, 1.0))
            found[run] = _Estimate(run.size * after / size, run.size * alone / size, 0)
    return found | dict.fromkeys(repeats, _Estimate(0.0, 0.0, 0))


def _estimate(run: Run, source: Source, most: int) -> _Estimate:
    """Encode samples of a run, of `most` elements about and whole rows of it, as packing would chunks."""
    elements = run.size // run.width
    chunks = -(-min(most, elements) // CHUNK_ELEMENTS)
    pieces = _PIECES * chunks if _PIECES * _RUN_LEAST <= most < elements else 1
    row = run.row if run.row <= most // pieces else 0
    unit = row or 1
    each = min(elements, CHUNK_ELEMENTS if most >= elements else max(most // pieces // unit * unit, 1))
    if most >= elements:
        starts = list(range(0, elements, each))
    else:  # not at the ends, where padding is; pieces are as large as groups, which have tables of their own
        starts = [(elements - each) * (2 * i + 1) // (2 * pieces) // unit * unit for i in range(pieces)]
    sizes = [min(each, elements - start) for start in starts]
    count = _PIECES if pieces > 1 else 1
    alone = after = 0
    found = []
    level = LEVELS["default"]
    for i in range(0, len(starts), count):
        raw, old = _pieces(run, source, starts[i : i + count], sizes[i : i + count])
        first = starts[i] if count == 1 else 0
        record = bytes(encode_chunk(raw, run.width, run.coding, level, 0, 0, row, first).record)
        alone += len(record)
        if old is not None:
            record = bytes(encode_chunk(raw, run.width, run.coding, level, 0, 0, row, first, old).record)
        after += len(record)
        found.append(read_entries(lambda at, n, record=record: record[at : at + n], len(record)))  # type: ignore[misc]
    sampled = sum(sizes) * run.width
    scale = run.size / sampled
    # Only the head of a chunk does not grow with the chunk; there is one for each.
    grow = (-(-elements // CHUNK_ELEMENTS) - len(found) * scale) * ChunkHead.SIZE
    return _Estimate(after * scale + grow, alone * scale + grow, sampled, tuple(found), scale)


def _pieces(run: Run, source: Source, starts: Sequence[int], sizes: Sequence[int]) -> tuple[U8, U8 | None]:
    """Return elements of a run, and those that they are differences from."""
    parts, earlier = [], []
    for start, n in zip(starts, sizes, strict=True):
        part = np.zeros(n * run.width, np.uint8)
        run.read(source, start * run.width, part)
        parts.append(part)
        old = run.base_bytes(start * run.width, part.size)
        if old is not None:
            earlier.append(old.copy())  # it may be in scratch memory
    return np.concatenate(parts), np.concatenate(earlier) if earlier else None


def _fill_sizes(
    figures: Figures, layout: MemberLayout, estimates: Mapping[Run, _Estimate], repeats: Mapping[Run, Run]
) -> None:
    inline = sum(extent.length for extent in layout.extents if extent.run is None)
    fixed = inline + _INDEX_FIXED + _INDEX_EACH * len(layout.tensors)
    figures.after = fixed + sum(e.after for e in estimates.values())
    figures.alone = fixed + sum(e.alone for e in estimates.values())
    figures.sampled = sum(e.sampled for e in estimates.values())
    figures.repeats = sum(run.size for run in repeats)
    for run, estimate in estimates.items():
        for entries in estimate.entries:
            size = entries.head.elements * run.width * estimate.scale
            _add_parts(figures, entries, size, entries.head.length, estimate.scale)
        if not estimate.entries and run not in repeats:
            figures.unseen += run.size


def _fill_tensors(
    figures: Figures,
    tensors: Sequence[View],
    layout: MemberLayout,
    estimates: Mapping[Run, _Estimate],
    repeats: Mapping[Run, Run],
) -> None:
    begins = [extent.begin for extent in layout.extents]
    spans = [span_bytes(view.dtype, view.shape, view.strides) for view in tensors]
    own = _own([(0, view.begin, span) for view, span in zip(tensors, spans, strict=True)])
    first: dict[Run, str] = {}
    for view, span, mine in zip(tensors, spans, own, strict=True):
        after, note = float(mine), "same bytes as another tensor" if mine < span else ""
        extent = layout.extents[bisect_right(begins, view.begin) - 1] if span else None
        run = extent.run if extent is not None else None
        if run is not None:
            after = mine * estimates[run].after / run.size
            if not note:
                note = _note(run, estimates[run])
            first.setdefault(run, view.name)
            if run in repeats and mine:
                note = f"same bytes as {first.get(repeats[run], 'others')}, by samples"
        elements = _count(view.shape)
        nbytes = view.dtype.nbytes(elements)
        figures.tensors.append(Tensor(view.name, view.dtype.name, view.shape, elements, nbytes, mine, after, note))


def _note(run: Run, estimate: _Estimate) -> str:
    if not estimate.entries:
        return "not sampled: as others of its type"
    kind = estimate.entries[0].head.transform
    if kind == DELTA:
        return f"difference from {os.path.basename(run.inputs[0].base.file.name)}"
    return TRANSFORMS.get(kind, "")


def _look(source: Source, view: View) -> U8:
    """Return elements of a tensor, at four places when there are many."""
    width = view.dtype.width
    n = span_bytes(view.dtype, view.shape, view.strides) // width
    each = n if n <= _LOOK else _LOOK // 4
    starts = [(n - each) * i // 3 for i in range(4)] if each < n else [0]
    raw = b"".join(source.read_at(view.begin + start * width, each * width) for start in starts)
    return np.frombuffer(raw[: len(raw) // width * width], np.uint8)


# ---- archives


def _packed(archive: Archive, based: bool) -> Figures:
    reader = archive.reader
    index = reader.index
    size = int(index["m_size"].sum())
    figures = Figures(os.path.basename(reader.source.name) or reader.source.name, "tzip archive", size, packed=True)
    figures.after = figures.alone = float(reader.source.size)
    files = np.flatnonzero(index["m_kind"] == FILE).size
    figures.facts = [
        ("Files in it", f"{files:,}"),
        ("Written by", clean(reader.header.writer)),
        ("Format version", str(reader.header.version)),
        ("Chunks", f"{index['c_offset'].size:,}"),
        ("Codecs", ", ".join(names_of(int(np.bitwise_or.reduce(index["c_codecs"], initial=0)))) or "none"),
    ]
    used = int(index["x_length"][index["x_kind"] == IN_RUN].sum(dtype="u8"))
    distinct = int((index["r_elements"] * index["r_width"]).sum(dtype="u8"))
    figures.repeats = max(0, used - distinct)
    figures.bases = sorted({os.path.basename(file) for file, _ in index.input_names})
    _fill_archived(figures, archive, _fill_chunks(figures, archive))
    _fill_looks(figures, archive, based)
    return figures


def _fill_chunks(figures: Figures, archive: Archive) -> dict[int, str]:
    """Add all chunks; return by run what predicts their elements, where something does."""
    reader = archive.reader
    predicted: dict[int, str] = {}
    for run, chunks in enumerate(reader.index.run_chunks.tolist()):
        width = int(reader.index["r_width"][run])
        for chunk in range(chunks):
            offset, length = reader.chunk_at(run, chunk)
            entries = read_entries(lambda at, n, offset=offset: reader.source.read_at(offset + at, n), length)  # type: ignore[misc]
            _add_parts(figures, entries, reader.chunk_elements(run, chunk) * width, length, 1.0)
            if entries.predictor:
                predicted[run] = NAMES.get(entries.predictor, f"predictor {entries.predictor}")
    return predicted


def _fill_archived(figures: Figures, archive: Archive, predicted: dict[int, str]) -> None:
    index = archive.reader.index
    infos = archive.tensors()
    lengths = np.concatenate(([0], np.cumsum(index["c_length"], dtype=np.int64)))
    first_chunk, counts = archive.reader.first_chunk, index.run_chunks
    ends = np.cumsum(index["x_length"], dtype=np.int64)
    first_extent = np.cumsum(index["m_extents"], dtype=np.int64) - index["m_extents"]
    member_of = np.repeat(np.arange(index["m_tensors"].size), index["m_tensors"].astype(np.int64)).tolist()
    first_input = np.cumsum(index["r_inputs"], dtype=np.int64) - index["r_inputs"]
    several = len(set(member_of)) > 1
    in_file: list[tuple[Hashable, int, int]] = []
    in_run: list[tuple[Hashable, int, int]] = []
    runs: list[int] = []
    for t, info in enumerate(infos):
        x = int(first_extent[member_of[t]]) + int(index["t_extent"][t])
        run, at = -1, 0
        if info.nbytes:
            at = int(ends[x]) - int(index["x_length"][x]) + int(index["t_offset"][t])
            if int(index["x_kind"][x]) == IN_RUN:
                run = int(index["x_run"][x])
        span = _span(archive, t, info.nbytes)
        runs.append(run)
        in_file.append((0, at, span))  # no two members' extents overlap in the sum of all lengths
        in_run.append((run, int(index["x_offset"][x]) + int(index["t_offset"][t]) if run >= 0 else at, span))
    for t, (info, mine, stored) in enumerate(zip(infos, _own(in_file), _own(in_run), strict=True)):
        run = runs[t]
        after, notes = float(stored), list(info.codecs)
        if run >= 0:
            c, end = int(first_chunk[run]), int(first_chunk[run] + counts[run])
            after = stored * int(lengths[end] - lengths[c]) / int(index["r_elements"][run] * index["r_width"][run])
            if run in predicted:
                notes.insert(0, f"predicted: {predicted[run]}")
            if int(index["r_inputs"][run]):
                notes.insert(0, f"difference from {os.path.basename(index.input_names[int(first_input[run])][0])}")
                figures.based += 1
        if stored < in_run[t][2]:
            notes.insert(0, "same bytes as another tensor")
        name = f"{info.member}: {info.name}" if several else info.name
        elements = _count(info.shape)
        figures.tensors.append(Tensor(name, info.dtype, info.shape, elements, info.nbytes, mine, after, ", ".join(notes)))


def _span(archive: Archive, row: int, nbytes: int) -> int:
    index = archive.reader.index
    shape, strides = index.shape_of(row)
    dtype = index.dtype_of(row)
    return max(nbytes, 0) if strides is None or dtype is None else span_bytes(dtype, shape, strides)


def _fill_looks(figures: Figures, archive: Archive, based: bool) -> None:
    """Count exponents in a chunk of each tensor; of differences only when their base is given: to prove one takes long."""
    index = archive.reader.index
    leans = [any(int(index["r_inputs"][run]) for run in archive.tensor_runs(t)) for t in range(len(figures.tensors))]
    known = [tensor.dtype in _FLOATS and (based or not lean) for tensor, lean in zip(figures.tensors, leans, strict=True)]
    picked = _spread([t.own if k else 0 for t, k in zip(figures.tensors, known, strict=True)], _LOOKS // 2)
    for t in picked:
        dtype = index.dtype_of(t)
        assert dtype is not None  # only known ones were picked
        size = _span(archive, t, figures.tensors[t].nbytes)
        step = CHUNK_ELEMENTS * dtype.width
        # The middle one of its chunks; strided tensors are read as they lie, from the first element on.
        begin = 0 if int(index["t_layout"][t]) == STRIDED else size // 2 // step * step
        out = np.empty(min(size - begin, _LOOK * dtype.width) // dtype.width * dtype.width, np.uint8)
        archive.read_into([(t, begin, out)], 1, gathered=False)
        figures.tensors[t].exponents = _exponents(out, dtype)
    figures.looked = len(picked)
    if any(leans) and not based:
        figures.warnings.append("The exponents of differences are not shown, for they need their base: give it to see them.")


# ---- both


def _add_parts(figures: Figures, entries: Entries, size: float, after: float, scale: float) -> None:
    """Add what a chunk consists of and was found in it. It stands for `scale` chunks; `size` is that of all, `after` of one."""
    head = entries.head
    split = SPLITS.get(head.split)
    row = figures.structures.setdefault(entries.structure, Structure())
    row.add(size, after * scale)
    stored = dict.fromkeys(list(PARTS)[:-1], 0.0)  # the last one is what is left
    side = {DELTA: "p4"}.get(head.transform, "p3")
    for block in entries.transform:
        stored[side] += block.stored
    floats = split is not None and split.head is not None and head.transform in (0, ROWS)
    for plane, block in entries.planes:
        role = f"p{min(plane, 2)}" if floats else side if head.transform else "p5"
        stored[role] += block.stored
    for _, block in [*((0, b) for b in entries.transform), *entries.planes]:
        codec = CODECS[block.codec].name if block.codec in CODECS else f"codec {block.codec}"
        figures.codecs[codec] = figures.codecs.get(codec, 0.0) + block.stored * scale
    before = dict.fromkeys(stored, 0.0)
    if floats and split is not None and split.head is not None and entries.planes:
        key = (split.head.exponent + entries.planes[0][1].joined) / 8
        before |= {"p0": key / split.width * size, "p1": (2 - key) / split.width * size}
        before["p2"] = size - before["p0"] - before["p1"]
    else:
        before[side if head.transform else "p5"] = size
    for role in before:
        was, now = figures.parts.get(role, (0.0, 0.0))
        figures.parts[role] = was + before[role], now + stored[role] * scale


def _own(places: Sequence[tuple[Hashable, int, int]]) -> list[int]:
    """Return for each (space, begin, length) how many of its bytes no other has that begins earlier, or there and is longer."""
    order = sorted(range(len(places)), key=lambda i: (str(places[i][0]), places[i][1], -places[i][2], i))
    own = [0] * len(places)
    space: Hashable = None
    covered = 0
    for i in order:
        where, begin, n = places[i]
        if where != space:
            space, covered = where, 0
        own[i] = max(0, begin + n - max(begin, covered))
        covered = max(covered, begin + n)
    return own


def _spread(sizes: Sequence[int], most: int) -> list[int]:
    """Return which `most` of these to look at: the largest ones, and others at even distances; never empty ones."""
    order = sorted((i for i, n in enumerate(sizes) if n > 0), key=lambda i: (-sizes[i], i))
    if len(order) > most:
        large, rest = order[: most // 2], order[most // 2 :]
        order = large + [rest[k * len(rest) // (most - len(large))] for k in range(most - len(large))]
    return sorted(order)


def _count(shape: Sequence[int]) -> int:
    elements = 1
    for n in shape:
        elements *= n
    return elements


def _exponents(raw: U8, dtype: Dtype) -> Exponents | None:
    """Return how often each exponent occurs in these elements; None where there are none."""
    if not raw.size:
        return None
    bits, mantissa, bias = _FLOATS[dtype.name]
    words = raw.view(WORD[dtype.width])
    field: I64 = ((words >> words.dtype.type(mantissa)) & words.dtype.type((1 << bits) - 1)).astype(np.int64)
    counts: I64 = np.bincount(field, minlength=1 << bits)
    shares = {i - bias: int(counts[i]) / field.size for i in np.flatnonzero(counts).tolist()}
    zero = shares.pop(-bias, 0.0)
    special = 0.0 if bits == 4 or "FNUZ" in dtype.name else shares.pop((1 << bits) - 1 - bias, 0.0)
    return Exponents(shares, zero, special, entropy(counts) / field.size, bits, field.size)
