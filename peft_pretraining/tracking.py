"""Where the numbers of a run go: `metrics.jsonl`, wandb, the log."""

from __future__ import annotations

import json
import logging
import secrets
import sys
from pathlib import Path
from typing import Any

from torch import nn

from peft_pretraining import run_dir
from peft_pretraining.checkpoint import TrainState
from peft_pretraining.config import Config
from peft_pretraining.wandb_run import WandbRun

log = logging.getLogger("peft_pretraining")

_WANDB_RUN_FILE = "wandb_run.json"


def start_logging(is_main: bool) -> None:
    """Messages of the main process on stderr; of the others only errors."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.INFO if is_main else logging.ERROR)


class Tracker:
    """Writes one JSON object per record to `metrics.jsonl`, and the same to wandb. Only the main process has one that
    writes; the others' does nothing."""

    def __init__(self, save_dir: Path, config: Config, resumed: TrainState | None, model: nn.Module, enabled: bool):
        self._file = self._wandb = None
        self._pending = b""
        """What could not be written yet."""
        if not enabled:
            return
        path = save_dir / run_dir.METRICS_FILE
        _forget_after(path, resumed)
        self._file = open(path, "ab", buffering=0)  # a crash loses no finished record
        if config.tracking.with_tracking or config.tracking.wandb_project:
            self._wandb = WandbRun(_start_wandb(save_dir, config))
            if config.tracking.wandb_watch:
                self._wandb.watch(model)

    def record(self, **values: Any) -> None:
        """One record; `update_step` is the number of updates done."""
        if self._file is not None:
            self._write(json.dumps(values).encode() + b"\n")
        if self._wandb is not None:
            self._wandb.log(values)

    def _write(self, lines: bytes) -> None:
        """Append to the file. On a full disk everything is kept, in its order, and tried again with the next record."""
        late = bool(self._pending)
        self._pending += lines
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]  # which may take a part of it
        except OSError as error:
            if not late:
                log.error("%s: %s; records are kept until there is room", self._file.name, error.strerror)
        else:
            if late:
                log.info("%s: all records are written again", self._file.name)

    def close(self, exit_code: int) -> None:
        if self._file is not None:
            self._write(b"")
            if self._pending:
                log.error("%s: the last records are lost, %d bytes of them", self._file.name, len(self._pending))
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=exit_code)


def _forget_after(path: Path, resumed: TrainState | None) -> None:
    """Drop records of what a resumed run will do again, and a last line that a crash cut off.

    `resumed` is the state the run continues from; None starts afresh.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines() if resumed is not None else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        last = resumed.evaluated_step if "final_eval_loss" in record else resumed.update_step
        if record["update_step"] <= last:
            kept.append(line + "\n")
    run_dir.write_atomically(path, "".join(kept))


def _start_wandb(save_dir: Path, config: Config) -> Any:
    """Begin or continue the wandb run of this folder: its id is kept beside the metrics."""
    import wandb

    path = save_dir / _WANDB_RUN_FILE
    run_id = json.loads(path.read_text())["id"] if path.is_file() else secrets.token_hex(4)
    run_dir.write_atomically(path, json.dumps({"id": run_id}) + "\n")
    tracking = config.tracking
    run = wandb.init(
        project=tracking.wandb_project or "peft_pretraining",
        name=tracking.name or save_dir.name,
        tags=list(tracking.tags) or None,
        notes=tracking.comment,
        id=run_id,
        resume="allow",
        dir=str(save_dir),
        config=config.settings(),
    )
    # Our own counter is the x axis: after a resume wandb's would go on from where a crash left it.
    run.define_metric("update_step")
    run.define_metric("*", step_metric="update_step")
    return run
