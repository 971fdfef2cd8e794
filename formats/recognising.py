"""Which container a file is, and all tensors in it and in the files that it holds.

CONTAINERS is the closed table that tests and fuzzing go through. The order counts: PyTorch's files are zip files, too, and
a distributed checkpoint's are several in a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tzip.formats import (
    distcp,
    gguf_files,
    hdf5_files,
    npy,
    onnx_files,
    safetensors_header,
    tar_files,
    torch_files,
    zip_files,
)
from tzip.formats.containers import ContainerError, Contents, Inner, Read, Region, Unique, View, check, span_bytes
from tzip.formats.onnx_files import External

MAX_DEPTH = 4  # files in files
MAX_FILES = 1_000_000
_HEAD = 4096  # bytes that all containers look at first


class Container(Protocol):
    """A module that knows one container."""

    NAME: str

    def find(self, read: Read, size: int) -> Contents | None:
        """Return what the file holds, None when it is another kind of file; raises ContainerError when it cannot be read."""


CONTAINERS: tuple[Container, ...] = (
    safetensors_header,
    distcp,
    torch_files,
    npy,
    gguf_files,
    zip_files,
    hdf5_files,
    tar_files,
    onnx_files,
)


@dataclass(slots=True)
class Found:
    """Regions and tensors of a file and of all files in it, by their places in the outermost one.

    `container` names what it is, "" when it is none that is known. Warnings say what was left as bytes, and why.
    """

    container: str = ""
    regions: list[Region] = field(default_factory=list)
    tensors: list[View] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    header: int = 0


def recognise(read: Read, size: int) -> Found:
    """Return what is in a file of `size` bytes.

    Raises ContainerError when the file begins like a container and cannot be read; a file within it that cannot is kept as
    bytes, with a warning.
    """
    found = Found()
    contents = _find(read, size)
    if contents is None:
        return found
    found.container, found.header = contents.container, contents.header
    budget = [MAX_FILES]
    _add(found, contents, read, 0, "", 0, budget)
    names = Unique()
    for i, view in enumerate(found.tensors):
        if (name := names.name(view.name)) != view.name:
            found.tensors[i] = view._replace(name=name)
    found.regions.sort(key=lambda region: region.begin)
    return found


def _find(read: Read, size: int) -> Contents | None:
    head = read(0, _HEAD)

    def quick(offset: int, n: int) -> bytes:
        return head[offset : offset + n] if offset >= 0 and offset + n <= len(head) else read(offset, n)

    for container in CONTAINERS:
        try:
            contents = container.find(quick, size)
            if contents is not None:
                check(contents, size)
        except ContainerError as e:
            error = ContainerError(f"no valid {container.NAME} file: {e}")
            error.container = container.NAME
            raise error from None
        if contents is not None:
            # A tensor that is longer than its span repeats elements (an expanded one): reading it could need any memory.
            contents.tensors = [view for view in contents.tensors if _dense_enough(view)]
            return contents
    return None


def _dense_enough(view: View) -> bool:
    return view.strides is None or view.dtype.nbytes(_count(view)) <= span_bytes(view.dtype, view.shape, view.strides)


def _count(view: View) -> int:
    elements = 1
    for n in view.shape:
        elements *= n
    return elements


def _add(found: Found, contents: Contents, read: Read, at: int, prefix: str, depth: int, budget: list[int]) -> None:
    """Add what lies in the file at byte `at`, whose tensors' names begin with `prefix`."""
    # Made anew rather than replaced, which takes four times as long, and not at all in the outermost file.
    regions, tensors = contents.regions, contents.tensors
    if prefix or at:
        regions = [Region(r.begin + at, r.end + at, r.dtype, r.row) for r in regions]
        tensors = [View(prefix + v.name, v.dtype, v.shape, v.begin + at, v.strides) for v in tensors]
    found.regions += regions
    found.tensors += tensors
    found.warnings += [f"{prefix}: {w}" if prefix else w for w in contents.warnings]
    for inner in contents.files:
        budget[0] -= 1
        if budget[0] < 0 or depth == MAX_DEPTH:
            found.warnings.append(f"{prefix}{inner.name}: more files, or files in files, than are looked into")
            return
        _add_inner(found, inner, read, at, prefix, depth, budget)


def _add_inner(found: Found, inner: Inner, read: Read, at: int, prefix: str, depth: int, budget: list[int]) -> None:
    size, begin = inner.end - inner.begin, at + inner.begin

    def within(offset: int, n: int) -> bytes:
        return read(begin + offset, max(0, min(n, size - offset))) if 0 <= offset < size else b""

    name = prefix + inner.name
    try:
        contents = _find(within, size)
    except ContainerError as e:
        found.warnings.append(f"{name}: {e}; kept as plain bytes")
        return
    if contents is None:
        return
    if contents.container == npy.NAME:  # as numpy names the arrays of an .npz file
        name = name.removesuffix(".npy")
        contents.tensors = [v._replace(name=f"/{v.name}" if v.name else "") for v in contents.tensors]
    else:
        name += "/"
    _add(found, contents, read, begin, name, depth + 1, budget)


def told_of(tensors: Sequence[External], size: int) -> Found:
    """Return what lies in a file of `size` bytes whose tensors another file lists; those that overlap others are left out."""
    found = Found("external data")
    names, at = Unique(), 0
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.length)):
        end = tensor.offset + tensor.length
        if not at <= tensor.offset < end <= size or tensor.length % tensor.dtype.width:
            continue
        found.regions.append(Region(tensor.offset, end, tensor.dtype, tensor.shape[-1] if len(tensor.shape) > 1 else 0))
        found.tensors.append(View(names.name(tensor.name), tensor.dtype, tensor.shape, tensor.offset))
        at = end
    check(Contents(found.container, found.regions, found.tensors), size)
    return found
