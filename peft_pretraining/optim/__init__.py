"""Optimizers: one that is put together from basis rules, update rules, lifts and state formats.

Imports of the package: `distributed`, `models`, `rng`.
"""

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
