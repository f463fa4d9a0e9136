"""Runs that are stopped, killed, continued elsewhere or begun from saved weights, and updates that are skipped."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal

import helpers
import interrupting
import kill_and_resume
import pytest
import torch
from conftest import write_blocks, write_model
from helpers import GALORE, METHODS, REQUEUE, RESUME, poison, poisoned_gradient, poisoned_loss, refreshes, stop_after

from peft_pretraining.checkpoint import checkpointer, writer
from peft_pretraining.config import ScheduleConfig, schedule
from peft_pretraining.training import evaluate
from peft_pretraining.training import loop as train


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return helpers.Undisturbed(tmp_path_factory)


# Stopping and going on.


@pytest.mark.parametrize(
    "method, updates, last_refresh, number, workers",
    [
        ("galore", 10, {5}, signal.SIGTERM, 0),  # the next update refreshes
        ("galore", 11, {10}, signal.SIGUSR1, 1),  # the refresh has just been made
        ("galore", 12, {10}, signal.SIGTERM, 0),
        ("full_rank", 7, set(), signal.SIGUSR1, 0),
        ("full_rank", 10, set(), signal.SIGTERM, 1),
    ],
)
def test_stop_and_resume_changes_no_bit(
    command, undisturbed, tmp_path, device, method, updates, last_refresh, number, workers
):
    changes = {**METHODS[method], "workers": workers}
    stop_after(updates, command(**changes), number)
    stopped = tmp_path / "run"
    assert helpers.checkpoints(stopped)[-1] == updates
    assert [item[0] for item in helpers.updates(stopped)] == list(range(1, updates + 1))
    assert refreshes(stopped / f"model_{updates}") == last_refresh
    assert helpers.run([*command(**changes), *RESUME]) == 0
    helpers.assert_same_run(stopped, undisturbed(command, **METHODS[method]))  # which had no workers


@pytest.mark.parametrize("updates, workers", [(16, 1), (17, 0)])
def test_resume_across_an_epoch_boundary(command, undisturbed, tmp_path, updates, workers, capsys):
    changes = {**GALORE, "total_batch_size": 12}  # 200 samples end within the 17th update
    stop_after(updates, command(**changes, workers=workers))
    capsys.readouterr()
    assert helpers.run([*command(**changes, workers=workers), *RESUME]) == 0
    assert ("epoch 1 begins at update 17" in capsys.readouterr().err) == (updates == 16)
    helpers.assert_same_run(tmp_path / "run", undisturbed(command, **changes))


def test_many_stops_in_one_run(command, undisturbed, tmp_path):
    for updates in (1, 2, 10, 19):
        stop_after(updates, [*command(**GALORE), *RESUME])
    assert helpers.run([*command(**GALORE), *RESUME]) == 0
    helpers.assert_same_run(tmp_path / "run", undisturbed(command, **GALORE))


def test_workers_and_checkpoint_interval_change_no_bit(command, undisturbed, tmp_path):
    stop_after(7, command(**GALORE, workers=1))
    assert helpers.run([*command(**GALORE, save_every=6), *RESUME]) == 0
    helpers.assert_same_run(tmp_path / "run", undisturbed(command, **GALORE))
    assert helpers.checkpoints(tmp_path / "run") == [7, 12, 18, 20]


@contextlib.contextmanager
def signal_in_evaluation(monkeypatch, number):
    """SIGUSR1 in the middle of the `number`-th evaluation of a process, which looks for it after every batch."""
    loss_sum, batches = evaluate.token_loss_sum, []

    def wrapped(model, batch):
        batches.append(batch)
        if len(batches) == 5 * number - 3:  # of 5 batches each
            signal.raise_signal(signal.SIGUSR1)
        return loss_sum(model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "token_loss_sum", wrapped)
        patch.setattr(evaluate, "_BATCHES_BETWEEN_STOP_CHECKS", 1)
        yield
    assert len(batches) == 5 * number - 3, "the evaluation went on after the signal"


@pytest.mark.parametrize("number, updates", [(1, 0), (2, 10), (3, 20)])
def test_signal_during_an_evaluation(command, undisturbed, tmp_path, monkeypatch, number, updates):
    """The run stops at once, and the next launch makes the evaluation, whichever it is, exactly once."""
    with signal_in_evaluation(monkeypatch, number):
        assert helpers.run(command(**GALORE)) == REQUEUE
    assert helpers.checkpoints(tmp_path / "run")[-1] == updates
    if updates < 20:
        with pytest.raises(helpers.MachineGone), helpers.before_update(updates + 2, crash):
            helpers.run([*command(**GALORE), *RESUME])
    for _ in range(2):  # the second launch finds nothing to do
        assert helpers.run([*command(**GALORE), *RESUME]) == 0
        assert [item[0] for item in helpers.evaluations(tmp_path / "run")] == [0, 10, 20]
    reference = undisturbed(command, **GALORE)
    assert helpers.evaluations(tmp_path / "run") == helpers.evaluations(reference)
    assert helpers.updates(tmp_path / "run") == helpers.updates(reference)
    assert helpers.different_tensors(tmp_path / "run" / "model_20", reference / "model_20") == []


def test_signal_in_the_last_update(command, undisturbed, tmp_path):
    """All weights are saved but the last evaluation is due: launched again, the run evaluates, and only once."""
    stop_after(20, command(**GALORE))
    for _ in range(3):
        assert helpers.run([*command(**GALORE), *RESUME]) == 0
    assert helpers.evaluations(tmp_path / "run") == helpers.evaluations(undisturbed(command, **GALORE))


def crash():
    raise helpers.MachineGone


def test_data_workers_leave_signals_to_the_run(command, undisturbed, tmp_path):
    """A scheduler signals every process of a job; the run still needs its workers to finish the update."""

    def signal_workers():
        workers = multiprocessing.active_children()
        assert workers
        for worker in workers:
            os.kill(worker.pid, signal.SIGTERM)
            os.kill(worker.pid, signal.SIGUSR1)

    with helpers.before_update(3, signal_workers):
        assert helpers.run(command(**GALORE, workers=1)) == 0
    helpers.assert_same_run(tmp_path / "run", undisturbed(command, **GALORE))


def test_signal_handlers_are_given_back(command):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    stop_after(1, command(num_training_steps=2))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before


# Processes that are killed.


def test_kill_and_resume(tmp_path, capsys):
    options = ["--kills", 3, "--in_save", 1, "--stops", 1, "--updates", 160, "--seed", 3, "--work_dir", tmp_path]
    code = kill_and_resume.main([str(option) for option in options])
    printed = capsys.readouterr().out
    assert code == 0, printed
    lines = printed.splitlines()
    assert sum(": SIGKILL" in line for line in lines) >= 3 and sum(": SIGTERM" in line for line in lines) == 1
    assert "during the save of model_" in printed and "PASSED" in printed


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("method, more", [("full_rank", ()), ("galore", ("--async_save",))])
def test_kill_ten_times_and_resume(tmp_path, capsys, method, more):
    options = ["--kills", 10, "--in_save", 4, "--stops", 4, "--method", method, "--work_dir", tmp_path, *more]
    code = kill_and_resume.main([str(option) for option in options])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert printed.count(": SIGKILL") >= 10 and printed.count("during the save of model_") >= 4


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("method", "precision"), [("full_rank", "mixed"), ("galore", "bf16_sr"), ("lora", "bf16_sr"), ("lora", "bf16")]
)
def test_kill_four_times_in_bfloat16(tmp_path, capsys, method, precision):
    options = ["--kills", 4, "--in_save", 2, "--stops", 2, "--method", method, "--precision", precision]
    code = kill_and_resume.main([str(option) for option in [*options, "--work_dir", tmp_path]])
    assert code == 0, capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("layout", ["single", "fsdp"])
def test_kill_twelve_times_at_every_moment(tmp_path, capsys, layout):
    options = ["--kills", 12, "--layout", layout, "--work_dir", tmp_path, "--moments", *interrupting.MOMENTS]
    assert kill_and_resume.main([str(option) for option in options]) == 0, capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_a_fine_tuning(tmp_path, capsys):
    options = ["--kills", 4, "--stops", 2, "--fine_tuning", "--save_every", 8, "--updates", 120, "--work_dir", tmp_path]
    assert kill_and_resume.main([str(option) for option in options]) == 0, capsys.readouterr().out


def test_crash_between_checkpoints_is_recorded_once(command, undisturbed, tmp_path):
    with pytest.raises(helpers.MachineGone), helpers.before_update(14, crash):
        helpers.run(command(**GALORE))
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"update_step": 15, "loss": 2.')  # the line that a crash cut off
    assert helpers.run([*command(**GALORE), *RESUME]) == 0
    helpers.assert_same_run(tmp_path / "run", undisturbed(command, **GALORE))


# Nothing to resume from.


def no_folder(folder, command, monkeypatch):
    assert not folder.exists()


def empty_folder(folder, command, monkeypatch):
    folder.mkdir()


def only_logs(folder, command, monkeypatch):
    with pytest.raises(helpers.MachineGone), helpers.before_update(6, crash):
        helpers.run(command)
    assert len(helpers.updates(folder)) == 6 and helpers.checkpoints(folder) == []


def only_an_unfinished_checkpoint(folder, command, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(helpers.MachineGone):
        patch.setattr(writer, "complete", lambda *_: crash())
        helpers.run(command)
    assert helpers.unfinished(folder) == ["model_10.tmp"] and helpers.checkpoints(folder) == []


@pytest.mark.parametrize("prepare", [no_folder, empty_folder, only_logs, only_an_unfinished_checkpoint])
def test_autoresume_without_a_checkpoint_starts_from_the_beginning(
    command, undisturbed, tmp_path, monkeypatch, prepare
):
    prepare(tmp_path / "run", command(**GALORE), monkeypatch)
    seen = []
    with helpers.before_update(0, lambda: seen.append(helpers.unfinished(tmp_path / "run"))):
        assert helpers.run([*command(**GALORE), *RESUME]) == 0
    assert seen == [[]]  # what an interrupted save left is gone before the first update
    helpers.assert_same_run(tmp_path / "run", undisturbed(command, **GALORE))


def test_a_folder_that_is_not_empty_is_refused_without_autoresume(command, undisturbed, capsys):
    folder = undisturbed(command, **GALORE)
    before = helpers.contents(folder)
    assert helpers.run(command(**GALORE, save_dir=folder)) == 2
    assert "not empty: pass --autoresume True" in capsys.readouterr().err
    assert helpers.contents(folder) == before


def test_a_finished_run_has_nothing_left_to_do(command, undisturbed, tmp_path, monkeypatch):
    shutil.copytree(undisturbed(command, **GALORE), tmp_path / "run", copy_function=shutil.copy2)
    argv = command(**GALORE)
    assert helpers.run([*argv, *RESUME]) == 0  # config.yaml now says --autoresume and the new folder
    files = [path for path in (tmp_path / "run").rglob("*") if "model_" in str(path) and path.is_file()]
    before, times = helpers.contents(tmp_path / "run"), [path.stat().st_mtime_ns for path in files]
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", lambda *_: pytest.fail("there is no update left"))
        patch.setattr(train, "evaluate", lambda *_: pytest.fail("every evaluation has been made"))
        patch.setattr(checkpointer.Checkpointer, "save", lambda *_: pytest.fail("everything has been saved"))
        assert helpers.run([*argv, *RESUME]) == 0
    assert helpers.contents(tmp_path / "run") == before
    assert [path.stat().st_mtime_ns for path in files] == times


# Continuing elsewhere.


@pytest.mark.parametrize("method", METHODS)
def test_resume_from_into_a_new_folder(command, undisturbed, tmp_path, method):
    reference = undisturbed(command, **METHODS[method])
    before = helpers.contents(reference)
    argv = command(**METHODS[method], resume_from=reference / "model_10")
    stop_after(13, argv)
    assert helpers.run([*argv, *RESUME]) == 0  # from its own checkpoint now, not from the other folder's
    assert helpers.checkpoints(tmp_path / "run") == [13, 20]
    assert helpers.different_tensors(tmp_path / "run" / "model_20", reference / "model_20") == []
    assert helpers.updates(tmp_path / "run") == helpers.updates(reference)[10:]
    assert helpers.evaluations(tmp_path / "run") == helpers.evaluations(reference)[2:]
    assert helpers.contents(reference) == before


def test_resume_from_a_damaged_checkpoint_is_refused(command, undisturbed, tmp_path, capsys):
    shutil.copytree(undisturbed(command, **GALORE), tmp_path / "first")
    helpers.flip_byte(tmp_path / "first" / "model_10" / "model.safetensors")
    assert helpers.run(command(**GALORE, resume_from=tmp_path / "first" / "model_10")) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert errors == [
        f"error: --resume_from {tmp_path / 'first' / 'model_10'}: model.safetensors is damaged (its checksum differs)"
    ]
    assert not (tmp_path / "run").exists()


def test_resume_from_something_else_is_refused(command, tmp_path, capsys):
    assert helpers.run(command(resume_from=tmp_path / "nowhere")) == 2
    (tmp_path / "weights").mkdir()
    assert helpers.run(command(resume_from=tmp_path / "weights")) == 2
    err = capsys.readouterr().err
    assert f"--resume_from {tmp_path / 'nowhere'}: no such folder" in err
    assert f"--resume_from {tmp_path / 'weights'} is not a checkpoint of a run" in err
    assert not (tmp_path / "run").exists()


def rates(first, last, total):
    """The rates of updates first..last (0-based, last not included) of a run's cosine schedule over `total`."""
    config = ScheduleConfig(num_training_steps=total, warmup_steps=2)
    return [1e-2 * schedule.rate_multiplier(step, config, total) for step in range(first, last)]


@pytest.mark.parametrize("method", METHODS)
def test_warm_start(command, undisturbed, tmp_path, method):
    """Weights and counters are taken; the schedule begins anew, and so does the optimizer."""
    first = undisturbed(command)  # full-rank
    argv = command(
        **METHODS[method], warmed_up_model=first / "model_10", num_training_steps=30, save_every=100, model_config=None
    )
    stop_after(11, argv)
    run = tmp_path / "run"
    assert helpers.evaluations(run) == helpers.evaluations(first)[1:2]  # the loss with which the other run went on
    counters = helpers.counters(run / "model_11")
    assert (counters["update_step"], counters["schedule_start"]) == (11, 10)
    assert (counters["tokens_seen"], counters["data_position"]) == (11 * 512, 11 * 8)
    steps = {int(value) for name, value in helpers.tensors(run / "model_11").items() if name.endswith(".step")}
    assert steps == {1}

    stop_after(17, [*argv, *RESUME])
    assert helpers.counters(run / "model_17")["schedule_start"] == 10
    assert helpers.run([*argv, *RESUME]) == 0
    assert [item[2] for item in helpers.updates(run)] == rates(0, 20, 20)
    argv[argv.index("--save_dir") + 1] = tmp_path / "at once"
    assert helpers.run(argv) == 0
    assert helpers.different_tensors(run / "model_30", tmp_path / "at once" / "model_30") == []
    assert helpers.updates(run) == helpers.updates(tmp_path / "at once")
    assert helpers.evaluations(run) == helpers.evaluations(tmp_path / "at once")


def test_warm_start_from_a_plain_hugging_face_folder(command, undisturbed, tmp_path):
    first, plain = undisturbed(command), tmp_path / "plain"
    plain.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(first / "model_20" / name, plain)
    assert helpers.run(command(warmed_up_model=plain, num_training_steps=4)) == 0
    assert [item[0] for item in helpers.updates(tmp_path / "run")] == [1, 2, 3, 4]
    assert helpers.evaluations(tmp_path / "run")[0] == (0, helpers.evaluations(first)[-1][1])


def test_warm_start_that_cannot_be(command, undisturbed, tmp_path, capsys):
    first = undisturbed(command)
    weights = first / "model_20"
    assert helpers.run(command(warmed_up_model=weights)) == 2
    assert "--num_training_steps 20 ends before update 20 of --warmed_up_model" in capsys.readouterr().err
    assert helpers.run(command(warmed_up_model=weights, num_training_steps=25, warmup_steps=6)) == 2
    assert "--warmup_steps 6 must not exceed --num_training_steps 5" in capsys.readouterr().err
    wider = write_model(tmp_path / "wider.json", hidden_size=64)
    assert helpers.run(command(warmed_up_model=weights, num_training_steps=30, model_config=wider)) == 2
    assert "its hidden_size 32 differs from 64 of --model_config" in capsys.readouterr().err
    assert helpers.run(command(warmed_up_model=weights, num_training_steps=30, resume_from=weights)) == 2
    assert "--resume_from and --warmed_up_model contradict each other" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# Going on with other settings.


def test_a_longer_run_changes_the_schedule_from_there_on(command, undisturbed, tmp_path, capsys):
    stop_after(8, command())
    assert helpers.run([*command(num_training_steps=30), *RESUME]) == 0
    warning = "WARNING resuming with another --num_training_steps: 30 instead of 20"
    assert capsys.readouterr().err.count(warning) == 1
    assert [item[2] for item in helpers.updates(tmp_path / "run")] == rates(0, 8, 20) + rates(8, 30, 30)
    assert helpers.updates(tmp_path / "run")[:8] == helpers.updates(undisturbed(command))[:8]


def test_a_run_made_shorter_than_it_is_already_is_finished(command, tmp_path):
    stop_after(15, command())
    assert helpers.run([*command(num_training_steps=12), *RESUME]) == 0
    assert len(helpers.updates(tmp_path / "run")) == 15


def test_settings_that_change_apply_and_are_named(command, undisturbed, tmp_path, capsys):
    stop_after(7, command())
    capsys.readouterr()
    assert helpers.run([*command(lr=5e-3, save_every=4), *RESUME]) == 0
    warnings = [line.split("WARNING ")[1] for line in capsys.readouterr().err.splitlines() if "WARNING " in line]
    assert warnings == [
        "resuming with another --lr: 0.005 instead of 0.01",
        "resuming with another --save_every: 4 instead of 10",
    ]
    lr = [item[2] for item in helpers.updates(tmp_path / "run")]
    assert lr == rates(0, 7, 20) + [rate / 2 for rate in rates(7, 20, 20)]
    assert helpers.checkpoints(tmp_path / "run") == [7, 8, 12, 16, 20]
    reference = undisturbed(command)
    assert helpers.updates(tmp_path / "run")[:8] != helpers.updates(reference)[:8]


def test_unchanged_settings_are_not_named(command, undisturbed, tmp_path, capsys):
    stop_after(7, [*command(**GALORE, tags="a,b", skip_batches="3"), *RESUME])
    assert helpers.run([*command(**GALORE, tags="a,b", skip_batches="3"), *RESUME]) == 0
    assert "resuming with another" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_config": "deeper"}, "it was begun with another model"),
        ({"method": "full_rank", "rank": None, "update_proj_gap": None}, "method 'galore' instead of 'full_rank'"),
        ({"rank": 8}, "it was begun with rank 4 instead of 8"),
        ({"target_modules": "mlp"}, "target_modules ['attn', 'attention', 'mlp'] instead of ['mlp']"),
        ({"proj_type": "left"}, "proj_type 'std' instead of 'left'"),
        ({"dataset_path": "other"}, "it was begun with other data"),
        ({"max_length": 32}, "max_length 64 instead of 32"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_run_is_not_continued(command, undisturbed, tmp_path, capsys, change, message):
    made = {
        "deeper": lambda: write_model(tmp_path / "deeper.json", num_hidden_layers=3),
        "other": lambda: write_blocks(tmp_path / "other", tokenizer="another"),
    }
    change = {name: made[value]() if value in made else value for name, value in change.items()}
    reference = undisturbed(command, **GALORE)
    before = helpers.contents(reference)
    changed = {**GALORE, **change}
    assert helpers.run([*command(**changed, save_dir=reference), *RESUME]) == 2
    assert helpers.run(command(**changed, resume_from=reference / "model_10")) == 2
    err = capsys.readouterr().err
    for what in (f"--save_dir {reference} holds another run", f"--resume_from {reference / 'model_10'}"):
        assert sum(line.startswith(f"error: {what}: ") and message in line for line in err.splitlines()) == 1
    assert helpers.contents(reference) == before and not (tmp_path / "run").exists()


# Updates that are skipped.


@pytest.mark.parametrize(
    "method, poisoned",
    [("galore", poisoned_loss), ("galore", poisoned_gradient), ("full_rank", poisoned_gradient)],
)
def test_an_update_that_is_not_finite_is_skipped(command, tmp_path, monkeypatch, capsys, method, poisoned):
    argv = command(**METHODS[method], save_every=1)
    with poison(monkeypatch, {5}, poisoned):  # at which GaLore's refresh is due
        assert helpers.run(argv) == 0
    run = tmp_path / "run"
    assert helpers.different_tensors(run / "model_5", run / "model_6") == []
    assert helpers.different_tensors(run / "model_6", run / "model_7") != []
    # The schedule and the data have gone on.
    assert [item[2] for item in helpers.updates(run)] == rates(0, 20, 20)
    before, after = helpers.counters(run / "model_5"), helpers.counters(run / "model_6")
    assert (after["update_step"], after["data_position"]) == (6, 6 * 8)
    assert (before["skipped_updates"], after["skipped_updates"]) == (0, 1)
    skipped = [record["update_step"] for record in helpers.records(run) if record.get("skipped")]
    assert skipped == [6]
    assert sum("skipped update 5: loss" in line for line in capsys.readouterr().err.splitlines()) == 1
    if method == "galore":  # the refresh has been made up for, and the next one falls where it would have fallen
        by_update = {n: refreshes(run / f"model_{n}") for n in (5, 6, 7, 10, 11)}
        assert by_update == {5: {0}, 6: {0}, 7: {6}, 10: {6}, 11: {10}}


def test_resume_with_a_refresh_pending(command, tmp_path, monkeypatch):
    """Stopped after the update that was to refresh and was skipped."""
    with poison(monkeypatch, {5}):
        assert helpers.run(command(**GALORE, save_dir=tmp_path / "at once")) == 0
        stop_after(6, command(**GALORE))
        assert helpers.run([*command(**GALORE), *RESUME]) == 0
    assert refreshes(tmp_path / "run" / "model_6") == {0}
    last = [tmp_path / name / "model_20" for name in ("run", "at once")]
    assert helpers.different_tensors(*last) == []
    assert helpers.counters(last[0]) == helpers.counters(last[1])


def test_too_many_skipped_updates_end_the_run(command, tmp_path, monkeypatch, capsys):
    """More than 5% of 20 updates, counted over launches."""
    with poison(monkeypatch, {3, 13}):
        stop_after(8, command(**GALORE))
        assert helpers.run([*command(**GALORE), *RESUME]) == 1
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if "ERROR" in line]
    assert len(errors) == 1 and "Traceback" not in err
    assert "2 of 20 updates had a non-finite loss or gradient, more than 5%" in errors[0]
    assert len(helpers.updates(tmp_path / "run")) == 14
    assert helpers.checkpoints(tmp_path / "run") == [8, 10]


def test_skip_batches(command, undisturbed, tmp_path):
    """The batches of the named updates are left out, however many; nothing is wrong with them."""
    assert helpers.run(command(**GALORE, save_every=1, skip_batches="3,4")) == 0
    run, reference = tmp_path / "run", undisturbed(command, **GALORE)
    assert helpers.different_tensors(run / "model_3", run / "model_5") == []
    assert helpers.different_tensors(run / "model_5", run / "model_6") != []
    assert [record["update_step"] for record in helpers.records(run) if record.get("skipped")] == [4, 5]
    assert helpers.counters(run / "model_20")["skipped_updates"] == 0
    assert all(torch.isfinite(torch.tensor([loss, norm])).all() for _, loss, _, norm in helpers.updates(run))
    assert helpers.updates(run)[:4] == helpers.updates(reference)[:4]
    assert [item[2] for item in helpers.updates(run)] == [item[2] for item in helpers.updates(reference)]
