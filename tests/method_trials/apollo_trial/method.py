from typing import Any

from optim_trials.apollo import GaussianProjection, ScaledGradient

from peft_pretraining.methods._projection.method import GradientProjection


class Apollo(GradientProjection):
    def projection(self) -> dict[str, Any]:
        lift = ScaledGradient(self.config.method.scale)
        return {**super().projection(), "basis": GaussianProjection(), "lift": lift}
