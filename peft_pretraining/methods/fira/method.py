"""Fira: GaLore, and the part of the gradient outside the subspace, scaled as AdamW scales inside (arXiv 2410.01623).

For a weight W (m, n) with m >= n, at 0-based update t, with k = t + 1, c_k = √(1-β2^k) / (1-β1^k) and α = scale:

    Q, R = G Qᵀ, M, V as GaLore's,  N = M / (√V + ε)                          (m, r)   optim/rules/adamw.py
    s_i = ‖N_i‖ / (‖R_i‖ + 1e-8)                                              (m, 1)   optim/rules/channels.py
    E = G - α R Q (`code`), or G - R Q (`orthogonal`)                         (m, n)
    S = s ∘ E, its norm growing by no more than 1% an update                  (m, n)   optim/rules/limiter.py
    W <- W - lr c_k (α N Q + S)                                               (m, n)

S is added as (s ∘ G) - (β s ∘ R) Q, β = α or 1, so that one product takes N and R back.

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
from peft_pretraining.optim import Lift, MatrixOptimizer, ParamUpdate, Phases, StateTensor
from peft_pretraining.optim.rules.batches import Batches
from peft_pretraining.optim.rules.channels import (
    add_scaled_gradients,
    channel_factors,
    channel_lengths,
    directions_of,
    limit,
    norms_of_scaled,
    of_channels,
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
    masks = True
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
        batches = list(Batches(updates))
        inside = 1.0 if self._orthogonal else batches[0].scale if batches else 0.0
        factors, lengths = [channel_factors(batch) for batch in batches], [channel_lengths(batch) for batch in batches]
        norms = yield from norms_of_scaled(batches, factors, lengths, inside)
        steps, low_rank = [], []
        for batch, factor, divisor in zip(batches, factors, limit(self._limiter, batches, norms), strict=True):
            direction, rate, correction = directions_of(batch)
            step = factor / of_channels(divisor) * (-batch.rate * correction)
            steps.append(step)
            low_rank.append((direction * (-rate * batch.scale)).addcmul_(step, batch.grad, value=-inside))
        add_scaled_gradients(batches, steps, low_rank)


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
