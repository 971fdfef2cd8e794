"""Packing a hub: a family of real fine-tunes beside zipnn, and a simulation of a cluster.

    python bench/hub.py make MINILM FOLDER [--steps 24]
    python bench/hub.py family FOLDER [--level default] [--csv OUT] [--doc DOCUMENT.md]
    python bench/hub.py record FOLDER TIMES.json
    python bench/hub.py simulate TIMES.json [--csv OUT] [--doc DOCUMENT.md]

`make` fine-tunes all-MiniLM-L6-v2 (MINILM: its folder as published) eight times with AdamW, each on other text (packages of
Python's own library) and at another learning rate from 1e-5 to 5e-4, linear decay, every second one with a weight decay of
0.01, the contrastive loss that sentence models are trained with; and once more by an adapter of rank 16 in the attention,
which is merged. FOLDER/fp32 and FOLDER/bf16 get ten model folders each, the model itself and its nine descendants, whose
names do not say what they are. It needs torch and transformers.

`family` packs each of the two as a hub (`tzip.pack_hub`, which finds the family by itself), restores every model from the
archives alone and compares every byte. zipnn gets all tensors of each model in one buffer for each element type, its best
case.

`record` packs some of the models, by themselves and as differences, and notes the CPU seconds of each; `simulate` plays
1,000 models on 1 to 256 nodes with these times (see `Cluster` for what it knows and what it leaves out).
"""

import argparse
import hashlib
import heapq
import itertools
import json
import random
import shutil
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import common
import numpy as np
import rivals

RATES = (1e-5, 2e-5, 3e-5, 5e-5, 1e-4, 2e-4, 3e-4, 5e-4)
TEXTS = ("asyncio", "email", "idlelib", "importlib", "multiprocessing", "tkinter", "unittest", "xml", "ctypes")
RANK = 16


# ---- making the family


def pairs_of(package: str) -> list[tuple[str, str]]:
    """Return each line of a package of Python's own library, and the next one, where both have some words."""
    found = []
    for file in sorted((Path(sysconfig.get_paths()["stdlib"]) / package).rglob("*.py")):
        lines = [line.strip() for line in file.read_text(errors="ignore").splitlines()]
        found += [(a, b) for a, b in itertools.pairwise(lines) if min(len(a.split()), len(b.split())) >= 4]
    return found


def batches(package: str, tokenizer: Any, steps: int) -> Iterator[list[Any]]:
    rng = random.Random(package)
    found = pairs_of(package)
    for _ in range(steps):
        sides = zip(*rng.sample(found, 16), strict=True)
        yield [tokenizer(list(s), padding=True, truncation=True, max_length=24, return_tensors="pt") for s in sides]


def train(model: Any, parameters: list[Any], package: str, tokenizer: Any, steps: int, rate: float, decay: float) -> None:
    """Train so that a line is nearer to the next one than to others."""
    import torch

    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / steps)
    model.train()
    for batch in batches(package, tokenizer, steps):
        means = []
        for side in batch:
            mask = side["attention_mask"].unsqueeze(-1)
            means.append((model(**side).last_hidden_state * mask).sum(1) / mask.sum(1))
        a, b = (torch.nn.functional.normalize(mean, dim=1) for mean in means)
        loss = torch.nn.functional.cross_entropy(20 * a @ b.T, torch.arange(len(a)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    common.say(f"{package}: rate {rate:g}, decay {decay:g}, loss {loss.item():.3f}")


def adapt(model: Any) -> list[tuple[Any, Any, Any]]:
    """Put an adapter beside the linear layers of the attention; return (layer, down, up) of each."""
    import torch

    found = []
    for name, layer in model.named_modules():
        if not (isinstance(layer, torch.nn.Linear) and ".attention." in name):
            continue
        down = torch.nn.Parameter(torch.randn(RANK, layer.in_features) / layer.in_features**0.5)
        up = torch.nn.Parameter(torch.zeros(layer.out_features, RANK))
        layer.register_forward_hook(lambda _, x, y, down=down, up=up: y + 2 * (x[0] @ down.T) @ up.T)
        found.append((layer, down, up))
    return found


def make(minilm: Path, folder: Path, steps: int) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm)
    plain = load_file(minilm / "model.safetensors")
    family = {"plain": plain}
    pairs = zip(TEXTS, RATES, strict=False)
    jobs = [(f"{text}-{rate:.0e}", text, rate, 0.01 * (i % 2)) for i, (text, rate) in enumerate(pairs)]
    for name, text, rate, decay in [*jobs, ("adapter", TEXTS[-1], 1e-3, 0.0)]:
        torch.manual_seed(len(family))
        model = AutoModel.from_pretrained(minilm)
        if name == "adapter":
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            layers = adapt(model)
            train(model, [p for _, *pair in layers for p in pair], text, tokenizer, steps, rate, decay)
            with torch.no_grad():
                for layer, down, up in layers:
                    layer.weight += 2 * up @ down
        else:
            train(model, list(model.parameters()), text, tokenizer, steps, rate, decay)
        state = model.state_dict()
        family[name] = {key: state.get(key, value) for key, value in plain.items()}
    for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for name, state in family.items():
            write_model(folder / kind / hashlib.sha256(name.encode()).hexdigest()[:6], name, minilm, state, dtype)


def write_model(target: Path, name: str, minilm: Path, state: dict[str, Any], dtype: Any) -> None:
    from safetensors.torch import save_file

    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(minilm, target, ignore=shutil.ignore_patterns("*.safetensors"))
    (target / "README.md").write_text(f"{name}\n")
    cast = {k: v.to(dtype).contiguous() if v.is_floating_point() else v.contiguous() for k, v in state.items()}
    save_file(cast, target / "model.safetensors", metadata={"format": "pt"})


# ---- the family beside zipnn


def tensors_by_dtype(folder: Path) -> dict[str, bytes]:
    return common.load_by_dtype(folder / "model.safetensors", 0)[0]


def zipnn_bytes(folder: Path) -> int:
    """Return what zipnn makes of a model's tensors; types that it does not know, and all other files, count in full."""
    total = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    for dtype, raw in tensors_by_dtype(folder).items():
        try:
            encode, decode = rivals.make("zipnn", "", dtype, 1)
        except rivals.NotSupportedError:
            continue
        packed = encode(bytearray(raw))
        if bytes(decode(packed)) != raw:
            raise SystemExit("zipnn: WRONG BYTES")
        total -= len(raw) - len(packed)
    return total


def entropy_bits(tuned: Path, plain: Path) -> float:
    """Return the order-0 entropy, in bytes, of a fine-tune's elements less its base's, by the exponent of the base and tensor.

    The difference of two floats' bit patterns is coded as its length in bits and that many bits below its first; this is
    what coding each by itself can come to, a little less than any code that learns its tables.
    """
    total = 0.0
    spans = {span.name: span for span in common.read_header(plain / "model.safetensors")}
    before, after = (np.fromfile(folder / "model.safetensors", np.uint8) for folder in (plain, tuned))
    for span in common.read_header(tuned / "model.safetensors"):
        if span.dtype not in ("F32", "BF16"):
            continue
        word, shift = (np.uint32, 23) if span.dtype == "F32" else (np.uint16, 7)
        old = spans[span.name]
        a, b = after[span.begin : span.end].copy().view(word), before[old.begin : old.end].copy().view(word)
        apart = a - b
        negative = apart >> (8 * apart.itemsize - 1) == 1
        size = np.where(negative, b - a, apart)
        length = np.ceil(np.log2(size.astype(np.float64) + 1)).astype(np.int64)
        exponent = (b >> shift).astype(np.int64) & 255
        key = exponent * 128 + length * 2 + negative
        counts = np.bincount(key, minlength=256 * 128).reshape(256, 128).astype(np.float64)
        of = counts.sum(1, keepdims=True)
        with np.errstate(all="ignore"):
            total += float(np.nansum(-counts * np.log2(counts / of))) + float(np.maximum(length - 1, 0).sum())
    return total / 8


def family(folder: Path, level: str, csv: Path | None, doc: Path | None) -> None:
    import tzip

    rows: list[list[Any]] = []
    for kind in ("fp32", "bf16"):
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "out"
            report = tzip.pack_hub(folder / kind, out, engine="local=1", level=level)
            if report.failures or report.left or len(report.receipts) != 10:
                raise SystemExit(f"not all of it was packed: {report.failures} {report.left}")
            for receipt in report.receipts:
                tzip.unpack(out / "archives" / f"{receipt.archive}.tzip", Path(scratch) / "back", force=True)
                for path in (folder / kind / receipt.model).rglob("*"):
                    there = Path(scratch) / "back" / path.relative_to(folder / kind)
                    if path.is_file() and path.read_bytes() != there.read_bytes():
                        raise SystemExit(f"{path}: WRONG BYTES")
                shutil.rmtree(Path(scratch) / "back")
        names = {r.model: (folder / kind / r.model / "README.md").read_text().strip() for r in report.receipts}
        sums = [0, 0, 0, 0.0]
        for r in sorted(report.receipts, key=lambda r: (r.depth, names[r.model])):
            rival = zipnn_bytes(folder / kind / r.model)
            bound = entropy_bits(folder / kind / r.model, folder / kind / r.base_model) if r.base else float(r.bytes_out)
            sums = [a + b for a, b in zip(sums, (r.bytes_in, r.bytes_out, rival, bound), strict=True)]
            rows.append(row(kind, names[r.model], names.get(r.base_model, ""), r.bytes_in, r.bytes_out, rival, bound))
        rows.append(row(kind, "all ten", "", *sums))
        base = next(r for r in report.receipts if not r.base)
        common.say(f"{kind}: {len([r for r in report.receipts if not r.base])} by themselves, first {names[base.model]}")
    columns = ["kind", "model", "base", ">MB", ">tzip %", ">zipnn %", ">tzip / zipnn", ">entropy %"]
    finish("family", columns, rows, csv, doc)


def row(kind: str, name: str, base: str, raw: int, ours: int, rival: int, bound: float) -> list[Any]:
    return [
        kind, name, base, f"{raw / 1e6:.1f}", f"{100 * ours / raw:.2f}", f"{100 * rival / raw:.2f}",
        f"{ours / rival:.3f}", f"{100 * bound / raw:.2f}" if base or not name.startswith("plain") else "",
    ]  # fmt: skip


def finish(name: str, columns: list[str], rows: list[list[Any]], csv: Path | None, doc: Path | None) -> None:
    text = common.markdown(columns, rows) + "\n" + common.stamp(common.command_line("hub.py"))
    print(text)
    if csv:
        keys = [c.removeprefix(">") for c in columns]
        common.write_csv(csv, [common.facts() | dict(zip(keys, one, strict=True)) for one in rows])
    if doc:
        common.replace_section(doc, name, text)


# ---- a cluster, simulated


def record(folder: Path, target: Path) -> None:
    """Pack bfloat16 models of what `make` made, the base and two others; note bytes and CPU seconds of each, and of tasks
    that do nothing the seconds of each engine.
    """
    from tzip.hub import bulk
    from tzip.hub.engines import engine_named
    from tzip.hub.families import sketch
    from tzip.hub.models import find_models
    from tzip.hub.receipts import Shelf

    told: dict[str, Any] = {"tasks": []}
    models = find_models(folder / "bf16", "default", None)[0]
    models.sort(key=lambda m: (Path(m.path) / "README.md").read_text() != "plain\n")
    for warm in (True, False):  # the first round compiles
        with tempfile.TemporaryDirectory() as scratch:
            shelf = Shelf(scratch)
            shelf.make()
            base = None
            for model in models[: 2 if warm else 3]:
                start = time.process_time()
                sketch(model.path, None)
                sketched, start = time.process_time() - start, time.process_time()
                receipt = bulk.pack_model(bulk.Job(model, scratch, "default", 1, None, base))
                base = base or receipt
                if not warm:
                    told["tasks"].append({
                        "leans": bool(receipt.base), "bytes_in": receipt.bytes_in, "bytes_out": receipt.bytes_out,
                        "seconds": time.process_time() - start, "sketch": sketched,
                    })  # fmt: skip
    for engine in ("local=2", "ray=2", "dask=2"):
        with engine_named(engine) as started:
            list(started.map(str, range(20)))  # starts the processes
            seconds, _ = common.timed(lambda: list(started.map(str, range(1000))))
            told[engine] = seconds / 1000
    target.write_text(json.dumps(told, indent=1))
    common.say(json.dumps({e: told[e] for e in ("local=2", "ray=2", "dask=2")}))


@dataclass(frozen=True, slots=True)
class Cluster:
    """What the simulation knows of machines.

    Each node does `slots` tasks at once, a core each, at the speed of the machine that recorded; every twentieth node has a
    third of it. Storage is shared: tasks that read and write get equal parts of `storage` bytes a second, but no more than
    they can use. One driver starts a task every `dispatch` seconds. One task in a hundred dies half-way and starts again.
    Left out: the network of a node, caches, storage that slows down under many readers, nodes that join or leave.
    """

    nodes: int
    slots: int = 8
    storage: float = 10e9
    dispatch: float = 0.005
    slow: int = 20
    dies: float = 0.01


@dataclass(slots=True)
class Task:
    """`size` bytes; bytes of storage traffic for each, CPU seconds for each, the task before it."""

    size: float
    traffic: float
    cost: float
    base: int | None


def workload(told: dict[str, Any], count: int, *, cheap: bool = False, seed: int = 1) -> list[Task]:
    """Return models of 0.1 to 60 GB: 4 % are bases, 30 % stand alone, the others belong to a family; a few of these are large.

    `cheap`: a fine-tune costs twice what its base does, whatever was recorded.
    """
    rng = random.Random(seed)
    cost, ratio = {}, {}
    for leans in (False, True):
        mine = [t for t in told["tasks"] if t["leans"] == leans]
        cost[leans] = statistics.median(t["seconds"] / t["bytes_in"] for t in mine)
        ratio[leans] = statistics.median(t["bytes_out"] / t["bytes_in"] for t in mine)

    if cheap:
        cost[True] = 2 * cost[False]

    def size() -> float:
        return min(60e9, max(0.1e9, rng.lognormvariate(21.3, 1.4)))

    tasks = [Task(size(), 1 + ratio[False], cost[False], None) for _ in range(count * 34 // 100)]
    heads = list(range(count * 4 // 100))
    weights = [1 / (k + 1) for k in heads]
    while len(tasks) < count:
        base = rng.choices(heads, weights)[0]
        if rng.random() < 0.2:  # of a fine-tune
            tuned = [i for i in range(count * 34 // 100, len(tasks)) if tasks[i].base == base]
            base = rng.choice(tuned) if tuned else base
        tasks.append(Task(tasks[base].size, 1 + ratio[True] + ratio[False], cost[True], base))
    return tasks


def simulate(tasks: list[Task], cluster: Cluster, *, waves: bool = False, by_size: bool = True, seed: int = 2) -> float:
    """Return the seconds until all is packed. `waves`: nothing starts before all of the level above is done."""
    rng = random.Random(seed)
    waiting: dict[int, list[int]] = {}
    for i, task in enumerate(tasks):
        if task.base is not None:
            waiting.setdefault(task.base, []).append(i)
    depth = [0] * len(tasks)
    weight = [task.size for task in tasks]
    for i, task in enumerate(tasks):  # bases come first
        depth[i] = 0 if task.base is None else depth[task.base] + 1
    for i in reversed(range(len(tasks))):
        base = tasks[i].base
        if base is not None:
            weight[base] += weight[i]
    ready = [(-weight[i] if by_size else i, i) for i, task in enumerate(tasks) if task.base is None]
    heapq.heapify(ready)
    held: list[int] = []  # freed, of the next wave
    total = cluster.nodes * cluster.slots
    free = [node % cluster.slow == cluster.slow - 1 for node in range(cluster.nodes) for _ in range(cluster.slots)]
    free.sort(reverse=True)  # fast ones are taken from the end
    ids = np.full(total, -1)
    left, rate_cap, traffic, slow = np.zeros(total), np.zeros(total), np.ones(total), np.zeros(total, bool)
    places = list(range(total))
    level = now = next_start = 0.0
    remaining = [sum(d == k for d in depth) for k in range(max(depth) + 1)]
    while ready or held or len(places) < total:
        while ready and places and next_start <= now:
            _, i = heapq.heappop(ready)
            place = places.pop()
            slow[place] = free.pop()
            ids[place], traffic[place] = i, tasks[i].traffic
            left[place] = tasks[i].size * (1.5 if rng.random() < cluster.dies else 1)
            rate_cap[place] = 1 / tasks[i].cost / (3 if slow[place] else 1)
            next_start = now + cluster.dispatch
        busy = ids >= 0
        rate = np.zeros(total)
        rate[busy] = share(rate_cap[busy] * traffic[busy], cluster.storage) / traffic[busy]
        ends = np.where(busy, left / np.maximum(rate, 1e-9), np.inf)
        step = float(ends.min())
        if ready and places:
            step = min(step, next_start - now)
        left -= rate * step
        now += step
        for place in np.flatnonzero(busy & (ends <= step * (1 + 1e-12))):
            i = int(ids[place])
            ids[place] = -1
            places.append(int(place))
            free.append(bool(slow[place]))
            free.sort(reverse=True)
            remaining[depth[i]] -= 1
            for child in waiting.get(i, ()):
                if waves:
                    held.append(child)
                else:
                    heapq.heappush(ready, (-weight[child] if by_size else child, child))
        while waves and held and level < len(remaining) and not remaining[int(level)]:
            level += 1
            for child in [c for c in held if depth[c] == level]:
                held.remove(child)
                heapq.heappush(ready, (-weight[child] if by_size else child, child))
    return now


def share(wanted: "np.ndarray", most: float) -> "np.ndarray":
    """Return what each gets of `most`: equal parts, but no more than it wants."""
    if wanted.sum() <= most:
        return wanted
    order = np.sort(wanted)
    left = most - np.concatenate([[0.0], np.cumsum(order)[:-1]])
    part = left / np.arange(order.size, 0, -1)
    level = part[np.flatnonzero(part <= order)[0]]
    return np.minimum(wanted, level)


def bounds(tasks: list[Task], cluster: Cluster) -> tuple[float, float, float]:
    """Return the seconds below which nothing goes: of all cores together, of the storage, of the longest chain of bases."""
    slow = cluster.nodes // cluster.slow
    cores = cluster.slots * (cluster.nodes - slow + slow / 3)
    longest = [0.0] * len(tasks)
    for i, task in enumerate(tasks):
        longest[i] = task.size * task.cost + (0.0 if task.base is None else longest[task.base])
    storage = sum(t.size * t.traffic for t in tasks) / cluster.storage
    return sum(t.size * t.cost for t in tasks) / cores, storage, max(longest)


def play(times: Path, csv: Path | None, doc: Path | None) -> None:
    told = json.loads(times.read_text())
    rows: list[list[Any]] = []
    for what, cheap in (("as recorded", False), ("twice a base", True)):
        tasks = workload(told, 1000, cheap=cheap)
        size, largest = sum(t.size for t in tasks) / 1e12, max(t.size for t in tasks) / 1e9
        common.say(f"{len(tasks)} models, {size:.2f} TB, the largest {largest:.0f} GB")
        one = simulate(tasks, Cluster(1, dispatch=told["ray=2"]))
        for nodes in (1, 4, 16, 64, 256):
            cluster = Cluster(nodes, dispatch=told["ray=2"])
            took = simulate(tasks, cluster)
            compute, storage, chain = bounds(tasks, cluster)
            limit = max((compute, "cores"), (storage, "storage"), (chain, "longest chain"))[1]
            others = (simulate(tasks, replace(cluster, storage=40e9)), simulate(tasks, cluster, waves=True))
            rows.append([
                what, nodes, f"{took / 60:.1f}", f"{one / took:.1f}", limit,
                *(f"{s / 60:.1f}" for s in (compute, storage, chain, *others)),
            ])  # fmt: skip
    columns = [
        "a fine-tune costs", ">nodes", ">minutes", ">times one node", "bound", ">cores alone", ">storage alone",
        ">longest chain alone", ">storage 40 GB/s", ">in waves",
    ]  # fmt: skip
    finish("hub", columns, rows, csv, doc)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("make")
    verb.add_argument("minilm", type=Path)
    verb.add_argument("folder", type=Path)
    verb.add_argument("--steps", type=int, default=24)
    verb = verbs.add_parser("family")
    verb.add_argument("folder", type=Path)
    verb.add_argument("--level", default="default")
    out = [verb]
    verb = verbs.add_parser("record")
    verb.add_argument("folder", type=Path)
    verb.add_argument("times", type=Path)
    verb = verbs.add_parser("simulate")
    verb.add_argument("times", type=Path)
    for one in (*out, verb):
        one.add_argument("--csv", type=Path)
        one.add_argument("--doc", type=Path, help="a document whose section gets the table")
    a = parser.parse_args()
    if a.verb == "make":
        make(a.minilm, a.folder, a.steps)
    elif a.verb == "family":
        family(a.folder, a.level, a.csv, a.doc)
    elif a.verb == "record":
        record(a.folder, a.times)
    else:
        play(a.times, a.csv, a.doc)


if __name__ == "__main__":
    main()
