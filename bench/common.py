"""What the benchmarks share: input files, the machine in words, timing, tables in Markdown. Standard library only."""

import csv
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ITEM_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}
_FOLDERS = ("coders", "formats", "gpu", "hub", "store")  # sub-packages that lie beside archiver/


@dataclass(frozen=True, slots=True)
class Span:
    """A tensor of a safetensors file: `begin` and `end` are offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: str | Path) -> list[Span]:
    """Return the tensors of a safetensors file in the order of their bytes."""
    with open(path, "rb") as file:
        n = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(n))
    spans = [
        Span(name, e["dtype"], tuple(e["shape"]), 8 + n + e["data_offsets"][0], 8 + n + e["data_offsets"][1])
        for name, e in header.items()
        if name != "__metadata__"
    ]
    return sorted(spans, key=lambda s: (s.begin, s.end))


def write_header(file: Any, tensors: Iterable[tuple[str, str, Sequence[int], int]]) -> None:
    """Write the header of a safetensors file for tensors (name, dtype, shape, bytes) in the order of their bytes."""
    header, at = {}, 0
    for name, dtype, shape, nbytes in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def load_by_dtype(path: str | Path, at_least: float = 0.01) -> tuple[dict[str, bytes], int]:
    """Return the bytes of all tensors of a dtype, one after another in file order, for each dtype of a file.

    Dtypes with a smaller share of the file than `at_least` are left out; the second result counts their bytes.
    """
    parts: dict[str, list[bytes]] = {}
    with open(path, "rb") as file:
        for span in read_header(path):
            file.seek(span.begin)
            parts.setdefault(span.dtype, []).append(file.read(span.end - span.begin))
    total = sum(len(p) for group in parts.values() for p in group)
    joined = {dtype: b"".join(group) for dtype, group in parts.items()}
    kept = {dtype: raw for dtype, raw in joined.items() if len(raw) >= at_least * total}
    return kept, total - sum(len(raw) for raw in kept.values())


def pin(threads: int) -> None:
    """Keep this process on one core when one thread is measured."""
    if threads == 1 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that `work` took, and its result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


class Clock:
    """Seconds of runs. With one thread `seconds` are those of the CPU that this process had (all its threads, system calls
    included), which other processes lengthen little; with more they are those of the wall. `wall` always is.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.seconds: list[float] = []
        self.wall: list[float] = []

    def timed(self, work: Callable[[], Any]) -> Any:
        """Return the result of `work` and note its seconds."""
        cpu = time.process_time()
        wall, result = timed(work)
        cpu = time.process_time() - cpu
        self.wall.append(wall)
        self.seconds.append(cpu if self.threads == 1 else wall)
        return result


def median(values: Sequence[float]) -> float:
    """Return the median; of an even number of values the lower one of the middle."""
    return sorted(values)[(len(values) - 1) // 2]


def machine() -> str:
    """Return the CPU's model, the cores in use, and which of the vector extensions that matter it has."""
    model, flags = platform.processor() or platform.machine(), set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
                break
    except OSError:
        pass
    features = [f for f in ("avx2", "avx512f", "avx512vbmi", "avx512_vbmi2") if f in flags]
    return f"{model}, {os.cpu_count()} cores, {' '.join(features) or 'features unknown'}"


def commit() -> str:
    """Return the git commit whose code the tzip that is imported has: the newest that fits; words when none does."""
    found = importlib.util.find_spec("tzip")
    if found is None or found.origin is None:
        return "no tzip"
    package = Path(found.origin).parent
    installed = {
        ("" if p[0] in _FOLDERS else "archiver/") + "/".join(p): _blob(file) for p, file in _modules(package)
    }
    try:
        commits = _git("log", "-n", "50", "--format=%h").split()
        for one in commits:
            tree = _git("ls-tree", "-r", one, "archiver", *_FOLDERS).splitlines()
            entries = {path: meta.split()[2] for meta, path in (line.split("\t") for line in tree)}
            if {path: sha for path, sha in entries.items() if path.endswith(".py")} == installed:
                return one
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"none, near {commits[0]}" if commits else "none"


def _modules(package: Path) -> Iterator[tuple[tuple[str, ...], Path]]:
    for file in package.rglob("*.py"):
        yield file.relative_to(package).parts, file


def _blob(file: Path) -> str:
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _git(*arguments: str) -> str:
    call = ["git", *arguments]
    root = Path(__file__).parent.parent
    return subprocess.run(call, cwd=root, capture_output=True, text=True, check=True).stdout


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a speed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("numba", "numpy", "zstandard"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = ""
    return found


def facts() -> dict[str, str]:
    """Return what every row of a results file begins with."""
    return {"date": datetime.now(UTC).date().isoformat(), "machine": machine(), **versions(), "commit": commit()}


def write_csv(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows that all have the same keys."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table; columns whose name starts with ">" are right-aligned."""
    names = [c.removeprefix(">") for c in columns]
    rule = ["---:" if c.startswith(">") else "---" for c in columns]
    lines = [names, rule, *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def replace_section(path: str | Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- begin NAME -->` and `<!-- end NAME -->` in a document."""
    document = Path(path).read_text(encoding="utf-8")
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    before, mark, rest = document.partition(begin)
    _, mark2, after = rest.partition(end)
    if not mark or not mark2:
        raise SystemExit(f"{path} has no section {name!r}")
    Path(path).write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}", encoding="utf-8")


def stamp(command: str) -> str:
    """Return the line under a table: when, on what, with what, and by which command."""
    f = facts()
    return (
        f"{f['date']}; {f['machine']}; Python {f['python']}, numba {f['numba']}, numpy {f['numpy']}, "
        f"zstandard {f['zstandard']}; commit {f['commit'] or 'unknown'}; `{command}`\n"
    )


def command_line(script: str) -> str:
    """Return this call as it is to be typed, with the folders of files left out."""
    return f"python bench/{script} " + " ".join(
        os.path.basename(a.rstrip("/")) if os.path.isabs(a) else a for a in sys.argv[1:]
    )


class Figures:
    """Figures of a benchmark that has no table of its own: (what, value, unit), printed as they come."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, str]] = []

    def say(self, what: str, value: float, unit: str) -> None:
        """Note and print a figure."""
        self.rows.append((what, value, unit))
        print(f"{what:<64} {value:>10.3f} {unit}", flush=True)


def fresh(path: Path) -> Path:
    """Return a path where nothing is."""
    shutil.rmtree(path, ignore_errors=True)
    return path


def say(text: str) -> None:
    """Print progress to stderr, where no table goes."""
    print(text, file=sys.stderr, flush=True)
