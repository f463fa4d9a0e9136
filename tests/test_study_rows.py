"""The rows of a study: which runs they are of, how they are started, and what becomes of their numbers."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import time
from pathlib import Path

import helpers
import pytest
from study_helpers import STUDY, plots, programs, sweep

from peft_pretraining.checkpoint.folder_lock import FolderLock


def test_rates_are_chosen_on_one_part_and_the_other_is_reported(run_study, trainings, tmp_path):
    trainings(part=lambda lr: 10 - lr)
    code, captured = run_study()
    assert code == 0
    assert "| galore | 9.90 ± 0.00 (9.90, 9.90) | 0.1 (end of the range) | 0.1: 0.10, 0.2: 0.20 | 1,234 | 0.00 |" in (
        captured.out
    )
    assert "| tokens/s | state MB |" in captured.out
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert row == {
        **{"method": "galore", "by_rate": {"0.1": 0.1, "0.2": 0.2}, "lr": 0.1, "perplexities": [9.9, 9.9]},
        **{"optimizer_state_bytes": 8, "tokens_per_second": 1234.5},
    }


@pytest.mark.parametrize(
    ("best", "extend", "tried", "told"),
    [
        (0.14, 4, (0.05, 0.1, 0.2), "0.1 |"),
        (0.8, 4, (0.1, 0.2, 0.4, 0.8, 1.6), "0.8 |"),
        (0.02, 1, (0.05, 0.1, 0.2), "0.05 (end of the range)"),
        (0.02, 0, (0.1, 0.2), "0.1 (end of the range)"),
    ],
)
def test_a_range_whose_best_rate_is_at_an_end_is_extended(run_study, trainings, best, extend, tried, told):
    made = trainings(perplexity=lambda lr: abs(lr - best))
    code, captured = run_study(STUDY + f"extend: {extend}\n")
    runs = [(float(command["--lr"]), command["--seed"]) for command in made.commands]
    assert code == 0 and sorted(lr for lr, seed in runs if seed == "42") == list(tried)
    assert [lr for lr, seed in runs if seed == "1"] == [float(told.split()[0])] and f"| {told}" in captured.out


def test_a_range_in_which_all_diverged_is_not_extended(run_study, trainings):
    made = trainings(perplexity=lambda lr: None)
    assert run_study(STUDY + "extend: 4\n")[0] == 0 and len(made.commands) == 3


@pytest.mark.parametrize("jobs", ["1", "3"])
def test_a_run_that_fails_ends_its_row_alone(run_study, trainings, tmp_path, monkeypatch, jobs):
    made = trainings()

    def failing(command, **more):
        made(command, **more)
        if "galore" in command:
            raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(sweep.subprocess, "run", failing)
    text = STUDY + "  lora: {lrs: [1.0], flags: {method: lora}}\n"
    code, captured = run_study(text, "--jobs", jobs)
    assert code == 1 and "a run failed" in captured.err
    assert [row["method"] for row in json.loads((tmp_path / "out" / "results.json").read_text())] == ["lora"]
    assert [command["--seed"] for command in made.commands if command["--method"] == "lora"] == ["42", "1"]


def test_the_runs_of_all_rates_start_by_one_warm_up(run_study, trainings, tmp_path, monkeypatch):
    made = trainings()

    def warming_up(command, **more):
        made(command, **more)
        if "warm_up" in command[command.index("--save_dir") + 1]:
            time.sleep(0.05)  # the other rate wants it meanwhile
            (Path(command[command.index("--save_dir") + 1]) / "model_3").mkdir()

    monkeypatch.setattr(sweep.subprocess, "run", warming_up)
    text = STUDY.replace(
        "flags: {method: galore}", "warm_up: {lr: 0.3, num_training_steps: 3}, flags: {method: relora}"
    )
    text = text.replace("common: {", "common: {adam_lr: 0.5, ").replace("{method: relora}", "{adam_lr: null}")
    assert run_study(text, "--jobs", "2")[0] == 0
    warm, others = ([c for c in made.commands if ("warm_up" in c["--save_dir"]) == which] for which in (True, False))
    assert [(c["--lr"], c["--num_training_steps"], c["--adam_lr"]) for c in warm] == [("0.3", "3", "0.5")] * 2  # seeds
    assert {c["--warmed_up_model"] for c in others if c["--seed"] == "42"} == {
        str(tmp_path / "out" / "galore" / "warm_up_seed42" / "model_3")
    }
    assert len(others) == 3 and not any("--adam_lr" in c for c in others)  # null takes a flag out


def test_what_there_is_of_a_study_is_told_without_a_run(run_study, trainings, tmp_path):
    """Also beside a process that makes its runs; differences are those from the baseline at the same seeds."""
    made = trainings(perplexity=lambda lr: 10 * lr)
    text = STUDY + "  lora: {lrs: [1.0, 2.0], flags: {method: lora}}\nbaseline: galore\n"
    assert run_study(text, "--methods", "galore")[0] == 0
    assert run_study(text, "--methods", "lora", "--lrs", "4.0", "--seeds", "42")[0] == 0
    count = len(made.commands)
    with FolderLock(tmp_path / "out"):
        code, captured = run_study(text, "--so_far")
    assert (code, len(made.commands)) == (0, count)
    head, alignment, *rows = captured.out.splitlines()
    assert "| by galore | best rate |" in head and alignment == "| :-- | :-- | --: | --: | :-- | --: |"
    assert rows == [
        "| galore | 1.00 ± 0.00 (1.00, 1.00) | +0.00 ± 0.00 | 0.1 (end of the range) | 0.1: 1.00, 0.2: 2.00 | 0.00 |",
        "| lora | 40.00 | +39.00 | 4 | 4: 40.00 | 0.00 |",
    ]
    assert [row["method"] for row in json.loads((tmp_path / "out" / "results.json").read_text())] == ["galore", "lora"]


def test_all_runs_start_from_the_model_of_one_run(run_study, trainings, tmp_path, monkeypatch):
    made = trainings()

    def starting(command, **more):
        made(command, **more)
        if command[command.index("--save_dir") + 1].endswith("/start"):
            (tmp_path / "out" / "start" / "model_3").mkdir()

    monkeypatch.setattr(sweep.subprocess, "run", starting)
    text = STUDY + "start: {method: full_rank, lr: 0.3, num_training_steps: 3, seed: 7}\n"
    assert run_study(text, "--jobs", "2", "--", "--precision", "bf16")[0] == 0
    start, others = (
        [c for c in made.commands if c["--save_dir"].endswith("/start") == which] for which in (True, False)
    )
    ((*_, flags),) = (start,)
    assert (flags["--model_config"], flags["--lr"], flags["--seed"], flags["--precision"]) == (
        "m.json",
        "0.3",
        "7",
        "bf16",
    )
    assert len(others) == 3 and not any("--model_config" in c for c in others)
    assert {c["--model_name_or_path"] for c in others} == {str(tmp_path / "out" / "start" / "model_3")}
    assert run_study(text, "--", "--precision", "bf16")[0] == 0 and len(made.commands) == 4
    code, captured = run_study(text.replace("0.3", "0.4"), "--", "--precision", "bf16")
    assert code == 2 and "it was begun with start" in captured.err


def test_a_study_may_start_its_runs_by_torchrun_and_keep_no_models(run_study, trainings, tmp_path, monkeypatch):
    made = trainings()

    def saving(command, **more):
        made(command, **more)
        (Path(command[command.index("--save_dir") + 1]) / "model_10").mkdir()

    monkeypatch.setattr(sweep.subprocess, "run", saving)
    assert run_study(STUDY + "keep_models: False\n", "--nproc_per_node", "8")[0] == 0
    script = str(helpers.PROJECT / "torchrun_main.py")
    assert made.words == [["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=8", script]] * 3
    assert not list((tmp_path / "out").rglob("model_10"))


def test_the_plots_of_a_study(tmp_path):
    """With a method whose runs all diverged, one without a state's size, and one with a single seed."""
    program = programs.PreTraining()
    rows = [
        {"method": "a", "lr": 0.1, "by_rate": {0.1: 3.0, 0.2: math.inf}, "perplexities": [3.0, 3.5]},
        {"method": "b", "lr": 0.2, "by_rate": {0.2: math.inf}, "perplexities": [math.inf]},
        {"method": "c", "lr": 0.4, "by_rate": {"0.4": 2.0, "0.8": None}, "perplexities": [2.0]},
    ]
    rows = [row | {"optimizer_state_bytes": size} for row, size in zip(rows, (8e6, 2e6, None), strict=True)]
    plots.plot_rates(rows, program, tmp_path / "rates.png")
    plots.plot_memory(rows, program, tmp_path / "memory.png")
    plots.plot_memory(rows, program, tmp_path / "differences.png", "a")
    plots.plot_memory(rows[1:], program, tmp_path / "empty.png")
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))


def test_names_in_a_plot_cover_neither_points_nor_each_other():
    from matplotlib.figure import Figure

    axes = Figure(figsize=(5, 4), dpi=100).subplots()
    points = {f"method {number}": (1 + number % 3 / 50, 2 + number // 3 / 50) for number in range(9)}
    axes.scatter(*zip(*points.values(), strict=True))
    plots.write_names(axes, points)
    axes.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert len(boxes) == 9
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    pixels = axes.transData.transform(list(points.values()))
    assert not any(box.contains(*pixel) for box in boxes for pixel in pixels)


def test_speeds_that_were_measured_apart_are_told(run_study, trainings, tmp_path):
    trainings(part=lambda lr: 10 - lr)
    (tmp_path / "speeds.json").write_text('{"galore": 99.6, "lora": 1}')
    code, captured = run_study(STUDY, "--speeds", str(tmp_path / "speeds.json"))
    assert code == 0 and "0.2: 0.20 | 100 | 0.00 |" in captured.out
    for text in ("[1]", "{", '{"galore": "fast"}'):
        (tmp_path / "speeds.json").write_text(text)
        code, captured = run_study(STUDY, "--speeds", str(tmp_path / "speeds.json"))
        assert code == 2 and captured.err.startswith("error: --speeds ") and captured.err.count("\n") == 1
