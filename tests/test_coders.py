"""Sums, rows, Huffman and rANS: against the reference decoder, and every malformed table refused."""

import heapq
from fractions import Fraction
from functools import lru_cache
from itertools import product

import numpy as np
import pytest
import reference
import strategies
from hypothesis import given
from hypothesis import strategies as st

from tzip.coders import counting, fitting, huffman, keys, planes, rans, rows, zstd
from tzip.coders.errors import CorruptError, TruncatedError
from tzip.coders.huffman import SLACK, HuffmanTable
from tzip.coders.rans import RansTable
from tzip.coders.sums import STRIPE, Sum, sum64
from tzip.coders.tables import Alphabet, read_escapes, segment_size

SIZES = [1, 31, 32, 33, 127, 128, 129, 895, 897, 1023, 4095, 4096, 4097]
NO_ESCAPES = np.empty(0, np.uint32)


def u8(data):
    return np.frombuffer(bytes(data), np.uint8)


# ---- sum64


def test_sum64_equals_the_reference_at_every_boundary():
    data = np.random.default_rng(0).integers(0, 256, 3 * 4096 + 20, np.uint8)
    sizes = {*range(26), *(k * 4096 + d for k in (1, 2, 3) for d in range(-9, 10)), 4096 - 512, 4096 + 512}
    for n in sorted(sizes):
        expected = reference.sum64(data[:n].tobytes())
        assert sum64(data[:n]) == expected, n
        assert strategies.sum64(data[:n].tobytes()) == expected, n


def test_sum64_of_unaligned_views():
    data = np.random.default_rng(1).integers(0, 256, 2 * 4096 + 64, np.uint8)
    for start in range(17):
        view = data[start : start + 4096 + 33]
        assert sum64(view) == reference.sum64(view.tobytes()), start


def test_sum64_sees_every_bit_and_the_order_of_stripes():
    data = np.random.default_rng(2).integers(0, 256, 4096 + 40, np.uint8)
    sums = {sum64(data)}
    for at in (*range(24), *range(4088, 4136)):
        for bit in range(8):
            data[at] ^= 1 << bit
            sums.add(sum64(data))
            data[at] ^= 1 << bit
    assert len(sums) == 1 + 72 * 8
    swapped = np.concatenate((data[4096:], np.zeros(4056, np.uint8), data[:4096]))
    assert sum64(swapped) == reference.sum64(swapped.tobytes())
    zeros = {sum64(np.zeros(n, np.uint8)) for n in (0, 1, 8, 4095, 4096, 4097, 8192)}
    assert len(zeros) == 7


def test_sums_of_parts_are_those_of_the_whole():
    data = np.random.default_rng(3).integers(0, 256, 5 * STRIPE + 77, np.uint8)
    for cuts in ([], [STRIPE], [0, STRIPE, 3 * STRIPE], [5 * STRIPE], [STRIPE * i for i in range(6)]):
        total = Sum()
        for part in np.split(data, cuts):
            total.add(part)
        assert total.value() == reference.sum64(data.tobytes()), cuts
    total = Sum()
    assert total.value() == 0
    total.add(data[:100])
    assert total.value() == sum64(data[:100])
    for more in (data[:STRIPE], data[:1]):
        with pytest.raises(ValueError, match="stripe"):
            total.add(more)


def test_sum64_has_known_values():
    # From the reference decoder; a change of the constants in both would pass every other test.
    assert sum64(u8(b"")) == 0
    assert sum64(u8(b"tzip")) == 0x7D8F456EA7413AF6
    assert sum64(u8(range(256))) == 0xA26A8CB7009C94AF


# ---- rows


@pytest.mark.parametrize("width", range(1, 9))
def test_rows_equal_the_reference_at_every_size(width):
    rng = np.random.default_rng(width)
    for n in range(601):
        symbols = rng.integers(0, 1 << width, n).astype(np.uint8)
        packed = rows.pack(symbols, width)
        assert packed.size == rows.packed_size(n, width) == reference.packed_length(n, width)
        assert packed.tobytes() == strategies.pack_rows(symbols, width)
        assert bytes(reference.unpack_rows(packed.tobytes(), n, width)) == symbols.tobytes()
        out = np.full(n, 0xEE, np.uint8)
        rows.unpack_into(packed, width, out)
        assert out.tobytes() == symbols.tobytes()


@pytest.mark.parametrize("width", range(1, 9))
def test_rows_of_a_whole_group(width):
    symbols = np.random.default_rng(width).integers(0, 1 << width, 2**18 - 1).astype(np.uint8)
    packed = rows.pack(symbols, width)
    assert bytes(reference.unpack_rows(packed.tobytes(), symbols.size, width)) == symbols.tobytes()
    out = np.empty(symbols.size, np.uint8)
    rows.unpack_into(packed, width, out)
    assert out.tobytes() == symbols.tobytes()


@pytest.mark.parametrize("width", range(1, 9))
def test_rows_lie_anywhere_and_nothing_else_is_written(width):
    rng = np.random.default_rng(width)
    for n in (1, 31, 255, 256, 257, 1000):
        symbols = rng.integers(0, 1 << width, n).astype(np.uint8)
        packed = rows.pack(symbols, width)
        for lead in (1, 7, 32):
            payload = np.concatenate((np.full(lead, 0xFF, np.uint8), packed))[lead:]
            out = np.full(lead + n + 300, 0xEE, np.uint8)
            rows.unpack_into(payload, width, out[lead : lead + n])
            assert out[lead : lead + n].tobytes() == symbols.tobytes()
            assert (out[:lead] == 0xEE).all()
            assert (out[lead + n :] == 0xEE).all()
            shifted = np.concatenate((np.zeros(lead, np.uint8), symbols))[lead:]
            assert rows.pack(shifted, width).tobytes() == packed.tobytes()


@pytest.mark.parametrize("width", range(1, 8))
def test_rows_ignore_what_lies_past_the_last_symbol(width):
    rng = np.random.default_rng(width)
    n = 300
    payload = rng.integers(0, 256, rows.packed_size(n, width), np.uint8)
    out = np.empty(n, np.uint8)
    rows.unpack_into(payload, width, out)
    assert out.tolist() == reference.unpack_rows(payload.tobytes(), n, width)


@pytest.mark.parametrize("width", range(1, 9))
def test_rows_refuse_payloads_of_another_size(width):
    right = rows.packed_size(100, width)
    for size in {0, 1, right - 1, right + 1, right + 32, right - 32} - {right}:
        with pytest.raises(CorruptError):
            rows.unpack_into(np.zeros(size, np.uint8), width, np.empty(100, np.uint8))


# ---- Huffman: code lengths


@lru_cache
def _complete_codes(k, limit):
    """All sorted complete codes of k leaves of at most `limit` bits."""
    if k == 1:
        return {(0,)}
    if limit == 0 or k > 1 << limit:
        return set()
    codes = set()
    for left in range(1, k // 2 + 1):
        for a, b in product(_complete_codes(left, limit - 1), _complete_codes(k - left, limit - 1)):
            codes.add(tuple(sorted(n + 1 for n in a + b)))
    return codes


def _cheapest(counts, codes):
    ordered = sorted(counts, reverse=True)
    return min(sum(c * n for c, n in zip(ordered, code, strict=True)) for code in codes)


def _package_merge_cost(counts, limit):
    """Larmore and Hirschberg's coins as sets of symbols: nothing shared with the kernel."""
    coins = sorted((c, (s,)) for s, c in enumerate(counts))
    row = list(coins)
    for _ in range(limit - 1):
        packages = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(row[::2], row[1::2], strict=False)]
        row = sorted(coins + packages)
    return sum(c for c, _ in row[: 2 * len(counts) - 2])


def _huffman_cost(counts):
    heap = list(counts)
    heapq.heapify(heap)
    cost = 0
    while len(heap) > 1:
        both = heapq.heappop(heap) + heapq.heappop(heap)
        cost += both
        heapq.heappush(heap, both)
    return cost


def _lengths(counts):
    full = np.zeros(256, np.int64)
    full[: len(counts)] = counts
    lengths = huffman.code_lengths(full)
    used = full > 0
    assert not lengths[~used].any()
    assert lengths[used].min() >= 1
    assert lengths.max() <= 11
    assert sum(2 ** (11 - n) for n in lengths[used].tolist()) == 2**11
    return lengths, int((full * lengths).sum())


@given(st.lists(st.integers(1, 60), min_size=2, max_size=8))
def test_code_lengths_are_as_good_as_the_best_of_all_codes(counts):
    _, cost = _lengths(counts)
    assert cost == _cheapest(counts, _complete_codes(len(counts), 11))


@given(st.lists(st.integers(0, 10**9), min_size=2, max_size=256).filter(lambda c: sum(n > 0 for n in c) > 1))
def test_code_lengths_cost_what_package_merge_costs(counts):
    _, cost = _lengths(counts)
    assert cost == _package_merge_cost([c for c in counts if c], 11)


def test_code_lengths_without_the_limit_are_huffmans():
    counts = np.random.default_rng(3).integers(900, 1100, 256)
    _, cost = _lengths(counts)
    assert cost == _huffman_cost(counts.tolist())


@pytest.mark.parametrize("size", [2, 3, 11, 12, 13, 20, 60, 200, 256])
def test_code_lengths_keep_the_limit_for_fibonacci_counts(size):
    counts = [1, 1]
    while len(counts) < size:
        counts.append(min(counts[-1] + counts[-2], 1 << 45))
    lengths, cost = _lengths(counts)
    assert cost == _package_merge_cost(counts, 11)
    if size > 12:
        assert lengths.max() == 11
        assert cost > _huffman_cost(counts)


def test_all_256_symbols_with_one_dominant():
    counts = np.ones(256, np.int64)
    counts[77] = 10**12
    lengths, cost = _lengths(counts)
    assert lengths[77] == 1
    assert cost == _package_merge_cost(counts.tolist(), 11)


@pytest.mark.parametrize("seed", range(6))
def test_codes_are_the_canonical_ones(seed):
    rng = np.random.default_rng(seed)
    symbols = sorted(rng.choice(256, int(rng.integers(2, 257)), replace=False).tolist())
    entries = strategies.random_lengths(rng, symbols)
    lengths = np.zeros(256, np.int64)
    for byte, length in entries.items():
        lengths[byte] = length
    codes = HuffmanTable(lengths).codes
    for byte, (length, code) in reference.huffman_codes(entries).items():
        assert f"{codes[byte]:0{length}b}"[::-1] == f"{code:0{length}b}", byte


# ---- rANS: frequencies


def _quantized(counts):
    full = np.zeros(256, np.int64)
    full[: len(counts)] = counts
    freq = fitting.quantize(full).freq
    assert int(freq.sum()) == 4096
    assert ((freq > 0) == (full > 0)).all()
    assert freq.max() <= 4095
    return full, freq


@given(st.lists(st.integers(0, 2**30), min_size=2, max_size=256).filter(lambda c: sum(n > 0 for n in c) > 1))
def test_quantize_keeps_its_promises(counts):
    _quantized(counts)


@pytest.mark.parametrize(
    "counts", [[1, 2**17], [2**17, 1], [1] * 256, [2**40] + [1] * 255, [3, 3], [1, 1, 2**17], list(range(256))]
)
def test_quantize_at_the_extremes(counts):
    _quantized(counts)


@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=40))
def test_no_single_step_makes_the_frequencies_better(counts):
    full, freq = _quantized(counts)

    def bits(f):
        used = f > 0
        return -(full[used] * np.log2(f[used] / 4096)).sum()

    best = bits(freq)
    for a, b in product(range(min(len(counts), 8)), range(len(counts))):
        if a != b and freq[a] > 1 and freq[b] < 4095:
            freq[a] -= 1
            freq[b] += 1
            # A greedy choice after rounding is no optimum, yet never far from one: integer logarithms have 16 bits.
            assert bits(freq) > best * (1 - 1e-3) - 1
            freq[a] += 1
            freq[b] -= 1


def test_cost_is_the_entropy_under_the_table():
    rng = np.random.default_rng(5)
    for k in (2, 17, 256):
        full, freq = _quantized(rng.integers(1, 1000, k))
        exact = -(full[:k] * np.log2(freq[:k] / 4096)).sum()
        assert exact - 1 <= fitting.cost(full, freq) <= exact * 1.0001 + 2


# ---- both coders: round trips against the reference


def _symbols(kind, n, k, seed=0):
    rng = np.random.default_rng([seed, n, k])
    alphabet = np.sort(rng.choice(256, k, replace=False))
    if kind == "uniform":
        at = rng.integers(0, k, n)
    else:  # a geometric distribution: long codes and frequencies of 1
        at = np.minimum(rng.geometric(0.5, n) - 1, k - 1)
    counts = np.bincount(alphabet[at], minlength=256).astype(np.int64)
    counts[alphabet] += 1  # all of the alphabet stands in the table
    return alphabet[at].astype(np.uint8), counts


def _decode_rans(buffer, start, stop, escapes, segments, shared, out):
    stream = rans.open_stream(buffer, start, stop, escapes, segments, shared, out.size)
    rans.decode_bytes(buffer, stream, out)
    return stream.table


def _check_round_trip(codec, symbols, counts, segments):
    if codec == "huffman":
        table = HuffmanTable(huffman.code_lengths(counts))
        encode, decode, slow = huffman.encode, huffman.decode_into, reference.huffman_decode
        entries = dict(zip(*_used(table.lengths), strict=True))
        shared_reference = reference.Table(3, entries)
    else:
        table = fitting.quantize(counts)
        encode, decode, slow = rans.encode, _decode_rans, reference.rans_decode
        shared_reference = reference.Table(4, dict(zip(*_used(table.freq), strict=True)))
    escapes = np.array([7, 9], "<u4")
    for shared, listed in ((False, NO_ESCAPES), (True, escapes)):
        payload = b"".join(encode(symbols, table, shared, segments, listed))
        expected, words, _ = slow(payload, symbols.size, segments, listed.size, shared_reference if shared else None)
        assert bytes(expected) == symbols.tobytes()
        assert words == listed.tolist()
        # At any offset, with other bytes around it; nothing may depend on the slack.
        for lead, rubbish in ((0, 0), (3, 0xFF)):
            buffer = np.full(lead + len(payload) + SLACK, rubbish, np.uint8)
            buffer[lead : lead + len(payload)] = u8(payload)
            out = np.full(symbols.size, 0xEE, np.uint8)
            used = decode(buffer, lead, lead + len(payload), listed.size, segments, table if shared else None, out)
            assert out.tobytes() == symbols.tobytes()
            assert _entries(used) == _entries(table)


def _used(entries):
    at = np.flatnonzero(entries)
    return at.tolist(), entries[at].tolist()


def _segment_numbers(n, how):
    possible = strategies.segment_counts(n)
    return possible[0] if how == "fewest" else max(k for k in possible if k <= 9)


@pytest.mark.parametrize("kind", ["uniform", "skewed"])
@pytest.mark.parametrize("how", ["fewest", "several"])
@pytest.mark.parametrize("codec", ["huffman", "rans"])
def test_round_trip_equals_the_reference(codec, how, kind):
    for n, k in product(SIZES, (2, 3, 16, 100, 256)):
        _check_round_trip(codec, *_symbols(kind, n, k), _segment_numbers(n, how))


@pytest.mark.parametrize("how", ["fewest", "several"])
@pytest.mark.parametrize("codec", ["huffman", "rans"])
@pytest.mark.parametrize(("n", "k", "kind"), [(2**18, 256, "uniform"), (2**18, 40, "skewed"), (2**18 - 1, 2, "skewed")])
def test_round_trip_of_whole_groups(codec, how, n, k, kind):
    _check_round_trip(codec, *_symbols(kind, n, k), _segment_numbers(n, how))


@pytest.mark.parametrize("codec", ["huffman", "rans"])
def test_payloads_are_as_small_as_promised(codec):
    symbols, _ = _symbols("skewed", 2**17, 40)
    counts = np.bincount(symbols, minlength=256).astype(np.int64)
    p = counts[counts > 0] / symbols.size
    entropy = -(p * np.log2(p)).sum() * symbols.size / 8
    if codec == "huffman":
        payload = b"".join(huffman.encode(symbols, HuffmanTable(huffman.code_lengths(counts)), False, 1, NO_ESCAPES))
        assert entropy <= len(payload) <= entropy * 1.01 + 300
    else:
        payload = b"".join(rans.encode(symbols, fitting.quantize(counts), False, 1, NO_ESCAPES))
        assert entropy <= len(payload) <= entropy * 1.002 + 300


@given(st.integers(0, 2**32 - 1), st.sampled_from(["huffman", "rans"]), st.integers(0, 5000), st.integers(1, 255))
def test_arbitrary_tables_decode_like_the_reference(seed, codec, extra, most):
    rng = np.random.default_rng(seed)
    symbols = sorted(rng.choice(256, int(rng.integers(2, 257)), replace=False).tolist())
    n = int(rng.integers(1, 300)) + extra
    segments = max(k for k in strategies.segment_counts(n) if k <= most)
    coded = rng.choice(symbols, n)
    if codec == "huffman":
        table = strategies.random_lengths(rng, symbols)
        before, after = strategies.huffman_payload(coded, table, segments, lambda c: rng.choice(symbols, c))
        payload, decode = before + strategies.huffman_table(table) + after, huffman.decode_into
    else:
        table = strategies.random_frequencies(rng, symbols)
        before, after = strategies.rans_payload(coded, table, segments, lambda c: rng.choice(symbols, c))
        payload, decode = before + strategies.rans_table(table) + after, _decode_rans
    out = np.empty(n, np.uint8)
    decode(np.concatenate((u8(payload), np.full(SLACK, 0x5A, np.uint8))), 0, len(payload), 0, segments, None, out)
    assert out.tobytes() == coded.astype(np.uint8).tobytes()


def test_numbers_of_segments():
    """Section 7.5: K is a multiple of 128 of at most 2^17, and no segment is empty."""
    for n in (*SIZES, 2**17, 2**17 + 1, 2**18 - 127, 2**18 - 1, 2**18):
        for segments in range(256):
            size = strategies.segment_size(n, segments) if segments else 0
            if size:
                assert segment_size(n, segments) == size
                assert reference._segments(n, segments) == [size] * (segments - 1) + [n - size * (segments - 1)]
            else:
                with pytest.raises(CorruptError):
                    segment_size(n, segments)
                with pytest.raises(reference.Corrupt):
                    reference._segments(n, segments)
    assert strategies.segment_counts(2**18)[0] == 2
    assert strategies.segment_counts(200) == [1, 2]
    with pytest.raises(CorruptError):
        segment_size(5, -1)


@pytest.mark.parametrize("seed", range(8))
def test_slots_are_those_of_the_reference(seed):
    rng = np.random.default_rng(seed)
    entries = strategies.random_frequencies(rng, sorted(rng.choice(256, int(rng.integers(2, 257)), replace=False).tolist()))
    slots = _build(RansTable, entries).slots
    expected = reference.rans_slots(entries)
    assert [(e & 255, e >> 20, e >> 8 & 4095) for e in slots.tolist()] == expected


# ---- tables


def _stored_tables():
    rng = np.random.default_rng(11)
    cases = []
    for k in (2, 3, 4, 5, 9, 255, 256):
        symbols = sorted(rng.choice(256, k, replace=False).tolist())
        cases.append((HuffmanTable, strategies.random_lengths(rng, symbols), strategies.huffman_table))
        cases.append((RansTable, strategies.random_frequencies(rng, symbols), strategies.rans_table))
    for pair in ([0, 1], [0, 255], [254, 255], [7, 9]):
        cases.append((HuffmanTable, dict.fromkeys(pair, 1), strategies.huffman_table))
        cases.append((RansTable, {pair[0]: 1, pair[1]: 4095}, strategies.rans_table))
    return cases


def _entries(table):
    values = table.lengths if isinstance(table, HuffmanTable) else table.freq
    return dict(zip(*_used(values), strict=True))


def _build(kind, entries):
    values = np.zeros(256, np.int64)
    for byte, value in entries.items():
        values[byte] = value
    return kind(values)


def _refused(kind, raw, exact=CorruptError):
    with pytest.raises(CorruptError) as e:
        kind.read(u8(raw))
    if exact is TruncatedError:
        assert e.type is TruncatedError


def _reference_table(kind, raw):
    return reference._read_table(reference._Cursor(bytes(raw)), 3 if kind is HuffmanTable else 4)


@pytest.mark.parametrize(("kind", "entries", "stored"), _stored_tables())
def test_tables_round_trip(kind, entries, stored):
    raw = stored(entries)
    table = _build(kind, entries)
    assert table.stored == raw
    assert table.size == len(raw)
    for tail in (b"", b"\xff" * 9):
        read, size = kind.read(u8(raw + tail))
        assert size == len(raw)
        assert _entries(read) == entries
    assert _reference_table(kind, raw).entries == entries


@pytest.mark.parametrize("form", strategies.RANS_FORMS)
@pytest.mark.parametrize("entries", [e for kind, e, _ in _stored_tables() if kind is RansTable], ids=len)
def test_all_forms_of_tables_of_rans_are_read(entries, form):
    raw = strategies.rans_table(entries, form)
    assert len(raw) % 2 == 0
    for tail in (b"", b"\xff" * 9):
        read, size = RansTable.read(u8(raw + tail))
        assert size == len(raw)
        assert _entries(read) == entries
    assert _reference_table(RansTable, raw).entries == entries
    for n in range(len(raw)):
        _refused(RansTable, raw[:n], TruncatedError)
    for bit in range(8 * len(raw)):
        flipped = bytearray(raw) + bytes(600)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            expected = _reference_table(RansTable, flipped).entries
        except reference.FormatError:
            _refused(RansTable, flipped)
        else:
            assert _entries(RansTable.read(u8(flipped))[0]) == expected


@pytest.mark.parametrize(("kind", "entries", "stored"), _stored_tables())
def test_truncated_tables_are_truncated(kind, entries, stored):
    raw = stored(entries)
    for n in range(len(raw)):
        _refused(kind, raw[:n], TruncatedError)


@pytest.mark.parametrize(("kind", "entries", "stored"), _stored_tables())
def test_every_flipped_bit_of_a_table_is_judged_like_the_reference(kind, entries, stored):
    raw = stored(entries)
    for bit in range(8 * len(raw)):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        flipped += bytes(600)  # a range that grew reads on
        try:
            expected = _reference_table(kind, flipped).entries
        except reference.FormatError:
            _refused(kind, flipped)
        else:
            assert _entries(kind.read(u8(flipped))[0]) == expected


HUFFMAN_FAULTS = {
    "one byte": bytes([5, 5, 1, 0]),
    "range backwards": bytes([6, 5, 0x11, 0]),
    "one symbol at lo": bytes([5, 6, 0x01, 0]),
    "one symbol at hi": bytes([5, 6, 0x10, 0]),
    "no symbol": bytes([5, 6, 0, 0]),
    "incomplete": bytes([5, 6, 0x21, 0]),
    "incomplete, one code of one bit": bytes([5, 7, 0x01, 0x02]),
    "oversubscribed": bytes([5, 7, 0x11, 0x01]),
    "lo absent": bytes([5, 7, 0x10, 0x01]),
    "hi absent": bytes([5, 7, 0x11, 0x00]),
    "length 12": bytes([0, 13, *(0x21, 0x43, 0x65, 0x87, 0xA9, 0xCB, 0xCC)]) + b"\0",
    "unused half not zero": bytes([5, 7, 0x21, 0x12]),
    "padding not zero": bytes([5, 6, 0x11, 1]),
}
def _short(*frequencies, hi=None, rubbish=0, padding=b""):
    """A short table of bytes 0, 1, …; `padding` stands in the place of the byte that makes it even."""
    table = strategies.gamma_table(len(frequencies) - 1 if hi is None else hi, list(frequencies), rubbish)
    return table + (padding or bytes(len(table) % 2))


RANS_FAULTS = {
    "one byte": bytes([5, 5, 0, 0x10, 0, 0]),
    "short, one frequency": _short(0, 4096),
    "short, one frequency of 4095": _short(0, 4095),
    "short, hi 0": _short(4096),
    "short, hi 0 and a frequency of 0": _short(0),
    "short, hi 0 and two bytes": _short(1, 4095, hi=0),
    "short, hi absent": _short(1, 4095, 0),
    "short, sum 4095": _short(1, 4094),
    "short, sum 4097": _short(2, 4095),
    "short, sum 8190": _short(4095, 4095),
    "short, sum 0": _short(0, 0),
    "short, thirteen zeros": bytes([1, 1]) + (1 << 13 | 1 << 40).to_bytes(8, "little"),
    "short, nothing but zeros": bytes([1, 1]) + bytes(600),
    "short, nothing but ones": bytes([255, 255]) + b"\xff" * 32,
    "short, unused bits not zero": _short(1, 4095, rubbish=1),
    "short, the last unused bit not zero": _short(1, 4094, 1, rubbish=4),
    "short, padding not zero": _short(1, 1, 1, 1, 4092, padding=b"\1"),
    "short, the highest bit of the padding not zero": _short(1, 1, 1, 1, 4092, padding=b"\x80"),
    "range backwards": bytes([6, 5, 1, 0xF0, 0xFF, 0]),
    "sum 4095": bytes([5, 6, 1, 0xE0, 0xFF, 0]),
    "sum 4097": bytes([5, 6, 2, 0xF0, 0xFF, 0]),
    "sum 8190": bytes([5, 6, 0xFF, 0xFF, 0xFF, 0]),
    "sum 0": bytes([5, 6, 0, 0, 0, 0]),
    "lo absent": bytes([5, 7, 0, 0x10, 0x00, 0xFF, 0x0F, 0]),
    "hi absent": bytes([5, 7, 1, 0xF0, 0xFF, 0, 0, 0]),
    "unused bits not zero": bytes([5, 7, 1, 0x10, 0x00, 0xFE, 0x1F, 0]),
    "padding not zero": bytes([5, 6, 1, 0xF0, 0xFF, 1]),
    "sparse, lo absent": bytes([7, 5, 6, 1, 0xF0, 0xFF]),
    "sparse, hi absent": bytes([7, 5, 3, 1, 0xF0, 0xFF]),
    "sparse, a byte behind hi": bytes([7, 5, 13, 1, 0x10, 0, 0xFE, 0x0F]),
    "sparse, an entry of 0": bytes([7, 5, 7, 1, 0x00, 0x00, 0xFF, 0x0F]),
    "sparse, sum 4095": bytes([7, 5, 5, 1, 0xE0, 0xFF]),
    "sparse, sum 4097": bytes([7, 5, 5, 2, 0xF0, 0xFF]),
    "sparse, unused bits not zero": bytes([7, 5, 7, 1, 0x10, 0, 0xFE, 0x1F]),
    "sparse, padding not zero": bytes([14, 5, 1, 2, 1, 0xF0, 0xFF, 1]),
}


@pytest.mark.parametrize("fault", HUFFMAN_FAULTS)
def test_faulty_huffman_tables_are_refused(fault):
    _refused(HuffmanTable, HUFFMAN_FAULTS[fault])
    with pytest.raises(reference.Corrupt):
        _reference_table(HuffmanTable, HUFFMAN_FAULTS[fault])


@pytest.mark.parametrize("fault", RANS_FAULTS)
def test_faulty_rans_tables_are_refused(fault):
    _refused(RansTable, RANS_FAULTS[fault])
    with pytest.raises(reference.Corrupt):
        _reference_table(RansTable, RANS_FAULTS[fault])


def test_the_sound_neighbours_of_the_faulty_tables_are_accepted():
    for raw in (bytes([5, 6, 0x11, 0]), bytes([5, 7, 0x21, 0x02]), bytes([5, 7, 0x01, 0x01])):
        assert HuffmanTable.read(u8(raw))[1] == len(raw)
    for raw in (bytes([5, 6, 1, 0xF0, 0xFF, 0]), bytes([5, 7, 1, 0x10, 0x00, 0xFE, 0x0F, 0])):
        assert RansTable.read(u8(raw))[1] == len(raw)
    sparse = ([7, 5, 5, 1, 0xF0, 0xFF], [7, 5, 7, 1, 0x10, 0, 0xFE, 0x0F], [14, 5, 1, 2, 1, 0xF0, 0xFF, 0])
    short = ((1, 4095), (1, 4094, 1), (1, 1, 1, 1, 4092), (4095, 1), (0, 0, 4095, 1), [16] * 256)
    for raw in (*map(bytes, sparse), *(_short(*frequencies) for frequencies in short)):
        assert _reference_table(RansTable, raw).entries
        assert RansTable.read(u8(raw))[1] == len(raw)


def test_short_tables_by_hand():
    """Frequencies 1 and 4095: v is 2, then 4096, so g is 1 and 12: bits 0 10 and 000000000000 1000000000000."""
    raw = bytes([1, 1]) + (1 << 1 | 1 << 3 + 12).to_bytes(4, "little")
    assert raw == _short(1, 4095)
    entries = {0: 1, 1: 4095}
    assert _reference_table(RansTable, raw).entries == _entries(RansTable.read(u8(raw))[0]) == entries
    for n in range(len(raw)):
        _refused(RansTable, raw[:n], TruncatedError)
        with pytest.raises(reference.Corrupt):
            _reference_table(RansTable, raw[:n])


@given(st.integers(0, 2**32 - 1), st.integers(2, 256))
def test_short_tables_cut_or_changed_anywhere_are_judged_alike(seed, k):
    rng = np.random.default_rng(seed)
    entries = strategies.random_frequencies(rng, sorted(rng.choice(256, k, replace=False).tolist()))
    raw = strategies.rans_table(entries, "short")
    assert _entries(RansTable.read(u8(raw))[0]) == _reference_table(RansTable, raw).entries == entries
    for n in range(len(raw)):
        _refused(RansTable, raw[:n], TruncatedError)
    for _ in range(20):
        changed = bytearray(raw) + rng.bytes(400)
        changed[int(rng.integers(2, len(raw)))] ^= int(rng.integers(1, 256))
        try:
            expected = _reference_table(RansTable, changed).entries
        except reference.FormatError:
            _refused(RansTable, changed)
        else:
            assert _entries(RansTable.read(u8(changed))[0]) == expected


# ---- escapes, windows, frames


def _escape(symbol, position):
    return (symbol << 18 | position).to_bytes(4, "little")


def test_escapes_are_read_and_their_faults_refused():
    good = _escape(5, 0) + _escape(8191, 3) + _escape(0, 99)
    positions, symbols = read_escapes(u8(good), 100, 13)
    assert positions.tolist() == [0, 3, 99]
    assert symbols.tolist() == [5, 8191, 0]
    positions, symbols = read_escapes(u8(_escape(3, 2**17) + _escape(8191, 2**18 - 1)), 2**18, 13)
    assert (positions.tolist(), symbols.tolist()) == ([2**17, 2**18 - 1], [3, 8191])
    for bad in (
        _escape(1, 100),
        _escape(1, 4) + _escape(1, 4),
        _escape(1, 4) + _escape(1, 3),
        _escape(8192, 4),
        _escape(1, 2**18 - 1) + _escape(1, 4),
        _escape(8192, 1) + _escape(1, 4),
    ):
        with pytest.raises(CorruptError):
            read_escapes(u8(bad), 100, 13)


def test_windows_of_wide_symbols():
    Alphabet(13, 8191 - 254).check(254)
    Alphabet(10, 0).check(254)
    Alphabet(8, 0).check(255)
    Alphabet(5, 0).check(31)
    for width, base, highest in ((13, 8192 - 254, 254), (13, 0, 255), (8, 1, 3), (5, 0, 32), (9, 300, 212)):
        with pytest.raises(CorruptError):
            Alphabet(width, base).check(highest)


def test_zstandard_frames_must_say_their_size_and_keep_it():
    data = bytes(1000) + b"abc"
    frame = zstd.encode(data, 3)
    assert zstd.decode(frame, len(data)) == data
    for bad, size in (
        (frame, len(data) + 1),
        (frame, len(data) - 1),
        (frame + b"\0", len(data)),
        (frame + frame, len(data)),
        (frame[:-1], len(data)),
        (b"", 0),
        (b"", 5),
        (b"\x50\x2a\x4d\x18\0\0\0\0", 5),
    ):
        with pytest.raises(CorruptError):
            zstd.decode(bad, size)


def test_zstandard_frames_without_a_size_are_refused():
    import zstandard

    frame = zstandard.ZstdCompressor(write_content_size=False).compress(b"abc" * 100)
    with pytest.raises(CorruptError):
        zstd.decode(frame, 300)


def test_truncated_zstandard_frames_are_refused():
    frame = zstd.encode(bytes(range(256)) * 3, 3)
    for n in range(len(frame)):
        with pytest.raises(CorruptError):
            zstd.decode(frame[:n], 768)


# ---- planes: splitting and joining heads

HEADS = [(split, t) for split in planes.SPLITS.values() if split.head is not None for t in split.head.joined]
SPLIT_SIZES = [1, 31, 32, 63, 64, 65, 255, 256, 257, 511, 513, 1000, 4099]


def _windows(rng, keys_of, bits):
    """Windows with and without key 0 over keys that occur, some of which escape."""
    base_of = (lambda low: low - 1) if bits > 8 else (lambda low: 0)
    used = np.unique(keys_of[keys_of > 0]) if (keys_of > 0).any() else np.array([1])
    top = (1 << bits) - 1
    for zero in (False, True):
        for low in {1, int(used[0]), int(used[used.size // 2]), top}:
            room = min(254 if bits > 8 else 256, top - low + 1)
            for span in {0, int(rng.integers(0, room)), room - 1}:
                yield planes.Window(base_of(low), low, low + span, zero, low - base_of(low) + int(rng.integers(0, span + 1)))


def _naive_split(words, head, joined, signless, w):
    """Sections 6.1, 6.2 and 7.3, element by element."""
    low = head.mantissa - joined
    coded, rest, escapes = [], [], []
    for i, word in enumerate(words.tolist()):
        h = word >> 8 * words.itemsize - 16
        key = h >> low & (1 << head.exponent + joined) - 1
        rest.append(h & (1 << low) - 1 | (0 if signless else h >> 15 << low))
        if w.low <= key <= w.high:
            coded.append(key - w.base)
        elif key == 0 and w.zero:
            coded.append(0)
        else:
            coded.append(w.instead)
            escapes.append(key << 18 | i)
    return bytes(coded), bytes(rest), escapes


@pytest.mark.parametrize("signless", [False, True])
@pytest.mark.parametrize(("split", "joined"), HEADS, ids=lambda v: getattr(v, "name", v))
def test_heads_are_split_and_packed_as_the_text_says(split, joined, signless):
    head, bits = split.head, split.head.exponent + joined
    width = split.bits(1, joined, signless)
    rng = np.random.default_rng([split.wire_id, joined, signless])
    for n in SPLIT_SIZES:
        for kind in ("normal", "random", "signed_zero"):
            words = strategies.array(kind, n, split.width, split.name).view(f"<u{split.width}")
            heads = (words >> words.dtype.type(8 * split.width - 16)).astype(np.int64)
            keys_of = heads >> head.mantissa - joined & (1 << bits) - 1
            windows = list(_windows(rng, keys_of, bits))
            for w in windows if n < 600 and kind == "normal" else [windows[i] for i in rng.integers(0, len(windows), 2)]:
                coded, rest, escapes = planes.split_head_loose(words, head, joined, signless, w)
                assert (coded.tobytes(), rest.tobytes(), escapes.tolist()) == _naive_split(words, head, joined, signless, w)
                packed = planes.split_head(words, head, joined, signless, w)
                assert packed[0].tobytes() == coded.tobytes()
                assert packed[1].tobytes() == rows.pack(rest, width).tobytes() == strategies.pack_rows(rest, width)
                assert packed[2].tolist() == escapes.tolist()


@pytest.mark.parametrize(("split", "joined"), HEADS, ids=lambda v: getattr(v, "name", v))
def test_a_split_whole_group_has_its_escapes_at_its_ends(split, joined):
    n, head = 2**18, split.head
    words = np.zeros(n, f"<u{split.width}")
    word = words.dtype.type
    words[[0, 1, 65535, 65536, n - 2, n - 1]] = word(1 << 8 * split.width - 2)
    w = planes.Window(0, 1, 1, True, 0)
    coded, packed, escapes = planes.split_head(words, head, joined, True, w)
    key = 1 << head.exponent + joined - 1
    assert escapes.tolist() == [key << 18 | i for i in (0, 1, 65535, 65536, n - 2, n - 1)]
    assert not coded.any()
    assert not packed.any()
    assert planes.split_head_loose(words, head, joined, True, w)[2].tolist() == escapes.tolist()


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize(("split", "joined"), HEADS, ids=lambda v: getattr(v, "name", v))
def test_joining_undoes_the_split(split, joined, mode):
    head, bits = split.head, split.head.exponent + joined
    low = head.mantissa - joined
    rng = np.random.default_rng([split.wire_id, joined, mode])
    for n in SPLIT_SIZES:
        heads = rng.integers(0, 65536, n).astype(np.uint16)
        heads[rng.random(n) < 0.2] &= 0x8000  # key 0
        if mode:
            heads = heads & np.uint16(0x7FFF) | np.uint16(0x8000 * (mode == 2))
        for w in _windows(rng, heads.astype(np.int64) >> low & (1 << bits) - 1, bits):
            words = heads.astype(f"<u{split.width}") << np.dtype(f"<u{split.width}").type(8 * split.width - 16)
            coded, rest, escapes = planes.split_head_loose(words, head, joined, mode != 0, w)
            out = np.full(n, 0xEEEE, np.uint16)
            planes.join(coded, rest, low, w.base, 0x8000 * (mode == 2), out)
            positions, keys = escapes & np.uint32((1 << 18) - 1), (escapes >> np.uint32(18)).astype(np.uint16)
            planes.put_keys(out, head.mantissa - joined, positions, keys)
            assert out.tobytes() == heads.tobytes()


@pytest.mark.parametrize("width", [4, 8])
def test_words_are_joined_from_heads_and_tails(width):
    rng = np.random.default_rng(width)
    for n in (1, 31, 1000):
        words = rng.integers(0, 256, n * width, np.uint8).view(f"<u{width}")
        raw = words.view(np.uint8).reshape(n, width)
        heads = (words >> words.dtype.type(8 * width - 16)).astype(np.uint16)
        out = np.empty_like(words)
        planes.join_words(heads, [planes.byte_plane(words, s) for s in range(8 * width - 24, -1, -8)], out)
        assert out.tobytes() == words.tobytes()
        for k in range(width):
            assert planes.byte_plane(words, 8 * k).tobytes() == raw[:, k].tobytes()


# ---- planes: counting


def _naive_keys(words, head, joined):
    heads = (words >> words.dtype.type(8 * words.itemsize - 16)).astype(np.int64)
    return heads >> head.mantissa - joined & (1 << head.exponent + joined) - 1, heads


@pytest.mark.parametrize(("split", "joined"), HEADS, ids=lambda v: getattr(v, "name", v))
def test_all_keys_bytes_and_rests_are_counted(split, joined):
    head = split.head
    low = head.mantissa - joined
    for n in (*SPLIT_SIZES, 70016):
        words = strategies.array("outliers", n, split.width, split.name).view(f"<u{split.width}")
        keys_of, heads = _naive_keys(words, head, joined)
        counts = counting.key_counts(words, head, joined)
        assert counts.tolist() == np.bincount(keys_of, minlength=1 << head.exponent + joined).tolist()
        for k in range(split.width):
            plane = words.view(np.uint8).reshape(n, -1)[:, k]
            assert counting.byte_counts(words, 8 * k).tolist() == np.bincount(plane, minlength=256).tolist()
        for signless in (False, True) if n < 64 or n % 64 == 0 else ():  # else two runs overlap
            rests = heads & (1 << low) - 1 | (0 if signless else heads >> 15 << low)
            assert counting.rest_counts(words, head, joined, signless, 1).tolist() == np.bincount(rests, minlength=256).tolist()


@pytest.mark.parametrize("every", [2, 3, 8, 32])
def test_a_sample_is_one_run_of_64_in_each_stretch_and_is_scaled(every):
    """Keys that name the run of 64 they stand in show which were counted."""
    head, stretch = planes.F64.head, 64 * every
    for stretches in (1, 2, 7, 12):
        n = stretches * stretch
        words = (np.arange(n, dtype=np.uint64) // np.uint64(64)) << np.uint64(50)
        counts = counting.key_counts(words, head, 2, every)
        chosen = np.flatnonzero(counts)
        assert (chosen // every).tolist() == list(range(stretches))
        assert (counts[chosen] == stretch).all()
        assert counting.key_counts(words.copy(), head, 2, every).tolist() == counts.tolist()
        signed = words | np.uint64(1 << 63)
        assert counting.key_counts(signed, head, 2, every).tolist() == counts.tolist()
        tops = counting.byte_counts(words, 50, every)
        assert tops.sum() == n
        assert np.flatnonzero(tops).tolist() == sorted({int(c) & 255 for c in chosen})
    # Rests and keys come from the same elements: a rest of 5 bits says which half of a run it is.
    words = np.arange(10 * stretch, dtype=np.uint64) // np.uint64(32) % np.uint64(2) << np.uint64(48)
    rests = counting.rest_counts(words, head, 0, False, every)
    assert rests[:2].tolist() == [5 * stretch, 5 * stretch]


@given(st.integers(1, 3000), st.sampled_from([2, 8, 32]), st.integers(0, 2**32 - 1))
def test_samples_of_any_size_hold_what_they_say(n, every, seed):
    words = np.random.default_rng(seed).integers(0, 65536, n).astype(np.uint16)
    counts = counting.key_counts(words, planes.BF16.head, 0, every)
    runs = -(-n // (64 * every))
    assert counts.sum() == every * min(64, n) * runs
    everything = counting.key_counts(words, planes.BF16.head, 0)
    assert (counts % every == 0).all()
    assert (counts[everything == 0] == 0).all()
    assert counting.rest_counts(words, planes.BF16.head, 0, False, every).sum() == counts.sum()
    assert counting.byte_counts(words, 8, every).sum() == counts.sum()


@pytest.mark.parametrize("width", [2, 4, 8])
def test_sign_modes(width):
    one = np.dtype(f"<u{width}").type(1 << 8 * width - 1)
    for n in (1, 2, 1023, 1024, 1025, 3000):
        words = np.random.default_rng(n).integers(0, 256, n * width, np.uint8).view(f"<u{width}")
        assert counting.sign_mode(words & ~one) == 1
        assert counting.sign_mode(words | one) == 2
        for at in {0, n // 2, n - 1} if n > 1 else ():
            for mode in (1, 2):
                mixed = words & ~one if mode == 1 else words | one
                mixed[at] ^= one
                assert counting.sign_mode(mixed) == 0


@pytest.mark.parametrize(("split", "joined"), HEADS, ids=lambda v: getattr(v, "name", v))
def test_same_keys(split, joined):
    head = split.head
    shift = 8 * split.width - 16 + head.mantissa - joined
    mask = (1 << head.exponent + joined) - 1 << shift
    word = np.dtype(f"<u{split.width}").type
    for n in (1, 2, 1023, 1024, 1025, 3000):
        words = np.random.default_rng(n).integers(0, 256, n * split.width, np.uint8).view(f"<u{split.width}")
        words = words & ~word(mask) | word(5 << shift)  # signs, rests and tails differ
        assert counting.same_keys(words, head, joined)
        for at in {0, n // 2, n - 1} if n > 1 else ():
            for bit in (shift, shift + head.exponent + joined - 1):
                other = words.copy()
                other[at] ^= word(1 << bit)
                assert not counting.same_keys(other, head, joined)


# ---- keys and windows


def _naive_map(counts, limit, holes):
    """The rule of keys.map_keys: a key has a byte when 20 bits for each time exceed what its table entry costs."""
    total, wide = sum(counts), len(counts) > 256
    pays = [c * 20 > total * Fraction(1443, 1000) / 4096 + 24 for c in counts]
    found = [k for k in range(1, len(counts)) if pays[k]] or [max(range(1, len(counts)), key=lambda k: counts[k])]
    low, high = found[0], found[-1]
    if wide and high - low + 1 > limit:
        starts = range(low, high - limit + 2)
        low = max(starts, key=lambda k: sum(counts[k : k + limit]))
        high = low + limit - 1
    base = low - 1 if wide else 0
    byte_counts = [0] * 256
    for k in range(low, high + 1):
        byte_counts[k - base] = counts[k] or int(holes)
    escapes = total - sum(counts[low : high + 1])
    if pays[0]:
        byte_counts[0] = counts[0]
        escapes -= counts[0]
    instead = byte_counts.index(max(byte_counts))
    byte_counts[instead] += escapes
    if sum(c > 0 for c in byte_counts) < 2:
        byte_counts[0 if instead else 1] = 1
    return planes.Window(base, low, high, pays[0], instead), byte_counts, escapes


def _check_map(counts, limit=254, holes=False):
    window, byte_counts, escapes = _naive_map(counts, limit, holes)
    mapping = keys.map_keys(np.array(counts, np.int64), limit=limit, holes=holes)
    assert mapping.window == window
    assert mapping.counts.tolist() == byte_counts
    assert mapping.escapes == escapes
    assert sum(c > 0 for c in byte_counts) >= 2
    fitting.quantize(mapping.counts)
    return mapping


@given(
    st.sampled_from([5, 8, 9, 10, 11, 13]), st.sampled_from(["few", "bell", "two bells", "even"]), st.booleans(),
    st.sampled_from([254, 127]), st.integers(0, 2**32 - 1), st.integers(0, 18),
)  # fmt: skip
def test_keys_are_mapped_by_the_rule(bits, shape, holes, limit, seed, log):
    rng = np.random.default_rng(seed)
    n, size = int(rng.integers(1, (1 << log) + 1)), 1 << bits
    if shape == "few":
        drawn = rng.choice(rng.integers(0, size, 3), n)
    elif shape == "even":
        drawn = rng.integers(0, size, n)
    else:
        centre = rng.integers(0, size, 1 if shape == "bell" else 2)
        drawn = np.clip(rng.choice(centre, n) + np.round(rng.normal(0, size / 40, n)).astype(int), 0, size - 1)
    counts = np.bincount(drawn, minlength=size)
    counts[0] += int(rng.choice([0, 1, n]))
    _check_map(counts.tolist(), limit, holes)


def test_windows_at_the_ends():
    for size in (32, 256, 1024, 8192):
        for at in ([0], [1], [size - 1], [0, 1], [0, size - 1], [1, size - 1], list(range(size))):
            for count in (1, 2, 1000):
                counts = [count * (k in at) for k in range(size)]
                mapping = _check_map(counts)
                assert mapping.escapes == 0 or count < 3 or size > 256
    # Equally good windows: the first is taken.
    counts = [0] * 1024
    counts[10] = counts[900] = 5000
    assert _check_map(counts).window.low == 10
    counts[900] += 1
    assert _check_map(counts).window.high == 900


@given(st.integers(0, 2**32 - 1), st.sampled_from([8, 10, 13]))
def test_other_counts_fare_as_the_window_says(seed, bits):
    rng = np.random.default_rng(seed)
    first, second = (np.bincount(rng.geometric(0.02, 500) % (1 << bits), minlength=1 << bits) for _ in range(2))
    window = keys.map_keys(first.astype(np.int64)).window
    again = keys.map_again(window, second.astype(np.int64))
    expected = [0] * 256
    escapes = 0
    for key, count in enumerate(second.tolist()):
        if window.low <= key <= window.high:
            expected[key - window.base] += count
        elif key == 0 and window.zero:
            expected[0] += count
        else:
            escapes += count
    expected[window.instead] += escapes
    assert (again.window, again.counts.tolist(), again.escapes) == (window, expected, escapes)
