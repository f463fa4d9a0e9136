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
from peft_pretraining.optim import (
    Batch,
    Batches,
    Collective,
    Direction,
    MatrixOptimizer,
    ParamUpdate,
    Phases,
    StateTensor,
    UpdateRule,
)
from peft_pretraining.optim.rules.batches import Maker, Part
from peft_pretraining.optim.rules.lengths import largest_magnitude, product
from peft_pretraining.optim.rules.limiter import NormGrowthLimiter
from peft_pretraining.optim.tensors.collectives import in_turn
from peft_pretraining.optim.tensors.param_update import Quotient

_SMALLEST = 1e-30
"""Of scales, and squares of them, that divide."""
_AT_ONCE = 2**20
"""Numbers of a block of squares."""


class RacsTraining(MatrixTraining):
    def matrices(self) -> dict[str, Any]:
        method = self.config.method
        rule = RowsAndColumns(method.scale, method.racs_beta, method.racs_iterations, method.norm_growth)
        return {"rule": rule}


class RowsAndColumns(UpdateRule):
    """S, the gradient scaled by rows and columns. Devices may divide either: sums of the side that is divided are added
    up in each iteration, those of all matrices together."""

    name = "racs"
    masks = True
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
        batches = Batches(updates)
        made = yield from in_turn([self._made(batch) for batch in batches], [batch.shard for batch in batches])
        for batch, direction in zip(batches, made, strict=True):
            batches.answer(batch, direction, batch.updates[0].rate * self._scale)
        return batches.directions()

    def _made(self, batch: Batch) -> Phases[Maker]:
        """S, limited, rows at a time."""
        (most,) = yield [Collective(largest_magnitude(batch), batch.shard, "max")]
        # Squares of squares underflow in float32 for small gradients: those of G / max|G| do not.
        inverse = batch.across(torch.where(most > 0, most, 1.0).reciprocal())
        squares = [(part.grad * inverse).square_() for part in batch.parts(_AT_ONCE)]
        yield from self._track_scales(batch, squares, most)
        rows, columns = (batch.state(key).clamp(min=_SMALLEST) for key in (self.ROWS, self.COLUMNS))
        # ‖S‖² / max|G|², of the squares that are there.
        by_row = _by_columns(squares, columns.reciprocal())
        (square,) = yield [Collective((by_row / rows).sum(-1), batch.shard)]
        divisor = self._limiter.divisor(batch.state(self._limiter.KEY), most * square.sqrt())
        of_row, of_column = (rows.sqrt() * divisor.unsqueeze(-1)).unsqueeze(-1), columns.sqrt().unsqueeze(-2)

        def of_rows(part: Part) -> Quotient:
            return Quotient(part.grad / part.of(of_row), of_column)

        return of_rows

    def _track_scales(self, batch: Batch, squares: Sequence[Tensor], most: Tensor) -> Phases[None]:
        """The fixed-point iteration, and its running means."""
        q = torch.ones_like(batch.state(self.ROWS))
        contracted = _by_rows(batch, squares, q)
        for remaining in reversed(range(self._iterations)):
            s = yield from _quotient(batch, contracted, q, 0)
            if batch.shard.dim == 1:
                q = yield from _quotient(batch, _by_columns(squares, s), s, 1)
                contracted = _by_rows(batch, squares, q)
            else:
                q, contracted = _there_and_back(
                    squares, s / s.square().sum(-1, keepdim=True).clamp(min=_SMALLEST), bool(remaining)
                )
        weight = ((most > 0).to(q.dtype) * (1 - self._beta)).unsqueeze(-1)
        batch.state(self.ROWS).lerp_(q, weight)
        batch.state(self.COLUMNS).lerp_(s * most.square().unsqueeze(-1), weight)


def _by_rows(batch: Batch, squares: Sequence[Tensor], q: Tensor) -> Tensor:
    """Hᵀ q, (..., n), of H in blocks of rows."""
    found = [product(block.mT, part.of(q)) for part, block in zip(batch.parts(_AT_ONCE), squares, strict=True)]
    return torch.stack(found).sum(0) if len(found) > 1 else found[0]


def _by_columns(squares: Sequence[Tensor], s: Tensor) -> Tensor:
    """H s, (..., m), of H in blocks of rows."""
    found = [product(block, s) for block in squares]
    return found[0] if len(found) == 1 else torch.cat(found, -1)


def _there_and_back(squares: Sequence[Tensor], s: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """H s and, of each block while it is in the cache, Hᵀ H s."""
    rows, columns = [], []
    for block in squares:
        rows.append(product(block, s))
        if back:
            columns.append(product(block.mT, rows[-1]))
    return torch.cat(rows, -1), torch.stack(columns).sum(0) if back else s


def _quotient(batch: Batch, contracted: Tensor, vector: Tensor, dim: int) -> Phases[Tensor]:
    """What was contracted with a vector along dimension `dim` over that vector's square: sums over the devices that
    divide the dimension. Zeros of zeros."""
    square = vector.square().sum(-1, keepdim=True)
    if batch.shard.dim == dim:
        (both,) = yield [Collective(torch.cat([contracted, square], -1), batch.shard)]
        contracted, square = both[..., :-1], both[..., -1:]
    return contracted / square.clamp(min=_SMALLEST)


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
