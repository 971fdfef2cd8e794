"""Megatron-core's distributed checkpoints on the CPU, one rank and two. Run by trainer_runs.py."""

import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that there is no Apex, and so on
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from tzip.megatron import STORE, StoreLoadStrategy, register

import tzip

ROWS, COLUMNS = 24, 96


def weights(step: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(5)
    start = torch.randn(ROWS, COLUMNS, generator=g)
    return start + step * 1e-6 * torch.randn(ROWS, COLUMNS, generator=g)


def owned(rank: int, ranks: int) -> list[int]:
    return [rank] if ranks == 2 else [0, 1]


def state(w: torch.Tensor, rank: int, ranks: int, axis: int, extra: Any) -> dict[str, Any]:
    """Rows or columns of w, one part a rank, a tensor that all have, and an object of each rank."""
    part = w.chunk(ranks, axis)[rank].contiguous()
    return {
        "model": {
            "w": ShardedTensor.from_rank_offsets("layer.w", part, (axis, rank, ranks)),
            "norm": ShardedTensor.from_rank_offsets("layer.norm", torch.ones(4) if extra else torch.zeros(4), replica_id=rank),
        },
        "rng": [ShardedObject("rng", extra and torch.full((3,), i), (2,), (i,)) for i in owned(rank, ranks)],
        "args": {"step": extra},
    }  # fmt: skip


def ranked(rank: int, ranks: int, folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", rank=rank, world_size=ranks, store=torch.distributed.FileStore(str(folder / f"meet-{ranks}"), ranks)
    )
    register(threads=1)
    run = folder / "run"
    if ranks == 2:
        for step in (100, 200):
            at = run / f"iter_{step:07d}"
            at.mkdir(parents=True, exist_ok=True)
            dist_checkpointing.save(state(weights(step), rank, 2, 0, step), str(at), ("tzip", 1))
    for step in (100, 200):
        at = run / f"iter_{step:07d}"
        axis = 1 if ranks == 2 else 0  # saved by rows on two ranks, loaded by columns on two, and whole on one
        asked = state(torch.zeros(ROWS, COLUMNS), rank, ranks, axis, None)
        found = dist_checkpointing.load(asked, str(at))
        assert torch.equal(found["model"]["w"], weights(step).chunk(ranks, axis)[rank])
        assert torch.equal(found["model"]["norm"], torch.ones(4))
        for i, got in zip(owned(rank, ranks), found["rng"], strict=True):
            assert torch.equal(got, torch.full((3,), i))
        assert found["args"] == {"step": step}
    known = dist_checkpointing.load_tensors_metadata(str(at))
    assert {k: tuple(v.global_shape) for k, v in known.items()} == {"layer.w": (ROWS, COLUMNS), "layer.norm": (4,)}
    everything = StoreLoadStrategy().load_sharded_metadata(at)
    assert {k for k in everything if k.startswith("rng")} == {"rng/shard_0_2", "rng/shard_1_2"}
    if ranks == 1:
        refuses(run)
    torch.distributed.destroy_process_group()


def refuses(run: Path) -> None:
    for words, call in (
        ("ends with its step", lambda: StoreLoadStrategy().load({}, run / "latest")),
        ("cannot be removed", lambda: StoreLoadStrategy().remove_sharded_tensors(run / "iter_1", "layer")),
    ):
        try:
            call()
        except tzip.UsageError as e:
            if words not in str(e):
                raise
        else:
            raise AssertionError(words)
    with tzip.Store(run / STORE, create=False) as store:
        assert [e.step for e in store.log()] == [200, 100]
        assert not store.verify(deep=True).faults
        second, first = store.log()
        assert second.stored < first.stored


def readme(path: Path, folder: Path) -> None:
    """The README's example."""
    blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    ran = [b for b in blocks if "tzip.megatron" in b]
    assert ran
    folder.mkdir()
    os.chdir(folder)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    space = {"sharded_state": lambda: {"w": ShardedTensor.from_rank_offsets("w", weights(1))}}
    for block in ran:
        exec(compile(block, "README.md", "exec"), space)
    assert torch.equal(space["state"]["w"], weights(1))
    torch.distributed.destroy_process_group()


def main(text: Path, folder: Path) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    children = []
    for rank in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            ranked(rank, 2, folder)
            os._exit(0)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    ranked(0, 1, folder)
    readme(text, folder / "readme")
