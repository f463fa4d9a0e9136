"""GoLore: GaLore whose bases become random late in training (arXiv 2410.11289).

Where the gradient is mostly noise, its top singular vectors are noise, too, and GaLore can miss the true gradient for
good. From t = rand_ratio * num_training_steps on, a refresh draws the basis uniformly instead
(optim/basis/svd_basis.py: SVDThenRandom), and at every refresh the first moment is carried into the new basis,
m <- P_newᵀ P_old m.
"""

from __future__ import annotations

from typing import Any

from peft_pretraining.methods._projection.method import GradientProjection


class GoLore(GradientProjection):
    def projection(self) -> dict[str, Any]:
        schedule = {"num_training_steps": self.config.schedule.num_training_steps}
        return {**super().projection(), **schedule, "rand_ratio": self.config.method.rand_ratio}
