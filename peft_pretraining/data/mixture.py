"""Mixtures of data folders, `--dataset_path A:0.7,B:0.3`: what a sample is from is a function of its position.

The endless stream of samples is cut into periods of `PERIOD` positions. Each holds exactly its share of every source,
in an order that (seed, period) draws; a source's own samples come in the order that it has alone, epoch after epoch. So
the share of a source is exact after every period, nothing has to be saved, and a run that goes on at any position, on
any number of devices, reads what it would have read (mixed_order.py). Nothing here imports NumPy or torch.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PERIOD = 10_000
"""Samples. A share is a multiple of its inverse."""

_ITEM = re.compile(r"(.+):([^:/]+)")


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


def counts_of(shares: Sequence[float]) -> list[int]:
    """Samples of each source in a period: whole numbers nearest to the shares that add up to it.

    >>> counts_of([1 / 3] * 3)
    [3334, 3333, 3333]
    """
    exact = [share * PERIOD for share in shares]
    counts = [int(each) for each in exact]
    largest_rests = sorted(range(len(exact)), key=lambda place: counts[place] - exact[place])
    for place in largest_rests[: PERIOD - sum(counts)]:
        counts[place] += 1
    return counts
