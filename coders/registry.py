"""The closed table of codec ids (FORMAT.md, section 7). Ids are never renumbered and never reused."""

from dataclasses import dataclass

RAW, CONSTANT, ZSTD, HUFFMAN, RANS = range(5)
ADAPTIVE = 7


@dataclass(frozen=True, slots=True)
class Codec:
    """One row: wire id, name as `tzip info` prints it, first format version that may use it."""

    wire_id: int
    name: str
    since: int


CODECS = {
    c.wire_id: c
    for c in (
        Codec(RAW, "raw", 0),
        Codec(CONSTANT, "constant", 0),
        Codec(ZSTD, "zstd", 0),
        Codec(HUFFMAN, "huffman", 0),
        Codec(RANS, "rans", 0),
        Codec(ADAPTIVE, "adaptive", 0),
    )
}
RESERVED = {5: "pivot", 6: "context mixing"} | dict.fromkeys(range(8, 16), "not named yet")


def names_of(mask: int) -> list[str]:
    """Return the names for a c_codecs mask of the chunk table (FORMAT.md, section 2.3)."""
    return [CODECS[i].name if i in CODECS else f"codec {i}" for i in range(32) if mask >> i & 1]
