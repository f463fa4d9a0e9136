"""AdEMAMix: AdamW with a second, slow first moment (Pagliardini, Ablin & Grangier, arXiv 2409.03137, algorithm 1).

At update t = 1, 2, ..., for a gradient G of any shape:

    M1 <- β1 M1 + (1 - β1) G                                  the fast moment
    M2 <- β3(t) M2 + (1 - β3(t)) G                            the slow one
    V  <- β2 V + (1 - β2) G²
    W  <- W - lr ((M1 / (1 - β1^t) + α(t) M2) / (√(V / (1 - β2^t)) + ε) + λ W)

M2 has no bias correction: α(t) begins near 0. Both rise over T updates (section 3):

    α(t)  = α min(t / T, 1)
    β3(t) = min(exp(ln β1 ln β3 / ((1 - t/T) ln β3 + t/T ln β1)), β3)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_pretraining.distributed.sharding import WHOLE, ShardInfo
from peft_pretraining.methods.base import TrainingMethod
from peft_pretraining.methods.groups import by_role
from peft_pretraining.optim import Direction, LowRankOptimizer, ParamUpdate, StateTensor, UpdateRule


class AdEMAMix(UpdateRule):
    """What becomes of a gradient. All of it is elementwise, so that any part of a matrix can be updated by itself."""

    decays_first = True  # λ W is taken of the weight before the update
    betas = (0.9, 0.999)
    _MOMENTS = ("exp_avg", "exp_avg_slow", "exp_avg_sq")  # M1, M2, V

    def __init__(self, alpha: float, beta3: float, warmup: int):
        self.alpha, self.beta3, self.warmup = alpha, beta3, warmup

    def declare_state(self, like: Tensor, group: dict[str, Any], shard: ShardInfo = WHOLE) -> dict[str, StateTensor]:
        return {key: StateTensor.like_gradient(torch.zeros_like(like), shard) for key in self._MOMENTS}

    def directions(self, updates: Sequence[ParamUpdate], group: dict[str, Any]) -> list[Direction | None]:
        return [Direction(self._direction(update, group), update.rate) for update in updates]

    def _direction(self, update: ParamUpdate, group: dict[str, Any]) -> Tensor:
        """What lr is multiplied by, but for the decay."""
        grad, state, t = update.low_rank_grad, update.state, update.k
        beta1, beta2 = group["betas"]
        fast = state["exp_avg"].lerp_(grad, 1 - beta1)
        slow = state["exp_avg_slow"].lerp_(grad, 1 - self.beta3_at(t, beta1))
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (square / (1 - beta2**t)).sqrt_().add_(group["eps"])
        return (fast / (1 - beta1**t)).add_(slow, alpha=self.alpha_at(t)).div_(root)

    def alpha_at(self, t: int) -> float:
        """α(t)."""
        return self.alpha * min(t / self.warmup, 1.0)

    def beta3_at(self, t: int, beta1: float) -> float:
        """β3(t): from β1 to β3, so that the moment's half-life rises in a straight line."""
        if t >= self.warmup or 0.0 in (beta1, self.beta3):
            return self.beta3
        share, log1, log3 = t / self.warmup, math.log(beta1), math.log(self.beta3)
        return min(math.exp(log1 * log3 / ((1 - share) * log3 + share * log1)), self.beta3)


class AdEMAMixTraining(TrainingMethod[LowRankOptimizer]):
    """Every parameter of the model is updated by the rule above, and none through a projection."""

    def build_optimizer(self, model: nn.Module) -> LowRankOptimizer:
        own, settings = self.config.method, self.config.optimizer
        warmup = own.ademamix_warmup or self.config.schedule.num_training_steps
        return LowRankOptimizer(
            by_role(self.config, model, {"params": list(model.named_parameters())}),
            rule=AdEMAMix(own.ademamix_alpha, own.ademamix_beta3, warmup),
            lr=settings.lr,
            **self.config.rule.arguments(),
            weight_decay=settings.weight_decay,
        )
