"""LoRA: the linear layers keep their first weights and train low-rank factors beside them.

Hu et al., arXiv 2106.09685. As a pre-training method it is the baseline that the others are measured against.
"""

from __future__ import annotations

from torch import nn

from peft_pretraining.methods._factors.method import FactorMethod
from peft_pretraining.nn import LowRankLinear
from peft_pretraining.nn.initialization import draw_factors_alone


class LoRA(FactorMethod):
    """Almost all of it is in the shared base: factors that stay where they are."""

    corrects_weights = False

    def wrap(self, linear: nn.Linear, index: int, name: str) -> LowRankLinear:
        """With `--lora_only` the factors alone, which start as near to W as its random numbers allow."""
        settings = self.config.method
        if not settings.lora_only:
            return super().wrap(linear, index, name)
        layer = LowRankLinear(
            linear,
            settings.rank,
            self.scale,
            dropout=settings.lora_dropout,
            train_scaling=settings.train_scaling,
            corrected=False,
            lora_only=True,
        )
        layer.set_factors(
            *draw_factors_alone(layer, linear.weight.detach(), self.generator(index)), keep_function=False
        )
        return layer
