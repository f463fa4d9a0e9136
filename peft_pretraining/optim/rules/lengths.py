"""Lengths of the rows or columns of matrices that may be divided over devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from peft_pretraining.distributed.sharding import ShardInfo
from peft_pretraining.optim.rules.batches import Batch, Maker, Part
from peft_pretraining.optim.tensors.collectives import Collective, Phases
from peft_pretraining.optim.tensors.param_update import Quotient


def norms_along(parts: Sequence[Tensor], shards: Sequence[ShardInfo], axis: int) -> Phases[list[Tensor]]:
    """2-norms over dimension `axis` of matrices (m, n), as (m, 1) or (1, n) of this device's part. Their squares are
    added up over devices where that dimension is divided, for all matrices at once; else nothing crosses."""
    norms = [torch.linalg.vector_norm(part, dim=axis, keepdim=True) for part in parts]
    divided = [place for place, shard in enumerate(shards) if shard.dim == axis]
    squares = yield [Collective(norms[place].square(), shards[place]) for place in divided]
    for place, square in zip(divided, squares, strict=True):
        norms[place] = square.sqrt()
    return norms


def over_lengths(
    batch: Batch, axis: int, follow: Callable[[Part], Tensor], divisor: Callable[[Tensor], Tensor]
) -> Phases[Maker]:
    """What makes U / divisor(‖U_i‖), with the norms of U's rows (`axis` 1) or columns (0); `follow` makes U.

    As `norms_along` if devices divide that dimension. Rows that are not divided are made one block after the other.
    """

    def of_rows(part: Part) -> Quotient:
        followed = follow(part)
        return Quotient(followed, divisor(torch.linalg.vector_norm(followed, dim=-1, keepdim=True)))

    if axis == 1 and batch.shard.dim != 1:
        return of_rows
    followed = follow(batch.part())
    norms = torch.linalg.vector_norm(followed, dim=axis - 2, keepdim=True)
    if batch.shard.dim == axis:
        (square,) = yield [Collective(norms.square(), batch.shard)]
        norms = square.sqrt()
    sizes = divisor(norms)
    return lambda part: Quotient(part.of(followed), part.of(sizes))
