"""Wrapping a model for several devices."""

from __future__ import annotations

import contextlib

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from peft_pretraining.distributed.process_group import ProcessGroup


def parallelize(model: nn.Module, group: ProcessGroup) -> nn.Module:
    """The module whose forward pass trains `model` on all processes; `model` itself for one process."""
    if group.world_size == 1:
        return model
    device_ids = [group.device.index] if group.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids, broadcast_buffers=False, gradient_as_bucket_view=True)


def synchronised_backward(parallel_model: nn.Module, now: bool) -> contextlib.AbstractContextManager:
    """Reduce gradients over the processes in this backward pass, or (`now=False`) only accumulate them here."""
    if now or not isinstance(parallel_model, DistributedDataParallel):
        return contextlib.nullcontext()
    return parallel_model.no_sync()
