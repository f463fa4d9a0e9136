"""What `non_convergence.py` writes: a CSV file per run, a summary as CSV and Markdown, a plot, the settings."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from descent import Trajectory
from non_convergence_config import OPTIMIZERS, Run, Settings

SETTINGS_FILE = "settings.json"
CLAIM = {"full": "falls", "galore": "stalls", "golore": "falls", "large_batch": "falls"}
"""What the paper says that f(X) - f* does, by method."""
TITLES = {"full": "full gradient", "galore": "GaLore", "golore": "GoLore", "large_batch": "GaLore, large batch"}
OPTIMIZER_TITLES = {"sgd": "SGD", "adamw": "AdamW"}
SUMMARY_COLUMNS = (
    *("optimizer", "method", "seed", "minimum", "gap_start", "gap_late", "gap_end", "claim", "seen", "seconds"),
)

_REACHED = 0.01
_STILL_FALLING = 0.9
_LARGEST = 1e100  # whose square is a number
_STYLE = {"full": ("#5b6770", ":"), "galore": ("#c4501b", "-"), "golore": ("#1f5fa8", "--"),
          "large_batch": ("#2e7d4f", "-.")}  # fmt: skip
_TURN = "GoLore turns random"
_LEGEND = {"loc": "lower center", "ncols": 5, "frameon": False, "handlelength": 3}
_LOWEST_DRAWN = 1e-10  # below it lies float32's rounding of X


def trend(gaps: Sequence[tuple[int, float]]) -> str:
    """What f(X) - f* does, from its values as (step, gap): `falls`, `stalls` or `diverges`.

    It falls if it ended at or below 1% of where it began, or if the last quarter of the steps still took a tenth off
    it. It stalls if neither holds.
    """
    start, late, end = gaps[0][1], before_last_quarter(gaps), gaps[-1][1]
    if not math.isfinite(end) or end > start:
        return "diverges"
    return "falls" if end <= _REACHED * start or end <= _STILL_FALLING * late else "stalls"


def before_last_quarter(gaps: Sequence[tuple[int, float]]) -> float:
    """The gap at the sample next to three quarters of the steps."""
    return min(gaps, key=lambda sample: abs(sample[0] - gaps[-1][0] * 3 / 4))[1]


def start(settings: Settings) -> None:
    """Make the folder, without the results of an earlier call, and write down the settings."""
    folder = settings.folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in _files_of_an_earlier_call(folder):
        (folder / name).unlink(missing_ok=True)
    runs = settings.runs()
    written = {
        "settings": dataclasses.asdict(settings),
        "torch": torch.__version__,
        "runs": [dataclasses.asdict(run) for run in runs],
        "files": [*(f"{run.name}.csv" for run in runs), "summary.csv", "summary.md", "plot.png"],
    }
    (folder / SETTINGS_FILE).write_text(json.dumps(written, indent=2) + "\n")


def _files_of_an_earlier_call(folder: Path) -> list[str]:
    """Names of its results in the folder itself, and only such as are results: the file may be anybody's."""
    try:
        files = json.loads((folder / SETTINGS_FILE).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    names = [name for name in files if isinstance(name, str)] if isinstance(files, list) else []
    return [name for name in names if re.fullmatch(r"summary\.(csv|md)|plot\.png|[a-z]+_[a-z_]+_seed[0-9]+\.csv", name)]


def write_run(folder: Path, trajectory: Trajectory) -> None:
    """`{optimizer}_{method}_seed{seed}.csv`: f(X) and f(X) - f* after so many steps."""
    samples = ((sample.step, repr(sample.objective), repr(sample.gap)) for sample in trajectory.samples)
    _write_csv(folder / f"{trajectory.run.name}.csv", ("step", "objective", "gap"), samples)


def write_summary(folder: Path, trajectories: Sequence[Trajectory]) -> str:
    """All of the summaries; returns the table of summary.md."""
    rows = [_summary_row(trajectory) for trajectory in trajectories]
    _write_csv(folder / "summary.csv", SUMMARY_COLUMNS, ([row[name] for name in SUMMARY_COLUMNS] for row in rows))
    text = table(rows)
    (folder / "summary.md").write_text(text + "\n")
    plot(trajectories, folder / "plot.png")
    return text


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def _gaps(trajectory: Trajectory) -> list[tuple[int, float]]:
    return [(sample.step, sample.gap) for sample in trajectory.samples]


def _summary_row(trajectory: Trajectory) -> dict[str, Any]:
    run, gaps = trajectory.run, _gaps(trajectory)
    return {
        **{"optimizer": run.optimizer, "method": run.method, "seed": run.seed, "minimum": trajectory.minimum},
        **{"gap_start": gaps[0][1], "gap_late": before_last_quarter(gaps), "gap_end": gaps[-1][1]},
        **{"claim": CLAIM[run.method], "seen": trend(gaps), "seconds": round(trajectory.seconds, 1)},
        "covered": is_covered(run),
    }


def is_covered(run: Run) -> bool:
    """Whether the claim is about such a run: with any seed, but the experiment's own problem, rate and length."""
    own = Settings(method=(run.method,), optimizer=(run.optimizer,), seeds=(run.seed,)).runs()[0]
    return dataclasses.replace(run, sample_every=own.sample_every) == own


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of `SUMMARY_COLUMNS` as a Markdown table, one line for the seeds of a method and an optimizer.

    A row whose `covered` is False is of settings that the claim is not about: it cannot fail it.
    """
    lines = [
        "| optimizer | method | f(X) - f* at the start | at 3/4 of the steps | at the end (seeds) | claim | seen |",
        "| :-- | :-- | --: | --: | :-- | :-- | :-- |",
    ]
    for optimizer, method in dict.fromkeys((row["optimizer"], row["method"]) for row in rows):
        same = [row for row in rows if (row["optimizer"], row["method"]) == (optimizer, method)]
        ends = [row["gap_end"] for row in same]
        end = _mean_and_spread(ends)
        if len(ends) > 1:
            end += f" ({', '.join(f'{gap:.4f}' for gap in ends)})"
        first, late = (_mean_and_spread([row[name] for row in same]) for name in ("gap_start", "gap_late"))
        seen = [row["seen"] for row in same]
        counts = {what: seen.count(what) for what in dict.fromkeys(seen)}
        found = ", ".join(what if count == len(seen) else f"{what} ({count})" for what, count in counts.items())
        if counts == {CLAIM[method]: len(seen)}:
            verdict = "as claimed"
        elif all(row.get("covered", True) for row in same):
            verdict = "NOT as claimed"
        else:
            verdict = "which the claim does not cover: other settings"
        cells = (OPTIMIZER_TITLES[optimizer], TITLES[method], first, late, end, CLAIM[method], f"{found}, {verdict}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean_and_spread(gaps: Sequence[float]) -> str:
    """Mean, and from two values on the sample standard deviation."""
    if not all(abs(gap) < _LARGEST for gap in gaps):  # of runs that diverged
        return f"{max(gaps, key=abs):.4g}"
    mean = f"{statistics.fmean(gaps):.4f}"
    return f"{mean} ± {statistics.stdev(gaps):.4f}" if len(gaps) > 1 else mean


def plot(trajectories: Sequence[Trajectory], path: Path) -> None:
    """f(X) - f* over the steps, on a logarithmic scale: a panel per inner optimizer, a line per method and seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    optimizers = [name for name in OPTIMIZERS if any(t.run.optimizer == name for t in trajectories)]
    figure, panels = pyplot.subplots(
        1, len(optimizers), figsize=(5.2 * len(optimizers) + 0.4, 4.6), dpi=130, sharey=True, squeeze=False
    )
    for axes, optimizer in zip(panels[0], optimizers, strict=True):
        _draw_panel(axes, [t for t in trajectories if t.run.optimizer == optimizer])
        axes.set_title(f"inner optimizer: {OPTIMIZER_TITLES[optimizer]}")
    panels[0][0].set_ylabel("f(X) − f*")
    lines = dict(zip(*reversed(panels[0][0].get_legend_handles_labels()), strict=True))  # one of each label
    labels = [label for label in (*TITLES.values(), _TURN) if label in lines]
    figure.legend([lines[label] for label in labels], labels, **_LEGEND)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path)
    pyplot.close(figure)


def _draw_panel(axes: Any, trajectories: Sequence[Trajectory]) -> None:
    for trajectory in trajectories:
        run, gaps = trajectory.run, _gaps(trajectory)
        colour, dashes = _STYLE[run.method]
        axes.plot(
            [step / 1000 for step, _ in gaps],
            [max(gap, _LOWEST_DRAWN) for _, gap in gaps],
            **{"color": colour, "linestyle": dashes, "linewidth": 1.7, "label": TITLES[run.method]},
        )
        if run.rand_ratio is not None and 0 < run.rand_ratio < 1:
            axes.axvline(run.rand_ratio * run.steps / 1000, color="#b0b0b0", linewidth=1, label=_TURN)
    axes.set_yscale("log")
    axes.set_xlabel("steps (thousands)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
