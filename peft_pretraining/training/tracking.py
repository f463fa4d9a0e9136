"""Where the numbers of a run go: `metrics.jsonl`, dashboards, the log."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from peft_pretraining.checkpoint import resumed_metrics, run_dir
from peft_pretraining.checkpoint.failures import FolderLost
from peft_pretraining.checkpoint.folder_lock import FolderLock
from peft_pretraining.checkpoint.train_state import TrainState
from peft_pretraining.config import Config
from peft_pretraining.training.dashboard import Dashboard, named
from peft_pretraining.training.samples import Sample
from peft_pretraining.training.tensorboard_run import TensorBoardRun
from peft_pretraining.training.wandb_run import start_wandb

log = logging.getLogger("peft_pretraining")


def start_logging(is_main: bool) -> None:
    """Messages of the main process on stderr; of the others only errors."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.INFO if is_main else logging.ERROR)


class Tracker:
    """Writes one JSON object per record to `metrics.jsonl`, and the same to dashboards. Only the main process has one
    that writes; the others' does nothing."""

    def __init__(
        self,
        save_dir: Path,
        config: Config,
        resumed: TrainState | None,
        model: nn.Module,
        enabled: bool,
        first_update: int | None = None,
        lock: FolderLock | None = None,
        more: Mapping[str, Any] | None = None,
    ):
        """`resumed` is the state that the run goes on from; None begins `metrics.jsonl` anew, and `first_update` is
        the one at which it began (None: unknown). `lock` is watched: without it the folder is no longer this run's.
        `more` goes to dashboards, beside the settings."""
        self._file: io.FileIO | None = None
        self._dashboards: list[Dashboard] = []
        self._tracking = config.tracking
        self._last_step = config.schedule.num_training_steps + config.schedule.num_extra_training_steps
        self._pending = b""
        """What could not be written yet."""
        self._restarts, self._restarts_due = 0, False
        """How often the run has gone on, and whether its next update has yet to say so."""
        if not enabled:
            return
        self._save_dir, self._path = save_dir, save_dir / run_dir.METRICS_FILE
        self._first_update, self._lock = first_update, lock
        if resumed is not None:
            self._restarts = resumed_metrics.restarts(self._path)
            self._restarts_due = self._restarts > 0
        resumed_metrics.forget_after(save_dir, resumed, first_update)
        self._open()
        if "wandb" in config.tracking.trackers:
            self._dashboards.append(start_wandb(save_dir, config, more or {}))
        if "tensorboard" in config.tracking.trackers:
            board = TensorBoardRun(save_dir / "tensorboard", resumed)
            board.config({**config.settings(), **(more or {})})
            self._dashboards.append(board)
        if config.tracking.wandb_watch:
            for dashboard in self._dashboards:
                dashboard.watch(model)

    def _open(self) -> io.FileIO:
        self._file = open(self._path, "ab", buffering=0)  # a crash loses no finished record
        return self._file

    def record(self, **values: Any) -> None:
        """One record; `update_step` is the number of updates done. Raises `FolderLost`."""
        if self._restarts_due and "loss" in values:  # once, and again where that record was undone
            values["restarts"], self._restarts_due = self._restarts, False
        if self._file is not None:
            self._write(self._checked(self._file), resumed_metrics.encode(values))
        for dashboard in self._dashboards:
            dashboard.log(named(values, self._last_step, self._tracking.older_eval_names))

    def alert(self, title: str, text: str, update_step: int) -> None:
        """Something that somebody should look at, for dashboards that can call."""
        for dashboard in self._dashboards:
            dashboard.alert(title, text, update_step)

    def texts(self, update_step: int, samples: Sequence[Sample]) -> None:
        """Prompts, their loss and how the model continues them: on the log a line each, whatever they hold."""
        for each in samples:
            asked, answer = quoted(each.prompt), quoted(each.continuation)
            log.info("update %d: %s (loss %.3f) -> %s", update_step, asked, each.loss, answer)
        for dashboard in self._dashboards:
            dashboard.texts(update_step, samples)

    def go_back(self, state: TrainState) -> None:
        """The run has gone back to `state`: later records are put aside, into `metrics.undone.jsonl`."""
        for dashboard in self._dashboards:
            dashboard.go_back(state)
        if self._file is not None:
            self._write(self._file, b"")
            self._file.close()
            resumed_metrics.forget_after(self._save_dir, state, self._first_update, keep_later=True)
            self._restarts_due = self._restarts > 0
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
        for dashboard in self._dashboards:
            dashboard.finish(exit_code)


def quoted(text: str) -> str:
    """In quotes, with line ends and control characters escaped.

    >>> print(quoted("a\\tb é"))
    "a\\tb é"
    """
    return '"' + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text) + '"'
