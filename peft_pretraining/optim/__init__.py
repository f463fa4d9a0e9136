"""Optimizers: one for projected gradients, put together from basis rules and update rules."""

from peft_pretraining.optim.low_rank import LowRankOptimizer

__all__ = ["LowRankOptimizer"]
