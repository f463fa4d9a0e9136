"""Work in several threads of this process, for what lets go of the interpreter's lock: torch's random numbers."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_of_cores() -> int:
    """This process's share of them, at least 1: torchrun's processes of one machine share its cores."""
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def ahead(make: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """`make(item)` for each item, in their order, made by so many threads; no more than `threads` results wait or are
    being made at a time. With 1 they are made when they are asked for, in the calling thread.

    In these threads torch works with one thread each, and without gradients. An error in one of them is raised where
    its result is asked for.

    >>> list(ahead(lambda number: number**2, range(5), threads=2))
    [0, 1, 4, 9, 16]
    """
    import torch  # an entry script imports this folder before it imports torch

    def quietly(item: T) -> R:
        with torch.no_grad():  # each thread has its own mode
            return make(item)

    if threads <= 1:
        yield from map(quietly, items)
        return
    with _single_threaded(threads) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                if len(waiting) == threads:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(quietly, item))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _single_threaded(threads: int) -> ThreadPoolExecutor:
    """A pool whose threads each use one thread of torch's: the products of the two would be too many."""
    import torch

    before = torch.get_num_threads()
    ready = threading.Barrier(threads + 1)

    def begin() -> None:
        torch.get_num_threads()  # or the first operation would take the number from the process
        torch.set_num_threads(1)
        ready.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="drawing", initializer=begin)
    try:
        for _ in range(threads):  # a thread is started for each task that no idle one can take, and none is idle yet
            pool.submit(int)
    except RuntimeError:  # the system gives no more threads: those that wait would wait for ever
        ready.abort()
        raise
    ready.wait()
    torch.set_num_threads(before)  # for this thread, and for those that begin later
    return pool
