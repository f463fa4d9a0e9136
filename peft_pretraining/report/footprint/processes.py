"""A process group of one process that takes itself for rank 0 of many, on a device of torch's meta kind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.parallel.distributed as ddp
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.distributed.tensor._sharding_prop import ShardingPropagator

from peft_pretraining.report.footprint.collectives import future_of_last
from peft_pretraining.report.footprint.stand_ins import META
from peft_pretraining.report.footprint.tracker import Tracker
from peft_pretraining.training import build_model

_SHAPES = "_propagate_tensor_meta_non_cached"
"""Where DTensors find the shape of a result, by operators that no device carries out."""

_MAKERS = ("materialize", "materialize_layers")
"""What makes weights in host memory if they are to be sharded."""


@contextlib.contextmanager
def group_of(devices: int, tracker: Tracker) -> Iterator[None]:
    """A default process group of so many ranks, in which DDP and FSDP2 take parameters on the meta device."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group, _fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("there is a process group already: a plan needs one of its own")
    group: Any = _fsdp_param_group.FSDPParamGroup
    patches = [
        patch.object(_fully_shard, "_get_device_from_mesh", lambda mesh: META),
        patch.object(group, "_validate_no_meta_params", lambda self: None),
        *(patch.object(build_model, name, _on_device(getattr(build_model, name))) for name in _MAKERS),
        patch.object(ddp, "_verify_param_shape_across_processes", lambda *args, **kwargs: None),
        patch.object(FakeWork, "get_future", future_of_last),
        patch.object(ddp, "_sync_module_states", lambda *args, **kwargs: None),
        *_followed(tracker, _fsdp_param, _fsdp_param_group),
        patch.object(ShardingPropagator, _SHAPES, _apart(getattr(ShardingPropagator, _SHAPES), tracker)),
    ]
    with contextlib.ExitStack() as stack:
        for each in patches:
            stack.enter_context(each)
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=devices)
        try:
            yield
        finally:
            dist.destroy_process_group()


def _followed(tracker: Tracker, *modules: Any) -> list[Any]:
    """FSDP2 gives gathered weights their memory, and takes it, without an operator that could be seen."""
    found = []
    for module in modules:
        for name in ("alloc_storage", "free_storage"):
            if (real := getattr(module, name, None)) is not None:
                found.append(patch.object(module, name, _then_resized(real, tracker)))
    return found


def _then_resized(real: Any, tracker: Tracker) -> Any:
    def resize(tensor: Tensor) -> None:
        real(tensor)
        tracker.storages.resized(tensor, tracker.now())
        tracker.storages.say(tensor, "gathered weights", override=True)

    return resize


def _apart(real: Any, tracker: Tracker) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        with tracker.paused():
            return real(*args, **kwargs)

    return call


def _on_device(real: Any) -> Any:
    """A tensor of the CPU cannot become one of the meta device, as it can become one of a GPU."""

    def make(*args: Any) -> Any:
        return real(*(META if isinstance(each, torch.device) else each for each in args))

    return make
