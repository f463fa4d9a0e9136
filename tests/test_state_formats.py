"""bfloat16 weights with states and arithmetic in other dtypes, rounded once an update, to nearest or stochastically."""

import copy

import pytest
import torch
from live_bytes import peak_bytes
from optimizer_kinds import through_a_file
from torch import nn

from peft_pretraining.distributed.sharding import ShardInfo, whole_norm
from peft_pretraining.optim import LowRankOptimizer, PerLayerUpdates
from peft_pretraining.optim.rules.lifts import Lift
from peft_pretraining.optim.tensors import rounding
from peft_pretraining.optim.tensors.rounding import Noise, round_stochastically
from peft_pretraining.optim.vector_adamw import VectorAdamW

NAMES = ("tall", "wide", "vector", "scalar")
SHAPES = ((6, 4), (4, 7), (5,), ())
RULES = {
    "adamw": {"rule": "adamw", "lr": 0.05},
    "torch_adamw": {"rule": "torch_adamw", "lr": 0.05},
    "adafactor": {"rule": "adafactor", "beta1": 0.9, "lr": 0.05},
    "lion": {"rule": "lion", "betas": (0.9, 0.95), "lr": 0.01},
    "sgd": {"rule": "sgd", "momentum": 0.9, "lr": 0.1},
}
BASES = {
    "no basis": {},
    "SVD": {"rank": 3, "update_proj_gap": 3},
    "both sides": {"rank": 3, "update_proj_gap": 3, "proj_type": "full"},
    "online": {"rank": 3, "proj_type": "continuous"},
}
KINDS = [(rule, basis) for rule in RULES for basis in BASES if rule != "torch_adamw" or basis == "no basis"]
every_kind = pytest.mark.parametrize("rule, basis", KINDS)
HALF = torch.bfloat16


def weights(dtype=HALF):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(HALF).to(dtype)) for shape in SHAPES]


def optimizer_of(params, rule, basis, **changes):
    named = list(zip(NAMES, params, strict=True))
    groups = [{"params": named[:2], **BASES[basis], **changes}, {"params": named[2:], **changes}]
    return LowRankOptimizer(groups, weight_decay=0.1, **RULES[rule])


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(HALF).to(param.dtype)


def train(optimizer, params, first, last):
    for step in range(first, last):
        set_gradients(params, step)
        optimizer.step()


def bits(params):
    return [param.detach().view(torch.int16).tolist() for param in params]


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


@pytest.mark.parametrize("rule", ["adamw", "torch_adamw", "adamw8bit", "sgd"])
def test_a_small_decay_arrives_on_average(rule):
    """Each of 200 times 1e-4, which rounding to nearest loses: weights of 1 come to 0.98."""
    for how, expected in (("nearest", 1.0), ("stochastic", (1 - 1e-4) ** 200)):
        param = nn.Parameter(torch.ones(64, 64, dtype=HALF))
        param.grad = torch.zeros_like(param)
        settings = {"state_format": "published", "rounding": how}
        optimizer = LowRankOptimizer([{"params": [param], **settings}], rule=rule, lr=0.01, weight_decay=0.01)
        for _ in range(200):
            optimizer.step()
        assert abs(param.detach().double().mean() - expected) < 5e-4


def test_zero_updates_leave_every_bit():
    params = weights()
    before = bits(params)
    for rule, basis in KINDS:
        optimizer = optimizer_of(params, rule, basis, state_format="float32", rounding="stochastic")
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        train(optimizer, params, 0, 2)
    assert bits(params) == before


@pytest.mark.parametrize("state_format", ["float32", "weight"])
def test_updates_inside_the_backward_pass_are_those_of_step(state_format):
    """Per-layer updates, with the loop's numbers of updates: the same noise, the same bits."""
    results = []
    for per_layer in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)).to(HALF)
        named = list(model.named_parameters())
        own = {"state_format": state_format, "rounding": "stochastic", "seed": 1}
        groups = [
            {"params": [pair for pair in named if pair[1].ndim == 2], "rank": 3, "update_proj_gap": 2, **own},
            {"params": [pair for pair in named if pair[1].ndim < 2], **own},
        ]
        optimizer = LowRankOptimizer(groups, lr=0.05, weight_decay=0.1)
        updates = PerLayerUpdates(optimizer) if per_layer else None
        for step in range(5):
            optimizer.begin_update(step)
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step)).to(HALF)
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(bits(model.parameters()))
        del updates
    assert results[0] == results[1]


class Plain(Lift):
    """As a plugin's: it adds to the whole weight."""

    name = "plain"

    def move(self, updates, group):
        for update in updates:
            direction, factor, _ = update.direction
            with update.moving() as weight:
                weight.add_(update.projection.project_back(update.bases, direction).to(weight.dtype), alpha=-factor)


def test_lifts_that_move_whole_weights_round_alike(monkeypatch):
    """One block of rows after the other, or all at once."""
    results = []
    for lift, at_once in ((None, 2**22), (None, 8), (Plain(), 2**22)):
        monkeypatch.setattr(rounding, "NUMBERS_AT_ONCE", at_once)
        params = weights()[:1]
        own = {"rank": 3, "lift": lift, "state_format": "float32", "rounding": "stochastic"}
        optimizer = LowRankOptimizer([{"params": params, **own}], lr=0.05, weight_decay=0.1)
        train(optimizer, params, 0, 4)
        results.append(bits(params))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("how", ["nearest", "stochastic"])
def test_blocks_of_rows_change_nothing_for_torchs_adamw(how, monkeypatch):
    results = []
    for at_once in (2**22, 8, 1):
        monkeypatch.setattr(rounding, "NUMBERS_AT_ONCE", at_once)
        params = weights()
        optimizer = optimizer_of(params, "torch_adamw", "no basis", state_format="weight", rounding=how)
        train(optimizer, params, 0, 4)
        results.append(bits(params))
        assert all(float(optimizer.state[param]["step"]) == 4 for param in params)
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_an_update_to_be_left_out_changes_no_bit(found):
    """`found_inf` and `grad_scale` act where the weight is widened as they do in torch's kernel."""
    params, plain = weights(), weights()
    own = {"state_format": "float32", "rounding": "stochastic"}
    optimizer, expected = (optimizer_of(each, "torch_adamw", "no basis", **own) for each in (params, plain))
    set_gradients(params, 0)
    before = bits(params)
    for param in params:
        param.grad.mul_(4)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(found), torch.tensor(4.0)
    optimizer.step()
    if found:
        assert bits(params) == before
        assert all(not state[key].any() for state in optimizer.state.values() for key in ("step", "exp_avg"))
    else:
        train(expected, plain, 0, 1)
        assert bits(params) == bits(plain)


@pytest.mark.parametrize("rule, rank", [("torch_adamw", None), ("adamw", 4), ("lion", 4)])
def test_a_whole_copy_of_the_weight_never_exists(rule, rank, monkeypatch):
    monkeypatch.setattr(rounding, "NUMBERS_AT_ONCE", 2**12)
    param = nn.Parameter(torch.randn(512, 256).to(HALF))
    own = {"rank": rank, "state_format": "weight", "rounding": "stochastic"}
    optimizer = LowRankOptimizer([{"params": [param], **own}], rule=rule, lr=0.01)
    for step in range(2):
        optimizer.begin_update(step)
        set_gradients([param], step)
        with peak_bytes() as peak:
            optimizer.step()
    # Widened: weight, gradient and two moments, twice in passing, and the noise; beside a lift R, D and their kin.
    assert peak.bytes < 16 * 4 * 2**12 + (0 if rank is None else 8 * 4 * 512 * rank)


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


def test_no_two_parameters_are_rounded_alike():
    """Factors without names, in groups of their own, too."""
    for kind in (VectorAdamW, LowRankOptimizer):
        params = [nn.Parameter(torch.ones(40, 30, dtype=HALF)) for _ in range(3)]
        own = {"rounding": "stochastic", "state_format": "float32"}
        optimizer = kind([{"params": params[:2], **own}, {"params": params[2:], **own}], lr=0.002)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        moved = [param.detach() != 1 for param in params]
        assert all(0.2 < each.double().mean() < 0.8 for each in moved)
        for one, other in ((0, 1), (0, 2), (1, 2)):
            assert 0.3 < (moved[one] ^ moved[other]).double().mean() < 0.7


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
