"""APOLLO: each channel of the gradient, as long as AdamW makes it in a random projection (arXiv 2412.05270).

For a weight W (m, n) with m >= n, at 0-based update t, with k = t + 1 and c_k = √(1-β2^k) / (1-β1^k):

    if t % update_proj_gap == 0:  Q = entries of N(0, 1/r)                    (r, n)
    R = G Qᵀ,  M and V = AdamW's moments of R,  N = M / (√V + ε)              (m, r)   optim/rules/adamw.py
    s_i = ‖N_i‖ / (‖R_i‖ + 1e-8)                                              (m, 1)   optim/rules/channels.py
    S = s ∘ G, its norm growing by no more than 1% an update                  (m, n)   optim/rules/limiter.py
    W <- W - lr c_k √scale S                                                  (m, n)

and from the left, R = Pᵀ G with one factor for each column, if m < n. `--apollo_projection svd` takes GaLore's Q in
place of a random one. APOLLO-Mini has one factor ‖N‖ / (‖R‖ + 1e-8) for the whole matrix. The moments are kept as they
are when the projection changes. The paper's algorithm has no c_k, its code has; the numbers published are the code's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_pretraining.distributed.sharding import ShardInfo
from peft_pretraining.methods._projection.method import GradientProjection
from peft_pretraining.methods.apollo.settings import PROJECTIONS
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
from peft_pretraining.optim.basis.bases import SVDBasis
from peft_pretraining.optim.rules.batches import Batch, Batches
from peft_pretraining.optim.rules.channels import (
    add_scaled_gradients,
    channel_factors,
    channel_lengths,
    directions_of,
    gradient,
    limit,
    norms_of_scaled,
    of_channels,
    ratio,
)
from peft_pretraining.optim.rules.limiter import NormGrowthLimiter
from peft_pretraining.optim.tensors.projection import Bases, Projection


class ApolloTraining(GradientProjection):
    """`--proj_type` chooses the side that is projected, whose other side has the channels."""

    granularity = "channel"

    def projection(self) -> dict[str, Any]:
        lift = ScaledGradient(self.granularity, self.config.method.norm_growth)
        return {**super().projection(), "basis": basis_of(self.config.method.apollo_projection), "lift": lift}


def basis_of(projection: str, given: Sequence[Tensor] = ()) -> BasisRule:
    """The rule of `--apollo_projection`."""
    if projection not in PROJECTIONS:
        raise ValueError(f"projection must be one of {', '.join(PROJECTIONS)}, got {projection!r}")
    return SVDBasis("auto") if projection == "svd" else GaussianProjection(given)


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
    masks = True
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
        batches = list(Batches(updates))
        factors, norms = yield from (_of_channels(batches) if self._by_channel else _of_tensors(batches))
        divisors = limit(self._limiter, batches, norms)
        steps = []
        for batch, factor, divisor in zip(batches, factors, divisors, strict=True):
            length = batch.rate * directions_of(batch).bias_correction * math.sqrt(batch.scale)
            steps.append(factor / (of_channels(divisor) if self._by_channel else divisor) * -length)
        add_scaled_gradients(batches, steps)


def _of_channels(batches: Sequence[Batch]) -> Phases[tuple[list[Tensor], list[Tensor]]]:
    """s_i, (..., m, 1) or (..., 1, n), and ‖S‖."""
    factors, lengths = [channel_factors(batch) for batch in batches], [channel_lengths(batch) for batch in batches]
    norms = yield from norms_of_scaled(batches, factors, lengths)
    return factors, norms


def _of_tensors(batches: Sequence[Batch]) -> Phases[tuple[list[Tensor], list[Tensor]]]:
    """One factor s for each matrix, and ‖S‖ = s ‖G‖."""
    asked = []
    for batch in batches:
        direction, _, correction = directions_of(batch)
        whole = batch.together(torch._foreach_norm([gradient(update) for update in batch.updates]))
        lengths = (_norm(direction) / correction, _norm(batch.grad))
        asked += [Collective(length.square(), batch.shard) for length in lengths]
        asked.append(Collective(whole.square(), batch.weight_shard))
    found = [square.sqrt() for square in (yield asked)]
    factors = [ratio(n, r) for n, r in zip(found[::3], found[1::3], strict=True)]
    return factors, [factor * g for factor, g in zip(factors, found[2::3], strict=True)]


def _norm(matrices: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(matrices, dim=(-2, -1))
    return norm


class Apollo(MatrixOptimizer):
    """APOLLO for other loops: matrices as above, everything else by AdamW at the same rate.

    >>> weight = torch.nn.Parameter(torch.ones(6, 4))
    >>> optimizer = Apollo([weight], lr=0.01, rank=2)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> {key: tuple(value.shape) for key, value in optimizer.state[weight].items() if value.ndim}
    {'right_basis': (2, 4), 'exp_avg': (6, 2), 'exp_avg_sq': (6, 2)}

    `projection`: random, or svd (GaLore's bases). `projections` are random matrices to take instead of drawn ones, one
    for each refresh: for tests.
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
        projection: str = "random",
        projections: Sequence[Tensor] = (),
        **settings: Any,
    ):
        matrices = {
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "proj_type": proj_type,
            "basis": basis_of(projection, projections),
            "lift": ScaledGradient(granularity, norm_growth),
        }
        super().__init__(params, matrices=matrices, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **settings)
