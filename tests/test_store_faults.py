"""Failures, kills and races: what was committed stays, whole; what was not is not there; the next save works."""

import contextlib
import errno
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import fault, partials, posix
from stores import same, walk, whole

import tzip
from tzip.store import journal, runs, upkeep
from tzip.store.backends import LocalFolder, open_backend
from tzip.store.journal import Journal

pytestmark = posix


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few entries a page, and no waiting for the disk, whose order test_faults.py tests."""
    monkeypatch.setattr(journal, "PAGE", 2)
    monkeypatch.setattr(journal, "_MAX_RECENT", 4)
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def new(path: Path, **options: Any) -> tzip.Store:
    return tzip.Store(path, threads=1, **{"level": "fast", "max_chain": 3, **options})


WALK = list(walk(600, 40))
FROZEN = np.arange(200, dtype="<f4")


def state_of(step: int) -> dict[str, Any]:
    return {"w": WALK[step % 40] + step // 40, "frozen": FROZEN, "n": step, "now and then": FROZEN[:50] + step // 2}


def build(path: Path, steps: int = 5) -> dict[int, Any]:
    with new(path) as store:
        for step in range(steps):
            store.save(step, state_of(step), tags=["first"] if step == 0 else [])
    return {step: state_of(step) for step in range(steps)}


def holds(path: Path, *choices: dict[int, Any], deep: bool = True, least: int = -1) -> dict[int, Any]:
    """Assert that the store has exactly one of these sets of checkpoints, whole (from step `least` on); return it."""
    with new(path, create=False) as store:
        steps = {e.step for e in store.log()}
        for states in choices:
            if set(states) == steps:
                with contextlib.suppress(AssertionError):
                    for step, state in states.items():
                        if step >= least:
                            same(state, store.load(step))
                    break
        else:
            raise AssertionError((steps, [sorted(c) for c in choices]))
        assert not deep or store.verify(deep=True).faults == []
    return states


# ---------------------------------------------------------------- every call fails once

Work = tuple[Callable[[Path], dict[int, Any]], Callable[[tzip.Store], Any], dict[int, Any]]


def pruned(path: Path) -> dict[int, Any]:
    build(path)
    with new(path) as store:
        store.prune(keep_last=2)
        store.save(5, state_of(5))
    (path / "objects" / "new-dead.tzip-partial").write_bytes(b"left by a dead process")
    return {k: state_of(k) for k in (0, 3, 4, 5)}


def headless(path: Path) -> dict[int, Any]:
    states = build(path)
    (path / "head.json").write_bytes((path / "head.json").read_bytes().replace(b'"generation":5', b'"generation":7'))
    return states


def holed(path: Path) -> dict[int, Any]:
    states = build(path)
    with new(path) as store:
        lost = store.find(4).object
    (path / "objects" / f"{lost}.tzip").unlink()
    return {k: v for k, v in states.items() if k < 4}


BEFORE = {step: state_of(step) for step in range(5)}
WORKS: dict[str, Work] = {
    "save": (build, lambda s: s.save(5, state_of(5), tags=["new"]), BEFORE | {5: state_of(5)}),
    "background": (build, lambda s: (s.save(5, state_of(5), block=False), s.wait()), BEFORE | {5: state_of(5)}),
    "replace": (build, lambda s: s.save(2, state_of(7), replace_step=True), BEFORE | {2: state_of(7)}),
    "prune": (build, lambda s: s.prune(keep_last=2), {k: BEFORE[k] for k in (0, 3, 4)}),
    "gc": (pruned, lambda s: s.gc(grace=0), {k: state_of(k) for k in (0, 3, 4, 5)}),
    "repair a head": (headless, lambda s: s.repair(), BEFORE),
    "repair a hole": (holed, lambda s: s.repair(deep=True), {k: BEFORE[k] for k in range(4)}),
    "tag": (build, lambda s: s.tag("x", 3), BEFORE),
}
READS = ("preadv", "stat", "lstat", "fstat")  # there are many: one in eight fails, all with the profile `nightly`
WRITES = ("open", "write", "truncate", "flush", "fsync", "replace", "unlink")
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


def opened(path: Path) -> tzip.Store:
    """Return a store even when its head is damaged."""
    with pytest.MonkeyPatch.context() as patch:
        if "head" in path.name:
            patch.setattr(
                tzip.Store,
                "journal",
                lambda self: Journal(self.backend, journal.Head(config={"level": "fast", "max_chain": 3})),
            )
        return new(path)


def failing(work: Callable[[], Any], only: tuple[str, ...] | None = None) -> list[int]:
    """Return which calls of `work` are to fail."""
    with fault(1 << 30, only=only, more=True) as state:
        work()
    assert len(state.calls) > 8
    return [n for n, name in enumerate(state.calls, 1) if NIGHTLY or name not in READS or n % 8 == 0]


@pytest.mark.parametrize(
    ("name", "code", "only"),
    [(name, errno.EIO, None) for name in WORKS if NIGHTLY or name not in ("background", "replace")]
    + [(name, errno.ENOSPC, WRITES) for name in ("background",)],
    ids=lambda x: errno.errorcode[x] if isinstance(x, int) else x if isinstance(x, str) else "writes" if x else "all",
)
def test_every_call_fails(tmp_path: Path, name: str, code: int, only: tuple[str, ...] | None) -> None:
    make, work, after = WORKS[name]
    template = tmp_path / ("head" if make is headless else "template")
    before = make(template)
    work(opened(shutil.copytree(template, tmp_path / f"{template.name}-warm")))
    counted = opened(shutil.copytree(template, tmp_path / f"{template.name}-counted"))
    failed = 0
    for n in failing(lambda: work(counted), only):
        run = shutil.copytree(template, tmp_path / f"{template.name}-{n}")
        store = opened(run)
        with fault(n, code, only, more=True) as state:
            try:
                work(store)
            except (OSError, tzip.TzipError):
                failed += 1
                assert state.fired
        if "repair" in name:
            # Whatever failed, nothing is forgotten that is whole: the next repair has it.
            assert opened(run).repair(deep=True).kept == list(after), (n, state.calls[-1])
        now = holds(run, before, after, deep=n % 8 == 0)
        # The one that failed goes on, or another does; nothing is in the way.
        with store if n % 2 else new(run) as other:
            other.save(50, state_of(20))
            other.gc(grace=0)
        holds(run, now | {50: state_of(20)}, deep=n % 8 == 0, least=3)
        assert partials(run) == []
        shutil.rmtree(run)
    assert failed > 8, failed
    assert holds(tmp_path / counted.backend.root.name, after)


def test_every_call_of_saving_files_fails(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    np.save(folder / "w.npy", WALK[0])
    template = tmp_path / "template"
    with new(template) as store:
        store.save_files(0, [folder])
    first = (folder / "w.npy").read_bytes()
    np.save(folder / "w.npy", WALK[1])
    second = (folder / "w.npy").read_bytes()
    new(shutil.copytree(template, tmp_path / "warm")).save_files(1, [folder])
    counted = new(shutil.copytree(template, tmp_path / "counted"))
    failed = 0
    for n in failing(lambda: counted.save_files(1, [folder])):
        run = shutil.copytree(template, tmp_path / f"r{n}")
        with new(run) as store:
            with fault(n, errno.EIO, more=True) as state, contextlib.suppress(OSError, tzip.TzipError):
                store.save_files(1, [folder])
            failed += state.fired
        with new(run) as store:
            steps = [e.step for e in store.log()]
            assert steps in ([0], [1, 0])
            store.save_files(2, [folder])
            for step in (*steps, 2):
                store.restore(step, tmp_path / f"o{n}-{step}")
                assert (tmp_path / f"o{n}-{step}" / "w.npy").read_bytes() == (second if step else first)
            store.gc(grace=0)
        assert partials(run) == []
        shutil.rmtree(run)
    assert failed > 20


def test_every_call_of_making_a_store_fails(tmp_path: Path) -> None:
    failed = 0
    for n in range(1, 200):
        run = tmp_path / f"r{n}"
        with fault(n, errno.EIO, more=True) as state, contextlib.suppress(OSError, tzip.TzipError):
            new(run)
        failed += state.fired
        with new(run) as store:
            assert list(store.log()) == []
            store.save(0, state_of(0))
        holds(run, {0: state_of(0)})
        if not state.fired:
            break
    assert failed > 8


@pytest.mark.parametrize("only", [("write", "fsync", "replace"), ("open",)], ids=lambda o: "-".join(o))
def test_full_disk(tmp_path: Path, only: tuple[str, ...]) -> None:
    """From the Nth call on there is no space; when there is some again, all goes on."""
    template = tmp_path / "template"
    before = build(template)
    for n in range(1, 200, 1 if NIGHTLY else 3):
        run = shutil.copytree(template, tmp_path / f"r{n}")
        with new(run) as store:
            with fault(n, errno.ENOSPC, only, keep=True) as state:
                for i in (6, 7):
                    with pytest.raises(OSError) if n == 1 else contextlib.suppress(OSError):
                        store.save(i, state_of(i))
            now = holds(run, before, before | {6: state_of(6)}, before | {6: state_of(6), 7: state_of(7)}, deep=False)
            store.save(8, state_of(8))
        holds(run, now | {8: state_of(8)}, deep=n % 4 == 0)
        if not state.fired:
            break
    assert not state.fired
    assert n > 3


# ---------------------------------------------------------------- kills


@contextlib.contextmanager
def child(work: Callable[[int], None]) -> Iterator[tuple[int, int]]:
    """Run `work(pipe)` in a process that shares what this one has compiled; yield its id and the other end of the pipe."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(read)
            work(write)
            status = 0
        except BaseException:
            import traceback

            os.write(write, b"!" + traceback.format_exc().encode())
        finally:
            os._exit(status)
    os.close(write)
    try:
        yield pid, read
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
        os.close(read)


def said(read: int) -> bytes:
    """Return all that a child has said, when it has ended."""
    parts = []
    while part := os.read(read, 1 << 16):
        parts.append(part)
    return b"".join(parts)


@pytest.mark.filterwarnings("ignore:This process", "ignore:os.fork")  # Python and jax on threads, which these do without
def test_two_hundred_kills(tmp_path: Path) -> None:
    run = tmp_path / "run"
    build(run, 2)

    def work(pipe: int) -> None:
        with new(run) as store:
            begin = max(e.step for e in store.log()) + 1
            for step in range(begin, begin + 1000):
                store.save(step, state_of(step), block=step % 3 > 0)
                if step % 3:
                    os.write(pipe, f"{step}\n".encode())
                if step % 4 == 0:
                    store.prune(keep_last=3)
                if step % 5 == 0:
                    store.gc(grace=0)
                if step % 50 == 0:
                    store.repair()

    work_for = random.Random(5)
    latest = killed = 0
    for i in range(200):
        with child(work) as (pid, read):
            early = b""
            for _ in range(work_for.choice((0, 1, 1, 2, 3))):
                early += os.read(read, 1 << 16)
            time.sleep(work_for.uniform(0, 0.02))
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            text = early + said(read)
        assert b"!" not in text, text.decode()
        killed += os.WIFSIGNALED(status)
        acknowledged = [int(line) for line in text.split(b"\n")[:-1]]
        with new(run, create=False) as store:
            steps = sorted(e.step for e in store.log())
            assert steps[-1] >= max([latest, *acknowledged])
            latest = steps[-1]
            assert len(steps) >= 2
            for step in steps[-3:] if i % 10 else steps:
                same(state_of(step), store.load(step))
            if i % 10 == 0:
                assert store.verify(deep=True).faults == []
    assert killed > 190
    assert latest > 200
    with new(run) as store:
        store.prune(keep_last=2)
        store.gc(grace=0)
        wanted = upkeep.reachable(store.backend, store.log())
    assert set(open_backend(run).object_ids()) == wanted
    assert partials(run) == []
    assert {p.stem for p in (run / "pages").iterdir()} == Journal(open_backend(run)).page_names()


# ---------------------------------------------------------------- damage


def test_a_flip_anywhere_in_any_object(tmp_path: Path) -> None:
    run = tmp_path / "run"
    states = build(run, 4)
    rng = random.Random(2)
    with new(run) as store:
        entries = list(store.log())
        needs = {}
        for e in entries:
            with store.open(e.step) as checkpoint:
                needs[e.step] = set(checkpoint.manifest.objects)
    raised = 0
    for archive_id in open_backend(run).object_ids():
        path = run / "objects" / f"{archive_id}.tzip"
        good = path.read_bytes()
        hurt = {step for step, objects in needs.items() if archive_id in objects}
        for at in sorted({0, 8, 60, len(good) - 1, len(good) - 40, *rng.sample(range(len(good)), 12)}):
            path.write_bytes(good[:at] + bytes([good[at] ^ 1 << rng.randrange(8)]) + good[at + 1 :])
            with new(run) as store:
                faults = store.verify(deep=at % 2 == 0).faults
                assert [f.path for f in faults] == [str(path)], at
                assert set(faults[0].steps) == hurt
                for step, state in states.items():
                    try:
                        same(state, store.load(step))
                    except (tzip.TzipError, OSError):
                        raised += 1
                        assert step in hurt
        path.write_bytes(good)
    assert raised > 30
    whole(run, states)


def test_any_object_is_deleted(tmp_path: Path) -> None:
    run = tmp_path / "run"
    states = build(run, 5)
    for archive_id in open_backend(run).object_ids():
        copy = shutil.copytree(run, tmp_path / archive_id)
        (copy / "objects" / f"{archive_id}.tzip").unlink()
        with new(copy) as store:
            fault_ = store.verify().faults[0]
            assert (fault_.path, "missing" in fault_.message) == (str(copy / "objects" / f"{archive_id}.tzip"), True)
            for step, state in states.items():
                if step in fault_.steps:
                    with pytest.raises((tzip.CorruptError, tzip.BaseNotFoundError)):
                        store.load(step)
                else:
                    same(state, store.load(step))
            assert sorted(store.repair().lost) == list(fault_.steps)
            store.save(100, state_of(9))
        rest = {s: v for s, v in states.items() if s not in fault_.steps}
        holds(copy, rest | {100: state_of(9)})


# ---------------------------------------------------------------- clocks


def test_clocks_that_jump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(3)
    monkeypatch.setattr(time, "time_ns", lambda: rng.choice([-5, 0, 1, 10**18, 2 * 10**18, 10**9, 9 * 10**18]))
    run = tmp_path / "run"
    with new(run) as store:
        for step in range(20):
            store.save(step, state_of(step))
            store.gc(grace=rng.choice([0, 3600, 1e9]))
            if step % 5 == 4:
                assert store.prune(keep_last=3).kept[-3:] == [step - 2, step - 1, step]
            assert store.find().step == step
    holds(run, {step: state_of(step) for step in (17, 18, 19)})
    (run / "head.json").unlink()
    assert upkeep.repair(open_backend(run), deep=True, threads=1).kept[-3:] == [17, 18, 19]


# ---------------------------------------------------------------- races


def test_two_writers_that_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have read the same head and written their objects: one wins, the other learns it, at the same or another step."""
    run = tmp_path / "run"
    for round_, steps in enumerate([(10, 10), (11, 12)]):
        before = build(run.with_name(f"r{round_}"), 3)
        path = run.with_name(f"r{round_}")
        meet = threading.Barrier(2, timeout=60)
        original = runs.write_object
        with pytest.MonkeyPatch.context() as patch:

            def met(*args: Any, _meet: Any = meet, _original: Any = original, **kwargs: Any) -> Any:
                written = _original(*args, **kwargs)
                _meet.wait()
                return written

            patch.setattr(runs, "write_object", met)
            stores = [new(path), new(path)]
            outcome: list[Any] = [None, None]

            def save(i: int, _stores: Any = stores, _steps: Any = steps, _outcome: Any = outcome) -> None:
                try:
                    _stores[i].save(_steps[i], state_of(20 + i), note=f"writer {i}")
                    _outcome[i] = "saved"
                except tzip.TzipError as e:
                    _outcome[i] = type(e)

            threads = [threading.Thread(target=save, args=(i,)) for i in (0, 1)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
        assert sorted(map(str, outcome)) == sorted(map(str, ["saved", tzip.ConflictError]))
        winner = outcome.index("saved")
        now = holds(path, before | {steps[winner]: state_of(20 + winner)})
        with pytest.raises(tzip.ConflictError):  # until it opens the store anew
            stores[1 - winner].save(30, state_of(1))
        stores[winner].save(31, state_of(2))
        with new(path) as again:
            again.save(32, state_of(3))
        holds(path, now | {31: state_of(2), 32: state_of(3)})


@pytest.mark.filterwarnings("ignore:This process", "ignore:os.fork")  # Python and jax on threads, which these do without
def test_two_processes_and_a_third_that_tags_and_sweeps(tmp_path: Path) -> None:
    run = tmp_path / "run"
    build(run, 2)

    def writer(who: int) -> Callable[[int], None]:
        def work(pipe: int) -> None:
            for turn in range(12):
                try:
                    with new(run) as store:
                        for i in range(3):
                            step = 1000 * who + 10 * turn + i
                            store.save(step, state_of(step))
                            os.write(pipe, f"{step}\n".encode())
                except tzip.ConflictError:
                    pass

        return work

    def keeper(pipe: int) -> None:
        with new(run) as store:
            end = time.monotonic() + 30
            while time.monotonic() < end:
                store.gc(grace=0)
                store.tag("t", store.find().step)
                os.write(pipe, b".")

    with child(writer(1)) as (_, one), child(writer(2)) as (_, two), child(keeper) as (third, three):
        saved = [said(one), said(two)]
        early = b""
        while len(early) < 2 and (part := os.read(three, 1 << 16)):  # the writers may be faster than its first sweep
            early += part
        os.kill(third, signal.SIGKILL)
        os.waitpid(third, 0)
        swept = early + said(three)
    for text in (*saved, swept):
        assert b"!" not in text, text.decode()
    steps = [int(line) for text in saved for line in text.split()]
    assert len(swept) >= 2
    assert len(steps) > 12
    holds(run, {step: state_of(step) for step in (0, 1, *steps)})


def test_two_writers_of_one_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both make the same page of the log: neither must find the other's half of it in the way."""
    backend = LocalFolder(tmp_path / "run")
    backend.make(b"{}")
    data, name = b'{"page": 1}', "ab" * 32
    replace, met = os.replace, []

    def slow(src: Any, dst: Any) -> None:
        if not met:
            met.append(dst)
            LocalFolder(tmp_path / "run").put_page(name, data)
        replace(src, dst)

    monkeypatch.setattr(os, "replace", slow)
    backend.put_page(name, data)
    assert met
    assert backend.read_page(name) == data
    assert [p.name for p in backend.pages.iterdir()] == [f"{name}.json"]


def test_sweeps_beside_a_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice, after the object is there and before a head names it: it has been noted, and must not go."""
    run = tmp_path / "run"
    states = build(run)
    original = LocalFolder.publish_object
    reports = []

    def publish(self: LocalFolder, *args: Any) -> None:
        original(self, *args)
        with new(run) as other:
            reports.extend(other.gc(grace=0) for _ in range(2))

    with new(run) as store:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LocalFolder, "publish_object", publish)
            for step in (6, 7):
                store.save(step, state_of(step))
        assert [(r.removed, r.waiting) for r in reports] == [(0, 1)] * 4
        store.prune(keep_last=2)
        assert store.gc(grace=0).removed > 0
    holds(run, {k: (states | {6: state_of(6), 7: state_of(7)})[k] for k in (0, 6, 7)})


def test_a_writer_waits_for_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that is put while a sweep runs is not yet named by the head: were it swept, all older checkpoints were lost."""
    run = tmp_path / "run"
    states = build(run, 4)
    sweeping, go_on, saved = threading.Event(), threading.Event(), threading.Event()
    original = LocalFolder.sweep_partials

    def sweep(self: LocalFolder) -> int:
        sweeping.set()
        assert go_on.wait(60)
        return original(self)

    monkeypatch.setattr(LocalFolder, "sweep_partials", sweep)
    sweeper = threading.Thread(target=lambda: new(run).gc(grace=0))
    sweeper.start()
    assert sweeping.wait(60)

    def save() -> None:
        with new(run) as store:
            store.save(4, state_of(4))  # moves two entries to a page
        saved.set()

    writer = threading.Thread(target=save)
    writer.start()
    assert not saved.wait(0.3)
    assert [p.name for p in (run / "pages").iterdir()] == []
    go_on.set()
    writer.join(60)
    sweeper.join(60)
    assert saved.is_set()
    assert len(list((run / "pages").iterdir())) == 1
    holds(run, states | {4: state_of(4)})


def test_readers_beside_prune_and_gc(tmp_path: Path) -> None:
    """What a reader had open it reads; what is gone is an error, never other bytes."""
    run = tmp_path / "run"
    states = build(run)
    store = new(run)
    opened_ = {step: new(run).open(step) for step in states}
    listing = new(run).log()
    next(listing)
    store.prune(keep_last=1, keep_tagged=False)
    for step, checkpoint in opened_.items():  # nothing has been removed yet
        same(states[step], checkpoint.load(threads=1))
        checkpoint.close()
    early = new(run).open(4)
    store.gc(grace=0)
    same(states[4], early.load(threads=1))
    store.save(6, state_of(6))
    late = new(run).open(4)
    store.prune(keep_last=1)
    store.gc(grace=0)
    for checkpoint in (late, early):
        with contextlib.suppress(tzip.TzipError):
            same(states[4], checkpoint.load(threads=1))
        checkpoint.close()
    with pytest.raises((tzip.CorruptError, StopIteration)):
        for _ in range(9):
            next(listing)
    holds(run, {6: state_of(6)})


def test_prune_beside_a_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint that a save leans on is forgotten, its objects packed anew, before the save commits."""
    run = tmp_path / "run"
    build(run)
    original = LocalFolder.publish_object
    once = []

    def publish(self: LocalFolder, *args: Any) -> None:
        original(self, *args)
        if not once:
            once.append(1)
            with new(run) as other:
                other.prune(keep_every=4, keep_tagged=False)
                other.gc(grace=0)

    store = new(run)
    store.save(6, state_of(6))
    monkeypatch.setattr(LocalFolder, "publish_object", publish)
    store.save(7, state_of(7))
    holds(run, {k: state_of(k) for k in (0, 4, 7)})
    store.save(8, state_of(8))
    store.gc(grace=0)
    holds(run, {k: state_of(k) for k in (0, 4, 7, 8)})


def test_an_object_that_is_gone_before_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever removed it: the head must not name it."""
    run = tmp_path / "run"
    states = build(run)
    for mine in (True, False):
        with new(run) as store, pytest.MonkeyPatch.context() as patch:
            other = store.find(4).object

            def commit(
                self: Journal, *args: Any, _mine: bool = mine, _other: str = other, _original: Any = Journal.commit
            ) -> None:
                path = run / "objects" / f"{args[0].recent[-1].object if _mine else _other}.tzip"
                path.rename(tmp_path / "away")
                try:
                    _original(self, *args)
                finally:
                    (tmp_path / "away").rename(path)

            patch.setattr(Journal, "commit", commit)
            with pytest.raises(tzip.ConflictError, match="removed"):
                store.save(5, state_of(5))
    holds(run, states)


def test_prune_beside_a_trainer_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing anew takes longer than a trainer takes from save to save; what was tagged or replaced meanwhile counts."""
    run = tmp_path / "run"
    states = build(run)
    trainer = new(run)
    trainer.save(5, state_of(5))
    original = upkeep._Rebase.run
    runs_ = []

    def rebase(self: Any) -> Any:
        made = original(self)
        n = len(runs_)
        runs_.append(n)
        if n == 0:
            trainer.save(6, state_of(6))
            trainer.save(7, state_of(7))
        if n == 1:
            trainer.tag("late", 3)
        if n == 2:
            trainer.save(6, state_of(9), replace_step=True)
        return made

    monkeypatch.setattr(upkeep._Rebase, "run", rebase)
    with new(run) as other:
        report = other.prune(keep_last=2, keep_tagged=False)
        assert (report.kept, runs_) == ([4, 5], [0])
        assert [e.step for e in other.log()] == [7, 6, 5, 4]
        monkeypatch.setattr(upkeep._Rebase, "run", original)
    holds(run, {4: states[4], **{k: state_of(k) for k in (5, 6, 7)}})
    run = tmp_path / "again"
    states = build(run)
    trainer = new(run)
    monkeypatch.setattr(upkeep._Rebase, "run", rebase)
    trainer.save(6, state_of(6))
    with new(run) as other:
        report = other.prune(keep_last=2)
        assert (report.kept, runs_) == ([0, 3, 4, 6], [0, 1, 2, 3])
    holds(run, {0: states[0], 3: states[3], 4: states[4], 6: state_of(9)})


def test_what_dead_processes_left(tmp_path: Path) -> None:
    run = tmp_path / "run"
    states = build(run)
    names = ["head.json.tzip-partial", "objects/new-1.tzip-partial", f"pages/{'a' * 64}.json.tzip-partial"]
    for name in (*names, "commit.lock", "writers.lock"):
        (run / name).write_bytes(b"garbage of a dead process")
    with new(run) as store:
        store.save(6, state_of(6))
        store.tag("x", 6)
        assert store.gc(grace=0).partials == 2  # the head's was taken over
        assert store.gc(grace=0).partials == 0
    holds(run, states | {6: state_of(6)})
    living = LocalFolder(run).new_object()
    living.file.write(b"not yet whole")
    with LocalFolder(run).writing():
        assert new(run).gc(grace=0).partials == 0
    assert living.path.exists()
    living.close()


def test_locks_that_others_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tzip.store import backends

    run = tmp_path / "run"
    states = build(run)
    monkeypatch.setattr(backends, "_PATIENCE", 0.05)
    monkeypatch.setattr(backends, "_SWEEP", 0.05)
    store = new(run)
    with LocalFolder(run).committing():
        with pytest.raises(tzip.UsageError, match="lock"):
            store.save(6, state_of(6))
        with pytest.raises(tzip.UsageError, match="lock"):
            store.tag("x", 4)
        same(states[4], new(run).load(4))  # readers need none
    with LocalFolder(run).alone() as alone:
        assert alone
        with pytest.raises(tzip.UsageError, match="lock"):
            store.save(6, state_of(6))
    store.save(6, state_of(6))
    holds(run, states | {6: state_of(6)})
