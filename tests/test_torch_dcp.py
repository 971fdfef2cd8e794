"""torch's distributed checkpoints in a store: ranks as processes, resharding, partial reads, deltas, dying ranks; and what
the stock writer does with the same faults.
"""

import contextlib
import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import dcp_ranks
import pytest
import torch
import torch.distributed.checkpoint as dcp

import tzip
from tzip.formats.source import FileSource
from tzip.store import sharded
from tzip.torch_dcp import StorageReader, StorageWriter

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled", "ignore:.*TypedStorage.*", "ignore::FutureWarning", "ignore:Detected an existing"
)
SCRIPT = Path(dcp_ranks.__file__)


def ranks(scenario: str, n: int, folder: Path) -> list[int]:
    """Run one process a rank; return their exit codes."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), scenario, str(i), str(n), str(folder)], env=env, stderr=subprocess.PIPE, text=True
        )
        for i in range(n)
    ]
    errors = [p.communicate(timeout=300)[1] for p in started]
    codes = [p.returncode for p in started]
    if scenario in ("exchange", "conflict"):
        assert codes == [0] * n, "\n".join(errors)[-4000:]
    return codes


def big(seed: int, rows: int = 2048, columns: int = 1536) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=g) * 0.02).to(torch.bfloat16)


def save(run: Path, step: int, state: dict[str, Any], **options: Any) -> None:
    dcp.save(state, storage_writer=StorageWriter(run, step=step, threads=1, **options), no_dist=True)


def load(run: Path, step: int | str, state: dict[str, Any]) -> dict[str, Any]:
    dcp.load(state, storage_reader=StorageReader(run, step=step, threads=1), no_dist=True)
    return state


def test_ranks_exchange_checkpoints(tmp_path: Path):
    """1, 2 and 4 ranks; rows, columns, replicas; each loads what fewer ranks have saved."""
    for n in (1, 2, 4):
        ranks("exchange", n, tmp_path)
    store = tzip.Store(tmp_path / "run", create=False)
    assert [e.step for e in store.log()] == [42, 41, 40, 22, 21, 20, 12, 11, 10]
    assert not store.verify(deep=True).faults
    assert {e.kind for e in store.log()} == {"sharded"}


@pytest.mark.parametrize("where", ["data", "after data", "commit"])
def test_a_rank_that_dies_leaves_the_run_as_it_was(tmp_path: Path, where: str):
    run = tmp_path / "run"
    state = {"w": big(1, 64, 64)}
    save(run, 1, state)
    codes = ranks(where, 2, tmp_path)
    assert 9 in codes
    assert 0 not in codes
    store = tzip.Store(run, create=False)
    assert [e.step for e in store.log()] == [1]
    assert torch.equal(load(run, "latest", {"w": torch.zeros(64, 64, dtype=torch.bfloat16)})["w"], state["w"])
    store.gc(grace=0)
    assert len(store.backend.object_ids()) == 2  # the data and the manifest of step 1
    save(run, 2, state)
    assert not store.verify(deep=True).faults


def test_two_writers_of_one_run(tmp_path: Path):
    save(tmp_path / "run", 1, {"w": big(1, 64, 64)})
    ranks("conflict", 1, tmp_path)
    assert [e.step for e in tzip.Store(tmp_path / "run").log()] == [1234, 1]


def test_unchanged_shards_are_referred_to_and_changed_ones_are_differences(tmp_path: Path):
    run = tmp_path / "run"
    w, v = big(1), big(2)
    save(run, 1, {"w": w, "v": v})
    w2 = (w.float() + 1e-2 * big(8).float()).to(torch.bfloat16)
    assert not torch.equal(w, w2)
    save(run, 2, {"w": w2, "v": v})
    first, second = (next(e for e in tzip.Store(run).log() if e.step == s) for s in (1, 2))
    assert second.stored < first.stored // 3
    with tzip.Store(run).open(2) as checkpoint:
        records = checkpoint.manifest.records
        assert records["w"].depth == 1
        assert records["v"].depth == 0
        with tzip.Store(run).open(1) as before:
            assert records["v"] == before.manifest.records["v"]
    sharded._last.clear()  # as a new process, which reads its bases from the store
    w3 = (w2.float() + 1e-2 * big(9).float()).to(torch.bfloat16)
    save(run, 3, {"w": w3, "v": v})
    with tzip.Store(run).open(3) as checkpoint:
        assert checkpoint.manifest.records["w"].depth == 2
    for step, wanted in ((1, w), (2, w2), (3, w3)):
        got = load(run, step, {"w": torch.zeros_like(w), "v": torch.zeros_like(v)})
        assert torch.equal(got["w"], wanted)
        assert torch.equal(got["v"], v)


def test_the_memory_of_a_base_is_a_copy(tmp_path: Path):
    """The trainer changes its tensors in place between saves."""
    run = tmp_path / "run"
    w = big(3, 256, 256)
    kept = []
    for step in range(1, 5):
        kept.append(w.clone())
        save(run, step, {"w": w})
        w.mul_(1.01)
    for step, wanted in enumerate(kept, 1):
        assert torch.equal(load(run, step, {"w": torch.zeros_like(w)})["w"], wanted)


@contextlib.contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Any:
    read = {"bytes": 0}
    original = FileSource.readinto_at

    def readinto_at(self: FileSource, offset: int, buffer: memoryview) -> int:
        done = original(self, offset, buffer)
        read["bytes"] += done if self.name.endswith(".tzip") and done > 65536 else 0  # heads and indexes aside
        return done

    with monkeypatch.context() as patch:
        patch.setattr(FileSource, "readinto_at", readinto_at)
        yield read


@pytest.mark.parametrize("dim", [0, 1])
def test_a_reshard_reads_little_more_than_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dim: int):
    """Half of the rows, or of the columns, at most 60 % of the bytes."""
    run = tmp_path / "run"
    w = big(4, 4096, 1024)  # four chunks
    save(run, 1, {"w": w}, tile=(1024, 512) if dim else None)
    stored = next(tzip.Store(run).log()).stored
    reader = StorageReader(run, step=1, threads=1)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, True)
    lengths = [2048, 1024] if dim == 0 else [4096, 512]
    offsets = [2048, 0] if dim == 0 else [0, 512]
    target = torch.zeros(lengths, dtype=torch.bfloat16)
    index = dcp.metadata.MetadataIndex("w", [0, 0])
    item = dcp.planner.ReadItem(
        dcp.planner.LoadItemType.TENSOR, index, torch.Size([0, 0]), index, torch.Size(offsets), torch.Size(lengths)
    )

    class Planner(dcp.default_planner.DefaultLoadPlanner):
        def resolve_tensor(self, read_item: Any) -> torch.Tensor:
            return target

        def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
            pass

    with counted(monkeypatch) as read:
        reader.read_data(dcp.planner.LoadPlan([item]), Planner()).wait()
    assert torch.equal(target, w[offsets[0] : offsets[0] + lengths[0], offsets[1] : offsets[1] + lengths[1]])
    assert 0 < read["bytes"] <= 0.6 * stored


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_async_save(tmp_path: Path, kind: str):
    run = tmp_path / "run"
    meeting = tmp_path / "meeting"
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    try:
        how = dcp.state_dict_saver.AsyncCheckpointerType(kind)
        for step in (1, 2):
            state = {"w": big(step, 200, 100), "n": torch.tensor(step)}
            found = dcp.async_save(
                state, storage_writer=StorageWriter(run, step=step, threads=1), async_checkpointer_type=how
            )
            found.result()
    finally:
        torch.distributed.destroy_process_group()
    for step in (1, 2):
        got = load(run, step, {"w": torch.zeros(200, 100, dtype=torch.bfloat16), "n": torch.tensor(0)})
        assert torch.equal(got["w"], big(step, 200, 100))
        assert int(got["n"]) == step


def test_plans_may_be_cached(tmp_path: Path):
    """A planner that reuses its plan from save to save: nothing in it is of one step."""
    run = tmp_path / "run"
    planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
    for step in (1, 2, 3):
        writer = StorageWriter(run, step=step, threads=1)
        dcp.save({"w": big(step, 64, 64)}, storage_writer=writer, planner=planner, no_dist=True)
    for step in (1, 2, 3):
        got = load(run, step, {"w": torch.zeros(64, 64, dtype=torch.bfloat16)})["w"]
        assert torch.equal(got, big(step, 64, 64))


def test_an_optimizer_and_what_is_no_tensor(tmp_path: Path):
    run = tmp_path / "run"
    model = torch.nn.Linear(40, 30)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        model(torch.randn(8, 40)).square().sum().backward()
        optimizer.step()
    state = {"model": model.state_dict(), "optim": optimizer.state_dict(), "step": 7, "rng": torch.get_rng_state()}
    save(run, 7, state)
    fresh = {
        "model": torch.nn.Linear(40, 30).state_dict(),
        "optim": dict(optimizer.state_dict().items()),
        "step": 0,
        "rng": torch.zeros_like(torch.get_rng_state()),
    }
    load(run, 7, fresh)
    assert all(torch.equal(fresh["model"][k], v) for k, v in model.state_dict().items())
    assert fresh["step"] == 7
    assert torch.equal(fresh["rng"], state["rng"])


def test_checkpoint_id_is_the_step(tmp_path: Path):
    run = tmp_path / "run"
    w = big(1, 32, 32)
    dcp.save({"w": w}, checkpoint_id="12", storage_writer=StorageWriter(run, threads=1), no_dist=True)
    got = {"w": torch.zeros_like(w)}
    dcp.load(got, checkpoint_id="12", storage_reader=StorageReader(run, threads=1), no_dist=True)
    assert torch.equal(got["w"], w)
    with pytest.raises(dcp.api.CheckpointException, match="there already"):
        save(run, 12, {"w": w})
    save(run, 12, {"w": w * 2}, replace_step=True)
    assert torch.equal(load(run, 12, {"w": torch.zeros_like(w)})["w"], w * 2)
    with pytest.raises(tzip.UsageError, match="is the step"):
        StorageWriter(run).reset("runs/step-3")
    with pytest.raises(dcp.api.CheckpointException, match="say the step"):
        dcp.save({"w": w}, storage_writer=StorageWriter(run), no_dist=True)


def test_ranks_that_find_different_checkpoints_are_told(tmp_path: Path):
    run = tmp_path / "run"
    save(run, 1, {"w": big(1, 8, 8)})
    mine = StorageReader(run, threads=1)
    first = mine.prepare_local_plan(dcp.planner.LoadPlan([]))
    save(run, 2, {"w": big(2, 8, 8)})
    second = StorageReader(run, threads=1).prepare_local_plan(dcp.planner.LoadPlan([]))
    with pytest.raises(tzip.CorruptError, match="different checkpoints"):
        mine.prepare_global_plan([first, second])


def test_restore_writes_torchs_own_layout(tmp_path: Path):
    run = tmp_path / "run"
    w, v = big(1, 130, 70), torch.randn(9)
    save(run, 5, {"w": w, "nested": {"v": v}, "n": 3}, tile=(64, 64))
    store = tzip.Store(run)
    store.restore(5, tmp_path / "plain")
    got: dict[str, Any] = {"w": torch.zeros_like(w), "nested": {"v": torch.zeros(9)}, "n": 0}
    dcp.load(got, checkpoint_id=tmp_path / "plain", no_dist=True)
    assert torch.equal(got["w"], w)
    assert torch.equal(got["nested"]["v"], v)
    assert got["n"] == 3
    store.restore(5, tmp_path / "x.pt")
    again = torch.load(tmp_path / "x.pt", weights_only=True)
    assert torch.equal(again["w"], w)
    assert torch.equal(again["nested"]["v"], v)
    store.restore(5, tmp_path / "x.safetensors")
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "x.safetensors")["w"], w)


def test_a_flipped_bit_is_told_where_the_stock_reader_loads_it(tmp_path: Path):
    """Both formats with one bit flipped in the middle of the weights, side by side."""
    w = big(1, 256, 256)
    dcp.save({"w": w}, storage_writer=dcp.FileSystemWriter(tmp_path / "stock"), no_dist=True)
    (data,) = (tmp_path / "stock").glob("*.distcp")
    _flip(data)
    got = {"w": torch.zeros_like(w)}
    dcp.load(got, storage_reader=dcp.FileSystemReader(tmp_path / "stock"), no_dist=True)
    assert not torch.equal(got["w"], w)  # loaded without an error: what a store must never do

    run = tmp_path / "run"
    save(run, 1, {"w": w})
    with tzip.Store(run).open(1) as checkpoint:
        place = checkpoint.manifest.records["w"].object
    _flip(tzip.Store(run).backend.object_path(place))
    with pytest.raises(dcp.api.CheckpointException, match=r"does not match|not the one|corrupt|sum"):
        load(run, 1, {"w": torch.zeros_like(w)})
    assert [f.steps for f in tzip.Store(run).verify().faults] == [(1,)]


def test_a_death_while_overwriting_where_the_stock_writer_mixes_steps(tmp_path: Path):
    """New data under old metadata loads as a mixture from the stock writer; a store has the old step, whole."""

    class Dies(Exception):
        pass

    def stop(*_: Any, **__: Any) -> None:
        raise Dies

    old, new = big(1, 64, 64), big(2, 64, 64)
    stock = dcp.FileSystemWriter(tmp_path / "stock", single_file_per_rank=True, overwrite=True)
    dcp.save({"w": old}, storage_writer=stock, no_dist=True)
    again = dcp.FileSystemWriter(tmp_path / "stock", single_file_per_rank=True, overwrite=True)
    again.finish = stop  # type: ignore[method-assign]
    with pytest.raises(dcp.api.CheckpointException, match="Dies"):
        dcp.save({"w": new}, storage_writer=again, no_dist=True)
    got = {"w": torch.zeros_like(old)}
    dcp.load(got, storage_reader=dcp.FileSystemReader(tmp_path / "stock"), no_dist=True)
    assert torch.equal(got["w"], new)  # under the metadata of the old save, without an error

    run = tmp_path / "run"
    save(run, 1, {"w": old})
    writer = StorageWriter(run, step=1, replace_step=True, threads=1)
    writer.finish = stop  # type: ignore[method-assign]
    with pytest.raises(dcp.api.CheckpointException, match="Dies"):
        dcp.save({"w": new}, storage_writer=writer, no_dist=True)
    assert torch.equal(load(run, 1, {"w": torch.zeros_like(old)})["w"], old)


def test_a_manifest_that_lies_is_an_error(tmp_path: Path):
    run = tmp_path / "run"
    save(run, 1, {"w": big(1, 8, 8), "b": {"x": 1}})
    with tzip.Store(run).open(1) as checkpoint:
        manifest = checkpoint.manifest
        for break_it in (
            lambda e: e["torch"]["state"]["w"].update(dtype="Tensor"),
            lambda e: e["torch"]["state"]["w"].update(size="x"),
            lambda e: e["items"].append(["w"]),
            lambda e: e.pop("torch"),
            lambda e: e["torch"].update(planner=["p"]),
        ):
            extra = copy.deepcopy(dict(manifest.extra))
            break_it(extra)
            with pytest.raises(tzip.CorruptError):
                sharded.metadata_of(replace(manifest, extra=extra))
        reader = StorageReader(run, step=1, threads=1)
        reader.set_up_storage_reader(sharded.metadata_of(manifest), True)
        reader._places[next(i for i in reader._places if i.fqn == "w")][:] = [("w", (4, 0))]  # type: ignore[index]
        with pytest.raises(dcp.api.CheckpointException):
            dcp.load({"w": torch.zeros(8, 8, dtype=torch.bfloat16)}, storage_reader=_Fixed(reader), no_dist=True)


class _Fixed(StorageReader):
    """A reader whose places were tampered with."""

    def __init__(self, other: StorageReader) -> None:
        super().__init__(other.path, other.step, threads=1)
        self._tampered = other._places

    def set_up_storage_reader(self, metadata: Any, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._places = self._tampered


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
