"""The header of a safetensors file: what is where. The header's own bytes are kept verbatim, never written again.

Rules as the safetensors library enforces them (0.8.0): 8 bytes of length N <= 100,000,000, N bytes of JSON, tensors that cover
the rest of the file without gap or overlap. Duplicate keys: the last one counts.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

from tzip.formats.containers import ContainerError, Contents, Read, Region, View
from tzip.formats.dtypes import BY_NAME, OPAQUE, Dtype

NAME = "safetensors"
MAX_HEADER = 100_000_000


class HeaderError(ContainerError):
    """Why the bytes are no valid safetensors file."""


@dataclass(frozen=True, slots=True)
class TensorSpan:
    """A tensor of the file: its bytes are data_start + begin … data_start + end of the file."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def find(read: Read, size: int) -> Contents | None:
    """Return the tensors, None of a file that does not begin like one of these; raises HeaderError."""
    start = read(0, 64)
    n = int.from_bytes(start[:8], "little")
    if len(start) < 10 or not 2 <= n <= min(size - 8, MAX_HEADER) or start[8:].lstrip(b" \t\r\n")[:1] not in (b"{", b""):
        return None
    data_start, spans = parse(read, size)
    contents = Contents(NAME, header=data_start)
    for span in spans:
        begin, end = data_start + span.begin, data_start + span.end
        if begin < end:
            contents.regions.append(Region(begin, end, span.dtype, span.shape[-1] if len(span.shape) > 1 else 0))
        contents.tensors.append(View(span.name, span.dtype, span.shape, begin))
    return contents


def parse(read: Callable[[int, int], bytes], file_size: int) -> tuple[int, list[TensorSpan]]:
    """Return (data_start, tensors in file order) of a file that `read(offset, n)` reads.

    Raises HeaderError when the bytes break a rule of the format. A tensor of a dtype that this tzip does not know
    comes back as opaque bytes.
    """
    if file_size < 8:
        raise HeaderError("it has fewer than 8 bytes")
    n = int.from_bytes(read(0, 8), "little")
    if n > MAX_HEADER or 8 + n > file_size:
        raise HeaderError(f"its header of {n} bytes does not fit")
    raw = read(8, n)
    if not raw.lstrip(b" \t\r\n").startswith(b"{"):
        raise HeaderError("its header is no JSON object")
    try:
        header = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
        spans = [_span(name, entry) for name, entry in header.items() if name != "__metadata__"]
        metadata = header.get("__metadata__")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as e:
        raise HeaderError(f"its header is invalid: {type(e).__name__}: {e}") from None
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    ):
        raise HeaderError("its __metadata__ does not map strings to strings")
    spans.sort(key=lambda t: (t.begin, t.end))
    at = 0
    for span in spans:
        if span.begin != at:
            raise HeaderError(f"tensor {span.name!r} starts at {span.begin}, not at {at}")
        at = span.end
    if 8 + n + at != file_size:
        raise HeaderError(f"its tensors end at {8 + n + at}, the file at {file_size}")
    return 8 + n, spans


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _span(name: str, entry: dict[str, object]) -> TensorSpan:
    name.encode()  # a lone surrogate has no UTF-8 form
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype_name, str) or not isinstance(shape, list) or not isinstance(offsets, list):
        raise TypeError(f"tensor {name!r} has fields of wrong types")
    begin, end = offsets
    for number in (*shape, begin, end):
        if type(number) is not int or not 0 <= number < 1 << 63:
            raise ValueError(f"tensor {name!r} has a size or offset that is no unsigned integer")
    dtype = BY_NAME.get(dtype_name)
    if begin > end:
        raise ValueError(f"tensor {name!r} ends before it starts")
    if dtype is None or dtype is OPAQUE or len(shape) > 255 or dtype.name == "C128":
        return TensorSpan(name, OPAQUE, (end - begin,), begin, end)
    elements = 1
    for size in shape:
        elements *= size
        if elements >= 1 << 63:
            raise ValueError(f"tensor {name!r} has too many elements")
    if elements * dtype.bits != 8 * (end - begin):
        raise ValueError(f"tensor {name!r} has {end - begin} bytes for {elements} elements of {dtype_name}")
    return TensorSpan(name, dtype, tuple(shape), begin, end)
