"""Rates and decays of their own for embedding, head and norms, in every method."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from torch import nn

from peft_pretraining.optim.model_groups import TARGET_MODULES, role_settings, roles_of, split_by_role

if TYPE_CHECKING:
    from peft_pretraining.config import Config

_SETTINGS = (
    "adam_lr",
    "head_lr",
    "embed_lr",
    "norm_lr",
    "head_weight_decay",
    "embed_weight_decay",
    "norm_weight_decay",
)


def by_role(
    config: Config, model: nn.Module, group: dict[str, Any], matrices: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """A group of named parameters, split where the run's settings give some of them a rate or decay of their own.

    `matrices`: names of the weights that have the base rate; None for those of attention and MLPs.
    """
    settings = role_settings(**{name: getattr(config.optimizer, name) for name in _SETTINGS})
    if not settings:
        return [group]
    if matrices is None:
        named = model.named_parameters()
        matrices = {name for name, p in named if p.ndim == 2 and any(part in name for part in TARGET_MODULES)}
    return split_by_role(group, roles_of(model, matrices), settings)
