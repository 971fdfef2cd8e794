"""Weights in motion: what is published, and those who follow it (STORE.md, section 7)."""

import importlib
import json
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tzip
from tzip.coders import masks
from tzip.formats.dtypes import BY_NAME
from tzip.store import patches, publishing, runs, subscribing
from tzip.store.serving import INDEX
from tzip.store.states import torch_tensor

BIG = 70_000  # elements: more than tensors that share chunks have


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    made = {
        "big": rng.normal(0, 0.02, (7, BIG // 7)).astype(ml_dtypes.bfloat16),
        "other": rng.normal(0, 0.02, BIG).astype(np.float16),
        "bias": rng.normal(0, 0.02, 33).astype(ml_dtypes.bfloat16),
        "norm": np.ones(5, np.float32),
        "still": rng.normal(0, 1, 100).astype(np.float32),
        "scalar": np.array(3.5, np.float32),
        "empty": np.empty((0, 4), np.float32),
        "count": np.arange(9, dtype=np.int64),
    }
    made["big"].reshape(-1)[:4] = np.array([0x7FC1, 0x8000, 0xFF81, 0], np.uint16).view(ml_dtypes.bfloat16)  # NaNs, -0.0
    return made


def moved(state: dict[str, np.ndarray], seed: int, share: float = 0.01) -> dict[str, np.ndarray]:
    """Return the weights after a small step: that share of bits, and at least one, of all but "still" is another."""
    rng = np.random.default_rng(seed)
    out = {name: array.copy() for name, array in state.items()}
    for name, array in out.items():
        if name != "still" and array.size:
            flat = array.reshape(-1).view(f"<u{array.itemsize}")
            where = rng.choice(flat.size, max(1, int(flat.size * share)), replace=False)
            flat[where] ^= rng.integers(1, 4, where.size).astype(flat.dtype)
    return out


def copied(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.copy() for name, value in state.items()}


def same(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and a[n].tobytes() == b[n].tobytes() for n in a)


def run(steps: int, share: float = 0.01) -> list[dict[str, np.ndarray]]:
    made = [weights()]
    for i in range(1, steps):
        made.append(moved(made[-1], i, share))
    return made


@pytest.fixture
def store(tmp_path: Path) -> Iterator[tzip.Store]:
    with tzip.Store(tmp_path / "store", threads=1, max_chain=3) as made:
        yield made


# ---------------------------------------------------------------- step by step


def test_a_reader_patches_what_it_has_and_reads_differences_only(store):
    steps = run(6)
    store.publish(0, steps[0])
    mine = copied(steps[0])
    places = {name: array.ctypes.data for name, array in mine.items()}
    reader = store.subscribe(mine)
    assert reader.step == 0
    assert reader.update() is None
    for i, state in enumerate(steps[1:], 1):
        saved = store.publish(i, state)  # a chain is three long: steps 3 and 6 begin anew
        report = reader.update()
        assert (report.step, report.before, report.steps, report.full) == (i, i - 1, 1, 0)
        assert same(mine, state)
        assert report.bytes_read <= saved.stored
        assert report.bytes_read < 0.2 * sum(a.nbytes for a in state.values())
        changed = sum(int((_bits(a) != _bits(b)).sum()) for a, b in zip(steps[i - 1].values(), state.values(), strict=True))
        assert report.elements <= changed + 33 + 5 + 9 + 1  # small tensors of which an eighth changed are written whole
        assert "still" not in {p.name for p in reader._waiting}
    assert places == {name: array.ctypes.data for name, array in mine.items()}
    reader.verify()
    assert store.verify(deep=True).faults == []


def _bits(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(f"<u{array.itemsize}")


def test_a_published_checkpoint_is_one_like_others(store, tmp_path):
    steps = run(3)
    for i, state in enumerate(steps):
        store.publish(i, state, tags=["first"] if not i else [], metrics={"reward": float(i)})
    assert [(e.step, e.kind) for e in store.log()] == [(2, "published"), (1, "published"), (0, "published")]
    assert same(store.load(1), steps[1])
    assert store.find("best", mode="max").step == 2
    assert same(store.load("first"), steps[0])
    with store.open(2) as checkpoint:
        assert checkpoint["big"][2, 5:9].tobytes() == steps[2]["big"][2, 5:9].tobytes()
    store.restore(2, tmp_path / "out.safetensors")
    from safetensors.numpy import load_file

    assert same(load_file(tmp_path / "out.safetensors"), dict(sorted(steps[2].items()))) or same(
        dict(sorted(load_file(tmp_path / "out.safetensors").items())), dict(sorted(steps[2].items()))
    )
    entry = store.find(2)
    tzip.unpack(store.backend.archive(entry.object), tmp_path / "unpacked")
    assert (tmp_path / "unpacked" / "state.safetensors").exists()


def test_states_and_published_weights_share_a_store(store):
    """Each leans on its own kind, and pruning states leaves what is published, chain and all."""
    steps = run(4)
    reader = None
    for i, state in enumerate(steps):
        store.save(10 * i, {"model": state, "lr": 0.1 * i})
        store.publish(10 * i + 1, state)
        reader = reader or store.subscribe()
    store.prune(keep_last=1)
    store.gc(grace=0)
    assert sorted(e.step for e in store.log()) == [1, 11, 21, 30, 31]
    assert reader.update().steps == 3
    assert same(reader.weights, steps[-1])
    assert store.load(30)["lr"] == pytest.approx(0.3)
    assert store.verify(deep=True).faults == []


# ---------------------------------------------------------------- behind, and far behind


@pytest.mark.parametrize("behind", [2, 5])
def test_who_has_missed_steps_goes_through_all_of_them_when_that_is_less(store, behind):
    steps = run(7)
    late = None
    for i, state in enumerate(steps):
        store.publish(i, state)
        if i == 6 - behind:
            late = store.subscribe(copied(state))
    report = late.update()
    assert (report.step, report.before, report.steps, report.full) == (6, 6 - behind, behind, 0)
    assert same(late.weights, steps[-1])


def test_who_has_missed_much_reads_the_newest_in_full_when_that_is_less(store):
    steps = run(7, share=0.5)
    store.publish(0, steps[0])
    late = store.subscribe(copied(steps[0]))
    for i, state in enumerate(steps[1:], 1):
        store.publish(i, state)
    chain = sum(e.stored for e in store.log() if e.step)
    report = late.update()
    assert same(late.weights, steps[-1])
    assert report.full == report.tensors > 0
    assert report.bytes_read < chain


def test_a_step_of_several_can_be_asked_for_and_none_before(store):
    steps = run(4)
    for i, state in enumerate(steps):
        store.publish(i, state)
    reader = store.subscribe(copied(steps[0]))
    assert reader.update(step=2).step == 2
    assert same(reader.weights, steps[2])
    assert reader.update(step=2) is None
    with pytest.raises(tzip.ConflictError, match="before step 2"):
        reader.update(step=1)
    assert same(reader.weights, steps[2])
    assert reader.update(step=9) is None  # not there yet
    assert reader.update().step == 3


def test_only_the_last_stay_and_who_holds_none_of_them_reads_in_full(store, monkeypatch):
    monkeypatch.setattr("tzip.store.runs._SWEEP_AFTER", 2)
    monkeypatch.setattr("tzip.store.runs._PUBLISHED_GRACE", 0.0)
    steps = run(9)
    store.publish(0, steps[0], keep=3)
    late = store.subscribe(copied(steps[0]))
    tagged = 2
    for i, state in enumerate(steps[1:], 1):
        store.publish(i, state, keep=3, tags=["held"] if i == tagged else [])
    assert sorted(e.step for e in store.log()) == [tagged, 6, 7, 8]
    named = {e.object for e in store.log()}
    assert len(store.backend.object_ids()) <= 3 + len(named) + 4  # what those that are left lean on, and no more
    report = late.update()
    assert report.before == 0
    assert report.full == report.tensors
    assert same(late.weights, steps[-1])
    assert store.verify(deep=True).faults == []
    with pytest.raises(tzip.UsageError, match="keep"):
        store.publish(99, steps[0], keep=0)


def test_a_trainer_that_starts_again_goes_on_from_what_was_published(tmp_path):
    steps = run(3)
    with tzip.Store(tmp_path / "s", threads=1) as first:
        first.publish(0, steps[0])
        reader = first.subscribe(copied(steps[0]))
    with tzip.Store(tmp_path / "s", threads=1) as second:
        second.publish(1, steps[1])
        assert reader.update().full == 0
        second.publish(1, steps[2], replace_step=True)  # it went back, and step 1 is another one now
        report = reader.update()
        assert report.step == 1
        assert same(reader.weights, steps[2])


# ---------------------------------------------------------------- what is refused


def test_weights_that_are_none_of_those_published_are_refused_or_healed(store):
    steps = run(3)
    store.publish(0, steps[0])
    store.publish(1, steps[1])
    wrong = copied(steps[0])
    wrong["big"][3, 3] = 1
    with pytest.raises(tzip.ConflictError, match="not those of any published"):
        store.subscribe(wrong)
    with pytest.raises(tzip.ConflictError, match="not those of step 1"):
        store.subscribe(copied(steps[0]), step=1)
    assert store.subscribe(copied(steps[0]), step=0).step == 0
    reader = store.subscribe(wrong, reset=True)
    assert reader.step is None
    report = reader.update()
    assert (report.step, report.before) == (1, None)
    assert same(wrong, steps[1])
    store.publish(2, steps[2])
    assert reader.update().full == 0


def test_weights_that_somebody_has_changed_since_are_refused_and_left(store):
    steps = run(3)
    store.publish(0, steps[0])
    mine = copied(steps[0])
    reader = store.subscribe(mine)
    store.publish(1, steps[1])
    mine["big"][0, 77] += 1
    before = copied(mine)
    with pytest.raises(tzip.ConflictError, match="somebody has changed 'big'"):
        reader.update()
    assert same(mine, before)
    with pytest.raises(tzip.ConflictError, match="somebody has changed 'big'"):
        reader.verify()


def test_other_tensors_are_refused(store):
    steps = run(2)
    store.publish(0, steps[0])
    reader = store.subscribe(copied(steps[0]))
    other = copied(steps[1])
    other["bias"] = other["bias"].reshape(3, 11)
    store.publish(1, other)
    with pytest.raises(tzip.UsageError, match=r"the weights have BF16 \[33\]") as e:
        reader.update()
    assert e.value.tensor == "bias"
    del other["norm"]
    store.publish(2, other)
    with pytest.raises(tzip.UsageError):
        reader.update()
    assert same(reader.weights, steps[0])


@pytest.mark.parametrize(
    "bad", [[1], {"a": 1}, {"a": {"b": np.ones(2)}}, {1: np.ones(2)}, {"a": np.ones(2, np.complex128)}, {"a": b"x" * 2000}]
)
def test_only_tensors_by_their_names_are_published(store, bad):
    with pytest.raises(tzip.UsageError):
        store.publish(0, bad)
    assert list(store.log()) == []


def test_only_arrays_that_can_be_patched_follow(store):
    store.publish(0, {"a": np.zeros((4, 4), np.float32)})
    frozen = np.zeros((4, 4), np.float32)
    frozen.flags.writeable = False
    for bad in (frozen, np.zeros((4, 8), np.float32)[:, ::2], [1, 2]):
        with pytest.raises(tzip.UsageError):
            store.subscribe({"a": bad})
    for bad in ([], 3):
        with pytest.raises(tzip.UsageError):
            store.subscribe(bad)
    with pytest.raises(tzip.UsageError, match="poll"):
        store.subscribe(poll=0)
    with pytest.raises(tzip.UsageError, match="no published checkpoint"):
        store.subscribe(step=4)


def test_nothing_is_published_yet(store):
    with pytest.raises(tzip.UsageError, match="nothing is published"):
        store.subscribe()
    store.save(0, {"a": np.zeros(4)})
    with pytest.raises(tzip.UsageError, match="nothing is published"):
        store.subscribe()
    mine = {"a": np.zeros(4)}
    with pytest.raises(tzip.ConflictError):
        store.subscribe(mine)
    reader = store.subscribe(mine, reset=True)
    assert reader.update() is None
    store.publish(1, {"a": np.ones(4)})
    assert reader.update().step == 1
    assert mine["a"].tolist() == [1] * 4


# ---------------------------------------------------------------- damage, and death


def test_damage_is_seen_and_the_weights_stay(store):
    steps = run(2)
    store.publish(0, steps[0])
    reader = store.subscribe(copied(steps[0]))
    store.publish(1, steps[1])
    path = store.backend.archive(store.find(1).object)
    data = bytearray(path.read_bytes())
    with tzip.open(path) as archive:
        at = archive.reader.chunk_at(0, 0)[0]
    for place in range(at, len(data), max(1, len(data) // 40)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        try:
            reader.update()
        except tzip.TzipError:
            assert same(reader.weights, steps[0])
        else:  # padding, or a member that is not read
            assert same(reader.weights, steps[1])
            reader = store.subscribe(copied(steps[0]))
    path.write_bytes(data)
    assert reader.update().step == 1
    assert same(reader.weights, steps[1])


def test_tensors_that_are_not_those_of_their_content_ids_are_not_written(store, monkeypatch):
    """Sound archives, whose sums hold, of other tensors than the manifest says: read as differences, and in full."""
    steps = run(2)
    store.publish(0, steps[0])
    reader = store.subscribe(copied(steps[0]))
    true = runs.content_ids
    monkeypatch.setattr(runs, "content_ids", lambda held, workers: {**true(held, workers), "big": "0" * 64})
    store.publish(1, steps[1])
    monkeypatch.setattr(runs, "content_ids", true)
    with pytest.raises(tzip.CorruptError, match="content id"):
        reader.update()
    assert same(reader.weights, steps[0])
    with pytest.raises(tzip.CorruptError, match="content id"):
        store.subscribe()


@pytest.mark.parametrize("larger", ["often", "seldom"])
def test_a_chain_ends_when_most_of_what_changed_is_at_its_end(store, larger):
    """One tensor changes at each step, one at each other: at step 3 the chain of the one is as long as it may be."""
    rng = np.random.default_rng(0)
    state = {n: rng.normal(0, 0.02, BIG * (1 + (n == larger))).astype(np.float16) for n in ("often", "seldom")}
    store.publish(0, state)
    reader = store.subscribe(copied(state))
    for i in range(1, 4):
        new = moved(state, i)
        state = new if i % 2 else {**state, "often": new["often"]}
        store.publish(i, state)
        report = reader.update()
        assert report.full == 0
        assert same(reader.weights, state)
    with store.open(3) as checkpoint:
        own = checkpoint.manifest.objects[checkpoint.entry.object]
        delta = checkpoint.manifest.extra["published"]["delta"]
        assert [checkpoint.manifest.records[n].depth > 0 for n in ("often", "seldom")] == [False, larger == "seldom"]
    assert (own.leans == ()) == bool(delta) == (larger == "often")


def test_a_difference_that_is_lost_makes_the_reader_read_in_full(store):
    """At the end of a chain the checkpoint stands by itself, and the differences from the one before are beside it."""
    steps = run(4)
    for i, state in enumerate(steps[:3]):
        store.publish(i, state)
    reader = store.subscribe(copied(steps[2]))
    store.publish(3, steps[3])
    entry = store.find(3)
    with store.open(3) as checkpoint:
        delta = publishing.delta_of(checkpoint.manifest, entry, "")
        assert delta.object != entry.object
        assert checkpoint.manifest.records["big"].depth == 0
    store.backend.delete_object(delta.object)
    report = reader.update()
    assert report.full == report.tensors > 0
    assert same(reader.weights, steps[3])


@pytest.mark.parametrize("at", range(4))
def test_an_update_that_is_interrupted_while_it_writes_is_completed_by_the_next(store, monkeypatch, at):
    steps = run(3)
    store.publish(0, steps[0])
    reader = store.subscribe(copied(steps[0]))
    store.publish(1, steps[1])
    write, written = patches.Target.write, []

    def interrupted(self, patch):
        if len(written) == at:
            half = patches.Patch(
                patch.name, patch.dtype, patch.shape,
                None if patch.indices is None else patch.indices[: patch.elements // 2],
                patch.values if patch.indices is None else patch.values[: patch.elements // 2],
            )  # fmt: skip
            write(self, half)
            raise KeyboardInterrupt
        written.append(patch.name)
        write(self, patch)

    monkeypatch.setattr(patches.Target, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reader.update()
    assert not same(reader.weights, steps[0])
    assert not same(reader.weights, steps[1])
    monkeypatch.setattr(patches.Target, "write", write)
    store.publish(2, steps[2])
    report = reader.update()
    assert (report.before, report.full) == (1, 0)
    assert same(reader.weights, steps[2])


_DIES = """
import os, sys
import numpy as np
import tzip
from tzip.store import patches
path, folder, at = sys.argv[1], sys.argv[2], int(sys.argv[3])
files = sorted(os.listdir(folder))
mine = {}
for file in files:
    name, kind, dims = file.split("+")
    shape = tuple(int(d) for d in dims.split("x") if d)
    mine[name] = np.memmap(os.path.join(folder, file), np.dtype(kind), "r+", shape=shape)
write, count = patches.Target.write, [0]
def dying(self, patch):
    if count[0] == at:
        write(self, patches.Patch(patch.name, patch.dtype, patch.shape, patch.indices[: patch.elements // 2],
                                  patch.values[: patch.elements // 2]))
        os._exit(9)
    count[0] += 1
    write(self, patch)
patches.Target.write = dying
with tzip.Store(path, threads=1, create=False) as store:
    store.subscribe(mine).update()
"""


def test_a_reader_that_dies_half_way_through_a_patch_recovers(tmp_path):
    """Its weights lie in files: one tensor is half patched, one wholly, one not at all."""
    rng = np.random.default_rng(5)
    first = {name: rng.normal(0, 0.02, BIG).astype(np.float16) for name in ("a", "b", "c")}
    second = moved(first, 1)
    folder = tmp_path / "weights"
    folder.mkdir()
    for name, array in first.items():
        (folder / f"{name}+<f2+{BIG}").write_bytes(array.tobytes())

    def lying() -> dict[str, np.ndarray]:
        return {p.name[0]: np.memmap(p, "<f2", "r+") for p in sorted(folder.iterdir())}

    with tzip.Store(tmp_path / "store", threads=1) as store:
        store.publish(0, first)
        store.publish(1, second)
        done = subprocess.run(
            [sys.executable, "-c", _DIES, tmp_path / "store", folder, "1"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 9, done.stderr
        left = lying()
        assert [same({n: left[n]}, {n: second[n]}) for n in "abc"] == [True, False, False]
        assert [same({n: left[n]}, {n: first[n]}) for n in "abc"] == [False, False, True]
        with pytest.raises(tzip.ConflictError):
            store.subscribe(left)
        reader = store.subscribe(left, reset=True)
        report = reader.update()
        assert (report.step, report.tensors, report.full) == (1, 2, 2)  # what is whole already is not read again
        assert same({n: np.asarray(a) for n, a in left.items()}, second)
    again = lying()
    assert same({n: np.asarray(a) for n, a in again.items()}, second)


def test_what_is_swept_while_it_is_read_is_read_anew(tmp_path, monkeypatch):
    steps = run(3)
    store = tzip.Store(tmp_path / "s", threads=1, max_chain=1)  # every checkpoint stands by itself
    store.publish(0, steps[0])
    reader = store.subscribe(copied(steps[0]))
    store.publish(1, steps[1])
    follow, swept = subscribing.Subscription._follow, []

    def race(self, entry, deliver, start):
        if not swept:
            swept.append(entry)
            store.publish(2, steps[2], keep=1)
            store.gc(grace=0)
            assert store.backend.object_size(entry.object) is None
        return follow(self, entry, deliver, start)

    monkeypatch.setattr(subscribing.Subscription, "_follow", race)
    assert reader.update().step == 2
    assert same(reader.weights, steps[2])
    store.close()


# ---------------------------------------------------------------- waiting


def test_an_update_waits_for_what_is_published_and_for_no_longer_than_it_was_told(store):
    steps = run(2)
    store.publish(0, steps[0])
    reader = store.subscribe(copied(steps[0]), poll=0.01)
    assert reader.update(timeout=0.05) is None
    thread = threading.Timer(0.1, lambda: store.publish(1, steps[1]))
    thread.start()
    assert reader.update(timeout=60).step == 1
    thread.join()
    closing = threading.Timer(0.1, reader.close)
    closing.start()
    start = time.monotonic()
    assert reader.update(timeout=None) is None
    assert time.monotonic() - start < 30
    closing.join()


def test_a_publisher_in_the_background_raises_what_failed_at_the_next(store):
    steps = run(2)
    assert store.publish(0, steps[0], block=False) is None
    assert store.wait().step == 0
    store.publish(0, steps[1], block=False)
    with pytest.raises(tzip.UsageError, match="there already"):
        store.publish(1, steps[1])
    store.publish(1, steps[1])
    assert same(store.subscribe().weights, steps[1])


# ---------------------------------------------------------------- torch


def test_torch_tensors_are_patched_where_they_are(store):
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(300, 250), torch.nn.Linear(250, 3)).bfloat16()
    store.publish(0, model)
    mine = torch.nn.Sequential(torch.nn.Linear(300, 250), torch.nn.Linear(250, 3)).bfloat16()
    mine.load_state_dict(model.state_dict())
    reader = store.subscribe(mine)
    places = [p.data_ptr() for p in mine.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.view(-1)[::97] += 0.5
    store.publish(1, model)
    assert reader.update().full == 0
    assert places == [p.data_ptr() for p in mine.parameters()]
    for a, b in zip(model.parameters(), mine.parameters(), strict=True):
        assert torch.equal(a.view(torch.int16), b.view(torch.int16))
    tied = torch.zeros(4, 4)
    store.publish(2, {"a": tied, "b": tied})
    follower = {"a": (one := torch.zeros(4, 4)), "b": one}
    reader = store.subscribe(follower)
    store.publish(3, {"a": tied + 1, "b": tied + 1})
    reader.update()
    assert one.tolist() == (tied + 1).tolist()
    with pytest.raises(tzip.UsageError, match="contiguous"):
        store.subscribe({"a": torch.zeros(4, 4).t()[:2], "b": tied})


@pytest.mark.parametrize("name", ["BOOL", "U8", "BF16", "F16", "F32", "F64", "I64", "C64", "F8_E4M3"])
def test_patches_reach_a_tensor_of_a_device(name):
    """The way to a GPU, on the CPU's tensors: indices and values, as integers of the elements' bits."""
    pytest.importorskip("torch")
    dtype = BY_NAME[name]
    rng = np.random.default_rng(1)
    n = 4096
    old = rng.integers(0, 2, dtype.nbytes(n)).astype(np.uint8)
    for share in (0.01, 0.9):
        new = old.copy()
        new[rng.choice(new.size, int(new.size * share), replace=False)] ^= 1
        tensor = torch_tensor(dtype, (n // 64, 64), old.copy(), "", None)
        target = patches.DeviceTarget("t", dtype, (n // 64, 64), tensor)
        patch = patches.between("t", dtype, (n // 64, 64), target.raw, new)
        assert (patch.indices is None) == (share > 0.5)
        target.write(patch)
        target.write(patch)
        assert target.raw.tobytes() == target.read().tobytes() == new.tobytes()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.data())
def test_a_patch_is_what_differs_and_can_be_written_twice(n, data):
    dtype = BY_NAME[data.draw(st.sampled_from(["U8", "BF16", "F32", "F64"]))]
    old = np.frombuffer(data.draw(st.binary(min_size=n * dtype.width, max_size=n * dtype.width)), np.uint8)
    new = old.copy()
    for at in data.draw(st.lists(st.integers(0, new.size - 1), max_size=5)):
        new[at] ^= 1
    patch = patches.between("t", dtype, (n,), old, new)
    target = patches.Target("t", dtype, (n,), old.copy())
    if patch.indices is not None:
        differ = np.flatnonzero(old.view(f"<u{dtype.width}") != new.view(f"<u{dtype.width}"))
        assert patch.indices.tolist() == differ.tolist()
    for _ in range(2):
        target.write(patch)
        assert target.raw.tobytes() == new.tobytes()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), max_size=400))
def test_places_are_those_of_the_bits_that_are_set(bits):
    mask = np.packbits(np.array(bits, bool), bitorder="little")
    places = masks.places(mask, sum(bits))
    assert places.tolist() == [i for i, bit in enumerate(bits) if bit]
    with pytest.raises(ValueError, match="bits set"):
        masks.places(mask, sum(bits) + 1)


# ---------------------------------------------------------------- a folder that a server reloads


def _served(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    index = json.loads((folder / INDEX).read_text())
    out: dict[str, np.ndarray] = {}
    for name, file in index["weight_map"].items():
        out[name] = load_file(folder / file)[name]
    return out


def test_a_folder_follows_and_its_index_names_whole_files_of_one_step(store, tmp_path, monkeypatch):
    steps = run(5)
    folder = tmp_path / "served"
    store.publish(0, steps[0])
    served = store.serve(folder, shard=BIG * 2)
    served.update()
    assert same(_served(folder), dict(sorted(steps[0].items())))
    assert len(list(folder.glob("*.safetensors"))) > 1
    from safetensors import safe_open

    with safe_open(next(folder.glob("*.safetensors")), "np") as file:
        assert file.metadata() == {"format": "pt"}
    store.publish(1, steps[1])
    files = {p.name for p in folder.glob("*.safetensors")}
    assert served.update().full == 0
    assert same(_served(folder), dict(sorted(steps[1].items())))
    assert files <= {p.name for p in folder.glob("*.safetensors")}  # whoever reads the old ones can go on
    store.publish(2, steps[2])
    served.update()
    assert not files & {p.name for p in folder.glob("model-step0-*")}

    # What has not changed stays in its file.
    before = json.loads((folder / INDEX).read_text())["weight_map"]
    steps[2]["bias"] = steps[3]["bias"]
    store.publish(20, steps[2])
    served.update()
    after = json.loads((folder / INDEX).read_text())["weight_map"]
    assert [before[n] == after[n] for n in ("big", "other", "bias")] == [True, True, False]
    assert same(_served(folder), dict(sorted(steps[2].items())))

    # It dies when one shard is written, and not the index.
    store.publish(3, steps[3])
    from tzip.formats.atomic import PartialFile

    publish, done = PartialFile.publish, []

    def dying(self, *args):
        if done:
            raise OSError(28, "no space left")
        done.append(self.target)
        publish(self, *args)

    monkeypatch.setattr(PartialFile, "publish", dying)
    with pytest.raises(OSError, match="no space"):
        served.update()
    monkeypatch.setattr(PartialFile, "publish", publish)
    assert same(_served(folder), dict(sorted(steps[2].items())))
    again = store.serve(folder, shard=BIG * 2)  # another process goes on with what the files have
    assert again.subscription.step == 20
    assert again.update().full == 0
    assert same(_served(folder), dict(sorted(steps[3].items())))
    served.update()  # and so can the first one
    assert same(_served(folder), dict(sorted(steps[3].items())))
    assert not list(folder.glob("*.tzip-partial"))


def test_folders_that_are_damaged_or_in_the_way(store, tmp_path):
    store.publish(0, run(1)[0])
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(tzip.UsageError, match="loaders take this file"):
        store.serve(folder)
    (folder / "model.safetensors").unlink()
    for text in ("{", "[]", '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": "x.safetensors"}}'):
        (folder / INDEX).write_text(text)
        (folder / "x.safetensors").write_bytes(b"nothing")
        with pytest.raises(tzip.CorruptError):
            store.serve(folder)
    (folder / INDEX).unlink()
    with pytest.raises(tzip.UsageError, match="shard"):
        store.serve(folder, shard=0)
    served = store.serve(folder)
    served.update()
    shard = next(folder.glob("model-step0-*"))
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    healed = store.serve(folder)
    assert healed.update().step == 0
    assert same(_served(folder), dict(sorted(run(1)[0].items())))


# ---------------------------------------------------------------- vLLM


class _Engine:
    """What vLLM 0.33's WeightTransferEngine does for an engine, as far as it goes without a GPU."""

    def __class_getitem__(cls, kinds: Any) -> type:
        return cls

    def __init__(self, config: Any, vllm_config: Any, device: Any, model: Any) -> None:
        self.device, self.model = device, model

    def update_weights(self, info: dict[str, Any]) -> None:
        self.receive_weights(self.update_info_cls(**info))


class _SparseWeightPatch(NamedTuple):
    name: str
    indices: Any
    values: Any
    full_shape: tuple[int, ...]


class _CheckpointWeightPatch(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: Any
    values: Any
    indices: Any = None


def _load_patches(model: Any, given: list[_CheckpointWeightPatch]) -> set[str]:
    """Apply sparse patches under the rules that vLLM 0.33 checks: flat, floats, no NaN, indices in range and not twice."""
    import torch

    for patch in given:
        assert patch.dtype.is_floating_point
        assert patch.dtype == patch.values.dtype
        assert patch.indices.dtype in (torch.int32, torch.int64)
        assert patch.indices.ndim == patch.values.ndim == 1
        assert patch.indices.numel() == patch.values.numel()
        assert not bool(torch.isnan(patch.values).any())
        assert 0 <= int(patch.indices.min()) <= int(patch.indices.max()) < np.prod(patch.shape)
        assert patch.indices.unique().numel() == patch.indices.numel()
        if model.fails:
            raise RuntimeError("out of memory")
        assert model.tensors[patch.name].shape == patch.shape
        model.tensors[patch.name].view(-1).index_copy_(0, patch.indices.long(), patch.values)
    return {patch.name for patch in given}


@pytest.fixture
def vllm_weights(monkeypatch):
    """tzip's engine over a double of vLLM, made after reading the interfaces of 0.33; vLLM itself needs a GPU's libraries."""
    pytest.importorskip("torch")
    home = "vllm.distributed.weight_transfer"
    modules = {
        "vllm": {},
        "vllm.distributed": {},
        home: {},
        f"{home}.base": {
            "WeightTransferEngine": _Engine, "WeightTransferInitInfo": object, "WeightTransferUpdateInfo": object,
        },
        f"{home}.sparse_nccl_engine": {"SparseWeightPatch": _SparseWeightPatch},
        "vllm.model_executor": {},
        "vllm.model_executor.model_loader": {},
        "vllm.model_executor.model_loader.checkpoint_weight_patch": {
            "CheckpointWeightPatch": _CheckpointWeightPatch, "load_checkpoint_weight_patches": _load_patches,
        },
    }  # fmt: skip
    for name, members in modules.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "tzip.vllm_weights", raising=False)
    yield importlib.import_module("tzip.vllm_weights")
    sys.modules.pop("tzip.vllm_weights", None)


def test_a_running_vllm_follows(store, vllm_weights):
    import torch

    made = {n: torch.randn(300, 250).bfloat16() for n in ("q", "k")}
    store.publish(0, made)
    model = types.SimpleNamespace(tensors={n: t.clone() for n, t in made.items()}, fails=False)
    engine = vllm_weights.TzipWeightTransferEngine(None, None, torch.device("cpu"), model)
    with pytest.raises(RuntimeError, match="comes first"):
        engine.update_weights({})
    engine.init_transfer_engine(engine.init_info_cls(store=str(store.backend.root), step=0))
    with pytest.raises(TimeoutError):
        engine.update_weights({"timeout": 0})
    for step, name in ((1, "q"), (2, "k")):
        made[name].view(-1)[step :: 101] += 1
        store.publish(step, made)
        model.fails = True
        with pytest.raises(RuntimeError, match="memory"):
            engine.update_weights({"timeout": 0})
        model.fails = False
        engine.start_weight_update()
        engine.update_weights({"step": step, "timeout": 0})
        engine.finish_weight_update()
        assert all(torch.equal(model.tensors[n].view(torch.int16), made[n].view(torch.int16)) for n in made)
        engine.update_weights({"step": step, "timeout": 0})  # it is there
    made["q"][0, 0] = float("nan")
    store.publish(3, made)
    with pytest.raises(tzip.UsageError, match="NaN"):
        engine.update_weights({})
    engine.shutdown()


def test_a_delivery_that_failed_half_way_is_made_good(store):
    """What it wrote may have changed back by the next update: differences alone would leave it."""
    steps = run(2)
    store.publish(0, steps[0])
    reader = store.subscribe(copied(steps[0]))
    far = copied(steps[0])

    def write(given):
        for patch in given:
            patches.Target(patch.name, patch.dtype, patch.shape, far[patch.name].reshape(-1).view(np.uint8)).write(patch)

    def fails(given):
        write(given[:2])
        raise RuntimeError("gone")

    store.publish(1, steps[1])
    with pytest.raises(RuntimeError, match="gone"):
        reader.update(deliver=fails)
    assert same(reader.weights, steps[0])
    assert not same(far, steps[0])
    store.publish(2, steps[0])
    assert reader.update(deliver=write).step == 2
    assert same(far, steps[0])
    assert same(reader.weights, steps[0])
    store.publish(3, steps[1])
    seen = []
    reader.update(deliver=seen.extend)
    assert any(p.indices is not None for p in seen)  # differences again


def test_patches_as_vllm_has_them(store, vllm_weights):
    import torch

    rng = np.random.default_rng(0)
    old = {"w": rng.normal(0, 1, (20, 30)).astype(np.float16), "n": np.arange(4)}
    new = {"w": old["w"].copy(), "n": old["n"].copy()}
    new["w"][3, [1, 7]] += 1
    store.publish(0, old)
    reader = store.subscribe(copied(old))
    store.publish(1, new)
    seen: list[Any] = []
    reader.update(deliver=lambda given: seen.extend(vllm_weights.sparse_weight_patches(given)))
    assert [(p.name, p.indices.tolist(), p.full_shape) for p in seen] == [("w", [91, 97], (20, 30))]
    assert seen[0].indices.dtype == torch.int32
    assert seen[0].values.numpy().tobytes() == new["w"][3, [1, 7]].tobytes()
    new["n"][0] = 9
    store.publish(2, new)
    with pytest.raises(tzip.UsageError, match="floats only"):
        reader.update(deliver=vllm_weights.sparse_weight_patches)
    assert reader.step == 1
    assert reader.update().step == 2


def test_the_plugin_registers_the_transfer_once(monkeypatch):
    from tzip import vllm_plugin

    registry: dict[str, Any] = {}

    class Factory:
        @staticmethod
        def register_engine(name: str, *home: str) -> None:
            if name in registry:
                raise ValueError(name)
            registry[name] = home

    vllm_plugin._register_transfer()  # no vLLM here: nothing happens
    for name in ("vllm", "vllm.distributed", "vllm.distributed.weight_transfer"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["vllm.distributed.weight_transfer"].WeightTransferEngineFactory = Factory
    vllm_plugin._register_transfer()
    vllm_plugin._register_transfer()
    assert registry == {"tzip": ("tzip.vllm_weights", "TzipWeightTransferEngine")}
