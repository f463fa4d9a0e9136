"""Updates inside the backward pass: each parameter moves as soon as its gradient is there, and the gradient is freed.

Introduced for large models by GaLore (arXiv 2403.03507, section 4.3). Between refreshes the micro-batches of an update
add up R, not G, in float32, so that no more than one full-size gradient of a projected weight exists at a time. G
itself is added up, in float32, only where it is needed: in layers whose basis becomes the SVD of their gradient, and in
all of them with clipping by the full gradient's norm. Online PCA needs G in every update, because its loss is not
linear in G; it saves memory only without accumulation. Parameters without a projection (embeddings, norms, head) keep
their gradient until the last micro-batch.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from peft_pretraining.distributed.sharding import ShardInfo, whole_norm
from peft_pretraining.optim import scaled_losses
from peft_pretraining.optim.backward_hooks import remove_all, weak_end, weak_hook
from peft_pretraining.optim.basis.subspace import Projected
from peft_pretraining.optim.gradient_sums import GradientSums, Noise
from peft_pretraining.optim.low_rank import LowRankOptimizer
from peft_pretraining.optim.state.base import check_dense, gradient_of
from peft_pretraining.optim.state.settings import check_number
from peft_pretraining.optim.tensors.projection import Bases


class PerLayerUpdates:
    """Drives a `LowRankOptimizer` from hooks on its parameters' gradients; its `step` then has nothing left to do.

        >>> weight = torch.nn.Parameter(torch.zeros(6, 4))
        >>> optimizer = LowRankOptimizer([{"params": [weight], "rank": 2}], lr=0.1)
        >>> with PerLayerUpdates(optimizer, clip=1.0) as updates:
        ...     for step in range(3):
        ...         updates.begin_update(step)
        ...         for index in range(2):
        ...             updates.begin_micro_batch(index, 2)
        ...             (weight - 1).square().mean().div(2).backward()  # moves the weight at the second one
        >>> weight.grad is None, int(optimizer.state[weight]["step"])
        (True, 3)

    `reduce` averages a tensor over the ranks, in place. `clip` bounds the norm of each parameter's gradient (of R, or
    of G with `clip_full`), because the global norm is known only when the first parameters have moved; 0 is off.
    `early_first_bases` takes the very first SVD of each layer from the first micro-batch alone: otherwise all layers
    would add up full gradients in that update. `sum_dtype`, one of `SUM_DTYPES`, keeps sums over micro-batches of
    bfloat16 weights' gradients in fewer bytes, rounded stochastically with noise that `seed` decides on.

    For every update call `begin_update`, and `begin_micro_batch` before each forward pass. A parameter whose gradient
    is not finite stays as it is, with its refresh pending. While all of an update's gradients are zero (a batch without
    targets), none of it takes place. A parameter that the last micro-batch does not use moves at the end of that
    micro-batch's backward pass (with reentrant checkpointing in `grad_norm` or the optimizer's `step`).

    Parameters and groups that join later, or are unfrozen, are taken in. `torch.amp.GradScaler` is refused. The hooks
    go with `close`, at the end of a `with` block, or when this object is no longer referred to; they keep neither it
    nor the optimizer alive.
    """

    def __init__(
        self,
        optimizer: LowRankOptimizer,
        reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        *,
        clip: float = 0.0,
        clip_full: bool = False,
        early_first_bases: bool = True,
        sum_dtype: str = "float32",
        seed: int = 0,
    ):
        check_number("clip", clip)
        if optimizer.has_followers:
            raise RuntimeError("the optimizer has per-layer updates already: close() them first")
        self._optimizer, self._reduce, self._clip, self._clip_full = optimizer, reduce, clip, clip_full
        self._early_first_bases = early_first_bases
        self._sums = GradientSums(sum_dtype, seed)
        self._whole: set[Tensor] = set()  # those whose sum is of G, not of R
        self._kept: dict[Tensor, None] = {}  # without a projection: their sum is in `grad`
        self._early: dict[Tensor, Projected] = {}
        self._squared_norms: dict[Tensor, Tensor] = {}
        self._zero: dict[Tensor, tuple[Tensor | None, Projected | None]] = {}
        """Parameters whose gradients were zero, until one is not."""
        self._index, self._count = 0, 1
        self._begun = self._frozen = self._moved = self._queued = False
        self._hooked: set[Tensor] = set()
        self._handles: list[RemovableHandle] = []
        self._finalizer = weakref.finalize(self, remove_all, self._handles)
        self._finalizer.atexit = False
        self.attach()
        optimizer.follow(self)
        scaled_losses.watch(self)

    def close(self) -> None:
        """Take the hooks off: gradients stay where autograd puts them, and `optimizer.step` makes ordinary updates."""
        if not self._finalizer.alive:
            return
        self._finalizer()
        self._hooked.clear()
        self._drop()
        self._optimizer.unfollow(self)
        scaled_losses.forget(self)

    def __enter__(self) -> PerLayerUpdates:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def parameters(self) -> set[Tensor]:
        """Those that move inside the backward pass."""
        return self._hooked

    def attach(self) -> None:
        """Put hooks on parameters that have none yet; frozen ones have no gradients that could arrive."""
        if not self._finalizer.alive:
            return
        for group in self._optimizer.param_groups:
            for param in group["params"]:
                if param.requires_grad and param not in self._hooked:
                    self._hooked.add(param)
                    self._handles.append(param.register_post_accumulate_grad_hook(weak_hook(self._arrives)))

    def begin_update(self, step: int, frozen: bool = False) -> None:
        """Before the first micro-batch of 0-based update `step`; `frozen` drops its gradients."""
        self._optimizer.begin_update(step, frozen)

    def begin(self, frozen: bool) -> None:
        """The optimizer has begun an update."""
        self._drop()
        self.attach()
        self._frozen, self._begun = frozen, True

    def begin_micro_batch(self, index: int, count: int) -> None:
        """Before the forward pass of micro-batch `index` of `count`."""
        if not 0 <= index < count:
            raise ValueError(f"index must be at least 0 and below count, got {index} of {count}")
        self._index, self._count, self._queued = index, count, False

    def _drop(self) -> None:
        """Forget the update before, and what one that broke off or did not take place has left."""
        for param in self._kept:
            param.grad = None
        for param in {*self._early, *self._zero}:
            self._take_back(param)
        for gathered in (self._sums, self._whole, self._kept, self._early, self._squared_norms, self._zero):
            gathered.clear()
        self._moved = self._queued = False

    def grad_norm(self) -> Tensor:
        """Global norm of this update's gradients before clipping: of R where there is a projection, else of G. A scalar
        in float64; 0 without gradients."""
        self.finish()
        if not self._squared_norms:
            return torch.zeros((), dtype=torch.float64)
        return torch.stack(list(self._squared_norms.values())).sum().sqrt()

    def _arrives(self, param: Tensor) -> None:
        self._arrived(param, self._optimizer.group_of(param))

    @torch.no_grad()
    def _arrived(self, param: Tensor, group: dict[str, Any]) -> None:
        """The hook: the gradient of one micro-batch, in `param.grad`, added to those before for unprojected ones."""
        check_dense(param, type(self).__name__)
        if self._begun and param in self._squared_norms:
            raise RuntimeError(
                f"a parameter of shape {tuple(param.shape)} has made update {self._optimizer.update_step} already: "
                "call begin_update before every update, and begin_micro_batch before every micro-batch"
            )
        last = self._index == self._count - 1
        if last and self._count > 1 and not self._queued:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(weak_end(self.finish))
        self._gather(param, group)
        if last:
            self._complete(param, group)

    def _gather(self, param: Tensor, group: dict[str, Any]) -> None:
        """Add the gradient that has arrived, or its R, to those before."""
        subspace, narrow = self._optimizer.subspaces.get(param), self._count > 1 and self._sums.narrows(param)
        noise = Noise(self._optimizer.name_of(param), self._optimizer.step_of(param), self._index) if narrow else None
        if subspace is None and not narrow:
            self._kept[param] = None  # autograd adds to `grad`
            return
        if subspace is None:
            self._sums.add(param, gradient_of(param), noise, low_rank=False)
            param.grad = None
            return
        grad, param.grad = gradient_of(param), None
        full = self._needs_full_gradient(param, group, grad)
        if full:
            self._whole.add(param)
        if full and (self._count == 1 or self._optimizer.objects(param).reads_gradient):
            # In its own dtype, as autograd would: of all layers they are large, and of one there is nothing to add.
            self._sums[param] = self._sums[param].add_(grad) if param in self._sums else grad
            return
        part = grad if full else subspace.project_in(self._bases(param, self._optimizer.local_state(param)), grad)
        self._sums.add(param, part, noise, low_rank=not full)

    def _complete(self, param: Tensor, group: dict[str, Any]) -> None:
        """All micro-batches that use a parameter have added to its gradient."""
        optimizer = self._optimizer
        if param in self._kept:
            del self._kept[param]
            self._move(param, group, self._reduce(gradient_of(param)), None)
            param.grad = None
            return
        as_it_came = param in self._whole and (self._count == 1 or optimizer.objects(param).reads_gradient)
        total: Any = self._reduce(self._sums.pop(param) if as_it_came else self._sums.total(param))
        subspace = optimizer.subspaces.get(param)
        if subspace is None:
            grad, total = total.to(optimizer.dtype_of(param)), None  # a float32 sum is not kept beside it
            self._move(param, group, grad, None)
            return
        if param in self._whole:
            self._whole.remove(param)
            state = optimizer.local_state(param)
            self._move(param, group, total, subspace.project(state, total, group, optimizer.step_of(param)))
            return
        projected = self._early.pop(param, None) or Projected(total)
        projected.low_rank_grad, total = total.to(optimizer.dtype_of(param)), None
        self._move(param, group, None, projected)

    @torch.no_grad()
    def finish(self) -> None:
        """Move what only earlier micro-batches have used, once the last one's backward pass is over."""
        if self._index == self._count - 1:
            for param in [*self._sums, *self._kept]:
                self._complete(param, self._optimizer.group_of(param))

    def _bases(self, param: Tensor, state: dict[str, Tensor]) -> Bases:
        """Those in which this update's gradients are projected as they arrive."""
        early = self._early.get(param)
        return (early and early.new_bases) or self._optimizer.subspaces[param].bases(state)

    def _needs_full_gradient(self, param: Tensor, group: dict[str, Any], grad: Tensor) -> bool:
        """Whether this update's G, not R, has to be added up; makes new bases early where that avoids it."""
        subspace, state = self._optimizer.subspaces[param], self._optimizer.local_state(param)
        step = self._optimizer.step_of(param)
        if self._clip_full or self._optimizer.objects(param).reads_gradient:
            return True
        if param in self._early or not subspace.refresh_is_due(state, group, step):
            return False
        reads, first = subspace.rule.reads_gradient(step), not int(state["refreshes"])
        if self._index == 0 and self._count > 1 and (not reads or (first and self._early_first_bases)):
            # Every rank must come to the same basis.
            early = subspace.project(state, self._reduce(grad.clone()) if reads else grad, group, step)
            if early.new_bases is not None:
                early.low_rank_grad = grad.new_empty(0)  # every micro-batch is projected as it arrives, this one, too
                if first:
                    subspace.put_in_place(state, early)
                self._early[param] = early
                return False
        return True

    def _take_back(self, param: Tensor) -> None:
        """The update does not take place: a first basis that is in place already goes, and stays due."""
        if subspace := self._optimizer.subspaces.get(param):
            subspace.clear_first(self._optimizer.local_state(param))

    def _move(self, param: Tensor, group: dict[str, Any], grad: Tensor | None, projected: Projected | None) -> None:
        """Clip and update one parameter from its complete gradient, G or its projection."""
        gradient, shard = projected.low_rank_grad if projected else grad, self._optimizer.shard_of(param)
        assert gradient is not None
        reads = self._optimizer.objects(param).lift.reads_gradient and grad is not None
        norm = whole_norm([(grad, ShardInfo.of(param)) if reads and grad is not None else (gradient, shard)])
        value = float(norm)
        if not math.isfinite(value):  # in float64 it overflows no more
            norm = whole_norm([(gradient.double(), shard)])
            value = float(norm)
        self._squared_norms[param] = norm.double().square()
        if self._frozen or not math.isfinite(value):
            self._take_back(param)
            return
        if value == 0 and not self._moved and shard.on_all_ranks(~gradient.any()):
            # Expanded zeros take no memory.
            self._zero[param] = (None if grad is None else grad.new_zeros(()).expand(grad.shape), projected)
            return
        self._moved = True
        for waiting, (zeros, its) in self._zero.items():
            self._optimizer.update(waiting, zeros, self._optimizer.group_of(waiting), its)
        self._zero.clear()
        if self._clip:
            if self._clip_full and projected and grad is not None:
                norm = whole_norm([(grad, ShardInfo.of(param))])
            factor = (self._clip / (norm + 1e-6)).clamp(max=1.0)
            gradient.mul_(factor)
            if projected and reads and grad is not None:
                grad.mul_(factor)
            elif projected:
                projected.scaled_by = factor
        self._optimizer.update(param, grad, group, projected)
