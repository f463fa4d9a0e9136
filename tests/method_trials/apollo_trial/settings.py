from dataclasses import replace

from peft_pretraining.flags import Allows
from peft_pretraining.methods._projection import settings as projection

SPEC = replace(
    projection.FAMILY,
    name="apollo_trial",
    title="APOLLO",
    paper="2412.05270",
    year=2024,
    summary="the gradient, scaled by what AdamW does to a random projection of it",
    values={"proj_type": ("std",)},
    update_rules=("adamw",),
    state="mr + 2nr + 1",
    allows=Allows(per_layer=True, fsdp=True, fine_tuning=True),
)
