from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from peft_pretraining.flags import (
    Condition,
    ParsedFlag,
    boolean,
    choice,
    fraction_below_one,
    integer,
    positive_float,
    setting,
)
from peft_pretraining.methods._factors import settings as factors
from peft_pretraining.methods.switchlora.schedule import SwitchSchedule

if TYPE_CHECKING:
    from peft_pretraining.config import Config


def _freeze_length(text: str) -> int:
    if (value := integer(text)) < -1 or value == 0:
        raise ValueError("must be a positive integer, or -1 for a reset without freezing")
    return value


@dataclass(frozen=True)
class SwitchLoRASettings(factors.TwoFactorSettings):
    switch_lora_interval: float = setting(40.0, positive_float, "updates between two switches of a vector, at first")
    switch_lora_descent_rate: float = setting(
        0.1, positive_float, "share of the run after which switching has slowed down to 0.3 of its first rate"
    )
    switch_descend_type: str = setting("exponential", choice("exponential", "Z"), "how switching slows down")
    fix_switch_lora_interval: bool = setting(False, boolean, "never slow switching down")
    adam_warm_step: int = setting(
        5, _freeze_length, "updates for which a switched vector's counterpart is frozen; -1: reset without freezing"
    )
    remain_switch_state: bool = setting(False, boolean, "keep the counterpart's moments and step count at a switch")
    remain_switch_step_state: bool = setting(False, boolean, "keep the counterpart's step count at a switch")
    zero_switch_state: bool = setting(True, boolean, "the default: the opposite of --remain_switch_state")
    zero_switch_step_state: bool = setting(True, boolean, "the default: the opposite of --remain_switch_step_state")
    switch_lora_drop: float = setting(
        0.0, fraction_below_one, "share of its old value taken off a vector that goes back to the pool (experimental)"
    )
    discontinuous_switch: bool = setting(False, boolean, "switch in random candidates instead of the next in the ring")
    no_offload_candidates: bool = setting(False, boolean, "keep the candidates on the device, not in host memory")
    cal_delta_norm: bool = setting(False, boolean, "log the norm of what switching adds to the frozen weights")


def check(config: Config, given: Mapping[str, ParsedFlag], problems: list[str], warnings: list[str]) -> None:
    method = config.method
    for remain, zero in (
        ("remain_switch_state", "zero_switch_state"),
        ("remain_switch_step_state", "zero_switch_step_state"),
    ):
        if getattr(method, remain) and zero in given and given[zero].value:
            problems.append(f"--{remain} and --{zero} are opposites: give one of them")
        if zero in given and not given[zero].value and not getattr(method, remain):
            problems.append(f"--{zero} False: say --{remain}")
    interval = SwitchSchedule.of(method, config.schedule.num_training_steps).interval(0)
    if interval < 2 * method.adam_warm_step:
        problems.append(
            f"--switch_lora_interval {method.switch_lora_interval:g} gives {interval:g} updates between two switches "
            f"of a vector; it must be at least twice --adam_warm_step {method.adam_warm_step}"
        )


def check_sharding(config: Config, inputs: Mapping[str, int], devices: int) -> list[str]:
    """Parts of every vector are dealt out: each device must have the same share of every row of A."""
    uneven: dict[int, list[str]] = {}
    for name, size in inputs.items():
        if size % devices and any(target in name for target in config.method.target_modules):
            uneven.setdefault(size, []).append(name)
    return [
        f"--distributed_type fsdp: switchlora cannot divide the {size} inputs of {names[0]}"
        f"{f' and {len(names) - 1} more' if len(names) > 1 else ''} evenly over {devices} devices: "
        "use another number of them, --replicas, or ddp"
        for size, names in uneven.items()
    ]


SPEC = replace(
    factors.FAMILY,
    name="switchlora",
    title="SwitchLoRA",
    paper="2406.06564",
    year=2024,
    summary="LoRA whose vectors are exchanged against candidates, some in every update",
    settings=SwitchLoRASettings,
    defaults={"lora_alpha": 1.0, "init_lora_type": "switchlora"},
    refused={
        "lora_only": factors.CHANGES_FROZEN,
        "quantize": factors.QUANTISED_AGAIN,
        "force_disable_candidates": "leaves method {name} nothing to switch",
    },
    tiny={**factors.FAMILY.tiny, "switch_lora_interval": 2.0, "adam_warm_step": 1},
    conditions=(
        *factors.FAMILY.conditions,
        Condition(
            ("switch_lora_descent_rate", "switch_descend_type"),
            lambda c: not c.method.fix_switch_lora_interval,
            "with --fix_switch_lora_interval",
        ),
        Condition(
            ("remain_switch_step_state",), lambda c: not c.method.remain_switch_state, "beside --remain_switch_state"
        ),
    ),
    check=check,
    check_sharding=check_sharding,
)
