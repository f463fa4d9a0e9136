"""All runs of a study, and its table."""

from __future__ import annotations

import math
import os
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from _study import folder
from _study.file import StudyFile
from _study.folder import RunFailed
from _study.plots import differences
from _study.programs import Program
from _study.rows import Row, make_all
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
    processes: int = 0
    """Of one run, by torchrun; 0: one process, without it."""
    _starting: Lock = field(default_factory=Lock)

    def run(self, method: str, lr: float, seed: int | None) -> dict[str, Any]:
        """One training, or what is left of it; its result."""
        program, place = self.file.program, self.folder(method, lr, seed)
        entry = self.file.methods[method]
        flags = self.flags(lr, seed, entry.flags, self.more)
        result = program.result(place, flags)
        if result is None:
            if self.file.start is not None:
                start = self._first_run(self.out / "start", self.file.start, self.file.start.get("seed"))
                flags = {**flags, "model_name_or_path": start}
                flags.pop("model_config", None)
            if entry.warm_up is not None:
                warm_up = self.out / method / ("warm_up" if seed is None else f"warm_up_seed{seed}")
                flags["warmed_up_model"] = self._first_run(warm_up, entry.warm_up, seed)
            program.train(place, flags, self._threads, self.processes)
            result = program.result(place, flags, ended=True)
            if result is None:
                raise RunFailed(f"{place} holds no results, though its run has ended: see {place}.log")
            if not self.file.keep_models:
                program.remove_models(place)
            told = f"{program.score} {result['score']:.{program.digits}f}"
            print(f"{method:<28} {place.name:<20} {told}", flush=True)
        return result

    @property
    def _threads(self) -> int:
        """Of one run."""
        return max(1, (os.cpu_count() or 1) // self.jobs)

    def folder(self, method: str, lr: float, seed: int | None) -> Path:
        return self.out / method / (f"lr{lr:g}" if seed is None else f"lr{lr:g}_seed{seed}")

    def flags(self, lr: float, seed: int | None, *own: Mapping[str, Any]) -> dict[str, Any]:
        """The training script's flags: what all runs share, then `own`, the later over the earlier."""
        flags = dict(self.file.common)
        flags |= {self.file.program.inputs[name]: value for name, value in self.inputs.items()}
        if self.file.evaluation_rows is not None:
            flags |= {"train_file": self.out / "train.jsonl", "validation_file": self.out / "validation.jsonl"}
        for more in own:
            flags |= more
        flags |= {"lr": f"{lr:g}"} | ({} if seed is None else {"seed": seed})
        return {name: value for name, value in flags.items() if value is not None}

    def _first_run(self, place: Path, settings: Mapping[str, Any], seed: int | None) -> Path:
        """The last checkpoint of a run by which others start, made if it is not there."""
        last = place / f"model_{settings['num_training_steps']}"
        with self._starting:  # several runs start by the same one
            if not last.is_dir():
                flags = self.flags(settings["lr"], seed, self.more, settings)
                self.file.program.train(place, flags, self._threads, self.processes)
        return last

    def in_common(self) -> dict[str, Any]:
        """What the runs of one folder share. Methods may be added, and rates and seeds of a method."""
        entries = {f"method {name}": {**self.file.entries[name], "lrs": None} for name in self.file.methods}
        settings = {"script": self.file.program.script, "common": self.file.common, "flags": self.more}
        settings |= {} if self.file.start is None else {"start": self.file.start}
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
    """All runs: row by row, every rate with the first seed, then the other seeds at the best rate of the method.

    After each row's last run OUT/table.md and OUT/results.json have the rows that are complete.
    """
    rows = _rows(study)

    def complete() -> list[dict[str, Any]]:
        return [_in_results(study.file.program, row) for row in rows if row.is_complete]

    def write() -> None:
        folder.write_results(study.out, found := complete(), table(study, found))

    make_all(rows, study.run, study.jobs, write)
    return complete()


def so_far(study: Study) -> list[dict[str, Any]]:
    """What there is of each row, of all rates that have been tried; no run is made, and none need be complete."""
    rows = _rows(study)
    for row in rows:
        found, flags = {}, study.flags(0, None, study.file.methods[row.name].flags, study.more)
        for path in sorted((study.out / row.name).glob("lr*/")):
            lr, _, seed = path.name.removeprefix("lr").partition("_seed")
            if (result := study.file.program.result(path, flags)) is not None:
                found[float(lr), int(seed) if seed else None] = result
        row.take(found)
    return [_in_results(study.file.program, row) for row in rows if row.by_rate]


def _rows(study: Study) -> list[Row]:
    file = study.file
    return [
        Row(name, entry.lrs, file.seeds, file.extend, file.program.smaller_is_better)
        for name, entry in file.methods.items()
    ]


def _in_results(program: Program, row: Row) -> dict[str, Any]:
    """What results.json says of a method: numbers that are not scores are those of the first seed at the best rate."""
    results = row.at_best()
    found = {"method": row.name, "by_rate": row.by_rate, "lr": row.best}
    found[program.scores] = [result.get("reported", result["score"]) for result in results]
    return {**found, **{key: value for key, value in results[0].items() if key not in ("score", "reported")}}


def table(study: Study, rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: mean and standard deviation over the seeds, the search over rates, and the optimizer's state."""
    program = study.file.program
    columns = {key: head for key, head in program.columns.items() if any(row.get(key) is not None for row in rows)}
    baseline = next((row[program.scores] for row in rows if row["method"] == study.file.baseline), None)
    searched = "first seed at each rate"
    heads = ["method", f"{program.score}, mean ± std (seeds)", "best rate", searched]
    if baseline is not None:
        heads.insert(2, f"by {study.file.baseline}")
    heads += [*columns.values(), "state MB"]
    lines = [
        f"| {' | '.join(heads)} |",
        f"| {' | '.join(':--' if head in (heads[0], heads[1], searched) else '--:' for head in heads)} |",
    ]
    worst_last = sorted(rows, key=lambda row: statistics.fmean(differences(row[program.scores], baseline)))
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
            *(_cell(row.get(key), program.column_format) for key in columns),
            "—" if state is None else f"{state / 1e6:.2f}",
        ]
        if baseline is not None:
            apart = differences(values, baseline)
            spread = f" ± {statistics.stdev(apart):.{program.digits}f}" if _have_a_spread(apart) else ""
            cells.insert(2, f"{statistics.fmean(apart):+.{program.digits}f}{spread}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    return "—" if value is None else format(value, form)


def _have_a_spread(values: Sequence[float]) -> bool:
    return len(values) > 1 and all(map(math.isfinite, values))
