"""ONNX: what the walker finds in the file equals what the onnx package reads, bit for bit; lying files are refused."""

import random
from math import prod

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from promises import promises

from tzip.formats import onnx_files
from tzip.formats.containers import ContainerError, Contents
from tzip.formats.dtypes import BY_NAME

RNG = np.random.default_rng(7)
FLOAT_INPUT = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])]


def reader(data: bytes):
    def read(at, n):
        assert at >= 0
        assert n >= 0
        return data[at : at + n]

    return read


def find(data: bytes) -> Contents | None:
    contents = onnx_files.find(reader(data), len(data))
    if contents is not None:
        promises(contents, len(data))
    return contents


def raw_tensor(name, kind, shape, raw) -> TensorProto:
    return TensorProto(name=name, data_type=kind, dims=shape, raw_data=raw)


def bits_of(kind: int) -> int:
    return onnx_files.PACKED.get(kind) or BY_NAME[onnx_files.DTYPES[kind]].bits


def random_tensor(name, kind, shape) -> TensorProto:
    return raw_tensor(name, kind, shape, RNG.bytes(-(-prod(shape) * bits_of(kind) // 8)))


def model(initializers, nodes=(), **more) -> onnx.ModelProto:
    graph = helper.make_graph(list(nodes), "g", FLOAT_INPUT, [], initializers, doc_string="a graph")
    return helper.make_model(graph, producer_name="tests", **more)


def view_bytes(data, view) -> bytes:
    assert view.strides is None
    return data[view.begin : view.begin + view.dtype.nbytes(prod(view.shape))]


def matches(data: bytes, contents: Contents, tensors) -> None:
    """The tensors found are these, in this order, with the bytes that the package reads."""
    assert len(contents.tensors) == len(tensors)
    for view, tensor in zip(contents.tensors, tensors, strict=True):
        raw = view_bytes(data, view)
        assert raw == tensor.raw_data
        if view.dtype.name != "U8" or tensor.data_type == TensorProto.UINT8:
            assert view.shape == tuple(tensor.dims)
            assert view.dtype.name == onnx_files.DTYPES[tensor.data_type]
            numpy = view.dtype.numpy()
            if numpy is not None and view.dtype.bits >= 8:
                array = numpy_helper.to_array(tensor)
                assert array.dtype == numpy
                assert array.tobytes() == raw


def test_every_type_of_the_package_is_known_or_left_out_on_purpose():
    left_out = {TensorProto.UNDEFINED, TensorProto.STRING}
    assert set(TensorProto.DataType.values()) <= set(onnx_files.DTYPES) | set(onnx_files.PACKED) | left_out
    names = {v: k for k, v in TensorProto.DataType.items()}
    for kind, name in onnx_files.DTYPES.items():
        numpy = BY_NAME[name].numpy()
        if numpy is not None and kind in names:
            assert numpy == helper.tensor_dtype_to_np_dtype(kind), name


@pytest.mark.parametrize("kind", sorted(onnx_files.DTYPES | onnx_files.PACKED))
def test_every_type_and_shape(tmp_path, kind):
    if kind not in TensorProto.DataType.values():
        pytest.skip("this onnx package is older than the type")
    shapes = ((), (1,), (7,), (8,), (3, 5), (4, 6), (2, 1, 3, 4), (0,), (0, 4), (4, 0))
    tensors = [random_tensor(f"{kind}.{'x'.join(map(str, shape))}", kind, shape) for shape in shapes]
    onnx.save(model(tensors), tmp_path / "m.onnx")
    data = (tmp_path / "m.onnx").read_bytes()
    contents = find(data)
    matches(data, contents, onnx.load(tmp_path / "m.onnx").graph.initializer)
    rows = {r.begin: r.row for r in contents.regions}
    for view in contents.tensors:
        if prod(view.shape):
            assert rows[view.begin] == (view.shape[-1] if len(view.shape) > 1 else 0)


def test_float4_has_the_nibbles_in_the_order_of_ours():
    values = np.arange(8, dtype=np.uint8)
    packed = numpy_helper.from_array(values.view(BY_NAME["F4"].numpy()), "w")
    data = model([packed]).SerializeToString()
    (view,) = find(data).tensors
    assert view.dtype.name == "F4"
    raw = np.frombuffer(view_bytes(data, view), np.uint8)
    assert np.stack([raw & 15, raw >> 4], 1).ravel().tolist() == values.tolist()  # as archiver/memory.py packs them


def test_odd_counts_of_small_elements_are_bytes():
    data = model([random_tensor("w", TensorProto.FLOAT4E2M1, (3, 3))]).SerializeToString()
    (view,) = find(data).tensors
    assert (view.dtype.name, view.shape) == ("U8", (5,))


def test_packed_floats_and_doubles_are_elements_and_varints_are_not():
    def made(name, kind, values):
        return helper.make_tensor(name, kind, [2, 3], values)

    floats = RNG.standard_normal(6).tolist()
    tensors = [
        made("f", TensorProto.FLOAT, floats),
        made("d", TensorProto.DOUBLE, floats),
        made("c", TensorProto.COMPLEX64, [complex(x, 1) for x in floats]),
        made("cc", TensorProto.COMPLEX128, [complex(x, 1) for x in floats]),
        made("i", TensorProto.INT32, range(6)),
        made("l", TensorProto.INT64, range(6)),
        made("u", TensorProto.UINT64, range(6)),
        made("h", TensorProto.FLOAT16, floats),
        helper.make_tensor("s", TensorProto.STRING, [1], [b"text"]),
    ]
    data = model(tensors).SerializeToString()
    contents = find(data)
    assert [v.name for v in contents.tensors] == ["f", "d", "c", "cc"]
    for view, tensor in zip(contents.tensors, tensors, strict=False):
        assert view.shape == (2, 3)
        assert view_bytes(data, view) == numpy_helper.to_array(tensor).tobytes()


def constant(name, output, tensor):
    return helper.make_node("Constant", [], [output], name=name, value=tensor)


def test_constants_subgraphs_functions_sparse_and_training():
    def inner(label, depth):
        nodes = [constant(f"{label}/c", "o", random_tensor("", TensorProto.FLOAT16, (depth + 1, 3)))]
        if depth:
            nodes.append(helper.make_node("If", ["c"], ["z"], name=f"{label}/if", then_branch=inner(label + "/t", depth - 1)))
        return helper.make_graph(nodes, "then", [], [], [random_tensor("same", TensorProto.FLOAT, (5, depth + 1))])

    sparse = onnx.SparseTensorProto(dims=[100])
    sparse.values.CopyFrom(random_tensor("sparse", TensorProto.FLOAT, (3,)))
    sparse.indices.CopyFrom(random_tensor("", TensorProto.INT64, (3,)))
    node = constant("", "named by its output", random_tensor("", TensorProto.INT8, (4,)))
    listed = helper.make_node("Many", [], ["m"], name="many", ts=[random_tensor("", TensorProto.INT8, (n,)) for n in (1, 2)])
    branches = {"then_branch": inner("if", 3), "else_branch": inner("else", 0)}
    nodes = [node, listed, helper.make_node("If", ["c"], ["y"], name="if", **branches)]
    made = model([random_tensor("same", TensorProto.FLOAT, (2,))], nodes)
    made.graph.sparse_initializer.append(sparse)
    body = [constant("fc", "o", random_tensor("", TensorProto.FLOAT, (2, 2)))]
    made.functions.append(helper.make_function("d", "f", [], ["o"], body, []))
    made.training_info.add().algorithm.initializer.append(random_tensor("t", TensorProto.FLOAT, (2,)))
    data = made.SerializeToString()
    contents = find(data)
    for view in contents.tensors:
        if view.name == "same":
            assert view_bytes(data, view) in [t.raw_data for t in made.graph.initializer] + [
                t.raw_data for a in nodes[2].attribute for t in a.g.initializer
            ]
    names = [v.name for v in contents.tensors]
    assert {"named by its output.value", "many.ts", "many.ts#2", "if/c.value", "if/t/t/t/c.value", "fc.value"} <= set(names)
    assert {"same", "same#2", "same#6", "sparse", "t"} <= set(names)
    assert len(names) == 3 + 2 * 5 + 1 + 2 + 1 + 1
    assert sorted(len(view_bytes(data, v)) for v in contents.tensors) == sorted(len(t) for t in raws(made))
    assert sorted(view_bytes(data, v) for v in contents.tensors) == sorted(raws(made))


def raws(message) -> list[bytes]:
    """The raw data of all tensors in a message, by the package's own reflection."""
    if isinstance(message, TensorProto):
        return [message.raw_data]
    found = []
    for field, value in message.ListFields():
        if field.message_type is not None:
            for item in value if not hasattr(value, "ListFields") else [value]:
                found += raws(item)
    return found


def test_many_tensors(tmp_path):
    tensors = [random_tensor(f"layer.{i}", TensorProto.FLOAT16, (2, 3)) for i in range(3000)]
    nodes = [helper.make_node("Add", [f"a{i}", "b"], ["c"], name=f"n{i}", axis=i, w=[1.0, 2.0]) for i in range(3000)]
    onnx.save(model(tensors, nodes), tmp_path / "m.onnx")
    data = (tmp_path / "m.onnx").read_bytes()
    matches(data, find(data), tensors)


def test_large_tensors_are_not_read():
    data = model([random_tensor(f"w{i}", TensorProto.FLOAT, (100, 1000)) for i in range(5)]).SerializeToString()
    amounts = []

    def read(at, n):
        amounts.append(n)
        return data[at : at + n]

    assert len(onnx_files.find(read, len(data)).tensors) == 5
    assert sum(amounts) < 10_000


def test_external_data(tmp_path):
    kinds = (TensorProto.FLOAT, TensorProto.BFLOAT16, TensorProto.INT4, TensorProto.FLOAT8E4M3FN)
    tensors = [random_tensor(f"w{k}", k, (40, 50)) for k in kinds] + [random_tensor("small", TensorProto.FLOAT, (2,))]
    wanted = {t.name: t.raw_data for t in tensors}
    onnx.save(model(tensors), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=100)
    data, beside = ((tmp_path / name).read_bytes() for name in ("m.onnx", "m.data"))
    contents = find(data)
    assert [v.name for v in contents.tensors] == ["small"]
    assert contents.warnings == []
    found = onnx_files.external(reader(data), len(data))
    assert [t.name for t in found] == [f"w{k}" for k in kinds]
    for location, offset, length, name, dtype, shape in found:
        assert location == "m.data"
        assert beside[offset : offset + length] == wanted[name]
        assert dtype.nbytes(prod(shape)) == length
    assert [t.dtype.name for t in found] == ["F32", "BF16", "U8", "F8_E4M3"]


def test_external_data_that_make_no_sense_are_left_out():
    def away(**pairs):
        tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
        for key, value in pairs.items():
            tensor.external_data.add(key=key, value=value)
        return tensor

    good = [away(location="f"), away(location="f", offset="7"), away(location="../f", offset="0", length="8")]
    bad = [
        away(), away(location="f", length="9"), away(location="f", offset="-1"), away(location="f", offset="1" * 5000),
        away(location="f", offset="٣"), away(location="f", length="x"), away(location="f", offset="1 1"),
    ]  # fmt: skip
    data = model(good + bad).SerializeToString()
    found = onnx_files.external(reader(data), len(data))
    assert [(t.location, t.offset, t.length) for t in found] == [("f", 0, 8), ("f", 7, 8), ("../f", 0, 8)]
    assert onnx_files.external(reader(b"no model"), 8) == []


# Files that no writer makes.


def varint(n: int) -> bytes:
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def message(number: int, raw: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(raw)) + raw


def number(field: int, n: int) -> bytes:
    return varint(field << 3) + varint(n)


def forged(graph: bytes) -> bytes:
    return number(1, 8) + message(7, graph)


def tensor(*dims, kind=1, raw=bytes(8), more=b"") -> bytes:
    return message(5, b"".join(number(1, d) for d in dims) + number(2, kind) + message(8, b"w") + message(9, raw) + more)


def test_forged_file_is_read_when_nothing_is_wrong():
    packed = message(1, varint(2) + varint(1))
    unknown = number(900, 1) + varint(901 << 3 | 5) + bytes(4)
    data = forged(message(5, packed + number(2, 1) + message(9, bytes(8))) + tensor(2) + unknown)
    contents = find(data)
    assert [(v.name, v.shape) for v in contents.tensors] == [("", (2, 1)), ("w", (2,))]


def test_other_files_are_none_after_two_small_reads(tmp_path):
    files = {
        "empty": b"", "zeros": bytes(5000), "text": b"\x08\x09 is how a tab begins, more or less" * 200,
        "no graph": number(1, 8) + message(2, b"x"), "unknown field": forged(b"") + number(99, 1),
        "twice": forged(b"") + forged(b""), "graph is a number": number(1, 8) + number(7, 1),
        "no version": message(7, tensor(2)), "version 0": number(1, 0) + message(7, b""),
        "large version": number(1, 128) + message(7, b""), "truncated": forged(tensor(2))[:-1],
        "group": forged(b"") + bytes([0x0B]), "field 0": forged(b"") + bytes([0, 0]),
        # another protobuf: a SavedModel of TensorFlow begins with a version and a message
        "SavedModel": number(1, 1) + message(2, message(1, b"serve") + bytes(3000)),
    }  # fmt: skip
    rng = random.Random(3)
    files |= {f"random {i}": b"\x08" + bytes([rng.randrange(1, 128)]) + rng.randbytes(3000) for i in range(500)}
    for name, data in files.items():
        reads = []

        def read(at, n, data=data, reads=reads):
            reads.append(n)
            return data[at : at + n]

        assert onnx_files.find(read, len(data)) is None, name
        assert sum(reads) < 2000, name


def test_a_place_outside_counts_only_when_the_tensor_is_said_to_be_there():
    pair = message(13, message(1, b"location") + message(2, b"f"))
    assert len(find(forged(tensor(2, more=pair))).regions) == 1
    assert not find(forged(tensor(2, more=pair + number(14, 1)))).regions


def nested(depth: int) -> bytes:
    graph = tensor(2)
    for _ in range(depth):
        graph = message(1, message(5, message(6, graph)))
    return forged(graph)


def test_graphs_within_graphs():
    assert len(find(nested(30)).tensors) == 1
    for depth in (40, 500):
        with pytest.raises(ContainerError, match="within each other"):
            find(nested(depth))


def test_tensors_whose_elements_are_not_plain_are_left_out():
    unpacked = number(1, 2) + number(2, 1) + (varint(4 << 3 | 5) + bytes(4)) * 2
    for body in (
        tensor(2, more=message(9, bytes(8))), tensor(2, more=message(4, bytes(8))), message(5, unpacked),
        tensor(2, more=message(3, number(1, 0))), tensor(2, kind=99), tensor(2, kind=8), tensor(1 << 63), tensor(1 << 62, 4, 0),
        message(5, number(1, 2) + number(2, 1)),
    ):  # fmt: skip
        contents = find(forged(body + tensor(2)))
        assert len(contents.regions) == 1, body


def test_lies_are_refused():
    for graph in (
        tensor(3), tensor(2, raw=bytes(7)), tensor(), tensor(0), tensor(1 << 62), tensor(1 << 31, 1 << 31),
        tensor(*[1] * 65, raw=bytes(4)), message(5, message(1, bytes([1]) * 500) + number(2, 1) + message(9, bytes(8))),
        message(5, number(1, 1) + number(2, 6) + message(4, bytes(4))),  # floats that are called integers
        b"\x2a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x2a" + b"\xff" * 11,
        b"\x28" + b"\xff" * 10 + b"\x01", b"\x2a\x05ab", b"\x0b", b"\x00\x01", b"\x0d\x00",
        message(5, b"\x4a\x7f"), message(1, message(5, message(5, b"\x4a\x01"))), message(1, b"\x80"),
    ):  # fmt: skip
        with pytest.raises(ContainerError):
            find(forged(graph))


def test_work_is_bounded(monkeypatch):
    flood = forged(tensor(0, raw=b"") * 5000)
    assert len(find(flood).tensors) == 5000
    for limit, value in (("MAX_TENSORS", 4999), ("MAX_FIELDS", 9000), ("MAX_METADATA", 20_000)):
        with monkeypatch.context() as patch:
            patch.setattr(onnx_files, limit, value)
            with pytest.raises(ContainerError, match=r"more than|too many"):
                find(flood)
    name, attribute = message(3, b"n" * 1000), message(1, b"a")
    empty = message(10, number(1, 0) + number(2, 1))
    for node in (name + message(5, attribute) * 200, name + message(5, attribute + empty * 200)):
        with monkeypatch.context() as patch:  # names of a thousand bytes, made two hundred times of few
            patch.setattr(onnx_files, "MAX_METADATA", 100_000)
            with pytest.raises(ContainerError, match="more than"):
                find(forged(message(1, node)))


@pytest.fixture(scope="module")
def small() -> bytes:
    nodes = [constant("c", "o", random_tensor("", TensorProto.FLOAT16, (2, 3)))]
    branch = model([random_tensor("t", TensorProto.INT8, (3,))], nodes).graph
    nodes.append(helper.make_node("If", ["c"], ["y"], then_branch=branch))
    external = TensorProto(name="e", data_type=1, dims=[2], data_location=TensorProto.EXTERNAL)
    external.external_data.add(key="location", value="f")
    return model([random_tensor("w", TensorProto.FLOAT, (3, 5)), external], nodes).SerializeToString()


def test_truncated_at_every_byte(small):
    whole = find(small)
    assert len(whole.tensors) == 4
    for n in range(len(small)):
        found = find(small[:n])
        assert found is None or found.regions == whole.regions


def test_flipped_bytes(small):
    rng = random.Random(1)
    outcomes = {"refused": 0, "read": 0, "other": 0}
    for _ in range(4000):
        data = bytearray(small)
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            data[rng.randrange(len(data))] = rng.choice((rng.randrange(256), 0, 255, 128))
        try:
            outcomes["read" if find(bytes(data)) else "other"] += 1
            onnx_files.external(reader(bytes(data)), len(data))
        except ContainerError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 100
