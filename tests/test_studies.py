"""The scripts that make many runs: what they read, what they refuse, and that one process owns a study's folder."""

from __future__ import annotations

import json
import sys

import helpers
import pytest
from study_helpers import STUDY, comparison, file, finetuning, folder, sweep

from peft_pretraining.checkpoint.folder_lock import FolderLock
from peft_pretraining.config import cli
from peft_pretraining.flags import ConfigError

STUDIES = sorted((helpers.PROJECT / "configs" / "studies").glob("*.yaml"))
METHODS = {path.parent.name for path in (helpers.PROJECT / "peft_pretraining/methods").glob("[!_]*/settings.py")}
PRETRAINING = [path for path in STUDIES if "script:" not in path.read_text()]


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
        (STUDY + "baseline: x\n", ["baseline must be one of the methods, got 'x'"]),
        (STUDY + "start: {lr: 0.1}\n", ["start: num_training_steps must be a positive number, got None"]),
    ],
    ids=range(17),
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
    for name, method in read.methods.items():
        assert {*read.common, *method.flags, *(method.warm_up or {}), "lr", "seed"} <= known
        assert len(method.lrs) in (3, 5) or name == "frozen" or path.stem == "quickstart_rest"


@pytest.mark.parametrize("path", PRETRAINING, ids=lambda path: path.stem)
def test_every_command_line_of_a_study_is_a_configuration(path, tmp_path, monkeypatch):
    monkeypatch.chdir(helpers.PROJECT)
    read = file.read_study(path)
    made = comparison.Study(read, {}, {}, tmp_path)
    entries = {name: (method.lrs[-1], method.flags) for name, method in read.methods.items()}
    entries |= {f"{name}'s warm-up": (m.warm_up["lr"], m.warm_up) for name, m in read.methods.items() if m.warm_up}
    entries |= {"start": (read.start["lr"], read.start)} if read.start else {}
    for name, (lr, own) in entries.items():
        flags = made.flags(lr, 42, own)
        words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
        config = cli.load(words, {}, here=False).config
        assert (config.optimizer.lr, config.run.seed) == (lr, 42), name
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
