"""vLLM: published weights for its weight transfer, as patches in the coordinates of checkpoints.

Written after the interfaces of vLLM 0.33 (`vllm.distributed.weight_transfer`): the engine `tzip` runs in every worker and reads
the store itself; `sparse_weight_patches` serves trainers that send patches over a transport of vLLM's own.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from tzip.coders.errors import UsageError
from tzip.store.patches import Patch
from tzip.store.runs import Store
from tzip.store.states import torch_tensor
from tzip.store.subscribing import Subscription

_MOST = (1 << 31) - 1  # elements that an int32 can index


@dataclass
class TzipInitInfo(WeightTransferInitInfo):  # type: ignore[misc,unused-ignore]
    """The path of the store, and the published step that the server's model was loaded from: patches are from there."""

    store: str
    step: int


@dataclass
class TzipUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc,unused-ignore]
    """The step to go to (None: the newest), and the seconds that it may take to appear."""

    step: int | None = None
    timeout: float = 60.0


def sparse_weight_patches(patches: Iterable[Patch], device: Any = None) -> list[Any]:
    """Return patches as vLLM's `SparseWeightPatch`, without those that write nothing. Raises UsageError for what vLLM cannot
    take: values that are NaN, which stand for "unchanged" there, types that are no floats, more than 2^31 - 1 elements.
    """
    from vllm.distributed.weight_transfer.sparse_nccl_engine import SparseWeightPatch

    return [
        SparseWeightPatch(patch.name, *_tensors(patch, device), patch.shape) for patch in patches if patch.elements
    ]


def _tensors(patch: Patch, device: Any) -> tuple[Any, Any]:
    """Return indices, int32, and values of the tensor's type, both of shape (n,)."""
    values = torch_tensor(patch.dtype, (patch.elements,), patch.values.view(np.uint8), "", device)
    if not values.dtype.is_floating_point:
        raise UsageError(f"vLLM patches floats only, not {patch.dtype.name}").at(tensor=patch.name)
    if bool(torch.isnan(values).any()):
        raise UsageError("a new value is NaN, which vLLM takes for an unchanged one").at(tensor=patch.name)
    indices = np.arange(patch.elements) if patch.indices is None else patch.indices
    if indices.size and int(indices[-1]) > _MOST:
        raise UsageError("vLLM's patches index 2^31 - 1 elements at most").at(tensor=patch.name)
    return torch.from_numpy(indices.astype(np.int32)).to(device), values


class TzipWeightTransferEngine(WeightTransferEngine[TzipInitInfo, TzipUpdateInfo]):  # type: ignore[misc,unused-ignore]
    """Follows a store in each worker, whose memory holds the checkpoint's tensors once, to decode differences beside them.

    An update that vLLM's loader fails in the middle of is delivered again, whole, by the next one: patches say what elements
    are.
    """

    init_info_cls = TzipInitInfo
    update_info_cls = TzipUpdateInfo
    supports_draft_weight_update = False

    subscription: Subscription | None = None

    def init_transfer_engine(self, init_info: TzipInitInfo) -> None:
        """Load the tensors of the step that the model was loaded from."""
        with Store(init_info.store, create=False) as store:
            self.subscription = store.subscribe(step=init_info.step)

    def start_weight_update(self) -> None:
        """Do nothing: patches are written where the weights are."""

    def finish_weight_update(self) -> None:
        """Do nothing: `receive_weights` has written all."""

    def receive_weights(self, update_info: TzipUpdateInfo) -> None:
        """Patch the model. Raises TimeoutError when there is nothing new, or not that step, in time."""
        if self.subscription is None:
            raise RuntimeError("init_transfer_engine comes first")
        report = self.subscription.update(step=update_info.step, timeout=update_info.timeout, deliver=self._deliver)
        if report is None and (update_info.step is None or update_info.step != self.subscription.step):
            raise TimeoutError(f"nothing new was published within {update_info.timeout} s")

    def _deliver(self, patches: Sequence[Patch]) -> None:
        from vllm.model_executor.model_loader.checkpoint_weight_patch import (
            CheckpointWeightPatch,
            load_checkpoint_weight_patches,
        )

        made = []
        for patch in patches:
            if patch.elements:
                indices, values = _tensors(patch, self.device)
                made.append(
                    CheckpointWeightPatch(
                        name=patch.name, shape=patch.shape, dtype=values.dtype, values=values, indices=indices
                    )
                )
        if made:
            load_checkpoint_weight_patches(self.model, made)

    def shutdown(self) -> None:
        """Let go of the tensors."""
        if self.subscription is not None:
            self.subscription.close()
            self.subscription = None
