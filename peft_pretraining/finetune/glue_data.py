"""The rows of a GLUE task, from the hub or from CSV and JSON files, with labels as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from datasets import Dataset, load_dataset

from peft_pretraining.finetune.glue_settings import GlueSettings
from peft_pretraining.finetune.glue_tasks import GLUE_TASKS, GlueTask
from peft_pretraining.finetune.labels import infer_task, is_number, numbers_of
from peft_pretraining.finetune.rows import Problems, Row, read_rows, show
from peft_pretraining.flags import ConfigError
from peft_pretraining.training.tracking import log

HUB_NAME = "nyu-mll/glue"
LABEL = "label"

_NAMES_OF_TEXT = {"text", *(name for task in GLUE_TASKS.values() for name in task.columns)}
"""Columns that are text even where all of it looks like numbers."""

Splits = dict[str, Dataset]


@dataclass
class _Split:
    origin: str
    """A file, or what the hub calls it."""
    rows: list[Row]

    @property
    def columns(self) -> list[str]:
        """Of all rows, in the order in which they first appear."""
        return list(dict.fromkeys(name for row in self.rows for name in row))


def load_rows(settings: GlueSettings) -> tuple[GlueTask, Splits]:
    """The task, and its splits with the text columns and `label`: a class number or a score (float); -1 in test rows.

    Raises `ConfigError`, with the rows' numbers, for files without the columns, without rows, or with texts or labels
    that the task does not have.
    """
    if settings.train_file or settings.validation_file or settings.test_file:
        splits = _read_files(settings)
    else:
        splits = _read_hub(settings.task_name)
    label = settings.label_column or LABEL
    task = GLUE_TASKS[settings.task_name] if settings.task_name else None
    inferred = Problems("")
    if task is None:
        source = splits.get("train", next(iter(splits.values())))
        inferred.origin = source.origin
        task = _infer_task(settings, source, label, inferred)
    elif settings.text_columns:
        task = replace(task, columns=settings.text_columns)
    if lines := inferred.lines():
        raise ConfigError(lines)
    found = {name: _checked(split, task, label, name, lines) for name, split in splits.items()}
    checked = {name: rows for name, rows in found.items() if rows is not None}
    if not lines and task.labels and "train" in checked and len(set(checked["train"][LABEL])) < 2:
        only = task.labels[checked["train"][LABEL][0]]
        lines.append(f"{splits['train'].origin}: every row has the {label} {only!r}: there is nothing to learn")
    if lines:
        raise ConfigError(lines)
    if settings.task_name is None:
        kind = "regression, for labels have fractions" if task.is_regression else f"{len(task.labels)} classes"
        log.info("text of %s; %s: %s", " and ".join(task.columns), label, kind)
    return task, checked


def split_name(task_name: str | None, kind: str) -> str:
    """How a split is called: MNLI's are matched unless said otherwise."""
    return f"{kind}_matched" if task_name == "mnli" and kind != "train" else kind


def _read_files(settings: GlueSettings) -> dict[str, _Split]:
    files = {
        "train": settings.train_file,
        split_name(settings.task_name, "validation"): settings.validation_file,
        "validation_mismatched": settings.validation_mismatched_file,
        split_name(settings.task_name, "test"): settings.test_file,
    }
    splits, problems = {}, []
    for split, file in files.items():
        if file is None:
            continue
        try:
            splits[split] = _Split(file, read_rows(file))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return splits


def _read_hub(task_name: str | None) -> dict[str, _Split]:
    assert task_name is not None, "checked with the flags"
    try:
        found = load_dataset(HUB_NAME, task_name)
        rows = {name: split.with_format("arrow")[:].to_pylist() for name, split in found.items()}
    except Exception as error:  # no network, no cache, a broken cache: each has an exception of its own
        reason = str(error).splitlines() or [type(error).__name__]
        raise ConfigError(
            [
                f"--task_name {task_name}: {HUB_NAME} cannot be loaded from the hub ({reason[0]}); local copies can be "
                "given with --train_file and --validation_file"
            ]
        ) from None
    return {name: _Split(f"{HUB_NAME} ({task_name}, {name})", split) for name, split in rows.items()}


def _infer_task(settings: GlueSettings, source: _Split, label: str, problems: Problems) -> GlueTask:
    """A task of one's own, from the training rows. Raises `ConfigError` where there is no label or no text."""
    if label not in source.columns:
        raise ConfigError([f"{source.origin}: no column {label!r}; there is {', '.join(source.columns)}"])
    found = settings.text_columns or _text_columns(source, label)
    if not found:
        raise ConfigError([f"{source.origin}: no column of text beside {label!r}: name it with --text_columns"])
    texts, unused = found[:2], found[2:]
    if unused:
        log.warning(
            "%s: the texts are in %s; %s is not used (--text_columns)",
            *(source.origin, " and ".join(map(repr, texts)), ", ".join(map(repr, unused))),
        )
    return infer_task(source.rows, texts, label, problems)


def _text_columns(source: _Split, label: str) -> tuple[str, ...]:
    """`sentence1` and `sentence2` if they are there, otherwise the columns that are not all numbers, in their order."""
    others = [name for name in source.columns if name != label]
    texts = [name for name in others if name in _NAMES_OF_TEXT or not _all_numbers(source.rows, name)]
    if not texts and len(others) == 1 and any(isinstance(row.get(others[0]), str) for row in source.rows):
        texts = others
    return ("sentence1", "sentence2") if {"sentence1", "sentence2"} <= set(texts) else tuple(texts)


def _all_numbers(rows: Sequence[Row], name: str) -> bool:
    """Whether a column, of an index perhaps, holds nothing but numbers, or nothing."""
    return all(_is_number_or_nothing(row.get(name)) for row in rows)


def _is_number_or_nothing(value: object) -> bool:
    if isinstance(value, str):
        return not value.strip() or is_number(value.strip())
    return value is None or isinstance(value, bool | int | float)


def _checked(split: _Split, task: GlueTask, label: str, name: str, lines: list[str]) -> Dataset | None:
    """The text columns, and labels as numbers. None, and more `lines`, where a row is not as it must be."""
    problems, columns = Problems(split.origin), split.columns
    is_test = name.startswith("test")
    missing = [wanted for wanted in (*task.columns, *([] if is_test else [label])) if wanted not in columns]
    if missing:
        lines.append(f"{split.origin}: no column {', '.join(map(repr, missing))}; there is {', '.join(columns)}")
        return None
    for number, row in enumerate(split.rows, start=1):
        if problem := _text_problem(row, task.columns):
            problems.add(number, problem)
    labels = [-1.0 if task.is_regression else -1] * len(split.rows)
    if not is_test:
        labels = numbers_of(split.rows, task, label, problems)
    if problems.by_reason:
        lines += problems.lines()
        return None
    texts = {column: [row[column] for row in split.rows] for column in task.columns}
    return Dataset.from_dict({**texts, LABEL: labels})


def _text_problem(row: Row, columns: tuple[str, ...]) -> str | None:
    for name in columns:
        if row.get(name) is None:
            return f"there is nothing in {name!r}"
        if not isinstance(row[name], str):
            return f"{name} is not text but {show(row[name])}"
    if not any(row[name].strip() for name in columns):
        return f"there is no text in {' or '.join(map(repr, columns))}"
    return None
