"""Learning-rate schedules as pure functions of the update step.

t is the 0-based update step, T the number of updates, w the warm-up, c the cycle, d the decay and f the lowest
multiplier. Nothing is stored: the rate of an update follows from its number, so a resumed run cannot be out of step
with its schedule.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft_pretraining.config import ScheduleConfig


def rate_multiplier(t: int, config: ScheduleConfig, total: int) -> float:
    """Multiplier of the base rate at update t of a schedule over `total` updates.

    Updates after the schedule's end (`--num_extra_training_steps`) run at the multiplier of the last one.
    """
    t = min(t, total - 1)
    warmup, floor = config.warmup_steps, config.min_lr_ratio
    cycle = config.cycle_length or total
    if config.scheduler == "cosine":
        return _cosine(t, warmup, cycle, floor)
    if config.scheduler == "cosine_restarts":
        return _cosine_restarts(t, warmup, cycle, floor, config.restart_warmup_steps, config.adjust_step, total)
    if t < warmup:
        return t / warmup
    if config.scheduler == "wsd":
        return _decay(t, total - decay_updates(config, total), total, floor, config.decay_shape)
    if config.scheduler == "linear":
        return max(0.0, (total - t) / (total - warmup))
    if config.scheduler == "constant":
        return 1.0
    assert config.scheduler == "cosine_with_min_lr", config.scheduler
    return max(0.1, _half_cosine((t - warmup) / (total - warmup)))


def decay_updates(config: ScheduleConfig, total: int) -> int:
    """Updates at the end of a wsd schedule over `total` in which the rate falls: d."""
    return round(config.decay_ratio * total) if config.decay_steps is None else config.decay_steps


def has_begun_to_decay(config: ScheduleConfig, total: int, done: int) -> bool:
    """Whether one of the first `done` updates of a schedule had a rate that depends on where its decay is: the first
    one of the decay still has the whole rate."""
    return config.scheduler == "wsd" and done - 1 > total - decay_updates(config, total)


def _decay(t: int, begin: int, total: int, floor: float, shape: str) -> float:
    """Warm-up, stable, decay (arXiv 2404.06395) after the warm-up; `1-sqrt` is the cooldown of arXiv 2405.18392."""
    if t < begin:
        return 1.0
    x = (t - begin) / (total - begin)
    return floor + (1 - floor) * (1 - (x if shape == "linear" else math.sqrt(x)))


def _half_cosine(progress: float) -> float:
    """From 1 at progress 0 to 0 at progress 1."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _cosine(t: int, warmup: int, cycle: int, floor: float) -> float:
    u = t % cycle
    if u < warmup:
        # Later cycles begin just above zero: ReLoRA's reset optimizer must not divide by a rate of 0.
        return 1e-7 if t >= cycle and u < 2 else u / warmup
    return floor + (1 - floor) * _half_cosine((u - warmup) / (cycle - warmup))


def _cosine_restarts(t: int, warmup: int, cycle: int, floor: float, restart: int, adjust: int, total: int) -> float:
    """ReLoRA (arXiv 2307.05695), section 3: one cosine over the whole run, with a short warm-up after each restart."""
    if t < warmup:
        return t / warmup
    s = t + adjust
    in_cycle, cycles = s % cycle, s // cycle
    if in_cycle < restart and t >= cycle:
        peak = floor + (1 - floor) * _half_cosine((cycles * cycle + restart - warmup) / (total - warmup))
        return in_cycle / restart * peak
    return floor + (1 - floor) * _half_cosine((s - warmup) / (total - warmup))
