"""Alice's basis: leading directions of what was seen so far, and others drawn from what it leaves out.

At a refresh, with the basis U (m, r) in use, Q̃ the running mean of σσᵀ in it, and the first refresh taking the top
eigenvectors of GGᵀ (arXiv 2502.07752, subspace switching):

    Z = β3 U Q̃ Uᵀ + (1-β3) G Gᵀ                               (m, m)
    Y = qr(Z U),  U' = Y (eigenvectors of Yᵀ Z Y, descending)    (m, r), one step of subspace iteration
    the first l columns of U', and r - l drawn without replacement from an orthonormal basis of the complement of all r
    (of the l kept ones, where that is too small)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peft_pretraining.distributed.sharding import ShardInfo
from peft_pretraining.optim import BasisRule, Collective, Phases, Refresh
from peft_pretraining.optim.basis.basis_rule import NewBases, attempt
from peft_pretraining.optim.basis.svd import gram_eigenvectors, short_gram, with_signs
from peft_pretraining.optim.tensors.collectives import in_lots
from peft_pretraining.optim.tensors.projection import LEFT, RIGHT, Bases, Projection

TRACKED = "tracked_gram"
"""Q̃ (r, r) in a parameter's state, which the update rule keeps."""
_NUMBERS_AT_ONCE = 2**22
"""Of the Gram matrices that devices add up by one call: 32 MB in float64."""


class TrackedSubspace(BasisRule):
    """`leading` columns are kept at a refresh, `beta3` weighs what was tracked. `given` are bases to take instead, one
    for each refresh."""

    def __init__(self, leading: int = 40, beta3: float = 0.999, given: Sequence[Tensor] = ()):
        self._leading, self._beta3, self._given = leading, beta3, given

    def projection(self, group: dict[str, Any], shape: torch.Size | ShardInfo) -> Projection:
        """From the left if m <= n: square matrices, too."""
        m, n = shape.shape if isinstance(shape, ShardInfo) else shape
        return Projection.for_weight("left" if m <= n else "right", group["rank"], shape)

    def compute_bases(self, refreshes: Sequence[Refresh]) -> Phases[list[NewBases]]:
        if self._given:
            return [{_side(refresh): self._given[refresh.number]} for refresh in refreshes]
        found: list[NewBases] = []
        for lot in in_lots(refreshes, lambda refresh: min(refresh.projection.shard.shape) ** 2, _NUMBERS_AT_ONCE):
            grams = []
            for refresh in lot:
                if refresh.projection.shards_projected_side:
                    (grad,) = yield [Collective(refresh.grad, refresh.projection.shard, "whole")]
                    grams.append(Collective(short_gram(grad, _side(refresh)), ShardInfo(grad.shape)))
                else:
                    grams.append(Collective(short_gram(refresh.grad, _side(refresh)), refresh.projection.shard))
            whole = yield grams
            found += [attempt(partial(self._basis, refresh, gram)) for refresh, gram in zip(lot, whole, strict=True)]
        return found

    def _basis(self, refresh: Refresh, gram: Tensor) -> Bases:
        """From GGᵀ (m, m), in float64. Raises `LinAlgError`."""
        side, rank = _side(refresh), refresh.projection.rank
        if not refresh.number:
            new = gram_eigenvectors(gram, rank, side, refresh.grad.dtype)[side]
            return {side: with_signs(new, None, dim=0 if side == LEFT else 1)}
        old = refresh.bases[side].to(gram)
        old = old if side == LEFT else old.T  # (m, r)
        vectors = with_signs(self._explored(refresh, self._iterated(refresh, gram, old)), old, dim=0)
        vectors = vectors.to(torch.promote_types(refresh.grad.dtype, torch.float32))
        return {side: vectors if side == LEFT else vectors.T}

    def _iterated(self, refresh: Refresh, gram: Tensor, old: Tensor) -> Tensor:
        """U' (m, r), by falling eigenvalues."""
        tracked = refresh.state[TRACKED].to(gram) if self._beta3 else old.new_zeros(old.shape[1], old.shape[1])

        def through_z(vectors: Tensor) -> Tensor:
            seen = old @ (tracked @ (old.T @ vectors))
            return self._beta3 * seen + (1 - self._beta3) * (gram @ vectors)

        basis = torch.linalg.qr(through_z(old))[0]
        turned: Tensor = basis @ torch.linalg.eigh(basis.T @ through_z(basis))[1].flip(1)
        return turned

    def _explored(self, refresh: Refresh, vectors: Tensor) -> Tensor:
        """The leading columns of U', and as many drawn ones as are missing."""
        rows, rank = vectors.shape
        leading = min(self._leading, rank)
        drawn, apart = rank - leading, rank if rows - rank >= rank - leading else leading
        if not drawn:
            return vectors
        complement = torch.linalg.qr(vectors[:, :apart], mode="complete")[0][:, apart:]
        order = torch.randperm(rows - apart, generator=refresh.generator("explored directions"))[:drawn]
        return torch.cat([vectors[:, :leading], complement[:, order.to(complement.device)]], dim=1)


def _side(refresh: Refresh) -> str:
    (side,) = refresh.projection.sides
    assert side in (LEFT, RIGHT)
    return side
