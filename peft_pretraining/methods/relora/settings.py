from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from peft_pretraining.flags import ParsedFlag, boolean, fraction_below_one, non_negative_int, setting
from peft_pretraining.methods._factors import settings as factors

if TYPE_CHECKING:
    from peft_pretraining.config import Config

_NEAR_ZERO = 0.05
"""A rate after a merge above this share of the peak is worth a warning."""


@dataclass(frozen=True)
class ReLoRASettings(factors.FrozenSettings):
    relora: int = setting(0, non_negative_int, "ReLoRA: updates between merges; selects it with --use_peft")
    reset_optimizer_on_relora: bool = setting(True, boolean, "ReLoRA: zero the factors' moments at each reset")
    optimizer_random_pruning: float = setting(
        0.0, fraction_below_one, "ReLoRA: zero this random fraction of the moments instead"
    )
    optimizer_magnitude_pruning: float = setting(
        0.0, fraction_below_one, "ReLoRA: zero the moments below this quantile of their magnitude instead"
    )


def resolve(config: Config, given: Mapping[str, ParsedFlag]) -> Config:
    """Pruning takes the place of the reset, and a schedule with restarts begins anew at every merge."""
    method = config.method
    prunes = method.optimizer_random_pruning or method.optimizer_magnitude_pruning
    if prunes and "reset_optimizer_on_relora" not in given:
        config = config.replace(reset_optimizer_on_relora=False)
    if method.relora and config.schedule.scheduler == "cosine_restarts" and config.schedule.cycle_length is None:
        config = config.replace(cycle_length=method.relora)
    return config


def check(config: Config, given: Mapping[str, ParsedFlag], problems: list[str], warnings: list[str]) -> None:
    method = config.method
    factors.check(config, given, problems, warnings)
    if not method.relora:
        problems.append("--relora N, the number of updates between merges, is required for method relora")
    if method.optimizer_random_pruning and method.optimizer_magnitude_pruning:
        problems.append("--optimizer_random_pruning and --optimizer_magnitude_pruning: give one of them")
    for name in ("optimizer_random_pruning", "optimizer_magnitude_pruning"):
        if getattr(method, name) and method.reset_optimizer_on_relora:
            problems.append(f"--reset_optimizer_on_relora True leaves nothing for --{name} to prune: give one of them")


def check_schedule(config: Config, warnings: list[str]) -> None:
    """New factors at a high rate, without a warm-up, often undo what was learnt."""
    merge_every = config.method.relora
    if not 0 < merge_every < config.schedule.num_training_steps:
        return
    rate = config.rate_multiplier(merge_every)
    if rate > _NEAR_ZERO:
        warnings.append(
            f"the first update after a merge (update {merge_every}) runs at {rate:.2g} of --lr: the new factors have "
            "no warm-up; --scheduler cosine_restarts with --restart_warmup_steps gives them one"
        )


SPEC = replace(
    factors.FROZEN,
    name="relora",
    title="ReLoRA",
    paper="2307.05695",
    year=2023,
    summary="LoRA, merged and started anew every N updates",
    settings=ReLoRASettings,
    refused={"lora_only": factors.CHANGES_FROZEN},
    tiny={**factors.FROZEN.tiny, "relora": 2},
    reads=("cycle_length",),
    period="relora",
    resolve=resolve,
    check=check,
    check_schedule=check_schedule,
)
