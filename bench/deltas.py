"""Differences between checkpoints of a training run: sizes and speeds beside those of rivals on the xor of the same bytes.

    python bench/deltas.py NEW OLD... [--levels default] [--repeat 5] [--csv OUT] [--doc DOCUMENT.md]

NEW and the OLD files are safetensors files with the same tensors. tzip's size is that of `tzip pack NEW --base OLD`, all of it;
its speeds are those of encoding (without proof) and decoding the chunks of the tensors of 65,536 elements or more, the base in
memory, one core, best of the repeats, GB/s of NEW. Rivals compress the xor of all tensors of the two files in one buffer; the
time of the xor is left out.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import common
import numpy as np
import rivals


def chunks_of(new: Path, old: Path) -> list[tuple[np.ndarray, np.ndarray, str, int]]:
    """Return (elements, those of the base, coding, width) of every chunk of the large tensors."""
    from tzip.formats.dtypes import BY_NAME
    from tzip.formats.layout import CHUNK_ELEMENTS

    a, b = (np.fromfile(path, np.uint8) for path in (new, old))
    before = {span.name: span for span in common.read_header(old)}
    found = []
    for span in common.read_header(new):
        dtype, base = BY_NAME[span.dtype], before[span.name]
        step = CHUNK_ELEMENTS * dtype.width
        if span.end - span.begin < 65536 * dtype.width or base.end - base.begin != span.end - span.begin:
            continue
        x, y = a[span.begin : span.end].copy(), b[base.begin : base.end].copy()
        found += [(x[i : i + step], y[i : i + step], dtype.coding, dtype.width) for i in range(0, x.size, step)]
    return found


def speeds(new: Path, old: Path, level: str, repeat: int) -> tuple[float, float]:
    """Return GB/s of encoding and decoding."""
    from tzip.chunks import SLACK, decode_chunk
    from tzip.encoding import encode_chunk
    from tzip.plan import LEVELS

    jobs = chunks_of(new, old)
    total = sum(x.size for x, *_ in jobs)
    best = [float("inf")] * 2
    for _ in range(repeat + 1):
        spent = [0.0, 0.0]
        for x, y, coding, width in jobs:
            seconds, encoded = common.timed(lambda: encode_chunk(x, width, coding, LEVELS[level], 0, 0, 0, 0, y))  # noqa: B023
            spent[0] += seconds
            record = np.zeros(len(encoded.record) + SLACK, np.uint8)
            record[: len(encoded.record)] = np.frombuffer(encoded.record, np.uint8)
            out = np.empty(x.size, np.uint8)
            args = (record, len(encoded.record), 0, 0, x.size // width, width, out, None, y)
            seconds, _ = common.timed(lambda: decode_chunk(*args))  # noqa: B023
            spent[1] += seconds
            if not np.array_equal(out, x):
                raise SystemExit("WRONG BYTES")
        best = [min(a, b) for a, b in zip(best, spent, strict=True)]
    return total / best[0] / 1e9, total / best[1] / 1e9


def rival_rows(new: Path, old: Path, repeat: int) -> list[list[str]]:
    """Return rows of those rivals that are installed."""
    a, b = common.load_by_dtype(new, 0)[0], common.load_by_dtype(old, 0)[0]
    rows = []
    for name, option in (("zstd", "3"), ("zipnn", "")):
        stored = raw = 0
        encode_s = decode_s = 0.0
        try:
            for dtype, content in a.items():
                xor = (np.frombuffer(content, np.uint8) ^ np.frombuffer(b[dtype], np.uint8)).tobytes()
                encode, decode = rivals.make(name, option, dtype, 1)
                encodes, decodes = [], []
                for _ in range(repeat):
                    seconds, packed = common.timed(lambda: encode(bytearray(xor)))  # noqa: B023
                    encodes.append(seconds)
                    seconds, back = common.timed(lambda: decode(packed))  # noqa: B023
                    decodes.append(seconds)
                    if bytes(back) != xor:
                        raise SystemExit(f"{name}: WRONG BYTES")
                stored, raw = stored + len(packed), raw + len(xor)
                encode_s, decode_s = encode_s + min(encodes), decode_s + min(decodes)
        except (ImportError, rivals.NotSupportedError) as e:
            common.say(f"{name}: not measured: {e}")
            continue
        speed = [f"{raw / s / 1e9:.2f}" for s in (encode_s, decode_s)]
        rows.append([f"xor, {name} {option}".strip(), f"{100 * stored / raw:.2f}", *speed])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("new", type=Path)
    parser.add_argument("old", type=Path, nargs="+")
    parser.add_argument("--levels", default="default")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--doc", type=Path, help="a document whose section `deltas` gets the table")
    a = parser.parse_args()
    import tzip

    common.pin(1)
    rows: list[list[Any]] = []
    for old in a.old:
        pair = [a.new.name, old.name]
        for level in a.levels.split(","):
            with tempfile.TemporaryDirectory() as folder:
                report = tzip.pack(a.new, Path(folder) / "new.tzip", base=old, level=level)
            encode, decode = speeds(a.new, old, level, a.repeat)
            size = f"{100 * report.bytes_out / report.bytes_in:.2f}"
            rows.append([*pair, f"tzip {level}", size, f"{encode:.2f}", f"{decode:.2f}"])
        rows += [[*pair, *row] for row in rival_rows(a.new, old, a.repeat)]
    columns = ["new", "base", "tool", ">size %", ">encode GB/s", ">decode GB/s"]
    text = common.markdown(columns, rows) + "\n" + common.stamp(common.command_line("deltas.py"))
    print(text)
    if a.csv:
        keys = [c.removeprefix(">") for c in columns]
        common.write_csv(a.csv, [common.facts() | dict(zip(keys, row, strict=True)) for row in rows])
    if a.doc:
        common.replace_section(a.doc, "deltas", text)


if __name__ == "__main__":
    main()
