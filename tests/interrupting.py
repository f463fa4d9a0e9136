"""One launch of `kill_and_resume.py`, from its start to its interruption: which moment, which processes, and how."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import helpers
import psutil

PATIENCE = 300.0
"""Seconds that a launch may take, and that the processes of one that was interrupted may take to end."""

MOMENTS = ("start", "resume", "training", "save", "async_save", "evaluation")
TARGETS = ("launcher", "rank", "all")
_MARK = "KILL_AND_RESUME"
_START_SECONDS = 8.0
_UPDATE_SECONDS = 0.03  # about as long as an update of these models takes
_SAVE_SECONDS = 0.01  # less than writing one of its checkpoints takes


@dataclass(frozen=True)
class Interruption:
    moment: str
    target: str
    signal: int
    updates: int
    """How many updates it goes on for, from where it was, before the moment is waited for."""


@dataclass
class Launched:
    """A launch, all of whose processes are known by a variable of their environment."""

    process: subprocess.Popen
    folder: Path
    log: Path
    begun_at: int
    """Bytes of the log that earlier launches wrote."""

    @classmethod
    def begin(cls, command: list[str], folder: Path, log: Path) -> Launched:
        before = log.stat().st_size if log.exists() else 0
        environment = helpers.child_environment(**{_MARK: str(folder)})
        with open(log, "a") as file:
            process = subprocess.Popen(
                command,
                **{"stdout": file, "stderr": file, "cwd": log.parent, "env": environment},
                preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # should this script run under nohup
            )
        return cls(process, folder, log, before)

    def said(self) -> str:
        with open(self.log) as file:
            file.seek(self.begun_at)
            return file.read()

    def living(self) -> list[psutil.Process]:
        """All of its processes, and those of earlier launches, data loaders included."""
        found = []
        for process in psutil.process_iter(["environ", "status"]):
            if (process.info["environ"] or {}).get(_MARK) == str(self.folder):
                if process.info["status"] != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        """The training processes under torchrun."""
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self.process.pid).children()
        return []

    def send(self, target: str, number: int, rng: random.Random) -> None:
        ranks = self.ranks()
        if target == "rank" and ranks:
            pids = [rng.choice(ranks).pid]
        elif target == "all":
            pids = [self.process.pid, *(rank.pid for rank in ranks)]
        else:
            pids = [self.process.pid]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.returncode} before {what}\n{self.said()}"
            assert time.monotonic() < end, f"no {what} in {PATIENCE:g} s\n{self.said()}"
            time.sleep(0.001)

    def end(self) -> tuple[int, float]:
        """Its exit code, and how many seconds after it the last of its processes was gone."""
        code, began = self.process.wait(PATIENCE), time.monotonic()
        while left := self.living():
            assert time.monotonic() - began < PATIENCE, f"left behind: {left}\n{self.said()}"
            time.sleep(0.05)
        return code, time.monotonic() - began

    def kill(self) -> None:
        self.process.kill()
        for process in self.living():
            with contextlib.suppress(psutil.Error):
                process.kill()


class PreTraining:
    """What a launch of `torchrun_main.py` shows of its progress."""

    def __init__(self, save_dir: Path, eval_every: int):
        self._folder, self._eval_every = save_dir, eval_every

    def done(self) -> int:
        """The last update with a complete line in `metrics.jsonl`, 0 if there is none."""
        return max((int(line.split(b":")[1].split(b",")[0]) for line in self._lines()), default=0)

    def is_evaluating(self) -> bool:
        last = self._lines()[-1:]
        return bool(last) and self.done() % self._eval_every == 0 and b"final_eval_loss" not in last[0]

    def being_saved(self) -> set[int]:
        """Inodes of the folders in which checkpoints are being written."""
        return _inodes(self._folder / name for name in helpers.unfinished(self._folder))

    def checkpoints(self) -> list[int]:
        return helpers.checkpoints(self._folder)

    def _lines(self) -> list[bytes]:
        path = self._folder / "metrics.jsonl"
        return (path.read_bytes().split(b"\n")[:-1] if path.exists() else [])[-3:]


class FineTuning:
    """What a launch of `run_glue.py` shows: its checkpoints alone, the newest of which may be incomplete."""

    def __init__(self, output_dir: Path):
        self._folder = output_dir

    def done(self) -> int:
        return max(self.checkpoints(), default=0)

    def is_evaluating(self) -> bool:
        return False

    def being_saved(self) -> set[int]:
        return _inodes(path for path in self._folder.glob("*checkpoint-*"))

    def checkpoints(self) -> list[int]:
        return sorted(int(p.parent.name.split("-")[1]) for p in self._folder.glob("checkpoint-*/trainer_state.json"))


def _inodes(paths) -> set[int]:
    found = set()
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # renamed or removed meanwhile
            found.add(path.stat().st_ino)
    return found


def interrupt(
    launched: Launched, what: Interruption, progress: PreTraining | FineTuning, rng: random.Random
) -> tuple[bool, int]:
    """Wait for the moment, and interrupt; whether it was hit, and the update at which it was."""
    began_at, left_over = progress.done(), progress.being_saved()
    if what.moment == "start":
        end = time.monotonic() + rng.uniform(0, _START_SECONDS)
        while time.monotonic() < end and progress.done() <= began_at:
            time.sleep(0.001)
    elif what.moment == "resume" and progress.checkpoints():
        launched.wait_for(lambda: "resuming from" in launched.said() or "going on from" in launched.said(), "resume")
        time.sleep(rng.uniform(0, 0.2))
    else:
        launched.wait_for(lambda: progress.done() >= began_at + what.updates, f"update {began_at + what.updates}")
        if what.moment in ("save", "async_save"):
            launched.wait_for(lambda: bool(progress.being_saved() - left_over), "save")
            time.sleep(rng.uniform(0, _SAVE_SECONDS))
        elif what.moment == "evaluation":
            launched.wait_for(progress.is_evaluating, "evaluation")
        else:
            time.sleep(rng.uniform(0, _UPDATE_SECONDS))
    launched.send(what.target, what.signal, rng)
    hit = {
        "start": progress.done() <= began_at,
        "save": bool(progress.being_saved() - left_over),
        "async_save": bool(progress.being_saved() - left_over),
        "evaluation": progress.is_evaluating(),
    }
    return hit.get(what.moment, True), progress.done()


def command_for(script: str, layout: str, arguments: list[str]) -> list[str]:
    """`layout`: one process by itself, or two under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if layout != "single" else []
    return [sys.executable, *launcher, str(helpers.PROJECT / script), *arguments]


SIGNAL_NAMES = {int(number): number.name for number in signal.Signals}
