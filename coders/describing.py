"""Chunk records of floats, proven and described for a GPU by one call of a kernel.

What `chunks.read_blocks` proves of a record of the usual form (no transform, keys in Huffman or rANS, all else raw or constant)
takes it 60 microseconds, and a GPU decodes a chunk in two: here it takes one. Whatever is unusual or wrong is left to that
function, which says what is wrong; the two must accept the same records.
"""

from typing import no_type_check

import numpy as np

from tzip.coders.arrays import I64, U8
from tzip.coders.jit import quick_kernel
from tzip.coders.planes import Split

# What a row, that of a group, says: the key's payload within the record …, and three numbers for each other plane.
PAYLOAD, STORED, ESCAPES, VALUE, SEGMENTS, SEGMENT, CODEC, SHARED, JOINED, SIGN, SIZE, OTHERS = range(12)
COLUMNS = OTHERS + 3 * 3  # where its symbols are (-1: nowhere, they are all one), of how many bits, that one


def describe(record: U8, run: int, chunk: int, elements: int, split: Split, size: int) -> I64 | None:
    """Return a row for each group of a chunk, shape (groups, COLUMNS), or None when the record is unusual or wrong.

    `size`: elements of a group but the last. The sums are not looked at.
    """
    head = split.head
    if head is None or split.width not in (2, 4) or record.size < 64:
        return None
    groups = -(-elements // size)
    rows = np.zeros((groups, COLUMNS), np.int64)
    fields = np.array((run, chunk, elements, split.wire_id, split.width, size, head.exponent, head.mantissa, 0), np.int64)
    for joined in head.joined:
        fields[8] |= 1 << joined
    return rows if _describe(record, fields, rows) else None


@quick_kernel
@no_type_check
def _number(record: U8, at: int, count: int) -> int:
    """Needs: at + count <= record.size; count <= 4."""
    x = np.int64(0)
    for i in range(count):
        x |= np.int64(record[at + i]) << (8 * i)
    return x


@quick_kernel
@no_type_check
def _describe(record: U8, fields: I64, rows: I64) -> int:
    """Return 1 when all is right. Needs: record.size >= 64; fields and rows as `describe` makes them."""
    run, chunk, elements = fields[0], fields[1], fields[2]
    width, size, exponent, mantissa = fields[4], fields[5], fields[6], fields[7]
    length = record.size
    groups = rows.shape[0]
    if _number(record, 0, 4) != 0x635A54F5 or _number(record, 4, 4) != 0x0A6B6E68:
        return 0
    if _number(record, 16, 4) != length or _number(record, 20, 4) != 0 or length % 16 or length > 1 << 25:
        return 0
    if _number(record, 24, 4) != run or _number(record, 28, 4) != chunk or _number(record, 32, 4) != elements:
        return 0
    if record[36] != fields[3] or record[37] != width or record[38] != 0 or record[39] != 0:
        return 0
    at = 48 + 16 * groups * width
    if at > length:
        return 0
    table = -1
    for p in range(width):
        for g in range(groups):
            e = 48 + 16 * (p * groups + g)
            n = min(size, elements - g * size)
            codec, joined = record[e], np.int64(record[e + 1])
            segments, flags = np.int64(record[e + 2]), np.int64(record[e + 3])
            stored, escapes, value = _number(record, e + 4, 4), _number(record, e + 8, 4), _number(record, e + 12, 2)
            if record[e + 14] or record[e + 15] or flags > 7 or (flags >> 1 and (p != 1 or flags >> 1 == 3)):
                return 0
            if p < 2:
                if joined > 2 + (exponent == 5) or not (fields[8] >> joined) & 1:
                    return 0
            elif joined:
                return 0
            bits = np.int64(8)
            if p == 0:
                bits = exponent + joined
            elif p == 1:
                bits = mantissa - joined + (flags >> 1 == 0)
                if joined != rows[g, JOINED]:
                    return 0
            if p == 0:
                if (codec != 3 and codec != 4) or segments == 0 or escapes > n:
                    return 0
                segment = (n + 128 * segments - 1) // (128 * segments) * 128
                if segment > 1 << 17 or (segments - 1) * segment >= n:
                    return 0
                if 4 * escapes + (64 if codec == 3 else 132) * segments > stored:
                    return 0
                if flags & 1:
                    if table != codec:
                        return 0
                else:
                    table = codec
                rows[g, STORED], rows[g, ESCAPES], rows[g, VALUE] = stored, escapes, value
                rows[g, SEGMENTS], rows[g, SEGMENT], rows[g, CODEC] = segments, segment, codec
                rows[g, SHARED], rows[g, JOINED], rows[g, SIZE] = flags & 1, joined, n
            else:
                if segments or flags & 1 or escapes or bits > 8:
                    return 0
                k = OTHERS + 3 * (p - 1)
                if codec == 1:
                    if stored or value >> bits:
                        return 0
                    rows[g, k], rows[g, k + 2] = -1, value
                elif codec == 0:
                    cell = 8
                    if bits == 4:
                        cell = 2
                    elif bits == 2 or bits == 6:
                        cell = 4
                    packed = n if bits == 8 else (n + 32 * cell - 1) // (32 * cell) * 4 * cell * bits
                    if value or stored != packed:
                        return 0
                else:
                    return 0
                rows[g, k + 1] = bits
                if p == 1 and flags >> 1 == 2:
                    rows[g, SIGN] = 0x8000
            start = (at + 127) // 128 * 128 if stored >= 16384 else (at + 15) // 16 * 16
            if start + stored > length:
                return 0
            for i in range(at, start):
                if record[i]:
                    return 0
            if p == 0:
                rows[g, PAYLOAD] = start
            elif codec == 0:
                rows[g, OTHERS + 3 * (p - 1)] = start
            at = start + stored
    if (at + 15) // 16 * 16 != length:
        return 0
    for i in range(at, length):
        if record[i]:
            return 0
    return 1
