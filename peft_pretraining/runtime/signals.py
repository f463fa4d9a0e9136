"""Being asked to stop: a scheduler's SIGTERM or SIGUSR1, a lost terminal's SIGHUP, Ctrl-C's SIGINT.

All four mean: finish the update, save, exit with 75. A script (`run_script`) answers them from its first line to its
last. While it imports, builds and reads there is nothing to save, and it exits with 75 at once, even from within a call
that does not return to Python. In the loop a `StopRequest` remembers the first one; further ones change nothing, for a
process that dies of one would lose its exit code, but a second Ctrl-C aborts. Under torchrun, which passes Ctrl-C on,
that is Ctrl-C and then torchrun's death.

Nothing here imports torch before it is needed: handlers come before heavy imports.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

from peft_pretraining.runtime import processes, workers
from peft_pretraining.runtime.environment import set_up_allocator

if TYPE_CHECKING:
    from peft_pretraining.distributed import ProcessGroup

EXIT_REQUEUE = 75
"""Exit code after stopping on request with everything saved (EX_TEMPFAIL of sysexits.h): launch it again."""

EXIT_ABORTED = 130
"""Exit code after a second Ctrl-C: 128 and the signal's number, as shells have it."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)

_SECONDS_TO_SAVE = 600.0
"""How long a process whose launcher died may take to save and end: peers that died, too, may keep it from it."""

_SECONDS_BETWEEN_CTRL_C = 1.0
"""Of a process under torchrun, to which the same Ctrl-C may come twice: from the terminal and from torchrun."""

_STDERR = 2  # the descriptor: what `sys.stderr` is may be locked by the main thread


class Stopped(BaseException):
    """What ends a script that was asked to stop, all that is needed having been saved. No error that may be handled."""


class StopRequest:
    """Remembers that it was asked to stop while it is open, instead of dying of it."""

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[int, Callable[[int, FrameType | None], Any] | int | signal.Handlers | None] = {}

    def __enter__(self) -> StopRequest:
        for number in _answered():
            self._previous[number] = signal.signal(number, self._remember)
        if _script is not None:
            _script.saves_itself = True
            self.received = _script.asked
        processes.on_launchers_death(signal.SIGTERM)
        return self

    def __exit__(self, *_: object) -> None:
        processes.on_launchers_death(signal.SIGKILL)
        if _script is not None:
            _script.ignore_further()
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def anywhere(self, group: ProcessGroup) -> bool:
        """Whether any rank was asked to stop; the answer is the same on all."""
        return group.sum_on_host(int(self.received)) > 0


def run_script(main: Callable[[], int]) -> int:
    """A script's whole life: `main`'s exit code, with signals answered and the launcher's death noticed throughout.

    Of a process that shares its group with others, an error ends it at once, its workers with it: the others wait for
    it, and what the interpreter does at its end may wait for them.
    """
    global _script
    set_up_allocator()
    processes.end_with_launcher()
    _script = _Script()
    try:
        code = main()
    except Stopped:
        code = EXIT_REQUEUE
    except SystemExit as error:  # --help
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    _script.ignore_further(to_the_end=True)
    if code not in (0, EXIT_REQUEUE) and processes.has_launcher():
        leave_at_once(code)
    if "torch.distributed" in sys.modules:
        from peft_pretraining.runtime.leaving import leave_groups

        if not leave_groups():
            atexit._run_exitfuncs()  # everything that the interpreter's end would do and anybody would miss
            leave_at_once(code)
    return code


def leave_at_once(code: int) -> None:
    """End the process without what the interpreter does at its end; what was printed is printed."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    workers.kill_workers()
    os._exit(code)


def is_script() -> bool:
    """Whether this process is one of the scripts: its signals are ours to its end."""
    return _script is not None


_script: _Script | None = None
"""Of a process that is one of the scripts; None in tests, notebooks and other programs, whose signals are theirs."""


class _Script:
    """Answers signals of a script: a thread hears of them at once, whatever the main thread does."""

    def __init__(self) -> None:
        self.saves_itself = False
        """The loop has begun: a request is remembered there."""
        self.asked = False
        """There was a request since."""
        self._interrupted_at: float | None = None
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        self._writing = writing
        for number in _answered():
            signal.signal(number, _nothing)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        # A signal to a child that has not come to `_in_child` yet would go into the parent's pipe.
        os.register_at_fork(
            before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS),
            after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS),
            after_in_child=self._in_child,
        )
        threading.Thread(target=self._listen, args=[reading], name="signals", daemon=True).start()

    def ignore_further(self, to_the_end: bool = False) -> None:
        """Nothing is left to be saved. Not a handler of Python's, which is taken away before the process has ended;
        but Ctrl-C can abort what may wait for a network, until `to_the_end`."""
        self.saves_itself = True
        for number in SIGNALS:
            if number != signal.SIGINT or to_the_end:
                signal.signal(number, signal.SIG_IGN)
            else:
                signal.signal(number, _nothing)

    def _in_child(self) -> None:
        """Forked: signals are the parent's business, and so is the pipe, but SIGTERM ends a child as usual."""
        global _script
        _script = None
        signal.set_wakeup_fd(-1)
        os.close(self._writing)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _listen(self, pipe: int) -> None:
        while received := os.read(pipe, 1):
            number = received[0]
            if number not in SIGNALS:  # of child processes
                continue
            if not self.saves_itself:
                _say("asked to stop before there was anything to save; launch the same command again")
                workers.kill_workers()
                os._exit(EXIT_REQUEUE)
            self.asked = True
            if number == signal.SIGINT and self._is_second_interrupt():
                _abort()
            if processes.launcher_is_gone():
                if self._interrupted_at is not None:
                    _abort()
                threading.Thread(target=_end_in_time, name="end in time", daemon=True).start()

    def _is_second_interrupt(self) -> bool:
        now, before = time.monotonic(), self._interrupted_at
        if before is None:
            self._interrupted_at = now
            return False
        return not processes.has_launcher() or now - before >= _SECONDS_BETWEEN_CTRL_C


def _answered() -> list[int]:
    """All but SIGHUP under nohup, which had it ignored."""
    return [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]


def _nothing(number: int, frame: FrameType | None) -> None:
    """For the main thread: the listening thread acts."""


def _abort() -> None:
    _say("aborted: Ctrl-C came again; the newest complete checkpoint is as it was")
    workers.kill_workers()
    os._exit(EXIT_ABORTED)


def _end_in_time() -> None:
    time.sleep(_SECONDS_TO_SAVE)
    _say(f"the launcher is gone, and saving took more than {_SECONDS_TO_SAVE:g} s: giving up")
    workers.kill_workers()
    os._exit(1)


def _say(line: str) -> None:
    """One line per machine, not of each rank."""
    if os.environ.get("LOCAL_RANK", "0") in ("0", ""):
        with contextlib.suppress(OSError):
            os.write(_STDERR, f"\n{line}\n".encode())
