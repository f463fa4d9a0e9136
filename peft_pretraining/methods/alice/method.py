"""Alice: Adam in a subspace that is tracked and explored, and what is outside, scaled by column (arXiv 2502.07752).

For a weight W (m, n) with m <= n, at 0-based update t (for m > n everything is transposed):

    if t % update_proj_gap == 0:  U, the basis (m, r)                                     methods/alice/subspace.py
    σ = Uᵀ G,  Q̃ = β3 Q̃ + (1-β3) σσᵀ                                           (r, n), (r, r)
    M = β1 M + (1-β1) σ,  V = β2 V + (1-β2) σ²,  ω = M / (√V + ε)               (r, n)
    p = β1 p + (1-β1) (column sums of G² - column sums of σ²)                   (n)
    C = √(m-r) (G - U σ) / √p by columns, its norm growing by 1% at most        (m, n)   optim/rules/limiter.py
    W <- W - lr α (U ω + α_c C)                                                 (m, n)

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
from peft_pretraining.optim.rules.channels import low_rank_axis, of_rows, residual, squared_norm_of_scaled
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
        if self._beta3:
            grams = yield [Collective(_gram(update), update.low_rank_shard) for update in updates]
            for update, gram in zip(updates, grams, strict=True):
                update.state[TRACKED].lerp_(gram, 1 - self._beta3)
        beta1, beta2 = group["betas"]
        found: list[Direction | None] = []
        for update in updates:
            grad, first, second = update.low_rank_grad, update.state["exp_avg"], update.state["exp_avg_sq"]
            first.lerp_(grad, 1 - beta1)
            second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            found.append(Direction(first / second.sqrt().add_(group["eps"]), update.rate))
        return found


def _gram(update: ParamUpdate) -> Tensor:
    """σσᵀ (r, r)."""
    grad = update.low_rank_grad
    return grad @ grad.T if low_rank_axis(update) == 0 else grad.T @ grad


class Compensated(Lift):
    """W <- W - lr α (U ω + α_c C), C = what is left of G, each column over the root of its mean energy, and ‖C‖ growing
    by no more than a factor `norm_growth` an update."""

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
        energies = yield [
            Collective(_gradient(update).square().sum(low_rank_axis(update)), update.projection.sum_shard)
            for update in updates
        ]
        factors = [
            self._factors(update, energy, group["betas"][0]) for update, energy in zip(updates, energies, strict=True)
        ]
        left = [residual(update) for update in updates]
        squares = yield [
            Collective(squared_norm_of_scaled(part, factor, low_rank_axis(update)), update.shard)
            for update, part, factor in zip(updates, left, factors, strict=True)
        ]
        divisors = self._limiter.divisors(updates, [square.sqrt() for square in squares])
        for update, part, factor, divisor in zip(updates, left, factors, divisors, strict=True):
            assert update.direction is not None
            direction, rate, _ = update.direction
            bases, signed = update.bases, factor / divisor * (-rate * update.scale * self._compensation)
            for rows, weight in update.moving_rows():
                update.projection.add_projected_back(weight, bases, direction, -rate * update.scale, rows)
                weight.addcmul_(of_rows(part, rows), of_rows(signed, rows))

    def _factors(self, update: ParamUpdate, energy: Tensor, beta1: float) -> Tensor:
        """√(m-r) / √p for each column, (1, n) or (m, 1), with p moved on; `energy` is that of G's columns."""
        axis, kept = low_rank_axis(update), update.state[self.ENERGY]
        outside = energy - update.low_rank_grad.square().sum(axis)
        # Of a gradient inside the subspace, a difference of rounding errors: C would be others of them over its root.
        rounding = energy * torch.finfo(energy.dtype).eps
        kept.lerp_(torch.maximum(outside, rounding), 1 - beta1)
        beyond = update.shard.shape[axis] - update.projection.rank
        return (math.sqrt(beyond) / kept.clamp(min=_SMALLEST).sqrt()).unsqueeze(axis)


def _gradient(update: ParamUpdate) -> Tensor:
    assert update.grad is not None
    return update.grad


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
