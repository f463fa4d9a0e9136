"""Whether an update takes place: decided by the host, or by the device, of which the host hears late."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from peft_pretraining.training import spikes
from peft_pretraining.training.progress import Update
from peft_pretraining.training.run import Run


def decides_on_host(run: Run, step: int) -> bool:
    """Whether an update's numbers are read before its step: at once where that costs nothing, the optimizer heeds no
    mask, or something is to be done that cannot be undone or masked."""
    return (
        not run.late.on
        or not run.gradients.masks_updates
        or run.config.optimizer.skip_spikes > 0
        or run.method.acts_before_step(run.optimizer, step)
    )


def step_if_usable(run: Run, update: Update, numbers: list[float]) -> Update:
    """Step unless the update is to be skipped; returns it with all that is known of it then."""
    update = judge(run, update, numbers)
    if not update.skipped:
        run.method.before_step(run.model, run.optimizer, update.step)
        run.optimizer.step()
    return replace(update, metrics=run.gradients.metrics())


def step_by_mask(run: Run, update: Update, values: torch.Tensor) -> Update:
    """Step so that an update which is not finite leaves no trace, without asking whether it is."""
    if update.step not in run.config.data.skip_batches:
        optimizer: Any = run.optimizer
        optimizer.found_inf = values.isfinite().all().logical_not().float()
        optimizer.step()
        optimizer.found_inf = None
    return replace(update, metrics=run.gradients.metrics())


def settle(run: Run) -> Update | None:
    """Read the numbers of the update that still waits to be read, and tell the optimizer what became of it."""
    if (waiting := run.late.take()) is None:
        return None
    update = judge(run, *waiting)
    if update.step not in run.config.data.skip_batches:
        run.gradients.settle(update.skipped)
    return run.late.finish(update)


def judge(run: Run, update: Update, numbers: list[float]) -> Update:
    """An update with what its numbers say: its loss and norm, whether it is skipped, its spikes."""
    loss_sum, asked_to_stop, norm = numbers
    loss = loss_sum / update.targets
    skipped = not (math.isfinite(loss) and math.isfinite(norm)) or update.step in run.config.data.skip_batches
    found = [] if skipped else find_spikes(run, loss, norm)
    skipped |= bool(found) and run.config.optimizer.skip_spikes > 0
    return replace(update, loss=loss, grad_norm=norm, skipped=skipped, spikes=found, stop=asked_to_stop > 0)


def find_spikes(run: Run, loss: float, grad_norm: float) -> list[str]:
    """What of an update stands out. All ranks have the same two numbers, and come to the same answer."""
    skip = run.config.optimizer.skip_spikes
    values = {"loss": loss, "gradient norm": grad_norm}
    return spikes.observe(run.state.spike_statistics, values, skip or spikes.LOGGED_DEVIATIONS, skip > 0)


def forget_what_is_under_way(run: Run) -> None:
    """Before going back: nothing is to come of the update that was begun before the one that is not finite was seen."""
    if run.late.take() is not None:
        run.gradients.settle(False)
    run.gradients.settle_all()
    run.late.finished()
