"""What two ranks hand to collectives in an update, by method: counted by the benchmark, compared with the formula."""

from __future__ import annotations

import json
import subprocess
import sys

import helpers
import pytest
from conftest import write_model

RANK, FLOAT = 4, 4


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("communication")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["benchmarks/communication.py", "--model_config", str(write_model(folder / "llama.json"))]
    launched = subprocess.run(
        [*torchrun, *command, "--rank", str(RANK), "--gap", "5", "--out", str(folder / "rows.json")],
        **{"env": helpers.child_environment(), "cwd": helpers.PROJECT, "capture_output": True, "text": True},
        timeout=200,
    )
    assert launched.returncode == 0, launched.stderr
    return {row["method"]: row for row in json.loads((folder / "rows.json").read_text())}


# The model of `write_model`: 2 layers of 4 weights 32 x 32 and 3 of 64 x 32; embedding, head 128 x 32; 5 norms of 32.
PROJECTED = 2 * (4 * 32 * 32 + 3 * 64 * 32)
LOW_RANK = 2 * RANK * (4 * 32 + 3 * 64)
DENSE = 2 * 128 * 32 + 5 * 32


@pytest.mark.parametrize("method", ["galore", "golore"])
def test_between_refreshes_only_low_rank_gradients_are_reduced(rows, method):
    assert rows[method]["bytes_ordinary_update"] == FLOAT * (DENSE + LOW_RANK)
    assert rows[method]["bytes_refresh_update"] == FLOAT * (DENSE + PROJECTED)


@pytest.mark.parametrize("method", ["full_rank", "online_subspace_descent"])
def test_whole_gradients_are_reduced_where_the_method_needs_them(rows, method):
    assert rows[method]["bytes_ordinary_update"] == rows[method]["bytes_refresh_update"] == FLOAT * (DENSE + PROJECTED)


def test_the_adapter_form_reduces_its_trained_factors(rows):
    assert rows["golore_adapter"]["bytes_ordinary_update"] == FLOAT * rows["golore_adapter"]["trained_parameters"]
