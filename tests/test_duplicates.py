"""Bytes that repeat are stored once: found in every kind of input, never found where a bit differs, and read by every way."""

import gzip
import hashlib
import io
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from forge import CHNK, Forged, noise, safetensors_bytes, seal, weights
from hypothesis import given
from hypothesis import strategies as st

import tzip
from tzip import duplicates, packing
from tzip.duplicates import Run
from tzip.formats.layout import CHUNK_ELEMENTS, Block, ChunkHead, TransformHead
from tzip.formats.reader import MAX_EXPANSION
from tzip.inspecting import describe
from tzip.tree import collect

N = 70_000
Tensors = list[tuple[str, str, list[int], bytes]]


def pack_bytes(data: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    tzip.pack(data, out, name=options.pop("name", "m.safetensors"), **options)
    return out.getvalue()


def file_of(*raws: bytes, dtype: str = "BF16") -> bytes:
    size = {"BF16": 2, "F16": 2, "I16": 2, "U16": 2, "F32": 4, "U8": 1}[dtype]
    return safetensors_bytes([(f"t{i}", dtype, [len(raw) // size], raw) for i, raw in enumerate(raws)])


def pack_bytes_of(root: Path) -> bytes:
    out = io.BytesIO()
    tzip.pack(root, out)
    return out.getvalue()


def member(archive: Any, name: str) -> bytes:
    with tzip.open(archive) as opened:
        return opened.member_bytes(name)


def runs_of(archive: Any) -> int:
    with tzip.open(archive) as opened:
        return int(opened.reader.index["r_width"].size)


def folder(tmp_path: Path, **files: bytes) -> Path:
    root = tmp_path / "in"
    root.mkdir()
    for name, data in files.items():
        (root / name.replace("_", ".")).write_bytes(data)
    return root


def check(archive: Path, root: Path, tmp_path: Path) -> None:
    """Every way of reading gives what went in."""
    out = tmp_path / f"out-{archive.name}"
    tzip.unpack(archive, out, threads=2)
    tzip.verify(archive, deep=True)
    tzip.recover(archive, out / "rec")
    names = sorted(p.relative_to(root.parent).as_posix() for p in root.rglob("*") if p.is_file())
    with tzip.open(archive) as opened:
        for name in names:
            data = (root.parent / name).read_bytes()
            assert (out / name).read_bytes() == data
            assert (out / "rec" / name).read_bytes() == data
            assert opened.member_bytes(name) == data
            sink = io.BytesIO()
            tzip.unpack(archive, sink, members=[name])
            assert sink.getvalue() == data


# ---------------------------------------------------------------- what is found


@pytest.mark.parametrize("level", ["fast", "default", "best"])
def test_tied_tensors_of_one_file(level: str) -> None:
    a, b = weights(N, 1), weights(N, 2)
    once = pack_bytes(file_of(a, b), level=level)
    data = file_of(a, b, a, a)
    archive = pack_bytes(data, level=level)
    assert runs_of(archive) == 2
    assert len(archive) - len(once) < 200  # two copies
    assert member(archive, "m.safetensors") == data
    with tzip.open(archive) as opened:
        assert opened.tensor("t3").raw().tobytes() == a
        assert opened.tensor("t2").raw(threads=2).tobytes() == a
        assert opened["t2"][100:200].tobytes() == a[200:400]


def test_tied_tensors_of_several_chunks() -> None:
    raw = weights(CHUNK_ELEMENTS * 2 + 5, 3)
    data = file_of(raw, weights(N), raw)
    archive = pack_bytes(data, threads=2)
    assert runs_of(archive) == 2
    assert len(archive) - len(pack_bytes(file_of(raw, weights(N)))) < 100
    sink = io.BytesIO()
    tzip.unpack(archive, sink)
    assert sink.getvalue() == data
    with tzip.open(archive) as opened:
        at = CHUNK_ELEMENTS - 3
        assert opened["t2"][at : at + 7].tobytes() == raw[2 * at : 2 * at + 14]


def test_copies_across_the_files_of_a_folder(tmp_path: Path) -> None:
    a, b, c = (weights(N, i) for i in range(3))
    small = [("norm", "BF16", [500], weights(500, 7)), ("x", "F32", [9], weights(9, 8, "F32"))]
    model = safetensors_bytes([("a", "BF16", [N], a), ("b", "BF16", [N], b), *small])
    root = folder(tmp_path, m_safetensors=model, n_safetensors=file_of(c, b), o_bin=noise(9999), p_bin=noise(9999))
    tzip.pack(root, tmp_path / "1.tzip")
    assert runs_of(tmp_path / "1.tzip") == 2 + 2 + 1 + 1
    check(tmp_path / "1.tzip", root, tmp_path)
    before = (tmp_path / "1.tzip").stat().st_size
    (root / "z.safetensors").write_bytes(model)  # all of it, its bundles too
    (root / "z.bin").write_bytes(noise(9999))
    tzip.pack(root, tmp_path / "2.tzip")
    assert runs_of(tmp_path / "2.tzip") == 6
    assert (tmp_path / "2.tzip").stat().st_size - before < 1000
    check(tmp_path / "2.tzip", root, tmp_path)
    for threads in (1, 2, 3):
        tzip.pack(root, tmp_path / "3.tzip", threads=threads, force=True)
        assert (tmp_path / "3.tzip").read_bytes() == (tmp_path / "2.tzip").read_bytes()


def test_a_second_copy_costs_less_than_100_bytes_of_chunks_and_tables(tmp_path: Path) -> None:
    raw = weights(1 << 20)
    sizes = []
    for copies in (1, 2, 3):
        data = file_of(*[raw] * copies)
        sizes.append(len(pack_bytes(data)))
    assert sizes[1] - sizes[0] < 100
    assert sizes[2] - sizes[1] < 100


def test_opaque_twins(tmp_path: Path) -> None:
    data = noise(300_001, 5)
    root = folder(tmp_path, a_bin=data, b_bin=data, c_bin=data[:-1], d_bin=data[:-9], e_bin=b"x" + data)
    tzip.pack(root, tmp_path / "a.tzip")
    assert runs_of(tmp_path / "a.tzip") == 3  # a, b and c have the same whole elements
    check(tmp_path / "a.tzip", root, tmp_path)
    for path in root.iterdir():
        os.utime(path, ns=(10**18, 10**18))
    tzip.pack(root, tmp_path / "b.tzip", sha256=False, force=True)
    assert runs_of(tmp_path / "b.tzip") == 3
    check(tmp_path / "b.tzip", root, tmp_path)


def test_values_do_not_count_bits_do() -> None:
    nan = np.full(N, np.nan, "<f4").tobytes()
    other = np.full(N, 0x7FC00001, "<u4").tobytes()
    zero, minus = np.zeros(N, "<f4").tobytes(), np.full(N, -0.0, "<f4").tobytes()
    data = file_of(nan, other, nan, zero, minus, zero, other, dtype="F32")
    archive = pack_bytes(data)
    assert runs_of(archive) == 4
    assert member(archive, "m.safetensors") == data


def test_dtypes_of_one_coding_share_others_do_not() -> None:
    raw = weights(N)
    dtypes = ("BF16", "F16", "I16", "U16", "U8")
    data = safetensors_bytes([(d, d, [len(raw) // (1 if d == "U8" else 2)], raw) for d in dtypes])
    archive = pack_bytes(data)
    assert runs_of(archive) == 4  # I16 and U16
    with tzip.open(archive) as opened:
        for name in opened:
            assert opened.tensor(name).raw().tobytes() == raw
            assert opened.tensor(name).element_type.name == name


@pytest.mark.parametrize("at", [0, 1, N // 2, N - 1, N, 2 * N - 1, 12345, 4200])
def test_one_bit_makes_a_difference(at: int) -> None:
    raw = weights(N)
    other = bytearray(raw)
    other[at] ^= 1
    data = file_of(raw, bytes(other), raw, bytes(other))
    archive = pack_bytes(data)
    assert runs_of(archive) == 2
    assert member(archive, "m.safetensors") == data


@given(st.data())
def test_whatever_repeats_comes_back(data: st.DataObject) -> None:
    pool = [weights(N, i) for i in range(2)]
    raws = []
    for which, at in data.draw(st.lists(st.tuples(st.integers(0, 1), st.integers(-3, 2 * N - 1)), max_size=7)):
        raw = bytearray(pool[which])
        if at >= 0:
            raw[at] ^= 64
        raws.append(bytes(raw))
    small = data.draw(st.lists(st.integers(1, 3), max_size=4))
    tensors = [(f"t{i}", "BF16", [N], raw) for i, raw in enumerate(raws)]
    tensors += [(f"s{i}", "BF16", [3000], weights(3000, seed)) for i, seed in enumerate(small)]
    tensors = data.draw(st.permutations(tensors))
    member = safetensors_bytes(tensors)
    archive = pack_bytes(member)
    with tzip.open(archive) as opened:
        assert opened.member_bytes("m.safetensors") == member
        assert opened.reader.index["r_width"].size == len(set(raws)) + bool(small)


# ---------------------------------------------------------------- sources


def test_pipes_buffers_and_files_give_the_same_archive(tmp_path: Path) -> None:
    data = file_of(weights(N), weights(N, 1), weights(N))
    whole = pack_bytes(data)
    assert runs_of(whole) == 2
    assert pack_bytes(io.BytesIO(data)) == whole
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    with path.open("rb") as f:
        assert pack_bytes(f) == whole
    command = [sys.executable, "-m", "tzip.cli", "pack", "-", "--name", "m.safetensors"]
    assert subprocess.run(command, input=data, capture_output=True, check=True).stdout == whole
    tzip.pack(path, tmp_path / "a.tzip")
    assert runs_of(tmp_path / "a.tzip") == 2


def test_files_that_seek_badly_are_read_once() -> None:
    data = file_of(weights(N), weights(N))
    with gzip.open(io.BytesIO(gzip.compress(data, 1))) as f:
        archive = pack_bytes(f)
    assert runs_of(archive) == 2
    assert member(archive, "m.safetensors") == data


def test_nothing_is_read_for_runs_without_a_partner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampled: list[int] = []
    original = duplicates._samples

    def counted(run: Run, source: Any, places: Any) -> bytes | None:
        sampled.append(len(places))
        return original(run, source, places)

    monkeypatch.setattr(duplicates, "_samples", counted)
    monkeypatch.setattr(duplicates.Duplicates, "_equal", lambda *a: pytest.fail("compared"))
    pack_bytes(file_of(weights(N), weights(N + 1), weights(N + 2)))
    assert sampled == []
    pack_bytes(file_of(weights(N), weights(N, 1), weights(N, 2)))
    assert sampled == [1, 1, 1]


def test_tensors_that_differ_in_a_few_elements_are_not_compared_each_with_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates.Duplicates, "_equal", lambda *a: pytest.fail("compared"))
    raws = []
    for i in range(30):
        raw = bytearray(2 * N)
        raw[4222 + i] = 1
        raws.append(bytes(raw))
    assert runs_of(pack_bytes(file_of(*raws))) == 30


# ---------------------------------------------------------------- changes while packing


def packed_with(items: list[Any], tmp_path: Path) -> Path:
    target = tmp_path / "changed.tzip"
    packing.pack_items(items, target, packing.Options(threads=1), force=True)
    return target


def test_an_earlier_file_that_changed_is_not_trusted(tmp_path: Path) -> None:
    """It has the second file's bytes by now, and neither its size nor its time tells: the archive holds other bytes."""
    old, new = file_of(weights(N)), file_of(weights(N, 1))
    root = folder(tmp_path, a_bin=old, b_bin=new)
    items = collect([root], None)
    status = (root / "a.bin").stat()

    def change() -> Any:
        (root / "a.bin").write_bytes(new)
        os.utime(root / "a.bin", ns=(status.st_atime_ns, status.st_mtime_ns))
        return packing.open_source(root / "b.bin")

    items = [packing.replace(i, open=change) if i.name.endswith("b.bin") else i for i in items]
    target = packed_with(items, tmp_path)
    assert runs_of(target) == 2
    out = tmp_path / "out"
    tzip.unpack(target, out)
    assert (out / "in" / "a.bin").read_bytes() == old
    assert (out / "in" / "b.bin").read_bytes() == new


@pytest.mark.parametrize("how", ["gone", "shorter", "other file", "time"])
def test_an_earlier_file_that_is_gone_is_not_shared(tmp_path: Path, how: str) -> None:
    data = file_of(weights(N))
    root = folder(tmp_path, a_bin=data, b_bin=data)

    def change() -> Any:
        path = root / "a.bin"
        if how == "time":
            os.utime(path, ns=(1, 1))
        elif how == "shorter":
            path.write_bytes(data[:100])
        else:
            path.unlink()
        if how == "other file":
            path.mkdir()
        return packing.open_source(root / "b.bin")

    items = [packing.replace(i, open=change) if i.name.endswith("b.bin") else i for i in collect([root], None)]
    target = packed_with(items, tmp_path)
    assert runs_of(target) == 2
    assert member(target, "in/b.bin") == data


@pytest.mark.parametrize("sha256", [False, True])
@pytest.mark.parametrize("within", [False, True])
def test_a_file_that_changes_after_the_comparison_is_refused(tmp_path: Path, within: bool, sha256: bool) -> None:
    """Even when its size and time stay: the sums of the archived chunks tell."""
    raw = weights(N)
    data = file_of(raw, raw) if within else file_of(raw)
    root = folder(tmp_path, a_bin=file_of(raw), b_bin=data)
    stamp = (root / "b.bin").stat().st_mtime_ns

    def share(*args: Any) -> None:
        original(*args)
        if args[0] and args[1] and within == (len(args[1]) > 1):
            changed = bytearray(data)
            changed[-7] ^= 4
            (root / "b.bin").write_bytes(bytes(changed))
            os.utime(root / "b.bin", ns=(stamp, stamp))

    original = packing.share
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "share", share)
        with pytest.raises(tzip.ChangedError):
            packing.pack_items(
                collect([root], None), tmp_path / "x.tzip", packing.Options(threads=2, sha256=sha256), force=True
            )
    assert not (tmp_path / "x.tzip").exists()


# ---------------------------------------------------------------- resume


def test_resume_anywhere(tmp_path: Path) -> None:
    a, b = weights(N, 1), weights(N, 2)
    one, other = file_of(a, b, a), file_of(b, weights(N, 3))
    root = folder(tmp_path, a_safetensors=one, b_safetensors=one, c_safetensors=other)
    tzip.pack(root, tmp_path / "a.tzip")
    whole = (tmp_path / "a.tzip").read_bytes()
    assert runs_of(whole) == 3
    rng = np.random.default_rng(0)
    for cut in [*rng.integers(0, len(whole), 20).tolist(), len(whole) - 1, len(whole)]:
        (tmp_path / "b.tzip.tzip-partial").write_bytes(whole[:cut])
        tzip.pack(root, tmp_path / "b.tzip", resume=True, threads=1 + cut % 2)
        assert (tmp_path / "b.tzip").read_bytes() == whole
        (tmp_path / "b.tzip").unlink()


# ---------------------------------------------------------------- limits


def test_at_most_16_runs_are_live(tmp_path: Path) -> None:
    raws = [weights(N, i) for i in range(20)]
    data = file_of(*raws, *raws)
    archive = pack_bytes(data, level="fast")
    assert runs_of(archive) == 40 - 16
    assert member(archive, "m.safetensors") == data
    nested = file_of(*(r for raw in raws for r in (raw, raw)))
    assert runs_of(pack_bytes(nested, level="fast")) == 20
    root = folder(tmp_path, a_safetensors=file_of(*raws), b_safetensors=file_of(*raws))
    tzip.pack(root, tmp_path / "a.tzip", level="fast")
    assert runs_of(tmp_path / "a.tzip") == 20  # in another member each is used once
    check(tmp_path / "a.tzip", root, tmp_path)


def test_an_archive_never_holds_more_than_its_length_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert duplicates.MAX_EXPANSION == MAX_EXPANSION
    data = noise(100_000)
    root = folder(tmp_path, **{f"f{i}_bin": data for i in range(6)})
    for limit, runs in ((7, 1), (3, 2), (2, 3), (1, 6)):
        monkeypatch.setattr(duplicates, "MAX_EXPANSION", limit)
        tzip.pack(root, tmp_path / "a.tzip", force=True)
        assert runs_of(tmp_path / "a.tzip") == runs
        assert 6 * len(data) <= limit * (tmp_path / "a.tzip").stat().st_size
    monkeypatch.undo()
    zeros = bytes(64 << 20)
    for path in root.iterdir():
        path.write_bytes(zeros)
    tzip.pack(root, tmp_path / "z.tzip", level="fast")
    assert tzip.verify(tmp_path / "z.tzip").members == 7


def test_what_a_run_costs_at_least() -> None:
    """Its records are never smaller: constants, which cost least of all."""
    for n, dtype in ((1, "U8"), (CHUNK_ELEMENTS, "U8"), (CHUNK_ELEMENTS + 1, "BF16"), (1 << 17, "F32"), (300_000, "F32")):
        size = {"U8": 1, "BF16": 2, "F32": 4}[dtype]
        run = Run(size, "")
        run.add(0, n * size)
        with tzip.open(pack_bytes(file_of(bytes(n * size), dtype=dtype), level="best")) as opened:
            assert run.least <= int(opened.reader.index["c_length"].sum())


# ---------------------------------------------------------------- reading


def test_the_second_member_alone(tmp_path: Path) -> None:
    raw = weights(N)
    root = folder(tmp_path, a_safetensors=file_of(raw), b_safetensors=file_of(weights(N, 1), raw))
    tzip.pack(root, tmp_path / "a.tzip")
    assert runs_of(tmp_path / "a.tzip") == 2
    tzip.unpack(tmp_path / "a.tzip", tmp_path / "out", members=["in/b.safetensors"])
    assert (tmp_path / "out/in/b.safetensors").read_bytes() == (root / "b.safetensors").read_bytes()
    command = [sys.executable, "-m", "tzip.cli", "cat", str(tmp_path / "a.tzip"), "t1", "--raw", "-o", "-"]
    assert subprocess.run(command, capture_output=True, check=True).stdout == raw
    command = [sys.executable, "-m", "tzip.cli", "unpack", str(tmp_path / "a.tzip"), "in/b.safetensors", "-o", "-"]
    assert subprocess.run(command, capture_output=True, check=True).stdout == (root / "b.safetensors").read_bytes()


def test_the_text_of_the_format_is_kept(tmp_path: Path) -> None:
    """By the decoder that was written from the text, with its index and as from a pipe."""
    one = safetensors_bytes([("a", "U8", [N], noise(N)), ("b", "U8", [N], noise(N)), ("c", "F32", [9], weights(9, 8, "F32"))])
    root = folder(tmp_path, a_safetensors=one, b_safetensors=one, c_bin=noise(9999), d_bin=noise(9999)[:-4])
    archive = pack_bytes_of(root)
    assert runs_of(archive) == 3
    opened = reference.Archive(archive)
    files = {name: data for name, data in reference.sequential(archive) if name != "in"}
    for i, found in enumerate(opened.members):
        if found.name != "in":
            data = (tmp_path / found.name).read_bytes()
            assert opened.member_bytes(i) == data
            assert files[found.name] == data


def test_damage_of_a_shared_chunk_is_told_of_every_member(tmp_path: Path) -> None:
    raw = weights(N)
    root = folder(
        tmp_path, a_safetensors=file_of(raw), b_safetensors=file_of(raw), c_safetensors=file_of(raw, weights(N, 1)), d_bin=b"d"
    )
    tzip.pack(root, tmp_path / "a.tzip")
    data = bytearray((tmp_path / "a.tzip").read_bytes())
    with tzip.open(tmp_path / "a.tzip") as opened:
        offset, length = opened.reader.chunk_at(0, 0)
    data[offset + length // 2] ^= 1
    (tmp_path / "a.tzip").write_bytes(bytes(data))
    with pytest.raises(tzip.CorruptError):
        tzip.verify(tmp_path / "a.tzip")
    report = tzip.recover(tmp_path / "a.tzip", tmp_path / "out")
    assert report.whole == ["in", "in/d.bin"]
    assert report.tensors == {"in/c.safetensors": ["t1"]}
    for name in "abc":
        assert any(line.startswith(f"in/{name}.safetensors") for line in report.lost), report.lost


def test_without_the_index_members_that_share_are_told_of(tmp_path: Path) -> None:
    raw = weights(N)
    root = folder(tmp_path, a_safetensors=file_of(raw), b_safetensors=file_of(raw), c_safetensors=file_of(raw, weights(N, 1)))
    tzip.pack(root, tmp_path / "a.tzip")
    with tzip.open(tmp_path / "a.tzip") as opened:
        record = int(opened.reader.index["m_record"][1])
    (tmp_path / "a.tzip").write_bytes((tmp_path / "a.tzip").read_bytes()[:-90])
    report = tzip.recover(tmp_path / "a.tzip", tmp_path / "out")
    assert not report.index_found
    assert report.whole == ["in", *(f"in/{n}.safetensors" for n in "abc")]
    assert not report.lost
    for name in report.whole[1:]:
        assert (tmp_path / "out" / name).read_bytes() == (root.parent / name).read_bytes()
    # When the record of the member that has the run is lost, too, those that share it cannot be read, and it is said so.
    data = bytearray((tmp_path / "a.tzip").read_bytes())
    data[record + 40] ^= 1
    (tmp_path / "a.tzip").write_bytes(bytes(data))
    report = tzip.recover(tmp_path / "a.tzip", tmp_path / "out2")
    assert report.whole == ["in"]
    assert report.tensors == {"in/c.safetensors": ["t1"]}
    assert any("in/b.safetensors" in line for line in report.lost)


@pytest.mark.parametrize("level", ["fast", "best"])
def test_repack_keeps_what_is_shared(tmp_path: Path, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = weights(CHUNK_ELEMENTS + 7, 1), weights(N, 2)
    small = [("norm", "BF16", [5000], weights(5000, 7))]
    one = safetensors_bytes([("a", "BF16", [len(a) // 2], a), ("b", "BF16", [N], b), ("c", "BF16", [N], b), *small])
    root = folder(tmp_path, a_safetensors=one, b_safetensors=one, c_bin=noise(50_000), d_bin=noise(50_000))
    tzip.pack(root, tmp_path / "a.tzip")
    assert runs_of(tmp_path / "a.tzip") == 4
    with monkeypatch.context() as patch:  # as a writer does that does not share
        patch.setattr(duplicates.Duplicates, "find", lambda *a: {})
        tzip.pack(root, tmp_path / "b.tzip")
    assert runs_of(tmp_path / "b.tzip") == 10
    for name in ("a.tzip", "b.tzip"):
        tzip.repack(tmp_path / name, tmp_path / f"new-{name}", level=level)
        assert runs_of(tmp_path / f"new-{name}") == 4
        check(tmp_path / f"new-{name}", root, tmp_path)
    assert (tmp_path / "new-a.tzip").read_bytes() == (tmp_path / "new-b.tzip").read_bytes()


# ---------------------------------------------------------------- what `info` says


def test_info_tells_what_is_shared_and_which_structure_was_found(tmp_path: Path) -> None:
    raw = weights(N)
    data = describe(pack_bytes(file_of(raw, weights(N, 1), raw)))
    assert data["shared_bytes"] == 2 * N
    assert sum(row["chunks"] for row in data["transforms"]) == 2
    assert sum(row["bytes"] for row in data["transforms"]) == 4 * N
    assert describe(pack_bytes(file_of(raw)))["shared_bytes"] == 0


@pytest.mark.parametrize(
    ("transform", "split", "name", "blocks"),
    [
        (3, 2, "sparse", {("sparse", 0, "zstd"): 7, ("bf16", 0, "raw"): 16, ("bf16", 1, "raw"): 32}),
        (3, 9, "sparse", {("sparse", 0, "zstd"): 7}),
        (13, 2, "transform 13", {}),
    ],
)
def test_info_reads_the_head_of_a_transform(
    tmp_path: Path, transform: int, split: int, name: str, blocks: dict[tuple[str, int, str], int]
) -> None:
    forged = Forged(pack_bytes(file_of(weights(N))))
    place = forged.chunks()[0]
    head = ChunkHead(0, 0, 0, N, split, 2, transform, 0, 0)
    inner = TransformHead(100_000, 2, size_a=9)
    entries = [Block(2, stored=7), Block(0), Block(0, 2, stored=16), Block(0, 2, stored=32)]
    body = head.write()[8:] + inner.write() + b"".join(e.write() for e in entries) + bytes(160)
    forged.records[place][1] = seal(CHNK, body)
    found = describe(forged.build())
    assert {(r["split"], r["plane"], r["codec"]): r["stored"] for r in found["blocks"]} == blocks
    length = len(forged.records[place][1])
    assert found["transforms"] == [{"transform": name, "chunks": 1, "bytes": 2 * N, "stored": length}]
    path = tmp_path / "a.tzip"
    path.write_bytes(forged.build())
    done = subprocess.run([sys.executable, "-m", "tzip.cli", "info", str(path)], capture_output=True, text=True, check=True)
    assert f"{name:24} {1:>8,}" in done.stdout


# ---------------------------------------------------------------- rows


def test_coders_are_told_rows_and_places(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = packing.encode_chunk

    def watched(raw: Any, width: int, coding: str, level: Any, run: int, chunk: int, *rest: Any) -> Any:
        row, first, base, *_ = rest
        assert base is None
        seen.append((run, chunk, row, first))
        return original(raw, width, coding, level, run, chunk, *rest)

    monkeypatch.setattr(packing, "encode_chunk", watched)
    n = CHUNK_ELEMENTS + 4
    tensors: Tensors = [
        ("matrix", "BF16", [4, n // 4], weights(n)),
        ("vector", "BF16", [N], weights(N)),
        ("small", "BF16", [4, 5], weights(20)),
        ("cube", "F32", [2, 350, 100], weights(N, 1, "F32")),
        ("complex", "C64", [700, 100], weights(2 * N, 2, "F32")),
        ("nibbles", "F4", [3, 2 * N], noise(3 * N)),
        ("odd", "F4", [4, 50_001], noise(100_002)),
    ]
    pack_bytes(safetensors_bytes(tensors))
    rows = [n // 4, n // 4, 0, 0, 100, 200, N, 0]
    places = [(0, 0, 0), (0, 1, CHUNK_ELEMENTS), *((i, 0, 0) for i in range(1, 7))]
    expected = [(run, chunk, row, first) for (run, chunk, first), row in zip(places, rows, strict=True)]
    assert sorted(seen) == expected


def test_hashes_are_those_of_the_files(tmp_path: Path) -> None:
    data = file_of(weights(N), weights(N))
    root = folder(tmp_path, a_bin=data, b_bin=data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = tzip.pack(root, tmp_path / "a.tzip")
    for member in report.members[1:]:
        assert member.sha256 == hashlib.sha256(data).hexdigest()
