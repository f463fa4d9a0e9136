"""One worker thread for every gloo group: of two, both free the same memory now and then.

torch 2.13 gives a group two threads. After each collective its thread notes the collective's name, without a lock
(`ProcessGroupGloo::runLoop` assigns `pgStatus_->lastCompletedWorkName`). Where two do so at once, both free the name
that was noted before, and the process dies of SIGSEGV or SIGABRT in whatever allocates memory next. A collective counts
as done before its name is noted, so two that follow each other are enough. Names of up to 15 characters need no memory
of their own; "ALLGATHER_COALESCED", by which DTensor gathers what is sharded, does.

One thread carries a group's collectives out in the order in which they were begun, which is the same on all ranks. What
it calls, the callbacks of asynchronous collectives, must not wait for another collective of that group.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

_torch: Any = distributed_c10d
"""Without types: those that torch declares for gloo's options are not those it has."""


@contextmanager
def one_thread_per_group() -> Iterator[None]:
    """Within it, torch makes gloo groups with one thread, for which it has no setting; other groups as ever."""
    if not dist.is_gloo_available():
        yield
        return
    original = _torch.ProcessGroupGloo
    _torch.ProcessGroupGloo = _one_thread_group()
    try:
        yield
    finally:
        _torch.ProcessGroupGloo = original


@functools.cache
def _one_thread_group() -> Any:
    """The class that stands in for torch's: called with the same arguments."""
    gloo: Any = _torch.ProcessGroupGloo

    class OneThreadGloo(gloo):
        def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
            options = gloo._Options()
            options._threads = 1
            options._devices = _devices(gloo)
            options._timeout = timeout
            super().__init__(store, rank, size, options)

    return OneThreadGloo


def _devices(gloo: Any) -> list[Any]:
    """Those that torch takes by itself: of GLOO_SOCKET_IFNAME's interfaces, or of the host's name."""
    if names := os.environ.get("GLOO_SOCKET_IFNAME"):
        return [gloo.create_device(interface=name) for name in names.split(",") if name]
    return [gloo.create_default_device()]
