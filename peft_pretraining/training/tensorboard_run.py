"""TensorBoard's event files, in `tensorboard/` of a run's folder: over updates, and in `tensorboard/by_tokens` over
tokens. What a resumed run makes again takes the place of what was there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_pretraining.checkpoint import run_dir
from peft_pretraining.checkpoint.train_state import TrainState
from peft_pretraining.training.dashboard import Dashboard, first_line, log
from peft_pretraining.training.samples import Sample, mean_loss

_COUNTERS = ("update_step", "tokens_seen")


class TensorBoardRun(Dashboard):
    """Passes records on to two writers of events; None does nothing."""

    title = "tensorboard"

    def __init__(self, folder: Path | None, resumed: TrainState | None = None):
        super().__init__(None)
        self._folder = folder
        self._open(resumed)

    def _open(self, state: TrainState | None) -> None:
        """`state`: what the run goes on from; events after it are no longer shown."""
        if self._folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter

            update, tokens = (state.update_step + 1, state.tokens_seen + 1) if state else (None, None)
            self._target = (
                SummaryWriter(str(self._folder), purge_step=update),
                SummaryWriter(str(self._folder / "by_tokens"), purge_step=tokens),
            )
        except Exception as error:  # it is not installed, or of another version; the folder cannot be made
            self._target = None
            log.warning("tensorboard does not record: %s", first_line(error))

    def config(self, settings: Mapping[str, Any]) -> None:
        """The run's settings, as a page of text."""
        text = json.dumps(run_dir.plain(settings), indent=2, default=str)
        self._do(lambda writers: writers[0].add_text("config", f"```\n{text}\n```", 0))

    def log(self, values: Mapping[str, Any]) -> None:
        def write(writers: Any) -> None:
            for name, value in values.items():
                if name not in _COUNTERS and isinstance(value, int | float):
                    writers[0].add_scalar(name, value, values["update_step"])
                    if "tokens_seen" in values:
                        writers[1].add_scalar(name, value, values["tokens_seen"])

        self._do(write)

    def alert(self, title: str, text: str, update_step: int) -> None:
        self._do(lambda writers: writers[0].add_text(f"alert/{title}", text, update_step))

    def texts(self, update_step: int, samples: Sequence[Sample]) -> None:
        text = "\n\n".join(f"**{each.prompt}** {each.continuation}" for each in samples)

        def write(writers: Sequence[Any]) -> None:
            writers[0].add_text("samples", text, update_step)
            writers[0].add_scalar("samples_loss", mean_loss(samples), update_step)

        self._do(write)

    def go_back(self, state: TrainState) -> None:
        if self._target is not None:
            self.finish(0)
            self._open(state)

    def finish(self, exit_code: int) -> None:
        self._do(lambda writers: [writer.close() for writer in writers])
