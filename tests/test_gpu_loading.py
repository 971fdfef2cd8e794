"""Tensors loaded to a device, by way of the emulation: what archives hold, and the errors that reading on the CPU raises."""

import subprocess
import sys
import types
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from emulation import EmulatedDevice, make_device, on_host
from safetensors.numpy import load_file, save_file
from strategies import Member, Taste, archive_bytes, random_transform
from test_prediction import _file, _state

import tzip
from tzip.coders.errors import BaseNotFoundError, CorruptError, UnsupportedError, UsageError
from tzip.gpu import Availability, Device, available, decoder, ring
from tzip.loading import _TORCH

GOLDEN = Path(__file__).parent / "golden" / "v1"


@pytest.fixture
def device():
    return make_device()


def bits(array):
    return np.ascontiguousarray(on_host(array)).reshape(-1).view(np.uint8)


def loadable(archive):
    """The names of tensors that CuPy has a form for."""
    return [
        t.name for t in archive.tensors()
        if t.dtype not in ("F6_E2M3", "F6_E3M2", "opaque") and not (t.dtype == "F4" and (not t.shape or t.shape[-1] % 2))
    ]  # fmt: skip


def quietly(archive, device, *args, **kwargs):
    """Load; chunks that are left to the CPU are told of, and that is fine."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "decoded on the CPU, not on ")
        return archive.load(device, *args, **kwargs)


def weights(n, seed=0, dtype=ml_dtypes.bfloat16):
    return (np.random.default_rng(seed).standard_normal(n) * 0.02).astype(np.float32).astype(dtype)


@pytest.fixture
def packed(tmp_path):
    """A packed file of several kinds of tensors: large ones, bundles, an empty one, a scalar."""
    rng = np.random.default_rng(5)
    tensors = {
        "a": weights(1_200_000).reshape(1200, 1000),
        "b": weights(70_001, 1, np.float32),
        "c": weights(300_000, 2, np.float16),
        "i": rng.integers(0, 300, 80_000),
        "u": rng.integers(0, 256, (11, 13), np.uint8),
        "s": np.full((), 3, np.float32),
        "n": np.zeros((0, 5), np.float32),
        **{f"small.{k}": weights(1000 + k, k, np.float32) for k in range(20)},
    }
    save_file(tensors, tmp_path / "m.safetensors")
    tzip.pack(tmp_path / "m.safetensors", tmp_path / "m.tzip")
    return tmp_path / "m.tzip"


def test_all_tensors_of_an_archive(device, packed):
    with tzip.open(packed) as archive:
        loaded = quietly(archive, device)
        assert list(loaded) == list(archive)
        for name in archive:
            want = archive.tensor(name)
            assert loaded[name].shape == want.shape
            assert np.array_equal(bits(loaded[name]), want.raw()), name
        assert loaded["a"].dtype == np.uint16  # the bits of bfloat16, which CuPy lacks
        assert loaded["b"].dtype == np.float32


@pytest.mark.parametrize("name", sorted(p.name for p in GOLDEN.glob("*.tzip")))
def test_golden_files(device, name):
    with tzip.open(GOLDEN / name) as archive:
        loaded = quietly(archive, device, names=[n for n in loadable(archive) if n in archive])
        for tensor, array in loaded.items():
            assert np.array_equal(bits(array), archive.tensor(tensor).raw()), tensor


def test_strided_tensors_are_put_in_order(device):
    with tzip.open(GOLDEN / "strided.tzip") as archive:
        told_of(archive, device, r"1 of 1 tensors \(strided\)")


@pytest.mark.parametrize("rows", [slice(0, 1), slice(3, 700), slice(1199, None), slice(5, 5), slice(-3, None), slice(9, 2)])
def test_rows(device, packed, rows):
    with tzip.open(packed) as archive:
        view = archive.tensor("a")
        want = np.ascontiguousarray(view[rows])
        for got in (view.load(device, rows=rows), view.load("cpu", rows=rows)):
            assert got.shape == want.shape
            assert np.array_equal(bits(got), bits(want))


def test_rows_that_cannot_be_loaded(device, packed):
    with tzip.open(packed) as archive:
        with pytest.raises(UsageError, match="whole bytes"):
            archive.tensor("a").load(device, rows=slice(0, 10, 2))
        with pytest.raises(UsageError, match="no dimension"):
            archive.tensor("s").load(device, rows=slice(0, 1))


def test_a_part_decodes_only_the_chunks_that_it_touches(packed):
    device = EmulatedDevice()
    with tzip.open(packed) as archive:
        archive.tensor("a").load(device, rows=slice(1100, None))
        assert device.uploaded < 400_000  # of 1.6 MB


# ---- frameworks and devices


def test_torch_tensors_share_the_memory_and_have_its_types(packed):
    device = EmulatedDevice()
    with tzip.open(packed) as archive:
        loaded = quietly(archive, device, framework="pt")
        assert loaded["a"].dtype == torch.bfloat16
        assert loaded["a"].shape == (1200, 1000)
        assert loaded["n"].shape == (0, 5)
        for name in archive:
            want = archive.load("cpu", "pt", [name])[name]
            assert want.dtype == loaded[name].dtype
            assert torch.equal(loaded[name].reshape(-1).view(torch.uint8), want.reshape(-1).view(torch.uint8)), name
        before = device.held
        del loaded
        assert device.held < before


def test_every_dtype_of_the_format_has_torch_name():
    from tzip.formats.dtypes import DTYPES

    assert set(_TORCH) == {d.name for d in DTYPES.values()} - {"opaque", "F6_E2M3", "F6_E3M2"}


def test_dtypes_in_torch():
    with tzip.open(GOLDEN / "dtypes.tzip") as archive:
        seen = set()
        for info in archive.tensors():
            odd = info.dtype == "F4" and info.shape[-1] % 2
            if hasattr(torch, _TORCH.get(info.dtype, "")) and not odd:
                for where in (EmulatedDevice(), "cpu"):
                    got = quietly(archive, where, framework="pt", names=[info.name])[info.name]
                    assert got.dtype == getattr(torch, _TORCH[info.dtype])
                    raw = archive.tensor(info.name).raw()
                    assert bytes(got.reshape(-1).view(torch.uint8).numpy()) == raw.tobytes(), info.name
                seen.add(info.dtype)
        assert len(seen) > 12


def test_types_without_a_form_are_unsupported(device):
    with tzip.open(GOLDEN / "dtypes.tzip") as archive:
        names = [t.name for t in archive.tensors() if t.dtype.startswith("F6")]
        assert names
        for framework, where in (("cupy", device), ("np", "cpu"), ("pt", "cpu")):
            with pytest.raises(UnsupportedError, match="no dtype"):
                archive.load(where, framework, names[:1])


@pytest.mark.parametrize(("device", "framework", "message"), [
    ("tpu", None, "device 'tpu'"), ("cuda:x", None, "device 'cuda:x'"), ("cpu:1", None, "device"),
    ("cpu", "cupy", "are on a GPU"), ("cuda", "np", "are in main memory"), ("cpu", "jax", "framework 'jax'"),
])  # fmt: skip
def test_what_nobody_can_load(packed, device, framework, message):
    with tzip.open(packed) as archive, pytest.raises(UsageError, match=message):
        archive.load(device, framework)


def test_on_the_cpu_it_is_reading(packed):
    with tzip.open(packed) as archive:
        loaded = archive.load()
        for name in archive:
            assert loaded[name].dtype == archive[name].dtype
            assert np.array_equal(bits(loaded[name]), bits(archive[name]))


def no_gpu(monkeypatch):
    monkeypatch.setattr("tzip.gpu.available", lambda device=0: Availability("there is none"))


def test_without_a_gpu_loading_says_why(packed, monkeypatch):
    no_gpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with tzip.open(packed) as archive:
        for framework in (None, "cupy", "pt"):
            with pytest.raises(UsageError, match="cannot load to cuda:0: there is none"):
                archive.load("cuda", framework)


def test_torch_copies_what_the_cpu_decodes_and_tells_once(packed, monkeypatch):
    no_gpu(monkeypatch)
    sent = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: sent.append(device) or tensor)
    with tzip.open(packed) as archive:
        with pytest.warns(UserWarning, match="decoded on the CPU: there is none") as told:
            loaded = archive.load(torch.device("cuda", 1), "pt", ["a", "b"])
        assert len(told) == 1
        assert sent == ["cuda:1", "cuda:1"]
        assert torch.equal(loaded["a"].view(torch.int16), torch.from_numpy(archive["a"].view(np.int16)))


def fake_cupy(**changes):
    """A CuPy module with one GPU."""
    runtime = types.SimpleNamespace(
        driverGetVersion=lambda: 13000, getDeviceCount=lambda: 1,
        getDeviceProperties=lambda device: {"name": b"A GPU", "major": 9, "minor": 0},
    )  # fmt: skip
    for name, function in changes.items():
        setattr(runtime, name, function)
    return types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime), __spec__=object())


def lost(*_):
    raise RuntimeError("cudaErrorInsufficientDriver")


@pytest.mark.parametrize(("changes", "device", "reason"), [
    ({}, 0, ""),
    ({"driverGetVersion": lambda: 0}, 0, "there is no NVIDIA driver"),
    ({"getDeviceCount": lambda: 0}, 0, "there is no GPU 0: the driver knows 0"),
    ({}, 3, "there is no GPU 3: the driver knows 1"),
    ({"getDeviceCount": lost}, 0, "the GPU cannot be used: cudaErrorInsufficientDriver"),
    ({"getDeviceProperties": lambda device: {"name": "Old", "major": 7, "minor": 0}}, 0, "Old is too old"),
])  # fmt: skip
def test_available_says_why_not(monkeypatch, changes, device, reason):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(**changes))
    found = available(device)
    assert bool(found) == (not reason)
    assert str(found).startswith(reason or "A GPU")


def test_without_cupy_available_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'tensor-tzip[cuda13]'" in str(available())


def test_nothing_imports_cupy_unasked(packed):
    text = (
        "import sys, tzip, tzip.gpu, tzip.loading, tzip.gpu.ring\n"
        f"with tzip.open({str(packed)!r}) as a: a.load('cpu')\n"
        "assert not {'cupy', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- the drop-in for the safetensors library


def test_the_safetensors_loader_decodes_on_the_gpu(packed, monkeypatch):
    from tzip.safetensors import frameworks, safe_open

    monkeypatch.setattr("tzip.safetensors.packed._check_arguments", lambda *_: None)  # which would ask torch for a GPU
    device = EmulatedDevice()
    monkeypatch.setattr(frameworks, "gpu", lambda target, stored: device if stored.name != "c" else None)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: tensor)
    with warnings.catch_warnings(), safe_open(packed, "pt", "cuda") as opened, safe_open(packed, "pt") as plain:
        warnings.filterwarnings("ignore", "decoded on the CPU, not on ")
        alone = opened.get_tensor("a")
        assert device.launches["sum_compare"] == 1
        assert torch.equal(alone.view(torch.int16), plain.get_tensor("a").view(torch.int16))
        loaded = opened.get_tensors()
        for name, want in plain.get_tensors().items():
            assert loaded[name].dtype == want.dtype
            assert torch.equal(loaded[name].reshape(-1).view(torch.uint8), want.reshape(-1).view(torch.uint8)), name
        assert list(loaded) == list(plain.get_tensors())
        for index in (slice(3, 40), (5, slice(2, 9)), (slice(None, None, 300), 7), [1, 2]):
            got, want = opened.get_slice("a")[index], plain.get_slice("a")[index]
            assert torch.equal(got.view(torch.int16), want.view(torch.int16))


def test_the_safetensors_loader_says_why_it_decodes_on_the_cpu(packed, monkeypatch):
    from tzip.safetensors import frameworks, safe_open

    no_gpu(monkeypatch)
    monkeypatch.setattr("tzip.safetensors.packed._check_arguments", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(frameworks, "_to_device", lambda made, device: made)
    told = pytest.warns(UserWarning, match="cuda:0 are decoded on the CPU: there is none")
    with safe_open(packed, "pt", "cuda") as opened, told:
        opened.get_tensor("b")
    with safe_open(packed, "pt") as opened:  # and nothing where no GPU was asked for
        opened.get_tensor("b")


# ---- the ring


def test_many_small_tensors_take_as_many_launches_as_one(tmp_path):
    launched = []
    for count in (1, 200):
        save_file({f"t{i}": weights(70_000, i) for i in range(count)}, tmp_path / "m.safetensors")
        tzip.pack(tmp_path / "m.safetensors", tmp_path / "m.tzip")
        device = EmulatedDevice()
        with tzip.open(tmp_path / "m.tzip") as archive:
            loaded = archive.load(device)
            for name in list(loaded)[::17]:
                assert np.array_equal(bits(loaded[name]), archive.tensor(name).raw())
        launched.append(sum(device.launches.values()))
        (tmp_path / "m.tzip").unlink()
    assert launched[1] <= 4 * launched[0]  # batches end where their jobs fill a buffer


def test_small_buffers_give_the_same_and_bound_the_memory(packed, monkeypatch):
    monkeypatch.setattr(ring, "BUFFER", 1 << 20)
    monkeypatch.setattr(ring, "SCRATCH", 1 << 20)
    monkeypatch.setattr(ring, "READ", 100_000)
    device = EmulatedDevice()
    with tzip.open(packed) as archive:
        loaded = quietly(archive, device, threads=3)
        for name in archive:
            assert np.array_equal(bits(loaded[name]), archive.tensor(name).raw()), name
        largest = max(int(n) for n in archive.reader.index["c_length"])
        buffers = ring.SLOTS * (max(ring.BUFFER, largest + 512) + decoder.ROOM + ring.JOBS)
        scratch = decoder.most_scratch(2 << 20) + (2 << 20) + 512
        output = sum(archive.tensor(name).nbytes for name in archive)
        assert device.pinned_bytes <= buffers
        assert device.most <= (buffers + scratch + output) * 1.05
    assert device.launches["sum_compare"] >= 3


def test_jobs_that_fill_their_buffer_wait(packed, monkeypatch):
    monkeypatch.setattr(decoder, "MOST_JOBS", 8192)
    monkeypatch.setattr(ring, "JOBS", 24_000)
    device = EmulatedDevice()
    with tzip.open(packed) as archive:
        loaded = quietly(archive, device)
        for name in archive:
            assert np.array_equal(bits(loaded[name]), archive.tensor(name).raw()), name
    assert device.launches["sum_compare"] >= 3


def test_frames_are_decoded_on_the_cpu_and_told_of(device, tmp_path):
    text = np.frombuffer(b"the quick brown fox " * 8000, np.uint8)
    (tmp_path / "t.tzip").write_bytes(tzip.encode(text))
    with tzip.open(tmp_path / "t.tzip") as archive:
        assert "zstd" in archive.tensors()[0].codecs
        with pytest.warns(UserWarning, match=r"decoded on the CPU, not on .*: 1 of 1 chunks \(zstandard\)") as told:
            loaded = archive.load(device)
        assert len(told) == 1
        assert np.array_equal(on_host(loaded[""]), text)


# ---- bases


@pytest.fixture
def leaning(tmp_path):
    old = {"w": weights(1_100_000), "v": weights(90_000, 3, np.float32)}
    new = {"w": old["w"].copy(), "v": old["v"] * np.float32(1.001)}
    new["w"].view(np.uint16)[::7] += 1
    save_file(old, tmp_path / "old.safetensors")
    save_file(new, tmp_path / "new.safetensors")
    tzip.pack(tmp_path / "new.safetensors", tmp_path / "new.tzip", base=tmp_path / "old.safetensors")
    return tmp_path


def test_deltas(device, leaning):
    with tzip.open(leaning / "new.tzip") as archive:
        loaded = quietly(archive, device)
        for name in archive:
            assert np.array_equal(bits(loaded[name]), archive.tensor(name).raw()), name
    if isinstance(device, EmulatedDevice):
        assert device.launches["place_tiles"]


def test_deltas_from_tensors_on_the_device_need_no_file(leaning):
    device = EmulatedDevice()
    with tzip.open(leaning / "new.tzip") as archive:
        want = {name: archive.tensor(name).raw() for name in archive}
    old = load_file(leaning / "old.safetensors")
    bases = {name: np.ascontiguousarray(array) for name, array in old.items()}
    (leaning / "old.safetensors").unlink()
    with tzip.open(leaning / "new.tzip") as archive:
        loaded = archive.load(device, bases=bases)
        for name in archive:
            assert np.array_equal(bits(loaded[name]), want[name]), name
        assert device.uploaded < (leaning / "new.tzip").stat().st_size + 20_000  # no base came with it
        other = {"w": bases["w"] + bases["w"], "v": bases["v"]}
        with pytest.raises(CorruptError, match="no difference from the base that was given") as failed:
            archive.load(device, bases=other)
        assert failed.value.tensor == "w"
        with pytest.raises(BaseNotFoundError):
            archive.load(device, bases={"v": bases["v"]})
        with pytest.raises(UsageError, match="no contiguous array"):
            archive.load(device, bases={"w": bases["w"][::2]})


def test_a_wrong_base_on_the_device_is_told_from_a_damaged_chunk(leaning):
    device = EmulatedDevice()
    old = load_file(leaning / "old.safetensors")
    wrong = pytest.raises(CorruptError, match="the base that was given is another one")
    with tzip.open(leaning / "new.tzip") as archive, wrong:
        archive.load(device, bases={**old, "w": np.ascontiguousarray(old["w"][::-1])})


def test_deltas_without_their_base(device, leaning):
    (leaning / "old.safetensors").unlink()
    with tzip.open(leaning / "new.tzip") as archive, pytest.raises(BaseNotFoundError) as failed:
        archive.load(device, names=["w"])
    assert failed.value.tensor == "w"


# ---- damage


def failure_of(read):
    try:
        read()
    except (CorruptError, UnsupportedError, BaseNotFoundError) as e:
        return type(e), e.message, e.path, e.offset, e.member, e.tensor
    return None


def test_damage_raises_what_it_raises_on_the_cpu(device, packed):
    data = bytearray(packed.read_bytes())
    with tzip.open(packed) as archive:
        places = [archive.reader.chunk_at(run, 0) for run in range(len(archive.reader.index["r_width"]))]
    rng = np.random.default_rng(1)
    raised = set()
    for offset, length in places[:4]:
        for at in (9, 17, 33, 36, 41, 50, 64, int(rng.integers(70, length))):
            broken = bytearray(data)
            broken[offset + at] ^= 16
            packed.write_bytes(broken)
            with tzip.open(packed) as archive:
                for name in archive:
                    theirs = failure_of(lambda name=name: archive.tensor(name).raw())
                    if theirs is None:
                        continue
                    ours = failure_of(lambda name=name: quietly(archive, device, names=[name]))
                    assert ours == theirs
                    raised.add(ours[1])
                    break
    assert len(raised) >= 2


def test_damage_in_deltas_raises_what_it_raises_on_the_cpu(device, leaning):
    data = (leaning / "new.tzip").read_bytes()
    with tzip.open(leaning / "new.tzip") as archive:
        offset, length = archive.reader.chunk_at(archive.tensor_runs(0)[0], 0)
    for at in (40, 120, length - 300):
        broken = bytearray(data)
        broken[offset + at] ^= 1
        (leaning / "new.tzip").write_bytes(broken)
        with tzip.open(leaning / "new.tzip") as archive:
            name = archive.reader.index.tensor_names[0]
            theirs = failure_of(lambda name=name: archive.tensor(name).raw())
            assert theirs is not None
            assert failure_of(lambda name=name: archive.load(device, names=[name])) == theirs


def test_archives_cut_off_while_they_are_open(device, packed):
    with tzip.open(packed) as archive:
        offset, length = archive.reader.chunk_at(0, 0)
        packed.write_bytes(packed.read_bytes()[: offset + length // 2])
        theirs = failure_of(lambda: archive.tensor(next(iter(archive))).raw())
        with pytest.raises(tzip.TruncatedError) as failed:
            quietly(archive, device)
        assert failed.value.message == theirs[1]
        assert failed.value.tensor


# ---- predictions, unchanged chunks, vocabularies


def told_of(archive, device, reason, **kwargs):
    """Load all tensors; one warning names the reason."""
    with pytest.warns(UserWarning, match="decoded on the CPU, not on .*" + reason) as told:
        loaded = archive.load(device, **kwargs)
    assert len(told) == 1
    for name in loaded:
        assert np.array_equal(bits(loaded[name]), archive.tensor(name).raw()), name


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    """The state of an optimizer, packed against that of the step before."""
    folder = tmp_path_factory.mktemp("state")
    for steps, name in ((5, "old"), (6, "new")):
        tensors = {k: v for k, v in _state(steps, (257, 256)).items() if ".b." not in k}
        (folder / f"{name}.safetensors").write_bytes(_file(tensors))
    tzip.pack(folder / "new.safetensors", folder / "new.tzip", base=folder / "old.safetensors")
    return folder


def test_predictions_are_decoded_on_the_cpu_and_told_of(device, state):
    with tzip.open(state / "new.tzip") as archive:
        told_of(archive, device, r"3 of 4 chunks \(prediction \(AdamW weights\), prediction \(first moment\), prediction")
        for threads in (1, 3):
            told_of(archive, device, r"1 of 1 chunks", names=["model.a.weight"], threads=threads)


def test_predictions_need_their_files_whatever_is_on_the_device(state, tmp_path):
    """What is given serves differences; the roles of a predictor are read on the CPU."""
    device = EmulatedDevice()
    bases = {name: np.ascontiguousarray(a) for name, a in load_file(state / "old.safetensors").items()}
    with tzip.open(state / "new.tzip") as archive:
        told_of(archive, device, "prediction", bases=bases)
    lonely = tmp_path / "new.tzip"
    lonely.write_bytes((state / "new.tzip").read_bytes())
    with tzip.open(lonely) as archive:
        for name in archive:
            theirs = failure_of(lambda name=name: archive.tensor(name).raw())
            assert theirs[0] is BaseNotFoundError
            for more in ({},) if name == "step" else ({}, {"bases": bases}):
                ours = failure_of(lambda name=name, more=more: quietly(archive, device, names=[name], **more))
                assert ours == theirs
        assert np.array_equal(on_host(archive.load(device, names=["step"], bases=bases)["step"]), bases["step"])  # unchanged


def test_damage_in_predictions_raises_what_it_raises_on_the_cpu(device, state, tmp_path):
    data = (state / "new.tzip").read_bytes()
    with tzip.open(state / "new.tzip") as archive:
        rows = enumerate(archive.reader.index.tensor_names)
        places = {name: archive.reader.chunk_at(archive.tensor_runs(row)[0], 0) for row, name in rows}
    for name, (offset, length) in places.items():
        for at in (3, 17, 38, 39, 41, 53, 72, 120, length - 1) if length > 120 else (3, 17, 38, 39, 41):
            broken = bytearray(data)
            broken[offset + at] ^= 1
            (tmp_path / "new.tzip").write_bytes(broken)
            with tzip.open(tmp_path / "new.tzip", base=state / "old.safetensors") as archive:
                theirs = failure_of(lambda name=name: archive.tensor(name).raw())
                assert theirs is not None
                assert failure_of(lambda name=name: quietly(archive, device, names=[name])) == theirs
    assert len(places) == 4


@pytest.fixture
def half(tmp_path):
    """A tensor whose first chunk is that of its base, and whose second one is nothing like it."""
    old = weights((1 << 20) + 70_000)
    new = np.concatenate([old[: 1 << 20], np.random.default_rng(3).integers(0, 1 << 16, 70_000, np.uint16).view(old.dtype)])
    save_file({"w": old}, tmp_path / "old.safetensors")
    save_file({"w": new}, tmp_path / "new.safetensors")
    tzip.pack(tmp_path / "new.safetensors", tmp_path / "new.tzip", base=tmp_path / "old.safetensors")
    return tmp_path, old, new


def test_unchanged_chunks_are_copied_on_the_device(half):
    folder, old, new = half
    device = EmulatedDevice()
    with tzip.open(folder / "new.tzip") as archive:
        assert archive.reader.chunk_at(0, 0)[1] == 48
        assert np.array_equal(bits(archive.load(device)["w"]), bits(new))
        assert device.launches["copy_parts"] == 1
        wrong = old.copy()
        wrong[5] = 1
        with pytest.raises(CorruptError, match="the base that was given is another one"):
            archive.load(device, bases={"w": wrong})
    (folder / "old.safetensors").unlink()
    device = EmulatedDevice()
    with tzip.open(folder / "new.tzip") as archive:
        assert np.array_equal(bits(archive.load(device, bases={"w": old})["w"]), bits(new))
        assert device.uploaded < 250_000  # no base
        with pytest.raises(CorruptError, match="no difference from the base that was given"):
            archive.load(device, bases={"w": wrong})
        with pytest.raises(BaseNotFoundError) as failed:
            archive.load(device)
        assert failed.value.offset == archive.reader.chunk_at(0, 0)[0]


def test_chunks_that_are_no_differences_need_no_base(device, half):
    folder, _, new = half
    (folder / "old.safetensors").unlink()
    with tzip.open(folder / "new.tzip") as archive:
        view = archive.tensor("w")
        assert np.array_equal(bits(view.load(device, rows=slice(1 << 20, None))), bits(new[1 << 20 :]))
        with pytest.raises(BaseNotFoundError):
            view.load(device, rows=slice((1 << 20) - 1, None))


def test_inner_bases_are_not_those_that_are_given():
    """A tensor that is given stands for one of another file, not for the member's own of that name."""
    with tzip.open(GOLDEN / "predicted.tzip") as archive:
        other = np.zeros(37, np.float32)
        want = archive.tensor("by nothing").raw()
        loaded = archive.load(EmulatedDevice(), names=["by nothing"], bases={"a": other})
        assert np.array_equal(bits(loaded["by nothing"]), want)


def test_roles_that_are_not_known_are_unsupported(device):
    """The whole run is, though no chunk of it may read that role."""
    word = np.arange(40, dtype="<u4").tobytes()
    member = Member(
        "m", content=word, extents=[[1, 0, 0, 160]], tensors=[["t", 18, 0, [40], 0, 0]], runs=[[4, 1, 40]],
        inputs=[[9, 0, 160, bytes(32), b"x" * 32, "", "t"]], run_bytes=[word],
    )  # fmt: skip
    with tzip.open(archive_bytes([member])) as archive:
        theirs = failure_of(lambda: archive.tensor("t").raw())
        assert theirs[0] is UnsupportedError
        assert failure_of(lambda: archive.load(device)) == theirs


def test_vocabularies_are_decoded_on_the_cpu_and_told_of(device):
    chunk = random_transform(np.random.default_rng(4), 12, 3000, Taste(codecs=(0, 1)), width=4)[0]
    member = Member(
        "m", content=chunk.data, extents=[[1, 0, 0, 12_000]], tensors=[["t", 18, 0, [3000], 0, 0]], runs=[[4, 0, 3000]],
        run_bytes=[chunk.data],
    )  # fmt: skip
    with tzip.open(archive_bytes([member], encode=lambda *_: chunk.record)) as archive:
        told_of(archive, device, r"1 of 1 chunks \((vocabulary|zstandard)\)")


def test_the_range_coder_is_decoded_on_the_cpu_and_told_of(device, tmp_path):
    """The base is copied from the device where it was given."""
    old = {"w": weights(80_000)}
    new = {"w": old["w"].copy()}
    new["w"].view(np.uint16)[np.random.default_rng(1).random(80_000) < 0.3] += 1
    save_file(old, tmp_path / "old.safetensors")
    save_file(new, tmp_path / "new.safetensors")
    tzip.pack(tmp_path / "new.safetensors", tmp_path / "new.tzip", base=tmp_path / "old.safetensors", level="max")
    raw = bits(new["w"])
    reason = r"1 of 1 chunks \(the adaptive range coder\)"
    wrong = {"w": old["w"][::-1].copy()}
    with tzip.open(tmp_path / "new.tzip") as archive:
        told_of(archive, device, reason)
        with pytest.raises(CorruptError, match="the base that was given is another one"):
            archive.load(EmulatedDevice(), bases=wrong)
    (tmp_path / "old.safetensors").unlink()
    with tzip.open(tmp_path / "new.tzip") as archive:
        with pytest.warns(UserWarning, match=reason):
            loaded = archive.load(EmulatedDevice(), bases=old)
        assert np.array_equal(bits(loaded["w"]), raw)
        with pytest.raises(CorruptError, match="no difference from the base that was given") as failed:
            archive.load(EmulatedDevice(), bases=wrong)
        assert failed.value.tensor == "w"


# ---- measuring


def test_what_is_measured_on_a_device(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from tzip.cli import cli
    from tzip.measure_device import measure_device

    save_file({"a": weights(80_000), "b": weights(70_000, 1, np.float32)}, tmp_path / "m.safetensors")
    figures = measure_device(tmp_path / "m.safetensors", EmulatedDevice(), levels=("fast", "default"), repeat=1)
    assert [f.level for f in figures] == ["fast", "default"]
    for f in figures:
        assert f.bytes_in == 440_000
        assert f.bytes_out < 400_000
        assert min(f.decode, f.load, f.plain) > 0
    no_gpu(monkeypatch)
    monkeypatch.setattr("tzip.measure_device.available", lambda device: Availability("there is none"))
    done = CliRunner().invoke(cli, ["bench", str(tmp_path / "m.safetensors"), "--device", "cuda"])
    assert isinstance(done.exception, UsageError) or "cannot measure on cuda: there is none" in done.output
    monkeypatch.setattr("tzip.measure_device.measure_device", lambda *_, **__: figures)
    shown = CliRunner().invoke(cli, ["bench", str(tmp_path / "m.safetensors"), "--device", "cuda"])
    assert shown.exit_code == 0
    assert "default" in shown.output
    listed = CliRunner().invoke(cli, ["bench", str(tmp_path / "m.safetensors"), "--device", "cuda", "--json"])
    assert '"level": "fast"' in listed.output


# ---- CuPy, as far as it can be seen without a GPU


def test_what_the_binding_uses_of_cupy_exists():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed (an extra)")
    from tzip.gpu import cupy_device

    for name in ("alloc", "alloc_pinned_memory", "Device", "Stream", "ExternalStream", "Event", "get_current_stream",
                 "get_elapsed_time"):  # fmt: skip
        assert hasattr(cupy.cuda, name)
    for name in ("memcpyAsync", "driverGetVersion", "getDeviceCount", "getDeviceProperties"):
        assert hasattr(cupy.cuda.runtime, name)
    assert hasattr(cupy.cuda.Stream, "wait_event")
    assert hasattr(cupy.RawModule, "get_function")
    assert issubclass(cupy.cuda.memory.OutOfMemoryError, Exception)
    members = {name for name in vars(cupy_device.CupyDevice) if not name.startswith("_")}
    assert members >= {name for name in vars(Device) if not name.startswith("_")}


@pytest.mark.skipif(not available(), reason=f"needs a GPU: {available()}")
def test_on_a_gpu(packed):
    import cupy

    with tzip.open(packed) as archive:
        loaded, tensors = quietly(archive, "cuda"), quietly(archive, "cuda", framework="pt")
        assert isinstance(loaded["a"], cupy.ndarray)
        for name in archive:
            assert np.array_equal(bits(loaded[name]), archive.tensor(name).raw()), name
            assert np.array_equal(bits(tensors[name].reshape(-1).view(torch.uint8).cpu()), archive.tensor(name).raw())
