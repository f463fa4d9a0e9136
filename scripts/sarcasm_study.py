"""Compare fine-tuning methods on a small real task: three rates with one seed each, then more seeds at the best rate.

    python scripts/sarcasm_study.py --data sarcasm_headlines.jsonl --model MINILM_FOLDER --out studies/sarcasm --jobs 2

DATA has `sentence` and `label` (0, 1) per line; the model is any encoder, here MiniLM with 6 layers. Every run makes
250 updates of 32 headlines of at most 32 tokens and is evaluated on the same 2,000 rows, which no run trains on.
Finished runs are not made again, so that the command may be stopped and given again, also with other --methods or
--rates. Writes OUT/table.md and OUT/results.json; if the best rate lies at the end of its range, the table says so.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import study_folder
from study_folder import PROJECT, RunFailed, distinct_numbers

from peft_pretraining.flags import ConfigError, exit_with_problems

EVALUATION_ROWS = 2000
COMMON = {
    **{"do_train": True, "do_eval": True, "max_length": 32, "max_steps": 250, "per_device_train_batch_size": 32},
    **{"per_device_eval_batch_size": 100, "warmup_steps": 25, "lora_all_modules": True, "save_strategy": "no"},
    **{"logging_steps": 50, "disable_tqdm": True},
}
_PROJECTION = {"rank": 8, "scale": 4, "update_proj_gap": 50}
METHODS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "full": ({"method": "full_rank"}, (1e-4, 2e-4, 4e-4)),
    "lora": ({"method": "lora", "rank": 8}, (5e-4, 1e-3, 2e-3)),
    "galore": ({"method": "galore", **_PROJECTION}, (2e-4, 4e-4, 8e-4)),
    "golore": ({"method": "golore", **_PROJECTION, "rand_ratio": 0.8}, (1e-4, 2e-4, 4e-4)),
    "golore_adapter": ({"method": "golore_adapter", **_PROJECTION, "rand_ratio": 0.8}, (1e-4, 2e-4, 4e-4)),
}
"""Flags and learning rates by name."""
_RESULTS = ("eval_accuracy", "train_runtime", "optimizer_state_bytes", "trainable_parameters")


@dataclass(frozen=True)
class Study:
    model: str
    out: Path
    jobs: int
    max_steps: int
    keep_models: bool

    def run(self, method: str, lr: float, seed: int) -> dict[str, Any]:
        """One fine-tuning run, unless it is finished; its results."""
        folder = self.out / method / f"lr{lr:g}_seed{seed}"
        file = folder / "all_results.json"
        results = study_folder.read_results(file, _RESULTS)
        if results is None:
            self._train(folder, METHODS[method][0], lr, seed)
            results = study_folder.read_results(file, _RESULTS)
        if results is None:
            raise RunFailed(f"{folder} holds no results, though its run has ended: see {folder / 'log.txt'}")
        accuracy, seconds = results["eval_accuracy"], results["train_runtime"]
        print(f"{method:<16} lr {lr:<8g} seed {seed:<4} accuracy {accuracy:.4f}, {seconds:.0f} s", flush=True)
        return results

    def _train(self, folder: Path, own: dict[str, Any], lr: float, seed: int) -> None:
        files = {"train_file": self.out / "train.jsonl", "validation_file": self.out / "validation.jsonl"}
        flags = {**COMMON, **own, **files, "model_name_or_path": self.model, "output_dir": folder}
        flags |= {"learning_rate": lr, "seed": seed, "max_steps": self.max_steps}
        command = [sys.executable, str(PROJECT / "run_glue.py")]
        command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        threads = str(max(1, (os.cpu_count() or 1) // self.jobs))
        environment = {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "log.txt", "w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)
        if not self.keep_models:
            (folder / "model.safetensors").unlink()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", type=Path, required=True, help="JSON lines with sentence and label")
    parser.add_argument("--model", required=True, help="folder or hub name of the encoder")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and the table")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"comma-separated: {', '.join(METHODS)}")
    parser.add_argument("--rates", help="learning rates, comma-separated (default: each method's own three)")
    parser.add_argument("--seeds", default="1,2,3", help="comma-separated; the rates are tried with the first")
    parser.add_argument("--max_steps", type=int, default=COMMON["max_steps"], help="updates per run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    parser.add_argument("--keep_models", action="store_true", help="keep every run's model")
    arguments = parser.parse_args()
    names = arguments.methods.split(",")
    if unknown := [name for name in names if name not in METHODS]:
        parser.error(f"--methods: {', '.join(unknown)} is unknown; there is {', '.join(METHODS)}")
    if arguments.jobs < 1:
        parser.error(f"--jobs must be a positive number, got {arguments.jobs}")
    study = Study(arguments.model, arguments.out.resolve(), arguments.jobs, arguments.max_steps, arguments.keep_models)
    in_common = {"model": study.model, "data": str(arguments.data.resolve()), "max_steps": study.max_steps}
    in_common |= {"flags": COMMON, **{f"method {name}": METHODS[name][0] for name in names}}
    try:
        given = distinct_numbers(arguments.rates, "--rates") if arguments.rates else None
        rates = {name: given or METHODS[name][1] for name in names}
        seeds = list(distinct_numbers(arguments.seeds, "--seeds", int))
        with study_folder.opened(study.out, in_common):
            split(arguments.data, study.out)
            rows = compare(study, rates, seeds)
            study_folder.write_results(study.out, rows, table(rows))
    except ConfigError as error:
        return exit_with_problems(error)
    except subprocess.CalledProcessError as error:
        print(f"error: a run failed, see log.txt in its folder: {' '.join(map(str, error.cmd))}", file=sys.stderr)
        return 1
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(rows))
    return 0


def split(data: Path, out: Path) -> None:
    """Shuffle the rows once, the same on every machine, and keep the last 2,000 for evaluation."""
    try:
        lines = data.read_text().strip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"--data {data}: cannot be read ({getattr(error, 'strerror', None) or error})"]) from None
    if len(lines) <= EVALUATION_ROWS:
        raise ConfigError([f"--data {data}: {len(lines)} rows, and {EVALUATION_ROWS} are kept for evaluation"])
    random.Random(0).shuffle(lines)
    out.mkdir(parents=True, exist_ok=True)
    (out / "train.jsonl").write_text("\n".join(lines[:-EVALUATION_ROWS]) + "\n")
    (out / "validation.jsonl").write_text("\n".join(lines[-EVALUATION_ROWS:]) + "\n")


def compare(study: Study, rates: dict[str, tuple[float, ...]], seeds: list[int]) -> list[dict[str, Any]]:
    """All runs: first every rate with the first seed, then the other seeds at the best rate of each method."""
    first, *others = seeds
    with ThreadPoolExecutor(study.jobs) as pool:
        searches = {
            name: {lr: pool.submit(study.run, name, lr, first) for lr in values} for name, values in rates.items()
        }
        found = {name: {lr: run.result() for lr, run in runs.items()} for name, runs in searches.items()}
        accuracy = {name: {lr: run["eval_accuracy"] for lr, run in runs.items()} for name, runs in found.items()}
        best = {name: max(values, key=values.get) for name, values in accuracy.items()}
        repeats = {name: [pool.submit(study.run, name, best[name], seed) for seed in others] for name in rates}
        return [
            {
                "method": name,
                "by_rate": accuracy[name],
                "lr": best[name],
                "accuracies": [accuracy[name][best[name]], *(run.result()["eval_accuracy"] for run in repeats[name])],
                "optimizer_state_bytes": found[name][best[name]]["optimizer_state_bytes"],
                "trainable_parameters": found[name][best[name]]["trainable_parameters"],
            }
            for name in rates
        ]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean and standard deviation over the seeds, the search over rates, and the optimizer's state."""
    lines = [
        "| method | accuracy, mean ± std (seeds) | best rate | first seed at each rate | optimizer-state MB |",
        "| :-- | :-- | --: | :-- | --: |",
    ]
    for row in rows:
        values, rates = row["accuracies"], row["by_rate"]
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        end = " (end of the range)" if len(rates) > 1 and row["lr"] in (min(rates), max(rates)) else ""
        lines.append(
            f"| {row['method']} | {statistics.fmean(values):.4f}{spread} ({', '.join(f'{v:.4f}' for v in values)}) "
            f"| {row['lr']:g}{end} | {', '.join(f'{lr:g}: {value:.4f}' for lr, value in rates.items())} "
            f"| {row['optimizer_state_bytes'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
