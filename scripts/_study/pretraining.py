"""Runs of torchrun_main.py: one at a rate and under a seed, and what its metrics say."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _study import PROJECT
from _study.folder import RunFailed, is_number
from peft_pretraining.checkpoint import metrics_file, run_dir


class PreTraining:
    """How a study makes pre-training runs; programs.py says what each member is."""

    script = "torchrun_main.py"
    inputs: Mapping[str, str] = {"dataset_path": "dataset_path"}
    required = ("num_training_steps",)
    keys = ("warm_up",)
    score, scores, digits, smaller_is_better = "validation perplexity", "perplexities", 2, True
    columns: Mapping[str, str] = {}

    def result(self, folder: Path, flags: Mapping[str, Any], ended: bool = False) -> dict[str, Any] | None:
        """What the evaluation after the last update found; None while there is none."""
        last = flags["num_training_steps"]
        found = [record for record in evaluations(folder) if ended or record["update_step"] == last]
        if not found:
            return None
        state = found[-1].get("optimizer_state_bytes")
        return {"score": perplexity_of(found[-1]), "optimizer_state_bytes": state if is_number(state) else None}

    def train(self, folder: Path, flags: Mapping[str, Any], threads: int) -> None:
        """One training, or what is left of it. Raises `CalledProcessError`, `RunFailed`."""
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        train(folder, words)


def train(save_dir: Path, flags: Sequence[str]) -> float:
    """Run, or finish, one training; its last validation perplexity, infinite where it is none.

    Raises `CalledProcessError` when the training fails, `RunFailed` when it leaves no evaluation.
    """
    command = [sys.executable, str(PROJECT / "torchrun_main.py"), *flags]
    command += ["--save_dir", str(save_dir), "--autoresume", "True"]
    save_dir.mkdir(parents=True, exist_ok=True)
    with open(save_dir.with_name(save_dir.name + ".log"), "a") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)
    found = evaluations(save_dir)
    if not found:
        raise RunFailed(f"{save_dir} holds no evaluation, though its run has ended: see {save_dir}.log")
    return perplexity_of(found[-1])


def evaluations(save_dir: Path) -> list[dict[str, Any]]:
    """The evaluations in a run's metrics; says in one line on stderr what of them was passed over."""
    metrics = save_dir / run_dir.METRICS_FILE
    if not metrics.is_file():
        return []
    records, problems = metrics_file.read_records(metrics)
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    return [record for record in records if "final_eval_perplexity" in record]


def perplexity_of(evaluation: Mapping[str, Any]) -> float:
    """The perplexity, infinite where the run has diverged."""
    value = evaluation["final_eval_perplexity"]
    return float(value) if is_number(value) else math.inf
