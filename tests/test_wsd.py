"""Warm-up, stable, decay: one stable run serves runs of several lengths, and a decay is not begun twice."""

from __future__ import annotations

import helpers
import pytest

from peft_pretraining.config import ScheduleConfig, cli, schedule_problems
from peft_pretraining.config.schedule import decay_updates, has_begun_to_decay, rate_multiplier

WSD = {"scheduler": "wsd", "warmup_steps": 1, "decay_steps": 3}


def test_before_the_decay_the_rate_does_not_depend_on_the_length():
    for ratio, steps in ((0.2, None), (0.5, None), (0.2, 7)):
        config = ScheduleConfig("wsd", warmup_steps=5, decay_steps=steps, decay_ratio=ratio)
        begins = {total: total - decay_updates(config, total) for total in (20, 30, 50)}
        runs = {total: [rate_multiplier(t, config, total) for t in range(total)] for total in begins}
        for one, other in ((20, 30), (30, 50)):
            shared = min(begins[one], begins[other]) + 1
            assert runs[one][:shared] == runs[other][:shared]
        assert all(run[begins[total]] == 1 > run[begins[total] + 1] for total, run in runs.items())


def test_a_rate_that_depends_on_the_end_is_noticed():
    config = ScheduleConfig("wsd", warmup_steps=2, decay_steps=4)
    begun = [has_begun_to_decay(config, 10, done) for done in range(11)]
    assert begun == [any(rate_multiplier(t, config, 10) < 1 for t in range(2, done)) for done in range(11)]
    assert not has_begun_to_decay(ScheduleConfig("cosine"), 10, 10)


def test_the_lowest_rate_is_zero_unless_it_is_given(command):
    argv = command(scheduler="wsd")
    assert cli.load(argv, environ={}).config.schedule.min_lr_ratio == 0
    assert cli.load([*argv, "--min_lr_ratio", "0.3"], environ={}).config.schedule.min_lr_ratio == 0.3
    assert cli.load(command(scheduler="cosine"), environ={}).config.schedule.min_lr_ratio == 0.1


def test_warmup_and_decay_share_the_run():
    assert schedule_problems(ScheduleConfig("wsd", warmup_steps=5, decay_steps=5), 10) == []
    assert schedule_problems(ScheduleConfig("wsd", warmup_steps=6, decay_steps=5), 10) == [
        "--warmup_steps 6 + --decay_steps 5 must not exceed --num_training_steps 10"
    ]
    assert schedule_problems(ScheduleConfig("wsd", warmup_steps=6, decay_ratio=0.5), 10) == [
        "--warmup_steps 6 + --decay_ratio 0.5: 5 must not exceed --num_training_steps 10"
    ]


@pytest.fixture(scope="module")
def stable(tmp_path_factory, data_dir, model_json):
    """A run of 10 updates with checkpoints at 4, 8 and 10, which decays from update 7 on."""
    folder = tmp_path_factory.mktemp("wsd")
    settings = {
        **{"model_config": model_json, "dataset_path": data_dir, "batch_size": 8, "lr": 1e-2, "workers": 0},
        **{"eval_every": 100, "save_every": 4, **WSD},
    }

    def argv(save_dir, **changes):
        return [str(part) for name, value in {**settings, "save_dir": folder / save_dir, **changes}.items()
                for part in (f"--{name}", value)]  # fmt: skip

    assert helpers.run(argv("stable", num_training_steps=10)) == 0
    return folder, argv


@pytest.mark.parametrize("total", [7, 14])
def test_a_branch_is_the_run_that_was_that_long_from_the_start(stable, total):
    folder, argv = stable
    names = [f"branch {total}", f"whole {total}"]
    branch = argv(names[0], num_training_steps=total, resume_from=folder / "stable" / "model_4")
    assert helpers.run(branch) == helpers.run(argv(names[1], num_training_steps=total)) == 0
    one, other = (folder / name / f"model_{total}" for name in names)
    assert helpers.different_tensors(one, other) == []


def test_a_decay_is_not_begun_twice_unasked(stable, capsys):
    folder, argv = stable
    decayed = {"num_training_steps": 14, "resume_from": folder / "stable" / "model_10"}
    assert helpers.run(argv("again", **decayed)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "its wsd schedule over 10 updates had begun to decay" in said
    assert "of at most 8 updates, or give --allow_redecay True" in said
    assert helpers.run(argv("stable", num_training_steps=14, autoresume=True)) == 2
    assert helpers.run(argv("first", **{**decayed, "resume_from": folder / "stable" / "model_8"})) == 0
    assert helpers.run(argv("again", **decayed, allow_redecay=True)) == 0
    assert helpers.checkpoints(folder / "again")[-1] == 14


def test_the_same_schedule_goes_on_within_its_decay(stable):
    folder, argv = stable
    decayed = {"num_training_steps": 10, "resume_from": folder / "stable" / "model_10", "num_extra_training_steps": 2}
    assert helpers.run(argv("extra", **decayed)) == 0
    assert helpers.checkpoints(folder / "extra")[-1] == 12
