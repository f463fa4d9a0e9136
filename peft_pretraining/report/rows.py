"""The table of a report: one row for runs that differ in their seed alone, and one for each run; Markdown and CSV."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from peft_pretraining.flags import one_line
from peft_pretraining.report.grouping import Series, described, mean
from peft_pretraining.report.runs import LoggedRun

UNKNOWN = "—"
GIB = 2**30


@dataclass(frozen=True)
class Column:
    """One column: `text` of what is not a number, else how many digits follow the point."""

    key: str
    title: str
    digits: int | None = None
    about: str = ""
    averaged: bool = False
    """The mean and the standard deviation over seeds; else the largest of numbers, and the sum of counts."""


COLUMNS = (
    Column("name", "run"),
    Column("method", "method"),
    Column("differs", "differs in"),
    Column("state", "state", about="running, finished or stopped"),
    Column("updates", "updates", 0),
    Column("tokens", "tokens", 0, "seen in training"),
    Column("best loss", "best loss", 4, "lowest validation loss, nats per token", averaged=True),
    Column("best perplexity", "best perplexity", 2, "lowest validation perplexity", averaged=True),
    Column("final loss", "final loss", 4, "that of the last evaluation, nats per token", averaged=True),
    Column("final perplexity", "final perplexity", 2, "that of the last evaluation", averaged=True),
    Column("tokens/s", "tokens/s", 0, "median over updates", averaged=True),
    Column("mfu", "MFU (%)", 1, "model FLOPs over the device's peak, median over updates", averaged=True),
    Column("peak memory", "peak memory (GiB)", 2, "allocated on a GPU, resident on a CPU"),
    Column("state MB", "state (MB)", 2, "optimizer state, 10⁶ bytes"),
    Column("seconds", "time (s)", 0, "of all updates, without evaluations", averaged=True),
    Column("skipped", "skipped", 0, "updates that were skipped"),
    Column("restarts", "restarts", 0, "how often the run has gone on after its first start"),
    Column("rates", "rates", about="peak rate of each parameter group"),
)
_SUMMED = ("skipped", "restarts")
_EVALUATED = ("best loss", "best perplexity", "final loss", "final perplexity")


@dataclass(frozen=True)
class Cell:
    """What a cell says, and what it is sorted by; None of what the folder does not say."""

    value: float | str | None
    text: str


Row = dict[str, Cell]


def of_run(run: LoggedRun, series: Series) -> Row:
    """One run, of `series`."""
    numbers = _numbers(run)
    cells = {column.key: _number(column, numbers[column.key]) for column in COLUMNS if column.digits is not None}
    cells["updates"] = _updates([run])
    texts = {"name": run.name, "method": run.method, "differs": described(series.differs)}
    texts |= {"state": run.state, "rates": rates(run)}
    return cells | {key: Cell(text, text) for key, text in texts.items()}


def of_series(series: Series) -> Row:
    """Runs that differ in their seed alone, under the series' label; of a single one its own row."""
    if len(series.runs) == 1:
        return of_run(series.runs[0], series)
    all_numbers = [_numbers(run) for run in series.counted]
    cells = {}
    for column in COLUMNS:
        values = [numbers[column.key] for numbers in all_numbers] if column.digits is not None else []
        if column.averaged:
            cells[column.key] = _average(column, values)
        elif column.key in _SUMMED:
            cells[column.key] = _number(column, sum(_numbers(run)[column.key] or 0 for run in series.runs))
        elif column.digits is not None:
            cells[column.key] = _number(column, max((v for v in values if v is not None), default=None))
    cells["updates"] = _updates(series.counted)
    states = [run.state for run in series.runs]
    state = states[0] if len(set(states)) == 1 else ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    texts = {"name": f"{series.label} ({seeds(series)})", "method": series.method, "state": state}
    texts |= {"differs": described(series.differs), "rates": rates(series.runs[0])}
    return cells | {key: Cell(text, text) for key, text in texts.items()}


def seeds(series: Series) -> str:
    """How many runs a mean is of: "3 seeds", "2 of 3 seeds"."""
    counted, known = len(series.counted), len(series.runs)
    return f"{known} seeds" if counted == known else f"{counted} of {known} seeds"


def rates(run: LoggedRun) -> str:
    """The peak rate of each role's weights: "matrices 0.01, embedding, head, norms 0.005"."""
    if run.groups is None:
        return UNKNOWN if run.rate is None else f"lr {run.rate:g}"
    of_rate: dict[str, list[str]] = {}
    for group in sorted(
        run.groups, key=lambda group: "matrices" not in group.weights and "factors" not in group.weights
    ):
        of_rate.setdefault(f"{group.rate:g}", []).extend(group.weights)
    return ", ".join(f"{', '.join(dict.fromkeys(roles))} {rate}" for rate, roles in of_rate.items())


def markdown(series: Sequence[Series]) -> str:
    """The table with a row for each series, and where seeds were averaged one with each run."""
    parts = [_table([of_series(one) for one in series])]
    if any(len(one.runs) > 1 for one in series):
        single = [of_run(run, one) for one in series for run in one.runs]
        parts.append(f"## Every run\n\n{_table(single)}")
    return "\n\n".join(parts)


def as_csv(series: Sequence[Series]) -> str:
    """One line for each run: plain numbers, and empty where the folder does not say. `series` and `seed` say with which
    runs its numbers are averaged."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["run", "series", "seed", *(column.title for column in COLUMNS[1:])])
    for one in series:
        for run in one.runs:
            row = of_run(run, one)
            values = [row[column.key].value for column in COLUMNS[1:]]
            seed = "" if run.seed is None else run.seed
            writer.writerow(
                [run.name, one.label, seed, *("" if value in (None, UNKNOWN) else value for value in values)]
            )
    return file.getvalue()


def _numbers(run: LoggedRun) -> dict[str, float | None]:
    final = run.evaluated[-1] if run.evaluated else None
    losses = [item.loss for item in run.evaluated if item.loss is not None]
    perplexities = [item.perplexity for item in run.evaluated if item.perplexity is not None]
    return {
        "updates": run.step,
        "tokens": run.tokens,
        "best loss": min(losses, default=None),
        "best perplexity": min(perplexities, default=None),
        "final loss": None if final is None else final.loss,
        "final perplexity": None if final is None else final.perplexity,
        "tokens/s": run.tokens_per_second,
        "mfu": _scaled(run.mfu, 100),
        "peak memory": _scaled(run.peak_memory, 1 / GIB),
        "state MB": _scaled(run.state_bytes, 1e-6),
        "seconds": run.seconds if run.updates else None,
        "skipped": run.skipped,
        "restarts": run.restarts,
    }


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _number(column: Column, value: float | None) -> Cell:
    return Cell(value, UNKNOWN if value is None else f"{value:,.{column.digits}f}")


def _average(column: Column, values: Sequence[float | None]) -> Cell:
    """Of what was evaluated there is no mean where a run diverged; what a folder does not say is left out of others."""
    known = [value for value in values if value is not None]
    average = mean(values if column.key in _EVALUATED else known)
    if average is None:
        return Cell(None, f"{len(values) - len(known)} of {len(values)} not finite" if known else UNKNOWN)
    text = f"{average:,.{column.digits}f}"
    return Cell(average, f"{text} ± {statistics.stdev(known):,.{column.digits}f}" if len(known) > 1 else text)


def _updates(runs: Sequence[LoggedRun]) -> Cell:
    done, known = max(run.step for run in runs), [run.steps for run in runs if run.steps is not None]
    return Cell(done, f"{done:,} / {max(known):,}" if known and max(known) != done else f"{done:,}")


def _table(rows: Sequence[Row]) -> str:
    """As Markdown; columns of which no row has anything are left out."""
    shown = [column for column in COLUMNS if any(row[column.key].text not in ("", UNKNOWN) for row in rows)]
    lines = ["| " + " | ".join(column.title for column in shown) + " |"]
    lines.append("|" + "|".join(" :-- " if column.digits is None else " --: " for column in shown) + "|")
    lines += ["| " + " | ".join(escaped(row[column.key].text) for column in shown) + " |" for row in rows]
    return "\n".join(lines)


def escaped(text: str) -> str:
    r"""Text as Markdown shows it, whatever it holds.

    >>> print(escaped("a|b <i>*c*"))
    a\|b &lt;i>\*c\*
    """
    text = one_line(text).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    for character in "|*`[]":
        text = text.replace(character, f"\\{character}")
    return text
