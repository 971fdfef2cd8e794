"""tzip against its rivals, in memory: size, speeds of encoding and decoding, and ratios to zipnn.

    python bench/bench.py FILE... [--threads 1] [--repeat 7] [--levels fast,default,best]
        [--rivals zipnn,openzl-fse,openzl-huffman,zstd-1,zstd-3,z4ai] [--csv OUT] [--plot OUT.png] [--doc DOCUMENT.md]

What is measured: all tensors of one element type, one after another in one buffer, which is what the rivals like best
(most of them have a cost for every call). Element types with less than 1 % of a file are left out. Input and output
are in memory. "tzip LEVEL" allocates what it returns, both ways, as the rivals do; "+out" writes into memory that the
caller has and uses again (`tzip.encode(array, out=room)`, `tzip.decode(packed, out=array)`), which no rival offers. Both
leave out the proof (prove=False), since no rival checks itself; "+proved" decodes and compares every chunk, which is
tzip's default. tzip computes and checks its sums in all rows.

Each tool runs in a process of its own, so that none lives on memory that another has freed, and one that crashes is
reported while the others go on. They take turns: a round is one encoding and one decoding by each, so that the machine's
changes of speed hit all alike. "x zipnn" is the tool's best over zipnn's best; "(median)" the median of the ratios within the
rounds. With one thread the processes are pinned to one core and the clock is the CPU time of the process, which is the
wall's on an idle machine and steadier on a shared one; the results file has the wall's, too. Every decoded result is
compared with the source. A tool that has encoded for longer than --patience seconds encodes no more, only decodes.

The second table (section `targets`) sets the MiniLM rows against what was asked for, with the size of `tzip pack`. How a
result's memory comes about decides much: the system clears fresh pages at 2 to 4 GB/s, which is as long as a decoder
takes. So it has a third pair of columns, "memory kept": zipnn and "tzip LEVEL" once more where malloc gives
nothing back (MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_), so that all results come into pages that exist.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import common
import rivals
from plot import plot

COLUMNS = (
    "file", "dtype", "tool", ">size %", ">decode GB/s", ">(median)", ">x zipnn", ">(median)",
    ">encode GB/s", ">(median)", ">x zipnn", ">(median)", "",
)  # fmt: skip
DTYPE_AT = ("BF16", "F16", "F32")
LEVELS = ("fast", "default", "best")
# What was asked for: ratios to zipnn for bfloat16, float16, float32; encoding for all three; % of the MiniLM files.
DECODE = {"fast": (2.5, 2.5, 1.8), "default": (2.8, 2.6, 2.0), "best": (1.6, 1.6, 1.6)}
ENCODE = {"fast": 3.0, "default": 3.5, "best": 1.0}
SIZE = {"fast": (66.7, 84.9, 82.1), "default": (66.0, 84.7, 81.9), "best": (65.8, 84.6, 81.7)}

KEPT = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000", "MALLOC_TOP_PAD_": "200000000"}

PAIRS = ("fresh", "fresh_median", "out", "out_median", "kept", "kept_median")
Tool = tuple[str, str]


def work(job: dict[str, Any]) -> None:
    """Measure one tool on one buffer: a round for each line of stdin; then print one JSON object."""
    import numpy as np

    raw = common.load_by_dtype(job["file"])[0][job["dtype"]]
    source = np.frombuffer(raw, np.uint8)
    digest = hashlib.sha256(raw).digest()
    r: dict[str, Any] = {"fault": "", "note": ""}
    try:
        encode, decode = rivals.make(*job["tool"], job["dtype"], job["threads"])
    except (rivals.NotSupportedError, ImportError) as e:
        print(json.dumps(r | {"fault": f"not measured: {e}"}), flush=True)
        return
    decode(encode(bytearray(raw[: 1 << 20])))  # compiles, or loads what is compiled
    if job["tool"][1].endswith("+out"):
        decode(encode(bytearray(raw)))  # makes the memory that is used again
    common.pin(job["threads"])
    print("ready", flush=True)
    encoding, decoding = common.Clock(job["threads"]), common.Clock(job["threads"])
    packed: Any = None
    for line in sys.stdin:
        if line.strip() == "end":
            break
        if sum(encoding.wall) < job["patience"]:
            mine = bytearray(raw)
            packed = None
            packed = encoding.timed(lambda: encode(mine))  # noqa: B023
            if mine != raw:
                r["note"] = "changes its input"
            r["bytes_out"] = len(packed)
            del mine
        decoded = decoding.timed(lambda: decode(packed))  # noqa: B023
        if not np.array_equal(np.frombuffer(decoded, np.uint8), source):
            r["fault"] = "WRONG BYTES"
        del decoded
        print("done", flush=True)
    r |= {"encode": encoding.seconds, "decode": decoding.seconds}
    r |= {"encode_wall": encoding.wall, "decode_wall": decoding.wall}
    if hashlib.sha256(raw).digest() != digest:
        r["fault"] = r["fault"] or "the source changed under the benchmark"
    print(json.dumps(r), flush=True)


class Worker:
    """A process that measures one tool when it is told to."""

    def __init__(self, job: dict[str, Any], env: dict[str, str]) -> None:
        call = [sys.executable, os.path.abspath(__file__), "--worker", json.dumps(job)]
        self.process = subprocess.Popen(
            call, env=os.environ | env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.result: dict[str, Any] | None = None

    def hear(self) -> None:
        """Wait for the next line; note a result, or that the process has died."""
        line = self.process.stdout.readline()
        if line.startswith("{"):
            self.result = json.loads(line)
        elif not line:
            code = self.process.wait()
            last = self.process.stderr.read().strip().splitlines()[-1:] or [""]
            how = f"CRASH, signal {-code}" if code < 0 else f"FAILED: {last[0][:120]}"
            self.result = {"fault": how, "note": ""}

    def say(self, word: str) -> None:
        """Tell it to do a round, or to end; wait until it has."""
        if self.result is None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(word + "\n")
                self.process.stdin.flush()
            self.hear()


def run_tools(job: dict[str, Any], env: dict[str, str] | None = None) -> dict[Tool, dict[str, Any]]:
    """Measure the tools of a job, each in a process of its own, turn and turn about."""
    workers = {tool: Worker(job | {"tool": tool}, env or {}) for tool in map(tuple, job["tools"])}
    for w in workers.values():
        w.hear()
    for word in ["round"] * job["repeat"] + ["end"]:
        for w in workers.values():
            w.say(word)
    for w in workers.values():
        w.process.communicate()
    return {tool: w.result or {"fault": "no result", "note": ""} for tool, w in workers.items()}


def ratios(r: dict[str, Any], zipnn: dict[str, Any] | None, what: str) -> tuple[str, str]:
    """Return best over best, and the median of the ratios within the rounds."""
    if not zipnn or not zipnn.get(what) or not r.get(what):
        return "", ""
    rounds = [z / t for z, t in zip(zipnn[what], r[what], strict=False)]
    return f"{min(zipnn[what]) / min(r[what]):.2f}", f"{common.median(rounds):.2f}"


def figures(size: int, r: dict[str, Any], zipnn: dict[str, Any] | None) -> dict[str, Any]:
    """Return the columns of a results file that tell of speed and size."""
    good = bool(r.get("encode")) and not r["fault"]
    row: dict[str, Any] = {"bytes_in": size, "bytes_out": r["bytes_out"] if good else ""}
    row["percent"] = f"{100 * r['bytes_out'] / size:.3f}" if good else ""
    for what in ("encode", "decode"):
        row[f"{what}_best"] = f"{size / min(r[what]) / 1e9:.3f}" if good else ""
        row[f"{what}_median"] = f"{size / common.median(r[what]) / 1e9:.3f}" if good else ""
        row[f"{what}_x"], row[f"{what}_x_median"] = ratios(r, zipnn, what) if good else ("", "")
        row[f"{what}_wall_best"] = f"{size / min(r[what + '_wall']) / 1e9:.3f}" if good else ""
    return row | {"remark": r["fault"] or r["note"]}


def measure(a: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row for each file, element type and tool."""
    from importlib.metadata import PackageNotFoundError, version

    tools = [rivals.parse(name) for name in a.rivals.split(",") if name]
    for level in a.levels.split(","):
        tools += [("tzip", level), ("tzip", f"{level}+out")]
    tools += [("tzip", "default+proved")] if "default" in a.levels else []
    facts = common.facts()
    rows = []
    for path in a.files:
        buffers, skipped = common.load_by_dtype(path)
        sizes = {dtype: len(raw) for dtype, raw in buffers.items()}
        del buffers
        if skipped:
            common.say(f"{path.name}: {skipped} bytes of rare element types left out")
        for dtype, size in sizes.items():
            common.say(f"{path.name} {dtype}")
            job = {"file": str(path), "dtype": dtype, "tools": tools, "threads": a.threads, "repeat": a.repeat}
            found = run_tools(job | {"patience": a.patience})
            zipnn = found.get(("zipnn", ""))
            for tool, option in tools:
                try:
                    number = version(rivals.PACKAGE_OF[tool])
                except PackageNotFoundError:
                    number = ""
                head = {"tool": tool, "version": number, "option": option, "threads": a.threads}
                head |= {"file": path.name, "dtype": dtype, "clock": "cpu" if a.threads == 1 else "wall"}
                rows.append(facts | head | figures(size, found[tool, option], zipnn))
    return rows


def tool_label(row: dict[str, Any]) -> str:
    """Return how a row is called in tables and plots."""
    return " ".join(x for x in (row["tool"], row["version"] if row["tool"] != "tzip" else "", row["option"]) if x)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    fields = ["percent"]
    fields += [f"{what}_{kind}" for what in ("decode", "encode") for kind in ("best", "median", "x", "x_median")]
    lines = (
        [r["file"].removesuffix(".safetensors"), r["dtype"], tool_label(r)] + [r[f] for f in [*fields, "remark"]] for r in rows
    )
    return common.markdown(COLUMNS, lines)


def packed_percent(path: Path, level: str) -> float:
    """Return the size of `tzip pack` of a file."""
    import tzip

    sink = io.BytesIO()
    tzip.pack(path, sink, level=level)
    return 100 * sink.tell() / path.stat().st_size


def against_targets(rows: list[dict[str, Any]], a: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """Return rows and a table: size, decoding and encoding of the MiniLM files beside what was asked for."""
    by = {(r["file"], r["dtype"], r["option"]): r for r in rows if r["tool"] == "tzip"}
    out = []
    facts = common.facts()
    for path in (p for p in a.files if "minilm" in p.name):
        for dtype in DTYPE_AT:
            if (path.name, dtype, "default") not in by:
                continue
            common.say(f"{path.name} {dtype}, memory kept")
            tools = [("zipnn", ""), *(("tzip", level) for level in LEVELS)]
            job = {"file": str(path), "dtype": dtype, "tools": tools, "threads": a.threads, "repeat": a.repeat}
            kept = run_tools(job | {"patience": a.patience}, KEPT)
            for level in LEVELS:
                fresh, into = by[path.name, dtype, level], by[path.name, dtype, f"{level}+out"]
                at = DTYPE_AT.index(dtype)
                size = packed_percent(path, level)
                row: dict[str, Any] = {"file": path.name, "level": level, "what": "size", "target": SIZE[level][at]}
                row |= {"fresh": f"{size:.2f}"} | dict.fromkeys(PAIRS[1:], "")
                out.append(facts | row | {"reached": "yes" if round(size, 1) <= SIZE[level][at] else "NO"})
                for what, goal in (("decode", DECODE[level][at]), ("encode", ENCODE[level])):
                    row = {"file": path.name, "level": level, "what": what, "target": goal}
                    found = [fresh[f"{what}_x"], fresh[f"{what}_x_median"], into[f"{what}_x"], into[f"{what}_x_median"]]
                    found += ratios(kept["tzip", level], kept["zipnn", ""], what)
                    row |= dict(zip(PAIRS, found, strict=True))
                    hit = [n for n in PAIRS[::2] if min(float(row[n] or 0), float(row[n + "_median"] or 0)) >= goal]
                    row["reached"] = "yes" if len(hit) == 3 else ", ".join(hit) or "NO"
                    out.append(facts | row)
    shown = ("file", "level", "what", "target", *PAIRS, "reached")
    columns = ("file", "level", "what", ">target", ">fresh", ">(median)", ">out", ">(median)", ">kept", ">(median)", "reached")
    return out, common.markdown(columns, ([r[f] for f in shown] for r in out)) if out else ""


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        work(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=7, help="rounds")
    parser.add_argument("--patience", type=float, default=6, help="seconds after which a tool encodes no more")
    parser.add_argument("--levels", default="fast,default,best")
    parser.add_argument("--rivals", default="zipnn,openzl-fse,openzl-huffman,zstd-1,zstd-3,z4ai")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--doc", type=Path, help="a document whose section `frontier` gets the table")
    parser.add_argument("--targets", type=Path, help="results file of the second table")
    a = parser.parse_args()
    import tzip

    tzip.warm_up()  # processes of a few hundred megabytes use what is compiled, and do not compile what takes seconds
    rows = measure(a)
    text = table(rows) + "\n" + common.stamp(common.command_line("bench.py"))
    print(text)
    if a.csv:
        common.write_csv(a.csv, rows)
    if a.plot:
        plot(rows, a.plot)
    if a.doc:
        common.replace_section(a.doc, "frontier", text)
    targets, second = against_targets(rows, a) if a.targets else ([], "")
    if targets:
        second += "\n" + common.stamp(common.command_line("bench.py"))
        print(second)
        common.write_csv(a.targets, targets)
        if a.doc:
            common.replace_section(a.doc, "targets", second)
    if any("WRONG" in r["remark"] and r["tool"] == "tzip" for r in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
