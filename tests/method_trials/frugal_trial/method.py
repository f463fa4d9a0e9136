from typing import Any

from matrices import ByMatrix
from optim_trials.frugal import Frugal


class FrugalTraining(ByMatrix):
    def rule(self) -> Any:
        return Frugal(density=0.5, gap=self.config.method.frugal_gap, seed=self.config.run.seed)
