"""tzip: a lossless archiver for model weights and tensors. (This folder, archiver/, is the package `tzip`.)

`pack` and `unpack` restore files byte for byte; `open` gives lazy access to the tensors inside; `encode` and `decode`
handle one tensor in memory; `verify` proves an archive. FORMAT.md specifies the bytes.
"""

from typing import TYPE_CHECKING, Any

from tzip.coders.errors import (
    BaseNotFoundError,
    ChangedError,
    ConflictError,
    CorruptError,
    NotAnArchiveError,
    TensorNotFoundError,
    TruncatedError,
    TzipError,
    UnsupportedError,
    UsageError,
)
from tzip.version import __version__

if TYPE_CHECKING:
    from tzip.archive import Archive, open
    from tzip.diffing import TensorDiff, diff
    from tzip.hook import install, uninstall
    from tzip.hub.bulk import HubReport, hub_report, pack_hub, unpack_model
    from tzip.in_place import InPlaceReport, pack_in_place, unpack_in_place
    from tzip.memory import decode, encode
    from tzip.packing import MemberReport, PackReport, pack
    from tzip.recovery import RecoverReport, recover
    from tzip.repacking import repack
    from tzip.store.checkpoints import Checkpoint
    from tzip.store.runs import Store
    from tzip.store.states import Pickled
    from tzip.unpacking import UnpackReport, unpack
    from tzip.verifying import VerifyReport, verify
    from tzip.views import MemberInfo, TensorInfo, TensorView
    from tzip.warming import warm_up

# Names are imported on first use: `import tzip` costs no numba, and a listing never does.
_HOMES = {
    "Archive": "archive",
    "MemberInfo": "views",
    "TensorInfo": "views",
    "TensorView": "views",
    "VerifyReport": "verifying",
    "warm_up": "warming",
    "open": "archive",
    "verify": "verifying",
    "decode": "memory",
    "encode": "memory",
    "MemberReport": "packing",
    "PackReport": "packing",
    "pack": "packing",
    "RecoverReport": "recovery",
    "recover": "recovery",
    "repack": "repacking",
    "UnpackReport": "unpacking",
    "unpack": "unpacking",
    "InPlaceReport": "in_place",
    "pack_in_place": "in_place",
    "unpack_in_place": "in_place",
    "install": "hook",
    "TensorDiff": "diffing",
    "diff": "diffing",
    "uninstall": "hook",
    "HubReport": "hub.bulk",
    "hub_report": "hub.bulk",
    "pack_hub": "hub.bulk",
    "unpack_model": "hub.bulk",
    "Checkpoint": "store.checkpoints",
    "Store": "store.runs",
    "Pickled": "store.states",
}

__all__ = [
    "Archive",
    "BaseNotFoundError",
    "ChangedError",
    "Checkpoint",
    "ConflictError",
    "CorruptError",
    "HubReport",
    "InPlaceReport",
    "MemberInfo",
    "MemberReport",
    "NotAnArchiveError",
    "PackReport",
    "Pickled",
    "RecoverReport",
    "Store",
    "TensorDiff",
    "TensorInfo",
    "TensorNotFoundError",
    "TensorView",
    "TruncatedError",
    "TzipError",
    "UnpackReport",
    "UnsupportedError",
    "UsageError",
    "VerifyReport",
    "__version__",
    "decode",
    "diff",
    "encode",
    "hub_report",
    "install",
    "open",
    "pack",
    "pack_hub",
    "pack_in_place",
    "recover",
    "repack",
    "uninstall",
    "unpack",
    "unpack_in_place",
    "unpack_model",
    "verify",
    "warm_up",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tzip' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"tzip.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
