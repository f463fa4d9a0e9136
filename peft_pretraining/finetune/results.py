"""Runs under one or several seeds, and the files that their results go to."""

from __future__ import annotations

import statistics
from pathlib import Path

from peft_pretraining.finetune.folder import Described, RunOne, agree, held, run_in_folder
from peft_pretraining.finetune.identity import RUN_FILE
from peft_pretraining.finetune.output import RESULTS_FILE, SPEED, Results, write_json
from peft_pretraining.finetune.settings import FineTuning
from peft_pretraining.flags import ConfigError


def run_seeds(finetuning: FineTuning, run_one: RunOne, described: Described) -> Results:
    """`run_one` for every seed in a subfolder `seed_N`; the means and standard deviations of their results.

    Without `--seeds` it is one run in the output folder itself, and its own results. `run_one` writes its
    `all_results.json`; the one of several seeds has `seeds`, the mean of every number under its name, `*_std` (of the
    sample: n - 1) beside it, and the single runs under `runs`. A run that is finished is not run again, unless
    `--overwrite_output_dir` says so.
    """
    if not finetuning.seeds:
        return run_in_folder(finetuning, run_one, described)
    folder = finetuning.output_dir
    runs: dict[int, Results] = {}
    with held(finetuning):
        agree(finetuning.training, lambda: _no_single_run(folder))
        for seed in finetuning.seeds:
            one = finetuning.with_seed(seed, str(folder / f"seed_{seed}"))
            runs[seed] = run_in_folder(one, run_one, described)
        results = summarize(runs)
        if finetuning.training.process_index == 0:
            write_json(folder / RESULTS_FILE, results)
            print_summary(results)
    return results


def _no_single_run(folder: Path) -> None:
    if (folder / RUN_FILE).exists():
        raise ConfigError([f"--output_dir {folder} holds a run without --seeds: choose another folder"])


def summarize(runs: dict[int, Results]) -> Results:
    """Mean and standard deviation over the seeds of every number that all runs have."""
    first = next(iter(runs.values()))
    results: Results = {"seeds": list(runs)}
    for name in first:
        found = [run.get(name) for run in runs.values()]
        values = [value for value in found if isinstance(value, int | float) and not isinstance(value, bool)]
        if len(values) == len(found):
            results[name] = statistics.fmean(values)
            results[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
    return {**results, "runs": {str(seed): run for seed, run in runs.items()}}


def print_summary(results: Results) -> None:
    """The evaluation's numbers, one line each."""
    print(f"{len(results['seeds'])} seeds: {', '.join(map(str, results['seeds']))}")
    for name, value in results.items():
        if name.startswith("eval_") and f"{name}_std" in results and not name.endswith(SPEED):
            print(f"{name} {value:.4f} +- {results[f'{name}_std']:.4f}")
