"""Weights in motion: what publishing small updates costs, in bytes and in time.

    python bench/publish.py make RUN OUT --model training_run.py [--steps 50] [--lr 1e-6]
    python bench/publish.py sizes OUT [--level default]
    python bench/publish.py speed OUT [--repeat 5]

"make" goes on with the last checkpoint of a run (stepNNNNN.safetensors of training_run.py, which holds the model's code) as a
fine-tune at a learning rate of reinforcement learning: real gradients, float32 master weights and AdamW moments, the weights
published as bfloat16 after each step, into OUT as stepNN.safetensors.
"sizes" publishes them one after another and shows, for each step, the share of elements that changed, the bytes that the store
grew by, and those beside the entropy bound: the positions of the changed elements (order 0), and their differences (order 0,
given the exponent of the earlier value).
"speed" shows, for one core and by CPU time, best of the repeats, what each part of the way takes, in bytes of the weights.
`--csv OUT` writes a line for each figure.
"""

import argparse
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import common
import numpy as np

FIGURES = common.Figures()
say, fresh = FIGURES.say, common.fresh


def make(run: Path, out: Path, code: Path, steps: int, lr: float) -> None:
    """Write the weights after each of some steps of a fine-tune."""
    import glob
    import sysconfig

    import torch
    import torch.nn.functional as F
    from safetensors.torch import load_file, save_file

    spec = importlib.util.spec_from_file_location("training_run", code)
    assert spec is not None
    assert spec.loader is not None
    training = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(training)
    torch.manual_seed(2)
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    state = load_file(max(run.glob("step*.safetensors")))
    dim = state["model.tok.weight"].shape[1]
    model = training.GPT(dim, sum(1 for k in state if k.startswith("model.blocks.") and k.endswith("norm1.weight")))
    model.load_state_dict({k[6:]: v for k, v in state.items() if k.startswith("model.")})
    opt = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    for name, p in model.named_parameters():
        moments = {k: state[f"optim.{k}.{name}"].clone() for k in ("exp_avg", "exp_avg_sq")}
        opt.state[p] = {"step": torch.tensor(240.0), **moments}
    files = sorted(glob.glob(f"{sysconfig.get_paths()['stdlib']}/*.py"))
    data = torch.from_numpy(np.frombuffer(b"".join(Path(f).read_bytes() for f in files), np.uint8).astype(np.int64))
    batches = torch.Generator().manual_seed(3)

    def publish(step: int) -> None:
        save_file({k: v.bfloat16() for k, v in model.state_dict().items()}, out / f"step{step:02d}.safetensors")

    publish(0)
    for step in range(1, steps + 1):
        at = torch.randint(len(data) - training.CONTEXT - 1, (training.BATCH,), generator=batches)
        x = torch.stack([data[i : i + training.CONTEXT] for i in at])
        y = torch.stack([data[i + 1 : i + training.CONTEXT + 1] for i in at])
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        publish(step)
        print(f"step {step} loss {loss.item():.3f}", flush=True)


def states(folder: Path) -> list[dict[str, Any]]:
    """Return the weights after each step, bits as numpy arrays."""
    import ml_dtypes  # noqa: F401
    from safetensors.numpy import load_file

    return [load_file(p) for p in sorted(folder.glob("step*.safetensors"))]


def bound(new: dict[str, Any], old: dict[str, Any]) -> tuple[int, int, float, float]:
    """Return (elements, changed ones, bytes of positions and differences, the same when exponents tell of positions, too).

    Order-0 entropies for each tensor; differences given the exponent of the earlier value.
    """
    n = changed = 0
    plain = told = 0.0
    for name in new:
        a, b = (np.ascontiguousarray(x[name]).reshape(-1).view(np.uint16).astype(np.int64) for x in (new, old))
        differ, exponents = a != b, b >> 7 & 255
        n, changed = n + a.size, changed + int(differ.sum())
        plain += entropy(np.bincount(differ, minlength=2))
        for e in np.unique(exponents):
            here = exponents == e
            told += entropy(np.bincount(differ[here], minlength=2))
            values = entropy(np.unique((a - b)[here & differ], return_counts=True)[1])
            plain, told = plain + values, told + values
    return n, changed, plain, told


def entropy(counts: Any) -> float:
    """Return the bytes of symbols with these counts."""
    used = counts[counts > 0].astype(np.float64)
    return float((used * np.log2(used.sum() / used)).sum()) / 8


def sizes(folder: Path, level: str, scratch: Path) -> None:
    """Publish all steps, with a reader that follows, and one that comes after ten steps."""
    import tzip

    steps = states(folder)
    raw = sum(a.nbytes for a in steps[0].values())
    ratios, shares, stored = [], [], []
    with tzip.Store(fresh(scratch / "publish"), level=level, threads=1, max_chain=60) as store:
        store.publish(0, steps[0])
        reader = store.subscribe({k: v.copy() for k, v in steps[0].items()})
        late = store.subscribe()
        for i, state in enumerate(steps[1:], 1):
            store.publish(i, state)
            report = reader.update()
            if any(reader.weights[k].tobytes() != v.tobytes() for k, v in state.items()):
                raise SystemExit("WRONG BYTES")
            n, changed, plain, told = bound(state, steps[i - 1])
            shares.append(changed / n)
            stored.append(report.bytes_read / raw)
            ratios.append(report.bytes_read / plain)
            if i in (1, 2, 5, 10, 20, 50) or i == len(steps) - 1:
                say(f"step {i}: elements that changed", 100 * changed / n, "%")
                say(f"step {i}: read", 100 * report.bytes_read / raw, "% of raw")
                say(f"step {i}: read / entropy of positions and values", report.bytes_read / plain, "x")
                say(f"step {i}: read / the same, positions given exponents", report.bytes_read / told, "x")
            if i == 10:
                report = late.update()
                say("ten steps late: read", 100 * report.bytes_read / raw, "% of raw")
        say("all steps: elements that changed, median", 100 * common.median(shares), "%")
        say("all steps: read, median", 100 * common.median(stored), "% of raw")
        each = [b / s for b, s in zip(stored, shares, strict=True)]
        say("all steps: read for each 1 % of elements, median", common.median(each), "% of raw")
        say("all steps: read / entropy, median", common.median(ratios), "x")
        full = next(e.stored for e in store.log() if e.step == 0)
        say("the first step, in full", 100 * full / raw, "% of raw")
    shutil.rmtree(scratch / "publish")


def speed(folder: Path, level: str, repeat: int, scratch: Path, copies: int) -> None:
    """One core, CPU time, best of the repeats. Tensors are `copies` times as long, turned each time, so that most chunks are
    as full as those of large models.
    """
    import tzip
    from tzip.coders.sums import same_bytes
    from tzip.store.objects import content_ids, in_memory
    from tzip.store.states import flatten
    from tzip.workers import Workers

    common.pin(1)

    def longer(array: Any) -> Any:
        flat = np.concatenate([np.roll(array.reshape(-1), 4099 * i) for i in range(copies)])
        return flat.reshape(copies * array.shape[0], *array.shape[1:])

    first, second = ({k: longer(v) for k, v in s.items()} for s in states(folder)[:2])
    raw = sum(a.nbytes for a in first.values())
    names = ("copy (memcpy)", "find what changed", "hash", "publish, all of it", "update, all of it")
    best = dict.fromkeys(names, float("inf"))

    def timed(name: str, work: Any) -> Any:
        clock = common.Clock(1)
        result = clock.timed(work)
        best[name] = min(best[name], clock.seconds[0])
        return result

    for _ in range(repeat + 1):
        with tzip.Store(fresh(scratch / "publish"), level=level, threads=1) as store:
            store.publish(0, first)
            mine = {k: v.copy() for k, v in first.items()}
            reader = store.subscribe(mine, step=0)
            timed("copy (memcpy)", lambda: [np.copyto(mine[k], v) for k, v in first.items()])  # noqa: B023
            leaves = flatten(second)[1]
            before = flatten(first)[1]
            timed("find what changed", lambda: [same_bytes(x.raw, before[k].raw) for k, x in leaves.items()])  # noqa: B023
            held = [in_memory(k, x.dtype, x.shape, x.raw) for k, x in leaves.items()]
            with Workers(1) as workers:
                timed("hash", lambda: content_ids(held, workers))  # noqa: B023
            timed("publish, all of it", lambda: store.publish(1, second))
            report = timed("update, all of it", lambda: reader.update())  # noqa: B023
            if report.full or any(mine[k].tobytes() != v.tobytes() for k, v in second.items()):
                raise SystemExit("WRONG BYTES")
    shutil.rmtree(scratch / "publish")
    for name, seconds in best.items():
        say(name, raw / seconds / 1e9, "GB/s of weights")
    chunks(first, second, level, repeat)


def chunks(first: dict[str, Any], second: dict[str, Any], level: str, repeat: int) -> None:
    """Code and decode the differences of the large tensors, chunk by chunk, without proof, archive and hash."""
    from tzip.chunks import SLACK, decode_chunk
    from tzip.encoding import encode_chunk
    from tzip.formats.layout import CHUNK_ELEMENTS
    from tzip.plan import LEVELS

    step = 2 * CHUNK_ELEMENTS
    jobs = []
    for name, array in second.items():
        if array.size >= 65536:
            x, y = (np.ascontiguousarray(a).reshape(-1).view(np.uint8) for a in (array, first[name]))
            jobs += [(x[i : i + step], y[i : i + step]) for i in range(0, x.size, step)]
    best = [float("inf")] * 2
    for _ in range(repeat + 1):
        spent = [0.0, 0.0]
        for x, y in jobs:
            clock = common.Clock(1)
            coded = clock.timed(lambda: encode_chunk(x, 2, "bf16", LEVELS[level], 0, 0, 0, 0, y))  # noqa: B023
            record = np.zeros(len(coded.record) + SLACK, np.uint8)
            record[: len(coded.record)] = np.frombuffer(coded.record, np.uint8)
            out = np.empty(x.size, np.uint8)
            args = (record, len(coded.record), 0, 0, x.size // 2, 2, out, None, y)
            clock.timed(lambda: decode_chunk(*args))  # noqa: B023
            spent = [a + b for a, b in zip(spent, clock.seconds, strict=True)]
            if out.tobytes() != x.tobytes():
                raise SystemExit("WRONG BYTES")
        best = [min(a, b) for a, b in zip(best, spent, strict=True)]
    total = sum(x.size for x, _ in jobs)
    say("code the differences", total / best[0] / 1e9, "GB/s of weights")
    say("decode the differences", total / best[1] / 1e9, "GB/s of weights")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "sizes", "speed"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--level", default="default")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--copies", type=int, default=8)
    parser.add_argument("--scratch", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    if args.what == "make":
        make(args.folder, args.out, args.model, args.steps, args.lr)
    elif args.what == "sizes":
        sizes(args.folder, args.level, args.scratch)
    else:
        speed(args.folder, args.level, args.repeat, args.scratch, args.copies)
    if args.csv:
        common.write_csv(args.csv, [{**common.facts(), "what": w, "value": round(v, 4), "unit": u} for w, v, u in FIGURES.rows])


if __name__ == "__main__":
    main()
