"""Loading packed safetensors files beside plain ones: speed, memory, and what the hook costs.

    python bench/loading.py SCRATCH [--mb 1000] [--repeat 5] [--csv OUT] [--doc DOCUMENT.md]

Needs torch and safetensors. The inputs are synthetic bfloat16 weights without repeats (bench/data.py). "copied" is the plain
file read with `load_file` and cloned into fresh memory, what a program pays that uses the tensors; "mapped" is `load_file`
alone, which maps the file and reads nothing yet. Warm: the file in the page cache, all kernels loaded, one core, best of the
repeats; cold process: a new Python that imports torch and loads, wall time. "Slow storage" is a file object that gives its
bytes at a fixed rate, sleeping between, as a disk or a network does; the plain file is read into one buffer at the same rate.
Memory: a model of 5 files, every tensor kept; the process's peak less its size before and less the tensors.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import common

_COLD = """
import sys, time
start = time.perf_counter()
if sys.argv[2] == "packed":
    from tzip.safetensors.torch import load_file
else:
    from safetensors.torch import load_file
tensors = load_file(sys.argv[1])
if sys.argv[2] == "copied":
    tensors = {k: v.clone() for k, v in tensors.items()}
print(time.perf_counter() - start)
"""
_MEMORY = """
import json, re, sys, torch
from tzip.safetensors.torch import load_file
from tzip.safetensors import safe_open
def status(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
with safe_open(sys.argv[1], "pt") as f:  # loads the kernels
    name = f.offset_keys()[0]
    f.get_slice(name)[0:1]
before = status("VmRSS")
kept = [load_file(path) for path in sys.argv[1:]]
size = sum(t.nbytes for tensors in kept for t in tensors.values())
print(json.dumps([size, status("VmHWM") - before - size]))
"""


class Slow(io.RawIOBase):
    """A file that gives its bytes at `rate` bytes a second, to all its readers together."""

    def __init__(self, path: Path, rate: float) -> None:
        self.file = open(path, "rb", buffering=0)
        self.name = str(path)
        self.rate = rate
        self.free = time.perf_counter()
        self.lock = threading.Lock()

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def read(self, n: int = -1) -> bytes:
        start = time.perf_counter()
        data = self.file.read(n)
        with self.lock:
            self.free = max(self.free, start) + len(data) / self.rate
            until = self.free
        time.sleep(max(0.0, until - time.perf_counter()))
        return data


def warm(plain: Path, packed: Path, repeat: int) -> dict[str, float]:
    """Return the seconds of each way to load."""
    from safetensors.torch import load_file

    import tzip
    from tzip.safetensors.torch import load_file as load_packed

    def slow_plain(rate: float) -> bytearray:
        file, room = Slow(plain, rate), bytearray(plain.stat().st_size)
        at = 0
        while at < len(room):
            part = file.read(8 << 20)
            room[at : at + len(part)] = part
            at += len(part)
        return room

    def slow_packed(rate: float) -> list[Any]:
        with tzip.open(Slow(packed, rate)) as archive:
            return [archive[name] for name in archive]

    ways = {
        "mapped": lambda: load_file(plain),
        "copied": lambda: {k: v.clone() for k, v in load_file(plain).items()},
        "packed": lambda: load_packed(packed),
        "plain at 1.5 GB/s": lambda: slow_plain(1.5e9),
        "packed at 1.5 GB/s": lambda: slow_packed(1.5e9),
        "plain at 0.5 GB/s": lambda: slow_plain(0.5e9),
        "packed at 0.5 GB/s": lambda: slow_packed(0.5e9),
    }
    load_packed(packed)
    common.pin(1)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeat):
        for way, work in ways.items():
            spent, result = common.timed(work)
            seconds[way].append(spent)
            del result
    return {way: min(runs) for way, runs in seconds.items()}


def hook_cost(plain: Path, repeat: int) -> dict[str, float]:
    """Return the microseconds of opening a plain file, without and with the hook."""
    import safetensors

    import tzip

    def opening() -> float:
        runs = []
        for _ in range(repeat * 40):
            start = time.perf_counter()
            with safetensors.safe_open(plain, "pt"):
                pass
            runs.append(time.perf_counter() - start)
        return min(runs) * 1e6

    before = opening()
    with tzip.install(children=False):
        return {"plain, no hook": before, "plain, hook": opening()}


def start_up(repeat: int) -> dict[str, float]:
    """Return the milliseconds of starting Python, without the hook and with it as `tzip hook enable` installs it."""
    from tzip import environments

    def start(code: str) -> float:
        runs = []
        for _ in range(repeat * 4):
            spent, _ = common.timed(lambda: subprocess.run([sys.executable, "-c", code], check=True))
            runs.append(spent)
        return min(runs) * 1e3

    return {"start, no hook": start("pass"), "start, hook": start(environments.line())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--mb", type=int, default=1000)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--doc", type=Path, help="a document whose section `loading` gets the table")
    parser.add_argument("--warm", nargs=2, type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.warm:
        print(json.dumps(warm(*a.warm, a.repeat)))
        return
    import tzip

    rows: list[list[Any]] = []
    with tempfile.TemporaryDirectory(dir=a.scratch) as folder:
        files = []
        for seed in range(1, 6):
            plain = Path(folder) / f"{seed}.safetensors"
            make = [sys.executable, str(Path(__file__).parent / "data.py"), "synthetic", str(plain), "--mb", str(a.mb)]
            subprocess.run([*make, "--dtype", "bf16", "--seed", str(seed)], check=True)
            packed = Path(folder) / f"{seed}.tzip"
            report = tzip.pack(plain, packed)
            files.append(packed)
            if seed > 1:
                plain.unlink()
        plain, packed = Path(folder) / "1.safetensors", files[0]
        size = plain.stat().st_size
        measure = [sys.executable, __file__, folder, "--repeat", str(a.repeat), "--warm", str(plain), str(packed)]
        seconds = json.loads(subprocess.check_output(measure))
        rows += [[f"warm, {way}", f"{s:.3f} s", f"{size / s / 1e9:.2f} GB/s"] for way, s in seconds.items()]
        rows.append(["packed / copied (asked: at most 2)", f"{seconds['packed'] / seconds['copied']:.2f}", ""])
        for rate in ("1.5", "0.5"):
            ratio = seconds[f"packed at {rate} GB/s"] / seconds[f"plain at {rate} GB/s"]
            rows.append([f"packed / plain at {rate} GB/s (asked: below 1)", f"{ratio:.2f}", ""])
        for way, path in (("mapped", plain), ("copied", plain), ("packed", packed)):
            runs = [float(subprocess.check_output([sys.executable, "-c", _COLD, str(path), way])) for _ in range(a.repeat)]
            rows.append([f"cold process, {way}", f"{min(runs):.3f} s", ""])
        size, above = json.loads(subprocess.check_output([sys.executable, "-c", _MEMORY, *map(str, files)]))
        rows.append([f"5 files, {size / 1e9:.2f} GB of tensors: peak above them (asked: 200 MB)", f"{above / 1e6:.0f} MB", ""])
        rows += [[f"safe_open, {what}", f"{us:.0f} us", ""] for what, us in hook_cost(plain, a.repeat).items()]
        times = start_up(a.repeat)
        rows += [[f"Python, {what}", f"{ms:.1f} ms", ""] for what, ms in times.items()]
        rows.append(["the hook at start-up (asked: 25 ms)", f"{times['start, hook'] - times['start, no hook']:.1f} ms", ""])
    text = f"{a.mb} MB of bfloat16 packed to {report.bytes_out / report.bytes_in:.2%} at `default`.\n\n"
    text += common.markdown(["what", ">figure", ">"], rows) + "\n" + common.stamp(common.command_line("loading.py"))
    print(text)
    if a.csv:
        facts = common.facts()
        common.write_csv(a.csv, [facts | {"what": what, "figure": figure, "speed": speed} for what, figure, speed in rows])
    if a.doc:
        common.replace_section(a.doc, "loading", text)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
