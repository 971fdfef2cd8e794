"""Trainers with a store: real trainings, in one process for each library, which takes seconds to import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("script", ["lightning_runs.py", "transformers_runs.py"])
def test_trainings_go_on_from_the_store(tmp_path: Path, script: str):
    """Killed and resumed, retention, restored files, errors, the README's example: the script says what it asserts."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(HERE / script), str(HERE.parent / "README.md"), str(tmp_path)],
        env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.endswith("all done\n")
