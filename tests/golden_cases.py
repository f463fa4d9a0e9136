"""Trajectories of every file in golden/ that has the format of more_methods.*, for the tests of methods."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

FOLDER = Path(__file__).parent / "golden"
_KEYS = {"method", "shape", "dtype", "steps", "settings", "given"}


def _load():
    """Cases by name, and tensors; a case whose name is taken has the file's name before its own."""
    cases, tensors = {}, {}
    for path in sorted(FOLDER.glob("*.json"), key=lambda path: (path.stem != "more_methods", path.stem)):
        found = json.loads(path.read_text())
        if not all(isinstance(case, dict) and case.keys() >= _KEYS for case in found.values()):
            continue
        own = load_file(path.with_suffix(".safetensors"))
        names = {name: f"{path.stem} {name}" if name in cases else name for name in found}
        cases |= {names[name]: case for name, case in found.items()}
        tensors |= {"/".join((names[key.split("/")[0]], key.split("/")[1])): value for key, value in own.items()}
    return cases, tensors


CASES, GOLDEN = _load()


def cases_of(method):
    return [name for name, case in CASES.items() if case["method"] == method]


def given_of(name):
    """What a case prescribes, one for each refresh."""
    return [GOLDEN[f"{name}/{part}"] for part in CASES[name]["given"]]


def check(name, build):
    """Trains by the optimizer that `build` makes of a weight and the case's settings, and compares all updates.

    `atol_float32` is absolute. Of the movement, float32 differs by up to 9e-6 in FOAM's cases and racs_wide_zero_row,
    whose weights move by 0.005 in nine updates, and by at most 1.2e-6 in others of elementwise rules. That is the
    rounding of the weights: half a unit in their last place, once an update, comes to 9e-6 to 1.5e-5 of such a
    movement over nine (as a random walk, from the largest weight). No arithmetic before it could be better.
    """
    case, expected = CASES[name], GOLDEN[f"{name}/W"]
    settings = dict(case["settings"])
    if "betas" in settings:
        settings["betas"] = tuple(settings["betas"])
    if case["dtype"] == "float64":
        for dtype, atol in ((torch.float64, 1e-12), (torch.float32, case["atol_float32"])):
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
