"""APOLLO and APOLLO-Mini: limits, and what a gradient of zeros must not do."""

import pytest
import torch
from projection_helpers import parameter
from torch import nn

from peft_pretraining.optim import Apollo, ApolloMini, LowRankOptimizer


def gradients(shape, count=6):
    draws = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=draws, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("kind", [Apollo, ApolloMini])
def test_a_gradient_of_zeros_changes_nothing_but_the_moments(kind):
    """In the authors' code the weight is frozen for 1,850 updates from there."""
    weight = parameter((6, 4))
    optimizer = kind([weight], lr=0.01, rank=1)
    norms = []
    for step, grad in enumerate(gradients((6, 4), 8)):
        before = weight.detach().clone()
        weight.grad = torch.zeros_like(grad) if step in (0, 3) else grad
        optimizer.step()
        moved = weight.detach() - before
        assert moved.isfinite().all()
        norms.append(float(moved.norm()))
    assert norms[0] == norms[3] == 0
    assert min(norm for step, norm in enumerate(norms) if step not in (0, 3)) > 1e-3


def test_the_step_grows_by_one_percent():
    weight = parameter((6, 4))
    optimizer = Apollo([weight], lr=0.01, rank=2)
    kept = []
    for factor, grad in zip((1, 1, 100, 100), gradients((6, 4)), strict=False):
        weight.grad = factor * grad
        optimizer.step()
        kept.append(float(optimizer.state[weight]["limited_norm"]))
    assert kept[2] == pytest.approx(1.01 * kept[1], rel=1e-6)
    assert kept[3] <= kept[2] * 1.01 * (1 + 1e-6)


def test_projections_are_functions_of_seed_and_name():
    draws = []
    for seed, name in ((0, "a"), (0, "a"), (1, "a"), (0, "b")):
        weight = nn.Parameter(torch.ones(40, 30))
        optimizer = Apollo([(name, weight)], rank=20, seed=seed)
        weight.sum().backward()
        optimizer.step()
        draws.append(optimizer.state[weight]["right_basis"])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[3])
    assert float(draws[0].square().mean()) == pytest.approx(1 / 20, rel=0.15)


def test_what_is_no_matrix_is_trained_by_adamw():
    model = nn.ModuleDict({"mlp": nn.Linear(6, 8), "head": nn.Linear(8, 3)})
    optimizer = Apollo.from_model(model, rank=2)
    assert [(group["param_names"], group["lift"]) for group in optimizer.param_groups] == [
        (["mlp.bias", "head.weight", "head.bias"], None),
        (["mlp.weight"], "scaled_gradient"),
    ]
    lists = Apollo([*model.parameters()], rank=2)
    assert [group["rank"] for group in lists.param_groups] == [2, None]
    assert {group["state_format"] for group in lists.param_groups} == {"float32"}
    with pytest.raises(ValueError, match="granularity must be channel or tensor, got 'row'"):
        Apollo([*model.parameters()], granularity="row")


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_the_projection_may_be_galores(shape):
    """With SVD bases, R and its moments are those of GaLore."""
    weight, other = parameter(shape), parameter(shape)
    apollo = Apollo([weight], lr=0.01, rank=2, projection="svd")
    galore = LowRankOptimizer([{"params": [other], "rank": 2}], lr=0.01)
    for grad in gradients(shape, 3):
        weight.grad, other.grad = grad.clone(), grad.clone()
        apollo.step()
        galore.step()
    for key in ("exp_avg", "exp_avg_sq", "right_basis" if shape[0] > shape[1] else "left_basis"):
        torch.testing.assert_close(apollo.state[weight][key], galore.state[other][key], rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="projection must be one of random, svd, got 'gaussian'"):
        Apollo([weight], projection="gaussian")
