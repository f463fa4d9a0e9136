"""Ending a process whose update hangs, so that torchrun or a scheduler can start it again.

A lost peer, a stuck file system or a deadlock stops a run without an error, and it then holds its devices for hours.
The watchdog says where every thread stands, and ends the process with an exit code of its own.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

EXIT_STUCK = 124
"""Exit code of a process that the watchdog ended; `timeout` of the GNU core utilities has the same."""

FIRST_UPDATE_FACTOR = 10
"""The first update of a process may take this much longer: it compiles kernels, connects ranks, starts workers."""

_STDERR = 2  # the descriptor: what `sys.stderr` is may be locked, or have none
_LAST_RESORT_SECONDS = 15.0  # later than the watchdog's own thread, which needs the interpreter's lock to run


class Watchdog:
    """Watches that each update ends within `seconds`; with 0 it does nothing.

    Only updates are watched, reading their data included. Evaluations and checkpoints, whose lengths are unrelated, lie
    outside `update()` and take as long as they take. Stacks of all Python threads go to stderr and to
    `save_dir/stuck_rank{rank}.txt`, appended.
    """

    def __init__(self, seconds: float, save_dir: Path, rank: int):
        self._seconds, self._rank = seconds, rank
        self._path = save_dir / f"stuck_rank{rank}.txt"
        self._factor = FIRST_UPDATE_FACTOR
        self._changed = threading.Condition()
        self._deadline: float | None = None
        self._step = 0
        self._closed = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self._seconds:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            with self._changed:
                self._closed = True
                self._changed.notify()
            self._thread.join()

    @contextlib.contextmanager
    def update(self, step: int) -> Iterator[None]:
        """The body is 0-based update `step`."""
        if not self._seconds:
            yield
            return
        allowed = self._seconds * self._factor
        self._set(time.monotonic() + allowed, step)
        # Should the lock be held by what hangs: C code that needs no lock, but knows only exit code 1.
        faulthandler.dump_traceback_later(allowed + _LAST_RESORT_SECONDS, exit=True, file=_STDERR)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            self._set(None, step)
        self._factor = 1

    def _set(self, deadline: float | None, step: int) -> None:
        with self._changed:
            self._deadline, self._step = deadline, step
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

    def _abort(self) -> None:
        allowed = self._seconds * self._factor
        head = (
            f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {self._rank}: update {self._step} took more than "
            f"{allowed:g} s (--step_timeout {self._seconds:g}"
            f"{f', times {self._factor} for the first update' if self._factor > 1 else ''}); "
            f"exit code {EXIT_STUCK}. Stacks of all threads:\n"
        )
        with contextlib.suppress(OSError):  # a full or stuck disk must not keep it from ending
            os.write(_STDERR, head.encode())
            faulthandler.dump_traceback(_STDERR, all_threads=True)
            with open(self._path, "a") as file:
                file.write(head)
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        # Data-loading workers, which may be what hangs, would outlive this process.
        for worker in multiprocessing.active_children():
            worker.kill()
        os._exit(EXIT_STUCK)  # not sys.exit: the main thread hangs, and would have to be waited for
