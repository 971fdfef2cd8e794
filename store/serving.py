"""Published weights as a folder of safetensors files that a server loads, and loads again.

Shards have the step in their names, so that a new one never takes the place of one that is being read. The index,
`model.safetensors.index.json`, names the shards; it is replaced in one step, last. Those that it named before stay until the
next update.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from tzip.coders.arrays import U8
from tzip.coders.errors import CorruptError, UsageError
from tzip.formats import safetensors_header
from tzip.formats.atomic import PartialFile
from tzip.formats.source import open_source
from tzip.store.objects import in_memory
from tzip.store.objects import safetensors_header as header_of
from tzip.store.patches import Patch
from tzip.store.states import numpy_array
from tzip.store.subscribing import Subscription, UpdateReport

INDEX = "model.safetensors.index.json"
_OURS = re.compile(r"model-step\d+-\d{5}\.safetensors\Z")


class ServedFolder:
    """A folder of safetensors files that follows what is published in a store; see `Store.serve`. For one thread.

    The weights are in memory once, beside the files.
    """

    def __init__(self, subscription: Subscription, folder: Path, shard: int) -> None:
        self.subscription = subscription
        self.folder = folder
        self._shard = shard
        self._map: dict[str, str] = {}  # tensors and the files that the index says they are in
        self._dirty: set[str] = set()  # tensors that are not in the files as they are in memory

    @classmethod
    def open(cls, subscribe: Callable[[Any], Subscription], folder: Path, shard: int) -> Self:
        """Go on with what the folder has, or begin it. `subscribe` follows with any weights, or without them (None)."""
        if shard < 1:
            raise UsageError(f"a shard has 1 byte or more, not {shard}")
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "model.safetensors").exists():
            raise UsageError("loaders take this file before the index of shards; move it away").at(
                path=str(folder / "model.safetensors")
            )
        known = _read(folder)
        if known is None:
            made = cls(subscribe(None), folder, shard)
            made._dirty = set(made.subscription.weights)
            return made
        weights, places = known
        made = cls(subscribe(weights), folder, shard)
        made._map = places
        return made

    def update(self, *, step: int | None = None, timeout: float | None = 0.0) -> UpdateReport | None:
        """Bring the files to what was published last, or to `step`, as `Subscription.update` does; None when nothing is new.

        Files of shards with new tensors are written, then the index. Whatever dies when, the index names whole files of one
        step. Raises what `Subscription.update` raises, OSError.
        """

        def note(patches: Sequence[Patch]) -> None:
            self._dirty |= {patch.name for patch in patches if patch.elements}

        report = self.subscription.update(step=step, timeout=timeout, deliver=note)
        if self._dirty or not self._map:
            self._write()
        return report

    def _write(self) -> None:
        step = self.subscription.step
        assert step is not None
        tensors = self.subscription.tensors()
        before = set(self._map.values())
        shards = self._shards({name: raw.size for name, (_, _, raw) in tensors.items()})
        places = dict(self._map)
        for number, names in enumerate(shards, 1):
            if self._dirty.isdisjoint(names) and all(name in places for name in names):
                continue
            file = f"model-step{step}-{number:05d}.safetensors"
            if file in before:  # of the same step, and with other tensors: what died may have left it
                file = self._free(step, before)
            held = [in_memory(name, *tensors[name]) for name in names]
            with PartialFile(self.folder / file, force=True) as partial:
                partial.write(header_of(held, {"format": "pt"}))
                for one in held:
                    if one.raw is not None and one.raw.size:
                        partial.write(one.raw)
                partial.publish()
            places.update(dict.fromkeys(names, file))
        index = {
            "metadata": {"total_size": sum(raw.size for _, _, raw in tensors.values()), "tzip_step": step},
            "weight_map": dict(sorted(places.items())),
        }
        with PartialFile(self.folder / INDEX, force=True) as partial:
            partial.write(json.dumps(index, indent=2).encode())
            partial.publish()
        for path in self.folder.iterdir():
            if _OURS.match(path.name) and path.name not in before and path.name not in places.values():
                path.unlink(missing_ok=True)
        self._map, self._dirty = places, set()

    def _shards(self, sizes: Mapping[str, int]) -> list[list[str]]:
        """Return the names by shards: as they are in the files, else so many as a shard holds."""
        if self._map.keys() == sizes.keys():
            by_file: dict[str, list[str]] = {}
            for name, file in self._map.items():
                by_file.setdefault(file, []).append(name)
            return list(by_file.values())
        shards: list[list[str]] = [[]]
        room = self._shard
        for name, size in sizes.items():
            if size > room and shards[-1]:
                shards.append([])
                room = self._shard
            shards[-1].append(name)
            room -= size
        return shards

    def _free(self, step: int, taken: set[str]) -> str:
        number = 1
        while (file := f"model-step{step}-{number:05d}.safetensors") in taken or (self.folder / file).exists():
            number += 1
        return file

    def close(self) -> None:
        """End an update that waits. The files stay as they are."""
        self.subscription.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, str]] | None:
    """Return the tensors of a folder and the files that they are in; None when there is no index."""
    try:
        index = json.loads((folder / INDEX).read_bytes())
        places = {str(name): str(file) for name, file in index["weight_map"].items()}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise CorruptError(f"no index of shards: {e}").at(path=str(folder / INDEX)) from None
    weights: dict[str, Any] = {}
    for file in dict.fromkeys(places.values()):
        if Path(file).name != file:
            raise CorruptError(f"the index names a file elsewhere: {file!r}").at(path=str(folder / INDEX))
        weights.update(_tensors(folder / file, {name for name, where in places.items() if where == file}))
    if weights.keys() != places.keys():
        raise CorruptError("the shards do not have the tensors that the index names").at(path=str(folder / INDEX))
    return weights, places


def _tensors(path: Path, names: set[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with open_source(path) as source:
        try:
            start, spans = safetensors_header.parse(source.read_at, source.size)
        except safetensors_header.HeaderError as e:
            raise CorruptError(f"no safetensors file: {e}").at(path=str(path)) from None
        for span in spans:
            if span.name in names:
                raw: U8 = np.empty(span.end - span.begin, np.uint8)
                if source.readinto_at(start + span.begin, memoryview(raw)) != raw.size:
                    raise CorruptError("the file became shorter while it was read").at(path=str(path))
                found[span.name] = numpy_array(span.dtype, span.shape, raw, "")
    return found
