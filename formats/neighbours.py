"""What a file holds when the files beside it are asked as well.

A distributed checkpoint's `.metadata` has the names of the tensors in its other files, and an ONNX model lists those that it
keeps in files without a structure of their own.
"""

import os
from contextlib import suppress
from pathlib import Path

from tzip.formats import distcp
from tzip.formats.containers import ContainerError, Unique, View
from tzip.formats.onnx_files import External, external
from tzip.formats.recognising import Found, recognise, told_of
from tzip.formats.source import Source, open_source

_MODELS = 64  # ONNX models of a folder that are asked what they keep in other files


class Neighbours:
    """Asks the files beside others; what a folder's models say is remembered."""

    def __init__(self) -> None:
        self._external: dict[Path, list[External]] = {}

    def look(self, source: Source, path: str = "") -> Found:
        """Return what is in a file, under the names that files beside it give; `path`: where those are, "" for nowhere.

        Raises ContainerError as `recognise` does.
        """
        found = self.find(source, path)
        found.tensors = self.named(found, path)
        return found

    def find(self, source: Source, path: str = "") -> Found:
        """Return what is in a file, under the names that it gives itself where it does."""
        error = None
        try:
            found = recognise(source.read_at, source.size)
            if found.container:
                return found
        except ContainerError as e:  # numbers that begin like a container, perhaps
            found, error = Found(), e
        theirs = self._outside(Path(path)) if path else []
        if theirs:
            return told_of(theirs, source.size)
        if error is not None:
            raise error
        return found

    def named(self, found: Found, path: str) -> list[View]:
        """Return the tensors of a file, one for one, under the names that the file beside it gives them."""
        if found.container == distcp.NAME and path:
            folder, name = os.path.split(path)
            with suppress(ContainerError, OSError), open_source(os.path.join(folder, distcp.METADATA)) as source:
                items = distcp.places(source.read_at, source.size).get(name, [])
                names = Unique()
                return [view._replace(name=names.name(view.name)) for view in distcp.named(found.tensors, items)]
        return found.tensors

    def _outside(self, path: Path) -> list[External]:
        """Return the tensors that ONNX models in the folder of a file, or the one above it, keep in that file."""
        return [
            told
            for folder in (path.parent, path.parent.parent)
            for told in self._told_by(folder)
            if os.path.normpath(folder / told.location) == os.path.normpath(path)
        ]

    def _told_by(self, folder: Path) -> list[External]:
        if folder not in self._external:
            self._external[folder] = []
            for model in sorted(folder.glob("*.onnx"))[:_MODELS]:
                with suppress(ContainerError, OSError), open_source(model) as source:
                    self._external[folder] += external(source.read_at, source.size)
        return self._external[folder]
