"""Alice: the basis at a refresh, Alice-0, zeros."""

import pytest
import torch
from projection_helpers import parameter, set_gradients
from torch import nn

from peft_pretraining.methods.alice.subspace import TRACKED, TrackedSubspace
from peft_pretraining.optim import Alice, Refresh
from peft_pretraining.optim.tensors.collectives import phases, run


def refresh_of(grad, number, rank=4, bases=None, tracked=None):
    rule = TrackedSubspace(leading=2, beta3=0.9)
    projection = rule.projection({"rank": rank}, grad.shape)
    side = projection.sides[0]
    bases = projection.new_bases(grad) if bases is None else {side: bases}
    state = {} if tracked is None else {TRACKED: tracked}
    refresh = Refresh(0, number, 0, "weight", grad, projection, bases, state)
    (found,) = run(phases(rule.compute_bases([refresh])))
    return found[side]


def orthonormal(basis):
    identity = torch.eye(basis.shape[1], dtype=basis.dtype)
    torch.testing.assert_close(basis.T @ basis, identity, atol=1e-12, rtol=0)


def gradient(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_first_basis_is_of_the_gradient():
    grad = gradient((8, 12))
    vectors = torch.linalg.svd(grad)[0][:, :4]
    basis = refresh_of(grad, 0)
    torch.testing.assert_close((vectors.T @ basis).abs(), torch.eye(4, dtype=torch.float64), atol=1e-10, rtol=0)
    torch.testing.assert_close(refresh_of(grad.T.contiguous(), 0).T, basis, atol=1e-12, rtol=0)


@pytest.mark.parametrize("rank", [4, 6, 8])
def test_a_later_basis_keeps_leading_vectors_and_draws_the_others(rank):
    """From the complement of all r, or, where that is too small, of the two that are kept."""
    grad, generator = gradient((8, 12)), torch.Generator().manual_seed(1)
    old = torch.linalg.qr(torch.randn(8, rank, generator=generator, dtype=torch.float64))[0]
    half = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
    tracked = half @ half.T
    basis = refresh_of(grad, 3, rank, old, tracked)
    orthonormal(basis)
    z = 0.9 * old @ tracked @ old.T + 0.1 * grad @ grad.T
    y = torch.linalg.qr(z @ old)[0]
    turned = y @ torch.linalg.eigh(y.T @ z @ y)[1].flip(1)
    overlap = (turned[:, :2].T @ basis[:, :2]).abs()
    torch.testing.assert_close(overlap, torch.eye(2, dtype=torch.float64), atol=1e-10, rtol=0)
    beyond = turned if 8 - rank >= rank - 2 else turned[:, :2]
    assert (beyond.T @ basis[:, 2:]).abs().max() < 1e-10
    torch.testing.assert_close(refresh_of(grad, 3, rank, old, tracked), basis, atol=0, rtol=0)
    others = [refresh_of(grad, number, rank, old, tracked) for number in range(4, 9)]
    assert any((other - basis).abs().max() > 1e-3 for other in others), "other refreshes draw others"


def test_alice_0_tracks_nothing():
    for beta3, keys in ((0.999, {TRACKED}), (0.0, set())):
        weight = parameter((6, 8))
        optimizer = Alice([weight], rank=3, leading=1, update_proj_gap=2, beta3=beta3)
        for step in range(5):
            set_gradients([weight], step)
            optimizer.step()
        assert {TRACKED} & optimizer.state[weight].keys() == keys
        assert weight.isfinite().all()


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)])
def test_with_everything_inside_nothing_is_compensated(shape):
    weights = [parameter(shape), parameter(shape)]
    for weight, compensation in zip(weights, (0.0, 1.0), strict=True):
        optimizer = Alice([weight], rank=9, leading=9, compensation=compensation)
        for step in range(4):
            set_gradients([weight], step)
            optimizer.step()
    torch.testing.assert_close(*weights, atol=0, rtol=0)


def test_a_gradient_of_zeros_spoils_nothing():
    weight = parameter((4, 6))
    optimizer = Alice([weight], rank=2, leading=1)
    start = weight.detach().clone()
    for step in range(5):
        set_gradients([weight], step)
        if step in (0, 3):
            weight.grad.zero_()
        optimizer.step()
        if step == 0:
            assert torch.equal(weight.detach(), start)
    assert all(value.isfinite().all() for value in optimizer.state[weight].values())
    assert (weight.detach() - start).norm() > 1e-2


def test_the_energy_outside_decays_as_the_first_moment():
    """By the formulas, with a basis that is given and both decays apart."""
    weight, basis = parameter((6, 8)), torch.linalg.qr(gradient((6, 6), seed=3))[0][:, :2]
    optimizer = Alice([weight], lr=0.1, rank=2, scale=1.0, betas=(0.5, 0.99), norm_growth=1e9, bases=[basis])
    first, second, energy, expected = 0.0, 0.0, 0.0, weight.detach().clone()
    for step in range(4):
        set_gradients([weight], step)
        grad = weight.grad.clone()
        inside = basis.T @ grad
        first, second = 0.5 * first + 0.5 * inside, 0.99 * second + 0.01 * inside**2
        energy = 0.5 * energy + 0.5 * (grad.square().sum(0) - inside.square().sum(0))
        outside = 2 * (grad - basis @ inside) / energy.sqrt()  # √(m-r) = 2
        expected -= 0.1 * (basis @ (first / (second.sqrt() + 1e-8)) + 0.4 * outside)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank_of_gradient", [1, 3])
def test_rounding_outside_the_subspace_is_not_made_larger(rank_of_gradient, dtype):
    """Gradients of few tokens have no part outside: what is computed of it must not move the weight."""
    weight = parameter((8, 12), dtype=dtype)
    start, left = weight.detach().clone(), gradient((8, rank_of_gradient)).to(dtype)
    optimizer = Alice([weight], rank=3, leading=1)
    for step in range(5):
        weight.grad = 1e-2 * left @ gradient((rank_of_gradient, 12), seed=step).to(dtype)
        optimizer.step()
    assert 1e-3 < (weight.detach() - start).abs().max() < 0.2


def test_square_matrices_are_projected_from_the_left():
    weight = nn.Parameter(torch.ones(5, 5))
    assert "left_basis" in Alice([weight], rank=2).state[weight]
