"""Packing a hub: a family of real fine-tunes beside zipnn, and a simulation of a cluster.

    python bench/hub.py make MINILM FOLDER [--steps 24]
    python bench/hub.py family FOLDER [--level default] [--csv OUT] [--doc DOCUMENT.md]
    python bench/hub.py record FOLDER TIMES.json
    python bench/hub.py simulate TIMES.json [--csv OUT] [--doc DOCUMENT.md]

`make` fine-tunes all-MiniLM-L6-v2 (MINILM: its folder as published) eight times with AdamW, each on other text (packages of
Python's own library) and at another learning rate from 1e-5 to 5e-4, linear decay, every second one with a weight decay of
0.01, the contrastive loss that sentence models are trained with; and once more by an adapter of rank 16 in the attention,
which is merged. FOLDER/fp32 and FOLDER/bf16 get ten model folders each, the model itself and its nine descendants, whose
names do not say what they are. It needs torch and transformers.

`family` packs each of the two as a hub (`tzip.pack_hub`, which finds the family by itself), restores every model from the
archives alone and compares every byte. zipnn gets all tensors of each model in one buffer for each element type, its best
case.

`record` packs models of several sizes, by themselves and as differences, and notes the CPU seconds of each; `simulate`
plays 1,000 models on 1 to 256 nodes with these times (see `Cluster` for what it knows and what it leaves out).
"""

import argparse
import hashlib
import heapq
import itertools
import json
import random
import shutil
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
import rivals

RATES = (1e-5, 2e-5, 3e-5, 5e-5, 1e-4, 2e-4, 3e-4, 5e-4)
TEXTS = ("asyncio", "email", "idlelib", "importlib", "multiprocessing", "tkinter", "unittest", "xml", "ctypes")
RANK = 16


# ---- making the family


def pairs_of(package: str) -> list[tuple[str, str]]:
    """Return each line of a package of Python's own library, and the next one, where both have some words."""
    found = []
    for file in sorted((Path(sysconfig.get_paths()["stdlib"]) / package).rglob("*.py")):
        lines = [line.strip() for line in file.read_text(errors="ignore").splitlines()]
        found += [(a, b) for a, b in itertools.pairwise(lines) if min(len(a.split()), len(b.split())) >= 4]
    return found


def batches(package: str, tokenizer: Any, steps: int) -> Iterator[list[Any]]:
    rng = random.Random(package)
    found = pairs_of(package)
    for _ in range(steps):
        sides = zip(*rng.sample(found, 16), strict=True)
        yield [tokenizer(list(s), padding=True, truncation=True, max_length=24, return_tensors="pt") for s in sides]


def train(model: Any, parameters: list[Any], package: str, tokenizer: Any, steps: int, rate: float, decay: float) -> None:
    """Train so that a line is nearer to the next one than to others."""
    import torch

    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / steps)
    model.train()
    for batch in batches(package, tokenizer, steps):
        means = []
        for side in batch:
            mask = side["attention_mask"].unsqueeze(-1)
            means.append((model(**side).last_hidden_state * mask).sum(1) / mask.sum(1))
        a, b = (torch.nn.functional.normalize(mean, dim=1) for mean in means)
        loss = torch.nn.functional.cross_entropy(20 * a @ b.T, torch.arange(len(a)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    common.say(f"{package}: rate {rate:g}, decay {decay:g}, loss {loss.item():.3f}")


def adapt(model: Any) -> list[tuple[Any, Any, Any]]:
    """Put an adapter beside the linear layers of the attention; return (layer, down, up) of each."""
    import torch

    found = []
    for name, layer in model.named_modules():
        if not (isinstance(layer, torch.nn.Linear) and ".attention." in name):
            continue
        down = torch.nn.Parameter(torch.randn(RANK, layer.in_features) / layer.in_features**0.5)
        up = torch.nn.Parameter(torch.zeros(layer.out_features, RANK))
        layer.register_forward_hook(lambda _, x, y, down=down, up=up: y + 2 * (x[0] @ down.T) @ up.T)
        found.append((layer, down, up))
    return found


def make(minilm: Path, folder: Path, steps: int) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm)
    plain = load_file(minilm / "model.safetensors")
    family = {"plain": plain}
    pairs = zip(TEXTS, RATES, strict=False)
    jobs = [(f"{text}-{rate:.0e}", text, rate, 0.01 * (i % 2)) for i, (text, rate) in enumerate(pairs)]
    for name, text, rate, decay in [*jobs, ("adapter", TEXTS[-1], 1e-3, 0.0)]:
        torch.manual_seed(len(family))
        model = AutoModel.from_pretrained(minilm)
        if name == "adapter":
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            layers = adapt(model)
            train(model, [p for _, *pair in layers for p in pair], text, tokenizer, steps, rate, decay)
            with torch.no_grad():
                for layer, down, up in layers:
                    layer.weight += 2 * up @ down
        else:
            train(model, list(model.parameters()), text, tokenizer, steps, rate, decay)
        state = model.state_dict()
        family[name] = {key: state.get(key, value) for key, value in plain.items()}
    for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for name, state in family.items():
            write_model(folder / kind / hashlib.sha256(name.encode()).hexdigest()[:6], name, minilm, state, dtype)


def write_model(target: Path, name: str, minilm: Path, state: dict[str, Any], dtype: Any) -> None:
    from safetensors.torch import save_file

    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(minilm, target, ignore=shutil.ignore_patterns("*.safetensors"))
    (target / "README.md").write_text(f"{name}\n")
    cast = {k: v.to(dtype).contiguous() if v.is_floating_point() else v.contiguous() for k, v in state.items()}
    save_file(cast, target / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("make")
    verb.add_argument("minilm", type=Path)
    verb.add_argument("folder", type=Path)
    verb.add_argument("--steps", type=int, default=24)
    a = parser.parse_args()
    if a.verb == "make":
        make(a.minilm, a.folder, a.steps)


if __name__ == "__main__":
    main()
