"""One parameter in one update: what basis rules, update rules and lifts see of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from peft_pretraining.distributed.sharding import WHOLE, ShardInfo
from peft_pretraining.optim.tensors.mask import Mask
from peft_pretraining.optim.tensors.projection import Bases, Projection
from peft_pretraining.optim.tensors.rounding import Noise, round_stochastically, rows_at_once, rows_in_cache


class Direction(NamedTuple):
    """What an update rule makes of a gradient. The weight moves by -factor * D, projected back."""

    tensor: Tensor
    """D, in the shape of the gradient that the rule saw."""
    factor: float
    """With the learning rate in it."""
    bias_correction: float = 1.0
    """What D contains to make up for moments that began at zero: APOLLO and Fira measure D without it."""


class Step(Protocol):
    """Some rows of a direction, of which no copy need exist for the weight to move by it."""

    def add_to(self, weight: Tensor, factor: float) -> None:
        """weight <- weight + factor D, in place."""

    def whole(self) -> Tensor:
        """D, a new tensor. The one or the other is asked for, once."""


class Quotient(NamedTuple):
    """The step `above` / `below`."""

    above: Tensor
    below: Tensor
    """(m, n), or (m, 1)."""

    def add_to(self, weight: Tensor, factor: float) -> None:
        weight.addcdiv_(self.above, self.below, value=factor)

    def whole(self) -> Tensor:
        return self.above / self.below


class ByRows(Direction):
    """A direction of which some rows are made at a time, while those of the weight and of the state are in the cache:
    a copy of all of it never exists. `tensor` is empty, and has D's dtype alone."""

    make: Callable[[slice | None], Tensor | Step]
    """These rows of D (None: all of them). Each row is asked for once, in order."""

    @classmethod
    def of(
        cls, make: Callable[[slice | None], Tensor | Step], like: Tensor, factor: float, bias_correction: float
    ) -> ByRows:
        direction = cls(like.new_empty(0), factor, bias_correction)
        direction.make = make
        return direction

    def whole(self) -> Direction:
        """The same as one tensor."""
        made = self.make(None)
        return Direction(made if isinstance(made, Tensor) else made.whole(), self.factor, self.bias_correction)


@dataclass
class ParamUpdate:
    """Tensors are this device's parts. `state` holds all of a parameter's tensors; those of it that a rule or a lift
    owns are changed in place."""

    name: str
    index: int
    """Place in its parameter group."""
    weight: Tensor
    """W (m, n), or of any shape where there is no basis."""
    low_rank_grad: Tensor
    """R; G itself where there is no basis. In the working dtype."""
    state: dict[str, Tensor]
    step: int
    """0-based update; -1 where the rule keeps its count on the device and nobody has said which update it is."""
    rate: float
    grad: Tensor | None = None
    """G (m, n) in the working dtype, for lifts and bases that declare that they read it."""
    shard: ShardInfo = WHOLE
    """How W and G are divided."""
    low_rank_shard: ShardInfo = WHOLE
    """How R, and what has its shape, is divided."""
    owner: int = 0
    """The place, among the devices of `low_rank_shard`'s team, of the one that does what needs the whole matrix."""
    projection: Projection = field(default_factory=Projection)
    scale: float = 1.0
    """The group's, of projected parameters."""
    decay: float = 0.0
    """rate * weight_decay."""
    decays_first: bool = False
    rounds_once: bool = False
    """Whether decay and step are added up in D's dtype before the weight is rounded."""
    noise: Noise | None = None
    """What a bfloat16 weight is rounded with, stochastically; None: to nearest."""
    scaled_by: Tensor | float = 1.0
    """By what R was multiplied since it was projected; `grad` was not, unless the lift reads it."""
    direction: Direction | None = None
    """The update rule's answer, for the lift."""
    mask: Mask | None = None
    """Where nobody has read yet whether the update must leave no trace. Only rules and lifts that declare that they
    mask see one."""
    count: int | None = None
    """`k`, where it has been read already."""

    @property
    def k(self) -> int:
        """Updates of this parameter, this one included."""
        return int(self.state["step"]) if self.count is None else self.count

    @property
    def is_owner(self) -> bool:
        """Whether that is this device."""
        return self.owner == self.low_rank_shard.team.place

    @property
    def bases(self) -> Bases:
        return self.projection.bases(self.state)

    @property
    def widened(self) -> torch.dtype | None:
        """The dtype in which decay and step are added up; None where that is the weight's own."""
        assert self.direction is not None
        wide = self.direction.tensor.dtype
        if self.noise is not None:
            wide = torch.promote_types(wide, torch.float32)
        return wide if self.rounds_once and wide != self.weight.dtype else None

    def decay_(self, weights: Sequence[Tensor], before: bool) -> None:
        """Decoupled weight decay of weights (or parts) that decay as this one does, if its turn is `before` the step,
        or after it."""
        if not self.decay or before != self.decays_first:
            return
        if self.mask is None:
            torch._foreach_mul_(list(weights), 1 - self.decay)
        else:
            self.mask.scale_(weights, 1 - self.decay)

    @contextmanager
    def moving(self) -> Iterator[Tensor]:
        """The weight to add to, in place. Decoupled weight decay, W <- W - lr * decay * W, takes place before or after
        that, as the update rule asks, and is not scaled."""
        whole = slice(0, self.weight.shape[0] if self.weight.ndim else 1)
        with self._moving(self.weight, whole) as weight:
            yield weight

    def moving_rows(self) -> Iterator[tuple[slice | None, Tensor]]:
        """As `moving`, a block of rows after the other where the weight is widened, so that a copy of all of it never
        exists, or the direction is made by rows. Each comes with the rows that it is; None: all of them."""
        by_rows = isinstance(self.direction, ByRows)
        if self.widened is None and not by_rows:
            self.decay_([self.weight], before=True)
            yield None, self.weight
            self.decay_([self.weight], before=False)
            return
        if self.weight.ndim == 0:
            with self.moving() as weight:
                yield None, weight
            return
        at_once = rows_in_cache(self.weight) if by_rows else rows_at_once(self.weight)
        for start in range(0, self.weight.shape[0], at_once):
            rows = slice(start, min(start + at_once, self.weight.shape[0]))
            with self._moving(self.weight[rows], rows) as weight:
                yield rows, weight

    @contextmanager
    def _moving(self, part: Tensor, rows: slice) -> Iterator[Tensor]:
        weight = part if self.widened is None else part.to(self.widened)
        self.decay_([weight], before=True)
        yield weight
        self.decay_([weight], before=False)
        if weight is part:
            return
        if self.noise is None:
            part.copy_(weight)
        else:
            round_stochastically(part, weight, self.noise, rows)


def by_mask(updates: Sequence[ParamUpdate]) -> Iterator[tuple[Mask | None, list[ParamUpdate]]]:
    """Updates that take place or not together: as a rule all of them."""
    alike: dict[int, list[ParamUpdate]] = {}
    for update in updates:
        alike.setdefault(id(update.mask), []).append(update)
    for members in alike.values():
        yield members[0].mask, members


@contextmanager
def guarded(updates: Sequence[ParamUpdate], *keys: str) -> Iterator[None]:
    """Tensors of the state that change in place inside this context change back where an update's mask says so."""
    with ExitStack() as stack:
        for mask, masked in by_mask(updates):
            if mask is not None:
                kept = [update.state[key] for update in masked for key in keys if key in update.state]
                stack.enter_context(mask.guarding(kept))
        yield
