"""The rules of the house, as tests: layers, kernels, names, documents that are true."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import reference

import tzip
from tzip.coders.registry import CODECS

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "archiver": "tzip",
    "archiver/bootstrap": "tzip.bootstrap",
    "archiver/safetensors": "tzip.safetensors",
    "coders": "tzip.coders",
    "formats": "tzip.formats",
    "gpu": "tzip.gpu",
    "hub": "tzip.hub",
    "store": "tzip.store",
}
SOURCES = sorted(p for folder in FOLDERS for p in (ROOT / folder).glob("*.py"))


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_layers_hold():
    """A module imports only from lines below its own (the contract stands in pyproject.toml)."""
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kept, 0 broken" in done.stdout


def test_every_module_is_in_a_layer():
    layers = " ".join(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"])
    outside = {"tzip.__init__", "tzip.__main__"}
    modules = {f"tzip.{p.stem}" for p in (ROOT / "archiver").glob("*.py")} - outside
    assert modules <= set(re.findall(r"tzip\.\w+", layers))


def test_kernels_call_kernels_of_their_own_file_only():
    """numba's cache is keyed on one file: a kernel that calls another file's would keep running the old code."""
    checked = 0
    for path in sorted((ROOT / "coders").glob("*.py")):
        tree = _tree(path)
        own = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
        own |= {name for n in tree.body if isinstance(n, ast.Assign) for name in _made(n, own)}
        imported = {
            a.asname or a.name for n in tree.body if isinstance(n, ast.ImportFrom) and n.module and n.module.startswith("tzip")
            for a in n.names
        }
        for function in tree.body:
            if not isinstance(function, ast.FunctionDef) or not _is_kernel(function):
                continue
            checked += 1
            calls = {c.func.id for c in ast.walk(function) if isinstance(c, ast.Call) and isinstance(c.func, ast.Name)}
            assert not calls & imported, f"{path.name}: {function.name} calls {calls & imported}"
            assert calls <= own | {"range", "min", "max"}, f"{path.name}: {function.name} calls {calls - own}"
    assert checked >= 15


def test_kernels_that_call_those_of_other_files_close_over_their_stamp():
    """What a kernel closes over is part of the key of numba's cache: an edit in any of these files is noticed."""
    found = 0
    for path in sorted((ROOT / "coders").glob("*.py")):
        tree = _tree(path)
        home = {a.asname or a.name: (n.module or "").rpartition(".")[2] for n in tree.body if isinstance(n, ast.ImportFrom)
                and (n.module or "").startswith("tzip.coders.") for a in n.names}  # fmt: skip
        for maker in (n for n in tree.body if isinstance(n, ast.FunctionDef) and not _is_kernel(n)):
            for function in (n for n in ast.walk(maker) if isinstance(n, ast.FunctionDef) and _is_kernel(n)):
                found += 1
                names = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}
                called = {c.func.id for c in ast.walk(function) if isinstance(c, ast.Call) and isinstance(c.func, ast.Name)}
                stamped = {a.id for c in ast.walk(tree) if isinstance(c, ast.Call) and getattr(c.func, "id", "") == "stamp"
                           for a in c.args if isinstance(a, ast.Name)}  # fmt: skip
                assert "stamp" in names & {a.arg for a in maker.args.args}, f"{path.name}: {function.name}"
                assert {home[name] for name in called if name in home} <= stamped, f"{path.name}: {function.name}"
    assert found >= 2


def test_kernels_do_not_allocate_or_raise():
    for path in sorted((ROOT / "coders").glob("*.py")):
        for function in ast.walk(_tree(path)):
            if not isinstance(function, ast.FunctionDef) or not _is_kernel(function):
                continue
            for node in ast.walk(function):
                assert not isinstance(node, ast.Raise | ast.Assert), f"{path.name}: {function.name} raises"
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    assert node.func.attr not in {"empty", "zeros", "ones", "array", "copy", "append"}, function.name


def _made(assignment: ast.Assign, makers: set[str]) -> set[str]:
    """The names that an assignment gives to what functions of the same file return: intrinsics made for a width."""
    value, target = assignment.value, assignment.targets[0]
    values = value.elts if isinstance(value, ast.Tuple) else [value]
    targets = target.elts if isinstance(target, ast.Tuple) else [target]
    if not all(isinstance(v, ast.Call) and isinstance(v.func, ast.Name) and v.func.id in makers for v in values):
        return set()
    return {t.id for t in targets if isinstance(t, ast.Name)}


def _is_kernel(function: ast.FunctionDef) -> bool:
    return any(isinstance(d, ast.Name) and d.id in ("kernel", "quick_kernel") for d in function.decorator_list)


def test_coders_know_no_files_and_formats_call_no_codec():
    for path in (ROOT / "coders").glob("*.py"):
        names = {n.module or "" for n in ast.walk(_tree(path)) if isinstance(n, ast.ImportFrom)}
        names |= {a.name for n in ast.walk(_tree(path)) if isinstance(n, ast.Import) for a in n.names}
        assert not names & {"os", "pathlib", "io", "tempfile", "shutil"}, path.name
    for path in (ROOT / "formats").glob("*.py"):
        text = path.read_text()
        assert not re.search(r"tzip\.coders\.(rans|huffman|planes|rows|sums|jit|tables)", text), path.name


def test_no_unix_only_import_at_module_top():
    for path in SOURCES:
        for node in _tree(path).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            module = node.module if isinstance(node, ast.ImportFrom) else None
            assert not {"fcntl", "resource", "pwd", "grp", "msvcrt"} & {*names, module}, path.name


def test_input_is_never_checked_by_assert_of_a_decoder():
    """`python -O` drops asserts: what comes from a file is proven by raises."""
    for name in ("coders", "formats"):
        for path in (ROOT / name).glob("*.py"):
            assert not [n for n in ast.walk(_tree(path)) if isinstance(n, ast.Assert)], path.name


def test_modules_are_short_and_file_names_unique():
    names = [p.name for p in SOURCES if p.name != "__init__.py"]
    assert len(names) == len(set(names))
    for path in SOURCES:
        assert path.read_text().count("\n") < 700, path.name


def test_codec_ids_of_the_specification_are_those_of_the_registry():
    text = (ROOT / "FORMAT.md").read_text()
    table = dict(re.findall(r"^\| (\d+) \| (raw|constant|zstandard|Huffman|rANS|adaptive range coder)\b", text, re.MULTILINE))
    assert {int(i) for i in table} == set(CODECS)


def test_worked_example_of_the_specification_decodes():
    section = (ROOT / "FORMAT.md").read_text().split("## 11.")[1].split("## 12.")[0]
    lines = re.findall(r"^    ([0-9a-f]{4})  ((?:[0-9a-f]{2} ?)+)$", section, re.MULTILINE)
    raw = bytearray()
    for offset, row in lines:
        raw += bytes(int(offset, 16) - len(raw)) + bytes.fromhex(row)
    assert tzip.decode(bytes(raw)).tolist() == [1, 2, 3]
    archive = reference.Archive(bytes(raw))
    assert archive.tensor_bytes(0, "") == bytes([1, 2, 3])


def test_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == tzip.__version__
    assert f"## {tzip.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_public_names_exist_and_have_docstrings():
    for name in tzip.__all__:
        value = getattr(tzip, name)
        if name != "__version__":
            assert value.__doc__, name
    with pytest.raises(AttributeError):
        tzip.no_such_name  # noqa: B018


def test_tests_run_against_the_installed_package():
    assert Path(tzip.__file__).resolve().parent != ROOT / "archiver" or "__editable__" in tzip.__file__


def test_no_file_of_the_repository_is_large():
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("no git checkout")
    for name in done.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            assert (ROOT / name).stat().st_size <= 1_000_000, name


def _blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def readme_files(tmp_path, monkeypatch):
    """The files that the README's examples speak of."""
    import numpy as np
    from safetensors.numpy import save_file

    rng = np.random.default_rng(7)
    weights = {f"layers.{i}.weight": (rng.standard_normal((512, 300)) * 0.02).astype(np.float32) for i in range(2)}
    monkeypatch.chdir(tmp_path)
    save_file(weights, "model.safetensors")
    (tmp_path / "my-model").mkdir()
    save_file(weights, "my-model/model.safetensors")
    (tmp_path / "my-model" / "config.json").write_text("{}")
    from hubs import write_hub

    write_hub(tmp_path / "models")
    (tmp_path / "models" / "fam").rename(tmp_path / "models" / "org")
    for step in (100, 200):
        moved = {n: w + np.float32(1e-6 * step) * rng.standard_normal(w.shape).astype(np.float32) for n, w in weights.items()}
        save_file(moved, f"step-{step}.safetensors")
    return tmp_path


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # torch's notice of no_dist=True
def test_python_examples_of_the_readme_run(readme_files):
    # Those of trainers run in tests/test_trainers.py, where the library has been imported already: that takes longer.
    blocks = [b for b in _blocks("python") if not re.search(r"tzip\.(accelerate|lightning|megatron|transformers)\b", b)]
    assert blocks
    space: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), space)


def test_shell_examples_of_the_readme_run(readme_files):
    commands = [
        line.split("#")[0].strip()
        for block in _blocks("sh")
        for line in block.splitlines()
        if line.strip() and not line.startswith("#")
    ]
    ran = 0
    for command in commands:
        if "tzip " not in command or command.startswith(("pip", "git", "sh ")):
            continue
        ran += 1
        exact = re.sub(r"(^|\| )tzip ", rf"\g<1>{sys.executable} -m tzip.cli ", command)
        done = subprocess.run(exact, shell=True, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    assert ran >= 8
