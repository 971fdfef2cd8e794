"""Stores behind URLs: the same checkpoints, whatever request fails; no head that names what is gone; few requests.

Most tests use fsspec's memory. Those with a service of its own speak to moto's server through `fault_proxy`. With
TZIP_TEST_BUCKET (as s3://bucket/folder, credentials as for every tool) the last one runs against a real bucket, in that folder.
"""

import contextlib
import datetime
import itertools
import json
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from fault_proxy import FAULTS, Proxy
from forge import noise
from gcs_server import Gcs
from stores import same, walk

import tzip
from tzip.cli import cli
from tzip.store import cloud, journal, services, upkeep
from tzip.store.backends import LocalFolder, StaleHeadError, open_backend
from tzip.store.cloud import CloudFolder

fsspec = pytest.importorskip("fsspec")
WALK = list(walk(600, 40))
FROZEN = np.arange(200, dtype="<f4")
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few entries a page, and no long waits."""
    monkeypatch.setattr(journal, "PAGE", 2)
    monkeypatch.setattr(journal, "_MAX_RECENT", 4)
    monkeypatch.setattr(cloud, "FIRST", 0.002)


@pytest.fixture
def run() -> Iterator[str]:
    name = f"memory://{uuid.uuid4().hex}/run"
    yield name
    files = fsspec.filesystem("memory").store
    for path in [p for p in files if p.startswith(name.removeprefix("memory:/"))]:
        del files[path]


def new(run: str, **options: Any) -> tzip.Store:
    return tzip.Store(run, threads=1, **{"level": "fast", "max_chain": 3, **options})


def state_of(step: int) -> dict[str, Any]:
    return {"w": WALK[step % 40] + step // 40, "frozen": FROZEN, "n": step, "now and then": FROZEN[:50] + step // 2}


def build(run: str, steps: int = 5, **options: Any) -> dict[int, Any]:
    with new(run, **options) as store:
        for step in range(steps):
            store.save(step, state_of(step), tags=["first"] if step == 0 else [])
    return {step: state_of(step) for step in range(steps)}


def holds(run: str, *choices: dict[int, Any], deep: bool = True, **options: Any) -> dict[int, Any]:
    """Assert that the store has exactly one of these sets of checkpoints, whole; return it."""
    store = new(run, create=False, **options)
    steps = {e.step for e in store.log()}
    for states in choices:
        if set(states) == steps:
            for step, state in states.items():
                same(state, store.load(step))
            assert not deep or store.verify(deep=True).faults == []
            return states
    raise AssertionError((steps, [sorted(c) for c in choices]))


def files_of(run: str) -> dict[str, bytes]:
    root = run.removeprefix("memory:/") + "/"
    return {p.removeprefix(root): f.getvalue() for p, f in fsspec.filesystem("memory").store.items() if p.startswith(root)}


# ---------------------------------------------------------------- what a store does


def test_states(run: str) -> None:
    states = build(run, 7)
    names = files_of(run)
    assert {n.partition("/")[0] for n in names} == {"head.json", "objects", "pages", "conditions.probe"}
    assert sum(n.startswith("objects/") for n in names) == 7
    assert sum(n.startswith("pages/") for n in names) == 2
    holds(run, states)
    with new(run, create=False) as store:
        assert [e.step for e in store.log()] == [6, 5, 4, 3, 2, 1, 0]
        assert store.tags() == {"first": 0}
        same(states[0], store.load("first"))
        assert list(store.load(5, keys="w")) == ["w", "n"]
        with store.open(6) as checkpoint:
            assert checkpoint.tensor("w")[10:20].tobytes() == states[6]["w"][10:20].tobytes()
        depths = [store.open(step).manifest.records["w"].depth for step in states]
        assert max(depths) == 2  # differences, or nothing was read through others
        assert {d.key: d.what for d in store.diff(4, 5)} == {"w": "changed", "frozen": "same", "now and then": "same"}
        assert repr(store) == f"<tzip store {run!r}>"


def test_it_holds_what_a_folder_would(run: str, tmp_path: Path) -> None:
    """Copied file by file it is a store in a folder, and the other way round."""
    states = build(run)
    for name, data in files_of(run).items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_bytes(data)
    assert isinstance(open_backend(tmp_path / "run"), LocalFolder)
    with new(tmp_path / "run", create=False) as store:
        for step, state in states.items():
            same(state, store.load(step))
        store.save(5, state_of(5))
        store.prune(keep_last=2)
        store.gc(grace=0)
    other = f"{run}-2"
    files = fsspec.filesystem("memory")
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            files.pipe_file(f"{other}/{path.relative_to(tmp_path / 'run').as_posix()}", path.read_bytes())
    holds(other, {step: state_of(step) for step in (0, 4, 5)})
    with pytest.raises(tzip.UsageError, match="storage_options"):
        new(tmp_path / "run", storage_options={"key": "x"})
    assert isinstance(open_backend(f"file://{tmp_path}/run"), LocalFolder)


def test_files(run: str, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("not a tensor")
    with new(run) as store:
        for step in range(3):
            np.save(folder / "w.npy", WALK[step])
            store.save_files(step, [folder])
        depth = store.open(2).manifest.objects
        assert len(depth) == 3  # step 2 leans on 1, that on 0
        for step in range(3):
            store.restore(step, tmp_path / f"out{step}")
            assert np.load(tmp_path / f"out{step}" / "w.npy").tobytes() == WALK[step].tobytes()
            assert (tmp_path / f"out{step}" / "a.txt").read_text() == "not a tensor"
        assert store.verify(deep=True).faults == []
        report = store.prune(keep_last=1)
        assert report.rewritten == [2]
        assert store.gc(grace=0).removed == 3
        store.restore(2, tmp_path / "after")
        assert np.load(tmp_path / "after" / "w.npy").tobytes() == WALK[2].tobytes()
        store.save(3, {"w": WALK[3]})
        store.restore(3, tmp_path / "w.safetensors")
        assert (tmp_path / "w.safetensors").read_bytes().endswith(WALK[3].tobytes())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:.*TypedStorage.*", "ignore::FutureWarning")
def test_distributed_checkpoints(run: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    import torch.distributed.checkpoint as dcp

    from tzip.torch_dcp import StorageReader, StorageWriter

    for step in range(3):
        state = {"w": torch.from_numpy(WALK[step].reshape(20, 30)), "n": step}
        dcp.save(state, storage_writer=StorageWriter(run, step=step, level="fast", threads=1), no_dist=True)
    for step in range(3):
        got = {"w": torch.zeros(20, 30), "n": -1}
        dcp.load(got, storage_reader=StorageReader(run, step=step, threads=1), no_dist=True)
        assert got["w"].numpy().tobytes() == WALK[step].tobytes()
        assert got["n"] == step
    new(run, create=False).restore(2, tmp_path / "w.safetensors")
    assert WALK[2].tobytes() in (tmp_path / "w.safetensors").read_bytes()


def test_the_command(run: str, tmp_path: Path) -> None:
    def tzip_store(*words: str) -> Any:
        done = CliRunner().invoke(cli, ["store", *words], prog_name="tzip")
        assert done.exit_code == 0, (done.output, done.stderr, done.exception)
        return done

    np.save(tmp_path / "w.npy", WALK[0])
    tzip_store("init", run, "--level", "fast")
    tzip_store("save", run, str(tmp_path / "w.npy"), "--step", "3", "--metric", "loss=2")
    assert [row["step"] for row in json.loads(tzip_store("log", run, "--json").stdout)] == [3]
    tzip_store("restore", run, "latest", "-o", str(tmp_path / "out"))
    assert (tmp_path / "out" / "w.npy").read_bytes() == (tmp_path / "w.npy").read_bytes()
    tzip_store("verify", run, "--deep")
    tzip_store("tag", run, "good", "3")
    tzip_store("prune", run, "--keep-last", "1")
    tzip_store("gc", run)
    tzip_store("repair", run)
    assert json.loads(tzip_store("stats", run, "--json").stdout)["checkpoints"] == 1
    assert "F32  [600]" in tzip_store("ls", run).stdout
    done = CliRunner().invoke(cli, ["store", "log", f"{run}-none"], prog_name="tzip")
    assert done.exit_code == 2


def test_what_cannot_have_a_store(run: str) -> None:
    with pytest.raises(tzip.UsageError, match="no store"):
        new(run, create=False)
    assert files_of(run) == {}
    with pytest.raises(tzip.UsageError, match="depend on what stands there"):
        new("http://127.0.0.1:9/run")
    with pytest.raises(tzip.UsageError, match="nothing://"):
        new("nothing://run")
    fsspec.filesystem("memory").pipe_file(f"{run}/notes.txt", b"mine")
    with pytest.raises(tzip.UsageError, match="not empty"):
        new(run)
    assert files_of(run) == {"notes.txt": b"mine"}


def test_a_lost_head_and_damage(run: str) -> None:
    states = build(run)
    files = fsspec.filesystem("memory")
    files.rm_file(f"{run}/head.json")
    with pytest.raises(tzip.CorruptError, match="no head"):
        new(run)
    assert upkeep.repair(open_backend(run), deep=True, threads=1).kept == list(states)
    holds(run, states)
    lost = new(run).find(4).object
    data = bytearray(files.cat_file(f"{run}/objects/{lost}.tzip"))
    for change in ("flip", "cut", "gone", "another"):
        if change == "gone":
            files.rm_file(f"{run}/objects/{lost}.tzip")
        elif change == "another":
            files.pipe_file(f"{run}/objects/{lost}.tzip", files.cat_file(f"{run}/objects/{new(run).find(3).object}.tzip"))
        else:
            bad = bytes(data[:200]) + bytes([data[200] ^ 1]) + bytes(data[201:]) if change == "flip" else bytes(data[:-9])
            files.pipe_file(f"{run}/objects/{lost}.tzip", bad)
        faults = new(run).verify(deep=True).faults
        assert [(f.path, f.steps) for f in faults] == [(f"{run}/objects/{lost}.tzip", (4,))], change
    assert list(new(run).repair().lost) == [4]
    holds(run, {k: v for k, v in states.items() if k != 4})


# ---------------------------------------------------------------- every call fails once

CALLS = ("cat_file", "pipe_file", "put_file", "info", "ls", "rm_file")


class Failing:
    """Lets call number `at` into fsspec's memory fail, before or after it is carried out; with `keep` all later ones, too."""

    def __init__(self, at: int, after: bool = False, keep: bool = False) -> None:
        self.at, self.after, self.keep = at, after, keep
        self.calls: list[str] = []

    def __enter__(self) -> "Failing":
        self.patch = pytest.MonkeyPatch()
        kind = type(fsspec.filesystem("memory"))
        for name in CALLS:
            self.patch.setattr(kind, name, self._counted(name, getattr(kind, name)))
        self.inside = threading.local()
        return self

    def __exit__(self, *_: object) -> None:
        self.patch.undo()

    def _counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(fs: Any, *args: Any, **kwargs: Any) -> Any:
            if getattr(self.inside, "yes", False):  # one of them calls another
                return original(fs, *args, **kwargs)
            self.inside.yes = True
            try:
                self.calls.append(name)
                n = len(self.calls)
                fails = n == self.at or (self.keep and n > self.at)
                if fails and not self.after:
                    raise ConnectionResetError("before")
                answer = original(fs, *args, **kwargs)
                if fails:
                    raise TimeoutError("after")
                return answer
            finally:
                self.inside.yes = False

        return call


def copied(run: str, to: str) -> str:
    files = fsspec.filesystem("memory")
    for name, data in files_of(run).items():
        files.pipe_file(f"{to}/{name}", data)
    return to


def pruned(run: str) -> dict[int, Any]:
    build(run)
    new(run).prune(keep_last=2)
    return {k: state_of(k) for k in (0, 3, 4)}


BEFORE = {step: state_of(step) for step in range(5)}
WORKS: dict[str, tuple[Callable[[str], Any], Callable[[tzip.Store], Any], dict[int, Any]]] = {
    "save": (build, lambda s: s.save(5, state_of(5), tags=["new"]), BEFORE | {5: state_of(5)}),
    "load": (build, lambda s: [same(v, s.load(k)) for k, v in BEFORE.items()], BEFORE),
    "replace": (build, lambda s: s.save(2, state_of(7), replace_step=True), BEFORE | {2: state_of(7)}),
    "prune": (build, lambda s: s.prune(keep_last=2), {k: BEFORE[k] for k in (0, 3, 4)}),
    "gc": (pruned, lambda s: s.gc(grace=0), {k: BEFORE[k] for k in (0, 3, 4)}),
    "tag": (build, lambda s: s.tag("x", 3), BEFORE),
    "repair": (build, lambda s: s.repair(deep=True), BEFORE),
}


@pytest.mark.parametrize("name", WORKS)
def test_every_call_fails_once(run: str, name: str) -> None:
    """It is done again, and all is as if nothing had happened: a save is there once, nothing is left over."""
    make, work, after = WORKS[name]
    make(run)
    counting = new(copied(run, f"{run}-counted"))
    with Failing(-1) as counted:
        work(counting)
    expected = sorted(n.partition("/")[0] for n in files_of(f"{run}-counted"))
    assert len(counted.calls) >= 6
    for n, late in itertools.product(range(1, len(counted.calls) + 1), (False, True)):
        if counted.calls[n - 1] in ("cat_file", "info") and n % 12 and not NIGHTLY:  # there are many
            continue
        other = copied(run, f"{run}-{n}-{late}")
        store = new(other)
        with Failing(n, late) as failing:
            work(store)
        assert len(failing.calls) > len(counted.calls)
        assert sorted(p.partition("/")[0] for p in files_of(other)) == expected, (n, late)
        holds(other, after, deep=n % 8 == 0)


@pytest.mark.parametrize("name", ["save", "prune", "gc"])
def test_every_call_fails_for_good(run: str, name: str) -> None:
    """From the Nth call on there is no network: the store is as it was, or as it was to be; the next save goes on."""
    make, work, after = WORKS[name]
    before = make(run)
    counting = new(copied(run, f"{run}-counted"))
    with Failing(-1) as counted:
        work(counting)
    failed = 0
    for n in range(1, len(counted.calls) + 1):
        if counted.calls[n - 1] in ("cat_file", "info") and n % 6 and not NIGHTLY:
            continue
        other = copied(run, f"{run}-{n}")
        store = new(other)
        late = bool(n % 2)
        with Failing(n, late, keep=True), pytest.MonkeyPatch.context() as patch:
            patch.setattr(cloud, "TRIES", 2)
            try:
                work(store)
            except (OSError, tzip.TzipError):
                failed += 1
        now = holds(other, before, after, deep=n % 4 == 0)
        with store if n % 2 else new(other) as going:
            going.save(50, state_of(20))
            going.gc(grace=0)
        holds(other, now | {50: state_of(20)}, deep=n % 4 == 0)
        assert {f"objects/{i}.tzip" for i in upkeep.reachable(going.backend, going.log())} == {
            p for p in files_of(other) if p.startswith("objects/")
        }
    assert failed > 3


def test_a_head_whose_answer_was_lost(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands, and the writer must see that it is its own; another's is not."""
    build(run, 1)
    backend = open_backend(run)
    old = backend.read_head()
    assert old is not None
    with Failing(6, after=True) as failing:  # three look at the probe, two at what stands there
        backend.put_head(b"one", old)
    assert failing.calls[5] == "pipe_file"
    assert failing.calls.count("pipe_file") == 1
    assert files_of(run)["head.json"] == b"one"
    original = services._Memory.write

    def lost(self: services._Memory, *args: Any) -> bool:
        original(self, *args)
        raise ConnectionResetError

    monkeypatch.setattr(services._Memory, "write", lost)
    backend.put_head(b"two", b"one")
    assert files_of(run)["head.json"] == b"two"
    monkeypatch.setattr(services._Memory, "write", lambda *args: (_ for _ in ()).throw(ConnectionResetError))
    with pytest.raises(ConnectionResetError):
        backend.put_head(b"three", b"two")
    monkeypatch.undo()
    with pytest.raises(StaleHeadError):
        backend.put_head(b"three", b"one")
    with pytest.raises(StaleHeadError):
        backend.put_head(b"three", None)
    assert files_of(run)["head.json"] == b"two"


def test_a_save_whose_answer_was_lost_before_another(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in the store, and is said to be; the next one learns that there is another writer."""
    states = build(run)
    original = services._Memory.write
    lost: list[str] = []

    def write(self: services._Memory, path: str, data: bytes, seen: Any = None) -> bool:
        done = original(self, path, data, seen)
        if path.endswith("head.json") and not lost:
            lost.append(path)
            new(run).save(6, state_of(6))
            raise ConnectionResetError
        return done

    store = new(run)
    monkeypatch.setattr(services._Memory, "write", write)
    report = store.save(5, state_of(5))
    assert report is not None
    assert (report.step, lost) == (5, [lost[0]])
    with pytest.raises(tzip.ConflictError, match="another writer has saved step 6"):
        store.save(7, state_of(7))
    holds(run, states | {5: state_of(5), 6: state_of(6)})


def test_a_page_that_is_made_again(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save has died after it put a page, which a sweep has condemned: the next save has one of another name."""
    states = build(run, 4)
    original = services._Memory.write

    def write(self: services._Memory, path: str, *args: Any) -> bool:
        if path.endswith("head.json"):
            raise PermissionError(13, "no")
        return original(self, path, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(services._Memory, "write", write)
        with pytest.raises(PermissionError):
            new(run).save(4, state_of(4))
    with new(run) as store:
        assert len(store.backend.page_names()) == 1
        assert store.gc(grace=0).removed == 1
        assert store.backend.page_names() == []
        store.save(4, state_of(4))
    holds(run, states | {4: state_of(4)})


def test_what_is_damaged_on_its_way_is_asked_for_again(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads, pages and indices; a chunk that is damaged is an error, once."""
    states = build(run, 7)
    kind = type(fsspec.filesystem("memory"))
    original = kind.cat_file
    asked: list[tuple[str, bool]] = []  # the path, and whether all or the end of it was asked for
    wrong = -1

    def flip(self: Any, path: str, start: int | None = None, end: int | None = None) -> bytes:
        data: bytes = original(self, path, start, end)
        asked.append((path, end is None or end == self.info(path)["size"]))
        return data[:-1] + bytes([data[-1] ^ 1]) if len(asked) == wrong else data

    monkeypatch.setattr(kind, "cat_file", flip)
    new(run).load(1)
    assert {path.split("/")[-2] for path, _ in asked} == {"run", "pages", "objects"}
    for wrong in range(1, len(asked) + 1):
        _, proven = asked[wrong - 1]
        before = list(asked)
        asked.clear()
        if proven:
            same(states[1], new(run).load(1))
        else:
            store = new(run)
            with pytest.raises(tzip.CorruptError):
                store.load(1)
            same(states[1], store.load(1))
        asked[:] = before


def test_what_does_not_pass_is_not_tried_again(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build(run, 1)
    calls: list[str] = []

    def refuse(self: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        calls.append(path)
        raise PermissionError(13, "no")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", refuse)
    with pytest.raises(PermissionError):
        new(run)
    assert len(calls) == 1
    calls.clear()

    def broken(self: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        calls.append(path)
        raise ConnectionResetError

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", broken)
    with pytest.raises(ConnectionResetError):
        new(run)
    assert len(calls) == cloud.TRIES


# ---------------------------------------------------------------- others at the same time


def test_two_writers(run: str) -> None:
    states = build(run)
    one, other = new(run), new(run)
    one.save(5, state_of(5))
    other.save(6, state_of(6))
    with pytest.raises(tzip.ConflictError, match="another writer"):
        one.save(7, state_of(7))
    other.save(7, state_of(7))
    holds(run, states | {step: state_of(step) for step in (5, 6, 7)})


def test_writers_that_meet_at_the_head(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All have read the same head when they replace it: one wins."""
    states = build(run)
    meeting = threading.Barrier(3)
    original = CloudFolder.missing
    monkeypatch.setattr(CloudFolder, "missing", lambda self, ids: (meeting.wait(30), original(self, ids))[1])
    came: dict[int, str] = {}

    def save(step: int) -> None:
        try:
            new(run).save(step, state_of(step))
            came[step] = "saved"
        except tzip.ConflictError:
            came[step] = "conflict"

    threads = [threading.Thread(target=save, args=(step,)) for step in (5, 6, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(came.values()) == ["conflict", "conflict", "saved"]
    won = next(step for step, what in came.items() if what == "saved")
    monkeypatch.undo()
    holds(run, states | {won: state_of(won)})


def test_tags_beside_a_writer(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another has changed in the head meanwhile is no conflict, and stays."""
    states = build(run)
    original = CloudFolder.publish_object

    def publish(self: CloudFolder, *args: Any) -> None:
        original(self, *args)
        new(run).tag("late", 3)

    monkeypatch.setattr(CloudFolder, "publish_object", publish)
    with new(run) as store:
        store.save(5, state_of(5), tags=["new"])
        assert store.tags() == {"first": 0, "late": 3, "new": 5}
    holds(run, states | {5: state_of(5)})


@pytest.mark.parametrize("grace", [0, 3600])
def test_sweeps_beside_a_writer(run: str, monkeypatch: pytest.MonkeyPatch, grace: int) -> None:
    """An object that no head names yet stays for the grace period; one that has gone is not named."""
    states = build(run)
    original = CloudFolder.publish_object

    def publish(self: CloudFolder, *args: Any) -> None:
        original(self, *args)
        for _ in range(2):
            new(run).gc(grace=grace)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CloudFolder, "publish_object", publish)
        if grace:
            new(run).save(5, state_of(5))
            states[5] = state_of(5)
        else:
            with pytest.raises(tzip.ConflictError, match="removed"):
                new(run).save(5, state_of(5))
    holds(run, states)
    with new(run) as store:
        store.save(6, state_of(6))
    holds(run, states | {6: state_of(6)})


@pytest.mark.parametrize("when", ["before the head", "after the head"])
def test_what_a_sweep_removes_no_head_names(run: str, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """A writer has proven that its objects are there; then a sweep decides that they go, or has, and not yet removed them."""
    states = build(run)
    sweeper, writer = new(run), new(run)
    once: list[int] = []

    def sweep() -> None:
        if not once:
            once.append(1)
            sweeper.gc(grace=0)

    if when == "before the head":
        original = CloudFolder.missing

        def missing(self: CloudFolder, ids: Any) -> list[str]:
            found = original(self, ids)
            if self is writer.backend:
                sweep()
            return found

        monkeypatch.setattr(CloudFolder, "missing", missing)
    else:
        publish = CloudFolder.publish_object

        def slow(self: CloudFolder, *args: Any) -> None:
            publish(self, *args)
            with pytest.MonkeyPatch.context() as patch:  # it dies when it is to remove what the head condemns
                patch.setattr(CloudFolder, "delete_object", lambda *a: (_ for _ in ()).throw(OSError(5, "died")))
                with contextlib.suppress(OSError):
                    sweep()

        monkeypatch.setattr(CloudFolder, "publish_object", slow)
    with pytest.raises(tzip.ConflictError, match="removed"):
        writer.save(5, state_of(5))
    assert once
    monkeypatch.undo()
    holds(run, states)
    sweeper.gc(grace=0)  # goes on with what the dead one has left
    assert sum(p.startswith("objects/") for p in files_of(run)) == 5
    with new(run) as store:
        store.save(5, state_of(5))
    holds(run, states | {5: state_of(5)})


def test_what_was_condemned_is_forgotten(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build(run)
    with new(run) as store:
        store.prune(keep_last=2)
        assert store.gc(grace=0).removed > 0
        assert store.journal().head.condemned
        before = files_of(run)
        assert store.gc(grace=0).removed == 0
        assert files_of(run) == before  # nothing to say, and nothing said
        monkeypatch.setattr(upkeep, "_CONDEMNED", 0.0)
        store.gc(grace=0)
        assert not store.journal().head.condemned
        assert not store.journal().head.retired


def test_a_sweep_that_slept_stops(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    states = {k: v for k, v in build(run).items() if k in (0, 3, 4)}
    with new(run) as store:
        store.prune(keep_last=2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(upkeep, "_REMOVING", -1.0)
            assert store.gc(grace=0).removed == 0
        assert store.gc(grace=0).removed > 0
    holds(run, states)


def test_a_base_that_goes_while_a_save_leans_on_it(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build(run)
    original = CloudFolder.publish_object
    once: list[int] = []

    def publish(self: CloudFolder, *args: Any) -> None:
        original(self, *args)
        if not once:
            once.append(1)
            other = new(run)
            other.prune(keep_every=4, keep_tagged=False)
            other.gc(grace=0)
            monkeypatch.setattr(upkeep, "_CONDEMNED", 0.0)
            other.gc(grace=3600)  # forgets what it has condemned: the writer sees only that it is not there

    store = new(run)
    store.save(5, state_of(5))
    monkeypatch.setattr(CloudFolder, "publish_object", publish)
    with pytest.raises(tzip.ConflictError, match="removed"):
        store.save(6, state_of(6))
    holds(run, {k: state_of(k) for k in (0, 4)})


# ---------------------------------------------------------------- a service


@pytest.fixture(scope="module")
def moto() -> Iterator[int]:
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield server.get_host_and_port()[1]
    finally:
        server.stop()


@pytest.fixture(scope="module")
def service(moto: int) -> Iterator[Proxy]:
    """One for all tests: fsspec keeps a file system for as long as a process lives, with the address that it had at first."""
    with Proxy(moto, late=1.5) as proxy, pytest.MonkeyPatch.context() as patch:
        for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("DEFAULT_REGION", "us-east-1")):
            patch.setenv(f"AWS_{name}", value)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        fsspec.filesystem("s3").clear_instance_cache()
        # Not "weights": servers of one process have their buckets in common.
        fsspec.filesystem("s3", use_listings_cache=False).mkdir("trainings")
        yield proxy
        fsspec.filesystem("s3").clear_instance_cache()


@pytest.fixture
def proxy(service: Proxy) -> Proxy:
    service.well()
    return service


# The libraries' own waits are long.
QUICK = {"config_kwargs": {"retries": {"max_attempts": 0}, "read_timeout": 0.5, "connect_timeout": 5}}
pytestmark = pytest.mark.filterwarnings("ignore:datetime.datetime.utc:DeprecationWarning")


def bucket() -> str:
    return f"s3://trainings/{uuid.uuid4().hex}"


def test_s3(proxy: Proxy) -> None:
    """Address and credentials come from the environment."""
    run = bucket()
    states = build(run, 6)
    with new(run, create=False) as store:
        for step, state in states.items():
            same(state, store.load(step))
        assert store.verify(deep=True).faults == []
        store.prune(keep_last=2)
        assert store.gc(grace=0).removed > 0
    holds(run, {k: states[k] for k in (0, 4, 5)}, deep=False)
    sent = [q for q in proxy.requests if q.method == "PUT" and q.key.endswith(("head.json", ".tzip"))]
    assert all({"If-None-Match", "If-Match"} & q.headers.keys() for q in sent)
    assert len(sent) > 10


@pytest.mark.parametrize(("name", "stride"), [("save", 4), ("load", 6), ("gc", 14)])
def test_requests_to_s3_fail_once(proxy: Proxy, name: str, stride: int) -> None:
    """With a fault of another kind each time; with the profile `nightly` every request, in all ways."""
    run = bucket()
    kinds = [fault for fault in FAULTS if fault not in ("blind", "stale", "wrong", "late")]
    now = build(run, 3, storage_options=QUICK)

    def work(step: int) -> None:
        with new(run, create=False, max_chain=2, storage_options=QUICK) as store:
            if name == "save":
                store.save(step, state_of(step))
                now[step] = state_of(step)
            elif name == "load":
                same(now[2], store.load(2))
            else:
                store.prune(keep_last=1, keep_tagged=False)
                store.gc(grace=0)

    with new(run, create=False, storage_options=QUICK) as store:
        store.save(3, state_of(3))
        now[3] = state_of(3)
    proxy.well()
    work(4)
    n, step = 1, 5
    while n <= len(proxy.requests) and n < 40:
        for fault in kinds if NIGHTLY else (kinds[n // stride % len(kinds)],):
            if name == "gc":
                with new(run, create=False, storage_options=QUICK) as store:
                    store.save(step, state_of(step))
            proxy.fail(n, fault)
            work(step)
            proxy.plan = lambda i, q: ""
            step += 1
        n += 1 if NIGHTLY else stride
    proxy.well()
    if name == "gc":
        now = {step - 1: state_of(step - 1)}
    store = new(run, create=False)
    assert sorted(e.step for e in store.log()) == sorted(now)
    for step in (*sorted(now)[::5], max(now)):
        same(now[step], store.load(step))
    assert store.verify().faults == []
    wanted = upkeep.reachable(store.backend, store.log())
    assert set(store.backend.object_ids()) == wanted or name == "gc"


def test_late_answers(proxy: Proxy) -> None:
    """Nobody waits for them; what was done is seen to be done."""
    run = bucket()
    states = build(run, 2, storage_options=QUICK)
    with new(run, create=False, storage_options=QUICK) as store:
        proxy.requests.clear()
        proxy.plan = lambda n, q: "late" if [r.key for r in proxy.requests if r.method == "PUT"].count(q.key) == 1 else ""
        store.save(2, state_of(2))
        assert sum(q.key.endswith("head.json") and q.method == "PUT" for q in proxy.requests) == 2  # and the second was refused
        proxy.well()
    holds(run, states | {2: state_of(2)}, deep=False)


def test_wrong_bytes_are_never_returned(proxy: Proxy) -> None:
    """Wrong small files and indices are asked for again; wrong chunks are an error, and right the next time."""
    run = bucket()
    states = build(run, 3, max_chain=2)
    n = 1
    errors = 0
    proxy.well()
    new(run, create=False).load(2)
    while n <= len(proxy.requests):
        proxy.fail(n, "wrong")
        try:
            store = new(run, create=False)
            got = store.load(2)
        except (tzip.TzipError, OSError):
            errors += 1
            proxy.plan = lambda i, q: ""
            got = new(run, create=False).load(2)
        same(states[2], got)
        n += 1
    assert 0 < errors < n // 2


def test_stale_listings(proxy: Proxy) -> None:
    """Listings as they were before the last saves: nothing of those goes, and what is gone already is no error."""
    run = bucket()
    states = build(run, 3)
    with new(run) as store:
        store.gc(grace=0)  # lists for the first time
        for step in (3, 4, 5):
            store.save(step, state_of(step))
        store.prune(keep_last=2)
        proxy.plan = lambda n, q: "stale" if q.lists else ""
        store.gc(grace=0)
        holds(run, {k: state_of(k) for k in (0, 4, 5)}, deep=False)
        store.gc(grace=0)
        proxy.well()
        store.gc(grace=0)
        assert set(store.backend.object_ids()) == upkeep.reachable(store.backend, store.log())
    holds(run, {0: states[0], 4: state_of(4), 5: state_of(5)}, deep=False)


def test_a_service_that_ignores_conditions(proxy: Proxy) -> None:
    run = bucket()
    proxy.plan = lambda n, q: "blind"
    with pytest.raises(tzip.UsageError, match="ignores conditions"):
        new(run)
    proxy.well()
    build(run, 1)
    proxy.plan = lambda n, q: "blind"
    store = new(run)
    same(state_of(0), store.load())
    with pytest.raises(tzip.UsageError, match="ignores conditions"):
        store.save(1, state_of(1))
    proxy.well()
    holds(run, {0: state_of(0)}, deep=False)


def test_uploads_in_parts_and_those_that_nobody_ended(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "_PART", 5 << 20)
    run = bucket()
    state = {"w": np.frombuffer(noise(11 << 20), np.uint8)}
    with new(run) as store:
        proxy.well()
        store.save(0, state)
        assert sum("partNumber" in q.path for q in proxy.requests) == 3
        same(state, new(run).load())
        fs = fsspec.filesystem("s3", use_listings_cache=False)
        place = {"Bucket": "trainings", "Key": run.removeprefix("s3://trainings/") + "/objects/x.tzip"}
        fs.call_s3("create_multipart_upload", **place)
        fs.call_s3("create_multipart_upload", Bucket="trainings", Key="of others")
        assert store.gc().partials == 1  # moto says that it was begun in 2010
        left = [u["Key"] for u in fs.call_s3("list_multipart_uploads", Bucket="trainings").get("Uploads", [])]
        assert "of others" in left
        assert place["Key"] not in left


def test_uploads_of_the_living_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of uploads, some begun lately, as a service would tell of them."""
    now = datetime.datetime.now(datetime.UTC)
    begun = {f"run/objects/{i}": now - datetime.timedelta(hours=i) for i in range(6)}
    aborted: list[str] = []

    class Fake:
        def split_path(self, path: str) -> tuple[str, str, None]:
            return (*path.split("/", 1), None)  # type: ignore[return-value]

        def call_s3(self, method: str, **asked: Any) -> Any:
            if method == "abort_multipart_upload":
                aborted.append(asked["Key"])
                if asked["Key"].endswith("4"):
                    raise FileNotFoundError
                return {}
            assert asked["Prefix"] == "run/objects/"
            names = [n for n in begun if n > asked.get("KeyMarker", "")][:2]
            found = [{"Key": n, "UploadId": "u", "Initiated": begun[n]} for n in names]
            markers = {"NextKeyMarker": names[-1], "NextUploadIdMarker": "u"}
            return {"Uploads": found, "IsTruncated": names[-1] != "run/objects/5", **markers}

    assert services._S3(Fake()).abort_uploads("bucket/run/objects/", 2.5 * 3600) == 3
    assert aborted == ["run/objects/3", "run/objects/4", "run/objects/5"]


def test_requests_of_a_load(proxy: Proxy) -> None:
    """A part of a tensor moves its chunks, in as many requests as there are archives that it is read through and spans."""
    run = bucket()
    rng = np.random.default_rng(3)
    first = {f"w{i}": rng.integers(0, 255, (4, 1 << 20), dtype=np.uint8) for i in range(3)}
    then = {k: v ^ (rng.random(v.shape) < 0.001) for k, v in first.items()}
    with new(run) as store:
        store.save(0, first)
        store.save(1, then)
    for step, state, archives in ((0, first, 1), (1, then, 2)):
        with new(run, create=False).open(step) as checkpoint:
            checkpoint["w0"]  # opens all
            for key, array in state.items():
                proxy.well()
                assert checkpoint.tensor(key)[:2].tobytes() == array[:2].tobytes()
                assert [q.method for q in proxy.requests] == ["GET"] * archives
                assert sum(q.moved for q in proxy.requests) < 2.4 * (1 << 20)
                proxy.well()
                assert checkpoint[key].tobytes() == array.tobytes()
                assert [q.method for q in proxy.requests] == ["GET"] * archives
        proxy.well()
        same(state, new(run, create=False).load(step, framework="np"))
        assert len(proxy.requests) <= 3 + 4 * archives + 1


def test_gcs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # else it asks the real service what kind of bucket it is
    pytest.importorskip("gcsfs")
    with Gcs() as service:
        options = {"endpoint_url": service.url, "token": "anon", "skip_instance_cache": True}
        run = "gs://weights/runs/1"
        states = build(run, 6, storage_options=options)
        holds(run, states, storage_options=options)
        one, other = new(run, storage_options=options), new(run, storage_options=options)
        one.save(6, state_of(6))
        other.save(7, state_of(7))
        with pytest.raises(tzip.ConflictError):
            one.save(8, state_of(8))
        other.save(8, state_of(8))
        other.prune(keep_last=3)
        assert other.gc(grace=0).removed > 0
        holds(run, {0: states[0], 6: state_of(6), 7: state_of(7), 8: state_of(8)}, storage_options=options)
        backend = other.backend
        head = backend.read_head()
        assert head is not None
        with pytest.raises(StaleHeadError):
            backend.put_head(b"x", None)
        assert isinstance(backend, CloudFolder)
        assert not backend._service.write(f"{backend._root}/head.json", b"x")
        assert not backend._service.write(f"{backend._root}/none.json", b"x", "77")
        assert backend.read_head() == head
        service.ignores_conditions = True
        with pytest.raises(tzip.UsageError, match="ignores conditions"):
            new(run, storage_options=options).save(9, state_of(9))


@pytest.mark.skipif("TZIP_TEST_BUCKET" not in os.environ, reason="needs a bucket: TZIP_TEST_BUCKET=s3://bucket/folder")
def test_a_real_bucket() -> None:
    run = f"{os.environ['TZIP_TEST_BUCKET'].rstrip('/')}/{uuid.uuid4().hex}"
    try:
        states = build(run)
        holds(run, states)
        one, other = new(run), new(run)
        one.save(5, state_of(5))
        with pytest.raises(tzip.ConflictError):
            other.save(6, state_of(6))
        one.prune(keep_last=2)
        assert one.gc(grace=0).removed > 0
        holds(run, {k: state_of(k) for k in (0, 4, 5)})
    finally:
        backend = open_backend(run)
        assert isinstance(backend, CloudFolder)
        backend._fs.rm(backend._root, recursive=True)
