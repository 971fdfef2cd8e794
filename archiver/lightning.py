"""Lightning's checkpoints in a store (extra: lightning): `Trainer(plugins=[StoreCheckpointIO()])`.

What Lightning saves as `run/last.ckpt` is a checkpoint of the store `run/tzip-store`. Under its name stands a marker, a small
file that says which one, so that whatever Lightning or a person does with names goes on to work: looking whether they are
there and how old, links, listings, copies, moving the folder. A marker appears when its checkpoint is in the store; a save in
the background leaves a pending one before, so that a link to it never dangles, whatever dies when.
"""

import contextlib
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

try:
    from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
except ImportError:  # the distribution pytorch-lightning has the same under other names
    from lightning_fabric.plugins import CheckpointIO, TorchCheckpointIO

from tzip.coders.errors import CorruptError, TzipError, UsageError
from tzip.formats.atomic import PartialFile
from tzip.store.journal import Entry
from tzip.store.runs import Store
from tzip.store.sealing import as_count, sealed, unsealed
from tzip.store.states import Pickled

STORE = "tzip-store"  # the folder of the store, beside the markers
COPIES = 10**12  # a second checkpoint of global step 30 is step 1000000000030 of the store
_METADATA = "tzip_state_dict_metadata"  # what torch notes on state dicts, as an attribute
_MAX_MARKER = 1 << 16


class StoreCheckpointIO(CheckpointIO):
    """Keeps Lightning's checkpoints in the store `tzip-store` of the folder that they are saved to.

    A checkpoint is found by its global step (`tzip.Store(".../tzip-store").load(30)`), a second one of the same step 10^12
    above; its file name is a tag, which keeps it from being pruned for as long as Lightning keeps the file.

    `block=False`: a save returns when the state is copied, a thread writes it, and the next save or load, or the end of the
    training, raises what it raised. Give it to Trainer as it is: an AsyncCheckpointIO around it copies the state once more, and
    with it a process that dies may leave a link that leads nowhere. With `save_last="link"` a step is saved once; with
    `save_last=True` the second save of a step waits for the first.

    What ModelCheckpoint removes loses its marker and tag. When `prune_after` such checkpoints are in the store they are
    forgotten: what those that stay lean on is packed anew, and what nobody needs goes after `grace` seconds (`Store.gc`).
    None leaves that to `Store.prune`. `level`, `max_chain` and `threads`: as for `Store`.

    Strategies that write shards themselves (FSDP, DeepSpeed, ModelParallel) do not ask a CheckpointIO.
    """

    def __init__(
        self,
        *,
        block: bool = True,
        prune_after: int | None = 16,
        grace: float = 86400.0,
        level: str | None = None,
        max_chain: int | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__()
        if prune_after is not None and prune_after < 1:
            raise UsageError(f"prune_after must be 1 or more, not {prune_after}")
        self.block = block
        self.prune_after = prune_after
        self.grace = grace
        self.options = {"level": level, "max_chain": max_chain, "threads": threads}
        self._start()

    def _start(self) -> None:
        self._stores: dict[str, Store] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._running: list[Future[None]] = []
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        own = ("_stores", "_pool", "_running", "_lock")
        return {k: v for k, v in self.__dict__.items() if k not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    # ---- what Lightning calls

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
    ) -> None:
        """Save a checkpoint. `storage_options`: `note`, `metrics` and `tags`, as for `Store.save`.

        Without metrics, one that ModelCheckpoint monitors is noted when it has one for this path. Raises as `Store.save` does.
        """
        options = dict(storage_options or {})
        if not set(options) <= {"note", "metrics", "tags"}:
            raise UsageError(f"storage_options are note, metrics and tags, not {', '.join(sorted(map(str, options)))}")
        place = _place(path)
        options.setdefault("metrics", _monitored(checkpoint, place))
        tags = options.pop("tags", ())
        with self._lock:
            self._settle()
            store = self._store(place.parent, create=True)
            step = _step(store, checkpoint.get("global_step"), _tag(place))
            options["tags"] = [*([tags] if isinstance(tags, str) else tags), _tag(place)]
            # Without an earlier checkpoint a link that dangles is right: Lightning then begins anew.
            pending = not self.block and not os.path.lexists(place) and next(store.log(), None) is not None
            if pending and _tag(place) in store.tags():  # of a file that was removed by hand: it must not pass for this one
                store.tag(_tag(place), None)
            store.save(step, _with_metadata(checkpoint), block=self.block, replace_step=True, **options)
            if pending:
                _write_marker(place, step, None)
            self._do(lambda: self._saved(store, step, place))

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return a checkpoint as it was saved; one that Lightning has written itself is loaded by Lightning.

        `map_location`: as for `torch.load`; the store knows no devices, so to it all tensors were saved on the CPU. Values that
        only pickle holds are loaded with `weights_only=False` alone, which runs what the pickle says.
        Raises FileNotFoundError, UsageError (such values; the checkpoint was pruned) or CorruptError.
        """
        with self._lock:
            self._settle()
        at = Path(os.path.realpath(_place(path)))
        marker = _read_marker(at)
        if marker is None:
            found: dict[str, Any] = TorchCheckpointIO().load_checkpoint(at, map_location, weights_only)
            return found
        with self._lock:
            store = self._store(at.parent, create=False)
        entry = _entry(store, marker, at)
        if entry is None and marker["pending"] and os.path.islink(_place(path)):
            entry = store.find()
            warnings.warn(
                f"{path} leads to a checkpoint whose saving did not end; step {entry.step % COPIES} is loaded instead",
                stacklevel=2,
            )
        if entry is None:
            why = "was not saved to its end" if marker["pending"] else "is not in the store any more"
            raise UsageError(f"the checkpoint of step {marker['step'] % COPIES} {why}").at(path=str(at))
        device = map_location if isinstance(map_location, str | torch.device | int) else None
        state = store.load(entry.step, device=device, allow_pickle=weights_only is False)
        if not isinstance(state, dict):
            raise CorruptError("the checkpoint is no dict").at(path=str(at))
        pickled = list(_pickled(state, ()))
        if pickled:
            raise UsageError(
                f"only pickle holds {', '.join(pickled[:5])}: weights_only=False loads it, if you trust the checkpoint"
            ).at(path=str(at))
        if device is None and map_location is not None:
            state = _moved(state, _mover(map_location))
        return _without_metadata(state)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove the file and the tag. The checkpoint stays in the store for as long as another one may lean on it."""
        place = _place(path)
        self._do(lambda: self._removed(place))

    def wait(self) -> None:
        """Wait for what is in the background, and raise what it raised."""
        with self._lock:
            self._settle()

    def teardown(self) -> None:
        """Wait for what is in the background, raise what it raised, and close the stores."""
        with self._lock:
            try:
                self._settle()
            finally:
                if self._pool is not None:
                    self._pool.shutdown(wait=True)
                with contextlib.ExitStack() as closing:
                    for root, store in self._stores.items():
                        closing.callback(store.close)
                        _sweep(Path(root).parent)
                    self._start()

    # ---- what it comes to

    def _store(self, folder: Path, *, create: bool) -> Store:
        root = str(folder / STORE)
        if root not in self._stores:
            self._stores[root] = Store(root, create=create, **self.options)  # type: ignore[arg-type]
        return self._stores[root]

    def _do(self, work: Callable[[], None]) -> None:
        """Do it now, or behind the save that is in the background: what is removed may not have been written yet."""
        if self.block:
            work()
            return
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, "tzip-lightning")
            self._running.append(self._pool.submit(work))

    def _settle(self) -> None:
        """Wait for everything in the background; raise the first of its errors."""
        running, self._running = self._running, []
        errors = [e for e in (job.exception() for job in running) if e is not None]
        if errors:
            raise errors[0]

    def _saved(self, store: Store, step: int, place: Path) -> None:
        store.wait()
        _write_marker(place, step, store.find(step).time_ns)
        if self.prune_after is not None:
            self._prune(store, place.parent, self.prune_after)

    def _prune(self, store: Store, folder: Path, most: int) -> None:
        tagged = set(store.tags().values())
        if sum(entry.step not in tagged for entry in store.log()) < most:
            return
        for at, marker in _markers(folder):
            entry = _entry(store, marker, at)
            if entry is not None and entry.step not in tagged:  # a copy that a person has made of a marker
                store.tag(_tag(at), entry.step)
        store.prune(keep_last=1)
        store.gc(grace=self.grace)

    def _removed(self, place: Path) -> None:
        try:
            ours = not place.is_symlink() and _read_marker(place) is not None
        except FileNotFoundError:
            return
        except CorruptError:
            ours = True
        os.unlink(place)
        if ours:  # last: without the tag it may be pruned
            store = self._store(place.parent, create=False)
            if _tag(place) in store.tags():
                store.tag(_tag(place), None)


# ---------------------------------------------------------------- names and markers


def _place(path: str | os.PathLike[str]) -> Path:
    """Return the place of a marker; a link is not followed."""
    text = os.fspath(path)
    if "://" in text:
        raise UsageError("checkpoints are saved to a folder of a file system, not to a URL").at(path=text)
    return Path(os.path.abspath(text))


def _tag(place: Path) -> str:
    name = place.name
    return f"./{name}" if name in ("latest", "best") or name.isdecimal() else name


def _step(store: Store, global_step: Any, tag: str) -> int:
    """Return the step that a checkpoint is saved as: its own, or above it where another file's checkpoint has that."""
    journal = store.journal()
    if type(global_step) is not int or not 0 <= global_step < COPIES:  # Fabric's states have none
        global_step = 1 + max((e.step for e in journal.entries() if e.step < COPIES), default=-1)
    holders: dict[int, set[str]] = {}
    for name, step in journal.head.tags.items():
        holders.setdefault(step, set()).add(name)
    step = int(global_step)
    while not holders.get(step, set()) <= {tag}:
        step += COPIES
    return step


def _read_marker(at: Path) -> dict[str, Any] | None:
    """Return what a marker says, None for a file of Lightning's own. Raises FileNotFoundError, or CorruptError: damaged."""
    with open(at, "rb") as file:
        data = file.read(_MAX_MARKER)
    if not data.startswith(b"{"):  # torch's files never do
        return None
    marker = unsealed(data, "tzip_marker", str(at))
    try:
        time_ns = marker["time_ns"]
        return {
            "step": as_count(marker["step"]),
            "time_ns": None if time_ns is None else as_count(time_ns),
            "pending": time_ns is None,
        }
    except (KeyError, ValueError) as e:
        raise CorruptError(f"the marker breaks a rule: {e}").at(path=str(at)) from None


def _markers(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the markers of a folder; damaged ones, whose checkpoints tags keep, are left out."""
    for at in sorted(folder.iterdir()):
        with contextlib.suppress(TzipError, OSError):
            marker = _read_marker(at) if at.is_file() and not at.is_symlink() else None
            if marker is not None:
                yield at, marker


def _write_marker(at: Path, step: int, time_ns: int | None) -> None:
    """Write a marker; `time_ns` is that of the checkpoint's entry, and tells it from another of that step; None: pending."""
    with PartialFile(at, force=True) as file:
        file.write(sealed({"tzip_marker": 1, "step": step, "time_ns": time_ns}))
        file.publish()


def _sweep(folder: Path) -> None:
    """Remove pending markers, which processes have left that died, but those that a link leads to."""
    linked = {os.path.realpath(at) for at in folder.iterdir() if at.is_symlink()}
    for at, marker in _markers(folder):
        if marker["pending"] and os.path.realpath(at) not in linked:
            os.unlink(at)


def _entry(store: Store, marker: Mapping[str, Any], at: Path) -> Entry | None:
    """Return the checkpoint of a marker, or the one whose tag is its name: a process may die between saving and marking."""
    journal = store.journal()
    entry = journal.find(marker["step"])
    if entry is not None and entry.time_ns == marker["time_ns"]:
        return entry
    step = journal.head.tags.get(_tag(at))
    return journal.find(step) if step is not None else None


def _monitored(checkpoint: Mapping[str, Any], place: Path) -> dict[str, float]:
    """Return the metric that a ModelCheckpoint has noted for the path: others of its scores are of earlier checkpoints."""
    found = {}
    callbacks = checkpoint.get("callbacks")
    for state in callbacks.values() if isinstance(callbacks, Mapping) else ():
        scores = state.get("best_k_models") if isinstance(state, Mapping) else None
        for path, score in scores.items() if isinstance(scores, Mapping) else ():
            if state.get("monitor") and os.path.abspath(path) == str(place):
                found[str(state["monitor"])] = float(score)
    return found


# ---------------------------------------------------------------- states


def _with_metadata(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint with what torch notes on its state dicts as a value: stores keep no attributes."""
    found = list(_noted(checkpoint, ()))
    return {**checkpoint, _METADATA: found} if found else dict(checkpoint)


def _noted(value: Any, path: tuple[Any, ...]) -> Iterator[list[Any]]:
    if isinstance(value, Mapping):
        if type(value) is OrderedDict and hasattr(value, "_metadata"):
            yield [list(path), value._metadata]
        for key, item in value.items():
            yield from _noted(item, (*path, key))


def _without_metadata(state: dict[str, Any]) -> dict[str, Any]:
    for path, noted in state.pop(_METADATA, []):
        at: Any = state
        for key in path:
            at = at[key]
        at._metadata = noted
    return state


def _pickled(value: Any, path: tuple[str, ...]) -> Iterator[str]:
    if isinstance(value, Pickled):
        yield ".".join(path)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _pickled(key, (*path, "a key"))
            yield from _pickled(item, (*path, str(key)))
    elif isinstance(value, list | tuple | set | frozenset):
        for i, item in enumerate(value):
            yield from _pickled(item, (*path, str(i)))


def _mover(map_location: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what puts a tensor of the CPU where a mapping of devices, or a function as torch.load takes it, says."""
    if isinstance(map_location, Mapping):
        device = next((to for of, to in map_location.items() if str(of) == "cpu"), "cpu")
        return lambda tensor: tensor.to(device)

    def move(tensor: torch.Tensor) -> torch.Tensor:
        storage = map_location(tensor.untyped_storage(), "cpu")
        return tensor if storage is None else tensor.to(storage.device)

    return move


def _moved(value: Any, move: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return move(value)
    if isinstance(value, dict):
        for key, item in value.items():
            value[key] = _moved(item, move)
    elif type(value) in (list, tuple):
        return type(value)(_moved(item, move) for item in value)
    return value
