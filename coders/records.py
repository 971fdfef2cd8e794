"""Records of bytes, taken apart into fields (FORMAT.md, section 6.5).

The blocks of quantised weights are records: a scale of 16 bits and 32 integers, say. One table over all their bytes says little
of either; fields with tables of their own gain 2 to 8 % (GGUF's Q8_0: 94.9 -> 93.0 % of the bytes, Q4_1: 96.8 -> 91.0).
"""

from itertools import groupby

import numpy as np

from tzip.coders.arrays import I64, U8

FIELDS = 8
MAX_BYTES = 4096


def runs(fields: U8) -> list[tuple[int, int, int]]:
    """Return (field, first byte, end) of the runs of bytes of one field in a record, shape (b,)."""
    found, at = [], 0
    for field, same in groupby(fields.tolist()):
        n = len(list(same))
        found.append((field, at, at + n))
        at += n
    return found


def sizes(fields: U8, records: int) -> I64:
    """Return the bytes of each field in so many records, shape (8,). Needs: fields below 8."""
    return np.bincount(fields, minlength=FIELDS).astype(np.int64) * records


def take_apart(raw: U8, fields: U8) -> list[U8]:
    """Return the bytes of each field of whole records, shape (n * b,), that has any, record by record."""
    table = raw.reshape(-1, fields.size)
    return [
        np.concatenate([table[:, a:b] for f, a, b in runs(fields) if f == field], axis=1).reshape(-1)
        for field in sorted(set(fields.tolist()))
    ]


def put_together(inner: U8, fields: U8, out: U8) -> None:
    """Fill `out`, whole records, from the bytes of all fields, one field after another. Needs: both of one size."""
    table = out.reshape(-1, fields.size)
    ends = np.cumsum(sizes(fields, len(table)))
    columns = [inner[a:b].reshape(len(table), -1) for a, b in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)]
    done = [0] * FIELDS
    for field, a, b in runs(fields):
        table[:, a:b] = columns[field][:, done[field] : done[field] + b - a]
        done[field] += b - a
