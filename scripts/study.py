"""Compare methods fairly: three rates with one seed each, then more seeds at each method's best rate, as one table.

    python scripts/study.py configs/studies/quickstart.yaml --dataset_path quickstart/data/wiki_intros_bpe4096_128 \
        --out studies/quickstart --jobs 2

The YAML file says which methods, rates and seeds. Finished runs are not made again, interrupted ones go on, so that the
command may be stopped and given again, also with methods added. Writes OUT/table.md and OUT/results.json; if the best
rate lies at the end of its range, the table says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from sweep import train

PROJECT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Study:
    """What to run: settings of the YAML file, and where."""

    settings: dict[str, Any]
    dataset_path: str
    out: Path

    def run(self, method: str, lr: float, seed: int) -> float:
        """One training, or what is left of it; its final validation perplexity."""
        entry = self.settings["methods"][method]
        folder = self.folder(method, lr, seed)
        if (finished := self.final_evaluation(folder)) is not None:
            return finished["final_eval_perplexity"]
        flags = self.flags(entry["flags"])
        if "warm_up" in entry:
            flags += ["--warmed_up_model", str(self.warm_up(method, entry["warm_up"], seed))]
        perplexity = train(folder, f"{lr:g}", str(seed), flags)
        print(f"{method:<28} lr {lr:<8g} seed {seed:<4} validation perplexity {perplexity:.2f}", flush=True)
        return perplexity

    def folder(self, method: str, lr: float, seed: int) -> Path:
        return self.out / method / f"lr{lr:g}_seed{seed}"

    def warm_up(self, method: str, settings: dict[str, Any], seed: int) -> Path:
        """The checkpoint of a full-rank run, by which a method starts; its updates count towards the budget."""
        folder = self.out / method / f"warm_up_seed{seed}"
        last = folder / f"model_{settings['num_training_steps']}"
        if not last.is_dir():
            train(folder, f"{settings['lr']:g}", str(seed), self.flags(settings))
        return last

    def flags(self, own: dict[str, Any]) -> list[str]:
        merged = {**self.settings["common"], "dataset_path": self.dataset_path, **own}
        return [word for name, value in merged.items() if name != "lr" for word in (f"--{name}", str(value))]

    def final_evaluation(self, folder: Path) -> dict[str, Any] | None:
        """The record of the evaluation after a run's last update; None while there is none."""
        metrics, last = folder / "metrics.jsonl", self.settings["common"]["num_training_steps"]
        records = map(json.loads, metrics.read_text().splitlines()) if metrics.is_file() else ()
        found = [record for record in records if "final_eval_perplexity" in record and record["update_step"] == last]
        return found[-1] if found else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="YAML file of the study")
    parser.add_argument("--dataset_path", required=True, help="folder written by pretokenize.py")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and the table")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    arguments = parser.parse_args()
    settings = yaml.safe_load(arguments.study.read_text())
    study = Study(settings, str(Path(arguments.dataset_path).resolve()), arguments.out.resolve())
    study.out.mkdir(parents=True, exist_ok=True)
    try:
        results = compare(study, arguments.jobs)
    except subprocess.CalledProcessError as error:
        print(f"error: a run failed, see its log beside its folder: {' '.join(map(str, error.cmd))}", file=sys.stderr)
        return 1
    (study.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    text = table(results)
    (study.out / "table.md").write_text(text + "\n")
    print(text)
    return 0


def compare(study: Study, jobs: int) -> list[dict[str, Any]]:
    """All runs: first every rate with the first seed, then the other seeds at the best rate of each method."""
    methods, (first, *others) = study.settings["methods"], study.settings["seeds"]
    with ThreadPoolExecutor(jobs) as pool:
        searches = {
            name: {lr: pool.submit(study.run, name, lr, first) for lr in entry["lrs"]}
            for name, entry in methods.items()
        }
        found = {name: {lr: run.result() for lr, run in runs.items()} for name, runs in searches.items()}
        best = {name: min(rates, key=rates.get) for name, rates in found.items()}
        repeats = {name: [pool.submit(study.run, name, best[name], seed) for seed in others] for name in methods}
        return [
            {
                "method": name,
                "by_rate": found[name],
                "lr": best[name],
                "perplexities": [found[name][best[name]], *(run.result() for run in repeats[name])],
                "optimizer_state_bytes": study.final_evaluation(study.folder(name, best[name], first))[
                    "optimizer_state_bytes"
                ],
            }
            for name in methods
        ]


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: mean and standard deviation over the seeds, the search over rates, and the optimizer's state."""
    lines = [
        "| method | validation perplexity, mean ± std (seeds) | best rate | first seed at each rate | state MB |",
        "| :-- | :-- | --: | :-- | --: |",
    ]
    for row in sorted(results, key=lambda row: statistics.fmean(row["perplexities"])):
        values, rates = row["perplexities"], row["by_rate"]
        at_the_end = row["lr"] in (min(rates), max(rates))
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        each = ", ".join(f"{value:.2f}" for value in values)
        search = ", ".join(f"{lr:g}: {value:.2f}" for lr, value in rates.items())
        lines.append(
            f"| {row['method']} | {statistics.fmean(values):.2f}{spread} ({each}) "
            f"| {row['lr']:g}{' (end of the range)' if at_the_end else ''} | {search} "
            f"| {row['optimizer_state_bytes'] / 1e6:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
