"""From rows of the hub or of local files to the examples for training, dev and test."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence

import torch

from peft_pretraining import rng
from peft_pretraining.data.json_rows import one_line
from peft_pretraining.finetune.options.settings import CONSECUTIVE, OptionSettings
from peft_pretraining.finetune.options.tasks import Example, OptionTask
from peft_pretraining.finetune.rows import Problems, Row, read_rows
from peft_pretraining.flags import ConfigError

log = logging.getLogger("peft_pretraining")

_HELD_OUT = 10  # one in so many, where no number is given
_TEST_SEED = 0  # the test examples are the same for every --train_set_seed

Groups = list[list[Example]]
"""Examples, divided into those that stay in one split."""


@dataclasses.dataclass(frozen=True)
class Splits:
    train: list[Example]
    """With `--trainer none`: the demonstrations."""
    dev: list[Example]
    test: list[Example]


def load_splits(task: OptionTask, settings: OptionSettings) -> Splits:
    """The examples that `settings` ask for. `ConfigError` with all problems of all files, one line each."""
    rows = _hub_rows(task) if not _files(settings) else _file_rows(settings)
    problems: list[str] = []
    parts = {name: _groups(task, settings, *found, problems) for name, found in rows.items()}
    if problems:
        raise ConfigError(problems)
    pool, dev, test = (parts.get(name) for name in ("train", "dev", "test"))
    seed, pool = settings.train_set_seed, pool or []
    if test is None and settings.data_file:
        test, pool = _draw(pool, settings.num_eval or _tenth(pool), _TEST_SEED, "--num_eval")
    elif test is not None:
        test, _ = _draw(test, settings.num_eval, _TEST_SEED, "--num_eval")
    if settings.trainer == "none":
        train, dev = _draw(pool, settings.num_train or 0, seed, "--num_train")[0], None
    else:
        if dev is not None:
            dev, _ = _draw(dev, settings.num_dev, seed, "--num_dev")
        else:
            dev, pool = _draw(pool, _dev_size(pool, settings), seed, "--num_dev")
        train, _ = _draw(pool, None if settings.train_all else settings.num_train, seed, "--num_train")
        if not train:
            raise ConfigError(
                [f"{settings.train_file or settings.data_file or task.hub[0]}: no rows left for training"]
            )
    splits = [[example for group in groups or [] for example in group] for groups in (train, dev, test)]
    if settings.shuffle_options:
        splits = [[shuffled(example, seed) for example in split] for split in splits]
    return Splits(*splits)


def shuffled(example: Example, seed: int) -> Example:
    """The example with its options in a random order, and its label with them."""
    generator = rng.generator(seed, "order of options", index=example.row)
    order = torch.randperm(len(example.choices), generator=generator).tolist()
    choices = tuple(example.choices[old] for old in order)
    return dataclasses.replace(example, choices=choices, label=order.index(example.label))


def _files(settings: OptionSettings) -> dict[str, str]:
    named = {"train": settings.data_file or settings.train_file, "dev": settings.validation_file}
    return {split: path for split, path in {**named, "test": settings.test_file}.items() if path}


def _file_rows(settings: OptionSettings) -> dict[str, tuple[str, list[Row]]]:
    """Name and rows of each split's file. `ConfigError` with all problems of all files."""
    found, problems = {}, []
    for split, path in _files(settings).items():
        try:
            found[split] = (path, read_rows(path))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return found


def _hub_rows(task: OptionTask) -> dict[str, tuple[str, list[Row]]]:
    """The hub's `train` split, and as the test its `validation`: the labels of the real tests are kept back."""
    import datasets
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # its warnings for every retry would bury the one line that counts
    name, configuration = task.hub
    found = {}
    for split, on_hub in (("train", "train"), ("test", "validation")):
        try:
            found[split] = (f"{name} ({configuration}, {on_hub})", list(datasets.load_dataset(*task.hub, split=on_hub)))
        except Exception as error:  # unknown name, missing configuration, no network: each with exceptions of its own
            raise ConfigError(
                [
                    f"--task_name {task.name}: {name} is not loadable from the hub ({one_line(error)}); "
                    "--train_file, --test_file or --data_file read local JSON lines"
                ]
            ) from error
    return found


def _groups(task: OptionTask, settings: OptionSettings, origin: str, rows: list[Row], problems: list[str]) -> Groups:
    """The examples of checked rows, divided as `--split_by` says; each kind of problem is one line."""
    wrong = Problems(origin, names_all=False)
    for number, row in enumerate(rows, start=1):
        if problem := task.row_problem(row):
            wrong.add(number, problem)
    if wrong.by_reason:
        problems += wrong.lines()
        return []
    examples = [task.example(row, number) for number, row in enumerate(rows)]
    if settings.split_by is None:
        return [[example] for example in examples]
    if settings.split_by == CONSECUTIVE:
        return _twins(task, origin, rows, examples, problems)
    return _by_column(settings.split_by, origin, rows, examples, problems)


def _twins(
    task: OptionTask, origin: str, rows: Sequence[Row], examples: Sequence[Example], problems: list[str]
) -> Groups:
    for first in range(0, len(rows), 2):
        pair = [tuple(row[name] for name in task.own_options) for row in rows[first : first + 2]]
        if len(pair) < 2 or pair[0] != pair[1]:
            what = "have different options" if len(pair) == 2 else "has no partner"
            where = f"rows {first + 1} and {first + 2}" if len(pair) == 2 else f"row {first + 1}"
            problems.append(f"{origin}: --split_by {CONSECUTIVE}: {where} {what}")
            return []
    return [list(examples[first : first + 2]) for first in range(0, len(rows), 2)]


def _by_column(
    column: str, origin: str, rows: Sequence[Row], examples: Iterable[Example], problems: list[str]
) -> Groups:
    groups: dict[str, list[Example]] = {}
    for row, example in zip(rows, examples, strict=True):
        if column not in row:
            problems.append(f"{origin}: --split_by {column}: no such column in row {example.row + 1}")
            return []
        groups.setdefault(str(row[column]), []).append(example)
    return list(groups.values())


def _size(groups: Groups) -> int:
    return sum(map(len, groups))


def _tenth(groups: Groups) -> int:
    return max(1, _size(groups) // _HELD_OUT)


def _dev_size(pool: Groups, settings: OptionSettings) -> int:
    if settings.train_all:
        return _tenth(pool)
    if settings.num_dev is not None:
        return settings.num_dev
    return max(1, min(settings.num_train or _size(pool), _size(pool)) // _HELD_OUT)


def _draw(groups: Groups, wanted: int | None, seed: int, flag: str) -> tuple[Groups, Groups]:
    """So many examples (None: all), and the others: whole groups in a random order, at least one if any is wanted."""
    order = torch.randperm(len(groups), generator=rng.generator(seed, f"examples for {flag}")).tolist()
    if wanted is None:
        return [groups[index] for index in order], []
    chosen: Groups = []
    rest: Groups = []
    size = 0
    for index in order:
        fits = size + len(groups[index]) <= wanted or (not chosen and wanted > 0)
        (chosen if fits else rest).append(groups[index])
        size += len(groups[index]) if fits else 0
    if size < wanted and not rest:
        log.warning("%s %d: only %d rows are left, all are used", flag, wanted, size)
    return chosen, rest
