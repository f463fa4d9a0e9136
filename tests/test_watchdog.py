"""The watchdog in processes of its own; under torchrun it is in test_faults.py."""

from __future__ import annotations

import subprocess
import sys
import time

import helpers
import psutil
import pytest
from helpers import PROJECT

from peft_pretraining.runtime.watchdog import EXIT_STUCK, FIRST_UPDATE_FACTOR, Watchdog, goes_on, watched

BEGIN = """
import ctypes, sys, threading, time
from pathlib import Path
from peft_pretraining.runtime import watchdog
from peft_pretraining.runtime.watchdog import Watchdog
folder = Path(sys.argv[1])
"""


def python(body: str, *arguments, **more) -> subprocess.CompletedProcess:
    program = [sys.executable, "-c", BEGIN + body, *map(str, arguments)]
    return subprocess.run(program, cwd=PROJECT, capture_output=True, text=True, timeout=60, **more)


def test_a_hang_dumps_all_stacks_and_has_its_own_exit_code(tmp_path):
    body = """
def other_thread_waits(): time.sleep(60)
threading.Thread(target=other_thread_waits, daemon=True).start()
def main_thread_hangs(): time.sleep(60)
with Watchdog(0.2, folder, 3) as dog:
    for step in range(3):
        with dog.update(step):
            if step == 2: main_thread_hangs()
"""
    done = python(body, tmp_path)
    assert done.returncode == EXIT_STUCK != 75
    for text in (done.stderr, (tmp_path / "stuck_rank3.txt").read_text()):
        assert "rank 3: update 2 took more than 0.2 s (--step_timeout 0.2); exit code 124." in text
        assert "in main_thread_hangs" in text and "in other_thread_waits" in text


def test_a_hang_that_holds_the_interpreters_lock_ends_too(tmp_path):
    body = """
watchdog._LAST_RESORT_SECONDS = 0.5
with Watchdog(0.2, folder, 0) as dog:
    with dog.update(0): pass
    with dog.update(1):
        ctypes.PyDLL(None).sleep(60)  # PyDLL: without releasing the lock
"""
    began = time.monotonic()
    done = python(body, tmp_path)
    assert done.returncode == 1 and time.monotonic() - began < 30
    assert "Timeout" in done.stderr and "<string>" in done.stderr


def test_a_folder_that_cannot_be_written_does_not_keep_it_from_ending(tmp_path):
    body = "with Watchdog(0.02, folder / 'none', 0) as dog, dog.update(0): time.sleep(60)"
    done = python(body, tmp_path)
    assert done.returncode == EXIT_STUCK
    assert f"times {FIRST_UPDATE_FACTOR} for the first update" in done.stderr


def test_what_is_not_an_update_and_the_first_one_may_take_longer(tmp_path):
    with Watchdog(1, tmp_path, 0) as dog:
        with dog.update(0):
            time.sleep(1.5)
        time.sleep(1.5)  # an evaluation, a checkpoint
        for step in range(1, 10):
            with dog.update(step):
                time.sleep(0.05)
    assert list(tmp_path.iterdir()) == []


def test_an_update_that_fails_is_not_watched_any_more(tmp_path):
    with Watchdog(0.05, tmp_path, 0) as dog:
        with pytest.raises(ZeroDivisionError), dog.update(0):
            raise ZeroDivisionError
        time.sleep(0.7)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what, factor", [("a save", 2), ("an evaluation's batch", 2)])
def test_whatever_is_watched_ends_too(tmp_path, what, factor):
    """Saves, evaluations and restores, in which another rank may never come to a collective."""
    body = f"""
@watchdog.watched({what!r}, {factor})
def act(): watchdog.goes_on(); time.sleep(60)
with Watchdog(0.2, folder, 1): act()
"""
    done = python(body, tmp_path)
    assert done.returncode == EXIT_STUCK
    assert f"rank 1: {what} took more than 0.4 s (--step_timeout 0.2, times 2 for this)" in done.stderr


def test_progress_gives_it_as_long_again(tmp_path):
    @watched("an evaluation's batch", 1)
    def evaluate():
        for _ in range(4):
            goes_on()
            time.sleep(0.6)

    with Watchdog(1.5, tmp_path, 0):
        evaluate()
    assert list(tmp_path.iterdir()) == []
    evaluate()  # nothing is open


def test_off_by_default(tmp_path):
    before = psutil.Process().num_threads()
    with Watchdog(0.0, tmp_path, 0) as dog, dog.update(0):
        assert psutil.Process().num_threads() == before


@pytest.mark.slow
def test_slow_evaluations_and_saves_do_not_trip_it(command, tmp_path, monkeypatch):
    from peft_pretraining.checkpoint.checkpointer import Checkpointer
    from peft_pretraining.training import loop as train

    for owner, name in ((train, "evaluate"), (Checkpointer, "save")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, original=original: (time.sleep(4), original(*args))[1])
    assert helpers.run(command(step_timeout=3, num_training_steps=3)) == 0
    assert not list((tmp_path / "run").glob("stuck*"))


def test_a_hanging_data_loader_of_a_real_run(command, tmp_path):
    """One process; the worker that hangs goes with it, and the same command then finishes."""
    (tmp_path / "faults.json").write_text('{"hang": [0, 13]}')
    flags = [*command(step_timeout=4, workers=1), *helpers.RESUME]
    program = [sys.executable, str(PROJECT / "tests" / "faulty_run.py"), str(tmp_path / "faults.json"), *flags]
    environment = helpers.child_environment(RANK="0", WATCHDOG_TEST=str(tmp_path))
    with open(tmp_path / "log", "w") as log:
        assert subprocess.run(program, env=environment, stderr=log, timeout=120).returncode == EXIT_STUCK
    text = (tmp_path / "log").read_text()
    assert "rank 0: update 13 took more than 4 s" in text and "next_micro_batches" in text
    left = [
        p.pid
        for p in psutil.process_iter(["environ"])
        if (p.info["environ"] or {}).get("WATCHDOG_TEST") == str(tmp_path)
    ]
    assert left == []
    assert helpers.run([*command(), *helpers.RESUME]) == 0
    assert [row[0] for row in helpers.updates(tmp_path / "run")] == list(range(1, 21))
