"""What an archive is made of: its header and its blocks by split, plane and codec."""

from collections import Counter
from typing import Any

from tzip.archive import Archive
from tzip.coders.registry import CODECS
from tzip.formats.layout import GROUP_ELEMENTS, Block, ChunkHead


def describe(source: Any) -> dict[str, Any]:
    """Return header, counts and sizes, and a row for each kind of block. Reads the heads of all chunks, decodes nothing."""
    with Archive(source) as archive:
        reader = archive.reader
        index = reader.index
        counts: Counter[tuple[str, int, str, int]] = Counter()
        stored: Counter[tuple[str, int, str, int]] = Counter()
        shared: Counter[tuple[str, int, str, int]] = Counter()
        escapes: Counter[tuple[str, int, str, int]] = Counter()
        for run, chunks in enumerate(index.run_chunks.tolist()):
            for chunk in range(chunks):
                for key, block in _blocks(archive, run, chunk):
                    counts[key] += 1
                    stored[key] += block.stored
                    shared[key] += block.shared
                    escapes[key] += block.escapes
        header, footer = reader.header, reader.footer
        return {
            "format_version": header.version,
            "writer": header.writer,
            "zstd_version": header.zstd_version,
            "must_understand": header.must_understand,
            "may_ignore": header.may_ignore,
            "archive_id": footer.archive_id.hex(),
            "origin": reader.origin,
            "archive_bytes": footer.archive_length,
            "index_bytes": footer.index_length,
            "member_bytes": int(index["m_size"].sum()),
            "members": len(index.member_names),
            "tensors": len(index.tensor_names),
            "extents": int(index["x_kind"].size),
            "runs": int(index["r_width"].size),
            "chunks": int(index["c_offset"].size),
            "blocks": [
                {
                    "split": key[0],
                    "plane": key[1],
                    "codec": key[2],
                    "joined": key[3],
                    "blocks": n,
                    "shared": shared[key],
                    "escapes": escapes[key],
                    "stored": stored[key],
                }
                for key, n in sorted(counts.items())
            ],
        }


def _blocks(archive: Archive, run: int, chunk: int) -> list[tuple[tuple[str, int, str, int], Block]]:
    from tzip.coders.planes import SPLITS

    offset, length = archive.reader.chunk_at(run, chunk)
    head = ChunkHead.read(archive.reader.source.read_at(offset, ChunkHead.SIZE))
    groups = -(-archive.reader.chunk_elements(run, chunk) // GROUP_ELEMENTS)
    size = min(Block.SIZE * groups * head.planes, length - ChunkHead.SIZE)
    raw = archive.reader.source.read_at(offset + ChunkHead.SIZE, size)
    split = SPLITS[head.split].name if head.split in SPLITS else f"split {head.split}"
    rows = []
    for i in range(len(raw) // Block.SIZE):
        block = Block.read(raw[i * Block.SIZE : (i + 1) * Block.SIZE])
        codec = CODECS[block.codec].name if block.codec in CODECS else f"codec {block.codec}"
        rows.append(((split, i // groups, codec, block.joined), block))
    return rows
