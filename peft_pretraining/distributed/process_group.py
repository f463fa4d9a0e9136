"""The processes of a run, as torchrun starts them, or one process without any group."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from peft_pretraining.distributed.gloo import one_thread_per_group
from peft_pretraining.flags import ConfigError
from peft_pretraining.runtime.processes import end_with_launcher

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """Rank and device of this process. With one process every collective is the identity."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    @classmethod
    def start(cls, single_device: bool = False) -> ProcessGroup:
        """Join the group that torchrun's environment describes: nccl on CUDA, gloo on the CPU.

        Raises `ConfigError` where there is no device for this process, or the others cannot be reached.
        """
        end_with_launcher()  # for programs that are none of the scripts
        env = os.environ
        grouped = not single_device and int(env.get("WORLD_SIZE", "1")) > 1
        local_rank = int(env.get("LOCAL_RANK", "0")) if grouped else 0
        if torch.cuda.is_available():
            if local_rank >= (devices := torch.cuda.device_count()):
                raise ConfigError(
                    [
                        f"LOCAL_RANK {local_rank}: this machine has {devices} CUDA device(s): start at most as many "
                        "processes on it (torchrun --nproc-per-node)"
                    ]
                )
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        else:
            device = torch.device("cpu")
        if not grouped:
            return cls(0, 1, 0, 1, device)
        try:
            with one_thread_per_group():
                dist.init_process_group(
                    "nccl" if device.type == "cuda" else "gloo",
                    device_id=device if device.type == "cuda" else None,
                    **_fresh_store(env),
                )
        except (dist.DistError, ValueError) as error:
            address = f"{env.get('MASTER_ADDR')}:{env.get('MASTER_PORT')}"
            why = str(error).splitlines()[0]
            raise ConfigError([f"the processes cannot meet at MASTER_ADDR:MASTER_PORT {address}: {why}"]) from error
        local_world_size = int(env.get("LOCAL_WORLD_SIZE", "1"))
        return cls(dist.get_rank(), dist.get_world_size(), local_rank, local_world_size, device)

    def stop(self) -> None:
        """Leave the group."""
        if self.world_size > 1:
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mean over all processes, in place."""
        return self.all_reduce_sum(tensor).div_(self.world_size) if self.world_size > 1 else tensor

    def from_main(self, value: T) -> T:
        """The main process's value (anything that pickles), on every process."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def checkpoint_group(self) -> CheckpointGroup:
        """Another group of the same processes; all must call it."""
        if self.world_size == 1:
            return CheckpointGroup(0, 1, None)
        # A lost rank is noticed by its connection; the limit must allow for a large model on a slow disk.
        with one_thread_per_group():
            group = dist.new_group(backend="gloo", timeout=timedelta(hours=2))
        return CheckpointGroup(self.rank, self.world_size, group)


@dataclass(frozen=True)
class CheckpointGroup:
    """All processes of a run once more, for a thread beside the training: on one group their collectives would mix.

    It works on the CPU, whatever the devices.
    """

    rank: int
    size: int
    group: dist.ProcessGroup | None
    """None with one process."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every process's value (anything that pickles), by rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values


def mean_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """Mean over the processes of whatever default group there is, in place: for loops that are not ours."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
        tensor.div_(dist.get_world_size())
    return tensor


def _fresh_store(env: Mapping[str, str]) -> dict[str, Any]:
    """After a restart by torchrun: where the ranks meet, without what those before it left there.

    torchrun keeps one store for all starts, and a rank would find the addresses of dead ones in it. The number of
    starts tells them apart on one node. Those of several nodes may differ; there, torchrun has to make a new store for
    every start (TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, as scripts/launch.py sets it).
    """
    starts = env.get("TORCHELASTIC_RESTART_COUNT", "0")
    if starts == "0" or env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or env.get("GROUP_WORLD_SIZE") != "1":
        return {}
    rank, world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), world_size, is_master=False)
    return {"store": dist.PrefixStore(f"start {starts}", store), "rank": rank, "world_size": world_size}
