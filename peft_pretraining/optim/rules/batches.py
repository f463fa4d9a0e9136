"""Gradients of one shape together, so that an update rule makes one launch for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from peft_pretraining.distributed.sharding import ShardInfo
from peft_pretraining.optim.tensors.launching import launches_cost
from peft_pretraining.optim.tensors.mask import Mask
from peft_pretraining.optim.tensors.param_update import ByRows, Direction, ParamUpdate, Step
from peft_pretraining.optim.tensors.projection import Projection
from peft_pretraining.optim.tensors.rounding import rows_in_cache


class Part:
    """Some rows of a batch's gradients, or all of them, and of what belongs to them."""

    def __init__(self, batch: Batch, rows: slice | None):
        self._batch, self.rows = batch, rows

    @property
    def start(self) -> int | None:
        """The first of the rows; None: they are all."""
        return None if self.rows is None else int(self.rows.start)

    @property
    def grad(self) -> Tensor:
        """R, which stays as it is."""
        return self.of(self._batch.grad)

    def state(self, key: str) -> Tensor:
        """A tensor of the state, to be changed in place: its rows, if it has as many as R."""
        return self.of(self._batch.state(key))

    def of(self, tensor: Tensor) -> Tensor:
        """These rows of what has as many as R, as (m, n) or (m, 1): the whole of (1, n) and of scalars."""
        if self.rows is None or tensor.ndim == 0 or tensor.shape[0] == 1:
            return tensor
        return tensor[self.rows]


Maker: TypeAlias = Callable[[Part], Tensor | Step]
"""Makes the rows of D of a part, and moves on its state."""


class Batch:
    """Updates of one shape, k and division, on one device: tensors (L, m, n), or (m, n) of a single one.

    On the CPU, where launches cost nothing, there are only single ones, and `grad` and `state` are the parameter's own
    tensors. Elsewhere `state` has copies of them. In both cases a rule changes them in place; `answer` takes care of
    the rest, the mask included. So formulas count dimensions from the end.
    """

    def __init__(self, updates: list[ParamUpdate], places: list[int], stacked: bool):
        first = updates[0]
        self.updates, self.places, self._stacked = updates, places, stacked
        self.k: int = first.k
        self.mask: Mask | None = first.mask
        self.shard: ShardInfo = first.low_rank_shard
        """How each of the gradients is divided."""
        self.weight_shard: ShardInfo = first.shard
        """How each of the weights, and the whole gradients, is."""
        self.projection: Projection = first.projection
        self.rate, self.scale = first.rate, first.scale
        self.shape: torch.Size = first.low_rank_grad.shape
        """Of each of them, this device's part."""
        self.dtype: torch.dtype = first.low_rank_grad.dtype
        self.grad: Tensor = self.together([update.low_rank_grad for update in updates])
        """R, which stays as it is."""
        self.by_rows: bool = not stacked and self.mask is None and not launches_cost(self.grad.device)
        """Whether a direction is made while the weight moves, on the CPU, where numbers may be read: not of what is
        masked, and not where launches cost."""
        self._state: dict[str, Tensor] = {}
        self._new: dict[str, Tensor] = {}

    @property
    def axes(self) -> tuple[int, ...]:
        """The dimensions of each gradient, from the end."""
        return tuple(range(-len(self.shape), 0))

    def together(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor of each update as one: (L, ...), or as it is of a single one."""
        return torch.stack(list(tensors)) if self._stacked else tensors[0]

    def part(self, rows: slice | None = None) -> Part:
        """These rows (of a single matrix), or everything."""
        return Part(self, rows)

    def parts(self, at_once: int | None = None) -> Iterator[Part]:
        """Blocks of rows that a CPU keeps in its caches; elsewhere everything at once. The default ones are those that
        directions are made by."""
        if not self.by_rows or not self.shape or not self.shape[0]:
            yield self.part()
            return
        count = rows_in_cache(self.grad, at_once)
        for start in range(0, self.shape[0], count):
            yield self.part(slice(start, min(start + count, self.shape[0])))

    def across(self, scalars: Tensor) -> Tensor:
        """One number for each gradient, () or (L), to multiply them with."""
        return scalars.view((*scalars.shape, *(1 for _ in self.axes)))

    def has(self, key: str) -> bool:
        """Whether there is such a tensor in the state (of all, as they are alike)."""
        return key in self.updates[0].state

    def state(self, key: str) -> Tensor:
        """A tensor of the state, to be changed in place."""
        if key not in self._state:
            tensor = self.together([update.state[key] for update in self.updates])
            self._state[key] = tensor.clone() if self.mask is not None and not self._stacked else tensor
        return self._state[key]

    def add_state(self, key: str, value: Tensor) -> Tensor:
        """Adds a tensor to the state, one for each gradient."""
        self._new[key] = value
        return value

    def keep(self) -> None:
        """Puts the state back in place."""
        for key, value in self._new.items():
            for update, part in zip(self.updates, self.split(value), strict=True):
                update.state[key] = part.clone() if self._stacked else part
        if self.mask is None and not self._stacked:
            return
        for key, value in self._state.items():
            kept = [update.state[key] for update in self.updates]
            if self.mask is not None:
                value = self.mask.choose(self.together(kept), value)
            torch._foreach_copy_(kept, self.split(value))

    def split(self, together: Tensor) -> list[Tensor]:
        """What `together` has put together, of each update."""
        return list(together.unbind()) if self._stacked else [together]

    def masked(self, together: Tensor) -> Tensor:
        """Zeros in its place if the updates must leave no trace, whatever it contains."""
        return together if self.mask is None else self.mask.zeroed(together)

    def directions(self, made: Tensor | Maker, factor: float, bias_correction: float = 1.0) -> list[Direction]:
        """The directions of the updates, for `Batches.answer`."""
        if callable(made) and self.by_rows:
            make = made
            return [ByRows.of(lambda rows: make(self.part(rows)), self.grad, factor, bias_correction)]
        answer = made(self.part()) if callable(made) else made
        together = answer if isinstance(answer, Tensor) else answer.whole()
        self.keep()
        return [Direction(part, factor, bias_correction) for part in self.split(self.masked(together))]


class Batches:
    """All updates of a group in `Batch`es, and their answers, in the order of the updates.

    >>> from peft_pretraining.optim import LowRankOptimizer, StateTensor, UpdateRule
    >>> class Momentum(UpdateRule):
    ...     masks = True  # as all do that are written like this
    ...
    ...     def declare_state(self, like, group, shard):
    ...         return {"exp_avg": StateTensor.like_gradient(torch.zeros_like(like), shard)}
    ...
    ...     def directions(self, updates, group):
    ...         batches = Batches(updates)
    ...         for batch in batches:
    ...             moment = batch.state("exp_avg").lerp_(batch.grad, 0.1)  # (L, m, n), or (m, n)
    ...             batches.answer(batch, moment, float(group["lr"]))
    ...         return batches.directions()
    >>> weights = [torch.nn.Parameter(torch.ones(6, 4)) for _ in range(3)]
    >>> optimizer = LowRankOptimizer([{"params": weights, "rule": Momentum()}], lr=0.1)
    >>> sum(weight.square().sum() for weight in weights).backward()
    >>> optimizer.step()
    >>> [round(float(weight[0, 0].detach()), 2) for weight in weights]
    [0.98, 0.98, 0.98]
    """

    def __init__(self, updates: Sequence[ParamUpdate], apart: Callable[[ParamUpdate], object] = lambda update: None):
        """`apart`: what must be equal in a batch beside shapes and k."""
        self._answers: list[Direction | None] = [None] * len(updates)
        alike: dict[object, list[int]] = {}
        for place, update in enumerate(updates):
            grad = update.low_rank_grad
            stacks = launches_cost(grad.device) or update.mask is not None
            tensors = (grad.shape, grad.dtype, grad.device, *update.state)
            alone = (id(update.mask), apart(update))
            kind = (*tensors, update.k, update.projection, update.shard, update.low_rank_shard, *alone)
            alike.setdefault(kind if stacks else place, []).append(place)
        self._batches = [
            Batch([updates[place] for place in places], places, stacked=len(places) > 1) for places in alike.values()
        ]

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)

    def answer(self, batch: Batch, direction: Tensor | Maker, factor: float, bias_correction: float = 1.0) -> None:
        """D of a batch; its state is put in place. What makes D row by row, and moves on the rows' state, is called on
        the CPU while the weight moves, some rows at a time: then they are still in the cache."""
        answers = batch.directions(direction, factor, bias_correction)
        for place, answer in zip(batch.places, answers, strict=True):
            self._answers[place] = answer

    def directions(self) -> list[Direction | None]:
        """All that was answered."""
        return list(self._answers)
