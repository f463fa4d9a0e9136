"""The train loop. It knows no method by name."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from peft_pretraining import rng
from peft_pretraining.checkpoint.checkpointer import Checkpointer
from peft_pretraining.checkpoint.failures import NotFinite
from peft_pretraining.checkpoint.train_state import TrainState
from peft_pretraining.config import Config
from peft_pretraining.config.schedule import rate_multiplier
from peft_pretraining.data.data import Data
from peft_pretraining.distributed import ProcessGroup, synchronised_backward
from peft_pretraining.distributed.sharding import local
from peft_pretraining.methods.base import TrainingMethod
from peft_pretraining.models.loss import Batch, count_targets, token_loss_sum
from peft_pretraining.optim.state.gradient_owner import GradientOwner
from peft_pretraining.runtime.signals import EXIT_REQUEUE, StopRequest
from peft_pretraining.runtime.watchdog import Watchdog
from peft_pretraining.training import spikes
from peft_pretraining.training.evaluate import evaluate
from peft_pretraining.training.profiling import Profiler
from peft_pretraining.training.progress import Update, report
from peft_pretraining.training.rewinding import go_back
from peft_pretraining.training.tracking import Tracker, log


@dataclass
class Run:
    """Everything a run consists of; `build.py` puts it together."""

    config: Config
    group: ProcessGroup
    model: nn.Module
    parallel_model: nn.Module
    """`model`, wrapped for several devices."""
    method: TrainingMethod
    optimizer: Optimizer
    gradients: GradientOwner
    """The optimizer's answers about gradients."""
    state: TrainState
    data: Data
    batches: Iterator[Batch]
    """Endless micro-batches of this rank, from `state.data_position` on."""
    checkpointer: Checkpointer
    tracker: Tracker
    profiler: Profiler

    @property
    def schedule_length(self) -> int:
        """Updates that the learning-rate schedule spans."""
        return self.config.schedule.num_training_steps - self.state.schedule_start

    @property
    def last_step(self) -> int:
        """Number of updates after which the run is done."""
        return self.config.schedule.num_training_steps + self.config.schedule.num_extra_training_steps


def train(run: Run) -> int:
    """Train to the last update, or until asked to stop; returns the process's exit code."""
    if is_finished(run):
        return 0
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        watchdog = stack.enter_context(Watchdog(run.config.run.step_timeout, run.checkpointer.save_dir, run.group.rank))
        stack.enter_context(logging_redirect_tqdm([log]))
        bar = stack.enter_context(_progress_bar(run))
        while True:
            try:
                return train_on(run, stop, watchdog, bar)
            except NotFinite as error:
                go_back(run, error)
                bar.n = run.state.update_step
                if stop.anywhere(run.group):
                    return save_and_stop(run)


def train_on(run: Run, stop: StopRequest, watchdog: Watchdog, bar: tqdm) -> int:
    """`train`, as long as everything is finite: raises `NotFinite` otherwise."""
    state = run.state
    while True:
        if evaluation_is_due(run) and not evaluate_and_record(run, stop):
            return save_and_stop(run)
        if state.update_step >= run.last_step:
            run.checkpointer.save_last(state)
            return 0
        if state.update_step > 0 and state.update_step % run.config.run.save_every == 0:
            next_save = min(state.update_step + run.config.run.save_every, run.last_step)
            run.checkpointer.save_once(state, next_save)
        began = time.perf_counter()
        with watchdog.update(state.update_step):
            update = train_step(run, next_micro_batches(run), stop)
        report(run, update, time.perf_counter() - began, bar)
        run.profiler.step()
        if update.stop:
            return save_and_stop(run)


def is_finished(run: Run) -> bool:
    """Whether there is nothing left to do, which is said then."""
    state, checkpointer = run.state, run.checkpointer
    if state.update_step < run.last_step or evaluation_is_due(run) or checkpointer.saved_step != state.update_step:
        return False
    if state.update_step > run.last_step:
        log.warning(
            "--num_training_steps gives %d updates, but %s has done %d: nothing is left to do",
            *(run.last_step, checkpointer.saved_in, state.update_step),
        )
    else:
        log.info("already finished: %s has done all %d updates; nothing to do", checkpointer.saved_in, run.last_step)
    return True


def train_step(run: Run, micro_batches: list[Batch], stop: StopRequest) -> Update:
    """One update: forward and backward over the micro-batches, clip, step. Advances the state."""
    state, method, model, optimizer, group = run.state, run.method, run.model, run.optimizer, run.group
    step = state.update_step
    torch.manual_seed(rng.derive_seed(run.config.run.seed, "update", step, group.rank))  # dropout
    lr = set_learning_rate(run, step)
    run.gradients.begin_update(step, frozen=step in run.config.data.skip_batches)
    method.before_update(model, optimizer, step)
    extra = run.gradients.wants_extra_batches()
    observed_targets: list[torch.Tensor] = []
    for _ in range(extra):
        observed = forward_backward(run, next_micro_batches(run))
        if observed is None:
            continue
        observed_targets.append(observed[1])
        run.gradients.observe_gradients()
        optimizer.zero_grad(set_to_none=True)
    sums = forward_backward(run, micro_batches)
    if sums is None:
        empty = Update(math.nan, 0.0, lr, *advance(run, int(sum(observed_targets)), extra), skipped=True, empty=True)
        return replace(empty, stop=stop.anywhere(group))
    loss_sum, targets = sums
    targets_read = sum(observed_targets, targets)
    totals = group.all_reduce_sum(torch.stack([loss_sum, loss_sum.new_tensor(float(stop.received))]))

    norm = run.gradients.grad_norm()
    if (limit := run.config.optimizer.clip_grad_norm) > 0:
        run.gradients.scale_((limit / (norm + 1e-6)).clamp(max=1.0))
    # The update's only wait for the device.
    values = torch.stack([totals[0] / targets, totals[1], norm.double(), targets_read])
    loss_mean, asked_to_stop, norm_value, tokens_read = values.tolist()
    skipped = not (math.isfinite(loss_mean) and math.isfinite(norm_value)) or step in run.config.data.skip_batches
    found = [] if skipped else find_spikes(run, loss_mean, norm_value)
    skipped |= bool(found) and run.config.optimizer.skip_spikes > 0
    if not skipped:
        method.before_step(model, optimizer, step)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    samples, tokens = advance(run, int(tokens_read), extra)
    return Update(loss_mean, norm_value, lr, samples, tokens, skipped, found, asked_to_stop > 0)


def advance(run: Run, targets_read: int, extra: int) -> tuple[int, int]:
    """Count an update, which read `extra` further total batches; returns its samples and tokens."""
    state = run.state
    state.update_step += 1
    assert run.config.batch.total_batch_size is not None, "derived when the command line was checked"
    samples = run.config.batch.total_batch_size * (1 + extra)
    state.data_position += samples
    state.data_state = run.data.state_at(state.data_position)
    tokens = targets_read + samples  # each sequence's first token is no target
    state.tokens_seen += tokens
    return samples, tokens


def next_micro_batches(run: Run) -> list[Batch]:
    """This rank's share of the next total batch."""
    return list(islice(run.batches, run.config.batch.gradient_accumulation))


def forward_backward(run: Run, micro_batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Gradients of the mean loss over all micro-batches and ranks, into `.grad`.

    Returns this rank's sum of token losses and the number of target tokens over all ranks, float64 scalars; None, and
    computes nothing, when there is not a single target.
    """
    group = run.group
    targets = torch.tensor(float(sum(map(count_targets, micro_batches))), dtype=torch.float64)
    targets = group.all_reduce_sum(targets.to(group.device))
    # Batches without labels always have targets: only padding has none. So the ranks agree, and rarely wait for this.
    if any("labels" in batch for batch in micro_batches) and targets.item() == 0:
        return None
    loss_sum = torch.zeros((), dtype=torch.float64, device=group.device)
    for index, batch in enumerate(micro_batches):
        run.gradients.begin_micro_batch(index, len(micro_batches))
        batch = {name: tensor.to(group.device, non_blocking=True) for name, tensor in batch.items()}
        last = index == len(micro_batches) - 1
        with synchronised_backward(run.parallel_model, now=last or run.config.per_layer):
            loss = token_loss_sum(run.parallel_model, batch)
            # Times the world size because gradients are averaged over the ranks.
            (loss * (group.world_size / targets).to(loss.dtype)).backward()
        loss_sum += loss.detach()
    return loss_sum, targets


def find_spikes(run: Run, loss: float, grad_norm: float) -> list[str]:
    """What of an update stands out. All ranks have the same two numbers, and come to the same answer."""
    skip = run.config.optimizer.skip_spikes
    values = {"loss": loss, "gradient norm": grad_norm}
    return spikes.observe(run.state.spike_statistics, values, skip or spikes.LOGGED_DEVIATIONS, skip > 0)


def set_learning_rate(run: Run, step: int) -> float:
    """Give every parameter group its rate for update `step`; returns the base rate times the multiplier."""
    multiplier = rate_multiplier(step - run.state.schedule_start, run.config.schedule, run.schedule_length)
    for group in run.optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", run.config.optimizer.lr) * multiplier
    return run.config.optimizer.lr * multiplier


def save_and_stop(run: Run) -> int:
    """What a request to stop ends in."""
    run.checkpointer.save_last(run.state)
    log.info("asked to stop: saved update %d; launch the same command again to go on", run.state.update_step)
    return EXIT_REQUEUE


def evaluation_is_due(run: Run) -> bool:
    """Before the first update, every `--eval_every`, and at the end; at each of them once."""
    state = run.state
    due = state.update_step % run.config.run.eval_every == 0 or state.update_step == run.last_step
    return due and state.evaluated_step != state.update_step


def evaluate_and_record(run: Run, stop: StopRequest) -> bool:
    """Evaluate; False when a request to stop cut it short: then the resumed run makes up for it."""
    state = run.state
    result = evaluate(run.model, run.data.evaluation, run.group, lambda: stop.anywhere(run.group))
    if result is None:
        return False
    state.evaluated_step = state.update_step
    run.tracker.record(
        update_step=state.update_step,
        tokens_seen=state.tokens_seen,
        final_eval_loss=result.loss,
        final_eval_perplexity=result.perplexity,
        final_eval_tokens=result.tokens,
        optimizer_state_bytes=state_bytes(run.optimizer),
    )
    log.info("update %d: validation loss %.4f, perplexity %.2f", state.update_step, result.loss, result.perplexity)
    return True


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the optimizer's state on this device."""
    return sum(
        local(value).numel() * value.element_size() for state in optimizer.state.values() for value in state.values()
    )


def _progress_bar(run: Run) -> tqdm:
    return tqdm(
        total=run.last_step,
        initial=run.state.update_step,
        unit="update",
        disable=not run.group.is_main,
        file=sys.stderr,
        dynamic_ncols=True,
        mininterval=0.5,
    )
