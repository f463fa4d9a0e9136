"""Optimizers: one that is put together from basis rules, update rules, lifts and state formats.

Here are the optimizers themselves; their parts lie in `state`, `basis`, `rules` and `tensors`, each of which imports
only what follows it. Imports of the package: `distributed`, `flags`, `models`, `rng`, `runtime`. This module is free of
torch, as `rule_settings` is: the classes are imported when they are asked for. So are the optimizers that methods bring
along (`library` in their specs): they are found by name, and nothing here knows them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_pretraining.optim.basis.basis_rule import BasisRule, Refresh
    from peft_pretraining.optim.low_rank import LowRankOptimizer
    from peft_pretraining.optim.low_rank_gradients import LowRankGradients
    from peft_pretraining.optim.matrix_optimizer import MatrixOptimizer
    from peft_pretraining.optim.model_groups import roles_of
    from peft_pretraining.optim.per_layer import PerLayerUpdates
    from peft_pretraining.optim.rules.batches import Batch, Batches
    from peft_pretraining.optim.rules.lifts import Lift
    from peft_pretraining.optim.rules.update_rule import UpdateRule
    from peft_pretraining.optim.tensors.collectives import Collective, Phases
    from peft_pretraining.optim.tensors.param_update import Direction, ParamUpdate
    from peft_pretraining.optim.tensors.state_tensor import StateTensor

__all__ = [
    "BasisRule",
    "Batch",
    "Batches",
    "Collective",
    "Direction",
    "Lift",
    "LowRankGradients",
    "LowRankOptimizer",
    "MatrixOptimizer",
    "ParamUpdate",
    "PerLayerUpdates",
    "Phases",
    "Refresh",
    "StateTensor",
    "UpdateRule",
    "roles_of",
]

_MODULES = {
    "BasisRule": "basis.basis_rule",
    "Refresh": "basis.basis_rule",
    "Collective": "tensors.collectives",
    "Phases": "tensors.collectives",
    "Batch": "rules.batches",
    "Batches": "rules.batches",
    "Lift": "rules.lifts",
    "LowRankOptimizer": "low_rank",
    "LowRankGradients": "low_rank_gradients",
    "MatrixOptimizer": "matrix_optimizer",
    "Direction": "tensors.param_update",
    "ParamUpdate": "tensors.param_update",
    "PerLayerUpdates": "per_layer",
    "StateTensor": "tensors.state_tensor",
    "UpdateRule": "rules.update_rule",
    "roles_of": "model_groups",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    if not name.startswith("_") and (found := _of_a_method(name)) is not None:
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _of_a_method(name: str) -> Any:
    """The optimizer that a method calls by this name."""
    methods = importlib.import_module("peft_pretraining.methods").METHODS
    for spec in methods.values():
        if spec.library == name:
            return getattr(importlib.import_module(methods.module_of(spec.name)), name)
    return None
