"""Pipes in folders that somebody sent: they are refused like any other damage, and never waited for."""

from __future__ import annotations

import os

import pytest

from peft_pretraining.checkpoint import folder_lock, metrics_file, run_dir
from peft_pretraining.checkpoint.plain_files import regular
from peft_pretraining.checkpoint.train_state import read_counters
from peft_pretraining.finetune.output import read_results

pytestmark = pytest.mark.timeout(20)  # instead of for ever


@pytest.fixture
def pipe(tmp_path):
    """A function that makes a pipe in `tmp_path`, and returns `tmp_path`."""

    def make(name: str):
        os.mkfifo(tmp_path / name)
        return tmp_path

    return make


def test_only_files_are_regular(pipe, tmp_path):
    (tmp_path / "file").write_text("x")
    assert regular(tmp_path / "file").read_text() == "x"
    with pytest.raises(OSError, match="it is not a regular file"):
        regular(pipe("pipe") / "pipe")
    with pytest.raises(IsADirectoryError):
        regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        regular(tmp_path / "nothing")


def test_a_pipe_is_no_manifest(pipe):
    assert "manifest.json cannot be read" in run_dir.damage(pipe("manifest.json"))


def test_a_pipe_holds_no_counters(pipe):
    with pytest.raises(ValueError, match=r"training_state\.json cannot be read .*it is not a regular file"):
        read_counters(pipe("training_state.json"))


def test_a_pipe_holds_no_results(pipe):
    assert read_results(pipe("all_results.json") / "all_results.json") is None


def test_a_pipe_holds_no_metrics(pipe):
    records, problems = metrics_file.read_records(pipe("metrics.jsonl") / "metrics.jsonl")
    assert records == [] and "it is not a regular file" in problems[0]


def test_a_pipe_names_no_owner(pipe):
    assert str(folder_lock.read_owner(pipe(folder_lock.OWNER_FILE))) == "another process"
