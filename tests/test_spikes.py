"""Spikes: the statistics against a reference, and runs of the trainer with bad batches in them."""

from __future__ import annotations

import contextlib
import json
import math

import helpers
import numpy as np
import pytest
import torch
from helpers import GALORE, RESUME, records, run

from peft_pretraining.data.blocks import TokenBlocks
from peft_pretraining.training import spikes

BAD = (54, 59)
"""0-based updates whose batches are noise."""


@pytest.fixture
def soon(monkeypatch):
    """Statistics that count from the tenth update on."""
    monkeypatch.setattr(spikes, "FIRST_UPDATES", 10)
    monkeypatch.setattr(spikes, "WINDOW", 15)


@contextlib.contextmanager
def bad_batches(updates=BAD, per_update=8):
    """Uniformly random tokens instead of the walks, for all samples of these updates: the real data path to the end."""
    from peft_pretraining.data import blocks

    original = blocks.MicroBatchSampler.__iter__, TokenBlocks.__getitems__

    def marked(sampler):
        position = sampler.start
        for batch in original[0](sampler):
            yield [-1 - index for index in batch] if position // per_update in updates else batch
            position += sampler.batch_size * sampler.group.world_size

    def read(self, indices):
        batch = original[1](self, [index if index >= 0 else -1 - index for index in indices])
        if indices[0] < 0:
            noise = torch.Generator().manual_seed(0)
            batch["input_ids"] = torch.randint(0, 128, batch["input_ids"].shape, generator=noise)
        return batch

    blocks.MicroBatchSampler.__iter__, TokenBlocks.__getitems__ = marked, read
    try:
        yield
    finally:
        blocks.MicroBatchSampler.__iter__, TokenBlocks.__getitems__ = original


def test_statistics_are_of_the_last_values():
    statistics, values = {}, np.random.default_rng(0).normal(5, 0.5, 2000)
    for value in values:
        spikes.observe(statistics, {"loss": value}, 10.0, False)
    weights = (1 - 1 / spikes.WINDOW) ** np.arange(len(values))[::-1]
    mean = np.average(values, weights=weights)
    assert statistics["loss"][0] == pytest.approx(mean, abs=0.01)
    assert math.sqrt(statistics["loss"][1]) == pytest.approx(
        math.sqrt(np.average((values - mean) ** 2, weights=weights)), rel=0.05
    )
    few = {}
    for value in values[:50]:
        spikes.observe(few, {"loss": value}, 10.0, False)
    assert few["loss"][:2] == pytest.approx([values[:50].mean(), values[:50].var()])  # plain until the window is full


def test_what_is_a_spike():
    rng, statistics = np.random.default_rng(1), {}
    ordinary = rng.normal(3, 0.1, 1000)
    assert [spikes.observe(statistics, {"loss": value}, 6.0, False) for value in ordinary] == [[]] * 1000
    (line,) = spikes.observe(statistics, {"loss": 4.5, "gradient norm": 1e9}, 6.0, False)  # the norm's first value
    assert line.startswith("loss 4.5 is 1") and "standard deviations above" in line
    assert spikes.observe(statistics, {"loss": 4.5}, 6.0, False)  # the first one does not hide it
    assert not spikes.observe(statistics, {"loss": 1.0}, 6.0, False)  # below
    before = json.dumps(statistics)
    assert not spikes.observe(statistics, {"loss": math.nan, "gradient norm": math.inf}, 6.0, False)
    assert json.dumps(statistics) == before


def test_a_skipped_update_is_not_learnt_from():
    statistics = {"loss": [3.0, 0.01, 500], "gradient norm": [1.0, 0.01, 500]}
    before = json.dumps(statistics)
    assert len(spikes.observe(statistics, {"loss": 4.0, "gradient norm": 1.1}, 6.0, True)) == 1
    assert json.dumps(statistics) == before
    assert spikes.observe(statistics, {"loss": 3.1, "gradient norm": 1.1}, 6.0, True) == []
    assert statistics["loss"][2] == 501


def test_nothing_is_a_spike_at_first_nor_in_data_that_hardly_varies():
    statistics = {}
    assert not any(spikes.observe(statistics, {"loss": 10.0**i}, 6.0, False) for i in range(spikes.FIRST_UPDATES))
    statistics = {}
    for _ in range(200):
        spikes.observe(statistics, {"loss": 2.0}, 6.0, False)
    assert not spikes.observe(statistics, {"loss": 2.01}, 6.0, False)
    assert spikes.observe(statistics, {"loss": 2.1}, 6.0, False)


def test_a_lasting_rise_is_adopted():
    rng, statistics = np.random.default_rng(2), {}
    for value in rng.normal(3, 0.1, 500):
        spikes.observe(statistics, {"loss": value}, 6.0, False)
    found = [bool(spikes.observe(statistics, {"loss": value}, 6.0, False)) for value in rng.normal(5, 0.1, 300)]
    assert found[0] and not any(found[100:]) and 3 < sum(found) < 60


def test_a_bad_batch_is_logged_and_recorded(command, tmp_path, capsys, soon):
    with bad_batches():
        assert run(command(num_training_steps=70)) == 0
    found = {record["update_step"] - 1: record for record in records(tmp_path / "run") if "spike" in record}
    assert set(BAD) <= set(found)
    assert found[54]["spike"].startswith("loss ") and "skipped" not in found[54]
    assert f"spike in update 54: {found[54]['spike']}" in capsys.readouterr().err
    counters = helpers.counters(tmp_path / "run" / "model_70")
    assert (counters["skipped_spikes"], counters["skipped_updates"]) == (0, 0)


@pytest.mark.parametrize("method", [{}, GALORE], ids=["full_rank", "galore"])
def test_skipped_updates_leave_no_trace_in_the_weights(command, tmp_path, capsys, soon, method):
    """As if the batches had been named with --skip_batches: both runs see the same noise, neither learns from it."""
    settings = {**method, "num_training_steps": 70}
    with bad_batches():
        assert run(command(**settings, skip_spikes=8)) == 0
        assert run(command(**settings, skip_batches="54,59", save_dir=tmp_path / "named")) == 0
    assert "skipped update 54: loss" in capsys.readouterr().err
    found = [record for record in records(tmp_path / "run") if "spike" in record]
    assert [record["update_step"] - 1 for record in found] == [*BAD]
    assert all(record["skipped"] for record in found)
    ours, theirs = (folder / "model_70" for folder in (tmp_path / "run", tmp_path / "named"))
    assert helpers.different_tensors(ours, theirs) == []
    counters = helpers.counters(ours)
    assert (counters["skipped_spikes"], counters["skipped_updates"]) == (2, 0)


def test_stopping_in_between_changes_nothing(command, tmp_path, soon):
    """Between the two bad batches, and within a row of them: statistics and counts are part of the state."""
    flags = {"num_training_steps": 70, "skip_spikes": 8}
    updates = (54, 55, 65)
    with bad_batches(updates):
        assert run(command(**flags, save_dir=tmp_path / "undisturbed")) == 0
        helpers.stop_after(55, command(**flags))
        assert helpers.counters(tmp_path / "run" / "model_55")["spikes_in_a_row"] == 1
        helpers.stop_after(60, [*command(**flags), *RESUME])
        assert run([*command(**flags), *RESUME]) == 0
    helpers.assert_same_run(tmp_path / "run", tmp_path / "undisturbed")
    skipped = [record["update_step"] - 1 for record in records(tmp_path / "run") if record.get("skipped")]
    assert skipped == [*updates]


def test_a_run_that_has_diverged_does_not_skip_for_ever(command, tmp_path, capsys, soon):
    with bad_batches(range(60, 400)):
        assert run(command(num_training_steps=400, skip_spikes=8)) == 1
    message = capsys.readouterr().err
    assert f"more than {spikes.MOST_IN_A_ROW} updates in a row had a spike (--skip_spikes)" in message
    assert records(tmp_path / "run")[-1]["update_step"] == 60 + spikes.MOST_IN_A_ROW + 1


def test_limits():
    assert spikes.over_the_limit(10, 10, 1000) is None
    assert spikes.over_the_limit(11, 11, 1000).startswith("more than 10 updates in a row")
    assert spikes.over_the_limit(1, 50, 1000) is None
    assert spikes.over_the_limit(1, 51, 1000).startswith("51 of 1000 updates, more than 5%, had a spike")


def test_a_checkpoint_from_before_spikes_were_counted_is_resumed(command, tmp_path):
    helpers.stop_after(10, command())
    state = tmp_path / "run" / "model_10" / "training_state.json"
    counters = json.loads(state.read_text())
    for name in ("skipped_spikes", "spikes_in_a_row", "spike_statistics"):
        del counters[name]
    state.write_text(json.dumps(counters))
    manifest = state.with_name("manifest.json")
    files = json.loads(manifest.read_text())["files"]
    from peft_pretraining.checkpoint.run_dir import file_digest

    manifest.write_text(json.dumps({"files": {**files, state.name: file_digest(state)}}))
    assert run([*command(), *RESUME]) == 0


def test_per_layer_updates_cannot_be_skipped(command, capsys):
    assert run(command(method="galore", rank=4, per_layer="True", skip_spikes=5)) == 2
    assert "--skip_spikes 5 cannot go with per-layer updates" in capsys.readouterr().err
    assert run(command(skip_spikes="-1", step_timeout="soon")) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: --skip_spikes must be at least 0, got '-1'",
        "error: --step_timeout must be a number, got 'soon'",
    ]
