"""Colours, markers and dashes of series: one colour for each method where there are several, which also those who
confuse red and green can tell apart (Okabe and Ito, 2008)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peft_pretraining.report.grouping import Series, best_of_each

LIGHT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d")
DARK = ("#4da3e0", "#f0803c", "#2ec59b", "#e39ac4", "#f2b632", "#8fd0f7", "#c8c8c8")
"""The same, lighter, for dark backgrounds."""
MARKERS = ("o", "s", "^", "D", "v", "X", "P")
PLOTLY_MARKERS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "x", "cross")
DASHES = ("solid", "dashed", "dotted", "dashdot")
PLOTLY_DASHES = ("solid", "dash", "dot", "dashdot")


@dataclass(frozen=True)
class Style:
    """Indices into the tuples above."""

    colour: int
    marker: int
    dash: int


def styles(series: Sequence[Series]) -> list[Style]:
    """One for each series. With several methods the colour and the marker are the method's, the dash is its series',
    drawn through for that at the best rate; with one method all three are the series'."""
    methods = list(dict.fromkeys(one.method for one in series))
    best = {id(one) for one in best_of_each(series)}
    found: dict[int, Style] = {}
    seen = dict.fromkeys(methods, 0)
    for number, one in sorted(enumerate(series), key=lambda item: id(item[1]) not in best):
        kind = methods.index(one.method) if len(methods) > 1 else number
        round_ = kind // len(LIGHT)
        dash = seen[one.method] if len(methods) > 1 else round_
        found[number] = Style(kind % len(LIGHT), (kind + round_) % len(MARKERS), dash % len(DASHES))
        seen[one.method] += 1
    return [found[number] for number in range(len(series))]
