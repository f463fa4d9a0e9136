"""Figures for a paper, each as PNG and PDF."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peft_pretraining.report.grouping import Series, Sweep, best_of_each, shortened, sweeps
from peft_pretraining.report.styles import DASHES, LIGHT, MARKERS, Style, styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = {
    "perplexity_over_tokens": "Validation perplexity over tokens",
    "perplexity_over_time": "Validation perplexity over training time",
    "perplexity_over_state": "Last validation perplexity over the memory of the optimizer's state",
    "rate_sensitivity": "Last validation perplexity over the learning rate",
    "training_loss": "Training loss over tokens",
}
_SUFFIXES = (".png", ".pdf")
_FEW = 3
"""Evaluations, below which the training's own perplexity is drawn as well, thin."""
_HIGHEST = 1.25
"""Perplexities of rates that are so many times the worst method's best one are cut off."""
_LONGEST_NAME = 44


def write(series: Sequence[Series], out: Path) -> list[str]:
    """The names of the figures that are there now; earlier ones of which there is nothing now are removed.

    Of a method at several rates the curves are those of its best one.
    """
    of_all = dict(zip(map(id, series), styles(series), strict=True))
    shown = [(one, of_all[id(one)]) for one in best_of_each(series)]
    best = {id(one) for one, _ in shown}
    found_sweeps = [
        (sweep, of_all[next((id(one) for one in sweep.series if id(one) in best), id(sweep.series[0]))])
        for sweep in sweeps(series)
    ]
    drawers: dict[str, Callable[[Axes], int]] = {
        "perplexity_over_tokens": lambda axes: _curves(axes, shown, by_time=False),
        "perplexity_over_time": lambda axes: _curves(axes, shown, by_time=True),
        "perplexity_over_state": lambda axes: _states(axes, shown),
        "rate_sensitivity": lambda axes: _rates(axes, found_sweeps),
        "training_loss": lambda axes: _training(axes, shown),
    }
    written = []
    for name, draw in drawers.items():
        figure = _figure()
        (axes,) = figure.axes
        if count := draw(axes):
            _finish(figure, axes, count)
            written.append(name)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # letters of a name that the font has not
                for suffix in _SUFFIXES:
                    figure.savefig(out / f"{name}{suffix}", dpi=200)
        else:
            for suffix in _SUFFIXES:
                (out / f"{name}{suffix}").unlink(missing_ok=True)
    return written


def _figure() -> Figure:
    from matplotlib.figure import Figure  # not pyplot: no window, and nobody's settings

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    figure.subplots()
    return figure


def _curves(axes: Axes, shown: Sequence[tuple[Series, Style]], by_time: bool) -> int:
    curves = [(one, style, one.curve()) for one, style in shown]
    with_training = all(len(points) < _FEW for _, _, points in curves)
    drawn = 0
    scale = 1.0 if by_time else 1e-6
    for one, style, points in curves:
        colour = LIGHT[style.colour]
        training = [(s if by_time else t, math.exp(min(loss, 700))) for t, s, loss in one.training()]
        if with_training and training:
            axes.plot(
                [x * scale for x, _ in training], [y for _, y in training], color=colour, linewidth=0.7, alpha=0.5
            )
        if points or (with_training and training):
            xs = [(point.seconds if by_time else point.tokens) * scale for point in points]
            axes.plot(xs, [point.perplexity for point in points], label=_name(one), **_looks(style))
            axes.fill_between(
                xs, [p.low for p in points], [p.high for p in points], color=colour, alpha=0.18, linewidth=0
            )
            drawn += 1
    axes.set_xlabel("training time (s)" if by_time else "tokens (millions)")
    axes.set_ylabel("validation perplexity" + (" (thin: training)" if with_training else ""))
    _logarithmic_y(axes)
    return drawn


def _states(axes: Axes, shown: Sequence[tuple[Series, Style]]) -> int:
    drawn = 0
    for one, style in shown:
        state, perplexity = one.runs[0].state_bytes, one.final_perplexity()
        if state is None or perplexity is None:
            continue
        finals = [final.perplexity for run in one.counted if (final := one.final(run)) and final.perplexity is not None]
        bars = [[perplexity - min(finals)], [max(finals) - perplexity]] if len(finals) > 1 else None
        looks = {**_looks(style), "linestyle": "none", "markersize": 6.5}
        looks |= {"markerfacecolor": "white"} if style.dash else {}  # another series of the method
        axes.errorbar([state / 1e6], [perplexity], yerr=bars, label=_name(one), elinewidth=0.9, capsize=2, **looks)
        drawn += 1
    axes.set_xlabel("optimizer state (MB)")
    axes.set_ylabel("last validation perplexity")
    return drawn


def _rates(axes: Axes, found: Sequence[tuple[Sweep, Style]]) -> int:
    for sweep, style in found:
        values = [point.perplexity for point in sweep.points]
        axes.plot(sweep.rates, values, label=_cut(sweep.label), **_looks(style))
    lowest = [min(values) for sweep, _ in found if (values := [p.perplexity for p in sweep.points if p.perplexity > 0])]
    if lowest and axes.get_ylim()[1] > (top := _HIGHEST * max(lowest)):
        axes.set_ylim(top=top)
    axes.set_xscale("log")
    axes.set_xlabel("peak learning rate (--lr)")
    axes.set_ylabel("last validation perplexity")
    _logarithmic_y(axes)
    return sum(any(math.isfinite(point.perplexity) for point in sweep.points) for sweep, _ in found)


def _training(axes: Axes, shown: Sequence[tuple[Series, Style]]) -> int:
    drawn = 0
    for one, style in shown:
        points = one.training()
        if points:
            looks = {**_looks(style), "marker": None, "linewidth": 1.1}
            axes.plot(
                [tokens / 1e6 for tokens, _, _ in points], [loss for _, _, loss in points], label=_name(one), **looks
            )
            drawn += 1
    axes.set_xlabel("tokens (millions)")
    axes.set_ylabel("training loss (nats per token)")
    return drawn


def _looks(style: Style) -> dict:
    return {
        **{"color": LIGHT[style.colour], "marker": MARKERS[style.marker], "linestyle": DASHES[style.dash]},
        **{"markersize": 4.5, "linewidth": 1.4},
    }


def _name(series: Series) -> str:
    count = len(series.runs)
    return _cut(series.label) + (f" ({count} seeds)" if count > 1 else "")


def _cut(name: str) -> str:
    name = shortened(name, _LONGEST_NAME)
    # A dollar begins a formula, and legends leave out what begins with an underscore.
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")


def _logarithmic_y(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high / low < 20:  # below two decades the powers of ten alone would be too few numbers
        axes.yaxis.set_major_locator(_nice_ticks())
    else:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _nice_ticks():
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10])


def _finish(figure: Figure, axes: Axes, count: int) -> None:
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    if count <= 6:
        axes.legend(frameon=False, fontsize=8.5)
        return
    columns = 1 if count <= 24 else 2
    figure.set_size_inches(6.4 + 1.9 * columns, 4.0 if count <= 20 else 5.2)
    figure.legend(loc="outside right center", frameon=False, fontsize=8 if count <= 20 else 7, ncols=columns)
