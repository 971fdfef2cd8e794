"""Compiling kernels before they are needed: while an image is built, or once on a machine whose home folder many share."""

from collections.abc import Sequence

import numpy as np

from tzip.coders.arrays import Words
from tzip.coders.errors import UsageError
from tzip.formats.dtypes import BY_NAME
from tzip.plan import LEVELS

_ELEMENTS = (1 << 19) + 32  # three groups, the last a small one
FLOATS = ("BF16", "F16", "F32")


def warm_up(levels: Sequence[str] = tuple(LEVELS), dtypes: Sequence[str] = FLOATS) -> None:
    """Compile what packing and reading weights of these levels and types (BF16, F16, F32) need, and keep it in numba's cache.

    Takes half a minute where nothing is compiled yet. Without it kernels are compiled when they are first of use, and
    those that take seconds only once a process has done enough work (1 GiB): later processes then have them, too.
    Raises UsageError for other levels or types.
    """
    from tzip.coders.jit import compile_eagerly
    from tzip.memory import decode, encode

    unknown = [d for d in dtypes if d not in FLOATS] + [level for level in levels if level not in LEVELS]
    if unknown:
        raise UsageError(f"{unknown[0]!r} is none of {', '.join((*FLOATS, *LEVELS))}")
    compile_eagerly()
    values = (np.random.default_rng(0).standard_normal(_ELEMENTS) * 0.02).astype(np.float32)
    for dtype in dtypes:
        name = BY_NAME[dtype].name
        cast: dict[str, Words] = {
            "F32": values,
            "F16": values.astype(np.float16),
            "BF16": (values.view(np.uint32) >> 16).astype(np.uint16),
        }
        raw = cast[name].view(np.uint8)
        for level in levels:
            decode(encode(raw, level=level, dtype=name))
