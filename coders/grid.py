"""Floats that are a small integer times a scale: finding the scales, and multiplying again (FORMAT.md, section 6.3).

A float container knows its element up to half a unit in the last place, so each element d * scale bounds the scale
from both sides. A block whose largest magnitude is M steps is tried for M = 1 … 128: each further element must be a
whole number of steps, and each that is narrows the scale. Ordinary weights fail within two or three elements.
"""

from dataclasses import dataclass
from typing import NamedTuple, no_type_check

import numpy as np
from numpy.typing import NDArray

from tzip.coders.arrays import I64, U8, U32, Words
from tzip.coders.errors import CorruptError
from tzip.coders.jit import kernel, ready
from tzip.coders.sampling import entropy

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

BF16, F16, F32_ELEMENTS = range(3)  # what the elements are
AS_F32, AS_F16, AS_BF16 = range(3)  # how scales are stored
SCALE_WIDTH = {AS_F32: 4, AS_F16: 2, AS_BF16: 2}
ELEMENT_WIDTH = {BF16: 2, F16: 2, F32_ELEMENTS: 4}
_MANTISSA = {BF16: 7, F16: 10, F32_ELEMENTS: 23}
_LEAST = {BF16: -126, F16: -14, F32_ELEMENTS: -126}  # exponent of the smallest normal number
_SUBSET = 64  # elements in the middle of a block that are asked first
_SURVEY, _SURVEYED = 16, 2048  # at least so many blocks and elements choose a layout and a storage kind
MAX_STRING = 1 << 18  # bytes of scales, and of exceptions


@dataclass(frozen=True, slots=True)
class Codes:
    """What a grid makes of n elements: codes, shape (n,), scales and exceptions as stored, how scales are stored."""

    codes: U8
    scales: U8
    exceptions: U8
    storage: int


def blocks_of(n: int, first: int, size: int) -> int:
    """Return the number of blocks of n elements whose first block has `first` elements, each further one `size`."""
    return 1 if n <= first else 1 + -(-(n - first) // size)


def probe(words: Words, container: int, row: int, before: int) -> tuple[int, int]:
    """Look at 32 elements in three places: returns how many have enough non-zero ones, how many of those are a grid.

    `before` elements of the tensor, whose rows have `row` (0: unknown), precede these. Costs 2 microseconds on weights.
    """
    if words.size < 128:
        return 0, 0
    bits = np.empty(32, np.uint32)
    work = np.empty((3, _SUBSET), np.float64)
    arguments = (words, container, row, before, _MANTISSA[container], _LEAST[container], bits, work)
    if not ready(_probe, arguments, words.nbytes):  # 3.5 of a first run's 20 seconds, on a slow machine
        return probe_in_numpy(words, container, row, before)
    found = _probe(*arguments)
    return found >> 8, found & 255


def probe_in_numpy(words: Words, container: int, row: int, before: int) -> tuple[int, int]:
    """Return what `probe` does, in 200 microseconds, with nothing to compile. Needs 128 words."""
    n = words.size
    unit = row if 32 <= row <= n // 2 else 32
    informative = consistent = 0
    for k in range(3):
        p = n * (2 * k + 1) // 6
        p -= (before + p) % unit
        if p < 0 or p + 32 > n:
            continue
        p = min(p + unit // 64 * 32, n - 32)
        bits = _widened(words[p : p + 32], container)
        if np.count_nonzero(bits & 0x7FFFFFFF) >= 8:
            informative += 1
            consistent += _fits(bits & np.uint32(0x7FFFFFFF), container)
        if informative == 2 and consistent == 0:
            break
    return informative, consistent


def _widened(words: Words, container: int) -> U32:
    """Do as `_widen` does."""
    if container == BF16:
        bits: U32 = words.astype(np.uint32) << np.uint32(16)
    elif container == F16:
        bits = words.view(np.float16).astype(np.float32).view(np.uint32)
    else:
        bits = words.astype(np.uint32)
    bits[(bits & 0x7F800000) == 0x7F800000] = 0
    return bits


def _fits(bits: U32, container: int) -> bool:
    """Say whether `_fit` finds a grid in magnitudes, shape (32,), not all zero: its steps for all M at once."""
    peak = bits.max()
    bits = np.where(bits == 0, peak, bits)
    part = np.ldexp(1.0, -1 - _MANTISSA[container])
    floor = np.ldexp(1.0, -1 + _LEAST[container] - _MANTISSA[container])
    value = bits.view(np.float32).astype(np.float64)
    half = np.maximum((bits & 0x7F800000).view(np.float32).astype(np.float64) * part, floor)
    greatest, around = value.max(), half[bits.argmax()]
    power = ((bits & 0x7FFFFF) == 0) & (bits >= (_LEAST[container] + 128) << 23)
    from_, to = value - np.where(power, 0.5 * half, half), value + half
    low, high = greatest - around, greatest + around
    m = np.arange(1.0, 129.0)[:, None]
    least, most = np.maximum(from_ * (m * (1.0 / high)) - 1e-9, 0.0), np.floor(to * (m * (1.0 / low)) + 1e-9)
    several = most - 1.0 >= from_ * (m * (1.0 / high)) - 1e-9
    r = 1.0 / np.maximum(most, 1.0)
    lo = np.maximum(np.where(several, 0.0, from_ * r).max(1, keepdims=True), low / m)
    hi = np.minimum(np.where(several, 1e300, to * r).min(1, keepdims=True), high / m)
    r = 1.0 / np.maximum(np.rint((from_ + to) * (1.0 / (lo + hi))), 1.0)
    lo = np.maximum(np.where(several, from_ * r, 0.0).max(1, keepdims=True), lo)
    hi = np.minimum(np.where(several, to * r, 1e300).min(1, keepdims=True), hi)
    found = (most >= np.maximum(least, 0.5)).all(1) & (lo <= hi * 1.0000000000001)[:, 0]
    return bool(found.any())


def recover(words: Words, container: int, layouts: list[tuple[int, int]]) -> tuple[Codes, int, int] | None:
    """Return codes with the layout (elements of a block, of the first one) that suits `words`, shape (n,), and it.

    None when none does. The codes are exact: what the product does not give is listed as an exception.
    """
    best: tuple[int, int, int, int] | None = None  # bits of 2^20 elements, storage, layout
    for size, first in layouts:
        if best is not None and container == F32_ELEMENTS:
            break  # 24 bits do not fit a larger block by chance, as 8 do when there are few codes
        blocks = blocks_of(words.size, first, size)
        surveyed = max(_SURVEY, _SURVEYED // size)
        for storage in _storages(blocks):
            seen = _run(words, container, storage, first, size, max(1, blocks // surveyed), np.zeros(256, np.int64))
            few = seen.informative * 4 < min(blocks, surveyed)  # then they say nothing: mostly zeros
            if few or seen.fitted * 4 < seen.informative * 3:
                break  # no grid in this layout, whatever the scales
            side = seen.failed * (4 + words.itemsize) + -(-seen.looked // size) * SCALE_WIDTH[storage]
            bits = ((entropy(seen.counts) + 8 * side) << 20) // seen.looked
            # 5 %: the survey, of as many blocks but fewer elements, flatters small blocks.
            if seen.failed * 6 <= seen.looked and (best is None or bits * 20 < best[0] * 19):
                best = bits, storage, size, first
            if seen.failed * 64 <= seen.looked:
                break
    if best is None:
        return None
    _, chosen, size, first = best
    found: Codes | None = None
    storages = _storages(blocks_of(words.size, first, size))
    for storage in storages[storages.index(chosen) :]:  # the next ones: scales that need more bits than the survey saw
        codes = _run(words, container, storage, first, size, 1, np.zeros(0, np.int64)).codes
        if codes is not None and (found is None or _side(codes) < _side(found)):
            found = codes
        if found is not None and found.exceptions.size * 4 <= found.scales.size:
            break
    return None if found is None else (found, size, first)


def _storages(blocks: int) -> list[int]:
    return [s for s in (AS_BF16, AS_F16, AS_F32) if SCALE_WIDTH[s] * blocks <= MAX_STRING]


def _side(codes: Codes) -> int:
    return codes.scales.size + codes.exceptions.size


class _Run(NamedTuple):
    """What a pass saw: elements, blocks with enough elements that are not zero, those of them that are a grid,
    exceptions, how often each code, and the codes when it saw all blocks and the exceptions can be listed.
    """

    looked: int
    informative: int
    fitted: int
    failed: int
    counts: I64
    codes: Codes | None


def _run(words: Words, container: int, storage: int, first: int, size: int, stride: int, counts: I64) -> _Run:
    """Code every `stride`th block, and count codes in `counts`, of 256 entries, or of none.

    Arrays of one block, not of the chunk, hold what is between elements and codes.
    """
    blocks = blocks_of(words.size, first, size)
    longest = min(words.size, size)
    limit = MAX_STRING // (4 + words.itemsize)
    scales = np.zeros(blocks, np.float32)
    inner = np.empty(words.size, np.uint8)
    bits, made = np.empty(longest, np.uint32), np.empty(longest, words.dtype)
    listed = np.empty(min(limit, words.size // stride + longest), np.uint32)
    tally = np.zeros(3, np.int64)
    failed = _quantise(
        words, container, _MANTISSA[container], _LEAST[container], first, size, stride // 2, stride, storage,
        scales, inner, bits, bits.view(np.float32), made, listed, np.empty((3, _SUBSET), np.float64), tally, counts,
    )  # fmt: skip
    codes = None
    if stride == 1 and failed <= limit:
        at = listed[:failed].astype("<u4")
        columns = (at.view(np.uint8).reshape(-1, 4), words[at].view(np.uint8).reshape(-1, words.itemsize))
        codes = Codes(inner, store_scales(scales, storage), np.concatenate(columns, axis=1).reshape(-1), storage)
    looked, informative, fitted = tally.tolist()
    return _Run(looked, informative, fitted, failed, counts, codes)


def store_scales(scales: F32, storage: int) -> U8:
    """Return scales, shape (blocks,), which the storage kind can hold, as it stores them."""
    if storage == AS_F32:
        return scales.view(np.uint8)
    if storage == AS_F16:
        return scales.astype("<f2").view(np.uint8)
    return (scales.view("<u4") >> np.uint32(16)).astype("<u2").view(np.uint8)


def read_scales(stored: U8, storage: int) -> F32:
    """Return scales, shape (blocks,), from their bytes; raises CorruptError when one is not finite."""
    raw = stored.tobytes()
    if storage == AS_F32:
        scales = np.frombuffer(raw, "<f4")
    elif storage == AS_F16:
        halves = np.frombuffer(raw, "<f2")
        scales = halves.astype(np.float32) if np.isfinite(halves).all() else np.full(1, np.inf, np.float32)
    else:
        scales = (np.frombuffer(raw, "<u2").astype("<u4") << np.uint32(16)).view("<f4")
    if not np.isfinite(scales).all():
        raise CorruptError("grid: a scale is not finite")
    return scales


def multiply(codes: U8, scales: F32, first: int, size: int, container: int, out: Words) -> None:
    """Fill `out`, shape (n,), with elements from codes, shape (n,), and finite scales, one a block."""
    if codes.size != out.size or scales.size != blocks_of(out.size, first, size):
        raise CorruptError(f"grid: {codes.size} codes and {scales.size} scales for {out.size} elements")
    _multiply(codes, scales, first, size, container, out)


def read_exceptions(listed: U8, n: int, width: int) -> tuple[I64, Words]:
    """Return positions and elements of `width` bytes as listed.

    Raises CorruptError when positions do not ascend or are not below n.
    """
    rows = listed.reshape(-1, 4 + width)
    at = np.ascontiguousarray(rows[:, :4]).view("<u4").reshape(-1).astype(np.int64)
    if at.size and (at[-1] >= n or (at[1:] <= at[:-1]).any()):
        raise CorruptError("grid: exceptions are not ascending or lie outside of the chunk")
    return at, np.ascontiguousarray(rows[:, 4:]).view(f"<u{width}").reshape(-1)


# ---------------------------------------------------------------- multiplying


@kernel
@no_type_check
def _half(p: int) -> int:
    """Return the binary16 form of finite or infinite binary32 bits, rounded to nearest even.

    Subnormal results: adding 1/2 makes the unit in the last place theirs, 2^-24, so the addition rounds.
    """
    a = np.uint32(p & np.uint32(0x7FFFFFFF))
    normal = np.uint32((a - np.uint32(0x37FFF001) + ((a >> np.uint32(13)) & np.uint32(1))) >> np.uint32(13))
    small = np.uint32(np.float32(a.view(np.float32) + np.float32(0.5)).view(np.uint32) - np.uint32(0x3F000000))
    r = small if a < np.uint32(0x38800000) else normal
    r = np.uint32(0x7C00) if a >= np.uint32(0x47800000) else r
    return np.uint32(r | ((p >> np.uint32(16)) & np.uint32(0x8000)))


@kernel
@no_type_check
def _brain(p: int) -> int:
    """Return the bfloat16 form of finite or infinite binary32 bits, rounded to nearest even."""
    return np.uint32((p + np.uint32(0x7FFF) + ((p >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@kernel
@no_type_check
def _multiply(codes: U8, scales: F32, first: int, size: int, container: int, out: Words) -> int:
    """Needs: codes.size == out.size; scales.size == the number of blocks; 1 <= first <= size."""
    n = out.size
    begin = np.uint64(0)
    end = np.uint64(min(first, n))
    for j in range(scales.size):
        scale = scales[j]
        if container == 0:
            for k in range(end - begin):
                i = begin + np.uint64(k)
                s = np.int32(codes[i])
                p = np.float32(np.float32(s - np.int32(128)) * scale).view(np.uint32)
                out[i] = _brain(p) if s else np.uint32(0x8000)
        elif container == 1:
            for k in range(end - begin):
                i = begin + np.uint64(k)
                s = np.int32(codes[i])
                p = np.float32(np.float32(s - np.int32(128)) * scale).view(np.uint32)
                out[i] = _half(p) if s else np.uint32(0x8000)
        else:
            for k in range(end - begin):
                i = begin + np.uint64(k)
                s = np.int32(codes[i])
                p = np.float32(np.float32(s - np.int32(128)) * scale).view(np.uint32)
                out[i] = p if s else np.uint32(0x80000000)
        begin = end
        end = min(end + np.uint64(size), np.uint64(n))
    return 0


# ---------------------------------------------------------------- finding scales


@kernel
@no_type_check
def _widen(words: Words, begin: int, size: int, container: int, out: U32) -> int:
    """Write the binary32 bits of `size` elements from `begin` on, 0 for those that are not finite.

    Needs: begin + size <= words.size; size <= out.size.
    """
    at = np.uint64(begin)
    if container == 0:
        for i in range(size):
            u = np.uint32(np.uint32(words[at + np.uint64(i)]) << np.uint32(16))
            out[i] = u if (u & np.uint32(0x7F800000)) != np.uint32(0x7F800000) else np.uint32(0)
    elif container == 1:
        for i in range(size):
            h = np.uint32(words[at + np.uint64(i)])
            m = np.uint32(h & np.uint32(0x7FFF))
            normal = np.uint32((m << np.uint32(13)) + np.uint32(0x38000000))
            small = np.float32(np.float32(np.int32(m)) * np.float32(2.0**-24)).view(np.uint32)
            u = small if m < np.uint32(0x400) else normal
            u = u | np.uint32((h & np.uint32(0x8000)) << np.uint32(16))
            out[i] = u if m < np.uint32(0x7C00) else np.uint32(0)
    else:
        for i in range(size):
            u = np.uint32(words[at + np.uint64(i)])
            out[i] = u if (u & np.uint32(0x7F800000)) != np.uint32(0x7F800000) else np.uint32(0)
    return 0


@kernel
@no_type_check
def _probe(
    words: Words, container: int, row: int, before: int, mantissa: int, least: int, bits: U32, work: F64
) -> int:
    """Return informative << 8 | consistent. Needs: words.size >= 128; bits.size == 32."""
    n = words.size
    informative = 0
    consistent = 0
    for k in range(3):
        p = n * (2 * k + 1) // 6
        unit = row if row >= 32 and row <= n // 2 else 32
        p -= (before + p) % unit
        if p < 0 or p + 32 > n:
            continue
        p = min(p + unit // 64 * 32, n - 32)  # the middle of a row: its beginning is often padding
        _widen(words, p, 32, container, bits)
        count = 0
        for i in range(32):
            count += (bits[i] & np.uint32(0x7FFFFFFF)) != np.uint32(0)
        if count >= 8:
            informative += 1
            consistent += _fit(bits, 32, mantissa, least, 0, work) > 0
        if informative == 2 and consistent == 0:
            break
    return informative << 8 | consistent


@kernel
@no_type_check
def _fit(bits: U32, size: int, mantissa: int, least: int, previous: int, work: F64) -> int:
    """Return the steps M of the block's largest magnitude, 0 when it is no grid, -1 when it is all zeros.

    Leaves the least and the greatest scale in work[0, 0] and work[1, 0], the number of non-zero elements asked in
    work[2, 0]. Small M come first, after the one that makes the smallest element 1: half a scale would fit, too, with
    even codes. `previous` is the M of the block before.
    Needs: 1 <= size <= bits.size; work (3, 64).
    """
    top = np.uint32(0)
    for i in range(size):
        top = max(top, np.uint32(bits[i] & np.uint32(0x7FFFFFFF)))
    if top == np.uint32(0):
        return -1
    k = min(size, 64)
    middle = np.uint64((size - k) // 2)
    peak = np.uint32(top)  # a second name: numba views only a variable that is assigned once
    greatest = np.float64(peak.view(np.float32))
    normal = np.uint32((least + 128) << 23)
    part = np.int64((1022 - mantissa) << 52).view(np.float64)  # powers of two: half a unit in the last place, relative
    floor = np.int64((1022 + least - mantissa) << 52).view(np.float64)  # and that of subnormal numbers
    low = greatest - max(np.float64(np.uint32(peak & np.uint32(0x7F800000)).view(np.float32)) * part, floor)
    high = greatest + max(np.float64(np.uint32(peak & np.uint32(0x7F800000)).view(np.float32)) * part, floor)
    smallest = np.uint32(top)
    zeros = np.uint32(0)
    for j in range(k):
        v = np.uint32(bits[middle + np.uint64(j)] & np.uint32(0x7FFFFFFF))
        zeros += np.uint32(v == np.uint32(0))
        u = np.uint32(peak if v == np.uint32(0) else v)  # zeros say nothing, nor does the greatest once more
        smallest = min(smallest, u)
        a = np.float64(u.view(np.float32))
        h = max(np.float64(np.uint32(u & np.uint32(0x7F800000)).view(np.float32)) * part, floor)
        below = 0.5 * h if (u & np.uint32(0x7FFFFF)) == np.uint32(0) and u >= normal else h
        work[0, j] = a - below
        work[1, j] = a + h
    if np.int64(zeros) * 2 > k and size > k:  # pruned: a few elements would suit too many M
        k = 0
        zeros = np.uint32(0)
        smallest = np.uint32(top)
        for i in range(size):
            w = np.uint32(bits[i] & np.uint32(0x7FFFFFFF))
            if w != np.uint32(0) and k < 64:
                smallest = min(smallest, w)
                b = np.float64(w.view(np.float32))
                g = max(np.float64(np.uint32(w & np.uint32(0x7F800000)).view(np.float32)) * part, floor)
                work[0, k] = b - (0.5 * g if (w & np.uint32(0x7FFFFF)) == np.uint32(0) and w >= normal else g)
                work[1, k] = b + g
                k += 1
    work[2, 0] = k - np.int64(zeros)
    tiny = np.uint32(smallest)
    ratio = np.rint(greatest / np.float64(tiny.view(np.float32)))
    over_low = 1.0 / low
    over_high = 1.0 / high
    for trial in range(131):
        m = trial
        if trial == 0:
            if ratio > 128.0:
                continue
            m = np.int64(ratio)
        elif trial > 16:
            if trial == 17:
                if previous <= 16:
                    continue
                m = previous
            elif trial == 18:
                m = 127
            elif trial == 19:
                m = 128
            else:
                m = 146 - trial  # 126 … 17
                if m < 17:
                    break
        up = m * over_low
        down = m * over_high
        good = True
        if trial:  # the first one is mostly right
            for j in range(min(k, 16)):
                if np.floor(work[1, j] * up + 1e-9) < max(work[0, j] * down - 1e-9, 0.5):
                    good = False
                    break
            if not good:
                continue
        least_bits = np.float64(low / m).view(np.int64)
        most_bits = np.float64(high / m).view(np.int64)
        late = 0
        none = 0
        for j in range(k):  # positive numbers are ordered like their bits, whose least and greatest vectors find
            d = np.floor(work[1, j] * up + 1e-9)
            from_d = work[0, j] * down - 1e-9
            none += np.int64(d < max(from_d, 0.5))
            several = d - 1.0 >= from_d
            r = 1.0 / max(d, 1.0)
            x = np.float64(0.0 if several else work[0, j] * r).view(np.int64)
            y = np.float64(1e300 if several else work[1, j] * r).view(np.int64)
            least_bits = max(least_bits, x)
            most_bits = min(most_bits, y)
            late += np.int64(several)
        if none:
            continue
        lo = np.int64(least_bits).view(np.float64)
        hi = np.int64(most_bits).view(np.float64)
        if late:
            over = 1.0 / (lo + hi)
            for j in range(k):
                d = np.floor(work[1, j] * up + 1e-9)
                if d - 1.0 >= work[0, j] * down - 1e-9:
                    r = 1.0 / max(np.rint((work[0, j] + work[1, j]) * over), 1.0)
                    lo = max(lo, work[0, j] * r)
                    hi = min(hi, work[1, j] * r)
        if lo <= hi * 1.0000000000001:
            work[0, 0] = min(lo, hi)
            work[1, 0] = max(lo, hi)
            return m
    return 0


@kernel
@no_type_check
def _pick(lo: float, hi: float, storage: int) -> float:
    """Return the scale in the middle of lo … hi, 0 < lo <= hi, or the nearest that the storage kind has."""
    middle = (lo + hi) * 0.5
    e = np.int64((np.float64(middle).view(np.int64) >> 52) - 1023)
    if storage == 1:
        step = max(e, -14) - 10
    elif storage == 2:
        step = max(e, -126) - 7
    else:
        step = max(e, -126) - 23
    unit = np.int64((step + 1023) << 52).view(np.float64)
    scale = np.rint(middle / unit) * unit
    if storage == 1 and scale > 65504.0:
        scale = 65504.0
    if scale > 3.3e38:
        scale = 3.3e38 if storage == 0 else 0.0
    return np.float32(scale)


@kernel
@no_type_check
def _code(
    words: Words, begin: int, size: int, floats: F32, scale: float, container: int, inner: U8, made: Words
) -> int:
    """Write the nearest codes of `size` elements from `begin` on, and what these decode to; returns how many differ.

    Needs: begin + size <= words.size == inner.size; size <= floats.size and made.size; scale finite.
    """
    inverse = np.float32(0.0)
    if scale > np.float32(1e-37):
        inverse = np.float32(np.float32(1.0) / scale)
    failed = np.uint32(0)
    at = np.uint64(begin)
    top = np.float32(127.0)
    if container == 2:
        null = np.uint32(0x80000000)
        for k in range(size):
            i = at + np.uint64(k)
            d = np.int32(min(max(np.rint(floats[k] * inverse), -top), top))
            p = np.float32(np.float32(d) * scale).view(np.uint32)
            w = np.uint32(words[i])
            p = null if w == null else p
            inner[i] = np.uint8(0 if w == null else d + np.int32(128))
            made[k] = p
            failed += np.uint32(p != w)
    elif container == 1:
        null = np.uint32(0x8000)
        for k in range(size):
            i = at + np.uint64(k)
            d = np.int32(min(max(np.rint(floats[k] * inverse), -top), top))
            p = _half(np.float32(np.float32(d) * scale).view(np.uint32))
            w = np.uint32(words[i])
            p = null if w == null else p
            inner[i] = np.uint8(0 if w == null else d + np.int32(128))
            made[k] = p
            failed += np.uint32(p != w)
    else:
        null = np.uint32(0x8000)
        for k in range(size):
            i = at + np.uint64(k)
            d = np.int32(min(max(np.rint(floats[k] * inverse), -top), top))
            p = _brain(np.float32(np.float32(d) * scale).view(np.uint32))
            w = np.uint32(words[i])
            p = null if w == null else p
            inner[i] = np.uint8(0 if w == null else d + np.int32(128))
            made[k] = p
            failed += np.uint32(p != w)
    return np.int64(failed)


@kernel
@no_type_check
def _quantise(
    words: Words,
    container: int,
    mantissa: int,
    least: int,
    first: int,
    size: int,
    start: int,
    stride: int,
    storage: int,
    scales: F32,
    inner: U8,
    bits: U32,
    floats: F32,
    made: Words,
    listed: U32,
    work: F64,
    tally: I64,
    counts: I64,
) -> int:
    """Code blocks start, start + stride, …; returns the number of exceptions, and stops when `listed` cannot hold them.

    A scale that a subset of the block gave is narrowed by the elements that it misses, at most four times.
    tally: the first three fields of `_Run`.
    Needs: words and inner of one size n; bits, floats (the same array) and made of min(n, size) or more; scales.size
    == the number of blocks; 1 <= first <= size; work (3, 64); tally.size == 3; counts.size == 0 or 256.
    """
    n = words.size
    normal = np.uint32((least + 128) << 23)
    part = np.int64((1022 - mantissa) << 52).view(np.float64)  # powers of two: half a unit in the last place, relative
    floor = np.int64((1022 + least - mantissa) << 52).view(np.float64)  # and that of subnormal numbers
    failed = 0
    previous = 0
    for j in range(start, scales.size, stride):
        begin = 0 if j == 0 else first + (j - 1) * size
        end = min(first + j * size, n)
        tally[0] += end - begin
        _widen(words, begin, end - begin, container, bits)
        m = _fit(bits, end - begin, mantissa, least, previous, work)
        if m >= 0 and work[2, 0] >= 8.0:
            tally[1] += 1
            tally[2] += m > 0
        scale = np.float32(0.0)
        lo = work[0, 0]
        hi = work[1, 0]
        if m > 0:
            previous = m
            scale = _pick(lo, hi, storage)
        bad = _code(words, begin, end - begin, floats, scale, container, inner, made)
        for _ in range(4):
            if bad == 0 or m <= 0:
                break
            inverse = 2.0 / (lo + hi)
            for i in range(end - begin):
                if made[i] != words[begin + i]:
                    u = np.uint32(bits[i] & np.uint32(0x7FFFFFFF))
                    a = np.float64(u.view(np.float32))
                    d = np.rint(a * inverse)
                    if d >= 1.0 and d <= 127.0:
                        h = max(np.float64(np.uint32(u & np.uint32(0x7F800000)).view(np.float32)) * part, floor)
                        below = 0.5 * h if (u & np.uint32(0x7FFFFF)) == np.uint32(0) and u >= normal else h
                        x_low = (a - below) / d
                        y = (a + h) / d
                        if x_low <= hi and y >= lo:
                            lo = max(lo, x_low)
                            hi = min(hi, y)
            again = _pick(lo, hi, storage)
            if again == scale:
                break
            old = scale
            scale = again
            worse = _code(words, begin, end - begin, floats, scale, container, inner, made)
            if worse > bad:
                scale = old
                bad = _code(words, begin, end - begin, floats, scale, container, inner, made)
                break
            bad = worse
        scales[j] = scale
        if counts.size:
            for i in range(begin, end):
                counts[inner[i]] += 1
        if failed + bad > listed.size:
            return failed + bad
        if bad:
            for i in range(end - begin):
                if made[i] != words[begin + i]:
                    listed[failed] = begin + i
                    failed += 1
    return failed
