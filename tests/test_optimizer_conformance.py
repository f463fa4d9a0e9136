"""What any `torch.optim.Optimizer` is expected to do, for every update rule with and without each kind of basis.

Written anew after the generic checks of optimizer libraries (torch's own, and those that test many optimizers alike).
"""

import math

import pytest
import torch
from optimizer_kinds import (
    SHAPES,
    Kind,
    assert_equal,
    backward,
    every_kind,
    loss_of,
    parameters,
    through_a_file,
    train,
    values,
)
from torch import nn
from torch.optim import lr_scheduler as schedulers


@every_kind
def test_the_loss_falls(kind):
    params = parameters()
    optimizer, first = kind(params), float(loss_of(params).detach())
    for _ in range(60):
        optimizer.zero_grad()
        loss_of(params).backward()
        assert optimizer.step() is None
    assert float(loss_of(params).detach()) < 0.7 * first


@every_kind
def test_missing_gradients_leave_parameters_and_their_counts(kind):
    params = parameters()
    optimizer, before = kind(params), values(params)
    optimizer.step()
    assert_equal(values(params), before)
    for index in range(len(params)):
        backward(params, 1)
        for place, param in enumerate(params):
            if place != index:
                param.grad = None
        before = values(params)
        optimizer.step()
        assert [torch.equal(*pair) for pair in zip(before, params, strict=True)] == [
            place != index for place in range(len(params))
        ]
    assert {float(optimizer.state[param]["step"].max()) for param in params} == {1.0}


@every_kind
def test_closures_are_called_once_with_gradients_enabled(kind):
    params = parameters()
    optimizer, calls = kind(params), []

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = loss_of(params)
        loss.backward()
        calls.append(loss.item())
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses == calls and len(calls) == 3
    with torch.no_grad():
        optimizer.step(closure)


@every_kind
def test_zero_grad(kind):
    params = parameters()
    optimizer = kind(params)
    backward(params)
    optimizer.zero_grad(set_to_none=False)
    assert all(param.grad is not None and not param.grad.any() for param in params)
    optimizer.zero_grad()
    assert all(param.grad is None for param in params)


SCHEDULERS = {
    "StepLR": lambda o: schedulers.StepLR(o, 1, gamma=0.5),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, [lambda step: 1 / (1 + step)] * len(o.param_groups)),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 10),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=0.01, total_steps=10),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, base_lr=0.001, max_lr=0.01, step_size_up=2),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, total_iters=2), schedulers.ExponentialLR(o, 0.5)], [2]
    ),
}


@every_kind
def test_schedulers(kind):
    for name, make in SCHEDULERS.items():
        params = parameters()
        optimizer = kind(params)
        scheduler, rates = make(optimizer), []
        for step in range(4):
            train(optimizer, params, step, step + 1)
            rates.append(optimizer.param_groups[0]["lr"])
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        assert len(set(rates)) > 1 and all(param.isfinite().all() for param in params), name
        if name in ("OneCycleLR", "CyclicLR"):
            group = optimizer.param_groups[0]
            cycled = group["betas"][0] if "betas" in optimizer.defaults else group["momentum"]
            assert 0.8 < cycled < 0.96, name
        fresh = kind(parameters())
        make(fresh)
        fresh.load_state_dict(through_a_file(optimizer.state_dict()))
        assert fresh.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"], name


@every_kind
def test_a_rate_that_is_a_tensor(kind):
    runs = []
    for make in (float, torch.tensor):
        params = parameters()
        train(kind(params, lr=make(0.25)), params, 0, 3)
        runs.append(values(params))
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other)


@every_kind
def test_groups_have_their_own_rates_and_decays(kind):
    params = parameters()
    optimizer = kind(params, weight_decay=0.0)
    optimizer.param_groups[0]["lr"] = 0.0
    before = values(params)
    train(optimizer, params, 0, 2)
    still = len(optimizer.param_groups[0]["params"])
    moved = [not torch.equal(*pair) for pair in zip(before, params, strict=True)]
    assert moved == [False] * still + [True] * (len(params) - still)
    others = parameters()
    optimizer = kind(others, weight_decay=0.5)
    for param in others:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    rate = optimizer.param_groups[0]["lr"]
    for param, value in zip(others, values(parameters()), strict=True):
        torch.testing.assert_close(param.detach(), value * (1 - rate * 0.5))


@every_kind
def test_a_group_can_be_added_at_any_time(kind):
    params, late = parameters(), nn.Parameter(torch.ones(4, 4, dtype=torch.float64))
    optimizer = kind(params)
    train(optimizer, params, 0, 2)
    given = {"params": [late], "lr": 0.5}
    optimizer.add_param_group(given)
    assert set(given) == {"params", "lr"}
    train(optimizer, [*params, late], 2, 4)
    assert not torch.equal(late, torch.ones_like(late)) and float(optimizer.state[late]["step"].max()) == 2
    for wrong, error in (({"params": [late]}, ValueError), ({"params": {late}}, TypeError), ([late], TypeError),
                         ({"params": [torch.ones(2, requires_grad=True) * 2]}, ValueError)):  # fmt: skip
        before = len(optimizer.param_groups), len(optimizer.state)
        with pytest.raises(error):
            optimizer.add_param_group(wrong)
        assert (len(optimizer.param_groups), len(optimizer.state)) == before


WRONG = [
    *(("lr", value) for value in (-1.0, math.nan, math.inf, "0.1", None, True)),
    *(("weight_decay", value) for value in (-0.1, math.nan)),
    *(("eps", value) for value in (-1e-8, math.inf)),
    *(("betas", value) for value in ((0.9, 1.0), (-0.1, 0.9), (0.9,), 0.9, (0.9, math.nan))),
]


@every_kind
def test_values_are_checked_at_construction(kind):
    optimizer = kind(parameters())
    for name, value in WRONG:
        with pytest.raises(ValueError, match=f"^{name}"):
            kind(parameters(), **{name: value})
        with pytest.raises(ValueError, match=f"^{name}"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4, 4))], name: value})
    assert len(optimizer.state) == len(SHAPES)


@every_kind
def test_what_cannot_be_trained_is_refused_in_one_line(kind):
    with pytest.raises(ValueError, match=r"complex parameter.*complex64"):
        kind([nn.Parameter(torch.ones(4, 4, dtype=torch.complex64)), *parameters()])
    with pytest.raises(ValueError, match="unknown settings of a parameter group: ranks"):
        kind(parameters()).add_param_group({"params": [nn.Parameter(torch.ones(4, 4))], "ranks": 4})
    table = nn.Embedding(6, 4, sparse=True).double()
    params = [table.weight, *parameters()[1:]]
    optimizer, before = kind(params), values(params)
    backward(params[1:], 0)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"does not support sparse gradients.*\(6, 4\)"):
        optimizer.step()
    assert_equal(values(params), before)


def test_steps_in_compiled_code():
    """Where torch compiles around them. The numbers are those of ordinary steps."""
    for kind in (Kind("adamw", "no basis"), Kind("adamw", "SVD"), Kind("sgd", "random"), Kind("vector", None)):
        params, others = parameters(), parameters()
        optimizer, reference = kind(params), kind(others)
        step = torch.compile(optimizer.step, backend="eager")
        whole = torch.compile(lambda optimizer=optimizer: optimizer.step(), backend="eager")
        for index in range(4):
            backward(params, index)
            backward(others, index)
            step() if index % 2 else whole()
            reference.step()
        assert_equal(values(params), values(others))
        torch._dynamo.reset()
