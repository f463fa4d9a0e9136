"""Bases that singular vectors or random draws give: GaLore's, GoLore's, and an ablation of Online Subspace Descent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from peft_pretraining.distributed.sharding import ShardInfo
from peft_pretraining.optim.basis_rule import BasisRule, NewBases, Refresh, attempt
from peft_pretraining.optim.collectives import Collective, Phases, phases, together
from peft_pretraining.optim.projection import LEFT, RIGHT, Bases
from peft_pretraining.optim.svd import (
    SVD_METHODS,
    gram_eigenvectors,
    random_stiefel,
    short_gram,
    top_singular_vectors,
    with_signs,
)


class SVDBasis(BasisRule):
    """GaLore's rule: the top singular vectors of the current gradient (arXiv 2403.03507, algorithm 2)."""

    def __init__(self, svd_method: str = "gram"):
        if svd_method not in SVD_METHODS:
            raise ValueError(f"svd_method must be one of {', '.join(SVD_METHODS)}, got {svd_method!r}")
        self.svd_method = svd_method

    def compute_bases(self, refreshes: Sequence[Refresh]) -> Phases[list[NewBases]]:
        answers = yield [self._needed(refresh) for refresh in refreshes]
        return [
            attempt(lambda refresh=refresh, answer=answer: self._vectors(refresh, answer))  # type: ignore[misc]
            for refresh, answer in zip(refreshes, answers, strict=True)
        ]

    def compute_basis(self, refresh: Refresh) -> Bases:
        return self._vectors(refresh, refresh.grad)

    def _adds_up_grams(self, refresh: Refresh) -> bool:
        """Whether devices add up their Gram matrices of the shorter side, instead of gathering the gradient."""
        projection, shard = refresh.projection, refresh.projection.shard
        return (
            shard.dim is not None
            and self.svd_method == "gram"
            and projection.sides == (_short_side(shard.shape),)
            and not projection.shards_projected_side
        )

    def _needed(self, refresh: Refresh) -> Collective:
        shard = refresh.projection.shard
        if self._adds_up_grams(refresh):
            return Collective(short_gram(refresh.grad, _short_side(shard.shape)), shard)
        return Collective(refresh.grad, shard, "whole")

    def _vectors(self, refresh: Refresh, answer: Tensor) -> Bases:
        """From the whole gradient, or from the whole Gram matrix."""
        sides, rank = refresh.projection.sides, refresh.projection.rank
        start = refresh.bases if refresh.number else {}
        if self._adds_up_grams(refresh):
            new = gram_eigenvectors(answer, rank, sides[0], refresh.grad.dtype)
        else:
            new = top_singular_vectors(answer, rank, sides, self.svd_method, start, refresh.generator("sketch"))
        return {side: with_signs(new[side], start.get(side), dim=0 if side == LEFT else 1) for side in sides}


def _short_side(shape: torch.Size) -> str:
    return RIGHT if shape[0] >= shape[1] else LEFT


class RandomBasis(BasisRule):
    """GoLore's rule: bases uniform on the Stiefel manifold, independent of the gradient (arXiv 2410.11289)."""

    carries_momentum = True

    def reads_gradient(self, step: int) -> bool:
        return False

    def compute_basis(self, refresh: Refresh) -> Bases:
        m, n = refresh.projection.shard.shape
        new: Bases = {}
        for side in refresh.projection.sides:
            rows, draws = m if side == LEFT else n, refresh.generator(f"random {side}")
            drawn = random_stiefel(rows, refresh.projection.rank, draws, refresh.grad.device)
            new[side] = drawn if side == LEFT else drawn.T
        return new


class SVDThenRandom(BasisRule):
    """GoLore: SVD at first, random from the update t on with t / num_training_steps >= rand_ratio (algorithm 1)."""

    carries_momentum = True

    def __init__(self, svd_method: str, rand_ratio: float, num_training_steps: int):
        self.rand_ratio, self.num_training_steps = rand_ratio, num_training_steps
        self._svd, self._random = SVDBasis(svd_method), RandomBasis()

    def reads_gradient(self, step: int) -> bool:
        # A ratio beyond 1 means never random, also in updates after the schedule's end.
        return self.rand_ratio > 1 or step / self.num_training_steps < self.rand_ratio

    def compute_bases(self, refreshes: Sequence[Refresh]) -> Phases[list[NewBases]]:
        rules = [self._svd if self.reads_gradient(refresh.step) else self._random for refresh in refreshes]
        jobs = [phases(rule.compute_bases([refresh])) for rule, refresh in zip(rules, refreshes, strict=True)]
        computed = yield from together(jobs)
        return [bases for (bases,) in computed]


class GaussianBasis(SVDBasis):
    """The top singular vectors of a fresh Gaussian matrix of the gradient's shape: the ablation `random` of Online
    Subspace Descent (arXiv 2408.12857). A random subspace, but, as in GaLore, the moments stay as they are."""

    def reads_gradient(self, step: int) -> bool:
        return False

    def compute_bases(self, refreshes: Sequence[Refresh]) -> Phases[list[NewBases]]:
        return (yield from super().compute_bases([_of_noise(refresh) for refresh in refreshes]))

    def compute_basis(self, refresh: Refresh) -> Bases:
        return super().compute_basis(_of_noise(refresh))


def _of_noise(refresh: Refresh) -> Refresh:
    """The refresh for a Gaussian matrix instead of the gradient, which every device has as a whole."""
    shape, draws = refresh.projection.shard.shape, refresh.generator("gaussian matrix")
    noise = torch.randn(shape, generator=draws, dtype=torch.float32).to(refresh.grad.device)
    return replace(refresh, grad=noise, projection=replace(refresh.projection, shard=ShardInfo(shape)))
