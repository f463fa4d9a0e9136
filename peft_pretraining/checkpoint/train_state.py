"""The counters of a run, and `training_state.json`, in which a checkpoint has them. Nothing here imports torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from peft_pretraining.checkpoint import run_dir
from peft_pretraining.checkpoint.plain_files import regular

FORMAT = 1
"""Of the checkpoints that are written here. Those without a number came before it, and are read all the same."""

_LARGEST_FILE = 2**26
"""Bytes of a `training_state.json`; usually a few thousand."""


class NewerFormat(ValueError):
    """A checkpoint of a later version of this code, which may hold what this one would silently leave out."""


@dataclass
class TrainState:
    """Everything that changes from update to update and is not a tensor."""

    update_step: int = 0
    """Updates done, skipped ones included."""
    tokens_seen: int = 0
    """Tokens read for training, over all ranks; those of updates that were undone do not count."""
    data_position: int = 0
    """Samples taken from the stream."""
    data_state: dict[str, Any] = field(default_factory=dict)
    """What the data needs besides to be read on there: small numbers, as JSON has them."""
    skipped_updates: int = 0
    schedule_start: int = 0
    """Update at which the schedule began: that of the checkpoint behind a warm start, otherwise 0."""
    evaluated_step: int = -1
    """Last update that was evaluated."""
    skipped_spikes: int = 0
    """Updates skipped for a spike; `skipped_updates` are those that were not finite."""
    spikes_in_a_row: int = 0
    """Of these, how many came just before."""
    spike_statistics: dict[str, Any] = field(default_factory=dict)
    """Running statistics of `spikes.observe`."""
    nonfinite_in_a_row: int = 0
    """Of the skipped updates, how many came just before."""
    empty_updates: int = 0
    """Updates whose batches held no token to predict."""
    rewinds: list[dict[str, int]] = field(default_factory=list)
    """Each time that the run went back by itself: from which update, to which, and the samples that it skipped."""

    def restore(self, other: TrainState) -> None:
        """Take over another state's counters."""
        for name, value in vars(other).items():
            setattr(self, name, value)


def write_counters(folder: Path, state: TrainState, more: dict[str, Any]) -> None:
    """Write `training_state.json` of a checkpoint: format, counters, and what belongs to method and run."""
    content = {"format": FORMAT, **asdict(state), **more}
    (folder / run_dir.STATE_FILE).write_text(json.dumps(content, indent=2) + "\n")


def read_counters(folder: Path) -> dict[str, Any]:
    """Returns `training_state.json` of a checkpoint.

    Raises `ValueError`, one line with the reason, when it cannot be used; `NewerFormat` when only newer code can.
    """
    path = folder / run_dir.STATE_FILE
    try:
        if regular(path).stat().st_size > _LARGEST_FILE:
            raise ValueError(f"it has more than {_LARGEST_FILE} bytes")
        counters = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{run_dir.STATE_FILE} cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(counters, dict):
        raise ValueError(f"{run_dir.STATE_FILE} holds no JSON object")
    number = counters.get("format", 0)
    if type(number) is not int:
        raise ValueError(f"{run_dir.STATE_FILE} has the format {number!r}"[:200])
    if number > FORMAT:
        raise NewerFormat(
            f"it was written by a newer version of this code (checkpoint format {number}; this version reads up to "
            f"{FORMAT}): update the code"
        )
    return counters


def state_of(counters: dict[str, Any]) -> TrainState:
    """Returns the counters as an object; an older run has fewer. Raises `ValueError` for one of another type."""
    state = TrainState()
    for item in fields(TrainState):
        if item.name not in counters:
            continue
        value, kind = counters[item.name], type(getattr(state, item.name))
        if type(value) is not kind or (kind is int and not -1 <= value < 2**63):
            raise ValueError(f"{run_dir.STATE_FILE}: {item.name} is {value!r}"[:200])
        setattr(state, item.name, value)
    for name, numbers in state.spike_statistics.items():
        if not (isinstance(numbers, list) and len(numbers) == 3 and all(type(n) in (int, float) for n in numbers)):
            raise ValueError(f"{run_dir.STATE_FILE}: spike_statistics of {name} are {numbers!r}"[:200])
    return state


def starting_counters(folder: Path) -> TrainState:
    """Returns the counters of a warm start: updates and tokens go on, everything else begins afresh.

    Raises `ValueError` as `read_counters` and `state_of` do.
    """
    counters = read_counters(folder) if (folder / run_dir.STATE_FILE).is_file() else {}
    # Older code bases write the first two names alone.
    names = ("update_step", "tokens_seen", "data_position", "data_state")
    state = state_of({name: counters[name] for name in names if name in counters})
    state.schedule_start = state.update_step
    return state
