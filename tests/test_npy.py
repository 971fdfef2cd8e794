"""numpy's files, written by numpy: the elements are where `find` says, bit for bit, and no damage escapes it."""

import io
import random
import re
import struct
import warnings

import ml_dtypes
import numpy as np
import pytest
from forge import reader
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from promises import promises

from tzip.formats import dtypes, npy
from tzip.formats.containers import ContainerError, Contents

RNG = np.random.default_rng(5)
TYPES = {
    "?": "BOOL", "i1": "I8", "<i2": "I16", "<i4": "I32", "<i8": "I64", "u1": "U8", "<u2": "U16", "<u4": "U32", "<u8": "U64",
    "<f2": "F16", "<f4": "F32", "<f8": "F64", "<c8": "C64", "<c16": "C128", "<M8[ns]": "I64", "<m8[D]": "I64",
}  # fmt: skip


def saved(*arrays: np.ndarray, version: tuple[int, int] | None = None, **options: bool) -> bytes:
    file = io.BytesIO()
    for array in arrays:
        np.lib.format.write_array(file, np.asanyarray(array), version=version, **options)
    return file.getvalue()


def framed(text: bytes, data: bytes = b"", version: int = 1) -> bytes:
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text + data


def look(raw: bytes) -> Contents | None:
    found = npy.find(reader(raw), len(raw))
    if found is not None:
        promises(found, len(raw))
    return found


def content(raw: bytes, view) -> np.ndarray:
    """The tensor that a view describes, made of the file's bytes by its strides alone."""
    dtype = view.dtype.numpy()
    strides = None if view.strides is None else [s * dtype.itemsize for s in view.strides]
    return np.ndarray(view.shape, dtype, raw, view.begin, strides)


def assert_holds(raw: bytes, array: np.ndarray, view, name: str) -> None:
    found = content(raw, view)
    dtype = TYPES[array.dtype.str.lstrip("|").replace("b1", "?")]
    assert (view.name, found.shape, view.dtype.name) == (name, array.shape, dtype)
    assert found.tobytes() == array.tobytes()


def sample(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    n = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = RNG.integers(0, 2 if dtype == "?" else 256, n).astype(np.uint8)
    return raw.view(dtype).reshape(shape)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (0,), (3, 0, 2), (3, 5), (1, 5), (5, 1), (2, 3, 4), (1,) * 30 + (3, 2)])
@pytest.mark.parametrize("dtype", TYPES)
def test_every_type_and_order_holds_the_bits_that_numpy_reads(dtype, shape):
    for order in "CF":
        array = np.asarray(sample(dtype, shape), order=order)
        raw = saved(array)
        found = look(raw)
        assert (found.container, found.warnings, found.files, len(found.tensors)) == ("npy", [], [], 1)
        assert_holds(raw, np.load(io.BytesIO(raw)), found.tensors[0], "")
        assert [(r.begin, r.end) for r in found.regions] == ([(len(raw) - array.nbytes, len(raw))] if array.size else [])
        column_major = array.flags.f_contiguous and not array.flags.c_contiguous
        assert (found.tensors[0].strides is not None) == column_major
        for region in found.regions:
            assert region.row == (0 if array.ndim < 2 else shape[0] if column_major else shape[-1])


def test_the_types_above_are_all_that_numpy_has():
    assert {d.name for d in dtypes.DTYPES.values() if d.numpy_name and d.numpy().isbuiltin == 1} == set(TYPES.values())


@given(hnp.arrays(st.sampled_from([np.float32, np.int16, np.bool_]), hnp.array_shapes(min_dims=0, min_side=0)), st.booleans())
def test_any_shape(array, column_major):
    raw = saved(np.asfortranarray(array) if column_major and array.ndim else array)
    assert_holds(raw, array, look(raw).tensors[0], "")


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_versions(version):
    array = sample("<f4", (3, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        raw = saved(array, version=version)
    assert raw[6:8] == bytes(version)
    assert_holds(raw, array, look(raw).tensors[0], "")


@pytest.mark.filterwarnings("ignore:Stored array in format 3.0:UserWarning")
@pytest.mark.filterwarnings("ignore:Custom dtypes are saved:UserWarning")
@pytest.mark.parametrize(
    "array",
    [
        np.array(["ab", "c"]),
        np.array([b"ab", b"c"]),
        np.array([{}, None], object),
        np.zeros(3, [("a", "<f4"), ("b", ">i2", (2, 3))]),
        np.zeros(3, [("größe", "<f4")]),
        np.zeros(3, "V5"),
        np.zeros(3, np.longdouble),
        np.zeros(3, np.clongdouble),
        np.zeros(3, "V2"),
        np.zeros(3, ml_dtypes.float8_e4m3fn),
        np.zeros(3, ml_dtypes.float8_e5m2),
        np.zeros(3, ml_dtypes.int4),
        np.zeros(3, "U0"),
    ],
    ids=lambda a: str(a.dtype),
)
def test_other_elements_stay_bytes(array):
    assert look(saved(array)) == Contents("npy")


@pytest.mark.filterwarnings("ignore:Custom dtypes are saved:UserWarning")
def test_bytes_with_an_order_are_bfloat16():
    array = np.arange(6, dtype=np.float32).reshape(2, 3).astype(ml_dtypes.bfloat16)
    (view,) = look(raw := saved(array)).tensors
    assert (view.dtype.name, view.shape) == ("BF16", (2, 3))
    assert content(raw, view).tobytes() == array.tobytes()


def test_a_pickle_has_any_size():
    """Python 2 wrote the size of a pointer, which says nothing of the pickle that follows."""
    assert look(framed(b"{'descr': '|O8', 'fortran_order': False, 'shape': (9,)}", b"pickle")) == Contents("npy")


def test_objects_are_not_unpickled():
    class Trap:
        def __reduce__(self):
            return pytest.fail, ("it was unpickled",)

    assert look(saved(np.array([Trap()], object))) == Contents("npy")


@pytest.mark.parametrize("dtype", [">f4", ">i2", ">c16", ">M8[s]"])
def test_big_endian_elements_stay_bytes_and_are_told(dtype):
    found = look(saved(np.zeros((2, 3), dtype), np.zeros(2, dtype)))
    assert (found.regions, found.tensors) == ([], [])
    assert found.warnings == [f"elements of type '{dtype}' are big-endian: they are kept as bytes"]


def test_single_bytes_have_no_order():
    for descr in (b"<b1", b">b1", b"=b1", b"b1"):
        raw = framed(b"{'descr': '%s', 'fortran_order': False, 'shape': (2,)}" % descr, b"\1\0")
        assert_holds(raw, np.array([True, False]), look(raw).tensors[0], "")


def test_arrays_one_after_another():
    arrays = [sample("<f4", (2, 3)), np.array(["x"]), np.asfortranarray(sample("<i8", (4, 3)))]
    arrays += [sample("<f4", (0,)), sample("?", ())]
    raw = saved(*arrays)
    found = look(raw)
    assert [t.name for t in found.tensors] == ["0", "2", "3", "4"]
    for view in found.tensors:
        assert_holds(raw, arrays[int(view.name)], view, view.name)
    assert [r.row for r in found.regions] == [3, 4, 0]


def test_nothing_is_looked_for_after_a_pickle():
    found = look(saved(sample("<f4", (2,)), np.array([{}], object), sample("<f4", (2,))))
    assert [t.name for t in found.tensors] == ["0"]


def test_other_bytes_may_follow():
    raw = saved(sample("<f4", (2, 3)))
    assert look(raw + b"anything") == look(raw)
    found = look(raw + saved(sample("<f4", (9,)))[:-1])
    assert (found.regions, found.tensors) == (look(raw).regions, look(raw).tensors)
    assert found.warnings == [
        f"what follows the first 1 arrays begins like another, but its elements end at byte {len(raw) + 164}, the file at "
        f"{len(raw) + 163}: it is kept as bytes"
    ]


def test_arrays_are_read_up_to_a_bound_of_headers(monkeypatch):
    monkeypatch.setattr(npy, "MAX_HEADERS", 128 * 9)
    assert len(look(saved(*[np.zeros(1)] * 20)).tensors) == 10


def test_headers_of_python_2():
    data = sample("<f4", (2, 3))
    raw = framed(b"{'descr': '<f4', 'fortran_order': False, 'shape': (2L, 3L), }\n", data.tobytes())
    with pytest.warns(UserWarning, match="Python 2"):
        assert np.load(io.BytesIO(raw)).tobytes() == data.tobytes()
    assert_holds(raw, data, look(raw).tensors[0], "")


NUMBERS = ["0", "00", "01", "7", "384", "-1", "1.5", "1L", " 3", "9" * 19, "9" * 20, "", "True", "0x10", "1_0", "２"]


def headers():
    """Headers as numpy writes them, but for one part."""
    types = [f"'{t}'" for t in TYPES]
    shapes = ["()", "[]", "((3,))", "(3,", "3,", "(7, 0, 384)", "(7, 0, 384,)", "(1, 2L)"]
    for first in NUMBERS:
        shapes += [f"({first}{end})" for end in (",", "", ", ", " ,", ",,")]
        shapes += [f"({first}{gap}{second})" for second in NUMBERS for gap in (", ", ",", ",  ")]
    parts = (
        ["{'descr': ", '{"descr": ', " {'descr': ", "{'descr' : ", "{'a': 1, 'descr': "],
        ["'<f4'", *types, "'<f\\x34'", "'|O'", '"<f4"', "[('a', '<f4')]", "'<f\\n4'", "''", "3", "'é4'", "'<f4'[0:]", "'f''4'"],
        [", 'fortran_order': ", ",'fortran_order': ", ", 'fortran': "],
        ["False", "True", "0", "None", "False or True"],
        [", 'shape': ", ", 'shape':", ", 'shape' : "],
        shapes,
        [", }\n", "}", ",}", ", 'a': 1}", ", }#", ", }\t", ", }\0", ", }\n\n", ", }\n ", ", }   \n", ", }    ", ", }}", ""],
    )
    usual = [choices[0] for choices in parts]
    for i, choices in enumerate(parts):
        yield from ("".join([*usual[:i], choice, *usual[i + 1 :]]) for choice in choices)


def test_usual_headers_are_read_as_any_others_are():
    seen = 0
    for header in headers():
        raw = framed(header.encode("latin-1", "replace"), bytes(2000))
        found = []
        for pattern in (npy._USUAL, re.compile("(?!)")):
            with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True):
                patch.setattr(npy, "_USUAL", pattern)
                try:
                    found.append(look(raw))
                except ContainerError:
                    found.append("invalid")
        assert found[0] == found[1], header
        seen += npy._USUAL.fullmatch(header) is not None
    assert 40 < seen < 400


def test_column_major_vectors_are_row_major_too():
    raw = framed(b"{'descr': '<f4', 'fortran_order': True, 'shape': (1, 3, 1)}", bytes(12))
    assert (look(raw).tensors[0].strides, look(raw).regions[0].row) == (None, 1)
    empty = framed(b"{'descr': '<f4', 'fortran_order': True, 'shape': (2, 0, 3)}")
    assert (look(empty).tensors[0].strides, look(empty).regions) == (None, [])


def test_what_is_no_such_file():
    for raw in (b"", b"\x93NUMP", b"\x93NUMPX\1\0", b"PK\3\4", bytes(100)):
        assert look(raw) is None


GOOD = b"'descr': '<f4', 'fortran_order': False, 'shape': "


@pytest.mark.parametrize(
    "text",
    [
        b"{" + GOOD + b"(3,)}",
        b"{" + GOOD + b"(-1,)}",
        b"{" + GOOD + b"(True,)}",
        b"{" + GOOD + b"(2.0,)}",
        b"{" + GOOD + b"[2]}",
        b"{" + GOOD + b"2}",
        b"{" + GOOD + b"(9223372036854775808, 0)}",
        b"{" + GOOD + b"(9223372036854775807,)}",
        b"{" + GOOD + b"(4611686018427387904, 4)}",
        b"{" + GOOD + b"(" + b"1," * 65 + b")}",
        b"{" + GOOD + b"(2,), 'more': 1}",
        b"{'descr': '<f4', 'fortran_order': 0, 'shape': (2,)}",
        b"{'descr': '<f4', 'fortran_order': False}",
        b"{" + GOOD + b"(2,)",
        b"{" + GOOD + b"(" + b"1" * 5000 + b",)}",
        b"[]", b"", b"{[]: 1}", b"{1, []}", b"\0", b"(" * 9000, b"-" * 9000 + b"1", b"1+" * 4000 + b"1", b"[" * 9000,
        b"a." * 4000 + b"b", b"__import__('os').abort()", b"'\xff", rb"'\N{x}'", b"~" * 9000, b"not " * 2000 + b"1",
    ],
)  # fmt: skip
@pytest.mark.parametrize("version", [1, 2, 3])
def test_headers_that_lie(text, version):
    with pytest.raises(ContainerError):
        look(framed(text, bytes(8), version))


def test_headers_that_do_not_fit():
    assert len(look(framed((b"{" + GOOD + b"(2,)}").ljust(10_000), bytes(8))).regions) == 1
    with pytest.raises(ContainerError, match="more than 10000"):
        look(framed((b"{" + GOOD + b"(2,)}").ljust(10_001), bytes(8)))
    for raw in (b"\x93NUMPY\2\0\xff\xff\xff\xff{", b"\x93NUMPY\1\0\xff\xff{", b"\x93NUMPY\1\0", b"\x93NUMPY\1", b"\x93NUMPY"):
        with pytest.raises(ContainerError):
            look(raw)
    with pytest.raises(ContainerError, match=r"version 4\.0"):
        look(b"\x93NUMPY\4\0" + bytes(2000))


def test_a_file_cut_anywhere():
    raw = saved(np.asfortranarray(sample("<f4", (3, 2))), sample("<i2", (5,)))
    first = len(saved(np.zeros((3, 2), "<f4")))
    for n in range(len(raw)):
        if n >= first:
            assert [t.shape for t in look(raw[:n]).tensors] == [(3, 2)]
        elif n < 6:
            assert look(raw[:n]) is None
        else:
            with pytest.raises(ContainerError):
                look(raw[:n])


def test_flipped_bytes():
    raw = saved(np.asfortranarray(sample("<f4", (3, 2))), sample("<i2", (5,)))
    dice = random.Random(1)
    fates = {"found": 0, "refused": 0}
    letters = b"0123456789,()'{}[]<>fiL \\"
    for _ in range(5000):
        damaged = bytearray(raw)
        for _ in range(dice.choice((1, 1, 2, 8))):
            damaged[dice.randrange(len(raw))] = dice.choice((dice.randrange(256), dice.choice(letters)))
        try:
            fates["found"] += look(bytes(damaged)) is not None
        except ContainerError:
            fates["refused"] += 1
    assert min(fates.values()) > 500
