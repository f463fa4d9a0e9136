"""What a training loop asks about gradients, between the backward pass and the step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peft_pretraining.distributed.sharding import local, total_norm

if TYPE_CHECKING:
    from peft_pretraining.distributed import LowRankReduction


class GradientOwner:
    """The answers of an optimizer that takes gradients as they are; the package's own optimizers are such owners."""

    param_groups: list[dict[str, Any]]
    update_step: int | None = None
    """The 0-based update that `begin_update` has announced."""
    reported: Mapping[str, float | Tensor] = MappingProxyType({})
    """What a method adds to `metrics`."""
    norm_order: Sequence[Tensor] | None = None
    """The parameters in the order in which norms are summed, the model's: else rounding depends on their grouping."""
    masks_updates: bool = False
    """Whether `step` heeds the attribute `found_inf`, a float32 scalar on the device that is not 0 for an update to be
    left out, so that nobody has to read it first. Of such an update the optimizer learns by `settle`."""

    def begin_update(self, step: int, frozen: bool = False) -> None:
        """Takes `step` as the 0-based number of the update, before its first forward pass, and drops what a skipped one
        may have left. `frozen`: its gradients are to move nothing, not even inside the backward pass."""
        self.update_step = step

    def read_late(self) -> None:
        """The loop reads what becomes of an update late, and tells it by `settle`; it never makes an update without
        targets. What moves inside the backward pass is to read nothing back in between, either."""

    def begin_micro_batch(self, index: int, count: int) -> None:
        """Before the forward pass of micro-batch `index` of `count`."""

    def wants_extra_batches(self) -> int:
        """Further total batches whose gradients `observe_gradients` should see before those of the update."""
        return 0

    def observe_gradients(self) -> None:
        """The gradients of an extra batch are complete and reduced; they are dropped afterwards."""

    def low_rank_reduction(self) -> LowRankReduction | None:
        """How DDP can average projected gradients in place of whole ones; None where whole ones are needed."""
        return None

    @property
    def leaves(self) -> Mapping[nn.Parameter, nn.Parameter]:
        """Weights that have no gradients -> parameters of no model whose gradients are to be averaged over the ranks in
        their place."""
        return MappingProxyType({})

    def in_norm_order(self) -> Iterable[Tensor]:
        """Parameters that have a gradient."""
        every = self.norm_order or [param for group in self.param_groups for param in group["params"]]
        return (param for param in every if param.grad is not None)

    def grad_norm(self) -> Tensor:
        """Global 2-norm of the gradients, over all devices; a scalar, which clipping uses."""
        return total_norm(param.grad for param in self.in_norm_order() if param.grad is not None)

    def scale_(self, factor: Tensor) -> None:
        """Multiplies every gradient by a scalar, in place, after `grad_norm`."""
        if gradients := [local(param.grad) for param in self.in_norm_order() if param.grad is not None]:
            torch._foreach_mul_(gradients, factor)

    def settle(self, skipped: bool) -> None:
        """Tells what `found_inf` of the last `step` was, before anything else is asked for that depends on it: the next
        step, saving, an evaluation. With `skipped` the optimizer takes back what it has counted without looking."""

    def settle_all(self) -> None:
        """Settles what moved inside the backward pass as well: before its state is saved or replaced."""

    def metrics(self) -> dict[str, float]:
        """Numbers about the last update, for the log: once, so read them after it."""
        return {name: float(value) for name, value in self.reported.items()}


class _OfAnyOptimizer(GradientOwner):
    def __init__(self, optimizer: Optimizer):
        self.param_groups = optimizer.param_groups


def gradient_owner(optimizer: Optimizer, model: nn.Module) -> GradientOwner:
    """The owner of the gradients of a model's optimizer: itself, or one that takes them as they are for torch's."""
    owner = optimizer if isinstance(optimizer, GradientOwner) else _OfAnyOptimizer(optimizer)
    owner.norm_order = list(model.parameters())
    return owner
