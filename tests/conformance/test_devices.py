"""Two processes end where one does: with DDP, and with FSDP2 where a method declares it. One launch makes all runs."""

from __future__ import annotations

import json
import subprocess
import sys

import helpers
import pytest

from conformance.conftest import chosen
from conformance.runs import CASES, TOTAL_BATCH, allowing, assert_same_weights, each_case, rounding

LAYOUTS = {"ddp": CASES, "fsdp": [case for case in allowing("fsdp") if case.rule != "adam_zero"]}


@pytest.fixture(scope="session")
def launched(request, runs):
    """A function that gives the folder of a case's run by two processes; `ValueError` if there is none."""
    method, made = chosen(request.config), {}
    quick = all(item.get_closest_marker("slow") is None for item in request.session.items)

    def folder(layout, case):
        if layout not in made:
            made[layout] = runs.folder / layout
            made[layout].mkdir()
            cases = [
                {
                    "argv": runs.command(
                        each, made[layout] / str(each), batch_size=TOTAL_BATCH // 2, distributed_type=layout
                    )
                }
                for each in LAYOUTS[layout]
                if method in (None, each.method) and (each.is_first or not quick)
            ]
            launch(made[layout] / "cases.json", cases)
        return made[layout] / str(case)

    return folder


def launch(path, cases) -> None:
    path.write_text(json.dumps(cases))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, helpers.__file__, str(path)],
        env=helpers.child_environment(),
        cwd=helpers.PROJECT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-30000:]


@pytest.mark.timeout(600)  # of the one launch for all
@each_case(LAYOUTS["ddp"])
def test_two_ddp_ranks_are_one_process(runs, launched, case):
    check(runs, launched("ddp", case), case)


@pytest.mark.timeout(600)
@each_case(LAYOUTS["fsdp"])
def test_two_fsdp2_ranks_are_one_process(runs, launched, case):
    check(runs, launched("fsdp", case), case)


def check(runs, folder, case) -> None:
    one = runs(case)
    assert_same_weights(folder / one.checkpoint.name, one.checkpoint, rounding(one.optimizer))
