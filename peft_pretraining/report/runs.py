"""Reading the folders of runs: settings, updates, evaluations, and how far each run is. Free of torch.

A run may be going on, killed, resumed or from before some of the keys: what its folder does not say is None.
"""

from __future__ import annotations

import math
import os
import socket
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any

from peft_pretraining.checkpoint import folder_lock, metrics_file, run_dir
from peft_pretraining.flags import ConfigError
from peft_pretraining.optim.group_record import GroupRecord, read_groups

RUNNING, FINISHED, STOPPED = "running", "finished", "stopped"
_RECENT = 50  # updates whose time tells how long the rest will take


@dataclass(frozen=True)
class Evaluation:
    """One evaluation on the validation set."""

    step: int
    tokens: float | None
    seconds: float
    """Of all updates up to there."""
    loss: float | None
    """Nats per token; None where it was not finite."""
    perplexity: float | None


@dataclass(frozen=True)
class LoggedRun:
    """What one run's folder says.

    `updates` and `evaluations` are records of `metrics.jsonl`, each update and evaluation once: those that a resumed
    run has made again are its last ones.
    """

    folder: Path
    name: str
    settings: dict[str, Any]
    updates: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    groups: tuple[GroupRecord, ...] | None = None
    """What each parameter group got; None of a run from before that was recorded."""
    versions: dict[str, str] | None = None
    state: str = STOPPED
    """`RUNNING`, `FINISHED` or `STOPPED`."""
    restarts: int = 0
    """How often it has gone on after its first start, as far as its metrics tell."""

    @classmethod
    def read(cls, folder: Path, warnings: list[str]) -> LoggedRun:
        """Raises `ConfigError` when the folder is not that of a run.

        What of its metrics cannot be used is named in `warnings`. A run that has only begun has no metrics.
        """
        content = _read_config(folder)
        settings, versions = content["settings"], content.get("versions")
        records: list[dict[str, Any]] = []
        if os.path.lexists(metrics := folder / run_dir.METRICS_FILE):
            records, problems = metrics_file.read_records(metrics)
            warnings += problems
        updates, evaluations, restarts = _without_replays(records)
        return cls(
            folder=folder,
            name=folder.resolve().name,
            settings=settings,
            updates=updates,
            evaluations=evaluations,
            groups=read_groups(content.get("parameter_groups")),
            versions=versions if isinstance(versions, dict) else None,
            state=_state(folder, settings, updates),
            restarts=restarts,
        )

    @property
    def method(self) -> str:
        return self.settings["method"]

    @property
    def seed(self) -> Any:
        return self.settings.get("seed")

    @property
    def rate(self) -> float | None:
        """The peak rate of `--lr`."""
        return number(self.settings, "lr")

    @property
    def step(self) -> int:
        """Updates done."""
        return max((records[-1]["update_step"] for records in (self.updates, self.evaluations) if records), default=0)

    @property
    def steps(self) -> int | None:
        """Updates that it will have made."""
        return _steps(self.settings)

    @property
    def tokens(self) -> float | None:
        """Seen in training."""
        seen = (number(record, "tokens_seen") for record in (*self.updates[-1:], *self.evaluations[-1:]))
        return max((tokens for tokens in seen if tokens is not None), default=None)

    @property
    def seconds(self) -> float:
        """Of all updates; evaluations and checkpoints are not counted."""
        return sum(number(update, "step_time") or 0.0 for update in self.updates)

    @property
    def tokens_per_second(self) -> float | None:
        """The median over all updates."""
        return _median(self.updates, "throughput_tokens")

    @property
    def mfu(self) -> float | None:
        """The median over all updates, of GPUs whose peak is known."""
        return _median(self.updates, "mfu")

    @property
    def peak_memory(self) -> float | None:
        """Bytes: of tensors on a GPU, resident in all on a CPU."""
        return max(_numbers(self.updates, "peak_memory_bytes"), default=None)

    @property
    def state_bytes(self) -> float | None:
        """Of the optimizer's state, at the last evaluation."""
        return number(self.evaluations[-1], "optimizer_state_bytes") if self.evaluations else None

    @property
    def skipped(self) -> int:
        """Updates that were skipped."""
        return sum(bool(update.get("skipped")) for update in self.updates)

    @property
    def seconds_left(self) -> float | None:
        """Of a run that is going on, by its last updates; None where nobody knows."""
        recent = _numbers(self.updates[-_RECENT:], "step_time")
        if self.state != RUNNING or self.steps is None or not recent:
            return None
        return max(0, self.steps - self.step) * statistics.median(recent)

    @cached_property
    def evaluated(self) -> list[Evaluation]:
        """All evaluations, in their order."""
        times = accumulate(number(update, "step_time") or 0.0 for update in self.updates)
        seconds_at = dict(zip((update["update_step"] for update in self.updates), times, strict=True))
        steps, found, reached, position = list(seconds_at), [], 0.0, 0
        for record in self.evaluations:
            while position < len(steps) and steps[position] <= record["update_step"]:
                reached = seconds_at[steps[position]]
                position += 1
            loss, perplexity = number(record, "final_eval_loss"), number(record, "final_eval_perplexity")
            if perplexity is None and loss is not None and loss < 700:
                perplexity = math.exp(loss)
            tokens = number(record, "tokens_seen")
            found.append(Evaluation(record["update_step"], tokens, reached, loss, perplexity))
        return found


def number(record: dict[str, Any], name: str) -> float | None:
    """A finite number of a record; None where it has none: that of a run that diverged is `null`."""
    value = record.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    return value if abs(value) < 1e300 and math.isfinite(value) else None


def complete(records: Iterable[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The records that have a number of that name, and of the tokens seen."""
    return [record for record in records if None not in (number(record, name), number(record, "tokens_seen"))]


def smoothed(losses: Sequence[float], share: int = 50) -> list[float]:
    """The mean loss of the last few updates, one in `share` of all, up to each.

    >>> smoothed([4.0, 2.0])
    [4.0, 2.0]
    >>> smoothed([4.0, 2.0] * 50)[1:4]
    [3.0, 3.0, 3.0]
    """
    window = max(1, len(losses) // share)
    sums = [0.0, *accumulate(losses)]
    return [(sums[end] - sums[max(0, end - window)]) / min(window, end) for end in range(1, len(sums))]


def _read_config(folder: Path) -> dict[str, Any]:
    """The content of `config.yaml`, whose settings name a method. Raises `ConfigError` for any other."""
    try:
        content = run_dir.read_run_config(folder)
        if content is None:
            raise ConfigError([f"{folder} is not the folder of a run ({run_dir.CONFIG_FILE} is missing or empty)"])
    except OSError as error:
        raise ConfigError([f"{folder}: cannot be read ({error.strerror})"]) from None
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError([f"{folder / run_dir.CONFIG_FILE} cannot be used: {error}"]) from None
    settings = content.get("settings")
    if not isinstance(settings, dict) or not isinstance(settings.get("method"), str):
        raise ConfigError([f"{folder / run_dir.CONFIG_FILE} cannot be used: it names no method"])
    return {**content, "settings": {str(name): value for name, value in settings.items()}}


def _without_replays(
    records: Iterable[dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Updates and evaluations, and the number of restarts. Where a run has gone back to an earlier update, what it had
    logged after that is done again, and left out."""
    updates: list[dict[str, Any]] = []
    evaluations: list[dict[str, Any]] = []
    recorded = gone_back = 0
    for record in records:
        step = record["update_step"]
        if "loss" in record:
            if updates and step <= updates[-1]["update_step"]:
                gone_back += 1
                updates = _before(updates, step)
                evaluations = _before(evaluations, step)
            updates.append(record)
            recorded = max(recorded, int(number(record, "restarts") or 0))
        elif "final_eval_loss" in record:
            evaluations = _before(evaluations, step)
            evaluations.append(record)
    return updates, evaluations, max(recorded, gone_back)


def _before(records: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """Those of earlier updates; the list itself where that is all."""
    if not records or records[-1]["update_step"] < step:
        return records
    return list(takewhile(lambda record: record["update_step"] < step, records))


def _state(folder: Path, settings: dict[str, Any], updates: Sequence[dict[str, Any]]) -> str:
    steps = _steps(settings)
    if _is_held(folder):
        return RUNNING
    return FINISHED if steps is not None and updates and updates[-1]["update_step"] >= steps else STOPPED


def _is_held(folder: Path) -> bool:
    """Whether a process that lives, as far as one can see from here, has the folder."""
    try:
        touched = (folder / folder_lock.LOCK_FILE).stat().st_mtime
    except OSError:
        return False
    owner = folder_lock.read_owner(folder)
    if owner.host == socket.gethostname() and owner.pid is not None and os.path.isdir("/proc/self"):
        return folder_lock.process_start(owner.pid) is not None
    return time.time() - touched < folder_lock.LEASE


def _steps(settings: dict[str, Any]) -> int | None:
    steps = number(settings, "num_training_steps")
    return None if steps is None else int(steps + (number(settings, "num_extra_training_steps") or 0))


def _numbers(records: Iterable[dict[str, Any]], name: str) -> list[float]:
    return [value for record in records if (value := number(record, name)) is not None]


def _median(records: Iterable[dict[str, Any]], name: str) -> float | None:
    values = _numbers(records, name)
    return statistics.median(values) if values else None
