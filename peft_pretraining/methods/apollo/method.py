"""APOLLO: each channel of the gradient, as long as AdamW makes it in a random projection (arXiv 2412.05270).

For a weight W (m, n) with m >= n, at 0-based update t, with k = t + 1 and c_k = √(1-β2^k) / (1-β1^k):

    if t % update_proj_gap == 0:  Q = entries of N(0, 1/r)                    (r, n)
    R = G Qᵀ,  M and V = AdamW's moments of R,  N = M / (√V + ε)              (m, r)   optim/rules/adamw.py
    s_i = ‖N_i‖ / (‖R_i‖ + 1e-8)                                              (m, 1)   optim/rules/channels.py
    S = s ∘ G, its norm growing by no more than 1% an update                  (m, n)   optim/rules/limiter.py
    W <- W - lr c_k √scale S                                                  (m, n)

and from the left, R = Pᵀ G with one factor for each column, if m < n. APOLLO-Mini has one factor ‖N‖ / (‖R‖ + 1e-8) for
the whole matrix. The moments are kept as they are when the projection changes. The paper's algorithm has no c_k, its
code has; the numbers published are the code's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_pretraining.distributed.sharding import ShardInfo
from peft_pretraining.methods._projection.method import GradientProjection
from peft_pretraining.optim import (
    BasisRule,
    Collective,
    Lift,
    MatrixOptimizer,
    ParamUpdate,
    Phases,
    Refresh,
    StateTensor,
)
from peft_pretraining.optim.rules.channels import channel_factors, low_rank_axis, of_rows, ratio, squared_norm_of_scaled
from peft_pretraining.optim.rules.limiter import NormGrowthLimiter
from peft_pretraining.optim.tensors.projection import Bases, Projection


class ApolloTraining(GradientProjection):
    """`--proj_type` chooses the side that is projected, whose other side has the channels."""

    granularity = "channel"

    def projection(self) -> dict[str, Any]:
        lift = ScaledGradient(self.granularity, self.config.method.norm_growth)
        return {**super().projection(), "basis": GaussianProjection(), "lift": lift}


class GaussianProjection(BasisRule):
    """Independent entries of N(0, 1/r): lengths are kept on average, and no direction is favoured.

    `given` are projections to take instead, one for each refresh.
    """

    def __init__(self, given: Sequence[Tensor] = ()):
        self._given = given

    def reads_gradient(self, step: int) -> bool:
        return False

    def compute_basis(self, refresh: Refresh) -> Bases:
        (side,) = refresh.projection.sides
        if self._given:
            return {side: self._given[refresh.number]}
        like = refresh.projection.new_bases(refresh.grad)[side]
        drawn = torch.randn(like.shape, generator=refresh.generator("gaussian projection"), dtype=torch.float32)
        wide = torch.promote_types(like.dtype, torch.float32)
        return {side: drawn.to(like.device, wide) / math.sqrt(refresh.projection.rank)}


class ScaledGradient(Lift):
    """W <- W - lr c_k √scale S, S = G times what the rule did to the length of R: of each channel, or (`granularity`
    tensor) of the whole; ‖S‖ grows by no more than a factor `norm_growth` an update."""

    name = "scaled_gradient"

    reads_gradient = True

    def __init__(self, granularity: str = "channel", norm_growth: float = 1.01):
        if granularity not in ("channel", "tensor"):
            raise ValueError(f"granularity must be channel or tensor, got {granularity!r}")
        self._by_channel, self._limiter = granularity == "channel", NormGrowthLimiter(norm_growth)

    def declare_state(
        self, weight: Tensor, projection: Projection, group: dict[str, Any], shard: ShardInfo
    ) -> dict[str, StateTensor]:
        return self._limiter.declare_state(weight)

    def move(self, updates: Sequence[ParamUpdate], group: dict[str, Any]) -> Phases[None]:
        find = self._of_channels if self._by_channel else self._of_tensors
        factors, norms = yield from find(updates)
        divisors = self._limiter.divisors(updates, norms)
        for update, factor, divisor in zip(updates, factors, divisors, strict=True):
            assert update.direction is not None and update.grad is not None
            step = update.rate * update.direction.bias_correction * math.sqrt(update.scale)
            signed = factor / divisor * -step  # (m, 1), (1, n) or a scalar
            for rows, weight in update.moving_rows():
                weight.addcmul_(of_rows(update.grad, rows), of_rows(signed, rows))

    def _of_channels(self, updates: Sequence[ParamUpdate]) -> Phases[tuple[list[Tensor], list[Tensor]]]:
        """Factors (m, 1) or (1, n), and ‖S‖."""
        factors = [channel_factors(update) for update in updates]
        squares = yield [
            Collective(squared_norm_of_scaled(_gradient(update), factor, low_rank_axis(update)), update.shard)
            for update, factor in zip(updates, factors, strict=True)
        ]
        return factors, [square.sqrt() for square in squares]

    def _of_tensors(self, updates: Sequence[ParamUpdate]) -> Phases[tuple[list[Tensor], list[Tensor]]]:
        """One factor for each matrix, and ‖S‖ = s ‖G‖."""
        asked = []
        for update in updates:
            assert update.direction is not None
            direction = update.direction.tensor / update.direction.bias_correction
            asked += [Collective(_square(part), update.low_rank_shard) for part in (direction, update.low_rank_grad)]
            asked.append(Collective(_square(_gradient(update)), update.shard))
        found = [square.sqrt() for square in (yield asked)]
        factors = [ratio(n, r) for n, r in zip(found[::3], found[1::3], strict=True)]
        return factors, [factor * g for factor, g in zip(factors, found[2::3], strict=True)]


def _gradient(update: ParamUpdate) -> Tensor:
    assert update.grad is not None
    return update.grad


def _square(part: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(part)
    return norm.square()


class Apollo(MatrixOptimizer):
    """APOLLO for other loops: matrices as above, everything else by AdamW at the same rate.

    >>> weight = torch.nn.Parameter(torch.ones(6, 4))
    >>> optimizer = Apollo([weight], lr=0.01, rank=2)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> {key: tuple(value.shape) for key, value in optimizer.state[weight].items() if value.ndim}
    {'right_basis': (2, 4), 'exp_avg': (6, 2), 'exp_avg_sq': (6, 2)}

    `projections` are random matrices to take instead of drawn ones, one for each refresh: for tests.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 0.01,
        rank: int = 128,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        proj_type: str = "std",
        granularity: str = "channel",
        norm_growth: float = 1.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        projections: Sequence[Tensor] = (),
        **settings: Any,
    ):
        matrices = {
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "proj_type": proj_type,
            "basis": GaussianProjection(projections),
            "lift": ScaledGradient(granularity, norm_growth),
        }
        super().__init__(params, matrices=matrices, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **settings)
