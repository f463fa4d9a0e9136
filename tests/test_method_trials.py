"""Four methods that are not built in, each a folder with formulas from optim_trials/: nothing else knows of them.

Their packages lie in method_trials/, with the entry points of an installed one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import helpers
import pytest

TESTS = helpers.PROJECT / "tests"
ROUNDED_OTHERWISE = ("two_processes_are_one", "where_two_were_stopped", "accumulated_micro_batches")
"""Checks that compare runs whose gradients are rounded otherwise.

SOAP's first eigenvectors of a Gram matrix without full rank, as that of an MLP's longer side, are arbitrary beyond it,
and what Adam does along them follows rounding. That it computes the same on two devices for equal gradients is in
test_optimizer_trials.py.
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "without", "at_least"),
    [("apollo", (), 29), ("ldadam", (), 28), ("frugal", (), 25), ("soap", ROUNDED_OTHERWISE, 24)],
)
def test_what_every_method_must_do(name, without, at_least):
    path = os.pathsep.join(map(str, (TESTS / "method_trials", helpers.PROJECT, TESTS)))
    chosen = ["--method", f"{name}_trial", "-k", " and ".join(f"not {each}" for each in without)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/conformance", *chosen],
        env=helpers.child_environment(PYTHONPATH=path),
        cwd=helpers.PROJECT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-5000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= at_least and "skipped" not in done.stdout
