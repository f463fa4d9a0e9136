"""wandb's run, none of whose errors end the training: a lost service, network or disk costs numbers that
`metrics.jsonl` has, too."""

from __future__ import annotations

import json
import logging
import secrets
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_pretraining.checkpoint import run_dir
from peft_pretraining.checkpoint.plain_files import regular
from peft_pretraining.config import Config
from peft_pretraining.training.dashboard import Dashboard, first_line, group_name, model_name, run_name
from peft_pretraining.training.samples import Sample, mean_loss

log = logging.getLogger("peft_pretraining")

SECONDS_TO_FINISH = 60.0
"""How long the end of a run waits for wandb, which tries for hours to send what a lost network keeps."""
_SECONDS_TO_START = 30.0
"""How long its beginning waits for wandb's server, or for somebody to type a key at a terminal."""


class WandbRun(Dashboard):
    """Passes records on to a `wandb.Run`; None does nothing."""

    title = "wandb"

    def watch(self, model: Any) -> None:
        self._do(lambda run: run.watch(model))

    def log(self, values: Mapping[str, Any]) -> None:
        self._do(lambda run: run.log(dict(values)))

    def alert(self, title: str, text: str, update_step: int) -> None:
        self._do(lambda run: run.alert(title=title, text=text, level="WARN"))

    def texts(self, update_step: int, samples: Sequence[Sample]) -> None:
        def send(run: Any) -> None:
            import wandb

            rows = [[update_step, each.prompt, each.continuation, each.loss] for each in samples]
            table = wandb.Table(columns=["update_step", "prompt", "continued", "loss"], data=rows)
            run.log({"update_step": update_step, "samples": table, "samples_loss": mean_loss(samples)})

        self._do(send)

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


def start_wandb(save_dir: Path, config: Config, more: Mapping[str, Any]) -> WandbRun:
    """Begin or continue the wandb run of this folder: its id is kept beside the metrics. `more` stands in its config
    beside the settings.

    Without a key or a network it records offline, and says so; nothing where even that fails.
    """
    try:
        import wandb
    except ImportError as error:
        log.warning("wandb does not record: %s", first_line(error))
        return WandbRun(None)
    tracking = config.tracking
    settings: dict[str, Any] = {
        "project": tracking.wandb_project or "peft_pretraining",
        "group": group_name(config),
        "job_type": config.method.method,
        "name": tracking.name or run_name(config),
        "tags": list(tracking.tags) or None,
        "notes": tracking.comment,
        "id": _wandb_run_id(save_dir / run_dir.WANDB_RUN_FILE),
        "resume": "allow",
        "dir": str(save_dir),
        "config": {**config.settings(), "model": model_name(config), **more},
        "settings": wandb.Settings(init_timeout=_SECONDS_TO_START, login_timeout=_SECONDS_TO_START),
    }
    try:
        run = wandb.init(**settings)
    except Exception as error:  # a missing key, a lost network, a refused project: the training needs none of them
        log.warning("wandb cannot be reached (%s); it records offline", first_line(error))
        try:
            wandb.teardown()  # its service still holds the run's id
            run = wandb.init(**settings, mode="offline")
        except Exception as second:
            log.warning("wandb does not record: %s", first_line(second))
            return WandbRun(None)
    board = WandbRun(run)
    board._do(_define_axes)
    return board


def _define_axes(run: Any) -> None:
    """Our own counters are the x axes: after a resume wandb's would go on from where a crash left it."""
    run.define_metric("update_step")
    run.define_metric("tokens_seen", step_metric="update_step")
    run.define_metric("*", step_metric="update_step")
    for name in ("eval/loss", "eval/perplexity"):
        run.define_metric(name, step_metric="tokens_seen", summary="min,last")


def _wandb_run_id(path: Path) -> str:
    """The one that is kept in a file, or a new one, which is written there."""
    try:
        kept = json.loads(regular(path).read_text())["id"]
        if isinstance(kept, str) and kept:
            return kept
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        log.warning("%s cannot be read (%s): wandb gets a new run", path, first_line(error))
    run_id = secrets.token_hex(4)
    run_dir.write_atomically(path, json.dumps({"id": run_id}) + "\n")
    return run_id
