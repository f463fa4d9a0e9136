"""Optimizers: one that is put together from basis rules, update rules, lifts and state formats.

Imports of the package: `distributed`, `flags`, `models`, `rng`. This module is free of torch, as `rule_settings` is:
the classes are imported when they are asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_pretraining.optim.basis_rule import BasisRule, Refresh
    from peft_pretraining.optim.collectives import Collective
    from peft_pretraining.optim.lifts import Lift
    from peft_pretraining.optim.low_rank import LowRankOptimizer
    from peft_pretraining.optim.low_rank_gradients import LowRankGradients
    from peft_pretraining.optim.param_update import Direction, ParamUpdate
    from peft_pretraining.optim.per_layer import PerLayerUpdates
    from peft_pretraining.optim.state_tensor import StateTensor
    from peft_pretraining.optim.update_rule import UpdateRule

__all__ = [
    "BasisRule",
    "Collective",
    "Direction",
    "Lift",
    "LowRankGradients",
    "LowRankOptimizer",
    "ParamUpdate",
    "PerLayerUpdates",
    "Refresh",
    "StateTensor",
    "UpdateRule",
]

_MODULES = {
    "BasisRule": "basis_rule",
    "Refresh": "basis_rule",
    "Collective": "collectives",
    "Lift": "lifts",
    "LowRankOptimizer": "low_rank",
    "LowRankGradients": "low_rank_gradients",
    "Direction": "param_update",
    "ParamUpdate": "param_update",
    "PerLayerUpdates": "per_layer",
    "StateTensor": "state_tensor",
    "UpdateRule": "update_rule",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
