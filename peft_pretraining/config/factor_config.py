"""Settings of the methods with low-rank factors: LoRA, ReLoRA, SwitchLoRA and GoLore's adapter form.

Their defaults depend on the method and on the spelling that chose it (`--use_peft`, `--use_lora`, `--switch_lora`),
because the older code bases differed; `defaults` says how. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft_pretraining.flags import (
    Given,
    boolean,
    choice,
    fraction_below_one,
    integer,
    non_negative_int,
    positive_float,
    setting,
)

if TYPE_CHECKING:
    from peft_pretraining.config import Config

FACTOR_METHODS = ("lora", "relora", "switchlora", "golore_adapter")
_NEAR_ZERO = 0.05
"""A rate after a merge above this share of the peak is worth a warning."""


def _freeze_length(text: str) -> int:
    if (value := integer(text)) < -1 or value == 0:
        raise ValueError("must be a positive integer, or -1 for a reset without freezing")
    return value


@dataclass(frozen=True)
class FactorConfig:
    relora: int = setting(0, non_negative_int, "ReLoRA: updates between merges; selects it with --use_peft")
    lora_alpha: float = setting(32.0, positive_float, "scale of the factors, s = lora_alpha / rank")
    lora_dropout: float = setting(0.0, fraction_below_one, "dropout on the input of the factors")
    lora_plus_ratio: float = setting(1.0, positive_float, "learning rate of B over that of A (LoRA+)")
    dense_lr_ratio: float = setting(
        1.0, positive_float, "learning rate of everything without factors (embeddings, norms, head) over that of A"
    )
    init_lora_type: str = setting(
        "origin_lora",
        choice("origin_lora", "switchlora"),
        "first factors: origin_lora (A Kaiming uniform, B zero) or switchlora (both uniform, W - sBA stays frozen)",
    )
    zero_init_B: bool = setting(False, boolean, "start with B = 0; SwitchLoRA then never switches B")
    train_scaling: bool = setting(False, boolean, "train the scale: s = tanh(p), p = 1 at first")
    force_keep_original: bool = setting(False, boolean, "keep W beside the factors (always so without --lora_only)")
    force_disable_candidates: bool = setting(False, boolean, "LoRA without pools of candidates (it never has any here)")
    lora_only: bool = setting(False, boolean, "drop W: a network of products of low rank")
    quantize: str | None = setting(None, choice("4bit", "8bit"), "bits of the frozen weights: 4bit or 8bit")
    use_double_quant: bool = setting(False, boolean, "quantise the constants of 4-bit weights, too")
    reset_optimizer_on_relora: bool = setting(True, boolean, "ReLoRA: zero the factors' moments at each reset")
    optimizer_random_pruning: float = setting(
        0.0, fraction_below_one, "ReLoRA: zero this random fraction of the moments instead"
    )
    optimizer_magnitude_pruning: float = setting(
        0.0, fraction_below_one, "ReLoRA: zero the moments below this quantile of their magnitude instead"
    )
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
    check_rank_sync: int = setting(
        0, non_negative_int, "compare the layers with factors over the ranks every so many updates; 0: never"
    )


def _is_set(given: Mapping[str, Given], name: str) -> bool:
    return name in given and bool(given[name].value)


def defaults(given: Mapping[str, Given], method: str) -> dict[str, Any]:
    """Defaults that differ from `config.py`'s, for settings that were not given."""
    found: dict[str, Any] = {}
    if method == "switchlora" or (method == "lora" and _is_set(given, "use_lora")):
        found |= {"lora_alpha": 1.0, "init_lora_type": "switchlora"}
    if method in ("switchlora", "lora") and (_is_set(given, "use_lora") or _is_set(given, "switch_lora")):
        found |= {"warmup_steps": 100, "min_lr_ratio": 0.0}
    if _is_set(given, "optimizer_random_pruning") or _is_set(given, "optimizer_magnitude_pruning"):
        found["reset_optimizer_on_relora"] = False
    return found


def unread(given: Mapping[str, Given], method: str) -> set[str]:
    """Settings among a method's options that it does not read when chosen with this spelling."""
    if method != "relora":
        return set()
    found = set() if _is_set(given, "Relora") else {"scale"}
    return found | ({"update_proj_gap"} if _is_set(given, "relora") else set())


def resolve(config: Config, given: Mapping[str, Given], problems: list[str]) -> Config:
    """Settle what follows from other settings, and check the whole; only for a method with factors."""
    method = config.method.method
    if method not in FACTOR_METHODS:
        return config
    if method == "relora":
        config = _resolve_relora(config, given, problems)
    factors = config.factors
    if factors.lora_only and method != "lora":
        problems.append(f"--lora_only: method {method} changes the frozen weights, which --lora_only drops")
    if factors.lora_only and factors.force_keep_original:
        problems.append("--lora_only drops the weights that --force_keep_original keeps: give one of them")
    if factors.lora_only and factors.quantize:
        problems.append(f"--quantize {factors.quantize}: --lora_only leaves no frozen weights to quantise")
    if factors.quantize and method in ("switchlora", "golore_adapter"):
        problems.append(
            f"--quantize {factors.quantize}: method {method} adds to the frozen weights all the time, and quantising "
            "them again each time would lose what it adds"
        )
    if factors.use_double_quant and factors.quantize != "4bit":
        problems.append("--use_double_quant needs --quantize 4bit")
    if method == "switchlora":
        _check_switching(config, given, problems)
    if method == "golore_adapter" and factors.lora_plus_ratio != 1:
        problems.append(
            f"--lora_plus_ratio {factors.lora_plus_ratio:g}: method golore_adapter trains one factor of each layer, A "
            "or B by its shape, so there is no rate of B over that of A"
        )
    if method == "golore_adapter" and config.method.clip_norm == "full":
        problems.append("--clip_norm full: method golore_adapter never forms the full gradients of ordinary updates")
    return config


def _resolve_relora(config: Config, given: Mapping[str, Given], problems: list[str]) -> Config:
    factors, changes = config.factors, {}
    if _is_set(given, "Relora"):  # GoLore's spelling: its gap and its scale
        changes["relora"] = factors.relora or config.method.update_proj_gap
        if "scale" in given and "lora_alpha" in given:
            problems.append("--scale and --lora_alpha both set ReLoRA's scale: give one of them")
        elif "lora_alpha" not in given:
            changes["lora_alpha"] = config.method.scale * config.method.rank
    elif not factors.relora and "update_proj_gap" in given:
        changes["relora"] = config.method.update_proj_gap
    config = config.replace(**changes)
    if not config.factors.relora:
        problems.append("--relora N, the number of updates between merges, is required for method relora")
    elif config.schedule.scheduler == "cosine_restarts" and config.schedule.cycle_length is None:
        config = config.replace(cycle_length=config.factors.relora)
    if factors.optimizer_random_pruning and factors.optimizer_magnitude_pruning:
        problems.append("--optimizer_random_pruning and --optimizer_magnitude_pruning: give one of them")
    for name in ("optimizer_random_pruning", "optimizer_magnitude_pruning"):
        if getattr(factors, name) and factors.reset_optimizer_on_relora:
            problems.append(f"--reset_optimizer_on_relora True leaves nothing for --{name} to prune: give one of them")
    return config


def _check_switching(config: Config, given: Mapping[str, Given], problems: list[str]) -> None:
    from peft_pretraining.methods.switch_schedule import SwitchSchedule

    factors = config.factors
    if factors.force_disable_candidates:
        problems.append("--force_disable_candidates leaves method switchlora nothing to switch")
    for remain, zero in (
        ("remain_switch_state", "zero_switch_state"),
        ("remain_switch_step_state", "zero_switch_step_state"),
    ):
        if getattr(factors, remain) and _is_set(given, zero):
            problems.append(f"--{remain} and --{zero} are opposites: give one of them")
        if zero in given and not given[zero].value and not getattr(factors, remain):
            problems.append(f"--{zero} False: say --{remain}")
    interval = SwitchSchedule.of(config, config.schedule.num_training_steps).interval(0)
    if interval < 2 * factors.adam_warm_step:
        problems.append(
            f"--switch_lora_interval {factors.switch_lora_interval:g} gives {interval:g} updates between two switches "
            f"of a vector; it must be at least twice --adam_warm_step {factors.adam_warm_step}"
        )


def warnings(config: Config) -> list[str]:
    """What is likely to be a mistake, though it can be done."""
    from peft_pretraining.config.schedule import rate_multiplier

    method, merge_every, total = config.method.method, config.factors.relora, config.schedule.num_training_steps
    if method != "relora" or not 0 < merge_every < total:
        return []
    rate = rate_multiplier(merge_every, config.schedule, total)
    if rate <= _NEAR_ZERO:
        return []
    return [
        f"the first update after a merge (update {merge_every}) runs at {rate:.2g} of --lr: the new factors have no "
        "warm-up; --scheduler cosine_restarts with --restart_warmup_steps gives them one"
    ]
