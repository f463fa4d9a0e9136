"""What two ranks hand to collectives in an update, and hold, by method: the benchmarks' counts equal the formulas."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
from conftest import write_model

RANK, FLOAT = 4, 4
METHODS = ("full_rank", "galore", "golore", "online_subspace_descent", "lora", "golore_adapter")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("communication")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = ["--gap", "5", "--methods", ",".join(METHODS), "--layouts", "ddp-whole,ddp,fsdp"]
    return {(row["method"], row["layout"]): row for row in measure(folder, torchrun, "communication", flags)}


def measure(folder: Path, launcher: list[str], benchmark: str, flags: list[str]) -> list[dict]:
    out = folder / f"{benchmark}.json"
    shared = ["--model_config", str(write_model(folder / "llama.json")), "--rank", str(RANK), "--out", str(out)]
    launched = subprocess.run(
        [sys.executable, *launcher, f"benchmarks/{benchmark}.py", *shared, *flags],
        **{"env": helpers.child_environment(), "cwd": helpers.PROJECT, "capture_output": True, "text": True},
        timeout=200,
    )
    assert launched.returncode == 0, launched.stderr
    return json.loads(out.read_text())


# The model of `write_model`: 2 layers of 4 weights 32 x 32 and 3 of 64 x 32; embedding, head 128 x 32; 5 norms of 32.
PROJECTED = 2 * (4 * 32 * 32 + 3 * 64 * 32)
LOW_RANK = 2 * RANK * (4 * 32 + 3 * 64)
DENSE = 2 * 128 * 32 + 5 * 32
BOTH_FACTORS = 2 * RANK * (4 * (32 + 32) + 3 * (64 + 32))


WHOLE = FLOAT * (DENSE + PROJECTED)
GRAM = 2 * 7 * 32 * 32 * 8
"""Float64 Gram matrices of the shorter sides."""
AGREED = 2 * 7 * (2 * FLOAT + 2 * 8)
"""Of each projected weight whether G is finite and not zero, and ‖R‖² and ‖G‖² in float64: two calls for all."""


@pytest.mark.parametrize("method", ["galore", "golore"])
def test_between_refreshes_only_low_rank_gradients_are_reduced(rows, method):
    row = rows[method, "ddp"]
    assert row["all_reduce_bytes"] == row["bytes_ordinary_update"] == FLOAT * (DENSE + LOW_RANK)
    assert row["bytes_refresh_update"] == WHOLE


@pytest.mark.parametrize(
    "method, layout", [("full_rank", "ddp"), ("online_subspace_descent", "ddp"), ("galore", "ddp-whole")]
)
def test_whole_gradients_are_reduced_where_the_method_needs_them(rows, method, layout):
    row = rows[method, layout]
    assert row["all_reduce_bytes"] == row["bytes_ordinary_update"] == row["bytes_refresh_update"] == WHOLE


@pytest.mark.parametrize("method, refresh", [("full_rank", 0), ("galore", GRAM + AGREED), ("golore", GRAM + AGREED)])
def test_fsdp_gathers_weights_twice_and_reduces_gradients_once(rows, method, refresh):
    """Projected ones, too: their ordinary updates add nothing, refreshes a Gram matrix and four numbers each."""
    row = rows[method, "fsdp"]
    assert row["all_gather_bytes"] == 2 * WHOLE and row["reduce_scatter_bytes"] == WHOLE
    assert row["all_reduce_bytes"] == 0 and row["bytes_ordinary_update"] == 3 * WHOLE
    assert row["bytes_refresh_update"] == 3 * WHOLE + refresh


@pytest.mark.parametrize(
    "method, trained, reduced", [("lora", BOTH_FACTORS, 0), ("golore_adapter", LOW_RANK, PROJECTED)]
)
def test_fsdp_reduces_gradients_of_the_trained_factors(rows, method, trained, reduced):
    """Ordinary updates add nothing to that; a refresh each layer's gradient, and a Gram matrix. Bases are not moved."""
    row = rows[method, "fsdp"]
    assert row["all_gather_bytes"] == 2 * (WHOLE + FLOAT * trained)
    assert row["reduce_scatter_bytes"] == FLOAT * row["trained_parameters"] == FLOAT * (DENSE + trained)
    assert row["all_reduce_bytes"] == 0
    further = row["bytes_refresh_update"] - row["bytes_ordinary_update"]
    assert further == FLOAT * reduced + (GRAM if reduced else 0)


@pytest.mark.slow
def test_fsdp_holds_a_share_of_everything_but_the_bases(tmp_path):
    flags = ["--ranks", "2", "--methods", "full_rank,galore,switchlora", "--layouts", "ddp,fsdp"]
    rows = {(row["method"], row["layout"]): row for row in measure(tmp_path, [], "memory", flags)}
    bases, counters = FLOAT * 2 * 7 * RANK * 32, 8 * 64  # integers per weight: less than this in all
    for method, low_rank in (("full_rank", 0), ("galore", 1)):
        one = rows[method, "ddp"]
        assert one["weights_bytes"] == one["gradients_bytes"] == WHOLE
        assert 0 <= one["states_bytes"] - 2 * (FLOAT * (DENSE + LOW_RANK) if low_rank else WHOLE) < counters
        assert one["bases_bytes"] == low_rank * bases
        half = rows[method, "fsdp"]
        assert half["weights_bytes"] == half["gradients_bytes"] == WHOLE // 2
        assert half["bases_bytes"] == one["bases_bytes"]
        assert abs(2 * half["states_bytes"] - one["states_bytes"]) < counters
    one, half = rows["switchlora", "ddp"], rows["switchlora", "fsdp"]
    assert one["candidates_bytes"] > one["weights_bytes"] > 0  # which is what makes dividing them worthwhile
    for held in ("weights", "candidates", "gradients"):
        assert 2 * half[f"{held}_bytes"] == one[f"{held}_bytes"]
