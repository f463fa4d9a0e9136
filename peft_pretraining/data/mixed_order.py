"""The order of a mixture's samples: see mixture.py."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np

from peft_pretraining.data.mixture import PERIOD, counts_of
from peft_pretraining.rng import derive_seed, permute


class Order(Protocol):
    """Which sample stands at which position of an endless stream."""

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """Sample indices at `positions` (int64)."""


class MixedOrder:
    """Sample indices of sources that stand one after the other: those of source k begin at the sum of earlier sizes."""

    def __init__(self, orders: Sequence[Order], sizes: Sequence[int], shares: Sequence[float], seed: int):
        self._orders, self._seed = orders, seed
        self._starts = np.cumsum([0, *sizes[:-1]])
        self._counts = np.array(counts_of(shares))

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """Sample indices at `positions` (int64) of the endless stream."""
        result = np.empty_like(positions)
        periods, within = np.divmod(positions, PERIOD)
        for period in np.unique(periods):
            source_at, number_at = _period(self._seed, int(period), tuple(self._counts.tolist()))
            here = periods == period
            sources, numbers = source_at[within[here]], number_at[within[here]]
            found = np.empty_like(numbers)
            for source, order in enumerate(self._orders):
                mine = sources == source
                own = period * self._counts[source] + numbers[mine]
                found[mine] = self._starts[source] + order.samples(own)
            result[here] = found
        return result

    def read_before(self, position: int) -> list[int]:
        """Samples of each source before `position`."""
        period, within = divmod(position, PERIOD)
        source_at, _ = _period(self._seed, period, tuple(self._counts.tolist()))
        return (period * self._counts + np.bincount(source_at[:within], minlength=len(self._counts))).tolist()


@lru_cache(maxsize=8)
def _period(seed: int, period: int, counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The source at each place of a period, and how many of the same source stand before it there."""
    order = permute(np.arange(PERIOD), PERIOD, derive_seed(seed, "mixture", period))
    sources = np.repeat(np.arange(len(counts)), counts)[order]
    numbers = np.empty_like(sources)
    for source in range(len(counts)):
        mine = sources == source
        numbers[mine] = np.arange(int(mine.sum()))
    return sources, numbers
