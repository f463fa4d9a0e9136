from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from peft_pretraining.flags import Condition, ParsedFlag, boolean, setting
from peft_pretraining.methods._factors import settings as factors

if TYPE_CHECKING:
    from peft_pretraining.config import Config


@dataclass(frozen=True)
class LoRASettings(factors.FrozenSettings, factors.CandidateSettings):
    lora_only: bool = setting(False, boolean, "drop W: a network of products of low rank", identity=True)


def check(config: Config, given: Mapping[str, ParsedFlag], problems: list[str], warnings: list[str]) -> None:
    method = config.method
    factors.check(config, given, problems, warnings)
    if method.lora_only and method.force_keep_original:
        problems.append("--lora_only drops the weights that --force_keep_original keeps: give one of them")
    if method.lora_only and method.quantize:
        problems.append(f"--quantize {method.quantize}: --lora_only leaves no frozen weights to quantise")


def check_fine_tuning(config: Config, problems: list[str]) -> None:
    if config.method.lora_only:
        problems.append("--lora_only drops the weights that fine-tuning starts from")


SPEC = replace(
    factors.FROZEN,
    name="lora",
    title="LoRA",
    paper="2106.09685",
    year=2021,
    summary="frozen weights with trained low-rank factors beside them",
    settings=LoRASettings,
    conditions=(
        Condition(("init_lora_type", "zero_init_B"), lambda c: not c.method.lora_only, "with --lora_only"),
        *factors.FROZEN.conditions,
    ),
    check=check,
    check_fine_tuning=check_fine_tuning,
)
