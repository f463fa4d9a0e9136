"""Where a run starts: from a checkpoint of its own, from one that was named, from saved weights, or from nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from peft_pretraining.checkpoint import resume, run_dir
from peft_pretraining.checkpoint.checkpointer import Checkpointer, NotRestored
from peft_pretraining.checkpoint.folder_lock import FolderInUse, FolderLock
from peft_pretraining.checkpoint.resume import Candidate, RunRecord
from peft_pretraining.checkpoint.train_state import NewerFormat, TrainState, starting_counters
from peft_pretraining.config import Config, schedule_problems
from peft_pretraining.config.schedule import decay_updates, has_begun_to_decay
from peft_pretraining.distributed import ProcessGroup
from peft_pretraining.flags import ConfigError
from peft_pretraining.optim.group_record import GroupRecord
from peft_pretraining.training.tracking import log


@dataclass
class StartingPoint:
    """Where weights and counters come from. The main process alone looks for checkpoints."""

    record: RunRecord
    """Of the run: its id is new, or that of the run in the folder."""
    warm_start: Path | None = None
    """Take weights and counters only."""
    from_checkpoint: bool = False
    """Restore everything from one of `found`."""
    in_own_folder: bool = False
    """They are checkpoints of the run itself."""
    found: Iterator[Candidate] = field(default_factory=lambda: iter(()), repr=False)
    """Good ones, newest first; only on the main process."""
    skipped: list[str] = field(default_factory=list)
    """One line for each that cannot be used; only on the main process."""
    of_other_settings: bool = False
    """Whether one of those skipped is whole, and only does not fit; only on the main process."""


def take_folder(save_dir: Path) -> FolderLock | ConfigError:
    """Take a run's folder for this process; a problem is returned, for all ranks to raise."""
    try:
        return FolderLock(save_dir).acquire()
    except FolderInUse as error:
        return ConfigError([f"--save_dir {error}"])
    except OSError as error:
        return ConfigError([f"--save_dir {save_dir}: cannot be taken for this run ({error.strerror or error})"])


def starting_point(config: Config, identity: dict[str, Any], save_dir: Path, group: ProcessGroup) -> StartingPoint:
    """Where the run starts, the same on all ranks; `found` and `skipped` are filled on the main process alone."""
    mine = find_start(config, identity, save_dir) if group.is_main else None
    shared = group.from_main(replace(mine, found=iter(()), skipped=[]) if isinstance(mine, StartingPoint) else mine)
    if isinstance(shared, ConfigError):
        raise shared
    assert shared is not None, "the main process found a start, or a problem"
    return mine if isinstance(mine, StartingPoint) else shared


def find_start(config: Config, identity: dict[str, Any], save_dir: Path) -> StartingPoint | ConfigError:
    """On the main process: which checkpoints to continue from. A problem is returned, for all ranks to raise."""
    run = config.run
    skipped: list[str] = []
    try:
        if run.autoresume:
            record, note = resume.record_of_folder(save_dir)
            found = _usable(resume.candidates(save_dir, record.id if record else None, identity), skipped)
            if (first := next(found, None)) is not None:
                if note:
                    log.warning(note)
                own = record or RunRecord()
                if own.id is None:  # an older version of this code began it, or nothing says which run it was
                    own = _record_of_checkpoint(first.folder) or replace(RunRecord.begin(), first_update=None)
                if problem := redecay_problem(config, first.folder):
                    return ConfigError([f"--save_dir {save_dir}: {problem}"])
                return StartingPoint(own, None, True, True, chain([first], found), skipped)
            if skipped and not run.allow_restart:
                return _nothing_left(save_dir, skipped)
    except (ValueError, OSError) as error:  # NewerFormat among them
        return ConfigError([f"--save_dir {save_dir}: {' '.join(str(error).split())}"])
    if run.resume_from:
        try:
            named = resume.examine(Path(run.resume_from), None, identity)
        except NewerFormat as error:
            return ConfigError([f"--resume_from {error}"])
        if named.problem:
            return ConfigError([f"--resume_from {named.folder}: {named.problem}"])
        if problem := redecay_problem(config, named.folder):
            return ConfigError([f"--resume_from {named.folder}: {problem}"])
        return StartingPoint(RunRecord.begin(), None, True, False, iter([named]), skipped)
    return StartingPoint(RunRecord.begin(), Path(run.warmed_up_model) if run.warmed_up_model else None)


_OF_DECAY = ("scheduler", "num_training_steps", "min_lr_ratio", "decay_shape")


def redecay_problem(config: Config, folder: Path) -> str | None:
    """Why a checkpoint must not go on with these settings: its rate had begun to fall, towards another end.

    Until then a wsd schedule does not depend on its length, and one stable run serves runs of several lengths.
    """
    counters = resume.read_counters(folder)
    record = resume.record_of(counters)
    if record is None or config.run.allow_redecay:
        return None
    begun, now, state = Config.from_settings(record.settings).schedule, config.schedule, resume.state_of(counters)
    old, new = (each.num_training_steps - state.schedule_start for each in (begun, now))
    done = state.update_step - state.schedule_start
    if not has_begun_to_decay(begun, old, done):
        return None
    same = all(getattr(begun, name) == getattr(now, name) for name in _OF_DECAY)
    if same and decay_updates(begun, old) == decay_updates(now, new):
        return None
    stable = begun.num_training_steps - decay_updates(begun, old) + 1
    return (
        f"its wsd schedule over {begun.num_training_steps} updates had begun to decay, and these settings have another "
        f"one: go on from a checkpoint of at most {stable} updates, or give --allow_redecay True"
    )


def _record_of_checkpoint(folder: Path) -> RunRecord | None:
    record = resume.record_of(resume.read_counters(folder))
    return record if record is not None and record.id is not None else None


def _nothing_left(save_dir: Path, skipped: list[str], of_other_settings: bool = False) -> ConfigError:
    what = "every checkpoint is damaged; --allow_restart True starts over"
    if of_other_settings:  # a good run lies there: it must not be started over
        what = "no checkpoint fits these settings: give those that it was begun with, or another --save_dir"
    return ConfigError([*skipped, f"--save_dir {save_dir}: {what}"])


def _usable(candidates: Iterator[Candidate], skipped: list[str]) -> Iterator[Candidate]:
    """Those without a problem; of the others a line is logged, and kept in `skipped`."""
    for candidate in candidates:
        if candidate.problem is None:
            yield candidate
        else:
            _skip(candidate.folder, candidate.problem, skipped)


def _skip(folder: Path, problem: str, skipped: list[str]) -> None:
    skipped.append(f"skipped checkpoint {folder}: {problem}")
    log.warning(skipped[-1])


def restore_first(start: StartingPoint, checkpointer: Checkpointer, group: ProcessGroup) -> TrainState | None:
    """Restore the first of the checkpoints found that can be loaded; None when there is none.

    All ranks call it, and come to the same one; the main process alone knows them, and keeps in `start` why others
    could not be loaded.
    """
    while True:
        candidate = group.from_main(_next(start.found) if group.is_main else None)
        if isinstance(candidate, ConfigError):
            raise candidate
        if candidate is None:
            return None
        if candidate.note:
            log.warning(candidate.note)
        log.info("resuming from %s", candidate.folder)
        try:
            return checkpointer.restore(candidate.folder)
        except NotRestored as error:
            if group.is_main:
                _skip(candidate.folder, str(error), start.skipped)
                start.of_other_settings |= error.undamaged


def _next(found: Iterator[Candidate]) -> Candidate | ConfigError | None:
    try:
        return next(found, None)
    except NewerFormat as error:
        return ConfigError([str(error)])


def restored_state(
    config: Config, start: StartingPoint, checkpointer: Checkpointer, group: ProcessGroup
) -> TrainState | None:
    """The counters that the run starts with, everything that belongs to them restored.

    None: no checkpoint can be loaded, and --allow_restart asks for a new start, for which the run must be built anew.
    """
    if not start.from_checkpoint:
        return TrainState() if start.warm_start is None else _warm_start(config, start.warm_start)
    state = restore_first(start, checkpointer, group)
    if state is None:
        fits_not = group.from_main(start.of_other_settings)
        if start.in_own_folder and config.run.allow_restart and not fits_not:
            return None
        problem = _nothing_left(checkpointer.save_dir, start.skipped, fits_not) if start.in_own_folder else None
        raise group.from_main(problem or ConfigError(_about_resume_from(start.skipped)))
    if group.is_main:
        checkpointer.retention.passed_over_since(state.update_step)
    return state


def _about_resume_from(skipped: list[str]) -> list[str]:
    return [line.replace("skipped checkpoint", "--resume_from", 1) for line in skipped]


def _warm_start(config: Config, folder: Path) -> TrainState:
    try:
        state = starting_counters(folder)
    except ValueError as error:
        raise ConfigError([f"--warmed_up_model {folder}: {error}"]) from error
    total = config.schedule.num_training_steps
    remaining = total - state.update_step
    if remaining <= 0:
        raise ConfigError(
            [f"--num_training_steps {total} ends before update {state.update_step} of --warmed_up_model {folder}"]
        )
    if problems := schedule_problems(config.schedule, remaining):
        raise ConfigError(problems)
    log.info("weights of %s; updates are counted from %d", folder, state.update_step)
    return state


def begin_writing(save_dir: Path, record: RunRecord, versions: dict[str, str], groups: Sequence[GroupRecord]) -> None:
    """The first writing of a run, which holds its folder: leftovers go, its settings are written, and what came of
    them for each parameter group."""
    run_dir.remove_leftovers(save_dir)
    recorded = [group.as_json() for group in groups]
    run_dir.write_run_config(save_dir, record.settings, record.identity, versions, record.head, recorded)
