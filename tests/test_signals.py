"""Signals at every moment of a script's life, and the death of its launcher: in processes of their own, without torch,
because what answers them must not need it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import PROJECT

from peft_pretraining.runtime.launcher import launcher_problems
from peft_pretraining.runtime.signals import EXIT_ABORTED, EXIT_REQUEUE

BEGIN = """
import atexit, ctypes, os, signal, sys, time
from pathlib import Path
from peft_pretraining.runtime.signals import Stopped, StopRequest, run_script
def say(word): print(word, flush=True)
def hang():
    mutex = (ctypes.c_char * 64)()
    while ctypes.CDLL(None).pthread_mutex_lock(mutex) == 0: pass  # the second time without end
def train():
    with StopRequest() as stop:
        say("training")
        while not stop.received: time.sleep(0.01)
        say("saving")
        time.sleep(1)
    return 75
"""
ALL = [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT]


@contextlib.contextmanager
def script(body: str, *prefix: str, **environment: str) -> Iterator[subprocess.Popen]:
    """A process whose `main()` the body defines."""
    program = f"{BEGIN}\n{body}\nsys.exit(run_script(main))"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", program],
        **{"cwd": PROJECT, "env": {**clean, **environment}, "text": True},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def said(process: subprocess.Popen, word: str) -> None:
    assert process.stdout.readline() == word + "\n", process.stderr.read()


@pytest.mark.parametrize("number", ALL, ids=lambda number: number.name)
@pytest.mark.parametrize("waiting", ["time.sleep(60)", "hang()"])
def test_before_there_is_anything_to_save_it_ends_at_once(number, waiting):
    """Also while the main thread is in a call that never comes back to Python, as when it waits for other ranks."""
    with script(f"def main(): say('up'); {waiting}") as process:
        said(process, "up")
        process.send_signal(number)
        assert process.wait(20) == EXIT_REQUEUE
        lines = process.stderr.read().split("\n")
    assert [line for line in lines if line] == [
        "asked to stop before there was anything to save; launch the same command again"
    ]


@pytest.mark.parametrize("first", ALL, ids=lambda number: number.name)
def test_further_signals_change_nothing(first):
    """While it saves, after the loop, and while the interpreter ends: there handlers of Python's are gone."""
    body = (
        "atexit.register(time.sleep, 0.4)\ndef main():\n    code = train(); say('saved'); time.sleep(0.4); return code"
    )
    with script(body) as process:
        said(process, "training")
        process.send_signal(first)
        while process.poll() is None:
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
                process.send_signal(number)
            time.sleep(0.02)
        assert process.returncode == EXIT_REQUEUE
        assert process.stdout.read() == "saving\nsaved\n" and process.stderr.read() == ""


def test_a_second_ctrl_c_aborts():
    with script("main = train") as process:
        said(process, "training")
        process.send_signal(signal.SIGINT)
        said(process, "saving")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == EXIT_ABORTED
        assert process.stderr.read().strip().startswith("aborted: Ctrl-C came again") and not process.stdout.read()


def test_ctrl_c_that_comes_twice_under_torchrun_is_one(tmp_path):
    with launched(tmp_path, "main = train") as (launcher, child):
        os.kill(child, signal.SIGINT)
        os.kill(child, signal.SIGINT)
        assert launcher.stdout.readline() == "saving\n" and launcher.wait(20) == EXIT_REQUEUE


def test_nohup_keeps_its_promise():
    with script("main = train", "nohup") as process:
        said(process, "training")
        process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == EXIT_REQUEUE


@pytest.mark.parametrize(
    "body, code, last",
    [
        ("def main(): return 3", 3, ""),
        ("def main(): sys.exit(4)", 4, ""),
        ("def main(): raise Stopped", EXIT_REQUEUE, ""),
        ("def main(): 1 / 0", 1, "ZeroDivisionError: division by zero"),
    ],
)
def test_exit_codes(body, code, last):
    with script(body) as process:
        assert process.wait(20) == code
        assert (process.stderr.read().splitlines() or [""])[-1] == last


def test_a_forked_child_is_on_its_own():
    """Its signals are not its parent's, and it can be ended by SIGTERM, as pools end their workers."""
    body = """
def main():
    child = os.fork()
    if child == 0:
        time.sleep(20)
        os._exit(0)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        os.kill(child, number)
    time.sleep(0.2)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGTERM)
    assert os.waitpid(child, 0)[1] == signal.SIGTERM
    time.sleep(0.2)
    return 7
"""
    with script(body) as process:
        assert process.wait(20) == 7, process.stderr.read()


# The launcher's death.


@contextlib.contextmanager
def launched(folder: Path, body: str, before: str = "") -> Iterator[tuple[subprocess.Popen, int]]:
    """A script under a stand-in for torchrun, and the script's process id; the launcher's exit code is the script's."""
    library = folder / "libtorch_stand_in.so"  # what tells torchrun from other parents
    library.write_bytes(bytes(4096))
    (folder / "script.py").write_text(f"{before}\n{BEGIN}\n{body}\nsys.exit(run_script(main))")
    launcher = f"""
import mmap, os, subprocess, sys
loaded = mmap.mmap(os.open({str(library)!r}, os.O_RDONLY), 4096, prot=mmap.PROT_READ)
environment = {{**os.environ, "TORCHELASTIC_RUN_ID": "none", "PYTHONPATH": {str(PROJECT)!r}}}
child = subprocess.Popen([sys.executable, {str(folder / "script.py")!r}], env=environment, start_new_session=True)
print(child.pid, flush=True)
sys.exit(child.wait())
"""
    command = [sys.executable, "-c", launcher]
    child = None
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            child = int(process.stdout.readline())
            if "say" in body or "train" in body:
                assert process.stdout.readline() == "training\n"
            yield process, child
        finally:
            process.kill()
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


def is_gone(pid: int, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.05, 0.1, 0.2, 0.4])
def test_a_launcher_that_dies_while_it_starts_leaves_nothing(tmp_path, delay):
    """Before the interpreter runs, before the kernel was asked to tell of it, or while imports take their time."""
    with launched(tmp_path, "def main(): time.sleep(60)", before="import time; time.sleep(0.1)") as (launcher, child):
        time.sleep(delay)
        launcher.kill()
        assert is_gone(child)


def test_a_launcher_that_dies_during_the_training_lets_it_save(tmp_path):
    body = f"def main():\n    train()\n    Path({str(tmp_path / 'saved')!r}).touch()"
    with launched(tmp_path, body) as (launcher, child):
        launcher.kill()
        assert is_gone(child)
    # The process's last act: it was saved before, or its death would have come within the loop.
    assert (tmp_path / "saved").exists()


def test_ctrl_c_and_the_launchers_death_abort(tmp_path):
    body = f"def main():\n    train()\n    Path({str(tmp_path / 'saved')!r}).touch()"
    with launched(tmp_path, body) as (launcher, child):
        os.kill(child, signal.SIGINT)
        assert launcher.stdout.readline() == "saving\n"
        launcher.kill()
        assert is_gone(child)
    assert not (tmp_path / "saved").exists()


def test_a_process_that_nobody_launched_survives_its_shell(tmp_path):
    program = f"{BEGIN}\ndef main(): say(os.getpid()); return train()\nsys.exit(run_script(main))"
    shell = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", shell, program], cwd=PROJECT, stdout=subprocess.PIPE, text=True
    ) as parent:
        child = int(parent.stdout.readline())
        parent.kill()
        try:
            assert not is_gone(child, 0.5)
        finally:
            os.kill(child, signal.SIGKILL)


# What the launcher says.

GROUP = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "environment, problem",
    [
        ({}, None),
        ({"WORLD_SIZE": "1"}, None),
        ({"RANK": "0"}, None),
        (GROUP, None),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE must be a whole number of at least 1, got ''"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE must be"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE must be"),
        ({"WORLD_SIZE": "²"}, "WORLD_SIZE must be"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE must be"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set"),
        ({**GROUP, "MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({**GROUP, "RANK": "x"}, "RANK must be a whole number of at least 0, got 'x'"),
        ({**GROUP, "RANK": "2"}, "RANK 2 must be below WORLD_SIZE 2"),
        ({**GROUP, "LOCAL_RANK": "1.5"}, "LOCAL_RANK must be"),
        ({**GROUP, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK 1 must be below LOCAL_WORLD_SIZE 1"),
        ({**GROUP, "MASTER_PORT": "no"}, "MASTER_PORT must be a port's number, got 'no'"),
    ],
)
def test_launcher_variables(environment, problem):
    problems = launcher_problems(environment)
    assert len(problems) == (problem is not None)
    assert problem is None or (problem in problems[0] and "\n" not in problems[0])


@pytest.mark.parametrize("name", ["torchrun_main", "run_glue", "run_tasks"])
def test_every_entry_point_refuses_a_group_without_a_launcher(name, monkeypatch, capsys):
    import importlib

    for variable in GROUP:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert importlib.import_module(name).main(["--lr", "0.1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: WORLD_SIZE is 2, but RANK,")
