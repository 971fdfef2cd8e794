"""The block entries of a chunk record, from its head alone: for listings, and for what the index says of a chunk."""

import struct
from collections.abc import Callable
from dataclasses import dataclass

from tzip.coders.planes import SPLITS
from tzip.formats.layout import CHUNK_ELEMENTS, CLASSES, GROUP_ELEMENTS, Block, ChunkHead, TransformHead, group_cuts


@dataclass(frozen=True, slots=True)
class Entries:
    """What the head of a chunk record says: the blocks of the transform (A and B, when not empty), those of the planes,
    each with the plane's number. There are none of a transform or split that this tzip does not know.
    """

    head: ChunkHead
    transform: list[Block]
    planes: list[tuple[int, Block]]
    predictor: int = 0

    @property
    def structure(self) -> str:
        """The transform's name, and that of the predictor of a difference."""
        from tzip.coders.predictors import NAMES
        from tzip.coders.transforms import TRANSFORMS

        kind = self.head.transform
        name = TRANSFORMS.get(kind, f"transform {kind}") if kind else "none"
        return f"{name}, {NAMES.get(self.predictor, f'predictor {self.predictor}')}" if self.predictor else name


def read_entries(read: Callable[[int, int], bytes], length: int) -> Entries:
    """Return the entries of a chunk record of `length` bytes that `read(offset, n)` reads. Proves nothing but their form."""
    head = ChunkHead.read(read(0, ChunkHead.SIZE))
    at, elements, width = ChunkHead.SIZE, head.elements, head.width
    outer: list[Block] = []
    groups = predictor = 0
    if head.transform:
        from tzip.coders.transforms import CLASSED, DELTA, ROWS, TRANSFORMS, UNCHANGED

        if head.transform == UNCHANGED:
            return Entries(head, [], [])
        raw = read(at, TransformHead.SIZE + 2 * Block.SIZE)
        if head.transform not in TRANSFORMS or len(raw) < TransformHead.SIZE + 2 * Block.SIZE:
            return Entries(head, [], [])
        at += len(raw)
        parameters = TransformHead.read(raw[: TransformHead.SIZE])
        elements, width = parameters.inner, parameters.inner_width
        groups = parameters.a if head.transform == ROWS else 0
        predictor = parameters.v if head.transform == DELTA else 0
        a, b = (raw[i : i + Block.SIZE] for i in (TransformHead.SIZE, TransformHead.SIZE + Block.SIZE))
        outer = [Block.read(e) for e, n in ((a, parameters.size_a), (b, parameters.size_b)) if n]
        if head.transform in CLASSED:
            sizes = struct.unpack(f"<{CLASSES}I", read(at, 4 * CLASSES).ljust(4 * CLASSES, b"\0"))
            at += 4 * CLASSES
            groups = len(group_cuts(sizes)) - 1 if max(sizes) <= CHUNK_ELEMENTS else 0
    split = SPLITS.get(head.split)
    if split is None:
        return Entries(head, outer, [], predictor)
    groups = groups or -(-elements // GROUP_ELEMENTS)
    raw = read(at, min(Block.SIZE * groups * split.planes(width), max(0, length - at)))
    blocks = [Block.read(raw[i : i + Block.SIZE]) for i in range(0, len(raw) - Block.SIZE + 1, Block.SIZE)]
    return Entries(head, outer, [(i // groups, block) for i, block in enumerate(blocks)], predictor)


def codecs_of(record: bytes) -> int:
    """Return the mask of codecs that the index has of a chunk record (FORMAT.md, c_codecs)."""
    entries = read_entries(lambda at, n: record[at : at + n], len(record))
    mask = 0
    for block in (*entries.transform, *(block for _, block in entries.planes)):
        mask |= 1 << min(block.codec, 31)
    return mask
