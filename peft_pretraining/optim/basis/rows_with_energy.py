"""Which rows of a gradient A subspace iteration does without, on the CPU: a product takes as long as it has rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from peft_pretraining.optim.basis.subspace_iteration import Iterate

_NEGLIGIBLE = (0.1, 0.03)
"""Share of ‖A‖² in the rows of A that a first round from a basis in use, and other rounds, leave out. No more of the
energy can be missed for want of them; of real gradients' it is 2e-4."""
_WORTH_SORTING = 2**16
"""Numbers of a matrix from which on its rows are weighed."""
_WORTH_COPYING = 0.1
"""Share of the rows from which on they are left out: the others are copied."""
_SQUARED_AT_ONCE = 2**15
"""Numbers that stay in the cache."""
_LEAST = 1e-25
"""‖A‖² above which the squares of single numbers that matter are normal in float32."""


def squares_of(each: Iterate) -> Tensor:
    """What this device adds to ‖A‖², in float64, and on the CPU to the share of each row of A (l,) in it."""
    grad = each.grad
    if grad.device.type != "cpu" or each.shard.shape.numel() < _WORTH_SORTING:
        norm: Tensor = torch.linalg.vector_norm(grad, dtype=torch.float64)
        return norm.square()
    squares = _squares_of_rows(grad, each.columns, torch.promote_types(grad.dtype, torch.float32))
    if not _LEAST < float(squares.sum()) < 1 / _LEAST:  # squares of such numbers under- or overflow in float32
        squares = _squares_of_rows(grad, each.columns, torch.float64)
    if each.shard.dim is None or each.divided_side:
        return squares
    whole = squares.new_zeros(each.shard.shape[int(not each.columns)])
    each.shard.part(whole, 0).copy_(squares)
    return whole


def _squares_of_rows(grad: Tensor, rows: bool, dtype: torch.dtype) -> Tensor:
    """‖·‖² of each row, or each column, in float64, of a gradient that is squared in `dtype`, a bit at a time."""
    if rows:
        norms: Tensor = torch.linalg.vector_norm(grad, dim=1, dtype=dtype)
        return norms.double().square()
    total = grad.new_zeros(grad.shape[1], dtype=torch.float64)
    for block in torch.split(grad, max(1, _SQUARED_AT_ONCE // max(1, grad.shape[1]))):
        total += block.to(dtype).square().sum(0)
    return total


def leave_out(each: Iterate, squares: Tensor, warm: bool) -> None:
    """Set ‖A‖, and, on the CPU, where a product takes as long as it has rows, let A be without those that hardly
    count: in gradients of MLPs half of them have a few hundredths of the energy.

    `squares`: of all rows, or their sum.
    """
    if not squares.dim():
        each.norm = squares.sqrt()
        return
    ascending, order = squares.sort()
    sums = ascending.cumsum(0)
    few = [int((sums <= share * sums[-1]).sum()) for share in _NEGLIGIBLE]
    first, each.later = (_without(each, order[:number], squares) for number in few)
    each.places, each.norm = first if warm else each.later


def _without(each: Iterate, few: Tensor, squares: Tensor) -> tuple[Tensor | None, Tensor]:
    """The places of this device's rows of A but `few`, or None where these are not worth it, and ‖A‖."""
    if len(few) < _WORTH_COPYING * len(squares):
        return None, squares.sum().sqrt()
    kept = torch.ones_like(squares, dtype=torch.bool).index_fill_(0, few, False)
    norm = (squares * kept).sum().sqrt()
    if each.shard.dim is not None and not each.divided_side:
        kept = each.shard.part(kept, 0)
    return kept.nonzero()[:, 0], norm
