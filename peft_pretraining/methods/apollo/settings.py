from __future__ import annotations

from dataclasses import dataclass, replace

from peft_pretraining.flags import Condition, boolean, choice, setting
from peft_pretraining.methods._projection import settings as projection

PROJECTIONS = ("random", "svd")


@dataclass(frozen=True)
class ApolloSettings(projection.SideSettings, projection.RefreshSettings, projection.LimiterSettings):
    apollo_projection: str = setting(
        "random", choice(*PROJECTIONS), "APOLLO: what gradients are projected by: random matrices, or singular vectors"
    )
    scale_front: bool = setting(
        False, boolean, "APOLLO: limit the step's norm after the factor of --scale, not before: it comes to the same"
    )


SPEC = replace(
    projection.WHOLE,
    name="apollo",
    title="APOLLO",
    paper="2412.05270",
    year=2024,
    summary="the gradient, each channel as long as AdamW makes it in a random projection",
    settings=ApolloSettings,
    values={"proj_type": ("std", "reverse_std", "left", "right")},
    meanings={
        "scale": "the step is multiplied by the square root of this",
        "rank": "dimensions of the random projection in which AdamW is followed",
        "update_proj_gap": "updates between two random projections; 0 keeps the first one",
        "proj_type": "side that is projected: std (the shorter one), reverse_std, left, right; the other one has the "
        "channels",
    },
    update_rules=projection.ADAMW,
    state="mr + 2nr + 1",
    library="Apollo",
    conditions=(Condition(("scale_front",), lambda c: False, "as the factor and the limit commute"),),
)
