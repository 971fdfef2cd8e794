"""A store of version 1, made once: later versions must read what this one wrote (STORE.md)."""

import hashlib
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tzip
from tzip.store import journal

GOLDEN = Path(__file__).parent / "golden" / "store1"
FILES = {"config.json": b'{"hidden": 8}', "notes/empty": b"", "notes/a.txt": b"what lies there stays as it is\n" * 9}


def _weights(step: int) -> Any:
    base = (np.arange(1500) * 0.37 % 1 - 0.5).astype("<f4")
    return base + np.float32(1e-4) * (np.arange(1500) * (7 + step) % 11 - 5).astype("<f4")


def _states() -> Iterator[tuple[int, dict[str, Any]]]:
    for step in range(4):
        yield (
            step,
            {
                "model": {"w": _weights(step), "bias": np.full(4, step, "<f2"), "frozen": np.arange(700, dtype="<i4")},
                "numbers": [step, 0.5, -0.0, None, True, 1 << 80, b"bytes", "text", (1, 2)],
            },
        )


def _published() -> list[dict[str, Any]]:
    return [{"w": _weights(step).astype("<f2")} for step in (0, 1)]


def _write(folder: Path, files: Path) -> None:
    for name, data in FILES.items():
        (files / name).parent.mkdir(parents=True, exist_ok=True)
        (files / name).write_bytes(data)
    with tzip.Store(folder, max_chain=3, threads=1) as store:
        for step, state in _states():
            store.save(step, state, note=f"note {step}", metrics={"loss": 2.0 - step}, tags=["first"] if not step else [])
        store.save_files(10, [files], note="files")
        for step, weights in enumerate(_published(), 20):
            store.publish(step, weights)
    for lock in folder.glob("*.lock"):
        lock.unlink()


if os.environ.get("TZIP_WRITE_GOLDEN") == "1" and not GOLDEN.exists():
    import tempfile

    platform.node = lambda: "golden"
    journal.PAGE, journal._MAX_RECENT = 1, 2  # pages of pages
    with tempfile.TemporaryDirectory() as scratch:
        _write(GOLDEN, Path(scratch) / "files")
    journal.PAGE, journal._MAX_RECENT = 32, 64


@pytest.fixture
def store(tmp_path: Path) -> Iterator[tzip.Store]:
    shutil.copytree(GOLDEN, tmp_path / "run")
    with tzip.Store(tmp_path / "run", create=False) as opened:
        yield opened


def _same(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            _same(a[key], b[key])
    elif isinstance(a, np.ndarray):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    else:
        assert repr(a) == repr(b)


def test_every_checkpoint_is_read(store: tzip.Store) -> None:
    assert [(e.step, e.kind) for e in store.log()] == [
        *((step, "published") for step in (21, 20)), (10, "files"), *((step, "state") for step in (3, 2, 1, 0)),
    ]  # fmt: skip
    for step, state in _states():
        _same(state, store.load(step))
    assert store.find("first").step == 0
    assert store.find("best", metric="loss").step == 3
    assert store.find(2).note == "note 2"
    for step, weights in enumerate(_published(), 20):
        _same(weights, store.load(step))
    assert store.verify(deep=True).faults == []


def test_files_come_back(store: tzip.Store, tmp_path: Path) -> None:
    store.restore(10, tmp_path / "back")
    back = {p.relative_to(tmp_path / "back").as_posix(): p for p in (tmp_path / "back").rglob("*") if p.is_file()}
    assert {name: path.read_bytes() for name, path in back.items()} == FILES


def test_who_follows_goes_on(store: tzip.Store) -> None:
    first, second = _published()
    weights = {key: array.copy() for key, array in first.items()}
    with store.subscribe(weights) as following:
        report = following.update()
    assert report is not None
    _same(second, weights)


def test_it_is_written_on(store: tzip.Store) -> None:
    before = dict(_states())
    store.save(4, {"model": {"w": _weights(4)}})
    store.prune(keep_last=3)  # the files count, too
    store.gc(grace=0)
    _same(before[3], store.load(3))
    _same({"model": {"w": _weights(4)}}, store.load(4))


def test_nothing_was_changed() -> None:
    """Files made once and never again: their names are the sums of what they hold."""
    pages = list((GOLDEN / "pages").glob("*.json"))
    assert any(b'"pages"' in page.read_bytes() for page in pages)
    for page in pages:
        assert hashlib.sha256(page.read_bytes()).hexdigest() == page.stem
    objects = sorted((GOLDEN / "objects").glob("*.tzip"))
    assert len(objects) == 7
    for path in objects:
        with tzip.open(path) as archive:
            assert archive.reader.footer.archive_id.hex() == path.stem
    assert sum(p.stat().st_size for p in GOLDEN.rglob("*") if p.is_file()) < 60_000
