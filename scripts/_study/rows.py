"""Rows of a study's table: which run each wants next, and all of them made, so many at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Condition
from typing import Any

Result = dict[str, Any]
Run = tuple[float, int | None]
"""Rate and seed."""


class Row:
    """The runs of one method: its rates with the first seed, further rates, and the other seeds at the best rate."""

    def __init__(self, name: str, lrs: Sequence[float], seeds: Sequence[int | None], extend: int, smaller: bool):
        """extend: so many rates at most beyond the given ones, where the best is the smallest or the largest.
        smaller: whether a smaller score is better."""
        self.name, self.results, self._begun = name, dict[Run, Result](), set[Run]()
        self._lrs, self._seeds, self._extend, self._smaller = list(lrs), seeds, extend, smaller

    def next(self) -> Run | None:
        """What has not been begun and can be; None where there is nothing, or only after others have ended."""
        for run in self._wanted():
            if run not in self._begun:
                self._begun.add(run)
                return run
        return None

    @property
    def is_complete(self) -> bool:
        return all(run in self.results for run in self._wanted())

    @property
    def by_rate(self) -> dict[float, float]:
        """The scores with the first seed; rates as they were given, or by size where there are further ones."""
        first = self._seeds[0]
        return {lr: self.results[lr, first]["score"] for lr in self._lrs if (lr, first) in self.results}

    @property
    def best(self) -> float:
        """The rate whose score is best."""
        scores = self.by_rate
        return (min if self._smaller else max)(scores, key=scores.__getitem__)

    def at_best(self) -> list[Result]:
        """The results at the best rate, by seeds; of a row that is not complete those that there are."""
        return [self.results[self.best, seed] for seed in self._seeds if (self.best, seed) in self.results]

    def take(self, results: Mapping[Run, Result]) -> None:
        """Results of runs that were made before, at whatever rates."""
        self.results.update(results)
        self._lrs = sorted({*self._lrs, *(lr for lr, _ in results)})

    def _wanted(self) -> list[Run]:
        """All runs that are known to be needed by now."""
        first, *others = self._seeds
        while len(self.by_rate) == len(self._lrs) and self._extend and (lr := self._beyond()) is not None:
            self._lrs, self._extend = sorted([*self._lrs, lr]), self._extend - 1
        runs: list[Run] = [(lr, first) for lr in self._lrs]
        if len(self.by_rate) < len(self._lrs):
            return runs
        return [*runs, *((self.best, seed) for seed in others)]

    def _beyond(self) -> float | None:
        """The rate next to the best one where that is the last at an end of the range, in the ratio of the last two."""
        lrs, scores = sorted(self._lrs), self.by_rate
        if len(lrs) < 2 or not math.isfinite(scores[self.best]):
            return None
        for last, before in ((lrs[0], lrs[1]), (lrs[-1], lrs[-2])):
            if self.best == last:
                return float(f"{last * last / before:.6g}")
        return None


def make_all(
    rows: Sequence[Row], run: Callable[[str, float, int | None], Result], jobs: int, completed: Callable[[], None]
) -> None:
    """Make all runs, `jobs` at a time; each time that of the first row which wants one.

    So an interruption leaves whole rows rather than one rate of each. `completed` is called after a row's last run. A
    run that fails ends its row; the others go on, and the first error is raised at the end.
    """
    changed, failed, state = Condition(), dict[str, Exception](), {"running": 0, "stopped": False}

    def begin() -> tuple[Row, Run] | None:
        """The next run, waited for where it depends on running ones; None at the end."""
        while not state["stopped"]:
            for row in rows:
                if row.name not in failed and (found := row.next()) is not None:
                    state["running"] += 1
                    return row, found
            if not state["running"]:
                return None
            changed.wait()
        return None

    def work() -> None:
        while True:
            with changed:
                if (begun := begin()) is None:
                    return
            row, one = begun
            result: Result | Exception
            try:
                result = run(row.name, *one)
            except Exception as error:
                result = error
            with changed:
                state["running"] -= 1
                if isinstance(result, Exception):
                    failed.setdefault(row.name, result)
                else:
                    row.results[one] = result
                    if row.is_complete:
                        completed()
                changed.notify_all()

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for future in [pool.submit(work) for _ in range(jobs)]:
                future.result()
        finally:  # an interruption begins no further run
            with changed:
                state["stopped"] = True
                changed.notify_all()
    if failed:
        raise next(iter(failed.values()))
