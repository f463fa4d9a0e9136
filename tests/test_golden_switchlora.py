"""SwitchLoRA's layer, schedule and first values against numbers from its public implementation (golden/README.md)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from peft_pretraining.config import Config
from peft_pretraining.methods.switchlora.method import SwitchLoRA
from peft_pretraining.methods.switchlora.schedule import SwitchSchedule, allowed_count
from peft_pretraining.nn.initialization import kaiming_bound, switchlora_bounds
from peft_pretraining.nn.low_rank_linear import LowRankLinear
from peft_pretraining.nn.switching import Switch, SwitchedLinear, SwitchState

GOLDEN = Path(__file__).parent / "golden" / "switchlora"
LAYER_FILES = sorted(path.stem for path in GOLDEN.glob("layer_*.safetensors"))


def golden(stem):
    return load_file(GOLDEN / f"{stem}.safetensors"), json.loads((GOLDEN / f"{stem}.json").read_text())


def method_for(linear, **settings):
    """SwitchLoRA over a model of one layer, ready to train."""
    model = nn.ModuleDict({"attn": linear})
    method = SwitchLoRA(Config.from_settings({"method": "switchlora", "lora_alpha": 1.0, **settings}))
    model = method.convert(model)
    return method, model, method.build_optimizer(model)


def start_from(layer, numbers):
    with torch.no_grad():
        layer.weight.copy_(numbers["init.W"])
        layer.lora_A.copy_(numbers["init.A"])
        layer.lora_B.copy_(numbers["init.B"])
    for name in ("candidates_A", "candidates_B", "selected_A", "selected_B"):
        getattr(layer.switching, name).copy_(numbers[f"init.{name}"])


def plan_from(method, layer, numbers):
    """Let the method switch what the public run switched."""
    if "k_requested" in numbers:
        method.requested_count = lambda rank, step, index: int(numbers["k_requested"][step])
        return

    def forced(layer, step, index):
        maps = [numbers[f"switched_{name}_dest"][step] for name in "AB"]
        parts = [part for dest in maps for part in ((dest >= 0).nonzero().flatten().tolist(), dest[dest >= 0].tolist())]
        return Switch(*parts)

    method.plan = forced


def counters_after_switch(method, layer):
    """A dictionary that always holds the freeze counters as the last switch left them, before they count down."""
    freeze, counters = method._freeze, {}

    def observed_freeze(layers):
        counters.update(A=layer.switching.frozen_A.clone(), B=layer.switching.frozen_B.clone())
        freeze(layers)

    method._freeze = observed_freeze
    return counters


@pytest.mark.parametrize("stem", LAYER_FILES)
def test_one_layer(stem, device):
    numbers, case = golden(stem)
    dtype = numbers["x"].dtype
    tolerance = {"rtol": 0, "atol": 1e-12 if dtype == torch.float64 else 1e-5}
    flags = {k: v for k, v in case["flags"].items() if k != "discontinuous_switch" or "k_requested" in numbers}
    linear = nn.Linear(case["in_features"], case["out_features"], bias=False, dtype=dtype, device=device)
    method, model, optimizer = method_for(
        linear, rank=case["rank"], adam_warm_step=case["adam_warm_step"], lr=1.0, **flags
    )
    layer = model["attn"]
    assert layer.scale == case["scale"]
    start_from(layer, numbers)
    plan_from(method, layer, numbers)

    counters = counters_after_switch(method, layer)
    for t in range(case["steps"]):

        def same(actual, name, t=t):
            expected = numbers[name][t]
            torch.testing.assert_close(actual.cpu().to(expected.dtype).reshape(expected.shape), expected, **tolerance)

        def exact(actual, name, t=t):
            assert actual.tolist() == numbers[name][t].tolist(), f"{name} at update {t}"

        method.before_update(model, optimizer, t)
        y = layer(numbers["x"][t].to(device))
        same(y, "y")
        (y * numbers["gy"][t].to(device)).sum().backward()
        same(layer.lora_A.grad, "gradA_raw")
        same(layer.lora_B.grad, "gradB_raw")
        before = layer.merged_weight().double()
        method.before_step(model, optimizer, t)
        assert (layer.merged_weight().double() - before).abs().max() <= 1e-6
        for name, parameter in (("W", layer.weight), ("A", layer.lora_A), ("B", layer.lora_B)):
            same(parameter, f"{name}_after_switch")
        for name in "AB":
            exact(counters[name], f"fixed{name}_after_switch")
            exact(getattr(layer.switching, f"frozen_{name}"), f"fixed{name}_end")
            same(getattr(layer, f"lora_{name}").grad, f"grad{name}_used")
        for group in optimizer.param_groups:
            group["lr"] = float(numbers["lr"][t])
        optimizer.step()
        optimizer.zero_grad()
        same(layer.weight, "W")
        for index, name in enumerate("AB"):
            parameter = getattr(layer, f"lora_{name}")
            same(parameter, name)
            same(getattr(layer.switching, f"candidates_{name}"), f"candidates_{name}")
            exact(getattr(layer.switching, f"selected_{name}"), f"selected_{name}")
            exact(optimizer.state[parameter]["step"], f"step_{name}")
            same(optimizer.state[parameter]["exp_avg"], f"exp_avg_{name}")
            same(optimizer.state[parameter]["exp_avg_sq"], f"exp_avg_sq_{name}")
            if "k_requested" in numbers:
                exact(layer.switching.pointers[index], f"ptr_{name}")
    weight = layer.weight.clone()
    torch.testing.assert_close(layer.merged_weight().cpu(), numbers["final.W_merged"], **tolerance)
    assert torch.equal(layer.weight, weight)


SCHEDULES = json.loads((GOLDEN / "schedule.json").read_text())


def schedule_of(case):
    return SwitchSchedule(
        case["interval"], case["rate"] * case["total"], case.get("typ", "exponential"), case.get("fix", False)
    )


@pytest.mark.parametrize("name", [name for name in SCHEDULES if not name.startswith("real_layer")])
def test_schedule(name):
    numbers, case = load_file(GOLDEN / "schedule.safetensors"), SCHEDULES[name]
    schedule, rank, warm = schedule_of(case), case["r"], case["warm"]
    if not schedule.fixed:  # the public run kept the rate of a schedule that it did not use
        assert np.allclose([schedule.rate(t) for t in range(1000)], numbers[f"{name}.rate"], rtol=0, atol=1e-12)
    expected = [schedule.expected_count(t, rank) for t in range(1000)]
    assert np.allclose(expected, numbers[f"{name}.expected"], rtol=0, atol=1e-12)
    uniforms = numbers[f"{name}.u"]
    for column in range(uniforms.shape[1]):
        requested = [schedule.requested_count(t, rank, float(u)) for t, u in enumerate(uniforms[:, column])]
        assert requested == numbers[f"{name}.k_requested"][:, column].tolist()
        done = []
        for t, count in enumerate(requested):
            frozen = sum(done[max(0, t - warm + 1) : t]) if warm > 1 else 0
            done.append(allowed_count(count, rank, frozen, candidates=10**6))
        assert done == numbers[f"{name}.k_done"][:, column].tolist()


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name.startswith("real_layer")])
def test_counts_of_a_real_layer(name):
    numbers, case = load_file(GOLDEN / "schedule.safetensors"), SCHEDULES[name]
    method, model, optimizer = method_for(
        nn.Linear(20, 24, bias=False),
        **{"rank": case["r"], "switch_lora_interval": case["interval"], "switch_lora_descent_rate": case["rate"]},
        **{"num_training_steps": case["total"], "adam_warm_step": case["warm"]},
    )
    layer, uniforms, done = model["attn"], numbers[f"{name}.u"], []
    method.uniform = lambda step, index: float(uniforms[step, index])
    requested = [method.requested_count(layer.rank, t, 0) for t in range(case["total"])]
    assert requested == numbers[f"{name}.k_requested"].flatten().tolist()
    for t in range(case["total"]):
        for factor in (layer.lora_A, layer.lora_B):
            factor.grad = torch.ones_like(factor)
        method.before_step(model, optimizer, t)
        done.append(optimizer.reported["switched_vectors"] // 2)
    assert done == numbers[f"{name}.k_done"].tolist()


def test_bounds():
    for m, n, rank, kind, bound_a, bound_b in load_file(GOLDEN / "init.safetensors")["bounds"].tolist():
        ours = (kaiming_bound(int(n)), 0.0) if kind else switchlora_bounds(int(m), int(n), int(rank))
        assert ours == pytest.approx((bound_a, bound_b), abs=1e-12)


@pytest.mark.parametrize("kind", ["switchlora", "origin_lora"])
def test_first_values(kind):
    """With the public code's random stream the pools are the public ones; so is everything that follows from them."""
    numbers = load_file(GOLDEN / "init.safetensors")
    expected = {name.split("adapter.")[1]: value for name, value in numbers.items() if f"{kind}.adapter" in name}
    linear = nn.Linear(16, 24)
    with torch.no_grad():
        linear.weight.copy_(numbers[f"{kind}.linear.weight"])
        linear.bias.copy_(numbers[f"{kind}.linear.bias"])
    layer = SwitchedLinear(linear, 4, 0.25)
    state = SwitchState(layer)
    generator = torch.Generator().manual_seed(0)
    for count in (3 * (24 * 16 + 24), 2 * 4 * 16, 24 * 4):  # what the public code draws before the pools
        torch.empty(count).uniform_(generator=generator)
    state.fill(layer, kind, generator, zero_b=False, shuffled=False)
    layer.add_candidates(state)
    for name in ("candidates_A", "candidates_B"):
        torch.testing.assert_close(getattr(state, name), expected[name], rtol=0, atol=1e-7)
    for name in ("lora_A", "lora_B", "weight", "bias"):
        torch.testing.assert_close(getattr(layer, name).detach(), expected[name], rtol=0, atol=1e-6)
    for name in "AB":
        assert getattr(state, f"selected_{name}").tolist() == expected[f"selected_{name}_indices_param"].tolist()
    assert state.pointers.tolist() == [int(expected[f"candidate_{name}_index_param"]) for name in "AB"]
    torch.testing.assert_close(layer.merged_weight(), numbers[f"{kind}.linear.weight"], rtol=0, atol=1e-6)


def test_wrapping_keeps_the_function_of_every_kind_of_layer():
    torch.manual_seed(0)
    for kind in ("switchlora", "origin_lora"):
        for shape in ((24, 16), (16, 24), (16, 16), (3, 40)):
            linear = nn.Linear(*shape, dtype=torch.float64)
            weight, x = linear.weight.detach().clone(), torch.randn(5, shape[0], dtype=torch.float64)
            expected = linear(x)
            for rank in (1, 2, min(shape), 100):
                _, model, _ = method_for(linear, rank=rank, init_lora_type=kind)
                layer = model["attn"]
                assert isinstance(layer, LowRankLinear) and layer.rank == min(rank, *shape)
                torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
                with torch.no_grad():
                    linear.weight.copy_(weight)
