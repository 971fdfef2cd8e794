"""What a first run does without compiling, in numpy: the same as the kernels that take seconds to compile."""

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import tzip
from tzip.coders import counting, grid, jit, plane_encoder, planes, record_encoder, record_planner

WORDS: dict[int, Any] = {grid.BF16: np.uint16, grid.F16: np.uint16, grid.F32_ELEMENTS: np.uint32}


def in_container(values: Any, container: int) -> Any:
    """Round float64 to elements of a container, as their bits."""
    values = values.astype(np.float32)
    if container == grid.F16:
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    if container == grid.BF16:
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return bits


@st.composite
def probed(draw: st.DrawFn) -> tuple[int, Any]:
    """Grids, whole or with faults, and what is none: noise, zeros, tiny numbers, infinities and NaN."""
    container = draw(st.sampled_from(sorted(WORDS)))
    n = draw(st.integers(128, 700))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["grid", "grid", "normal", "bits", "few"]))
    if kind == "bits":
        return container, rng.integers(0, np.iinfo(WORDS[container]).max, n, WORDS[container], endpoint=True)
    scale = 2.0 ** draw(st.floats(-30, 6)) if container == grid.F16 else 2.0 ** draw(st.floats(-148, 60))
    if kind == "normal":
        values = rng.standard_normal(n) * scale
    else:
        steps = draw(st.integers(1, 140))
        values = rng.integers(-steps, steps, n, endpoint=True) * scale
        if kind == "few":
            values *= rng.random(n) < 0.3
    words = in_container(values, container)
    if draw(st.booleans()):
        at = rng.integers(0, n, draw(st.integers(1, 20)))
        words[at] = rng.integers(0, np.iinfo(words.dtype).max, at.size, words.dtype, endpoint=True)
    return container, words


@given(probed(), st.integers(0, 400), st.integers(0, 1000))
@example((grid.BF16, np.zeros(128, np.uint16)), 0, 0)
@example((grid.F32_ELEMENTS, np.full(128, 0x7FC00001, np.uint32)), 64, 3)
@example((grid.F32_ELEMENTS, np.full(128, 1, np.uint32)), 64, 3)
def test_probes_agree(case: tuple[int, Any], row: int, before: int) -> None:
    container, words = case
    jit._ready.add(id(grid._probe))
    assert grid.probe_in_numpy(words, container, row, before) == grid.probe(words, container, row, before)


def test_probes_find_grids_and_nothing_else() -> None:
    rng = np.random.default_rng(4)
    for container in WORDS:
        for steps in (1, 7, 127, 128):
            values = rng.integers(-steps, steps, 4096, endpoint=True) * 0.0123
            assert grid.probe_in_numpy(in_container(values, container), container, 64, 0) == (3, 3)
        assert grid.probe_in_numpy(in_container(rng.standard_normal(4096), container), container, 64, 0) == (2, 0)


@given(
    st.sampled_from([planes.BF16, planes.F16, planes.F32]),
    st.integers(1, 3000),
    st.integers(64, 2000),
    st.sampled_from([1, 2, 16]),
    st.sampled_from([0, 1, 8]),
    st.integers(0, 2**32 - 1),
)
def test_surveys_agree(layout: Any, n: int, size: int, every: int, sample: int, seed: int) -> None:
    joined = layout.head.joined[seed % len(layout.head.joined)]
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 2 ** (8 * layout.width) - 1, n, f"<u{layout.width}", endpoint=True)
    if seed % 3 == 0:
        words >>= words.dtype.type(1)  # no sign
    groups = -(-n // size)
    head = layout.head

    def room() -> tuple[Any, ...]:
        keys = np.empty((groups, 1 << (head.exponent + joined)), np.int64)
        return np.zeros(groups, np.int64), keys, np.zeros(256, np.int64), np.zeros((layout.width - 2, groups, 256), np.int64)

    kernel, numpy = room(), room()
    counts = np.zeros(4 * max(256, kernel[1].shape[1]), np.uint32)
    counting.survey_groups(words, size, head.mantissa - joined, every, sample, counts, *kernel)
    counting.survey_in_numpy(words, size, head.mantissa - joined, every, sample, counts, *numpy)
    for a, b in zip(kernel, numpy, strict=True):
        assert a.tolist() == b.tolist()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_first_runs_give_the_same_bytes(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    values = (rng.standard_normal(300_000) * 0.02).astype(np.float32)
    raw = {"BF16": (values.view(np.uint32) >> 16).astype(np.uint16), "F16": values.astype(np.float16)}.get(dtype, values)
    raw = raw.view(np.uint8)
    packed = tzip.encode(raw, dtype=dtype)
    asked = []

    def never(function: Any, arguments: tuple[object, ...], nbytes: int) -> bool:
        asked.append(function)
        return False

    for module in (grid, counting, record_planner, record_encoder, plane_encoder):
        monkeypatch.setattr(module, "ready", never)
    assert tzip.encode(raw, dtype=dtype) == packed
    assert {grid._probe, counting.survey_groups} <= set(asked)
