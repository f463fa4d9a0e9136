"""Bases that singular vectors or random draws give: GaLore's, GoLore's, and an ablation of Online Subspace Descent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peft_pretraining import rng
from peft_pretraining.distributed.sharding import ShardInfo
from peft_pretraining.optim.basis.basis_rule import BasisRule, NewBases, Refresh, attempt
from peft_pretraining.optim.basis.subspace_iteration import COLD_ROUNDS, WARM_ROUNDS, Iterate, iterate, other_sides
from peft_pretraining.optim.basis.svd import (
    OVERSAMPLING,
    SVD_METHODS,
    LinAlgError,
    gaussian,
    gram_eigenvectors,
    on_stiefel,
    short_gram,
    top_singular_vectors,
    with_signs,
)
from peft_pretraining.optim.tensors.collectives import Collective, Phases, in_lots, run
from peft_pretraining.optim.tensors.projection import LEFT, RIGHT, Bases
from peft_pretraining.runtime.threads import ahead, share_of_cores

_NUMBERS_AT_ONCE = 2**22
"""Of the Gram matrices that devices add up by one call: 32 MB in float64."""
_WORTH_ITERATING = 256
"""The shorter side of a matrix from which on `auto` iterates. The eigenvectors of smaller ones take no time."""
_WORTH_THREADS = 2**18
"""Random numbers that one thread draws in 4 ms."""


BASIS_METHODS = (*SVD_METHODS, "subspace", "auto")
"""Beside the decompositions of one matrix, subspace iteration of many, and what goes by their sizes."""


def check_method(svd_method: str) -> None:
    """Raises `ValueError` for a method that does not exist."""
    if svd_method not in BASIS_METHODS:
        raise ValueError(f"svd_method must be one of {', '.join(BASIS_METHODS)}, got {svd_method!r}")


class SVDBasis(BasisRule):
    """GaLore's rule: the top singular vectors of the current gradient (arXiv 2403.03507, algorithm 2)."""

    def __init__(self, svd_method: str = "gram"):
        check_method(svd_method)
        self.svd_method = svd_method

    def compute_bases(self, refreshes: Sequence[Refresh]) -> Phases[list[NewBases]]:
        found = yield from self._iterated([each for each in refreshes if self._method(each) == "subspace"])
        rest = [refresh for refresh in refreshes if id(refresh) not in found]
        added_up = [refresh for refresh in rest if self._adds_up_grams(refresh)]
        for lot in in_lots(added_up, _numbers_of_gram, _NUMBERS_AT_ONCE):
            grams = yield [Collective(_short_gram(refresh), refresh.projection.shard) for refresh in lot]
            for refresh, gram in zip(lot, grams, strict=True):
                found[id(refresh)] = attempt(partial(self._vectors, refresh, gram))
        for refresh in rest:
            if id(refresh) not in found:  # one at a time: no device has room for the gradients of all
                (grad,) = yield [Collective(refresh.grad, refresh.projection.shard, "whole")]
                found[id(refresh)] = attempt(partial(self._vectors, refresh, grad))
        return [found[id(refresh)] for refresh in refreshes]

    def compute_basis(self, refresh: Refresh) -> Bases:
        (found,) = run(SVDBasis.compute_bases(self, [refresh]))
        if isinstance(found, LinAlgError):
            raise found
        return found

    def _method(self, refresh: Refresh) -> str:
        """Of this matrix: `auto` is `gram`, as it always was, for small ones, and `subspace` for the others."""
        if self.svd_method != "auto":
            return self.svd_method
        return "gram" if min(refresh.projection.shard.shape) < _WORTH_ITERATING else "subspace"

    def _adds_up_grams(self, refresh: Refresh) -> bool:
        """Whether devices add up their Gram matrices of the shorter side, instead of gathering the gradient. So they do
        where subspace iteration has failed."""
        projection, shard = refresh.projection, refresh.projection.shard
        return (
            shard.dim is not None
            and self._method(refresh) in ("gram", "subspace")
            and projection.sides == (_short_side(shard.shape),)
            and not projection.shards_projected_side
        )

    def _vectors(self, refresh: Refresh, answer: Tensor) -> Bases:
        """From the whole gradient, or from the whole Gram matrix."""
        sides, rank, start = refresh.projection.sides, refresh.projection.rank, _start(refresh)
        method = "gram" if self._method(refresh) == "subspace" else self._method(refresh)
        if self._adds_up_grams(refresh):
            new = gram_eigenvectors(answer, rank, sides[0], refresh.grad.dtype)
        else:
            new = top_singular_vectors(answer, rank, sides, method, start, refresh.generator("sketch"))
        return _with_signs(refresh, new)

    def _iterated(self, refreshes: Sequence[Refresh]) -> Phases[dict[int, NewBases]]:
        """What subspace iteration finds, by the refresh's identity; nothing where it fails."""
        iterates = list(map(_iterate_of, refreshes, sketches(refreshes, _iterated_side, OVERSAMPLING)))
        well = yield from iterate(iterates, _NUMBERS_AT_ONCE)
        for refresh, each in zip(refreshes, iterates, strict=True):
            each.basis = each.basis[:, : refresh.projection.rank]
        both = [place for place, refresh in enumerate(refreshes) if len(refresh.projection.sides) > 1 and well[place]]
        known = sketches([refreshes[place] for place in both], _long_side)
        others = dict(zip(both, (yield from other_sides([iterates[place] for place in both], known)), strict=True))
        found: dict[int, NewBases] = {}
        for place, refresh in enumerate(refreshes):
            if well[place]:
                columns = {_iterated_side(refresh): iterates[place].basis}
                if place in others:
                    columns[_long_side(refresh)] = others[place]
                new = {side: basis if side == LEFT else basis.mT for side, basis in columns.items()}
                found[id(refresh)] = _with_signs(refresh, new)
        return found


def _start(refresh: Refresh) -> Bases:
    """The bases in use, if there are any."""
    return refresh.bases if refresh.number else {}


def _with_signs(refresh: Refresh, new: Bases) -> Bases:
    start = _start(refresh)
    return {side: with_signs(new[side], start.get(side), 0 if side == LEFT else 1) for side in refresh.projection.sides}


def _iterated_side(refresh: Refresh) -> str:
    """The side that has a basis, or of both the shorter one."""
    sides = refresh.projection.sides
    return sides[0] if len(sides) == 1 else _short_side(refresh.projection.shard.shape)


def _long_side(refresh: Refresh) -> str:
    return LEFT if _short_side(refresh.projection.shard.shape) == RIGHT else RIGHT


def _iterate_of(refresh: Refresh, basis: Tensor) -> Iterate:
    return Iterate(
        grad=refresh.grad,
        columns=_iterated_side(refresh) == RIGHT,
        shard=refresh.projection.shard,
        basis=basis,
        rank=refresh.projection.rank,
        rounds=WARM_ROUNDS if _start(refresh) else COLD_ROUNDS,
    )


def sketches(refreshes: Sequence[Refresh], side_of: Callable[[Refresh], str], more: int = 0) -> list[Tensor]:
    """Columns to begin from on one side of each: the basis in use, or the Q factor of Gaussian numbers with `more`
    columns, the same for all matrices of a shape, on all devices."""
    drawn: dict[tuple[Any, ...], Tensor] = {}

    def begin(refresh: Refresh) -> Tensor:
        side, dtype = side_of(refresh), torch.promote_types(refresh.grad.dtype, torch.float32)
        if side in (start := _start(refresh)):
            return (start[side] if side == LEFT else start[side].mT).to(dtype)
        rows = _rows(refresh, side)
        columns = min(refresh.projection.rank + more, rows)
        key = (refresh.seed, rows, columns, dtype, refresh.grad.device)
        if key not in drawn:
            generator = rng.generator(refresh.seed, f"sketch of {rows} x {columns}")
            numbers = torch.empty(rows, columns).normal_(generator=generator)
            drawn[key] = torch.linalg.qr(numbers.to(refresh.grad.device, dtype))[0]
        return drawn[key]

    return list(map(begin, refreshes))


def _numbers_of_gram(refresh: Refresh) -> int:
    return min(refresh.projection.shard.shape) ** 2


def _short_gram(refresh: Refresh) -> Tensor:
    """What this device adds to the Gram matrix of the shorter side."""
    return short_gram(refresh.grad, _short_side(refresh.projection.shard.shape))


def _short_side(shape: torch.Size) -> str:
    return RIGHT if shape[0] >= shape[1] else LEFT


class RandomBasis(BasisRule):
    """GoLore's rule: bases uniform on the Stiefel manifold, independent of the gradient (arXiv 2410.11289)."""

    carries_momentum = True

    def reads_gradient(self, step: int) -> bool:
        return False

    def compute_bases(self, refreshes: Sequence[Refresh]) -> list[NewBases]:
        """Draws in other threads, and decomposes on the device, one after the other, what has been drawn."""
        wanted = [(refresh, side) for refresh in refreshes for side in refresh.projection.sides]
        numbers = sum(_rows(*each) * each[0].projection.rank for each in wanted)
        if numbers <= _WORTH_THREADS:
            return [self.compute_basis(refresh) for refresh in refreshes]
        drawn = ahead(_gaussian, wanted, min(share_of_cores(), len(wanted)))
        return [
            {side: _random_basis(refresh, side, next(drawn)) for side in refresh.projection.sides}
            for refresh in refreshes
        ]

    def compute_basis(self, refresh: Refresh) -> Bases:
        return {side: _random_basis(refresh, side, _gaussian((refresh, side))) for side in refresh.projection.sides}


def _rows(refresh: Refresh, side: str) -> int:
    return refresh.projection.shard.shape[0 if side == LEFT else 1]


def _gaussian(wanted: tuple[Refresh, str]) -> Tensor:
    """What the basis of one side of one weight is made of."""
    refresh, side = wanted
    return gaussian(_rows(refresh, side), refresh.projection.rank, refresh.generator(f"random {side}"))


def _random_basis(refresh: Refresh, side: str, drawn: Tensor) -> Tensor:
    basis = on_stiefel(drawn, refresh.grad.device)
    return basis if side == LEFT else basis.T


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
        decomposed = [refresh for refresh in refreshes if self.reads_gradient(refresh.step)]
        found = iter((yield from self._svd.compute_bases(decomposed)))
        drawn = iter(self._random.compute_bases([each for each in refreshes if not self.reads_gradient(each.step)]))
        return [next(found if self.reads_gradient(refresh.step) else drawn) for refresh in refreshes]


class GaussianBasis(SVDBasis):
    """The top singular vectors of a fresh Gaussian matrix of the gradient's shape: the ablation `random` of Online
    Subspace Descent (arXiv 2408.12857). A random subspace, but, as in GaLore, the moments stay as they are."""

    def __init__(self, svd_method: str = "gram"):
        # Begun from the basis in use, an iteration would find one that is not independent of it.
        super().__init__("gram" if svd_method in ("auto", "subspace") else svd_method)

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
