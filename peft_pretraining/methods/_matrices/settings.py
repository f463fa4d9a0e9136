"""What is so for methods with an update rule of their own for the target layers' whole gradients. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from peft_pretraining.flags import Allows, MethodSpec, boolean, fraction_below_one, setting
from peft_pretraining.methods._projection import settings as projection

FAMILY = MethodSpec(
    name="",
    title="",
    summary="",
    family="matrices by a rule of their own",
    settings=projection.PerLayerSettings,
    defaults={"state_dtype": "float32"},
    allows=Allows(per_layer=True, fsdp=True, fine_tuning=True, stochastic_rounding=True, tables=True, fp16=True),
    check=projection.check_whole,
)
"""Unless a method says otherwise. `adamw` is the update rule of everything else."""


@dataclass(frozen=True)
class MomentumSettings(projection.PerLayerSettings):
    """Of methods that follow a matrix's mean gradient (optim/rules/momentum.py)."""

    matrix_momentum: float = setting(
        0.95, fraction_below_one, "share of the mean gradient of matrices that an update keeps", identity=True
    )


@dataclass(frozen=True)
class NesterovSettings(MomentumSettings):
    nesterov: bool = setting(
        True, boolean, "look ahead: the matrices' mean gradient with this update's counted once more"
    )
