"""The projected optimizer as a library: what happens between its calls, and what a saved state may be."""

import copy
import doctest
import math

import pytest
import torch
from projection_helpers import build, matrix, parameter, set_gradients, through_a_file, train
from torch import nn

from peft_pretraining.optim import LowRankOptimizer, low_rank, low_rank_gradients, per_layer, vector_adamw
from peft_pretraining.optim.projection import RIGHT
from peft_pretraining.optim.update_rules import AdamW8bit


@pytest.mark.parametrize("module", [low_rank, low_rank_gradients, per_layer, vector_adamw])
def test_examples_in_docstrings_run(module):
    found = doctest.testmod(module)
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
    """By `scale_gradients` and by a hand that does the same afterwards."""
    weights = [parameter((6, 5)) for _ in range(2)]
    optimizers = [build(weight, rule="sgd") for weight in weights]
    for again in (False, True):
        for index, (weight, optimizer) in enumerate(zip(weights, optimizers, strict=True)):
            set_gradients([weight], 1)
            if index == 0:
                optimizer.scale_gradients(torch.tensor(0.5, dtype=torch.float64))
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


# Saved states.


@pytest.mark.parametrize(
    "saved, own",
    [
        ({}, {"rand_ratio": 0.5, "num_training_steps": 10}),
        ({"rand_ratio": 0.5, "num_training_steps": 10}, {}),
        ({}, {"proj_type": "random"}),
        ({"proj_type": "random"}, {"rand_ratio": 0.0}),
        ({"proj_type": "continuous"}, {"proj_type": "continuous_adam8bit"}),
        ({}, {"rank": None}),
        ({"rank": None}, {}),
        ({"rule": "adamw8bit"}, {}),
        ({"rule": "adamw", "rank": None}, {"rule": "lion", "rank": None}),
    ],
)
def test_a_state_of_another_basis_or_rule_is_refused(saved, own):
    """Also where the shapes agree; and nothing of it is loaded."""
    weight = parameter((6, 5), dtype=torch.float32)
    optimizer, other = build(weight, **own), build(parameter((6, 5), dtype=torch.float32), **saved, lr=0.5)
    train(optimizer, [weight], 0, 2)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="state of another rank, proj_type or rule"):
        optimizer.load_state_dict(other.state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(value, after["state"][0][key]) for key, value in before["state"][0].items())


def test_settings_of_a_loaded_group_hold():
    """The group's and the basis rule's: when GoLore's bases become random, and when they change."""
    weight, other = parameter((6, 5)), parameter((6, 5))
    saved = build(other, rand_ratio=0.0, num_training_steps=10, update_proj_gap=2)
    optimizer = build(weight, rand_ratio=0.9, num_training_steps=10, update_proj_gap=5)
    optimizer.load_state_dict(saved.state_dict())
    train(saved, [other], 0, 5)
    train(optimizer, [weight], 0, 5)
    assert torch.equal(weight, other) and int(optimizer.state[weight]["refreshes"]) == 3


@pytest.mark.parametrize("name, value", [("lr", math.nan), ("betas", (0.9, 1.0)), ("rank", 2.0), ("scale", -1.0)])
def test_a_state_with_settings_that_are_wrong_is_refused(name, value):
    optimizer = build(parameter((6, 5)))
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0][name] = value
    with pytest.raises(ValueError, match=f"^{name}"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.01 and optimizer.param_groups[0]["rank"] == 2


@pytest.mark.parametrize("rule", ["adamw", "lion", "sgd"])
def test_a_state_of_an_older_version_loads(rule):
    """It does not name the rule, and its betas may be None."""
    weight, other = parameter((6, 5)), parameter((6, 5))
    optimizer, fresh = build(weight, rule=rule), build(other, rule=rule)
    train(optimizer, [weight], 0, 3)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        del group["rule"]
        group["betas"] = None
    other.data.copy_(weight.data)
    fresh.load_state_dict(state)
    assert fresh.param_groups[0]["rule"] == rule and fresh.param_groups[0]["betas"] == (
        optimizer.param_groups[0].get("betas")
    )
    train(optimizer, [weight], 3, 6)
    train(fresh, [other], 3, 6)
    assert torch.equal(weight, other)


@pytest.mark.parametrize("proj_type", ["std", "continuous_adam8bit"])
def test_8_bit_moments_of_small_matrices_go_on(proj_type, monkeypatch):
    """As older versions had them: the run goes on bit by bit, from a state dictionary and from a checkpoint's keys."""
    with monkeypatch.context() as patch:
        patch.setattr(AdamW8bit, "_SMALLEST", 1)
        weight = parameter((20, 12), dtype=torch.float32)
        optimizer = build(weight, rule="adamw8bit", proj_type=proj_type)
    train(optimizer, [weight], 0, 3)
    saved, at = copy.deepcopy(optimizer.state_dict()), weight.detach().clone()
    assert saved["state"][0]["exp_avg"].dtype == torch.uint8
    train(optimizer, [weight], 3, 6)
    for in_place in (False, True):
        other = nn.Parameter(at.clone())
        fresh = build(other, rule="adamw8bit", proj_type=proj_type)
        assert fresh.state[other]["exp_avg"].dtype == torch.float32
        if in_place:
            fresh.adopt_saved_form({f"model.weight.{key}" for key in saved["state"][0]}, {other: "model.weight"})
            for key, value in saved["state"][0].items():
                assert fresh.state[other][key].dtype == value.dtype and fresh.state[other][key].shape == value.shape
                fresh.state[other][key].copy_(value)
        else:
            fresh.load_state_dict(saved)
        train(fresh, [other], 3, 6)
        assert torch.equal(weight, other)


# Groups that are refused.


@pytest.mark.parametrize(
    "group, message",
    [
        ({"rank": 2.0}, r"rank must be a whole number, got 2\.0"),
        ({"rank": 1.5}, r"rank must be a whole number, got 1\.5"),
        ({"rank": True}, "rank must be a whole number, got True"),
        ({"update_proj_gap": 2.5}, r"update_proj_gap must be a whole number, got 2\.5"),
        ({"update_proj_gap": False}, "update_proj_gap must be a whole number, got False"),
        ({"update_proj_gap": None}, "update_proj_gap must be a whole number, got None"),
        ({"rand_ratio": -1}, "rand_ratio must not be negative, got -1"),
        ({"rand_ratio": math.nan}, "rand_ratio must be a finite number, got nan"),
        ({"rand_ratio": 0.5, "num_training_steps": 0}, "num_training_steps must be at least 1, got 0"),
        ({"rand_ratio": 0.5, "num_training_steps": 1e4}, "num_training_steps must be a whole number, got 10000.0"),
        ({"scale": math.nan}, "scale must be a finite number, got nan"),
        ({"scale": math.inf}, "scale must be a finite number, got inf"),
        ({"scale": -0.25}, r"scale must not be negative, got -0\.25"),
        ({"stagger_refresh": "False"}, "stagger_refresh must be True or False, got 'False'"),
        ({"lr": -0.1}, r"lr must not be negative, got -0\.1"),
        ({"momentum": -0.9}, r"momentum must not be negative, got -0\.9"),
        ({"dampening": math.nan}, "dampening must be a finite number, got nan"),
        ({"beta1": 1.0}, r"beta1 must be below 1, got 1\.0"),
        ({"seed": 0.5}, r"seed must be a whole number, got 0\.5"),
        ({"proj_typ": "std"}, "unknown settings of a parameter group: proj_typ; there are .*proj_type"),
        ({"rule": "lion"}, "a parameter group has the optimizer's rule, adamw, got 'lion'"),
        ({"rank": None, "proj_type": "up"}, "proj_type must be one of"),
        ({"rank": None, "svd_method": "qr"}, "svd_method must be one of"),
    ],
)
def test_groups_are_checked_as_a_whole(group, message):
    weight = parameter((6, 5))
    given = {"params": [parameter((4, 4)), parameter((5, 3))], "rank": 2, **group}
    with pytest.raises(ValueError, match=message):
        LowRankOptimizer([given])
    optimizer = build(weight, update_proj_gap=2, stagger_refresh=True)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(given)
    assert "lr" not in given or "lr" in group
    kept = (optimizer.param_groups, optimizer.state, optimizer.subspaces, optimizer._peers, optimizer._shards)
    assert [len(each) for each in kept] == [1] * len(kept)
    train(optimizer, [weight], 0, 3)


def test_whole_numbers_of_any_type_are_ranks():
    import numpy as np

    weight = parameter((6, 5))
    optimizer = build(weight, rank=np.int64(2), update_proj_gap=torch.tensor(4).item())
    train(optimizer, [weight], 0, 2)
    assert optimizer.state[weight][RIGHT].shape == (2, 5)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_empty_matrices_are_not_projected(shape):
    with pytest.raises(
        ValueError, match=r"must be a matrix, with entries, got 0.0 of shape .*parameter 0 of its group"
    ):
        build(nn.Parameter(torch.zeros(shape)))
    with pytest.raises(ValueError, match=r"got b of shape \(5,\)$"):
        LowRankOptimizer([{"params": [("a", parameter((4, 4))), ("b", parameter((5,)))], "rank": 2}])
    empty = nn.Parameter(torch.zeros(shape))
    optimizer = LowRankOptimizer([empty])
    empty.grad = torch.zeros(shape)
    optimizer.step()
