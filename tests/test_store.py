"""The store of checkpoints: what goes in comes out, in little space, and nothing that is kept is ever lost."""

import errno
import hashlib
import json
import os
import pickle
import random
import shutil
import threading
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from forge import noise, safetensors_bytes, weights
from hypothesis import Phase, given, settings
from hypothesis.extra import numpy as hnp
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule
from stores import bits, decoded, same, walk, whole
from test_cli import fails, ok

import tzip
from tzip.store import checkpoints, journal, objects, runs, states, upkeep
from tzip.store.backends import LocalFolder, open_backend
from tzip.store.journal import Entry, Journal
from tzip.store.manifest import MANIFEST, Manifest, ObjectInfo, depths
from tzip.store.sealing import canonical, sealed, unsealed

torch = pytest.importorskip("torch")
links = pytest.mark.skipif(os.name == "nt", reason="links need privileges on Windows")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def new(path: Path, **options: Any) -> tzip.Store:
    return tzip.Store(path, threads=1, **options)


def back(state: Any, path: Path, **options: Any) -> Any:
    """Save a state and load it with a store that has never seen it."""
    with new(path) as store:
        store.save(0, state)
    return new(path).load(0, **options)


def attempted(work: Callable[[], Any]) -> Any:
    """Return what `work` returns, or where the error is that it raises."""
    try:
        return work()
    except tzip.TzipError as e:
        return e.path


def flipped(data: bytes, at: int, bit: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


# ---------------------------------------------------------------- states

NANS = np.array([0x7FC00001, 0xFFC12345, 0x7F800001, 0x80000000, 0x7F800000, 0xFF800000, 1], "<u4").view("<f4")
PLAIN = {
    "none": None,
    "flags": [True, False],
    "ints": [0, -1, (1 << 63) - 1, 1 << 63, -(1 << 63), -(1 << 200), 10**30],
    "floats": [0.0, -0.0, 5.0, 1e22, 5e-324, 1.7976931348623157e308, float("inf"), float("-inf"), float("nan")],
    "payload": [np.array([0xFFF8DEADBEEF0001], "<u8").view("<f8").item(), complex(-0.0, float("nan"))],
    "text": ["", "ä€😀", '\0\n"\\', "t", "x" * 5000],
    "surrogate-free": ("a", ("b", ()), []),
    "bytes": [b"", b"\0\xff", b"y" * 1024, b"z" * 1025, noise(70_000), bytearray(b"q"), bytearray(b"r" * 3000)],
    "sets": [{1, 2, "a"}, frozenset((b"x", None)), set(), frozenset()],
    "keys": {1: "i", "1": "s", 2.5: "f", True and "t": "t", None: "n", (1, "a"): "u", b"k" * 2000: "long", False: "b"},
    "ordered": OrderedDict([("z", 1), ("a", OrderedDict())]),
    "counted": Counter({5: 2, 3: 1}),  # as schedulers hold their milestones: what counts nothing is 0, not missing
    "tags": [["l"], ["t", "x", "np", ""], ["d", ["a", 1]], {"p": "AAAA"}],
}


def test_plain_values(run: Path) -> None:
    same(PLAIN, back(PLAIN, run))
    for i, value in enumerate([None, 3, "x", [], {}, b"z" * 2000, np.float32(3), np.arange(3), -0.0]):
        same(value, back(value, run.with_name(f"r{i}")))


def test_mappings_of_other_types_are_plain_dicts(run: Path) -> None:
    value = {"d": defaultdict(list, {"a": [1]})}
    same({"d": {"a": [1]}}, back(value, run))


ARRAYS = [
    *(np.arange(-3, 4).astype(t) for t in ("b1", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "c8", "c16", "g")),
    *(np.arange(7).astype(t) for t in ("u1", "u2", "u4", "u8", ">i2", ">f4", ">f8", ">c8", ">u8")),
    NANS,
    NANS.astype(">f4"),
    np.array([0x7E01, 0xFE55, 0x8000, 0x7C00], "<u2").view("<f2"),
    *(
        np.arange(-2, 2).astype(getattr(ml_dtypes, t))
        for t in dir(ml_dtypes)
        if t.startswith(("bfloat", "float", "int", "uint"))
    ),
    np.array(3.5, "<f4"),
    np.array(7, ">i8"),
    np.array(1 + 2j),
    np.array(True),
    np.empty((0, 3), "<f4"),
    np.empty((2, 0, 4), "<c16"),
    np.empty((0,), "M8[ns]"),
    np.arange(24, dtype="<f4").reshape(2, 3, 4).transpose(2, 0, 1),
    np.asfortranarray(np.arange(12, dtype="<i4").reshape(3, 4)),
    np.arange(20, dtype="<i2")[::-3],
    np.ones(8, "<f4")[::8],
    np.broadcast_to(np.arange(3, dtype="<f8"), (4, 3)),
    np.frombuffer(b"xabcdefgh", "<f4", 2, 1),
    np.array(["2026-01-01T00:00:00", "NaT"], "M8[ns]"),
    np.array([1, 2], "m8[D]"),
    np.array(["ab", "cde", ""]),
    np.array([b"ab", b""]),
    np.zeros(3, "V8"),
    np.zeros((2, 2), [("a", "<f4"), ("b", ">u2", (2, 3)), ("c", [("x", "<c8"), ("y", "S3")])]),
    np.zeros(2, np.dtype([("a", "u1"), ("b", "<f8")], align=True)),
    np.zeros(2, [(("a title", "a"), "<f4")]),
    np.arange(70_000, dtype="<f4"),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype.str}{list(a.shape)}")
def test_arrays(run: Path, array: np.ndarray) -> None:
    same({"a": array}, back({"a": array}, run))
    if array.size:
        scalar = array.reshape(-1)[-1]
        same([scalar], back([scalar], run.with_name("scalar")))


def test_scalars_without_bytes_and_memory_maps(run: Path, tmp_path: Path) -> None:
    mapped = np.memmap(tmp_path / "map", "<f4", "w+", shape=(3,))
    mapped[:] = [1, -0.0, np.nan]
    value = [np.str_(""), np.bytes_(b""), np.void(b"abc"), np.datetime64("NaT"), np.bool_(True), np.longdouble(2) / 3]
    same(value, back(value, run))
    same([np.array(mapped)], back([mapped], run.with_name("mapped")))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(3, [("a", "<f4"), ("b", ml_dtypes.bfloat16)]),
        np.zeros(2, {"names": ["a", "b"], "formats": ["<u4", "<u2"], "offsets": [0, 0]}),
        np.zeros(3, "V0"),
        np.array([None, 1], object),
    ],
    ids=["ml_dtypes", "overlap", "void", "objects"],
)
def test_types_that_no_description_gives_again_are_pickled(run: Path, array: np.ndarray) -> None:
    """numpy describes bfloat16 in a record as two bytes of void: that would be another type."""
    kept = back([array], run)[0]
    assert isinstance(kept, tzip.Pickled)
    again = new(run).load(0, allow_pickle=True)[0]
    assert again.dtype == array.dtype
    assert array.dtype.hasobject or again.tobytes() == array.tobytes()


def torch_tensors() -> dict[str, Any]:
    found = {}
    for name in dir(torch):
        dtype = getattr(torch, name)
        if isinstance(dtype, torch.dtype) and not name.startswith("q"):
            n = torch.empty(0, dtype=dtype).element_size() * 6
            found[str(dtype)] = torch.frombuffer(bytearray(noise(n)), dtype=torch.uint8).view(dtype).reshape(2, 3)
    found["torch.bool"] = torch.tensor([[True, False]])
    plain = torch.arange(24.0).reshape(2, 3, 4)
    return found | {
        "0-d": torch.tensor(3.5),
        "empty": torch.empty(0, 3, dtype=torch.bfloat16),
        "transposed": plain.permute(2, 0, 1),
        "sliced": plain[:, ::2, 1:3],
        "expanded": torch.arange(3).expand(4, 3),
        "conjugated": torch.tensor([1 + 2j, 3 - 1j]).conj(),
        "negative": torch.tensor([1 + 2j, 3 - 1j]).conj().imag,
        "one": torch.tensor([1 + 2j]).conj().imag,
        "one of many": torch.arange(9.0)[4::9],
        "grad": torch.ones(2, requires_grad=True).detach(),
        "channels": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }


@pytest.mark.filterwarnings("ignore:ComplexHalf", "ignore:BComplex32")
def test_torch_tensors(run: Path) -> None:
    state = torch_tensors()
    again = back(state, run)
    same(state, again)
    assert len(state) > 40
    for key, tensor in back(state, run.with_name("np"), framework="np").items():
        assert isinstance(tensor, np.ndarray), key
        assert tensor.tobytes() == bits(state[key]), key
    device = back({"w": state["0-d"]}, run.with_name("dev"), device="cpu")
    assert device["w"].device == torch.device("cpu")


@pytest.mark.filterwarnings("ignore:torch.quantize", "ignore:The PyTorch API of nested tensors")
def test_torch_values(run: Path) -> None:
    value = [torch.Size([2, 3]), torch.Size([]), torch.bfloat16, torch.device("cuda:1"), torch.device("cpu")]
    same(value, back(value, run))
    param = back([torch.nn.Parameter(torch.ones(2))], run.with_name("p"))[0]
    assert bits(param) == bits(torch.ones(2))
    for bad in (
        torch.eye(3).to_sparse(),
        torch.empty(2, device="meta"),
        torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    ):
        with pytest.raises(tzip.UsageError) as caught:
            new(run).save(1, {"a": {"b": bad}})
        assert caught.value.tensor == "a.b"
    assert [e.step for e in new(run).log()] == [0]


def test_arrays_of_numpy_as_torch_and_back(run: Path) -> None:
    state = {
        "f": np.arange(3, dtype="<f4"),
        "b": np.ones(2, ml_dtypes.bfloat16),
        "c": np.array([1 + 2j]),
        "e": NANS.astype(">f4"),
    }
    again = back(state, run, framework="pt")
    for key in "fbc":
        assert isinstance(again[key], torch.Tensor)
        assert bits(again[key]) == state[key].tobytes()
    same(state["e"], again["e"])  # torch has no such type: it stays an array


def test_jax_arrays(run: Path) -> None:
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    state = {"a": jnp.arange(5), "b": jnp.ones((2, 3), jnp.bfloat16), "c": jnp.ones(2, jnp.int4), "k": jax.random.PRNGKey(3)}
    state |= {"z": jnp.zeros(()), "e": jnp.zeros((0, 2)), "x": jnp.array([1 + 2j])}
    same(state, back(state, run))
    with pytest.raises(tzip.UsageError) as caught:
        new(run).save(1, {"k": jax.random.key(0)})
    assert caught.value.tensor == "k"
    with jax.enable_x64(True):
        wide = {"w": jnp.arange(3.0) / 3, "i": jnp.array([1 << 40])}
        same(wide, back(wide, run.with_name("wide")))
    # Elsewhere jax would round without a word.
    with pytest.raises(tzip.UsageError, match="x64"):
        new(run.with_name("wide")).load(0)
    assert new(run.with_name("wide")).load(0, framework="np")["w"].dtype == np.float64


class Canary:
    woken = 0

    def __setstate__(self, state: Any) -> None:
        type(self).woken += 1

    def __getstate__(self) -> Any:
        return {"n": 1}


class Big:
    def __init__(self) -> None:
        self.payload = b"x" * 5000

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Big) and other.payload == self.payload

    __hash__ = None


def test_nothing_is_unpickled_unless_asked(run: Path) -> None:
    state = {"c": Canary(), "big": Big(), "lone": "\ud800", "w": np.arange(3)}
    again = back(state, run)
    new(run).verify(deep=True)
    new(run).restore(0, run.with_name("s.safetensors"))
    assert Canary.woken == 0
    assert type(again["c"]) is tzip.Pickled
    assert pickle.loads(again["big"].data) == Big()
    with new(run) as store:
        store.save(1, again)  # what was not opened goes on as it is
    asked = new(run).load(1, allow_pickle=True)
    assert Canary.woken == 1
    assert type(asked["c"]) is Canary
    assert asked["big"] == Big()
    assert asked["lone"] == "\ud800"
    with pytest.raises(tzip.UsageError, match="cannot be saved"):
        new(run).save(2, {"a": [threading.Lock()]})


def test_states_that_contain_themselves(run: Path) -> None:
    a: list[Any] = []
    a.append(a)
    d: dict[str, Any] = {}
    d["d"] = {"x": d}
    deep: Any = 1
    for _ in range(5000):
        deep = (deep,)
    for bad in (a, d, deep):
        with pytest.raises(tzip.UsageError, match="itself"):
            new(run).save(0, bad)
    fine: Any = np.arange(3)
    for _ in range(150):
        fine = [fine]
    same(fine, back(fine, run))


def test_names(run: Path) -> None:
    """Names that meet, and names that mean something elsewhere."""
    n = iter(range(100))
    state = {
        "a.b": np.array(next(n)), "a": {"b": np.array(next(n))}, "a.b#2": np.array(next(n)), "": np.array(next(n)),
        "__metadata__": np.array(next(n)), "value": np.array(next(n)), "/../x\0\n": np.array(next(n)), 1: np.array(next(n)),
        "1": np.array(next(n)), "ä": np.array(next(n)), "x" * 9000: np.array(next(n)), "{": {"__metadata__": np.array(next(n))},
    }  # fmt: skip
    same(state, back(state, run))
    assert len(new(run).open(0)) == 12
    new(run).restore(0, run.with_name("x.safetensors"))
    from safetensors.numpy import load_file

    assert sorted(int(v) for v in load_file(run.with_name("x.safetensors")).values()) == list(range(12))
    with pytest.raises(tzip.UsageError, match="UTF-8"):
        new(run).save(1, {"\udc80": np.arange(2)})


def test_header_that_nobody_could_read_again_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors whose header breaks a rule would be saved as bytes without names."""
    from tzip.formats import safetensors_header

    monkeypatch.setattr(safetensors_header, "MAX_HEADER", 1000)
    with new(run) as store:
        store.save(0, {"w": np.arange(3)})
        with pytest.raises(tzip.UsageError):
            store.save(1, {f"w{i}": np.arange(3) for i in range(100)})
        assert [e.step for e in store.log()] == [0]


def test_optimiser_scheduler_and_generators(run: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 2).to(torch.bfloat16))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, amsgrad=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.1, total_steps=10)
    kept = []
    with new(run) as store:
        for step in range(3):
            model[1](model[0](torch.randn(4, 8))).float().mean().backward()
            model[2](torch.randn(4, 16, dtype=torch.bfloat16)).sum().backward()
            optimiser.step()
            scheduler.step()
            state = {
                "model": model.state_dict(),
                "optimiser": optimiser.state_dict(),
                "scheduler": {k: v for k, v in scheduler.state_dict().items() if not callable(v)},
                "rng": [torch.get_rng_state(), np.random.get_state(), random.getstate()],
                "generator": np.random.default_rng(1).bit_generator.state,
            }
            store.save(step, state)
            kept.append(pickle.loads(pickle.dumps(state)))
    for step, state in enumerate(kept):
        again = new(run).load(step)
        same(state["optimiser"], again["optimiser"])
        same({k: v for k, v in state.items() if k != "model"}, {k: v for k, v in again.items() if k != "model"})
        assert type(again["model"]) is OrderedDict
        same(dict(state["model"]), dict(again["model"]))
    model.load_state_dict(again["model"])
    optimiser.load_state_dict(again["optimiser"])
    scheduler.load_state_dict(again["scheduler"])
    torch.set_rng_state(again["rng"][0])
    np.random.set_state(again["rng"][1])
    random.setstate(again["rng"][2])


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.complex_numbers(), st.text(), st.binary(max_size=40),
    st.builds(bytearray, st.binary(max_size=9)),
    hnp.arrays(hnp.scalar_dtypes(), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)),
)  # fmt: skip
STATES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner, inner),
        st.dictionaries(st.one_of(st.text(max_size=3), st.integers(0, 2), st.none(), st.booleans()), inner, max_size=4),
    ),
    max_leaves=8,
)


def plain_state(value: Any) -> bool:
    """Say whether nothing of it is pickled: surrogates, and arrays of strings without bytes."""
    try:
        tree, _ = states.flatten(value)
    except tzip.UsageError:
        return False
    return '["p"' not in json.dumps(tree) and '"p", ""]' not in json.dumps(tree)


@given(STATES)
@settings(max_examples=120)
def test_any_state_is_put_together_again(value: Any) -> None:
    if not plain_state(value):
        return
    tree, leaves = states.flatten(value)
    tree = json.loads(json.dumps(tree))

    def get(key: str) -> Any:
        leaf = leaves[key]
        return leaf.dtype, leaf.shape, leaf.raw.copy()

    same(value, states.rebuild(tree, get, states.Target()))


BAD_TREES = [
    [],
    [1],
    ["?"],
    ["l", []],
    ["d", ["a"]],
    ["d", 3],
    ["d", [["l"], 1]],
    ["s", ["l"]],
    ["t"],
    ["t", "w", "np"],
    ["t", "no", "np", ""],
    ["t", "w", "??", ""],
    ["t", "w", "np", "|O8"],
    ["t", "w", "np", "<f8"],
    ["t", "w", "np", "nonsense"],
    ["t", "w", "np", '[["a"]]'],
    ["t", "w", "np", "["],
    ["t", "w", "pt", "Tensor"],
    ["t", "w", "pt", "load"],
    ["b", "!"],
    ["b", 3],
    ["p", "!"],
    ["i", "xyz"],
    ["f", "00"],
    ["c", "00"],
    ["n", "<f4", "00"],
    ["n", "|O8", "0000000000000000"],
    ["n", "<f4", "zz"],
    ["n", "__doc__", "00"],
    ["z", "a"],
    ["T", "load"],
    ["T", "nothing"],
    ["D", "nowhere"],
    {"a": 1},
    ["ls", 1],
    ["l", {"x": 1}],
]


@pytest.mark.parametrize("tree", BAD_TREES, ids=json.dumps)
def test_trees_that_break_a_rule(tree: Any) -> None:
    raw = np.arange(8, dtype=np.uint8)
    from tzip.formats.dtypes import BY_NAME

    def get(key: str) -> Any:
        return {"w": (BY_NAME["U8"], (2, 4), raw.copy())}[key]

    with pytest.raises((tzip.CorruptError, tzip.UsageError)):
        states.rebuild(tree, get, states.Target())
    deep: Any = 1
    for _ in range(100_000):
        deep = ["l", deep]
    with pytest.raises(tzip.CorruptError):
        states.rebuild(deep, get, states.Target())


# ---------------------------------------------------------------- parts


def test_keys_and_slices(run: Path) -> None:
    state = {"model": {"a": np.arange(12.0).reshape(4, 3), "b": np.ones(2)}, "opt": [np.zeros(3), {"m": np.arange(2)}], "n": 5}
    with new(run) as store:
        store.save(3, state)
        same({"model": {"a": state["model"]["a"]}, "n": 5}, store.load(keys="model.a"))
        same({"model": state["model"], "n": 5}, store.load(keys="model.*"))
        same({"model": {"b": state["model"]["b"]}, "opt": [{"m": np.arange(2)}], "n": 5}, store.load(keys=["*.b", "opt.1.*"]))
        for bad in ("nothing", "model", ["model.a", "x.*"]):
            with pytest.raises(tzip.TensorNotFoundError):
                store.load(keys=bad)
        with store.open(3) as checkpoint:
            assert list(checkpoint) == ["model.a", "model.b", "opt.0", "opt.1.m"]
            assert "model.a" in checkpoint
            assert checkpoint.step == 3
            same(state["model"]["a"][1:3], checkpoint.tensor("model.a")[1:3])
            same(state["model"]["a"][::-2, 1], checkpoint.tensor("model.a")[::-2, 1])
            same(state["model"]["b"], checkpoint["model.b"])
            with pytest.raises(KeyError):
                checkpoint["model"]


def test_only_what_is_asked_for_is_decoded(run: Path) -> None:
    with new(run) as store:
        store.save(0, {"a": np.arange(70_000.0), "b": np.arange(70_000.0) + 1})
        store.save(1, {"a": np.arange(70_000.0), "b": np.arange(70_000.0) + 2})
    with decoded() as seen:
        new(run).load(1, keys="a")
    assert [Path(p).stem for p in seen] == [new(run).find(0).object]


# ---------------------------------------------------------------- references, differences, chains


def test_unchanged_tensors_are_references(run: Path) -> None:
    frozen = np.frombuffer(noise(1 << 20), "<f4")
    with new(run) as store:
        first = store.save(0, {"frozen": frozen, "n": np.array(0)})
        again = [store.save(i, {"frozen": frozen.copy(), "n": np.array(i)}) for i in (1, 2)]
    assert first.stored > frozen.nbytes * 0.8
    for report in again:
        assert report.stored < 3000
        assert (report.tensors, report.unchanged) == (2, 1)
    with new(run) as other:  # and for one that did not see the first
        assert other.save(3, {"frozen": frozen, "n": np.array(3)}).stored < 3000
        # Another shape, type or sign of zero is another tensor, whatever compares equal.
        zeros = np.zeros(100_000, "<f4")
        other.save(4, {"z": zeros})
        for i, changed in enumerate((-zeros, zeros.reshape(1000, 100), zeros.view("<i4")), 5):
            assert other.save(i, {"z": changed}).unchanged == 0
            same({"z": changed}, new(run).load(i))


def test_changed_tensors_are_differences(run: Path) -> None:
    sizes = []
    with new(run) as store:
        for i, w in enumerate(walk(200_000, 3)):
            report = store.save(i, {"w": w})
            sizes.append(report.stored)
            assert report.deltas == (i > 0)
    assert max(sizes[1:]) < 0.75 * sizes[0]
    whole(run, {i: {"w": w} for i, w in enumerate(walk(200_000, 3))})


@pytest.mark.parametrize("max_chain", [1, 2, 4])
def test_depth_is_what_is_read(run: Path, max_chain: int) -> None:
    saved = list(walk(3000, 11))
    with new(run, max_chain=max_chain) as store:
        for i, w in enumerate(saved):
            store.save(i, {"w": w})
    longest = 0
    for i, w in enumerate(saved):
        with new(run).open(i) as checkpoint:
            depth = checkpoint.manifest.records["w"].depth
            with decoded() as seen:
                same(w, checkpoint["w"])
        assert len(seen) == depth + 1
        assert len(checkpoint.manifest.objects) == depth + 1
        longest = max(longest, depth + 1)
    assert longest == max_chain


def test_tensors_that_change_in_turns_make_no_endless_chain(run: Path) -> None:
    """Small ones share chunks, and an object is needed with all that it leans on: judged one by one, each tensor had a short
    chain, and the objects one of 70, which nothing could read.
    """
    x, y = walk(500, 70), walk(500, 70, 1)
    big = walk(70_000, 70, 2)
    frozen, grown, late, state = next(y), next(big), np.zeros(3), {}
    with new(run, max_chain=4) as store:
        for i, w in enumerate(x):
            frozen = next(y) if i % 11 > 2 else frozen
            grown = next(big) if i % 7 else grown
            state = {"x": w, "y": frozen, "big": grown, "late": late + i // 5}
            store.save(i, state)
            with store.open(i) as checkpoint:
                assert max(depths(checkpoint.manifest.objects).values()) < 4
                assert len(checkpoint.manifest.objects) < 20
    with new(run).open() as checkpoint, decoded() as seen:
        assert checkpoint["x"].tobytes() == state["x"].tobytes()
        assert len(seen) <= checkpoint.manifest.records["x"].depth + 1 + 4
    same(state, new(run).load())
    assert new(run).verify(deep=True).faults == []


def test_small_tensors_are_as_deep_as_those_they_share_chunks_with(run: Path) -> None:
    x, y = list(walk(500, 3)), list(walk(500, 2, 1))
    with new(run) as store:
        for i in range(3):
            store.save(i, {"x": x[i], "y": y[i // 2]})
    with new(run).open() as checkpoint, decoded() as seen:
        same(y[1], checkpoint["y"])
        assert len(seen) == checkpoint.manifest.records["y"].depth + 1 == 3


def test_chain_of_a_store_may_be_changed_later(run: Path) -> None:
    with new(run, max_chain=2, level="fast") as store:
        assert (store.max_chain, store.level) == (2, "fast")
    assert (new(run).max_chain, new(run).level) == (2, "fast")
    assert new(run, max_chain=5).max_chain == 5
    for bad in (0, 61, -1):
        with pytest.raises(tzip.UsageError):
            new(run, max_chain=bad)
    with pytest.raises(tzip.UsageError):
        new(run, level="none")
    backend = open_backend(run)
    head = Journal(backend).head
    Journal(backend).commit(replace(head, generation=9, config={"level": "fast", "max_chain": 10**6}))
    assert new(run).max_chain == upkeep.LONGEST_CHAIN  # a longer one could not be read


def test_depths_of_objects() -> None:
    info = {
        "a": ObjectInfo(),
        "b": ObjectInfo(("a",)),
        "c": ObjectInfo(("a", "b")),
        "d": ObjectInfo(("c", "a")),
        "e": ObjectInfo(),
    }
    for keys in (list(info), list(info)[::-1]):
        assert depths({k: info[k] for k in keys}) == {"a": 0, "b": 1, "c": 2, "d": 3, "e": 0}
    long = {str(i): ObjectInfo((str(i - 1),) if i else ()) for i in range(5000)}
    assert depths(dict(reversed(long.items())))["4999"] == 4999
    with pytest.raises(tzip.CorruptError, match="circle"):
        depths({"a": ObjectInfo(("b",)), "b": ObjectInfo(("c",)), "c": ObjectInfo(("a",))})


def test_states_in_many_objects_need_few_open_files(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(checkpoints, "_OPEN", 4)
    n = 30
    state = {f"w{i}": np.full(10, i, "<f4") for i in range(n)}
    with new(run, max_chain=1) as store:
        for i in range(n):
            state[f"w{i}"] = np.full(10, -i, "<f4")
            store.save(i, dict(state))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(map(int, os.listdir("/proc/self/fd"))) if os.path.isdir("/proc/self/fd") else 200  # the limit is on numbers
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, hard))
    try:
        same(state, new(run).load())
        assert new(run).verify(deep=True).faults == []
        assert new(run).repair(deep=True) == upkeep.RepairReport(list(range(n)), {}, False)
        (run / "head.json").unlink()
        assert new_repair(run).kept == list(range(n))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def new_repair(run: Path, deep: bool = False) -> upkeep.RepairReport:
    return upkeep.repair(open_backend(run), deep=deep, threads=1)


# ---------------------------------------------------------------- the list


def test_tags_notes_metrics(run: Path) -> None:
    with new(run) as store:
        for step, loss in ((1, 3.0), (2, 1.0), (3, float("nan")), (4, 1.0), (5, 2.0), (6, float("inf"))):
            store.save(
                step, {"n": step}, note=f"Schritt {step} ü", metrics={"loss": loss, "acc": -step}, tags=[f"t{step}", "newest"]
            )
        store.save(7, {"n": 7})
    store = new(run)
    log = list(store.log())
    assert [e.step for e in log] == [7, 6, 5, 4, 3, 2, 1]
    assert [e.seq for e in log] == [7, 6, 5, 4, 3, 2, 1]
    assert log[5].note == "Schritt 2 ü"
    assert np.isnan(log[4].metrics["loss"])
    assert log[1].metrics == {"loss": float("inf"), "acc": -6.0}
    assert store.tags() == {**{f"t{i}": i for i in range(1, 7)}, "newest": 6}
    assert store.find().step == 7
    assert store.find("newest").step == store.find("t6").step == store.find(6).step == store.find("6").step == 6
    assert store.find("best", metric="loss").step == 4  # of equal ones the newer
    assert store.find("best", metric="acc").step == 6
    assert store.find("best", metric="acc", mode="max").step == 1
    assert store.find(np.int64(3)).step == 3
    for bad in ("nothing", 8, "8", -1, 1.0, None, True, b"1", "best"):
        with pytest.raises(tzip.UsageError):
            store.find(bad)
    with pytest.raises(tzip.UsageError):
        store.find("best", metric="none")
    with pytest.raises(tzip.UsageError):
        store.find("best", metric="loss", mode="best")
    store.tag("mine", 2)
    store.tag("mine", 3)
    assert store.find("mine").step == 3
    store.tag("mine", None)
    assert "mine" not in store.tags()
    for name, step in (("mine", None), ("latest", 1), ("best", 1), ("12", 1), ("", 1), ("x", 99)):
        with pytest.raises(tzip.UsageError):
            store.tag(name, step)
    for options in (
        {"tags": ["7"]},
        {"tags": ["latest"]},
        {"tags": ["\ud800"]},
        {"note": "\udc80"},
        {"metrics": {"\udc80": 1}},
        {"metrics": {"a": "x"}},
        {"metrics": {"a": None}},
    ):
        with pytest.raises(tzip.UsageError):
            store.save(9, {}, **options)
    for step in (-1, 1.5, True, "1", None, 1 << 63):
        with pytest.raises(tzip.UsageError):
            store.save(step, {})
    assert [e.step for e in store.log()] == [7, 6, 5, 4, 3, 2, 1]


def test_steps_are_there_once(run: Path) -> None:
    with new(run) as store:
        store.save(1, {"w": np.arange(3)}, tags=["kept"])
        store.save(2, {"w": np.arange(3) + 1})
        with pytest.raises(tzip.UsageError, match="replace_step"):
            store.save(1, {"w": np.arange(3)})
        store.save(1, {"w": np.arange(3) + 2}, replace_step=True)
        assert [e.step for e in store.log()] == [1, 2]
        assert store.tags() == {"kept": 1}  # which protects it from prune
        store.save(1, {"w": np.arange(3) + 3}, replace_step=True)
        store.save(3, {"w": np.arange(3) + 3}, replace_step=True)
    whole(run, {1: {"w": np.arange(3) + 3}, 2: {"w": np.arange(3) + 1}, 3: {"w": np.arange(3) + 3}}, {"kept": 1})


def test_log_over_many_pages(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "PAGE", 3)
    monkeypatch.setattr(journal, "_MAX_RECENT", 6)
    expected = {}
    with new(run) as store:
        for i in range(23):
            expected[i] = {"w": np.array(i)}
            store.save(i, expected[i], tags=["x"] if i == 1 else [])
        assert [(p.height, p.count) for p in store.journal().head.pages] == [(1, 9), (0, 3), (0, 3), (0, 3)]
        assert [e.step for e in store.log()] == list(range(22, -1, -1))
        store.save(1, {"w": np.array(-1)}, replace_step=True)  # one in the first page
        expected[1] = {"w": np.array(-1)}
        assert [e.step for e in store.log()] == [1, *range(22, 1, -1), 0]
        store.gc(grace=0)
        assert {p.stem for p in (run / "pages").iterdir()} == store.journal().page_names()
        assert len(store.journal().page_names()) == 7
        report = store.prune(keep_every=2)
        assert report.kept == [i for i in [0, *range(2, 23), 1] if i % 2 == 0 or i == 1]
        store.gc(grace=0)
    whole(run, {i: s for i, s in expected.items() if i % 2 == 0 or i == 1}, {"x": 1})


def test_a_page_below_another_must_be_there_when_a_head_names_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "PAGE", 1)
    monkeypatch.setattr(journal, "_MAX_RECENT", 2)
    backend = open_backend(run)
    new(run)
    found = Journal(backend)
    entries = [Entry(i, hashlib.sha256(bytes([i])).hexdigest(), i) for i in range(5)]
    head = found.with_entries(entries)
    assert [p.height for p in head.pages] != [0] * len(head.pages)
    lower = next(page for top in head.pages if top.height for page in found._pages(top))
    backend.delete_page(lower.name)
    with pytest.raises(tzip.ConflictError):
        found.commit(head)
    assert list(Journal(backend).entries()) == []


def test_two_thousand_entries(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = open_backend(run)
    new(run)
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # it is the list that is tested, not the disk
    monkeypatch.setattr(journal, "PAGE", 8)
    monkeypatch.setattr(journal, "_MAX_RECENT", 16)
    for i in range(2000):
        found = Journal(backend)
        entry = Entry(i ^ 3, hashlib.sha256(bytes([i % 256, i // 256])).hexdigest(), i, note=str(i))
        found.commit(found.with_entry(entry))
    found = Journal(backend)
    entries = list(found.entries())
    assert [e.time_ns for e in entries] == list(range(1999, -1, -1))
    assert [e.seq for e in entries] == list(range(2000, 0, -1))
    for step in (0, 7, 1999, 1000):
        entry = found.find(step)
        assert entry is not None
        assert (entry.step, entry.time_ns ^ 3) == (step, step)
    assert found.find(2000) is None
    assert [p.height for p in found.head.pages] == [2] * 2 + [1] * 14 + [0] * 8
    assert len(found.page_names()) == 248 + 30 + 2
    assert len(found.raw or b"") < 6_000


# ---------------------------------------------------------------- in the background


def test_background_saves_take_a_consistent_copy(run: Path) -> None:
    gate = threading.Event()
    expected = {}
    with new(run) as store:
        original = store._write
        store._write = lambda save: (gate.wait(60), original(save))[1]
        t, a, numbers, b = torch.arange(5.0), np.arange(100_000.0), [1], bytearray(b"x" * 2000)
        state = {"t": t, "a": a, "l": numbers, "b": b, "d": {"k": 1}}
        expected[0] = pickle.loads(pickle.dumps(state))
        assert store.save(0, state, block=False) is None
        assert store.stats().queued == 1
        t += 1
        a[:] = -1
        numbers.append(2)
        b[:] = b"y"
        state["d"]["k"] = 2
        state["new"] = 1
        # The next save waits for the first: memory does not grow with the number of saves.
        done = threading.Event()

        def second() -> None:
            store.save(1, state, block=False)
            done.set()

        expected[1] = pickle.loads(pickle.dumps(state))
        thread = threading.Thread(target=second)
        thread.start()
        assert not done.wait(0.2)
        gate.set()
        thread.join(60)
        assert done.is_set()
        report = store.wait()
        assert report is not None
        assert report.step == 1
        assert store.wait() is None
        stats = store.stats()
        assert (stats.saves, stats.queued) == (2, 0)
        assert stats.raw > 2 * a.nbytes
        assert stats.stalled >= 0.2
        assert 0 < stats.ratio < 2
    whole(run, expected)


def test_errors_in_the_background_are_raised_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = new(run)
    store.save(0, {"w": np.arange(3)})

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left")

    calls: dict[str, Any] = {
        "save": lambda: store.save(9, {"w": np.arange(9)}),
        "background": lambda: store.save(9, {"w": np.arange(9)}, block=False),
        "files": lambda: store.save_files(9, [__file__]),
        "wait": store.wait,
        "prune": lambda: store.prune(keep_last=1),
        "repair": store.repair,
        "close": store.close,
    }
    for name, call in calls.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runs, "write_object", broken)
            store.save(1, {"w": np.arange(4)}, block=False)
            with pytest.raises(OSError, match="No space"):
                call()
        assert [e.step for e in store.log()] == [0], name
        assert store.wait() is None
    store.save(1, {"w": np.arange(4)})
    whole(run, {0: {"w": np.arange(3)}, 1: {"w": np.arange(4)}})


def test_saves_after_one_that_failed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = list(walk(3000, 6))
    expected = {}
    with new(run) as store:
        for i, w in enumerate(saved):
            if i in (2, 4):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(LocalFolder, "put_head", lambda *a: (_ for _ in ()).throw(OSError(5, "EIO")))
                    with pytest.raises(OSError, match="EIO"):
                        store.save(i, {"w": w})
            else:
                expected[i] = {"w": w}
                store.save(i, {"w": w})
    whole(run, expected)


# ---------------------------------------------------------------- files


def trainer_folder(path: Path, seed: int) -> dict[str, bytes]:
    path.mkdir()
    rows = [("w", "BF16", [3000], weights(3000)), ("b", "F32", [3], weights(3, seed, "F32"))]
    (path / "model.safetensors").write_bytes(safetensors_bytes(rows, {"format": "pt"}, pad=5))
    torch.save({"state": {0: {"exp_avg": torch.arange(3000.0) + seed, "step": torch.tensor(1.0)}}}, path / "optimizer.pt")
    torch.save({"python": random.getstate(), "cpu": torch.get_rng_state()}, path / "rng_state.pth")
    (path / "trainer_state.json").write_text(json.dumps({"step": seed}))
    (path / "empty").write_bytes(b"")
    (path / "sub" / "none").mkdir(parents=True)
    (path / "sub" / "x.bin").write_bytes(noise(9000, seed))
    os.chmod(path / "sub" / "x.bin", 0o640)
    if os.name != "nt":
        (path / "last").symlink_to("sub/x.bin")
    return files_of(path)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): os.readlink(p).encode() if p.is_symlink() else p.read_bytes() if p.is_file() else b"/"
        for p in sorted(folder.rglob("*"))
    }


@links
def test_files_come_back_byte_for_byte(run: Path, tmp_path: Path) -> None:
    kept = {}
    with new(run, max_chain=2) as store:
        for step in (10, 20, 30):
            kept[step] = trainer_folder(tmp_path / f"checkpoint-{step}", step)
            report = store.save_files(step, [tmp_path / f"checkpoint-{step}"], metrics={"loss": 1 / step}, tags=[f"s{step}"])
            assert report.raw >= sum(len(v) for k, v in kept[step].items() if k != "last") - 10
        assert store.stats().saves == 3
        # States go on from the last state, whatever was saved between.
        w = np.frombuffer(noise(50_000), "<u4")
        store.save(40, {"w": w})
        store.save_files(50, [__file__])
        assert store.save(60, {"w": w}).unchanged == 1
        assert new(run).save(70, {"w": w}).unchanged == 1
        store.tag("s30", 30)
        store.prune(keep_every=1000)
    sizes = {e.step: e.stored for e in new(run).log()}
    assert sizes[20] < 0.8 * sizes[10]
    assert len(new(run).open(20).manifest.objects) == 2
    assert len(new(run).open(30).manifest.objects) == 1  # max_chain
    for step, files in kept.items():
        shutil.rmtree(tmp_path / f"checkpoint-{step}")  # nothing of them is needed
        new(run).restore(step, tmp_path / f"out-{step}")
        assert files_of(tmp_path / f"out-{step}") == files
        assert (tmp_path / f"out-{step}" / "sub" / "x.bin").stat().st_mode & 0o777 == 0o640
        assert torch.load(tmp_path / f"out-{step}" / "optimizer.pt")["state"][0]["exp_avg"][1] == step + 1
    with new(run).open(20) as checkpoint:
        assert checkpoint["w"].tobytes() == weights(3000)
        assert "w" in new(run).load(20)
    with pytest.raises(tzip.UsageError):
        new(run).restore(20, tmp_path / "out-20")
    new(run).restore(20, tmp_path / "out-20", force=True)
    assert new(run).verify(deep=True).faults == []
    with new(run) as store:
        store.tag("s10", None)
        report = store.prune(keep_last=2)  # 20 leans on 10
        assert (report.kept, report.rewritten) == ([20, 30], [20])
        store.gc(grace=0)
        store.restore(20, tmp_path / "pruned")
        assert files_of(tmp_path / "pruned") == kept[20]
        assert store.verify(deep=True).faults == []


def test_tensors_in_files_of_types_that_numpy_lacks(run: Path, tmp_path: Path) -> None:
    rows = [("four", "F4", [2, 2], b"\x21\x43"), ("six", "F6_E2M3", [4], b"abc"), ("b", "BF16", [2], weights(2))]
    (tmp_path / "m.safetensors").write_bytes(safetensors_bytes(rows))
    with new(run) as store:
        store.save_files(0, [tmp_path / "m.safetensors"])
        found = store.load(0)
    assert found["four"].tobytes() == b"\1\2\3\4"
    assert (found["four"].dtype, found["four"].shape) == (ml_dtypes.float4_e2m1fn, (2, 2))
    assert found["six"].tobytes() == b"abc"
    assert found["b"].tobytes() == weights(2)


def test_files_without_tensors_and_folders_without_files(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    with new(run) as store:
        store.save_files(0, [folder])
        (folder / "a.json").write_text("{}")
        for step in (1, 2, 3):
            (folder / "a.json").write_text(f"{step}")
            store.save_files(step, [folder, __file__] if step == 3 else [folder])
    new(run).restore(0, tmp_path / "o0")
    assert files_of(tmp_path / "o0") == {}
    new(run).restore(2, tmp_path / "o2")
    assert files_of(tmp_path / "o2") == {"a.json": b"2"}
    new(run).restore(3, tmp_path / "o3")
    assert set(files_of(tmp_path / "o3")) == {"d", "d/a.json", Path(__file__).name}


@links
def test_files_that_an_archive_cannot_hold_are_refused(run: Path, tmp_path: Path) -> None:
    with new(run) as store:
        for i, make in enumerate(
            (
                lambda d: (d / "l").symlink_to("../d/x"),
                lambda d: (d / "l").symlink_to("/etc"),
                lambda d: (d / MANIFEST.upper()).write_text("x"),
                lambda d: (d / "x.tzip-partial").write_text("x"),
            )
        ):
            folder = tmp_path / str(i) / "d"
            folder.mkdir(parents=True)
            (folder / "x").write_text("x")
            make(folder)
            with pytest.raises(tzip.UsageError):
                store.save_files(i, [folder])
        with pytest.raises(FileNotFoundError):
            store.save_files(9, [tmp_path / "nothing"])
        assert list(store.log()) == []
        assert list((run / "objects").iterdir()) == []


def test_restore_of_states(run: Path, tmp_path: Path) -> None:
    state = {
        "b": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "w": torch.arange(6.0).reshape(2, 3),
        "h": torch.ones(2).to(torch.bfloat16),
    }
    with new(run) as store:
        store.save(0, state | {"n": 1, "l": [torch.tensor(0.5)], "o": OrderedDict(a=1)})
        store.save(1, {k: v + 1 for k, v in state.items()})
    from safetensors.torch import load_file

    new(run).restore("latest", tmp_path / "s.safetensors")
    same({k: v + 1 for k, v in sorted(state.items())}, dict(sorted(load_file(tmp_path / "s.safetensors").items())))
    new(run).restore(0, tmp_path / "s.pt")
    same(state | {"n": 1, "l": [torch.tensor(0.5)], "o": OrderedDict(a=1)}, torch.load(tmp_path / "s.pt"))
    for bad in ("s.safetensors", "x.zip", "x"):
        with pytest.raises(tzip.UsageError):
            new(run).restore(0, tmp_path / bad)
    new(run).restore(0, tmp_path / "s.safetensors", force=True)
    assert bits(load_file(tmp_path / "s.safetensors")["w"]) == bits(state["w"])
    assert {p.name for p in tmp_path.iterdir()} == {"run", "s.safetensors", "s.pt"}


def test_diff(run: Path) -> None:
    with new(run) as store:
        store.save(0, {"a": np.arange(3), "b": np.arange(3), "c": np.arange(3)})
        store.save(1, {"a": np.arange(3), "b": np.arange(3) + 1, "d": np.arange(4)})
        store.save_files(2, [__file__])
        found = {(d.key, d.what, d.nbytes) for d in store.diff(0, 1)}
        assert found == {("a", "same", 24), ("b", "changed", 24), ("c", "removed", 24), ("d", "added", 32)}
        with pytest.raises(tzip.UsageError):
            store.diff(0, 2)


def test_objects_are_archives_like_others(run: Path, tmp_path: Path) -> None:
    """No lock-in: what the store wrote, every verb reads."""
    saved = list(walk(3000, 3))
    with new(run) as store:
        for i, w in enumerate(saved):
            store.save(i, {"w": w, "n": np.array([i])})
    from safetensors.numpy import load_file

    for entry in new(run).log():
        path = run / "objects" / f"{entry.object}.tzip"
        assert tzip.verify(path, deep=True).members == 2
        assert {m["name"] for m in json.loads(ok("ls", path, "--json").stdout)["members"]} == {"state.safetensors", MANIFEST}
        with tzip.open(path) as archive:
            same(saved[entry.step], archive["w"])
        tzip.unpack(path, tmp_path / str(entry.step))
        same(saved[entry.step], load_file(tmp_path / str(entry.step) / "state.safetensors")["w"])
        assert json.loads((tmp_path / str(entry.step) / MANIFEST).read_text())["step"] == entry.step


def test_folders_that_are_no_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(tzip.UsageError, match="not empty"):
        new(tmp_path / "full")
    with pytest.raises(NotADirectoryError):
        new(tmp_path / "file")
    with pytest.raises(tzip.UsageError, match="no store"):
        new(tmp_path / "none", create=False)
    assert not (tmp_path / "none").exists()
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["x"]


# ---------------------------------------------------------------- prune and gc


def ten(run: Path, **options: Any) -> dict[int, Any]:
    saved = {i * 10: {"w": w, "n": i} for i, w in enumerate(walk(3000, 10))}
    with new(run, **options) as store:
        for step, state in saved.items():
            store.save(step, state, metrics={"loss": abs(step - 35.0)}, tags=["t"] if step == 10 else [])
    return saved


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ({"keep_last": 2}, [10, 80, 90]),
        ({"keep_last": 100}, list(range(0, 100, 10))),
        ({"keep_every": 40}, [0, 10, 40, 80]),
        ({"keep_every": 40, "keep_tagged": False}, [0, 40, 80]),
        ({"keep_best": 2}, [10, 30, 40]),
        ({"keep_best": 1, "metric": "loss", "mode": "max"}, [10, 90]),
        ({"keep_last": 1, "keep_best": 1, "keep_every": 50}, [0, 10, 40, 50, 90]),
    ],
)
def test_prune(run: Path, policy: dict[str, Any], kept: list[int]) -> None:
    saved = ten(run, max_chain=3)
    with new(run) as store:
        dry = store.prune(**policy, dry_run=True)
        assert dry.kept == kept
        assert dry.removed == [s for s in saved if s not in kept]
        assert len(list(store.log())) == 10
        report = store.prune(**policy)
        assert (report.kept, report.removed) == (dry.kept, dry.removed)
        store.gc(grace=0)
        wanted = set()
        for entry in store.log():
            with store.open(entry.step) as checkpoint:
                manifest = checkpoint.manifest
                wanted |= set(manifest.objects)
                assert max(depths(manifest.objects).values()) < 3
                assert all(r.depth < 3 for r in manifest.records.values())
        assert set(open_backend(run).object_ids()) == wanted
        if "keep_last" not in policy or policy["keep_last"] < 100:
            assert len(wanted) <= len(kept) + 2
        store.save(1000, {"w": saved[90]["w"], "n": 1})
    tags = {"t": 10} if policy.get("keep_tagged", True) else {}
    whole(run, {s: saved[s] for s in kept} | {1000: {"w": saved[90]["w"], "n": 1}}, tags)


def test_prune_that_would_keep_nothing(run: Path) -> None:
    ten(run)
    with new(run) as store:
        for bad in ({}, {"keep_last": 0}, {"keep_every": -1}, {"keep_best": 1, "metric": "x", "keep_tagged": False}):
            with pytest.raises(tzip.UsageError):
                store.prune(**bad)
        store.tag("t", None)
        with pytest.raises(tzip.UsageError):
            store.prune(keep_best=1, metric="x")
        assert len(list(store.log())) == 10


def test_prune_packs_anew_what_is_mostly_dead(run: Path) -> None:
    big, small = np.frombuffer(noise(400_000), "<u4"), np.arange(100, dtype="<f4")
    with new(run) as store:
        store.save(0, {"big": big, "small": small})
        store.save(1, {"big": big + 1, "small": small})
        store.prune(keep_last=1)
        store.gc(grace=0)
        assert len(open_backend(run).object_ids()) == 1
    whole(run, {1: {"big": big + 1, "small": small}})


def test_grace(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time_ns()
    clock = [now]
    monkeypatch.setattr(time, "time_ns", lambda: clock[0])
    saved = ten(run, max_chain=1)
    second = 10**9
    with new(run) as store:
        store.prune(keep_last=1)
        assert (store.gc(grace=100).removed, store.gc(grace=100).waiting) == (0, 8)
        assert len(store.journal().head.retired) == 8
        clock[0] += 99 * second
        assert store.gc(grace=100).removed == 0
        clock[0] -= 10**6 * second  # set back: the time starts to count anew
        assert store.gc(grace=100).removed == 0
        clock[0] += 99 * second
        assert store.gc(grace=100).removed == 0
        clock[0] += 2 * second
        report = store.gc(grace=100)
        assert (report.removed, report.waiting) == (8, 0)
        assert report.freed > 8 * 5000
        assert store.journal().head.retired == {}
        for bad in (-1, float("nan")):
            with pytest.raises(tzip.UsageError):
                store.gc(grace=bad)
    whole(run, {10: saved[10], 90: saved[90]})


def test_objects_that_are_needed_again_are_not_removed(run: Path) -> None:
    """What was noted as unneeded, and then named by a head again, stays."""
    saved = ten(run)
    backend = open_backend(run)
    before = Journal(backend).head
    with new(run) as store:
        store.prune(keep_last=1)
        store.gc(grace=1000)
        retired = Journal(backend).head.retired
        assert retired
        found = Journal(backend)
        found.commit(replace(before, generation=found.head.generation + 1, retired=retired))
        assert store.gc(grace=0).removed < 3
    whole(run, saved)


# ---------------------------------------------------------------- damage and repair


def test_every_flip_of_the_head(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "PAGE", 1)
    monkeypatch.setattr(journal, "_MAX_RECENT", 2)
    expected = {i: {"w": np.arange(3) + i} for i in range(4)}
    with new(run) as store:
        for i, state in expected.items():
            store.save(i, state, tags=[f"t{i}"], metrics={"loss": 1e-7 * i}, note="é")
        log = list(store.log())
    path = run / "head.json"
    good = path.read_bytes()
    raised = 0
    for at in range(len(good)):
        path.write_bytes(flipped(good, at, at % 8))
        found = attempted(lambda: list(new(run).log()))
        raised += found != log
        assert found in (log, str(path)), at
        path.write_bytes(good[:at])
        with pytest.raises(tzip.CorruptError):
            list(new(run).log())
    assert raised > 0.99 * len(good)
    path.write_bytes(flipped(good, len(good) // 2, 3))
    faults = upkeep.verify(open_backend(run), deep=False, threads=1).faults
    assert [f.path for f in faults] == [str(path)]
    report = new_repair(run)
    assert (report.kept, report.lost, report.rebuilt) == ([0, 1, 2, 3], {}, True)
    whole(run, expected)


@pytest.mark.parametrize("saves", [7, 13])
def test_every_flip_of_a_page(run: Path, monkeypatch: pytest.MonkeyPatch, saves: int) -> None:
    monkeypatch.setattr(journal, "PAGE", 2)
    monkeypatch.setattr(journal, "_MAX_RECENT", 4)
    expected = {i: {"w": np.arange(3) + i} for i in range(saves)}
    with new(run) as store:
        for i, state in expected.items():
            store.save(i, state, tags=[f"t{i}"])
    page = run / "pages" / f"{Journal(open_backend(run)).head.pages[0].name}.json"
    good = page.read_bytes()
    assert (b'"pages"' in good) == (saves > 7)
    for at in range(len(good)):
        for bad in (flipped(good, at, at % 8), good[:at]):
            page.write_bytes(bad)
            with pytest.raises(tzip.CorruptError) as caught:
                list(new(run).log())
            assert caught.value.path == str(page)
    same(expected[saves - 1], new(run).load())  # what is not in the page can be read
    page.unlink()
    with pytest.raises(tzip.CorruptError, match="missing"):
        new(run).find(0)
    faults = upkeep.verify(open_backend(run), deep=True, threads=1).faults
    assert [f.path for f in faults] == [str(page)]
    report = new(run).repair()
    assert (report.kept, report.rebuilt) == (list(range(saves)), True)
    whole(run, expected, {f"t{i}": i for i in range(saves)})  # the head stood: its tags are known


def test_head_and_page_that_lie(run: Path) -> None:
    """The sum is right, the content breaks a rule."""
    with new(run) as store:
        store.save(0, {"w": np.arange(3)}, metrics={"m": 1.0})
    path = run / "head.json"
    good = unsealed(path.read_bytes(), "tzip_store", "")
    entry = good["recent"][0]
    lies: list[dict[str, Any]] = [
        {"generation": -1},
        {"generation": 1 << 63},
        {"generation": "1"},
        {"generation": True},
        {"config": {}},
        {"config": []},
        {"config": {"level": 1, "max_chain": 1}},
        {"pages": [["x", 0, 0, 1]]},
        {"pages": [[]]},
        {"pages": 3},
        {"recent": [[]]},
        {"recent": [entry[:-1]]},
        {"recent": [[*entry, 1]]},
        {"recent": {}},
        {"tags": {"a": -1}},
        {"tags": []},
        {"retired": {"a": 1}},
        {"recent": [[*entry[:3], "other", *entry[4:]]]},
        {"recent": [[entry[0], entry[1].upper(), *entry[2:]]]},
        {"recent": [[*entry[:6], {"m": 10**400}, *entry[7:]]]},
        {"recent": [[*entry[:6], {"m": "x"}, *entry[7:]]]},
        {"recent": [[*entry[:6], {"m": None}, *entry[7:]]]},
        {"recent": [[entry[0], "../" + entry[1][3:], *entry[2:]]]},
    ]
    for lie in lies:
        path.write_bytes(sealed({**good, **lie}))
        if lie.get("recent") == {}:  # nothing: no lie
            continue
        with pytest.raises(tzip.CorruptError):
            new(run)
    path.write_bytes(sealed({**good, "tzip_store": 2}))
    with pytest.raises(tzip.UnsupportedError):
        new(run)
    with pytest.raises(tzip.UnsupportedError):
        new_repair(run)
    for raw in (
        b"",
        b"{}",
        b"[]",
        b"null",
        b"[" * 100_000,
        b"\xff",
        b'{"sha256":1,"tzip_store":1}',
        b'{"tzip_store":1,"x":NaN,"sha256":""}',
    ):
        path.write_bytes(raw)
        with pytest.raises(tzip.CorruptError):
            new(run)
    path.write_bytes(sealed({**good, "pages": [["0" * 64, 0, 0, 1]]}))
    (run / "pages" / f"{'0' * 64}.json").write_bytes(canonical({"entries": [], "tzip_page": 1}))
    with pytest.raises(tzip.CorruptError):
        list(new(run).log())


def manifest_of(run: Path, step: int = 0) -> tuple[dict[str, Any], str]:
    entry = new(run).find(step)
    with tzip.open(run / "objects" / f"{entry.object}.tzip") as archive:
        return unsealed(archive.member_bytes(MANIFEST), "tzip_checkpoint", ""), entry.object


def test_every_flip_of_a_manifest(run: Path) -> None:
    with new(run) as store:
        store.save(0, {"w": np.arange(3)}, metrics={"m": 1e-7})
    body, archive_id = manifest_of(run)
    good = sealed(body)
    expected = Manifest.read(good, "", archive_id)
    for at in range(len(good)):
        for bit in (at % 8, 5):
            found = attempted(partial(Manifest.read, flipped(good, at, bit), "m", archive_id))
            assert found in (expected, "m")


def test_manifests_that_lie(run: Path) -> None:
    with new(run) as store:
        store.save(0, {"w": np.arange(3), "v": np.arange(4)})
    body, archive_id = manifest_of(run)
    row, _ = body["tensors"]
    key, at, name, dtype, shape, content, depth = row
    lies: list[dict[str, Any]] = [
        {"objects": []},
        {"objects": [[]]},
        {"objects": [["", [], 0, 0], ["", [], 0, 0]]},
        {"objects": [["x", [], 0, 0]]},
        {"objects": [["", [1], 0, 0]]},
        {"objects": [["", [-1], 0, 0]]},
        {"objects": [["", [0.0], 0, 0]]},
        {"objects": 3},
        {"objects": [["", [], -1, 0]]},
        {"objects": [["a" * 64, [], 0, 0]]},
        {"tensors": [row, row]},
        {"tensors": [[]]},
        {"tensors": [[key, 1, name, dtype, shape, content, depth]]},
        {"tensors": [[key, -1, name, dtype, shape, content, depth]]},
        {"tensors": [[key, at, name, "X", shape, content, depth]]},
        {"tensors": [[key, at, name, [], shape, content, depth]]},
        {"tensors": [[key, at, name, dtype, [-1], content, depth]]},
        {"tensors": [[key, at, name, dtype, [1 << 54], content, depth]]},
        {"tensors": [[key, at, name, dtype, [1] * 256, content, depth]]},
        {"tensors": [[key, at, name, dtype, shape, "x", depth]]},
        {"tensors": [[key, at, name, dtype, shape, content, -1]]},
        {"tensors": [[1, at, name, dtype, shape, content, depth]]},
        {"tensors": [[[], at, name, dtype, shape, content, depth]]},
        {"tensors": [[key, at, 1, dtype, shape, content, depth]]},
        {"tensors": [[key, at, name, dtype, None, content, depth]]},
        {"kind": "other"},
        {"kind": []},
        {"step": -1},
        {"step": "0"},
        {"metrics": {"m": 10**400}},
        {"metrics": []},
        {"metrics": {"m": "x"}},
        {"extra": []},
        {"seq": -1},
        {"writer": 1},
        {"note": None},
    ]
    for lie in lies:
        with pytest.raises(tzip.CorruptError):
            Manifest.read(sealed({**body, **lie}), "", archive_id)
    for missing in body:
        if missing != "tzip_checkpoint":
            with pytest.raises(tzip.CorruptError):
                Manifest.read(sealed({k: v for k, v in body.items() if k != missing}), "", archive_id)
    with pytest.raises(tzip.UnsupportedError):
        Manifest.read(sealed({**body, "tzip_checkpoint": 2}), "", archive_id)


def forge(run: Path, lie: Any) -> None:
    """Save a checkpoint of two tensors whose manifest says what `lie` makes of it."""
    backend = open_backend(run)
    raw = np.arange(24, dtype=np.uint8)
    from tzip.formats.dtypes import BY_NAME
    from tzip.workers import Workers

    held = [objects.in_memory(k, BY_NAME["F32"], (6,), raw + i) for i, k in enumerate("ab")]
    with Workers(1) as workers:
        contents = objects.content_ids(held, workers)

    def describe(own: Any, info: ObjectInfo) -> bytes:
        tree = ["d", ["a", ["t", "a", "np", ""]], ["b", ["t", "b", "np", ""]]]
        m = Manifest(0, "state", 1, "me", "", {}, own, {"": info}, tree)
        return sealed(lie(unsealed(m.write(), "tzip_checkpoint", "")))

    written = objects.write_object(backend, held, contents, [], describe, level="fast", threads=1)
    found = Journal(backend)
    found.commit(found.with_entry(Entry(0, written.archive_id, 1)))


def test_manifests_that_contradict_their_objects(run: Path) -> None:
    def change(row: int, place: int, value: Any) -> Any:
        def lie(body: dict[str, Any]) -> dict[str, Any]:
            body["tensors"][row][place] = value
            return body

        return lie

    cases = {
        "name": change(0, 2, "c"), "dtype": change(0, 3, "I32"), "shape": change(0, 4, [3, 2]), "longer": change(0, 4, [60]),
        "shorter": change(0, 4, [1]), "step": lambda b: b | {"step": 7}, "kind": lambda b: b | {"kind": "sharded"},
        "tree": lambda b: b | {"tree": ["t", "c", "np", ""]},
    }  # fmt: skip
    for name, lie in cases.items():
        path = run.with_name(name)
        new(path)
        forge(path, lie)
        with pytest.raises(tzip.TzipError):
            new(path).load(0)
        if name != "tree":
            assert new(path).verify(deep=True).faults != [], name
    # Another tensor of the same shape, or an object of another store: only a deep look tells the one, every read the other.
    new(run)
    forge(run, change(0, 2, "b"))
    assert new(run).verify().faults == []
    assert [f.steps for f in new(run).verify(deep=True).faults] == [(0,)]
    path = run.with_name("strange")
    new(path)
    forge(
        path,
        lambda b: (
            b
            | {"objects": [*b["objects"], ["ab" * 32, [], 0, 0]], "tensors": [[*b["tensors"][0][:1], 1, *b["tensors"][0][2:]]]}
        ),
    )
    with pytest.raises(tzip.CorruptError, match="missing"):
        new(path).load(0)
    assert new(path).verify().faults[0].steps == (0,)


def test_objects_under_another_name(run: Path) -> None:
    with new(run) as store:
        store.save(0, {"w": np.arange(3)})
        store.save(1, {"w": np.arange(9.0)})
    a, b = (run / "objects" / f"{new(run).find(i).object}.tzip" for i in (0, 1))
    shutil.copy(b, a)
    with pytest.raises(tzip.CorruptError, match="another archive"):
        new(run).load(0)
    same({"w": np.arange(9.0)}, new(run).load(1))
    assert [f.path for f in new(run).verify().faults] == [str(a)]
    report = new(run).repair()
    assert (report.kept, list(report.lost)) == ([1], [0])
    a.unlink()
    a.mkdir()  # what is no file
    assert new(run).repair().kept == [1]


def test_repair_of_a_lost_head(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of saves counts, not what clocks say: of a step that was replaced the newer one comes back."""
    clock = [10**18]
    monkeypatch.setattr(time, "time_ns", lambda: clock[0])
    with new(run, max_chain=5, level="fast") as store:
        for i in range(4):
            store.save(i, {"w": np.arange(3) + i})
            clock[0] -= 10**15
        store.save(1, {"w": np.arange(3) + 100}, replace_step=True)
        clock[0] += 10**17
        store.save(4, {"w": np.arange(3) + 4})
    expected = {i: {"w": np.arange(3) + (100 if i == 1 else i)} for i in range(5)}
    writer = new(run)
    writer.find()
    (run / "head.json").unlink()
    with pytest.raises(tzip.CorruptError, match="repair"):
        new(run)
    assert [f.path for f in upkeep.verify(open_backend(run), deep=True, threads=1).faults] == [str(run / "head.json")]
    report = new_repair(run)
    assert (report.kept, report.lost, report.rebuilt, report.unreadable) == ([0, 2, 3, 1, 4], {}, True, {})
    whole(run, expected)
    assert new(run).repair() == upkeep.RepairReport([0, 2, 3, 1, 4], {}, False)
    with new(run) as store:
        store.save(5, {"w": np.arange(3) + 5})
        assert next(store.log()).step == 5
    whole(run, expected | {5: {"w": np.arange(3) + 5}})


def test_repair_names_what_is_lost(run: Path) -> None:
    saved = ten(run, max_chain=4)
    middle = new(run).find(40)
    path = run / "objects" / f"{middle.object}.tzip"
    hurt = [e.step for e in new(run).log() if middle.object in new(run).open(e.step).manifest.objects]
    assert len(hurt) > 2
    path.unlink()
    for deep in (False, True):
        faults = new(run).verify(deep=deep).faults
        assert [(f.path, f.steps) for f in faults] == [(str(path), tuple(sorted(hurt)))]
    report = new(run).repair()
    assert sorted(report.lost) == sorted(hurt)
    assert all("missing" in why for why in report.lost.values())
    whole(run, {s: state for s, state in saved.items() if s not in hurt}, {"t": 10})
    (run / "head.json").write_bytes(b"{")
    other = run / "objects" / f"{'0' * 64}.tzip"
    other.write_bytes(noise(500))
    report = new_repair(run)
    assert list(report.unreadable) == [other.stem]


def test_repair_forgets_nothing_that_a_newer_tzip_made(run: Path) -> None:
    with new(run) as store:
        store.save(0, {"w": np.arange(3)})
        store.save(1, {"w": np.arange(4.0)})
    path = run / "objects" / f"{new(run).find(0).object}.tzip"
    data = bytearray(path.read_bytes())
    data[8] = 9  # the version
    path.write_bytes(bytes(data))
    assert [f.steps for f in new(run).verify().faults] == [(0,)]
    assert new(run).repair().kept == [0, 1]
    with pytest.raises(tzip.UnsupportedError):
        new(run).load(0)
    with pytest.raises(tzip.UnsupportedError):  # nor is anything swept while nobody knows what it needs
        new(run).gc(grace=0)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EACCES, errno.EIO], ids=lambda c: errno.errorcode[c])
def test_what_the_system_refuses_is_no_damage(run: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Too many open files, no permission: nothing may be forgotten for it. A disk that fails again and again is damage."""
    with new(run, max_chain=1) as store:
        for i in range(3):
            store.save(i, {"w": np.arange(3.0 + i)})
    bad = new(run).find(1).object
    for headless in (False, True):
        if headless:
            (run / "head.json").unlink()
        with pytest.MonkeyPatch.context() as patch:
            original = checkpoints._Object.__init__

            def refused(self: Any, path: Path, _original: Any = original, **more: Any) -> None:
                if path.stem == bad:
                    raise OSError(code, os.strerror(code))
                _original(self, path, **more)

            patch.setattr(checkpoints._Object, "__init__", refused)
            if code != errno.EIO:
                with pytest.raises(OSError):
                    new_repair(run)
                assert headless or [e.step for e in new(run).log()] == [2, 1, 0]
            elif not headless:
                assert [f.steps for f in new(run).verify().faults] == [(1,)]
                assert list(new_repair(run).lost) == [1]
            else:
                assert list(new_repair(run).unreadable) == [bad]
    (run / "head.json").unlink(missing_ok=True)
    assert new_repair(run).kept == [0, 1, 2]  # and when it passes, all is there again


def test_gc_removes_nothing_when_a_manifest_cannot_be_read(run: Path) -> None:
    ten(run)
    with new(run) as store:
        store.prune(keep_last=2)
        path = run / "objects" / f"{store.find(90).object}.tzip"
        data = path.read_bytes()
        before = open_backend(run).object_ids()
        for bad in (None, data[:-3], noise(len(data))):
            path.unlink() if bad is None else path.write_bytes(bad)
            with pytest.raises(tzip.TzipError):
                store.gc(grace=0)
            path.write_bytes(data)
            assert open_backend(run).object_ids() == before


# ---------------------------------------------------------------- the command


@links
def test_command(run: Path, tmp_path: Path) -> None:
    files = trainer_folder(tmp_path / "c1", 1)
    ok("store", "init", run, "--max-chain", "4", "--level", "fast")
    assert new(run).max_chain == 4
    fails(2, "store", "init", run)
    saved = json.loads(
        ok("store", "save", run, tmp_path / "c1", "--step", "1", "-m", "loss=2.5", "--tag", "a", "--note", "x", "--json").stdout
    )
    assert (saved["step"], saved["raw"] > saved["stored"]) == (1, True)
    fails(2, "store", "save", run, tmp_path / "c1", "--step", "1")
    for bad in ("loss", "=1", "loss=x"):
        fails(2, "store", "save", run, tmp_path / "c1", "--step", "9", "-m", bad)
    ok("store", "save", run, tmp_path / "c1", "--step", "1", "--replace", "-m", "loss=nan")
    trainer_folder(tmp_path / "c2", 2)
    assert "step 2" in ok("store", "save", run, tmp_path / "c2", "--step", "2", "-m", "loss=1.5").stderr
    with new(run) as store:
        store.save(3, {"w": np.arange(3), "v": np.arange(2)})
        store.save(4, {"w": np.arange(3), "v": np.arange(2) + 1})
    log = json.loads(ok("store", "log", run, "--json").stdout)
    assert [(r["step"], r["tags"], r["kind"]) for r in log] == [
        (4, [], "state"),
        (3, [], "state"),
        (2, [], "files"),
        (1, ["a"], "files"),
    ]
    assert log[3]["metrics"] == {"loss": "nan"}
    assert len(json.loads(ok("store", "log", run, "--json", "-n", "2").stdout)) == 2
    assert "loss=1.5" in ok("store", "log", run).stdout
    rows = json.loads(ok("store", "ls", run, "3", "--json").stdout)
    assert [(r["name"], r["dtype"], r["shape"]) for r in rows] == [("w", "I64", [3]), ("v", "I64", [2])]
    assert "exp_avg" in ok("store", "ls", run, "a").stdout
    assert {(r["key"], r["what"]) for r in json.loads(ok("store", "diff", run, "3", "4", "--json").stdout)} == {
        ("w", "same"),
        ("v", "changed"),
    }
    assert "changed" in ok("store", "diff", run, "3", "latest").stdout
    ok("store", "restore", run, "a", "-o", tmp_path / "out")
    assert files_of(tmp_path / "out") == files
    ok("store", "restore", run, "-o", tmp_path / "out.safetensors")
    fails(2, "store", "restore", run, "-o", tmp_path / "out.safetensors")
    ok("store", "restore", run, "-o", tmp_path / "out.safetensors", "--force")
    fails(2, "store", "restore", run, "nothing", "-o", tmp_path / "x")
    for flags in ([], ["--deep"]):
        assert json.loads(ok("store", "verify", run, "--json", *flags).stdout)["faults"] == []
        assert "sound" in ok("store", "verify", run, *flags).stderr
    ok("store", "tag", run, "b", "3")
    ok("store", "tag", run, "a", "--delete")
    fails(2, "store", "tag", run, "a", "--delete")
    fails(2, "store", "tag", run, "c")
    assert new(run).tags() == {"b": 3}
    stats = json.loads(ok("store", "stats", run, "--json").stdout)
    assert (stats["checkpoints"], stats["disk"]) == (4, sum(p.stat().st_size for p in (run / "objects").iterdir()))
    assert "4 checkpoints" in ok("store", "stats", run).stdout
    assert json.loads(ok("store", "prune", run, "--keep-last", "1", "--dry-run", "--json").stdout)["removed"] == [1, 2]
    assert "removed 2" in ok("store", "prune", run, "--keep-last", "1").stderr
    fails(2, "store", "prune", run)
    assert json.loads(ok("store", "gc", run, "--json").stdout)["removed"] == 0
    assert json.loads(ok("store", "gc", run, "--json", "--grace", "0").stdout)["removed"] == 3
    assert "removed 0" in ok("store", "gc", run).stderr
    assert json.loads(ok("store", "repair", run, "--json").stdout) == {
        "kept": [3, 4],
        "lost": {},
        "rebuilt": False,
        "unreadable": {},
    }
    path = run / "objects" / f"{new(run).find(4).object}.tzip"
    data = path.read_bytes()
    path.write_bytes(data[:-9])
    assert "steps 4" in fails_anyhow(3, "store", "verify", run)
    path.unlink()
    (run / "head.json").unlink()
    fails(3, "store", "log", run)
    assert "1 checkpoints are whole" in ok("store", "repair", run, "--deep").stderr
    for verb in ("log", "ls", "verify", "gc", "repair", "stats"):
        fails(2, "store", verb, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def fails_anyhow(code: int, *args: Any) -> str:
    from test_cli import run as call

    result = call(*args)
    assert result.exit_code == code
    return result.stderr


# ---------------------------------------------------------------- anything, in any order


class Machine(RuleBasedStateMachine):
    """A store beside a dict."""

    steps = Bundle("steps")

    @initialize(chain=st.integers(1, 4))
    def begin(self, chain: int) -> None:
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "run"
        self.store = new(self.path, max_chain=chain, level="fast")
        self.model: dict[int, Any] = {}  # in the order of saves
        self.tags: dict[str, int] = {}
        self.state: dict[str, Any] = {}
        self.chain = chain

    @rule(
        step=st.integers(0, 12),
        names=st.sets(st.sampled_from("abc")),
        seed=st.integers(0, 3),
        block=st.booleans(),
        big=st.booleans(),
    )
    def save(self, step: int, names: set[str], seed: int, block: bool, big: bool) -> None:
        for name in names:
            old = self.state.get(name)
            rng = np.random.default_rng(seed)
            n = 70_000 if big and name == "c" else 40
            self.state[name] = (
                old + rng.normal(0, 1e-6, old.size).astype("<f4") if old is not None and old.size == n
                else rng.normal(0, 0.02, n).astype("<f4")
            )  # fmt: skip
        state = {k: v.copy() for k, v in self.state.items()} | {"n": seed}
        if step in self.model:
            with pytest.raises(tzip.UsageError):
                self.store.save(step, state)
            del self.model[step]
        self.store.save(step, state, replace_step=True, block=block)
        self.store.wait()
        self.model[step] = state

    @rule(name=st.sampled_from("xy"), step=st.integers(0, 12))
    def tag(self, name: str, step: int) -> None:
        if step in self.model:
            self.store.tag(name, step)
            self.tags[name] = step
        else:
            with pytest.raises(tzip.UsageError):
                self.store.tag(name, step)

    @precondition(lambda self: self.model)
    @rule(last=st.integers(1, 3), every=st.integers(2, 5), tagged=st.booleans())
    def prune(self, last: int, every: int, tagged: bool) -> None:
        order = list(self.model)
        kept = set(order[-last:]) | {s for s in order if s % every == 0} | (set(self.tags.values()) if tagged else set())
        report = self.store.prune(keep_last=last, keep_every=every, keep_tagged=tagged)
        assert set(report.kept) == kept
        self.model = {s: v for s, v in self.model.items() if s in kept}
        self.tags = {k: s for k, s in self.tags.items() if s in kept}

    @rule()
    def gc(self) -> None:
        self.store.gc(grace=0)

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = new(self.path, max_chain=self.chain)

    @rule(deep=st.booleans())
    def repair(self, deep: bool) -> None:
        assert self.store.repair(deep=deep) == upkeep.RepairReport(list(self.model), {}, False)

    @rule()
    def lose_the_head(self) -> None:
        self.store.close()
        self.store.gc(grace=0)
        (self.path / "head.json").unlink()
        if self.model:
            assert new_repair(self.path).kept == list(self.model)
        self.store = new(self.path, max_chain=self.chain)
        self.tags = {}

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "store"):
            return
        assert [e.step for e in self.store.log()] == list(self.model)[::-1]
        assert self.store.tags() == self.tags
        for step, state in self.model.items():
            with self.store.open(step) as checkpoint:
                assert max(depths(checkpoint.manifest.objects).values()) < self.chain
                same(state, checkpoint.load(threads=1))

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            assert self.store.verify(deep=True).faults == []
            self.folder.cleanup()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=15, stateful_step_count=12, phases=[Phase.generate])
