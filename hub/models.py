"""What a hub's models are: folders, and files that lie by themselves, with what tells them from what they were."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from tzip.bases import TENSOR_SUFFIXES
from tzip.coders.errors import TzipError, UsageError
from tzip.formats.catalogue import FILE
from tzip.tree import Item, collect

_MARKS = ("config.json", "model_index.json", "adapter_config.json", "modules.json")  # what else makes a folder a model


@dataclass(frozen=True, slots=True)
class Model:
    """A folder or file that is packed into an archive of its own. `name`: its path in the hub; `key`: see `key_of`."""

    name: str
    path: str
    size: int
    key: str


def find_models(
    root: Path, level: str, dereference: bool | None, but: Path | None = None
) -> tuple[list[Model], dict[str, str]]:
    """Return the models below `root`, in the order of their names, and what was left out, by path, with the reason.

    A model is the uppermost folder that directly holds a file of tensors (by its name) or a configuration, with all that is
    in it. In the cache of a hub each `snapshots/HASH` is one. Files elsewhere are models by themselves. Empty folders and
    links to folders are left out. The folder `but` is passed over. Raises UsageError when `root` is no folder.
    """
    if not root.is_dir():
        raise UsageError("a hub is a folder of models").at(path=str(root))
    found: list[Model] = []
    left: dict[str, str] = {}
    below = [root]
    while below:
        folder = below.pop()
        try:
            with os.scandir(folder) as scan:
                entries = sorted(scan, key=lambda e: e.name)
        except OSError as e:
            left[str(folder)] = str(e)
            continue
        names = {e.name for e in entries}
        if folder != root and (_is_snapshot(folder) or any(_marks(e) for e in entries)):
            _add(folder, root, level, dereference, found, left)
            continue
        cache = {"blobs", "snapshots"} <= names
        if not entries:
            left[str(folder)] = "an empty folder"
        for entry in entries:
            path = Path(entry.path)
            if cache and entry.name != "snapshots":
                continue  # what the snapshots are made of
            if but is not None and entry.is_dir() and os.path.samefile(path, but):
                continue
            if entry.is_dir(follow_symlinks=False):
                below.append(path)
            elif entry.is_dir():
                left[entry.path] = "a link to a folder: what it leads to is looked for in its own place only"
            else:
                _add(path, root, level, dereference, found, left)
    return sorted(found, key=lambda model: model.name), left


def _is_snapshot(folder: Path) -> bool:
    return folder.parent.name == "snapshots" and (folder.parent.parent / "blobs").is_dir()


def _marks(entry: "os.DirEntry[str]") -> bool:
    return (entry.name in _MARKS or entry.name.endswith(TENSOR_SUFFIXES)) and entry.is_file()


def _add(
    path: Path, root: Path, level: str, dereference: bool | None, found: list[Model], left: dict[str, str]
) -> None:
    try:
        items = collect([path], dereference)
    except (TzipError, OSError) as e:
        left[str(path)] = str(e)
        return
    name = path.relative_to(root).as_posix()
    size = sum(item.size for item in items if item.kind == FILE)
    found.append(Model(name, str(path), size, key_of(name, level, items)))


def key_of(name: str, level: str, items: list[Item]) -> str:
    """Return the name of a model's receipt: the SHA-256 of what goes in, by sizes and times of its files, and of the level."""
    parts = [(i.name, i.kind, i.mode, i.size, i.mtime_ns, i.link) for i in items]
    return hashlib.sha256(json.dumps(["tzip receipt 1", name, level, parts]).encode("utf-8", "surrogateescape")).hexdigest()
