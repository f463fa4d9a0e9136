"""wandb's run, none of whose errors end the training: a lost service, network or disk costs numbers that
`metrics.jsonl` has, too."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

log = logging.getLogger("peft_pretraining")

SECONDS_TO_FINISH = 60.0
"""How long the end of a run waits for wandb, which tries for hours to send what a lost network keeps."""


class WandbRun:
    """Passes records on until one of wandb's errors; then says so, once, and is silent."""

    def __init__(self, run: Any):
        self._run = run
        """A `wandb.Run`; None does nothing."""

    def watch(self, model: Any) -> None:
        self._do(lambda run: run.watch(model))

    def log(self, values: Mapping[str, Any]) -> None:
        self._do(lambda run: run.log(dict(values)))

    def finish(self, exit_code: int) -> None:
        """Returns when wandb has sent everything, and after `SECONDS_TO_FINISH` in any case."""
        ending = threading.Thread(target=self._do, args=[lambda run: run.finish(exit_code=exit_code)], daemon=True)
        ending.start()
        ending.join(SECONDS_TO_FINISH)
        if ending.is_alive():
            log.warning(
                "wandb has not finished after %g s and is left to itself; `wandb sync` sends what it kept",
                SECONDS_TO_FINISH,
            )

    def _do(self, act: Callable[[Any], Any]) -> None:
        if self._run is None:
            return
        try:
            act(self._run)
        except Exception as error:  # of its service, its connection, its files
            self._run = None
            why = (str(error).splitlines() or [type(error).__name__])[0]
            log.warning("wandb records no further (%s); metrics.jsonl has everything", why)
