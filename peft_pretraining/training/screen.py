"""What is seen of the updates: a bar on a terminal, elsewhere a plain line every some seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from peft_pretraining.training.tracking import log

_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} <{remaining} {desc}"


class Screen:
    """Shows the updates of a run that has done `done` of `total`, while it is open; nothing where it is not `enabled`.

    `every`: seconds between plain lines, of which the last update always gets one. The rate behind the estimate of
    the time that is left holds evaluations and saves.
    """

    def __init__(self, total: int, done: int, enabled: bool, every: float):
        self._total, self._enabled, self._every = total, enabled, every
        self._bar: tqdm | None = None
        self._began_with = self.done = done
        self._began = self._said = time.monotonic()

    def __enter__(self) -> Screen:
        if self._enabled and sys.stderr.isatty():
            self._redirected = logging_redirect_tqdm([log])
            self._redirected.__enter__()
            self._bar = tqdm(
                total=self._total,
                initial=self.done,
                file=sys.stderr,
                bar_format=_BAR,
                dynamic_ncols=True,
                mininterval=0.5,
            )
        self._began = self._said = time.monotonic()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._redirected.__exit__(*error)

    def show(self, record: Mapping[str, Any]) -> None:
        """One update, by its record."""
        self.done = record["update_step"]
        if self._bar is not None:
            self._bar.set_description_str(describe(record), refresh=False)
            self._bar.update(self.done - self._bar.n)
            return
        now = time.monotonic()
        if self._enabled and (now - self._said >= self._every or self.done == self._total):
            self._said = now
            share, left = self.done / self._total, self.seconds_left(now)
            eta = f", ETA {tqdm.format_interval(left)}" if self.done < self._total else ""
            log.info("update %d/%d (%.0f%%): %s%s", self.done, self._total, 100 * share, describe(record, ", "), eta)

    def go_back(self, done: int) -> None:
        """The run has gone back to an update before."""
        self._began_with, self.done, self._began = done, done, time.monotonic()
        if self._bar is not None:
            self._bar.n = done

    def seconds_left(self, now: float) -> float:
        """As long as the updates since the beginning took on average, for each that is left."""
        return (now - self._began) / max(self.done - self._began_with, 1) * (self._total - self.done)


def describe(record: Mapping[str, Any], separator: str = " ") -> str:
    """Loss, learning rate, speed, MFU and memory of an update's record, in 48 characters at most without separators.

    >>> describe({"loss": 3.2141, "lr": 0.01, "throughput_tokens": 98765.4, "mfu": 0.41, "peak_memory_bytes": 2**31})
    'loss 3.214 lr 1.0e-02 98.8k tok/s MFU 41% 2 GiB'
    """
    parts = [
        f"loss {record['loss']:.3f}",
        f"lr {record['lr']:.1e}",
        f"{_short(record['throughput_tokens'])} tok/s",
        *([f"MFU {record['mfu']:.0%}"] if "mfu" in record else []),
        f"{record['peak_memory_bytes'] / 2**30:.3g} GiB",
    ]
    return separator.join(parts)


def _short(number: float) -> str:
    """
    >>> _short(950.0), _short(12345.0), _short(3.21e6)
    ('950', '12.3k', '3.21M')
    """
    size, letter = next(((size, letter) for size, letter in ((1e6, "M"), (1e3, "k")) if number >= size), (1.0, ""))
    return f"{number / size:.3g}{letter}"
