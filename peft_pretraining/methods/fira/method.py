"""Fira: GaLore, and the part of the gradient outside the subspace, scaled as AdamW scales inside (arXiv 2410.01623).

For a weight W (m, n) with m >= n, at 0-based update t, with k = t + 1, c_k = √(1-β2^k) / (1-β1^k) and α = scale:

    Q, R = G Qᵀ, M, V as GaLore's,  N = M / (√V + ε)                          (m, r)   optim/rules/adamw.py
    s_i = ‖N_i‖ / (‖R_i‖ + 1e-8)                                              (m, 1)   optim/rules/channels.py
    E = G - α R Q (`code`), or G - R Q (`orthogonal`)                         (m, n)
    S = s ∘ E, its norm growing by no more than 1% an update                  (m, n)   optim/rules/limiter.py
    W <- W - lr c_k (α N Q + S)                                               (m, n)

and from the left if m < n. The paper writes E = G - R Q; its code, with which all numbers were made, keeps 1 - α of the
gradient inside the subspace in E. They are the same at α = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from peft_pretraining.distributed.sharding import ShardInfo
from peft_pretraining.methods._projection.method import GradientProjection
from peft_pretraining.methods.fira.settings import RESIDUALS
from peft_pretraining.optim import Collective, Lift, MatrixOptimizer, ParamUpdate, Phases, StateTensor
from peft_pretraining.optim.rules.channels import (
    channel_factors,
    low_rank_axis,
    of_rows,
    residual,
    squared_norm_of_scaled,
)
from peft_pretraining.optim.rules.limiter import NormGrowthLimiter
from peft_pretraining.optim.tensors.projection import Projection


class FiraTraining(GradientProjection):
    """`--proj_type` chooses the side, `--fira_residual` what is added back."""

    def projection(self) -> dict[str, Any]:
        method = self.config.method
        return {**super().projection(), "lift": ScaledResidual(method.fira_residual, method.norm_growth)}


class ScaledResidual(Lift):
    """W <- W - lr c_k (α back(N) + S), S = what is left of G, each channel times what the rule did to that of R; ‖S‖
    grows by no more than a factor `norm_growth` an update."""

    name = "scaled_residual"

    reads_gradient = True

    def __init__(self, residual: str = "code", norm_growth: float = 1.01):
        if residual not in RESIDUALS:
            raise ValueError(f"residual must be one of {', '.join(RESIDUALS)}, got {residual!r}")
        self._orthogonal, self._limiter = residual == "orthogonal", NormGrowthLimiter(norm_growth)

    def declare_state(
        self, weight: Tensor, projection: Projection, group: dict[str, Any], shard: ShardInfo
    ) -> dict[str, StateTensor]:
        return self._limiter.declare_state(weight)

    def move(self, updates: Sequence[ParamUpdate], group: dict[str, Any]) -> Phases[None]:
        factors = [channel_factors(update) for update in updates]
        left = [residual(update, 1.0 if self._orthogonal else update.scale) for update in updates]
        squares = yield [
            Collective(squared_norm_of_scaled(part, factor, low_rank_axis(update)), update.shard)
            for update, part, factor in zip(updates, left, factors, strict=True)
        ]
        divisors = self._limiter.divisors(updates, [square.sqrt() for square in squares])
        for update, part, factor, divisor in zip(updates, left, factors, divisors, strict=True):
            assert update.direction is not None
            direction, rate, correction = update.direction
            bases, signed = update.bases, factor / divisor * (-update.rate * correction)
            for rows, weight in update.moving_rows():
                update.projection.add_projected_back(weight, bases, direction, -rate * update.scale, rows)
                weight.addcmul_(of_rows(part, rows), of_rows(signed, rows))


class Fira(MatrixOptimizer):
    """Fira for other loops: matrices as above, everything else by AdamW at the same rate.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.ones(6, 4))
    >>> optimizer = Fira([weight], lr=0.01, rank=2)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> {key: tuple(value.shape) for key, value in optimizer.state[weight].items() if value.ndim}
    {'right_basis': (2, 4), 'exp_avg': (6, 2), 'exp_avg_sq': (6, 2)}
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 0.01,
        rank: int = 128,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        residual: str = "code",
        norm_growth: float = 1.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        **settings: Any,
    ):
        matrices = {
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "proj_type": proj_type,
            "lift": ScaledResidual(residual, norm_growth),
        }
        super().__init__(params, matrices=matrices, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **settings)
