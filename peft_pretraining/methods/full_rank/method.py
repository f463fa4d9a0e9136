"""Full-rank training, the baseline: the composed optimizer without a basis. Its AdamW is torch's, bit for bit."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from peft_pretraining.distributed import own_share, sharded_optimizer
from peft_pretraining.methods.base import TrainingMethod
from peft_pretraining.methods.groups import by_role
from peft_pretraining.optim import LowRankOptimizer, UpdateRule
from peft_pretraining.optim.rules.update_rules import AdamW8bit


class FullRank(TrainingMethod[Optimizer]):
    def build_optimizer(self, model: nn.Module) -> Optimizer:
        settings, own = self.config.optimizer, self.config.rule.arguments()
        groups = by_role(self.config, model, {"params": list(model.named_parameters())}, adamw="torch_adamw")
        if settings.optimizer == "adam_zero":
            arguments = {"lr": settings.lr, **own, "weight_decay": settings.weight_decay, "fused": True}
            unnamed = [{**group, "params": [param for _, param in group["params"]]} for group in groups]
            sharded = sharded_optimizer(unnamed, AdamW, arguments)
            create_adam_state(own_share(sharded))
            return sharded
        rules: dict[str, str | UpdateRule] = {"adamw": "torch_adamw", "adamw8bit": AdamW8bit(torch_epsilon=True)}
        return LowRankOptimizer(
            groups,
            rule=rules.get(settings.optimizer, settings.optimizer),
            lr=settings.lr,
            **own,
            weight_decay=settings.weight_decay,
            full_norm=True,
        )


def create_adam_state(optimizer: Optimizer) -> None:
    """torch creates this at the first step; a checkpoint needs tensors to load into before that."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            optimizer.state[param] = {
                "step": torch.zeros((), dtype=torch.float32, device=param.device),
                "exp_avg": torch.zeros_like(param),
                "exp_avg_sq": torch.zeros_like(param),
            }
