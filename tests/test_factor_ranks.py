"""The methods with low-rank factors on two processes under the real torchrun (gloo)."""

from __future__ import annotations

import json
import subprocess
import sys

import helpers
import pytest
from conftest import write_blocks, write_model
from factor_helpers import FACTORS

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]  # one launch makes all the runs
UPDATES = 50
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
RUNS = {**FACTORS, "full_rank": {"method": "full_rank"}}
# No dropout: each rank draws its own.
CHANGES = {"relora": {"lora_dropout": 0, "relora": 10, "cycle_length": 10}, "golore_adapter": {"update_proj_gap": 10}}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank reported of each run, by name, and the folder of the runs; also by one process."""
    folder = tmp_path_factory.mktemp("ranks")
    data, model = write_blocks(folder / "data", validation=8), write_model(folder / "llama.json")

    def command(name, method, processes):
        settings = {
            **{"model_config": model, "dataset_path": data, "save_dir": folder / name, "workers": 0},
            **{"total_batch_size": 8, "batch_size": 4 // processes, "lr": 3e-3, "num_training_steps": UPDATES},
            **{"warmup_steps": 2, "eval_every": 50, "save_every": 50, "dtype": "float32"},
            **RUNS[method],
            **CHANGES.get(method, {}),
            **({"check_rank_sync": 7} if method != "full_rank" else {}),
        }
        return [str(part) for flag, value in settings.items() for part in (f"--{flag}", value)]

    for method in RUNS:
        assert helpers.run(command(f"one {method}", method, 1)) == 0
    (folder / "cases.json").write_text(json.dumps([command(method, method, 2) for method in RUNS]))
    launched = subprocess.run(
        [*TORCHRUN, str(helpers.PROJECT / "tests" / "factor_ranks.py"), str(folder / "cases.json")],
        **{"env": helpers.child_environment(), "cwd": helpers.PROJECT, "capture_output": True, "text": True},
        timeout=500,
    )
    assert launched.returncode == 0, helpers.last_words(launched.stderr)
    reports = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    return folder, dict(zip(RUNS, zip(*reports, strict=True), strict=True))


@pytest.mark.parametrize("method", FACTORS)
def test_the_ranks_hold_the_same_bits(ranks, method):
    """Weights, factors, pools, pointers, counters and optimizer state, after 50 updates."""
    one, other = ranks[1][method]
    assert (one["exit_code"], other["exit_code"]) == (0, 0)
    assert one["digest"] == other["digest"]
    seen = [record for record in helpers.records(ranks[0] / method) if "loss" in record]
    if "switchlora" in method:
        assert sum(record["switched_vectors"] for record in seen) > 500
    if method == "golore_adapter":
        assert [record["update_step"] for record in seen if "refreshed_layers" in record] == [1, 11, 21, 31, 41]


@pytest.mark.parametrize("method", FACTORS)
def test_two_processes_train_as_one(ranks, method):
    """Equal at first, to float32's sums in another order; then close, as each freeze and basis follows from them."""
    folder, _ = ranks
    one, two = (helpers.updates(folder / name) for name in (f"one {method}", method))
    assert len(one) == len(two) == UPDATES
    for row, expected in zip(one[:10], two[:10], strict=True):
        assert row == pytest.approx(expected, abs=1e-5)
    assert two[-1][1] == pytest.approx(one[-1][1], abs=1e-2)


def test_ordinary_updates_of_the_adapter_form_exchange_no_full_gradient(ranks):
    """Bytes handed to collectives: those of what is trained; once per gap those of the weights on top."""
    reports = {method: both[0] for method, both in ranks[1].items()}
    assert all(reports[method]["bytes"] == ranks[1][method][1]["bytes"] for method in reports)
    adapter, full = reports["golore_adapter"], reports["full_rank"]
    ordinary, refresh = 4 * adapter["trainable"], 4 * 2 * (4 * 32 * 32 + 3 * 32 * 64)
    sync = 2 * 8 * 14  # the checksums of 14 layers, twice
    for update, sent in enumerate(adapter["bytes"]):
        expected = ordinary + (refresh if update % 10 == 0 else 0) + (sync if update % 7 == 0 else 0)
        assert sent == expected, update
    assert full["bytes"] == [4 * full["trainable"]] * UPDATES
    assert ordinary < full["bytes"][0] - 0.8 * refresh
    for method in ("lora", "relora", "switchlora"):
        per_update = [sent - (sync if update % 7 == 0 else 0) for update, sent in enumerate(reports[method]["bytes"])]
        assert per_update == [4 * reports[method]["trainable"]] * UPDATES
