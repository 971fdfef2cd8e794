"""Sizes of tensors with structure at every level, beside the best rival and what was asked for.

    python bench/structured.py DATA [--repeat 5] [--csv OUT] [--doc DOCUMENT.md]

DATA is where data.py put the model; structures.py says how the inputs are made. "fast", "default" and "best" are the
bytes of all chunk records in % of the tensors, "file" is `tzip pack` of a safetensors file of them at default (its header
and index included). zipnn is measured here; "best rival" was measured once on the same bytes: the smallest of zstd -3 and
-19, zipnn 0.5.4, z4ai 0.2.0 (all its options) and four graphs of OpenZL 0.3.0. Speeds: `tzip.encode` and `tzip.decode` of
each tensor at default, without the proof, with out=, one core, best of the rounds, CPU time, GB/s of the tensors' bytes.
"""

import argparse
import io
from pathlib import Path
from typing import Any

import common
import numpy as np
import rivals
from common import write_header
from numpy.typing import NDArray
from structures import make

import tzip

LEVELS = ("fast", "default", "best")
# name: (% of the best rival, which one, % asked for at default)
KNOWN: dict[str, tuple[float, str, float | None]] = {
    "dense, bf16": (66.76, "zipnn", None), "dense, fp32": (83.38, "zipnn", None),
    "bf16 in fp32": (33.38, "zipnn", 33.4), "fp16 in fp32": (42.76, "zipnn", 42.7),
    "int8 per tensor, in bf16": (29.75, "z4ai", 29.0), "int8 per tensor, in fp32": (14.92, "z4ai", 14.6),
    "int8 per row, in bf16": (65.78, "z4ai", 47.0), "int8 per row, in fp32": (43.76, "openzl", 23.0),
    "int4 groups of 128, in bf16": (38.77, "zstd -19", 24.5), "int4 groups of 128, in fp32": (22.17, "zstd -19", 12.0),
    "fp8 per tensor, in bf16": (41.38, "z4ai", 41.3), "fp8 per tensor, in fp32": (20.76, "z4ai", 20.8),
    "pruned 50 %, bf16": (38.36, "z4ai", 37.0), "pruned 90 %, bf16": (9.12, "z4ai", 8.9),
    "pruned 99 %, bf16": (1.27, "z4ai", 1.15), "tied embedding twice, bf16": (34.18, "z4ai", None),
    "token ids, int64": (8.00, "openzl", 1.05 * 8.0), "position ids, int64": (0.00, "openzl", 1.05 * 0.01),
    "padding mask, bool": (0.75, "openzl", 1.05 * 0.75), "int4 packed, int32": (90.20, "zstd -3", 1.05 * 89.97),
    "int8 codes": (57.65, "openzl", 1.05 * 57.7), "fp8 codes": (82.92, "z4ai", 1.05 * 82.9),
    "causal mask, bool": (0.07, "zstd -3", 0.05), "constant, bf16": (0, "", 0.05), "constant, fp32": (0, "", 0.05),
    "arange, int64": (0, "", 0.05), "arange, int32": (0, "", 0.05),
}  # fmt: skip
TIED = 100  # bytes that a second copy may take


def as_file(tensors: list[NDArray[Any]], dtype: str) -> bytes:
    """Return a safetensors file of the tensors."""
    out = io.BytesIO()
    write_header(out, ((f"layers.{i}.weight", dtype, t.shape, t.nbytes) for i, t in enumerate(tensors)))
    for t in tensors:
        out.write(t.tobytes())
    return out.getvalue()


def packed(data: bytes, level: str) -> tuple[int, int]:
    """Return the bytes of all chunk records of `tzip pack` of a file, and of the archive; the file must come back."""
    sink = io.BytesIO()
    tzip.pack(data, sink, level=level, threads=1, name="x.safetensors")
    with tzip.open(sink.getvalue()) as archive:
        if archive.member_bytes("x.safetensors") != data:
            raise SystemExit("WRONG BYTES")
        return int(archive.reader.index["c_length"].sum()), sink.tell()


def speeds(tensors: list[NDArray[Any]], dtype: str, repeat: int) -> tuple[float, float]:
    """Return GB/s of encoding and decoding at default."""
    raws = [t.view(np.uint8).reshape(*t.shape[:-1], -1) for t in tensors]
    outs = [np.ones_like(t) for t in tensors]
    room = np.ones(max(r.size for r in raws) * 1001 // 1000 + 8192, np.uint8)
    total = sum(r.size for r in raws)
    best = [9e9, 9e9]
    for _ in range(repeat + 1):  # the first is warm-up; the minimum leaves it out
        encoding, decoding = common.Clock(1), common.Clock(1)
        for raw, out in zip(raws, outs, strict=True):
            archive = encoding.timed(lambda: tzip.encode(raw, dtype=dtype, prove=False, out=room))  # noqa: B023
            decoding.timed(lambda: tzip.decode(archive, out))  # noqa: B023
            if out.tobytes() != raw.tobytes():
                raise SystemExit("WRONG BYTES")
        best = [min(best[0], sum(encoding.seconds)), min(best[1], sum(decoding.seconds))]
    return total / best[0] / 1e9, total / best[1] / 1e9


def zipnn_percent(tensors: list[NDArray[Any]], dtype: str) -> str:
    """Return zipnn's size of the tensors in one buffer, which it takes for floats of that type."""
    raw = b"".join(t.tobytes() for t in tensors)
    try:
        encode, _ = rivals.make("zipnn", "", dtype, 1)
    except (rivals.NotSupportedError, ImportError):
        return ""
    return f"{100 * len(encode(bytearray(raw))) / len(raw):.2f}"


def digits(percent: float) -> str:
    """Return a percentage with as many digits as tell."""
    return f"{percent:.2f}" if percent >= 1 else f"{percent:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--doc", type=Path, help="a document whose section `structured` gets the table")
    a = parser.parse_args()
    common.pin(1)
    rows: list[dict[str, Any]] = []
    second = ""
    facts = common.facts()
    for name, dtype, tensors in make(a.data):
        common.say(name)
        tensors = [np.ascontiguousarray(t) for t in tensors]
        data = as_file(tensors, dtype)
        n = sum(t.nbytes for t in tensors)
        found = {level: packed(data, level) for level in LEVELS}
        encode, decode = speeds(tensors, dtype, a.repeat)
        zipnn = zipnn_percent(tensors, dtype)
        rival, which, goal = KNOWN.get(name, (float(zipnn or 0), "zipnn", float(zipnn) if zipnn else None))
        row: dict[str, Any] = {"input": name, "bytes": n}
        row |= {level: digits(100 * chunks / n) for level, (chunks, _) in found.items()}
        row |= {"file": digits(100 * found["default"][1] / len(data)), "zipnn": zipnn}
        row |= {"rival": f"{rival:.2f} {which}" if which else "", "target": "" if goal is None else f"{goal:.4g}"}
        size = 100 * found["default"][0] / n
        row["reached"] = "" if goal is None else "yes" if float(f"{size:.4g}") <= float(f"{goal:.4g}") else "NO"
        if name.startswith("tied"):
            extra = found["default"][1] - packed(as_file(tensors[:1], dtype), "default")[1]
            row |= {"target": f"{TIED} bytes", "reached": "yes" if extra < TIED else "NO"}
            second = f"The second copy of the tied embedding takes {extra} bytes of the archive. "
        rows.append(facts | row | {"encode": f"{encode:.2f}", "decode": f"{decode:.2f}"})
    shown = ("input", *LEVELS, "file", "zipnn", "rival", "target", "reached", "encode", "decode")
    columns = ["input", *(f">{level} %" for level in LEVELS), ">file, default %", ">zipnn %", ">best rival %"]
    columns += [">target %", "reached", ">encode GB/s", ">decode GB/s"]
    text = common.markdown(columns, ([r[f] for f in shown] for r in rows))
    text += f"\n{second}" + common.stamp(common.command_line("structured.py"))
    print(text)
    if a.csv:
        common.write_csv(a.csv, rows)
    if a.doc:
        common.replace_section(a.doc, "structured", text)


if __name__ == "__main__":
    main()
