"""What a run needs of its data, wherever it comes from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from peft_pretraining.models.loss import Batch


@dataclass(frozen=True)
class EvaluationSet:
    """A validation set."""

    name: str
    """Empty: the run's only own one."""
    share: float
    """Its weight in the run's own loss; 0: it is beside the run's own."""
    batches: Iterable[Batch | None]
    """This rank's share of it, from its beginning each time; None where only other ranks have some."""
    bytes_per_token: float | None
    """Bytes of text for each token; None where they were not counted."""


class Data(Protocol):
    """Training samples by position, validation sets, and what a checkpoint must hold to go on."""

    description: str
    evaluation_sets: Sequence[EvaluationSet]
    """The run's own, whose shares add up to 1 (several of a mixture), and then the further ones."""

    def training(self, position: int, state: dict[str, Any]) -> Iterator[Batch]:
        """Endless micro-batches of this rank from `position` on, in samples; `state` is what `state_at` gave there."""

    def epoch_at(self, position: int) -> int:
        """How often the training data was read as a whole before `position`."""

    def read_before(self, position: int) -> dict[str, int]:
        """Samples of each source of a mixture before `position`; nothing of one source."""

    def state_at(self, position: int) -> dict[str, Any]:
        """Small numbers that spare a run that goes on at `position` the reading of what lies before."""
