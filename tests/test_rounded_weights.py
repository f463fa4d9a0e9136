"""bfloat16 weights on their way through an update: widened by rows, rounded once, and what arrives of small steps."""

import pytest
import torch
from format_helpers import HALF, KINDS, bits, optimizer_of, set_gradients, train, weights
from live_bytes import peak_bytes
from torch import nn

from peft_pretraining.optim import LowRankOptimizer, PerLayerUpdates
from peft_pretraining.optim.rules.lifts import Lift
from peft_pretraining.optim.tensors import rounding
from peft_pretraining.optim.vector_adamw import VectorAdamW


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
