"""Stable-SPAM: limits, zeros, resets. Golden numbers: test_golden_more_methods.py."""

import pytest
import torch
from projection_helpers import matrix, parameter, set_gradients
from torch import nn

from peft_pretraining.optim import StableSPAM


def test_a_spike_is_cut():
    moves = []
    for factor in (1.0, 1e4):
        weight = parameter((6, 4))
        optimizer = StableSPAM([weight], lr=0.01, gap=0)
        for step in range(6):
            before = weight.detach().clone()
            set_gradients([weight], step)
            if step == 3:
                weight.grad[2, 1] *= factor
            optimizer.step()
            moves.append((weight.detach() - before).norm())
    for calm, spiked in zip(moves[:6], moves[6:], strict=True):
        assert 0.5 * calm < spiked < 2 * calm


@pytest.mark.parametrize("zero", [0, 2])
def test_a_gradient_of_zeros_spoils_nothing(zero):
    weight = parameter((6, 4))
    optimizer = StableSPAM([weight], lr=0.01, gap=3)
    for step in range(8):
        before = weight.detach().clone()
        set_gradients([weight], step)
        if step == zero:
            weight.grad.zero_()
        optimizer.step()
        moved = (weight.detach() - before).norm()
        assert moved.isfinite() and (moved > 1e-3 or step == zero)


def test_moments_begin_anew_and_an_update_that_is_left_out_only_delays_it():
    """A reset is due in updates 2 and 5; update 5 has a gradient that is not finite."""
    weight = parameter((6, 4))
    optimizer = StableSPAM([weight], lr=0.01, gap=3)
    since = []
    for step in range(8):
        set_gradients([weight], step)
        if step == 5:
            weight.grad[0, 0] = torch.nan
        optimizer.begin_update(step)
        if bool(optimizer.grad_norm().isfinite()):
            optimizer.step()
        since.append(int(optimizer.state[weight]["since_reset"]))
    assert since == [1, 2, 1, 2, 3, 3, 1, 2]
    assert int(optimizer.state[weight]["step"]) == 7


def test_betas_fall_over_the_run_and_no_further():
    states = []
    for total in (None, 2):
        weight = nn.Parameter(matrix((4, 3)))
        optimizer = StableSPAM([weight], gap=0, total=total)
        for step in range(6):
            set_gradients([weight], step)
            optimizer.step()
        states.append(optimizer.state[weight]["exp_avg"].norm())
        fades = [optimizer.objects(weight).rule._fade(_at(step)) for step in range(6)]
        assert fades == ([1.0] * 6 if total is None else pytest.approx([0.875, 0.625, 0.5, 0.5, 0.5, 0.5]))
    assert states[0] != states[1]


def _at(step):
    from types import SimpleNamespace

    return SimpleNamespace(step=step)


def test_vectors_and_scalars_are_trained_alike():
    model = nn.ModuleDict({"linear": nn.Linear(3, 4), "norm": nn.LayerNorm(3)})
    optimizer = StableSPAM.from_model(model, lr=0.01)
    sum(param.square().sum() for param in model.parameters()).backward()
    optimizer.step()
    assert {group["rule"] for group in optimizer.param_groups} == {"stable_spam"}


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="theta must be at least 0 and below 1, got 1"):
        StableSPAM([parameter((4, 4))], theta=1)
    with pytest.raises(ValueError, match="gap must be at least 0, got -1"):
        StableSPAM([parameter((4, 4))], gap=-1)
