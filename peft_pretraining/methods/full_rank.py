"""Full-rank training with torch's AdamW: the baseline."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from peft_pretraining.methods.base import TrainingMethod


class FullRank(TrainingMethod):
    def build_optimizer(self, model: nn.Module) -> Optimizer:
        settings = self.config.optimizer
        optimizer = AdamW(
            model.parameters(),
            lr=settings.lr,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        # torch creates this at the first step; a checkpoint needs tensors to load into before that.
        for param in model.parameters():
            optimizer.state[param] = {
                "step": torch.zeros((), dtype=torch.float32, device=param.device),
                "exp_avg": torch.zeros_like(param),
                "exp_avg_sq": torch.zeros_like(param),
            }
        return optimizer
