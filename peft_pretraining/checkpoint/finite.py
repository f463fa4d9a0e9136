"""Whether tensors hold nothing but finite numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from peft_pretraining.distributed import ProcessGroup
from peft_pretraining.distributed.sharding import local


def leaves(tensors: Any) -> Iterable[Tensor]:
    """All tensors of nested mappings."""
    if isinstance(tensors, Mapping):
        for item in tensors.values():
            yield from leaves(item)
    elif isinstance(tensors, Tensor):
        yield tensors


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor], group: ProcessGroup) -> bool:
    """Whether every number of plain tensors and DTensors is finite, on all ranks; all of them must call it.

    Integers always are. Takes one pass over the memory, a few launches, and one wait for the device; two where numbers
    are not finite, or very large.
    """
    kinds: dict[Any, list[Tensor]] = defaultdict(list)
    for tensor in map(local, tensors):
        if tensor.is_floating_point() and tensor.numel():
            kinds[tensor.device, tensor.dtype].append(tensor.detach())
    bad = torch.zeros((), device=group.device)
    for same in kinds.values():
        bad += (~torch.stack(torch._foreach_norm(same)).isfinite().all()).to(bad)
    if group.all_reduce_sum(bad).item() == 0:
        return True
    # The squares of finite numbers may overflow; their largest magnitude, which takes longer, does not.
    bad.zero_()
    for same in kinds.values():
        bad += (~torch.stack(torch._foreach_norm(same, float("inf"))).isfinite().all()).to(bad)
    return group.all_reduce_sum(bad).item() == 0
