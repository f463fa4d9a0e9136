"""Projected gradients that the backward pass itself returns: what an optimizer takes in place of `param.grad`.

Layers return R as the gradient of a leaf (nn/projected_linear.py). In an update that takes a basis from a gradient, the
layers that are due form G instead, which are used up a few at a time inside the backward pass.
Bases that do not depend on the gradient are drawn before the forward pass, which projects in them at once. As without
all this, new bases are stored in the step alone: an update that is skipped leaves no trace, and its refresh pending.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from peft_pretraining.distributed.gathering import mean_part
from peft_pretraining.distributed.sharding import HALF, ShardInfo, local
from peft_pretraining.optim.basis.subspace import Arrival, Projected, draw_bases, project_now
from peft_pretraining.optim.low_rank import LowRankOptimizer
from peft_pretraining.optim.tensors.collectives import in_lots
from peft_pretraining.optim.tensors.projection import Projection

_NUMBERS_AT_ONCE = 2**24
"""Of R that are averaged over devices by one collective, where no wrapper of the model averages them: 64 MB."""

_NUMBERS_OF_G = 2**24
"""Of the G whose bases are taken together: all of a small model, a layer or two of a large one; 64 MB in float32."""


class Layer(Protocol):
    """A layer that returns R."""

    leaf: nn.Parameter
    projection: Projection
    kept_bases: dict[str, Tensor]
    receive: Callable[[Tensor], Tensor | None] | None


class _Source:
    """What one weight's gradient is made of."""

    def __init__(self, layer: Layer):
        self.layer = layer
        self.total: Tensor | None = None
        """G, added up over the micro-batches of an update that takes a basis from it; this device's part."""
        self.projected: Projected | None = None
        """What becomes of the bases with this update, where they change."""
        self.is_chosen = False
        """Whether that was found from G, and R with it."""

    @property
    def leaf(self) -> nn.Parameter:
        return self.layer.leaf


class ProjectedBackward:
    """Takes R of some weights of a `LowRankOptimizer` from the layers that they belong to.

    `layers`: weight -> its layer, whose `leaf` gets R's gradient in float32 at least, summed over micro-batches. Where
    weights are not sharded somebody averages the leaves' gradients over the ranks (`leaves`); `reduce` averages a
    tensor over the ranks, in place.
    """

    def __init__(
        self, optimizer: LowRankOptimizer, layers: Mapping[nn.Parameter, Layer], reduce: Callable[[Tensor], Tensor]
    ):
        self._optimizer, self._reduce = optimizer, reduce
        self.sources: dict[Tensor, _Source] = {weight: _Source(layer) for weight, layer in layers.items()}
        self._weights = list(layers)
        self._is_sharded = any(ShardInfo.of(weight).dim is not None for weight in layers)
        self._index, self._count, self._to_observe = 0, 1, 0
        self._averaged = False
        self._waiting: list[Tensor] = []
        """Weights whose G are complete, until there are enough to take bases from all at once."""
        self._arrives: weakref.WeakMethod[Callable[[Tensor, Tensor], None]] | None = None
        self._by_leaf: dict[Tensor, Tensor] = {source.leaf: weight for weight, source in self.sources.items()}
        for weight, source in self.sources.items():
            self._read_stored_bases(weight, source)
        optimizer.backward = self

    @staticmethod
    def new_leaf(optimizer: LowRankOptimizer, weight: nn.Parameter) -> nn.Parameter:
        """A leaf for R of a whole weight."""
        shape = optimizer.subspaces[weight].projection.low_rank_shape(weight.shape)
        dtype = torch.promote_types(optimizer.dtype_of(weight), torch.float32)
        return nn.Parameter(torch.zeros((), dtype=dtype, device=local(weight).device).expand(shape))

    @property
    def leaves(self) -> dict[nn.Parameter, nn.Parameter]:
        """Weights -> parameters whose gradients are to be averaged over the ranks in their place."""
        return {} if self._is_sharded else {weight: self.sources[weight].leaf for weight in self._weights}

    # An update's passes.

    @torch.no_grad()
    def begin(self, step: int) -> None:
        """Before the first forward pass of an update: which layers form G, and in which bases the others project."""
        self.drop()
        optimizer, drawn = self._optimizer, []
        self._index, self._count = 0, 1
        for weight, source in self.sources.items():
            source.layer.receive = source.projected = None
            self._read_stored_bases(weight, source)
            subspace, group = optimizer.subspaces[weight], optimizer.group_of(weight)
            if not subspace.refresh_is_due(optimizer.state[weight], group, step):
                continue
            if subspace.rule.reads_gradient(step):
                source.layer.receive = partial(self._receive, weight, source)
            else:
                drawn.append((source, self._arrival(weight, step)))
        found = draw_bases([arrival for _, arrival in drawn]) if drawn else []
        for (source, arrival), bases in zip(drawn, found, strict=True):
            source.projected = Projected(arrival.grad, bases, failed=bases is None)
            if bases is not None:
                source.layer.kept_bases = source.layer.projection.as_stored(bases)
        self._to_observe = self._optimizer.wants_extra_batches()

    def _arrival(self, weight: Tensor, step: int) -> Arrival:
        """A weight's refresh; its gradient has the shape and dtype alone of one."""
        optimizer, part = self._optimizer, local(weight.detach())
        like = part.new_zeros(()).expand(part.shape)
        return Arrival(
            optimizer.subspaces[weight], optimizer.local_state(weight), like, optimizer.group_of(weight), step
        )

    def _read_stored_bases(self, weight: Tensor, source: _Source) -> None:
        layer, subspace = source.layer, self._optimizer.subspaces[weight]
        layer.projection = subspace.projection
        layer.kept_bases = subspace.projection.kept_in(self._optimizer.local_state(weight))

    def begin_micro_batch(self, index: int, count: int) -> None:
        """Before the forward pass of micro-batch `index` of `count`."""
        self._index, self._count = index, count

    @torch.no_grad()
    def _receive(self, weight: Tensor, source: _Source, grad: Tensor) -> Tensor | None:
        """A layer's G of one backward pass. Returns R of the update's gradient where this was the last one."""
        arrives = None if self._arrives is None else self._arrives()
        if arrives is not None:
            wide = torch.promote_types(grad.dtype, torch.float32)
            arrives(weight, mean_part(grad.to(wide), weight) if self._is_sharded else grad.to(weight.dtype))
            return None
        only, last = self._count == 1 and not self._to_observe, self._index == self._count - 1
        wide = torch.promote_types(grad.dtype, torch.float32)
        if self._is_sharded:
            grad = mean_part(grad.to(wide), weight)
        elif not only:
            grad = grad.to(wide)
        else:
            grad = grad.to(local(weight).dtype)
        source.total = grad if source.total is None else source.total.add_(grad)
        if not last or self._to_observe:
            return None
        self._waiting.append(weight)
        if sum(each.numel() for each in self._waiting) >= _NUMBERS_OF_G:
            self._choose(self._waiting)
            self._waiting = []
        # Where somebody waits for a gradient of the leaf, he gets one that `take` does not look at.
        return None if self._is_sharded else source.leaf.new_zeros(()).expand(source.leaf.shape)

    def _choose(self, weights: Sequence[Tensor]) -> None:
        """Take bases from G, which are complete, and keep nothing of these but R. Nothing is stored."""
        arrivals = []
        for weight in weights:
            source, arrival = self.sources[weight], self._arrival(weight, self._optimizer.step_of(weight))
            source.total, arrival.grad = None, self._mean_total(source)
            arrivals.append(arrival)
        for weight, projected in zip(weights, project_now(arrivals), strict=True):
            self.sources[weight].projected, self.sources[weight].is_chosen = projected, True

    def _mean_total(self, source: _Source) -> Tensor:
        total = source.total
        assert total is not None
        if self._is_sharded:  # reduced as it came
            return total
        return self._reduce(total.float() if total.dtype in HALF else total)

    @torch.no_grad()
    def observe(self) -> None:
        """The gradients of an extra batch are complete: refreshes see them, nothing else does."""
        self._to_observe -= 1
        for weight, source in self.sources.items():
            if source.total is not None:
                source.total, total = None, self._mean_total(source)
                self._optimizer.subspaces[weight].observe(total)

    # What the optimizer takes.

    def has_arrived(self, weight: Tensor) -> bool:
        """Whether a weight's gradient has come from its layer."""
        source = self.sources.get(weight)
        return source is not None and (source.leaf.grad is not None or source.total is not None or source.is_chosen)

    def comes_from_here(self, weight: Tensor) -> bool:
        """Whether a weight's gradient never comes from anywhere else."""
        return weight in self.sources

    @torch.no_grad()
    def complete(self) -> None:
        """Make means over the ranks of what has none, and choose the bases that the backward pass has not."""
        left = [weight for weight, source in self.sources.items() if source.total is not None]
        for lot in in_lots(left, Tensor.numel, _NUMBERS_OF_G):
            self._choose(lot)
        self._waiting = []
        if self._is_sharded and not self._averaged:
            self._averaged = True
            self._average([source.leaf.grad for source in self.sources.values() if source.leaf.grad is not None])

    def _average(self, parts: Sequence[Tensor]) -> None:
        lot: list[Tensor] = []
        for place, part in enumerate(parts):
            lot.append(part)
            if place == len(parts) - 1 or sum(each.numel() for each in lot) >= _NUMBERS_AT_ONCE:
                means = self._reduce(torch.cat([each.reshape(-1) for each in lot]))
                for each, mean in zip(lot, torch.split(means, [each.numel() for each in lot]), strict=True):
                    each.copy_(mean.view_as(each))
                lot = []

    def take(self, weight: Tensor) -> Projected:
        """R as the update rule sees it, and what becomes of the bases with it."""
        optimizer, source = self._optimizer, self.sources[weight]
        found, arrived = source.projected, source.leaf.grad
        if source.is_chosen:
            assert found is not None
            low = found.low_rank_grad
        else:
            assert arrived is not None, "it has not arrived"
            shard = optimizer.shard_of(weight)
            low = shard.part(arrived, shard.dim or 0)
        low = low.to(optimizer.dtype_of(weight))
        if found is None:
            return Projected(low)
        return Projected(low, found.new_bases, energy=found.energy, failed=found.failed)

    def drop(self) -> None:
        """Forget the gradients; a refresh that was not stored stays due."""
        self._averaged, self._waiting = False, []
        for source in self.sources.values():
            source.leaf.grad = source.total = None
            if source.is_chosen:
                source.projected, source.is_chosen = None, False

    # For updates inside the backward pass.

    def hand_over_to(self, arrives: Callable[[Tensor, Tensor], None] | None) -> None:
        """Let a bound method have each weight's G as it comes; it is not kept alive."""
        self._arrives = None if arrives is None else weakref.WeakMethod(arrives)

    @torch.no_grad()
    def hand_over_drawn(self) -> dict[Tensor, Projected]:
        """Bases that were drawn for this update; first ones take the place of the zeros in the state."""
        drawn = {weight: source.projected for weight, source in self.sources.items() if source.projected is not None}
        for weight, projected in drawn.items():
            source, state = self.sources[weight], self._optimizer.local_state(weight)
            source.projected = None
            if projected.new_bases is not None and not int(state["refreshes"]):
                self._optimizer.subspaces[weight].put_in_place(state, projected)
                self._read_stored_bases(weight, source)
        return drawn

    def leaf_of(self, weight: Tensor) -> Tensor | None:
        """What gets a weight's R as its gradient."""
        source = self.sources.get(weight)
        return None if source is None else source.leaf

    def weight_of(self, leaf: Tensor) -> Tensor:
        """Whose R it gets."""
        return self._by_leaf[leaf]

    @torch.no_grad()
    def take_part(self, weight: Tensor) -> Tensor:
        """R of one micro-batch, which is forgotten here: the mean over devices and this one's part of it where they
        share the weight."""
        leaf = self.sources[weight].leaf
        part, leaf.grad = leaf.grad, None
        assert part is not None, "it has not arrived"
        if not self._is_sharded:
            return part
        shard = self._optimizer.shard_of(weight)
        return shard.part(self._reduce(part), shard.dim or 0)

    def project_from_now(self, weight: Tensor) -> None:
        """Form no further G in this update: the stored bases are those to project in."""
        if (source := self.sources.get(weight)) is not None:
            source.layer.receive = None
            self._read_stored_bases(weight, source)
