"""The training scripts that a study can run, by their names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from _study.finetuning import Glue, OptionTask
from _study.pretraining import PreTraining


class Program(Protocol):
    """One of the training scripts."""

    script: str
    inputs: Mapping[str, str]
    """Flags of study.py that say what is trained, and the script's flags that they become."""
    required: tuple[str, ...]
    """Numbers that a study has to give under `common`."""
    keys: tuple[str, ...]
    """What else a study's file may say: `extend`, `start`, `evaluation_rows`, `keep_models`; of a method `warm_up`."""
    score: str
    """By what runs are compared, as the table calls it."""
    scores: str
    """Its name in results.json."""
    digits: int
    """Behind the point, in the table."""
    smaller_is_better: bool
    columns: Mapping[str, str]
    """Further numbers of a method's best run -> the heads of their columns."""
    column_format: str
    """Of these numbers."""

    def result(self, folder: Path, flags: Mapping[str, Any], ended: bool = False) -> dict[str, Any] | None:
        """A finished run's `score`, `optimizer_state_bytes` (or None) and further numbers; None of another.

        `reported` among them is told instead of the score by which the rate was chosen.
        ended: its process has ended well, whatever its last update is.
        """

    def train(self, folder: Path, flags: Mapping[str, Any], threads: int, processes: int = 0) -> None:
        """Make a run, or finish it; by torchrun if `processes` > 0. Raises `CalledProcessError`, `RunFailed`."""

    def remove_models(self, folder: Path) -> None:
        """Delete the weights that a finished run has left."""


PROGRAMS: Mapping[str, Program] = {program.script: program for program in (PreTraining(), Glue(), OptionTask())}
