"""Mixtures of data folders, `--dataset_path A:0.7,B:0.3`: what a sample is from is a function of its position.

The endless stream of samples is cut into periods of `PERIOD` positions. Each holds exactly its share of every source,
in an order that (seed, period) draws; a source's own samples come in the order that it has alone, epoch after epoch. So
the share of a source is exact after every period, nothing has to be saved, and a run that goes on at any position, on
any number of devices, reads what it would have read.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

PERIOD = 10_000
"""Samples. A share is a multiple of its inverse."""

_ITEM = re.compile(r"(.+):([^:/]+)")


class Order(Protocol):
    """Which sample stands at which position of an endless stream."""

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """Sample indices at `positions` (int64)."""


@dataclass(frozen=True)
class Source:
    name: str
    """The folder's last part; with a number where several have the same."""
    folder: str
    share: float
    """Of the samples; those of a mixture add up to 1."""


def sources_of(dataset_path: str) -> tuple[Source, ...]:
    """The folders of a `--dataset_path`: one, or `FOLDER:WEIGHT` items, comma-separated, with weights of any sum.

    What exists as a folder is one, whatever its name. ValueError where weights are no positive numbers, or a source
    would have no sample in a period.

    >>> [(source.name, source.share) for source in sources_of("data/wiki:3,data/news:1")]
    [('wiki', 0.75), ('news', 0.25)]
    >>> sources_of("data/wiki")
    (Source(name='wiki', folder='data/wiki', share=1.0),)
    """
    items = [item.strip() for item in dataset_path.split(",")]
    found = [_ITEM.fullmatch(item) for item in items]
    if os.path.isdir(dataset_path) or not all(found):
        return (Source(Path(dataset_path).name, dataset_path, 1.0),)
    folders, words = zip(*((match[1], match[2]) for match in found if match), strict=True)
    weights = [_weight(folder, word) for folder, word in zip(folders, words, strict=True)]
    shares = [weight / math.fsum(weights) for weight in weights]
    for folder, share, count in zip(folders, shares, counts_of(shares), strict=True):
        if not count:
            raise ValueError(f"the share of {folder}, {share:.2g}, is below 1 in {PERIOD:,} samples")
    names = [Path(folder).name for folder in folders]
    named = [f"{name}_{names[:at].count(name) + 1}" if names.count(name) > 1 else name for at, name in enumerate(names)]
    return tuple(map(Source, named, folders, shares))


def first_folder(dataset_path: str) -> str:
    """Where the tokenizer lies: all folders of a mixture have the same."""
    return sources_of(dataset_path)[0].folder


def _weight(folder: str, word: str) -> float:
    try:
        weight = float(word)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"the weight of {folder} must be a positive number, not {word!r}")
    return weight


def counts_of(shares: Sequence[float]) -> np.ndarray:
    """Samples of each source in a period, (sources,) int64: whole numbers nearest to the shares that add up to it."""
    exact = np.array(shares) * PERIOD
    counts = np.floor(exact).astype(np.int64)
    largest_rests = np.argsort(-(exact - counts), kind="stable")[: PERIOD - int(counts.sum())]
    counts[largest_rests] += 1
    return counts


class MixedOrder:
    """Sample indices of sources that stand one after the other: those of source k begin at the sum of earlier sizes."""

    def __init__(self, orders: Sequence[Order], sizes: Sequence[int], shares: Sequence[float], seed: int):
        self._orders, self._seed = orders, seed
        self._starts = np.cumsum([0, *sizes[:-1]])
        self._counts = counts_of(shares)

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
    from peft_pretraining.rng import derive_seed, permute

    order = permute(np.arange(PERIOD), PERIOD, derive_seed(seed, "mixture", period))
    sources = np.repeat(np.arange(len(counts)), counts)[order]
    numbers = np.empty_like(sources)
    for source in range(len(counts)):
        mine = sources == source
        numbers[mine] = np.arange(int(mine.sum()))
    return sources, numbers
