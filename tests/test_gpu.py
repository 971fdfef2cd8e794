"""Chunks decoded by the GPU's kernels, emulated: the same bits as on the CPU, and the same chunks refused."""

import dataclasses
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import strategies
from emulation import SANITIZED, EmulatedDevice, decode_on, make_device
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import CONSTANT, HUFFMAN, RANS, RAW, ZSTANDARD, Taste
from test_chunks import CODINGS, KINDS, RECORDS, SPLITS, alike, decode, fate, no_sums

from tzip.coders import describing, planes, predictors
from tzip.coders.errors import CorruptError, TruncatedError, UnsupportedError
from tzip.encoding import _unchanged, encode_chunk
from tzip.gpu import jobs
from tzip.gpu.decoder import Batch, Item, LeftToCpuError, failure
from tzip.gpu.devices import SOURCES, THREADS, source_text
from tzip.plan import LEVELS

CODED = Taste(codecs=(RAW, CONSTANT, HUFFMAN, RANS))
DECODED = {kind: number for kind, number in KINDS.items() if kind != "vocabulary"}  # by kernels
HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def device():
    return make_device()


@pytest.fixture(scope="module")
def lenient():
    """A device that looks at no sum: what the kernels themselves let pass shows."""
    return make_device(("sum_stripes", "sum_compare"))


def check(device, chunk):
    code, data = decode_on(device, chunk.record, chunk.elements, chunk.width, base=chunk.base or None)
    assert code == 0
    assert data == chunk.data


def check_raw(device, raw, width, coding, level):
    record = bytes(encode_chunk(raw, width, coding, LEVELS[level], 3, 2).record)
    try:
        assert decode_on(device, record, raw.size // width, width, 3, 2) == (0, raw.tobytes())
    except LeftToCpuError:
        return 0
    return 1


# ---- the same bits


@pytest.mark.parametrize("level", ["fast", "default", "max"])
@pytest.mark.parametrize(("coding", "width"), CODINGS)
def test_small_chunks_of_our_encoders(device, coding, width, level):
    done = sum(
        check_raw(device, strategies.array(kind, n, width, coding), width, coding, level)
        for kind, n in product(strategies.DATA, (1, 3, 32, 129, 1023))
    )
    assert done >= 20  # the others have a frame of zstandard


@pytest.mark.parametrize(("coding", "width", "kind"), [
    ("bf16", 2, "normal"), ("bf16", 2, "outliers"), ("f16", 2, "negative"), ("f32", 4, "normal"), ("f64", 8, "positive"),
    ("planes", 4, "ints"), ("planes", 2, "ramp"), ("planes", 1, "normal"), ("bf16", 2, "sparse"),
])  # fmt: skip
@pytest.mark.parametrize("n", [2**18 - 1, 2**18 + 4097])
def test_chunks_around_a_group(device, coding, width, kind, n):
    raw = strategies.array(kind, n, width, coding)
    assert sum(check_raw(device, raw, width, coding, level) for level in ("fast", "default"))


@pytest.mark.parametrize(("coding", "width"), [("bf16", 2), ("f32", 4)])
def test_whole_chunks(device, coding, width):
    assert check_raw(device, strategies.array("normal", 2**20, width, coding), width, coding, "default")


@given(st.sampled_from(SPLITS), st.integers(1, 6000), st.integers(0, 2**32 - 1))
@settings(max_examples=120)
def test_all_that_the_format_allows(device, kind, elements, seed):
    check(device, random_chunk(seed, *kind, elements))


@pytest.mark.parametrize(("split", "width"), [(2, 2), (4, 4), (1, 2), (0, 1)])
def test_random_chunks_of_several_groups(device, split, width):
    rng = np.random.default_rng([split, width])
    taste = Taste(codecs=(HUFFMAN, RANS, RAW), most_segments=255)
    check(device, strategies.random_chunk(rng, split, width, 2**18 + 5555, taste))


def unframed(make, seed):
    """What `make` returns for a seed, or one of the next, without a frame of zstandard in its record."""
    while strategies.codecs_of((made := make(seed))[0].record) >> ZSTANDARD & 1:
        seed += 1
    return made


def random_transform(seed, kind, n, taste=CODED, **choice):
    """A chunk with a transform, and that."""
    return unframed(lambda seed: strategies.random_transform(np.random.default_rng(seed), kind, n, taste, **choice), seed)


def random_chunk(seed, split, width, n, taste=CODED):
    """A chunk without a transform."""
    return unframed(lambda seed: [strategies.random_chunk(np.random.default_rng(seed), split, width, n, taste)], seed)[0]


@pytest.mark.parametrize("kind", DECODED)
@given(st.integers(1, 9000), st.integers(0, 2**32 - 1))
@settings(max_examples=25)
def test_all_transforms_that_the_format_allows(device, kind, n, seed):
    chunk, transform = random_transform(seed, KINDS[kind], n)
    if kind == "difference" and 1 < transform.b < 64:
        with pytest.raises(LeftToCpuError):
            check(device, chunk)
    else:
        check(device, chunk)


@pytest.mark.parametrize("kind", DECODED)
def test_transforms_of_several_groups(device, kind):
    chunk, transform = random_transform(KINDS[kind], KINDS[kind], 2**18 + 12345, Taste(codecs=(RAW, HUFFMAN, RANS)), a=8)
    if kind == "difference":
        assert transform.b == 1 or transform.b >= 64
    check(device, chunk)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_palettes_of_every_width(device, width):
    for bits in (1, 2, 4, 8):
        for n in (1, 7, 777):
            check(device, random_transform(n, KINDS["palette"], n, width=width, a=bits)[0])


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_differences_that_begin_with_a_ramp(device, width):
    seen = set()
    for seed in range(60):
        chunk, transform = random_transform(seed, KINDS["difference"], 300 + 71 * seed, width=width)
        if transform.c and (transform.b == 1 or transform.b >= 64):
            check(device, chunk)
            seen.add((transform.b == 1, transform.c == 2**32 - 1))
            if len(seen) == 4:
                break
    else:
        pytest.fail("a kind of ramp is missing")
    ramp = np.arange(5000, dtype=f"<u{width}") * 3
    assert check_raw(device, ramp.view(np.uint8), width, "planes", "default")


def unchanged(n, width, seed=0):
    """A chunk that is its base (section 6.7)."""
    raw = np.frombuffer(np.random.default_rng(seed).bytes(n * width), np.uint8)
    return strategies.Chunk(bytes(_unchanged(raw, width, 0, 0).record), raw.tobytes(), 0, width, raw.tobytes())


def test_unchanged_chunks(device):
    for n, width in ((1, 1), (3, 8), (1001, 2), (2**18 + 7, 4)):
        chunk = unchanged(n, width)
        assert len(chunk.record) == 48
        check(device, chunk)
        base = bytes([chunk.base[0] ^ 1]) + chunk.base[1:]
        assert decode_on(device, chunk.record, n, width, base=base)[0] == jobs.BAD_DECODED_SUM
    with pytest.raises(CorruptError, match="its run names none"):
        decode_on(device, chunk.record, n, width)


def test_threads_in_the_reverse_order_give_the_same(device):
    """Of two threads that share memory without a barrier between them, one is late in one of the two orders."""
    backwards = EmulatedDevice(backwards=True)
    rng = np.random.default_rng(11)
    for _ in range(30):
        split, width = SPLITS[rng.integers(len(SPLITS))]
        check(backwards, random_chunk(int(rng.integers(1 << 30)), split, width, int(rng.integers(1, 9000))))
    for kind in DECODED.values():
        chunk, transform = random_transform(kind, kind, 6000)
        if kind != KINDS["difference"] or transform.b == 1 or transform.b >= 64:
            check(backwards, chunk)


@pytest.mark.parametrize("codec", [HUFFMAN, RANS])
def test_streams_that_end_where_the_memory_ends(device, codec):
    """What is read behind the last word is still memory of the batch: a valid chunk is never refused for it."""
    rng = np.random.default_rng(codec)
    check(device, strategies.random_chunk(rng, 0, 1, 4096, Taste(codecs=(codec,), escape=0, most_symbols=2)))


# ---- what is left to the CPU


def turned(seed, n):
    """A difference as it is encoded for a turned base: by hand, from an ordered one."""
    chunk, _ = random_transform(seed, KINDS["delta"], n)
    record = bytearray(chunk.record)
    record[53] = 2
    return dataclasses.replace(chunk, record=strategies.rechecked(record))


def predicted(number):
    """A chunk whose predictor has that number; its parameters are whatever it is given."""
    chunk, _ = random_transform(3, KINDS["delta"], 64, width=4)
    record = bytearray(chunk.record)
    record[39], record[72:80] = len(predictors.ROLES[number]), number.to_bytes(8, "little")
    return dataclasses.replace(chunk, record=strategies.rechecked(record))


def adaptive():
    """A difference at the level that codes small classes in the adaptive range coder."""
    rng = np.random.default_rng(1)
    base = strategies.array("normal", 9000, 2, "bf16")
    raw = (base.view(np.uint16) + (rng.random(9000) < 0.3).astype(np.uint16)).view(np.uint8)
    made = encode_chunk(raw, 2, "bf16", LEVELS["max"], 0, 0, 0, 0, base)
    assert made.codecs >> 7 & 1
    return strategies.Chunk(bytes(made.record), raw.tobytes(), 1, 2, base.tobytes())


@pytest.mark.parametrize(("make", "reason"), [
    (lambda: strategies.random_chunk(np.random.default_rng(1), 1, 2, 500, Taste(codecs=(ZSTANDARD,))), "zstandard"),
    (adaptive, "the adaptive range coder"),
    (lambda: random_transform(1, KINDS["vocabulary"], 500)[0], "vocabulary"),
    (lambda: turned(1, 500), "a turned difference"),
    (lambda: predicted(predictors.LEVELS), "rows and columns"),
])  # fmt: skip
def test_what_kernels_do_not_decode_is_left_to_the_cpu(device, make, reason):
    chunk = make()
    with pytest.raises(LeftToCpuError, match=reason):
        check(device, chunk)
    broken = chunk.record[:36] + bytes([chunk.record[36] ^ 64]) + chunk.record[37:]
    with pytest.raises((CorruptError, UnsupportedError)):  # what the header shows is told at once
        check(device, dataclasses.replace(chunk, record=broken))


# ---- the same refused


def fate_on(device, chunk, record):
    """What becomes of a record on a device: its bytes, or which kind of error."""
    try:
        code, data = decode_on(device, record, chunk.elements, chunk.width, base=chunk.base or None)
    except LeftToCpuError:
        return "left"
    except (CorruptError, UnsupportedError) as e:
        return "corrupt" if isinstance(e, CorruptError) else "unsupported"
    return "corrupt" if code else data


def plain_records():
    """Small records of all splits, codecs and transforms without a frame."""
    rng = np.random.default_rng(7)
    yield "bf16", strategies.random_chunk(rng, 2, 2, 45, Taste(codecs=(HUFFMAN,), escape=1, most_symbols=6))
    yield "bf16 with raw rests", strategies.random_chunk(rng, 2, 2, 45, Taste(codecs=(RANS, RAW), escape=1, most_symbols=6))
    yield "f64", strategies.random_chunk(rng, 5, 8, 40, Taste(codecs=(RANS, CONSTANT), escape=1, most_symbols=4))
    yield "planes", strategies.random_chunk(rng, 1, 2, 33, Taste(codecs=(RANS, HUFFMAN), escape=1, most_symbols=9))
    for kind, number in DECODED.items():
        if kind != "difference":  # of a few elements, which the CPU adds up
            yield kind, random_transform(1, number, 60, Taste(codecs=(RAW, CONSTANT)))[0]


PLAIN = dict(plain_records())


@pytest.mark.parametrize("name", PLAIN)
def test_every_flipped_bit_is_seen(device, name):
    """By the check of the record; the few that the host's proofs see first are errors, too."""
    chunk = PLAIN[name]
    for bit in range(64, 8 * len(chunk.record), 8 * len(chunk.record) // 60 | 1):
        flipped = bytearray(chunk.record)
        flipped[bit // 8] ^= 1 << bit % 8
        assert fate_on(device, chunk, flipped) in ("corrupt", "unsupported", "left"), bit


@pytest.mark.parametrize("name", PLAIN)
def test_without_sums_flipped_bits_are_judged_as_on_the_cpu(lenient, name, monkeypatch):
    chunk = PLAIN[name]
    no_sums(monkeypatch)
    record = chunk.record[:8] + bytes(8) + chunk.record[16:40] + bytes(8) + chunk.record[48:]
    assert fate_on(lenient, chunk, record) == chunk.data
    passed = 0
    for bit in range(8 * 48, 8 * len(record), 8 * len(record) // 250 | 1):
        flipped = bytearray(record)
        flipped[bit // 8] ^= 1 << bit % 8
        ours = fate_on(lenient, chunk, flipped)
        theirs = fate(decode, flipped, chunk.elements, chunk.width, 0, 0, chunk.base)
        assert ours == "left" or alike(ours, theirs, bit // 8, chunk), bit
        passed += isinstance(ours, bytes)
    assert passed


@given(st.sampled_from([*SPLITS, *KINDS]), st.integers(1, 3000), st.integers(0, 2**32 - 1))
@settings(max_examples=60)
def test_without_sums_random_damage_is_judged_as_on_the_cpu(lenient, kind, elements, seed):
    rng = np.random.default_rng(seed)
    if isinstance(kind, str):
        chunk = random_transform(seed, KINDS[kind], elements)[0]
    else:
        chunk = random_chunk(seed, *kind, elements)
    with pytest.MonkeyPatch.context() as monkeypatch:
        no_sums(monkeypatch)
        for record in damaged(rng, chunk.record, 6):
            ours = fate_on(lenient, chunk, record)
            theirs = fate(decode, record, chunk.elements, chunk.width, 0, 0, chunk.base)
            assert ours in (theirs, "left") or {ours, theirs} == {"corrupt", "unsupported"}


def damaged(rng, record, count):
    """Records with a few bytes changed behind the head, most often in the entries and the tables, and no sums."""
    first, blocks = strategies.blocks_of(record)
    entries = first + 16 * blocks
    for _ in range(count):
        broken = bytearray(record)
        broken[8:16] = broken[40:48] = bytes(8)
        low, high = [(48, entries), (entries, len(record)), (entries, min(len(record), entries + 200))][rng.integers(3)]
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.integers(low, high)) if low < high else 48
            broken[at] = int(rng.choice([0, 1, 255, broken[at] ^ 1 << int(rng.integers(8)), int(rng.integers(256))]))
        yield bytes(broken)


@pytest.mark.parametrize("name", RECORDS)
def test_truncations_are_refused_by_the_host(device, name):
    chunk = RECORDS[name]
    for n in range(64, len(chunk.record), 16):
        part = chunk.record[:16] + n.to_bytes(8, "little") + chunk.record[24:n]
        assert fate_on(device, chunk, strategies.rechecked(part)) in ("corrupt", "left")


@pytest.mark.parametrize(("at", "code"), [(70, jobs.BAD_STORED_SUM), (40, jobs.BAD_DECODED_SUM)])
def test_both_sums_are_looked_at(device, at, code):
    chunk = strategies.random_chunk(np.random.default_rng(3), 0, 1, 5000, Taste(codecs=(RAW,)))
    record = bytearray(chunk.record)
    record[at] ^= 1
    if code == jobs.BAD_DECODED_SUM:
        record = strategies.rechecked(record)
    assert decode_on(device, record, 5000, 1)[0] == code


def test_what_the_device_refuses_the_cpu_puts_in_words():
    """Where the CPU finds nothing wrong the copy on the device was."""
    from tzip.chunks import SLACK

    chunk = strategies.random_chunk(np.random.default_rng(3), 0, 1, 5000, Taste(codecs=(RAW,)))
    host = np.zeros(len(chunk.record) + SLACK, np.uint8)
    host[: len(chunk.record)] = np.frombuffer(chunk.record, np.uint8)
    check = int.from_bytes(chunk.record[8:16], "little")
    item = Item(host, len(chunk.record), 0, 0, 0, 5000, 1, check, 0)
    assert "the device refuses a chunk" in str(failure(item, 3))
    host[500] ^= 1
    assert str(failure(item, 3)) == "a chunk record does not match its check"
    host[16] ^= 1
    assert isinstance(failure(item, 3), TruncatedError | CorruptError)


# ---- records of the usual form, described at once


def described(record, elements, split):
    from tzip.formats.layout import group_size

    record = np.frombuffer(bytes(record), np.uint8)
    return describing.describe(record, 0, 0, elements, planes.SPLITS[split], group_size(elements))


def accepted(record, elements, width):
    """Whether what proves records step by step finds nothing wrong, nor does the batch."""
    batch = Batch((1 << 20, 1 << 30), jobs.Blob(np.zeros(1 << 20, np.uint8), 1 << 20), 1 << 40)
    host = np.frombuffer(bytes(record) + bytes(64), np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(describing, "describe", lambda *_: None)
        try:
            batch.add(Item(host, len(record), 1 << 30, 0, 0, elements, width, 0, 1 << 31))
        except (CorruptError, UnsupportedError):
            return False
    return True


def usual(seed, split, n, **taste):
    """A chunk whose keys are coded and whose other planes are raw or constant."""
    while True:
        width = strategies.WIDTHS[split][0]
        chunk = strategies.random_chunk(np.random.default_rng(seed), split, width, n, Taste(**taste))
        if described(chunk.record, n, split) is not None:
            return chunk
        seed += 1


@pytest.mark.parametrize("codec", [HUFFMAN, RANS])
@pytest.mark.parametrize("split", [2, 3, 4])
def test_usual_records_described_at_once_and_step_by_step(device, split, codec, monkeypatch):
    for seed, n in ((1, 60), (2, 900)):
        chunk = usual(seed, split, n, codecs=(codec, RAW, RAW, CONSTANT), most_segments=12)
        check(device, chunk)
        with monkeypatch.context() as patch:
            patch.setattr(describing, "describe", lambda *_: None)
            check(device, chunk)


@pytest.mark.parametrize("split", [2, 3, 4])
def test_what_is_described_at_once_is_what_is_accepted_step_by_step(split):
    rng = np.random.default_rng(split)
    yes = no = 0
    for seed in range(4):
        n = int(rng.integers(1, 700))
        chunk = usual(seed, split, n, codecs=(HUFFMAN, RANS, RAW, RAW, CONSTANT), most_segments=12)
        first, blocks = strategies.blocks_of(chunk.record)
        entries = first + 16 * blocks
        for _ in range(300):
            record = bytearray(chunk.record)
            at = int(rng.integers(16, entries)) if rng.random() < 0.8 else int(rng.integers(entries, len(record)))
            record[at] = int(rng.choice([0, 1, 255, record[at] ^ 1 << int(rng.integers(8)), int(rng.integers(256))]))
            found = described(record, n, split) is not None
            assert not found or accepted(record, n, chunk.width), at
            yes += found
            no += not found
    assert yes > 100
    assert no > 100


def test_records_of_our_encoders_are_of_the_usual_form():
    for coding, width, split in (("bf16", 2, 2), ("f16", 2, 3), ("f32", 4, 4)):
        raw = strategies.array("normal", 300_000, width, coding)
        for level in ("fast", "default"):
            record = bytes(encode_chunk(raw, width, coding, LEVELS[level], 0, 0).record)
            rows = described(record, 300_000, split)
            assert rows is not None
            assert rows.shape == (2, describing.COLUMNS)


# ---- the emulation itself


def run_python(text, **environment):
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False, env=variables)


FAULTS = (
    "some threads of a warp have ended, others wait",
    "threads of a warp meet at different points",
    "a warp waits for others that have ended or wait elsewhere",
)


def test_the_emulation_for_other_cpus_does_the_same():
    """There is nothing of x86-64 in it then, and it is slower."""
    other = EmulatedDevice(("-O0", "-DTZIP_UCONTEXT"))
    for seed, (split, width) in enumerate(SPLITS):
        check(other, random_chunk(seed, split, width, 700))
    check(other, random_transform(3, KINDS["sparse"], 6000)[0])


@pytest.mark.parametrize("message", FAULTS)
def test_the_emulation_aborts_where_a_gpu_would_hang(message):
    fault = FAULTS.index(message)
    done = run_python(f"from emulation import EmulatedDevice\nEmulatedDevice().library.emulate_fault({fault})")
    assert done.returncode < 0
    assert message in done.stderr


def sanitized(text):
    """Run a test's Python in a process whose kernels are compiled with AddressSanitizer and UBSan."""
    from emulation import build

    build(SANITIZED)
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    return run_python(text, LD_PRELOAD=found, ASAN_OPTIONS="detect_leaks=0", HYPOTHESIS_PROFILE="ci")


def test_the_sanitizer_sees_a_byte_read_past_the_end():
    done = sanitized("import test_gpu; test_gpu.copy_past_the_end()")
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr


def copy_past_the_end():
    """Copy one byte more than there is; not a test."""
    device = EmulatedDevice(SANITIZED)
    memory, target = device.take(100), device.take(101)
    job, unit = np.array([(memory.address, target.address, 101, 0)], jobs.COPY_JOB), jobs.units([1])
    device.launch("copy_parts", 1, (job.ctypes.data, unit.ctypes.data, 0, 0))


def test_hostile_records_stay_within_bounds():
    """Valid and damaged records of every kind, with memory between all pieces that may not be touched."""
    done = sanitized("import test_gpu; test_gpu.hostile(60)")
    assert done.returncode == 0, done.stderr[-3000:]
    right, refused = map(int, done.stdout.split())
    assert right > 60
    assert refused > 60


def hostile(count):
    """Decode random records and what damage makes of them; not a test. Prints how many were right, and were refused."""
    device = EmulatedDevice(SANITIZED)
    lenient = EmulatedDevice(SANITIZED)
    lenient.skipped = {"sum_stripes", "sum_compare"}
    right = refused = 0
    for seed in range(count):
        rng = np.random.default_rng([seed, 99])
        n = int(rng.choice([1, 3, 31, 128, 129, 700, 3000, 9000]))
        if seed % 5 == 4:
            chunk = random_transform(seed, KINDS["delta"], n)[0]
        elif seed % 3:
            chunk = random_chunk(seed, *SPLITS[seed % len(SPLITS)], n)
        elif seed % 27 == 0:
            chunk = unchanged(n, 1 << seed % 4, seed)
        else:
            chunk = random_transform(seed, 1 + seed // 3 % 8, n)[0]
        broken = damaged(rng, chunk.record, 5) if len(chunk.record) > 48 else ()
        fates = [fate_on(device, chunk, chunk.record), *(fate_on(lenient, chunk, r) for r in broken)]
        assert fates[0] == chunk.data or (fates[0] == "left" and chunk.record[38])
        if chunk.base:  # another base: more elements of a class than there are
            for _ in range(3):
                other = dataclasses.replace(chunk, base=rng.bytes(len(chunk.base)))
                fates.append(fate_on(lenient, other, chunk.record))
        right += sum(isinstance(f, bytes) for f in fates)
        refused += fates.count("corrupt")
    print(right, refused)


# ---- sources and structures


def test_kernels_and_their_threads_are_those_of_the_sources():
    found = re.findall(r"^(?:KERNEL\((\d+)\)|DECODER\(\d\)) (\w+)\(", source_text(), re.MULTILINE)
    assert {name: int(threads or 32 * jobs.WARPS) for threads, name in found} == THREADS
    assert sorted(p.stem for p in (HERE.parent / "gpu").glob("*.cuh")) == sorted(SOURCES)


def test_structures_have_the_sizes_that_the_sources_assert():
    sizes = {"TableJob": jobs.TABLE_JOB, "Source": jobs.SOURCE, "Group": jobs.GROUP, "CodedJob": jobs.CODED_JOB,
             "EscapeJob": jobs.ESCAPE_JOB, "SumJob": jobs.SUM_JOB, "TransformJob": jobs.TRANSFORM_JOB}  # fmt: skip
    for name, form in sizes.items():
        assert f"sizeof({name}) == {form.itemsize}" in source_text(), name
    assert f"sizeof(Table) == {jobs.TABLE_SIZE}" in source_text()
    for name in ("PART", "TILE", "STRIPES", "WARPS"):
        assert f"{name} = {getattr(jobs, name)}" in source_text()
