"""Ending a process that hangs, so that torchrun or a scheduler can start it again.

A lost peer, a stuck file system or a deadlock stops a run without an error, and it then holds its devices for hours.
The watchdog says where every thread stands, and ends the process with an exit code of its own.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

from peft_pretraining.runtime.workers import kill_workers

P = ParamSpec("P")
T = TypeVar("T")

EXIT_STUCK = 124
"""Exit code of a process that the watchdog ended; `timeout` of the GNU core utilities has the same."""

FIRST_UPDATE_FACTOR = 10
"""The first update of a process may take this much longer: it compiles kernels, connects ranks, starts workers. So may
each batch of an evaluation, of which there is no ordinary length."""

SAVE_FACTOR = 60
"""So much longer may a save take, waiting for the one before it included, or the reading of a checkpoint: gigabytes go
to and from a disk."""

COMPILE_FACTOR = 60
"""So much longer may it take to compile a layer, inside an update or an evaluation."""

_STDERR = 2  # the descriptor: what `sys.stderr` is may be locked, or have none
_LAST_RESORT_SECONDS = 15.0  # later than the watchdog's own thread, which needs the interpreter's lock to run


class Watchdog:
    """Watches that each update ends within `seconds`, and whatever else a process does in a multiple of them; with 0 it
    does nothing.

    An update reads its data, too. Stacks of all Python threads go to stderr and to `save_dir/stuck_rank{rank}.txt`,
    appended, if that folder exists.
    """

    def __init__(self, seconds: float, save_dir: Path, rank: int):
        self._seconds, self._rank = seconds, rank
        self._path = save_dir / f"stuck_rank{rank}.txt"
        self._first = True
        self._changed = threading.Condition()
        self._deadline: float | None = None
        self._what, self._factor = "", 1
        self._closed = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        _open.append(self)
        if self._seconds:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        _open.remove(self)
        if self._thread is not None:
            with self._changed:
                self._closed = True
                self._changed.notify()
            self._thread.join()

    @contextlib.contextmanager
    def update(self, step: int) -> Iterator[None]:
        """The body is 0-based update `step`."""
        with self.watch(f"update {step}", FIRST_UPDATE_FACTOR if self._first else 1):
            yield
        self._first = False

    @contextlib.contextmanager
    def watch(self, what: str, factor: int) -> Iterator[None]:
        """The body may take `factor` times as long as an update. What it is within has its time anew afterwards."""
        if not self._seconds:
            yield
            return
        outer = None if self._deadline is None else (self._what, self._factor)
        self._begin(what, factor)
        try:
            yield
        finally:
            if outer is not None:
                self._begin(*outer)
            else:
                faulthandler.cancel_dump_traceback_later()
                self._set(None, what, factor)

    def goes_on(self) -> None:
        """Within `watch`: there was progress, and from here on it may take as long again."""
        if self._deadline is not None:
            self._begin(self._what, self._factor)

    def _begin(self, what: str, factor: int) -> None:
        allowed = self._seconds * factor
        self._set(time.monotonic() + allowed, what, factor)
        # Should the lock be held by what hangs: C code that needs no lock, but knows only exit code 1.
        faulthandler.dump_traceback_later(allowed + _LAST_RESORT_SECONDS, exit=True, file=_STDERR)

    def _set(self, deadline: float | None, what: str, factor: int) -> None:
        with self._changed:
            self._deadline, self._what, self._factor = deadline, what, factor
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                left = None if self._deadline is None else self._deadline - time.monotonic()
                if left is not None and left <= 0:
                    break
                self._changed.wait(left)
            else:
                return
        self._abort()

    def _exception(self) -> str:
        if self._factor == 1:
            return ""
        return f", times {self._factor} for {'the first update' if self._what.startswith('update') else 'this'}"

    def _abort(self) -> None:
        allowed = self._seconds * self._factor
        head = (
            f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {self._rank}: {self._what} took more than "
            f"{allowed:g} s (--step_timeout {self._seconds:g}{self._exception()}); "
            f"exit code {EXIT_STUCK}. Stacks of all threads:\n"
        )
        with contextlib.suppress(OSError):  # a full or stuck disk must not keep it from ending
            os.write(_STDERR, head.encode())
            faulthandler.dump_traceback(_STDERR, all_threads=True)
            with open(self._path, "a") as file:
                file.write(head)
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        kill_workers()  # which may be what hangs
        os._exit(EXIT_STUCK)  # not sys.exit: the main thread hangs, and would have to be waited for


_open: list[Watchdog] = []
"""Those that are open, the innermost last."""


def watched(what: str, factor: int) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A decorator: whatever watchdog is open allows the function `factor` times as long as an update."""

    def decorate(act: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(act)
        def guarded(*args: P.args, **keywords: P.kwargs) -> T:
            if not _open:
                return act(*args, **keywords)
            with _open[-1].watch(what, factor):
                return act(*args, **keywords)

        return guarded

    return decorate


def goes_on() -> None:
    """Of what is watched: there was progress."""
    if _open:
        _open[-1].goes_on()
