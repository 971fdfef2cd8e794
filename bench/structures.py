"""Tensors with structure, made from the real weights of MiniLM: what quantizing, pruning, casting and tying leave behind.

`make(folder)` yields (name, dtype, tensors) one after another; `folder` is where data.py put the model. Weights are the
matrices of the layers 0 to 2 (5.3 million values). Everything is made by numpy alone and always the same, but token ids:
they are the vocabulary's of the standard library's sources (of this Python).
"""

import glob
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from common import read_header
from numpy.typing import NDArray

Array = NDArray[Any]
BF16, FP8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn


def matrices(model: Path) -> dict[str, Array]:
    """Return the float32 tensors of a safetensors file."""
    data = model.read_bytes()
    return {
        s.name: np.frombuffer(data, "<f4", (s.end - s.begin) // 4, s.begin).reshape(s.shape)
        for s in read_header(model)
        if s.dtype == "F32"
    }


def int8_tensor(w: Array) -> tuple[Array, Array]:
    scale = np.float32(np.abs(w).max() / 127)
    q = np.clip(np.rint(w / scale), -127, 127).astype(np.int8)
    return q, q.astype(np.float32) * scale


def int8_row(w: Array) -> tuple[Array, Array]:
    scale = (np.abs(w).max(1, keepdims=True) / 127).astype(np.float32)
    q = np.clip(np.rint(w / scale), -127, 127).astype(np.int8)
    return q, q.astype(np.float32) * scale


def int4_group(w: Array) -> tuple[Array, Array]:
    """Quantize groups of 128 to 4 bits with a scale that float16 can hold and a zero point."""
    g = w.reshape(-1, 128)
    low, high = np.minimum(g.min(1, keepdims=True), 0), np.maximum(g.max(1, keepdims=True), 0)
    scale = ((high - low) / 15).astype(np.float16).astype(np.float32)
    zero = np.clip(np.rint(-low / scale), 0, 15)
    q = np.clip(np.rint(g / scale) + zero, 0, 15)
    return q.reshape(w.shape).astype(np.int8), ((q - zero) * scale).reshape(w.shape).astype(np.float32)


def fp8_tensor(w: Array) -> tuple[Array, Array]:
    scale = np.float32(np.abs(w).max() / 448)
    q = (w / scale).astype(FP8)
    return q.view(np.int8), q.astype(np.float32) * scale


def packed_int4(codes: Array) -> Array:
    """Return eight codes of 4 bits in each int32."""
    q = codes.astype(np.uint32).reshape(-1, 8)
    return sum(q[:, i] << np.uint32(4 * i) for i in range(8)).astype(np.uint32).view(np.int32)


def pruned(w: Array, percent: int) -> Array:
    size = np.abs(w.astype(np.float32))
    return np.where(size >= np.quantile(size, percent / 100), w, BF16(0))


def token_ids(vocabulary: Path) -> Array:
    """Return the standard library's sources as token ids, by longest match; rows of 512."""
    index = {t: i for i, t in enumerate(vocabulary.read_text(encoding="utf-8").split("\n"))}
    files = sorted(glob.glob(sysconfig.get_paths()["stdlib"] + "/*.py"))
    text = " ".join(Path(f).read_text(errors="replace") for f in files).lower()
    ids: list[int] = []
    known: dict[str, list[int]] = {}
    for word in re.findall(r"[a-z0-9]+|[^\sa-z0-9]", text):
        if word not in known:
            known[word] = _pieces(word, index)
        ids += known[word]
        if len(ids) > 2_000_000:
            break
    return np.array(ids[: len(ids) // 512 * 512], np.int64)


def _pieces(word: str, index: dict[str, int]) -> list[int]:
    found, begin = [], 0
    while begin < len(word):
        end = len(word)
        while end > begin and ("##" if begin else "") + word[begin:end] not in index:
            end -= 1
        if end == begin:
            return [100]
        found.append(index[("##" if begin else "") + word[begin:end]])
        begin = end
    return found


def activations(tokens: int = 8192, channels: int = 1024) -> Array:
    """Return what a KV cache holds: normal values, scales of the channels lognormal, 1 % of the channels 20 times larger."""
    random = np.random.default_rng(1)
    scale = random.lognormal(0, 1, channels)
    scale[random.choice(channels, channels // 100, replace=False)] *= 20
    return (random.standard_normal((tokens, channels), dtype=np.float32) * scale.astype(np.float32)).astype(BF16)


def make(folder: Path) -> Iterator[tuple[str, str, list[Array]]]:
    """Yield name, safetensors dtype and tensors of every input."""
    model = matrices(folder / "minilm_fp32.safetensors")
    weights = [v for k, v in sorted(model.items()) if v.ndim == 2 and re.match(r"encoder\.layer\.[012]\.", k)]
    half = [w.astype(BF16) for w in weights]
    yield "dense, bf16", "BF16", half
    yield "dense, fp32", "F32", weights
    yield "bf16 in fp32", "F32", [w.astype(np.float32) for w in half]
    yield "fp16 in fp32", "F32", [w.astype(np.float16).astype(np.float32) for w in weights]
    kinds: dict[str, Callable[[Array], tuple[Array, Array]]] = {
        "int8 per tensor": int8_tensor, "int8 per row": int8_row, "int4 groups of 128": int4_group,
        "fp8 per tensor": fp8_tensor,
    }  # fmt: skip
    codes = {}
    for name, quantize in kinds.items():
        both = [quantize(w) for w in weights]
        codes[name] = [q for q, _ in both]
        yield f"{name}, in bf16", "BF16", [x.astype(BF16) for _, x in both]
        yield f"{name}, in fp32", "F32", [x for _, x in both]
    for percent in (50, 90, 99):
        yield f"pruned {percent} %, bf16", "BF16", [pruned(w, percent) for w in half]
    embedding = model["embeddings.word_embeddings.weight"][:15261].astype(BF16)
    yield "tied embedding twice, bf16", "BF16", [embedding, embedding]
    yield "token ids, int64", "I64", [token_ids(folder / "minilm" / "vocab.txt")]
    yield "position ids, int64", "I64", [np.tile(np.arange(512, dtype=np.int64), (2048, 1))]
    lengths = np.random.default_rng(0).integers(16, 513, 4096)
    yield "padding mask, bool", "BOOL", [np.arange(512)[None] < lengths[:, None]]
    yield "int4 packed, int32", "I32", [packed_int4(q) for q in codes["int4 groups of 128"]]
    yield "int8 codes", "I8", codes["int8 per tensor"]
    yield "fp8 codes", "F8_E4M3", [q.view(FP8) for q in codes["fp8 per tensor"]]
    yield "causal mask, bool", "BOOL", [np.tril(np.ones((2048, 2048), bool))]
    yield "constant, bf16", "BF16", [np.ones((1024, 2048), BF16)]
    yield "constant, fp32", "F32", [np.full((1024, 1024), 0.1, np.float32)]
    yield "arange, int64", "I64", [np.arange(524_288, dtype=np.int64)]
    yield "arange, int32", "I32", [np.arange(1_048_576, dtype=np.int32)]
    yield "activations, bf16", "BF16", [activations()]
