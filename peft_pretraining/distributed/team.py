"""The devices that have a tensor in common, and how they pass numbers on to each other, many tensors at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Team:
    """Devices that hold parts, or copies, of the same tensors; this one is the `place`-th of `size`.

    One device without others sends nothing.
    """

    size: int = 1
    place: int = 0
    group: Any = None
    """The process group, None for one device without others."""

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Team:
        """The devices of a process group that this one is part of."""
        return cls(dist.get_world_size(group), dist.get_rank(group), group)

    @classmethod
    def of_all(cls) -> Team:
        """All devices of the run."""
        return cls.of(dist.group.WORLD) if dist.is_initialized() and dist.group.WORLD else cls()

    def exchange(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Sends the i-th of some flat tensors to device i; returns what each device has sent to this one, in the order
        of devices: `sizes` numbers each."""
        if self.group is None:
            return list(parts)
        sent = torch.cat(list(parts))
        received = sent.new_empty(sum(sizes))
        dist.all_to_all_single(received, sent, list(sizes), [part.numel() for part in parts], group=self.group)
        return list(torch.split(received, list(sizes)))

    def gather(self, part: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """The flat tensors of all devices, which are of `sizes` numbers each; they travel in the size of the longest
        one."""
        if self.group is None:
            return [part]
        widest = max(sizes)
        received = part.new_empty(self.size * widest)
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
        gather(received, torch.nn.functional.pad(part, (0, widest - part.numel())), group=self.group)
        return [received.narrow(0, place * widest, size) for place, size in enumerate(sizes)]


ALONE = Team()


def deal_out(costs: Sequence[float], size: int, loads: Sequence[float] = ()) -> list[int]:
    """Owners, of `size` devices, of pieces of work: the dearest first, each to the device that has least to do so far.

    `loads` is what devices have to do besides. A function of its arguments alone, so that all devices find the same.

        >>> deal_out([1, 5, 2, 2], 2)
        [1, 0, 1, 1]
    """
    loaded = list(loads) or [0.0] * size
    owners = [0] * len(costs)
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        owners[place] = loaded.index(min(loaded))
        loaded[owners[place]] += costs[place]
    return owners
