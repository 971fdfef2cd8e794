"""What a second thread brings: in memory, and from file to file.

    python bench/threads.py SCRATCH [--mb 500] [--threads 2] [--repeat 5] [--csv OUT] [--doc DOCUMENT.md]

Synthetic bfloat16 weights (data.py). In memory: `tzip.encode` (prove=False, with out=) and `tzip.decode` (with out=)
with 1 and with N threads, turn and turn about; the clock is the wall's. "gain" is the ratio of the best times, "(median)"
the median of the ratios within the rounds, "serial" the fraction of the work that by Amdahl's law runs on one thread alone
(from the best; 1 is no gain at all). "N processes" are so many processes at once that share nothing, with one thread each
and all their bytes counted: what the machine's cores and memory give at most (its cores may be two threads of one).

File to file: `tzip.pack` and `tzip.unpack` in SCRATCH (a memory file system, so that no disk is measured; in this process,
started already, every chunk proven as always) with N threads, with and without SHA-256, and beside them a plain write() of
as many bytes there by one thread and by N: what the system itself takes to find pages. "(command)" is the same as a
command, with the start of Python.
"""

import argparse
import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

HERE = Path(__file__).parent
TARGETS = {"gain": 1.8, "unpack": 2.5, "pack": 0.8}


def in_memory(file: Path, threads: int, repeat: int) -> list[dict[str, Any]]:
    """Return a row for each level and direction."""
    import ml_dtypes
    import numpy as np

    import tzip

    raw = np.frombuffer(common.load_by_dtype(file)[0]["BF16"], ml_dtypes.bfloat16)
    out, room = np.ones_like(raw), np.ones(raw.nbytes + raw.nbytes // 1000 + 8192, np.uint8)
    rows = []
    for level in ("fast", "default", "best"):
        took: dict[tuple[str, int], list[float]] = {}
        for number in range(repeat + 1):
            for count in (1, threads):
                seconds, packed = common.timed(
                    lambda: tzip.encode(raw, level=level, threads=count, prove=False, out=room)  # noqa: B023
                )
                again, _ = common.timed(lambda: tzip.decode(packed, out, threads=count))  # noqa: B023
                if number:  # the first is warm-up
                    took.setdefault(("encode", count), []).append(seconds)
                    took.setdefault(("decode", count), []).append(again)
                if not np.array_equal(out.view(np.uint16), raw.view(np.uint16)):
                    raise SystemExit("WRONG BYTES")
        for what in ("encode", "decode"):
            one, many = took[what, 1], took[what, threads]
            gain = min(one) / min(many)
            rows.append(
                {
                    "what": f"{what} {level}", "threads": threads, "bytes": raw.nbytes,
                    "one": f"{raw.nbytes / min(one) / 1e9:.3f}", "many": f"{raw.nbytes / min(many) / 1e9:.3f}",
                    "gain": f"{gain:.2f}",
                    "gain_median": f"{common.median([x / y for x, y in zip(one, many, strict=True)]):.2f}",
                    "serial": f"{min(1.0, max(0.0, (threads / gain - 1) / (threads - 1))):.3f}", "target": TARGETS["gain"],
                }
            )  # fmt: skip
    return rows


def alone(file: str, repeat: int) -> None:
    """Encode and decode with one thread, when told to; print the medians of the seconds."""
    import ml_dtypes
    import numpy as np

    import tzip

    raw = np.frombuffer(common.load_by_dtype(file)[0]["BF16"], ml_dtypes.bfloat16)
    out, room = np.ones_like(raw), np.ones(raw.nbytes + raw.nbytes // 1000 + 8192, np.uint8)
    packed = tzip.encode(raw, prove=False, out=room)
    tzip.decode(packed, out)
    print("ready", flush=True)
    for word in sys.stdin:
        run = {"encode": lambda: tzip.encode(raw, prove=False, out=room), "decode": lambda: tzip.decode(packed, out)}
        seconds = [common.timed(run[word.strip()])[0] for _ in range(repeat)]
        print(common.median(seconds), flush=True)


def processes(file: Path, count: int, repeat: int) -> list[dict[str, Any]]:
    """Return rows for that many processes that have nothing in common but the machine."""
    call = [sys.executable, os.path.abspath(__file__), "--alone", str(file), str(repeat)]
    running = [subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    for p in running:
        p.stdout.readline()

    def told(some: list[Any], word: str) -> float:
        for p in some:
            p.stdin.write(word + "\n")
            p.stdin.flush()
        return max([float(p.stdout.readline()) for p in some])

    size, rows = file.stat().st_size, []
    for what in ("encode", "decode"):
        rounds = [(told(running[:1], what), told(running, what)) for _ in range(3)]
        one, many = min(r[0] for r in rounds), min(r[1] for r in rounds)
        gains = [count * x / y for x, y in rounds]
        rows.append(
            {
                "what": f"{what} default, {count} processes", "threads": count, "bytes": size,
                "one": f"{size / one / 1e9:.3f}", "many": f"{count * size / many / 1e9:.3f}",
                "gain": f"{count * one / many:.2f}", "gain_median": f"{common.median(gains):.2f}", "serial": "", "target": "",
            }
        )  # fmt: skip
    for p in running:
        p.communicate()
    return rows


def plain_write(scratch: Path, size: int, threads: int) -> None:
    """Write that many bytes, 8 MB a call, each thread its part of one new file."""
    block = bytes(8_000_000)
    path = scratch / "plain"

    def part(begin: int, end: int) -> None:
        while begin < end:
            begin += os.pwrite(fd, block[: end - begin], begin)

    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        step = -(-size // threads)
        workers = [threading.Thread(target=part, args=(b, min(b + step, size))) for b in range(0, size, step)]
        for w in workers:
            w.start()
        for w in workers:
            w.join()
    finally:
        os.close(fd)


def file_to_file(file: Path, scratch: Path, threads: int, repeat: int) -> list[dict[str, Any]]:
    """Return a row for each way of packing and unpacking."""
    import tzip

    size = file.stat().st_size
    archive, bare, back = scratch / "whole.tzip", scratch / "bare.tzip", scratch / "back"
    cli = [sys.executable, "-m", "tzip.cli"]
    count = str(threads)

    def command(*arguments: str) -> None:
        subprocess.run([*cli, *arguments], check=True, stdout=subprocess.DEVNULL)

    ways: dict[str, tuple[Callable[[], Any], float | str]] = {
        "write(), 1 thread": (lambda: plain_write(scratch, size, 1), ""),
        f"write(), {threads} threads": (lambda: plain_write(scratch, size, threads), ""),
        "pack": (lambda: tzip.pack(file, archive, threads=threads), TARGETS["pack"]),
        "pack, no SHA-256": (lambda: tzip.pack(file, bare, threads=threads, sha256=False), TARGETS["pack"]),
        "unpack": (lambda: tzip.unpack(archive, back, threads=threads), TARGETS["unpack"]),
        "unpack, no SHA-256": (lambda: tzip.unpack(bare, back, threads=threads), TARGETS["unpack"]),
        "pack --no-sha256 (command)": (
            lambda: command("pack", "-q", "-t", count, "--no-sha256", str(file), "-o", str(bare)),
            TARGETS["pack"],
        ),
        "unpack (command, no SHA-256)": (
            lambda: command("unpack", "-q", "-t", count, str(bare), "-o", str(back)),
            TARGETS["unpack"],
        ),
    }
    took: dict[str, list[float]] = {}
    for number in range(repeat + 1):
        for way, (run, _) in ways.items():
            if way.startswith("pack"):
                (archive if way == "pack" else bare).unlink(missing_ok=True)
            seconds, _ = common.timed(run)
            if number:
                took.setdefault(way, []).append(seconds)
            if way.startswith("unpack"):
                if not number and not filecmp.cmp(file, back / file.name, shallow=False):
                    raise SystemExit("WRONG BYTES")
                shutil.rmtree(back)
            (scratch / "plain").unlink(missing_ok=True)
    return [
        {
            "what": way, "threads": threads, "bytes": size, "one": "", "many": f"{size / min(s) / 1e9:.3f}", "gain": "",
            "gain_median": f"{size / common.median(s) / 1e9:.3f}", "serial": "", "target": ways[way][1],
        }
        for way, s in took.items()
    ]  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["--alone"]:
        alone(sys.argv[2], int(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path, help="a folder in a memory file system")
    parser.add_argument("--mb", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--doc", type=Path, help="a document whose section `threads` gets the tables")
    a = parser.parse_args()
    import tzip

    tzip.warm_up(dtypes=["BF16"])
    with tempfile.TemporaryDirectory(dir=a.scratch) as folder:
        file = Path(folder) / "synthetic.safetensors"
        make = [sys.executable, str(HERE / "data.py"), "synthetic", str(file), "--mb", str(a.mb), "--dtype", "bf16"]
        subprocess.run(make, check=True)
        memory = in_memory(file, a.threads, a.repeat)
        memory += processes(file, a.threads, a.repeat)
        files = file_to_file(file, Path(folder), a.threads, a.repeat)
    rows = [common.facts() | r for r in memory + files]
    fields = ("what", "one", "many", "gain", "gain_median", "serial", "target")
    columns = ("in memory", ">1 thread, GB/s", f">{a.threads} threads, GB/s", ">gain", ">(median)", ">serial", ">target")
    text = common.markdown(columns, ([r[f] for f in fields] for r in memory)) + "\n"
    columns = ("file to file", ">GB/s", ">(median)", ">target")
    text += common.markdown(columns, ([r["what"], r["many"], r["gain_median"], r["target"]] for r in files))
    text += f"\n{a.threads} threads. " + common.stamp(common.command_line("threads.py"))
    print(text)
    if a.csv:
        common.write_csv(a.csv, rows)
    if a.doc:
        common.replace_section(a.doc, "threads", text)


if __name__ == "__main__":
    main()
