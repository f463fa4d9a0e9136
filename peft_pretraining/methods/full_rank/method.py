"""Full-rank training: the baseline. AdamW is torch's; the other update rules are those of the projected optimizer."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from peft_pretraining.distributed import own_share, sharded_optimizer
from peft_pretraining.methods.base import TrainingMethod
from peft_pretraining.optim import LowRankOptimizer
from peft_pretraining.optim.update_rules import AdamW8bit


class FullRank(TrainingMethod[Optimizer]):
    def build_optimizer(self, model: nn.Module) -> Optimizer:
        settings, own = self.config.optimizer, self.config.rule.arguments()
        if settings.optimizer not in ("adamw", "adam_zero"):
            return LowRankOptimizer(
                model.named_parameters(),
                rule=AdamW8bit(torch_epsilon=True) if settings.optimizer == "adamw8bit" else settings.optimizer,
                lr=settings.lr,
                **own,
                weight_decay=settings.weight_decay,
            )
        arguments = {"lr": settings.lr, **own, "weight_decay": settings.weight_decay, "fused": True}
        if settings.optimizer == "adam_zero":
            optimizer = sharded_optimizer(model.parameters(), AdamW, arguments)
        else:
            optimizer = AdamW(model.parameters(), **arguments)
        create_adam_state(own_share(optimizer))
        return optimizer


def create_adam_state(optimizer: Optimizer) -> None:
    """torch creates this at the first step; a checkpoint needs tensors to load into before that."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            optimizer.state[param] = {
                "step": torch.zeros((), dtype=torch.float32, device=param.device),
                "exp_avg": torch.zeros_like(param),
                "exp_avg_sq": torch.zeros_like(param),
            }
