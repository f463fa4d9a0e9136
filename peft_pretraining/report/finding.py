"""Finding runs: those that are named, and those below folders, such as a study's. Free of torch."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from peft_pretraining.checkpoint import run_dir
from peft_pretraining.flags import ConfigError, one_line
from peft_pretraining.report.runs import LoggedRun


def find(
    paths: Sequence[Path],
    warnings: list[str],
    read: Callable[[Path, list[str]], LoggedRun] = LoggedRun.read,
) -> list[LoggedRun]:
    """The runs in these folders: each is that of a run, or holds some at any depth. Their names are their places below
    the folder that they share.

    Raises `ConfigError` with a line for each folder that is neither. A run that is found below a folder and cannot be
    read is named in `warnings`, unless it is the only one.
    """
    found: dict[Path, LoggedRun] = {}
    problems: list[str] = []
    for path in paths:
        below = [] if os.path.exists(path / run_dir.CONFIG_FILE) else _runs_below(path, warnings)
        unread: list[str] = []
        before = len(found)
        for folder in below or [path]:
            try:
                found.setdefault(folder.resolve(), read(folder, warnings))
            except ConfigError as error:
                unread += error.problems
        (warnings if len(found) > before else problems).extend(unread)
    if problems:
        raise ConfigError(problems)
    return [dataclasses.replace(run, name=name) for run, name in zip(found.values(), _names(list(found)), strict=True)]


def _runs_below(path: Path, warnings: list[str]) -> list[Path]:
    """The folders below that hold a run's settings or metrics, by name. Those of checkpoints are passed over."""
    found = []
    seen: set[str] = set()

    def unreadable(error: OSError) -> None:
        warnings.append(f"{error.filename}: cannot be read ({error.strerror})")

    for folder, folders, files in os.walk(path, onerror=unreadable, followlinks=True):
        if (place := os.path.realpath(folder)) in seen:  # links may lead in a circle
            folders.clear()
            continue
        seen.add(place)
        if Path(folder) != path and {run_dir.CONFIG_FILE, run_dir.METRICS_FILE} & set(files):
            found.append(Path(folder))
        folders[:] = sorted(name for name in folders if not name.startswith((".", "model_")))
    return found


def _names(folders: Sequence[Path]) -> list[str]:
    """What tells the folders apart, which is their place below what they share."""
    if len(folders) < 2:
        return [one_line(folder.name) for folder in folders]
    shared = Path(os.path.commonpath(folders))
    return [one_line(folder.name if folder == shared else str(folder.relative_to(shared))) for folder in folders]
