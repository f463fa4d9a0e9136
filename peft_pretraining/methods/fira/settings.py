from __future__ import annotations

from dataclasses import dataclass, replace

from peft_pretraining.flags import choice, setting
from peft_pretraining.methods._projection import settings as projection

RESIDUALS = ("code", "orthogonal")


@dataclass(frozen=True)
class FiraSettings(projection.SideSettings, projection.SVDSettings, projection.LimiterSettings):
    fira_residual: str = setting(
        "code",
        choice(*RESIDUALS),
        "Fira: what is added back of G, less --scale times its projection (code, as all published runs) or less its "
        "projection (orthogonal, as the paper writes it)",
    )


SPEC = replace(
    projection.WHOLE,
    name="fira",
    title="Fira",
    paper="2410.01623",
    year=2024,
    summary="GaLore, and what the projection leaves out, scaled as AdamW scales what is inside",
    settings=FiraSettings,
    values={"proj_type": ("std", "reverse_std", "left", "right")},
    meanings={
        "scale": "factor of the projected update; what is added back does not have it",
        "proj_type": "side of the projection: std (the shorter one), reverse_std, left, right; the other one has the "
        "channels",
    },
    update_rules=projection.ADAMW,
    state="mr + 2nr + 1",
    library="Fira",
    conditions=projection.CONDITIONS,
    defaults={**projection.WHOLE.defaults, "scale": 0.25},
)
