"""`tzip.safetensors` against the installed safetensors library, call by call: packed files, plain files, and what saves them.

The library's answer for the plain file is what every form of that file must give here: the same bits, or the same error.
"""

# ruff: noqa: B023, E402, SIM118 (lambdas are called at once; imports need torch; a handle is no mapping)

import errno
import inspect
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import forge
import ml_dtypes
import numpy as np
import pytest
from forge import BITS, noise, safetensors_bytes, weights
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tzip
from tzip.archive import Archive

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors", minversion="0.8")

import safetensors.numpy
import safetensors.torch

import tzip.safetensors
import tzip.safetensors.numpy
import tzip.safetensors.torch
from tzip.safetensors import SafetensorError

ours, theirs = tzip.safetensors, safetensors
PACKED = ("archive", "in_place")
FORMS = (*PACKED, "plain")
DIALECTS = (("pt", "mmap"), ("pt", "pread"), ("np", "mmap"), ("np", "pread"))
MAGIC = b"\x89TZIP"
DTYPES = [name for name in BITS if name != "C128"]  # which the library does not know
PAD = ("~pad", "U8", (1 << 17,), bytes(1 << 17))  # so that the file can become smaller in place

# ---------------------------------------------------------------- what is compared


def bits(value: Any) -> tuple[Any, ...]:
    """Return kind, element type, shape and bytes of a tensor of any framework."""
    module = type(value).__module__.partition(".")[0]
    if module == "torch":
        value = value.detach().cpu()
        flat = value.view(torch.uint8) if value.dtype.itemsize == 1 else value
        flat = flat.clone(memory_format=torch.contiguous_format).reshape(-1)
        return type(value), str(value.dtype), tuple(value.shape), flat.view(torch.uint8).numpy().tobytes()
    if module == "mlx":
        import mlx.core

        raw = value if value.size == 0 else mlx.core.view(value.reshape(-1), mlx.core.uint8)
        return type(value), str(value.dtype), tuple(value.shape), np.array(raw).tobytes()
    array = np.asarray(value)
    return type(value), array.dtype.str, array.dtype.name, array.shape, array.tobytes()


def plain_form(value: Any) -> Any:
    """Return a value as what can be compared with ==, tensors by their bits."""
    if isinstance(value, dict):
        return {key: plain_form(item) for key, item in value.items()}
    if isinstance(value, set):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [plain_form(item) for item in value]
    if value is None or isinstance(value, str | int | float | bytes | bytearray):
        return value
    return bits(value)


def outcome(call: Callable[[], Any]) -> tuple[Any, ...]:
    """Return ("value", what it returned) or ("error", the exception)."""
    try:
        value = call()
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as e:  # the library panics with one that is no Exception
        return "error", e
    return "value", plain_form(value)


def assert_same(mine: Callable[[], Any], genuine: Callable[[], Any], what: object = "") -> None:
    """Assert the same value, or an error of the same type (or a kind of it) with the same text."""
    got, want = outcome(mine), outcome(genuine)
    if want[0] == "value":
        assert got == want, f"{what}: {got[1]!r} instead of {want[1]!r}"
    else:
        assert got[0] == "error", f"{what}: {got[1]!r} instead of {want[1]!r}"
        assert isinstance(got[1], type(want[1])), f"{what}: {got[1]!r} instead of {want[1]!r}"
        assert str(got[1]) == str(want[1]), f"{what}: {got[1]!r} instead of {want[1]!r}"


# ---------------------------------------------------------------- files


class Forms(dict[str, Path]):
    """One safetensors file as each form's path; `genuine` is the plain one again, for the library's eyes only."""

    genuine: Path
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]]


def forms_of(folder: Path, data: bytes, level: str = "default", *, smaller: bool = True) -> Forms:
    out = Forms()
    for name in ("genuine", "archive", *FORMS[1:]):
        (folder / name).mkdir(parents=True)
        out[name] = folder / name / "model.safetensors"
        out[name].write_bytes(data)
    out.genuine = out.pop("genuine")
    tzip.pack(out["archive"], level=level, threads=1)
    out["archive"].unlink()
    out["archive"] = out["archive"].with_name("model.safetensors.tzip")
    report = tzip.pack_in_place([out["in_place"]], level=level, threads=1)
    assert bool(report.changed) == smaller, report
    assert out["archive"].read_bytes().startswith(MAGIC)
    assert (out["in_place"].read_bytes() != data) == smaller
    return out


def special(dtype: str, n: int, seed: int) -> bytes:
    """Return n random elements of a dtype, so NaN with payloads; the first two are all ones and minus zero."""
    raw = bytearray(noise(n * BITS[dtype] // 8, seed))
    size = BITS[dtype] // 8
    for i, element in enumerate((b"\xff" * size, b"\0" * (size - 1) + b"\x80")):
        if size and n > i:
            raw[i * size : (i + 1) * size] = element
    return bytes(raw)


SHAPES = ((), (0,), (3, 0, 5), (1,), (7,), (255, 3), (2, 3, 4, 5), (1, 1, 8), (4099,))


def every_dtype() -> list[tuple[str, str, tuple[int, ...], bytes]]:
    tensors = []
    for dtype in DTYPES:
        for i, shape in enumerate(SHAPES):
            n = int(np.prod(shape, dtype=np.int64))
            if n * BITS[dtype] % 8:
                shape, n = (*shape, 8), n * 8
            tensors.append((f"{dtype}.{i}", dtype, shape, special(dtype, n, i)))
        if BITS[dtype] * 6 % 8 == 0 and BITS[dtype] < 8:
            tensors.append((f"{dtype}.odd", dtype, (4, 3), special(dtype, 12, 99)))
    return tensors


@pytest.fixture(scope="module")
def dtypes(tmp_path_factory: pytest.TempPathFactory) -> Forms:
    tensors = [*every_dtype(), PAD]
    forms = forms_of(tmp_path_factory.mktemp("dtypes"), safetensors_bytes(tensors, {"format": "pt"}))
    forms.tensors = {name: (dtype, tuple(shape), raw) for name, dtype, shape, raw in tensors}
    return forms


LARGE = {
    "bf16": ("BF16", (3000, 1021)),  # 3 chunks of 2^20 elements
    "f32": ("F32", (700, 3, 500)),  # 2 chunks
    "u8": ("U8", (1 << 20,)),
    "i64": ("I64", (17,)),
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Forms:
    tensors = []
    for i, (name, (dtype, shape)) in enumerate(LARGE.items()):
        n = int(np.prod(shape))
        raw = weights(n, i, dtype) if dtype in ("BF16", "F32") else noise(n * BITS[dtype] // 8, i)
        tensors.append((name, dtype, shape, raw))
    forms = forms_of(tmp_path_factory.mktemp("large"), safetensors_bytes(tensors))
    forms.tensors = {name: (dtype, tuple(shape), raw) for name, dtype, shape, raw in tensors}
    return forms


GRID_DTYPES = ("F32", "BF16", "U8", "I64", "BOOL", "F64", "C64")
GRID = [shape for depth in range(5) for shape in itertools.product((0, 1, 2, 3, 5), repeat=depth)]


def grid_name(shape: tuple[int, ...]) -> str:
    return "t" + "x".join(map(str, shape))


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Forms:
    """A file with a tensor of each small shape of up to four dimensions."""
    tensors = []
    for i, shape in enumerate(GRID):
        dtype = GRID_DTYPES[i % len(GRID_DTYPES)]
        n = int(np.prod(shape, dtype=np.int64))
        raw = special(dtype, n, i) if dtype != "BOOL" else bytes(b & 1 for b in noise(n, i))
        tensors.append((grid_name(shape), dtype, shape, raw))
    tensors.append(PAD)
    return forms_of(tmp_path_factory.mktemp("grid"), safetensors_bytes(tensors))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The chunks that are decoded during a test."""
    calls: list[tuple[int, int]] = []
    genuine = Archive.decode_chunk

    def decode_chunk(self: Archive, run: int, chunk: int, out: Any = None) -> Any:
        calls.append((run, chunk))
        return genuine(self, run, chunk, out)

    monkeypatch.setattr(Archive, "decode_chunk", decode_chunk)
    return calls


def in_file_order(genuine: Path, names: list[str]) -> list[str]:
    """Return the names with those of empty tensors at one place sorted: their order is not defined."""
    with genuine.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sorted(names, key=lambda name: (header[name]["data_offsets"], name))


# ---------------------------------------------------------------- whole tensors


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("framework", "backend"), DIALECTS)
def test_every_dtype_is_what_the_library_reads(dtypes: Forms, form: str, framework: str, backend: str) -> None:
    """Where the library of 0.8.0 fails (numpy: float8, float4; pread: float4) the bits of the file are asked for instead."""
    with (
        ours.safe_open(dtypes[form], framework, backend=backend) as mine,
        theirs.safe_open(dtypes.genuine, framework, backend=backend) as genuine,
    ):
        compared = 0
        for name, (dtype, shape, raw) in dtypes.tensors.items():
            want = outcome(lambda: genuine.get_tensor(name))
            if framework == "pt" and odd_float4(dtype, shape):
                assert outcome(lambda: mine.get_tensor(name))[0] == "error"  # more of it below
            elif form != "plain" and want[0] == "error" and dtype in BROKEN[framework]:
                tensor = mine.get_tensor(name)
                assert raw_bytes(tensor, dtype) == raw, name
                assert tuple(tensor.shape) == expected_shape(framework, dtype, shape), name
            else:
                compared += 1
                assert_same(lambda: mine.get_tensor(name), lambda: genuine.get_tensor(name), name)
                if want[0] == "value":
                    assert want[1][-1] == raw, name
            sliced, original = mine.get_slice(name), genuine.get_slice(name)
            assert sliced.get_shape() == original.get_shape() == list(shape), name
            assert type(sliced.get_shape()) is type(original.get_shape())
            assert sliced.get_dtype() == original.get_dtype() == dtype, name
        assert compared > 100


BROKEN = {
    "pt": ("F4",),
    "np": ("F4", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
}


def odd_float4(dtype: str, shape: tuple[int, ...]) -> bool:
    """Whether torch, which holds float4 in pairs, has no form for the tensor."""
    return dtype == "F4" and shape[-1] % 2 == 1


def raw_bytes(tensor: Any, dtype: str) -> bytes:
    """Return a tensor's bytes as a file has them: numpy's float4, one a byte, in pairs."""
    if isinstance(tensor, torch.Tensor) or dtype != "F4":
        found: bytes = bits(tensor)[-1]
        return found
    assert tensor.dtype == ml_dtypes.float4_e2m1fn
    codes = tensor.reshape(-1).view(np.uint8)
    assert codes.size == 0 or codes.max() < 16
    return (codes[0::2] | codes[1::2] << 4).tobytes()


def expected_shape(framework: str, dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-1], shape[-1] // 2) if framework == "pt" and dtype == "F4" else shape


def test_broken_dtypes_of_the_library_are_those_that_the_tests_name(dtypes: Forms) -> None:
    """The test above must not excuse anything else: what the library cannot read is F6, and what is named."""
    for framework, backend in DIALECTS:
        with theirs.safe_open(dtypes.genuine, framework, backend=backend) as genuine:
            failing = {d for n, (d, _, _) in dtypes.tensors.items() if outcome(lambda: genuine.get_tensor(n))[0] == "error"}
        assert failing - {"F6_E2M3", "F6_E3M2"} <= set(BROKEN[framework])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("framework", ["pt", "torch", "pytorch", "np", "numpy"])
def test_names_order_and_metadata(dtypes: Forms, form: str, framework: str) -> None:
    mine, genuine = ours.safe_open(dtypes[form], framework), theirs.safe_open(dtypes.genuine, framework)
    for method in ("keys", "metadata"):
        assert_same(getattr(mine, method), getattr(genuine, method), method)
        assert type(getattr(mine, method)()) is type(getattr(genuine, method)())
    want = in_file_order(dtypes.genuine, genuine.offset_keys())
    assert in_file_order(dtypes.genuine, mine.offset_keys()) == want
    assert want == in_file_order(dtypes.genuine, list(dtypes.tensors))
    name = "F32.5"
    assert_same(lambda: mine.get_tensor(name), lambda: genuine.get_tensor(name))
    assert_same(lambda: mine.get_tensor(name=name), lambda: genuine.get_tensor(name=name))
    assert_same(lambda: mine.get_slice(name)[1:3], lambda: genuine.get_slice(name)[1:3])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("framework", "backend"), DIALECTS)
def test_all_tensors_of_a_large_file(large: Forms, form: str, framework: str, backend: str) -> None:
    with (
        ours.safe_open(large[form], framework, backend=backend) as mine,
        theirs.safe_open(large.genuine, framework, backend=backend) as genuine,
    ):
        assert mine.offset_keys() == genuine.offset_keys() == list(LARGE)
        assert_same(mine.get_tensors, genuine.get_tensors)
        for name in reversed(LARGE):
            assert_same(lambda: mine.get_tensor(name), lambda: genuine.get_tensor(name), name)


@pytest.mark.parametrize("dtype", ["F6_E2M3", "F6_E3M2"])
def test_a_file_with_a_tensor_that_no_framework_knows(tmp_path: Path, dtype: str) -> None:
    forms = forms_of(tmp_path, safetensors_bytes([("a", "F32", (3,), bytes(12)), ("six", dtype, (4,), b"abc"), PAD]))
    for form, (framework, backend) in itertools.product(FORMS, DIALECTS):
        mine = ours.safe_open(forms[form], framework, backend=backend)
        genuine = theirs.safe_open(forms.genuine, framework, backend=backend)
        for use in (
            lambda f: f.get_tensors(),
            lambda f: f.get_tensor("six"),
            lambda f: f.get_slice("six")[...],
            lambda f: f.get_slice("six")[0:4],
            lambda f: f.get_slice("six").get_shape(),
            lambda f: f.get_slice("six").get_dtype(),
            lambda f: f.get_tensor("a"),
        ):
            assert_same(lambda: use(mine), lambda: use(genuine), (form, framework, backend))
    assert_same(lambda: ours.torch.load_file(forms["archive"]), lambda: safetensors.torch.load_file(forms.genuine))
    packed, genuine = forms["archive"].read_bytes(), forms.genuine.read_bytes()
    assert_same(lambda: ours.torch.load(packed), lambda: safetensors.torch.load(genuine))


@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_float4_that_torch_cannot_hold(dtypes: Forms, form: str, backend: str) -> None:
    """An odd last dimension is refused as the library (mmap) does."""
    with ours.safe_open(dtypes[form], "pt", backend=backend) as mine, theirs.safe_open(dtypes.genuine, "pt") as genuine:
        for name in ("F4.odd", "F4.2"):
            assert odd_float4(*dtypes.tensors[name][:2])
            assert_same(lambda: mine.get_tensor(name), lambda: genuine.get_tensor(name), name)
            with pytest.raises(SafetensorError):
                mine.get_slice(name)[...]
        with pytest.raises(SafetensorError):
            mine.get_tensors()


@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize("framework", ["pt", "np"])
def test_tensors_are_independent_and_writable(large: Forms, form: str, framework: str) -> None:
    """What is done to a tensor shows in no other, nor in the file."""
    before = large[form].read_bytes()
    with ours.safe_open(large[form], framework) as mine, theirs.safe_open(large.genuine, framework) as genuine:
        for read in (lambda: mine.get_tensor("i64"), lambda: mine.get_slice("i64")[2:9], lambda: mine.get_tensors()["i64"]):
            first, untouched = read(), bits(read())
            first[0] = 1
            first[1:] = 3
            assert bits(read()) == untouched
        if framework == "np":
            assert mine.get_tensor("i64").flags.writeable >= genuine.get_tensor("i64").flags.writeable
    assert large[form].read_bytes() == before


@pytest.mark.parametrize("form", PACKED)
def test_float4_by_slice(dtypes: Forms, form: str) -> None:
    """Which the library of 0.8.0 cannot: by rows as whole tensors of it are."""
    names = [name for name, (dtype, shape, _) in dtypes.tensors.items() if dtype == "F4" and not odd_float4(dtype, shape)]
    assert len(names) == 7
    with theirs.safe_open(dtypes.genuine, "pt") as genuine:
        wholes = {name: genuine.get_tensor(name) for name in names}
    indices: list[Any] = [..., slice(None), 0, -1, slice(1, 3), slice(None, None, 2), slice(-2, None)]
    indices += [
        (..., 0),
        (0, slice(0, 2)),
        (slice(None), slice(1, 2)),
        None,
        (),
        10_000,
        (0, 0, 0, 0, 0),
        slice(None, None, -1),
    ]
    for backend in ("mmap", "pread"):
        with ours.safe_open(dtypes[form], "pt", backend=backend) as mine:
            for name, index in itertools.product(names, indices):
                assert_same(
                    lambda: mine.get_slice(name)[index],
                    lambda: wholes[name][index],
                    f"{name}[{index}] {backend}",
                )
    with ours.safe_open(dtypes[form], "np") as mine:
        for name in names:
            raw, shape = np.frombuffer(dtypes.tensors[name][2], np.uint8), dtypes.tensors[name][1]
            whole = np.stack([raw & 15, raw >> 4], axis=-1).reshape(shape).view(ml_dtypes.float4_e2m1fn)
            assert bits(mine.get_tensor(name)) == bits(whole)
            for index in indices:
                assert_same(lambda: mine.get_slice(name)[index], lambda: whole[index], f"{name}[{index}]")


@pytest.mark.parametrize("form", PACKED)
def test_float8_by_slice_as_numpy(dtypes: Forms, form: str) -> None:
    """Which the library of 0.8.0 cannot."""
    with ours.safe_open(dtypes[form], "np") as mine:
        for dtype in BROKEN["np"][1:]:
            shape, raw = dtypes.tensors[f"{dtype}.5"][1:]
            whole = mine.get_tensor(f"{dtype}.5")
            assert whole.shape == shape
            assert whole.tobytes() == raw
            for index in (slice(None), slice(3, 9), (slice(0, 255), 1), (7, 2), -1, ..., (slice(None, None, 2), slice(1, 3))):
                got = mine.get_slice(f"{dtype}.5")[index]
                assert np.asarray(got).tobytes() == whole[index].tobytes(), (dtype, index)
                assert got.shape == whole[index].shape


# ---------------------------------------------------------------- headers


def with_header(text: str, data: bytes = b"") -> bytes:
    raw = text.encode()
    return len(raw).to_bytes(8, "little") + raw + data


ENTRY = '{"dtype":"U8","shape":[2],"data_offsets":[%d,%d]}'
ZEROS = 1 << 16
TAIL = ',"~":{"dtype":"U8","shape":[65536],"data_offsets":[%d,%d]}}'


def padded(text: str, data: bytes) -> bytes:
    """A file of the given header, which lacks its last brace, with zeros as its last tensor."""
    return with_header(text + TAIL % (len(data), len(data) + ZEROS), data + bytes(ZEROS))


def pairs(*names: str) -> bytes:
    """A file of tensors of two bytes with these names as JSON has them."""
    body = ",".join(f'"{name}":{ENTRY % (2 * i, 2 * i + 2)}' for i, name in enumerate(names))
    return padded("{" + body, bytes(range(1, 2 * len(names) + 1)))


HEADERS = {
    "no metadata": pairs("a", "b"),
    "empty metadata": padded('{"__metadata__":{},"a":' + ENTRY % (0, 2), b"ab"),
    "null metadata": padded('{"__metadata__":null,"a":' + ENTRY % (0, 2), b"ab"),
    "metadata last": padded('{"a":' + ENTRY % (0, 2) + ',"__metadata__":{"z":"1","a":"","":"\\u00e9\\n","é":"ü"}', b"ab"),
    "fields in another order": padded('{"a":{"data_offsets":[0,2],"shape":[1,2],"dtype":"I8"}', b"ab"),
    "unknown fields": padded('{"a":{"x":[1,{"dtype":"F64"}],"dtype":"I8","y":null,"shape":[2],"data_offsets":[0,2]}', b"ab"),
    "not in the order of the data": padded(
        '{"b":' + ENTRY % (4, 6) + ',"c":' + ENTRY % (0, 2) + ',"a":' + ENTRY % (2, 4), b"ccaabb"
    ),
    "a name twice": padded(
        '{"a":' + ENTRY % (2, 4) + ',"b":' + ENTRY % (0, 2) + ',"a":{"dtype":"I8","shape":[3],"data_offsets":[2,5]}', b"bbaaa"
    ),
    "spaces": padded('{ \n\t"a" :\r\n' + (ENTRY % (0, 2)).replace(":", " : ").replace(",", " ,\t"), b"ab"),
    "unicode": pairs("é", "e\u0301", "漢字", "😀", "\u2028", " ", "a b", "\x7f", "ﬁ", "K"),
    "escapes": pairs("\\u00e9", "\\ud83d\\ude00", "\\u0000", "\\n\\t\\\\\\/\\\"", "\\u0041", "", "..", "a/../b", "\\u001f"),
    "numbers as names": pairs("10", "9", "1", "0", "-1", "__proto__", "__metadata", "metadata__"),
    "a long name": pairs("x" * 5000, "y"),
    "empty tensors between": padded(
        '{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"b":'
        + ENTRY % (0, 2)
        + ',"c":{"dtype":"BF16","shape":[4,0],"data_offsets":[2,2]},"d":'
        + ENTRY % (2, 4),
        b"bbdd",
    ),
    "not aligned": padded('{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"b":{"dtype":"F64","shape":[2],'
                          '"data_offsets":[1,17]},"c":{"dtype":"BF16","shape":[3],"data_offsets":[17,23]}', noise(23)),
    "written by the library": safetensors.numpy.save({"b": np.zeros(ZEROS), "a": np.arange(7, dtype="<u2")}, {"k": "v"}),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_odd_headers(tmp_path: Path, name: str) -> None:
    forms = forms_of(tmp_path, HEADERS[name])
    for form, (framework, backend) in itertools.product(FORMS, DIALECTS):
        mine = ours.safe_open(forms[form], framework, backend=backend)
        genuine = theirs.safe_open(forms.genuine, framework, backend=backend)
        assert mine.keys() == genuine.keys()
        assert len(mine.keys()) >= 2
        assert mine.metadata() == genuine.metadata(), (form, framework)
        assert in_file_order(forms.genuine, mine.offset_keys()) == in_file_order(forms.genuine, genuine.offset_keys())
        assert_same(mine.get_tensors, genuine.get_tensors)
        for key in genuine.keys():
            assert_same(lambda: mine.get_tensor(key), lambda: genuine.get_tensor(key), key)
            assert_same(lambda: mine.get_slice(key)[...], lambda: genuine.get_slice(key)[...], key)
            assert mine.get_slice(key).get_shape() == genuine.get_slice(key).get_shape()
        for key in ("", "é", "e\u0301", "a", "nope", "__metadata__"):
            if key not in genuine.keys():
                assert_same(lambda: mine.get_tensor(key), lambda: genuine.get_tensor(key), ascii(key))
    for form in PACKED:
        tzip.unpack(forms[form], tmp_path / f"unpacked {form}")
        assert next((tmp_path / f"unpacked {form}").iterdir()).read_bytes() == HEADERS[name]


@pytest.mark.parametrize(
    ("before", "behind"), [("", ""), ("", " " * 61), ("", "\n\t "), (" ", ""), ("\n  ", " ")], ids=repr
)  # fmt: skip
def test_space_around_the_header(tmp_path: Path, before: str, behind: str) -> None:
    """Whatever the library reads as a file must be readable packed, too."""
    data = padded('{"a":' + ENTRY % (0, 2), b"ab")
    text = data[8 : 8 + int.from_bytes(data[:8], "little")].decode()
    data = with_header(before + text + behind, data[8 + len(text) :])
    plain = tmp_path / "plain.safetensors"
    plain.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that tzip takes it for no safetensors file, which is tested below
        tzip.pack(plain)
    genuine = outcome(lambda: theirs.safe_open(plain, "pt").get_tensors())
    if genuine[0] == "value":
        assert outcome(lambda: ours.safe_open(f"{plain}.tzip", "pt").get_tensors()) == genuine
    else:
        with pytest.raises(SafetensorError):
            ours.safe_open(f"{plain}.tzip", "pt")


@pytest.mark.parametrize(
    "header", [" {%s}", "\n{%s}", "{%s", "{%s}}", '{%s,"b":{"dtype":"U8","shape":[2],"data_offsets":[5,7]}}']
)
def test_a_small_file_that_tzip_takes_for_no_safetensors_file_is_not_read_as_an_empty_one(tmp_path: Path, header: str) -> None:
    """Either its tensors come back, or it is refused: never `{}` for a file that has some."""
    plain = tmp_path / "plain.safetensors"
    plain.write_bytes(with_header(header % ('"a":' + ENTRY % (0, 2)), b"ab"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        tzip.pack(plain)
    got, want = outcome(lambda: ours.torch.load_file(f"{plain}.tzip")), outcome(lambda: safetensors.torch.load_file(plain))
    assert got[0] == want[0], got
    assert got == want if want[0] == "value" else isinstance(got[1], SafetensorError)


@pytest.mark.parametrize("text", ["{}", "{}      ", '{"__metadata__":{}}', '{"__metadata__":{"a":"b"}}'])
def test_no_tensors_at_all(tmp_path: Path, text: str) -> None:
    forms = forms_of(tmp_path, with_header(text), smaller=False)
    for form, framework in itertools.product(FORMS, ("pt", "np")):
        with ours.safe_open(forms[form], framework) as mine, theirs.safe_open(forms.genuine, framework) as genuine:
            for method in ("keys", "offset_keys", "metadata", "get_tensors"):
                assert_same(getattr(mine, method), getattr(genuine, method), method)
            assert_same(lambda: mine.get_tensor("a"), lambda: genuine.get_tensor("a"))
    assert_same(
        lambda: ours.torch.load(forms["archive"].read_bytes()), lambda: safetensors.torch.load(forms.genuine.read_bytes())
    )


# ---------------------------------------------------------------- errors

OPENINGS = {
    "nothing": lambda open_, p: open_(),
    "no framework": lambda open_, p: open_(p),
    "no file": lambda open_, p: open_(framework="pt"),
    "unknown framework": lambda open_, p: open_(p, "zzz"),
    "framework in capitals": lambda open_, p: open_(p, "PT"),
    "empty framework": lambda open_, p: open_(p, ""),
    "framework number": lambda open_, p: open_(p, 1),
    "framework None": lambda open_, p: open_(p, None),
    "framework bytes": lambda open_, p: open_(p, b"pt"),
    "framework list": lambda open_, p: open_(p, ["pt"]),
    "unknown device": lambda open_, p: open_(p, "pt", "zz"),
    "device float": lambda open_, p: open_(p, "pt", 1.5),
    "device negative": lambda open_, p: open_(p, "pt", -1),
    "device huge": lambda open_, p: open_(p, "pt", 1 << 70),
    "device object": lambda open_, p: open_(p, "pt", torch.device("cpu")),
    "device meta": lambda open_, p: open_(p, "pt", "meta"),
    "device bytes": lambda open_, p: open_(p, "pt", b"cpu"),
    "device list": lambda open_, p: open_(p, "pt", ["cpu"]),
    "device empty": lambda open_, p: open_(p, "pt", ""),
    "device cpu:0": lambda open_, p: open_(p, "pt", "cpu:0"),
    "device cuda:x": lambda open_, p: open_(p, "pt", "cuda:x"),
    "device cuda:-1": lambda open_, p: open_(p, "pt", "cuda:-1"),
    "device of numpy": lambda open_, p: open_(p, "np", "cuda:0"),
    "device number of numpy": lambda open_, p: open_(p, "numpy", 0),
    "device xpu of numpy": lambda open_, p: open_(p, "np", "xpu"),
    "device by name": lambda open_, p: open_(p, framework="np", device="mps"),
    "four positions": lambda open_, p: open_(p, "np", "cpu", "mmap"),
    "unknown backend": lambda open_, p: open_(p, "pt", backend="zz"),
    "unknown backend of numpy": lambda open_, p: open_(p, "np", backend="zz"),
    "backend None": lambda open_, p: open_(p, "pt", backend=None),
    "backend number": lambda open_, p: open_(p, "pt", backend=1),
    "backend in capitals": lambda open_, p: open_(p, "pt", backend="MMAP"),
    "backend unhashable": lambda open_, p: open_(p, "pt", backend=[]),
    "unknown keyword": lambda open_, p: open_(p, "pt", wat=1),
    "filename twice": lambda open_, p: open_(p, framework="pt", filename=p),
    "framework twice": lambda open_, p: open_(p, "pt", framework="pt"),
    "two errors": lambda open_, p: open_(p, "zzz", "zz", backend="zz"),
    "framework and device": lambda open_, p: open_(p, "zzz", "zz"),
    "device and backend": lambda open_, p: open_(p, "pt", "zz", backend="zz"),
    "filename bytes": lambda open_, p: open_(os.fsencode(p), "pt"),
    "filename number": lambda open_, p: open_(3, "pt"),
    "filename None": lambda open_, p: open_(None, "pt"),
    "filename list": lambda open_, p: open_([p], "pt"),
    "filename with a zero": lambda open_, p: open_(f"{p}\0", "pt"),
    "filename empty": lambda open_, p: open_("", "pt"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OPENINGS)
def test_opening_in_wrong_ways(large: Forms, form: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (str, Path):
        want = outcome(lambda: OPENINGS[name](theirs.safe_open, path(large.genuine.name)))
        monkeypatch.chdir(large.genuine.parent)
        want = outcome(lambda: OPENINGS[name](theirs.safe_open, path("model.safetensors")))
        assert want[0] == "error"
        monkeypatch.chdir(large[form].parent)
        got = outcome(lambda: OPENINGS[name](ours.safe_open, path(large[form].name)))
        text = str(want[1]).replace("model.safetensors", large[form].name)
        assert got[0] == "error", name
        assert isinstance(got[1], type(want[1])), f"{got[1]!r} instead of {want[1]!r}"
        assert str(got[1]) == text


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("device", ["cpu", None, "cuda", "cuda:0", 0, True, "mps", "npu", "xpu", "xla", "mlu", "musa", "hpu"])
def test_devices(large: Forms, form: str, device: Any) -> None:
    """Opened alike; what cannot be moved there (by whom torch says in words of its own) is refused, whole and by slice."""
    mine, genuine = ours.safe_open(large[form], "pt", device), theirs.safe_open(large.genuine, "pt", device)
    assert mine.keys() == genuine.keys()
    for read in (lambda f: f.get_tensor("i64"), lambda f: f.get_slice("i64")[3:7], lambda f: f.get_slice("i64")[[1, 2]]):
        got, want = outcome(lambda: read(mine)), outcome(lambda: read(genuine))
        assert got[0] == want[0], (device, got, want)
        if want[0] == "value":
            assert got == want
    if device in ("cpu", None):
        assert_same(lambda: ours.safe_open(large[form], "np", device).get_tensors(),
                    lambda: theirs.safe_open(large.genuine, "np", device).get_tensors())  # fmt: skip


@pytest.mark.parametrize("framework", ["pt", "np"])
@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_files_that_cannot_be_opened(tmp_path: Path, framework: str, backend: str) -> None:
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    contents = {
        "empty": b"",
        "seven": b"1234567",
        "zeros": bytes(8),
        "too long": (1 << 40).to_bytes(8, "little") + b"{}",
        "longer than the file": (100).to_bytes(8, "little") + b"{}",
        "no JSON": with_header("hello world", b""),
        "no UTF-8": (2).to_bytes(8, "little") + b"\xff\xff",
        "hole": with_header('{"a":' + ENTRY % (1, 3) + "}", b"abc"),
        "overlap": with_header('{"a":' + ENTRY % (0, 2) + ',"b":' + ENTRY % (1, 3) + "}", b"abc"),
        "short": with_header('{"a":' + ENTRY % (0, 2) + "}", b"a"),
        "long": with_header('{"a":' + ENTRY % (0, 2) + "}", b"abc"),
        "metadata": with_header('{"__metadata__":{"a":1}}'),
        "list": with_header("[]"),
        "dtype": with_header('{"a":{"dtype":"X9","shape":[2],"data_offsets":[0,2]}}', b"ab"),
        "trailing NUL": with_header("{}\0\0"),
        "a pickle": b"PK\x03\x04" + noise(100),
    }
    paths = [tmp_path / "missing.safetensors", tmp_path / "missing" / "a.tzip", folder]
    for name, data in contents.items():
        paths.append(tmp_path / f"{name}.safetensors")
        paths[-1].write_bytes(data)
    for path in paths:
        assert outcome(lambda: theirs.safe_open(path, framework, backend=backend))[0] == "error", path
        assert_same(
            lambda: ours.safe_open(path, framework, backend=backend),
            lambda: theirs.safe_open(path, framework, backend=backend),
            path.name,
        )
        assert_same(lambda: ours.torch.load_file(str(path)), lambda: safetensors.torch.load_file(str(path)), path.name)
        if path.is_file():
            data = path.read_bytes()
            assert_same(lambda: ours.torch.load(data), lambda: safetensors.torch.load(data), path.name)
            assert_same(lambda: ours.numpy.load(data), lambda: safetensors.numpy.load(data), path.name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("framework", ["pt", "np"])
def test_asking_for_what_is_not_there(large: Forms, form: str, framework: str) -> None:
    mine, genuine = ours.safe_open(large[form], framework), theirs.safe_open(large.genuine, framework)
    for name in ("nope", "", "BF16", "bf16 ", "a\nb", 1, None, b"bf16", ["bf16"], np.str_("bf16"), np.str_("x")):
        assert_same(lambda: mine.get_tensor(name), lambda: genuine.get_tensor(name), repr(name))
        want = outcome(lambda: genuine.get_slice(name).get_shape())
        if want[0] == "error":
            assert_same(lambda: mine.get_slice(name), lambda: genuine.get_slice(name), repr(name))
        else:
            assert mine.get_slice(name).get_shape() == want[1]


@pytest.mark.parametrize("form", FORMS)
def test_asking_for_a_name_that_is_no_unicode(large: Forms, form: str) -> None:
    mine, genuine = ours.safe_open(large[form], "pt"), theirs.safe_open(large.genuine, "pt")
    for call in (lambda f: f.get_tensor("\ud800"), lambda f: f.get_slice("a\udfff")):
        assert_same(lambda: call(mine), lambda: call(genuine))


WRONG_CALLS = {
    "get_tensor()": lambda f: f.get_tensor(),
    "get_tensor of two": lambda f: f.get_tensor("i64", "u8"),
    "get_tensor by another keyword": lambda f: f.get_tensor(tensor="i64"),
    "get_tensor name twice": lambda f: f.get_tensor("i64", name="i64"),
    "get_tensors of one": lambda f: f.get_tensors("i64"),
    "get_slice()": lambda f: f.get_slice(),
    "get_slice of two": lambda f: f.get_slice("i64", 0),
    "keys of one": lambda f: f.keys(1),
    "offset_keys of one": lambda f: f.offset_keys(1),
    "metadata of one": lambda f: f.metadata(1),
    "metadata by keyword": lambda f: f.metadata(x=1),
    "get_shape of one": lambda f: f.get_slice("i64").get_shape(1),
    "get_dtype of one": lambda f: f.get_slice("i64").get_dtype(1),
    "__exit__()": lambda f: f.__exit__(),
    "__exit__ of four": lambda f: f.__exit__(None, None, None, None),
    "__enter__ of one": lambda f: f.__enter__(1),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_numbers_of_arguments_are_refused(large: Forms, form: str, name: str) -> None:
    genuine = outcome(lambda: WRONG_CALLS[name](theirs.safe_open(large.genuine, "pt")))
    got = outcome(lambda: WRONG_CALLS[name](ours.safe_open(large[form], "pt")))
    assert genuine[0] == "error"
    assert type(genuine[1]) is TypeError
    assert got[0] == "error", got[1]
    assert type(got[1]) is TypeError


@pytest.mark.parametrize("form", FORMS)
def test_what_a_handle_is_not(large: Forms, form: str) -> None:
    """No mapping, no sequence: code that asks `"a" in f` must fail with packed files where it does with plain ones."""
    mine, genuine = ours.safe_open(large[form], "pt"), theirs.safe_open(large.genuine, "pt")
    for use in (
        len,
        iter,
        lambda f: f["i64"],
        lambda f: "i64" in f,
        lambda f: f.nope,
        lambda f: f.close(),
        lambda f: len(f.get_slice("i64")),
        lambda f: f.get_slice("i64").shape,
        lambda f: f.get_slice("i64").dtype,
    ):
        want, got = outcome(lambda: use(genuine)), outcome(lambda: use(mine))
        assert want[0] == got[0] == "error"
        assert type(got[1]) is type(want[1])
    for count in (1, 3, 100):
        assert_same(
            lambda: [*itertools.islice(mine.get_slice("i64"), count)],
            lambda: [*itertools.islice(genuine.get_slice("i64"), count)],
        )
    public = {name for name in dir(genuine) if not name.startswith("_")}
    assert public <= {name for name in dir(mine) if not name.startswith("_")}
    assert isinstance(mine, ours.safe_open)
    assert isinstance(genuine, ours.safe_open)
    assert bool(mine) is bool(genuine) is True


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("framework", "backend"), DIALECTS)
def test_closed_files(large: Forms, form: str, framework: str, backend: str) -> None:
    """All is refused, but slices and tensors taken before live on."""
    handles = []
    for open_, path in ((ours.safe_open, large[form]), (theirs.safe_open, large.genuine)):
        with open_(path, framework, backend=backend) as f:
            handles.append((f, f.get_slice("bf16"), f.get_tensor("i64")))
    (mine, sliced, tensor), (genuine, their_slice, their_tensor) = handles
    for use in (
        lambda f: f.keys(),
        lambda f: f.offset_keys(),
        lambda f: f.metadata(),
        lambda f: f.get_tensors(),
        lambda f: f.get_tensor("i64"),
        lambda f: f.get_tensor("nope"),
        lambda f: f.get_slice("i64"),
        lambda f: f.__exit__(None, None, None),
        lambda f: f.__enter__().keys(),
    ):
        assert_same(lambda: use(mine), lambda: use(genuine))
    assert outcome(mine.keys)[0] == "error"
    for index in (0, slice(1000, 1100), (slice(5, 7), slice(3, 9)), ..., 3000):
        assert_same(lambda: sliced[index], lambda: their_slice[index], index)
    assert sliced.get_shape() == their_slice.get_shape()
    assert sliced.get_dtype() == their_slice.get_dtype()
    assert bits(tensor) == bits(their_tensor)


@pytest.mark.parametrize("form", FORMS)
def test_closed_files_asked_for_what_is_no_name(large: Forms, form: str) -> None:
    mine, genuine = ours.safe_open(large[form], "pt"), theirs.safe_open(large.genuine, "pt")
    for f in (mine, genuine):
        f.__exit__(None, None, None)
    assert_same(lambda: mine.get_tensor(1), lambda: genuine.get_tensor(1))
    assert_same(lambda: mine.get_slice(None), lambda: genuine.get_slice(None))


@pytest.mark.parametrize("form", PACKED)
def test_an_exception_within_with_comes_out(large: Forms, form: str) -> None:
    with pytest.raises(KeyError, match="mine"), ours.safe_open(large[form], "pt"):
        raise KeyError("mine")


@pytest.mark.parametrize("form", PACKED)
def test_files_are_let_go(large: Forms, form: str) -> None:
    """Neither a handle that is dropped nor one that is closed keeps a file open."""

    def open_files() -> int:
        return sum(os.path.realpath(f"/proc/self/fd/{fd}") == str(large[form].resolve()) for fd in os.listdir("/proc/self/fd"))

    if not os.path.isdir("/proc/self/fd"):
        assert os.name == "nt" or not os.path.isdir("/proc")
        return
    before = open_files()
    for _ in range(3):
        ours.safe_open(large[form], "pt").get_tensor("i64")
        with ours.safe_open(large[form], "np") as f:
            f.get_slice("u8")[:5]
        del f
    assert open_files() == before


# ---------------------------------------------------------------- indexing


class Index:
    """An integer in all but type."""

    def __index__(self) -> int:
        return 1


INDICES: list[Any] = [
    0, 1, -1, -2, 2, 4, 5, 100, -100, 2**31, 2**63, -(2**63) - 1, 2**70,
    True, False, None, ..., (), (...,), (..., ...), (None,), (None, ..., None),
    slice(None), slice(1, 3), slice(0, 0), slice(3, 1), slice(None, 2), slice(2, None), slice(-2, None), slice(None, -1),
    slice(-3, -1), slice(0, 100), slice(50, 100), slice(-100, 100), slice(None, None, 2), slice(1, None, 2), slice(0, 5, 3),
    slice(None, None, 1), slice(None, None, 100), slice(None, None, -1), slice(3, None, -2), slice(None, None, 0),
    slice(0, 2**40), slice(2**70), slice(-(2**70), None), slice(1.0, 2), slice("a"), slice(None, None, 1.5),
    slice(np.int64(1), np.int64(3)), slice(Index(), None), slice(True, None), slice(None, None, True), slice(None, True),
    (0, 0), (0, 1), (-1, -1), (1, 2, 3), (0, 0, 0, 0, 0), (0, ...), (..., 0), (..., -1), (1, ..., 1), (0, None), (None, 0),
    (slice(None), 0), (slice(None), 1), (slice(None), -1), (slice(1, 3), 0), (0, slice(1, 3)), (0, slice(1, 3), ...),
    (slice(1, 3), slice(1, 3)), (slice(1, 3), ..., slice(0, 2)), (slice(None), slice(None, None, 2)),
    (slice(None, None, 2), slice(None, None, 3)), (slice(0, 0), 0), (0, slice(0, 0)), (slice(None), slice(0, 100)),
    (slice(None),) * 5, (..., slice(1, 2)), (slice(0, 1), None, slice(0, 1)), (0, True), (True, 0), (slice(None), None),
    (slice(None), slice(None), slice(None)), (slice(1, 2), slice(None), 0), (..., None), (slice(2, 4), -1, ...),
    [], [0], [0, 1], [1, 0, 1], [-1], [100], [True, False], [[0, 1], [1, 0]], ([0, 1],), ([0, 1], [1, 0]),
    (slice(None), [0, 1]),
    ([1, 0], slice(None)), (0, [0, 1]), [slice(None)], [0.5], ["a"], range(2), (range(2), 0),
    1.0, "a", b"a", "0", {}, {0}, object, Index(), np.int64(1), np.uint8(1), np.int64(-1), np.bool_(True), np.float32(1),
    np.array(1), np.array([0, 1]), np.array([True, False]), (np.int64(1), np.int64(0)), (np.int64(0), slice(np.int64(1), None)),
    np.array([[0], [1]]), torch.tensor(1), torch.tensor([0, 1]), torch.tensor([[1], [0]]), torch.tensor([True, False]),
    torch.tensor([True, False, True, False]), torch.tensor(True), torch.tensor(1.5), (torch.tensor([0, 1]), 0),
    (slice(None), torch.tensor([0])), slice(torch.tensor(1), torch.tensor(3)), torch.empty(0, dtype=torch.int64),
]  # fmt: skip
INDEXED = ((), (0,), (1,), (5,), (3, 0), (3, 5), (5, 2, 3), (2, 3, 5, 2), (2, 0, 3))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("framework", "backend"), DIALECTS)
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
def test_indexing(grid: Forms, form: str, framework: str, backend: str) -> None:
    wrong = []
    with (
        ours.safe_open(grid[form], framework, backend=backend) as mine,
        theirs.safe_open(grid.genuine, framework, backend=backend) as genuine,
    ):
        for shape in INDEXED:
            sliced, original = mine.get_slice(grid_name(shape)), genuine.get_slice(grid_name(shape))
            for index in INDICES:
                try:
                    assert_same(lambda: sliced[index], lambda: original[index], f"{list(shape)}[{index!r}]")
                except AssertionError as e:
                    wrong.append(str(e).partition("\n")[0])
    assert not wrong, f"{len(wrong)} of {len(INDEXED) * len(INDICES)}:\n" + "\n".join(wrong)


small = st.integers(-6, 6)
limits = st.none() | small
slices = st.builds(slice, limits, limits, st.none() | st.integers(-2, 4))
shapes = st.lists(st.sampled_from((0, 1, 2, 3, 5)), max_size=4).map(tuple)
masks = st.lists(st.booleans(), min_size=1, max_size=5)
items = st.one_of(
    small,
    slices,
    slices,
    st.builds(slice, st.integers(0, 3), st.integers(0, 5)),
    st.just(...),
    st.none(),
    st.booleans(),
    st.lists(st.integers(-3, 4), max_size=3),
    masks,
    masks.map(torch.tensor),
    st.lists(st.integers(-2, 2), min_size=1, max_size=3).map(torch.tensor),
    small.map(np.int64),
)
indices = st.one_of(items, st.lists(items, max_size=5).map(tuple), st.lists(small | slices, max_size=4).map(tuple))


@pytest.fixture(scope="module")
def handles(grid: Forms) -> list[tuple[str, Any, list[Any]]]:
    """(dialect, the library's handle, those of the packed forms)."""
    return [
        (
            f"{framework} {backend}",
            theirs.safe_open(grid.genuine, framework, backend=backend),
            [ours.safe_open(grid[form], framework, backend=backend) for form in PACKED],
        )
        for framework, backend in DIALECTS
    ]


@settings(max_examples=settings.default.max_examples * 30)
@given(shape=shapes, index=indices)
@example(shape=(5, 3), index=(slice(1, 4, 2), slice(None, None, 2)))
@example(shape=(5, 3), index=(None, 2))
@example(shape=(2, 3, 5), index=(1, None, 2, slice(1, 3)))
@example(shape=(2, 3, 5), index=(1, ..., 2))
def test_any_index(handles: list[tuple[str, Any, list[Any]]], shape: tuple[int, ...], index: Any) -> None:
    """The same bits or the same refusal in every dialect, for both packed forms."""
    for dialect, genuine, packed in handles:
        original = genuine.get_slice(grid_name(shape))
        for mine in packed:
            assert_same(lambda: mine.get_slice(grid_name(shape))[index], lambda: original[index], dialect)


borders = st.sampled_from((0, 1, 1026, 1027, 1028, 2053, 2054, 2055, 2999, 3000, 3001, -1, -946, -947))
chunk_rows = borders | st.integers(-3000, 3000)
steps = st.none() | st.sampled_from((1, 2, 7, 1027, 4000))
row_slices = st.builds(slice, st.none() | chunk_rows, st.none() | chunk_rows, steps)
columns = st.one_of(st.just(slice(None)), st.integers(-3, 1020), st.builds(slice, st.integers(0, 1021), st.integers(0, 1021)))


@settings(max_examples=settings.default.max_examples // 2)
@given(rows=chunk_rows | row_slices, column=columns)
def test_rows_near_the_borders_of_chunks(large: Forms, rows: Any, column: Any) -> None:
    """1,027 rows and 17 elements make a chunk of 2^20 elements."""
    for framework, backend in (("pt", "mmap"), ("pt", "pread"), ("np", "mmap")):
        with (
            ours.safe_open(large["archive"], framework, backend=backend) as mine,
            theirs.safe_open(large.genuine, framework, backend=backend) as genuine,
        ):
            for index in (rows, (rows, column)):
                assert_same(lambda: mine.get_slice("bf16")[index], lambda: genuine.get_slice("bf16")[index], index)


# ---------------------------------------------------------------- what is decoded


@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize(("framework", "backend"), DIALECTS)
def test_a_slice_of_rows_decodes_only_the_chunks_that_it_touches(
    large: Forms, form: str, framework: str, backend: str, decoded: list[tuple[int, int]]
) -> None:
    touched: list[tuple[Any, int]] = [
        (slice(100, 200), 1),
        (slice(1000, 1100), 2),
        (slice(0, 1), 1),
        (5, 1),
        ((5,), 1),
        ((5, 7), 1),
        ((2999, slice(3, 9)), 1),
        (slice(1500, 1600, 3), 1),
        ((slice(2100, 2200), slice(0, 10)), 1),
        ((slice(100, 200), ...), 1),
        (slice(0, 3000), 3),
        (slice(7, 7), 0),
    ]
    with ours.safe_open(large[form], framework, backend=backend) as mine:
        sliced = mine.get_slice("bf16")
        assert sliced.get_shape() == [3000, 1021]
        assert sliced.get_dtype() == "BF16"
        assert mine.metadata() is None
        assert decoded == []
        for index, most in touched:
            outcome(lambda: sliced[index])  # the library refuses the empty one for numpy
            assert len(decoded) <= most, (index, decoded)
            assert len(set(decoded)) == len(decoded)
            decoded.clear()
        assert bits(sliced[1000:1100])[-1] == large.tensors["bf16"][2][1000 * 2042 : 1100 * 2042]
        assert len(decoded) == 2


def test_an_index_that_is_refused_decodes_nothing(large: Forms, decoded: list[tuple[int, int]]) -> None:
    with ours.safe_open(large["archive"], "pt") as mine:
        for index in ((0, 0, 0), (slice(0, 5), 1021), (slice(0, 5), 0, 0), (slice(0, 5), slice(None, None, -1))):
            with pytest.raises((IndexError, ValueError)):
                mine.get_slice("bf16")[index]
    assert decoded == []


def test_one_of_ten_thousand_tensors(tmp_path: Path, decoded: list[tuple[int, int]]) -> None:
    count, n = 10_000, 300
    raw = np.frombuffer(weights(count * n, 5, "F32"), np.uint8).reshape(count, -1)
    tensors = [(f"layer.{i}.weight", "F32", (n,), raw[i].tobytes()) for i in range(count)]
    path = tmp_path / "many.safetensors"
    path.write_bytes(safetensors_bytes(tensors))
    tzip.pack(path, threads=1)
    with tzip.open(f"{path}.tzip") as archive:
        chunks = archive.reader.index["c_offset"].size
    assert chunks >= 3
    decoded.clear()
    for framework in ("pt", "np"):
        with ours.safe_open(f"{path}.tzip", framework) as mine:
            assert len(mine.keys()) == count
            assert mine.offset_keys()[7] == "layer.7.weight"
            assert mine.metadata() is None
            assert all(mine.get_slice(f"layer.{i}.weight").get_shape() == [n] for i in range(0, count, 97))
            assert decoded == []
            assert bits(mine.get_tensor("layer.4321.weight"))[-1] == raw[4321].tobytes()
            assert len(decoded) == 1
            assert bits(mine.get_slice("layer.4322.weight")[5:9])[-1] == raw[4322].tobytes()[20:36]
            assert len(decoded) <= 2
        decoded.clear()
    with ours.safe_open(f"{path}.tzip", "np") as mine:
        everything = mine.get_tensors()
        assert len(decoded) == len(set(decoded)) == chunks
    assert b"".join(tensor.tobytes() for tensor in everything.values()) == raw.tobytes()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("framework", "backend"), [("pt", "mmap"), ("pt", "pread"), ("np", "mmap")])
def test_eight_threads_on_one_handle(large: Forms, dtypes: Forms, form: str, framework: str, backend: str) -> None:
    start = threading.Barrier(8)
    some = ("BF16", "F32", "I64", "C64")
    names = [name for name, (dtype, shape, _) in dtypes.tensors.items() if dtype in some and 0 not in shape]
    with (
        ours.safe_open(large[form], framework, backend=backend) as big,
        ours.safe_open(dtypes[form], framework, backend=backend) as many,
    ):

        def work(seed: int) -> int:
            rng = np.random.default_rng(seed)
            start.wait()
            done = 0
            for name in rng.permutation(names).tolist():
                assert bits(many.get_tensor(name))[-1] == dtypes.tensors[name][2], name
                assert bits(many.get_slice(name)[...])[-1] == dtypes.tensors[name][2], name
                done += 1
            for name in rng.permutation(list(LARGE)).tolist():
                _, shape, raw = large.tensors[name]
                row = len(raw) // shape[0]
                assert bits(big.get_tensor(name))[-1] == raw, name
                for begin in rng.integers(0, shape[0] - 1, 6).tolist():
                    end = min(shape[0], begin + 1 + int(rng.integers(40)))
                    assert bits(big.get_slice(name)[begin:end])[-1] == raw[begin * row : end * row], (name, begin, end)
                    done += 1
            return done

        with ThreadPoolExecutor(8) as pool:
            assert min(pool.map(work, range(8))) >= len(names) + 24


# ---------------------------------------------------------------- modules


@pytest.mark.parametrize("name", ["torch", "numpy", "flax", "mlx"])
def test_modules_have_the_names_and_signatures_of_the_library(name: str) -> None:
    if name in ("flax", "mlx"):
        pytest.importorskip({"flax": "jax", "mlx": "mlx.core"}[name])
    mine = __import__(f"tzip.safetensors.{name}", fromlist=["x"])
    genuine = __import__(f"safetensors.{name}", fromlist=["x"])
    functions = 0
    for key, value in vars(genuine).items():
        if key.startswith("__"):
            continue
        assert hasattr(mine, key), key
        if inspect.isfunction(value) and value.__module__ == genuine.__name__:
            functions += 1
            got, want = inspect.signature(getattr(mine, key)), inspect.signature(value)
            parameters = [p for p in got.parameters.values() if p.name not in ("level", "threads")]
            assert [str(p) for p in parameters] == [str(p) for p in want.parameters.values()], key
            assert getattr(mine, key).__doc__ == value.__doc__
    assert functions >= 5


def test_the_top_has_the_names_and_signatures_of_the_library() -> None:
    for name in ("safe_open", "deserialize", "serialize", "serialize_file"):
        got, want = inspect.signature(getattr(ours, name)).parameters, inspect.signature(getattr(theirs, name)).parameters
        assert [(p.name, p.kind, p.default) for p in got.values()] == [(p.name, p.kind, p.default) for p in want.values()], name
    assert ours.SafetensorError is theirs.SafetensorError
    assert ours.TensorSpec is theirs.TensorSpec
    assert ours.__version__ == theirs.__version__
    with pytest.raises(AttributeError, match="nope"):
        ours.nope  # noqa: B018


@pytest.mark.parametrize("form", FORMS)
def test_load_file(large: Forms, form: str) -> None:
    for convert in (str, Path):
        path, genuine = convert(large[form]), convert(large.genuine)
        assert_same(lambda: ours.torch.load_file(path), lambda: safetensors.torch.load_file(genuine))
        assert_same(lambda: ours.numpy.load_file(path), lambda: safetensors.numpy.load_file(genuine))
        assert_same(lambda: ours.load_file(path), lambda: safetensors.numpy.load_file(genuine))
    assert_same(
        lambda: ours.torch.load_file(filename=path, device=None, backend="pread"),
        lambda: safetensors.torch.load_file(filename=genuine, device=None, backend="pread"),
    )
    assert_same(lambda: ours.numpy.load_file(path, backend="pread"), lambda: safetensors.numpy.load_file(genuine))
    for framework in ("pt", "torch", "pytorch"):
        assert_same(lambda: ours.load_file(path, framework), lambda: safetensors.torch.load_file(genuine))
    assert_same(lambda: ours.load_file(path, "pt", "cpu", backend="pread"), lambda: safetensors.torch.load_file(genuine))
    for call in (
        lambda m, p: m.load_file(),
        lambda m, p: m.load_file(p, wat=1),
        lambda m, p: m.load_file(p, backend="zz"),
        lambda m, p: m.load_file(1),
        lambda m, p: m.load_file(None),
    ):
        for name in ("torch", "numpy"):
            assert_same(
                lambda: call(getattr(ours, name), path),
                lambda: call(getattr(safetensors, name), genuine),
            )
    assert_same(lambda: ours.torch.load_file(path, "zz"), lambda: safetensors.torch.load_file(genuine, "zz"))


@pytest.mark.parametrize("form", FORMS)
def test_load_from_bytes(large: Forms, form: str) -> None:
    data, genuine = large[form].read_bytes(), large.genuine.read_bytes()
    assert_same(lambda: ours.torch.load(data), lambda: safetensors.torch.load(genuine))
    assert_same(lambda: ours.torch.load(data=data), lambda: safetensors.torch.load(data=genuine))
    for arguments in ((), (1,), (None,), ("a",), (b"",), (data, data)):
        for name in ("torch", "numpy"):
            mine, original = getattr(ours, name).load, getattr(safetensors, name).load
            assert_same(lambda: mine(*arguments), lambda: original(*arguments))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [bytearray, memoryview, lambda b: np.frombuffer(b, np.uint8), list, io.BytesIO, bytes.hex])
def test_load_takes_no_other_kinds_of_bytes(dtypes: Forms, form: str, kind: Callable[[bytes], Any]) -> None:
    data, genuine = dtypes[form].read_bytes(), dtypes.genuine.read_bytes()
    for name in ("torch", "numpy"):
        assert outcome(lambda: getattr(safetensors, name).load(kind(genuine)))[0] == "error"
        assert_same(lambda: getattr(ours, name).load(kind(data)), lambda: getattr(safetensors, name).load(kind(genuine)))


def single(dtype: str, shape: tuple[int, ...], raw: bytes) -> bytes:
    return safetensors_bytes([("a", dtype, shape, raw)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_load_of_every_dtype_from_bytes(dtype: str) -> None:
    """Also those that the library's table for torch lacks; for numpy never less than the library reads."""
    for shape in ((0, 8), (5, 8), (1001, 8)):
        raw = special(dtype, shape[0] * 8, 3)
        genuine = single(dtype, shape, raw)
        packed = io.BytesIO()
        tzip.pack(genuine, packed, name="model.safetensors", threads=1)
        for name in ("torch", "numpy"):
            want = outcome(lambda: getattr(safetensors, name).load(genuine))
            for data in (packed.getvalue(), genuine):
                got = outcome(lambda: getattr(ours, name).load(data))
                if want[0] == "value":
                    assert got == want
                    assert want[1]["a"][-1] == raw
                elif name == "torch" and dtype in ("F4", "F8_E8M0") and data is not genuine:
                    tensor = ours.torch.load(data)["a"]
                    assert tensor.dtype == {"F4": torch.float4_e2m1fn_x2, "F8_E8M0": torch.float8_e8m0fnu}[dtype]
                    assert tuple(tensor.shape) == expected_shape("pt", dtype, shape)
                    assert bits(tensor)[-1] == raw
                elif got[0] == "value":
                    assert raw_bytes(getattr(ours, name).load(data)["a"], dtype) == raw
                else:
                    assert isinstance(got[1], type(want[1]))
                    assert str(got[1]) == str(want[1])


@pytest.mark.parametrize("form", FORMS)
def test_deserialize(dtypes: Forms, form: str) -> None:
    got, want = ours.deserialize(dtypes[form].read_bytes()), theirs.deserialize(dtypes.genuine.read_bytes())
    assert sorted(got, key=lambda e: e[0]) == sorted(want, key=lambda e: e[0])
    assert [type(e[1]["data"]) for e in got] == [type(e[1]["data"]) for e in want]
    assert {k: type(v) for k, v in got[0][1].items()} == {k: type(v) for k, v in want[0][1].items()}
    assert in_file_order(dtypes.genuine, [e[0] for e in got]) == in_file_order(dtypes.genuine, [e[0] for e in want])


@pytest.mark.parametrize("form", FORMS)
def test_opening_by_handle(large: Forms, form: str) -> None:
    with large[form].open("rb") as f, large.genuine.open("rb") as g:
        assert_same(
            lambda: ours._safe_open_handle(f, "pt").get_tensors(), lambda: theirs._safe_open_handle(g, "pt").get_tensors()
        )
        assert_same(lambda: ours._safe_open_handle(f, "zz"), lambda: theirs._safe_open_handle(g, "zz"))
    assert_same(lambda: ours._safe_open_handle(1, "pt"), lambda: theirs._safe_open_handle(1, "pt"))


@pytest.mark.parametrize("form", FORMS)
def test_opening_by_handle_with_wrong_numbers_of_arguments(large: Forms, form: str) -> None:
    with large[form].open("rb") as f, large.genuine.open("rb") as g:
        for more in ((), ("pt", "cpu", 1)):
            assert_same(lambda: ours._safe_open_handle(f, *more), lambda: theirs._safe_open_handle(g, *more), more)
        assert_same(lambda: ours._safe_open_handle(f, "pt", x=1), lambda: theirs._safe_open_handle(g, "pt", x=1))


# ---------------------------------------------------------------- flax and mlx


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> Forms:
    """A file of what all frameworks can hold."""
    tensors = [(f"{d}.{i}", d, s, special(d, int(np.prod(s, dtype=int)), i))
               for d in ("F32", "BF16", "F16", "U8", "I32", "U32", "I8", "I16")
               for i, s in enumerate(((), (1,), (7,), (6, 4), (2, 3, 4)))]  # fmt: skip
    return forms_of(tmp_path_factory.mktemp("common"), safetensors_bytes([*tensors, PAD], {"format": "x"}))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("framework", "module"), [("flax", "flax"), ("jax", "flax"), ("mlx", "mlx")])
def test_other_frameworks(common: Forms, tmp_path: Path, form: str, framework: str, module: str) -> None:
    pytest.importorskip({"flax": "jax", "mlx": "mlx.core"}[module])
    mine, genuine = ours.safe_open(common[form], framework), theirs.safe_open(common.genuine, framework)
    assert mine.keys() == genuine.keys()
    for name in genuine.keys():
        assert_same(lambda: mine.get_tensor(name), lambda: genuine.get_tensor(name), name)
        for index in (slice(1, 3), 0, ..., (slice(None), slice(0, 2)), [0, 1], slice(None, None, -1), None):
            assert_same(lambda: mine.get_slice(name)[index], lambda: genuine.get_slice(name)[index], f"{name}[{index}]")
    assert_same(mine.get_tensors, genuine.get_tensors)
    our_module = __import__(f"tzip.safetensors.{module}", fromlist=["x"])
    their_module = __import__(f"safetensors.{module}", fromlist=["x"])
    assert_same(lambda: our_module.load_file(common[form]), lambda: their_module.load_file(common.genuine))
    assert_same(lambda: ours.load_file(common[form], framework), lambda: their_module.load_file(common.genuine))
    tensors = {k: v for k, v in their_module.load_file(common.genuine).items() if not k.startswith("BF16")}
    their_module.save_file(tensors, tmp_path / "theirs.safetensors", {"a": "b"})
    want = (tmp_path / "theirs.safetensors").read_bytes()
    for name, save in (("a.tzip", our_module.save_file), ("b.safetensors", our_module.save_file), ("c.tzip", ours.save_file)):
        save(tensors, tmp_path / name, {"a": "b"})
        assert unpacked(tmp_path / name) == want
        assert_same(lambda: our_module.load_file(tmp_path / name), lambda: their_module.load(want))
    assert unpacked(our_module.save(tensors, {"a": "b"})) == want
    assert_same(lambda: our_module.load(our_module.save(tensors)), lambda: their_module.load(their_module.save(tensors)))


# ---------------------------------------------------------------- saving


def unpacked(source: Any) -> bytes:
    out = io.BytesIO()
    tzip.unpack(source, out)
    return out.getvalue()


def packed_at(data: bytes) -> str:
    """Return the level that an archive, or a file packed in place, says it was made with."""
    at = data.index(MAGIC)
    return data[at : at + 64].split(tzip.__version__.encode())[1].split(b"\0")[0].decode().strip()


def torch_tensors() -> dict[str, Any]:
    """Contiguous tensors of every dtype that torch and the library know, with bits of all kinds."""
    out = {}
    for dtype, name in safetensors.torch._TYPES.items():
        raw = torch.frombuffer(bytearray(special(dtype, 600, 7)), dtype=torch.uint8)
        out[f"z.{dtype}"] = raw.clone().view(name).reshape(3, 200)
        out[f"0.{dtype}"] = raw[: BITS[dtype] // 8].clone().view(name).reshape(())
        out[f"empty.{dtype}"] = torch.empty((2, 0), dtype=name)
    for dtype, name in (("F8_E8M0", torch.float8_e8m0fnu), ("F4", torch.float4_e2m1fn_x2)):
        out[f"z.{dtype}"] = torch.frombuffer(bytearray(special("U8", 600, 8)), dtype=torch.uint8).view(name).reshape(3, 200)
    out["weights"] = torch.frombuffer(bytearray(weights(60_000)), dtype=torch.bfloat16).reshape(300, 200)
    out['odd "name"\n\t\x01\\/é漢😀\u2028\x7f'] = torch.arange(5)
    out["transposed of one row"] = torch.arange(5).reshape(1, 5).T
    return out


def numpy_arrays() -> dict[str, Any]:
    out = {}
    for dtype in ("bool", "u1", "i1", "<i2", "<u2", "<f2", "<i4", "<u4", "<f4", "<c8", "<f8", "<i8", "<u8"):
        size = np.dtype(dtype).itemsize
        out[f"z{dtype}"] = np.frombuffer(noise(600 * size, 1), dtype).reshape(3, 200)
        out[f"0{dtype}"] = np.frombuffer(b"\xff" * size, dtype).reshape(())
        out[f"e{dtype}"] = np.empty((2, 0, 3), dtype)
    out["bf16"] = np.frombuffer(weights(60_000), ml_dtypes.bfloat16).reshape(300, 200)
    out["f8"] = np.frombuffer(noise(200), ml_dtypes.float8_e4m3fn)
    out["big endian"] = np.arange(100, dtype=">f4")
    out["big endian 0-d"] = np.array(3, ">u8")
    return out


METADATA = (None, {}, {"format": "pt"}, {'k"\n\\é😀\x01': 'v"\n\\é\u2028'})


@pytest.mark.parametrize("metadata", METADATA, ids=["none", "empty", "one", "odd"])
@pytest.mark.parametrize(("module", "make"), [("torch", torch_tensors), ("numpy", numpy_arrays)])
def test_saved_files_are_those_of_the_library(tmp_path: Path, module: str, make: Callable[[], Any], metadata: Any) -> None:
    mine, genuine, tensors = getattr(ours, module), getattr(safetensors, module), make()
    genuine.save_file(tensors, tmp_path / "theirs.safetensors", metadata)
    want = (tmp_path / "theirs.safetensors").read_bytes()
    assert genuine.save(tensors, metadata) == want
    for level in ("fast", "default", "best"):
        assert mine.save_file(tensors, tmp_path / f"{level}.tzip", metadata, level=level, threads=1) is None
        mine.save_file(tensors, str(tmp_path / f"{level}.safetensors"), metadata=metadata, level=level)
        data = mine.save(tensors, metadata, level=level)
        assert type(data) is bytes
        assert data.startswith(MAGIC)
        assert (tmp_path / f"{level}.tzip").read_bytes().startswith(MAGIC)
        in_place = (tmp_path / f"{level}.safetensors").read_bytes()
        head = 8 + int.from_bytes(want[:8], "little")
        assert in_place[:head] == want[:head]
        assert len(in_place) < len(want)
        assert in_place.endswith(MAGIC[::-1])
        for source in (tmp_path / f"{level}.tzip", tmp_path / f"{level}.safetensors", data):
            assert unpacked(source) == want, level
            assert packed_at(data if source is data else source.read_bytes()) == level
    mine.save_file(tensors, tmp_path / "plain.safetensors", metadata, level=None)
    mine.save_file(tensors, tmp_path / "plain.tzip", metadata, level=None)
    assert (tmp_path / "plain.safetensors").read_bytes() == (tmp_path / "plain.tzip").read_bytes() == want
    assert mine.save(tensors, metadata, level=None) == want
    ours.save_file(tensors, tmp_path / "top.tzip", metadata)
    ours.save_file(tensors, tmp_path / "top.safetensors", metadata, level="best", threads=1)
    ours.save_file(tensors, tmp_path / "top plain.safetensors", metadata, level=None)
    assert unpacked(tmp_path / "top.tzip") == unpacked(tmp_path / "top.safetensors") == want
    assert (tmp_path / "top plain.safetensors").read_bytes() == want
    with ours.safe_open(tmp_path / "default.tzip", "pt") as f:
        assert f.metadata() == theirs.safe_open(tmp_path / "theirs.safetensors", "pt").metadata()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [f"{level}.{end}" for level in ("fast", "default", "best") for end in ("tzip", "safetensors")]
        + ["theirs.safetensors", "plain.safetensors", "plain.tzip", "top.tzip", "top.safetensors", "top plain.safetensors"]
    )


def test_what_is_saved_is_what_comes_back(tmp_path: Path) -> None:
    tensors = torch_tensors()
    for name in ("a.tzip", "a.safetensors"):
        ours.torch.save_file(tensors, tmp_path / name)
        back = ours.torch.load_file(tmp_path / name)
        assert {k: bits(v) for k, v in back.items()} == {k: bits(v) for k, v in tensors.items()}
    back = ours.torch.load(ours.torch.save(tensors))
    assert {k: bits(v) for k, v in back.items()} == {k: bits(v) for k, v in tensors.items()}
    arrays = {k: v for k, v in numpy_arrays().items() if k not in ("bf16", "f8")}
    native = {k: bits(v.astype(v.dtype.newbyteorder("<"))) for k, v in arrays.items()}
    assert {k: bits(v) for k, v in ours.numpy.load(ours.numpy.save(arrays)).items()} == native
    ours.numpy.save_file(arrays, tmp_path / "b.tzip")
    assert {k: bits(v) for k, v in ours.numpy.load_file(tmp_path / "b.tzip").items()} == native


@pytest.mark.parametrize("name", ["model.safetensors.tzip", "model.tzip", "model.safetensors"])
def test_unpacking_on_the_command_line_gives_the_file_of_the_library(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tzip.cli

    tensors = torch_tensors()
    safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    ours.torch.save_file(tensors, tmp_path / name, {"format": "pt"})
    monkeypatch.setattr(sys, "argv", ["tzip", "unpack", str(tmp_path / name), "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as left:
        tzip.cli.main()
    assert not left.value.code
    (restored,) = (tmp_path / "out").iterdir()
    assert restored.name == name.removesuffix(".tzip")
    assert restored.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_arrays_that_do_not_lie_in_order_are_saved_right(tmp_path: Path) -> None:
    """The library of 0.8.0 writes these silently wrong: the bytes in memory order, under the shape of another."""
    base = np.arange(2 * 30 * 40, dtype="<f4").reshape(2, 30, 40)
    arrays = {
        "transposed": base[0].T,
        "moved": base.transpose(2, 0, 1),
        "columns first": np.asfortranarray(base),
        "strided": base[:, ::2, 1::3],
        "reversed": base[0, ::-1],
        "reversed both": base[0, ::-1, ::-1],
        "reversed 1-d": base.reshape(-1)[::-1],
        "broadcast": np.broadcast_to(base[0, 0], (5, 40)),
        "big endian transposed": base[0].astype(">f4").T,
        "bfloat16 transposed": base[0].astype(ml_dtypes.bfloat16).T,
        "0-d": np.array(5, "<i8"),
        "0-d of a view": base[1, 2, 3, ...],
        "empty, strided": base[:, 5:5, ::2],
        "padding": np.zeros(40_000, "<f4"),
    }
    want = {}
    for name, array in arrays.items():
        native = array.astype(array.dtype.newbyteorder("<")) if array.dtype.byteorder == ">" else array
        want[name] = (native.shape, native.dtype.name, native.tobytes(order="C"))
    contiguous = {k: np.array(v, order="C") for k, v in arrays.items()}
    genuine = safetensors.numpy.save(contiguous)

    for level in ("default", None):
        ours.numpy.save_file(arrays, tmp_path / "a.tzip", level=level)
        ours.numpy.save_file(tensor_dict=arrays, filename=tmp_path / "a.safetensors", level=level)
        ours.save_file(arrays, tmp_path / "b.safetensors", level=level)
        for path in (tmp_path / "a.tzip", tmp_path / "a.safetensors", tmp_path / "b.safetensors"):
            assert (path.read_bytes() if level is None else unpacked(path)) == genuine
            back = ours.numpy.load_file(path)
            assert {k: (v.shape, v.dtype.name, v.tobytes()) for k, v in back.items()} == want
        for data in (ours.numpy.save(arrays, level=level), ours.numpy.save(tensor_dict=arrays, level=level)):
            assert (data if level is None else unpacked(data)) == genuine


def test_small_files_stay_plain_and_names_choose_the_form(tmp_path: Path) -> None:
    tiny = {"a": torch.tensor(3.5)}
    safetensors.torch.save_file(tiny, tmp_path / "theirs")
    for name in ("tiny.safetensors", "tiny.bin", "tiny"):
        ours.torch.save_file(tiny, tmp_path / name)
        assert (tmp_path / name).read_bytes() == (tmp_path / "theirs").read_bytes()
    random = {"a": torch.frombuffer(bytearray(noise(50_000)), dtype=torch.uint8)}
    safetensors.torch.save_file(random, tmp_path / "theirs random")
    ours.torch.save_file(random, tmp_path / "random.safetensors")
    assert (tmp_path / "random.safetensors").read_bytes() == (tmp_path / "theirs random").read_bytes()
    ours.torch.save_file(tiny, tmp_path / "tiny.tzip")
    assert (tmp_path / "tiny.tzip").read_bytes().startswith(MAGIC)
    assert_same(lambda: ours.torch.load_file(tmp_path / "tiny.tzip"), lambda: safetensors.torch.load_file(tmp_path / "theirs"))
    large = {"a": torch.zeros(50_000)}
    for name in ("large.bin", "large", "large.tzip.safetensors"):
        ours.torch.save_file(large, tmp_path / name)
        data = (tmp_path / name).read_bytes()
        assert not data.startswith(MAGIC)
        assert data.endswith(MAGIC[::-1])
        assert_same(lambda: ours.torch.load_file(tmp_path / name), lambda: large)
    assert_same(
        lambda: safetensors.torch.load_file(tmp_path / "large.bin"),
        lambda: raise_(SafetensorError("Error while deserializing header: incomplete metadata, file not fully covered")),
    )


def raise_(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("name", ["model.safetensors", "model.tzip"])
def test_saving_over_a_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    first, second, tiny = {"a": torch.zeros(50_000)}, {"b": torch.ones(60_000)}, {"c": torch.tensor(1)}
    saves = ((first, "default"), (second, "fast"), (tiny, "default"), (first, None), (second, "best"), (second, None))
    for tensors, level in saves:
        ours.torch.save_file(tensors, path, level=level)
        assert_same(lambda: ours.torch.load_file(path), lambda: tensors)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_file_that_is_loaded_can_be_saved_over(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    ours.torch.save_file({"a": torch.zeros(50_000)}, path)
    with ours.safe_open(path, "pt") as f:
        sliced = f.get_slice("a")
        ours.torch.save_file({"a": torch.ones(70_000)}, path)
        assert bits(f.get_tensor("a")) == bits(torch.zeros(50_000))
    assert bits(sliced[5:9]) == bits(torch.zeros(4))
    loaded = ours.torch.load_file(path)
    ours.torch.save_file(loaded, path)
    assert_same(lambda: ours.torch.load_file(path), lambda: {"a": torch.ones(70_000)})


def refused_torch() -> dict[str, Any]:
    base = torch.zeros(30, 40)
    with torch.no_grad():
        sparse = torch.eye(4).to_sparse()
    return {
        "transposed": {"a": base.T},
        "strided": {"b": torch.zeros(3), "a": torch.zeros(30, 40)[:, ::2]},
        "expanded": {"a": torch.zeros(1).expand(5)},
        "shared": {"a": base, "b": base},
        "shared rows": {"a": base[:20], "b": base[10:]},
        "shared view": {"a": base, "b": base.view(40, 30), "c": torch.zeros(1)},
        "sparse": {"a": sparse, "b": torch.zeros(1)},
        "array": {"a": np.zeros(3)},
        "number": {"a": 1},
        "None value": {"a": None},
        "list value": {"a": [torch.zeros(1)]},
        "not a dict": [torch.zeros(1)],
        "a tensor": torch.zeros(1),
        "None": None,
        "pairs": [("a", torch.zeros(1))],
        "number as a name": {1: torch.zeros(1)},
        "None as a name": {None: torch.zeros(1)},
        "bytes as a name": {b"a": torch.zeros(1)},
        "no unicode": {"\ud800": torch.zeros(1)},
        "complex128": {"a": torch.zeros(1, dtype=torch.complex128)},
        "on no device": {"a": torch.zeros(3, device="meta")},
    }


def refused_numpy() -> dict[str, Any]:
    return {
        "complex128": {"a": np.zeros(3, complex)},
        "long double": {"a": np.zeros(3, np.longdouble)},
        "objects": {"a": np.array([1, "a"], object)},
        "text": {"a": np.array(["a", "b"])},
        "bytes": {"a": np.array([b"a", b"b"])},
        "dates": {"a": np.zeros(3, "M8[s]")},
        "fields": {"a": np.zeros(3, [("x", "<f4")])},
        "int4": {"a": np.zeros(4, ml_dtypes.int4)},
        "number": {"a": 1},
        "numpy number": {"a": np.float32(1)},
        "list value": {"a": [1, 2]},
        "None value": {"a": None},
        "not a dict": [np.zeros(3)],
        "array": np.zeros(3),
        "None": None,
        "number as a name": {1: np.zeros(3)},
        "bytes as a name": {b"a": np.zeros(3)},
        "no unicode": {"\ud800": np.zeros(3)},
    }


REFUSED = [("torch", name) for name in refused_torch()] + [("numpy", name) for name in refused_numpy()]


def quiet(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call, whose value does not matter."""

    def run() -> None:
        call()

    return run


@pytest.mark.parametrize(("module", "name"), REFUSED)
def test_what_the_library_refuses_to_save(tmp_path: Path, module: str, name: str) -> None:
    """The same refusal, and nothing is written; what it writes after all is written here, too."""
    tensors = {"torch": refused_torch, "numpy": refused_numpy}[module]()[name]
    mine, genuine = getattr(ours, module), getattr(safetensors, module)
    assert_same(quiet(lambda: mine.save(tensors)), quiet(lambda: genuine.save(tensors)), "save")
    for end in ("tzip", "safetensors"):
        (tmp_path / "mine").mkdir(exist_ok=True)
        path, theirs_path = tmp_path / "mine" / f"a.{end}", tmp_path / "theirs.safetensors"
        want = outcome(lambda: genuine.save_file(tensors, theirs_path))
        assert_same(lambda: mine.save_file(tensors, path), lambda: genuine.save_file(tensors, theirs_path), end)
        if want[0] == "error":
            assert list((tmp_path / "mine").iterdir()) == []
        else:
            written = path.read_bytes()
            assert (unpacked(path) if end == "tzip" else written) == theirs_path.read_bytes()


@pytest.mark.parametrize("module", ["torch", "numpy"])
@pytest.mark.parametrize(
    "metadata",
    [
        {"a": 1},
        {1: "a"},
        {"a": None},
        {"a": b"x"},
        {"a": {"b": "c"}},
        {"a": "\ud800"},
        {"\ud800": "a"},
        "text",
        ["a"],
        [("a", "b")],
        3,
    ],
    ids=ascii,
)
def test_wrong_metadata(tmp_path: Path, module: str, metadata: Any) -> None:
    mine, genuine = getattr(ours, module), getattr(safetensors, module)
    tensors = {"a": torch.zeros(50_000) if module == "torch" else np.zeros(50_000)}
    assert outcome(lambda: genuine.save(tensors, metadata))[0] == "error"
    assert_same(lambda: mine.save(tensors, metadata), lambda: genuine.save(tensors, metadata), "save")
    for name in ("a.tzip", "a.safetensors"):
        assert_same(
            lambda: mine.save_file(tensors, tmp_path / name, metadata),
            lambda: genuine.save_file(tensors, tmp_path / name, metadata),
            name,
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["torch", "numpy"])
def test_saving_where_nothing_can_be_saved(tmp_path: Path, module: str) -> None:
    mine, genuine = getattr(ours, module), getattr(safetensors, module)
    tensors = {"a": torch.zeros(50_000) if module == "torch" else np.zeros(50_000)}
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file").write_bytes(b"")
    wrong = []
    for place in (
        tmp_path / "missing" / "a.safetensors",
        tmp_path / "folder.safetensors",
        tmp_path / "file" / "a.safetensors",
        "",
        1,
        None,
        [str(tmp_path)],
        f"{tmp_path}/a\0b",
        tmp_path / ("x" * 300),
    ):
        want = outcome(lambda: genuine.save_file(tensors, place))
        got = outcome(lambda: mine.save_file(tensors, place))
        assert want[0] == "error", place
        if got[0] != "error" or not isinstance(got[1], type(want[1])):
            wrong.append(f"{place!r}: {got[1]!r} instead of {want[1]!r}")
    assert not wrong, "\n".join(wrong)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.safetensors"]


@pytest.mark.parametrize("module", ["torch", "numpy"])
def test_calling_save_in_wrong_ways(tmp_path: Path, module: str) -> None:
    mine, genuine = getattr(ours, module), getattr(safetensors, module)
    tensors = {"a": torch.zeros(50_000) if module == "torch" else np.zeros(50_000)}
    path = tmp_path / "a.tzip"
    for call in (
        lambda m: m.save(),
        lambda m: m.save(tensors, None, None),
        lambda m: m.save(tensors, wat=1),
        lambda m: m.save_file(),
        lambda m: m.save_file(tensors),
        lambda m: m.save_file(tensors, path, None, None),
        lambda m: m.save_file(tensors, path, wat=1),
        lambda m: m.save_file(tensors, path, filename=path),
    ):
        assert outcome(lambda: call(genuine))[0] == "error"
        assert_same(lambda: call(mine), lambda: call(genuine))
    for options in ({"level": "zz"}, {"level": 3}, {"threads": 0}, {"threads": -1}):
        with pytest.raises((SafetensorError, ValueError, TypeError)):
            mine.save(tensors, **options)
        with pytest.raises((SafetensorError, ValueError, TypeError)):
            mine.save_file(tensors, path, **options)
    assert list(tmp_path.iterdir()) == []


def test_the_top_refuses_tensors_of_several_frameworks(tmp_path: Path) -> None:
    with pytest.raises(tzip.UsageError, match="several frameworks: numpy, torch"):
        ours.save_file({"a": torch.zeros(1), "b": np.zeros(1)}, tmp_path / "a.tzip")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["empty.tzip", "empty.safetensors.tzip", "empty.safetensors", "empty"])
@pytest.mark.parametrize("module", ["torch", "numpy"])
def test_saving_no_tensors(tmp_path: Path, name: str, module: str) -> None:
    genuine = getattr(safetensors, module).save({}, {"a": "b"})
    for save in (ours.save_file, getattr(ours, module).save_file):
        save({}, tmp_path / name, {"a": "b"})
        written = (tmp_path / name).read_bytes()
        assert (unpacked(written) if name.endswith(".tzip") else written) == genuine
        assert ours.load_file(tmp_path / name) == getattr(ours, module).load_file(tmp_path / name) == {}
        with ours.safe_open(tmp_path / name, "np") as f:
            assert f.metadata() == {"a": "b"}
    assert getattr(ours, module).load(getattr(ours, module).save({})) == {}


def test_saving_leaves_the_level_of_others_alone(tmp_path: Path) -> None:
    """A level holds for one call, also beside others in threads, and after one that failed."""
    tensors = {"a": torch.zeros(50_000)}
    plain = safetensors.torch.save(tensors)
    with pytest.raises(ValueError, match="non contiguous"):
        ours.torch.save({"a": torch.zeros(3, 4).T}, level=None)
    assert ours.torch.save(tensors).startswith(MAGIC)

    def save(i: int) -> bool:
        level = None if i % 2 else "fast"
        data = ours.torch.save(tensors, level=level, threads=1)
        return (data == plain) == (level is None)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(save, range(64)))


@pytest.mark.parametrize("name", ["a.tzip", "a.safetensors"])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / name
    ours.torch.save_file({"a": torch.zeros(50_000)}, path)
    before = path.read_bytes()

    def fsync(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(SafetensorError, match="No space left"):
            ours.torch.save_file({"a": torch.ones(50_000)}, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [name]


# ---------------------------------------------------------------- models


def model_of(seed: int, *, tied: bool = True, transposed: bool = False) -> Any:
    torch.manual_seed(seed)
    nn = torch.nn
    model = nn.Sequential(nn.Embedding(500, 64), nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 500))
    if tied:
        model[3].weight = model[0].weight
    if transposed:
        model[1].weight = torch.nn.Parameter(torch.randn(64, 64).T)
    return model


@pytest.mark.parametrize("name", ["a.tzip", "a.safetensors"])
@pytest.mark.parametrize("transposed", [False, True])
def test_models(tmp_path: Path, name: str, transposed: bool) -> None:
    model = model_of(1, transposed=transposed)
    safetensors.torch.save_model(model, str(tmp_path / "theirs.safetensors"))
    for level in ("default", "fast", "best", None):
        assert ours.torch.save_model(model, str(tmp_path / name), level=level) is None
        plain = (tmp_path / name).read_bytes() if level is None else unpacked(tmp_path / name)
        assert plain == (tmp_path / "theirs.safetensors").read_bytes()
        if level is not None:
            assert packed_at((tmp_path / name).read_bytes()) == level
        results = []
        for module, path in ((ours.torch, tmp_path / name), (safetensors.torch, tmp_path / "theirs.safetensors")):
            other = model_of(2)
            results.append((module.load_model(other, path), {k: bits(v) for k, v in other.state_dict().items()}))
        assert results[0] == results[1]
        assert results[0][1] == {k: bits(v) for k, v in model.state_dict().items()}


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    mine, genuine = tmp_path / "mine.tzip", tmp_path / "theirs.safetensors"
    for module, path in ((ours.torch, mine), (safetensors.torch, genuine)):
        module.save_model(model_of(1), str(path), {"k": "v"}, True)
    fewer, other_shape = torch.nn.Sequential(torch.nn.Embedding(500, 64)), torch.nn.Sequential(torch.nn.Embedding(7, 64))
    more = torch.nn.Sequential(*model_of(3), torch.nn.Linear(2, 2))
    assert len(more.state_dict()) > len(model_of(3).state_dict())
    for model, strict in itertools.product((fewer, other_shape, more, model_of(3, tied=False)), (True, False)):
        got = outcome(lambda: ours.torch.load_model(model, mine, strict))
        want = outcome(lambda: safetensors.torch.load_model(model, genuine, strict))
        assert got[0] == want[0]
        if want[0] == "value":
            assert [sorted(part) for part in got[1]] == [sorted(part) for part in want[1]]
        else:
            assert type(got[1]) is type(want[1])
            assert str(got[1]) == str(want[1])
    assert_same(
        lambda: ours.torch.load_model(model_of(1), mine, device="zz"),
        lambda: safetensors.torch.load_model(model_of(1), genuine, device="zz"),
    )
    assert_same(
        lambda: ours.torch.load_model(model_of(1), mine, backend="zz"),
        lambda: safetensors.torch.load_model(model_of(1), genuine, backend="zz"),
    )
    transposed = model_of(1, transposed=True)
    assert_same(
        lambda: ours.torch.save_model(transposed, str(tmp_path / "no.tzip"), None, False),
        lambda: safetensors.torch.save_model(transposed, str(tmp_path / "no.tzip"), None, False),
    )
    assert not (tmp_path / "no.tzip").exists()


# ---------------------------------------------------------------- damage


DAMAGED = [
    ("weights", "BF16", (200, 150), weights(30_000, 1)),
    ("floats", "F32", (2000,), weights(2000, 2, "F32")),
    ("ids", "I64", (300,), b"".join((i * 7 % 301).to_bytes(8, "little") for i in range(300))),
    ("scalar", "F64", (), b"\1\2\3\4\5\6\7\xff"),
    ("empty", "U8", (0, 3), b""),
    ("noise", "U8", (20_000,), noise(20_000)),
    ("sparse", "F16", (70_000,), b"".join(bytes(2) if i % 9 else noise(2, i) for i in range(70_000))),
]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Forms:
    forms = forms_of(tmp_path_factory.mktemp("damaged"), safetensors_bytes(DAMAGED, {"format": "pt"}))
    forms.tensors = {name: (dtype, tuple(shape), raw) for name, dtype, shape, raw in DAMAGED}
    return forms


def regions_of(data: bytes) -> dict[str, list[int]]:
    """Return offsets in each kind of region of a packed file, all of the small ones."""
    start = data.index(MAGIC)
    out = {"before": list(range(start)), "archive header": list(range(start, start + 64))}
    out["footer"] = list(range(len(data) - 80, len(data)))
    chunks = [i for i in range(start, len(data)) if data.startswith(forge.CHNK, i)]
    index = data.rindex(forge.INDX)
    out["index"] = list(range(index, len(data) - 80))
    for name, magic in (("member", forge.MEMB), ("done", forge.DONE)):
        at = data.index(magic, start)
        out[name] = list(range(at, at + 96))
    out["chunk head"] = [i + k for i in chunks for k in range(48)]
    heads = set(out["chunk head"])
    first = chunks[0]
    out["payload"] = [i for i in range(first, index) if i not in heads]
    return out


def read_all(f: Any) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for name in DAMAGE_READS:
        yield name, outcome(lambda: f.get_tensor(name))
        if name != "empty":  # which the library does not index for numpy
            yield name, outcome(lambda: f.get_slice(name)[...])


DAMAGE_READS = [name for name, *_ in DAMAGED]


def check_damaged(path: Path, right: dict[str, Any], framework: str) -> tuple[int, int]:
    """Assert that all that is read is right, or refused as it should be; return how often opening and reading were refused."""
    opened = outcome_of_opening(path, framework)
    if isinstance(opened, BaseException):
        assert isinstance(opened, SafetensorError), repr(opened)
        return 1, 0
    refused = 0
    with opened as f:
        assert f.keys() == sorted(DAMAGE_READS)
        metadata = outcome(f.metadata)
        assert metadata == ("value", {"format": "pt"}) or isinstance(metadata[1], SafetensorError)
        for name, (kind, value) in read_all(f):
            if kind == "value":
                assert value == right[name], f"wrong bits of {name}"
                assert f.get_slice(name).get_shape() == list(value[-2])
            else:
                refused += 1
                assert isinstance(value, SafetensorError), repr(value)
                assert isinstance(value, tzip.CorruptError), repr(value)
                assert value.tensor == name
                assert name in str(value)
                assert str(path) in str(value)
    return 0, refused


def outcome_of_opening(path: Path, framework: str) -> Any:
    try:
        return ours.safe_open(path, framework)
    except Exception as e:
        return e


@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize(
    ("region", "most", "sure"),
    [("payload", 60, True), ("chunk head", 48, True), ("index", 60, True), ("footer", 80, True), ("archive header", 64, True),
     ("member", 40, False), ("done", 40, False), ("before", 150, False)],
)  # fmt: skip
def test_a_flipped_byte(damaged: Forms, tmp_path: Path, form: str, region: str, most: int, sure: bool) -> None:
    """Never a wrong bit. `sure`: where every byte, padding apart, is needed to read, most flips are refused."""
    data = damaged[form].read_bytes()
    places = regions_of(data)[region]
    rng = np.random.default_rng(len(region))
    places = sorted(rng.choice(places, min(most, len(places)), replace=False).tolist()) if places else []
    assert (not places) == (region == "before" and form == "archive")
    path = tmp_path / damaged[form].name
    path.write_bytes(data)
    with theirs.safe_open(damaged.genuine, "np") as f:
        right = {name: bits(f.get_tensor(name)) for name in DAMAGE_READS}
    assert check_damaged(path, right, "np") == (0, 0)
    found = 0
    for i, place in enumerate(places):
        flip = (1, 0x80, 0xFF, 0x10)[i % 4]
        with path.open("r+b") as file:
            file.seek(place)
            file.write(bytes([data[place] ^ flip]))
        found += any(check_damaged(path, right, "np"))
        with path.open("r+b") as file:
            file.seek(place)
            file.write(data[place : place + 1])
    assert check_damaged(path, right, "np") == (0, 0)
    if sure:
        assert found > len(places) / 2, f"{found} of {len(places)}"


@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize("framework", ["pt", "np"])
def test_damage_to_one_tensor_leaves_the_others_readable(damaged: Forms, tmp_path: Path, form: str, framework: str) -> None:
    data = bytearray(damaged[form].read_bytes())
    with tzip.open(damaged[form]) as archive:
        names = list(archive)
    hits = dict.fromkeys(names, 0)
    with theirs.safe_open(damaged.genuine, framework) as f:
        right = {name: bits(f.get_tensor(name)) for name in DAMAGE_READS}
    path = tmp_path / damaged[form].name
    for place in regions_of(bytes(data))["payload"][:: len(data) // 24]:
        data[place] ^= 0x55
        path.write_bytes(data)
        check_damaged(path, right, framework)
        with ours.safe_open(path, framework) as f:
            for name in names:
                hits[name] += outcome(lambda: f.get_tensor(name))[0] == "error"
            all_of_them = outcome(f.get_tensors)
        everything = outcome(lambda: ours.torch.load_file(path))
        from_bytes = outcome(lambda: ours.torch.load(bytes(data)))
        for kind, value in (all_of_them, everything, from_bytes):
            if kind == "error":
                assert isinstance(value, SafetensorError)
                assert isinstance(value, tzip.CorruptError)
                assert value.tensor in names
        data[place] ^= 0x55
    assert max(hits.values()) > 0
    assert hits["empty"] == 0
    assert sum(hits.values()) < 24 * len(names) / 2


@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize("framework", ["pt", "np"])
def test_truncated_files(damaged: Forms, tmp_path: Path, form: str, framework: str) -> None:
    """What shows an archive's beginning says that it is truncated; what does not is refused as the library refuses it."""
    data = damaged[form].read_bytes()
    path = tmp_path / damaged[form].name
    start = data.index(MAGIC)
    borders = [0, 1, 7, 8, 9, 63, 64, 65, start + 8, start + 64, len(data) - 1, len(data) - 8, len(data) - 80, len(data) - 81]
    genuine_size = damaged.genuine.stat().st_size
    assert len(data) < genuine_size
    for size in sorted({*borders, *np.linspace(10, len(data) - 1, 30).astype(int).tolist()}):
        path.write_bytes(data[:size])
        opened = outcome_of_opening(path, framework)
        assert isinstance(opened, SafetensorError), (size, opened)
        if size >= start + 8:
            assert isinstance(opened, tzip.TruncatedError | tzip.CorruptError), (size, opened)
            assert str(path) in str(opened)
        else:
            assert_same(lambda: ours.safe_open(path, framework), lambda: theirs.safe_open(path, framework), size)
            assert outcome(lambda: ours.torch.load(data[:size]))[0] == "error"
    path.write_bytes(data[:-80])
    with pytest.raises(SafetensorError, match="no footer"):
        ours.safe_open(path, framework)
    with pytest.raises(SafetensorError):
        theirs.safe_open(path, framework)


@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize("behind", [b"\0", bytes(80), noise(5000), MAGIC[::-1]])
def test_bytes_behind_a_packed_file(damaged: Forms, tmp_path: Path, form: str, behind: bytes) -> None:
    path = tmp_path / damaged[form].name
    path.write_bytes(damaged[form].read_bytes() + behind)
    opened = outcome_of_opening(path, "np")
    assert isinstance(opened, SafetensorError)


def test_a_packed_file_in_the_place_of_another_header(damaged: Forms, tmp_path: Path) -> None:
    """What stands before the archive is for tools that read headers; the archive's own header is the one that counts."""
    data = damaged["in_place"].read_bytes()
    start = data.index(MAGIC)
    other = safetensors_bytes([("other", "U8", (1 << 20,), b"")])
    path = tmp_path / "a.safetensors"
    path.write_bytes(other + bytes(start - len(other)) + data[start:])
    with theirs.safe_open(damaged.genuine, "np") as f:
        right = {name: bits(f.get_tensor(name)) for name in DAMAGE_READS}
    opened = outcome_of_opening(path, "np")
    if not isinstance(opened, SafetensorError):
        assert check_damaged(path, right, "np") == (0, 0)


# ---------------------------------------------------------------- which reader


@pytest.mark.parametrize("form", PACKED)
def test_a_plain_file_that_ends_with_an_archive_is_plain(damaged: Forms, tmp_path: Path, form: str) -> None:
    inner = damaged[form].read_bytes()
    tensors = [("a", "F32", (5,), weights(5, 1, "F32")), ("inner", "U8", (len(inner),), inner)]
    path = tmp_path / "outer.safetensors"
    path.write_bytes(safetensors_bytes(tensors, {"a": "b"}))
    data = path.read_bytes()
    assert data.endswith(MAGIC[::-1])
    for framework in ("pt", "np"):
        with ours.safe_open(path, framework) as mine, theirs.safe_open(path, framework) as genuine:
            assert type(mine) is type(genuine)
            assert mine.keys() == ["a", "inner"]
            assert_same(mine.get_tensors, genuine.get_tensors)
            assert_same(mine.metadata, genuine.metadata)
            assert bits(mine.get_slice("inner")[1000:1100])[-1] == inner[1000:1100]
    assert_same(lambda: ours.torch.load_file(path), lambda: safetensors.torch.load_file(path))
    assert_same(lambda: ours.torch.load(data), lambda: safetensors.torch.load(data))
    assert_same(lambda: ours.numpy.load(data), lambda: safetensors.numpy.load(data))
    assert sorted(ours.deserialize(data), key=lambda e: e[0]) == sorted(theirs.deserialize(data), key=lambda e: e[0])
    assert tzip.pack_in_place([path]).left == {} or path.read_bytes() == data
    assert_same(lambda: ours.torch.load_file(path), lambda: safetensors.torch.load(data))


def test_plain_files_get_the_reader_of_the_library(large: Forms) -> None:
    assert type(ours.safe_open(large["plain"], "pt")) is theirs.safe_open
    assert type(ours.safe_open(large["archive"], "pt")) is not theirs.safe_open


@pytest.mark.parametrize("count", [0, 2])
def test_an_archive_of_no_or_several_safetensors_files(tmp_path: Path, count: int) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for i in range(count):
        (folder / f"model-{i}.safetensors").write_bytes(safetensors_bytes([("a", "U8", (3,), b"abc")]))
    tzip.pack(folder)
    archive = tmp_path / "model.tzip"
    for call in (
        lambda: ours.safe_open(archive, "pt"),
        lambda: ours.torch.load_file(archive),
        lambda: ours.numpy.load_file(archive),
        lambda: ours.load_file(archive),
        lambda: ours.torch.load(archive.read_bytes()),
        lambda: ours.deserialize(archive.read_bytes()),
    ):
        with pytest.raises(SafetensorError, match=rf"holds {count} safetensors files.*tzip unpack") as caught:
            call()
        assert isinstance(caught.value, tzip.UsageError)
    assert str(archive) in str(outcome(lambda: ours.safe_open(archive, "pt"))[1])


def test_an_archive_of_one_safetensors_file_among_others(tmp_path: Path, damaged: Forms) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "broken.safetensors").write_bytes(b"no such thing")
    (folder / "empty.txt").write_bytes(b"")
    shutil.copy(damaged.genuine, folder / "sub" / "model.safetensors")
    with pytest.warns(UserWarning, match="broken.safetensors: no valid safetensors file"):
        tzip.pack(folder)
    for module in ("torch", "numpy"):
        assert_same(
            lambda: getattr(ours, module).load_file(tmp_path / "model.tzip"),
            lambda: getattr(safetensors, module).load_file(damaged.genuine),
        )
    with ours.safe_open(tmp_path / "model.tzip", "pt") as f:
        assert f.metadata() == {"format": "pt"}


@pytest.mark.parametrize("level", ["fast", "best"])
def test_files_of_every_level_are_read(tmp_path: Path, large: Forms, level: str) -> None:
    forms = forms_of(tmp_path, large.genuine.read_bytes(), level)
    for form in PACKED:
        assert_same(lambda: ours.torch.load_file(forms[form]), lambda: safetensors.torch.load_file(large.genuine))


def test_importing_the_names_reads_no_framework() -> None:
    """The hook imports the package in processes that may never open a packed file."""
    code = (
        "import sys, tzip.safetensors as s; s.safe_open, s.deserialize\n"
        "print(sorted({'torch', 'numba', 'jax', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_archive_whose_tensors_were_not_recorded_is_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another writer may have packed a safetensors file as plain bytes: nothing is read then, rather than no tensors."""
    from tzip.formats import safetensors_header

    header = b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"ab")

    def refuse(*_: object) -> None:
        raise safetensors_header.HeaderError("not looked at")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors_header, "parse", refuse)
        with pytest.warns(UserWarning, match="packed as plain bytes"):
            tzip.pack(tmp_path / "m.safetensors", tmp_path / "m.tzip")
    with pytest.raises(SafetensorError, match="0 safetensors files"):
        ours.safe_open(tmp_path / "m.tzip", "np")
