"""Gradients of one shape together, so that an update rule makes one launch for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from peft_pretraining.distributed.sharding import ShardInfo
from peft_pretraining.optim.tensors.launching import launches_cost
from peft_pretraining.optim.tensors.mask import Mask
from peft_pretraining.optim.tensors.param_update import Direction, ParamUpdate
from peft_pretraining.optim.tensors.projection import Projection


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
        self._state: dict[str, Tensor] = {}
        self._new: dict[str, Tensor] = {}

    @property
    def axes(self) -> tuple[int, ...]:
        """The dimensions of each gradient, from the end."""
        return tuple(range(-len(self.shape), 0))

    def together(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor of each update as one: (L, ...), or as it is of a single one."""
        return torch.stack(list(tensors)) if self._stacked else tensors[0]

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
            for update, part in zip(self.updates, self.parts(value), strict=True):
                update.state[key] = part.clone() if self._stacked else part
        if self.mask is None and not self._stacked:
            return
        for key, value in self._state.items():
            kept = [update.state[key] for update in self.updates]
            if self.mask is not None:
                value = self.mask.choose(self.together(kept), value)
            torch._foreach_copy_(kept, self.parts(value))

    def parts(self, together: Tensor) -> list[Tensor]:
        """What `together` has put together, of each update."""
        return list(together.unbind()) if self._stacked else [together]

    def masked(self, together: Tensor) -> Tensor:
        """Zeros in its place if the updates must leave no trace, whatever it contains."""
        return together if self.mask is None else self.mask.zeroed(together)

    def directions(self, together: Tensor, factor: float, bias_correction: float = 1.0) -> list[Direction]:
        """The directions of the updates, for `Batches.answer`."""
        self.keep()
        return [Direction(part, factor, bias_correction) for part in self.parts(self.masked(together))]


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

    def __init__(self, updates: Sequence[ParamUpdate]):
        self._answers: list[Direction | None] = [None] * len(updates)
        alike: dict[object, list[int]] = {}
        for place, update in enumerate(updates):
            grad = update.low_rank_grad
            stacks = launches_cost(grad.device) or update.mask is not None
            tensors = (grad.shape, grad.dtype, grad.device, *update.state)
            kind = (*tensors, update.k, update.projection, update.shard, update.low_rank_shard, id(update.mask))
            alike.setdefault(kind if stacks else place, []).append(place)
        self._batches = [
            Batch([updates[place] for place in places], places, stacked=len(places) > 1) for places in alike.values()
        ]

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)

    def answer(self, batch: Batch, direction: Tensor, factor: float, bias_correction: float = 1.0) -> None:
        """D of a batch; its state is put in place."""
        answers = batch.directions(direction, factor, bias_correction)
        for place, answer in zip(batch.places, answers, strict=True):
            self._answers[place] = answer

    def directions(self) -> list[Direction | None]:
        """All that was answered."""
        return list(self._answers)
