"""Files of every container, packed and unpacked: the same bytes come back, and tensors are those that the real library reads.

The files are written by the real libraries; what the parsers alone say of them is in the tests of each container.
"""

import io
import pickle
import tarfile
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import h5py
import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from forge import Forged, reader
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from safetensors.numpy import save as save_safetensors
from safetensors.torch import save_file

import tzip
from tzip.formats.containers import ContainerError, Contents, Inner, Region, View, check, gather, span_bytes
from tzip.formats.dtypes import BY_NAME
from tzip.formats.recognising import CONTAINERS, MAX_DEPTH, recognise, told_of
from tzip.inspecting import describe

N = 70_000  # elements: enough for a run of their own


def weights(n: int = N, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(n) * 0.02).astype(np.float32)


def tensors() -> dict[str, np.ndarray]:
    """One for each kind of place: a run, a bundle, inline bytes, none."""
    return {
        "big": weights().reshape(-1, 100),
        "half": weights(N, 1).astype(np.float16).reshape(7, -1),
        "small": weights(300, 2),
        "scalar": np.array(3.5, np.float32),
        "empty": np.empty((0, 3), np.float32),
        "ids": np.arange(5000, dtype=np.int64),
    }


def torch_file(arrays: dict[str, np.ndarray], **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save({k: torch.from_numpy(v.copy()) for k, v in arrays.items()}, file, **options)
    return file.getvalue()


def npz(arrays: dict[str, np.ndarray], compressed: bool = False) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **arrays)
    return file.getvalue()


def hdf5(arrays: dict[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    with h5py.File(file, "w") as h:
        for name, value in arrays.items():
            h[f"model_weights/{name}"] = value
    return file.getvalue()


def onnx_file(arrays: dict[str, np.ndarray]) -> bytes:
    initializers = [numpy_helper.from_array(v, k) for k, v in arrays.items()]
    graph = onnx.helper.make_graph([], "g", [], [], initializers)
    return onnx.helper.make_model(graph).SerializeToString()


def gguf_file(arrays: dict[str, np.ndarray], folder: Path) -> bytes:
    writer = gguf.GGUFWriter(folder / "m.gguf", "test")
    for name, value in arrays.items():
        if value.size and value.ndim:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (folder / "m.gguf").read_bytes()


def tar(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def write(kind: str, folder: Path) -> tuple[bytes, dict[str, np.ndarray]]:
    """Return a file of that container and the tensors that it should show."""
    arrays = tensors()
    st_bytes = save_safetensors(arrays)
    if kind == "safetensors":
        return st_bytes, arrays
    if kind == "torch":
        return torch_file(arrays), arrays
    if kind == "torch, legacy":
        return torch_file(arrays, _use_new_zipfile_serialization=False), arrays
    if kind == "npz":
        return npz(arrays), arrays
    if kind == "hdf5":
        return hdf5(arrays), {f"model_weights/{k}": v for k, v in arrays.items()}
    if kind == "onnx":
        return onnx_file(arrays), arrays
    if kind == "gguf":
        return gguf_file(arrays, folder), {k: v for k, v in arrays.items() if v.size and v.ndim}
    if kind == "tar":
        inside = {f"a/m.safetensors/{k}": v for k, v in arrays.items()} | {f"b.npz/{k}": v for k, v in arrays.items()}
        return tar({"a/m.safetensors": st_bytes, "b.npz": npz(arrays), "readme": b"text"}), inside
    assert kind == "zip"
    return zipped({"m.pt": torch_file(arrays)}), {f"m.pt/{k}": v for k, v in arrays.items()}


KINDS = ["safetensors", "torch", "torch, legacy", "npz", "hdf5", "onnx", "gguf", "tar", "zip"]


def packed(data: bytes, name: str = "file", **options: Any) -> tzip.Archive:
    out = io.BytesIO()
    tzip.pack(data, out, name=name, threads=1, **options)
    return tzip.open(out.getvalue())


@pytest.mark.parametrize("kind", KINDS)
def test_every_container_comes_back_and_shows_its_tensors(kind: str, tmp_path: Path) -> None:
    data, expected = write(kind, tmp_path)
    with packed(data) as archive:
        assert archive.member_bytes("file") == data
        assert set(expected) <= set(archive)
        for name, value in expected.items():
            view = archive.tensor(name)
            assert (view.shape, view.dtype) == (value.shape, value.dtype)
            assert view.read().tobytes() == value.tobytes()
            if value.ndim and value.shape[0] > 3:
                assert view[1:3].tobytes() == value[1:3].tobytes()
    tzip.verify(out_of(data), deep=True, threads=1)


def out_of(data: bytes) -> bytes:
    out = io.BytesIO()
    tzip.pack(data, out, name="file", threads=1)
    return out.getvalue()


@pytest.mark.parametrize("kind", KINDS[1:])
def test_floats_gain_as_much_as_in_safetensors(kind: str, tmp_path: Path) -> None:
    arrays = {"a": weights(1 << 20).reshape(1024, -1), "b": weights(1 << 18, 1).astype(np.float16)}
    plain = save_safetensors(arrays)
    data = {
        "torch": lambda: torch_file(arrays),
        "torch, legacy": lambda: torch_file(arrays, _use_new_zipfile_serialization=False),
        "npz": lambda: npz(arrays),
        "hdf5": lambda: hdf5(arrays),
        "onnx": lambda: onnx_file(arrays),
        "gguf": lambda: gguf_file(arrays, tmp_path),
        "tar": lambda: tar({"m.safetensors": plain}),
        "zip": lambda: zipped({"m.safetensors": plain}),
    }[kind]()
    assert len(out_of(data)) / len(data) <= len(out_of(plain)) / len(plain) + 0.005


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_blocks_are_taken_apart(kind: str, tmp_path: Path) -> None:
    values = weights(1 << 18).reshape(-1, 256) * (1 + np.arange(1 << 10, dtype=np.float32)[:, None] % 7)
    quantised = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "test")
    writer.add_tensor("a", weights(1001))
    writer.add_tensor("q", quantised, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = (tmp_path / "m.gguf").read_bytes()
    out = out_of(data)
    with tzip.open(out) as archive:
        assert archive.member_bytes("file") == data
        view = archive.tensor("q")
        assert view.read().tobytes() == quantised.tobytes()
        assert view[100:200].tobytes() == quantised.tobytes()[100 * view.shape[1] : 200 * view.shape[1]]
    opaque = tzip.encode(quantised.reshape(-1))
    assert len(out) - 3800 < 0.99 * len(opaque)
    assert "records" in str(describe(out))


def test_the_order_of_elements_is_kept() -> None:
    table = weights(6000).reshape(60, 100)
    cube = torch.arange(2 * 3 * 4 * 5, dtype=torch.bfloat16).reshape(2, 3, 4, 5)
    file = io.BytesIO()
    np.save(file, np.asfortranarray(table))
    with packed(file.getvalue(), "table.npy") as archive:
        (view,) = (archive.tensor(name) for name in archive)
        assert view.read().tobytes() == table.tobytes()
        assert view[3:5].tobytes() == table[3:5].tobytes()
        assert view.raw().tobytes() == table.tobytes()
    state = {"t": torch.from_numpy(table).t(), "part": torch.from_numpy(table)[:, 10:20], "p": cube.permute(3, 1, 0, 2)}
    file = io.BytesIO()
    torch.save(state | {"wide": torch.ones(1).expand(1 << 40)}, file)
    with packed(file.getvalue()) as archive:
        assert archive.member_bytes("file") == file.getvalue()
        assert sorted(archive) == ["p", "part", "t"]  # an expanded tensor would need any memory
        for name, value in state.items():
            bits = value.contiguous().view(torch.int16 if value.dtype is torch.bfloat16 else torch.int32).numpy()
            assert archive[name].tobytes() == bits.tobytes()
            assert archive.tensor(name)[1:].tobytes() == bits[1:].tobytes()


def test_the_same_weights_in_two_containers_are_stored_once(tmp_path: Path) -> None:
    state = {f"layer.{i}": torch.from_numpy(weights(1 << 17, i).reshape(256, -1)) for i in range(4)}
    torch.save(state, tmp_path / "m.pt")
    alone = tzip.pack(tmp_path / "m.pt", tmp_path / "alone.tzip").bytes_out
    save_file(state, tmp_path / "m.safetensors")
    both = tmp_path / "both"
    both.mkdir()
    for name in ("m.pt", "m.safetensors"):
        (tmp_path / name).rename(both / name)
    assert tzip.pack(both, tmp_path / "both.tzip").bytes_out <= alone * 1.02


@pytest.mark.parametrize("new", ["torch", "npz", "tar"])
@pytest.mark.parametrize("old", ["torch", "npz", "safetensors"])
def test_differences_cross_containers(old: str, new: str, tmp_path: Path) -> None:
    before = {"w": weights(1 << 17).reshape(512, -1)}
    after = {"w": before["w"] + np.float32(1e-6)}
    make = {
        "torch": torch_file,
        "npz": npz,
        "safetensors": save_safetensors,
        "tar": lambda arrays: tar({"m.npz": npz(arrays)}),
    }
    base = tmp_path / "base.bin"
    base.write_bytes(make[old](before))
    data = make[new](after)
    name = "m.npz/w" if new == "tar" else "w"
    out = io.BytesIO()
    tzip.pack(data, out, name="file", base=base)
    assert len(out.getvalue()) < 0.5 * len(out_of(data))
    with tzip.open(out.getvalue(), base=base) as archive:
        assert archive.member_bytes("file") == data
        assert archive[name].tobytes() == after["w"].tobytes()
    with tzip.open(out.getvalue()) as archive, pytest.raises(tzip.TzipError):
        archive[name]
    (tmp_path / "new.bin").write_bytes(data)
    if name == "w":
        assert [(d.name, d.state) for d in tzip.diff(base, tmp_path / "new.bin")] == [("w", "changed")]


def test_onnx_tensors_in_another_file(tmp_path: Path) -> None:
    arrays = {"a": weights(1 << 17).reshape(128, -1), "b": weights(1 << 16, 1), "small": weights(8, 2)}
    folder = with_outside(tmp_path / "model", arrays).parent
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    report = tzip.pack(folder, tmp_path / "m.tzip")
    assert report.bytes_out < 0.86 * sum(map(len, files.values()))
    with tzip.open(tmp_path / "m.tzip") as archive:
        for name, data in files.items():
            assert archive.member_bytes(f"model/{name}") == data
        for name, value in arrays.items():
            assert archive[name].tobytes() == value.tobytes()


def with_outside(folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    """Save an ONNX model that keeps its tensors in another file; return that file."""
    folder.mkdir()
    graph = onnx.helper.make_graph([], "g", [], [], [numpy_helper.from_array(v, k) for k, v in arrays.items()])
    onnx.save(onnx.helper.make_model(graph), folder / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    return folder / "m.data"


def moved(value: np.ndarray) -> np.ndarray:
    """The same with small changes."""
    return (value.view(f"u{value.itemsize}") + (np.arange(value.size) % 9 == 0).reshape(value.shape)).view(value.dtype)


def test_tensors_in_another_file_have_bases(tmp_path: Path) -> None:
    arrays = {"b": weights(1 << 16, 1), "a": weights(1 << 17).reshape(128, -1)}
    old = with_outside(tmp_path / "old", arrays)
    new = with_outside(tmp_path / "new", {"a": moved(arrays["a"]), "b": moved(arrays["b"])})
    tzip.pack(new, tmp_path / "n.tzip", base=old)
    assert (tmp_path / "n.tzip").stat().st_size < 0.2 * new.stat().st_size
    with tzip.open(tmp_path / "n.tzip", base=tmp_path / "old") as archive:
        assert archive.member_bytes("m.data") == new.read_bytes()
        assert archive["a"].tobytes() == moved(arrays["a"]).tobytes()


def test_measures_and_reports_ask_the_neighbours(tmp_path: Path) -> None:
    from tzip.measure import measure
    from tzip.report import report

    data = with_outside(tmp_path / "model", {"some weights": weights(1 << 17).reshape(128, -1)})
    assert measure(data, levels=("fast",), repeat=1)[0].bytes_out < 0.86 * data.stat().st_size
    assert "some weights" in report(data)
    distributed(tmp_path / "ckpt")
    (path,) = (tmp_path / "ckpt").glob("*.distcp")
    assert "model.layer.1.w" in report(path)
    (tmp_path / "ckpt" / ".metadata").unlink()
    assert "model.layer.1.w" not in report(path)


def test_distributed_checkpoints_have_bases_by_name(tmp_path: Path) -> None:
    """Without names the right one of many alike is not found; an archive needs no metadata beside its base to be read."""
    distributed(tmp_path / "old", range(40), 1 << 15)
    distributed(tmp_path / "new", (39, 38), 1 << 15)
    (path,) = (tmp_path / "new").glob("*.distcp")
    tzip.pack(path, tmp_path / "n.tzip", base=tmp_path / "old")
    assert (tmp_path / "n.tzip").stat().st_size < 0.1 * path.stat().st_size
    (tmp_path / "old" / ".metadata").unlink()
    with tzip.open(tmp_path / "n.tzip", base=tmp_path / "old") as archive:
        assert archive.member_bytes(path.name) == path.read_bytes()


def distributed(folder: Path, layers: Iterable[int] = range(3), size: int = 1 << 17) -> dict[str, torch.Tensor]:
    """Save a distributed checkpoint; return its tensors."""
    from torch.distributed import checkpoint

    state = {f"layer.{i}.w": torch.from_numpy(weights(size, i).reshape(512, -1)).bfloat16() for i in layers}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.save(
            {"model": state, "step": torch.tensor(7.0), "rest": {"lr": 0.1, "names": ["a", "b"]}},
            checkpoint_id=str(folder),
            no_dist=True,
        )
    return {f"model.{k}": v for k, v in state.items()} | {"step": torch.tensor(7.0)}


def test_distributed_checkpoints_show_their_tensors_by_name(tmp_path: Path) -> None:
    expected = distributed(tmp_path / "ckpt")
    report = tzip.pack(tmp_path / "ckpt", tmp_path / "c.tzip")
    assert report.bytes_out < 0.68 * report.bytes_in
    with tzip.open(tmp_path / "c.tzip") as archive:
        assert set(archive) == set(expected)
        for name, value in expected.items():
            bits = torch.int16 if value.dtype is torch.bfloat16 else torch.int32
            assert archive[name].tobytes() == value.view(bits).numpy().tobytes()
        for path in (tmp_path / "ckpt").iterdir():
            assert archive.member_bytes(f"ckpt/{path.name}") == path.read_bytes()
    (path,) = (tmp_path / "ckpt").glob("*.distcp")
    with packed(path.read_bytes()) as alone:  # without its metadata items have numbers
        assert sorted(alone) == ["2/tensor", "3/tensor", "4/tensor", "5/tensor"]


@pytest.mark.parametrize("damage", ["cut", "flip", "rubbish", "gone"])
def test_distributed_checkpoints_with_broken_metadata_have_numbers(tmp_path: Path, damage: str) -> None:
    distributed(tmp_path / "ckpt")
    metadata = tmp_path / "ckpt" / ".metadata"
    raw = metadata.read_bytes()
    broken = {"cut": raw[: len(raw) // 2], "flip": raw.replace(b"storage_data", b"storage_dat\0"), "rubbish": b"\x80\4."}
    metadata.unlink()
    if damage in broken:
        metadata.write_bytes(broken[damage])
    tzip.pack(tmp_path / "ckpt", tmp_path / "c.tzip")
    with tzip.open(tmp_path / "c.tzip") as archive:
        assert sorted(archive) == ["2/tensor", "3/tensor", "4/tensor", "5/tensor"]


def test_checkpoints_of_a_trainer_show_their_tensors(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    config = BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    rows = [
        {"input_ids": torch.arange(8), "attention_mask": torch.ones(8, dtype=torch.long), "labels": torch.tensor(i % 2)}
        for i in range(8)
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(BertForSequenceClassification(config), arguments, train_dataset=rows).train()
    folder = tmp_path / "run" / "checkpoint-2"
    report = tzip.pack(folder, tmp_path / "c.tzip")
    assert not report.warnings
    state = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    with tzip.open(tmp_path / "c.tzip") as archive:
        for i, moments in state.items():
            for name, value in moments.items():
                assert archive[f"state.{i}.{name}"].tobytes() == value.numpy().tobytes()
        for path in folder.iterdir():
            assert archive.member_bytes(f"checkpoint-2/{path.name}") == path.read_bytes()


def test_metadata_of_a_checkpoint_runs_nothing(tmp_path: Path) -> None:
    distributed(tmp_path / "ckpt")

    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "canary",)

    (tmp_path / "ckpt" / ".metadata").write_bytes(pickle.dumps({"storage_data": Trap()}))
    tzip.pack(tmp_path / "ckpt", tmp_path / "c.tzip")
    assert not (tmp_path / "canary").exists()
    pickle.loads(pickle.dumps(Trap()))
    assert (tmp_path / "canary").exists()


def test_zip_files_behind_something_else_are_no_checkpoints() -> None:
    one = zipped({"a": b"text"})
    found = recognise(reader(data := one + b"some bytes" + one), len(data))
    assert found.container == "zip"
    found = recognise(reader(data := one + one), len(data))
    assert found.container == "DCP"
    assert recognise(reader(one), len(one)).container == "zip"


def test_files_in_files_up_to_a_depth() -> None:
    data = save_safetensors({"w": weights(100)})
    names = []
    for depth in range(MAX_DEPTH + 2):
        found = recognise(reader(data), len(data))
        names.append([v.name for v in found.tensors])
        assert bool(found.warnings) == (depth > MAX_DEPTH)
        data = tar({f"{depth}": data})
    assert names[:3] == [["w"], ["0/w"], ["1/0/w"]]
    assert names[MAX_DEPTH + 1] == []


def test_names_are_made_unique() -> None:
    one = save_safetensors({"w": weights(10)})
    found = recognise(reader(data := tar({"a": one, "a/w": b"", "b": one})), len(data))
    assert [v.name for v in found.tensors] == ["a/w", "b/w"]
    twice = io.BytesIO()
    with tarfile.open(fileobj=twice, mode="w") as archive:
        for _ in range(3):
            info = tarfile.TarInfo("a")
            info.size = len(one)
            archive.addfile(info, io.BytesIO(one))
    data = twice.getvalue()
    assert [v.name for v in recognise(reader(data), len(data)).tensors] == ["a/w", "a/w#2", "a/w#3"]
    with packed(data) as packed_twice:
        assert packed_twice["a/w#3"].tobytes() == weights(10).tobytes()


def test_compressed_entries_stay_bytes() -> None:
    arrays = {"w": weights()}
    for data in (npz(arrays, compressed=True), zipped({"m.safetensors": save_safetensors(arrays)}, zipfile.ZIP_DEFLATED)):
        with packed(data) as archive:
            assert not len(archive)
            assert archive.member_bytes("file") == data


def test_broken_files_are_kept_as_bytes_or_refused(tmp_path: Path) -> None:
    for kind in ("torch", "npz", "gguf", "zip", "tar"):
        data, _ = write(kind, tmp_path)
        cut = data[: len(data) * 2 // 3]
        with pytest.warns(UserWarning, match="packed as plain bytes"):
            packed_cut = packed(cut)
        with packed_cut as archive:
            assert archive.member_bytes("file") == cut
            assert not len(archive)
        with pytest.raises(tzip.UsageError, match="no valid"):
            packed(cut, strict=True)


def test_a_broken_file_in_a_file_is_kept_as_bytes() -> None:
    good = save_safetensors({"w": weights(100)})
    data = tar({"good": good, "bad.npy": b"\x93NUMPY\1\0\xff\xff", "good2": good})
    with pytest.warns(UserWarning, match="bad.npy"):
        archive = packed(data)
    with archive:
        assert sorted(archive) == ["good/w", "good2/w"]
        assert archive.member_bytes("file") == data


@pytest.mark.parametrize("kind", KINDS)
def test_damage_anywhere_never_loses_a_byte(kind: str, tmp_path: Path) -> None:
    """Every file is packed, whatever it holds, and comes back; what is recognised is proven first."""
    data = bytearray(write(kind, tmp_path)[0])
    rng = np.random.default_rng(len(data))
    tries = 3 if kind == "hdf5" else 25
    for _ in range(tries):
        at = int(rng.integers(0, len(data))) if rng.random() < 0.3 else int(rng.integers(0, 3000))
        damaged = bytes(data[:at]) + bytes([int(rng.integers(0, 256))]) + bytes(data[at + 1 :])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with packed(damaged) as archive:
                assert archive.member_bytes("file") == damaged


F32, I8 = BY_NAME["F32"], BY_NAME["I8"]


@pytest.mark.parametrize(
    "contents",
    [
        Contents("x", [Region(0, 12, F32), Region(8, 16, F32)]),
        Contents("x", [Region(0, 10, F32)]),
        Contents("x", [Region(96, 104, F32)]),
        Contents("x", [Region(8, 8, F32)]),
        Contents("x", [Region(-4, 8, F32)]),
        Contents("x", [Region(0, 8, F32, -1)]),
        Contents("x", [Region(0, 8, F32)], [View("a", F32, (3,), 0)]),
        Contents("x", [Region(0, 8, F32)], [View("a", F32, (1,), 2)]),
        Contents("x", [Region(0, 8, F32)], [View("a", I8, (1,), 0)]),
        Contents("x", [Region(8, 16, F32)], [View("a", F32, (1,), 4)]),
        Contents("x", [Region(0, 16, F32)], [View("a", F32, (2, 2), 0, (1, 4))]),
        Contents("x", [], [View("a", F32, (1,), 0)]),
        Contents("x", files=[Inner("a", 0, 50), Inner("b", 49, 60)]),
        Contents("x", files=[Inner("a", 50, 101)]),
        Contents("x", files=[Inner("a", 50, 40)]),
    ],
    ids=range(15),
)
def test_what_parsers_say_is_proven(contents: Contents) -> None:
    with pytest.raises(ContainerError):
        check(contents, 100)


def test_what_is_right_passes() -> None:
    check(Contents("x", [Region(4, 20, F32)], [View("a", F32, (2, 2), 4, (1, 2)), View("e", F32, (0,), 99)]), 20)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 1)), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_strided_tensors_are_gathered(dims: list[tuple[int, int]], random: Any) -> None:
    shape = tuple(n for n, _ in dims)
    order = list(range(len(shape)))
    random.shuffle(order)
    strides, step = [0] * len(shape), 1
    for i in order:
        strides[i] = step
        step *= shape[i] + dims[i][1]
    span = np.arange(span_bytes(F32, shape, strides) // 4, dtype="<f4")
    expected = np.lib.stride_tricks.as_strided(span, shape, [4 * s for s in strides])
    assert gather(span.view(np.uint8), F32, shape, strides).tobytes() == expected.tobytes()


def test_strided_tensors_of_a_forged_index() -> None:
    file = io.BytesIO()
    np.save(file, np.asfortranarray(weights(600).reshape(20, 30)))
    good = out_of(file.getvalue())
    with tzip.open(good) as archive:
        assert len(archive) == 1
    for dims in ([20, 30, 1, 21], [20, 30, 1, 1], [21, 30, 1, 20], [20, 1 << 50, 1, 1], [1 << 32, 1 << 32, 1, 1]):
        forged = Forged(good)
        for i, value in enumerate(dims):
            forged.set_both(0, "dims", i, value)
        with pytest.raises(tzip.CorruptError), tzip.open(forged.build()) as archive:
            archive[next(iter(archive))]


def test_external_tensors_that_lie_are_left_out() -> None:
    class Told:
        def __init__(self, offset: int, length: int, name: str = "t") -> None:
            self.location, self.offset, self.length, self.name = "x", offset, length, name
            self.dtype, self.shape = F32, (length // 4,)

    told = [Told(0, 8), Told(4, 8), Told(96, 8), Told(1 << 62, 4), Told(12, 4), Told(16, 0)]
    found = told_of(told, 100)
    assert [(r.begin, r.end) for r in found.regions] == [(0, 8), (12, 16)]
    assert [v.name for v in found.tensors] == ["t", "t#2"]


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(CONTAINERS), st.binary(max_size=300), st.integers(0, 8))
def test_rubbish_is_none_of_them(container: Any, data: bytes, keep: int) -> None:
    magic = {"torch": b"PK\3\4", "npy": b"\x93NUMPY", "gguf": b"GGUF\3\0\0\0", "zip": b"PK\3\4"}
    data = magic.get(container.NAME, b"")[: keep or None] + data
    try:
        contents = container.find(reader(data), len(data))
    except ContainerError:
        return
    if contents is not None:
        check(contents, len(data))


def test_bfloat16_of_numpy_files() -> None:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.savez(file, w=weights().astype(ml_dtypes.bfloat16))
    with packed(file.getvalue()) as archive:
        assert archive["w"].dtype == ml_dtypes.bfloat16
        assert len(out_of(file.getvalue())) < 0.7 * len(file.getvalue())
