"""What saving costs a training: wall and CPU time of ten steps with one save among them, beside ten without.

    python bench/trainers.py FOLDER [--pairs 4] [--threads 1] [--with lightning] [--size 384 4]

A byte-level GPT of 7.4 million parameters (89 MB of weights and AdamW's state in float32) learns Python's own sources on
the CPU, batches of 16 times 256 bytes. Blocks of ten steps alternate: one with a save in the background (block=False) after
its first step, which is waited for before the block ends, and one without. `--threads`: torch's; the saver has one of its
own beside them. A machine that others use makes wall times jump; the CPU time of the process (all threads) says what was
done. Kernels are compiled before. FOLDER lies on a memory-backed file system.
"""

import argparse
import os
import shutil
import statistics
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np

from tzip.coders.jit import compile_eagerly

CONTEXT, BATCH, BLOCK = 256, 16, 10


def training(dim: int, layers: int) -> tuple[Callable[[], float], Callable[[], dict[str, Any]]]:
    """Return what takes a step, and what returns the state."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    data = torch.from_numpy(np.frombuffer(b"".join(f.read_bytes() for f in files), np.uint8).astype(np.int64))
    block = nn.TransformerEncoderLayer(dim, 6, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
    parts = nn.ModuleDict(
        {
            "tok": nn.Embedding(256, dim), "pos": nn.Embedding(CONTEXT, dim), "norm": nn.LayerNorm(dim),
            "blocks": nn.TransformerEncoder(block, layers, enable_nested_tensor=False), "head": nn.Linear(dim, 256, bias=False),
        }
    )  # fmt: skip
    optimizer = torch.optim.AdamW(parts.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)
    mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
    place = torch.arange(CONTEXT)

    def step() -> float:
        at = torch.randint(len(data) - CONTEXT - 1, (BATCH,)).tolist()
        x, y = (torch.stack([data[i + d : i + d + CONTEXT] for i in at]) for d in (0, 1))
        hidden = parts["blocks"](parts["tok"](x) + parts["pos"](place), mask=mask, is_causal=True)
        loss = nn.functional.cross_entropy(parts["head"](parts["norm"](hidden)).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step, lambda: {"state_dict": parts.state_dict(), "optimizer_states": [optimizer.state_dict()]}


def saver(kind: str, folder: Path) -> tuple[Callable[[int, dict[str, Any]], None], Callable[[], None]]:
    """Return what saves a state, and what waits for it."""
    if kind == "lightning":
        from tzip.lightning import StoreCheckpointIO

        io = StoreCheckpointIO(block=False, threads=1)
        return lambda step, state: io.save_checkpoint({**state, "global_step": step}, folder / f"{step}.ckpt"), io.wait
    import tzip

    store = tzip.Store(folder, threads=1)

    def save(step: int, state: dict[str, Any]) -> None:
        store.save(step, state, block=False)

    def wait() -> None:
        store.wait()

    return save, wait


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--with", dest="kind", choices=["store", "lightning"], default="store")
    parser.add_argument("--size", type=int, nargs=2, default=[384, 4], help="width and layers")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch

    torch.set_num_threads(args.threads)
    shutil.rmtree(args.folder, ignore_errors=True)
    step, state = training(*args.size)
    save, wait = saver(args.kind, args.folder)
    compile_eagerly()
    for i, steps in enumerate((1, 1, 4)):  # a base, and the kernels for states one step and more apart
        for _ in range(steps):
            step()
        save(i, state())
        wait()
    rows = []
    for pair in range(args.pairs):
        took = {}
        for saving in (False, True) if pair % 2 else (True, False):
            wall, cpu, stall = time.perf_counter(), time.process_time(), 0.0
            for i in range(BLOCK):
                step()
                if saving and i == 0:
                    begin = time.perf_counter()
                    save(3 + pair, state())
                    stall = time.perf_counter() - begin
            wait()
            took[saving] = time.perf_counter() - wall, time.process_time() - cpu, stall
        extra = [100 * (b - a) / a for a, b in zip(took[False][:2], took[True][:2], strict=True)]
        rows.append((*extra, 100 * took[True][2] / took[False][0], took[False][0] / BLOCK))
        print("wall {:+.2f} %, CPU {:+.2f} %, stalled {:.2f} %, a step {:.2f} s".format(*rows[-1]), flush=True)
    names = ("wall time", "CPU time", "stalled in the call, of the wall time", "a step without saving, s")
    lines = [(name, statistics.median(column)) for name, column in zip(names, zip(*rows, strict=True), strict=True)]
    for name, value in lines:
        print(f"median: {name:<45} {value:>8.3f}")
    shutil.rmtree(args.folder)
    if args.csv:
        said = {"with": args.kind, "torch_threads": args.threads}
        common.write_csv(args.csv, [{**common.facts(), **said, "what": n, "value": round(v, 3)} for n, v in lines])


if __name__ == "__main__":
    main()
