"""Symbols of a segment, joined mantissa bits and codec: size and speed of every combination, portable and native.

    python bench/segments.py FILE [--repeat 5] [--csv OUT] [--doc DOCUMENT.md]

Chunks of 2^20 elements of the file's main element type are encoded and decoded one after another on one core, into
memory that exists. Sizes are those of whole chunk records; decoding includes both sums. Encoding here does not include
the decoding that packing adds. The clock is the CPU time of the process. "generic" is the same run in a process for
which numba compiles for any CPU of this architecture (NUMBA_CPU_NAME=generic), with a cache of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import common

CODINGS = {"BF16": ("bf16", 2), "F16": ("f16", 2), "F32": ("f32", 4)}
SEGMENTS = (1 << 12, 1 << 14, 1 << 16)  # at most: a group has four segments or more
JOINED = (0, 2)


def work(path: str, repeat: int) -> None:
    """Measure all combinations; print one JSON list."""
    common.pin(1)
    import numpy as np

    from tzip.chunks import SLACK, decode_chunk
    from tzip.coders.registry import HUFFMAN, RANS
    from tzip.encoding import encode_chunk
    from tzip.formats.layout import CHUNK_ELEMENTS
    from tzip.plan import LEVELS

    dtype, data = max(common.load_by_dtype(path)[0].items(), key=lambda kv: len(kv[1]))
    coding, width = CODINGS[dtype]
    step = CHUNK_ELEMENTS * width
    raw = np.frombuffer(data, np.uint8)
    chunks = [raw[i : i + step].copy() for i in range(0, raw.size, step)]
    out = np.ones(step, np.uint8)
    grid = [(s, j, c) for c in (HUFFMAN, RANS) for j in JOINED for s in SEGMENTS]
    best: dict[tuple[int, int, int], list[float]] = {}
    for number in range(repeat + 1):  # rounds over the whole grid, so that a disturbance hits all alike; the first is warm-up
        for key in grid:
            segment, joined, codec = key
            level = replace(LEVELS["default"], name="bench", joined=(joined,), codecs=(codec,), segment=segment)
            encoding, decoding = common.Clock(1), common.Clock(1)
            records = encoding.timed(
                lambda: [encode_chunk(c, width, coding, level, 0, i).record for i, c in enumerate(chunks)]  # noqa: B023
            )
            buffers = [np.frombuffer(bytes(r) + bytes(SLACK), np.uint8) for r in records]
            stored = sum(map(len, records))
            for i, (buffer, chunk) in enumerate(zip(buffers, chunks, strict=True)):
                part = out[: chunk.size]
                decoding.timed(
                    lambda: decode_chunk(buffer, len(records[i]), 0, i, chunk.size // width, width, part)  # noqa: B023
                )
                if not np.array_equal(part, chunk):
                    raise SystemExit("WRONG BYTES")
            if number:
                took = [sum(encoding.seconds), sum(decoding.seconds)]
                old = best.get(key, [stored, *took])
                best[key] = [stored, min(old[1], took[0]), min(old[2], took[1])]
    rows = [
        {
            "codec": "Huffman" if c == HUFFMAN else "rANS", "joined": j, "segment": s,
            "percent": f"{100 * v[0] / raw.size:.3f}", "encode": f"{raw.size / v[1] / 1e9:.3f}",
            "decode": f"{raw.size / v[2] / 1e9:.3f}",
        }
        for (s, j, c), v in best.items()
    ]  # fmt: skip
    print(json.dumps(rows))


def run(path: Path, repeat: int, cpu: str) -> list[dict[str, Any]]:
    """Measure in a process for which numba compiles for that CPU ("" = this one)."""
    call = [sys.executable, os.path.abspath(__file__), "--worker", str(path), str(repeat)]
    with tempfile.TemporaryDirectory() as cache:
        env = dict(os.environ)
        if cpu:
            env |= {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": cache}
        child = subprocess.run(call, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(child.stdout.splitlines()[-1])


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], int(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--doc", type=Path, help="a document whose section `segments` gets the table")
    a = parser.parse_args()
    native, generic = run(a.file, a.repeat, ""), run(a.file, a.repeat, "generic")
    rows, lines = [], []
    for n, g in zip(native, generic, strict=True):
        assert n["percent"] == g["percent"], "sizes depend on the CPU"
        rows.append(
            common.facts() | {"file": a.file.name} | n | {"encode_generic": g["encode"], "decode_generic": g["decode"]}
        )
        lines.append(
            (
                n["codec"],
                n["joined"],
                f"2^{n['segment'].bit_length() - 1}",
                n["percent"],
                n["decode"],
                n["encode"],
                g["decode"],
                g["encode"],
            )
        )
    columns = ("codec", ">joined", ">segment", ">size %", ">decode", ">encode", ">decode, generic", ">encode, generic")
    text = common.markdown(columns, lines) + "\nGB/s. " + common.stamp(common.command_line("segments.py"))
    print(text)
    if a.csv:
        common.write_csv(a.csv, rows)
    if a.doc:
        common.replace_section(a.doc, "segments", text)


if __name__ == "__main__":
    main()
