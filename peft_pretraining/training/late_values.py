"""Numbers of updates that are read one update late, so that the device never waits for the host.

Loss, gradient norm and what else an update comes to are computed on the device. If the host read them before it asks
for the optimizer's step, the device would have nothing to do meanwhile. Instead the device decides by itself whether
the update takes place (`found_inf`), the numbers set out for pinned memory, and they are read before the next update's
step, when its forward and backward pass are queued already. On the CPU there is nothing to gain: the host decides at
once.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from peft_pretraining.optim.tensors.late_copy import LateCopy
from peft_pretraining.training.progress import Update

ON_EVERY_DEVICE = False
"""For tests: read late on the CPU, too."""


class LateValues:
    """At most one update whose numbers have not been read, and those read that have not been reported."""

    def __init__(self, device: torch.device):
        self.on = ON_EVERY_DEVICE or device.type != "cpu"
        """Whether numbers are read late."""
        self._waiting: tuple[Update, LateCopy] | None = None
        self._read: list[Update] = []
        self._began = 0.0

    @property
    def waiting(self) -> bool:
        """Whether there is an update whose numbers have not been read."""
        return self._waiting is not None

    def begin(self) -> None:
        """An update begins; its time does, unless it goes on from an update before that is under way."""
        if not self.waiting:
            self._began = time.perf_counter()

    def put(self, update: Update, values: Tensor) -> None:
        """Leave the numbers of an update for later, after those before were taken."""
        assert not self.waiting, "one update at a time"
        self._waiting = update, LateCopy(values)

    def take(self) -> tuple[Update, list[float]] | None:
        """The update that waits, and its numbers, for which the host may have to wait."""
        waiting, self._waiting = self._waiting, None
        return waiting and (waiting[0], waiting[1].tolist())

    def finish(self, update: Update) -> Update:
        """All is known of an update."""
        self._read.append(update)
        return update

    def finished(self) -> list[tuple[Update, float]]:
        """Updates of which all is known since this was asked last, in their order, each with the seconds it took."""
        read, self._read = self._read, []
        now = time.perf_counter()
        seconds = (now - self._began) / max(len(read), 1)
        if read:
            self._began = now
        return [(update, seconds) for update in read]
