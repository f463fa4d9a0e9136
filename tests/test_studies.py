"""The scripts that make many runs: what they read, what they refuse, and that one process owns a study's folder."""

from __future__ import annotations

import json
import subprocess
import sys

import helpers
import pytest

sys.path.insert(0, str(helpers.PROJECT / "scripts"))

import option_study
import sarcasm_study
import study
import study_folder
import sweep

from peft_pretraining.checkpoint.folder_lock import FolderLock
from peft_pretraining.flags import ConfigError

STUDY = """
seeds: [42, 1]
common: {model_config: m.json, num_training_steps: 10}
methods:
  galore: {lrs: [0.1, 0.2], flags: {method: galore}}
"""


class Trainings:
    """Takes the place of the training processes: each leaves the metrics that it is told to."""

    def __init__(self, perplexity=lambda lr: lr, more: bytes = b""):
        self.commands, self.perplexity, self.more = [], perplexity, more

    def __call__(self, command, **_):
        flags = dict(zip(command[2::2], command[3::2], strict=False))
        self.commands.append(flags)
        value = self.perplexity(float(flags["--lr"]))
        record = {"update_step": 10, "final_eval_perplexity": value, "optimizer_state_bytes": 8}
        path = study.Path(flags["--save_dir"]) / "metrics.jsonl"
        path.write_bytes(json.dumps(record).encode() + b"\n" + self.more)
        return subprocess.CompletedProcess(command, 0)


@pytest.fixture
def trainings(monkeypatch):
    def stand_in(**settings):
        made = Trainings(**settings)
        monkeypatch.setattr(sweep.subprocess, "run", made)
        return made

    return stand_in


@pytest.fixture
def run_study(tmp_path, monkeypatch, capsys):
    def run(text=STUDY, data="data"):
        (tmp_path / "study.yaml").write_text(text)
        argv = ["study.py", str(tmp_path / "study.yaml"), "--dataset_path", data, "--out", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", argv)
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
    assert all("passed over 1 line(s)" in line for line in captured.err.splitlines())
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
    code, captured = run_study(data="elsewhere")
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
        ("{}", ["seeds must be", "common must be", "methods must be"]),
        (STUDY + "more: 1\n", ["unknown key 'more'"]),
        (STUDY.replace("[42, 1]", "[1, 1]"), ["seeds must be a list of different whole numbers, got [1, 1]"]),
        (STUDY.replace("0.2", "4e-4"), ["galore: lrs must be"]),
        (STUDY.replace("0.2", ".nan"), ["galore: lrs must be"]),
        (STUDY.replace("num_training_steps: 10", "num_training_steps: x"), ["common: num_training_steps must be"]),
        (STUDY.replace("galore: {", "../galore: {"), ["methods: '../galore' cannot be the name of a folder"]),
        (STUDY.replace("{method: galore}", "{method: [galore]}, warm_up: 3"), ["method must be", "warm_up must be"]),
        (STUDY.replace("common", "seeds"), ["key 'seeds' is given twice, in lines 2 and 3"]),
    ],
    ids=range(11),
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


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b'{"a": null}', b'{"a": true}', b'{"a": NaN}'])
def test_results_that_were_cut_off_are_none(tmp_path, content):
    (tmp_path / "all_results.json").write_bytes(content)
    assert study_folder.read_results(tmp_path / "all_results.json", ("a",)) is None
    assert study_folder.read_results(tmp_path / "missing.json", ()) is None


def test_settings_of_a_study_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "study.json").write_text("[1")
    with pytest.raises(ConfigError, match=r"study.json cannot be read"), study_folder.opened(tmp_path, {}):
        pass


@pytest.mark.parametrize(
    ("script", "argv", "problem"),
    [
        (option_study, "--model m --data d --lrs 1,x", "--lrs must be different positive numbers"),
        (sarcasm_study, "--model m --data {missing}", "--data {missing}: cannot be read (No such file or directory)"),
        (sarcasm_study, "--model m --data d --seeds 1,1", "--seeds must be different whole numbers"),
    ],
)
def test_bad_input_of_the_other_studies(tmp_path, monkeypatch, capsys, script, argv, problem):
    missing = str(tmp_path / "missing")
    words = argv.format(missing=missing).split()
    monkeypatch.setattr(sys, "argv", ["study", *words, "--out", str(tmp_path / "out")])
    assert script.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: " + problem.format(missing=missing))
