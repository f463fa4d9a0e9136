"""Collectives among processes that do not exist: what they move, and an answer at once."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork

from peft_pretraining.report.footprint.counters import Exchange

_KINDS = {
    "all_reduce": ("allreduce_", "all_reduce", "all_reduce_", "allreduce_coalesced_", "all_reduce_coalesced"),
    "reduce_scatter": (
        "_reduce_scatter_base_",
        "reduce_scatter_tensor",
        "reduce_scatter_tensor_out",
        "reduce_scatter_",
    ),
    "all_gather": ("_allgather_base_", "all_gather_into_tensor", "all_gather_into_tensor_out", "allgather_"),
    "all_to_all": ("alltoall_", "alltoall_base_", "all_to_all_single"),
    "broadcast": ("broadcast_", "broadcast"),
}
"""What torch calls each of them, in its two libraries of collectives."""


_last: list[Tensor] = []


def done(tensors: list[Tensor]) -> Any:
    """The handle of a collective that is over when it begins."""
    _last[:] = tensors
    return FakeWork().boxed()


def future_of_last(work: FakeWork) -> torch.futures.Future:
    """In place of the handle's own future, which has no tensors: those of the last collective."""
    future: torch.futures.Future = torch.futures.Future()
    future.set_result(list(_last))
    _last.clear()
    return future


def exchange_of(name: str, phase: str, args: Any, tensors: list[Tensor]) -> Exchange | None:
    """What a collective exchanges; None for one that moves nothing."""
    kind = next((kind for kind, names in _KINDS.items() if name in names), None)
    if kind is None or not tensors:
        return None
    size = max(each.numel() * each.element_size() for each in tensors)  # of the part and the whole, the whole
    return Exchange(phase, kind, size, _ranks(args))


def _ranks(args: Any) -> tuple[int, ...]:
    for each in args:
        if isinstance(each, torch.ScriptObject):
            try:
                return tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(each)))
            except (RuntimeError, ValueError, KeyError):
                continue
        if isinstance(each, str) and each not in ("sum", "avg", "max", "min"):
            return tuple(dist.get_process_group_ranks(dist.distributed_c10d._resolve_process_group(cast(Any, each))))
    return tuple(range(dist.get_world_size()))
