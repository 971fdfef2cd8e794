"""tzip against its rivals, in memory: size, and speeds of encoding and decoding.

    python bench/bench.py FILE... [--threads 1] [--repeat 5] [--levels fast,default,best]
        [--rivals zipnn,openzl-fse,openzl-huffman,zstd-1,zstd-3,z4ai] [--csv OUT] [--plot OUT.png] [--doc DOCUMENT.md]

What is measured: all tensors of one element type, one after another in one buffer, which is what the rivals like best
(most of them have a cost for every call). Element types with less than 1 % of a file are left out. Input and output
are in memory; a decoder allocates what it returns (but "tzip LEVEL+out" decodes into an array that exists). tzip's
encoding includes the decoding and comparison of every chunk (but not in "tzip LEVEL+unproved"); no rival checks itself.
With one thread the process is pinned to one core. Every decoded result is compared with the source; each tool runs in a
process of its own, so that one that crashes is reported and the others go on. The rounds of all tools are interleaved, so
that a disturbance of the machine hits all alike. With one thread the clock is the CPU time of the process, which is the
same as the wall's on an idle machine and far steadier on a shared one; the results file has the wall's, too.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import common
import rivals

_WIDTH = 1.6  # points of size that a panel of the plot shows; larger ones stand at its edge
COLUMNS = ("file", "dtype", "tool", ">size %", ">decode GB/s", ">(median)", ">encode GB/s", ">(median)", "")


def work(job: dict[str, Any]) -> None:
    """Measure one tool on one buffer; print one JSON object."""
    common.pin(job["threads"])
    import numpy as np

    raw = common.load_by_dtype(job["file"])[0][job["dtype"]]
    source = np.frombuffer(raw, np.uint8)
    digest = hashlib.sha256(raw).digest()
    result: dict[str, Any] = {"bytes_in": len(raw), "encode": [], "decode": [], "fault": ""}
    try:
        encode, decode = rivals.make(job["tool"], job["option"], job["dtype"], job["threads"])
    except (rivals.NotSupportedError, ImportError) as e:
        print(json.dumps(result | {"fault": f"not measured: {e}"}))
        return
    warm = 1 << 20  # compiles, or loads what is compiled
    decode(encode(bytearray(raw[:warm])))
    if job["option"].endswith("+out"):
        encode, decode = rivals.make(job["tool"], job["option"], job["dtype"], job["threads"])
    encoding, decoding = common.Clock(job["threads"]), common.Clock(job["threads"])
    for _ in range(job["repeat"]):
        mine = bytearray(raw)
        packed = encoding.timed(lambda: encode(mine))  # noqa: B023
        result["bytes_out"] = len(packed)
        if mine != raw:
            result["note"] = "changes its input"
        decoded = decoding.timed(lambda: decode(packed))  # noqa: B023
        if not np.array_equal(np.frombuffer(decoded, np.uint8), source):
            result["fault"] = "WRONG BYTES"
        del decoded
    result |= {"encode": encoding.seconds, "decode": decoding.seconds}
    result |= {"encode_wall": encoding.wall, "decode_wall": decoding.wall}
    if hashlib.sha256(raw).digest() != digest:
        result["fault"] = result["fault"] or "the source changed under the benchmark"
    print(json.dumps(result))


def run_tool(job: dict[str, Any]) -> dict[str, Any]:
    """Measure one tool in a process of its own."""
    call = [sys.executable, os.path.abspath(__file__), "--worker", json.dumps(job)]
    child = subprocess.run(call, capture_output=True, text=True)
    if child.returncode:
        last = child.stderr.strip().splitlines()[-1:] or [""]
        how = f"CRASH, signal {-child.returncode}" if child.returncode < 0 else f"FAILED: {last[0][:120]}"
        return {"bytes_in": 0, "encode": [], "decode": [], "fault": how}
    return json.loads(child.stdout.splitlines()[-1])


def measure(a: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row for each file, element type and tool."""
    from importlib.metadata import PackageNotFoundError, version

    tools = [("tzip", level) for level in a.levels.split(",") if level]
    tools += [rivals.parse(name) for name in a.rivals.split(",") if name]
    facts = common.facts()
    rows = []
    for path in a.files:
        buffers, skipped = common.load_by_dtype(path)
        sizes = {dtype: len(raw) for dtype, raw in buffers.items()}
        del buffers
        if skipped:
            common.say(f"{path.name}: {skipped} bytes of rare element types left out")
        for dtype, size in sizes.items():
            found: dict[tuple[str, str], dict[str, Any]] = {}
            for number in range(a.rounds):
                for tool, option in tools:
                    common.say(f"{path.name} {dtype} {tool} {option}, round {number + 1} of {a.rounds}")
                    job = {
                        "file": str(path), "dtype": dtype, "tool": tool, "option": option,
                        "threads": a.threads, "repeat": a.repeat,
                    }  # fmt: skip
                    one = run_tool(job)
                    before = found.setdefault((tool, option), one)
                    if before is not one and not before["fault"]:
                        for field in ("encode", "decode", "encode_wall", "decode_wall"):
                            before[field] += one[field] if one["encode"] else []
                        before["fault"] = one["fault"]
            for (tool, option), r in found.items():
                try:
                    number = version(rivals.PACKAGE_OF[tool])
                except PackageNotFoundError:
                    number = ""

                def rate(seconds: float, size: int = size) -> str:
                    return f"{size / seconds / 1e9:.3f}"

                good = bool(r["encode"]) and not r["fault"]
                rows.append(
                    facts
                    | {
                        "tool": tool,
                        "version": number,
                        "option": option,
                        "threads": a.threads,
                        "file": path.name,
                        "dtype": dtype,
                        "bytes_in": size,
                        "bytes_out": r["bytes_out"] if good else "",
                        "percent": f"{100 * r['bytes_out'] / size:.3f}" if good else "",
                        "encode_best": rate(min(r["encode"])) if good else "",
                        "encode_median": rate(common.median(r["encode"])) if good else "",
                        "decode_best": rate(min(r["decode"])) if good else "",
                        "decode_median": rate(common.median(r["decode"])) if good else "",
                        "clock": "cpu" if a.threads == 1 else "wall",
                        "encode_wall_best": rate(min(r["encode_wall"])) if good else "",
                        "decode_wall_best": rate(min(r["decode_wall"])) if good else "",
                        "remark": r["fault"] or r.get("note", ""),
                    }
                )
    return rows


def tool_label(row: dict[str, Any]) -> str:
    """Return how a row is called in tables and plots."""
    return " ".join(x for x in (row["tool"], row["version"] if row["tool"] != "tzip" else "", row["option"]) if x)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    fields = ("percent", "decode_best", "decode_median", "encode_best", "encode_median", "remark")
    return common.markdown(
        COLUMNS, ([r["file"].removesuffix(".safetensors"), r["dtype"], tool_label(r), *(r[f] for f in fields)] for r in rows)
    )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw size against decoding speed, a panel for each file and element type. Left and up is better."""
    import matplotlib as mpl

    mpl.use("Agg")
    import numpy
    from matplotlib import pyplot
    from PIL import Image  # matplotlib requires it

    colours = {"tzip": "#c1272d", "zipnn": "#0b6fa4", "openzl": "#2e8540", "zstd": "#6b6b6b", "z4ai": "#b8860b"}
    markers = {"tzip": "o", "zipnn": "s", "openzl": "^", "zstd": "D", "z4ai": "v"}
    panels = list(dict.fromkeys((r["file"], r["dtype"]) for r in rows))
    wide = min(2, len(panels))
    high = -(-len(panels) // wide)
    figure, axes = pyplot.subplots(high, wide, figsize=(6.2 * wide, 4.0 * high), dpi=90, squeeze=False)
    for panel in axes.flat[len(panels) :]:
        panel.axis("off")
    for panel, key in zip(axes.flat, panels, strict=False):
        points = [r for r in rows if (r["file"], r["dtype"]) == key and r["percent"] and "unproved" not in r["option"]]
        edge = min((float(r["percent"]) for r in points), default=0) + _WIDTH
        for r in points:
            r["x"], r["y"] = min(float(r["percent"]), edge), float(r["decode_best"])
            x, y = r["x"], r["y"]
            panel.scatter(x, y, s=54, c=colours[r["tool"]], marker=markers[r["tool"]], zorder=3)
        _label(panel, points)
        panel.set_title(f"{key[0].removesuffix('.safetensors')} ({key[1]})", fontsize=10)
        panel.set_xlabel("size, % of the original (smaller is better)", fontsize=9)
        panel.set_ylabel("decode, GB/s (best)", fontsize=9)
        panel.margins(x=0.24)
        panel.set_ylim(0, 1.22 * max((r["y"] for r in points), default=1))
        panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.canvas.draw()
    # A palette makes the file a third as large.
    Image.fromarray(numpy.asarray(figure.canvas.buffer_rgba())[..., :3]).quantize(256).save(path, optimize=True)


def _label(panel: Any, points: list[dict[str, Any]]) -> None:
    """Put names beside the markers, moved up where they would overlap; what is too large to be drawn says its size."""
    high = max((r["y"] for r in points), default=1)
    span = max((r["x"] for r in points), default=1) - min((r["x"] for r in points), default=0) or 1
    taken: list[tuple[float, float]] = []
    for r in sorted(points, key=lambda r: r["y"]):
        x, y = r["x"], r["y"]
        at = y
        while any(abs(x - tx) < 0.34 * span and abs(at - ty) < 0.06 * high for tx, ty in taken):
            at += 0.01 * high
        taken.append((x, at))
        far = f" ({float(r['percent']):.0f} %) →" if float(r["percent"]) > x else ""
        panel.annotate(
            " ".join(p for p in (r["tool"], r["option"]) if p) + far, (x, y), (x + 0.025 * span, at),
            fontsize=7.5, va="center", arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "#999999"},
        )  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        work(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5, help="runs in a process")
    parser.add_argument("--rounds", type=int, default=1, help="processes of each tool, interleaved")
    parser.add_argument("--levels", default="fast,default,default+out,default+unproved,best")
    parser.add_argument("--rivals", default="zipnn,openzl-fse,openzl-huffman,zstd-1,zstd-3,z4ai")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--doc", type=Path, help="a document whose section `frontier` gets the table")
    parser.add_argument("--section", default="frontier")
    a = parser.parse_args()
    rows = measure(a)
    text = table(rows) + "\n" + common.stamp(common.command_line("bench.py"))
    print(text)
    if a.csv:
        common.write_csv(a.csv, rows)
    if a.plot:
        plot(rows, a.plot)
    if a.doc:
        common.replace_section(a.doc, a.section, text)
    if any("WRONG" in r["remark"] and r["tool"] == "tzip" for r in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
