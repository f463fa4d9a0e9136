"""What an update rule does to the length of each channel of a projected gradient: APOLLO's and Fira's factors.

A channel is an index of the side that is not projected: a row of R = G Qᵀ (m, r), a column of R = Pᵀ G (r, n).
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_pretraining.optim.tensors.param_update import ParamUpdate
from peft_pretraining.optim.tensors.projection import LEFT

_TINY = 1e-8
"""Added to norms that divide."""


def low_rank_axis(update: ParamUpdate) -> int:
    """The dimension of R that has the rank."""
    return 0 if update.projection.sides == (LEFT,) else 1


def ratio(direction: Tensor, gradient: Tensor) -> Tensor:
    """‖N‖ / (‖R‖ + 1e-8), of norms."""
    return direction / (gradient + _TINY)


def channel_factors(update: ParamUpdate) -> Tensor:
    """s_i = ‖N_i‖ / (‖R_i‖ + 1e-8), (m, 1) or (1, n); N is the rule's direction without its bias correction."""
    assert update.direction is not None
    axis = low_rank_axis(update)
    direction, gradient = (
        torch.linalg.vector_norm(tensor, dim=axis, keepdim=True)
        for tensor in (update.direction.tensor, update.low_rank_grad)
    )
    return ratio(direction / update.direction.bias_correction, gradient)


def squared_norm_of_scaled(matrix: Tensor, factors: Tensor, axis: int) -> Tensor:
    """‖S‖² of S = factors ∘ matrix, which is never made: of this device's part, over the channels' own norms."""
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=axis, keepdim=True)
    return (norms * factors).square().sum()


def residual(update: ParamUpdate, inside: float = 1.0) -> Tensor:
    """G less `inside` times its projection, this device's part of (m, n)."""
    assert update.grad is not None
    left = update.grad.clone()
    update.projection.add_projected_back(left, update.bases, update.low_rank_grad, -inside)
    return left


def of_rows(tensor: Tensor, rows: slice | None) -> Tensor:
    """These rows of what is (m, n), (m, 1), (1, n) or a scalar: the whole of what is the same in all rows."""
    return tensor if rows is None or tensor.ndim == 0 or len(tensor) == 1 else tensor[rows]
