"""Megatron-core's distributed checkpoints in a store (extra: megatron).

After `tzip.megatron.register()`, `dist_checkpointing.save(state, "run/iter_0000100", ("tzip", 1))` saves the sharded part as
step 100 of the store `run/tzip-store`; what Megatron writes itself (`common.pt`, `metadata.json`) stays in the folder, by which
`dist_checkpointing.load` finds the rest.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies import torch as stock
from megatron.core.dist_checkpointing.strategies.base import (
    SaveShardedStrategy,
    StrategyAction,
    register_default_strategy,
)
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from tzip.coders.errors import UsageError
from tzip.store.sharded import StorageReader, StorageWriter

STORE = "tzip-store"
BACKEND, VERSION = "tzip", 1


class StoreSaveStrategy(SaveShardedStrategy):
    """Saves shards as a step of the store `tzip-store` beside the checkpoint's folder; its name ends with the step.

    Saved again, a step is replaced. Megatron's asynchronous saves refuse it: they fork writers of files.
    The rest is as for `tzip.torch_dcp.StorageWriter`, which writes; all ranks must see the store. Raises as that does.
    """

    def __init__(
        self,
        *,
        tile: tuple[int, int] | None = None,
        level: str | None = None,
        max_chain: int | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__(BACKEND, VERSION)
        self.options: dict[str, Any] = {"tile": tile, "level": level, "max_chain": max_chain, "threads": threads}

    @property
    def can_handle_sharded_objects(self) -> bool:
        """Say that ShardedObjects are saved, too."""
        return True

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | os.PathLike[str]) -> None:
        root, step = _place(checkpoint_dir)
        by_key, _, _ = stock._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        dcp.save(
            stock.mcore_to_pyt_state_dict(by_key),
            storage_writer=StorageWriter(root, step=step, replace_step=True, **self.options),
            planner=stock.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


class StoreLoadStrategy(stock.TorchDistLoadShardedStrategy):
    """Loads shards, in whatever sharding is asked for, from the store beside the checkpoint's folder.

    Only the rows and tiles that a rank needs are read. `threads`: as for `tzip.torch_dcp.StorageReader`, which reads.
    """

    def __init__(self, *, threads: int | None = None) -> None:
        super().__init__()
        self.threads = threads

    @property
    def can_handle_sharded_objects(self) -> bool:
        """Say that ShardedObjects are loaded, too."""
        return True

    def load(self, sharded_state_dict: Any, checkpoint_dir: str | os.PathLike[str]) -> Any:
        asked = [value for value in nested_values(sharded_state_dict) if isinstance(value, ShardedTensor)]
        by_key, nesting, names = stock._replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        state = stock.mcore_to_pyt_state_dict(by_key, is_loading=True)
        planner = stock.MCoreLoadPlanner(
            shapes_validation_sharded_tensors=[t for t in asked if not t.allow_shape_mismatch],
            allow_shape_mismatch_sharded_tensors={t.key: t for t in asked if t.allow_shape_mismatch},
        )
        dcp.load(state, storage_reader=self._reader(checkpoint_dir), planner=planner)
        plain = {key: stock._unwrap_pyt_sharded_tensor(value) for key, value in state.items()}
        loaded = stock._replace_sharded_keys_with_state_dict_keys(plain, nesting, names)
        stock._restore_dict_types(loaded, sharded_state_dict)
        return loaded

    def load_tensors_metadata(self, checkpoint_dir: Any, metadata: Metadata | None = None) -> Any:
        return super().load_tensors_metadata(checkpoint_dir, metadata or self._metadata(checkpoint_dir))

    def load_sharded_metadata(self, checkpoint_dir: Any) -> Any:
        metadata = self._metadata(checkpoint_dir)
        objects = [k for k, v in metadata.state_dict_metadata.items() if isinstance(v, BytesStorageMetadata)]
        return {
            **{key: ShardedObject.empty_from_unique_key(key) for key in objects},
            **self.load_tensors_metadata(checkpoint_dir, metadata),
        }

    def remove_sharded_tensors(self, checkpoint_dir: Any, key_prefix: str) -> None:
        """Raise UsageError: a checkpoint of a store never changes."""
        raise UsageError("tensors cannot be removed from a checkpoint of a store").at(path=str(checkpoint_dir))

    def _reader(self, checkpoint_dir: Any) -> StorageReader:
        root, step = _place(checkpoint_dir)
        return StorageReader(root, step, threads=self.threads)

    def _metadata(self, checkpoint_dir: Any) -> Metadata:
        reader = self._reader(checkpoint_dir)
        try:
            return reader.read_metadata()
        finally:
            reader.reset()


def register(**options: Any) -> None:
    """Make `("tzip", 1)` known to Megatron-core, for saving and loading; `options` are those of StoreSaveStrategy."""
    saving = StoreSaveStrategy(**options)
    register_default_strategy(StrategyAction.SAVE_SHARDED, BACKEND, VERSION, saving)
    register_default_strategy(
        StrategyAction.LOAD_SHARDED, BACKEND, VERSION, StoreLoadStrategy(threads=saving.options["threads"])
    )


def _place(checkpoint_dir: str | os.PathLike[str]) -> tuple[Path, int]:
    """Return the store of a checkpoint's folder, and the step that its name ends with."""
    folder = Path(os.path.abspath(checkpoint_dir))
    found = re.search(r"[0-9]+\Z", folder.name)
    if found is None:
        raise UsageError("the name of a checkpoint's folder ends with its step, as iter_0000100").at(path=str(folder))
    return folder.parent / STORE, int(found[0])
