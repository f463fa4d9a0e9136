"""Losses and gradient norms that stand out from those before.

Running mean and variance are exponentially weighted, over about the last `WINDOW` finite values. A value that lies more
than k standard deviations above the mean is a spike. If its update is skipped, the statistics stay as they are: they
are of updates that were done. Otherwise the largest value that would not have been a spike enters them in its place, so
that one spike does not hide the next, while a lasting rise is adopted after some updates. All of it is a function of
numbers that are equal on all ranks, and is stored in a plain dictionary with the counters.
"""

from __future__ import annotations

import math
from typing import Any

WINDOW = 200
"""Updates over which mean and variance are taken; a value's weight falls by 1/e over so many."""

FIRST_UPDATES = 100
"""Values that are only learnt from: at a run's beginning the loss falls, and norms rise, faster than they scatter."""

LOGGED_DEVIATIONS = 6.0
"""k, unless --skip_spikes says otherwise."""

MOST_IN_A_ROW = 10
LARGEST_SHARE = 0.05
"""Limits of --skip_spikes: so many skipped updates in a row, or this share of the run's updates, end the run."""

_SMALLEST_DEVIATION = 1e-3  # of the mean: data that hardly varies must not make every value a spike


def observe(statistics: dict[str, Any], values: dict[str, float], deviations: float, skip: bool) -> list[str]:
    """Which of `values` (name to number) are spikes, described; then `statistics` learns from them.

    `statistics` holds, for every name, `[mean, variance, count]`, and is empty at first. With `skip` an update with a
    spike is not learnt from. Values that are not finite are passed over: they are the train loop's to deal with.
    """
    found, learnt = [], {}
    for name, value in values.items():
        if not math.isfinite(value):
            continue
        mean, variance, count = statistics.get(name, (value, 0.0, 0))
        deviation = max(math.sqrt(variance), _SMALLEST_DEVIATION * abs(mean))
        if count >= FIRST_UPDATES and value > mean + deviations * deviation:
            height = (value - mean) / deviation if deviation else math.inf
            found.append(f"{name} {value:.4g} is {height:.1f} standard deviations above {mean:.4g}")
            value = mean + deviations * deviation
        weight = max(1 / WINDOW, 1 / (count + 1))  # a plain average until the window is full
        difference = value - mean
        variance = (1 - weight) * (variance + weight * difference * difference)
        learnt[name] = [mean + weight * difference, variance, count + 1]
    if not (found and skip):
        statistics.update(learnt)
    return found


def over_the_limit(in_a_row: int, skipped: int, updates: int) -> str | None:
    """Why a run of `updates` updates, of which `skipped` were, must not skip more; None while it may."""
    if in_a_row > MOST_IN_A_ROW:
        what = f"more than {MOST_IN_A_ROW} updates in a row"
    elif skipped > LARGEST_SHARE * updates:
        what = f"{skipped} of {updates} updates, more than {LARGEST_SHARE:.0%},"
    else:
        return None
    return f"{what} had a spike (--skip_spikes): the run has diverged; lower --lr, or go back to an earlier checkpoint"
