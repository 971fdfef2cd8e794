"""Sums, rows, Huffman and rANS: against the reference decoder, and every malformed table refused."""

import heapq
from functools import lru_cache
from itertools import product

import numpy as np
import pytest
import reference
import strategies
from hypothesis import given
from hypothesis import strategies as st

from tzip.coders import huffman, rans, rows, zstd
from tzip.coders.errors import CorruptError, TruncatedError
from tzip.coders.huffman import SLACK, HuffmanTable
from tzip.coders.rans import RansTable
from tzip.coders.sums import sum64
from tzip.coders.tables import Alphabet, read_escapes

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
    symbols = np.random.default_rng(width).integers(0, 1 << width, 2**17 - 1).astype(np.uint8)
    packed = rows.pack(symbols, width)
    assert bytes(reference.unpack_rows(packed.tobytes(), symbols.size, width)) == symbols.tobytes()
    out = np.empty(symbols.size, np.uint8)
    rows.unpack_into(packed, width, out)
    assert out.tobytes() == symbols.tobytes()


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
    codes = HuffmanTable(lengths).codes()
    for byte, (length, code) in reference.huffman_codes(entries).items():
        assert f"{codes[byte]:0{length}b}"[::-1] == f"{code:0{length}b}", byte


# ---- rANS: frequencies


def _quantized(counts):
    full = np.zeros(256, np.int64)
    full[: len(counts)] = counts
    freq = rans.quantize(full).freq
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
        assert exact - 1 <= rans.cost(full, freq) <= exact * 1.0001 + 2


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


def _check_round_trip(codec, symbols, counts, log_segment):
    if codec == "huffman":
        table = HuffmanTable(huffman.code_lengths(counts))
        encode, decode, slow = huffman.encode, huffman.decode_into, reference.huffman_decode
        entries = dict(zip(*_used(table.lengths), strict=True))
        shared_reference = reference.Table(3, entries)
    else:
        table = rans.quantize(counts)
        encode, decode, slow = rans.encode, rans.decode_into, reference.rans_decode
        shared_reference = reference.Table(4, dict(zip(*_used(table.freq), strict=True)))
    escapes = np.array([7, 9], "<u4")
    for shared, listed in ((False, NO_ESCAPES), (True, escapes)):
        payload = bytes(encode(symbols, table, shared, log_segment, listed))
        expected, words, _ = slow(payload, symbols.size, log_segment, listed.size, shared_reference if shared else None)
        assert bytes(expected) == symbols.tobytes()
        assert words == listed.tolist()
        # At any offset, with other bytes around it; nothing may depend on the slack.
        for lead, rubbish in ((0, 0), (3, 0xFF)):
            buffer = np.full(lead + len(payload) + SLACK, rubbish, np.uint8)
            buffer[lead : lead + len(payload)] = u8(payload)
            out = np.full(symbols.size, 0xEE, np.uint8)
            decode(buffer, lead, lead + len(payload), listed.size, log_segment, table if shared else None, out)
            assert out.tobytes() == symbols.tobytes()


def _used(entries):
    at = np.flatnonzero(entries)
    return at.tolist(), entries[at].tolist()


@pytest.mark.parametrize("kind", ["uniform", "skewed"])
@pytest.mark.parametrize("log_segment", [12, 17])
@pytest.mark.parametrize("codec", ["huffman", "rans"])
def test_round_trip_equals_the_reference(codec, log_segment, kind):
    for n, k in product(SIZES, (2, 3, 16, 100, 256)):
        _check_round_trip(codec, *_symbols(kind, n, k), log_segment)


@pytest.mark.parametrize("log_segment", [12, 17])
@pytest.mark.parametrize("codec", ["huffman", "rans"])
@pytest.mark.parametrize(("n", "k", "kind"), [(2**17, 256, "uniform"), (2**17, 40, "skewed"), (2**17 - 1, 2, "skewed")])
def test_round_trip_of_whole_groups(codec, log_segment, n, k, kind):
    _check_round_trip(codec, *_symbols(kind, n, k), log_segment)


@pytest.mark.parametrize("codec", ["huffman", "rans"])
def test_payloads_are_as_small_as_promised(codec):
    symbols, _ = _symbols("skewed", 2**17, 40)
    counts = np.bincount(symbols, minlength=256).astype(np.int64)
    p = counts[counts > 0] / symbols.size
    entropy = -(p * np.log2(p)).sum() * symbols.size / 8
    if codec == "huffman":
        payload = huffman.encode(symbols, HuffmanTable(huffman.code_lengths(counts)), False, 17, NO_ESCAPES)
        assert entropy <= len(payload) <= entropy * 1.01 + 300
    else:
        payload = rans.encode(symbols, rans.quantize(counts), False, 17, NO_ESCAPES)
        assert entropy <= len(payload) <= entropy * 1.002 + 300


@given(st.integers(0, 2**32 - 1), st.sampled_from(["huffman", "rans"]), st.integers(0, 5000), st.integers(12, 17))
def test_arbitrary_tables_decode_like_the_reference(seed, codec, extra, log_segment):
    rng = np.random.default_rng(seed)
    symbols = sorted(rng.choice(256, int(rng.integers(2, 257)), replace=False).tolist())
    n = int(rng.integers(1, 300)) + extra
    coded = rng.choice(symbols, n)
    if codec == "huffman":
        table = strategies.random_lengths(rng, symbols)
        before, after = strategies.huffman_payload(coded, table, log_segment, lambda c: rng.choice(symbols, c))
        payload, decode = before + strategies.huffman_table(table) + after, huffman.decode_into
    else:
        table = strategies.random_frequencies(rng, symbols)
        before, after = strategies.rans_payload(coded, table, log_segment, lambda c: rng.choice(symbols, c))
        payload, decode = before + strategies.rans_table(table) + after, rans.decode_into
    out = np.empty(n, np.uint8)
    decode(np.concatenate((u8(payload), np.full(SLACK, 0x5A, np.uint8))), 0, len(payload), 0, log_segment, None, out)
    assert out.tobytes() == coded.astype(np.uint8).tobytes()


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
    assert table.write() == raw
    assert table.size == len(raw)
    for tail in (b"", b"\xff" * 9):
        read, size = kind.read(u8(raw + tail))
        assert size == len(raw)
        assert _entries(read) == entries
    assert _reference_table(kind, raw).entries == entries


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
RANS_FAULTS = {
    "one byte": bytes([5, 5, 0, 0x10, 0, 0]),
    "range backwards": bytes([6, 5, 1, 0xF0, 0xFF, 0]),
    "sum 4095": bytes([5, 6, 1, 0xE0, 0xFF, 0]),
    "sum 4097": bytes([5, 6, 2, 0xF0, 0xFF, 0]),
    "sum 8190": bytes([5, 6, 0xFF, 0xFF, 0xFF, 0]),
    "sum 0": bytes([5, 6, 0, 0, 0, 0]),
    "lo absent": bytes([5, 7, 0, 0x10, 0x00, 0xFF, 0x0F, 0]),
    "hi absent": bytes([5, 7, 1, 0xF0, 0xFF, 0, 0, 0]),
    "unused bits not zero": bytes([5, 7, 1, 0x10, 0x00, 0xFE, 0x1F, 0]),
    "padding not zero": bytes([5, 6, 1, 0xF0, 0xFF, 1]),
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


# ---- escapes, windows, frames


def _escape(symbol, position):
    return (symbol << 17 | position).to_bytes(4, "little")


def test_escapes_are_read_and_their_faults_refused():
    good = _escape(5, 0) + _escape(8191, 3) + _escape(0, 99)
    positions, symbols = read_escapes(u8(good), 100, 13)
    assert positions.tolist() == [0, 3, 99]
    assert symbols.tolist() == [5, 8191, 0]
    for bad in (
        _escape(1, 100),
        _escape(1, 4) + _escape(1, 4),
        _escape(1, 4) + _escape(1, 3),
        _escape(8192, 4),
        _escape(1, 2**17 - 1) + _escape(1, 4),
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
