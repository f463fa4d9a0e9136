"""Lifts: how the direction D that an update rule found in low-rank coordinates moves the whole weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from peft_pretraining.distributed.sharding import ShardInfo
from peft_pretraining.optim.tensors.collectives import Phased
from peft_pretraining.optim.tensors.param_update import ParamUpdate
from peft_pretraining.optim.tensors.projection import Projection
from peft_pretraining.optim.tensors.state_tensor import StateTensor


class Lift:
    """Moves the weights of one parameter group, all of its matrices at once.

    >>> import torch
    >>> from peft_pretraining.optim import LowRankOptimizer
    >>> class Bounded(Lift):
    ...     def move(self, updates, group):
    ...         for update in updates:
    ...             direction, factor, _ = update.direction
    ...             with update.moving() as weight:
    ...                 step = update.projection.project_back(update.bases, direction)
    ...                 weight.sub_((factor * step).clamp(-1e-3, 1e-3))
    >>> weight = torch.nn.Parameter(torch.ones(6, 4))
    >>> optimizer = LowRankOptimizer([{"params": [weight], "lift": Bounded(), "rank": 2}], lr=1.0)
    >>> weight.sum().backward()
    >>> optimizer.step()
    >>> bool(((weight - 1).abs() < 0.0011).all())
    True
    """

    reads_gradient = False
    """Whether `move` needs G beside R. Then gradients are reduced as a whole, clipped by G's norm, and added up as a
    whole by per-layer updates."""
    intermittent: frozenset[str] = frozenset()
    """Keys of the state that the lift itself adds and deletes while training goes on."""

    @property
    def name(self) -> str:
        """What parameter groups and saved states call it."""
        return type(self).__name__.lower()

    def declare_state(
        self, weight: Tensor, projection: Projection, group: dict[str, Any], shard: ShardInfo
    ) -> dict[str, StateTensor]:
        """The lift's own tensors for one weight (its device's part, in the working dtype), by key."""
        return {}

    def move(self, updates: Sequence[ParamUpdate], group: dict[str, Any]) -> Phased[None]:
        """Moves each `update.weight`, within `update.moving()`, by `update.direction`."""
        raise NotImplementedError


class Identity(Lift):
    """W <- W - factor D, in the gradient's own coordinates."""

    name = "identity"

    def move(self, updates: Sequence[ParamUpdate], group: dict[str, Any]) -> None:
        for update in updates:
            assert update.direction is not None
            direction, factor, _ = update.direction
            for rows, weight in update.moving_rows():
                weight.add_(direction if rows is None else direction[rows], alpha=-factor)


class ProjectBack(Lift):
    """W <- W - factor scale P D, W - factor scale D Q, or both sides (GaLore, arXiv 2403.03507, algorithm 2)."""

    name = "project_back"

    def move(self, updates: Sequence[ParamUpdate], group: dict[str, Any]) -> None:
        for update in updates:
            assert update.direction is not None
            direction, factor, _ = update.direction
            bases = update.bases
            for rows, weight in update.moving_rows():
                update.projection.add_projected_back(weight, bases, direction, -factor * update.scale, rows)


class Sign(Lift):
    """W <- W - factor sign(P D): Lion's step, which is a sign in full space whatever the scale (arXiv 2302.06675)."""

    name = "sign"

    def move(self, updates: Sequence[ParamUpdate], group: dict[str, Any]) -> None:
        for update in updates:
            assert update.direction is not None
            direction, factor, _ = update.direction
            bases = update.bases
            for rows, weight in update.moving_rows():
                full = update.projection.project_back(bases, direction, rows)
                weight.add_(full.sign(), alpha=-factor)


LIFTS: dict[str, type[Lift]] = {"identity": Identity, "project_back": ProjectBack, "sign": Sign}
