"""Optimizer states sharded over the ranks (ZeRO, arXiv 1910.02054, stage 1)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


class ShardedOptimizer(ZeroRedundancyOptimizer):
    """torch's ZeroRedundancyOptimizer, whose `state` is that of this rank's share: what there is to save and count."""

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        return self.optim.state

    @state.setter
    def state(self, value: Any) -> None:
        """`Optimizer.__init__` begins with an empty one, before there is a share."""
        if hasattr(self, "optim"):
            self.optim.state = value


def sharded_optimizer(params: Iterable[Tensor], kind: type[Optimizer], arguments: dict[str, Any]) -> Optimizer:
    """An optimizer whose states are sharded over the ranks by whole parameters; an ordinary one for one process, and
    for parameters that are sharded themselves."""
    params = list(params)
    if not dist.is_initialized() or any(isinstance(param, DTensor) for param in params):
        return kind(params, **arguments)
    return ShardedOptimizer(params, kind, **arguments)


def own_share(optimizer: Optimizer) -> Optimizer:
    """The optimizer of the parameters whose states this rank holds: itself, unless its states are sharded."""
    return optimizer.optim if isinstance(optimizer, ShardedOptimizer) else optimizer
