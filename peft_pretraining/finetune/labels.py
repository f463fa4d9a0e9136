"""Labels of rows as class numbers or scores; what is neither is a problem of its row."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from peft_pretraining.finetune.glue_tasks import GlueTask, accuracy, squared_error
from peft_pretraining.finetune.rows import Problems, Row, show

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
_NOT_FINITE = re.compile(r"[+-]?(nan|inf(inity)?)", re.IGNORECASE)

Label = str | int | float | bool


def infer_task(rows: Sequence[Row], columns: tuple[str, ...], label: str, problems: Problems) -> GlueTask:
    """A task of one's own: regression if any label has a fraction (`0.5`, `3.0`), otherwise classes, sorted.

    With regression every label must be a finite number; where all labels are whole numbers, none may be nan or inf.
    """
    found = [(number, value) for number, value in enumerate(_labels(rows, label), start=1) if value is not None]
    numbers = [value for _, value in found if is_number(value)]
    if any(_has_fraction(value) for value in numbers):
        return GlueTask(columns, (), squared_error, "mse")
    if numbers and len(numbers) + sum(_is_not_finite(value) for _, value in found) == len(found):
        for number, value in found:
            if _is_not_finite(value):
                problems.add(number, f"{label} {show(value)} is not a finite number")
        found = [(number, value) for number, value in found if is_number(value)]
    names = sorted({_name(value) for _, value in found}, key=_order(numbers, found))
    return GlueTask(columns, tuple(names), accuracy, "accuracy")


def _order(numbers: Sequence[Label], found: Sequence[Any]) -> Callable[[str], Any]:
    """Whole numbers by value, everything else by spelling."""
    return (lambda name: (int(name), name)) if len(numbers) == len(found) else (lambda name: (0, name))


def _labels(rows: Iterable[Row], label: str) -> list[Label | None]:
    return [_cleaned(row.get(label)) for row in rows]


def _cleaned(value: Any) -> Label | None:
    """None of what is missing, or is no single value."""
    if isinstance(value, str):
        return value.strip() or None
    return value if isinstance(value, bool | int | float) else None


def is_number(value: Label) -> bool:
    """Whether a label is a finite number, or spells one."""
    if isinstance(value, str):
        return _NUMBER.fullmatch(value) is not None and _as_float(value) is not None
    return not isinstance(value, bool) and _as_float(value) is not None


def _as_float(value: Label) -> float | None:
    """None of what is no number, not finite, or beyond the range of a float."""
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _is_not_finite(value: Label) -> bool:
    if isinstance(value, str):
        return _NOT_FINITE.fullmatch(value) is not None
    return isinstance(value, float) and not math.isfinite(value)


def _has_fraction(value: Label) -> bool:
    return isinstance(value, float) or (isinstance(value, str) and not value.lstrip("+-").isdecimal())


def _name(value: Label) -> str:
    if isinstance(value, str):
        return value
    try:
        return str(value)
    except ValueError:  # a whole number of thousands of digits
        return hex(int(value))


def numbers_of(rows: Sequence[Row], task: GlueTask, label: str, problems: Problems) -> list[int | float]:
    """Labels as class numbers or scores. Those that the task does not have go to `problems`, and are left out."""
    by_name = {name: index for index, name in enumerate(task.labels)}
    if not any(is_number(name) for name in task.labels):  # otherwise the names are numbers themselves
        by_name |= {str(index): index for index in range(len(task.labels))}
    known = "a number" if task.is_regression else f"one of {_shown(task.labels)}, or its number from 0"
    found: list[int | float] = []
    for number, row in enumerate(rows, start=1):
        value = _cleaned(given := row.get(label))
        if value is None:
            missing = given is None or isinstance(given, str)
            problems.add(number, f"{label} is missing" if missing else f"{label} {show(given)} is not {known}")
        elif task.is_regression and is_number(value):
            found.append(float(value))
        elif not task.is_regression and (name := _known_name(value, by_name)) is not None:
            found.append(by_name[name])
        else:
            finite = "a finite number" if task.is_regression and _is_not_finite(value) else known
            problems.add(number, f"{label} {show(value)} is not {finite}")
    return found


def _known_name(value: Label, by_name: dict[str, int]) -> str | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return name if (name := _name(value)) in by_name else None


def _shown(labels: Sequence[str]) -> str:
    return ", ".join(labels) if len(labels) <= 10 else f"{', '.join(labels[:10])} and {len(labels) - 10} more"
