"""Copies in host memory of what a checkpoint holds, which training does not change."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from peft_pretraining.checkpoint.finite import leaves
from peft_pretraining.distributed.sharding import local

log = logging.getLogger("peft_pretraining")

_LARGEST_SHARE = 0.5
"""Of a machine's memory that its processes may keep pinned: what is pinned cannot be swapped out."""


class HostCopies:
    """Copies tensors to the host; memory that tensors share is shared by their copies.

    What lies on a CUDA device goes to pinned memory, which is kept from one copy to the next for as long as the tensor
    lives: copying from pageable memory takes several times as long, and pinning as long as copying. So the copies of
    one call are overwritten by the next. Where pinned memory cannot be had, or would be more than a machine's processes
    may have, it is pageable memory, as it is for what lies in the host's memory already.
    """

    def __init__(self, processes: int = 1) -> None:
        """`processes`: those of this machine, of which each keeps as much."""
        self._processes = processes
        self._pinned: DefaultStager | None = None
        self._may_pin = True

    def copy(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        """The same nested mappings, with copies in place of their tensors."""
        tensors = {str(id(tensor)): tensor for tensor in leaves(tree)}
        on_device = {key: tensor for key, tensor in tensors.items() if _on_device(tensor)}
        copies = self._copies_from_device(on_device)
        copies |= _staged(_pageable(), {key: tensor for key, tensor in tensors.items() if key not in copies})
        return {name: _with_copies(item, copies) for name, item in tree.items()}

    def _copies_from_device(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """In pinned memory; nothing where that cannot be had."""
        if not tensors or not self._may_pin:
            return {}
        sizes = {local(tensor).untyped_storage().data_ptr(): _bytes_held(tensor) for tensor in tensors.values()}
        wanted, limit = sum(sizes.values()) * self._processes, _LARGEST_SHARE * _machine_memory()
        if wanted > limit:
            self._give_up(f"{wanted / 2**30:.1f} GiB are more than {_LARGEST_SHARE:.0%} of the machine's memory")
            return {}
        self._pinned = self._pinned or _pinned()
        try:
            return _staged(self._pinned, tensors, keep=True)
        except RuntimeError as error:  # the limit of locked memory, say
            self._give_up(str(error).splitlines()[0])
            return {}

    def _give_up(self, why: str) -> None:
        log.warning("--async_save copies to memory that is not pinned, which takes longer: %s", why)
        self._may_pin = False
        if self._pinned is not None:
            self._pinned.close()
            self._pinned = None


def _on_device(tensor: Tensor) -> bool:
    return local(tensor).device.type == "cuda"


def _bytes_held(tensor: Tensor) -> int:
    """Of the memory that a tensor is a part of, which is copied as a whole."""
    return local(tensor).untyped_storage().nbytes()


def _machine_memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _pinned() -> DefaultStager:
    """Copies all at once, and waits for them at the end."""
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=True, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=True
        )
    )


def _pageable() -> DefaultStager:
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
        )
    )


def _staged(stager: DefaultStager, tensors: dict[str, Tensor], keep: bool = False) -> dict[str, Tensor]:
    copies = stager.stage(tensors)
    assert isinstance(copies, dict), "staging is not asynchronous"
    if not keep:
        stager.close()
    return copies


def _with_copies(item: Any, copies: Mapping[str, Tensor]) -> Any:
    if isinstance(item, Mapping):
        return {name: _with_copies(inner, copies) for name, inner in item.items()}
    return copies[str(id(item))] if isinstance(item, Tensor) else item
