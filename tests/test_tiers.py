"""Every tier of kernels gives the same bytes: portable and AVX-512, whatever the input, the length and the damage."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tzip.coders import jit, rans

needs_avx512 = pytest.mark.skipif(jit.tier() != jit.AVX512, reason="numba does not compile for AVX-512 here")
LENGTHS = [1, 31, 32, 33, 4095, 4096, 4097, 8191, 8192, 8193, 12_288, 20_000, 65_536, 65_537, 131_072]


def _symbols(n: int, alphabet: int, seed: int) -> np.ndarray:
    rng = np.random.Generator(np.random.PCG64(seed))
    weights = 1.0 / np.arange(1, alphabet + 1) ** (seed % 4)
    symbols = rng.choice(alphabet, n, p=weights / weights.sum()).astype(np.uint8)
    symbols[: min(n, 2)] = [0, 1][: min(n, 2)]
    return symbols


def _table(symbols: np.ndarray) -> rans.RansTable:
    counts = np.bincount(symbols, minlength=256).astype(np.int64)
    counts[1] += not counts[1]
    counts[0] += not counts[0]
    return rans.quantize(counts)


def _both(monkeypatch, call):
    results = []
    for tier in (jit.PORTABLE, jit.AVX512):
        monkeypatch.setattr(rans, "tier", lambda tier=tier: tier)
        results.append(call())
    return results


@needs_avx512
@pytest.mark.parametrize("log_segment", [12, 13, 17])
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize(("alphabet", "seed"), [(2, 0), (2, 3), (30, 2), (256, 0), (256, 1)])
def test_encoders_and_decoders_agree(monkeypatch, n, alphabet, seed, log_segment):
    symbols = _symbols(n, alphabet, seed)
    table = _table(symbols)
    escapes = np.empty(0, np.uint32)
    portable, vector = _both(monkeypatch, lambda: rans.encode(symbols, table, False, log_segment, escapes))
    assert portable == vector
    payload = np.frombuffer(portable, np.uint8)

    def decode():
        out = np.empty(n, np.uint8)
        rans.decode_into(payload, 0, payload.size, 0, log_segment, None, out)
        return out.tobytes()

    assert _both(monkeypatch, decode) == [symbols.tobytes()] * 2


@needs_avx512
@given(data=st.data())
def test_damaged_payloads_are_judged_alike(data):
    n = data.draw(st.sampled_from([40, 4097, 8192, 9000]))
    symbols = _symbols(n, data.draw(st.sampled_from([2, 40, 256])), data.draw(st.integers(0, 3)))
    payload = np.frombuffer(rans.encode(symbols, _table(symbols), False, 12, np.empty(0, np.uint32)), np.uint8).copy()
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, payload.size - 1))] ^= data.draw(st.integers(1, 255))
    outcomes = []
    with pytest.MonkeyPatch.context() as patch:

        def decode():
            out = np.zeros(n, np.uint8)
            try:
                rans.decode_into(payload, 0, payload.size, 0, 12, None, out)
            except rans.CorruptError as e:
                return str(e)
            return out.tobytes()

        outcomes = _both(patch, decode)
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("cpu", ["generic", "haswell"])
def test_other_targets_give_the_same_archive_and_read_it(cpu, tmp_path):
    """A target without AVX-512 must not die, and must write and read the same bytes."""
    script = """
import hashlib, sys
import numpy as np
import tzip
from tzip.coders import jit
rng = np.random.Generator(np.random.PCG64(5))
bits = (rng.integers(0, 1 << 16, 150_000) & 0x83FF | 0x3C00).astype(np.uint16)
for name in ("fast", "default", "best"):
    for values, dtype in ((bits, "BF16"), (bits, "F16"), (bits, "U16"), (bits, "F32")):
        blob = tzip.encode(values.view(np.uint8), dtype=dtype, level=name)
        assert tzip.decode(blob).tobytes() == values.tobytes()
        print(hashlib.sha256(blob).hexdigest())
print(jit.tier(), file=sys.stderr)
"""
    here = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    env = os.environ | {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env)
    assert there.stderr.strip() == jit.PORTABLE
    assert here.stdout == there.stdout
    assert here.stdout.count("\n") == 12
