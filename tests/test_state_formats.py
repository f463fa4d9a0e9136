"""States of bfloat16 weights in every format: what they are kept in, what they compute, and that they go on."""

import copy

import pytest
import torch
from format_helpers import HALF, NAMES, bits, every_kind, optimizer_of, set_gradients, train, weights
from optimizer_kinds import through_a_file
from torch import nn

from peft_pretraining.distributed.sharding import ShardInfo, whole_norm
from peft_pretraining.optim import LowRankOptimizer
from peft_pretraining.optim.tensors.rounding import Noise, round_stochastically
from peft_pretraining.optim.vector_adamw import VectorAdamW


@pytest.mark.parametrize("how", ["nearest", "stochastic"])
@every_kind
def test_float32_states_are_the_float32_computation_rounded_once(rule, basis, how):
    params, twins = weights(), weights(torch.float32)
    optimizer = optimizer_of(params, rule, basis, state_format="float32", rounding=how, seed=3)
    twin = optimizer_of(twins, rule, basis)
    for step in range(7):
        for each in (params, twins):
            set_gradients(each, step)
        optimizer.step()
        twin.step()
        for name, param, other in zip(NAMES, params, twins, strict=True):
            expected = torch.empty_like(param)
            if how == "nearest":
                expected.copy_(other)
            else:
                round_stochastically(expected, other.detach().clone(), Noise(3, name, step))
            assert torch.equal(param, expected), (name, step)
            other.data.copy_(param)
    for param, other in zip(params, twins, strict=True):
        assert optimizer.state[param].keys() == twin.state[other].keys()
        for key, value in twin.state[other].items():
            assert torch.equal(optimizer.state[param][key], value), key


@pytest.mark.parametrize("how", ["nearest", "stochastic"])
@pytest.mark.parametrize("state_format", ["published", "weight", "float32", "8bit"])
@every_kind
def test_a_saved_run_goes_on_bit_by_bit(rule, basis, state_format, how):
    if state_format == "8bit" and "adamw" not in rule:
        return
    changes = {"state_format": state_format, "rounding": how}
    params = weights()
    optimizer = optimizer_of(params, rule, basis, **changes)
    train(optimizer, params, 0, 4)
    saved, others = through_a_file(optimizer.state_dict()), copy.deepcopy(params)
    fresh = optimizer_of(others, rule, basis, **changes)
    fresh.load_state_dict(saved)
    train(optimizer, params, 4, 8)
    train(fresh, others, 4, 8)
    assert bits(others) == bits(params)
    for mine, theirs in zip(others, params, strict=True):
        for key, value in optimizer.state[theirs].items():
            assert fresh.state[mine][key].dtype == value.dtype and torch.equal(fresh.state[mine][key], value), key


@every_kind
def test_the_dtypes_that_states_are_kept_in(rule, basis):
    for state_format, first, other in (
        ("published", HALF, HALF),
        ("weight", HALF, torch.float32),
        ("float32", torch.float32, torch.float32),
    ):
        params = weights()
        optimizer = optimizer_of(params, rule, basis, state_format=state_format)
        train(optimizer, params, 0, 2)
        for state in optimizer.state.values():
            for key, value in state.items():
                if key in ("exp_avg", "momentum_buffer") or key.endswith("_basis"):
                    assert value.dtype == first, key
                elif value.is_floating_point() and key != "step":
                    assert value.dtype == (torch.float32 if "_row" in key or "_col" in key else other) or (
                        rule == "adafactor" and value.dtype == torch.float32
                    ), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_kind
def test_weights_of_32_bits_and_more_know_one_format(rule, basis, dtype):
    """Whatever the format and the rounding, bit by bit (torch's kernel with its gradients in place, too)."""
    runs = []
    for changes in ({}, {"state_format": "weight", "rounding": "stochastic"}, {"state_format": "float32"}):
        params = weights(dtype)
        train(optimizer_of(params, rule, basis, **changes), params, 0, 5)
        runs.append(params)
    for params in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(params, runs[0], strict=True))


def test_second_moments_fall_unless_they_are_as_published():
    """0.999^1000 = 0.37; in bfloat16 v·0.999 is v."""
    for rule in ("adamw", "torch_adamw"):
        expected = {"published": 1.0, "weight": 0.999**1000, "float32": 0.999**1000}
        params = {name: nn.Parameter(torch.ones(3, dtype=HALF)) for name in expected}
        groups = [{"params": [param], "state_format": name} for name, param in params.items()]
        optimizer = LowRankOptimizer(groups, rule=rule)
        for param in params.values():
            optimizer.state[param]["exp_avg_sq"].fill_(1)
            param.grad = torch.zeros_like(param)
        for _ in range(1000):
            optimizer.step()
        for name, param in params.items():
            found = optimizer.state[param]["exp_avg_sq"].float()
            torch.testing.assert_close(found, torch.full((3,), expected[name]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("how", ["nearest", "stochastic"])
@pytest.mark.parametrize("state_format", ["float32", "weight"])
def test_vectors_own_adamw_in_every_format(state_format, how):
    def make(params, **own):
        groups = [{"params": params[:1], "vectors": 0, **own}, {"params": params[1:2], "vectors": 1, **own}]
        return VectorAdamW([*groups, {"params": params[2:], **own}], lr=0.05, weight_decay=0.1)

    params, twins = weights(), weights(torch.float32)
    optimizer, twin = make(params, state_format=state_format, rounding=how), make(twins)
    for step in range(4):
        for each in (params, twins):
            set_gradients(each, step)
        optimizer.step()
        twin.step()
        for param, other in zip(params, twins, strict=True):
            state, expected = optimizer.state[param], twin.state[other]
            assert state["exp_avg"].dtype == (HALF if state_format == "weight" else torch.float32)
            assert torch.equal(state["exp_avg_sq"], expected["exp_avg_sq"])
            if how == "nearest":
                assert torch.equal(param, other.to(HALF))
            gap = (param.float() - other).abs()
            assert (gap <= 2**-7 * other.abs()).all()
            expected["exp_avg"].copy_(state["exp_avg"])
            other.data.copy_(param)
    saved, others = through_a_file(optimizer.state_dict()), copy.deepcopy(params)
    fresh = make(others, state_format=state_format, rounding=how)
    fresh.load_state_dict(saved)
    train(optimizer, params, 4, 6)
    train(fresh, others, 4, 6)
    assert bits(params) == bits(others)


def test_norms_are_found_in_float32():
    """300 parts of norm 1 and one of 1/16: rounded to bfloat16 they would come to 17.25 or 17.375."""
    parts = [torch.tensor([1.0], dtype=HALF)] * 300 + [torch.tensor([0.0625], dtype=HALF)]
    norm = whole_norm([(part, ShardInfo(part.shape)) for part in parts])
    assert norm.dtype == torch.float32
    torch.testing.assert_close(
        norm.double(), torch.tensor(300 + 0.0625**2, dtype=torch.float64).sqrt(), rtol=1e-6, atol=0
    )
    mixed = whole_norm(
        [(part.double() if place % 2 else part, ShardInfo(part.shape)) for place, part in enumerate(parts)]
    )
    torch.testing.assert_close(mixed.double(), norm.double(), rtol=1e-6, atol=0)


def test_states_of_before_are_as_published():
    """`weight` meant that, before there was a rounding to choose."""
    params = weights()
    optimizer = optimizer_of(params, "adamw", "SVD")
    train(optimizer, params, 0, 3)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group["state_format"] = "weight"
        del group["rounding"], group["basis_dtype"]
    others = copy.deepcopy(params)
    fresh = optimizer_of(others, "adamw", "SVD")
    fresh.load_state_dict(saved)
    train(optimizer, params, 3, 6)
    train(fresh, others, 3, 6)
    assert bits(params) == bits(others)
    assert fresh.param_groups[0]["state_format"] == "published"
    with pytest.raises(ValueError, match="state_format"):
        optimizer_of(weights(), "adamw", "SVD", state_format="weight").load_state_dict(saved)


@pytest.mark.parametrize("state_format, how", [("8bit", "nearest"), ("8bit", "stochastic"), ("float32", "stochastic")])
def test_8_bit_moments_of_bfloat16_weights_are_those_of_float32_ones(state_format, how):
    """The kernel reads bfloat16 gradients and computes in float32; the direction is rounded, and so is the weight."""
    start = torch.randn(80, 64, generator=torch.Generator().manual_seed(0)).to(HALF)
    param, twin = nn.Parameter(start.clone()), nn.Parameter(start.float())
    own = {"state_format": state_format, "rounding": how}
    optimizer = LowRankOptimizer([{"params": [param], **own}], rule="adamw8bit", lr=0.05, weight_decay=0.1)
    reference = LowRankOptimizer([twin], rule="adamw8bit", lr=0.05, weight_decay=0.1)
    for step in range(4):
        set_gradients([param], step)
        twin.grad = param.grad.float()
        optimizer.step()
        reference.step()
        for key, value in reference.state[twin].items():
            assert torch.equal(optimizer.state[param][key], value), key
        distance = (param.float() - twin).abs()
        assert (distance <= 2**-7 * twin.abs() + 0.05 * 2**-8 + 1e-6).all()
        twin.data.copy_(param)
