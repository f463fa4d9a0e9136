"""What the parameter groups of every method say: dtypes of states, and rates of embedding, head and norms."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from torch import nn

from peft_pretraining.methods.registry import METHODS
from peft_pretraining.optim.model_groups import role_settings, roles_of, split_by_role

if TYPE_CHECKING:
    from peft_pretraining.config import Config

log = logging.getLogger("peft_pretraining")

_ROLES = {"head_": "head", "embed_": "embedding", "norm_": "norms"}
"""Beginnings of settings' names -> whose they are."""


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
    config: Config, model: nn.Module, group: dict[str, Any], matrices: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """A group of named parameters, with `state_settings` and split where the run's settings give some of them a rate or
    decay of their own.

    `matrices`: names of the weights that have the base rate; None for all that are neither the head's nor a table.
    Settings of a role that no trained weight of the model has are named in a warning.
    """
    group = {**state_settings(config), **group}
    given = {name: value for name, value in dataclasses.asdict(config.roles).items() if value is not None}
    if not given:
        return [group]
    roles = roles_of(model, matrices or ())
    if matrices is None:
        roles = {name: role.replace("others", "matrices") for name, role in roles.items()}
    there = {roles[name] for name, param in model.named_parameters() if param.requires_grad}
    absent = tuple(start for start, role in _ROLES.items() if role not in there)
    if unused := [f"--{name}" for name in given if name.startswith(absent)]:
        why = "the model trains no such weights apart (a tied embedding is the head)"
        log.warning("without effect, for %s: %s", why, ", ".join(unused))
    return split_by_role(group, roles, role_settings(**given))
