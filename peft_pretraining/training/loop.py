"""The train loop. It knows no method by name."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from itertools import islice

import torch
from torch.optim import Optimizer

from peft_pretraining import rng
from peft_pretraining.checkpoint.failures import NotFinite
from peft_pretraining.config.schedule import rate_multiplier
from peft_pretraining.distributed import ProcessGroup, synchronised_backward
from peft_pretraining.distributed.sharding import local
from peft_pretraining.models.loss import Batch, count_targets, token_loss_sum
from peft_pretraining.runtime.signals import EXIT_REQUEUE, StopRequest
from peft_pretraining.runtime.watchdog import FIRST_UPDATE_FACTOR, Watchdog
from peft_pretraining.training.deciding import (
    decides_on_host,
    forget_what_is_under_way,
    settle,
    step_by_mask,
    step_if_usable,
)
from peft_pretraining.training.evaluate import evaluate, mean_of, own_bytes_per_token
from peft_pretraining.training.progress import Update, report
from peft_pretraining.training.rewinding import go_back
from peft_pretraining.training.run import Run
from peft_pretraining.training.screen import Screen
from peft_pretraining.training.tracking import log


def train(run: Run) -> int:
    """Train to the last update, or until asked to stop; returns the process's exit code."""
    if is_finished(run):
        return 0
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        watchdog = stack.enter_context(Watchdog(run.config.run.step_timeout, run.checkpointer.save_dir, run.group.rank))
        shown = run.state.update_step, run.group.is_main, run.config.tracking.progress_every
        screen = stack.enter_context(Screen(run.last_step, *shown))
        while True:
            try:
                return train_on(run, stop, watchdog, screen)
            except NotFinite as error:
                forget_what_is_under_way(run)
                go_back(run, error)
                screen.go_back(run.state.update_step)
                if stop.anywhere(run.group):
                    return save_and_stop(run)


def train_on(run: Run, stop: StopRequest, watchdog: Watchdog, screen: Screen) -> int:
    """`train`, as long as everything is finite: raises `NotFinite` otherwise."""
    state = run.state
    while True:
        if something_is_due(run) and catch_up(run, watchdog, screen):
            return save_and_stop(run)
        if evaluation_is_due(run) and not evaluate_and_record(run, stop):
            return save_and_stop(run)
        if run.sampler.is_due(state.update_step, run.last_step):
            run.tracker.texts(state.update_step, run.sampler.sample(run.model))
        if state.update_step >= run.last_step:
            run.checkpointer.save_last(state)
            return 0
        if save_is_due(run):
            next_save = min(state.update_step + run.config.run.save_every, run.last_step)
            run.checkpointer.save_once(state, next_save)
        run.late.begin()
        with watchdog.update(state.update_step):
            train_step(run, next_micro_batches(run), stop)
        asked_to_stop = report_finished(run, screen)
        run.profiler.step()
        if asked_to_stop:
            catch_up(run, watchdog, screen)
            return save_and_stop(run)


def catch_up(run: Run, watchdog: Watchdog, screen: Screen) -> bool:
    """Know, and log, all that has been done before going on; returns whether some rank was asked to stop."""
    if run.late.waiting:
        with watchdog.watch(f"update {run.state.update_step - 1}", FIRST_UPDATE_FACTOR):
            settle(run)
    run.gradients.settle_all()
    return report_finished(run, screen)


def report_finished(run: Run, screen: Screen) -> bool:
    """Log the updates of which all is known by now; returns whether some rank was asked to stop in one of them."""
    finished = run.late.finished()
    for update, seconds in finished:
        report(run, update, seconds, screen)
    return any(update.stop for update, _ in finished)


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


def train_step(run: Run, micro_batches: list[Batch], stop: StopRequest) -> Update | None:
    """One update: forward and backward over the micro-batches, clip, step. Advances the state.

    Returns the newest update of which all is known: this one, or, where numbers are read late, that before (None: there
    is none).
    """
    state, method, model, optimizer, group = run.state, run.method, run.model, run.optimizer, run.group
    step = state.update_step
    torch.manual_seed(rng.derive_seed(run.config.run.seed, "update", step, group.rank))  # dropout
    lr = set_learning_rate(run, step)
    run.gradients.begin_update(step, frozen=step in run.config.data.skip_batches)
    method.before_update(model, optimizer, step)
    extra, observed = observe_extra_batches(run)
    sums = forward_backward(run, micro_batches)
    if sums is None:
        settle(run)
        empty = Update(step, lr, 0, *advance(run, observed, extra), skipped=True, empty=True)
        return run.late.finish(replace(empty, stop=stop.anywhere(group), metrics=run.gradients.metrics()))
    loss_sum, targets = sums
    totals = group.all_reduce_sum(torch.stack([loss_sum, loss_sum.new_full((), float(stop.received))]))
    norm = run.gradients.grad_norm()
    if (limit := run.config.optimizer.clip_grad_norm) > 0:
        run.gradients.scale_((limit / (norm + 1e-6)).clamp(max=1.0))
    values = torch.stack([*totals, norm.double()])

    known = settle(run)
    update = Update(step, lr, targets, *advance(run, observed + targets, extra))
    if decides_on_host(run, step):
        update = known = run.late.finish(step_if_usable(run, update, values.tolist()))
    else:
        run.late.put(step_by_mask(run, update, values), values)
    optimizer.zero_grad(set_to_none=True)
    return known


def observe_extra_batches(run: Run) -> tuple[int, int]:
    """Show the optimizer the further total batches that it wants; returns their number and that of their targets."""
    extra, read = run.gradients.wants_extra_batches(), 0
    for _ in range(extra):
        sums = forward_backward(run, next_micro_batches(run))
        if sums is None:
            continue
        read += sums[1]
        run.gradients.observe_gradients()
        run.optimizer.zero_grad(set_to_none=True)
    return extra, read


def advance(run: Run, targets_read: int, extra: int) -> tuple[int, int, int, int]:
    """Count an update, which read `extra` further total batches; returns its samples and tokens, and the run's tokens
    and samples with them."""
    state = run.state
    state.update_step += 1
    assert run.config.batch.total_batch_size is not None, "derived when the command line was checked"
    samples = run.config.batch.total_batch_size * (1 + extra)
    state.data_position += samples
    state.data_state = run.data.state_at(state.data_position)
    tokens = targets_read + samples  # each sequence's first token is no target
    state.tokens_seen += tokens
    return samples, tokens, state.tokens_seen, state.data_position


def next_micro_batches(run: Run) -> list[Batch]:
    """This rank's share of the next total batch."""
    return list(islice(run.batches, run.config.batch.gradient_accumulation))


def forward_backward(run: Run, micro_batches: list[Batch]) -> tuple[torch.Tensor, int] | None:
    """Gradients of the mean loss over all micro-batches and ranks, into `.grad`.

    Returns this rank's sum of token losses, a float64 scalar, and the number of target tokens over all ranks; None, and
    computes nothing, when there is not a single target.
    """
    group = run.group
    targets = count_all_targets(group, micro_batches)
    if targets == 0:
        return None
    loss_sum = torch.zeros((), dtype=torch.float64, device=group.device)
    for index, batch in enumerate(micro_batches):
        run.gradients.begin_micro_batch(index, len(micro_batches))
        batch = {name: tensor.to(group.device, non_blocking=True) for name, tensor in batch.items()}
        last = index == len(micro_batches) - 1
        with synchronised_backward(run.parallel_model, now=last or run.config.per_layer):
            loss = token_loss_sum(run.parallel_model, batch)
            # Times the world size because gradients are averaged over the ranks.
            (loss * (group.world_size / targets)).backward()
        loss_sum += loss.detach()
    return loss_sum, targets


def count_all_targets(group: ProcessGroup, micro_batches: list[Batch]) -> int:
    """Target tokens over all ranks, counted on the host. Without labels only the shape counts, the same on all."""
    targets = sum(map(count_targets, micro_batches))
    if any("labels" in batch for batch in micro_batches):
        return group.sum_on_host(targets)
    return targets * group.world_size


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


def something_is_due(run: Run) -> bool:
    """Whether the next update waits for an evaluation, a sample, a save or the end, which look at all that was done
    before."""
    step, last = run.state.update_step, run.last_step
    return evaluation_is_due(run) or save_is_due(run) or step >= last or run.sampler.is_due(step, last)


def save_is_due(run: Run) -> bool:
    return run.state.update_step > 0 and run.state.update_step % run.config.run.save_every == 0


def evaluation_is_due(run: Run) -> bool:
    """Before the first update, every `--eval_every`, and at the end; at each of them once."""
    state = run.state
    due = state.update_step % run.config.run.eval_every == 0 or state.update_step == run.last_step
    return due and state.evaluated_step != state.update_step


def evaluate_and_record(run: Run, stop: StopRequest) -> bool:
    """Evaluate; False when a request to stop cut it short: then the resumed run makes up for it."""
    state, sets, found = run.state, run.data.evaluation_sets, []
    for each in sets:
        parts = run.config.data.eval_parts if each.share else 1
        result = evaluate(run.model, each.batches, run.group, lambda: stop.anywhere(run.group), parts)
        if result is None:
            return False
        found.append(result)
    state.evaluated_step = state.update_step
    result = mean_of([(each.share, of) for each, of in zip(sets, found, strict=True) if each.share])
    own = result.described(own_bytes_per_token(sets))
    named = {each.name: of.described(each.bytes_per_token) for each, of in zip(sets, found, strict=True) if each.name}
    read, of_sample = run.data.read_before(state.data_position), run.config.data.max_length or 0
    run.tracker.record(
        update_step=state.update_step,
        tokens_seen=state.tokens_seen,
        **{f"final_eval_{name}": value for name, value in own.items()},
        optimizer_state_bytes=state_bytes(run.optimizer),
        **{f"final_eval_perplexity_{index}": part.perplexity for index, part in enumerate(result.parts)},
        **({"eval_sets": named} if named else {}),
        **({"source_tokens": {name: count * of_sample for name, count in read.items()}} if read else {}),
    )
    said = "".join(f"; {name} loss {each['loss']:.4f}, {each['perplexity']:.2f}" for name, each in named.items())
    told = (state.update_step, result.loss, result.perplexity, said)
    log.info("update %d: validation loss %.4f, perplexity %.2f%s", *told)
    return True


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the optimizer's state on this device."""
    return sum(
        local(value).numel() * value.element_size() for state in optimizer.state.values() for value in state.values()
    )
