"""What is said of each update, and when there were too many bad ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from peft_pretraining.checkpoint.failures import NotFinite, TrainingFailed
from peft_pretraining.models.compiled import compilation_of
from peft_pretraining.training import spikes
from peft_pretraining.training.profiling import peak_memory
from peft_pretraining.training.tracking import log

if TYPE_CHECKING:
    from peft_pretraining.training.run import Run
    from peft_pretraining.training.screen import Screen

MOST_IN_A_ROW = 10
_LARGEST_SKIPPED_SHARE = 0.05
"""So many updates that are not finite, in a row or of all, end the run."""


@dataclass(frozen=True)
class Update:
    """What one update did."""

    step: int
    """0-based."""
    lr: float
    targets: int
    """Tokens predicted, over all ranks."""
    samples: int
    """Sequences read, over all ranks."""
    tokens: int
    """Their tokens, without padding."""
    tokens_seen: int
    """By the run, this update included."""
    data_position: int
    """Sequences read by the run, this update included."""
    loss: float = math.nan
    """Mean over all target tokens of all micro-batches and ranks."""
    grad_norm: float = 0.0
    skipped: bool = False
    spikes: list[str] = field(default_factory=list)
    """What stood out from earlier updates, described."""
    stop: bool = False
    """Some rank was asked to stop."""
    empty: bool = False
    """Its batches held no token to predict: nothing was computed."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What the optimizer says of it."""


def report(run: Run, update: Update, seconds: float, screen: Screen) -> None:
    """Log one update; raises `TrainingFailed` when too many were skipped. The run may be at a later one already."""
    done, rate = update.step + 1, update.tokens / seconds
    record = {
        **{"update_step": done, "loss": update.loss, "lr": update.lr, "grad_norm": update.grad_norm},
        **{"tokens_seen": update.tokens_seen, "throughput_tokens": rate, "step_time": seconds},
        **run.utilisation.of(rate),
        **peak_memory(run.group.device),
        **({"skipped": True} if update.skipped else {}),
        **({"empty": True} if update.empty else {}),
        **({"spike": ", ".join(update.spikes)} if update.spikes else {}),
        **({"failed_saves": run.checkpointer.failed_saves} if run.checkpointer.failed_saves else {}),
        **update.metrics,
        **run.layer_log.of(update.step),
        **(compilation.news() if (compilation := compilation_of(run.model)) else {}),
    }
    run.tracker.record(**record)
    screen.show(record)
    epoch = run.data.epoch_at(update.data_position)
    if epoch > run.data.epoch_at(update.data_position - update.samples):
        log.info("the training data has been read %d time(s); epoch %d begins at update %d", epoch, epoch, done)
    count_spikes(run, update)
    count_empty(run, update)
    count_nonfinite(run, update)


def count_empty(run: Run, update: Update) -> None:
    """Log an update without a single token to predict: often, if there are many, would drown everything else."""
    state = run.state
    state.empty_updates += update.empty
    if update.empty and _is_power_of_ten(state.empty_updates):
        log.warning(
            "passed over update %d: its batches hold no token to predict (empty documents); %d so far",
            *(update.step, state.empty_updates),
        )


def _is_power_of_ten(number: int) -> bool:
    return 10 ** (len(str(number)) - 1) == number


def count_nonfinite(run: Run, update: Update) -> None:
    """Log an update that was not finite; raises `NotFinite` when these are too many."""
    state, data = run.state, run.config.data
    if update.empty:
        return
    if not update.skipped or update.spikes or update.step in data.skip_batches:
        state.nonfinite_in_a_row = 0
        return
    state.skipped_updates += 1
    state.nonfinite_in_a_row += 1
    log.warning("skipped update %d: loss %s, gradient norm %s", update.step, update.loss, update.grad_norm)
    seen = f"update {update.step}: loss {update.loss}, gradient norm {update.grad_norm}"
    run.tracker.alert("skipped update", f"{seen}; {state.skipped_updates} so far", update.step + 1)
    total = run.config.schedule.num_training_steps
    what = "had a non-finite loss or gradient"
    advice = f"lower --lr, or look at the data near update {update.step}"
    if state.nonfinite_in_a_row >= MOST_IN_A_ROW:
        raise NotFinite(f"{state.nonfinite_in_a_row} updates in a row {what}: {advice}")
    if state.skipped_updates > _LARGEST_SKIPPED_SHARE * total:
        raise NotFinite(
            f"{state.skipped_updates} of {total} updates {what}, more than {_LARGEST_SKIPPED_SHARE:.0%}: {advice}"
        )


def count_spikes(run: Run, update: Update) -> None:
    """Log an update that stood out, and stop the run when --skip_spikes skips too many."""
    state = run.state
    if update.spikes:
        done = "skipped" if update.skipped else "spike in"
        log.warning("%s update %d: %s", done, update.step, ", ".join(update.spikes))
        run.tracker.alert("spike", f"{done} update {update.step}: {', '.join(update.spikes)}", update.step + 1)
    skipped = bool(update.spikes) and update.skipped
    state.skipped_spikes += skipped
    state.spikes_in_a_row = state.spikes_in_a_row + 1 if skipped else 0
    total = run.config.schedule.num_training_steps
    if problem := spikes.over_the_limit(state.spikes_in_a_row, state.skipped_spikes, total):
        run.checkpointer.wait()
        raise TrainingFailed(f"{problem}; {run.checkpointer.where_to_go_on()}")
