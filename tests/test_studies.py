"""The scripts that make many runs: what they read, what they refuse, and that one process owns a study's folder."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import helpers
import pytest

sys.path.insert(0, str(helpers.PROJECT / "scripts"))

import study
import sweep
from _study import comparison, file, finetuning, folder, plots, programs

from peft_pretraining.checkpoint.folder_lock import FolderLock
from peft_pretraining.config import cli
from peft_pretraining.flags import ConfigError

STUDIES = sorted((helpers.PROJECT / "configs" / "studies").glob("*.yaml"))
METHODS = {path.parent.name for path in (helpers.PROJECT / "peft_pretraining/methods").glob("[!_]*/settings.py")}
PRETRAINING = [path for path in STUDIES if "script:" not in path.read_text()]
STUDY = """
seeds: [42, 1]
common: {model_config: m.json, num_training_steps: 10}
methods:
  galore: {lrs: [0.1, 0.2], flags: {method: galore}}
"""


class Trainings:
    """Takes the place of the training processes: each leaves the metrics, or results, that it is told to."""

    def __init__(self, perplexity=lambda lr: lr, more: bytes = b"", part=None):
        """`part`: the perplexity of the second part of the evaluation; there are no parts without it."""
        self.commands, self.perplexity, self.more, self.part, self.words = [], perplexity, more, part, []

    def __call__(self, command, **_):
        first = next(index for index, word in enumerate(command) if word.endswith(".py")) + 1
        self.words.append(command[1:first])
        flags = dict(zip(command[first::2], command[first + 1 :: 2], strict=False))
        self.commands.append(flags)
        value = self.perplexity(float(flags["--lr"]))
        if "--output_dir" in flags:
            return self.fine_tuned(Path(flags["--output_dir"]), value)
        record = {"update_step": 10, "final_eval_perplexity": value, "optimizer_state_bytes": 8}
        if self.part is not None:
            parts = {"final_eval_perplexity_0": value, "final_eval_perplexity_1": self.part(float(flags["--lr"]))}
            record |= {"final_eval_perplexity": None, "throughput_tokens": 1234.5, **parts}
        path = Path(flags["--save_dir"]) / "metrics.jsonl"
        path.write_bytes(json.dumps(record).encode() + b"\n" + self.more)

    def fine_tuned(self, folder, accuracy):
        results = {"eval_accuracy": accuracy, "test_accuracy": accuracy / 2, "optimizer_state_bytes": 2e6}
        results |= {"losses": [3.0, *[1.0] * 18, 0.5, 1.5], "best_step": 4, "trainable_parameters": 7}
        (folder / "all_results.json").write_text(json.dumps(results))
        (folder / "model.safetensors").touch()


@pytest.fixture
def trainings(monkeypatch):
    def stand_in(**settings):
        made = Trainings(**settings)
        monkeypatch.setattr(sweep.subprocess, "run", made)
        return made

    return stand_in


@pytest.fixture
def run_study(tmp_path, monkeypatch, capsys):
    for name in ("plot_rates", "plot_memory"):
        monkeypatch.setattr(study.plots, name, lambda *_: None)  # they take seconds

    def run(text=STUDY, *more, **inputs):
        (tmp_path / "study.yaml").write_text(text)
        argv = ["study.py", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out")]
        for name, value in (inputs or {"dataset_path": "data"}).items():
            argv += [f"--{name}", str(value)]
        monkeypatch.setattr(sys, "argv", [*argv, *more])
        code = study.main()
        return code, capsys.readouterr()

    return run


@pytest.fixture
def run_sweep(tmp_path, monkeypatch, capsys):
    def run(*flags, lrs="0.1,0.2", seeds="42"):
        argv = ["sweep.py", "--out", str(tmp_path / "sweep"), "--lrs", lrs, "--seeds", seeds, "--", *flags]
        monkeypatch.setattr(sys, "argv", argv)
        code = sweep.main()
        return code, capsys.readouterr()

    return run


def test_a_study_survives_metrics_that_were_cut_off(run_study, trainings, tmp_path):
    made = trainings(more=b'{"update_step": 11, "fin')
    code, captured = run_study()
    assert (code, len(made.commands)) == (0, 3)
    assert (
        "| galore | 0.10 ± 0.00 (0.10, 0.10) | 0.1 (end of the range) | 0.1: 0.10, 0.2: 0.20 | 0.00 |" in captured.out
    )
    assert captured.err and all("passed over 1 line(s)" in line for line in captured.err.splitlines())
    assert run_study()[0] == 0 and len(made.commands) == 3  # finished runs are not made again


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
    text = STUDY.replace("flags: {method: galore}", "warm_up: {lr: 0.3, num_training_steps: 3}, flags: {method: relora}")
    text = text.replace("common: {", "common: {adam_lr: 0.5, ").replace("{method: relora}", "{adam_lr: null}")
    assert run_study(text, "--jobs", "2")[0] == 0
    warm, others = ([c for c in made.commands if ("warm_up" in c["--save_dir"]) == which] for which in (True, False))
    assert [(c["--lr"], c["--num_training_steps"], c["--adam_lr"]) for c in warm] == [("0.3", "3", "0.5")] * 2  # seeds
    assert {c["--warmed_up_model"] for c in others if c["--seed"] == "42"} == {
        str(tmp_path / "out" / "galore" / "warm_up_seed42" / "model_3")
    }
    assert len(others) == 3 and not any("--adam_lr" in c for c in others)  # null takes a flag out


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


def test_a_run_that_diverged_is_the_worst(run_study, trainings, tmp_path):
    trainings(perplexity=lambda lr: None if lr == 0.1 else 7.0)
    assert run_study()[0] == 0
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=pytest.fail)
    assert (row["lr"], row["by_rate"]) == (0.2, {"0.1": None, "0.2": 7.0})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("num_training_steps: 10", "num_training_steps: 20"), 'begun with common {"model_config"'),
        (("flags: {method: galore}", "flags: {method: golore}"), 'begun with method galore {"lrs": null'),
    ],
)
def test_another_study_s_folder_is_refused(run_study, trainings, change, named):
    made = trainings()
    assert run_study()[0] == 0
    code, captured = run_study(STUDY.replace(*change))
    assert code == 2 and named in captured.err and captured.err.count("\n") == 1
    code, captured = run_study(dataset_path="elsewhere")
    assert code == 2 and "begun with dataset_path" in captured.err
    assert len(made.commands) == 3
    added = STUDY.replace("lrs: [0.1, 0.2]", "lrs: [0.05, 0.1, 0.2]") + "  lora: {lrs: [1.0], flags: {method: lora}}\n"
    assert run_study(added)[0] == 0  # methods and rates may be added
    assert len(made.commands) == 3 + 2 + 2


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("seeds: [1", ["while parsing a flow sequence"]),
        ("[]", ["must be a mapping of names to values"]),
        ("seeds: 1", ["seeds must be", "common must be", "methods must be"]),
        (STUDY + "more: 1\n", ["unknown key 'more'"]),
        (STUDY.replace("[42, 1]", "[1, 1]"), ["seeds must be a list of different whole numbers, got [1, 1]"]),
        (STUDY.replace("0.2", "4e-4"), ["galore: lrs must be"]),
        (STUDY.replace("0.2", ".nan"), ["galore: lrs must be"]),
        (STUDY.replace("num_training_steps: 10", "num_training_steps: x"), ["common: num_training_steps must be"]),
        (STUDY.replace("galore: {", "../galore: {"), ["methods: '../galore' cannot be the name of a folder"]),
        (STUDY.replace("{method: galore}", "{method: [galore]}, warm_up: 3"), ["method must be", "warm_up must be"]),
        (STUDY.replace("common", "seeds"), ["key 'seeds' is given twice, in lines 2 and 3"]),
        (STUDY + "script: x.py\n", ["script must be one of torchrun_main.py, run_glue.py, run_tasks.py, got 'x.py'"]),
        (STUDY + "script: [x]\nwarm_up: {}\n", ["script must be one of torchrun_main.py"]),
        (STUDY + "warm_up: {}\nevaluation_rows: 3\n", ["unknown key 'warm_up'", "unknown key 'evaluation_rows'"]),
        (STUDY + "extend: -1\n", ["extend must be a whole number, got -1"]),
    ],
    ids=range(15),
)
def test_what_is_no_study_is_refused_in_lines(run_study, trainings, text, problems):
    code, captured = run_study(text)
    lines = captured.err.splitlines()
    assert code == 2 and len(lines) == len(problems), lines
    assert all(problem in line for problem, line in zip(problems, lines, strict=True)), lines


def test_a_folder_has_one_owner(run_study, run_sweep, trainings, tmp_path):
    for name, run in (("out", run_study), ("sweep", run_sweep)):
        (tmp_path / name).mkdir()
        with FolderLock(tmp_path / name):
            code, captured = run()
        assert code == 2 and "is in use by" in captured.err and captured.err.count("\n") == 1


def test_a_sweep(run_sweep, trainings, tmp_path):
    made = trainings(perplexity=lambda lr: 3.0 if lr == 0.2 else None, more=b"\xff\n")
    code, captured = run_sweep("--method", "galore")
    assert code == 0 and "best: lr 0.2, seed 42, validation perplexity 3.00" in captured.out
    assert [row["perplexity"] for row in json.loads((tmp_path / "sweep/table.json").read_text())["runs"]] == [None, 3.0]
    code, captured = run_sweep("--method", "golore")
    assert code == 2 and 'was begun with flags ["--method", "galore"]' in captured.err and len(made.commands) == 2


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"lrs": "0.1,x"}, "--lrs must be different positive numbers with commas between them, got '0.1,x'"),
        ({"lrs": "0.1,0.10"}, "--lrs must be different positive numbers"),
        ({"lrs": "nan"}, "--lrs must be different positive numbers"),
        ({"seeds": "1.5"}, "--seeds must be different whole numbers"),
        ({"seeds": ""}, "--seeds must be different whole numbers"),
    ],
)
def test_bad_numbers_of_a_sweep(run_sweep, flags, problem):
    code, captured = run_sweep(**flags)
    assert code == 2 and captured.err.startswith(f"error: {problem}") and captured.err.count("\n") == 1


def test_a_run_without_evaluation_is_a_failed_run(run_sweep, trainings, monkeypatch):
    trainings()
    monkeypatch.setattr(sweep.subprocess, "run", lambda command, **_: None)
    code, captured = run_sweep()
    assert code == 1 and "holds no evaluation, though its run has ended" in captured.err


GLUE = """
script: run_glue.py
seeds: [1, 2]
evaluation_rows: 3
keep_models: False
common: {max_steps: 250, max_length: 32}
methods:
  full: {lrs: [0.1, 0.2], flags: {method: full_rank}}
  lora: {lrs: [0.5], flags: {method: lora, rank: 8}}
"""


def test_a_study_of_fine_tuning(run_study, trainings, tmp_path):
    rows = [f'{{"sentence": "{number}", "label": 0}}' for number in range(10)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    made = trainings()
    inputs = {"model": "hub/name", "data": tmp_path / "rows.jsonl"}
    code, captured = run_study(GLUE, "--", "--max_steps", "5", "--seed=7", **inputs)
    assert code == 0, captured.err
    out = tmp_path / "out"
    train, validation = ((out / f"{name}.jsonl").read_text().splitlines() for name in ("train", "validation"))
    assert (len(train), len(validation)) == (7, 3) and sorted(train + validation) == rows and train + validation != rows
    first = made.commands[0]
    assert first["--train_file"] == str(out / "train.jsonl") and first["--model_name_or_path"] == "hub/name"
    assert first["--max_steps"] == "5" and first["--max_length"] == "32"  # the command line wins
    assert [command["--output_dir"].removeprefix(f"{out}/") for command in made.commands] == [
        *("full/lr0.1_seed1", "full/lr0.2_seed1", "full/lr0.2_seed2", "lora/lr0.5_seed1", "lora/lr0.5_seed2")
    ]
    assert {command["--seed"] for command in made.commands} == {"1", "2"}
    assert not list(out.rglob("model.safetensors"))
    assert captured.out.endswith(
        "| lora | 0.5000 ± 0.0000 (0.5000, 0.5000) | 0.5 | 0.5: 0.5000 | 2.00 |\n"
        "| full | 0.2000 ± 0.0000 (0.2000, 0.2000) | 0.2 (end of the range) | 0.1: 0.1000, 0.2: 0.2000 | 2.00 |\n"
    )
    results = json.loads((out / "results.json").read_text())
    assert results[1]["accuracies"] == [0.5, 0.5] and results[1]["trainable_parameters"] == 7
    code, captured = run_study(GLUE, **inputs)
    assert code == 2 and 'it was begun with flags {"max_steps": 5, "seed": 7} instead of {}' in captured.err


def test_a_study_of_option_tasks_tells_the_test_of_what_is_best_on_dev(run_study, trainings, tmp_path):
    text = "script: run_tasks.py\ncommon: {}\nmethods:\n  sgd: {lrs: [0.1, 0.3, 0.2], flags: {optimizer: sgd}}\n"
    made = trainings(perplexity=lambda lr: 0.5 - abs(lr - 0.2))
    code, captured = run_study(text, "--", "--split_by", "twins", "--shuffle_options", model=tmp_path, data="d")
    assert code == 0, captured.err
    assert [command["--output_dir"] for command in made.commands] == [
        str(tmp_path / "out" / "sgd" / f"lr{lr}") for lr in (0.1, 0.3, 0.2)
    ]
    assert all(command["--shuffle_options"] == "True" and "--seed" not in command for command in made.commands)
    assert (
        "| sgd | 0.5000 | 0.2 | 0.1: 0.4000, 0.3: 0.4000, 0.2: 0.5000 | 3.0000 | 1.0000 | 0.2500 | 2.00 |"
        in captured.out
    )
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (row["first_loss"], row["last_loss"], row["best_step"]) == (3.0, 1.0, 4)
    assert (tmp_path / "out" / "sgd" / "lr0.2" / "model.safetensors").exists()
    assert run_study(text, "--", "--split_by", "twins", "--shuffle_options", model=tmp_path, data="d")[0] == 0
    assert len(made.commands) == 3


def test_the_command_line_chooses_of_a_study(run_study, trainings):
    made = trainings()
    text = STUDY + "  lora: {lrs: [1.0], flags: {method: lora}}\n"
    assert run_study(text, "--methods", "lora", "--lrs", "0.5,0.25", "--seeds", "3")[0] == 0
    assert [(c["--method"], c["--lr"], c["--seed"]) for c in made.commands] == [
        ("lora", "0.5", "3"),
        ("lora", "0.25", "3"),
    ]


@pytest.mark.parametrize(
    ("text", "words", "inputs", "problem"),
    [
        (STUDY, ["--methods", "x,galore"], {}, "--methods: x is unknown; there is galore"),
        (STUDY, ["--lrs", "1,x"], {}, "--lrs must be different positive numbers"),
        (STUDY, ["--seeds", "1,1"], {}, "--seeds must be different whole numbers"),
        (STUDY, ["--jobs", "0"], {}, "--jobs must be a positive number, got 0"),
        (STUDY, ["--nproc_per_node", "-1"], {}, "--nproc_per_node must be positive"),
        (STUDY, ["--nproc_per_node", "2", "--jobs", "2"], {}, "--nproc_per_node must be positive and goes with"),
        (STUDY, ["--", "galore"], {}, "unexpected argument 'galore'"),
        (STUDY, [], {"dataset_path": "d", "model": "m"}, "--model is not for torchrun_main.py"),
        (GLUE, [], {"model": "m"}, "--data is required for run_glue.py"),
        (GLUE, [], {"model": "m", "data": "/nowhere"}, "--data /nowhere: cannot be read (No such file or directory)"),
    ],
    ids=range(10),
)
def test_bad_command_lines_of_a_study(run_study, trainings, text, words, inputs, problem):
    code, captured = run_study(text, *words, **inputs)
    (line,) = captured.err.splitlines()
    assert code == 2 and line.startswith(f"error: {problem}")


def known_flags(script):
    from peft_pretraining.config import cli
    from peft_pretraining.finetune.command_line import finetuning_flags
    from peft_pretraining.finetune.glue_settings import ENTRY as GLUE_ENTRY
    from peft_pretraining.finetune.options.settings import ENTRY as OPTION_ENTRY

    if script == "torchrun_main.py":
        return cli.all_flags()
    return finetuning_flags(GLUE_ENTRY if script == "run_glue.py" else OPTION_ENTRY)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_project_s_studies_are_good(path):
    read = file.read_study(path)
    known = {name for flag in known_flags(read.program.script) for name in flag.spellings}
    for method in read.methods.values():
        assert {*read.common, *method.flags, *(method.warm_up or {}), "lr", "seed"} <= known
        assert len(method.lrs) in (3, 5)


@pytest.mark.parametrize("path", PRETRAINING, ids=lambda path: path.stem)
def test_every_command_line_of_a_study_is_a_configuration(path, tmp_path, monkeypatch):
    monkeypatch.chdir(helpers.PROJECT)
    read = file.read_study(path)
    made = comparison.Study(read, {}, {}, tmp_path)
    for name, method in read.methods.items():
        for own in (method.flags, *([method.warm_up] if method.warm_up else [])):
            flags = made.flags(method.lrs[-1], 42, own)
            words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
            config = cli.load(words, {}, here=False).config
            assert (config.optimizer.lr, config.run.seed) == (method.lrs[-1], 42), name
            assert config.roles.adam_lr == {**read.common, **own}.get("adam_lr"), name
            assert config.data.eval_parts == 2 and config.method.method == own["method"], name
    if path.stem != "quickstart_rest":
        assert {method.flags["method"] for method in read.methods.values()} == METHODS


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b'{"a": null}', b'{"a": true}', b'{"a": NaN}'])
def test_results_that_were_cut_off_are_none(tmp_path, content):
    (tmp_path / "all_results.json").write_bytes(content)
    assert finetuning.read_results(tmp_path / "all_results.json", ("a",)) is None
    assert finetuning.read_results(tmp_path / "missing.json", ()) is None


def test_settings_of_a_study_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "study.json").write_text("[1")
    with pytest.raises(ConfigError, match=r"study.json cannot be read"), folder.opened(tmp_path, {}):
        pass
