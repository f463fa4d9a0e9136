"""Leaving the process groups before the interpreter ends.

gloo's threads hold the tensors of a collective until a moment after it is done, and take the interpreter's lock to drop
them. A thread that wants the lock of an interpreter which is ending is made to exit (before Python 3.14), which unwinds
through a destructor of C++: "terminate called without an active exception", SIGABRT, of a process that had finished.

The threads end with the last reference to their group, and that is out of reach: `destroy_process_group` drops torch's
own references, but DTensor's caches keep a sharded model's mesh, which has the group, until the interpreter's end. Nor
can it be forced: DDP's reducer drops the group while it holds the lock, and would wait for a thread that wants it. So a
process with such threads must not come to the interpreter's end.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch.distributed as dist

_THREAD = "pt_gloo_runloop"


def leave_groups() -> bool:
    """Destroy all groups; returns whether no thread of theirs is left, so that the interpreter may end."""
    if not dist.is_available():
        return True
    if dist.is_initialized():
        dist.destroy_process_group()
    return not any(name == _THREAD for name in _threads())


def _threads() -> list[str]:
    """Names of this process's threads (Linux; elsewhere none are seen)."""
    names = []
    for file in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            names.append(file.read_text().strip())
    return names
