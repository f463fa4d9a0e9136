"""The optimizers that methods bring along for other loops: found by name, saved, copied, put together from groups."""

import copy
import inspect

import pytest
import torch
from projection_helpers import parameter, set_gradients, through_a_file
from torch import nn

from peft_pretraining import optim
from peft_pretraining.methods import METHODS
from peft_pretraining.optim import LowRankOptimizer, MatrixOptimizer

LIBRARY = [spec.library for spec in METHODS.values() if spec.library]
SMALL = {"rank": 2, "update_proj_gap": 2}
each_optimizer = pytest.mark.parametrize("name", LIBRARY)


def build(name, weights):
    kind = getattr(optim, name)
    known = {key for base in kind.__mro__[:2] for key in inspect.signature(base.__init__).parameters}
    settings = {key: value for key, value in SMALL.items() if key in known}
    named = [(f"weight{index}", weight) for index, weight in enumerate(weights)]
    return kind(named, lr=0.01, weight_decay=0.1, **settings)


def weights_of(count=3):
    return [parameter(shape, seed) for seed, shape in enumerate([(6, 4), (4, 6), (6,)][:count])]


def train(optimizer, weights, begin, end):
    for step in range(begin, end):
        set_gradients(weights, step)
        optimizer.step()


@each_optimizer
def test_everything_moves_and_a_saved_state_goes_on(name):
    weights = weights_of()
    starts = [weight.detach().clone() for weight in weights]
    optimizer = build(name, weights)
    train(optimizer, weights, 0, 5)
    assert all((weight - start).abs().max() > 1e-6 for weight, start in zip(weights, starts, strict=True))
    others = [nn.Parameter(weight.detach().clone()) for weight in weights]
    fresh = build(name, others)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    train(optimizer, weights, 5, 9)
    train(fresh, others, 5, 9)
    assert all(torch.equal(*pair) for pair in zip(weights, others, strict=True))


@each_optimizer
def test_a_copy_goes_on_alike(name):
    weights = weights_of()
    optimizer = build(name, weights)
    train(optimizer, weights, 0, 3)
    optimizer.zero_grad()
    others, copied = copy.deepcopy((weights, optimizer))
    train(optimizer, weights, 3, 6)
    train(copied, others, 3, 6)
    assert all(torch.equal(*pair) for pair in zip(weights, others, strict=True))


@each_optimizer
def test_bfloat16_weights_have_states_in_float32(name):
    weights = [nn.Parameter(weight.detach().bfloat16()) for weight in weights_of()]
    optimizer = build(name, weights)
    train(optimizer, weights, 0, 3)
    dtypes = {value.dtype for state in optimizer.state.values() for value in state.values() if value.ndim}
    assert dtypes <= {torch.float32} and all(weight.isfinite().all() for weight in weights)


@each_optimizer
def test_vectors_have_the_betas_that_are_given(name):
    betas = (0.5, 0.75)
    weight, kind = parameter((6,)), getattr(optim, name)
    given = "adam_betas" if "adam_betas" in inspect.signature(kind.__init__).parameters else "betas"
    optimizer = kind([weight], **{given: betas})
    assert [group["betas"] for group in optimizer.param_groups] == [betas]


@each_optimizer
def test_a_group_that_is_added_is_treated_as_the_others(name):
    """By a copy of the optimizer, too: the rule and the dtype of states are the same as of a group that is given."""
    weights = [nn.Parameter(weight.detach().bfloat16()) for weight in weights_of()]
    first, later = copy.deepcopy((weights, build(name, weights[:1])))
    later.add_param_group({"params": [(f"weight{place}", first[place]) for place in (1, 2)]})
    seen = []
    for optimizer, params in ((build(name, weights), weights), (later, first)):
        train(optimizer, params, 0, 2)
        groups = {key: group for group in optimizer.param_groups for key in group["param_names"]}
        states = [{key: value.dtype for key, value in optimizer.state[param].items()} for param in params]
        seen.append(({key: (group["rule"], group["betas"]) for key, group in groups.items()}, states))
    assert seen[0] == seen[1]


def test_a_group_that_is_refused_leaves_nothing_behind():
    (matrix, *_), late = weights_of(), parameter((4, 4))
    optimizer = optim.Fira([matrix], rank=2)
    before = len(optimizer.param_groups), len(optimizer.state), len(optimizer.subspaces)
    with pytest.raises(ValueError, match="complex"):
        optimizer.add_param_group({"params": [late, nn.Parameter(torch.ones(3, dtype=torch.complex64))]})
    assert (len(optimizer.param_groups), len(optimizer.state), len(optimizer.subspaces)) == before
    optimizer.add_param_group({"params": late})
    assert len(optimizer.subspaces) == 2


def test_groups_keep_what_they_say():
    matrix, head, vector = weights_of()
    kind = optim.Apollo
    optimizer = kind([{"params": [matrix, vector], "lr": 0.5}, {"params": head, "rule": "adamw"}], lr=0.1)
    rules = [(group["lr"], group["rule"], len(group["params"])) for group in optimizer.param_groups]
    assert [each[::2] for each in rules] == [(0.5, 1), (0.5, 1), (0.1, 1)]
    assert [each[1] for each in rules[1:]] == ["adamw", "adamw"] and isinstance(optimizer, MatrixOptimizer)
    with pytest.raises(TypeError, match="iterable of parameters or groups, got a tensor"):
        kind(matrix)


def test_only_methods_bring_optimizers_along():
    assert issubclass(MatrixOptimizer, LowRankOptimizer) and len(set(LIBRARY)) == len(LIBRARY) >= 8
    with pytest.raises(AttributeError, match="has no attribute 'Adamw'"):
        _ = optim.Adamw


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [optim.Apollo, optim.ApolloMini, optim.Fira])
def test_8_bit_moments_of_what_adamw_follows(kind, dtype):
    """In the projection, and of all that is not projected; arithmetic is float32's, as with moments of 32 bits."""
    named = [("matrix", (4096, 8)), ("table", (128, 32)), ("vector", (8,))]
    runs = []
    for state_format in ("float32", "8bit"):
        weights = [parameter(shape, seed).to(dtype) for seed, (_, shape) in enumerate(named)]
        weights = [nn.Parameter(weight.detach()) for weight in weights]
        groups = [{"params": [weights[0], weights[2]]}, {"params": [weights[1]], "rule": "adamw"}]
        optimizer = kind(groups, lr=0.01, rank=1, state_format=state_format)
        starts = [weight.detach().clone() for weight in weights]
        train(optimizer, weights, 0, 2)
        runs.append([(weight - start).float() for weight, start in zip(weights, starts, strict=True)])
    for weight in weights[:2]:
        state = optimizer.state[weight]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.uint8
        assert state["exp_avg_absmax"].dtype == torch.float32
    assert optimizer.state[weights[2]]["exp_avg"].dtype == torch.float32, "too small"
    for wide, narrow in zip(*runs, strict=True):
        assert 0 < (wide - narrow).norm() < 0.1 * wide.norm() or torch.equal(wide, narrow)


def test_rules_of_their_own_refuse_8_bits():
    with pytest.raises(ValueError, match="state_format must be published, weight or float32 with muon, got '8bit'"):
        optim.Muon(weights_of(2), state_format="8bit")
