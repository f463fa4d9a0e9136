"""What follows from several settings, and what is wrong between them, without looking at files. No torch."""

from __future__ import annotations

from peft_pretraining.config.schedule import decay_updates
from peft_pretraining.config.sections import BatchConfig, ScheduleConfig


def derive_batch(batch: BatchConfig, problems: list[str]) -> BatchConfig:
    """Fill in whichever of the batch numbers is missing; a remainder is a problem that names the three numbers."""
    per_device, accumulation, total = batch.batch_size, batch.gradient_accumulation, batch.total_batch_size
    world = batch.world_size
    if per_device is None:
        divisor = (accumulation or 1) * world
        if total is None:
            problems.append("--batch_size is required")
            return batch
        per_device = total // divisor
    elif total is None:
        accumulation = accumulation or 1
        total = per_device * accumulation * world
    if accumulation is None:
        accumulation = total // (per_device * world) if per_device else 1
    if per_device * accumulation * world != total:
        problems.append(
            f"--total_batch_size {total} must be --batch_size {batch.batch_size or '(missing)'} x "
            f"--gradient_accumulation {batch.gradient_accumulation or '(any)'} x world size {world}"
        )
        return batch
    return BatchConfig(per_device, accumulation, total, world)


def schedule_problems(config: ScheduleConfig, total: int) -> list[str]:
    """What is wrong with a schedule over `total` updates (`spec`: warm-up within the cycle, whole cycles only)."""
    problems = []
    cycle = config.cycle_length or total
    cyclic = config.scheduler in ("cosine", "cosine_restarts")
    span, span_name = (cycle, "--cycle_length") if cyclic and config.cycle_length else (total, "--num_training_steps")
    if config.warmup_steps > span:
        problems.append(f"--warmup_steps {config.warmup_steps} must not exceed {span_name} {span}")
    if cyclic and total % cycle:
        problems.append(f"--num_training_steps {total} must be a multiple of --cycle_length {cycle}")
    decay = decay_updates(config, total)
    if config.scheduler == "wsd" and config.warmup_steps + decay > total:
        given = "--decay_steps" if config.decay_steps is not None else f"--decay_ratio {config.decay_ratio:g}:"
        problems.append(
            f"--warmup_steps {config.warmup_steps} + {given} {decay} must not exceed --num_training_steps {total}"
        )
    if config.scheduler == "cosine_restarts" and config.adjust_step + config.warmup_steps > cycle:
        problems.append(
            f"--adjust_step {config.adjust_step} + --warmup_steps {config.warmup_steps} must not exceed the cycle "
            f"of {cycle}"
        )
    return problems
