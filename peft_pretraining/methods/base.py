"""What a training method may do, and when. The train loop knows methods only through this protocol.

State lives in three places: tensors of the model, tensors in `optimizer.state`, and small numbers in the method. All of
it is restored without pickled objects. Every default below is the identity or does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peft_pretraining.distributed import LowRankReduction
from peft_pretraining.distributed.sharding import local, total_norm
from peft_pretraining.nn import LowRankLinear, replace_linear

if TYPE_CHECKING:
    from peft_pretraining.config import Config

OptimizerT = TypeVar("OptimizerT", bound=Optimizer)
"""What `build_optimizer` makes, and the other hooks are called with."""


class TrainingMethod(Generic[OptimizerT]):
    """One way to train: a subclass, in the `method.py` of its folder, overrides what it needs."""

    def __init__(self, config: Config):
        self.config = config

    def replacements(self, model: nn.Module) -> dict[str, Callable[[nn.Linear], LowRankLinear]]:
        """The linear layers to replace, by name, each with what makes the new layer of the old one.

        `model` may be on the meta device, where layers have names and shapes alone. They get their weights one by one,
        when they are replaced, so that the whole model never exists beside its replacement.
        """
        return {}

    def convert(self, model: nn.Module) -> nn.Module:
        """Change a model that has its weights, before it is distributed: here as `replacements` says.

        A method that overrides this sees all of its weights at once.
        """
        for name, make in self.replacements(model).items():
            replace_linear(model, name, make)
        return model

    def build_optimizer(self, model: nn.Module) -> OptimizerT:
        """The optimizer over the distributed model's parameters, with all of its state already created."""
        raise NotImplementedError

    @property
    def reduces_gradients(self) -> bool:
        """Whether the method itself averages all gradients over the ranks; the model is then not wrapped in DDP."""
        return False

    def sharded_dimension(self, name: str, param: Tensor) -> int:
        """The dimension along which a parameter had best be divided over devices."""
        return 0

    def is_replicated(self, name: str, param: Tensor) -> bool:
        """Whether devices that divide the model keep all of a parameter, which must be frozen."""
        return False

    def low_rank_reduction(self, model: nn.Module, optimizer: OptimizerT) -> LowRankReduction | None:
        """How DDP can reduce projected gradients instead of whole ones; None where the method needs whole ones."""
        return None

    def prepare(self, model: nn.Module, optimizer: OptimizerT, reduce: Callable[[Tensor], Tensor]) -> None:
        """Everything is built and restored. `reduce` averages a tensor over the ranks, in place."""

    def extra_batches(self, model: nn.Module, optimizer: OptimizerT, step: int) -> int:
        """Further total batches whose gradients `observe_gradients` should see before update `step`."""
        return 0

    def observe_gradients(self, model: nn.Module, optimizer: OptimizerT) -> None:
        """The gradients of an extra batch are complete and reduced; they are dropped afterwards."""

    def before_forward(self, model: nn.Module, optimizer: OptimizerT, step: int) -> None:
        """Before the first forward pass of update `step`, also of one that is skipped later."""

    def before_micro_batch(self, model: nn.Module, optimizer: OptimizerT, index: int, count: int) -> None:
        """Before the forward pass of micro-batch `index` of `count`."""

    def grad_norm(self, model: nn.Module, optimizer: OptimizerT) -> Tensor:
        """Global norm of the gradients, a scalar; what clipping uses. Gradients are complete and reduced."""
        return total_norm(p.grad for p in model.parameters() if p.grad is not None)

    def scale_gradients(self, model: nn.Module, optimizer: OptimizerT, factor: Tensor) -> None:
        """Multiply every gradient by a scalar, after `grad_norm`."""
        torch._foreach_mul_([local(p.grad) for p in model.parameters() if p.grad is not None], factor)

    def before_optimizer_step(self, model: nn.Module, optimizer: OptimizerT, step: int) -> None:
        """Gradients are complete, reduced, clipped and finite."""

    def after_optimizer_step(self, model: nn.Module, optimizer: OptimizerT, step: int) -> None:
        """The weights have moved; not called for a skipped update."""

    def merged_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Weights of the plain LLaMA that computes the same function. Never changes the training weights."""
        return model.state_dict()

    def metrics(self) -> dict[str, float]:
        """Numbers about the last update, for the log."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Small numbers and strings, saved as JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
