"""What a run was begun with, which it keeps when it goes on. Nothing here imports torch."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from peft_pretraining.checkpoint import resume, run_dir, train_state
from peft_pretraining.config import Config

_SPEED = {
    **{"compile": "off", "fused_loss": "off", "lean_layers": "off", "projected_backward": "off"},
    "svd_method": "gram",
}
"""Settings that change how fast an update is and the last digits of what it computes -> what runs had before there were
these settings."""
_TASK = {"document_mask": False}
"""The same of what is learned."""


def keep(config: Config, given: Collection[str]) -> Config:
    """With the recorded values of such settings, where a run goes on and the command line does not name them."""
    earlier = _SPEED | _TASK
    for _, folder, is_of_run in folders(config):
        # What is wrong with the folder is said where it is checked.
        with contextlib.suppress(OSError, ValueError):
            settings, saved = settings_of(folder, is_of_run)
            if settings or saved:
                known = earlier.keys() & config.settings().keys() - set(given)
                return config.replace(**{name: settings.get(name, earlier[name]) for name in known})
    return config


def folders(config: Config) -> list[tuple[str, Path, bool]]:
    """Where a run may have been begun: flag and folder in words, the folder, and whether it is a run's, not a
    checkpoint's."""
    run, found = config.run, []
    if run.autoresume and run.save_dir:
        found.append((f"--save_dir {run.save_dir}", Path(run.save_dir), True))
    if run.resume_from:
        found.append((f"--resume_from {run.resume_from}", Path(run.resume_from), False))
    return found


def settings_of(folder: Path, is_of_run: bool) -> tuple[dict[str, Any], list[Path]]:
    """The settings of the run that a run's folder or a checkpoint belongs to, without any where none are recorded, and
    its checkpoints. Raises `ValueError` or `OSError` for what cannot be read."""
    if is_of_run:
        record, _ = resume.record_of_folder(folder)
        saved = [path for _, path in run_dir.completed_checkpoints(folder)]
    else:
        record, saved = resume.record_of(train_state.read_counters(folder)), [folder]
        if record is None:
            record, _ = resume.record_of_folder(folder.parent)
    return (dict(record.settings) if record is not None else {}), saved
