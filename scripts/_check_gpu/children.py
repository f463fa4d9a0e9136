"""Processes of their own, forked from one that has imported everything: a fresh device at no import's cost.

The parent must not have used a GPU, nor have threads: nothing here may be called from one that has.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_POLL = 0.02


@dataclass
class Child:
    pid: int
    log: Path
    """What it wrote to stdout and stderr."""
    code: int | None = None
    """Its exit code, negative for a signal; None while it runs."""

    @classmethod
    def start(cls, act: Callable[[], int | None], log: Path, **environment: str) -> Child:
        """Call `act` in a fork, the leader of a process group; what it returns is the exit code."""
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.setpgid(0, 0)
                _write_to(log)
                os.environ.update(environment)
                code = act() or 0
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                for stream in (sys.stdout, sys.stderr):
                    stream.flush()
                os._exit(code)
        return cls(pid, log)

    def running(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is None

    def wait(self, seconds: float) -> bool:
        """Whether it ended by then; otherwise it is killed, and what it started with it."""
        deadline = time.monotonic() + seconds
        while self.running():
            if time.monotonic() > deadline:
                self.kill()
                return False
            time.sleep(_POLL)
        return True

    def signal(self, number: int) -> None:
        if self.running():
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it and its process group, as far as there is one left."""
        for act in (lambda: os.killpg(self.pid, signal.SIGKILL), lambda: os.kill(self.pid, signal.SIGKILL)):
            try:
                if self.code is None:
                    act()
            except OSError:
                pass
        if self.code is None:
            _, status = os.waitpid(self.pid, 0)
            self.code = os.waitstatus_to_exitcode(status)

    def last_words(self, lines: int = 1) -> str:
        """The end of what it wrote: an error's line, for the most part."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])


def _write_to(log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
