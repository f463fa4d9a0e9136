"""Fine-tune one model on an option task with every optimizer: a table of training losses and test accuracies.

    python scripts/option_study.py --model checkpoints/llama_tiny/model_1000 --data winogrande_object_twins.jsonl \
        --out studies/winogrande -- --split_by twins --shuffle_options

The rows are divided once into training, dev and test (--train_set_seed 0), the same for all runs. Each optimizer trains
at each of its rates, the best model on dev is kept, and the rate that is best on dev is the one in the table. Finished
runs are not made again and interrupted ones go on, so that the command may be stopped and given again, also with other
--optimizers or --lrs. Everything after `--` goes to run_tasks.py. Writes OUT/table.md and OUT/results.json.
"""

from __future__ import annotations

import argparse
import os
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

_PROJECTION = {"rank": 32, "update_proj_gap": 50}
_SGD = {"momentum": 0.9, "dampening": 0.0}
OPTIMIZERS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "sgd": (_SGD, (0.03, 0.1, 0.3)),
    "adamw": ({}, (1e-4, 3e-4, 1e-3)),
    "galore_adamw": ({**_PROJECTION, "galore_scale": 1.0}, (1e-4, 3e-4, 1e-3)),
    "galore_sgd": ({**_PROJECTION, **_SGD, "galore_scale": 4.0}, (0.03, 0.1, 0.3)),
    "golore_adamw": ({**_PROJECTION, "galore_scale": 1.0, "rand_ratio": 0.8}, (1e-4, 3e-4, 1e-3)),
    "golore_sgd": ({**_PROJECTION, **_SGD, "galore_scale": 4.0, "rand_ratio": 0.8}, (0.03, 0.1, 0.3)),
}
"""Flags and learning rates by name."""


@dataclass(frozen=True)
class Study:
    common: dict[str, Any]
    out: Path
    jobs: int
    more: list[str]

    def run(self, optimizer: str, lr: float) -> dict[str, Any]:
        """One run, unless it is finished; its results."""
        folder = self.out / optimizer / f"lr{lr:g}"
        results = _results(folder)
        if results is None:
            self._train(folder, optimizer, lr)
            results = _results(folder)
        if results is None:
            raise RunFailed(f"{folder} holds no results, though its run has ended: see {folder / 'log.txt'}")
        first, last = ends(results["losses"])
        print(
            f"{optimizer:<13} lr {lr:<7g} loss {first:.4f} -> {last:.4f}, dev {results['eval_accuracy']:.4f}, "
            f"test {results['test_accuracy']:.4f}, {results['train_runtime']:.0f} s",
            flush=True,
        )
        return results

    def _train(self, folder: Path, optimizer: str, lr: float) -> None:
        flags = {**self.common, "optimizer": optimizer, **OPTIMIZERS[optimizer][0], "lr": lr, "output_dir": folder}
        command = [sys.executable, str(PROJECT / "run_tasks.py")]
        command += [word for name, value in flags.items() for word in (f"--{name}", str(value))] + self.more
        threads = str(max(1, (os.cpu_count() or 1) // self.jobs))
        environment = {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "log.txt", "a") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)


def _results(folder: Path) -> dict[str, Any] | None:
    """The results of a finished run."""
    numbers = ("eval_accuracy", "test_accuracy", "train_runtime", "optimizer_state_bytes")
    found = study_folder.read_results(folder / "all_results.json", numbers)
    losses = found.get("losses") if found else None
    usable = isinstance(losses, list) and losses and all(map(study_folder.is_number, losses))
    return found if usable else None


def ends(losses: list[float]) -> tuple[float, float]:
    """The first logged loss, and the mean of the last tenth of them: single batches differ much."""
    return losses[0], statistics.fmean(losses[-max(1, len(losses) // 10) :])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--model", required=True, help="folder or hub name of the causal model that all runs start from"
    )
    parser.add_argument("--task", default="WinoGrande", help="option task of the rows (default: WinoGrande)")
    parser.add_argument("--data", type=Path, required=True, help="JSON lines in the task's columns")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and the table")
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS), help=f"comma-separated: {', '.join(OPTIMIZERS)}")
    parser.add_argument("--lrs", help="learning rates, comma-separated (default: each optimizer's own three)")
    parser.add_argument("--max_steps", type=int, default=300, help="updates per run (default: 300)")
    parser.add_argument("--eval_steps", type=int, default=50, help="updates between evaluations on dev (default: 50)")
    parser.add_argument("--batch", type=int, default=16, help="rows per update (default: 16)")
    parser.add_argument("--num_eval", type=int, default=1000, help="rows of the test (default: 1000)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    parser.add_argument("more", nargs=argparse.REMAINDER, help="-- and then flags of run_tasks.py")
    arguments = parser.parse_args()
    names = arguments.optimizers.split(",")
    if unknown := [name for name in names if name not in OPTIMIZERS]:
        parser.error(f"--optimizers: {', '.join(unknown)} is unknown; there is {', '.join(OPTIMIZERS)}")
    if arguments.jobs < 1:
        parser.error(f"--jobs must be a positive number, got {arguments.jobs}")
    every = arguments.eval_steps
    common = {
        **{"model_name": arguments.model, "task_name": arguments.task, "data_file": arguments.data},
        **{"max_steps": arguments.max_steps, "per_device_train_batch_size": arguments.batch, "logging_steps": 1},
        **{"num_eval": arguments.num_eval, "train_all": True, "per_device_eval_batch_size": 64, "disable_tqdm": True},
        **{"lr_scheduler_type": "constant", "load_best_model_at_end": True, "save_total_limit": 1},
        **{"eval_strategy": "steps", "eval_steps": every, "save_strategy": "steps", "save_steps": every},
    }
    more = arguments.more[1:] if arguments.more[:1] == ["--"] else arguments.more
    study = Study(common, arguments.out.resolve(), arguments.jobs, more)
    in_common = {name: str(value) for name, value in common.items()} | {"flags": more}
    in_common |= {f"optimizer {name}": OPTIMIZERS[name][0] for name in names}
    try:
        given = distinct_numbers(arguments.lrs, "--lrs") if arguments.lrs else None
        with study_folder.opened(study.out, in_common):
            rows = compare(study, {name: given or OPTIMIZERS[name][1] for name in names})
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


def compare(study: Study, rates: dict[str, tuple[float, ...]]) -> list[dict[str, Any]]:
    """Every optimizer at each of its rates; the one with the best accuracy on dev is described."""
    with ThreadPoolExecutor(study.jobs) as pool:
        runs = {name: {lr: pool.submit(study.run, name, lr) for lr in values} for name, values in rates.items()}
        found = {name: {lr: run.result() for lr, run in by_rate.items()} for name, by_rate in runs.items()}
    rows = []
    for name, by_rate in found.items():
        dev = {lr: results["eval_accuracy"] for lr, results in by_rate.items()}
        best = max(dev, key=dev.get)
        first, last = ends(by_rate[best]["losses"])
        row = {"optimizer": name, "lr": best, "first_loss": first, "last_loss": last, "dev_by_rate": dev}
        row |= {key: by_rate[best][key] for key in ("eval_accuracy", "test_accuracy", "optimizer_state_bytes")}
        rows.append(row | {"best_step": by_rate[best].get("best_step")})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown. Accuracies are those of the model that was best on dev; the losses are the whole run's."""
    lines = [
        "| optimizer | rate | first loss | last loss | dev accuracy | test accuracy | dev at each rate | state MB |",
        "| :-- | --: | --: | --: | --: | --: | :-- | --: |",
    ]
    for row in rows:
        by_rate = ", ".join(f"{lr:g}: {value:.4f}" for lr, value in row["dev_by_rate"].items())
        lines.append(
            f"| {row['optimizer']} | {row['lr']:g} | {row['first_loss']:.4f} | {row['last_loss']:.4f} "
            f"| {row['eval_accuracy']:.4f} | {row['test_accuracy']:.4f} | {by_rate} "
            f"| {row['optimizer_state_bytes'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
