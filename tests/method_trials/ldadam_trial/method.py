from typing import Any

from matrices import ByMatrix
from optim_trials.ldadam import LDAdam


class LDAdamTraining(ByMatrix):
    def rule(self) -> Any:
        return LDAdam(self.config.method.rank)
