"""Methods in the limits in which they are others, or AdamW: exactly, up to the rounding of float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from projection_helpers import parameter, set_gradients
from torch import Tensor, nn

from peft_pretraining.optim import (
    RMNP,
    AdamMini,
    Apollo,
    Fira,
    Foam,
    Frugal,
    LowRankOptimizer,
    Muon,
    NorMuon,
    Scale,
    StableSPAM,
)

Build = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
UPDATES = 7
NO_EPS = 1e-14
"""Where two formulas add ε at different places."""


def side_by_side(one: Build, other: Build, shape: tuple[int, int]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What two optimizers add to the same weight in each of their updates, and the gradient, which is the same."""
    weights = [parameter(shape), parameter(shape)]
    optimizers = [build([weight]) for build, weight in zip((one, other), weights, strict=True)]
    for step in range(UPDATES):
        before = [weight.detach().clone() for weight in weights]
        for weight, optimizer in zip(weights, optimizers, strict=True):
            set_gradients([weight], step)
            optimizer.step()
        moves = [weight.detach() - start for weight, start in zip(weights, before, strict=True)]
        assert min(move.abs().max() for move in moves) > 1e-6
        yield moves[0], moves[1], weights[0].grad


def assert_same_moves(one: Build, other: Build, shape: tuple[int, int], atol: float = 1e-13) -> None:
    for move, expected, _ in side_by_side(one, other, shape):
        torch.testing.assert_close(move, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_apollos_channels_have_adams_norms_where_the_identity_projects(shape):
    """Before the limiter; and each channel is the gradient's, times a factor."""
    axis, settings = (1 if shape[0] >= shape[1] else 0), {"lr": 0.01, "eps": NO_EPS}

    def apollo(params):
        return Apollo(params, rank=4, projections=[torch.eye(4)], norm_growth=1e9, **settings)

    for move, of_adam, grad in side_by_side(apollo, lambda params: torch.optim.Adam(params, **settings), shape):
        torch.testing.assert_close(move.norm(dim=axis), of_adam.norm(dim=axis), rtol=1e-6, atol=0)
        factors = move / grad
        torch.testing.assert_close(factors, factors.mean(dim=axis, keepdim=True).expand(shape), rtol=1e-9, atol=0)


@pytest.mark.parametrize("scale", ["match_rms", "spectral"])
def test_normuon_without_memory_is_muon_with_normalised_rows(scale):
    settings = {"lr": 0.01, "weight_decay": 0}

    def normuon(params):
        return NorMuon(params, scale=scale, neuron_beta2=0.0, **settings)

    for move, of_muon, _ in side_by_side(normuon, lambda params: Muon(params, scale="spectral", **settings), (6, 4)):
        rows = nn.functional.normalize(of_muon, dim=1)
        size = of_muon.norm() if scale == "spectral" else 0.01 * 0.2 * math.sqrt(6 * 4)
        torch.testing.assert_close(move, rows * size / rows.norm(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_orthogonal_fira_of_full_rank_is_galores_adamw(shape):
    settings, projection = {"lr": 0.01, "weight_decay": 0.1}, {"rank": 9, "update_proj_gap": 3, "scale": 0.25}

    def galore(params):
        return LowRankOptimizer([{"params": params, **projection}], eps=1e-6, **settings)

    assert_same_moves(lambda params: Fira(params, residual="orthogonal", **projection, **settings), galore, shape)


@pytest.mark.parametrize("second", ["mean_of_squares", "square_of_mean"])
def test_foam_without_folding_is_adam_times_alpha(second):
    def adam(params):
        return LowRankOptimizer([{"params": params, "rule": "adamw"}], lr=0.01, eps=1e-3)

    def foam(params):
        return Foam(params, lr=0.04, level=0, scale=0.25, eps=1e-3, second=second)

    assert_same_moves(foam, adam, (6, 5))


class Restarted:
    """An optimizer that begins anew every three updates."""

    def __init__(self, build: Callable[[], torch.optim.Optimizer]):
        self._build, self._updates = build, 0

    def step(self) -> None:
        if self._updates % 3 == 0:
            self._optimizer = self._build()
        self._updates += 1
        self._optimizer.step()


@pytest.mark.parametrize("space", ["blocks", "columns", "rows", "svd"])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_frugal_with_a_density_of_one_is_adamw_with_restarts(space, shape):
    """In the basis of the gradient at each restart, where that is what chooses the part: then no sign is outside, not
    even of rounding noise."""
    settings = {"lr": 0.01, "weight_decay": 0 if space == "svd" else 0.1, "eps": NO_EPS}

    def adamw(params):
        if space == "svd":
            group = {"params": params, "rank": 4, "update_proj_gap": 0}
            return Restarted(lambda: LowRankOptimizer([group], **settings))
        return Restarted(lambda: torch.optim.AdamW(params, **settings))

    assert_same_moves(
        lambda params: Frugal(params, space=space, density=1.0, update_proj_gap=3, **settings), adamw, shape, 1e-9
    )


@pytest.mark.parametrize(("blocks", "heads"), [("rows", None), ("heads", 7)])
def test_adam_mini_with_one_element_for_each_block_is_adamw(blocks, heads):
    settings = {"lr": 0.01, "weight_decay": 0.1}

    def adamw(params):
        return torch.optim.AdamW(params, **settings)

    assert_same_moves(lambda params: AdamMini(params, blocks=blocks, heads=heads, **settings), adamw, (7, 1))


def test_stable_spam_without_memory_feeds_adam_gradients_of_norm_one():
    """Neither of norms nor of largest entries, and without restarts."""
    settings = {"lr": 0.01, "weight_decay": 0, "eps": NO_EPS}

    class Adam(torch.optim.AdamW):
        def step(self):
            (weight,) = self.param_groups[0]["params"]
            weight.grad /= weight.grad.norm()
            super().step()

    def spam(params):
        return StableSPAM(params, gamma1=0.0, gamma2=0.0, theta=0.0, gap=0, **settings)

    assert_same_moves(spam, lambda params: Adam(params, **settings), (6, 4), 1e-12)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_scale_and_rmnp_without_momentum_differ_by_a_factor(shape):
    m, n = shape
    factor, settings = math.sqrt(n) / math.sqrt(max(1, m / n)), {"lr": 0.01, "weight_decay": 0}

    def rmnp(params):
        return RMNP(params, momentum=0.0, **settings)

    for move, of_rmnp, _ in side_by_side(lambda params: Scale(params, **settings), rmnp, shape):
        torch.testing.assert_close(move, factor * of_rmnp, rtol=1e-12, atol=1e-15)
