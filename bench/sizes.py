"""Sizes as data: what small fixed inputs come to at every level, compared with sizes.csv.

    python bench/sizes.py            exits 1 when a size differs
    python bench/sizes.py --write    takes today's sizes as the right ones: look at the difference before committing

Inputs come from raw 64-bit words of PCG64 through integer operations only, so that they are the same everywhere.
`chunks` are the bytes of all chunk records and must be equal, unless zstandard has a part in them. `archive` is the
whole archive; its index may be a zstandard frame, whose size varies with the library's version: it may differ by 2 %
(at least 64 bytes).
"""

import argparse
import csv
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import tzip
from tzip.plan import LEVELS

HERE = Path(__file__).parent
FIELDS = ("input", "level", "bytes_in", "chunks", "archive", "zstd")
U64 = NDArray[np.uint64]


def words(seed: int, n: int) -> U64:
    """Return n words of 64 random bits."""
    return np.random.PCG64(seed).random_raw(n)


def geometric(w: U64) -> U64:
    """Return how many of the low 16 bits are zero before the first one: half are 0, a quarter 1, …, at most 16."""
    low = w & np.uint64(0xFFFF)
    count = np.zeros(w.size, np.uint64)
    for k in range(1, 17):
        count += (low & np.uint64((1 << k) - 1)) == 0
    return count


def floats(seed: int, n: int, exponent_bits: int, mantissa_bits: int, top: int) -> U64:
    """Return bit patterns of weights: exponents geometric below `top`, mantissas and signs even."""
    w = words(seed, n)
    exponent = np.uint64(top) - geometric(w)
    mantissa = (w >> np.uint64(16) if mantissa_bits < 48 else words(seed + 1000, n)) & np.uint64((1 << mantissa_bits) - 1)
    # Small mantissas are more frequent, as in real weights: every fourth loses its top bit.
    mantissa &= ~((w >> np.uint64(62) == 0).astype(np.uint64) << np.uint64(mantissa_bits - 1))
    sign = w >> np.uint64(61) & np.uint64(1)
    return sign << np.uint64(exponent_bits + mantissa_bits) | exponent << np.uint64(mantissa_bits) | mantissa


def bf16(seed: int, n: int) -> NDArray[np.uint16]:
    return floats(seed, n, 8, 7, 124).astype(np.uint16)


def f16(seed: int, n: int) -> NDArray[np.uint16]:
    return floats(seed, n, 5, 10, 17).astype(np.uint16)


def f32(seed: int, n: int) -> NDArray[np.uint32]:
    return floats(seed, n, 8, 23, 124).astype(np.uint32)


def sparse(seed: int, n: int) -> NDArray[np.uint16]:
    """Return bf16 of which 7 of 8 are zero."""
    return np.where(words(seed, n) & np.uint64(7) == 0, bf16(seed + 1, n), np.uint16(0))


def scaled(seed: int, n: int) -> NDArray[np.uint16]:
    """Return bf16 whose scale changes at half: tables change within a chunk."""
    x = bf16(seed, n)
    x[n // 2 :] -= np.uint16(9 << 7)
    return x


def small_ints(seed: int, n: int) -> NDArray[np.uint64]:
    return words(seed, n) % np.uint64(30522)


def bell(seed: int, n: int) -> NDArray[np.uint8]:
    """Return bytes of a bell shape about 0, as quantized weights have."""
    w = words(seed, n)
    total = np.zeros(n, np.uint64)
    for shift in range(0, 64, 8):
        total += w >> np.uint64(shift) & np.uint64(31)
    return (total - np.uint64(124)).astype(np.uint8)


def text(seed: int, n: int) -> NDArray[np.uint8]:
    """Return text of 64 words, repeated at random."""
    chosen = words(seed, n // 4) % np.uint64(64)
    return np.frombuffer(b" ".join(b"w%dx" % (k * k) for k in chosen.tolist())[:n], np.uint8)


N = 150_000  # above one group of 2^17, and no multiple of anything
INPUTS: dict[str, tuple[str, Callable[[], NDArray[Any]]]] = {
    "bf16 weights": ("BF16", lambda: bf16(1, N)),
    "bf16, two scales": ("BF16", lambda: scaled(2, 2 * N)),
    "bf16, 7 of 8 zero": ("BF16", lambda: sparse(3, N)),
    "bf16, no sign": ("BF16", lambda: bf16(5, N) & np.uint16(0x7FFF)),
    "bf16, constant": ("BF16", lambda: np.full(N, 0x3F80, np.uint16)),
    "bf16 of random bits": ("BF16", lambda: words(6, N).astype(np.uint16)),
    "bf16, one element": ("BF16", lambda: bf16(7, 1)),
    "bf16, 1000 elements": ("BF16", lambda: bf16(8, 1000)),
    "f16 weights": ("F16", lambda: f16(9, N)),
    "f32 weights": ("F32", lambda: f32(10, N)),
    "f32, bf16 inside": ("F32", lambda: bf16(11, N).astype(np.uint32) << np.uint32(16)),
    "f32, low bytes few": ("F32", lambda: f32(12, N) & np.uint32(0xFFFFE000)),
    "f32, no sign": ("F32", lambda: f32(13, N) & np.uint32(0x7FFFFFFF)),
    "f64 weights": ("F64", lambda: floats(14, 40_000, 11, 52, 1020)),
    "c64": ("C64", lambda: f32(16, 80_000)),
    "int8 weights": ("I8", lambda: bell(17, 2 * N)),
    "fp8 weights": ("F8_E4M3", lambda: (bf16(18, 2 * N) >> np.uint16(4)).astype(np.uint8)),
    "f4, two a byte": ("F4", lambda: (bell(19, N) & np.uint8(7)) | (bell(20, N) & np.uint8(7)) << np.uint8(4)),
    "int64 ids": ("I64", lambda: small_ints(21, 40_000)),
    "int64 positions": ("I64", lambda: np.arange(40_000, dtype=np.uint64)),
    "int32, packed int4": ("I32", lambda: words(22, 80_000).astype(np.uint32)),
    "bool mask": ("BOOL", lambda: (words(23, N) & np.uint64(3) == 0).astype(np.uint8)),
    "text": ("opaque", lambda: text(24, 200_000)),
    "random bytes": ("opaque", lambda: words(25, 25_000).view(np.uint8)),
    "empty": ("opaque", lambda: np.empty(0, np.uint8)),
}


def pack(dtype: str, raw: NDArray[np.uint8], level: str) -> bytes:
    """Return the archive of an input."""
    if dtype != "opaque":
        packed = tzip.encode(raw, level=level, dtype=dtype)
        with tzip.open(packed) as archive:
            restored = archive.tensor("").raw()
    else:
        out = io.BytesIO()
        tzip.pack(raw.tobytes(), out, level=level, threads=1, name="data")
        packed = out.getvalue()
        with tzip.open(packed) as archive:
            restored = np.frombuffer(archive.member_bytes("data"), np.uint8)
    if restored.tobytes() != raw.tobytes():
        raise SystemExit(f"WRONG BYTES: {dtype} at {level}")
    return packed


def measure() -> list[dict[str, str]]:
    """Return a row for every input and level."""
    rows = []
    for name, (dtype, make) in INPUTS.items():
        raw = np.ascontiguousarray(make()).view(np.uint8)
        for level in LEVELS:
            packed = pack(dtype, raw, level)
            with tzip.open(packed) as archive:
                index = archive.reader.index
                chunks = int(index["c_length"].sum())
                zstd = bool((index["c_codecs"] >> 2 & 1).any())
            values = (name, level, raw.size, chunks, len(packed), "yes" if zstd else "no")
            rows.append(dict(zip(FIELDS, map(str, values), strict=True)))
    return rows


def differs(old: dict[str, str], new: dict[str, str]) -> bool:
    """Say whether a row is not what it was."""
    if any(old[f] != new[f] for f in ("bytes_in", "zstd")) or (new["zstd"] == "no" and old["chunks"] != new["chunks"]):
        return True
    return any(abs(int(old[f]) - int(new[f])) > max(64, int(old[f]) // 50) for f in ("chunks", "archive"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--file", type=Path, default=HERE / "sizes.csv")
    a = parser.parse_args()
    rows = measure()
    known: dict[tuple[str, str], dict[str, str]] = {}
    if a.file.exists():
        with open(a.file, newline="", encoding="utf-8") as file:
            known = {(r["input"], r["level"]): r for r in csv.DictReader(file)}
    wrong = 0
    for row in rows:
        old = known.pop((row["input"], row["level"]), None)
        if old is None or differs(old, row):
            wrong += 1
            was = f"{old['chunks']} in chunks, {old['archive']} in all" if old else "not known"
            print(f"{row['input']}, {row['level']}: {was} -> {row['chunks']}, {row['archive']}")
    for name, level in known:
        wrong += 1
        print(f"{name}, {level}: no longer measured")
    if a.write:
        with open(a.file, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    elif wrong:
        print(f"{wrong} of {len(rows)} sizes differ")
        sys.exit(1)


if __name__ == "__main__":
    main()
