"""Runs that differ in their seed alone, together; and what tells those that are left apart. Free of torch."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from peft_pretraining.flags import one_line
from peft_pretraining.report.runs import Evaluation, LoggedRun, complete, number, smoothed

UNIMPORTANT = frozenset(
    [
        *("seed", "save_dir", "name", "tags", "comment", "wandb_project", "with_tracking", "tracker", "wandb_watch"),
        *("autoresume", "allow_restart", "allow_redecay", "resume_from", "progress_every", "sample_every"),
        *("sample_prompts", "log_layers", "older_eval_names", "step_timeout", "profile", "keep_checkpoints"),
        *("save_every", "async_save", "workers", "rewind_on_nan"),
    ]
)
"""Settings that make no other run of it: seed, place, name, and what is watched or kept on the way."""

_OTHER_RATES = ("adam_lr", "head_lr", "embed_lr", "norm_lr")
_MOST_POINTS = 240
"""Of a curve of training losses."""
_SMOOTHED_SHARE = 15
"""Training losses are averaged over 1/15 of a run: batches differ more than most runs do."""
_LONGEST_LABEL = 90
_USUAL = 0.6
"""A value that this share of the series have is the usual one, and not told of those."""


@dataclass(frozen=True)
class Point:
    """The runs of a series at one evaluation; low and high are the lowest and the highest of them."""

    tokens: float
    seconds: float
    perplexity: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Series:
    """Runs that differ in their seed alone."""

    runs: tuple[LoggedRun, ...]
    label: str = ""
    """The method, and the settings by which it differs from other series of the method."""
    differs: dict[str, Any] = field(default_factory=dict)
    """Settings in which it differs from others of its method, and those in which it is unusual among all."""

    @property
    def method(self) -> str:
        return self.runs[0].method

    @property
    def rate(self) -> float | None:
        return self.runs[0].rate

    @property
    def counted(self) -> tuple[LoggedRun, ...]:
        """The runs that means are of: those that have got as far as the furthest, by evaluations or else updates. A
        mean with the others would be one of different lengths."""
        reached = [run.evaluations[-1]["update_step"] if run.evaluations else -1 for run in self.runs]
        if max(reached) < 0:
            reached = [run.step for run in self.runs]
        return tuple(run for run, step in zip(self.runs, reached, strict=True) if step == max(reached))

    def final(self, run: LoggedRun) -> Evaluation | None:
        """The last evaluation of a run."""
        return run.evaluated[-1] if run.evaluated else None

    def final_perplexity(self) -> float | None:
        """The mean over the counted runs of that of their last evaluation; None where one is not finite."""
        return mean(final.perplexity for run in self.counted if (final := self.final(run)) is not None)

    def curve(self) -> list[Point]:
        """Validation perplexities, at the updates at which all counted runs have a finite one."""
        at = [
            {item.step: item for item in run.evaluated if item.perplexity is not None and item.tokens is not None}
            for run in self.counted
        ]
        points = []
        for step in sorted(set.intersection(*map(set, at))):
            items = [of_run[step] for of_run in at]
            values = [item.perplexity for item in items if item.perplexity is not None]
            seconds = statistics.fmean(item.seconds for item in items)
            tokens = max(item.tokens for item in items if item.tokens is not None)
            points.append(Point(tokens, seconds, statistics.fmean(values), min(values), max(values), len(values)))
        return points

    def training(self) -> list[tuple[float, float, float]]:
        """(tokens, seconds, loss) of training, averaged over the counted runs and the last few updates, thinned out."""
        rows = [_losses(run) for run in self.counted]
        steps = sorted(set.intersection(*map(set, rows)))
        losses = smoothed([statistics.fmean(row[step][2] for row in rows) for step in steps], _SMOOTHED_SHARE)
        tokens = [max(row[step][0] for row in rows) for step in steps]
        seconds = [statistics.fmean(row[step][1] for row in rows) for step in steps]
        kept = sorted({round(i * (len(steps) - 1) / (_MOST_POINTS - 1)) for i in range(_MOST_POINTS)}) if steps else []
        return [(tokens[i], seconds[i], losses[i]) for i in kept]


@dataclass(frozen=True)
class Sweep:
    """A method at several rates, all else equal."""

    label: str
    series: tuple[Series, ...]
    rates: tuple[float, ...]
    points: tuple[Point, ...]
    """At these rates: the last perplexity over the seeds that all rates have, or all seeds where they share none; NaN
    where one is not finite, or there is none."""


def grouped(runs: Sequence[LoggedRun]) -> list[Series]:
    """The runs, those that differ in their seed alone together. Runs that share the seed as well are kept apart: they
    are repetitions, whose mean would say that seeds matter less than they do."""
    together: defaultdict[tuple[Any, ...], list[LoggedRun]] = defaultdict(list)
    for run in runs:
        together[_key(run, UNIMPORTANT)].append(run)
    found = []
    for members in together.values():
        repeated = len({repr(run.seed) for run in members}) < len(members)
        found += [Series((run,)) for run in members] if repeated else [Series(tuple(members))]
    return _labelled(found)


def sweeps(series: Sequence[Series]) -> list[Sweep]:
    """Those that differ in `--lr` alone, where there are several; else in `--lr` and what is the same as it."""
    known = [one for one in series if one.rate is not None]
    found = []
    for tied in (False, True):
        together: defaultdict[tuple[Any, ...], list[Series]] = defaultdict(list)
        for one in known:
            together[_key(one.runs[0], UNIMPORTANT | {"lr"}, _tied(one.runs[0]) if tied else None)].append(one)
        for members in together.values():
            by_rate = {one.rate: one for one in sorted(members, key=lambda one: one.rate or 0.0)}
            if len(by_rate) > 1:
                points = _at_shared_seeds(list(by_rate.values()))
                rates = tuple(rate for rate in by_rate if rate is not None)
                found.append(Sweep(_shared_label(members), tuple(members), rates, points))
                known = [one for one in known if all(one is not member for member in members)]
    return found


def best_of_each(series: Sequence[Series]) -> list[Series]:
    """Of series that differ in `--lr` alone the one with the lowest last perplexity; all others."""
    left_out: set[int] = set()
    for sweep in sweeps(series):
        best = min(sweep.series, key=lambda one: one.final_perplexity() or float("inf"))
        left_out |= {id(one) for one in sweep.series if one is not best}
    return [one for one in series if id(one) not in left_out]


def mean(values: Iterable[float | None]) -> float | None:
    """None where one of them is None, as it is of a run that diverged, and where there are none."""
    all_of_them = list(values)
    known = [value for value in all_of_them if value is not None]
    return statistics.fmean(known) if known and len(known) == len(all_of_them) else None


def differing(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the important settings in which these differ, in their order in the first that has them."""
    names = dict.fromkeys(name for settings in runs for name in settings)
    return [
        name for name in names if name not in UNIMPORTANT and len({repr(settings.get(name)) for settings in runs}) > 1
    ]


def short(value: Any) -> str:
    """A setting in a label: 0.01, attn,mlp, — for none; of a path its last two folders.

    >>> [short(value) for value in (0.010, None, ["attn", "mlp"], "/data/c4/tokens")]
    ['0.01', '—', 'attn,mlp', 'c4/tokens']
    """
    if value is None:
        return "—"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ",".join(map(str, value))
    text = one_line(str(value))
    return "/".join(text.rstrip("/").split("/")[-2:]) if text.count("/") > 1 else text


def described(settings: dict[str, Any]) -> str:
    """Settings in one line.

    >>> described({"lr": 0.01, "rank": 8})
    'lr=0.01 rank=8'
    """
    return " ".join(f"{name}={short(value)}" for name, value in settings.items())


def shortened(text: str, longest: int) -> str:
    """Cut where it is longer than so many characters."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _labelled(series: Sequence[Series]) -> list[Series]:
    settings = [one.runs[0].settings for one in series]
    of_all = [name for name in differing(settings) if name != "method" and all(name in some for some in settings)]
    usual = {name: value for name in of_all if (value := _usual([some[name] for some in settings])) is not None}
    names, differences = [], []
    for one in series:
        own = differing([other.runs[0].settings for other in series if other.method == one.method])
        known = one.runs[0].settings
        unusual = [name for name in of_all if repr(known[name]) != usual.get(name)]
        differences.append({name: known.get(name) for name in dict.fromkeys([*own, *unusual])})
        names.append(" ".join([one_line(one.method), described({name: known.get(name) for name in own})]).strip())
    names = [shortened(name, _LONGEST_LABEL) for name in names]
    counts = Counter(names)
    # What no setting tells apart has its folder's name.
    named = [
        name if counts[name] == 1 else f"{name} ({', '.join(run.name for run in one.runs)})"
        for name, one in zip(names, series, strict=True)
    ]
    labelled = zip(series, named, differences, strict=True)
    return [Series(one.runs, name, differs) for one, name, differs in labelled]


def _usual(values: Sequence[Any]) -> str | None:
    value, count = Counter(map(repr, values)).most_common(1)[0]
    return value if count >= _USUAL * len(values) else None


def _key(run: LoggedRun, without: frozenset[str], instead: dict[str, Any] | None = None) -> tuple[Any, ...]:
    """What runs of one series share. Paths may have the seed in them, as a study's folders of warm-ups have."""
    seed = f"seed{run.seed}"
    values = {**run.settings, **(instead or {})}
    return tuple(
        (name, repr(value.replace(seed, "seed") if isinstance(value, str) else value))
        for name, value in sorted(values.items())
        if name not in without
    )


def _tied(run: LoggedRun) -> dict[str, Any]:
    rate = run.settings.get("lr")
    return {name: "lr" for name in _OTHER_RATES if name in run.settings and run.settings[name] == rate}


def _shared_label(members: Sequence[Series]) -> str:
    """The label without the rate."""
    return " ".join(word for word in members[0].label.split(" ") if not word.startswith("lr="))


def _at_shared_seeds(series: Sequence[Series]) -> tuple[Point, ...]:
    shared = set.intersection(*({repr(run.seed) for run in one.counted} for one in series))
    points = []
    for one in series:
        runs = [run for run in one.counted if not shared or repr(run.seed) in shared]
        finals = [final for run in runs if (final := one.final(run)) is not None]
        values = [math.nan if final.perplexity is None else final.perplexity for final in finals] or [math.nan]
        points.append(Point(0.0, 0.0, statistics.fmean(values), min(values), max(values), len(values)))
    return tuple(points)


def _losses(run: LoggedRun) -> dict[int, tuple[float, float, float]]:
    """Update -> tokens, seconds, loss, of those that were not skipped."""
    found, seconds = {}, 0.0
    usable = {id(record) for record in complete(run.updates, "loss") if not record.get("skipped")}
    for update in run.updates:
        seconds += number(update, "step_time") or 0.0
        if id(update) in usable:
            found[update["update_step"]] = (update["tokens_seen"], seconds, update["loss"])
    return found
