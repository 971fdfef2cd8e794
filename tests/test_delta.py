"""Tensors stored as differences from an earlier file: round trips, what they cost, how bases are found and refused, chains,
slices, scratch memory, damage, and every verb that meets them.
"""

import hashlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 (its names are numpy's then)
import numpy as np
import pytest
from click.testing import CliRunner, Result
from forge import noise, safetensors_bytes, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

import tzip
from tzip import bases, encoding
from tzip.archive import Archive
from tzip.chunks import SLACK, decode_chunk
from tzip.cli import cli
from tzip.coders import jit
from tzip.coders.errors import BaseNotFoundError, CorruptError, TzipError, UsageError
from tzip.coders.planes import PLANES
from tzip.coders.sums import sum64
from tzip.coders.transforms import DELTA
from tzip.encoding import encode_chunk
from tzip.formats.dtypes import BY_NAME, Dtype
from tzip.formats.layout import CHUNK_ELEMENTS, ChunkHead
from tzip.inspecting import describe
from tzip.plan import LEVELS
from tzip.safetensors import safe_open
from tzip.safetensors.numpy import load_file
from tzip.workers import Workers

WORD = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
EXPONENT = {"bf16": (7, 8), "f16": (10, 5), "f32": (23, 8), "f64": (52, 11)}  # (shift, bits)
DTYPES = sorted(d.name for d in BY_NAME.values() if d.name not in ("opaque", "C128"))
SIZES = (1, 2, 31, 32, 33, 63, 64, 65, 4095, 4096, 4097)
N = 70_000
KINDS = (
    "equal",
    "nudged 1",
    "nudged 20",
    "random 1",
    "random 20",
    "unrelated",
    "negated",
    "minus zero",
    "nans",
    "infinities",
    "subnormals",
    "base zeros",
    "base one value",
    "both ends",
    "halves",
)
Tensor = tuple[str, str, list[int], bytes]


@pytest.fixture(autouse=True)
def _nothing_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(bases.SEARCH, raising=False)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that may have a base gets it, whether it gains by it or not."""
    monkeypatch.setattr(bases, "_gain", lambda *_: 1)


# ---------------------------------------------------------------- inputs


def _seed(*parts: Any) -> list[int]:
    return [int.from_bytes(hashlib.sha256(repr(p).encode()).digest()[:4], "little") for p in parts]


def _plain(dtype: Dtype, n: int, rng: np.random.Generator) -> np.ndarray:
    """n words that look like what a tensor of that type holds."""
    values = rng.normal(0, 0.02, n)
    if dtype.coding == "bf16":
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2")
    if dtype.coding in EXPONENT:
        return values.astype(f"<f{dtype.width}").view(WORD[dtype.width])
    word = WORD[dtype.width]
    return (np.abs(values) * 2000).astype(np.int64).astype(word) + word(3)


def _pair(kind: str, dtype: Dtype, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """n words of a base and of what came of it."""
    word = WORD[dtype.width]
    every = word(2 ** (8 * dtype.width) - 1)
    top = word(1 << 8 * dtype.width - 1)
    random = rng.integers(0, 1 << 63, n, dtype=np.uint64).astype(word) ^ (rng.integers(0, 2, n).astype(word) * top)
    base = _plain(dtype, n, rng)
    shift, bits = EXPONENT.get(dtype.coding, (8 * dtype.width - 5, 4))
    exponents = word(((1 << bits) - 1) << shift)
    share = int(kind.split()[1]) / 100 if kind.split()[-1].isdigit() else 0.0
    where = rng.random(n) < share
    if kind == "equal":
        return base, base.copy()
    if kind.startswith("nudged"):
        step = np.where(rng.random(n) < 0.5, word(1), every).astype(word)
        return base, np.where(where, base + step, base).astype(word)
    if kind.startswith("random"):
        return base, np.where(where, random, base).astype(word)
    if kind == "unrelated":
        return base, random
    if kind == "negated":
        return base, base ^ top
    if kind == "minus zero":
        return np.zeros(n, word), np.where(rng.random(n) < 0.5, top, 0).astype(word)
    if kind == "nans":
        return random | exponents, base ^ (random & ~exponents) | exponents
    if kind == "infinities":
        infinite = np.where(rng.random(n) < 0.5, exponents, exponents | top).astype(word)
        a, b = (np.where(rng.random(n) < 0.3, infinite, base).astype(word) for _ in range(2))
        return a, b
    if kind == "subnormals":
        small = random & word((1 << shift) - 1)
        return small, small + (rng.integers(0, 3, n).astype(word) - word(1))
    if kind == "base zeros":
        return np.zeros(n, word), base
    if kind == "base one value":
        return np.full(n, base[0]), base
    if kind == "both ends":
        ends = np.array([0, every, top, top - 1, exponents, exponents | top, 1, top | 1], np.uint64).astype(word)
        return ends[rng.integers(0, ends.size, n)], ends[rng.integers(0, ends.size, n)]
    assert kind == "halves"  # equal in one half, another thing in the other: classes of which some are empty
    return base, np.where(np.arange(n) < n // 2, base, random).astype(word)


def _entry(name: str, dtype: Dtype, raw: bytes) -> Tensor:
    return name, dtype.name, [len(raw) * 8 // dtype.bits], raw


def _words(dtype: Dtype, n: int) -> int:
    """The number of words nearest above n that elements of that type fill."""
    return -(-n // 3) * 3 if dtype.bits == 6 else 2 * n if dtype.name == "C64" else n


def _pairs(name: str, sizes: tuple[int, ...], kinds: tuple[str, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of an earlier file and of a later one."""
    dtype = BY_NAME[name]
    old, new = [], []
    for kind in kinds:
        for n in sizes:
            a, b = _pair(kind, dtype, _words(dtype, n), np.random.default_rng(_seed(name, kind, n)))
            assert a.dtype == b.dtype == WORD[dtype.width]
            old.append(_entry(f"{kind} {n}", dtype, a.tobytes()))
            new.append(_entry(f"{kind} {n}", dtype, b.tobytes()))
    return old, new


def write(path: Path, tensors: list[Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(safetensors_bytes(tensors))
    return path


def moved(raw: bytes, share: float = 0.01, seed: int = 1, width: int = 2) -> bytes:
    """The elements, a share of them one unit further."""
    words = np.frombuffer(raw, WORD[width]).copy()
    words[np.random.default_rng(seed).random(words.size) < share] += WORD[width](1)
    return words.tobytes()


def bf16(name: str, raw: bytes, rows: int = 0) -> Tensor:
    n = len(raw) // 2
    return name, "BF16", [rows, n // rows] if rows else [n], raw


def pack(data: Any, base: Any = None, **options: Any) -> bytes:
    out = io.BytesIO()
    tzip.pack(data, out, base=base, name=options.pop("name", "m.safetensors"), **options)
    return out.getvalue()


def inputs(archive: Any) -> list[str]:
    """The names of the tensors that an archive's are differences from."""
    with tzip.open(archive) as opened:
        return [name for _, name in opened.reader.index.input_names]


def deltas(archive: Any) -> int:
    return sum(row["chunks"] for row in describe(archive)["transforms"] if row["transform"] == "delta")


def unpacked(archive: Any, member: str | None = None, **options: Any) -> bytes:
    out = io.BytesIO()
    tzip.unpack(archive, out, members=None if member is None else [member], **options)
    return out.getvalue()


def run(*args: Any) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in args], prog_name="tzip")


def ok(*args: Any) -> Result:
    result = run(*args)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def fails(code: int, *args: Any) -> str:
    result = run(*args)
    assert result.exit_code == code, (result.output, result.exception)
    assert result.stdout == ""
    return result.stderr


# ---------------------------------------------------------------- round trips


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("name", DTYPES)
def test_whatever_the_type_and_the_base_is(name: str, tmp_path: Path) -> None:
    old, new = _pairs(name, SIZES, KINDS)
    more = _pairs(name, (65_535, 65_536, 65_537), KINDS[DTYPES.index(name) % 3 :: 3])
    empty = ("none", name, [0, 3], b"")
    dtype = BY_NAME[name]
    one = bytes(range(1, 1 + dtype.bits // 8))
    scalar = [("scalar", name, [], one), ("single", name, [1, 1], one)] if dtype.bits % 8 == 0 else []
    base = write(tmp_path / "base.safetensors", [*old, *more[0], empty, *scalar])
    data = safetensors_bytes([*new, *more[1], empty, *scalar])
    archive = pack(data, base)
    assert len(inputs(archive)) == len(new) + len(more[1]) + len(scalar)
    assert deltas(archive) > 5
    assert unpacked(archive, base=base) == data
    with tzip.open(archive, base=base) as opened:
        for tensor, _, _, raw in [*new, *more[1], empty, *scalar]:
            assert opened.tensor(tensor).raw().tobytes() == raw


@pytest.mark.parametrize("name", ["BF16", "F32", "F8_E4M3", "I64", "F16", "C64"])
@pytest.mark.parametrize("level", ["fast", "best"])
def test_other_levels_and_bases_as_they_are_chosen(level: str, name: str, tmp_path: Path) -> None:
    old, new = _pairs(name, (1, 33, 5000, 66_000), KINDS)
    base = write(tmp_path / "base.safetensors", old)
    data = safetensors_bytes(new)
    archive = pack(data, base, level=level)
    assert 0 < len(inputs(archive)) < len(new)
    assert deltas(archive) > 1
    assert unpacked(archive, base=base) == data
    if level == "fast":
        assert not [row for row in describe(archive)["blocks"] if row["codec"] == "rans"]


LARGE = (1 << 18, (1 << 18) - 1, (1 << 18) + 1, 1 << 20, (1 << 20) - 1, (1 << 20) + 1, (1 << 20) + (1 << 19))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    ("name", "sizes", "kinds"),
    [
        ("BF16", LARGE, ("nudged 20",)),
        ("BF16", LARGE[3:], ("random 1",)),
        ("BF16", LARGE[4:6], ("halves", "both ends")),
        ("F32", LARGE[2:], ("nudged 20",)),
        ("U8", LARGE, ("nudged 1",)),
        ("F64", (LARGE[5],), ("nudged 20",)),
        ("I16", LARGE[1:3], ("unrelated",)),
    ],
)
def test_around_the_ends_of_chunks(name: str, sizes: tuple[int, ...], kinds: tuple[str, ...], tmp_path: Path) -> None:
    old, new = _pairs(name, sizes, kinds)
    base = write(tmp_path / "base.safetensors", old)
    data = safetensors_bytes(new)
    archive = pack(data, base, threads=2)
    assert len(inputs(archive)) == len(new)
    assert unpacked(archive, base=base, threads=2) == data


CODINGS = [("bf16", 2), ("f16", 2), ("f32", 4), ("f64", 8), ("planes", 1), ("planes", 2), ("planes", 4), ("planes", 8)]


def _forced(raw: np.ndarray, width: int, coding: str, level: str, base: np.ndarray) -> bytes:
    """The record of a delta, whether something else is smaller or not."""
    found, blocks = encoding._from_base(raw, width, coding, LEVELS[level], base)
    return bytes(encoding._record(PLANES, blocks, raw, width, 3, 5, sum64(raw), found).record)


def _decoded(record: bytes, n: int, width: int, base: np.ndarray | None, lead: int = 0) -> bytes:
    buffer = np.zeros(len(record) + SLACK, np.uint8)
    buffer[: len(record)] = np.frombuffer(record, np.uint8)
    out = np.full(n * width + lead, 0xEE, np.uint8)[lead:]
    decode_chunk(buffer, len(record), 3, 5, n, width, out, base=base)
    return out.tobytes()


@settings(max_examples=max(150, settings().max_examples))
@given(st.data())
def test_any_chunk_from_any_base(data: st.DataObject) -> None:
    coding, width = data.draw(st.sampled_from(CODINGS))
    level = data.draw(st.sampled_from(["fast", "default", "best"]))
    n = data.draw(st.one_of(st.integers(1, 300), st.sampled_from([4095, 4096, 4097, 9000, 20_000])))
    word = WORD[width]
    seed = data.draw(st.integers(0, 1 << 16))
    dtype = next(d for d in BY_NAME.values() if d.coding == coding and d.width == width)
    earlier, later = _pair(data.draw(st.sampled_from(KINDS)), dtype, n, np.random.default_rng(seed))
    for words in (earlier, later):
        some = st.tuples(st.integers(0, n - 1), st.integers(0, 2 ** (8 * width) - 1))
        for at, value in data.draw(st.lists(some, max_size=4)):
            words[at] = word(value)
    lead = data.draw(st.sampled_from([0, 1, width]))  # arrays need not be aligned
    room = np.zeros(n * width + lead, np.uint8)
    room[lead:] = earlier.view(np.uint8)
    raw, base = later.view(np.uint8), room[lead:]
    records = [
        bytes(encode_chunk(raw, width, coding, LEVELS[level], 3, 5, 0, 0, base).record),
        _forced(raw, width, coding, level, base),
    ]
    for record in records:
        assert _decoded(record, n, width, base, lead) == raw.tobytes()
    assert len(records[0]) <= max(len(records[1]), n * width + 80)
    # A base that differs in one bit gives an error.
    wrong = base.copy()
    wrong[data.draw(st.integers(0, wrong.size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    for record in records:
        if ChunkHead.read(record).transform == DELTA:
            with pytest.raises(CorruptError):
                _decoded(record, n, width, wrong)
            with pytest.raises(CorruptError, match="names none"):
                _decoded(record, n, width, None)


TIER_SCRIPT = """
import sys
from pathlib import Path
import tzip
from tzip.coders import jit
base, new, theirs, mine = map(Path, sys.argv[1:])
data = new.read_bytes()
tzip.pack(data, mine / "default.tzip", base=base, name="m.safetensors", threads=1)
tzip.unpack(theirs / "default.tzip", mine, base=base, threads=1)
assert (mine / "m.safetensors").read_bytes() == data
print(jit.tier())
"""


def test_all_tiers_write_the_same_archives_and_read_each_others(tmp_path: Path) -> None:
    old, new = [], []
    for name in ("BF16", "F32", "U8"):
        a, b = _pairs(name, (4097, 70_001), ("nudged 20", "random 1", "unrelated", "halves"))
        old += [(f"{name} {t}", *rest) for t, *rest in a]
        new += [(f"{name} {t}", *rest) for t, *rest in b]
    base, later = write(tmp_path / "base.safetensors", old), write(tmp_path / "new.safetensors", new)
    data = later.read_bytes()
    here = tmp_path / "here"
    here.mkdir()
    tzip.pack(data, here / "default.tzip", base=base, name="m.safetensors")
    targets = {"generic": jit.PORTABLE, "haswell": jit.AVX2}
    started = {}
    for cpu in targets:
        (tmp_path / cpu).mkdir()
        env = os.environ | {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path / f"{cpu} cache")}
        started[cpu] = subprocess.Popen(
            [sys.executable, "-c", TIER_SCRIPT, base, later, here, tmp_path / cpu],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
    for cpu, process in started.items():
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert out.strip() == targets[cpu]
        archive = tmp_path / cpu / "default.tzip"
        assert archive.read_bytes() == (here / archive.name).read_bytes()
        assert unpacked(archive, base=base) == data
        assert deltas(archive) > 4


# ---------------------------------------------------------------- what it costs


@pytest.mark.parametrize("level", ["fast", "default", "best"])
def test_what_did_not_change_costs_nothing_and_little_costs_little(level: str, tmp_path: Path) -> None:
    raw = weights(1_200_000)
    base = write(tmp_path / "base.safetensors", [bf16("w", raw)])
    same = pack(safetensors_bytes([bf16("w", raw)]), base, level=level)
    assert len(same) < 1500
    few = pack(safetensors_bytes([bf16("w", moved(raw))]), base, level=level)
    assert len(few) < len(raw) * (0.012 if level == "fast" else 0.009)  # 0.08 bits an element say which, more which way
    assert unpacked(few, base=base) == safetensors_bytes([bf16("w", moved(raw))])


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("level", ["fast", "default", "best"])
@pytest.mark.parametrize("name", ["BF16", "F32", "F16", "I8", "U16"])
def test_what_is_unlike_its_base_costs_no_more_than_alone(name: str, level: str, tmp_path: Path) -> None:
    dtype = BY_NAME[name]
    kinds = ("unrelated", "negated", "base one value", "nans")
    old, new = _pairs(name, (300_000,), kinds)
    other = _plain(dtype, 300_000, np.random.default_rng(99))
    old.append(_entry("other weights", dtype, other.tobytes()))
    new.append(_entry("other weights", dtype, _plain(dtype, 300_000, np.random.default_rng(98)).tobytes()))
    base = write(tmp_path / "base.safetensors", old)
    for tensor in new:
        data = safetensors_bytes([tensor])
        alone, leaning = pack(data, level=level), pack(data, base, level=level)
        assert inputs(leaning) == [tensor[0]]
        assert len(leaning) <= len(alone) * 1.01 + 400, tensor[0]
        assert unpacked(leaning, base=base) == data


@pytest.mark.parametrize("name", ["BF16", "U8", "I32", "F32"])
def test_structure_of_its_own_beats_a_base(name: str, tmp_path: Path) -> None:
    """A tensor that became zeros, or almost, costs nothing by itself: no difference from anything may cost more."""
    dtype, n = BY_NAME[name], 300_000
    rng = np.random.default_rng(5)
    word = WORD[dtype.width]
    old = (rng.integers(0, 16, n) << (8 * dtype.width - 8)).astype(word)
    if dtype.coding == "planes":
        old = rng.integers(0, 16, n).astype(word)
    sparse = np.where(rng.random(n) < 0.01, old, 0).astype(word)
    base = write(tmp_path / "base.safetensors", [_entry("z", dtype, old.tobytes()), _entry("s", dtype, old.tobytes())])
    for tensor, words in (("z", np.zeros(n, word)), ("s", sparse)):
        data = safetensors_bytes([_entry(tensor, dtype, words.tobytes())])
        alone, leaning = pack(data), pack(data, base)
        assert unpacked(leaning, base=base) == data
        assert len(leaning) <= len(alone) * 1.01 + 400, (tensor, len(alone), len(leaning))


@pytest.mark.parametrize("name", ["BF16", "F32", "U8", "I64"])
def test_a_tensor_of_one_value_is_packed_with_and_without_a_base(name: str, tmp_path: Path) -> None:
    dtype = BY_NAME[name]
    words = np.full(70_000, 3, WORD[dtype.width])
    base = write(tmp_path / "base.safetensors", [_entry("w", dtype, _plain(dtype, 70_000, np.random.default_rng(1)).tobytes())])
    data = safetensors_bytes([_entry("w", dtype, words.tobytes())])
    for archive in (pack(data), pack(data, base)):
        assert unpacked(archive, base=base) == data


def test_any_number_of_threads_gives_the_same_bytes(tmp_path: Path) -> None:
    old, new = _pairs("BF16", (100, 70_000, 1_100_000), ("nudged 1", "nudged 20", "unrelated"))
    first = write(tmp_path / "first.safetensors", old)
    archived = tmp_path / "first.tzip"
    tzip.pack(first, archived)
    data = safetensors_bytes(new)
    for base in (first, archived):
        made = {pack(data, base, threads=threads) for threads in (1, 2, 3, 7)}
        assert len(made) == 1
    archive = made.pop()
    for threads in (1, 2, 5):
        assert unpacked(archive, base=archived, threads=threads) == data


# ---------------------------------------------------------------- where bases are


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, bytes]:
    """An earlier file, a later one in a folder of its own, and what the later one holds."""
    raws = [weights(N, i) for i in range(2)]
    small = [bf16(f"s{i}", weights(500, 10 + i)) for i in range(4)]
    old = write(tmp_path / "old" / "step-1.safetensors", [*(bf16(f"t{i}", r) for i, r in enumerate(raws)), *small])
    tensors = [*(bf16(f"t{i}", moved(r)) for i, r in enumerate(raws)), *small]
    new = write(tmp_path / "new" / "step-2.safetensors", tensors)
    return old, new, new.read_bytes()


def test_a_base_is_a_file_an_archive_a_folder_or_a_list(files: Any, tmp_path: Path) -> None:
    old, new, data = files
    archived = tmp_path / "a" / "old.tzip"
    archived.parent.mkdir()
    tzip.pack(old, archived)
    other = write(tmp_path / "other.safetensors", [bf16("x", weights(100))])
    folder = tmp_path / "folder"
    (folder / "deep" / "er").mkdir(parents=True)
    shutil.copy(old, folder / "deep" / "er")
    (folder / "text.txt").write_text("no tensors")
    root = tmp_path / "packed folder.tzip"
    tzip.pack(folder, root)
    (folder / "broken.safetensors").write_bytes(noise(300))
    (folder / "broken.tzip").write_bytes(archived.read_bytes()[:-100])
    made = {}
    for name, base in {
        "file": old,
        "text": str(old),
        "archive": archived,
        "folder": folder,
        "list": [other, old],
        "tuple": (str(other), archived),
        "folder archive": root,
    }.items():
        archive = tmp_path / "out" / f"{name}.tzip"
        archive.parent.mkdir(exist_ok=True)
        tzip.pack(new, archive, base=base)
        assert sorted(inputs(archive)) == ["s0", "s1", "s2", "s3", "t0", "t1"]
        made[name] = archive
        for again in (base, old, archived, [folder, other], root):  # the SHA-256 decides
            assert unpacked(archive, base=again) == data
        with pytest.raises(BaseNotFoundError):
            unpacked(archive)
        with pytest.raises(BaseNotFoundError):
            unpacked(archive, base=other)
    assert made["file"].read_bytes() == made["folder"].read_bytes()


def test_a_base_is_found_beside_the_archive_or_where_the_environment_says(
    files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, data = files
    archive = tmp_path / "here" / "step-2.tzip"
    archive.parent.mkdir()
    tzip.pack(new, archive, base=old)
    for name in ("step-1.safetensors", "renamed.safetensors", "step-1.safetensors.tzip", "renamed.tzip"):
        target = archive.parent / name
        if name.endswith(".tzip"):
            tzip.pack(old, target)
        else:
            shutil.copy(old, target)
        assert unpacked(archive) == data, name
        target.unlink()
        with pytest.raises(BaseNotFoundError, match="TZIP_BASE_PATH"):
            unpacked(archive)
    # What lies below is looked at only where a folder was named: it may be everything that there is.
    below = archive.parent / "sub" / "dir" / "renamed.safetensors"
    below.parent.mkdir(parents=True)
    shutil.copy(old, below)
    with pytest.raises(BaseNotFoundError):
        unpacked(archive)
    assert unpacked(archive, base=archive.parent) == data
    below.unlink()
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    missing = str(tmp_path / "missing")
    for path in (old.parent, old):
        monkeypatch.setenv(bases.SEARCH, os.pathsep.join([missing, str(nothing), "", str(path)]))
        assert unpacked(archive) == data
        assert unpacked(archive, base=nothing) == data
    monkeypatch.setenv(bases.SEARCH, str(nothing))
    assert unpacked(archive, base=old.parent) == data
    assert unpacked(archive, base=[nothing, old]) == data


def test_a_relative_archive_keeps_its_folder(files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, _ = files
    archive = old.parent / "step-2.tzip"
    tzip.pack(new, archive, base=old)
    monkeypatch.chdir(old.parent)
    assert unpacked("step-2.tzip") == new.read_bytes()
    with tzip.open("step-2.tzip") as opened:
        monkeypatch.chdir(tmp_path)
        assert opened.tensor("t0").raw().tobytes() == moved(weights(N, 0))


def test_another_file_of_the_same_name_is_no_base(files: Any, tmp_path: Path) -> None:
    old, new, data = files
    archive = tmp_path / "d" / "step-2.tzip"
    archive.parent.mkdir()
    tzip.pack(new, archive, base=old)
    good = old.read_bytes()
    beside = archive.parent / old.name
    for at in (len(good) - 1, len(good) // 2, 60):  # 60: in the header
        bad = bytearray(good)
        bad[at] ^= 1
        beside.write_bytes(bad)
        for base in (None, beside, archive.parent):
            out = tmp_path / "out"
            with pytest.raises(BaseNotFoundError) as error:
                tzip.unpack(archive, out, base=base)
            assert "step-1.safetensors" in str(error.value)
            assert hashlib.sha256(good).hexdigest() in str(error.value)
            assert not out.exists()
            assert error.value.tensor in ("t0", "t1", "s0", "s1", "s2", "s3")
            if at != 60:
                assert str(beside) in str(error.value)  # what was looked at
        # The right one, further away, is found all the same.
        assert unpacked(archive, base=[beside, old]) == data
    # One with the same tensors in another order, or with other metadata, is another version, too.
    tensors = [bf16("t1", weights(N, 1)), bf16("t0", weights(N, 0)), *(bf16(f"s{i}", weights(500, 10 + i)) for i in range(4))]
    write(beside, tensors)
    with pytest.raises(BaseNotFoundError):
        unpacked(archive)
    beside.write_bytes(safetensors_bytes(tensors, {"step": "3"}))
    with pytest.raises(BaseNotFoundError):
        unpacked(archive)


def test_a_base_packed_anew_at_any_level_is_the_same_base(files: Any, tmp_path: Path) -> None:
    old, new, data = files
    a, b = tmp_path / "a.tzip", tmp_path / "b.tzip"
    tzip.pack(old, a)
    archive = pack(new.read_bytes(), a)
    for level in ("fast", "best"):
        tzip.repack(a, b, level=level, force=True)
        assert a.read_bytes() != b.read_bytes()
        assert unpacked(archive, base=b) == data
    assert unpacked(archive, base=old) == data


def test_a_base_without_sha256_is_known_by_its_archive_alone(files: Any, tmp_path: Path) -> None:
    old, new, data = files
    a, b = tmp_path / "a.tzip", tmp_path / "b.tzip"
    tzip.pack(old, a, sha256=False)
    archive = pack(new.read_bytes(), a)
    assert len(inputs(archive)) == 6
    assert unpacked(archive, base=a) == data
    shutil.copy(a, tmp_path / "copy of a.tzip")
    assert unpacked(archive, base=tmp_path / "copy of a.tzip") == data
    tzip.repack(a, b, level="fast")
    for other in (old, b):
        with pytest.raises(BaseNotFoundError, match=r"archive id [0-9a-f]{64}") as error:
            unpacked(archive, base=other)
        assert "SHA-256 " not in str(error.value)


def test_a_known_sha256_of_another_file_is_another_file() -> None:
    """Two files of one archive have one archive id."""
    one, two, archive = bytes([1]) * 32, bytes([2]) * 32, bytes([3]) * 32
    none = bytes(32)
    assert bases.Origin("a", one, archive).fits(bases.Origin("b", one, none))
    assert bases.Origin("a", none, archive).fits(bases.Origin("a", none, archive))
    assert not bases.Origin("a", none, none).fits(bases.Origin("a", none, none))
    assert not bases.Origin("a", one, none).fits(bases.Origin("a", two, none))
    assert not bases.Origin("a", one, archive).fits(bases.Origin("b", two, archive))


def test_a_base_that_was_packed_in_place(files: Any, tmp_path: Path) -> None:
    old, new, data = files
    before = pack(new.read_bytes(), old)
    size = old.stat().st_size
    tzip.pack_in_place([old])
    assert old.stat().st_size < size
    after = pack(new.read_bytes(), old)
    for archive in (before, after):
        assert len(inputs(archive)) == 6
        assert unpacked(archive, base=old) == data
    tzip.unpack_in_place([old])
    assert old.stat().st_size == size
    for archive in (before, after):
        assert unpacked(archive, base=old) == data


def test_bases_that_are_none(tmp_path: Path, files: Any) -> None:
    _, new, _ = files
    text = tmp_path / "text.safetensors"
    text.write_text("no tensors here")
    nothing = tmp_path / "nothing.safetensors"
    nothing.write_bytes(b"")
    empty = write(tmp_path / "empty.safetensors", [])
    folder = tmp_path / "folder"
    folder.mkdir()
    plain = tmp_path / "plain.tzip"
    tzip.pack(b"bytes", plain, name="bytes")
    target = tmp_path / "out.tzip"
    for base in (tmp_path / "missing", text, nothing, empty, folder, plain, [new, tmp_path / "missing"]):
        with pytest.raises(UsageError):
            tzip.pack(new, target, base=base)
        assert not list(tmp_path.glob("out.tzip*")), base
    assert run("pack", new, "-o", target, "--base", tmp_path / "missing").exit_code == 2
    assert not target.exists()
    archive = tmp_path / "good.tzip"
    tzip.pack(new, archive)
    broken = tmp_path / "broken.tzip"
    broken.write_bytes(archive.read_bytes()[:-50])
    with pytest.raises(CorruptError):
        tzip.pack(new, target, base=broken)
    assert not list(tmp_path.glob("out.tzip*"))


def test_a_file_does_not_lean_on_itself(tmp_path: Path, files: Any) -> None:
    """A folder of checkpoints that holds the one to pack: once that is removed, its archive must still be good."""
    old, _, _ = files
    data = old.read_bytes()
    archive = tmp_path / "step-1.tzip"
    for base in (old.parent, old):
        try:
            tzip.pack(old, archive, base=base, force=True)
        except UsageError:
            continue
        kept = old.rename(tmp_path / "gone")
        try:
            assert unpacked(archive) == data
        finally:
            kept.rename(old)


def test_an_archive_does_not_replace_its_base(tmp_path: Path, files: Any) -> None:
    old, new, data = files
    archive = tmp_path / "model.tzip"
    tzip.pack(old, archive)
    before = archive.read_bytes()
    with pytest.raises(UsageError):
        tzip.pack(new, archive, base=archive, force=True)
    assert archive.read_bytes() == before
    later = tmp_path / "later.tzip"
    tzip.pack(new, later, base=archive)
    with pytest.raises(UsageError):
        tzip.repack(later, archive, force=True)
    assert unpacked(later, base=archive) == data


def test_a_base_that_changes_while_it_is_used_for_packing(tmp_path: Path) -> None:
    """What was packed against bytes that the named base does not have could never be read."""
    raws = [weights(CHUNK_ELEMENTS + 5, i) for i in range(2)]
    base = write(tmp_path / "base.safetensors", [bf16(f"t{i}", r) for i, r in enumerate(raws)])
    good = base.read_bytes()
    data = safetensors_bytes([bf16(f"t{i}", moved(r)) for i, r in enumerate(raws)])
    bad = bytearray(good)
    for at in range(len(good) - 2 * 10_000, len(good), 2):
        bad[at] ^= 0x40
    told = []

    def change(n: int) -> None:
        if not told:
            base.write_bytes(bad)
        told.append(n)

    archive = tmp_path / "a.tzip"
    try:
        tzip.pack(data, archive, base=base, name="m.safetensors", threads=1, progress=change)
    except TzipError:
        assert not archive.exists()
        return
    assert told
    base.write_bytes(good)
    assert unpacked(archive, base=base) == data


def test_what_is_read_back_finds_its_base(files: Any, tmp_path: Path) -> None:
    old, new, data = files
    archive = tmp_path / "elsewhere" / "a.tzip"
    archive.parent.mkdir()
    tzip.pack(new, archive, base=old, verify_file=True)
    assert unpacked(archive, base=old) == data


# ---------------------------------------------------------------- which tensor


def test_renamed_tensors_are_matched_by_likeness(tmp_path: Path) -> None:
    raws = [weights(N, i) for i in range(4)]
    base = write(tmp_path / "base.safetensors", [bf16(f"old.{i}", r, 70) for i, r in enumerate(raws)])
    order = [2, 0, 3, 1]
    data = safetensors_bytes([bf16(f"new.{i}", moved(raws[k]), 70) for i, k in enumerate(order)])
    archive = pack(data, base)
    assert inputs(archive) == [f"old.{k}" for k in order]
    assert len(archive) < 0.02 * len(data)
    assert unpacked(archive, base=base) == data


def test_another_dtype_or_shape_falls_back(tmp_path: Path) -> None:
    cast, half, turned, raw = (weights(N, i) for i in range(4))
    base = write(
        tmp_path / "base.safetensors",
        [bf16("cast", cast), bf16("reshaped", half, 70), bf16("turned", turned, 100), bf16("same", raw)],
    )
    new = [("cast", "F16", [N], cast), bf16("reshaped", half, 100), bf16("turned", moved(turned)), bf16("same", moved(raw))]
    data = safetensors_bytes(new)
    archive = pack(data, base)
    assert inputs(archive) == ["same"]
    assert unpacked(archive, base=base) == data
    with tzip.open(archive) as opened:  # three of four need no base
        for name, _, _, content in new[:3]:
            assert opened.tensor(name).raw().tobytes() == content
        with pytest.raises(BaseNotFoundError):
            opened.tensor("same").raw()


@pytest.mark.parametrize("rows", [5, 900, 1000])
def test_a_vocabulary_that_grew_or_shrunk(rows: int, tmp_path: Path) -> None:
    """In runs of their own, over more than one chunk, and in bundles."""
    tables = {"large": 1300, "middle": 80, "small": 3}
    old, new = [], []
    for i, (name, row) in enumerate(tables.items()):
        raw = weights(950 * row, i)
        grown = moved((raw + weights(max(0, rows - 950) * row, 50 + i))[: 2 * rows * row])
        old += [bf16(name, raw, 950), bf16(f"{name} tail", weights(10, i))]
        new += [bf16(name, grown, rows), bf16(f"{name} tail", weights(10, i))]
    base = write(tmp_path / "base.safetensors", old)
    data = safetensors_bytes(new)
    archive = pack(data, base)
    assert set(tables) <= set(inputs(archive))
    if rows == 900:
        assert len(archive) < len(data) * 0.02
    assert unpacked(archive, base=base) == data
    with tzip.open(archive, base=base) as opened:
        for name, _, _, raw in new:
            assert opened.tensor(name).raw().tobytes() == raw


def test_tensors_that_came_and_went_and_other_shards(tmp_path: Path) -> None:
    raws = {f"layer.{i}": weights(N, i) for i in range(6)}
    tensors = [bf16(n, r) for n, r in raws.items()]
    old = tmp_path / "old"
    write(old / "model-1.safetensors", tensors[:2])
    write(old / "model-2.safetensors", [*tensors[2:], bf16("gone", weights(N, 70), 70)])
    new = tmp_path / "new"
    later = [bf16(n, moved(r)) for n, r in raws.items()]
    write(new / "a.safetensors", later[:4])
    write(new / "b.safetensors", [later[4], bf16("added", weights(N, 80), 100)])
    write(new / "c.safetensors", [later[5]])
    (new / "config.json").write_text("{}")
    for base in (old, _packed(old, tmp_path / "old.tzip")):
        archive = tmp_path / "out" / "new.tzip"
        archive.parent.mkdir(exist_ok=True)
        tzip.pack(new, archive, base=base, force=True)
        assert sorted(inputs(archive)) == sorted(raws)
        assert archive.stat().st_size < N * 2 * 0.9
        out = tmp_path / "restored"
        with pytest.raises(BaseNotFoundError):
            tzip.unpack(archive, out)
        assert not out.exists()
        tzip.unpack(archive, out, members=["new/config.json"])  # which needs no base
        assert (out / "new" / "config.json").read_text() == "{}"
        shutil.rmtree(out)
        tzip.unpack(archive, out, base=base)
        for path in new.iterdir():
            assert (out / "new" / path.name).read_bytes() == path.read_bytes()
        shutil.rmtree(out)


def _packed(source: Path, target: Path, **options: Any) -> Path:
    tzip.pack(source, target, **options)
    return target


def test_files_of_a_folder_lean_on_those_of_their_name(tmp_path: Path) -> None:
    """Two models in one folder often have tensors of the same names."""
    parts = ("first", "second")
    for i, part in enumerate(parts):
        raw = weights(N, i)
        write(tmp_path / "old" / part / "model.safetensors", [bf16("w", raw)])
        write(tmp_path / "new" / part / "model.safetensors", [bf16("w", moved(raw))])
    archive = tmp_path / "new.tzip"
    tzip.pack(tmp_path / "new", archive, base=tmp_path / "old")
    assert inputs(archive) == ["w", "w"]
    tzip.unpack(archive, tmp_path / "out", base=tmp_path / "old")
    for part in parts:
        name = Path("new") / part / "model.safetensors"
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / name).read_bytes()
    assert archive.stat().st_size < N * 0.1


def test_small_tensors_with_and_without_bases_share_bundles(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    old, new = [], []
    for i in range(120):
        n = int(rng.integers(1, 3000))
        raw = weights(n, i)
        kind = i % 4
        if kind != 3:
            old.append(bf16(f"t{i}", raw))
        new.append(bf16(f"t{i}", moved(raw, 0.05) if kind != 2 else noise(2 * n, i)))
        if i % 9 == 0:
            new.append((f"f{i}", "F32", [n], weights(n, i, "F32")))
    base = write(tmp_path / "base.safetensors", old)
    data = safetensors_bytes(new)
    archive = pack(data, base)
    found = set(inputs(archive))
    assert {f"t{i}" for i in range(0, 120, 4)} <= found
    assert not {f"t{i}" for i in range(3, 120, 4)} & found
    assert unpacked(archive, base=base) == data
    with tzip.open(archive) as opened:
        index = opened.reader.index
        assert index["r_width"].size <= 4
        names = list(opened)
        assert opened.tensor("t3").raw().tobytes() == {n: r for n, _, _, r in new}["t3"]
    with tzip.open(archive, base=base) as opened:
        for i in rng.permutation(len(names)).tolist():
            assert opened.tensor(new[i][0]).raw().tobytes() == new[i][3]


# ---------------------------------------------------------------- chains


def _chain(folder: Path, n: int, elements: int = N, level: str = "default") -> list[bytes]:
    """Archives step-0 … step-(n - 1), each leaning on the one before it; return what they hold."""
    folder.mkdir(parents=True, exist_ok=True)
    raw, held = weights(elements), []
    for i in range(n):
        data = safetensors_bytes([bf16("w", raw), bf16("b", weights(50, i))])
        base = folder / f"step-{i - 1}.safetensors.tzip" if i else None
        tzip.pack(data, folder / f"step-{i}.safetensors.tzip", base=base, name=f"step-{i}.safetensors", level=level, threads=1)
        held.append(data)
        raw = moved(raw, 0.02, i + 10)
    return held


def test_three_deep(tmp_path: Path) -> None:
    held = _chain(tmp_path / "c", 4)
    for i, data in enumerate(held):
        path = tmp_path / "c" / f"step-{i}.safetensors.tzip"
        assert len(inputs(path)) == (i > 0) * len(inputs(path))
        assert unpacked(path) == data
        tzip.verify(path, deep=True)
    # A sum of a file, not an archive, is what a link of the chain needs.
    tzip.unpack(tmp_path / "c" / "step-1.safetensors.tzip", tmp_path / "c")
    (tmp_path / "c" / "step-1.safetensors.tzip").unlink()
    (tmp_path / "c" / "step-0.safetensors.tzip").unlink()
    assert unpacked(tmp_path / "c" / "step-3.safetensors.tzip") == held[3]


def test_given_bases_serve_the_whole_chain(tmp_path: Path) -> None:
    held = _chain(tmp_path / "c", 4)
    places = []
    for i in range(4):
        path = tmp_path / f"place {i}" / f"step-{i}.safetensors.tzip"
        path.parent.mkdir()
        (tmp_path / "c" / path.name).rename(path)
        places.append(path)
    assert unpacked(places[1], base=places[0]) == held[1]
    assert unpacked(places[3], base=places[:3]) == held[3]
    data = safetensors_bytes([bf16("w", moved(weights(N)))])
    assert unpacked(pack(data, places[:3]), base=places[:3]) == data


def test_a_hole_in_a_chain_is_known_before_anything_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    _chain(folder, 4)
    (folder / "step-1.safetensors.tzip").rename(tmp_path / "away")
    out = tmp_path / "out"
    with pytest.raises(BaseNotFoundError, match=r"step-1\.safetensors"):
        tzip.unpack(folder / "step-3.safetensors.tzip", out)
    with pytest.raises(BaseNotFoundError), tzip.open(folder / "step-3.safetensors.tzip") as opened:
        opened.tensor("w").raw()
    with pytest.raises(BaseNotFoundError):
        tzip.verify(folder / "step-3.safetensors.tzip", deep=True)
    assert not out.exists()


def test_a_sound_copy_serves_where_another_has_a_hole(tmp_path: Path) -> None:
    """step-1 is there twice: as a difference from what is gone, and whole."""
    folder = tmp_path / "c"
    held = _chain(folder, 3)
    tzip.repack(folder / "step-1.safetensors.tzip", folder / "whole.tzip", keep_base=False)
    (folder / "step-0.safetensors.tzip").unlink()
    assert unpacked(folder / "step-2.safetensors.tzip") == held[2]


def test_archives_that_lean_on_each_other(tmp_path: Path) -> None:
    """No forgery is needed: each was made from the other's plain file, and both are gone."""
    raw = weights(N)
    plain = [write(tmp_path / f"{i}.safetensors", [bf16("w", moved(raw, 0.02, i))]) for i in range(3)]
    archives = [tmp_path / f"{i}.safetensors.tzip" for i in range(3)]
    for i in range(3):
        tzip.pack(plain[i], archives[i], base=plain[(i + 1) % 3])
    tzip.pack(plain[1], tmp_path / "again.tzip", base=plain[0], level="fast")
    held = [p.read_bytes() for p in plain]
    assert unpacked(archives[0]) == held[0]
    for path in plain:
        path.rename(path.with_suffix(".away"))
    for archive in (*archives, tmp_path / "again.tzip"):
        with pytest.raises(BaseNotFoundError):
            unpacked(archive)
        with pytest.raises(BaseNotFoundError):
            tzip.verify(archive, deep=True)
        tzip.verify(archive)
        assert ok("ls", archive).stdout
    # One of the files is enough.
    plain[2].with_suffix(".away").rename(plain[2])
    for i in (0, 1):
        assert unpacked(archives[i]) == held[i]


def test_an_archive_that_claims_to_hold_its_own_base(tmp_path: Path) -> None:
    old = write(tmp_path / "old.safetensors", [bf16("w", weights(N))])
    data = old.read_bytes()
    archive = tmp_path / "a.tzip"
    tzip.pack(data, archive, base=old, name="old.safetensors")
    assert unpacked(archive) == data
    old.unlink()
    for base in (None, archive, tmp_path):
        with pytest.raises(BaseNotFoundError):
            unpacked(archive, base=base)


def test_a_chain_has_at_most_64_archives(tmp_path: Path) -> None:
    """What is packed can be read; what would be too long is refused when it is packed."""
    folder = tmp_path / "c"
    folder.mkdir()
    raw, before = weights(3000), None
    made = 0
    for i in range(70):
        data = safetensors_bytes([bf16("w", raw)])
        target = folder / f"{i}.safetensors.tzip"
        try:
            tzip.pack(data, target, base=before, name=f"{i}.safetensors", threads=1)
        except CorruptError:
            assert not target.exists()
            break
        made = i + 1
        raw, before = moved(raw, 0.02, i), target
    assert 60 < made < 70
    for i in (made // 2, made - 2, made - 1):
        assert len(unpacked(folder / f"{i}.safetensors.tzip")) == len(data)


def test_too_long_a_chain_that_somebody_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "c"
    held = _chain(folder, 8, 3000)
    assert unpacked(folder / "step-7.safetensors.tzip") == held[7]
    monkeypatch.setattr(bases, "MAX_DEPTH", 4)
    with pytest.raises(CorruptError, match="lean on each other"):
        unpacked(folder / "step-7.safetensors.tzip")
    assert unpacked(folder / "step-3.safetensors.tzip") == held[3]


def test_a_chain_whose_names_say_nothing(tmp_path: Path) -> None:
    """Every file was called model.safetensors: content alone tells, and few files are held open for it."""
    resource = pytest.importorskip("resource")
    folder = tmp_path / "c"
    folder.mkdir()
    raw = weights(2000)
    for i in range(24):
        data = safetensors_bytes([bf16("w", raw)])
        base = folder / f"{i - 1:03}.tzip" if i else None
        tzip.pack(data, folder / f"{i:03}.tzip", base=base, name="model.safetensors", threads=1)
        raw = moved(raw, 0.02, i)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (160, hard))
    try:
        assert unpacked(folder / "023.tzip") == data
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ---------------------------------------------------------------- parts, threads, scratch memory


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Every chunk that is decoded: (file, run, chunk)."""
    seen: list[tuple[str, int, int]] = []
    decode = Archive.decode_chunk

    def counting(self: Archive, run: int, chunk: int, out: Any = None) -> Any:
        seen.append((Path(self.reader.source.name).name, run, chunk))
        return decode(self, run, chunk, out)

    monkeypatch.setattr(Archive, "decode_chunk", counting)
    return seen


def test_a_slice_decodes_its_chunks_and_those_of_the_base(tmp_path: Path, counted: list[tuple[str, int, int]]) -> None:
    rows, row = 3000, 1024
    raw = weights(rows * row)
    later = moved(raw, 0.05)
    old = write(tmp_path / "old.safetensors", [bf16("w", raw, rows)])
    tzip.pack(old, tmp_path / "old.tzip")
    new = tmp_path / "new.tzip"
    tzip.pack(safetensors_bytes([bf16("w", later, rows)]), new, base=tmp_path / "old.tzip", name="new.safetensors")
    old.unlink()
    with tzip.open(new) as opened:
        tensor = opened.tensor("w")
        parts = ((0, 5, {0}), (1020, 1030, {0, 1}), (1024, 1025, {1}), (2999, 3000, {2}), (1500, 2100, {1, 2}))
        for low, high, chunks in parts:
            counted.clear()
            assert tensor[low:high].tobytes() == later[2 * row * low : 2 * row * high]
            assert sorted(counted) == sorted((name, 0, c) for name in ("new.tzip", "old.tzip") for c in chunks)
        counted.clear()
        assert tensor[-1].tobytes() == later[-2 * row :]
        assert tensor[5:5].tobytes() == b""
        assert sorted(counted) == [("new.tzip", 0, 2), ("old.tzip", 0, 2)]
        step = tensor[10:2500:600]
        assert step.tobytes() == b"".join(later[2 * row * i : 2 * row * (i + 1)] for i in range(10, 2500, 600))


def _mixed(tmp_path: Path) -> tuple[Path, list[tuple[Path, dict[str, bytes]]]]:
    """A chain of three archives of all codings, deltas and others, large and small; where they are and what they hold."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    made: list[tuple[Path, dict[str, bytes]]] = []
    now: dict[str, tuple[str, bytes]] = {}
    for i, (name, n) in enumerate((("BF16", 1_100_000), ("F32", 270_000), ("U8", 300_000), ("F16", 70_000), ("I64", 66_000))):
        now[f"{name} large"] = name, _plain(BY_NAME[name], n, np.random.default_rng(i)).tobytes()
        now[f"{name} small"] = name, _plain(BY_NAME[name], 3000 + i, np.random.default_rng(90 + i)).tobytes()
    for step in range(3):
        if step:
            for key, (name, raw) in list(now.items()):
                now[key] = name, moved(raw, 0.2 if "U8" not in key else 0.02, step, BY_NAME[name].width)
        now[f"plain {step}"] = "F32", weights(68_000, step, "F32")
        now[f"noise {step}"] = "BF16", noise(2 * 70_000, step)
        tensors = [_entry(key, BY_NAME[name], raw) for key, (name, raw) in now.items()]
        path = folder / f"{step}.safetensors.tzip"
        base = made[-1][0] if made else None
        level = "best" if step == 1 else "default"
        tzip.pack(safetensors_bytes(tensors), path, base=base, name=f"{step}.safetensors", level=level)
        made.append((path, {key: raw for key, (_, raw) in now.items()}))
    return folder, made


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, dict[str, bytes]]]:
    return _mixed(tmp_path_factory.mktemp("mixed"))[1]


def test_interleaved_reads_in_one_thread(mixed: list[tuple[Path, dict[str, bytes]]]) -> None:
    """Bases are decoded in the scratch memory of the thread that decodes what leans on them."""
    assert deltas(mixed[2][0]) > 5
    rng = np.random.default_rng(8)
    kept = []
    opened = [tzip.open(path) for path, _ in mixed]
    try:
        for _ in range(60):
            step = int(rng.integers(0, 3))
            held = mixed[step][1]
            name = list(held)[int(rng.integers(0, len(held)))]
            low, high = sorted(int(v) for v in rng.integers(0, len(held[name]) + 1, 2))
            if rng.random() < 0.4:
                low, high = 0, len(held[name])
            view = opened[step].tensor(name)
            part = opened[step].tensor_bytes(view._row, low, high, 1)
            assert part.tobytes() == held[name][low:high], (step, name, low, high)
            kept.append((part, held[name][low:high]))
    finally:
        for archive in opened:
            archive.close()
    for part, expected in kept:  # nothing that was given out is written again
        assert part.tobytes() == expected


def test_reads_between_the_parts_of_a_stream(mixed: list[tuple[Path, dict[str, bytes]]]) -> None:
    path, held = mixed[2]
    whole = unpacked(path)
    names = list(held)
    with tzip.open(path) as opened, Workers(1) as workers:
        assert hashlib.sha256(whole).hexdigest() == opened.members()[0].sha256
        parts = []
        for i, part in enumerate(opened.checked_stream(0, workers)):
            name = names[i % len(names)]
            assert opened.tensor(name).raw().tobytes() == held[name]
            parts.append(part)
    assert b"".join(p.tobytes() for p in parts) == whole


def test_eight_threads_read_one_archive(mixed: list[tuple[Path, dict[str, bytes]]]) -> None:
    path, held = mixed[2]
    names = [n for n in held for _ in range(2)]
    with tzip.open(path) as opened, ThreadPoolExecutor(8) as pool:
        got = pool.map(lambda n: (n, opened.tensor(n).raw(threads=2).tobytes()), names)
        for name, raw in got:
            assert raw == held[name], name


def test_packing_against_a_chain_with_threads(mixed: list[tuple[Path, dict[str, bytes]]], tmp_path: Path) -> None:
    path, held = mixed[2]
    data = unpacked(path, threads=3)
    changed = bytearray(data)
    changed[-100_000::50] = bytes(b ^ 1 for b in changed[-100_000::50])
    for threads in (1, 4):
        archive = pack(bytes(changed), path, threads=threads)
        assert len(inputs(archive)) >= len(held) - 4
        assert unpacked(archive, base=path, threads=threads) == bytes(changed)


def test_room_that_is_not_aligned(mixed: list[tuple[Path, dict[str, bytes]]]) -> None:
    path, held = mixed[2]
    with tzip.open(path) as opened:
        for lead in (1, 3):
            for name in ("BF16 large", "F32 large", "I64 large", "F16 small"):
                room = np.zeros(len(held[name]) + lead, np.uint8)
                opened.read_into([(opened.tensor(name)._row, 0, room[lead:])], 1)
                assert room[lead:].tobytes() == held[name]


# ---------------------------------------------------------------- damage


def test_a_base_cut_off_or_changed_while_open(tmp_path: Path) -> None:
    raws = [weights(CHUNK_ELEMENTS, i) for i in range(3)]
    base = write(tmp_path / "base.safetensors", [bf16(f"t{i}", r) for i, r in enumerate(raws)])
    good = base.read_bytes()
    data = [moved(r, (0.02, 0.2, 0.0)[i]) for i, r in enumerate(raws)]
    archive = tmp_path / "a.tzip"
    tzip.pack(safetensors_bytes([bf16(f"t{i}", r) for i, r in enumerate(data)]), archive, base=base, name="m.safetensors")
    bad = bytearray(good)
    bad[-1 :: -2 * CHUNK_ELEMENTS] = bytes(b ^ 1 for b in bad[-1 :: -2 * CHUNK_ELEMENTS])
    for content in (good[:-1], good[:1000], b"", bytes(bad)):
        with tzip.open(archive) as opened:
            assert opened.tensor("t0")[:100].tobytes() == data[0][:200]
            base.write_bytes(content)  # the same file, open meanwhile
            for i in range(3):
                if content == good[:-1] and i < 2:
                    assert opened.tensor(f"t{i}").raw().tobytes() == data[i]
                    continue
                with pytest.raises((BaseNotFoundError, CorruptError)) as error:
                    opened.tensor(f"t{i}").raw()
                assert str(archive) in str(error.value) or str(base) in str(error.value)
                assert error.value.tensor == f"t{i}"
        with pytest.raises(BaseNotFoundError):  # opened anew, it is another file
            unpacked(archive)
        base.write_bytes(good)
    assert unpacked(archive, base=base) == safetensors_bytes([bf16(f"t{i}", r) for i, r in enumerate(data)])


def _small_pair(tmp_path: Path) -> tuple[Path, Path, dict[str, bytes]]:
    """Two archives of a kilobyte or two, one leaning on the other, with masks, classes and a bundle."""
    rng = np.random.default_rng(4)
    few = (0x3C00 + rng.integers(0, 3, 70_000)).astype("<u2").tobytes()
    old = [bf16("few", few), bf16("w", weights(900)), bf16("v", weights(300, 2)), ("i", "I32", [100], bytes(400))]
    new = [
        bf16("few", moved(few, 0.001)),
        bf16("w", moved(weights(900), 0.3)),
        bf16("v", moved(weights(300, 2), 0.02)),
        ("i", "I32", [100], moved(bytes(400), 0.5, width=4)),
    ]
    base, archive = tmp_path / "base.tzip", tmp_path / "new.tzip"
    tzip.pack(safetensors_bytes(old), base, name="base.safetensors")
    tzip.pack(safetensors_bytes(new), archive, base=base, name="new.safetensors")
    return base, archive, {name: raw for name, _, _, raw in new}


def _read_all(archive: Any, base: Any, held: dict[str, bytes]) -> int:
    """How many tensors are refused; the others are right, bit by bit."""
    try:
        opened = tzip.open(archive, base=base)
    except TzipError:
        return len(held)
    refused = 0
    with opened:
        for name, raw in held.items():
            try:
                got = opened.tensor(name).raw().tobytes()
            except TzipError:
                refused += 1
            else:
                assert got == raw, name
    return refused


def test_no_damage_gives_a_wrong_byte(tmp_path: Path) -> None:
    base, archive, held = _small_pair(tmp_path)
    assert sorted(inputs(archive)) == sorted(held)
    assert deltas(archive) >= 2
    good = archive.read_bytes()
    assert _read_all(good, base, held) == 0
    refused = 0
    for at in range(0, len(good), 3):
        bad = bytearray(good)
        bad[at] ^= 1 << at % 8
        refused += _read_all(bytes(bad), base, held)
    assert refused > len(good) // 3
    for size in range(0, len(good), 97):
        assert _read_all(good[:size], base, held) == len(held)


def test_no_damage_of_the_base_gives_a_wrong_byte(tmp_path: Path) -> None:
    base, archive, held = _small_pair(tmp_path)
    good = base.read_bytes()
    place = tmp_path / "damaged.tzip"
    refused = 0
    places = range(0, len(good), 1 + len(good) // 300)
    for at in places:
        bad = bytearray(good)
        bad[at] ^= 1 << at % 8
        place.write_bytes(bad)
        refused += _read_all(archive.read_bytes(), place, held) > 0
    assert refused > len(places) // 2
    place.write_bytes(good[: len(good) // 2])
    assert _read_all(archive.read_bytes(), place, held) == len(held) - 1  # one is smaller alone, and needs no base


def _with_check(record: bytearray) -> bytes:
    record[8:16] = sum64(np.frombuffer(bytes(record[16:]), np.uint8)).to_bytes(8, "little")
    return bytes(record)


@pytest.mark.parametrize(("coding", "width"), [("bf16", 2), ("f32", 4), ("planes", 1), ("planes", 8)])
@pytest.mark.parametrize("share", [0.0, 0.03, 0.5])
def test_forged_records_with_good_checks_are_refused(share: float, coding: str, width: int) -> None:
    """Transform header, class sizes, entries, mask and payloads, each bit of which somebody may set."""
    dtype = next(d for d in BY_NAME.values() if d.coding == coding and d.width == width)
    rng = np.random.default_rng(6)
    n = 5000
    base = _plain(dtype, n, rng)
    new = np.where(rng.random(n) < share, base + WORD[width](1), base).astype(WORD[width])
    earlier, raw = base.view(np.uint8), new.view(np.uint8)
    good = _forced(raw, width, coding, "default", earlier)
    assert _decoded(good, n, width, earlier) == raw.tobytes()
    head = min(len(good), 400)
    places = [(at, bit) for at in range(16, head) for bit in range(8)]
    places += [(at, at % 8) for at in range(head, len(good), 1 + (len(good) - head) // 200)]
    refused = 0
    for at, bit in places:
        bad = bytearray(good)
        bad[at] ^= 1 << bit
        try:
            assert _decoded(_with_check(bad), n, width, earlier) == raw.tobytes(), (at, bit)
        except TzipError:
            refused += 1
    assert refused > 0.8 * len(places)


def test_forged_class_sizes_that_add_up() -> None:
    """As many elements in all, but of other classes than the base has: the kernels must not be asked."""
    n = 5000
    base = _plain(BY_NAME["BF16"], n, np.random.default_rng(1))
    new = (base + np.uint16(1)).astype(np.uint16)
    good = _forced(new.view(np.uint8), 2, "bf16", "default", base.view(np.uint8))
    sizes = np.frombuffer(good[112:144], "<u4")
    assert int(sizes.sum()) == n
    used = np.flatnonzero(sizes > 1)
    assert used.size > 2
    for a in used.tolist():
        for b in used.tolist():
            if a == b:
                continue
            bad = bytearray(good)
            moved_sizes = sizes.copy()
            moved_sizes[a] -= 1
            moved_sizes[b] += 1
            bad[112:144] = moved_sizes.astype("<u4").tobytes()
            with pytest.raises(CorruptError):
                _decoded(_with_check(bad), n, 2, base.view(np.uint8))


# ---------------------------------------------------------------- the other verbs


def test_listings_need_no_base(files: Any, tmp_path: Path) -> None:
    old, new, _ = files
    archive = tmp_path / "a" / "a.tzip"
    archive.parent.mkdir()
    tzip.pack(new, archive, base=old)
    text = ok("ls", archive).stdout
    assert "t0" in text
    assert "step-2.safetensors" in text
    listed = json.loads(ok("ls", archive, "--json").stdout)
    assert {t["name"] for t in listed["tensors"]} == {"t0", "t1", "s0", "s1", "s2", "s3"}
    assert "delta" in ok("info", archive).stdout
    told = json.loads(ok("info", archive, "--json").stdout)
    assert sum(row["chunks"] for row in told["transforms"] if row["transform"] == "delta") == deltas(archive) > 1
    with tzip.open(archive) as opened:
        assert opened.shapes[0] == (N,)
        assert opened.tensor("t0").nbytes == 2 * N
        assert opened.tensors()[0].stored < N // 5
    assert tzip.verify(archive).chunks == 3
    with pytest.raises(BaseNotFoundError):
        tzip.verify(archive, deep=True)
    assert tzip.verify(archive, deep=True, base=old).members == 1


def test_a_missing_base_is_exit_code_10(files: Any, tmp_path: Path) -> None:
    old, new, data = files
    archive = tmp_path / "a" / "a.tzip"
    archive.parent.mkdir()
    ok("pack", new, "-o", archive, "--base", old)
    assert inputs(archive)
    out = tmp_path / "out"
    sha = hashlib.sha256(old.read_bytes()).hexdigest()
    for args in (
        ("unpack", archive, "-o", out),
        ("verify", archive, "--deep"),
        ("cat", archive, "t0", "--raw", "-o", out),
        ("repack", archive, "-o", out),
        ("repack", archive, "-o", out, "--no-base"),
    ):
        message = fails(10, *args)
        assert message.startswith("tzip: ")
        assert sha in message
        assert "step-1.safetensors" in message
        assert "Traceback" not in message
        assert not out.exists()
    ok("unpack", archive, "-o", out, "--base", old)
    assert (out / "step-2.safetensors").read_bytes() == data
    ok("verify", archive, "--deep", "--base", old.parent, "-q")
    ok("cat", archive, "t0", "--raw", "-o", tmp_path / "t0", "--base", old)
    assert (tmp_path / "t0").read_bytes() == moved(weights(N, 0))
    ok("cat", archive, "t1", "--raw", "-o", tmp_path / "t1", "-b", tmp_path / "out", "-b", old)
    assert (tmp_path / "t1").read_bytes() == moved(weights(N, 1))
    assert issubclass(BaseNotFoundError, TzipError)
    assert BaseNotFoundError.exit_code == 10


def test_a_base_that_is_not_there_is_wrong_use_of_every_verb(files: Any, tmp_path: Path) -> None:
    old, new, _ = files
    archive = tmp_path / "a.tzip"
    tzip.pack(new, archive, base=old)
    missing, out = tmp_path / "missing", tmp_path / "out"
    for args in (
        ("unpack", archive, "-o", out),
        ("verify", archive, "--deep"),
        ("cat", archive, "t0", "--raw", "-o", out),
        ("repack", archive, "-o", out),
        ("recover", archive, "-o", out),
    ):
        assert str(missing) in fails(2, *args, "--base", missing), args
        assert not out.exists()
    with pytest.raises(UsageError), tzip.open(archive, base=missing) as opened:
        opened.tensor("t0").raw()


def test_unpacking_over_the_base(files: Any, tmp_path: Path) -> None:
    old, new, data = files
    folder = tmp_path / "models"
    folder.mkdir()
    shutil.copy(old, folder / "model.safetensors")
    later = new.rename(new.with_name("model.safetensors"))
    archive = tmp_path / "a.tzip"
    tzip.pack(later, archive, base=folder / "model.safetensors")
    tzip.unpack(archive, folder, base=folder, force=True)
    assert (folder / "model.safetensors").read_bytes() == data
    with pytest.raises(BaseNotFoundError):
        tzip.unpack(archive, folder, base=folder, force=True)
    assert (folder / "model.safetensors").read_bytes() == data


def test_repacking_keeps_the_base_or_does_without(files: Any, tmp_path: Path) -> None:
    old, new, data = files
    archive = tmp_path / "a.tzip"
    tzip.pack(new, archive, base=old)
    sha = hashlib.sha256(data).hexdigest()
    for level in ("fast", "default", "best"):
        kept, alone = tmp_path / f"kept-{level}.tzip", tmp_path / f"alone-{level}.tzip"
        tzip.repack(archive, kept, level=level, base=old)
        ok("repack", archive, "-o", alone, "--no-base", "--level", level, "--base", old)
        assert len(inputs(kept)) == 6
        assert inputs(alone) == []
        assert unpacked(alone) == data
        with pytest.raises(BaseNotFoundError):
            unpacked(kept)
        assert unpacked(kept, base=old) == data
        assert alone.stat().st_size > 5 * kept.stat().st_size
        for path in (kept, alone):
            with tzip.open(path) as opened:
                assert [m.sha256 for m in opened.members()] == [sha]
                assert opened.members()[0].mtime_ns == os.stat(new).st_mtime_ns
    # A repacked archive can be repacked again, with an archive for its base.
    tzip.pack(old, tmp_path / "old.tzip")
    tzip.repack(tmp_path / "kept-fast.tzip", tmp_path / "again.tzip")
    assert len(inputs(tmp_path / "again.tzip")) == 6
    assert unpacked(tmp_path / "again.tzip") == data


def test_repacking_a_folder_with_several_bases(tmp_path: Path) -> None:
    for part in "ab":
        raw = weights(N, ord(part))
        write(tmp_path / "old" / f"{part}.safetensors", [bf16(f"{part}.w", raw), bf16(f"{part}.s", raw[:600])])
        write(tmp_path / "new" / f"{part}.safetensors", [bf16(f"{part}.w", moved(raw)), bf16(f"{part}.s", raw[:600])])
    (tmp_path / "new" / "note.txt").write_text("x" * 9000)
    archive, again = tmp_path / "new.tzip", tmp_path / "again.tzip"
    tzip.pack(tmp_path / "new", archive, base=[tmp_path / "old" / "b.safetensors", tmp_path / "old" / "a.safetensors"])
    with tzip.open(archive, base=tmp_path / "old") as opened:
        assert opened.find_bases() == sorted(str(tmp_path / "old" / f"{p}.safetensors") for p in "ab")
    tzip.repack(archive, again, level="fast", base=tmp_path)
    for path in (archive, again):
        assert sorted(inputs(path)) == ["a.s", "a.w", "b.s", "b.w"]
        out = tmp_path / f"out {path.stem}"
        tzip.unpack(path, out, base=tmp_path / "old")
        for file in (tmp_path / "new").iterdir():
            assert (out / "new" / file.name).read_bytes() == file.read_bytes()


def test_recovering_with_and_without_the_base(tmp_path: Path) -> None:
    raw = weights(N)
    base = write(tmp_path / "old" / "old.safetensors", [bf16("w", raw), bf16("x", weights(N, 1))])
    tensors = [bf16("w", moved(raw)), bf16("x", moved(weights(N, 1))), bf16("new", weights(N, 5), 70)]
    new = write(tmp_path / "in" / "m.safetensors", tensors)
    archive = tmp_path / "a" / "a.tzip"
    archive.parent.mkdir()
    tzip.pack(new, archive, base=base)
    assert sorted(inputs(archive)) == ["w", "x"]
    data, good = new.read_bytes(), archive.read_bytes()
    headless = good[: -80 - 16]  # no footer, no index
    for content, found in ((good, True), (headless, False)):
        archive.write_bytes(content)
        out = tmp_path / f"with {found}"
        report = tzip.recover(archive, out, base=base)
        assert report.index_found is found
        assert report.whole == ["m.safetensors"]
        assert not report.lost
        assert (out / "m.safetensors").read_bytes() == data
        out = tmp_path / f"without {found}"
        report = tzip.recover(archive, out)
        assert report.whole == []
        assert report.tensors == {"m.safetensors": ["new"]}
        assert any("base" in line for line in report.lost)
        saved = load_file(out / "m.safetensors.recovered.safetensors")
        assert {k: v.tobytes() for k, v in saved.items()} == {"new": tensors[2][3]}
    # A damaged chunk: the other delta is saved when the base is there.
    with tzip.open(good) as opened:
        offset = int(opened.reader.index["c_offset"][0])
    archive.write_bytes(good[: offset + 60] + bytes([good[offset + 60] ^ 1]) + good[offset + 61 :])
    report = tzip.recover(archive, tmp_path / "damaged", base=base)
    assert report.tensors == {"m.safetensors": ["x", "new"]}
    saved = load_file(tmp_path / "damaged" / "m.safetensors.recovered.safetensors")
    assert {k: v.tobytes() for k, v in saved.items()} == {"x": tensors[1][3], "new": tensors[2][3]}
    assert run("recover", archive, "-o", tmp_path / "by hand", "--base", base).exit_code == 3


def test_recovering_closes_what_it_opened(files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, _ = files
    tzip.pack(new, tmp_path / "a.tzip", base=old)
    opened = []
    open_source = bases.open_source

    def remember(path: Any) -> Any:
        opened.append(open_source(path))
        return opened[-1]

    monkeypatch.setattr(bases, "open_source", remember)
    assert tzip.recover(tmp_path / "a.tzip", tmp_path / "out", base=old).whole == ["step-2.safetensors"]
    assert opened
    assert all(source.file.closed for source in opened)


class _Stop(Exception):
    pass


def test_packing_goes_on_where_it_stopped(tmp_path: Path) -> None:
    raws = [weights(N, i) for i in range(6)]
    base = write(tmp_path / "old.safetensors", [bf16(f"t{i}", r) for i, r in enumerate(raws)])
    new = write(tmp_path / "new.safetensors", [bf16(f"t{i}", moved(r)) for i, r in enumerate(raws)])
    whole = tmp_path / "whole.tzip"
    tzip.pack(new, whole, base=base)
    assert len(inputs(whole)) == 6
    target = tmp_path / "a.tzip"

    def stop(after: int, **options: Any) -> None:
        done = []

        def progress(n: int) -> None:
            done.append(n)
            if len(done) > after:
                raise _Stop

        with pytest.raises(_Stop):
            tzip.pack(new, target, resume=True, progress=progress, threads=1, **options)
        assert not target.exists()
        assert len(list(tmp_path.glob("a.tzip*"))) == 1

    for after in (0, 2, 4):
        stop(after, base=base)
        tzip.pack(new, target, base=base, resume=True)
        assert target.read_bytes() == whole.read_bytes()
        target.unlink()
    # What was begun with another base, or none, is not gone on with.
    other = write(tmp_path / "other.safetensors", [bf16(f"t{i}", moved(r, 0.5, 9)) for i, r in enumerate(raws)])
    for begun in ({"base": other}, {}):
        stop(3, **begun)
        tzip.pack(new, target, base=base, resume=True)
        assert target.read_bytes() == whole.read_bytes()
        target.unlink()
    stop(3, base=base)
    tzip.pack(new, target, resume=True)
    assert inputs(target) == []
    assert unpacked(target) == new.read_bytes()


def test_the_loader_reads_differences(files: Any, tmp_path: Path) -> None:
    old, new, _ = files
    archive = old.parent / "step-2.tzip"
    tzip.pack(new, archive, base=old)
    expected = {f"t{i}": moved(weights(N, i)) for i in range(2)} | {f"s{i}": weights(500, 10 + i) for i in range(4)}
    with safe_open(archive, framework="np") as f:
        assert sorted(f.keys()) == sorted(expected)
        for name, raw in expected.items():
            assert f.get_tensor(name).tobytes() == raw
        assert f.get_slice("t0")[100:200].tobytes() == expected["t0"][200:400]
    assert {k: v.tobytes() for k, v in load_file(archive).items()} == expected
    away = tmp_path / "away"
    old.rename(away)
    with safe_open(archive, framework="np") as f:
        assert f.get_slice("t0").get_shape() == [N]
        for read in (lambda: f.get_tensor("t0"), lambda: f.get_slice("t1")[:5], lambda: f.get_tensor("s0")):
            with pytest.raises(SafetensorError) as error:
                read()
            assert isinstance(error.value, BaseNotFoundError)
    with pytest.raises(SafetensorError) as error:
        load_file(archive)
    assert isinstance(error.value, BaseNotFoundError)


def test_the_loader_reads_a_difference_from_what_was_packed_in_place(files: Any) -> None:
    old, new, _ = files
    tzip.pack_in_place([old])
    archive = old.parent / "step-2.tzip"
    tzip.pack(new, archive, base=old)
    assert load_file(archive)["t1"].tobytes() == moved(weights(N, 1))
    assert load_file(old)["t1"].tobytes() == weights(N, 1)


def test_every_way_of_packing_takes_a_base(files: Any, tmp_path: Path) -> None:
    old, new, data = files
    result = CliRunner().invoke(
        cli, ["pack", "-", "--name", "m.safetensors", "-o", str(tmp_path / "p.tzip"), "--base", str(old), "-q"], input=data
    )
    assert result.exit_code == 0, result.output
    ok("pack", new.parent, "--each", "-o", tmp_path / "each", "--base", old, "--base", new)
    each = tmp_path / "each" / "new" / "step-2.safetensors.tzip"
    assert each.exists()
    assert inputs(tmp_path / "p.tzip")
    for archive in (tmp_path / "p.tzip", each):
        assert unpacked(archive, base=old) == data
    assert run("pack", "--in-place", new, "--base", old).exit_code == 2
    assert new.read_bytes() == data


# ---------------------------------------------------------------- diff


def test_what_changed(tmp_path: Path) -> None:
    raw = weights(N)
    words = np.frombuffer(raw, "<u2").copy()
    words[:700] ^= 0x8000
    old = [
        bf16("same", raw),
        bf16("some", raw),
        bf16("gone", raw[:20]),
        bf16("shape", raw, 70),
        bf16("type", raw[:200]),
        ("i", "I32", [4], np.array([1, 2, 3, 4], "<i4").tobytes()),
        ("none", "F32", [0], b""),
        ("f", "F32", [3], np.array([3, 0, 4], "<f4").tobytes()),
        ("nan", "F32", [2], np.array([1, 2], "<f4").tobytes()),
        ("c", "C64", [1], np.array([3 + 4j], "<c8").tobytes()),
    ]
    new = [
        ("c", "C64", [1], np.array([3 - 8j], "<c8").tobytes()),
        bf16("came", raw[:40]),
        bf16("some", words.tobytes()),
        bf16("same", raw),
        bf16("shape", raw, 100),
        ("type", "F16", [100], raw[:200]),
        ("i", "I32", [4], np.array([1, 2, 3, 5], "<i4").tobytes()),
        ("none", "F32", [0], b""),
        ("f", "F32", [3], np.array([3, 12, -1], "<f4").tobytes()),
        ("nan", "F32", [2], np.array([1, np.nan], "<f4").tobytes()),
    ]
    a, b = write(tmp_path / "a.safetensors", old), write(tmp_path / "b.safetensors", new)
    packed_a, packed_b = _packed(a, tmp_path / "a.tzip"), _packed(b, tmp_path / "b.tzip", base=a)
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(b, folder)
    for x, y in ((a, b), (packed_a, packed_b), (a, packed_b), (packed_a, b), (str(a), folder)):
        found = {d.name: d for d in tzip.diff(x, y)}
        assert [d.name for d in tzip.diff(x, y)][-1] == "gone"
        assert {n: d.state for n, d in found.items()} == {
            "same": "equal",
            "some": "changed",
            "gone": "removed",
            "came": "added",
            "shape": "other",
            "type": "other",
            "i": "changed",
            "none": "equal",
            "f": "changed",
            "nan": "changed",
            "c": "changed",
        }
        assert (found["same"].equal, found["same"].bits) == (1.0, 0.0)
        assert found["some"].equal == 1 - 700 / N
        values = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
        assert math.isclose(found["some"].norm, 2 * np.linalg.norm(values[:700]))
        assert math.isclose(found["some"].old_norm, np.linalg.norm(values))
        assert 0 < found["some"].bits < 0.5
        assert (found["i"].equal, found["i"].norm, found["i"].old_norm) == (0.75, None, None)
        assert (found["f"].norm, found["f"].old_norm, found["f"].equal) == (13.0, 5.0, 1 / 3)
        assert math.isnan(found["nan"].norm)
        assert math.isclose(found["nan"].old_norm, math.sqrt(5))
        assert (found["c"].norm, found["c"].old_norm, found["c"].equal) == (12.0, 5.0, 0.5)
        assert (found["type"].dtype, found["type"].shape) == ("F16", (100,))
        assert (found["shape"].shape, found["gone"].shape) == ((100, 700), (10,))
    for lines in (ok("diff", a, packed_b).stdout.splitlines(),):
        assert len(lines) == 1 + len(found)
        assert lines[0].startswith("state")


def test_differences_as_json(tmp_path: Path) -> None:
    a = write(tmp_path / "a.safetensors", [("x", "F32", [2], np.array([1, 2], "<f4").tobytes()), bf16("y", weights(9))])
    b = write(tmp_path / "b.safetensors", [("x", "F32", [2], np.array([1, 5], "<f4").tobytes()), bf16("y", weights(9))])
    rows = json.loads(ok("diff", a, b, "--json").stdout)
    assert [(r["name"], r["state"], r["shape"]) for r in rows] == [("x", "changed", [2]), ("y", "equal", [9])]
    assert [r["equal"] for r in rows] == [0.5, 1.0]
    assert rows[0]["norm"] == 3.0
    missing = write(tmp_path / "empty.safetensors", [])
    assert fails(2, "diff", a, missing)
    assert fails(2, "diff", tmp_path / "nowhere", a)
    with pytest.raises(UsageError):
        tzip.diff(a.read_bytes(), b)


def test_differences_of_an_archive_whose_base_is_missing(files: Any, tmp_path: Path) -> None:
    old, new, _ = files
    archive = tmp_path / "n" / "n.tzip"
    archive.parent.mkdir()
    tzip.pack(new, archive, base=old)
    other = write(tmp_path / "p" / "other.safetensors", [bf16("t0", weights(N, 7))])
    with pytest.raises(BaseNotFoundError):
        tzip.diff(other, archive)
    assert "SHA-256" in fails(10, "diff", other, archive)


@pytest.mark.parametrize(
    ("name", "quiet", "loud"), [("F32", 0x7FC00001, 0x7F800001), ("F16", 0x7E01, 0x7C01), ("BF16", 0x7FC1, 0x7F81)]
)
def test_differences_of_nans_and_infinities(name: str, quiet: int, loud: int, tmp_path: Path) -> None:
    """Signalling NaNs and infinities are values like others: no warning, no wrong state."""
    word = WORD[BY_NAME[name].width]
    infinity = word(loud) & word(~np.uint64(1) & np.uint64(2 ** (8 * word().itemsize) - 1))
    x, y = np.array([quiet, loud, infinity, 0], word), np.array([loud, loud, infinity, 1], word)
    a = write(tmp_path / "a.safetensors", [(n, name, [4], x.tobytes()) for n in ("w", "v")])
    b = write(tmp_path / "b.safetensors", [("w", name, [4], y.tobytes()), ("v", name, [4], x.tobytes())])
    found = {d.name: d for d in tzip.diff(a, b)}
    assert found["v"].state == "equal"
    assert found["w"].state == "changed"
    assert found["w"].equal == 0.5
    assert math.isnan(found["w"].norm)
    assert math.isnan(found["w"].old_norm)


def test_norms_that_are_no_numbers_are_json(tmp_path: Path) -> None:
    a = write(tmp_path / "a.safetensors", [("x", "F32", [2], np.array([1, np.nan], "<f4").tobytes())])
    b = write(tmp_path / "b.safetensors", [("x", "F32", [2], np.array([np.inf, 2], "<f4").tobytes())])

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    rows = json.loads(ok("diff", a, b, "--json").stdout, parse_constant=refuse)
    assert [r["state"] for r in rows] == ["changed"]
