"""Runs with projected gradients that are stopped around refreshes, and go on without a changed bit."""

from __future__ import annotations

import helpers
import pytest
from helpers import RESUME, refreshes, stop_after

SMALL = {
    "rank": 4,
    "update_proj_gap": 4,
    "num_training_steps": 14,
    "eval_every": 7,
    "save_every": 7,
    "eval_tokens": 256,
}
GALORE, GOLORE = {"method": "galore"}, {"method": "golore"}
DESCENT = {"method": "online_subspace_descent"}
PER_LAYER = {"per_layer": True}
TOGETHER = {"stagger_refresh": False}
IN_8_BITS = {"basis_dtype": "int8", "gradient_sum_dtype": "int8", "precision": "bf16"}
ADAPTER = {"method": "golore_adapter", "rand_ratio": 0.5, "optimizer": "adamw"}

CASES = {
    # name: (flags, updates after which the run is stopped, {update: last refreshes by then})
    "gram": (GALORE, (4, 5, 7), {4: {0}, 5: {4}, 7: {4}}),  # just before, just after and away from a refresh
    "randomized": ({**GALORE, "svd_method": "randomized"}, (4, 5, 9), {5: {4}, 9: {8}}),  # starts from the old basis
    "both sides": ({**GALORE, "proj_type": "full", "svd_method": "exact"}, (4, 5), {5: {4}}),
    "staggered": ({**GALORE, "stagger_refresh": True, "svd_method": "subspace"}, (3, 5, 6), {3: {0, 1, 2}}),
    "first basis kept": ({**GALORE, "update_proj_gap": 0}, (1, 5), {5: {0}}),
    # Random from update 7 on: the refresh of update 8 is the first one, that of update 12 the second.
    "golore": ({**GOLORE, "rand_ratio": 0.5}, (7, 8, 9, 13), {8: {4}, 9: {8}, 13: {12}}),
    "golore, always random": ({**GOLORE, "rand_ratio": 0, "optimizer": "sgd", "lr": 1.0}, (4, 5), {5: {4}}),
    "random": ({**DESCENT, "proj_type": "random"}, (4, 5), {5: {4}}),
    "continuous": ({**DESCENT, "proj_type": "continuous"}, (1, 6), {6: {0}}),
    "continuous_adam8bit": ({**DESCENT, "proj_type": "continuous_adam8bit", "optimizer": "adamw8bit"}, (1, 6), {}),
    "continuous_adafactor": ({**DESCENT, "proj_type": "continuous_adafactor", "optimizer": "lion"}, (6,), {}),
    "adamw8bit": ({**GOLORE, "rand_ratio": 0, "optimizer": "adamw8bit"}, (4, 5), {5: {4}}),
    "adafactor": ({**GALORE, "optimizer": "adafactor", "beta1": 0.9}, (4, 5), {5: {4}}),
    "lion": ({**GALORE, "optimizer": "lion", "lr": 1e-3, "dtype": "bfloat16"}, (4, 5), {5: {4}}),
    "refresh_accumulation": ({**GALORE, "refresh_accumulation": 3}, (1, 4, 5), {4: {0}, 5: {4}}),
    "per-layer": ({**GALORE, **PER_LAYER}, (1, 4, 5, 6), {1: {0}, 4: {0, 1, 2, 3}}),
    "per-layer, together": ({**GALORE, **PER_LAYER, **TOGETHER, "batch_size": 2}, (4, 5), {4: {0}, 5: {4}}),
    "per-layer, golore": ({**GOLORE, **PER_LAYER, "rand_ratio": 0.5, "optimizer": "adamw8bit"}, (7, 9), {}),
    "per-layer, online PCA": ({**DESCENT, **PER_LAYER, "proj_type": "continuous_lion"}, (5,), {5: {0}}),
    "bases in 8 bits": ({**GOLORE, "rand_ratio": 0.5, "basis_dtype": "int8"}, (5, 9), {5: {4}, 9: {8}}),
    "per-layer, in 8 bits": ({**GALORE, **PER_LAYER, **IN_8_BITS, "batch_size": 2}, (1, 6), {1: {0}}),
    "per-layer, sums in bfloat16": (
        {**GALORE, **PER_LAYER, "precision": "bf16", "gradient_sum_dtype": "weight", "batch_size": 2},
        (5,),
        {},
    ),
    "golore_adapter, in bfloat16": ({**ADAPTER, "precision": "mixed", "batch_size": 4}, (5, 9), {}),
    "full-rank adafactor": ({"optimizer": "adafactor", "beta1": 0.9, "rank": None, "update_proj_gap": None}, (5,), {}),
    "full-rank adamw8bit": ({"optimizer": "adamw8bit", "rank": None, "update_proj_gap": None}, (5,), {}),
    "full-rank sgd": ({"optimizer": "sgd", "beta1": 0.9, "rank": None, "update_proj_gap": None}, (1, 5), {}),
    "full-rank lion": ({"optimizer": "lion", "rank": None, "update_proj_gap": None}, (5,), {}),
    "full-rank adam_zero": ({"optimizer": "adam_zero", "rank": None, "update_proj_gap": None}, (5,), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_stop_and_resume_changes_no_bit(command, tmp_path, name):
    flags, stops, last_refreshes = CASES[name]
    changes = {**SMALL, **flags}
    assert helpers.run(command(**changes, save_dir=tmp_path / "undisturbed")) == 0
    for updates in stops:
        stop_after(updates, [*command(**changes), *RESUME])
        saved = tmp_path / "run" / f"model_{updates}"
        if updates in last_refreshes:
            assert refreshes(saved) == last_refreshes[updates]
    assert helpers.run([*command(**changes), *RESUME]) == 0
    helpers.assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


def test_extra_batches_count_as_read(command, tmp_path):
    """Updates 0, 4, 8 and 12 read three total batches, the others one; a resumed run reads on from there."""
    changes = {**SMALL, **GALORE, "refresh_accumulation": 3}
    stop_after(5, command(**changes))
    counters = helpers.counters(tmp_path / "run" / "model_5")
    assert (counters["data_position"], counters["tokens_seen"]) == ((5 + 4) * 8, (5 + 4) * 8 * 64)
    assert helpers.run([*command(**changes), *RESUME]) == 0
    records = [record for record in helpers.records(tmp_path / "run") if "loss" in record]
    read = [record["tokens_seen"] // 512 for record in records]
    assert [b - a for a, b in zip([0, *read], read, strict=False)] == [3, 1, 1, 1] * 3 + [3, 1]
    for record in records:
        batches = 3 if record["update_step"] % 4 == 1 else 1
        assert record["throughput_tokens"] == pytest.approx(batches * 512 / record["step_time"])
    assert "refreshed_layers" in records[4] and "refreshed_layers" not in records[5]


def test_random_bases_need_no_extra_batches(command, tmp_path):
    """Only the first refresh, of update 0, is an SVD."""
    changes = {**SMALL, **GOLORE, "rand_ratio": 0.2, "refresh_accumulation": 3}
    assert helpers.run(command(**changes)) == 0
    assert helpers.counters(tmp_path / "run" / "model_14")["data_position"] == (14 + 2) * 8


@pytest.mark.parametrize(
    "change, message",
    [
        ({"method": "golore"}, "method 'galore' instead of 'golore'"),
        ({"optimizer": "sgd"}, "optimizer 'adamw' instead of 'sgd'"),
        ({"method": "online_subspace_descent", "proj_type": "random"}, "proj_type 'std' instead of 'random'"),
    ],
)
def test_another_kind_of_projection_does_not_continue_a_run(command, tmp_path, capsys, change, message):
    stop_after(1, command(**SMALL, **GALORE))
    assert helpers.run([*command(**{**SMALL, **GALORE, **change}), *RESUME]) == 2
    assert message in capsys.readouterr().err


def test_a_run_may_go_on_per_layer(command, tmp_path):
    """The state is the same: only the memory differs, and the clipping."""
    changes = {**SMALL, **GALORE, **TOGETHER, "clip_grad_norm": 0, "dtype": "float64"}
    assert helpers.run(command(**changes, save_dir=tmp_path / "ordinary")) == 0
    stop_after(6, command(**changes))
    assert helpers.run([*command(**changes, **PER_LAYER), *RESUME]) == 0
    for row, target in zip(helpers.updates(tmp_path / "run"), helpers.updates(tmp_path / "ordinary"), strict=True):
        assert row[1:] == pytest.approx(target[1:], rel=1e-9)
