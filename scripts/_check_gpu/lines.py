"""What the check says: one line for each thing that must hold."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

OK, FAILED, ABSENT = "ok", "FAILED", "not available"


@dataclass(frozen=True)
class Line:
    step: str
    what: str
    """What must hold."""
    seen: str
    limit: str
    """Empty where a number is only reported."""
    verdict: str
    """One of OK, FAILED, ABSENT."""
    seconds: float
    """Since the line before of the same step."""


class Lines:
    """Those of one step, written to a file as they come, so that a crash leaves what was seen before it."""

    def __init__(self, step: str, file: Path):
        self._step, self._file, self._last = step, file, time.monotonic()

    def holds(self, what: str, condition: bool, seen: str, limit: str = "") -> None:
        self._add(what, seen, limit, OK if condition else FAILED)

    def at_most(self, what: str, value: float, limit: float, unit: str = "") -> None:
        self._add(what, shown(value, unit), f"<= {shown(limit, unit)}", OK if value <= limit else FAILED)

    def at_least(self, what: str, value: float, limit: float, unit: str = "") -> None:
        self._add(what, shown(value, unit), f">= {shown(limit, unit)}", OK if value >= limit else FAILED)

    def reports(self, what: str, value: float, unit: str = "") -> None:
        """A number without a limit; it must be one."""
        self._add(what, shown(value, unit), "", OK if math.isfinite(value) else FAILED)

    def absent(self, what: str, why: str) -> None:
        self._add(what, why, "", ABSENT)

    def _add(self, what: str, seen: str, limit: str, verdict: str) -> None:
        now = time.monotonic()
        line = Line(self._step, what, seen, limit, verdict, round(now - self._last, 2))
        self._last = now
        with self._file.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(line)) + "\n")


def read(file: Path) -> list[Line]:
    """The lines of a step; none if it wrote none. A last line that was cut off is not one."""
    lines = []
    for text in file.read_text().splitlines() if file.exists() else ():
        try:
            lines.append(Line(**json.loads(text)))
        except ValueError:
            break
    return lines


def shown(value: float, unit: str = "") -> str:
    if value and math.isfinite(value) and abs(value) < 1e-3:
        text = f"{value:.1e}"
    elif float(value).is_integer():
        text = f"{value:,.0f}"
    else:
        text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{text} {unit}".rstrip()


def table(lines: Sequence[Line]) -> str:
    """Text for a terminal, and for Markdown."""
    head = ("step", "what must hold", "seen", "limit", "", "s")
    rows = [(each.step, each.what, each.seen, each.limit, each.verdict, f"{each.seconds:.1f}") for each in lines]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]

    def row(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([row(head), row("-" * width for width in widths), *map(row, rows)])
