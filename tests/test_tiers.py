"""Every tier of kernels gives the same bytes: portable and AVX-512, whatever the input, the length and the damage."""

import os
import subprocess
import sys

import numpy as np
import pytest
import reference
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st

from tzip.coders import fitting, jit, rans
from tzip.coders.errors import CorruptError

needs_avx512 = pytest.mark.skipif(jit.tier() != jit.AVX512, reason="numba does not compile for AVX-512 here")
AVX2 = getattr(jit, "AVX2", jit.PORTABLE)
ALL_TIERS = list(dict.fromkeys((jit.PORTABLE, AVX2, jit.AVX512)))
TIERS = ALL_TIERS[: ALL_TIERS.index(jit.tier()) + 1]  # what this CPU can do
LENGTHS = [1, 31, 32, 33, 127, 128, 129, 4095, 4096, 4097, 8193, 20_000, 65_537, 131_072, 131_073, 200_000, 262_143, 262_144]
TABLES = ("narrow", "wide", "unsuited")
SLACK = 64
NO_ESCAPES = np.empty(0, np.uint32)


def _frequencies(kind: str, rng: np.random.Generator) -> dict[int, int]:
    """Frequencies of bytes: narrow ones suit the vectors, for they are at most 128, side by side or not, and those rarer
    than 16 have at most 256 slots, or exactly so many; wide ones are more, and unsuited ones have too many that are rare.
    """
    low, high = {"narrow": (2, 129), "wide": (129, 257), "unsuited": (100, 129)}[kind]
    count = int(rng.integers(low, high))
    if rng.random() < 0.5:
        symbols = np.sort(rng.choice(256, count, replace=False))
    else:
        symbols = int(rng.integers(0, 257 - count)) + np.arange(count)
    few = np.full(count, 8) if rng.random() < 0.3 else rng.integers(1, 12, count)
    if kind == "unsuited":  # 257 slots or more
        few = np.maximum(few, 3)
        k = int(rng.choice([np.searchsorted(np.cumsum(few), 257) + 1, count - 1]))
    else:
        k = int(rng.choice([0, np.searchsorted(np.cumsum(few), 256, side="right")]))
    if kind == "wide":
        frequencies = np.concatenate((few[:k], rng.integers(8, 14, count - k)))
    else:
        frequencies = np.concatenate((few[:k], rng.integers(16, 20, count - k)))
    frequent = np.arange(count)[min(k, count - 1) :][:5]
    share = rng.dirichlet(np.full(frequent.size, 0.4)) * (4096 - frequencies.sum())
    frequencies[frequent] += share.astype(np.int64)
    frequencies[-1] += 4096 - frequencies.sum()
    return dict(zip(symbols.tolist(), rng.permutation(frequencies).tolist(), strict=True))


def _table(frequencies: dict[int, int]) -> rans.RansTable:
    freq = np.zeros(256, np.int64)
    freq[list(frequencies)] = list(frequencies.values())
    return rans.RansTable(freq)


def _draw(kind: str, n: int, seed: int) -> tuple[np.ndarray, dict[int, int], rans.RansTable]:
    """Symbols as the table has them, so that states and words are anywhere; or a run of one, or rare ones alone."""
    rng = np.random.default_rng([seed, n, TABLES.index(kind)])
    frequencies = _frequencies(kind, rng)
    table = _table(frequencies)
    used = np.array(list(frequencies))
    weights = np.array(list(frequencies.values())) / 4096
    if seed % 4 == 3:
        weights = np.ones(used.size) / used.size
    symbols = rng.choice(used, n, p=weights).astype(np.uint8)
    if seed % 4 == 2:
        symbols[: n // 2] = used[np.argmax(weights)]
    return symbols, frequencies, table


def _naive_payload(symbols: np.ndarray, frequencies: dict[int, int], segments: int) -> bytes:
    """Section 7.6, with the padding that our encoder uses: the smallest of the most frequent bytes."""
    padding = min(frequencies, key=lambda c: (-frequencies[c], c))
    before, after = strategies.rans_payload(symbols, frequencies, segments, lambda k: np.full(k, padding, np.uint8))
    return before + strategies.rans_table(frequencies) + after


def _naive_heads(coded: np.ndarray, rest: np.ndarray, low: int, base: int, sign: int) -> bytes:
    """Sections 6.1 and 6.2; a rest may have a bit more than the mantissa: the sign."""
    c, r = coded.astype(np.int64), rest.astype(np.int64)
    key = np.where(c == 0, 0, base + c)
    return (key << low | (r >> low & 1) << 15 | r & (1 << low) - 1 | sign).astype("<u2").tobytes()


def _decode(payload: np.ndarray, n: int, segments: int, start: int = 0, stop: int | None = None) -> bytes:
    stream = rans.open_stream(payload, start, payload.size if stop is None else stop, 0, segments, None, n)
    out = np.full(n, 0xEE, np.uint8)
    rans.decode_bytes(payload, stream, out)
    return out.tobytes()


def _decode_heads(payload, n, segments, rest, low, base, sign, start=0, stop=None) -> bytes:
    stream = rans.open_stream(payload, start, payload.size if stop is None else stop, 0, segments, None, n)
    out = np.full(n, 0xEEEE, np.uint16)
    rans.decode_heads(payload, stream, rest, low, base, sign, np.empty(n, np.uint8), out)
    return out.tobytes()


def _in_all_tiers(call) -> list:
    """What a call gives or raises, tier by tier."""
    results = []
    for tier in TIERS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rans, "tier", lambda tier=tier: tier)
            try:
                results.append(call())
            except CorruptError as e:
                results.append(f"{type(e).__name__}: {e}")
    return results


def _check(kind: str, n: int, segments: int, seed: int, slowly: bool) -> None:
    symbols, frequencies, table = _draw(kind, n, seed)
    assert (table.vectors.size > 0) == (kind == "narrow")
    payload = _naive_payload(symbols, frequencies, segments)
    assert _in_all_tiers(lambda: b"".join(rans.encode(symbols, table, False, segments, NO_ESCAPES))) == [payload] * len(TIERS)
    if slowly:
        assert bytes(reference.rans_decode(payload, n, segments, 0, None)[0]) == symbols.tobytes()
    rng = np.random.default_rng(seed)
    low = int(rng.integers(2, 8))
    rest = rng.integers(0, 2 << low, n).astype(np.uint8)
    base, sign = int(rng.integers(0, max(1, (1 << 15 - low) - 256))), 0
    if seed % 3 == 0:
        rest &= np.uint8((1 << low) - 1)
        sign = 0x8000
    heads = _naive_heads(symbols, rest, low, base, sign)
    for lead, slack in ((0, 0), (5, SLACK), (1, 7)):
        raw = np.full(lead + len(payload) + slack, 0xA5, np.uint8)
        stop = lead + len(payload)
        raw[lead:stop] = np.frombuffer(payload, np.uint8)
        assert _in_all_tiers(lambda: _decode(raw, n, segments, lead, stop)) == [symbols.tobytes()] * len(TIERS)  # noqa: B023
        got = _in_all_tiers(lambda: _decode_heads(raw, n, segments, rest, low, base, sign, lead, stop))  # noqa: B023
        assert got == [heads] * len(TIERS)


def _possible(n: int, most: int) -> list[int]:
    return [s for s in strategies.segment_counts(n) if s <= most]


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("n", LENGTHS)
def test_all_kernels_are_the_naive_ones(n, kind):
    possible = _possible(n, 9)
    for i, segments in enumerate(sorted({possible[0], possible[len(possible) // 2], possible[-1]})):
        _check(kind, n, segments, i + n, slowly=n <= 20_000 and i == 0)


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("segments", range(1, 10))
def test_all_kernels_are_the_naive_ones_for_any_number_of_segments(segments, kind):
    """Last segments of one symbol, of all but one, and of half a row more or less."""
    size = 1280
    for last in (1, 16, 31, 32, 33, 640, 1200, 1279, 1280):
        n = (segments - 1) * size + last
        if strategies.segment_size(n, segments):
            _check(kind, n, segments, last, slowly=last in (33, 1200))
    n = segments * 128
    assert strategies.segment_size(n, segments) == 128
    _check(kind, n, segments, 0, slowly=True)


@given(st.sampled_from(TABLES), st.integers(1, 1 << 18), st.integers(0, 4), st.integers(1, 9), st.integers(0, 1 << 16))
def test_all_kernels_are_the_naive_ones_whatever_is_drawn(kind, n, down, most, seed):
    n = max(1, n >> 3 * down)
    _check(kind, n, (_possible(n, most) or strategies.segment_counts(n))[-1 if most < 9 else 0], seed, slowly=n <= 4000)


@given(st.integers(0, 1 << 16), st.integers(1, 5000))
def test_tables_of_counts_work_in_all_tiers(seed, n):
    """Tables as our encoder makes them, of whatever form."""
    rng = np.random.default_rng(seed)
    alphabet = int(rng.integers(2, 257))
    weights = 1.0 / np.arange(1, alphabet + 1) ** (seed % 4)
    symbols = rng.choice(alphabet, n, p=weights / weights.sum()).astype(np.uint8)
    counts = np.bincount(symbols, minlength=256).astype(np.int64)
    counts[:2] += counts[:2] == 0
    table = fitting.quantize(counts)
    frequencies = {c: int(table.freq[c]) for c in np.flatnonzero(table.freq).tolist()}
    segments = _possible(n, 1 + seed % 9)[-1]
    payload = _naive_payload(symbols, frequencies, segments)
    assert _in_all_tiers(lambda: b"".join(rans.encode(symbols, table, False, segments, NO_ESCAPES))) == [payload] * len(TIERS)
    raw = np.frombuffer(payload + bytes(SLACK), np.uint8)
    assert _in_all_tiers(lambda: _decode(raw, n, segments, 0, len(payload))) == [symbols.tobytes()] * len(TIERS)


@needs_avx512
def test_vectors_decode_what_they_should():
    """The tests above would pass, too, if the portable kernel did all the work."""
    for kind in TABLES:
        for segments in (2, 4, 5, 9):
            n = 20_000
            symbols, _, table = _draw(kind, n, 1)
            payload = b"".join(rans.encode(symbols, table, False, segments, NO_ESCAPES)) + bytes(SLACK)
            raw = np.frombuffer(payload, np.uint8)
            stream = rans.open_stream(raw, 0, raw.size - SLACK, 0, segments, None, n)
            out = np.empty(n, np.uint8)
            rans._vectors(raw, stream, np.empty(0, np.uint8), (0, 0, 0), out)
            size = strategies.segment_size(n, segments)
            whole = [min(n - g * size, size) // 32 * 32 for g in range(segments)]
            assert not stream.left.any()
            for g, k in enumerate(whole):
                assert out[g * size : g * size + k].tobytes() == symbols[g * size : g * size + k].tobytes()


@settings(max_examples=200)
@given(data=st.data())
def test_damaged_payloads_are_judged_alike(data):
    """Words, states, counts, tables, the end: an error, or the same bytes, in all tiers; and never a crash."""
    kind = data.draw(st.sampled_from(TABLES))
    n = data.draw(st.sampled_from([40, 128, 1000, 4097, 8192, 9000, 30_000]))
    segments = data.draw(st.sampled_from(_possible(n, 9)))
    symbols, _, table = _draw(kind, n, data.draw(st.integers(0, 7)))
    payload = np.frombuffer(b"".join(rans.encode(symbols, table, False, segments, NO_ESCAPES)), np.uint8).copy()
    counts, states = 4 * segments, 132 * segments
    words = states + table.size
    for _ in range(data.draw(st.integers(1, 3))):
        what = data.draw(st.sampled_from(["words", "states", "counts", "table", "moved", "swapped", "cut"]))
        places = {"words": (words, payload.size), "states": (counts, states), "counts": (0, counts), "table": (states, words)}
        if what in places:
            low, high = (min(v, payload.size - 1) for v in places[what])
            payload[data.draw(st.integers(low, max(low, high - 1)))] ^= data.draw(st.integers(1, 255))
        elif what == "moved" and segments > 1 and payload.size >= counts:  # words of one segment are said to be another's
            fields = payload[:counts].view("<u4")
            g, k = data.draw(st.integers(0, segments - 1)), data.draw(st.integers(0, 40))
            k = min(k, int(fields[g]))
            fields[g] -= k
            fields[(g + 1) % segments] += k
        elif what == "swapped" and payload.size >= states:
            lanes = payload[counts:states].view("<u4")
            a, b = (data.draw(st.integers(0, lanes.size - 1)) for _ in range(2))
            lanes[[a, b]] = lanes[[b, a]]
        elif what == "cut":
            payload = payload[: payload.size - min(data.draw(st.integers(1, 100)), payload.size - 1)].copy()
    slack = data.draw(st.sampled_from([0, 1, 63, 64, 300]))
    raw = np.concatenate((payload, np.full(slack, data.draw(st.sampled_from([0, 0xFF])), np.uint8)))
    rest = np.arange(n).astype(np.uint8)
    for call in (
        lambda: _decode(raw, n, segments, 0, payload.size),
        lambda: _decode_heads(raw, n, segments, rest, 7, 0, 0, 0, payload.size),
    ):
        outcomes = _in_all_tiers(call)
        assert outcomes[:-1] == outcomes[1:]


@pytest.mark.parametrize("kind", TABLES)
def test_a_payload_cut_anywhere_is_refused(kind):
    n, segments = 700, 3
    symbols, _, table = _draw(kind, n, 0)
    payload = np.frombuffer(b"".join(rans.encode(symbols, table, False, segments, NO_ESCAPES)), np.uint8)
    for size in range(payload.size):
        for raw in (payload[:size].copy(), payload):
            outcomes = _in_all_tiers(lambda: _decode(raw, n, segments, 0, size))  # noqa: B023
            assert all(isinstance(o, str) for o in outcomes), size
            assert outcomes[:-1] == outcomes[1:]


@pytest.mark.parametrize("kind", TABLES)
def test_words_of_all_ones_and_states_at_the_ends_of_their_range(kind):
    """A lane that always, or never, wants a word reads as fast as a lane can, or not at all."""
    n, segments = 6000, 5
    symbols, _, table = _draw(kind, n, 0)
    good = np.frombuffer(b"".join(rans.encode(symbols, table, False, segments, NO_ESCAPES)), np.uint8)
    states = 132 * segments
    for state in (1 << 15, (1 << 31) - 1, (1 << 31) - 4096, 1 << 16):
        for word in (0, 0xFF):
            payload = good.copy()
            payload[4 * segments : states].view("<u4")[:] = state
            payload[states + table.size :] = word
            for slack in (0, 200):
                raw = np.concatenate((payload, np.full(slack, word, np.uint8)))
                outcomes = _in_all_tiers(lambda: _decode(raw, n, segments, 0, payload.size))  # noqa: B023
                assert outcomes[:-1] == outcomes[1:]
                assert isinstance(outcomes[0], str)


SCRIPT = """
import hashlib, sys
import numpy as np
import tzip
from tzip.coders import jit
rng = np.random.Generator(np.random.PCG64(5))
bits = (rng.integers(0, 1 << 16, 300_000) & 0x83FF | 0x3C00).astype(np.uint16)
skew = np.minimum(rng.geometric(0.02, 300_000), 255).astype(np.uint8)
for name in ("fast", "default", "best"):
    for values, dtype in ((bits, "BF16"), (bits, "F16"), (bits, "U16"), (bits, "F32"), (skew, "U8")):
        blob = tzip.encode(values.view(np.uint8), dtype=dtype, level=name)
        assert tzip.decode(blob).tobytes() == values.tobytes()
        print(hashlib.sha256(blob).hexdigest())
    codes = rng.integers(-127, 128, (300, 512)).astype(np.float32)
    grid = (codes * rng.uniform(1e-3, 1, (300, 1)).astype(np.float32)).astype(np.float32)
    sparse = np.where(rng.random((300, 512)) < 0.9, 0, grid).astype(np.float32)
    for values in (grid, grid.astype(np.float16), sparse, np.arange(100_000), rng.integers(0, 3, 100_000)):
        blob = tzip.encode(values, level=name)
        assert tzip.decode(blob).tobytes() == values.tobytes()
        print(hashlib.sha256(blob).hexdigest())
print(jit.tier(), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def here() -> str:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == jit.tier()
    assert done.stdout.count("\n") == 30
    return done.stdout


@pytest.mark.parametrize(("cpu", "tier"), [("generic", jit.PORTABLE), ("haswell", AVX2)])
def test_other_targets_give_the_same_archive_and_read_it(cpu, tier, here, tmp_path):
    """A target without AVX-512 must not die, and must write and read the same bytes."""
    env = os.environ | {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    there = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env=env)
    assert there.stderr.strip() == tier
    assert here == there.stdout


def test_without_a_place_for_a_cache_it_works_and_says_so_once():
    """A read-only install and a home folder that cannot be written: numba then finds no place for its cache."""
    script = (
        "import warnings\n"
        "from numba.core.caching import CacheImpl\n"
        "CacheImpl._locator_classes = []\n"
        "with warnings.catch_warnings(record=True) as told:\n"
        "    warnings.simplefilter('always')\n"
        "    import numpy as np, tzip\n"
        "    x = np.arange(5000, dtype=np.float32)\n"
        "    assert np.array_equal(tzip.decode(tzip.encode(x)), x)\n"
        "print([str(w.message) for w in told if 'anew in every process' in str(w.message)])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("anew in every process") == 1
