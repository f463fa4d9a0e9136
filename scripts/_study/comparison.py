"""All runs of a study, and its table."""

from __future__ import annotations

import math
import os
import random
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _study.file import StudyFile
from _study.folder import RunFailed
from peft_pretraining.checkpoint import run_dir
from peft_pretraining.flags import ConfigError


@dataclass(frozen=True)
class Study:
    """What to run, and where."""

    file: StudyFile
    inputs: Mapping[str, str]
    """`dataset_path`, or `model` and `data`: what is trained, on what."""
    more: Mapping[str, Any]
    """Flags of the training script that the command line adds; they win over the file's."""
    out: Path
    jobs: int = 1
    """Runs at a time, which share the cores."""

    def run(self, method: str, lr: float, seed: int | None) -> dict[str, Any]:
        """One training, or what is left of it; its result."""
        program, folder = self.file.program, self.folder(method, lr, seed)
        entry = self.file.methods[method]
        flags = self._flags(lr, seed, entry.flags, self.more)
        result = program.result(folder, flags)
        if result is None:
            if entry.warm_up is not None:
                flags["warmed_up_model"] = self._warm_up(method, entry.warm_up, seed)
            program.train(folder, flags, self._threads)
            result = program.result(folder, flags, ended=True)
            if result is None:
                raise RunFailed(f"{folder} holds no results, though its run has ended: see {folder}.log")
            if not self.file.keep_models:
                for path in folder.glob("*.safetensors"):
                    path.unlink()
            told = f"{program.score} {result['score']:.{program.digits}f}"
            print(f"{method:<28} {folder.name:<20} {told}", flush=True)
        return result

    @property
    def _threads(self) -> int:
        """Of one run."""
        return max(1, (os.cpu_count() or 1) // self.jobs)

    def folder(self, method: str, lr: float, seed: int | None) -> Path:
        return self.out / method / (f"lr{lr:g}" if seed is None else f"lr{lr:g}_seed{seed}")

    def _flags(self, lr: float, seed: int | None, *own: Mapping[str, Any]) -> dict[str, Any]:
        """The training script's flags: what all runs share, then `own`, the later over the earlier."""
        flags = dict(self.file.common)
        flags |= {self.file.program.inputs[name]: value for name, value in self.inputs.items()}
        if self.file.evaluation_rows is not None:
            flags |= {"train_file": self.out / "train.jsonl", "validation_file": self.out / "validation.jsonl"}
        for more in own:
            flags |= more
        return flags | {"lr": f"{lr:g}"} | ({} if seed is None else {"seed": seed})

    def _warm_up(self, method: str, settings: Mapping[str, Any], seed: int | None) -> Path:
        """The checkpoint of a run by which a method starts; its updates count towards the budget."""
        folder = self.out / method / ("warm_up" if seed is None else f"warm_up_seed{seed}")
        last = folder / f"model_{settings['num_training_steps']}"
        if not last.is_dir():
            self.file.program.train(folder, self._flags(settings["lr"], seed, self.more, settings), self._threads)
        return last

    def in_common(self) -> dict[str, Any]:
        """What the runs of one folder share. Methods may be added, and rates and seeds of a method."""
        entries = {f"method {name}": {**self.file.entries[name], "lrs": None} for name in self.file.methods}
        settings = {"script": self.file.program.script, "common": self.file.common, "flags": self.more}
        return {**settings, **self.inputs, **entries}

    def divide_rows(self) -> None:
        """Shuffle the rows of `data` once, the same on every machine, and keep the last ones for evaluation."""
        if (count := self.file.evaluation_rows) is None:
            return
        data = Path(self.inputs["data"])
        try:
            lines = data.read_text().strip().split("\n")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise ConfigError([f"--data {data}: cannot be read ({why})"]) from None
        if len(lines) <= count:
            raise ConfigError([f"--data {data}: {len(lines)} rows, and {count} are kept for evaluation"])
        random.Random(0).shuffle(lines)
        for name, part in (("train", lines[:-count]), ("validation", lines[-count:])):
            run_dir.write_atomically(self.out / f"{name}.jsonl", "\n".join(part) + "\n")


def compare(study: Study) -> list[dict[str, Any]]:
    """All runs: first every rate with the first seed, then the other seeds at the best rate of each method."""
    program, methods = study.file.program, study.file.methods
    first, *others = study.file.seeds
    choose = min if program.smaller_is_better else max
    with ThreadPoolExecutor(study.jobs) as pool:
        searches = {
            name: {lr: pool.submit(study.run, name, lr, first) for lr in entry.lrs} for name, entry in methods.items()
        }
        found = {name: {lr: run.result() for lr, run in runs.items()} for name, runs in searches.items()}
        by_rate = {name: {lr: result["score"] for lr, result in runs.items()} for name, runs in found.items()}
        best = {name: choose(rates, key=rates.__getitem__) for name, rates in by_rate.items()}
        repeats = {name: [pool.submit(study.run, name, best[name], seed) for seed in others] for name in methods}
        rows = []
        for name in methods:
            result = found[name][best[name]]
            scores = [result["score"], *(run.result()["score"] for run in repeats[name])]
            row = {"method": name, "by_rate": by_rate[name], "lr": best[name], program.scores: scores}
            rows.append({**row, **{key: value for key, value in result.items() if key != "score"}})
    return rows


def table(study: Study, rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: mean and standard deviation over the seeds, the search over rates, and the optimizer's state."""
    program = study.file.program
    heads = ["method", f"{program.score}, mean ± std (seeds)", "best rate", "first seed at each rate"]
    heads += [*program.columns.values(), "state MB"]
    numbers = ["--:"] * (len(program.columns) + 1)
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join([':--', ':--', '--:', ':--', *numbers])} |"]
    worst_last = sorted(rows, key=lambda row: statistics.fmean(row[program.scores]))
    for row in worst_last if program.smaller_is_better else reversed(worst_last):
        values, rates = row[program.scores], row["by_rate"]
        spread = f" ± {statistics.stdev(values):.{program.digits}f}" if _have_a_spread(values) else ""
        each = ", ".join(f"{value:.{program.digits}f}" for value in values)
        at_the_end = len(rates) > 1 and row["lr"] in (min(rates), max(rates))
        state = row["optimizer_state_bytes"]
        cells = [
            row["method"],
            f"{statistics.fmean(values):.{program.digits}f}{spread} ({each})" if len(values) > 1 else each,
            f"{row['lr']:g}{' (end of the range)' if at_the_end else ''}",
            ", ".join(f"{lr:g}: {value:.{program.digits}f}" for lr, value in rates.items()),
            *(f"{row[key]:.4f}" for key in program.columns),
            "—" if state is None else f"{state / 1e6:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _have_a_spread(values: Sequence[float]) -> bool:
    return len(values) > 1 and all(map(math.isfinite, values))
