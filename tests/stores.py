"""What the tests of the store share: states that are compared bit by bit, and what is read to read a tensor."""

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tzip
from tzip.archive import Archive


def same(a: Any, b: Any, at: str = "") -> None:
    """Assert that two states are the same: types, order of keys, bits."""
    assert type(a) is type(b), (at, type(a), type(b))
    home = type(a).__module__.partition(".")[0]
    if isinstance(a, dict):
        assert len(a) == len(b), at
        for (ka, va), (kb, vb) in zip(a.items(), b.items(), strict=True):
            same(ka, kb, f"{at}[key]")
            same(va, vb, f"{at}[{ka!r}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), at
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{at}[{i}]")
    elif isinstance(a, np.ndarray | np.generic):
        assert a.dtype == b.dtype, at
        assert a.shape == b.shape, at
        assert a.tobytes() == b.tobytes(), at
    elif isinstance(a, float):
        assert struct.pack("<d", a) == struct.pack("<d", b), at
    elif isinstance(a, complex):
        assert struct.pack("<dd", a.real, a.imag) == struct.pack("<dd", b.real, b.imag), at
    elif home == "torch" and hasattr(a, "numel"):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), at
        assert bits(a) == bits(b), at
    elif home in ("jax", "jaxlib"):
        same(np.asarray(a), np.asarray(b), at)
    else:
        assert a == b, at


def bits(tensor: Any) -> bytes:
    """Return the bytes of a torch tensor, in row-major order."""
    import torch

    if not tensor.numel():
        return b""
    flat = torch.empty(tensor.shape, dtype=tensor.dtype)
    try:
        flat.copy_(tensor.resolve_conj().resolve_neg())
    except NotImplementedError:  # torch copies no elements of fewer than 8 bits; those lie plain
        flat = tensor
    return flat.reshape(-1).view(torch.uint8).numpy().tobytes()


def walk(n: int, steps: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Yield the weights of a training run: each like the one before."""
    rng = np.random.default_rng(seed)
    w = rng.normal(0, 0.02, n).astype("<f4")
    for _ in range(steps):
        yield w.copy()
        w = w + (rng.normal(0, 1e-6, n)).astype("<f4")


def whole(path: Path, expected: dict[int, Any], tags: dict[str, int] | None = None) -> None:
    """Assert that a store, opened anew, has these checkpoints, every one whole, and no damage."""
    with tzip.Store(path, threads=1, create=False) as store:
        assert sorted(e.step for e in store.log()) == sorted(expected)
        for step, state in expected.items():
            same(state, store.load(step))
        report = store.verify(deep=True)
        assert report.faults == []
        assert report.checkpoints == len(expected)
        if tags is not None:
            assert store.tags() == tags


@contextlib.contextmanager
def decoded() -> Iterator[set[str]]:
    """Collect the files of the archives whose chunks are decoded."""
    seen: set[str] = set()
    original = Archive.decode_chunk

    def decode(self: Archive, *args: Any, **kwargs: Any) -> Any:
        seen.add(self.reader.source.name)
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Archive, "decode_chunk", decode)
        yield seen
