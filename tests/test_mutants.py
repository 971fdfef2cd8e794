"""The tests of the safety checks can fail: each mutation of a check is seen by the tests that guard it.

A few in every run; all with TZIP_ALL_MUTANTS=1 (survivors are named).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mutants import MUTANTS, QUICK, Mutant

import tzip

ALL = os.environ.get("TZIP_ALL_MUTANTS") == "1"
TESTS = Path(__file__).parent
# Never an error to be a mutant of oneself: the inner runs use another package folder, and no plugin of the outer one.
INNER = ("-x", "-q", "-p", "no:cacheprovider", "--no-header", "-o", "timeout=120")


def copy_package(folder: Path) -> Path:
    """Copy the package with its compiled kernels (times kept, so that only the mutated module compiles anew)."""
    package = folder / "tzip"
    shutil.copytree(Path(tzip.__file__).parent, package)
    return package


def run_tests(folder: Path, tests: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(TESTS)]), "TZIP_ALL_MUTANTS": "0"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        *INNER,
        "-c",
        str(TESTS.parent / "pyproject.toml"),
        "--basetemp",
        str(folder / "t"),
    ]
    return subprocess.run(
        [*command, *(str(TESTS / t) for t in tests)],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=folder,
    )


def mutate(package: Path, mutant: Mutant) -> None:
    path = package / mutant.file
    text = path.read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1, f"{mutant.name}: {mutant.file} has the old text {text.count(mutant.old)} times"
    path.unlink()  # never write into the original, should the copy be a link
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutants_fit_the_source(tmp_path: Path, mutant: Mutant) -> None:
    (tmp_path / Path(mutant.file).parent).mkdir(exist_ok=True)
    shutil.copy(Path(tzip.__file__).parent / mutant.file, tmp_path / mutant.file)
    mutate(tmp_path, mutant)
    compile((tmp_path / mutant.file).read_text(encoding="utf-8"), mutant.file, "exec")


def test_the_copy_itself_passes(tmp_path: Path) -> None:
    """Or a red run below would prove nothing."""
    copy_package(tmp_path)
    tests = {t for m in MUTANTS for t in m.tests} if ALL else {m.tests[0] for m in MUTANTS if m.name in QUICK}
    done = run_tests(tmp_path, tuple(sorted(tests)))
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if ALL or m.name in QUICK], ids=lambda m: m.name)
def test_mutant_is_seen(tmp_path: Path, mutant: Mutant) -> None:
    package = copy_package(tmp_path)
    mutate(package, mutant)
    done = run_tests(tmp_path, mutant.tests)
    assert (
        str(package)
        in subprocess.run(
            [sys.executable, "-c", "import tzip; print(tzip.__file__)"],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
        ).stdout
    )
    assert done.returncode == 1, f"SURVIVOR {mutant.name}: exit code {done.returncode}\n{done.stdout[-2000:]}"
