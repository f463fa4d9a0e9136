"""RACS: scales of a gradient, tiny gradients, zeros."""

import pytest
import torch
from projection_helpers import parameter, set_gradients
from torch import nn

from peft_pretraining.optim import Racs


def test_a_gradient_of_rank_one_becomes_signs():
    """|G_ij| = u_i v_j has scales u_i² v_j², up to a factor that the two share."""
    rows, columns = torch.tensor([1.0, 2.0, -4.0]), torch.tensor([3.0, -1.0])
    weight = nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
    optimizer = Racs([weight], lr=1.0, scale=1.0, beta=0.0)
    weight.grad = torch.outer(rows, columns).double()
    optimizer.step()
    step = -weight.detach()
    torch.testing.assert_close(step.sign(), weight.grad.sign())
    torch.testing.assert_close(step.abs(), step.abs().mean().expand(3, 2))


@pytest.mark.parametrize("size", [1e-14, 1e-6, 1e6])
def test_the_size_of_gradients_does_not_matter(size):
    """Squares of squares of 1e-14 are no float32 numbers."""
    weights = [nn.Parameter(parameter((6, 4)).detach().float()) for _ in range(2)]
    for weight, factor in zip(weights, (1.0, size), strict=True):
        optimizer = Racs([weight], lr=0.02)
        for step in range(4):
            set_gradients([weight], step)
            weight.grad *= factor
            optimizer.step()
    torch.testing.assert_close(*weights, atol=1e-5, rtol=0)


def test_gradients_of_zeros_leave_the_scales():
    weight = parameter((6, 4))
    optimizer = Racs([weight], lr=0.02)
    kept, moves = [], []
    for step in range(6):
        before = weight.detach().clone()
        set_gradients([weight], step)
        if step in (0, 3):
            weight.grad.zero_()
        optimizer.step()
        kept.append(optimizer.state[weight]["row_scale"].clone())
        moves.append(float((weight.detach() - before).norm()))
    assert not kept[0].any() and torch.equal(kept[3], kept[2]) and not torch.equal(kept[4], kept[3])
    assert moves[0] == moves[3] == 0 and min(moves[1], moves[2], moves[4], moves[5]) > 1e-4
    assert all(value.isfinite().all() for value in optimizer.state[weight].values())
