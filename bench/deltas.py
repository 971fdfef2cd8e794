"""Differences between checkpoints and from base models: every row of the table of targets, beside what rivals store.

    python bench/deltas.py RUN MINILM SCRATCH [--only WORD] [--levels default,max] [--csv OUT] [--doc DOCUMENT.md]

RUN has the checkpoints that the training run of a small GPT wrote (bf16_stepNNNNN.safetensors, stepNNNNN.safetensors), MINILM
the model's folder and, beside it, minilm_bf16.safetensors as data.py casts it. tzip's size is all of the archive of
`tzip pack NEW --base OLD`, in % of NEW, and every archive is read back and compared; its speeds are MB of NEW per second of
CPU time for packing (hashes, proof and the search for predictors included) and for reading all of it. Rivals compress the xor
of the two files' tensors, z4ai its own difference; those not installed are left out. "wanted" are the figures to reach.

Speeds are of one run, after one that compiles. With --csv the rows of cases that are not run stay as they are in OUT.
"""

import argparse
import csv
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import common
import numpy as np
import rivals

FIELDS = ("case", "tool", "size %", "wanted", "pack MB/s", "read MB/s")


class Case(NamedTuple):
    """What is packed against what (None: nothing); `wanted` by level, in %."""

    name: str
    new: Path
    old: Path | None
    wanted: dict[str, float]


def pairs(run: Path) -> Iterator[Case]:
    """Yield the training run's rows."""
    for old, default, most in ((239, 6.9, 6.7), (238, 10.0, 9.7), (220, 24.7, 20.0)):
        files = (run / f"bf16_step{step:05}.safetensors" for step in (240, old))
        yield Case(f"bf16 weights, {old} → 240", *files, {"default": default, "max": most})
    for old, default, most in ((239, 29.0, 27.8), (238, 66.5, 64.5), (220, 73.0, 71.5)):
        files = (run / f"step{step:05}.safetensors" for step in (240, old))
        yield Case(f"float32 state, {old} → 240", *files, {"default": default, "max": most})
    yield Case("float32 state, alone", run / "step00240.safetensors", None, {"default": 81.0, "max": 80.6})


def adapters(model: Path, scratch: Path) -> Iterator[Case]:
    """Yield MiniLM with an adapter of rank 16 merged into all linear layers by peft."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from transformers import AutoModel

    for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        base = scratch / f"base_{kind}.safetensors"
        for change in (1e-3, 1e-2):
            torch.manual_seed(0)
            plain = AutoModel.from_pretrained(model).to(dtype)
            save_file({k: v.contiguous() for k, v in plain.state_dict().items() if v.is_floating_point()}, base)
            adapted = get_peft_model(plain.float(), LoraConfig(r=16, target_modules="all-linear"))
            with torch.no_grad():
                for module in adapted.modules():
                    if hasattr(module, "lora_B"):
                        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
                        b.normal_()
                        b *= change * module.base_layer.weight.norm() / (b @ a * module.scaling["default"]).norm()
            merged = adapted.merge_and_unload().to(dtype).state_dict()
            new = scratch / f"merged_{kind}_{change:g}.safetensors"
            save_file({k: v.contiguous() for k, v in merged.items() if v.is_floating_point()}, new)
            wanted = {"fp32": {"default": 11.0, "max": 10.5}, "bf16": {"default": 9.0, "max": 8.5}}[kind]
            yield Case(f"MiniLM {kind}, merged adapter, change {change:g}", new, base, wanted)


def changes(run: Path, scratch: Path) -> Iterator[Case]:
    """Yield weights of which a share is changed at random; wanted is what the positions and the new values tell, and 5 %."""
    weights = np.frombuffer(common.load_by_dtype(run / "bf16_step00240.safetensors", 0)[0]["BF16"], np.uint16)[: 1 << 22]
    old = _one(scratch / "before.safetensors", weights)
    for share in (0.01, 0.05, 0.2):
        rng = np.random.default_rng(0)
        where = rng.random(weights.size) < share
        for what, bits, moved in (
            ("one unit up or down", 1, weights + rng.choice(np.array([1, 65535], np.uint16), weights.size)),
            ("random values", 16, rng.integers(0, 65536, weights.size, np.uint16)),
        ):
            new = _one(scratch / f"{what[:3]}{share}.safetensors", np.where(where, moved, weights))
            entropy = -(share * np.log2(share) + (1 - share) * np.log2(1 - share)) + share * bits
            yield Case(f"bf16, {share:.0%} changed, {what}", new, old, {"default": round(105 * float(entropy) / 16, 3)})
    # As z4ai's own tests make theirs: normal weights, of which some are nudged before they are rounded.
    base = np.random.default_rng(0).standard_normal(4_400_000, np.float32) * np.float32(0.02)
    old = _one(scratch / "z4ai.safetensors", _bf16(base))
    for share in (0.01, 0.05, 0.2):
        rng = np.random.default_rng(7)
        nudges = rng.standard_normal(base.size, np.float32) * np.float32(1e-4)
        nudged = base + nudges * (rng.random(base.size) < share)
        new = _one(scratch / f"z4ai{share}.safetensors", _bf16(nudged.astype(np.float32)))
        yield Case(f"bf16, z4ai's kind of data, {share:.0%} nudged", new, old, {})


def unchanged(run: Path, scratch: Path) -> Iterator[Case]:
    """Yield a file of a million elements against its copy: all that its archive has is what a difference costs at least."""
    weights = np.frombuffer(common.load_by_dtype(run / "bf16_step00240.safetensors", 0)[0]["BF16"], np.uint16)[: 1 << 20]
    old, new = (_one(scratch / f"{name}.safetensors", weights) for name in ("copy", "same"))
    yield Case("bf16, a tensor unchanged", new, old, {})


def _bf16(values: np.ndarray) -> np.ndarray:
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def _one(path: Path, words: np.ndarray) -> Path:
    with path.open("wb") as file:
        common.write_header(file, [("w", "BF16", words.shape, words.nbytes)])
        file.write(words.tobytes())
    return path


def measure(case: Case, level: str) -> dict[str, str]:
    """Return a row of tzip's."""
    import tzip

    out = io.BytesIO()
    start = time.process_time()
    report = tzip.pack(case.new, out, base=case.old, level=level, threads=1)
    packing = time.process_time() - start
    start = time.process_time()
    with tzip.open(out.getvalue(), base=case.old) as archive:
        content = archive.member_bytes(case.new.name)
    reading = time.process_time() - start
    if content != case.new.read_bytes():
        raise SystemExit("WRONG BYTES")
    size, wanted = 100 * report.bytes_out / report.bytes_in, case.wanted.get(level)
    speeds = (f"{report.bytes_in / seconds / 1e6:.0f}" for seconds in (packing, reading))
    shown = f"{size:.2f}" if size >= 0.1 else f"{size:.4f}"
    return dict(zip(FIELDS, (case.name, f"tzip {level}", shown, f"≤ {wanted:g}" if wanted else "", *speeds), strict=True))


def others(case: Case) -> Iterator[dict[str, str]]:
    """Yield rows of those rivals that are installed."""
    assert case.old is not None
    new, old = common.load_by_dtype(case.new, 0)[0], common.load_by_dtype(case.old, 0)[0]
    xor = {kind: (np.frombuffer(raw, np.uint8) ^ np.frombuffer(old[kind], np.uint8)).tobytes() for kind, raw in new.items()}
    makers: list[tuple[str, Callable[[str], int]]] = [
        ("xor, zstd 3", lambda kind: len(rivals.make("zstd", "3", kind, 1)[0](bytearray(xor[kind])))),
        ("xor, zipnn", lambda kind: len(rivals.make("zipnn", "", kind, 1)[0](bytearray(xor[kind])))),
        ("z4ai", lambda kind: _z4ai(new[kind], old[kind], kind)),
    ]
    for tool, packed in makers:
        try:
            stored = sum(map(packed, new))
        except (ImportError, rivals.NotSupportedError) as e:
            common.say(f"{tool}: not measured: {e}")
            continue
        size = 100 * stored / sum(map(len, new.values()))
        yield dict.fromkeys(FIELDS, "") | {"case": case.name, "tool": tool, "size %": f"{size:.2f}"}


def _z4ai(new: bytes, old: bytes, kind: str) -> int:
    import z4ai

    name = {"F32": "fp32", "BF16": "bf16"}[kind]
    packed = z4ai.compress_delta(new, old, dtype=name)
    if bytes(z4ai.decompress_delta(packed, old)) != new:
        raise SystemExit("z4ai: WRONG BYTES")
    return len(packed)


def main() -> None:
    """Make, measure, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("minilm", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--only", default="", help="cases whose name has this word")
    parser.add_argument("--levels", default="default,max")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--doc", type=Path, help="a document whose section `deltas` gets the table")
    a = parser.parse_args()
    a.scratch.mkdir(parents=True, exist_ok=True)
    common.pin(1)
    groups = [changes(a.run, a.scratch), unchanged(a.run, a.scratch), pairs(a.run)]
    if a.only in "MiniLM":
        groups.append(adapters(a.minilm, a.scratch))
    made: dict[str, list[dict[str, str]]] = {}
    if a.csv and a.csv.exists():
        with a.csv.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                made.setdefault(row["case"], []).append(row)
    warm = False
    for case in (case for group in groups for case in group):
        if a.only not in case.name:
            continue
        if not warm:
            warm = bool(measure(case, "default"))  # compiles
        rows = [measure(case, level) for level in a.levels.split(",")]
        if case.old is not None:
            rows += others(case)
        for row in rows:
            common.say(" | ".join(row.values()))
        made[case.name] = [common.facts() | row for row in rows]
        tell(made, a.csv, a.doc)


def tell(made: dict[str, list[dict[str, str]]], file: Path | None, document: Path | None) -> None:
    """Write all rows: after each case, for some take minutes."""
    ordered = sorted(made.values(), key=lambda rows: _place(rows[0]["case"]))
    text = common.markdown(
        ["case", "tool", ">size %", ">wanted", ">pack MB/s", ">read MB/s"],
        ([row[f] for f in FIELDS] for rows in ordered for row in rows),
    )
    text += "\n" + common.stamp(common.command_line("deltas.py"))
    if file:
        common.write_csv(file, [row for rows in ordered for row in rows])
    if document:
        common.replace_section(document, "deltas", text)
    if not file and not document:
        print(text)


def _place(case: str) -> int:
    return next(i for i, word in enumerate(("weights", "state", "MiniLM", " changed", "z4ai", "")) if word in case)


if __name__ == "__main__":
    main()
