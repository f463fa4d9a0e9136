"""GaLore: the gradients of the linear layers are projected onto their own top singular vectors, and AdamW runs there.

Zhao et al., arXiv 2403.03507. Every `update_proj_gap` updates a layer's basis becomes the top `rank` singular vectors
of its current gradient; in between R = PᵀG (or GQᵀ) goes through AdamW and back. The moments are (r, n) instead of
(m, n).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peft_pretraining.methods.base import TrainingMethod
from peft_pretraining.models.targets import target_linears
from peft_pretraining.optim import LowRankOptimizer


class GaLore(TrainingMethod):
    def build_optimizer(self, model: nn.Module) -> Optimizer:
        method, settings = self.config.method, self.config.optimizer
        projected = [layer.weight for layer in target_linears(model, method.target_modules).values()]
        is_projected = set(projected)
        regular = [param for param in model.parameters() if param not in is_projected]
        projection = {
            "rank": method.rank,
            "update_proj_gap": method.update_proj_gap,
            "scale": method.scale,
            "proj_type": method.proj_type,
        }
        return LowRankOptimizer(
            [{"params": regular}, {"params": projected, **projection}],
            rule=settings.optimizer,
            lr=settings.lr,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_eps,
            weight_decay=settings.weight_decay,
        )

    def before_forward(self, model: nn.Module, optimizer: LowRankOptimizer, step: int) -> None:
        optimizer.update_step = step

    def grad_norm(self, model: nn.Module, optimizer: LowRankOptimizer) -> Tensor:
        """Norm over R of the projected weights, in this update's basis, and over the full gradients of the rest."""
        optimizer.project_gradients()
        if self.config.method.clip_norm == "full":
            return super().grad_norm(model, optimizer)
        return torch.nn.utils.get_total_norm(optimizer.gradients(), foreach=True)

    def scale_gradients(self, model: nn.Module, optimizer: LowRankOptimizer, factor: Tensor) -> None:
        torch._foreach_mul_(optimizer.gradients(), factor)
