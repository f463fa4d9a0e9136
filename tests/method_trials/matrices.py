"""What the trials share: one rule for the target matrices, AdamW for the rest."""

from typing import Any

from torch import Tensor, nn

from peft_pretraining.methods._low_rank.targets import named_by_flag
from peft_pretraining.methods.base import TrainingMethod
from peft_pretraining.methods.groups import by_role
from peft_pretraining.models.targets import target_linears
from peft_pretraining.optim import LowRankOptimizer


class ByMatrix(TrainingMethod[LowRankOptimizer]):
    def rule(self) -> Any:
        raise NotImplementedError

    def build_optimizer(self, model: nn.Module) -> LowRankOptimizer:
        with named_by_flag(self.config):
            targets = {f"{name}.weight" for name in target_linears(model, self.config.method.target_modules)}
        named = list(model.named_parameters())
        others = {"params": [each for each in named if each[0] not in targets]}
        matrices = {"params": [each for each in named if each[0] in targets], "rule": self.rule()}
        settings = self.config.optimizer
        return LowRankOptimizer(
            [*by_role(self.config, model, others, targets), matrices],
            lr=settings.lr,
            **self.config.rule.arguments(),
            weight_decay=settings.weight_decay,
        )

    def sharded_dimension(self, name: str, param: Tensor) -> int | None:
        return 1 if param.ndim == 2 and param.shape[1] >= param.shape[0] else 0
