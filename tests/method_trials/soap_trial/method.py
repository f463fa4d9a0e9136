from typing import Any

from matrices import ByMatrix
from optim_trials.soap import Soap


class SoapTraining(ByMatrix):
    def rule(self) -> Any:
        return Soap(self.config.method.soap_gap)
