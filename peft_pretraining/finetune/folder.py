"""A run in its folder: one owner, one set of settings, one result.

A run is finished when its results and its final model are as its manifest says (checkpoints.py); given again, it is
said to be, and nothing happens. Given again with other settings it is refused. Otherwise it goes on from the newest
good checkpoint, and from the one before it where that cannot be loaded after all.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from transformers import TrainingArguments

from peft_pretraining.checkpoint import run_dir
from peft_pretraining.checkpoint.folder_lock import FolderInUse, FolderLock
from peft_pretraining.finetune import checkpoints
from peft_pretraining.finetune.checkpoints import CheckpointUnusable
from peft_pretraining.finetune.identity import (
    RUN_FILE,
    Settings,
    differences,
    read_settings,
    settings_of,
    write_settings,
)
from peft_pretraining.finetune.method_checkpointing import has_factors
from peft_pretraining.finetune.output import RESULTS_FILE, Results, print_results, read_results
from peft_pretraining.finetune.settings import FineTuning
from peft_pretraining.flags import ConfigError
from peft_pretraining.methods import load_method
from peft_pretraining.training.tracking import log

T = TypeVar("T")
RunOne = Callable[[FineTuning, str | None], Results]
"""A run from a checkpoint, or from its beginning."""
Described = Callable[[FineTuning], Results]
"""What a run's results say of its settings."""

_FINAL = ("*.safetensors", "*.safetensors.index.json", "config.json", RUN_FILE, RESULTS_FILE, "predict*")


def agree(training: TrainingArguments, decide: Callable[[], T]) -> T:
    """What `decide` returns on the main process, on all of them; a `ConfigError` of its is raised on all of them."""
    outcome: list[T | ConfigError] = []
    if training.process_index == 0:
        try:
            outcome.append(decide())
        except ConfigError as error:
            outcome.append(error)
    if training.world_size > 1:
        sent: list[Any] = outcome or [None]
        dist.broadcast_object_list(sent, src=0)
        outcome = sent
    if isinstance(outcome[0], ConfigError):
        raise outcome[0]
    return outcome[0]


@contextlib.contextmanager
def held(finetuning: FineTuning) -> Iterator[None]:
    """The output folder, for this run alone. A new folder that is still empty at the end is removed."""
    folder = finetuning.output_dir
    lock: FolderLock | None = None
    is_new = not folder.exists()

    def take() -> None:
        nonlocal lock
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FolderLock(folder).acquire()
        except FolderInUse as error:
            raise ConfigError([f"--output_dir {error}"]) from None
        except OSError as error:
            raise ConfigError([f"--output_dir {folder}: nothing can be written there ({error.strerror})"]) from None

    agree(finetuning.training, take)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()
            if is_new:
                with contextlib.suppress(OSError):
                    folder.rmdir()  # which fails if anything is in it


def run_in_folder(finetuning: FineTuning, run_one: RunOne, described: Described) -> Results:
    """`run_one` from the newest good checkpoint in the output folder, unless the run there is finished."""
    training, folder = finetuning.training, finetuning.output_dir
    settings = settings_of(finetuning) if training.process_index == 0 else {}
    with held(finetuning):
        done = agree(training, lambda: _finished(finetuning, folder, settings, described))
        if done is not None:
            if training.process_index == 0:
                print_results(done)
            return done
        without: set[Path] = set()
        while True:
            start = agree(training, lambda: _start(finetuning, folder, settings, without))
            try:
                results = run_one(finetuning, None if start is None else str(start))
            except CheckpointUnusable as error:
                if start is None:
                    raise  # nothing was loaded
                if _asked(finetuning) is not None:
                    raise ConfigError([f"--resume_from_checkpoint {start}: {error}"]) from error
                log.warning("skipped checkpoint %s: %s", start, error)
                without.add(start)
                continue
            if training.process_index == 0:
                checkpoints.seal(folder, [path.name for pattern in _FINAL for path in folder.glob(pattern)])
            return results


def begin(finetuning: FineTuning, start: str | None) -> None:
    """The first writing of a run that goes on from `start`: its settings. It is no longer finished, if it was."""
    if finetuning.training.process_index == 0:
        folder = finetuning.output_dir
        older = checkpoints.older_checkpoints(folder)
        done = checkpoints.update_of(Path(start)) if start is not None else 0
        older = {name for name in older if checkpoints.update_of(Path(name)) <= done}  # what follows is made again
        (folder / run_dir.MANIFEST_FILE).unlink(missing_ok=True)
        write_settings(folder, settings_of(finetuning), older)


def _finished(finetuning: FineTuning, folder: Path, settings: Settings, described: Described) -> Results | None:
    """The results of a run that is finished. Raises `ConfigError` where the folder holds a run with other settings."""
    if finetuning.overwrite_output_dir:
        _drop(folder)
        return None
    holds_something = (folder / RESULTS_FILE).exists() or bool(checkpoints.numbered(folder))
    if not holds_something:
        return None
    try:
        begun = read_settings(folder)
    except ConfigError as error:  # each checkpoint has its own copy, and is compared by it
        log.warning("%s", error)
        begun = None
    if begun is not None and (found := list(differences(begun, settings))):
        raise ConfigError([_other_settings(folder, found)])
    if not (folder / RESULTS_FILE).exists():
        return None
    old = checkpoints.before_manifests(folder)
    if not old and not checkpoints.is_sealed(folder):
        return None
    results = read_results(folder / RESULTS_FILE)
    reason = f"{RESULTS_FILE} cannot be read" if results is None else None if old else checkpoints.damage(folder)
    if results is None or reason is not None:
        log.warning("%s was finished, but %s: it is finished again", folder, reason)
        return None
    if "seeds" in results:
        raise ConfigError([f"--output_dir {folder} holds runs of several --seeds: choose another folder"])
    if old:
        now = described(finetuning)
        if found := [
            f"{name} {results[name]!r} instead of {value!r}"
            for name, value in now.items()
            if name in results and results[name] != value
        ]:
            raise ConfigError([_other_settings(folder, found)])
        log.warning("%s was written before settings were kept: what its results do not say is not compared", folder)
    log.info("%s is finished: nothing is done (--overwrite_output_dir starts over)", folder)
    return results


def _other_settings(folder: Path, found: list[str]) -> str:
    return (
        f"--output_dir {folder} holds a run that was begun with {', '.join(found)}: choose another folder, or "
        "start over with --overwrite_output_dir"
    )


def _drop(folder: Path) -> None:
    """Whatever makes a folder that of a run."""
    for _, path in checkpoints.numbered(folder):
        shutil.rmtree(path)
    for name in (RUN_FILE, run_dir.MANIFEST_FILE, RESULTS_FILE):
        (folder / name).unlink(missing_ok=True)


def _start(finetuning: FineTuning, folder: Path, settings: Settings, without: set[Path]) -> Path | None:
    """The checkpoint to go on from."""
    training = finetuning.training
    if not training.do_train:
        return None
    factors = has_factors(load_method(finetuning.config.method.method))
    if (asked := _asked(finetuning)) is not None:
        return checkpoints.named(Path(asked), settings, factors)
    if finetuning.overwrite_output_dir or str(training.resume_from_checkpoint).lower() == "false":
        return None
    found = checkpoints.newest_good(folder, settings, factors, training.load_best_model_at_end, without)
    if found is not None:
        log.info("going on from %s (--overwrite_output_dir starts over)", found)
    return found


def _asked(finetuning: FineTuning) -> str | None:
    """The checkpoint that `--resume_from_checkpoint` names."""
    name = finetuning.training.resume_from_checkpoint
    return None if name is None or str(name).lower() in ("true", "false") else str(name)
