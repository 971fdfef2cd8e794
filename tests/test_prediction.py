"""Predictors: exact arithmetic against numpy and the reference, the state of an optimizer and merged adapters from end to end,
what their inputs may be, and lies about them.
"""

import hashlib
import io
import os
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference
from forge import Forged, safetensors_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

import tzip
from tzip import bases, lowrank, prediction
from tzip.chunks import SLACK, decode_chunk
from tzip.coders import adaptive, factors, optimizers, predictors
from tzip.coders.errors import BaseNotFoundError, CorruptError, TzipError, UnsupportedError
from tzip.coders.predictors import Beside, Predictor, pack_parameters
from tzip.coders.sums import sum64
from tzip.encoding import encode_chunk
from tzip.formats.layout import CHUNK_ELEMENTS, TransformHead
from tzip.formats.recognising import Found
from tzip.inspecting import describe
from tzip.plan import LEVELS
from tzip.report import report

F = np.float32
SHAPE = (280, 256)  # large enough for runs of their own
SPECIAL = np.array(
    [0, 1 << 31, 1, 0x80000001, 0x007FFFFF, 0x00800000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x7F7FFFFF],
    np.uint32,
)


@pytest.fixture(autouse=True)
def _nothing_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(bases.SEARCH, raising=False)


# ---------------------------------------------------------------- arithmetic


def _wild(n: int, seed: int, width: int = 4) -> np.ndarray:
    """Numbers of all sizes, with NaN, infinities, zeros and subnormals among them, as bits."""
    rng = np.random.default_rng(seed)
    words = (rng.normal(0, 1, n) * 2.0 ** rng.integers(-40, 20, n)).astype(F).view(np.uint32)
    wild = rng.random(n)
    words = np.where(wild < 0.15, rng.integers(0, 1 << 32, n, dtype=np.uint64).astype(np.uint32), words)
    words = np.where(wild > 0.9, SPECIAL[rng.integers(0, SPECIAL.size, n)], words)
    return words if width == 4 else (words >> 16).astype(np.uint16)


def _naive(kind: int, numbers: tuple[float, ...], roles: list[np.ndarray]) -> np.ndarray:
    """Section 6.6 in numpy, an operation a line."""
    with np.errstate(all="ignore"):
        a = [r.view(F) for r in roles]
        if kind == predictors.ADAM_WEIGHTS:
            form, c, s, r, e = numbers[0], *map(F, numbers[1:])
            d = np.sqrt(a[2])
            d = d / r if form < 2 else d * r
            d = d + e
            step = s * a[1] if form % 2 == 0 else a[1] / d
            step = step / d if form % 2 == 0 else s * step
            made = a[0] * c
            made = made + step
        elif kind == predictors.SECOND_MOMENT:
            g = a[2].astype(np.float64) - a[1].astype(np.float64)
            g = g / np.float64(numbers[0])
            g = (a[1].astype(np.float64) + g).astype(F)
            kept = a[0] * F(numbers[1])
            made = F(numbers[2]) * g
            made = made * g
            made = made + kept
        else:
            made = a[0] * F(numbers[0])
        assert made.dtype == F
        return np.where(np.isfinite(made), made.view(np.uint32), roles[0])


NUMBERS = {
    predictors.ADAM_WEIGHTS: [
        (0, 0.99994, -6e-4, 1.0, 1e-8),
        (1, 1.0, -1e-3, 0.03162, 1e-6),
        (2, 1.0, 3e38, 1e-30, 0.0),
        (3, 0.9, -1e-3, 31.62, 1e-6),
    ],
    predictors.SECOND_MOMENT: [(0.1, 0.95, 0.05), (1e-300, 0.999, 0.001), (0.0, 0.5, 0.5)],
    predictors.FIRST_MOMENT: [(0.9,), (-1.5,), (3e38,)],
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_arithmetic_is_that_of_numpy_operation_by_operation(kind: int) -> None:
    for seed, numbers in enumerate(NUMBERS[kind]):
        roles = [_wild(50_000, 3 * seed + k) for k in range(len(predictors.ROLES[kind]))]
        beside = Beside({role: words.view(np.uint8) for role, words in enumerate(roles)})
        string = np.frombuffer(pack_parameters(kind, *numbers), np.uint8)
        made = predictors.predict(kind, string, 4, 0, 50_000, beside)
        exact = [numbers[0], *(float(F(x)) for x in numbers[1:])] if len(numbers) > 1 else [float(F(numbers[0]))]
        assert np.array_equal(made.words, _naive(kind, tuple(exact), roles))
        assert not np.isnan(made.words.view(F)[np.isfinite(roles[0].view(F))]).any()


def _factors(rng: np.random.Generator, width: int, q: int, rows: int, rank: int, exponent: int) -> Predictor:
    c = rng.integers(-200, 200, (rank, q))
    r = rng.integers(-1000, 1000, (rank, rows))
    bits = factors.bits_of(r)
    return Predictor(predictors.LOW_RANK, factors.write_factors(c, bits, exponent), q, r, tuple(bits))


def _levels(rng: np.random.Generator, q: int, rows: int) -> Predictor:
    columns, own = (rng.integers(0, 40_000, k, dtype=np.uint16) for k in (q, rows))
    common = q.to_bytes(4, "little") + columns.tobytes()
    return Predictor(predictors.LEVELS, common, q, own.astype(np.int64)[None])


def test_low_rank_is_the_rounded_sum() -> None:
    rng = np.random.default_rng(3)
    for width, exponent in ((4, -30), (2, -22), (4, 100), (2, -1000)):
        n, q = 5000, 37
        predictor = _factors(rng, width, q, 136, 5, exponent)
        old = _wild(n, 7, width)
        made = predictors.predict(predictors.LOW_RANK, predictor.string(0, n), width, 0, n, Beside({0: old.view(np.uint8)}))
        c = factors.read_factors(predictor.string(0, n)).columns.astype(np.int64)
        assert predictor.rows is not None
        total = np.array([int((predictor.rows[:, i // q] * c[:, i % q]).sum()) for i in range(n)])
        type_ = F if width == 4 else ml_dtypes.bfloat16
        with np.errstate(all="ignore"):
            expected = (old.view(type_).astype(np.float64) + total * 2.0**exponent).astype(F).astype(type_)
        finite = np.isfinite(expected.astype(F))
        assert np.array_equal(made.words, np.where(finite, expected.view(old.dtype), old))
        assert finite.any()


def test_factors_of_every_size_are_packed_and_unpacked() -> None:
    rng = np.random.default_rng(1)
    for n in (1, 2, 7, 8, 9, 1000):
        for bits in range(1, factors.MAX_BITS + 1):
            values = rng.integers(-(1 << bits - 1), 1 << bits - 1, (2, n))
            packed = np.frombuffer(factors.pack(values, [bits, bits]), np.uint8)
            assert packed.size == factors.packed_size(n, [bits, bits])
            assert np.array_equal(factors.unpack(packed, n, [bits, bits]), values)
            assert max(factors.bits_of(values)) <= bits
    bad = np.array([0xFF], np.uint8)
    with pytest.raises(CorruptError, match="unused bits"):
        factors.unpack(bad, 1, [3])


TIER_SCRIPT = """
import sys
import numpy as np
from test_prediction import everything
from tzip.coders import jit
print(jit.tier(), everything())
"""


def everything() -> str:
    """The SHA-256 of what all predictors make of the same numbers, of a length that no vector divides."""
    found = hashlib.sha256()
    n = 4001
    for kind, many in NUMBERS.items():
        for seed, numbers in enumerate(many):
            roles = {role: _wild(n, 11 * seed + role).view(np.uint8) for role in predictors.ROLES[kind]}
            string = np.frombuffer(pack_parameters(kind, *numbers), np.uint8)
            for words in predictors.predict(kind, string, 4, 0, n, Beside(roles)):
                found.update(words.tobytes())
    rng = np.random.default_rng(5)
    for width in (2, 4):
        spread = [_factors(rng, width, 100, 41, 17, -25), _levels(rng, 77, 52)]
        for predictor in spread:
            roles = {0: _wild(n, 2, width).view(np.uint8)}
            made = predictors.predict(predictor.kind, predictor.string(0, n), width, 0, n, Beside(roles))
            found.update(made.words.tobytes())
    root = np.frombuffer(pack_parameters(predictors.ROOT, 123_456_789), np.uint8)
    found.update(predictors.predict(predictors.ROOT, root, 4, 0, n, Beside({1: _wild(n, 9).view(np.uint8)})).words.tobytes())
    return found.hexdigest()


def test_all_targets_predict_the_same(tmp_path: Path) -> None:
    here = everything()
    started = []
    for cpu in ("generic", "haswell"):
        env = os.environ | {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path / cpu)}
        env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), env.get("PYTHONPATH", "")])
        command = [sys.executable, "-c", TIER_SCRIPT]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env))
    for process in started:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert out.split()[1] == here


def test_without_subnormal_numbers_there_are_no_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert optimizers.keeps_subnormals()
    old, new = _state(1), _state(2)
    archive = _pack(_file(new), _file(old))
    monkeypatch.setattr(optimizers, "keeps_subnormals", lambda: False)
    with pytest.raises(UnsupportedError, match="subnormal"):
        _unpack(archive, _file(old))
    there = _pack(_file(new), _file(old))
    assert not _predicted(there)
    assert _unpack(there, _file(old)) == _file(new)


# ---------------------------------------------------------------- chunks


def _record(raw: np.ndarray, predictor: Predictor, chunk: int, roles: dict[int, np.ndarray], first: Any = None) -> bytes:
    """The record of a chunk as a prediction, whether that is small or not."""
    from tzip import encoding
    from tzip.coders.planes import PLANES

    width = raw.itemsize
    beside = Beside({role: words.view(np.uint8) for role, words in roles.items()}, first)
    string = predictor.string(chunk * CHUNK_ELEMENTS, raw.size)
    made = predictors.predict(predictor.kind, string, width, chunk * CHUNK_ELEMENTS, raw.size, beside)
    context = None if made.context is made.words else made.context
    coding = "f32" if width == 4 else "bf16"
    bytes_ = raw.view(np.uint8)
    found, blocks = encoding._from_base(
        bytes_, width, coding, LEVELS["default"], made.words.view(np.uint8), predictor.kind, string, context
    )
    return bytes(encoding._record(PLANES, blocks, bytes_, width, 3, chunk, sum64(bytes_), found).record)


def _decoded(record: bytes, n: int, width: int, chunk: int, roles: dict[int, np.ndarray], first: Any = None) -> bytes:
    buffer = np.zeros(len(record) + SLACK, np.uint8)
    buffer[: len(record)] = np.frombuffer(record, np.uint8)
    out = np.empty(n * width, np.uint8)
    others = {role: words.view(np.uint8) for role, words in roles.items()}
    base = others.pop(0, None)
    decode_chunk(buffer, len(record), 3, chunk, n, width, out, base=base, beside=Beside(others, first))
    return out.tobytes()


def _any_predictor(kind: int, width: int, chunk: int, n: int, seed: int) -> Predictor:
    rng = np.random.default_rng(seed)
    if kind in predictors.SPREAD:
        q = int(rng.integers(1, 200))
        rows = (chunk * CHUNK_ELEMENTS + n - 1) // q + 1
        return _factors(rng, width, q, rows, int(rng.integers(1, 9)), -30) if kind == 3 else _levels(rng, q, rows)
    if kind == predictors.ROOT:
        return Predictor(kind, pack_parameters(kind, int(rng.integers(0, 1 << 31))))
    return Predictor(kind, pack_parameters(kind, *NUMBERS[kind][seed % len(NUMBERS[kind])]))


@settings(max_examples=max(60, settings().max_examples))
@given(st.data())
def test_any_chunk_by_any_predictor(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(predictors.NAMES)))
    width = data.draw(st.sampled_from([2, 4])) if kind in predictors.SPREAD else 4
    n = data.draw(st.one_of(st.integers(1, 200), st.sampled_from([255, 256, 257, 1000])))
    chunk = data.draw(st.sampled_from([0, 1, 3])) if kind in predictors.SPREAD else 0
    seed = data.draw(st.integers(0, 1 << 16))
    predictor = _any_predictor(kind, width, chunk, n, seed)
    roles = {role: _wild(n, seed + role, width) for role in predictors.ROLES[kind]}
    raw = _wild(n, seed + 9, width)
    if data.draw(st.booleans()) and roles:  # what predicts well, not only noise
        raw = roles[min(roles)].copy()
        raw[:: 1 + seed % 5] ^= raw.dtype.type(1)
    first = predictor.string(0, CHUNK_ELEMENTS) if chunk else None
    record = _record(raw, predictor, chunk, roles, first)
    assert _decoded(record, n, width, chunk, roles, first) == raw.tobytes()

    def whole() -> bytes:
        return _record(np.zeros(1, raw.dtype), predictor, 0, {r: w[:1] for r, w in roles.items()})

    if chunk:  # a first chunk of one row, but with all that the others read
        head = predictor.string(0, 1)
        shorter = _decoded(record, n, width, chunk, roles, head)
        assert shorter == raw.tobytes()
    assert reference.decode_chunk(record, lambda role: roles[role].tobytes(), whole) == raw.tobytes()
    for role in roles:
        with pytest.raises(CorruptError, match=f"input {role}|names none"):
            _decoded(record, n, width, chunk, {r: w for r, w in roles.items() if r != role}, first)
    if chunk:
        with pytest.raises(CorruptError, match="first chunk"):
            _decoded(record, n, width, chunk, roles)


def test_prediction_is_taken_only_where_it_is_smaller() -> None:
    rng = np.random.default_rng(0)
    old = rng.normal(0, 0.02, 70_000).astype(F)
    new = np.nextafter(old, F(1))
    bad = Predictor(predictors.ADAM_WEIGHTS, pack_parameters(predictors.ADAM_WEIGHTS, 0, 1.0, 5.0, 1.0, 1e-8))
    other = rng.normal(0, 1, 70_000).astype(F)
    beside = Beside({1: other.view(np.uint8), 2: (other**2).view(np.uint8)})
    args = (new.view(np.uint8), 4, "f32", LEVELS["default"], 0, 0, 0, 0, old.view(np.uint8))
    alone = encode_chunk(*args)
    assert bytes(encode_chunk(*args, bad, beside).record) == bytes(alone.record)


# ---------------------------------------------------------------- the state of an optimizer


def _state(steps: int, shape: tuple[int, ...] = SHAPE, seed: int = 1) -> dict[str, np.ndarray]:
    """Weights and moments after some steps of AdamW, in the order of operations of torch, all in float32."""
    found = {}
    for name in ("a.weight", "b.weight"):
        rng = np.random.default_rng([seed, ord(name[0])])
        w, m, v = rng.normal(0, 0.02, shape).astype(F), np.zeros(shape, F), np.zeros(shape, F)
        rows = np.exp(rng.normal(0, 1, (shape[0], 1)))
        for step in range(1, steps + 21):
            g = (rng.normal(0, 1e-3, shape) * rows).astype(F)
            w = w * F(1 - 6e-4 * 0.1)
            m = m + F(0.1) * (g - m)
            v = v * F(0.95) + (F(0.05) * g) * g
            size, root = 6e-4 / (1 - 0.9**step), F(np.sqrt(1 - 0.95**step))
            w = w + (F(-size) * m) / (np.sqrt(v) / root + F(1e-8))
        found |= {f"model.{name}": w, f"optim.exp_avg.{name}": m, f"optim.exp_avg_sq.{name}": v}
    found["step"] = np.arange(10, dtype=F)
    return found


def _file(tensors: dict[str, np.ndarray]) -> bytes:
    names = {"float32": "F32", "bfloat16": "BF16"}
    return safetensors_bytes([(k, names[v.dtype.name], list(v.shape), v.tobytes()) for k, v in tensors.items()])


def _on_disk(data: bytes, folder: Path, name: str = "old.safetensors") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


_places: dict[bytes, Path] = {}


def _path(data: Any) -> Any:
    """A file with these bytes."""
    import tempfile

    if not isinstance(data, bytes):
        return data
    key = hashlib.sha256(data).digest()
    if key not in _places:
        place = Path(tempfile.mkdtemp()) / "old.safetensors"
        place.write_bytes(data)
        _places[key] = place
    return _places[key]


def _pack(data: bytes, base: Any = None, **options: Any) -> bytes:
    out = io.BytesIO()
    tzip.pack(data, out, base=None if base is None else _path(base), name="m.safetensors", **options)
    return out.getvalue()


def _unpack(archive: bytes, base: Any = None) -> bytes:
    out = io.BytesIO()
    tzip.unpack(archive, out, base=None if base is None else _path(base))
    return out.getvalue()


def _predicted(archive: bytes) -> dict[int, int]:
    """How many chunks each predictor has made."""
    found: dict[int, int] = {}
    with tzip.open(archive) as opened:
        for run, chunks in enumerate(opened.reader.index.run_chunks.tolist()):
            for chunk in range(chunks):
                at, length = opened.reader.chunk_at(run, chunk)
                head = archive[at : at + min(80, length)]
                if head[38] == 7 and (kind := int.from_bytes(head[72:80], "little")):
                    found[kind] = found.get(kind, 0) + 1
    return found


@pytest.fixture(scope="module")
def step() -> tuple[bytes, bytes, bytes]:
    """The state before a step and after it, and the archive of the later one."""
    old, new = _file(_state(5)), _file(_state(6))
    return old, new, _pack(new, old)


def test_one_step_of_an_optimizer_costs_little_more_than_its_gradients(step: tuple[bytes, bytes, bytes]) -> None:
    old, new, archive = step
    assert _predicted(archive) == {predictors.ADAM_WEIGHTS: 2, predictors.SECOND_MOMENT: 2, predictors.FIRST_MOMENT: 2}
    assert len(archive) < 0.30 * len(new)
    assert _unpack(archive, old) == new
    stored = {}
    with tzip.open(archive) as opened:
        stored = {info.name: info.stored / info.nbytes for info in opened.tensors()}
    assert stored["model.a.weight"] < 0.01
    assert stored["optim.exp_avg_sq.b.weight"] < 0.05


def test_the_reference_reads_it_front_to_back_and_by_the_index(step: tuple[bytes, bytes, bytes]) -> None:
    old, new = _state(5, (257, 256)), _state(6, (257, 256))
    for state in (old, new):
        for name in list(state):
            if ".b." in name:
                del state[name]
    archive = _pack(_file(new), _file(old))
    assert set(_predicted(archive)) == {1, 2, 6}
    sha = hashlib.sha256(_file(old)).digest()
    theirs: reference.Bases = {(sha, name): array.tobytes() for name, array in old.items()}
    assert reference.sequential(archive, theirs) == [("m.safetensors", _file(new))]
    by_place: reference.Bases = {(sha, None): _file(old)}
    slow = reference.Archive(archive, by_place)
    assert slow.tensor_bytes(0, "model.a.weight") == new["model.a.weight"].tobytes()


def test_slices_and_members_and_every_verb(step: tuple[bytes, bytes, bytes], tmp_path: Path) -> None:
    old, new, archive = step
    tensors = _state(6)
    place = _on_disk(archive, tmp_path, "new.tzip")
    base = _on_disk(old, tmp_path)
    with tzip.open(place) as opened:
        for name, array in tensors.items():
            assert opened.tensor(name)[100:103].tobytes() == array[100:103].tobytes()
        assert opened["model.b.weight"].tobytes() == tensors["model.b.weight"].tobytes()
    assert tzip.verify(place, deep=True).members == 1
    repacked = tmp_path / "alone.tzip"
    tzip.repack(place, repacked, keep_base=False)
    assert _unpack(repacked.read_bytes()) == new
    assert set(_predicted(repacked.read_bytes())) <= {predictors.LEVELS, predictors.ROOT}
    again = tmp_path / "again.tzip"
    tzip.repack(place, again, level="best")
    assert set(_predicted(again.read_bytes())) == {1, 2, 6}
    assert _unpack(again.read_bytes(), base) == new
    for kept in (True, False):  # with the index, and without
        cut = archive if kept else archive[:-100]
        report = tzip.recover(_on_disk(cut, tmp_path, f"cut {kept}.tzip"), tmp_path / f"out {kept}", base=base)
        assert report.lost == []
        assert (tmp_path / f"out {kept}" / "m.safetensors").read_bytes() == new


def test_a_chunk_that_is_lost_takes_along_what_is_predicted_from_it(step: tuple[bytes, bytes, bytes], tmp_path: Path) -> None:
    old, _, archive = step
    base = _on_disk(old, tmp_path)
    with tzip.open(archive) as opened:
        index = opened.reader.index
        names = index.tensor_names
        run = opened.tensor_runs(names.index("optim.exp_avg.a.weight"))[0]
        at, length = opened.reader.chunk_at(run, 0)
    bad = bytearray(archive)
    bad[at + length // 2] ^= 4
    refused = set()
    with tzip.open(bytes(bad), base=base) as opened:
        for name, array in _state(6).items():
            try:
                assert opened[name].tobytes() == array.tobytes()
            except CorruptError:
                refused.add(name)
    assert refused == {"optim.exp_avg.a.weight", "optim.exp_avg_sq.a.weight", "model.a.weight"}

def test_a_chain_of_states_is_read_with_few_decodings_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights lean on moments, these on each other, and all on the state before: 3^n ways down a chain of n."""
    links, before = 7, None
    for i in range(links):
        data = _file(_state(i + 1))
        before = _on_disk(_pack(data, before), tmp_path, f"{i}.tzip")
    asked: Counter[str] = Counter()
    decode, find = tzip.Archive.decode_chunk, tzip.Archive.find_bases

    def decode_chunk(self: tzip.Archive, run: int, chunk: int, out: Any = None) -> Any:
        asked["decoded"] += 1
        return decode(self, run, chunk, out)

    def found(self: tzip.Archive, *args: Any) -> Any:
        asked["looked up"] += 1
        return find(self, *args)

    monkeypatch.setattr(tzip.Archive, "decode_chunk", decode_chunk)
    monkeypatch.setattr(tzip.Archive, "find_bases", found)
    with tzip.open(before) as archive:
        assert archive["model.a.weight"].tobytes() == _state(links)["model.a.weight"].tobytes()
    assert 3 * (links - 1) <= asked["decoded"] <= 4 * links  # both moments and the weights of every link
    assert asked["looked up"] <= 20 * links


def test_a_base_with_one_bit_changed_is_refused(step: tuple[bytes, bytes, bytes], tmp_path: Path) -> None:
    old, _, archive = step
    wrong = bytearray(old)
    wrong[-5] ^= 1
    with pytest.raises(BaseNotFoundError, match="another one"):
        _unpack(archive, _on_disk(bytes(wrong), tmp_path))


def test_names_need_not_tell_which_weights_belong_to_moments(tmp_path: Path) -> None:
    """As in the files that torch.save makes of an optimizer: its state has numbers, not names."""

    def numbered(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = {}
        for i, name in enumerate(("b.weight", "a.weight")):
            found[f"model.{name}"] = state[f"model.{name}"]
            for moment in ("exp_avg", "exp_avg_sq"):
                found[f"optimizer.state.{i}.{moment}"] = state[f"optim.{moment}.{'a.weight' if i == 0 else 'b.weight'}"]
        return found

    old, new = _file(numbered(_state(5))), _file(numbered(_state(6)))
    archive = _pack(new, old)
    assert _predicted(archive) == {1: 2, 2: 2, 6: 2}
    assert len(archive) < 0.30 * len(new)
    assert _unpack(archive, old) == new


@pytest.mark.parametrize("where", ["base", "new"])
def test_what_is_no_number_stays_as_it_is(where: str) -> None:
    old, new = _state(5), _state(6)
    rng = np.random.default_rng(4)
    for array in (old if where == "base" else new).values():
        words = array.reshape(-1).view(np.uint32)
        at = rng.integers(0, words.size, 40)
        words[at] = SPECIAL[rng.integers(0, SPECIAL.size, 40)]
    for name in ("optim.exp_avg_sq.a.weight", "optim.exp_avg_sq.b.weight"):  # these are squares still
        for state in (old, new):
            state[name].reshape(-1).view(np.uint32)[...] &= np.uint32(0x7FFFFFFF)
    archive = _pack(_file(new), _file(old))
    assert set(_predicted(archive)) >= {1, 2}
    assert _unpack(archive, _file(old)) == _file(new)


def test_moments_without_a_base_have_levels() -> None:
    new = _file(_state(30))
    archive = _pack(new)
    assert _predicted(archive).get(predictors.LEVELS) == 2
    assert _unpack(archive) == new
    with tzip.open(archive) as opened:
        infos = {info.name: info.stored / info.nbytes for info in opened.tensors()}
    assert infos["optim.exp_avg_sq.a.weight"] < 0.80


def test_states_that_are_alike_do_not_depend_on_themselves() -> None:
    """Moments that are all zero are one run: no run may follow from itself then."""
    old = _state(1)
    zero = np.zeros(SHAPE, F)
    new = {name: zero if "exp_avg" in name else array for name, array in _state(2).items()}
    new["optim.exp_avg.a.weight"] = zero + F(1)
    new["optim.exp_avg_sq.b.weight"] = zero + F(1)
    archive = _pack(_file(new), _file(old))
    assert _unpack(archive, _file(old)) == _file(new)
    odd = {f"x.{word}.{i}": old["model.a.weight"] ** 2 for i in range(3) for word in ("exp_avg", "exp_avg_sq")}
    assert _unpack(_pack(_file(odd))) == _file(odd)


# ---------------------------------------------------------------- low rank


def _adapted(shape: tuple[int, int], kind: Any, change: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    base = rng.normal(0, 0.04, shape).astype(F).astype(kind)
    a, b = rng.normal(0, 1, (8, shape[1])).astype(F), rng.normal(0, 1, (shape[0], 8)).astype(F)
    moved = b @ a
    moved *= F(change * np.linalg.norm(base.astype(F)) / np.linalg.norm(moved))
    return base, (base.astype(F) + moved).astype(kind)


@pytest.mark.parametrize(("kind", "share"), [(F, 0.11), (ml_dtypes.bfloat16, 0.09)])
def test_a_merged_adapter_is_its_factors(kind: Any, share: float) -> None:
    base, new = _adapted((384, 320), kind, 1e-2)
    tensors = {"w": new}
    archive = _pack(_file(tensors), _file({"w": base}))
    assert _predicted(archive) == {predictors.LOW_RANK: 1}
    assert len(archive) - 1500 < share * new.nbytes
    assert _unpack(archive, _file({"w": base})) == _file(tensors)


def test_factors_of_a_matrix_of_several_chunks_stand_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (1111, 2001)  # rows that two chunks share
    base, new = _adapted(shape, ml_dtypes.bfloat16, 1e-2)
    data, old = _file({"w": new}), _file({"w": base})
    archive = _pack(data, old, threads=2)
    assert _predicted(archive) == {predictors.LOW_RANK: 3}
    assert _unpack(archive, old) == data
    with tzip.open(archive, base=_path(old)) as opened:
        asked = []
        original = tzip.Archive.decode_chunk
        monkeypatch.setattr(tzip.Archive, "decode_chunk", lambda s, r, c, *a: (asked.append(c), original(s, r, c, *a))[1])
        assert opened.tensor("w")[1050:1052].tobytes() == new[1050:1052].tobytes()
        assert asked == [2]  # of the first chunk only the string
        assert opened.tensor("w")[523:526].tobytes() == new[523:526].tobytes()
        assert asked == [2, 0, 1]
    at = archive.index(b"\xf5TZchnk\n")
    bad = bytearray(archive)
    bad[at + 200] ^= 1
    with tzip.open(bytes(bad), base=_path(old)) as opened, pytest.raises(CorruptError, match="check"):
        opened.tensor("w")[1050]


def test_patience_fits_what_moved_along_many_directions_and_reports_say_so(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    base = rng.normal(0, 0.04, (300, 280)).astype(F).astype(ml_dtypes.bfloat16)
    moved = sum(np.outer(rng.normal(0, 1, 300), rng.normal(0, 1, 280)) * 0.004 / k for k in range(1, 120))
    new = (base.astype(F) + np.asarray(moved, F)).astype(ml_dtypes.bfloat16)
    data, old = _file({"w": new}), _file({"w": base})
    usual, patient = _pack(data, old), _pack(data, old, level="max")
    assert not _predicted(usual)
    assert _predicted(patient) == {predictors.LOW_RANK: 1}
    assert len(patient) < 0.9 * len(usual)
    assert _unpack(patient, old) == data
    packed = _on_disk(patient, tmp_path, "new.tzip")
    assert [row["transform"] for row in describe(packed)["transforms"]] == ["delta, low rank"]
    assert "predicted: low rank" in report(packed)


def test_moments_that_hardly_moved_are_differences_from_themselves() -> None:
    rng = np.random.default_rng(4)
    m = rng.normal(0, 1e-3, (256, 256)).astype(F)
    old = {"exp_avg.w": m, "exp_avg_sq.w": m * m}
    nudges = (rng.random((2, 256, 256)) < 0.1).astype(np.uint32)
    new = {name: (old[name].view(np.uint32) ^ nudge).view(F) for name, nudge in zip(old, nudges, strict=True)}
    data, before = _file(new), _file(old)
    packed = _pack(data, before)
    assert not _predicted(packed)  # the first moments were predicted by the step that did not happen: 80 % of their size
    assert len(packed) < 0.04 * len(data)
    assert _unpack(packed, before) == data


def test_no_factors_where_nothing_is_of_low_rank_or_not_finite() -> None:
    rng = np.random.default_rng(2)
    base = rng.normal(0, 0.04, (300, 280)).astype(F)
    noise = (base + rng.normal(0, 1e-3, base.shape)).astype(F)
    assert not lowrank.is_sharp(noise.view(np.uint32), base.view(np.uint32))
    assert lowrank.fit(lowrank.Matrix(noise.view(np.uint32), base.view(np.uint32)), (16,), sharp=False) is None
    noise[3, 4] = np.nan
    assert lowrank.fit(lowrank.Matrix(noise.view(np.uint32), base.view(np.uint32)), (16,), sharp=False) is None
    assert not lowrank.is_sharp(base.view(np.uint32), base.view(np.uint32))


# ---------------------------------------------------------------- the adaptive coder


@settings(max_examples=max(80, settings().max_examples))
@given(st.integers(1, 8), st.integers(1, 400), st.floats(0.02, 0.99), st.integers(0, 1 << 16))
def test_adaptive_blocks(bits: int, n: int, skew: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    symbols = np.minimum(rng.geometric(skew, n) - 1, (1 << bits) - 1).astype(np.uint8)
    payload = adaptive.encode(symbols, bits)
    out = np.empty(n, np.uint8)
    adaptive.decode_into(payload, bits, out)
    assert np.array_equal(out, symbols)
    assert reference.adaptive_decode(payload.tobytes(), n, bits) == symbols.tolist()
    for size in {0, 3, payload.size - 1, int(rng.integers(0, payload.size))}:
        for decode in (lambda p: adaptive.decode_into(p, bits, out), lambda p: reference.adaptive_decode(p.tobytes(), n, bits)):
            with pytest.raises((CorruptError, reference.Corrupt)):
                decode(payload[:size])
            with pytest.raises((CorruptError, reference.Corrupt)):
                decode(np.append(payload, np.uint8(seed & 255)))
    bad = payload.copy()
    bad[int(rng.integers(0, bad.size))] ^= 1 << seed % 8
    try:
        slow = reference.adaptive_decode(bad.tobytes(), n, bits)
    except reference.Corrupt:
        with pytest.raises(CorruptError):
            adaptive.decode_into(bad, bits, out)
    else:
        adaptive.decode_into(bad, bits, out)
        assert out.tolist() == slow


def test_adaptive_blocks_with_long_carries_and_one_value() -> None:
    for value, n in ((255, 70_000), (0, 70_000), (128, 5)):
        symbols = np.full(n, value, np.uint8)
        symbols[-1] ^= 1
        payload = adaptive.encode(symbols, 8)
        out = np.empty(n, np.uint8)
        adaptive.decode_into(payload, 8, out)
        assert np.array_equal(out, symbols)
    with pytest.raises(CorruptError):
        adaptive.decode_into(np.full(8, 255, np.uint8), 8, np.empty(4, np.uint8))


def test_adaptive_blocks_whose_nodes_have_seen_all_that_they_count() -> None:
    symbols = np.random.default_rng(5).choice(np.array([0, 1, 6], np.uint8), 1300, p=[0.6, 0.3, 0.1])
    symbols[700:] = 7 - symbols[700:]
    payload = adaptive.encode(symbols, 3)
    assert reference.adaptive_decode(payload.tobytes(), symbols.size, 3) == symbols.tolist()


def test_elements_that_a_turned_prediction_hits_are_the_prediction() -> None:
    """Behind a mask they are B[i], not what a difference of 0 would make of them (FORMAT.md, section 6.4)."""
    n, scale = 2000, _wild(2000, 1)
    predictor = Predictor(predictors.ROOT, pack_parameters(predictors.ROOT, 123))
    string = np.frombuffer(predictor.common, np.uint8)
    raw = predictors.predict(predictors.ROOT, string, 4, 0, n, Beside({1: scale.view(np.uint8)})).words.copy()
    raw[::100] ^= np.uint32(5)
    record = _record(raw, predictor, 0, {1: scale})
    assert TransformHead.read(record[48:80]).size_a == n // 8
    assert _decoded(record, n, 4, 0, {1: scale}) == raw.tobytes()
    assert reference.decode_chunk(record, lambda role: scale.tobytes()) == raw.tobytes()


def test_patience_codes_small_classes_without_tables() -> None:
    rng = np.random.default_rng(1)
    base = (rng.normal(0, 0.04, 70_000).astype(F).view(np.uint32) >> 16).astype(np.uint16)
    new = base + (rng.random(70_000) < 0.3).astype(np.uint16)
    usual, patient = (
        encode_chunk(new.view(np.uint8), 2, "bf16", LEVELS[level], 3, 0, 0, 0, base.view(np.uint8)) for level in ("best", "max")
    )
    assert patient.codecs >> 7 & 1
    assert not usual.codecs >> 7 & 1
    assert len(patient.record) < len(usual.record)
    assert _decoded(bytes(patient.record), new.size, 2, 0, {0: base}) == new.tobytes()
    assert reference.decode_chunk(bytes(patient.record), lambda role: base.tobytes()) == new.tobytes()


# ---------------------------------------------------------------- unchanged tensors, places in files


def test_unchanged_tensors_cost_less_than_a_hundred_bytes_each() -> None:
    rng = np.random.default_rng(0)
    many = {f"model.layers.{i}.mlp.weight": rng.normal(0, 1, (300, 256)).astype(F) for i in range(40)}
    data = _file(many)
    archive = _pack(data, data + b"")
    header = _pack(_file(dict.fromkeys(many, np.zeros(0, F))))
    assert (len(archive) - len(header)) / len(many) < 100
    assert _unpack(archive, data) == data
    assert reference.sequential(archive, {(hashlib.sha256(data).digest(), None): data}) == [("m.safetensors", data)]


def test_a_base_is_found_by_its_place_when_no_parser_knows_its_tensors(
    step: tuple[bytes, bytes, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, archive = step
    packed = tmp_path / "packed.tzip"
    tzip.pack(old, packed, name="old.safetensors")
    monkeypatch.setattr(bases.Neighbours, "find", lambda *_: Found())
    assert _unpack(archive, _on_disk(old, tmp_path, "old.bin")) == new
    monkeypatch.setattr(bases._PackedFile, "at", bases.BaseFile.at)
    assert _unpack(archive, packed) == new
    with pytest.raises(BaseNotFoundError):
        _unpack(archive, _on_disk(old[:-4], tmp_path, "short.bin"))


# ---------------------------------------------------------------- lies


def _row(f: Forged, tensor: str, role: int) -> int:
    """The input with that name and role."""
    names = f.index.names
    inputs = f.index["i_kind"].size
    theirs = [n.decode() for n in names[-inputs:]]
    return next(i for i in range(inputs) if theirs[i] == tensor and int(f.index["i_kind"][i]) == role)


def _set(f: Forged, column: str, i: int, value: int | bytes) -> None:
    for cat in (f.index, *f.members()):
        cat.set(column, i, value)


def _name(f: Forged, i: int, name: str) -> None:
    for cat in (f.index, *f.members()):
        names = cat.names
        inputs = cat["i_kind"].size
        names[len(names) - inputs + i] = name.encode()
        cat.names = names


NOWHERE = bytes(32)
W, M, V = "model.a.weight", "optim.exp_avg.a.weight", "optim.exp_avg_sq.a.weight"
LIES: dict[str, Any] = {
    "a circle of two": lambda f: _inner(f, M, 0, V),
    "itself": lambda f: _name(f, _row(f, M, 1), W),
    "no tensor of the member": lambda f: (_set(f, "i_length", _row(f, M, 1), 8), _name(f, _row(f, M, 1), "model.c.weight")),
    "a shorter tensor": lambda f: _name(f, _row(f, M, 1), "step"),
    "a place": lambda f: _set(f, "i_begin", _row(f, M, 1), 0),
    "longer than the tensor": lambda f: _set(f, "i_length", _row(f, M, 1), 4 * 280 * 256 + 4),
    "roles out of order": lambda f: _set(f, "i_kind", _row(f, M, 1), 3),
    "a role too few": lambda f: _set(f, "i_kind", _row(f, V, 2), 3),
}


def _inner(f: Forged, tensor: str, role: int, other: str) -> None:
    i = next(k for k in range(f.index["i_kind"].size) if k == _row(f, tensor, role))
    _set(f, "i_file", i, NOWHERE)
    _set(f, "i_archive", i, NOWHERE)
    _set(f, "i_begin", i, (1 << 64) - 1)
    _name(f, i, other)
    for cat in (f.index, *f.members()):
        names = cat.names
        inputs = cat["i_kind"].size
        names[len(names) - 2 * inputs + i] = b""
        cat.names = names


@pytest.mark.parametrize("lie", LIES)
def test_lies_about_inner_inputs(step: tuple[bytes, bytes, bytes], lie: str) -> None:
    old, _, archive = step
    f = Forged(archive)
    LIES[lie](f)
    data = f.build()
    if lie != "a role too few":
        with pytest.raises(CorruptError):
            tzip.open(data)
    with pytest.raises(CorruptError):
        _unpack(data, old)
    with pytest.raises(reference.Corrupt):
        reference.Archive(data, {(hashlib.sha256(old).digest(), None): old}).tensor_bytes(0, W)


def _chain(length: int) -> bytes:
    """An archive whose runs follow from one another so often in a row."""
    from strategies import Member, archive_bytes, checked

    n = 70_000
    raw = [bytes([i]) * n for i in range(length + 1)]
    names = [f"t{i}" for i in range(length + 1)]
    member = Member(
        "x", flags=1, content=b"".join(raw), extents=[[1, i, 0, n] for i in range(length + 1)],
        tensors=[[name, 2, 0, [n], i, 0] for i, name in enumerate(names)],
        runs=[[1, int(i < length), n] for i in range(length + 1)], run_bytes=raw,
        inputs=[[0, 0, n, NOWHERE, NOWHERE, "", names[i + 1]] for i in range(length)],
    )  # fmt: skip
    del checked
    return archive_bytes([member])


def test_runs_may_follow_from_one_another_four_times_in_a_row() -> None:
    data = _chain(4)
    with tzip.open(data) as opened:
        assert opened["t0"].tobytes() == bytes(70_000)
    assert len(reference.Archive(data).runs) == 5
    for length in (5, 6, 40):
        with pytest.raises(CorruptError, match="in a row"):
            tzip.open(_chain(length))
        with pytest.raises(reference.Corrupt):
            reference.Archive(_chain(length))


def _low(q: int = 2, t: int = -10, zero: int = 0, c: tuple[int, ...] = (4,), r: tuple[int, ...] = (4,)) -> bytes:
    return struct.pack("<IIiI", q, len(c), t, zero) + bytes(c) + bytes(r) + b"\x21" * 1 + b"\x01"


STRINGS = {
    "form 4": (1, pack_parameters(1, 4, 1.0, 1.0, 1.0, 0.0)),
    "a step that is infinite": (1, struct.pack("<Iffff", 0, 1.0, np.inf, 1.0, 0.0)),
    "a decay that is no number": (1, struct.pack("<Iffff", 0, np.nan, 1.0, 1.0, 0.0)),
    "a share that is no number": (2, struct.pack("<dff", np.nan, 1.0, 1.0)),
    "a beta that is infinite": (6, struct.pack("<f", -np.inf)),
    "a root past 2^31": (5, struct.pack("<I", 1 << 31)),
    "no head": (3, b"\0" * 15),
    "no column": (3, _low(q=0)),
    "2^20 + 1 columns": (3, _low(q=(1 << 20) + 1)),
    "rank 0": (3, _low(c=(), r=())),
    "rank 65": (3, _low(c=(4,) * 65, r=(4,) * 65)),
    "exponent 101": (3, _low(t=101)),
    "exponent -1001": (3, _low(t=-1001)),
    "a reserved field": (3, _low(zero=1)),
    "columns of no bit": (3, _low(c=(0,))),
    "rows of 31 bits": (3, _low(r=(31,))[:-1] + bytes(4)),
    "products that may overflow": (3, _low(c=(28,), r=(28,))[:-2] + bytes(7 + 4)),
    "a byte too few": (3, _low()[:-1]),
    "columns that are cut off": (3, _low()[:-2]),
    "a byte too many": (3, _low() + b"\0"),
    "an unused bit": (3, _low()[:-1] + b"\x11"),
    "levels of no column": (4, struct.pack("<IH", 0, 1)),
    "levels without columns": (4, struct.pack("<IH", 9, 1)),
    "levels of a row too few": (4, struct.pack("<IHH", 2, 1, 1)),
    "levels of a row too many": (4, struct.pack("<IHHHH", 2, 1, 1, 1, 1)),
    "levels without a number": (4, b"\1\0"),
}


@pytest.mark.parametrize("lie", STRINGS)
def test_lies_in_parameters(lie: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two elements of a predictor, whose string another one takes the place of: both readers refuse it for what it says."""
    kind, string = STRINGS[lie]
    good = {1: pack_parameters(1, *NUMBERS[1][0]), 2: pack_parameters(2, *NUMBERS[2][0]), 6: pack_parameters(6, 0.9)}
    good |= {5: pack_parameters(5, 7), 3: _low(), 4: struct.pack("<IHHH", 2, 30_000, 20_000, 5)}
    raw = np.array([5, 6], np.uint32)
    roles = {role: np.array([7, 8], np.uint32) for role in predictors.ROLES[kind]}

    def record(text: bytes) -> bytes:
        real = predictors.predict
        monkeypatch.setattr(predictors, "predict", lambda k, s, *rest: real(k, np.frombuffer(good[kind], np.uint8), *rest))
        made = _record(raw, Predictor(kind, text), 0, roles)
        monkeypatch.undo()
        return made

    sound = record(good[kind])
    assert _decoded(sound, 2, 4, 0, roles) == raw.tobytes()
    assert reference.decode_chunk(sound, lambda role: roles[role].tobytes()) == raw.tobytes()
    lying = record(string)
    with pytest.raises(CorruptError) as told:
        _decoded(lying, 2, 4, 0, roles)
    # Not because something came out that was wrong.
    assert "sum" not in told.value.message
    assert "base" not in told.value.message
    with pytest.raises(reference.Corrupt) as slowly:
        reference.decode_chunk(lying, lambda role: roles[role].tobytes())
    assert "sum of the decoded" not in str(slowly.value)
    assert "class sizes" not in str(slowly.value)


def test_unknown_predictors_and_widths_that_have_none() -> None:
    with pytest.raises(UnsupportedError):
        predictors.check(7, 4, 0)
    for kind, width in ((1, 2), (2, 8), (5, 1), (3, 1), (4, 8)):
        with pytest.raises(CorruptError):
            predictors.check(kind, width, len(STRINGS["no head"][1]))
    with pytest.raises(CorruptError):
        predictors.check(0, 4, 1)


def test_no_damage_gives_a_wrong_byte(tmp_path: Path) -> None:
    """Flips all over an archive whose chunks are predicted, and cuts: another error, or the right bytes."""
    old, new = _state(5), _state(6)
    data, earlier = _file(new), _file(old)
    archive = _pack(data, earlier)
    base = _on_disk(earlier, tmp_path)
    rng = np.random.default_rng(0)
    with tzip.open(archive) as opened:
        ends = [(at, length) for run in range(6) for at, length in [opened.reader.chunk_at(run, 0)]]
    places = [at + int(rng.integers(0, min(length, 400))) for at, length in ends for _ in range(12)]
    places += rng.integers(0, len(archive), 40).tolist() + [len(archive) - int(k) for k in rng.integers(1, 900, 40)]
    refused = 0
    for at in places:
        bad = bytearray(archive)
        bad[at] ^= 1 << int(rng.integers(0, 8))
        try:
            with tzip.open(bytes(bad), base=base) as opened:
                for name in (W, V):
                    assert opened[name].tobytes() == new[name].tobytes()
        except TzipError:
            refused += 1
    assert refused > len(places) // 4
    for cut in rng.integers(0, len(archive), 30).tolist():
        with pytest.raises(TzipError):
            tzip.open(archive[:cut])


def test_finders_do_without_what_is_not_there() -> None:
    finder = prediction.Finder({}, {}, {}, lambda *_: np.empty(0, np.uint8), LEVELS["max"])
    assert finder.find() == {}

