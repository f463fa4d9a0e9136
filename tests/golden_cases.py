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

    `atol_float32` is absolute; `beyond_rounding` says what float32 loses of the movement.
    """
    case, expected, settings = CASES[name], GOLDEN[f"{name}/W"], _settings(name)
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


def beyond_rounding(name, build):
    """How far float32 gets from the numbers, and float64 arithmetic whose weights alone are rounded to float32 once an
    update, both as parts of the largest movement of an entry.

    The second is what any arithmetic loses, for these gradients. Where weights move by 0.005 in nine updates (FOAM's
    cases, racs_wide_zero_row) it is 7.0e-6 to 8.6e-6, in normuon_tall 1.6e-6, in all others below that. Decay is a
    rounding of its own in most methods, which costs up to 1.3 times as much where it shows.
    """
    expected = GOLDEN[f"{name}/W"]
    movement = (expected[-1] - GOLDEN[f"{name}/W0"]).abs().max()
    runs = [
        _trajectory(name, lambda weight: build(weight, _settings(name)), *dtypes)
        for dtypes in ((torch.float32,), (torch.float64, torch.float32))
    ]
    return [float((run.double() - expected).abs().max() / movement) for run in runs]


def _settings(name):
    settings = dict(CASES[name]["settings"])
    if "betas" in settings:
        settings["betas"] = tuple(settings["betas"])
    return settings


def _trajectory(name, build, dtype, kept=None):
    """Weights after each update, computed in `dtype` and rounded to `kept` in between."""
    weight = nn.Parameter(GOLDEN[f"{name}/W0"].to(dtype, copy=True))
    optimizer, weights = build(weight), []
    for grad, rate in zip(GOLDEN[f"{name}/G"], GOLDEN[f"{name}/lr"], strict=True):
        optimizer.param_groups[0]["lr"] = float(rate)
        weight.grad = grad.to(dtype)
        optimizer.step()
        if kept is not None:
            weight.data.copy_(weight.data.to(kept))
        weights.append(weight.detach().clone())
    return torch.stack(weights)
