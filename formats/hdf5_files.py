"""HDF5 files: where their datasets lie. The usual ones are read by `hdf5_plain`; the h5py library walks the structures of all
others, and reads no element.

Datasets in one piece, and chunks without filters, hold elements as they are; compressed, compact, virtual and external ones
stay bytes, as do all types that are not exactly numpy's little-endian ones. Only hard links are followed, each object once.

HDF5 is a C library, and files with a few changed bytes made it crash and run without end (HDF5 2.0), which no `except`
prevents. So it works in a process of its own, which asks for the bytes it wants, has limited time and memory, and answers in
JSON. That costs 0.2 s a file, most of it for importing numpy and h5py.
"""

import importlib.util
import io
import json
import math
import os
import struct
import subprocess
import sys
import threading
from typing import Any, BinaryIO

from tzip.formats.containers import ContainerError, Contents, Read, Region, View
from tzip.formats.dtypes import BY_NAME, Dtype, from_numpy
from tzip.formats.hdf5_plain import MAX_CHUNKS, MAX_DEPTH, MAX_OBJECTS, Datasets, plain
from tzip.formats.hdf5_plain import NAME as NAME

SIGNATURE = b"\x89HDF\r\n\x1a\n"
USER_BLOCKS = (0, 512, 1024, 2048)  # bytes of other content that may precede: any power of two; these are looked at
MAX_METADATA = 100_000_000
MAX_SECONDS = 60.0  # 20,000 datasets take 7
MAX_MEMORY = 8 << 30  # of address space
_ASK = struct.Struct("<QQ")  # offset and bytes wanted; no bytes: the answer follows, that many bytes of JSON
_CHILD = "from tzip.formats.hdf5_files import serve; serve()"


def find(read: Read, size: int) -> Contents | None:
    """Return the datasets of an HDF5 file, None for any other file."""
    head = read(0, USER_BLOCKS[-1] + len(SIGNATURE))
    base = next((n for n in USER_BLOCKS if head[n : n + len(SIGNATURE)] == SIGNATURE), None)
    if base is None:
        return None
    if (found := plain(read, base, size)) is not None:
        return found
    if importlib.util.find_spec("h5py") is None:
        return Contents(NAME, warnings=["it is not of the usual form: to find its tensors, pip install 'tensor-tzip[h5py]'"])
    code = f"import sys; sys.path = {sys.path!r}; {_CHILD}"
    command = [sys.executable, "-c", code, str(base), str(size)]
    try:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError as e:
        return Contents(NAME, warnings=[f"no process to look for its tensors could be started: {e}"])
    timer = threading.Timer(MAX_SECONDS, child.kill)
    timer.start()
    try:
        answer = _conversation(child.stdin, child.stdout, read, size)  # type: ignore[arg-type] # these are pipes
    finally:
        timer.cancel()
        child.kill()
        child.communicate()
    return _believed(answer, size)


def _conversation(into: BinaryIO, out: BinaryIO, read: Read, size: int) -> bytes:
    """Give the process what it asks for until it answers. Errors of `read` are the caller's."""
    left = MAX_METADATA
    while len(ask := out.read(_ASK.size)) == _ASK.size:
        offset, n = _ASK.unpack(ask)
        if n == 0:
            answer = out.read(min(offset, 2 * MAX_METADATA))
            if len(answer) == offset:
                return answer
            break
        left -= n
        if left < 0 or offset > size:
            break
        raw = read(offset, min(n, size - offset))
        try:
            into.write(struct.pack("<Q", len(raw)) + raw)
            into.flush()
        except OSError:  # nobody is there to read it
            break
    raise ContainerError("the HDF5 library crashed on it, or found no end")


def _believed(answer: bytes, size: int) -> Contents:
    """Return what the answer says when its regions lie in the file and apart."""
    try:
        told = json.loads(answer)
        if "error" in told:
            raise ContainerError(str(told["error"]))
        found = Contents(NAME, warnings=[str(warning) for warning in told["warnings"]])
        for begin, end, dtype, row in told["regions"]:
            found.regions.append(Region(int(begin), int(end), BY_NAME[dtype], int(row)))
        for name, dtype, shape, begin, strides in told["tensors"]:
            steps = None if strides is None else tuple(map(int, strides))
            found.tensors.append(View(str(name), BY_NAME[dtype], tuple(map(int, shape)), int(begin), steps))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as e:
        raise ContainerError(f"the HDF5 library's process answered nonsense: {e}") from None
    at = 0
    for region in found.regions:
        if not at <= region.begin < region.end <= size:
            raise ContainerError(f"two datasets lie at {region.begin}, or one not in the file")
        at = region.end
    return found


def serve() -> None:
    """Be the process that `find` starts."""
    base, size = map(int, sys.argv[1:])
    into, out = sys.stdout.buffer, sys.stdin.buffer

    def read(offset: int, n: int) -> bytes:
        if n == 0:
            return b""
        into.write(_ASK.pack(offset, n))
        into.flush()
        return out.read(int.from_bytes(out.read(8), "little"))

    try:
        import resource  # which Windows lacks

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):
        pass
    told: dict[str, object]
    try:
        found = inspect(read, base, size)
        told = {
            "regions": [(r.begin, r.end, r.dtype.name, r.row) for r in found.regions],
            "tensors": [(v.name, v.dtype.name, v.shape, v.begin, v.strides) for v in found.tensors],
            "warnings": found.warnings,
        }
    except ContainerError as e:
        told = {"error": str(e)}
    answer = json.dumps(told).encode()
    into.write(_ASK.pack(len(answer), 0) + answer)
    into.flush()
    os._exit(0)  # the library's own end may crash after damage


def inspect(read: Read, base: int, size: int) -> Contents:
    """Return the datasets of an HDF5 file that begins at `base`, in this process; positions are as the file has them."""
    import h5py

    try:
        with h5py.File(_Source(read, base, size), "r") as file:  # one that is open when Python ends would crash it
            return _Walk(h5py, base).contents(file.id)
    except ContainerError:
        raise
    except Exception as e:  # whatever the library makes of damaged structures
        raise ContainerError(f"the HDF5 library cannot read it: {type(e).__name__}: {str(e)[:200]}") from None


class _Source(io.RawIOBase):
    """The file as the library sees it: from its signature on, and no more of it than structures need.

    Without a user block all positions that HDF5 tells are of one kind; some of its versions forget to add it.
    """

    def __init__(self, read: Read, base: int, size: int) -> None:
        super().__init__()
        self.base, self.end = base, size
        self.at, self.left = 0, MAX_METADATA
        self.take = read

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + (0, self.at, self.end - self.base)[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        out = memoryview(buffer).cast("B")
        self.left -= len(out)
        if self.left < 0:
            raise ContainerError(f"its structures have more than {MAX_METADATA} bytes")
        raw = self.take(self.base + self.at, min(len(out), max(self.end - self.base - self.at, 0)))
        out[: len(raw)] = raw
        self.at += len(raw)
        return len(raw)


class _Walk:
    """One walk through the groups of a file, by the library's low-level interface: nothing is opened by its path."""

    def __init__(self, h5py: Any, base: int) -> None:
        self.h5py = h5py
        self.datasets = Datasets(base, MAX_CHUNKS)
        self.seen = set[tuple[int, int]]()
        self.names_left = MAX_METADATA
        self.big_endian = 0

    def contents(self, root: Any) -> Contents:
        """Return what the groups hold, names in the order in which the file lists them."""
        self._group(self.h5py.h5o.open(root, b"/"), b"", 0)
        found = self.datasets.found
        found.regions.sort(key=lambda r: r.begin)
        if self.big_endian:
            found.warnings.append(f"{self.big_endian} datasets are big-endian: kept as bytes")
        return found

    def _group(self, group: Any, path: bytes, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise ContainerError(f"it has groups deeper than {MAX_DEPTH}")
        if len(self.seen) + group.get_num_objs() > MAX_OBJECTS:
            raise ContainerError(f"it has more than {MAX_OBJECTS} objects")
        for name in list(group):
            if group.links.get_info(name).type != self.h5py.h5l.TYPE_HARD:
                continue  # a soft link names what has a path already, an external one another file
            item = self.h5py.h5o.open(group, name)
            info = self.h5py.h5o.get_info(item)
            if (info.fileno, info.addr) in self.seen:
                continue
            self.seen.add((info.fileno, info.addr))
            full = path + name
            self.names_left -= len(full)
            if len(self.seen) > MAX_OBJECTS or self.names_left < 0:
                raise ContainerError(f"it has more than {MAX_OBJECTS} objects, or names without end")
            if isinstance(item, self.h5py.h5g.GroupID):
                self._group(item, full + b"/", depth + 1)
            elif isinstance(item, self.h5py.h5d.DatasetID):
                self._dataset(item, full.decode("utf-8", "replace"))

    def _dataset(self, dataset: Any, name: str) -> None:
        plan = dataset.get_create_plist()
        layout, h5d = plan.get_layout(), self.h5py.h5d
        if layout not in (h5d.CONTIGUOUS, h5d.CHUNKED) or plan.get_nfilters() or plan.get_external_count():
            return  # a virtual dataset is left alone before anything makes the library open its sources
        dtype = self._dtype(dataset)
        shape = dataset.shape
        if dtype is None or shape is None:
            return
        if math.prod(n or 1 for n in shape) >= 1 << 63:
            raise ContainerError(f"dataset {name!r} has too many elements")
        if 0 in shape:
            self.datasets.empty(name, dtype, shape)
        elif layout == h5d.CONTIGUOUS:
            offset = dataset.get_offset()
            if offset is not None:  # never written: its elements have no bytes
                self.datasets.contiguous(name, dtype, shape, offset, dataset.get_storage_size())
        else:
            stored: list[tuple[tuple[int, ...], int, int]] = []
            left = self.datasets.chunks_left
            dataset.chunk_iter(
                lambda one: stored.append((one.chunk_offset, one.byte_offset, one.size)) if len(stored) <= left else True
            )
            self.datasets.chunked(name, dtype, shape, plan.get_chunk(), stored)

    def _dtype(self, dataset: Any) -> Dtype | None:
        """Return the element type when the file's is exactly what numpy has: h5py alone would take the next wider one."""
        kind, h5t = dataset.get_type(), self.h5py.h5t
        match kind.get_class():
            case h5t.FLOAT | h5t.INTEGER:
                self.big_endian += kind.get_size() > 1 and kind.get_order() == h5t.ORDER_BE
            case h5t.COMPOUND if kind.get_nmembers() == 2:  # how complex numbers are stored
                pass
            case h5t.ENUM:  # how booleans are stored
                pass
            case _:
                return None
        try:
            found = dataset.dtype
            dtype = from_numpy(found)
            return dtype if dtype and kind.equal(h5t.py_create(found, logical=True)) else None
        except (TypeError, ValueError):  # a type without a counterpart in numpy
            return None
