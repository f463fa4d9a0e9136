"""Basis rules: the low-rank subspace in which a weight's gradient is seen.

A weight W (m, n) is projected from the left by a basis P (m, r), R = Pᵀ G (r, n), from the right by Q (r, n),
R = G Qᵀ (m, r), or from both, R = Pᵀ G Qᵀ (r, r). Bases are orthonormal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LEFT, RIGHT = "left_basis", "right_basis"
"""Keys of P (m, r) and Q (r, n) in a parameter's optimizer state."""

Bases = dict[str, Tensor]


def projected_sides(proj_type: str, shape: torch.Size) -> tuple[str, ...]:
    """Which bases a weight of this shape has. Decided once from the weight's shape, never from that of R.

    `std` (GaLore, arXiv 2403.03507, section 3.3) projects the shorter side away from the moments: right if m >= n.
    """
    tall = shape[0] >= shape[1]
    sides = {
        "std": (RIGHT,) if tall else (LEFT,),
        "reverse_std": (LEFT,) if tall else (RIGHT,),
        "left": (LEFT,),
        "right": (RIGHT,),
        "full": (LEFT, RIGHT),
    }
    if proj_type not in sides:
        raise ValueError(f"proj_type must be one of {', '.join(sides)}, got {proj_type!r}")
    return sides[proj_type]


@dataclass(frozen=True)
class SVDBasis:
    """GaLore's rule: the top singular vectors of the current gradient (arXiv 2403.03507, algorithm 2)."""

    sides: tuple[str, ...]
    rank: int

    @classmethod
    def for_weight(cls, proj_type: str, rank: int, shape: torch.Size) -> SVDBasis:
        return cls(projected_sides(proj_type, shape), min(rank, *shape))

    def init_state(self, state: dict[str, Any], param: Tensor) -> None:
        """Zero bases, to be filled by the first refresh, and zeros in the shape of R for whoever needs it."""
        m, n = param.shape
        if LEFT in self.sides:
            state[LEFT] = param.new_zeros(m, self.rank)
        if RIGHT in self.sides:
            state[RIGHT] = param.new_zeros(self.rank, n)

    def bases(self, state: dict[str, Any]) -> Bases:
        """The stored bases themselves."""
        return {side: state[side] for side in self.sides}

    def low_rank_shape(self, shape: torch.Size) -> tuple[int, int]:
        m, n = shape
        return (self.rank if LEFT in self.sides else m, self.rank if RIGHT in self.sides else n)

    def refreshed(self, old: Bases, grad: Tensor, first: bool) -> Bases:
        """New bases for a finite `grad` (m, n), in its dtype; nothing is stored.

        Signs of singular vectors are arbitrary, but the moments outlive a refresh, so each vector is turned towards the
        old one of the same index. The first ones get a positive largest entry. So runs agree across ranks and devices.
        """
        left, right = _top_singular_vectors(grad, self.rank)  # (m, r), (r, n)
        new: Bases = {}
        if LEFT in self.sides:
            new[LEFT] = _with_signs(left, None if first else old[LEFT], dim=0).to(grad.dtype)
        if RIGHT in self.sides:
            new[RIGHT] = _with_signs(right, None if first else old[RIGHT], dim=1).to(grad.dtype)
        return new

    def down(self, bases: Bases, grad: Tensor) -> Tensor:
        """Project: (m, n) -> the shape of R."""
        if LEFT in bases:
            grad = bases[LEFT].T @ grad
        return grad @ bases[RIGHT].T if RIGHT in bases else grad

    def add_back(self, param: Tensor, bases: Bases, update: Tensor, factor: float) -> None:
        """param += factor * (update projected back), without forming the full-size update where one product does."""
        if LEFT in bases and RIGHT in bases:
            param.addmm_(bases[LEFT] @ update, bases[RIGHT], alpha=factor)
        elif LEFT in bases:
            param.addmm_(bases[LEFT], update, alpha=factor)
        else:
            param.addmm_(update, bases[RIGHT], alpha=factor)


def _top_singular_vectors(grad: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U (m, r) and Vᵀ (r, n), in float64 for a float64 gradient and in float32 otherwise (bf16 has no SVD)."""
    matrix = grad if grad.dtype == torch.float64 else grad.float()
    try:
        u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # a device's routine may fail to converge where LAPACK in float64 does not
        u, _, vt = torch.linalg.svd(matrix.cpu().double(), full_matrices=False)
        u, vt = u.to(matrix), vt.to(matrix)
    return u[:, :rank], vt[:rank]


def _with_signs(vectors: Tensor, old: Tensor | None, dim: int) -> Tensor:
    """Turn each vector (along `dim`) towards the old one; without an old one make its largest entry positive."""
    if old is None:
        score = vectors.gather(dim, vectors.abs().argmax(dim, keepdim=True))
    else:
        score = (vectors * old.to(vectors.dtype)).sum(dim, keepdim=True)
    return torch.where(score < 0, -vectors, vectors)
