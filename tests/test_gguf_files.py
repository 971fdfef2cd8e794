"""GGUF: what the parser finds equals what the gguf package reads, bit for bit; lying files are refused."""

import random
import struct

import gguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter
from promises import promises

from tzip.formats import gguf_files
from tzip.formats.containers import ContainerError, Contents

RNG = np.random.default_rng(5)
PLAIN = {t: np.dtype(t.name.lower().replace("i", "int").replace("f", "float")) for t in (
    GGMLQuantizationType[n] for n in ("F16", "F32", "F64", "I8", "I16", "I32", "I64")
)}  # fmt: skip


def find(data: bytes) -> Contents | None:
    reads = []

    def read(at, n):
        assert at >= 0
        assert n >= 0
        reads.append(n)
        return data[at : at + n]

    contents = gguf_files.find(read, len(data))
    if contents is None:
        assert len(reads) <= 2
        assert sum(reads) <= 4096
    else:
        promises(contents, len(data))
    return contents


def view_bytes(data: bytes, view) -> bytes:
    assert view.strides is None
    return data[view.begin : view.begin + view.dtype.nbytes(int(np.prod(view.shape)))]


def written(path, tensors, alignment=None, endianess=gguf.GGUFEndian.LITTLE, many=False) -> bytes:
    writer = GGUFWriter(path, "llama", endianess=endianess)
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_uint8("a.u8", 1)
    writer.add_int8("a.i8", -1)
    writer.add_uint16("a.u16", 2)
    writer.add_int16("a.i16", -2)
    writer.add_int32("a.i32", -3)
    writer.add_float32("a.f32", 1.5)
    writer.add_uint64("a.u64", 4)
    writer.add_int64("a.i64", -4)
    writer.add_float64("a.f64", 2.5)
    writer.add_bool("a.bool", True)
    writer.add_string("a.str", "grüße")
    writer.add_array("a.ints", [1, 2, 3])
    writer.add_array("tokenizer.ggml.tokens", [f"token{i}" for i in range(100_000 if many else 3)])
    writer.add_array("a.bools", [True, False])
    for name, array, kind in tensors:
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def random_array(shape, dtype):
    return np.frombuffer(RNG.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)


def same_as_the_package(path, data: bytes) -> Contents:
    contents = find(data)
    assert contents is not None
    reader = GGUFReader(path)
    assert [v.name for v in contents.tensors] == [t.name for t in reader.tensors]
    for view, tensor in zip(contents.tensors, reader.tensors, strict=True):
        assert view_bytes(data, view) == tensor.data.tobytes()
        kind = tensor.tensor_type
        if kind in PLAIN or kind is GGMLQuantizationType.BF16:
            assert view.dtype.name == kind.name
            assert view.shape == tuple(reversed(tensor.shape.tolist()))
        else:
            assert view.dtype.name == "U8"
            assert view.shape == (tensor.n_elements // GGML_QUANT_SIZES[kind][0], GGML_QUANT_SIZES[kind][1])
    return contents


def test_the_table_is_that_of_the_package():
    known = {int(kind): (kind.name, *size) for kind, size in GGML_QUANT_SIZES.items()}
    ours = {k: (name, 1, gguf_files.BY_NAME[name].bits // 8) for k, name in gguf_files.PLAIN.items()} | gguf_files.BLOCKS
    assert {k: ours.get(k) for k in known} == known


@pytest.mark.parametrize("alignment", [None, 8, 64, 4096])
def test_plain_types_of_all_shapes(tmp_path, alignment):
    tensors = [
        (f"{dtype}.{'x'.join(map(str, shape))}", random_array(shape, dtype), None)
        for dtype in PLAIN.values()
        for shape in ((), (1,), (7,), (3, 5), (2, 3, 5), (2, 1, 3, 5), (0,), (0, 4), (4, 0))
    ]
    bf16 = random_array((3, 5), np.dtype(np.uint16)).view(np.uint8)
    tensors.append(("bf16", bf16, GGMLQuantizationType.BF16))
    data = written(tmp_path / "a.gguf", tensors, alignment)
    contents = same_as_the_package(tmp_path / "a.gguf", data)
    rows = {v.begin: r.row for v in contents.tensors for r in contents.regions if r.begin == v.begin and 0 not in v.shape}
    for view in contents.tensors:
        if 0 not in view.shape:
            assert rows[view.begin] == (view.shape[-1] if len(view.shape) > 1 else 0)
    assert not contents.warnings


def test_quantised_types_are_rows_of_blocks(tmp_path):
    tensors, quantised = [], 0
    for kind, (elements, size) in GGML_QUANT_SIZES.items():
        if kind in PLAIN:
            continue
        values = RNG.standard_normal((6, 2 * elements)).astype(np.float32)
        try:
            packed = gguf.quants.quantize(values, kind)
            quantised += 1
        except NotImplementedError:
            packed = random_array((6, 2 * size), np.dtype(np.uint8))
        tensors.append((kind.name, packed, kind))
    assert quantised >= 8
    data = written(tmp_path / "q.gguf", tensors)
    contents = same_as_the_package(tmp_path / "q.gguf", data)
    assert len(contents.regions) == len(tensors)
    for region, (name, _, kind) in zip(contents.regions, tensors, strict=True):
        if name != "BF16":
            assert (region.dtype.name, region.row) == ("U8", GGML_QUANT_SIZES[kind][1])


def test_many_tensors_and_a_vocabulary(tmp_path):
    tensors = [(f"blk.{i}.w", random_array((2, 3), np.dtype(np.float16)), None) for i in range(3000)]
    data = written(tmp_path / "m.gguf", tensors, many=True)
    assert len(same_as_the_package(tmp_path / "m.gguf", data).regions) == 3000


def test_no_tensors(tmp_path):
    data = written(tmp_path / "n.gguf", [])
    contents = find(data)
    assert contents == Contents("gguf")


def test_only_the_header_is_read(tmp_path):
    data = written(tmp_path / "b.gguf", [("w", np.zeros((1000, 1000), np.float32), None)])
    reads = []

    def read(at, n):
        reads.append((at, n))
        return data[at : at + n]

    assert gguf_files.find(read, len(data))
    assert max(at + n for at, n in reads) <= 1 << 16


def test_version_2_reads_alike(tmp_path):
    data = bytearray(written(tmp_path / "v.gguf", [("w", random_array((3, 5), np.dtype(np.float32)), None)]))
    data[4] = 2
    (tmp_path / "v.gguf").write_bytes(data)
    same_as_the_package(tmp_path / "v.gguf", bytes(data))


def test_big_endian_and_other_versions_stay_bytes_with_a_warning(tmp_path):
    swapped = written(tmp_path / "s.gguf", [("w", np.ones(4, np.float32), None)], endianess=gguf.GGUFEndian.BIG)
    contents = find(swapped)
    assert contents is not None
    assert (contents.regions, contents.tensors) == ([], [])
    assert "big-endian" in contents.warnings[0]
    for version in (1, 4):
        contents = find(b"GGUF" + struct.pack("<I", version) + bytes(100))
        assert contents is not None
        assert f"version {version}" in contents.warnings[0]
        assert not contents.regions


def test_other_files_are_none():
    prose = b"GGUF is a format of files, and this is a text on it"
    for data in (b"", b"GGUF", b"GGUF\3\0\0", prose, bytes(100), b"GGML" + bytes(99)):
        assert find(data) is None


# Files that no writer makes.


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def info(name=b"w", dims=(4,), kind=0, offset=0) -> bytes:
    return text(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, offset)


def forged(infos=(), metadata=(), tensors=None, values=None, data=bytes(64)) -> bytes:
    counts = len(infos) if tensors is None else tensors, len(metadata) if values is None else values
    head = b"GGUF" + struct.pack("<IQQ", 3, *counts)
    head += b"".join(metadata) + b"".join(infos)
    return head + bytes(-len(head) % 32) + data


def value(kind: int, raw: bytes, key: bytes = b"k") -> bytes:
    return text(key) + struct.pack("<I", kind) + raw


def array(kind: int, count: int, raw: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + raw


def nested(depth: int, width: int = 2) -> bytes:
    """Arrays in arrays, the last element of each the deeper one."""
    raw = array(0, 1, b"x")
    for _ in range(depth):
        raw = array(9, width, array(0, 0) * 0 + raw + array(4, 0) * (width - 1))
    return raw


def test_forged_file_is_read_when_nothing_is_wrong():
    contents = find(forged([info(), info(b"v", (2, 8), 1, 32)]))
    assert contents is not None
    assert [(v.name, v.shape) for v in contents.tensors] == [("w", (4,)), ("v", (8, 2))]
    assert [(r.end - r.begin, r.row) for r in contents.regions] == [(16, 0), (32, 2)]


def test_arrays_in_arrays():
    for depth in (1, 5, 60):
        contents = find(forged([info()], [value(9, nested(depth)), value(4, struct.pack("<I", 16), b"general.alignment")]))
        assert contents is not None
        assert len(contents.regions) == 1
    for depth in (100, 5000):
        with pytest.raises(ContainerError, match="deeper"):
            find(forged([info()], [value(9, nested(depth))]))


def test_names_that_occur_twice_get_numbers():
    names = [b"a", b"a#2", b"a", b"a", b"b", b"\xff"]
    contents = find(forged([info(n, (1,), 24, 32 * i) for i, n in enumerate(names)], data=bytes(200)))
    assert contents is not None
    assert [v.name for v in contents.tensors] == ["a", "a#2", "a#3", "a#4", "b", "\ufffd"]


def test_unknown_types_stay_bytes_with_one_warning():
    contents = find(forged([info(), info(b"x", (4,), 31, 32), info(b"y", (4,), 31, 32)]))
    assert contents is not None
    assert len(contents.regions) == 1
    assert contents.warnings == ["2 tensors of unknown type 31: kept as bytes"]


HUGE = (1 << 63, (1 << 64) - 1, 1 << 62, 1 << 40)
LIES = {
    "dims": [forged([info(dims=(n,))]) for n in HUGE],
    "products": [forged([info(dims=dims)]) for dims in ((1 << 32, 1 << 32), (1 << 63, 0), (1 << 62, 4, 0, 1))],
    "five dims": [forged([info(dims=(1,) * 5)]), forged([text(b"w") + struct.pack("<I", 2**32 - 1)])],
    "offset": [forged([info(offset=n)]) for n in (*HUGE, 1, 31, 64, 96)],
    "past the end": [forged([info(dims=(17,))]), forged([info(dims=(1,), kind=1, offset=64)]),
                     forged([info(dims=(0,), offset=96)]), forged([info(dims=(4,), kind=31, offset=96)])],
    "overlap": [forged([info(), info(b"v")]), forged([info(dims=(9,)), info(b"v", (1,), 0, 32)])],
    "blocks": [forged([info(dims=(31,), kind=8)]), forged([info(dims=(), kind=8)]), forged([info(dims=(16, 2), kind=2)])],
    "counts": [forged([info()], tensors=n) for n in (2, *HUGE)] + [forged([info()], values=n) for n in HUGE],
    "strings": [forged([info()], [struct.pack("<Q", n)]) for n in HUGE] + [forged([struct.pack("<Q", n)]) for n in HUGE],
    "arrays": [forged([info()], [value(9, array(k, n))]) for n in HUGE for k in (0, 7, 8, 9, 12)],
    "value types": [forged([info()], [value(13, b"")]), forged([info()], [value(9, array(99, 0))])],
    "alignment": [
        forged([info()], [value(4, struct.pack("<I", n), b"general.alignment")]) for n in (0, 3, 48, 2**31, 2**32 - 1)
    ] + [forged([info()], [value(8, text(b"32"), b"general.alignment")]),
         forged([info()], [value(4, struct.pack("<I", 32), b"general.alignment")] * 2)],
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused(lie):
    for data in LIES[lie]:
        with pytest.raises(ContainerError):
            find(data)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    tensors = [
        ("a", random_array((3, 5), np.dtype(np.float32)), None),
        ("q", random_array((2, 34), np.dtype(np.uint8)), GGMLQuantizationType.Q8_0),
        ("h", random_array((7,), np.dtype(np.float16)), None),
    ]
    return written(tmp_path_factory.mktemp("gguf") / "s.gguf", tensors)


def test_truncated_at_every_byte(small):
    outcomes = {}
    for n in range(len(small)):
        try:
            found = find(small[:n])
            assert found is None or n >= len(small) - 32, n  # padding after the last tensor may be missing
        except ContainerError as e:
            outcomes[str(e)] = n
        else:
            assert n < 8 or found
    assert any("ends within its header" in reason for reason in outcomes)


def test_flipped_bytes(small):
    rng = random.Random(1)
    outcomes = {"refused": 0, "read": 0}
    for _ in range(4000):
        data = bytearray(small)
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            data[rng.randrange(len(data))] = rng.choice((rng.randrange(256), 0, 255, 128))
        try:
            find(bytes(data))
            outcomes["read"] += 1
        except ContainerError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 100


def test_headers_without_end_are_read_in_bounded_time(monkeypatch):
    monkeypatch.setattr(gguf_files, "MAX_HEADER", 1_000_000)
    for element in (text(b""), array(4, 0)):
        kind = 8 if len(element) == 8 else 9
        count = 2_000_000 // len(element)
        with pytest.raises(ContainerError, match="more than"):
            find(forged([info()], [value(9, array(kind, count, element * count))]))
    monkeypatch.setattr(gguf_files, "MAX_COUNT", 1000)
    with pytest.raises(ContainerError, match="more than"):
        find(forged([info()], [value(9, array(9, 2000, array(4, 0) * 2000))]))
    with pytest.raises(ContainerError, match="more than"):
        find(forged([info(dims=(0,))] * 2000))
