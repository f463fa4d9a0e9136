"""Online Subspace Descent: the basis is a parameter with an optimizer of its own (arXiv 2408.12857)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from peft_pretraining.distributed.sharding import ShardInfo
from peft_pretraining.optim.basis.basis_rule import own_state
from peft_pretraining.optim.basis.svd_basis import SVDBasis
from peft_pretraining.optim.rules.lifts import LIFTS
from peft_pretraining.optim.rules.update_rules import SGD, Adafactor, AdamW, AdamW8bit, Lion, UpdateRule
from peft_pretraining.optim.tensors.collectives import Collective, Phases, in_lots, phases
from peft_pretraining.optim.tensors.param_update import ParamUpdate
from peft_pretraining.optim.tensors.projection import RIGHT, Bases, Projection
from peft_pretraining.optim.tensors.state_tensor import StateTensor, counter

BASIS_OPTIMIZERS: dict[str, tuple[Callable[[], UpdateRule], dict[str, Any]]] = {
    "continuous": (
        lambda: AdamW(torch_epsilon=True),
        {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
    ),
    "continuous_adam8bit": (
        lambda: AdamW8bit(torch_epsilon=True),
        {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
    ),
    "continuous_lion": (Lion, {"betas": (0.9, 0.99), "weight_decay": 0.0}),
    "continuous_adafactor": (Adafactor, {"beta1": None, "weight_decay": 0.0}),
    "continuous_sgd": (SGD, {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0}),
}
"""Update rule and settings of the basis optimizers, by `proj_type`."""

_SMALLEST_SQUARE = 1e-30
"""Of a gradient's norm: eight digits above the smallest normal float32 (and bf16)."""


_NUMBERS_AT_ONCE = 2**24
"""Of the bases that move at a time: their gradients exist together, and are added up over devices by one call."""


class OnlinePCA(SVDBasis):
    """Algorithm 1: the basis starts from an SVD, and after every later update takes a step on the reconstruction loss
    ‖Ĝ QᵀQ - Ĝ‖² with Ĝ = G / ‖G‖, at 1 / update_proj_gap times the weights' schedule. It is never orthonormalised
    again."""

    refreshes = False
    reads_every_gradient = True

    def __init__(self, svd_method: str, proj_type: str):
        super().__init__(svd_method)
        rule, self._settings = BASIS_OPTIMIZERS[proj_type]
        self._rule = rule()
        self.older = frozenset(f"basis_{key}" for key in self._rule.older)

    @property
    def kind(self) -> tuple[Any, ...]:
        return (*super().kind, type(self._rule))

    def declare_state(self, bases: Bases, projection: Projection, group: dict[str, Any]) -> dict[str, StateTensor]:
        (basis,) = bases.values()
        own = self._rule.declare_state(basis, self._settings, ShardInfo(basis.shape))
        return {"basis_step": StateTensor(counter(0)), **{f"basis_{key}": tensor for key, tensor in own.items()}}

    def declare_older_state(self, bases: Bases) -> dict[str, StateTensor]:
        (basis,) = bases.values()
        own = self._rule.declare_older_state(basis, ShardInfo(basis.shape))
        return {f"basis_{key}": tensor for key, tensor in own.items()}

    def advance(self, updates: Sequence[ParamUpdate], pace: float) -> Phases[None]:
        for lot in in_lots(updates, _numbers_of_basis, _NUMBERS_AT_ONCE):
            yield from self._advance(lot, pace)

    def _advance(self, updates: Sequence[ParamUpdate], pace: float) -> Phases[None]:
        gradients = yield from _reconstruction_gradients(updates)
        settings, steps, moved = {**self._settings, "lr": pace}, [], [update.bases for update in updates]
        for update, bases, gradient in zip(updates, moved, gradients, strict=True):
            gradient.div_(update.scaled_by)  # it is linear in R
            (basis,) = bases.values()
            own = own_state(update.state, "basis_")
            own["step"] += 1
            steps.append(
                ParamUpdate(
                    name=update.name,
                    index=update.index,
                    weight=basis,
                    low_rank_grad=gradient,
                    state=own,
                    step=update.step,
                    rate=pace,
                    low_rank_shard=ShardInfo(basis.shape),
                )
            )
        directions = yield from phases(self._rule.directions(steps, settings))
        for step, direction in zip(steps, directions, strict=True):
            step.direction = direction
            if settings["weight_decay"]:
                step.weight.mul_(1 - pace * settings["weight_decay"])  # before the step, as torch's AdamW
        yield from phases(LIFTS[self._rule.lift or "identity"]().move(steps, settings))
        for update, bases in zip(updates, moved, strict=True):
            update.projection.store(update.state, bases)  # where they are kept in another dtype


def _numbers_of_basis(update: ParamUpdate) -> int:
    return sum(basis.numel() for basis in update.bases.values())


def _reconstruction_gradients(updates: Sequence[ParamUpdate]) -> Phases[list[Tensor]]:
    """∇L of each matrix. Devices that hold different parts of G and R add up two tensors of it, or, where they hold
    different parts of what is projected away, put G together."""
    asked = []
    for update in updates:
        projection, grad = update.projection, update.grad
        assert grad is not None
        shard = projection.shard
        if projection.shards_projected_side:  # one at a time: no device has room for all of them
            (grad,) = yield [Collective(grad, shard, "whole")]
            shard = ShardInfo(shard.shape)
        asked += [Collective(part, shard) for part in _parts(projection.sides[0], grad, update.low_rank_grad)]
    sums = yield asked
    gradients = []
    for place, update in enumerate(updates):
        ((side, basis),) = update.bases.items()
        gradients.append(_gradient(side, basis, sums[2 * place], sums[2 * place + 1]))
    return gradients


def reconstruction_gradient(side: str, basis: Tensor, grad: Tensor, low_rank_grad: Tensor) -> Tensor:
    """∇L of the loss L(Q) = ‖Ĝ QᵀQ - Ĝ‖² with Ĝ = G / ‖G‖, in the shape of the basis (left: L(P) = ‖P PᵀĜ - Ĝ‖²).

    `low_rank_grad` is R = G Qᵀ (m, r) or Pᵀ G (r, n) for the same G. With E = R Q - G and T = RᵀG the definition,
    2 (Q Eᵀ G + Q Gᵀ E), becomes 2 [(QQᵀ - 2 I) T + (T Qᵀ) Q]: one product with G and four with r x r factors, and
    nothing of the size m x m or n x n.
    """
    return _gradient(side, basis, *_parts(side, grad, low_rank_grad))


def _parts(side: str, grad: Tensor, low_rank_grad: Tensor) -> tuple[Tensor, Tensor]:
    """‖G‖² in float64, and T: sums over devices that hold different parts of G and R."""
    flat = grad.reshape(-1)
    square = torch.dot(flat, flat).double()  # a single pass, where a norm takes two
    if side == RIGHT:
        return square, low_rank_grad.T @ grad  # (r, m) @ (m, n) -> (r, n)
    return square, grad @ low_rank_grad.T  # (m, n) @ (n, r) -> (m, r)


def _gradient(side: str, basis: Tensor, square: Tensor, cross: Tensor) -> Tensor:
    # A zero gradient has no direction, and one whose square underflows has lost it: the basis stays.
    factor = torch.where(square > _SMALLEST_SQUARE, 2 / square, 0)
    inner = basis @ basis.T if side == RIGHT else basis.T @ basis  # (r, r)
    inner.diagonal().sub_(2)
    if side == RIGHT:
        return (inner @ cross).addmm_(cross @ basis.T, basis).mul_(factor)
    return (cross @ inner).addmm_(basis, basis.T @ cross).mul_(factor)
