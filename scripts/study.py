"""Compare methods fairly: three rates with one seed each, then more seeds at each method's best rate, as one table.

    python scripts/study.py configs/studies/quickstart.yaml --dataset_path quickstart/data/wiki_intros_bpe4096_128 \
        --out studies/quickstart --jobs 2

The YAML file says which methods, rates and seeds. Finished runs are not made again, interrupted ones go on, so that the
command may be stopped and given again, also with methods added. Writes OUT/table.md and OUT/results.json; if the best
rate lies at the end of its range, the table says so.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import study_folder
from study_folder import RunFailed, is_number
from sweep import evaluations, perplexity_of, train

from peft_pretraining.flags import ConfigError, exit_with_problems, yaml_file


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
            return perplexity_of(finished)
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
        last = self.settings["common"]["num_training_steps"]
        found = [record for record in evaluations(folder) if record["update_step"] == last]
        return found[-1] if found else None

    def state_bytes(self, folder: Path) -> float | None:
        """Bytes of a finished run's optimizer state; None where its metrics do not say."""
        value = (self.final_evaluation(folder) or {}).get("optimizer_state_bytes")
        return value if is_number(value) else None

    def in_common(self) -> dict[str, Any]:
        """What the runs of one folder share. Methods may be added, and rates and seeds of a method."""
        entries = {f"method {name}": {**entry, "lrs": None} for name, entry in self.settings["methods"].items()}
        return {"dataset_path": self.dataset_path, "common": self.settings["common"], **entries}


def read_study(path: Path) -> dict[str, Any]:
    """The settings of a study's file. Raises `ConfigError` with everything that is wrong with it."""
    try:
        settings = yaml_file.load_mapping(path)
    except yaml_file.YamlProblem as error:
        raise ConfigError([f"{path}: {error}"]) from None
    problems = [f"unknown key {key!r}" for key in settings if key not in ("seeds", "common", "methods")]
    seeds = settings.get("seeds")
    if not _is_list(seeds, lambda seed: isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0):
        problems.append(f"seeds must be a list of different whole numbers, got {seeds!r}")
    problems += _flags_problems("common", settings.get("common"), ("num_training_steps",))
    methods = settings.get("methods")
    if not isinstance(methods, dict) or not methods:
        problems.append(f"methods must be a mapping of names to entries, got {methods!r}")
        methods = {}
    for name, entry in methods.items():
        problems += _entry_problems(name, entry)
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    return settings


def _entry_problems(name: Any, entry: Any) -> list[str]:
    if not isinstance(name, str) or not name or "/" in name or name.startswith("."):
        return [f"methods: {name!r} cannot be the name of a folder"]
    if not isinstance(entry, dict):
        return [f"methods: {name} must be a mapping with lrs and flags, got {entry!r}"]
    unknown = [key for key in entry if key not in ("lrs", "flags", "warm_up")]
    problems = [f"methods: {name}: unknown key {key!r}" for key in unknown]
    lrs = entry.get("lrs")
    if not _is_list(lrs, lambda lr: is_number(lr) and 0 < lr < float("inf")):
        problems.append(
            f"methods: {name}: lrs must be a list of different positive numbers (4.0e-4, not 4e-4), got {lrs!r}"
        )
    problems += _flags_problems(f"methods: {name}: flags", entry.get("flags"), ())
    if "warm_up" in entry:
        problems += _flags_problems(f"methods: {name}: warm_up", entry["warm_up"], ("num_training_steps", "lr"))
    return problems


def _flags_problems(what: str, flags: Any, required: Sequence[str]) -> list[str]:
    if not isinstance(flags, dict) or not all(isinstance(name, str) for name in flags):
        return [f"{what} must be a mapping of flags to values, got {flags!r}"]
    problems = [f"{what}: {name} must be a single value" for name, v in flags.items() if isinstance(v, (dict, list))]
    return problems + [
        f"{what}: {name} must be a positive number, got {flags.get(name)!r}"
        for name in required
        if not is_number(flags.get(name)) or flags[name] <= 0
    ]


def _is_list(value: Any, is_item: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_item, value)) and len(set(value)) == len(value)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("study", type=Path, help="YAML file of the study")
    parser.add_argument("--dataset_path", required=True, help="folder written by pretokenize.py")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and the table")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    arguments = parser.parse_args()
    try:
        if arguments.jobs < 1:
            raise ConfigError([f"--jobs must be a positive number, got {arguments.jobs}"])
        settings = read_study(arguments.study)
        study = Study(settings, str(Path(arguments.dataset_path).resolve()), arguments.out.resolve())
        with study_folder.opened(study.out, study.in_common()):
            results = compare(study, arguments.jobs)
            study_folder.write_results(study.out, results, table(results))
    except ConfigError as error:
        return exit_with_problems(error)
    except subprocess.CalledProcessError as error:
        print(f"error: a run failed, see its log beside its folder: {' '.join(map(str, error.cmd))}", file=sys.stderr)
        return 1
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(results))
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
                "optimizer_state_bytes": study.state_bytes(study.folder(name, best[name], first)),
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
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 and all(map(math.isfinite, values)) else ""
        each = ", ".join(f"{value:.2f}" for value in values)
        search = ", ".join(f"{lr:g}: {value:.2f}" for lr, value in rates.items())
        state = "—" if row["optimizer_state_bytes"] is None else f"{row['optimizer_state_bytes'] / 1e6:.2f}"
        lines.append(
            f"| {row['method']} | {statistics.fmean(values):.2f}{spread} ({each}) "
            f"| {row['lr']:g}{' (end of the range)' if at_the_end else ''} | {search} "
            f"| {state} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
