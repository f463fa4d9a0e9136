"""Checks of a configuration against the folders of runs: its own, and that of a checkpoint to go on from. No torch."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from peft_pretraining.checkpoint import resume, resumed_metrics, run_dir, train_state
from peft_pretraining.config import Config
from peft_pretraining.config.precision_config import WEIGHT_BYTES
from peft_pretraining.config.validate import FileFacts, identity_of
from peft_pretraining.methods import METHODS
from peft_pretraining.models import model_config


def check_resume_from(config: Config, facts: FileFacts, problems: list[str], warnings: list[str]) -> None:
    folder = config.run.resume_from
    if folder is None:
        return
    if config.run.warmed_up_model:
        problems.append("--resume_from and --warmed_up_model contradict each other: give one of them")
    what = f"--resume_from {folder}"
    try:
        if not Path(folder).is_dir():
            problems.append(f"{what}: no such folder")
            return
        if not (Path(folder) / run_dir.STATE_FILE).is_file() or not (Path(folder) / run_dir.TENSORS_DIR).is_dir():
            problems.append(f"{what} is not a checkpoint of a run (for weights alone: --warmed_up_model)")
            return
        record = resume.record_of(train_state.read_counters(Path(folder)))
    except (OSError, ValueError) as error:
        if run_dir.damage(Path(folder)) is None:  # what is damaged is said later
            problems.append(f"{what}: {' '.join(str(error).split())}")
        return
    if config.method.method not in METHODS:
        return
    if record is not None:
        _compare_with(record, config, facts, what, problems, None)
    elif (Path(folder).parent / run_dir.CONFIG_FILE).exists():
        _check_same_run(config, facts, Path(folder).parent, what, problems, None)
    else:
        warnings.append(f"{what} does not say how it was trained (an older version wrote it): taken as this run's")


def check_save_dir(config: Config, facts: FileFacts, problems: list[str], warnings: list[str]) -> None:
    """The run's folder must be new, or hold the same run; and there must be room and permission to write."""
    folder = Path(config.run.save_dir or "checkpoints")
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(folder)  # unlike `exists`, it says what is wrong with a name
        if config.run.save_dir and os.path.lexists(folder):
            if not folder.is_dir():
                problems.append(f"--save_dir {folder} is not a folder")
                return
            _check_content(folder, config, facts, problems, warnings)
        elif config.run.autoresume and config.run.save_dir is None:
            problems.append("--autoresume True needs --save_dir")
        _check_writable(folder, config, facts, problems)
    except (OSError, ValueError) as error:  # no permission to read; a name that no file system takes
        problems.append(f"--save_dir {folder}: cannot be used ({getattr(error, 'strerror', None) or error})")


def _check_content(folder: Path, config: Config, facts: FileFacts, problems: list[str], warnings: list[str]) -> None:
    """What lies in the run's folder."""
    # Another process may hold it, or have died holding it: build.py finds out.
    if all(path.name.startswith(run_dir.LOCK_PREFIX) for path in folder.iterdir()):
        return
    if not config.run.autoresume:
        problems.append(
            f"--save_dir {folder} is not empty: pass --autoresume True to continue the run in it, or choose another "
            "folder"
        )
        return
    for name in (run_dir.CONFIG_FILE, run_dir.METRICS_FILE, run_dir.WANDB_RUN_FILE):
        if os.path.lexists(folder / name) and not (folder / name).is_file():
            problems.append(f"{folder / name} is not a file: move it away")
            return
    for path in (folder / resumed_metrics.DAMAGED_FILE, folder / resumed_metrics.UNDONE_FILE):
        # They are appended to: a link would lead out of the folder, and a pipe would wait for ever.
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
            problems.append(f"{path} is not a file, or is a link: move it away")
            return
    _check_same_run(config, facts, folder, f"--save_dir {folder} holds another run", problems, warnings)


def _check_same_run(
    config: Config, facts: FileFacts, folder: Path, what: str, problems: list[str], warnings: list[str] | None
) -> None:
    """Compare with the settings that the run in `folder` was begun with, if there was one."""
    try:
        record, _ = resume.record_of_folder(folder)
    except ValueError as error:
        problems.append(f"{folder / run_dir.CONFIG_FILE} cannot be read ({error})")
        return
    if record is not None:
        _compare_with(record, config, facts, what, problems, warnings)
    elif run_dir.completed_checkpoints(folder):
        problems.append(
            f"{folder / run_dir.CONFIG_FILE} is missing or empty, and no checkpoint beside it says how it was trained: "
            "put it back, or go on with --resume_from in another folder"
        )


def _compare_with(
    record: resume.RunRecord,
    config: Config,
    facts: FileFacts,
    what: str,
    problems: list[str],
    warnings: list[str] | None,
) -> None:
    """Problems for another identity; warnings, if a list is given, for other settings."""
    for difference in resume.differences(record, identity_of(config, facts)):
        problems.append(f"{what}: it was begun with {difference}")
    if warnings is None:
        return
    settings = config.settings()
    for name, old, new in run_dir.differences(record.settings, settings):
        if (
            name not in ("autoresume", "allow_restart", "allow_redecay")
            and name in record.settings
            and name in settings
        ):
            warnings.append(f"resuming with another --{name}: {new!r} instead of {old!r}"[:500])


def _check_writable(folder: Path, config: Config, facts: FileFacts, problems: list[str]) -> None:
    parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        # An unlinked file: tells the truth on read-only mounts and for root, where permission bits do not.
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        problems.append(f"--save_dir {folder}: no permission to write in {parent} ({error.strerror})")
        return
    if facts.model is not None:
        # Exported and training weights; the optimizer's state comes on top.
        needed = 2 * model_config.parameter_count(facts.model) * WEIGHT_BYTES[config.precision.precision]
        free = shutil.disk_usage(parent).free
        if free < needed:
            problems.append(
                f"--save_dir {folder}: no space, a checkpoint takes over {needed / 1e9:.1f} GB "
                f"and {free / 1e9:.1f} are free"
            )
