"""What ranks of a distributed checkpoint do in the tests: one process a rank, run by test_torch_dcp.py.

    python dcp_ranks.py SCENARIO RANK RANKS FOLDER
"""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tzip.torch_dcp import StorageReader, StorageWriter


def whole(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(1 << 31), 1 << 31, (37, 19), generator=g, dtype=torch.int64).to(torch.int32)
    return {
        "w": (torch.randn(515, 130, generator=g) * 0.02).to(torch.bfloat16),
        "nan": bits.view(torch.float32),  # any bits: NaNs with payloads among them
        "deep.e": torch.randn(7, 6, 5, generator=g),
        "one": torch.tensor(-0.0),
        "none": torch.empty(0, 4),
        "ids": torch.arange(64, dtype=torch.int64).reshape(8, 8),
        "flags": torch.rand(9, generator=g) > 0.5,
        "z": torch.randn(6, 4, generator=g, dtype=torch.complex128),
    }


def placed(state: dict[str, torch.Tensor], how: str, ranks: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (ranks,))
    kind = {"rows": Shard(0), "columns": Shard(1), "same": Replicate()}[how]
    out: dict[str, Any] = {}
    for name, tensor in state.items():
        fits = tensor.dim() > (1 if how == "columns" else 0) and tensor.dtype is not torch.complex128
        out[name] = distribute_tensor(tensor, mesh, [kind]) if fits else tensor
    return out


def save(run: str, step: int, seed: int, how: str, ranks: int, **options: Any) -> None:
    state = placed(whole(seed), how, ranks) | {"note": {"a": [1, "x"], "b": (2, None)}}
    dcp.save(state, storage_writer=StorageWriter(run, step=step, threads=1, **options))


def check(run: str, step: int, seed: int, how: str, ranks: int) -> None:
    wanted = whole(seed)
    empty = {k: torch.full_like(v, 1) for k, v in wanted.items()}
    state = placed(empty, how, ranks) | {"note": {"a": [0, ""], "b": (0, 0)}}
    dcp.load(state, storage_reader=StorageReader(run, step=step, threads=1))
    for name, tensor in wanted.items():
        got = state[name].full_tensor() if isinstance(state[name], DTensor) else state[name]
        same = torch.equal(bits(got), bits(tensor))
        assert same, f"{name} of step {step}, {how} on {ranks}"
        assert got.dtype == tensor.dtype
    assert state["note"] == {"a": [1, "x"], "b": (2, None)}, state["note"]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def exchange(run: str, rank: int, ranks: int) -> None:
    """Save in every placement, load in every other one; steps continue those that fewer ranks have saved."""
    first = 10 * ranks
    for i, how in enumerate(("rows", "columns", "same")):
        save(run, first + i, first + i, how, ranks, tile=(100, 50) if how == "columns" else None)
        for other in ("rows", "columns", "same"):
            check(run, first + i, first + i, other, ranks)
    if ranks > 1:
        for step in range(10 * (ranks // 2), 10 * (ranks // 2) + 3):
            check(run, step, step, "rows", ranks)


class DiesBefore(StorageWriter):
    """A writer whose rank is gone at some point of a save."""

    where = ""

    def write_data(self, plan: Any, planner: Any) -> Any:
        if self.where == "data" and dist.get_rank() == dist.get_world_size() - 1:
            os._exit(9)
        done = super().write_data(plan, planner)
        if self.where == "after data" and dist.get_rank() == dist.get_world_size() - 1:
            os._exit(9)
        return done

    def finish(self, metadata: Any, results: Any) -> None:
        if self.where == "commit":
            os._exit(9)
        super().finish(metadata, results)


def dies(run: str, rank: int, ranks: int, where: str) -> None:
    writer = DiesBefore(run, step=999, threads=1)
    writer.where = where
    try:
        dcp.save(placed(whole(5), "rows", ranks), storage_writer=writer)
    except BaseException:
        os._exit(7)  # the others learn of it by an error or a broken connection


def conflict(run: str, rank: int, ranks: int) -> None:
    """Another writer commits between this one's start and its end."""
    import tzip

    class Late(StorageWriter):
        def finish(self, metadata: Any, results: Any) -> None:
            tzip.Store(run, threads=1).save(1234, {"x": torch.ones(3)})
            super().finish(metadata, results)

    with pytest.raises(dcp.api.CheckpointException, match="another writer"):
        dcp.save(placed(whole(6), "rows", ranks), storage_writer=Late(run, step=998, threads=1))


def main() -> None:
    scenario, rank, ranks, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    meeting = folder / f"meeting-{scenario.replace(' ', '-')}-{ranks}"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    run = str(folder / "run")
    if scenario == "exchange":
        exchange(run, rank, ranks)
    elif scenario == "conflict":
        conflict(run, rank, ranks)
    else:
        dies(run, rank, ranks, scenario)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
