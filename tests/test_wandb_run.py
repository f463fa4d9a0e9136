"""wandb's errors end no run, and its end is not waited for without end."""

from __future__ import annotations

import threading

import pytest

from peft_pretraining.training import wandb_run
from peft_pretraining.training.wandb_run import WandbRun


class Broken:
    def __init__(self):
        self.calls = []

    def log(self, values):
        self.calls.append(values)
        raise ConnectionError("the service is gone\nand more")

    def finish(self, exit_code):
        raise OSError


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(wandb_run.log, "warning", lambda text, *values: said.append(text % values))
    return said


def test_an_error_is_said_once(warnings):
    broken = Broken()
    run = WandbRun(broken)
    run.log({"loss": 1.0})
    run.log({"loss": 2.0})
    run.finish(0)
    assert broken.calls == [{"loss": 1.0}]
    assert warnings == ["wandb records no further (the service is gone); metrics.jsonl has everything"]


def test_an_end_that_does_not_come(warnings, monkeypatch):
    monkeypatch.setattr(wandb_run, "SECONDS_TO_FINISH", 0.1)
    hanging, begun = threading.Event(), threading.Event()
    endless = Broken()
    endless.finish = lambda exit_code: (begun.set(), hanging.wait(20))
    WandbRun(endless).finish(0)
    assert begun.is_set() and len(warnings) == 1 and "wandb sync" in warnings[0]
    hanging.set()


def test_without_a_run_nothing_happens(warnings):
    run = WandbRun(None)
    run.watch(None), run.log({}), run.finish(1)
    assert warnings == []
