"""Checks of a run's precision against everything else, and what it costs. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterator

from peft_pretraining.config import Config
from peft_pretraining.config.precision_config import OF_DTYPE
from peft_pretraining.methods import METHODS
from peft_pretraining.optim.rule_settings import RULES

_HALF_A_STEP = 2**-9
"""Of a bfloat16 number, relative to it, at most: what is smaller changes nothing when rounded to nearest."""


def settle(config: Config, problems: list[str]) -> Config:
    """Take `--dtype` for the precision that it means; `auto` stays, for the device to decide."""
    meant, asked = OF_DTYPE.get(config.model.dtype, "auto"), config.precision.precision
    if meant != "auto" and asked not in ("auto", meant):
        problems.append(
            f"--dtype {config.model.dtype} and --precision {asked} contradict each other: {config.model.dtype} means "
            f"--precision {meant}"
        )
    return config.replace(precision=meant) if asked == "auto" else config


def check(config: Config, problems: list[str], warnings: list[str]) -> None:
    """Whether attention, method and update rule can compute so; adds what `bf16` costs to the warnings."""
    name, state_dtype = config.precision.precision, config.precision.state_dtype
    if config.model.attn_implementation == "flash_attention_2" and name in ("fp32", "fp64"):
        problems.append(
            f"--attn_implementation flash_attention_2 computes in bfloat16, not in {name}: --precision mixed, bf16 or "
            "bf16_sr"
        )
    spec, rule = METHODS.get(config.method.method), RULES.get(config.optimizer.optimizer)
    if spec is not None and rule is not None:
        who = f"method {spec.name}" if not spec.allows.stochastic_rounding else f"--optimizer {rule.name}"
        able = spec.allows.stochastic_rounding and rule.keeps_formats
        if name == "bf16_sr" and not able:
            problems.append(f"--precision bf16_sr: {who} cannot round weights stochastically: mixed, bf16 or fp32")
        elif name == "bf16" and state_dtype in ("float32", "weight") and not able:
            problems.append(f"--state_dtype {state_dtype}: {who} keeps its states in the weights' dtype")
    compact = rule is not None and rule.compact  # what is not in 8 bits is published by default, and recorded so
    if name == "bf16_sr" and state_dtype == "published" and not compact:
        problems.append(
            "--precision bf16_sr and --state_dtype published contradict each other: published states are rounded to "
            "nearest; float32 or weight"
        )
    accumulates = config.per_layer and (config.batch.gradient_accumulation or 1) > 1
    if config.precision.gradient_sum_dtype != "float32" and not (accumulates and name in ("bf16", "bf16_sr")):
        warnings.append(
            "--gradient_sum_dtype has no effect: it is for per-layer updates of bfloat16 weights, over several "
            "micro-batches"
        )
    if name == "bf16":
        warnings += costs(config)


def costs(config: Config) -> list[str]:
    """What weights in bfloat16 that are rounded to nearest lose."""
    lines = [
        "--precision bf16 rounds weights to nearest, as published: steps below half a rounding step (1/512 to 1/256 of "
        "a weight) move nothing, so that norm weights near 1.0 hardly leave it; 0.03 nats were lost in a trial. mixed "
        "and bf16_sr lose next to nothing"
    ]
    beta2 = getattr(config.rule, "adam_beta2", 0.0)
    published = config.resolved_precision().state_format == "published"
    if published and beta2 > 1 - _HALF_A_STEP and config.optimizer.optimizer != "adamw8bit":
        lines.append(
            f"second moments in bfloat16 never fall with --adam_beta2 {beta2:g}: after a spike steps stay too small "
            "(--state_dtype float32 or weight)"
        )
    return lines + decay_without_effect(config)


def decay_without_effect(config: Config) -> list[str]:
    """Where every step's decay is rounded away from all weights, whatever the state's dtype: of the matrices, and of
    what has a rate or a decay of its own.

    A rule that adds decay and step up in float32 rounds the sum; the decay alone still is below half a step.
    """
    decays = {
        f"--{decay[0]} {decay[1]:g} at --{rate[0]} {rate[1]:g}": None
        for rate, decay in _rates_and_decays(config)
        if 0 < rate[1] * decay[1] < _HALF_A_STEP
    }
    return [
        f"{each} is less than half a rounding step of a bfloat16 weight (1/512): rounded to nearest, weights that get "
        "no other step do not decay at all"
        for each in decays
    ]


def _rates_and_decays(config: Config) -> Iterator[tuple[tuple[str, float], tuple[str, float]]]:
    """Highest rate and decay of the matrices, of the head, of the embedding and of the norms, with the names of the
    settings that say so."""
    base = ("lr", config.optimizer.lr), ("weight_decay", config.optimizer.weight_decay)
    yield base
    for role in ("head", "embed", "norm"):
        rates = [(name, getattr(config.roles, name)) for name in (f"{role}_lr", "adam_lr")]
        decay = f"{role}_weight_decay", getattr(config.roles, f"{role}_weight_decay")
        rate = next((each for each in rates if each[1] is not None), base[0])
        yield rate, decay if decay[1] is not None else base[1]
