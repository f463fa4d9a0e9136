"""Whole gradients, each channel scaled on its own: what APOLLO, Fira and Alice have in common.

A channel is an index of the side that is not projected: a row of R = G Qᵀ (m, r), a column of R = Pᵀ G (r, n). Factors
of channels are (m, 1) or (1, n), or one for each matrix of a batch: (L, m, 1) or (L, 1, n).

Neither s ∘ (G - β back(R)) nor what is inside it is ever made. Its norm follows from those of the channels of G and R,
and as s ∘ back(R) = back(s ∘ R), the weight moves by one product of what is in low-rank coordinates, and by s ∘ G.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from peft_pretraining.optim.rules.batches import Batch
from peft_pretraining.optim.rules.limiter import NormGrowthLimiter
from peft_pretraining.optim.tensors.collectives import Collective, Phases
from peft_pretraining.optim.tensors.launching import launches_cost
from peft_pretraining.optim.tensors.lengths import lengths_along
from peft_pretraining.optim.tensors.moving_weights import moving_lots
from peft_pretraining.optim.tensors.param_update import Direction, ParamUpdate
from peft_pretraining.optim.tensors.projection import LEFT, RIGHT, Projection

_NUMBERS_AT_ONCE = 2**17
"""Of a weight's step, on a CPU."""
_TINY = 1e-8
"""Added to norms that divide."""


def low_rank_axis(projection: Projection) -> int:
    """The dimension of R that has the rank, from the end."""
    return -2 if projection.sides == (LEFT,) else -1


def ratio(direction: Tensor, gradient: Tensor) -> Tensor:
    """‖N‖ / (‖R‖ + 1e-8), of norms."""
    return direction / (gradient + _TINY)


def gradient(update: ParamUpdate) -> Tensor:
    """G, this device's part of (m, n)."""
    assert update.grad is not None
    return update.grad


def directions_of(batch: Batch) -> Direction:
    """The rule's directions together, as one."""
    directions = [update.direction for update in batch.updates if update.direction is not None]
    return directions[0]._replace(tensor=batch.together([each.tensor for each in directions]))


def channel_factors(batch: Batch) -> Tensor:
    """s_i = ‖N_i‖ / (‖R_i‖ + 1e-8); N is the rule's direction without its bias correction."""
    direction, _, correction = directions_of(batch)
    axis = low_rank_axis(batch.projection)
    return ratio(lengths_along(direction, axis) / correction, lengths_along(batch.grad, axis))


def channel_lengths(batch: Batch) -> Tensor:
    """‖G_i‖, of this device's part of each channel."""
    axis = low_rank_axis(batch.projection)
    return batch.together([lengths_along(gradient(update), axis) for update in batch.updates])


def norms_of_scaled(
    batches: Sequence[Batch], factors: Sequence[Tensor], lengths: Sequence[Tensor], inside: float = 0.0
) -> Phases[list[Tensor]]:
    """‖S‖ of each matrix, S = s ∘ (G - `inside` back(R)): a scalar for each batch, or (L,). `lengths` are those of the
    channels of G.

    ‖S‖² = Σ s_i² ‖G_i‖² - Σ s_i² (2β ‖R_i‖² - β² ‖back(R)_i‖²). What rounding leaves of a difference of zero is as
    harmless as it is in S.
    """
    asked = []
    for batch, factor, length in zip(batches, factors, lengths, strict=True):
        asked.append(Collective(_total((factor * length).square()), batch.weight_shard))
        if inside:
            asked.append(Collective(_total(factor.square() * _squares_inside(batch, inside)), batch.shard))
    found = yield asked
    if not inside:
        return [whole.sqrt() for whole in found]
    return [(whole - within).clamp_(min=0).sqrt_() for whole, within in zip(found[::2], found[1::2], strict=True)]


def _total(channels: Tensor) -> Tensor:
    return channels.sum((-2, -1))


def _squares_inside(batch: Batch, inside: float) -> Tensor:
    """2β ‖R_i‖² - β² ‖back(R)_i‖²."""
    axis = low_rank_axis(batch.projection)
    squares = lengths_along(batch.grad, axis).square()
    if batch.dtype == torch.float32 and batch.projection.keeps_orthonormal:
        return (2 * inside - inside**2) * squares
    # Bases that were rounded to fewer digits than there are here are not orthonormal.
    side = LEFT if axis == -2 else RIGHT
    bases = batch.together([update.bases[side] for update in batch.updates])
    gram = bases.mT @ bases if side == LEFT else bases @ bases.mT  # (r, r)
    seen = gram @ batch.grad if side == LEFT else batch.grad @ gram
    return 2 * inside * squares - inside**2 * (seen * batch.grad).sum(axis, keepdim=True)


def limit(limiter: NormGrowthLimiter, batches: Sequence[Batch], norms: Sequence[Tensor]) -> list[Tensor]:
    """What each batch's steps are to be divided by: as `norms`, or of channels."""
    each = [norm for batch, norms_of_it in zip(batches, norms, strict=True) for norm in batch.split(norms_of_it)]
    divisors = iter(limiter.divisors([update for batch in batches for update in batch.updates], each))
    return [batch.together([next(divisors) for _ in batch.updates]) for batch in batches]


def of_channels(numbers: Tensor) -> Tensor:
    """One number for each matrix, as factors of its channels."""
    return numbers[..., None, None]


class _Terms(NamedTuple):
    """What one weight moves by."""

    channels: Tensor
    low_rank: Tensor | None
    decay: float
    """What the weight's decay is, if it joins the sum."""


def add_scaled_gradients(
    batches: Sequence[Batch], factors: Sequence[Tensor], low_rank: Sequence[Tensor] | None = None
) -> None:
    """W <- W + back(D) + c ∘ G, D of the shape of R. `factors` are c, or one number for each matrix."""
    updates: list[ParamUpdate] = []
    terms: dict[int, _Terms] = {}
    for place, batch in enumerate(batches):
        channels = batch.split(batch.masked(factors[place]))
        inside: Sequence[Tensor | None] = [None] * len(channels)
        if low_rank is not None:
            inside = batch.split(batch.masked(low_rank[place]))
        for update, own, back in zip(batch.updates, channels, inside, strict=True):
            joins = update.mask is None and not launches_cost(update.weight.device)
            moved = replace(update, decay=0.0) if joins else update
            terms[id(moved)] = _Terms(own, back, update.decay if joins else 0.0)
            updates.append(moved)
    for lot in moving_lots(updates):
        for update, rows, weight in lot:
            if launches_cost(weight.device) or (low_rank is None and not terms[id(update)].decay):
                _add_in_place(update, rows, weight, terms[id(update)])
            else:
                _add_by_sums(update, rows, weight, terms[id(update)])


def _add_in_place(update: ParamUpdate, rows: slice | None, weight: Tensor, terms: _Terms) -> None:
    """One term after the other."""
    grad, channels = _of_rows(gradient(update), rows), _of_rows(terms.channels, rows)
    if update.mask is not None:
        grad = update.mask.zeroed(grad)
    if terms.low_rank is not None:
        update.projection.add_projected_back(weight, update.bases, terms.low_rank, 1.0, rows)
    weight.addcmul_(grad, channels.to(weight.dtype))


def _add_by_sums(update: ParamUpdate, rows: slice | None, weight: Tensor, terms: _Terms) -> None:
    """All terms added up first, of so few rows that a cache holds them: the weight is read, written and rounded once.
    Decay is one of the terms: the factor 1 - lr * decay would be off by up to 3e-8 in float32, which adds up.
    """
    first, count = (0 if rows is None else rows.start), len(weight)
    at_once = max(1, _NUMBERS_AT_ONCE // max(1, weight.shape[1]))
    for start in range(0, count, at_once):
        own, whole = (slice(begin, begin + min(at_once, count - start)) for begin in (start, first + start))
        part, grad = weight[own], gradient(update)[whole]
        if update.mask is not None:
            grad = update.mask.zeroed(grad)
        step = grad * _of_rows(terms.channels, whole).to(grad.dtype)
        if terms.low_rank is not None:
            update.projection.add_projected_back(step, update.bases, terms.low_rank, 1.0, whole)
        if terms.decay:
            step = step if update.decays_first else step.mul_(1 - terms.decay)
            step.add_(part, alpha=-terms.decay)
        part.add_(step)


def _of_rows(tensor: Tensor, rows: slice | None) -> Tensor:
    """These rows of what is (m, n), (m, 1), (1, n) or a scalar: the whole of what is the same in all rows."""
    return tensor if rows is None or tensor.ndim == 0 or len(tensor) == 1 else tensor[rows]
