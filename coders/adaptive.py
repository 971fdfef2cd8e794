"""Adaptive binary range coder, codec 7: no table, no states, for streams too short to pay for them (FORMAT.md, section 7.8).

Each symbol is a path through a binary tree whose nodes learn how often their bit is set: a node's probability is the mean of
its bits, the first of which count as much as the last 512. Range coding after G. N. N. Martin, "Range encoding" (1979), with
the carry propagation of Schindler's coder. One symbol at a time, so encoders take it only where patience was asked for.
Measured on classes of bfloat16 weights a step apart, % of the weights: rANS 6.76; nodes that forget after 64 bits 6.69 with
whichever is smaller, after 256 6.63, after 512 6.61, never 6.62. Contexts of earlier symbols gain nothing beside that.
"""

from typing import no_type_check

import numpy as np

from tzip.coders.arrays import U8, U16, U32, U64
from tzip.coders.errors import CorruptError, TruncatedError
from tzip.coders.jit import kernel

OK, OUT_OF_BYTES, LEFTOVER = range(3)
# How far a node goes with a bit when it has seen so many, in 1/65536 of the way.
_SHARES: U64 = np.array([131072 // (2 * seen + 3) for seen in range(511)], np.uint64)


def encode(symbols: U8, bits: int) -> U8:
    """Return the payload of symbols below 2**bits, shape (n,), n >= 1, bits <= 8."""
    # A decision takes 16 bits at most, for no probability is below 2^-15; carries and the end a few bytes more.
    out = np.empty(symbols.size * bits * 2 + 16, np.uint8)
    size = _encode(symbols, bits, _start(bits), np.zeros(1 << bits, np.uint16), _SHARES, out)
    return out[:size].copy()


def decode_into(payload: U8, bits: int, out: U8) -> None:
    """Fill `out`, shape (n,), with symbols below 2**bits; raises TruncatedError or CorruptError for what is no payload of n."""
    status = _decode(payload, bits, _start(bits), np.zeros(1 << bits, np.uint16), _SHARES, out)
    if status == OUT_OF_BYTES:
        raise TruncatedError("adaptive: the payload ends too early")
    if status == LEFTOVER:
        raise CorruptError("adaptive: bytes left over, or none that a payload begins with")


def _start(bits: int) -> U32:
    return np.full(1 << bits, 1 << 25, np.uint32)


@kernel
@no_type_check
def _encode(symbols: U8, bits: int, ones: U32, seen: U16, shares: U64, out: U8) -> int:
    """Return the bytes written. Needs: symbols below 2**bits; ones and seen of 2**bits; shares (511,); room for all."""
    low = np.uint64(0)
    width = np.uint64(0xFFFFFFFF)
    cache = np.uint64(0)
    waiting = 0  # bytes of 255 behind the cache, which a carry turns to 0
    begun = False
    at = 0
    for i in range(symbols.size + 1):
        steps = bits if i < symbols.size else 5  # in the end all that is held is written
        node = 1
        for k in range(steps):
            shifts = 1
            if i < symbols.size:
                bit = (np.int64(symbols[i]) >> (bits - 1 - k)) & 1
                p = np.uint64(ones[node])
                bound = (width * p) >> np.uint64(26)
                count = seen[node]
                if bit:
                    width = bound
                    ones[node] = np.uint32(p + (((np.uint64((1 << 26) - 2048) - p) * shares[count]) >> np.uint64(16)))
                else:
                    low += bound
                    width -= bound
                    ones[node] = np.uint32(p - (((p - np.uint64(2048)) * shares[count]) >> np.uint64(16)))
                seen[node] = min(count + 1, 510)
                node = 2 * node + bit
                shifts = 0
                while width < np.uint64(1 << 24):
                    width <<= np.uint64(8)
                    shifts += 1
            for _ in range(shifts):
                if low < np.uint64(0xFF000000) or low > np.uint64(0xFFFFFFFF):
                    carry = low >> np.uint64(32)
                    if begun:
                        out[at] = np.uint8((cache + carry) & np.uint64(255))
                        at += 1
                    for _ in range(waiting):
                        out[at] = np.uint8((np.uint64(255) + carry) & np.uint64(255))
                        at += 1
                    waiting = 0
                    begun = True
                    cache = (low >> np.uint64(24)) & np.uint64(255)
                else:
                    waiting += 1
                low = (low & np.uint64(0xFFFFFF)) << np.uint64(8)
    return at


@kernel
@no_type_check
def _decode(payload: U8, bits: int, ones: U32, seen: U16, shares: U64, out: U8) -> int:
    """Needs: ones and seen of 2**bits; shares (511,)."""
    if payload.size < 4:
        return 1
    width = np.uint64(0xFFFFFFFF)
    code = np.uint64(0)
    for i in range(4):
        code = code << np.uint64(8) | np.uint64(payload[i])
    if code >= width:
        return 2
    at = 4
    for i in range(out.size):
        node = 1
        for _ in range(bits):
            p = np.uint64(ones[node])
            bound = (width * p) >> np.uint64(26)
            count = seen[node]
            if code < bound:
                bit = 1
                width = bound
                ones[node] = np.uint32(p + (((np.uint64((1 << 26) - 2048) - p) * shares[count]) >> np.uint64(16)))
            else:
                bit = 0
                code -= bound
                width -= bound
                ones[node] = np.uint32(p - (((p - np.uint64(2048)) * shares[count]) >> np.uint64(16)))
            seen[node] = min(count + 1, 510)
            node = 2 * node + bit
            while width < np.uint64(1 << 24):
                if at == payload.size:
                    return 1
                width <<= np.uint64(8)
                code = code << np.uint64(8) | np.uint64(payload[at])
                at += 1
        out[i] = np.uint8(node - (1 << bits))
    return 0 if at == payload.size else 2
