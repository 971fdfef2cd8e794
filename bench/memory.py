"""Peak memory and time of `tzip pack` and `tzip unpack` as processes.

    python bench/memory.py SCRATCH [--cases 90:bf16,1000:bf16,1000:fp32,5000:bf16] [--threads 2] [--limit 400]
        [--csv OUT] [--doc DOCUMENT.md]

Peak memory is the child's maximal resident set (wait4). Linux starts that figure at the size of the process that
starts the child, so this script imports nothing large, and prints its own size: figures below it mean nothing.
Resident pages count the interpreter and the libraries (numpy, numba's LLVM) too; the rows `import` and `tiny file` say
how much that is. "cold" has an empty numba cache: the kernels are compiled. MB and GB are 10^6 and 10^9 bytes. Files are
made in SCRATCH (data.py, seeded) and deleted; results are compared byte by byte. Seconds include the disk, fsync too.
"""

import argparse
import filecmp
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

HERE = Path(__file__).parent


def child(call: list[str], env: dict[str, str] | None = None) -> tuple[float, float, float, int]:
    """Run a command; return its peak memory in MB, its seconds, those of its CPUs, and its exit status."""
    start = time.perf_counter()
    process = subprocess.Popen(call, env=os.environ | (env or {}), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    return usage.ru_maxrss * unit / 1e6, time.perf_counter() - start, usage.ru_utime + usage.ru_stime, process.returncode


def tzip(*arguments: str) -> list[str]:
    """Return the command line of a verb."""
    return [sys.executable, "-m", "tzip.cli", *arguments]


class Table:
    """The rows so far."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.rows: list[dict[str, Any]] = []

    def add(self, what: str, size: int, call: list[str], env: dict[str, str] | None = None) -> None:
        """Measure a command on `size` bytes of input."""
        peak, seconds, cpu, code = child(call, env)
        if code:
            raise SystemExit(f"{what}: exit code {code}")
        self.rows.append(
            {"what": what, "bytes": size, "peak_mb": round(peak), "seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2)}
        )
        common.say(f"{what}: {peak:.0f} MB, {seconds:.2f} s, {cpu:.2f} s of CPU")

    def pack_and_unpack(self, file: Path, label: str, threads: int, env: dict[str, str] | None = None) -> None:
        """Measure both ways and compare what came back."""
        size = file.stat().st_size
        archive, back = file.with_name(file.name + ".tzip"), file.with_name("back")
        t = str(threads)
        self.add(f"pack, {label}", size, tzip("pack", "-q", "-f", "-t", t, str(file), "-o", str(archive)), env)
        self.rows[-1]["percent"] = f"{100 * archive.stat().st_size / size:.2f}"
        self.add(f"unpack, {label}", size, tzip("unpack", "-q", "-f", "-t", t, str(archive), "-o", str(back)), env)
        (restored,) = [p for p in back.rglob("*") if p.is_file()]
        if not filecmp.cmp(file, restored, shallow=False):
            raise SystemExit(f"{label}: WRONG BYTES")
        archive.unlink()
        shutil.rmtree(back)

    def synthetic(self, scratch: Path, megabytes: int, kind: str, threads: list[int], cold: bool = False) -> None:
        """Measure a synthetic file."""
        file = scratch / f"synthetic_{megabytes}_{kind}.safetensors"
        make = [sys.executable, str(HERE / "data.py"), "synthetic", str(file), "--mb", str(megabytes), "--dtype", kind]
        subprocess.run(make, check=True)
        for number in threads:
            label = f"{megabytes} MB {kind}, {number} thread{'s' if number > 1 else ''}"
            self.pack_and_unpack(file, label, number)
            if cold:
                with tempfile.TemporaryDirectory(dir=scratch) as cache:
                    self.pack_and_unpack(file, label + ", cold", number, {"NUMBA_CACHE_DIR": cache})
        file.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--cases", default="90:bf16,1000:bf16,1000:fp32,5000:bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=int, default=400, help="MB that no warm run may pass")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--doc", type=Path, help="a document whose section `memory` gets the table")
    a = parser.parse_args()
    table = Table(a.threads)
    with tempfile.TemporaryDirectory(dir=a.scratch) as folder:
        scratch = Path(folder)
        table.synthetic(scratch, 1, "bf16", [1])  # warms the cache; counted below
        table.synthetic(scratch, 1, "fp32", [1])
        table.rows.clear()
        table.add("start of Python", 0, [sys.executable, "-c", "pass"])
        table.add("import numpy", 0, [sys.executable, "-c", "import numpy"])
        table.add("import numba", 0, [sys.executable, "-c", "import numba"])
        table.add("import tzip.packing", 0, [sys.executable, "-c", "import tzip.packing, tzip.unpacking"])
        table.synthetic(scratch, 1, "bf16", [1])
        for number, case in enumerate(a.cases.split(",")):
            megabytes, _, kind = case.partition(":")
            small = int(megabytes) < 500
            table.synthetic(scratch, int(megabytes), kind, [1, a.threads] if small else [a.threads], cold=number == 0)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    over = [r for r in table.rows if r["peak_mb"] > a.limit]
    rows = [common.facts() | {"percent": ""} | r for r in table.rows]
    lines = [(r["what"], r.get("percent", ""), r["peak_mb"], r["seconds"], r["cpu_seconds"]) for r in table.rows]
    text = common.markdown(("what", ">size %", ">peak memory, MB", ">seconds", ">CPU seconds"), lines)
    text += f"\nFloor of the measurement: {own:.0f} MB. Over {a.limit} MB: "
    text += (", ".join(f"{r['what']} ({r['peak_mb']})" for r in over) or "none") + ". "
    text += common.stamp(common.command_line("memory.py"))
    print(text)
    if a.csv:
        common.write_csv(a.csv, rows)
    if a.doc:
        common.replace_section(a.doc, "memory", text)


if __name__ == "__main__":
    main()
