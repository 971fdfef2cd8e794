"""Trainers with a store, each in a process forked from this one: importing their libraries takes longer than all trainings.

    python trainer_runs.py README FOLDER
"""

import os
import sys
import traceback
import warnings
from pathlib import Path

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what libraries say of each other when they are imported
    import lightning_runs
    import megatron_runs
    import transformers_runs

from tzip.store.runs import Store


def main() -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    text, folder = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    with Store(folder / "kernels", threads=1) as store:  # loaded once for all
        for step in (1, 2):
            store.save(step, {"w": step + 1e-5 * torch.randn(5000)})
    for part in (lightning_runs, transformers_runs, megatron_runs):
        child = os.fork()  # before torch has threads
        if child == 0:
            code = 1
            try:
                (folder / part.__name__).mkdir()
                part.main(text, folder / part.__name__)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"{part.__name__} failed")
    print("all done")


if __name__ == "__main__":
    main()
