"""What rules share that follow a matrix's mean gradient, and replace it by something of a size of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_pretraining.distributed.sharding import WHOLE, ShardInfo
from peft_pretraining.optim.rules.batches import Part
from peft_pretraining.optim.rules.update_rule import UpdateRule
from peft_pretraining.optim.tensors.param_update import ParamUpdate, guarded
from peft_pretraining.optim.tensors.state_tensor import StateTensor, zeros


class MomentumRule(UpdateRule):
    """M <- μ M + (1-μ) G, from zero; then U = (1-μ) G + μ M (`nesterov`), or U = M.

    There is no bias correction: what a subclass makes of U does not depend on U's size.
    """

    decays_first = True

    def __init__(self, momentum: float = 0.95, nesterov: bool = True):
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {momentum}")
        self.momentum, self.nesterov = momentum, nesterov

    def first_moment_decay(self, group: dict[str, Any]) -> float:
        return self.momentum

    def declare_state(self, like: Tensor, group: dict[str, Any], shard: ShardInfo = WHOLE) -> dict[str, StateTensor]:
        if like.ndim != 2:
            raise ValueError(f"{self.name} is for matrices, got a parameter of shape {tuple(like.shape)}")
        return {self.first_moment: StateTensor.like_gradient(zeros(like), shard)} if self.momentum else {}

    def followed(self, part: Part) -> Tensor:
        """U of these rows, after M has moved on. It may be the moment, or the gradient, itself."""
        grad = part.grad
        if not self.momentum:
            return grad
        moment = part.state(self.first_moment).lerp_(grad, 1 - self.momentum)
        return torch.lerp(grad, moment, self.momentum) if self.nesterov else moment

    def follow(self, updates: Sequence[ParamUpdate]) -> list[Tensor]:
        """U of each, after M has moved on. These may be the moments, or the gradients, themselves."""
        grads = [update.low_rank_grad for update in updates]
        if not self.momentum:
            return grads
        moments = [update.state[self.first_moment] for update in updates]
        with guarded(updates, self.first_moment):
            torch._foreach_lerp_(moments, grads, 1 - self.momentum)
        if not self.nesterov:
            return moments
        looked_ahead: list[Tensor] = list(torch._foreach_lerp(grads, moments, self.momentum))
        return looked_ahead
