"""Which settings act when: whatever else is given is named in a warning, never ignored unsaid.

A method and its update rule read the settings that `methods/__init__.py` lists. Of those, and of the rest, some act
only beside others; `CONDITIONS` says beside which. A test flips every setting of every method and looks whether the
numbers of a run change, or whether it is told here that they do not. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from peft_pretraining.config import Config, factor_config
from peft_pretraining.flags import Given
from peft_pretraining.methods import METHODS, RULE_SETTINGS

_CYCLIC = ("cosine", "cosine_restarts")


@dataclass(frozen=True)
class Condition:
    """Settings that act only under a condition."""

    names: tuple[str, ...]
    acts: Callable[[Config], bool]
    otherwise: str
    """What goes after "without effect"; may name settings in braces."""


def _tracks(config: Config) -> bool:
    return config.tracking.with_tracking or config.tracking.wandb_project is not None


def _learns_by_pca(config: Config) -> bool:
    return config.method.proj_type.startswith("continuous")


def _is_golore(config: Config) -> bool:
    return config.method.method in ("golore", "golore_adapter")


def _reads_gradients(config: Config) -> bool:
    """Whether any basis comes from gradients."""
    method = config.method
    return method.proj_type != "random" and not (_is_golore(config) and method.rand_ratio == 0)


def _restarts(config: Config) -> bool:
    """Whether the schedule has cycles of its own; ReLoRA's are as long as the time between merges."""
    return config.schedule.cycle_length is not None or config.method.method == "relora"


def _only_warms_up_restarts(config: Config) -> bool:
    return config.schedule.scheduler == "cosine_restarts" and config.method.method != "relora"


METHOD_CONDITIONS = (
    Condition(("init_lora_type", "zero_init_B"), lambda c: not c.factors.lora_only, "with --lora_only"),
    Condition(
        ("zero_init_B",),
        lambda c: c.factors.init_lora_type != "origin_lora" or c.method.method == "switchlora",  # which switches no B
        "with --init_lora_type origin_lora, whose B is zero",
    ),
    Condition(
        ("switch_lora_descent_rate", "switch_descend_type"),
        lambda c: not c.factors.fix_switch_lora_interval,
        "with --fix_switch_lora_interval",
    ),
    Condition(
        ("lora_alpha", "scale"),
        lambda c: not (c.factors.train_scaling and c.method.method in ("lora", "relora")),
        "with --train_scaling, whose scale is tanh(1) at first",
    ),
    Condition(
        ("remain_switch_step_state",), lambda c: not c.factors.remain_switch_state, "beside --remain_switch_state"
    ),
    Condition(("refresh_accumulation",), _reads_gradients, "for random bases"),
    Condition(  # the older `--proj_type random` takes singular vectors of random matrices
        ("svd_method",), lambda c: _reads_gradients(c) or c.method.proj_type == "random", "for random bases"
    ),
    Condition(
        ("rand_ratio",),
        lambda c: c.method.update_proj_gap != 0 or c.method.rand_ratio == 0,
        "beside a first basis that is kept for good",
    ),
    Condition(("stagger_refresh",), lambda c: not _learns_by_pca(c), "for --proj_type {proj_type}"),
    Condition(
        ("stagger_refresh",),
        lambda c: c.method.update_proj_gap > 1 or c.method.per_layer,
        "where all layers are due together",
    ),
)
"""For the methods' settings, which fine-tuning has, too."""

CONDITIONS = (
    Condition(("min_lr_ratio",), lambda c: c.schedule.scheduler in _CYCLIC, "with --scheduler {scheduler}"),
    Condition(
        ("cycle_length",),  # ReLoRA resets moments by it
        lambda c: c.schedule.scheduler in _CYCLIC or c.method.method == "relora",
        "with --scheduler {scheduler}",
    ),
    Condition(
        ("restart_warmup_steps", "adjust_step"),
        lambda c: c.schedule.scheduler == "cosine_restarts",
        "with --scheduler {scheduler}",
    ),
    Condition(("restart_warmup_steps",), lambda c: _restarts(c), "without --cycle_length: the run is one cycle"),
    Condition(
        ("cycle_length",),
        lambda c: not _only_warms_up_restarts(c) or c.schedule.restart_warmup_steps > 0,
        "with --scheduler cosine_restarts, whose restarts are nothing without --restart_warmup_steps",
    ),
    Condition(
        ("max_document_mb",),
        lambda c: c.data.dataset_path is None or c.data.from_json_data,
        "with blocks that are tokenised already",
    ),
    Condition(("name", "tags", "comment", "wandb_watch"), _tracks, "without --with_tracking"),
    Condition(("allow_restart",), lambda c: c.run.autoresume, "without --autoresume True"),
)
"""For the settings of pre-training alone."""


def _read_by_method(given: Mapping[str, Given], config: Config) -> set[str]:
    """What the method and its update rule read, of `_of_methods`."""
    entry = METHODS[config.method.method]
    every_rule = {name for names in RULE_SETTINGS.values() for name in names}
    options = set(entry.options) - factor_config.unread(given, config.method.method)
    read = {*options, *RULE_SETTINGS.get(config.optimizer.optimizer, every_rule)}
    if config.method.method != "full_rank" and config.optimizer.optimizer == "sgd":
        read.discard("beta1")
    if config.optimizer.optimizer == "lion":
        read.discard("scale")  # it moves every weight by the sign of the update
    return read


def _of_methods(config: Config) -> set[str]:
    """Settings that belong to methods and update rules."""
    every_rule = {name for names in RULE_SETTINGS.values() for name in names}
    return (set(vars(config.method)) | set(vars(config.factors)) | every_rule) - {"method"}


def warn_without_effect(given: Mapping[str, Given], config: Config, warnings: list[str]) -> None:
    """One warning for all settings that the chosen method does not read, and one for each other reason."""
    if config.method.method not in METHODS:
        return
    read, of_methods = _read_by_method(given, config), _of_methods(config)
    asked_for = [name for name in given if not _states_the_default(name, given[name].value)]
    if unread := [name for name in asked_for if name in of_methods and name not in read]:
        how = f"for method {config.method.method} with {config.optimizer.optimizer}"
        warnings.append(_without_effect(how, unread, given))
    _warn(METHOD_CONDITIONS, [name for name in asked_for if name in read], given, config, warnings)


def warn_without_effect_in_pretraining(given: Mapping[str, Given], config: Config, warnings: list[str]) -> None:
    """Warnings about the settings that belong to no method."""
    asked_for = [name for name in given if not _states_the_default(name, given[name].value)]
    _warn(CONDITIONS, asked_for, given, config, warnings)
    if "model_revision" in given and not config.model.model_name_or_path:
        warnings.append("--model_revision has no effect without --model_name_or_path")
    if "with_tracking" in given and not given["with_tracking"].value and config.tracking.wandb_project:
        warnings.append("without effect beside --wandb_project, which implies tracking: --with_tracking False")


def _warn(
    conditions: tuple[Condition, ...],
    names: list[str],
    given: Mapping[str, Given],
    config: Config,
    warnings: list[str],
) -> None:
    """One warning for each reason; a setting is named in the first that holds."""
    reasons: dict[str, list[str]] = {}
    settings, named = config.settings(), set()
    for condition in conditions:
        found = [name for name in names if name in condition.names and name not in named]
        if found and not condition.acts(config):
            reasons.setdefault(condition.otherwise.format(**settings), []).extend(found)
            named.update(found)
    warnings += [_without_effect(reason, found, given) for reason, found in reasons.items()]


def _without_effect(reason: str, names: list[str], given: Mapping[str, Given]) -> str:
    return f"without effect {reason}: {', '.join(sorted(f'--{given[name].spelling}' for name in names))}"


def _states_the_default(name: str, value: Any) -> bool:
    """`--flag False` of a switch that is off by itself asks for nothing."""
    return value is False and _SWITCHES_ON.get(name) is not True


_SWITCHES_ON = {name: default for name, default in vars(Config.from_settings({}).factors).items() if default is True}
