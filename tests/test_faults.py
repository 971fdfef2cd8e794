"""Kills, failures and races: the output is whole or not there, what was there before stays, the input is never touched."""

import contextlib
import dis
import errno
import hashlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults import fault, files_of, partials, posix
from forge import noise, safetensors_bytes, weights

import tzip
from tzip.formats import atomic, source


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "in"
    (path / "sub").mkdir(parents=True)
    (path / "m.safetensors").write_bytes(safetensors_bytes([("w", "BF16", [3000], weights(3000)), ("b", "I8", [3], b"abc")]))
    (path / "sub" / "x.bin").write_bytes(noise(6000))
    (path / "empty").write_bytes(b"")
    if os.name != "nt":
        (path / "link").symlink_to("empty")
    return path


# ---------------------------------------------------------------- every call fails once


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EINTR], ids=lambda c: errno.errorcode[c])
@pytest.mark.parametrize("old", [None, b"the old output"], ids=["new", "replace"])
def test_pack_with_every_call_failing(tmp_path: Path, root: Path, old: bytes | None, code: int) -> None:
    before = files_of(root)
    good = tmp_path / "good.tzip"
    tzip.pack(root, good, threads=1)
    whole = good.read_bytes()
    out = tmp_path / "out"
    out.mkdir()
    target = out / "a.tzip"
    failed = 0
    for n in range(1, 1000):
        target.unlink(missing_ok=True)
        if old is not None:
            target.write_bytes(old)
        with fault(n, code) as state:
            try:
                tzip.pack(root, target, threads=1, force=old is not None)
            except (OSError, tzip.TzipError):
                failed += 1
                assert state.fired
            else:
                assert target.read_bytes() == whole
        # What is under the name is the old output, or nothing, or all of the new one: never a part.
        now = target.read_bytes() if target.exists() else None
        assert now in (old, whole), (n, state.calls[-1])
        assert all(p.name == "a.tzip.tzip-partial" for p in partials(out)), n
        assert {p.name for p in out.iterdir()} <= {"a.tzip", "a.tzip.tzip-partial"}
        # The next run is not disturbed, and takes over what was left.
        tzip.pack(root, target, threads=1, force=True)
        assert target.read_bytes() == whole
        assert partials(out) == []
        if not state.fired:
            break
    assert failed > 25
    assert not state.fired
    assert files_of(root) == before


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=lambda c: errno.errorcode[c])
@pytest.mark.parametrize("old", [None, b"the old output"], ids=["new", "replace"])
def test_unpack_with_every_call_failing(tmp_path: Path, root: Path, old: bytes | None, code: int) -> None:
    tzip.pack(root, tmp_path / "a.tzip")
    data = (tmp_path / "a.tzip").read_bytes()
    expected = {f"in/{k}": v for k, v in files_of(root).items()}
    failed = 0
    for n in range(1, 1000):
        out = tmp_path / f"out{n}"
        if old is not None:
            (out / "in").mkdir(parents=True)
            (out / "in" / "m.safetensors").write_bytes(old)
        with fault(n, code) as state:
            try:
                tzip.unpack(data, out, threads=1, force=old is not None)
            except (OSError, tzip.TzipError):
                failed += 1
                assert state.fired
        now = files_of(out) if out.exists() else {}
        for name, content in now.items():
            if name.endswith(".tzip-partial"):
                assert name.removesuffix(".tzip-partial") in expected
            else:
                assert content in (expected[name], old), (n, name, state.calls[-1])
        if old is not None:
            assert "in/m.safetensors" in now
        tzip.unpack(data, out, threads=1, force=True)
        assert files_of(out) == expected
        if not state.fired:
            break
    assert failed > 25
    assert not state.fired


@pytest.mark.parametrize("verb", ["pack", "unpack", "repack", "recover"])
def test_full_disk(tmp_path: Path, root: Path, verb: str) -> None:
    """From the Nth write on there is no space: an OSError with ENOSPC, and nothing under the name."""
    tzip.pack(root, tmp_path / "a.tzip")
    archive = tmp_path / "a.tzip"
    for n in range(1, 60):
        out = tmp_path / f"o{n}"
        out.mkdir()
        work: dict[str, Callable[[], Any]] = {
            "pack": lambda o=out: tzip.pack(root, o / "x.tzip", threads=1),
            "unpack": lambda o=out: tzip.unpack(archive, o, threads=1),
            "repack": lambda o=out: tzip.repack(archive, o / "x.tzip", threads=1),
            "recover": lambda o=out: tzip.recover(archive, o, threads=1),
        }
        with fault(n, errno.ENOSPC, ("write", "fsync"), keep=True) as state:
            if n <= 1:
                with pytest.raises(OSError) as caught:
                    work[verb]()
                assert caught.value.errno == errno.ENOSPC
            else:
                with contextlib.suppress(OSError):
                    work[verb]()
        assert partials(out) == []
        if verb in ("pack", "repack"):
            if (out / "x.tzip").exists():  # only the last step, making the name durable, has failed
                assert tzip.verify(out / "x.tzip", deep=True).members == 6
                assert not state.fired or state.calls[-1] == "fsync"
            else:
                assert state.fired
        if not state.fired:
            break
    assert not state.fired


def test_short_writes_and_interrupted_reads(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that takes only a part, and a read that gives only a part, cost nothing."""

    class Short:
        def __init__(self, file: Any) -> None:
            self._file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def write(self, data: Any) -> int:
            return int(self._file.write(memoryview(data)[:701]))

        def read(self, n: int = -1) -> bytes:
            return bytes(self._file.read(min(n, 503)))

    tzip.pack(root, tmp_path / "a.tzip")
    original, original_preadv = os.fdopen, getattr(os, "preadv", None)
    monkeypatch.setattr(os, "fdopen", lambda *a, **k: Short(original(*a, **k)))
    if original_preadv is not None:
        monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: original_preadv(fd, [buffers[0][:997]], at))
    tzip.pack(root, tmp_path / "b.tzip")
    tzip.pack(root, tmp_path / "c.tzip", resume=True)
    tzip.unpack(tmp_path / "b.tzip", tmp_path / "out")
    tzip.recover(tmp_path / "b.tzip", tmp_path / "rec")
    tzip.open(tmp_path / "a.tzip").close()
    monkeypatch.undo()
    assert (tmp_path / "a.tzip").read_bytes() == (tmp_path / "b.tzip").read_bytes() == (tmp_path / "c.tzip").read_bytes()
    assert files_of(tmp_path / "out" / "in") == files_of(root)
    recovered = files_of(tmp_path / "rec" / "in")
    assert recovered == {k: v for k, v in files_of(root).items() if k in recovered}
    assert "sub/x.bin" in recovered


def test_order_of_publication(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are durable before the name, the name before success is reported, and a plain rename never replaces."""
    tzip.pack(root, tmp_path / "first.tzip", threads=1)  # kernels are compiled, and kept in files of their own
    events: list[str] = []
    for name in ("fsync", "link", "replace", "unlink", "chmod", "utime"):
        original = getattr(os, name)

        def wrapped(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            kind = ""
            if _name == "fsync":
                import stat

                kind = " folder" if stat.S_ISDIR(os.fstat(args[0]).st_mode) else " file"
            events.append(_name + kind)
            return _original(*args, **kwargs)

        monkeypatch.setattr(os, name, wrapped)
    tzip.pack(root, tmp_path / "a.tzip", threads=1)
    tail = ["fsync folder"] if hasattr(os, "O_DIRECTORY") else []
    assert events == ["fsync file", "link", "unlink", *tail]
    events.clear()
    tzip.pack(root, tmp_path / "a.tzip", threads=1, force=True)
    assert events == ["fsync file", "replace", *tail]
    events.clear()
    tzip.unpack(tmp_path / "a.tzip", tmp_path / "out", members=["in/sub/x.bin"], threads=1)
    assert events == ["chmod", "utime", "fsync file", "link", "unlink", *tail]


# ---------------------------------------------------------------- races


def test_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.tzip"
    for broken_link in (False, True):  # a file system without hard links, too
        if broken_link:

            def no_link(*args: Any, **kwargs: Any) -> None:
                raise OSError(errno.EPERM, "no hard links")

            monkeypatch.setattr(os, "link", no_link)
        target.unlink(missing_ok=True)
        with pytest.raises(tzip.UsageError):
            tzip.pack(root, target, progress=lambda n: target.write_bytes(b"somebody else's"))
        assert target.read_bytes() == b"somebody else's"
        assert partials(tmp_path) == []
    target.unlink()
    tzip.pack(root, target)
    assert tzip.verify(target, deep=True).members > 3
    out = tmp_path / "out"
    with pytest.raises(tzip.UsageError):
        tzip.unpack(target, out, members=["in/sub/x.bin"], progress=lambda n: (out / "in/sub/x.bin").write_bytes(b"other"))
    assert (out / "in/sub/x.bin").read_bytes() == b"other"


@posix
def test_partial_file_that_another_process_holds(tmp_path: Path, root: Path) -> None:
    target = tmp_path / "a.tzip"
    held = atomic.PartialFile(target)
    held.file.write(b"work of the other")
    with pytest.raises(tzip.UsageError, match="another process"):
        tzip.pack(root, target)
    with pytest.raises(tzip.UsageError, match="another process"):
        tzip.pack(root, target, resume=True)
    assert held.path.read_bytes() == b"work of the other"
    held.close()
    assert partials(tmp_path) == []
    tzip.pack(root, target)


@posix
def test_killed_between_link_and_unlink(tmp_path: Path, root: Path) -> None:
    """The partial file is then a second name of the published file: the next run must not write into it."""
    target = tmp_path / "a.tzip"
    tzip.pack(root, target)
    whole = target.read_bytes()
    os.link(target, tmp_path / "a.tzip.tzip-partial")
    keep = tmp_path / "kept"
    os.link(target, keep)
    (tmp_path / "small").write_bytes(b"x")
    for options in ({"force": True}, {"force": True, "resume": True}):
        tzip.pack(tmp_path / "small", target, **options)
        assert keep.read_bytes() == whole
        with tzip.open(target) as archive:
            assert [m.name for m in archive.members()] == ["small"]
        assert partials(tmp_path) == []
        target.unlink()
        os.link(keep, target)
        os.link(keep, tmp_path / "a.tzip.tzip-partial")


@posix
@pytest.mark.parametrize("force", [False, True])
def test_two_processes_with_one_target(tmp_path: Path, force: bool) -> None:
    archives = set()
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(noise(20 << 20, len(archives)))
        tzip.pack(tmp_path / name, tmp_path / "x.tzip", force=True)
        archives.add((tmp_path / "x.tzip").read_bytes())
    target = tmp_path / "target.tzip"
    for _ in range(2):
        children = [start("pack", tmp_path / n, "-o", target, *(["-f"] if force else [])) for n in ("one", "two")]
        codes = sorted(child.wait(120) for child in children)
        for child in children:
            assert child.stderr is not None
            child.stderr.close()
        if force:
            assert codes in ([0, 0], [0, 2])
        else:
            assert codes == [0, 2]
        assert target.read_bytes() in archives
        assert partials(tmp_path) == []
        target.unlink()


# ---------------------------------------------------------------- the input


@pytest.mark.parametrize("change", ["append", "write", "cut", "replace", "touch", "remove"])
def test_input_that_changes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    path = tmp_path / "x"
    content = noise(3 << 20)
    path.write_bytes(content)
    os.utime(path, ns=(10**18, 10**18))
    reads = 0
    original = source.FileSource.readinto_at

    def read(self: Any, offset: int, buffer: memoryview) -> int:
        nonlocal reads
        reads += 1
        if reads == 1:  # of data: what tells the kind of a file is read otherwise
            if change == "append":
                with path.open("ab") as f:
                    f.write(b"more")
            elif change == "write":
                with path.open("r+b") as f:
                    f.write(b"\0\1\2\3")
            elif change == "cut":
                os.truncate(path, 1 << 20)
            elif change == "touch":
                os.utime(path)
            elif change == "replace":
                (tmp_path / "y").write_bytes(content)
                os.utime(tmp_path / "y", ns=(10**18, 10**18))
                os.replace(tmp_path / "y", path)
            else:
                path.unlink()
        return original(self, offset, buffer)

    monkeypatch.setattr(source.FileSource, "readinto_at", read)
    for threads in (1, 2):
        reads = 0
        path.write_bytes(content)
        os.utime(path, ns=(10**18, 10**18))
        with pytest.raises((tzip.ChangedError, FileNotFoundError)) as caught:
            tzip.pack(path, threads=threads)
        if change != "remove":
            assert caught.type is tzip.ChangedError
            assert caught.value.exit_code == 8
            assert caught.value.path == str(path)
        assert {p.name for p in tmp_path.iterdir()} <= {"x"}


def test_read_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(noise(3 << 20))

    def read(self: Any, offset: int, buffer: memoryview) -> int:
        raise OSError(errno.EIO, "bad sector")

    monkeypatch.setattr(source.FileSource, "readinto_at", read)
    with pytest.raises(OSError, match="bad sector"):
        tzip.pack(tmp_path / "x")
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("threads", [1, 3])
def test_callback_or_output_that_raises(tmp_path: Path, root: Path, threads: int) -> None:
    def stop(n: int) -> None:
        raise KeyboardInterrupt

    class Full(io.RawIOBase):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "full")

    with pytest.raises(KeyboardInterrupt):
        tzip.pack(root, tmp_path / "a.tzip", progress=stop, threads=threads)
    with pytest.raises(OSError, match="full"):
        tzip.pack(root, Full(), threads=threads)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    tzip.pack(root, tmp_path / "a.tzip")
    with pytest.raises(KeyboardInterrupt):
        tzip.unpack(tmp_path / "a.tzip", tmp_path / "o", progress=stop, threads=threads)
    with pytest.raises(OSError, match="full"):
        tzip.unpack(tmp_path / "a.tzip", Full(), members=["in/sub/x.bin"], threads=threads)
    assert set(files_of(tmp_path / "o")) <= {"in/empty"}


def test_chunk_that_does_not_decode_to_its_source_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A coder at fault must be caught before the archive gets its name."""
    import numpy as np

    from tzip import packing

    (tmp_path / "x").write_bytes(noise(9000))
    original = packing.decode_chunk

    def wrong(*args: Any, **more: Any) -> None:
        original(*args, **more)
        out: np.ndarray = args[6]
        out[77] ^= 1

    monkeypatch.setattr(packing, "decode_chunk", wrong)
    with pytest.raises(tzip.CorruptError, match="at fault"):
        tzip.pack(tmp_path / "x")
    assert os.listdir(tmp_path) == ["x"]


# ---------------------------------------------------------------- kills and resume


def start(*args: str | Path) -> subprocess.Popen[bytes]:
    # A shell that runs tests in the background has them ignore SIGINT, and so would the child.
    listening = None if os.name == "nt" else lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    call = [sys.executable, "-m", "tzip.cli", *map(str, args)]
    return subprocess.Popen(call, stderr=subprocess.PIPE, preexec_fn=listening)


def wait_until(child: subprocess.Popen[bytes], ready: Callable[[], bool]) -> bool:
    """Return whether it became ready before the child ended."""
    end = time.monotonic() + 120
    while child.poll() is None:
        if ready():
            return True
        assert time.monotonic() < end
        time.sleep(0.002)
    return False


def stop(child: subprocess.Popen[bytes], number: int) -> tuple[int, bytes]:
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    return child.returncode, errors


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that takes a second or more to pack at the level `best`."""
    root = tmp_path_factory.mktemp("large") / "d"
    root.mkdir()
    (root / "m.safetensors").write_bytes(
        safetensors_bytes(
            [("w", "BF16", [10 << 20], weights(10 << 20)), ("v", "F32", [3 << 20], weights(3 << 20, 1, "F32"))]
            + [(f"s{i}", "BF16", [500], weights(500, i)) for i in range(100)]
        )
    )
    (root / "n.bin").write_bytes(noise(12 << 20))
    (root / "o.bin").write_bytes(noise(9 << 20, 1))
    return root


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


@posix
def test_pack_resumes_after_kills(tmp_path: Path, large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import random

    rng = random.Random(1)
    reference = tmp_path / "reference.tzip"
    tzip.pack(large, reference, level="best")
    before = {k: hashlib.sha256(v).hexdigest() for k, v in files_of(large).items()}
    total = reference.stat().st_size
    target = tmp_path / "a.tzip"
    partial = tmp_path / "a.tzip.tzip-partial"
    at, kills = 0, 0
    for _ in range(4):
        at = rng.randrange(at, max(at + 1, total * 2 // 3))
        child = start("pack", large, "-o", target, "--level", "best", "--resume", "-q")
        wait_until(child, lambda a=at: size_of(partial) > a)
        code, _ = stop(child, signal.SIGKILL)
        kills += code == -signal.SIGKILL
        if code == -signal.SIGKILL:
            assert not target.exists()
    assert kills >= 2
    # What stands in the partial file is used again: fewer chunks are encoded than there are.
    from tzip import packing

    encoded = 0
    original = packing.encode_chunk

    def counted(*args: Any) -> Any:
        nonlocal encoded
        encoded += 1
        return original(*args)

    monkeypatch.setattr(packing, "encode_chunk", counted)
    stood = size_of(partial)
    if not target.exists():
        tzip.pack(large, target, level="best", resume=True, threads=2)
    with tzip.open(reference) as archive:
        chunks = archive.reader.index["c_offset"].size
    assert encoded < chunks or stood < total // 10
    assert target.read_bytes() == reference.read_bytes()
    assert partials(tmp_path) == []
    assert {k: hashlib.sha256(v).hexdigest() for k, v in files_of(large).items()} == before


def test_resume_over_anything_gives_the_same_archive(tmp_path: Path, root: Path) -> None:
    """Whatever stands in the partial file, cut, damaged or foreign: the archive is that of an uninterrupted run."""
    import random

    rng = random.Random(0)
    tzip.pack(root, tmp_path / "a.tzip")
    whole = (tmp_path / "a.tzip").read_bytes()
    tzip.pack(root, tmp_path / "best.tzip", level="best")
    other = (tmp_path / "best.tzip").read_bytes()
    target = tmp_path / "b.tzip"
    rests = [
        b"",
        b"x",
        whole,
        whole + b"more",
        whole[:-1],
        other,
        noise(5000),
        b"\0" * 9000,
        whole[:64],
        whole[:100] + noise(3000),
    ]
    rests += [whole[: rng.randrange(len(whole))] for _ in range(40)]
    for _ in range(40):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        rests.append(bytes(damaged[: rng.randrange(len(whole))] if rng.random() < 0.5 else damaged))
    for rest in rests:
        (tmp_path / "b.tzip.tzip-partial").write_bytes(rest)
        tzip.pack(root, target, resume=True, threads=rng.choice([1, 2]))
        assert target.read_bytes() == whole
        assert partials(tmp_path) == []
        target.unlink()


def test_resume_after_the_input_changed(tmp_path: Path, root: Path) -> None:
    tzip.pack(root, tmp_path / "a.tzip")
    (tmp_path / "b.tzip.tzip-partial").write_bytes((tmp_path / "a.tzip").read_bytes()[:-500])
    data = bytearray((root / "sub" / "x.bin").read_bytes())
    data[5555] ^= 1
    status = (root / "sub" / "x.bin").stat()
    (root / "sub" / "x.bin").write_bytes(bytes(data))
    os.utime(root / "sub" / "x.bin", ns=(status.st_atime_ns, status.st_mtime_ns))  # not even the time tells
    tzip.pack(root, tmp_path / "b.tzip", resume=True)
    tzip.unpack(tmp_path / "b.tzip", tmp_path / "out")
    assert files_of(tmp_path / "out" / "in") == files_of(root)


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("threads", ["1", "2"])
def test_pack_is_interrupted(tmp_path: Path, large: Path, number: int, threads: str) -> None:
    target = tmp_path / "a.tzip"
    partial = tmp_path / "a.tzip.tzip-partial"
    for options in ([], ["--resume"]):
        child = start("pack", large, "-o", target, "--level", "best", "-t", threads, *options)
        assert wait_until(child, lambda: size_of(partial) > 1 << 20)
        code, errors = stop(child, number)
        assert code == 130, errors
        assert b"interrupted" in errors
        assert b"Traceback" not in errors
        assert not target.exists()
        assert partial.exists() == bool(options)


def _interrupted_at(step: int, work: Callable[[], None]) -> bool:
    """Run `work` with a KeyboardInterrupt before the `step`th bytecode instruction of formats/atomic.py and its caller."""
    left = step

    def trace(frame: Any, event: str, argument: object) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.endswith(("atomic.py", "test_faults.py")):
            return None
        frame.f_trace_opcodes = True
        # No signal is ever delivered at a NOP, and a `try` may begin with one that it does not cover.
        if event == "opcode" and left >= 0 and frame.f_code.co_code[frame.f_lasti] != dis.opmap["NOP"]:
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return left < 0


@posix
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("force", [False, True])
def test_an_interrupt_at_any_instruction_leaves_no_partial_file(tmp_path: Path, force: bool) -> None:
    target = tmp_path / "x"

    def work() -> None:
        with atomic.PartialFile(target, force=force) as partial:
            partial.write(b"whole")
            partial.publish()

    step = 0
    while _interrupted_at(step, work):
        assert [p.name for p in tmp_path.iterdir()] in ([], ["x"]), step
        if target.exists():
            assert target.read_bytes() == b"whole"
            target.unlink()
        step += 1
    assert step > 200
    assert target.read_bytes() == b"whole"


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_unpack_is_stopped_and_resumes(tmp_path: Path, large: Path, number: int) -> None:
    archive = tmp_path / "a.tzip"
    tzip.pack(large, archive, level="best")
    expected = {f"d/{k}": v for k, v in files_of(large).items()}
    out = tmp_path / "out"
    child = start("unpack", archive, "-o", out, "-t", "1")
    first = out / "d" / "m.safetensors"
    stopped = wait_until(child, first.exists)
    code, errors = stop(child, number)
    if stopped and code != 0:
        assert code == (130 if number == signal.SIGINT else -number), errors
    now = files_of(out)
    for name, content in now.items():
        if not name.endswith(".tzip-partial"):
            assert content == expected[name]
        else:
            assert number == signal.SIGKILL
    report = tzip.unpack(archive, out, resume=True)
    assert "d/m.safetensors" in report.kept
    assert files_of(out) == expected
    assert partials(out) == []
