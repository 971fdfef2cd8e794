"""The promise of the archiver: what comes out is what went in, bit for bit, from every kind of source to every target."""

import contextlib
import hashlib
import io
import json
import os
import stat
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forge
import ml_dtypes
import numpy as np
import pytest
import safetensors
from forge import BITS, noise, safetensors_bytes, weights
from hypothesis import given
from hypothesis import strategies as st

import tzip
from tzip.formats.layout import CHUNK_ELEMENTS

LEVELS = ("fast", "default", "best")
links = pytest.mark.skipif(os.name == "nt", reason="links need privileges on Windows")
DAY = 86_400 * 10**9


def digest(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def tree_of(root: Path) -> dict[str, tuple[Any, ...]]:
    """Everything about a folder that an archive keeps."""
    out = {}
    for path in [root, *sorted(root.rglob("*"))]:
        status = path.lstat()
        name = path.relative_to(root).as_posix()
        mode, mtime = stat.S_IMODE(status.st_mode), status.st_mtime_ns
        if path.is_symlink():
            out[name] = ("link", os.readlink(path), mtime)
        elif path.is_dir():
            out[name] = ("folder", mode, mtime)
        else:
            out[name] = ("file", mode, mtime, path.read_bytes())
    return out


def pack_bytes(data: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    tzip.pack(data, out, name=options.pop("name", "data"), **options)
    return out.getvalue()


def unpack_bytes(archive: bytes) -> bytes:
    out = io.BytesIO()
    tzip.unpack(archive, out)
    return out.getvalue()


def tensor_of(dtype: str, n: int, seed: int) -> bytes:
    """Return n elements of a dtype: of floats some look like weights, with NaN payloads, infinities and -0 among them."""
    if dtype in ("BF16", "F16", "F32", "F64"):
        raw = bytearray(weights(n, seed, dtype))
        size = BITS[dtype] // 8
        for i, special in enumerate((b"\xff" * size, b"\x7f" * size, b"\0" * (size - 1) + b"\x80", b"\1" + bytes(size - 1))):
            if n > 8 * i:
                raw[8 * i * size : (8 * i + 1) * size] = special
        return bytes(raw)
    return noise(-(-n * BITS[dtype] // 8), seed)


# ---------------------------------------------------------------- safetensors files


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", BITS)
def test_every_dtype(tmp_path: Path, dtype: str, level: str) -> None:
    shapes = ((), (0,), (3, 0, 5), (1,), (7,), (255, 3), (70001,), (1, 1, 8))
    tensors = []
    for i, shape in enumerate(shapes):
        n = int(np.prod(shape, dtype=np.int64))
        if n * BITS[dtype] % 8:
            shape, n = (*shape, 4), n * 4
        tensors.append((f"t{i}", dtype, shape, tensor_of(dtype, n, i)))
    path = tmp_path / "m.safetensors"
    path.write_bytes(safetensors_bytes(tensors))
    with contextlib.suppress(TypeError), safetensors.safe_open(path, "np") as f:  # type: ignore[attr-defined]
        assert set(f.keys()) == {t[0] for t in tensors}
    tzip.pack(path, level=level)
    tzip.unpack(tmp_path / "m.safetensors.tzip", tmp_path / "out")
    assert digest(tmp_path / "out" / "m.safetensors") == digest(path)
    with tzip.open(tmp_path / "m.safetensors.tzip") as archive:
        for name, _, shape, raw in tensors:
            view = archive.tensor(name)
            assert view.shape == tuple(shape)
            assert view.raw().tobytes() == raw
            assert view.nbytes == len(raw)
            if not dtype.startswith("F6"):
                assert archive[name].shape == tuple(shape)
                if dtype != "F4":
                    assert archive[name].tobytes() == raw
        infos = archive.tensors()
    assert [(t.name, t.dtype, t.shape, t.nbytes) for t in infos] == [(n, d, tuple(s), len(r)) for n, d, s, r in tensors]


def header_file(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def test_headers_survive_verbatim(tmp_path: Path) -> None:
    entry = '{"dtype":"U8","shape":[2],"data_offsets":[%d,%d]}'
    headers = {
        "order": f'{{"z":{entry % (0, 2)},"a":{entry % (2, 4)}}}',
        "data in another order": f'{{"z":{entry % (2, 4)},"a":{entry % (0, 2)}}}',
        "duplicate keys": f'{{"a":{entry % (9, 11)},"b":{entry % (2, 4)},"a":{entry % (0, 2)}}}',
        "spaces": f'{{ "a" :\t{entry % (0, 2)} ,\n "b":{entry % (2, 4)} }}' + " " * 77,
        "metadata": f'{{"__metadata__":{{"x":"é\\u0000\\ud83d\\ude00"}},"a":{entry % (0, 2)},"b":{entry % (2, 4)}}}',
        "metadata last": f'{{"a":{entry % (0, 2)},"b":{entry % (2, 4)},"__metadata__":{{}}}}',
        "unicode": f'{{"é日本\\u0041":{entry % (0, 2)},"":{entry % (2, 4)}}}',
        "fields in another order": '{"a":{"data_offsets":[0,4],"shape":[2,2],"dtype":"U8"}}',
        "extra fields": '{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4],"more":{"x":[1.5e3]}}}',
    }
    for what, text in headers.items():
        data = header_file(text.encode(), b"wxyz")
        archive = pack_bytes(data, name="m.safetensors")
        assert unpack_bytes(archive) == data, what
        with tzip.open(archive) as opened:
            assert opened.members()[0].sha256 == hashlib.sha256(data).hexdigest()
            for name, raw in (("a", None), ("z", b"wx")):
                if name in opened and what == "order":
                    assert opened.tensor(name).raw().tobytes() == (raw or b"yz")
            if what == "data in another order":
                assert (opened["a"].tobytes(), opened["z"].tobytes()) == (b"wx", b"yz")
            if what == "duplicate keys":
                assert opened["a"].tobytes() == b"wx"


BROKEN = {
    "no header": b"abc",
    "empty": b"",
    "header longer than the file": header_file(b"{}")[:9],
    "huge header": (1 << 62).to_bytes(8, "little") + b"{}",
    "no JSON": header_file(b"{abc}"),
    "JSON but a list": header_file(b"[]"),
    "NaN": header_file(b'{"a":NaN}'),
    "deep": header_file(b'{"a":' + b"[" * 100000 + b"]" * 100000 + b"}"),
    "long number": header_file(b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}', b"x"),
    "gap": header_file(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}', b"xy"),
    "overlap": header_file(
        b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}', b"xyz"
    ),
    "trailing bytes": header_file(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"xy"),
    "short": header_file(b'{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}', b"xy"),
    "wrong size": header_file(b'{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,2]}}', b"xy"),
    "negative": header_file(b'{"a":{"dtype":"U8","shape":[-2],"data_offsets":[0,2]}}', b"xy"),
    "float": header_file(b'{"a":{"dtype":"U8","shape":[2.0],"data_offsets":[0,2]}}', b"xy"),
    "true": header_file(b'{"a":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}}', b"x"),
    "shape overflow": header_file(b'{"a":{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]}}'),
    "null": header_file(b'{"a":null}'),
    "missing field": header_file(b'{"a":{"dtype":"U8","shape":[1]}}', b"x"),
    "metadata of numbers": header_file(b'{"__metadata__":{"a":1}}'),
    "bad UTF-8": header_file(b'{"\xff":1}'),
    "surrogate": header_file(b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
    "half a byte": header_file(b'{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,2]}}', b"xy"),
    "cut file": safetensors_bytes([("a", "F32", [5000], weights(5000, 1, "F32"))])[:-7],
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_safetensors_are_packed_as_bytes(tmp_path: Path, what: str) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(BROKEN[what])
    with pytest.raises(tzip.UsageError) as caught:
        tzip.pack(path, strict=True)
    assert "safetensors" in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["m.safetensors"]
    with pytest.warns(UserWarning, match="no valid safetensors file") as found:
        report = tzip.pack(path)
    assert len(found) == 1
    assert len(report.warnings) == 1
    tzip.unpack(tmp_path / "m.safetensors.tzip", tmp_path / "out")
    assert (tmp_path / "out" / "m.safetensors").read_bytes() == BROKEN[what]
    with tzip.open(tmp_path / "m.safetensors.tzip") as archive:
        assert list(archive) == []


def test_other_names_are_recognised_by_their_bytes_and_never_warn(tmp_path: Path) -> None:
    good = safetensors_bytes([("a", "F32", [3], weights(3, 0, "F32"))])
    (tmp_path / "blob").write_bytes(good)
    (tmp_path / "other").write_bytes(BROKEN["gap"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tzip.pack([tmp_path / "blob", tmp_path / "other"], tmp_path / "a.tzip", strict=True)
    with tzip.open(tmp_path / "a.tzip") as archive:
        assert list(archive) == ["a"]


@pytest.mark.parametrize("dtype", ["F5_E3M1", "U128", "C128", "", "opaque", "é"])
def test_dtypes_of_the_future(tmp_path: Path, dtype: str) -> None:
    raw = noise(70_001, 1)
    data = safetensors_bytes([("a", dtype, [3, 7], raw), ("b", "I8", [5], b"12345"), ("c", dtype, [], b"")])
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tzip.pack(path)
    with tzip.open(tmp_path / "m.safetensors.tzip") as archive:
        assert archive.member_bytes("m.safetensors") == data
        assert archive["b"].tobytes() == b"12345"
        assert archive.tensor("a").raw().tobytes() == raw
        with pytest.raises(tzip.UnsupportedError):
            archive["a"]


@st.composite
def st_files(draw: st.DrawFn) -> bytes:
    tensors = []
    for i in range(draw(st.integers(0, 6))):
        dtype = draw(st.sampled_from(list(BITS)))
        shape = draw(st.lists(st.integers(0, 40), max_size=3))
        n = int(np.prod(shape, dtype=np.int64))
        if n * BITS[dtype] % 8:
            shape, n = [*shape, 4], n * 4
        kind = draw(st.sampled_from(["normal", "zero", "noise", "few"]))
        size = n * BITS[dtype] // 8
        raw = {
            "normal": lambda d=dtype, m=n, s=i: tensor_of(d, m, s),
            "zero": lambda z=size: bytes(z),
            "noise": lambda z=size, s=i: noise(z, s),
            "few": lambda z=size, s=i: bytes(np.random.default_rng(s).choice([0, 60, 61], z).astype("u1")),
        }[kind]()
        tensors.append((f"{draw(st.text(max_size=4))}{i}", dtype, shape, raw))
    metadata = draw(st.none() | st.dictionaries(st.text(max_size=3), st.text(max_size=5), max_size=2))
    return safetensors_bytes(tensors, metadata, draw(st.sampled_from([None, 1])), draw(st.integers(0, 9)))


def bound(size: int, names: int, members: int, tensors: int) -> float:
    return size * 1.001 + names + 256 * members + 64 * tensors + 4096


@given(st_files(), st.sampled_from(LEVELS))
def test_any_safetensors_file(data: bytes, level: str) -> None:
    archive = pack_bytes(data, name="m.safetensors", level=level, threads=1)
    assert unpack_bytes(archive) == data
    n = len(tzip.open(archive).tensors())
    assert len(archive) <= bound(len(data), 13, 1, n)
    tzip.verify(archive, deep=True, threads=1)


@pytest.mark.filterwarnings("ignore:.*packed as plain bytes")  # Hypothesis knows the magic bytes that stand in the sources
@given(st.binary(max_size=20_000) | st.integers(0, 200_000).map(lambda n: noise(n, n)), st.sampled_from(LEVELS))
def test_any_bytes(data: bytes, level: str) -> None:
    archive = pack_bytes(data, level=level, threads=1)
    assert unpack_bytes(archive) == data
    assert len(archive) <= bound(len(data), 4, 1, 0)


# ---------------------------------------------------------------- size bound, adversarial


def test_bound_for_many_small_noisy_tensors() -> None:
    for dtype, n, count in (("F32", 1, 5000), ("BF16", 63, 3000), ("F64", 17, 2000), ("I64", 3, 3000), ("C64", 5, 2000)):
        size = n * BITS[dtype] // 8
        data = safetensors_bytes([(f"{i:x}", dtype, [n], noise(size, i)) for i in range(count)])
        for level in LEVELS:
            archive = pack_bytes(data, name="m.safetensors", level=level)
            assert len(archive) <= bound(len(data), 13, 1, count)
        assert unpack_bytes(archive) == data


def test_bound_for_65536_tensors_of_noise() -> None:
    raw = noise(1 << 16, 0)
    data = safetensors_bytes([(f"t{i}", "U8", [1], raw[i : i + 1]) for i in range(1 << 16)])
    archive = pack_bytes(data, name="m.safetensors")
    assert len(archive) <= bound(len(data), 13, 1, 1 << 16)
    assert unpack_bytes(archive) == data
    with tzip.open(archive) as opened:
        assert len(opened) == 1 << 16
        assert opened["t65535"].tobytes() == raw[-1:]


def test_bound_for_tensors_of_mixed_dtypes() -> None:
    """Bundles of many codings at once: no run may be read twice, no reader hold more than 16."""
    names = list(BITS)
    tensors = []
    for i in range(4000):
        dtype = names[i * 7 % len(names)]
        n = 4 * (i % 50)
        tensors.append((f"t{i}", dtype, [n], noise(n * BITS[dtype] // 8, i)))
    data = safetensors_bytes(tensors)
    archive = pack_bytes(data, name="m.safetensors")
    assert len(archive) <= bound(len(data), 13, 1, 4000)
    assert unpack_bytes(archive) == data


def test_bound_for_names_that_do_not_compress() -> None:
    rng = np.random.default_rng(0)
    names = [rng.bytes(60).hex() for _ in range(2000)]
    data = safetensors_bytes([(n, "U8", [2], rng.bytes(2)) for n in names])
    archive = pack_bytes(data, name="m.safetensors")
    assert unpack_bytes(archive) == data
    assert len(archive) <= bound(len(data), 13 + sum(map(len, names)), 1, 2000)


def test_bound_for_many_small_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    root = tmp_path / "d"
    root.mkdir()
    names = total = 0
    for i in range(1500):
        path = root / (rng.bytes(int(rng.integers(1, 40))).hex() + str(i))
        path.write_bytes(rng.bytes(int(rng.choice([0, 1, 3, 50, 4095, 4097]))))
        names += len(path.name) + 2
        total += path.stat().st_size
    for level in ("fast", "best"):
        report = tzip.pack(root, tmp_path / "a.tzip", level=level, force=True)
        assert (tmp_path / "a.tzip").stat().st_size == report.bytes_out
        assert report.bytes_out <= bound(total, names + 1, 1501, 0)
    tzip.unpack(tmp_path / "a.tzip", tmp_path / "out")
    assert tree_of(tmp_path / "out" / "d") == tree_of(root)


def test_weights_do_shrink() -> None:
    raw = weights(1 << 20, 3)
    data = safetensors_bytes([("w", "BF16", [1 << 20], raw)])
    sizes = [len(pack_bytes(data, level=level)) for level in LEVELS]
    assert all(s < 0.75 * len(data) for s in sizes)
    assert len(tzip.encode(np.zeros((4096, 512), np.float32))) < 4096


# ---------------------------------------------------------------- folders


def make_tree(root: Path) -> None:
    (root / "sub" / "deep" / "er").mkdir(parents=True)
    (root / "empty folder").mkdir()
    (root / "empty").write_bytes(b"")
    (root / "one").write_bytes(b"1")
    (root / "sub" / "model.safetensors").write_bytes(
        safetensors_bytes([("w", "BF16", [300, 300], weights(90_000)), ("b", "F32", [7], weights(7, 1, "F32"))])
    )
    (root / "sub" / "other.safetensors").write_bytes(safetensors_bytes([("w", "I8", [3], b"abc")]))
    (root / "sub" / "deep" / "er" / "日本 é.txt").write_bytes(b"x" * 9001)
    (root / "sub" / ".hidden").write_bytes(noise(5000))
    if os.name != "nt":
        (root / "link").symlink_to("sub/model.safetensors")
        (root / "sub" / "up").symlink_to("../empty")
        (root / "to folder").symlink_to("sub/deep", target_is_directory=True)
        (root / "dangling").symlink_to("not there")
    modes = {"one": 0o755, "empty": 0o400, "sub/.hidden": 0o600, "sub/deep": 0o700, "empty folder": 0o555, "sub": 0o750}
    paths = [p for p in root.rglob("*") if not p.is_symlink()]
    for i, path in enumerate(sorted(paths, reverse=True)):
        if os.name != "nt":
            path.chmod(modes.get(path.relative_to(root).as_posix(), 0o644 if path.is_file() else 0o755))
        os.utime(path, ns=(DAY * 9000 + i, DAY * 9000 + 1_234_567 * i))
    for path in root.rglob("*"):
        if path.is_symlink():
            os.utime(path, ns=(DAY, DAY + 7), follow_symlinks=False)
    os.utime(root, ns=(DAY * 8000, -DAY * 3 + 5))  # before 1970


@links
@pytest.mark.parametrize("threads", [1, 3])
def test_folder(tmp_path: Path, threads: int) -> None:
    root = tmp_path / "model dir"
    root.mkdir()
    make_tree(root)
    before = tree_of(root)
    report = tzip.pack(root, threads=threads)
    assert report.archive == str(tmp_path / "model dir.tzip")
    assert tree_of(root) == before
    names = [m.name for m in report.members]
    assert names[0] == "model dir"
    assert len(names) == len(before)
    with tzip.open(report.archive) as archive:
        assert [m.name for m in archive.members()] == names
        kinds = {m.name: m.kind for m in archive.members()}
        assert kinds["model dir/empty folder"] == "folder"
        assert kinds["model dir/dangling"] == "link"
    out = tmp_path / "deep" / "out"
    unpacked = tzip.unpack(report.archive, out, threads=threads)
    assert sorted(unpacked.members) == sorted(names)
    assert tree_of(out / "model dir") == before
    assert unpacked.bytes_out == sum(len(v[3]) for v in before.values() if v[0] == "file")
    for m in report.members:
        path = out / m.name
        if path.is_file() and not path.is_symlink():
            assert digest(path) == m.sha256


def test_several_files_keep_their_order(tmp_path: Path) -> None:
    for name in ("b.bin", "a.bin", "c.safetensors"):
        (tmp_path / name).write_bytes(BROKEN["gap"][:20] if name != "c.safetensors" else safetensors_bytes([]))
    paths = [tmp_path / n for n in ("b.bin", "c.safetensors", "a.bin")]
    tzip.pack([str(paths[0]), *paths[1:]], tmp_path / "x.tzip")
    with tzip.open(tmp_path / "x.tzip") as archive:
        assert [m.name for m in archive.members()] == ["b.bin", "c.safetensors", "a.bin"]
    tzip.unpack(tmp_path / "x.tzip", tmp_path / "out", members=["a.bin"])
    assert os.listdir(tmp_path / "out") == ["a.bin"]


def test_names_that_an_archive_cannot_hold_are_refused_when_packing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"1")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").write_bytes(b"2")
    with pytest.raises(tzip.UsageError):
        tzip.pack([tmp_path / "a" / "x", tmp_path / "b" / "x"], tmp_path / "o.tzip")
    for name in ("../x", "/x", "CON", "a\\b", "x.", "\ud800", "n" * 5000):
        with pytest.raises(tzip.UsageError):
            tzip.pack(b"data", tmp_path / "o.tzip", name=name)
    if sys.platform.startswith("linux"):
        for name in ("CON", "x:y", "a\\b", "end."):
            (tmp_path / name).write_bytes(b"")
            with pytest.raises(tzip.UsageError) as caught:
                tzip.pack(tmp_path / name, tmp_path / "o.tzip")
            assert "rename" in str(caught.value)
        path = os.fsencode(tmp_path) + b"/\xff"
        Path(os.fsdecode(path)).write_bytes(b"")
        with pytest.raises(tzip.UsageError):
            tzip.pack(os.fsdecode(path), tmp_path / "o.tzip")
    assert not list(tmp_path.glob("o.tzip*"))


@pytest.mark.parametrize("suffix", [".partial", ".tzip-partial", ".tzip"])
def test_files_named_like_partial_files(tmp_path: Path, suffix: str) -> None:
    """Neither packing nor unpacking may take a file of the user for one of its own."""
    (tmp_path / "a").write_bytes(b"A" * 10)
    (tmp_path / f"a{suffix}").write_bytes(b"P" * 20)
    try:
        tzip.pack([tmp_path / f"a{suffix}", tmp_path / "a"], tmp_path / "x.tzip")
    except tzip.UsageError:
        assert suffix == ".tzip-partial"
        return
    tzip.unpack(tmp_path / "x.tzip", tmp_path / "out")
    assert (tmp_path / "out" / "a").read_bytes() == b"A" * 10
    assert (tmp_path / "out" / f"a{suffix}").read_bytes() == b"P" * 20
    tzip.unpack(tmp_path / "x.tzip", tmp_path / "out", members=["a"], force=True)
    assert sorted(os.listdir(tmp_path / "out")) == ["a", f"a{suffix}"]


@links
def test_links_that_lead_out_are_refused_and_followed_on_request(tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"secret")
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "f").write_bytes(b"far")
    for target in ("../outside", str(tmp_path / "outside"), "../far", "sub/../../outside"):
        root = tmp_path / "d"
        (root / "sub").mkdir(parents=True)
        (root / "l").symlink_to(target)
        with pytest.raises(tzip.UsageError) as caught:
            tzip.pack(root)
        assert "-L" in str(caught.value)
        assert not (tmp_path / "d.tzip").exists()
        tzip.pack(root, dereference=True)
        out = tmp_path / "out"
        tzip.unpack(tmp_path / "d.tzip", out)
        assert not (out / "d" / "l").is_symlink()
        got = out / "d" / "l"
        assert (got / "f").read_bytes() == b"far" if got.is_dir() else got.read_bytes() == b"secret"
        import shutil

        shutil.rmtree(root)
        shutil.rmtree(out)
        (tmp_path / "d.tzip").unlink()


@links
def test_link_that_leads_out_through_another_link_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "d"
    (root / "sub").mkdir(parents=True)
    (root / "here").symlink_to(".")
    (root / "out").symlink_to("here/..")
    with pytest.raises(tzip.UsageError):
        tzip.pack(root)


@links
def test_link_loops_end(tmp_path: Path) -> None:
    root = tmp_path / "d"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "up").symlink_to("..")
    with pytest.raises(tzip.UsageError):
        tzip.pack(root, dereference=True)
    (root / "sub" / "up").unlink()
    (root / "self").symlink_to("self")
    with pytest.raises((tzip.UsageError, OSError)):
        tzip.pack(root, dereference=True)
    assert not list(tmp_path.glob("*.tzip*"))


@links
def test_snapshot_of_a_hub_cache(tmp_path: Path) -> None:
    repo = tmp_path / "models--x"
    snapshot = repo / "snapshots" / "0123abcd"
    (repo / "blobs").mkdir(parents=True)
    (snapshot / "sub").mkdir(parents=True)
    (repo / "blobs" / "aa").write_bytes(safetensors_bytes([("w", "U8", [4], b"abcd")]))
    (repo / "blobs" / "bb").write_bytes(b"{}")
    (snapshot / "model.safetensors").symlink_to("../../blobs/aa")
    (snapshot / "sub" / "config.json").symlink_to("../../../blobs/bb")
    tzip.pack(snapshot, tmp_path / "s.tzip")
    tzip.unpack(tmp_path / "s.tzip", tmp_path / "out")
    got = tmp_path / "out" / "0123abcd"
    assert (got / "model.safetensors").read_bytes() == (repo / "blobs" / "aa").read_bytes()
    assert not (got / "model.safetensors").is_symlink()
    assert (got / "sub" / "config.json").read_bytes() == b"{}"
    (repo / "blobs").rename(repo / "other")
    with pytest.raises((tzip.UsageError, FileNotFoundError)):
        tzip.pack(snapshot, tmp_path / "t.tzip")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "d"
    root.mkdir()
    os.mkfifo(root / "pipe")
    with pytest.raises(tzip.UsageError):
        tzip.pack(root)
    with pytest.raises(FileNotFoundError):
        tzip.pack(tmp_path / "nothing")
    assert sorted(os.listdir(tmp_path)) == ["d"]


def test_existing_output(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"new")
    (tmp_path / "a.tzip").write_bytes(b"old")
    with pytest.raises(tzip.UsageError):
        tzip.pack(tmp_path / "a")
    assert (tmp_path / "a.tzip").read_bytes() == b"old"
    tzip.pack(tmp_path / "a", force=True)
    out = tmp_path / "out"
    out.mkdir()
    (out / "a").write_bytes(b"mine")
    with pytest.raises(tzip.UsageError):
        tzip.unpack(tmp_path / "a.tzip", out)
    with pytest.raises(tzip.UsageError):
        tzip.unpack(tmp_path / "a.tzip", out, resume=True)
    assert (out / "a").read_bytes() == b"mine"
    tzip.unpack(tmp_path / "a.tzip", out, force=True)
    assert (out / "a").read_bytes() == b"new"
    report = tzip.unpack(tmp_path / "a.tzip", out, resume=True)
    assert (report.kept, report.members) == (["a"], [])
    with pytest.raises(tzip.UsageError):
        tzip.pack(tmp_path / "a.tzip", tmp_path / "a.tzip", force=True)
    (tmp_path / "folder").mkdir()
    with pytest.raises((tzip.UsageError, OSError)):
        tzip.pack(tmp_path / "a", tmp_path / "folder", force=True)
    if os.name != "nt":
        (tmp_path / "dangling").symlink_to("nowhere")
        with pytest.raises(tzip.UsageError):
            tzip.pack(tmp_path / "a", tmp_path / "dangling")
        tzip.pack(tmp_path / "a", tmp_path / "dangling", force=True)
        assert not (tmp_path / "dangling").is_symlink()
    assert not [p for p in tmp_path.rglob("*") if "partial" in p.name]


# ---------------------------------------------------------------- sources and targets


class Path2:
    """An os.PathLike that is no Path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


class Reader(io.RawIOBase):
    """A stream that cannot seek and gives what it likes."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n = min(len(buffer), 1 + self.at % 777, len(self.data) - self.at)
        buffer[:n] = self.data[self.at : self.at + n]
        self.at += n
        return n


@contextlib.contextmanager
def pipe_with(data: bytes) -> Iterator[Any]:
    r, w = os.pipe()

    def feed() -> None:
        with os.fdopen(w, "wb") as f:
            f.write(data)

    thread = threading.Thread(target=feed)
    thread.start()
    with os.fdopen(r, "rb") as f:
        yield f
    thread.join()


def test_every_kind_of_source(tmp_path: Path) -> None:
    data = safetensors_bytes([("w", "BF16", [5000], weights(5000))])
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    reference = pack_bytes(data, name="m")
    sources: list[Any] = [data, bytearray(data), memoryview(data), memoryview(data).cast("B"), io.BytesIO(data), Reader(data)]
    sources.append(memoryview(np.frombuffer(data + bytes(-len(data) % 8), "<u8"))[: len(data) // 8])
    for i, source in enumerate(sources):
        archive = pack_bytes(source, name="m")
        if i < 6:
            assert archive == reference
            assert unpack_bytes(archive) == data
        else:
            assert unpack_bytes(archive) == data[: len(data) // 8 * 8]
    with path.open("rb") as f, path.open("rb", buffering=0) as raw:
        f.read(7)
        assert pack_bytes(f, name="m") == reference
        assert pack_bytes(raw, name="m") == reference
    with pipe_with(data) as f:
        assert pack_bytes(f, name="m") == reference
    tzip.pack(Path2(path), Path2(tmp_path / "a.tzip"))
    tzip.pack(str(path), str(tmp_path / "b.tzip"))
    assert (tmp_path / "a.tzip").read_bytes() == (tmp_path / "b.tzip").read_bytes()
    for bad in (io.StringIO("x"), 5, None, memoryview(data)[::2]):
        with pytest.raises((tzip.UsageError, TypeError)):
            pack_bytes(bad)


@pytest.mark.parametrize("module", ["gzip", "bz2", "lzma"])
def test_source_that_decompresses(tmp_path: Path, module: str) -> None:
    """Their fileno() is that of the compressed file: what counts is what read() gives."""
    import importlib

    opener = importlib.import_module(module).open
    data = noise(50_000)
    with opener(tmp_path / "x", "wb") as f:
        f.write(data)
    with opener(tmp_path / "x", "rb") as f:
        archive = pack_bytes(f)
    assert unpack_bytes(archive) == data
    with opener(tmp_path / "y", "wb") as f:
        f.write(archive)
    with opener(tmp_path / "y", "rb") as f:
        assert tzip.open(f).member_bytes("data") == data


def test_every_kind_of_archive_source_and_target(tmp_path: Path) -> None:
    data = noise(6000)
    archive = pack_bytes(data)
    path = tmp_path / "a.tzip"
    path.write_bytes(archive)
    for source in (path, str(path), Path2(path), archive, bytearray(archive), memoryview(archive), io.BytesIO(archive)):
        with tzip.open(source) as opened:
            assert opened.member_bytes("data") == data
        assert tzip.verify(source, deep=True).members == 1
    for source in (Reader(archive), path.open("rb")):
        with source as f, tzip.open(f) as opened:
            assert opened.member_bytes("data") == data
    with pipe_with(archive) as f, tzip.open(f) as opened:
        assert opened.member_bytes("data") == data
    with (tmp_path / "out").open("wb") as f:
        tzip.unpack(path, f)
    assert (tmp_path / "out").read_bytes() == data
    r, w = os.pipe()
    got: list[bytes] = []

    def drain() -> None:
        with os.fdopen(r, "rb") as f:
            got.append(f.read())

    thread = threading.Thread(target=drain)
    thread.start()
    with os.fdopen(w, "wb", buffering=0) as f:
        tzip.unpack(path, f)
    thread.join()
    assert got == [data]
    # An archive behind other bytes of a file that is already open.
    with (tmp_path / "behind").open("wb+") as f:
        f.write(b"head")
        tzip.pack(data, f, name="data")
        f.flush()
        assert (tmp_path / "behind").read_bytes() == b"head" + archive
        with tzip.open(tmp_path / "behind") as opened:
            assert opened.member_bytes("data") == data


def test_closing_leaves_the_files_of_the_caller_open() -> None:
    f = io.BytesIO(pack_bytes(b"x"))
    with tzip.open(f):
        pass
    assert not f.closed


# ---------------------------------------------------------------- large


def test_tensor_of_more_than_4_gib(tmp_path: Path) -> None:
    """From a sparse file, so that neither disk nor time is spent: offsets beyond 2^32, chunks beyond 4,096."""
    n = (1 << 32) + (1 << 20) + 17
    marks = {0: b"first", (1 << 32) - 3: b"across 4 GiB", n - 4: b"last"}
    head = json.dumps({"w": {"dtype": "U8", "shape": [n], "data_offsets": [0, n]}}).encode()
    path = tmp_path / "m.safetensors"
    with path.open("wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for at, mark in marks.items():
            f.seek(8 + len(head) + at)
            f.write(mark)
    if path.stat().st_blocks * 512 > 1 << 30:
        pytest.skip("the file system has no sparse files")
    report = tzip.pack(path, level="fast")
    assert report.bytes_out < 4 << 20
    tzip.unpack(tmp_path / "m.safetensors.tzip", tmp_path / "out")
    got = tmp_path / "out" / "m.safetensors"
    assert got.stat().st_size == path.stat().st_size
    assert got.stat().st_blocks * 512 < 64 << 20
    with tzip.open(tmp_path / "m.safetensors.tzip") as archive:
        view = archive.tensor("w")
        assert len(view) == n
        for at, mark in marks.items():
            assert view[at : at + len(mark)].tobytes() == mark[: n - at]
        assert archive.members()[0].sha256 == report.members[0].sha256
    # unpack has compared the SHA-256 of what it wrote; the holes are compared here by position and content of the rest.
    with path.open("rb") as a, got.open("rb") as b:
        for at in (0, 8 + len(head), 8 + len(head) + (1 << 32) - 4096, path.stat().st_size - 8192):
            a.seek(at)
            b.seek(at)
            assert a.read(8192) == b.read(8192)
        if hasattr(os, "SEEK_DATA"):
            at = 0
            while True:
                try:
                    at = os.lseek(b.fileno(), at, os.SEEK_DATA)
                except OSError:
                    break
                end = os.lseek(b.fileno(), at, os.SEEK_HOLE)
                b.seek(at)
                a.seek(at)
                assert a.read(end - at) == b.read(end - at)
                at = end


# ---------------------------------------------------------------- determinism


def test_archives_do_not_depend_on_threads_or_runs(tmp_path: Path) -> None:
    root = tmp_path / "d"
    root.mkdir()
    (root / "m.safetensors").write_bytes(
        safetensors_bytes(
            [("w", "BF16", [5 << 18], weights(5 << 18, 1)), ("x", "F32", [70_000], weights(70_000, 2, "F32"))]
            + [(f"s{i}", "F16", [100 + i], weights(100 + i, i, "F16")) for i in range(200)]
        )
    )
    (root / "big.bin").write_bytes(noise(9 << 20) + bytes(5 << 20))
    for level in LEVELS:
        archives = set()
        for i, threads in enumerate((1, 2, 4, 4, 1)):
            out = tmp_path / f"{level}{i}.tzip"
            tzip.pack(root, out, level=level, threads=threads)
            archives.add(out.read_bytes())
        assert len(archives) == 1
    got = {tzip.encode(np.arange(3 << 19, dtype=np.float32), threads=t) for t in (1, 2, 4)}
    assert len(got) == 1
    assert pack_bytes(b"x") == (time.sleep(0.002), pack_bytes(b"x"))[1]
    first, second = io.BytesIO(), io.BytesIO()
    tzip.pack(b"x", first)
    time.sleep(0.002)  # the clock must have moved
    tzip.pack(b"x", second)
    assert first.getvalue() == second.getvalue()


# ---------------------------------------------------------------- lazy access


def rows_of(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 250, int(np.prod(shape)), np.uint8).astype(dtype).reshape(shape)


INDICES: list[Any] = [
    0,
    3,
    -1,
    np.int64(2),
    np.uint8(1),
    slice(None),
    slice(1, 4),
    slice(None, None, 2),
    slice(None, None, -1),
    slice(5, 1, -2),
    slice(-3, None),
    slice(4, 4),
    slice(100, 200),
    slice(-100, 3),
    slice(None, None, 1000),
    slice(None, None, -1000),
    slice(np.int64(1), np.int64(3)),
    ...,
    None,
    (),
    True,
    False,
    np.True_,
    np.False_,
    (True, 1),
    (0, 1),
    (0, slice(None)),
    (slice(1, 3), 2),
    (slice(None, None, -1), slice(None, None, 3)),
    (..., 1),
    (1, ...),
    (None, 2),
    (2, None),
    (slice(2), None, 1),
    (slice(1, 5), [0, 2]),
    (0, [0, 2]),
    ([0, 2], 1),
    [0, 2, 2, -1],
    [],
    [True, False] * 3 + [True],
    np.array([1, 3]),
    np.array([[0, 1], [2, 3]]),
    (np.array([1, 3]), np.array([0, 2])),
    (slice(1, 4), np.array([True, False, True, True, False])),
    (1, np.array([True, False, True, True, False])),
    (0, slice(None), [0, 1]),
    (slice(2), [0, 1], [1, 2]),
    (0, ..., [1]),
    (slice(None), ..., 0),
    (1, 2, 3),
    (1, 2, 3, ...),
    (np.int64(1), np.int64(2)),
    np.array(2),
    (0, None, ..., None),
]
BAD_INDICES: list[Any] = [
    7,
    -8,
    (0, 9),
    (0, 0, 0, 0),
    1.5,
    "x",
    slice(1.5),
    slice(0, 1, 0),
    [9],
    (0, "x"),
    (..., ...),
    [[True]],
]


@pytest.mark.parametrize("dtype", ["float32", "uint8", ml_dtypes.bfloat16, ml_dtypes.float4_e2m1fn, "complex64", "bool"])
def test_indexing_is_that_of_numpy(dtype: Any) -> None:
    array = rows_of((7, 5, 4), dtype)
    view = tzip.open(tzip.encode(array)).tensor("")
    for index in INDICES:
        expected = array[index]
        got = view[index]
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype), index
        assert np.asarray(got).tobytes() == np.asarray(expected).tobytes(), index
    for index in BAD_INDICES:
        with pytest.raises((IndexError, TypeError, ValueError)) as theirs:
            array[index]
        with pytest.raises(theirs.type):
            view[index]


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 4), (3, 0), (6,), (2, 3)])
def test_indexing_of_odd_shapes(shape: tuple[int, ...]) -> None:
    array = rows_of(shape, "int16")
    view = tzip.open(tzip.encode(array)).tensor("")
    for index in (..., (), None, slice(None), slice(0, 1), 0, -1, (0, 0), True):
        try:
            expected = array[index]
        except IndexError:
            with pytest.raises(IndexError):
                view[index]
        else:
            got = view[index]
            assert got.shape == expected.shape
            assert got.tobytes() == expected.tobytes()
    if shape:
        assert len(view) == shape[0]
    else:
        with pytest.raises(TypeError):
            len(view)


def test_rows_decode_only_the_chunks_they_touch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 3 * CHUNK_ELEMENTS // 1024 + 5
    array = np.random.default_rng(0).normal(0, 1, (rows, 1024)).astype(np.float16)
    other = np.arange(10, dtype=np.float16)
    path = tmp_path / "m.safetensors"
    path.write_bytes(safetensors_bytes([("w", "F16", array.shape, array.tobytes()), ("s", "F16", [10], other.tobytes())]))
    tzip.pack(path)
    calls: list[tuple[int, int]] = []
    original = tzip.Archive.decode_chunk

    def counted(self: Any, run: int, chunk: int, *args: Any, **kwargs: Any) -> Any:
        calls.append((run, chunk))
        return original(self, run, chunk, *args, **kwargs)

    monkeypatch.setattr(tzip.Archive, "decode_chunk", counted)
    with tzip.open(tmp_path / "m.safetensors.tzip") as archive:
        assert archive.members()
        assert archive.tensors()
        view = archive.tensor("w")
        assert view.shape == array.shape
        assert calls == []
        cases = [
            (5, {0}),
            (-1, {3}),
            (slice(0, 0), set()),
            (slice(10, 20), {0}),
            (slice(1023, 1025), {0, 1}),
            (slice(1024, 2048), {1}),
            (slice(2048, None, 500), {2}),
            (slice(2048, None, 512), {2, 3}),
            (slice(1030, 1020, -3), {0, 1}),
            ((slice(3000, 3001), slice(None, None, 7)), {2}),
        ]
        for index, chunks in cases:
            calls.clear()
            assert view[index].tobytes() == array[index].tobytes()
            assert {c for _, c in calls} == chunks, index
            assert len(calls) == len(chunks)
        calls.clear()
        assert archive["s"].tobytes() == other.tobytes()
        assert len(calls) == 1
        calls.clear()
        assert view.read(threads=3).tobytes() == array.tobytes()
        assert sorted(c for _, c in calls) == [0, 1, 2, 3]


def test_bundles_are_decoded_once_for_tensors_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    data = safetensors_bytes([(f"t{i}", "BF16", [50], weights(50, i)) for i in range(100)])
    archive = tzip.open(pack_bytes(data))
    calls = []
    original = tzip.Archive.decode_chunk
    monkeypatch.setattr(tzip.Archive, "decode_chunk", lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    for i in range(100):
        assert archive[f"t{i}"].tobytes() == weights(50, i)
    assert len(calls) == 1


def test_mapping(tmp_path: Path) -> None:
    for name, raw in (("a", b"abcd"), ("b", b"efgh")):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(safetensors_bytes([("w", "U8", [4], raw), (f"only {name}", "U8", [4], raw)]))
    tzip.pack([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], tmp_path / "x.tzip")
    with tzip.open(tmp_path / "x.tzip") as archive:
        assert sorted(archive) == ["only a", "only b"]
        assert len(archive) == 2
        assert "w" not in archive
        assert "only a" in archive
        assert {k: v.tobytes() for k, v in archive.items()} == {"only a": b"abcd", "only b": b"efgh"}
        assert archive.get("nothing") is None
        with pytest.raises(tzip.TensorNotFoundError, match="several"):
            archive["w"]
        with pytest.raises(KeyError):
            archive["nothing"]
        assert archive.tensor("w", "a.safetensors").read().tobytes() == b"abcd"
        assert archive.tensor("w", "b.safetensors").read().tobytes() == b"efgh"
        with pytest.raises(tzip.TensorNotFoundError):
            archive.tensor("w", "c.safetensors")
        with pytest.raises(tzip.TensorNotFoundError):
            archive.tensor("x", "a.safetensors")
        with pytest.raises(tzip.TensorNotFoundError):
            archive.member_bytes("c")
        assert "x.tzip" in repr(archive)
        assert "U8" in repr(archive.tensor("only a"))


def test_many_threads_read_one_archive() -> None:
    data = safetensors_bytes([(f"t{i}", "BF16", [3000], weights(3000, i)) for i in range(30)])
    archive = tzip.open(pack_bytes(data))
    wrong = []

    def read(seed: int) -> None:
        order = np.random.default_rng(seed).integers(0, 30, 40).tolist()
        wrong.extend(i for i in order if archive[f"t{i}"].tobytes() != weights(3000, i))

    threads = [threading.Thread(target=read, args=(s,)) for s in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


# ---------------------------------------------------------------- encode and decode

DTYPES = [
    "bool",
    "uint8",
    "int8",
    "uint16",
    "int16",
    "uint32",
    "int32",
    "uint64",
    "int64",
    "float16",
    "float32",
    "float64",
    "complex64",
    "complex128",
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
    ml_dtypes.float8_e4m3fnuz,
    ml_dtypes.float8_e5m2fnuz,
    ml_dtypes.float8_e8m0fnu,
    ml_dtypes.float4_e2m1fn,
]


def random_array(dtype: Any, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    dtype = np.dtype(dtype)
    n = int(np.prod(shape))
    raw = np.random.default_rng(seed).integers(0, 256, n * dtype.itemsize, np.uint8)
    if dtype.name == "bool":
        raw &= 1
    if dtype.name == "float4_e2m1fn":
        raw &= 15
    return raw.view(dtype).reshape(shape)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_encode_decode(dtype: Any, level: str) -> None:
    four = np.dtype(dtype).name == "float4_e2m1fn"
    for shape in ((), (0,), (1,), (2,), (4, 0, 3), (333, 6), (2, 3, 4, 5), (1 << 17,)):
        if four and int(np.prod(shape)) % 2:
            with pytest.raises(tzip.UsageError):
                tzip.encode(random_array(dtype, shape), level=level)
            continue
        array = random_array(dtype, shape)
        data = tzip.encode(array, level=level)
        got = tzip.decode(data)
        assert (got.shape, got.dtype) == (array.shape, array.dtype)
        assert got.tobytes() == array.tobytes()
        out = np.empty_like(array)
        assert tzip.decode(data, out=out, threads=2) is out
        assert out.tobytes() == array.tobytes()
        assert len(data) <= bound(array.nbytes, 6, 1, 1)
        tzip.verify(data, deep=True)
        with tzip.open(data) as archive:
            (info,) = archive.tensors()
            assert (info.name, info.shape) == ("", shape)


def test_encode_memory_orders() -> None:
    base = random_array("float32", (60, 50, 4))
    for array in (
        np.asfortranarray(base),
        base[::2],
        base[:, ::-1],
        base[::-1, 1:40:3, 1],
        base.transpose(2, 0, 1),
        np.broadcast_to(base[0], (3, 50, 4)),
        base[:0],
        base[5, 5, 2],
    ):
        for threads in (1, 3):
            got = tzip.decode(tzip.encode(array, threads=threads), threads=threads)
            assert got.shape == array.shape
            assert got.tobytes() == array.tobytes()
            assert got.flags.c_contiguous
    assert tzip.decode(tzip.encode([1, 2, 3])).tolist() == [1, 2, 3]
    assert tzip.decode(tzip.encode(2.5)).shape == ()
    frozen = base.copy()
    frozen.flags.writeable = False
    assert tzip.decode(tzip.encode(frozen)).tobytes() == base.tobytes()


def test_encode_large_with_threads() -> None:
    array = np.random.default_rng(0).normal(0, 1, (5, 1 << 19)).astype(ml_dtypes.bfloat16)
    data = tzip.encode(array, threads=3)
    for threads in (1, 2, None):
        out = np.empty_like(array)
        tzip.decode(data, out=out, threads=threads)
        assert out.tobytes() == array.tobytes()


def test_encode_refuses() -> None:
    for array in (
        np.array(["a"]),
        np.array([b"a"]),
        np.array([None]),
        np.zeros(2, "f4,i4"),
        np.zeros(2, ">f4"),
        np.zeros(2, "M8[s]"),
        np.zeros(2, np.longdouble) if np.dtype(np.longdouble).itemsize > 8 else np.array(["b"]),
        np.zeros(2, "m8[s]"),
    ):
        with pytest.raises(tzip.UsageError):
            tzip.encode(array)
    for bad in ({"level": "none"}, {"threads": 0}, {"dtype": "F99"}, {"dtype": "opaque"}):
        with pytest.raises(tzip.UsageError):
            tzip.encode(np.zeros(2, np.uint8), **bad)
    with pytest.raises(tzip.UsageError):
        tzip.encode(np.zeros(2, np.float32), dtype="BF16")
    with pytest.raises(tzip.UsageError):
        tzip.encode(np.zeros(2, np.uint8), dtype="F6_E2M3")
    with pytest.raises(tzip.UsageError):
        tzip.encode(np.full(2, 16, np.uint8).view(ml_dtypes.float4_e2m1fn))


def test_encode_named_dtypes() -> None:
    raw = np.arange(24, dtype=np.uint8)
    for dtype, bits in BITS.items():
        data = tzip.encode(raw, dtype=dtype)
        (info,) = tzip.open(data).tensors()
        assert (info.dtype, info.shape) == (dtype, (24 * 8 // bits,))
        assert tzip.open(data).tensor("").raw().tobytes() == raw.tobytes()
    got = tzip.decode(tzip.encode(raw, dtype="F6_E3M2"))
    assert (got.dtype, got.tobytes()) == (np.uint8, raw.tobytes())
    (info,) = tzip.open(tzip.encode(raw.reshape(2, 12), dtype="F6_E2M3")).tensors()
    assert info.shape == (2, 16)


def test_decode_refuses() -> None:
    data = tzip.encode(np.arange(6, dtype=np.int32).reshape(2, 3))
    good = np.empty((2, 3), np.int32)
    frozen = good.copy()
    frozen.flags.writeable = False
    for out in (
        np.empty(6, np.int32),
        np.empty((3, 2), np.int32),
        np.empty((2, 3), np.uint32),
        np.empty((2, 3), np.int64),
        np.asfortranarray(good),
        np.empty((2, 6), np.int32)[:, ::2],
        frozen,
        np.empty((2, 3), ">i4"),
    ):
        with pytest.raises(tzip.UsageError):
            tzip.decode(data, out=out)
    with pytest.raises(tzip.TzipError):
        tzip.decode(pack_bytes(b"x"))
    with pytest.raises(tzip.NotAnArchiveError):
        tzip.decode(b"x" * 100)
    with pytest.raises(tzip.UsageError):
        tzip.unpack(data, "never made")
    assert not Path("never made").exists()


def test_archive_without_sha256(tmp_path: Path) -> None:
    data = noise(9000)
    archive = pack_bytes(data, sha256=False)
    assert unpack_bytes(archive) == data
    assert tzip.open(archive).members()[0].sha256 is None
    assert tzip.verify(archive, deep=True).without_sha256 == ["data"]
    (tmp_path / "a.tzip").write_bytes(archive)
    tzip.unpack(tmp_path / "a.tzip", tmp_path / "out")
    with pytest.raises(tzip.UsageError):  # nothing to compare with
        tzip.unpack(tmp_path / "a.tzip", tmp_path / "out", resume=True)


@pytest.mark.parametrize(("old", "new"), [("fast", "best"), ("best", "fast"), ("default", "fast")])
@links
def test_repack(tmp_path: Path, old: str, new: str) -> None:
    root = tmp_path / "d"
    root.mkdir()
    make_tree(root)
    tzip.pack(root, tmp_path / "old.tzip", level=old)
    tzip.repack(tmp_path / "old.tzip", tmp_path / "new.tzip", level=new)
    tzip.pack(root, tmp_path / "direct.tzip", level=new)
    assert (tmp_path / "new.tzip").read_bytes() == (tmp_path / "direct.tzip").read_bytes()
    with tzip.open(tmp_path / "old.tzip") as a, tzip.open(tmp_path / "new.tzip") as b:
        assert [(m.name, m.sha256) for m in a.members()] == [(m.name, m.sha256) for m in b.members()]
    with pytest.raises(tzip.UsageError):
        tzip.repack(tzip.encode(np.arange(3)), tmp_path / "x.tzip")
    damaged = bytearray((tmp_path / "old.tzip").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    with pytest.raises(tzip.CorruptError):
        tzip.repack(bytes(damaged), tmp_path / "x.tzip")
    assert not list(tmp_path.glob("x.tzip*"))


# ---------------------------------------------------------------- recovery


def test_recover_never_returns_a_wrong_tensor(tmp_path: Path) -> None:
    """Damage of all kinds at random places: what is said to be whole is the original, and so is every tensor."""
    root = tmp_path / "d"
    root.mkdir()
    tensors = {
        "m.safetensors": [
            ("a", "BF16", [40, 50], weights(2000, 1)),
            ("b", "F32", [300], weights(300, 2, "F32")),
            ("c", "U8", [70_000], noise(70_000)),
        ],
        "n.safetensors": [("a", "I32", [500], np.arange(500, dtype="<i4").tobytes()), ("e", "F64", [0], b"")],
    }
    for name, items in tensors.items():
        (root / name).write_bytes(safetensors_bytes(items))
    (root / "x.bin").write_bytes(noise(5000, 3))
    (root / "y.txt").write_bytes(b"text")
    tzip.pack(root)
    data = (tmp_path / "d.tzip").read_bytes()
    rng = np.random.default_rng(5)
    whole = parts = without = 0
    for i in range(150):
        damaged = bytearray(data)
        how = i % 6
        if how == 0:
            for at in rng.integers(0, len(data), 3).tolist():
                damaged[at] ^= 1 << int(rng.integers(8))
        elif how == 1:
            del damaged[int(rng.integers(len(data))) :]
        elif how == 2:
            del damaged[: int(rng.integers(len(data)))]
        elif how == 3:
            at = int(rng.integers(len(data)))
            damaged[at : at + 3000] = rng.bytes(len(damaged[at : at + 3000]))
        elif how == 4:
            damaged[-200:] = bytes(200)
            damaged[int(rng.integers(len(data)))] ^= 0xFF
        else:
            at = int(rng.integers(len(data)))
            damaged[at:at] = rng.bytes(int(rng.integers(1, 500)))
        out = tmp_path / f"out{i}"
        try:
            report = tzip.recover(bytes(damaged), out)
        except tzip.TzipError:
            assert not out.exists()
            continue
        without += not report.index_found
        for name in report.whole:
            if not (root.parent / name).is_dir():
                assert (out / name).read_bytes() == (root.parent / name).read_bytes()
                whole += 1
        for member, names in report.tensors.items():
            with safetensors.safe_open(out / f"{member}.recovered.safetensors", "np") as f:  # type: ignore[attr-defined]
                originals = {n: raw for n, _, _, raw in tensors[Path(member).name]}
                assert set(f.keys()) == set(names)
            with tzip.open(pack_bytes((out / f"{member}.recovered.safetensors").read_bytes())) as f:
                for name in names:
                    assert f.tensor(name).raw().tobytes() == originals[name]
                    parts += 1
        expected = {out / n for n in report.whole} | {out / f"{m}.recovered.safetensors" for m in report.tensors}
        assert {p for p in out.rglob("*") if p.is_file()} == {p for p in expected if p.is_file()}
    assert whole > 100  # or the test has seen nothing
    assert parts > 20
    assert without > 40


def test_recover_of_a_whole_archive(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(noise(5000))
    tzip.pack(tmp_path / "x")
    report = tzip.recover(tmp_path / "x.tzip", tmp_path / "out")
    assert (report.index_found, report.whole, report.lost, report.unproven) == (True, ["x"], [], [])
    data = (tmp_path / "x.tzip").read_bytes()
    report = tzip.recover(data[:-100], tmp_path / "out2")
    assert (report.index_found, report.whole, report.lost, report.unproven) == (False, ["x"], [], [])
    for at in (8, 9, 20, 60):  # a damaged header, the version too, costs nothing
        damaged = bytearray(data)
        damaged[at] ^= 1
        assert tzip.recover(bytes(damaged), tmp_path / f"out at {at}").whole == ["x"]
    with pytest.raises(tzip.NotAnArchiveError):  # the only member record is cut: nothing has a name
        tzip.recover(data[70:], tmp_path / "front")
    with pytest.raises(tzip.NotAnArchiveError):
        tzip.recover(b"nothing of it" * 50, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(tzip.UnsupportedError):
        tzip.recover(forge.header(data, version=7) + data[64:], tmp_path / "none")


def test_recover_does_not_confuse_an_archive_with_one_that_it_holds(tmp_path: Path) -> None:
    n = 70_000
    inner = np.zeros(n, np.uint8)
    inner[::7] = 3
    old = pack_bytes(safetensors_bytes([("w", "U8", [n], inner.tobytes())]), name="m.safetensors")
    outer = bytearray(noise(n))
    outer[: len(old)] = old
    original = safetensors_bytes([("w", "U8", [n], bytes(outer))])
    data = bytearray(pack_bytes(original, name="m.safetensors"))
    at = data.find(forge.CHNK)
    seen = 0
    for place in range(at, at + 48):
        for tail in (0, 100):
            damaged = bytearray(data[: len(data) - tail])
            damaged[place] ^= 0x40
            out = tmp_path / f"{place}-{tail}"
            try:
                report = tzip.recover(bytes(damaged), out)
            except tzip.NotAnArchiveError:
                continue
            if report.whole:
                assert (out / "m.safetensors").read_bytes() == original
            assert not report.tensors
            seen += 1
    assert seen == 96


# ---------------------------------------------------------------- small things


def test_unpack_to_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tzip.unpack(pack_bytes(b"abc"))
    assert (tmp_path / "data").read_bytes() == b"abc"


def test_progress_adds_up() -> None:
    data = safetensors_bytes([("w", "BF16", [3 << 19], weights(3 << 19)), ("s", "I8", [3], b"abc")])
    done: list[int] = []
    archive = pack_bytes(data, progress=done.append)
    assert sum(done) == len(data)
    done.clear()
    tzip.unpack(archive, io.BytesIO(), progress=done.append)
    assert sum(done) == len(data)


def test_import_of_tzip_is_light() -> None:
    code = "import sys, tzip; tzip.open; print([m for m in ('numba', 'ml_dtypes', 'torch') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "numba" not in out
    assert "torch" not in out


class _Sink:
    """A writer that is no file: `answer` turns the number of bytes offered into those taken, or None."""

    def __init__(self, answer):
        self.answer = answer
        self.data = bytearray()

    def write(self, data):
        taken = self.answer(len(data))
        self.data += bytes(data)[: len(data) if taken is None else taken]
        return taken


@pytest.mark.parametrize("answer", [lambda n: None, lambda n: n, lambda n: min(n, 777)], ids=["none", "all", "parts"])
def test_writers_that_are_no_files(answer):
    content = bytes(range(256)) * 100
    packed, restored = _Sink(answer), _Sink(answer)
    tzip.pack(content, packed, name="m")
    tzip.unpack(bytes(packed.data), restored)
    assert bytes(restored.data) == content


def test_a_full_non_blocking_pipe_is_an_error():
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        with os.fdopen(writing, "wb", buffering=0) as pipe, pytest.raises(BlockingIOError):
            tzip.pack(np.random.default_rng(1).bytes(1 << 20), pipe, name="m")
    finally:
        os.close(reading)


@pytest.mark.parametrize("level", ["fast", "default", "best"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64", "I32", "U8", "C64"])
def test_input_that_may_not_be_written_is_read_where_it_lies(tmp_path: Path, dtype: str, level: str) -> None:
    """Kernels get it as if it might be written, so a stray write would change bytes objects, or end the process."""
    for content in (weights(70_000, 3, "F32"), np.arange(70_000, dtype="<i4").tobytes(), bytes(280_000), noise(280_000, 4)):
        raw = bytes(bytearray(content))
        packed = tzip.encode(np.frombuffer(raw, np.uint8), level=level, dtype=dtype)
        assert raw == content
        path = tmp_path / "raw"
        path.write_bytes(content)
        mapped = np.memmap(path, np.uint8, "r")
        assert tzip.encode(mapped, level=level, dtype=dtype) == packed
        assert np.frombuffer(tzip.decode(packed), np.uint8).tobytes() == content
