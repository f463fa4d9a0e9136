"""Numbers on their way from a device to the host, which goes on meanwhile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LateCopy:
    """A copy in (pinned) host memory of what a small tensor holds when the work that was queued before it is done.

    >>> copy = LateCopy(torch.tensor([1.0, 2.0]))
    >>> copy.tolist()
    [1.0, 2.0]
    """

    def __init__(self, tensor: Tensor):
        device = tensor.device
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=device.type == "cuda")
        self._host.copy_(tensor, non_blocking=True)
        self._there = torch.get_device_module(device).Event()
        self._there.record()

    def tolist(self) -> Any:
        """The numbers, as `Tensor.tolist` gives them; waits until they are there, but for nothing queued later."""
        self._there.synchronize()
        return self._host.tolist()
