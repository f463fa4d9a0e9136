"""Lengths, largest entries and products of matrices, of single ones and of stacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from peft_pretraining.distributed.sharding import ShardInfo
from peft_pretraining.optim.rules.batches import Batch, Maker, Part
from peft_pretraining.optim.tensors.collectives import Collective, Phases
from peft_pretraining.optim.tensors.full_precision import full_float32_products
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


def largest_magnitude(batch: Batch, of_parts: Mapping[int | None, Tensor] | None = None) -> Tensor:
    """max|G| of this device's part of each gradient, () or (L); 0 of a part without entries. `of_parts`: what
    `largest_of_parts` gave, where somebody has looked already."""
    peaks = list((largest_of_parts(batch) if of_parts is None else of_parts).values())
    if not peaks:
        return batch.grad.new_zeros(batch.grad.shape[: batch.grad.ndim - len(batch.shape)])
    return peaks[0] if len(peaks) == 1 else torch.stack(peaks).amax()


def largest_of_parts(batch: Batch) -> dict[int | None, Tensor]:
    """max|G| of each of the batch's parts that have entries, by where these start."""
    return {part.start: _largest(part.grad, batch) for part in batch.parts() if part.grad.numel()}


def _largest(grad: Tensor, batch: Batch) -> Tensor:
    if not batch.by_rows:
        return grad.abs().amax(batch.axes)
    return torch.maximum(-grad.amin(), grad.amax())  # faster than both in one, and than a copy of |G|


def product(matrices: Tensor, vectors: Tensor) -> Tensor:
    """(m, n) times (n), or (L, m, n) times (L, n), in full precision."""
    if matrices.ndim == 2:
        return torch.mv(matrices, vectors)
    with full_float32_products():
        return torch.matmul(matrices, vectors.unsqueeze(-1)).squeeze(-1)
