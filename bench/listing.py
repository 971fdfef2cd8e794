"""How long a listing takes: `tzip ls` as a process, `tzip.open` in one.

    python bench/listing.py SCRATCH [--repeat 10] [--csv OUT] [--doc DOCUMENT.md]

Archives of 1,000 tensors of 5 MB (5 GB) and of 10,000 tensors of 0.5 MB (5 GB). The tensors are zeros, made as holes:
only the index matters here, and it has fixed-width columns, so it is as large as that of real weights. Targets: `ls`
under 0.3 s and without numba, `open` under 50 ms. "With its imports" is Python with numpy, click and zstandard, which
`ls` needs: what no listing in Python can do without.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

CASES = ((1_000, 5_000_000), (10_000, 500_000))
_OPEN = """
import json, sys, time
import tzip
tzip.Archive  # the import is not timed
def once():
    start = time.perf_counter()
    with tzip.open(sys.argv[1]) as archive:
        n = len(archive)
    return time.perf_counter() - start, n
runs = [once() for _ in range(int(sys.argv[2]))]
print(json.dumps([runs[0][0], min(r[0] for r in runs), runs[0][1], "numba" in sys.modules]))
"""


def process_seconds(call: list[str], repeat: int) -> tuple[list[float], list[float]]:
    """Return the seconds of that many runs of a command, and those of the CPU."""
    wall, cpu = [], []
    for number in range(repeat + 1):
        start = time.perf_counter()
        process = subprocess.Popen(call, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{call}: exit code {process.returncode}")
        if number:  # the first fills the caches
            wall.append(time.perf_counter() - start)
            cpu.append(usage.ru_utime + usage.ru_stime)
    return wall, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--doc", type=Path, help="a document whose section `listing` gets the table")
    a = parser.parse_args()
    rows: list[dict[str, Any]] = []
    start, _ = process_seconds([sys.executable, "-c", "pass"], a.repeat)
    floor, _ = process_seconds([sys.executable, "-c", "import numpy, click, zstandard"], a.repeat)
    with tempfile.TemporaryDirectory(dir=a.scratch) as folder:
        for tensors, nbytes in CASES:
            file, archive = Path(folder) / "sparse.safetensors", Path(folder) / "sparse.tzip"
            make = [sys.executable, str(Path(__file__).parent / "data.py"), "sparse", str(file)]
            subprocess.run([*make, "--tensors", str(tensors), "--bytes", str(nbytes)], check=True)
            cli = [sys.executable, "-m", "tzip.cli"]
            subprocess.run([*cli, "pack", "-q", "-f", "--no-sha256", str(file), "-o", str(archive)], check=True)
            file.unlink()
            ls, cpu = process_seconds([*cli, "ls", str(archive)], a.repeat)
            imports = subprocess.run(
                [sys.executable, "-X", "importtime", "-m", "tzip.cli", "ls", str(archive)],
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True,
            ).stderr  # fmt: skip
            with_numba = any(line.split("|")[-1].strip().split(".")[0] == "numba" for line in imports.splitlines())
            runs = [
                json.loads(subprocess.check_output([sys.executable, "-c", _OPEN, str(archive), "5"])) for _ in range(a.repeat)
            ]
            assert runs[0][2] == tensors
            rows.append(
                common.facts()
                | {
                    "tensors": tensors, "bytes": tensors * nbytes, "archive": os.path.getsize(archive),
                    "ls_best": f"{min(ls):.3f}", "ls_median": f"{common.median(ls):.3f}",
                    "ls_cpu": f"{min(cpu):.3f}", "python_start": f"{min(start):.3f}", "floor": f"{min(floor):.3f}",
                    "open_first_ms": f"{1000 * min(r[0] for r in runs):.1f}",
                    "open_best_ms": f"{1000 * min(r[1] for r in runs):.1f}",
                    "numba_imported": with_numba or runs[0][3],
                }
            )  # fmt: skip
            archive.unlink()
    shown = {
        ">tensors": "tensors", ">bytes": "bytes", ">`tzip ls`, s": "ls_best", ">(median)": "ls_median", ">CPU, s": "ls_cpu",
        ">Python alone, s": "python_start", ">with its imports, s": "floor", ">first `open`, ms": "open_first_ms",
        ">later, ms": "open_best_ms", "numba imported": "numba_imported",
    }  # fmt: skip
    text = common.markdown(list(shown), ([f"{r[f]:,}" if type(r[f]) is int else r[f] for f in shown.values()] for r in rows))
    text += "\n" + common.stamp(common.command_line("listing.py"))
    print(text)
    if a.csv:
        common.write_csv(a.csv, rows)
    if a.doc:
        common.replace_section(a.doc, "listing", text)


if __name__ == "__main__":
    main()
