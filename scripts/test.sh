#!/usr/bin/env bash
# Install what is missing, run the tests and check their coverage. Arguments go to pytest; with any, coverage is not
# checked: scripts/test.sh tests/test_resume.py -k sigterm. Tests marked slow are run by scripts/test_slow.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh

# Several processes whose threads spin while they wait, or that have a thread for every core each, starve each other.
export OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 WANDB_MODE=offline TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-true}
.venv/bin/ruff check .
.venv/bin/ruff format --check .
if (($#)); then
    exec .venv/bin/python -m pytest "$@"
fi
.venv/bin/coverage erase
# Two at a time: most tests wait for their own processes now and then. Tests of one file share what it sets up. In
# the order of their names: by their numbers of tests, files with few long tests would all come last.
.venv/bin/coverage run -m pytest -m "not slow" -n "${TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder
.venv/bin/coverage combine --quiet
.venv/bin/coverage report --fail-under=85
