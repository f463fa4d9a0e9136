"""Runs under one or several seeds, and the files that their results go to."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from peft_pretraining.finetune.settings import FineTuning
from peft_pretraining.tracking import log

RESULTS_FILE = "all_results.json"

Results = dict[str, Any]


def run_seeds(finetuning: FineTuning, run_one: Callable[[FineTuning], Results]) -> Results:
    """`run_one` for every seed in a subfolder `seed_N`; the means and standard deviations of their results.

    Without `--seeds` it is one run in the output folder itself, and its own results. `run_one` writes its
    `all_results.json`; the one of several seeds has `seeds`, the mean of every number under its name, `*_std` (of the
    sample: n - 1) beside it, and the single runs under `runs`. A seed whose results are there is not run again, unless
    `--overwrite_output_dir` says so.
    """
    if not finetuning.seeds:
        return run_one(finetuning)
    folder, runs = Path(finetuning.training.output_dir), {}
    for seed in finetuning.seeds:
        subfolder = folder / f"seed_{seed}"
        done = subfolder / RESULTS_FILE
        if done.is_file() and not finetuning.overwrite_output_dir:
            log.info("seed %d: results are in %s", seed, done)
            runs[seed] = json.loads(done.read_text())
        else:
            runs[seed] = run_one(finetuning.with_seed(seed, str(subfolder)))
    results = summarize(runs)
    if finetuning.training.process_index == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RESULTS_FILE, results)
        print_summary(results)
    return results


def summarize(runs: dict[int, Results]) -> Results:
    """Mean and standard deviation over the seeds of every number that all runs have."""
    first = next(iter(runs.values()))
    results: Results = {"seeds": list(runs)}
    for name in first:
        values = [run.get(name) for run in runs.values()]
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            results[name] = statistics.fmean(values)
            results[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
    return {**results, "runs": {str(seed): run for seed, run in runs.items()}}


def print_summary(results: Results) -> None:
    """The evaluation's numbers, one line each."""
    print(f"{len(results['seeds'])} seeds: {', '.join(map(str, results['seeds']))}")
    for name, value in results.items():
        if name.startswith("eval_") and f"{name}_std" in results and not name.endswith(_SPEED):
            print(f"{name} {value:.4f} +- {results[f'{name}_std']:.4f}")


_SPEED = ("_runtime", "_per_second")


def write_json(path: Path, values: Results) -> None:
    """Not-a-number becomes null: JSON has no such number."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    path.write_text(json.dumps(clean, indent=2) + "\n")


def newest_checkpoint(finetuning: FineTuning) -> str | None:
    """The checkpoint to go on from: `--resume_from_checkpoint`, or the newest complete one in the output folder.

    `--overwrite_output_dir` removes those that are there and starts over.
    """
    named = finetuning.training.resume_from_checkpoint
    if named is not None and str(named).lower() not in ("true", "false"):
        return named
    folder = Path(finetuning.training.output_dir)
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()]
    if finetuning.overwrite_output_dir:
        if finetuning.training.should_save:
            for path in found:
                shutil.rmtree(path)
        return None
    if str(named).lower() == "false":
        return None
    # `trainer_state.json` is what is written last.
    complete = [path for path in found if (path / "trainer_state.json").is_file()]
    if not complete:
        return None
    newest = max(complete, key=lambda path: int(path.name.rpartition("-")[2]))
    log.info("going on from %s (--overwrite_output_dir starts over)", newest)
    return str(newest)
