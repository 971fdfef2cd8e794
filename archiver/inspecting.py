"""What an archive is made of: its header, the structure that was found, and its blocks by split, plane and codec."""

from collections import Counter
from typing import Any

from tzip.archive import Archive
from tzip.coders.errors import TzipError
from tzip.coders.registry import CODECS
from tzip.formats.catalogue import IN_RUN
from tzip.formats.layout import Block


def describe(source: Any) -> dict[str, Any]:
    """Return header, counts and sizes, a row for each transform and one for each kind of block.

    Reads the heads of all chunks, decodes nothing.
    """
    with Archive(source) as archive:
        reader = archive.reader
        index = reader.index
        counts: Counter[tuple[str, int, str, int]] = Counter()
        stored: Counter[tuple[str, int, str, int]] = Counter()
        shared: Counter[tuple[str, int, str, int]] = Counter()
        escapes: Counter[tuple[str, int, str, int]] = Counter()
        found: dict[str, list[int]] = {}
        for run, chunks in enumerate(index.run_chunks.tolist()):
            for chunk in range(chunks):
                transform, blocks = _blocks(archive, run, chunk)
                sizes = (1, reader.chunk_elements(run, chunk) * int(index["r_width"][run]), reader.chunk_at(run, chunk)[1])
                found[transform] = [a + b for a, b in zip(found.get(transform, [0, 0, 0]), sizes, strict=True)]
                for key, block in blocks:
                    counts[key] += 1
                    stored[key] += block.stored
                    shared[key] += block.shared
                    escapes[key] += block.escapes
        used = int(index["x_length"][index["x_kind"] == IN_RUN].sum(dtype="u8"))
        distinct = int((index["r_elements"] * index["r_width"]).sum(dtype="u8"))
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
            "shared_bytes": max(0, used - distinct),
            "transforms": [
                {"transform": name, "chunks": n, "bytes": size, "stored": length}
                for name, (n, size, length) in sorted(found.items(), key=lambda row: (row[0] != "none", row[0]))
            ],
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


_Key = tuple[str, int, str, int]


def _blocks(archive: Archive, run: int, chunk: int) -> tuple[str, list[tuple[_Key, Block]]]:
    """Return the name of a chunk's transform and its blocks, those of the transform under its name."""
    from tzip.blocks import read_entries
    from tzip.coders.planes import SPLITS

    offset, length = archive.reader.chunk_at(run, chunk)
    source = archive.reader.source
    try:
        entries = read_entries(lambda at, n: source.read_at(offset + at, n), length)
    except TzipError as e:
        raise e.at(path=source.name, offset=offset) from None
    head = entries.head
    transform = entries.structure
    split = SPLITS[head.split].name if head.split in SPLITS else f"split {head.split}"
    rows = [((transform, 0, _codec(block), block.joined), block) for block in entries.transform]
    rows += [((split, plane, _codec(block), block.joined), block) for plane, block in entries.planes]
    return transform, rows


def _codec(block: Block) -> str:
    return CODECS[block.codec].name if block.codec in CODECS else f"codec {block.codec}"
