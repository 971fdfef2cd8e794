"""The first run after an install: `tzip pack` and `unpack` as commands when no kernel is compiled yet, and later.

    python bench/cold.py FILE SCRATCH [--repeat 3] [--csv OUT] [--doc DOCUMENT.md]

"cold" has an empty NUMBA_CACHE_DIR, a new one for each run; "warm" the one that a cold run filled; "two at once" are two
processes that start together with one empty cache. "work" is what the same call takes in a process that has started
and compiled already; warm less work is what a start costs. All run one thread (`-t 1`), one after another; the archives
of all runs are compared. FILE should be 90 MB of float32.
"""

import argparse
import filecmp
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import common
from memory import child, tzip

TARGETS = {"pack, cold": 8.0, "start, pack": 0.6}


def together(calls: list[list[str]], env: dict[str, str]) -> float:
    """Run commands at once; return the seconds until the last has ended."""
    start = time.perf_counter()
    running = [subprocess.Popen(c, env=env, stdout=subprocess.DEVNULL) for c in calls]
    codes = [p.wait() for p in running]
    if any(codes):
        raise SystemExit("a process failed")
    return time.perf_counter() - start


def measure(file: Path, scratch: Path, repeat: int) -> dict[str, tuple[list[float], list[float]]]:
    """Return the seconds, and the CPU's, of each kind of run."""
    import tzip as library

    took: dict[str, tuple[list[float], list[float]]] = {}
    archive, back, caches = scratch / "a.tzip", scratch / "back", scratch / "caches"

    def pack(target: Path) -> list[str]:
        return tzip("pack", "-q", "-f", "-t", "1", str(file), "-o", str(target))

    unpack = tzip("unpack", "-q", "-f", "-t", "1", str(archive), "-o", str(back))

    def note(what: str, call: list[str], cache: Path) -> None:
        _, seconds, cpu, code = child(call, {"NUMBA_CACHE_DIR": str(cache)})
        if code:
            raise SystemExit(f"{what}: exit code {code}")
        took.setdefault(what, ([], []))[0].append(seconds)
        took[what][1].append(cpu)
        common.say(f"{what}: {seconds:.2f} s, {cpu:.2f} s of CPU")

    for number in range(repeat):
        cache = caches / str(number)
        note("pack, cold", pack(archive), cache)
        note("pack, warm", pack(archive), cache)
        note("unpack, cold", unpack, caches / f"{number}u")
        note("unpack, warm", unpack, caches / f"{number}u")
        if not filecmp.cmp(file, back / file.name, shallow=False):
            raise SystemExit("WRONG BYTES")
        for what, run in (
            ("pack, work", lambda: library.pack(file, scratch / "b.tzip", force=True, threads=1)),
            ("unpack, work", lambda: library.unpack(archive, back, force=True, threads=1)),
        ):
            for again in range(3):
                cpu = time.process_time()
                seconds, _ = common.timed(run)
                if again:
                    took.setdefault(what, ([], []))[0].append(seconds)
                    took[what][1].append(time.process_time() - cpu)
        one, two = scratch / "one.tzip", scratch / "two.tzip"
        env = os.environ | {"NUMBA_CACHE_DIR": str(caches / f"{number}t")}
        seconds = together([pack(one), pack(two)], env)
        took.setdefault("pack, two at once, cold", ([], []))[0].append(seconds)
        seconds = together([pack(one), pack(two)], env)
        took.setdefault("pack, two at once, warm", ([], []))[0].append(seconds)
        if not filecmp.cmp(one, two, shallow=False) or not filecmp.cmp(one, archive, shallow=False):
            raise SystemExit("two processes made different archives")
        shutil.rmtree(caches)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--doc", type=Path, help="a document whose section `cold` gets the table")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=a.scratch) as folder:
        took = measure(a.file, Path(folder), a.repeat)
    for verb in ("pack", "unpack"):
        warm, work = min(took[f"{verb}, warm"][0]), min(took[f"{verb}, work"][0])
        took[f"start, {verb}"] = ([warm - work], [])
    rows: list[dict[str, Any]] = []
    for what, (seconds, cpu) in took.items():
        row = {"file": a.file.name, "bytes": a.file.stat().st_size, "what": what, "seconds": f"{min(seconds):.2f}"}
        row |= {"median": f"{common.median(seconds):.2f}", "cpu_seconds": f"{min(cpu):.2f}" if cpu else ""}
        rows.append(common.facts() | row | {"target": TARGETS.get(what, "")})
    fields = ("what", "seconds", "median", "cpu_seconds", "target")
    text = common.markdown(
        ("what", ">seconds (best)", ">(median)", ">CPU seconds", ">target"), ([r[f] for f in fields] for r in rows)
    )
    text += f"\n{a.file.name}, {a.file.stat().st_size:,} bytes. " + common.stamp(common.command_line("cold.py"))
    print(text)
    if a.csv:
        common.write_csv(a.csv, rows)
    if a.doc:
        common.replace_section(a.doc, "cold", text)


if __name__ == "__main__":
    main()
