"""The store of training runs: sizes of a real run, speeds, stalls, memory, ten thousand checkpoints, object stores.

    python bench/store.py sizes RUN [--max-chain 16 4 1]
    python bench/store.py speed FOLDER [--mb 1000] [--steps 4]
    python bench/store.py many FOLDER [--checkpoints 10000]
    python bench/store.py sharded FOLDER
    python bench/store.py cloud FOLDER [--mb 200] [--rate 100]

RUN holds checkpoints of a training loop, stepNNNNN.safetensors and bf16_stepNNNNN.safetensors. FOLDER lies on a memory-backed
file system, so that speeds are tzip's and not a disk's. "sharded": torch's distributed checkpoints beside the stock writer's
with its ZStandard extension. "cloud": moto's server behind a link of so many MB/s, both of them Python on the same processors:
what the link could do beside them is measured, too. `--csv OUT` writes a line for each figure.
"""

import argparse
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import common
import numpy as np

import tzip

FIGURES = common.Figures()
say, fresh = FIGURES.say, common.fresh


def states(run: Path, prefix: str) -> list[tuple[int, dict[str, Any]]]:
    """Return (step, tensors) of every checkpoint of a run, bits as numpy arrays."""
    import ml_dtypes  # noqa: F401
    from safetensors.numpy import load_file

    return [(int(p.stem[-5:]), load_file(p)) for p in sorted(run.glob(f"{prefix}*.safetensors"))]


def sizes(run: Path, chains: list[int], scratch: Path) -> None:
    """Every checkpoint of a run, one after another; the last two are one step apart each."""
    for name, prefix in (("float32 state", "step"), ("bfloat16 weights", "bf16_step")):
        for chain in chains:
            reports = []
            with tzip.Store(fresh(scratch / "sizes"), max_chain=chain) as store:
                for step, state in states(run, prefix):
                    reports.append(store.save(step, state))
                raw, stored = sum(r.raw for r in reports), sum(r.stored for r in reports)
                say(f"{name}, all {len(reports)} checkpoints, max_chain {chain}", 100 * stored / raw, "% of raw")
                for r in reports[-2:]:
                    say(f"{name}, step {r.step}, max_chain {chain}", 100 * r.stored / r.raw, "% of raw")
                start = time.perf_counter()
                store.load()
                took = time.perf_counter() - start
                say(f"{name}, restore of the last, max_chain {chain}", reports[-1].raw / took / 1e9, "GB/s")
    shutil.rmtree(scratch / "sizes")


def synthetic(mb: int, seed: int, dtype: str) -> dict[str, Any]:
    """Return layered normal weights with real scales, no repeats, as a state."""
    import torch

    rng = np.random.default_rng(seed)
    width = 4 if dtype == "float32" else 2
    layers = max(1, mb * 1_000_000 // (2048 * 2048 * width))
    out = {}
    for i in range(layers):
        w = rng.standard_normal((2048, 2048), np.float32) * np.float32(0.02 * 2 ** (i % 5 - 2))
        out[f"layers.{i}.weight"] = torch.from_numpy(w).to(getattr(torch, dtype))
    return out


def stepped(state: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return the weights after a small step: about a hundredth of a standard deviation."""
    import torch

    torch.manual_seed(seed)
    return {k: (v.float() + 0.01 * v.float().std() * torch.randn(v.shape)).to(v.dtype) for k, v in state.items()}


def speed(scratch: Path, mb: int, steps: int) -> None:
    """Saves of a synthetic state, with and without differences; stalls of saves in the background; restores."""
    for dtype in ("bfloat16", "float32"):
        chain = [synthetic(mb, 1, dtype)]
        for i in range(1, steps):
            chain.append(stepped(chain[-1], i))
        size = sum(v.numel() * v.element_size() for v in chain[0].values())
        for label, longest in (("full", 1), ("differences", 16)):
            with tzip.Store(fresh(scratch / "speed"), max_chain=longest) as store:
                took = []
                for i, state in enumerate(chain):
                    start = time.perf_counter()
                    report = store.save(i, state)
                    took.append(time.perf_counter() - start)
                assert report is not None
                say(f"{dtype}: save, {label}, size", 100 * report.stored / size, "% of raw")
                say(f"{dtype}: save, {label}, two cores", size / min(took[1:]) / 1e9, "GB/s")
                start = time.perf_counter()
                store.load()
                rate = size / (time.perf_counter() - start) / 1e9
                say(f"{dtype}: restore, {label}, chain {1 if longest == 1 else steps}", rate, "GB/s")
        copies, stalls = [], []
        with tzip.Store(fresh(scratch / "speed")) as store:
            for i, state in enumerate(chain):
                store.wait()
                start = time.perf_counter()
                copied = {k: v.clone() for k, v in state.items()}
                copies.append(time.perf_counter() - start)
                del copied
                start = time.perf_counter()
                store.save(i, state, block=False)
                stalls.append(time.perf_counter() - start)
                store.wait()
        ratio = statistics.median(s / c for s, c in zip(stalls, copies, strict=True))
        say(f"{dtype}: stall of save(block=False), x a copy, median", ratio, "x")
    shutil.rmtree(scratch / "speed")


def many(scratch: Path, checkpoints: int) -> None:
    """Tiny checkpoints: what the list of them costs."""
    state = {"w": np.arange(64, dtype=np.float32)}
    with tzip.Store(fresh(scratch / "many"), threads=1) as store:
        took = []
        for i in range(checkpoints):
            state["w"][i % 64] += 1
            start = time.perf_counter()
            store.save(i, state)
            took.append(time.perf_counter() - start)
        say("save, the first ten, median", 1000 * statistics.median(took[1:11]), "ms")
        say(f"save, the last hundred of {checkpoints}, median", 1000 * statistics.median(took[-100:]), "ms")
        start = time.perf_counter()
        n = sum(1 for _ in store.log())
        say(f"log of {n}", time.perf_counter() - start, "s")
    shutil.rmtree(scratch / "many")


def sharded(scratch: Path, mb: int) -> None:
    """One rank; bytes of a checkpoint beside the stock writer's."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint._extension import ZStandard

    from tzip.torch_dcp import StorageWriter

    state = synthetic(mb, 1, "bfloat16")
    size = sum(v.numel() * v.element_size() for v in state.values())
    dcp.save(state, storage_writer=StorageWriter(fresh(scratch / "tzip"), step=1), no_dist=True)
    stock = dcp.FileSystemWriter(fresh(scratch / "stock"), _extensions=[ZStandard()])
    dcp.save(state, storage_writer=stock, no_dist=True)
    ours, theirs = (sum(p.stat().st_size for p in (scratch / n).rglob("*") if p.is_file()) for n in ("tzip", "stock"))
    say("sharded: tzip", 100 * ours / size, "% of raw")
    say("sharded: stock with ZStandard", 100 * theirs / size, "% of raw")
    say("sharded: tzip / stock", ours / theirs, "x")


def cloud(mb: int, rate: float) -> None:
    """An object store behind a link: saves against the bare upload of the same bytes, and loads of half of all rows."""
    import logging
    import os
    import sys
    import tempfile

    import fsspec
    from moto.server import ThreadedMotoServer

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from fault_proxy import Proxy

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    first = {k: v.view(2 * v.shape[0], -1) for k, v in synthetic(mb, 1, "bfloat16").items()}
    states = [first, stepped(first, 2)]
    size = sum(v.numel() * 2 for v in first.values())
    packed: list[int] = []
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with Proxy(server.get_host_and_port()[1], rate=rate * 1e6) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.url
        files = fsspec.filesystem("s3", use_listings_cache=False)
        files.mkdir("runs")
        tzip.Store("memory://warm").save(0, {"w": first["layers.0.weight"]})  # compiles
        with tzip.Store("s3://runs/1") as store:
            for step, label in ((0, "full"), (1, "differences")):
                proxy.well()
                start = time.perf_counter()
                report = store.save(step, states[step])
                took = time.perf_counter() - start
                assert report is not None
                packed.append(report.stored)
                sent = sum(q.moved for q in proxy.requests)
                say(f"cloud: save, {label}, bytes moved", 100 * sent / report.stored, "% of the packed ones")
                say(f"cloud: save, {label}, packed", report.stored / 1e6, "MB")
                say(f"cloud: save, {label}, requests", len(proxy.requests), "")
                with tempfile.NamedTemporaryFile() as bare:
                    bare.write(os.urandom(report.stored))
                    bare.flush()
                    start = time.perf_counter()
                    files.put_file(bare.name, f"runs/bare{step}", **store.backend._service.upload_options(report.stored))
                    alone = time.perf_counter() - start
                say(f"cloud: save, {label}, of the bare upload's speed", alone / took, "x")
                say(f"cloud: bare upload, of {rate:g} MB/s", report.stored / alone / rate / 1e6, "x")
        for step, label in ((0, "full"), (1, "differences")):
            with tzip.Store("s3://runs/1", create=False).open(step) as checkpoint:
                checkpoint[next(iter(first))]  # opens the archives
                proxy.well()
                most = 0.0
                for key, tensor in first.items():
                    before = len(proxy.requests)
                    checkpoint.tensor(key)[: tensor.shape[0] // 2]
                    now = proxy.requests[before:]
                    most = max(most, len(now) / (1 + sum(q.moved for q in now) / (8 << 20)))
                moved = sum(q.moved for q in proxy.requests)
            say(f"cloud: half of the rows, {label}, bytes moved", 100 * moved / sum(packed[: step + 1]), "% of the archives")
            say(f"cloud: half of the rows, {label}, requests", len(proxy.requests) / len(first), "a tensor")
            say(f"cloud: half of the rows, {label}, requests / (1 + bytes / 8 MiB), most", most, "")
        start = time.perf_counter()
        tzip.Store("s3://runs/1", create=False).load(0)
        say("cloud: load of all, full", size / 1e6 / (time.perf_counter() - start), "MB/s of state")
    server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sizes", "speed", "many", "sharded", "cloud"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--max-chain", type=int, nargs="+", default=[16])
    parser.add_argument("--mb", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=100.0)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--checkpoints", type=int, default=10000)
    parser.add_argument("--scratch", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    scratch = args.scratch if args.what == "sizes" else args.folder
    scratch.mkdir(parents=True, exist_ok=True)
    if args.what == "sizes":
        sizes(args.folder, args.max_chain, scratch)
    elif args.what == "speed":
        speed(scratch, args.mb, args.steps)
    elif args.what == "many":
        many(scratch, args.checkpoints)
    elif args.what == "sharded":
        sharded(scratch, args.mb)
    else:
        cloud(args.mb, args.rate)
    if args.csv:
        common.write_csv(args.csv, [{**common.facts(), "what": w, "value": round(v, 4), "unit": u} for w, v, u in FIGURES.rows])


if __name__ == "__main__":
    main()
