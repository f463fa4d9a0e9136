"""The checkpoints of fine-tuning: what makes one complete, and which one a run goes on from.

    output_dir/
      run.json              what the run was begun with (identity.py)
      checkpoint-N/         as transformers writes it, and besides
        method_state.json   the method's small numbers
        run.json            the same as the folder's
        manifest.json       size and SHA-256 of every file, written last: without it a checkpoint is not complete
      manifest.json         the same of the results and the final model: the run is finished

transformers writes a checkpoint in place, so it is sealed afterwards, and only then an older one is deleted. Folders
that were written before there were manifests are read as they are. Nothing here imports torch.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from peft_pretraining.checkpoint import run_dir
from peft_pretraining.checkpoint.plain_files import regular
from peft_pretraining.finetune.identity import RUN_FILE, Settings, differences, noted_as_older, read_settings
from peft_pretraining.flags import ConfigError

log = logging.getLogger("peft_pretraining")

PREFIX = "checkpoint-"
METHOD_STATE = "method_state.json"
TRAINING_WEIGHTS = "training_weights.safetensors"
TRAINER_STATE = "trainer_state.json"

_ESSENTIAL = (TRAINER_STATE, "optimizer.pt", "scheduler.pt", METHOD_STATE)
_START_OVER = "--overwrite_output_dir starts over"


class CheckpointUnusable(RuntimeError):
    """A checkpoint whose files are as they were written, or so it seemed, cannot be loaded all the same."""


def numbered(folder: Path) -> list[tuple[int, Path]]:
    """(update, folder) of every checkpoint in a run's folder, newest first; they may be damaged or incomplete."""
    found = []
    if folder.is_dir():
        for path in folder.iterdir():
            number = path.name.removeprefix(PREFIX)
            if path.name.startswith(PREFIX) and number.isdecimal() and path.is_dir():
                found.append((int(number), path))
    return sorted(found, reverse=True)


def update_of(checkpoint: Path) -> int:
    """How many updates were done, by a checkpoint's name; 0 for a folder of another name."""
    number = checkpoint.name.removeprefix(PREFIX)
    return int(number) if number.isdecimal() else 0


def seal(folder: Path, names: Iterable[str] | None = None) -> None:
    """Write the manifest of all files of a checkpoint, or of those named. What it lists is on disk afterwards."""
    files = {name: run_dir.file_digest(folder / name) for name in names or run_dir.checkpoint_files(folder)}
    run_dir.write_atomically(folder / run_dir.MANIFEST_FILE, json.dumps({"files": files}, indent=2) + "\n")
    run_dir.sync_folder(folder)


def is_sealed(folder: Path) -> bool:
    return (folder / run_dir.MANIFEST_FILE).is_file()


def before_manifests(folder: Path) -> bool:
    """Whether a run's folder was written before there were manifests: there is none, and no `run.json`."""
    parts = [folder, *(path for _, path in numbered(folder))]
    return not any(is_sealed(part) or (part / RUN_FILE).exists() for part in parts)


def older_checkpoints(folder: Path) -> set[str]:
    """Names of the checkpoints in a run's folder that were written before there were manifests."""
    if before_manifests(folder):
        return {path.name for _, path in numbered(folder)}
    return {path.name for _, path in numbered(folder) if not is_sealed(path)} & set(noted_as_older(folder))


def damage(folder: Path) -> str | None:
    """Why the files that a folder's manifest lists are not as they were written; None where they are."""
    return run_dir.damage(folder, lambda _folder, _files: None)  # what has to be there is told by `unusable`


def unusable(checkpoint: Path, has_factors: bool, sealed: bool = True) -> str | None:
    """Why nothing can go on from a checkpoint; None where every file is there and as it was written.

    sealed: without, the files are not compared with a manifest, as there is none.
    """
    if sealed and (reason := damage(checkpoint)) is not None:
        return reason
    names = set(run_dir.checkpoint_files(checkpoint))
    if sealed:
        names &= set(json.loads((checkpoint / run_dir.MANIFEST_FILE).read_text())["files"])
    wanted = {*_ESSENTIAL, *([TRAINING_WEIGHTS] if has_factors else []), *([RUN_FILE] if sealed else [])}
    if missing := sorted(wanted - names):
        return f"{missing[0]} is missing" + (" (--save_only_model)" if missing[0] == "optimizer.pt" else "")
    for kind, beginning in (("weights", "model"), ("random state", "rng_state")):
        if not any(name.startswith(beginning) for name in names):
            return f"it has no {kind}"
    state = trainer_state(checkpoint)
    if isinstance(state, str):
        return state
    if checkpoint.name.startswith(PREFIX) and checkpoint.name != f"{PREFIX}{state['global_step']}":
        return f"it is the state after update {state['global_step']}"
    return None


def trainer_state(checkpoint: Path) -> dict[str, Any] | str:
    """What transformers wrote of a run's progress, or why that cannot be read."""
    try:
        state = json.loads(regular(checkpoint / TRAINER_STATE).read_text())
        if isinstance(state, dict) and isinstance(state.get("global_step"), int):
            return state
        return f"{TRAINER_STATE} does not say how many updates are done"
    except (OSError, ValueError, RecursionError) as error:
        return f"{TRAINER_STATE} cannot be read ({' '.join(str(error).split())[:100]})"


def newest_good(
    folder: Path, settings: Settings, has_factors: bool, needs_best: bool, without: Collection[Path] = ()
) -> Path | None:
    """The newest checkpoint of the run in `folder` to go on from; None where it begins.

    needs_best: the checkpoint of the best model must be whole, too. without: what could not be loaded.
    Says in a line each why one is skipped. Raises `ConfigError` where there are complete ones, but none is good.
    """
    older = older_checkpoints(folder)
    skipped, damaged = [], False
    for _, path in numbered(folder):
        if path in without:
            damaged = True
            continue
        old = path.name in older
        if not old and not is_sealed(path):
            skipped.append(f"skipped checkpoint {path}: it was never completed ({run_dir.MANIFEST_FILE} is missing)")
        elif reason := _reason(path, settings, has_factors, needs_best, sealed=not old):
            # Before manifests, this file was what told a complete checkpoint.
            damaged = damaged or not (old and reason.startswith(f"{TRAINER_STATE} is missing"))
            skipped.append(f"skipped checkpoint {path}: {reason}")
        else:
            for line in skipped:
                log.warning(line)
            if old:
                log.warning("%s was written before there were manifests: its files cannot be checked", path)
            return path
    if damaged:
        raise ConfigError([*skipped, f"--output_dir {folder}: no checkpoint is good; {_START_OVER}"])
    for line in skipped:
        log.warning(line)
    return None


def _reason(path: Path, settings: Settings, has_factors: bool, needs_best: bool, sealed: bool) -> str | None:
    if reason := unusable(path, has_factors, sealed):
        return reason
    if sealed and (reason := another_run(path, settings)):
        return reason
    if not needs_best:
        return None
    state = trainer_state(path)
    best = state.get("best_global_step") if isinstance(state, dict) else None
    if not best:
        return None
    kept = path.parent / f"{PREFIX}{best}"
    reason = damage(kept) if sealed else (None if kept.is_dir() else "it is missing")
    return None if reason is None else f"the best model, {kept.name}: {reason}"


def another_run(folder: Path, settings: Settings) -> str | None:
    """`it was begun with ...` if a folder's `run.json` has other settings."""
    try:
        begun = read_settings(folder)
    except ConfigError:
        return f"{RUN_FILE} cannot be read"
    found = [] if begun is None else list(differences(begun, settings))
    return f"it was begun with {', '.join(found)}" if found else None


def named(checkpoint: Path, settings: Settings, has_factors: bool) -> Path:
    """The checkpoint of `--resume_from_checkpoint`. Raises `ConfigError` where nothing can go on from it."""
    flag = f"--resume_from_checkpoint {checkpoint}"
    if not checkpoint.is_dir():
        raise ConfigError([f"{flag}: no such folder"])
    sealed = is_sealed(checkpoint) or (checkpoint / RUN_FILE).exists()
    if reason := unusable(checkpoint, has_factors, sealed) or another_run(checkpoint, settings):
        raise ConfigError([f"{flag}: {reason}"])
    if not sealed:
        log.warning("%s was written before there were manifests: its files cannot be checked", checkpoint)
    return checkpoint


def keep_newest(folder: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond `limit`; only complete ones count, and the best one stays."""
    if limit is None or limit < 1:
        return
    complete = [path for _, path in numbered(folder) if is_sealed(path)]
    protected = {complete[0].name, *([Path(best).name] if best else [])} if complete else set()
    limit = max(limit, len(protected))
    for path in reversed(complete):
        if len(complete) <= limit:
            break
        if path.name not in protected:
            shutil.rmtree(path, ignore_errors=True)
            complete.remove(path)
