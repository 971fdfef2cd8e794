"""The damage campaign: many damaged and lying archives, each of which must give an error or exactly the right bytes.

    python bench/damage.py --cases 100000 --processes 2 --json damage.json

Case number i is made from seed i alone, so a range can be run again (`--start`), and every bad case is printed with its
number. A worker that dies (a segmentation fault, say) is counted, its case is named, and the campaign goes on behind it.

Counted are: errors (a TzipError, as it should be), right (the damage did not touch what was read), and what must be 0: wrong
(bytes that are not the original's, without an error), other (any other exception), left (a file on disk after a refused unpack,
or one that is wrong after recover), crashed (the worker died) and hung (no answer in 60 s).
"""

import argparse
import contextlib
import json
import multiprocessing as mp
import shutil
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import forge

HANGS = 60.0  # seconds without an answer
KINDS = (
    "flip",
    "burst",
    "zeros",
    "cut",
    "front",
    "delete",
    "insert",
    "swap",
    "chunk",
    "chunk field",
    "index",
    "member",
    "table",
)
Sample = tuple[bytes, dict[str, bytes], dict[str, bytes]]


def damage(data: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """Return the kind of damage and the damaged archive. The last kinds lie: all their checks are right."""
    kind = str(rng.choice(KINDS))
    size = len(data)
    out = bytearray(data)
    at = int(rng.integers(size))
    n = int(rng.integers(1, 200))
    if kind == "flip":
        for _ in range(int(rng.integers(1, 4))):
            out[int(rng.integers(size))] ^= int(rng.integers(1, 256))
    elif kind == "burst":
        out[at : at + n] = rng.bytes(len(out[at : at + n]))
    elif kind == "zeros":
        out[at : at + n] = bytes(len(out[at : at + n]))
    elif kind == "cut":
        del out[at:]
    elif kind == "front":
        del out[:at]
    elif kind == "delete":
        del out[at : at + n]
    elif kind == "insert":
        out[at:at] = rng.bytes(n)
    elif kind == "swap":
        other = int(rng.integers(size))
        n = min(n, size - max(at, other))
        out[at : at + n], out[other : other + n] = data[other : other + n], data[at : at + n]
    else:
        return kind, _lie(kind, data, rng)
    return kind, bytes(out)


def _lie(kind: str, data: bytes, rng: np.random.Generator) -> bytes:
    forged = forge.Forged(data)
    chunks = forged.chunks()
    if kind in ("chunk", "chunk field") and chunks:
        i = chunks[int(rng.integers(len(chunks)))]
        record = bytearray(forged.records[i][1])
        for _ in range(int(rng.integers(1, 3))):
            high = len(record) if kind == "chunk" else min(len(record), 240)
            at = int(rng.integers(16, high))
            record[at] = int(rng.choice([record[at] ^ (1 << int(rng.integers(8))), 0, 255, int(rng.integers(256))]))
        forged.records[i][1] = forge.reseal(bytes(record))
        return forged.build()
    members = forged.members()
    which = int(rng.integers(len(members)))
    names = [n for _, n, _ in forge.COLUMNS if forged.index[n].size and n != "m_sha"]
    if kind == "table":
        names = [n for n in names if n.startswith("c_") or n == "m_record"]
    name = str(rng.choice(names or ["m_size"]))
    value = _number(rng)

    def put(cat: forge.Cat, i: int) -> None:
        column = cat[name]
        old = int(column[i])
        new = [value, old + 1, old - 1, old ^ (1 << int(rng.integers(8 * column.itemsize))), old * 2][int(rng.integers(5))]
        column[i] = np.array(new & ((1 << 64) - 1), np.uint64).astype(column.dtype)

    if kind == "member" and members[which][name].size:
        i = int(rng.integers(members[which][name].size))
        put(members[which], i)
        if rng.random() < 0.7:  # index and record agree
            before = sum(m[name].size for m in members[:which])
            forged.index[name][before + i] = members[which][name][i]
        return forged.build()
    return forged.build(lambda index: put(index, int(rng.integers(index[name].size))))


def _number(rng: np.random.Generator) -> int:
    """Return a number that lies well."""
    return int(
        rng.choice(np.array([0, 1, 2, 255, 1 << 16, 1 << 20, (1 << 20) + 1, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 60], "u8"))
    )


def judge(case: int, samples: dict[str, Sample], folder: Path) -> tuple[str, str]:
    """Return (kind of damage, outcome) of a case."""
    rng = np.random.default_rng(case)
    data, files, tensors = samples[str(rng.choice(sorted(samples)))]
    kind, damaged = damage(data, rng)
    try:
        return kind, _use(damaged, data, files, tensors, folder, case)
    except Exception as e:  # this is what is counted
        return kind, f"other: {type(e).__name__}: {e}"[:200]


def _use(damaged: bytes, data: bytes, files: dict[str, bytes], tensors: dict[str, bytes], folder: Path, case: int) -> str:
    import tzip

    failed = 0
    try:
        archive = tzip.open(damaged)
    except tzip.TzipError:
        failed += 1
    else:
        with archive:
            for names, read in (
                (files, archive.member_bytes),
                (tensors, lambda name: archive.tensor(name).raw().tobytes()),
            ):
                for name, raw in names.items():
                    try:
                        if read(name) != raw:
                            # A lie about what the archive holds is no damage: then its own SHA-256 and sums say the same.
                            proven = names is files and archive.members()[archive.member_row(name)].sha256
                            return "wrong" if proven or _same_index(damaged, data) else "another"
                    except tzip.TzipError:
                        failed += 1
            with contextlib.suppress(tzip.TzipError):
                archive.tensors()
                archive.members()
    if case % 2 == 0:
        with contextlib.suppress(tzip.TzipError):
            tzip.verify(damaged, deep=case % 4 == 0, threads=1)
    if case % 5 == 0:
        left = _on_disk(damaged, files, folder)
        if left:
            return left
    return "error" if failed else "right"


def _same_index(damaged: bytes, data: bytes) -> bool:
    """Say whether the damaged archive claims to be the original: the same archive id in its footer."""
    return damaged[-56:-24] == data[-56:-24]


def _on_disk(damaged: bytes, files: dict[str, bytes], folder: Path) -> str:
    import tzip

    out, saved = folder / "out", folder / "saved"
    try:
        try:
            tzip.unpack(damaged, out, threads=1)
        except (tzip.TzipError, OSError) as e:
            # Members before the damaged one are whole; OSError: a name too long for this system, for one.
            for path in out.rglob("*") if out.exists() else ():
                name = path.relative_to(out).as_posix()
                if path.is_file() and not path.is_symlink() and files.get(name) != path.read_bytes():
                    return f"left: {name} after {type(e).__name__}"
        try:
            report = tzip.recover(damaged, saved, threads=1)
        except tzip.TzipError:
            return ""
        for name in report.whole:
            if name in files and (saved / name).read_bytes() != files[name]:
                return f"left: recover says that {name} is whole, and it is not"
    finally:
        for path in (out, saved):
            shutil.rmtree(path, ignore_errors=True)
    return ""


def _worker(pipe: Connection, start: int, stop: int, step: int, base: Path) -> None:
    folder = Path(tempfile.mkdtemp(dir=base))
    samples = forge.small_archives(folder)
    for case in range(start, stop, step):
        pipe.send((case, None))
        pipe.send((case, judge(case, samples, folder)))
    pipe.send((stop, ("", "end")))


def campaign(start: int, cases: int, processes: int, quiet: bool = False) -> dict[str, Any]:
    """Run the cases; return counts by outcome and kind, and the bad cases."""
    counts: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    bad: list[tuple[int, str, str]] = []
    context = mp.get_context("spawn")
    began = told = time.perf_counter()
    with tempfile.TemporaryDirectory() as base:

        def launch(at: int) -> list[Any]:
            ours, theirs = context.Pipe(duplex=False)
            child = context.Process(target=_worker, args=(theirs, at, start + cases, processes, Path(base)))
            child.start()
            theirs.close()
            return [child, ours, at - processes, time.monotonic()]

        workers = [launch(start + i) for i in range(processes)]
        while workers:
            for worker in list(workers):
                child, pipe, case, since = worker
                try:
                    if not pipe.poll(0.05 if len(workers) == 1 else 0.005):
                        if time.monotonic() - since < HANGS or case < start:
                            continue
                        child.kill()
                        result: tuple[str, str] | None = ("", "hung")
                    else:
                        case, result = pipe.recv()
                        worker[2:] = [case, time.monotonic()]
                        for _ in range(500):
                            if result is None or result[1] == "end" or not pipe.poll():
                                break
                            _count(counts, kinds, bad, case, result)
                            case, result = pipe.recv()
                            worker[2:] = [case, time.monotonic()]
                        if result is None:
                            continue
                except EOFError:
                    child.join()
                    result = ("", f"crashed: exit code {child.exitcode}")
                if result[1] == "end":
                    child.join()
                    workers.remove(worker)
                    continue
                _count(counts, kinds, bad, case, result)
                if result[1].startswith(("crashed", "hung")):
                    workers.remove(worker)
                    child.join()
                    if case + processes < start + cases and case >= start:
                        workers.append(launch(case + processes))
            if not quiet and time.perf_counter() - told > 10:
                told = time.perf_counter()
                done = sum(counts.values())
                print(f"{done} cases, {done / (told - began):.0f}/s, {dict(counts)}", flush=True)
    seconds = time.perf_counter() - began
    total = sum(counts.values())
    return {
        "start": start,
        "cases": total,
        "seconds": round(seconds, 1),
        "per_second": round(total / seconds, 1),
        "outcomes": dict(counts),
        "kinds": dict(sorted(kinds.items())),
        "bad": bad[:200],
    }


def _count(
    counts: Counter[str], kinds: Counter[str], bad: list[tuple[int, str, str]], case: int, result: tuple[str, str]
) -> None:
    kind, outcome = result
    counts[outcome.split(":")[0]] += 1
    kinds[kind] += 1
    if outcome not in ("error", "right", "another"):
        bad.append((case, kind, outcome))
        print(f"case {case} ({kind}): {outcome}", flush=True)


def main() -> int:
    """Run from the command line; the exit code is 1 when anything bad was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", help="write the counts here")
    parser.add_argument("--quiet", action="store_true")
    arguments = parser.parse_args()
    result = campaign(arguments.start, arguments.cases, arguments.processes, arguments.quiet)
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.json:
        Path(arguments.json).write_text(text + "\n")
    return int(bool(result["bad"]))


if __name__ == "__main__":
    raise SystemExit(main())
