"""Processes that work for another one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading

from peft_pretraining.runtime.processes import set_death_signal


def die_with_parent() -> None:
    """In a worker: be killed when the thread that started it, or its process, ends in any way."""
    parent = multiprocessing.parent_process()
    if sys.platform == "linux":
        set_death_signal(signal.SIGKILL)
    if parent is not None and os.getppid() != parent.pid:
        os._exit(1)


def obey_the_parent() -> None:
    """In a worker of a pool: leave signals of the terminal to the parent, and end when the parent was killed, instead
    of waiting for work for ever."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # Not `die_with_parent` alone: the thread that starts a pool's workers need not live as long as they.
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def kill_workers() -> None:
    """Before this process ends without a word: its workers may ignore signals, and would outlive it."""
    for worker in multiprocessing.active_children():
        worker.kill()
