"""Two methods that are not built in, each a folder with formulas from optim_trials/: nothing else knows of them.

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


@pytest.mark.slow
@pytest.mark.parametrize(("name", "at_least"), [("apollo", 29), ("ldadam", 28)])
def test_what_every_method_must_do(name, at_least):
    path = os.pathsep.join(map(str, (TESTS / "method_trials", helpers.PROJECT, TESTS)))
    chosen = ["--method", f"{name}_trial"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/conformance", *chosen],
        env=helpers.child_environment(PYTHONPATH=path),
        cwd=helpers.PROJECT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-5000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= at_least and "skipped" not in done.stdout
