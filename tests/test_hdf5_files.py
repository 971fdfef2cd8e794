"""HDF5: what is found equals what h5py reads, bit for bit; damaged files are refused and leave the process whole."""

import contextlib
import random
import struct
import sys
from math import prod

import h5py
import numpy as np
import pytest
from promises import promises

from tzip.formats import hdf5_files, hdf5_plain
from tzip.formats.containers import ContainerError, Contents, Unique

RNG = np.random.default_rng(9)
TYPES = ("?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "c8", "c16")
LIBVERS = ("earliest", "latest")


def reader(data: bytes):
    def read(at, n):
        assert at >= 0
        assert n >= 0
        return data[at : at + n]

    return read


def find(data: bytes) -> Contents | None:
    contents = hdf5_files.find(reader(data), len(data))
    if contents is not None:
        promises(contents, len(data))
    return contents


def span(view) -> int:
    """Elements from the first to the last, both counted."""
    if 0 in view.shape or view.strides is None:
        return prod(view.shape)
    return 1 + sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=True))


def as_array(data: bytes, view):
    dtype = view.dtype.numpy()
    flat = np.frombuffer(data, dtype, span(view), view.begin)
    if view.strides is None:
        return flat.reshape(view.shape)
    return np.lib.stride_tricks.as_strided(flat, view.shape, [s * dtype.itemsize for s in view.strides], writeable=False)


def written(path, fill, **options) -> bytes:
    with h5py.File(path, "w", **options) as file:
        fill(file)
    return path.read_bytes()


def matches(path, data: bytes, names: set[str]) -> Contents:
    """Exactly these datasets are tensors, their bytes are what h5py reads, and what we find ourselves it finds as well."""
    contents = find(data)
    assert contents is not None
    assert contents == hdf5_files.inspect(reader(data), data.index(hdf5_files.SIGNATURE), len(data))
    assert {v.name for v in contents.tensors} == names
    with h5py.File(path, "r") as file:
        for view in contents.tensors:
            wanted, got = file[view.name][()], as_array(data, view)
            assert got.shape == wanted.shape
            assert got.dtype == wanted.dtype
            assert got.tobytes() == wanted.tobytes(), view.name
    return contents


def is_plain(data: bytes) -> bool:
    return hdf5_plain.plain(reader(data), data.index(hdf5_files.SIGNATURE), len(data)) is not None


@pytest.fixture
def library_only(monkeypatch):
    """No file is read by ourselves."""
    monkeypatch.setattr(hdf5_files, "plain", lambda *_: None)


def random_array(shape, dtype):
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        return RNG.integers(0, 2, shape).astype(bool)
    return np.frombuffer(RNG.bytes(prod(shape) * dtype.itemsize), dtype).reshape(shape)


def keras_weights(file):
    """A weights file as Keras 2 writes it with h5py: groups a layer, their names in attributes; and Keras 3's shape of it."""
    root = file.create_group("model_weights")
    root.attrs["layer_names"] = np.array([b"dense", b"conv", b"flatten"])
    root.attrs["backend"] = "tensorflow"
    layers = {"dense": {"kernel:0": (30, 50), "bias:0": (50,)}, "conv": {"kernel:0": (3, 3, 4, 8)}, "flatten": {}}
    for layer, shapes in layers.items():
        group = root.create_group(layer)
        group.attrs["weight_names"] = np.array([f"{layer}/{n}".encode() for n in shapes])
        for name, shape in shapes.items():
            group.create_dataset(f"{layer}/{name}", shape, "f4")[:] = random_array(shape, "f4")
    file["optimizer_weights/iteration:0"] = np.int64(7)
    file["layers/dense/vars/0"] = random_array((4, 6), "f4")


@pytest.mark.parametrize("libver", LIBVERS)
def test_weights_of_keras(tmp_path, libver):
    data = written(tmp_path / "k.h5", keras_weights, libver=libver)
    root = "model_weights"
    names = {f"{root}/dense/dense/kernel:0", f"{root}/dense/dense/bias:0", f"{root}/conv/conv/kernel:0"}
    contents = matches(tmp_path / "k.h5", data, names | {"optimizer_weights/iteration:0", "layers/dense/vars/0"})
    rows = {r.begin: r.row for r in contents.regions}
    assert [rows[v.begin] for v in contents.tensors] == [v.shape[-1] if len(v.shape) > 1 else 0 for v in contents.tensors]
    assert is_plain(data) == (libver == "earliest")


@pytest.mark.parametrize("libver", LIBVERS)
@pytest.mark.parametrize("user_block", [0, 512, 1024, 2048])
def test_every_type_shape_and_user_block(tmp_path, libver, user_block):
    names = set()

    def fill(file):
        for dtype in TYPES:
            for shape in ((), (1,), (7,), (3, 5), (2, 1, 3, 4)):
                name = f"{dtype.replace('?', 'bool')}/{len(shape)}d{shape[:1]}"
                file[name] = random_array(shape, dtype)
                names.add(name)
            for i, shape in enumerate(((0,), (0, 4), (4, 0))):
                file[f"empty/{dtype}{i}"] = np.zeros(shape, dtype)
                names.add(f"empty/{dtype}{i}")
        file["chunked"] = file.create_dataset("rows", data=random_array((5, 4), "f4"), chunks=(2, 4))
        file.create_dataset("never written", (5, 5), "f4")
        file.create_dataset("never written, chunked", (5, 5), "f4", chunks=(2, 5))

    data = written(tmp_path / "a.h5", fill, libver=libver, userblock_size=user_block)
    contents = matches(tmp_path / "a.h5", data, names | {"chunked"})
    assert {v.dtype.name for v in contents.tensors} == {
        "BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F16", "F32", "F64", "C64", "C128",
    }  # fmt: skip
    assert not contents.warnings
    assert is_plain(data) == (libver == "earliest")


@pytest.mark.parametrize("libver", LIBVERS)
@pytest.mark.parametrize(
    ("shape", "chunk", "is_tensor"),
    [
        ((6, 4), (6, 4), True), ((6, 4), (2, 4), True), ((5, 4), (2, 4), True), ((5, 4), (2, 3), False), ((7,), (3,), True),
        ((5, 4, 3), (1, 4, 3), True), ((5, 4, 3), (2, 2, 3), False), ((3, 4), (5, 6), True), ((5, 4), (2, 6), True),
        ((4, 6), (4, 3), False), ((2, 3), (1, 1), False), ((3, 1), (1, 1), True), ((4, 3, 2), (9, 9, 9), True),
    ],
)  # fmt: skip
def test_chunks(tmp_path, libver, shape, chunk, is_tensor):
    def fill(file):
        space = [None] * len(shape)
        file.create_dataset("c", data=random_array(shape, "f4"), chunks=chunk, maxshape=space)

    data = written(tmp_path / "c.h5", fill, libver=libver)
    contents = matches(tmp_path / "c.h5", data, {"c"} if is_tensor else set())
    with h5py.File(tmp_path / "c.h5") as file:
        dataset, inside = file["c"].id, {(r.begin, r.end) for r in contents.regions}
        total = 0
        for i in range(dataset.get_num_chunks()):
            info = dataset.get_chunk_info(i)
            total += info.size
            assert any(begin <= info.byte_offset and info.byte_offset + info.size <= end for begin, end in inside)
            assert dataset.read_direct_chunk(info.chunk_offset)[1] == data[info.byte_offset : info.byte_offset + info.size]
        assert sum(end - begin for begin, end in inside) == total
    assert {(r.dtype.name, r.row) for r in contents.regions} == {("F32", chunk[-1] if len(chunk) > 1 else 0)}
    assert is_plain(data) == (libver == "earliest")


@pytest.mark.parametrize("libver", LIBVERS)
def test_chunks_out_of_order_or_missing_are_regions_only(tmp_path, libver):
    def fill(file):
        backwards = file.create_dataset("backwards", (6, 4), "f4", chunks=(2, 4))
        hole = file.create_dataset("hole", (6, 4), "f4", chunks=(2, 4))
        apart = file.create_dataset("apart", (6, 4), "f4", chunks=(2, 4))
        tail = file.create_dataset("tail", (6, 4), "f4", chunks=(2, 4))
        for i in (4, 2, 0):
            backwards[i : i + 2] = i
            file.flush()
        hole[0:2] = hole[4:6] = 1
        for i in (0, 2, 4):
            apart[i : i + 2] = i
            file.flush()
            file[f"between{i}"] = np.zeros(3, "f4")
            file.flush()
        tail[0:4] = 1

    data = written(tmp_path / "o.h5", fill, libver=libver)
    contents = matches(tmp_path / "o.h5", data, {"between0", "between2", "between4"})
    assert sum(r.end - r.begin for r in contents.regions if r.row == 4) == 32 * (3 + 2 + 3 + 2)
    assert is_plain(data) == (libver == "earliest")


def odd_types(file):
    for name, source in (("bf16", (15, 7, 8, 0, 7)), ("f16 as f32", None)):
        kind = h5py.h5t.IEEE_F32LE.copy()
        if source:
            kind.set_fields(*source)
            kind.set_size(2)
            kind.set_ebias(127)
        else:
            kind.set_ebias(100)
        h5py.h5d.create(file.id, name.encode(), kind, h5py.h5s.create_simple((4,))).write(
            h5py.h5s.ALL, h5py.h5s.ALL, np.ones(4, "f4")
        )
    narrow = h5py.h5t.STD_I16LE.copy()
    narrow.set_precision(12)
    h5py.h5d.create(file.id, b"i12", narrow, h5py.h5s.create_simple((4,))).write(h5py.h5s.ALL, h5py.h5s.ALL, np.ones(4, "i2"))
    file["pair"] = np.zeros(3, [("a", "f4"), ("b", "f4")])
    file["record"] = np.zeros(3, [("a", "f4"), ("b", "i8"), ("c", "S3")])
    file["text"] = "text"
    file["texts"] = np.array([b"a", b"bc"])
    file["opaque"] = np.zeros(3, "V2")
    file.create_dataset("vlen", (2,), h5py.vlen_dtype("f4"))[0] = [1, 2]
    file.create_dataset("references", (1,), h5py.ref_dtype)[0] = file["text"].ref
    file.create_dataset("arrays", (2,), np.dtype(("f4", (3,))))[0] = [1, 2, 3]


def odd_storage(file, folder, virtual=True):
    ones = np.ones((20, 30), "f4")
    file.create_dataset("gzip", data=ones, chunks=(5, 30), compression="gzip")
    file.create_dataset("lzf", data=ones, chunks=(5, 30), compression="lzf")
    file.create_dataset("shuffled", data=ones, chunks=(5, 30), shuffle=True)
    file.create_dataset("checked", data=ones, chunks=(5, 30), fletcher32=True)
    file.create_dataset("outside", data=ones, external=[(str(folder / "raw"), 0, h5py.h5f.UNLIMITED)])
    if virtual:
        layout = h5py.VirtualLayout((20, 30), "f4")
        layout[:] = h5py.VirtualSource(str(folder / "no such.h5"), "x", (20, 30))
        file.create_virtual_dataset("virtual", layout)
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_layout(h5py.h5d.COMPACT)
    kind, space = h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((3,))
    h5py.h5d.create(file.id, b"compact", kind, space, plan).write(h5py.h5s.ALL, h5py.h5s.ALL, np.ones(3, "f4"))
    file["types"] = np.dtype("f4")  # a type with a name


@pytest.mark.parametrize("libver", LIBVERS)
def test_what_is_not_plain_stays_bytes(tmp_path, libver):
    def fill(file):
        odd_types(file)
        odd_storage(file, tmp_path)
        file["plain"] = np.ones(3, "f4")
        file["null"] = h5py.Empty("f4")
        colours = h5py.enum_dtype({"red": 1, "green": 2}, "i2")  # named integers are integers
        file.create_dataset("colours", data=np.array([1, 2, 1], "i2"), dtype=colours)

    data = written(tmp_path / "o.h5", fill, libver=libver)
    contents = matches(tmp_path / "o.h5", data, {"plain", "colours"})
    assert len(contents.regions) == 2
    assert not contents.warnings


def test_big_endian_stays_bytes_with_a_warning(tmp_path):
    def fill(file):
        for dtype in (">f4", ">i2", ">f8", "<f4", "i1"):
            file[dtype.replace(">", "big ")] = np.ones(3, dtype)
        file.create_dataset("chunks", data=np.ones(4, ">f4"), chunks=(2,))

    data = written(tmp_path / "b.h5", fill)
    contents = matches(tmp_path / "b.h5", data, {"<f4", "i1"})
    assert contents.warnings == ["4 datasets are big-endian: kept as bytes"]


def test_plain_files_hold_more_than_numbers(tmp_path):
    """What has no place in the table of types stays bytes, whoever reads the file."""

    def fill(file):
        file["w"] = random_array((3, 4), "f4")
        file["text"], file["texts"], file["opaque"] = "text", np.array([b"a", b"bc"]), np.zeros(3, "V2")
        file["type"] = np.dtype("f4")
        file.create_dataset("vlen", (2,), h5py.vlen_dtype("f4"))[0] = [1, 2]
        file.create_dataset("references", (1,), h5py.ref_dtype)[0] = file["text"].ref
        file.create_dataset("arrays", (2,), np.dtype(("f4", (3,))))[0] = [1, 2, 3]
        odd_storage(file, tmp_path, virtual=False)
        for i in range(300):
            file["w"].attrs[f"note {i}"] = "long enough that the header goes on elsewhere" * 9
            file[f"soft{i}"] = h5py.SoftLink("/w")

    data = written(tmp_path / "p.h5", fill)
    matches(tmp_path / "p.h5", data, {"w"})
    assert is_plain(data)


def test_links(tmp_path):
    """Cycles end, each dataset is found once, and no other file is opened."""
    other = tmp_path / "other.h5"
    written(other, lambda f: f.create_dataset("x", data=np.ones(3)))

    def fill(file):
        file["a/b/data"] = np.ones((3, 2), "f4")
        file["a/b/up"] = file["a"]
        file["a/root"] = file["/"]
        file["again"] = file["a/b/data"]
        file["soft"] = h5py.SoftLink("/a/b/data")
        file["soft cycle"] = h5py.SoftLink("/soft cycle")
        file["dangling"] = h5py.SoftLink("/nothing")
        file["away"] = h5py.ExternalLink("other.h5", "/x")

    data = written(tmp_path / "l.h5", fill)
    matches(tmp_path / "l.h5", data, {"a/b/data"})

    def without_external(file):
        fill(file)
        del file["away"]

    data = written(tmp_path / "w.h5", without_external)
    matches(tmp_path / "w.h5", data, {"a/b/data"})


def test_many_datasets(tmp_path):
    names = {f"layer{i // 8}/w{i % 8}" for i in range(2000)}
    data = written(tmp_path / "m.h5", lambda f: [f.create_dataset(n, data=random_array((2, 3), "f2")) for n in sorted(names)])
    matches(tmp_path / "m.h5", data, names)
    assert is_plain(data)


def test_elements_are_not_read(tmp_path):
    data = written(tmp_path / "e.h5", lambda f: [f.create_dataset(str(i), data=np.ones((500, 500))) for i in range(4)])
    amounts = []

    def read(at, n):
        amounts.append(n)
        return data[at : at + n]

    assert len(hdf5_files.find(read, len(data)).tensors) == 4
    assert sum(amounts) < 40_000


def test_other_files_are_none_after_one_small_read():
    for data in (b"", b"\x89HDF\r\n\x1a", bytes(9000), bytes(4096) + hdf5_files.SIGNATURE, b"\x89HDF\n" + bytes(99)):
        reads = []

        def read(at, n, data=data, reads=reads):
            reads.append(n)
            return data[at : at + n]

        assert hdf5_files.find(read, len(data)) is None
        assert len(reads) == 1
        assert reads[0] < 4096


def test_without_the_library_a_warning_says_what_to_install(tmp_path, monkeypatch):
    usual, data = (written(tmp_path / f"{v}.h5", keras_weights, libver=v) for v in LIBVERS)
    tensors = find(data).tensors
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert {v.name for v in find(usual).tensors} == {v.name for v in tensors}
    contents = find(data)
    assert (contents.regions, contents.tensors) == ([], [])
    assert "tensor-tzip[h5py]" in contents.warnings[0]
    assert find(b"no HDF5") is None


def test_failing_reads_are_no_fault_of_the_file(tmp_path):
    usual, other = (written(tmp_path / f"{v}.h5", keras_weights, libver=v) for v in LIBVERS)
    for failing, data in ((1, usual), (2, usual), (4, usual), (9, other)):
        count = 0

        def read(at, n, failing=failing, data=data):
            nonlocal count
            count += 1
            if count == failing:
                raise TimeoutError("the network is gone")
            return data[at : at + n]

        with pytest.raises(TimeoutError):
            hdf5_files.find(read, len(data))


CRASHES = {
    "crash": "import os; os.abort()",
    "exit": "pass",
    "print": "print('x' * 15)",
    "no end": "while True: pass",
    "asks without end": "import sys\nwhile True: sys.stdout.buffer.write(bytes(8) + bytes([0, 0, 0, 1] * 2))",
    "asks past the end": "import sys; sys.stdout.buffer.write(b'\\xff' * 16)",
    "long answer": "import sys; sys.stdout.buffer.write(b'\\xff' * 8 + bytes(8) + b'{')",
    "no JSON": "import sys; sys.stdout.buffer.write(bytes([4]) + bytes(15) + b'{{{{')",
}
ANSWERS = (
    "[]", "7", "{}", '"error"', "null", '{"error": "x"}', '{"regions": [], "tensors": [1], "warnings": []}', "[" * 9000,
    '{"regions": [[0, 1e999, "F32", 0]], "tensors": [], "warnings": []}',
    '{"regions": [[0, 4, "F99", 0]], "tensors": [], "warnings": []}',
    '{"regions": [[0, 4, "F32", 0], [2, 6, "F32", 0]], "tensors": [], "warnings": []}',
    '{"regions": [[-4, 4, "F32", 0]], "tensors": [], "warnings": []}',
    '{"regions": [[0, 99999999, "F32", 0]], "tensors": [], "warnings": []}',
)  # fmt: skip


@pytest.mark.usefixtures("library_only")
@pytest.mark.parametrize("how", CRASHES)
def test_a_crashing_or_lying_process_is_no_crash_of_ours(small, monkeypatch, how):
    monkeypatch.setattr(hdf5_files, "_CHILD", f"exec({CRASHES[how]!r})")
    monkeypatch.setattr(hdf5_files, "MAX_SECONDS", 2.0)
    with pytest.raises(ContainerError):
        find(small)


def test_nonsense_answers_are_refused(small):
    for answer in ANSWERS:
        with pytest.raises(ContainerError):
            hdf5_files._believed(answer.encode(), len(small))


@pytest.mark.usefixtures("library_only")
def test_no_process_no_tensors(small, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    contents = find(small)
    assert not contents.regions
    assert "no process" in contents.warnings[0]


def test_work_is_bounded(tmp_path, monkeypatch):
    def fill(file):
        for i in range(30):
            file.create_dataset(f"g{i}/c", data=np.ones((40, 2), "f4"), chunks=(1, 2))

    data = written(tmp_path / "w.h5", fill)
    assert find(data)
    for limit, value in (("MAX_METADATA", 10_000), ("MAX_METADATA", 100), ("MAX_OBJECTS", 50), ("MAX_CHUNKS", 1000)):
        with monkeypatch.context() as patch:
            patch.setattr(hdf5_files, limit, value)
            with pytest.raises(ContainerError, match=r"more than|more chunks|structures have"):
                hdf5_files.inspect(reader(data), 0, len(data))
    assert is_plain(data)
    for limit, value in (("MAX_METADATA", 10_000), ("MAX_OBJECTS", 50), ("MAX_CHUNKS", 1000), ("MAX_DEPTH", 0)):
        with monkeypatch.context() as patch:
            patch.setattr(hdf5_plain, limit, value)
            assert not is_plain(data)
    deep = written(tmp_path / "d.h5", lambda f: f.create_group("/".join("g" * 64)))
    assert find(deep) == Contents("hdf5")
    deep = written(tmp_path / "d.h5", lambda f: f.create_group("/".join("g" * 65)))
    with pytest.raises(ContainerError, match="deeper"):
        find(deep)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    def fill(file):
        file["a"] = np.arange(6, dtype="f4")
        file["b"] = np.arange(6, dtype="f4").reshape(2, 3)

    return written(tmp_path_factory.mktemp("hdf5") / "p.h5", fill)  # without checksums, so that it can be altered


def test_lying_offsets_are_refused(small):
    """The positions of the two datasets stand in their layout messages."""
    one, two = (v.begin for v in find(small).tensors)
    size = len(small)
    a, b = (struct.pack("<QQ", at, 24) for at in (one, two))
    assert small.count(a) == small.count(b) == 1
    for at in (one, one + 4, one - 4, size - 23, size, size * 2, 1 << 62, (1 << 63) - 24, (1 << 64) - 2):
        with pytest.raises(ContainerError):
            find(small.replace(b, struct.pack("<QQ", at, 24)))
    for nbytes in (0, 12, 23, 25, 48, 1 << 40, (1 << 64) - 1):
        with pytest.raises(ContainerError):
            find(small.replace(b, struct.pack("<QQ", two, nbytes)))
    unallocated = find(small.replace(b, struct.pack("<QQ", (1 << 64) - 1, 24)))
    assert [v.name for v in unallocated.tensors] == ["a"]


@pytest.mark.usefixtures("library_only")
@pytest.mark.parametrize("libver", LIBVERS)
def test_damaged_files(tmp_path, libver):
    """Some of them crash the library, and are refused all the same."""

    def fill(file):
        keras_weights(file)
        odd_types(file)
        odd_storage(file, tmp_path)
        file.create_dataset("chunks", data=np.ones((5, 4), "f4"), chunks=(2, 4), maxshape=(None, 4))
        file.create_dataset("tiles", data=np.ones((5, 4), "f4"), chunks=(2, 3), maxshape=(None, None))

    data = written(tmp_path / "f.h5", fill, libver=libver)
    rng = random.Random(3)
    outcomes = {"refused": 0, "read": 0}
    for _ in range(60):
        copy = bytearray(data)
        for _ in range(rng.choice((1, 8, 30))):
            copy[rng.randrange(8, len(copy))] = rng.choice((rng.randrange(256), 0, 255, 128))
        try:
            outcomes["read" if find(bytes(copy)) else "other"] += 1
        except ContainerError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 5


def test_truncated_at_every_byte(small):
    for n in range(len(small)):
        if n < 8:
            assert find(small[:n]) is None
        else:
            with pytest.raises(ContainerError):
                (find if n % 500 == 0 else lambda cut: hdf5_files.inspect(reader(cut), 0, len(cut)))(small[:n])


def everything(file):
    keras_weights(file)
    file["bool"], file["complex"] = np.ones(3, "?"), np.ones((2, 2), "c8")
    file["text"] = "text"
    file.create_dataset("chunks", data=np.ones((5, 4), "f4"), chunks=(2, 4), maxshape=(None, 4))
    file.create_dataset("tiles", data=np.ones((50, 4), "f4"), chunks=(1, 3), maxshape=(None, None))  # a tree of two levels
    for i in range(40):
        file[f"many/{i}"] = np.ones(2, "f2")


def test_damaged_plain_files(tmp_path):
    """Whatever is damaged: the file is left to the library, or all that is said of it holds."""
    data = written(tmp_path / "d.h5", everything, userblock_size=512)
    base = data.index(hdf5_files.SIGNATURE)
    matches(tmp_path / "d.h5", data, {v.name for v in find(data).tensors})
    metadata = [m for m in range(base, len(data)) if data[m]]
    rng = random.Random(5)
    outcomes = {"left": 0, "read": 0}
    for trial in range(700):
        copy = bytearray(data)
        for _ in range(rng.choice((1, 1, 3, 30))):
            at = rng.choice(metadata) if trial % 3 else rng.randrange(base, len(copy))
            copy[at] = rng.choice((rng.randrange(256), 0, 255, 128, copy[at] ^ 1 << rng.randrange(8)))
        found = hdf5_plain.plain(reader(bytes(copy)), base, len(copy))
        outcomes["read" if found else "left"] += 1
        if found:
            promises(replace_names(found), len(copy))
    assert min(outcomes.values()) > 50
    for n in range(base + 8, len(data), 41):
        assert hdf5_plain.plain(reader(data[:n]), base, n) is None


def replace_names(contents: Contents) -> Contents:
    """Damaged names may have lost what told them apart: `recognise` numbers them."""
    names = Unique()
    contents.tensors = [v._replace(name=names.name(v.name)) for v in contents.tensors]
    return contents


def test_one_change_to_a_plain_file(small):
    """Each of these makes it another kind of file, or one that lies; what the library says of it counts."""
    header = small.index(struct.pack("<HHB3xBB", 1, 24, 0, 1, 1))  # the space of dataset a, one dimension
    tree, heap, table = (small.index(s) for s in (b"TREE", b"HEAP", b"SNOD"))
    names = small.index(b"a\0\0\0\0\0\0\0b\0", heap)
    kind = small.index(struct.pack("<HH", 3, 24), header)
    layout = small.index(struct.pack("<HH", 8, 24), header)
    cases = {
        "superblock": (8, b"\1"), "offsets": (13, b"\4"), "base": (24, b"\1"), "end": (40, struct.pack("<Q", len(small) + 1)),
        "driver": (48, bytes(8)), "root": (64, struct.pack("<Q", len(small) - 8)), "root nowhere": (64, b"\xff" * 8),
        "tree": (tree, b"TREF"), "kind of tree": (tree + 4, b"\1"), "high tree": (tree + 5, b"\1"),
        "long tree": (tree + 6, b"\xff\xff"),
        "heap": (heap, b"HEAQ"), "heap's version": (heap + 4, b"\1"), "heap's size": (heap + 8, b"\xff" * 7),
        "table": (table, b"SNOE"), "long table": (table + 6, b"\xff"), "not in order": (names, b"c"), "no name": (names, b"\0"),
        "way": (names, b"/"), "here": (names, b"."), "name nowhere": (table + 8, b"\xff" * 8), "link": (table + 8 + 16, b"\3"),
        "shared": (kind + 4, b"\3"), "long message": (kind + 2, b"\xff"), "many dimensions": (header + 9, b"\xff"),
        "space": (header + 8, b"\2"), "elements": (header + 16, b"\7"), "float": (kind + 18, b"\7"),
        "order": (kind + 9, b"\x21"),
        "layout": (layout + 8, b"\4"), "way of storing": (layout + 9, b"\3"), "another message": (kind, b"\7\1"),
    }  # fmt: skip
    for name, (at, new) in cases.items():
        copy = small[:at] + new + small[at + len(new) :]
        assert copy != small
        assert not is_plain(copy), name


def test_trees_that_share_their_branches_end(small, monkeypatch):
    """Seventeen levels of a hundred entries, all of them the same, would be 10^34 tables."""
    at = len(small)
    nodes = b""
    for level in range(16, -1, -1):
        size = 24 + 100 * 16
        child = at + len(nodes) + size
        nodes += struct.pack("<4sBBH16x", b"TREE", 0, level, 100) + struct.pack("<QQ", 0, child) * 100
    copy = small + nodes + struct.pack("<4sBxH", b"SNOD", 1, 0)
    root = small.index(b"TREE")
    copy = copy.replace(struct.pack("<QQ", root, small.index(b"HEAP")), struct.pack("<QQ", at, small.index(b"HEAP")))
    copy = copy[:40] + struct.pack("<Q", len(copy)) + copy[48:]
    taken, take = [], hdf5_plain._Walk._take
    monkeypatch.setattr(hdf5_plain._Walk, "_take", lambda walk, at, n: taken.append(n) or take(walk, at, n))
    assert not is_plain(copy)
    assert 1000 < len(taken) < 1_000_000
    own_child = struct.pack("<4sBBH16xQQ", b"TREE", 0, 3, 1, 0, at)
    assert not is_plain(copy[:at] + own_child + copy[at + len(own_child) :])


@pytest.mark.parametrize("seed", range(12))
def test_random_files(tmp_path, seed):
    """Groups, links, types, shapes and chunks as they come: the library finds the same."""
    rng = random.Random(seed)

    def name():
        return "".join(rng.choices("abcdefghij_: 0123456789", k=rng.randint(1, 12)))

    def add(groups):
        group = rng.choice(groups)
        match rng.randrange(12):
            case 0 | 1 | 2:
                groups.append(group.create_group(name()))
            case 3:
                group[name()] = h5py.SoftLink(f"/{name()}")
            case 4:
                group[name()] = rng.choice(groups)
            case 5:
                group.attrs[name()] = np.arange(rng.randrange(2000))
            case 6:
                del group[rng.choice(list(group))]
            case _:
                shape = tuple(rng.choices((0, 1, 2, 3, 7), (1, 3, 3, 3, 3), k=rng.randrange(5)))
                chunks = {}
                if shape and 0 not in shape and rng.random() < 0.5:
                    chunks = {"chunks": tuple(rng.randint(1, n) for n in shape), "maxshape": [None] * len(shape)}
                made = group.create_dataset(name(), shape, rng.choice((*TYPES, "S3", "V4")), **chunks)
                if rng.random() < 0.8:
                    made[...] = np.zeros(shape, made.dtype)
                if chunks and rng.random() < 0.3:
                    made.resize([rng.randint(1, 9) for _ in shape])

    def fill(file):
        groups = [file]
        for _ in range(rng.choice((10, 60, 300))):
            with contextlib.suppress(ValueError, IndexError, OSError, KeyError):  # a name is there, or a group is gone
                add(groups)

    data = written(tmp_path / "r.h5", fill, userblock_size=rng.choice((0, 512)))
    contents = find(data)
    assert contents == hdf5_files.inspect(reader(data), data.index(hdf5_files.SIGNATURE), len(data))
    assert is_plain(data)
