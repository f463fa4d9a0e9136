"""Which settings act when: whatever else is given is named in a warning, never ignored unsaid.

A method and its update rule read the settings of their own dataclasses. Of those, and of the rest, some act only
beside others: the methods' specs say beside which, and `CONDITIONS` for the rest. A test flips every setting of every
method and looks whether the numbers of a run change, or whether it is told here that they do not. Nothing here imports
torch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

from peft_pretraining.config import Config, method_settings
from peft_pretraining.flags import Condition, ParsedFlag
from peft_pretraining.methods import METHODS
from peft_pretraining.optim.rule_settings import RULES

_CYCLIC = ("cosine", "cosine_restarts")


def _tracks(config: Config) -> bool:
    return "wandb" in config.tracking.trackers


def _restarts(config: Config) -> bool:
    """Whether the schedule has cycles; some methods make them as long as their own."""
    return config.schedule.cycle_length is not None or _has_cycles_of_its_own(config)


def _has_cycles_of_its_own(config: Config) -> bool:
    spec = METHODS.get(config.method.method)
    return spec is not None and "cycle_length" in spec.reads


def _only_warms_up_restarts(config: Config) -> bool:
    return config.schedule.scheduler == "cosine_restarts" and not _has_cycles_of_its_own(config)


def _has_narrow_weights(config: Config) -> bool:
    return config.precision.precision in ("bf16", "bf16_sr")


def _keeps_bases(config: Config) -> bool:
    spec = METHODS.get(config.method.method)
    return spec is None or spec.allows.stored_bases


_AS_WEIGHTS = "with --precision {precision}, whose states and bases are in the weights' dtype, float32 or better"

CONDITIONS = (
    Condition(("state_dtype",), _has_narrow_weights, _AS_WEIGHTS),
    Condition(
        ("lean_layers",),
        lambda c: c.model.lean_layers != "off" or c.precision.precision not in ("mixed", "bf16_sr"),
        "with --precision {precision}, whose norms and MLPs always keep less",
    ),
    Condition(("basis_dtype",), _keeps_bases, "with --method {method}, which keeps no bases"),
    Condition(
        ("basis_dtype",), lambda c: c.precision.basis_dtype in ("auto", "int8") or _has_narrow_weights(c), _AS_WEIGHTS
    ),
    Condition(
        ("matmul_precision",),
        lambda c: c.precision.precision == "fp32",
        "with --precision {precision}: it is for the float32 products of fp32, on CUDA",
    ),
    Condition(("min_lr_ratio",), lambda c: c.schedule.scheduler in (*_CYCLIC, "wsd"), "with --scheduler {scheduler}"),
    Condition(
        ("cycle_length",),
        lambda c: c.schedule.scheduler in _CYCLIC or _has_cycles_of_its_own(c),
        "with --scheduler {scheduler}",
    ),
    Condition(
        ("restart_warmup_steps", "adjust_step"),
        lambda c: c.schedule.scheduler == "cosine_restarts",
        "with --scheduler {scheduler}",
    ),
    Condition(
        ("decay_steps", "decay_ratio", "decay_shape"),
        lambda c: c.schedule.scheduler == "wsd",
        "with --scheduler {scheduler}",
    ),
    Condition(("decay_ratio",), lambda c: c.schedule.decay_steps is None, "beside --decay_steps {decay_steps}"),
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
    Condition(("name", "tags", "comment", "wandb_watch"), _tracks, "without --tracker wandb"),
    Condition(("older_eval_names",), lambda c: bool(c.tracking.trackers), "without --tracker"),
    Condition(("sample_prompts",), lambda c: c.tracking.sample_every > 0, "without --sample_every"),
    Condition(("allow_restart",), lambda c: c.run.autoresume, "without --autoresume True"),
    Condition(
        ("allow_redecay",),
        lambda c: c.run.autoresume or c.run.resume_from is not None,
        "without --autoresume True or --resume_from",
    ),
)
"""For the settings of pre-training alone."""


def _read_by_method(config: Config) -> set[str]:
    """Settings that the method and its update rule read."""
    spec = METHODS[config.method.method]
    rule = RULES.get(config.optimizer.optimizer)
    if rule is None:  # which was a problem already
        return {*spec.own, *_of_rules()}
    return {*spec.own, *rule.reads} - {*rule.unread}


def _of_rules() -> set[str]:
    return {name for rule in RULES.values() for name in rule.reads}


def warn_without_effect(
    given: Mapping[str, ParsedFlag], config: Config, read_otherwise: Iterable[str], warnings: list[str]
) -> None:
    """One warning for all settings that the chosen method does not read, and one for each other reason.

    read_otherwise: given settings that were read under another name.
    """
    if config.method.method not in METHODS:
        return
    spec = METHODS[config.method.method]
    read = _read_by_method(config) | set(read_otherwise)
    of_methods = {name for other in METHODS.values() for name in other.own} | _of_rules()
    errors = method_settings.refused(config, given)
    asked_for = [name for name in given if not _states_the_default(name, given[name].value)]
    if unread := [name for name in asked_for if name in of_methods and name not in read and name not in errors]:
        how = f"for method {config.method.method} with {config.optimizer.optimizer}"
        warnings.append(_without_effect(how, unread, given))
    named = [name for name in asked_for if name in read or name not in of_methods]
    _warn(spec.conditions, named, given, config, warnings)


def warn_without_effect_in_pretraining(given: Mapping[str, ParsedFlag], config: Config, warnings: list[str]) -> None:
    """Warnings about the settings that belong to no method."""
    asked_for = [name for name in given if not _states_the_default(name, given[name].value)]
    _warn(CONDITIONS, asked_for, given, config, warnings)
    if "model_revision" in given and not config.model.model_name_or_path:
        warnings.append("--model_revision has no effect without --model_name_or_path")
    if "with_tracking" in given and not given["with_tracking"].value and config.tracking.wandb_project is not None:
        warnings.append("without effect beside --wandb_project, which implies tracking: --with_tracking False")


def _warn(
    conditions: tuple[Condition, ...],
    names: list[str],
    given: Mapping[str, ParsedFlag],
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


def _without_effect(reason: str, names: list[str], given: Mapping[str, ParsedFlag]) -> str:
    return f"without effect {reason}: {', '.join(sorted(f'--{given[name].spelling}' for name in names))}"


def _states_the_default(name: str, value: Any) -> bool:
    """`--flag False` of a switch that is off by itself asks for nothing."""
    return value is False and name not in _switches_that_are_on()


@functools.cache
def _switches_that_are_on() -> frozenset[str]:
    fields = (item for spec in METHODS.values() for item in dataclasses.fields(spec.settings))
    return frozenset(item.name for item in fields if item.default is True)
