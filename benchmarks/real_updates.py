"""Real updates of any method on any layout of devices: what the benchmarks of several ranks measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peft_pretraining.config import Config
from peft_pretraining.distributed import ProcessGroup
from peft_pretraining.methods import METHODS, load_method
from peft_pretraining.methods.base import TrainingMethod
from peft_pretraining.models.loss import token_loss_sum
from peft_pretraining.optim.state.gradient_owner import GradientOwner, gradient_owner
from peft_pretraining.training.build_model import distributed_model, reduced_model

LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp-whole": {"reduce_low_rank": False},
    "ddp": {},
    "fsdp": {"distributed_type": "fsdp"},
}
"""Settings by the name that tables give them; `ddp-whole` never reduces projected gradients."""
_SETTINGS = {"relora": {"relora": 200}, "switchlora": {"lora_alpha": 1.0, "init_lora_type": "switchlora"}}
_TOKENS = 16


def config_of(name: str, layout: str, **settings: Any) -> Config:
    """The configuration of method `name` on layout `layout`, in float32; `settings` are flags."""
    own = {**METHODS[name].defaults, **_SETTINGS.get(name, {}), **LAYOUTS[layout]}
    return Config.from_settings({"method": name, **own, **settings}).replace(dtype="float32")


@dataclass
class Trainee:
    """A model in the hands of a method, distributed."""

    config: Config
    group: ProcessGroup
    model: nn.Module
    parallel_model: nn.Module
    method: TrainingMethod
    optimizer: Optimizer
    gradients: GradientOwner

    @classmethod
    def build(cls, name: str, layout: str, shape: dict[str, Any], group: ProcessGroup, **settings: Any) -> Trainee:
        """Method `name` on layout `layout`, in float32. `shape` is a model JSON's; `settings` are flags."""
        config = config_of(name, layout, **settings)
        method = load_method(name)(config)
        model = distributed_model(config, shape, method, group)
        optimizer = method.build_optimizer(model)
        method.prepare(model, optimizer, group.all_reduce_mean)
        gradients = gradient_owner(optimizer, model)
        return cls(config, group, model, reduced_model(config, group, model, gradients), method, optimizer, gradients)

    def update(self, step: int, before_step: Callable[[], None] = lambda: None) -> None:
        """One update, in the train loop's order; `before_step` is called when gradients are complete."""
        method, model, optimizer = self.method, self.model, self.optimizer
        self.gradients.begin_update(step)
        method.before_update(model, optimizer, step)
        token_loss_sum(self.parallel_model, {"input_ids": self._tokens(step)}).backward()
        self.gradients.grad_norm()
        before_step()
        method.before_step(model, optimizer, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _tokens(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        vocabulary = self.model.config.vocab_size
        return torch.randint(0, vocabulary, (1, _TOKENS), generator=generator).to(self.group.device)
