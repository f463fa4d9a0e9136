"""Optimizers: one for projected gradients, put together from basis rules and update rules.

Imports of the package: `distributed`, `models`, `rng`.
"""

from peft_pretraining.optim.low_rank import LowRankOptimizer
from peft_pretraining.optim.low_rank_gradients import LowRankGradients
from peft_pretraining.optim.per_layer import PerLayerUpdates

__all__ = ["LowRankGradients", "LowRankOptimizer", "PerLayerUpdates"]
