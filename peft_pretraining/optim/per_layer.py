"""Updates inside the backward pass: each parameter moves as soon as its gradient is there, and the gradient is freed.

Introduced for large models by GaLore (arXiv 2403.03507, section 4.3). Between refreshes the micro-batches of an update
add up R, not G, in float32, so that no more than one full-size gradient of a projected weight exists at a time. G
itself is added up, in float32, only where it is needed: in layers whose basis becomes the SVD of their gradient, and in
all of them with clipping by the full gradient's norm. Online PCA needs G in every update, because its loss is not
linear in G; it saves memory only without accumulation. Parameters without a projection (embeddings, norms, head) keep
their gradient until the last micro-batch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from peft_pretraining.distributed.process_group import as_it_is
from peft_pretraining.optim import scaled_losses
from peft_pretraining.optim.backward_hooks import remove_all, weak_end, weak_hook
from peft_pretraining.optim.basis.subspace import Projected
from peft_pretraining.optim.complete_gradients import Complete, CompleteGradients
from peft_pretraining.optim.gradient_sums import GradientSums, Noise
from peft_pretraining.optim.low_rank import LowRankOptimizer
from peft_pretraining.optim.state.base import check_dense, gradient_of
from peft_pretraining.optim.state.settings import check_number


class PerLayerUpdates(AbstractContextManager["PerLayerUpdates"]):
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
        reduce: Callable[[Tensor], Tensor] = as_it_is,
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
        self._optimizer, self._reduce, self._clip_full = optimizer, reduce, clip_full
        self._early_first_bases, self._sums = early_first_bases, GradientSums(sum_dtype, seed)
        self._whole: set[Tensor] = set()  # those whose sum is of G, not of R
        self._kept: dict[Tensor, None] = {}  # without a projection: their sum is in `grad`
        self._early: dict[Tensor, Projected] = {}
        self._complete = CompleteGradients(optimizer, reduce, clip, clip_full)
        self._index, self._count, self._begun = 0, 1, False
        self._pass: int | None = None  # the backward pass whose end is awaited
        self._hooked: set[Tensor] = set()
        self._handles: list[RemovableHandle] = []
        self._finalizer = weakref.finalize(self, remove_all, self._handles)
        self._finalizer.atexit = False
        if optimizer.backward is not None:
            optimizer.backward.hand_over_to(self._arrives_whole)
        self.attach()
        optimizer.follow(self)
        scaled_losses.watch(self)

    def close(self) -> None:
        """Take the hooks off: gradients stay where autograd puts them, and `optimizer.step` makes ordinary updates."""
        if not self._finalizer.alive:
            return
        self._finalizer()
        self._hooked.clear()
        self._drop(frozen=False)
        if self._optimizer.backward is not None:
            self._optimizer.backward.hand_over_to(None)
        self._optimizer.unfollow(self)
        scaled_losses.forget(self)

    def __exit__(self, *error: object) -> None:
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
                    leaf = None if self._optimizer.backward is None else self._optimizer.backward.leaf_of(param)
                    hook = weak_hook(self._arrives if leaf is None else self._arrives_projected)
                    self._handles.append((param if leaf is None else leaf).register_post_accumulate_grad_hook(hook))

    def begin_update(self, step: int, frozen: bool = False) -> None:
        """Before the first micro-batch of 0-based update `step`; `frozen` drops its gradients."""
        self._optimizer.begin_update(step, frozen)

    def begin(self, frozen: bool) -> None:
        """The optimizer has begun an update."""
        self._drop(frozen)
        self.attach()
        if self._optimizer.backward is not None:
            self._early |= self._optimizer.backward.hand_over_drawn()
        self._begun = True

    def begin_micro_batch(self, index: int, count: int) -> None:
        """Before the forward pass of micro-batch `index` of `count`."""
        if not 0 <= index < count:
            raise ValueError(f"index must be at least 0 and below count, got {index} of {count}")
        self._index, self._count, self._pass = index, count, None

    def _drop(self, frozen: bool) -> None:
        """Forget the update before, and what one that broke off or did not take place has left; another one begins."""
        for param in self._kept:
            param.grad = None
        for param in self._early:
            self._complete.take_back(param)
        for gathered in (self._sums, self._whole, self._kept, self._early):
            gathered.clear()
        self._complete.begin(frozen)
        self._pass = None

    def read_late(self) -> None:
        """From now on nothing is read back from the device in an update that stores no new basis, and `settle` is told
        when it has to be known. Only for loops that make no update without targets: gradients of nothing but zeros move
        their parameters then. A lot of parameters moves or stays as one."""
        self._complete.late = True

    def settle(self) -> None:
        """Take back what was counted for parameters that stayed as they are."""
        self._complete.settle()

    def grad_norm(self) -> Tensor:
        """Global norm of this update's gradients before clipping: of R where there is a projection, else of G. A scalar
        in float64; 0 without gradients."""
        self.finish()
        if not self._squared_norms:
            return torch.zeros((), dtype=torch.float64)
        return torch.stack(list(self._squared_norms.values())).sum().sqrt()

    @property
    def _squared_norms(self) -> dict[Tensor, Tensor]:
        return self._complete.squared_norms

    def _arrives(self, param: Tensor) -> None:
        self._arrived(param, self._optimizer.group_of(param))

    def _arrives_projected(self, leaf: Tensor) -> None:
        if leaf.grad is not None and self._optimizer.backward is not None:  # else G has arrived
            self._arrives(self._optimizer.backward.weight_of(leaf))

    def _arrives_whole(self, param: Tensor, grad: Tensor) -> None:
        """G of one micro-batch, of a layer that otherwise returns R."""
        self._arrived(param, self._optimizer.group_of(param), grad)

    @torch.no_grad()
    def _arrived(self, param: Tensor, group: dict[str, Any], grad: Tensor | None = None) -> None:
        """The hook: the gradient of one micro-batch, in `param.grad`, added to those before for unprojected ones; or R,
        which a leaf has; or `grad`."""
        if param.grad is not None:
            check_dense(param, type(self).__name__)
        if self._begun and param in self._complete:
            raise RuntimeError(
                f"a parameter of shape {tuple(param.shape)} has made update {self._optimizer.update_step} already: "
                "call begin_update before every update, and begin_micro_batch before every micro-batch"
            )
        last = self._index == self._count - 1
        if last and (current := torch._C._current_graph_task_id()) != self._pass:
            self._pass = current
            torch.autograd.Variable._execution_engine.queue_callback(weak_end(self._pass_ends))
        self._gather(param, group, grad)
        if last:
            self._complete.add(self._complete_of(param, group))

    @torch.no_grad()
    def _pass_ends(self, within_another: bool) -> None:
        """The last micro-batch's backward pass is over, or, with reentrant checkpointing, a part of it."""
        if within_another:
            self._complete.move()
        else:
            self.finish()

    def _gather(self, param: Tensor, group: dict[str, Any], grad: Tensor | None) -> None:
        """Add the gradient that has arrived, or its R, to those before."""
        backward = self._optimizer.backward
        subspace, narrow = self._optimizer.subspaces.get(param), self._count > 1 and self._sums.narrows(param)
        noise = Noise(self._optimizer.name_of(param), self._optimizer.step_of(param), self._index) if narrow else None
        if subspace is None and not narrow:
            self._kept[param] = None  # autograd adds to `grad`
            return
        if subspace is None:
            self._sums.add(param, gradient_of(param), noise, low_rank=False)
            param.grad = None
            return
        if grad is None and backward is not None and backward.comes_from_here(param):
            self._sums.add(param, backward.take_part(param), noise)
            return
        if grad is None:
            grad, param.grad = gradient_of(param), None
        full = self._needs_full_gradient(param, group, grad)
        if full:
            self._whole.add(param)
        if full and (self._count == 1 or self._optimizer.objects(param).reads_gradient):
            # In its own dtype, as autograd would: of all layers they are large, and of one there is nothing to add.
            self._sums[param] = self._sums[param].add_(grad) if param in self._sums else grad
            return
        part = grad
        if not full:
            early = self._early.get(param)
            bases = (early and early.new_bases) or subspace.bases(self._optimizer.local_state(param))
            part = subspace.project_in(bases, grad)
        if self._count == 1 and self._reduce is as_it_is:
            self._sums[param] = part  # there is nothing to add to it
        else:
            self._sums.add(param, part, noise, low_rank=not full)

    def _complete_of(self, param: Tensor, group: dict[str, Any]) -> Complete:
        """A parameter's gradient, to which all micro-batches that use it have added: taken out of where it was."""
        optimizer, objects = self._optimizer, self._optimizer.objects(param)
        if param in self._kept:
            del self._kept[param]
            gradient, param.grad = gradient_of(param), None
            return Complete(param, group, gradient)
        as_it_came = self._count == 1 and self._reduce is as_it_is
        as_it_came |= param in self._whole and (self._count == 1 or objects.reads_gradient)
        total = self._sums.pop(param) if as_it_came else self._sums.total(param)
        subspace = optimizer.subspaces.get(param)
        if subspace is None:
            return Complete(param, group, total)
        if param not in self._whole:
            return Complete(param, group, total, self._early.pop(param, None) or Projected(total))
        self._whole.remove(param)
        total = self._reduce(total)
        projected = subspace.project(optimizer.local_state(param), total, group, optimizer.step_of(param))
        # Where nobody reads G any more, it is not to exist beside those of other layers.
        whole = total if self._clip_full or objects.reads_gradient else None
        return Complete(param, group, projected.low_rank_grad, projected, whole, averaged=True)

    @torch.no_grad()
    def finish(self) -> None:
        """Move what only earlier micro-batches have used, and what waits, once the last one's backward pass is over."""
        if self._index == self._count - 1:
            for param in [*self._sums, *self._kept]:
                self._complete.add(self._complete_of(param, self._optimizer.group_of(param)))
            self._complete.move()

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
                if self._optimizer.backward is not None:
                    self._optimizer.backward.project_from_now(param)
                return False
        return True
