"""RACS: SGD whose gradients are scaled by rows and by columns (arXiv 2502.07752, algorithm 1).

For a weight W (m, n), with H = G∘G, q = 1 (m), five times (equation 16):

    s = Hᵀ q / ‖q‖²,  q = H s / ‖s‖²                                           (n), (m)
    s̄ = β s̄ + (1-β) s,  q̄ = β q̄ + (1-β) q                                     (n), (m)
    S_ij = G_ij / √(q̄_i s̄_j), its norm growing by no more than 1% an update    (m, n)   optim/rules/limiter.py
    W <- W - lr α S                                                            (m, n)

with α = scale. A gradient of zeros leaves s̄ and q̄ as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_pretraining.distributed.sharding import WHOLE, ShardInfo
from peft_pretraining.methods._matrices.method import MatrixTraining
from peft_pretraining.optim import Collective, Direction, MatrixOptimizer, ParamUpdate, Phases, StateTensor, UpdateRule
from peft_pretraining.optim.rules.limiter import NormGrowthLimiter

_SMALLEST = 1e-30
"""Of scales that divide."""


class RacsTraining(MatrixTraining):
    def matrices(self) -> dict[str, Any]:
        method = self.config.method
        rule = RowsAndColumns(method.scale, method.racs_beta, method.racs_iterations, method.norm_growth)
        return {"rule": rule}


class RowsAndColumns(UpdateRule):
    """S, the gradient scaled by rows and columns. Devices may divide either: sums of the side that is divided are added
    up in each iteration, those of all matrices together."""

    name = "racs"

    decays_first = True
    ROWS, COLUMNS = "row_scale", "column_scale"

    def __init__(self, scale: float = 1.0, beta: float = 0.9, iterations: int = 5, norm_growth: float = 1.01):
        self._scale, self._beta, self._iterations = scale, beta, iterations
        self._limiter = NormGrowthLimiter(norm_growth, epsilon=0.0)

    def declare_state(self, like: Tensor, group: dict[str, Any], shard: ShardInfo = WHOLE) -> dict[str, StateTensor]:
        if like.ndim != 2:
            raise ValueError(f"RACS is for matrices, got shape {tuple(like.shape)}")
        wide = torch.promote_types(like.dtype, torch.float32)
        rows, columns = (like.new_zeros(size, dtype=wide) for size in like.shape)
        return {
            self.ROWS: StateTensor.along(rows, 0, shard),
            self.COLUMNS: StateTensor.along(columns, 1, shard),
            **self._limiter.declare_state(like),
        }

    def directions(self, updates: Sequence[ParamUpdate], group: dict[str, Any]) -> Phases[list[Direction | None]]:
        grads = [update.low_rank_grad for update in updates]
        # Squares of squares underflow in float32 for small gradients: those of G / max|G| do not.
        largest = yield [
            Collective(_largest(grad), update.shard, "max") for grad, update in zip(grads, updates, strict=True)
        ]
        squares = [
            (grad / torch.where(most > 0, most, 1.0)).square_() for grad, most in zip(grads, largest, strict=True)
        ]
        yield from self._track_scales(updates, squares, largest)
        del squares
        scaled = [self._scaled(update) for update in updates]
        norms = yield [
            Collective(torch.linalg.vector_norm(step).square(), update.shard)
            for step, update in zip(scaled, updates, strict=True)
        ]
        divisors = self._limiter.divisors(updates, [norm.sqrt() for norm in norms])
        return [
            Direction(step.div_(divisor), update.rate * self._scale)
            for step, divisor, update in zip(scaled, divisors, updates, strict=True)
        ]

    def _track_scales(
        self, updates: Sequence[ParamUpdate], squares: Sequence[Tensor], largest: Sequence[Tensor]
    ) -> Phases[None]:
        """The fixed-point iteration, and its running means."""
        rows = [square.new_ones(len(square)) for square in squares]
        columns = list(rows)
        for _ in range(self._iterations):
            found = yield [
                _contraction(square.T, q, update.shard, 0)
                for square, q, update in zip(squares, rows, updates, strict=True)
            ]
            columns = [_quotient(answer) for answer in found]
            found = yield [
                _contraction(square, s, update.shard, 1)
                for square, s, update in zip(squares, columns, updates, strict=True)
            ]
            rows = [_quotient(answer) for answer in found]
        for update, q, s, most in zip(updates, rows, columns, largest, strict=True):
            weight = (most > 0).to(q.dtype) * (1 - self._beta)
            update.state[self.ROWS].lerp_(q, weight)
            update.state[self.COLUMNS].lerp_(s * most.square(), weight)

    def _scaled(self, update: ParamUpdate) -> Tensor:
        """S before the limiter, this device's part of (m, n)."""
        rows, columns = (update.state[key].clamp(min=_SMALLEST).rsqrt() for key in (self.ROWS, self.COLUMNS))
        scaled: Tensor = (update.low_rank_grad * rows.unsqueeze(1)).mul_(columns)
        return scaled


def _largest(grad: Tensor) -> Tensor:
    """max|G|, 0 of no rows at all."""
    return grad.abs().amax() if grad.numel() else grad.new_zeros(())


def _contraction(matrix: Tensor, vector: Tensor, shard: ShardInfo, dim: int) -> Collective:
    """matrix @ vector and, behind it, ‖vector‖²: sums over the devices that divide this dimension of G."""
    both = torch.cat([matrix @ vector, vector.square().sum().unsqueeze(0)])
    return Collective(both, shard if shard.dim == dim else WHOLE)


def _quotient(answer: Tensor) -> Tensor:
    """What was contracted, over the square; zeros of zeros."""
    square = answer[-1]
    return answer[:-1] / torch.where(square > 0, square, 1.0)


class Racs(MatrixOptimizer):
    """RACS for other loops: matrices as above, everything else by Adam (`betas`, `eps`).

    >>> weight = torch.nn.Parameter(torch.ones(6, 4))
    >>> optimizer = Racs([weight], lr=0.02)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> {key: tuple(value.shape) for key, value in optimizer.state[weight].items() if value.ndim}
    {'row_scale': (6,), 'column_scale': (4,)}
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 0.02,
        scale: float = 0.05,
        beta: float = 0.9,
        iterations: int = 5,
        norm_growth: float = 1.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **settings: Any,
    ):
        matrices = {"rule": RowsAndColumns(scale, beta, iterations, norm_growth)}
        super().__init__(params, matrices=matrices, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **settings)
