"""Writing `metrics.jsonl`, each update and each evaluation of a run once, and going on in one. No torch here.

Numbers that are not finite are written as null, which JSON has. A resumed run drops what it will do again. What cannot
be read does not stop it: such lines are put aside, into `metrics.damaged.jsonl`, and what is missing is said.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft_pretraining.checkpoint import run_dir
from peft_pretraining.checkpoint.metrics_file import LONGEST_LINE, Line, read_lines
from peft_pretraining.checkpoint.train_state import TrainState

log = logging.getLogger("peft_pretraining")

DAMAGED_FILE = "metrics.damaged.jsonl"
UNDONE_FILE = "metrics.undone.jsonl"
"""Records of updates that `--rewind_on_nan` has undone."""


def encode(values: dict[str, Any]) -> bytes:
    """One record as its line."""
    return json.dumps(_finite(values), allow_nan=False).encode() + b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass
class Sorted:
    """The lines of a file, by what becomes of them."""

    kept: list[bytes] = field(default_factory=list)
    later: list[bytes] = field(default_factory=list)
    """Of updates and evaluations after the state that the run goes on from."""
    damaged: list[Line] = field(default_factory=list)
    doubled: int = 0
    """Records that stood there more than once, in the same words."""
    updates: set[int] = field(default_factory=set)
    """Those that have a record, among the kept."""


def sort_lines(lines: Iterable[Line], state: TrainState) -> Sorted:
    """Which records belong to a run that goes on from `state`. A last line without an end was cut off by a crash, and
    is none."""
    found = Sorted()
    seen: dict[tuple[int, bool], bytes] = {}  # the first record of every update and evaluation
    for line in lines:
        record = line.record
        if record is not None and "loss" not in record and "final_eval_loss" not in record:
            line = replace(line, record=None, reason="is the record of no update and of no evaluation")
        if line.record is None or record is None:
            if line.raw.endswith(b"\n") or len(line.raw) > LONGEST_LINE:
                found.damaged.append(line)
            continue
        if not line.raw.endswith(b"\n"):
            continue
        step, evaluation = record["update_step"], "final_eval_loss" in record
        if step > (state.evaluated_step if evaluation else state.update_step):
            found.later.append(line.raw)
        elif (first := seen.setdefault((step, evaluation), line.raw)) is line.raw:
            found.kept.append(line.raw)
            if not evaluation:
                found.updates.add(step)
        elif first == line.raw:
            found.doubled += 1
        else:
            found.damaged.append(replace(line, record=None, reason=f"contradicts another record of update {step}"))
    return found


def forget_after(save_dir: Path, state: TrainState | None, first_update: int | None, keep_later: bool = False) -> None:
    """Leave of `metrics.jsonl` the records up to `state`, and say what is damaged or missing; None begins it anew.

    `first_update` is the number of updates that were done before the first record, None where nobody knows. With
    `keep_later` what comes after `state` is appended to `metrics.undone.jsonl`.
    """
    path = save_dir / run_dir.METRICS_FILE
    found = Sorted()
    if state is not None and path.exists():
        found = sort_lines(read_lines(path), state)
    if keep_later and found.later:
        with open(save_dir / UNDONE_FILE, "ab") as file:
            file.writelines(found.later)
    if state is not None:
        _say_what_is_wrong(path, found, state, first_update)
    if found.damaged:
        with open(save_dir / DAMAGED_FILE, "ab") as file:
            file.writelines(line.raw for line in found.damaged)
    if path.exists():
        run_dir.write_atomically(path, b"".join(found.kept).decode())


def restarts(path: Path) -> int:
    """How often a run has gone on with this file, the present time included: 0 where it has no records."""
    earlier = None
    if path.exists():
        for line in read_lines(path):
            if line.record is not None:
                number = line.record.get("restarts", 0)
                earlier = max(earlier or 0, number if type(number) is int else 0)
    return 0 if earlier is None else earlier + 1


def _say_what_is_wrong(path: Path, found: Sorted, state: TrainState, first_update: int | None) -> None:
    said = []
    if found.damaged:
        first = found.damaged[0]
        said.append(f"{len(found.damaged)} odd line(s) moved to {DAMAGED_FILE} (line {first.number} {first.reason})")
    if found.doubled:
        said.append(f"{found.doubled} records stood there more than once: kept once")
    begun = first_update if first_update is not None else min(found.updates, default=1) - 1
    if missing := _missing(found.updates, begun + 1, state.update_step):
        count, from_update, to_update = missing
        said.append(
            f"{count} of {state.update_step - begun} updates have no record (between {from_update} and {to_update})"
        )
    if said:
        log.warning("%s: %s", path, "; ".join(said))


def _missing(updates: set[int], first: int, last: int) -> tuple[int, int, int] | None:
    """How many of the updates from `first` to `last` are not in `updates`, the first of them and the last; or None.

    The bounds come from files and may be anything: nothing here grows with their distance.
    """
    present = sorted(step for step in updates if first <= step <= last)
    count = last - first + 1 - len(present)
    if count <= 0:
        return None
    for step in present:
        if step != first:
            break
        first += 1
    for step in reversed(present):
        if step != last:
            break
        last -= 1
    return count, first, last
