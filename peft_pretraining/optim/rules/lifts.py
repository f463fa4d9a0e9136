"""Lifts: how the direction D that an update rule found in low-rank coordinates moves the whole weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_pretraining.distributed.sharding import ShardInfo
from peft_pretraining.optim.tensors.collectives import Phased
from peft_pretraining.optim.tensors.moving_weights import Moving, moving_lots
from peft_pretraining.optim.tensors.param_update import ByRows, Direction, ParamUpdate
from peft_pretraining.optim.tensors.projection import Projection
from peft_pretraining.optim.tensors.state_tensor import StateTensor


class Lift:
    """Moves the weights of one parameter group, all of its matrices at once.

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

    masks = False
    """Whether `move` leaves weight and state as they are where D is zeros, but for the decay that `update.moving()`
    takes care of: all that are linear in D do. A lift that says nothing is asked only for updates that take place: the
    optimizer then waits for the device to know."""
    by_rows = False
    """Whether `move` takes directions that are made by rows; they are made as a whole for others."""
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
    masks = True
    by_rows = True

    def move(self, updates: Sequence[ParamUpdate], group: dict[str, Any]) -> None:
        for lot in moving_lots(updates):
            for factor, members in _by_factor(lot).items():
                if isinstance(direction := _direction(members[0].update), ByRows):
                    _add_rows(members, direction)
                    continue
                parts = [
                    _direction(update).tensor if rows is None else _direction(update).tensor[rows]
                    for update, rows, _ in members
                ]
                torch._foreach_add_([weight for _, _, weight in members], parts, alpha=-factor)


class ProjectBack(Lift):
    """W <- W - factor scale P D, W - factor scale D Q, or both sides (GaLore, arXiv 2403.03507, algorithm 2)."""

    name = "project_back"
    masks = True

    def move(self, updates: Sequence[ParamUpdate], group: dict[str, Any]) -> None:
        for lot in moving_lots(updates):
            for update, rows, weight in lot:
                direction, factor, _ = _direction(update)
                update.projection.add_projected_back(weight, update.bases, direction, -factor * update.scale, rows)


class Sign(Lift):
    """W <- W - factor sign(P D): Lion's step, which is a sign in full space whatever the scale (arXiv 2302.06675)."""

    name = "sign"
    masks = True

    def move(self, updates: Sequence[ParamUpdate], group: dict[str, Any]) -> None:
        for lot in moving_lots(updates):
            for factor, members in _by_factor(lot).items():
                signs = [
                    update.projection.project_back(update.bases, _direction(update)[0], rows).sign()
                    for update, rows, _ in members
                ]
                torch._foreach_add_([weight for _, _, weight in members], signs, alpha=-factor)


def _direction(update: ParamUpdate) -> Direction:
    assert update.direction is not None
    return update.direction


def _add_rows(members: Sequence[Moving], direction: ByRows) -> None:
    """Rows that are made now: those of one weight."""
    ((_, rows, weight),) = members
    made = direction.make(rows)
    if isinstance(made, Tensor):
        weight.add_(made, alpha=-direction.factor)
    else:
        made.add_to(weight, -direction.factor)


def _by_factor(lot: Sequence[Moving]) -> dict[float, list[Moving]]:
    """Those that move by one multiple of their directions."""
    found: dict[float, list[Moving]] = {}
    for each in lot:
        found.setdefault(_direction(each.update).factor, []).append(each)
    return found


LIFTS: dict[str, type[Lift]] = {"identity": Identity, "project_back": ProjectBack, "sign": Sign}
