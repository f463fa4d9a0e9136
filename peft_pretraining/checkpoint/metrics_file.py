"""Reading `metrics.jsonl`: every line that is a record, and one line about all that are none.

A crash may cut the file anywhere, and a full disk or another program may leave anything in it; so nothing in it stops a
reader. Nothing here imports torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_pretraining.checkpoint.plain_files import regular

LONGEST_LINE = 1 << 20
"""Bytes; the records that a run writes have a few hundred."""
_NAMED_LINES = 5


@dataclass(frozen=True)
class Line:
    """One line of the file."""

    number: int
    """From 1."""
    raw: bytes
    """As it stands in the file, with its line break; of a line above `LONGEST_LINE` the beginning."""
    record: dict[str, Any] | None
    """None when the line is no record."""
    reason: str | None
    """Why it is none."""


def read_records(path: str | Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The file's records, in its order, and one line about what was passed over (an empty list if nothing was).

    A record is a JSON object with a whole number `update_step`. Numbers that are not finite, which are no JSON, but
    which older runs wrote, are None, as `null` is. A file that is missing or cannot be opened has no records, and one
    line saying so.
    """
    records, bad = [], []
    try:
        for line in read_lines(path):
            if line.record is not None:
                records.append(line.record)
            else:
                bad.append(line)
    except OSError as error:
        return records, [f"{path}: cannot be read ({error.strerror})"]
    return records, [_about(path, bad)] if bad else []


def read_lines(path: str | Path) -> Iterator[Line]:
    """Every line that is not blank. Raises `OSError` when the file cannot be read."""
    with open(regular(Path(path)), "rb") as file:
        number = 0
        while raw := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(raw) > LONGEST_LINE and not raw.endswith(b"\n"):
                while (rest := file.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                    pass
                yield Line(number, raw, None, "is longer than 1 MiB")
            elif raw.strip():
                yield _parse(number, raw)


def parse_record(raw: bytes) -> dict[str, Any]:
    """The record of one line. Raises `ValueError` with the reason why it is none."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    try:
        record = json.loads(text, parse_constant=lambda token: None, parse_float=_finite)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError:
        raise ValueError("is cut off or no JSON") from None
    if not isinstance(record, dict):
        raise ValueError("is no JSON object")
    step = record.get("update_step")
    if not isinstance(step, int) or isinstance(step, bool):
        raise ValueError("has no update_step")
    return record


def _parse(number: int, raw: bytes) -> Line:
    try:
        return Line(number, raw, parse_record(raw), None)
    except ValueError as error:
        return Line(number, raw, None, str(error))


def _finite(text: str) -> float | None:
    return value if math.isfinite(value := float(text)) else None


def _about(path: str | Path, bad: list[Line]) -> str:
    named = "; ".join(f"line {line.number} {line.reason}" for line in bad[:_NAMED_LINES])
    more = f"; and {len(bad) - _NAMED_LINES} more" if len(bad) > _NAMED_LINES else ""
    return f"{path}: passed over {len(bad)} line(s): {named}{more}"
