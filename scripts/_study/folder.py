"""What the studies share: one owner per folder, one set of settings, and results that may be cut off or missing.

A study's folder holds `study.json`, the settings it was begun with. A command with other settings is refused: its table
would mix runs that cannot be compared.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft_pretraining.checkpoint import run_dir
from peft_pretraining.checkpoint.folder_lock import FolderInUse, FolderLock
from peft_pretraining.flags import ConfigError

SETTINGS_FILE = "study.json"


class RunFailed(RuntimeError):
    """A run ended without the results that it should have left."""


@contextmanager
def opened(folder: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Hold the folder, made where there is none, for this study alone.

    settings: by name, what runs in the folder have in common. Names that only one of two commands has are no
        difference, so that methods can be added.

    Raises `ConfigError` when the folder cannot be used, somebody holds it, or it was begun with other settings.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(folder).acquire()
    except FolderInUse as error:
        raise ConfigError([f"--out {error}"]) from None
    except OSError as error:
        raise ConfigError([f"--out {folder}: cannot be used ({error.strerror})"]) from None
    with lock:
        begun_with = _read(folder / SETTINGS_FILE)
        now = json.loads(json.dumps(settings))
        differing = [name for name in begun_with if name in now and begun_with[name] != now[name]]
        if differing:
            raise ConfigError(
                [
                    f"--out {folder}: it was begun with {name} {_shown(begun_with[name])} instead of "
                    f"{_shown(now[name])}: choose another folder"
                    for name in differing
                ]
            )
        run_dir.write_atomically(folder / SETTINGS_FILE, json.dumps({**begun_with, **now}, indent=2) + "\n")
        yield


def _read(path: Path) -> dict[str, Any]:
    """Returns the settings of an earlier command; none where there was none."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError("it must hold a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError([f"{path} cannot be read ({error}): choose another --out, or remove the file"]) from None
    return found


def _shown(value: Any) -> str:
    return text if len(text := json.dumps(value)) <= 200 else text[:200] + "..."


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def distinct_numbers(text: str, flag: str, kind: type = float) -> tuple[Any, ...]:
    """Positive numbers between commas (whole ones of at least 0 for `kind` int). Raises `ConfigError` for others."""
    try:
        values = tuple(kind(item) for item in text.split(","))
    except ValueError:
        values = ()
    lowest_is_known = all(value >= 0 if kind is int else 0 < value < math.inf for value in values)
    if not values or not lowest_is_known or len(set(values)) < len(values):
        what = "whole numbers" if kind is int else "positive numbers"
        raise ConfigError([f"{flag} must be different {what} with commas between them, got {text!r}"])
    return values


def without_infinities(value: Any) -> Any:
    """The same with None for numbers that JSON does not have: of runs that diverged."""
    if isinstance(value, dict):
        return {key: without_infinities(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_infinities(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_results(folder: Path, results: Any, table: str | None = None) -> None:
    """Write OUT/results.json and OUT/table.md."""
    run_dir.write_atomically(folder / "results.json", json.dumps(without_infinities(results), indent=2) + "\n")
    if table is not None:
        run_dir.write_atomically(folder / "table.md", table + "\n")
