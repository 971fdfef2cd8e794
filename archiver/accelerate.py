"""States of accelerate's Accelerator in a store (extra: accelerate).

Two functions, not hooks: those of `register_save_state_pre_hook` see models and weights only, and are called before optimizers,
schedulers, random states and registered objects are written, after which nothing is called.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from tzip.coders.errors import UsageError
from tzip.store.runs import SaveReport, Store


def save_state(
    accelerator: Any,
    store: str | os.PathLike[str],
    step: int,
    *,
    note: str = "",
    metrics: Mapping[str, float] | None = None,
    tags: Iterable[str] = (),
    replace_step: bool = False,
    level: str | None = None,
    max_chain: int | None = None,
    threads: int | None = None,
    **options: Any,
) -> SaveReport | None:
    """Save what `accelerator.save_state(**options)` writes as a step of the store in the folder `store`.

    All processes call it; the main one saves, and returns what it did. The files lie beside the store meanwhile, in
    `<store>.saving`, which all must see. accelerate's own naming and deleting of folders is left aside: steps name
    checkpoints, and the store keeps them. The rest is as for `Store` and `Store.save_files`. Raises as that does, on all.
    """
    folder = Path(f"{os.path.abspath(store)}.saving")
    done: list[SaveReport] = []

    def commit() -> None:
        with Store(store, level=level, max_chain=max_chain, threads=threads) as opened:
            report = opened.save_files(step, [folder], note=note, metrics=metrics, tags=tags, replace_step=replace_step)
            done.append(report)

    with _scratch(accelerator, folder), _plain_names(accelerator):
        accelerator.save_state(str(folder), **options)
        accelerator.wait_for_everyone()
        _on_main(accelerator, commit)
    return done[0] if done else None


def load_state(
    accelerator: Any,
    store: str | os.PathLike[str],
    step: int | str = "latest",
    *,
    threads: int | None = None,
    **options: Any,
) -> int:
    """Load a state with `accelerator.load_state(**options)` and return its step; `step` is as for `Store.find`.

    All processes call it; the files lie beside the store meanwhile, in `<store>.loading`. Raises UsageError or CorruptError,
    on all.
    """
    folder = Path(f"{os.path.abspath(store)}.loading")
    found = [0]

    def restore() -> None:
        with Store(store, create=False, threads=threads) as opened:
            entry = opened.find(step)
            if entry.kind != "files":
                raise UsageError(f"step {entry.step} holds no files: it is a state").at(path=str(store))
            opened.restore(entry.step, folder, force=True)
            found[0] = entry.step

    with _scratch(accelerator, folder):
        _on_main(accelerator, restore)
        accelerator.load_state(str(folder), **options)
    broadcast_object_list(found)
    return found[0]


@contextlib.contextmanager
def _scratch(accelerator: Any, folder: Path) -> Iterator[None]:
    """An empty folder for as long as it lasts."""

    def make() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    _on_main(accelerator, make)
    try:
        yield
        accelerator.wait_for_everyone()
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _plain_names(accelerator: Any) -> Iterator[None]:
    settings = accelerator.project_configuration
    naming, settings.automatic_checkpoint_naming = settings.automatic_checkpoint_naming, False
    try:
        yield
    finally:
        settings.automatic_checkpoint_naming = naming


def _on_main(accelerator: Any, work: Callable[[], None]) -> None:
    """Do it in the main process; what it raises there is raised in all, lest the others wait for ever."""
    outcome: list[Exception | None] = [None]
    if accelerator.is_main_process:
        try:
            work()
        except Exception as e:
            outcome[0] = e
    broadcast_object_list(outcome)
    if outcome[0] is not None:
        raise outcome[0]
