"""What the methods of the library keep beside bfloat16 weights, and in which numbers they compute with it."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from projection_helpers import parameter, set_gradients, through_a_file
from torch import nn

from peft_pretraining import optim
from peft_pretraining.methods import METHODS

HALF = torch.bfloat16
SMALL = {"rank": 2, "update_proj_gap": 2, "gap": 2, "density": 0.5}
LIBRARY = [spec.library for spec in METHODS.values() if spec.library]
KINDS = (
    [(name, {}) for name in LIBRARY]
    + [("Scale", {"role": "head"})]
    + [("Frugal", {"space": space}) for space in ("columns", "rows", "svd")]
)
IN_FEWER_DIGITS = {"exp_avg", "left_basis", "right_basis"}
"""Keys of the state that `weight` keeps as the weights are: first moments that forget fast enough, and bases that
gradients are projected on. Second moments, statistics of rows and columns, and what a rule itself multiplies by or
adds up, are not among them."""
WITHOUT = {"Scale", "Racs"}
"""Methods that keep none of these of hidden layers."""
each_kind = pytest.mark.parametrize(("name", "own"), KINDS, ids=lambda value: str(value))


def build(name, params, **own):
    kind = getattr(optim, name)
    known = {key for base in kind.__mro__[:2] for key in inspect.signature(base.__init__).parameters}
    settings = {key: value for key, value in SMALL.items() if key in known}
    return kind([(f"weight{place}", param) for place, param in enumerate(params)], lr=0.01, **settings, **own)


def weights(dtype=HALF):
    shapes = [(12, 8), (8, 12), (8, 8), (8, 8)]
    return [nn.Parameter(parameter(shape, seed).detach().to(HALF).to(dtype)) for seed, shape in enumerate(shapes)]


def train(optimizer, params, begin, end):
    for step in range(begin, end):
        set_gradients(params, step)
        optimizer.step()


def floating(optimizer):
    """(key, dtype) of all that is no count."""
    states = optimizer.state.values()
    return {(key, value.dtype) for state in states for key, value in state.items() if value.is_floating_point()}


@each_kind
def test_by_default_a_step_is_float32s_rounded_once(name, own):
    """In every update, from the same weights and with the same states, to the bit."""
    params, twins = weights(), weights(torch.float32)
    optimizer, twin = build(name, params, **own), build(name, twins, **own)
    for step in range(5):
        set_gradients(params, step)
        for param, other in zip(params, twins, strict=True):
            other.grad = param.grad.float()
        optimizer.step()
        twin.step()
        for param, other in zip(params, twins, strict=True):
            assert torch.equal(param, other.to(HALF)), step
            assert optimizer.state[param].keys() == twin.state[other].keys()
            other.data.copy_(param)
    assert {dtype for _, dtype in floating(optimizer)} <= {torch.float32}


@each_kind
def test_in_the_weights_dtype_are_first_moments_and_bases_alone(name, own):
    params = weights()
    optimizer = build(name, params, state_format="weight", **own)
    train(optimizer, params, 0, 5)
    found = floating(optimizer)
    assert {key for key, dtype in found if dtype == HALF} == {key for key, _ in found} & IN_FEWER_DIGITS
    assert any(dtype == HALF for _, dtype in found) == (name not in WITHOUT or "role" in own)
    others = copy.deepcopy(params)
    fresh = build(name, others, state_format="weight", **own)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    train(optimizer, params, 5, 8)
    train(fresh, others, 5, 8)
    assert all(torch.equal(*pair) for pair in zip(params, others, strict=True))
    assert floating(fresh) == found


def test_a_first_moment_that_forgets_slowly_stays_in_float32():
    params = weights()
    optimizer = build("Muon", params, momentum=0.96, state_format="weight")
    train(optimizer, params, 0, 2)
    assert floating(optimizer) == {("exp_avg", torch.float32)}


def test_a_first_moment_that_is_switched_on_later_has_the_format():
    params = weights()
    optimizer = optim.LowRankOptimizer([{"params": params, "state_format": "weight"}], rule="sgd", lr=0.01)
    train(optimizer, params, 0, 1)
    optimizer.param_groups[0]["momentum"] = 0.9
    train(optimizer, params, 1, 3)
    assert floating(optimizer) == {("momentum_buffer", HALF)}
