"""Compare finished or running runs: a table on stdout, what each parameter group got, and a PNG of losses over tokens.

python -m peft_pretraining.report.compare RUN_DIR [RUN_DIR ...] --plot comparison.png
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_pretraining.flags import ConfigError, exit_with_problems, one_line
from peft_pretraining.optim.group_record import GroupRecord
from peft_pretraining.report.grouping import described, differing, shortened
from peft_pretraining.report.runs import LoggedRun, complete, number, smoothed

COLUMNS = ("method", "validation perplexity", "optimizer-state MB", "tokens/s", "seconds")

_COLOURS = ("#1f5fa8", "#c4501b", "#2e7d4f", "#7a4fa3", "#8a6d00", "#a33a5e", "#3f7f93")
_LONGEST_SETTINGS = 60
_UNKNOWN = "—"
_OF_DTYPE = {"bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}


@dataclass(frozen=True)
class RunRecord:
    """What one run's folder says.

    >>> updates = [{"loss": 4.0, "tokens_seen": 100, "step_time": 0.5, "throughput_tokens": 200.0}]
    >>> evaluations = [{"final_eval_loss": 3.9, "final_eval_perplexity": 49.4, "optimizer_state_bytes": 8e6}]
    >>> runs = [RunRecord(name, {"method": "mine"}, updates, evaluations, "mine") for name in ("first", "second")]
    >>> print(table([run.row() for run in labelled(runs)]))
    | method        | validation perplexity | optimizer-state MB | tokens/s | seconds |
    | :------------ | --------------------: | -----------------: | -------: | ------: |
    | mine (first)  |                 49.40 |               8.00 |      200 |       0 |
    | mine (second) |                 49.40 |               8.00 |      200 |       0 |
    """

    name: str
    settings: dict[str, Any]
    updates: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    label: str
    """The method, and the folder's name and the differing settings where another run has the same method."""
    groups: tuple[GroupRecord, ...] | None = None
    """What each parameter group got; None of a run from before that was recorded."""

    @classmethod
    def read(cls, folder: Path, warnings: list[str]) -> RunRecord:
        """Raises `ConfigError` when the folder is not that of a run that has been evaluated.

        What of its metrics cannot be used is named in `warnings`.
        """
        run = LoggedRun.read(folder, warnings)
        if not run.evaluations:
            raise ConfigError([f"{folder} has not been evaluated yet"])
        return cls(run.name, run.settings, run.updates, run.evaluations, run.method, run.groups)

    @property
    def method(self) -> str:
        return self.settings["method"]

    @property
    def precision(self) -> str:
        """What it was kept and computed in; of a run from before that was recorded, what `--dtype` says of it."""
        if isinstance(name := self.settings.get("precision"), str):
            return name
        return _OF_DTYPE.get(str(self.settings.get("dtype")), "of its device")

    def row(self) -> dict[str, Any]:
        """One line of the table: `COLUMNS`, the perplexity before training, and the parameter groups. None is what the
        folder does not say."""
        last, state = self.evaluations[-1], number(self.evaluations[-1], "optimizer_state_bytes")
        speeds = [speed for update in self.updates if (speed := number(update, "throughput_tokens")) is not None]
        return {
            "method": self.label,
            "validation perplexity": number(last, "final_eval_perplexity"),
            "perplexity before": number(self.evaluations[0], "final_eval_perplexity"),
            "optimizer-state MB": None if state is None else state / 1e6,
            "tokens/s": statistics.median(speeds) if speeds else 0.0,
            "seconds": sum(number(update, "step_time") or 0.0 for update in self.updates),
            "parameter groups": None if self.groups is None else [group.as_json() for group in self.groups],
        }


def labelled(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """The runs, told apart by their folders and by the settings in which they differ where they have one method; by
    their numbers where these are alike, too."""
    methods = Counter(run.method for run in runs)
    names = []
    for run in runs:
        told = run.method
        if methods[run.method] > 1:
            names_of = differing([other.settings for other in runs if other.method == run.method])
            more = described({name: run.settings.get(name) for name in names_of})
            told += f" ({run.name}{', ' if more else ''}{shortened(more, _LONGEST_SETTINGS)})"
        names.append(told)
    seen: Counter[str] = Counter()
    found = []
    for run, name in zip(runs, names, strict=True):
        seen[name] += 1
        label = name if names.count(name) == 1 else f"{name} {seen[name]}"
        found.append(dataclasses.replace(run, label=one_line(label)))
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    digits = {"validation perplexity": 2, "optimizer-state MB": 2, "tokens/s": 0, "seconds": 0}
    cells = [[_cell(row[name], digits.get(name)) for name in COLUMNS] for row in rows]
    widths = [max(len(line[column]) for line in [COLUMNS, *cells]) for column in range(len(COLUMNS))]

    def line(values: Sequence[str]) -> str:
        first, *others = zip(values, widths, strict=True)
        return f"| {first[0]:<{first[1]}} | " + " | ".join(f"{value:>{width}}" for value, width in others) + " |"

    ruler = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(COLUMNS), line(ruler), *map(line, cells)])


def precisions(runs: Sequence[RunRecord]) -> str:
    """One line where the runs differ in what they were computed in: then so do rounding, memory and speed."""
    if len({run.precision for run in runs}) < 2:
        return ""
    return "precision: " + "; ".join(f"{run.label} {run.precision}" for run in runs)


def parameter_groups(runs: Sequence[RunRecord]) -> str:
    """Lines with rule, rate and decay of every group of every run: without them no table says what was compared."""
    lines = ["parameter groups, with peak rates:"]
    for run in runs:
        if run.groups is None:
            lines.append(f"  {run.label}: not recorded")
        else:
            lines += [f"  {run.label}: {one_line(str(group))}" for group in run.groups]
    return "\n".join(lines)


def _cell(value: Any, digits: int | None) -> str:
    if value is None:
        return _UNKNOWN
    return value if digits is None else f"{value:,.{digits}f}"


def plot(runs: Sequence[RunRecord], path: Path) -> None:
    """Training loss (lines, averaged) and validation loss (points) over tokens seen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=150)
    for run, colour in zip(runs, _COLOURS * len(runs), strict=False):
        name, (tokens, losses) = run.label.replace("$", r"\$"), _smoothed(run.updates)  # $ begins a formula
        axes.plot(tokens, losses, color=colour, linewidth=1.6, label=f"{name}, training")
        points = [
            (record["tokens_seen"], record["final_eval_loss"])
            for record in complete(run.evaluations, "final_eval_loss")
        ]
        last = number(run.evaluations[-1], "final_eval_perplexity")
        axes.plot(
            [tokens / 1e6 for tokens, _ in points],
            [loss for _, loss in points],
            color=colour,
            marker="o",
            markersize=5,
            linestyle="none",
            label=f"{name}, validation (perplexity {_UNKNOWN if last is None else f'{last:.1f}'})",
        )
    axes.set_xlabel("tokens seen (millions)")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def _smoothed(updates: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Tokens in millions and the mean loss of the last few updates up to there; skipped updates are left out."""
    kept = [update for update in complete(updates, "loss") if not update.get("skipped")]
    return [update["tokens_seen"] / 1e6 for update in kept], smoothed([update["loss"] for update in kept])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--plot", type=Path, help="write a PNG of loss over tokens to this file")
    parser.add_argument("--json", type=Path, help="write the table's rows to this file")
    arguments = parser.parse_args(argv)
    runs: list[RunRecord] = []
    problems: list[str] = []
    warnings: list[str] = []
    for folder in arguments.runs:
        try:
            runs.append(RunRecord.read(folder, warnings))
        except ConfigError as error:
            problems += error.problems
    for warning in warnings:
        print(f"warning: {one_line(warning)}", file=sys.stderr)
    if problems:
        return exit_with_problems(ConfigError(problems))
    runs = labelled(runs)
    rows = [run.row() for run in runs]
    print(table(rows))
    if line := precisions(runs):
        print(f"\n{line}")
    print(f"\n{parameter_groups(runs)}")
    try:
        if arguments.plot:
            plot(runs, arguments.plot)
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    except (OSError, ValueError) as error:  # matplotlib's, of an unknown kind of file
        return exit_with_problems(ConfigError([f"the results cannot be written: {error}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
