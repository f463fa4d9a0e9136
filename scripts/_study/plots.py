"""Plots of a study's results: how much a method's rate matters, and what its state buys."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _study.programs import Program

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 4
_BLUE, _GREY = "#2a6fbb", "#c8c8c8"
_HIGHEST = 1.15
"""Perplexities above so many times the median of the methods' best ones are cut off."""


def plot_rates(rows: Sequence[Mapping[str, Any]], program: Program, path: Path) -> None:
    """A small plot for each method: the scores of its first seed over its rate by the best one; all others in grey."""
    lines = {row["method"]: _relative(row) for row in rows}
    bests = [lowest for line in lines.values() if math.isfinite(lowest := min(y for _, y in line))]
    top = _HIGHEST * statistics.median(bests) if bests else None
    height = math.ceil(len(rows) / _COLUMNS)
    figure, grid = _figure(height, min(_COLUMNS, len(rows)), (2.6 * min(_COLUMNS, len(rows)), 1.7 * height + 0.6))
    flat = [axes for line in grid for axes in line]
    for axes, row in zip(flat, rows, strict=False):
        for line in lines.values():
            axes.plot(*zip(*line, strict=True), color=_GREY, linewidth=0.6)
        axes.plot(*zip(*lines[row["method"]], strict=True), color=_BLUE, marker="o", markersize=3.5, linewidth=1.5)
        axes.set_title(f"{row['method']}  (best {row['lr']:g})", fontsize=8)
        axes.set_xscale("log", base=2)
        if program.smaller_is_better:
            axes.set_ylim(top=top)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in flat[len(rows) :]:
        axes.set_visible(False)
    for axes in flat[max(0, len(rows) - _COLUMNS) : len(rows)]:  # the last one of each column, above hidden ones too
        axes.tick_params(labelbottom=True)
    figure.supxlabel("rate of the matrices, by the best one", fontsize=9)
    figure.supylabel(f"{program.score}, first seed", fontsize=9)
    _save(figure, path)


def plot_memory(rows: Sequence[Mapping[str, Any]], program: Program, path: Path, baseline: str | None = None) -> None:
    """Over the optimizer's state the mean score, or difference from the baseline's at the same seeds, and its standard
    deviation. Where some methods were tuned, the others are left out."""
    base = next((row[program.scores] for row in rows if row["method"] == baseline), None)
    tuned = [row for row in rows if len(row["by_rate"]) > 1] or rows
    points, spreads = {}, []
    for row in tuned:
        values, state = differences(row[program.scores], base), row["optimizer_state_bytes"]
        if state is not None and all(map(math.isfinite, values)):
            points[row["method"]] = state / 1e6, statistics.fmean(values)
            spreads.append(statistics.stdev(values) if len(values) > 1 else 0.0)
    figure, ((axes,),) = _figure(1, 1, (9, 6.5))
    for at, spread in zip(points.values(), spreads, strict=True):
        axes.errorbar(*at, yerr=spread, fmt="o", color=_BLUE, ecolor=_BLUE, markersize=4.5, elinewidth=1, capsize=2)
    if base is not None:
        axes.axhline(0, color=_GREY, linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("optimizer state (MB)")
    axes.set_ylabel(
        f"{program.score}{'' if base is None else f', less that of {baseline}'}: mean and standard deviation"
    )
    axes.tick_params(which="both", labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12, y=0.08)
    figure.tight_layout()
    write_names(axes, points)
    _save(figure, path)


def differences(values: Sequence[float], baseline: Sequence[float] | None) -> Sequence[float]:
    """Seed by seed, of runs with the same data and initial weights; the values themselves without a baseline."""
    return values if baseline is None else [value - other for value, other in zip(values, baseline, strict=False)]


def _relative(row: Mapping[str, Any]) -> list[tuple[float, float]]:
    """(rate by the best rate, score), by growing rates, without runs that diverged."""
    points = sorted((float(lr) / row["lr"], score) for lr, score in row["by_rate"].items() if score is not None)
    return [(lr, score) for lr, score in points if math.isfinite(score)] or [(1.0, math.nan)]


def write_names(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Write each name beside its point, at the first of several places that covers no name and no point.

    Works on the drawn plot's pixels, so that it has to come last.
    """
    taken = []
    for at in points.values():
        x, y = axes.transData.transform(at)
        taken.append((x - 4, y - 4, x + 4, y + 4))
    for name, at in sorted(points.items(), key=lambda item: item[1]):
        x, y = axes.transData.transform(at)
        size = axes.text(0, 0, name, fontsize=8)
        box = size.get_window_extent()
        size.remove()
        width, height = box.width, box.height
        places = [(dx, dy) for reach in range(1, 9) for dx, dy in _around(reach * 9.0, width, height)]
        free = [place for place in places if not _covers((x, y), place, (width, height), taken)]
        dx, dy = (free or places)[0]
        taken.append((x + dx, y + dy, x + dx + width, y + dy + height))
        left, low = axes.transData.inverted().transform((x + dx, y + dy))
        axes.text(left, low, name, fontsize=8)
        if math.hypot(dx + width / 2, dy + height / 2) > width / 2 + 14:
            end = axes.transData.inverted().transform((x + dx + width / 2, y + dy + height / 2))
            line = {"arrowstyle": "-", "color": _GREY, "linewidth": 0.6, "shrinkB": 6}
            axes.annotate("", at, tuple(end), arrowprops=line)


def _around(reach: float, width: float, height: float) -> list[tuple[float, float]]:
    """Lower left corners, in pixels from the point: right, left, above, below, and the four corners."""
    right, left, middle = reach, -reach - width, -width / 2
    above, below, level = reach, -reach - height, -height / 2
    return [
        *((right, level), (left, level), (middle, above), (middle, below)),
        *((right, above), (right, below), (left, above), (left, below)),
    ]


def _covers(
    point: tuple[float, float],
    place: tuple[float, float],
    size: tuple[float, float],
    taken: Sequence[tuple[float, float, float, float]],
) -> bool:
    left, low = point[0] + place[0], point[1] + place[1]
    right, high = left + size[0], low + size[1]
    return any(left < b[2] and right > b[0] and low < b[3] and high > b[1] for b in taken)


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=size, dpi=150, sharex=True, sharey=True, squeeze=False)


def _save(figure: Figure, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
