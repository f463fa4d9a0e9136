"""The projected optimizer between its calls: gradients that change, are zero or large, and settings that change."""

import copy
import doctest
import importlib
import math

import pytest
import torch
from projection_helpers import build, matrix, parameter, set_gradients, through_a_file, train
from torch import nn

from peft_pretraining import optim
from peft_pretraining.optim import LowRankOptimizer
from peft_pretraining.optim.tensors.projection import RIGHT

WITH_EXAMPLES = (
    "basis.basis_rule",
    "low_rank",
    "low_rank_gradients",
    "model_groups",
    "per_layer",
    "rules.lifts",
    "rules.update_rule",
    "tensors.collectives",
    "vector_adamw",
)


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_in_docstrings_run(module):
    found = doctest.testmod(importlib.import_module(f"{optim.__name__}.{module}"))
    assert found.attempted > 3 and not found.failed


# What happens to a gradient after it was projected.


def drop_the_batch(model, backward, look, optimizer):
    backward(1e3)
    look()
    model.zero_grad()
    backward(1.0)


def drop_the_batch_in_place(model, backward, look, optimizer):
    backward(1e3)
    look()
    model.zero_grad(set_to_none=False)
    backward(1.0)


def accumulate(model, backward, look, optimizer):
    for _ in range(3):
        backward(1.0)
        look()


def clip(model, backward, look, optimizer):
    backward(1e3)
    look()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def replace(model, backward, look, optimizer):
    backward(1.0)
    look()
    for param in model.parameters():
        param.grad = param.grad * 0.5


def unscale(model, backward, look, optimizer):
    backward(1e3)
    look()
    for param in model.parameters():
        param.grad.div_(1e3)


@pytest.mark.parametrize("change", [drop_the_batch, drop_the_batch_in_place, accumulate, clip, replace, unscale])
@pytest.mark.parametrize("proj_type", ["std", "continuous", "random"])
@pytest.mark.parametrize("begun", [False, True])
def test_looking_at_the_norm_changes_nothing(change, proj_type, begun):
    start = nn.Linear(16, 8).double()
    runs = []
    for looks in (False, True):
        model = copy.deepcopy(start)
        group = {"params": [model.weight], "rank": 4, "proj_type": proj_type, "update_proj_gap": 2}
        optimizer = LowRankOptimizer([{"params": [model.bias]}, group], rule="sgd", lr=0.1)
        for step in range(3):
            if begun:
                optimizer.begin_update(step)
            x = matrix((32, 16), step)

            def backward(size, model=model, x=x):
                ((model(x) - x[:, :8]).square().mean() * size).backward()

            def look(optimizer=optimizer, looks=looks, model=model):
                if looks:
                    optimizer.project_gradients()
                    norm = optimizer.grad_norm()
                    assert norm == optimizer.grad_norm() and len(optimizer.gradients()) == 2

            change(model, backward, look, optimizer)
            optimizer.step()
            optimizer.zero_grad()
        runs.append([param.detach() for param in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_a_norm_needs_no_projection_before_it():
    weight = parameter((6, 5))
    optimizer = build(weight)
    set_gradients([weight], 0)
    expected = torch.linalg.svdvals(weight.grad)[:2].square().sum().sqrt()
    torch.testing.assert_close(optimizer.grad_norm(), expected)


def test_scaling_stays_with_a_gradient_that_is_changed_and_goes_with_another():
    """By `scale_` and by a hand that does the same afterwards."""
    weights = [parameter((6, 5)) for _ in range(2)]
    optimizers = [build(weight, rule="sgd") for weight in weights]
    for again in (False, True):
        for index, (weight, optimizer) in enumerate(zip(weights, optimizers, strict=True)):
            set_gradients([weight], 1)
            if index == 0:
                optimizer.scale_(torch.tensor(0.5, dtype=torch.float64))
                if again:
                    weight.grad = matrix((6, 5), 3)  # of another batch
                else:
                    weight.grad.mul_(0.25)
            else:
                weight.grad = matrix((6, 5), 3) if again else weight.grad * 0.125
            optimizer.step()
        torch.testing.assert_close(weights[0], weights[1])


# Gradients that are zero, or too large to be squared.


@pytest.mark.parametrize("first", [0, 4], ids=["first", "later"])
@pytest.mark.parametrize("proj_type", ["std", "full", "continuous"])
@pytest.mark.parametrize("gap", [4, 0])
def test_a_gradient_of_zeros_makes_no_basis(proj_type, first, gap):
    """Not at the first refresh, and not at a later one: the next gradient does."""
    if gap == 0 and (proj_type == "continuous" or first):
        gap = 4
    weight = parameter((6, 5))
    optimizer = build(weight, proj_type=proj_type, update_proj_gap=gap)
    train(optimizer, [weight], 0, first)
    before = {key: value.clone() for key, value in optimizer.state[weight].items()}
    for _ in range(2):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        assert "captured_energy" not in optimizer.refresh_metrics
    state = optimizer.state[weight]
    assert torch.equal(state["refreshes"], before["refreshes"])
    if first == 0 or proj_type != "continuous":
        assert torch.equal(state["last_refresh"], before["last_refresh"]) and torch.equal(state[RIGHT], before[RIGHT])
    assert first or not any(state[key].any() for key in state if key.startswith("basis_") and key != "basis_step")
    train(optimizer, [weight], first + 2, first + 3)
    if first == 0 or proj_type != "continuous":
        assert int(state["refreshes"]) == int(before["refreshes"]) + 1
        assert int(state["last_refresh"]) == first + 2


def test_random_bases_need_no_gradient():
    weight = parameter((6, 5))
    optimizer = build(weight, rand_ratio=0.0)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert int(optimizer.state[weight]["refreshes"]) == 1


@pytest.mark.parametrize("dtype, size", [(torch.float16, 5e3), (torch.float32, 1e30)])
@pytest.mark.parametrize("rank", [None, 2])
def test_finite_gradients_are_used_although_their_norm_overflows(dtype, size, rank, caplog):
    weight = parameter((64, 48), dtype=torch.float32)
    weight.data = weight.data.to(dtype)
    optimizer = build(weight, rank=rank, rule="lion")
    before = weight.detach().clone()
    weight.grad = torch.full_like(weight, size)
    optimizer.step()
    assert not torch.equal(weight, before) and weight.isfinite().all() and not caplog.text
    weight.grad = torch.full_like(weight, math.inf)
    before = weight.detach().clone()
    optimizer.step()
    assert torch.equal(weight, before) and "a gradient is not finite" in caplog.text


def test_the_norm_of_half_precision_gradients_does_not_overflow():
    weight = nn.Parameter(torch.zeros(64, 48, dtype=torch.float16))
    optimizer = LowRankOptimizer([weight])
    weight.grad = torch.full_like(weight, 6e4)
    assert float(optimizer.grad_norm()) == pytest.approx(6e4 * (64 * 48) ** 0.5, rel=1e-3)


# Settings that change.


@pytest.mark.parametrize("rule, name", [("sgd", "momentum"), ("adafactor", "beta1")])
@pytest.mark.parametrize("rank", [None, 2])
def test_a_first_moment_can_be_switched_on_later(rule, name, rank):
    weight, plain = parameter((6, 5)), parameter((6, 5))
    optimizer = build(weight, rule=rule, rank=rank)
    train(optimizer, [weight], 0, 2)
    optimizer.param_groups[0][name] = 0.9
    if rule == "sgd" and rank is None:  # as torch's
        reference = torch.optim.SGD([plain], lr=0.01)
        train(reference, [plain], 0, 2)
        plain.data.copy_(weight.data)
        reference.param_groups[0]["momentum"] = 0.9
        optimizer.param_groups[0]["weight_decay"] = 0.0
        train(reference, [plain], 2, 5)
    train(optimizer, [weight], 2, 5)
    if rule == "sgd" and rank is None:
        torch.testing.assert_close(weight, plain)
    fresh_weight = parameter((6, 5))
    fresh = build(fresh_weight, rule=rule, rank=rank)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert fresh.param_groups[0][name] == 0.9
    fresh_weight.data.copy_(weight.data)
    train(fresh, [fresh_weight], 5, 7)
    train(optimizer, [weight], 5, 7)
    assert torch.equal(weight, fresh_weight)
    with_moment = build(parameter((6, 5)), rule=rule, rank=rank, **{name: 0.9})
    with_moment.load_state_dict(build(parameter((6, 5)), rule=rule, rank=rank).state_dict())
    assert not with_moment.param_groups[0][name]


@pytest.mark.parametrize("scheduled", [False, True])
def test_online_pca_learns_where_the_rate_begins_at_zero(scheduled):
    """A warm-up by hand. The basis's pace is relative to the largest rate so far."""
    weight = parameter((6, 5))
    optimizer = build(weight, proj_type="continuous_sgd", lr=0.0, rule="sgd")
    if scheduled:
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    rates, moves = (0.0, 0.01, 0.02, 0.02, 0.01), []
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        before = optimizer.state[weight][RIGHT].clone()
        train(optimizer, [weight], step, step + 1)
        moves.append(float((optimizer.state[weight][RIGHT] - before).norm()))
    assert moves[0] > 0 and all(0.01 < move < 1 for move in moves[1:])
    assert optimizer.param_groups[0]["largest_lr"] == 0.02
