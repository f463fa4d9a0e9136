"""Being asked to stop: a scheduler sends SIGTERM or SIGUSR1 before it takes the machine away."""

from __future__ import annotations

import signal
from types import FrameType

import torch

from peft_pretraining.distributed import ProcessGroup

EXIT_REQUEUE = 75
"""Exit code after stopping on request with everything saved (EX_TEMPFAIL of sysexits.h): launch it again."""


class StopRequest:
    """Remembers a SIGTERM or SIGUSR1 while it is open, instead of dying of it."""

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def anywhere(self, group: ProcessGroup) -> bool:
        """Whether any rank was asked to stop; the answer is the same on all."""
        if group.world_size == 1:
            return self.received
        return group.all_reduce_sum(torch.tensor([float(self.received)], device=group.device)).item() > 0
