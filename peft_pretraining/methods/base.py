"""What a training method may do, and when. The train loop knows methods only through this protocol.

What concerns gradients, their norm, their scaling, further batches, is the optimizer's (optim/state/gradient_owner.py).
State lies in three places: tensors of the model, tensors in `optimizer.state`, and small numbers in the method. All
of it is restored without pickled objects. Every default below is the identity or does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from peft_pretraining.nn import LowRankLinear, replace_linear

if TYPE_CHECKING:
    from peft_pretraining.config import Config

OptimizerT = TypeVar("OptimizerT", bound=Optimizer)
"""What `build_optimizer` makes, and the other hooks are called with."""


class TrainingMethod(Generic[OptimizerT]):
    """One way to train: a subclass in the `method.py` of the method's folder overrides what it needs."""

    def __init__(self, config: Config):
        self.config = config

    # Building.

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

    def sharded_dimension(self, name: str, param: Tensor) -> int | None:
        """The dimension along which a parameter had best be sharded; None if every device keeps all of it, for which it
        must be frozen."""
        return 0

    def build_optimizer(self, model: nn.Module) -> OptimizerT:
        """The optimizer over the distributed model's parameters, with all of its state already created."""
        raise NotImplementedError

    def prepare(self, model: nn.Module, optimizer: OptimizerT, reduce: Callable[[Tensor], Tensor]) -> None:
        """Everything is built and restored. `reduce` averages a tensor over the ranks, in place."""

    # Each update.

    def before_update(self, model: nn.Module, optimizer: OptimizerT, step: int) -> None:
        """Before the first forward pass of update `step`, also of one that is skipped later."""

    def before_step(self, model: nn.Module, optimizer: OptimizerT, step: int) -> None:
        """Gradients are complete, reduced, clipped and finite; the optimizer's step is next. Not if it is skipped."""

    def acts_before_step(self, optimizer: OptimizerT, step: int) -> bool:
        """Whether `before_step` does anything in update `step`, before which this is asked.

        Where it does not, the host need not know whether the update takes place, and does not wait for the device to
        find out: `before_step` is not called then.
        """
        return type(self).before_step is not TrainingMethod.before_step

    # Saving.

    def merged_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Weights of the plain LLaMA that computes the same function. Never changes the training weights."""
        return model.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Small numbers and strings, saved as JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
