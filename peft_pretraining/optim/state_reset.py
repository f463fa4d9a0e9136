"""Forgetting parts of an Adam state, in place, so that sharded optimizers and checkpoints keep their tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


def moments(optimizer: Optimizer, params: Iterable[Tensor]) -> list[Tensor]:
    """First and second moments of `params`, in a fixed order."""
    return [optimizer.state[param][key] for param in params for key in MOMENTS]


@torch.no_grad()
def zero(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        tensor.zero_()


@torch.no_grad()
def prune_randomly(tensor: Tensor, fraction: float, generator: torch.Generator) -> None:
    """Zero each entry with probability `fraction`. The draw is on the generator's device."""
    drawn = torch.rand(tensor.shape, generator=generator, device=generator.device)
    tensor.masked_fill_((drawn < fraction).to(tensor.device), 0)


@torch.no_grad()
def prune_by_magnitude(tensor: Tensor, fraction: float) -> None:
    """Zero the entries whose magnitude lies below the `fraction`-quantile of all magnitudes.

    The quantile lies between two of the sorted magnitudes; the upper one is the smallest that stays.
    """
    magnitudes = tensor.abs().flatten()
    rank = math.ceil(fraction * (magnitudes.numel() - 1))  # 0-based position of that one
    smallest = magnitudes.kthvalue(rank + 1).values
    tensor.masked_fill_(tensor.abs() < smallest, 0)
