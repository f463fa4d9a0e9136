"""Update rules: what becomes of a gradient, in low-rank coordinates or, for unprojected weights, in full ones.

A rule turns the gradients of a group into directions D, in the same coordinates, and factors; a lift then moves the
weights. Each formula stands here once, for GaLore, GoLore, Online Subspace Descent, their bases' own optimizers, and
parameters that are not projected. `state["step"]` is k, this parameter's updates, this one included. `group` holds the
settings. Tensors are this device's parts; shards say of what.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from peft_pretraining.distributed.sharding import WHOLE, ShardInfo
from peft_pretraining.optim.rules.adamw import AdamW, AdamW8bit
from peft_pretraining.optim.rules.batches import Batch, Batches
from peft_pretraining.optim.rules.torch_adamw import TorchAdamW
from peft_pretraining.optim.rules.update_rule import UpdateRule, mean_from, mean_over
from peft_pretraining.optim.tensors.collectives import Collective, Phases
from peft_pretraining.optim.tensors.param_update import Direction, ParamUpdate
from peft_pretraining.optim.tensors.state_tensor import StateTensor, zeros

__all__ = ["SGD", "UPDATE_RULES", "Adafactor", "AdamW", "AdamW8bit", "Lion", "TorchAdamW", "UpdateRule"]


class Adafactor(UpdateRule):
    """Second moments of a matrix as row and column means, updates clipped to a root mean square of 1.

    Source: arXiv 1804.04235, algorithm 4. Fixed: ε = 1e-30, decay 1 - k^-0.8, no relative step, no parameter scale.
    `beta1` adds a first moment, of the update already multiplied by the rate.
    """

    masks = True
    decays_first = True
    optional = frozenset({"exp_avg"})
    _EPS, _DECAY, _CLIP = 1e-30, 0.8, 1.0

    def first_moment_decay(self, group: dict[str, Any]) -> float:
        return float(group["beta1"] or 0.0)

    def declare_state(self, like: Tensor, group: dict[str, Any], shard: ShardInfo = WHOLE) -> dict[str, StateTensor]:
        wide = torch.promote_types(like.dtype, torch.float32)  # 1e-30 and slow decay need it
        if like.ndim >= 2:
            row = like.new_zeros(like.shape[:-1], dtype=wide)
            col = like.new_zeros((*like.shape[:-2], like.shape[-1]), dtype=wide)
            declared = {
                "exp_avg_sq_row": StateTensor.along(row, 0, shard),
                "exp_avg_sq_col": StateTensor.along(col, 1, shard),
            }
        else:
            declared = {"exp_avg_sq": StateTensor.like_gradient(zeros(like, wide), shard)}
        if group["beta1"]:
            declared["exp_avg"] = StateTensor.like_gradient(zeros(like), shard)
        return declared

    def directions(self, updates: Sequence[ParamUpdate], group: dict[str, Any]) -> Phases[list[Direction | None]]:
        batches = Batches(updates)
        matrices = [batch for batch in batches if len(batch.shape) >= 2]
        squares = {id(batch): _wide(batch.grad).square().add_(self._EPS) for batch in batches}
        means = yield [
            mean_over(squares[id(batch)], axis, batch.shard, batch.shape) for batch in matrices for axis in (-1, -2)
        ]
        for place, batch in enumerate(matrices):
            self._track_means(batch, means[2 * place], means[2 * place + 1])
        # Of the row means, (..., m).
        of_rows = yield [
            mean_over(batch.state("exp_avg_sq_row"), -1, batch.shard, batch.shape[:-1]) for batch in matrices
        ]
        row_means = {
            id(batch): mean_from(answer, -1, batch.shard, batch.shape[:-1])
            for batch, answer in zip(matrices, of_rows, strict=True)
        }
        steps = [self._scaled(batch, squares.pop(id(batch)), row_means.get(id(batch))) for batch in batches]
        totals = yield [
            Collective(step.square().sum(batch.axes) if batch.axes else step.square(), batch.shard)
            for step, batch in zip(steps, batches, strict=True)
        ]
        for batch, step, total in zip(batches, steps, totals, strict=True):
            batches.answer(batch, self._finished(batch, step, total, group), 1.0)
        return batches.directions()

    def _decay(self, batch: Batch) -> float:
        return float(1 - batch.k**-self._DECAY)

    def _track_means(self, batch: Batch, row: Tensor, col: Tensor) -> None:
        shape, weight = batch.shape, 1 - self._decay(batch)
        batch.state("exp_avg_sq_row").lerp_(mean_from(row, -1, batch.shard, shape), weight)
        batch.state("exp_avg_sq_col").lerp_(mean_from(col, -2, batch.shard, shape), weight)

    def _scaled(self, batch: Batch, square: Tensor, row_mean: Tensor | None) -> Tensor:
        """The gradient over the root of its second moment, as far as that is known."""
        wide = _wide(batch.grad)
        if row_mean is None:
            return wide * batch.state("exp_avg_sq").lerp_(square, 1 - self._decay(batch)).rsqrt()
        scale = (batch.state("exp_avg_sq_row") / row_mean.unsqueeze(-1)).rsqrt_().unsqueeze(-1)  # (..., m, 1)
        return wide * scale * batch.state("exp_avg_sq_col").rsqrt().unsqueeze(-2)  # (..., m, n)

    def _finished(self, batch: Batch, step: Tensor, total: Tensor, group: dict[str, Any]) -> Tensor:
        """The step clipped, times the rate, and its running mean where there is a first moment."""
        shard = batch.shard
        rms = (total / (batch.shape if shard.dim is None else shard.shape).numel()).sqrt()
        clip = (rms / self._CLIP).clamp_(min=1.0)
        step.div_(clip.view((*clip.shape, *(1 for _ in batch.axes)))).mul_(float(group["lr"]))
        step = step.to(batch.dtype)
        if group["beta1"]:
            if not batch.has(self.first_moment):  # switched on since
                return batch.add_state(self.first_moment, zeros(step).lerp_(step, 1 - group["beta1"]))
            step = batch.state(self.first_moment).lerp_(step, 1 - group["beta1"])
        return step


def _wide(grad: Tensor) -> Tensor:
    """In float32 at least."""
    return grad.to(torch.promote_types(grad.dtype, torch.float32))


class Lion(UpdateRule):
    """The sign, in full space, of a mixture of momentum and gradient (arXiv 2302.06675, algorithm 2)."""

    masks = True
    lift = "sign"
    betas: tuple[float, float] = (0.9, 0.99)

    def first_moment_decay(self, group: dict[str, Any]) -> float:
        return float((group["betas"] or self.betas)[1])

    def declare_state(self, like: Tensor, group: dict[str, Any], shard: ShardInfo = WHOLE) -> dict[str, StateTensor]:
        return {"exp_avg": StateTensor.like_gradient(zeros(like), shard)}

    def directions(self, updates: Sequence[ParamUpdate], group: dict[str, Any]) -> list[Direction | None]:
        beta1, beta2 = group["betas"] or self.betas
        batches = Batches(updates)
        for batch in batches:
            moment = batch.state("exp_avg")
            direction = torch.lerp(moment, batch.grad, 1 - beta1)
            moment.lerp_(batch.grad, 1 - beta2)
            batches.answer(batch, direction, float(group["lr"]))
        return batches.directions()


class SGD(UpdateRule):
    """b = R at first, then b <- μ b + (1 - dampening) R. Without momentum there is no state."""

    masks = True
    first_moment = "momentum_buffer"
    optional = frozenset({"momentum_buffer"})

    def first_moment_decay(self, group: dict[str, Any]) -> float:
        return float(group["momentum"])

    def declare_state(self, like: Tensor, group: dict[str, Any], shard: ShardInfo = WHOLE) -> dict[str, StateTensor]:
        return {self.first_moment: StateTensor.like_gradient(zeros(like), shard)} if group["momentum"] else {}

    def directions(self, updates: Sequence[ParamUpdate], group: dict[str, Any]) -> list[Direction | None]:
        batches = Batches(updates)
        for batch in batches:
            batches.answer(batch, self._tracked(batch, group), float(group["lr"]))
        return batches.directions()

    def _tracked(self, batch: Batch, group: dict[str, Any]) -> Tensor:
        """b after this update."""
        if not group["momentum"]:
            return batch.grad
        if not batch.has(self.first_moment):  # switched on since
            return batch.add_state(self.first_moment, batch.grad.clone())
        buffer = batch.state(self.first_moment)
        if batch.k == 1:
            return buffer.copy_(batch.grad)
        return buffer.mul_(group["momentum"]).add_(batch.grad, alpha=1 - group["dampening"])


UPDATE_RULES: dict[str, Callable[[], UpdateRule]] = {
    "adamw": AdamW,
    "adamw8bit": AdamW8bit,
    "adafactor": Adafactor,
    "lion": Lion,
    "sgd": SGD,
    "torch_adamw": TorchAdamW,
}
