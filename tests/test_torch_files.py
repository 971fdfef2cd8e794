"""Files of PyTorch: what is found is bit for bit what torch.load returns, and whatever their pickles say, nothing runs."""

import argparse
import contextlib
import io
import os
import pickle
import pickletools
import struct
import sys
import time
import zipfile
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from promises import promises

from tzip.formats.containers import ContainerError
from tzip.formats.pickles import MAX_STEPS
from tzip.formats.torch_files import find

MAGIC = 0x1950A86A20F9469CFC6C
DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.complex64: "C64",
    torch.complex128: "C128",
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
}
FORMS = [True, False]
TYPED = [d for d in DTYPES if not str(d).startswith(("torch.uint16", "torch.uint32", "torch.uint64", "torch.float8"))]


def saved(value, zipped=True, **options):
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped, **options)
    return file.getvalue()


def loaded(raw, weights_only=True):
    return torch.load(io.BytesIO(raw), weights_only=weights_only)


def found(raw):
    contents = find(lambda at, n: raw[at : at + n], len(raw))
    if contents is not None:
        assert contents.container == "torch"
        promises(contents, len(raw))
    return contents


def row_major(shape):
    return tuple(int(np.prod(shape[i + 1 :], dtype=object)) for i in range(len(shape)))


def bits_of(tensor):
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def bits_at(raw, view):
    if 0 in view.shape:
        return b""
    if view.dtype.bits == 4:
        return raw[view.begin : view.begin + int(np.prod(view.shape)) // 2]
    width = view.dtype.bits // 8
    strides = [width * s for s in view.strides or row_major(view.shape)]
    return np.ndarray(view.shape, f"V{width}", raw, view.begin, strides).tobytes()


def assert_same(raw, expected):
    """The tensors found are these, in this order, bit for bit."""
    contents = found(raw)
    assert [v.name for v in contents.tensors] == list(expected)
    for view, tensor in zip(contents.tensors, expected.values(), strict=True):
        assert view.shape == tuple(tensor.shape)
        assert view.dtype.name == DTYPES[tensor.dtype]
        assert bits_at(raw, view) == bits_of(tensor)
        assert (view.strides is None) == tensor.is_contiguous()
    return contents


def noise(dtype, *shape):
    width = torch.empty(0, dtype=dtype).element_size()
    rng = np.random.default_rng(sum(shape) + width)
    raw = rng.integers(0, 2 if dtype is torch.bool else 256, (int(np.prod(shape)) * width,), np.uint8)
    return torch.from_numpy(raw).view(dtype).reshape(shape) if raw.size else torch.empty(shape, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("protocol", [2, 5])
def test_every_dtype(dtype, protocol):
    shapes = [(), (0,), (3, 0), (1,), (7,), (4, 5), (2, 3, 4), (1, 1)]
    raw = saved({str(s): noise(dtype, *s) for s in shapes}, pickle_protocol=protocol)
    contents = assert_same(raw, loaded(raw, weights_only=protocol == 2))
    assert {r.dtype.name for r in contents.regions} == {DTYPES[dtype]}
    assert [r.row for r in contents.regions] == [0, 0, 0, 5, 4, 1]


@pytest.mark.parametrize("dtype", TYPED, ids=str)
@pytest.mark.parametrize("protocol", [1, 2, 4, 5])
def test_every_dtype_of_the_older_form(dtype, protocol):
    raw = saved({str(s): noise(dtype, *s) for s in [(), (0,), (7,), (4, 5)]}, zipped=False, pickle_protocol=protocol)
    contents = assert_same(raw, loaded(raw, weights_only=protocol == 2))
    assert sorted(r.row for r in contents.regions) == [0, 0, 5]


def test_older_form_of_types_that_torch_writes_but_does_not_load():
    tensor = noise(torch.float8_e5m2, 4, 5)
    raw = saved({"w": tensor}, zipped=False)
    assert_same(raw, {"w": tensor})


def test_numbers_of_four_bits_are_counted_one_by_one():
    tensor = noise(torch.uint8, 3, 4).view(torch.float4_e2m1fn_x2)
    raw = saved({"w": tensor, "t": tensor.T, "row": tensor[1]})
    contents = found(raw)
    assert [(v.name, v.shape, v.dtype.name) for v in contents.tensors] == [("w", (3, 8), "F4"), ("row", (8,), "F4")]
    assert [(r.end - r.begin, r.row) for r in contents.regions] == [(12, 8)]
    for view in contents.tensors:
        assert bits_at(raw, view) == bits_of(loaded(raw)[view.name].view(torch.uint8))


def views():
    whole = noise(torch.bfloat16, 4, 6, 5)
    return {
        "whole": whole,
        "offset": whole[1:],
        "transposed": whole.transpose(0, 2),
        "step": whole[::2, 1::2],
        "columns": whole[:, :, 3],
        "one": whole[2, 3, 4],
        "expanded": whole[:, :1].expand(4, 9, 5),
        "none": whole[4:],
        "size one": whole[:1].transpose(0, 1)[:, :, :5],
        "one of each": whole.as_strided((1, 1, 5), (77, 99, 1), 20),
        "diagonal": whole[0].diagonal(),
        "channels last": noise(torch.float32, 2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "no elements": torch.empty(3, 0)[1:],
    }


@pytest.mark.parametrize("zipped", FORMS)
def test_views(zipped):
    raw = saved(views(), zipped)
    contents = assert_same(raw, loaded(raw))
    strides = {v.name: v.strides for v in contents.tensors}
    assert strides["transposed"] == (1, 5, 30)
    assert strides["expanded"] == (30, 0, 1)
    assert strides["one of each"] is strides["offset"] is strides["none"] is None
    assert [(r.dtype.name, r.row) for r in sorted(contents.regions, key=lambda r: r.dtype.name)] == [("BF16", 5), ("F32", 0)]


@given(st.data())
def test_any_view(data):
    shape = data.draw(st.lists(st.integers(0, 4), max_size=4))
    strides = data.draw(st.lists(st.integers(0, 9), min_size=len(shape), max_size=len(shape)))
    base = torch.arange(200, dtype=torch.int16)
    raw = saved([base.as_strided(shape, strides, data.draw(st.integers(0, 50)))], data.draw(st.booleans()))
    assert_same(raw, {"0": loaded(raw)[0]})


@pytest.mark.parametrize("zipped", FORMS)
def test_checkpoint_of_a_training_run(zipped):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "rng": torch.get_rng_state()}
    raw = saved(state, zipped)
    value = loaded(raw)
    expected = {f"model.{k}": v for k, v in value["model"].items()}
    for i, state in value["optimizer"]["state"].items():
        expected |= {f"optimizer.state.{i}.{k}": v for k, v in state.items()}
    assert_same(raw, expected | {"rng": value["rng"]})
    assert "optimizer.state.0.exp_avg" in expected


@pytest.mark.parametrize("zipped", FORMS)
def test_tied_weights_have_one_region_and_both_names(zipped):
    table = noise(torch.float16, 8, 3)
    raw = saved({"embed": table, "head": table, "head.T": table.detach().T}, zipped)
    assert len(assert_same(raw, loaded(raw)).regions) == 1


@dataclass
class Options:
    weight: object
    more: object = None


class Slotted:
    __slots__ = ("weight",)


class Sub(torch.Tensor):
    pass


@pytest.mark.parametrize("zipped", FORMS)
@pytest.mark.parametrize("protocol", [2, 4])
def test_names_follow_keys_indices_and_attributes(zipped, protocol):
    t = [noise(torch.float32, 2, i + 1) for i in range(14)]
    attributed = t[10].clone()
    attributed.note = "kept by torch"
    parameter = torch.nn.Parameter(t[11])
    parameter.note = "kept by torch"
    slotted = Slotted()
    slotted.weight = t[12]
    value = {
        "list": [t[0], (t[1], {"deep": t[2]})],
        7: t[3],
        (1, "a"): t[4],
        None: t[5],
        "parameter": torch.nn.Parameter(t[6]),
        "options": Options(t[7], argparse.Namespace(x=t[8])),
        "set": {1, 2},
        "": t[9],
        "attributed": attributed,
        "annotated": parameter,
        "slotted": slotted,
        "grad": t[13].requires_grad_(),
    }
    raw = saved(value, zipped, pickle_protocol=protocol)
    names = ["list.0", "list.1.0", "list.1.1.deep", "7", "(1, 'a')", "None", "parameter", "options.weight", "options.more.x"]
    names += ["", "attributed", "annotated", "slotted.weight", "grad"]
    assert_same(raw, dict(zip(names, t, strict=True)))


@pytest.mark.parametrize("zipped", FORMS)
def test_equal_names_are_numbered(zipped):
    t = [noise(torch.int32, i + 1) for i in range(5)]
    raw = saved({"a": {"b": t[0]}, "a.b": t[1], "a.b#2": t[2], 1: t[3], "1": t[4]}, zipped)
    assert_same(raw, dict(zip(["a.b", "a.b#2", "a.b#2#2", "1", "1#2"], t, strict=True)))


@pytest.mark.parametrize("zipped", FORMS)
@pytest.mark.filterwarnings("ignore")
def test_whole_module_has_the_names_of_its_state_dict(zipped):
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 4), "b": torch.nn.Sequential(torch.nn.BatchNorm1d(4))})
    raw = saved(model, zipped)
    expected = model.state_dict()
    assert list(expected) == [v.name for v in found(raw).tensors]
    assert_same(raw, dict(expected))


def test_roots():
    tensor = noise(torch.float32, 2, 3)
    assert_same(saved(tensor), {"tensor": tensor})
    assert_same(saved([tensor, tensor[0]]), {"0": tensor, "1": tensor[0]})
    assert found(saved(3)).tensors == []
    storage = found(saved(tensor.untyped_storage()))
    assert (storage.tensors, storage.regions) == ([], [])
    cycle = {"w": tensor}
    cycle["self"] = cycle
    assert_same(saved(cycle), {"w": tensor})


@pytest.mark.filterwarnings("ignore")
def test_what_is_more_than_a_storage_has_no_name():
    sparse = torch.eye(3).to_sparse()
    csr = torch.eye(3).to_sparse_csr()
    value = {
        "plain": noise(torch.float32, 4),
        "quantised": torch.quantize_per_tensor(torch.ones(3, 4), 0.1, 0, torch.quint8),
        "channels": torch.quantize_per_channel(torch.ones(3, 4), torch.ones(3), torch.zeros(3), 0, torch.qint8),
        "packed": torch.quantize_per_channel(torch.ones(3, 4), torch.ones(3), torch.zeros(3), 0, torch.quint4x2),
        "sparse": sparse,
        "csr": csr,
        "meta": torch.empty(3, device="meta"),
        "sub": torch.ones(5).as_subclass(Sub),
        "conj": noise(torch.complex64, 3).conj(),
        "neg": noise(torch.complex64, 3).conj().imag,
        "half": noise(torch.complex32, 3),
    }
    contents = assert_same(saved(value), {"plain": value["plain"]})
    kinds = [r.dtype.name for r in contents.regions]
    assert kinds[:4] == ["F32", "U8", "I8", "F32"]  # quantised ones have regions, as have their scales
    assert "C64" in kinds


def test_storage_of_two_types_is_that_of_the_larger_use():
    base = noise(torch.uint16, 4, 4)
    other = base.view(torch.float8_e5m2)
    raw = saved({"a": base, "b": other[:2], "c": base[1:]})
    contents = found(raw)
    assert [(v.name, v.dtype.name) for v in contents.tensors] == [("a", "U16"), ("c", "U16")]
    assert [(r.end - r.begin, r.dtype.name, r.row) for r in contents.regions] == [(32, "U16", 4)]
    raw = saved({"a": base[:1], "b": other})
    assert [v.name for v in found(raw).tensors] == ["b"]
    assert bits_at(raw, found(raw).tensors[0]) == bits_of(other)
    odd = torch.zeros(5, dtype=torch.uint8).untyped_storage()
    raw = saved(torch.empty(0, dtype=torch.uint16).set_(odd, 1, (1,), (1,)))
    assert [(r.end - r.begin) for r in found(raw).regions] == [4]


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)
        self.register_buffer("count", torch.arange(3))
        self.parts = torch.nn.ModuleList([torch.nn.Linear(2, 2)])

    def forward(self, x):
        return self.parts[0](self.layer(x)) + torch.tensor([1.0, 2.0])


@pytest.mark.filterwarnings("ignore")
def test_archives_of_torchscript():
    net = Net()
    for module in (torch.jit.script(net), torch.jit.trace(net, torch.ones(1, 3))):
        file = io.BytesIO()
        torch.jit.save(module, file, {"note.txt": "first in the file"})
        raw = file.getvalue()
        contents = found(raw)
        by_name = {v.name: v for v in contents.tensors}
        for name, tensor in torch.jit.load(io.BytesIO(raw)).state_dict().items():
            assert bits_at(raw, by_name.pop(name)) == bits_of(tensor)
        for name, view in by_name.items():
            assert name == "constants.0"
            assert bits_at(raw, view) == bits_of(torch.tensor([1.0, 2.0]))
    assert by_name


def records(raw):
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(members, packed=()):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data, zipfile.ZIP_DEFLATED if name in packed else zipfile.ZIP_STORED)
    return file.getvalue()


def test_archives_that_others_wrote():
    members = records(saved({"w": noise(torch.float32, 4, 5), "v": noise(torch.int8, 3)}))
    raw = zipped(members)
    assert_same(raw, loaded(raw))
    raw = zipped(members, packed=("archive/data/0",))
    contents = assert_same(raw, {"v": loaded(raw)["v"]})
    assert "compressed" in contents.warnings[0]
    raw = zipped(members | {"archive/byteorder": b"big"})
    contents = found(raw)
    assert (contents.regions, contents.tensors) == ([], [])
    assert "big-endian" in contents.warnings[0]
    for wrong in (
        {k: v for k, v in members.items() if k != "archive/data/1"},
        members | {"archive/data/0": bytes(79)},
        members | {"archive/data.pkl": members["archive/data.pkl"][:-9]},
    ):
        with pytest.raises(ContainerError):
            found(zipped(wrong))
    with pytest.raises(ContainerError, match="compressed"):
        found(zipped(members, packed=("archive/data.pkl",)))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(file := io.BytesIO(raw), "a") as archive_:
        archive_.writestr("archive/data/0", bytes(80))
    with pytest.raises(ContainerError, match="same name"):
        found(file.getvalue())


def test_archives_of_more_than_four_gigabytes_have_wider_fields():
    raw = saved({"w": noise(torch.float32, 4, 5)})
    end = raw.rindex(b"PK\5\6")
    n, _, start = struct.unpack_from("<H2L", raw, end + 10)
    directory = b""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        for info in archive.infolist():
            name = info.filename.encode()
            extra = struct.pack("<2H2s", 0x9999, 2, b"xx")
            extra += struct.pack("<2H3Q", 1, 24, info.file_size, info.file_size, info.header_offset)
            sizes = (info.CRC, 0xFFFFFFFF, 0xFFFFFFFF, len(name), len(extra), 0, 0, 0, 0, 0xFFFFFFFF)
            directory += b"PK\1\2" + struct.pack("<6H3L5H2L", 20, 45, info.flag_bits, 0, 0, 0, *sizes) + name + extra
    wide = b"PK\6\6" + struct.pack("<Q2H2L4Q", 44, 45, 45, 0, 0, n, n, len(directory), start)
    wide += b"PK\6\7" + struct.pack("<LQL", 0, start + len(directory), 1)
    narrow = b"PK\5\6" + struct.pack("<4H2LH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    raw = raw[:start] + directory + wide + narrow
    assert_same(raw, loaded(raw))


def test_other_files_are_none_at_a_glance():
    npz = io.BytesIO()
    np.savez(npz, a=np.ones(3))
    many = {f"folder/{i}": b"" for i in range(300)}
    others = [npz.getvalue(), zipped({"a/b": b"x"}), zipped(many), pickle.dumps(3, 0)]
    scraps = [b"", b"PK", b"PK\3\4", bytes(100), b"PK\3\4" + bytes(1000), pickle.dumps({"a": 1}), b"\x80\x02", os.urandom(3000)]
    for raw in others + scraps:
        calls = []
        assert find(lambda at, n, raw=raw, calls=calls: calls.append(n) or raw[at : at + n], len(raw)) is None
        assert len(calls) <= 2
        assert sum(calls) < 100_000
    assert found(zipped({"a/data.pkl": b"N."})) is None  # torch would miss the version


def files():
    parts = [noise(torch.uint16, 2, 2), torch.nn.Parameter(torch.ones(2))]
    value = {"w": noise(torch.float32, 2, 3), "l": parts, "o": Options(3)}
    script = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), script)
    return [saved(value), saved(value | {"l": 1}, zipped=False), script.getvalue()]


def survives(raw):
    try:
        return found(raw)
    except ContainerError as error:
        reason = str(error)
    assert 0 < len(reason) < 1000
    return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("which", range(3))
def test_truncation_at_every_byte(which):
    raw = files()[which]
    assert found(raw).regions
    for n in range(len(raw)):
        contents = survives(raw[:n])
        assert contents is None or which == 1, n
    assert survives(raw + b"more") or which != 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("which", range(3))
def test_random_damage(which):
    raw = files()[which]
    rng = np.random.default_rng(which)
    structure = [m for m in (raw.find(b"\x80\x02"), raw.find(b"PK\1\2")) if m >= 0]
    kept = 0
    for trial in range(3000):
        damaged = bytearray(raw)
        for _ in range(rng.integers(1, 4)):
            at = rng.integers(len(raw)) if trial % 2 else structure[trial // 2 % len(structure)] + rng.integers(600)
            damaged[at % len(raw)] = rng.integers(256)
        kept += survives(bytes(damaged)) is not None
    assert 100 < kept < 3000


def test_damage_of_pickles_that_crc_does_not_hide():
    """Random opcodes, well framed: the machine meets every one of them in every order."""
    rng = np.random.default_rng(5)
    opcodes = "".join(o.code for o in pickletools.opcodes).encode("latin-1")
    for _ in range(4000):
        body = bytes(rng.choice(np.frombuffer(opcodes, np.uint8), rng.integers(1, 40)))
        survives(archive(b"\x80\x02(]}cos\nsystem\n)" + body + b"."))


def archive(pickled, **more):
    return zipped({"a/data.pkl": pickled, "a/version": b"3\n", "a/byteorder": b"little"} | more)


def older(pickled, keys=()):
    keys = keys if isinstance(keys, str) else list(keys)
    return pickle.dumps(MAGIC, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2) + pickled + pickle.dumps(keys, 2)


class Attack:
    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


class WithState:
    def __setstate__(self, state):
        os.system(state)


def attacks(canary):
    command = f"touch {canary}"
    text = command.encode()
    yield pickle.dumps(Attack(os.system, (command,)), 0)
    yield pickle.dumps(Attack(os.system, (command,)), 2)
    yield pickle.dumps(Attack(exec, (f"open({str(canary)!r}, 'w').close()",)), 4)
    yield pickle.dumps(Attack(eval, (f"open({str(canary)!r}, 'w').close()",)), 5)
    yield b"(S'" + text + b"'\nios\nsystem\n."
    yield b"(cos\nsystem\nX" + struct.pack("<L", len(text)) + text + b"o."
    yield b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(text)]) + text + b"\x85R."
    yield b"\x80\x02cbuiltins\ngetattr\ncos\nsystem\n\x86R(X" + struct.pack("<L", len(text)) + text + b"tR."
    yield b"\x80\x02ctest_torch_files\nWithState\n)\x81X" + struct.pack("<L", len(text)) + text + b"b."
    yield b"\x80\x02cos\nsystem\nX" + struct.pack("<L", len(text)) + text + b"\x85\x81."


RUNNING = []
EVENTS = []
sys.addaudithook(lambda event, _: EVENTS.append(event) if RUNNING else None)


def watched(raw):
    """What is found, while nothing may be imported, compiled, opened or started."""
    EVENTS.clear()
    RUNNING.append(1)
    try:
        return survives(raw)
    finally:
        RUNNING.clear()
        assert not [e for e in EVENTS if e.split(".")[0] in {"os", "exec", "compile", "import", "open", "subprocess", "pickle"}]


def test_no_attack_runs(tmp_path):
    canary = tmp_path / "canary"
    "".encode("raw_unicode_escape")  # Python imports its codec on first use
    ran = 0
    for number, attack in enumerate(attacks(canary)):
        for whole in (archive(attack), older(attack), archive(b"\x80\x02]" + attack.removeprefix(b"\x80\x02")[:-1] + b"a.")):
            contents = watched(whole)
            assert contents is None or (contents.regions, contents.tensors) == ([], [])
            assert not canary.exists(), number
        with contextlib.suppress(Exception):  # whatever comes of it: the attack is a real one
            pickle.loads(attack)
        ran += canary.exists()
        canary.unlink(missing_ok=True)
    assert ran >= 8


def test_persistent_ids_of_wrong_types():
    for pickled in (
        b"\x80\x02K\x01Q.",
        b"\x80\x02NQ.",
        b"\x80\x02)Q.",
        b"Pabc\n.",
        b"\x80\x02(X\x07\0\0\0storageK\x01K\x01K\x01K\x01tQ.",
        b"\x80\x02(X\x07\0\0\0storagectorch\nEvilStorage\nX\x01\0\0\0000NK\x04tQ.",
        b"\x80\x02(X\x07\0\0\0storagectorch\nFloatStorage\nK\x00NK\x04tQ.",
        b"\x80\x02(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000NJ\xff\xff\xff\xfftQ.",
        b"\x80\x02(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000N\x8a\x09" + b"\xff" * 8 + b"\0tQ.",
    ):
        raw = archive(pickled, **{"a/data/0": bytes(16)})
        assert watched(raw) is None
        with pytest.raises(ContainerError):
            found(raw)


def test_pickles_that_are_wrong():
    for pickled, reason in (
        (b"\x80\x02}(K\x01u.", "key without"),
        (b"\x80\x02}(K\x01d.", "key without"),
        (b"\x80\x02K\x01K\x02\x93.", "no name"),
        (b"\x80\x02N(\x85.", "empty stack"),
        (b"\x80\x02.", "empty stack"),
        (b"\x80\x02N", "exhausted"),
        (b"\x80\x02\xff.", "unknown"),
        (b"\x80\x02h\7.", "KeyError"),
        (b"\x80\x02t.", "IndexError"),
        (b"S" + b"x" * 9000 + b"\n.", "no string quotes"),
        (b"\x80\x02" + b"N" * (MAX_STEPS + 5) + b".", "steps"),
    ):
        assert survives(archive(pickled)) is None
        with pytest.raises(ContainerError, match=reason):
            found(archive(pickled))


def test_no_more_is_read_than_a_pickle_may_have():
    head, calls = older(b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little")), []

    def read(at, n):
        calls.append(n)
        return (head[at : at + n] + bytes(n))[:n]

    with pytest.raises(ContainerError):
        find(read, 1 << 50)
    assert sum(calls) < 101_000_000


def storage_id(kind, key, count, *rest):
    """A persistent id as the older form has it."""
    number = b"\x8a\x08" + struct.pack("<q", count)
    part = b"N" if not rest else b"(X\1\0\0\0vK%cK%ct" % rest
    return b"(X\7\0\0\0storagectorch\n%s\nX\1\0\0\0%sX\3\0\0\0cpu%s%stQ" % (kind, key, number, part)


def test_older_form_has_parts_of_storages():
    tensor = b"ctorch._utils\n_rebuild_tensor\n(" + storage_id(b"FloatStorage", b"0", 6, 2, 3) + b"K\1K\2\x85K\1\x85tR"
    raw = older(b"\x80\x02]" + tensor + b"a.", ["0"]) + struct.pack("<q6f", 6, *range(6))
    assert_same(raw, {"0": loaded(raw)[0]})
    assert loaded(raw)[0].tolist() == [3.0, 4.0]
    with pytest.raises(ContainerError, match="unknown part"):
        found(older(b"\x80\x02]" + tensor.replace(b"K\2K\3t", b"K\4K\3t") + b"a.", ["0"]))


def test_older_form_that_lies():
    one, other = (b"\x80\x02" + storage_id(kind, b"0", 4) for kind in (b"FloatStorage", b"DoubleStorage"))
    data = struct.pack("<q4f", 4, *range(4))
    assert len(found(older(one + b".", ["0"]) + data).regions) == 1
    assert found(older(one + b".", []) + data).regions == []
    for raw in (
        older(one + b".", ["0"]) + struct.pack("<q4f", 3, *range(4)),
        older(one + b".", ["0"]) + data[:-1],
        older(one + b".", ["0", "0"]) + data * 2,
        older(one + b".", ["1"]) + data,
        older(one + b".", [0]) + data,
        older(one + b".", "0") + data,
        older(one + other[2:] + b"\x86.", ["0"]) + data * 2,
        older(one + b".", ["0"])[:20],
        older(one + b".", ["0"]).replace(pickle.dumps(1001, 2), pickle.dumps(1002, 2)) + data,
    ):
        with pytest.raises(ContainerError):
            found(raw)


def tensor_pickle(count, offset, shape, strides):
    """A list of one float32 tensor, its numbers as given."""

    class Storage:
        pass

    class Pickler(pickle._Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", count) if isinstance(value, Storage) else None

    file = io.BytesIO()
    Pickler(file, 2).dump([Attack(torch._utils._rebuild_tensor_v2, (Storage(), offset, shape, strides, False, {}))])
    return file.getvalue().replace(b"ctorch.storage\n", b"ctorch\n")


def test_sizes_that_lie():
    big = 1 << 63
    data = {"a/data/0": bytes(16)}
    assert len(found(archive(tensor_pickle(4, 0, (2, 2), (2, 1)), **data)).tensors) == 1
    assert found(archive(tensor_pickle(4, 3, (5, 1), (0, 9)), **data)).tensors[0].strides == (0, 9)
    assert found(archive(tensor_pickle(4, 9, (0, 5), (1, 1)), **data)).tensors[0].strides is None
    assert found(beyond := archive(tensor_pickle(4, 9, (0,), (1,)), **data)).tensors[0].begin == found(beyond).regions[0].end
    for lie in (
        (5, 0, (2,), (1,)), (3, 0, (2,), (1,)), (4, 1, (4,), (1,)), (4, 0, (2, 3), (2, 1)), (4, 0, (1 << 62,), (1,)),
        (4, 1 << 62, (1,), (1,)), (4, 0, (2, 2), (1 << 62, 1)), (1 << 62, 0, (1,), (1,)), (big - 1, 0, (1,), (1,)),
        (4, 4, (), ()), (4, 0, (big - 1,) * 64, (1,) * 64),
    ):  # fmt: skip
        with pytest.raises(ContainerError):
            found(archive(tensor_pickle(*lie), **data))
    for nonsense in (
        (4, -1, (2,), (1,)), (4, 0, (-2,), (1,)), (4, 0, (2,), (-1,)), (4, 0, (2,), (1, 1)), (4, 0, ("x",), (1,)),
        (4, 0, (big,), (1,)), (4, 0, (1,) * 65, (1,) * 65), (4, big, (1,), (1,)),
    ):  # fmt: skip
        contents = found(archive(tensor_pickle(*nonsense), **data))
        assert (contents.tensors, len(contents.regions)) == ([], 1)


def test_storages_that_overlap():
    """The directory leads both records to the same bytes, whose header bears both names in turn."""
    raw = saved({"a": noise(torch.float32, 8), "b": noise(torch.float32, 8)})
    with zipfile.ZipFile(io.BytesIO(raw)) as records_:
        first, second = (records_.getinfo(f"archive/data/{i}").header_offset for i in range(2))
    at = raw.index(b"archive/data/1", raw.index(b"PK\1\2")) - 4
    assert struct.unpack_from("<L", raw, at) == (second,)
    with pytest.raises(ContainerError):
        found(raw[:at] + struct.pack("<L", first) + raw[at + 4 :])
    zero = raw.index(b"archive/data/0", raw.index(b"PK\1\2"))
    same = bytearray(raw)
    same[zero + 13 : zero + 14] = b"1"
    same[raw.index(b"archive/data/0") + 13] = ord("1")
    with pytest.raises(ContainerError):
        found(bytes(same))


def chain(levels):
    """Tuples that each hold the one before twice: 2 to the power of the levels, were they walked one by one."""
    return b"\x80\x02)q\0" + b"".join(b"h\0h\0\x86q\0" for _ in range(levels)) + b"."


@pytest.mark.parametrize(
    "pickled",
    [
        pytest.param(chain(100_000), id="laughs"),
        pytest.param(b"\x80\x02]" + chain(100_000)[2:-1] + b"K\x01\x86a.", id="laughs in a list"),
        pytest.param(b"\x80\x02}" + chain(100_000)[2:-1] + b"K\x01s.", id="laughs as a key"),
        pytest.param(b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".", id="deep lists"),
        pytest.param(b"\x80\x02N" + b"\x85" * 200_000 + b".", id="deep tuples"),
        pytest.param(b"\x80\x02" + b"}X\0\0\0\0" * 200_000 + b"N" + b"s" * 200_000 + b".", id="deep dictionaries"),
        pytest.param(b"\x80\x02" + b"cx\ny\n)\x81" * 100_000 + b"b" * 99_999 + b".", id="deep states"),
        pytest.param(b"\x80\x02]q\0h\0a}h\0h\0s\x86.", id="list of itself"),
        pytest.param(b"\x80\x02" + b"(" * 500_000 + b".", id="marks"),
        pytest.param(b"\x80\x02N" + b"\x94" * 500_000 + b".", id="memo"),
        pytest.param(b"\x80\x02\x8b\xff\xff\xff\x7f" + b"1" * 1_000_000 + b".", id="long number that is cut off"),
        pytest.param(b"\x80\x02}\x8b\x40\x42\x0f\0" + b"1" * 1_000_000 + b"Ns.", id="long number as a key"),
        pytest.param(b"L" + b"9" * 1_000_000 + b"L\n.", id="long number as text"),
        pytest.param(b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f.", id="string of 2^63"),
        pytest.param(b"\x80\x04\x8e\0\0\0\0\0\1\0\0.", id="bytes of 2^40"),
        pytest.param(b"\x80\x05\x97\x98\x97\x86.", id="buffers that lie elsewhere"),
        pytest.param(b"\x80\x05\x96\xff\xff\xff\xff\0\0\0\0.", id="bytearray of 2^32"),
        pytest.param(b"\x80\x04\x95" + b"\xff" * 8 + b"N.", id="frame that lies"),
        pytest.param(b"S'\\400\\d'\n.", id="escapes that warn"),
        pytest.param(b"\x80\x02\x82\x01\x83\x01\0\x84\1\0\0\0.", id="extensions"),
        pytest.param(b"\x80\x02(lq\0" + b"h\0" * 10 + b"(" + b"h\0K\x01" * 50_000 + b"dQ.", id="persistent dictionary"),
        pytest.param(
            b"\x80\x02]q\0(" + b")" * 100_000 + b"e0ccollections\nOrderedDict\nq\x01" + b"h\x01h\0\x85R" * 100_000 + b".",
            id="one list for many dictionaries",
        ),
        pytest.param(
            b"\x80\x02}q\0(" + b"X\x01\0\0\0aN" * 100_000 + b"u0cx\ny\nq\x01]" + b"h\x01)\x81h\0ba" * 100_000 + b".",
            id="one state for many objects",
        ),
    ],
)
def test_bombs(pickled):
    began = time.perf_counter()
    for raw in (archive(pickled), older(pickled)):
        contents = watched(raw)
        assert contents is None or contents.tensors == []
    assert time.perf_counter() - began < 60  # a linear walk of the largest takes a few seconds


def test_calls_within_calls():
    value = ()
    for i in range(5000):
        name = ("_rebuild_from_type_v2", "_rebuild_from_type")[i % 2]
        value = (b"ctorch._tensor\n%sctorch._tensor\nTensor\n" % (name.encode() + b"\n"), value)
    head, tail = b"", b""
    while value:
        head, tail, value = head + b"(" + value[0], b"t" + tail, value[1]
    pickled = b"\x80\x02ctorch._tensor\n_rebuild_from_type\n" + head + b")" + tail + b"R."
    assert watched(archive(pickled)).tensors == []


def test_names_are_bounded():
    """A long key above many tensors: their names together would be larger than the file by far."""
    one = tensor_pickle(4, 0, (4,), (1,))[2:-1]
    tensor = one[one.index(b"ctorch._utils") : one.rindex(b"R") + 1] + b"q\xff"
    key = b"X" + struct.pack("<L", 4000) + b"k" * 4000
    below = b"\x80\x02}" + key + b"](" + tensor + b"h\xff" * 40_000 + b"es."
    with pytest.raises(ContainerError, match="names"):
        found(archive(below, **{"a/data/0": bytes(16)}))
    assert len(found(archive(below.replace(b"h\xff" * 40_000, b"h\xff" * 9), **{"a/data/0": bytes(16)})).tensors) == 10
    too_long = below.replace(key, b"X" + struct.pack("<L", 5000) + b"k" * 5000)
    contents = found(archive(too_long, **{"a/data/0": bytes(16)}))
    assert (contents.tensors, len(contents.regions)) == ([], 1)
    surrogate = b"\x80\x02}X\x03\0\0\0\xed\xa0\x80" + tensor + b"s."
    assert found(archive(surrogate, **{"a/data/0": bytes(16)})).tensors == []


def test_many_tensors():
    raw = saved({f"layers.{i}.weight": torch.full((2, 2), float(i)) for i in range(5000)})
    began = time.perf_counter()
    contents = find(lambda at, n: raw[at : at + n], len(raw))
    assert time.perf_counter() - began < 30
    assert len(contents.regions) == len(contents.tensors) == 5000
    assert bits_at(raw, contents.tensors[4321]) == struct.pack("<4f", *[4321.0] * 4)
