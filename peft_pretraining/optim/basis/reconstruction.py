"""The gradient that moves the bases of Online Subspace Descent (arXiv 2408.12857, algorithm 1)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from peft_pretraining.distributed.sharding import HALF, ShardInfo
from peft_pretraining.optim.tensors.collectives import Collective, Phases
from peft_pretraining.optim.tensors.launching import launches_cost
from peft_pretraining.optim.tensors.param_update import ParamUpdate
from peft_pretraining.optim.tensors.projection import RIGHT, Bases

_SMALLEST_SQUARE = 1e-30
"""Of a gradient's norm: eight digits above the smallest normal float32 (and bf16)."""


def reconstruction_gradient(side: str, basis: Tensor, grad: Tensor, low_rank_grad: Tensor) -> Tensor:
    """∇L of the loss L(Q) = ‖Ĝ QᵀQ - Ĝ‖² with Ĝ = G / ‖G‖, in the shape of the basis (left: L(P) = ‖P PᵀĜ - Ĝ‖²).

    `low_rank_grad` is R = G Qᵀ (m, r) or Pᵀ G (r, n) for the same G. With E = R Q - G and T = RᵀG the definition,
    2 (Q Eᵀ G + Q Gᵀ E), becomes 2 [(QQᵀ - 2 I) T + (T Qᵀ) Q]: one product with G and four with r x r factors, and
    nothing of the size m x m or n x n.
    """
    return _gradient(side, basis, _square(grad), _cross(side, grad, low_rank_grad))


def reconstruction_gradients(updates: Sequence[ParamUpdate], bases: Sequence[Bases]) -> Phases[list[Tensor]]:
    """∇L of each matrix in these bases. Devices that hold different parts of G and R add up two tensors of it, or,
    where they hold different parts of what is projected away, put G together.

    Except on the CPU, where launches cost nothing, those of one shape are computed together.
    """
    kinds = list(_alike(updates, bases).values())
    asked = []
    for places in kinds:
        projection, grads = updates[places[0]].projection, [_grad(updates[place]) for place in places]
        shard = projection.shard
        if projection.shards_projected_side:  # one at a time: no device has room for all of them
            grads = yield [Collective(grads[0], shard, "whole")]
            shard = ShardInfo(shard.shape)
        low_rank_grads = [updates[place].low_rank_grad for place in places]
        parts = _parts(projection.sides[0], grads, low_rank_grads)
        asked += [Collective(part, shard) for part in parts]
    sums = yield asked
    found: list[Tensor | None] = [None] * len(updates)
    for index, places in enumerate(kinds):
        side, together = updates[places[0]].projection.sides[0], len(places) > 1
        several = [bases[place][side] for place in places]
        basis = torch.stack(several) if together else several[0]
        gradient = _gradient(side, basis, sums[2 * index], sums[2 * index + 1])
        scaled_by = updates[places[0]].scaled_by
        if isinstance(scaled_by, Tensor) or scaled_by != 1.0:
            gradient.div_(scaled_by)  # it is linear in R
        for place, part in zip(places, gradient.unbind() if together else [gradient], strict=True):
            found[place] = part
    return [gradient for gradient in found if gradient is not None]


def _alike(updates: Sequence[ParamUpdate], bases: Sequence[Bases]) -> dict[Hashable, list[int]]:
    """Places of what can be computed together."""
    found: dict[Hashable, list[int]] = {}
    for place, (update, its) in enumerate(zip(updates, bases, strict=True)):
        projection = update.projection
        ((side, basis),) = its.items()
        single = projection.shards_projected_side or (not launches_cost(basis.device) and update.mask is None)
        kind = (
            side,
            basis.shape,
            basis.dtype,
            basis.device,
            projection.shard.dim,
            id(update.scaled_by),
            id(update.mask),
        )
        found.setdefault(place if single else kind, []).append(place)
    return found


def _grad(update: ParamUpdate) -> Tensor:
    assert update.grad is not None
    return update.grad


def _parts(side: str, grads: Sequence[Tensor], low_rank_grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """‖G‖² in float64, and T: sums over devices that hold different parts of G and R. Of several (L), (L, r, n)."""
    if len(grads) == 1:
        return _square(grads[0]), _cross(side, grads[0], low_rank_grads[0])
    norms = torch._foreach_norm(list(grads), 2, torch.float32 if grads[0].dtype in HALF else grads[0].dtype)
    (m, n), r = grads[0].shape, low_rank_grads[0].shape[1 if side == RIGHT else 0]
    crosses = grads[0].new_empty((len(grads), r, n) if side == RIGHT else (len(grads), m, r))
    for grad, low_rank_grad, out in zip(grads, low_rank_grads, crosses.unbind(), strict=True):
        _cross(side, grad, low_rank_grad, out)
    return torch.stack(norms).double().square_(), crosses


def _square(grad: Tensor) -> Tensor:
    flat = grad.reshape(-1)
    return torch.dot(flat, flat).double()  # a single pass, where a norm takes two


def _cross(side: str, grad: Tensor, low_rank_grad: Tensor, out: Tensor | None = None) -> Tensor:
    """T."""
    if side == RIGHT:
        return torch.mm(low_rank_grad.T, grad, out=out)  # (r, m) @ (m, n) -> (r, n)
    return torch.mm(grad, low_rank_grad.T, out=out)  # (m, n) @ (n, r) -> (m, r)


def _gradient(side: str, basis: Tensor, square: Tensor, cross: Tensor) -> Tensor:
    # A zero gradient has no direction, and one whose square underflows has lost it: the basis stays.
    factor = torch.where(square > _SMALLEST_SQUARE, 2 / square, 0)
    inner = basis @ basis.mT if side == RIGHT else basis.mT @ basis  # (r, r)
    inner.diagonal(dim1=-2, dim2=-1).sub_(2)
    if basis.ndim == 3:
        factor = factor.to(basis.dtype).view(-1, 1, 1)
        if side == RIGHT:
            return (inner @ cross).baddbmm_(cross @ basis.mT, basis).mul_(factor)
        return (cross @ inner).baddbmm_(basis, basis.mT @ cross).mul_(factor)
    if side == RIGHT:
        return (inner @ cross).addmm_(cross @ basis.T, basis).mul_(factor)
    return (cross @ inner).addmm_(basis, basis.T @ cross).mul_(factor)
