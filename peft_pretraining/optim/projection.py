"""The algebra of low-rank projections: which sides a weight is projected from, down to R and back.

A weight W (m, n) is projected from the left by a basis P (m, r), R = Pᵀ G (r, n), from the right by Q (r, n),
R = G Qᵀ (m, r), or from both, R = Pᵀ G Qᵀ (r, r). Source: GaLore, arXiv 2403.03507, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LEFT, RIGHT = "left_basis", "right_basis"
"""Keys of P (m, r) and Q (r, n) in a parameter's optimizer state."""

Bases = dict[str, Tensor]

SIDES = ("std", "reverse_std", "left", "right", "full")


def projected_sides(side: str, shape: torch.Size) -> tuple[str, ...]:
    """Which bases a weight of this shape has. Decided once from the weight's shape, never from that of R.

    `std` (arXiv 2403.03507, section 4.2) has its basis on the shorter side, so that R is long and thin: right if
    m >= n.
    """
    tall = shape[0] >= shape[1]
    return {
        "std": (RIGHT,) if tall else (LEFT,),
        "reverse_std": (LEFT,) if tall else (RIGHT,),
        "left": (LEFT,),
        "right": (RIGHT,),
        "full": (LEFT, RIGHT),
    }[side]


@dataclass(frozen=True)
class Projection:
    """Down to low-rank coordinates and back. Without sides it is the identity: an unprojected parameter."""

    sides: tuple[str, ...] = ()
    rank: int = 0

    @classmethod
    def for_weight(cls, side: str, rank: int, shape: torch.Size) -> Projection:
        """The projection of a weight (m, n); a rank beyond min(m, n) becomes min(m, n)."""
        return cls(projected_sides(side, shape), min(rank, *shape))

    def init_state(self, state: dict[str, Any], param: Tensor) -> None:
        """Zero bases in the weight's dtype, to be filled by the first refresh."""
        if LEFT in self.sides:
            state[LEFT] = param.new_zeros(param.shape[0], self.rank)
        if RIGHT in self.sides:
            state[RIGHT] = param.new_zeros(self.rank, param.shape[1])

    def bases(self, state: dict[str, Any]) -> Bases:
        """The stored bases themselves."""
        return {side: state[side] for side in self.sides}

    def low_rank_shape(self, shape: torch.Size) -> torch.Size:
        """Of R, for a weight of `shape`."""
        if not self.sides:
            return shape
        m, n = shape
        return torch.Size((self.rank if LEFT in self.sides else m, self.rank if RIGHT in self.sides else n))

    def down(self, bases: Bases, grad: Tensor) -> Tensor:
        """Project: (m, n) -> the shape of R."""
        if LEFT in bases:
            grad = bases[LEFT].T @ grad
        return grad @ bases[RIGHT].T if RIGHT in bases else grad

    def up(self, bases: Bases, update: Tensor) -> Tensor:
        """Project back: the shape of R -> (m, n)."""
        if LEFT in bases:
            update = bases[LEFT] @ update
        return update @ bases[RIGHT] if RIGHT in bases else update

    def add_back(self, param: Tensor, bases: Bases, update: Tensor, factor: float) -> None:
        """param += factor * (update projected back), without forming the full-size update."""
        if RIGHT in bases:
            update = bases[LEFT] @ update if LEFT in bases else update
            param.addmm_(update, bases[RIGHT], alpha=factor)
        elif LEFT in bases:
            param.addmm_(bases[LEFT], update, alpha=factor)
        else:
            param.add_(update, alpha=factor)

    def carry_over(self, moment: Tensor, old: Bases, new: Bases) -> Tensor:
        """A moment in the old bases' coordinates, projected into the new ones (GoLore, arXiv 2410.11289).

        Left: P_newᵀ (P_old M); right: (M Q_old) Q_newᵀ. In float32 at least, in the shape and dtype of `moment`.
        """
        wide = torch.promote_types(moment.dtype, torch.float32)
        carried = moment.to(wide)
        if LEFT in old:
            carried = (new[LEFT].to(wide).T @ old[LEFT].to(wide)) @ carried  # (r, r) @ (r, ...)
        if RIGHT in old:
            carried = carried @ (old[RIGHT].to(wide) @ new[RIGHT].to(wide).T)  # (..., r) @ (r, r)
        return carried.to(moment.dtype)


def overlap(old: Bases, new: Bases) -> Tensor:
    """‖P_newᵀ P_old‖² / r, averaged over the sides: 1 for the same subspace, r/m on average for unrelated ones."""
    shares = []
    for side, basis in new.items():
        inner = basis.T @ old[side] if side == LEFT else basis @ old[side].T  # (r, r)
        shares.append(inner.float().square().sum() / inner.shape[0])
    return torch.stack(shares).mean()
