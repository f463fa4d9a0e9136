"""Runs of torchrun_main.py: one at a rate and under a seed, and what its metrics say."""

from __future__ import annotations

import math
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _study.folder import RunFailed, is_number
from _study.launching import launcher
from peft_pretraining.checkpoint import metrics_file, run_dir

PART = "final_eval_perplexity_{}"
"""Of one part of an evaluation, in the metrics."""


class PreTraining:
    """How a study makes pre-training runs; programs.py says what each member is."""

    script = "torchrun_main.py"
    inputs: Mapping[str, str] = {"dataset_path": "dataset_path"}
    required = ("num_training_steps",)
    keys = ("warm_up", "start", "extend", "keep_models")
    score, scores, digits, smaller_is_better = "validation perplexity", "perplexities", 2, True
    columns: Mapping[str, str] = {"tokens_per_second": "tokens/s"}
    column_format = ",.0f"

    def result(self, folder: Path, flags: Mapping[str, Any], ended: bool = False) -> dict[str, Any] | None:
        """What the evaluation after the last update found; None while there is none."""
        last = flags["num_training_steps"]
        found = [record for record in evaluations(folder) if ended or record["update_step"] == last]
        if not found:
            return None
        state = found[-1].get("optimizer_state_bytes")
        choosing, reported = perplexities_of(found[-1])
        return {
            "score": choosing,
            "reported": reported,
            "optimizer_state_bytes": state if is_number(state) else None,
            "tokens_per_second": speed_of(folder),
        }

    def train(self, folder: Path, flags: Mapping[str, Any], threads: int, processes: int = 0) -> None:
        """One training, or what is left of it. Raises `CalledProcessError`, `RunFailed`."""
        train(folder, [word for name, value in flags.items() for word in (f"--{name}", str(value))], processes)

    def remove_models(self, folder: Path) -> None:
        """Delete a finished run's checkpoints."""
        for path in folder.glob("model_*"):
            shutil.rmtree(path)


def train(save_dir: Path, flags: Sequence[str], processes: int = 0) -> float:
    """Run, or finish, one training; its last validation perplexity, infinite where it is none.

    Raises `CalledProcessError` when the training fails, `RunFailed` when it leaves no evaluation.
    """
    command = [*launcher(processes, "torchrun_main.py"), *flags]
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


def perplexities_of(evaluation: Mapping[str, Any]) -> tuple[float, float]:
    """By which rates are chosen, and which is reported: of two parts where --eval_parts 2 made them, else the same."""
    if PART.format(1) not in evaluation:
        return (perplexity_of(evaluation),) * 2
    return perplexity_of(evaluation, PART.format(0)), perplexity_of(evaluation, PART.format(1))


def perplexity_of(evaluation: Mapping[str, Any], name: str = "final_eval_perplexity") -> float:
    """The perplexity, infinite where the run has diverged."""
    value = evaluation[name]
    return float(value) if is_number(value) else math.inf


def speed_of(save_dir: Path) -> float | None:
    """Tokens a second, the median over the updates; None where the metrics say nothing of it."""
    records, _ = metrics_file.read_records(save_dir / run_dir.METRICS_FILE)
    speeds = [record["throughput_tokens"] for record in records if is_number(record.get("throughput_tokens"))]
    return statistics.median(speeds) if speeds else None
