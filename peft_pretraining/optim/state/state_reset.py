"""Forgetting parts of an Adam state, in place, so that sharded optimizers and checkpoints keep their tensors.

Moments in 8 bits are pruned without being quantised anew: an entry gets the byte that means zero, and the scales and
all other entries stay as they are, bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from peft_pretraining.distributed.gathering import whole
from peft_pretraining.distributed.sharding import ShardInfo, local
from peft_pretraining.optim.tensors import blockwise

MOMENTS = ("exp_avg", "exp_avg_sq")


@torch.no_grad()
def zero_moments(state: Mapping[str, Tensor]) -> None:
    """Zero both moments of one parameter's state."""
    for key in MOMENTS:
        local(state[key]).zero_()
        if state[key].dtype == torch.uint8:  # the byte 0 is the least number, which is zero with a scale of zero
            local(state[f"{key}_absmax"]).zero_()


@torch.no_grad()
def prune_randomly(state: Mapping[str, Tensor], fraction: float, generator: torch.Generator) -> None:
    """Zero each entry with probability `fraction`, the same entries of both moments.

    A second moment of zero beside a first one that is not would make an update of any size. The draw is on the
    generator's device.
    """
    first = state[MOMENTS[0]]
    drawn = torch.rand(first.shape, generator=generator, device=generator.device)
    shard = ShardInfo.of(first)
    chosen = shard.part(drawn < fraction, shard.dim or 0).to(first.device)
    for key in MOMENTS:
        local(state[key]).masked_fill_(chosen, _zero(state, key))


@torch.no_grad()
def prune_by_magnitude(state: Mapping[str, Tensor], fraction: float) -> None:
    """Zero the entries of each moment whose magnitude lies below the `fraction`-quantile of its magnitudes, on all
    devices.

    The quantile lies between two of the sorted magnitudes; the upper one is the smallest that stays.
    """
    for key in MOMENTS:
        part = _magnitudes(state, key)
        shard = ShardInfo.of(state[key])
        every = (shard.gather(part) if state[key].dtype == torch.uint8 else whole(state[key]).abs()).flatten()
        rank = math.ceil(fraction * (every.numel() - 1))  # 0-based position of that one
        smallest = every.kthvalue(rank + 1).values
        local(state[key]).masked_fill_(part < smallest, _zero(state, key))


def _zero(state: Mapping[str, Tensor], key: str) -> int:
    return blockwise.zero_code(blockwise.SIGNED[key]) if state[key].dtype == torch.uint8 else 0


def _magnitudes(state: Mapping[str, Tensor], key: str) -> Tensor:
    """Of this device's part of a moment, in its shape."""
    moment = local(state[key])
    if moment.dtype != torch.uint8:
        return moment.abs()
    # bitsandbytes' blocks run through a matrix as it lies in memory.
    scales = local(state[f"{key}_absmax"])
    flat = blockwise.dequantize(moment.reshape(1, -1), scales.reshape(1, -1), blockwise.SIGNED[key])
    return flat.view(moment.shape).abs()
