"""Trainers with a store: real trainings, in a process that imports their libraries, which takes seconds."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_trainings_go_on_from_the_store(tmp_path: Path):
    """Killed and resumed, retention, restored files, errors, the README's examples: lightning_runs.py, transformers_runs.py and
    megatron_runs.py have what is asserted.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(HERE / "trainer_runs.py"), str(HERE.parent / "README.md"), str(tmp_path)],
        env=env, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.endswith("all done\n")
