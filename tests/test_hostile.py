"""Damaged and lying archives: the right error or exactly the right bytes, no other exception, nothing left on disk."""

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forge
import numpy as np
import pytest
import reference
import strategies
from forge import CHNK, DONE, Cat, Forged
from strategies import CONSTANT, Entry

import tzip
from tzip import BaseNotFoundError, CorruptError, NotAnArchiveError, TruncatedError, TzipError, UnsupportedError, UsageError

KINDS = ("fast", "default", "best", "opaque", "tree", "middle")
Sample = tuple[bytes, dict[str, bytes], dict[str, bytes]]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sample]:
    return forge.small_archives(tmp_path_factory.mktemp("samples"))


def use(data: bytes, files: dict[str, bytes], tensors: dict[str, bytes], base: Path | None = None) -> list[TzipError]:
    """Read everything; return the errors. What is returned must be right, and what is raised must be a TzipError."""
    errors: list[TzipError] = []
    try:
        archive = tzip.open(data, base=base)
    except TzipError as e:
        return [e]
    with archive:
        for what in (archive.members, archive.tensors, lambda: list(archive)):
            try:
                what()
            except TzipError as e:
                errors.append(e)
        for name, raw in files.items():
            try:
                got = archive.member_bytes(name)
            except TzipError as e:
                errors.append(e)
            else:
                assert got == raw, f"member {name} is wrong, and no error"
        for name, raw in tensors.items():
            try:
                got = archive.tensor(name).raw().tobytes()
            except TzipError as e:
                errors.append(e)
            else:
                assert got == raw, f"tensor {name} is wrong, and no error"
    return errors


def refuse(
    data: bytes, folder: Path, kind: type[TzipError] | tuple[type[TzipError], ...] = TzipError, base: Path | None = None
) -> TzipError:
    """Unpack and verify must raise an error of that kind; no file may be left. Return unpack's."""
    target = folder / "out"
    with pytest.raises(kind) as caught:
        tzip.unpack(data, target, threads=1, base=base)
    left = [p for p in target.rglob("*") if not p.is_dir()] if target.exists() else []
    assert left == []
    with pytest.raises(kind):
        tzip.verify(data, deep=True, threads=1, base=base)
    return caught.value


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_at_every_byte(samples: dict[str, Sample], kind: str) -> None:
    data, files, tensors = samples[kind]
    for n in range(len(data)):
        errors = use(data[:n], files, tensors)
        assert [type(e) for e in errors] == [NotAnArchiveError if n == 0 else TruncatedError], n


def test_truncated_files_leave_nothing(samples: dict[str, Sample], tmp_path: Path) -> None:
    data = samples["tree"][0]
    path = tmp_path / "cut.tzip"
    for n in (*range(0, len(data), 97), len(data) - 1):
        path.write_bytes(data[:n])
        with pytest.raises((TruncatedError, NotAnArchiveError)) as caught:
            tzip.unpack(path, tmp_path / "out")
        assert caught.value.path == str(path)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["default", "opaque", "tree"])
@pytest.mark.parametrize("bits", [0x01, 0x80, 0xFF])
def test_every_byte_flipped(samples: dict[str, Sample], kind: str, bits: int) -> None:
    data, files, tensors = samples[kind]
    # Every byte of the smaller ones, every third of the tree (its shift differs with the bits, so nearly all are hit).
    step = 3 if len(data) > 3000 else 1
    for at in range(bits % step, len(data), step):
        damaged = bytearray(data)
        damaged[at] ^= bits
        errors = use(bytes(damaged), files, tensors)
        for e in errors:
            if at < 8 and not isinstance(e, TruncatedError):
                assert type(e) is NotAnArchiveError, (at, e)
            elif 8 <= at < 10:
                assert type(e) is UnsupportedError, (at, e)
            else:
                assert isinstance(e, CorruptError), (at, e)
        # Every byte is covered by a check or must be zero, so verify sees each of them.
        with pytest.raises(TzipError):
            tzip.verify(bytes(damaged), threads=1)


@pytest.mark.parametrize("kind", ["fast", "best", "middle"])
def test_random_bytes_damaged(samples: dict[str, Sample], kind: str) -> None:
    data, files, tensors = samples[kind]
    rng = np.random.default_rng(KINDS.index(kind))
    for _ in range(700):
        damaged = bytearray(data)
        for _ in range(int(rng.integers(1, 4))):
            at, how = int(rng.integers(len(data))), int(rng.integers(4))
            if how == 0:
                damaged[at] ^= 1 << int(rng.integers(8))
            elif how == 1:
                damaged[at : at + 64] = rng.bytes(len(damaged[at : at + 64]))
            elif how == 2:
                damaged[at : at + 512] = bytes(len(damaged[at : at + 512]))
            else:
                del damaged[at : at + int(rng.integers(1, 40))]
        errors = use(bytes(damaged), files, tensors)
        assert errors or bytes(damaged) == data or _only_padding(data, damaged)


def _only_padding(data: bytes, damaged: bytearray) -> bool:
    try:
        tzip.verify(bytes(damaged), threads=1)
    except CorruptError:
        return True  # reading does not look at the bytes between records, verify does
    return False


def test_damage_in_a_large_archive(tmp_path: Path) -> None:
    raw = forge.weights(3 << 19, 9)
    path = tmp_path / "m.safetensors"
    path.write_bytes(forge.safetensors_bytes([("a", "BF16", [3 << 19], raw), ("b", "U8", [9], b"123456789")]))
    tzip.pack(path, tmp_path / "a.tzip")
    data = (tmp_path / "a.tzip").read_bytes()
    rng = np.random.default_rng(0)
    files, tensors = {path.name: path.read_bytes()}, {"a": raw, "b": b"123456789"}
    for at in rng.integers(0, len(data), 60).tolist():
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(rng.integers(8))
        use(bytes(damaged), {}, tensors)
        with pytest.raises(TzipError):
            tzip.verify(bytes(damaged), threads=2)
    assert use(data, files, tensors) == []


def test_bytes_before_the_archive_are_skipped_and_bytes_after_are_refused(samples: dict[str, Sample]) -> None:
    data, files, tensors = samples["default"]
    assert use(b"#!/bin/sh\n" + data, files, tensors) == []
    assert use(data + data, files, tensors) == []
    for tail in (b"\0", b"x" * 100):
        errors = use(data + tail, files, tensors)
        assert [type(e) for e in errors] == [TruncatedError]


@pytest.mark.parametrize("data", [b"", b"\0", b"PK\x03\x04" + bytes(200), bytes(1000), b"\x89TZIQ\r\n\x1a" + bytes(100)])
def test_not_an_archive(data: bytes) -> None:
    with pytest.raises(NotAnArchiveError):
        tzip.open(data)


# ---------------------------------------------------------------- headers and footers that lie, checks right


def test_headers(samples: dict[str, Sample], tmp_path: Path) -> None:
    data = samples["default"][0]
    for fields in (
        {"version": 2},
        {"version": 65535},
        {"must": 1},
        {"must": 1 << 31},
        {"chunk_log": 21},
        {"group_log": 17},
    ):
        error = refuse(forge.header(data, **fields) + data[64:], tmp_path, UnsupportedError)
        assert error.exit_code == 5
        assert "upgrade" in str(error) or "not known" in str(error)
    assert "draft" in str(refuse(forge.header(data, version=0) + data[64:], tmp_path, UnsupportedError))
    assert use(forge.header(data, may=0xFFFFFFFF) + data[64:], *samples["default"][1:]) == []
    newer = bytearray(data)
    newer[8] = 9  # a newer version may check its header in another way
    refuse(bytes(newer), tmp_path, UnsupportedError)
    reserved = data[:48] + b"\1" + data[49:56]
    refuse(reserved + forge.check8(reserved) + data[64:], tmp_path, CorruptError)


def test_footers(samples: dict[str, Sample], tmp_path: Path) -> None:
    data = samples["default"][0]
    offset, length = struct.unpack_from("<QQ", data, len(data) - 80)
    index = data[offset : offset + length]
    assert data[:-80] + forge.footer(offset, index) == data
    lies = [
        forge.footer(offset + 16, index),
        forge.footer(offset - 16, index),
        forge.footer(offset + 1, index, len(data)),
        forge.footer(0, index, len(data)),
        forge.footer((1 << 64) - 16, index, len(data)),
        forge.footer(offset, index, 1 << 63),
        forge.footer(offset, index, len(data) + 16),
        forge.footer(offset, index, len(data) - 16),
        forge.footer(offset, index, 0),
        forge.footer(offset, index, index_length=(1 << 64) - 1),
        forge.footer(offset, index, index_length=0),
        forge.footer(offset, index, index_length=length - 16),
        forge.footer(offset, index[:-1] + b"\1"),
    ]
    for lie in lies:
        refuse(data[:-80] + lie, tmp_path, (CorruptError, NotAnArchiveError))


# ---------------------------------------------------------------- catalogues that lie, checks right


def lie_counts(n: int, value: int) -> Callable[[Forged], None]:
    return lambda f: f.index.counts.update({n: value})


def both(member: int, column: str, i: int, value: int) -> Callable[[Forged], None]:
    return lambda f: f.set_both(member, column, i, value)


def index_only(column: str, i: int, value: int | bytes) -> Callable[[Forged], None]:
    return lambda f: f.index.set(column, i, value)


def column(name: str, values: list[int]) -> Callable[[Forged], None]:
    def change(f: Forged) -> None:
        for cat in (f.index, *f.members()):
            cat.columns[name] = np.array(values, cat[name].dtype)

    return change


def shape(values: list[int]) -> Callable[[Forged], None]:
    """Give the first tensor of the archive another shape."""

    def change(f: Forged) -> None:
        for cat in (f.index, f.members()[0]):
            old = int(cat["t_ndim"][0])
            cat.set("t_ndim", 0, len(values))
            cat.columns["dims"] = np.concatenate((np.array(values, "<u8"), cat["dims"][old:])).astype("<u8")

    return change


def tensor_names(f: Forged) -> None:
    for cat in (f.index, f.members()[0]):
        names = cat.names
        cat.names = [names[0], *([names[1]] * (len(names) - 1))]


BIG = 1 << 63
CATALOGUES: dict[str, Callable[[Forged], None]] = {
    **{f"count {n} = {v}": lie_counts(n, v) for n in range(12) for v in (0xFFFFFFFF, 9)},
    "no member": lambda f: f.index.counts.update({0: 0}),
    "member size": both(0, "m_size", 0, 5),
    "member size, huge": both(0, "m_size", 0, BIG + 5),
    "member size, index": index_only("m_size", 0, 5),
    "member mode": both(0, "m_mode", 0, 0o10000),
    "member extents": both(0, "m_extents", 0, 1),
    "member extents, huge": both(0, "m_extents", 0, 0xFFFFFFFF),
    "member tensors": both(0, "m_tensors", 0, 1),
    "member runs": both(0, "m_runs", 0, 0),
    "member record": lambda f: None,  # see below: the offset is set after the build
    "kind of a file is a folder": both(0, "m_kind", 0, 1),
    "kind of a file is a link": both(0, "m_kind", 0, 2),
    "kind, index": index_only("m_kind", 0, 1),
    "sha": index_only("m_sha", 0, b"x" * 32),
    "extent length 0": both(0, "x_length", 0, 0),
    "extent length, huge": both(0, "x_length", 0, BIG),
    "extent length": both(0, "x_length", 1, 8),
    "extent offset": both(0, "x_offset", 1, 1),
    "extent offset, huge": both(0, "x_offset", 1, (1 << 64) - 8),
    "inline offset": both(0, "x_offset", 0, 1),
    "inline with a run": both(0, "x_run", 0, 1),
    "extent becomes inline": both(0, "x_kind", 1, 0),
    "extent of a run that is not there": both(0, "x_run", 1, 77),
    "extent of the next run": both(0, "x_run", 1, 1),
    "run width 3": both(0, "r_width", 0, 3),
    "run width 0": both(0, "r_width", 0, 0),
    "run width 1": both(0, "r_width", 0, 1),
    "run width 8": both(0, "r_width", 0, 8),
    "run inputs 5": both(0, "r_inputs", 0, 5),
    "run of no element": both(0, "r_elements", 0, 0),
    "run one element short": lambda f: f.set_both(0, "r_elements", 0, int(f.index["r_elements"][0]) - 1),
    "run one element long": lambda f: f.set_both(0, "r_elements", 0, int(f.index["r_elements"][0]) + 1),
    "run of 2^20 elements": both(0, "r_elements", 0, 1 << 20),
    "run of 2^20 + 1 elements": both(0, "r_elements", 0, (1 << 20) + 1),
    "run of 2^60 elements": both(0, "r_elements", 0, 1 << 60),
    "run of 2^64 - 1 elements": both(0, "r_elements", 0, (1 << 64) - 1),
    "tensor of another extent": both(0, "t_extent", 0, 9),
    "tensor offset": both(0, "t_offset", 0, 2),
    "tensor offset, huge": both(0, "t_offset", 0, (1 << 64) - 2),
    "tensor of wider elements": both(0, "t_dtype", 0, 24),
    "tensor of a sub-byte dtype that ends within a byte": lambda f: (shape([3])(f), f.set_both(0, "t_dtype", 0, 5))[1],
    "shape one too many": shape([41, 8]),
    "shape of 2^60 elements": shape([1 << 30, 1 << 30]),
    "shape that wraps to the right number": shape([1 << 32, 1 << 32, 320]),
    "shape that wraps to 0": shape([1 << 32, 1 << 32]),
    "shape of 2^64 - 1": shape([(1 << 64) - 1]),
    "shape of 255 dimensions": shape([2] * 255),
    "shape of 0 times huge": shape([0, (1 << 64) - 1, (1 << 64) - 1]),
    "two tensors of one name": tensor_names,
    "dims too many": lambda f: f.index.columns.update(dims=np.append(f.index["dims"], np.uint64(3))),
    "names that overrun": index_only("m_name", 0, 4000),
    "name heap longer": lambda f: setattr(f.index, "heap", f.index.heap + b"xx"),
    "body longer": lambda f: setattr(f.index, "tail", bytes(8)),
    "inline bytes in the index": lambda f: setattr(f.index, "inline", b"12345678"),
    "first member 1": lambda f: setattr(f.index, "first_member", 1),
    "first run 1": lambda f: setattr(f.index, "first_run", 1),
    "record of another member": lambda f: setattr(f.members()[0], "first_member", 1),
    "record of other runs": lambda f: setattr(f.members()[0], "first_run", 1),
    "chunk table longer": column("c_codecs", [0] * 9),
    "member name is no UTF-8": lambda f: f.rename(0, b"\xff\xfe"),
}
UNSUPPORTED: dict[str, Callable[[Forged], None]] = {
    "member kind 9": both(0, "m_kind", 0, 9),
    "member flag": both(0, "m_flags", 0, 5),
    "extent kind 2": both(0, "x_kind", 1, 2),
}


def broken(data: bytes) -> None:
    assert data


@pytest.mark.parametrize("lie", sorted(set(CATALOGUES) - {"member record"}))
def test_lying_catalogue(samples: dict[str, Sample], tmp_path: Path, lie: str) -> None:
    forged = Forged(samples["default"][0])
    CATALOGUES[lie](forged)
    data = forged.build()
    refuse(data, tmp_path, (CorruptError, UsageError) if lie == "kind of a file is a folder" else CorruptError)
    use(data, {}, {})
    if lie in ("member size", "extent length", "tensor offset", "run one element short", "two tensors of one name"):
        with pytest.raises(CorruptError):  # the index alone shows it: nothing may be read through it
            tzip.open(data)


@pytest.mark.parametrize("lie", UNSUPPORTED)
def test_catalogue_of_the_future(samples: dict[str, Sample], tmp_path: Path, lie: str) -> None:
    forged = Forged(samples["default"][0])
    UNSUPPORTED[lie](forged)
    refuse(forged.build(), tmp_path, UnsupportedError)


def test_reforged_archive_is_sound(samples: dict[str, Sample], tmp_path: Path) -> None:
    """The forger itself must not be what makes the others fail."""
    for data, files, tensors in samples.values():
        again = Forged(data).build()
        assert use(again, files, tensors) == []
        tzip.verify(again, deep=True)


def _lies_of_offsets() -> dict[str, Callable[[Cat], None]]:
    def put(name: str, i: int, value: int) -> Callable[[Cat], None]:
        return lambda c: c.set(name, i, value)

    def swap(c: Cat) -> None:
        for name in ("c_offset", "c_length", "c_check"):
            c[name][[0, 1]] = c[name][[1, 0]]

    def twice(c: Cat) -> None:
        for name in ("c_offset", "c_length", "c_check"):
            c[name][1] = c[name][0]

    return {
        "member record 0": put("m_record", 0, 0),
        "member record at a chunk": lambda c: c.set("m_record", 0, int(c["c_offset"][0])),
        "member record beyond": put("m_record", 0, 1 << 40),
        "member record unaligned": lambda c: c.set("m_record", 0, int(c["m_record"][0]) + 1),
        "chunk offset 0": put("c_offset", 0, 0),
        "chunk offset huge": put("c_offset", 1, (1 << 64) - 16),
        "chunk offset + 16": lambda c: c.set("c_offset", 0, int(c["c_offset"][0]) + 16),
        "chunk offset unaligned": lambda c: c.set("c_offset", 0, int(c["c_offset"][0]) + 1),
        "chunk at its member record": lambda c: c.set("c_offset", 0, int(c["m_record"][0])),
        "chunk length 0": put("c_length", 0, 0),
        "chunk length huge": put("c_length", 1, 0xFFFFFFF0),
        "chunk length - 16": lambda c: c.set("c_length", 0, int(c["c_length"][0]) - 16),
        "chunk length + 16": lambda c: c.set("c_length", 0, int(c["c_length"][0]) + 16),
        "chunk length into the index": lambda c: c.set("c_length", -1, int(c["c_length"][-1]) + 4096),
        "chunk check": put("c_check", 0, 1),
        "chunks swapped": swap,
        "a chunk twice": twice,
    }


# What the table alone shows is refused before anything is read through it.
AT_OPEN = {
    "member record beyond",
    "member record unaligned",
    "chunk offset 0",
    "chunk offset huge",
    "chunk offset unaligned",
    "chunk length 0",
    "chunk length huge",
    "chunk length + 16",
    "chunk length into the index",
    "chunks swapped",
    "a chunk twice",
}


@pytest.mark.parametrize("lie", _lies_of_offsets())
def test_lying_offsets(samples: dict[str, Sample], tmp_path: Path, lie: str) -> None:
    data = Forged(samples["default"][0]).build(_lies_of_offsets()[lie])
    refuse(data, tmp_path, CorruptError)
    if lie in AT_OPEN:
        with pytest.raises(CorruptError):
            tzip.open(data)


def test_chunks_dropped_or_doubled_or_foreign(samples: dict[str, Sample], tmp_path: Path) -> None:
    data = samples["default"][0]
    f = Forged(data)
    first, second = f.chunks()[:2]
    del f.records[first]
    refuse(f.build(), tmp_path, CorruptError)
    f = Forged(data)
    f.records.insert(first, f.records[first])  # one more than the runs have
    refuse(f.build(), tmp_path, CorruptError)
    f = Forged(data)
    f.records[second] = f.records[first]
    refuse(f.build(), tmp_path, CorruptError)
    f = Forged(data)
    f.records[first], f.records[second] = f.records[second], f.records[first]
    refuse(f.build(), tmp_path, CorruptError)
    f = Forged(data)
    f.records[first] = Forged(samples["best"][0]).records[first]
    assert use(f.build(), {}, {}) == []  # the same bytes at another level: sound, and decodes to the same
    f.records[first] = Forged(samples["middle"][0]).records[Forged(samples["middle"][0]).chunks()[0]]
    refuse(f.build(), tmp_path, CorruptError)


def test_records_that_verify_must_miss(samples: dict[str, Sample]) -> None:
    """Structures that unpacking never looks at."""
    data = samples["default"][0]
    f = Forged(data)
    (done,) = (i for i, r in enumerate(f.records) if r[0] == DONE)
    for change in ("drop", "sha", "size", "member", "flags", "twice"):
        f = Forged(data)
        record = bytearray(f.records[done][1])
        if change == "drop":
            del f.records[done]
        elif change == "twice":
            f.records.insert(done, f.records[done])
        else:
            record[{"sha": 40, "size": 24, "member": 64, "flags": 68}[change]] ^= 1
            f.records[done][1] = forge.reseal(bytes(record))
        with pytest.raises(CorruptError):
            tzip.verify(f.build(), threads=1)
    offset = struct.unpack_from("<Q", data, len(data) - 80)[0]
    index = forge.place(forge.place(data[offset:-80], offset), offset + 4096)
    gap = data[:offset] + bytes(4096) + index
    footer = forge.footer(offset + 4096, index)
    with pytest.raises(CorruptError):
        tzip.verify(gap + footer, threads=1)


# ---------------------------------------------------------------- chunks that lie, checks right


def change_chunk(f: Forged, which: int, change: Callable[[bytearray], None]) -> None:
    i = f.chunks()[which]
    record = bytearray(f.records[i][1])
    change(record)
    f.records[i][1] = forge.reseal(bytes(record))


def put(at: int, form: str, value: int) -> Callable[[bytearray], None]:
    return lambda r: struct.pack_into(form, r, at, value)


def flip(at: int, bits: int = 1) -> Callable[[bytearray], None]:
    def change(r: bytearray) -> None:
        r[at] ^= bits

    return change


CHUNKS: dict[str, Callable[[bytearray], None]] = {
    "length 0": put(16, "<Q", 0),
    "length huge": put(16, "<Q", 1 << 60),
    "length - 16": lambda r: struct.pack_into("<Q", r, 16, len(r) - 16),
    "run": put(24, "<I", 5),
    "chunk": put(28, "<I", 1),
    "elements": flip(32),
    "elements 0": put(32, "<I", 0),
    "elements huge": put(32, "<I", 0xFFFFFFFF),
    "width": put(37, "B", 4),
    "an input and no delta": put(39, "B", 1),
    **{f"transform {t} without its header": put(38, "B", t) for t in reference._NAMED},
    "decoded sum": flip(40),
    "joined": put(49, "B", 3),
    "joined of the rest": flip(65),
    "segments 0": put(50, "B", 0),
    "segments 2": put(50, "B", 2),  # a number that the block could have
    "segments 4": put(50, "B", 4),
    "segments 255": put(50, "B", 255),
    "flags: table that is not there": flip(51, 1),
    "flags: sign of the key": flip(51, 2),
    "flags: reserved": flip(51, 8),
    "sign mode 3": put(67, "B", 6),
    "sign mode 1": put(67, "B", 2),
    "stored + 1": lambda r: struct.pack_into("<I", r, 52, struct.unpack_from("<I", r, 52)[0] + 1),
    "stored + 16": lambda r: struct.pack_into("<I", r, 52, struct.unpack_from("<I", r, 52)[0] + 16),
    "stored - 1": lambda r: struct.pack_into("<I", r, 52, struct.unpack_from("<I", r, 52)[0] - 1),
    "stored 0": put(52, "<I", 0),
    "stored huge": put(52, "<I", 0xFFFFFFFF),
    "escapes 1": lambda r: struct.pack_into("<I", r, 56, struct.unpack_from("<I", r, 56)[0] + 1),
    "escapes huge": put(56, "<I", 0xFFFFFFFF),
    "value": flip(60),
    "value huge": put(60, "<H", 0xFFFF),
    "reserved": put(62, "<H", 1),
    "payload": flip(-20),
    "last byte": flip(-1, 0x80),
    "rest": flip(80 + 200),
}


@pytest.mark.parametrize("level", ["fast", "default", "best"])
@pytest.mark.parametrize("lie", CHUNKS)
def test_lying_chunk(samples: dict[str, Sample], tmp_path: Path, level: str, lie: str) -> None:
    f = Forged(samples[level][0])
    change_chunk(f, 0, CHUNKS[lie])
    data = f.build()
    refuse(data, tmp_path, CorruptError)
    # The tensors of other chunks are as they were.
    tensors = samples[level][2]
    with tzip.open(data) as archive:
        assert archive.tensor("scalar").raw().tobytes() == tensors["scalar"]
        assert archive.tensor("f").raw().tobytes() == tensors["f"]


@pytest.mark.parametrize("level", ["fast", "default", "best", "middle", "opaque"])
def test_every_byte_of_a_chunk_flipped_with_its_check_right(samples: dict[str, Sample], level: str) -> None:
    """The stored check does not help here: decoding alone must stay safe, and the decoded sum must see it."""
    data, files, tensors = samples[level]
    f = Forged(data)
    for i in f.chunks():
        record = f.records[i][1]
        step = 1 if len(record) < 1200 else 11
        for at in range(16, len(record), step):
            for bits in (0x01, 0xFF):
                f = Forged(data)
                changed = bytearray(record)
                changed[at] ^= bits
                f.records[i][1] = forge.reseal(bytes(changed))
                use(f.build(), files, tensors)


def test_entries_are_proven_before_anything_is_decoded(samples: dict[str, Sample]) -> None:
    from tzip.chunks import read_blocks

    for level in ("fast", "default", "best"):
        f = Forged(samples[level][0])
        good = f.records[f.chunks()[0]][1]
        elements = struct.unpack_from("<I", good, 32)[0]
        read_blocks(memoryview(good), 0, 0, elements, 2)
        for lie in (
            "joined",
            "joined of the rest",
            "segments 0",
            "segments 4",
            "segments 255",
            "sign mode 3",
            "escapes huge",
            "transform 1 without its header",
            "transform 4 without its header",
        ):
            record = bytearray(good)
            CHUNKS[lie](record)
            with pytest.raises(CorruptError):
                read_blocks(memoryview(record), 0, 0, elements, 2)
    # Constants have no size that would show it: the joined bits of key and rest must be the same all the same.
    entries = [Entry(CONSTANT, joined=2, value=0x3F80 >> 5), Entry(CONSTANT, joined=2)]
    record = bytearray(strategies.chunk_record(entries, 2, 2, np.full(6000, 0x3F80, "<u2").tobytes()))
    assert (record[36], record[48], record[64]) == (2, 1, 1)
    read_blocks(memoryview(record), 0, 0, 6000, 2)
    record[65] ^= 2 if record[65] != 2 else 3
    with pytest.raises(CorruptError):
        read_blocks(memoryview(record), 0, 0, 6000, 2)


@pytest.mark.parametrize("transform", [max(reference._NAMED) + 1, 100, 128, 255])
def test_unknown_transform_makes_only_its_tensor_unsupported(samples: dict[str, Sample], transform: int) -> None:
    data, _, tensors = samples["default"]
    f = Forged(data)
    change_chunk(f, 0, put(38, "B", transform))
    with tzip.open(f.build()) as archive:
        assert {t.name for t in archive.tensors()} == set(tensors)
        with pytest.raises(UnsupportedError) as caught:
            archive["w"]
        assert caught.value.tensor == "w"
        assert f"transform {transform}" in str(caught.value)
        assert archive.tensor("f").raw().tobytes() == tensors["f"]


@pytest.mark.parametrize("codec", [5, 6, 8, 15, 16, 127, 128, 255])
def test_unknown_codec_makes_only_its_tensor_unsupported(samples: dict[str, Sample], codec: int) -> None:
    data, _, tensors = samples["default"]
    f = Forged(data)
    change_chunk(f, 0, put(48, "B", codec))
    f.index["c_codecs"][0] = 1 << min(codec, 31)
    with tzip.open(f.build()) as archive:
        assert {t.name for t in archive.tensors()} == set(tensors)
        with pytest.raises(UnsupportedError) as caught:
            archive["w"]
        assert caught.value.tensor == "w"
        assert archive.tensor("f").raw().tobytes() == tensors["f"]


@pytest.mark.parametrize(("at", "value"), [(36, 6), (36, 255), (39, 5), (39, 255)])
def test_unknown_split_or_inputs_are_unsupported(samples: dict[str, Sample], tmp_path: Path, at: int, value: int) -> None:
    f = Forged(samples["default"][0])
    change_chunk(f, 0, put(at, "B", value))
    data = f.build()
    refuse(data, tmp_path, UnsupportedError)
    with tzip.open(data) as archive:
        assert archive.tensor("f").raw().tobytes() == samples["default"][2]["f"]


def test_unknown_dtype_layout_and_inputs_make_only_that_tensor_unsupported(samples: dict[str, Sample]) -> None:
    data, files, tensors = samples["default"]
    for column_name, value in (("t_dtype", 99), ("t_dtype", 11), ("t_layout", 2)):
        f = Forged(data)
        f.set_both(0, column_name, 0, value)
        with tzip.open(f.build()) as archive:
            assert len(archive.tensors()) == len(tensors)
            with pytest.raises(UnsupportedError):
                archive["w"]
            assert archive.tensor("f").raw().tobytes() == tensors["f"]
            assert archive.member_bytes("default.safetensors") == files["default.safetensors"]
    f = Forged(data)
    f.add_input(0, 0, i_kind=4, i_length=1, i_file=b"x" * 32)
    with tzip.open(f.build()) as archive:
        with pytest.raises(UnsupportedError):
            archive["w"]
        assert archive.tensor("f").raw().tobytes() == tensors["f"]


# ---------------------------------------------------------------- deltas


Leaning = tuple[bytes, dict[str, bytes], dict[str, bytes], Path]


@pytest.fixture(scope="module")
def leaning(tmp_path_factory: pytest.TempPathFactory) -> Leaning:
    """An archive of three runs with deltas, of elements of 2, 4 and 8 bytes, and one without; where its base is."""
    folder = tmp_path_factory.mktemp("leaning")
    rng = np.random.default_rng(3)
    old, new = [], []
    for name, dtype, word, shape in (
        ("w", "BF16", "<u2", [66, 1000]),
        ("f", "F32", "<u4", [66000]),
        ("i", "I64", "<u8", [66000]),
    ):
        raw = noise_or_weights(66000, dtype)
        words = np.frombuffer(raw, word).copy()
        places = rng.choice(66000, 60 if name == "f" else 20_000, replace=False)
        words[places] += rng.integers(-5, 6, places.size).astype(np.int64).astype(word)
        # The first one has a row more than its base; the base's last element is another one.
        words[-1:] ^= np.array(1, word)
        more = raw[:2000] if name == "w" else b""
        old.append((name, dtype, shape, raw))
        new.append((name, dtype, [67, 1000] if more else shape, words.tobytes() + more))
    new.append(("alone", "U8", [5000], forge.noise(5000, 8)))
    (folder / "base").mkdir()
    (folder / "base" / "old.safetensors").write_bytes(forge.safetensors_bytes(old))
    path = folder / "new.safetensors"
    path.write_bytes(forge.safetensors_bytes(new))
    tzip.pack(path, folder / "new.tzip", base=folder / "base", threads=1)
    data = (folder / "new.tzip").read_bytes()
    chunks = [record for kind, record in Forged(data).records if kind == CHNK]
    assert [record[38] for record in chunks] == [7, 7, 7, 0]
    assert [bool(any(record[56:60])) for record in chunks[:3]] == [False, True, False]  # one has a mask
    return data, {path.name: path.read_bytes()}, {name: raw for name, _, _, raw in new}, folder / "base"


def noise_or_weights(n: int, dtype: str) -> bytes:
    return forge.noise(8 * n) if dtype == "I64" else forge.weights(n, 4, dtype)


def test_deltas_are_read_where_their_base_is(leaning: Leaning) -> None:
    data, files, tensors, base = leaning
    assert use(data, files, tensors, base) == []
    assert use(Forged(data).build(), files, tensors, base) == []
    errors = use(data, files, tensors)
    assert [type(e) for e in errors] == [BaseNotFoundError] * 4
    archive = reference.Archive(data, {(hash_of(base), name): raw for name, raw in base_tensors(base).items()})
    assert archive.tensor_bytes(0, "f") == tensors["f"]


def hash_of(base: Path) -> bytes:
    return hashlib.sha256((base / "old.safetensors").read_bytes()).digest()


def base_tensors(base: Path) -> dict[str, bytes]:
    raw = (base / "old.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    return {name: raw[8 + length :][slice(*entry["data_offsets"])] for name, entry in header.items()}


INPUT_LIES: dict[str, tuple[type[TzipError] | tuple[type[TzipError], ...], Callable[[Forged], None]]] = {
    "no byte": (CorruptError, both(0, "i_length", 0, 0)),
    "past the run": (CorruptError, both(0, "i_length", 1, 4 * 66000 + 1)),
    "past the run by its offset": (CorruptError, both(0, "i_offset", 1, 1)),
    "2^63 bytes": (CorruptError, both(0, "i_length", 1, BIG)),
    "2^64 - 1 bytes": (CorruptError, both(0, "i_length", 1, (1 << 64) - 1)),
    "at 2^64 - 8": (CorruptError, both(0, "i_offset", 1, (1 << 64) - 8)),
    "past the base": (CorruptError, both(0, "i_length", 0, 134000)),
    "from nowhere": (CorruptError, both(0, "i_file", 2, bytes(32))),
    "none": (CorruptError, both(0, "r_inputs", 0, 0)),
    "one more": (CorruptError, both(0, "r_inputs", 0, 2)),
    "2^32 - 1": (CorruptError, both(0, "r_inputs", 3, 0xFFFFFFFF)),
    "of the run without one": (CorruptError, lambda f: move_inputs(f, [1, 1, 0, 1])),
    "of the next run": (CorruptError, lambda f: move_inputs(f, [0, 2, 1, 0])),
    "offset, index": (CorruptError, index_only("i_offset", 0, 1)),
    "kind, index": ((CorruptError, UnsupportedError), index_only("i_kind", 0, 1)),
    "file, index": ((CorruptError, BaseNotFoundError), index_only("i_file", 0, b"x" * 32)),
    "archive, index": (CorruptError, index_only("i_archive", 0, b"x" * 32)),
    "name of the file is no UTF-8": (CorruptError, lambda f: rename_input(f, 5, b"\xff\xfe")),
    "name of the tensor is no UTF-8": (CorruptError, lambda f: rename_input(f, 8, b"\xc3")),
    "names that overrun": (CorruptError, both(0, "i_name", 0, 1 << 31)),
    "another file": (BaseNotFoundError, both(0, "i_file", 0, b"x" * 32)),
    "another tensor": (BaseNotFoundError, lambda f: rename_input(f, 8, b"other", placed=False)),
    "no tensor's name": (BaseNotFoundError, lambda f: rename_input(f, 8, b"", placed=False)),
    "another kind": (UnsupportedError, both(0, "i_kind", 0, 4)),
    "a role that nobody asks for": (CorruptError, both(0, "i_kind", 0, 1)),
    "kind 255": (UnsupportedError, both(0, "i_kind", 0, 255)),
    # Of what fits in: the sums tell, or the classes before them.
    "fewer bytes": (CorruptError, both(0, "i_length", 2, 4)),
    "a tensor that is another one": (CorruptError, lambda f: rename_input(f, 9, b"i", placed=False)),
    "another place": (CorruptError, both(0, "i_begin", 1, 500)),
    "a place past the file": (CorruptError, both(0, "i_begin", 2, BIG)),
}


def move_inputs(f: Forged, counts: list[int]) -> None:
    for cat in (f.index, *f.members()):
        cat.columns["r_inputs"] = np.array(counts, "<u4")


def rename_input(f: Forged, i: int, name: bytes, *, placed: bool = True) -> None:
    """Give the i-th name of the heap another text: member, 4 tensors, 3 files, 3 tensors of them."""
    for cat in (f.index, *f.members()):
        if not placed:
            cat.columns["i_begin"] = np.full(3, (1 << 64) - 1, np.uint64)
        names = cat.names
        assert len(names) == 11
        names[i] = name
        cat.names = names


@pytest.mark.parametrize("lie", INPUT_LIES)
def test_lying_inputs(leaning: Leaning, tmp_path: Path, lie: str) -> None:
    data, files, tensors, base = leaning
    kind, change = INPUT_LIES[lie]
    f = Forged(data)
    change(f)
    data = f.build()
    refuse(data, tmp_path, kind, base)
    if lie.endswith(", index"):
        return
    assert use(data, {}, {}, base) == [] or kind is CorruptError
    assert any(isinstance(e, kind) for e in use(data, files, tensors, base))
    if kind is not CorruptError or lie in ("past the base", "fewer bytes", "a tensor that is another one", "another place"):
        with tzip.open(data, base=base) as archive:  # the others are as they were
            assert archive.tensor("alone").raw().tobytes() == tensors["alone"]
            other = "w" if lie == "fewer bytes" else "i"
            assert archive.tensor(other).raw().tobytes() == tensors[other]


COLUMNS = ("r_inputs", "i_kind", "i_offset", "i_length", "i_begin", "i_archive", "i_file", "i_member", "i_name")


@pytest.mark.parametrize("name", COLUMNS)
def test_every_bit_of_the_inputs(leaning: Leaning, name: str) -> None:
    """In record and index alike: another thing is found, nothing, or an error; never other bytes."""
    data, _, tensors, base = leaning
    size = Forged(data).index[name].itemsize
    for bit in range(0, 8 * size, 1 if size < 32 else 19):
        f = Forged(data)
        for cat in (f.index, *f.members()):
            raw = bytearray(cat[name].tobytes())
            raw[bit // 8] ^= 1 << bit % 8
            cat.columns[name] = np.frombuffer(bytes(raw), cat[name].dtype).copy()
        errors = use(f.build(), {}, {"alone": tensors["alone"], "w": tensors["w"]}, base)
        assert errors or name in ("i_archive", "i_member")


DELTA_LIES: dict[str, tuple[Any, Callable[[bytearray], None]]] = {
    "no input": (CorruptError, put(39, "B", 0)),
    "two inputs": (CorruptError, put(39, "B", 2)),
    "five inputs": (UnsupportedError, put(39, "B", 5)),
    "255 inputs": (UnsupportedError, put(39, "B", 255)),
    "no delta": (CorruptError, put(38, "B", 4)),
    "transform 0": (CorruptError, put(38, "B", 0)),
    "split of bytes": (CorruptError, put(36, "B", 0)),
    "split of heads": (CorruptError, put(36, "B", 2)),
    "m 0": (CorruptError, put(48, "<I", 0)),
    "m less": (CorruptError, lambda r: put(48, "<I", struct.unpack_from("<I", r, 48)[0] - 1)(r)),
    "m more": (CorruptError, lambda r: put(48, "<I", struct.unpack_from("<I", r, 48)[0] + 1)(r)),
    "inner width": (CorruptError, put(52, "B", 1)),
    "a 2": (CorruptError, put(53, "B", 2)),
    "a 255": (CorruptError, put(53, "B", 255)),
    "the other a": (CorruptError, flip(53)),
    "reserved": (CorruptError, put(54, "<H", 1)),
    "size of A": (CorruptError, put(56, "<I", 8250 * 8)),
    "size of B": (CorruptError, put(60, "<I", 1)),
    "b 2^11": (CorruptError, put(64, "<I", 1 << 11)),
    "b 2^32 - 1": (CorruptError, put(64, "<I", 0xFFFFFFFF)),
    "bits 0": (CorruptError, put(69, "B", 0)),
    "bits 12": (CorruptError, put(69, "B", 12)),
    "shift 255": (CorruptError, put(68, "B", 255)),
    "shift too large": (CorruptError, lambda r: put(68, "B", 8 * r[37] - r[69] + 1)(r)),
    "bits 2^16 more": (CorruptError, put(70, "B", 1)),
    "v": (CorruptError, put(72, "<Q", 1)),
    "v 2^63": ((CorruptError, UnsupportedError), put(72, "<Q", BIG)),
    "another predictor": ((CorruptError, UnsupportedError), put(72, "<Q", 1)),
    "B has an entry": (CorruptError, put(96, "B", 1)),
    **{f"class {k} has one more": (CorruptError, lambda r, k=k: bump(r, k, 1)) for k in range(8)},
    "classes wrap": (CorruptError, lambda r: (bump(r, 0, 1 << 31), bump(r, 1, 1 << 31))[1]),
    "class 0 of 2^32 - 1": (CorruptError, put(112, "<I", 0xFFFFFFFF)),
    "one from class to class": (CorruptError, lambda r: (bump(r, largest_class(r), -1), bump(r, 7 - largest_class(r), 1))[1]),
    "no classes": (CorruptError, lambda r: r.__setitem__(slice(112, 144), bytes(32))),
    "an unknown codec": (UnsupportedError, put(144, "B", 99)),
    "decoded sum": (CorruptError, flip(40)),
    "payload": (CorruptError, flip(-20)),
}


def bump(r: bytearray, k: int, by: int) -> None:
    at = 112 + 4 * k
    struct.pack_into("<I", r, at, (struct.unpack_from("<I", r, at)[0] + by) % (1 << 32))


def largest_class(r: bytearray) -> int:
    sizes = struct.unpack_from("<8I", r, 112)
    return sizes.index(max(sizes))


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("lie", DELTA_LIES)
def test_lying_delta(leaning: Leaning, tmp_path: Path, lie: str, which: int) -> None:
    data, _, tensors, base = leaning
    kind, change = DELTA_LIES[lie]
    f = Forged(data)
    change_chunk(f, which, change)
    data = f.build()
    if which == 0:
        refuse(data, tmp_path, kind, base)
    with tzip.open(data, base=base) as archive:
        for i, (name, raw) in enumerate(tensors.items()):
            if i == which:
                with pytest.raises(kind):
                    archive.tensor(name).raw()
            else:
                assert archive.tensor(name).raw().tobytes() == raw


def test_every_byte_of_a_delta_flipped_with_its_check_right(leaning: Leaning) -> None:
    data, _, tensors, base = leaning
    for which, name in enumerate(("w", "f", "i")):
        good = Forged(data)
        record = good.records[good.chunks()[which]][1]
        places = [*range(24, 200), *range(200, len(record), len(record) // 60)]
        for at in places:
            f = Forged(data)
            changed = bytearray(record)
            changed[at] ^= 0xFF if at % 2 else 1 << at % 8
            f.records[f.chunks()[which]][1] = forge.reseal(bytes(changed))
            use(f.build(), {}, {name: tensors[name]}, base)


def test_a_delta_in_a_run_without_inputs_is_corrupt(leaning: Leaning, tmp_path: Path) -> None:
    data, _, tensors, base = leaning
    f = Forged(data)
    move_inputs(f, [0, 0, 0, 0])
    for cat in (f.index, *f.members()):
        names = cat.names
        for column in COLUMNS[1:]:
            cat.columns[column] = cat[column][:0]
        cat.names = names[:5]
    refuse(f.build(), tmp_path, CorruptError, base)
    assert use(f.build(), {}, {"alone": tensors["alone"]}, base) == []


# ---------------------------------------------------------------- names


BAD_NAMES = [
    "",
    "/etc/passwd",
    "..",
    "../x",
    "a/../../x",
    "a/..",
    ".",
    "./a",
    "a/.",
    "a//b",
    "/",
    "a/",
    "C:\\x",
    "C:/x",
    "c:x",
    "\\\\host\\x",
    "a\\b",
    "..\\x",
    "a\0b",
    "a\nb",
    "a\x1b[2J",
    "a\x7f",
    "CON",
    "con.txt",
    "a/NUL",
    "aux",
    "prn.x.y",
    "COM1",
    "lpt9.txt",
    "x.",
    "x ",
    "a./b",
    "a /b",
    "x.tzip-partial",
    "x.TZIP-Partial/y",
    "a/" * 64 + "b",
    "a<b",
    "a>b",
    'a"b',
    "a|b",
    "a?b",
    "a*b",
    "x:stream",
    "n" * 4097,
    "é" * 2049,
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda n: repr(n[:20]))
def test_bad_name(samples: dict[str, Sample], tmp_path: Path, name: str) -> None:
    f = Forged(samples["opaque"][0])
    f.rename(0, name.encode())
    refuse(f.build(), tmp_path, CorruptError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a", "a/b", "con_", "xcon", "com10", "...a", ".hidden", "a b", "é/日本", "n" * 200, "a.b.c"])
def test_good_name(samples: dict[str, Sample], tmp_path: Path, name: str) -> None:
    data, files, _ = samples["opaque"]
    f = Forged(data)
    f.rename(0, name.encode())
    tzip.unpack(f.build(), tmp_path / "out")
    assert (tmp_path / "out" / name).read_bytes() == files["text.bin"]


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("tree/none", "tree/none"),
        ("tree/NONE", "tree/none"),
        ("tree/ﬁx", "tree/fix"),
        ("tree/é", "tree/e\u0301"),
        ("tree/ß", "tree/SS"),
        ("tree/big/x", "tree/big"),
        ("tree/BIG/x/y", "tree/big"),
        ("tree/link/x", "tree/link"),
        ("Tree", "tree"),
    ],
)
def test_colliding_names(samples: dict[str, Sample], tmp_path: Path, one: str, two: str) -> None:
    data = samples["tree"][0]
    names = [n.decode() for n in Forged(data).index.names]
    f = Forged(data)
    last = names.index("tree/sub/a.txt")
    if two in names:
        f.rename(last, one.encode())
    else:
        f.rename(last, one.encode())
        f.rename(names.index("tree/none"), two.encode())
    refuse(f.build(), tmp_path, CorruptError)


BAD_LINKS = [
    "/etc/passwd",
    "../..",
    "../../x",
    "sub/../../..",
    "..\\x",
    "a\0b",
    "",
    "C:/x",
    "x\ny",
    "../../tree/none",
    "sub/../../../tree/none",
    "sub/../none",
    "..",
    "link/x",
    "x" * 4097,
]


@pytest.mark.parametrize("target", BAD_LINKS, ids=repr)
def test_bad_link(samples: dict[str, Sample], tmp_path: Path, target: str) -> None:
    data = relink(samples["tree"][0], target.encode())
    target_dir = tmp_path / "out"
    with pytest.raises(CorruptError):
        tzip.unpack(data, target_dir)
    assert not target_dir.exists()


def relink(data: bytes, target: bytes) -> bytes:
    f = Forged(data)
    link = f.index["m_kind"].tolist().index(2)
    cat = f.members()[link]
    extents = int(f.index["m_extents"][:link].sum())
    cat.inline = target
    for c, i, x in ((cat, 0, 0), (f.index, link, extents)):
        c.set("m_size", i, len(target))
        c.set("x_length", x, len(target))
        c.set("m_sha", i, hashlib.sha256(target).digest())
    return f.build()


def test_link_that_is_no_text(samples: dict[str, Sample], tmp_path: Path) -> None:
    refuse(relink(samples["tree"][0], b"\xff\xfe"), tmp_path, CorruptError)


@pytest.mark.skipif(os.name == "nt", reason="links need privileges on Windows")
def test_good_links_are_made(samples: dict[str, Sample], tmp_path: Path) -> None:
    for i, target in enumerate(("sub/a.txt", "./none", "../tree/big", "missing", ".//sub/./a.txt")):
        tzip.unpack(relink(samples["tree"][0], target.encode()), tmp_path / str(i))
        assert os.readlink(tmp_path / str(i) / "tree" / "link") == target


@pytest.mark.skipif(os.name == "nt", reason="links need privileges on Windows")
@pytest.mark.parametrize("force", [False, True])
def test_nothing_is_written_through_a_link_on_disk(samples: dict[str, Sample], tmp_path: Path, force: bool) -> None:
    data = samples["tree"][0]
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "none").write_bytes(b"mine")
    for n, (place, target) in enumerate((("tree", victim), ("tree/sub", victim), ("tree/none", victim / "none"))):
        out = tmp_path / f"out{n}"
        (out / place).parent.mkdir(parents=True)
        (out / place).symlink_to(target)
        if force and place == "tree/none":
            tzip.unpack(data, out, force=True)  # the link is replaced, not followed
            assert not (out / place).is_symlink()
        else:
            with pytest.raises(UsageError):
                tzip.unpack(data, out, force=force)
            assert [p for p in out.rglob("*") if not p.is_dir() and not p.is_symlink()] == []
        if place != "tree/none":  # without the folders, whose own members would meet the link
            with pytest.raises(UsageError):
                tzip.unpack(data, out, force=force, members=["tree/none", "tree/sub/a.txt"])
        assert sorted(os.listdir(victim)) == ["none"]
        assert (victim / "none").read_bytes() == b"mine"


@pytest.mark.skipif(os.name == "nt", reason="links need privileges on Windows")
def test_partial_file_that_is_a_link_is_not_followed(samples: dict[str, Sample], tmp_path: Path) -> None:
    data, files, _ = samples["opaque"]
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    tzip.unpack(data, tmp_path / "probe")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("text.bin.partial", ".text.bin.partial", ".text.bin.tzip-partial", "text.bin.tzip-partial"):
        (out / name).symlink_to(victim)
    try:
        tzip.unpack(data, out)
    except UsageError:
        assert not (out / "text.bin").exists()
    else:
        assert (out / "text.bin").read_bytes() == files["text.bin"]
    assert victim.read_bytes() == b"mine"


@pytest.mark.skipif(os.name == "nt", reason="links need privileges on Windows")
def test_recover_does_not_write_through_links(samples: dict[str, Sample], tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (tmp_path / "out" / "tree").mkdir(parents=True)
    (tmp_path / "out" / "tree" / "sub").symlink_to(victim)
    with contextlib.suppress(TzipError, OSError):
        tzip.recover(samples["tree"][0], tmp_path / "out")
    assert list(victim.iterdir()) == []


def test_tensors_of_no_archive_need_no_memory(tmp_path: Path) -> None:
    """A small archive may not make a reader allocate what it cannot hold: sizes come from chunks that exist."""
    data = tzip.encode(np.zeros(1 << 20, np.uint8))
    f = Forged(data)
    for elements in (1 << 40, 1 << 59):
        g = Forged(data)
        shape([elements])(g)
        g.set_both(0, "m_size", 0, elements)
        g.set_both(0, "x_length", 0, elements)
        g.set_both(0, "r_elements", 0, elements)
        for target in (tzip.decode, lambda d: tzip.open(d)[""]):
            with pytest.raises(CorruptError):
                target(g.build())
    assert tzip.decode(f.build()).tobytes() == bytes(1 << 20)


def test_bombs_in_catalogues_are_refused() -> None:
    """A zstandard frame that promises too much is refused before it is decompressed."""
    import zstandard

    data = tzip.encode(np.arange(9))
    offset = struct.unpack_from("<Q", data, len(data) - 80)[0]
    frame = zstandard.ZstdCompressor(level=3).compress(bytes(1 << 28))
    for raw_length in (1 << 28, (1 << 28) + 1, 0xFFFFFFFF):
        index = forge.place(forge.seal(forge.INDX, struct.pack("<II", raw_length, len(frame)) + frame), offset)
        with pytest.raises(CorruptError):
            tzip.open(data[:offset] + index + forge.footer(offset, index))
    frame = zstandard.ZstdCompressor(level=3).compress(bytes(60000))
    index = forge.place(forge.seal(forge.INDX, struct.pack("<II", 50000, len(frame)) + frame), offset)
    with pytest.raises(CorruptError):
        tzip.open(data[:offset] + index + forge.footer(offset, index))


def test_chunk_kind_is_needed(samples: dict[str, Sample], tmp_path: Path) -> None:
    f = Forged(samples["default"][0])
    i = f.chunks()[0]
    record = bytearray(f.records[i][1])
    assert bytes(record[:8]) == CHNK
    record[3:7] = b"memb"
    f.records[i][1] = bytes(record)
    refuse(f.build(), tmp_path, CorruptError)
