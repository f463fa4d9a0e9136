"""Leaving the process groups before the interpreter ends.

gloo's threads hold the tensors of a collective until a moment after it is done, and take the interpreter's lock to drop
them. A thread that wants the lock of an interpreter which is ending is made to exit (before Python 3.14), which unwinds
through a destructor of C++: "terminate called without an active exception", SIGABRT, of a process that had finished.
`destroy_process_group` does not end those threads while anything refers to a group, as a sharded model's mesh does.
"""

from __future__ import annotations

import contextlib
import gc
import time
from pathlib import Path

import torch.distributed as dist

_THREAD = "pt_gloo_runloop"
_SECONDS_TO_END = 5.0


def end_group_threads() -> bool:
    """Destroy all groups, and have their threads end; returns whether none is left.

    To be called when everything that uses them is done and out of scope, with a live interpreter.
    """
    if not dist.is_available():
        return True
    if dist.is_initialized():
        dist.destroy_process_group()
    deadline = time.monotonic() + _SECONDS_TO_END
    while threads := _group_threads():
        gc.collect()  # model, mesh and group refer to each other; a group's destructor joins its threads
        if _group_threads() >= threads or time.monotonic() > deadline:
            break
    return not _group_threads()


def _group_threads() -> int:
    """Number of gloo's threads (Linux; elsewhere none are seen)."""
    count = 0
    for name in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            count += name.read_text().strip() == _THREAD
    return count
