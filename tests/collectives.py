"""Counting what a run hands to collectives, and the threads that carry them out."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from peft_pretraining.distributed import parallel


class _Counting(TorchDispatchMode):
    """The collectives that are called while it is active, by name."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # what it comes to is counted
        name = func._opname.strip("_")
        if func.namespace in ("c10d", "_c10d_functional") and not name.startswith(("wait", "wrap")):
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted(into: list[dict[str, int]]) -> Iterator[None]:
    """Append to `into`, for every update, the number of collectives of each kind that this rank called."""
    from peft_pretraining.training import loop as train

    train_step = train.train_step

    def wrapped(run, micro_batches, stop):
        with _Counting() as counting:
            update = train_step(run, micro_batches, stop)
        into.append(dict(counting.calls))
        return update

    train.train_step = wrapped
    try:
        yield
    finally:
        train.train_step = train_step


def gloo_threads() -> list[int]:
    """How many threads each gloo group of this process has."""
    return [group._get_backend(torch.device("cpu")).options._threads for group in distributed_c10d._world.pg_map]


@contextlib.contextmanager
def few_groups(destroy: Callable[[dist.ProcessGroup], None]) -> Iterator[None]:
    """While it is active, meshes of one shape are made once; at its end `destroy` has `dist.new_group`'s groups: a gloo
    group's threads are never idle, so that those of a hundred runs in one process slow down all that come after."""
    made: list[dist.ProcessGroup] = []
    new_group = dist.new_group
    dist.new_group = lambda *args, **settings: made.append(new_group(*args, **settings)) or made[-1]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parallel, "init_device_mesh", _mesh)
            yield
    finally:
        dist.new_group = new_group
    dist.barrier()
    for group in made:
        destroy(group)


@functools.cache
def _mesh(*args: Any, **settings: Any) -> DeviceMesh:
    return init_device_mesh(*args, **settings)
