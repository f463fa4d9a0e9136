"""States and groups that the projected optimizer takes, and those that it refuses as a whole."""

import copy
import math

import numpy as np
import pytest
import torch
from projection_helpers import build, parameter, train
from torch import nn

from peft_pretraining.optim import LowRankOptimizer
from peft_pretraining.optim.rules.update_rules import AdamW8bit, TorchAdamW
from peft_pretraining.optim.tensors.projection import RIGHT
from peft_pretraining.optim.vector_adamw import VectorAdamW

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


NO_STATES = {
    "text": lambda state: state["state"][0].update(exp_avg="x"),
    "a number": lambda state: state["state"][0].update(exp_avg=3.0),
    "complex": lambda state: state["state"][0].update(exp_avg=state["state"][0]["exp_avg"].to(torch.complex64)),
    "sparse": lambda state: state["state"][0].update(exp_avg=state["state"][0]["exp_avg"].to_sparse()),
    "meta": lambda state: state["state"][0].update(exp_avg=state["state"][0]["exp_avg"].to("meta")),
    "8 bits without scales": lambda state: state["state"][0].update(exp_avg=state["state"][0]["exp_avg"].byte()),
    "no state": lambda state: state.pop("state"),
    "a list of states": lambda state: state.update(state=[]),
    "no groups": lambda state: state.pop("param_groups"),
    "one group": lambda state: state.update(param_groups=state["param_groups"][0]),
    "a group without parameters": lambda state: state["param_groups"][0].pop("params"),
}


@pytest.mark.parametrize("harm", NO_STATES.values(), ids=NO_STATES)
def test_what_is_no_state_is_refused_before_anything_is_loaded(harm):
    """The first parameter's would be loaded already when the second's fails."""
    first, second = parameter((6, 5), dtype=torch.float32), parameter((6, 5), dtype=torch.float32)
    saved, optimizer = (LowRankOptimizer([{"params": [one, two]}]) for one, two in ((first, second), (second, first)))
    for one in (first, second):
        one.grad = torch.ones_like(one)
    saved.step()
    state = copy.deepcopy(saved.state_dict())
    if "state" in state:
        state["state"] = {1: state["state"][1], 0: state["state"][0]}
    harm(state)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"not the state of an optimizer|^the state's exp_avg"):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, tensors in before["state"].items():
        assert all(torch.equal(value, after["state"][index][key]) for key, value in tensors.items())


@pytest.mark.parametrize("vectors", [True, False, 1.0, 2, "0"])
def test_vectors_that_are_no_dimension_are_refused(vectors):
    with pytest.raises(ValueError, match=f"vectors must be None, or 0 or 1 for matrices, got {vectors!r}"):
        VectorAdamW([{"params": [nn.Parameter(torch.zeros(3, 4))], "vectors": vectors}])


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
        ({"rule": "lamb"}, "rule must be one of adamw, .*, or an object, got 'lamb'"),
        ({"basis": "pca"}, "basis must be one of svd, .*, or an object, got 'pca'"),
        ({"rank": None, "basis": "svd"}, "basis 'svd' needs a rank in the same group"),
        ({"basis": "svd_then_random"}, "rand_ratio must be a number with basis 'svd_then_random', got None"),
        ({"lift": "up"}, "lift must be one of identity, project_back, sign, or an object, got 'up'"),
        ({"state_format": "int4"}, "state_format must be one of published, weight, float32, 8bit, got 'int4'"),
        (
            {"rule": "sgd", "state_format": "8bit"},
            "state_format must be published, weight or float32 with sgd, got '8bit'",
        ),
        ({"rule": TorchAdamW()}, "rule 'torch_adamw' moves weights as they are: it goes without rank and lift"),
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
    kept = (optimizer.param_groups, optimizer.state, optimizer.subspaces, optimizer._peers, optimizer._slots)
    assert [len(each) for each in kept] == [1] * len(kept)
    train(optimizer, [weight], 0, 3)


def test_whole_numbers_of_any_type_are_ranks():
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
