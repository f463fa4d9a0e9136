"""The processes of a run, as torchrun starts them, or one process without any group."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from peft_pretraining.distributed.gloo import one_thread_per_group
from peft_pretraining.flags import ConfigError
from peft_pretraining.runtime.launcher import is_launched
from peft_pretraining.runtime.processes import end_with_launcher

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""How long a collective of the training waits for a rank that has not come to it. Nccl's own 10 minutes end a run in
which one rank compiles, reads its first batches from a slow disk or takes its first bases of a large model's weights
much later than the others. A rank that has died is noticed without it: by torchrun, or by its connection."""

HOST_TIMEOUT = timedelta(hours=2)
"""How long processes wait for what one of them does with files: the main process reads and hashes whole checkpoints,
of tens of gigabytes, maybe several of them, maybe on a slow disk."""


@dataclass(frozen=True)
class ProcessGroup:
    """Rank and device of this process. With one process every collective is the identity."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    of_one: bool = field(default=False, kw_only=True)
    """With one process: its collectives are carried out, and its model is distributed, as those of several are."""
    made: bool = field(default=False, kw_only=True)
    """Whether torch's default group was made for this one, which leaves it, too."""
    files: dist.ProcessGroup | None = field(default=None, kw_only=True)
    """The same processes, on the CPU: for values that one of them has from files, which others may wait long for, and
    for what no device has to know."""

    @classmethod
    def start(cls, single_device: bool = False, of_one: bool = False) -> ProcessGroup:
        """Join the group that torchrun's environment describes: nccl on CUDA, gloo on the CPU.

        single_device: make none, whatever the environment says. of_one: distribute over one process, too, where it is
        one of torchrun's.

        Raises `ConfigError` where there is no device for this process, or the others cannot be reached.
        """
        end_with_launcher()  # for programs that are none of the scripts
        env = os.environ
        size = int(env.get("WORLD_SIZE", "1"))
        grouped = not single_device and is_launched(env)
        device = _device(int(env.get("LOCAL_RANK", "0")) if grouped else 0)
        if not grouped:
            return cls(0, 1, 0, 1, device)
        collective = size > 1 or of_one
        try:
            with one_thread_per_group():
                dist.init_process_group(
                    "nccl" if device.type == "cuda" else "gloo",
                    # Nccl connects at once only where there is something to reduce.
                    device_id=device if device.type == "cuda" and collective else None,
                    timeout=COLLECTIVE_TIMEOUT,
                    **_fresh_store(env),
                )
                files = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT) if collective else None
        except (dist.DistError, ValueError) as error:
            address = f"{env.get('MASTER_ADDR')}:{env.get('MASTER_PORT')}"
            why = str(error).splitlines()[0]
            raise ConfigError([f"the processes cannot meet at MASTER_ADDR:MASTER_PORT {address}: {why}"]) from error
        return cls(
            dist.get_rank(),
            dist.get_world_size(),
            int(env.get("LOCAL_RANK", "0")),
            int(env.get("LOCAL_WORLD_SIZE", "1")),
            device,
            of_one=of_one and size == 1,
            made=True,
            files=files,
        )

    def stop(self) -> None:
        """Leave the group."""
        if self.made:
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_collective(self) -> bool:
        """Whether models are distributed and collectives carried out: with several processes, or one that asks."""
        return self.world_size > 1 or self.of_one

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all processes, in place."""
        if self.is_collective:
            dist.all_reduce(tensor)
        return tensor

    @property
    def averaging(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """`all_reduce_mean`, or `as_it_is` where that does nothing."""
        return self.all_reduce_mean if self.is_collective else as_it_is

    def all_reduce_mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mean over all processes, in place."""
        return self.all_reduce_sum(tensor).div_(self.world_size) if self.is_collective else tensor

    def sum_on_host(self, number: int) -> int:
        """Sum over all processes of a number that the host knows; no device is asked."""
        if not self.is_collective:
            return number
        total = torch.tensor(number)
        dist.all_reduce(total, group=self.files)
        return int(total)

    def from_main(self, value: T) -> T:
        """The main process's value (anything that pickles), on every process, which wait for it up to two hours."""
        if not self.is_collective:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.files)
        return box[0]

    def barrier(self) -> None:
        if self.is_collective:
            dist.barrier(group=self.files)

    def checkpoint_group(self) -> CheckpointGroup:
        """Another group of the same processes; all must call it."""
        if not self.is_collective:
            return CheckpointGroup(0, 1, None)
        # A lost rank is noticed by its connection; the limit must allow for a large model on a slow disk.
        with one_thread_per_group():
            group = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
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


def _device(local_rank: int) -> torch.device:
    """This process's device, which can be used: `ConfigError` otherwise."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= (devices := torch.cuda.device_count()):
        raise ConfigError(
            [
                f"LOCAL_RANK {local_rank}: this machine has {devices} CUDA device(s): start at most as many "
                "processes on it (torchrun --nproc-per-node)"
            ]
        )
    device = torch.device("cuda", local_rank)
    try:
        torch.cuda.set_device(device)
        torch.ones(1, device=device).item()  # one that is busy, full or broken says so at its first use
    except RuntimeError as error:
        why = str(error).strip().splitlines()[0]
        raise ConfigError(
            [f"{device} cannot be used: {why} (nvidia-smi shows who uses it; CUDA_VISIBLE_DEVICES= trains on the CPU)"]
        ) from error
    return device


def as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    """The mean over one process."""
    return tensor


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
