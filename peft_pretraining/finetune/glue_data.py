"""The rows of a GLUE task, from the hub or from CSV and JSON files, with labels as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from peft_pretraining.finetune.glue_settings import GlueSettings
from peft_pretraining.finetune.glue_tasks import GLUE_TASKS, GlueTask, accuracy, squared_error
from peft_pretraining.flags import ConfigError

HUB_NAME = "nyu-mll/glue"
LABEL = "label"

Splits = dict[str, Dataset]


def load_rows(settings: GlueSettings) -> tuple[GlueTask, Splits]:
    """The task, and its splits with the text columns and `label`: a class number or a score (float); -1 in test rows.

    Raises `ConfigError` for files without the columns, without rows, or with labels that the task does not have.
    """
    if settings.train_file or settings.validation_file or settings.test_file:
        splits = _read_files(settings)
    else:
        splits = _read_hub(settings.task_name)
    task = GLUE_TASKS[settings.task_name] if settings.task_name else None
    if settings.text_columns and task:
        task = replace(task, columns=settings.text_columns)
    label = settings.label_column or LABEL
    problems: list[str] = []
    if task is None:
        task = _infer_task(settings, splits, label, problems)
    for name, rows in splits.items() if task else ():
        splits[name] = _checked(rows, task, label, name, problems)
    if problems:
        raise ConfigError(problems)
    return task, {name: rows for name, rows in splits.items()}


def split_name(task_name: str | None, kind: str) -> str:
    """How a split is called: MNLI's are matched unless said otherwise."""
    return f"{kind}_matched" if task_name == "mnli" and kind != "train" else kind


def _read_files(settings: GlueSettings) -> Splits:
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
        kind, options = _format(file)
        try:
            splits[split] = load_dataset(kind, data_files=file, split="train", **options)
        except Exception as error:  # `datasets` wraps whatever its readers raise
            reason = str(error.__cause__ or error).splitlines()
            problems.append(f"{file}: cannot be read as {kind} ({reason[0] if reason else type(error).__name__})")
            continue
        if len(splits[split]) == 0:
            problems.append(f"{file}: it has no rows")
    if problems:
        raise ConfigError(problems)
    return splits


def _format(file: str) -> tuple[str, dict[str, Any]]:
    """Which reader of `datasets`, with which options. Text such as `NA` or `null` stays text."""
    suffix = Path(file).suffix.lower()
    if suffix in (".csv", ".tsv"):
        return "csv", {"keep_default_na": False, "sep": "," if suffix == ".csv" else "\t"}
    return "json", {}


def _read_hub(task_name: str | None) -> Splits:
    assert task_name is not None, "checked with the flags"
    try:
        return dict(load_dataset(HUB_NAME, task_name))
    except Exception as error:  # no network, no cache, a broken cache: each has an exception of its own
        reason = str(error).splitlines() or [type(error).__name__]
        raise ConfigError(
            [f"--task_name {task_name}: {HUB_NAME} cannot be loaded from the hub ({reason[0]}); local copies can be "
             "given with --train_file and --validation_file"]
        ) from None  # fmt: skip


def _infer_task(settings: GlueSettings, splits: Splits, label: str, problems: list[str]) -> GlueTask | None:
    """A task of one's own: scores if the labels are floats, otherwise the classes that the training rows have."""
    source = splits.get("train", next(iter(splits.values())))
    if label not in source.column_names:
        problems.append(f"{_file(settings, splits)}: no column {label!r}; there is {', '.join(source.column_names)}")
        return None
    texts = settings.text_columns or _text_columns(source, label)
    if not texts:
        problems.append(f"{_file(settings, splits)}: no column of text beside {label!r}: name it with --text_columns")
        return None
    if source.features[label].dtype in ("float32", "float64"):
        return GlueTask(texts, (), squared_error, "mse")
    labels = sorted(set(source[label]), key=lambda value: (str(type(value)), value))
    return GlueTask(texts, tuple(str(value) for value in labels), accuracy, "accuracy")


def _file(settings: GlueSettings, splits: Splits) -> str:
    return str(settings.train_file or settings.validation_file or settings.test_file)


def _text_columns(rows: Dataset, label: str) -> tuple[str, ...]:
    """`sentence1` and `sentence2` if they are there, otherwise the first two columns of strings."""
    texts = [name for name in rows.column_names if name != label and rows.features[name].dtype.endswith("string")]
    return ("sentence1", "sentence2") if {"sentence1", "sentence2"} <= set(texts) else tuple(texts[:2])


def _checked(rows: Dataset, task: GlueTask, label: str, split: str, problems: list[str]) -> Dataset:
    """The text columns as strings, and labels as numbers."""
    is_test = split.startswith("test")
    wanted = [*task.columns, *([] if is_test and label not in rows.column_names else [label])]
    if missing := [name for name in wanted if name not in rows.column_names]:
        there = ", ".join(rows.column_names)
        problems.append(f"{split} rows: no column {', '.join(map(repr, missing))}; there is {there}")
        return rows
    empty = [name for name in task.columns if any(value is None for value in rows[name])]
    if empty:
        problems.append(f"{split} rows: some have nothing in {', '.join(map(repr, empty))}")
        return rows
    if label in wanted and not is_test:
        labels = _numbers(rows[label], task, label, split, problems)
        if len(labels) < len(rows):
            return rows
    else:
        labels = [-1.0 if task.is_regression else -1] * len(rows)
    texts = {name: [str(value) for value in rows[name]] for name in task.columns}
    return Dataset.from_dict({**texts, LABEL: labels})


def _numbers(values: Sequence[Any], task: GlueTask, label: str, split: str, problems: list[str]) -> list[Any]:
    """Labels as class numbers or scores; those that the task does not have are a problem, and left out."""
    numbers, strange = [], {}
    by_name = {name: index for index, name in enumerate(task.labels)}
    if not any(name.isdigit() for name in task.labels):  # otherwise the names are numbers themselves
        by_name |= {str(index): index for index in range(len(task.labels))}
    for value in values:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if task.is_regression:
            try:
                numbers.append(float(value))
            except (TypeError, ValueError):
                strange[value] = None
        elif str(value) in by_name:
            numbers.append(by_name[str(value)])
        else:
            strange[value] = None
    if strange:
        shown = ", ".join(repr(value) for value in list(strange)[:5])
        known = "a number" if task.is_regression else f"one of {', '.join(task.labels)}, or its number from 0"
        problems.append(f"{split} rows: {label} {shown} is not {known}")
    return numbers
