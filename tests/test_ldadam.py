"""LDAdam: error feedback, the moving subspace, zeros."""

import pytest
import torch
from projection_helpers import parameter, set_gradients
from torch import nn

from peft_pretraining.optim import LDAdam


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)])
def test_nothing_is_lost_with_everything_inside(shape):
    weight = parameter(shape)
    optimizer = LDAdam([weight], lr=0.01, rank=9)
    for step in range(4):
        set_gradients([weight], step)
        optimizer.step()
        assert optimizer.state[weight]["error"].abs().max() < 1e-12
    assert optimizer.state[weight]["exp_avg"].shape == (min(shape), max(shape))


def test_what_is_lost_is_fed_back():
    """The error and the part inside are the gradient and the error before, in the first update."""
    weight = parameter((4, 6))
    optimizer = LDAdam([weight], lr=0.01, rank=2)
    set_gradients([weight], 0)
    optimizer.step()
    state, grad = optimizer.state[weight], weight.grad
    inside = state["basis"] @ (state["basis"].T @ grad)
    torch.testing.assert_close(state["error"], grad - inside)
    assert state["error"].norm() > 0.1 * grad.norm()
    plain = LDAdam([nn.Parameter(torch.ones(4, 6))], rank=2, error_feedback=False)
    assert "error" not in plain.state[plain.param_groups[0]["params"][0]]


def test_gradients_of_others_hands_do_not_reach_the_error():
    """Zeroed between updates, as every loop does: the trajectory is that of fresh gradients."""
    weights = [parameter((6, 4)), parameter((6, 4))]
    for weight, to_none in zip(weights, (True, False), strict=True):
        optimizer = LDAdam([weight], lr=0.01, rank=2)
        for step in range(5):
            set_gradients([weight], step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
    assert torch.equal(*weights)


@pytest.mark.parametrize("zero", [(0,), (0, 1), (2,)])
def test_gradients_of_zeros_spoil_nothing(zero):
    weight = parameter((4, 6))
    start, optimizer = weight.detach().clone(), LDAdam([weight], lr=0.01, rank=2)
    for step in range(6):
        set_gradients([weight], step)
        if step in zero:
            weight.grad.zero_()
        optimizer.step()
    basis = optimizer.state[weight]["basis"]
    torch.testing.assert_close(basis.T @ basis, torch.eye(2, dtype=basis.dtype), atol=1e-12, rtol=0)
    assert weight.isfinite().all() and (weight.detach() - start).norm() > 1e-2


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        LDAdam([parameter((4, 4))], rank=0)
