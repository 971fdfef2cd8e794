"""The hook: safetensors readers of a process, its children, a command or an environment open packed files; packing in place."""

import importlib.metadata
import inspect
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import sysconfig
import textwrap
import threading
import time
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from click.testing import CliRunner, Result
from forge import noise, safetensors_bytes, weights
from safetensors import SafetensorError
from safetensors import safe_open as imported_before

import tzip
import tzip.safetensors
from tzip import environments, hook, in_place
from tzip.cli import cli
from tzip.coders.errors import ChangedError, CorruptError, UsageError
from tzip.formats.envelope import is_packed

# In a namespace, for the hook replaces what modules refer to, this one too.
THEIRS = types.SimpleNamespace(open=safetensors.safe_open, deserialize=safetensors.deserialize)
BOOTSTRAP = Path(hook.BOOTSTRAP)
RAW = {"w": weights(50_000, 1, "F32"), "i": np.arange(7, dtype="<i8").tobytes()}
PLAIN = safetensors_bytes([("w", "F32", [500, 100], RAW["w"]), ("i", "I64", [7], RAW["i"])], {"format": "pt"})
MTIME = 1_600_000_000_123_456_789

# What programs do: a module that opens argv[1] through `safe_open` and prints "right" or the name of the error.
READ = """
import sys, hashlib
from safetensors import safe_open
def read(path):
    try:
        with safe_open(path, "np") as f:
            digest = hashlib.sha256(f.get_tensor("w").tobytes()).hexdigest()
        return "right" if digest == DIGEST else "wrong"
    except Exception as e:
        return type(e).__name__
""".replace("DIGEST", repr(__import__("hashlib").sha256(RAW["w"]).hexdigest()))

WHAT_IS_IMPORTED = """
import sys
print(*{m.partition(".")[0] for m in sys.modules} & {"numpy", "numba", "safetensors", "zstandard", "click", "torch", "tzip"})
"""


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """Every test leaves the process as it was."""
    before = os.environ.get("PYTHONPATH")
    yield
    left = hook.installed(), safetensors.safe_open is THEIRS.open, safetensors.deserialize is THEIRS.deserialize
    hook.uninstall()
    assert left == (False, True, True)
    assert os.environ.get("PYTHONPATH") == before


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "plain.safetensors"
    path.write_bytes(PLAIN)
    return path


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    path = tmp_path / "packed.safetensors"
    path.write_bytes(PLAIN)
    assert list(tzip.pack_in_place([path]).changed) == [str(path)]
    return path


def same(handle: Any) -> bool:
    """Say whether an open file for numpy holds what was packed."""
    with handle as f:
        return {name: f.get_tensor(name).tobytes() for name in f.keys()} == RAW  # noqa: SIM118


def refused(path: Path) -> None:
    with pytest.raises(SafetensorError):
        safetensors.safe_open(path, "np")
    with pytest.raises(SafetensorError):
        safetensors.numpy.load_file(path)
    with pytest.raises(SafetensorError):
        safetensors.numpy.load(path.read_bytes())


def clean(**more: str) -> dict[str, str]:
    """Return the environment without what this process was started with for Python."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COVERAGE"))} | more


def python(*args: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    options = {"env": clean(), "executable": sys.executable} | options
    executable = options.pop("executable")
    return subprocess.run(
        [str(executable), *map(str, args)], capture_output=True, text=True, timeout=120, check=False, **options
    )


def said(*args: str | Path, **options: Any) -> str:
    """Return what a program prints that succeeds and says nothing on stderr."""
    done = python(*args, **options)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def script(folder: Path, text: str, name: str = "program.py") -> Path:
    path = folder / name
    path.write_text(READ + textwrap.dedent(text))
    return path


def module(name: str, text: str) -> types.ModuleType:
    """Return a module that sys.modules has, made of source text."""
    made = types.ModuleType(name)
    sys.modules[name] = made
    exec(compile(text, name, "exec"), vars(made))
    return made


@pytest.fixture
def modules() -> Iterator[dict[str, types.ModuleType]]:
    """Modules that the test makes; sys.modules forgets them in the end."""
    made: dict[str, types.ModuleType] = {}
    before = set(sys.modules)
    yield made
    for name in set(sys.modules) - before:
        if name.startswith("user_of_"):
            del sys.modules[name]


# ---------------------------------------------------------------- one process


def test_packed_files_open_while_the_hook_is_installed_and_then_no_more(packed: Path, plain: Path) -> None:
    refused(packed)
    with tzip.install():
        for path in (packed, plain):
            assert same(safetensors.safe_open(path, "np"))
            assert same(safetensors.safe_open(filename=str(path), framework="numpy"))
            assert same(imported_before(path, framework="np"))
            assert {k: v.tobytes() for k, v in safetensors.numpy.load_file(path).items()} == RAW
            assert {k: v.tobytes() for k, v in safetensors.numpy.load(path.read_bytes()).items()} == RAW
            assert {name: bytes(entry["data"]) for name, entry in safetensors.deserialize(path.read_bytes())} == RAW
    refused(packed)
    assert same(safetensors.safe_open(plain, "np"))


def test_names_imported_before_are_ours_and_theirs_again(packed: Path) -> None:
    """This test module imported the name before the hook was there."""
    assert imported_before is THEIRS.open
    with tzip.install():
        assert sys.modules[__name__].imported_before is safetensors.safe_open is not THEIRS.open
        assert same(imported_before(packed, "np"))
    assert imported_before is THEIRS.open
    with pytest.raises(SafetensorError):
        imported_before(packed, "np")


def test_every_attribute_of_every_module_is_restored(modules: dict[str, types.ModuleType], packed: Path) -> None:
    text = "from safetensors import safe_open, deserialize\nfrom safetensors import safe_open as other"
    early = module("user_of_theirs_before", text)
    ours = module("user_of_ours_before", "from tzip.safetensors import safe_open, deserialize")
    ours_open, ours_deserialize = ours.safe_open, ours.deserialize
    theirs = [THEIRS.open, THEIRS.deserialize, getattr(safetensors, "_safe_open_handle", THEIRS.open)]  # which came with 0.8
    present = [(name, m) for name, m in sys.modules.items() if not name.startswith("tzip.")]

    def references() -> set[tuple[str, str, int]]:
        return {(n, k, id(v)) for n, m in present for k, v in vars(m).items() if any(v is their for their in theirs)}

    before = references()
    assert len(before) > 8
    tzip.install()
    late = module("user_of_theirs_after", text)
    ours_late = module("user_of_ours_after", "from tzip.safetensors import safe_open, deserialize")
    for user in (early, late):
        assert user.safe_open is user.other is safetensors.safe_open
        assert user.deserialize is safetensors.deserialize
        assert same(user.safe_open(packed, "np"))
    tzip.uninstall()
    for user in (early, late):
        assert user.safe_open is user.other is THEIRS.open
        assert user.deserialize is THEIRS.deserialize
    for user in (ours, ours_late):
        assert (user.safe_open, user.deserialize) == (ours_open, ours_deserialize)
        assert same(user.safe_open(packed, "np"))
    assert references() == before


@pytest.mark.parametrize("order", ["install first", "import first"])
def test_install_before_and_after_the_readers(tmp_path: Path, packed: Path, order: str) -> None:
    install = "import tzip\ntzip.install()\n"
    first, second = (install, READ) if order == "install first" else (READ, install)
    done = f"{first}{second}print(read({str(packed)!r}))\ntzip.uninstall()\nprint(read({str(packed)!r}))"
    assert said("-c", done).split() == ["right", "SafetensorError"]


def test_uninstall_before_the_library_is_imported(packed: Path) -> None:
    text = f"import tzip\ntzip.install()\ntzip.uninstall()\n{READ}\nprint(read({str(packed)!r}))"
    assert said("-c", text) == "SafetensorError"


def test_a_library_that_is_imported_again_is_hooked_again(packed: Path) -> None:
    text = f"""
import tzip, importlib
tzip.install()
{READ}
import safetensors
importlib.reload(safetensors)
print(read({str(packed)!r}))
from safetensors import safe_open
print(read({str(packed)!r}))
tzip.uninstall()
print(read({str(packed)!r}))
importlib.reload(safetensors)
print(safetensors.safe_open is safe_open)
"""
    assert said("-c", text).split() == ["right", "right", "SafetensorError", "True"]


def test_install_twice_is_once(packed: Path) -> None:
    tzip.install()
    ours = safetensors.safe_open
    tzip.install()
    assert safetensors.safe_open is ours
    assert hook.installed()
    tzip.uninstall()
    assert not hook.installed()
    assert safetensors.safe_open is THEIRS.open
    tzip.uninstall()
    assert safetensors.safe_open is THEIRS.open


def test_an_inner_context_leaves_the_hook_to_the_outer_one(packed: Path) -> None:
    with tzip.install():
        with tzip.install():
            assert same(safetensors.safe_open(packed, "np"))
        assert same(safetensors.safe_open(packed, "np"))
    refused(packed)
    tzip.install()
    with tzip.install():
        pass
    assert same(safetensors.safe_open(packed, "np"))
    tzip.uninstall()


def test_a_context_that_ends_in_an_error_uninstalls(packed: Path) -> None:
    with pytest.raises(RuntimeError, match="mine"), tzip.install():
        raise RuntimeError("mine")
    refused(packed)


def test_files_open_at_uninstall_stay_open(packed: Path) -> None:
    with tzip.install():
        handle = safetensors.safe_open(packed, "np")
        part = handle.get_slice("w")
    assert same(handle)
    assert part[3:5].tobytes() == RAW["w"][1200:2000]


def test_instances(packed: Path, plain: Path) -> None:
    with tzip.install():
        for path in (packed, plain):
            for handle in (safetensors.safe_open(path, "np"), tzip.safetensors.safe_open(path, "np"), THEIRS.open(plain, "np")):
                assert isinstance(handle, safetensors.safe_open)
                assert isinstance(handle, tzip.safetensors.safe_open)
        assert not isinstance(3, safetensors.safe_open)
        assert not isinstance(safetensors.safe_open(packed, "np").get_slice("w"), safetensors.safe_open)
        assert isinstance(safetensors.safe_open, type)


def test_plain_files_are_opened_by_the_library(plain: Path) -> None:
    with tzip.install():
        assert type(safetensors.safe_open(plain, "np")) is THEIRS.open
        assert type(tzip.safetensors.safe_open(plain, "np")) is THEIRS.open


def test_errors_are_those_of_the_library(tmp_path: Path, plain: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "garbage").write_bytes(noise(1000))
    (tmp_path / "short").write_bytes(PLAIN[:-1])
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((), {}),
        ((plain,), {}),
        ((plain, "nothing"), {}),
        ((plain, "np"), {"wrong": 1}),
        ((plain, "np", "nowhere"), {}),
        ((None, "np"), {}),
        ((3, "np"), {}),
        ((b"bytes", "np"), {}),
        ((tmp_path, "np"), {}),
        ((tmp_path / "missing", "np"), {}),
        ((tmp_path / "empty", "np"), {}),
        ((tmp_path / "garbage", "np"), {}),
        ((tmp_path / "short", "np"), {}),
        ((), {"framework": "np", "filename": tmp_path / "short"}),
    ]

    def outcome(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[type, str]:
        try:
            return type(safetensors.safe_open(*args, **kwargs)), ""
        except Exception as e:
            return type(e), str(e)

    genuine = [outcome(*call) for call in calls]
    with tzip.install():
        assert [outcome(*call) for call in calls] == genuine
    assert sum(kind is not THEIRS.open for kind, _ in genuine) >= 12


def test_what_introspection_sees() -> None:
    before = [(f.__name__, f.__doc__, inspect.signature(f)) for f in (THEIRS.open, THEIRS.deserialize)]
    with tzip.install():
        assert [(f.__name__, inspect.signature(f)) for f in (safetensors.safe_open, safetensors.deserialize)] == [
            (name, signature) for name, _, signature in before
        ]
        for function, (_, doc, _) in zip((safetensors.safe_open, safetensors.deserialize), before, strict=True):
            assert function.__doc__ or not doc


def test_functions_can_be_sent_to_other_processes() -> None:
    """Pools send functions by name: what could be sent without the hook can be with it."""
    assert pickle.loads(pickle.dumps(safetensors.deserialize)) is THEIRS.deserialize
    with tzip.install():
        sent = pickle.dumps(safetensors.deserialize)
        assert pickle.loads(sent) is safetensors.deserialize
    assert pickle.loads(sent) is THEIRS.deserialize


def test_threads(packed: Path, plain: Path) -> None:
    with tzip.install(), ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda i: same(safetensors.safe_open((packed, plain)[i % 2], "np")), range(40)))
        with safetensors.safe_open(packed, "np") as handle:
            part = handle.get_slice("w")
            read = pool.map(lambda i: (part[i].tobytes(), handle.get_tensor("i").tobytes()), range(64))
            assert list(read) == [(RAW["w"][400 * i : 400 * i + 400], RAW["i"]) for i in range(64)]


def test_threads_that_import_the_library_at_once(packed: Path) -> None:
    text = f"""
import tzip, threading
tzip.install()
found = []
start = threading.Barrier(6)
text = {READ!r}
def run():
    names = {{}}
    start.wait()
    exec(text, names)
    found.append(names["read"]({str(packed)!r}))
threads = [threading.Thread(target=run) for _ in range(6)]
for t in threads: t.start()
for t in threads: t.join()
print(*found)
"""
    assert said("-c", text).split() == ["right"] * 6


def test_threads_that_install_and_uninstall(packed: Path) -> None:
    """Whatever the order, in the end the hook is gone, and nobody ever gets wrong bytes."""
    stop = threading.Event()
    wrong: list[object] = []

    def read() -> None:
        while not stop.is_set():
            try:
                if not same(safetensors.safe_open(packed, "np")):
                    wrong.append("bytes")
            except SafetensorError:
                pass
            except Exception as e:
                wrong.append(e)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for thread in readers:
        thread.start()
    for _ in range(15):
        with tzip.install(children=False):
            time.sleep(0.002)
    stop.set()
    for thread in readers:
        thread.join()
    assert wrong == []


# ---------------------------------------------------------------- libraries that are not as expected


def fake(folder: Path, text: str) -> dict[str, str]:
    """Return an environment whose safetensors is that text."""
    (folder / "fake" / "safetensors").mkdir(parents=True)
    (folder / "fake" / "safetensors" / "__init__.py").write_text(text)
    return clean(PYTHONPATH=str(folder / "fake"))


FAKE = """__version__ = "99.1"
class SafetensorError(Exception): pass
def deserialize(bytes): return []
"""


@pytest.mark.parametrize("first", ["import safetensors", "pass"])
def test_a_library_without_safe_open_is_refused_with_versions(tmp_path: Path, first: str) -> None:
    """At install when it is imported already, and the hook is then not half there; else it warns when it is imported."""
    text = f"""
{first}
import warnings
import tzip
warnings.simplefilter("error")  # what is imported later only warns: the program may never open a packed file
try:
    tzip.install()
    import safetensors
except (tzip.UsageError, RuntimeWarning) as e:
    print(e)
import tzip.hook
"""
    text += "print(tzip.hook.installed())" if first != "pass" else ""
    lines = said("-c", text, env=fake(tmp_path, FAKE)).splitlines()
    assert "safetensors 99.1 has no safe_open" in lines[0]
    assert "0.4" in lines[0]
    assert lines[1:] == ([] if first == "pass" else ["False"])


def test_a_refusal_is_repeated(tmp_path: Path) -> None:
    text = """
import safetensors, tzip, os
for _ in range(2):
    try:
        tzip.install()
        print("installed")
    except tzip.UsageError:
        print("refused")
print(os.environ["PYTHONPATH"] == BEFORE)
"""
    environment = fake(tmp_path, FAKE)
    text = text.replace("BEFORE", repr(environment["PYTHONPATH"]))
    assert said("-c", text, env=environment).split() == ["refused", "refused", "True"]


OTHERS_HOOK = """
import safetensors
genuine = safetensors.safe_open
calls = []
def wrapper(filename, *args, **kwargs):
    calls.append(str(filename))
    return genuine(filename, *args, **kwargs)
safetensors.safe_open = wrapper
"""


def test_another_hook_that_was_first_still_opens_plain_files(packed: Path, plain: Path) -> None:
    text = f"""{OTHERS_HOOK}
import tzip
{READ}
with tzip.install():
    print(read({str(plain)!r}), calls.count({str(plain)!r}))
    print(read({str(packed)!r}), calls.count({str(packed)!r}))
print(safetensors.safe_open is wrapper, safe_open is wrapper)
"""
    assert said("-c", text).split() == ["right", "1", "right", "0", "True", "True"]


def test_instances_when_another_hook_was_first(packed: Path, plain: Path) -> None:
    text = f"""{OTHERS_HOOK}
import tzip
tzip.install()
for path in ({str(plain)!r}, {str(packed)!r}):
    with safetensors.safe_open(path, "np") as f:
        methods = [n for n in dir(genuine) if not n.startswith("_") and not hasattr(f, n)]
        print(isinstance(f, safetensors.safe_open), f.get_slice("w").get_dtype(), *methods)
print(isinstance(3, safetensors.safe_open))
"""
    assert said("-c", text).split() == ["True", "F32"] * 2 + ["False"]


def test_another_hook_that_comes_later_stays(packed: Path, plain: Path) -> None:
    text = f"""
import tzip
tzip.install()
{OTHERS_HOOK}
{READ}
print(read({str(packed)!r}), calls.count({str(packed)!r}))
tzip.uninstall()
print(safetensors.safe_open is wrapper)
print(read({str(plain)!r}), calls.count({str(plain)!r}))
"""
    assert said("-c", text).split() == ["right", "1", "True", "right", "1"]


# ---------------------------------------------------------------- children

CHILDREN = """
import multiprocessing, os, subprocess

def child(path, out):
    out.put(read(path))

if __name__ == "__main__":
    import tzip
    path, children = sys.argv[1], sys.argv[2] == "True"
    tzip.install(children=children)
    found = {}
    for method in ("fork", "spawn", "forkserver"):
        context = multiprocessing.get_context(method)
        out = context.Queue()
        process = context.Process(target=child, args=(path, out))
        process.start()
        found[method] = out.get(timeout=60)
        process.join()
    text = f"exec(open({__file__!r}).read().split('import multiprocessing')[0])\\nprint(read({path!r}))"
    found["subprocess"] = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True).stdout.strip()
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {text!r}])"
    found["grandchild"] = subprocess.run([sys.executable, "-c", nested], capture_output=True, text=True).stdout.strip()
    found["isolated"] = subprocess.run([sys.executable, "-I", "-c", text], capture_output=True, text=True).stdout.strip()
    tzip.uninstall()
    found["uninstalled"] = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True).stdout.strip()
    import json
    print(json.dumps(found))
"""

SPAWN = """
import multiprocessing
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(*pool.map(read, sys.argv[1:]))
"""


@pytest.mark.skipif(os.name != "posix", reason="fork and forkserver are POSIX's")
def test_children_of_all_kinds(tmp_path: Path, packed: Path) -> None:
    found = json.loads(said(script(tmp_path, CHILDREN), packed, "True"))
    assert found == dict.fromkeys(("fork", "spawn", "forkserver", "subprocess", "grandchild"), "right") | {
        "isolated": "SafetensorError",  # Python was told to ignore its environment
        "uninstalled": "SafetensorError",
    }


@pytest.mark.skipif(os.name != "posix", reason="fork and forkserver are POSIX's")
def test_without_children_only_forks_have_the_hook(tmp_path: Path, packed: Path) -> None:
    found = json.loads(said(script(tmp_path, CHILDREN), packed, "False"))
    others = ("spawn", "forkserver", "subprocess", "grandchild", "isolated", "uninstalled")
    assert found == {"fork": "right"} | dict.fromkeys(others, "SafetensorError")


def test_a_second_install_that_wants_children_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one may be a plugin's, which wants none."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    tzip.install(children=False)
    assert "PYTHONPATH" not in os.environ
    tzip.install()
    try:
        assert os.environ.get("PYTHONPATH") == str(BOOTSTRAP)
    finally:
        tzip.uninstall()
    assert "PYTHONPATH" not in os.environ


@pytest.mark.parametrize("before", [None, "", "/a", os.pathsep.join(("/a", "/b"))])
def test_uninstall_restores_the_path_of_children(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    if before is None:
        monkeypatch.delenv("PYTHONPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONPATH", before)
    with tzip.install():
        entries = os.environ["PYTHONPATH"].split(os.pathsep)
        assert entries[0] == str(BOOTSTRAP)
        assert entries[1:] == (before.split(os.pathsep) if before else [])
        with tzip.install():
            assert os.environ["PYTHONPATH"].split(os.pathsep) == entries
    assert os.environ.get("PYTHONPATH") == before


def test_the_path_is_left_alone_where_the_hook_is_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given = os.pathsep.join(("/a", str(BOOTSTRAP)))
    monkeypatch.setenv("PYTHONPATH", given)
    with tzip.install():
        assert os.environ["PYTHONPATH"] == given
    assert os.environ["PYTHONPATH"] == given


def test_what_others_add_to_the_path_meanwhile_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/a")
    with tzip.install():
        os.environ["PYTHONPATH"] += os.pathsep + "/b"
    assert os.environ["PYTHONPATH"] == os.pathsep.join(("/a", "/b"))


def test_another_sitecustomize_runs_too(tmp_path: Path, packed: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import builtins\nbuiltins.mark = __name__, __file__\n")
    path = os.pathsep.join((str(BOOTSTRAP), str(tmp_path / "site")))
    text = f"{READ}\nimport sitecustomize\nprint(read({str(packed)!r}), *mark, sitecustomize.__file__)"
    custom = str(tmp_path / "site" / "sitecustomize.py")
    assert said("-c", text, env=clean(PYTHONPATH=path)).split() == ["right", "sitecustomize", custom, custom]


@pytest.mark.parametrize("linked", ["folder", "file"])
def test_a_folder_known_by_two_names_is_read_once(tmp_path: Path, packed: Path, linked: str) -> None:
    """As where an editable install links to the files, or PYTHONPATH names a link to the folder."""
    other = tmp_path / "other"
    if linked == "folder":
        other.symlink_to(BOOTSTRAP, target_is_directory=True)
    else:
        other.mkdir()
        (other / "sitecustomize.py").symlink_to(BOOTSTRAP / "sitecustomize.py")
    for path in ([other], [other, BOOTSTRAP], [BOOTSTRAP, other]):
        environment = clean(PYTHONPATH=os.pathsep.join(map(str, path)))
        assert said("-c", f"{READ}\nprint(read({str(packed)!r}))", env=environment) == "right"


def test_another_sitecustomize_that_fails_fails_as_ever(tmp_path: Path, packed: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("raise ValueError('mine')\n")
    alone = python("-c", "print(1)", env=clean(PYTHONPATH=str(tmp_path)))
    path = os.pathsep.join((str(BOOTSTRAP), str(tmp_path)))
    hooked = python("-c", f"{READ}\nprint(read({str(packed)!r}))", env=clean(PYTHONPATH=path))
    assert (alone.returncode, alone.stdout, "ValueError: mine" in alone.stderr) == (0, "1\n", True)
    assert (hooked.returncode, hooked.stdout, "ValueError: mine" in hooked.stderr) == (0, "right\n", True)


@pytest.mark.parametrize("path", [[str(BOOTSTRAP)], [str(BOOTSTRAP)] * 2, [str(BOOTSTRAP), ""]])
def test_hooked_children_import_next_to_nothing(path: list[str]) -> None:
    assert said("-c", WHAT_IS_IMPORTED, env=clean(PYTHONPATH=os.pathsep.join(path))) == "tzip"


def test_hooked_children_without_tzip_start_silently(tmp_path: Path) -> None:
    """The folder of the hook alone, as where the environment of the child lacks tzip."""
    (tmp_path / "sitecustomize.py").write_bytes((BOOTSTRAP / "sitecustomize.py").read_bytes())
    env = clean(PYTHONPATH=str(tmp_path))
    assert said("-S", "-c", "import sitecustomize; print(1)", env=env) == "1"


# ---------------------------------------------------------------- tzip run


def tzip_run(*args: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return python("-m", "tzip.cli", "run", *args, **options)


def test_run_hooks_a_command_and_its_children(tmp_path: Path, packed: Path) -> None:
    text = f"{READ}\nprint(read({str(packed)!r}))"
    done = tzip_run("--", sys.executable, "-c", text)
    assert (done.returncode, done.stdout, done.stderr) == (0, "right\n", "")
    nested = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {text!r}]).returncode)"
    done = tzip_run(sys.executable, "-c", nested)
    assert (done.returncode, done.stdout, done.stderr) == (0, "right\n", "")


def test_run_keeps_the_path_and_the_arguments(tmp_path: Path) -> None:
    text = "import os, sys; print(os.environ['PYTHONPATH']); print(sys.argv[1:]); print(sys.stdin.read())"
    args = ["--help", "-x", "a b", "", "--"]
    done = tzip_run("--", sys.executable, "-c", text, *args, env=clean(PYTHONPATH="/a"), input="given")
    assert done.stdout.splitlines() == [f"{BOOTSTRAP}{os.pathsep}/a", str(args), "given"]


@pytest.mark.parametrize("code", [0, 1, 2, 3, 77, 255])
def test_exit_codes_of_commands_pass_through(code: int) -> None:
    done = tzip_run("--", sys.executable, "-c", f"import sys; sys.stderr.write('theirs'); sys.exit({code})")
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "theirs")


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_signals_reach_the_command() -> None:
    text = "import sys, time; print(1, flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-m", "tzip.cli", "run", "--", sys.executable, "-c", text], stdout=subprocess.PIPE, env=clean()
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"1"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM


def test_an_unknown_command() -> None:
    done = tzip_run("--", "no-such-command-here", "-c", "1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("tzip: ")
    assert "no-such-command-here" in done.stderr
    done = tzip_run()
    assert (done.returncode, done.stdout) == (2, "")
    assert "Usage" in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_a_command_that_cannot_be_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    done = tzip_run("--", tmp_path / "file")
    assert (done.returncode, done.stdout) == (6, "")
    assert str(tmp_path / "file") in done.stderr


# ---------------------------------------------------------------- an environment


def has_tzip(folder: Path) -> None:
    """Put on the path what this process has, by a .pth file: no network is needed."""
    paths = {sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"], str(Path(tzip.__file__).parent.parent)}
    (folder / "needed.pth").write_text("".join(f"{p}\n" for p in sorted(paths)))


class Environment:
    """A virtual environment of its own."""

    def __init__(self, folder: Path, *args: str) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", *args, str(folder)], check=True, env=clean())
        self.python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        get = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        self.packages = Path(said("-c", get, executable=self.python))
        self.env = clean()

    def run(self, *args: str | Path) -> str:
        return said(*args, executable=self.python, env=self.env)

    def hook(self, action: str) -> str:
        return self.run("-m", "tzip.cli", "hook", action)


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    made = Environment(tmp_path / "env")
    has_tzip(made.packages)
    return made


def test_the_hook_of_an_environment(environment: Environment, tmp_path: Path, packed: Path) -> None:
    program = script(tmp_path, f"print(read({str(packed)!r}))")
    before = sorted(environment.packages.iterdir())
    assert environment.hook("status") == "not enabled"
    assert environment.run(program) == "SafetensorError"
    assert environment.hook("disable") == "it was not enabled"

    for _ in range(2):
        said_by_enable = environment.hook("enable")
    (added,) = set(environment.packages.iterdir()) - set(before)
    assert said_by_enable == environment.hook("status") == f"enabled by {added}"
    assert environment.run(program) == "right"
    assert environment.run("-I", program) == "right"
    assert environment.run(script(tmp_path, SPAWN, "spawn.py"), packed) == "right"

    assert environment.hook("disable") == "disabled"
    assert sorted(environment.packages.iterdir()) == before
    assert environment.hook("status") == "not enabled"
    assert environment.run(program) == "SafetensorError"


def test_install_in_an_environment_that_has_the_hook(environment: Environment, tmp_path: Path, packed: Path) -> None:
    """A context leaves what the environment installed."""
    environment.hook("enable")
    text = f"import tzip\nwith tzip.install():\n    print(read({str(packed)!r}))\nprint(read({str(packed)!r}))"
    assert environment.run(script(tmp_path, text)).split() == ["right", "right"]


def test_an_environment_with_the_hook_imports_next_to_nothing(environment: Environment) -> None:
    environment.hook("enable")
    assert environment.run("-c", WHAT_IS_IMPORTED) == "tzip"


def test_an_environment_whose_tzip_is_gone_starts_silently(environment: Environment, packed: Path) -> None:
    environment.hook("enable")
    (environment.packages / "needed.pth").unlink()
    assert environment.run("-c", "print(1)") == "1"
    (environment.packages / "tzip").mkdir()
    (environment.packages / "tzip" / "__init__.py").write_text("raise RuntimeError('broken')")
    assert environment.run("-c", "print(1)") == "1"


@pytest.mark.parametrize("outer", ["the user", "the system"])
def test_an_environment_that_has_tzip_from_outside(tmp_path: Path, packed: Path, outer: str) -> None:
    """With system site packages, Python reads this environment's .pth files before the system's packages are on its path."""
    made = Environment(tmp_path / "env", "--system-site-packages")
    program = script(tmp_path, f"print(read({str(packed)!r}))")
    start: tuple[str, ...] = ()
    if outer == "the user":
        made.env["PYTHONUSERBASE"] = str(tmp_path / "user")
        packages = Path(made.run("-c", "import site; print(site.getusersitepackages())"))
    else:
        # A start of the interpreter as it is when the system's prefix is another.
        text = f"import site, sys; site.PREFIXES[:] = [{str(tmp_path / 'system')!r}]; site.main(); del sys.argv[0]; "
        start = ("-S", "-c", text + "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')")
        get = "import site, sys; print(site.getsitepackages([sys.argv[1]])[0])"
        packages = Path(said("-c", get, tmp_path / "system"))
    packages.mkdir(parents=True)
    has_tzip(packages)
    assert made.run(*start, program) == "SafetensorError"
    tool = script(tmp_path, "from tzip.cli import main\nmain()", "tool.py")
    assert made.run(*start, tool, "hook", "enable").startswith("enabled")
    assert made.run(*start, program) == "right"


def test_outside_an_environment_the_hook_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.setattr(sysconfig, "get_paths", lambda *_: {"purelib": str(tmp_path)})
    done = CliRunner().invoke(cli, ["hook", "enable"], prog_name="tzip")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "tzip run" in done.stderr
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError):
        environments.enable()


# ---------------------------------------------------------------- vLLM

# As vLLM 0.33 has it, without the engine.
VLLM = {
    "__init__.py": "",
    "model_executor/__init__.py": "",
    "model_executor/model_loader/__init__.py": """
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
_LOAD_FORMAT_TO_MODEL_LOADER = {"auto": DefaultModelLoader, "hf": DefaultModelLoader, "safetensors": DefaultModelLoader}
warned = []
def register_model_loader(load_format):
    def _wrapper(model_loader_cls):
        if load_format in _LOAD_FORMAT_TO_MODEL_LOADER:
            warned.append(load_format)
        if not issubclass(model_loader_cls, BaseModelLoader):
            raise ValueError("The model loader must be a subclass of `BaseModelLoader`.")
        _LOAD_FORMAT_TO_MODEL_LOADER[load_format] = model_loader_cls
        return model_loader_cls
    return _wrapper
def get_model_loader(load_config):
    load_format = load_config.load_format
    if load_format not in _LOAD_FORMAT_TO_MODEL_LOADER:
        raise ValueError(f"Load format `{load_format}` is not supported")
    return _LOAD_FORMAT_TO_MODEL_LOADER[load_format](load_config)
""",
    "model_executor/model_loader/base_loader.py": """
from abc import ABC, abstractmethod
class BaseModelLoader(ABC):
    def __init__(self, load_config):
        self.load_config = load_config
    @abstractmethod
    def download_model(self, model_config):
        raise NotImplementedError
    @abstractmethod
    def load_weights(self, model, model_config):
        raise NotImplementedError
""",
    "model_executor/model_loader/default_loader.py": """
import dataclasses, glob, os
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator
class DefaultModelLoader(BaseModelLoader):
    DEFAULT_NUM_THREADS = 8
    def __init__(self, load_config):
        super().__init__(load_config)
        if set(load_config.model_loader_extra_config) - {"enable_multithread_load", "num_threads"}:
            raise ValueError(f"Unexpected extra config keys for load format {load_config.load_format}")
    def _prepare_weights(self, folder):
        load_format = self.load_config.load_format
        if load_format == "auto":
            load_format = "hf"
        if load_format == "hf":
            allow_patterns = ["*.safetensors", "*.bin"]
        elif load_format in ("safetensors", "fastsafetensors", "instanttensor"):
            allow_patterns = ["*.safetensors"]
        else:
            raise ValueError(f"Unknown load_format: {load_format}")
        return [f for pattern in allow_patterns for f in glob.glob(os.path.join(folder, pattern))]
    def download_model(self, model_config):
        self._prepare_weights(model_config)
    def load_weights(self, model, model_config):
        for name, tensor in safetensors_weights_iterator(
            self._prepare_weights(model_config), self.load_config.safetensors_load_strategy
        ):
            model[name] = tensor
""",
    "model_executor/model_loader/weight_utils.py": """
from safetensors import safe_open
from safetensors.numpy import load, load_file
def safetensors_weights_iterator(files, strategy):
    for st_file in sorted(files):
        if strategy == "eager":
            with open(st_file, "rb") as f:
                state_dict = load(f.read())
            yield from state_dict.items()
        else:
            with safe_open(st_file, framework="np") as f:
                for name in f.keys():
                    yield name, f.get_tensor(name)
""",
    "config/__init__.py": """
import dataclasses
@dataclasses.dataclass
class LoadConfig:
    load_format: str = "auto"
    safetensors_load_strategy: str | None = None
    model_loader_extra_config: dict = dataclasses.field(default_factory=dict)
""",
    "plugins.py": """
from importlib.metadata import entry_points
def load_general_plugins():
    for plugin in entry_points(group="vllm.general_plugins"):
        plugin.load()()
""",
}


def test_the_entry_point_is_there() -> None:
    found = {e.name: e for e in importlib.metadata.entry_points(group="vllm.general_plugins")}
    from tzip import vllm_plugin

    assert found["tzip"].load() is vllm_plugin.register


@pytest.mark.parametrize("order", ["plugins first", "loaders first"])
def test_load_formats_of_vllm(tmp_path: Path, packed: Path, order: str) -> None:
    for name, text in VLLM.items():
        path = tmp_path / "stub" / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    plugins = "from vllm.plugins import load_general_plugins\nload_general_plugins()\nload_general_plugins()\n"
    loaders = "from vllm.model_executor import model_loader\n"
    text = f"""
import copy, json, os, sys
sys.path.insert(0, {str(tmp_path / "stub")!r})
{plugins + loaders if order == "plugins first" else loaders + plugins}
from vllm.config import LoadConfig
print(os.environ.get("PYTHONPATH"))
for load_format in ("tzip", "auto", "safetensors"):
    for strategy in (None, "eager"):
        config = LoadConfig(load_format, strategy, {{"num_threads": 2}})
        before = copy.deepcopy(config)
        loader = model_loader.get_model_loader(config)
        assert isinstance(loader, model_loader.DefaultModelLoader)
        assert config == before
        assert loader.load_config.safetensors_load_strategy == strategy
        model = {{}}
        loader.download_model({str(packed.parent)!r})
        loader.load_weights(model, {str(packed.parent)!r})
        print(load_format, loader.load_config.load_format, *sorted(v.tobytes().hex()[:16] for v in model.values()))
try:
    model_loader.get_model_loader(LoadConfig("tzip", None, {{"wrong": 2}}))
except ValueError as e:
    print(e)
"""
    first = sorted(raw[:8].hex() for raw in RAW.values())
    lines = said("-W", "error", "-c", text).splitlines()
    assert lines[0] == "None"
    formats = {"tzip": "safetensors", "auto": "auto", "safetensors": "safetensors"}
    assert lines[1:-1] == [" ".join((*pair, *first)) for pair in formats.items() for _ in range(2)]
    assert "Unexpected extra config keys" in lines[-1]


def test_a_vllm_without_load_formats_only_warns(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tzip.vllm_plugin import register

    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.warns(UserWarning, match="load formats"):
        register()
    try:
        assert same(safetensors.safe_open(packed, "np"))
    finally:
        tzip.uninstall()


# ---------------------------------------------------------------- packing in place


def ok(*args: str | Path) -> Result:
    result = CliRunner().invoke(cli, [str(a) for a in args], prog_name="tzip")
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def shards(folder: Path, n: int) -> dict[Path, bytes]:
    """Write a model of n files with an index and a config; return the bytes of the files that can be packed."""
    folder.mkdir()
    contents = {}
    for i in range(n):
        path = folder / f"model-{i + 1:05}-of-{n:05}.safetensors"
        contents[path] = safetensors_bytes([(f"w{i}", "F32", [400, 100], weights(40_000, i, "F32"))], {"format": "pt"})
        path.write_bytes(contents[path])
    names = {f"w{i}": path.name for i, path in enumerate(contents)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    (folder / "config.json").write_text("{}")
    return contents


def packs(path: Path) -> bool:
    data = path.read_bytes()
    return is_packed(lambda offset, n: data[offset : offset + n], len(data))


def test_pack_and_unpack_in_place(tmp_path: Path) -> None:
    contents = shards(tmp_path / "model", 3)
    others = {p: (p.read_bytes(), p.stat()) for p in (tmp_path / "model").iterdir() if p.suffix == ".json"}
    for path, mode in zip(contents, (0o644, 0o600, 0o755), strict=True):
        path.chmod(mode)
        os.utime(path, ns=(MTIME, MTIME))
    names = sorted(p.name for p in (tmp_path / "model").iterdir())
    report = json.loads(ok("pack", "--in-place", tmp_path / "model", "--json").stdout)
    assert list(report["changed"]) == [str(p) for p in contents]
    assert report["left"] == {}
    for path, mode in zip(contents, (0o644, 0o600, 0o755), strict=True):
        before, after = report["changed"][str(path)]
        assert (before, after) == (len(contents[path]), path.stat().st_size)
        assert after < before
        assert packs(path)
        header = contents[path][: 8 + int.from_bytes(contents[path][:8], "little")]
        assert path.read_bytes().startswith(header)  # tools that read headers alone see the true one
        if os.name == "posix":
            assert path.stat().st_mode & 0o7777 == mode
    again = json.loads(ok("pack", "--in-place", tmp_path / "model", "--json").stdout)
    assert again == {"changed": {}, "left": {str(p): "packed already" for p in contents}}

    report = json.loads(ok("unpack", "--in-place", tmp_path / "model", "--json").stdout)
    assert list(report["changed"]) == [str(p) for p in contents]
    for path, mode in zip(contents, (0o644, 0o600, 0o755), strict=True):
        assert path.read_bytes() == contents[path]
        assert path.stat().st_mtime_ns == MTIME
        if os.name == "posix":
            assert path.stat().st_mode & 0o7777 == mode
    again = json.loads(ok("unpack", "--in-place", tmp_path / "model", "--json").stdout)
    assert again == {"changed": {}, "left": {str(p): "not packed" for p in contents}}
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == names
    for path, (data, status) in others.items():
        assert path.read_bytes() == data
        assert (path.stat().st_mtime_ns, path.stat().st_ino) == (status.st_mtime_ns, status.st_ino)


def test_what_is_left_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    contents = shards(folder, 1)
    (good,) = contents
    reasons = {"noise": "smaller", "broken": "no valid safetensors file", "empty": "no valid safetensors file"}
    (folder / "noise.safetensors").write_bytes(safetensors_bytes([("n", "U8", [60_000], noise(60_000))]))
    (folder / "broken.safetensors").write_bytes(PLAIN[:-1])
    (folder / "empty.safetensors").write_bytes(b"")
    if os.name == "posix":
        (folder / "link.safetensors").symlink_to(good.name)
        (folder / "dangling.safetensors").symlink_to("nowhere")
        os.mkfifo(folder / "pipe.safetensors")
        reasons |= {"link": "link", "dangling": "link", "pipe": "no file"}
    before = {p: p.read_bytes() for p in folder.iterdir() if p.is_file() and p != good}
    stats = {p: p.lstat() for p in folder.iterdir() if p.name not in (good.name, "pipe.safetensors")}
    done = ok("pack", "--in-place", folder)
    assert packs(good)
    for name, reason in reasons.items():
        (line,) = [line for line in done.stderr.splitlines() if f"{name}.safetensors:" in line]
        assert "left as it is" in line
        assert reason in line
    link = folder / "link.safetensors"
    assert {p: p.read_bytes() for p in before if p != link} == {p: data for p, data in before.items() if p != link}
    for path, status in stats.items():
        assert (path.lstat().st_ino, path.lstat().st_mtime_ns) == (status.st_ino, status.st_mtime_ns)
    assert json.loads(ok("pack", "--in-place", folder / "config.json", "--json").stdout)["changed"] == {}
    assert (folder / "config.json").read_text() == "{}"


def test_other_options_are_refused(plain: Path) -> None:
    for args in (["pack", "-o", "x"], ["pack", "--each"], ["pack", "--resume"], ["unpack", "-o", "x"], ["unpack", "--resume"]):
        done = CliRunner().invoke(cli, [*args, "--in-place", str(plain)], prog_name="tzip")
        assert (done.exit_code, done.stdout) == (2, "")
    done = CliRunner().invoke(cli, ["pack", "--in-place", str(plain) + "x"], prog_name="tzip")
    assert (done.exit_code, done.stdout) == (6, "")
    assert plain.read_bytes() == PLAIN


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX's")
@pytest.mark.parametrize("verb", ["pack", "unpack"])
def test_killed_at_random_moments(tmp_path: Path, verb: str) -> None:
    """Each file is the original or the whole packed one; the next call goes on, and the last one finishes."""
    folder = tmp_path / "model"
    contents = shards(folder, 24)
    names = sorted(p.name for p in folder.iterdir())
    if verb == "unpack":
        tzip.pack_in_place([folder])
    packed = {p: p.read_bytes() for p in contents} if verb == "unpack" else {}
    random_delays = random.Random(5)
    killed = 0

    def done() -> int:
        return sum(packs(p) == (verb == "pack") for p in contents)

    for _ in range(6):
        start = done()
        with subprocess.Popen(
            [sys.executable, "-m", "tzip.cli", verb, "--in-place", "--quiet", str(folder)], env=clean()
        ) as process:
            while process.poll() is None and done() == start:
                time.sleep(0.002)
            time.sleep(random_delays.uniform(0, 0.03))
            process.kill()
            killed += process.wait() == -signal.SIGKILL
        for path, data in contents.items():
            now = path.read_bytes()
            assert now == data or packs(path)
            if packs(path):
                assert tzip.verify(path, deep=True).members == 1
                assert now == packed.get(path, now)
        partial = {p.name for p in folder.iterdir()} - set(names)
        assert len(partial) <= 1
        assert all(name.endswith(".tzip-partial") for name in partial)
    assert killed >= 2
    ok(verb, "--in-place", folder)
    assert done() == len(contents)
    assert sorted(p.name for p in folder.iterdir()) == names
    tzip.unpack_in_place([folder])
    assert {p: p.read_bytes() for p in contents} == contents


CHANGES = {
    "grows": lambda path: path.write_bytes(PLAIN + b"more"),
    "is rewritten": lambda path: path.write_bytes(PLAIN[:-1] + b"\xff"),
    "is touched": lambda path: os.utime(path, ns=(MTIME, MTIME)),
    "is replaced": lambda path: (
        path.with_suffix(".new").write_bytes(PLAIN[:-1] + b"\xff"),
        path.with_suffix(".new").replace(path),
    ),
    "is emptied": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_while_it_is_packed_stays(plain: Path, change: str) -> None:
    os.utime(plain, ns=(MTIME + 10**9, MTIME + 10**9))
    after: list[tuple[bytes, int]] = []

    def meddle(_: int) -> None:
        if not after:
            CHANGES[change](plain)
            after.append((plain.read_bytes(), plain.stat().st_mtime_ns))

    with pytest.raises(ChangedError) as caught:
        tzip.pack_in_place([plain], progress=meddle)
    assert caught.value.path == str(plain)
    assert [(plain.read_bytes(), plain.stat().st_mtime_ns)] == after
    assert sorted(p.name for p in plain.parent.iterdir()) == [plain.name]


def test_a_file_that_is_removed_while_it_is_packed_stays_away(plain: Path) -> None:
    with pytest.raises((ChangedError, FileNotFoundError)):
        tzip.pack_in_place([plain], progress=lambda _: plain.unlink(missing_ok=True))
    assert list(plain.parent.iterdir()) == []


def test_a_file_that_changes_between_its_header_and_its_packing_stays(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = PLAIN.replace(b'"w":', b'"v":')
    assert len(other) == len(PLAIN)
    genuine = in_place.pack_in_envelope

    def pack(*args: Any, **kwargs: Any) -> Any:
        plain.write_bytes(other)
        return genuine(*args, **kwargs)

    monkeypatch.setattr(in_place, "pack_in_envelope", pack)
    with pytest.raises(ChangedError):
        tzip.pack_in_place([plain])
    assert plain.read_bytes() == other


def test_a_file_that_is_replaced_while_it_is_unpacked_stays(packed: Path) -> None:
    new = safetensors_bytes([("new", "F32", [10], weights(10, 9, "F32"))])

    def meddle(_: int) -> None:
        packed.with_suffix(".new").write_bytes(new)
        packed.with_suffix(".new").replace(packed)

    with pytest.raises(ChangedError):
        tzip.unpack_in_place([packed], progress=meddle)
    assert packed.read_bytes() == new


def test_two_at_once_are_refused(plain: Path) -> None:
    refusals = []

    def second(_: int) -> None:
        if not refusals:
            with pytest.raises(UsageError, match="another process") as caught:
                tzip.pack_in_place([plain])
            refusals.append(caught.value)

    assert list(tzip.pack_in_place([plain], progress=second).changed) == [str(plain)]
    assert len(refusals) == 1
    assert packs(plain)


def damaged(packed: Path, damage: str) -> bytes:
    """Damage a packed file, and return what it is now."""
    data = bytearray(packed.read_bytes())
    if damage.startswith("cut"):
        del data[{"cut in half": len(data) // 2, "cut by one byte": len(data) - 1}[damage] :]
    else:
        place = {"a chunk": -len(data) // 2, "the index": -200, "the footer": -60, "the last byte": -1}[damage]
        data[place] ^= 1
    packed.write_bytes(data)
    return bytes(data)


DAMAGES = ["a chunk", "the index", "the footer", "the last byte", "cut in half", "cut by one byte"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_not_unpacked_and_stays(packed: Path, damage: str) -> None:
    data = damaged(packed, damage)
    done = CliRunner().invoke(cli, ["unpack", "--in-place", str(packed)], prog_name="tzip")
    assert packed.read_bytes() == data
    assert [p.name for p in packed.parent.iterdir()] == [packed.name]
    assert done.exit_code in ((3, 4) if damage.startswith("cut") or damage == "the last byte" else (3,)), done.output
    assert str(packed) in done.stderr


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_not_read(packed: Path, damage: str) -> None:
    data = damaged(packed, damage)
    with tzip.install():
        with pytest.raises(SafetensorError) as caught:
            safetensors.numpy.load_file(packed)
        with pytest.raises(SafetensorError):
            safetensors.numpy.load(data)
    if damage in ("a chunk", "the index", "the footer"):
        assert isinstance(caught.value, CorruptError)
        assert str(packed) in str(caught.value)
