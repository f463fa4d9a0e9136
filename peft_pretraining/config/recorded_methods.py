"""How a run that goes on computes its bases: as it began, whatever new runs do. Nothing here imports torch."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from peft_pretraining.checkpoint import resume, run_dir, train_state
from peft_pretraining.config import Config

BEFORE_RECORDED = {"svd_method": "gram", "stagger_refresh": None}
"""What is kept, and the value that runs had whose record does not name it."""


def keep(config: Config, given: Collection[str]) -> Config:
    """With the recorded values in place of those that are not given, where a run goes on. `given`: names of the flags
    of the command line."""
    wanted = [name for name in BEFORE_RECORDED if name not in given and hasattr(config.method, name)]
    recorded = _recorded(config) if wanted else None
    if recorded is None:
        return config
    kept = {name: recorded.get(name, BEFORE_RECORDED[name]) for name in wanted}
    return config.replace(**kept)


def _recorded(config: Config) -> dict[str, Any] | None:
    """The settings that a run was begun with which this one goes on from."""
    run = config.run
    # What is wrong with a folder is said where it is checked.
    if run.autoresume and run.save_dir:
        with contextlib.suppress(OSError, ValueError):
            folder = Path(run.save_dir)
            record, _ = resume.record_of_folder(folder)
            if record is not None:
                return record.settings
            if run_dir.completed_checkpoints(folder):  # of an older version, which recorded nothing
                return {}
    if run.resume_from:
        with contextlib.suppress(OSError, ValueError):
            folder = Path(run.resume_from)
            record = resume.record_of(train_state.read_counters(folder))
            if record is None:
                record, _ = resume.record_of_folder(folder.parent)
            return record.settings if record is not None else {}
    return None
