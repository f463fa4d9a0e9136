"""Dashboards: what wandb and TensorBoard are told, read back from what they wrote; and that they end no run."""

from __future__ import annotations

import importlib.util
import logging
import math

import helpers
import pytest
from helpers import GALORE, RESUME, poison, stop_after
from test_tracking import complete_history, offline, wandb_records

from peft_pretraining.config import Config
from peft_pretraining.training import wandb_run
from peft_pretraining.training.dashboard import named, run_name
from peft_pretraining.training.samples import Sample
from peft_pretraining.training.tensorboard_run import TensorBoardRun

assert offline, "a fixture"

HAS_TENSORBOARD = importlib.util.find_spec("tensorboard") is not None
needs_tensorboard = pytest.mark.skipif(not HAS_TENSORBOARD, reason="tensorboard is not installed")


def scalars(folder):
    """{name: [(step, value)]} of a folder of event files, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {name: [(one.step, one.value) for one in events.Scalars(name)] for name in events.Tags()["scalars"]}


def texts(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {
        name.removesuffix("/text_summary"): [each.tensor_proto.string_val[0].decode() for each in events.Tensors(name)]
        for name in events.Tags()["tensors"]
    }


def die():
    raise helpers.MachineGone


@needs_tensorboard
def test_tensorboard_shows_each_number_once_over_updates_and_over_tokens(command, tmp_path):
    argv = command(tracker="tensorboard", **GALORE)
    stop_after(13, argv)
    with helpers.before_update(18, die), pytest.raises(helpers.MachineGone):
        helpers.run([*argv, *RESUME])  # dies after update 18: 14 to 18 are made again
    assert helpers.run([*argv, *RESUME]) == 0
    folder, records = tmp_path / "run" / "tensorboard", helpers.records(tmp_path / "run")
    over_updates, over_tokens = scalars(folder), scalars(folder / "by_tokens")
    for name in (
        "loss",
        "eval/loss",
        "eval/perplexity",
        "captured_energy_mean",
        "step_time",
        "final_eval_loss",
    ):
        kept = [(record, values) for record in records if name in (values := named(record, 20))]
        expected = [(record["update_step"], pytest.approx(values[name], rel=1e-6)) for record, values in kept]
        assert over_updates[name] == expected and len(expected) >= 1, name
        expected = [(record["tokens_seen"], pytest.approx(values[name], rel=1e-6)) for record, values in kept]
        assert over_tokens[name] == expected, name
    assert [step for step, _ in over_updates["final_eval_loss"]] == [20]
    assert '"update_proj_gap": 5' in texts(folder)["config"][0]


@needs_tensorboard
def test_older_names_of_every_evaluation(command, tmp_path):
    assert helpers.run(command(tracker="tensorboard", older_eval_names=True, num_training_steps=10, eval_every=5)) == 0
    shown = scalars(tmp_path / "run" / "tensorboard")
    assert shown["final_eval_loss"] == shown["eval/loss"] and [step for step, _ in shown["eval/loss"]] == [0, 5, 10]


@pytest.mark.parametrize("tracker", ["wandb", pytest.param("tensorboard", marks=needs_tensorboard)])
def test_a_skipped_update_is_an_alert(command, tmp_path, offline, monkeypatch, tracker):
    with poison(monkeypatch, {3}):
        assert helpers.run(command(tracker=tracker, num_training_steps=20)) == 0
    if tracker == "tensorboard":
        (alert,) = texts(tmp_path / "run" / "tensorboard")["alert/skipped update"]
    else:
        (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
        (alert,) = [each.alert.text for each in wandb_records(folder) if each.WhichOneof("record_type") == "alert"]
    assert alert == "update 3: loss nan, gradient norm nan; 1 so far", alert


def test_evaluations_are_shown_over_tokens_in_wandb(command, tmp_path, offline):
    assert helpers.run(command(tracker="wandb", num_training_steps=2)) == 0
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    complete_history(folder, 4)
    axes = {
        each.metric.name or each.metric.glob_name: each.metric.step_metric
        for each in wandb_records(folder)
        if each.WhichOneof("record_type") == "metric"
    }
    assert axes["*"] == "update_step" and axes["eval/loss"] == axes["eval/perplexity"] == "tokens_seen", axes


def test_no_key_is_one_line_and_an_offline_run(command, tmp_path, monkeypatch, capsys):
    import wandb

    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()
    assert helpers.run(command(tracker="wandb", num_training_steps=2)) == 0
    wandb.teardown()
    err = capsys.readouterr().err
    assert err.count("wandb cannot be reached") == 1 and "it records offline" in err and "Traceback" not in err, err
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_one_line_and_an_offline_run(command, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(wandb_run, "_SECONDS_TO_START", 5)
    assert helpers.run(command(tracker="wandb", num_training_steps=4)) == 0
    err = capsys.readouterr().err
    assert err.count("wandb cannot be reached") == 1 and "does not record" not in err and "Traceback" not in err, err
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert len(complete_history(folder, 5)) >= 5


def test_a_writer_that_breaks_is_said_once(tmp_path, caplog, monkeypatch):
    board = TensorBoardRun(None)

    class Full:
        def add_scalar(self, *_):
            raise OSError("No space left on device")

    board._target = (Full(), Full())
    with caplog.at_level(logging.WARNING, "peft_pretraining"):
        board.log({"update_step": 1, "loss": 2.0})
        board.log({"update_step": 2, "loss": 2.0})
        board.finish(0)
    (said,) = caplog.messages
    assert said == "tensorboard records no further (No space left on device); metrics.jsonl has everything"


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_dashboard_that_is_not_installed(command, capsys, monkeypatch, name):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked, *more: None if asked == name else find(asked, *more))
    assert helpers.run(command(tracker=name)) == 2
    assert f"--tracker {name}: {name} is not installed (pip install {name})" in capsys.readouterr().err


def test_an_unknown_dashboard(command, capsys):
    assert helpers.run(command(tracker="wandb,mlflow")) == 2
    assert "--tracker" in (err := capsys.readouterr().err) and "tensorboard" in err


def test_a_table_that_cannot_be_sent_ends_nothing(monkeypatch):
    run = wandb_run.WandbRun(object())
    run.texts(1, [Sample("a", "b", 1.0)])
    assert run._target is None


def test_samples_are_texts_and_a_loss_on_dashboards():
    logged = []

    class Writer:
        def add_text(self, *values):
            logged.append(values)

        def add_scalar(self, *values):
            logged.append(values)

        def log(self, values):
            logged.append({**values, "samples": values["samples"].data})

    samples = [Sample("a", "b", 1.0), Sample("c", "d", 2.0), Sample("e", "", math.nan)]
    board = TensorBoardRun(None)
    board._target = (Writer(), Writer())
    board.texts(7, samples)
    wandb_run.WandbRun(Writer()).texts(7, samples)
    text, scalar, table = logged
    assert text == ("samples", "**a** b\n\n**c** d\n\n**e** ", 7) and scalar == ("samples_loss", 1.5, 7)
    assert table["samples"][:2] == [[7, "a", "b", 1.0], [7, "c", "d", 2.0]] and table["samples_loss"] == 1.5


def test_a_run_is_named_by_what_is_special_about_it():
    settings = {"method": "galore", "rank": 64, "lr": 0.01, "update_proj_gap": 50, "seed": 1}
    assert run_name(Config.from_settings(settings)) == "galore lr=0.01 rank=64 seed=1 update_proj_gap=50"
