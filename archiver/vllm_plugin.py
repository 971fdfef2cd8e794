"""vLLM: packed files under every load format that reads safetensors, `--load-format tzip`, and weight transfer by a store.

The entry point `vllm.general_plugins` has `register` called in every process of vLLM, the workers too.
"""

import contextlib
import copy
import warnings
from typing import Any

from tzip.hook import install


def register() -> None:
    """Install the hook, and register the load format `tzip`, which takes safetensors files, packed or not, and nothing else."""
    install(children=False)
    try:
        from vllm.model_executor.model_loader import DefaultModelLoader, register_model_loader
    except ImportError as e:
        warnings.warn(f"this vLLM has no load formats to add to ({e}); packed files load all the same", stacklevel=2)
        return

    class TzipModelLoader(DefaultModelLoader):  # type: ignore[misc,unused-ignore]
        """vLLM's default loader, told that the files are safetensors files."""

        def __init__(self, load_config: Any) -> None:
            known = copy.copy(load_config)
            known.load_format = "safetensors"  # the default loader refuses names that it does not know
            super().__init__(known)

    register_model_loader("tzip")(TzipModelLoader)
    _register_transfer()


def _register_transfer() -> None:
    """Register the weight transfer backend `tzip`, in a vLLM that has such backends; once in a process."""
    try:
        from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    except ImportError:
        return
    with contextlib.suppress(ValueError):  # it is there already
        WeightTransferEngineFactory.register_engine("tzip", "tzip.vllm_weights", "TzipWeightTransferEngine")
