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
from peft_pretraining.optim.rules.adamw import AdamW, AdamW8bit, TorchAdamW
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
        matrices = [update for update in updates if update.low_rank_grad.ndim >= 2]
        squares = {id(update): _wide(update.low_rank_grad).square().add_(self._EPS) for update in updates}
        means = yield [
            mean_over(squares[id(update)], update.low_rank_grad.ndim - axis, update.low_rank_shard)
            for update in matrices
            for axis in (1, 2)
        ]
        for place, update in enumerate(matrices):
            self._track_means(update, means[2 * place], means[2 * place + 1])
        # Of the row means, (..., m).
        of_rows = yield [
            mean_over(update.state["exp_avg_sq_row"], update.low_rank_grad.ndim - 2, update.low_rank_shard)
            for update in matrices
        ]
        row_means = {
            id(update): mean_from(answer, update.low_rank_grad.ndim - 2, update.low_rank_shard)
            for update, answer in zip(matrices, of_rows, strict=True)
        }
        steps = [self._scaled(update, squares.pop(id(update)), row_means.get(id(update))) for update in updates]
        totals = yield [
            Collective(step.square().sum(), update.low_rank_shard) for step, update in zip(steps, updates, strict=True)
        ]
        return [self._finished(*each, group) for each in zip(updates, steps, totals, strict=True)]

    def _decay(self, update: ParamUpdate) -> float:
        return float(1 - update.k**-self._DECAY)

    def _track_means(self, update: ParamUpdate, row: Tensor, col: Tensor) -> None:
        state, dims, shard = update.state, update.low_rank_grad.ndim, update.low_rank_shard
        weight = 1 - self._decay(update)
        state["exp_avg_sq_row"].lerp_(mean_from(row, dims - 1, shard), weight)
        state["exp_avg_sq_col"].lerp_(mean_from(col, dims - 2, shard), weight)

    def _scaled(self, update: ParamUpdate, square: Tensor, row_mean: Tensor | None) -> Tensor:
        """The gradient over the root of its second moment, as far as that is known."""
        state, wide = update.state, _wide(update.low_rank_grad)
        if row_mean is None:
            return wide * state["exp_avg_sq"].lerp_(square, 1 - self._decay(update)).rsqrt()
        scale = (state["exp_avg_sq_row"] / row_mean.unsqueeze(-1)).rsqrt_().unsqueeze(-1)  # (..., m, 1)
        return wide * scale * state["exp_avg_sq_col"].rsqrt().unsqueeze(-2)  # (..., m, n)

    def _finished(self, update: ParamUpdate, step: Tensor, total: Tensor, group: dict[str, Any]) -> Direction:
        """The step clipped, times the rate, and its running mean where there is a first moment."""
        shard, grad = update.low_rank_shard, update.low_rank_grad
        rms = (total / (step.numel() if shard.dim is None else shard.shape.numel())).sqrt()
        step.div_((rms / self._CLIP).clamp_(min=1.0)).mul_(float(group["lr"]))
        if group["beta1"]:
            if self.first_moment not in update.state:  # switched on since
                update.state[self.first_moment] = zeros(grad)
            step = update.state["exp_avg"].lerp_(step.to(grad.dtype), 1 - group["beta1"])
        return Direction(step.to(grad.dtype), 1.0)


def _wide(grad: Tensor) -> Tensor:
    """In float32 at least."""
    return grad.to(torch.promote_types(grad.dtype, torch.float32))


class Lion(UpdateRule):
    """The sign, in full space, of a mixture of momentum and gradient (arXiv 2302.06675, algorithm 2)."""

    lift = "sign"
    betas: tuple[float, float] = (0.9, 0.99)

    def first_moment_decay(self, group: dict[str, Any]) -> float:
        return float((group["betas"] or self.betas)[1])

    def declare_state(self, like: Tensor, group: dict[str, Any], shard: ShardInfo = WHOLE) -> dict[str, StateTensor]:
        return {"exp_avg": StateTensor.like_gradient(zeros(like), shard)}

    def directions(self, updates: Sequence[ParamUpdate], group: dict[str, Any]) -> list[Direction | None]:
        beta1, beta2 = group["betas"] or self.betas
        found: list[Direction | None] = []
        for update in updates:
            grad, moment = update.low_rank_grad, update.state["exp_avg"]
            found.append(Direction(torch.lerp(moment, grad, 1 - beta1), float(group["lr"])))
            moment.lerp_(grad, 1 - beta2)
        return found


class SGD(UpdateRule):
    """b = R at first, then b <- μ b + (1 - dampening) R. Without momentum there is no state."""

    first_moment = "momentum_buffer"
    optional = frozenset({"momentum_buffer"})

    def first_moment_decay(self, group: dict[str, Any]) -> float:
        return float(group["momentum"])

    def declare_state(self, like: Tensor, group: dict[str, Any], shard: ShardInfo = WHOLE) -> dict[str, StateTensor]:
        return {self.first_moment: StateTensor.like_gradient(zeros(like), shard)} if group["momentum"] else {}

    def directions(self, updates: Sequence[ParamUpdate], group: dict[str, Any]) -> list[Direction | None]:
        return [Direction(self._tracked(update, group), float(group["lr"])) for update in updates]

    def _tracked(self, update: ParamUpdate, group: dict[str, Any]) -> Tensor:
        """b after this update."""
        grad = update.low_rank_grad
        if not group["momentum"]:
            return grad
        if self.first_moment not in update.state:  # switched on since
            update.state[self.first_moment] = grad.clone()
            return update.state[self.first_moment]
        buffer = update.state[self.first_moment]
        if update.k == 1:
            return buffer.copy_(grad)
        return buffer.mul_(group["momentum"]).add_(grad, alpha=1 - group["dampening"])


UPDATE_RULES: dict[str, Callable[[], UpdateRule]] = {
    "adamw": AdamW,
    "adamw8bit": AdamW8bit,
    "adafactor": Adafactor,
    "lion": Lion,
    "sgd": SGD,
    "torch_adamw": TorchAdamW,
}
