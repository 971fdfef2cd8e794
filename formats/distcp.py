"""The files of torch's distributed checkpoints: a file (.distcp) is one archive of torch.save after another, an item each.

Which item is which stands in the checkpoint's other file, `.metadata`, a pickle that is read here and not run. Without
it items have numbers.
"""

import struct
from bisect import bisect_right

from tzip.formats.containers import ContainerError, Contents, Inner, Read, View
from tzip.formats.opcodes import Stream
from tzip.formats.pickles import Map, Opaque, load

NAME = "DCP"
METADATA = ".metadata"
MAX_ITEMS = 1_000_000
_LOCAL, _END, _LOCATOR, _END64 = b"PK\3\4", b"PK\5\6", b"PK\6\7", b"PK\6\6"
_TAIL = 56 + 20 + 22  # the records at the end of an archive, zip64's too, without a comment


def find(read: Read, size: int) -> Contents | None:
    """Return the items of a file that holds two archives or more, None for any other file."""
    if read(0, 4) != _LOCAL or _begin(read, size) in (None, 0):
        return None
    items: list[tuple[int, int]] = []
    end = size
    while end:
        begin = _begin(read, end)
        if begin is None or len(items) == MAX_ITEMS:
            return None  # a zip file behind something else
        items.append((begin, end))
        end = begin
    items.reverse()
    return Contents(NAME, files=[Inner(str(i), begin, end) for i, (begin, end) in enumerate(items)])


def _begin(read: Read, end: int) -> int | None:
    """Return where the archive begins that ends at byte `end` of the file, None when none does."""
    tail = read(max(0, end - _TAIL), min(_TAIL, end))
    if len(tail) < 22 or not tail[-22:].startswith(_END) or tail[-2:] != b"\0\0":
        return None
    nbytes, offset = struct.unpack("<2L", tail[-10:-2])
    directory_end = end - 22
    if tail[-42:].startswith(_LOCATOR) and tail.startswith(_END64) and len(tail) == _TAIL:
        nbytes, offset = struct.unpack("<2Q", tail[40:56])
        directory_end = end - _TAIL
    begin = directory_end - nbytes - offset
    return begin if 0 <= begin < end and read(begin, 4) == _LOCAL else None


def places(read: Read, size: int) -> dict[str, list[tuple[int, int, str]]]:
    """Return (first byte, end, name) of the items of each file that a `.metadata` file tells of, ascending.

    A part of a tensor has the tensor's name and where in it the part begins. Raises ContainerError.
    """
    root = load(Stream(read, 0, size), lambda name, arguments: None, lambda key: None)
    found: dict[str, list[tuple[int, int, str]]] = {}
    storage = _attributes(root).get("storage_data")
    if not isinstance(storage, Map):
        raise ContainerError("it has no storage_data")
    for index, info in zip(storage.pairs[::2], storage.pairs[1::2], strict=True):
        item, place = _attributes(index), _attributes(info)
        name, path, at, n = (item.get("fqn"), place.get("relative_path"), place.get("offset"), place.get("length"))
        if isinstance(name, str) and isinstance(path, str) and type(at) is int and type(n) is int and at >= 0 and n > 0:
            found.setdefault(path, []).append((at, at + n, name + _part(item.get("offset"))))
    return {path: sorted(items) for path, items in found.items()}


def _part(offset: object) -> str:
    numbers = offset if isinstance(offset, list | tuple) else ()
    while len(numbers) == 1 and isinstance(numbers[0], list | tuple):  # the call of torch.Size and its argument
        numbers = numbers[0]
    return f"{list(numbers)}" if any(numbers) and all(type(n) is int for n in numbers) else ""


def _attributes(value: object) -> dict[str, object]:
    """Return the attributes that a pickle gives an object."""
    state = value.state if isinstance(value, Opaque) else None
    if not isinstance(state, Map):
        return {}
    return {k: v for k, v in zip(state.pairs[::2], state.pairs[1::2], strict=True) if isinstance(k, str)}


def named(tensors: list[View], items: list[tuple[int, int, str]]) -> list[View]:
    """Return tensors with the names of the items that they are in: an item's own is "tensor", and adds nothing."""
    begins = [begin for begin, _, _ in items]
    found = []
    for view in tensors:
        i = bisect_right(begins, view.begin) - 1
        if i >= 0 and view.begin < items[i][1]:
            _, _, inside = view.name.partition("/")
            view = view._replace(name=items[i][2] if inside == "tensor" else f"{items[i][2]}/{inside}")
        found.append(view)
    return found
