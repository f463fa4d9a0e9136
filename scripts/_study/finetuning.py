"""Runs of run_glue.py and run_tasks.py, and what their results say."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _study.folder import is_number
from _study.launching import launcher


class FineTuning:
    """How a study makes fine-tuning runs; programs.py says what each member is."""

    script: str
    required = ()
    keys: tuple[str, ...] = ("extend", "keep_models")
    numbers: tuple[str, ...]
    """What the results of a finished run hold."""
    score, scores, digits, smaller_is_better = "accuracy", "accuracies", 4, False
    column_format = ".4f"

    def result(self, folder: Path, flags: Mapping[str, Any], ended: bool = False) -> dict[str, Any] | None:
        """What a finished run's results say; None of one that is not finished."""
        found = read_results(folder / "all_results.json", ("eval_accuracy", "optimizer_state_bytes", *self.numbers))
        return None if found is None else self.described({**found, "score": found["eval_accuracy"]})

    def described(self, found: dict[str, Any]) -> dict[str, Any] | None:
        """The results as they are kept."""
        return {name: found[name] for name in ("score", "optimizer_state_bytes", *self.numbers)}

    def train(self, folder: Path, flags: Mapping[str, Any], threads: int, processes: int = 0) -> None:
        """One run, or what is left of it, on so many threads. Raises `CalledProcessError`."""
        command = launcher(processes, self.script)
        command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        environment = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder.with_name(folder.name + ".log"), "a") as log:
            subprocess.run([*command, "--output_dir", str(folder)], check=True, stdout=log, stderr=log, env=environment)

    def remove_models(self, folder: Path) -> None:
        """Delete a finished run's weights."""
        for path in folder.glob("*.safetensors"):
            path.unlink()


class Glue(FineTuning):
    """Classification by run_glue.py."""

    script = "run_glue.py"
    keys = ("extend", "keep_models", "evaluation_rows")
    inputs: Mapping[str, str] = {"model": "model_name_or_path", "data": "train_file"}
    numbers = ("trainable_parameters",)
    columns: Mapping[str, str] = {}


class OptionTask(FineTuning):
    """Option tasks by run_tasks.py: the rate is chosen on dev, and the test is told beside it."""

    script = "run_tasks.py"
    inputs: Mapping[str, str] = {"model": "model_name", "data": "data_file"}
    numbers = ("test_accuracy",)
    score = "dev accuracy"
    columns: Mapping[str, str] = {
        "first_loss": "first loss",
        "last_loss": "last loss",
        "test_accuracy": "test accuracy",
    }

    def described(self, found: dict[str, Any]) -> dict[str, Any] | None:
        losses = found.get("losses")
        if not isinstance(losses, list) or not losses or not all(map(is_number, losses)):
            return None
        first, last = ends(losses)
        return {
            **super().described(found),
            "first_loss": first,
            "last_loss": last,
            "best_step": found.get("best_step"),
        }


def ends(losses: list[float]) -> tuple[float, float]:
    """The first logged loss, and the mean of the last tenth of them: single batches differ much."""
    return losses[0], statistics.fmean(losses[-max(1, len(losses) // 10) :])


def read_results(path: Path, numbers: tuple[str, ...]) -> dict[str, Any] | None:
    """Returns a finished run's results; None when the file is missing or cut off, or one of `numbers` is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not all(is_number(found.get(name)) for name in numbers):
        return None
    return found
