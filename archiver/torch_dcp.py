"""A store as the storage of torch's distributed checkpoints (extra: torch).

`dcp.save(state, storage_writer=StorageWriter("runs/42", step=100))` and
`dcp.load(state, storage_reader=StorageReader("runs/42", step=100))`.
"""

from tzip.store.sharded import StorageReader, StorageWriter

__all__ = ["StorageReader", "StorageWriter"]
