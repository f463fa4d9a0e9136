"""What is so for methods with an update rule of their own for the target layers' whole gradients. No torch."""

from __future__ import annotations

from peft_pretraining.flags import Allows, MethodSpec
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
