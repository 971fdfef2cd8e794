"""Builds inputs and takes archives apart to build forged ones, by the text of FORMAT.md and not by tzip's own structures."""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

MASK = (1 << 64) - 1
MEMB, CHNK, DONE, INDX = (b"\xf5TZ" + k + b"\n" for k in (b"memb", b"chnk", b"done", b"indx"))
FOOTER_MAGIC = b"\x1a\n\rPIZT\x89"

# The columns of section 2.3.
COLUMNS = (
    ("m", "m_name", "<u4"),
    ("m", "m_kind", "u1"),
    ("m", "m_flags", "u1"),
    ("m", "m_mode", "<u2"),
    ("m", "m_mtime", "<i8"),
    ("m", "m_size", "<u8"),
    ("m", "m_sha", "V32"),
    ("m", "m_record", "<u8"),
    ("m", "m_check", "<u8"),
    ("m", "m_extents", "<u4"),
    ("m", "m_tensors", "<u4"),
    ("m", "m_runs", "<u4"),
    ("x", "x_kind", "u1"),
    ("x", "x_run", "<u4"),
    ("x", "x_offset", "<u8"),
    ("x", "x_length", "<u8"),
    ("t", "t_name", "<u4"),
    ("t", "t_dtype", "u1"),
    ("t", "t_layout", "u1"),
    ("t", "t_ndim", "u1"),
    ("t", "t_extent", "<u4"),
    ("t", "t_offset", "<u8"),
    ("r", "r_width", "u1"),
    ("r", "r_inputs", "<u4"),
    ("r", "r_elements", "<u8"),
    ("i", "i_kind", "u1"),
    ("i", "i_offset", "<u8"),
    ("i", "i_length", "<u8"),
    ("i", "i_begin", "<u8"),
    ("i", "i_archive", "V32"),
    ("i", "i_file", "V32"),
    ("i", "i_member", "<u4"),
    ("i", "i_name", "<u4"),
    ("c", "c_offset", "<u8"),
    ("c", "c_length", "<u4"),
    ("c", "c_check", "<u8"),
    ("c", "c_codecs", "<u4"),
    ("d", "dims", "<u8"),
)
TABLES = "mxtricd"


def check8(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:8]


_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_GOLD, _SEED, _LEN = 0x9E3779B97F4A7C15, 0x747A69702073756D, 0xC2B2AE3D27D4EB4F


def _mix(x: np.ndarray) -> np.ndarray:
    x = x ^ (x >> np.uint64(30))
    x = x * _M1
    x = x ^ (x >> np.uint64(27))
    x = x * _M2
    return x ^ (x >> np.uint64(31))


_KEYS = _mix(np.array([(_SEED + (j + 1) * _GOLD) & MASK for j in range(512)], np.uint64))


def sum64(data: bytes) -> int:
    """Section 4, from its text."""
    if not data:
        return 0
    stripes = -(-len(data) // 4096)
    x = np.frombuffer(data + bytes(stripes * 4096 - len(data)), "<u8").reshape(-1, 512)
    y = x ^ _KEYS
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    a = ((y & low) * (y >> half) + ((x << half) | (x >> half))).sum(axis=1, dtype=np.uint64)
    t = _mix(a + np.array([((s + 1) * _GOLD) & MASK for s in range(stripes)], np.uint64))
    total = (int(t.sum(dtype=np.uint64)) + len(data) * _LEN) & MASK
    return int(_mix(np.array([total], np.uint64))[0])


def place(record: bytes, offset: int) -> bytes:
    """Return the record with its bare check turned into the one for that offset, or back (section 2.2)."""
    at = int(_mix(np.array([offset], np.uint64))[0])
    return record[:8] + (int.from_bytes(record[8:16], "little") ^ at).to_bytes(8, "little") + record[16:]


def align(x: int, a: int) -> int:
    return -(-x // a) * a


class Cat:
    """A catalogue that can be changed: `columns` (numpy arrays), `names`, `inline`; `counts` overrides what is written."""

    def __init__(self, record: bytes) -> None:
        raw_length, stored_length = struct.unpack_from("<II", record, 24)
        body = record[32 : 32 + stored_length]
        if raw_length != stored_length:
            import zstandard

            body = zstandard.ZstdDecompressor().decompress(body, max_output_size=raw_length)
        counts = struct.unpack_from("<12I", body)
        size = dict(zip(TABLES, counts[:7], strict=True))
        heap, inline, self.first_member, self.first_run, _ = counts[7:]
        self.columns: dict[str, np.ndarray] = {}
        at = 48
        for table, name, form in COLUMNS:
            dtype = np.dtype(form)
            self.columns[name] = np.frombuffer(body, dtype, size[table], at).copy()
            at = align(at + size[table] * dtype.itemsize, 8)
        self.heap = body[at : at + heap]
        at = align(at + heap, 8)
        self.inline = body[at : at + inline]
        self.counts: dict[int, int] = {}
        self.tail = b""

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def set(self, name: str, i: int, value: int | bytes) -> None:
        column = self.columns[name]
        column[i] = np.void(value) if isinstance(value, bytes) else value

    @property
    def names(self) -> list[bytes]:
        sizes = [n for column in ("m_name", "t_name", "i_member", "i_name") for n in self[column].tolist()]
        out, at = [], 0
        for n in sizes:
            out.append(self.heap[at : at + n])
            at += n
        return out

    @names.setter
    def names(self, values: list[bytes]) -> None:
        at = 0
        for column in ("m_name", "t_name", "i_member", "i_name"):
            n = self[column].size
            self.columns[column] = np.array([len(v) for v in values[at : at + n]], "<u4")
            at += n
        assert at == len(values)
        self.heap = b"".join(values)

    def body(self) -> bytes:
        size = {t: self.columns[n].size for t, n, _ in COLUMNS}
        counts = [size[t] for t in TABLES] + [len(self.heap), len(self.inline), self.first_member, self.first_run, 0]
        for i, value in self.counts.items():
            counts[i] = value
        out = struct.pack("<12I", *counts)
        for _, name, _ in COLUMNS:
            raw = self.columns[name].tobytes()
            out += raw + bytes(-len(raw) % 8)
        for raw in (self.heap, self.inline):
            out += raw + bytes(-len(raw) % 8)
        return out + self.tail

    def record(self, kind: bytes) -> bytes:
        body = self.body()
        return seal(kind, struct.pack("<II", len(body), len(body)) + body)


def seal(kind: bytes, rest: bytes, length: int | None = None) -> bytes:
    """Return a record of that kind with the bytes from offset 24 on, its length and its bare check right."""
    total = align(24 + len(rest), 16)
    data = struct.pack("<Q", total if length is None else length) + rest + bytes(total - 24 - len(rest))
    check = sum64(data).to_bytes(8, "little") if kind == CHNK else check8(data)
    return kind + check + data


def reseal(record: bytes) -> bytes:
    """Return the record with its bare check computed anew."""
    data = bytes(record[16:])
    check = sum64(data).to_bytes(8, "little") if record[:8] == CHNK else check8(data)
    return bytes(record[:8]) + check + data


def header(data: bytes, **fields: int) -> bytes:
    """Return the archive header of `data` with fields changed and its check right."""
    places = {"version": (8, "<H"), "chunk_log": (10, "B"), "group_log": (11, "B"), "must": (12, "<I"), "may": (16, "<I")}
    head = bytearray(data[:56])
    for name, value in fields.items():
        at, form = places[name]
        struct.pack_into(form, head, at, value)
    return bytes(head) + check8(bytes(head))


def footer(index_offset: int, index: bytes, length: int | None = None, index_length: int | None = None) -> bytes:
    total = index_offset + len(index) + 80 if length is None else length
    body = (
        struct.pack("<QQQ", index_offset, len(index) if index_length is None else index_length, total)
        + hashlib.sha256(index[16:]).digest()
        + bytes(8)
    )
    return body + check8(body) + FOOTER_MAGIC


class Forged:
    """An archive taken apart. `records` holds [kind, bytes (check bare) or Cat] in file order; `index` is a Cat."""

    def __init__(self, data: bytes) -> None:
        self.header = data[:64]
        index_offset, index_length = struct.unpack_from("<QQ", data, len(data) - 80)
        self.index = Cat(data[index_offset : index_offset + index_length])
        self.records: list[list] = []
        at = 64
        while at < index_offset:
            if not any(data[at : at + 16]):
                at += 16
                continue
            length = int.from_bytes(data[at + 16 : at + 24], "little")
            kind, record = data[at : at + 8], place(data[at : at + length], at)
            self.records.append([kind, Cat(record) if kind == MEMB else record])
            at += length

    def members(self) -> list[Cat]:
        return [r[1] for r in self.records if r[0] == MEMB]

    def chunks(self) -> list[int]:
        """Return where the chunk records stand in `records`."""
        return [i for i, r in enumerate(self.records) if r[0] == CHNK]

    def set_both(self, member: int, column: str, i: int, value: int | bytes) -> None:
        """Set entry i of a column in the member record and in the index (i counts in the member)."""
        cats = self.members()
        cats[member].set(column, i, value)
        before = sum(c[column].size for c in cats[:member])
        self.index.set(column, before + i, value)

    def add_input(self, member: int, run: int, **fields: int | bytes) -> None:
        """Give a run of a member, whose archive has no inputs, one in record and index; fields not named are 0."""
        before = sum(c["r_width"].size for c in self.members()[:member])
        for cat, at in ((self.members()[member], run), (self.index, before + run)):
            cat.set("r_inputs", at, 1)
            for table, name, form in COLUMNS:
                if table == "i":
                    assert not cat[name].size
                    value = fields.get(name, 0)
                    raw = value if isinstance(value, bytes) else value.to_bytes(np.dtype(form).itemsize, "little")
                    cat.columns[name] = np.frombuffer(raw, form).copy()

    def rename(self, member: int, name: bytes) -> None:
        cat = self.members()[member]
        cat.names = [name, *cat.names[1:]]
        names = self.index.names
        names[member] = name
        self.index.names = names

    def build(self, lie: Callable[[Cat], None] | None = None) -> bytes:
        """Return the archive, offsets, lengths and checks right; `lie` may change the index after that."""
        out = bytearray(self.header)
        chunk = member = 0
        for kind, record in self.records:
            raw = record.record(MEMB) if kind == MEMB else record
            start = align(len(out), 128 if kind == CHNK and len(raw) >= 65536 else 16)
            out += bytes(start - len(out)) + place(raw, start)
            if kind == CHNK and chunk < self.index["c_offset"].size:
                self.index.set("c_offset", chunk, start)
                self.index.set("c_length", chunk, len(raw))
                self.index.set("c_check", chunk, int.from_bytes(raw[8:16], "little"))
                chunk += 1
            if kind == MEMB and member < self.index["m_record"].size:
                self.index.set("m_record", member, start)
                self.index.set("m_check", member, int.from_bytes(raw[8:16], "little"))
                member += 1
        if lie is not None:
            lie(self.index)
        at = align(len(out), 16)
        index = place(self.index.record(INDX), at)
        out += bytes(at - len(out)) + index
        return bytes(out) + footer(at, index)


# ---------------------------------------------------------------- inputs

BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}


def safetensors_bytes(
    tensors: Iterable[tuple[str, str, Iterable[int], bytes]],
    metadata: dict[str, str] | None = None,
    indent: int | None = None,
    pad: int = 0,
) -> bytes:
    """Return a safetensors file as it would be written by hand: header order is the order given."""
    entries: dict[str, object] = {}
    if metadata is not None:
        entries["__metadata__"] = metadata
    data, at = [], 0
    for name, dtype, shape, raw in tensors:
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(raw)]}
        data.append(raw)
        at += len(raw)
    head = json.dumps(entries, indent=indent).encode() + b" " * pad
    return len(head).to_bytes(8, "little") + head + b"".join(data)


def weights(n: int, seed: int = 0, dtype: str = "BF16") -> bytes:
    """Return n elements that look like weights."""
    values = np.random.default_rng(seed).normal(0, 0.02, n).astype("<f4")
    if dtype == "BF16":
        return (values.view("<u4") >> 16).astype("<u2").tobytes()
    return values.astype({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).tobytes()


def reader(raw: bytes) -> Callable[[int, int], bytes]:
    """A file as parsers of containers read it, who must stay within it."""

    def read(at: int, n: int) -> bytes:
        assert 0 <= at <= len(raw)
        assert 0 <= n <= 100_000_000
        return raw[at : at + n]

    return read


def noise(n: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(n)


def small_archives(folder: Path) -> dict[str, tuple[bytes, dict[str, bytes], dict[str, bytes]]]:
    """Pack small inputs of all kinds; return name: (archive, bytes of each file member, bytes of each tensor)."""
    import tzip

    out = {}

    def add(name: str, path: Path, level: str, tensors: dict[str, bytes], dereference: bool | None = None) -> None:
        target = folder / f"{name}.tzip"
        tzip.pack(path, target, level=level, threads=1, force=True, dereference=dereference)
        files = {}
        if path.is_dir():
            for at in sorted(path.rglob("*")):
                if at.is_file() and not at.is_symlink():
                    files[f"{path.name}/{at.relative_to(path).as_posix()}"] = at.read_bytes()
        else:
            files[path.name] = path.read_bytes()
        out[name] = (target.read_bytes(), files, tensors)

    def stamp(path: Path) -> None:
        os.utime(path, ns=(10**18, 10**18))

    for level in ("fast", "default", "best"):
        tensors = [
            ("w", "BF16", [40, 8], weights(320, 1)),
            ("norm", "BF16", [8], np.full(8, 0x3F80, "<u2").tobytes()),
            ("f", "F32", [16, 2], weights(32, 2, "F32")),
            ("empty", "F16", [0, 3], b""),
            ("scalar", "I64", [], (7).to_bytes(8, "little")),
        ]
        path = folder / f"{level}.safetensors"
        path.write_bytes(safetensors_bytes(tensors, {"format": "pt"}, pad=3))
        stamp(path)
        add(level, path, level, {name: raw for name, _, _, raw in tensors})
    text = folder / "text.bin"
    text.write_bytes((b"abcdefgh-%d\n" * 700)[:5003] + noise(97, 3))
    stamp(text)
    add("opaque", text, "default", {})
    tree = folder / "tree"
    (tree / "sub" / "empty").mkdir(parents=True, exist_ok=True)
    (tree / "sub" / "a.txt").write_bytes(b"hello")
    (tree / "none").write_bytes(b"")
    (tree / "big").write_bytes(noise(4500, 4))
    if not (tree / "link").is_symlink():
        (tree / "link").symlink_to("sub/a.txt")
    for at in (tree / "sub" / "a.txt", tree / "none", tree / "big", tree / "sub" / "empty", tree / "sub", tree):
        stamp(at)
    os.utime(tree / "link", ns=(10**18, 10**18), follow_symlinks=False)
    add("tree", tree, "default", {})
    big = [("big", "BF16", [9000], weights(9000, 5)), ("i", "I32", [2000], np.arange(2000, dtype="<i4").tobytes())]
    path = folder / "middle.safetensors"
    path.write_bytes(safetensors_bytes(big))
    stamp(path)
    add("middle", path, "default", {name: raw for name, _, _, raw in big})
    return out
