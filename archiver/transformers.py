"""Checkpoints of Hugging Face's Trainer in a store (extra: transformers): `Trainer(..., callbacks=[StoreCallback("runs/42")])`.

The store holds the folders `checkpoint-<step>` byte for byte, as differences from the ones before. The Trainer calls its
callbacks when it has deleted old folders (`save_total_limit`), so nothing here needs those: the store has the bases itself.
"""

import filecmp
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tzip.coders.errors import UsageError
from tzip.store.backends import open_backend
from tzip.store.runs import Store

_SAVING, _RESTORING = "tzip-saving-", "tzip-restoring-"  # folders that a killed process may leave; the next one removes them


class StoreCallback(TrainerCallback):
    """Saves every checkpoint of a Trainer to the store in the folder `store`.

    `block=False`: a thread reads and packs the folder, through names of its own (hard links, or copies where the file system
    has none): the Trainer may delete it meanwhile. The next save, or the end of the training, waits for it and raises what it
    raised.
    `remove`: folders go when they are in the store, but for the best one while `load_best_model_at_end` needs it;
    `restore_checkpoint` brings one back. Numbers that were logged at the step are its metrics.
    The rest is as for `Store`. One process saves; it must see what all ranks write.
    """

    def __init__(
        self,
        store: str | os.PathLike[str],
        *,
        block: bool = True,
        remove: bool = False,
        level: str | None = None,
        max_chain: int | None = None,
        threads: int | None = None,
    ) -> None:
        self.path = os.path.abspath(store)
        self.block = block
        self.remove = remove
        self.options: dict[str, Any] = {"level": level, "max_chain": max_chain, "threads": threads}
        self._store: Store | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._running: Future[Path] | None = None
        self._best: Path | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove what a killed process left. Raises UsageError where `remove` would take what is being uploaded."""
        if self.remove and args.push_to_hub and "checkpoint" in args.hub_strategy.value:
            raise UsageError("remove=True takes the folders that hub_strategy uploads")
        if state.is_world_process_zero:
            _sweep(Path(args.output_dir), _SAVING)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the folder that the Trainer has written. Raises as `Store.save_files` does."""
        if args.world_size > 1:  # other ranks may still be writing theirs
            args.distributed_state.wait_for_everyone()
        if not state.is_world_process_zero:
            return
        self._settle(args, state)
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not folder.is_dir():
            raise UsageError("the Trainer has written no such folder").at(path=str(folder))
        if self._store is None:
            self._store = Store(self.path, **self.options)
        store, step, metrics = self._store, int(state.global_step), _logged(state)
        if self.block:
            store.save_files(step, [folder], metrics=metrics, replace_step=True)
            self._committed(args, state, folder)
            return
        held = _linked(folder, Path(args.output_dir) / f"{_SAVING}{step}")

        def work() -> Path:
            try:
                store.save_files(step, [held], metrics=metrics, replace_step=True)
            finally:
                shutil.rmtree(held, ignore_errors=True)
            return folder

        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "tzip-trainer")
        self._running = self._pool.submit(work)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for what is in the background, raise what it raised, and close the store."""
        try:
            self._settle(args, state)
        finally:
            if self._pool is not None:
                self._pool.shutdown(wait=True)
                self._pool = None
            if self._store is not None:
                self._store.close()
                self._store = None

    def _settle(self, args: Any, state: Any) -> None:
        running, self._running = self._running, None
        if running is not None:
            self._committed(args, state, running.result())

    def _committed(self, args: Any, state: Any, folder: Path) -> None:
        """Remove a folder, here where the Trainer does not look at its folders at the same time."""
        if not self.remove:
            return
        gone = folder
        if args.load_best_model_at_end and folder.name == f"checkpoint-{state.best_global_step}":
            gone, self._best = self._best or folder, folder
            if gone == folder:
                return
        shutil.rmtree(gone, ignore_errors=True)


def restore_checkpoint(
    store: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    step: int | str = "latest",
    *,
    force: bool = False,
    threads: int | None = None,
) -> str | None:
    """Write a checkpoint of the store as `output_dir/checkpoint-<step>`, unless it is there, and return that path.

    `trainer.train(resume_from_checkpoint=restore_checkpoint("runs/42", args.output_dir))`. `step`: as for `Store.find`.
    Returns None when the store has no checkpoint yet. What a killed process has left of the folder is completed; one that
    holds anything else is replaced with `force` only. Of several ranks the first writes, in a folder that all see.

    Raises UsageError, CorruptError or OSError.
    """
    outcome: list[Any] = [None, None]
    many = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not many or torch.distributed.get_rank() == 0:
        try:
            outcome[0] = _restore(store, Path(output_dir), step, force=force, threads=threads)
        except Exception as e:
            if not many:
                raise
            outcome[1] = e
    if many:
        torch.distributed.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
    path: str | None = outcome[0]
    return path


def _restore(path: str | os.PathLike[str], output: Path, step: int | str, *, force: bool, threads: int | None) -> str | None:
    if step == "latest" and not open_backend(path).exists():
        return None
    with Store(path, create=False, threads=threads) as store:
        if step == "latest" and next(store.log(), None) is None:
            return None
        entry = store.find(step)
        if entry.kind != "files":
            raise UsageError(f"step {entry.step} holds no files: it is a state").at(path=str(path))
        target = output / f"checkpoint-{entry.step}"
        output.mkdir(parents=True, exist_ok=True)
        _sweep(output, _RESTORING)
        made = output / f"{_RESTORING}{entry.step}"
        made.mkdir()
        try:
            store.restore(entry.step, made, force=True)
            if os.path.lexists(target):
                if not force and not _within(target, made):
                    message = f"the folder is another one than step {entry.step} of the store"
                    raise UsageError(message).at(path=str(target))
                shutil.rmtree(target)
            os.rename(made, target)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return str(target)


def _sweep(folder: Path, prefix: str) -> None:
    for left in folder.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)


def _linked(folder: Path, to: Path) -> Path:
    """Return a folder of the same files, which stay when the other names are removed."""
    shutil.rmtree(to, ignore_errors=True)

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    shutil.copytree(folder, to, symlinks=True, copy_function=link)
    return to


def _within(folder: Path, whole: Path) -> bool:
    """Say whether each file of a folder is, byte for byte, in the other one."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    for at in folder.rglob("*"):
        other = whole / at.relative_to(folder)
        if at.is_symlink() or other.is_symlink():
            same = at.is_symlink() and other.is_symlink() and os.readlink(at) == os.readlink(other)
        elif at.is_dir():
            same = other.is_dir()
        else:
            same = other.is_file() and filecmp.cmp(at, other, shallow=False)
        if not same:
            return False
    return True


def _logged(state: Any) -> dict[str, float]:
    """Return the numbers that were logged at the step of a checkpoint."""
    found: dict[str, float] = {}
    for row in state.log_history:
        if isinstance(row, Mapping) and row.get("step") == state.global_step:
            found |= {k: float(v) for k, v in row.items() if k != "step" and type(v) in (int, float)}
    return found
