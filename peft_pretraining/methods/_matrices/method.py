"""What methods share that have an update rule of their own for the target layers, and AdamW for everything else."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peft_pretraining.methods._projection.method import GradientProjection
from peft_pretraining.methods.groups import state_settings


class MatrixTraining(GradientProjection):
    """The target layers' weights move by the objects of `matrices`, in the backward pass where that is asked for."""

    def matrices(self) -> dict[str, Any]:
        """Settings of the group of matrices: its rule, and a lift and a basis where there are some."""
        raise NotImplementedError

    def projection(self) -> dict[str, Any]:
        return {**state_settings(self.config), **self.matrices()}

    def sharded_dimension(self, name: str, param: Tensor) -> int:
        return 0


def adam_arguments(config: Any) -> dict[str, Any]:
    """What `--adam_beta1`, `--adam_beta2` and `--adam_eps` say, for rules that read them, too."""
    arguments: dict[str, Any] = config.rule.arguments()
    return arguments
