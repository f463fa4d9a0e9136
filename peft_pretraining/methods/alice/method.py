"""Alice: Adam in a subspace that is tracked and explored, and what is outside, scaled by column (arXiv 2502.07752).

For a weight W (m, n) with m <= n, at 0-based update t (for m > n everything is transposed):

    if t % update_proj_gap == 0:  U, the basis (m, r)                                     methods/alice/subspace.py
    σ = Uᵀ G,  Q̃ = β3 Q̃ + (1-β3) σσᵀ                                           (r, n), (r, r)
    M = β1 M + (1-β1) σ,  V = β2 V + (1-β2) σ²,  ω = M / (√V + ε)               (r, n)
    p = β1 p + (1-β1) (column sums of G² - column sums of σ²)                   (n)
    C = √(m-r) (G - U σ) / √p by columns, its norm growing by 1% at most        (m, n)   optim/rules/limiter.py
    W <- W - lr α (U ω + α_c C)                                                 (m, n)

C is added as (c ∘ G) - U (c ∘ σ), c its factors of columns, so that one product takes ω and σ back.

with α = scale and α_c = alice_compensation. Nothing is bias-corrected, and moments stay as they are at a refresh.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_pretraining.distributed.sharding import WHOLE, ShardInfo
from peft_pretraining.methods._matrices.method import MatrixTraining, adam_arguments
from peft_pretraining.methods.alice.subspace import TRACKED, TrackedSubspace
from peft_pretraining.optim import (
    Collective,
    Direction,
    Lift,
    MatrixOptimizer,
    ParamUpdate,
    Phases,
    StateTensor,
    UpdateRule,
)
from peft_pretraining.optim.rules.batches import Batch, Batches
from peft_pretraining.optim.rules.channels import (
    add_scaled_gradients,
    channel_lengths,
    directions_of,
    limit,
    low_rank_axis,
    norms_of_scaled,
    of_channels,
)
from peft_pretraining.optim.rules.limiter import NormGrowthLimiter
from peft_pretraining.optim.tensors.projection import LEFT, Projection

_SMALLEST = 1e-30
"""Of energies that divide."""


class AliceTraining(MatrixTraining):
    """`--alice_beta3 0` is Alice-0."""

    def matrices(self) -> dict[str, Any]:
        method = self.config.method
        return {
            **objects(method.alice_leading, method.alice_compensation, method.alice_beta3, method.norm_growth),
            "rank": method.rank,
            "update_proj_gap": method.update_proj_gap,
            "scale": method.scale,
            "betas": (method.alice_beta1, method.alice_beta2),
            "eps": adam_arguments(self.config)["eps"],
        }

    def sharded_dimension(self, name: str, param: Tensor) -> int:
        """Along the side that is not projected, R needs no communication."""
        return 1 if param.ndim == 2 and param.shape[0] <= param.shape[1] else 0


def objects(
    leading: int, compensation: float, beta3: float, norm_growth: float, bases: Sequence[Tensor] = ()
) -> dict[str, Any]:
    """Basis, rule and lift of a group."""
    return {
        "basis": TrackedSubspace(leading, beta3, bases),
        "rule": TrackingAdam(beta3),
        "lift": Compensated(compensation, norm_growth),
    }


class TrackingAdam(UpdateRule):
    """ω = M / (√V + ε), and Q̃, the running mean of σσᵀ, which the next refresh reads."""

    name = "alice"
    masks = True
    decays_first = True
    betas = (0.9, 0.9)

    def __init__(self, beta3: float = 0.999):
        self._beta3 = beta3

    def first_moment_decay(self, group: dict[str, Any]) -> float:
        return float(group["betas"][0])

    def declare_state(self, like: Tensor, group: dict[str, Any], shard: ShardInfo = WHOLE) -> dict[str, StateTensor]:
        rank = min(shard.shape or like.shape)
        zeros = {key: torch.zeros_like(like) for key in ("exp_avg", "exp_avg_sq")}
        declared = {key: StateTensor.like_gradient(value, shard) for key, value in zeros.items()}
        return {**declared, TRACKED: StateTensor(like.new_zeros(rank, rank))} if self._beta3 else declared

    def directions(self, updates: Sequence[ParamUpdate], group: dict[str, Any]) -> Phases[list[Direction | None]]:
        batches, (beta1, beta2) = Batches(updates), group["betas"]
        if self._beta3:
            grams = yield [Collective(_gram(batch), batch.shard) for batch in batches]
            for batch, gram in zip(batches, grams, strict=True):
                batch.state(TRACKED).lerp_(gram, 1 - self._beta3)
        for batch in batches:
            first = batch.state("exp_avg").lerp_(batch.grad, 1 - beta1)
            second = batch.state("exp_avg_sq").mul_(beta2).addcmul_(batch.grad, batch.grad, value=1 - beta2)
            batches.answer(batch, first / second.sqrt().add_(group["eps"]), batch.rate)
        return batches.directions()


def _gram(batch: Batch) -> Tensor:
    """σσᵀ (r, r)."""
    return batch.grad.mT @ batch.grad if low_rank_axis(batch.projection) == -1 else batch.grad @ batch.grad.mT


class Compensated(Lift):
    """W <- W - lr α (U ω + α_c C), C = what is left of G, each column over the root of its mean energy, and ‖C‖ growing
    by no more than a factor `norm_growth` an update."""

    masks = True
    reads_gradient = True
    ENERGY = "energy_outside"

    def __init__(self, compensation: float = 0.4, norm_growth: float = 1.01):
        self._compensation, self._limiter = compensation, NormGrowthLimiter(norm_growth, epsilon=0.0)

    def declare_state(
        self, weight: Tensor, projection: Projection, group: dict[str, Any], shard: ShardInfo
    ) -> dict[str, StateTensor]:
        other = 1 if projection.sides == (LEFT,) else 0
        wide = torch.promote_types(weight.dtype, torch.float32)
        energy = weight.new_zeros(weight.shape[other], dtype=wide)
        return {self.ENERGY: StateTensor.along(energy, other, shard), **self._limiter.declare_state(weight)}

    def move(self, updates: Sequence[ParamUpdate], group: dict[str, Any]) -> Phases[None]:
        batches = list(Batches(updates))
        lengths = [channel_lengths(batch) for batch in batches]
        energies = yield [
            Collective(length.square(), batch.projection.sum_shard)
            for batch, length in zip(batches, lengths, strict=True)
        ]
        beta1 = float(group["betas"][0])
        factors = [self._factors(batch, energy, beta1) for batch, energy in zip(batches, energies, strict=True)]
        norms = yield from norms_of_scaled(batches, factors, lengths, inside=1.0)
        divisors = limit(self._limiter, batches, norms)
        steps, low_rank = [], []
        for batch, factor, divisor in zip(batches, factors, divisors, strict=True):
            direction, rate, _ = directions_of(batch)
            step = factor / of_channels(divisor) * (-rate * batch.scale * self._compensation)
            steps.append(step)
            low_rank.append((direction * (-rate * batch.scale)).addcmul_(step, batch.grad, value=-1))
            batch.keep()
        add_scaled_gradients(batches, steps, low_rank)

    def _factors(self, batch: Batch, energy: Tensor, beta1: float) -> Tensor:
        """√(m-r) / √p for each column, (..., 1, n) or (..., m, 1), with p moved on; `energy` is that of G's columns."""
        axis = low_rank_axis(batch.projection)
        outside = energy - batch.grad.square().sum(axis, keepdim=True)
        # Of a gradient inside the subspace, a difference of rounding errors: C would be others of them over its root.
        outside = torch.maximum(outside, energy * torch.finfo(energy.dtype).eps)
        kept = batch.state(self.ENERGY).lerp_(outside.squeeze(axis), 1 - beta1).unsqueeze(axis)
        beyond = batch.weight_shard.shape[axis] - batch.projection.rank
        return math.sqrt(beyond) / kept.clamp(min=_SMALLEST).sqrt()


class Alice(MatrixOptimizer):
    """Alice for other loops: matrices as above, everything else by Adam (`adam_betas`, `adam_eps`).

    >>> weight = torch.nn.Parameter(torch.ones(4, 6))
    >>> optimizer = Alice([weight], lr=0.02, rank=2, leading=1)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> {key: tuple(value.shape) for key, value in optimizer.state[weight].items() if key in ("left_basis", "exp_avg")}
    {'left_basis': (4, 2), 'exp_avg': (2, 6)}

    `bases` are those to take instead of computed ones, one for each refresh: for tests.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 0.02,
        rank: int = 128,
        update_proj_gap: int = 200,
        scale: float = 0.3,
        compensation: float = 0.4,
        leading: int = 40,
        betas: tuple[float, float] = (0.9, 0.9),
        beta3: float = 0.999,
        eps: float = 1e-8,
        norm_growth: float = 1.01,
        weight_decay: float = 0.0,
        adam_betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        bases: Sequence[Tensor] = (),
        **settings: Any,
    ):
        matrices = {
            **objects(leading, compensation, beta3, norm_growth, bases),
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "betas": betas,
            "eps": eps,
        }
        super().__init__(
            params, matrices=matrices, lr=lr, betas=adam_betas, eps=adam_eps, weight_decay=weight_decay, **settings
        )
