"""Runs watched in the terminal."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import time

import pytest
from report_helpers import record_of_evaluation, record_of_update, write_run

from peft_pretraining.checkpoint import folder_lock
from peft_pretraining.report import __main__ as report
from peft_pretraining.report import finding
from peft_pretraining.report import watch as watching

UPDATES = [record_of_update(step) for step in range(1, 5)]
LONG = "galore_with_a_very_long_name_that_no_terminal_has_room_for_日本/lr0.01_seed1"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def runs(tmp_path):
    """One that has finished, one that goes on, one that was stopped, one that has only begun."""
    folder = tmp_path / "runs"
    write_run(folder / "finished", [*UPDATES, record_of_evaluation(4)], num_training_steps=4)
    write_run(folder / LONG, [record_of_evaluation(0), *UPDATES], num_training_steps=100)
    write_run(folder / "stopped", [*UPDATES[:2], record_of_evaluation(2, None)], num_training_steps=100)
    write_run(folder / "begun", [], num_training_steps=100)
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": "now", "launcher": None}
    (folder / LONG / folder_lock.OWNER_FILE).write_text(json.dumps(owner))
    (folder / LONG / folder_lock.LOCK_FILE).touch()
    return folder


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_fits(runs, width):
    lines = watching.table(watching.Reader([runs]).read(), width, 40)
    assert len(lines) == 6 and all(watching._width(line) <= width for line in lines)
    assert "1 running, 2 stopped, 1 finished" in lines[0]
    heads = re.split(r"  +", lines[1])
    assert heads[:4] == ["run", "state", "updates", "loss"] and {"val ppl", "tok/s", "ETA"} <= set(heads)
    assert ({"lr", "val loss", "best ppl", "GiB", "skipped"} <= set(heads)) == (width == 200)
    first, *others = lines[2:]
    if width == 200:
        assert first.startswith(LONG)
    assert " running  " in first and " 4/100 " in first and first.endswith("0:00:48")  # 96 updates of half a second
    assert [re.split(r"  +", line)[:3] for line in others[:2]] == [
        ["begun", "stopped", "0/100"],
        ["stopped", "stopped", "2/100"],
    ]
    assert " nan " in others[1] and "ETA" not in others[1]


def test_more_runs_than_lines_are_counted(runs):
    lines = watching.table(watching.Reader([runs]).read(), 80, 5)
    assert len(lines) == 5 and lines[-1] == "... and 2 more"


def test_the_table_is_renewed_in_place_until_ctrl_c(runs, monkeypatch, capsys):
    terminal, slept = Terminal(), []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 2:
            raise KeyboardInterrupt
        with open(runs / LONG / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record_of_update(5)) + '\n{"update_step": 6, "lo')  # cut, as while it is written

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr("sys.stdout", terminal)
    assert report.main([str(runs), "--watch", "0.5"]) == 0
    first, second = terminal.getvalue().split("\x1b[6F")  # six lines up
    assert slept == [0.5, 0.5] and " 4/100 " in first and " 5/100 " in second
    assert all("\x1b[K" in line for line in first.splitlines()[:6])
    assert capsys.readouterr().err == ""


def test_without_a_terminal_there_is_a_line_for_each_run_with_news(runs, tmp_path, monkeypatch, capsys):
    def sleep(_):
        (runs / LONG / folder_lock.LOCK_FILE).unlink()
        for name in (LONG, "stopped", "begun"):
            records = [record_of_update(step) for step in range(1, 101)]
            (runs / name / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **settings: None)
    out = tmp_path / "out"
    assert report.main([str(runs), "--watch", "--out", str(out)]) == 0  # ends when all have finished
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == str(out / "report.html") and "\x1b" not in "".join(lines)
    told = [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", line) for line in lines]
    assert told[0] == f"{LONG}: running, update 4/100, loss 3.9960, val loss 4.0000, val perplexity 54.60, " + (
        "lr 1.00e-02, ETA 0:00:48, 1000 tok/s"
    )
    assert len(told) == 7 and sum("finished" in line for line in told) == 4


def test_a_run_that_has_not_changed_is_not_read_again(runs, monkeypatch):
    reader = watching.Reader([runs])
    reader.read()
    read, whole = [], finding.LoggedRun.read
    monkeypatch.setattr(
        finding.LoggedRun,
        "read",
        classmethod(lambda cls, folder, warnings: read.append(folder) or whole(folder, warnings)),
    )
    write_run(runs / "new", UPDATES, num_training_steps=4)
    assert len(reader.read()) == 5
    assert {folder.name for folder in read} == {"lr0.01_seed1", "new"}  # that which goes on, and a new one


@pytest.mark.parametrize("text", ["0", "-1", "x", "nan"])
def test_an_unusable_interval_is_refused(runs, capsys, text):
    with pytest.raises(SystemExit) as stopped:
        report.main([str(runs), f"--watch={text}"])
    assert stopped.value.code == 2 and "--watch" in capsys.readouterr().err


def test_a_folder_without_runs_is_refused(tmp_path, capsys):
    assert report.main([str(tmp_path), "--watch"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
