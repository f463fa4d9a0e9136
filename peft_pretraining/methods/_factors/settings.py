"""Settings of the methods with low-rank factors beside their weights, and checks of them. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from peft_pretraining.flags import (
    Allows,
    Condition,
    MethodSettings,
    MethodSpec,
    ParsedFlag,
    boolean,
    choice,
    fraction_below_one,
    non_negative_int,
    positive_float,
    setting,
)
from peft_pretraining.methods._low_rank.settings import LowRankSettings

if TYPE_CHECKING:
    from peft_pretraining.config import Config

CHANGES_FROZEN = "method {name} changes the frozen weights, which --lora_only drops"
QUANTISED_AGAIN = (
    "method {name} adds to the frozen weights all the time, and quantising them again each time would lose what it adds"
)


@dataclass(frozen=True)
class FactorSettings(LowRankSettings):
    lora_dropout: float = setting(0.0, fraction_below_one, "dropout on the input of the factors")
    dense_lr_ratio: float = setting(
        1.0, positive_float, "learning rate of everything without factors (embeddings, norms, head) over that of A"
    )
    check_rank_sync: int = setting(
        0, non_negative_int, "compare the layers with factors over the ranks every so many updates; 0: never"
    )


@dataclass(frozen=True)
class TwoFactorSettings(FactorSettings):
    """Both factors are trained."""

    lora_alpha: float = setting(32.0, positive_float, "scale of the factors, s = lora_alpha / rank", identity=True)
    lora_plus_ratio: float = setting(1.0, positive_float, "learning rate of B over that of A (LoRA+)")
    init_lora_type: str = setting(
        "origin_lora",
        choice("origin_lora", "switchlora"),
        "first factors: origin_lora (A Kaiming uniform, B zero) or switchlora (both uniform, W - sBA stays frozen)",
    )
    zero_init_B: bool = setting(False, boolean, "start with B = 0; SwitchLoRA then never switches B")


@dataclass(frozen=True)
class CandidateSettings(MethodSettings):
    force_disable_candidates: bool = setting(False, boolean, "LoRA without pools of candidates (it never has any here)")


@dataclass(frozen=True)
class FrozenSettings(TwoFactorSettings):
    """The frozen weights change seldom or never."""

    train_scaling: bool = setting(False, boolean, "train the scale: s = tanh(p), p = 1 at first", identity=True)
    force_keep_original: bool = setting(False, boolean, "keep W beside the factors (always so without --lora_only)")
    quantize: str | None = setting(
        None, choice("4bit", "8bit"), "bits of the frozen weights: 4bit or 8bit", identity=True
    )
    use_double_quant: bool = setting(False, boolean, "quantise the constants of 4-bit weights, too", identity=True)


_RATE_CONDITIONS = (
    Condition(
        ("dense_lr_ratio",),
        lambda c: c.roles.adam_lr is None or getattr(c.method, "train_scaling", False),
        "with --adam_lr, which is the rate of everything without factors",
    ),
)

_FROZEN_CONDITIONS = (
    *_RATE_CONDITIONS,
    Condition(
        ("zero_init_B",),
        lambda c: c.method.init_lora_type != "origin_lora",
        "with --init_lora_type origin_lora, whose B is zero",
    ),
    Condition(
        ("lora_alpha", "scale"),
        lambda c: not c.method.train_scaling,
        "with --train_scaling, whose scale is tanh(1) at first",
    ),
)


def check(config: Config, given: Mapping[str, ParsedFlag], problems: list[str], warnings: list[str]) -> None:
    if config.method.use_double_quant and config.method.quantize != "4bit":
        problems.append("--use_double_quant needs --quantize 4bit")


def check_sharding(config: Config, inputs: Mapping[str, int], devices: int) -> list[str]:
    problems = []
    if config.method.quantize:
        problems.append(
            f"--quantize {config.method.quantize}: blocks of quantised weights cannot be divided over devices by "
            "--distributed_type fsdp: use ddp"
        )
    if config.method.train_scaling:
        problems.append("--train_scaling: --distributed_type fsdp cannot divide a single number over devices: use ddp")
    return problems


FAMILY = MethodSpec(
    name="",
    title="",
    summary="",
    family="low-rank factors",
    settings=FactorSettings,
    update_rules=("adamw", "adamw8bit"),
    state="2mr + 2nr",
    allows=Allows(fsdp=True, fine_tuning=True, stochastic_rounding=True, fp16=True),
    tiny={"rank": 4},
    conditions=_RATE_CONDITIONS,
)
"""What is so for each of them, unless it says otherwise."""

FROZEN = replace(
    FAMILY,
    settings=FrozenSettings,
    allows=replace(FAMILY.allows, quantized_weights=True),
    conditions=_FROZEN_CONDITIONS,
    check=check,
    check_sharding=check_sharding,
)
"""The same for those whose frozen weights change seldom or never."""
