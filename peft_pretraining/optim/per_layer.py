"""Updates inside the backward pass: each parameter moves as soon as its gradient is there, and the gradient is freed.

Introduced for large models by GaLore (arXiv 2403.03507, section 4.3). Between refreshes the micro-batches of an update
add up R, not G, in float32, so that no more than one full-size gradient of a projected weight exists at a time. G
itself is added up, in float32, only where it is needed: in layers whose basis becomes the SVD of their gradient, and in
all of them with clipping by the full gradient's norm. Online PCA needs G in every update, because its loss is not
linear in G; it saves memory only without accumulation. Parameters without a projection (embeddings, norms, head) keep
their gradient until the last micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peft_pretraining.distributed.sharding import Shard, local, whole_norm
from peft_pretraining.optim.low_rank import LowRankOptimizer
from peft_pretraining.optim.subspace import Projected


class PerLayerUpdates:
    """Drives a `LowRankOptimizer` from hooks on its parameters' gradients; its `step` then has nothing left to do.

    `reduce` averages a tensor over the ranks, in place. `clip` bounds the norm of each parameter's gradient (of R, or
    of G with `clip_full`), because the global norm is known only when the first parameters have moved; 0 is off.
    `early_first_bases` takes the very first SVD of each layer from the first micro-batch alone: otherwise all layers
    would add up full gradients in that update.

    For every update call `begin_update`, and `begin_micro_batch` before each forward pass. A parameter whose gradient
    is not finite stays as it is, with its refresh pending.
    """

    def __init__(
        self,
        optimizer: LowRankOptimizer,
        reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        *,
        clip: float = 0.0,
        clip_full: bool = False,
        early_first_bases: bool = True,
    ):
        self._optimizer, self._reduce, self._clip, self._clip_full = optimizer, reduce, clip, clip_full
        self._early_first_bases = early_first_bases
        self._sums: dict[Tensor, Tensor] = {}
        self._early: dict[Tensor, Projected] = {}
        self._squared_norms: list[Tensor] = []
        self._index, self._count, self._frozen = 0, 1, False
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.register_post_accumulate_grad_hook(lambda param, group=group: self._arrived(param, group))

    def begin_update(self, step: int, frozen: bool = False) -> None:
        """Before the first micro-batch of 0-based update `step`; `frozen` drops its gradients."""
        self._optimizer.begin_update(step)
        self._sums.clear()
        self._early.clear()
        self._squared_norms.clear()
        self._frozen = frozen

    def begin_micro_batch(self, index: int, count: int) -> None:
        """Before the forward pass of micro-batch `index` of `count`."""
        self._index, self._count = index, count

    def grad_norm(self) -> Tensor:
        """Global norm of this update's gradients before clipping: of R where there is a projection, else of G."""
        return torch.stack(self._squared_norms).sum().sqrt()

    @torch.no_grad()
    def _arrived(self, param: Tensor, group: dict[str, Any]) -> None:
        """The hook: the gradient of one micro-batch, in `param.grad`, added to those before for unprojected ones."""
        last = self._index == self._count - 1
        if group["rank"] is None:
            if last:
                self._move(param, group, self._reduce(local(param.grad)), None)
                param.grad = None
            return
        subspace, state = self._optimizer.subspaces[param], self._optimizer.state[param]
        grad, param.grad = local(param.grad), None
        full = self._needs_full_gradient(param, group, grad)
        part = grad if full else subspace.down(state, grad, self._early.get(param))
        if param in self._sums:
            self._sums[param].add_(part)
        else:
            # Whole gradients of all layers are kept in their own dtype, as autograd would: they are large.
            wide = torch.promote_types(part.dtype, torch.float32)
            self._sums[param] = part.to(wide if subspace.rule.refreshes else part.dtype)
        if not last:
            return
        total = self._reduce(self._sums.pop(param))
        if full:
            projected = subspace.project(state, total, group, self._optimizer.step_of(param))
        else:
            projected = self._early.pop(param, None) or Projected(total)
            projected.low_rank_grad = total.to(param.dtype)
        self._move(param, group, total if full else None, projected)

    def _needs_full_gradient(self, param: Tensor, group: dict[str, Any], grad: Tensor) -> bool:
        """Whether this update's G, not R, has to be added up; makes new bases early where that avoids it."""
        subspace, state = self._optimizer.subspaces[param], self._optimizer.state[param]
        step = self._optimizer.step_of(param)
        if self._clip_full or not subspace.rule.refreshes:
            return True
        if param in self._early or not subspace.refresh_is_due(state, group, step):
            return False
        reads, first = subspace.rule.reads_gradient(step), not int(state["refreshes"])
        if self._index == 0 and self._count > 1 and (not reads or (first and self._early_first_bases)):
            # Every rank must come to the same basis.
            early = subspace.project(state, self._reduce(grad.clone()) if reads else grad, group, step)
            if early.new_bases is not None:
                self._early[param] = early
                return False
        return True

    def _move(self, param: Tensor, group: dict[str, Any], grad: Tensor | None, projected: Projected | None) -> None:
        """Clip and update one parameter from its complete gradient, G or its projection."""
        gradient = projected.low_rank_grad if projected else grad
        norm = whole_norm([(gradient, self._optimizer.shard_of(param))])
        self._squared_norms.append(norm.double().square())
        if self._frozen or not norm.isfinite():
            return
        factor: Tensor | float = 1.0
        if self._clip:
            if self._clip_full and projected:
                norm = whole_norm([(grad, Shard.of(param))])
            factor = (self._clip / (norm + 1e-6)).clamp(max=1.0)
            gradient.mul_(factor)
        self._optimizer.update(param, grad, group, projected, factor)
