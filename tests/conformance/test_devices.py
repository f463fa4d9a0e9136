"""Two processes end where one does, with DDP, and with FSDP2 where a method declares it; and one goes on from there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from launching import launch

from conformance.runs import (
    CASES,
    TOTAL_BATCH,
    UPDATES,
    Case,
    Runs,
    allowing,
    assert_same_weights,
    inside_backward,
    rounding,
)

HALF_WAY = UPDATES // 2
"""A checkpoint of the runs that are divided over devices."""


@dataclass(frozen=True)
class Layout:
    """Two processes: of which cases, with what, and what a run by one process has in common with theirs."""

    cases: Sequence[Case]
    flags: Mapping[str, Any]
    shared: Callable[[Case], dict[str, Any]] = lambda case: {}
    quick: bool = True


DIVIDED = [case for case in allowing("fsdp") if case.is_first]
DIVIDED_NARROW = [case for case in DIVIDED if case.spec.allows.stochastic_rounding]
FSDP, HSDP = {"distributed_type": "fsdp"}, {"distributed_type": "fsdp", "replicas": 2}
MIXED, ROUNDED = ({"dtype": "auto", "precision": name} for name in ("mixed", "bf16_sr"))
NARROW = {
    "fsdp, mixed": Layout(DIVIDED, {**FSDP, **MIXED}, lambda case: MIXED, quick=False),
    "fsdp, bf16_sr": Layout(DIVIDED_NARROW, {**FSDP, **ROUNDED}, lambda case: ROUNDED, quick=False),
    "hsdp, mixed": Layout(DIVIDED, {**HSDP, **MIXED}, lambda case: MIXED, quick=False),
    "hsdp, bf16_sr": Layout(DIVIDED_NARROW, {**HSDP, **ROUNDED}, lambda case: ROUNDED, quick=False),
}
"""Of which one process and two compute the same but for the rounding of activations to bfloat16."""
LAYOUTS = {
    "ddp": Layout(CASES, {"distributed_type": "ddp"}),
    "fsdp": Layout(allowing("fsdp"), {"distributed_type": "fsdp", "save_every": HALF_WAY}),
    "ddp, whole gradients": Layout(allowing("projected_gradient"), {"reduce_low_rank": False}, quick=False),
    "ddp, per layer": Layout(allowing("per_layer"), {"per_layer": True}, inside_backward, quick=False),
}


@pytest.fixture(scope="session")
def launched(request, runs) -> Callable[[str, Case], Path]:
    """A function that gives the folder of a run by two processes. One launch makes those of all tests that were asked
    for: starting processes costs more than training."""
    asked_for = [item.callspec.params for item in request.session.items if "launched" in item.fixturenames]
    pairs = dict.fromkeys((params["layout"], params["case"]) for params in asked_for)
    return _launch(list(pairs), runs)


def _launch(asked_for: list[tuple[str, Case]], runs: Runs) -> Callable[[str, Case], Path]:
    folder = runs.folder / "two processes"
    folder.mkdir()
    argvs = []
    for name, case in asked_for:
        layout = (LAYOUTS | NARROW)[name]
        flags = {**layout.shared(case), **layout.flags, "batch_size": TOTAL_BATCH // 2}
        argvs.append(runs.command(case, folder / f"{name} {case}", **flags))
    launch(folder / "launch", 2, [{"argv": argv} for argv in argvs], timeout=900)
    return lambda layout, case: folder / f"{layout} {case}"


def each_layout(*names: str):
    """Runs a test for every case of these layouts. The first test waits for the runs of all."""
    params = [
        pytest.param(name, case, id=f"{name}-{case}", marks=[pytest.mark.slow] * (not (case.is_first and layout.quick)))
        for name, layout in (LAYOUTS | NARROW).items()
        if name in names
        for case in layout.cases
    ]
    return lambda test: pytest.mark.timeout(1000)(pytest.mark.parametrize(("layout", "case"), params)(test))


@each_layout(*LAYOUTS)
def test_two_processes_are_one(runs, launched, layout, case):
    one = runs(case, **LAYOUTS[layout].shared(case))
    assert_same_weights(launched(layout, case) / one.checkpoint.name, one.checkpoint, rounding(one.optimizer))


@each_layout(*NARROW)
def test_two_processes_learn_as_one_does_in_bfloat16(runs, launched, layout, case):
    one, folder = runs(case, **NARROW[layout].shared(case)), launched(layout, case)
    (_, before), (_, after) = helpers.evaluations(folder)
    assert after < before - 0.05 and [after, before] == pytest.approx(one.losses[::-1], abs=0.05)
    dtypes = {value.dtype for name, value in helpers.tensors(folder / one.checkpoint.name).items() if "_proj.w" in name}
    assert torch.float64 not in dtypes and (torch.bfloat16 in dtypes) == ("bf16_sr" in layout), dtypes


@each_layout("fsdp")
def test_one_process_goes_on_where_two_were_stopped(runs, launched, layout, case, tmp_path):
    """State is put together again by how it says that it is divided."""
    checkpoint = f"model_{HALF_WAY}"
    shutil.copytree(launched(layout, case) / checkpoint, tmp_path / checkpoint)
    assert helpers.run([*runs.command(case, tmp_path), *helpers.RESUME]) == 0
    one = runs(case)
    assert helpers.updates(tmp_path)[0][0] == HALF_WAY + 1, "it began anew"
    assert_same_weights(tmp_path / one.checkpoint.name, one.checkpoint, rounding(one.optimizer))
