"""Two processes end where one does: with DDP, and with FSDP2 where a method declares it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import helpers
import pytest

from conformance.runs import CASES, TOTAL_BATCH, Case, Runs, allowing, assert_same_weights, rounding

LAYOUTS = {"ddp": CASES, "fsdp": allowing("fsdp")}


@pytest.fixture(scope="session")
def launched(request, runs) -> Callable[[str, Case], Path]:
    """A function that gives the folder of a run by two processes. One launch makes those of all tests that were asked
    for: starting processes costs more than training."""
    asked_for = [item.callspec.params for item in request.session.items if "launched" in item.fixturenames]
    return _launch([(params["layout"], params["case"]) for params in asked_for], runs)


def _launch(asked_for: list[tuple[str, Case]], runs: Runs) -> Callable[[str, Case], Path]:
    folder = runs.folder / "two processes"
    folder.mkdir()
    shared = {"batch_size": TOTAL_BATCH // 2}
    argvs = [
        runs.command(case, folder / f"{layout} {case}", **shared, distributed_type=layout) for layout, case in asked_for
    ]
    (folder / "cases.json").write_text(json.dumps([{"argv": argv} for argv in argvs]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, helpers.__file__, str(folder / "cases.json")],
        env=helpers.child_environment(),
        cwd=helpers.PROJECT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-30000:]
    return lambda layout, case: folder / f"{layout} {case}"


@pytest.mark.timeout(1000)  # the first one waits for all runs
@pytest.mark.parametrize(
    ("layout", "case"),
    [
        pytest.param(layout, case, id=f"{layout}-{case}", marks=() if case.is_first else pytest.mark.slow)
        for layout, cases in LAYOUTS.items()
        for case in cases
    ],
)
def test_two_processes_are_one(runs, launched, layout, case):
    one = runs(case)
    assert_same_weights(launched(layout, case) / one.checkpoint.name, one.checkpoint, rounding(one.optimizer))
