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
    """What else a study's file may say: `evaluation_rows`, `keep_models`; of a method `warm_up`."""
    score: str
    """By what runs are compared, as the table calls it."""
    scores: str
    """Its name in results.json."""
    digits: int
    """Behind the point, in the table."""
    smaller_is_better: bool
    columns: Mapping[str, str]
    """Further numbers of a method's best run -> the heads of their columns."""

    def result(self, folder: Path, flags: Mapping[str, Any], ended: bool = False) -> dict[str, Any] | None:
        """A finished run's `score`, `optimizer_state_bytes` (or None) and further numbers; None of another.

        ended: its process has ended well, whatever its last update is.
        """

    def train(self, folder: Path, flags: Mapping[str, Any], threads: int) -> None:
        """Make a run, or finish it. Raises `CalledProcessError` or `RunFailed`."""


PROGRAMS: Mapping[str, Program] = {program.script: program for program in (PreTraining(), Glue(), OptionTask())}
