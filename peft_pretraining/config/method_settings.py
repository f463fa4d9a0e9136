"""The settings of the chosen method and update rule, and what their specs say of them.

Pre-training and fine-tuning share it. Nothing here knows a method's name. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from peft_pretraining.config import Config, legacy
from peft_pretraining.flags import ParsedFlag
from peft_pretraining.methods import METHODS

TABLES = {"head": "head_optimizer", "embedding": "embed_optimizer"}
"""Role -> the setting that says what updates it."""


def settle(
    given: Mapping[str, ParsedFlag], chosen: legacy.Selection, defaults: Mapping[str, Any], problems: list[str]
) -> tuple[dict[str, Any], set[str]]:
    """Every setting that is not at its dataclass's default: what was given, over what the method, the spelling and
    `defaults`, in this order, have for it.

    Returns settings by name, and those of `given` that were read under another name.
    """
    spec = METHODS.get(chosen.method)
    base = {**defaults, **(spec.defaults if spec else {})}
    translated, read = legacy.translate(given, chosen, base, problems)
    settings = {**base, **translated, **{name: item.value for name, item in given.items()}}
    if chosen.per_layer:
        if settings.get("per_layer") is False:
            problems.append(f"--optimizer {given['optimizer'].value} and --per_layer False contradict each other")
        settings["per_layer"] = True
    return {**settings, "method": chosen.method, "optimizer": chosen.rule}, read


def resolve(config: Config, given: Mapping[str, ParsedFlag]) -> Config:
    """Settle what follows from other settings of the method."""
    spec = METHODS.get(config.method.method)
    return spec.resolve(config, given) if spec and spec.resolve else config


def check(config: Config, given: Mapping[str, ParsedFlag], problems: list[str], warnings: list[str]) -> None:
    """Settings of the method against each other, its values, and settings of others that it refuses."""
    spec = METHODS.get(config.method.method)
    if spec is None:
        return
    for name, values in spec.values.items():
        if name in given and given[name].value not in values:
            problems.append(f"--{name} {given[name].value}: {spec.name} has {', '.join(values)}")
    for name in refused(config, given):
        value = given[name].value
        shown = "" if value is True else f" {value:g}" if isinstance(value, float) else f" {value}"
        problems.append(f"--{name}{shown}: {spec.refused[name].format(name=spec.name)}")
    if config.per_layer and not spec.allows.per_layer:
        problems.append(f"--per_layer: method {spec.name} does not declare that weights may move in the backward pass")
    if getattr(config.method, "quantize", None) and not spec.allows.quantized_weights:
        problems.append(f"--quantize: method {spec.name} does not declare that its frozen weights may be quantised")
    _check_tables(config, given, problems, warnings)
    if spec.check:
        spec.check(config, given, problems, warnings)


def _check_tables(config: Config, given: Mapping[str, ParsedFlag], problems: list[str], warnings: list[str]) -> None:
    """What is to update the head and the embedding."""
    spec = METHODS[config.method.method]
    for role, name in TABLES.items():
        if getattr(config.roles, name) != "method":
            continue
        if not spec.allows.tables:
            problems.append(f"--{name} method: {spec.name} does not declare that it can update the {role}")
        elif role in spec.tables and name in given:
            warnings.append(f"without effect for method {spec.name}, where auto is the same: --{name}")


def refused(config: Config, given: Mapping[str, ParsedFlag]) -> list[str]:
    """Settings of other methods that are given, ask for something, and are an error beside this method."""
    spec = METHODS[config.method.method]
    return [name for name in spec.refused if name in given and given[name].value != _default(name)]


def _default(name: str) -> Any:
    """That of a setting in whichever method has it."""
    fields = (item for spec in METHODS.values() for item in dataclasses.fields(spec.settings))
    return next(item.default for item in fields if item.name == name)


def identity(config: Config) -> dict[str, Any]:
    """Those settings of method and update rule that a run must share with the one that it goes on from."""
    names = METHODS[config.method.method].identity_names
    chosen = {"method": config.method.method, "optimizer": config.optimizer.optimizer}
    values = {name: getattr(config.method, name) for name in names}
    values |= {name: getattr(config.roles, name) for name in TABLES.values()}
    return {**chosen, **{name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}}
