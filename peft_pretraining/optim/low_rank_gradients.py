"""Projected gradients that come from elsewhere than `param.grad`: from a reduction over ranks."""

from __future__ import annotations

from torch import Tensor

from peft_pretraining.optim.basis.subspace import Projected
from peft_pretraining.optim.low_rank import LowRankOptimizer


class LowRankGradients:
    """Projects the gradients of single ranks for a `LowRankOptimizer`, and hands it their mean.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(6, 4))
    >>> optimizer = LowRankOptimizer([{"params": [weight], "rank": 2, "proj_type": "random"}])
    >>> gradients, weight.grad = LowRankGradients(optimizer), torch.ones(6, 4)
    >>> low_rank = gradients.project(weight, weight.grad)  # to be averaged over the ranks
    >>> gradients.receive(weight, low_rank)
    >>> optimizer.step()
    >>> tuple(low_rank.shape)
    (6, 2)
    """

    def __init__(self, optimizer: LowRankOptimizer):
        self._optimizer = optimizer
        self._waiting: dict[Tensor, Projected] = {}

    def project(self, param: Tensor, grad: Tensor) -> Tensor | None:
        """R of one rank's gradient; None where there is no projection, and where this update needs G: for a basis that
        is taken from it, or because it is one of the group's that always do."""
        optimizer = self._optimizer
        if param not in optimizer.subspaces:
            return None
        group = optimizer.group_of(param)
        subspace, state, step = optimizer.subspaces[param], optimizer.local_state(param), optimizer.step_of(param)
        if optimizer.objects(param).reads_gradient:
            return None
        if subspace.refresh_reads_gradient(state, group, step):
            return None
        projected = self._waiting[param] = subspace.project(state, grad, group, step)
        projected.energy = None  # of one rank's gradient
        return projected.low_rank_grad

    def receive(self, param: Tensor, low_rank_grad: Tensor) -> None:
        """R, complete: what the next `step` uses."""
        projected = self._waiting.pop(param)
        projected.low_rank_grad = low_rank_grad
        self._optimizer.projected[param] = projected
