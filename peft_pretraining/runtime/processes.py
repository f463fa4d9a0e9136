"""The launcher of a process, torchrun, and what becomes of the process when it is gone.

A process whose parent is killed (`kill -9`, out of memory) gets no word of it. It would train on, wait for its peers
for ever, or write into the folder of the run that is started in its place. Linux can have the kernel send a signal;
that must be asked for before anything that takes time, so nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>

_launcher: int | None = None
"""Process id of the torchrun that started this process."""


def end_with_launcher() -> None:
    """Where torchrun started this process: die as soon as it does. First thing in every script.

    A process that somebody started by hand has no launcher, and survives the shell it came from.
    """
    global _launcher
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux" or _launcher is not None:
        return
    _launcher = os.getppid()
    on_launchers_death(signal.SIGKILL)
    # Nobody sends the signal for a parent that died before.
    if os.getppid() != _launcher or not _is_launcher(_launcher):
        os._exit(1)


def on_launchers_death(number: int) -> None:
    """What the kernel sends when the launcher is gone: SIGKILL before there is anything to save and after it is saved,
    SIGTERM meanwhile. Without a launcher it does nothing."""
    if _launcher is not None:
        set_death_signal(number)


def has_launcher() -> bool:
    return _launcher is not None


def launcher_is_gone() -> bool:
    return _launcher is not None and os.getppid() != _launcher


def set_death_signal(number: int) -> None:
    """Linux: have the kernel send this when the thread that started this process ends, or its whole process."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))


def _is_launcher(pid: int) -> bool:
    """Whether a process is torchrun, or something that it started to start this one (a shell script).

    It is asked once, of the parent at the start: with torchrun gone before that, this is whoever adopts orphans. A
    launcher has torch loaded, whatever it is called. Where the kernel does not tell, only process 1 is suspected.
    """
    folder = Path("/proc") / str(pid)
    try:
        if "libtorch" in (folder / "maps").read_text(errors="replace"):
            return True
        with contextlib.suppress(OSError):
            return b"TORCHELASTIC_RUN_ID=" in (folder / "environ").read_bytes()
    except OSError:
        pass
    return pid != 1
