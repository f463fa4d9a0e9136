"""What the parameter groups of every method say: dtypes of states, and rates of embedding, head and norms."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from torch import nn

from peft_pretraining.methods.registry import METHODS
from peft_pretraining.optim.model_groups import role_settings, roles_of, split_by_role

if TYPE_CHECKING:
    from peft_pretraining.config import Config

log = logging.getLogger("peft_pretraining")

_ROLES = {"head_": "head", "embed_": "embedding", "norm_": "norms"}
"""Beginnings of settings' names -> whose they are."""
_TABLES = {"head_": "head_optimizer", "embed_": "embed_optimizer"}
_ADAMW = ("adamw", "adam_zero")
"""Update rules that are AdamW already."""


def state_settings(config: Config) -> dict[str, Any]:
    """What every parameter group says of the dtypes of its states and bases, and of the rounding of its weights.

    Empty where all is as published, or nothing can be rounded: saved groups of runs without these settings fit.
    """
    precision, basis_dtype = config.resolved_precision(), config.precision.basis_dtype
    settings: dict[str, Any] = {}
    if precision.state_format != "published":
        settings["state_format"] = precision.state_format
    if precision.rounding != "nearest":
        settings |= {"rounding": precision.rounding, "seed": config.run.seed}
    if basis_dtype != "auto" and METHODS[config.method.method].allows.stored_bases:
        settings["basis_dtype"] = basis_dtype
    return settings


def by_role(
    config: Config,
    model: nn.Module,
    group: dict[str, Any],
    matrices: Collection[str] | None = None,
    *,
    method: Callable[[str], dict[str, Any]] | None = None,
    adamw: str = "adamw",
) -> list[dict[str, Any]]:
    """A group of named parameters, with `state_settings` and split where the run's settings give some of them an update
    rule, a rate or a decay of their own.

    `matrices`: names of the weights that have the base rate; None for all that are neither the head's nor a table.
    `method`: settings with which the method updates the head or the embedding; None if the group has them already.
    What the method updates has the base rate, unless it is given one of its own. `adamw`: the rule's name for those
    that are to have AdamW instead. Settings of a role that no trained weight of the model has are named in a warning.
    """
    group = {**state_settings(config), **group}
    given = {
        name: value
        for name, value in dataclasses.asdict(config.roles).items()
        if value is not None and (name not in _TABLES.values() or value != "auto")
    }
    tables = _tables(config, "rule" in group, method, adamw)
    if not given and not tables:
        return [group]
    roles = roles_of(model, matrices or ())
    if matrices is None:
        roles = {name: role.replace("others", "matrices") for name, role in roles.items()}
    there = {roles[name] for name, param in model.named_parameters() if param.requires_grad}
    absent = tuple(start for start, role in _ROLES.items() if role not in there)
    if unused := [f"--{name}" for name in given if name.startswith(absent)]:
        why = "the model trains no such weights apart (a tied embedding is the head)"
        log.warning("without effect, for %s: %s", why, ", ".join(unused))
    settings = role_settings(**{name: value for name, value in given.items() if name not in _TABLES.values()})
    for role, own in tables.items():
        settings[role] = {**settings.get(role, {}), **own}
    return split_by_role(group, roles, settings)


def _tables(
    config: Config, has_rule: bool, method: Callable[[str], dict[str, Any]] | None, adamw: str
) -> dict[str, dict[str, Any]]:
    """Role of a table -> the settings with which it is updated, where those are not the group's."""
    automatic, found = METHODS[config.method.method].tables, {}
    for start, name in _TABLES.items():
        role, choice = _ROLES[start], getattr(config.roles, name)
        if choice == "method" or (choice == "auto" and role in automatic):
            if method is not None:
                rate = getattr(config.roles, f"{start}lr")
                found[role] = {**method(role), "lr": config.optimizer.lr if rate is None else rate}
        elif choice == "adamw" and (has_rule or config.optimizer.optimizer not in _ADAMW):
            given = config.rule.arguments()  # of another rule, perhaps
            found[role] = {"rule": adamw, "betas": given.get("betas", (0.9, 0.999)), "eps": given.get("eps", 1e-8)}
    return found
