"""Runs that are no longer finite: nothing good is lost, and with `--rewind_on_nan` they go back by themselves."""

from __future__ import annotations

import contextlib
import math

import helpers
import pytest
import torch
from helpers import GALORE, REQUEUE, RESUME, poison, spoil_weights

from peft_pretraining.checkpoint.finite import all_finite, leaves
from peft_pretraining.distributed import ProcessGroup

ONE_PROCESS = ProcessGroup(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return helpers.Undisturbed(tmp_path_factory)


def errors(capsys):
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return [line.split("ERROR ")[1] for line in err.splitlines() if "ERROR " in line]


def is_finite(checkpoint):
    return all(bool(torch.isfinite(t).all()) for t in helpers.tensors(checkpoint).values() if t.is_floating_point())


# What is finite.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_found(dtype, bad):
    tensors = {"model": {"a": torch.ones(7, dtype=dtype), "b": torch.zeros(3, 70, dtype=dtype)}, "optimizer": {}}
    tensors["optimizer"]["empty"] = torch.zeros(0, dtype=dtype)
    tensors["optimizer"]["count"] = torch.full((2,), 2**40)
    assert all_finite(leaves(tensors), ONE_PROCESS)
    tensors["model"]["b"][1, 33] = bad
    assert not all_finite(leaves(tensors), ONE_PROCESS)


def test_large_numbers_are_finite():
    """Their squares are not."""
    assert all_finite([torch.full((1000,), 3e38), torch.full((5,), -3e38)], ONE_PROCESS)


# Nothing good is lost.


def test_weights_that_are_not_finite_push_out_no_checkpoint(command, undisturbed, tmp_path, capsys):
    argv = command(**GALORE, save_every=5, keep_checkpoints=1)
    with spoil_weights(14):
        assert helpers.run(argv) == 1
    (message,) = errors(capsys)
    assert "after update 15 weights or optimizer state are not finite, and are not saved" in message
    assert f"the newest good checkpoint is {tmp_path / 'run' / 'model_10'}" in message
    assert helpers.checkpoints(tmp_path / "run") == [10] and helpers.unfinished(tmp_path / "run") == []
    assert helpers.run([*argv, *RESUME]) == 0  # without the fault
    helpers.assert_same_run(tmp_path / "run", undisturbed(command, **GALORE))


def test_moments_that_are_not_finite_are_not_saved(command, tmp_path, capsys, monkeypatch):
    """The weights still are: of an infinite second moment no update ever moves its weight again."""
    from peft_pretraining.training import loop as train

    step = train.train_step

    def overflown(run, micro_batches, stop):
        update = step(run, micro_batches, stop)
        if run.state.update_step == 15:
            run.optimizer.state[next(run.model.parameters())]["exp_avg_sq"][0, 0] = math.inf
        return update

    monkeypatch.setattr(train, "train_step", overflown)
    assert helpers.run(command(save_every=5)) == 1
    assert "after update 15 weights or optimizer state are not finite" in errors(capsys)[0]
    assert helpers.checkpoints(tmp_path / "run") == [5, 10]


@pytest.mark.parametrize("when", ["asked to stop", "at the end"])
def test_the_last_state_is_saved_only_if_it_is_finite(command, tmp_path, capsys, when):
    with contextlib.ExitStack() as faults:
        faults.enter_context(spoil_weights(7 if when == "asked to stop" else 19))
        if when == "asked to stop":
            faults.enter_context(helpers.signal_in_update(7))
        assert helpers.run(command(save_every=5)) == 1
    assert "are not saved; the newest good checkpoint is" in errors(capsys)[0]
    assert helpers.checkpoints(tmp_path / "run") == ([5] if when == "asked to stop" else [5, 10, 15])


def test_before_the_first_checkpoint_there_is_none_to_go_back_to(command, capsys):
    with spoil_weights(3):
        assert helpers.run(command(rewind_on_nan=1)) == 1
    assert "there is no checkpoint to go back to" in errors(capsys)[-1]


def test_ten_updates_in_a_row_end_the_run(command, tmp_path, capsys, monkeypatch):
    """Long before they are 5% of it; counted over launches."""
    argv = command(num_training_steps=400, save_every=5)
    with poison(monkeypatch, {2, *range(7, 400)}):
        helpers.stop_after(12, argv)
        assert helpers.run([*argv, *RESUME]) == 1
    (message,) = errors(capsys)
    assert message.startswith("10 updates in a row had a non-finite loss or gradient: lower --lr, or look at the data")
    assert f"the newest good checkpoint is {tmp_path / 'run' / 'model_15'}" in message
    assert len(helpers.updates(tmp_path / "run")) == 17


def test_checkpoints_of_older_code_that_are_not_finite_count_for_nothing(command, tmp_path, monkeypatch, capsys):
    """It saved whatever there was."""
    from peft_pretraining.checkpoint import checkpointer, train_state

    argv, run = command(**GALORE, save_every=5, keep_checkpoints=2, num_training_steps=400), tmp_path / "run"
    write = train_state.write_counters

    def as_before(folder, state, more):
        with monkeypatch.context() as patch:
            patch.setattr(train_state, "FORMAT", 0)
            write(folder, state, {name: value for name, value in more.items() if name != "run"})

    with monkeypatch.context() as patch:
        patch.setattr("peft_pretraining.checkpoint.writer.write_counters", as_before)
        patch.setattr(checkpointer, "all_finite", lambda *_: True)
        with spoil_weights(11):
            helpers.stop_after(15, command(**GALORE, save_every=5, num_training_steps=400))
    assert {step: is_finite(run / f"model_{step}") for step in (5, 10, 15)} == {5: True, 10: True, 15: False}
    capsys.readouterr()
    helpers.stop_after(12, [*argv, *RESUME])
    err = capsys.readouterr().err
    assert f"skipped checkpoint {run / 'model_15'}: its weights or optimizer state are not finite" in err
    assert helpers.checkpoints(run) == [10, 12, 15]  # it is written over when the run gets there
    helpers.stop_after(17, [*argv, *RESUME])
    assert helpers.checkpoints(run) == [15, 17] and is_finite(run / "model_15")


# Going back.

FACTORS = {"rank": 4, "lora_alpha": 4}
REWOUND = {
    "full_rank": {},
    "galore": GALORE,
    "online_subspace_descent": {"method": "online_subspace_descent", "rank": 4, "update_proj_gap": 5},
    "relora": {"method": "relora", **FACTORS, "relora": 4},
    "switchlora": {"method": "switchlora", **FACTORS, "switch_lora_interval": 12},
    "golore_adapter": {"method": "golore_adapter", "rank": 4, "update_proj_gap": 3, "rand_ratio": 0.5},
    "per layer": {**GALORE, "per_layer": True, "clip_grad_norm": 0},
}


SLOW = ("full_rank", "online_subspace_descent", "relora", "per layer")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in REWOUND])
def test_a_run_that_goes_back_skips_what_led_there(command, tmp_path, name):
    """Killed afterwards, before it has saved again, it goes on in the same way: nothing of what was undone is left."""
    argv = command(**REWOUND[name], save_every=5, rewind_on_nan=1, async_save=name == "galore")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with spoil_weights(13):
        assert helpers.run([*argv, "--save_dir", whole]) == 0
    with spoil_weights(13), pytest.raises(helpers.MachineGone), helpers.before_update(16, crash):
        helpers.run([*argv, "--save_dir", killed])
    assert [item[0] for item in helpers.updates(killed)] == list(range(1, 17))
    assert helpers.run([*argv, "--save_dir", killed, *RESUME]) == 0
    helpers.assert_same_run(killed, whole)
    after = helpers.counters(whole / "model_20")
    at = after["rewinds"][0]["from_update"]  # 15, or sooner: two of 20 updates are more than 5%
    assert after["rewinds"] == [{"from_update": at, "to_update": 10, "samples_skipped": (at - 10) * 8}]
    assert after["data_position"] == (20 + at - 10) * 8 and after["tokens_seen"] == 20 * 8 * 64
    assert after["skipped_updates"] == 0 and is_finite(whole / "model_20")
    undone = (whole / "metrics.undone.jsonl").read_text().splitlines()
    assert len(undone) == at - 10 and '"loss": null' in undone[-1]


def crash():
    raise helpers.MachineGone


def test_killed_right_after_going_back(command, tmp_path):
    argv = command(**GALORE, save_every=5, rewind_on_nan=1)
    with spoil_weights(14):
        assert helpers.run([*argv, "--save_dir", tmp_path / "whole"]) == 0
    with spoil_weights(14), pytest.raises(helpers.MachineGone):
        with second_time(10, crash):
            helpers.run(argv)
    assert helpers.counters(tmp_path / "run" / "model_10")["rewinds"] != []
    assert helpers.run([*argv, *RESUME]) == 0
    helpers.assert_same_run(tmp_path / "run", tmp_path / "whole")


@contextlib.contextmanager
def second_time(step, act):
    """Call `act` when the run gets to 0-based update `step` for the second time."""
    from peft_pretraining.training import loop as train

    train_step, seen = train.train_step, []

    def wrapped(run, micro_batches, stop):
        if run.state.update_step == step:
            seen.append(step)
            if len(seen) == 2:
                act()
        return train_step(run, micro_batches, stop)

    train.train_step = wrapped
    try:
        yield
    finally:
        train.train_step = train_step


def test_going_back_two_checkpoints(command, tmp_path, capsys):
    argv, seen, run = command(save_every=5, rewind_on_nan=2), [], tmp_path / "run"
    with spoil_weights(14), second_time(6, lambda: seen.append(helpers.checkpoints(run))):
        assert helpers.run(argv) == 0
    assert seen == [[5]]  # checkpoint 10 has been undone
    assert "went back from update 15 to 5, and skips the 80 samples since (1 of at most 3 times)" in (
        capsys.readouterr().err
    )
    assert helpers.checkpoints(run) == [5, 10, 15, 20]
    assert [item[0] for item in helpers.updates(run)] == list(range(1, 21))


def test_further_back_than_there_are_checkpoints_is_the_oldest(command, tmp_path):
    with spoil_weights(14):
        assert helpers.run(command(save_every=5, rewind_on_nan=7)) == 0
    assert helpers.counters(tmp_path / "run" / "model_20")["rewinds"][0]["to_update"] == 5


def test_a_damaged_checkpoint_is_passed_over_in_going_back(command, tmp_path):
    damage = helpers.before_update(14, lambda: helpers.flip_byte(tmp_path / "run" / "model_10" / "model.safetensors"))
    with spoil_weights(14), damage:
        assert helpers.run(command(save_every=5, rewind_on_nan=1)) == 0
    assert helpers.counters(tmp_path / "run" / "model_20")["rewinds"][0]["to_update"] == 5


def test_it_goes_back_three_times_at_most(command, tmp_path, capsys):
    argv = command(**GALORE, save_every=5, rewind_on_nan=1)
    with spoil_weights(14, times=9):
        with pytest.raises(helpers.MachineGone), second_time(14, crash):
            helpers.run(argv)
        assert helpers.run([*argv, *RESUME]) == 1
    last = errors(capsys)[-1]
    assert "the run has gone back 3 times already; the newest good checkpoint is" in last
    counters = helpers.counters(tmp_path / "run" / "model_10")
    assert [rewind["to_update"] for rewind in counters["rewinds"]] == [10, 10, 10]
    assert counters["data_position"] == (10 + 3 * 5) * 8
    assert helpers.run([*argv, *RESUME]) == 0  # the fault is gone


def test_asked_to_stop_while_it_is_not_finite(command, tmp_path):
    """It goes back, and stops there."""
    argv = command(save_every=5, rewind_on_nan=1)
    with spoil_weights(12), helpers.signal_in_update(12):
        assert helpers.run(argv) == REQUEUE
    assert helpers.checkpoints(tmp_path / "run") == [5, 10]
    assert helpers.counters(tmp_path / "run" / "model_10")["data_position"] == 13 * 8
    assert helpers.run([*argv, *RESUME]) == 0


def test_off_by_default(command, capsys):
    with spoil_weights(14):
        assert helpers.run(command(save_every=5)) == 1
    assert "went back" not in capsys.readouterr().err
