"""Trajectories of golden/more_methods.*, for the tests of single methods."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

FOLDER = Path(__file__).parent / "golden"
GOLDEN = load_file(FOLDER / "more_methods.safetensors")
CASES = json.loads((FOLDER / "more_methods.json").read_text())


def cases_of(method):
    return [name for name, case in CASES.items() if case["method"] == method]


def given_of(name):
    """What a case prescribes, one for each refresh."""
    return [GOLDEN[f"{name}/{part}"] for part in CASES[name]["given"]]


def check(name, build):
    """Trains by the optimizer that `build` makes of a weight and the case's settings, and compares all updates."""
    case, expected = CASES[name], GOLDEN[f"{name}/W"]
    settings = dict(case["settings"])
    if "betas" in settings:
        settings["betas"] = tuple(settings["betas"])
    if case["dtype"] == "float64":
        for dtype, atol in ((torch.float64, case["atol_float64"]), (torch.float32, case["atol_float32"])):
            found = _trajectory(name, lambda weight: build(weight, dict(settings)), dtype)
            torch.testing.assert_close(found.double(), expected, atol=atol, rtol=0)
        return
    found = _trajectory(name, lambda weight: build(weight, dict(settings)), torch.bfloat16)
    one, other = (tensor.view(torch.int16).int() for tensor in (found, expected))
    assert ((one < 0) == (other < 0)).all()
    apart = (one - other).abs()
    assert (apart == 0).double().mean() >= case["fraction_equal"] and apart.max() <= case["max_ulp"]


def _trajectory(name, build, dtype):
    weight = nn.Parameter(GOLDEN[f"{name}/W0"].to(dtype))
    optimizer, weights = build(weight), []
    for grad, rate in zip(GOLDEN[f"{name}/G"], GOLDEN[f"{name}/lr"], strict=True):
        optimizer.param_groups[0]["lr"] = float(rate)
        weight.grad = grad.to(dtype)
        optimizer.step()
        weights.append(weight.detach().clone())
    return torch.stack(weights)
