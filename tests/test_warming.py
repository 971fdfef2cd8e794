"""When kernels that take seconds are compiled: when they are there already, or when they are worth it."""

import os
import subprocess
import sys

import pytest

import tzip
from tzip.coders import jit

SHOW = """
import numpy as np, tzip
from tzip.coders import jit
values = (np.random.default_rng(1).standard_normal(1 << 19) * 0.02).astype(np.float32).view(np.uint32) >> 16
raw = values.astype(np.uint16).view(np.uint8)
assert tzip.decode(tzip.encode(raw, dtype="BF16")).view(np.uint8).tobytes() == raw.tobytes()
print(len(jit._ready))
"""


class Kernel:
    """Something that numba has not compiled."""


@pytest.fixture
def patient(monkeypatch):
    monkeypatch.setattr(jit, "_eager", False)
    monkeypatch.setattr(jit, "_ready", set())
    monkeypatch.setattr(jit, "_worked", {})


def test_a_kernel_is_worth_compiling_after_a_gibibyte_of_its_work(patient):
    one, other = Kernel(), Kernel()
    assert not jit.ready(one, (), 1 << 29)
    assert not jit.ready(other, (), 1 << 29)
    assert jit.ready(one, (), 1 << 29)
    assert jit.ready(one, (), 1)
    assert not jit.ready(other, (), (1 << 29) - 1)
    assert jit.ready(other, (), 1)


def test_eager_ones_are_compiled_at_once(patient):
    jit.compile_eagerly()
    assert jit.ready(Kernel(), (), 1)


def run(folder, code):
    env = {**os.environ, "NUMBA_CACHE_DIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1:]


def test_a_process_uses_what_an_earlier_one_compiled(tmp_path):
    assert run(tmp_path, SHOW) == ["0"]
    run(tmp_path, "import tzip; tzip.warm_up(['default'], ['BF16'])")
    assert run(tmp_path, SHOW) == ["4"]  # probe, plan, encode, decode


def test_unknown_levels_and_types_are_refused():
    with pytest.raises(tzip.UsageError):
        tzip.warm_up(["slow"])
    with pytest.raises(tzip.UsageError):
        tzip.warm_up(dtypes=["I8"])
