"""Projected optimizers with two processes (gloo) against one, and sharded optimizer states; see test_distributed.py."""

from __future__ import annotations

import json
import subprocess
from types import SimpleNamespace

import helpers
import pytest
from conftest import write_blocks, write_model
from helpers import REQUEUE, RESUME
from test_distributed import TORCHRUN, assert_close

QUICK = {
    "num_training_steps": 10,
    "eval_tokens": 512,
    "eval_every": 5,
    "save_every": 5,
    "rank": 4,
    "update_proj_gap": 4,
}
GALORE, GOLORE = {"method": "galore"}, {"method": "golore", "rand_ratio": 0.4}
DESCENT = {"method": "online_subspace_descent"}
PER_LAYER = {"per_layer": True, "clip_grad_norm": 0.3}
ACCUMULATED = {"batch_size": 2}  # of 8 sequences: two micro-batches with two processes, four with one
CASES = {
    "golore": GOLORE,
    "random": {**DESCENT, "proj_type": "random"},
    "continuous": {**DESCENT, "proj_type": "continuous"},
    "staggered": {**GALORE, "stagger_refresh": True, "svd_method": "randomized"},
    "refresh_accumulation": {**GALORE, "refresh_accumulation": 2, "optimizer": "sgd", "lr": 1.0},
    "adafactor": {**GALORE, "optimizer": "adafactor"},
    "per-layer": {**GALORE, **PER_LAYER, "stagger_refresh": False},
    "per-layer, accumulated": {**GALORE, **PER_LAYER, **ACCUMULATED, "stagger_refresh": False},
    "per-layer, golore": {**GOLORE, **PER_LAYER, **ACCUMULATED, "stagger_refresh": False},
    "per-layer, online PCA": {**DESCENT, **PER_LAYER, **ACCUMULATED},
    "adamw8bit": {**GALORE, "optimizer": "adamw8bit"},
    "adam_zero": {"optimizer": "adam_zero", "rank": None, "update_proj_gap": None},
}


pytestmark = pytest.mark.slow  # one launch makes all the runs; the fast tier has conformance/test_devices.py


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """All runs: in `one NAME` by one process, in `NAME` by two; what each rank reported, by name."""
    folder = tmp_path_factory.mktemp("distributed")
    data, model = write_blocks(folder / "data"), write_model(folder / "llama.json")

    def command(name, **changes):
        settings = {
            **{"model_config": model, "dataset_path": data, "save_dir": folder / name, "workers": 0},
            **{"batch_size": 4, "total_batch_size": 8, "lr": 3e-3, "warmup_steps": 2, "dtype": "float32"},
            **{**QUICK, **changes},
        }
        return [str(part) for flag, value in settings.items() if value is not None for part in (f"--{flag}", value)]

    for name, flags in CASES.items():
        assert helpers.run(command(f"one {name}", **flags)) == 0
    cases = {name: {"argv": command(name, **flags)} for name, flags in CASES.items()}
    for name in ("adam_zero", "per-layer"):
        stopped = command(f"stopped {name}", **CASES[name])
        cases[f"stopped {name}"] = {"argv": stopped, "signal": [1, 5]}
        cases[f"resumed {name}"] = {"argv": [*stopped, *RESUME]}
    # A gradient that is not finite on one rank alone, in the micro-batch that gives the first bases.
    poisoned = {**GALORE, **ACCUMULATED, "per_layer": True, "num_training_steps": 20, "save_every": 1, "eval_every": 20}
    for name, flags in {"poisoned": {}, "poisoned, random": {"method": "golore", "rand_ratio": 0}}.items():
        argv = command(name, **{**poisoned, **flags})
        cases[name] = {"argv": argv, "poison": [1, 0], "signal": [0, 2]}
    (folder / "cases.json").write_text(json.dumps(list(cases.values())))
    launched = subprocess.run(
        [*TORCHRUN, helpers.__file__, str(folder / "cases.json")],
        **{"env": helpers.child_environment(), "cwd": helpers.PROJECT, "capture_output": True, "text": True},
        timeout=240,
    )
    assert launched.returncode == 0, launched.stderr
    saved = folder / "stopped adam_zero" / "model_6"
    assert helpers.run(command("from two to one", **CASES["adam_zero"], resume_from=saved)) == 0
    reports = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    return SimpleNamespace(folder=folder, reports=dict(zip(cases, zip(*reports, strict=True), strict=True)))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(pairs, name):
    assert len(helpers.updates(pairs.folder / name)) == 10
    assert_close(pairs.folder / name, pairs.folder / f"one {name}")
    for one, two in zip(*(helpers.records(pairs.folder / folder) for folder in (f"one {name}", name)), strict=True):
        assert one.get("refreshed_layers") == two.get("refreshed_layers")
        assert one.get("basis_overlap_min", 0) == pytest.approx(two.get("basis_overlap_min", 0), abs=1e-3)
        # Random bases need no whole gradient, and where none is reduced nobody knows its norm.
        if "captured_energy_mean" in two or name not in ("golore", "random"):
            assert one.get("captured_energy_mean", 0) == pytest.approx(two.get("captured_energy_mean", 0), abs=1e-3)


def test_the_ranks_hold_the_same_bits(pairs):
    for name, reports in pairs.reports.items():
        assert reports[0]["digest"] == reports[1]["digest"], name
        if "adam_zero" not in name:  # whose states are divided
            assert reports[0]["state_digest"] == reports[1]["state_digest"], name


def test_a_run_that_was_stopped_goes_on_with_the_same_bits(pairs):
    for name in ("adam_zero", "per-layer"):
        assert [report["exit_code"] for report in pairs.reports[f"stopped {name}"]] == [REQUEUE, REQUEUE]
        helpers.assert_same_run(pairs.folder / f"stopped {name}", pairs.folder / name)
        for resumed, undisturbed in zip(pairs.reports[f"resumed {name}"], pairs.reports[name], strict=True):
            assert resumed["digest"] == undisturbed["digest"]
            assert resumed["state_digest"] == undisturbed["state_digest"]


def test_states_of_adam_zero_are_divided(pairs):
    """Over whole parameters: together no more than one process has, and neither rank much more than half."""
    (whole,) = {row["optimizer_state_bytes"] for row in records_of_evaluations(pairs.folder / "one adam_zero")}
    shares = [report["state_bytes"] for report in pairs.reports["adam_zero"]]
    assert sum(shares) == whole
    assert max(shares) < 0.6 * whole
    (recorded,) = {row["optimizer_state_bytes"] for row in records_of_evaluations(pairs.folder / "adam_zero")}
    assert recorded == shares[0]
    # All of them are saved, as by one process.
    one, two = (helpers.tensors(pairs.folder / name / "model_10") for name in ("one adam_zero", "adam_zero"))
    assert one.keys() == two.keys()
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-4
    assert all(two[name] == 10 for name in two if name.endswith(".step"))


def records_of_evaluations(folder):
    return [record for record in helpers.records(folder) if "optimizer_state_bytes" in record]


def test_divided_states_come_together_in_one_process(pairs):
    folder = pairs.folder / "from two to one"
    assert [row[0] for row in helpers.updates(folder)] == [7, 8, 9, 10]
    assert_close(folder, pairs.folder / "one adam_zero", after=6)


@pytest.mark.parametrize("name", ["poisoned", "poisoned, random"])
def test_a_gradient_that_is_not_finite_on_one_rank(pairs, name):
    """Both ranks skip the update, and refresh together in the next one."""
    folder = pairs.folder / name
    assert [report["exit_code"] for report in pairs.reports[name]] == [REQUEUE, REQUEUE]
    assert [record["update_step"] for record in helpers.records(folder) if record.get("skipped")] == [1]
    assert helpers.refreshes(folder / "model_1") == {-1}
    assert helpers.refreshes(folder / "model_2") == {1}
    assert len(helpers.updates(folder)) == 3
