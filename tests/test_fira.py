"""Fira: limits."""

import pytest
import torch
from projection_helpers import parameter, set_gradients

from peft_pretraining.optim import Fira


def differences(one, other, shape, updates=6):
    """How far apart two optimizers' weights are after each update, over how far they moved."""
    weights = [parameter(shape), parameter(shape)]
    optimizers = [make([weight]) for make, weight in zip((one, other), weights, strict=True)]
    start, found = weights[0].detach().clone(), []
    for step in range(updates):
        for weight, optimizer in zip(weights, optimizers, strict=True):
            set_gradients([weight], step)
            optimizer.step()
        apart = (weights[0] - weights[1]).norm() / (weights[0] - start).norm()
        found.append(float(apart.detach()))
    return found


def test_both_residuals_are_one_at_a_scale_of_one():
    def make(residual, scale):
        return lambda params: Fira(params, rank=2, update_proj_gap=2, scale=scale, residual=residual)

    assert max(differences(make("code", 1.0), make("orthogonal", 1.0), (6, 4))) == 0
    assert min(differences(make("code", 0.25), make("orthogonal", 0.25), (6, 4))) > 0.05


def test_a_gradient_of_zeros_freezes_nothing():
    weight = parameter((6, 4))
    optimizer = Fira([weight], lr=0.01, rank=2)
    moves = []
    for step in range(6):
        before = weight.detach().clone()
        set_gradients([weight], step)
        if step in (0, 3):
            weight.grad.zero_()
        optimizer.step()
        moves.append(float((weight.detach() - before).norm()))
    assert moves[0] == 0 and all(torch.tensor(moves).isfinite())
    assert min(moves[step] for step in (1, 2, 4, 5)) > 1e-3


def test_an_unknown_residual_is_refused():
    with pytest.raises(ValueError, match="residual must be one of code, orthogonal, got 'paper'"):
        Fira([parameter((4, 4))], residual="paper")
