"""Forgetting parts of an Adam state, in place, so that sharded optimizers and checkpoints keep their tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from peft_pretraining.distributed.gathering import whole
from peft_pretraining.distributed.sharding import ShardInfo, local

MOMENTS = ("exp_avg", "exp_avg_sq")


def moments(optimizer: Optimizer, param: Tensor) -> list[Tensor]:
    """First and second moment of one parameter."""
    return [optimizer.state[param][key] for key in MOMENTS]


@torch.no_grad()
def prune_randomly(tensors: Sequence[Tensor], fraction: float, generator: torch.Generator) -> None:
    """Zero each entry with probability `fraction`, the same entries of all tensors (of one shape).

    A second moment of zero beside a first one that is not would make an update of any size. The draw is on the
    generator's device.
    """
    drawn = torch.rand(tensors[0].shape, generator=generator, device=generator.device)
    shard = ShardInfo.of(tensors[0])
    chosen = shard.part(drawn < fraction, shard.dim or 0).to(tensors[0].device)
    for tensor in tensors:
        local(tensor).masked_fill_(chosen, 0)


@torch.no_grad()
def prune_by_magnitude(tensor: Tensor, fraction: float) -> None:
    """Zero the entries whose magnitude lies below the `fraction`-quantile of all magnitudes, on all devices.

    The quantile lies between two of the sorted magnitudes; the upper one is the smallest that stays.
    """
    magnitudes = whole(tensor).abs().flatten()
    rank = math.ceil(fraction * (magnitudes.numel() - 1))  # 0-based position of that one
    smallest = magnitudes.kthvalue(rank + 1).values
    part = local(tensor)
    part.masked_fill_(part.abs() < smallest, 0)
