"""Where the numbers of a run go: `metrics.jsonl`, wandb, the log."""

from __future__ import annotations

import io
import json
import logging
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from peft_pretraining.checkpoint import resumed_metrics, run_dir
from peft_pretraining.checkpoint.failures import FolderLost
from peft_pretraining.checkpoint.folder_lock import FolderLock
from peft_pretraining.checkpoint.plain_files import regular
from peft_pretraining.checkpoint.train_state import TrainState
from peft_pretraining.config import Config
from peft_pretraining.training.wandb_run import WandbRun

log = logging.getLogger("peft_pretraining")


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

    def __init__(
        self,
        save_dir: Path,
        config: Config,
        resumed: TrainState | None,
        model: nn.Module,
        enabled: bool,
        first_update: int | None = None,
        lock: FolderLock | None = None,
        parameter_groups: Sequence[str] = (),
    ):
        """`resumed` is the state that the run goes on from; None begins `metrics.jsonl` anew, and `first_update` is
        the one at which it began (None: unknown). `lock` is watched: without it the folder is no longer this run's.
        `parameter_groups` goes to wandb, beside the settings."""
        self._file: io.FileIO | None = None
        self._wandb: WandbRun | None = None
        self._pending = b""
        """What could not be written yet."""
        if not enabled:
            return
        self._save_dir, self._path = save_dir, save_dir / run_dir.METRICS_FILE
        self._first_update, self._lock = first_update, lock
        resumed_metrics.forget_after(save_dir, resumed, first_update)
        self._open()
        if config.tracking.with_tracking or config.tracking.wandb_project:
            self._wandb = WandbRun(_start_wandb(save_dir, config, parameter_groups))
            if config.tracking.wandb_watch:
                self._wandb.watch(model)

    def _open(self) -> io.FileIO:
        self._file = open(self._path, "ab", buffering=0)  # a crash loses no finished record
        return self._file

    def record(self, **values: Any) -> None:
        """One record; `update_step` is the number of updates done. Raises `FolderLost`."""
        if self._file is not None:
            self._write(self._checked(self._file), resumed_metrics.encode(values))
        if self._wandb is not None:
            self._wandb.log(values)

    def go_back(self, state: TrainState) -> None:
        """The run has gone back to `state`: later records are put aside, into `metrics.undone.jsonl`."""
        if self._file is not None:
            self._write(self._file, b"")
            self._file.close()
            resumed_metrics.forget_after(self._save_dir, state, self._first_update, keep_later=True)
            self._open()

    def _checked(self, file: io.FileIO) -> io.FileIO:
        """The file to write to: one that has been removed could be written to as before, and it would be lost."""
        lost = self._lock is not None and self._lock.lost
        try:
            there = os.stat(self._path)
        except (FileNotFoundError, NotADirectoryError):
            there = None
        except OSError:  # a network file system that does not answer now
            return file
        if lost or (there is None and not self._save_dir.is_dir()):
            raise FolderLost(
                f"{self._save_dir} is no longer this run's folder: it was removed, or another process took it; what "
                "was not saved before is lost"
            )
        if there is not None and os.path.samestat(there, os.fstat(file.fileno())):
            return file
        log.warning("%s was removed or replaced: records are appended to what has that name now", self._path)
        file.close()
        return self._open()

    def _write(self, file: io.FileIO, lines: bytes) -> None:
        """Append to the file. On a full disk everything is kept, in its order, and tried again with the next record."""
        late = bool(self._pending)
        self._pending += lines
        try:
            while self._pending:
                self._pending = self._pending[file.write(self._pending) :]  # which may take a part of it
        except OSError as error:
            if not late:
                log.error("%s: %s; records are kept until there is room", file.name, error.strerror)
        else:
            if late:
                log.info("%s: all records are written again", file.name)

    def close(self, exit_code: int) -> None:
        if self._file is not None:
            self._write(self._file, b"")
            if self._pending:
                log.error("%s: the last records are lost, %d bytes of them", self._file.name, len(self._pending))
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=exit_code)


def _start_wandb(save_dir: Path, config: Config, parameter_groups: Sequence[str]) -> Any:
    """Begin or continue the wandb run of this folder: its id is kept beside the metrics.

    Without a key or a network it records offline, and says so; None where even that fails.
    """
    import wandb

    run_id, tracking = _wandb_run_id(save_dir / run_dir.WANDB_RUN_FILE), config.tracking
    settings: dict[str, Any] = {
        "project": tracking.wandb_project or "peft_pretraining",
        "name": tracking.name or save_dir.name,
        "tags": list(tracking.tags) or None,
        "notes": tracking.comment,
        "id": run_id,
        "resume": "allow",
        "dir": str(save_dir),
        "config": {**config.settings(), "parameter_groups": list(parameter_groups)},
    }
    try:
        run = wandb.init(**settings)
    except Exception as error:  # a missing key, a lost network, a refused project: the training needs none of them
        log.warning("wandb cannot be reached (%s); it records offline", _first_line(error))
        try:
            run = wandb.init(**settings, mode="offline")
        except Exception as second:
            log.warning("wandb does not record: %s", _first_line(second))
            return None
    # Our own counter is the x axis: after a resume wandb's would go on from where a crash left it.
    run.define_metric("update_step")
    run.define_metric("*", step_metric="update_step")
    return run


def _wandb_run_id(path: Path) -> str:
    """The one that is kept in a file, or a new one, which is written there."""
    try:
        kept = json.loads(regular(path).read_text())["id"]
        if isinstance(kept, str) and kept:
            return kept
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        log.warning("%s cannot be read (%s): wandb gets a new run", path, _first_line(error))
    run_id = secrets.token_hex(4)
    run_dir.write_atomically(path, json.dumps({"id": run_id}) + "\n")
    return run_id


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
