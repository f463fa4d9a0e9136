"""Optimizers: one for projected gradients, put together from basis rules and update rules.

Imports of the package: `distributed`, `flags`, `models`, `rng`. This module is free of torch, as `rule_settings` is:
the classes are imported when they are asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_pretraining.optim.low_rank import LowRankOptimizer
    from peft_pretraining.optim.low_rank_gradients import LowRankGradients
    from peft_pretraining.optim.per_layer import PerLayerUpdates

_MODULES = {"LowRankGradients": "low_rank_gradients", "LowRankOptimizer": "low_rank", "PerLayerUpdates": "per_layer"}

__all__ = ["LowRankGradients", "LowRankOptimizer", "PerLayerUpdates"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
