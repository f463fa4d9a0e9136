"""Which checkpoint a run goes on from, and whether it is one of this run. Nothing here imports torch.

A run has an id, made when it begins, which stands in its `config.yaml` and in each of its checkpoints, beside the
settings and the identity that whoever goes on from them must share. So a checkpoint that was moved into the folder of
another run is noticed, and a lost `config.yaml` switches no check off.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft_pretraining.checkpoint import run_dir
from peft_pretraining.checkpoint.train_state import NewerFormat, read_counters, state_of


@dataclass(frozen=True)
class RunRecord:
    """What the checkpoints of a run say about it."""

    id: str | None = None
    """None in what older versions of this code wrote."""
    first_update: int | None = None
    """Updates that were done when this run's folder was begun: more than 0 with --resume_from or a warm start."""
    identity: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def begin(cls) -> RunRecord:
        """That of a new run, without its settings."""
        return cls(secrets.token_hex(8))

    @classmethod
    def of(cls, run: Any, identity: Any, settings: Any) -> RunRecord:
        """From the parts of a file. Raises `ValueError` when they are something else."""
        run = {} if run is None else run
        if not (isinstance(run, dict) and isinstance(identity, dict) and isinstance(settings, dict)):
            raise ValueError("settings, identity or run are no mappings")
        name, first = run.get("id"), run.get("first_update")
        if not (isinstance(name, str | None) and (first is None or type(first) is int)):
            raise ValueError("the run has no id")
        return cls(name, first, identity, settings)

    def as_json(self) -> dict[str, Any]:
        return run_dir.plain(asdict(self))

    @property
    def head(self) -> dict[str, Any]:
        """What `config.yaml` has beside settings and identity."""
        return {"id": self.id, "first_update": self.first_update}


def record_of(counters: dict[str, Any]) -> RunRecord | None:
    """Returns what a checkpoint says of its run; None for an older one, which says nothing. Raises `ValueError`."""
    run = counters.get("run")
    if run is None:
        return None
    try:
        return RunRecord.of(run, run["identity"], run["settings"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{run_dir.STATE_FILE} does not say which run it belongs to ({error})") from error


def record_in_config(folder: Path) -> RunRecord | None:
    """Returns what `config.yaml` of a run's folder says; None where there is none, or it is empty.

    Raises `ValueError`, one line without the file's name, for anything else.
    """
    try:
        content = run_dir.read_run_config(folder)
        return None if content is None else RunRecord.of(content.get("run"), content["identity"], content["settings"])
    except Exception as error:  # YAML's errors share no base with OSError; whatever it is, the file is unusable
        raise ValueError(" ".join(str(error).split())) from error


def record_of_folder(folder: Path) -> tuple[RunRecord | None, str | None]:
    """Returns what is known of the run in a folder, and a line where that is not what `config.yaml` should say.

    None for the record: neither `config.yaml` nor a checkpoint says anything. Raises `ValueError` for a `config.yaml`
    that cannot be read.
    """
    if (record := record_in_config(folder)) is not None:
        return record, None
    config = folder / run_dir.CONFIG_FILE
    for _, checkpoint in run_dir.completed_checkpoints(folder):
        try:
            found = record_of(read_counters(checkpoint))
        except ValueError:
            continue
        if found is not None:
            lost = "is empty" if config.exists() else "is missing"
            return found, f"{config} {lost}: the run's settings are taken from {checkpoint.name}"
    return None, None


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that a run might go on from."""

    folder: Path
    problem: str | None = None
    """Why it must not."""
    note: str | None = None
    """What is to be said when it is taken."""
    foreign: bool = False
    """Whether it is another run's."""

    @property
    def step(self) -> int:
        """The update in its name, if that is one of a run's checkpoint."""
        return int(self.folder.name.rpartition("_")[2])


def candidates(save_dir: Path, run_id: str | None, identity: dict[str, Any]) -> Iterator[Candidate]:
    """Every checkpoint of a run's folder, newest first, examined when it is asked for.

    `run_id` None: whatever run the newest good one belongs to. Raises `NewerFormat` for one that only newer code reads:
    going on from the one before would write over what that code did.
    """
    for step, folder in run_dir.completed_checkpoints(save_dir):
        found = examine(folder, run_id, identity, step)
        if found.problem is None and run_id is None:
            record = record_of(read_counters(folder))
            run_id = record.id if record else None
        yield found


def examine(
    folder: Path, run_id: str | None = None, identity: dict[str, Any] | None = None, step: int | None = None
) -> Candidate:
    """Whether a checkpoint is undamaged, and one of this run; `step` is the update in its name.

    Raises `NewerFormat`.
    """
    if (reason := run_dir.damage(folder)) is not None:
        return Candidate(folder, reason)
    try:
        counters = read_counters(folder)
        state, record = state_of(counters), record_of(counters)
    except NewerFormat as error:
        raise NewerFormat(f"{folder}: {error}") from error
    except ValueError as error:
        return Candidate(folder, str(error))
    if step is not None and state.update_step != step:
        return Candidate(folder, f"it holds update {state.update_step}, whatever its name says")
    if record is None or record.id is None:
        return Candidate(folder, note=f"{folder} has no run id (an older version wrote it): taken as one of this run")
    if run_id is not None and record.id != run_id:
        reason = f"it belongs to another run (id {record.id[:40]} instead of {run_id[:40]})"
        return Candidate(folder, reason, foreign=True)
    if identity is not None and (differing := differences(record, identity)):
        return Candidate(folder, f"it was trained with {differing[0]}")
    return Candidate(folder)


def differences(record: RunRecord, identity: dict[str, Any]) -> list[str]:
    """What of a run's identity is another now, described.

    What the identity did not hold yet when the run was begun is looked up in the run's settings; what it no longer
    holds is nothing that the method reads.
    """
    begun = {name: record.settings[name] for name in identity if name in record.settings} | record.identity
    known = {name: value for name, value in identity.items() if name in begun}
    shown = {"model": "another model", "data": "other data"}
    return [
        shown.get(name, f"{name} {_short(old)} instead of {_short(new)}")
        for name, old, new in run_dir.differences({name: begun[name] for name in known}, known)
    ]


def _short(value: Any) -> str:
    return repr(value)[:200]
