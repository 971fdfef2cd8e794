"""What every container gains: the same weights written by the real libraries, packed by tzip and by zstd -19.

    python bench/containers.py DATA SCRATCH [--run STEP.safetensors] [--earlier CSV] [--csv OUT] [--doc DOCUMENT.md]

DATA has MiniLM as data.py makes it. "safetensors %" is what the same tensors take in a safetensors file: the mark for each
container of floats. "tensors" counts those that can be read by themselves, "delta %" is the file as a difference from
itself with one unit in the last place changed in a tenth of its floats, "look" the CPU time to recognise the file as a share
of that to pack it, each the best of several. Every file is unpacked and compared. The folder holds the same weights as .pt and
as .safetensors. zstd -19 takes most of the time: with --earlier its sizes are those of another run with the same library, for
files of the same name and size.
"""

import argparse
import csv
import io
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import common
import numpy as np


def write_all(data: Path, run: Path | None, out: Path) -> list[tuple[str, Path, Path]]:
    """Write the files; return (what, file, the same tensors as safetensors)."""
    import gguf
    import h5py
    import onnx
    import torch
    from onnx import numpy_helper
    from safetensors.numpy import save_file as save_numpy
    from safetensors.torch import load_file, save_file

    bf16 = load_file(data / "minilm_bf16.safetensors")
    fp32 = {k: v.float().numpy() for k, v in load_file(data / "minilm_fp32.safetensors").items() if v.is_floating_point()}
    half = {k: v.astype(np.float16) for k, v in fp32.items()}
    plain = {"bf16": out / "bf16.safetensors", "fp32": out / "fp32.safetensors", "half": out / "half.safetensors"}
    save_file(bf16, plain["bf16"])
    save_numpy(fp32, plain["fp32"])
    save_numpy(half, plain["half"])
    rows = [("safetensors, bfloat16", plain["bf16"], plain["bf16"])]

    def add(what: str, name: str, mark: str) -> Path:
        rows.append((what, out / name, plain[mark]))
        return out / name

    torch.save(bf16, add("PyTorch, bfloat16", "model.pt", "bf16"))
    torch.save(bf16, add("PyTorch, legacy form", "legacy.pt", "bf16"), _use_new_zipfile_serialization=False)
    if run is not None:
        state = load_file(run)
        plain["adam"] = run
        nested: dict[str, dict[str, Any]] = {}
        for name, value in state.items():
            kind, _, rest = name.partition(".")
            nested.setdefault(kind, {})[rest] = value
        torch.save(nested, add("PyTorch, weights and AdamW's state, float32", "checkpoint.pt", "adam"))
    np.savez(add("numpy .npz, float32", "model.npz", "fp32"), **fp32)
    name, largest = max(fp32.items(), key=lambda item: item[1].size)
    np.save(add("numpy .npy, column-major, float32", "table.npy", "fp32"), np.asfortranarray(largest))
    plain["table"] = out / "table.safetensors"
    save_numpy({name: largest}, plain["table"])
    rows[-1] = (rows[-1][0], rows[-1][1], plain["table"])
    types = gguf.GGMLQuantizationType
    for what, kind in (("GGUF, F16", None), ("GGUF, Q8_0", types.Q8_0), ("GGUF, Q4_0", types.Q4_0)):
        path = add(what, f"{what.split()[1]}.gguf", "half")
        writer = gguf.GGUFWriter(path, "bert")
        for name, value in half.items():
            if kind is not None and value.ndim == 2 and value.shape[1] % 32 == 0:
                writer.add_tensor(name, gguf.quants.quantize(fp32[name], kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    graph = onnx.helper.make_graph([], "g", [], [], [numpy_helper.from_array(v, k) for k, v in fp32.items()])
    onnx.save(onnx.helper.make_model(graph), add("ONNX, float32", "model.onnx", "fp32"))
    with h5py.File(add("HDF5, float32", "model.h5", "fp32"), "w") as h5:
        for name, value in fp32.items():
            h5[name.replace(".", "/")] = value
    with tarfile.open(add("tar of safetensors, bfloat16", "model.tar", "bf16"), "w") as tar:
        tar.add(plain["bf16"], "model.safetensors")
    with zipfile.ZipFile(add("zip (stored) of safetensors, bfloat16", "model.zip", "bf16"), "w") as archive:
        archive.write(plain["bf16"], "model.safetensors")
    return rows


def moved(path: Path, regions: list[Any]) -> bytes:
    """Return the file with a tenth of its floats moved by one unit in the last place."""
    raw = np.fromfile(path, np.uint8)
    rng = np.random.default_rng(0)
    for region in regions:
        if region.dtype.coding in ("bf16", "f16", "f32", "f64"):
            words = raw[region.begin : region.end].copy().view(f"<u{region.dtype.width}")
            words ^= (rng.random(words.size) < 0.1).astype(words.dtype)
            raw[region.begin : region.end] = words.view(np.uint8)
    return raw.tobytes()


def zstd_sizes(earlier: Path | None) -> dict[tuple[str, str], str]:
    """Return what zstd -19 made of files in a run with the zstandard that is installed, by what they are and their bytes."""
    if earlier is None:
        return {}
    with earlier.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["zstandard"] == common.versions()["zstandard"]]
    return {(row["file"], row["bytes"]): row["zstd19"] for row in rows}


def measure(what: str, path: Path, plain: Path, marks: dict[Path, float], known: dict[tuple[str, str], str]) -> dict[str, Any]:
    """Return a row of the table."""
    import zstandard

    import tzip
    from tzip.formats.recognising import recognise
    from tzip.formats.source import open_source

    data = path.read_bytes()
    tzip.pack(data, io.BytesIO(), name="x", threads=1)  # compile
    look = took = 1e9
    for _ in range(40):
        start = time.process_time()
        with open_source(path) as source:
            found = recognise(source.read_at, source.size)
        look = min(look, time.process_time() - start)
    for _ in range(4):
        packed = io.BytesIO()
        start = time.process_time()
        tzip.pack(path, packed, threads=1)
        took = min(took, time.process_time() - start)
    with tzip.open(packed.getvalue()) as archive:
        if archive.member_bytes(path.name) != data:
            raise SystemExit("WRONG BYTES")
        tensors = len(archive)
    if plain not in marks:
        out = io.BytesIO()
        tzip.pack(plain, out, threads=1)
        marks[plain] = 100 * len(out.getvalue()) / plain.stat().st_size
    delta = io.BytesIO()
    tzip.pack(moved(path, found.regions), delta, name=path.name, base=path, threads=1)
    small = known.get((what, str(len(data))))
    if small is None:
        small = f"{100 * len(zstandard.ZstdCompressor(level=19, threads=2).compress(data)) / len(data):.2f}"
    return {
        "file": what, "bytes": len(data), "zstd19": small,
        "tzip": f"{100 * len(packed.getvalue()) / len(data):.2f}", "safetensors": f"{marks[plain]:.2f}",
        "tensors": tensors, "delta": f"{100 * len(delta.getvalue()) / len(data):.2f}", "look": f"{100 * look / took:.2f}",
    }  # fmt: skip


def main() -> None:
    """Write, measure, tell."""
    import tzip

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--earlier", type=Path)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--doc", type=Path, help="a document whose section `containers` gets the table")
    options = parser.parse_args()
    folder = options.scratch / "containers"
    folder.mkdir(parents=True, exist_ok=True)
    marks: dict[Path, float] = {}
    known = zstd_sizes(options.earlier)
    rows = [measure(*row, marks, known) for row in write_all(options.data, options.run, folder)]
    both = folder / "both"
    both.mkdir(exist_ok=True)
    for name in ("model.pt", "bf16.safetensors"):
        (folder / name).replace(both / name)
    report = tzip.pack(both, folder / "both.tzip", force=True, threads=1)
    size = sum(p.stat().st_size for p in both.iterdir())
    share = f"{100 * report.bytes_out / size:.2f}"
    rows.append({"file": "folder: the same as .pt and .safetensors", "bytes": size, "tzip": share})
    fields = ("file", "bytes", "zstd19", "tzip", "safetensors", "tensors", "delta", "look")
    text = common.markdown(
        ("file", ">bytes", ">zstd -19 %", ">tzip %", ">as safetensors %", ">tensors", ">delta %", ">look %"),
        ([row.get(f, "") for f in fields] for row in rows),
    )
    text += "\n" + common.stamp(common.command_line("containers.py"))
    print(text)
    if options.csv:
        common.write_csv(options.csv, [common.facts() | {f: row.get(f, "") for f in fields} for row in rows])
    if options.doc:
        common.replace_section(options.doc, "containers", text)


if __name__ == "__main__":
    main()
