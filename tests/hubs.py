"""What the tests of hubs share: small families of models, and a folder's bytes and times."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

SHAPES = {"emb.weight": (300, 64), **{f"layers.{i}.w": (96, 128) for i in range(3)}, "norm": (64,)}


def weights(seed: int, moved: float = 0.0, noise: int = 0) -> dict[str, np.ndarray]:
    """Tensors of a base (by `seed`), each element moved by normal steps of that size (by `noise`)."""
    rng = np.random.default_rng(seed)
    base = {name: (rng.standard_normal(shape) * 0.02).astype(np.float32) for name, shape in SHAPES.items()}
    other = np.random.default_rng(1000 + noise)
    return {name: w + np.float32(moved) * other.standard_normal(w.shape).astype(np.float32) for name, w in base.items()}


def write_model(folder: Path, tensors: dict[str, np.ndarray], shards: int = 1, config: Any = None) -> None:
    """Write a model folder."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    for i in range(shards):
        part = {name: np.ascontiguousarray(tensors[name]) for name in names[i::shards]}
        save_file(part, folder / (f"part-{i}-of-{shards}.safetensors" if shards > 1 else "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(config or {"model": folder.name}))


def write_hub(root: Path) -> None:
    """A base, two fine-tunes of it (one in shards of other names), a model of the same shapes by itself, a stray file."""
    write_model(root / "fam" / "plain", weights(1))
    write_model(root / "fam" / "tuned", weights(1, 1e-4, 1))
    write_model(root / "sharded", weights(1, 1e-4, 2), shards=2)
    write_model(root / "other", weights(2))
    (root / "README.md").write_text("a hub\n")


def contents(root: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of every file below a folder."""
    return {p.relative_to(root).as_posix(): (p.read_bytes(), p.stat().st_mtime_ns) for p in root.rglob("*") if p.is_file()}


def die_at_one(item: int) -> int:
    """A task of an engine; here, where little is imported, for processes are started to do it."""
    if item == 1:
        os._exit(1)
    if item == 2:
        raise ValueError("two")
    return item * item
