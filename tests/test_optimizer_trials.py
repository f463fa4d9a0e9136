"""Methods written as one object of the optimizer, outside the package: its interface has a place for each of them.

Their numbers are those of golden/optimizer_trials.safetensors, and two FSDP2 ranks compute what one process does.
"""

import json
import subprocess
from pathlib import Path

import helpers
import optimizer_trial_ranks
import pytest
import torch
from optim_trials.apollo import GaussianProjection, ScaledGradient
from optim_trials.frugal import Frugal
from optim_trials.ldadam import LDAdam
from optim_trials.soap import Soap
from projection_helpers import parameter, set_gradients, through_a_file, train
from safetensors.torch import load_file
from test_distributed import TORCHRUN
from torch import distributed as dist
from torch import nn

from peft_pretraining.optim import LowRankOptimizer, PerLayerUpdates

FOLDER = Path(__file__).parent / "golden"
GOLDEN = load_file(FOLDER / "optimizer_trials.safetensors")
CASES = json.loads((FOLDER / "optimizer_trials.json").read_text())


def group_of(name, case):
    """Settings of a parameter group for a case."""
    settings = case["settings"]
    shared = {"betas": settings["betas"], "eps": settings["eps"], "weight_decay": settings["weight_decay"]}
    given = [GOLDEN[f"{name}/{part}"].double() for part in case["given"] if part.startswith("P_")]
    if case["method"] == "apollo":
        return {
            **shared,
            "rank": settings["rank"],
            "update_proj_gap": settings["gap"],
            "lift": ScaledGradient(settings["scale"], settings["granularity"], settings["gamma"]),
            "basis": GaussianProjection(given),
            "state_format": case.get("state_dtype", "weight"),
        }
    if case["method"] == "soap":
        return {**shared, "rule": Soap(settings["gap"], [GOLDEN[f"{name}/QL"].double(), GOLDEN[f"{name}/QR"].double()])}
    if case["method"] == "ldadam":
        return {**shared, "rule": LDAdam(settings["rank"], settings["rho"], settings["error_feedback"])}
    index = [GOLDEN[f"{name}/{part}"] for part in case["given"]]
    return {**shared, "rule": Frugal(settings["space"], settings["density"], settings["gap"], index)}


def trajectory(name, case):
    dtype = GOLDEN[f"{name}/W"].dtype
    weight = nn.Parameter(GOLDEN[f"{name}/W0"].to(dtype))
    optimizer = LowRankOptimizer([{"params": [weight], **group_of(name, case)}])
    weights = []
    for step in range(case["steps"]):
        optimizer.begin_update(step)
        optimizer.param_groups[0]["lr"] = float(GOLDEN[f"{name}/lr"][step])
        weight.grad = GOLDEN[f"{name}/G"][step].to(dtype)
        optimizer.step()
        weights.append(weight.detach().clone())
    return torch.stack(weights)


def units_apart(found, expected):
    """Distance of bfloat16 numbers in units in the last place."""
    one, other = (tensor.view(torch.int16).int() for tensor in (found, expected))
    assert ((one < 0) == (other < 0)).all()
    return (one - other).abs()


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_the_papers(name):
    case, expected = CASES[name], GOLDEN[f"{name}/W"]
    found = trajectory(name, case)
    assert found.dtype == expected.dtype
    if case["dtype"] == "float64":
        torch.testing.assert_close(found, expected, atol=case["atol_float64"], rtol=0)
    else:
        apart = units_apart(found, expected)
        assert (apart == 0).double().mean() >= case["fraction_equal"] and apart.max() <= case["max_ulp"]


OBJECTS = {
    "apollo": lambda: {"rank": 2, "update_proj_gap": 2, "lift": ScaledGradient(), "basis": GaussianProjection()},
    "soap": lambda: {"rule": Soap(gap=2)},
    "ldadam": lambda: {"rule": LDAdam(rank=2)},
    "frugal": lambda: {"rule": Frugal(density=0.5, gap=2)},
}
every_method = pytest.mark.parametrize("make", OBJECTS.values(), ids=OBJECTS)


def build(make, weights, **changes):
    named = [(f"layer{index}", weight) for index, weight in enumerate(weights)]
    return LowRankOptimizer([{"params": named, **make(), **changes}], lr=0.01, weight_decay=0.1)


@every_method
def test_a_saved_state_goes_on(make):
    weights = [parameter((6, 5), 0), parameter((5, 6), 1)]
    optimizer = build(make, weights)
    train(optimizer, weights, 0, 5)
    others = [nn.Parameter(weight.detach().clone()) for weight in weights]
    fresh = build(make, others)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    train(optimizer, weights, 5, 9)
    train(fresh, others, 5, 9)
    assert all(torch.equal(*pair) for pair in zip(weights, others, strict=True))
    plain = LowRankOptimizer([{"params": [(f"layer{index}", each) for index, each in enumerate(others)]}])
    with pytest.raises(ValueError, match=r"^state of another rank, proj_type or rule: (rule|basis) '"):
        plain.load_state_dict(optimizer.state_dict())


@every_method
def test_a_state_is_loaded_in_place(make):
    """As a checkpoint does, into the tensors that a new optimizer has, after it took the checkpoint's form."""
    weights = [parameter((6, 5), 0), parameter((5, 6), 1)]
    optimizer = build(make, weights)
    train(optimizer, weights, 0, 5)
    others = [nn.Parameter(weight.detach().clone()) for weight in weights]
    fresh, names = build(make, others), ("one", "other")
    saved = {f"{name}.{key}" for name, weight in zip(names, weights, strict=True) for key in optimizer.state[weight]}
    fresh.adopt_saved_form(saved, dict(zip(others, names, strict=True)))
    for weight, other in zip(weights, others, strict=True):
        assert fresh.state[other].keys() == optimizer.state[weight].keys()
        for key, value in optimizer.state[weight].items():
            fresh.state[other][key].copy_(value)
    train(optimizer, weights, 5, 9)
    train(fresh, others, 5, 9)
    assert all(torch.equal(*pair) for pair in zip(weights, others, strict=True))


@every_method
def test_per_layer_updates_are_the_same(make):
    runs = []
    for per_layer in (False, True):
        layers = nn.ModuleList([nn.Linear(5, 6, bias=False), nn.Linear(6, 5, bias=False)]).double()
        for index, layer in enumerate(layers):
            layer.weight.data = parameter(layer.weight.shape, index).data
        optimizer = build(make, [layer.weight for layer in layers])
        updates = PerLayerUpdates(optimizer) if per_layer else None
        for step in range(6):
            optimizer.begin_update(step)
            for index in range(2):
                optimizer.begin_micro_batch(index, 2)
                x = torch.randn(8, 5, generator=torch.Generator().manual_seed(2 * step + index), dtype=torch.float64)
                (layers[1](layers[0](x)) - x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert updates is None or updates.parameters == {layer.weight for layer in layers}
        runs.append([layer.weight.detach() for layer in layers])
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=0)  # micro-batches are added up in float32


def test_moments_of_blocks_come_and_go():
    """One of two matrices is inside at a time."""
    weights = [parameter((6, 5), 0), parameter((5, 6), 1)]
    optimizer = build(OBJECTS["frugal"], weights)
    inside = set()
    for step in range(12):
        train(optimizer, weights, step, step + 1)
        (chosen,) = [index for index, weight in enumerate(weights) if "exp_avg" in optimizer.state[weight]]
        inside.add(chosen)
    assert inside == {0, 1}


def test_clipping_scales_what_the_lift_reads():
    """By the norm of whole gradients."""
    weight, other = parameter((6, 5)), parameter((6, 5))
    runs = [build(OBJECTS["apollo"], [each]) for each in (weight, other)]
    for step in range(4):
        for each, optimizer in zip((weight, other), runs, strict=True):
            set_gradients([each], step)
            torch.testing.assert_close(optimizer.grad_norm(), each.grad.norm())
            if each is weight:
                optimizer.scale_(torch.tensor(0.3, dtype=torch.float64))
            else:
                each.grad *= 0.3
            optimizer.step()
        torch.testing.assert_close(weight, other)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    launched = subprocess.run(
        [*TORCHRUN, optimizer_trial_ranks.__file__, str(folder)],
        **{"env": helpers.child_environment(), "cwd": helpers.PROJECT, "capture_output": True, "text": True},
        timeout=240,
    )
    assert launched.returncode == 0, launched.stderr[-5000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", optimizer_trial_ranks.CASES)
def test_two_ranks_compute_what_one_process_does(ranks, name):
    expected, _ = optimizer_trial_ranks.train(optimizer_trial_ranks.CASES[name](), divided=False)
    for weights, _ in (rank[name] for rank in ranks):
        for one, other in zip(weights, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-11, rtol=0)


@pytest.fixture(scope="module")
def alone():
    """Divided over a single device: all collectives take place."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield {name: optimizer_trial_ranks.train(case(), True) for name, case in optimizer_trial_ranks.CASES.items()}
    dist.destroy_process_group()


@pytest.mark.parametrize("name", optimizer_trial_ranks.CASES)
def test_one_device_that_has_everything_changes_nothing(alone, name):
    expected, _ = optimizer_trial_ranks.train(optimizer_trial_ranks.CASES[name](), divided=False)
    for one, other in zip(alone[name][0], expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=0)


def test_matrices_share_the_collectives_of_a_phase(alone):
    """Of the last update, in which no basis is made: one for all three matrices, or one for each phase."""
    counts = {name: counted[-1] for name, (_, counted) in alone.items()}
    assert counts == {
        "apollo": 1,
        "apollo mini": 1,
        "soap": 1,  # its matrices, gathered
        "ldadam": 1,
        "frugal": 0,
        "fira": 1,
        "apollo, built in": 1,
        "apollo mini, built in": 1,
        "foam": 0,
        "racs": 7,  # whichever side is divided: a sum an iteration, a largest entry, a norm
        "racs, divided by rows": 7,
        "alice": 2,
        "ldadam, built in": 1,
        "frugal, built in": 0,
        "adafactor": 3,
        "adafactor, both sides": 0,
        "online PCA": 2,  # gathering and a sum
        "online PCA, divided by rows": 2,
        "golore": 0,
        "bfloat16, torch's AdamW": 0,
        "bfloat16, SGD": 0,
        "bfloat16, GaLore": 0,
        "torch's AdamW": 0,
    }
